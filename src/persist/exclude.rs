//! Which paths are left alone: globs on absolute paths, the later rule wins.
//!
//! Rules are added in the constructor and by the C interface, read in hooks without a
//! lock: they lie in a fixed table and only their count grows. A rule counts for files
//! that are modified from then on; one that was modified before keeps its decision
//! until the next checkpoint.

use std::cell::UnsafeCell;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

const RULES: usize = 256;
/// Bytes of all globs together.
const TEXT: usize = 32 << 10;

/// Not the user's files, but where a rule includes some of them.
const DEFAULTS: [&[u8]; 3] = [b"/dev", b"/proc", b"/sys"];

struct Table {
    count: AtomicUsize,
    adding: AtomicBool,
    inner: UnsafeCell<Inner>,
}

struct Inner {
    /// Exclude, and where the glob ends in `text`.
    rules: [(bool, u32); RULES],
    text: [u8; TEXT],
    store: [u8; 4096],
    store_len: usize,
}

// SAFETY: parts below `count` do not change; parts above are written by the one thread
// that has set `adding`.
unsafe impl Sync for Table {}

static TABLE: Table = Table {
    count: AtomicUsize::new(0),
    adding: AtomicBool::new(false),
    inner: UnsafeCell::new(Inner {
        rules: [(false, 0); RULES],
        text: [0; TEXT],
        store: [0; 4096],
        store_len: 0,
    }),
};

/// Is this a glob that rules take: absolute, or beginning with `*`?
pub fn is_glob(glob: &[u8]) -> bool {
    matches!(glob.first(), Some(b'*' | b'/'))
}

/// How many rules there are: what was decided by fewer has to be decided again.
pub fn count() -> usize {
    TABLE.count.load(Ordering::Acquire)
}

/// Adds a rule at run time: `exclude` or include what the glob matches. False: no
/// room, or the glob is neither absolute nor begins with `*`.
pub fn add_rule(exclude: bool, glob: &[u8]) -> bool {
    if !is_glob(glob) {
        return false;
    }
    while TABLE.adding.swap(true, Ordering::Acquire) {
        std::hint::spin_loop();
    }
    let count = TABLE.count.load(Ordering::Relaxed);
    // SAFETY: `adding` is ours, readers stay below `count`.
    let inner = unsafe { &mut *TABLE.inner.get() };
    let start = count
        .checked_sub(1)
        .and_then(|k| inner.rules.get(k))
        .map_or(0, |r| r.1 as usize);
    let end = start + glob.len();
    let added = match (inner.rules.get_mut(count), inner.text.get_mut(start..end)) {
        (Some(rule), Some(text)) => {
            text.copy_from_slice(glob);
            *rule = (exclude, end as u32);
            TABLE.count.store(count + 1, Ordering::Release);
            true
        }
        _ => false,
    };
    TABLE.adding.store(false, Ordering::Release);
    added
}

/// Forgets all rules (constructor, restored helper: one thread) before the settings of
/// a new start are put in force.
pub fn clear() {
    TABLE.count.store(0, Ordering::SeqCst);
}

/// Sets the store's own directory, which is always excluded (constructor, restored
/// helper: one thread).
pub fn set_store(root: &[u8]) {
    // SAFETY: one thread, per contract.
    let inner = unsafe { &mut *TABLE.inner.get() };
    let root = root.strip_suffix(b"/").unwrap_or(root);
    match inner.store.get_mut(..root.len()) {
        Some(place) => {
            place.copy_from_slice(root);
            inner.store_len = root.len();
        }
        None => inner.store_len = 0,
    }
}

fn is_under(path: &[u8], dir: &[u8]) -> bool {
    !dir.is_empty()
        && path
            .strip_prefix(dir)
            .is_some_and(|rest| matches!(rest.first(), None | Some(b'/')))
}

/// Is this path left alone?
pub fn is_excluded(path: &[u8]) -> bool {
    let count = TABLE.count.load(Ordering::Acquire);
    // SAFETY: what readers look at does not change any more.
    let inner = unsafe { &*TABLE.inner.get() };
    if is_under(path, inner.store.get(..inner.store_len).unwrap_or_default()) {
        return true;
    }
    for k in (0..count).rev() {
        let Some((exclude, end)) = inner.rules.get(k).copied() else {
            break;
        };
        let start = k
            .checked_sub(1)
            .and_then(|k| inner.rules.get(k))
            .map_or(0, |r| r.1);
        let glob = inner.text.get(start as usize..end as usize);
        if glob.is_some_and(|glob| matches(glob, path)) {
            return exclude;
        }
    }
    DEFAULTS.iter().any(|dir| is_under(path, dir))
}

/// May something in a directory be left alone once that is moved, that is not now? In doubt yes.
pub fn excludes_more_below(from: &[u8], to: &[u8]) -> bool {
    let count = TABLE.count.load(Ordering::Acquire);
    // SAFETY: what readers look at does not change any more.
    let inner = unsafe { &*TABLE.inner.get() };
    let store = inner.store.get(..inner.store_len).unwrap_or_default();
    let mut start = 0;
    for (exclude, end) in inner.rules.iter().take(count) {
        let end = *end as usize;
        let glob = inner.text.get(start..end).unwrap_or_default();
        // An exception must not be lost.
        let (from, to) = if *exclude { (from, to) } else { (to, from) };
        if !matches_below(glob, from, to) {
            return true;
        }
        start = end;
    }
    let mut dirs = DEFAULTS.iter().copied().chain([store]);
    dirs.any(|dir| is_under(to, dir) && !is_under(from, dir) || is_under(dir, to))
}

