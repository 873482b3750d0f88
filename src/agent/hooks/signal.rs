//! The calls that take a signal mask or set: the reserved signal is never really
//! blocked, waited for or read from a descriptor, and the program is told what it
//! asked for. Any thread, any context.
//!
//! What stays visible: a handler that *edits* `uc_sigmask` to hold the reserved
//! signal blocks it in the kernel when it returns (rt_sigreturn is not
//! intercepted); a stop then gives up with a reason, and the thread's next
//! rt_sigprocmask repairs it.

use super::foreign::{self, CALL_BLOCKS, CALL_OPENS, CALL_PLAIN, CALL_WAITS};
use super::frame::{CallFrame, Verdict};
use super::masks::{self, Interned, intern};
use super::user;
use crate::agent::state::{RESERVED_BIT, RESERVED_SIGNAL, is_on_lent_block};
use crate::agent::track::{blocked, fault};
use ckpt_sys::callsite::LifeCall;
use ckpt_sys::syscall;
use ckpt_sys::tls::{lent, thread_block};
use std::sync::atomic::Ordering::SeqCst;

user::plain!([u64; 16]);

pub use super::foreign::deliver_foreign;

/// The collected signal state as the image keeps it. The actions stay in the
/// kernel's terms (counting restorers, masks without the reserved signal, our own
/// handler): the restorer installs them as they are, and the tables behind them are in
/// the image. [`super::sigaction::program_view`] is for showing them.
pub fn restore_view(state: &mut crate::image::state::SignalState) {
    state
        .pending
        .retain(|signal| signal.signo != RESERVED_SIGNAL);
}

/// Does the program believe that the reserved signal is blocked in this thread? Also in a child that
/// runs on the thread's block.
pub(super) fn reserved_blocked() -> bool {
    // SAFETY: the block is this thread's own, or of the parent that waits for this child.
    let block = unsafe { &*thread_block() };
    if block.lent != lent::NO && is_on_lent_block() && block.lent_blocked != 0 {
        return block.lent_blocked == 2;
    }
    block.reserved_blocked != 0
}

/// Records the program's view of this thread's mask and delivers what it let in.
fn set_view(blocked: bool) {
    if blocked == reserved_blocked() {
        return;
    }
    if is_on_lent_block() {
        // SAFETY: the parent does not look at this.
        unsafe { (*thread_block()).lent_blocked = 1 + u32::from(blocked) };
        return;
    }
    // SAFETY: the thread's own block.
    unsafe { (*thread_block()).reserved_blocked = u32::from(blocked) };
    if !blocked {
        foreign::release_pending();
    }
}

/// Constructor: the process may have been started with the reserved signal blocked
/// or ignored. Call it before the stop handler is installed.
pub fn adopt() {
    let mask = RESERVED_BIT;
    let mut old = 0u64;
    let mut action = crate::image::state::KernelSigaction::default();
    // SAFETY: our own variables.
    unsafe {
        syscall!(
            libc::SYS_rt_sigaction,
            RESERVED_SIGNAL,
            0,
            &raw mut action,
            8
        );
        super::sigaction::set_reserved_action(&action);
        syscall!(
            libc::SYS_rt_sigprocmask,
            libc::SIG_UNBLOCK,
            &raw const mask,
            &raw mut old,
            8
        );
        (*thread_block()).reserved_blocked = u32::from(old & RESERVED_BIT != 0);
    }
    super::sigaction::adopt_handlers();
    super::altstack::configure();
}

