//! Names: what creates, removes, links and moves them. Any thread.

use super::data::{concerns, of_interest};
use super::guard::Recording;
use super::open::before_create;
use super::paths::{self, CWD, Found, NoName, Path};
use super::{directories, done, execute};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user;
use crate::persist::recorder::with_room;
use crate::persist::{FileRef, Stat};

const NOFOLLOW: i32 = libc::AT_SYMLINK_NOFOLLOW;

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [a, b, c, d, e, _] = f.args;
    match f.rax {
        libc::SYS_mkdir | libc::SYS_mknod => create(f, CWD, a),
        libc::SYS_mkdirat | libc::SYS_mknodat => create(f, a as i32, b),
        libc::SYS_symlink => create(f, CWD, b),
        libc::SYS_symlinkat => create(f, b as i32, c),
        libc::SYS_link => link(f, (CWD, a), (CWD, b), 0),
        libc::SYS_linkat => link(f, (a as i32, b), (c as i32, d), e as i32),
        libc::SYS_unlink | libc::SYS_rmdir => remove(f, CWD, a),
        libc::SYS_unlinkat => remove(f, a as i32, b),
        libc::SYS_rename => rename(f, (CWD, a), (CWD, b), 0),
        libc::SYS_renameat => rename(f, (a as i32, b), (c as i32, d), 0),
        libc::SYS_bind => bind(f, b, c),
        libc::SYS_renameat2 => rename(f, (a as i32, b), (c as i32, d), e as u32),
        _ => None,
    }
}

/// A directory and the address of a path.
type Place = (i32, u64);

/// The path of a name that is not there.
fn absent(place: Place) -> Option<Path> {
    let is_absent = |found| matches!(found, Err(libc::ENOENT));
    if !is_absent(paths::stat_raw(place.0, place.1, NOFOLLOW)) {
        return None;
    }
    let path = Path::read_known(place.1).filter(|path| !path.is_empty())?;
    let text = path.text();
    let end = text.iter().rposition(|&byte| byte != b'/')? + 1;
    if end < text.len() {
        // With a slash behind it a symbolic link is followed: it may be there, and lead nowhere.
        let name = Path::of(&[text.get(..end)?])?;
        if !is_absent(paths::stat_at(place.0, &name, NOFOLLOW)) {
            return None;
        }
    }
    Some(path)
}

/// mkdir, mknod, symlink.
fn create(f: &mut CallFrame, dir: i32, path: u64) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    let path = absent((dir, path))?;
    before_create(&mut recording, dir, &path)?;
    f.rax = execute(f);
    born(f, &mut recording, dir, &path);
    Some(Verdict::Done)
}

/// A socket of the family AF_UNIX gets a name that is a path: bind makes it.
fn bind(f: &mut CallFrame, address: u64, len: u64) -> Option<Verdict> {
    const FAMILY: usize = size_of::<libc::sa_family_t>();
    let mut bytes = [0u8; size_of::<libc::sockaddr_un>()];
    let len = usize::try_from(len).ok().filter(|&len| len > FAMILY)?;
    let bytes = bytes.get_mut(..len)?;
    if user::read_bytes(address, bytes) != Ok(len) {
        return None;
    }
    let (family, text) = bytes.split_at(FAMILY);
    // The name may end with the address, without a NUL.
    let text = text.split(|&byte| byte == 0).next()?;
    if family != (libc::AF_UNIX as libc::sa_family_t).to_ne_bytes() || text.is_empty() {
        return None;
    }
    let mut recording = Recording::begin()?;
    let path = Path::of(&[text])?;
    if !matches!(paths::stat_at(CWD, &path, NOFOLLOW), Err(libc::ENOENT)) {
        return None;
    }
    before_create(&mut recording, CWD, &path)?;
    f.rax = execute(f);
    born(f, &mut recording, CWD, &path);
    Some(Verdict::Done)
}

/// Tells of the inode that the call has made at `path`.
fn born(f: &CallFrame, recording: &mut Recording, dir: i32, path: &Path) {
    if f.rax == 0
        && let Ok(stat) = paths::stat_at(dir, path, NOFOLLOW)
    {
        recording.session.created(stat.id, stat.is_dir());
    }
}

/// The target of a link.
enum Target {
    Path(Found),
    Open(i32, Stat),
}

impl Target {
    fn find(place: Place, flags: i32) -> Option<Target> {
        let path = Path::read(place.1)?;
        if path.is_empty() && flags & libc::AT_EMPTY_PATH != 0 && place.0 != CWD {
            let stat = paths::stat_fd(place.0).ok()?;
            return Some(Target::Open(place.0, stat));
        }
        let follow = flags & libc::AT_SYMLINK_FOLLOW != 0;
        paths::find(place.0, &path, follow).map(Target::Path)
    }

