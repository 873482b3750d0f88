//! Regular files, directories, unlinked files and memfds. Called by
//! [`super::collect`] in the helper thread.

use super::{Collector, Raw, sys};
use crate::agent::collect::Refusal;
use crate::agent::collect::memory::is_zero;
use crate::image::state::{Extent, FileKind};
use crate::persist::{Id, kept};

const PAGE: u64 = 4096;
/// Contents go to the sink in pieces of this size.
const CHUNK: usize = 256 * 1024;
const F_GET_SEALS: i32 = 1034;
const MQUEUE_MAGIC: i64 = 0x1980_0202;
const HUGETLBFS_MAGIC: i64 = 0x9584_58f6;
/// `__O_TMPFILE`, which stays visible in the flags.
const O_TMPFILE_BIT: u32 = 0o20_000_000;
const DELETED: &[u8] = b" (deleted)";

/// A descriptor that can be had again by opening its path, whatever lies there.
pub(super) fn by_path(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    named(c, raw)
}

/// A file by path, after a check that the path still leads to it. One that was
/// handed over by whoever started the program needs no path: the next start
/// provides it again.
fn named(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    let mut path = &raw.link[..];
    let btime = match reached(raw, path) {
        Ok(btime) => btime,
        Err(_) if c.started_with(raw) => {
            path = path.strip_suffix(DELETED).unwrap_or(path);
            let mut buf = [0; 12];
            let name = sys::decimal(raw.fd, &mut buf);
            sys::identity(c.fd_dir.raw(), name, 0).map_or(0, |(_, _, btime)| btime)
        }
        Err(refusal) => return Err(refusal),
    };
    Ok(FileKind::Regular {
        path: path.to_vec(),
        dev: raw.stat.st_dev,
        ino: raw.stat.st_ino,
        btime_ns: btime,
        size: raw.stat.st_size as u64,
        mode: raw.stat.st_mode,
    })
}

/// When the file was made that `path` leads to, if it is the descriptor's.
fn reached(raw: &Raw, path: &[u8]) -> Result<i64, Refusal> {
    if let Some(btime) = raw.reached {
        return Ok(btime);
    }
    let no_follow = libc::AT_SYMLINK_NOFOLLOW;
    let flags = if raw.info.flags & libc::O_PATH as u32 != 0 {
        no_follow
    } else {
        0
    };
    let there = sys::identity(libc::AT_FDCWD, &sys::cstr(path), flags);
    match there {
        Ok((dev, ino, btime)) if (dev, ino) == (raw.stat.st_dev, raw.stat.st_ino) => Ok(btime),
        Ok(_) => Err(raw.refuse_kind("is no longer what its path leads to")),
        Err(e) => Err(raw.refuse("cannot be reached by its path any more", e)),
    }
}

pub(super) fn directory(c: &Collector, raw: &Raw) -> Result<FileKind, Refusal> {
    if raw.stat.st_nlink == 0 && !c.started_with(raw) {
        return Err(raw.refuse_kind("is a directory that has been removed"));
    }
    match named(c, raw)? {
        FileKind::Regular { path, ino, .. } => Ok(FileKind::Directory { path, ino }),
        other => Ok(other),
    }
}

pub(super) fn file(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let deleted = raw.link.ends_with(DELETED);
    if !raw.link.starts_with(b"/") {
        // Namespaces (nsfs), dma-buf and the like have no path.
        return Err(raw.refuse_kind("is of a kind that cannot be saved"));
    }
    if deleted && raw.link.starts_with(b"/memfd:") {
        return memfd(c, at);
    }
    if deleted && raw.link.starts_with(b"/secretmem") {
        return Err(raw.refuse_kind("is secret memory"));
    }
    if let Some(path) = own_proc_path(c, raw) {
        return Ok(FileKind::Regular {
            path,
            dev: raw.stat.st_dev,
            ino: raw.stat.st_ino,
            btime_ns: 0,
            size: 0,
            mode: raw.stat.st_mode,
        });
    }
    let handed_over = c.started_with(raw);
    if raw.stat.st_nlink > 0 && !(deleted && only_kept(c, raw)) {
        if deleted && !handed_over && sys::stat(&raw.link).is_err() {
            return Err(
                raw.refuse_kind("was unlinked under the name it was opened by but has other names")
            );
        }
        return named(c, raw);
    }
    // Its name in its own file system looks like a path of ours.
    if sys::fs_magic(c.duplicate(raw)?.raw()) == Ok(MQUEUE_MAGIC) {
        return Err(raw.refuse_kind("is a POSIX message queue that has been unlinked"));
    }
    // Output is wanted where the next start says. Input without a name (a shell's
    // here-document) is kept as far as it can be read.
    if handed_over && raw.access() != libc::O_RDONLY {
        return named(c, raw);
    }
    let extents = match contents(c, at) {
        Err(_) if handed_over => return named(c, &c.raws[at]),
        other => other?,
    };
    let raw = &c.raws[at];
    let path = raw.link.strip_suffix(DELETED).unwrap_or(&raw.link);
    Ok(FileKind::Unlinked {
        path: path.to_vec(),
        dev: raw.stat.st_dev,
        ino: raw.stat.st_ino,
        size: raw.stat.st_size as u64,
        mode: raw.stat.st_mode & 0o7777,
        tmpfile: raw.info.flags & O_TMPFILE_BIT != 0,
        extents,
    })
}

/// Does the file have no name but those that the job's tables keep it under?
fn only_kept(c: &Collector, raw: &Raw) -> bool {
    let id = Id {
        dev: raw.stat.st_dev,
        ino: raw.stat.st_ino,
    };
    kept::links_of(&c.target.job, &id) == raw.stat.st_nlink
}

