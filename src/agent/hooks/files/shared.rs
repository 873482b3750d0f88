//! mprotect that makes a shared file mapping writable, mremap and remap_file_pages that lead to
//! more of the file: what it holds is recorded before.
//! (Mappings that are writable from the start: `mapped`, and `checkpoint::mapped` for those
//! that exist when a table begins.) Any thread of the program.

use super::guard::Recording;
use super::{execute, paths};
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::hooks::maps::{Mapping, Maps};
use crate::agent::procfs::{OwnFd, read_file};
use crate::persist::recorder::{Session, with_room};
use crate::persist::{FileRef, Stat};
use std::sync::atomic::{AtomicBool, Ordering::*};

/// A shared file mapping that is read-only now was made: mprotect may make it writable.
static MAY_BECOME_WRITABLE: AtomicBool = AtomicBool::new(false);

const WRITE: u32 = libc::PROT_WRITE as u32;

/// There is a shared mapping of a file that cannot be written through yet.
pub fn note_read_only() {
    MAY_BECOME_WRITABLE.store(true, Relaxed);
}

/// Saves the files behind the shared mappings in a range.
fn save_range(session: &mut Session, start: u64, end: u64) {
    let maps = match read_file(b"/proc/self/maps") {
        Ok(maps) => maps,
        Err(errno) => {
            let reason = format!("the memory map cannot be read: errno {errno}");
            return session.incomplete(reason.as_bytes());
        }
    };
    with_room(|| save_lines(session, &maps, start, end));
}

fn save_lines(session: &mut Session, maps: &[u8], start: u64, end: u64) {
    for line in maps.split(|&b| b == b'\n') {
        let Some((mapping, path)) = parse(line) else {
            continue;
        };
        if !mapping.shared || mapping.ino == 0 || mapping.end <= start || mapping.start >= end {
            continue;
        }
        save_file(session, &mapping, path);
    }
}

/// A line of /proc/self/maps and its path (octal escapes stay: such a path is not found).
fn parse(line: &[u8]) -> Option<(Mapping, &[u8])> {
    let mapping = crate::agent::hooks::maps::parse(line)?;
    let at = line.iter().position(|&b| b == b'/')?;
    Some((mapping, line.get(at..)?))
}

fn save_file(session: &mut Session, mapping: &Mapping, path: &[u8]) {
    let special = [
        &b"/memfd:"[..],
        b"/dev/zero",
        b"/SYSV",
        b"/[",
        b"/anon_hugepage",
    ];
    if special.iter().any(|s| path.starts_with(s)) {
        return;
    }
    let is_it = |(_, stat): &(OwnFd, Stat)| stat.id.ino == mapping.ino;
    let named = open(path).ok().filter(is_it);
    // (There are files called so.)
    let bare = path.strip_suffix(b" (deleted)").filter(|_| named.is_none());
    let name = bare.unwrap_or(path);
    // The recorder knows one without a name by its link, and the kernel names what is behind an
    // escape.
    let known_as = match named.is_some() || bare.is_some() {
        true => path,
        false => b"",
    };
    let kept = match named {
        Some(_) => Ok(None),
        None => session.kept_link(mapping.ino),
    };
    let is_kept = !matches!(kept, Ok(None));
    // Links are found by the number alone: another file system may have it as well. (On btrfs maps
    // name another device than stat, and the link is of no use.)
    let device = libc::makedev((mapping.dev >> 32) as u32, mapping.dev as u32);
    let is_linked = |found: &(OwnFd, Stat)| is_it(found) && found.1.id.dev == device;
    let found = named
        .or_else(|| open(kept.ok()??.bytes()).ok().filter(is_linked))
        .or_else(|| open_mapped(mapping).filter(is_it));
    let Some((fd, stat)) = found else {
        // Without a name or a link in the store nothing of it can come back.
        if (bare.is_none() || is_kept) && !session.is_excluded(name) {
            let mut reason = name.to_vec();
            reason.extend_from_slice(b": mapped for writing and cannot be read by its path");
            session.incomplete(&reason);
        }
        return;
    };
    let left_alone = !session.is_known(&stat.id) && session.is_excluded(name);
    if left_alone || !stat.is_regular() || stat.nlink == 0 {
        return;
    }
    let file = FileRef {
        stat: &stat,
        path: known_as,
        fd: Some(fd.raw()),
        any_fd: Some(fd.raw()),
    };
    session.before_write(&file, 0, stat.size);
    session.mapped(&stat.id);
}

