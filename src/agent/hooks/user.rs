//! The program's memory as a system call sees it: a bad pointer is EFAULT, not a
//! crash. Any thread, any context; no locks, no allocation.
//!
//! The kernel does the checking (`process_vm_readv` on ourselves, of strings
//! `rt_sigprocmask`). Where it may not be asked (a sandbox was entered, an old container profile forbids the call) the
//! memory is touched directly.

use super::frame::CallFrame;
use crate::agent::refusal;
use crate::agent::track::fault;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU8, Ordering};

#[repr(C)]
struct Iovec {
    base: u64,
    len: u64,
}

fn transfer(nr: libc::c_long, addr: u64, local: u64, len: usize) -> Result<usize, i32> {
    let near = Iovec {
        base: local,
        len: len as u64,
    };
    let far = Iovec {
        base: addr,
        len: len as u64,
    };
    if refusal::sandboxed() {
        return Err(libc::EPERM);
    }
    // SAFETY: both vectors live on this stack; the kernel checks the far side.
    let ret = unsafe {
        let tid = syscall!(libc::SYS_gettid);
        syscall!(nr, tid, &raw const near, 1, &raw const far, 1, 0)
    };
    if ret < 0 {
        Err(-ret as i32)
    } else {
        Ok(ret as usize)
    }
}

/// Reads up to `buf.len()` bytes at `addr`; fewer where the mapping ends.
pub fn read_bytes(addr: u64, buf: &mut [u8]) -> Result<usize, i32> {
    let local = buf.as_mut_ptr() as u64;
    match transfer(libc::SYS_process_vm_readv, addr, local, buf.len()) {
        Err(e) if e != libc::EFAULT => {
            // SAFETY: the checked way is closed; the program passed this pointer
            // for reading, as it would have to libc's own wrappers.
            unsafe { std::ptr::copy(addr as *const u8, buf.as_mut_ptr(), buf.len()) };
            Ok(buf.len())
        }
        r => r,
    }
}

/// Would the eight bytes at `addr`, which is a multiple of eight, be EFAULT? The cheapest call that
/// looks at memory and does nothing: rt_sigprocmask(2) reads the set before it finds that there is no
/// such way to use it.
fn is_out_of_reach(addr: u64) -> bool {
    const NO_SUCH: i32 = -1;
    // SAFETY: changes nothing.
    let ret = unsafe { syscall!(libc::SYS_rt_sigprocmask, NO_SUCH, addr, 0, 8) };
    ret == -(libc::EFAULT as isize)
}

/// Reads the string at `addr`, its NUL included, or as much of it as `buf` holds. What lies behind a
/// string is not touched. Every page of it is asked for first; a program that unmaps it in another
/// thread during its call has no right to expect anything.
pub fn read_string(addr: u64, buf: &mut [u8]) -> Result<usize, i32> {
    const PAGE: u64 = 4096;
    let mut done = 0;
    while done < buf.len() {
        let at = addr.checked_add(done as u64).ok_or(libc::EFAULT)?;
        if !refusal::sandboxed() && is_out_of_reach(at & !7) {
            match done {
                0 => return Err(libc::EFAULT),
                _ => break,
            }
        }
        let room = (buf.len() - done).min((PAGE - at % PAGE) as usize);
        let part = &mut buf[done..done + room];
        // SAFETY: within a page that can be read, or the program passed this string to be read to
        // its end; no byte behind a NUL is looked at.
        let got = unsafe { copy_string(at as *const u8, part) };
        done += got;
        if part[got - 1] == 0 {
            break;
        }
    }
    Ok(done)
}

/// # Safety
/// `from` is a string, or as many bytes as `to` has.
unsafe fn copy_string(from: *const u8, to: &mut [u8]) -> usize {
    for (k, byte) in to.iter_mut().enumerate() {
        // SAFETY: no NUL came before.
        *byte = unsafe { from.add(k).read_volatile() };
        if *byte == 0 {
            return k + 1;
        }
    }
    to.len()
}

/// Plain data that any bytes are a valid value of.
///
/// # Safety
/// Implementors are `repr(C)` without padding-dependent meaning, pointers or niches.
pub unsafe trait Plain: Copy + Default {}

