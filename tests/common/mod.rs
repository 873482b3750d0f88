//! What all end-to-end tests share: building the library and the guests, running
//! programs under it, killing them, and the oracle.
//!
//! The oracle is output equality (see `Trial::survives`): a run that was killed N times
//! at random instants and started again each time ends with the status and the standard
//! output of an undisturbed bare run, and its beginning ran exactly once.
//!
//! Environment, all optional:
//! - `CKPT_TEST_USER`: run the programs as this user (needs root);
//! - `CKPT_TEST_SEED`: the random instants of an earlier run;
//! - `CKPT_TEST_LIBRARY`, `CKPT_TEST_COMMAND`: use these files, build nothing;
//! - `CKPT_TEST_KEEP`: leave the test's directory behind.

#![allow(dead_code)] // each test binary uses its part of this module

pub mod build;
pub mod contained;
pub mod run;
pub mod user;

use ckpt::store::RawFs;
use ckpt::store::journal::Journal;
use run::{Life, Started};
use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// No life of a test program may take longer; a hang is a failure, not a wait.
const DEADLINE: Duration = Duration::from_secs(120);

/// How the library is to do its work in a trial.
#[derive(Clone, Copy, Debug)]
pub struct Setting {
    pub restore: &'static str,
    pub snapshot: &'static str,
}

pub const LAZY_FORK: Setting = Setting {
    restore: "lazy",
    snapshot: "fork",
};
pub const EAGER_COPY: Setting = Setting {
    restore: "eager",
    snapshot: "copy",
};

/// A program with everything that makes its command line and surroundings.
#[derive(Clone, Debug)]
pub struct Program {
    pub path: PathBuf,
    pub args: Vec<String>,
    pub env: BTreeMap<String, String>,
    /// Standard input's content; `None` is /dev/null.
    pub input: Option<Vec<u8>>,
    /// Files that stand in its working directory when it begins.
    pub files: Vec<(String, Vec<u8>)>,
    /// Exit status at its true end.
    pub status: i32,
    /// Only guests write `begin` into `$GUEST_LOG`.
    pub counts_its_beginnings: bool,
    /// Seconds that the machine seems to have been up for before it was; needs root.
    pub ahead: u64,
    /// Under the system-call filter of a container; all programs where `CKPT_TEST_CONTAINED` is
    /// set.
    pub contained: bool,
}

impl Program {
    /// A guest of `tests/guests` by the name of its source without suffix (C, C++,
    /// Rust), or with suffix for scripts.
    pub fn guest(name: &str) -> Program {
        let mut program = Program {
            path: PathBuf::new(),
            args: Vec::new(),
            env: BTreeMap::new(),
            input: None,
            files: Vec::new(),
            status: 73,
            counts_its_beginnings: true,
            ahead: 0,
            contained: std::env::var_os("CKPT_TEST_CONTAINED").is_some(),
        };
        let source = build::guests_dir().join(name);
        match source.extension().and_then(|e| e.to_str()) {
            Some("py") => program.path = build::find_command("python3"),
            Some("pl") => program.path = build::find_command("perl"),
            Some("sh") => program.path = build::find_command("dash"),
            _ => {
                program.path = build::guest(name);
                let plugin = build::guest("guest_plugin");
                return program.env("GUEST_PLUGIN", plugin.to_str().unwrap());
            }
        }
        let script = build::readable(&source);
        program.args.push(script.to_str().unwrap().to_owned());
        program
    }

    /// Any other program: found in PATH, expected to end with 0.
    pub fn real(command: &str, args: &[&str]) -> Program {
        Program::at(build::find_command(command), args)
    }

    pub fn at(path: PathBuf, args: &[&str]) -> Program {
        Program {
            path,
            args: args.iter().map(|a| (*a).to_owned()).collect(),
            env: BTreeMap::new(),
            input: None,
            files: Vec::new(),
            status: 0,
            counts_its_beginnings: false,
            ahead: 0,
            contained: std::env::var_os("CKPT_TEST_CONTAINED").is_some(),
        }
    }

    pub fn arg(mut self, arg: &str) -> Program {
        self.args.push(arg.to_owned());
        self
    }

