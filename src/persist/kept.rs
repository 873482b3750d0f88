//! Keeping inodes whose name is about to go: a hard link in the store, else a copy.
//! Under the recorder's lock, in the program's threads inside hooks.

use super::format::{KEPT_COPY, KEPT_LINK, KEPT_NODE, KEPT_SYMLINK};
use super::shadow::open_same;
use super::sys::{self, CPath, Sys, point};
use super::writer::Writer;
use super::{Id, Stat, table};
use std::path::Path;

/// Longer lists of names and longer values of extended attributes are read into memory that is
/// allocated.
const XATTR_LIST: usize = 1024;
const XATTR_VALUE: usize = 4096;

/// How an inode is kept, with a name in the `kept-` directory or a link's target.
pub struct Keep<'a> {
    pub kind: u8,
    pub text: &'a [u8],
}

/// The name of the link that keeps this inode.
pub fn link_name(path: &mut CPath, id: &Id) -> Sys<()> {
    path.add(b"/")?;
    sys::add_id(path, id)
}

/// The link to an inode of this number in a `kept-` directory.
pub fn link_to(dir: &CPath, ino: u64) -> Sys<Option<CPath>> {
    let mut end = CPath::new(&[b"-"])?;
    end.number(ino, 16);
    // Copies have a serial number behind it.
    let names = match sys::list(dir) {
        // Nothing needs it any more: it was removed since it was listed.
        Err(libc::ENOENT) => return Ok(None),
        names => names?,
    };
    let name = names.iter().find(|name| name.ends_with(end.bytes()));
    name.map(|name| CPath::join(dir.bytes(), name)).transpose()
}

/// How many of the inode's links are ones that the job's tables keep. Helper thread.
pub fn links_of(job_dir: &Path, id: &Id) -> u64 {
    let tables = table::list(job_dir).unwrap_or_default();
    let linked = |seq| {
        let mut place = table::c_path(&table::kept_dir(job_dir, seq))?;
        link_name(&mut place, id)?;
        sys::lstat(&place)
    };
    let found = tables.iter().filter_map(|t| linked(t.seq).ok());
    found.filter(|stat| stat.id == *id).count() as u64
}

/// The `kept-` directory, made when it is needed first.
fn directory(writer: &mut Writer) -> Sys<CPath> {
    let place = writer.path(b"kept-", writer.number)?;
    if !writer.kept_made {
        match sys::mkdir(&place, 0o700) {
            Ok(()) | Err(libc::EEXIST) => writer.kept_made = true,
            Err(e) => return Err(e),
        }
    }
    Ok(place)
}

