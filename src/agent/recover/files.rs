//! The files' half of a recovery: which generation can be reached, and going back to it.
//! Constructor, before memory and descriptors; may be killed anywhere and started again.
//!
//! With `CKPT_UNDO` the state that is left stays: the files are first brought to its generation,
//! then on to the one that is wanted, which is recorded (docs/ROLLBACK.md).
//!
//! Order: newer generations are dropped (the undo makes them unreachable; their tables stay),
//! outputs get their contents, tables are undone newest first, each removed after its undo.

use crate::agent::checkpoint::files::next_number;
use crate::agent::collect::identity;
use crate::agent::outputs::given;
use crate::agent::outputs::refill::{self, Outputs};
use crate::agent::recover::needs::{Needs, Strays};
use crate::agent::rollback::redirect;
use crate::agent::{log, settings};
use crate::config::{Config, Resume, Sync};
use crate::persist::undo::OutputEnd;
use crate::persist::{Id, exclude, table, undo};
use crate::store::generation::{GenerationRecord, StreamRecord};
use crate::store::{Found, Job, RawFs};
use std::collections::BTreeSet;
use std::os::fd::{IntoRawFd, OwnedFd};

/// What restoring the descriptors must know of the files.
#[derive(Debug, Clone, Default)]
pub struct FilesBack {
    /// Inodes that were made anew: (device, inode) at the checkpoint and now.
    pub replaced: Vec<((u64, u64), (u64, u64))>,
    /// Files of the new start that hold what an output held at the checkpoint.
    pub filled: Vec<(u64, u64)>,
    /// `CKPT_REDIRECT`: paths at the checkpoint and now.
    pub redirect: Vec<(Vec<u8>, Vec<u8>)>,
    /// The same of files that stay where somebody else has moved them (`CKPT_FOREIGN=keep`),
    /// mapped ones as well.
    pub moved: Vec<(Vec<u8>, Vec<u8>)>,
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

/// Can the files be brought to this generation, or are they left alone?
pub fn can_reach(job: &Job<RawFs>, record: &GenerationRecord, config: &Config) -> bool {
    leaves_all_files(config) || obstacle(job, record, config).is_none()
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

/// The latest generation, which going back to this one by the user's wish leaves, where
/// that is to be kept. An error: it cannot be.
pub fn left(
    job: &Job<RawFs>,
    wanted: &GenerationRecord,
    config: &Config,
) -> Result<Option<GenerationRecord>, String> {
    let asked = matches!(config.resume, Resume::Generation(_) | Resume::Id(_));
    if !config.undo || !asked {
        return Ok(None);
    }
    let order = job.journal.order();
    let later = order.iter().rev();
    let mut later = later.take_while(|r| r.generation != wanted.generation);
    // A damaged one is not worth anything.
    let latest = later.find(|record| job.open_generation(record, false).is_ok());
    let Some(latest) = latest else {
        return Ok(None);
    };
    if !leaves_all_files(config)
        && let Some(reason) = obstacle(job, latest, config)
    {
        return Err(format!(
            "the state that is left cannot be kept ({reason}); CKPT_UNDO=0 drops it"
        ));
    }
    Ok(Some((*latest).clone()))
}

/// Brings the files to what they were at the generation. `left`: the latest generation,
/// which stays, so that one can go back to it.
pub fn go_back(
    job: &mut Job<RawFs>,
    record: &GenerationRecord,
    left: Option<&GenerationRecord>,
    (config, needs): (&Config, &Needs),
    terminal: bool,
) -> Result<FilesBack, String> {
    let lend = |id| lend(id, &given::duplicate);
    let way = Way {
        config,
        needed: &needs.paths,
        by_rules: false,
        outputs: Outputs::OfTheStart,
        lend: &lend,
        number: next_number(&job.dir)?,
    };
    if left.is_some() {
        let mut options = way.options(&[], &[]);
        let checked = undo::check_foreign(&job.dir, record.generation, &mut options);
        checked.map_err(|error| error.to_string())?;
    }
    let told = |report: &undo::Report| tell(report, terminal);
    let (mut inodes, mut restored) = (Vec::new(), FilesBack::default());
    restored.redirect.clone_from(&config.redirect);
    let first = left.unwrap_or(record);
    let dropped = job.drop_newer(first.generation, identity::realtime_ns());
    dropped.map_err(|error| error.to_string())?;
    way.refill(job, first, &[], &mut inodes, &mut restored)?;
    let ends = way.ends(job, first);
    let undone = undo::undo(&job.dir, first.generation, &mut way.options(&inodes, &ends));
    let mut report = undone.map_err(|error| error.to_string())?;
    told(&report);
    if let Some(left) = left {
        let from = (left, report.alive_ns);
        report = way.go_on_recorded(job, from, record, &mut inodes, &mut restored)?;
        told(&report);
    }
    restored.take(&report);
    let Strays { followed, lines } = needs.find_strays(&job.dir, config, &restored)?;
    lines.iter().for_each(|line| say(line, terminal));
    restored.moved.extend(followed);
    Ok(restored)
}

/// For a file that the process may not open itself, but was given to write.
fn lend(id: Id, copy: &dyn Fn(i32) -> Option<OwnedFd>) -> Option<i32> {
    let given = settings::get()?.inherited.as_slice();
    given::lend(given, id, copy).map(IntoRawFd::into_raw_fd)
}

/// What both ways of going back have in common.
struct Way<'a> {
    config: &'a Config,
    /// What the program has open or mapped at the generation, and must be found again.
    needed: &'a [Vec<u8>],
    /// What the program excludes by now is left alone as well.
    by_rules: bool,
    outputs: Outputs<'a>,
    /// `undo::Options::lend`.
    lend: &'a dyn Fn(Id) -> Option<i32>,
    /// Above all tables that there have been.
    number: u32,
}

impl Way<'_> {
    fn options<'o>(&'o self, inherited: &'o [Id], ends: &'o [OutputEnd]) -> undo::Options<'o> {
        undo::Options {
            foreign: self.config.foreign,
            restore_exclude: &self.config.restore_exclude,
            by_rules: self.by_rules,
            // At a rollback this very process has the latest one mapped.
            reuse: !self.by_rules,
            needed: self.needed,
            inside: self.by_rules,
            inherited,
            ends,
            lend: Some(self.lend),
            ..undo::Options::default()
        }
    }

    /// The streams of a generation whose files are not left alone.
    fn streams(&self, record: &GenerationRecord) -> Vec<StreamRecord> {
        let left_alone = |path: &[u8]| {
            is_excluded(&self.config.restore_exclude, path)
                || self.by_rules && exclude::is_excluded(path)
        };
        let streams = record.files.streams.iter();
        streams.filter(|s| !left_alone(&s.path)).cloned().collect()
    }

    /// The tables go with the undo, and the streams need them. `known`: streams that are
    /// dealt with.
    fn refill(
        &self,
        job: &Job<RawFs>,
        record: &GenerationRecord,
        known: &[StreamRecord],
        inodes: &mut Vec<Id>,
        restored: &mut FilesBack,
    ) -> Result<(), String> {
        let mut streams = self.streams(record);
        streams.retain(|s| known.iter().all(|k| k.number != s.number));
        let (generation, outputs) = (record.generation, &self.outputs);
        let outputs = refill::refill(&job.dir, generation, &streams, self.number, outputs)?;
        inodes.extend(outputs.inodes);
        restored.filled.extend(outputs.filled.iter().map(pair));
        Ok(())
    }

    fn ends(&self, job: &Job<RawFs>, record: &GenerationRecord) -> Vec<OutputEnd> {
        refill::ends(&job.dir, &self.streams(record))
    }

    /// From the state of `left`, where the files are, to that of `record`, so that it can be
    /// taken back: killed before its end the job is at `left` still, and no table is lost.
    fn go_on_recorded(
        &self,
        job: &mut Job<RawFs>,
        (left, alive_ns): (&GenerationRecord, i64),
        record: &GenerationRecord,
        inodes: &mut Vec<Id>,
        restored: &mut FilesBack,
    ) -> Result<undo::Report, String> {
        self.refill(job, record, &left.files.streams, inodes, restored)?;
        let to = record.generation;
        // The first undo may have made one of its own.
        let number = next_number(&job.dir)?;
        let table = (number, self.config.sync == Sync::Power);
        let ends = (left.generation, to);
        let output_ends = self.ends(job, record);
        let mut options = self.options(inodes, &output_ends);
        let report = undo::go_back_recorded(&job.dir, ends, table, alive_ns, &mut options);
        let report = report.map_err(|error| error.to_string())?;
        if let Some(reason) = &report.unrecorded {
            let generation = left.generation;
            log::complain(format_args!(
                "it will not be possible to go back to generation {generation}: {reason}"
            ));
        }
        // Now that the table has all that differs: the streams are those of `left` no more.
        refill::rewind(&job.dir, to, &self.streams(record))?;
        let empty = table::create_empty(&job.dir, number + 1, to, table.1);
        empty.map_err(|error| error.to_string())?;
        let noted = job.note_return(to, Some(left.generation), identity::realtime_ns());
        noted.map_err(|error| error.to_string())?;
        log::line(format_args!(
            "generation {} is kept: the state that was left",
            left.generation
        ));
        Ok(report)
    }
}

