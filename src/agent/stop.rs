//! Stopping and releasing the program's threads.

/// A stop request was put off by a hook: raise it again, now that the hook is over.
///
/// # Safety
/// Called by the outermost hook guard's end, in the thread concerned.
pub unsafe fn park_put_off() {}
