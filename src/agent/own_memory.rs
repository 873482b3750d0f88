//! This process's memory by system calls, where it may not be what it is taken for: what is not
//! there is an error, not a signal.
//!
//! By process_vm_readv(2) and process_vm_writev(2); the system-call filters of some containers
//! forbid these, then by /proc/thread-self/mem, one part after the other.
//!
//! Helper thread (also the new one after a rollback), and the program's in `ckpt_rollback`.

use super::collect::descriptors::sys::{self, Fd};
use ckpt_sys::raw::{SysResult, check};
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU8, Ordering};

/// The kernel takes so many parts at once (UIO_MAXIOV).
pub const PARTS: usize = 1024;

/// Is it the call that is not permitted?
fn is_forbidden(errno: i32) -> bool {
    matches!(errno, libc::EPERM | libc::ENOSYS | libc::EACCES)
}

/// process_vm_readv or process_vm_writev on this process.
///
/// # Safety
/// `local` is memory of the caller's that may be read, or written.
unsafe fn transfer(nr: libc::c_long, local: &[[u64; 2]], remote: &[[u64; 2]]) -> SysResult {
    // SAFETY: the caller's promise; the kernel checks the other side itself.
    check(unsafe {
        let pid = syscall!(libc::SYS_getpid);
        syscall!(
            nr,
            pid,
            local.as_ptr(),
            local.len(),
            remote.as_ptr(),
            remote.len(),
            0
        )
    })
}

fn memory_file(flags: i32) -> Result<Fd, i32> {
    sys::open(b"/proc/thread-self/mem", flags, 0)
}

/// Reads all of `into`; EFAULT: it is not all there.
pub fn read(addr: u64, into: &mut [u8]) -> Result<(), i32> {
    gather(&[[addr, into.len() as u64]], into)
}

/// Reads the parts (address, length; [`PARTS`] at most), which `into` has just room for.
pub fn gather(parts: &[[u64; 2]], into: &mut [u8]) -> Result<(), i32> {
    let local = [into.as_mut_ptr() as u64, into.len() as u64];
    // SAFETY: `into` is to be written.
    match unsafe { transfer(libc::SYS_process_vm_readv, &[local], parts) } {
        Ok(got) if got == into.len() => return Ok(()),
        // A call moves 2 GiB at most.
        Ok(got) if parts.len() == 1 && got > 0 => {
            return read(parts[0][0] + got as u64, &mut into[got..]);
        }
        Ok(_) if parts.len() == 1 => return Err(libc::EFAULT),
        Err(errno) if is_forbidden(errno) => {
            return gather_by(&memory_file(libc::O_RDONLY)?, parts, into);
        }
        Err(errno) => return Err(errno),
        Ok(_) => {}
    }
    let mut rest = into;
    for &[addr, len] in parts {
        let (here, behind) = rest.split_at_mut(len as usize);
        rest = behind;
        read(addr, here)?;
    }
    Ok(())
}

fn gather_by(memory: &Fd, parts: &[[u64; 2]], into: &mut [u8]) -> Result<(), i32> {
    let mut rest = into;
    for &[addr, len] in parts {
        let (here, behind) = rest.split_at_mut(len as usize);
        rest = behind;
        let mut done = 0;
        while done < here.len() {
            let to = &mut here[done..];
            // SAFETY: room for as many bytes.
            let got = check(unsafe {
                let at = addr + done as u64;
                syscall!(
                    libc::SYS_pread64,
                    memory.raw(),
                    to.as_mut_ptr(),
                    to.len(),
                    at
                )
            });
            match got {
                Ok(0) | Err(libc::EIO) => return Err(libc::EFAULT),
                Ok(got) => done += got,
                Err(errno) => return Err(errno),
            }
        }
    }
    Ok(())
}

