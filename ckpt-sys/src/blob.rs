//! The restorer blob's bytes and its argument structs, mirrors of
//! `blob/restorer.h`. Used by `agent::restore` (which fills them) and by
//! `agent::resume` (which reads the barrier words).

use std::sync::atomic::{AtomicU32, AtomicU64};

/// The flat binary; its entry is at offset 0 and takes a [`RestorerArgs`] pointer.
pub static RESTORER: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/restorer.bin"));

/// Bytes of stack in the area for each thread until it enters the image.
pub const BLOB_THREAD_STACK: u64 = 1024;

pub const OP_KEEP_FD: u32 = 1;
pub const OP_MAY_FAIL: u32 = 2;
pub const OP_READ_FULL: u32 = 4;
pub const OP_FIXED_RESULT: u32 = 8;
pub const OP_READV_FULL: u32 = 16;
pub const OP_COPY: u32 = 32;

/// Flag bits for "argument `index` is the current descriptor".
pub const fn op_fd_arg(index: u32) -> u32 {
    (index + 1) << 8
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct TapeOp {
    pub nr: u32,
    pub flags: u32,
    pub arg: [u64; 6],
}

#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
pub struct RestorerThread {
    pub tid: i32,
    pub new_tid: i32,
    pub fs_base: u64,
    pub gs_base: u64,
    pub robust_list: u64,
    pub robust_list_len: u64,
    pub clear_child_tid: u64,
    pub rseq: u64,
    pub rseq_len: u32,
    pub rseq_sig: u32,
    pub entry: u64,
    pub entry_stack: u64,
    pub entry_arg: [u64; 3],
    pub is_main: u32,
    pub pad: u32,
}

#[repr(C)]
#[derive(Debug)]
pub struct RestorerArgs {
    pub area: u64,
    pub area_len: u64,
    pub task_size: u64,
    pub rseq: u64,
    pub rseq_len: u64,
    pub rseq_sig: u64,
    pub tape: u64,
    pub tape_len: u64,
    pub threads: u64,
    pub nthreads: u64,
    pub thread_stacks: u64,
    pub use_set_tid: u32,
    pub message_fd: i32,
    pub vvar_start: u64,
    pub helper_stack: u64,
    pub helper_tls: u64,
    pub helper_entry: u64,
    pub helper_arg: u64,
    pub close_fds: u64,
    pub nclose_fds: u64,
    pub ready: AtomicU32,
    pub go: AtomicU32,
    pub leader_exits: u32,
    pub leader_word: AtomicU32,
    pub stays: u64,
    pub share_from: u64,
    pub share_to: u64,
    pub share_next: AtomicU64,
    pub helper_busy: AtomicU32,
    pub played: AtomicU32,
    pub stage_ns: [u64; 4],
}
