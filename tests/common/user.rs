//! Who runs the test programs, and directories that belong to them.

use std::ffi::CString;
use std::path::PathBuf;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicU32, Ordering};

#[derive(Clone, Copy, Debug)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// The user of `CKPT_TEST_USER`; `None`: the programs run as whoever runs the tests.
pub fn ordinary() -> Option<User> {
    static USER: OnceLock<Option<User>> = OnceLock::new();
    *USER.get_or_init(|| {
        let name = std::env::var("CKPT_TEST_USER")
            .ok()
            .filter(|n| !n.is_empty())?;
        let passwd = std::fs::read_to_string("/etc/passwd").expect("/etc/passwd");
        let line = passwd
            .lines()
            .find(|line| line.split(':').next() == Some(&name))
            .unwrap_or_else(|| panic!("CKPT_TEST_USER: no user {name}"));
        let number = |n: usize| line.split(':').nth(n).and_then(|f| f.parse().ok());
        Some(User {
            uid: number(2).expect("a uid"),
            gid: number(3).expect("a gid"),
        })
    })
}

/// A new, empty directory that belongs to the user who runs the programs.
pub fn fresh_dir(name: &str) -> PathBuf {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let dir = std::env::temp_dir().join(format!(
        "ckpt-{name}-{}-{}",
        std::process::id(),
        NEXT.fetch_add(1, Ordering::Relaxed)
    ));
    let _ = std::fs::remove_dir_all(&dir);
    for part in ["", "run", "bare"] {
        make_own(dir.join(part));
    }
    dir
}

/// A directory that belongs to them.
pub fn make_own(dir: PathBuf) {
    std::fs::create_dir_all(&dir).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    if let Some(user) = ordinary() {
        let path = CString::new(dir.to_str().expect("UTF-8")).expect("no zero byte");
        // SAFETY: a valid C string.
        let result = unsafe { libc::chown(path.as_ptr(), user.uid, user.gid) };
        assert_eq!(result, 0, "chown {}: run as root", dir.display());
    }
}
