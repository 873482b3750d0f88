//! Files of the checkpoint that the program has closed since: can they be opened again? Those
//! that it maps privately, and its directory: are they what they were? What cannot be had must
//! be found out before there is no way back.
//!
//! Helper thread, the program stopped. Nothing is changed: a file is opened for a moment in the
//! helper's own table.

use crate::agent::collect::descriptors::{fdinfo::FdInfo, sys};
use crate::agent::recover::files;
use crate::agent::restore::check as machine;
use crate::agent::restore::descriptors::regular;
use crate::agent::rollback::redirect;
use crate::agent::settings;
use crate::agent::state::AGENT;
use crate::config::Config;
use crate::image::state::{DescriptorTable, FileKind, Manifest, OpenFileState};
use crate::persist::{Id, undo};
use crate::store::generation::GenerationRecord;
use crate::store::{Job, RawFs};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// An object, and how it is open (`O_ACCMODE`).
type Opened = (u64, u64, i32);

/// Checks all descriptions of the checkpoint that would have to be opened by their names.
pub fn check(
    manifest: &Manifest,
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
) -> Result<(), String> {
    directory(manifest, job, record, config)?;
    let table = &manifest.descriptors;
    let mut used = vec![false; table.files.len()];
    for d in &table.fds {
        used[d.file as usize] = true;
    }
    let mut open = open_now();
    let mut redirects = config.redirect.clone();
    redirects.extend(redirect::asked());
    let files = table.files.iter().zip(used).enumerate();
    for (number, (state, _)) in files.filter(|(_, (_, used))| *used) {
        let (path, dev, ino) = match &state.kind {
            FileKind::Regular { path, dev, ino, .. } => (path, *dev, *ino),
            FileKind::Directory { path, ino } => (path, 0, *ino),
            _ => continue,
        };
        if is_given(table, number, (dev, ino), &open) {
            continue;
        }
        let redirected = redirects.iter().rev().find(|(old, _)| old == path);
        if let Some((_, new)) = redirected {
            regular::would_open(new, state.flags)
                .map_err(|errno| sentence(new, &sys::errno_text(errno)))?;
            continue;
        }
        let access = state.flags as i32 & libc::O_ACCMODE;
        if let Some(count) = open.get_mut(&(dev, ino, access)).filter(|n| **n > 0) {
            *count -= 1;
            continue;
        }
        let Err(reason) = as_it_was(path, ino, state) else {
            continue;
        };
        if !comes_back(job, record, config, path, Id { dev, ino })? {
            return Err(sentence(path, &reason));
        }
    }
    Ok(())
}

/// Do the tables bring this file back?
fn comes_back(
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
    path: &[u8],
    id: Id,
) -> Result<bool, String> {
    let exclude = &config.restore_exclude;
    if files::leaves_alone(config, path) {
        return Ok(false);
    }
    let concerns = undo::reach::concerns(&job.dir, record.generation, exclude, path, id);
    concerns.map_err(|error| error.to_string())
}

/// The files that memory maps privately. True: some are others now, but the tables bring them
/// back, and then they must be looked at again.
pub fn mapped(
    manifest: &Manifest,
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
) -> Result<bool, String> {
    let mut later = false;
    for object in &manifest.identity.objects {
        let Err(error) = machine::object(object) else {
            continue;
        };
        let (dev, ino) = sys::stat(&object.path).map_or((0, 0), |st| (st.st_dev, st.st_ino));
        if !comes_back(job, record, config, &object.path, Id { dev, ino })? {
            return Err(error.to_string());
        }
        later = true;
    }
    Ok(later)
}

/// The working directory of the checkpoint.
fn directory(
    manifest: &Manifest,
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
) -> Result<(), String> {
    let path = &manifest.process.cwd;
    let (dev, ino) = manifest.cwd_object;
    let reason = match sys::stat(path) {
        Ok(st) if st.st_mode & libc::S_IFMT != libc::S_IFDIR => {
            "it is no directory any more".into()
        }
        // Unknown: an image of an older program.
        Ok(st)
            if ino != 0 && (st.st_dev, st.st_ino) != (dev, ino) && !path.starts_with(b"/proc/") =>
        {
            "another one has taken its place".to_owned()
        }
        Ok(_) => return Ok(()),
        Err(errno) => sys::errno_text(errno),
    };
    if comes_back(job, record, config, path, Id { dev, ino })? {
        return Ok(());
    }
    let path = String::from_utf8_lossy(path);
    Err(format!(
        "{path}, the working directory of the checkpoint: {reason}"
    ))
}

/// Does one of the description's numbers take what this life was started with there, which is
/// another file than the life of the checkpoint had (`descriptors::kept`)?
fn is_given(
    table: &DescriptorTable,
    file: usize,
    then: (u64, u64),
    open: &BTreeMap<Opened, u32>,
) -> bool {
    let given = settings::get().map_or(&[][..], |s| &s.inherited);
    let mut numbers = table
        .fds
        .iter()
        .filter(|d| d.file as usize == file && d.inherited);
    numbers.any(|d| {
        given.iter().any(|&(fd, dev, ino)| {
            let other = ino != then.1 || then.0 != 0 && dev != then.0;
            let is_open = || open.keys().any(|k| k.1 == ino && (k.0 == dev || k.0 == 0));
            fd == d.fd && other && is_open()
        })
    })
}

fn sentence(path: &[u8], reason: &str) -> String {
    let path = String::from_utf8_lossy(path);
    format!("{path} was open at the checkpoint and cannot be opened again: {reason}")
}

/// Is the file still there, and can it be opened?
fn as_it_was(path: &[u8], ino: u64, state: &OpenFileState) -> Result<(), String> {
    let flags = match &state.kind {
        FileKind::Directory { .. } => state.flags | libc::O_DIRECTORY as u32,
        _ => state.flags,
    };
    match regular::would_open(path, flags) {
        Ok(Some(st)) if st.st_ino != ino => Err("another file has taken its place".into()),
        Ok(_) => Ok(()),
        Err(errno) => Err(sys::errno_text(errno)),
    }
}

/// How often each object is open in the program. Directories without their device, which an
/// image does not have.
fn open_now() -> BTreeMap<Opened, u32> {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    let task = format!("/proc/self/task/{leader}");
    let mut open = BTreeMap::new();
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let (Ok(fds), Ok(infos)) = (
        sys::open(format!("{task}/fd").as_bytes(), flags, 0),
        sys::open(format!("{task}/fdinfo").as_bytes(), flags, 0),
    ) else {
        return open;
    };
    let mut text = Vec::new();
    for name in sys::list_dir(fds.raw()).unwrap_or_default() {
        let name = sys::cstr(&name);
        let Ok(st) = sys::fstatat(fds.raw(), &name, 0) else {
            continue;
        };
        text.clear();
        if sys::read_file(infos.raw(), &name, &mut text).is_err() {
            continue;
        }
        let info = FdInfo::parse(&text);
        let access = info.flags as i32 & libc::O_ACCMODE;
        let dev = match st.st_mode & libc::S_IFMT {
            libc::S_IFDIR => 0,
            _ => st.st_dev,
        };
        *open.entry((dev, st.st_ino, access)).or_insert(0) += 1;
    }
    open
}
