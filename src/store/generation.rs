//! The record of one generation: what `ckpt list` shows without opening an image.
//!
//! It stands in the journal (which makes the generation count) and once more in
//! the generation's own directory, as `manifest`, so that a directory explains
//! itself when the journal is lost. Pure code but for the two file helpers.

use super::fs::Fs;
use super::{Context, StoreError};
use crate::image::codec::{self, CodecError};
use serde::{Deserialize, Serialize};
use std::path::Path;

/// One committed checkpoint of a job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationRecord {
    pub generation: u64,
    /// What the user names; 0 unless `ckpt_checkpoint` was given another.
    pub id: i32,
    /// The generation before it in the same life of the job.
    pub parent: Option<u64>,
    /// Wall clock at the stop, nanoseconds since 1970.
    pub time_ns: u64,
    pub host: String,
    pub boot_id: String,
    pub kind: GenerationKind,
    pub members: Vec<MemberRecord>,
    /// How long the program stood still.
    pub stop_us: u64,
    /// From the stop until the generation was durable.
    pub persist_us: u64,
    /// Memory that the generation stands for.
    pub bytes_logical: u64,
    /// Bytes in the store.
    pub bytes_stored: u64,
    pub pages_dirty: u64,
    pub tracker: String,
    pub snapshot: String,
    /// `clock`, `call`, `command`, `signal`.
    pub trigger: String,
    /// Encoded behind the rest, see [`GenerationRecord::encode`].
    #[serde(skip)]
    pub files: FilesRecord,
    /// Since its commit the increment has become complete. From a journal record of its
    /// own ([`super::journal::Record::Merged`]).
    #[serde(skip)]
    pub merged: Option<Merged>,
    /// Encoded as well.
    #[serde(skip)]
    pub phases: Phases,
}

/// The complete images that have taken the place of an increment's: `member-<index>.full`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Merged {
    pub generation: u64,
    pub time_ns: u64,
    /// By member.
    pub members: Vec<MergedMember>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MergedMember {
    pub bytes: u64,
    pub header_crc: u32,
}

/// How the stop is split, and what was done before it: microseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Phases {
    /// From the first signal until the last thread is parked.
    pub park_us: u64,
    /// Kernel state.
    pub collect_us: u64,
    /// Finding the dirty pages.
    pub scan_us: u64,
    /// Copy, fork or write, as `snapshot` says.
    pub copy_us: u64,
    pub release_us: u64,
    /// Before the stop, while the program ran.
    pub precopy_us: u64,
    /// Pages stored in that time, those stored again included.
    pub precopied_pages: u64,
    /// Pages that were left for the stop.
    pub residue_pages: u64,
}

/// The files' half of a generation as it was when the generation was committed.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct FilesRecord {
    /// Why modifications after this checkpoint are not recorded at all; what makes a
    /// table incomplete later stands in the table's header.
    pub incomplete: Option<String>,
    /// The sequence number of the table that begins here; 0 = none.
    pub table: u32,
    pub streams: Vec<StreamRecord>,
}

/// A regular file that the program was started with, open for writing: its contents are
/// kept by the store.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StreamRecord {
    /// `stream-<number>` in the job's directory.
    pub number: u64,
    /// The descriptors that lead to it.
    pub fds: Vec<i32>,
    pub dev: u64,
    pub ino: u64,
    /// Its size at the checkpoint.
    pub size: u64,
    /// As the descriptor names it.
    pub path: Vec<u8>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum GenerationKind {
    /// Complete by itself.
    #[default]
    Full,
    /// Needs its parent.
    Increment,
}

impl GenerationKind {
    pub fn name(self) -> &'static str {
        match self {
            GenerationKind::Full => "full",
            GenerationKind::Increment => "increment",
        }
    }
}

/// One process of the job; its image is `member-<index>.img`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct MemberRecord {
    /// As the program sees it.
    pub pid: i32,
    /// NUL-separated, as in /proc/self/cmdline.
    pub cmdline: Vec<u8>,
    pub threads: u32,
    /// Length of the image.
    pub bytes: u64,
    /// The image's own header checksum: an image of the same name from elsewhere is
    /// not this one.
    pub header_crc: u32,
}

/// `gen-000042`.
pub fn dir_name(generation: u64) -> String {
    format!("gen-{generation:06}")
}

