//! The C and assembly shim: everything that cannot be said in ordinary Rust.
//!
//! * [`raw`]: system calls by number, without libc (no errno, no TLS, no
//!   symbol that the preload library itself exports).
//! * [`tls`]: the per-thread block of the agent, in the initial-exec TLS model
//!   so that a signal handler may touch it.
//! * [`callsite`]: the call-site net's slots, stages and restart stub.
//! * [`clock`]: clock_gettime with an offset, for the entry points of a vdso.
//! * `memory`: memcpy and its kin, for hooks.
//! * [`stack`]: calls on another stack.
//! * [`context`], [`thread`]: context capture, threads without glibc, sigreturn.
//! * [`blob`]: the restorer that replaces a process's memory.
//!
//! Called from every context: signal handlers, the stopped world, forked
//! children. Nothing here allocates or takes a lock.

pub mod blob;
pub mod callsite;
pub mod clock;
pub mod context;
mod memory;
pub mod raw;
pub mod stack;
pub mod thread;
pub mod tls;
