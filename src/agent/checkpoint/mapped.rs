//! Files that the program maps shared and writable: nobody sees the stores that modify them,
//! so what they hold is recorded in the new table at once, while the program is stopped
//! (a mapping made later: by the hook of mmap). Helper thread.

use crate::agent::{heap, hooks};
use crate::image::state::{VmaKind, VmaState};
use crate::persist::sys::{self, CPath};
use crate::persist::{FileRef, recorder};
use serde::{Deserialize, Serialize};

/// A part of a file that is mapped so.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mapping {
    path: Vec<u8>,
    start: u64,
    end: u64,
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

/// Records the contents of the mapped parts in the table that has just been installed.
pub fn record(mappings: &[Mapping]) {
    if mappings.is_empty() {
        return;
    }
    // SAFETY: helper thread; every other thread is held outside hooks. What the recorder
    // remembers belongs to the image.
    unsafe { heap::in_agent_heap(|| record_all(mappings)) }
}

fn record_all(mappings: &[Mapping]) {
    let Some(mut session) = recorder::enter() else {
        return;
    };
    let mut total = 0u64;
    for mapping in mappings {
        let stat = CPath::new(&[&mapping.path]).and_then(|path| sys::stat(&path));
        let Ok(stat) = stat else {
            session.incomplete(b"a file that is mapped shared cannot be found by its path");
            continue;
        };
        if session.is_excluded(&mapping.path) && !session.is_known(&stat.id) {
            continue;
        }
        let file = FileRef {
            stat: &stat,
            path: &mapping.path,
            fd: None,
            any_fd: None,
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