/// `gen-000042.tmp`.
pub fn tmp_name(generation: u64) -> String {
    format!("gen-{generation:06}.tmp")
}

/// The number in a directory's name; `true` when it is a `.tmp`.
pub fn parse_dir_name(name: &[u8]) -> Option<(u64, bool)> {
    let rest = name.strip_prefix(b"gen-")?;
    let (digits, tmp) = match rest.strip_suffix(b".tmp") {
        Some(digits) => (digits, true),
        None => (rest, false),
    };
    if digits.len() < 6 || !digits.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = std::str::from_utf8(digits).ok()?.parse().ok()?;
    Some((number, tmp))
}

pub fn member_name(index: usize) -> String {
    format!("member-{index}.img")
}

/// The complete image that merging makes of an increment.
pub fn full_name(index: usize) -> String {
    format!("member-{index}.full")
}

/// While it is written.
pub fn full_tmp_name(index: usize) -> String {
    format!("member-{index}.full.tmp")
}

pub const MANIFEST_NAME: &str = "manifest";

/// The last byte is the version of the record.
const MANIFEST_MAGIC: [u8; 7] = *b"CKPTGEN";
/// Version 1 has no [`FilesRecord`], version 2 no [`Phases`].
pub const RECORD_VERSION: u16 = 3;
/// A record is a few hundred bytes plus command lines.
const MANIFEST_MOST: u64 = 16 << 20;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RecordError {
    #[error(transparent)]
    Io(#[from] StoreError),
    #[error("the generation's manifest is damaged")]
    Damaged,
    #[error("the generation's manifest is of version {0}, which this program does not know")]
    Version(u8),
    #[error("the generation's manifest: {0}")]
    Codec(#[from] CodecError),
}

impl GenerationRecord {
    /// The generation without which this one cannot be restored.
    pub fn needs(&self) -> Option<u64> {
        match (self.kind, &self.merged) {
            (GenerationKind::Increment, None) => self.parent,
            _ => None,
        }
    }

    /// What it is by now.
    pub fn kind_now(&self) -> GenerationKind {
        match self.merged {
            Some(_) => GenerationKind::Full,
            None => self.kind,
        }
    }

    /// Bytes in the store by now.
    pub fn stored_now(&self) -> u64 {
        match &self.merged {
            Some(merged) => merged.members.iter().map(|m| m.bytes).sum(),
            None => self.bytes_stored,
        }
    }

    /// Is that the header checksum of an image that this member had at any time?
    pub fn is_image(&self, member: usize, header_crc: u32) -> bool {
        let merged = self.merged.as_ref().and_then(|m| m.members.get(member));
        self.members
            .get(member)
            .is_some_and(|m| m.header_crc == header_crc)
            || merged.is_some_and(|m| m.header_crc == header_crc)
    }

    /// The payload of a record of [`RECORD_VERSION`].
    pub fn encode(&self) -> Result<Vec<u8>, CodecError> {
        codec::encode(&(self, &self.files, &self.phases))
    }

    /// Decodes the payload of a record; `None` for a version that is not known here.
    pub fn decode(payload: &[u8], version: u16) -> Option<Result<GenerationRecord, CodecError>> {
        match version {
            1 => Some(codec::decode(payload)),
            2 => {
                let both = codec::decode::<(GenerationRecord, FilesRecord)>(payload);
                Some(both.map(|(record, files)| GenerationRecord { files, ..record }))
            }
            RECORD_VERSION => {
                let all = codec::decode::<(GenerationRecord, FilesRecord, Phases)>(payload);
                Some(all.map(|(record, files, phases)| GenerationRecord {
                    files,
                    phases,
                    ..record
                }))
            }
            _ => None,
        }
    }

    /// The bytes of a `manifest` file: magic, crc32c, record.
    pub fn to_file(&self) -> Result<Vec<u8>, CodecError> {
        let payload = self.encode()?;
        let mut bytes = MANIFEST_MAGIC.to_vec();
        bytes.push(RECORD_VERSION as u8);
        bytes.extend_from_slice(&crc32c::crc32c(&payload).to_le_bytes());
        bytes.extend_from_slice(&payload);
        Ok(bytes)
    }

    pub fn from_file(bytes: &[u8]) -> Result<GenerationRecord, RecordError> {
        let (magic, rest) = bytes.split_at_checked(8).ok_or(RecordError::Damaged)?;
        let (crc, payload) = rest.split_at_checked(4).ok_or(RecordError::Damaged)?;
        let (magic, version) = magic.split_at(7);
        if magic != MANIFEST_MAGIC || crc != crc32c::crc32c(payload).to_le_bytes() {
            return Err(RecordError::Damaged);
        }
        let record = GenerationRecord::decode(payload, version[0] as u16);
        Ok(record.ok_or(RecordError::Version(version[0]))??)
    }

    /// Reads the `manifest` of a generation's directory.
    pub fn read<F: Fs>(fs: &F, dir: &Path) -> Result<GenerationRecord, RecordError> {
        let path = dir.join(MANIFEST_NAME);
        let file = fs.open(&path).on("open", &path)?;
        let bytes = fs.read_all(&file, MANIFEST_MOST).on("read", &path)?;
        GenerationRecord::from_file(&bytes)
    }
}

/// How many increments a generation consists of by now; `None` where one of them is missing.
pub fn chain_length(records: &[&GenerationRecord], generation: u64) -> Option<u32> {
    let mut at = generation;
    let mut length = 0;
    loop {
        let record = records.iter().find(|r| r.generation == at)?;
        match (record.kind_now(), record.needs()) {
            (GenerationKind::Full, _) => return Some(length),
            (GenerationKind::Increment, Some(parent)) if parent < at => at = parent,
            _ => return None,
        }
        length += 1;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        assert_eq!(dir_name(42), "gen-000042");
        assert_eq!(parse_dir_name(b"gen-000042"), Some((42, false)));
        assert_eq!(parse_dir_name(b"gen-1000042.tmp"), Some((1_000_042, true)));
        for wrong in ["gen-42", "gen-00004x", "gen-", "lock", "gen-000042.tmpx"] {
            assert_eq!(parse_dir_name(wrong.as_bytes()), None);
        }
    }

    #[test]
    fn older_versions_are_still_read() {
        let record = GenerationRecord {
            generation: 7,
            files: FilesRecord {
                table: 3,
                ..Default::default()
            },
            phases: Phases {
                park_us: 5,
                residue_pages: 6,
                ..Default::default()
            },
            ..Default::default()
        };
        let decode = |payload: &[u8], version| {
            let decoded = GenerationRecord::decode(payload, version);
            decoded.map(|record| record.unwrap())
        };
        let now = record.encode().unwrap();
        assert_eq!(decode(&now, RECORD_VERSION), Some(record.clone()));
        let second = codec::encode(&(&record, &record.files)).unwrap();
        let mut expected = record.clone();
        expected.phases = Phases::default();
        assert_eq!(decode(&second, 2), Some(expected.clone()));
        let first = codec::encode(&record).unwrap();
        expected.files = FilesRecord::default();
        assert_eq!(decode(&first, 1), Some(expected));
        assert_eq!(decode(&now, RECORD_VERSION + 1), None);
    }

    #[test]
    fn every_flipped_byte_of_a_record_is_noticed() {
        let record = GenerationRecord {
            generation: 42,
            host: "here".into(),
            members: vec![MemberRecord::default()],
            ..Default::default()
        };
        let good = record.to_file().unwrap();
        assert_eq!(GenerationRecord::from_file(&good).unwrap(), record);
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 1;
            assert!(GenerationRecord::from_file(&bad).is_err());
            assert!(GenerationRecord::from_file(&good[..at]).is_err());
        }
    }

    #[test]
    fn the_length_of_a_chain() {
        let record = |generation, parent, kind| GenerationRecord {
            generation,
            parent,
            kind,
            ..Default::default()
        };
        use GenerationKind::{Full, Increment};
        let all = [
            record(3, None, Full),
            record(4, Some(3), Increment),
            record(6, Some(4), Increment),
            record(7, Some(6), Full),
            record(8, Some(5), Increment),
            record(9, Some(9), Increment),
        ];
        let all: Vec<_> = all.iter().collect();
        let lengths: Vec<_> = (3..=10).map(|g| chain_length(&all, g)).collect();
        assert_eq!(
            lengths,
            [Some(0), Some(1), None, Some(2), Some(0), None, None, None]
        );
    }
}
