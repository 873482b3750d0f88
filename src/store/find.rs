//! Finding the generation to go on from: the newest one whose metadata verifies,
//! walking back over damaged ones and saying so.
//!
//! Runs in the constructor of a starting target and in the command.

use super::fs::{FileOf, Fs};
use super::generation::{GenerationRecord, RecordError, member_name};
use super::job::Job;
use super::{Context, StoreError};
use crate::config::Resume;
use crate::image::{Image, ImageError};
use std::path::PathBuf;

/// A generation that can be restored as far as the store can tell.
#[derive(Debug)]
pub struct Found<F: Fs> {
    pub record: GenerationRecord,
    pub members: Vec<FoundMember<F>>,
}

/// The open image of one member, metadata verified.
#[derive(Debug)]
pub struct FoundMember<F: Fs> {
    pub path: PathBuf,
    pub file: F::File,
    pub image: Image,
}

/// A generation that was passed over.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Skipped {
    pub generation: u64,
    pub reason: Damage,
}

impl std::fmt::Display for Skipped {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "generation {}: {}", self.generation, self.reason)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Damage {
    #[error(transparent)]
    Io(#[from] StoreError),
    #[error("{}: {error}", path.display())]
    Image { path: PathBuf, error: ImageError },
    #[error("{} is not the image that was committed", .0.display())]
    OtherImage(PathBuf),
    #[error(transparent)]
    Record(#[from] RecordError),
    #[error("it needs its parent, generation {0}, which is gone")]
    NoParent(u64),
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FindError {
    #[error("there is no generation {generation} ({available})")]
    NoGeneration { generation: u64, available: String },
    #[error("there is no generation with checkpoint id {0}")]
    NoId(i32),
    #[error("{0}")]
    Damaged(Skipped),
    #[error("none of the {count} generations can be used; the newest: {newest}")]
    AllDamaged { count: usize, newest: Skipped },
    #[error(transparent)]
    Io(#[from] StoreError),
}

/// What was found, and what was passed over on the way.
pub type Search<F> = (Option<Found<F>>, Vec<Skipped>);

impl<F: Fs> Job<F> {
    /// The generation that `resume` names; `None` if the job has none at all. With
    /// `verify_data` the page data is verified too.
    pub fn find(&self, resume: Resume, verify_data: bool) -> Result<Search<F>, FindError> {
        let mut candidates = self.candidates()?;
        match resume {
            Resume::Never => return Ok((None, Vec::new())),
            Resume::Auto => {}
            Resume::Generation(generation) => {
                let Some(record) = candidates.iter().find(|r| r.generation == generation) else {
                    let numbers = candidates.iter().map(|r| r.generation);
                    let available = list_numbers(numbers);
                    return Err(FindError::NoGeneration {
                        generation,
                        available,
                    });
                };
                return match self.open_generation(record, verify_data) {
                    Ok(found) => Ok((Some(found), Vec::new())),
                    Err(reason) => Err(FindError::Damaged(Skipped { generation, reason })),
                };
            }
            Resume::Id(id) => {
                candidates.retain(|r| r.id == id);
                if candidates.is_empty() {
                    return Err(FindError::NoId(id));
                }
            }
        }
        let mut skipped: Vec<Skipped> = Vec::new();
        for record in candidates.iter().rev() {
            match self.open_generation(record, verify_data) {
                Ok(found) => return Ok((Some(found), skipped)),
                Err(reason) => skipped.push(Skipped {
                    generation: record.generation,
                    reason,
                }),
            }
        }
        match skipped.first() {
            None => Ok((None, skipped)),
            Some(newest) => Err(FindError::AllDamaged {
                count: skipped.len(),
                newest: newest.clone(),
            }),
        }
    }

    /// Ascending. The journal decides; when it is damaged, so that a committed
    /// generation may be missing from it, complete directories that it does not know
    /// count as well (each was durable before its journal record was written).
    fn candidates(&self) -> Result<Vec<GenerationRecord>, StoreError> {
        let known = self.journal.generations();
        let mut records: Vec<GenerationRecord> = known.into_iter().cloned().collect();
        let lost = self.journal.is_damaged() || self.journal.records().is_empty();
        if lost {
            for (generation, tmp) in self.directories()? {
                let recorded = records.iter().any(|r| r.generation == generation);
                if tmp || recorded {
                    continue;
                }
                let dir = self.generation_dir(generation);
                if let Ok(record) = GenerationRecord::read(&self.fs, &dir)
                    && record.generation == generation
                {
                    records.push(record);
                }
            }
            records.sort_by_key(|r| r.generation);
        }
        Ok(records)
    }

    /// Opens one generation and verifies it.
    pub fn open_generation(
        &self,
        record: &GenerationRecord,
        verify_data: bool,
    ) -> Result<Found<F>, Damage> {
        self.open_with_progress(record, verify_data, |_, _| {})
    }

    /// The same, with `progress(done, total)` over the page data in bytes.
    pub fn open_with_progress(
        &self,
        record: &GenerationRecord,
        verify_data: bool,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Found<F>, Damage> {
        let dir = self.generation_dir(record.generation);
        let mut members = Vec::new();
        for (index, member) in record.members.iter().enumerate() {
            let path = dir.join(member_name(index));
            let file = self.fs.open(&path).on("open", &path)?;
            let source = FileOf(&self.fs, &file);
            let damage = |error| Damage::Image {
                path: path.clone(),
                error,
            };
            let image = Image::read(&source).map_err(damage)?;
            if image.header.crc != member.header_crc
                || image.header.total_len != member.bytes
                || image.header.generation != record.generation
            {
                return Err(Damage::OtherImage(path));
            }
            if verify_data {
                image.verify_data(&source, &mut progress).map_err(damage)?;
            }
            members.push(FoundMember { path, file, image });
        }
        if GenerationRecord::read(&self.fs, &dir)? != *record {
            return Err(Damage::Record(RecordError::Damaged));
        }
        Ok(Found {
            record: record.clone(),
            members,
        })
    }
}

fn list_numbers(numbers: impl Iterator<Item = u64>) -> String {
    let words: Vec<String> = numbers.map(|n| n.to_string()).collect();
    if words.is_empty() {
        return "there are none".to_owned();
    }
    format!("there are: {}", words.join(", "))
}
