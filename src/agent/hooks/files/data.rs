//! Contents and sizes: the write family, truncate, ftruncate, fallocate. Any thread.

use super::guard::Recording;
use super::{cache, done, execute, paths, saved, turns};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user;
use crate::agent::state::InHook;
use crate::persist::recorder::with_room;
use crate::persist::{Coverage, FileRef, Stat};
use ckpt_sys::syscall;
use std::sync::atomic::Ordering::Relaxed;

/// A regular file, open for writing, that is not left alone.
pub struct Open {
    pub fd: i32,
    pub stat: Stat,
    readable: bool,
    append: bool,
    stamp: u32,
}

impl Open {
    pub fn file(&self) -> FileRef<'_> {
        FileRef {
            stat: &self.stat,
            path: b"",
            fd: self.readable.then_some(self.fd),
            any_fd: Some(self.fd),
        }
    }

    /// Where the next write goes.
    pub fn position(&self) -> Option<u64> {
        if self.append {
            return Some(self.stat.size);
        }
        self.own_position()
    }

    /// Where the descriptor stands.
    pub fn own_position(&self) -> Option<u64> {
        // SAFETY: asks for the position.
        let at = unsafe { syscall!(libc::SYS_lseek, self.fd, 0, libc::SEEK_CUR) };
        u64::try_from(at).ok()
    }
}

/// What is behind `fd`. `None`: nothing of interest to writes, which the cache knows now.
pub fn look(recording: &mut Recording, fd: i32) -> Option<Open> {
    let known = cache::flags(fd);
    if known & cache::PASS != 0 {
        return None;
    }
    let stamp = cache::stamp();
    let stat = paths::stat_fd(fd).ok()?;
    // SAFETY: asks for flags.
    let flags = unsafe { syscall!(libc::SYS_fcntl, fd, libc::F_GETFL) };
    let flags = i32::try_from(flags).ok().filter(|&flags| flags >= 0)?;
    let access = flags & libc::O_ACCMODE;
    let left_alone = known & cache::KNOWN == 0
        && !recording.session.is_known(&stat.id)
        && with_room(|| paths::path_of_fd(fd)).is_some_and(|path| !concerns(recording, &path));
    if !stat.is_regular() || access == libc::O_RDONLY || left_alone {
        cache::set(fd, cache::PASS, None, stamp);
        return None;
    }
    Some(Open {
        fd,
        stat,
        readable: access == libc::O_RDWR,
        append: flags & libc::O_APPEND != 0,
        stamp,
    })
}

/// Is a file that the kernel calls so to be put back?
pub fn concerns(recording: &Recording, path: &[u8]) -> bool {
    path.first() == Some(&b'/')
        && !path.starts_with(b"/memfd:")
        && path != b"/secretmem (deleted)"
        && !recording.session.is_excluded(path)
}

/// Is it to be put back? What is known stays so, wherever its names go.
pub fn of_interest(recording: &mut Recording, found: &paths::Found) -> bool {
    if !found.sure {
        let mut reason = found.full.clone();
        reason.extend_from_slice(b": where it leads cannot be told");
        recording.session.incomplete(&reason);
        return false;
    }
    recording.session.is_known(&found.stat.id) || concerns(recording, &found.full)
}

/// Where a write goes.
#[derive(Clone, Copy)]
pub enum At {
    Position,
    Offset(u64),
    End,
    /// There, though the file be open with O_APPEND; the last offset stands for the position.
    Told(u64),
}

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [a, b, c, d, e, g] = f.args;
    let fd = a as i32;
    match f.rax {
        libc::SYS_write => write(f, fd, At::Position, Len::Bytes(c)),
        libc::SYS_pwrite64 => write(f, fd, At::Offset(d), Len::Bytes(c)),
        libc::SYS_writev => write(f, fd, At::Position, Len::Vectors(b, c)),
        libc::SYS_pwritev => write(f, fd, At::Offset(d), Len::Vectors(b, c)),
        libc::SYS_pwritev2 => {
            const RWF_APPEND: u64 = 0x10;
            const RWF_NOAPPEND: u64 = 0x20;
            let at = match d {
                _ if g & RWF_APPEND != 0 => At::End,
                _ if g & RWF_NOAPPEND != 0 => At::Told(d),
                u64::MAX => At::Position,
                offset => At::Offset(offset),
            };
            write(f, fd, at, Len::Vectors(b, c))
        }
        libc::SYS_truncate => truncate(f),
        libc::SYS_ftruncate | libc::SYS_fallocate if cache::is_born(fd) => Some(Verdict::Forward),
        libc::SYS_ftruncate => {
            let mut recording = Recording::begin()?;
            let open = look(&mut recording, fd)?;
            if b as i64 >= 0 {
                recording.session.before_truncate(&open.file(), b);
            }
            finish(f, recording, &open)
        }
        libc::SYS_fallocate => {
            let mut recording = Recording::begin()?;
            let open = look(&mut recording, fd)?;
            fallocate(&mut recording, &open, b as i32, c, d);
            finish(f, recording, &open)
        }
        _ => {
            let _ = e;
            None
        }
    }
}

/// How much a write brings.
enum Len {
    Bytes(u64),
    /// Address and number of `iovec`s.
    Vectors(u64, u64),
}

impl Len {
    /// `None`: the kernel will refuse it.
    fn bytes(&self) -> Option<u64> {
        const AT_A_TIME: usize = 4;
        match *self {
            Len::Bytes(bytes) => Some(bytes),
            Len::Vectors(at, count) => {
                if count > 1024 {
                    return None;
                }
                let (mut total, mut at, mut left) = (0u64, at, count as usize);
                while left >= AT_A_TIME {
                    let [_, p, _, q, _, r, _, s] = user::read::<[u64; 8]>(at).ok()?;
                    total = [p, q, r, s].iter().fold(total, |t, &n| t.saturating_add(n));
                    at += 16 * AT_A_TIME as u64;
                    left -= AT_A_TIME;
                }
                for _ in 0..left {
                    let [_, len] = user::read::<[u64; 2]>(at).ok()?;
                    total = total.saturating_add(len);
                    at += 16;
                }
                Some(total)
            }
        }
    }
}

