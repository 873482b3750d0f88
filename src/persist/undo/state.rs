//! Which inodes were made anew: remembered on the disk, so that an undo can be killed at any
//! point and started again.
//!
//! `identities` stays for the life of the job: an image that is older than a recovery
//! still has the old numbers. `replaced` is what there was before inodes had births.

use super::{UndoError, failed};
use crate::persist::format::Encoder;
use crate::persist::sys;
use crate::persist::table::c_path;
use crate::persist::{Id, Identity};
use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Inodes that were made anew, each with the table whose undo made it.
///
/// Numbers are used again. Births tell which inode is meant; where there are none (an image
/// knows numbers only, and some file systems have no births), a number means something only
/// together with a table: what a record of table T calls N was first made anew by the undo of
/// the first table from T on that says so, and a chain goes on only with what was made later,
/// by the undo of a newer table.
#[derive(Debug, Default)]
pub struct Replaced {
    path: PathBuf,
    bases: PathBuf,
    /// By old number and table, in the order in which they were noted.
    map: BTreeMap<Id, BTreeMap<u64, Vec<Note>>>,
    entries: usize,
    /// The newest table whose undo has made an inode of this number anew.
    made: BTreeMap<Id, u64>,
    /// The first table after each generation that was gone back to.
    first: BTreeMap<u64, u64>,
    /// The table that is being undone.
    pub table: u64,
}

/// One inode made anew.
#[derive(Debug, Clone, Copy)]
struct Note {
    /// How many entries there were before.
    at: usize,
    old: Identity,
    new: Identity,
}

/// An entry as it is on the disk.
#[derive(Debug, Clone, Copy)]
struct Entry {
    old: Identity,
    new: Identity,
    table: u64,
}

/// Old and new identity, the table's number.
const ENTRY: usize = 56;
/// The same without births.
const OLD_ENTRY: usize = 40;

impl Entry {
    fn read(bytes: &[u8]) -> Entry {
        let births = bytes.len() == ENTRY;
        let identity = |at: usize| Identity {
            id: Id {
                dev: u64_at(bytes, at),
                ino: u64_at(bytes, at + 8),
            },
            birth: if births { u64_at(bytes, at + 16) } else { 0 },
        };
        let second = if births { 24 } else { 16 };
        Entry {
            old: identity(0),
            new: identity(second),
            table: u64_at(bytes, bytes.len().saturating_sub(8)),
        }
    }

    fn encode(&self) -> Encoder {
        let mut e = Encoder::new();
        e.id(&self.old.id).u64(self.old.birth);
        e.id(&self.new.id).u64(self.new.birth).u64(self.table);
        e
    }
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(eight.unwrap_or_default())
}

pub fn read_file(path: &Path) -> Result<Vec<u8>, UndoError> {
    let read = || {
        let fd = sys::open(&c_path(path)?, libc::O_RDONLY, 0)?;
        let len = sys::fstat(fd.0)?.size as usize;
        let mut bytes = vec![0u8; len];
        let got = sys::pread_all(fd.0, bytes.as_mut_ptr(), len, 0)?;
        bytes.truncate(got);
        Ok(bytes)
    };
    match read() {
        Err(libc::ENOENT) => Ok(Vec::new()),
        other => other.map_err(|e| failed("read", path, e)),
    }
}

/// Appends an entry; a torn one of a kill is overwritten.
fn append(path: &Path, entry: &Encoder) -> Result<(), UndoError> {
    let write = || {
        let bytes = entry.bytes().ok_or(libc::ENOMEM)?;
        let flags = libc::O_WRONLY | libc::O_CREAT;
        let fd = sys::open(&c_path(path)?, flags, 0o600)?;
        let end = sys::fstat(fd.0)?.size;
        sys::pwrite_all(fd.0, bytes, end - end % bytes.len() as u64)
    };
    write().map_err(|e| failed("write", path, e))
}

/// Instead of an old number's device: no inode, but a note that of the notes since (the
/// "number") those that tables below this one have made do not hold any more.
const VOID: u64 = u64::MAX;

/// Which entries do not hold any more. A later note decides on an earlier one of its kind.
fn voided(entries: &[Entry]) -> Vec<bool> {
    let mut void = vec![false; entries.len()];
    for (at, entry) in entries.iter().enumerate().rev() {
        if void[at] || entry.old.id.dev != VOID {
            continue;
        }
        for earlier in entry.old.id.ino as usize..at {
            void[earlier] |= entries[earlier].table < entry.table;
        }
    }
    void
}

