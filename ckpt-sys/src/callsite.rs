//! The call-site net's assembly (`asm/callsites.S`) as seen from Rust.
//!
//! Owns the declarations of its symbols and the layout of the restart record. `agent::callsites` is
//! the only user.

use std::arch::global_asm;
use std::sync::atomic::{AtomicPtr, AtomicU8, AtomicU32, Ordering};

global_asm!(include_str!("../asm/callsites.S"), options(att_syntax));

/// The assembly's source: part of what a cached copy of patched text depends on.
pub const SOURCE: &str = include_str!("../asm/callsites.S");

/// Slots of a library lie a multiple of this away from the library's base.
pub const HOLE_SPAN: usize = 16 << 20;
pub const SLOT_SIZE: usize = 64;
/// Offset of the data in a slot; the code before it must fit.
pub const SLOT_DATA: usize = 32;

unsafe extern "C" {
    static ckpt_hole_start: u8;
    static ckpt_hole_end: u8;
    static ckpt_callsites_text: u8;
    static ckpt_callsites_text_end: u8;
    static ckpt_stage1: u8;
    static ckpt_stage1_end: u8;
    static ckpt_forward: u8;
    static ckpt_forward_end: u8;
    static ckpt_table_word: AtomicU32;
    static ckpt_fd_changes: AtomicU32;
    static ckpt_fd_state: [AtomicU32; FD_CACHE];
    static ckpt_fd_hot: [AtomicPtr<u32>; FD_CACHE];
    static ckpt_fd_saved: [AtomicPtr<SavedBlocks>; FD_CACHE];
    static ckpt_saved_anchor: u64;
    static mut ckpt_rewind_pointer: usize;
    static ckpt_restart: u8;
    static ckpt_restart_call: u8;
    static ckpt_restart_after: u8;
    static ckpt_restart_gather: u8;
    static ckpt_restart_end: u8;
    fn ckpt_life_call(call: *const LifeCall) -> i64;
    static ckpt_life_compare: u8;
    static ckpt_life_after: u8;
    static ckpt_sigreturn: u8;
    static ckpt_program_sigreturn: u8;
    static ckpt_hook_table: [AtomicU8; 512];
    static mut ckpt_dispatch_pointer: usize;
}

macro_rules! address_of {
    ($(#[$doc:meta])* $name:ident, $symbol:ident) => {
        $(#[$doc])*
        #[inline]
        pub fn $name() -> usize {
            &raw const $symbol as usize
        }
    };
}

address_of!(/// First byte of the hole in which slots are mapped.
    hole_start, ckpt_hole_start);
address_of!(/// End of the hole.
    hole_end, ckpt_hole_end);
address_of!(/// Start of the net's common code.
    text_start, ckpt_callsites_text);
address_of!(/// End of the net's common code.
    text_end, ckpt_callsites_text_end);
address_of!(/// Where slots jump to.
    stage1, ckpt_stage1);
address_of!(/// End of the code between a slot's jump and a decision.
    stage1_end, ckpt_stage1_end);
address_of!(/// Stage 2's last look at the table before it forwards a call that may change files.
    forward, ckpt_forward);
address_of!(/// End of that.
    forward_end, ckpt_forward_end);
address_of!(/// The restart stub.
    restart, ckpt_restart);
address_of!(/// The stub's `syscall` instruction.
    restart_call, ckpt_restart_call);
address_of!(/// Behind the stub's `syscall` instruction.
    restart_after, ckpt_restart_after);
address_of!(/// From here to the stub's end `%rsp` still points at its record.
    restart_gather, ckpt_restart_gather);
address_of!(/// End of the stub.
    restart_end, ckpt_restart_end);
address_of!(/// Where a [`LifeCall`] compares its word.
    life_compare, ckpt_life_compare);
address_of!(/// Behind the `syscall` of a [`LifeCall`].
    life_after, ckpt_life_after);
address_of!(/// `sa_restorer` for the agent's own handlers.
    sigreturn, ckpt_sigreturn);
address_of!(/// `sa_restorer` for the program's handlers; counts them in `ThreadBlock::handlers_run`.
    program_sigreturn, ckpt_program_sigreturn);

/// Stage 1's table: the byte of a call number; 0 = straight to the kernel.
#[inline]
pub fn hook_byte(nr: usize) -> Option<&'static AtomicU8> {
    // SAFETY: the table lives in .bss for ever and its elements are atomics.
    unsafe { ckpt_hook_table.get(nr) }
}

/// Descriptors below this number have an entry in the descriptor cache.
pub const FD_CACHE: usize = 4096;

/// In a table byte: the call may change files, so a thread that is stopped before its
/// `syscall` is sent through stage 1 again.
pub const MAY_CHANGE_FILES: u8 = 4;

/// What stage 1 decides by itself about a call that a hook wants; in a table byte from
/// bit 3 on. The numbers are those of the assembly.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Fast {
    Nothing = 0,
    /// Straight on where the descriptor's entry has any flag.
    AtPosition = 1,
    /// Straight on where it has any flag but the last.
    Anywhere = 2,
    /// Straight on where it has the first flag.
    PassOnly = 3,
    /// Clears the entry and goes straight on.
    Close = 4,
    /// Straight on to read only, without O_CREAT, O_TRUNC and O_DIRECT in the second argument.
    Open = 5,
    /// The same in the third.
    OpenAt = 6,
    /// Straight on but for F_DUPFD, F_SETFL, F_DUPFD_CLOEXEC.
    Fcntl = 7,
    /// Straight on but for the requests that change files.
    Ioctl = 8,
    /// As `Anywhere`, and where the blocks of this `pwrite64` are saved.
    AtOffset = 9,
}