/// A write to blocks that are saved already: nothing to do but to leave word.
fn is_saved(fd: i32, at: At, len: &Len) -> bool {
    let _hook = InHook::enter();
    let Some((map, mark)) = cache::saved(fd) else {
        return false;
    };
    let start = match at {
        // SAFETY: asks for the position.
        At::Position => match unsafe { syscall!(libc::SYS_lseek, fd, 0, libc::SEEK_CUR) } {
            position if position >= 0 => position as u64,
            _ => return false,
        },
        At::Offset(offset) => offset,
        At::End | At::Told(_) => return false,
    };
    let saved = len
        .bytes()
        .is_some_and(|len| map.covers(start, start.saturating_add(len)));
    if saved {
        mark.store(1, Relaxed);
    }
    saved
}

fn write(f: &mut CallFrame, fd: i32, at: At, len: Len) -> Option<Verdict> {
    let shared = matches!(at, At::Position | At::Told(u64::MAX)) && turns::needed();
    let turn = if shared { turns::take(fd) } else { None };
    if is_saved(fd, at, &len) {
        if turn.is_some() {
            return Some(done(f));
        }
        // Should a checkpoint come before it is executed, it is sent through here again.
        return Some(Verdict::Forward);
    }
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, fd)?;
    let len = len.bytes().filter(|&len| len > 0)?;
    let at = match at {
        At::Told(_) => at,
        _ if open.append => At::End,
        at => at,
    };
    let start = match at {
        At::Position | At::Told(u64::MAX) => open.own_position()?,
        At::Offset(offset) | At::Told(offset) => offset,
        At::End => open.stat.size,
    };
    let coverage = before_write(&mut recording, &open, start, len);
    let mark = recording.session.hot(&open.stat.id);
    if let Some(mark) = mark {
        // SAFETY: valid while the table is open, that is, while signals are blocked.
        unsafe { mark.write_volatile(1) };
    }
    let map = if coverage == Coverage::Partial && !open.append {
        let end = start.saturating_add(len);
        saved::note(&mut recording, open.stat.id, open.stat.size, start, end)
    } else {
        None
    };
    let rest = recording.unlock();
    f.rax = execute(f);
    let flags = match (coverage, at) {
        (Coverage::Free, _) => cache::FREE,
        (Coverage::AppendOnly { .. }, _) if open.append => cache::APPEND,
        (Coverage::AppendOnly { size0 }, At::Position)
            if f.rax >= 0 && start.saturating_add(f.rax as u64) >= size0 =>
        {
            cache::FORWARD
        }
        _ => 0,
    };
    let map = map.unwrap_or(std::ptr::null());
    cache::set_with_map(fd, flags | cache::KNOWN, mark, map, open.stamp);
    drop(rest);
    drop(turn);
    Some(Verdict::Done)
}

/// Tells that `len` bytes are about to be written at `start`.
pub fn before_write(recording: &mut Recording, open: &Open, start: u64, len: u64) -> Coverage {
    let end = start.saturating_add(len);
    recording.session.before_write(&open.file(), start, end)
}

/// Executes an operation on an open file and tells how that is now.
pub fn finish(f: &mut CallFrame, mut recording: Recording, open: &Open) -> Option<Verdict> {
    f.rax = execute(f);
    if let Ok(stat) = paths::stat_fd(open.fd) {
        recording.session.touched(&stat);
    }
    let known = cache::flags(open.fd) & !cache::FORWARD;
    if known == 0 {
        cache::set(open.fd, cache::KNOWN, None, open.stamp);
    }
    drop(recording);
    Some(Verdict::Done)
}

fn truncate(f: &mut CallFrame) -> Option<Verdict> {
    let [path, len, ..] = f.args;
    let mut recording = Recording::begin()?;
    if recording
        .session
        .needs_nothing(&paths::stat_raw(paths::CWD, path, 0).ok()?)
    {
        return None;
    }
    let path = paths::Path::read_known(path)?;
    let found = paths::find(paths::CWD, &path, true)?;
    if !found.stat.is_regular()
        || len as i64 <= -1
        || !paths::writable(paths::CWD, &path)
        || !of_interest(&mut recording, &found)
    {
        return None;
    }
    recording.session.before_truncate(&found.file(), len);
    let verdict = done(f);
    if let Ok(stat) = paths::stat_at(paths::CWD, &path, 0) {
        recording.session.touched(&stat);
    }
    Some(verdict)
}

fn fallocate(recording: &mut Recording, open: &Open, mode: i32, offset: u64, len: u64) {
    const WRITE_ZEROES: i32 = 0x80;
    const CLEARS: i32 = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_ZERO_RANGE | WRITE_ZEROES;
    // Others move everything behind the offset, or are not known.
    const HARMLESS: i32 = libc::FALLOC_FL_KEEP_SIZE | libc::FALLOC_FL_UNSHARE_RANGE;
    let session = &mut recording.session;
    let end = offset.saturating_add(len);
    if mode & !(CLEARS | HARMLESS) != 0 {
        session.before_range_shift(&open.file(), offset);
    } else if mode & CLEARS != 0 {
        session.before_write(&open.file(), offset, end);
    } else {
        // No bytes change, but the size and what every modification takes along.
        session.before_write(&open.file(), end, end);
    }
}
