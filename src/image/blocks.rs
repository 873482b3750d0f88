//! The page data of an image, read in whole checksum blocks and compared with the
//! table: what merging and verifying see is what was written.
//!
//! Runs in the helper thread (merging), in the constructor and in the command.

use super::header::Header;
use super::pack::{Packed, Unpacker};
use super::reader::{ImageError, ReadAt};
use super::sums::{SUM_BLOCK, Sums};

/// Where compressed blocks lie in the file.
#[derive(Debug, Clone)]
pub struct Packing {
    packed: Packed,
    /// From the start of the data on, and the end.
    offsets: Vec<u64>,
}

impl Packing {
    /// `None` if they do not fit the file.
    pub(super) fn new(packed: Packed, header: &Header) -> Option<Packing> {
        let offsets = packed.offsets(header.span())?;
        let end = offsets.last()?.checked_next_multiple_of(super::PAGE)?;
        (end == header.data_len).then_some(Packing { packed, offsets })
    }
}

/// Page data of one image, with the block read last.
#[derive(Debug)]
pub struct Blocks {
    header: Header,
    sums: Sums,
    packing: Option<(Packing, Unpacker)>,
    /// A block as it lies in the file.
    stored: Vec<u8>,
    /// The block in `last`.
    number: Option<u64>,
    last: Vec<u8>,
}

impl Blocks {
    pub(super) fn new(header: Header, sums: Sums, packing: Option<Packing>) -> Blocks {
        Blocks {
            header,
            sums,
            packing: packing.map(|packing| {
                let method = packing.packed.method;
                (packing, Unpacker::new(method))
            }),
            stored: Vec::new(),
            number: None,
            last: Vec::new(),
        }
    }

    /// Fills `buffer` with the data at `offset` (as extents count).
    pub fn read(
        &mut self,
        source: &impl ReadAt,
        buffer: &mut [u8],
        offset: u64,
    ) -> Result<(), ImageError> {
        let outside = ImageError::Data {
            offset,
            bytes: buffer.len() as u64,
        };
        let start = offset.checked_sub(self.header.data_offset);
        let inside = start.and_then(|start| start.checked_add(buffer.len() as u64));
        let (Some(mut at), true) = (start, inside.is_some_and(|end| end <= self.len())) else {
            return Err(outside);
        };
        let mut rest = buffer;
        while !rest.is_empty() {
            let (block, within) = (at / SUM_BLOCK, (at % SUM_BLOCK) as usize);
            let len = self.block_len(block);
            let now = rest.len().min(len - within);
            let (out, later) = rest.split_at_mut(now);
            if now == len {
                self.load(source, block, out)?;
            } else {
                if self.number != Some(block) {
                    let mut last = std::mem::take(&mut self.last);
                    last.resize(len, 0);
                    self.number = None;
                    self.load(source, block, &mut last)?;
                    self.last = last;
                    self.number = Some(block);
                }
                out.copy_from_slice(&self.last[within..within + now]);
            }
            rest = later;
            at += now as u64;
        }
        Ok(())
    }

    /// Bytes of page data.
    pub fn len(&self) -> u64 {
        self.header.span()
    }

    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    fn block_len(&self, block: u64) -> usize {
        SUM_BLOCK.min(self.len() - block * SUM_BLOCK) as usize
    }

    /// Reads one whole block and compares it with its checksum.
    fn load(&mut self, source: &impl ReadAt, block: u64, out: &mut [u8]) -> Result<(), ImageError> {
        let mut offset = self.header.data_offset + block * SUM_BLOCK;
        let mut sound = true;
        let read = match &mut self.packing {
            None => source.read_exact_at(out, offset),
            Some((packing, unpacker)) => {
                let index = block as usize;
                let (start, end) = (packing.offsets[index], packing.offsets[index + 1]);
                offset = self.header.data_offset + start;
                let len = (end - start) as usize;
                if len == out.len() {
                    source.read_exact_at(out, offset)
                } else {
                    self.stored.resize(len, 0);
                    let read = source.read_exact_at(&mut self.stored, offset);
                    sound = read.is_ok() && unpacker.unpack(&self.stored, out);
                    read
                }
            }
        };
        read.map_err(ImageError::Read)?;
        if !sound || !self.sums.matches(block, out) {
            return Err(ImageError::Data {
                offset,
                bytes: out.len() as u64,
            });
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::pack::Method;
    use crate::image::state::Manifest;
    use crate::image::writer::tests::MemorySink;
    use crate::image::{Image, ImageWriter, PAGE};
    use std::io::IoSlice;

    #[test]
    fn any_part_is_read_and_damage_is_noticed() {
        any_part(None);
        any_part(Some(Method::Lz4));
        any_part(Some(Method::Zstd));
    }

    fn any_part(method: Option<Method>) {
        let mut sink = MemorySink::default();
        let mut writer = ImageWriter::new(&mut sink, 3);
        if let Some(method) = method {
            writer = writer.packed(method);
        }
        let data: Vec<u8> = (0..37 * PAGE).map(|i| (i * 31 % 251) as u8).collect();
        let offset = writer.write_pages(&[IoSlice::new(&data)]).unwrap();
        writer.finish(&Manifest::default(), false).unwrap();
        let mut bytes = sink.bytes;
        let image = Image::read(&bytes.as_slice()).unwrap();
        image.verify_data(&bytes.as_slice(), |_, _| {}).unwrap();
        assert_eq!(image.is_packed(), method.is_some());
        assert_eq!(method.is_some(), bytes.len() < data.len());
        let mut blocks = Image::read(&bytes.as_slice()).unwrap().into_blocks();
        for (from, to) in [
            (0, 37),
            (0, 16),
            (15, 17),
            (3, 5),
            (3, 36),
            (32, 37),
            (36, 37),
        ] {
            let (from, to) = ((from * PAGE) as usize, (to * PAGE) as usize);
            let mut part = vec![0; to - from];
            let at = offset + from as u64;
            blocks.read(&bytes.as_slice(), &mut part, at).unwrap();
            assert_eq!(part, data[from..to]);
        }
        let mut part = vec![0; 2 * PAGE as usize];
        for outside in [0, offset + 36 * PAGE, u64::MAX - 5] {
            assert!(blocks.read(&bytes.as_slice(), &mut part, outside).is_err());
        }
        bytes[offset as usize + 5] ^= 1;
        let mut blocks = Image::read(&bytes.as_slice()).unwrap().into_blocks();
        let mut read = |page| blocks.read(&bytes.as_slice(), &mut part, offset + page * PAGE);
        assert!(matches!(read(8), Err(ImageError::Data { .. })));
        assert_eq!(read(16), Ok(()));
    }
}
