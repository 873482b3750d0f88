//! Files go back with the memory: programs that modify files in every usual way, killed at
//! random instants and resumed. They verify their files themselves as they go; in the end
//! their files and their output are those of an undisturbed run.
//!
//! `CKPT_FILES_KILLS`: kills per program (default 4; scripts/soak does 100).

#[path = "files/choices.rs"]
mod choices;
mod common;
#[path = "files/given.rs"]
mod given;
#[path = "files/lost.rs"]
mod lost;
#[path = "files/outputs.rs"]
mod outputs;
#[path = "files/owner.rs"]
mod owner;
#[path = "files/ways.rs"]
mod ways;

use common::{EAGER_COPY, LAZY_FORK, Program, Setting, Trial, build};
use std::collections::BTreeMap;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

pub fn kills() -> usize {
    let given = std::env::var("CKPT_FILES_KILLS").ok();
    given.and_then(|n| n.parse().ok()).unwrap_or(4)
}

/// Long enough for the kills, which take about 150 ms each.
pub fn seconds() -> f64 {
    0.9 + 0.15 * kills() as f64
}

/// What a directory holds: path -> what there is to compare of it. (Link counts are not: the
/// store may keep links of its own. The names of an inode are.)
fn tree(base: &Path) -> BTreeMap<String, Entry> {
    let mut found: BTreeMap<String, Entry> = BTreeMap::new();
    let mut inodes: BTreeMap<u64, Vec<String>> = BTreeMap::new();
    let mut todo = vec![base.to_owned()];
    while let Some(dir) = todo.pop() {
        for entry in std::fs::read_dir(&dir).expect("a directory").flatten() {
            let path = entry.path();
            let name = path.strip_prefix(base).expect("below").to_string_lossy();
            // Standard output is compared by itself.
            if matches!(&*name, "stdout" | "stderr" | "stdin") || is_random(&name) {
                continue;
            }
            let meta = path.symlink_metadata().expect("metadata");
            let content = if meta.is_dir() {
                todo.push(path.clone());
                Vec::new()
            } else if meta.is_symlink() {
                let to = std::fs::read_link(&path).expect("a link");
                to.to_string_lossy().into_owned().into_bytes()
            } else {
                std::fs::read(&path).expect("a file")
            };
            let names: &mut Vec<String> = inodes.entry(meta.ino()).or_default();
            names.push(name.clone().into_owned());
            let entry = Entry {
                mode: meta.permissions().mode(),
                inode: meta.ino(),
                names: Vec::new(),
                content,
            };
            found.insert(name.into_owned(), entry);
        }
    }
    for entry in found.values_mut() {
        entry.names.clone_from(&inodes[&entry.inode]);
        entry.names.sort();
        entry.inode = 0;
    }
    found
}

/// SQLite puts random numbers into these, LMDB process ids and git times and inode
/// numbers; what they mean is in the database.
fn is_random(name: &str) -> bool {
    ["-journal", "-wal", "-shm", "lock.mdb", ".git/index"]
        .iter()
        .any(|end| name.ends_with(end))
}

#[derive(PartialEq)]
struct Entry {
    mode: u32,
    inode: u64,
    names: Vec<String>,
    content: Vec<u8>,
}

/// Both directories hold the same.
pub fn compare_files(trial: &mut Trial) {
    let bare = tree(&trial.dir.join("bare"));
    let run = tree(&trial.dir.join("run"));
    for name in bare.keys().chain(run.keys()) {
        let what = match (bare.get(name), run.get(name)) {
            (Some(_), None) => "is missing".to_owned(),
            (None, Some(_)) => "should not be there".to_owned(),
            (Some(a), Some(b)) if a == b => continue,
            (Some(a), Some(b)) if a.content != b.content => {
                let at = a.content.iter().zip(&b.content).take_while(|(a, b)| a == b);
                let lens = (a.content.len(), b.content.len());
                format!(
                    "differs from byte {} on ({} bytes expected, {} found)",
                    at.count(),
                    lens.0,
                    lens.1
                )
            }
            (Some(a), Some(b)) => format!(
                "has mode {:o} and names {:?}, not {:o} and {:?}",
                b.mode, b.names, a.mode, a.names
            ),
            (None, None) => continue,
        };
        trial.fail(&format!("file {name} {what}"));
    }
}

pub fn survives(program: Program, setting: Setting) {
    let mut trial = Trial::new(program, setting);
    let bare = trial.bare();
    let hits = trial.kill_and_resume(kills());
    let life = trial.finish();
    trial.compare(&bare, &life);
    compare_files(&mut trial);
    if hits == 0 {
        trial.fail("the program ended before the first kill: this proves nothing");
    }
}

macro_rules! files {
    ($($test:ident = $program:expr;)*) => { $(
        mod $test {
            use super::*;
            #[test]
            fn lazy_fork() {
                survives($program.seconds(seconds()), LAZY_FORK);
            }
            #[test]
            fn eager_copy() {
                survives($program.seconds(seconds()), EAGER_COPY);
            }
        }
    )* };
}

fn pattern(name: &str) -> Program {
    Program::guest("files_patterns").arg(name)
}

fn sqlite(mode: &str, mapped: &str) -> Program {
    Program::guest("files_sqlite.py").arg(mode).arg(mapped)
}

/// Debian's own Python has these libraries.
fn debian_python(script: &str, args: &[&str]) -> Program {
    let script = build::readable(&build::guests_dir().join(script));
    let mut all = vec![script.to_str().expect("a path")];
    all.extend(args);
    let mut program = Program::at("/usr/bin/python3".into(), &all);
    program.status = 73;
    program.counts_its_beginnings = true;
    program
}

fn bash() -> Program {
    let script = build::readable(&build::guests_dir().join("files_bash.sh"));
    let mut program = Program::real("bash", &[script.to_str().expect("a path")]);
    program.status = 73;
    program.counts_its_beginnings = true;
    program
}

files! {
    append_held = pattern("append_held");
    append_position = pattern("append_position");
    append_reopened = pattern("append_reopened");
    in_place = pattern("in_place");
    rename_over = pattern("rename_over");
    create_unlink = pattern("create_unlink");
    maildir = pattern("maildir");
    renamed_open = pattern("renamed_open");
    rotate = pattern("rotate");
    truncated = pattern("truncated");
    attributes = pattern("attributes");
    results = pattern("results");
    records = pattern("records");
    mapped = pattern("mapped");
    header = pattern("header");
    unlinked = pattern("unlinked");
    fstream = Program::guest("files_fstream");
    bufwriter = Program::guest("files_bufwriter");
    python = Program::guest("files_python.py");
    perl = Program::guest("files_perl.pl");
    bash_redirections = bash();
    sqlite_delete = sqlite("delete", "0");
    sqlite_truncate = sqlite("truncate", "0");
    sqlite_persist = sqlite("persist", "0");
    sqlite_memory = sqlite("memory", "0");
    sqlite_wal = sqlite("wal", "0");
    sqlite_mapped = sqlite("delete", "1000000");
    sqlite_wal_mapped = sqlite("wal", "1000000");
    gdbm = debian_python("files_dbm.py", &["gdbm"]);
    lmdb = debian_python("files_dbm.py", &["lmdb"]);
    git_commits = debian_python("files_git.py", &[]);
    cc1_output = build::cc1("big.s");
}
