//! Reading /proc of this very process with raw system calls.
//!
//! Helper thread (and forked writer) only: allocates from the helper heap.
//! `/proc/self` is the process of the caller: the program in the helper, the
//! writer in a forked writer. What belongs to the memory (maps, pagemap, mem, exe,
//! auxv) is asked for by `/proc/thread-self`: a leader that has exited while other
//! threads run on has no memory any more, and its files are empty.

use ckpt_sys::raw::{SysResult, check};
use ckpt_sys::syscall;

/// A descriptor of the helper's own table, closed on drop.
#[derive(Debug)]
pub struct OwnFd(i32);

impl OwnFd {
    pub fn raw(&self) -> i32 {
        self.0
    }

    /// Takes over a descriptor.
    pub fn from_raw(fd: i32) -> OwnFd {
        OwnFd(fd)
    }

    /// Opens `path` (without a NUL) for reading, close-on-exec.
    pub fn open(path: &[u8]) -> Result<OwnFd, i32> {
        OwnFd::open_with(path, libc::O_RDONLY)
    }

    /// As [`OwnFd::open`] with other flags.
    pub fn open_with(path: &[u8], flags: i32) -> Result<OwnFd, i32> {
        let mut buf = [0u8; 4097];
        if path.len() > 4096 {
            return Err(libc::ENAMETOOLONG);
        }
        buf[..path.len()].copy_from_slice(path);
        // SAFETY: a NUL-terminated path.
        let fd = unsafe {
            check(syscall!(
                libc::SYS_openat,
                libc::AT_FDCWD,
                buf.as_ptr(),
                flags | libc::O_CLOEXEC,
                0
            ))?
        };
        Ok(OwnFd(fd as i32))
    }
}

impl Drop for OwnFd {
    fn drop(&mut self) {
        // SAFETY: the descriptor is ours.
        unsafe { syscall!(libc::SYS_close, self.0) };
    }
}

/// The whole of a /proc file.
pub fn read_file(path: &[u8]) -> Result<Vec<u8>, i32> {
    let fd = OwnFd::open(path)?;
    let mut data: Vec<u8> = Vec::with_capacity(4096);
    loop {
        if data.capacity() - data.len() < 2048 {
            data.reserve(data.capacity());
        }
        let room = data.capacity() - data.len();
        // SAFETY: the spare capacity is writable; the length is set to what was read.
        let n = unsafe {
            let at = data.as_mut_ptr().add(data.len());
            check(syscall!(libc::SYS_read, fd.raw(), at, room))?
        };
        if n == 0 {
            return Ok(data);
        }
        // SAFETY: `n` bytes were written.
        unsafe { data.set_len(data.len() + n) };
    }
}

/// readlink(2) of a /proc link.
pub fn read_link(path: &[u8]) -> Result<Vec<u8>, i32> {
    let mut name = path.to_vec();
    name.push(0);
    let mut buf = vec![0u8; 4096];
    // SAFETY: a NUL-terminated path and a buffer of the length given.
    let n: SysResult = check(unsafe {
        syscall!(
            libc::SYS_readlinkat,
            libc::AT_FDCWD,
            name.as_ptr(),
            buf.as_mut_ptr(),
            buf.len()
        )
    });
    buf.truncate(n?);
    Ok(buf)
}

/// The path of a directory with all symbolic links resolved, as the kernel shows it
/// in /proc/self/maps; `None` when it cannot be opened.
pub fn real_path(path: &[u8]) -> Option<Vec<u8>> {
    let fd = OwnFd::open_with(path, libc::O_PATH | libc::O_DIRECTORY).ok()?;
    // The helper's descriptors are not the leader's: thread-self, not self.
    read_link(format!("/proc/thread-self/fd/{}", fd.raw()).as_bytes()).ok()
}

/// The value of `key:` in a /proc status-like text, without leading blanks.
pub fn field<'a>(text: &'a [u8], key: &str) -> Option<&'a [u8]> {
    text.split(|&b| b == b'\n').find_map(|line| {
        let rest = line.strip_prefix(key.as_bytes())?.strip_prefix(b":")?;
        Some(rest.trim_ascii())
    })
}