macro_rules! plain { ($($t:ty),*) => { $(
    // SAFETY: integers, arrays of them or repr(C) structs of integers.
    unsafe impl crate::agent::hooks::user::Plain for $t {}
)* } }
pub(super) use plain;
plain!(i32, u32, u64, [u64; 2], [u64; 3], [u8; 16], [u64; 8]);

/// Reads a `T` at `addr`; EFAULT when any byte of it is out of reach.
pub fn read<T: Plain>(addr: u64) -> Result<T, i32> {
    let mut value = T::default();
    // SAFETY: `Plain`: every byte pattern is a value.
    let bytes =
        unsafe { std::slice::from_raw_parts_mut((&raw mut value).cast::<u8>(), size_of::<T>()) };
    if read_bytes(addr, bytes)? < size_of::<T>() {
        return Err(libc::EFAULT);
    }
    Ok(value)
}

/// As [`read`], without a system call where the page is known to be there: the frame lies on it.
pub fn read_near(frame: &CallFrame, addr: u64) -> Result<u64, i32> {
    const PAGE: u64 = 4096;
    let end = addr.saturating_add(size_of::<u64>() as u64);
    let here = std::ptr::from_ref(frame) as u64;
    if addr / PAGE != here / PAGE || (end - 1) / PAGE != here / PAGE {
        return read(addr);
    }
    // SAFETY: on the page of the caller's frame.
    Ok(unsafe { std::ptr::read_unaligned(addr as *const u64) })
}

/// Writes `value` at `addr`; EFAULT when that cannot be done.
pub fn write<T: Plain>(addr: u64, value: &T) -> Result<(), i32> {
    let local = (value as *const T) as u64;
    fault::touch(addr, size_of::<T>() as u64);
    match transfer(libc::SYS_process_vm_writev, addr, local, size_of::<T>()) {
        Ok(n) if n < size_of::<T>() => Err(libc::EFAULT),
        Ok(_) => {
            // The kernel looks a page up and copies afterwards; a sweep in between has
            // protected it before it was changed. This is a write of its own, later.
            for at in [addr, addr + size_of::<T>() as u64 - 1] {
                // SAFETY: the kernel has just written there.
                unsafe { (*(at as *const AtomicU8)).fetch_or(0, Ordering::Relaxed) };
            }
            Ok(())
        }
        Err(libc::EFAULT) => Err(libc::EFAULT),
        Err(_) => {
            // SAFETY: as in `read_bytes`.
            unsafe { std::ptr::write_unaligned(addr as *mut T, *value) };
            Ok(())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A program in a sandbox without process_vm_readv, and a path at the very end of its stack
    /// (an argument): reading on behind it was a SIGSEGV.
    #[test]
    fn nothing_is_read_behind_a_string() {
        // SAFETY: two pages of our own, of which the second one goes.
        let end = unsafe {
            let (prot, flags) = (3, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
            let at = libc::mmap(std::ptr::null_mut(), 8192, prot, flags, -1, 0).cast::<u8>();
            assert_eq!(libc::munmap(at.add(4096).cast(), 4096), 0);
            at.add(4096)
        };
        let mut buf = [0xffu8; 64];
        // SAFETY: the last four bytes of a page of ours.
        let text = unsafe {
            let text = end.sub(4);
            std::ptr::copy(c"mem".as_ptr().cast(), text, 4);
            assert_eq!(copy_string(text, &mut buf), 4);
            text
        };
        assert_eq!(&buf[..5], b"mem\0\xff");
        assert_eq!(read_string(text as u64, &mut buf), Ok(4));
        assert_eq!(read_string(end as u64, &mut buf), Err(libc::EFAULT));
        // SAFETY: the buffer is shorter than the string.
        assert_eq!(unsafe { copy_string(text, &mut buf[..2]) }, 2);
    }

    #[test]
    fn bad_pointers_are_efault() {
        assert_eq!(read::<u64>(8), Err(libc::EFAULT));
        assert_eq!(write::<u64>(8, &1), Err(libc::EFAULT));
        let mut word = 7u64;
        let at = &raw mut word as u64;
        assert_eq!(read::<u64>(at), Ok(7));
        assert_eq!(write::<u64>(at, &9), Ok(()));
        assert_eq!(word, 9);
    }
}
