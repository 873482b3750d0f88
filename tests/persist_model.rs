//! Model test of the persistent table: random traces of modifications through the
//! recorder and the real system calls, checkpoints and recoveries in between; after
//! each recovery the whole tree must be what it was.
//!
//! `CKPT_TEST_SEED` repeats a trace, `CKPT_TEST_OPERATIONS` makes it longer.

#[path = "persist/ends.rs"]
mod ends;
#[path = "persist/player.rs"]
mod player;
#[path = "persist/stories.rs"]
mod stories;
#[path = "persist/tree.rs"]
mod tree;
#[path = "persist/vandals.rs"]
mod vandals;

use ckpt::persist::undo::{self, Options, UndoError};
use ckpt::persist::{exclude, table};
use player::{Player, Rng};
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use tree::{Tree, differences, snapshot};

/// The recorder is one per process.
static ONE: Mutex<()> = Mutex::new(());

/// So that no table has the number of another game's: the recorder goes by it.
static NUMBERS: AtomicU32 = AtomicU32::new(0);

fn seed() -> u64 {
    let given = std::env::var("CKPT_TEST_SEED").ok();
    given.and_then(|s| s.parse().ok()).unwrap_or_else(|| {
        let now = std::time::SystemTime::now();
        let since = now.duration_since(std::time::UNIX_EPOCH).unwrap();
        since.subsec_nanos().into()
    })
}

fn operations(default: u64) -> u64 {
    let given = std::env::var("CKPT_TEST_OPERATIONS").ok();
    given.and_then(|s| s.parse().ok()).unwrap_or(default)
}

struct Place(PathBuf);