    /// Is it known what this is about?
    fn is_sure(&self) -> bool {
        match self {
            Target::Path(found) => found.sure,
            Target::Open(..) => true,
        }
    }

    fn is_of_interest(&self, recording: &mut Recording) -> bool {
        match self {
            Target::Path(found) => of_interest(recording, found),
            Target::Open(fd, stat) => {
                recording.session.is_known(&stat.id)
                    || with_room(|| paths::path_of_fd(*fd))
                        .is_some_and(|path| concerns(recording, &path))
            }
        }
    }

    fn file(&self) -> FileRef<'_> {
        match self {
            Target::Path(found) => found.file(),
            Target::Open(fd, stat) => FileRef {
                stat,
                path: b"",
                fd: None,
                any_fd: Some(*fd),
            },
        }
    }
}

fn link(f: &mut CallFrame, old: Place, new: Place, flags: i32) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    let path = absent(new)?;
    let target = Target::find(old, flags)?;
    let name = either(&mut recording, new.0, &path)?;
    // Asked in any case: of one that cannot be resolved no row may begin.
    let of_interest = target.is_of_interest(&mut recording);
    if !target.is_sure() || !of_interest && !concerns(&recording, &name.full) {
        return None;
    }
    recording
        .session
        .before_link(&target.file(), &name.as_ref());
    f.rax = execute(f);
    Some(Verdict::Done)
}

fn remove(f: &mut CallFrame, dir: i32, path: u64) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    let stat = paths::stat_raw(dir, path, NOFOLLOW).ok()?;
    let wants_dir = match f.rax {
        libc::SYS_rmdir => true,
        libc::SYS_unlinkat => f.args[2] as i32 & libc::AT_REMOVEDIR != 0,
        _ => false,
    };
    if stat.is_dir() != wants_dir {
        return None;
    }
    if recording.session.needs_nothing(&stat) {
        return Some(done(f));
    }
    let path = Path::read_known(path)?;
    let name = either(&mut recording, dir, &path)?;
    if !concerns(&recording, &name.full) && !recording.session.has_row(&stat.id) {
        return None;
    }
    recording.session.before_remove(&name.as_ref(), &stat);
    f.rax = execute(f);
    if f.rax < 0 {
        recording.session.failed();
    }
    Some(Verdict::Done)
}

fn rename(f: &mut CallFrame, from: Place, to: Place, flags: u32) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    let from_stat = paths::stat_raw(from.0, from.1, NOFOLLOW).ok()?;
    let to_stat = match paths::stat_raw(to.0, to.1, NOFOLLOW) {
        Ok(stat) => Some(stat),
        Err(libc::ENOENT) => None,
        Err(_) => return None,
    };
    let exchange = flags & libc::RENAME_EXCHANGE != 0;
    if from_stat.is_dir() || to_stat.is_some_and(|stat| stat.is_dir()) {
        directories::forget(&mut recording);
    }
    if to_stat.is_some() && flags & libc::RENAME_NOREPLACE != 0
        || to_stat.is_none() && exchange
        || to_stat.is_some_and(|stat| stat.id == from_stat.id)
    {
        return None;
    }
    let from_path = Path::read_known(from.1)?;
    let to_path = match to_stat {
        Some(_) => Path::read_known(to.1)?,
        None => absent(to)?,
    };
    let from_name = either(&mut recording, from.0, &from_path)?;
    let to_name = either(&mut recording, to.0, &to_path)?;
    let stats = [Some(&from_stat), to_stat.as_ref()];
    let has_row = |stat: &Stat| recording.session.has_row(&stat.id);
    if !concerns(&recording, &from_name.full)
        && !concerns(&recording, &to_name.full)
        && !stats.into_iter().flatten().any(has_row)
    {
        return None;
    }
    let session = &mut recording.session;
    let (from_ref, to_ref) = (from_name.as_ref(), to_name.as_ref());
    session.before_rename(&from_ref, &from_stat, &to_ref, to_stat.as_ref(), exchange);
    if flags & libc::RENAME_WHITEOUT != 0 {
        session.before_create(&from_ref);
    }
    f.rax = execute(f);
    if f.rax < 0 {
        session.failed();
    } else if flags & libc::RENAME_WHITEOUT != 0 {
        // The device node that is left in its place.
        born(f, &mut recording, from.0, &from_path);
    }
    Some(Verdict::Done)
}

/// As [`name`], for names that may be left alone.
fn either(recording: &mut Recording, dir: i32, path: &Path) -> Option<paths::Name> {
    match paths::name_at(recording, dir, path) {
        Ok(name) => Some(name),
        Err(NoName::WillFail) => None,
        Err(NoName::Unknown) => {
            recording
                .session
                .incomplete(b"a changed name cannot be told (is /proc there?)");
            None
        }
    }
}
