//! Files of the checkpoint that the program has closed since: can they be opened again? Those
//! that it maps privately, and its directory: are they what they were? What cannot be had must
//! be found out before there is no way back. Other objects with names: [`named`].
//!
//! Helper thread, the program stopped. Nothing is changed: a file is opened for a moment in the
//! helper's own table.

use crate::agent::collect::descriptors::{fdinfo, fdinfo::FdInfo, handed, sys};
use crate::agent::recover::files;
use crate::agent::restore::check as machine;
use crate::agent::restore::descriptors::regular;
use crate::agent::rollback::{named, redirect};
use crate::agent::settings;
use crate::agent::state::AGENT;
use crate::config::Config;
use crate::image::state::{DescriptorTable, FileKind, Manifest, OpenFileState};
use crate::persist::{Id, undo};
use crate::store::generation::GenerationRecord;
use crate::store::{Job, RawFs};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::Ordering;

/// An object, and how it is open (`O_ACCMODE`).
type Opened = (u64, u64, i32);

/// Checks the working directory and all descriptions of the checkpoint that would have to be
/// opened by their names.
pub fn check(
    manifest: &Manifest,
    mut open: OpenNow,
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
    let comes_back = |path: &[u8], id: Id| comes_back(job, record, config, path, id);
    let mut redirects = config.redirect.clone();
    redirects.extend(redirect::asked());
    let files = table.files.iter().zip(used).enumerate();
    for (number, (state, _)) in files.filter(|(_, (_, used))| *used) {
        let (path, dev, ino) = match &state.kind {
            FileKind::Regular { path, dev, ino, .. } => (path, *dev, *ino),
            FileKind::Directory { path, ino } => (path, 0, *ino),
            other => {
                if let Err((path, reason)) = named::can_be_made(other, &open.sockets)
                    && (path.is_empty() || !comes_back(&path, NO_INODE)?)
                {
                    return Err(reason);
                }
                continue;
            }
        };
        if is_given(table, number, (dev, ino), &open) {
            continue;
        }
        let redirected = redirects.iter().rev().find(|(old, _)| old == path);
        if let Some((_, new)) = redirected {
            if !files::leaves_alone(config, new)
                && undo::reach::removes(&job.dir, record.generation, &config.restore_exclude, new)
                    .map_err(|error| error.to_string())?
            {
                return Err(format!(
                    "ckpt_redirect: {} was made since the checkpoint, and would be removed by the rollback (ckpt_exclude leaves it)",
                    String::from_utf8_lossy(new)
                ));
            }
            if regular::would_make(new, state.flags) {
                continue;
            }
            let opened = regular::would_open(new, flags(state));
            let opened = opened.map_err(|errno| sentence(new, &sys::errno_text(errno)))?;
            if !same_kind(state, &opened) {
                let (old, new) = (String::from_utf8_lossy(path), String::from_utf8_lossy(new));
                return Err(format!(
                    "{new}, which {old} is redirected to, is no file of its kind"
                ));
            }
            continue;
        }
        let access = state.flags as i32 & libc::O_ACCMODE;
        let files = &mut open.files;
        if let Some(count) = files.get_mut(&(dev, ino, access)).filter(|n| **n > 0) {
            *count -= 1;
            continue;
        }
        let Err(reason) = as_it_was(path, ino, state) else {
            continue;
        };
        if !comes_back(path, Id { dev, ino })? {
            return Err(sentence(path, &reason));
        }
    }
    Ok(())
}

/// Only the path counts.
const NO_INODE: Id = Id { dev: 0, ino: 0 };

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
        Ok(_) => match named::can_be_entered(path) {
            Ok(()) => return Ok(()),
            Err(errno) => sys::errno_text(errno),
        },
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
fn is_given(table: &DescriptorTable, file: usize, then: (u64, u64), open: &OpenNow) -> bool {
    let given = settings::get().map_or(&[][..], |s| &s.inherited);
    let mut numbers = table
        .fds
        .iter()
        .filter(|d| d.file as usize == file && d.inherited);
    numbers.any(|d| {
        given.iter().any(|&(fd, dev, ino)| {
            let other = ino != then.1 || then.0 != 0 && dev != then.0;
            let is_open = || {
                open.files
                    .keys()
                    .any(|k| k.1 == ino && (k.0 == dev || k.0 == 0))
            };
            fd == d.fd && other && is_open()
        })
    })
}

fn sentence(path: &[u8], reason: &str) -> String {
    let path = String::from_utf8_lossy(path);
    format!("{path} was open at the checkpoint and cannot be opened again: {reason}")
}

fn flags(state: &OpenFileState) -> u32 {
    match &state.kind {
        FileKind::Directory { .. } => state.flags | libc::O_DIRECTORY as u32,
        _ => state.flags,
    }
}

fn same_kind(state: &OpenFileState, opened: &regular::Opened) -> bool {
    match &state.kind {
        FileKind::Regular { mode, .. } => (opened.stat.st_mode ^ mode) & libc::S_IFMT == 0,
        _ => true,
    }
}

/// Is the file still there, and can it be opened?
fn as_it_was(path: &[u8], ino: u64, state: &OpenFileState) -> Result<(), String> {
    match regular::would_open(path, flags(state)) {
        Ok(opened) if !same_kind(state, &opened) || opened.stable && opened.stat.st_ino != ino => {
            Err("another file has taken its place".into())
        }
        Ok(_) => Ok(()),
        Err(errno) => Err(sys::errno_text(errno)),
    }
}

/// What the program has open.
#[derive(Default)]
pub struct OpenNow {
    /// How often each object is open. Directories without their device, which an image does
    /// not have.
    files: BTreeMap<Opened, u32>,
    sockets: Vec<named::Socket>,
}

impl OpenNow {
    pub fn inodes(&self) -> BTreeSet<Id> {
        let files = self.files.keys();
        files.map(|&(dev, ino, _)| Id { dev, ino }).collect()
    }
}

pub fn open_now() -> OpenNow {
    let leader = AGENT.real_pid.load(Ordering::Relaxed);
    let task = format!("/proc/self/task/{leader}");
    let mut open = OpenNow::default();
    let pidfd = sys::pidfd_of(leader, leader);
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let (Ok(fds), Ok(infos)) = (
        sys::open(format!("{task}/fd").as_bytes(), flags, 0),
        sys::open(format!("{task}/fdinfo").as_bytes(), flags, 0),
    ) else {
        return open;
    };
    let mut text = Vec::new();
    for name in sys::list_dir(fds.raw()).unwrap_or_default() {
        let (number, name) = (fdinfo::number(&name, 10) as i32, sys::cstr(&name));
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
        *open.files.entry((dev, st.st_ino, access)).or_insert(0) += 1;
        if st.st_mode & libc::S_IFMT == libc::S_IFSOCK
            && let Ok(pidfd) = &pidfd
            && let Ok(fd) = handed::copy(pidfd.raw(), number)
        {
            open.sockets.push(named::Socket::of(st.st_ino, &fd));
        }
    }
    open
}
