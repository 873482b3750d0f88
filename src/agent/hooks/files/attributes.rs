//! Modes, owners, times and extended attributes. Any thread.

use super::data::{concerns, of_interest};
use super::guard::Recording;
use super::paths::{self, CWD, Found, Path};
use super::{cache, execute};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::persist::recorder::with_room;
use crate::persist::{FileRef, MODE, OWNER, Stat, TIMES, Which};

/// What a call is about.
enum Subject {
    Open(i32),
    /// Directory, address of the path, flags as those of `fstatat`.
    Named(i32, u64, i32),
}

/// What a call changes.
enum Change {
    Attributes(Which),
    /// Address of the name.
    Extended(u64),
}

/// With a follow flag the other way round, as in the calls themselves.
const FOLLOW: i32 = 0;
const NOFOLLOW: i32 = libc::AT_SYMLINK_NOFOLLOW;

pub const SETXATTRAT: i64 = 463;
pub const REMOVEXATTRAT: i64 = 466;

fn decode(f: &CallFrame) -> Option<(Subject, Change)> {
    use Change::{Attributes, Extended};
    use Subject::{Named, Open};
    let [a, b, _, d, e, _] = f.args;
    let dir = a as i32;
    Some(match f.rax {
        libc::SYS_chmod => (Named(CWD, a, FOLLOW), Attributes(MODE)),
        libc::SYS_fchmod => (Open(dir), Attributes(MODE)),
        libc::SYS_fchmodat => (Named(dir, b, FOLLOW), Attributes(MODE)),
        libc::SYS_fchmodat2 => (Named(dir, b, d as i32), Attributes(MODE)),
        libc::SYS_chown => (Named(CWD, a, FOLLOW), Attributes(OWNER | MODE)),
        libc::SYS_lchown => (Named(CWD, a, NOFOLLOW), Attributes(OWNER | MODE)),
        libc::SYS_fchown => (Open(dir), Attributes(OWNER | MODE)),
        libc::SYS_fchownat => (Named(dir, b, e as i32), Attributes(OWNER | MODE)),
        libc::SYS_utime | libc::SYS_utimes => (Named(CWD, a, FOLLOW), Attributes(TIMES)),
        libc::SYS_utimensat | libc::SYS_futimesat if b == 0 => (Open(dir), Attributes(TIMES)),
        libc::SYS_utimensat => (Named(dir, b, d as i32), Attributes(TIMES)),
        libc::SYS_futimesat => (Named(dir, b, FOLLOW), Attributes(TIMES)),
        libc::SYS_setxattr | libc::SYS_removexattr => (Named(CWD, a, FOLLOW), Extended(b)),
        libc::SYS_lsetxattr | libc::SYS_lremovexattr => (Named(CWD, a, NOFOLLOW), Extended(b)),
        libc::SYS_fsetxattr | libc::SYS_fremovexattr => (Open(dir), Extended(b)),
        SETXATTRAT | REMOVEXATTRAT => (Named(dir, b, f.args[2] as i32), Extended(d)),
        _ => return None,
    })
}

/// The inode concerned.
enum Inode {
    Open(i32, Stat),
    Named(Found),
}

impl Inode {
    /// `None`: there is none, or it is left alone.
    fn find(recording: &mut Recording, subject: &Subject) -> Option<Inode> {
        match *subject {
            Subject::Open(fd) => Inode::open(recording, fd),
            Subject::Named(dir, path, flags) => {
                const KNOWN: i32 = libc::AT_SYMLINK_NOFOLLOW | libc::AT_EMPTY_PATH;
                let stat = paths::stat_raw(dir, path, flags & KNOWN).ok()?;
                if recording.session.needs_nothing(&stat) {
                    return None;
                }
                let mut path = Path::read_known(path)?;
                if path.is_empty() {
                    if flags & libc::AT_EMPTY_PATH == 0 {
                        return None;
                    }
                    if dir != CWD {
                        return Inode::open(recording, dir);
                    }
                    // The working directory.
                    path = Path::of(&[b"."])?;
                }
                let found = paths::find(dir, &path, flags & NOFOLLOW == 0)?;
                of_interest(recording, &found).then_some(Inode::Named(found))
            }
        }
    }

    fn open(recording: &Recording, fd: i32) -> Option<Inode> {
        let stat = paths::stat_fd(fd).ok()?;
        if recording.session.is_known(&stat.id) {
            let nothing = recording.session.needs_nothing(&stat);
            return (!nothing).then_some(Inode::Open(fd, stat));
        }
        let path = with_room(|| paths::path_of_fd(fd));
        path.is_none_or(|path| concerns(recording, &path))
            .then_some(Inode::Open(fd, stat))
    }

    fn file(&self) -> FileRef<'_> {
        match self {
            Inode::Named(found) => found.file(),
            Inode::Open(fd, stat) => FileRef {
                stat,
                path: b"",
                fd: None,
                any_fd: Some(*fd),
            },
        }
    }
}

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let (subject, change) = decode(f)?;
    if matches!(subject, Subject::Open(fd) if cache::is_born(fd)) {
        return Some(Verdict::Forward);
    }
    let mut recording = Recording::begin()?;
    let inode = Inode::find(&mut recording, &subject)?;
    match change {
        Change::Attributes(which) => recording.session.before_attributes(&inode.file(), which),
        Change::Extended(name) => {
            let name = Path::read(name).filter(|name| name.text().len() < 256)?;
            recording.session.before_xattr(&inode.file(), name.text());
        }
    }
    f.rax = execute(f);
    let now = match &inode {
        Inode::Open(fd, _) => paths::stat_fd(*fd).ok(),
        Inode::Named(found) => found.now(),
    };
    if let Some(stat) = now {
        recording.session.touched(&stat);
    }
    Some(Verdict::Done)
}
