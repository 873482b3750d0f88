//! Prepared copies of patched text on disk, so that starting a program costs
//! microseconds instead of milliseconds.
//!
//! A copy is named after everything its contents depend on: the library's build-id,
//! the distance of its slots, and this build of the net. It is published by a link to
//! its final name and never changed afterwards, because processes have it mapped.
//! It is used only when it belongs to the user, nobody else can write it, and its
//! size, identity and checksum are right; on any doubt the library is patched in memory.
//!
//! Deleting the cache is always safe: checkpoint images hold the contents of mapped
//! copies ([`is_cache_path`]) and never refer to them.

use super::object::Object;
use super::prepared::{Header, MAGIC, PAGE, Prepared, SiteEntry, format_id};
use rustix::fd::{AsFd, OwnedFd};
use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use std::fmt::Write as _;

const PREFIX: &str = "callsites-";
const SUFFIX: &str = ".ckpt-text";

/// Is `path` (as in /proc/self/maps) a cached copy? Such mappings must be saved as
/// private contents: the file may be gone when the checkpoint is restored.
pub fn is_cache_path(path: &[u8]) -> bool {
    let path = path.strip_suffix(b" (deleted)").unwrap_or(path);
    let name = path.rsplit(|&byte| byte == b'/').next().unwrap_or(path);
    name.starts_with(PREFIX.as_bytes()) && name.ends_with(SUFFIX.as_bytes())
}

/// The cache's directory: `$CKPT_DIR/cache`, else `${XDG_CACHE_HOME:-~/.cache}/ckpt`.
pub fn default_directory() -> Option<std::path::PathBuf> {
    let absolute = |name: &str| {
        std::env::var_os(name)
            .map(std::path::PathBuf::from)
            .filter(|path| path.is_absolute())
    };
    absolute("CKPT_DIR")
        .map(|dir| dir.join("cache"))
        .or_else(|| absolute("XDG_CACHE_HOME").map(|dir| dir.join("ckpt")))
        .or_else(|| absolute("HOME").map(|dir| dir.join(".cache/ckpt")))
}

/// An open, verified copy; its head and slots are mapped at their place, read-only.
pub struct Copy {
    fd: OwnedFd,
    pub header: Header,
    place: usize,
}

impl Copy {
    pub fn fd(&self) -> i32 {
        use std::os::fd::AsRawFd;
        self.fd.as_raw_fd()
    }

    /// Length of head and slots, which is where the text begins.
    pub fn text_offset(&self) -> usize {
        self.header.head_len as usize + self.header.slots_len as usize
    }

    /// Head and slots, copied.
    pub fn head(&self) -> Vec<u8> {
        // SAFETY: mapped by `verify`.
        unsafe { std::slice::from_raw_parts(self.place as *const u8, self.text_offset()) }.to_vec()
    }
}

/// The cache directory, open.
pub struct Cache {
    directory: OwnedFd,
}

impl Cache {
    /// Opens the directory; with `create` makes it where it is missing.
    pub fn open(path: &std::path::Path, create: bool) -> Option<Cache> {
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let directory = match rustix::fs::open(path, flags, Mode::empty()) {
            Err(Errno::NOENT) if create => {
                make_directories(path);
                rustix::fs::open(path, flags, Mode::empty()).ok()?
            }
            opened => opened.ok()?,
        };
        let stat = rustix::fs::fstat(&directory).ok()?;
        let private =
            stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o022 == 0;
        private.then_some(Cache { directory })
    }

    /// The copy for `object` with its head at `place`, if there is a good one; its head and
    /// slots are mapped there, still without the right to execute.
    ///
    /// # Safety
    /// The [`super::patch::ROOM`] bytes at `place` are reserved for this object.
    pub unsafe fn find(&self, object: &Object, place: usize) -> Option<Copy> {
        let distance = place.wrapping_sub(object.base) as i64;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let name = file_name(object, distance)?;
        let fd = rustix::fs::openat(&self.directory, &*name, flags, Mode::empty()).ok()?;
        // SAFETY: the caller's promise.
        unsafe { verify(fd, object, place) }
    }

    /// Publishes a copy and opens it again, verified to the last byte.
    ///
    /// # Safety
    /// As for [`Cache::find`], with the place that `prepared` was made for.
    pub unsafe fn publish(&self, object: &Object, prepared: &mut Prepared) -> Option<Copy> {
        let name = file_name(object, prepared.header.distance)?;
        let text = prepared.patched_text(object);
        prepared.header.text_sum = xxhash_rust::xxh3::xxh3_64(&text);
        prepared.write_head();
        // There may be a damaged one. Processes that have a copy mapped keep it.
        let _ = rustix::fs::unlinkat(&self.directory, &*name, AtFlags::empty());
        self.write_file(&name, &[&prepared.bytes, &text]).ok()?;
        let place = object
            .base
            .wrapping_add_signed(prepared.header.distance as isize);
        // SAFETY: the caller's promise.
        let copy = unsafe { self.find(object, place) }?;
        let stored = read_exactly(&copy.fd, copy.text_offset(), text.len())?;
        (stored == text).then_some(copy)
    }

