//! Every modifying system call that a tracer sees in a real program is seen by the library:
//! "N of N", per program and call.
//!
//! The very same run is counted twice: by `strace -f` from outside, and by the hooks
//! (`CKPT_AUDIT`). Only the program's own process counts, not its children, and only
//! what comes after the constructor (a failing `write` marks its end). All its threads count.

mod common;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

const MARK: &str = "ckpt audit begins";

/// All that `hooks::files::MODIFYING` lists.
const CALLS: &[(&str, libc::c_long)] = &[
    ("open", libc::SYS_open),
    ("openat", libc::SYS_openat),
    ("openat2", libc::SYS_openat2),
    ("creat", libc::SYS_creat),
    ("write", libc::SYS_write),
    ("writev", libc::SYS_writev),
    ("pwrite64", libc::SYS_pwrite64),
    ("pwritev", libc::SYS_pwritev),
    ("pwritev2", libc::SYS_pwritev2),
    ("sendfile", libc::SYS_sendfile),
    ("splice", libc::SYS_splice),
    ("copy_file_range", libc::SYS_copy_file_range),
    ("ioctl", libc::SYS_ioctl),
    ("truncate", libc::SYS_truncate),
    ("ftruncate", libc::SYS_ftruncate),
    ("fallocate", libc::SYS_fallocate),
    ("rename", libc::SYS_rename),
    ("renameat", libc::SYS_renameat),
    ("renameat2", libc::SYS_renameat2),
    ("link", libc::SYS_link),
    ("linkat", libc::SYS_linkat),
    ("symlink", libc::SYS_symlink),
    ("symlinkat", libc::SYS_symlinkat),
    ("unlink", libc::SYS_unlink),
    ("unlinkat", libc::SYS_unlinkat),
    ("mkdir", libc::SYS_mkdir),
    ("mkdirat", libc::SYS_mkdirat),
    ("rmdir", libc::SYS_rmdir),
    ("mknod", libc::SYS_mknod),
    ("mknodat", libc::SYS_mknodat),
    ("chmod", libc::SYS_chmod),
    ("fchmod", libc::SYS_fchmod),
    ("fchmodat", libc::SYS_fchmodat),
    ("fchmodat2", libc::SYS_fchmodat2),
    ("chown", libc::SYS_chown),
    ("fchown", libc::SYS_fchown),
    ("lchown", libc::SYS_lchown),
    ("fchownat", libc::SYS_fchownat),
    ("utime", libc::SYS_utime),
    ("utimes", libc::SYS_utimes),
    ("utimensat", libc::SYS_utimensat),
    ("futimesat", libc::SYS_futimesat),
    ("setxattr", libc::SYS_setxattr),
    ("lsetxattr", libc::SYS_lsetxattr),
    ("fsetxattr", libc::SYS_fsetxattr),
    ("removexattr", libc::SYS_removexattr),
    ("lremovexattr", libc::SYS_lremovexattr),
    ("fremovexattr", libc::SYS_fremovexattr),
    ("setxattrat", 463),
    ("removexattrat", 466),
    ("open_by_handle_at", libc::SYS_open_by_handle_at),
    ("bind", libc::SYS_bind),
];

