//! Merging: an increment becomes complete (docs/INCREMENTS.md), in slices.
//!
//! 1. what the chain of images holds is composed and copied, block by block and each
//!    compared with its checksum, into `member-K.full.tmp` ([`Merge::slice`])
//! 2. manifest, checksums, fdatasync, header, fdatasync; `member-K.full` by rename, fsync of
//!    the directory ([`Merge::finish`])
//! 3. the journal record `merged`, fdatasync: from here on the generation is complete
//! 4. `member-K.img` is removed; older generations go by the usual rule (`retention`)
//!
//! A crash or a failure before 3 leaves the increment as it is, and a file that the next
//! holder of the job's lock removes. Sources are held open: they may be removed meanwhile.
//! Needs the job's lock. Runs in the helper thread and in `ckpt merge`.

use super::find::{Damage, Link};
use super::fs::{FileOf, Fs};
use super::generation::{self, Merged, MergedMember};
use super::job::Job;
use super::journal::{JournalError, Record};
use super::{Context, StoreError};
use crate::errno::{Errno, Io};
use crate::image::state::{Extent, Manifest};
use crate::image::writer::ImageSink;
use crate::image::{Blocks, Image, ImageError, ImageWriter, PAGE, WriteError};
use std::io::IoSlice;
use std::path::{Path, PathBuf};

