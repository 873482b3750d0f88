//! Files that the program maps shared and writable: nobody sees the stores that modify them,
//! so what they hold is recorded in the new table at once, while the program is stopped
//! (a mapping made later: by the hook of mmap). Helper thread.

use crate::agent::procfs::{OwnFd, read_file};
use crate::agent::{heap, hooks};
use crate::image::state::{VmaKind, VmaState};
use crate::persist::sys::{self, CPath};
use crate::persist::{FileRef, Stat, recorder};
use serde::{Deserialize, Serialize};

/// A part of a file that is mapped so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    path: Vec<u8>,
    start: u64,
    end: u64,
}

/// The same with its file, which somebody else may remove at any time: until it is recorded it is
/// held by a descriptor.
#[derive(Debug)]
pub struct Held {
    mapping: Mapping,
    file: Result<(OwnFd, Stat), i32>,
}

/// What a stop may take the time to copy. Beyond, the files cannot go back.
const MOST: u64 = 256 << 20;

pub fn of<'a>(vmas: impl Iterator<Item = &'a VmaState>) -> Vec<Mapping> {
    let mapping = |vma: &VmaState| match &vma.kind {
        VmaKind::FileShared { path, offset, .. } if vma.prot & libc::PROT_WRITE as u32 != 0 => {
            Some(Mapping {
                path: path.clone(),
                start: *offset,
                end: offset + (vma.end - vma.start),
            })
        }
        VmaKind::FileShared { .. } => {
            hooks::files::shared::note_read_only();
            None
        }
        _ => None,
    };
    vmas.filter_map(mapping).collect()
}

/// Opens the files, as far as they may be read.
pub fn hold(mappings: Vec<Mapping>) -> Vec<Held> {
    let hold = |mapping: Mapping| Held {
        file: hooks::files::shared::open(&mapping.path),
        mapping,
    };
    mappings.into_iter().map(hold).collect()
}

/// Was one of the files removed since the map was read? Another process did it, and the map says
/// so now: the image would not.
pub fn any_removed(files: &[Held]) -> bool {
    let is_gone = |held: &&Held| matches!(held.file, Err(libc::ENOENT));
    let mut gone = files.iter().filter(is_gone);
    gone.any(|held| is_removed(&held.mapping.path))
}

/// Does the map call this file removed?
fn is_removed(path: &[u8]) -> bool {
    let Ok(maps) = read_file(b"/proc/self/maps") else {
        return false;
    };
    let mut lines = maps.split(|&byte| byte == b'\n');
    lines.any(|line| {
        let name = line.strip_suffix(b" (deleted)");
        // A path begins behind a space, and no other path ends in this one then.
        let before = name.and_then(|line| line.strip_suffix(path));
        before.is_some_and(|line| line.ends_with(b" "))
    })
}

/// Records the contents of the mapped parts in the table that has just been installed.
pub fn record(mappings: &[Held]) {
    if mappings.is_empty() {
        return;
    }
    // SAFETY: helper thread; every other thread is held outside hooks. What the recorder
    // remembers belongs to the image.
    unsafe { heap::in_agent_heap(|| record_all(mappings)) }
}

fn record_all(mappings: &[Held]) {
    let Some(mut session) = recorder::enter() else {
        return;
    };
    let mut total = 0u64;
    for Held { mapping, file } in mappings {
        let stat = match file {
            Ok((_, stat)) => Ok(*stat),
            Err(_) => CPath::new(&[&mapping.path]).and_then(|path| sys::stat(&path)),
        };
        let Ok(stat) = stat else {
            session.incomplete(b"a file that is mapped shared cannot be found by its path");
            continue;
        };
        if session.is_excluded(&mapping.path) && !session.is_known(&stat.id) {
            continue;
        }
        let fd = file.as_ref().map(|(fd, _)| fd.raw()).ok();
        let file = FileRef {
            stat: &stat,
            path: &mapping.path,
            fd,
            any_fd: fd,
        };
        let end = mapping.end.min(stat.size);
        total = total.saturating_add(end.saturating_sub(mapping.start));
        if total > MOST {
            session.incomplete(b"more than 256 MiB of files are mapped shared and writable");
            return;
        }
        session.before_write(&file, mapping.start, end);
        session.mapped(&stat.id);
    }
}
