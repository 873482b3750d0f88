//! The crate in a program of its own (this test binary, started again), bare and under the
//! library. `CKPT_TEST_LIBRARY` names libckpt.so; else the build beside the test is used.

use ckpt_api::{Error, Event, Hold, Keep, Outcome, Rollback};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

fn library() -> PathBuf {
    if let Some(given) = std::env::var_os("CKPT_TEST_LIBRARY") {
        return given.into();
    }
    let me = std::env::current_exe().expect("the test's own path");
    let profile = me.parent().and_then(|deps| deps.parent()).expect("deps");
    let path = profile.join("libckpt.so");
    assert!(
        path.exists(),
        "{} is not built: cargo build -p ckpt-preload",
        path.display()
    );
    path
}

/// Starts the guest `name` of this binary.
fn guest(name: &str, library: Option<&PathBuf>, store: &PathBuf) -> Command {
    let mut command = Command::new(std::env::current_exe().expect("the test's own path"));
    command
        .args([
            name,
            "--exact",
            "--ignored",
            "--nocapture",
            "--test-threads=1",
        ])
        .env("CKPT_DIR", store)
        .env(
            "CKPT_LOG",
            format!("debug:{}", store.with_extension("log").display()),
        )
        .stdin(Stdio::null());
    if let Some(library) = library {
        command.env("LD_PRELOAD", library);
    }
    command
}

fn fresh(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("ckpt-api-{name}-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir_all(&dir).expect("a directory");
    dir.join("store")
}

fn output(command: &mut Command) -> (Option<i32>, String) {
    let done = command.output().expect("the guest runs");
    let text = [done.stdout, done.stderr].concat();
    (
        done.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn without_the_library_every_call_says_so() {
    assert!(!ckpt_api::loaded());
    assert_eq!(ckpt_api::checkpoint(), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::rollback(1), Error::NotLoaded);
    assert_eq!(ckpt_api::exclude("*"), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::redirect("/a", "/b"), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::heartbeat(), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::ready(), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::generation(), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::on(Event::After, || ()), Err(Error::NotLoaded));
    assert_eq!(ckpt_api::include("relative"), Err(Error::Path));
    assert!(ckpt_api::arguments().is_empty());
    let _hold = Hold::new();
    assert!(Error::NotLoaded.to_string().contains("not loaded"));
}

static BEFORE: AtomicU32 = AtomicU32::new(0);
static AFTER: AtomicU32 = AtomicU32::new(0);
static RESTORED: AtomicU32 = AtomicU32::new(0);

/// Checkpoints, sections and events; dies by its own hand, goes on, ends.
#[test]
#[ignore = "a guest of recovery"]
fn guest_recovery() {
    ckpt_api::on(Event::Before, || _ = BEFORE.fetch_add(1, Ordering::SeqCst)).unwrap();
    ckpt_api::on(Event::After, || _ = AFTER.fetch_add(1, Ordering::SeqCst)).unwrap();
    ckpt_api::on(Event::Restored, || {
        _ = RESTORED.fetch_add(1, Ordering::SeqCst)
    })
    .unwrap();
    assert_eq!(ckpt_api::generation(), Ok(None));
    {
        let _one = Hold::new();
        let _two = Hold::default();
        assert_eq!(ckpt_api::checkpoint(), Err(Error::Refused(16)));
        assert!(Error::Refused(16).to_string().contains("critical section"));
    }
    ckpt_api::ready().unwrap();
    ckpt_api::heartbeat().unwrap();
    let words: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
    match ckpt_api::checkpoint_as(3).unwrap() {
        Outcome::Taken => {
            assert_eq!(ckpt_api::generation(), Ok(Some(1)));
            assert_eq!(AFTER.load(Ordering::SeqCst), 1);
            println!("taken");
            std::process::abort();
        }
        Outcome::Restored(value) => {
            assert_eq!(words.concat().len(), 2890);
            let counts = [&BEFORE, &AFTER, &RESTORED].map(|c| c.load(Ordering::SeqCst));
            println!("restored {value} {counts:?} {:?}", ckpt_api::generation());
        }
    }
}

#[test]
fn recovery() {
    let store = fresh("recovery");
    let library = library();
    let (status, text) = output(&mut guest("guest_recovery", Some(&library), &store));
    assert!(
        status.is_none() && text.contains("taken"),
        "{status:?} {text}"
    );
    let mut again = guest("guest_recovery", Some(&library), &store);
    let (status, text) = output(again.env("CKPT_RETURN_VALUE", "42"));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("restored 42 [1, 0, 1] Ok(Some(1))"), "{text}");
    let _ = std::fs::remove_dir_all(store.parent().unwrap());
}

/// Goes back five times; what is kept comes through, what is not does not.
#[test]
#[ignore = "a guest of rollback"]
fn guest_rollback() {
    let tries = Keep::new(0u32);
    let table = Keep::slice(0u8, 10_000);
    let lost = std::cell::Cell::new(0);
    match ckpt_api::checkpoint().unwrap() {
        Outcome::Taken => println!("taken"),
        Outcome::Restored(value) => {
            assert_eq!(value as u32, tries.get() * 10);
            assert_eq!(lost.get(), 0);
            assert_eq!(table.cells()[9_999].get() as u32, tries.get());
        }
    }
    let young = Keep::new(1u64);
    let unknown = Rollback::to(77).go();
    assert_eq!(unknown, Error::Refused(2), "no checkpoint of that id");
    assert_eq!(Rollback::to(0).keep(&young).go(), Error::KeptTooYoung);
    if tries.get() < 5 {
        tries.set(tries.get() + 1);
        table.cells()[9_999].set(tries.get() as u8);
        lost.set(1);
        let value = tries.get() as i32 * 10;
        let error = Rollback::to(0)
            .returning(value)
            .keep(&tries)
            .keep(&table)
            .go();
        panic!("not gone back: {error}");
    }
    println!("end after {} tries", tries.get());
}

#[test]
fn rollback() {
    let store = fresh("rollback");
    let (status, text) = output(&mut guest("guest_rollback", Some(&library()), &store));
    assert_eq!(status, Some(0), "{text}");
    assert!(text.contains("end after 5 tries"), "{text}");
    let _ = std::fs::remove_dir_all(store.parent().unwrap());
}
