//! A snapshot of a directory tree, to compare by: names, kinds, contents, sizes,
//! modes, owners, extended attributes, hard links, symbolic links, times.

use std::collections::BTreeMap;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    pub mode: u32,
    pub owner: (u32, u32),
    pub size: u64,
    pub mtime: (i64, i64),
    /// Contents of a file, target of a symbolic link.
    pub contents: Vec<u8>,
    pub xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first name of the same inode.
    pub links: PathBuf,
}

pub type Tree = BTreeMap<PathBuf, Entry>;

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let c = std::ffi::CString::new(path.as_os_str().as_bytes()).unwrap();
    let mut names = vec![0u8; 4096];
    // SAFETY: the buffer is as long as said.
    let n = unsafe { libc::llistxattr(c.as_ptr(), names.as_mut_ptr().cast(), names.len()) };
    names.truncate(n.max(0) as usize);
    let mut all = BTreeMap::new();
    for name in names.split(|b| *b == 0).filter(|n| !n.is_empty()) {
        let cname = std::ffi::CString::new(name).unwrap();
        let mut value = vec![0u8; 4096];
        // SAFETY: as above.
        let n = unsafe {
            libc::lgetxattr(
                c.as_ptr(),
                cname.as_ptr(),
                value.as_mut_ptr().cast(),
                value.len(),
            )
        };
        value.truncate(n.max(0) as usize);
        all.insert(name.to_vec(), value);
    }
    all
}

pub fn snapshot(root: &Path) -> Tree {
    let mut tree = Tree::new();
    let mut first: BTreeMap<u64, PathBuf> = BTreeMap::new();
    walk(root, Path::new(""), &mut tree, &mut first);
    tree
}

fn walk(root: &Path, at: &Path, tree: &mut Tree, first: &mut BTreeMap<u64, PathBuf>) {
    let path = root.join(at);
    let meta = std::fs::symlink_metadata(&path).unwrap();
    let kind = meta.file_type();
    let contents = if kind.is_file() {
        std::fs::read(&path).unwrap()
    } else if kind.is_symlink() {
        let target = std::fs::read_link(&path).unwrap();
        target.as_os_str().as_bytes().to_vec()
    } else {
        Vec::new()
    };
    let links = first.entry(meta.ino()).or_insert_with(|| at.to_owned());
    let entry = Entry {
        mode: meta.mode(),
        owner: (meta.uid(), meta.gid()),
        size: if kind.is_dir() { 0 } else { meta.size() },
        mtime: (meta.mtime(), meta.mtime_nsec()),
        contents,
        xattrs: xattrs(&path),
        links: links.clone(),
    };
    tree.insert(at.to_owned(), entry);
    if kind.is_dir() {
        let mut names: Vec<_> = std::fs::read_dir(&path)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        names.sort();
        for name in names {
            walk(root, &at.join(name), tree, first);
        }
    }
}

/// The differences in words, a few of them.
pub fn differences(want: &Tree, got: &Tree) -> Vec<String> {
    let mut all = Vec::new();
    for (path, entry) in want {
        match got.get(path) {
            None => all.push(format!("{} is missing", path.display())),
            Some(other) if other != entry => {
                let mut what = Vec::new();
                let mut field = |name: &str, a: String, b: String| {
                    if a != b {
                        what.push(format!("{name} {a} not {b}"));
                    }
                };
                field(
                    "mode",
                    format!("{:o}", other.mode),
                    format!("{:o}", entry.mode),
                );
                field("size", format!("{}", other.size), format!("{}", entry.size));
                field(
                    "mtime",
                    format!("{:?}", other.mtime),
                    format!("{:?}", entry.mtime),
                );
                field(
                    "owner",
                    format!("{:?}", other.owner),
                    format!("{:?}", entry.owner),
                );
                field(
                    "links",
                    format!("{:?}", other.links),
                    format!("{:?}", entry.links),
                );
                field(
                    "xattrs",
                    format!("{:?}", other.xattrs),
                    format!("{:?}", entry.xattrs),
                );
                if let Some(at) = other
                    .contents
                    .iter()
                    .zip(&entry.contents)
                    .position(|(a, b)| a != b)
                {
                    what.push(format!("contents from {at}"));
                }
                all.push(format!("{}: {}", path.display(), what.join(", ")));
            }
            Some(_) => {}
        }
    }
    for path in got.keys().filter(|p| !want.contains_key(*p)) {
        all.push(format!("{} is too much", path.display()));
    }
    all
}
