//! The registers of an intercepted system call, as stage 1 of the call-site net
//! pushes them (lowest address first).

/// Number and arguments; the hook may change them before the call goes on.
#[repr(C)]
#[derive(Debug)]
pub struct CallFrame {
    /// rax: system call number; on [`Verdict::Done`] the kernel-style result.
    pub rax: i64,
    /// rdi, rsi, rdx, r10, r8, r9.
    pub args: [u64; 6],
    pub rbp: u64,
    /// The slot's data (r11).
    pub slot: u64,
}

/// What stage 2 does after the hook.
#[repr(u64)]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// Execute the call at its site with the frame's registers.
    Forward = 0,
    /// Return `rax` behind the site without executing the call.
    Done = 1,
}