/// rt_sigprocmask(how, set, old, 8).
pub fn rt_sigprocmask(frame: &mut CallFrame) -> Verdict {
    let [how, set, old, size, ..] = frame.args;
    let (was, was_fault) = (reserved_blocked(), blocked::is_blocked());
    if size != 8 || (set == 0 && !was && !was_fault) {
        return Verdict::Forward;
    }
    let mut given = 0u64;
    if set != 0 {
        if !(4096..1 << 47).contains(&set) {
            return Verdict::Forward; // EFAULT is the kernel's to say
        }
        // Read directly: this call is hot, and libc's own sigprocmask reads the set
        // itself before the call.
        // SAFETY: a pointer that libc has read already.
        given = unsafe { std::ptr::read_unaligned(set as *const u64) };
        let named = given & (RESERVED_BIT | fault::FAULT_BIT) != 0;
        let known = matches!(
            how as i32,
            libc::SIG_BLOCK | libc::SIG_UNBLOCK | libc::SIG_SETMASK
        );
        if !known || (!was && !was_fault && !named) {
            return Verdict::Forward;
        }
    }
    if old != 0 {
        fault::touch(old, 8);
    }
    let (ret, before, now) = loop {
        // The first stop that protects pages may come before the call, which would then block
        // SIGSEGV for good.
        let word = fault::word();
        let expected = word.load(SeqCst);
        let never = fault::never_blocked_if(expected);
        let before = [reserved_blocked(), blocked::is_blocked()];
        let mut local = given;
        if how as i32 != libc::SIG_UNBLOCK {
            local &= !(RESERVED_BIT | never);
        }
        let at = if set == 0 { 0 } else { &raw const local as u64 };
        let call = LifeCall {
            nr: libc::SYS_rt_sigprocmask,
            args: [how, at, old, 8, 0, 0],
            word,
            expected,
        };
        // SAFETY: our own copy of the set; the kernel checks the place of the old mask.
        let Some(ret) = (unsafe { call.make() }) else {
            continue;
        };
        let mut now = before;
        for (view, bit) in now.iter_mut().zip([RESERVED_BIT, never]) {
            let named = given & bit != 0;
            *view = match how as i32 {
                _ if set == 0 => *view,
                libc::SIG_BLOCK => *view || named,
                libc::SIG_UNBLOCK => *view && !named,
                _ => named,
            };
        }
        break (ret, before, now);
    };
    frame.rax = ret;
    if ret == 0 && old != 0 {
        let place = old as *mut u64;
        // SAFETY: where the kernel has just written.
        unsafe {
            let found = place.read_unaligned();
            let mut shown = found & !RESERVED_BIT;
            if before[0] {
                shown |= RESERVED_BIT;
            }
            if before[1] {
                shown |= fault::FAULT_BIT;
            }
            if shown != found {
                place.write_unaligned(shown);
            }
        }
    }
    // Of a place that cannot be written the kernel speaks when the mask is in force.
    if ret < 0 && ret != -i64::from(libc::EFAULT) {
        return Verdict::Done;
    }
    match now[1] {
        true => blocked::block(std::ptr::from_ref(frame) as u64),
        false if before[1] => blocked::open(),
        false => {}
    }
    set_view(now[0]);
    Verdict::Done
}

/// rt_sigpending(set, size): ours never shows, a foreign one that waits does.
pub fn rt_sigpending(frame: &mut CallFrame) -> Verdict {
    let [set, size, ..] = frame.args;
    if size != 8 {
        return Verdict::Forward;
    }
    // SAFETY: the program's arguments as they are.
    let ret = unsafe { syscall!(libc::SYS_rt_sigpending, set, size) };
    frame.rax = ret as i64;
    if ret == 0
        && let Ok(mut mask) = user::read::<u64>(set)
    {
        mask &= !RESERVED_BIT;
        if foreign::any_pending() {
            mask |= RESERVED_BIT;
        }
        let _ = user::write(set, &mask);
    }
    Verdict::Done
}

/// A call runs under a mask of its own. `Some` = it ends at once, because the mask
/// lets in a signal that waits.
fn enter_masked(frame: &mut CallFrame, mask: u64) -> Option<Verdict> {
    let names = mask & RESERVED_BIT != 0;
    let state = match (names, reserved_blocked()) {
        (true, _) => CALL_BLOCKS,
        (false, true) => CALL_OPENS,
        (false, false) => CALL_PLAIN,
    };
    let block = thread_block();
    // SAFETY: the thread's own block.
    unsafe { (*block).masked_call = state };
    if state == CALL_OPENS && foreign::any_pending() {
        // The view opens for the handlers that now run, as the kernel's mask would.
        // SAFETY: as above.
        unsafe { (*block).reserved_blocked = 0 };
        foreign::release_pending();
        // SAFETY: as above.
        unsafe { (*block).reserved_blocked = 1 };
        frame.rax = -i64::from(libc::EINTR);
        return Some(Verdict::Done);
    }
    None
}

fn leave_plain() -> Verdict {
    // SAFETY: the thread's own block.
    unsafe { (*thread_block()).masked_call = CALL_PLAIN };
    Verdict::Forward
}

/// The mask that the program wants, at this address or where the address was before.
fn wanted(address: u64) -> Result<u64, i32> {
    masks::wanted(address).map_or_else(|| user::read(address), Ok)
}

/// A call whose argument `at` points to a mask (size in `args[size]`):
/// rt_sigsuspend, ppoll, epoll_pwait, epoll_pwait2.
pub fn masked(frame: &mut CallFrame, at: usize, size: usize) -> Verdict {
    let pointer = frame.args[at];
    if pointer == 0 || frame.args[size] != 8 {
        return leave_plain();
    }
    let Ok(mask) = wanted(pointer) else {
        return leave_plain();
    };
    if let Some(verdict) = enter_masked(frame, mask) {
        return verdict;
    }
    if let Some(copy) = without_ours(mask) {
        frame.args[at] = copy.mask_address();
    }
    Verdict::Forward
}

