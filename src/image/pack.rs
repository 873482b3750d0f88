//! Compressed page data: each checksum block (64 KiB) by itself, so that any part can be
//! read without the rest.
//!
//! Extents and checksums count in the data as it was; only this module and `blocks` know
//! that it lies in the file packed. A block that does not become smaller is stored as it is.
//!
//! Packing runs in the helper thread and in the forked writer, unpacking in the constructor,
//! the helper (merging) and the command. zstd's C code gets its working memory from here: it
//! must never call malloc, which is the program's.

use super::header::HEADER_LEN;
use super::sums::SUM_BLOCK;
use serde::{Deserialize, Serialize};

/// How blocks are packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Method {
    Lz4,
    Zstd,
}

/// The section of the manifest region that says how the data is packed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packed {
    pub method: Method,
    /// Bytes in the file of each block; as many as the block has: stored as it is.
    pub sizes: Vec<u32>,
}

impl Packed {
    /// Where each block begins, from the start of the data on, and where the last one ends.
    /// `None` if the sizes do not fit blocks of `data_len` bytes.
    pub fn offsets(&self, data_len: u64) -> Option<Vec<u64>> {
        if self.sizes.len() as u64 != data_len.div_ceil(SUM_BLOCK) {
            return None;
        }
        let mut offsets = Vec::with_capacity(self.sizes.len() + 1);
        let mut at = 0u64;
        let mut left = data_len;
        offsets.push(0);
        for &size in &self.sizes {
            let block = left.min(SUM_BLOCK);
            if size == 0 || u64::from(size) > block {
                return None;
            }
            left -= block;
            at += u64::from(size);
            offsets.push(at);
        }
        Some(offsets)
    }
}

/// Memory for zstd, which wants it aligned.
#[derive(Debug)]
struct Workspace(Vec<u64>);

impl Workspace {
    fn of(bytes: usize) -> Workspace {
        Workspace(vec![0; bytes.div_ceil(8)])
    }

    fn bytes(&self) -> usize {
        self.0.len() * 8
    }
}

/// Level 1 is what keeps up with a disk.
const ZSTD_LEVEL: i32 = 1;

/// Packs blocks.
#[derive(Debug)]
pub struct Packer {
    method: Method,
    workspace: Workspace,
    out: Vec<u8>,
}

impl Packer {
    pub fn new(method: Method) -> Packer {
        let workspace = match method {
            Method::Lz4 => 0,
            // SAFETY: pure functions.
            Method::Zstd => unsafe {
                let params = zstd_sys::ZSTD_getCParams(ZSTD_LEVEL, SUM_BLOCK, 0);
                zstd_sys::ZSTD_estimateCCtxSize_usingCParams(params)
                    .max(zstd_sys::ZSTD_estimateCCtxSize(ZSTD_LEVEL))
            },
        };
        let most = match method {
            Method::Lz4 => lz4_flex::block::get_maximum_output_size(SUM_BLOCK as usize),
            // As large as the block is of no use.
            Method::Zstd => SUM_BLOCK as usize,
        };
        Packer {
            method,
            workspace: Workspace::of(workspace),
            out: vec![0; most],
        }
    }

    pub fn method(&self) -> Method {
        self.method
    }

    /// The packed block; `None` when it would not be smaller.
    pub fn pack(&mut self, block: &[u8]) -> Option<&[u8]> {
        let size = match self.method {
            Method::Lz4 => lz4_flex::block::compress_into(block, &mut self.out).ok()?,
            Method::Zstd => self.zstd(block)?,
        };
        (size > 0 && size < block.len()).then(|| &self.out[..size])
    }

    fn zstd(&mut self, block: &[u8]) -> Option<usize> {
        let (space, bytes) = (self.workspace.0.as_mut_ptr(), self.workspace.bytes());
        // SAFETY: the context lives in the workspace and no longer than this call; both
        // buffers are given with their lengths.
        unsafe {
            let context = zstd_sys::ZSTD_initStaticCCtx(space.cast(), bytes);
            if context.is_null() {
                return None;
            }
            let out = &mut self.out;
            let size = zstd_sys::ZSTD_compressCCtx(
                context,
                out.as_mut_ptr().cast(),
                out.len(),
                block.as_ptr().cast(),
                block.len(),
                ZSTD_LEVEL,
            );
            (zstd_sys::ZSTD_isError(size) == 0).then_some(size)
        }
    }
}

/// Unpacks blocks.
#[derive(Debug)]
pub struct Unpacker {
    method: Method,
    workspace: Workspace,
}

impl Unpacker {
    pub fn new(method: Method) -> Unpacker {
        let workspace = match method {
            Method::Lz4 => 0,
            // SAFETY: a pure function.
            Method::Zstd => unsafe { zstd_sys::ZSTD_estimateDCtxSize() },
        };
        Unpacker {
            method,
            workspace: Workspace::of(workspace),
        }
    }

    /// Fills `block` from what [`Packer::pack`] made of it; false for anything else.
    pub fn unpack(&mut self, packed: &[u8], block: &mut [u8]) -> bool {
        let size = match self.method {
            Method::Lz4 => lz4_flex::block::decompress_into(packed, block).ok(),
            Method::Zstd => self.zstd(packed, block),
        };
        size == Some(block.len())
    }

