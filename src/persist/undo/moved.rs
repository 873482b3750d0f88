//! Inodes that the program has moved and that no row is about: are they where it left them?
//!
//! A move by itself changes nothing of a file, so there may be no row of it that `foreign` could
//! judge. One that somebody else has removed since would be missed half way through the undo.
//! Pure code but for the look at the end; called before anything is undone.

use super::apply::Undoer;
use super::lost::under;
use crate::persist::sys::CPath;
use crate::persist::table::{Moved, Record, Table};
use crate::persist::{Id, Identity};
use std::collections::{BTreeMap, BTreeSet};

/// Longest list of former names that is kept.
const SEEN: usize = 16;

/// An inode that is not where it was moved to.
#[derive(Debug)]
pub struct Missing {
    pub path: Vec<u8>,
    /// As that table calls it.
    pub inode: Identity,
    pub table: u64,
    /// It was made after the generation.
    pub is_born: bool,
}

#[derive(Debug)]
struct Entry {
    inode: Identity,
    table: u64,
    is_born: bool,
    /// Names that it had before: a call may have failed, or not have been made any more.
    seen: Vec<Vec<u8>>,
}

/// What was moved, by its present path.
#[derive(Debug, Default)]
struct Moves {
    at: BTreeMap<Vec<u8>, Entry>,
}

impl Moves {
    /// All that is at this path or below it.
    fn take(&mut self, path: &[u8]) -> Vec<(Vec<u8>, Entry)> {
        let below = [path, b"/"].concat();
        let range = self.at.range(below.clone()..);
        let inner = range.take_while(|(at, _)| at.starts_with(&below));
        let mut names: Vec<Vec<u8>> = inner.map(|(at, _)| at.clone()).collect();
        names.push(path.to_vec());
        let taken = names.into_iter();
        taken
            .filter_map(|at| self.at.remove(&at).map(|entry| (at, entry)))
            .collect()
    }

    fn shift(&mut self, taken: Vec<(Vec<u8>, Entry)>, from: &[u8], to: &[u8]) {
        for (at, mut entry) in taken {
            let Some(now) = under(&at, from, to) else {
                continue;
            };
            if entry.seen.len() == SEEN {
                entry.seen.remove(0);
            }
            entry.seen.push(at);
            self.at.insert(now, entry);
        }
    }
}

impl Undoer<'_, '_> {
    /// Those that are not there, nor anywhere that the undo would find them. `judged`: what they
    /// are now, of those that have been looked for already.
    pub fn missing_moved(
        &mut self,
        tables: &[Table],
        judged: &BTreeSet<Identity>,
        undone: &BTreeSet<u64>,
    ) -> Vec<Missing> {
        let mut moves = Moves::default();
        // What the inodes are now that were made in the tables so far.
        let mut born: BTreeSet<Id> = BTreeSet::new();
        for table in tables.iter().rev() {
            let number = u64::from(table.file.seq);
            let made_here = made_in(table);
            for (_, record) in &table.records {
                match record {
                    Record::Gone { name, .. } | Record::RemovedDir { name, .. } => {
                        moves.at.remove(&name.path());
                    }
                    Record::Renamed {
                        from,
                        to,
                        moved,
                        other,
                    } => {
                        let (from, to) = (from.path(), to.path());
                        let there = moves.take(&from);
                        let here = match other {
                            Some(_) => moves.take(&to),
                            None => Vec::new(),
                        };
                        moves.shift(there, &from, &to);
                        moves.shift(here, &to, &from);
                        let names = [(Some(moved), &to, &from), (other.as_ref(), &from, &to)];
                        for (moved, now, before) in names {
                            let Some(moved) = moved.filter(|m| !is_made(m, &made_here)) else {
                                continue;
                            };
                            let followed = self.replaced.follow(&moved.inode, number);
                            let entry = Entry {
                                inode: moved.inode,
                                table: number,
                                is_born: born.contains(&followed.id),
                                seen: vec![before.clone()],
                            };
                            let known = moves.at.get(now).is_some_and(|known| {
                                let known = self.replaced.follow(&known.inode, known.table);
                                known.is(&followed)
                            });
                            if !known {
                                moves.at.insert(now.clone(), entry);
                            }
                        }
                    }
                    _ => {}
                }
            }
            born.extend(made_here.iter().map(|id| {
                let inode = Identity { id: *id, birth: 0 };
                self.replaced.follow(&inode, number).id
            }));
        }
        let missing = moves.at.into_iter();
        missing
            .filter_map(|(path, entry)| self.is_missing(path, entry, judged, undone))
            .collect()
    }

    fn is_missing(
        &mut self,
        path: Vec<u8>,
        entry: Entry,
        judged: &BTreeSet<Identity>,
        undone: &BTreeSet<u64>,
    ) -> Option<Missing> {
        self.replaced.table = entry.table;
        let now = self.replaced.resolve(&entry.inode);
        let is_here = |path: &Vec<u8>| {
            match CPath::new(&[path]).and_then(|at| self.lstat(&at)) {
                Ok(there) => there.identity().is(&now),
                // In a directory that the program has closed; the undo opens it first.
                Err(errno) => errno == libc::EACCES,
            }
        };
        let names = || std::iter::once(&path).chain(&entry.seen);
        let found = judged.contains(&now)
            || self.replaced.is_made_by(&entry.inode, undone)
            || names().any(is_here)
            || names().any(|name| self.is_excluded(name))
            || self.find_kept(&now).is_some()
            || self.find_kept(&entry.inode).is_some()
            || self.look_beside(&path, &now).is_some();
        (!found).then_some(Missing {
            path,
            inode: entry.inode,
            table: entry.table,
            is_born: entry.is_born,
        })
    }
}

fn made_in(table: &Table) -> BTreeSet<Id> {
    let born = table.records.iter().filter_map(|(_, record)| match record {
        Record::Born { id } => Some(*id),
        _ => None,
    });
    born.collect()
}

/// Was it made in the table that says so?
fn is_made(moved: &Moved, made_here: &BTreeSet<Id>) -> bool {
    let number = || made_here.contains(&moved.inode.id);
    moved.born.unwrap_or_else(number)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_in_a_directory_goes_with_it() {
        let entry = || Entry {
            inode: Identity::default(),
            table: 1,
            is_born: false,
            seen: Vec::new(),
        };
        let mut moves = Moves::default();
        for path in ["/a", "/a/x", "/a/b/y", "/ab"] {
            moves.at.insert(path.into(), entry());
        }
        let taken = moves.take(b"/a");
        assert_eq!(moves.at.len(), 1);
        moves.shift(taken, b"/a", b"/c/d");
        let names: Vec<&[u8]> = moves.at.keys().map(Vec::as_slice).collect();
        let want: [&[u8]; 4] = [b"/ab", b"/c/d", b"/c/d/b/y", b"/c/d/x"];
        assert_eq!(names, want);
        assert_eq!(moves.at[&b"/c/d/x"[..]].seen, [b"/a/x".to_vec()]);
    }
}
