//! The store's root, the keys of jobs, and one job's directory.
//!
//! A key stands for one command line of one user; a second live instance of it gets
//! the key with `.2`, `.3`... behind it.

use super::fs::Fs;
use super::generation::{self, GenerationRecord};
use super::journal::{Journal, JournalError, Record, Refused};
use super::{Context, StoreError};
use crate::config::Config;
use crate::errno::Errno;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// Live instances of one command line that get a directory each.
pub const MOST_INSTANCES: u32 = 10_000;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no place for checkpoints: none of CKPT_DIR, XDG_STATE_HOME and HOME is set")]
pub struct NoRoot;

/// `$CKPT_DIR`, or `ckpt` below `$XDG_STATE_HOME` or `~/.local/state`.
pub fn store_root(config: &Config) -> Result<PathBuf, NoRoot> {
    // The XDG specification: a relative path counts as unset.
    let absolute = |v: &Option<Vec<u8>>| {
        v.as_deref()
            .filter(|path| path.starts_with(b"/"))
            .map(|path| PathBuf::from(OsStr::from_bytes(path)))
    };
    if let Some(dir) = absolute(&config.dir) {
        return Ok(dir);
    }
    if let Some(state) = absolute(&config.xdg_state_home) {
        return Ok(state.join("ckpt"));
    }
    match absolute(&config.home) {
        Some(home) => Ok(home.join(".local/state/ckpt")),
        None => Err(NoRoot),
    }
}

/// The name of a job's directory, without the instance suffix.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JobKey(String);

impl JobKey {
    /// A name of the user's (`CKPT_JOB`): different names give different keys.
    /// `=KEY` is a key as it stands in the store, as `ckpt list` shows it.
    pub fn named(name: &[u8]) -> JobKey {
        if let Some(exact) = name.strip_prefix(b"=").and_then(JobKey::exact) {
            return exact;
        }
        let mut key = String::new();
        // `.2` at the end is an instance suffix, a leading dot is hidden.
        let digits = name.iter().rev().take_while(|b| b.is_ascii_digit()).count();
        let suffix_dot = match name.len().checked_sub(digits + 1) {
            Some(at) if digits > 0 && name[at] == b'.' => Some(at),
            _ => None,
        };
        for (at, &byte) in name.iter().enumerate() {
            let plain = byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.');
            if plain && !(byte == b'.' && (at == 0 || suffix_dot == Some(at))) {
                key.push(byte as char);
            } else {
                key.push_str(&format!("%{byte:02X}"));
            }
        }
        if key.len() > 200 {
            let digest = xxhash_rust::xxh3::xxh3_128(name);
            key.truncate(150);
            key.push_str(&format!("~{digest:032x}"));
        }
        JobKey(key)
    }

