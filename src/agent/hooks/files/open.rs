//! open, creat, openat, openat2: what they create and what they cut off. Any thread.
//!
//! Only opens that create a file or cut off a regular one are executed here; the others,
//! which may wait (a FIFO), go on untouched.

use super::data::concerns;
use super::guard::Recording;
use super::paths::{self, CWD, Name, NoName, Path};
use super::{cache, execute};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user;
use crate::persist::Coverage;

/// The flags of `open_how` that matter to a path's meaning.
const RESOLVE_IN_ROOT: u64 = 0x10;

/// The call's directory, the address of its path, its flags, openat2's `resolve`.
pub fn arguments(f: &CallFrame) -> Option<(i32, u64, i32, u64)> {
    let [a, b, c, ..] = f.args;
    Some(match f.rax {
        libc::SYS_open => (CWD, a, b as i32, 0),
        libc::SYS_creat => (CWD, a, libc::O_CREAT | libc::O_WRONLY | libc::O_TRUNC, 0),
        libc::SYS_openat => (a as i32, b, c as i32, 0),
        libc::SYS_openat2 => {
            let [flags, _, resolve] = user::read::<[u64; 3]>(c).ok()?;
            (a as i32, b, flags as i32, resolve)
        }
        _ => return None,
    })
}

/// Does an open with these flags modify anything?
pub fn modifies(flags: i32) -> bool {
    flags & libc::O_PATH == 0 && (flags & (libc::O_CREAT | libc::O_TRUNC) != 0 || is_unnamed(flags))
}

fn is_unnamed(flags: i32) -> bool {
    flags & libc::O_TMPFILE == libc::O_TMPFILE
}

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let (dir, path, flags, resolve) = arguments(f)?;
    if !modifies(flags) {
        return None;
    }
    let mut recording = Recording::begin()?;
    if is_unnamed(flags) {
        f.rax = execute(f);
        if let Ok(fd) = i32::try_from(f.rax)
            && let Ok(stat) = paths::stat_fd(fd)
        {
            recording.session.created(stat.id);
            opened(&mut recording, fd, &stat.id);
        }
        return Some(Verdict::Done);
    }
    let mut path = Path::read(path)?;
    if resolve & RESOLVE_IN_ROOT != 0 {
        let text = path.text();
        let at = text.iter().position(|&byte| byte != b'/')?;
        path = Path::of(&[text.get(at..)?])?;
    }
    let exclusive = flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL;
    let stay = exclusive || flags & libc::O_NOFOLLOW != 0;
    let found = paths::stat_at(dir, &path, if stay { libc::AT_SYMLINK_NOFOLLOW } else { 0 });
    match found {
        Ok(_) if exclusive || flags & libc::O_TRUNC == 0 => None,
        Ok(stat) if stat.is_regular() => cut_off(f, recording, dir, &path, !stay),
        Ok(_) => None,
        Err(libc::ENOENT) if flags & libc::O_CREAT != 0 && !path.is_empty() => {
            if stay {
                return create(f, recording, dir, &path);
            }
            let (dir, end) = paths::behind_links(dir, &path)?;
            create(f, recording, dir, &end)
        }
        Err(_) => None,
    }
}

/// O_TRUNC of a regular file.
fn cut_off(
    f: &mut CallFrame,
    mut recording: Recording,
    dir: i32,
    path: &Path,
    follow: bool,
) -> Option<Verdict> {
    let found = paths::find(dir, path, follow)?;
    if !paths::writable(dir, path) || !concerns(&recording, &found.full) {
        return None;
    }
    recording.session.before_truncate(&found.file(), 0);
    f.rax = execute(f);
    if let Ok(fd) = i32::try_from(f.rax)
        && fd >= 0
        && let Ok(stat) = paths::stat_fd(fd)
    {
        recording.session.touched(&stat);
        opened(&mut recording, fd, &stat.id);
    }
    Some(Verdict::Done)
}

/// O_CREAT of a name that is not there.
fn create(f: &mut CallFrame, mut recording: Recording, dir: i32, path: &Path) -> Option<Verdict> {
    if path.text().last() == Some(&b'/') {
        return None;
    }
    let name = name(&mut recording, dir, path)?;
    recording.session.before_create(&name.as_ref());
    f.rax = execute(f);
    if let Ok(fd) = i32::try_from(f.rax)
        && fd >= 0
        && let Ok(stat) = paths::stat_fd(fd)
    {
        recording.session.created(stat.id);
        opened(&mut recording, fd, &stat.id);
    }
    Some(Verdict::Done)
}

/// The name that a call is about to change. `None`: the call will fail, the name is left
/// alone, or it cannot be told, which the table then knows.
pub fn name(recording: &mut Recording, dir: i32, path: &Path) -> Option<Name> {
    match paths::name_at(dir, path) {
        Ok(name) if concerns(recording, &name.full) => Some(name),
        Ok(_) | Err(NoName::WillFail) => None,
        Err(NoName::Unknown) => {
            recording
                .session
                .incomplete(b"a changed name cannot be told (is /proc there?)");
            None
        }
    }
}

/// What is known of a descriptor from its beginning.
fn opened(recording: &mut Recording, fd: i32, id: &crate::persist::Id) {
    let stamp = cache::stamp();
    if recording.session.coverage(id) == Coverage::Free {
        let mark = recording.session.hot(id);
        cache::set(fd, cache::FREE | cache::KNOWN, mark, stamp);
    }
}
