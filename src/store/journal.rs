//! The job's journal: append-only, the authority on which generations are committed.
//!
//! A file of records, each: magic `CKJR`, kind u16, version u16, length u32, crc32c of
//! the eight bytes before it and of the payload, the payload (bincode), zeroes up to a
//! multiple of 8. Records begin at multiples of 8, so that a reader finds the next
//! one behind damage. What follows the last whole record (a torn tail) is ignored,
//! and cut off by the next append.
//!
//! Written by the holder of the job's lock only; read by anyone.

use super::fs::Fs;
use super::generation::{GenerationRecord, Merged, RECORD_VERSION};
use super::{Context, StoreError};
use crate::errno::Errno;
use crate::image::codec::{self, CodecError};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::path::Path;

const NAME: &str = "journal";
const TMP_NAME: &str = "journal.tmp";
const MAGIC: [u8; 4] = *b"CKJR";
const HEAD: usize = 16;
const VERSION: u16 = 1;
/// A journal is rewritten long before it gets this long.
const MOST: u64 = 64 << 20;
/// Dead records that are worth a rewrite.
const REWRITE_AT: usize = 256;

/// What happened to a job.
#[expect(clippy::large_enum_variant, reason = "most are of the largest kind")]
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    /// The generation is committed: from here on it is the latest.
    Committed(GenerationRecord),
    /// The generation was removed, or is about to be.
    Removed(Removed),
    /// A checkpoint was refused or failed.
    Refused(Refused),
    /// An increment is complete from here on.
    Merged(Merged),
    /// The state went back to a generation: it is the latest from here on.
    Returned(Returned),
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Returned {
    pub to: u64,
    /// The generation of the state that was left, where that was kept (`CKPT_UNDO`).
    pub left: Option<u64>,
    pub time_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    pub generation: u64,
    pub time_ns: u64,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refused {
    pub reason: String,
    pub time_ns: u64,
}

const COMMITTED: u16 = 1;
const REMOVED: u16 = 2;
const REFUSED: u16 = 3;
const MERGED: u16 = 4;
const RETURNED: u16 = 5;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum JournalError {
    #[error(transparent)]
    Io(#[from] StoreError),
    #[error("encode a journal record: {0}")]
    Codec(#[from] CodecError),
}

/// A journal as it was read, and as appended to since.
#[derive(Debug, Clone, Default)]
pub struct Journal {
    records: Vec<Record>,
    /// Where the next record goes.
    end: u64,
    /// Bytes that are no record lie before `end` or behind it.
    damaged: bool,
    /// An append failed half-way: the file must be written anew before the next.
    spoilt: bool,
}

impl Journal {
    /// Reads the journal of the job in `dir`; no file is an empty journal.
    pub fn read<F: Fs>(fs: &F, dir: &Path) -> Result<Journal, JournalError> {
        let path = dir.join(NAME);
        let file = match fs.open(&path) {
            Err(Errno::ENOENT) => return Ok(Journal::default()),
            other => other.on("open", &path)?,
        };
        let bytes = fs.read_all(&file, MOST).on("read", &path)?;
        Ok(Journal::parse(&bytes))
    }

    /// Decodes a journal file; never fails, damage is noted.
    pub fn parse(bytes: &[u8]) -> Journal {
        let mut journal = Journal::default();
        let mut at = 0;
        while at < bytes.len() {
            match parse_record(&bytes[at..]) {
                Some((record, len)) => {
                    record.into_iter().for_each(|record| journal.add(record));
                    at += len;
                    journal.end = at as u64;
                }
                None => {
                    journal.damaged = true;
                    at += 8;
                }
            }
        }
        journal
    }

    fn add(&mut self, record: Record) {
        if let Record::Merged(merged) = &record {
            let committed = self.records.iter_mut().rev().find_map(|r| match r {
                Record::Committed(g) if g.generation == merged.generation => Some(g),
                _ => None,
            });
            if let Some(generation) = committed {
                generation.merged = Some(merged.clone());
            }
        }
        self.records.push(record);
    }

    pub fn records(&self) -> &[Record] {
        &self.records
    }

    /// Some of the file could not be read: a committed generation may be missing.
    pub fn is_damaged(&self) -> bool {
        self.damaged
    }

    /// Committed and not removed, ascending.
    pub fn generations(&self) -> Vec<&GenerationRecord> {
        let mut live: BTreeMap<u64, &GenerationRecord> = BTreeMap::new();
        for record in &self.records {
            match record {
                Record::Committed(new) => {
                    live.insert(new.generation, new);
                }
                Record::Removed(gone) => {
                    live.remove(&gone.generation);
                }
                Record::Refused(_) | Record::Merged(_) | Record::Returned(_) => {}
            }
        }
        live.into_values().collect()
    }

    /// One of them.
    pub fn generation(&self, number: u64) -> Option<&GenerationRecord> {
        let about = self.records.iter().rev().find_map(|record| match record {
            Record::Committed(g) if g.generation == number => Some(Some(g)),
            Record::Removed(gone) if gone.generation == number => Some(None),
            _ => None,
        });
        about.flatten()
    }

    /// The same in the order in which the state came to them: the latest is the last. Where
    /// nobody went back but over what was dropped, it is the order of numbers.
    pub fn order(&self) -> Vec<&GenerationRecord> {
        let mut order = self.generations();
        let mut places = BTreeMap::new();
        for (place, record) in self.records.iter().enumerate() {
            match record {
                Record::Committed(g) => places.insert(g.generation, place),
                Record::Returned(r) => places.insert(r.to, place),
                _ => None,
            };
        }
        order.sort_by_key(|g| places.get(&g.generation));
        order
    }

    /// The generations of states that were left by going back, the newest last.
    pub fn left(&self) -> Vec<u64> {
        let live = self.generations();
        let returned = self.records.iter().filter_map(|record| match record {
            Record::Returned(returned) => returned.left,
            _ => None,
        });
        let returned = returned.filter(|left| live.iter().any(|g| g.generation == *left));
        returned.collect()
    }

    /// The highest generation number ever recorded.
    pub fn highest(&self) -> u64 {
        let number = |record: &Record| match record {
            Record::Committed(g) => g.generation,
            Record::Removed(r) => r.generation,
            Record::Refused(_) | Record::Merged(_) | Record::Returned(_) => 0,
        };
        self.records.iter().map(number).max().unwrap_or(0)
    }

    /// Why there is no newer generation than the latest, if that was ever noted.
    pub fn last_refusal(&self) -> Option<&Refused> {
        let last = self
            .records
            .iter()
            .rfind(|record| matches!(record, Record::Refused(_) | Record::Committed(_)));
        match last {
            Some(Record::Refused(refused)) => Some(refused),
            _ => None,
        }
    }

    /// Appends a record; with `sync` it is durable when this returns `Ok`. After an
    /// error the record does not count: it is cut off again, or, where even that
    /// fails, the next append writes the whole file anew.
    pub fn append<F: Fs>(
        &mut self,
        fs: &F,
        dir: &Path,
        record: Record,
        sync: bool,
    ) -> Result<(), JournalError> {
        let bytes = encode_record(&record)?;
        if self.spoilt || self.dead_records() > REWRITE_AT {
            self.rewrite(fs, dir)?;
        }
        let path = dir.join(NAME);
        let (file, created) = fs.open_or_create(&path).on("open", &path)?;
        let written = (|| {
            if !created && fs.len(&file).on("read", &path)? != self.end {
                // A torn tail of an earlier life.
                fs.truncate(&file, self.end).on("truncate", &path)?;
            }
            fs.write_all(&file, &bytes, self.end).on("write", &path)?;
            if sync {
                fs.sync_data(&file).on("sync", &path)?;
            }
            if sync && created {
                fs.sync_dir(dir).on("sync", dir)?;
            }
            Ok::<(), StoreError>(())
        })();
        if let Err(error) = written {
            let undone = fs
                .truncate(&file, self.end)
                .and_then(|()| fs.sync_data(&file));
            self.spoilt = undone.is_err();
            return Err(error.into());
        }
        self.end += bytes.len() as u64;
        self.add(record);
        Ok(())
    }

    fn dead_records(&self) -> usize {
        let live = self.records.iter().enumerate();
        let live = live.filter(|(at, _)| self.is_live_return(*at)).count();
        self.records.len() - self.generations().len() - live
    }

    /// Is that the record of a return that still says something? The last one says which
    /// generation is the latest, others which states were left.
    fn is_live_return(&self, at: usize) -> bool {
        let is_return = |record: &Record| matches!(record, Record::Returned(_));
        let Some(Record::Returned(returned)) = self.records.get(at) else {
            return false;
        };
        let left = returned
            .left
            .is_some_and(|left| self.left().contains(&left));
        left || self.records.iter().rposition(is_return) == Some(at)
    }

    /// Writes the live records to a new file and puts it in the journal's place.
    fn rewrite<F: Fs>(&mut self, fs: &F, dir: &Path) -> Result<(), JournalError> {
        let highest = self.highest();
        let mut kept: Vec<Record> = Vec::new();
        let live = self.generations();
        for (at, record) in self.records.iter().enumerate() {
            match record {
                Record::Committed(new) => {
                    if let Some(generation) = live.iter().find(|g| g.generation == new.generation) {
                        kept.push(Record::Committed((*generation).clone()));
                        kept.extend(generation.merged.clone().map(Record::Merged));
                    }
                }
                Record::Returned(_) if self.is_live_return(at) => kept.push(record.clone()),
                _ => {}
            }
        }
        // Numbers are never used twice: keep the highest one even if it is gone.
        if !kept
            .iter()
            .any(|r| matches!(r, Record::Committed(g) if g.generation == highest))
            && highest > 0
        {
            let gone = Removed {
                generation: highest,
                time_ns: 0,
            };
            kept.push(Record::Removed(gone));
        }
        kept.extend(self.last_refusal().cloned().map(Record::Refused));

        let mut bytes = Vec::new();
        for record in &kept {
            bytes.extend_from_slice(&encode_record(record)?);
        }
        let (tmp, path) = (dir.join(TMP_NAME), dir.join(NAME));
        match fs.unlink(&tmp) {
            Err(Errno::ENOENT) | Ok(()) => {}
            Err(errno) => Err(errno).on("remove", &tmp)?,
        }
        let file = fs.create_new(&tmp).on("create", &tmp)?;
        fs.write_all(&file, &bytes, 0).on("write", &tmp)?;
        fs.sync_data(&file).on("sync", &tmp)?;
        fs.rename(&tmp, &path).on("rename", &tmp)?;
        // From here on the new file is the journal, whatever becomes of the sync.
        self.records = kept;
        self.end = bytes.len() as u64;
        self.damaged = false;
        self.spoilt = false;
        fs.sync_dir(dir).on("sync", dir)?;
        Ok(())
    }
}

fn encode_record(record: &Record) -> Result<Vec<u8>, CodecError> {
    let (kind, payload) = match record {
        Record::Committed(g) => (COMMITTED, g.encode()?),
        Record::Removed(r) => (REMOVED, codec::encode(r)?),
        Record::Refused(r) => (REFUSED, codec::encode(r)?),
        Record::Merged(m) => (MERGED, codec::encode(m)?),
        Record::Returned(r) => (RETURNED, codec::encode(r)?),
    };
    let mut bytes = Vec::with_capacity(HEAD + payload.len() + 8);
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(&kind.to_le_bytes());
    let version = if kind == COMMITTED {
        RECORD_VERSION
    } else {
        VERSION
    };
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    let crc = crc32c::crc32c_append(crc32c::crc32c(&bytes[4..12]), &payload);
    bytes.extend_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&payload);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    Ok(bytes)
}

/// The record at the start of `bytes` and its length there; `None` inside for an
/// intact record of a kind or version that this program does not know.
fn parse_record(bytes: &[u8]) -> Option<(Option<Record>, usize)> {
    let head = bytes.first_chunk::<HEAD>()?;
    if head[..4] != MAGIC {
        return None;
    }
    let len = u32::from_le_bytes([head[8], head[9], head[10], head[11]]) as usize;
    let payload = bytes.get(HEAD..HEAD.checked_add(len)?)?;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&head[4..12]), payload);
    if head[12..] != crc.to_le_bytes() {
        return None;
    }
    let whole = (HEAD + len).next_multiple_of(8);
    if bytes.get(HEAD + len..whole)?.iter().any(|&b| b != 0) {
        return None;
    }
    let kind = u16::from_le_bytes([head[4], head[5]]);
    let version = u16::from_le_bytes([head[6], head[7]]);
    let record = match (kind, version) {
        (COMMITTED, version) => match GenerationRecord::decode(payload, version) {
            Some(record) => Some(Record::Committed(record.ok()?)),
            None => None,
        },
        (REMOVED, VERSION) => Some(Record::Removed(codec::decode(payload).ok()?)),
        (REFUSED, VERSION) => Some(Record::Refused(codec::decode(payload).ok()?)),
        (MERGED, VERSION) => Some(Record::Merged(codec::decode(payload).ok()?)),
        (RETURNED, VERSION) => Some(Record::Returned(codec::decode(payload).ok()?)),
        _ => None,
    };
    Some((record, whole))
}

#[cfg(test)]
mod tests;
