//! The memory functions that compilers call (`asm/memory.S`), in place of libc's: hooks run in the
//! midst of a system call, behind which every vector register must be what it was, and stage 2 of the
//! call-site net saves what these use. Any context.

use std::arch::global_asm;

global_asm!(include_str!("../asm/memory.S"), options(att_syntax));

#[cfg(test)]
mod tests {
    use std::ffi::{c_char, c_int};
    use std::hint::black_box;

    // Those of this crate: the linker prefers them to libc's.
    unsafe extern "C" {
        fn memcpy(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
        fn memmove(to: *mut u8, from: *const u8, len: usize) -> *mut u8;
        fn memset(to: *mut u8, value: c_int, len: usize) -> *mut u8;
        fn memcmp(a: *const u8, b: *const u8, len: usize) -> c_int;
        fn bcmp(a: *const u8, b: *const u8, len: usize) -> c_int;
        fn strlen(text: *const c_char) -> usize;
    }

    /// Every length that takes a way of its own, and some.
    fn lengths() -> impl Iterator<Item = usize> {
        (0..300).chain([511, 512, 513, 4095, 4096, 4097, 10_000])
    }

    /// Byte by byte, in a way that is not made a call of the function under test.
    fn pattern(len: usize, seed: u8) -> Vec<u8> {
        (0..len)
            .map(|k| black_box((k as u8).wrapping_mul(31) ^ seed))
            .collect()
    }

    fn same(a: &[u8], b: &[u8]) -> bool {
        let mut pairs = a.iter().zip(b);
        a.len() == b.len() && pairs.all(|(a, b)| black_box(*a) == black_box(*b))
    }

    #[test]
    fn they_are_ours() {
        for at in [memcpy as *const () as usize, bcmp as *const () as usize] {
            let own = they_are_ours as *const () as usize;
            assert!(at.abs_diff(own) < 1 << 30, "{at:#x} is far from {own:#x}");
        }
    }

    #[test]
    fn copies_with_every_distance() {
        for len in lengths() {
            for distance in (0..70).chain([len / 2, len, len + 1]) {
                for forward in [false, true] {
                    let whole = pattern(len + distance + 32, 7);
                    let (mut got, mut want) = (whole.clone(), whole.clone());
                    let (from, to) = match forward {
                        true => (16 + distance, 16),
                        false => (16, 16 + distance),
                    };
                    for k in 0..len {
                        want[to + k] = black_box(whole[from + k]);
                    }
                    let base = got.as_mut_ptr();
                    // SAFETY: both ranges are within the vector.
                    let back = unsafe { memmove(base.add(to), base.add(from), len) };
                    assert_eq!(back as usize, base as usize + to);
                    assert!(same(&got, &want), "{len} {distance} {forward}");
                }
            }
            let (from, mut to) = (pattern(len, 3), pattern(len + 2, 9));
            let mut want = to.clone();
            for k in 0..len {
                want[k + 1] = black_box(from[k]);
            }
            // SAFETY: as above; they do not overlap.
            unsafe { memcpy(to.as_mut_ptr().add(1), from.as_ptr(), len) };
            assert!(same(&to, &want), "{len}");
        }
    }

    #[test]
    fn sets() {
        for len in lengths() {
            for value in [0, 0xa5, -1, 0x1234] {
                let mut got = pattern(len + 32, 5);
                let mut want = got.clone();
                for byte in &mut want[16..16 + len] {
                    *byte = black_box(value as u8);
                }
                // SAFETY: within the vector.
                unsafe { memset(got.as_mut_ptr().add(16), value, len) };
                assert!(same(&got, &want), "{len} {value}");
            }
        }
    }

    #[test]
    fn compares() {
        for len in lengths() {
            let a = pattern(len, 11);
            let mut b = a.clone();
            let order = |a: &[u8], b: &[u8]| {
                // SAFETY: both are as long as that.
                let (order, other) = unsafe {
                    (
                        memcmp(a.as_ptr(), b.as_ptr(), a.len()),
                        bcmp(a.as_ptr(), b.as_ptr(), a.len()),
                    )
                };
                assert_eq!(order == 0, other == 0);
                order.signum()
            };
            assert_eq!(order(&a, &b), 0, "{len}");
            for at in (0..len).step_by(if len > 300 { 97 } else { 1 }) {
                // The first difference counts, as of unsigned bytes.
                let last = len - 1;
                b[at] = a[at] ^ 0x80;
                b[last] ^= u8::from(at != last) * 0x80;
                let want = if a[at] < 0x80 { -1 } else { 1 };
                assert_eq!(order(&a, &b), want, "{len} {at}");
                assert_eq!(order(&b, &a), -want, "{len} {at}");
                b[last] = a[last];
                b[at] = a[at];
            }
        }
    }

    #[test]
    fn measures_at_the_end_of_a_page() {
        // SAFETY: two pages of our own, of which the second one goes.
        let end = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            let at = libc::mmap(std::ptr::null_mut(), 8192, 3, flags, -1, 0).cast::<u8>();
            assert_eq!(libc::munmap(at.add(4096).cast(), 4096), 0);
            at.add(4096)
        };
        for len in 0..200 {
            for space in 0..20 {
                // SAFETY: within the first page, which is read and written only here.
                unsafe {
                    let text = end.sub(len + 1 + space);
                    for k in 0..len {
                        text.add(k).write_volatile(b'x');
                    }
                    text.add(len).write_volatile(0);
                    assert_eq!(strlen(text.cast()), len);
                }
            }
        }
    }
}
