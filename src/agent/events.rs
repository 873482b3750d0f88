//! Handlers of the program (`ckpt_on`): before a checkpoint, after it, after a restore.
//!
//! They run in a thread of the program, outside of every hook, with the thread's own
//! signal mask: for a checkpoint that the program called, in the thread that called it.
//! Handlers of a restore to a checkpoint that nobody called (the clock's, the command's)
//! are owed to the program, and paid in the first thread that calls the library: inside a
//! hook they could meet the lock that the interrupted libc function holds.
//!
//! The table is part of the image and only grows; any thread, also a signal handler.

use ckpt_sys::tls::thread_block;
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU32, AtomicUsize, Ordering};

pub const BEFORE: i32 = 1;
pub const AFTER: i32 = 2;
pub const RESTORED: i32 = 3;

/// `void handler(int event, void *arg)`.
pub type Function = unsafe extern "C" fn(i32, *mut libc::c_void);

/// A row of the table.
struct Row {
    /// 0 until the row is complete.
    event: AtomicI32,
    function: AtomicUsize,
    argument: AtomicUsize,
}

const MOST: usize = 64;

static ROWS: [Row; MOST] = [const {
    Row {
        event: AtomicI32::new(0),
        function: AtomicUsize::new(0),
        argument: AtomicUsize::new(0),
    }
}; MOST];

/// Rows given out.
static USED: AtomicU32 = AtomicU32::new(0);

/// The handlers of a restore that nobody has run yet.
static OWED: AtomicBool = AtomicBool::new(false);

/// Adds a handler; the same one with the same argument counts once.
pub fn on(event: i32, function: Option<Function>, argument: *mut libc::c_void) -> i32 {
    let Some(function) = function else {
        return -libc::EINVAL;
    };
    if !(BEFORE..=RESTORED).contains(&event) {
        return -libc::EINVAL;
    }
    let (function, argument) = (function as usize, argument as usize);
    let same = |row: &&Row| {
        row.event.load(Ordering::Acquire) == event
            && row.function.load(Ordering::Relaxed) == function
            && row.argument.load(Ordering::Relaxed) == argument
    };
    if ROWS.iter().any(|row| same(&row)) {
        return 0;
    }
    let claim = |used: u32| ((used as usize) < MOST).then_some(used + 1);
    match USED.fetch_update(Ordering::SeqCst, Ordering::SeqCst, claim) {
        Ok(index) => {
            let row = &ROWS[index as usize];
            row.function.store(function, Ordering::Relaxed);
            row.argument.store(argument, Ordering::Relaxed);
            row.event.store(event, Ordering::Release);
            0
        }
        Err(_) => -libc::ENOMEM,
    }
}

/// Does this thread run a handler?
pub fn in_handler() -> bool {
    // SAFETY: the block is this thread's own.
    unsafe { std::ptr::read_volatile(&raw const (*thread_block()).in_handler) != 0 }
}

/// Runs the handlers of an event: `BEFORE` the latest first, the others in the order in
/// which they were added (as pthread_atfork(3) does).
pub fn run(event: i32) {
    let used = (USED.load(Ordering::SeqCst) as usize).min(MOST);
    let rows = &ROWS[..used];
    if event == BEFORE {
        rows.iter().rev().for_each(|row| call(row, event));
    } else {
        rows.iter().for_each(|row| call(row, event));
    }
}

fn call(row: &Row, event: i32) {
    if row.event.load(Ordering::Acquire) != event {
        return;
    }
    let function = row.function.load(Ordering::Relaxed);
    let argument = row.argument.load(Ordering::Relaxed) as *mut libc::c_void;
    // SAFETY: the program gave this function for this purpose; the block is this thread's own.
    unsafe {
        let depth = &raw mut (*thread_block()).in_handler;
        std::ptr::write_volatile(depth, std::ptr::read_volatile(depth) + 1);
        std::mem::transmute::<usize, Function>(function)(event, argument);
        let depth = &raw mut (*thread_block()).in_handler;
        std::ptr::write_volatile(depth, std::ptr::read_volatile(depth) - 1);
    }
}

/// The restored helper: nobody waits in `ckpt_checkpoint` who could run the handlers.
pub fn owe(owed: bool) {
    OWED.store(owed, Ordering::SeqCst);
}

/// A thread of the program calls the library: it runs what is owed.
pub fn pay() {
    if OWED.load(Ordering::Relaxed) && !in_handler() && OWED.swap(false, Ordering::SeqCst) {
        run(RESTORED);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    static CALLS: Mutex<Vec<(i32, usize)>> = Mutex::new(Vec::new());

    unsafe extern "C" fn note(event: i32, argument: *mut libc::c_void) {
        assert!(in_handler());
        CALLS.lock().unwrap().push((event, argument as usize));
    }

    // One test: the table is the process's.
    #[test]
    fn order_doubles_debts_and_the_table_s_end() {
        let add = |event, argument: usize| on(event, Some(note), argument as *mut _);
        assert_eq!(on(BEFORE, None, std::ptr::null_mut()), -libc::EINVAL);
        assert_eq!(add(0, 1), -libc::EINVAL);
        assert_eq!(add(4, 1), -libc::EINVAL);
        for (event, argument) in [(BEFORE, 1), (BEFORE, 2), (AFTER, 3), (AFTER, 4)] {
            assert_eq!(add(event, argument), 0);
            assert_eq!(add(event, argument), 0);
        }
        assert_eq!(add(RESTORED, 5), 0);
        run(BEFORE);
        run(AFTER);
        pay();
        owe(true);
        pay();
        pay();
        let expected = [(1, 2), (1, 1), (2, 3), (2, 4), (3, 5)];
        assert_eq!(*CALLS.lock().unwrap(), expected);
        assert!(!in_handler());
        for argument in 6..=MOST {
            assert_eq!(add(AFTER, argument), 0);
        }
        assert_eq!(add(AFTER, MOST + 1), -libc::ENOMEM);
        assert_eq!(add(AFTER, MOST), 0);
    }
}
