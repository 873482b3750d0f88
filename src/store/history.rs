//! The history of a job: a line for each generation it ever committed, for `ckpt plot`.
//!
//! `history` in the job's directory: text, words separated by blanks, the first line
//! names the columns. Written by the holder of the job's lock after a commit, without
//! sync: a lost or torn line costs a point in a picture, nothing else. Above
//! [`MOST`] bytes the older half is dropped.

use super::fs::Fs;
use super::{Context, StoreError};
use crate::errno::Errno;
use std::path::Path;

const NAME: &str = "history";
const TMP_NAME: &str = "history.tmp";
const HEAD: &str = "generation time_ns kind chain stop_us park_us collect_us scan_us snapshot_us \
release_us precopy_us persist_us pages bytes_stored bytes_logical snapshot tracker trigger\n";
/// About twenty thousand generations.
const MOST: u64 = 2 << 20;

/// One generation. Times in microseconds unless they say otherwise.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entry {
    pub generation: u64,
    /// Wall clock at the stop, since 1970.
    pub time_ns: u64,
    /// `full` or `increment`.
    pub kind: String,
    /// Increments between this generation and a full one.
    pub chain: u32,
    pub stop_us: u64,
    /// The parts of the stop: park, collect, scan, copy or fork, release.
    pub parts_us: [u64; 5],
    /// While the program ran, before the stop.
    pub precopy_us: u64,
    pub persist_us: u64,
    pub pages: u64,
    pub bytes_stored: u64,
    pub bytes_logical: u64,
    pub snapshot: String,
    pub tracker: String,
    pub trigger: String,
}

impl Entry {
    fn line(&self) -> String {
        let [park, collect, scan, snapshot, release] = self.parts_us;
        format!(
            "{} {} {} {} {} {park} {collect} {scan} {snapshot} {release} {} {} {} {} {} {} {} {}\n",
            self.generation,
            self.time_ns,
            self.kind,
            self.chain,
            self.stop_us,
            self.precopy_us,
            self.persist_us,
            self.pages,
            self.bytes_stored,
            self.bytes_logical,
            self.snapshot,
            self.tracker,
            self.trigger,
        )
    }

    fn parse(line: &str) -> Option<Entry> {
        let mut words = line.split_ascii_whitespace();
        let mut entry = Entry::default();
        let number = |word: Option<&str>| word?.parse::<u64>().ok();
        entry.generation = number(words.next())?;
        entry.time_ns = number(words.next())?;
        entry.kind = words.next()?.to_owned();
        entry.chain = number(words.next())? as u32;
        entry.stop_us = number(words.next())?;
        for part in &mut entry.parts_us {
            *part = number(words.next())?;
        }
        entry.precopy_us = number(words.next())?;
        entry.persist_us = number(words.next())?;
        entry.pages = number(words.next())?;
        entry.bytes_stored = number(words.next())?;
        entry.bytes_logical = number(words.next())?;
        entry.snapshot = words.next()?.to_owned();
        entry.tracker = words.next()?.to_owned();
        entry.trigger = words.next()?.to_owned();
        words.next().is_none().then_some(entry)
    }
}

/// Adds a line.
pub fn append<F: Fs>(fs: &F, dir: &Path, entry: &Entry) -> Result<(), StoreError> {
    let path = dir.join(NAME);
    let (file, created) = fs.open_or_create(&path).on("open", &path)?;
    let mut end = fs.len(&file).on("read", &path)?;
    if created || end == 0 {
        fs.write_all(&file, HEAD.as_bytes(), 0).on("write", &path)?;
        end = HEAD.len() as u64;
    }
    if end <= MOST {
        return fs
            .write_all(&file, entry.line().as_bytes(), end)
            .on("write", &path);
    }
    let text = fs.read_all(&file, 2 * MOST).on("read", &path)?;
    let half = text.len() / 2;
    let from = text[half..].iter().position(|&b| b == b'\n').unwrap_or(0) + half + 1;
    let mut kept = HEAD.as_bytes().to_vec();
    kept.extend_from_slice(text.get(from..).unwrap_or(&[]));
    kept.extend_from_slice(entry.line().as_bytes());
    let tmp = dir.join(TMP_NAME);
    match fs.unlink(&tmp) {
        Err(Errno::ENOENT) | Ok(()) => {}
        Err(errno) => Err(errno).on("remove", &tmp)?,
    }
    let file = fs.create_new(&tmp).on("create", &tmp)?;
    fs.write_all(&file, &kept, 0).on("write", &tmp)?;
    fs.rename(&tmp, &path).on("rename", &tmp)
}

/// All whole lines; none when there is no history.
pub fn read<F: Fs>(fs: &F, dir: &Path) -> Result<Vec<Entry>, StoreError> {
    let path = dir.join(NAME);
    let file = match fs.open(&path) {
        Err(Errno::ENOENT) => return Ok(Vec::new()),
        other => other.on("open", &path)?,
    };
    let text = fs.read_all(&file, 2 * MOST).on("read", &path)?;
    let text = String::from_utf8_lossy(&text);
    Ok(text.lines().filter_map(Entry::parse).collect())
}

#[cfg(test)]
mod tests {
    use super::super::fs::RawFs;
    use super::super::fs::tests::TempDir;
    use super::*;

    fn entry(generation: u64) -> Entry {
        Entry {
            generation,
            time_ns: 1_700_000_000_000_000_000,
            kind: "increment".into(),
            chain: 3,
            stop_us: 1500,
            parts_us: [1, 2, 3, 4, 5],
            precopy_us: 6,
            persist_us: 7,
            pages: 8,
            bytes_stored: 9,
            bytes_logical: 10,
            snapshot: "copy".into(),
            tracker: "uffd".into(),
            trigger: "clock".into(),
        }
    }

    #[test]
    fn lines_come_back() {
        let dir = TempDir::new("history");
        assert!(read(&RawFs, &dir.0).unwrap().is_empty());
        for n in 1..=3 {
            append(&RawFs, &dir.0, &entry(n)).unwrap();
        }
        let all = read(&RawFs, &dir.0).unwrap();
        assert_eq!(all, [entry(1), entry(2), entry(3)]);
    }

    #[test]
    fn a_torn_line_is_passed_over() {
        let dir = TempDir::new("history-torn");
        append(&RawFs, &dir.0, &entry(1)).unwrap();
        let path = dir.0.join(NAME);
        let mut text = std::fs::read(&path).unwrap();
        text.truncate(text.len() - 9);
        text.push(b'\n');
        std::fs::write(&path, &text).unwrap();
        append(&RawFs, &dir.0, &entry(2)).unwrap();
        assert_eq!(read(&RawFs, &dir.0).unwrap(), [entry(2)]);
    }

    #[test]
    fn the_older_half_goes() {
        let dir = TempDir::new("history-long");
        let line = entry(7).line();
        let many = MOST as usize / line.len() + 2;
        std::fs::write(dir.0.join(NAME), line.repeat(many)).unwrap();
        append(&RawFs, &dir.0, &entry(8)).unwrap();
        let all = read(&RawFs, &dir.0).unwrap();
        assert!(
            (many / 2 - 2..=many / 2 + 2).contains(&all.len()),
            "{}",
            all.len()
        );
        assert_eq!(all.last().unwrap().generation, 8);
    }
}
