//! Pages on their way into the image: what is zero, what is written again in its place,
//! what is appended; and in the end where the latest copy of each page lies.
//!
//! Pages come in *passes*, mostly with ascending addresses, no page twice in one pass: a
//! round of pre-copy, the residue of the stop. Used by the helper thread and by the forked writer, which goes
//! on with the state that it inherits.

use super::SnapshotError;
use crate::agent::collect::memory::{PAGE, is_zero};
use crate::agent::track::{Change, Dirty};
use crate::image::state::{Extent, OBJECTS_AT};
use crate::image::writer::{ImageSink, ImageWriter};
use std::io::IoSlice;

/// Pages handed over at once: fits the second-level cache.
pub const BATCH_PAGES: u64 = 128;

/// Contents of whole pages at `addr`.
#[derive(Clone, Copy)]
pub struct Chunk<'a> {
    pub addr: u64,
    pub data: &'a [u8],
    /// Where the image holds nothing there is a file's page: zeros are content too.
    pub over_file: bool,
}

/// The image's page data and where each page of memory lies in it.
pub struct Pages<S> {
    pub writer: ImageWriter<S>,
    /// The latest copy of each page; ascending, disjoint.
    stored: Vec<Extent>,
    /// What the present pass has appended.
    added: Vec<Extent>,
    /// Ranges of `stored` that the present pass has found to hold nothing any more.
    gone: Vec<(u64, u64)>,
    /// The extent of `stored` that was met last.
    next: usize,
    /// Pages written, those written again included.
    pub written: u64,
}

/// What becomes of a page.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    Nowhere,
    Again(u64),
    Append,
}

impl<S: ImageSink> Pages<S> {
    pub fn new(writer: ImageWriter<S>) -> Pages<S> {
        Pages {
            writer,
            stored: Vec::new(),
            added: Vec::new(),
            gone: Vec::new(),
            next: 0,
            written: 0,
        }
    }

    /// Where the page lies, and how many that follow lie behind it.
    fn place(&mut self, addr: u64) -> Option<(u64, u64)> {
        let end = |e: &Extent| e.addr + e.npages * PAGE;
        let near = |k: usize| {
            if k > self.stored.len() {
                return false;
            }
            let before = k.checked_sub(1).and_then(|k| self.stored.get(k));
            before.is_none_or(|e| end(e) <= addr)
                && self.stored.get(k).is_none_or(|e| end(e) > addr)
        };
        // Mostly the same extent or the next one; the writer of `priority` jumps.
        self.next = [self.next, self.next + 1]
            .into_iter()
            .find(|&k| near(k))
            .unwrap_or_else(|| self.stored.partition_point(|e| end(e) <= addr));
        let e = self.stored.get(self.next).filter(|e| e.addr <= addr)?;
        let skip = (addr - e.addr) / PAGE;
        Some((e.offset + skip * PAGE, e.npages - skip))
    }

