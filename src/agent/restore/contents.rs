//! Where contents come from. Those of shared objects and of files without a name may lie in any
//! image of the chain, as memory's do: in the manifest that a restore works with, an extent's
//! offset says in its upper bits in which one.
//!
//! Constructor of the new process.

use super::{RestoreError, descriptors, unpack};
use crate::image::PAGE;
use crate::image::chain::Sourced;
use crate::image::state::{Extent, Manifest, OBJECTS_AT, SharedObject};
use crate::store::RawFs;
use crate::store::find::FoundMember;
use memmap2::{Mmap, MmapOptions};
use std::fs::File;
use std::mem::ManuallyDrop;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Where the contents of memory come from.
pub struct Contents {
    pub(super) pieces: Vec<Sourced>,
    /// Those of shared objects and of files without a name.
    pub(super) objects: Vec<Sourced>,
    /// The images of the chain that are needed; compressed ones are unpacked.
    pub(super) files: Vec<Option<OwnedFd>>,
    /// They may stay mapped.
    pub(super) mappable: bool,
}

impl Contents {
    /// Nothing is done to a file of the program's: damage that is found here leaves the choice of
    /// another generation.
    pub fn of(member: &FoundMember<RawFs>, job: &Path) -> Result<Contents, RestoreError> {
        let mut pieces = member.compose()?;
        let (files, mappable) = needed_files(member, &pieces, job)?;
        let memory = pieces.partition_point(|piece| piece.addr < OBJECTS_AT);
        let objects = pieces.split_off(memory);
        Ok(Contents {
            pieces,
            objects,
            files,
            mappable,
        })
    }
}

/// The files of the chain that contents come from, and whether they may be mapped;
/// compressed ones are unpacked.
fn needed_files(
    member: &FoundMember<RawFs>,
    pieces: &[Sourced],
    job: &Path,
) -> Result<(Vec<Option<OwnedFd>>, bool), RestoreError> {
    let mut files = Vec::new();
    let mut mappable = true;
    for (number, (file, image)) in member.chain().enumerate() {
        let mut parts = unpack::parts(pieces, number as u32);
        if number == 0 {
            // Contents of shared objects and open files are in the generation's own image.
            let mut manifest = image.manifest.clone();
            let contents = manifest.descriptors.content_extents().map(|e| &*e);
            let shared = image.manifest.memory.shared.iter().map(|o| &o.extents);
            let extents = shared.chain(contents).flatten();
            parts.extend(extents.map(|e| (e.offset, e.npages)));
        } else if parts.is_empty() {
            files.push(None);
            continue;
        }
        let fail = |error| RestoreError::Unpack {
            generation: image.header.generation,
            error,
        };
        files.push(Some(if image.is_packed() {
            let unpacked = unpack::unpack(file, image.blocks(), parts, job).map_err(fail)?;
            mappable &= unpacked.mappable;
            unpacked.file
        } else {
            file.try_clone().map_err(|error| fail(error.into()))?
        }));
    }
    Ok((files, mappable))
}

/// No image is that long.
const FILE_SHIFT: u32 = 44;

/// The image of the chain, and where an extent lies in it.
pub fn place_of(extent: &Extent) -> (usize, u64) {
    let at = extent.offset & ((1 << FILE_SHIFT) - 1);
    ((extent.offset >> FILE_SHIFT) as usize, at)
}

/// Gives every object that has a space the extents that were found for it.
pub fn place(manifest: &mut Manifest, pieces: &[Sourced]) {
    for space in &manifest.memory.objects {
        let first = pieces.partition_point(|piece| piece.addr < space.at);
        let inside = pieces[first..].iter();
        let inside = inside.take_while(|piece| piece.addr < space.end());
        let extents: Vec<Extent> = inside
            .map(|piece| Extent {
                addr: piece.addr - space.at,
                npages: piece.npages,
                offset: piece.offset | u64::from(piece.file) << FILE_SHIFT,
            })
            .collect();
        let id = (space.dev, space.ino);
        let shared = manifest.memory.shared.iter_mut();
        for object in shared.filter(|o| (o.dev, o.ino) == id) {
            object.extents.clone_from(&extents);
        }
        for file in &mut manifest.descriptors.files {
            if let Some((of, _, contents)) = file.contents_mut()
                && of == id
            {
                contents.clone_from(&extents);
            }
        }
    }
}

