//! Memory protection keys (pkeys(7)): which of them the program has allocated. V8 allocates one
//! at its start, just in case. No mapping has one (that is refused); what threads may do with
//! them is in their registers.
//!
//! Helper thread: during the stop, and in the restored process before the program runs.

use crate::agent::log;
use crate::agent::refusal::{Kind, was_noted};
use ckpt_sys::syscall;

/// Key 0 is every mapping's.
const ALL: u32 = 0xfffe;

/// Has the operating system switched them on (CPUID 7.0, OSPKE)?
fn supported() -> bool {
    const OSPKE: u32 = 1 << 4;
    std::arch::x86_64::__cpuid(0).eax >= 7
        && std::arch::x86_64::__cpuid_count(7, 0).ecx & OSPKE != 0
}

/// Allocates all keys that are free, and says which; bit n is key n.
fn take_free() -> u32 {
    let mut taken = 0;
    loop {
        // SAFETY: no pointers; the rights are the calling thread's alone.
        let key = unsafe { syscall!(libc::SYS_pkey_alloc, 0, 0) };
        match key {
            1..=15 => taken |= 1 << key,
            _ => return taken,
        }
    }
}

fn free(keys: u32) {
    for key in (1..16).filter(|key| keys & (1 << key) != 0) {
        // SAFETY: no pointers; a key that no mapping has.
        unsafe { syscall!(libc::SYS_pkey_free, key) };
    }
}

/// The keys that are allocated. The kernel tells nobody: what is not free is. The program is
/// stopped, so nobody else can want one meanwhile.
pub fn allocated() -> u32 {
    if !was_noted(Kind::KeyAllocated) || !supported() {
        return 0;
    }
    let unused = take_free();
    free(unused);
    ALL & !unused
}

/// Allocates them again; in a process that goes back they may be there still.
pub fn restore(keys: u32, inside: bool) {
    if keys == 0 {
        return;
    }
    let taken = take_free();
    free(taken & !keys);
    if keys & !taken != 0 && !inside {
        log::line(format_args!(
            "memory protection keys of the program could not be allocated again: {:#x}",
            keys & !taken
        ));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;
    use crate::agent::refusal;

    #[test]
    fn what_is_allocated_is_found_and_comes_back() {
        in_child(|| {
            if !supported() {
                eprintln!("*** NOT TESTED: no memory protection keys");
                return;
            }
            assert_eq!(allocated(), 0);
            refusal::note(Kind::KeyAllocated);
            assert_eq!(allocated(), 0);
            // SAFETY: no pointers.
            unsafe {
                assert_eq!(libc::syscall(libc::SYS_pkey_alloc, 0, 0), 1);
                assert_eq!(libc::syscall(libc::SYS_pkey_alloc, 0, 0), 2);
                assert_eq!(libc::syscall(libc::SYS_pkey_free, 1), 0);
            }
            assert_eq!(allocated(), 1 << 2);
            free(1 << 2);
            restore(1 << 2 | 1 << 5, false);
            assert_eq!(allocated(), 1 << 2 | 1 << 5);
            restore(1 << 2 | 1 << 5, true);
            assert_eq!(allocated(), 1 << 2 | 1 << 5);
        });
    }
}
