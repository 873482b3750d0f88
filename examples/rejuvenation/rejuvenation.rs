//! Memory rejuvenation (WO 97/00476 FIG. 12), in Rust: see rejuvenation.c.
//!
//!     rejuvenation REQUESTS EVERY

use ckpt_api::{Keep, Outcome, Rollback};
use std::io::Write;

/// Serves one request, and loses 64 KiB over it.
fn serve(index: u64) -> u64 {
    let leaked = vec![index as u8; 64 << 10].leak();
    leaked.iter().map(|&b| u64::from(b)).sum::<u64>() + index
}

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find(|l| l.starts_with("VmRSS:"));
    line.and_then(|l| l.split_whitespace().nth(1)?.parse().ok())
        .unwrap_or(0)
}

fn main() {
    let mut args = std::env::args()
        .skip(1)
        .map(|a| a.parse().expect("a number"));
    let requests: u64 = args.next().unwrap_or(1000);
    let every: u64 = args.next().unwrap_or(100);
    let mut out = std::io::stdout();
    // What was written stays written.
    let _ = ckpt_api::exclude("*");
    let most = Keep::new(0u64);
    let mut next = 0;
    if let Ok(Outcome::Restored(index)) = ckpt_api::checkpoint() {
        next = index as u64;
    }
    let begin = next;
    while next < requests {
        writeln!(out, "{next} {}", serve(next)).expect("standard output");
        next += 1;
        if next - begin == every {
            most.set(most.get().max(resident_kib()));
            // Only without the library does this come back, and the leak stays.
            let _ = Rollback::to(0).returning(next as i32).keep(&most).go();
        }
    }
    eprintln!("most resident {} KiB", most.get().max(resident_kib()));
}