impl Place {
    fn new(parent: &Path, name: &str) -> Place {
        let path = parent.join(format!("ckpt-model-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Place(path)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if std::env::var_os("CKPT_TEST_KEEP").is_none() {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }
}

struct Game {
    root: PathBuf,
    job: PathBuf,
    player: Player,
    rng: Rng,
    seq: u32,
    /// Generations that can be gone back to, with what was there then.
    generations: Vec<(u64, Tree)>,
    seed: u64,
    /// The highest number that a generation has had.
    newest: u64,
    /// How many are kept.
    keep: usize,
    /// Some returns are recorded, and the states that they leave stay.
    returns: bool,
    /// The generation that was gone on from last.
    at: usize,
    /// Recorded returns that were finished, and cut short.
    done: (u32, u32),
}

impl Game {
    fn new(root: &Path, job: &Path, seed: u64) -> Game {
        Game {
            root: root.to_owned(),
            job: job.to_owned(),
            player: Player::new(root, seed),
            rng: Rng(seed.rotate_left(32) | 1),
            seq: NUMBERS.fetch_add(100_000, Ordering::Relaxed),
            generations: Vec::new(),
            seed,
            newest: 0,
            keep: 3,
            returns: false,
            at: 0,
            done: (0, 0),
        }
    }

    fn without_links(mut self) -> Game {
        self.player.links = false;
        self
    }

    fn next_number(&mut self) -> u32 {
        let tables = table::list(&self.job).unwrap();
        let highest = tables.last().map_or(0, |t| t.seq);
        self.seq = self.seq.max(highest) + 1;
        self.seq
    }

    fn with_returns(mut self) -> Game {
        self.keep = 6;
        self.returns = true;
        self
    }

    fn begin_table(&mut self, base: u64) {
        // As the helper's rounds say it of the one that ends.
        table::alive(ckpt::persist::sys::realtime_ns());
        self.next_number();
        let prepared = table::create(&self.job, self.seq, base, false).unwrap();
        table::install(prepared);
        table::close_previous();
    }

    fn checkpoint(&mut self) {
        self.newest += 1;
        self.begin_table(self.newest);
        self.generations.push((self.newest, snapshot(&self.root)));
        if self.generations.len() > self.keep {
            let last = self.generations.len() as u64 - 1;
            let going = match self.returns {
                true => self.rng.below(last) as usize,
                false => 0,
            };
            self.generations.remove(going);
            let kept: Vec<u64> = self.generations.iter().map(|g| g.0).collect();
            let tables = table::list(&self.job).unwrap();
            for old in table::unneeded(&tables, &kept) {
                table::remove(&self.job, old.seq).unwrap();
            }
        }
    }

    /// Undoes to a random generation, dying at random steps on the way.
    fn recover(&mut self, faults: bool) {
        let k = self.rng.below(self.generations.len() as u64) as usize;
        self.recover_to(k, faults);
        let base = self.generations[self.at].0;
        self.player.forget_descriptors();
        self.begin_table(base);
    }

    /// Returns the last sign of life.
    fn recover_to(&mut self, k: usize, faults: bool) -> i64 {
        assert_eq!(table::incomplete_reason(), None, "seed {}", self.seed);
        table::alive(ckpt::persist::sys::realtime_ns());
        let (generation, want) = self.generations[k].clone();
        let tables = table::list(&self.job).unwrap();
        let stays = |g: &(u64, Tree)| table::outlives(&tables, generation, g.0);
        self.generations.retain(stays);
        let here = self.generations.iter().position(|g| g.0 == generation);
        self.at = here.unwrap();
        let before = match std::env::var_os("CKPT_TEST_SEED") {
            Some(_) => self.dump(),
            None => String::new(),
        };
        let alive_ns = loop {
            let mut left = if faults {
                self.rng.below(150)
            } else {
                u64::MAX
            };
            let mut fault = || {
                left = left.checked_sub(1).ok_or(libc::EIO)?;
                Ok(())
            };
            let mut options = Options {
                fault: Some(&mut fault),
                ..Options::default()
            };
            match undo::undo(&self.job, generation, &mut options) {
                Ok(report) => {
                    if !report.foreign.is_empty() {
                        println!("{before}");
                    }
                    assert_eq!(report.foreign, [], "seed {}", self.seed);
                    break report.alive_ns;
                }
                Err(UndoError::Failed { errno, .. }) if errno.0 == libc::EIO => {}
                Err(e) => {
                    println!("{before}\nnow {}", self.dump());
                    panic!("seed {}: {e}", self.seed)
                }
            }
        };
        let got = snapshot(&self.root);
        let wrong = differences(&want, &got);
        if !wrong.is_empty() {
            println!("{before}\nnow {}", self.dump());
        }
        assert!(
            wrong.is_empty(),
            "seed {}: generation {generation}:\n{}",
            self.seed,
            wrong.join("\n")
        );
        alive_ns
    }

    /// Undoes to the oldest generation, dying after so many steps. True: it came to its end,
    /// and the files are right.
    fn undo_for(&self, mut steps: u32) -> bool {
        let (generation, want) = &self.generations[0];
        let mut fault = || {
            steps = steps.checked_sub(1).ok_or(libc::EIO)?;
            Ok(())
        };
        let mut options = Options {
            fault: Some(&mut fault),
            ..Options::default()
        };
        match undo::undo(&self.job, *generation, &mut options) {
            Err(UndoError::Failed { errno, .. }) if errno.0 == libc::EIO => return false,
            other => assert_eq!(other.unwrap().foreign, []),
        }
        let wrong = differences(want, &snapshot(&self.root));
        assert!(wrong.is_empty(), "{}", wrong.join("\n"));
        true
    }

    /// Goes back so that it can be taken back: from a state that is kept as a generation,
    /// to any other. Cut short, any can be gone on from.
    fn go_back_recorded(&mut self, faults: bool) {
        self.checkpoint();
        for _ in 0..self.rng.below(20) {
            self.player.step();
        }
        let alive_ns = self.recover_to(self.generations.len() - 1, faults);
        let left = self.generations[self.at].0;
        let count = self.generations.len();
        assert_eq!(left, self.newest);
        let k = self.rng.below(count as u64) as usize;
        let (to, want) = self.generations[k].clone();
        let number = self.next_number();
        let mut steps = match faults {
            true => self.rng.below(300),
            false => u64::MAX,
        };
        let mut fault = || {
            steps = steps.checked_sub(1).ok_or(libc::EIO)?;
            Ok(())
        };
        let mut options = Options {
            fault: Some(&mut fault),
            ..Options::default()
        };
        let before = match std::env::var_os("CKPT_TEST_SEED") {
            Some(_) => self.dump(),
            None => String::new(),
        };
        let done = undo::go_back_recorded(
            &self.job,
            (left, to),
            (number, false),
            alive_ns,
            &mut options,
        );
        match done {
            Ok(report) => {
                assert_eq!(report.unrecorded, None);
                if !report.foreign.is_empty() {
                    println!("{before}");
                }
                assert_eq!(report.foreign, [], "seed {}", self.seed);
                let wrong = differences(&want, &snapshot(&self.root));
                if !wrong.is_empty() {
                    println!("{before}\nnow {}", self.dump());
                }
                let (seed, wrong) = (self.seed, wrong.join("\n"));
                assert!(wrong.is_empty(), "seed {seed}: back to {to}:\n{wrong}");
                self.player.forget_descriptors();
                self.begin_table(to);
                self.at = k;
                self.done.0 += 1;
            }
            Err(UndoError::Failed { errno, .. }) if errno.0 == libc::EIO => {
                self.done.1 += 1;
                self.recover(faults);
            }
            Err(e) => {
                println!("{before}\nnow {}", self.dump());
                panic!("seed {}: back to {to}: {e}", self.seed)
            }
        }
    }

    /// For a failed trace: the records, and what is there.
    fn dump(&self) -> String {
        let mut text = String::new();
        for file in table::list(&self.job).unwrap() {
            let table = table::read(&file.path).unwrap().unwrap();
            text += &format!("table {} base {}\n", file.seq, file.base);
            for (at, record) in &table.records {
                text += &format!("{at} {record:?}\n");
            }
        }
        for entry in std::fs::read(self.job.join("identities"))
            .unwrap_or_default()
            .chunks(56)
        {
            let word = |at: usize| u64::from_le_bytes(entry[at..at + 8].try_into().unwrap());
            let (old, new) = ((word(8), word(16)), (word(32), word(40)));
            text += &format!("undo of {}: {old:x?} -> {new:x?}\n", word(48));
        }
        for entry in snapshot(&self.root).keys() {
            let path = self.root.join(entry);
            let meta = std::fs::symlink_metadata(&path).unwrap();
            let ino = std::os::unix::fs::MetadataExt::ino(&meta);
            text += &format!("{ino} {}\n", path.display());
        }
        text
    }

    fn run(&mut self, operations: u64, faults: bool) {
        self.checkpoint();
        for _ in 0..operations {
            self.player.step();
            // As the helper's rounds do.
            table::alive(ckpt::persist::sys::realtime_ns());
            match self.rng.below(400) {
                0..=3 => self.checkpoint(),
                4..=6 if !self.returns => self.recover(faults),
                4 => self.recover(faults),
                5..=6 => self.go_back_recorded(faults),
                _ => {}
            }
        }
        self.recover(faults);
    }
}

fn play(files: &Path, store: &Path, name: &str, count: u64, faults: bool) {
    play_with(files, store, name, count, faults, |game| game);
}

fn play_with(
    files: &Path,
    store: &Path,
    name: &str,
    count: u64,
    faults: bool,
    with: impl FnOnce(Game) -> Game,
) -> (u32, u32) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let seed = seed();
    println!("{name}: CKPT_TEST_SEED={seed}");
    let root = Place::new(files, &format!("{name}-files"));
    let job = Place::new(store, &format!("{name}-job"));
    let mut game = Game::new(&root.0, &job.0, seed);
    if files.starts_with("/dev/shm") != store.starts_with("/dev/shm") {
        game = game.without_links();
    }
    let mut game = with(game);
    game.run(operations(count), faults);
    game.done
}

fn play_returns(files: &Path, store: &Path, name: &str, count: u64, faults: bool) {
    let done = play_with(files, store, name, count, faults, Game::with_returns);
    println!("{name}: {} recorded returns, {} cut short", done.0, done.1);
    assert!(done.0 > 0 && (done.1 > 0) == faults, "{done:?}");
}

#[test]
fn recorded_returns() {
    let tmp = std::env::temp_dir();
    play_returns(&tmp, &tmp, "returns", 20_000, false);
}

#[test]
fn recorded_returns_that_are_cut_short() {
    let tmp = std::env::temp_dir();
    play_returns(&tmp, &tmp, "cut", 15_000, true);
}

/// A recovery to where a recorded return has been before, cut short when all is undone and
/// only the table is left to be removed: another has its place by then. What the old one says
/// of files was true before the undo; taken at its word, the next return finds them changed by
/// somebody else.
#[test]
fn a_table_that_is_undone_says_nothing_of_files() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let tmp = std::env::temp_dir();
    let (root, job) = (
        Place::new(&tmp, "undone-files"),
        Place::new(&tmp, "undone-job"),
    );
    let mut game = Game::new(&root.0, &job.0, 5).with_returns();
    let steps = |game: &mut Game| (0..60).for_each(|_| game.player.step());
    let back = |game: &mut Game, left: u64, to: u64| {
        table::alive(ckpt::persist::sys::realtime_ns());
        let number = game.next_number();
        let options = &mut Options::default();
        let ends = (left, to);
        let report = undo::go_back_recorded(&game.job, ends, (number, false), 0, options);
        assert_eq!(report.expect("it goes back").foreign, []);
        game.player.forget_descriptors();
        game.begin_table(to);
    };
    steps(&mut game);
    game.checkpoint();
    steps(&mut game);
    game.checkpoint();
    back(&mut game, 2, 1);
    steps(&mut game);
    let tables = || -> Vec<u32> {
        let list = table::list(&job.0).unwrap();
        list.iter().map(|table| table.seq).collect()
    };
    // Table 3 is the return.
    assert_eq!(tables(), [1, 2, 3, 4]);
    let mut cut = || match tables().len() {
        5 => Err(libc::EIO),
        _ => Ok(()),
    };
    let mut options = Options {
        fault: Some(&mut cut),
        ..Options::default()
    };
    undo::undo(&job.0, 1, &mut options).expect_err("it is cut short");
    assert_eq!(tables(), [1, 2, 3, 4, 5]);
    let report = undo::undo(&job.0, 1, &mut Options::default()).expect("it is finished");
    assert_eq!(report.foreign, []);
    game.player.forget_descriptors();
    game.begin_table(1);
    assert!(!tables().contains(&4), "{:?}", tables());
    game.checkpoint();
    back(&mut game, 3, 2);
    let wrong = differences(&game.generations[1].1, &snapshot(&root.0));
    assert!(wrong.is_empty(), "{wrong:?}");
}

/// Undone a while after the program's end, as most recoveries are: what the undo itself has
/// just modified is not somebody else's.
#[test]
fn an_undo_does_not_take_its_own_work_for_anothers() {
    use ckpt::persist::sys::{self, CPath};
    use ckpt::persist::{FileRef, NameRef, recorder};
    use std::os::unix::ffi::OsStrExt;
    use std::os::unix::fs::FileExt;
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let tmp = std::env::temp_dir();
    let (root, job) = (Place::new(&tmp, "late-files"), Place::new(&tmp, "late-job"));
    let (a, b) = (root.0.join("a"), root.0.join("b"));
    std::fs::write(&a, "before").unwrap();
    let mut game = Game::new(&root.0, &job.0, 1);
    game.checkpoint();
    let stat_of = |path: &Path| {
        let path = CPath::new(&[path.as_os_str().as_bytes()]).unwrap();
        sys::lstat(&path).unwrap()
    };
    let (dir, stat) = (stat_of(&root.0), stat_of(&a));
    let file = FileRef {
        stat: &stat,
        path: a.as_os_str().as_bytes(),
        fd: None,
        any_fd: None,
    };
    let name = NameRef {
        dir: dir.id,
        dir_path: root.0.as_os_str().as_bytes(),
        name: b"b",
    };
    let _hook = ckpt::agent::state::InHook::enter();
    let mut session = recorder::enter().unwrap();
    session.before_link(&file, &name);
    std::fs::hard_link(&a, &b).unwrap();
    session.before_write(&file, 0, 6);
    let written = std::fs::OpenOptions::new().write(true).open(&a).unwrap();
    written.write_all_at(b"after!", 0).unwrap();
    session.touched(&stat_of(&a));
    drop(session);
    table::alive(sys::realtime_ns());
    std::thread::sleep(std::time::Duration::from_millis(3300));
    // Killed behind the first file that it has written, too.
    let mut left = 4;
    let mut fault = || {
        left = u32::checked_sub(left, 1).ok_or(libc::EIO)?;
        Ok(())
    };
    let mut options = Options {
        fault: Some(&mut fault),
        ..Options::default()
    };
    undo::undo(&job.0, 1, &mut options).expect_err("it is cut short");
    let report = undo::undo(&job.0, 1, &mut Options::default()).expect("it is finished");
    assert_eq!(report.foreign, []);
    let wrong = differences(&game.generations[0].1, &snapshot(&root.0));
    assert!(wrong.is_empty(), "{wrong:?}");
}

#[test]
fn random_traces() {
    let tmp = std::env::temp_dir();
    play(&tmp, &tmp, "plain", 60_000, false);
}

#[test]
fn recoveries_that_are_cut_short() {
    let tmp = std::env::temp_dir();
    play(&tmp, &tmp, "faults", 15_000, true);
}

#[test]
fn a_store_on_another_file_system() {
    let tmp = std::env::temp_dir();
    if let Some(shm) = elsewhere() {
        play(&tmp, shm, "copies", 15_000, true);
    }
}

/// `None`: there is no second file system.
fn elsewhere() -> Option<&'static Path> {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        println!("NOT RUN: there is no second file system");
    }
    shm.is_dir().then_some(shm)
}