impl Replaced {
    pub fn load(job_dir: &Path) -> Result<Replaced, UndoError> {
        let mut all = Replaced {
            path: job_dir.join("identities"),
            bases: job_dir.join("replaced-from"),
            ..Replaced::default()
        };
        let older = read_file(&job_dir.join("replaced"))?;
        let bytes = read_file(&all.path)?;
        let older = older.chunks_exact(OLD_ENTRY);
        let entries: Vec<Entry> = older
            .chain(bytes.chunks_exact(ENTRY))
            .map(Entry::read)
            .collect();
        for (at, void) in voided(&entries).into_iter().enumerate() {
            if !void && entries[at].old.id.dev != VOID {
                all.know(at, &entries[at]);
            }
        }
        all.entries = entries.len();
        for entry in read_file(&all.bases)?.chunks_exact(16) {
            let (generation, table) = (u64_at(entry, 0), u64_at(entry, 8));
            all.first.entry(generation).or_insert(table);
        }
        Ok(all)
    }

    /// Notes which table was the first after a generation; the first time counts.
    pub fn note_base(&mut self, generation: u64, table: u32) -> Result<(), UndoError> {
        if !self.first.contains_key(&generation) {
            let mut e = Encoder::new();
            e.u64(generation).u64(u64::from(table));
            append(&self.bases, &e)?;
            self.first.insert(generation, u64::from(table));
        }
        Ok(())
    }

    /// Notes, on the disk first, that `old` of the table being undone is about to be
    /// `new`.
    pub fn note(&mut self, old: Identity, new: Identity) -> Result<(), UndoError> {
        let table = self.table;
        let entry = Entry { old, new, table };
        append(&self.path, &entry.encode())?;
        self.know(self.entries, &entry);
        self.entries += 1;
        Ok(())
    }

    fn know(&mut self, at: usize, entry: &Entry) {
        let Entry { old, new, table } = *entry;
        let of_number = self.map.entry(old.id).or_default();
        of_number
            .entry(table)
            .or_default()
            .push(Note { at, old, new });
        let newest = self.made.entry(new.id).or_default();
        *newest = table.max(*newest);
    }

    /// The highest table that a note is of.
    pub fn highest(&self) -> u64 {
        let tables = self
            .map
            .values()
            .filter_map(|of_id| of_id.keys().next_back());
        tables.copied().max().unwrap_or(0)
    }

    /// How many notes there are.
    pub fn notes(&self) -> u64 {
        self.entries as u64
    }

    /// The recorded return of the table being undone is undone: what it noted when there
    /// were `made` notes, and later, was made by undoing older tables, which are to be
    /// undone again. What the undo of newer tables has noted since still holds.
    pub fn void_since(&mut self, job_dir: &Path, made: u64) -> Result<(), UndoError> {
        let table = self.table;
        let mut void = Entry {
            old: Identity::default(),
            new: Identity::default(),
            table,
        };
        void.old.id = Id {
            dev: VOID,
            ino: made,
        };
        append(&self.path, &void.encode())?;
        *self = Replaced::load(job_dir)?;
        self.table = table;
        Ok(())
    }

    /// What the undo of that table, or of the first one after it that did, made of an inode.
    fn first_note(&self, inode: &Identity, from: u64, after: Option<usize>) -> Option<(u64, Note)> {
        let mut later = self.map.get(&inode.id)?.range(from..);
        let fits = |note: &&Note| note.old.is(inode) && after.is_none_or(|after| note.at > after);
        later.find_map(|(table, notes)| Some((*table, *notes.iter().rev().find(fits)?)))
    }

    /// What an inode of that table is now.
    pub fn follow(&self, inode: &Identity, table: u64) -> Identity {
        self.follow_on(*inode, table, None)
    }

    fn follow_on(&self, mut now: Identity, mut from: u64, mut after: Option<usize>) -> Identity {
        while let Some((table, note)) = self.first_note(&now, from, after) {
            (now, from, after) = (note.new, table + 1, Some(note.at));
        }
        now
    }

    /// What an inode of the table being undone is now.
    pub fn resolve(&self, inode: &Identity) -> Identity {
        self.follow(inode, self.table)
    }

    /// Has the undo of one of these tables made an inode of the table being undone anew? Then
    /// these are tables that a recorded return went back over.
    pub fn is_made_by(&self, inode: &Identity, tables: &BTreeSet<u64>) -> bool {
        let (mut now, mut from, mut after) = (*inode, self.table, None);
        while let Some((table, note)) = self.first_note(&now, from, after) {
            if tables.contains(&table) {
                return true;
            }
            (now, from, after) = (note.new, table + 1, Some(note.at));
        }
        false
    }