/// A copy of a call's mask without what is never blocked, where it has any of that.
fn without_ours(mask: u64) -> Option<&'static Interned> {
    let never = RESERVED_BIT | fault::never_blocked();
    (mask & never != 0)
        .then(|| intern(mask, mask & !never))
        .flatten()
}

/// A call that the stop has interrupted is about to be made again, not through the hook. It may
/// have begun before pages were protected, under a mask that blocks the faults: one of the
/// program's handlers, run by it, would die of the first.
pub fn made_again(nr: i64, args: &mut [u64; 6]) {
    let at = match nr {
        libc::SYS_rt_sigsuspend => 0,
        libc::SYS_ppoll => 3,
        libc::SYS_epoll_pwait | libc::SYS_epoll_pwait2 => 4,
        libc::SYS_pselect6 | super::IO_PGETEVENTS => 5,
        _ => return,
    };
    if fault::never_blocked() == 0 || args[at] == 0 {
        return;
    }
    if at == 5 {
        let pair = user::read::<[u64; 2]>(args[at]);
        if let Ok([pointer, 8]) = pair
            && pointer != 0
            && let Ok(mask) = wanted(pointer)
            && let Some(copy) = without_ours(mask)
        {
            args[at] = Interned::pair_address(copy);
        }
    } else if let Ok(mask) = wanted(args[at])
        && let Some(copy) = without_ours(mask)
    {
        args[at] = copy.mask_address();
    }
}

/// A call whose argument 5 points to `{mask pointer, size}`: pselect6, io_pgetevents.
pub fn masked_pair(frame: &mut CallFrame) -> Verdict {
    let pair = frame.args[5];
    if pair == 0 {
        return leave_plain();
    }
    let Ok([pointer, 8]) = user::read::<[u64; 2]>(pair) else {
        return leave_plain();
    };
    if pointer == 0 {
        return leave_plain();
    }
    let Ok(mask) = wanted(pointer) else {
        return leave_plain();
    };
    if let Some(verdict) = enter_masked(frame, mask) {
        return verdict;
    }
    if let Some(copy) = without_ours(mask) {
        frame.args[5] = Interned::pair_address(copy);
    }
    Verdict::Forward
}

/// rt_sigtimedwait(set, info, timeout, 8).
pub fn rt_sigtimedwait(frame: &mut CallFrame) -> Verdict {
    let [set, out, _, size, ..] = frame.args;
    let Ok(mask) = wanted(set) else {
        return leave_plain();
    };
    if size != 8 || mask & RESERVED_BIT == 0 {
        return leave_plain();
    }
    // The highest number is taken last, as the kernel does it.
    let mut others = 0u64;
    // SAFETY: the kernel fills one word.
    unsafe { syscall!(libc::SYS_rt_sigpending, &raw mut others, 8) };
    if others & mask & !RESERVED_BIT == 0
        && foreign::any_pending()
        && let Some(info) = foreign::take_pending()
    {
        frame.rax = i64::from(RESERVED_SIGNAL);
        if out != 0
            && let Err(e) = user::write(out, &info)
        {
            frame.rax = -i64::from(e);
        }
        return Verdict::Done;
    }
    // SAFETY: the thread's own block.
    unsafe { (*thread_block()).masked_call = CALL_WAITS };
    if let Some(copy) = intern(mask, mask & !RESERVED_BIT) {
        frame.args[0] = copy.mask_address();
    }
    Verdict::Forward
}