/// `/proc/<own pid>/...` as `/proc/self/...`: the number may be another one in
/// the next life. Files of procfs have no stable inode numbers.
fn own_proc_path(c: &Collector, raw: &Raw) -> Option<Vec<u8>> {
    let rest = raw.link.strip_prefix(b"/proc/")?;
    let slash = rest.iter().position(|&b| b == b'/')?;
    let own = c.target.pid.to_string();
    if rest[..slash] != *own.as_bytes() || rest.starts_with(b"self") {
        return None;
    }
    Some([b"/proc/self", &rest[slash..]].concat())
}

fn memfd(c: &mut Collector, at: usize) -> Result<FileKind, Refusal> {
    let raw = &c.raws[at];
    let dup = c.duplicate(raw)?;
    let seals = sys::fcntl(dup.raw(), F_GET_SEALS, 0)
        .map_err(|e| raw.refuse("does not tell its seals", e))? as u32;
    let hugetlb = match sys::fs_magic(dup.raw()) {
        Ok(HUGETLBFS_MAGIC) => (raw.stat.st_blksize as u64).trailing_zeros(),
        _ => 0,
    };
    drop(dup);
    let extents = contents(c, at)?;
    let raw = &c.raws[at];
    let name = raw.link.strip_suffix(DELETED).unwrap_or(&raw.link);
    let name = name.strip_prefix(b"/memfd:").unwrap_or(name);
    Ok(FileKind::Memfd {
        object_dev: raw.stat.st_dev,
        object_ino: raw.stat.st_ino,
        name: name.to_vec(),
        seals,
        size: raw.stat.st_size as u64,
        hugetlb,
        mode: raw.stat.st_mode & 0o7777,
        extents,
    })
}

/// Stores the file's contents in the sink, once per inode, without its holes.
fn contents(c: &mut Collector, at: usize) -> Result<Vec<Extent>, Refusal> {
    let raw = &c.raws[at];
    let inode = (raw.stat.st_dev, raw.stat.st_ino);
    if let Some(extents) = c.stored.get(&inode) {
        return Ok(extents.clone());
    }
    let size = raw.stat.st_size as u64;
    if size == 0 {
        return Ok(Vec::new());
    }
    // A description of our own: seeking in the program's would move its position.
    let mut buf = [0; 12];
    let name = sys::decimal(raw.fd, &mut buf);
    let flags = libc::O_RDONLY | libc::O_CLOEXEC | libc::O_NOCTTY;
    let (source, own) = match sys::openat(c.fd_dir.raw(), name, flags, 0) {
        Ok(fd) => (fd, true),
        Err(_) if raw.access() != libc::O_WRONLY => (c.duplicate(raw)?, false),
        Err(e) => return Err(raw.refuse("is unlinked and cannot be read", e)),
    };
    let refuse = |what: &str, e: i32| c.raws[at].refuse(what, e);

    let mut extents: Vec<Extent> = Vec::new();
    let mut chunk = vec![0u8; CHUNK];
    let mut pos = 0;
    while pos < size {
        let mut end = size;
        if own {
            match sys::lseek(source.raw(), pos as i64, libc::SEEK_DATA) {
                Ok(data) => {
                    pos = data as u64 & !(PAGE - 1);
                    end = sys::lseek(source.raw(), data as i64, libc::SEEK_HOLE)
                        .map_or(size, |e| (e as u64).min(size));
                }
                Err(libc::ENXIO) => break,
                Err(_) => {}
            }
        }
        while pos < end {
            let want = ((end - pos) as usize).min(CHUNK);
            let mut got = 0;
            while got < want {
                match sys::pread(source.raw(), &mut chunk[got..want], pos + got as u64) {
                    Ok(0) => break,
                    Ok(n) => got += n,
                    Err(e) => return Err(refuse("is unlinked and cannot be read", e)),
                }
            }
            chunk[got..].fill(0);
            let npages = (want as u64).div_ceil(PAGE);
            append(
                c.sink,
                inode,
                &mut extents,
                pos,
                &chunk[..(npages * PAGE) as usize],
            )
            .map_err(|e| refuse("is unlinked and its contents cannot be stored", e))?;
            pos += npages * PAGE;
        }
    }
    c.stored.insert(inode, extents.clone());
    Ok(extents)
}

/// Stores the pages that are not zero and not known, as few extents as possible.
fn append(
    sink: &mut dyn super::ContentSink,
    inode: (u64, u64),
    extents: &mut Vec<Extent>,
    addr: u64,
    pages: &[u8],
) -> Result<(), i32> {
    let page = PAGE as usize;
    let count = pages.len() / page;
    let first = addr / PAGE;
    let wanted = |p: usize| {
        let bytes = &pages[p * page..(p + 1) * page];
        !is_zero(bytes) && !sink.same(inode, first + p as u64, bytes)
    };
    let wanted: Vec<bool> = (0..count).map(wanted).collect();
    let mut p = 0;
    while p < count {
        let run = wanted[p..].iter().take_while(|&&wanted| wanted).count();
        if run == 0 {
            p += 1;
            continue;
        }
        let end = p + run;
        let offset = sink.append(&pages[p * page..end * page])?;
        let addr = addr + p as u64 * PAGE;
        let npages = (end - p) as u64;
        match extents.last_mut() {
            Some(last)
                if last.addr + last.npages * PAGE == addr
                    && last.offset + last.npages * PAGE == offset =>
            {
                last.npages += npages;
            }
            _ => extents.push(Extent {
                addr,
                npages,
                offset,
            }),
        }
        p = end;
    }
    Ok(())
}
