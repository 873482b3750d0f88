//! Real paths: what a path of the program's leads to, without symbolic links, `.` and `..`.
//! Any thread, inside a `Recording`.
//!
//! Records and rules are about real paths: a link, or a directory on the way to `..`, may lead
//! elsewhere by the time of the undo, and /proc/self/cwd is no file of /proc. The kernel is asked
//! component by component whether there is a link; a descriptor of the directory would tell
//! it with one call, but for a moment it would take a number of the program's.

use super::paths::{self, CWD, Path};
use crate::persist::Stat;

const MAX_LINKS: usize = 40;
const DELETED: &[u8] = b" (deleted)";

/// A real path, as far as one can tell.
pub struct Real {
    /// Absolute, without a slash at the end (but `/` itself).
    pub path: Vec<u8>,
    /// Not simply what the program wrote: to be checked by the inode.
    pub odd: bool,
    /// The last link that was followed, and what it said: those of /proc may lead to what has
    /// no such path.
    pub link: Option<(Vec<u8>, Vec<u8>)>,
}

impl Real {
    /// Does the path lead to this inode?
    pub fn is(&self, stat: &Stat) -> bool {
        if !self.odd {
            return true;
        }
        let there = Path::of(&[&self.path])
            .and_then(|path| paths::stat_at(CWD, &path, libc::AT_SYMLINK_NOFOLLOW).ok());
        there.is_some_and(|there| there.id == stat.id)
    }

    /// The program's own descriptor that the last link stands for, if it is of this inode.
    pub fn descriptor(&self, stat: &Stat) -> Option<i32> {
        let (link, _) = self.link.as_ref()?;
        let at = link.windows(4).rposition(|part| part == b"/fd/")?;
        let digits = link.get(at + 4..).filter(|_| link.starts_with(b"/proc/"))?;
        let fd = std::str::from_utf8(digits).ok()?.parse().ok()?;
        paths::stat_fd(fd)
            .is_ok_and(|s| s.id == stat.id)
            .then_some(fd)
    }
}

/// A walk along a path.
struct Walk {
    /// Where it is: absolute, no slash at the end, empty for `/`.
    at: Vec<u8>,
    /// How much of it is the root that it stays in.
    root: usize,
    real: Real,
}

/// Puts bytes at the end. `None`: no memory.
fn push(text: &mut Vec<u8>, bytes: &[u8]) -> Option<()> {
    text.try_reserve(bytes.len()).ok()?;
    text.extend_from_slice(bytes);
    Some(())
}

impl Walk {
    fn up(&mut self) {
        let slash = self.at.iter().rposition(|&byte| byte == b'/');
        self.at.truncate(slash.unwrap_or(0).max(self.root));
    }

    /// What the symbolic link here says; `None`: it is none. `Err`: no memory.
    fn link(&mut self) -> Result<Option<Vec<u8>>, ()> {
        push(&mut self.at, b"\0").ok_or(())?;
        let link = paths::link_text(CWD, self.at.as_ptr() as u64);
        self.at.pop();
        Ok(link)
    }

    /// Goes along `path`. `None`: too many links, or no memory.
    fn go(mut self, path: &[u8], follow_last: bool) -> Option<Real> {
        let mut todo = Vec::new();
        push(&mut todo, path)?;
        let mut from = 0;
        let mut links = 0;
        loop {
            let rest = todo.get(from..)?;
            let Some(begin) = rest.iter().position(|&byte| byte != b'/') else {
                break;
            };
            let rest = rest.get(begin..)?;
            let len = rest.iter().position(|&byte| byte == b'/');
            let part = rest.get(..len.unwrap_or(rest.len()))?;
            from += begin + part.len();
            match part {
                b"." => {}
                b".." => {
                    self.up();
                    self.real.odd = true;
                }
                _ => {
                    push(&mut self.at, b"/")?;
                    push(&mut self.at, part)?;
                    // With a slash behind it the last one is followed as well.
                    if len.is_none() && !follow_last {
                        break;
                    }
                    let Some(target) = self.link().ok()? else {
                        continue;
                    };
                    links += 1;
                    if links > MAX_LINKS {
                        return None;
                    }
                    let mut way = Vec::new();
                    push(&mut way, &target)?;
                    push(&mut way, todo.get(from..)?)?;
                    (todo, from) = (way, 0);
                    let mut link = Vec::new();
                    push(&mut link, &self.at)?;
                    match target.first() {
                        Some(b'/') => self.at.truncate(self.root),
                        _ => self.up(),
                    }
                    self.real.link = Some((link, target));
                    self.real.odd = true;
                }
            }
        }
        if self.at.is_empty() {
            push(&mut self.at, b"/")?;
        }
        self.real.path = self.at;
        Some(self.real)
    }
}

