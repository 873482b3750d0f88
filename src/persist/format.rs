//! A table's file as bytes: the header, the slots of rows, the records.
//!
//! ```text
//! 0       header page: what the table leads back to; changing words from 64 on
//! 4096    slots, 32 bytes each: what is known of a row's inode since
//! 69632   records: len u32, crc32c u32, payload, padding to 8; a len of 0 ends them
//! ```
//!
//! Version 2 has births of inodes (`persist::birth`) at the ends of records; version 1, without
//! them, is read.
//!
//! Pure code; numbers are little endian.

use super::table::{Kept, Moved, Name, Record, Xattrs};
use super::{Id, Identity, Stat};

/// Before the version's digit.
pub const MAGIC: [u8; 7] = *b"ckptabl";
const VERSION: u8 = b'2';
const OLDEST: u8 = b'1';
pub const HEADER: u64 = 4096;
pub const SLOTS: u32 = 2048;
pub const SLOT: u64 = 32;
/// Where the records begin.
pub const RECORDS: u64 = HEADER + SLOTS as u64 * SLOT;
/// A row without a slot.
pub const NO_SLOT: u32 = u32::MAX;

/// Offsets in the header.
pub const AT_SEQ: usize = 8;
pub const AT_FLAGS: usize = 12;
pub const AT_BASE: usize = 16;
pub const AT_CRC: usize = 24;
/// When the program ended, if it said so and nobody else was there to go on; 0: not known.
pub const AT_ENDED: usize = 40;
/// The name under which something is being made now ([`making`]); 0: none.
pub const AT_MAKING: usize = 48;
/// When an undo first looked for changes of somebody else (`AT_CHECKED`); 0: not known.
pub const AT_BEGUN: usize = 56;
pub const AT_ALIVE: usize = 64;
/// Records from this offset on are undone; 0: an undo has not begun.
pub const AT_UNDONE: usize = 72;
/// 1: an undo has looked for changes of somebody else.
pub const AT_CHECKED: usize = 80;
/// 0: complete; 1: some file's rows are missing; 2: the journal ends too early.
pub const AT_INCOMPLETE: usize = 84;
pub const AT_REASON_LEN: usize = 88;
pub const AT_REASON: usize = 96;
pub const REASON_LEN: usize = 1024;
pub const FLAG_POWER: u32 = 1;

/// Offsets in a slot.
pub const SLOT_HOT: u64 = 0;
/// 1: size and time below are valid.
pub const SLOT_KNOWN: u64 = 4;
pub const SLOT_SIZE: u64 = 8;
pub const SLOT_MTIME: u64 = 16;

pub const TAG_ABSENT: u8 = 1;
pub const TAG_GONE: u8 = 2;
pub const TAG_RENAMED: u8 = 3;
pub const TAG_REMOVED_DIR: u8 = 4;
pub const TAG_INODE: u8 = 5;
pub const TAG_PATH: u8 = 6;
pub const TAG_BLOCKS: u8 = 7;
pub const TAG_XATTR: u8 = 8;
pub const TAG_BORN: u8 = 9;
pub const TAG_INCOMPLETE: u8 = 10;
pub const TAG_CANCELLED: u8 = 11;
pub const TAG_RETURNED: u8 = 12;

pub const KEPT_LINK: u8 = 1;
pub const KEPT_COPY: u8 = 2;
pub const KEPT_SYMLINK: u8 = 3;
pub const KEPT_NODE: u8 = 4;

/// Of a file that begins as tables do: can this be read?
pub fn is_known(magic: &[u8]) -> bool {
    let version = magic.strip_prefix(&MAGIC).and_then(|rest| rest.first());
    version.is_some_and(|version| (OLDEST..=VERSION).contains(version))
}

/// Is it the table of a later version of this library?
pub fn is_newer(bytes: &[u8]) -> bool {
    bytes.starts_with(&MAGIC) && bytes.get(MAGIC.len()).is_some_and(|v| *v > VERSION)
}

/// A name in a directory as one word, never 0.
pub fn making(dir: &Id, name: &[u8]) -> u64 {
    let words = [dir.dev.to_le_bytes(), dir.ino.to_le_bytes()];
    let bytes = words.iter().flatten().chain(name);
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash | 1
}

