//! ioctl requests that modify files, and what lets the kernel write to files by itself later
//! (io_uring, AIO). Any thread.

use super::data::{finish, look};
use super::guard::Recording;
use super::{done, execute};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::user::{self, plain};
use crate::agent::refusal::{self, Kind};

/// `struct space_resv` of the kernel's uapi/linux/falloc.h.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct Space {
    kind: i16,
    whence: i16,
    gap: i32,
    start: i64,
    len: i64,
    rest: [u64; 3],
}

plain!(Space);

/// FS_IOC_RESVSP, RESVSP64, UNRESVSP, UNRESVSP64, ZERO_RANGE: fallocate under other names.
const SPACE: [u32; 5] = [
    0x4030_5828,
    0x4030_582a,
    0x4030_5829,
    0x4030_582b,
    0x4030_5839,
];

/// Requests, by family and number, that exchange contents, make or remove whole trees, or write
/// in a way of one file system: what they do is not recorded.
const UNKNOWN: &[(u32, &[u32])] = &[
    // ext4: exchange with the boot loader's inode, move extents; verity
    (0x66, &[15, 17, 133]),
    // XFS: exchanges of extents
    (0x58, &[109, 129, 131]),
    // btrfs: snapshots, subvolumes, encoded writes
    (0x94, &[1, 14, 15, 23, 24, 63, 64]),
];

/// A request that passes something in.
const PASSES: u32 = 1 << 30;

pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    match f.rax {
        libc::SYS_ioctl => request(f, f.args[1] as u32),
        libc::SYS_io_uring_setup => by_itself(f, Kind::IoUring, b"the program uses io_uring"),
        libc::SYS_io_setup => by_itself(f, Kind::Aio, b"the program uses kernel AIO"),
        _ => None,
    }
}

/// What will be written through it goes by unseen: from its beginning on the table does not
/// lead back.
fn by_itself(f: &mut CallFrame, kind: Kind, reason: &[u8]) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    refusal::note(kind);
    f.rax = execute(f);
    // Nothing can be written through it before this hook is over.
    if f.rax >= 0 {
        recording.session.incomplete(reason);
    }
    Some(Verdict::Done)
}

fn request(f: &mut CallFrame, request: u32) -> Option<Verdict> {
    if SPACE.contains(&request) {
        return space(f);
    }
    let (family, number) = (request >> 8 & 0xff, request & 0xff);
    let unknown = request & PASSES != 0
        && UNKNOWN
            .iter()
            .any(|(of, numbers)| *of == family && numbers.contains(&number));
    if !unknown {
        return None;
    }
    let mut recording = Recording::begin()?;
    recording
        .session
        .incomplete(b"an ioctl request changed files in a way that is not recorded");
    Some(done(f))
}

fn space(f: &mut CallFrame) -> Option<Verdict> {
    let [fd, _, argument, ..] = f.args;
    let space = user::read::<Space>(argument).ok()?;
    let mut recording = Recording::begin()?;
    let open = look(&mut recording, fd as i32)?;
    let base = match i32::from(space.whence) {
        libc::SEEK_SET => 0,
        libc::SEEK_CUR => open.own_position()?,
        libc::SEEK_END => open.stat.size,
        _ => return None,
    };
    let start = base.checked_add_signed(space.start)?;
    let end = start.checked_add_signed(space.len)?;
    recording
        .session
        .before_write(&open.file(), start, end.max(start));
    finish(f, recording, &open)
}
