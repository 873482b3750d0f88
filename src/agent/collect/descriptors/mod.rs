//! Collecting the open file table (FIG. 6, step 630): every descriptor of the
//! program, which of them share an open file description, and the state behind
//! each.
//!
//! Called by the helper thread while all the program's threads are stopped. The
//! helper has a descriptor table of its own, so the program's is examined through
//! `/proc/self/task/<tid>/{fd,fdinfo}`, and a duplicate is fetched by
//! `pidfd_getfd` where a call on the descriptor itself is needed. Nothing here
//! changes what the program can observe: data is looked at (`tee`, `MSG_PEEK`),
//! never taken. Duplicates are closed again before the program goes on.
//!
//! What cannot be kept is refused with the descriptor and the reason in words.

mod anon;
mod epoll;
pub mod fdinfo;
pub mod handed;
mod known;
mod locks;
mod peek;
mod pipes;
mod regular;
mod share;
mod sockdiag;
mod sockets;
pub mod sockopts;
pub mod sys;
mod tty;

use crate::agent::collect::Refusal;
use crate::agent::hooks::pinned;
use crate::agent::refusal;
use crate::image::state::{
    DescriptorState, DescriptorTable, Extent, FileKind, OpenFileState, QueuedData,
};
use fdinfo::FdInfo;
pub use known::Known;
use std::collections::BTreeMap;
use std::path::PathBuf;
use sys::Fd;

/// Whose descriptors are collected.
#[derive(Debug)]
pub struct Target {
    /// The process, as the kernel knows it.
    pub pid: i32,
    /// A live thread of it whose descriptor table is the program's.
    pub tid: i32,
    /// The process id that the program believes in (equal to `pid` unless ids are
    /// translated).
    pub program_pid: i32,
    /// The descriptors that the process was started with.
    pub inherited: Vec<InheritedFd>,
    /// Paths the program is known to have used (hooks may keep some): where an
    /// inotify watch is looked for, beside the working directory and open files.
    pub path_hints: Vec<Vec<u8>>,
    /// The job's directory: its tables keep links to files that have been unlinked.
    pub job: PathBuf,
}

/// A descriptor as the process was started with it. Recorded by the constructor
/// ([`inherited_now`]) and, after a restore, taken from
/// `restore::descriptors::Restored`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct InheritedFd {
    pub fd: i32,
    pub dev: u64,
    pub ino: u64,
}

/// What the constructor records at the very start: the descriptors that are open.
pub fn inherited_now() -> Vec<InheritedFd> {
    let mut out = Vec::new();
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Ok(dir) = sys::open(b"/proc/thread-self/fd", flags, 0) else {
        return out;
    };
    for name in sys::list_dir(dir.raw()).unwrap_or_default() {
        let fd = fdinfo::number(&name, 10) as i32;
        if fd == dir.raw() {
            continue;
        }
        if let Ok(st) = sys::fstat(fd) {
            let flags = sys::fcntl(fd, libc::F_GETFL, 0).unwrap_or(0);
            // A pipe of packets costs no more than this.
            if flags as i32 & libc::O_DIRECT != 0 {
                refusal::note(refusal::Kind::DirectIo);
            }
            out.push(InheritedFd {
                fd,
                dev: st.st_dev,
                ino: st.st_ino,
            });
        }
    }
    out
}

/// Where contents that exist nowhere else (unlinked files, memfds) are put.
pub trait ContentSink {
    /// Appends whole pages of 4096 bytes and returns the offset that
    /// [`Extent::offset`] records for the first of them.
    fn append(&mut self, pages: &[u8]) -> Result<u64, i32>;

    /// Does the generation that the image stands on hold page `number` of the file (device,
    /// inode) with these bytes? Then it is not to be stored.
    fn same(&mut self, _file: (u64, u64), _number: u64, _page: &[u8]) -> bool {
        false
    }
}

/// One descriptor before its kind is known.
pub(crate) struct Raw {
    pub fd: i32,
    pub link: Vec<u8>,
    pub stat: libc::stat,
    pub info: FdInfo,
    /// Index of its open file description.
    pub file: usize,
    pub inherited: bool,
    /// `link` has been found to lead to it: when that inode was made.
    pub reached: Option<i64>,
}

