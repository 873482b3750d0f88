//! The files' half of a checkpoint: the table that leads back to it, and the streams of
//! the program's outputs. Helper thread; [`Beginning::install`] while the program is stopped, [`resume`] before
//! the threads of a restored program run.

use super::mapped::{self, Held, Mapping};
use crate::agent::outputs::keep::{Output, Streams};
use crate::agent::{hooks, log};
use crate::config::{Config, Sync};
use crate::persist::table::{self, Prepared};
use crate::persist::undo;
use crate::store::generation::{FilesRecord, GenerationRecord};
use crate::store::{Job, RawFs};
use std::path::Path;
use std::sync::atomic::{AtomicU32, Ordering};

/// The highest table number of this life and, since it is in the image, of the lives
/// before. Everything in memory that is stamped with a number has a lower one or this: a number is
/// never used again, though the file is gone.
static HIGHEST: AtomicU32 = AtomicU32::new(0);

pub fn next_number(job: &Path) -> Result<u32, String> {
    let on_disk = undo::next_number(job).map_err(|e| e.to_string())?;
    let highest = HIGHEST.load(Ordering::SeqCst);
    let next = highest.checked_add(1).ok_or("no table number is left")?;
    let next = next.max(on_disk);
    HIGHEST.store(next, Ordering::SeqCst);
    Ok(next)
}

fn power(config: &Config) -> bool {
    config.sync == Sync::Power
}

/// A table made for the coming stop, or why there is none.
#[derive(Debug)]
pub struct Beginning {
    job: std::path::PathBuf,
    number: u32,
    prepared: Option<Prepared>,
    failed: Option<String>,
    installed: bool,
}

impl Beginning {
    /// Before the stop.
    pub fn new(job: &Path, generation: u64, config: &Config) -> Beginning {
        let made = next_number(job).and_then(|number| {
            let prepared = table::create(job, number, generation, power(config));
            Ok((number, prepared.map_err(|e| e.to_string())?))
        });
        let (number, prepared, failed) = match made {
            Ok((number, prepared)) => (number, Some(prepared), None),
            Err(reason) => (0, None, Some(reason)),
        };
        Beginning {
            job: job.to_owned(),
            number,
            prepared,
            failed,
            installed: false,
        }
    }

    pub fn job(&self) -> &Path {
        &self.job
    }

    /// During the stop, once there is a snapshot: from here on the table counts, whatever
    /// becomes of the snapshot.
    pub fn install(&mut self, mapped: &[Held]) {
        if let Some(prepared) = self.prepared.take() {
            table::install(prepared);
            hooks::files::arm();
            hooks::files::turns::begin();
            mapped::record(mapped);
            self.installed = true;
        }
    }

    /// The number of the table, if it is in force.
    fn number(&self) -> Option<u32> {
        self.installed.then_some(self.number)
    }
}

impl Drop for Beginning {
    /// No snapshot was taken: the table before this one goes on.
    fn drop(&mut self) {
        if let Some(prepared) = self.prepared.take() {
            drop(prepared);
            if let Err(error) = table::remove(&self.job, self.number) {
                log::line(format_args!("{error}"));
            }
        }
    }
}

/// After the release: what the generation's record says of the files.
pub fn finish(beginning: &Beginning, streams: &mut Streams, outputs: Vec<Output>) -> FilesRecord {
    let Some(number) = beginning.number() else {
        let reason = beginning.failed.clone();
        let reason = reason.unwrap_or_else(|| "no table was begun".into());
        log::line(format_args!("files incomplete: {reason}"));
        return FilesRecord {
            incomplete: Some(reason),
            ..FilesRecord::default()
        };
    };
    table::close_previous();
    FilesRecord {
        incomplete: None,
        table: number,
        streams: streams.update(&beginning.job, outputs, number),
    }
}

/// Removes tables and streams that no generation needs.
pub fn prune(job: &Job<RawFs>) {
    if let Err(error) = job.prune_files() {
        log::line(format_args!("{error}"));
    }
}

/// In the restored helper, before the program's threads run: the table that leads back
/// to the generation once more.
pub fn resume(
    job: &Path,
    generation: u64,
    config: &Config,
    mapped: &[Mapping],
) -> Result<(), String> {
    let number = next_number(job)?;
    let prepared =
        table::create(job, number, generation, power(config)).map_err(|e| e.to_string())?;
    table::install(prepared);
    hooks::files::arm();
    hooks::files::turns::expect_several();
    mapped::record(&mapped::hold(mapped.to_vec()));
    Ok(())
}

/// The streams that a restored program goes on with.
pub fn adopt_streams(job: &Path, record: Option<&&GenerationRecord>) -> Streams {
    let number = HIGHEST.load(Ordering::SeqCst);
    let streams = record.map(|r| &r.files.streams[..]).unwrap_or_default();
    Streams::adopt(job, streams, number)
}