/// Keeps the inode behind a descriptor whose name is removed, but which has another
/// name, unknown, or a kept link of an older table: an undo finds it by this link.
pub fn keep_unnamed(writer: &mut Writer, fd: i32, id: &Id) -> Sys<()> {
    let mut place = directory(writer)?;
    link_name(&mut place, id)?;
    point();
    match sys::link_fd(fd, &place) {
        Err(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Keeps an inode that an older table keeps at `path`.
pub fn keep_again(writer: &mut Writer, path: &[u8], id: &Id) -> Sys<()> {
    let mut place = directory(writer)?;
    link_name(&mut place, id)?;
    point();
    match sys::link(&CPath::new(&[path])?, &place) {
        Err(libc::EEXIST) => Ok(()),
        other => other,
    }
}

/// Keeps the inode at `path` in the store. `text` is room for a name or a target.
pub fn keep<'a>(
    writer: &mut Writer,
    path: &CPath,
    stat: &Stat,
    text: &'a mut [u8; sys::PATH_LEN],
) -> Sys<Keep<'a>> {
    let mut place = directory(writer)?;
    let dir_len = place.bytes().len() + 1;
    link_name(&mut place, &stat.id)?;
    point();
    let linked = match sys::link(path, &place) {
        // The same inode was kept before, under another name of it.
        Err(libc::EEXIST) => Ok(()),
        other => other,
    };
    if linked.is_ok() {
        match sys::lstat(&place) {
            Ok(there) if there.id == stat.id => {
                return Ok(named(KEPT_LINK, place.bytes(), dir_len, text));
            }
            Ok(_) | Err(_) => {
                let _ = sys::unlink(&place);
                return Err(libc::ESTALE);
            }
        }
    }
    // What is made again would belong to the program's user.
    if !may_own(stat) {
        return Err(libc::EPERM);
    }
    match stat.mode & libc::S_IFMT {
        libc::S_IFREG => {
            writer.kept_serial += 1;
            place.add(b"-")?;
            place.number(writer.kept_serial, 10);
            copy(path, &place, stat, writer.is_power())?;
            Ok(named(KEPT_COPY, place.bytes(), dir_len, text))
        }
        libc::S_IFLNK => {
            let len = sys::readlink(path, text)?;
            Ok(Keep {
                kind: KEPT_SYMLINK,
                text: text.get(..len).unwrap_or_default(),
            })
        }
        _ => Ok(Keep {
            kind: KEPT_NODE,
            text: b"",
        }),
    }
}

/// Could this thread give an inode that it makes this one's owner and group?
pub fn may_own(stat: &Stat) -> bool {
    let own = sys::effective_uid() == stat.uid && sys::is_in_group(stat.gid);
    own || sys::has_capability(sys::CAP_CHOWN)
}

/// Could what is moved or linked into this directory be taken out of it again? Not what is
/// another user's, out of a directory as `/tmp`.
pub fn may_leave(stat: &Stat, dir_path: &[u8]) -> bool {
    let own = sys::effective_uid();
    let free = |dir: Stat| dir.mode & libc::S_ISVTX == 0 || dir.uid == own;
    stat.uid == own
        || sys::has_capability(sys::CAP_FOWNER)
        || CPath::new(&[dir_path])
            .and_then(|dir| sys::stat(&dir))
            .is_ok_and(free)
}

fn named<'a>(kind: u8, path: &[u8], from: usize, text: &'a mut [u8]) -> Keep<'a> {
    let name = path.get(from..).unwrap_or_default();
    let text = text.get_mut(..name.len()).unwrap_or_default();
    text.copy_from_slice(name);
    Keep { kind, text }
}

fn copy(path: &CPath, to: &CPath, stat: &Stat, sync: bool) -> Sys<()> {
    let from = open_same(path.bytes(), &stat.id)?;
    // A name of a killed process's attempt cannot be in the way: the number is new.
    let out = sys::open_high(to, libc::O_RDWR | libc::O_CREAT | libc::O_EXCL, 0o600)?;
    let done = sys::ftruncate(out.0, stat.size)
        .and_then(|()| sys::copy_sparse(from.0, 0, stat.size, out.0, 0))
        .and_then(|()| if sync { sys::fdatasync(out.0) } else { Ok(()) });
    if done.is_err() {
        let _ = sys::unlink(to);
    }
    done
}

/// Calls `f` with each extended attribute of the inode at `path`. An attribute that
/// cannot be read, or set again, without rights that the program lacks is left out.
pub fn each_xattr(path: &CPath, mut f: impl FnMut(&[u8], &[u8])) -> Sys<()> {
    let (mut names, mut long_names) = ([0u8; XATTR_LIST], Vec::new());
    let names = match grow(&mut names, &mut long_names, |buf| {
        sys::list_xattrs(path, buf)
    }) {
        Ok(names) => names,
        Err(libc::EOPNOTSUPP) => return Ok(()),
        Err(e) => return Err(e),
    };
    let mut long_value = Vec::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let name_z = CPath::new(&[name])?;
        let mut value = [0u8; XATTR_VALUE];
        match grow(&mut value, &mut long_value, |buf| {
            sys::get_xattr(path, &name_z, buf)
        }) {
            Ok(value) => f(name, value),
            Err(libc::ERANGE) => return Err(libc::ERANGE),
            Err(libc::ENOMEM) => return Err(libc::ENOMEM),
            Err(_) => {}
        }
    }
    Ok(())
}

/// What `read` puts into the buffer, or into one of 64 KiB when it does not fit.
fn grow<'a>(
    short: &'a mut [u8],
    long: &'a mut Vec<u8>,
    read: impl Fn(&mut [u8]) -> Sys<usize>,
) -> Sys<&'a [u8]> {
    match read(short) {
        Ok(len) => return Ok(short.get(..len).unwrap_or_default()),
        Err(libc::ERANGE) => {}
        Err(e) => return Err(e),
    }
    if long.is_empty() {
        long.try_reserve_exact(1 << 16).map_err(|_| libc::ENOMEM)?;
        long.resize(1 << 16, 0);
    }
    let len = read(long)?;
    Ok(long.get(..len).unwrap_or_default())
}
