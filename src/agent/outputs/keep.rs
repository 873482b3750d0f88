//! At checkpoints: brings the streams up to date. Helper thread; [`scan`] while the
//! program is stopped, [`Streams::update`] after it was released.
//!
//! Nothing is read twice: what was appended since the stream was last brought up to date, and the
//! blocks that the tables since then say were modified. What the program has
//! modified again since the stop is in the newest table, with its contents at the stop.

use super::{Ids, Problem, copy, open, problem, rows};
use crate::agent::{exit, log, settings};
use crate::image::state::{DescriptorState, DescriptorTable, FileKind, Manifest};
use crate::persist::{Id, exclude};
use crate::store::generation::StreamRecord;
use crate::store::stream::{self, stream_path};
use rustix::fs::{Mode, OFlags};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// A file that the program was started with, open for writing, at the stop, or empty then and
/// closed by now.
#[derive(Debug)]
pub struct Output {
    id: Id,
    fds: Vec<i32>,
    size: u64,
    path: Vec<u8>,
    /// A description of our own that can be read. (No `fds`: the program has closed it.)
    source: Result<OwnedFd, Problem>,
}

/// Finds the outputs in the open file table; `tid` is a thread of the program.
pub fn scan(manifest: &Manifest, tid: i32) -> Vec<Output> {
    let mut outputs: Vec<Output> = Vec::new();
    let table = &manifest.descriptors;
    for descriptor in table.fds.iter().filter(|d| d.inherited) {
        add(&mut outputs, table, descriptor, descriptor.fd, tid);
    }
    // What the program has put elsewhere for a while (to silence a library): a new start's shell
    // truncates it all the same.
    let given = settings::get().map_or(&[][..], |s| &s.inherited);
    for &(fd, dev, ino) in given {
        let is_it = |d: &&DescriptorState| match table.files.get(d.file as usize) {
            Some(file) => matches!(
                &file.kind,
                FileKind::Regular { dev: d, ino: i, .. } if (*d, *i) == (dev, ino)
            ),
            None => false,
        };
        if outputs.iter().any(|o| o.fds.contains(&fd)) {
            continue;
        }
        for descriptor in table.fds.iter().filter(is_it) {
            add(&mut outputs, table, descriptor, fd, tid);
        }
    }
    // And what it has closed for good: a new start's shell does not know that.
    let given = settings::get().map_or(&[][..], |s| &s.outputs);
    for output in given {
        let id = Id {
            dev: output.dev,
            ino: output.ino,
        };
        if outputs.iter().all(|known| known.id != id) {
            outputs.extend(closed(id, &output.path));
        }
    }
    outputs
}

/// An output that the program has no descriptor of; `None`: its name leads elsewhere now.
fn closed(id: Id, path: &[u8]) -> Option<Output> {
    let stat = rustix::fs::lstat(path).ok()?;
    if (stat.st_dev, stat.st_ino) != (id.dev, id.ino) || exclude::is_excluded(path) {
        return None;
    }
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY | OFlags::NOFOLLOW;
    let source = rustix::fs::open(path, flags, Mode::empty());
    let same = |fd: &OwnedFd| {
        let now = rustix::fs::fstat(fd);
        now.is_ok_and(|now| (now.st_dev, now.st_ino) == (id.dev, id.ino))
    };
    if source.as_ref().is_ok_and(|fd| !same(fd)) {
        return None;
    }
    Some(Output {
        id,
        fds: Vec::new(),
        size: stat.st_size as u64,
        path: path.to_vec(),
        source: source.map_err(|e| problem("read", Path::new(OsStr::from_bytes(path)), e)),
    })
}

/// What is open at `descriptor`, if a new start may truncate it, as the output `fd`.
fn add(
    outputs: &mut Vec<Output>,
    table: &DescriptorTable,
    descriptor: &DescriptorState,
    fd: i32,
    tid: i32,
) {
    let Some(file) = table.files.get(descriptor.file as usize) else {
        return;
    };
    let FileKind::Regular {
        path,
        dev,
        ino,
        size,
        mode,
        ..
    } = &file.kind
    else {
        return;
    };
    let flags = file.flags as i32;
    let writable = flags & libc::O_ACCMODE != libc::O_RDONLY && flags & libc::O_PATH == 0;
    let regular = mode & libc::S_IFMT == libc::S_IFREG;
    if !writable || !regular || exclude::is_excluded(path) {
        return;
    }
    let id = Id {
        dev: *dev,
        ino: *ino,
    };
    if let Some(known) = outputs.iter_mut().find(|o| o.id == id) {
        if !known.fds.contains(&fd) {
            known.fds.push(fd);
        }
        return;
    }
    let link = format!("/proc/self/task/{tid}/fd/{}", descriptor.fd);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOCTTY;
    let source = rustix::fs::open(&link, flags, Mode::empty());
    outputs.push(Output {
        id,
        fds: vec![fd],
        size: *size,
        path: path.clone(),
        source: source.map_err(|e| problem("read", Path::new(&link), e)),
    });
}

