//! Somebody else removes, replaces and moves files that the program has modified, before they go
//! back: then the tree is what it was, or, where nobody knows what a file held, nothing has
//! been done at all.

use crate::tree::{Tree, differences, snapshot};
use crate::{Game, ONE, Place, seed};
use ckpt::config::Foreign;
use ckpt::persist::sys::{self, CPath};
use ckpt::persist::table::{self, Record};
use ckpt::persist::undo::{self, Fate, Options, Report, UndoError};
use ckpt::persist::{FileRef, Stat, exclude, recorder};
use std::collections::BTreeSet;
use std::ops::Range;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::{Path, PathBuf};

fn c_path(path: &Path) -> CPath {
    CPath::new(&[path.as_os_str().as_bytes()]).unwrap()
}

pub fn stat_of(path: &Path) -> Stat {
    sys::lstat(&c_path(path)).unwrap()
}

/// Files that the tables know of, where they are now.
fn known_files(game: &Game) -> Vec<PathBuf> {
    let mut known = BTreeSet::new();
    for file in table::list(&game.job).unwrap() {
        for (_, record) in table::read(&file.path).unwrap().unwrap().records {
            match record {
                Record::Inode { stat, .. } if stat.is_regular() => {
                    known.insert(stat.id.ino);
                }
                // No row is about one that was only moved.
                Record::Renamed { moved, other, .. } => {
                    known.insert(moved.inode.id.ino);
                    known.extend(other.iter().map(|other| other.inode.id.ino));
                }
                _ => {}
            }
        }
    }
    let there = snapshot(&game.root).into_keys().map(|p| game.root.join(p));
    let is_known = |path: &PathBuf| {
        let meta = std::fs::symlink_metadata(path).unwrap();
        meta.is_file() && known.contains(&meta.ino())
    };
    there.filter(is_known).collect()
}

/// What somebody else does to a file. The directory's times stay: they are nobody's.
fn vandalise(path: &Path, what: u64, k: usize) {
    let dir = path.parent().unwrap();
    let before = stat_of(dir);
    let other = dir.join(format!("other-{k}"));
    match what {
        0 => std::fs::remove_file(path).unwrap(),
        1 => {
            std::fs::write(&other, "another").unwrap();
            std::fs::rename(&other, path).unwrap();
        }
        _ => std::fs::rename(path, &other).unwrap(),
    }
    sys::set_times(&c_path(dir), before.atime_ns, before.mtime_ns).unwrap();
}

/// Undoes to the oldest generation, killed now and then.
fn go_back(game: &mut Game) -> Result<Report, UndoError> {
    let generation = game.generations[0].0;
    loop {
        let mut left = game.rng.below(60);
        let mut fault = || {
            left = left.checked_sub(1).ok_or(libc::EIO)?;
            Ok(())
        };
        let mut options = Options {
            fault: Some(&mut fault),
            ..Options::default()
        };
        match undo::undo(&game.job, generation, &mut options) {
            Err(UndoError::Failed { errno, .. }) if errno.0 == libc::EIO => {}
            other => return other,
        }
    }
}