    /// A digest of the command line; `args` are NUL-joined.
    pub fn of_command(exe: &[u8], args: &[u8], cwd: &[u8], uid: u32) -> JobKey {
        let mut hash = xxhash_rust::xxh3::Xxh3::new();
        for part in [exe, args, cwd] {
            hash.update(&(part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        hash.update(&uid.to_le_bytes());
        JobKey(format!("{:032x}", hash.digest128()))
    }

    /// A key as it stands in the store (a directory's name); `None` for what is never one.
    pub fn exact(name: &[u8]) -> Option<JobKey> {
        let plain = |b: &u8| b.is_ascii_alphanumeric() || b"-_.%~".contains(b);
        let sound = !name.is_empty() && name[0] != b'.' && name.iter().all(plain);
        let text = std::str::from_utf8(name).ok()?;
        sound.then(|| JobKey(text.to_owned()))
    }

    /// A key that was made by this module before.
    pub fn from_dir_name(name: &str) -> JobKey {
        JobKey(name.to_owned())
    }

    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The directory of instance `n` (1 is the first) below `root`.
    pub fn dir(&self, root: &Path, instance: u32) -> PathBuf {
        let jobs = root.join("jobs");
        match instance {
            0 | 1 => jobs.join(&self.0),
            n => jobs.join(format!("{}.{n}", self.0)),
        }
    }
}

/// Makes the store's root, `jobs` and the job's directory, durable one after the
/// other. Called at the first checkpoint, not before.
pub fn create_dir<F: Fs>(fs: &F, root: &Path, dir: &Path) -> Result<(), StoreError> {
    let mut missing = Vec::new();
    let mut at = dir;
    loop {
        match fs.mkdir(at) {
            Ok(()) => {
                let parent = at.parent().unwrap_or(Path::new("/"));
                fs.sync_dir(parent).on("sync", parent)?;
                match missing.pop() {
                    Some(next) => at = next,
                    None => return Ok(()),
                }
            }
            Err(Errno::EEXIST) => match missing.pop() {
                Some(next) => at = next,
                None => return Ok(()),
            },
            Err(Errno::ENOENT) if at.parent().is_some() && missing.len() < 64 => {
                missing.push(at);
                at = at.parent().unwrap_or(root);
            }
            Err(errno) => return Err(errno).on("create", at),
        }
    }
}

/// One job's directory with its journal read.
#[derive(Debug, Clone)]
pub struct Job<F> {
    pub fs: F,
    pub dir: PathBuf,
    pub journal: Journal,
}

impl<F: Fs> Job<F> {
    pub fn open(fs: F, dir: PathBuf) -> Result<Job<F>, JournalError> {
        let journal = Journal::read(&fs, &dir)?;
        Ok(Job { fs, dir, journal })
    }

    /// The key with its instance suffix.
    pub fn name(&self) -> String {
        let name = self.dir.file_name().unwrap_or_default();
        name.to_string_lossy().into_owned()
    }

    pub fn generations(&self) -> Vec<&GenerationRecord> {
        self.journal.generations()
    }

    pub fn generation_dir(&self, generation: u64) -> PathBuf {
        self.dir.join(generation::dir_name(generation))
    }

    /// Numbers of the generation directories that exist; `true` for `.tmp`.
    pub fn directories(&self) -> Result<Vec<(u64, bool)>, StoreError> {
        let entries = match self.fs.list(&self.dir) {
            Err(Errno::ENOENT) => return Ok(Vec::new()),
            other => other.on("list", &self.dir)?,
        };
        let numbers = entries
            .iter()
            .filter(|e| e.dir)
            .filter_map(|e| generation::parse_dir_name(&e.name));
        Ok(numbers.collect())
    }

    /// The number of the next generation: never one that was used before.
    pub fn next_generation(&self) -> Result<u64, StoreError> {
        let in_dirs = self.directories()?.iter().map(|d| d.0).max().unwrap_or(0);
        // A checkpoint that failed after its stop has left a table of its number.
        let in_tables = crate::persist::table::list(&self.dir)?;
        let in_tables = in_tables.iter().map(|t| t.base).max().unwrap_or(0);
        Ok(in_dirs.max(in_tables).max(self.journal.highest()) + 1)
    }

    /// Notes that a checkpoint was refused or failed, and why.
    pub fn note_refusal(&mut self, reason: &str, time_ns: u64) -> Result<(), JournalError> {
        let refused = Refused {
            reason: reason.to_owned(),
            time_ns,
        };
        let record = Record::Refused(refused);
        self.journal.append(&self.fs, &self.dir, record, false)
    }
}

#[cfg(test)]
mod tests {
    use super::super::fs::RawFs;
    use super::super::fs::tests::TempDir;
    use super::*;

    #[test]
    fn roots() {
        let mut config = Config::default();
        assert_eq!(store_root(&config), Err(NoRoot));
        config.home = Some(b"/home/me".to_vec());
        let root = |c: &Config| store_root(c).unwrap();
        assert_eq!(root(&config), Path::new("/home/me/.local/state/ckpt"));
        config.xdg_state_home = Some(b"relative".to_vec());
        assert_eq!(root(&config), Path::new("/home/me/.local/state/ckpt"));
        config.xdg_state_home = Some(b"/state".to_vec());
        assert_eq!(root(&config), Path::new("/state/ckpt"));
        config.dir = Some(b"/here".to_vec());
        assert_eq!(root(&config), Path::new("/here"));
    }

    #[test]
    fn names_become_file_names_without_collisions() {
        let key = |name: &str| JobKey::named(name.as_bytes()).0;
        assert_eq!(key("fluid-3_a.b"), "fluid-3_a.b");
        assert_eq!(key("a/b"), "a%2Fb");
        assert_eq!(key("a%2Fb"), "a%252Fb");
        assert_eq!(key(".x"), "%2Ex");
        assert_eq!(key("x.2"), "x%2E2");
        assert_eq!(key("=x.2"), "x.2");
        assert_eq!(key("=../x"), "%3D..%2Fx");
        assert_eq!(key("v1.2.2"), "v1.2%2E2");
        let (long, other) = ("/".repeat(128), "/".repeat(127));
        assert!(key(&long).len() < 200);
        assert_ne!(key(&long), key(&other));
    }

    #[test]
    fn a_command_line_has_one_key() {
        let key =
            |exe: &str, args: &str| JobKey::of_command(exe.as_bytes(), args.as_bytes(), b"/", 0);
        assert_eq!(key("/bin/a", "a\0b"), key("/bin/a", "a\0b"));
        assert_ne!(key("/bin/a", "a\0b"), key("/bin/aa", "\0b"));
        assert_eq!(key("/bin/a", "a").0.len(), 32);
        let dir = key("/bin/a", "a").dir(Path::new("/s"), 3);
        assert!(dir.to_str().unwrap().ends_with(".3"));
    }

    #[test]
    fn directories_are_made_on_the_way() {
        let dir = TempDir::new("job");
        let root = dir.0.join("state/ckpt");
        let job = JobKey::named(b"x").dir(&root, 1);
        create_dir(&RawFs, &root, &job).unwrap();
        create_dir(&RawFs, &root, &job).unwrap();
        let job = Job::open(RawFs, job).unwrap();
        assert_eq!(job.next_generation().unwrap(), 1);
        RawFs.mkdir(&job.dir.join("gen-000007.tmp")).unwrap();
        assert_eq!(job.next_generation().unwrap(), 8);
        let file = dir.0.join("file");
        RawFs.create_new(&file).unwrap();
        let error = create_dir(&RawFs, &file, &file.join("jobs")).unwrap_err();
        assert!(error.to_string().ends_with("/file/jobs: not a directory"));
    }
}