impl FilesBack {
    fn take(&mut self, report: &undo::Report) {
        self.moved.clone_from(&report.moved);
        let replaced = report.replaced.iter();
        self.replaced = replaced.map(|(old, new)| (pair(old), pair(new))).collect();
    }
}

fn pair(id: &Id) -> (u64, u64) {
    (id.dev, id.ino)
}

fn say(line: &str, terminal: bool) {
    log::line(format_args!("{line}"));
    if terminal {
        log::complain(format_args!("{line}"));
    }
}

fn foreign_line(file: &undo::ForeignFile) -> String {
    use undo::Fate;
    let (path, what) = (file.path.display(), file.what);
    let done = match (&file.fate, &file.aside) {
        (Fate::Plain, None) => "left as it is".to_owned(),
        (Fate::Plain, Some(_)) => String::new(),
        (Fate::Again, _) => "made again as it was".to_owned(),
        (Fate::Back(from), _) => format!("moved back from {}", from.display()),
        (Fate::Followed(to), _) => format!("it stays where it is, {}", to.display()),
    };
    let aside = file.aside.as_ref().map(|aside| match done.is_empty() {
        true => format!("that version is {}", aside.display()),
        false => format!("; what was there instead is {}", aside.display()),
    });
    let aside = aside.unwrap_or_default();
    format!("{path} was {what} by somebody else: {done}{aside}")
}

