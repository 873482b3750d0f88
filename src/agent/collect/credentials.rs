//! Who the program is and what it may do: ids, groups, capabilities, securebits, seccomp,
//! root directory. None of it comes back at a restore, so a checkpoint is only taken while all
//! of it is what it was when the process was started; and a checkpoint is only restored by a
//! process that is started with the same ([`restart_difference`]).
//!
//! Helper thread; constructor.

use crate::agent::procfs::{field, task_file};
use crate::agent::refusal::{self, Kind};
use crate::agent::stop::Stopped;
use ckpt_sys::syscall;
use std::sync::atomic::Ordering;

/// Lines of /proc/PID/status, and what people call them.
const STATUS: &[(&str, &str)] = &[
    ("Uid", "user ids"),
    ("Gid", "group ids"),
    ("Groups", "groups"),
    ("CapInh", "inheritable capabilities"),
    ("CapPrm", "capabilities"),
    ("CapEff", "effective capabilities"),
    ("CapBnd", "bounding set of capabilities"),
    ("CapAmb", "ambient capabilities"),
    ("Seccomp", SECCOMP),
    ("Seccomp_filters", SECCOMP),
];
const SECCOMP: &str = "seccomp filters";
const SECUREBITS: &str = "securebits";
const ROOT: &str = "root directory (chroot)";

/// The credentials of a thread as one text: a line `name=value` each. The securebits are those
/// of the caller (who changes his is found by a hook, [`Kind::SecureBits`]).
pub fn credentials(tid: i32) -> Vec<u8> {
    let mut text = Vec::new();
    let status = task_file(tid, "status").unwrap_or_default();
    for (key, _) in STATUS {
        let value = field(&status, key).unwrap_or(b"?");
        text.extend_from_slice(key.as_bytes());
        text.push(b'=');
        text.extend_from_slice(value.trim_ascii());
        text.push(b'\n');
    }
    // PR_SET_KEEPCAPS is one of them, and comes back; the helper has it from whoever bore it.
    const KEEP_CAPS: isize = 1 << 4;
    // SAFETY: no pointers.
    let securebits = unsafe { syscall!(libc::SYS_prctl, libc::PR_GET_SECUREBITS, 0, 0, 0, 0) };
    let securebits = securebits & !KEEP_CAPS;
    text.extend_from_slice(format!("securebits={securebits}\nroot={}\n", root(tid)).as_bytes());
    text
}

/// What a thread's root directory is. The link tells where it is as seen from the reader's own
/// root; what it leads to is the same for all.
fn root(tid: i32) -> String {
    let path = format!("/proc/self/task/{tid}/root\0");
    // SAFETY: a NUL-terminated path; all-zero is a valid buffer, which the kernel fills.
    unsafe {
        let mut st: libc::stat = std::mem::zeroed();
        match syscall!(libc::SYS_stat, path.as_ptr(), &mut st) {
            0 => format!("{}:{}", st.st_dev, st.st_ino),
            error => format!("errno {}", -error),
        }
    }
}

/// Why there can be no checkpoint of these threads: what is not as it was `then`. `first` is
/// the one that speaks for all unless the program has made calls that act on one thread alone.
pub fn changed(stopped: &Stopped, first: i32, then: &[u8]) -> Option<String> {
    let told = |what: &str| format!("the program has changed its {what} since it was started");
    if refusal::was_noted(Kind::SecureBits) {
        return Some(told(SECUREBITS));
    }
    let of = |tid| difference(then, &credentials(tid), |_| true).map(|d| told(d.what));
    if !refusal::was_noted(Kind::Credentials) {
        return of(first);
    }
    let mut threads = stopped.threads();
    threads.find_map(|slot| of(slot.tid.load(Ordering::Relaxed) as i32))
}

/// The first difference of two texts.
#[derive(Debug, PartialEq, Eq)]
pub struct Difference {
    pub what: &'static str,
    pub then: String,
    pub now: String,
}

fn difference(then: &[u8], now: &[u8], counts: impl Fn(&str) -> bool) -> Option<Difference> {
    if then == now {
        return None;
    }
    let lines = |text: &[u8]| -> Vec<String> {
        let text = String::from_utf8_lossy(text);
        text.lines().map(str::to_owned).collect()
    };
    let (then, now) = (lines(then), lines(now));
    for k in 0..then.len().max(now.len()) {
        let (a, b) = (then.get(k), now.get(k));
        let (key, value) = split(a.or(b).map_or("", String::as_str));
        if a == b || !counts(key) {
            continue;
        }
        let what = match key {
            "securebits" => SECUREBITS,
            "root" => ROOT,
            key => {
                let found = STATUS.iter().find(|(name, _)| *name == key);
                found.map_or("credentials", |(_, what)| *what)
            }
        };
        return Some(Difference {
            what,
            then: value.to_owned(),
            now: b.map_or("", |b| split(b).1).to_owned(),
        });
    }
    None
}

fn split(line: &str) -> (&str, &str) {
    line.split_once('=').unwrap_or((line, ""))
}

/// What forbids that a process with the credentials `now` goes on from a checkpoint of one that
/// was started with `then`. System-call filters that were there at the start, and where the root
/// directory is, are the new start's business.
pub fn restart_difference(then: &[u8], now: &[u8]) -> Option<Difference> {
    difference(then, now, |key| {
        !key.starts_with("Seccomp") && key != "root"
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::in_child;

    fn own() -> Vec<u8> {
        // SAFETY: no arguments.
        credentials(unsafe { syscall!(libc::SYS_gettid) } as i32)
    }

    #[test]
    fn what_differs_has_a_name() {
        let now = own();
        assert_eq!(difference(&now, &now, |_| true), None);
        let text = String::from_utf8(now.clone()).unwrap();
        assert_eq!(text.lines().count(), STATUS.len() + 2);
        assert!(!text.contains('?') && !text.contains("errno"), "{text}");
        let other = text.replace("CapEff=", "CapEff=f");
        let found = restart_difference(other.as_bytes(), &now).unwrap();
        assert_eq!(found.what, "effective capabilities");
        assert_eq!(format!("f{}", found.now), found.then);
        for environment in ["root=", "Seccomp=", "Seccomp_filters="] {
            let other = text.replace(environment, &format!("{environment}9"));
            assert_eq!(restart_difference(other.as_bytes(), &now), None);
            assert!(difference(other.as_bytes(), &now, |_| true).is_some());
        }
    }

    #[test]
    fn another_root_directory_is_found() {
        in_child(|| {
            let before = own();
            // SAFETY: plain calls in a child of the test.
            unsafe {
                if libc::chroot(c"/proc/self".as_ptr()) != 0 {
                    return; // an ordinary user cannot
                }
                // Out of /proc there is nothing to read: that is a difference as well.
                assert_ne!(own(), before);
            }
        });
    }
}