/// The fixed part of the header.
pub fn header(seq: u32, base: u64, power: bool) -> [u8; 32] {
    let mut bytes = [0u8; 32];
    bytes[..7].copy_from_slice(&MAGIC);
    bytes[7] = VERSION;
    bytes[AT_SEQ..12].copy_from_slice(&seq.to_le_bytes());
    let flags = if power { FLAG_POWER } else { 0 };
    bytes[AT_FLAGS..16].copy_from_slice(&flags.to_le_bytes());
    bytes[AT_BASE..24].copy_from_slice(&base.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..AT_CRC]);
    bytes[AT_CRC..28].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Builds one payload. A failed growth is remembered and told by `bytes`.
#[derive(Debug, Default)]
pub struct Encoder {
    bytes: Vec<u8>,
    failed: bool,
}

impl Encoder {
    pub const fn new() -> Encoder {
        Encoder {
            bytes: Vec::new(),
            failed: false,
        }
    }

    pub fn begin(&mut self, tag: u8) -> &mut Encoder {
        self.bytes.clear();
        self.failed = false;
        self.raw(&[tag])
    }

    fn raw(&mut self, bytes: &[u8]) -> &mut Encoder {
        if self.bytes.try_reserve(bytes.len()).is_ok() {
            self.bytes.extend_from_slice(bytes);
        } else {
            self.failed = true;
        }
        self
    }

    pub fn u8(&mut self, v: u8) -> &mut Encoder {
        self.raw(&[v])
    }

    pub fn u32(&mut self, v: u32) -> &mut Encoder {
        self.raw(&v.to_le_bytes())
    }

    pub fn u64(&mut self, v: u64) -> &mut Encoder {
        self.raw(&v.to_le_bytes())
    }

    pub fn text(&mut self, v: &[u8]) -> &mut Encoder {
        self.u32(v.len() as u32).raw(v)
    }

    pub fn id(&mut self, id: &Id) -> &mut Encoder {
        self.u64(id.dev).u64(id.ino)
    }

    pub fn stat(&mut self, s: &Stat) -> &mut Encoder {
        self.id(&s.id)
            .u32(s.mode)
            .u32(s.nlink)
            .u32(s.uid)
            .u32(s.gid)
            .u64(s.size)
            .u64(s.atime_ns as u64)
            .u64(s.mtime_ns as u64)
            .u64(s.rdev)
    }

    pub fn name(&mut self, dir: &Id, dir_path: &[u8], name: &[u8]) -> &mut Encoder {
        self.id(dir).text(dir_path).text(name)
    }

    /// The payload; `None`: there was no memory for it.
    pub fn bytes(&self) -> Option<&[u8]> {
        (!self.failed).then_some(self.bytes.as_slice())
    }
}

/// Reads one payload.
pub struct Decoder<'a>(pub &'a [u8]);

impl<'a> Decoder<'a> {
    fn take(&mut self, n: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.0.split_at_checked(n)?;
        self.0 = rest;
        Some(head)
    }

    pub fn u8(&mut self) -> Option<u8> {
        self.take(1)?.first().copied()
    }

    pub fn u32(&mut self) -> Option<u32> {
        Some(u32::from_le_bytes(self.take(4)?.try_into().ok()?))
    }

    pub fn u64(&mut self) -> Option<u64> {
        Some(u64::from_le_bytes(self.take(8)?.try_into().ok()?))
    }

    pub fn text(&mut self) -> Option<Vec<u8>> {
        let len = self.u32()? as usize;
        self.take(len).map(<[u8]>::to_vec)
    }

    pub fn id(&mut self) -> Option<Id> {
        Some(Id {
            dev: self.u64()?,
            ino: self.u64()?,
        })
    }

    fn stat(&mut self) -> Option<Stat> {
        Some(Stat {
            id: self.id()?,
            birth: 0,
            mode: self.u32()?,
            nlink: self.u32()?,
            uid: self.u32()?,
            gid: self.u32()?,
            size: self.u64()?,
            atime_ns: self.u64()? as i64,
            mtime_ns: self.u64()? as i64,
            rdev: self.u64()?,
        })
    }

    fn name(&mut self) -> Option<Name> {
        Some(Name {
            dir: self.id()?,
            dir_path: self.text()?,
            name: self.text()?,
        })
    }

    /// At the end of a record: there since version 2.
    fn birth(&mut self) -> Option<u64> {
        if self.0.is_empty() {
            return Some(0);
        }
        self.u64()
    }

    fn xattrs(&mut self) -> Option<Xattrs> {
        let mut all = Vec::new();
        for _ in 0..self.u32()? {
            all.push((self.text()?, self.text()?));
        }
        Some(all)
    }
}

