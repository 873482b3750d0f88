//! A generation as a template: a job of its own that begins with it, so that many
//! processes go on from one image side by side, each with its own lock and generations.
//!
//! The images are hard links: nothing is copied, and it does not matter which of the two
//! jobs is removed first. Tables and streams are not taken along: what the template's
//! process did to files since is none of the new job's business. Used by the command; the
//! start takes the mark of a new job ([`take_mark`]), and removes the job when it fails.

use super::fs::{Fs, RawFs};
use super::generation::{self, FilesRecord, GenerationRecord, MANIFEST_NAME};
use super::journal::{Journal, JournalError, Record};
use super::lock::{JobLock, LockError};
use super::owner::Owner;
use super::{Context, Job, JobKey, StoreError};
use crate::errno::Errno;
use crate::image::codec::CodecError;
use std::ffi::OsStr;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// In a job's directory until its first start has looked at it.
const MARK: &str = "new";

/// Is this a template's new job that nobody has started yet? The one who asks starts it.
pub fn take_mark(dir: &Path) -> bool {
    RawFs.unlink(&dir.join(MARK)).is_ok()
}

/// Starts of one template that may live at the same time.
const MOST: u32 = 100_000;

#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    #[error(transparent)]
    Io(#[from] StoreError),
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Lock(#[from] LockError),
    #[error("encode a manifest: {0}")]
    Codec(#[from] CodecError),
    #[error("generation {0} is gone")]
    Gone(u64),
    #[error("{MOST} jobs of this template are there already")]
    TooMany,
}

/// What a start from a template was given, kept in its job: it holds for the starts after it.
/// The redirects belong to the template's generation; files that the program has opened since
/// are in its own.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Given {
    pub generation: u64,
    /// As in `CKPT_REDIRECT` and `CKPT_ARGUMENTS`.
    pub redirect: Vec<u8>,
    pub arguments: Vec<u8>,
}

/// Three texts, each with a zero byte behind it.
const GIVEN_NAME: &str = "given";

impl Given {
    pub fn write(&self, dir: &Path) -> std::io::Result<()> {
        let generation = self.generation.to_string().into_bytes();
        let mut bytes = Vec::new();
        for text in [&generation, &self.redirect, &self.arguments] {
            bytes.extend_from_slice(text);
            bytes.push(0);
        }
        let mut file = std::fs::File::create(dir.join(GIVEN_NAME))?;
        file.write_all(&bytes)?;
        file.sync_all()
    }

    /// `None`: no start from a template, or cut short.
    pub fn read(dir: &Path) -> Option<Given> {
        let bytes = std::fs::read(dir.join(GIVEN_NAME)).ok()?;
        let mut texts = bytes.strip_suffix(b"\0")?.split(|&b| b == 0);
        let generation = std::str::from_utf8(texts.next()?).ok()?.parse().ok()?;
        let (redirect, arguments) = (texts.next()?.to_vec(), texts.next()?.to_vec());
        texts.next().is_none().then_some(Given {
            generation,
            redirect,
            arguments,
        })
    }
}

/// The new job, and its lock until its process takes it.
#[derive(Debug)]
pub struct Instance {
    pub key: JobKey,
    pub dir: PathBuf,
    pub lock: JobLock,
}

impl Job<RawFs> {
    /// Makes a job `<name>~<n>` whose only restorable generation is this one.
    pub fn instance_of(
        &self,
        root: &Path,
        record: &GenerationRecord,
        owner: &Owner,
    ) -> Result<Instance, TemplateError> {
        let instance = self.new_directory(root, owner)?;
        match self.link_into(&instance.dir, record) {
            Ok(()) => Ok(instance),
            Err(error) => {
                let _ = RawFs.remove_tree(&instance.dir);
                Err(error)
            }
        }
    }

    fn new_directory(&self, root: &Path, owner: &Owner) -> Result<Instance, TemplateError> {
        for number in 1..=MOST {
            let key = JobKey::from_dir_name(&format!("{}~{number}", self.name()));
            let dir = key.dir(root, 1);
            match RawFs.mkdir(&dir) {
                Ok(()) => {}
                Err(Errno::EEXIST) => continue,
                Err(errno) => return Err(errno).on("create", &dir).map_err(Into::into),
            }
            return match JobLock::take(&dir, true, owner) {
                Ok(lock) => Ok(Instance { key, dir, lock }),
                Err(error) => {
                    let _ = RawFs.remove_tree(&dir);
                    Err(error.into())
                }
            };
        }
        Err(TemplateError::TooMany)
    }

    /// The generation and what it stands on, the oldest first.
    fn chain_of(&self, record: &GenerationRecord) -> Result<Vec<GenerationRecord>, TemplateError> {
        let known = self.generations();
        let mut chain = vec![record.clone()];
        while let Some(needed) = chain.last().and_then(GenerationRecord::needs) {
            let found = known.iter().find(|r| r.generation == needed);
            chain.push((*found.ok_or(TemplateError::Gone(needed))?).clone());
        }
        chain.reverse();
        Ok(chain)
    }

    fn link_into(&self, dir: &Path, record: &GenerationRecord) -> Result<(), TemplateError> {
        let mut journal = Journal::default();
        for mut record in self.chain_of(record)? {
            let from = self.generation_dir(record.generation);
            let to = dir.join(generation::dir_name(record.generation));
            RawFs.mkdir(&to).on("create", &to)?;
            for entry in RawFs.list(&from).on("list", &from)? {
                if entry.dir || entry.name == MANIFEST_NAME.as_bytes() {
                    continue;
                }
                let name = OsStr::from_bytes(&entry.name);
                let path = to.join(name);
                let linked = rustix::fs::link(from.join(name), &path);
                linked.map_err(Errno::from).on("link", &path)?;
            }
            record.files = FilesRecord::default();
            let path = to.join(MANIFEST_NAME);
            let file = RawFs.create_new(&path).on("create", &path)?;
            let bytes = record.to_file()?;
            RawFs.write_all(&file, &bytes, 0).on("write", &path)?;
            let merged = record.merged.take();
            journal.append(&RawFs, dir, Record::Committed(record), false)?;
            if let Some(merged) = merged {
                journal.append(&RawFs, dir, Record::Merged(merged), false)?;
            }
        }
        let mark = dir.join(MARK);
        RawFs.create_new(&mark).on("create", &mark)?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::fs::tests::TempDir;
    use super::*;
    use crate::config::Resume;
    use crate::store::generation::GenerationKind;

    fn record(generation: u64, parent: Option<u64>) -> GenerationRecord {
        GenerationRecord {
            generation,
            parent,
            kind: match parent {
                Some(_) => GenerationKind::Increment,
                None => GenerationKind::Full,
            },
            files: FilesRecord {
                table: 9,
                incomplete: Some("reason".into()),
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn what_was_given_is_kept() {
        let dir = TempDir::new("given");
        assert_eq!(Given::read(&dir.0), None);
        let given = Given {
            generation: 7,
            redirect: b"/a=/b".to_vec(),
            arguments: Vec::new(),
        };
        given.write(&dir.0).unwrap();
        assert_eq!(Given::read(&dir.0), Some(given));
        std::fs::write(dir.0.join(GIVEN_NAME), b"7\0/a=").unwrap();
        assert_eq!(Given::read(&dir.0), None);
    }

    #[test]
    fn instances_have_the_chain_and_nothing_else() {
        let root = TempDir::new("template");
        let dir = JobKey::from_dir_name("job").dir(&root.0, 1);
        super::super::job::create_dir(&RawFs, &root.0, &dir).unwrap();
        let mut journal = Journal::default();
        for record in [
            record(1, None),
            record(2, Some(1)),
            record(3, Some(2)),
            record(4, None),
        ] {
            let gen_dir = dir.join(generation::dir_name(record.generation));
            RawFs.mkdir(&gen_dir).unwrap();
            std::fs::write(gen_dir.join("member-0.img"), b"image").unwrap();
            journal
                .append(&RawFs, &dir, Record::Committed(record), true)
                .unwrap();
        }
        let job = Job::open(RawFs, dir.clone()).unwrap();
        let owner = Owner::current().unwrap();
        let third = job.generations()[2].clone();
        let one = job.instance_of(&root.0, &third, &owner).unwrap();
        let two = job.instance_of(&root.0, &third, &owner).unwrap();
        assert_eq!((one.key.as_str(), two.key.as_str()), ("job~1", "job~2"));

        assert!(take_mark(&one.dir) && !take_mark(&one.dir), "one start");
        let copy = Job::open(RawFs, two.dir.clone()).unwrap();
        let numbers: Vec<u64> = copy.generations().iter().map(|g| g.generation).collect();
        assert_eq!(numbers, [1, 2, 3]);
        assert!(copy.generations().iter().all(|g| g.files.table == 0));
        let manifest = GenerationRecord::read(&RawFs, &copy.generation_dir(3)).unwrap();
        assert_eq!(&manifest, copy.generations()[2]);
        // The template may go: what was linked stays.
        RawFs.remove_tree(&dir).unwrap();
        let image = copy.generation_dir(1).join("member-0.img");
        assert_eq!(std::fs::read(image).unwrap(), b"image");
        // Journal and manifests agree.
        let (found, skipped) = copy.find(Resume::Generation(3), false).unwrap();
        assert!(found.is_some_and(|f| f.record.generation == 3) && skipped.is_empty());

        let gone = Job {
            journal: Journal::default(),
            ..job
        };
        let error = gone.instance_of(&root.0, &third, &owner).unwrap_err();
        assert!(matches!(error, TemplateError::Gone(2)), "{error}");
        assert!(!root.0.join("jobs/job~3").exists());
    }
}
