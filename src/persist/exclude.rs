//! Which paths are left alone: globs on absolute paths, the later rule wins.

/// Adds a rule at run time: `exclude` or include what the glob matches. False: no
/// memory, or the glob is neither absolute nor `*`.
pub fn add_rule(exclude: bool, glob: &[u8]) -> bool {
    let _ = exclude;
    glob == b"*" || glob.first() == Some(&b'/')
}

/// Sets the store's own directory, which is always excluded.
pub fn set_store(root: &[u8]) {
    let _ = root;
}

/// Is this path left alone?
pub fn is_excluded(path: &[u8]) -> bool {
    let _ = path;
    false
}

/// Does the glob match the whole of `path`? `*` matches any bytes, slashes too, `?`
/// one byte; a glob without wildcards also matches everything below it.
pub fn matches(glob: &[u8], path: &[u8]) -> bool {
    glob == path
}
