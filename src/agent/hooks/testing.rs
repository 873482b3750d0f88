//! What the tests of the hooks share: frames, and children to change process state in.

use super::frame::{CallFrame, Verdict};

/// A frame as stage 1 makes it.
pub fn frame(nr: libc::c_long, given: &[u64]) -> CallFrame {
    let mut args = [0; 6];
    args[..given.len()].copy_from_slice(given);
    CallFrame {
        rax: nr,
        args,
        rbp: 0,
        slot: 0,
    }
}

/// Dispatches one call; its result, or `None` when the hook lets it through.
pub fn call(nr: libc::c_long, given: &[u64]) -> Option<i64> {
    let mut frame = frame(nr, given);
    match super::dispatch(&mut frame) {
        Verdict::Done => Some(frame.rax),
        Verdict::Forward => None,
    }
}

/// Runs `body` in a forked child; its wait status. A panic there aborts it.
pub fn child_status(body: impl FnOnce()) -> i32 {
    // SAFETY: the child only runs the test's own code and leaves by _exit.
    unsafe {
        let pid = libc::fork();
        assert!(pid >= 0);
        if pid == 0 {
            let ok = std::panic::catch_unwind(std::panic::AssertUnwindSafe(body)).is_ok();
            libc::_exit(if ok { 0 } else { 101 });
        }
        let mut status = 0;
        assert_eq!(libc::waitpid(pid, &raw mut status, 0), pid);
        status
    }
}

/// Runs `body` in a forked child and expects it to end well.
pub fn in_child(body: impl FnOnce()) {
    assert_eq!(child_status(body), 0, "wait status of the child");
}
