//! Saving pre-images of blocks into the shadow file, before they are overwritten or
//! cut off. Under the recorder's lock, in the program's threads inside hooks.
//!
//! A few blocks are read straight into the mapped shadow file. Large ranges go from
//! file to file (reflink where the file system can) by descriptors that are ours for a
//! moment. Zeros need no data: holes stay holes.

use super::format::{Encoder, TAG_BLOCKS};
use super::index::BLOCK;
use super::sys::{self, CPath, Fd, Sys, point};
use super::writer::Writer;
use super::{FileRef, Id};

/// From here on the file-to-file way is cheaper.
const LARGE: u64 = 256 << 10;

/// A source of pre-images: the program's descriptor, or one of ours.
struct Source {
    fd: i32,
    own: Option<Fd>,
}

impl Source {
    /// `own`: the position will be moved, and O_DIRECT is in the way.
    fn of(file: &FileRef, path: &[u8], own: bool) -> Sys<Source> {
        if let (Some(fd), false) = (file.fd, own) {
            return Ok(Source { fd, own: None });
        }
        let opened = match file.fd.or(file.any_fd) {
            Some(fd) => sys::reopen_high(fd, libc::O_RDONLY),
            None => Err(libc::EBADF),
        };
        let fd = opened.or_else(|_| open_same(path, &file.stat.id))?;
        Ok(Source {
            fd: fd.0,
            own: Some(fd),
        })
    }
}

/// Opens the path for reading if it is that inode.
pub fn open_same(path: &[u8], id: &Id) -> Sys<Fd> {
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    let fd = sys::open_high(&CPath::new(&[path])?, flags, 0)?;
    if sys::fstat(fd.0)?.id == *id {
        Ok(fd)
    } else {
        Err(libc::ESTALE)
    }
}

/// What a saving is about.
pub struct Saving<'a> {
    pub writer: &'a mut Writer,
    pub scratch: &'a mut Encoder,
    pub row: u32,
    pub file: &'a FileRef<'a>,
    pub path: &'a [u8],
}

impl Saving<'_> {
    /// Saves bytes `start..end` (`start` at a block's beginning).
    pub fn save(&mut self, start: u64, end: u64) -> Sys<()> {
        if end - start >= LARGE {
            self.save_large(start, end)
        } else {
            self.save_small(start, end)
        }
    }

    fn record(&mut self, start: u64, end: u64, shadow: Option<u64>) -> Sys<()> {
        if start >= end {
            return Ok(());
        }
        let e = self.scratch.begin(TAG_BLOCKS);
        e.u32(self.row).u64(start).u64(end - start);
        match shadow {
            Some(at) => e.u8(1).u64(at),
            None => e.u8(0),
        };
        match self.scratch.bytes() {
            Some(bytes) if self.writer.append(bytes) => Ok(()),
            _ => Err(libc::ENOSPC),
        }
    }

    fn save_small(&mut self, start: u64, end: u64) -> Sys<()> {
        let len = end - start;
        let room = len.next_multiple_of(BLOCK);
        let at = self.writer.shadow_room(room)?;
        point();
        let mut source = Source::of(self.file, self.path, false)?;
        let mut got = sys::pread_all(source.fd, at, len as usize, start);
        if got == Err(libc::EINVAL) && source.own.is_none() {
            // O_DIRECT with sizes of its own.
            source = Source::of(self.file, self.path, true)?;
            got = sys::pread_all(source.fd, at, len as usize, start);
        }
        let got = got? as u64;
        // SAFETY: `room` bytes from `at` are mapped, and ours.
        let bytes = unsafe { std::slice::from_raw_parts_mut(at, room as usize) };
        if let Some(rest) = bytes.get_mut(got as usize..) {
            rest.fill(0);
        }
        let base = self.writer.shadow_pos;
        // Where the data end: zeros at the end take no room.
        let mut used = 0;
        let mut run: Option<(u64, bool)> = None;
        for (k, block) in bytes.chunks(BLOCK as usize).enumerate() {
            let k = k as u64;
            let zero = is_zero(block);
            if !zero {
                used = (k + 1) * BLOCK;
            }
            match run {
                Some((_, was)) if was == zero => {}
                Some((from, was)) => {
                    // Room first: a record speaks only of what nobody overwrites.
                    self.writer.shadow_pos = base + used;
                    let shadow = (!was).then_some(base + from);
                    self.record(start + from, start + k * BLOCK, shadow)?;
                    run = Some((k * BLOCK, zero));
                }
                None => run = Some((0, zero)),
            }
        }
        self.writer.shadow_pos = base + used;
        if let Some((from, was)) = run {
            self.record(start + from, end, (!was).then_some(base + from))?;
        }
        Ok(())
    }

    fn save_large(&mut self, start: u64, end: u64) -> Sys<()> {
        let source = Source::of(self.file, self.path, true)?;
        let to = self.writer.shadow_file()?;
        let mut pos = start;
        while pos < end {
            let data = match sys::seek(source.fd, pos, libc::SEEK_DATA) {
                Ok(data) => data.min(end),
                Err(libc::ENXIO) => end,
                Err(_) => pos,
            };
            self.record(pos, data, None)?;
            if data >= end {
                break;
            }
            let hole = match sys::seek(source.fd, data, libc::SEEK_HOLE) {
                Ok(hole) if hole > data => hole.min(end),
                _ => end,
            };
            // The same place within a block as in the source, for reflinks.
            let at = self.writer.shadow_pos.next_multiple_of(BLOCK) + data % BLOCK;
            let len = hole - data;
            point();
            sys::copy_sparse(source.fd, data, hole, to.0, at)?;
            // The file must reach as far as the record says, whatever was copied.
            if sys::fstat(to.0)?.size < at + len {
                sys::ftruncate(to.0, at + len)?;
            }
            if self.writer.is_power() {
                sys::fdatasync(to.0)?;
            }
            self.writer.shadow_pos = (at + len).next_multiple_of(BLOCK);
            self.record(data, hole, Some(at))?;
            pos = hole;
        }
        Ok(())
    }
}

fn is_zero(block: &[u8]) -> bool {
    // SAFETY: any bytes are valid words.
    let (head, words, tail) = unsafe { block.align_to::<u64>() };
    words.iter().all(|w| *w == 0) && head.iter().chain(tail).all(|b| *b == 0)
}
