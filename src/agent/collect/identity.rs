//! Where and when an image was taken: host, kernel, boot, times, user.

use crate::agent::hooks::maps::Maps;
use crate::agent::procfs::{hex, read_file};
use crate::image::state::Identity;
use ckpt_sys::syscall;
use std::sync::atomic::{AtomicU64, Ordering};

fn text(path: &[u8]) -> String {
    String::from_utf8_lossy(read_file(path).unwrap_or_default().trim_ascii()).into_owned()
}

/// The running kernel's release and build.
pub fn kernel() -> String {
    let release = text(b"/proc/sys/kernel/osrelease");
    format!("{release} {}", text(b"/proc/sys/kernel/version"))
}

/// Where the vdso was found last: its code, and the first part of its data (0, 0: none).
static VDSO: [AtomicU64; 4] = [const { AtomicU64::new(0) }; 4];

/// Where the kernel's vdso is: start of its code, start of its data before that, end.
pub fn vdso_layout() -> Option<(u64, u64, u64)> {
    // The whole map takes ten times as long to read as these questions.
    let [start, end, data, data_end] = [0, 1, 2, 3].map(|k| VDSO[k].load(Ordering::Relaxed));
    if start != 0
        && data != 0
        && let Ok(mut maps) = Maps::open()
        && maps.is(start, end, b"[vdso]")
        && maps.is(data, data_end, b"[vvar")
    {
        return Some((start, data, end));
    }
    let maps = read_file(b"/proc/thread-self/maps").unwrap_or_default();
    let mut data = (0, 0);
    for line in maps.split(|&b| b == b'\n') {
        let is_code = line.ends_with(b"[vdso]");
        if !is_code && !line.windows(5).any(|w| w == b"[vvar") {
            continue;
        }
        let dash = line.iter().position(|&b| b == b'-')?;
        let start = hex(&line[..dash])?;
        let end = hex(&line[dash + 1..])?;
        if is_code {
            for (word, value) in VDSO.iter().zip([start, end, data.0, data.1]) {
                word.store(value, Ordering::Relaxed);
            }
            return Some((start, if data.0 == 0 { start } else { data.0 }, end));
        }
        if data.0 == 0 {
            data = (start, end);
        }
    }
    None
}

/// Digest of the vdso's code: another one cannot be entered where the old one was
/// (`agent::vdso`).
pub fn vdso_digest() -> u64 {
    match vdso_layout() {
        Some((start, _, end)) if start < end => {
            // SAFETY: the kernel's own mapping, readable, never changed.
            let code =
                unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
            xxhash_rust::xxh3::xxh3_64(code)
        }
        _ => 0,
    }
}

/// Tells this boot of this machine from all others.
pub fn boot_id() -> String {
    text(b"/proc/sys/kernel/random/boot_id")
}

fn clock(id: i32) -> u64 {
    let mut ts = [0u64; 2];
    // SAFETY: the kernel fills two words.
    unsafe { syscall!(libc::SYS_clock_gettime, id, &mut ts) };
    ts[0] * 1_000_000_000 + ts[1]
}

/// CLOCK_REALTIME in nanoseconds.
pub fn realtime_ns() -> u64 {
    clock(libc::CLOCK_REALTIME)
}

/// Everything but the mapped objects, which the writer adds.
pub fn collect() -> Identity {
    // SAFETY: no arguments.
    let (uid, gid) = unsafe {
        (
            syscall!(libc::SYS_getuid) as u32,
            syscall!(libc::SYS_getgid) as u32,
        )
    };
    Identity {
        arch: std::env::consts::ARCH.into(),
        objects: Vec::new(),
        cpu_features: super::cpu::features(),
        uid,
        gid,
        hostname: text(b"/proc/sys/kernel/hostname"),
        boot_id: boot_id(),
        kernel: kernel(),
        vdso: vdso_digest(),
        realtime_ns: clock(libc::CLOCK_REALTIME),
        monotonic_ns: clock(libc::CLOCK_MONOTONIC),
    }
}
