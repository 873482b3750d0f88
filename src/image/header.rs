//! The header page of an image: fixed width, little-endian, encoded and decoded
//! by hand so that no decoder ever runs on unchecked bytes.
//!
//! Two types: a [`ParsedHeader`] is what the page says (magic, version and the
//! page's own checksum are right); a [`Header`] also fits the file it stands in
//! (regions in order, no gaps, no overflow, length exact). Only the second one is
//! used to find anything.

use super::PAGE;
use super::sums::SUM_BLOCK;

/// PNG-style: not text, and damaged by any newline or 7-bit translation.
pub const MAGIC: [u8; 8] = *b"\x89CKPT\r\n\x1a";
/// The header layout's version.
pub const VERSION: u32 = 1;
/// ELF `e_machine` of x86-64.
pub const MACHINE_X86_64: u32 = 62;
pub const HEADER_LEN: u64 = PAGE;

/// Incompatible feature: the page data is compressed (`pack`).
pub const PACKED: u32 = 1;

/// Byte offsets of the fields, each derived from the one before.
mod at {
    pub const MAGIC: usize = 0;
    pub const VERSION: usize = MAGIC + 8;
    pub const MACHINE: usize = VERSION + 4;
    pub const PAGE_SIZE: usize = MACHINE + 4;
    pub const SUM_BLOCK: usize = PAGE_SIZE + 4;
    pub const INCOMPATIBLE: usize = SUM_BLOCK + 4;
    pub const COMPATIBLE: usize = INCOMPATIBLE + 4;
    pub const GENERATION: usize = COMPATIBLE + 4;
    pub const DATA_OFFSET: usize = GENERATION + 8;
    pub const DATA_LEN: usize = DATA_OFFSET + 8;
    pub const MANIFEST_OFFSET: usize = DATA_LEN + 8;
    pub const MANIFEST_LEN: usize = MANIFEST_OFFSET + 8;
    pub const SUMS_OFFSET: usize = MANIFEST_LEN + 8;
    pub const SUMS_LEN: usize = SUMS_OFFSET + 8;
    pub const TOTAL_LEN: usize = SUMS_LEN + 8;
    pub const MANIFEST_CRC: usize = TOTAL_LEN + 8;
    pub const SUMS_CRC: usize = MANIFEST_CRC + 4;
    pub const UNPACKED_LEN: usize = SUMS_CRC + 4;
    pub const RESERVED: usize = UNPACKED_LEN + 8;
    pub const HEADER_CRC: usize = super::HEADER_LEN as usize - 4;
}

/// A header page that was read: its own checksum is right, its contents are not
/// yet compared with the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ParsedHeader {
    pub machine: u32,
    pub page_size: u32,
    pub sum_block: u32,
    /// Features without which the file must not be read: [`PACKED`].
    pub incompatible: u32,
    /// Features that a reader may ignore; none so far.
    pub compatible: u32,
    pub generation: u64,
    pub data_offset: u64,
    pub data_len: u64,
    pub manifest_offset: u64,
    pub manifest_len: u64,
    pub sums_offset: u64,
    pub sums_len: u64,
    pub total_len: u64,
    pub manifest_crc: u32,
    pub sums_crc: u32,
    /// Of compressed data, its length before; else 0.
    pub unpacked_len: u64,
    /// The page's own checksum: names this header in the generation's record.
    pub crc: u32,
}

/// A header that fits its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Header(ParsedHeader);

/// Why a header is not accepted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HeaderError {
    #[error("the file is shorter than a header page ({0} bytes)")]
    Short(u64),
    #[error("not a checkpoint image (no magic number)")]
    Magic,
    #[error("the header page is damaged (checksum)")]
    Checksum,
    #[error("image format version {0}, this program reads version {VERSION}")]
    Version(u32),
    #[error("the image is of machine type {0}, not x86-64")]
    Machine(u32),
    #[error("page size {0} or checksum block {1} is not supported")]
    Units(u32, u32),
    #[error("the image uses features unknown to this program (bits {0:#x})")]
    Features(u32),
    #[error("the header's regions do not fit together")]
    Layout,
    #[error("the file has {found} bytes, its header says {expected}")]
    Length { expected: u64, found: u64 },
}

fn u32_at(page: &[u8; HEADER_LEN as usize], offset: usize) -> u32 {
    let mut bytes = [0; 4];
    bytes.copy_from_slice(&page[offset..offset + 4]);
    u32::from_le_bytes(bytes)
}