/// signalfd(fd, mask, size), signalfd4(fd, mask, size, flags).
pub fn signalfd(frame: &mut CallFrame) -> Verdict {
    if frame.args[2] == 8
        && let Ok(mask) = user::read::<u64>(frame.args[1])
        && mask & RESERVED_BIT != 0
        && let Some(copy) = intern(mask, mask & !RESERVED_BIT)
    {
        frame.args[1] = copy.mask_address();
    }
    Verdict::Forward
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{frame, in_child};

    fn word(at: u64) -> u64 {
        user::read(at).unwrap()
    }

    /// A thread that waited in sigsuspend when the first checkpoint was taken (`mprotect`): the
    /// handler of the signal that it waited for died of a SIGSEGV that was blocked.
    #[test]
    fn calls_that_are_made_again_let_faults_through() {
        in_child(|| {
            let all = !0u64;
            let at = &raw const all as u64;
            let pair = [at, 8];
            let places = [
                (libc::SYS_rt_sigsuspend, 0),
                (libc::SYS_ppoll, 3),
                (libc::SYS_epoll_pwait, 4),
                (libc::SYS_epoll_pwait2, 4),
                (libc::SYS_pselect6, 5),
            ];
            let masks = || {
                places.map(|(nr, place)| {
                    let mut args = [0u64; 6];
                    made_again(nr, &mut args);
                    assert_eq!(args, [0; 6], "call {nr} without a mask");
                    args[place] = if place == 5 { pair.as_ptr() as u64 } else { at };
                    made_again(nr, &mut args);
                    let seen = args[place];
                    word(if place == 5 { word(seen) } else { seen })
                })
            };
            assert_eq!(masks(), [all; 5]);
            fault::install().unwrap();
            assert_eq!(masks(), [!(RESERVED_BIT | fault::FAULT_BIT); 5]);
        });
    }

    #[test]
    fn masks_lose_the_reserved_signal() {
        in_child(|| {
            let all = !0u64;
            let at = &raw const all as u64;
            let want = !RESERVED_BIT;
            for (nr, arg, size) in [
                (libc::SYS_ppoll, 3, 4),
                (libc::SYS_epoll_pwait, 4, 5),
                (441, 4, 5),
                (libc::SYS_rt_sigsuspend, 0, 1),
                (libc::SYS_rt_sigtimedwait, 0, 3),
                (libc::SYS_signalfd, 1, 2),
                (libc::SYS_signalfd4, 1, 2),
            ] {
                let mut f = frame(nr, &[]);
                f.args[arg] = at;
                f.args[size] = 8;
                assert_eq!(crate::agent::hooks::dispatch(&mut f), Verdict::Forward);
                assert_ne!(f.args[arg], at, "call {nr}");
                assert_eq!(word(f.args[arg]), want, "call {nr}");
            }
            let pair = [at, 8];
            let mut f = frame(libc::SYS_pselect6, &[]);
            f.args[5] = &raw const pair as u64;
            assert_eq!(crate::agent::hooks::dispatch(&mut f), Verdict::Forward);
            assert_eq!(word(word(f.args[5])), want);
            assert_eq!(word(f.args[5] + 8), 8);
        });
    }

    /// A stop came between the hook of a ppoll and its call, which then went through the hook once
    /// more with the copy of its mask: in that wait the program's view had the reserved signal open.
    #[test]
    fn the_view_is_the_same_for_a_call_that_is_hooked_again() {
        use crate::agent::hooks::dispatch;
        use foreign::CALL_BLOCKS;
        in_child(|| {
            let all = !0u64;
            let at = &raw const all as u64;
            let pair = [at, 8];
            // SAFETY: the thread's own block.
            let state = || unsafe { (*thread_block()).masked_call };
            for (nr, place, size, given, blocked) in [
                (libc::SYS_ppoll, 3, 4, at, CALL_BLOCKS),
                (libc::SYS_rt_sigsuspend, 0, 1, at, CALL_BLOCKS),
                (libc::SYS_rt_sigtimedwait, 0, 3, at, CALL_WAITS),
                (libc::SYS_pselect6, 5, 5, pair.as_ptr() as u64, CALL_BLOCKS),
            ] {
                let mut f = frame(nr, &[]);
                f.args[size] = 8;
                f.args[place] = given;
                let mut copy = given;
                for _ in 0..3 {
                    assert_eq!(dispatch(&mut f), Verdict::Forward);
                    assert_eq!(state(), blocked, "call {nr}");
                    assert!(copy == given || copy == f.args[place]);
                    copy = f.args[place];
                }
                assert_ne!(copy, given);
                leave_plain();
            }
        });
    }

    #[test]
    fn masks_without_it_stay_where_they_are() {
        in_child(|| {
            let some = 6u64;
            let mut f = frame(libc::SYS_ppoll, &[0, 0, 0, &raw const some as u64, 8]);
            assert_eq!(crate::agent::hooks::dispatch(&mut f), Verdict::Forward);
            assert_eq!(f.args[3], &raw const some as u64);
            let mut f = frame(libc::SYS_ppoll, &[0, 0, 0, 8, 8]);
            assert_eq!(crate::agent::hooks::dispatch(&mut f), Verdict::Forward);
            assert_eq!(f.args[3], 8);
        });
    }

    #[test]
    fn blocking_everything_leaves_ours_open() {
        in_child(|| {
            use crate::agent::hooks::testing::call;
            let all = !0u64;
            let mut old = 0u64;
            let (at, old_at) = (&raw const all as u64, &raw mut old as u64);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[2, at, 0, 8]), Some(0));
            let mut real = 0u64;
            // SAFETY: asks the kernel.
            unsafe { syscall!(libc::SYS_rt_sigprocmask, 0, 0, &raw mut real, 8) };
            assert_eq!(real & RESERVED_BIT, 0);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[0, 0, old_at, 8]), Some(0));
            assert_eq!(old, real | RESERVED_BIT);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[1, at, old_at, 8]), Some(0));
            assert_eq!(old, real | RESERVED_BIT);
            assert_eq!(call(libc::SYS_rt_sigprocmask, &[0, 0, old_at, 8]), None);
        });
    }
}
