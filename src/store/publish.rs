//! Writing and committing a generation, in an order that a crash at any instant
//! leaves either the old or the new generation as the latest:
//!
//! 1. `gen-N.tmp/` is made, images are written into it (`Pending`)
//! 2. each image is checked against the record and synced
//! 3. `manifest` is written and synced, the directory is synced
//! 4. `gen-N.tmp` becomes `gen-N`, the job's directory is synced
//! 5. the journal record is written and synced: now it is committed
//!
//! A failure anywhere makes the generation void: it is removed, nothing is retried,
//! the generation before stays the latest. Runs in the target's helper thread.

use super::fs::{FileOf, Fs};
use super::generation::{self, GenerationRecord, MANIFEST_NAME};
use super::job::Job;
use super::journal::{JournalError, Record};
use super::{Context, StoreError};
use crate::image::codec::CodecError;
use crate::image::{Image, ImageError};
use std::path::{Path, PathBuf};

/// A generation that is being written.
#[derive(Debug)]
pub struct Pending<F: Fs> {
    pub generation: u64,
    dir: PathBuf,
    files: Vec<F::File>,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PublishError {
    #[error("publish a checkpoint: {0}")]
    Io(#[from] StoreError),
    #[error("publish a checkpoint: {0}")]
    Journal(#[from] JournalError),
    #[error("publish a checkpoint: {}: {error}", path.display())]
    Image { path: PathBuf, error: ImageError },
    #[error("publish a checkpoint: {} is not what was recorded", .0.display())]
    Mismatch(PathBuf),
    #[error("publish a checkpoint: {0}")]
    Codec(#[from] CodecError),
}

impl<F: Fs> Pending<F> {
    /// A new file for the image of the next member; its descriptor is what an
    /// `ImageWriter` or a forked writer writes to.
    pub fn create_member(&mut self, fs: &F) -> Result<&F::File, StoreError> {
        let path = self.member_path(self.files.len());
        let file = fs.create_new(&path).on("create", &path)?;
        self.files.push(file);
        Ok(&self.files[self.files.len() - 1])
    }

    pub fn member(&self, index: usize) -> Option<&F::File> {
        self.files.get(index)
    }

    pub fn member_path(&self, index: usize) -> PathBuf {
        self.dir.join(generation::member_name(index))
    }

    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Throws it away; what cannot be removed now is removed by the next [`Job::begin`].
    pub fn abort(self, fs: &F) {
        let _ = fs.remove_tree(&self.dir);
    }
}

impl<F: Fs> Job<F> {
    /// Begins a generation: an empty `gen-N.tmp`. Needs the job's lock.
    pub fn begin(&self) -> Result<Pending<F>, StoreError> {
        let generation = self.next_generation()?;
        let dir = self.dir.join(generation::tmp_name(generation));
        self.fs.mkdir(&dir).on("create", &dir)?;
        Ok(Pending {
            generation,
            dir,
            files: Vec::new(),
        })
    }

    /// Commits a generation whose images are complete. After an error it is gone and
    /// the previous generation is the latest.
    pub fn publish(
        &mut self,
        pending: Pending<F>,
        record: &GenerationRecord,
    ) -> Result<(), PublishError> {
        let published = self.generation_dir(pending.generation);
        if let Err(error) = self.prepare(&pending, record) {
            pending.abort(&self.fs);
            return Err(error);
        }
        let renamed = (|| {
            self.fs
                .rename(&pending.dir, &published)
                .on("rename", &pending.dir)?;
            self.fs.sync_dir(&self.dir).on("sync", &self.dir)
        })();
        if let Err(error) = renamed {
            pending.abort(&self.fs);
            let _ = self.fs.remove_tree(&published);
            return Err(error.into());
        }
        let record = Record::Committed(record.clone());
        if let Err(error) = self.journal.append(&self.fs, &self.dir, record, true) {
            // The record has been cut off again; if even that failed, the walk back
            // from the newest generation skips a directory that is not there.
            let _ = self.fs.remove_tree(&published);
            return Err(error.into());
        }
        Ok(())
    }

    /// Steps 2 and 3.
    fn prepare(&self, pending: &Pending<F>, record: &GenerationRecord) -> Result<(), PublishError> {
        let fs = &self.fs;
        if record.members.len() != pending.files.len() || record.generation != pending.generation {
            return Err(PublishError::Mismatch(pending.dir.clone()));
        }
        for (index, (member, file)) in record.members.iter().zip(&pending.files).enumerate() {
            let path = pending.member_path(index);
            match Image::read_header(&FileOf(fs, file)) {
                Err(error) => return Err(PublishError::Image { path, error }),
                Ok(header)
                    if header.crc != member.header_crc
                        || header.total_len != member.bytes
                        || header.generation != pending.generation =>
                {
                    return Err(PublishError::Mismatch(path));
                }
                Ok(_) => fs.sync_data(file).on("sync", &path)?,
            }
        }
        let path = pending.dir.join(MANIFEST_NAME);
        let file = fs.create_new(&path).on("create", &path)?;
        fs.write_all(&file, &record.to_file()?, 0)
            .on("write", &path)?;
        fs.sync_data(&file).on("sync", &path)?;
        fs.sync_dir(&pending.dir).on("sync", &pending.dir)?;
        Ok(())
    }
}