/// A mapped file, to be read. Also for the helper thread.
pub fn open(path: &[u8]) -> Result<(OwnFd, Stat), i32> {
    let flags = libc::O_RDONLY | libc::O_NONBLOCK;
    let fd = OwnFd::open_with(path, flags | libc::O_NOATIME)
        .or_else(|_| OwnFd::open_with(path, flags))?;
    let stat = paths::stat_fd(fd.raw())?;
    Ok((fd, stat))
}

/// The file behind a mapping whatever its names, where the program may ask for that
/// (CAP_CHECKPOINT_RESTORE).
fn open_mapped(mapping: &Mapping) -> Option<(OwnFd, Stat)> {
    let Mapping { start, end, .. } = mapping;
    open(format!("/proc/self/map_files/{start:x}-{end:x}").as_bytes()).ok()
}

/// The other memory hooks still get what is forwarded.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let [addr, len, prot, ..] = f.args;
    let writable = prot as u32 & WRITE != 0 && MAY_BECOME_WRITABLE.load(Relaxed);
    match f.rax {
        libc::SYS_mremap => mremap(f),
        libc::SYS_remap_file_pages => remap_pages(f, addr, len),
        libc::SYS_mprotect | libc::SYS_pkey_mprotect if writable => mprotect(f, addr, len),
        _ => None,
    }
}

/// mremap that makes a shared file mapping longer (or makes a second one, of length 0): what it
/// gets of the file is recorded before, all of the file.
fn mremap(f: &mut CallFrame) -> Option<Verdict> {
    let [addr, len, new_len, ..] = f.args;
    if len != 0 && new_len <= len {
        return None;
    }
    let found = Maps::open().and_then(|mut maps| maps.at(addr));
    if let Ok(found) = found
        && !found.is_some_and(|m| m.start <= addr && m.shared && m.ino != 0)
    {
        return None;
    }
    let mut recording = Recording::begin()?;
    save_range(
        &mut recording.session,
        addr,
        addr.saturating_add(len.max(1)),
    );
    if crate::agent::hooks::memory::mremap(f) == Verdict::Forward {
        f.rax = execute(f);
    }
    drop(recording);
    Some(Verdict::Done)
}

/// Other pages of the file that is mapped in a range.
fn remap_pages(f: &mut CallFrame, addr: u64, len: u64) -> Option<Verdict> {
    let mut recording = Recording::begin()?;
    save_range(&mut recording.session, addr, addr.saturating_add(len));
    f.rax = execute(f);
    drop(recording);
    Some(Verdict::Done)
}

/// Saves the files in the range and makes it writable, without a checkpoint in between.
fn mprotect(f: &mut CallFrame, addr: u64, len: u64) -> Option<Verdict> {
    let end = addr.saturating_add(len);
    let found = Maps::open().and_then(|mut maps| {
        let mut at = addr;
        while at < end {
            match maps.at(at)? {
                Some(m) if m.start < end => {
                    if m.shared && m.ino != 0 && m.prot & WRITE == 0 {
                        return Ok(true);
                    }
                    at = m.end;
                }
                _ => break,
            }
        }
        Ok(false)
    });
    if found == Ok(false) {
        return None;
    }
    let mut recording = Recording::begin()?;
    save_range(&mut recording.session, addr, end);
    f.rax = execute(f);
    drop(recording);
    Some(Verdict::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_the_map() {
        let line = b"7f00-8f00 rw-s 00001000 fe:0a 1234567                  /a b";
        let (mapping, path) = parse(line).unwrap();
        assert_eq!((mapping.ino, path), (1234567, &b"/a b"[..]));
        assert!(parse(b"7f00-8f00 rw-p 00000000 00:00 0 ").is_none());
    }
}
