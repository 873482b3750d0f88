//! placeholder
pub mod frame;
use frame::{CallFrame, Verdict};
pub fn table() -> [u8; 512] { [0; 512] }
pub fn dispatch(_frame: &mut CallFrame) -> Verdict { Verdict::Forward }
pub mod signal {
    //! placeholder
    /// # Safety
    /// placeholder
    pub unsafe fn deliver_foreign(_s: i32, _i: *mut libc::siginfo_t, _u: *mut libc::ucontext_t) {}
}
pub mod ids {
    //! placeholder
    pub fn virtual_tid(tid: i32) -> i32 { tid }
}
pub mod memory {
    //! placeholder
    pub fn special_advice_seen() -> bool { true }
}
pub struct Restored<'a> { pub pairs: &'a [(i32,i32)], pub old_pid: i32, pub new_pid: i32, pub mapped: &'a [(u64,u64)], pub image_file: (u64,u64), pub pgid: i32, pub sid: i32 }
pub fn after_restore(_r: &Restored<'_>) {}
