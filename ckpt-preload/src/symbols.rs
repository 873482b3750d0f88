//! The exported libc names (the symbol net). No logic: each name asks whether the
//! symbol net is on duty (`hooks::symbol::on_duty`, false as soon as the call-site net
//! is laid) and goes to the policy or straight to libc's function.
//!
//! `redhook` does exports and look-ups. Its `real!` resolves at the first use, inside a
//! `Once`: [`touch_all`] does that for every name in the constructor, so that later
//! uses, in signal handlers and forked children, only read. Its fallback after a
//! panic is out of reach: every profile aborts on panic.

use ckpt::agent::hooks::symbol::{self, on_duty, real_id};
use libc::{c_char, c_int, c_void, id_t, pid_t, sigaction, sighandler_t, siginfo_t, sigset_t, size_t, timespec};
use redhook::{hook, real};

/// The exports that pass on to libc. One list for the definitions and for [`touch_all`].
macro_rules! exports {
    ($($name:ident ( $($arg:ident : $t:ty),* ) -> $r:ty = $hook:ident $policy:block)*) => {
        $(hook! {
            unsafe fn $name($($arg: $t),*) -> $r => $hook {
                // SAFETY: the program's own arguments, as for the libc function of this
                // name; its address comes from dlsym with this very name.
                #[allow(unused_unsafe)]
                unsafe {
                    if on_duty() { $policy } else { real!($name)($($arg),*) }
                }
            }
        })*

        /// Resolves every real function; constructor.
        pub fn touch_all() {
            $(let _ = real!($name);)*
        }
    };
}

exports! {
    sigaction(sig: c_int, act: *const sigaction, old: *mut sigaction) -> c_int = my_sigaction {
        symbol::sigaction(real!(sigaction), sig, act, old)
    }
    getpid() -> pid_t = my_getpid { symbol::call(libc::SYS_getpid, &[]) as pid_t }
}
