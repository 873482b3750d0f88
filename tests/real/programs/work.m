1;
for k = 1:15
  A = reshape(mod((1:250000) * 7919 * k, 1009), 500, 500) / 1009 + eye(500);
  [Q, R] = qr(A); x = A \ (1:500)';
  e = sort(abs(fft(x)));
  printf("%d %.6f %.6f\n", k, sum(abs(diag(R))), e(end) / e(1) > 0);
  c = {}; for i = 1:20000, c{mod(i, 97) + 1} = sprintf("%d", i * k); end
  printf("%s\n", strjoin(c(1:5), ","));
end
