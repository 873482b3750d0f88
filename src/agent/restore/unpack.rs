//! Compressed images: what a restore needs of them is unpacked into a file of its own
//! first, which then takes the image's place. The restorer knows only mapping and reading.
//!
//! Every block is compared with its checksum on the way. The file is memory (a memfd) where
//! there is enough of it, and is read eagerly then, so that it is gone when the program
//! runs; else a file without a name beside the images, which the kernel can write out, and
//! which may stay mapped.
//!
//! Constructor of the new process.

use crate::agent::procfs;
use crate::errno::{Errno, Io};
use crate::image::chain::Sourced;
use crate::image::sums::SUM_BLOCK;
use crate::image::{Blocks, PAGE};
use crate::store::RawFs;
use crate::store::fs::FileOf;
use std::io::Error;
use std::os::fd::{FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::path::Path;

/// Unpacked contents, and whether they may stay mapped.
pub struct Unpacked {
    pub file: OwnedFd,
    pub mappable: bool,
}

/// The image is not what was written, or cannot be read. (Without a text: this is done in a
/// running program as well.)
pub const DAMAGED: Errno = Errno(libc::EBADMSG);

/// Parts of an image, as extents count: offset and pages.
pub type Part = (u64, u64);

/// The parts of image number `file` that memory needs.
pub fn parts(pieces: &[Sourced], file: u32) -> Vec<Part> {
    let pieces = pieces.iter().filter(|piece| piece.file == file);
    pieces.map(|piece| (piece.offset, piece.npages)).collect()
}

/// Unpacks these parts of an image; they lie in the new file where they lay in the image.
pub fn unpack(
    image: &OwnedFd,
    mut blocks: Blocks,
    mut parts: Vec<Part>,
    beside: &Path,
) -> Io<Unpacked> {
    let needed: u64 = parts.iter().map(|part| part.1 * PAGE).sum();
    let (file, mappable) = if needed <= available() / 4 {
        (memory()?, false)
    } else {
        match nameless(beside) {
            Ok(file) => (file, true),
            Err(_) => (memory()?, false),
        }
    };
    let file = std::fs::File::from(file);
    file.set_len(PAGE + blocks.len())?;
    let source = FileOf(&RawFs, image);
    parts.sort_unstable();
    let mut buffer = vec![0u8; 4 * SUM_BLOCK as usize];
    for (offset, npages) in parts {
        let (mut at, end) = (offset, offset + npages * PAGE);
        while at < end {
            // Up to the border of a block, so that most blocks are unpacked straight into
            // the buffer and none twice.
            let border = PAGE + (at - PAGE) / SUM_BLOCK * SUM_BLOCK + buffer.len() as u64;
            let now = (end.min(border) - at) as usize;
            blocks
                .read(&source, &mut buffer[..now], at)
                .map_err(|_| DAMAGED)?;
            file.write_all_at(&buffer[..now], at)?;
            at += now as u64;
        }
    }
    Ok(Unpacked {
        file: file.into(),
        mappable,
    })
}

fn memory() -> Io<OwnedFd> {
    // SAFETY: a constant name; the descriptor is nobody else's.
    unsafe {
        match libc::memfd_create(c"ckpt-unpacked".as_ptr(), libc::MFD_CLOEXEC) {
            fd if fd >= 0 => Ok(OwnedFd::from_raw_fd(fd)),
            _ => Err(Error::last_os_error().into()),
        }
    }
}

fn nameless(dir: &Path) -> Io<OwnedFd> {
    use rustix::fs::{CWD, Mode, OFlags, openat};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    Ok(openat(CWD, dir, flags, Mode::RUSR | Mode::WUSR)?)
}

/// Bytes of memory that can be had without pushing other things out.
pub fn available() -> u64 {
    let text = procfs::read_file(b"/proc/meminfo").unwrap_or_default();
    let value = procfs::field(&text, "MemAvailable").and_then(procfs::number);
    (value.unwrap_or(0) as u64) << 10
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::pack::Method;
    use crate::image::state::Manifest;
    use crate::image::{Image, ImageWriter};
    use std::io::IoSlice;
    use std::os::fd::AsFd;

    #[test]
    fn parts_lie_where_they_lay() {
        let dir = std::env::temp_dir();
        for mappable in [false, true] {
            let packed = if mappable { nameless(&dir) } else { memory() };
            let Ok(packed) = packed else { continue };
            let mut writer = ImageWriter::new(packed.as_fd(), 1).packed(Method::Zstd);
            let data: Vec<u8> = (0..200 * PAGE).map(|i| (i / 100 % 251) as u8).collect();
            writer.write_pages(&[IoSlice::new(&data)]).unwrap();
            writer.finish(&Manifest::default(), false).unwrap();
            let blocks = Image::read(&packed.as_fd()).unwrap().into_blocks();
            let parts = vec![(PAGE * 100, 60), (PAGE, 3), (PAGE * 200, 1)];
            let unpacked = unpack(&packed, blocks, parts.clone(), &dir).unwrap();
            let file = std::fs::File::from(unpacked.file);
            for (offset, npages) in parts {
                let mut part = vec![0; (npages * PAGE) as usize];
                file.read_exact_at(&mut part, offset).unwrap();
                assert_eq!(part, data[(offset - PAGE) as usize..][..part.len()]);
            }
        }
    }
}