/// Everything the collectors of the kinds share during one collection.
pub(crate) struct Collector<'a> {
    pub target: &'a Target,
    pub pidfd: Fd,
    pub fd_dir: Fd,
    /// Ascending by number.
    pub raws: Vec<Raw>,
    /// Open file description -> index in `raws` of its lowest descriptor.
    pub lead: Vec<usize>,
    /// Open file description -> did whoever started the program hand it over?
    pub started: Vec<bool>,
    pub sink: &'a mut dyn ContentSink,
    /// Contents stored so far, by (device, inode).
    pub stored: BTreeMap<(u64, u64), Vec<Extent>>,
}

impl Collector<'_> {
    /// A duplicate of a descriptor of the program.
    pub fn duplicate(&self, raw: &Raw) -> Result<Fd, Refusal> {
        handed::copy(self.pidfd.raw(), raw.fd).map_err(|e| raw.refuse("cannot be examined", e))
    }

    /// Did whoever started the program hand it this open file description?
    pub fn started_with(&self, raw: &Raw) -> bool {
        self.started.get(raw.file) == Some(&true)
    }
}

impl Raw {
    pub fn mode(&self) -> u32 {
        self.stat.st_mode & libc::S_IFMT
    }

    /// O_* without the descriptor's own O_CLOEXEC.
    pub fn flags(&self) -> u32 {
        self.info.flags & !(libc::O_CLOEXEC as u32)
    }

    pub fn access(&self) -> i32 {
        self.info.flags as i32 & libc::O_ACCMODE
    }

    /// "descriptor 5 (/dev/fuse)".
    pub fn name(&self) -> String {
        format!(
            "descriptor {} ({})",
            self.fd,
            String::from_utf8_lossy(&self.link)
        )
    }

    pub fn refuse(&self, what: &str, errno: i32) -> Refusal {
        Refusal {
            reason: format!("{} {what}: {}", self.name(), sys::errno_text(errno)),
        }
    }

    pub fn refuse_kind(&self, why: &str) -> Refusal {
        Refusal {
            reason: format!("{} {why}", self.name()),
        }
    }
}

/// Collects the whole table. On a refusal nothing of it is usable. `known` is what the
/// collection before has left.
pub fn collect(
    target: &Target,
    known: &mut Known,
    sink: &mut dyn ContentSink,
) -> Result<DescriptorTable, Refusal> {
    let fail = |what: &str, e: i32| Refusal {
        reason: format!("the descriptor table: {what}: {}", sys::errno_text(e)),
    };
    let pidfd = sys::pidfd_of(target.pid, target.tid).map_err(|e| fail("pidfd_open", e))?;
    let base = format!("/proc/self/task/{}/", target.tid).into_bytes();
    let dir = |name: &[u8]| {
        let path = [&base[..], name].concat();
        sys::open(&path, libc::O_RDONLY | libc::O_DIRECTORY, 0)
    };
    let fd_dir = dir(b"fd").map_err(|e| fail("open /proc/self/task/TID/fd", e))?;
    let info_dir = dir(b"fdinfo").map_err(|e| fail("open /proc/self/task/TID/fdinfo", e))?;

    let mut raws = read_raws(target, known, &fd_dir, &info_dir).map_err(|e| fail("read", e))?;
    let lead = share::group(target, &pidfd, &mut raws)?;
    let mut started = vec![false; lead.len()];
    for raw in raws.iter().filter(|raw| raw.inherited) {
        started[raw.file] = true;
    }
    let mut collector = Collector {
        target,
        pidfd,
        fd_dir,
        raws,
        lead,
        started,
        sink,
        stored: BTreeMap::new(),
    };
    let mut table = DescriptorTable {
        fds: collector
            .raws
            .iter()
            .map(|raw| DescriptorState {
                fd: raw.fd,
                cloexec: raw.info.cloexec(),
                file: raw.file as u32,
                inherited: raw.inherited,
            })
            .collect(),
        ..DescriptorTable::default()
    };
    for file in 0..collector.lead.len() {
        let kind = classify(&mut collector, file)?;
        let raw = &collector.raws[collector.lead[file]];
        let (owner, owner_sig) = owner(&collector, raw, &kind)?;
        table.files.push(OpenFileState {
            flags: raw.flags(),
            pos: raw.info.pos,
            owner,
            owner_sig,
            kind,
        });
    }
    sockets::resolve(&collector, &mut table)?;
    table.locks = locks::collect(&collector)?;
    Ok(table)
}

