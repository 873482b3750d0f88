//! The `ckpt` command: hands its arguments to `ckpt::cli`.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};

static SIGPIPE_IGNORED: AtomicBool = AtomicBool::new(false);

/// Rust's start-up code ignores SIGPIPE; a program that `ckpt run` starts must get what
/// this process was started with. So it is noted before that, among the initialisers.
extern "C" fn note_sigpipe() {
    // SAFETY: sigaction only reads the disposition into a zeroed structure.
    let ignored = unsafe {
        let mut old: libc::sigaction = std::mem::zeroed();
        libc::sigaction(libc::SIGPIPE, std::ptr::null(), &mut old) == 0
            && old.sa_sigaction == libc::SIG_IGN
    };
    SIGPIPE_IGNORED.store(ignored, Ordering::Relaxed);
}

// SAFETY: the dynamic linker calls each pointer of this section, in any order; the
// function depends on no other initialiser.
#[used]
#[unsafe(link_section = ".init_array")]
static NOTE_SIGPIPE: extern "C" fn() = note_sigpipe;

fn main() -> ExitCode {
    // `ckpt list | head` ends quietly, like any filter.
    // SAFETY: no other thread runs yet, SIG_DFL is a valid disposition.
    unsafe { libc::signal(libc::SIGPIPE, libc::SIG_DFL) };
    let args = std::env::args_os().collect();
    ckpt::cli::main(args, SIGPIPE_IGNORED.load(Ordering::Relaxed))
}
