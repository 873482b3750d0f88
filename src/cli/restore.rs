//! `ckpt restore`: starts a job's recorded command line again, where it was recorded,
//! to go on from one of its generations.

use super::exec::{self, Environment};
use super::{Cli, Outcome, select};
use crate::agent::restore::descriptors::regular;
use crate::config::{Resume, join_arguments};
use crate::image::state::{DescriptorTable, FileKind, OpenFileState};
use crate::store::template::Given;
use crate::store::{Fs, Owner, RawFs};
use anyhow::{Context, bail};
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// Start a job again from a checkpoint
///
/// The recorded program is started with its recorded arguments in its recorded
/// directory, and becomes the process of the checkpoint.
///
/// With --template the job stays as it is, and the process goes on in a new job that begins
/// with a copy (by hard links) of the checkpoint. Any number of them may run side by side.
/// Files are left as they are; --redirect gives each its own inputs and outputs. NEW exists
/// already; where the program had OLD open for writing only, it is made.
#[derive(Debug, Default, clap::Args)]
pub struct Args {
    /// Key, name or beginning of one [default: the only job there is]
    job: Option<String>,
    /// The generation to go on from [default: the latest valid one]
    #[arg(long, value_name = "N")]
    generation: Option<u64>,
    /// Checkpoint by the clock from then on: 90, 500ms, 15m, 1h30m, default, auto, off
    #[arg(long, value_name = "TIME")]
    interval: Option<String>,
    /// How memory comes back: auto, lazy, eager
    #[arg(long, value_name = "METHOD")]
    restore: Option<String>,
    /// Leave these files as they are now: an absolute path pattern, * for all (repeatable)
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<OsString>,
    /// Open NEW where the program had OLD open (repeatable)
    #[arg(long, value_name = "OLD=NEW")]
    redirect: Vec<OsString>,
    /// Verify all page data first
    #[arg(long)]
    verify: bool,
    /// What ckpt_checkpoint returns, greater than 0
    #[arg(long, value_name = "N")]
    value: Option<String>,
    /// Leave the job as it is and go on in a new one
    #[arg(long)]
    template: bool,
    /// With --template: what ckpt_argument gives the program
    #[arg(last = true, requires = "template", allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// `OLD=NEW` with both paths absolute, if that can be done at this checkpoint.
fn redirection(pair: &OsString, table: &DescriptorTable) -> anyhow::Result<OsString> {
    let bytes = pair.as_bytes();
    let Some(at) = bytes.iter().position(|&b| b == b'=') else {
        bail!("--redirect {}: expected OLD=NEW", pair.to_string_lossy());
    };
    let absolute = |path: &[u8]| std::path::absolute(OsStr::from_bytes(path));
    let (old, new) = (absolute(&bytes[..at])?, absolute(&bytes[at + 1..])?);
    let old = open_at(old, &new, table)
        .with_context(|| format!("--redirect {}", pair.to_string_lossy()))?;
    let mut whole = old.into_os_string();
    whole.push("=");
    whole.push(new);
    Ok(whole)
}

/// `old` as it is in the checkpoint.
fn open_at(old: PathBuf, new: &Path, table: &DescriptorTable) -> anyhow::Result<PathBuf> {
    let is = |file: &OpenFileState, wanted: &Path| match &file.kind {
        FileKind::Regular { path, .. } | FileKind::Directory { path, .. } => {
            path == wanted.as_os_str().as_bytes()
        }
        _ => false,
    };
    let at = |path: &Path| table.files.iter().position(|file| is(file, path));
    // The checkpoint has names without symbolic links.
    let real = || std::fs::canonicalize(&old).ok();
    let found = at(&old).map(|k| (k, old.clone()));
    let found = found.or_else(|| real().and_then(|real| Some((at(&real)?, real))));
    let Some((number, old)) = found else {
        // A start that was led there already has been checkpointed since.
        if at(new).is_some() {
            return Ok(old);
        }
        bail!("nothing is open at {} in this checkpoint", old.display());
    };
    let mut fds = table.fds.iter().filter(|d| d.file as usize == number);
    if fds.all(|d| d.inherited && d.fd <= 2) {
        bail!(
            "{} is a standard stream: the new start's own takes its place",
            old.display()
        );
    }
    let file = &table.files[number];
    let kind = match &file.kind {
        FileKind::Regular { mode, .. } => mode & libc::S_IFMT,
        _ => libc::S_IFDIR,
    };
    match std::fs::metadata(new) {
        Ok(there) if there.mode() & libc::S_IFMT != kind => {
            bail!("{} is not a file of the same kind", new.display())
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            let parent = new.parent().filter(|_| regular::makes(file.flags));
            if !parent.is_some_and(Path::is_dir) {
                return Err(error).with_context(|| new.display().to_string());
            }
        }
        _ => {}
    }
    Ok(old)
}

pub fn run(cli: &Cli, args: &Args, sigpipe_ignored: bool) -> Outcome {
    start(cli, args, false, sigpipe_ignored)
}

/// `ckpt undo` of a job that does not run: the state that this leaves is kept too.
pub fn undo(cli: &Cli, job: String, generation: u64, sigpipe_ignored: bool) -> Outcome {
    let args = Args {
        job: Some(job),
        generation: Some(generation),
        ..Args::default()
    };
    start(cli, &args, true, sigpipe_ignored)
}

fn start(cli: &Cli, args: &Args, undo: bool, sigpipe_ignored: bool) -> Outcome {
    let root = select::root(cli)?;
    let job = select::job(&root, args.job.as_deref())?;
    if let Some(owner) = select::owner(&job)
        && !args.template
    {
        bail!("job {} is running (process {})", job.name(), owner.pid);
    }
    let resume = args.generation.map_or(Resume::Auto, Resume::Generation);
    let (found, skipped) = job.find(resume, false)?;
    for skipped in skipped {
        tracing::warn!("{skipped}");
    }
    let Some(found) = found else {
        bail!("job {} has no checkpoint", job.name());
    };
    let generation = found.record.generation;
    let member = found
        .members
        .first()
        .context("the generation has no member")?;
    let process = &member.image.manifest.process;
    let exe = Path::new(OsStr::from_bytes(&process.exe));
    let arguments = exec::arguments(&process.cmdline);
    if exe.as_os_str().is_empty() || arguments.is_empty() {
        bail!("generation {generation} records no command line");
    }

    let mut env = Environment::inherited();
    env.set("CKPT_DIR", &root);
    env.set("CKPT_RESUME", generation.to_string());
    if undo {
        env.set("CKPT_UNDO", "1");
    }
    if let Some(interval) = &args.interval {
        env.set("CKPT_INTERVAL", interval);
    }
    if let Some(method) = &args.restore {
        env.set("CKPT_RESTORE", method);
    }
    if let Some(value) = &args.value {
        env.set("CKPT_RETURN_VALUE", value);
    }
    let table = &member.image.manifest.descriptors;
    let redirect = args.redirect.iter().map(|pair| redirection(pair, table));
    let redirect = redirect.collect::<anyhow::Result<Vec<OsString>>>()?;
    env.set_list("CKPT_REDIRECT", &redirect)?;
    env.set_list("CKPT_RESTORE_EXCLUDE", &args.exclude)?;
    // What the start from a template was given holds for the job's later starts as well; the
    // redirects as long as it goes on from the template's own generation.
    let kept = Given::read(&job.dir).unwrap_or_default();
    let unset = |env: &Environment, name: &str| env.get(name).is_none_or(OsStr::is_empty);
    if generation <= kept.generation && !kept.redirect.is_empty() && unset(&env, "CKPT_REDIRECT") {
        env.set("CKPT_REDIRECT", OsStr::from_bytes(&kept.redirect));
    }
    if !kept.arguments.is_empty() && unset(&env, "CKPT_ARGUMENTS") {
        env.set("CKPT_ARGUMENTS", OsStr::from_bytes(&kept.arguments));
    }
    if args.template {
        // The template's files belong to all who go on from it.
        env.set("CKPT_RESTORE_EXCLUDE", "*");
        let arguments = args.arguments.iter().map(|a| a.as_bytes());
        env.set("CKPT_ARGUMENTS", join_arguments(arguments));
    }
    if args.verify {
        env.set("CKPT_VERIFY", "1");
    }
    env.validate()?;
    let library = exec::library()?;
    env.preload(&library)?;
    let cwd = Path::new(OsStr::from_bytes(&process.cwd));
    std::env::set_current_dir(cwd).with_context(|| format!("enter {}", cwd.display()))?;
    let path = exec::resolve(exe.as_os_str())?;
    // Nothing is left to go wrong here: now the new job.
    let instance = match args.template {
        true => Some(job.instance_of(&root, &found.record, &Owner::current()?)?),
        false => None,
    };
    if let Some(instance) = &instance {
        let value = |name| env.get(name).unwrap_or_default().as_bytes().to_vec();
        let given = Given {
            generation,
            redirect: value("CKPT_REDIRECT"),
            arguments: value("CKPT_ARGUMENTS"),
        };
        if let Err(error) = given.write(&instance.dir) {
            let _ = RawFs.remove_tree(&instance.dir);
            bail!("keep what {} is given: {error}", instance.dir.display());
        }
    }
    let name = instance.as_ref().map(|i| i.key.as_str().to_owned());
    let name = name.unwrap_or_else(|| job.name());
    env.set("CKPT_JOB", format!("={name}"));
    tracing::info!("generation {generation}, in job {name}");
    drop(found);
    let error = exec::become_program(&path, &arguments, &env, sigpipe_ignored);
    if let Some(instance) = instance {
        let _ = RawFs.remove_tree(&instance.dir);
    }
    Err(error)
}
