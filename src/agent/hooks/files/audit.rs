//! Counting the modifying calls that reach the hooks (`CKPT_AUDIT=path`), so that a test can
//! compare with what a tracer saw: "N of N".
//!
//! The counts are text in a small shared mapping of `path.<pid>`, right after every call, also
//! when the process is killed. A process that calls exec goes on counting in the same file.
//! [`start`] runs last in the constructor; [`count`] in any thread.

use super::{MODIFYING, open};
use crate::agent::hooks::frame::CallFrame;
use crate::agent::state::is_agents_process;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicBool, AtomicPtr, AtomicU8, Ordering::*};

/// A line: the number, a space, the count, a newline.
const LINE: usize = 4 + 1 + 12 + 1;
const NUMBERS: usize = 512;
const LEN: usize = LINE * NUMBERS;

static LINES: AtomicPtr<u8> = AtomicPtr::new(std::ptr::null_mut());
static LOCK: AtomicBool = AtomicBool::new(false);

/// Is an audit on?
#[inline]
pub fn on() -> bool {
    !LINES.load(Relaxed).is_null()
}

/// Begins to count. Before the call-site net is laid: its table depends on [`on`].
///
/// # Safety
/// Constructor, once.
pub unsafe fn start(path: &[u8], pid: i32) -> Result<(), i32> {
    let name = format!("{}.{pid}\0", String::from_utf8_lossy(path));
    let flags = libc::O_RDWR | libc::O_CREAT | libc::O_CLOEXEC;
    // SAFETY: our own file and mapping.
    unsafe {
        let fd = check(syscall!(
            libc::SYS_openat,
            libc::AT_FDCWD,
            name.as_ptr(),
            flags,
            0o600
        ))?;
        let mapped = check(syscall!(libc::SYS_ftruncate, fd, LEN)).and_then(|_| {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            check(syscall!(
                libc::SYS_mmap,
                0,
                LEN,
                prot,
                libc::MAP_SHARED,
                fd,
                0
            ))
        });
        syscall!(libc::SYS_close, fd);
        let at = mapped? as *mut u8;
        if *at == 0 {
            for nr in 0..NUMBERS {
                let line = format!("{nr:4} {:012}\n", 0);
                std::ptr::copy_nonoverlapping(line.as_ptr(), at.add(nr * LINE), LINE);
            }
        }
        LINES.store(at, SeqCst);
    }
    Ok(())
}

/// Tells a tracer that what follows counts.
pub fn mark() {
    let text = b"ckpt audit begins";
    // SAFETY: no such descriptor: nothing is written.
    unsafe { syscall!(libc::SYS_write, -1i32, text.as_ptr(), text.len()) };
}

/// Does this call modify, as far as its arguments say?
fn counts(f: &CallFrame) -> bool {
    match f.rax {
        libc::SYS_open | libc::SYS_openat | libc::SYS_openat2 => {
            open::arguments(f).is_some_and(|(_, _, flags, _)| open::modifies(flags))
        }
        libc::SYS_ioctl => f.args[1] as u32 & 0xff00 == 0x9400,
        // What a mapping modifies is no call.
        libc::SYS_mmap => false,
        nr => MODIFYING.iter().any(|&(modifying, _)| modifying == nr),
    }
}

/// Counts a call of the agent's own process.
pub fn count(f: &CallFrame) {
    let lines = LINES.load(Relaxed);
    let index = usize::try_from(f.rax).ok().filter(|&nr| nr < NUMBERS);
    let Some(index) = index.filter(|_| counts(f) && is_agents_process()) else {
        return;
    };
    let _hook = crate::agent::state::InHook::enter();
    while LOCK.swap(true, Acquire) {
        std::hint::spin_loop();
    }
    // SAFETY: the digits of a line of the mapping, twelve bytes, under the lock.
    let digits =
        unsafe { std::slice::from_raw_parts(lines.add(index * LINE + 5).cast::<AtomicU8>(), 12) };
    for digit in digits.iter().rev() {
        let value = digit.load(Relaxed);
        if value != b'9' {
            digit.store(value + 1, Relaxed);
            break;
        }
        digit.store(b'0', Relaxed);
    }
    LOCK.store(false, Release);
}
