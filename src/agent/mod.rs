//! What runs inside the target process. The laws (numbered; code refers to them):
//!
//! 1. The program owns malloc, stdio, its locks, signals and descriptors. Memory
//!    comes from `alloc` (our own arena), descriptors live in the helper's own table.
//! 2. Between "threads stopped" and "threads released" nothing takes a lock that a
//!    stopped thread may hold; only raw system calls (`ckpt_sys::raw`, `rustix`
//!    with its linux_raw backend), never libc functions that touch errno, TLS or locks.
//! 3. Hooks run under a [`state::InHook`] guard; a stop waits for its end.
//! 4. A checkpoint is invisible to the program.
//! 5. What cannot be checkpointed is refused with a reason; the program runs on.
//! 6. Nothing at all happens in a set-uid process.
//! 7. No panics: an agent that meets the unexpected refuses and logs.

pub mod ballast;
pub mod callsites;
pub mod checkpoint;
pub mod children;
pub mod clock;
pub mod collect;
pub mod ending;
pub mod events;
pub mod exit;
pub mod globs;
pub mod headroom;
pub mod heap;
pub mod helper;
pub mod hooks;
pub mod interface;
pub mod log;
pub mod merge;
pub mod outputs;
pub mod own_memory;
pub mod place;
pub mod prefetch;
pub mod procfs;
pub mod recover;
pub mod refusal;
pub mod region;
pub mod request;
pub mod reserve;
pub mod restore;
pub mod resume;
pub mod rollback;
pub mod settings;
pub mod side;
pub mod snapshot;
pub mod start;
pub mod starter;
pub mod state;
pub mod stop;
pub mod track;
pub mod vdso;