/// The path of the directory that `dir` stands for, and whether that is to be checked.
fn directory(dir: i32) -> Option<(Vec<u8>, bool)> {
    if dir == CWD
        && let Some(text) = paths::cwd()
    {
        return Some((text, false));
    }
    let (mut text, stat) = match dir {
        // It was removed; what is above it may be there.
        CWD => (
            paths::link_text(CWD, c"/proc/thread-self/cwd".as_ptr() as u64)?,
            None,
        ),
        fd => (paths::path_of_fd(fd)?, paths::stat_fd(fd).ok()),
    };
    if text.first() != Some(&b'/') {
        return None;
    }
    if !text.ends_with(DELETED) {
        return Some((text, false));
    }
    let there = Path::of(&[&text]).and_then(|path| paths::stat_at(CWD, &path, 0).ok());
    if stat.is_none() || there.map(|s| s.id) != stat.map(|s| s.id) {
        text.truncate(text.len() - DELETED.len());
    }
    Some((text, true))
}

/// Where `path`, from `dir`, leads. A symbolic link at its end is followed or not. `None`: it
/// cannot be told.
pub fn real(dir: i32, path: &[u8], follow_last: bool) -> Option<Real> {
    let (at, odd) = match path.first() {
        Some(b'/') => (Vec::new(), false),
        _ => directory(dir)?,
    };
    walk(at, odd, 0, path, follow_last)
}

/// The same with `dir` as the root (openat2's RESOLVE_IN_ROOT).
pub fn real_in_root(dir: i32, path: &[u8], follow_last: bool) -> Option<Real> {
    let (mut at, odd) = directory(dir)?;
    if at == b"/" {
        at.clear();
    }
    let root = at.len();
    walk(at, odd, root, path, follow_last)
}

fn walk(mut at: Vec<u8>, odd: bool, root: usize, path: &[u8], follow_last: bool) -> Option<Real> {
    if at == b"/" {
        at.clear();
    }
    let walk = Walk {
        at,
        root,
        real: Real {
            path: Vec::new(),
            odd,
            link: None,
        },
    };
    walk.go(path, follow_last)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_and_dots_are_resolved() {
        let base = std::env::temp_dir().join(format!("ckpt-resolve-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&base);
        std::fs::create_dir_all(base.join("a/b")).unwrap();
        let base = base.canonicalize().unwrap();
        std::fs::write(base.join("a/b/f"), "x").unwrap();
        symlink("a/b", base.join("rel")).unwrap();
        symlink(base.join("rel"), base.join("abs")).unwrap();
        symlink("/b/f", base.join("a/rooted")).unwrap();
        symlink("loop", base.join("loop")).unwrap();
        let text = |path: &str| base.join(path).as_os_str().as_bytes().to_vec();
        let at = |path: &str, follow| real(CWD, &text(path), follow).unwrap();
        for (path, end, odd) in [
            ("a/b/f", "a/b/f", false),
            ("a//b/./f/", "a/b/f", false),
            ("a/b/../b/f", "a/b/f", true),
            ("rel/f", "a/b/f", true),
            ("abs/../b/f", "a/b/f", true),
            ("rel/not/there", "a/b/not/there", true),
        ] {
            let found = at(path, true);
            assert_eq!(found.path, text(end), "{path}");
            assert_eq!(found.odd, odd, "{path}");
        }
        assert_eq!(at("rel", false).path, text("rel"));
        assert_eq!(at("rel/", false).path, text("a/b"));
        assert!(real(CWD, &text("loop"), true).is_none());
        assert_eq!(real(CWD, b"/../..", true).unwrap().path, b"/");
        let dir = std::fs::File::open(base.join("a")).unwrap();
        let fd = std::os::fd::AsRawFd::as_raw_fd(&dir);
        assert_eq!(real(fd, b"../rel/f", true).unwrap().path, text("a/b/f"));
        let rooted = real_in_root(fd, b"../../rooted", true).unwrap();
        assert_eq!(rooted.path, text("a/b/f"));
        let by_proc = format!("/proc/self/fd/{fd}/b/../b/f");
        let found = real(CWD, by_proc.as_bytes(), true).unwrap();
        assert_eq!(found.path, text("a/b/f"));
        std::fs::rename(base.join("a"), base.join("a (deleted)")).unwrap();
        let found = real(fd, b"b", true).unwrap();
        assert_eq!(found.path, text("a (deleted)/b"));
        std::fs::remove_dir_all(base.join("a (deleted)")).unwrap();
        let found = real(fd, b"../rel", false).unwrap();
        assert_eq!(found.path, text("rel"));
        std::fs::remove_dir_all(&base).unwrap();
    }
}
