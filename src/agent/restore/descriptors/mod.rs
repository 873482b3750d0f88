//! Restoring the open file table: exactly the image's descriptors at their
//! numbers, with shared descriptions, positions and flags.
//!
//! Called by the constructor of the new process: one thread, the program's
//! memory not yet in place. Order: our own descriptors out of the way, sources
//! that the new start provides (redirections) set aside, everything else closed,
//! objects made and put at their numbers, inotify watches, epoll sets (everything
//! they watch must exist), locks last (closing any descriptor of a file would drop
//! its POSIX locks).
//!
//! Which descriptors come from the new start: a number that the program was
//! started with and has not put another file at ([`DescriptorState::inherited`])
//! and that leads to a terminal, pipe, device or named file takes what the new
//! start has there. When that is the same regular file, or one that was given the
//! contents of the old one, its position is set.
//!
//! At a rollback there is no new start: [`kept`] finds what is open still.

pub mod anon;
mod epoll;
mod kept;
mod locks;
mod numbers;
mod pipes;
pub mod regular;
pub mod sockets;
mod sockpair;
mod tty;

use crate::agent::collect::descriptors::InheritedFd;
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::agent::recover::files::FilesBack;
use crate::image::state::{
    DescriptorState, DescriptorTable, Extent, FileKind, FileLock, OpenFileState,
};
use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::RawFd;

/// Where the contents stored through `ContentSink` are read from.
pub trait ContentSource {
    /// Fills `buf` from what lies `skip` bytes behind the start of `extent`.
    fn read(&self, extent: &Extent, skip: u64, buf: &mut [u8]) -> Result<(), i32>;
}

/// What the restorer needs to know of the process it runs in.
pub struct Context<'a> {
    /// Descriptors of our own to be left open. Those whose number the image needs
    /// are moved, and the new number is stored here.
    pub keep: &'a mut [RawFd],
    /// The process id that the program believes in (`ProcessState::pid`).
    pub program_pid: i32,
    /// Takes lines about what could not be restored faithfully.
    pub warn: &'a mut dyn FnMut(&str),
    /// What the recovery has done to the files before.
    pub files: &'a FilesBack,
    /// Rollback: what is open is the program's own; what is still the same object stays.
    pub inside: bool,
}

/// What the caller has to carry on with.
#[derive(Debug, Default)]
pub struct Restored {
    /// The new `Target::inherited`.
    pub inherited: Vec<InheritedFd>,
    /// To be done in the restored process once memory and threads are there.
    pub late: Vec<Late>,
}

/// Work that must wait for the memory map or the threads.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Late {
    /// `fcntl(fd, F_ADD_SEALS, seals)` after shared mappings have been made.
    Seals { fd: RawFd, seals: u32 },
    /// A POSIX record lock, to be taken once more (`fcntl(fd, F_SETLK)`) after the
    /// last descriptor of any mapped or otherwise examined file has been closed:
    /// closing one drops the process's locks on that file.
    PosixLock(FileLock),
}

impl Late {
    /// The argument of `F_SETLK` for a [`Late::PosixLock`].
    pub fn flock(lock: &FileLock) -> libc::flock {
        locks::flock_of(lock)
    }
}

/// Why the table could not be restored.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error("open {path} for descriptor {fd}: {reason}")]
    Open {
        path: String,
        fd: RawFd,
        reason: String,
    },
    #[error("restore descriptor {fd} ({what}): {reason}")]
    Descriptor {
        fd: RawFd,
        what: &'static str,
        reason: String,
    },
    #[error("lock {path}: {reason}")]
    Lock { path: String, reason: String },
    #[error("place descriptor {fd}: {reason}")]
    Number { fd: RawFd, reason: String },
}

/// Restores the whole table. On an error the process is of no further use.
pub fn restore(
    table: &DescriptorTable,
    source: &dyn ContentSource,
    ctx: &mut Context<'_>,
) -> Result<Restored, RestoreError> {
    let mut r = Restorer::new(table, source, ctx);
    if let Err(error) = restore_all(&mut r) {
        r.give_back_stderr();
        return Err(error);
    }
    Ok(r.out)
}