/// A decimal number at the start of `text`.
pub fn number(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let len = digits.iter().take_while(|b| b.is_ascii_digit()).count();
    if len == 0 {
        return None;
    }
    let value = digits[..len].iter().fold(0i64, |v, &b| {
        v.wrapping_mul(10).wrapping_add((b - b'0') as i64)
    });
    Some(if negative { -value } else { value })
}

/// A hexadecimal number at the start of `text`.
pub fn hex(text: &[u8]) -> Option<u64> {
    let mut value = 0u64;
    let mut any = false;
    for &b in text {
        let Some(digit) = (b as char).to_digit(16) else {
            break;
        };
        value = value << 4 | digit as u64;
        any = true;
    }
    any.then_some(value)
}

/// The fields of /proc/.../stat behind the command name: index 0 is field 3 (state).
pub fn stat_fields(text: &[u8]) -> Vec<&[u8]> {
    let after = text.iter().rposition(|&b| b == b')').map_or(0, |at| at + 2);
    text.get(after..)
        .unwrap_or(&[])
        .trim_ascii()
        .split(|&b| b == b' ')
        .collect()
}

fn task_path(tid: i32, leaf: &str) -> Vec<u8> {
    format!("/proc/self/task/{tid}/{leaf}").into_bytes()
}

/// The state letter of a task, `None` when it is gone.
pub fn task_state(tid: i32) -> Option<u8> {
    let text = read_file(&task_path(tid, "stat")).ok()?;
    stat_fields(&text).first()?.first().copied()
}

/// A short file of a task as text, for messages.
pub fn task_text(tid: i32, leaf: &str) -> String {
    let text = read_file(&task_path(tid, leaf)).unwrap_or_default();
    String::from_utf8_lossy(text.trim_ascii()).into_owned()
}

/// A file of a task.
pub fn task_file(tid: i32, leaf: &str) -> Result<Vec<u8>, i32> {
    read_file(&task_path(tid, leaf))
}

/// Room for a list of few threads, and of many: memory that is not touched costs nothing.
const TASK_BUFFER: usize = 4 << 10;
const MANY_BUFFER: usize = 64 << 10;

/// The ids under /proc/self/task, by getdents64 into a buffer that is kept.
pub struct TaskList {
    buf: Vec<u8>,
    ids: Vec<i32>,
}

impl TaskList {
    #[allow(clippy::new_without_default)]
    pub fn new() -> TaskList {
        TaskList {
            buf: vec![0; TASK_BUFFER],
            ids: Vec::new(),
        }
    }

    /// For few threads and one look.
    pub fn small() -> TaskList {
        TaskList {
            buf: vec![0; 2048],
            ids: Vec::new(),
        }
    }

    pub fn ids(&self) -> &[i32] {
        &self.ids
    }

    /// Reads the list anew; returns how many there are.
    pub fn read(&mut self) -> Result<usize, i32> {
        // An entry has 24 bytes at least. A list of many is best read by one call.
        if self.ids.len() > TASK_BUFFER / 64 && self.buf.len() < MANY_BUFFER {
            self.buf.resize(MANY_BUFFER, 0);
        }
        self.ids.clear();
        let dir = OwnFd::open_with(b"/proc/self/task", libc::O_RDONLY | libc::O_DIRECTORY)?;
        let (buf, ids) = (&mut self.buf, &mut self.ids);
        for_each_entry(&dir, buf, |name| {
            ids.extend(number(name).map(|id| id as i32))
        })?;
        Ok(self.ids.len())
    }
}

/// How many threads this process has, those that have ended and are still there included
/// (the links of its list). A list ends early where the thread that was told last ends at that
/// moment: all behind it are missing, though they live. `None` where nobody counts.
pub fn thread_count() -> Option<usize> {
    // SAFETY: all-zero is a valid stat buffer; the kernel fills it.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        let path = c"/proc/self/task".as_ptr();
        check(syscall!(
            libc::SYS_newfstatat,
            libc::AT_FDCWD,
            path,
            &mut st,
            0
        ))
        .ok()?;
        // The directory itself has two.
        (st.st_nlink as usize).checked_sub(2).filter(|&n| n > 0)
    }
}

