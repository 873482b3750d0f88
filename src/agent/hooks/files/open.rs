//! open, creat, openat, openat2: what they create and what they cut off. Any thread.
//!
//! Only opens that create a file or cut off a regular one are executed here; the others,
//! which may wait (a FIFO), go on untouched.

use super::data::{concerns, of_interest};
use super::guard::Recording;
use super::paths::{self, CWD, Name, NoName, Path};
use super::{cache, execute, saved};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::{pinned, user};
use crate::persist::recorder::with_room;
use crate::persist::{Coverage, Stat};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

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
    if f.rax == libc::SYS_open_by_handle_at {
        return by_handle(f);
    }
    let (dir, path, flags, resolve) = arguments(f)?;
    if !modifies(flags) {
        return None;
    }
    let mut recording = Recording::begin()?;
    if is_unnamed(flags) {
        f.rax = execute(f);
        made(f, &mut recording);
        return Some(Verdict::Done);
    }
    let exclusive = flags & (libc::O_CREAT | libc::O_EXCL) == libc::O_CREAT | libc::O_EXCL;
    let stay = exclusive || flags & libc::O_NOFOLLOW != 0;
    let (mut dir, mut at) = (dir, path);
    let mut own = None;
    if resolve & RESOLVE_IN_ROOT != 0 {
        let path = Path::read(at).filter(|path| !path.is_empty())?;
        // What leads nowhere there is refused by the kernel.
        let real = with_room(|| super::resolve::real_in_root(dir, path.text(), !stay))?;
        let path = own.insert(Path::of(&[&real.path])?);
        (dir, at) = (CWD, path.pointer());
    }
    if MADE_AGAIN.load(Relaxed)
        && resolve == 0
        && let Some(verdict) = make_again(f, &mut recording, dir, at, flags)
    {
        return Some(verdict);
    }
    let found = paths::stat_raw(dir, at, if stay { libc::AT_SYMLINK_NOFOLLOW } else { 0 });
    if found.is_ok() {
        MADE_AGAIN.store(false, Relaxed);
    }
    let whole = || own.or_else(|| Path::read_known(at));
    match found {
        Ok(_) if exclusive || flags & libc::O_TRUNC == 0 => None,
        Ok(stat) if !stat.is_regular() => None,
        Ok(stat) if recording.session.needs_nothing(&stat) => {
            f.rax = execute(f);
            if let Some((fd, _)) = result(f).filter(|(_, now)| now.id == stat.id) {
                opened(&mut recording, fd, &stat.id);
            }
            Some(Verdict::Done)
        }
        Ok(_) => cut_off(f, recording, dir, &whole()?, !stay),
        Err(libc::ENOENT) if flags & libc::O_CREAT != 0 => {
            let path = whole().filter(|path| !path.is_empty())?;
            if stay {
                return create(f, recording, dir, &path);
            }
            let (dir, end) = with_room(|| paths::behind_links(dir, &path))?;
            create(f, recording, dir, &end)
        }
        Err(_) => None,
    }
}

/// The open with O_CREAT before this one made a file under a name that is recorded already: a
/// program that makes and removes the same file over and over (a journal of sqlite) does that next.
static MADE_AGAIN: AtomicBool = AtomicBool::new(false);

/// Such an open with O_EXCL, which saves the question whether the name is there. `None`: it is, or
/// the name would have to be recorded, or the call will fail.
fn make_again(
    f: &mut CallFrame,
    recording: &mut Recording,
    dir: i32,
    at: u64,
    flags: i32,
) -> Option<Verdict> {
    let place = match f.rax {
        libc::SYS_open => 1,
        libc::SYS_openat => 2,
        _ => return None,
    };
    if flags & libc::O_CREAT == 0 {
        return None;
    }
    let path = Path::read(at).filter(|path| !path.is_empty())?;
    if path.text().last() == Some(&b'/') || !leads_back(recording, dir, &path) {
        return None;
    }
    let args = f.args;
    f.args[place] |= libc::O_EXCL as u64;
    let result = execute(f);
    f.args = args;
    if result == -i64::from(libc::EEXIST) {
        recording.session.made_nothing();
        return None;
    }
    f.rax = result;
    made(f, recording);
    Some(Verdict::Done)
}

/// Is nothing to be recorded of what is about to be made under the name `path`? Then it is told.
fn leads_back(recording: &mut Recording, dir: i32, path: &Path) -> bool {
    paths::parent_of(dir, path).is_ok_and(|parent| is_led_back(recording, &parent))
}

