//! The descriptors that a restore carries from the new process's table into the restored one's
//! life: images that memory stays mapped from, the job's lock, the tracker's, files that are
//! mapped, shared objects. They make way for the program's own numbers.
//!
//! Constructor of the new process, or the leader at a rollback, as [`super::restore`].

use super::check::Mapped;
use super::{RestoreError, contents, descriptors, tape};
use crate::agent::collect::descriptors::sys;
use crate::agent::recover::files::FilesBack;
use crate::agent::resume::Payload;
use crate::agent::{log, settings};
use crate::errno::Errno;
use crate::image::state::{FileKind, Manifest, OpenFileState};
use std::os::fd::{IntoRawFd, OwnedFd, RawFd};

/// From here on numbers count, which change while the program's table is made: nothing is
/// closed by going out of scope. Where the restore fails the process ends.
pub struct Carried {
    /// All that are open; the restored program's table drops them.
    pub keep: Vec<RawFd>,
    /// Of the images of the chain, as `Sourced::file` counts them; -1: not needed. The first
    /// one is the generation's own.
    pub images: Vec<RawFd>,
    pub lock: Option<RawFd>,
    /// The tracker's, at a rollback.
    pub watching: Option<RawFd>,
    /// Files that are mapped shared; the restorer's tape closes them (not in `keep`).
    pub held: Vec<(Mapped, RawFd)>,
    /// Of each shared object of the manifest, where it needs a file.
    pub shared: Vec<Option<RawFd>>,
    /// What the restorer does to descriptors when memory is back.
    pub late: Vec<descriptors::Late>,
}

impl Carried {
    pub fn new(
        files: Vec<Option<OwnedFd>>,
        lock: Option<OwnedFd>,
        watching: Option<OwnedFd>,
        mapped: Vec<(Mapped, OwnedFd)>,
    ) -> Carried {
        let number = |file: Option<OwnedFd>| file.map_or(-1, IntoRawFd::into_raw_fd);
        let held = mapped.into_iter();
        Carried {
            keep: Vec::new(),
            images: files.into_iter().map(number).collect(),
            lock: lock.map(IntoRawFd::into_raw_fd),
            watching: watching.map(IntoRawFd::into_raw_fd),
            held: held.map(|(of, fd)| (of, fd.into_raw_fd())).collect(),
            shared: Vec::new(),
            late: Vec::new(),
        }
    }

    /// The generation's own image.
    pub fn image(&self) -> RawFd {
        self.images[0]
    }

    /// The images that something comes from.
    pub fn needed_images(&self) -> impl Iterator<Item = &RawFd> {
        self.images.iter().filter(|&&fd| fd >= 0)
    }

    /// Makes the program's open file table. What is carried gets other numbers where the
    /// program has them.
    pub fn restore_descriptors(
        &mut self,
        manifest: &Manifest,
        payload: &mut Payload,
        files: &FilesBack,
        inside: bool,
    ) -> Result<(), RestoreError> {
        let some: Vec<_> = self
            .images
            .iter()
            .map(|&fd| (fd >= 0).then_some(fd))
            .collect();
        let source =
            contents::ImageSource::map(manifest, &some).map_err(|error| RestoreError::Shared {
                name: "image".into(),
                error: error.into(),
            })?;
        let mut places: Vec<&mut RawFd> = self.images.iter_mut().filter(|fd| **fd >= 0).collect();
        places.extend(&mut self.lock);
        places.extend(&mut self.watching);
        let lasting = places.len();
        places.extend(self.held.iter_mut().map(|(_, fd)| fd));
        let mut numbers: Vec<RawFd> = places.iter().map(|fd| **fd).collect();

        let mut warn = |line: &str| log::line(format_args!("{line}"));
        let mut ctx = descriptors::Context {
            keep: &mut numbers,
            program_pid: manifest.process.pid,
            warn: &mut warn,
            files,
            inside,
        };
        let restored = descriptors::restore(&manifest.descriptors, &source, &mut ctx)?;
        for (place, number) in places.into_iter().zip(&numbers) {
            *place = *number;
        }
        numbers.truncate(lasting);
        self.keep = numbers;
        self.late = restored.late;
        let inherited = restored.inherited.iter();
        payload.inherited = inherited.map(|i| (i.fd, i.dev, i.ino)).collect();
        // What the program had put elsewhere for a while at the checkpoint comes back to its number.
        let given = settings::get().map_or(&[][..], |s| &s.inherited);
        for &(fd, dev, ino) in given {
            let is_it = |file: &OpenFileState| {
                matches!(
                    &file.kind,
                    FileKind::Regular { dev: d, ino: i, .. } if (*d, *i) == (dev, ino)
                )
            };
            let known = payload.inherited.iter().any(|known| known.0 == fd);
            if !known && manifest.descriptors.files.iter().any(is_it) {
                payload.inherited.push((fd, dev, ino));
            }
        }
        Ok(())
    }

    /// Finds or makes the files of shared memory that is to be mapped from one.
    pub fn rebuild_shared(&mut self, manifest: &Manifest) -> Result<(), RestoreError> {
        for (k, object) in manifest.memory.shared.iter().enumerate() {
            let open = manifest.descriptors.of_contents((object.dev, object.ino));
            let fd = match open {
                Some(open) if open.wants_write && tape::is_mapped_shared(manifest, k) => {
                    let again = writable_again(open.fd);
                    self.keep.extend(again);
                    Some(again.unwrap_or(open.fd))
                }
                Some(open) => Some(open.fd),
                None if tape::is_mapped_privately(manifest, k)
                    && !tape::is_mapped_shared(manifest, k) =>
                {
                    return Err(RestoreError::Shared {
                        name: String::from_utf8_lossy(&object.name).into_owned(),
                        error: Errno(libc::EBADF),
                    });
                }
                None if tape::needs_file(manifest, k) => {
                    let fd = contents::rebuild(object, &self.images)?;
                    self.keep.push(fd);
                    Some(fd)
                }
                None => None,
            };
            self.shared.push(fd);
        }
        Ok(())
    }
}

/// Another descriptor of an open file, for writing as well: a mapping that was made with one the
/// program has closed since may want it. High, out of the way of the program's.
fn writable_again(fd: i32) -> Option<i32> {
    let opened = sys::open(&sys::thread_fd_path(fd), libc::O_RDWR, 0).ok()?;
    let high = sys::dup_above(opened.raw(), 1 << 19);
    Some(high.unwrap_or_else(|_| opened.release()))
}
