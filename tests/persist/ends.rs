//! Outputs that others than the recorder's process have appended to: they end where they ended at
//! the generation.

use crate::vandals::{recorded, stat_of};
use crate::{Game, ONE, Place};
use ckpt::persist::exclude;
use ckpt::persist::sys;
use ckpt::persist::table;
use ckpt::persist::undo::{self, Options, OutputEnd, UndoError};
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

const AT_CHECKPOINT: &[u8] = b"at the checkpoint\n";

fn append(path: &Path, text: &[u8]) {
    let mut file = std::fs::OpenOptions::new().append(true).open(path).unwrap();
    file.write_all(text).unwrap();
}

/// A child prints, the program itself, and a child again.
fn print_all(path: &Path) {
    append(path, b"a child\n");
    let stat = stat_of(path);
    recorded(path, &stat, stat.size..stat.size + 4, || {
        append(path, b"own\n")
    });
    append(path, b"another child\n");
    table::alive(sys::realtime_ns());
}

fn end_of(path: &Path) -> OutputEnd {
    let stat = stat_of(path);
    OutputEnd {
        id: stat.id,
        path: path.as_os_str().as_bytes().to_vec(),
        size: stat.size,
    }
}

/// What a table knows is the size at the first modification by its own process, which was not that at
/// the checkpoint: cut off before the undo, the file was made longer by it, with zeros. Killed at
/// each step, and then once more.
pub fn cut_off() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let tmp = std::env::temp_dir();
    for step in 0.. {
        let (root, job) = (Place::new(&tmp, "ends-files"), Place::new(&tmp, "ends-job"));
        let path = root.0.join("out");
        std::fs::write(&path, AT_CHECKPOINT).unwrap();
        let mut game = Game::new(&root.0, &job.0, 1);
        game.checkpoint();
        let ends = [end_of(&path)];
        let inherited = [ends[0].id];
        print_all(&path);
        let run = |steps: u32| {
            let mut steps = steps;
            let mut fault = || {
                steps = steps.checked_sub(1).ok_or(libc::EIO)?;
                Ok(())
            };
            let mut options = Options {
                fault: Some(&mut fault),
                inherited: &inherited,
                ends: &ends,
                ..Options::default()
            };
            undo::undo(&game.job, 1, &mut options)
        };
        let cut_short = match run(step) {
            Ok(_) => false,
            Err(UndoError::Failed { .. }) => true,
            Err(error) => panic!("step {step}: {error}"),
        };
        run(u32::MAX).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), AT_CHECKPOINT, "step {step}");
        if !cut_short {
            assert!(step > 2);
            return;
        }
    }
}

/// A return that is recorded: what is cut off is kept for the way back.
pub fn cut_off_and_put_back() {
    let _one = ONE.lock().unwrap_or_else(|e| e.into_inner());
    exclude::add_rule(false, b"/dev/shm/*");
    let tmp = std::env::temp_dir();
    let (root, job) = (
        Place::new(&tmp, "ends-returned-files"),
        Place::new(&tmp, "ends-returned-job"),
    );
    let path = root.0.join("out");
    std::fs::write(&path, AT_CHECKPOINT).unwrap();
    let mut game = Game::new(&root.0, &job.0, 1).with_returns();
    game.checkpoint();
    let ends = [end_of(&path)];
    print_all(&path);
    let whole = std::fs::read(&path).unwrap();
    game.checkpoint();
    let number = game.next_number();
    let mut options = Options {
        inherited: &[ends[0].id],
        ends: &ends,
        ..Options::default()
    };
    let report = undo::go_back_recorded(&game.job, (2, 1), (number, false), 0, &mut options);
    assert_eq!(report.unwrap().unrecorded, None);
    assert_eq!(std::fs::read(&path).unwrap(), AT_CHECKPOINT);
    game.begin_table(1);
    undo::undo(&game.job, 2, &mut Options::default()).unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), whole);
}