fn is_led_back(recording: &mut Recording, parent: &paths::Parent) -> bool {
    let is_led_back = recording.session.is_led_back(&parent.id, parent.name);
    if is_led_back {
        recording.session.making(&parent.id, parent.name);
    }
    is_led_back
}

/// open_by_handle_at with O_TRUNC: which file that is shows when it is open, so it is opened as it
/// is and cut off then.
fn by_handle(f: &mut CallFrame) -> Option<Verdict> {
    let flags = f.args[2] as i32;
    if flags & libc::O_TRUNC == 0 || flags & libc::O_PATH != 0 {
        return None;
    }
    let mut recording = Recording::begin()?;
    if flags & libc::O_ACCMODE == libc::O_RDONLY {
        // Such a descriptor cannot be cut off afterwards.
        recording
            .session
            .incomplete(b"a file was opened by its handle and cut off");
        return Some(super::done(f));
    }
    f.args[2] = (flags & !libc::O_TRUNC) as u32 as u64;
    f.rax = execute(f);
    if let Some((fd, stat)) = result(f)
        && stat.is_regular()
    {
        if let Some(open) = super::data::look(&mut recording, fd) {
            recording.session.before_truncate(&open.file(), 0);
        }
        // SAFETY: the program's own descriptor, as its call would have done.
        unsafe { ckpt_sys::syscall!(libc::SYS_ftruncate, fd, 0) };
        if let Ok(stat) = paths::stat_fd(fd) {
            recording.session.touched(&stat);
        }
    }
    Some(Verdict::Done)
}

/// O_TRUNC of a regular file.
fn cut_off(
    f: &mut CallFrame,
    mut recording: Recording,
    dir: i32,
    path: &Path,
    follow: bool,
) -> Option<Verdict> {
    pinned::look_at_path(f);
    let found = paths::find(dir, path, follow)?;
    if !paths::writable(dir, path) || !of_interest(&mut recording, &found) {
        return None;
    }
    recording.session.before_truncate(&found.file(), 0);
    f.rax = execute(f);
    if let Some((fd, stat)) = result(f) {
        recording.session.touched(&stat);
        opened(&mut recording, fd, &stat.id);
    }
    Some(Verdict::Done)
}

/// The descriptor that the call has returned, and what is behind it.
fn result(f: &CallFrame) -> Option<(i32, Stat)> {
    let fd = i32::try_from(f.rax).ok().filter(|&fd| fd >= 0)?;
    Some((fd, paths::stat_fd(fd).ok()?))
}

/// Tells of the file that the call has made.
fn made(f: &CallFrame, recording: &mut Recording) {
    if let Some((fd, stat)) = result(f) {
        recording.session.created(stat.id, stat.is_dir());
        opened(recording, fd, &stat.id);
    }
}

/// O_CREAT of a name that is not there.
fn create(f: &mut CallFrame, mut recording: Recording, dir: i32, path: &Path) -> Option<Verdict> {
    if path.text().last() == Some(&b'/') {
        return None;
    }
    let new = before_create(&mut recording, dir, path)?;
    MADE_AGAIN.store(matches!(new, Recorded::Already), Relaxed);
    f.rax = execute(f);
    made(f, &mut recording);
    Some(Verdict::Done)
}

/// What leads a name back.
pub enum Recorded {
    Now,
    /// A record from before, or of its directory.
    Already,
}

/// Tells of the name `path`, which is not there, before something is made under it. `None`:
/// the call will fail, the name is left alone, or it cannot be told, which the table then knows.
pub fn before_create(recording: &mut Recording, dir: i32, path: &Path) -> Option<Recorded> {
    let name = match paths::parent_of(dir, path) {
        Ok(parent) => {
            if is_led_back(recording, &parent) {
                return Some(Recorded::Already);
            }
            // Where the program has changed names before it may do so, or its call fails and
            // the name stays as absent as the record says.
            let ask = !recording.session.is_known(&parent.id);
            let name = parent.full_name(recording, ask);
            told(recording, name)
        }
        Err(reason) => told(recording, Err(reason)),
    }?;
    let name = name.as_ref();
    recording.session.before_create(&name);
    recording.session.making(&name.dir, name.name);
    Some(Recorded::Now)
}

fn told(recording: &mut Recording, name: Result<Name, NoName>) -> Option<Name> {
    match name {
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
        let flags = cache::FREE | cache::KNOWN;
        if recording.session.is_born(id) {
            cache::set_with_map(fd, flags, None, saved::born(), stamp);
        } else {
            cache::set(fd, flags, recording.session.hot(id), stamp);
        }
    }
}
