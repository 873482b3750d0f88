//! Finding the generation to go on from: the newest one whose metadata verifies,
//! walking back over damaged ones and saying so.
//!
//! Runs in the constructor of a starting target and in the command.

use super::fs::{FileOf, Fs};
use super::generation::{GenerationKind, GenerationRecord, RecordError, full_name, member_name};
use super::job::Job;
use super::{Context, StoreError};
use crate::config::Resume;
use crate::errno::Errno;
use crate::image::chain::{self, ChainError, Sourced};
use crate::image::state::{Base, MemoryState};
use crate::image::{Image, ImageError};
use std::borrow::Cow;
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
    /// The images that this one stands on, each on the next; none for a complete image.
    pub older: Vec<Link<F>>,
}

/// An older image of a chain.
#[derive(Debug)]
pub struct Link<F: Fs> {
    pub generation: u64,
    pub path: PathBuf,
    pub file: F::File,
    pub image: Image,
}

impl<F: Fs> FoundMember<F> {
    /// The files and images of the chain, newest first, as `Sourced::file` counts them.
    pub fn chain(&self) -> impl Iterator<Item = (&F::File, &Image)> {
        let older = self.older.iter().map(|link| (&link.file, &link.image));
        std::iter::once((&self.file, &self.image)).chain(older)
    }

    /// Where each page of the member's memory lies.
    pub fn compose(&self) -> Result<Vec<Sourced>, ChainError> {
        let chain: Vec<&MemoryState> = self
            .chain()
            .map(|(_, image)| &image.manifest.memory)
            .collect();
        chain::compose(&chain)
    }
}

/// Which page data is compared with its checksums.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verify {
    None,
    /// That of the generation's own images.
    Own,
    /// That of every image it stands on as well.
    Chain,
}

impl Verify {
    pub fn all_if(wanted: bool) -> Verify {
        if wanted { Verify::Chain } else { Verify::None }
    }
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
    #[error("it stands on generation {0}, which is gone")]
    NoBase(u64),
    #[error("it stands on another generation {0} than the one that is there")]
    OtherBase(u64),
    #[error("it stands on generation {generation}: {damage}")]
    Base {
        generation: u64,
        damage: Box<Damage>,
    },
    #[error(transparent)]
    Chain(#[from] ChainError),
    #[error("its image is {0}, its record says otherwise")]
    Kind(&'static str),
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

    /// The latest last. The journal decides; when it is damaged, so that a committed
    /// generation may be missing from it, complete directories that it does not know
    /// count as well (each was durable before its journal record was written).
    fn candidates(&self) -> Result<Vec<Cow<'_, GenerationRecord>>, StoreError> {
        let known = self.journal.order();
        let mut records: Vec<Cow<GenerationRecord>> =
            known.into_iter().map(Cow::Borrowed).collect();
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
                    records.push(Cow::Owned(record));
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
        self.open_with_progress(record, Verify::all_if(verify_data), |_, _| {})
    }

    /// The same, with `progress(done, total)` over the page data of each image in bytes.
    pub fn open_with_progress(
        &self,
        record: &GenerationRecord,
        verify: Verify,
        mut progress: impl FnMut(u64, u64),
    ) -> Result<Found<F>, Damage> {
        let mut members = Vec::new();
        for index in 0..record.members.len() {
            let own = self.open_image(record, index, Wanted::All)?;
            if verify != Verify::None {
                own.verify(&self.fs, &mut progress)?;
            }
            let mut base = own.image.manifest.memory.base;
            match (record.needs(), &base) {
                (None, None) => {}
                // The record of its merging is lost, the complete image is not.
                (Some(_), None) if own.complete => {}
                (Some(needed), Some(base)) if base.generation == needed => {}
                (_, Some(_)) => return Err(Damage::Kind("an increment")),
                (_, None) => return Err(Damage::Kind("complete")),
            }
            let mut older: Vec<Link<F>> = Vec::new();
            while let Some(next) = base {
                let link = self.open_base(next, index)?;
                if verify == Verify::Chain {
                    let generation = next.generation;
                    let verified = link.verify(&self.fs, &mut progress);
                    verified.map_err(|damage| Damage::of_base(generation, damage))?;
                }
                base = link.image.manifest.memory.base;
                older.push(Link {
                    generation: next.generation,
                    path: link.path,
                    file: link.file,
                    image: link.image,
                });
            }
            members.push(FoundMember {
                path: own.path,
                file: own.file,
                image: own.image,
                older,
            });
        }
        self.check_directory(record)?;
        Ok(Found {
            record: record.clone(),
            members,
        })
    }

    /// The generation's own copy of its record says the same.
    fn check_directory(&self, record: &GenerationRecord) -> Result<(), Damage> {
        let dir = self.generation_dir(record.generation);
        let mut there = GenerationRecord::read(&self.fs, &dir)?;
        // That came later.
        there.merged.clone_from(&record.merged);
        if there != *record {
            return Err(Damage::Record(RecordError::Damaged));
        }
        Ok(())
    }

    /// An image that another one stands on.
    fn open_base(&self, base: Base, index: usize) -> Result<Opened<F>, Damage> {
        let generation = base.generation;
        let record = self
            .record_of(generation)
            .ok_or(Damage::NoBase(generation))?;
        let opened = self
            .open_image(&record, index, Wanted::Places)
            .map_err(|damage| Damage::of_base(generation, damage))?;
        let fits =
            record.is_image(index, base.header_crc) || opened.image.header.crc == base.header_crc;
        if !fits {
            return Err(Damage::OtherBase(generation));
        }
        Ok(opened)
    }

    /// As the journal, or where that is damaged the directory, knows it.
    fn record_of(&self, generation: u64) -> Option<Cow<'_, GenerationRecord>> {
        if let Some(record) = self.journal.generation(generation) {
            return Some(Cow::Borrowed(record));
        }
        let lost = self.journal.is_damaged() || self.journal.records().is_empty();
        let record = GenerationRecord::read(&self.fs, &self.generation_dir(generation));
        record
            .ok()
            .filter(|record| lost && record.generation == generation)
            .map(Cow::Owned)
    }