    pub fn env(mut self, name: &str, value: &str) -> Program {
        self.env.insert(name.to_owned(), value.to_owned());
        self
    }

    pub fn file(mut self, name: &str, content: impl Into<Vec<u8>>) -> Program {
        self.files.push((name.to_owned(), content.into()));
        self
    }

    pub fn seconds(self, seconds: f64) -> Program {
        self.env("GUEST_SECONDS", &seconds.to_string())
    }

    pub fn input(mut self, input: impl Into<Vec<u8>>) -> Program {
        self.input = Some(input.into());
        self
    }
}

/// One test's private place and what happens in it.
pub struct Trial {
    pub name: String,
    pub dir: PathBuf,
    pub program: Program,
    /// `CKPT_*` for the runs under the library.
    pub ckpt: BTreeMap<String, String>,
    seed: u64,
    history: String,
}

impl Trial {
    pub fn new(program: Program, setting: Setting) -> Trial {
        let name = std::thread::current()
            .name()
            .unwrap_or("trial")
            .replace("::", "-");
        let dir = user::fresh_dir(&name);
        let mut ckpt = BTreeMap::new();
        ckpt.insert("CKPT_DIR".into(), path_text(&dir.join("store")));
        ckpt.insert("CKPT_INTERVAL".into(), "60ms".into());
        // What a guest notes there it has done, whether or not that is taken back.
        ckpt.insert("CKPT_EXCLUDE".into(), path_text(&dir.join("guest.log")));
        ckpt.insert("CKPT_RESTORE".into(), setting.restore.into());
        ckpt.insert("CKPT_SNAPSHOT".into(), setting.snapshot.into());
        ckpt.insert(
            "CKPT_LOG".into(),
            format!("debug:{}", path_text(&dir.join("ckpt.log"))),
        );
        // The whole suite with another tracker than the best one.
        if let Ok(tracker) = std::env::var("CKPT_TEST_TRACKER") {
            ckpt.insert("CKPT_TRACKER".into(), tracker);
        }
        let seed = std::env::var("CKPT_TEST_SEED")
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or_else(|| {
                let now = std::time::SystemTime::now();
                let age = now.duration_since(std::time::UNIX_EPOCH).unwrap();
                age.as_nanos() as u64 ^ u64::from(std::process::id()) << 32
            });
        Trial {
            name,
            dir,
            program,
            ckpt,
            seed,
            history: String::new(),
        }
    }

    pub fn ckpt(mut self, name: &str, value: &str) -> Trial {
        self.ckpt.insert(name.to_owned(), value.to_owned());
        self
    }

    /// A number below `bound`, the next of this trial's seed.
    pub fn random(&mut self, bound: u64) -> u64 {
        self.seed = self.seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.seed;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (x ^ (x >> 31)) % bound
    }

    pub fn note(&mut self, line: impl std::fmt::Display) {
        let _ = writeln!(self.history, "  {line}");
    }

    /// Highest number of a committed generation in this trial's store, 0 for none.
    pub fn generation(&self) -> u64 {
        let jobs = self.dir.join("store/jobs");
        let mut highest = 0;
        for job in read_dir(&jobs) {
            // Not the directories: between the rename and the journal's record a generation
            // can be seen, and a kill then falls back to the one before.
            if let Ok(journal) = Journal::read(&RawFs, &job) {
                highest = highest.max(journal.highest());
            }
        }
        highest
    }

    /// How often the line stands in the guest's log.
    pub fn notes(&self, line: &str) -> usize {
        let log = std::fs::read_to_string(self.dir.join("guest.log")).unwrap_or_default();
        log.lines().filter(|l| *l == line).count()
    }

    /// Starts the program under the library, in the trial's directory.
    pub fn start(&self) -> Started {
        self.start_in("run", &self.preloaded())
    }

    fn preloaded(&self) -> BTreeMap<String, String> {
        let mut env = self.ckpt.clone();
        let mut libraries = path_text(&build::library());
        if let Some(own) = self.program.env.get("LD_PRELOAD") {
            libraries = format!("{libraries}:{own}");
        }
        env.insert("LD_PRELOAD".into(), libraries);
        env
    }