/// What an undo has done, in the log; what it has found of others, on a terminal as well.
fn tell(report: &undo::Report, terminal: bool) {
    for file in &report.foreign {
        say(&foreign_line(file), terminal);
    }
    if report.records > 0 {
        log::line(format_args!(
            "files: {} modifications of {} tables taken back",
            report.records, report.tables
        ));
    }
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

/// Does a recovery leave this file as it is?
pub fn leaves_alone_at_restore(config: &Config, path: &[u8]) -> bool {
    leaves_all_files(config) || is_excluded(&config.restore_exclude, path)
}

/// Does a rollback leave this file as it is?
pub fn leaves_alone(config: &Config, path: &[u8]) -> bool {
    leaves_all_now(config)
        || exclude::is_excluded(path)
        || is_excluded(&config.restore_exclude, path)
}

/// Rollback: can the files of the running program be brought to this generation? Changes
/// nothing. `open`: inodes that the program has open, where it stands still.
pub fn can_go_back(
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
    open: Option<&BTreeSet<Id>>,
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
    let exclude = &config.restore_exclude;
    let checked = undo::check_by_rules(&job.dir, record.generation, exclude, open);
    checked.map_err(|error| error.to_string())
}

/// Rollback, while the program stands still: as [`go_back`], but the program's outputs are
/// its own still (no new start has touched them), and what the program excludes by now is
/// left alone as well. `output` copies a descriptor of the program. Helper thread.
pub fn go_back_inside(
    job: &mut Job<RawFs>,
    record: &GenerationRecord,
    left: Option<u64>,
    config: &Config,
    output: &dyn Fn(i32) -> Option<OwnedFd>,
) -> Result<FilesBack, NotBack> {
    let unchanged = |error: &dyn std::fmt::Display| NotBack::Unchanged(error.to_string());
    let lend = |id| lend(id, output);
    let way = Way {
        config,
        needed: &[],
        by_rules: true,
        outputs: Outputs::OfTheProgram(output),
        lend: &lend,
        number: next_number(&job.dir).map_err(|e| unchanged(&e))?,
    };
    let left = match left {
        Some(left) => {
            let checked =
                undo::check_foreign(&job.dir, record.generation, &mut way.options(&[], &[]));
            checked.map_err(|error| unchanged(&error))?;
            let records = job.generations();
            let found = records.iter().find(|r| r.generation == left);
            let gone = || unchanged(&format_args!("generation {left} is gone"));
            Some((*found.ok_or_else(gone)?).clone())
        }
        None => None,
    };
    let (mut inodes, mut restored) = (Vec::new(), FilesBack::default());
    restored.redirect.clone_from(&config.redirect);
    restored.redirect.extend(redirect::asked());
    let first = left.as_ref().unwrap_or(record);
    let dropped = job.drop_newer(first.generation, identity::realtime_ns());
    dropped.map_err(|error| unchanged(&error))?;
    let refilled = way.refill(job, first, &[], &mut inodes, &mut restored);
    refilled.map_err(NotBack::Broken)?;
    let ends = way.ends(job, first);
    let undone = undo::undo(&job.dir, first.generation, &mut way.options(&inodes, &ends));
    let mut report = undone.map_err(|error| match error {
        undo::UndoError::Failed { .. } => NotBack::Broken(error.to_string()),
        _ => unchanged(&error),
    })?;
    tell(&report, false);
    if let Some(left) = &left {
        let from = (left, report.alive_ns);
        let returned = way.go_on_recorded(job, from, record, &mut inodes, &mut restored);
        report = returned.map_err(NotBack::Broken)?;
        tell(&report, false);
    }
    restored.take(&report);
    Ok(restored)
}

fn is_excluded(globs: &[Vec<u8>], path: &[u8]) -> bool {
    let mut globs = globs.iter();
    globs.any(|glob| crate::persist::exclude::matches(glob, path))
}