#[test]
fn recorded_returns_with_a_store_on_another_file_system() {
    let tmp = std::env::temp_dir();
    if let Some(shm) = elsewhere() {
        play_returns(&tmp, shm, "returns-copies", 15_000, false);
    }
}

#[test]
fn recorded_returns_with_a_store_elsewhere_that_are_cut_short() {
    let tmp = std::env::temp_dir();
    if let Some(shm) = elsewhere() {
        play_returns(&tmp, shm, "cut-copies", 15_000, true);
    }
}

/// Tells a story in which a number is used again. Not on file systems that do not use one again.
fn tell_story(name: &str, story: impl Fn(&mut Game) -> bool) {
    let Some(store) = elsewhere() else { return };
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let root = Place::new(&std::env::temp_dir(), &format!("{name}-files"));
    let job = Place::new(store, &format!("{name}-job"));
    let mut game = Game::new(&root.0, &job.0, 1).without_links();
    if !story(&mut game) {
        println!("NOT RUN: this file system does not give a number again");
    }
}

#[test]
fn the_number_of_a_file_is_given_to_a_directory() {
    tell_story("number-file", stories::of_a_file);
}

#[test]
fn the_number_of_a_directory_is_given_to_another() {
    tell_story("number-dir", stories::of_a_directory);
}

