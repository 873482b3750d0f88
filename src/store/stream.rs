//! The names of streams (contents of the program's outputs) in a job's directory, and
//! their removal. What is in them: `agent::outputs`.

use super::fs::{Fs, RawFs};
use super::generation::GenerationRecord;
use super::{Context, StoreError};
use crate::errno::Errno;
use std::path::{Path, PathBuf};

/// `stream-000001`.
pub fn stream_path(job: &Path, number: u64) -> PathBuf {
    job.join(format!("stream-{number:06}"))
}

/// Which inodes it stands for.
pub fn ids_path(job: &Path, number: u64) -> PathBuf {
    job.join(format!("stream-{number:06}.ids"))
}

/// The number in the name of a stream or of its `.ids`.
pub fn parse_name(name: &[u8]) -> Option<u64> {
    let rest = std::str::from_utf8(name).ok()?.strip_prefix("stream-")?;
    let digits = rest.strip_suffix(".ids").unwrap_or(rest);
    let sound = digits.len() >= 6 && digits.bytes().all(|b| b.is_ascii_digit());
    if sound { digits.parse().ok() } else { None }
}

/// The numbers of the streams in a job's directory, ascending.
pub fn numbers(job: &Path) -> Result<Vec<u64>, StoreError> {
    let entries = RawFs.list(job).on("list", job)?;
    let mut numbers: Vec<u64> = entries.iter().filter_map(|e| parse_name(&e.name)).collect();
    numbers.sort_unstable();
    numbers.dedup();
    Ok(numbers)
}

/// Removes the streams that none of the generations uses.
pub fn remove_unused(job: &Path, generations: &[&GenerationRecord]) -> Result<(), StoreError> {
    for number in numbers(job)? {
        let mut streams = generations.iter().flat_map(|g| &g.files.streams);
        if streams.any(|s| s.number == number) {
            continue;
        }
        for path in [stream_path(job, number), ids_path(job, number)] {
            match RawFs.unlink(&path) {
                Err(Errno::ENOENT) | Ok(()) => {}
                Err(errno) => Err(errno).on("remove", &path)?,
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(parse_name(b"stream-000012"), Some(12));
        assert_eq!(parse_name(b"stream-000012.ids"), Some(12));
        for other in [
            &b"stream-12"[..],
            b"stream-00001x",
            b"table-000012",
            b"stream-",
        ] {
            assert_eq!(parse_name(other), None);
        }
    }
}
