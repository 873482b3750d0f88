//! Small traces in which an inode's number is given to a directory, step by step: something is
//! removed, its number goes to a directory of its name, which is moved away and removed. The undo
//! makes the directory anew, moves it back to the name, and must not take it for what was there.
//!
//! The store is on another file system, so that nothing keeps a file's number from being used
//! again. All return false where the number was not given to a directory.

use crate::Game;
use ckpt::persist::sys::{self, CPath};
use ckpt::persist::{FileRef, recorder, table};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::path::Path;

fn number(path: &Path) -> u64 {
    let path = CPath::new(&[path.as_os_str().as_bytes()]).unwrap();
    sys::lstat(&path).unwrap().id.ino
}

/// Makes directories until one has the number; the others stay. False: none had.
fn directory_of_number(game: &mut Game, at: &Path, ino: u64) -> bool {
    for k in 0..64 {
        game.player.mkdir_at(at);
        if number(at) == ino {
            return true;
        }
        let aside = game.root.join(format!("aside-{k}"));
        game.player.rename_at(at, &aside);
    }
    false
}

/// What was at `at` at the checkpoint is gone, and so is a directory of its number.
fn number_given_again(game: &mut Game, at: &Path) -> bool {
    let ino = number(at);
    match at.is_dir() {
        true => game.player.rmdir_at(at),
        false => game.player.remove_at(at),
    }
    if !directory_of_number(game, at, ino) {
        return false;
    }
    let moved = game.root.join("moved");
    game.player.rename_at(at, &moved);
    game.player.rmdir_at(&moved);
    true
}

pub fn of_a_file(game: &mut Game) -> bool {
    let file = game.root.join("file");
    game.player.symlink_at("target", &file);
    game.checkpoint();
    let told = number_given_again(game, &file);
    if told {
        game.recover_to(0, false);
    }
    told
}

/// The first directory's mode and times are not the second one's.
pub fn of_a_directory(game: &mut Game) -> bool {
    let dir = game.root.join("dir");
    game.player.mkdir_at(&dir);
    let mode = std::os::unix::fs::PermissionsExt::from_mode(0o710);
    std::fs::set_permissions(&dir, mode).unwrap();
    game.checkpoint();
    let told = number_given_again(game, &dir);
    if told {
        game.recover_to(0, false);
    }
    told
}

/// The undo is killed again and again, a step further on each time.
pub fn and_the_undo_is_killed(game: &mut Game) -> bool {
    let file = game.root.join("file");
    game.player.symlink_at("target", &file);
    game.checkpoint();
    if !number_given_again(game, &file) {
        return false;
    }
    let mut steps = 0;
    while !game.undo_for(steps) {
        steps += 1;
    }
    assert!(steps > 3, "{steps}");
    true
}

/// A new file changes places with one that existed, and is removed, which needs no record. Later
/// tables have had its number to do with too, for another file, of which an undo made what has
/// the number of the one that existed: that was taken for the new one, in its place already, and
/// removed with the name.
pub fn of_an_exchange(game: &mut Game) {
    let (old, new) = (game.root.join("old"), game.root.join("new"));
    game.player.symlink_at("target", &old);
    game.checkpoint();
    game.player.symlink_at("another", &new);
    let (made, existed) = (number(&new), number(&old));
    game.player.exchange_at(&new, &old);
    game.player.remove_at(&old);
    // The one that existed was made anew itself since. Without births, as where there are none.
    let dev = std::os::unix::fs::MetadataExt::dev(&std::fs::metadata(&game.root).unwrap());
    let own = u64::from(game.seq);
    let notes = [(made, own + 1), (existed, own)];
    let notes = notes.map(|(old, table)| [dev, old, 0, dev, existed, 0, table]);
    let notes = notes.iter().flatten().flat_map(|word| word.to_le_bytes());
    let notes: Vec<u8> = notes.collect();
    std::fs::write(game.job.join("identities"), notes).unwrap();
    game.recover_to(0, false);
}

/// A file with one name, or two, is modified and removed by the one that is known. With two it
/// lives on where nobody knows of it, and its copy would not be what comes back there.
pub fn of_a_name(game: &mut Game, names: u32) {
    let file = game.root.join("file");
    std::fs::write(&file, vec![7; 10_000]).unwrap();
    if names == 2 {
        std::fs::hard_link(&file, game.root.join("other")).unwrap();
    }
    game.checkpoint();
    let path = CPath::new(&[file.as_os_str().as_bytes()]).unwrap();
    let stat = sys::lstat(&path).unwrap();
    let reference = FileRef {
        stat: &stat,
        path: path.bytes(),
        fd: None,
        any_fd: None,
    };
    {
        let _hook = ckpt::agent::state::InHook::enter();
        let mut session = recorder::enter().unwrap();
        session.before_write(&reference, 0, 4096);
        let open = std::fs::OpenOptions::new().write(true).open(&file);
        open.unwrap().write_all_at(&[8; 4096], 0).unwrap();
    }
    game.player.remove_at(&file);
    assert_eq!(table::incomplete_reason().is_some(), names == 2);
    if names == 1 {
        game.recover_to(0, false);
    }
}
