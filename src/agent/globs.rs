//! Globs of exclusion whose way has symbolic links in it.
//!
//! Rules are matched on real paths (`hooks::files::resolve`), so `/tmp/link/*` would match nothing.
//! The part before the first wildcard is resolved when the rule is made, and both globs are in
//! force: the one that was given, and the one that it means then. The constructor, the restored
//! helper, and the program's threads inside `InHook`.

use super::hooks::files::paths::CWD;
use super::hooks::files::resolve;
use crate::config::Config;

/// The rules of a new start.
pub fn follow_links(config: &mut Config) {
    let lists = [
        &mut config.exclude,
        &mut config.include,
        &mut config.restore_exclude,
    ];
    for list in lists {
        let more: Vec<Vec<u8>> = list.iter().flat_map(|glob| meant(glob)).flatten().collect();
        list.extend(more);
    }
}

/// What else a glob means: up to two others.
pub fn meant(glob: &[u8]) -> [Option<Vec<u8>>; 2] {
    if glob.first() != Some(&b'/') {
        return [None, None];
    }
    let wildcard = glob.iter().position(is_wildcard);
    let others = match wildcard.and_then(|at| glob.get(..at)) {
        // A path: what it leads to, and the name itself.
        None => [led(glob, b"", true), led(glob, b"", false)],
        Some(before) => {
            let dir = before.iter().rposition(|&byte| byte == b'/').unwrap_or(0);
            let (dir, rest) = glob.split_at(dir);
            [led(dir, rest, true), None]
        }
    };
    let glob = glob.strip_suffix(b"/").unwrap_or(glob);
    let [first, second] = others.map(|other| other.filter(|other| other != glob));
    let second = second.filter(|second| first.as_ref() != Some(second));
    [first, second]
}

fn is_wildcard(byte: &u8) -> bool {
    matches!(byte, b'*' | b'?')
}

/// Where `way` leads, with `rest` behind it. `None`: it cannot be told, or would match more.
fn led(way: &[u8], rest: &[u8], follow_last: bool) -> Option<Vec<u8>> {
    let mut path = resolve::real(CWD, if way.is_empty() { b"/" } else { way }, follow_last)?.path;
    if path.iter().any(is_wildcard) {
        return None;
    }
    if path == b"/" && rest.first() == Some(&b'/') {
        path.clear();
    }
    path.try_reserve_exact(rest.len()).ok()?;
    path.extend_from_slice(rest);
    Some(path)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_before_the_first_wildcard_are_followed() {
        let base = std::env::temp_dir().join(format!("ckpt-globs-{}", std::process::id()));
        let _ = std::fs::remove_dir_all(&base);
        std::fs::create_dir_all(base.join("dir/sub")).unwrap();
        let base = base.canonicalize().unwrap();
        symlink(base.join("dir"), base.join("link")).unwrap();
        std::fs::create_dir(base.join("wild*")).unwrap();
        symlink("wild*", base.join("wild")).unwrap();
        let text = |path: &str| base.join(path).as_os_str().as_bytes().to_vec();
        let others = |path: &str| -> Vec<Vec<u8>> {
            let others = meant(&text(path));
            others.into_iter().flatten().collect()
        };
        assert_eq!(others("link/*"), [text("dir/*")]);
        assert_eq!(others("link/sub/a?*.o"), [text("dir/sub/a?*.o")]);
        assert_eq!(others("link/not/there-*"), [text("dir/not/there-*")]);
        assert_eq!(others("link/sub"), [text("dir/sub")]);
        assert_eq!(others("link"), [text("dir")]);
        assert_eq!(others("dir/../dir/*"), [text("dir/*")]);
        for itself in ["dir/*", "dir/sub", "dir/sub/", "not/there", "li*/x"] {
            assert_eq!(others(itself), [] as [Vec<u8>; 0], "{itself}");
        }
        // It would match what was not meant.
        assert_eq!(others("wild/x"), [] as [Vec<u8>; 0]);
        for itself in ["*", "/*", "/*/x", "*.o"] {
            assert_eq!(meant(itself.as_bytes()), [None, None], "{itself}");
        }
        std::fs::remove_dir_all(&base).unwrap();
    }
}
