//! The open file table: descriptors, open file descriptions, locks.
//!
//! Filled by `agent::collect::descriptors`; read by `agent::restore::descriptors` and by the
//! command. Only data, as all of [`super`], and which descriptor of a file is the best.

use super::Extent;
use serde::{Deserialize, Serialize};

/// The open file table (FIG. 6, step 630): descriptors, and the open file
/// descriptions they share.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorTable {
    /// Ascending by `fd`.
    pub fds: Vec<DescriptorState>,
    /// Open file descriptions; several descriptors may name one (dup).
    pub files: Vec<OpenFileState>,
    /// Record and flock locks held.
    pub locks: Vec<FileLock>,
    /// Pty masters (indices of `files`) whose slave was open and is closed: end of file, and
    /// not silence. In a section of its own: [`super::Rare`].
    #[serde(skip)]
    pub hung_up: Vec<u32>,
}

/// How a file whose contents are in the image is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OpenAs {
    pub fd: i32,
    /// For reading only, and a mapping of it may want more.
    pub wants_write: bool,
    /// It can be mapped privately again: it can be read, and a new start puts no other file there.
    pub private: bool,
}

impl DescriptorTable {
    /// The best descriptor of a file (device, inode) whose contents are in the image.
    pub fn of_contents(&self, id: (u64, u64)) -> Option<OpenAs> {
        let all = self.fds.iter().filter_map(|descriptor| {
            let file = self.files.get(descriptor.file as usize)?;
            const F_SEAL_WRITE: u32 = 8;
            let (of, huge, sealed) = match &file.kind {
                FileKind::Unlinked { dev, ino, .. } => ((*dev, *ino), false, false),
                FileKind::Memfd {
                    object_dev,
                    object_ino,
                    hugetlb,
                    seals,
                    ..
                } => (
                    (*object_dev, *object_ino),
                    *hugetlb != 0,
                    seals & F_SEAL_WRITE != 0,
                ),
                _ => return None,
            };
            // One that is sealed cannot be mapped shared by a descriptor for writing, on some
            // kernels not even to be read.
            let readable = match file.flags as i32 & (libc::O_ACCMODE | libc::O_PATH) {
                libc::O_RDWR => 2 - u32::from(sealed),
                libc::O_RDONLY => 1 + u32::from(sealed),
                _ => 0,
            };
            let private = readable > 0 && !huge && !descriptor.inherited;
            let fd = descriptor.fd;
            let open = OpenAs {
                fd,
                wants_write: readable < 2 && !sealed,
                private,
            };
            (of == id).then_some(((private, readable), open))
        });
        // The first of the best.
        let best = all.reduce(|best, next| if next.0 > best.0 { next } else { best });
        best.map(|(_, open)| open)
    }

    /// The extents of every open file whose contents are in the image.
    pub fn content_extents(&mut self) -> impl Iterator<Item = &mut Vec<Extent>> {
        let contents = |file| OpenFileState::contents_mut(file).map(|(_, _, extents)| extents);
        self.files.iter_mut().filter_map(contents)
    }
}