/// Bytes read and written at once.
const STEP: u64 = 256 << 10;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MergeError {
    #[error("merge generation {0}: it is gone")]
    Gone(u64),
    #[error("merge generation {0}: it is complete")]
    Complete(u64),
    #[error("merge generation {generation}: {damage}")]
    Damage { generation: u64, damage: Damage },
    #[error("merge: {}: {error}", path.display())]
    Image { path: PathBuf, error: ImageError },
    #[error("merge: {0}")]
    Write(#[from] WriteError),
    #[error("merge: {0}")]
    Io(#[from] StoreError),
    #[error("merge: {0}")]
    Journal(#[from] JournalError),
}

/// A merge under way.
#[derive(Debug)]
pub struct Merge<F: Fs> {
    pub generation: u64,
    members: Vec<Member<F>>,
    /// The member at work.
    at: usize,
    total: u64,
    done: u64,
}

#[derive(Debug)]
struct Member<F: Fs> {
    file: F::File,
    tmp: PathBuf,
    full: PathBuf,
    original: PathBuf,
    sources: Vec<Source<F>>,
    /// The new manifest; offsets are those of the new image.
    manifest: Manifest,
    copies: Vec<Copy>,
    /// The copy at work, and its pages done.
    next: (usize, u64),
    writer: Option<ImageWriter<Queue>>,
}

#[derive(Debug)]
struct Source<F: Fs> {
    path: PathBuf,
    file: F::File,
    blocks: Blocks,
}

/// `npages` pages at `offset` of a source.
#[derive(Debug, Clone, Copy)]
struct Copy {
    file: u32,
    offset: u64,
    npages: u64,
}

/// What the image writer has written and the file has not yet.
#[derive(Debug, Default)]
struct Queue(Vec<(u64, Vec<u8>)>);

impl ImageSink for Queue {
    fn write_at(&mut self, pieces: &[IoSlice<'_>], offset: u64) -> Io<usize> {
        let mut bytes = Vec::with_capacity(pieces.iter().map(|piece| piece.len()).sum());
        pieces
            .iter()
            .for_each(|piece| bytes.extend_from_slice(piece));
        let len = bytes.len();
        self.0.push((offset, bytes));
        Ok(len)
    }

    /// Done by [`Merge::finish`], between the queue's parts.
    fn sync_data(&mut self) -> Io<()> {
        Ok(())
    }
}

impl<F: Fs> Job<F> {
    /// Begins to merge a generation that is an increment.
    pub fn begin_merge(&self, generation: u64) -> Result<Merge<F>, MergeError> {
        let generations = self.generations();
        let record = generations.iter().find(|r| r.generation == generation);
        let record = record.ok_or(MergeError::Gone(generation))?;
        if record.needs().is_none() {
            return Err(MergeError::Complete(generation));
        }
        let found = self
            .open_generation(record, false)
            .map_err(|damage| MergeError::Damage { generation, damage })?;
        let dir = self.generation_dir(generation);
        let mut merge = Merge {
            generation,
            members: Vec::new(),
            at: 0,
            total: 0,
            done: 0,
        };
        for (index, member) in found.members.into_iter().enumerate() {
            let pieces = member.compose().map_err(|error| MergeError::Damage {
                generation,
                damage: error.into(),
            })?;
            let mut manifest = member.image.manifest.clone();
            let mut copies = Vec::new();
            let mut end = PAGE;
            let mut copy = |file, offset, npages: u64| {
                let at = end;
                end += npages * PAGE;
                copies.push(Copy {
                    file,
                    offset,
                    npages,
                });
                at
            };
            let memory = &mut manifest.memory;
            memory.base = None;
            memory.dropped.clear();
            memory.extents.clear();
            let mut border = memory.vmas.iter().map(|vma| vma.start).peekable();
            for piece in &pieces {
                let offset = copy(piece.file, piece.offset, piece.npages);
                let mut new_area = false;
                while border.next_if(|&start| start <= piece.addr).is_some() {
                    new_area = true;
                }
                // They lie side by side in the new file whatever they did before.
                match memory.extents.last_mut() {
                    Some(last) if !new_area && last.addr + last.npages * PAGE == piece.addr => {
                        last.npages += piece.npages;
                    }
                    _ => memory.extents.push(Extent {
                        addr: piece.addr,
                        npages: piece.npages,
                        offset,
                    }),
                }
            }
            // The rest is whole in the newest image.
            let shared = manifest.memory.shared.iter_mut().map(|o| &mut o.extents);
            let contents = manifest.descriptors.content_extents();
            for extent in shared.chain(contents).flatten() {
                extent.offset = copy(0, extent.offset, extent.npages);
            }
            merge.total += copies.iter().map(|c| c.npages * PAGE).sum::<u64>();
            let newest = Link {
                generation,
                path: member.path.clone(),
                file: member.file,
                image: member.image,
            };
            let sources = std::iter::once(newest).chain(member.older);
            let tmp = dir.join(generation::full_tmp_name(index));
            match self.fs.unlink(&tmp) {
                Err(Errno::ENOENT) | Ok(()) => {}
                Err(errno) => Err(errno).on("remove", &tmp)?,
            }
            merge.members.push(Member {
                file: self.fs.create_new(&tmp).on("create", &tmp)?,
                tmp,
                full: dir.join(generation::full_name(index)),
                original: member.path,
                sources: sources
                    .map(|link| Source {
                        path: link.path,
                        file: link.file,
                        blocks: link.image.into_blocks(),
                    })
                    .collect(),
                writer: Some(ImageWriter::with_expected(
                    Queue::default(),
                    generation,
                    end - PAGE,
                )),
                manifest,
                copies,
                next: (0, 0),
            });
        }
        Ok(merge)
    }
}

impl<F: Fs> Merge<F> {
    /// Bytes to be copied, and how many of them are.
    pub fn progress(&self) -> (u64, u64) {
        (self.done, self.total)
    }

    /// How many images it makes.
    pub fn members(&self) -> usize {
        self.members.len()
    }

    /// Copies one step; `true`: all is copied, only [`Merge::finish`] is left.
    pub fn slice(&mut self, fs: &F) -> Result<bool, MergeError> {
        let Some(member) = self.members.get_mut(self.at) else {
            return Ok(true);
        };
        self.done += member.step(fs)?;
        if member.next.0 == member.copies.len() {
            self.at += 1;
        }
        Ok(self.at == self.members.len())
    }

    /// All that is left to be written of the images, but not their names: the part that a child
    /// can do.
    pub fn complete(&mut self, fs: &F) -> Result<Vec<MergedMember>, MergeError> {
        while !self.slice(fs)? {}
        self.members.iter_mut().map(|m| m.complete(fs)).collect()
    }

    /// Makes the generation complete. After an error it is what it was.
    pub fn finish(self, job: &mut Job<F>, time_ns: u64) -> Result<Merged, MergeError> {
        self.finish_with(job, time_ns, None)
    }

    /// The same; `complete` is what [`Merge::complete`] said to a child.
    pub fn finish_with(
        mut self,
        job: &mut Job<F>,
        time_ns: u64,
        complete: Option<Vec<MergedMember>>,
    ) -> Result<Merged, MergeError> {
        match self.publish(job, time_ns, complete) {
            Ok(merged) => {
                for member in &self.members {
                    // Else the next holder of the lock does it.
                    let _ = job.fs.unlink(&member.original);
                }
                Ok(merged)
            }
            Err(error) => {
                self.abort(&job.fs);
                Err(error)
            }
        }
    }

    fn publish(
        &mut self,
        job: &mut Job<F>,
        time_ns: u64,
        complete: Option<Vec<MergedMember>>,
    ) -> Result<Merged, MergeError> {
        let generations = job.generations();
        let record = generations.iter().find(|r| r.generation == self.generation);
        match record.map(|r| r.needs()) {
            None => return Err(MergeError::Gone(self.generation)),
            Some(None) => return Err(MergeError::Complete(self.generation)),
            Some(Some(_)) => {}
        }
        let members = match complete {
            Some(members) => members,
            None => self.complete(&job.fs)?,
        };
        let merged = Merged {
            generation: self.generation,
            time_ns,
            members,
        };
        let dir = job.generation_dir(self.generation);
        for member in &self.members {
            job.fs
                .rename(&member.tmp, &member.full)
                .on("rename", &member.tmp)?;
        }
        job.fs.sync_dir(&dir).on("sync", &dir)?;
        let record = Record::Merged(merged.clone());
        job.journal.append(&job.fs, &job.dir, record, true)?;
        Ok(merged)
    }

    /// Throws it away; what cannot be removed now is removed by the next holder of the
    /// job's lock. A complete image that has its name already stays for that holder too:
    /// whether a record that could not be synced counts is the disk's choice.
    pub fn abort(self, fs: &F) {
        for member in &self.members {
            let _ = fs.unlink(&member.tmp);
        }
    }
}

impl<F: Fs> Member<F> {
    /// Copies up to [`STEP`] bytes and returns how many.
    fn step(&mut self, fs: &F) -> Result<u64, MergeError> {
        let Some(writer) = &mut self.writer else {
            return Ok(0);
        };
        let mut buffer = vec![0u8; STEP as usize];
        let mut filled = 0u64;
        while filled < STEP {
            let (index, pages) = self.next;
            let Some(copy) = self.copies.get(index) else {
                break;
            };
            let now = ((copy.npages - pages) * PAGE).min(STEP - filled);
            let source = &mut self.sources[copy.file as usize];
            let part = &mut buffer[filled as usize..(filled + now) as usize];
            let offset = copy.offset + pages * PAGE;
            let from = FileOf(fs, &source.file);
            let read = source.blocks.read(&from, part, offset);
            read.map_err(|error| MergeError::Image {
                path: source.path.clone(),
                error,
            })?;
            filled += now;
            let pages = pages + now / PAGE;
            self.next = if pages == copy.npages {
                (index + 1, 0)
            } else {
                (index, pages)
            };
        }
        let at = writer.write_pages(&[IoSlice::new(&buffer[..filled as usize])])?;
        let queue = std::mem::take(&mut writer.sink_mut().0);
        write_out(fs, &self.file, &self.tmp, queue)?;
        // The disk begins now, or the sync at the end takes long.
        fs.start_writing(&self.file, at, filled);
        Ok(filled)
    }

    /// Everything but the name.
    fn complete(&mut self, fs: &F) -> Result<MergedMember, MergeError> {
        // Taken: a second call is a merge that has failed.
        let mut writer = self.writer.take().ok_or(WriteError::Void)?;
        let written = writer.finish(&self.manifest, false)?;
        let mut parts = std::mem::take(&mut writer.sink_mut().0);
        // The header is the last write.
        let header = parts.pop().into_iter().collect();
        write_out(fs, &self.file, &self.tmp, parts)?;
        fs.sync_data(&self.file).on("sync", &self.tmp)?;
        write_out(fs, &self.file, &self.tmp, header)?;
        fs.sync_data(&self.file).on("sync", &self.tmp)?;
        // What the file says of itself, manifest included, before it takes another's place.
        let image = Image::read(&FileOf(fs, &self.file)).map_err(|error| MergeError::Image {
            path: self.tmp.clone(),
            error,
        })?;
        if image.header.crc != written.header_crc {
            return Err(WriteError::Void.into());
        }
        Ok(MergedMember {
            bytes: written.bytes,
            header_crc: written.header_crc,
        })
    }
}

fn write_out<F: Fs>(
    fs: &F,
    file: &F::File,
    path: &Path,
    parts: Vec<(u64, Vec<u8>)>,
) -> Result<(), StoreError> {
    for (offset, bytes) in parts {
        fs.write_all(file, &bytes, offset).on("write", path)?;
    }
    Ok(())
}
