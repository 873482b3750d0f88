//! Plays a program: random modifications of a small tree, each told to the recorder
//! as a hook would and then done by the real system call.

use ckpt::agent::state::InHook;
use ckpt::persist::recorder::{self, Session};
use ckpt::persist::sys::{self, CPath};
use ckpt::persist::{FileRef, Id, MODE, NameRef, OWNER, Stat, TIMES};
use std::ffi::CString;
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

/// xorshift: the same trace for the same seed.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 16) % n
    }

    pub fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

pub struct Player {
    pub root: PathBuf,
    pub rng: Rng,
    /// Open descriptors, some of them of removed files.
    held: Vec<std::fs::File>,
    /// As they are before a step.
    dirs: Vec<PathBuf>,
    root_user: bool,
    /// Copies of files with several names come back as several files (a limitation).
    pub links: bool,
    /// Nobody knows those of a file that is gone.
    pub xattrs: bool,
}

fn cstring(path: &Path) -> CString {
    CString::new(path.as_os_str().as_bytes()).unwrap()
}

fn lstat(path: &Path) -> Option<Stat> {
    sys::lstat(&CPath::new(&[path.as_os_str().as_bytes()]).unwrap()).ok()
}

/// A path split as the recorder wants it.
struct Place {
    dir: Id,
    dir_path: Vec<u8>,
    name: Vec<u8>,
}

impl Place {
    fn of(path: &Path) -> Place {
        let parent = path.parent().unwrap();
        Place {
            dir: lstat(parent).unwrap().id,
            dir_path: parent.as_os_str().as_bytes().to_vec(),
            name: path.file_name().unwrap().as_bytes().to_vec(),
        }
    }

    fn name(&self) -> NameRef<'_> {
        NameRef {
            dir: self.dir,
            dir_path: &self.dir_path,
            name: &self.name,
        }
    }
}

/// Tells, then does; both in one hook.
fn recorded<R>(tell: impl FnOnce(&mut Session), act: impl FnOnce() -> R) -> R {
    let _hook = InHook::enter();
    if let Some(mut session) = recorder::enter() {
        tell(&mut session);
    }
    act()
}

/// A removal or renaming, which may fail.
fn name_operation(tell: impl FnOnce(&mut Session), act: impl FnOnce() -> bool) {
    let _hook = InHook::enter();
    let mut session = recorder::enter();
    if let Some(session) = &mut session {
        tell(session);
    }
    if !act()
        && let Some(session) = &mut session
    {
        session.failed();
    }
}

/// As the hooks do: what needs no record is not told.
fn before_create(session: &mut Session, place: &Place) {
    if !session.is_led_back(&place.dir, &place.name) {
        session.before_create(&place.name());
    }
}

fn before_remove(session: &mut Session, place: &Place, stat: &Stat) {
    if !session.needs_nothing(stat) {
        session.before_remove(&place.name(), stat);
    }
}

fn tell(f: impl FnOnce(&mut Session)) {
    recorded(f, || ());
}

fn exchanged((from, stat): (&Path, &Stat), (to, other): (&Path, &Stat)) {
    let (a, b) = (Place::of(from), Place::of(to));
    name_operation(
        |s| s.before_rename(&a.name(), stat, &b.name(), Some(other), true),
        || sys::rename(&cpath(from), &cpath(to), libc::RENAME_EXCHANGE).is_ok(),
    );
}

impl Player {
    pub fn new(root: &Path, seed: u64) -> Player {
        Player {
            root: root.to_owned(),
            rng: Rng(seed | 1),
            held: Vec::new(),
            dirs: Vec::new(),
            links: true,
            xattrs: true,
            // SAFETY: no arguments.
            root_user: unsafe { libc::geteuid() } == 0,
        }
    }

    /// What a restart does to a program: its descriptors are others.
    pub fn forget_descriptors(&mut self) {
        self.held.clear();
    }

    /// All directories, the root first.
    fn all_dirs(&self) -> Vec<PathBuf> {
        let mut all = vec![self.root.clone()];
        let mut k = 0;
        while let Some(dir) = all.get(k).cloned() {
            for entry in std::fs::read_dir(dir).unwrap() {
                let entry = entry.unwrap();
                if entry.file_type().unwrap().is_dir() {
                    all.push(entry.path());
                }
            }
            k += 1;
        }
        all.sort();
        all
    }

    fn any_dir(&mut self) -> PathBuf {
        let k = self.rng.below(self.dirs.len() as u64) as usize;
        self.dirs[k].clone()
    }

