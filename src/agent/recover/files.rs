//! The files' half of a recovery: which generation can be reached, and going back to it.
//! Constructor, before memory and descriptors; may be killed anywhere and started again.
//!
//! Order: newer generations are dropped (the undo makes them unreachable; their tables stay),
//! outputs get their contents, tables are undone newest first, each removed after its undo.

use crate::agent::collect::identity;
use crate::agent::log;
use crate::agent::outputs::refill::{self, Outputs};
use crate::agent::rollback::redirect;
use crate::config::{Config, Resume};
use crate::persist::{exclude, table, undo};
use crate::store::generation::GenerationRecord;
use crate::store::{Found, Job, RawFs};
use std::os::fd::OwnedFd;

/// What restoring the descriptors must know of the files.
#[derive(Debug, Clone, Default)]
pub struct FilesBack {
    /// Inodes that were made anew: (device, inode) at the checkpoint and now.
    pub replaced: Vec<((u64, u64), (u64, u64))>,
    /// Files of the new start that hold what an output held at the checkpoint.
    pub filled: Vec<(u64, u64)>,
    /// `CKPT_REDIRECT`: paths at the checkpoint and now.
    pub redirect: Vec<(Vec<u8>, Vec<u8>)>,
}

fn leaves_all_files(config: &Config) -> bool {
    config.restore_exclude.iter().any(|glob| glob == b"*")
}

/// Why the files cannot be brought to this generation.
fn obstacle(job: &Job<RawFs>, record: &GenerationRecord, config: &Config) -> Option<String> {
    let generation = record.generation;
    if let Some(reason) = &record.files.incomplete {
        return Some(format!(
            "the files of generation {generation} are incomplete: {reason}"
        ));
    }
    let checked = undo::check(&job.dir, generation, &config.restore_exclude);
    checked.err().map(|error| error.to_string())
}

/// The generation found, or, where only its files have no table, an older one that has.
pub fn choose(
    job: &Job<RawFs>,
    found: Found<RawFs>,
    config: &Config,
) -> Result<Found<RawFs>, String> {
    if leaves_all_files(config) {
        return Ok(found);
    }
    let Some(reason) = obstacle(job, &found.record, config) else {
        return Ok(found);
    };
    let older = job.generations().into_iter().rev();
    let older = older.filter(|r| r.generation < found.record.generation);
    for record in older.filter(|_| config.resume == Resume::Auto) {
        if obstacle(job, record, config).is_none()
            && let Ok(found) = job.open_generation(record, config.verify)
        {
            let message = format_args!("{reason}; falling back to an older checkpoint");
            log::complain(message);
            log::line(message);
            return Ok(found);
        }
    }
    Err(reason)
}

/// Brings the files to what they were at the generation.
pub fn go_back(
    job: &mut Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
    terminal: bool,
) -> Result<FilesBack, String> {
    let generation = record.generation;
    let now = identity::realtime_ns();
    job.drop_newer(generation, now).map_err(|e| e.to_string())?;
    let mut restored = FilesBack {
        redirect: config.redirect.clone(),
        ..FilesBack::default()
    };
    let tables = table::list(&job.dir).map_err(|e| e.to_string())?;
    let next = tables.iter().map(|t| t.seq).max().unwrap_or(0) + 1;
    let pair = |id: &crate::persist::Id| (id.dev, id.ino);
    let streams = record.files.streams.iter();
    let streams: Vec<_> = streams
        .filter(|s| !is_excluded(&config.restore_exclude, &s.path))
        .cloned()
        .collect();
    let outputs = refill::refill(&job.dir, generation, &streams, next, &Outputs::OfTheStart)?;
    restored.filled = outputs.filled.iter().map(pair).collect();
    let mut options = undo::Options {
        foreign: config.foreign,
        restore_exclude: &config.restore_exclude,
        inherited: &outputs.inodes,
        ..undo::Options::default()
    };
    let report = undo::undo(&job.dir, generation, &mut options).map_err(|e| e.to_string())?;
    for file in &report.foreign {
        let path = file.path.display();
        let line = match &file.aside {
            Some(aside) => format!(
                "{path} was {} by somebody else: that version is {}",
                file.what,
                aside.display()
            ),
            None => format!("{path} was {} by somebody else: left as it is", file.what),
        };
        log::line(format_args!("{line}"));
        if terminal {
            log::complain(format_args!("{line}"));
        }
    }
    if report.records > 0 {
        log::line(format_args!(
            "files: {} modifications of {} tables taken back",
            report.records, report.tables
        ));
    }
    let replaced = report.replaced.iter();
    restored.replaced = replaced.map(|(old, new)| (pair(old), pair(new))).collect();
    Ok(restored)
}

