set.seed(7)
for (k in 1:14) {
  m <- matrix(rnorm(160000), 400); q <- qr(m); s <- svd(m, nu=0, nv=0)$d
  l <- list(); for (i in 1:20000) l[[paste0("k", i %% 501)]] <- i * k
  x <- sort(sapply(split(rnorm(5e5), rep(1:1000, 500)), mean))
  cat(k, format(sum(s), digits=8), length(l), format(x[[10]], digits=6), "\n")
}
