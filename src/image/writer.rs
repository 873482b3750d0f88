//! The streaming image writer.
//!
//! Runs in the target: in the helper thread while the program stands still, or in
//! the forked writer child while the program goes on. So it makes raw system
//! calls only (rustix's linux_raw backend: no errno, no libc function), and
//! allocates only for the checksum table and the manifest.
//!
//! Page data goes straight from the program's memory (or a bounce buffer) to the file;
//! each chunk is checksummed just before it is written, while it is in the cache. A page
//! may be written a second time in its place, until the image is finished.
//!
//! An error makes the image void: the writer refuses all further work, nothing is
//! tried a second time, the caller throws the file away.

use super::check::{CheckError, check_manifest};
use super::header::{HEADER_LEN, Header};
use super::pack::{Method, Stream};
use super::state::Manifest;
use super::sums::PageSums;
use super::{PAGE, codec};
use crate::errno::{Errno, Io};
use rustix::fd::{AsFd, BorrowedFd};
use std::io::IoSlice;

/// Bytes checksummed and written in one step: fits the second-level cache.
const CHUNK: usize = 512 << 10;
/// Pieces in one step (UIO_MAXIOV is 1024).
const MAX_PIECES: usize = 256;

/// Where an image is written; a trait so that tests can make it fail.
pub trait ImageSink {
    /// Writes at `offset`, returns how many bytes were taken.
    fn write_at(&mut self, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize>;
    fn sync_data(&mut self) -> Io<()>;
}

/// A file, by its descriptor.
impl ImageSink for BorrowedFd<'_> {
    fn write_at(&mut self, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
        loop {
            match rustix::io::pwritev(self.as_fd(), pieces, offset) {
                // Interrupted before the first byte: nothing has failed yet.
                Err(rustix::io::Errno::INTR) => {}
                other => return other.map_err(Errno::from),
            }
        }
    }

