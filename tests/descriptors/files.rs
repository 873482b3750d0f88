//! Regular files, directories, unlinked files, memfds, devices, locks.

use crate::harness::*;

pub fn cases() -> Vec<Case> {
    let mut cases = vec![
        Case::new("regular_files", regular_setup, regular_check),
        Case::new("shared_descriptions", shared_setup, shared_check),
        Case::new("thousand_files", thousand_setup, thousand_check),
        Case::new("unlinked_files", unlinked_setup, unlinked_check),
        Case::new("memfds", memfd_setup, memfd_check),
        Case::new("directories", directory_setup, directory_check),
        Case::new("devices_and_path", device_setup, device_check),
        Case::new("locks", lock_setup, lock_check),
        Case::new("proc_self_files", proc_setup, proc_check),
    ];
    cases.push(Case {
        between: |dir| {
            std::fs::write(dir.join("new"), "x").unwrap();
            std::fs::rename(dir.join("new"), dir.join("a")).unwrap();
        },
        refused: Some("another file has taken its place"),
        ..Case::new("replaced_file", one_file_setup, |_| {})
    });
    cases.push(Case {
        between: |dir| std::fs::remove_file(dir.join("a")).unwrap(),
        refused: Some("no such file"),
        ..Case::new("missing_file", one_file_setup, |_| {})
    });
    // File systems give a freed inode number to the next file.
    cases.push(Case {
        between: |dir| {
            std::fs::remove_file(dir.join("a")).unwrap();
            std::fs::write(dir.join("a"), "").unwrap();
        },
        refused: Some("another file has taken its place"),
        ..Case::new("recreated_file", one_file_setup, |_| {})
    });
    cases
}

fn one_file_setup() {
    at(5, open("a", libc::O_CREAT));
}

fn regular_setup() {
    let rdwr = libc::O_RDWR | libc::O_CREAT;
    at(10, open("plain", rdwr));
    write(10, b"0123456789");
    seek(10, 4);
    at(
        3,
        open("append", libc::O_WRONLY | libc::O_APPEND | libc::O_CREAT),
    );
    write(3, b"abc");
    at(
        200,
        open(
            "sync",
            rdwr | libc::O_SYNC | libc::O_NONBLOCK | libc::O_CLOEXEC,
        ),
    );
    // dup2 clears close-on-exec; set it at its final number.
    fcntl(200, libc::F_SETFD, libc::FD_CLOEXEC);
    at(201, open("readonly", rdwr));
    // SAFETY: no memory is involved.
    unsafe { libc::fchmod(201, 0o444) };
    seek(201, 1 << 33);
}

fn regular_check(_: &ckpt::agent::restore::descriptors::Restored) {
    assert_eq!(read(10, 3).unwrap(), b"456");
    write(3, b"def");
    assert_eq!(std::fs::read("append").unwrap(), b"abcdef");
    assert_eq!(write(201, b"x"), 1);
    assert_eq!(pos(201), (1 << 33) + 1);
    assert_eq!(stat(201).st_mode & 0o777, 0o444);
}

fn shared_setup() {
    let rdwr = libc::O_RDWR | libc::O_CREAT;
    at(5, open("a", rdwr));
    write(5, b"0123456789");
    dup(5, 9);
    dup(5, 7);
    seek(5, 2);
    at(6, open("a", rdwr));
    at(8, open("a", rdwr));
    dup(8, 4);
    seek(8, 2);
    seek(6, 2);
    // Equal in everything but the description.
    for fd in 20..60 {
        at(fd, open("a", rdwr));
    }
}

fn shared_check(_: &ckpt::agent::restore::descriptors::Restored) {
    assert!(same_description(5, 7) && same_description(5, 9) && same_description(4, 8));
    assert!(!same_description(5, 6) && !same_description(5, 8) && !same_description(6, 8));
    assert_eq!(read(5, 2).unwrap(), b"23");
    assert_eq!((pos(9), pos(7), pos(6), pos(4)), (4, 4, 2, 2));
    for fd in 20..59 {
        assert!(!same_description(fd, fd + 1));
    }
}

fn thousand_setup() {
    std::fs::create_dir("many").unwrap();
    for i in 0..990 {
        let fd = open(&format!("many/{i}"), libc::O_RDWR | libc::O_CREAT);
        let fd = at(3 + i as i32, fd);
        write(fd, b"some content");
        seek(fd, i % 12);
    }
}

fn thousand_check(_: &ckpt::agent::restore::descriptors::Restored) {
    for i in 0..990 {
        let fd = 3 + i as i32;
        let link = std::fs::read_link(format!("/proc/self/fd/{fd}")).unwrap();
        assert!(link.ends_with(format!("many/{i}")));
        assert_eq!(pos(fd), i % 12);
    }
}

