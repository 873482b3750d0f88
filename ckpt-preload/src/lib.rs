//! libckpt.so: the exported names and the constructor. No logic: every item is one
//! call into the `ckpt` crate.

use ckpt::agent;
use std::arch::naked_asm;

mod symbols;

#[global_allocator]
static ALLOCATOR: agent::heap::AgentAllocator = agent::heap::AgentAllocator;

/// Pre-execution (FIG. 5).
#[ctor::ctor(unsafe)]
fn start() {
    agent::hooks::symbol::set_touch(symbols::touch_all);
    // SAFETY: the constructor of the library, before any other thread exists.
    unsafe { agent::start::pre_execution(rseq()) }
}

/// glibc's `__rseq_offset` and `__rseq_size` (glibc 2.35 and later).
fn rseq() -> (i64, u32) {
    // SAFETY: the symbols are read-only data when they exist.
    unsafe {
        let offset = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_offset".as_ptr()) as *const i64;
        let size = libc::dlsym(libc::RTLD_DEFAULT, c"__rseq_size".as_ptr()) as *const u32;
        if offset.is_null() || size.is_null() {
            (0, 0)
        } else {
            (*offset, *size)
        }
    }
}

fn status(result: i32) -> i32 {
    if result >= 0 {
        return result;
    }
    // SAFETY: errno of the calling thread.
    unsafe { *libc::__errno_location() = -result };
    -1
}

/// `ckpt_checkpoint(3)`: 0 taken, > 0 back from a restore, -1 and errno. Tells where the
/// caller's stack ends.
#[unsafe(no_mangle)]
#[unsafe(naked)]
pub extern "C" fn ckpt_checkpoint(id: i32) -> i32 {
    naked_asm!("lea rsi, [rsp + 8]", "jmp {}", sym checkpoint)
}

extern "C" fn checkpoint(id: i32, caller_sp: u64) -> i32 {
    status(agent::request::checkpoint_from_program(id, caller_sp))
}

/// `ckpt_rollback(3)`: does not return on success, else -1 and errno.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_rollback(
    id: i32,
    value: i32,
    regions: *const agent::rollback::call::Region,
    n: usize,
) -> i32 {
    let call = agent::rollback::call::from_program(id, value, regions as u64, n as u64);
    status(call)
}

/// `ckpt_redirect(3)`: at a rollback `to` is opened where `from` was open.
///
/// # Safety
/// `from` and `to` are strings.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_redirect(from: *const libc::c_char, to: *const libc::c_char) -> i32 {
    // SAFETY: forwarded contract.
    status(unsafe { agent::rollback::redirect::add(from, to) })
}

/// `ckpt_hold(3)`: no checkpoint until the matching `ckpt_release`.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_hold() -> i32 {
    status(agent::request::hold())
}

/// `ckpt_release(3)`.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_release() -> i32 {
    status(agent::request::release())
}

/// `ckpt_on(3)`: a handler of a checkpoint event.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_on(
    event: i32,
    function: Option<agent::events::Function>,
    argument: *mut libc::c_void,
) -> i32 {
    status(agent::interface::on(event, function, argument))
}

/// `ckpt_ready(3)`: the program is initialised.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_ready() -> i32 {
    status(agent::interface::ready())
}

/// `ckpt_heartbeat(3)`: the program is alive.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_heartbeat() -> i32 {
    status(agent::interface::heartbeat())
}

/// `ckpt_generation(3)`: the latest generation, 0 for none, -1 and errno.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_generation() -> libc::c_long {
    match agent::interface::generation() {
        error @ ..0 => status(error as i32).into(),
        generation => generation,
    }
}

/// `ckpt_argument(3)`: an argument of a start from a template, or null.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_argument(index: i32) -> *const libc::c_char {
    agent::interface::argument(index)
}

/// `ckpt_strerror(3)`: what an errno of these calls means.
#[unsafe(no_mangle)]
pub extern "C" fn ckpt_strerror(errno: i32) -> *const libc::c_char {
    agent::interface::error_text(errno).as_ptr()
}

/// `ckpt_exclude(3)`: files that match are left out of file rollback.
///
/// # Safety
/// `glob` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_exclude(glob: *const libc::c_char) -> i32 {
    // SAFETY: forwarded contract.
    status(unsafe { agent::hooks::files::rule(true, glob) })
}

/// `ckpt_include(3)`: the later rule wins.
///
/// # Safety
/// `glob` is a string.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ckpt_include(glob: *const libc::c_char) -> i32 {
    // SAFETY: forwarded contract.
    status(unsafe { agent::hooks::files::rule(false, glob) })
}
