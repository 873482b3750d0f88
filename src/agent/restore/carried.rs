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
use crate::image::state::{DescriptorState, FileKind, Manifest, OpenFileState, VmaKind};
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
            let fd = match descriptor_of(manifest, object.dev, object.ino) {
                Some(fd) => match for_writing(fd, manifest, k) {
                    Some(own) => {
                        self.keep.push(own);
                        Some(own)
                    }
                    None => Some(fd),
                },
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

/// A descriptor of the program through which a shared object is open: for reading and writing, where
/// there is one. By another one a mapping could not be writable.
fn descriptor_of(manifest: &Manifest, dev: u64, ino: u64) -> Option<i32> {
    const F_SEAL_WRITE: u32 = 8;
    let table = &manifest.descriptors;
    let is_it = |kind: &FileKind| match kind {
        FileKind::Memfd {
            object_dev,
            object_ino,
            ..
        } => (*object_dev, *object_ino) == (dev, ino),
        FileKind::Unlinked { dev: d, ino: i, .. } => (*d, *i) == (dev, ino),
        _ => false,
    };
    let of = |d: &DescriptorState| &table.files[d.file as usize];
    let writes = |d: &&DescriptorState| {
        // Nobody can map one that is sealed by it, on some kernels not even to read.
        let sealed =
            matches!(of(d).kind, FileKind::Memfd { seals, .. } if seals & F_SEAL_WRITE != 0);
        of(d).flags as i32 & (libc::O_ACCMODE | libc::O_PATH) == libc::O_RDWR && !sealed
    };
    let of_it = || table.fds.iter().filter(|d| is_it(&of(d).kind));
    let found = of_it().find(writes).or_else(|| of_it().next());
    found.map(|d| d.fd)
}

/// Opens it once more where the program has it mapped writable, but open to read only.
fn for_writing(fd: i32, manifest: &Manifest, object: usize) -> Option<i32> {
    let mut vmas = manifest.memory.vmas.iter();
    let written = vmas.any(|vma| {
        let it = matches!(vma.kind, VmaKind::Shared { object: o, .. } if o as usize == object);
        it && vma.prot & libc::PROT_WRITE as u32 != 0
    });
    let flags = sys::fcntl(fd, libc::F_GETFL, 0).ok()? as i32;
    if !written || flags & libc::O_ACCMODE == libc::O_RDWR {
        return None;
    }
    let path = sys::thread_fd_path(fd);
    sys::open(&path, libc::O_RDWR, 0).ok().map(sys::Fd::release)
}