/// Does the glob match whatever in `from` it would match in `to`? In doubt no.
fn matches_below(glob: &[u8], from: &[u8], to: &[u8]) -> bool {
    let glob = match glob.strip_suffix(b"/") {
        Some(rest) if !rest.is_empty() => rest,
        _ => glob,
    };
    let rests = || (0..=glob.len()).all(|at| !reaches(glob, at, to) || reaches(glob, at, from));
    matches(glob, from) || !matches(glob, to) && rests()
}

/// Can the glob's first `at` bytes stand for the directory's path with a slash behind it, so that
/// the rest is for what is in it?
fn reaches(glob: &[u8], at: usize, dir: &[u8]) -> bool {
    // As `matches`, but to the very end.
    let Some(glob) = glob.get(..at) else {
        return false;
    };
    let path_at = |p: usize| match p.checked_sub(dir.len()) {
        None => dir.get(p),
        Some(0) => Some(&b'/'),
        Some(_) => None,
    };
    let (mut g, mut p) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    loop {
        match (glob.get(g), path_at(p)) {
            (Some(b'*'), _) => {
                back = Some((g + 1, p));
                g += 1;
            }
            (None, None) => return true,
            (Some(a), Some(b)) if a == b || *a == b'?' => {
                g += 1;
                p += 1;
            }
            _ => match back {
                Some((after, at)) if at <= dir.len() => {
                    back = Some((after, at + 1));
                    g = after;
                    p = at + 1;
                }
                _ => return false,
            },
        }
    }
}

/// Does the glob match `path`, or a directory that it is in? `*` matches any bytes,
/// slashes too, `?` one byte.
pub fn matches(glob: &[u8], path: &[u8]) -> bool {
    let glob = match glob.strip_suffix(b"/") {
        Some(rest) if !rest.is_empty() => rest,
        _ => glob,
    };
    // Greedy with one point to go back to: a later `*` makes earlier ones final.
    let (mut g, mut p) = (0, 0);
    let mut back: Option<(usize, usize)> = None;
    loop {
        match (glob.get(g), path.get(p)) {
            (Some(b'*'), _) => {
                back = Some((g + 1, p));
                g += 1;
            }
            (None, None | Some(b'/')) => return true,
            (Some(a), Some(b)) if a == b || *a == b'?' => {
                g += 1;
                p += 1;
            }
            _ => match back {
                Some((after, at)) if at < path.len() => {
                    back = Some((after, at + 1));
                    g = after;
                    p = at + 1;
                }
                _ => return false,
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn globs() {
        for (glob, path, yes) in [
            ("*", "/a/b", true),
            ("/a/*", "/a/b/c", true),
            ("/a/*", "/ab", false),
            ("/a/*.log", "/a/b/c.log", true),
            ("/a/*.log", "/a/b/c.logs", false),
            ("/a/*.log", "/a/b.log/c", true),
            ("/a", "/a/b", true),
            ("/a", "/ab", false),
            ("/a/", "/a/b", true),
            ("/a?c", "/abc", true),
            ("/a*b*c", "/aXbYbZc", true),
            ("/a*b*c", "/aXbYbZ", false),
            ("*.o", "/x/y.o", true),
        ] {
            assert_eq!(
                matches(glob.as_bytes(), path.as_bytes()),
                yes,
                "{glob} {path}"
            );
        }
    }

    /// What is in a directory that is renamed is matched as it was, or is not.
    #[test]
    fn globs_below_directories() {
        for (glob, from, to, yes) in [
            ("*.log", "/w/a", "/w/b", true),
            ("*.log", "/w/a", "/w/a.log", false),
            ("*.log", "/w/a.log", "/w/a", true),
            ("/w/tmp/*", "/w/a", "/w/tmp", false),
            ("/w/tmp/*", "/w/tmp", "/w/a", true),
            ("/w/tmp/*", "/w/a", "/w/b", true),
            ("/w/tmp/*", "/w/a", "/w/tmp/b", false),
            ("/w/tmp/*", "/w/tmp/a", "/w/tmp/b", true),
            ("/w/tmp/*.o", "/w/tmp/a", "/w/tmp/b", true),
            ("/w/tmp/b*.o", "/w/tmp/a", "/w/tmp/b", false),
            ("*/tmp/*", "/w/a", "/w/tmp", false),
            ("*/tmp/*", "/w/a", "/w/b", true),
            ("*/tmp/x", "/w/a/tmp", "/w/b/tmp", true),
            ("*/tmp/x", "/w/a", "/w/tmp", false),
            ("*", "/w/a", "/w/b", true),
            ("/w/?/x", "/w/a", "/w/b", true),
            ("/w/?/x", "/w/ab", "/w/b", false),
        ] {
            let kept = matches_below(glob.as_bytes(), from.as_bytes(), to.as_bytes());
            assert_eq!(kept, yes, "{glob} {from} {to}");
        }
    }

    #[test]
    fn later_rules_win_and_the_system_is_excluded_by_default() {
        set_store(b"/st/ore/");
        assert!(is_excluded(b"/proc/self/mem"));
        assert!(is_excluded(b"/st/ore/jobs"));
        assert!(!is_excluded(b"/st/ores"));
        assert!(!is_excluded(b"/excluded-1/x"));
        assert!(add_rule(true, b"/excluded-1"));
        assert!(add_rule(false, b"/excluded-1/keep*"));
        assert!(is_excluded(b"/excluded-1/x"));
        assert!(!is_excluded(b"/excluded-1/keep/x"));
        assert!(!add_rule(true, b"relative"));
    }
}
