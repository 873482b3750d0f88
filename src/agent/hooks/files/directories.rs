//! Real paths of the directories in which names were changed lately, so that a program that makes
//! many files in one does not have its path asked for component by component each time.
//!
//! By inode and mount, which together have one path at a time. That the path still leads there is
//! asked with one call each time, since others move directories unseen (with none where it is the
//! one that the program uses). That there is a symbolic link on it by now takes a directory on it
//! that was moved, after which nothing is known ([`forget`]). Where somebody else has done both,
//! records made before are under that path as well. Inside a `Recording`.

use super::guard::Recording;
use super::paths::{self, CWD, Mount, Path};
use crate::persist::{Id, recorder};
use std::cell::UnsafeCell;

const KEPT: usize = 8;

struct Known {
    id: Id,
    mount: u64,
    path: Path,
}

struct Directories {
    /// What is known is of this table.
    table: u32,
    known: [Option<Known>; KEPT],
    /// The one to be replaced next.
    next: usize,
}

struct Guarded(UnsafeCell<Directories>);

// SAFETY: only reached inside a `Recording`, that is, under the recorder's lock.
unsafe impl Sync for Guarded {}

static DIRECTORIES: Guarded = Guarded(UnsafeCell::new(Directories {
    table: 0,
    known: [const { None }; KEPT],
    next: 0,
}));

fn all(_: &mut Recording) -> &mut Directories {
    // SAFETY: the caller's recording holds the lock, as long as what is returned is in use.
    let all = unsafe { &mut *DIRECTORIES.0.get() };
    let table = recorder::table_number();
    if all.table != table {
        all.known = [const { None }; KEPT];
        all.table = table;
    }
    all
}

/// A directory is about to be moved.
pub fn forget(recording: &mut Recording) {
    all(recording).known = [const { None }; KEPT];
}

/// The real path of a directory, where it is known and still leads there. `way`: the path by which
/// it has just been found.
pub fn path_of(recording: &mut Recording, id: Id, mount: Mount, way: &[u8]) -> Option<Vec<u8>> {
    let mount = mount?;
    let all = all(recording);
    let is_it = |known: &&mut Option<Known>| {
        known
            .as_ref()
            .is_some_and(|known| known.id == id && known.mount == mount)
    };
    let place = all.known.iter_mut().find(is_it)?;
    let path = &place.as_ref()?.path;
    let asked = way.strip_suffix(b"/").unwrap_or(way) == path.text();
    if !asked && !leads_to(path, id, mount) {
        *place = None;
        return None;
    }
    let mut text = Vec::new();
    text.try_reserve_exact(path.text().len()).ok()?;
    text.extend_from_slice(path.text());
    Some(text)
}

fn leads_to(path: &Path, id: Id, mount: u64) -> bool {
    let there = paths::stat_and_mount(CWD, path.pointer(), libc::AT_SYMLINK_NOFOLLOW);
    matches!(there, Ok((stat, there)) if stat.id == id && there == Some(mount))
}

/// Keeps what was found out.
pub fn note(recording: &mut Recording, id: Id, mount: Mount, path: &[u8]) {
    let (Some(mount), Some(path)) = (mount, Path::of(&[path])) else {
        return;
    };
    let all = all(recording);
    let next = all.next % KEPT;
    if let Some(place) = all.known.get_mut(next) {
        *place = Some(Known { id, mount, path });
        all.next = next + 1;
    }
}