/// A record from its payload; `None`: it does not mean anything.
pub fn decode(payload: &[u8]) -> Option<Record> {
    let mut d = Decoder(payload);
    let record = match d.u8()? {
        TAG_ABSENT => Record::Absent { name: d.name()? },
        TAG_GONE => {
            let name = d.name()?;
            let mut stat = d.stat()?;
            let kind = d.u8()?;
            let text = d.text()?;
            let kept = match kind {
                KEPT_LINK => Kept::Link(text),
                KEPT_COPY => Kept::Copy(text),
                KEPT_SYMLINK => Kept::Symlink(text),
                KEPT_NODE => Kept::Node,
                _ => return None,
            };
            let xattrs = d.xattrs()?;
            stat.birth = d.birth()?;
            Record::Gone {
                name,
                stat,
                kept,
                xattrs,
            }
        }
        TAG_RENAMED => renamed(&mut d)?,
        TAG_REMOVED_DIR => {
            let (name, mut stat, xattrs) = (d.name()?, d.stat()?, d.xattrs()?);
            stat.birth = d.birth()?;
            Record::RemovedDir { name, stat, xattrs }
        }
        TAG_INODE => {
            let (row, slot, which) = (d.u32()?, d.u32()?, d.u32()?);
            let (mut stat, path) = (d.stat()?, d.text()?);
            stat.birth = d.birth()?;
            Record::Inode {
                row,
                slot,
                which,
                stat,
                path,
            }
        }
        TAG_PATH => Record::Path {
            row: d.u32()?,
            path: d.text()?,
        },
        TAG_BLOCKS => Record::Blocks {
            row: d.u32()?,
            offset: d.u64()?,
            len: d.u64()?,
            shadow: match d.u8()? {
                0 => None,
                _ => Some(d.u64()?),
            },
        },
        TAG_XATTR => Record::Xattr {
            row: d.u32()?,
            name: d.text()?,
            value: match d.u8()? {
                0 => None,
                _ => Some(d.text()?),
            },
        },
        TAG_BORN => Record::Born { id: d.id()? },
        TAG_INCOMPLETE => Record::Incomplete {
            path: d.text()?,
            reason: d.text()?,
        },
        TAG_CANCELLED => Record::Cancelled { from: d.u64()? },
        TAG_RETURNED => Record::Returned { made: d.u64()? },
        _ => return None,
    };
    d.0.is_empty().then_some(record)
}

fn renamed(d: &mut Decoder) -> Option<Record> {
    let (from, to, id) = (d.name()?, d.name()?, d.id()?);
    let other = match d.u8()? {
        0 => None,
        _ => Some(d.id()?),
    };
    let mut moved = |id: Id| -> Option<Moved> {
        let since = !d.0.is_empty();
        Some(Moved {
            inode: Identity {
                id,
                birth: d.birth()?,
            },
            born: if since { Some(d.u8()? != 0) } else { None },
        })
    };
    let moved_id = moved(id)?;
    let other = match other {
        Some(other) => Some(moved(other)?),
        None => None,
    };
    Some(Record::Renamed {
        from,
        to,
        moved: moved_id,
        other,
    })
}

/// The records in `bytes` (from [`RECORDS`] on) up to the first that is not whole,
/// with their offsets in the file, and where they end.
pub fn records(bytes: &[u8]) -> (Vec<(u64, Record)>, u64) {
    let mut all = Vec::new();
    let mut at = 0usize;
    let word = |at: usize| -> Option<u32> {
        let four = bytes.get(at..at + 4)?;
        Some(u32::from_le_bytes(four.try_into().ok()?))
    };
    while let (Some(len), Some(crc)) = (word(at), word(at + 4)) {
        let Some(payload) = bytes.get(at + 8..at + 8 + len as usize) else {
            break;
        };
        if len == 0 || crc32c::crc32c(payload) != crc {
            break;
        }
        let Some(record) = decode(payload) else { break };
        if let Record::Cancelled { from } = &record {
            cancel(&mut all, *from);
        }
        all.push((RECORDS + at as u64, record));
        at += record_len(len as usize);
    }
    (all, RECORDS + at as u64)
}

/// The operation whose records begin at `from` failed: names are what they were.
fn cancel(records: &mut [(u64, Record)], from: u64) {
    for (_, record) in records.iter_mut().rev().take_while(|(at, _)| *at >= from) {
        match record {
            Record::Gone { .. } | Record::RemovedDir { .. } | Record::Renamed { .. } => {
                *record = Record::Cancelled { from };
            }
            _ => {}
        }
    }
}

