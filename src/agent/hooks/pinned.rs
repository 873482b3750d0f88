//! What lets the kernel write into the program's memory some time after it has looked the
//! page up, or through its protection, so that a page may change unseen by a tracker that
//! protects it in between:
//!
//! * direct I/O (`O_DIRECT`): the page is looked up when the read begins and filled when the
//!   disk has answered; `process_vm_writev` on the program itself, in the same way;
//! * writes to `/proc/self/mem`: likewise, and they go through write protection without a
//!   fault (`FOLL_FORCE`).
//!
//! Only notes that such a thing is in use. Where it is, pages are swept while the program is
//! stopped and no longer before (every thread is out of the kernel then), and what relies on
//! faults takes all memory for written.
//!
//! Called by `hooks::handle` (paths after `files` has had its look), in any thread and context;
//! from the program's start, long before a table of files is open.

use super::frame::CallFrame;
use super::user;
use crate::agent::refusal::{self, Kind};
use crate::agent::state::AGENT;
use ckpt_sys::callsite::Fast;
use libc::c_long;
use std::sync::atomic::Ordering::Relaxed;

/// The calls, and what stage 1 lets through by itself.
pub const CALLS: &[(c_long, Fast)] = &[
    (libc::SYS_open, Fast::Open),
    (libc::SYS_openat, Fast::OpenAt),
    (libc::SYS_openat2, Fast::Nothing),
    (libc::SYS_fcntl, Fast::Fcntl),
    (libc::SYS_process_vm_writev, Fast::Nothing),
];

/// What stage 1 may decide about `nr`, where it is one of [`CALLS`].
pub fn shortcut(nr: c_long) -> Option<Fast> {
    let found = CALLS.iter().find(|&&(call, _)| call == nr);
    found.map(|&(_, fast)| fast)
}

/// Looks at a call that is about to be made.
pub fn look(f: &CallFrame) {
    let [a, b, ..] = f.args;
    match f.rax {
        libc::SYS_fcntl if b as i32 == libc::F_SETFL && f.args[2] as i32 & libc::O_DIRECT != 0 => {
            refusal::note(Kind::DirectIo);
        }
        libc::SYS_process_vm_writev if is_own(a as i32) => refusal::note(Kind::DirectIo),
        libc::SYS_open | libc::SYS_openat | libc::SYS_openat2 => {
            let Some((_, _, flags, _)) = super::files::open::arguments(f) else {
                return;
            };
            if flags & libc::O_DIRECT != 0 {
                refusal::note(Kind::DirectIo);
            }
        }
        _ => {}
    }
}

/// Looks at the path of an open that is about to be made, unless [`super::files`] has made the file.
pub fn look_at_path(f: &CallFrame) {
    if let libc::SYS_open | libc::SYS_openat | libc::SYS_openat2 = f.rax
        && let Some((_, path, flags, _)) = super::files::open::arguments(f)
        && flags & libc::O_ACCMODE != libc::O_RDONLY
        && names_memory(path)
    {
        refusal::note(Kind::MemoryFile);
    }
}

/// The program's process, by either number.
fn is_own(pid: i32) -> bool {
    [&AGENT.pid, &AGENT.real_pid]
        .map(|pid| pid.load(Relaxed))
        .contains(&pid)
}

/// A descriptor that the program has, found by a look at all of them.
pub fn found(flags: i32, path: &[u8]) {
    // Of a pipe it means packets.
    if flags & libc::O_DIRECT != 0 && !path.starts_with(b"pipe:") {
        refusal::note(Kind::DirectIo);
    }
    if flags & libc::O_ACCMODE != libc::O_RDONLY && is_memory(path) {
        refusal::note(Kind::MemoryFile);
    }
}

/// Does the path at this address end in `mem`, as a last component? A link of another name
/// that leads there is found at the stop, if it is open then.
fn names_memory(at: u64) -> bool {
    let mut text = [0u8; 256];
    let Ok(got) = user::read_string(at, &mut text) else {
        return false;
    };
    match text[..got].iter().position(|&byte| byte == 0) {
        Some(end) => is_memory(&text[..end]),
        // Longer than any of /proc.
        None => false,
    }
}

fn is_memory(path: &[u8]) -> bool {
    path == b"mem" || (path.ends_with(b"/mem") && !path.starts_with(b"/dev/"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    fn frame(nr: c_long, args: &[u64]) -> CallFrame {
        let mut all = [0; 6];
        all[..args.len()].copy_from_slice(args);
        CallFrame {
            rax: nr,
            args: all,
            rbp: 0,
            slot: 0,
        }
    }

    #[test]
    fn direct_io_is_noted_and_a_pipe_of_packets_is_not() {
        in_child(|| {
            let path = c"/tmp/a".as_ptr() as u64;
            let open = |flags: i32| look(&frame(libc::SYS_open, &[path, flags as u64, 0]));
            open(libc::O_RDWR);
            found(libc::O_DIRECT | libc::O_WRONLY, b"pipe:[7]");
            assert!(!refusal::was_noted(Kind::DirectIo));
            open(libc::O_DIRECT);
            assert!(refusal::was_noted(Kind::DirectIo));
        });
    }

    #[test]
    fn the_files_of_memory_are_noted_when_they_can_be_written() {
        in_child(|| {
            let open = |path: &std::ffi::CStr, flags: i32| {
                let at = path.as_ptr() as u64;
                look_at_path(&frame(libc::SYS_openat, &[0, at, flags as u64, 0]));
                refusal::was_noted(Kind::MemoryFile)
            };
            assert!(!open(c"/proc/self/mem", libc::O_RDONLY));
            assert!(!open(c"/tmp/mems", libc::O_RDWR));
            assert!(!open(c"/dev/mem", libc::O_RDWR));
            found(libc::O_RDONLY, b"/proc/7/mem");
            assert!(open(c"mem", libc::O_WRONLY));
            assert!(!refusal::was_noted(Kind::DirectIo));
        });
    }
}