    /// What an inode without a known birth is now whose number was given to another one later in
    /// the table being undone: only this table's undo has made it anew. (What newer tables call by
    /// its number is the other one.)
    pub fn remade(&self, id: &Id) -> Option<Identity> {
        let note = self.map.get(id)?.get(&self.table)?.last()?;
        Some(self.follow_on(note.new, self.table + 1, Some(note.at)))
    }

    /// Is `present` the inode that was `wanted`?
    pub fn is(&self, present: &Identity, wanted: &Identity) -> bool {
        let now = self.resolve(wanted);
        if !now.is(present) {
            return false;
        }
        // What was made anew had gone: its old number may be another inode's. One that was
        // made anew since is not one whose number was never noted.
        let noted = || self.first_note(wanted, self.table, None).is_some();
        let other = || {
            let made = self.made.get(&present.id);
            made.is_some_and(|made| *made >= self.table)
        };
        now.birth != 0 && present.birth != 0 || noted() || !other()
    }

    /// For an image of this generation: what its inodes are now.
    pub fn all(&self, generation: u64) -> BTreeMap<Id, Id> {
        let Some(first) = self.first.get(&generation) else {
            return BTreeMap::new();
        };
        let now = |id: &Id| {
            let inode = Identity { id: *id, birth: 0 };
            (*id, self.follow(&inode, *first).id)
        };
        // One that has got its old number again is another file all the same.
        self.map.keys().map(now).collect()
    }

    /// All that was ever made anew.
    pub fn news(&self) -> BTreeSet<Id> {
        let notes = self.map.values().flat_map(BTreeMap::values).flatten();
        notes.map(|note| note.new.id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inode(ino: u64, birth: u64) -> Identity {
        let id = Id { dev: 1, ino };
        Identity { id, birth }
    }

    /// A job's directory with notes that a version without births has left.
    fn job(name: &str, older: &[[u64; 3]]) -> PathBuf {
        let dir = std::env::temp_dir().join(format!("ckpt-notes-{name}-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&dir);
        std::fs::create_dir(&dir).unwrap();
        let words = older
            .iter()
            .flat_map(|[old, new, table]| [1, *old, 1, *new, *table]);
        let bytes: Vec<u8> = words.flat_map(u64::to_le_bytes).collect();
        std::fs::write(dir.join("replaced"), bytes).unwrap();
        dir
    }

    #[test]
    fn two_inodes_of_one_number_are_told_apart() {
        let dir = job("two", &[]);
        let mut notes = Replaced::load(&dir).unwrap();
        notes.table = 5;
        // A directory that had the number of a file, then the file.
        notes.note(inode(10, 2), inode(11, 3)).unwrap();
        notes.note(inode(10, 1), inode(10, 4)).unwrap();
        for notes in [
            &notes,
            &Replaced {
                table: 5,
                ..Replaced::load(&dir).unwrap()
            },
        ] {
            assert_eq!(notes.resolve(&inode(10, 1)), inode(10, 4));
            assert_eq!(notes.resolve(&inode(10, 2)), inode(11, 3));
            assert!(notes.is(&inode(11, 3), &inode(10, 2)));
            assert!(!notes.is(&inode(11, 3), &inode(10, 1)));
            assert!(!notes.is(&inode(10, 4), &inode(10, 2)));
            // An image knows the number only: the file, which was made anew last.
            assert_eq!(notes.follow(&inode(10, 0), 5), inode(10, 4));
        }
        std::fs::remove_dir_all(&dir).unwrap();
    }

    #[test]
    fn notes_without_births_still_count() {
        let dir = job("older", &[[20, 21, 3], [21, 22, 4]]);
        let mut notes = Replaced::load(&dir).unwrap();
        assert_eq!((notes.notes(), notes.highest()), (2, 4));
        notes.table = 6;
        notes.note(inode(22, 9), inode(23, 10)).unwrap();
        notes.table = 2;
        assert_eq!(notes.resolve(&inode(20, 0)), inode(23, 10));
        // A later note makes void what was noted from the second on, of tables below 6.
        notes.table = 6;
        notes.void_since(&dir, 1).unwrap();
        notes.table = 2;
        assert_eq!(notes.resolve(&inode(20, 0)), inode(21, 0));
        assert_eq!(notes.resolve(&inode(22, 9)), inode(23, 10));
        std::fs::remove_dir_all(&dir).unwrap();
    }
}