fn u64_at(page: &[u8; HEADER_LEN as usize], offset: usize) -> u64 {
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&page[offset..offset + 8]);
    u64::from_le_bytes(bytes)
}

impl ParsedHeader {
    /// Decodes a header page.
    pub fn parse(page: &[u8; HEADER_LEN as usize]) -> Result<ParsedHeader, HeaderError> {
        if page[at::MAGIC..at::VERSION] != MAGIC {
            return Err(HeaderError::Magic);
        }
        // The version comes before the checksum: another version may place it elsewhere.
        let version = u32_at(page, at::VERSION);
        let crc = u32_at(page, at::HEADER_CRC);
        let intact = crc == crc32c::crc32c(&page[..at::HEADER_CRC]);
        if version != VERSION {
            return Err(if intact {
                HeaderError::Version(version)
            } else {
                HeaderError::Checksum
            });
        }
        if !intact {
            return Err(HeaderError::Checksum);
        }
        if page[at::RESERVED..at::HEADER_CRC].iter().any(|&b| b != 0) {
            return Err(HeaderError::Layout);
        }
        Ok(ParsedHeader {
            machine: u32_at(page, at::MACHINE),
            page_size: u32_at(page, at::PAGE_SIZE),
            sum_block: u32_at(page, at::SUM_BLOCK),
            incompatible: u32_at(page, at::INCOMPATIBLE),
            compatible: u32_at(page, at::COMPATIBLE),
            generation: u64_at(page, at::GENERATION),
            data_offset: u64_at(page, at::DATA_OFFSET),
            data_len: u64_at(page, at::DATA_LEN),
            manifest_offset: u64_at(page, at::MANIFEST_OFFSET),
            manifest_len: u64_at(page, at::MANIFEST_LEN),
            sums_offset: u64_at(page, at::SUMS_OFFSET),
            sums_len: u64_at(page, at::SUMS_LEN),
            total_len: u64_at(page, at::TOTAL_LEN),
            manifest_crc: u32_at(page, at::MANIFEST_CRC),
            sums_crc: u32_at(page, at::SUMS_CRC),
            unpacked_len: u64_at(page, at::UNPACKED_LEN),
            crc,
        })
    }

    pub fn is_packed(&self) -> bool {
        self.incompatible & PACKED != 0
    }

    /// Bytes of page data as extents and checksums count them.
    pub fn span(&self) -> u64 {
        if self.is_packed() {
            self.unpacked_len
        } else {
            self.data_len
        }
    }

    /// Compares the header with the file it was read from.
    pub fn validate(self, file_len: u64) -> Result<Header, HeaderError> {
        if self.machine != MACHINE_X86_64 {
            return Err(HeaderError::Machine(self.machine));
        }
        if u64::from(self.page_size) != PAGE || u64::from(self.sum_block) != SUM_BLOCK {
            return Err(HeaderError::Units(self.page_size, self.sum_block));
        }
        if self.incompatible & !PACKED != 0 {
            return Err(HeaderError::Features(self.incompatible & !PACKED));
        }
        if self.total_len != file_len {
            return Err(HeaderError::Length {
                expected: self.total_len,
                found: file_len,
            });
        }
        let follows = |offset: u64, len: u64, next: u64| offset.checked_add(len) == Some(next);
        let sound = self.data_offset == HEADER_LEN
            && self.data_len.is_multiple_of(PAGE)
            && follows(self.data_offset, self.data_len, self.manifest_offset)
            && follows(self.manifest_offset, self.manifest_len, self.sums_offset)
            && follows(self.sums_offset, self.sums_len, self.total_len)
            && (self.is_packed() || self.unpacked_len == 0)
            && self.span().is_multiple_of(PAGE)
            && self.span() <= u64::MAX / 2
            && self.sums_len == super::sums::table_len(self.span());
        if !sound {
            return Err(HeaderError::Layout);
        }
        Ok(Header(self))
    }
}

impl Header {
    /// A header for a finished image; regions follow one another from the header on.
    /// `unpacked`: the length that the data had before it was compressed.
    pub(super) fn build(
        generation: u64,
        data_len: u64,
        unpacked: Option<u64>,
        manifest: (u64, u32),
        sums: (u64, u32),
    ) -> Header {
        let manifest_offset = HEADER_LEN + data_len;
        let sums_offset = manifest_offset + manifest.0;
        let mut header = Header(ParsedHeader {
            machine: MACHINE_X86_64,
            page_size: PAGE as u32,
            sum_block: SUM_BLOCK as u32,
            incompatible: if unpacked.is_some() { PACKED } else { 0 },
            compatible: 0,
            generation,
            data_offset: HEADER_LEN,
            data_len,
            manifest_offset,
            manifest_len: manifest.0,
            sums_offset,
            sums_len: sums.0,
            total_len: sums_offset + sums.0,
            manifest_crc: manifest.1,
            sums_crc: sums.1,
            unpacked_len: unpacked.unwrap_or(0),
            crc: 0,
        });
        header.0.crc = u32_at(&header.encode(), at::HEADER_CRC);
        header
    }