    fn zstd(&mut self, packed: &[u8], block: &mut [u8]) -> Option<usize> {
        let (space, bytes) = (self.workspace.0.as_mut_ptr(), self.workspace.bytes());
        // SAFETY: as for packing.
        unsafe {
            let context = zstd_sys::ZSTD_initStaticDCtx(space.cast(), bytes);
            if context.is_null() {
                return None;
            }
            let size = zstd_sys::ZSTD_decompressDCtx(
                context,
                block.as_mut_ptr().cast(),
                block.len(),
                packed.as_ptr().cast(),
                packed.len(),
            );
            (zstd_sys::ZSTD_isError(size) == 0).then_some(size)
        }
    }
}

/// Blocks on their way into the file.
#[derive(Debug)]
pub(super) struct Stream {
    packer: Packer,
    /// The block that is not full yet.
    block: Vec<u8>,
    sizes: Vec<u32>,
    /// Where the next block goes in the file.
    pub end: u64,
}

impl Stream {
    pub fn new(method: Method) -> Stream {
        Stream {
            packer: Packer::new(method),
            block: Vec::with_capacity(SUM_BLOCK as usize),
            sizes: Vec::new(),
            end: HEADER_LEN,
        }
    }

    /// Takes data; each block that is full goes to `write(bytes, offset)`.
    pub fn take<E>(
        &mut self,
        mut data: &[u8],
        mut write: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<(), E> {
        while !data.is_empty() {
            let room = SUM_BLOCK as usize - self.block.len();
            let (now, rest) = data.split_at(room.min(data.len()));
            self.block.extend_from_slice(now);
            data = rest;
            if self.block.len() as u64 == SUM_BLOCK {
                self.flush(&mut write)?;
            }
        }
        Ok(())
    }

    fn flush<E>(&mut self, write: &mut impl FnMut(&[u8], u64) -> Result<(), E>) -> Result<(), E> {
        if !self.block.is_empty() {
            let bytes = self.packer.pack(&self.block).unwrap_or(&self.block);
            write(bytes, self.end)?;
            self.sizes.push(bytes.len() as u32);
            self.end += bytes.len() as u64;
            self.block.clear();
        }
        Ok(())
    }

    /// The last block, and zeroes to the end of its page in the file.
    pub fn finish<E>(
        mut self,
        mut write: impl FnMut(&[u8], u64) -> Result<(), E>,
    ) -> Result<(Packed, u64), E> {
        self.flush(&mut write)?;
        let pad = self.end.next_multiple_of(super::PAGE) - self.end;
        if pad > 0 {
            write(&vec![0; pad as usize], self.end)?;
        }
        let packed = Packed {
            method: self.packer.method(),
            sizes: self.sizes,
        };
        Ok((packed, self.end + pad))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn samples() -> Vec<Vec<u8>> {
        let mut dice = 88172645463325252u64;
        let mut noise = || {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            dice as u8
        };
        let text = b"as for the rest, it is silence; ".repeat(2048);
        let noise: Vec<u8> = (0..65536).map(|_| noise()).collect();
        let mut half = noise.clone();
        half[..30_000].fill(7);
        vec![text, noise, half, vec![1; 4096], vec![9; 65536]]
    }

    #[test]
    fn what_is_packed_comes_back() {
        for method in [Method::Lz4, Method::Zstd] {
            let (mut packer, mut unpacker) = (Packer::new(method), Unpacker::new(method));
            for (k, block) in samples().iter().enumerate() {
                match packer.pack(block) {
                    Some(packed) => {
                        let mut back = vec![0; block.len()];
                        assert!(unpacker.unpack(packed, &mut back));
                        assert!(back == *block);
                        assert!(packed.len() < block.len() && k != 1);
                    }
                    None => assert_eq!(k, 1, "only noise does not become smaller"),
                }
            }
        }
    }

    #[test]
    fn damage_is_refused_or_gives_other_bytes_but_never_a_panic() {
        for method in [Method::Lz4, Method::Zstd] {
            let (mut packer, mut unpacker) = (Packer::new(method), Unpacker::new(method));
            let samples = samples();
            let packed = packer.pack(&samples[2]).unwrap().to_vec();
            let mut back = vec![0; samples[2].len()];
            for at in (0..packed.len()).step_by(211) {
                let mut bad = packed.clone();
                bad[at] ^= 0x55;
                unpacker.unpack(&bad, &mut back);
                assert!(!unpacker.unpack(&packed[..at], &mut back));
            }
            let mut short = vec![0; 4096];
            assert!(!unpacker.unpack(&packed, &mut short));
        }
    }

    #[test]
    fn sizes_must_fit_the_data() {
        let packed = |sizes: &[u32]| Packed {
            method: Method::Lz4,
            sizes: sizes.to_vec(),
        };
        let len = SUM_BLOCK + 4096;
        assert_eq!(packed(&[10, 4096]).offsets(len), Some(vec![0, 10, 4106]));
        for wrong in [&[10][..], &[10, 0], &[10, 4097], &[65537, 1], &[1, 1, 1]] {
            assert_eq!(packed(wrong).offsets(len), None);
        }
        assert_eq!(packed(&[]).offsets(0), Some(vec![0]));
    }
}
