//! What ends knowledge about descriptors ([`super::cache`]): other open files behind their
//! numbers, positions that go back, children that share open files. Any thread; plain
//! close(2) is done by stage 1 itself.

use super::guard::Recording;
use super::{cache, data, execute, turns};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user;
use libc::{CLONE_FILES, CLONE_THREAD};

/// `None`: the call goes on its way.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [a, b, ..] = f.args;
    match f.rax {
        libc::SYS_close => cache::forget(a as i32),
        libc::SYS_close_range => cache::forget_range(a as u32, b as u32),
        // The new number may stand for a file until the call is over: both before and
        // after it nothing must be known.
        libc::SYS_dup2 | libc::SYS_dup3 if a as i32 != b as i32 => {
            cache::forget(b as i32);
            f.rax = execute(f);
            cache::forget(b as i32);
            return Some(Verdict::Done);
        }
        libc::SYS_fcntl if b as i32 == libc::F_SETFL => {
            // Descriptors that share the open file have lost O_APPEND, or got it.
            cache::forget_all();
        }
        libc::SYS_lseek => seek(a as i32),
        libc::SYS_unshare if a & CLONE_FILES as u64 != 0 => cache::tables_differ(),
        libc::SYS_fork | libc::SYS_vfork => cache::child(),
        libc::SYS_clone => birth(a),
        libc::SYS_clone3 => birth(user::read::<u64>(a).unwrap_or(0)),
        _ => {}
    }
    None
}

fn birth(flags: u64) {
    if flags & CLONE_THREAD as u64 == 0 {
        return cache::child();
    }
    turns::expect_several();
    if flags & CLONE_FILES as u64 == 0 {
        cache::tables_differ();
    }
}

/// A position may go back. Once a descriptor is known to be of no interest stage 1 sends
/// its lseek straight on.
fn seek(fd: i32) {
    if cache::flags(fd) == 0
        && let Some(mut recording) = Recording::begin()
        && data::look(&mut recording, fd).is_none()
    {
        return;
    }
    cache::forget_positions();
}