    /// Some path; something may be there or not.
    fn any_path(&mut self) -> PathBuf {
        let dir = self.any_dir();
        let name = (b'a' + self.rng.below(7) as u8) as char;
        dir.join(name.to_string())
    }

    fn existing(&mut self, want: impl Fn(&Stat) -> bool) -> Option<(PathBuf, Stat)> {
        for _ in 0..8 {
            let path = self.any_path();
            if let Some(stat) = lstat(&path).filter(&want) {
                return Some((path, stat));
            }
        }
        None
    }

    fn bytes(&mut self, len: usize) -> Vec<u8> {
        let zero = self.rng.one_in(6);
        let mut byte = self.rng.next();
        let next = |k: usize| {
            if k.is_multiple_of(64) {
                byte = byte.wrapping_mul(6364136223846793005).wrapping_add(1);
            }
            if zero { 0 } else { (byte >> 32) as u8 }
        };
        (0..len).map(next).collect()
    }

    /// One random operation.
    pub fn step(&mut self) {
        self.dirs = self.all_dirs();
        match self.rng.below(31) {
            0..=3 => self.create(),
            4..=6 => self.append(),
            7..=10 => self.overwrite(),
            11 | 12 => self.truncate(),
            13..=15 => self.remove(),
            16..=19 => self.rename(),
            20 => self.exchange(),
            21 => self.mkdir(),
            22 => self.rmdir(),
            23 if self.links => self.link(),
            24 => self.node(),
            25 => self.attributes(),
            26 if self.xattrs => self.xattr(),
            27 => self.hole(),
            28 => self.hold(),
            29 => self.use_held(),
            _ => self.utimes(),
        }
    }

    fn create(&mut self) {
        let path = self.any_path();
        if lstat(&path).is_some() {
            return;
        }
        let place = Place::of(&path);
        let file = recorded(
            |s| before_create(s, &place),
            || {
                let mut options = std::fs::OpenOptions::new();
                options.read(true).write(true).create_new(true).open(&path)
            },
        )
        .unwrap();
        let id = sys::fstat(file.as_raw_fd()).unwrap().id;
        tell(|s| s.created(id, false));
        let len = self.rng.below(9000) as usize;
        let data = self.bytes(len);
        self.write(&file, &path, 0, &data);
        if self.rng.one_in(4) {
            self.held.push(file);
        }
    }

    /// pwrite as a hook does it: record, write, note.
    fn write(&mut self, file: &std::fs::File, path: &Path, at: u64, data: &[u8]) {
        let fd = file.as_raw_fd();
        let stat = sys::fstat(fd).unwrap();
        // Some callers know the path, some have a readable descriptor, some neither.
        let known = self.rng.one_in(2);
        let readable = self.rng.one_in(2);
        let at_end = at + data.len() as u64;
        recorded(
            |s| {
                let file = FileRef {
                    stat: &stat,
                    path: if known {
                        path.as_os_str().as_bytes()
                    } else {
                        b""
                    },
                    fd: readable.then_some(fd),
                    any_fd: Some(fd),
                };
                s.before_write(&file, at, at_end);
            },
            || sys::pwrite_all(fd, data, at).unwrap(),
        );
        let now = sys::fstat(fd).unwrap();
        tell(|s| s.touched(&now));
    }

    fn open(&mut self) -> Option<(std::fs::File, PathBuf, Stat)> {
        let (path, stat) = self.existing(Stat::is_regular)?;
        let mut options = std::fs::OpenOptions::new();
        let file = options.read(true).write(true).open(&path).ok()?;
        Some((file, path, stat))
    }

    fn append(&mut self) {
        let Some((file, path, stat)) = self.open() else {
            return;
        };
        let gap = if self.rng.one_in(8) {
            self.rng.below(100_000)
        } else {
            0
        };
        let len = 1 + self.rng.below(6000) as usize;
        let data = self.bytes(len);
        if stat.size < 1 << 20 {
            self.write(&file, &path, stat.size + gap, &data);
        }
    }

    fn overwrite(&mut self) {
        let Some((file, path, stat)) = self.open() else {
            return;
        };
        let at = self.rng.below(stat.size + 1);
        let most = if self.rng.one_in(10) { 600_000 } else { 9_000 };
        let len = 1 + self.rng.below(most) as usize;
        let data = self.bytes(len);
        self.write(&file, &path, at, &data);
    }

