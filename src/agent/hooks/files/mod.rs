//! Everything that modifies a file, a name or an attribute: decoded, told to the
//! recorder (`persist::recorder`), then executed, all inside one hook, so that no
//! checkpoint comes between a record and its operation (`docs/FILES.md`, "Atomicity").
//!
//! Any thread of the program, any context. Nothing here knows better than the kernel what a
//! call will do: where a pointer is bad, a name is missing or the call is bound to fail, the call
//! is forwarded untouched, and the program gets what the kernel says. A record that turned
//! out unnecessary does no harm.
//!
//! | file | calls |
//! |---|---|
//! | [`guard`] | the extent of such a hook: signals blocked, the recorder's lock |
//! | [`paths`] | paths and names as the recorder wants them |
//! | [`resolve`] | what a path really leads to |
//! | [`open`] | open, creat, openat, openat2 |
//! | [`data`], [`copies`] | what changes contents and sizes through descriptors and paths |
//! | [`mapped`] | mmap, shared and writable |
//! | [`tree`] | what creates, removes and moves names |
//! | [`shared`] | mprotect that makes such a mapping writable, mremap that makes it longer |
//! | [`turns`] | threads that write at one position |
//! | [`requests`] | ioctl requests, and what lets the kernel write by itself (io_uring, AIO) |
//! | [`attributes`] | modes, owners, times, extended attributes |
//! | [`cache`], [`descriptors`] | which descriptors need no look, and what ends that knowledge |
//! | [`saved`] | which blocks are saved already |
//! | [`outside`] | calls that the net cannot see |
//! | [`audit`] | counting calls, for tests |
//!
//! The calls are marked in stage 1's table by [`arm`], which is called while the world is
//! stopped: until the first checkpoint none of this costs anything.

pub mod attributes;
pub mod audit;
pub mod cache;
pub mod copies;
pub mod data;
pub mod descriptors;
pub mod guard;
pub mod mapped;
pub mod open;
pub mod outside;
pub mod paths;
pub mod requests;
pub mod resolve;
pub mod saved;
pub mod shared;
pub mod tree;
pub mod turns;

use super::frame::{CallFrame, Verdict};
use super::pinned;
use crate::agent::callsites::HOOKED;
use crate::agent::state::{AGENT, awake};
use crate::persist::recorder;
use ckpt_sys::callsite::{Fast, MAY_CHANGE_FILES, hook_byte};
use ckpt_sys::syscall;
use libc::c_long;
use std::sync::atomic::{AtomicBool, Ordering::*};