    /// Takes at most [`BATCH_PAGES`] pages or so.
    pub fn put(&mut self, chunks: &[Chunk<'_>]) -> Result<(), SnapshotError> {
        let mut fresh: Vec<IoSlice<'_>> = Vec::new();
        let mut end = self.writer.position();
        for chunk in chunks {
            let npages = chunk.data.len() as u64 / PAGE;
            let mut at = 0;
            while at < npages {
                let way = self.way(chunk, at);
                let mut len = 1;
                while at + len < npages {
                    let next = self.way(chunk, at + len);
                    let same = match (way, next) {
                        (Way::Again(a), Way::Again(b)) => a + len * PAGE == b,
                        _ => way == next,
                    };
                    if !same {
                        break;
                    }
                    len += 1;
                }
                let addr = chunk.addr + at * PAGE;
                let data = &chunk.data[(at * PAGE) as usize..((at + len) * PAGE) as usize];
                match way {
                    Way::Nowhere => self.forget(addr, addr + len * PAGE),
                    Way::Again(offset) => {
                        self.writer.rewrite_pages(offset, data)?;
                        self.written += len;
                    }
                    Way::Append => {
                        if !self.writer.can_rewrite() {
                            // The copy that is there already counts no longer.
                            self.forget(addr, addr + len * PAGE);
                        }
                        push(
                            &mut self.added,
                            Extent {
                                addr,
                                npages: len,
                                offset: end,
                            },
                        );
                        end += len * PAGE;
                        fresh.push(IoSlice::new(data));
                        self.written += len;
                    }
                }
                at += len;
            }
        }
        if !fresh.is_empty() {
            self.writer.write_pages(&fresh)?;
        }
        Ok(())
    }

    fn way(&mut self, chunk: &Chunk<'_>, page: u64) -> Way {
        let start = (page * PAGE) as usize;
        if !chunk.over_file && is_zero(&chunk.data[start..start + PAGE as usize]) {
            return Way::Nowhere;
        }
        match self.place(chunk.addr + page * PAGE) {
            Some((offset, _)) if self.writer.can_rewrite() => Way::Again(offset),
            _ => Way::Append,
        }
    }

    /// The image holds nothing for this range any more.
    pub fn forget(&mut self, start: u64, end: u64) {
        if self.place(start).is_none() && self.stored.get(self.next).is_none_or(|e| e.addr >= end) {
            return;
        }
        match self.gone.last_mut() {
            Some(last) if last.1 == start => last.1 = end,
            _ => self.gone.push((start, end)),
        }
    }

    /// Before a pass: nothing is known of what was stored of memory any more. (Contents of
    /// objects are compared once more at the stop.)
    pub fn forget_all(&mut self) {
        self.stored.retain(|e| e.addr >= OBJECTS_AT);
    }

    /// Before a pass: the image holds nothing of what is absent now.
    pub fn drop_absent(&mut self, dirty: &Dirty) {
        if self.stored.is_empty() {
            return;
        }
        let absent = dirty.runs().iter().filter(|r| r.change == Change::Absent);
        let ranges: Vec<(u64, u64)> = absent.map(|r| (r.start, r.end)).collect();
        if !ranges.is_empty() {
            let old = std::mem::take(&mut self.stored);
            subtract(&old, &ranges, &mut self.stored);
        }
    }

    /// What the pass has brought takes effect.
    pub fn end_pass(&mut self) {
        self.next = 0;
        if !self.gone.is_empty() {
            let old = std::mem::take(&mut self.stored);
            let mut gone = std::mem::take(&mut self.gone);
            gone.sort_unstable();
            subtract(&old, &gone, &mut self.stored);
        }
        let mut added = std::mem::take(&mut self.added);
        if !added.is_sorted_by_key(|e| e.addr) {
            added.sort_unstable_by_key(|e| e.addr);
        }
        if self.stored.is_empty() {
            self.stored = added;
        } else if !added.is_empty() {
            let old = std::mem::take(&mut self.stored);
            self.stored.reserve(old.len() + added.len());
            let (mut a, mut b) = (old.into_iter().peekable(), added.into_iter().peekable());
            loop {
                let first = match (a.peek(), b.peek()) {
                    (Some(x), Some(y)) if x.addr < y.addr => a.next(),
                    (_, Some(_)) => b.next(),
                    _ => a.next(),
                };
                let Some(extent) = first else { break };
                push(&mut self.stored, extent);
            }
        }
    }

    /// The writer, and where the latest copy of each page lies.
    pub fn parts(&mut self) -> (&mut ImageWriter<S>, &[Extent]) {
        (&mut self.writer, &self.stored)
    }
}

/// Appends an extent, joined to the last one where both memory and file allow.
pub fn push(extents: &mut Vec<Extent>, e: Extent) {
    if let Some(last) = extents.last_mut()
        && last.addr + last.npages * PAGE == e.addr
        && last.offset + last.npages * PAGE == e.offset
    {
        last.npages += e.npages;
        return;
    }
    extents.push(e);
}

/// The part of an extent inside `start..end`.
pub fn clip(e: &Extent, start: u64, end: u64) -> Option<Extent> {
    let (from, to) = (e.addr.max(start), (e.addr + e.npages * PAGE).min(end));
    (from < to).then(|| Extent {
        addr: from,
        npages: (to - from) / PAGE,
        offset: e.offset + (from - e.addr),
    })
}

/// `old` without the ranges; both ascending and disjoint.
fn subtract(old: &[Extent], ranges: &[(u64, u64)], out: &mut Vec<Extent>) {
    let mut next = 0;
    for e in old {
        let end = e.addr + e.npages * PAGE;
        let mut at = e.addr;
        while next < ranges.len() && ranges[next].1 <= at {
            next += 1;
        }
        for &(from, to) in ranges[next..].iter().take_while(|r| r.0 < end) {
            out.extend(clip(e, at, from.max(at)));
            at = at.max(to.min(end));
        }
        out.extend(clip(e, at, end));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Image;
    use crate::image::pack::Method;
    use crate::image::state::Manifest;
    use crate::image::writer::tests::MemorySink;

    const SPACE: u64 = 64;

    fn page(value: u8) -> [u8; PAGE as usize] {
        [value; PAGE as usize]
    }

    /// Random passes against a table of pages.
    #[test]
    fn the_latest_copy_of_each_page_counts() {
        let mut seed = 0x1234_5678_9abc_def1u64;
        let mut random = |below: u64| {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            seed % below
        };
        for round in 0..400 {
            let mut sink = MemorySink::default();
            let mut writer = ImageWriter::new(&mut sink, 1);
            if round % 4 == 0 {
                writer = writer.packed(Method::Lz4);
            }
            let mut pages = Pages::new(writer);
            let mut model = [None; SPACE as usize];
            for _ in 0..random(6) {
                let mut at = random(9);
                let mut later: Vec<(u64, Vec<u8>, bool)> = Vec::new();
                while at < SPACE {
                    let len = (1 + random(7)).min(SPACE - at);
                    let over_file = random(2) == 0;
                    let values: Vec<u8> = (0..len).map(|_| random(3) as u8).collect();
                    let data: Vec<u8> = values.iter().flat_map(|&v| page(v)).collect();
                    let addr = at * PAGE;
                    if random(5) == 0 {
                        pages.forget(addr, addr + len * PAGE);
                        model[at as usize..(at + len) as usize].fill(None);
                    } else {
                        let chunk = Chunk {
                            addr,
                            data: &data,
                            over_file,
                        };
                        // Some passes come in another order.
                        if round % 3 == 0 && random(2) == 0 {
                            later.push((addr, data.clone(), over_file));
                        } else {
                            pages.put(&[chunk]).unwrap();
                        }
                        for (k, &v) in values.iter().enumerate() {
                            let held = v != 0 || over_file;
                            model[at as usize + k] = held.then_some(v);
                        }
                    }
                    at += len + random(9);
                }
                for (addr, data, over_file) in later.iter().rev() {
                    let chunk = Chunk {
                        addr: *addr,
                        data,
                        over_file: *over_file,
                    };
                    pages.put(&[chunk]).unwrap();
                }
                pages.end_pass();
            }
            let stored = pages.parts().1.to_vec();
            let finished = pages.writer.finish(&Manifest::default(), false);
            finished.unwrap();
            drop(pages);
            let bytes = sink.bytes.as_slice();
            let mut data = Image::read(&bytes).unwrap().into_blocks();
            let mut found = [None; SPACE as usize];
            for e in &stored {
                for k in 0..e.npages {
                    let mut held = page(0);
                    data.read(&bytes, &mut held, e.offset + k * PAGE).unwrap();
                    let value = held[0];
                    let place = &mut found[(e.addr / PAGE + k) as usize];
                    assert_eq!(place.replace(value), None);
                }
            }
            assert_eq!(found, model);
            assert!(stored.windows(2).all(|w| w[0].addr < w[1].addr));
        }
    }
}
