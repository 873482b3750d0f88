//! Which pages a program touched soon after a restart: kept beside its generations, and
//! fetched ahead at the next restart.
//!
//! One file for the job, since the next restart is one of a later generation: addresses say
//! more than places in an image. It is a hint: a damaged one counts as none, and it is never
//! synced. Written by the helper thread, read by the constructor.

use super::fs::Fs;
use super::{Context, StoreError};
use crate::errno::Errno;
use crate::image::codec;
use serde::{Deserialize, Serialize};
use std::path::Path;

const NAME: &str = "working-set";
const TMP_NAME: &str = "working-set.tmp";
const MAGIC: [u8; 8] = *b"CKPTWS\0\x02";
const MOST: u64 = 1 << 20;
/// Runs that are kept; what lies near to each other is joined until they fit.
pub const MOST_RUNS: usize = 16 << 10;

/// `(page number, pages)`, ascending, disjoint.
pub type Runs = Vec<(u64, u64)>;

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    /// The generation that was restored.
    pub generation: u64,
    /// Pages that the program has touched, and no others: what each look at the page tables
    /// has found that the ones before had not.
    pub looks: Vec<Runs>,
    /// What else was in the page tables at the end: touched, or beside a page that was.
    pub around: Runs,
    /// Pages in the page tables at the end, and those of them that were written.
    pub touched: u64,
    pub written: u64,
}

impl WorkingSet {
    /// Joins neighbours until there are at most [`MOST_RUNS`].
    pub fn shorten(&mut self) {
        let mut gap = 1;
        while self.runs() > MOST_RUNS {
            let lists = self.looks.iter_mut().chain([&mut self.around]);
            for runs in lists {
                runs.dedup_by(|next, last| {
                    let near = next.0 <= last.0 + last.1 + gap;
                    if near {
                        last.1 = next.0 + next.1 - last.0;
                    }
                    near
                });
            }
            gap *= 2;
        }
    }

    /// Runs in all lists.
    pub fn runs(&self) -> usize {
        self.lists().map(Vec::len).sum()
    }

    fn lists(&self) -> impl Iterator<Item = &Runs> {
        self.looks.iter().chain([&self.around])
    }

    pub fn write<F: Fs>(&self, fs: &F, job: &Path) -> Result<(), StoreError> {
        let Ok(payload) = codec::encode(self) else {
            return Ok(());
        };
        let mut bytes = MAGIC.to_vec();
        bytes.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        bytes.extend_from_slice(&payload);
        let (tmp, path) = (job.join(TMP_NAME), job.join(NAME));
        match fs.unlink(&tmp) {
            Err(Errno::ENOENT) | Ok(()) => {}
            Err(errno) => Err(errno).on("remove", &tmp)?,
        }
        let file = fs.create_new(&tmp).on("create", &tmp)?;
        fs.write_all(&file, &bytes, 0).on("write", &tmp)?;
        fs.rename(&tmp, &path).on("rename", &tmp)
    }

    pub fn read<F: Fs>(fs: &F, job: &Path) -> Option<WorkingSet> {
        let file = fs.open(&job.join(NAME)).ok()?;
        WorkingSet::parse(&fs.read_all(&file, MOST).ok()?)
    }

    fn parse(bytes: &[u8]) -> Option<WorkingSet> {
        let rest = bytes.strip_prefix(&MAGIC)?;
        let (crc, payload) = rest.split_at_checked(4)?;
        if crc != crc32c::crc32c(payload).to_le_bytes() {
            return None;
        }
        let set: WorkingSet = codec::decode(payload).ok()?;
        let sound = |runs: &Runs| {
            let mut end = 0u64;
            runs.iter().all(|&(page, pages)| {
                let fits = page >= end && pages > 0;
                end = page.saturating_add(pages);
                fits && end < 1 << 52
            })
        };
        let all = set.lists().all(sound);
        all.then_some(set)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fs::RawFs;
    use super::super::fs::tests::TempDir;
    use super::*;

    #[test]
    fn written_and_read_and_damage_is_none() {
        let dir = TempDir::new("working");
        assert_eq!(WorkingSet::read(&RawFs, &dir.0), None);
        let mut set = WorkingSet {
            generation: 3,
            looks: vec![vec![(1, 2), (9, 1)], vec![(4, 1)]],
            around: vec![(20, 16)],
            touched: 3,
            written: 1,
        };
        set.write(&RawFs, &dir.0).unwrap();
        set.write(&RawFs, &dir.0).unwrap();
        assert_eq!(WorkingSet::read(&RawFs, &dir.0), Some(set.clone()));
        let file = RawFs.open(&dir.0.join(NAME)).unwrap();
        let bytes = RawFs.read_all(&file, MOST).unwrap();
        for at in 0..bytes.len() {
            let mut bad = bytes.clone();
            bad[at] ^= 1;
            assert_eq!(WorkingSet::parse(&bad), None);
            assert_eq!(WorkingSet::parse(&bytes[..at]), None);
        }
        set.looks[1] = vec![(5, 2), (6, 1)];
        set.write(&RawFs, &dir.0).unwrap();
        assert_eq!(WorkingSet::read(&RawFs, &dir.0), None);
    }

    #[test]
    fn many_runs_are_joined() {
        let runs: Runs = (0..100_000).map(|k| (k * 4, 1 + k % 2)).collect();
        let mut set = WorkingSet {
            looks: vec![runs.clone(), vec![(7, 1)]],
            around: runs,
            ..WorkingSet::default()
        };
        set.shorten();
        assert!(set.runs() <= MOST_RUNS);
        for runs in [&set.looks[0], &set.around] {
            assert!(runs.windows(2).all(|w| w[0].0 + w[0].1 < w[1].0));
            let last = runs.last().unwrap();
            assert_eq!((runs[0].0, last.0 + last.1), (0, 399_998));
        }
        assert_eq!(set.looks[1], [(7, 1)]);
    }
}
