//! `ckpt_redirect` at run time: the next input behind the same descriptor. The entries are
//! part of the state that a rollback leaves, so each counts for one rollback.
//!
//! [`add`] in any thread of the program (allocates in a hook); [`asked`] in the helper.

use crate::agent::state::{InHook, awake};
use crate::agent::{events, procfs};
use crate::image::state::{DescriptorTable, FileKind};
use std::cell::UnsafeCell;
use std::ffi::CStr;
use std::sync::atomic::{AtomicBool, Ordering};

/// Entries at most.
const MOST: usize = 4096;

type Entries = Vec<(Vec<u8>, Vec<u8>)>;

struct Table {
    busy: AtomicBool,
    entries: UnsafeCell<Entries>,
}

// SAFETY: the entries are only reached while `busy` is held, in a hook: a stopped thread
// never holds it.
unsafe impl Sync for Table {}

static TABLE: Table = Table {
    busy: AtomicBool::new(false),
    entries: UnsafeCell::new(Vec::new()),
};

fn with<R>(f: impl FnOnce(&mut Entries) -> R) -> R {
    while TABLE.busy.swap(true, Ordering::Acquire) {
        std::hint::spin_loop();
    }
    // SAFETY: `busy` is ours.
    let result = f(unsafe { &mut *TABLE.entries.get() });
    TABLE.busy.store(false, Ordering::Release);
    result
}

/// `ckpt_redirect`: 0, or a negated errno. A path to itself takes its entry away.
///
/// # Safety
/// Both are null or strings.
pub unsafe fn add(from: *const libc::c_char, to: *const libc::c_char) -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    if from.is_null() || to.is_null() {
        return -libc::EINVAL;
    }
    // SAFETY: strings, as promised.
    let (from, to) = unsafe {
        (
            CStr::from_ptr(from).to_bytes(),
            CStr::from_ptr(to).to_bytes(),
        )
    };
    let _hook = InHook::enter();
    let (Some(from), Some(to)) = (absolute(from), absolute(to)) else {
        return -libc::EINVAL;
    };
    with(|entries| {
        entries.retain(|(old, _)| *old != from);
        if from == to {
            return 0;
        }
        if entries.len() >= MOST {
            return -libc::ENOMEM;
        }
        entries.push((from, to));
        0
    })
}

/// As the kernel names it, also when it does not exist (any more).
fn absolute(path: &[u8]) -> Option<Vec<u8>> {
    if path.is_empty() {
        return None;
    }
    let mut whole = Vec::new();
    if path[0] != b'/' {
        whole = procfs::read_link(b"/proc/thread-self/cwd").ok()?;
        whole.push(b'/');
    }
    whole.extend_from_slice(path);
    let Ok(fd) = procfs::OwnFd::open_with(&whole, libc::O_PATH) else {
        return Some(whole);
    };
    // The program may not share its descriptors with its first thread.
    procfs::read_link(format!("/proc/thread-self/fd/{}", fd.raw()).as_bytes()).ok()
}

/// A path that the program has asked for, and that nothing was open at: it would go back to
/// the input that it has had already (helper thread).
pub fn aimless(table: &DescriptorTable) -> Option<Vec<u8>> {
    let open = |path: &[u8]| {
        table.files.iter().any(|file| match &file.kind {
            FileKind::Regular { path: at, .. } | FileKind::Directory { path: at, .. } => at == path,
            _ => false,
        })
    };
    let mut asked = asked().into_iter().map(|(from, _)| from);
    asked.find(|from| !open(from))
}

/// All entries (helper thread).
pub fn asked() -> Vec<(Vec<u8>, Vec<u8>)> {
    with(|entries| entries.clone())
}