impl OpenFileState {
    /// Of a file whose contents are in the image: device and inode, size, and where they lie.
    pub fn contents_mut(&mut self) -> Option<((u64, u64), u64, &mut Vec<Extent>)> {
        match &mut self.kind {
            FileKind::Unlinked {
                dev,
                ino,
                size,
                extents,
                ..
            }
            | FileKind::Memfd {
                object_dev: dev,
                object_ino: ino,
                size,
                extents,
                ..
            } => Some(((*dev, *ino), *size, extents)),
            _ => None,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct DescriptorState {
    pub fd: i32,
    pub cloexec: bool,
    /// Index into [`DescriptorTable::files`].
    pub file: u32,
    /// The program was started with this descriptor and never put another file
    /// at its number: a new start's redirection of it is respected.
    pub inherited: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct OpenFileState {
    /// O_* as in fdinfo, without O_CLOEXEC.
    pub flags: u32,
    pub pos: i64,
    /// F_SETOWN: (type F_OWNER_*, pid) and F_SETSIG; zero for none.
    pub owner: (i32, i32),
    pub owner_sig: i32,
    pub kind: FileKind,
}

/// A message or byte run in flight, with descriptors passed in it refused.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueuedData {
    /// Stream: one element. Datagram and seqpacket: one element a message.
    pub messages: Vec<Vec<u8>>,
    /// Sender address of each datagram (raw sockaddr bytes), empty when unnamed.
    pub from: Vec<Vec<u8>>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum FileKind {
    Regular {
        path: Vec<u8>,
        dev: u64,
        ino: u64,
        /// When the file was made, 0 if its file system does not tell: inode
        /// numbers are used again.
        btime_ns: i64,
        size: u64,
        mode: u32,
    },
    /// Unlinked or O_TMPFILE: contents kept in the image at `extents`
    /// (`addr` is the offset in the file), sparse.
    Unlinked {
        path: Vec<u8>,
        dev: u64,
        ino: u64,
        size: u64,
        mode: u32,
        tmpfile: bool,
        extents: Vec<Extent>,
    },
    Directory {
        path: Vec<u8>,
        ino: u64,
    },
    /// Character devices that can simply be opened again (/dev/null, zero, full,
    /// random, urandom), block devices never.
    Device {
        path: Vec<u8>,
        rdev: u64,
    },
    /// A terminal other than a pty pair of our own; `termios` is the 36-byte
    /// kernel `struct termios`, `winsize` the 8-byte `struct winsize`.
    Tty {
        path: Vec<u8>,
        rdev: u64,
        termios: Vec<u8>,
        winsize: Vec<u8>,
    },
    /// A pty master opened by the process; its slave, when open too, is a `Tty`
    /// with `/dev/pts/<index>`.
    PtyMaster {
        index: u32,
        locked: bool,
        packet: bool,
        termios: Vec<u8>,
        winsize: Vec<u8>,
    },
    /// One end of a pipe; `pipe` is shared by both ends (its inode number).
    Pipe {
        pipe: u64,
        write_end: bool,
        capacity: u32,
        packet: bool,
        data: QueuedData,
    },
    Fifo {
        path: Vec<u8>,
        ino: u64,
        capacity: u32,
        data: QueuedData,
    },
    Memfd {
        object_dev: u64,
        object_ino: u64,
        name: Vec<u8>,
        seals: u32,
        size: u64,
        /// 0, or log2 of the huge page size.
        hugetlb: u32,
        mode: u32,
        extents: Vec<Extent>,
    },
    EventFd {
        count: u64,
        semaphore: bool,
    },
    TimerFd {
        clock: i32,
        /// Expirations not read yet.
        ticks: u64,
        remaining_ns: u64,
        interval_ns: u64,
        absolute: bool,
        cancel_on_set: bool,
    },
    SignalFd {
        mask: u64,
    },
    Epoll {
        entries: Vec<EpollEntry>,
    },
    Inotify {
        watches: Vec<InotifyWatch>,
        queued: bool,
    },
    /// A pidfd of the process itself.
    PidFdSelf {
        nonblock: bool,
    },
    /// A pidfd of a process that is gone.
    PidFdDead {
        nonblock: bool,
    },
    Socket(SocketState),
    /// 0-2 and inherited descriptors of a kind that belongs to whoever starts
    /// the program (terminal, pipe, socket to the outside): the new process's is
    /// taken. `path` for messages.
    Inherited {
        path: Vec<u8>,
        termios: Vec<u8>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EpollEntry {
    /// The number under which it was added; it may be closed or reused since.
    pub fd: i32,
    /// The open file description watched: index into [`DescriptorTable::files`].
    pub file: u32,
    pub events: u32,
    pub data: u64,
    /// `epoll_wait` had returned it and would not do so again before something new
    /// happens: the edge of an edge-triggered entry was consumed. False where that
    /// could not be found out.
    pub spent: bool,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct InotifyWatch {
    pub wd: i32,
    pub path: Vec<u8>,
    pub mask: u32,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SocketState {
    pub ino: u64,
    pub domain: i32,
    pub ty: i32,
    pub protocol: i32,
    pub role: SocketRole,
    /// Raw `sockaddr` bytes, empty when unbound.
    pub local: Vec<u8>,
    pub remote: Vec<u8>,
    /// `(level, name, value bytes)` to be set again, in order.
    pub options: Vec<(i32, i32, Vec<u8>)>,
    /// Bytes received and not yet read.
    pub receive: QueuedData,
    /// SHUT_RD = 1, SHUT_WR = 2.
    pub shutdown: u8,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SocketRole {
    /// Created, perhaps bound, not connected.
    #[default]
    Idle,
    Listening {
        backlog: i32,
    },
    /// Both ends are in this process; the peer socket's inode.
    Pair {
        peer_ino: u64,
    },
    /// Connected to a listening socket of this process and not accepted yet.
    Queued {
        listener_ino: u64,
    },
    /// The other end is elsewhere: comes back as a reset connection.
    Outside,
    /// The other end had closed in order: comes back at its end of file.
    Ended,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FileLock {
    pub kind: LockKind,
    pub write: bool,
    /// A descriptor through which it is taken again.
    pub fd: i32,
    /// Byte range for POSIX and OFD locks; `len` 0 means to the end.
    pub start: u64,
    pub len: u64,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LockKind {
    Flock,
    Posix,
    Ofd,
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Shared memory came back by the first descriptor of its file, though that was open for
    /// reading only: it could not be mapped, and there was no restart.
    #[test]
    fn the_best_descriptor_is_taken() {
        let file = |flags: i32, ino| OpenFileState {
            flags: flags as u32,
            pos: 0,
            owner: (0, 0),
            owner_sig: 0,
            kind: FileKind::Unlinked {
                path: Vec::new(),
                dev: 1,
                ino,
                size: 0,
                mode: 0,
                tmpfile: false,
                extents: Vec::new(),
            },
        };
        let fd = |fd, file, inherited| DescriptorState {
            fd,
            cloexec: false,
            file,
            inherited,
        };
        let table = DescriptorTable {
            files: vec![
                file(libc::O_RDONLY, 7),
                file(libc::O_RDWR | libc::O_APPEND, 7),
                file(libc::O_WRONLY, 8),
                file(libc::O_RDWR, 9),
            ],
            fds: vec![
                fd(3, 0, false),
                fd(4, 1, false),
                fd(5, 1, false),
                fd(6, 2, false),
                fd(7, 3, true),
            ],
            locks: Vec::new(),
            hung_up: Vec::new(),
        };
        let best = |ino| table.of_contents((1, ino));
        let open = |fd, wants_write, private| {
            Some(OpenAs {
                fd,
                wants_write,
                private,
            })
        };
        assert_eq!(best(7), open(4, false, true));
        assert_eq!(best(8), open(6, true, false));
        assert_eq!(best(9), open(7, false, false));
        assert_eq!(best(10), None);
    }
}
