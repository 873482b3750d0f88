//! The side buffer: contents copied during the stop (unlinked files, memfds, shared
//! memory), page-aligned, written at the head of the image's data. Offsets count
//! from the buffer's start until the snapshot makes them file offsets.

use crate::agent::collect::descriptors::ContentSink;

const PAGE: usize = 4096;

/// Helper heap memory, given back after the checkpoint.
#[derive(Debug, Default)]
pub struct SideBuffer {
    bytes: Vec<u8>,
}

impl SideBuffer {
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }

    pub fn bytes_mut(&mut self) -> &mut Vec<u8> {
        &mut self.bytes
    }
}

impl ContentSink for SideBuffer {
    fn append(&mut self, pages: &[u8]) -> Result<u64, i32> {
        let offset = self.bytes.len() as u64;
        self.bytes.extend_from_slice(pages);
        self.bytes
            .resize(self.bytes.len().next_multiple_of(PAGE), 0);
        Ok(offset)
    }
}
