//! Recovery at the start: is there a job to go on with? (FIG. 5, decision; FIG. 8.)
//!
//! Constructor, one thread, nothing of the program has run.

pub mod files;
mod needs;

use crate::agent::collect::identity;
use crate::agent::outputs::given;
use crate::agent::restore::{Contents, RestoreError};
use crate::agent::resume::Payload;
use crate::agent::{log, restore, settings, start, stop};
use crate::config::{Config, Resume};
use crate::store::fs::Fs;
use crate::store::start::{Recovery, Start};
use crate::store::{self, Found, Job, JobKey, RawFs, template};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// Restores the latest checkpoint if there is one (then it does not return); else
/// returns for a normal start.
pub fn try_recover(config: &Config, root: &Path, key: &JobKey) {
    let dir = key.dir(root, 1);
    let new = template::take_mark(&dir).then_some(&*dir);
    let recovery = match store::start::start(root, key, config.resume, config.verify) {
        Ok(Start::Fresh { busy }) => {
            if let Some(pid) = busy {
                log::line(format_args!(
                    "process {pid} runs the same command: this is another instance"
                ));
            }
            return;
        }
        Ok(Start::Recover(recovery)) => *recovery,
        Err(error) => give_up(
            new,
            format_args!("{error}; to start afresh: CKPT_RESUME=never, to look: ckpt list"),
        ),
    };
    recover(config, root, recovery, new)
}

/// The end of this start. `new`: a template's job that has never run is removed, it would be
/// there for ever.
fn give_up(new: Option<&Path>, message: std::fmt::Arguments<'_>) -> ! {
    if let Some(dir) = new {
        let _ = RawFs.remove_tree(dir);
    }
    start::give_up(message)
}

fn recover(config: &Config, root: &Path, recovery: Recovery, new: Option<&Path>) -> ! {
    let Recovery {
        lock,
        mut job,
        found,
        skipped,
    } = recovery;
    for damaged in &skipped {
        let message = format_args!("{damaged}; falling back to an older checkpoint");
        log::complain(message);
        log::line(message);
    }
    let name = job.name();
    let found = match files::choose(&job, found, config) {
        Ok(found) => found,
        Err(reason) => give_up(
            new,
            format_args!(
                "cannot restore job {name}: {reason}; to restore the memory alone: CKPT_RESTORE_EXCLUDE='*', to start afresh: CKPT_RESUME=never"
            ),
        ),
    };
    let (found, contents) = restorable(&job, found, config, new);
    let age_s = identity::realtime_ns().saturating_sub(found.record.time_ns) / 1_000_000_000;
    let generation = found.record.generation;
    log::line(format_args!(
        "recovering job {name}, generation {generation}, {age_s} s old"
    ));
    // SAFETY: no pointers.
    let terminal = unsafe { libc::isatty(2) } == 1;
    if terminal {
        log::complain(format_args!(
            "going on from checkpoint {generation} of job {name}, {age_s} s old (start afresh: CKPT_RESUME=never)"
        ));
    }
    let Some(member) = found.members.into_iter().next() else {
        give_up(
            new,
            format_args!("generation {generation} of job {name} has no member"),
        )
    };
    let left = files::left(&job, &found.record, config);
    let needs = needs::Needs::of(&member.image.manifest, config);
    let went = left.and_then(|left| {
        let how = (config, &needs);
        files::go_back(&mut job, &found.record, left.as_ref(), how, terminal)
    });
    let files = match went {
        Ok(files) => files,
        Err(reason) => give_up(
            new,
            format_args!("cannot restore job {name}, generation {generation}: {reason}"),
        ),
    };
    let payload = Payload {
        env: settings::get().map(|s| s.env.clone()).unwrap_or_default(),
        job_dir: job.dir.as_os_str().as_bytes().to_vec(),
        job_key: settings::get()
            .map(|s| s.job_key.clone())
            .unwrap_or_default(),
        store_root: root.as_os_str().as_bytes().to_vec(),
        generation,
        inherited: settings::get()
            .map(|s| s.inherited.clone())
            .unwrap_or_default(),
        outputs: settings::get()
            .map(|s| given::with_filled(s, &files.filled))
            .unwrap_or_default(),
        limits: settings::get()
            .map(|s| s.limits.clone())
            .unwrap_or_default(),
        credentials: settings::get()
            .map(|s| s.credentials.clone())
            .unwrap_or_default(),
        affinity: settings::get()
            .map(|s| s.affinity.clone())
            .unwrap_or_default(),
        started_ns: stop::now_ns(),
        ..Payload::default()
    };
    let options = restore::Options {
        method: config.restore,
        job: job.dir.clone(),
        files,
        inside: None,
        contents,
    };
    match restore::restore(member, Some(lock.into_fd()), options, payload) {
        Ok(never) => match never {},
        Err(error) => give_up(
            new,
            format_args!("cannot restore job {name}, generation {generation}: {error}"),
        ),
    }
}

/// The generation found, if its memory can be restored on this machine; where that is the
/// generation's own fault, an older one. Before anything is done to a file.
fn restorable(
    job: &Job<RawFs>,
    found: Found<RawFs>,
    config: &Config,
    new: Option<&Path>,
) -> (Found<RawFs>, Option<Contents>) {
    let generation = found.record.generation;
    let check = |found: &Found<RawFs>| -> Result<Option<Contents>, RestoreError> {
        let Some(member) = found.members.first() else {
            return Ok(None);
        };
        restore::check::machine(&member.image.manifest)?;
        restore::handlers::check(member)?;
        // Compressed images are read here, and compared with their checksums.
        Contents::of(member, &job.dir).map(Some)
    };
    let error = match check(&found) {
        Ok(contents) => return (found, contents),
        Err(error) => error,
    };
    if error.is_of_the_generation() && config.resume == Resume::Auto {
        let older = job.generations().into_iter().rev();
        for record in older.filter(|r| r.generation < generation) {
            if files::can_reach(job, record, config)
                && let Ok(found) = job.open_generation(record, config.verify)
                && let Ok(contents) = check(&found)
            {
                let message = format_args!(
                    "generation {generation}: {error}; falling back to an older checkpoint"
                );
                log::complain(message);
                log::line(message);
                return (found, contents);
            }
        }
    }
    let name = job.name();
    give_up(
        new,
        format_args!("cannot restore job {name}, generation {generation}: {error}"),
    )
}