/// A program and its arguments; the working directory has `prepare`d files in it.
const PROGRAMS: &[&[&str]] = &[
    &["cp", "text", "copied"],
    &["cp", "-a", "tree", "tree2"],
    &["mv", "tree/a", "moved"],
    &["ln", "-s", "text", "link"],
    &["ln", "tree2/a", "hard"],
    &["rm", "-r", "tree2"],
    &["mkdir", "-p", "one/two/three"],
    &["rmdir", "one/two/three"],
    &["tar", "cf", "archive.tar", "tree", "text"],
    &["tar", "xf", "archive.tar", "-C", "one"],
    &["gzip", "-k", "text"],
    &["gunzip", "-c", "text.gz"],
    &["bzip2", "-k", "text"],
    &["xz", "-k", "-0", "text"],
    &["sort", "-o", "sorted", "text"],
    &["sed", "-i", "s/word/WORD/", "sorted"],
    &[
        "dd",
        "if=text",
        "of=copied",
        "bs=4096",
        "seek=3",
        "conv=notrunc",
    ],
    &["tee", "teed"],
    &["install", "-m", "600", "text", "installed"],
    &["touch", "-d", "2001-02-03", "text"],
    &["chmod", "640", "text"],
    &["chown", "0", "text"],
    &["truncate", "-s", "1000", "copied"],
    &["fallocate", "-l", "100000", "allocated"],
    &["split", "-l", "500", "text", "part-"],
    &["shuf", "-o", "shuffled", "--random-source=text", "text"],
    &["uniq", "text", "unique"],
    &["mkfifo", "fifo"],
    &["mktemp", "-p", "."],
    &["patch", "-p0", "-i", "change.diff"],
    &[
        "sqlite3",
        "data.db",
        "create table t(a); insert into t values(1),(2); update t set a=a+1;",
    ],
    &[
        "sqlite3",
        "data.db",
        "pragma journal_mode=wal; insert into t values(3); delete from t where a=2;",
    ],
    &[
        "awk",
        "{ print $1 > \"first\"; print $2 >> \"second\" }",
        "text",
    ],
    &[
        "perl",
        "-e",
        "open F,'>pl'; print F 'x' x 9999; close F; open F,'+<pl'; seek F,5,0; print F 'y'; close F; rename 'pl','pl2'; utime 1,2,'pl2'; truncate 'pl2',7; symlink 'a','pl3'; unlink 'pl3'; mkdir 'pld'; rmdir 'pld'; chmod 0600,'pl2'",
    ],
    &[
        "bash",
        "-c",
        "echo a > sh1; echo b >> sh1; exec 5<>sh1; echo c >&5; printf '%s' x > sh2",
    ],
    &["/bin/sh", "-c", "echo a > sh3; echo b >> sh3; : > sh3"],
    &[
        "python3",
        "-c",
        "import os,shutil,tempfile,mmap\nf=open('py','w+'); f.write('a'*100000); f.seek(5); f.write('b'); f.close()\nos.rename('py','py2'); shutil.copyfile('py2','py3'); os.truncate('py3',10); os.chmod('py3',0o600); os.utime('py3',(1,2)); os.link('py3','py4'); os.symlink('x','py5'); os.unlink('py5'); os.mkdir('pyd'); os.rmdir('pyd')\nt=tempfile.NamedTemporaryFile(dir='.'); t.write(b'z'); t.close()\nfd=os.open('py6',os.O_RDWR|os.O_CREAT); os.pwrite(fd,b'q',100); os.writev(fd,[b'a',b'b']); os.posix_fallocate(fd,0,5000); os.ftruncate(fd,9); os.setxattr('py6','user.x',b'1') if 0 else None",
    ],
    &["gcc", "-c", "program.c", "-o", "program.o"],
    &["as", "program.s", "-o", "assembled.o"],
    &["ld", "-r", "assembled.o", "-o", "linked.o"],
    &["ar", "rcs", "library.a", "assembled.o"],
    &["objcopy", "assembled.o", "copied.o"],
    &["strip", "-o", "stripped.o", "assembled.o"],
    &["zip", "-qr", "tree.zip", "tree", "text"],
    &["zip", "-q", "tree.zip", "sorted"],
    &["unzip", "-qo", "tree.zip", "-d", "unzipped"],
    // Threads of its own write what they compress.
    &["zstd", "-qf", "text"],
    &["zstd", "-dqf", "text.zst", "-o", "unpacked"],
    &["xz", "-kf", "-0", "-T2", "--block-size=16KiB", "text"],
    &["sort", "-S", "16k", "-T", ".", "-o", "sorted2", "text"],
    &["perl", "-pi.bak", "-e", "s/word/PERL/", "copied"],
    &[
        "gawk",
        "-i",
        "inplace",
        "{ sub(/word/, \"AWK\"); print }",
        "copied",
    ],
    &[
        "vim",
        "-u",
        "NONE",
        "-es",
        "-c",
        "set backup",
        "-c",
        "%s/line/VIM/",
        "-c",
        "wq",
        "unpacked",
    ],
    &["sqlite3", "data.db", ".backup copy.db"],
    &["sqlite3", "copy.db", "delete from t; vacuum"],
    &["git", "init", "-q", "."],
    &["git", "add", "text", "tree"],
    &[
        "git",
        "-c",
        "user.name=A",
        "-c",
        "user.email=a@example.org",
        "commit",
        "-qm",
        "all",
    ],
    &["git", "mv", "tree/sub/b", "tree/c"],
    &["git", "reset", "-q", "--hard"],
    &["git", "gc", "-q", "--prune=now"],
    &[
        "openssl",
        "enc",
        "-aes-256-cbc",
        "-pbkdf2",
        "-k",
        "x",
        "-in",
        "text",
        "-out",
        "encrypted",
    ],
    &["ctags", "-f", "tags", "program.c"],
    &[
        "ruby",
        "-e",
        "require 'fileutils'; File.write('rb', 'x' * 99999); File.open('rb', 'r+') { |f| f.seek(3); f.write('y') }; FileUtils.cp('rb', 'rb2'); File.rename('rb', 'rb3'); File.truncate('rb3', 7); File.chmod(0600, 'rb3'); File.symlink('x', 'rb4'); FileUtils.mkdir_p('rbd/e'); FileUtils.rm_r('rbd'); Thread.new { File.write('rb5', 'z') }.join",
    ],
    &[
        "php",
        "-r",
        "file_put_contents('ph', str_repeat('x', 99999)); $f = fopen('ph', 'r+'); fseek($f, 5); fwrite($f, 'y'); ftruncate($f, 50); fclose($f); copy('ph', 'ph2'); rename('ph', 'ph3'); chmod('ph3', 0600); touch('ph3', 1); unlink('ph2'); mkdir('phd'); rmdir('phd');",
    ],
    &[
        "lua",
        "-e",
        "local f = io.open('lu', 'w'); f:write(string.rep('x', 9999)); f:close(); f = io.open('lu', 'r+'); f:seek('set', 5); f:write('y'); f:close(); os.rename('lu', 'lu2'); os.remove('lu2')",
    ],
    // The asynchronous ones in threads of libuv.
    &[
        "node",
        "-e",
        "const fs = require('fs'); fs.writeFileSync('nd', 'x'.repeat(99999)); fs.copyFileSync('nd', 'nd2'); fs.truncateSync('nd2', 7); fs.renameSync('nd', 'nd3'); fs.promises.writeFile('nd4', 'y'.repeat(9999)).then(() => fs.promises.appendFile('nd4', 'z')).then(() => fs.promises.unlink('nd2'))",
    ],
];

