//! placeholder
use std::sync::atomic::AtomicI32;
pub static WRITER_PID: AtomicI32 = AtomicI32::new(0);
pub fn set_job_dir(_d: &[u8]) {}
pub fn configure(_k: crate::config::KeepOnExit) {}