/// Copies contents from the images to a file, at the extents' `addr`.
pub fn copy(extents: &[Extent], images: &[RawFd], file: &File) -> std::io::Result<()> {
    let mut buffer = vec![0u8; 1 << 20];
    for e in extents {
        let (image, at) = place_of(e);
        let image = images.get(image).copied().unwrap_or(-1);
        if image < 0 {
            return Err(std::io::Error::from_raw_os_error(libc::EBADF));
        }
        // SAFETY: borrowed for the duration of this call.
        let image = ManuallyDrop::new(unsafe { File::from_raw_fd(image) });
        let (mut done, len) = (0, e.npages * PAGE);
        while done < len {
            let n = ((len - done) as usize).min(buffer.len());
            image.read_exact_at(&mut buffer[..n], at + done)?;
            file.write_all_at(&buffer[..n], e.addr + done)?;
            done += n as u64;
        }
    }
    Ok(())
}

/// Contents of unlinked files and memfds, read from mappings of the images: their
/// descriptors may change their numbers meanwhile. Of each image only the part that holds
/// any, and where it begins: there may be little address space.
pub struct ImageSource(Vec<Option<(u64, Mmap)>>);

impl ImageSource {
    /// Maps what anything of a descriptor lies in.
    pub fn map(manifest: &Manifest, images: &[Option<RawFd>]) -> std::io::Result<ImageSource> {
        let mut descriptors = manifest.descriptors.clone();
        let mut parts = vec![(u64::MAX, 0u64); images.len()];
        for extent in descriptors.content_extents().flat_map(|extents| &*extents) {
            let (image, at) = place_of(extent);
            if let Some((start, end)) = parts.get_mut(image) {
                *start = at.min(*start);
                *end = (at + extent.npages * PAGE).max(*end);
            }
        }
        let open = images.iter().zip(parts).map(|(image, (start, end))| {
            let Some(image) = image.filter(|_| start < end) else {
                return Ok(None);
            };
            let mut options = MmapOptions::new();
            options.offset(start).len((end - start) as usize);
            // SAFETY: published images are never changed or truncated.
            let map = unsafe { options.map(image) }?;
            Ok(Some((start, map)))
        });
        Ok(ImageSource(open.collect::<std::io::Result<_>>()?))
    }
}

impl descriptors::ContentSource for ImageSource {
    fn read(&self, extent: &Extent, skip: u64, buf: &mut [u8]) -> Result<(), i32> {
        let (image, at) = place_of(extent);
        let part = self.0.get(image).and_then(Option::as_ref);
        let (start, map) = part.ok_or(libc::EIO)?;
        let from = (at + skip).checked_sub(*start).ok_or(libc::EIO)? as usize;
        let bytes = map.get(from..from + buf.len()).ok_or(libc::EIO)?;
        buf.copy_from_slice(bytes);
        Ok(())
    }
}

/// A memfd with the contents of a shared object that no descriptor refers to.
pub fn rebuild(object: &SharedObject, image_fds: &[i32]) -> Result<i32, RestoreError> {
    let fail = |error: std::io::Error| RestoreError::Shared {
        name: String::from_utf8_lossy(&object.name).into_owned(),
        error: error.into(),
    };
    let name = object
        .name
        .strip_prefix(b"/memfd:")
        .unwrap_or(b"ckpt-shared");
    let name = std::ffi::CString::new(name).unwrap_or_default();
    // SAFETY: a NUL-terminated name.
    let fd = unsafe { libc::memfd_create(name.as_ptr(), libc::MFD_CLOEXEC) };
    if fd < 0 {
        return Err(fail(std::io::Error::last_os_error()));
    }
    // High, out of the way of the image's descriptors, which are all in place.
    // SAFETY: descriptors of ours.
    let high = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 1 << 19) };
    let fd = if high >= 0 {
        // SAFETY: as above.
        unsafe { libc::close(fd) };
        high
    } else {
        fd
    };
    // SAFETY: the descriptor was just made and is owned by nobody else.
    let file =
        std::mem::ManuallyDrop::new(std::fs::File::from(unsafe { OwnedFd::from_raw_fd(fd) }));
    file.set_len(object.size).map_err(fail)?;
    copy(&object.extents, image_fds, &file).map_err(fail)?;
    Ok(fd)
}