/// Without them the test says nothing.
const LEAST: usize = 15;

fn which(name: &str) -> Option<PathBuf> {
    if name.starts_with('/') {
        return Path::new(name).exists().then(|| name.into());
    }
    ["/usr/bin", "/bin", "/usr/local/bin"]
        .iter()
        .map(|dir| Path::new(dir).join(name))
        .find(|path| path.exists())
}

fn prepare(dir: &Path) {
    let text: String = (0..2000)
        .map(|i| format!("word{} {} line\n", i * 7919 % 1009, i))
        .collect();
    let write = |name: &str, content: &str| {
        std::fs::write(dir.join(name), content).expect("a file of the test");
    };
    std::fs::create_dir_all(dir.join("tree/sub")).expect("a directory of the test");
    write("text", &text);
    write("tree/a", &text[..999]);
    write("tree/sub/b", &text[..5000]);
    write("program.c", "int f(int x) { return x * 3; }\n");
    write("program.s", ".globl g\ng: ret\n");
    write("patched", "one\ntwo\nthree\n");
    write(
        "change.diff",
        "--- patched\n+++ patched\n@@ -1,3 +1,3 @@\n one\n-two\n+2\n three\n",
    );
}

/// The thread that a line of the trace tells the birth of. (`<unfinished ...>` leaves the flags
/// in one line and the number in the next of that thread; so a call's flags are remembered.)
fn born(rest: &str, flags: &mut bool) -> Option<String> {
    if !rest.starts_with("clone") && !rest.starts_with("<... clone") {
        return None;
    }
    if rest.starts_with("clone") {
        *flags = rest.contains("CLONE_THREAD");
    }
    let (_, result) = rest.rsplit_once(" = ")?;
    let number = result.split_whitespace().next()?;
    (*flags && number.parse::<u32>().is_ok()).then(|| number.to_owned())
}

/// All threads of the process that begins the trace.
fn threads(trace: &str) -> BTreeSet<String> {
    let mut flags: BTreeMap<String, bool> = BTreeMap::new();
    for line in trace.lines() {
        let Some((tid, rest)) = line.split_once(' ') else {
            continue;
        };
        if flags.is_empty() {
            flags.insert(tid.to_owned(), false);
        }
        if let Some(flag) = flags.get_mut(tid)
            && let Some(tid) = born(rest.trim_start(), flag)
        {
            flags.insert(tid, false);
        }
    }
    flags.into_keys().collect()
}