    fn file_ref<'a>(&self, stat: &'a Stat, path: &'a Path) -> FileRef<'a> {
        FileRef {
            stat,
            path: path.as_os_str().as_bytes(),
            fd: None,
            any_fd: None,
        }
    }

    fn truncate(&mut self) {
        let Some((file, path, stat)) = self.open() else {
            return;
        };
        let size = match self.rng.below(3) {
            0 => 0,
            1 => self.rng.below(stat.size + 1),
            _ => stat.size + self.rng.below(20_000),
        };
        let reference = self.file_ref(&stat, &path);
        recorded(
            |s| s.before_truncate(&reference, size),
            || file.set_len(size).unwrap(),
        );
        let now = sys::fstat(file.as_raw_fd()).unwrap();
        tell(|s| s.touched(&now));
    }

    fn hole(&mut self) {
        let Some((file, path, stat)) = self.open() else {
            return;
        };
        let fd = file.as_raw_fd();
        let block = 4096;
        if stat.size > 3 * block && self.rng.one_in(3) {
            let at = self.rng.below(stat.size / block - 1) * block;
            let insert = self.rng.one_in(2);
            let mode = if insert {
                libc::FALLOC_FL_INSERT_RANGE
            } else {
                libc::FALLOC_FL_COLLAPSE_RANGE
            };
            let reference = self.file_ref(&stat, &path);
            recorded(
                |s| s.before_range_shift(&reference, at),
                || {
                    // tmpfs cannot.
                    let _ = sys::fallocate(fd, mode, at, block);
                },
            );
        } else {
            let at = self.rng.below(stat.size + 1);
            let len = 1 + self.rng.below(30_000);
            let reference = self.file_ref(&stat, &path);
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            recorded(
                |s| {
                    s.before_write(&reference, at, (at + len).min(stat.size));
                },
                || sys::fallocate(fd, mode, at, len).unwrap(),
            );
        }
        let now = sys::fstat(fd).unwrap();
        tell(|s| s.touched(&now));
    }

    fn remove(&mut self) {
        if let Some((path, _)) = self.existing(|s| !s.is_dir()) {
            self.remove_at(&path);
        }
    }

    pub fn remove_at(&mut self, path: &Path) {
        let (place, stat) = (Place::of(path), lstat(path).unwrap());
        recorded(
            |s| before_remove(s, &place, &stat),
            || std::fs::remove_file(path).unwrap(),
        );
    }

    fn rename(&mut self) {
        let Some((from, _)) = self.existing(|_| true) else {
            return;
        };
        let to = self.any_path();
        self.rename_at(&from, &to);
    }

    pub fn rename_at(&mut self, from: &Path, to: &Path) {
        let (stat, to_stat) = (lstat(from).unwrap(), lstat(to));
        let (a, b) = (Place::of(from), Place::of(to));
        // It fails for a directory into itself, over a file, over a full one.
        name_operation(
            |s| s.before_rename(&a.name(), &stat, &b.name(), to_stat.as_ref(), false),
            || sys::rename(&cpath(from), &cpath(to), 0).is_ok(),
        );
    }

    fn exchange(&mut self) {
        let (Some((from, stat)), Some((to, other))) =
            (self.existing(|_| true), self.existing(|_| true))
        else {
            return;
        };
        exchanged((&from, &stat), (&to, &other));
    }

    pub fn exchange_at(&mut self, from: &Path, to: &Path) {
        let (stat, other) = (lstat(from).unwrap(), lstat(to).unwrap());
        exchanged((from, &stat), (to, &other));
    }

    fn mkdir(&mut self) {
        let path = self.any_path();
        let depth = path.components().count() - self.root.components().count();
        if lstat(&path).is_none() && depth <= 4 {
            self.mkdir_at(&path);
        }
    }

    pub fn mkdir_at(&mut self, path: &Path) {
        let place = Place::of(path);
        recorded(
            |s| before_create(s, &place),
            || std::fs::create_dir(path).unwrap(),
        );
        let id = lstat(path).unwrap().id;
        tell(|s| s.created(id, true));
    }

    fn rmdir(&mut self) {
        if let Some((path, _)) = self.existing(Stat::is_dir) {
            self.rmdir_at(&path);
        }
    }

    pub fn rmdir_at(&mut self, path: &Path) {
        let (place, stat) = (Place::of(path), lstat(path).unwrap());
        name_operation(
            |s| before_remove(s, &place, &stat),
            || std::fs::remove_dir(path).is_ok(),
        );
    }

