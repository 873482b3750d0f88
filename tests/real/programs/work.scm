(define (f s i h) (if (< i 5000000) (let ((s (modulo (+ (* s 1103515245) 12345) 2147483648))) (if (= 0 (modulo i 3)) (hash-set! h (modulo s 1009) (cons i (let ((o (hash-ref h (modulo s 1009) '()))) (if (> (length o) 5) '() o))))) (if (= 0 (modulo i 500000)) (begin (display (list i s (hash-fold (lambda (k v a) (+ a (length v))) 0 h))) (newline))) (f s (+ i 1) h))))
(f 1 0 (make-hash-table))
