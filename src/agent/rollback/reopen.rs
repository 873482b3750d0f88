//! Files of the checkpoint that the program has closed since: can they be opened again? What
//! cannot must be found out before there is no way back.
//!
//! Helper thread, the program stopped. Nothing is changed: a file is opened for a moment in the
//! helper's own table.

use crate::agent::collect::descriptors::{fdinfo::FdInfo, sys};
use crate::agent::recover::files;
use crate::agent::restore::descriptors::regular;
use crate::agent::rollback::redirect;
use crate::agent::state::AGENT;
use crate::config::Config;
use crate::image::state::{DescriptorTable, FileKind, OpenFileState};
use crate::persist::{Id, undo};
use crate::store::generation::GenerationRecord;
use crate::store::{Job, RawFs};
use std::collections::BTreeMap;
use std::sync::atomic::Ordering;

/// An object, and how it is open (`O_ACCMODE`).
type Opened = (u64, u64, i32);

/// Checks all descriptions of the checkpoint that would have to be opened by their names.
pub fn check(
    table: &DescriptorTable,
    job: &Job<RawFs>,
    record: &GenerationRecord,
    config: &Config,
) -> Result<(), String> {
    let mut used = vec![false; table.files.len()];
    for d in &table.fds {
        used[d.file as usize] = true;
    }
    let mut open = open_now();
    let mut redirects = config.redirect.clone();
    redirects.extend(redirect::asked());
    let files = table.files.iter().zip(used).filter(|(_, used)| *used);
    for (state, _) in files {
        let (path, dev, ino) = match &state.kind {
            FileKind::Regular { path, dev, ino, .. } => (path, *dev, *ino),
            FileKind::Directory { path, ino } => (path, 0, *ino),
            _ => continue,
        };
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
        let id = Id { dev, ino };
        let exclude = &config.restore_exclude;
        let comes_back = !files::leaves_alone(config, path)
            && undo::reach::concerns(&job.dir, record.generation, exclude, path, id)
                .map_err(|error| error.to_string())?;
        if !comes_back {
            return Err(sentence(path, &reason));
        }
    }
    Ok(())
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