    fn link(&mut self) {
        let Some((from, stat)) = self.existing(|s| !s.is_dir()) else {
            return;
        };
        let to = self.any_path();
        if lstat(&to).is_some() {
            return;
        }
        let place = Place::of(&to);
        let reference = self.file_ref(&stat, &from);
        recorded(
            |s| s.before_link(&reference, &place.name()),
            || std::fs::hard_link(&from, &to).unwrap(),
        );
    }

    fn node(&mut self) {
        let path = self.any_path();
        if lstat(&path).is_some() {
            return;
        }
        let target = format!("target-{}", self.rng.below(100));
        if !self.rng.one_in(2) {
            return self.symlink_at(&target, &path);
        }
        self.make_at(&path, || {
            sys::mknod(&cpath(&path), libc::S_IFIFO | 0o640, 0).unwrap();
        });
    }

    pub fn symlink_at(&mut self, target: &str, path: &Path) {
        self.make_at(path, || std::os::unix::fs::symlink(target, path).unwrap());
    }

    fn make_at(&mut self, path: &Path, make: impl FnOnce()) {
        let place = Place::of(path);
        recorded(|s| before_create(s, &place), make);
        let id = lstat(path).unwrap().id;
        tell(|s| s.created(id, false));
    }

    fn attributes(&mut self) {
        let link = |s: &Stat| s.mode & libc::S_IFMT == libc::S_IFLNK;
        let Some((path, stat)) = self.existing(|s| !link(s)) else {
            return;
        };
        let reference = self.file_ref(&stat, &path);
        if self.root_user && self.rng.one_in(2) {
            let uid = self.rng.below(3) as u32 * 1000;
            recorded(
                |s| s.before_attributes(&reference, OWNER),
                || sys::chown(&cpath(&path), uid, uid).unwrap(),
            );
        } else {
            let bits = self.rng.below(0o10000) as u32 & 0o6777 | 0o700;
            recorded(
                |s| s.before_attributes(&reference, MODE),
                || sys::chmod(&cpath(&path), bits).unwrap(),
            );
        }
    }

    fn utimes(&mut self) {
        let Some((path, stat)) = self.existing(|_| true) else {
            return;
        };
        let reference = self.file_ref(&stat, &path);
        let time = self.rng.below(1 << 60) as i64;
        recorded(
            |s| s.before_attributes(&reference, TIMES),
            || sys::set_times(&cpath(&path), time, time).unwrap(),
        );
        let now = lstat(&path).unwrap();
        tell(|s| s.touched(&now));
    }

    fn xattr(&mut self) {
        let Some((path, stat)) = self.existing(|s| s.is_regular() || s.is_dir()) else {
            return;
        };
        let name = [b"user.a", b"user.b"][self.rng.below(2) as usize];
        let reference = self.file_ref(&stat, &path);
        let value = format!("{}", self.rng.next());
        let set = self.rng.below(3) > 0;
        recorded(
            |s| s.before_xattr(&reference, name),
            || {
                let (path, name) = (cpath(&path), CPath::new(&[name]).unwrap());
                if set {
                    let _ = sys::set_xattr(&path, &name, value.as_bytes());
                } else {
                    let _ = sys::remove_xattr(&path, &name);
                }
            },
        );
    }

    fn hold(&mut self) {
        if self.held.len() > 6 {
            let k = self.rng.below(self.held.len() as u64) as usize;
            self.held.swap_remove(k);
        } else if let Some((file, _, _)) = self.open() {
            self.held.push(file);
        }
    }

    /// Writes through a descriptor whose file may be called otherwise by now, or
    /// nothing at all.
    fn use_held(&mut self) {
        if self.held.is_empty() {
            return;
        }
        let k = self.rng.below(self.held.len() as u64) as usize;
        let file = self.held.swap_remove(k);
        let fd = file.as_raw_fd();
        let stat = sys::fstat(fd).unwrap();
        let at = self.rng.below(stat.size + 1);
        let len = 1 + self.rng.below(5_000) as usize;
        let data = self.bytes(len);
        let reference = FileRef {
            stat: &stat,
            path: b"",
            fd: Some(fd),
            any_fd: Some(fd),
        };
        let end = at + data.len() as u64;
        recorded(
            |s| {
                s.before_write(&reference, at, end);
            },
            || sys::pwrite_all(fd, &data, at).unwrap(),
        );
        let now = sys::fstat(fd).unwrap();
        tell(|s| s.touched(&now));
        self.held.push(file);
    }
}

fn cpath(path: &Path) -> CPath {
    CPath::new(&[cstring(path).as_bytes()]).unwrap()
}