/// Writes the parts (address, length, where the bytes lie; [`PARTS`] at most).
///
/// # Safety
/// The bytes are there, and the caller may write to the addresses where they are.
pub unsafe fn scatter(parts: &[(u64, u64, u64)]) -> Result<(), i32> {
    let mut left: Vec<(u64, u64, u64)> = parts.to_vec();
    while !left.is_empty() {
        let local: Vec<[u64; 2]> = left.iter().map(|part| [part.2, part.1]).collect();
        let remote: Vec<[u64; 2]> = left.iter().map(|part| [part.0, part.1]).collect();
        // SAFETY: the caller's promise.
        let mut done = match unsafe { transfer(libc::SYS_process_vm_writev, &local, &remote) } {
            Ok(0) => return Err(libc::EFAULT),
            Ok(done) => done as u64,
            // SAFETY: the caller's promise.
            Err(errno) if is_forbidden(errno) => return unsafe { scatter_by_file(&left) },
            Err(errno) => return Err(errno),
        };
        // A call moves 2 GiB at most.
        left.retain_mut(|(addr, len, from)| {
            let step = done.min(*len);
            done -= step;
            (*addr, *len, *from) = (*addr + step, *len - step, *from + step);
            *len > 0
        });
    }
    Ok(())
}

/// The kernel writes there in spite of protections, without a fault that a tracker could see:
/// each page is written to once more, as it is.
///
/// # Safety
/// As for [`scatter`].
unsafe fn scatter_by_file(parts: &[(u64, u64, u64)]) -> Result<(), i32> {
    const PAGE: u64 = 4096;
    let memory = memory_file(libc::O_RDWR)?;
    for &(addr, len, from) in parts {
        let mut done = 0;
        while done < len {
            // SAFETY: the caller's promise; the file reports what is not there.
            let wrote = check(unsafe {
                let (at, from) = (addr + done, from + done);
                syscall!(libc::SYS_pwrite64, memory.raw(), from, len - done, at)
            });
            match wrote {
                Ok(0) | Err(libc::EIO) => return Err(libc::EFAULT),
                Ok(wrote) => done += wrote as u64,
                Err(errno) => return Err(errno),
            }
        }
        let pages = (addr & !(PAGE - 1)..addr + len).step_by(PAGE as usize);
        for at in pages.map(|page| page.max(addr)) {
            // SAFETY: the kernel has just written there, and the caller may.
            unsafe { (*(at as *const AtomicU8)).fetch_or(0, Ordering::Relaxed) };
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three parts of one page, the third without length, by both ways.
    #[test]
    fn parts_come_and_go() {
        let from: Vec<u8> = (0..=255).collect();
        let at = from.as_ptr() as u64;
        let parts = [[at + 3, 4], [at + 100, 2], [at, 0]];
        let expected = [3, 4, 5, 6, 100, 101];
        let mut into = [0u8; 6];
        gather(&parts, &mut into).unwrap();
        assert_eq!(into, expected);
        into = [0; 6];
        gather_by(&memory_file(libc::O_RDONLY).unwrap(), &parts, &mut into).unwrap();
        assert_eq!(into, expected);

        let mut to = vec![0u8; 3 * 4096];
        let base = to.as_mut_ptr() as u64;
        for way in [scatter, scatter_by_file] {
            to.fill(0);
            let parts = [(base + 4090, 6 + 4096 + 1, to_bytes()), (base, 1, at + 9)];
            // SAFETY: all of it is this test's own.
            unsafe { way(&parts) }.unwrap();
            assert_eq!(to[0], 9);
            assert!(to[4090..4096 + 4097].iter().all(|&byte| byte == 7));
            assert!(to[1..4090].iter().chain(&to[8193..]).all(|&byte| byte == 0));
        }
    }

    fn to_bytes() -> u64 {
        static SEVENS: [u8; 2 * 4096] = [7; 2 * 4096];
        SEVENS.as_ptr() as u64
    }

    #[test]
    fn what_is_not_there_is_an_error() {
        let mut into = [0u8; 16];
        assert_eq!(read(8, &mut into), Err(libc::EFAULT));
        let memory = memory_file(libc::O_RDONLY).unwrap();
        assert_eq!(gather_by(&memory, &[[8, 16]], &mut into), Err(libc::EFAULT));
        let parts = [(8, 1, into.as_ptr() as u64)];
        for way in [scatter, scatter_by_file] {
            // SAFETY: nothing is there.
            let result = unsafe { way(&parts) };
            assert_eq!(result, Err(libc::EFAULT));
        }
    }
}