/// Why the files did not go back in a running program.
#[derive(Debug)]
pub enum NotBack {
    /// Nothing was done to them.
    Unchanged(String),
    /// Some are as they were at the checkpoint, others not.
    Broken(String),
}

/// Are all files left alone at a rollback, by the settings or by the program's own rules?
fn leaves_all_now(config: &Config) -> bool {
    leaves_all_files(config) || exclude::is_excluded(b"/")
}

/// Does a rollback leave this file as it is?
pub fn leaves_alone(config: &Config, path: &[u8]) -> bool {
    leaves_all_now(config)
        || exclude::is_excluded(path)
        || is_excluded(&config.restore_exclude, path)
}

/// Rollback: can the files of the running program be brought to this generation? Changes
/// nothing.
pub fn can_go_back(
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
) -> Result<(), String> {
    if leaves_all_now(config) {
        return Ok(());
    }
    if let Some(reason) = &record.files.incomplete {
        return Err(format!(
            "the files of generation {} are incomplete: {reason}",
            record.generation
        ));
    }
    let checked = undo::check_by_rules(&job.dir, record.generation, &config.restore_exclude);
    checked.map_err(|error| error.to_string())
}

/// Rollback, while the program stands still: as [`go_back`], but the program's outputs are
/// its own still (no new start has touched them), and what the program excludes by now is
/// left alone as well. `output` copies a descriptor of the program. Helper thread.
pub fn go_back_inside(
    job: &mut Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
    output: &dyn Fn(i32) -> Option<OwnedFd>,
) -> Result<FilesBack, NotBack> {
    let generation = record.generation;
    let mut restored = FilesBack {
        redirect: config.redirect.clone(),
        ..FilesBack::default()
    };
    restored.redirect.extend(redirect::asked());
    let dropped = job.drop_newer(generation, identity::realtime_ns());
    dropped.map_err(|error| NotBack::Unchanged(error.to_string()))?;
    // The tables go with the undo, and the streams need them.
    let streams = record.files.streams.iter();
    let left_alone =
        |path: &[u8]| exclude::is_excluded(path) || is_excluded(&config.restore_exclude, path);
    let streams: Vec<_> = streams.filter(|s| !left_alone(&s.path)).cloned().collect();
    let outputs = Outputs::OfTheProgram(output);
    let outputs = refill::refill(&job.dir, generation, &streams, 0, &outputs);
    let outputs = outputs.map_err(NotBack::Broken)?;
    let mut options = undo::Options {
        foreign: config.foreign,
        restore_exclude: &config.restore_exclude,
        inherited: &outputs.inodes,
        by_rules: true,
        ..undo::Options::default()
    };
    let report = undo::undo(&job.dir, generation, &mut options).map_err(|error| match error {
        undo::UndoError::Failed { .. } => NotBack::Broken(error.to_string()),
        _ => NotBack::Unchanged(error.to_string()),
    })?;
    for file in &report.foreign {
        let path = file.path.display();
        log::line(format_args!("{path} was {} by somebody else", file.what));
    }
    if report.records > 0 {
        log::line(format_args!(
            "files: {} modifications of {} tables taken back",
            report.records, report.tables
        ));
    }
    let pair = |id: &crate::persist::Id| (id.dev, id.ino);
    let replaced = report.replaced.iter();
    restored.replaced = replaced.map(|(old, new)| (pair(old), pair(new))).collect();
    Ok(restored)
}

fn is_excluded(globs: &[Vec<u8>], path: &[u8]) -> bool {
    let mut globs = globs.iter();
    globs.any(|glob| crate::persist::exclude::matches(glob, path))
}