    fn sync_data(&mut self) -> Io<()> {
        rustix::fs::fdatasync(self.as_fd()).map_err(Errno::from)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    #[error("write the image: {0}")]
    Write(Errno),
    #[error("write the image: only {written} of {asked} bytes were taken")]
    Short { asked: u64, written: u64 },
    #[error("read what belongs in the image: {0}")]
    Source(Errno),
    #[error("sync the image: {0}")]
    Sync(Errno),
    #[error("write the image: data is not a whole number of pages")]
    Unaligned,
    #[error("write the image: an earlier write failed")]
    Void,
    #[error("encode the manifest: {0}")]
    Manifest(#[from] codec::CodecError),
    #[error("the manifest makes no sense: {0}")]
    Check(#[from] CheckError),
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Written {
    /// Length of the file.
    pub bytes: u64,
    pub data_bytes: u64,
    pub manifest_bytes: u64,
    /// The header page's own checksum: names this image in the generation's record.
    pub header_crc: u32,
}

#[derive(Debug)]
pub struct ImageWriter<S> {
    sink: S,
    generation: u64,
    /// Where the next page goes.
    end: u64,
    sums: PageSums,
    /// Compresses, if asked to; then `end` counts in the data as it was.
    stream: Option<Stream>,
    void: bool,
}

impl<S: ImageSink> ImageWriter<S> {
    /// A writer into an empty file. Nothing is written yet.
    pub fn new(sink: S, generation: u64) -> ImageWriter<S> {
        Self::with_expected(sink, generation, 0)
    }

    /// The same, with room for the checksums of `data_len` bytes.
    pub fn with_expected(sink: S, generation: u64, data_len: u64) -> ImageWriter<S> {
        ImageWriter {
            sink,
            generation,
            end: HEADER_LEN,
            sums: PageSums::with_expected(data_len),
            stream: None,
            void: false,
        }
    }

    /// Compresses the data; before anything is written.
    pub fn packed(self, method: Method) -> ImageWriter<S> {
        debug_assert_eq!(self.end, HEADER_LEN);
        ImageWriter {
            stream: Some(Stream::new(method)),
            ..self
        }
    }

    /// Can pages be written again ([`ImageWriter::rewrite_pages`])?
    pub fn can_rewrite(&self) -> bool {
        self.stream.is_none()
    }

    /// The offset that the next page will get.
    pub fn position(&self) -> u64 {
        self.end
    }

    /// Bytes of page data so far.
    pub fn data_len(&self) -> u64 {
        self.end - HEADER_LEN
    }

    /// Writes whole pages, one after the other; returns the file offset of the first.
    pub fn write_pages(&mut self, pages: &[IoSlice<'_>]) -> Result<u64, WriteError> {
        let start = self.end;
        if pages.iter().any(|p| !(p.len() as u64).is_multiple_of(PAGE)) {
            return Err(WriteError::Unaligned);
        }
        if self.stream.is_some() {
            return self.pack(pages);
        }
        let mut batch: [IoSlice<'_>; MAX_PIECES] = [IoSlice::new(&[]); MAX_PIECES];
        let (mut pieces, mut bytes) = (0, 0);
        for page_run in pages {
            let mut rest: &[u8] = page_run;
            while !rest.is_empty() {
                let (now, later) = rest.split_at(rest.len().min(CHUNK - bytes));
                let page = (self.end + bytes as u64 - HEADER_LEN) / PAGE;
                self.sums.set(page, now);
                batch[pieces] = IoSlice::new(now);
                pieces += 1;
                bytes += now.len();
                rest = later;
                if bytes == CHUNK || pieces == MAX_PIECES {
                    self.put(&batch[..pieces], bytes)?;
                    (pieces, bytes) = (0, 0);
                }
            }
        }
        if pieces > 0 {
            self.put(&batch[..pieces], bytes)?;
        }
        Ok(start)
    }

    fn pack(&mut self, pages: &[IoSlice<'_>]) -> Result<u64, WriteError> {
        let start = self.end;
        let Some(mut stream) = self.stream.take() else {
            return Err(WriteError::Void);
        };
        for run in pages {
            self.sums.set((self.end - HEADER_LEN) / PAGE, run);
            stream.take(run, |bytes, at| {
                self.put_at(&[IoSlice::new(bytes)], bytes.len(), at)
            })?;
            self.end += run.len() as u64;
        }
        self.stream = Some(stream);
        Ok(start)
    }

    /// Writes pages again that are in the file already, from `offset` on.
    pub fn rewrite_pages(&mut self, offset: u64, pages: &[u8]) -> Result<(), WriteError> {
        let whole = offset.is_multiple_of(PAGE) && (pages.len() as u64).is_multiple_of(PAGE);
        if !whole
            || !self.can_rewrite()
            || offset < HEADER_LEN
            || offset + pages.len() as u64 > self.end
        {
            return Err(WriteError::Unaligned);
        }
        let mut at = offset;
        for chunk in pages.chunks(CHUNK) {
            self.sums.set((at - HEADER_LEN) / PAGE, chunk);
            self.put_at(&[IoSlice::new(chunk)], chunk.len(), at)?;
            at += chunk.len() as u64;
        }
        Ok(())
    }

    /// Writes runs of the program's memory, given as `(address, pages)`.
    ///
    /// # Safety
    /// Every page must be mapped and readable until the call returns. Its contents
    /// must not change either, or the checksum will not fit what was written.
    pub unsafe fn write_memory(&mut self, runs: &[(u64, u64)]) -> Result<u64, WriteError> {
        let start = self.end;
        for group in runs.chunks(MAX_PIECES) {
            let mut pieces: [IoSlice<'_>; MAX_PIECES] = [IoSlice::new(&[]); MAX_PIECES];
            for (piece, &(addr, npages)) in pieces.iter_mut().zip(group) {
                let len = (npages * PAGE) as usize;
                // SAFETY: mapped, readable and unchanging by the caller's promise.
                let memory = unsafe { std::slice::from_raw_parts(addr as *const u8, len) };
                *piece = IoSlice::new(memory);
            }
            self.write_pages(&pieces[..group.len()])?;
        }
        Ok(start)
    }

    /// Writes bytes of any length, filled up with zeroes to a whole page.
    pub fn write_bytes_as_pages(&mut self, bytes: &[u8]) -> Result<u64, WriteError> {
        let start = self.end;
        let whole = bytes.len() - bytes.len() % PAGE as usize;
        let (pages, tail) = bytes.split_at(whole);
        self.write_pages(&[IoSlice::new(pages)])?;
        if !tail.is_empty() {
            let mut page = [0u8; PAGE as usize];
            page[..tail.len()].copy_from_slice(tail);
            self.write_pages(&[IoSlice::new(&page)])?;
        }
        Ok(start)
    }

    /// Copies `npages` pages of a file (a memfd, an unlinked file, /proc/self/mem for
    /// memory without read permission) from `offset`; what lies beyond its end is
    /// zero. `buffer` is the bounce buffer, a whole number of pages.
    pub fn write_from_file(
        &mut self,
        file: BorrowedFd<'_>,
        offset: u64,
        npages: u64,
        buffer: &mut [u8],
    ) -> Result<u64, WriteError> {
        let start = self.end;
        let room = buffer.len() - buffer.len() % PAGE as usize;
        if room == 0 {
            return Err(WriteError::Unaligned);
        }
        let mut done = 0;
        while done < npages * PAGE {
            let now = (npages * PAGE - done).min(room as u64) as usize;
            let mut filled = 0;
            while filled < now {
                let at = offset + done + filled as u64;
                match rustix::io::pread(file, &mut buffer[filled..now], at) {
                    Ok(0) => break,
                    Ok(got) => filled += got,
                    Err(rustix::io::Errno::INTR) => {}
                    Err(errno) => {
                        self.void = true;
                        return Err(WriteError::Source(errno.into()));
                    }
                }
            }
            buffer[filled..now].fill(0);
            self.write_pages(&[IoSlice::new(&buffer[..now])])?;
            done += now as u64;
        }
        Ok(start)
    }

    /// Where it writes to.
    pub fn sink_mut(&mut self) -> &mut S {
        &mut self.sink
    }

    /// Writes manifest, checksums and, last, the header. `sync` makes the file
    /// durable before and after the header, so that a header on the disk means that
    /// all the rest is there. Nothing can be written after it.
    pub fn finish(&mut self, manifest: &Manifest, sync: bool) -> Result<Written, WriteError> {
        let span = self.data_len();
        let packed = match self.stream.take() {
            Some(stream) => {
                let put = |bytes: &[u8], at| self.put_at(&[IoSlice::new(bytes)], bytes.len(), at);
                let (packed, end) = stream.finish(put)?;
                self.end = end;
                Some(packed)
            }
            None => None,
        };
        let region = codec::encode_region(manifest, packed.as_ref())?;
        let data_bytes = self.data_len();
        let table = std::mem::take(&mut self.sums).finish();
        self.put_bytes(&region)?;
        self.put_bytes(&table)?;
        let header = Header::build(
            self.generation,
            data_bytes,
            packed.map(|_| span),
            (region.len() as u64, crc32c::crc32c(&region)),
            (table.len() as u64, crc32c::crc32c(&table)),
        );
        debug_assert_eq!(header.total_len, self.end);
        // What a restorer would refuse is no image: the generation before stays the latest.
        if let Err(error) = check_manifest(manifest, &header) {
            self.void = true;
            return Err(error.into());
        }
        if sync {
            self.sink.sync_data().map_err(WriteError::Sync)?;
        }
        self.end = 0;
        self.put_bytes(&header.encode())?;
        if sync {
            self.sink.sync_data().map_err(WriteError::Sync)?;
        }
        self.void = true;
        Ok(Written {
            bytes: header.total_len,
            data_bytes,
            manifest_bytes: region.len() as u64,
            header_crc: header.crc,
        })
    }

    fn put_bytes(&mut self, bytes: &[u8]) -> Result<(), WriteError> {
        for chunk in bytes.chunks(CHUNK) {
            self.put(&[IoSlice::new(chunk)], chunk.len())?;
        }
        Ok(())
    }

    fn put(&mut self, pieces: &[IoSlice<'_>], bytes: usize) -> Result<(), WriteError> {
        self.put_at(pieces, bytes, self.end)?;
        self.end += bytes as u64;
        Ok(())
    }

    /// One write; anything but complete success voids the image.
    fn put_at(&mut self, pieces: &[IoSlice<'_>], bytes: usize, at: u64) -> Result<(), WriteError> {
        if self.void {
            return Err(WriteError::Void);
        }
        self.void = true;
        let written = self.sink.write_at(pieces, at).map_err(WriteError::Write)?;
        if written != bytes {
            return Err(WriteError::Short {
                asked: bytes as u64,
                written: written as u64,
            });
        }
        self.void = false;
        Ok(())
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// An image in memory that can be told to fail.
    #[derive(Default)]
    pub(crate) struct MemorySink {
        pub bytes: Vec<u8>,
        /// The number of the write that fails, and how.
        pub fail_at: Option<(usize, Option<Errno>)>,
        pub writes: usize,
        pub fail_sync: bool,
    }

    impl ImageSink for &mut MemorySink {
        fn write_at(&mut self, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
            let mut data: Vec<u8> = pieces.iter().flat_map(|p| p.iter().copied()).collect();
            self.writes += 1;
            if let Some((at, how)) = self.fail_at
                && at == self.writes
            {
                match how {
                    Some(errno) => return Err(errno),
                    None => data.truncate(data.len() / 2),
                }
            }
            let end = offset as usize + data.len();
            if self.bytes.len() < end {
                self.bytes.resize(end, 0);
            }
            self.bytes[offset as usize..end].copy_from_slice(&data);
            Ok(data.len())
        }

        fn sync_data(&mut self) -> Io<()> {
            if self.fail_sync {
                return Err(Errno::EIO);
            }
            Ok(())
        }
    }

    /// Under the tracker `full` the contents of a shared object could be out of order. Such a
    /// generation was published, the one before it pruned, and no restore accepted it.
    #[test]
    fn what_a_restore_would_refuse_is_no_image() {
        use crate::image::check::tests::sample_manifest;
        let mut sink = MemorySink::default();
        let mut writer = ImageWriter::new(&mut sink, 5);
        let offset = writer.write_bytes_as_pages(&[7; 8192]).unwrap();
        let mut manifest = sample_manifest(offset);
        manifest.memory.extents.reverse();
        manifest.memory.extents.push(manifest.memory.extents[0]);
        let refused = writer.finish(&manifest, true);
        assert!(matches!(refused, Err(WriteError::Check(_))), "{refused:?}");
        // Without its header it is no image.
        assert!(sink.bytes.iter().take(4096).all(|&byte| byte == 0));
    }

    fn write_sample(sink: &mut MemorySink) -> Result<Written, WriteError> {
        let mut writer = ImageWriter::new(sink, 5);
        let pages = vec![7u8; 3 * CHUNK + 4096];
        assert_eq!(writer.write_pages(&[IoSlice::new(&pages)])?, 4096);
        let at = writer.write_bytes_as_pages(b"tail")?;
        assert_eq!(at, 4096 + pages.len() as u64);
        writer.finish(&Manifest::default(), true)
    }

    #[test]
    fn a_written_image_reads_back() {
        let mut sink = MemorySink::default();
        let written = write_sample(&mut sink).unwrap();
        assert_eq!(written.bytes, sink.bytes.len() as u64);
        let bytes = sink.bytes.as_slice();
        let image = super::super::Image::read(&bytes).unwrap();
        assert_eq!(image.header.generation, 5);
        assert_eq!(image.header.crc, written.header_crc);
        image.verify_data(&bytes, |_, _| {}).unwrap();
    }

    #[test]
    fn pages_can_be_written_again() {
        let mut sink = MemorySink::default();
        let mut writer = ImageWriter::new(&mut sink, 5);
        let mut pages: Vec<u8> = (0..40 * 4096u32).map(|i| (i / 4096) as u8).collect();
        writer.write_pages(&[IoSlice::new(&pages)]).unwrap();
        pages[17 * 4096..19 * 4096].fill(99);
        let (at, new) = (4096 * 18, &pages[17 * 4096..19 * 4096]);
        writer.rewrite_pages(at, new).unwrap();
        for (wrong, len) in [(0, 4096), (4097, 4096), (4096 * 41, 4096), (4096, 100)] {
            assert!(writer.rewrite_pages(wrong, &pages[..len]).is_err());
        }
        writer.finish(&Manifest::default(), true).unwrap();
        let bytes = sink.bytes.as_slice();
        let image = super::super::Image::read(&bytes).unwrap();
        image.verify_data(&bytes, |_, _| {}).unwrap();
        assert_eq!(&bytes[4096..][..pages.len()], &pages[..]);
    }

    #[test]
    fn any_failed_or_short_write_voids_the_image() {
        let mut sink = MemorySink::default();
        write_sample(&mut sink).unwrap();
        for at in 1..=sink.writes {
            for how in [None, Some(Errno::ENOSPC), Some(Errno::EIO)] {
                let mut sink = MemorySink {
                    fail_at: Some((at, how)),
                    ..Default::default()
                };
                assert!(write_sample(&mut sink).is_err());
                assert_eq!(sink.writes, at, "nothing is tried after a failure");
                let bytes = sink.bytes.as_slice();
                assert!(super::super::Image::read(&bytes).is_err());
            }
        }
        let mut sink = MemorySink {
            fail_sync: true,
            ..Default::default()
        };
        assert_eq!(write_sample(&mut sink), Err(WriteError::Sync(Errno::EIO)));
    }

    #[test]
    fn memory_and_files_are_sources() {
        let page = vec![9u8; 2 * 4096];
        let aligned = page.as_ptr() as u64;
        let memfd = rustix::fs::memfd_create("source", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
        rustix::io::pwrite(&memfd, b"hello", 4096).unwrap();
        let mut sink = MemorySink::default();
        let mut writer = ImageWriter::new(&mut sink, 1);
        // SAFETY: `page` lives until the end of the test.
        let first = unsafe { writer.write_memory(&[(aligned, 1), (aligned + 4096, 1)]) }.unwrap();
        let mut buffer = vec![1u8; 4096];
        let second = writer.write_from_file(rustix::fd::AsFd::as_fd(&memfd), 4096, 2, &mut buffer);
        assert_eq!((first, second.unwrap()), (4096, 4096 * 3));
        writer.finish(&Manifest::default(), false).unwrap();
        assert_eq!(&sink.bytes[4096..4096 * 3], &page[..]);
        assert_eq!(&sink.bytes[4096 * 3..4096 * 3 + 6], b"hello\0");
    }
}