/// One trace. Returns what was found of somebody else's, or that nobody knows.
fn trace(files: &Path, store: &Path, seed: u64) -> Option<Report> {
    let root = Place::new(files, "vandals-files");
    let job = Place::new(store, "vandals-job");
    let mut game = Game::new(&root.0, &job.0, seed);
    if files.starts_with("/dev/shm") != store.starts_with("/dev/shm") {
        game = game.without_links();
    }
    game.player.xattrs = false;
    let steps = |game: &mut Game, n: u64| (0..n).for_each(|_| game.player.step());
    steps(&mut game, 50);
    for _ in 0..=game.rng.below(2) {
        game.checkpoint();
        let n = 5 + game.rng.below(40);
        steps(&mut game, n);
    }
    assert_eq!(table::incomplete_reason(), None, "seed {seed}");
    table::alive(sys::realtime_ns());
    game.player.forget_descriptors();
    let mut known = known_files(&game);
    for k in 0..1 + game.rng.below(2) as usize {
        if known.is_empty() {
            break;
        }
        let path = known.remove(game.rng.below(known.len() as u64) as usize);
        // A file with several names, one of them moved, is another matter.
        if stat_of(&path).nlink == 1 {
            let what = game.rng.below(3);
            vandalise(&path, what, k);
        }
    }
    let present = snapshot(&root.0);
    let before = game.dump();
    let want = game.generations[0].1.clone();
    let done = go_back(&mut game);
    let same = |want: &Tree, what: &str| {
        let mut now = snapshot(&root.0);
        if done.is_ok() {
            // Made after the generation, and moved: it is left there.
            now.retain(|path, _| !path.to_string_lossy().contains("other-"));
        }
        let wrong = differences(want, &now);
        if !wrong.is_empty() {
            println!("{before}\nnow {}", game.dump());
        }
        assert!(
            wrong.is_empty(),
            "seed {seed}: {what}: {}",
            wrong.join("\n")
        );
    };
    match &done {
        Ok(report) => {
            same(&want, "gone back");
            let left = std::fs::read_dir(&job.0).unwrap();
            for entry in left {
                let name = entry.unwrap().file_name().into_string().unwrap();
                assert!(!name.starts_with("remade-"), "seed {seed}: {name} is left");
            }
            Some(report.clone())
        }
        Err(UndoError::Lost(..)) => {
            same(&present, "refused");
            None
        }
        Err(error) => {
            println!("{before}\nnow {}", game.dump());
            panic!("seed {seed}: {error}")
        }
    }
}

/// One trace alone.
pub fn play_one(files: &Path, store: &Path, seed: u64) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    trace(files, store, seed);
}

pub fn play(files: &Path, store: &Path, traces: u64) {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let first = seed();
    println!("CKPT_TEST_SEED={first}");
    let (mut again, mut back, mut refused) = (0, 0, 0);
    for k in 0..traces {
        match trace(files, store, first.wrapping_add(k)) {
            None => refused += 1,
            Some(report) => {
                for file in &report.foreign {
                    match file.fate {
                        Fate::Again => again += 1,
                        Fate::Back(_) => back += 1,
                        _ => {}
                    }
                }
            }
        }
    }
    println!("{again} files made again, {back} moved back, {refused} of {traces} refused");
    if std::env::var_os("CKPT_TEST_SEED").is_none() {
        assert!(again > 0 && back > 0 && refused > 0);
    }
}

/// The recorder is told of a write to these bytes, and it is made.
pub fn recorded(path: &Path, stat: &Stat, bytes: Range<u64>, write: impl FnOnce()) {
    let file = FileRef {
        stat,
        path: path.as_os_str().as_bytes(),
        fd: None,
        any_fd: None,
    };
    let _hook = ckpt::agent::state::InHook::enter();
    let mut session = recorder::enter().unwrap();
    session.before_write(&file, bytes.start, bytes.end);
    write();
}

/// A game with `dir/whole`, which was mapped and written after the checkpoint.
fn mapped(root: &Path, job: &Path) -> (Game, Stat) {
    let dir = root.join("dir");
    std::fs::create_dir(&dir).unwrap();
    let path = dir.join("whole");
    std::fs::write(&path, vec![7; 10_000]).unwrap();
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o640);
    std::fs::set_permissions(&path, mode).unwrap();
    let mut game = Game::new(root, job, 1);
    game.checkpoint();
    let stat = stat_of(&path);
    recorded(&path, &stat, 0..10_000, || {
        let open = std::fs::OpenOptions::new().write(true).open(&path).unwrap();
        open.write_all_at(b"after", 5000).unwrap();
    });
    table::alive(sys::realtime_ns());
    (game, stat)
}

