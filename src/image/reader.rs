//! Opening images. Header, manifest and checksum table are always verified; page
//! data is verified on request.
//!
//! Runs in the constructor of a recovering target (raw system calls only), in the
//! command, and on plain bytes in tests and under the fuzzer.

use super::blocks::{Blocks, Packing};
use super::check::{CheckError, check_manifest};
use super::codec::{self, CodecError};
use super::header::{HEADER_LEN, Header, HeaderError, ParsedHeader};
use super::pack::Packed;
use super::state::Manifest;
use super::sums::{SUM_BLOCK, Sums};
use crate::errno::{Errno, Io};
use rustix::fd::{AsFd, BorrowedFd};

/// Something that can be read at offsets.
pub trait ReadAt {
    fn len(&self) -> Io<u64>;
    /// Reads up to `buffer.len()` bytes; 0 at the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Io<usize>;

    fn is_empty(&self) -> Io<bool> {
        Ok(self.len()? == 0)
    }

    /// Fills the buffer; a file that ends before is EIO (its length was checked).
    fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Io<()> {
        let mut filled = 0;
        while filled < buffer.len() {
            match self.read_at(&mut buffer[filled..], offset + filled as u64) {
                Ok(0) => return Err(Errno::EIO),
                Ok(got) => filled += got,
                Err(Errno::EINTR) => {}
                Err(errno) => return Err(errno),
            }
        }
        Ok(())
    }
}

