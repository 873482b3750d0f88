//! The `CKPT_*` environment variables: what they mean and which values are allowed.
//!
//! Pure code. The constructor of every process that loads the library runs it
//! (before main, one thread), so the common case, no variable at all, costs one
//! comparison per environment entry. The command uses the same parser to check
//! its options before it starts a program.
//!
//! A value that is not allowed is an error in plain words, never a silent default;
//! an empty value counts as unset. Names that are not known are only collected
//! (`Config::unknown`): a newer library's variables must not stop an older one.

mod duration;
mod parse;

pub use duration::{Interval, parse_duration, parse_interval};
pub use parse::{join_arguments, parse_resume, parse_signal};

use std::ffi::CString;
use std::time::Duration;

/// All settings of one process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// `None`: inserted mode only, checkpoints by call or request.
    pub interval: Option<Interval>,
    /// Colon-separated globs on absolute paths; `*` is all.
    pub exclude: Vec<Vec<u8>>,
    /// Exceptions from `exclude`.
    pub include: Vec<Vec<u8>>,
    pub restore_exclude: Vec<Vec<u8>>,
    /// `(old, new)` paths for the open file table.
    pub redirect: Vec<(Vec<u8>, Vec<u8>)>,
    /// At a recovery: files that somebody else changed since.
    pub foreign: Foreign,
    pub dir: Option<Vec<u8>>,
    pub job: Option<Vec<u8>>,
    pub resume: Resume,
    /// What the checkpoint call returns after a recovery; > 0.
    pub return_value: i32,
    /// Generations kept; > 0.
    pub keep: u32,
    /// Going back keeps a generation of the state that it leaves.
    pub undo: bool,
    /// Increments that may stand on a complete generation; 0 = none.
    pub chain: u32,
    pub keep_on_exit: KeepOnExit,
    /// The user's signal that asks for a checkpoint.
    pub trigger: Option<i32>,
    pub sync: Sync,
    pub tracker: TrackerChoice,
    pub snapshot: SnapshotChoice,
    pub restore: RestoreMethod,
    pub compress: Compress,
    /// Mean time between failures, for `CKPT_INTERVAL=auto`.
    pub mtbf: Duration,
    /// The share of its time in thousandths of a percent that `auto` may cost the program.
    pub overhead: u32,
    pub log: Log,
    /// Verify all page data before a restore.
    pub verify: bool,
    /// Count the calls that modify files into `<path>.<pid>`, for tests.
    pub audit: Option<Vec<u8>>,
    /// Do nothing at all in this process.
    pub disable: bool,
    /// The arguments of a start from a template (`ckpt restore --template`).
    pub arguments: Vec<CString>,
    /// Set by the library for the programs that its process starts.
    pub owner: Option<Vec<u8>>,
    /// From `HOME` and `XDG_STATE_HOME`, for the default of `dir`.
    pub home: Option<Vec<u8>>,
    pub xdg_state_home: Option<Vec<u8>>,
    /// `CKPT_*` names that mean nothing here.
    pub unknown: Vec<Vec<u8>>,
}

impl Default for Config {
    fn default() -> Config {
        Config {
            interval: None,
            exclude: Vec::new(),
            include: Vec::new(),
            restore_exclude: Vec::new(),
            redirect: Vec::new(),
            foreign: Foreign::Restore,
            dir: None,
            job: None,
            resume: Resume::Auto,
            return_value: 1,
            keep: 2,
            undo: false,
            chain: 16,
            keep_on_exit: KeepOnExit::Failure,
            trigger: None,
            sync: Sync::Kill,
            tracker: TrackerChoice::Auto,
            snapshot: SnapshotChoice::Auto,
            restore: RestoreMethod::Auto,
            compress: Compress::None,
            mtbf: Duration::from_secs(86_400),
            overhead: 1000,
            log: Log {
                level: LogLevel::Warn,
                target: LogTarget::Job,
            },
            verify: false,
            audit: None,
            disable: false,
            arguments: Vec::new(),
            owner: None,
            home: None,
            xdg_state_home: None,
            unknown: Vec::new(),
        }
    }
}

/// Which checkpoint a start goes on from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resume {
    /// The latest valid one, if there is one.
    Auto,
    /// None: start from the beginning.
    Never,
    /// This generation.
    Generation(u64),
    /// The latest generation with this checkpoint id.
    Id(i32),
}

/// Which exits leave the job's files in place. Death by a signal always does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum KeepOnExit {
    /// A status other than 0.
    Failure,
    Always,
    Never,
}

/// What a recovery does with files that somebody else has changed since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Foreign {
    /// Put back as at the checkpoint; the other version is saved aside.
    #[default]
    Restore,
    /// Leave them as they are.
    Keep,
    /// Change nothing at all and say so.
    Refuse,
}

