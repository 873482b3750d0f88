//! Can the library be loaded into a program? Looks at the file before it is started, so
//! that a program that would run unprotected is refused in words.

use memmap2::Mmap;
use std::ffi::OsStr;
use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Unsuitable {
    #[error("{} is statically linked: the library cannot be loaded into it", .0.display())]
    Static(PathBuf),
    #[error("{} is set-{which}: the system loads no library into it for another user", path.display())]
    SetId { path: PathBuf, which: &'static str },
    #[error("{} has file capabilities: the system loads no library into it", .0.display())]
    Capabilities(PathBuf),
    #[error("{} is a program for another machine, not x86-64", .0.display())]
    Machine(PathBuf),
    #[error("{}: too many interpreters in a row", .0.display())]
    Interpreters(PathBuf),
    #[error("{}: {error}", path.display())]
    Unreadable { path: PathBuf, error: String },
}

/// Follows `#!` lines to the program that is executed in the end, and checks it.
pub fn check(path: &Path) -> Result<(), Unsuitable> {
    let mut path = path.to_owned();
    for _ in 0..5 {
        match examine(&path)? {
            Kind::Dynamic | Kind::Other => return Ok(()),
            Kind::Script(interpreter) => path = interpreter,
        }
    }
    Err(Unsuitable::Interpreters(path))
}

enum Kind {
    Dynamic,
    Script(PathBuf),
    /// Left to the kernel (binfmt_misc) or to a shell.
    Other,
}

fn examine(path: &Path) -> Result<Kind, Unsuitable> {
    let unreadable = |error: std::io::Error| Unsuitable::Unreadable {
        path: path.to_owned(),
        error: error.to_string(),
    };
    let metadata = path.metadata().map_err(unreadable)?;
    check_privileges(path, &metadata)?;
    let file = match File::open(path) {
        Ok(file) => file,
        // Executable but not readable: the kernel makes such a process undumpable.
        Err(error) => return Err(unreadable(error)),
    };
    if metadata.len() < 4 {
        return Ok(Kind::Other);
    }
    // SAFETY: a private read-only mapping of a program's file; whoever truncates a
    // program that is about to be started loses more than this check.
    let bytes = unsafe { Mmap::map(&file) }.map_err(unreadable)?;
    if let Some(line) = bytes.strip_prefix(b"#!") {
        let line = line.split(|&b| b == b'\n').next().unwrap_or(&[]);
        let mut words = line
            .split(|b| matches!(b, b' ' | b'\t'))
            .filter(|w| !w.is_empty());
        let interpreter = words.next().unwrap_or(&[]);
        return Ok(Kind::Script(PathBuf::from(OsStr::from_bytes(interpreter))));
    }
    if !bytes.starts_with(b"\x7fELF") {
        return Ok(Kind::Other);
    }
    if !is_x86_64(&bytes) {
        return Err(Unsuitable::Machine(path.to_owned()));
    }
    match has_interpreter(&bytes) {
        Some(true) => Ok(Kind::Dynamic),
        _ => Err(Unsuitable::Static(path.to_owned())),
    }
}

/// Set-id bits and capabilities count only where they change something.
fn check_privileges(path: &Path, metadata: &std::fs::Metadata) -> Result<(), Unsuitable> {
    let (uid, gid) = (nix::unistd::getuid(), nix::unistd::getgid());
    let path = path.to_owned();
    if metadata.mode() & libc::S_ISUID != 0 && metadata.uid() != uid.as_raw() {
        return Err(Unsuitable::SetId {
            path,
            which: "user-id",
        });
    }
    let group_bits = libc::S_ISGID | libc::S_IXGRP;
    if metadata.mode() & group_bits == group_bits && metadata.gid() != gid.as_raw() {
        return Err(Unsuitable::SetId {
            path,
            which: "group-id",
        });
    }
    if !uid.is_root() {
        let mut value = [0u8; 64];
        let buffer = &mut value[..];
        if rustix::fs::getxattr(&path, "security.capability", buffer).is_ok() {
            return Err(Unsuitable::Capabilities(path));
        }
    }
    Ok(())
}

/// ELFCLASS64, little-endian, EM_X86_64.
fn is_x86_64(elf: &[u8]) -> bool {
    elf.get(4..6) == Some(&[2, 1]) && elf.get(18..20) == Some(&[62, 0])
}

fn number(elf: &[u8], at: u64, len: usize) -> Option<u64> {
    let at = usize::try_from(at).ok()?;
    let mut bytes = [0u8; 8];
    bytes[..len].copy_from_slice(elf.get(at..at.checked_add(len)?)?);
    Some(u64::from_le_bytes(bytes))
}

/// Program headers as `(type, offset, file size)`.
fn segments(elf: &[u8]) -> Option<Vec<(u64, u64, u64)>> {
    let (offset, size) = (number(elf, 32, 8)?, number(elf, 54, 2)?);
    let count = number(elf, 56, 2)?;
    (0..count)
        .map(|i| {
            let at = offset.checked_add(i.checked_mul(size)?)?;
            let field = |plus: u64, len| number(elf, at.checked_add(plus)?, len);
            Some((field(0, 4)?, field(8, 8)?, field(32, 8)?))
        })
        .collect()
}

/// Is there a PT_INTERP (a dynamic linker to load the library)?
fn has_interpreter(elf: &[u8]) -> Option<bool> {
    const PT_INTERP: u64 = 3;
    Some(segments(elf)?.iter().any(|s| s.0 == PT_INTERP))
}

/// The build id (NT_GNU_BUILD_ID) of an ELF file, in hex.
pub fn build_id(path: &Path) -> Option<String> {
    const PT_NOTE: u64 = 4;
    let file = File::open(path).ok()?;
    // SAFETY: as in `examine`.
    let elf = unsafe { Mmap::map(&file) }.ok()?;
    for (_, offset, len) in segments(&elf)?.into_iter().filter(|s| s.0 == PT_NOTE) {
        let (mut at, end) = (offset, offset.checked_add(len)?);
        while at < end {
            let (name, desc) = (number(&elf, at, 4)?, number(&elf, at + 4, 4)?);
            let kind = number(&elf, at + 8, 4)?;
            let start = at + 12 + name.next_multiple_of(4);
            if kind == 3 && name == 4 {
                let bytes = elf.get(start as usize..(start + desc) as usize)?;
                return Some(bytes.iter().map(|b| format!("{b:02x}")).collect());
            }
            at = start + desc.next_multiple_of(4);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dynamic_programs_and_scripts_pass() {
        check(Path::new("/bin/sh")).unwrap();
        let dir = crate::store::fs::tests::TempDir::new("elf");
        let script = dir.0.join("script");
        std::fs::write(&script, "#! /bin/sh -e\nexit\n").unwrap();
        check(&script).unwrap();
        std::fs::write(&script, format!("#!{}\n", script.display())).unwrap();
        assert!(matches!(check(&script), Err(Unsuitable::Interpreters(_))));
        std::fs::write(&script, "#!/nowhere/at/all\n").unwrap();
        assert!(matches!(check(&script), Err(Unsuitable::Unreadable { .. })));
    }

    #[test]
    fn damaged_elf_files_are_judged_without_a_panic() {
        let good = std::fs::read("/bin/sh").unwrap();
        assert_eq!(has_interpreter(&good), Some(true));
        for len in 0..200 {
            let _ = (is_x86_64(&good[..len]), has_interpreter(&good[..len]));
        }
        for at in 0..120 {
            let mut bad = good[..4096].to_vec();
            bad[at] = 0xff;
            let _ = (is_x86_64(&bad), has_interpreter(&bad));
        }
    }

    #[test]
    fn the_build_id_of_libc_is_found() {
        let text = std::fs::read_to_string("/proc/self/maps").unwrap();
        let libc = text
            .lines()
            .find_map(|l| l.split_once('/').filter(|p| p.1.contains("libc.so")));
        let path = format!("/{}", libc.unwrap().1);
        assert!(build_id(Path::new(&path)).unwrap().len() >= 16);
    }
}