#[test]
fn threads_are_told_from_children() {
    let trace = "7 clone3({flags=CLONE_VM|CLONE_THREAD|CLONE_SYSVSEM} => {parent_tid=[8]}, 88) = 8
8 write(3, \"\", 1) = 1
7 clone(child_stack=NULL, flags=CLONE_CHILD_SETTID|SIGCHLD) = 9
8 clone3({flags=CLONE_VM|CLONE_THREAD <unfinished ...>
7 clone3({flags=CLONE_VM|CLONE_VFORK}, 88) = 10
8 <... clone3 resumed> => {parent_tid=[11]}, 88) = 11
9 clone3({flags=CLONE_THREAD}, 88) = 12
7 clone3({flags=CLONE_THREAD}, 88) = -1 EAGAIN (Resource temporarily unavailable)
";
    let threads: Vec<String> = threads(trace).into_iter().collect();
    assert_eq!(threads, ["11", "7", "8"]);
}

/// What the tracer saw: counts by name, of the first process, behind the mark.
fn traced(trace: &str) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    let threads = threads(trace);
    let mut begun = false;
    for line in trace.lines() {
        let Some((pid, rest)) = line.split_once(' ') else {
            continue;
        };
        if !threads.contains(pid) {
            continue;
        }
        let rest = rest.trim_start();
        if rest.contains(MARK) {
            begun = true;
            continue;
        }
        if rest.starts_with("execve(") {
            // The constructor runs once more.
            begun = false;
            continue;
        }
        let Some((name, args)) = rest.split_once('(') else {
            continue;
        };
        let Some(&(name, _)) = CALLS.iter().find(|(known, _)| *known == name) else {
            continue;
        };
        let has = |flag: &str| args.contains(flag);
        let counted = match name {
            "open" | "openat" | "openat2" => {
                (has("O_CREAT") || has("O_TRUNC") || has("O_TMPFILE")) && !has("O_PATH")
            }
            "ioctl" => has("FICLONE") || has("FIDEDUPERANGE"),
            _ => true,
        };
        if begun && counted {
            *counts.entry(name).or_insert(0) += 1;
        }
    }
    assert!(trace.contains(MARK), "the library did not start:\n{trace}");
    counts
}

/// What the library saw.
fn seen(dir: &Path) -> BTreeMap<&'static str, u64> {
    let mut counts = BTreeMap::new();
    for entry in std::fs::read_dir(dir).expect("the audit's directory") {
        let path = entry.expect("an entry").path();
        let text = std::fs::read_to_string(&path).expect("the counts");
        for line in text.lines() {
            let mut words = line.split_whitespace();
            let nr: i64 = words.next().expect("a number").parse().expect("a number");
            let count: u64 = words.next().expect("a count").parse().expect("a count");
            if let Some(&(name, _)) = CALLS.iter().find(|call| call.1 == nr)
                && count > 0
            {
                *counts.entry(name).or_insert(0) += count;
            }
        }
    }
    counts
}

fn can_trace() -> bool {
    Command::new("strace")
        .args(["-o", "/dev/null", "true"])
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .status()
        .is_ok_and(|status| status.success())
}

#[test]
fn every_modifying_call_is_seen() {
    assert!(can_trace(), "strace is needed, and ptrace must be allowed");
    let root = std::env::temp_dir().join(format!("ckpt-audit-{}", std::process::id()));
    let (work, counts) = (root.join("work"), root.join("counts"));
    let _ = std::fs::remove_dir_all(&root);
    std::fs::create_dir_all(&work).expect("a directory");
    prepare(&work);
    // A question mark: no error where this strace does not know the call.
    let names: Vec<String> = CALLS.iter().map(|(name, _)| format!("?{name}")).collect();
    let (mut table, mut bad, mut programs) = (String::new(), 0, 0);
    for words in PROGRAMS {
        let Some(program) = which(words[0]) else {
            let _ = writeln!(table, "{:<28} not installed", words[0]);
            continue;
        };
        let _ = std::fs::remove_dir_all(&counts);
        std::fs::create_dir_all(&counts).expect("a directory");
        let trace = root.join("trace");
        let input = std::fs::File::open(work.join("text")).expect("the text");
        let status = Command::new("strace")
            .args(["-f", "-q", "-s", "32", "-e", "signal=none", "-e"])
            .arg(format!("trace=execve,clone,clone3,{}", names.join(",")))
            .arg("-o")
            .arg(&trace)
            .arg("-E")
            .arg(format!("LD_PRELOAD={}", common::build::library().display()))
            .arg("-E")
            .arg(format!("CKPT_AUDIT={}", counts.join("c").display()))
            .arg("-E")
            .arg(format!("CKPT_DIR={}", root.join("store").display()))
            .arg("--")
            .arg(&program)
            .args(&words[1..])
            .current_dir(&work)
            .stdin(input)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()
            .expect("strace starts");
        let trace = std::fs::read_to_string(&trace).expect("the trace");
        let (traced, seen) = (traced(&trace), seen(&counts));
        let (all, ours) = (traced.values().sum::<u64>(), seen.values().sum::<u64>());
        let title: String = words.join(" ").chars().take(40).collect();
        let title = title.replace('\n', " ");
        let _ = writeln!(table, "{title:<42} {ours} of {all}   ({status})");
        programs += 1;
        if traced != seen {
            bad += 1;
            let _ = writeln!(table, "    traced {traced:?}\n    seen   {seen:?}");
        }
    }
    println!("{table}");
    let _ = std::fs::remove_dir_all(&root);
    assert!(programs >= LEAST, "only {programs} programs are installed");
    assert!(
        bad == 0,
        "{bad} programs made calls that were not seen:\n{table}"
    );
}
