//! Does the program have children? A process is checkpointed alone for now: a live
//! child, or one that has ended and was not waited for, puts the checkpoint off.

use crate::agent::procfs::TaskList;
use crate::agent::procfs::{number, read_file};
use ckpt_sys::syscall;

/// `Err(reason)` while there are children of the program (helper thread).
pub fn none_alive() -> Result<(), String> {
    // __WALL sees clone children with other exit signals too; our own writers are
    // reaped before this is asked.
    let mut info = [0u64; 16];
    let options = libc::WEXITED
        | libc::WSTOPPED
        | libc::WCONTINUED
        | libc::WNOHANG
        | libc::WNOWAIT
        | libc::__WALL;
    // SAFETY: a siginfo buffer of 128 bytes.
    let ret = unsafe {
        syscall!(
            libc::SYS_waitid,
            libc::P_ALL,
            0,
            info.as_mut_ptr(),
            options,
            0
        )
    };
    if ret == -(libc::ECHILD as isize) {
        return Ok(());
    }
    Err(describe())
}

fn describe() -> String {
    let mut tasks = TaskList::new();
    if tasks.read().is_ok() {
        for tid in tasks.ids() {
            let text =
                read_file(format!("/proc/self/task/{tid}/children").as_bytes()).unwrap_or_default();
            if let Some(child) = number(&text) {
                let name = read_file(format!("/proc/{child}/comm").as_bytes()).unwrap_or_default();
                let name = String::from_utf8_lossy(name.trim_ascii()).into_owned();
                return format!("the program has a child process ({child} {name})");
            }
        }
    }
    "the program has a child process".into()
}