impl Fast {
    /// Its bits in a table byte.
    pub const fn bits(self) -> u8 {
        (self as u8) << 3
    }
}

/// The present table's number << 5 (the word that entries of the descriptor cache are
/// compared with), 0 while there is no table.
#[inline]
pub fn table_word() -> &'static AtomicU32 {
    // SAFETY: lives in .bss for ever; an atomic.
    unsafe { &ckpt_table_word }
}

/// Grows whenever descriptors change their meaning.
#[inline]
pub fn fd_changes() -> &'static AtomicU32 {
    // SAFETY: lives in .bss for ever; an atomic.
    unsafe { &ckpt_fd_changes }
}

/// The descriptor cache's entry and mark of `fd`.
#[inline]
pub fn fd_entry(fd: usize) -> Option<(&'static AtomicU32, &'static AtomicPtr<u32>)> {
    // SAFETY: both arrays live in .bss for ever; atomics.
    unsafe { Some((ckpt_fd_state.get(fd)?, ckpt_fd_hot.get(fd)?)) }
}

/// What stage 1 knows of the blocks of an inode: a bitmap, of blocks of 4096 bytes, that are
/// saved. Must not change while a thread may read it.
#[derive(Debug)]
#[repr(C)]
pub struct SavedBlocks {
    /// Writes of up to a block that begin below this offset stay below the file's end.
    limit: u64,
    /// The bitmap's address as a number of bits from the anchor, times the size of a block:
    /// with an offset in the file added it is the place of that offset's bit.
    bias: i64,
}

impl SavedBlocks {
    /// Knows nothing.
    pub const NONE: SavedBlocks = SavedBlocks { limit: 0, bias: 0 };

    /// Of a bitmap for the blocks of a file of `size` bytes.
    pub fn of(bits: &[std::sync::atomic::AtomicU64], size: u64) -> SavedBlocks {
        const BLOCK: i64 = 4096;
        let size = size.min(bits.len() as u64 * 64 * BLOCK as u64);
        let distance = (bits.as_ptr() as i64).wrapping_sub(&raw const ckpt_saved_anchor as i64);
        match distance.checked_mul(8 * BLOCK) {
            Some(bias) => SavedBlocks {
                limit: (size + 1).saturating_sub(BLOCK as u64),
                bias,
            },
            None => SavedBlocks::NONE,
        }
    }
}

/// What is saved of the inode behind `fd`: null or a value that lives as long as the table.
#[inline]
pub fn fd_saved(fd: usize) -> Option<&'static AtomicPtr<SavedBlocks>> {
    // SAFETY: lives in .bss for ever; atomics.
    unsafe { ckpt_fd_saved.get(fd) }
}

/// Sets what the restorer of the program's signal handlers calls with the frame that it
/// goes back to.
///
/// # Safety
/// As for [`set_dispatch`].
pub unsafe fn set_rewind(rewind: unsafe extern "C" fn(*mut u8)) {
    // SAFETY: the caller's promise.
    unsafe { ckpt_rewind_pointer = rewind as usize };
}

/// Sets what stage 2 calls: a function that uses the lower halves of `xmm0` to `xmm15` and nothing else
/// of the vector state.
///
/// # Safety
/// Before the first site is patched, or with all other threads held.
pub unsafe fn set_dispatch(dispatch: unsafe extern "C" fn(*mut u8) -> u64) {
    // SAFETY: nobody executes stage 2 yet (the caller's promise).
    unsafe { ckpt_dispatch_pointer = dispatch as usize };
}

/// Marks call number `nr` (bits of the caller's choice; 0 = not hooked).
pub fn set_hook_byte(nr: usize, bits: u8) {
    if let Some(byte) = hook_byte(nr) {
        byte.store(bits, Ordering::Relaxed);
    }
}