pub fn killed_at_each_step() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let tmp = std::env::temp_dir();
    // Once more from the beginning for each step, and once on and on.
    for anew in [true, false] {
        let mut steps = 0;
        loop {
            let root = Place::new(&tmp, "again-files");
            let job = Place::new(&tmp, "again-job");
            let (game, stat) = mapped(&root.0, &job.0);
            std::fs::remove_dir_all(root.0.join("dir")).unwrap();
            let run = |mut steps: u32, foreign| {
                let mut fault = || {
                    steps = steps.checked_sub(1).ok_or(libc::EIO)?;
                    Ok(())
                };
                let needed = [root.0.join("dir/whole").as_os_str().as_bytes().to_vec()];
                let mut options = Options {
                    fault: Some(&mut fault),
                    needed: &needed,
                    foreign,
                    ..Options::default()
                };
                undo::undo(&game.job, 1, &mut options)
            };
            let refused = run(u32::MAX, Foreign::Refuse);
            assert!(matches!(refused, Err(UndoError::Foreign(_))), "{refused:?}");
            let mut done = run(steps, Foreign::Restore);
            let all = done.is_ok();
            let mut more = 0;
            while done.is_err() {
                more += 1;
                done = run(if anew { u32::MAX } else { more }, Foreign::Restore);
                assert!(more < 100, "{done:?}");
            }
            let report = done.unwrap();
            let what: Vec<_> = report.foreign.iter().map(|f| (&f.path, f.what)).collect();
            let (dir, file) = (root.0.join("dir"), root.0.join("dir/whole"));
            assert!(what.contains(&(&file, "removed")), "{what:?}");
            assert!(dir.is_dir());
            assert_eq!(std::fs::read(&file).unwrap(), vec![7; 10_000]);
            let now = stat_of(&file);
            assert_eq!((now.mode, now.mtime_ns), (stat.mode, stat.mtime_ns));
            assert_eq!(report.replaced.get(&stat.id), Some(&now.id));
            // Nothing that was used on the way is left.
            assert_eq!(std::fs::read_dir(&dir).unwrap().count(), 1);
            let left = std::fs::read_dir(&job.0)
                .unwrap()
                .map(|e| e.unwrap().file_name());
            let left: Vec<_> = left.filter_map(|name| name.into_string().ok()).collect();
            let of_undo = |name: &&String| name.starts_with("remade") || name.starts_with("undo-");
            assert!(left.iter().find(of_undo).is_none(), "{left:?}");
            if all || !anew {
                assert!(all || !anew && more > 2, "{steps} {more}");
                println!("{steps} steps, {more} more lives");
                break;
            }
            steps += 1;
            assert!(steps < 100);
        }
    }
}

/// A JVM removes the files in /tmp/hsperfdata_USER of processes that do not run, at any time. One
/// that went after the undo had looked for such changes ended it, and every one after it.
pub fn removed_at_each_step() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    let tmp = std::env::temp_dir();
    let (mut again, mut late) = (0, 0);
    for step in 0.. {
        assert!(step < 100);
        let root = Place::new(&tmp, "vanished-files");
        let job = Place::new(&tmp, "vanished-job");
        let (game, stat) = mapped(&root.0, &job.0);
        let path = root.0.join("dir/whole");
        let mut left = Some(step);
        let mut fault = || {
            let last = left == Some(0);
            left = left.and_then(|left: u32| left.checked_sub(1));
            if last {
                let dir = path.parent().unwrap();
                let before = stat_of(dir);
                std::fs::remove_file(&path).unwrap();
                sys::set_times(&c_path(dir), before.atime_ns, before.mtime_ns).unwrap();
            }
            Ok(())
        };
        let mut options = Options {
            fault: Some(&mut fault),
            ..Options::default()
        };
        let report = undo::undo(&game.job, 1, &mut options);
        let report = report.unwrap_or_else(|error| panic!("step {step}: {error}"));
        let is_gone = left.is_none();
        if !is_gone {
            println!("{step} steps, {again} times made again, {late} times too late");
            assert!(again > 2 && late > 0);
            break;
        }
        if report.foreign.is_empty() {
            // It had gone back already: as if it were removed after the recovery.
            late += 1;
            assert!(!path.exists());
            continue;
        }
        again += 1;
        assert_eq!(late, 0, "step {step}");
        let what: Vec<_> = report.foreign.iter().map(|f| (&f.path, &f.fate)).collect();
        assert_eq!(what, [(&path, &Fate::Again)], "step {step}");
        assert_eq!(std::fs::read(&path).unwrap(), vec![7; 10_000]);
        let now = stat_of(&path);
        assert_eq!((now.mode, now.mtime_ns), (stat.mode, stat.mtime_ns));
        assert_eq!(report.replaced.get(&stat.id), Some(&now.id));
        let left = std::fs::read_dir(&job.0).unwrap();
        let left = left.filter_map(|entry| entry.ok()?.file_name().into_string().ok());
        let left: Vec<String> = left.collect();
        let of_undo = |name: &&String| name.starts_with("remade") || name.starts_with("undo-");
        assert!(left.iter().find(of_undo).is_none(), "step {step}: {left:?}");
    }
}
