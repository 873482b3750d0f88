//! The checksum table: one crc32c for each 64 KiB of the data region (the last
//! block may be shorter), 4 bytes little-endian each.
//!
//! Pure code; the running side is used by the writer while the data is still in
//! the processor's cache.

/// Bytes of page data that one checksum covers.
pub const SUM_BLOCK: u64 = 64 * 1024;

/// Bytes of the table for `data_len` bytes of page data.
pub fn table_len(data_len: u64) -> u64 {
    data_len.div_ceil(SUM_BLOCK) * 4
}

/// Checksums of a stream of page data.
#[derive(Debug, Default)]
pub struct RunningSums {
    done: Vec<u32>,
    current: u32,
    filled: u64,
}

impl RunningSums {
    /// Reserves for an expected amount of data, so that the writer rarely allocates.
    pub fn with_expected(data_len: u64) -> RunningSums {
        let blocks = data_len.div_ceil(SUM_BLOCK).min(1 << 24) as usize;
        RunningSums {
            done: Vec::with_capacity(blocks),
            current: 0,
            filled: 0,
        }
    }

    pub fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let room = (SUM_BLOCK - self.filled) as usize;
            let (now, rest) = data.split_at(room.min(data.len()));
            self.current = crc32c::crc32c_append(self.current, now);
            self.filled += now.len() as u64;
            if self.filled == SUM_BLOCK {
                self.done.push(self.current);
                self.current = 0;
                self.filled = 0;
            }
            data = rest;
        }
    }

    /// The table as it stands in the file.
    pub fn finish(mut self) -> Vec<u8> {
        if self.filled > 0 {
            self.done.push(self.current);
        }
        let mut bytes = Vec::with_capacity(self.done.len() * 4);
        for sum in &self.done {
            bytes.extend_from_slice(&sum.to_le_bytes());
        }
        bytes
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
    fn pieces_give_the_same_sums_as_the_whole() {
        let data: Vec<u8> = (0..200_000u32).map(|i| (i * 7 % 251) as u8).collect();
        let mut whole = RunningSums::default();
        whole.update(&data);
        let mut pieces = RunningSums::with_expected(data.len() as u64);
        for piece in data.chunks(4097) {
            pieces.update(piece);
        }
        let table = whole.finish();
        assert_eq!(table, pieces.finish());
        assert_eq!(table.len() as u64, table_len(data.len() as u64));
        let sums = Sums::new(table);
        for (i, block) in data.chunks(SUM_BLOCK as usize).enumerate() {
            assert!(sums.matches(i as u64, block));
        }
        assert!(!sums.matches(0, &data[1..]));
        assert!(!sums.matches(sums.blocks(), b""));
    }
}
