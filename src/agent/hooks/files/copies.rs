//! Contents that the kernel moves by itself: sendfile, splice, copy_file_range and the
//! requests of ioctl that share blocks between files. Any thread.

use super::data::{Open, before_write, look};
use super::guard::Recording;
use super::{cache, execute, paths, turns};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user::{self, plain};
use ckpt_sys::syscall;

const FICLONE: u32 = 0x4004_9409;
const FICLONERANGE: u32 = 0x4020_940d;

#[repr(C)]
#[derive(Clone, Copy, Default)]
struct CloneRange {
    src_fd: i64,
    src_offset: u64,
    src_length: u64,
    dest_offset: u64,
}

plain!(CloneRange);

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [a, b, c, d, e, _] = f.args;
    match f.rax {
        libc::SYS_sendfile => copy(
            f,
            Source {
                fd: b as i32,
                at: c,
            },
            a as i32,
            0,
            d,
        ),
        libc::SYS_copy_file_range => copy(
            f,
            Source {
                fd: a as i32,
                at: b,
            },
            c as i32,
            d,
            e,
        ),
        libc::SYS_splice => splice(f),
        libc::SYS_ioctl => clone_blocks(f),
        _ => None,
    }
}

struct Source {
    fd: i32,
    /// Address of an offset, 0 for the descriptor's position.
    at: u64,
}

impl Source {
    /// How much a regular file has behind the place to read from.
    fn rest(&self) -> Option<u64> {
        let stat = paths::stat_fd(self.fd).ok()?;
        if !stat.is_regular() || stat.size == 0 {
            return None;
        }
        let at = if self.at != 0 {
            user::read::<u64>(self.at).ok()?
        } else {
            // SAFETY: asks for the position.
            let at = unsafe { syscall!(libc::SYS_lseek, self.fd, 0, libc::SEEK_CUR) };
            u64::try_from(at).ok()?
        };
        Some(stat.size.saturating_sub(at))
    }
}

/// Where the copy goes; `at` as in [`Source`]. `None`: the kernel will refuse it.
fn start(open: &Open, at: u64) -> Option<u64> {
    if at == 0 {
        open.position()
    } else {
        user::read::<u64>(at).ok()
    }
}

fn copy(f: &mut CallFrame, from: Source, to: i32, to_at: u64, len: u64) -> Option<Verdict> {
    let _turn = (to_at == 0 && turns::needed()).then(|| turns::take(to));
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, to)?;
    // A source that is no regular file (a pipe, a socket) may have to be waited for.
    let waits = paths::stat_fd(from.fd).is_ok_and(|stat| !stat.is_regular());
    if len == 0 {
        return None;
    }
    // What somebody else puts at its end just now must not come along: not recorded for that.
    // Behind its end there is nothing to copy, as far as one can tell.
    let from_len = from.rest().map_or(len, |rest| rest.min(len));
    let from_len = if from_len == 0 { len } else { from_len };
    let start = start(&open, to_at)?;
    before_write(&mut recording, &open, start, from_len);
    let count = match f.rax {
        libc::SYS_sendfile => 3,
        _ => 4,
    };
    // Not where the kernel will refuse so much.
    if len.max(start) <= u64::MAX / 4 {
        f.args[count] = from_len;
    }
    let verdict = run(f, recording, &open, waits);
    // The program's register.
    f.args[count] = len;
    verdict
}

/// Executes the call, or lets it go on where it may wait for data: what it will write is
/// recorded, and should a checkpoint come first it is sent through here again.
fn run(f: &mut CallFrame, mut recording: Recording, open: &Open, waits: bool) -> Option<Verdict> {
    if let Some(mark) = recording.session.hot(&open.stat.id) {
        // SAFETY: valid while the table is open, that is, while signals are blocked.
        unsafe { mark.write_volatile(1) };
    }
    if waits {
        return Some(Verdict::Forward);
    }
    let rest = recording.unlock();
    f.rax = execute(f);
    drop(rest);
    Some(Verdict::Done)
}

fn splice(f: &mut CallFrame) -> Option<Verdict> {
    let [from, _, to, to_at, len, flags] = f.args;
    let _turn = (to_at == 0 && turns::needed()).then(|| turns::take(to as i32));
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, to as i32)?;
    let start = start(&open, to_at).filter(|_| len > 0)?;
    before_write(&mut recording, &open, start, len);
    let waits = flags & u64::from(libc::SPLICE_F_NONBLOCK) == 0 && !ready(from as i32);
    run(f, recording, &open, waits)
}

/// Can something be read from there at once (or nothing ever again)?
fn ready(fd: i32) -> bool {
    let mut poll = libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let at_once = [0u64; 2];
    // SAFETY: our own structures.
    unsafe { syscall!(libc::SYS_ppoll, &raw mut poll, 1, &raw const at_once, 0, 8) > 0 }
}

fn clone_blocks(f: &mut CallFrame) -> Option<Verdict> {
    let [fd, request, argument, ..] = f.args;
    let (source, from, len, to) = match request as u32 {
        FICLONE => (argument as i32, 0, 0, 0),
        FICLONERANGE => {
            let range = user::read::<CloneRange>(argument).ok()?;
            (
                range.src_fd as i32,
                range.src_offset,
                range.src_length,
                range.dest_offset,
            )
        }
        _ => return None,
    };
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, fd as i32)?;
    let whole = paths::stat_fd(source).ok()?.size.saturating_sub(from);
    let len = if len == 0 { whole } else { len };
    before_write(&mut recording, &open, to, len);
    cache::forget(open.fd);
    run(f, recording, &open, false)
}