    /// The same, standard input and output to be filled in; for `run::spawn`.
    pub fn prepare(&self) -> std::process::Command {
        let mut env = self.program.env.clone();
        env.insert("GUEST_LOG".into(), path_text(&self.dir.join("guest.log")));
        env.extend(self.preloaded());
        run::prepare(&self.program, &self.dir.join("run"), &env)
    }

    /// Runs the program bare to its end, in a directory of its own.
    pub fn bare(&mut self) -> Life {
        let life = self.start_in("bare", &BTreeMap::new()).end(DEADLINE);
        if life.status != Some(self.program.status) {
            self.fail(&format!("the BARE run ended with {}", life.describe()));
        }
        life
    }

    fn start_in(&self, place: &str, ckpt: &BTreeMap<String, String>) -> Started {
        let mut env = self.program.env.clone();
        let log = if place == "run" {
            "guest.log"
        } else {
            "bare.log"
        };
        env.insert("GUEST_LOG".into(), path_text(&self.dir.join(log)));
        env.extend(ckpt.clone());
        run::start(&self.program, &self.dir.join(place), &env)
    }

    /// Waits until a generation later than `known` is committed.
    pub fn await_generation(&mut self, started: &mut Started, known: u64) -> Option<u64> {
        let limit = Instant::now() + DEADLINE;
        while Instant::now() < limit {
            let now = self.generation();
            if now > known {
                return Some(now);
            }
            if started.has_ended() {
                return None;
            }
            std::thread::sleep(Duration::from_millis(3));
        }
        self.fail(&format!(
            "no generation after {known} was committed in {DEADLINE:?}"
        ))
    }

    /// Waits until main() has begun and one more generation after that: an earlier one
    /// (of an interpreter that was still reading its script, say) may rightly be
    /// followed by a beginning.
    fn await_beginning(&mut self, started: &mut Started) {
        let limit = Instant::now() + DEADLINE;
        while self.notes("begin") == 0 && !started.has_ended() && Instant::now() < limit {
            std::thread::sleep(Duration::from_millis(3));
        }
        // The next one may have begun before the note was written.
        let known = self.generation();
        self.await_generation(started, known);
    }

    /// The oracle: bare once; then killed `kills` times, started again each time, and let
    /// run to its end. Returns how many of the kills hit it alive.
    pub fn survives(mut self, kills: usize) {
        let bare = self.bare();
        let hits = self.kill_and_resume(kills);
        let life = self.finish();
        self.compare(&bare, &life);
        if hits == 0 && kills > 0 {
            self.fail("the program ended before the first kill: this proves nothing");
        }
    }

    /// Starts, kills, starts, kills ...; leaves the program dead.
    pub fn kill_and_resume(&mut self, kills: usize) -> usize {
        for kill in 0..kills {
            let known = self.generation();
            let mut started = self.start();
            if kill == 0 && self.program.counts_its_beginnings {
                self.await_beginning(&mut started);
            }
            // Mostly after something new was committed; now and then at any instant at all,
            // recovery included. Progress is not endangered: the last life is not killed.
            let anywhere = kill > 0 && self.random(4) == 0;
            let known = known.max(self.generation());
            if !anywhere && self.await_generation(&mut started, known).is_none() {
                let life = started.end(DEADLINE);
                self.note(format!(
                    "life {}: ended by itself: {}",
                    kill + 1,
                    life.describe()
                ));
                if life.status != Some(self.program.status) {
                    self.fail("it ended without being killed");
                }
                if kill == 0 {
                    self.fail("it ended before any checkpoint was committed");
                }
                return kill;
            }
            let wait = Duration::from_micros(self.random(150_000));
            std::thread::sleep(wait);
            let whole_group = self.random(3) != 0;
            let life = started.kill(whole_group);
            self.note(format!(
                "life {}: {} (generation {} -> {}, {} killed)",
                kill + 1,
                life.describe(),
                known,
                self.generation(),
                if whole_group {
                    "group"
                } else {
                    "process alone"
                }
            ));
            if life.status.is_some() && life.status != Some(self.program.status) {
                self.fail("it ended by itself before it was killed");
            }
            if life.status.is_some() {
                return kill;
            }
        }
        kills
    }

