//! Pipes and FIFOs, refilled with the bytes that were in them. Part of
//! [`super::restore`]. An end whose other end was not in the process comes back
//! with that end closed: end of file, EPIPE, never a hang.

use super::{RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::{FileKind, QueuedData};

const F_SETPIPE_SZ: i32 = 1031;

/// Makes every description of the pipe with the image's inode number `pipe`.
pub(super) fn pipe(r: &mut Restorer, pipe: u64) -> Result<(), RestoreError> {
    let mut members = Vec::new();
    let mut size = 0;
    let mut packets = false;
    for file in 0..r.table.files.len() {
        if let FileKind::Pipe {
            pipe: ino,
            capacity,
            packet,
            ..
        } = &r.state(file).kind
            && *ino == pipe
        {
            members.push(file);
            size = *capacity;
            packets = *packet;
        }
    }
    let Some(&first) = members.first() else {
        return Ok(());
    };
    let flags = if packets { libc::O_DIRECT } else { 0 };
    let (reader, writer) =
        sys::pipe(flags | libc::O_NONBLOCK).map_err(|e| r.fail(first, "pipe", e))?;
    let (reader, writer) = (r.park(reader)?, r.park(writer)?);
    let resized = sys::fcntl(writer.raw(), F_SETPIPE_SZ, size as usize);
    for &file in &members {
        if let FileKind::Pipe { data, .. } = &r.state(file).kind
            && !data.messages.is_empty()
        {
            refill(writer.raw(), data).map_err(|e| match resized {
                Err(limit) => r.fail(file, "pipe: give it its capacity", limit),
                Ok(_) => r.fail(file, "pipe: put its bytes back", e),
            })?;
        }
    }
    give_ends(r, &members, Some(reader), Some(writer))
}

fn refill(writer: i32, data: &QueuedData) -> Result<(), i32> {
    for message in &data.messages {
        let mut done = 0;
        while done < message.len() {
            done += sys::write(writer, &message[done..])?;
        }
    }
    Ok(())
}

/// The first description of each direction takes the end itself, others open it
/// again through /proc.
fn give_ends(
    r: &mut Restorer,
    members: &[usize],
    mut reader: Option<Fd>,
    mut writer: Option<Fd>,
) -> Result<(), RestoreError> {
    let ends = [&reader, &writer].map(|end| end.as_ref().map_or(-1, Fd::raw));
    let mut made = Vec::new();
    let mut taken = [false; 2];
    for &file in members {
        let access = r.state(file).flags as i32 & libc::O_ACCMODE;
        let side = usize::from(access != libc::O_RDONLY);
        let fd = if access != libc::O_RDWR && !taken[side] {
            taken[side] = true;
            None
        } else {
            let flags = access | libc::O_NONBLOCK;
            let again = sys::open(&sys::thread_fd_path(ends[side]), flags, 0)
                .map_err(|e| r.fail(file, "open the pipe again", e))?;
            Some(r.park(again)?)
        };
        made.push((file, side, fd));
    }
    for (file, side, fd) in made {
        let fd = match fd {
            Some(fd) => Some(fd),
            None if side == 0 => reader.take(),
            None => writer.take(),
        };
        if let Some(fd) = fd {
            r.set_flags(file, &fd)?;
            r.place(file, fd)?;
        }
    }
    Ok(())
}

/// Makes every description of the FIFO at `path`.
pub(super) fn fifo(r: &mut Restorer, path: &[u8], inode: u64) -> Result<(), RestoreError> {
    let mut members = Vec::new();
    for file in 0..r.table.files.len() {
        let kind = &r.state(file).kind;
        if matches!(kind, FileKind::Fifo { ino, .. } if *ino == inode) && !r.made[file] {
            members.push(file);
        }
    }
    let Some(&first) = members.first() else {
        return Ok(());
    };
    let fail_open = |e: i32| r.fail_open(first, path, &sys::errno_text(e));
    // Open both ways for the time being, so that neither side has to wait.
    let both = sys::open(path, libc::O_RDWR | libc::O_NONBLOCK, 0)
        .or_else(|_| sys::open(path, libc::O_RDONLY | libc::O_NONBLOCK, 0))
        .map_err(fail_open)?;
    let both = r.park(both)?;
    let st = sys::fstat(both.raw()).map_err(fail_open)?;
    let mut replaced = r.ctx.files.replaced.iter();
    let put_back = replaced.any(|(old, new)| old.1 == inode && *new == (st.st_dev, st.st_ino));
    if st.st_mode & libc::S_IFMT != libc::S_IFIFO || st.st_ino != inode && !put_back {
        return Err(r.fail_open(first, path, "another file has taken its place"));
    }
    for &file in &members {
        if let FileKind::Fifo { capacity, data, .. } = &r.state(file).kind {
            let _ = sys::fcntl(both.raw(), F_SETPIPE_SZ, *capacity as usize);
            // Bytes still there: another process has kept the FIFO open.
            let empty = sys::fionread(both.raw()).unwrap_or(0) == 0;
            if empty && !data.messages.is_empty() {
                refill(both.raw(), data)
                    .map_err(|e| r.fail(file, "FIFO: put its bytes back", e))?;
            }
        }
    }
    for &file in &members {
        let access = r.state(file).flags as i32 & libc::O_ACCMODE;
        let fd = sys::open(path, access | libc::O_NONBLOCK, 0)
            .map_err(|e| r.fail_open(file, path, &sys::errno_text(e)))?;
        // Set aside: the number it got may be one of a later member's.
        let fd = r.park(fd)?;
        r.set_flags(file, &fd)?;
        r.place(file, fd)?;
    }
    Ok(())
}
