//! The library, the command and the guests: built once, only when something changed.

use super::{Program, user};
use std::fmt::Write as _;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;
use std::time::SystemTime;

fn source_root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

pub fn guests_dir() -> PathBuf {
    source_root().join("tests/guests")
}

/// `target/debug` or `target/release`, wherever cargo was told to put it: the test
/// binary stands in its `deps`.
fn profile_dir() -> PathBuf {
    let me = std::env::current_exe().expect("the test's own path");
    let deps = me.parent().expect("deps");
    deps.parent().expect("the profile's directory").to_owned()
}

/// An exclusive lock for as long as the value lives: tests run in parallel processes.
struct Locked(#[allow(dead_code)] File);

fn lock(path: &Path) -> Locked {
    let file = File::create(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
    // SAFETY: flock on a descriptor that we hold.
    let result = unsafe { libc::flock(file.as_raw_fd(), libc::LOCK_EX) };
    assert_eq!(result, 0, "flock {}", path.display());
    Locked(file)
}

/// Builds `libckpt.so` and `ckpt`; `cargo test` alone does not build a cdylib.
fn built() -> &'static (PathBuf, PathBuf) {
    static BUILT: OnceLock<(PathBuf, PathBuf)> = OnceLock::new();
    BUILT.get_or_init(|| {
        let given = |name: &str| std::env::var_os(name).map(PathBuf::from);
        if let (Some(library), Some(command)) =
            (given("CKPT_TEST_LIBRARY"), given("CKPT_TEST_COMMAND"))
        {
            return (readable(&library), readable(&command));
        }
        let profile = profile_dir();
        let _lock = lock(&profile.join(".ckpt-test-lock"));
        let mut cargo = Command::new(env!("CARGO"));
        cargo.current_dir(source_root()).args([
            "build",
            "--quiet",
            "-p",
            "ckpt-preload",
            "-p",
            "ckpt",
        ]);
        if profile.file_name().is_some_and(|n| n == "release") {
            cargo.arg("--release");
        }
        if let Some(target) = profile.parent() {
            cargo.arg("--target-dir").arg(target);
        }
        let status = cargo.status().expect("cargo runs");
        assert!(status.success(), "building libckpt.so and ckpt: {status}");
        (
            readable(&profile.join("libckpt.so")),
            readable(&profile.join("ckpt")),
        )
    })
}

pub fn library() -> PathBuf {
    built().0.clone()
}

pub fn command() -> PathBuf {
    built().1.clone()
}

fn modified(path: &Path) -> Option<SystemTime> {
    path.metadata().and_then(|m| m.modified()).ok()
}

/// The compiled guest; also the libraries that some of them use, `*_plugin`.
pub fn guest(name: &str) -> PathBuf {
    compiled(&guests_dir(), name)
}

/// A program of `tests/real`, by the name of its source.
pub fn real(source: &str, args: &[&str]) -> Program {
    let name = source.split('.').next().expect("a name");
    let dir = source_root().join("tests/real");
    let path = if source.ends_with(".f90") {
        // Its own name: `numbers` is also a Rust program.
        compiled_from(&dir.join(source), "numbers_f90", compiler_f())
    } else {
        compiled(&dir, name)
    };
    Program::at(path, args)
}

/// gcc's compiler proper at work on a large source, writing to `output` (`-`: standard output).
pub fn cc1(output: &str) -> Program {
    let asked = Command::new("gcc").arg("-print-prog-name=cc1").output();
    let path = String::from_utf8(asked.expect("gcc").stdout).expect("a path");
    let args = ["-quiet", "-O2", "big.c", "-o", output];
    Program::at(PathBuf::from(path.trim()), &args).file("big.c", c_source())
}

/// A C program large enough to keep a compiler busy.
fn c_source() -> Vec<u8> {
    let mut source = String::from("double sink;\n");
    for f in 0..700 {
        let _ = writeln!(
            source,
            "double f{f}(double *p, int n) {{ double s = {f}; for (int i = 0; i < n; i++) {{ \
             if (p[i] > s) s += p[i] * {f}.5; else s -= p[n - i - 1] / (s + {f}); \
             switch (i % {}) {{ case 0: s *= 1.5; break; case 1: p[i] = s; break; case 2: s = -s; break; default: sink += s; }} }} return s; }}",
            f % 5 + 3
        );
    }
    source.into_bytes()
}

/// The Java class `Work`, compiled now, run by `java` with a small heap.
pub fn java_class(name: &str, source: &str) -> Program {
    let dir = target_dir().join(format!("java-{name}"));
    std::fs::create_dir_all(&dir).expect("a directory for the class");
    let _lock = lock(&dir.join(".lock"));
    let class = dir.join("Work.class");
    let java = dir.join("Work.java");
    if std::fs::read_to_string(&java).ok().as_deref() != Some(source) || !class.exists() {
        std::fs::write(&java, source).expect("Work.java");
        let status = Command::new(find_command("javac"))
            .arg("-d")
            .arg(&dir)
            .arg(&java)
            .status();
        assert!(status.expect("javac").success(), "javac Work.java");
    }
    let content = std::fs::read(&class).expect("Work.class");
    Program::real("java", &["-Xmx256m", "-Xshare:auto", "-cp", ".", "Work"])
        .file("Work.class", content)
}

fn target_dir() -> PathBuf {
    let target = profile_dir().parent().expect("target").join("guests");
    std::fs::create_dir_all(&target).expect("target/guests");
    target
}

fn compiled(base: &Path, name: &str) -> PathBuf {
    for suffix in ["c", "cpp", "rs"] {
        let source = base.join(format!("{name}.{suffix}"));
        if source.exists() {
            let compiler = match suffix {
                "c" => compiler("cc", &["-std=gnu11"]),
                "cpp" => compiler("c++", &["-std=c++17"]),
                _ => {
                    let mut command = Command::new("rustc");
                    command.args(["--edition", "2021", "-O"]);
                    command
                }
            };
            return compiled_from(&source, name, compiler);
        }
    }
    panic!("no program {name} in {}", base.display())
}

fn compiled_from(source: &Path, name: &str, mut compiler: Command) -> PathBuf {
    let target = target_dir();
    let plugin = name.ends_with("_plugin");
    let out = target.join(if plugin {
        format!("lib{name}.so")
    } else {
        name.to_owned()
    });
    let headers = [
        guests_dir().join("guest.h"),
        source_root().join("ckpt-sys/include/ckpt.h"),
    ];
    let newest = headers
        .iter()
        .map(PathBuf::as_path)
        .chain([source])
        .filter_map(modified)
        .max();
    let _lock = lock(&target.join(format!(".{name}.lock")));
    if modified(&out) <= newest {
        // Written aside and renamed: another test may be running the old one.
        let fresh = target.join(format!(".{name}.{}", std::process::id()));
        if plugin {
            compiler.args(["-shared", "-fPIC"]);
        }
        compiler.arg("-o").arg(&fresh).arg(source);
        if source.extension().is_some_and(|e| e == "c" || e == "cpp") {
            compiler.args(["-lm", "-lrt"]);
        }
        let done = compiler.output().expect("a compiler runs");
        assert!(
            done.status.success(),
            "{compiler:?}: {}",
            String::from_utf8_lossy(&done.stderr)
        );
        std::fs::rename(&fresh, &out).expect("rename the program");
    }
    readable(&out)
}

fn compiler_f() -> Command {
    let mut command = Command::new(find_command("gfortran"));
    command.args(["-O2", "-Wall"]);
    command
}

fn compiler(name: &str, args: &[&str]) -> Command {
    let mut command = Command::new(name);
    command
        .args(args)
        .args(["-O1", "-g", "-Wall", "-Wextra", "-Werror", "-pthread"])
        .arg("-I")
        .arg(source_root().join("ckpt-sys/include"));
    command
}

/// The path itself, or a copy in a place that the test user can reach.
pub fn readable(path: &Path) -> PathBuf {
    let Some(user) = user::ordinary() else {
        return path.to_owned();
    };
    let reachable = path.ancestors().skip(1).all(|directory| {
        directory
            .metadata()
            .is_ok_and(|m| m.permissions().mode() & 0o001 != 0)
    });
    if reachable {
        return path.to_owned();
    }
    // The copy keeps its name's content for ever: its time is part of it.
    let age = modified(path).and_then(|m| m.duration_since(SystemTime::UNIX_EPOCH).ok());
    let base = std::env::temp_dir().join(format!("ckpt-test-copies-{}", user.uid));
    std::fs::create_dir_all(&base).expect("a directory for copies");
    std::fs::set_permissions(&base, PermissionsExt::from_mode(0o755)).expect("chmod");
    let _lock = lock(&base.join(".lock"));
    let dir = base.join(format!("{:x}", age.unwrap_or_default().as_nanos()));
    let copy = dir.join(path.file_name().expect("a file"));
    if !copy.exists() {
        std::fs::create_dir_all(&dir).expect("a directory for the copy");
        std::fs::set_permissions(&dir, PermissionsExt::from_mode(0o755)).expect("chmod");
        let aside = dir.join(format!(".{}", std::process::id()));
        std::fs::copy(path, &aside).expect("copy for the test user");
        std::fs::set_permissions(&aside, PermissionsExt::from_mode(0o755)).expect("chmod");
        std::fs::rename(&aside, &copy).expect("rename the copy");
    }
    copy
}

/// A program of the system; a wrapper script of a version manager would be another
/// program, so the system's own directories come first.
pub fn find_command(name: &str) -> PathBuf {
    let own = ["/usr/bin", "/bin", "/usr/sbin", "/usr/local/bin"].map(PathBuf::from);
    let rest = std::env::var_os("PATH").unwrap_or_default();
    own.into_iter()
        .chain(std::env::split_paths(&rest))
        .map(|dir| dir.join(name))
        .find(|path| path.is_file())
        .unwrap_or_else(|| panic!("{name} is not installed: run scripts/install-deps"))
}