#[test]
fn the_number_of_a_file_is_given_away_and_the_undo_is_killed() {
    tell_story("number-killed", stories::and_the_undo_is_killed);
}

#[test]
fn the_number_of_what_changed_places_is_anothers() {
    tell_story("number-exchange", |game| {
        stories::of_an_exchange(game);
        true
    });
}

/// What a copy in the store cannot bring back is told before.
#[test]
fn a_modified_file_is_removed_by_one_of_its_names() {
    for names in [1, 2] {
        tell_story(&format!("names-{names}"), |game| {
            stories::of_a_name(game, names);
            true
        });
    }
}

#[test]
fn files_on_tmpfs() {
    let shm = Path::new("/dev/shm");
    if !shm.is_dir() {
        println!("NOT RUN: there is no tmpfs");
        return;
    }
    play(shm, shm, "tmpfs", 10_000, true);
}

#[test]
fn somebody_else_removes_replaces_and_moves() {
    let tmp = std::env::temp_dir();
    vandals::play(&tmp, &tmp, 150);
}

#[test]
fn somebody_else_and_a_store_elsewhere() {
    let tmp = std::env::temp_dir();
    if let Some(shm) = elsewhere() {
        vandals::play(&tmp, shm, 100);
    }
}

/// What the program has moved, which no row is about, and somebody else has removed or moved on:
/// found out when half was undone (the first; it was made after the generation, so nothing is lost),
/// or half of an exchange stayed where somebody else has put it.
#[test]
fn somebody_else_removes_what_was_only_moved() {
    let tmp = std::env::temp_dir();
    vandals::play_one(&tmp, &tmp, 8_233_856);
    if let Some(shm) = elsewhere() {
        for seed in [314_768_216, 8_233_823] {
            vandals::play_one(&tmp, shm, seed);
        }
    }
}

/// A file that is made again in a directory that is made again, killed at each step.
#[test]
fn making_again_is_killed_at_each_step() {
    vandals::killed_at_each_step();
}

#[test]
fn outputs_with_lines_of_others() {
    ends::cut_off();
    ends::cut_off_and_put_back();
}

#[test]
fn files_vanish_while_they_go_back() {
    vandals::removed_at_each_step();
}
