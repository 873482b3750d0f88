//! Pipes and FIFOs with the bytes in them. Called by [`super::collect`] in the
//! helper thread.
//!
//! The bytes are copied by `tee(2)` into a scratch pipe of the same size and
//! read there: the program's pipe is not touched. Packets (`O_DIRECT`) keep their
//! bounds on that way.

use super::{Collector, Raw, nothing_queued, sys};
use crate::agent::collect::Refusal;
use crate::image::state::{FileKind, QueuedData};

const F_SETPIPE_SZ: i32 = 1031;
const F_GETPIPE_SZ: i32 = 1032;
/// PIPE_BUF: the longest packet.
const PACKET: usize = 4096;

pub(super) fn collect(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let fifo = !raw.link.starts_with(b"pipe:");
    let ends = Ends::of(c, raw);
    let one_sided = !(ends.reader && ends.writer);
    if c.started_with(raw) && (fifo || one_sided || !c.target.inherited.is_empty()) {
        return Ok(FileKind::Inherited {
            path: raw.link.clone(),
            termios: Vec::new(),
        });
    }
    if fifo {
        match sys::stat(&raw.link) {
            Ok(st) if (st.st_dev, st.st_ino) == (raw.stat.st_dev, raw.stat.st_ino) => {}
            _ => return Err(raw.refuse_kind("is a FIFO that its path no longer leads to")),
        }
    }
    let dup = c.duplicate(raw)?;
    let capacity = sys::fcntl(dup.raw(), F_GETPIPE_SZ, 0)
        .map_err(|e| raw.refuse("does not tell its capacity", e))?;
    let packet = ends.packet;
    // The bytes belong to the first description that can read them.
    let data = if ends.first_reader == Some(raw.file) {
        peek(raw, dup.raw(), capacity, packet)?
    } else {
        nothing_queued()
    };
    if fifo {
        return Ok(FileKind::Fifo {
            path: raw.link.clone(),
            ino: raw.stat.st_ino,
            capacity: capacity as u32,
            data,
        });
    }
    Ok(FileKind::Pipe {
        pipe: raw.stat.st_ino,
        write_end: raw.access() == libc::O_WRONLY,
        capacity: capacity as u32,
        packet,
        data,
    })
}

/// What the process holds of one pipe.
struct Ends {
    reader: bool,
    writer: bool,
    packet: bool,
    /// The first open file description that can read.
    first_reader: Option<usize>,
}

impl Ends {
    fn of(c: &Collector, raw: &Raw) -> Ends {
        let mut ends = Ends {
            reader: false,
            writer: false,
            packet: false,
            first_reader: None,
        };
        let inode = (raw.stat.st_dev, raw.stat.st_ino);
        for &at in &c.lead {
            let other = &c.raws[at];
            let opaque = other.info.flags & libc::O_PATH as u32 != 0;
            if opaque || (other.stat.st_dev, other.stat.st_ino) != inode {
                continue;
            }
            let access = other.access();
            ends.packet |= other.info.flags & libc::O_DIRECT as u32 != 0;
            ends.writer |= access != libc::O_RDONLY;
            if access != libc::O_WRONLY {
                ends.reader = true;
                ends.first_reader.get_or_insert(other.file);
            }
        }
        ends
    }
}

/// Copies what is in the pipe behind `fd` without taking it out.
fn peek(raw: &Raw, fd: i32, capacity: usize, packet: bool) -> Result<QueuedData, Refusal> {
    let refuse = |what: &str, e: i32| raw.refuse(what, e);
    let queued = sys::fionread(fd).map_err(|e| refuse("does not tell its bytes in flight", e))?;
    if queued == 0 {
        return Ok(nothing_queued());
    }
    let (scratch_in, scratch_out) =
        sys::pipe(libc::O_NONBLOCK).map_err(|e| refuse("cannot be looked into", e))?;
    // May be denied above the user's limit; then a short tee tells.
    let _ = sys::fcntl(scratch_out.raw(), F_SETPIPE_SZ, capacity);
    let copied = sys::tee(fd, scratch_out.raw(), capacity.max(queued))
        .map_err(|e| refuse("cannot be looked into", e))?;
    if copied < queued {
        return Err(raw.refuse_kind(
            "holds more bytes than may be copied (the user's limit of pipe buffers is reached)",
        ));
    }
    let mut messages = Vec::new();
    let mut left = copied;
    let mut whole = Vec::with_capacity(if packet { 0 } else { copied });
    let mut buf = vec![0u8; if packet { PACKET } else { copied }];
    while left > 0 {
        let n = sys::read(scratch_in.raw(), &mut buf)
            .map_err(|e| refuse("cannot be looked into", e))?;
        if n == 0 {
            break;
        }
        left = left.saturating_sub(n);
        if packet {
            messages.push(buf[..n].to_vec());
        } else {
            whole.extend_from_slice(&buf[..n]);
        }
    }
    if !packet {
        messages.push(whole);
    }
    Ok(QueuedData {
        from: vec![Vec::new(); messages.len()],
        messages,
    })
}
