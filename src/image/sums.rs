//! The checksum table: one crc32c for each 64 KiB of the data region (the last
//! block may be shorter), 4 bytes little-endian each.
//!
//! Pure code; the writing side is used while the data is still in the processor's cache.

use super::PAGE;

/// Bytes of page data that one checksum covers.
pub const SUM_BLOCK: u64 = 64 * 1024;

/// Bytes of the table for `data_len` bytes of page data.
pub fn table_len(data_len: u64) -> u64 {
    data_len.div_ceil(SUM_BLOCK) * 4
}

/// Checksums of page data as it is written: one for each page, so that a page can be
/// written again in its place; joined to blocks in the end.
#[derive(Debug, Default, Clone)]
pub struct PageSums(Vec<u32>);

impl PageSums {
    /// Reserves for an expected amount of data, so that the writer rarely allocates.
    pub fn with_expected(data_len: u64) -> PageSums {
        let pages = (data_len / PAGE).min(1 << 28) as usize;
        PageSums(Vec::with_capacity(pages))
    }

    /// The pages from number `first` on hold `data` (whole pages). Pages that were never
    /// set count as zero pages.
    pub fn set(&mut self, first: u64, data: &[u8]) {
        for (k, page) in data.chunks_exact(PAGE as usize).enumerate() {
            let index = first as usize + k;
            let sum = crc32c::crc32c(page);
            if index == self.0.len() {
                self.0.push(sum);
            } else {
                if index > self.0.len() {
                    self.0.resize(index + 1, zero_page());
                }
                self.0[index] = sum;
            }
        }
    }

    /// The table as it stands in the file.
    pub fn finish(self) -> Vec<u8> {
        let per_block = (SUM_BLOCK / PAGE) as usize;
        let shift = Shift::by_a_page();
        let mut bytes = Vec::with_capacity(self.0.len().div_ceil(per_block) * 4);
        for block in self.0.chunks(per_block) {
            let sum = block.iter().fold(0, |sum, &page| shift.apply(sum) ^ page);
            bytes.extend_from_slice(&sum.to_le_bytes());
        }
        bytes
    }
}

fn zero_page() -> u32 {
    crc32c::crc32c(&[0; PAGE as usize])
}

/// What a checksum becomes when a page is appended, but for that page's own: linear in
/// its bits, so four tables give it.
struct Shift([[u32; 256]; 4]);

impl Shift {
    fn by_a_page() -> Shift {
        let mut tables = [[0u32; 256]; 4];
        for (k, table) in tables.iter_mut().enumerate() {
            for bit in 0..8 {
                let sum = 1u32 << (8 * k + bit);
                let moved = crc32c::crc32c_combine(sum, 0, PAGE as usize);
                for value in (0..256).filter(|value| value & (1 << bit) != 0) {
                    table[value] ^= moved;
                }
            }
        }
        Shift(tables)
    }

    fn apply(&self, sum: u32) -> u32 {
        let bytes = sum.to_le_bytes();
        (0..4).fold(0, |moved, k| moved ^ self.0[k][bytes[k] as usize])
    }
}

/// A checksum table that was read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Sums(Vec<u8>);

impl Sums {
    pub fn new(table: Vec<u8>) -> Sums {
        Sums(table)
    }

    pub fn blocks(&self) -> u64 {
        self.0.len() as u64 / 4
    }

    /// Is `data` what block number `block` should hold?
    pub fn matches(&self, block: u64, data: &[u8]) -> bool {
        let Some(start) = usize::try_from(block).ok().and_then(|b| b.checked_mul(4)) else {
            return false;
        };
        match self.0.get(start..start + 4) {
            Some(sum) => sum == crc32c::crc32c(data).to_le_bytes(),
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_in_any_order_give_the_sums_of_the_whole() {
        let data: Vec<u8> = (0..53 * 4096u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut pages = PageSums::with_expected(data.len() as u64);
        // A page is written over, one comes late.
        pages.set(0, &data[4096..40960]);
        pages.set(0, &data[..20480]);
        pages.set(6, &data[6 * 4096..]);
        pages.set(5, &data[5 * 4096..6 * 4096]);
        let table = pages.finish();
        assert_eq!(table.len() as u64, table_len(data.len() as u64));
        let sums = Sums::new(table);
        for (i, block) in data.chunks(SUM_BLOCK as usize).enumerate() {
            assert!(sums.matches(i as u64, block));
        }
        assert!(!sums.matches(0, &data[1..]));
        assert!(!sums.matches(sums.blocks(), b""));
        let mut gap = PageSums::default();
        gap.set(3, &data[..4096]);
        let mut whole = vec![0u8; 3 * 4096];
        whole.extend_from_slice(&data[..4096]);
        assert!(Sums::new(gap.finish()).matches(0, &whole));
    }
}