/// A system call that a hook makes with arguments that hold only as long as a word keeps its value:
/// the number of this life, or whether pages are protected. The offsets are known to the assembly.
#[derive(Debug)]
#[repr(C)]
pub struct LifeCall<'a> {
    pub nr: i64,
    pub args: [u64; 6],
    /// Changes at a stop or from life to life, while no thread runs.
    pub word: &'a AtomicU32,
    /// What it must still be.
    pub expected: u32,
}

impl LifeCall<'_> {
    /// Makes the call; `None`, and no call, if the word has changed. A stop between the two is no
    /// hindrance, and handlers of the program run when it is over as behind any call.
    ///
    /// # Safety
    /// As for the call. Whoever stops threads sends one stopped in
    /// [`life_compare`]`..`[`life_after`] to the former.
    pub unsafe fn make(&self) -> Option<i64> {
        // SAFETY: the caller's promise.
        let value = unsafe { ckpt_life_call(self) };
        (value != i64::MIN).then_some(value)
    }
}

/// What the restart stub needs; `%rsp` points at it while the stub runs. The offsets
/// are known to the assembly.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct RestartRecord {
    /// rdi, rsi, rdx, r10, r8, r9 as the site had them.
    pub args: [u64; 6],
    /// Where to go on.
    pub back: u64,
    /// The site's stack pointer.
    pub rsp: u64,
    /// Address of the thread's `handlers_run`, and the value it must still have.
    pub handlers_run: u64,
    pub handlers: u64,
    /// A `RestartMode`.
    pub mode: u32,
    pub pad: u32,
    /// The call that the site made.
    pub nr: i64,
    /// Mode `Poll`: the result when the time is over. Modes `Rest` and `Gather`: bytes (or
    /// messages) done before.
    pub value: i64,
    /// Own copies that changed arguments point at.
    pub time: [i64; 2],
    pub poll_fd: i32,
    pub poll_events: u32,
    /// The call that the stub executes.
    pub executes: i64,
    /// Mode `Plain`: if not 0, what must stand there once the call has ended well (where the
    /// kernel writes the rest of an interrupted sleep).
    pub remainder_at: u64,
    pub remainder: [u64; 2],
    /// Mode `Gather`: so many bytes (or messages) are wanted in all, and one of them is so
    /// many bytes further on in memory.
    pub wanted: u64,
    pub unit: u64,
    /// The call that transfers without waiting, and its last three arguments.
    pub transfer: i64,
    pub tail: [u64; 3],
    /// The time that each message may take (units of one byte share theirs). Mode
    /// `Connect`: the socket's timeout as it was.
    pub whole: [i64; 2],
    /// The result while the stub makes another call.
    pub kept: i64,
}

/// What the stub does with the result of the call it executed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum RestartMode {
    Plain = 0,
    /// It was a poll: go on to the call itself when ready.
    Poll = 1,
    /// It was the rest of a transfer: add what was done before.
    Rest = 2,
    /// It was a poll within a transfer that has a timeout as a whole: transfer what there is,
    /// and poll again for the rest of the time.
    Gather = 3,
    /// The call itself, with the socket's timeout shortened: put that back.
    Connect = 4,
}

const _: () = {
    use std::mem::offset_of;
    assert!(offset_of!(LifeCall, args) == 8);
    assert!(offset_of!(LifeCall, word) == 56);
    assert!(offset_of!(LifeCall, expected) == 64);
    assert!(offset_of!(RestartRecord, back) == 48);
    assert!(offset_of!(RestartRecord, rsp) == 56);
    assert!(offset_of!(RestartRecord, handlers_run) == 64);
    assert!(offset_of!(RestartRecord, handlers) == 72);
    assert!(offset_of!(RestartRecord, mode) == 80);
    assert!(offset_of!(RestartRecord, nr) == 88);
    assert!(offset_of!(RestartRecord, value) == 96);
    assert!(offset_of!(RestartRecord, remainder_at) == 136);
    assert!(offset_of!(RestartRecord, remainder) == 144);
    assert!(offset_of!(RestartRecord, time) == 104);
    assert!(offset_of!(RestartRecord, poll_fd) == 120);
    assert!(offset_of!(RestartRecord, executes) == 128);
    assert!(offset_of!(RestartRecord, wanted) == 160);
    assert!(offset_of!(RestartRecord, unit) == 168);
    assert!(offset_of!(RestartRecord, transfer) == 176);
    assert!(offset_of!(RestartRecord, tail) == 184);
    assert!(offset_of!(RestartRecord, whole) == 208);
    assert!(offset_of!(RestartRecord, kept) == 224);
    assert!(offset_of!(crate::tls::ThreadBlock, handlers_run) == 32);
};
