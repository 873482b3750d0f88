! A Fortran program of arrays and formatted output, for the table of real programs.
program numbers
  implicit none
  integer, parameter :: n = 300
  real(8), allocatable :: a(:, :), b(:, :), c(:, :)
  integer :: i, j, round
  allocate (a(n, n), b(n, n), c(n, n))
  do j = 1, n
    do i = 1, n
      a(i, j) = sin(real(i*j, 8))
      b(i, j) = cos(real(i + j, 8))
    end do
  end do
  do round = 1, 500
    c = matmul(a, b)
    a = c/maxval(abs(c))
    write (*, '(i5, 3es24.15)') round, a(1, 1), a(n/2, n/3), sum(a)
  end do
end program numbers