/// Files without a name (device, inode) that the program has open. A look at the table while the
/// program may change it; that of another thread than the caller, which may have one of its own.
pub fn open_without_name() -> Vec<(u64, u64)> {
    let mut found = Vec::new();
    let mut tasks = TaskList::small();
    if tasks.read().is_err() {
        return found;
    }
    // SAFETY: no pointers.
    let own = unsafe { syscall!(libc::SYS_gettid) } as i32;
    let others = tasks.ids().iter().filter(|&&tid| tid != own);
    let (mut names, mut link) = (vec![0u8; TASK_BUFFER], vec![0u8; 4096]);
    for &tid in others.chain(std::iter::once(&own)) {
        let flags = libc::O_RDONLY | libc::O_DIRECTORY;
        let Ok(dir) = OwnFd::open_with(&task_path(tid, "fd"), flags) else {
            continue;
        };
        let mut any = false;
        let told = for_each_entry(&dir, &mut names, |name| {
            any = true;
            found.extend(without_name(&dir, name, &mut link));
        });
        // A thread that has ended has no table any more.
        if told.is_ok() && any {
            break;
        }
    }
    found
}

/// What the link `name` leads to, if that is a file without a name. Others are not asked: a file
/// system may be long in answering.
fn without_name(dir: &OwnFd, name: &[u8], link: &mut [u8]) -> Option<(u64, u64)> {
    let mut path = name.to_vec();
    path.push(0);
    // SAFETY: a NUL-terminated name and a buffer of the length given; all-zero is a valid stat
    // buffer, which the kernel fills.
    unsafe {
        let (at, into) = (path.as_ptr(), link.as_mut_ptr());
        let n = check(syscall!(
            libc::SYS_readlinkat,
            dir.raw(),
            at,
            into,
            link.len()
        ));
        let target = &link[..n.ok()?];
        if !target.starts_with(b"/") || !target.ends_with(b" (deleted)") {
            return None;
        }
        let mut st: libc::stat = std::mem::zeroed();
        let stat = syscall!(libc::SYS_newfstatat, dir.raw(), at, &raw mut st, 0);
        (stat == 0).then_some((st.st_dev, st.st_ino))
    }
}

/// Calls `f` with every name in the directory but `.` and `..`.
pub fn for_each_entry(dir: &OwnFd, buf: &mut [u8], mut f: impl FnMut(&[u8])) -> Result<(), i32> {
    loop {
        // SAFETY: a buffer of the length given.
        let n = check(unsafe {
            syscall!(libc::SYS_getdents64, dir.raw(), buf.as_mut_ptr(), buf.len())
        })?;
        if n == 0 {
            return Ok(());
        }
        let mut at = 0;
        while at + 19 <= n {
            // struct linux_dirent64: ino 8, off 8, reclen 2, type 1, name.
            let reclen = u16::from_le_bytes([buf[at + 16], buf[at + 17]]) as usize;
            let name = &buf[at + 19..at + reclen];
            let name = &name[..name.iter().position(|&b| b == 0).unwrap_or(name.len())];
            if name != b"." && name != b".." {
                f(name);
            }
            at += reclen;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_fields() {
        assert_eq!(number(b"-12x"), Some(-12));
        assert_eq!(hex(b"7f00-"), Some(0x7f00));
        assert_eq!(field(b"A:\t1\nSigPnd:\t0f\n", "SigPnd"), Some(&b"0f"[..]));
        let fields = stat_fields(b"12 (a b) c) S 1 2");
        assert_eq!(fields, [&b"S"[..], b"1", b"2"]);
    }

    #[test]
    fn own_task_is_listed() {
        let mut list = TaskList::new();
        assert!(list.read().unwrap() >= 1);
        let tid = list.ids()[0];
        assert!(task_state(tid).is_some());
    }
}
