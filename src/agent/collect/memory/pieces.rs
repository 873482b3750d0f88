//! From a line of the map to a piece of the plan: what the mapping is, under which name its
//! file can be opened again, and how its pages are found. Only [`super::collect_with`] asks,
//! while the program runs or is stopped.

use super::lines::{Line, unescape};
use super::{How, MemoryError, Own, Piece, Plan};
use crate::agent::procfs::OwnFd;
use crate::image::state::{SharedKind, SharedObject, VmaKind, VmaState, vma_flag};
use crate::persist::kept;
use crate::persist::sys::{self, CPath};
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

impl Plan {
    pub(super) fn add(
        &mut self,
        line: &Line<'_>,
        (start, end): (u64, u64),
        own: &Own<'_>,
        comes_back: &mut dyn FnMut(&Line<'_>) -> bool,
    ) -> Result<(), MemoryError> {
        let deleted = line.name.strip_suffix(b" (deleted)");
        // There are files called so.
        let deleted = deleted.filter(|_| !is_called(line.name, line.ino));
        let name = deleted.unwrap_or(line.name);
        let offset = line.offset + (start - line.start);
        let mut flags = 0;
        let device = || MemoryError::Device(String::from_utf8_lossy(line.name).into_owned());
        let (kind, how) = if line.shared {
            if name.starts_with(b"/[aio]") || name.starts_with(b"/secretmem") {
                return Err(device());
            } else if name.starts_with(b"/memfd:")
                || name.starts_with(b"/dev/zero")
                || name.starts_with(b"/SYSV")
                || name.is_empty()
                || (deleted.is_some() && name.starts_with(b"/"))
            {
                if deleted.is_some() && has_other_names(line, own.store) {
                    let name = String::from_utf8_lossy(name).into_owned();
                    return Err(MemoryError::OtherNames(name));
                }
                (
                    VmaKind::Shared {
                        object: self.object(line, name),
                        offset,
                    },
                    How::Nothing,
                )
            } else if name.starts_with(b"/") && !is_device(name) {
                (
                    VmaKind::FileShared {
                        path: file_name(name, line.ino),
                        offset,
                        writable: true,
                    },
                    How::Nothing,
                )
            } else {
                return Err(device());
            }
        } else if name == b"[heap]" {
            (VmaKind::Heap, How::Scan)
        } else if name == b"[stack]" {
            (VmaKind::Stack, How::Scan)
        } else if name.is_empty() || name.starts_with(b"[anon") || name == b"/dev/zero" {
            (VmaKind::Anon, How::Scan)
        } else if name == b"/anon_hugepage" {
            flags |= vma_flag::HUGETLB;
            (VmaKind::Anon, How::Scan)
        } else if name.starts_with(b"/") {
            if name.starts_with(own.store) {
                (VmaKind::Anon, How::All)
            } else if (own.is_cache)(name) {
                (VmaKind::Anon, How::Readable)
            } else if deleted.is_some() && comes_back(line) {
                let object = self.object(line, name);
                (VmaKind::PrivateOf { object, offset }, How::Scan)
            } else if deleted.is_some() {
                (VmaKind::Anon, How::Readable)
            } else if is_device(name) {
                return Err(device());
            } else {
                (
                    VmaKind::FilePrivate {
                        path: file_name(name, line.ino),
                        offset,
                    },
                    How::Scan,
                )
            }
        } else {
            // anon_inode:[io_uring], [perf_event], [uprobes], ...
            return Err(device());
        };
        self.pieces.push(Piece {
            vma: VmaState {
                start,
                end,
                prot: line.prot,
                kind,
                flags,
            },
            how,
        });
        Ok(())
    }

    fn object(&mut self, line: &Line<'_>, name: &[u8]) -> u32 {
        let same = |o: &SharedObject| o.dev == line.dev && o.ino == line.ino;
        if let Some(k) = self.shared.iter().position(same) {
            return k as u32;
        }
        let kind = if name.starts_with(b"/memfd:") {
            SharedKind::Memfd
        } else if name.starts_with(b"/SYSV") {
            SharedKind::SysV
        } else if name.is_empty() || name.starts_with(b"/dev/zero") {
            SharedKind::Anonymous
        } else {
            SharedKind::DeletedFile
        };
        self.shared.push(SharedObject {
            dev: line.dev,
            ino: line.ino,
            name: unescape(name),
            kind,
            ..SharedObject::default()
        });
        self.shared.len() as u32 - 1
    }
}

/// The name of a mapped file. The kernel escapes line feeds, but not what looks like an escape.
fn file_name(name: &[u8], ino: u64) -> Vec<u8> {
    if name.contains(&b'\\') && is_called(name, ino) {
        return name.to_vec();
    }
    unescape(name)
}

fn is_called(name: &[u8], ino: u64) -> bool {
    CPath::new(&[name])
        .and_then(|path| sys::lstat(&path))
        .is_ok_and(|stat| stat.id.ino == ino)
}

/// Has a file that was unlinked under the name it was mapped by other names than those that the
/// jobs in `store` keep? What is stored through the mapping would be seen there. Told where the
/// program may ask for it (CAP_CHECKPOINT_RESTORE).
fn has_other_names(line: &Line<'_>, store: &[u8]) -> bool {
    let path = format!("/proc/self/map_files/{:x}-{:x}", line.start, line.end);
    let stat = OwnFd::open(path.as_bytes()).and_then(|fd| sys::fstat(fd.raw()));
    stat.is_ok_and(|stat| {
        let store = Path::new(OsStr::from_bytes(store));
        let jobs = CPath::new(&[store.as_os_str().as_bytes()]).and_then(|path| sys::list(&path));
        let jobs = jobs.unwrap_or_default();
        let kept = || {
            let jobs = jobs.iter().map(|job| store.join(OsStr::from_bytes(job)));
            jobs.map(|job| kept::links_of(&job, &stat.id)).sum::<u64>()
        };
        stat.is_regular() && stat.nlink > 0 && u64::from(stat.nlink) > kept()
    })
}

fn is_device(path: &[u8]) -> bool {
    path.starts_with(b"/dev/") && !path.starts_with(b"/dev/shm/") && path != b"/dev/zero"
}