    /// Writes a file under a temporary name, makes it durable and links it to its own.
    /// An existing file is never replaced: it has the same contents.
    fn write_file(&self, name: &str, parts: &[&[u8]]) -> Result<(), Errno> {
        let pid = rustix::process::getpid().as_raw_nonzero();
        let temporary = format!("tmp-{pid}-{name}");
        let _ = rustix::fs::unlinkat(&self.directory, &*temporary, AtFlags::empty());
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let file = rustix::fs::openat(&self.directory, &*temporary, flags, mode)?;
        let written = (|| {
            for part in parts {
                write_all(&file, part)?;
            }
            // A copy that lost its contents in a power failure would crash every program.
            rustix::fs::fdatasync(&file)?;
            match rustix::fs::linkat(
                &self.directory,
                &*temporary,
                &self.directory,
                name,
                AtFlags::empty(),
            ) {
                Err(Errno::EXIST) => Ok(()),
                linked => linked,
            }
        })();
        let _ = rustix::fs::unlinkat(&self.directory, &*temporary, AtFlags::empty());
        written
    }
}

/// The name of a copy; `None` for a library without a build-id.
fn file_name(object: &Object, distance: i64) -> Option<String> {
    if object.build_id.is_empty() || object.build_id.len() > 32 {
        return None;
    }
    let mut name = String::from(PREFIX);
    for byte in &object.build_id {
        let _ = write!(name, "{byte:02x}");
    }
    let spans = distance / ckpt_sys::callsite::HOLE_SPAN as i64;
    let _ = write!(name, "-{spans}-{:016x}{SUFFIX}", format_id());
    Some(name)
}

/// Maps head and slots of an open copy and checks everything about it but the text's bytes:
/// those were read back and made durable before the copy got its name.
///
/// # Safety
/// As for [`Cache::find`].
unsafe fn verify(fd: OwnedFd, object: &Object, place: usize) -> Option<Copy> {
    let stat = rustix::fs::fstat(&fd).ok()?;
    let regular = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
    let mine = stat.st_uid == rustix::process::geteuid().as_raw() && stat.st_mode & 0o077 == 0;
    let (text, text_len) = object.text_pages();
    let head = (stat.st_size as usize).checked_sub(text_len)?;
    let sized = head >= PAGE && head.is_multiple_of(PAGE) && head + PAGE <= super::patch::ROOM;
    if !regular || !mine || !sized {
        return None;
    }
    let mut copy = Copy {
        fd,
        // SAFETY: all-zero is a valid Header.
        header: unsafe { std::mem::zeroed() },
        place,
    };
    // SAFETY: the room at `place` is ours; the file has `head` bytes at least.
    let bytes = unsafe {
        super::patch::map_head(copy.fd(), place, head).ok()?;
        copy.header = (place as *const Header).read();
        std::slice::from_raw_parts(place as *const u8, head)
    };
    let header = &copy.header;
    let right = header.magic == MAGIC
        && header.format == format_id()
        && header.build_id.starts_with(&object.build_id)
        && header.distance == place.wrapping_sub(object.base) as i64
        && header.text_start == (text - object.base) as u64
        && header.text_len == text_len as u64
        && header.head_len as usize + header.slots_len as usize == head
        && size_of::<Header>() + header.sites as usize * size_of::<SiteEntry>()
            <= header.head_len as usize;
    (right && super::prepared::head_sum(bytes) == header.head_sum).then_some(copy)
}

fn read_exactly(fd: impl AsFd, from: usize, len: usize) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len];
    let mut done = 0;
    while done < len {
        match rustix::io::pread(&fd, &mut bytes[done..], (from + done) as u64) {
            Ok(0) => return None,
            Ok(count) => done += count,
            Err(Errno::INTR) => {}
            Err(_) => return None,
        }
    }
    Some(bytes)
}

fn write_all(fd: impl AsFd, mut bytes: &[u8]) -> Result<(), Errno> {
    while !bytes.is_empty() {
        match rustix::io::write(&fd, bytes) {
            Ok(0) => return Err(Errno::IO),
            Ok(count) => bytes = &bytes[count..],
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Makes the missing directories of `path`, private to the user.
fn make_directories(path: &std::path::Path) {
    let missing: Vec<_> = path
        .ancestors()
        .take_while(|dir| !dir.as_os_str().is_empty() && rustix::fs::stat(*dir).is_err())
        .collect();
    for dir in missing.into_iter().rev() {
        let _ = rustix::fs::mkdir(dir, Mode::RWXU);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn knows_its_own_files() {
        assert!(is_cache_path(
            b"/home/u/.cache/ckpt/callsites-ab12-1-0123.ckpt-text"
        ));
        assert!(is_cache_path(b"/x/callsites-ab.ckpt-text (deleted)"));
        assert!(!is_cache_path(b"/lib/x86_64-linux-gnu/libc.so.6"));
        assert!(!is_cache_path(b""));
    }
}