/// What modifies, and what stage 1 may decide by itself.
pub const MODIFYING: &[(c_long, Fast)] = &[
    (libc::SYS_open, Fast::Open),
    (libc::SYS_openat, Fast::OpenAt),
    (libc::SYS_openat2, Fast::Nothing),
    (libc::SYS_creat, Fast::Nothing),
    (libc::SYS_write, Fast::AtPosition),
    (libc::SYS_writev, Fast::AtPosition),
    (libc::SYS_pwrite64, Fast::AtOffset),
    (libc::SYS_pwritev, Fast::Anywhere),
    // RWF_NOAPPEND: what is known of appending says nothing.
    (libc::SYS_pwritev2, Fast::PassOnly),
    (libc::SYS_sendfile, Fast::AtPosition),
    (libc::SYS_splice, Fast::Nothing),
    (libc::SYS_copy_file_range, Fast::Nothing),
    (libc::SYS_ioctl, Fast::Ioctl),
    (libc::SYS_truncate, Fast::Nothing),
    (libc::SYS_ftruncate, Fast::PassOnly),
    (libc::SYS_fallocate, Fast::PassOnly),
    (libc::SYS_rename, Fast::Nothing),
    (libc::SYS_renameat, Fast::Nothing),
    (libc::SYS_renameat2, Fast::Nothing),
    (libc::SYS_link, Fast::Nothing),
    (libc::SYS_linkat, Fast::Nothing),
    (libc::SYS_symlink, Fast::Nothing),
    (libc::SYS_symlinkat, Fast::Nothing),
    (libc::SYS_unlink, Fast::Nothing),
    (libc::SYS_unlinkat, Fast::Nothing),
    (libc::SYS_mkdir, Fast::Nothing),
    (libc::SYS_mkdirat, Fast::Nothing),
    (libc::SYS_rmdir, Fast::Nothing),
    (libc::SYS_mknod, Fast::Nothing),
    (libc::SYS_mknodat, Fast::Nothing),
    (libc::SYS_chmod, Fast::Nothing),
    (libc::SYS_fchmod, Fast::Nothing),
    (libc::SYS_fchmodat, Fast::Nothing),
    (libc::SYS_fchmodat2, Fast::Nothing),
    (libc::SYS_chown, Fast::Nothing),
    (libc::SYS_fchown, Fast::Nothing),
    (libc::SYS_lchown, Fast::Nothing),
    (libc::SYS_fchownat, Fast::Nothing),
    (libc::SYS_utime, Fast::Nothing),
    (libc::SYS_utimes, Fast::Nothing),
    (libc::SYS_utimensat, Fast::Nothing),
    (libc::SYS_futimesat, Fast::Nothing),
    (libc::SYS_setxattr, Fast::Nothing),
    (libc::SYS_lsetxattr, Fast::Nothing),
    (libc::SYS_fsetxattr, Fast::Nothing),
    (libc::SYS_removexattr, Fast::Nothing),
    (libc::SYS_lremovexattr, Fast::Nothing),
    (libc::SYS_fremovexattr, Fast::Nothing),
    (attributes::SETXATTRAT, Fast::Nothing),
    (attributes::REMOVEXATTRAT, Fast::Nothing),
    (libc::SYS_open_by_handle_at, Fast::Nothing),
    (libc::SYS_bind, Fast::Nothing),
    (libc::SYS_mmap, Fast::Nothing),
];

/// What ends knowledge about descriptors.
const DESCRIPTORS: &[(c_long, Fast)] = &[
    (libc::SYS_close, Fast::Close),
    (libc::SYS_close_range, Fast::Nothing),
    (libc::SYS_dup, Fast::Nothing),
    (libc::SYS_dup2, Fast::Nothing),
    (libc::SYS_dup3, Fast::Nothing),
    (libc::SYS_fcntl, Fast::Fcntl),
    (libc::SYS_lseek, Fast::Anywhere),
    (libc::SYS_unshare, Fast::Nothing),
    (libc::SYS_fork, Fast::Nothing),
    (libc::SYS_vfork, Fast::Nothing),
    (libc::SYS_clone, Fast::Nothing),
    (libc::SYS_clone3, Fast::Nothing),
];

/// What makes a file writable through memory, or by the kernel itself.
const MAPPINGS: &[(c_long, Fast)] = &[
    (libc::SYS_mprotect, Fast::Nothing),
    (libc::SYS_pkey_mprotect, Fast::Nothing),
    (libc::SYS_mremap, Fast::Nothing),
    (libc::SYS_remap_file_pages, Fast::Nothing),
    (libc::SYS_io_uring_setup, Fast::Nothing),
    (libc::SYS_io_setup, Fast::Nothing),
];

/// May a call of this number modify files?
pub fn may_modify(nr: i64) -> bool {
    MODIFYING.iter().any(|&(modifying, _)| modifying == nr)
}

/// The calls are marked.
static ARMED: AtomicBool = AtomicBool::new(false);

/// The modifying calls that are wanted from the start: all for an audit, else none.
pub fn wanted_at_start(mut mark: impl FnMut(c_long)) {
    if audit::on() {
        MODIFYING.iter().for_each(|&(nr, _)| mark(nr));
    }
}