    /// The image of a member: the complete one when it has been merged.
    fn open_image(
        &self,
        record: &GenerationRecord,
        index: usize,
        wanted: Wanted,
    ) -> Result<Opened<F>, Damage> {
        let dir = self.generation_dir(record.generation);
        let member = record.members.get(index).ok_or(RecordError::Damaged)?;
        let merged = record.merged.as_ref().and_then(|m| m.members.get(index));
        let original = || {
            let path = dir.join(member_name(index));
            let opened = self.open_file(path, record.generation, false, wanted)?;
            let header = &opened.image.header;
            if (header.crc, header.total_len) != (member.header_crc, member.bytes) {
                return Err(Damage::OtherImage(opened.path));
            }
            Ok(opened)
        };
        let complete =
            || self.open_file(dir.join(full_name(index)), record.generation, true, wanted);
        match merged {
            Some(merged) => {
                let opened = complete()?;
                let header = &opened.image.header;
                if (header.crc, header.total_len) != (merged.header_crc, merged.bytes) {
                    return Err(Damage::OtherImage(opened.path));
                }
                Ok(opened)
            }
            None => original().or_else(|damage| {
                // An image that another has taken the place of is only removed behind the record
                // of that: where the record is lost, the file (durable before it got its
                // name) speaks for itself.
                let gone = matches!(&damage, Damage::Io(error) if error.errno == Errno::ENOENT);
                match record.kind {
                    GenerationKind::Increment if gone => complete().map_err(|_| damage),
                    _ => Err(damage),
                }
            }),
        }
    }

    fn open_file(
        &self,
        path: PathBuf,
        generation: u64,
        complete: bool,
        wanted: Wanted,
    ) -> Result<Opened<F>, Damage> {
        let file = self.fs.open(&path).on("open", &path)?;
        let source = FileOf(&self.fs, &file);
        let read = match wanted {
            Wanted::All => Image::read(&source),
            Wanted::Places => Image::read_base(&source),
        };
        let image = match read {
            Ok(image) => image,
            Err(error) => return Err(Damage::Image { path, error }),
        };
        let whole = !complete || image.manifest.memory.base.is_none();
        if image.header.generation != generation || !whole {
            return Err(Damage::OtherImage(path));
        }
        Ok(Opened {
            path,
            file,
            image,
            complete,
        })
    }
}

/// What of an image's manifest is wanted.
#[derive(Clone, Copy)]
enum Wanted {
    All,
    /// Where the pages lie: another one stands on it.
    Places,
}

/// An open image, metadata verified.
struct Opened<F: Fs> {
    path: PathBuf,
    file: F::File,
    image: Image,
    /// It was made by merging.
    complete: bool,
}

impl<F: Fs> Opened<F> {
    fn verify(&self, fs: &F, progress: &mut impl FnMut(u64, u64)) -> Result<(), Damage> {
        let source = FileOf(fs, &self.file);
        let verified = self.image.verify_data(&source, progress);
        verified.map_err(|error| Damage::Image {
            path: self.path.clone(),
            error,
        })
    }
}

impl Damage {
    fn of_base(generation: u64, damage: Damage) -> Damage {
        Damage::Base {
            generation,
            damage: Box::new(damage),
        }
    }
}

fn list_numbers(numbers: impl Iterator<Item = u64>) -> String {
    let words: Vec<String> = numbers.map(|n| n.to_string()).collect();
    if words.is_empty() {
        return "there are none".to_owned();
    }
    format!("there are: {}", words.join(", "))
}