fn restore_all(r: &mut Restorer) -> Result<(), RestoreError> {
    r.make_room()?;
    r.keep_stderr();
    if r.ctx.inside {
        kept::take(r)?;
        r.close_others();
        kept::place(r)?;
    } else {
        r.take_sources()?;
        r.close_others();
    }
    for file in 0..r.table.files.len() {
        r.make(file)?;
    }
    r.place_sources()?;
    sockets::finish(r)?;
    regular::finish(r)?;
    r.objects.clear();
    r.set_owners()?;
    anon::add_watches(r)?;
    epoll::fill(r)?;
    locks::take(r)?;
    r.finish_numbers();
    Ok(())
}

/// The state of one restoration.
pub(crate) struct Restorer<'a, 'c> {
    pub table: &'a DescriptorTable,
    pub source: &'a dyn ContentSource,
    pub ctx: &'a mut Context<'c>,
    /// Wanted numbers.
    pub wanted: BTreeMap<RawFd, DescriptorState>,
    /// Open file description -> its numbers that are made by us (ascending).
    pub numbers: Vec<Vec<RawFd>>,
    /// Numbers that take a descriptor of the new start: number -> where that is
    /// set aside.
    pub sources: BTreeMap<RawFd, RawFd>,
    /// Rollback: those of `sources` that take what this life was started with, and the life of
    /// the checkpoint was not.
    pub given: BTreeSet<RawFd>,
    /// Description already made (both ends of a pair are made at once).
    pub made: Vec<bool>,
    /// Inode-like objects that several descriptions open: (dev, ino) of the image
    /// -> a descriptor set aside.
    pub objects: BTreeMap<(u64, u64), Fd>,
    /// Where what goes wrong can be told when 2 is closed, or the program's.
    pub stderr: Option<Fd>,
    pub out: Restored,
}

impl<'a, 'c> Restorer<'a, 'c> {
    fn new(
        table: &'a DescriptorTable,
        source: &'a dyn ContentSource,
        ctx: &'a mut Context<'c>,
    ) -> Restorer<'a, 'c> {
        let mut numbers = vec![Vec::new(); table.files.len()];
        for d in &table.fds {
            numbers[d.file as usize].push(d.fd);
        }
        Restorer {
            table,
            source,
            ctx,
            wanted: table.fds.iter().map(|d| (d.fd, *d)).collect(),
            numbers,
            sources: BTreeMap::new(),
            given: BTreeSet::new(),
            made: vec![false; table.files.len()],
            objects: BTreeMap::new(),
            stderr: None,
            out: Restored::default(),
        }
    }

    pub fn warn(&mut self, line: &str) {
        (self.ctx.warn)(line);
    }