/// A stream as this life of the program has brought it up to date.
#[derive(Debug)]
struct Stream {
    number: u64,
    id: Id,
    /// The file's size then.
    size: u64,
    /// The table that began at that stop.
    table: u32,
}

/// The helper's knowledge of the streams.
#[derive(Debug, Default)]
pub struct Streams(Vec<Stream>);

impl Streams {
    /// After a restore: the streams of the generation are as of it, and the table that
    /// has begun now is `table`.
    pub fn adopt(job: &Path, records: &[StreamRecord], table: u32) -> Streams {
        let stream = |record: &StreamRecord| {
            Some(Stream {
                number: record.number,
                id: Ids::read(job, record.number).last()?,
                size: record.size,
                table,
            })
        };
        Streams(records.iter().filter_map(stream).collect())
    }

    /// Brings the streams up to the stop at which `table` began. One that
    /// cannot be kept is left out.
    pub fn update(&mut self, job: &Path, outputs: Vec<Output>, table: u32) -> Vec<StreamRecord> {
        let mut records = Vec::new();
        for output in outputs {
            match self.update_one(job, &output, table) {
                Ok(number) => records.push(StreamRecord {
                    number,
                    fds: output.fds,
                    dev: output.id.dev,
                    ino: output.id.ino,
                    size: output.size,
                    path: output.path,
                }),
                Err(problem) => {
                    self.0.retain(|s| s.id != output.id);
                    // The end of the program takes the job away under the helper's feet.
                    if !exit::exiting() {
                        match output.fds.first() {
                            Some(fd) => log::line(format_args!(
                                "descriptor {fd}: its contents are not kept: {problem}"
                            )),
                            None => log::line(format_args!(
                                "an output that was closed: its contents are not kept: {problem}"
                            )),
                        }
                    }
                }
            }
        }
        records
    }

    fn update_one(&mut self, job: &Path, output: &Output, table: u32) -> Result<u64, Problem> {
        let source = output.source.as_ref().map_err(Clone::clone)?;
        let known = self.0.iter().position(|s| s.id == output.id);
        // Without whole tables since then nobody knows what has changed.
        let usable = known.and_then(|at| {
            let stream = &self.0[at];
            let changed = rows::changed(job, stream.table..table, output.id)?;
            Some((at, changed))
        });
        let (number, ranges) = match usable {
            Some((at, mut ranges)) => {
                let old = self.0[at].size;
                ranges.push((old, output.size));
                (self.0[at].number, ranges)
            }
            None => {
                self.0.retain(|s| s.id != output.id);
                let number = next_number(job)?;
                drop(open(job, number, true)?);
                Ids::add(job, number, table, output.id)?;
                (number, vec![(0, output.size)])
            }
        };
        let stream = open(job, number, false)?;
        let path = stream_path(job, number);
        for (from, to) in ranges {
            copy(source, &stream, from, to.min(output.size))
                .map_err(|e| problem("write", &path, e))?;
        }
        // The program runs already. What it has overwritten or cut off in the meantime is in
        // the newest table: recorded before it was done, so also before it was read here.
        rows::put_back(job, table, output.id, &stream, output.size)?;
        rustix::fs::fdatasync(&stream).map_err(|e| problem("sync", &path, e))?;
        self.0.retain(|s| s.id != output.id);
        self.0.push(Stream {
            number,
            id: output.id,
            size: output.size,
            table,
        });
        Ok(number)
    }
}

/// One more than the highest number that is in use.
fn next_number(job: &Path) -> Result<u64, Problem> {
    let numbers = stream::numbers(job).map_err(|e| e.to_string())?;
    Ok(numbers.into_iter().max().unwrap_or(0) + 1)
}
