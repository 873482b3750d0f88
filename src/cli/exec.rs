//! Becoming the program: environment, library, exec. Shared by `run` and `restore`.

use super::{NOT_EXECUTABLE, NOT_FOUND, elf, exit};
use crate::config::Config;
use anyhow::{Context, bail};
use std::collections::BTreeMap;
use std::ffi::{CString, OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// The environment of the program to be.
pub struct Environment(BTreeMap<OsString, OsString>);

impl Environment {
    /// This process's own, less what only concerns the process that set it.
    pub fn inherited() -> Environment {
        let mut env: BTreeMap<_, _> = std::env::vars_os().collect();
        env.remove(OsStr::new("CKPT_OWNER"));
        env.remove(OsStr::new("CKPT_DISABLE"));
        Environment(env)
    }

    pub fn set(&mut self, name: &str, value: impl AsRef<OsStr>) {
        self.0.insert(name.into(), value.as_ref().into());
    }

    pub fn get(&self, name: &str) -> Option<&OsStr> {
        self.0.get(OsStr::new(name)).map(OsString::as_os_str)
    }

    /// A variable with a list separated by colons; an empty list leaves it as it is.
    pub fn set_list(&mut self, name: &str, values: &[OsString]) -> anyhow::Result<()> {
        let mut list: Vec<u8> = Vec::new();
        for value in values {
            if value.as_bytes().contains(&b':') {
                bail!("{}: a colon separates patterns", value.to_string_lossy());
            }
            if !list.is_empty() {
                list.push(b':');
            }
            list.extend_from_slice(value.as_bytes());
        }
        if !list.is_empty() {
            self.set(name, OsStr::from_bytes(&list));
        }
        Ok(())
    }

    /// Checks the variables as the library will.
    pub fn validate(&self) -> anyhow::Result<Config> {
        let pairs = self.0.iter().map(|(n, v)| (n.as_bytes(), v.as_bytes()));
        let config = Config::from_env(pairs)?;
        for name in &config.unknown {
            tracing::warn!(
                "{} is not a variable of ckpt",
                String::from_utf8_lossy(name)
            );
        }
        Ok(config)
    }

    /// Puts the library behind what is preloaded already.
    pub fn preload(&mut self, library: &Path) -> anyhow::Result<()> {
        let path = library.as_os_str();
        // The dynamic linker splits the variable at these, and knows no quoting.
        if path.as_bytes().iter().any(|b| b" :\t\n".contains(b)) {
            bail!(
                "{}: LD_PRELOAD cannot name a path with a space or colon",
                library.display()
            );
        }
        let value = match self.0.remove(OsStr::new("LD_PRELOAD")) {
            Some(old) if !old.is_empty() => {
                let mut parts = old.as_bytes().split(|b| b" :".contains(b));
                if parts.any(|part| part == path.as_bytes()) {
                    old
                } else {
                    let mut joined = old;
                    joined.push(":");
                    joined.push(path);
                    joined
                }
            }
            _ => path.to_owned(),
        };
        self.0.insert("LD_PRELOAD".into(), value);
        Ok(())
    }

    fn to_c(&self) -> anyhow::Result<Vec<CString>> {
        let pair = |(name, value): (&OsString, &OsString)| {
            let mut bytes = name.as_bytes().to_vec();
            bytes.push(b'=');
            bytes.extend_from_slice(value.as_bytes());
            Ok(CString::new(bytes)?)
        };
        self.0.iter().map(pair).collect()
    }
}

/// libckpt.so: `$CKPT_LIB`, beside this command, or in the `lib` next to its `bin`.
pub fn library() -> anyhow::Result<PathBuf> {
    if let Some(path) = std::env::var_os("CKPT_LIB").filter(|path| !path.is_empty()) {
        let path = std::path::absolute(PathBuf::from(path)).context("CKPT_LIB")?;
        if !path.is_file() {
            bail!("CKPT_LIB={}: there is no such file", path.display());
        }
        return Ok(path);
    }
    let own = std::env::current_exe().context("find this command's own directory")?;
    let dir = own.parent().unwrap_or(Path::new("/"));
    let candidates = [
        dir.join("libckpt.so"),
        dir.join("../lib/libckpt.so"),
        dir.join("../lib/ckpt/libckpt.so"),
        dir.join("../lib/x86_64-linux-gnu/libckpt.so"),
    ];
    let found = candidates.iter().find_map(|path| path.canonicalize().ok());
    let places = || candidates.iter().map(|p| p.display().to_string());
    found.with_context(|| {
        let places: Vec<_> = places().collect();
        format!(
            "libckpt.so is not at {} (CKPT_LIB names another place)",
            places.join(", ")
        )
    })
}

/// The file that execvp(3) would execute.
pub fn resolve(program: &OsStr) -> anyhow::Result<PathBuf> {
    if program.as_bytes().contains(&b'/') {
        let path = PathBuf::from(program);
        return match executable(&path) {
            Some(true) => Ok(path),
            Some(false) => Err(exit(NOT_EXECUTABLE, refusal(&path))),
            None => Err(exit(NOT_FOUND, format!("{}: not found", path.display()))),
        };
    }
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/bin:/usr/bin".into());
    let mut denied = None;
    for dir in std::env::split_paths(&path) {
        let candidate = match dir.as_os_str().is_empty() {
            true => Path::new(".").join(program),
            false => dir.join(program),
        };
        match executable(&candidate) {
            Some(true) => return Ok(candidate),
            Some(false) => denied = denied.or(Some(candidate)),
            None => {}
        }
    }
    match denied {
        Some(path) => Err(exit(NOT_EXECUTABLE, refusal(&path))),
        None => {
            let program = program.to_string_lossy();
            Err(exit(NOT_FOUND, format!("{program}: not found")))
        }
    }
}

fn refusal(path: &Path) -> String {
    let reason = if path.is_dir() {
        "is a directory"
    } else {
        "permission denied"
    };
    format!("{}: {reason}", path.display())
}

/// `None`: there is nothing; `Some(false)`: it cannot be executed.
fn executable(path: &Path) -> Option<bool> {
    let metadata = path.metadata().ok()?;
    let mode = metadata.permissions().mode();
    let allowed = nix::unistd::access(path, nix::unistd::AccessFlags::X_OK).is_ok();
    Some(metadata.is_file() && mode & 0o111 != 0 && allowed)
}

/// Checks the program, then becomes it. Returns only with an error.
pub fn become_program(
    path: &Path,
    args: &[OsString],
    env: &Environment,
    sigpipe_ignored: bool,
) -> anyhow::Error {
    match exec(path, args, env, sigpipe_ignored) {
        Ok(never) => match never {},
        Err(error) => error,
    }
}

fn exec(
    path: &Path,
    args: &[OsString],
    env: &Environment,
    sigpipe_ignored: bool,
) -> anyhow::Result<std::convert::Infallible> {
    elf::check(path)?;
    let c = |text: &OsStr| CString::new(text.as_bytes());
    let file = c(path.as_os_str())?;
    let argv = args
        .iter()
        .map(|arg| c(arg))
        .collect::<Result<Vec<_>, _>>()?;
    let envp = env.to_c()?;
    if sigpipe_ignored {
        // SAFETY: SIG_IGN is a valid disposition; this thread is the only one.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    }
    let mut errno = match nix::unistd::execve(&file, &argv, &envp) {
        Ok(never) => return Ok(never),
        Err(errno) => errno,
    };
    if errno == nix::errno::Errno::ENOEXEC {
        // A script without `#!`: as execvp(3) does it.
        let shell = c"/bin/sh".to_owned();
        let mut shell_args = vec![shell.clone(), file];
        shell_args.extend(argv.into_iter().skip(1));
        errno = match nix::unistd::execve(&shell, &shell_args, &envp) {
            Ok(never) => return Ok(never),
            Err(errno) => errno,
        };
    }
    let message = format!("{}: {}", path.display(), errno.desc());
    Err(exit(NOT_EXECUTABLE, message))
}

/// Bytes of a recorded command line as arguments.
pub fn arguments(cmdline: &[u8]) -> Vec<OsString> {
    let trimmed = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    let words = trimmed.split(|&b| b == 0);
    words
        .map(|word| OsString::from_vec(word.to_vec()))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_library_is_appended_once() {
        let mut env = Environment(BTreeMap::new());
        let library = Path::new("/x/libckpt.so");
        env.preload(library).unwrap();
        env.preload(library).unwrap();
        assert_eq!(env.0[OsStr::new("LD_PRELOAD")], "/x/libckpt.so");
        env.set("LD_PRELOAD", "/a.so /b.so");
        env.preload(library).unwrap();
        assert_eq!(env.0[OsStr::new("LD_PRELOAD")], "/a.so /b.so:/x/libckpt.so");
        assert!(env.preload(Path::new("/a b/libckpt.so")).is_err());
    }

    #[test]
    fn programs_are_found_as_execvp_finds_them() {
        assert!(resolve(OsStr::new("sh")).unwrap().ends_with("sh"));
        let status = |name: &str| {
            let error = resolve(OsStr::new(name)).unwrap_err();
            error.downcast::<super::super::Exit>().unwrap().status
        };
        assert_eq!(status("no-such-program-here"), 127);
        assert_eq!(status("/no/such/program"), 127);
        assert_eq!(status("/etc/passwd"), 126);
        assert_eq!(status("/etc"), 126);
    }

    #[test]
    fn recorded_command_lines() {
        assert_eq!(arguments(b"a\0\0b c\0"), ["a", "", "b c"]);
        assert_eq!(arguments(b"a"), ["a"]);
    }
}
