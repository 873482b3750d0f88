//! A preload library for tests: the call-site net alone, with hooks that try its
//! machinery instead of the agent's policies. `NETLIB` holds words:
//!
//! | word | effect |
//! |---|---|
//! | `slow` | every call goes through stage 2 |
//! | `clobber` | the hook destroys what it may use of the vector registers |
//! | `around` | plain calls are made by the hook itself |
//! | `stop` | signal 64 stops the thread for `NETLIB_HOLD_US`, then its call is restarted |
//! | `report` | what was patched goes to stderr |
//! | `late` | nothing in the constructor; `netlib_install()` does it |
//!
//! `NETLIB_CACHE` is the directory of prepared copies; unset: none.

use ckpt::agent::callsites::{self, InstallOptions, restart};
use ckpt::agent::hooks::frame::{CallFrame, Verdict};
use ckpt_sys::{callsite, syscall};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

static CLOBBER: AtomicBool = AtomicBool::new(false);
static AROUND: AtomicBool = AtomicBool::new(false);
static HOLD_US: AtomicU64 = AtomicU64::new(0);
static RESTARTS: AtomicU64 = AtomicU64::new(0);

#[used]
#[unsafe(link_section = ".init_array")]
static CONSTRUCTOR: extern "C" fn() = construct;

extern "C" fn construct() {
    if !words().contains("late") {
        netlib_install();
    }
}

fn words() -> String {
    std::env::var("NETLIB").unwrap_or_default()
}

/// Installs the net as `NETLIB` says.
#[unsafe(no_mangle)]
pub extern "C" fn netlib_install() {
    let words = words();
    let has = |word: &str| words.split(',').any(|given| given == word);
    CLOBBER.store(has("clobber"), Ordering::Relaxed);
    AROUND.store(has("around"), Ordering::Relaxed);
    let hold = std::env::var("NETLIB_HOLD_US")
        .ok()
        .and_then(|text| text.parse().ok());
    HOLD_US.store(hold.unwrap_or(0), Ordering::Relaxed);
    let options = InstallOptions {
        cache: std::env::var_os("NETLIB_CACHE").map(Into::into),
    };
    // SAFETY: in the constructor, or once by a test that asked for it.
    let report = unsafe { callsites::install(&options) };
    let mut table = [0_u8; 512];
    if has("slow") {
        table = [1; 512];
    }
    callsites::set_table(&table);
    // SAFETY: the test's hook has the same signature; nobody is in stage 2 yet.
    unsafe { callsite::set_dispatch(dispatch) };
    if has("stop") {
        install_stop_handler();
    }
    if has("report") {
        for object in &report.objects {
            eprintln!(
                "net: {} {:?} {} patched ({} immediate, {} window, {} forward){} {} us; left alone: {:?}",
                object.name,
                object.way,
                object.patched(),
                object.immediate,
                object.window,
                object.forward,
                if object.far { " far" } else { "" },
                object.microseconds,
                object.left_alone
            );
        }
        eprintln!("net: {} us", report.microseconds);
    }
}

unsafe extern "C" fn dispatch(frame: *mut u8) -> u64 {
    // SAFETY: stage 2 passes its frame.
    let frame = unsafe { &mut *frame.cast::<CallFrame>() };
    if CLOBBER.load(Ordering::Relaxed) {
        clobber();
    }
    callsites::record_entry(frame);
    if AROUND.load(Ordering::Relaxed) && plain(frame.rax) {
        let args = frame.args.map(|arg| arg as usize);
        // SAFETY: the program's own call.
        frame.rax = unsafe {
            syscall!(
                frame.rax, args[0], args[1], args[2], args[3], args[4], args[5]
            )
        } as i64;
        return Verdict::Done as u64;
    }
    Verdict::Forward as u64
}

/// Calls that may be made away from their site.
fn plain(nr: i64) -> bool {
    [
        libc::SYS_write,
        libc::SYS_pwrite64,
        libc::SYS_lseek,
        libc::SYS_fallocate,
        libc::SYS_unlink,
        libc::SYS_rename,
        libc::SYS_getpid,
        libc::SYS_getppid,
        libc::SYS_close,
        libc::SYS_newfstatat,
        libc::SYS_dup2,
    ]
    .contains(&nr)
}

/// Destroys what hooks may use of the vector registers, and leaves the upper halves alone.
fn clobber() {
    // SAFETY: stage 2 has saved the registers.
    unsafe {
        std::arch::asm!(
            ".irp n, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15",
            "pcmpeqd xmm\\n, xmm\\n",
            ".endr",
            options(nostack)
        );
    }
}

fn install_stop_handler() {
    let action = [
        on_stop as *const () as u64,
        (libc::SA_SIGINFO | libc::SA_RESTART | 0x0400_0000) as u64,
        callsite::sigreturn() as u64,
        u64::MAX,
    ];
    // SAFETY: a valid kernel sigaction.
    unsafe { syscall!(libc::SYS_rt_sigaction, 64, action.as_ptr(), 0, 8) };
}

unsafe extern "C" fn on_stop(_: i32, _: *mut libc::siginfo_t, uc: *mut libc::ucontext_t) {
    // SAFETY: the frame of this very handler.
    unsafe {
        let interrupted = restart::prepare(uc);
        let hold = HOLD_US.load(Ordering::Relaxed);
        if hold != 0 {
            let time = [hold / 1_000_000, hold % 1_000_000 * 1000];
            syscall!(libc::SYS_nanosleep, time.as_ptr(), 0);
        }
        restart::finish(uc, &interrupted, restart::Clock::Runs);
        let rip = (*uc).uc_mcontext.gregs[libc::REG_RIP as usize] as usize;
        if rip == callsite::restart() {
            RESTARTS.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// How many calls were restarted.
#[unsafe(no_mangle)]
pub extern "C" fn netlib_restarts() -> u64 {
    RESTARTS.load(Ordering::Relaxed)
}

/// Where the net's code is: the hole with the slots, the common code.
///
/// # Safety
/// `ranges` has room for four addresses.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn netlib_ranges(ranges: *mut usize) {
    let all = [
        callsite::hole_start(),
        callsite::hole_end(),
        callsite::text_start(),
        callsite::text_end(),
    ];
    // SAFETY: the caller's promise.
    unsafe { ranges.cast::<[usize; 4]>().write(all) };
}

/// The restorer that counts the program's handlers.
#[unsafe(no_mangle)]
pub extern "C" fn netlib_program_restorer() -> usize {
    callsite::program_sigreturn()
}