    /// The last life: started and left alone.
    pub fn finish(&mut self) -> Life {
        self.finish_within(DEADLINE)
    }

    pub fn finish_within(&mut self, limit: Duration) -> Life {
        let life = self.start().end(limit);
        self.note(format!("last life: {}", life.describe()));
        life
    }

    pub fn compare(&mut self, bare: &Life, life: &Life) {
        let said = std::fs::read_to_string(self.dir.join("run/stderr")).unwrap_or_default();
        if let Some(line) = said.lines().find(|line| line.contains("NOT TESTED")) {
            eprintln!("{}: {line}", self.name);
        }
        if life.status != Some(self.program.status) {
            self.fail("the last life's status is wrong");
        }
        let begins = self.notes("begin");
        if self.program.counts_its_beginnings && begins != 1 {
            self.fail(&format!("its beginning ran {begins} times, not once"));
        }
        if life.stdout != bare.stdout {
            let at = life
                .stdout
                .iter()
                .zip(&bare.stdout)
                .take_while(|(a, b)| a == b)
                .count();
            let near = |bytes: &[u8]| {
                String::from_utf8_lossy(&bytes[at.saturating_sub(60)..(at + 60).min(bytes.len())])
                    .into_owned()
            };
            let text = format!(
                "standard output differs from the bare run's at byte {at} ({} and {} bytes)\n  got      {:?}\n  expected {:?}",
                life.stdout.len(),
                bare.stdout.len(),
                near(&life.stdout),
                near(&bare.stdout)
            );
            self.fail(&text);
        }
    }

    /// Panics with everything one needs to look further.
    pub fn fail(&mut self, what: &str) -> ! {
        let mut text = format!(
            "{}: {what}\n  command: {} {}\n  {:?}\n",
            self.name,
            self.program.path.display(),
            self.program.args.join(" "),
            self.ckpt
        );
        text.push_str(&self.history);
        for (name, lines) in [
            ("run/stderr", 15),
            ("bare/stderr", 5),
            ("ckpt.log", 25),
            ("guest.log", 8),
        ] {
            let content = std::fs::read(self.dir.join(name)).unwrap_or_default();
            let content = String::from_utf8_lossy(&content);
            let all: Vec<_> = content.lines().collect();
            let _ = writeln!(text, "-- {name}, last lines:");
            for line in &all[all.len().saturating_sub(lines)..] {
                let _ = writeln!(text, "   {line}");
            }
        }
        let listed = std::process::Command::new(build::command())
            .arg("list")
            .env("CKPT_DIR", self.dir.join("store"))
            .output();
        if let Ok(listed) = listed {
            let _ = writeln!(
                text,
                "-- ckpt list:\n{}{}",
                String::from_utf8_lossy(&listed.stdout),
                String::from_utf8_lossy(&listed.stderr)
            );
        }
        let _ = writeln!(text, "-- directory {}", self.dir.display());
        panic!("{text}");
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if !std::thread::panicking() && std::env::var_os("CKPT_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.dir);
        }
    }
}

fn read_dir(path: &Path) -> Vec<PathBuf> {
    let Ok(entries) = std::fs::read_dir(path) else {
        return Vec::new();
    };
    entries.filter_map(|e| e.ok().map(|e| e.path())).collect()
}

pub fn path_text(path: &Path) -> String {
    path.to_str().expect("a path in UTF-8").to_owned()
}

/// One module per guest, one test per setting: killed three times and resumed.
#[macro_export]
macro_rules! guest_tests {
    ($($test:ident = $guest:literal $([$($arg:literal),*])? $(, $seconds:literal s)? ;)*) => { $(
        mod $test {
            fn program() -> $crate::common::Program {
                let program = $crate::common::Program::guest($guest).seconds(1.2);
                $($(let program = program.arg($arg);)*)?
                $(let program = program.seconds($seconds);)?
                program
            }
            #[test]
            fn lazy_fork() {
                $crate::common::Trial::new(program(), $crate::common::LAZY_FORK).survives(3);
            }
            #[test]
            fn eager_copy() {
                $crate::common::Trial::new(program(), $crate::common::EAGER_COPY).survives(3);
            }
        }
    )* };
}
