//! The small calls of the C interface: what the program says about itself and asks about
//! its checkpoints. Any thread, also signal handlers: atomics only. All of it is part of the
//! image; the restored helper puts it right ([`restored`]).

use crate::agent::collect::identity::realtime_ns;
use crate::agent::state::awake;
use crate::agent::{events, settings};
use std::ffi::CStr;
use std::sync::atomic::{AtomicU64, Ordering};

/// The latest generation that this process has committed or come back from; 0 = none.
static GENERATION: AtomicU64 = AtomicU64::new(0);
/// Heartbeats of this life, and the wall clock at the last one.
static BEATS: AtomicU64 = AtomicU64::new(0);
static BEAT_NS: AtomicU64 = AtomicU64::new(0);
/// Wall clock at the first `ckpt_ready`; 0 = not yet.
static READY_NS: AtomicU64 = AtomicU64::new(0);

/// What the program has said, for the report.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Said {
    pub heartbeats: u64,
    pub heartbeat_ns: u64,
    pub ready_ns: u64,
}

pub fn said() -> Said {
    Said {
        heartbeats: BEATS.load(Ordering::SeqCst),
        heartbeat_ns: BEAT_NS.load(Ordering::SeqCst),
        ready_ns: READY_NS.load(Ordering::SeqCst),
    }
}

/// The helper has committed a generation.
pub fn committed(generation: u64) {
    GENERATION.store(generation, Ordering::SeqCst);
}

/// The restored helper: the process stands at this generation. Heartbeats are those of
/// one life; `ready` stays, since what was initialised is in the image.
pub fn restored(generation: u64) {
    GENERATION.store(generation, Ordering::SeqCst);
    BEATS.store(0, Ordering::SeqCst);
    BEAT_NS.store(0, Ordering::SeqCst);
}

/// `ckpt_generation`.
pub fn generation() -> i64 {
    if !awake() {
        return -i64::from(libc::ENOSYS);
    }
    events::pay();
    GENERATION.load(Ordering::SeqCst) as i64
}

/// `ckpt_heartbeat`.
pub fn heartbeat() -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    BEAT_NS.store(realtime_ns(), Ordering::SeqCst);
    BEATS.fetch_add(1, Ordering::SeqCst);
    0
}

/// `ckpt_ready`: the first call counts.
pub fn ready() -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::pay();
    let _ = READY_NS.compare_exchange(0, realtime_ns(), Ordering::SeqCst, Ordering::SeqCst);
    0
}

/// `ckpt_on`.
pub fn on(event: i32, function: Option<events::Function>, argument: *mut libc::c_void) -> i32 {
    if !awake() {
        return -libc::ENOSYS;
    }
    events::on(event, function, argument)
}

/// `ckpt_argument`: null where there is none.
pub fn argument(index: i32) -> *const libc::c_char {
    let arguments = settings::get().map(|s| &s.config.arguments);
    let argument = arguments.and_then(|all| all.get(usize::try_from(index).ok()?));
    argument.map_or(std::ptr::null(), |argument| argument.as_ptr())
}

/// What an error number of a call of this interface means.
pub fn error_text(errno: i32) -> &'static CStr {
    match errno {
        0 => c"no error",
        libc::ENOSYS => c"libckpt.so is not loaded, or asleep in this process (CKPT_DISABLE, a child)",
        libc::EBUSY => c"a critical section (ckpt_hold) is open, or a handler of ckpt_on is running",
        libc::EPERM => c"no checkpoints can be taken here any more (ckpt status says why)",
        libc::EAGAIN => c"refused for now: a living child, a critical section, or something that cannot be checkpointed (ckpt status says what)",
        libc::EIO => c"the checkpoint store failed, a checkpoint is damaged or cannot be reached, or a file cannot be put back (ckpt status and the log say which)",
        libc::EINVAL => c"an argument is not valid (man 3 libckpt)",
        libc::ENOENT => c"there is no checkpoint with this id",
        libc::EFAULT => c"a protected region is not memory that is writable now and was at the checkpoint",
        libc::ENOMEM => c"no room for another handler, rule or thread of the library, or for what is to be kept",
        libc::EMFILE => c"no descriptor number is left, and going back needs a few",
        libc::ENOTSUP => c"the process's first thread has ended, so it cannot go back within itself",
        libc::ECANCELED => c"the process had gone back, and that was undone (ckpt undo)",
        _ => c"not an error of this interface",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_error_of_the_manual_has_a_text_of_its_own() {
        let manual = include_str!("../../man/libckpt.3");
        let errors = [
            ("ENOSYS", libc::ENOSYS),
            ("EBUSY", libc::EBUSY),
            ("EPERM", libc::EPERM),
            ("EAGAIN", libc::EAGAIN),
            ("EIO", libc::EIO),
            ("EINVAL", libc::EINVAL),
            ("ENOENT", libc::ENOENT),
            ("EFAULT", libc::EFAULT),
            ("ENOMEM", libc::ENOMEM),
            ("EMFILE", libc::EMFILE),
            ("ENOTSUP", libc::ENOTSUP),
            ("ECANCELED", libc::ECANCELED),
        ];
        let mut texts: Vec<&CStr> = errors.iter().map(|e| error_text(e.1)).collect();
        for (name, _) in errors {
            assert!(
                manual.contains(&format!(".B {name}\n")),
                "{name} is not in libckpt(3)"
            );
        }
        texts.sort();
        texts.dedup();
        assert_eq!(texts.len(), errors.len());
        assert!(!texts.contains(&error_text(4095)));
    }
}
