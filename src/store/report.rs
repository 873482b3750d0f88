//! placeholder
use super::RawFs;
#[derive(Debug, Clone, Default)]
pub struct Refusal { pub reason: String, pub time_ns: u64 }
#[derive(Debug, Clone, Default)]
pub struct Report { pub pid: i32, pub start_time: u64, pub job: String, pub job_dir: String, pub last_nonce: u32, pub last_generation: Option<u64>, pub last_refusal: Option<Refusal>, pub checkpoints: u64, pub refused: u64, pub net_installed: bool, pub net: String }
pub fn write(_fs: &RawFs, _root: &std::path::Path, _r: &Report) -> Result<(), super::StoreError> { Ok(()) }