fn unlinked_setup() {
    at(5, open("gone", libc::O_RDWR | libc::O_CREAT));
    write(5, b"head");
    // Sparse: a gigabyte of hole, then a tail across a page boundary.
    seek(5, (1 << 30) + 4090);
    write(5, b"0123456789");
    seek(5, 2);
    at(6, open("gone", libc::O_RDONLY));
    std::fs::remove_file("gone").unwrap();
    at(7, open(".", libc::O_TMPFILE | libc::O_RDWR));
    write(7, b"temporary");
    // SAFETY: no memory is involved.
    unsafe { libc::fchmod(7, 0o400) };
    at(8, open("empty", libc::O_WRONLY | libc::O_CREAT));
    std::fs::remove_file("empty").unwrap();
}

fn unlinked_check(_: &ckpt::agent::restore::descriptors::Restored) {
    assert_eq!(pos(5), 2);
    assert_eq!(stat(5).st_size, (1 << 30) + 4100);
    assert_eq!(stat(5).st_nlink, 0);
    assert!(stat(5).st_blocks < 100, "holes were filled");
    assert_eq!(stat(5).st_ino, stat(6).st_ino);
    assert!(!same_description(5, 6));
    assert_eq!(read(6, 6).unwrap(), b"head\0\0");
    seek(6, (1 << 30) + 4088);
    assert_eq!(read(6, 100).unwrap(), b"\0\x000123456789");
    seek(5, 0);
    write(5, b"H");
    seek(6, 0);
    assert_eq!(read(6, 4).unwrap(), b"Head");
    assert_eq!(pos(7), 9);
    seek(7, 0);
    assert_eq!(read(7, 20).unwrap(), b"temporary");
    assert_eq!(stat(7).st_mode & 0o777, 0o400);
    assert_eq!(stat(8).st_size, 0);
    assert_eq!(write(8, b"x"), 1);
}

fn memfd(name: &std::ffi::CStr, flags: u32) -> i32 {
    // SAFETY: a live name.
    unsafe { libc::memfd_create(name.as_ptr(), flags) }
}

fn memfd_setup() {
    at(5, memfd(c"mine", libc::MFD_ALLOW_SEALING));
    let page = vec![7u8; 5000];
    write(5, &page);
    dup(5, 6);
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    assert_eq!(fcntl(5, libc::F_ADD_SEALS, seals), 0);
    at(7, memfd(c"unsealable", 0));
    write(7, b"hello");
    at(8, open("/proc/self/fd/7", libc::O_RDONLY));
    at(9, memfd(c"future", libc::MFD_ALLOW_SEALING));
    assert_eq!(fcntl(9, libc::F_ADD_SEALS, libc::F_SEAL_FUTURE_WRITE), 0);
}

fn memfd_check(restored: &ckpt::agent::restore::descriptors::Restored) {
    let link = std::fs::read_link("/proc/self/fd/5").unwrap();
    assert_eq!(link.to_str().unwrap(), "/memfd:mine (deleted)");
    let seals = libc::F_SEAL_WRITE | libc::F_SEAL_GROW | libc::F_SEAL_SHRINK;
    assert_eq!(fcntl(5, libc::F_GET_SEALS, 0), seals);
    assert_eq!(write(5, b"x"), -1);
    assert_eq!(pos(6), 5000);
    seek(6, 4990);
    assert_eq!(read(5, 100).unwrap(), vec![7u8; 10]);
    assert_eq!(fcntl(7, libc::F_GET_SEALS, 0), libc::F_SEAL_SEAL);
    assert_eq!(read(8, 10).unwrap(), b"hello");
    assert_eq!(stat(7).st_ino, stat(8).st_ino);
    use ckpt::agent::restore::descriptors::Late;
    let seals = libc::F_SEAL_FUTURE_WRITE as u32;
    assert_eq!(restored.late, [Late::Seals { fd: 9, seals }]);
}

fn entries(fd: i32, n: usize) -> Vec<u8> {
    let mut buf = vec![0u8; n];
    // SAFETY: live buffer.
    let got = unsafe { libc::syscall(libc::SYS_getdents64, fd, buf.as_mut_ptr(), n) };
    assert!(got >= 0);
    buf.truncate(got as usize);
    buf
}

fn directory_setup() {
    std::fs::create_dir("d").unwrap();
    for i in 0..50 {
        std::fs::write(format!("d/{i}"), "").unwrap();
    }
    at(5, open("d", libc::O_RDONLY | libc::O_DIRECTORY));
    at(6, open("d", libc::O_RDONLY | libc::O_DIRECTORY));
    entries(6, 300);
    dup(6, 7);
    // What is left to read, by a description of its own at the same place.
    let rest = open("d", libc::O_RDONLY | libc::O_DIRECTORY);
    seek(rest, pos(6));
    std::fs::write("rest", entries(rest, 65536)).unwrap();
    // SAFETY: no memory is involved.
    unsafe { libc::close(rest) };
}

fn directory_check(_: &ckpt::agent::restore::descriptors::Restored) {
    assert!(pos(6) != 0);
    assert_eq!(entries(7, 65536), std::fs::read("rest").unwrap());
    assert!(entries(6, 65536).is_empty());
    assert!(entries(5, 65536).len() > 50 * 24);
}