    /// The page to be written.
    pub fn encode(&self) -> [u8; HEADER_LEN as usize] {
        let mut page = [0u8; HEADER_LEN as usize];
        let h = &self.0;
        page[at::MAGIC..at::VERSION].copy_from_slice(&MAGIC);
        for (offset, value) in [
            (at::VERSION, VERSION),
            (at::MACHINE, h.machine),
            (at::PAGE_SIZE, h.page_size),
            (at::SUM_BLOCK, h.sum_block),
            (at::INCOMPATIBLE, h.incompatible),
            (at::COMPATIBLE, h.compatible),
            (at::MANIFEST_CRC, h.manifest_crc),
            (at::SUMS_CRC, h.sums_crc),
        ] {
            page[offset..offset + 4].copy_from_slice(&value.to_le_bytes());
        }
        for (offset, value) in [
            (at::GENERATION, h.generation),
            (at::DATA_OFFSET, h.data_offset),
            (at::DATA_LEN, h.data_len),
            (at::MANIFEST_OFFSET, h.manifest_offset),
            (at::MANIFEST_LEN, h.manifest_len),
            (at::SUMS_OFFSET, h.sums_offset),
            (at::SUMS_LEN, h.sums_len),
            (at::TOTAL_LEN, h.total_len),
            (at::UNPACKED_LEN, h.unpacked_len),
        ] {
            page[offset..offset + 8].copy_from_slice(&value.to_le_bytes());
        }
        let crc = crc32c::crc32c(&page[..at::HEADER_CRC]);
        page[at::HEADER_CRC..].copy_from_slice(&crc.to_le_bytes());
        page
    }
}

impl std::ops::Deref for Header {
    type Target = ParsedHeader;
    fn deref(&self) -> &ParsedHeader {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sample() -> Header {
        Header::build(42, 3 * PAGE, None, (104, 7), (4, 9))
    }

    #[test]
    fn round_trip() {
        let header = sample();
        let parsed = ParsedHeader::parse(&header.encode()).unwrap();
        assert_eq!(parsed, *header);
        assert_eq!(parsed.validate(header.total_len).unwrap(), header);
        assert_eq!(header.total_len, 4096 + 3 * 4096 + 104 + 4);
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let page = sample().encode();
        for byte in 0..page.len() {
            for bit in 0..8 {
                let mut damaged = page;
                damaged[byte] ^= 1 << bit;
                assert!(ParsedHeader::parse(&damaged).is_err(), "byte {byte}");
            }
        }
    }

    #[test]
    fn the_file_must_have_the_length() {
        let header = sample();
        let parsed = ParsedHeader::parse(&header.encode()).unwrap();
        assert!(matches!(
            parsed.validate(header.total_len - 1),
            Err(HeaderError::Length { .. })
        ));
    }

    #[test]
    fn regions_that_overflow_are_refused() {
        let mut h = *sample();
        h.manifest_len = u64::MAX - 10;
        assert_eq!(h.validate(h.total_len), Err(HeaderError::Layout));
    }

    #[test]
    fn packed_data_has_two_lengths() {
        let header = Header::build(1, PAGE, Some(3 * PAGE), (8, 0), (4, 0));
        let parsed = ParsedHeader::parse(&header.encode()).unwrap();
        assert_eq!(parsed.validate(header.total_len).unwrap(), header);
        assert_eq!((header.data_len, header.span()), (PAGE, 3 * PAGE));
        let mut plain = *header;
        plain.incompatible = 0;
        assert_eq!(plain.validate(plain.total_len), Err(HeaderError::Layout));
        let mut later = *header;
        later.incompatible = 3;
        assert_eq!(
            later.validate(later.total_len),
            Err(HeaderError::Features(2))
        );
    }

    #[test]
    fn a_terabyte_fits() {
        let data = 1 << 40;
        let header = Header::build(
            1,
            data,
            None,
            (8, 0),
            (super::super::sums::table_len(data), 0),
        );
        let parsed = ParsedHeader::parse(&header.encode()).unwrap();
        assert!(parsed.validate(header.total_len).is_ok());
    }
}