impl ReadAt for BorrowedFd<'_> {
    fn len(&self) -> Io<u64> {
        let stat = rustix::fs::fstat(self.as_fd())?;
        Ok(stat.st_size as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Io<usize> {
        Ok(rustix::io::pread(self.as_fd(), buffer, offset)?)
    }
}

impl ReadAt for &[u8] {
    fn len(&self) -> Io<u64> {
        Ok((**self).len() as u64)
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> Io<usize> {
        let rest = usize::try_from(offset)
            .ok()
            .and_then(|offset| self.get(offset..))
            .unwrap_or(&[]);
        let now = rest.len().min(buffer.len());
        buffer[..now].copy_from_slice(&rest[..now]);
        Ok(now)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageError {
    #[error("read the image: {0}")]
    Read(Errno),
    #[error("{0}")]
    Header(#[from] HeaderError),
    #[error("the manifest is damaged (checksum)")]
    ManifestChecksum,
    #[error("the checksum table is damaged")]
    SumsChecksum,
    #[error("the manifest has {0} bytes, more than any manifest")]
    ManifestSize(u64),
    #[error("the manifest cannot be decoded: {0}")]
    Manifest(#[from] CodecError),
    #[error("the manifest makes no sense: {0}")]
    Check(#[from] CheckError),
    #[error("what the image says of its compression makes no sense")]
    Packing,
    #[error("page data is damaged at offset {offset:#x} ({bytes} bytes)")]
    Data { offset: u64, bytes: u64 },
}

/// An image whose metadata is verified.
#[derive(Debug, Clone)]
pub struct Image {
    pub header: Header,
    pub manifest: Manifest,
    sums: Sums,
    packing: Option<Packing>,
}

impl Image {
    /// Reads and verifies everything but the page data.
    pub fn read(source: &impl ReadAt) -> Result<Image, ImageError> {
        Image::read_by(source, codec::decode_region)
    }

    /// The same of an image that another one stands on: of its manifest there is no more than
    /// where its pages lie.
    pub fn read_base(source: &impl ReadAt) -> Result<Image, ImageError> {
        Image::read_by(source, codec::decode_base)
    }

    fn read_by(
        source: &impl ReadAt,
        decode: impl FnOnce(&[u8]) -> Result<(Manifest, Option<Packed>), CodecError>,
    ) -> Result<Image, ImageError> {
        let header = Image::read_header(source)?;
        if header.manifest_len > codec::LIMIT as u64 {
            return Err(ImageError::ManifestSize(header.manifest_len));
        }
        // The two lie side by side (validated): one read.
        let len = header.manifest_len.checked_add(header.sums_len);
        let len = len.ok_or(HeaderError::Layout)?;
        let mut region = read_region(source, header.manifest_offset, len)?;
        let table = region.split_off(header.manifest_len as usize);
        if crc32c::crc32c(&region) != header.manifest_crc {
            return Err(ImageError::ManifestChecksum);
        }
        if crc32c::crc32c(&table) != header.sums_crc {
            return Err(ImageError::SumsChecksum);
        }
        let (manifest, packed) = decode(&region)?;
        check_manifest(&manifest, &header)?;
        let packing = match packed {
            Some(packed) if header.is_packed() => {
                Some(Packing::new(packed, &header).ok_or(ImageError::Packing)?)
            }
            None if !header.is_packed() => None,
            _ => return Err(ImageError::Packing),
        };
        Ok(Image {
            header,
            manifest,
            sums: Sums::new(table),
            packing,
        })
    }

    /// Reads and validates the header alone.
    pub fn read_header(source: &impl ReadAt) -> Result<Header, ImageError> {
        let len = source.len().map_err(ImageError::Read)?;
        if len < HEADER_LEN {
            return Err(HeaderError::Short(len).into());
        }
        let mut page = [0u8; HEADER_LEN as usize];
        source
            .read_exact_at(&mut page, 0)
            .map_err(ImageError::Read)?;
        Ok(ParsedHeader::parse(&page)?.validate(len)?)
    }

    /// Compares all page data with its checksums; `progress(done, total)` in bytes.
    pub fn verify_data(
        &self,
        source: &impl ReadAt,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<(), ImageError> {
        let mut blocks = self.blocks();
        let total = blocks.len();
        let mut buffer = vec![0u8; SUM_BLOCK.min(total) as usize];
        let mut done = 0;
        while done < total {
            let now = SUM_BLOCK.min(total - done);
            let block = &mut buffer[..now as usize];
            blocks.read(source, block, self.header.data_offset + done)?;
            done += now;
            progress(done, total);
        }
        Ok(())
    }

    /// Is the page data compressed? Then the file's bytes are not what extents point to.
    pub fn is_packed(&self) -> bool {
        self.packing.is_some()
    }

    /// A reader of the page data.
    pub fn blocks(&self) -> Blocks {
        Blocks::new(self.header, self.sums.clone(), self.packing.clone())
    }

    /// The page data alone, without the manifest.
    pub fn into_blocks(self) -> Blocks {
        Blocks::new(self.header, self.sums, self.packing)
    }
}

fn read_region(source: &impl ReadAt, offset: u64, len: u64) -> Result<Vec<u8>, ImageError> {
    // The length lies inside the file (validated), so this is no larger than it.
    let len = usize::try_from(len).map_err(|_| ImageError::ManifestSize(len))?;
    let mut region = vec![0u8; len];
    source
        .read_exact_at(&mut region, offset)
        .map_err(ImageError::Read)?;
    Ok(region)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::check::tests::sample_manifest;
    use crate::image::writer::tests::MemorySink;
    use crate::image::{ImageWriter, PAGE};
    use std::io::IoSlice;

    /// A small image: 2 pages, a manifest that names them.
    fn sample() -> Vec<u8> {
        let mut sink = MemorySink::default();
        let mut writer = ImageWriter::new(&mut sink, 3);
        let mut data = vec![0u8; 2 * PAGE as usize];
        for (i, byte) in data.iter_mut().enumerate() {
            *byte = (i % 253) as u8;
        }
        let offset = writer.write_pages(&[IoSlice::new(&data)]).unwrap();
        writer.finish(&sample_manifest(offset), true).unwrap();
        sink.bytes
    }

    fn accept(bytes: &[u8]) -> Result<Manifest, ImageError> {
        let image = Image::read(&bytes)?;
        image.verify_data(&bytes, |_, _| {})?;
        Ok(image.manifest)
    }

    #[test]
    fn every_flipped_byte_is_noticed() {
        let good = sample();
        assert!(accept(&good).is_ok());
        for at in 0..good.len() {
            let mut bad = good.clone();
            bad[at] ^= 0x41;
            let metadata = Image::read(&bad.as_slice()).is_err();
            assert_eq!(metadata, Image::read_base(&bad.as_slice()).is_err());
            let is_data = (4096..4096 * 3).contains(&at);
            assert_eq!(metadata, !is_data, "byte {at}");
            assert!(accept(&bad).is_err(), "byte {at}");
        }
    }

    #[test]
    fn every_truncation_and_extension_is_noticed() {
        let good = sample();
        for len in 0..good.len() {
            assert!(Image::read(&&good[..len]).is_err(), "length {len}");
        }
        let mut long = good.clone();
        long.push(0);
        assert!(Image::read(&long.as_slice()).is_err());
    }

    #[test]
    fn mutated_images_never_panic() {
        // xorshift: the same mutations on every run.
        let mut seed = 0x9e37_79b9_7f4a_7c15u64;
        let mut next = || {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed
        };
        let good = sample();
        for _ in 0..3000 {
            let mut bad = good.clone();
            for _ in 0..next() % 8 + 1 {
                match next() % 4 {
                    0 => {
                        let at = next() as usize % bad.len();
                        bad[at] = next() as u8;
                    }
                    1 => {
                        let (to, from) = (next() as usize % bad.len(), next() as usize % bad.len());
                        bad[to] = bad[from];
                    }
                    2 => bad.truncate(next() as usize % bad.len() + 1),
                    _ => bad.extend_from_slice(&next().to_le_bytes()),
                }
            }
            if bad != good {
                assert!(accept(&bad).is_err());
            }
        }
    }

    /// The decoder behind the checksums must hold as well: mutate the manifest and
    /// make the checksums right again.
    #[test]
    fn manifests_with_forged_checksums_never_panic() {
        let region = codec::encode_manifest(&sample_manifest(4096)).unwrap();
        let mut header = *Image::read_header(&sample().as_slice()).unwrap();
        header.manifest_len = region.len() as u64;
        for at in 0..region.len() {
            for value in [0, 1, 0x7f, 0x80, 0xfa, 0xfb, 0xfc, 0xfd, 0xfe, 0xff] {
                let mut bad = region.clone();
                bad[at] = value;
                if let Ok(manifest) = codec::decode_manifest(&bad) {
                    let _ = check_manifest(&manifest, &header);
                }
            }
        }
    }
}