/// Reads number, link, stat and fdinfo of every descriptor, ascending.
fn read_raws(
    target: &Target,
    known: &mut Known,
    fd_dir: &Fd,
    info_dir: &Fd,
) -> Result<Vec<Raw>, i32> {
    let mut raws = Vec::new();
    let mut text = Vec::with_capacity(4096);
    let names = sys::list_dir(fd_dir.raw())?;
    let mut numbers: Vec<i32> = names
        .iter()
        .map(|name| fdinfo::number(name, 10) as i32)
        .collect();
    numbers.sort_unstable();
    known.begin(target.tid, |fd| numbers.binary_search(&fd).is_ok());
    for name in names {
        let name = sys::cstr(&name);
        let fd = fdinfo::number(&name, 10) as i32;
        let (link, stat, info, reached) = match known.again(fd, &mut text) {
            Some(same) => (same.path, same.stat, same.info, Some(same.btime_ns)),
            None => {
                let stat = sys::fstatat(fd_dir.raw(), &name, 0)?;
                let file = sys::read_file(info_dir.raw(), &name, &mut text)?;
                let link = sys::readlinkat(fd_dir.raw(), &name)?;
                known.note(fd, file, &link, &stat);
                (link, stat, FdInfo::parse(&text), None)
            }
        };
        let (dev, ino) = (stat.st_dev, stat.st_ino);
        pinned::found(info.flags as i32, &link);
        raws.push(Raw {
            fd,
            link,
            stat,
            info,
            reached,
            file: 0,
            inherited: match &target.inherited[..] {
                // No record of the start: the three standard ones.
                [] => fd <= 2,
                list => list
                    .iter()
                    .any(|i| i.fd == fd && (i.dev, i.ino) == (dev, ino)),
            },
        });
    }
    raws.sort_by_key(|raw| raw.fd);
    Ok(raws)
}

/// The kind and state of one open file description.
fn classify(c: &mut Collector, file: usize) -> Result<FileKind, Refusal> {
    let at = c.lead[file];
    let raw = &c.raws[at];
    if raw.info.flags & libc::O_PATH as u32 != 0 {
        return regular::by_path(c, raw);
    }
    if let Some(anon) = raw.link.strip_prefix(b"anon_inode:") {
        let name = anon.to_vec();
        return anon::collect(c, at, &name);
    }
    match raw.mode() {
        libc::S_IFREG => regular::file(c, at),
        libc::S_IFDIR => regular::directory(c, raw),
        libc::S_IFCHR => tty::character_device(c, at),
        libc::S_IFBLK => Err(raw.refuse_kind("is a block device")),
        libc::S_IFIFO => pipes::collect(c, at),
        libc::S_IFSOCK => sockets::collect(c, at),
        _ => Err(raw.refuse_kind("is of a kind that cannot be saved")),
    }
}

/// F_SETOWN and F_SETSIG. Asked for only where signals can be meant: on sockets
/// and where O_ASYNC is set (a duplicate per regular file would cost much).
fn owner(c: &Collector, raw: &Raw, kind: &FileKind) -> Result<((i32, i32), i32), Refusal> {
    const F_GETSIG: i32 = 11;
    const F_GETOWN_EX: i32 = 16;
    let is_socket = matches!(kind, FileKind::Socket(_));
    if !is_socket && raw.info.flags & libc::O_ASYNC as u32 == 0 {
        return Ok(((0, 0), 0));
    }
    let dup = c.duplicate(raw)?;
    let mut owner = [0i32; 2];
    let sig = sys::fcntl(dup.raw(), F_GETSIG, 0).unwrap_or(0) as i32;
    if sys::fcntl(dup.raw(), F_GETOWN_EX, owner.as_mut_ptr() as usize).is_err() || owner[1] == 0 {
        return Ok(((0, 0), sig));
    }
    Ok(((owner[0], owner[1]), sig))
}

/// No bytes in flight.
pub(crate) fn nothing_queued() -> QueuedData {
    QueuedData::default()
}