/// What the persistent checkpoint table survives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sync {
    /// The death of the process.
    Kill,
    /// The loss of power as well: every row is synced before the operation runs.
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TrackerChoice {
    Auto,
    Uffd,
    SoftDirty,
    Mprotect,
    Full,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SnapshotChoice {
    Auto,
    Copy,
    Fork,
    Priority,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RestoreMethod {
    /// Whichever is likely to be quicker (`agent::restore::method`).
    Auto,
    /// Map the image; pages are read when touched.
    Lazy,
    /// Read everything before the program goes on.
    Eager,
}

/// How page data is compressed. Images that are not can be mapped at restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compress {
    None,
    Lz4,
    Zstd,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum LogLevel {
    Off,
    Error,
    Warn,
    Info,
    Debug,
    Trace,
}

/// `CKPT_LOG=LEVEL`, `CKPT_LOG=PATH` (level info) or `CKPT_LOG=LEVEL:PATH`; PATH is
/// absolute, or `stderr`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Log {
    pub level: LogLevel,
    pub target: LogTarget,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum LogTarget {
    /// The job's own log, beside its checkpoints.
    Job,
    Stderr,
    File(Vec<u8>),
}

/// A variable whose value is not allowed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name}={value}: {allowed}")]
pub struct ConfigError {
    pub name: &'static str,
    /// Printable form of the value.
    pub value: String,
    /// What is allowed, as a clause: `expected ...`.
    pub allowed: &'static str,
}

impl Config {
    /// Reads the settings from `(name, value)` pairs; the first of equal names counts,
    /// as for getenv(3).
    pub fn from_env<'a>(
        env: impl IntoIterator<Item = (&'a [u8], &'a [u8])>,
    ) -> Result<Config, ConfigError> {
        let mut config = Config::default();
        let mut seen = 0u32;
        for (name, value) in env {
            if value.is_empty() {
                continue;
            }
            match name.strip_prefix(b"CKPT_") {
                Some(rest) => match parse::VARIABLES.iter().position(|v| v.rest() == rest) {
                    Some(index) if seen & (1 << index) == 0 => {
                        seen |= 1 << index;
                        let variable = &parse::VARIABLES[index];
                        (variable.apply)(&mut config, value).ok_or_else(|| ConfigError {
                            name: variable.name,
                            value: printable(value),
                            allowed: variable.allowed,
                        })?;
                    }
                    Some(_) => {}
                    None if parse::FOREIGN.contains(&rest) => {}
                    None => config.unknown.push(name.to_vec()),
                },
                None if name == b"HOME" && config.home.is_none() => {
                    config.home = Some(value.to_vec());
                }
                None if name == b"XDG_STATE_HOME" && config.xdg_state_home.is_none() => {
                    config.xdg_state_home = Some(value.to_vec());
                }
                None => {}
            }
        }
        Ok(config)
    }

    /// Names and meanings of all variables, for the help text.
    pub fn variables() -> impl Iterator<Item = (&'static str, &'static str)> {
        parse::VARIABLES.iter().map(|v| (v.name, v.allowed))
    }
}

/// The value on one line, shortened, with unprintable bytes escaped.
fn printable(value: &[u8]) -> String {
    let shown = &value[..value.len().min(80)];
    let mut text = String::new();
    for chunk in shown.utf8_chunks() {
        for c in chunk.valid().chars() {
            if c.is_control() {
                text.extend(c.escape_default());
            } else {
                text.push(c);
            }
        }
        for byte in chunk.invalid() {
            text.push_str(&format!("\\x{byte:02x}"));
        }
    }
    if shown.len() < value.len() {
        text.push_str("...");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(pairs: &[(&str, &str)]) -> Result<Config, ConfigError> {
        Config::from_env(pairs.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes())))
    }

    fn one(name: &str, value: &str) -> Config {
        config(&[(name, value)]).unwrap()
    }

    #[test]
    fn nothing_set_is_the_default() {
        assert_eq!(config(&[("PATH", "/bin")]).unwrap(), Config::default());
        assert_eq!(config(&[("CKPT_KEEP", "")]).unwrap(), Config::default());
    }

    #[test]
    fn every_variable() {
        assert_eq!(one("CKPT_DIR", "/x").dir.unwrap(), b"/x");
        assert_eq!(one("CKPT_JOB", "a b").job.unwrap(), b"a b");
        assert_eq!(one("CKPT_RESUME", "never").resume, Resume::Never);
        assert_eq!(one("CKPT_RESUME", "7").resume, Resume::Generation(7));
        assert_eq!(one("CKPT_RESUME", "id:7").resume, Resume::Id(7));
        assert_eq!(one("CKPT_RETURN_VALUE", "9").return_value, 9);
        assert_eq!(one("CKPT_KEEP", "5").keep, 5);
        assert_eq!(one("CKPT_CHAIN", "0").chain, 0);
        assert_eq!(
            one("CKPT_KEEP_ON_EXIT", "always").keep_on_exit,
            KeepOnExit::Always
        );
        assert_eq!(one("CKPT_TRIGGER", "USR1").trigger, Some(10));
        assert_eq!(one("CKPT_FOREIGN", "keep").foreign, Foreign::Keep);
        assert_eq!(one("CKPT_SYNC", "power").sync, Sync::Power);
        assert_eq!(one("CKPT_TRACKER", "uffd").tracker, TrackerChoice::Uffd);
        for name in ["soft-dirty", "softdirty"] {
            assert_eq!(one("CKPT_TRACKER", name).tracker, TrackerChoice::SoftDirty);
        }
        assert_eq!(one("CKPT_SNAPSHOT", "fork").snapshot, SnapshotChoice::Fork);
        assert_eq!(one("CKPT_RESTORE", "eager").restore, RestoreMethod::Eager);
        assert_eq!(one("CKPT_RESTORE", "auto").restore, RestoreMethod::Auto);
        assert_eq!(one("CKPT_COMPRESS", "off").compress, Compress::None);
        assert_eq!(one("CKPT_COMPRESS", "none").compress, Compress::None);
        assert_eq!(one("CKPT_COMPRESS", "lz4").compress, Compress::Lz4);
        assert_eq!(one("CKPT_COMPRESS", "zstd").compress, Compress::Zstd);
        assert!(one("CKPT_VERIFY", "1").verify);
        assert!(one("CKPT_DISABLE", "yes").disable);
        assert_eq!(one("CKPT_OWNER", "12").owner.unwrap(), b"12");
        assert_eq!(
            one("CKPT_EXCLUDE", "/tmp/*:*").exclude,
            [b"/tmp/*".to_vec(), b"*".to_vec()]
        );
        assert_eq!(
            one("CKPT_REDIRECT", "/a=/b:/c=/d").redirect,
            [
                (b"/a".to_vec(), b"/b".to_vec()),
                (b"/c".to_vec(), b"/d".to_vec())
            ]
        );
    }

    #[test]
    fn arguments_come_through_as_they_are() {
        let all: [&[u8]; 5] = [b"", b"a b", b"50%:x", b"\xff\n=", b"-v"];
        for given in [&all[..], &all[..1], &[]] {
            let value = join_arguments(given.iter().copied());
            let c = config(&[("CKPT_ARGUMENTS", &value)]).unwrap();
            let got: Vec<&[u8]> = c.arguments.iter().map(|a| a.to_bytes()).collect();
            assert_eq!(got, given);
        }
        for wrong in ["a", ":%4", ":%00", ":%zz"] {
            assert!(config(&[("CKPT_ARGUMENTS", wrong)]).is_err(), "{wrong}");
        }
    }

    #[test]
    fn the_log_is_a_level_a_path_or_both() {
        let log = |v| one("CKPT_LOG", v).log;
        assert_eq!(log("debug").level, LogLevel::Debug);
        assert_eq!(log("debug").target, LogTarget::Job);
        assert_eq!(log("/a/b").target, LogTarget::File(b"/a/b".to_vec()));
        assert_eq!(log("/a/b").level, LogLevel::Info);
        assert_eq!(log("trace:stderr").target, LogTarget::Stderr);
        assert_eq!(log("stderr").level, LogLevel::Info);
        assert_eq!(log("error:/x:y").target, LogTarget::File(b"/x:y".to_vec()));
        assert!(config(&[("CKPT_LOG", "loud")]).is_err());
        assert!(config(&[("CKPT_LOG", "debug:relative")]).is_err());
    }

    #[test]
    fn wrong_values_say_what_is_allowed() {
        for (name, value) in [
            ("CKPT_INTERVAL", "soon"),
            ("CKPT_RETURN_VALUE", "0"),
            ("CKPT_RETURN_VALUE", "-1"),
            ("CKPT_KEEP", "0"),
            ("CKPT_KEEP", "+1"),
            ("CKPT_DIR", "relative"),
            ("CKPT_TRIGGER", "KILL"),
            ("CKPT_TRIGGER", "64"),
            ("CKPT_RESUME", "0"),
            ("CKPT_TRACKER", "UFFD "),
            ("CKPT_EXCLUDE", "relative/*"),
            ("CKPT_REDIRECT", "/a"),
            ("CKPT_VERIFY", "maybe"),
            ("CKPT_COMPRESS", "gzip"),
            ("CKPT_JOB", "."),
        ] {
            let error = config(&[(name, value)]).unwrap_err();
            let line = error.to_string();
            assert!(line.starts_with(&format!("{name}={value}: expected ")));
            assert!(!line.contains('\n'));
        }
        let error = config(&[("CKPT_KEEP", "a\nb")]).unwrap_err();
        assert_eq!(
            error.to_string(),
            "CKPT_KEEP=a\\nb: expected a number of generations, 1 or more"
        );
    }

    #[test]
    fn unknown_names_are_collected_and_the_first_of_two_counts() {
        let c = config(&[
            ("CKPT_INTREVAL", "1"),
            ("CKPT_KEEP", "3"),
            ("CKPT_KEEP", "bad"),
            ("CKPT_LIB", "/x"),
        ])
        .unwrap();
        assert_eq!(c.unknown, [b"CKPT_INTREVAL".to_vec()]);
        assert_eq!(c.keep, 3);
    }
}