    pub fn state(&self, file: usize) -> &'a OpenFileState {
        &self.table.files[file]
    }

    /// The lowest number of a description, for messages.
    pub fn first(&self, file: usize) -> RawFd {
        let of_file = |d: &&DescriptorState| d.file as usize == file;
        self.table.fds.iter().find(of_file).map_or(-1, |d| d.fd)
    }

    pub fn fail(&self, file: usize, what: &'static str, errno: i32) -> RestoreError {
        RestoreError::Descriptor {
            fd: self.first(file),
            what,
            reason: sys::errno_text(errno),
        }
    }

    pub fn fail_open(&self, file: usize, path: &[u8], reason: &str) -> RestoreError {
        RestoreError::Open {
            path: String::from_utf8_lossy(path).into_owned(),
            fd: self.first(file),
            reason: reason.to_string(),
        }
    }

    /// Makes one description unless it came with its peer or with the new start.
    fn make(&mut self, file: usize) -> Result<(), RestoreError> {
        if self.made[file] || self.numbers[file].is_empty() {
            return Ok(());
        }
        let fd = match &self.state(file).kind {
            FileKind::Regular { .. } => regular::named(self, file)?,
            FileKind::Unlinked { .. } => regular::unlinked(self, file)?,
            FileKind::Memfd { .. } => regular::memfd(self, file)?,
            FileKind::Directory { .. } => regular::directory(self, file)?,
            FileKind::Device { path, rdev } => tty::device(self, file, path, *rdev)?,
            FileKind::Tty { .. } => tty::terminal(self, file)?,
            FileKind::PtyMaster { .. } => tty::master(self, file)?,
            FileKind::Inherited { path, .. } => tty::stand_in(self, file, path)?,
            FileKind::Pipe { pipe, .. } => return pipes::pipe(self, *pipe),
            FileKind::Fifo { path, ino, .. } => return pipes::fifo(self, path, *ino),
            FileKind::Socket(_) => return sockets::make(self, file),
            FileKind::EventFd { count, semaphore } => {
                anon::eventfd(self, file, *count, *semaphore)?
            }
            FileKind::TimerFd { .. } => anon::timerfd(self, file)?,
            FileKind::SignalFd { mask } => anon::signalfd(self, file, *mask)?,
            FileKind::Epoll { .. } => epoll::create(self, file)?,
            FileKind::Inotify { watches, .. } => anon::inotify(self, file, watches)?,
            FileKind::PidFdSelf { nonblock } => anon::pidfd_self(self, file, *nonblock)?,
            FileKind::PidFdDead { nonblock } => anon::pidfd_dead(self, file, *nonblock)?,
        };
        self.place(file, fd)
    }

    /// Sets the status flags that a created object did not get when it was made.
    pub fn set_flags(&self, file: usize, fd: &Fd) -> Result<(), RestoreError> {
        let settable = libc::O_APPEND | libc::O_NONBLOCK | libc::O_DIRECT | libc::O_NOATIME;
        let want = self.state(file).flags as i32 & settable;
        let have = sys::fcntl(fd.raw(), libc::F_GETFL, 0).unwrap_or(0) as i32;
        if have & settable == want {
            return Ok(());
        }
        sys::fcntl(
            fd.raw(),
            libc::F_SETFL,
            (have & !settable | want) as u32 as usize,
        )
        .map(drop)
        .map_err(|e| self.fail(file, "set its flags", e))
    }

    /// F_SETOWN, F_SETSIG and O_ASYNC.
    fn set_owners(&mut self) -> Result<(), RestoreError> {
        for file in 0..self.table.files.len() {
            let asynchronous = self.state(file).flags & libc::O_ASYNC as u32 != 0;
            let Some(&fd) = self.numbers[file].first() else {
                continue;
            };
            self.set_owner(file, fd);
            if asynchronous {
                let have = sys::fcntl(fd, libc::F_GETFL, 0).unwrap_or(0);
                sys::fcntl(fd, libc::F_SETFL, have | libc::O_ASYNC as usize)
                    .map_err(|e| self.fail(file, "set O_ASYNC", e))?;
            }
        }
        Ok(())
    }

    /// F_SETSIG, and F_SETOWN where that is the process: an id of the program's is this process
    /// then. Threads do not exist yet, and become owners later, as groups do (`resume`).
    fn set_owner(&mut self, file: usize, fd: RawFd) {
        const F_SETSIG: i32 = 10;
        const F_SETOWN_EX: i32 = 15;
        const F_OWNER_PGRP: i32 = 2;
        let state = self.state(file);
        if state.owner_sig != 0 {
            let _ = sys::fcntl(fd, F_SETSIG, state.owner_sig as usize);
        }
        let (kind, id) = state.owner;
        if kind != F_OWNER_PGRP && id == self.ctx.program_pid {
            // SAFETY: getpid has no arguments.
            let real = unsafe { ckpt_sys::syscall!(libc::SYS_getpid) } as i32;
            let mut arg = [kind, real];
            let _ = sys::fcntl(fd, F_SETOWN_EX, arg.as_mut_ptr() as usize);
        }
    }
}