fn device_setup() {
    at(5, open("/dev/null", libc::O_WRONLY));
    at(6, open("/dev/zero", libc::O_RDONLY));
    at(7, open("/dev/urandom", libc::O_RDONLY | libc::O_NONBLOCK));
    at(8, open("/dev/full", libc::O_RDWR));
    std::os::unix::fs::symlink("/nowhere", "link").unwrap();
    at(9, open("link", libc::O_PATH | libc::O_NOFOLLOW));
    at(10, open(".", libc::O_PATH));
    at(11, open("/dev/null", libc::O_PATH));
}

fn device_check(_: &ckpt::agent::restore::descriptors::Restored) {
    assert_eq!(write(5, b"x"), 1);
    assert_eq!(read(6, 3).unwrap(), [0; 3]);
    assert_eq!(read(7, 8).unwrap().len(), 8);
    assert_eq!(write(8, b"x"), -1);
    assert_eq!(stat(9).st_mode & libc::S_IFMT, libc::S_IFLNK);
    assert_eq!(stat(10).st_mode & libc::S_IFMT, libc::S_IFDIR);
    assert_eq!(read(11, 1), Err(libc::EBADF));
}

fn range(kind: i16, start: i64, len: i64) -> libc::flock {
    // SAFETY: a plain struct.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind;
    lock.l_start = start;
    lock.l_len = len;
    lock
}

fn set_lock(fd: i32, cmd: i32, kind: i32, start: i64, len: i64) {
    let mut lock = range(kind as i16, start, len);
    // SAFETY: a live lock.
    let ret = unsafe { libc::fcntl(fd, cmd, &raw mut lock) };
    assert_eq!(ret, 0, "{}", std::io::Error::last_os_error());
}

fn lock_setup() {
    for (fd, name) in [(5, "flock"), (6, "posix"), (7, "ofd"), (8, "shared")] {
        at(fd, open(name, libc::O_RDWR | libc::O_CREAT));
    }
    dup(5, 15);
    at(16, open("posix", libc::O_RDONLY));
    // SAFETY: no memory is involved.
    unsafe {
        assert_eq!(libc::flock(5, libc::LOCK_EX), 0);
        assert_eq!(libc::flock(8, libc::LOCK_SH), 0);
    }
    set_lock(6, libc::F_SETLK, libc::F_WRLCK, 10, 20);
    set_lock(16, libc::F_SETLK, libc::F_RDLCK, 100, 0);
    set_lock(7, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0);
}

fn lock_check(restored: &ckpt::agent::restore::descriptors::Restored) {
    // Record locks are handed to the caller to be taken once more at the end.
    assert_eq!(restored.late.len(), 2);
    // SAFETY: the child only calls system calls and ends.
    unsafe {
        let child = libc::fork();
        if child == 0 {
            let path = |p: &std::ffi::CStr| libc::open(p.as_ptr(), libc::O_RDWR);
            let mut failed = 0;
            failed |= i32::from(libc::flock(path(c"flock"), libc::LOCK_SH | libc::LOCK_NB) == 0);
            let shared = path(c"shared");
            failed |= i32::from(libc::flock(shared, libc::LOCK_SH | libc::LOCK_NB) != 0) << 1;
            failed |= i32::from(libc::flock(shared, libc::LOCK_EX | libc::LOCK_NB) == 0) << 2;
            let probe = |fd: i32, start: i64, len: i64| {
                let mut lock = range(libc::F_WRLCK as i16, start, len);
                libc::fcntl(fd, libc::F_GETLK, &raw mut lock);
                (i32::from(lock.l_type), lock.l_start, lock.l_len)
            };
            let posix = path(c"posix");
            failed |= i32::from(probe(posix, 0, 10).0 != libc::F_UNLCK) << 3;
            failed |= i32::from(probe(posix, 0, 60) != (libc::F_WRLCK, 10, 20)) << 4;
            failed |= i32::from(probe(posix, 30, 0) != (libc::F_RDLCK, 100, 0)) << 5;
            failed |= i32::from(probe(path(c"ofd"), 5, 1).0 != libc::F_WRLCK) << 6;
            libc::_exit(failed);
        }
        let mut status = 0;
        libc::waitpid(child, &raw mut status, 0);
        assert_eq!(libc::WEXITSTATUS(status), 0, "locks");
    }
}

fn proc_setup() {
    at(5, open("/proc/self/status", libc::O_RDONLY));
    let pid = std::process::id();
    at(6, open(&format!("/proc/{pid}/maps"), libc::O_RDONLY));
    at(7, open("/proc/meminfo", libc::O_RDONLY));
}

fn proc_check(_: &ckpt::agent::restore::descriptors::Restored) {
    let text = String::from_utf8(read(5, 4096).unwrap()).unwrap();
    let pid = format!("Pid:\t{}\n", std::process::id());
    assert!(text.contains(&pid), "{text}");
    assert!(read(6, 100).is_ok() && read(7, 100).is_ok());
}