/// Makes the hooks follow the recorder: marks the calls in stage 1's table and gives the
/// descriptor cache the open table's number. To be called whenever a table has begun or
/// ended, while the world is stopped (after a restore: after `hooks::after_restore`).
pub fn arm() {
    cache::begin(recorder::table_number());
    if !AGENT.net_installed.load(Relaxed) && recorder::active() {
        tell_unseen();
    }
    let others = super::table_of_others();
    let wanted = recorder::active();
    ARMED.store(wanted, Relaxed);
    let lists = [MODIFYING, DESCRIPTORS, MAPPINGS];
    for (list, modifying) in lists.iter().zip([true, false, false]) {
        for &(nr, fast) in *list {
            let Some(byte) = hook_byte(nr as usize) else {
                continue;
            };
            let other = others.get(nr as usize).is_some_and(|&o| o != 0);
            let audited = modifying && audit::on();
            let mut bits = byte.load(Relaxed) & !(MAY_CHANGE_FILES | FAST_BITS | HOOKED);
            let pinned = pinned::shortcut(nr);
            if other || audited || wanted || pinned.is_some() {
                bits |= HOOKED;
            }
            if wanted && modifying {
                bits |= MAY_CHANGE_FILES;
            }
            if !other && !audited {
                let fast = if wanted { Some(fast) } else { pinned };
                bits |= fast.map_or(0, Fast::bits);
            }
            byte.store(bits, Relaxed);
        }
    }
}

/// Without the call-site net modifications go by unseen: never a table that looks complete.
fn tell_unseen() {
    // SAFETY: the helper, while every other thread is held outside hooks and heap.
    unsafe {
        crate::agent::heap::in_agent_heap(|| {
            if let Some(mut session) = recorder::enter() {
                session.incomplete(b"system calls cannot be seen (the call-site net was not laid)");
            }
        });
    }
}

const FAST_BITS: u8 = !7;

/// Ends the shortcuts of a call that another hook wants from now on.
pub fn no_shortcut(nr: usize) {
    if let Some(byte) = hook_byte(nr) {
        byte.fetch_and(!FAST_BITS, Relaxed);
    }
}

/// In a forked child nothing is recorded: its copy of the table forgets the calls.
fn disarm_child() {
    if !awake() && ARMED.swap(false, Relaxed) {
        for &(nr, _) in MODIFYING.iter().chain(DESCRIPTORS).chain(MAPPINGS) {
            if let Some(byte) = hook_byte(nr as usize) {
                byte.fetch_and(!(MAY_CHANGE_FILES | FAST_BITS), Relaxed);
            }
        }
    }
}

/// Executes the call of the frame.
fn execute(f: &CallFrame) -> i64 {
    let [a, b, c, d, e, g] = f.args;
    // SAFETY: the program's own call; none of those that come here plays with the stack.
    unsafe { syscall!(f.rax, a, b, c, d, e, g) as i64 }
}

/// The call's own result, as the program's.
fn done(f: &mut CallFrame) -> Verdict {
    f.rax = execute(f);
    Verdict::Done
}

/// Handles a call that may change files; `None`: not one of ours, or nothing to do with it.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    if audit::on() {
        audit::count(f);
    }
    if !ARMED.load(Relaxed) {
        return None;
    }
    if !awake() {
        disarm_child();
        return None;
    }
    // Writes to blocks that are saved are the most frequent of all calls that come here.
    let active = recorder::active();
    if active && let Some(verdict) = data::dispatch(f) {
        return Some(verdict);
    }
    if let Some(verdict) = descriptors::dispatch(f) {
        return Some(verdict);
    }
    if !active {
        return None;
    }
    open::dispatch(f)
        .or_else(|| copies::dispatch(f))
        .or_else(|| mapped::dispatch(f))
        .or_else(|| tree::dispatch(f))
        .or_else(|| attributes::dispatch(f))
        .or_else(|| shared::dispatch(f))
        .or_else(|| requests::dispatch(f))
}

/// `ckpt_exclude` and `ckpt_include`: 0 or a negative errno. What is known of descriptors
/// by the old rules is forgotten.
///
/// # Safety
/// `glob` is null or a string.
pub unsafe fn rule(exclude: bool, glob: *const libc::c_char) -> i32 {
    if glob.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: a string (the caller's promise).
    let glob = unsafe { std::ffi::CStr::from_ptr(glob) }.to_bytes();
    let well_formed = glob == b"*" || glob.first() == Some(&b'/');
    if !well_formed {
        return -libc::EINVAL;
    }
    let _hook = crate::agent::state::InHook::enter();
    if !crate::persist::exclude::add_rule(exclude, glob) {
        return -libc::ENOMEM;
    }
    cache::forget_all();
    0
}
