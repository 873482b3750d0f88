//! Contents of the files that the program was started with (`./app > out.txt`), kept by
//! the store, since a shell truncates them before the next start runs.
//!
//! A *stream* (`stream-000001` in the job's directory) is such a file as it was at some
//! moment at or after the newest generation: with the blocks of the tables of a generation G
//! put back, newest table first, its first `size` bytes are the file as of G. It is
//! never made shorter. `stream-000001.ids` says which inode it stands for: a line
//! `table device inode` holds from that table on, later lines count more.
//!
//! One that the program has closed (`freopen`) is kept as well, if it was empty at the start and
//! still has its name: its record says no descriptors.
//!
//! [`keep`] runs in the helper thread at checkpoints, [`refill`] in the constructor of a
//! process that recovers.

pub mod given;
pub mod keep;
pub mod refill;
mod rows;

use crate::errno::Errno;
use crate::persist::Id;
use crate::store::stream::{ids_path, stream_path};
use rustix::fs::{Mode, OFlags};
use std::os::fd::OwnedFd;
use std::path::Path;

/// What went wrong with a stream, in words.
pub type Problem = String;

fn problem(what: &str, path: &Path, errno: rustix::io::Errno) -> Problem {
    let error = Errno(errno.raw_os_error());
    format!("{what} {}: {error}", path.display())
}

/// The program makes system calls that nobody sees and that may write to its outputs, or has
/// children: what is behind the end that an output had at the checkpoint is taken for its own then.
pub fn expect_unseen(job: &Path) -> Result<(), Problem> {
    let path = job.join(UNSEEN);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
    let made = rustix::fs::open(&path, flags, Mode::from(0o600));
    made.map(drop).map_err(|e| problem("create", &path, e))
}

/// Was that told in any life of the job?
fn are_unseen(job: &Path) -> bool {
    rustix::fs::lstat(job.join(UNSEEN)).is_ok()
}

/// An empty file in the job's directory.
const UNSEEN: &str = "unseen-writes";

/// Which inode a stream stands for in which table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Ids(Vec<(u32, Id)>);

impl Ids {
    /// No file or a torn last line: as far as it can be read.
    pub fn read(job: &Path, number: u64) -> Ids {
        let bytes = crate::agent::procfs::read_file(std::os::unix::ffi::OsStrExt::as_bytes(
            ids_path(job, number).as_os_str(),
        ));
        Ids::parse(&bytes.unwrap_or_default())
    }

    fn parse(bytes: &[u8]) -> Ids {
        let text = String::from_utf8_lossy(bytes);
        let line = |line: &str| {
            let mut words = line.strip_suffix('\n')?.split(' ');
            let mut number = || words.next()?.parse::<u64>().ok();
            let (table, dev, ino) = (number()?, number()?, number()?);
            if number().is_some() {
                return None;
            }
            Some((table as u32, Id { dev, ino }))
        };
        Ids(text.split_inclusive('\n').filter_map(line).collect())
    }

    pub fn of_table(&self, table: u32) -> Option<Id> {
        let known = self.0.iter().rev().find(|(from, _)| *from <= table);
        known.map(|(_, id)| *id)
    }

    pub fn last(&self) -> Option<Id> {
        self.0.last().map(|(_, id)| *id)
    }

    /// From table `from` on the stream stands for `id`.
    pub fn add(job: &Path, number: u64, from: u32, id: Id) -> Result<(), Problem> {
        let path = ids_path(job, number);
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::APPEND | OFlags::CLOEXEC;
        // Behind a torn line this is a line of its own.
        let line = format!("\n{from} {} {}\n", id.dev, id.ino);
        rustix::fs::open(&path, flags, Mode::from(0o600))
            .and_then(|fd| rustix::io::write(&fd, line.as_bytes()))
            .map(drop)
            .map_err(|e| problem("write", &path, e))
    }
}

/// Opens a stream for reading and writing.
fn open(job: &Path, number: u64, create: bool) -> Result<OwnedFd, Problem> {
    let path = stream_path(job, number);
    let mut flags = OFlags::RDWR | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    if create {
        flags |= OFlags::CREATE | OFlags::EXCL;
    }
    rustix::fs::open(&path, flags, Mode::from(0o600)).map_err(|e| problem("open", &path, e))
}

/// Copies `from..to` of one file to the same place in another; stops at the source's end.
/// Returns where it stopped.
fn copy(source: &OwnedFd, target: &OwnedFd, from: u64, to: u64) -> rustix::io::Result<u64> {
    let mut buffer = vec![0u8; (to.saturating_sub(from)).clamp(1, 1 << 20) as usize];
    let mut at = from;
    while at < to {
        let want = ((to - at) as usize).min(buffer.len());
        let got = rustix::io::pread(source, &mut buffer[..want], at)?;
        if got == 0 {
            break;
        }
        write_at(target, &buffer[..got], at)?;
        at += got as u64;
    }
    Ok(at)
}

fn write_at(target: &OwnedFd, bytes: &[u8], at: u64) -> rustix::io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        match rustix::io::pwrite(target, &bytes[done..], at + done as u64)? {
            0 => return Err(rustix::io::Errno::IO),
            n => done += n,
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_line_that_holds_counts() {
        let ids = Ids::parse(b"\n1 5 50\n\n8 5 51\n3 5 52\n9 5 5");
        let ino = |table| ids.of_table(table).map(|id| id.ino);
        assert_eq!(ino(0), None);
        assert_eq!(ino(2), Some(50));
        assert_eq!(ino(9), Some(52));
        assert_eq!(ids.last().map(|id| id.ino), Some(52));
    }
}