/// Is there a whole record somewhere in `rest`, which follows the end of the journal?
/// Then the end is damage: a kill leaves nothing behind the record it cut short.
pub fn records_follow(rest: &[u8]) -> bool {
    let word = |at: usize| {
        let four = rest.get(at..at + 4)?;
        Some(u32::from_le_bytes(four.try_into().ok()?))
    };
    // Mostly nothing but zeros that were allocated ahead, hundreds of KiB of them.
    let blank = |part: &&[u8]| part.iter().fold(0, |all, b| all | b) == 0;
    let unused: usize = rest.rchunks(1024).take_while(blank).map(<[u8]>::len).sum();
    let used = rest.len() - unused;
    (8..used).step_by(8).any(|at| {
        word(at)
            .zip(word(at + 4))
            .filter(|(len, _)| *len > 0)
            .and_then(|(len, crc)| Some((rest.get(at + 8..at + 8 + len as usize)?, crc)))
            .is_some_and(|(payload, crc)| {
                crc32c::crc32c(payload) == crc && decode(payload).is_some()
            })
    })
}

/// What a record with this payload takes in the file.
pub fn record_len(payload: usize) -> usize {
    (8 + payload).next_multiple_of(8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn births_are_at_the_ends_of_records_or_missing() {
        let id = |ino| Id { dev: 3, ino };
        let moved = |ino, birth, born| Moved {
            inode: Identity { id: id(ino), birth },
            born,
        };
        let mut e = Encoder::new();
        e.begin(TAG_RENAMED);
        e.name(&id(1), b"/a", b"b").name(&id(1), b"/a", b"c");
        e.id(&id(7)).u8(1).id(&id(8));
        let expect = |e: &Encoder, moves: [Moved; 2]| {
            let Some(Record::Renamed { moved, other, .. }) = decode(e.bytes().unwrap()) else {
                panic!("no record");
            };
            assert_eq!((moved, other), (moves[0], Some(moves[1])));
        };
        expect(&e, [moved(7, 0, None), moved(8, 0, None)]);
        e.u64(70).u8(1).u64(80).u8(0);
        expect(&e, [moved(7, 70, Some(true)), moved(8, 80, Some(false))]);
        let stat = Stat {
            id: id(9),
            ..Stat::default()
        };
        for birth in [None, Some(90)] {
            e.begin(TAG_INODE).u32(1).u32(2).u32(3);
            e.stat(&stat).text(b"/a");
            if let Some(birth) = birth {
                e.u64(birth);
            }
            let Some(Record::Inode { stat: read, .. }) = decode(e.bytes().unwrap()) else {
                panic!("no record");
            };
            let birth = birth.unwrap_or(0);
            assert_eq!(read, Stat { birth, ..stat });
        }
    }

    #[test]
    fn a_later_version_is_not_taken_for_none() {
        let new = header(1, 2, false);
        assert!(is_known(&new) && is_known(b"ckptabl1") && !is_newer(&new));
        assert!(is_newer(b"ckptabl3") && !is_known(b"ckptabl3"));
        assert!(!is_newer(b"ckptabl") && !is_newer(b"something") && !is_known(b"ckptabl0"));
    }

    fn frame(payload: &[u8]) -> Vec<u8> {
        let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
        bytes.extend(crc32c::crc32c(payload).to_le_bytes());
        bytes.extend(payload);
        bytes.resize(record_len(payload.len()), 0);
        bytes
    }

    #[test]
    fn records_end_at_the_first_that_is_not_whole() {
        let mut e = Encoder::new();
        let id = Id { dev: 3, ino: 9 };
        e.begin(TAG_BORN).id(&id);
        let mut bytes = frame(e.bytes().unwrap());
        let one = bytes.len();
        e.begin(TAG_ABSENT).name(&id, b"/a", b"b");
        bytes.extend(frame(e.bytes().unwrap()));
        let two = bytes.len();
        bytes.resize(two + 64, 0);
        let (all, end) = records(&bytes);
        assert_eq!(all.len(), 2);
        assert_eq!(end, RECORDS + two as u64);
        assert_eq!(all[0], (RECORDS, Record::Born { id }));
        for broken in one..two {
            let mut copy = bytes.clone();
            copy[broken] ^= 1;
            if copy[broken..two].iter().all(|b| *b == 0) || broken >= two - 4 {
                continue; // padding does not count
            }
            let (all, end) = records(&copy);
            assert!(all.len() == 1 && end == RECORDS + one as u64);
            assert!(!records_follow(&copy[one..]));
        }
        bytes[one - 20] ^= 1;
        assert!(records(&bytes).0.is_empty() && records_follow(&bytes));
    }
}
