//! A job survives a reboot and another kernel (issue lines "time", "vdso"): clocks that count from
//! the machine's start go on, and calls of the old kernel's vdso are led to the present one's.
//!
//! A time namespace in which the machine has been up for long plays the time before the
//! reboot; another kernel's vdso is made of this one's: in the image its functions trap.

mod common;

#[path = "chains/split.rs"]
#[allow(dead_code)]
mod split;

use ckpt::agent::vdso;
use ckpt::image::state::Manifest;
use common::*;
use std::time::Duration;

/// So long, in seconds, the machine had been up. The guests let no clock leap by 100.
const UP: u64 = 1_000_000;
/// And in between, on a third machine.
const LESS: u64 = 300_000;

/// Without time namespaces nothing here can be tried.
fn impossible() -> bool {
    let mut command = std::process::Command::new("cat");
    command.arg("/proc/uptime");
    run::be_ahead(&mut command, UP);
    let output = command.output();
    let text = output.map(|o| String::from_utf8_lossy(&o.stdout).into_owned());
    let up = text
        .as_ref()
        .ok()
        .and_then(|text| text.split('.').next()?.parse::<u64>().ok());
    let works = up.is_some_and(|up| up >= UP);
    if !works {
        eprintln!(
            "SKIPPED: THE CLOCKS OVER A REBOOT ARE NOT TESTED: no time namespace can be entered here ({text:?}; root and Linux 6.1 are needed)"
        );
    }
    !works
}

/// Lives on machines that have been up for so long; the last is left alone.
fn lives(mut trial: Trial, up: &[u64], expected: Option<&str>) {
    let bare = expected.is_none().then(|| trial.bare());
    let (last, killed) = up.split_last().expect("lives");
    let mut hits = 0;
    for &up in killed {
        trial.program.ahead = up;
        hits += trial.kill_and_resume(1);
    }
    trial.program.ahead = *last;
    let life = trial.finish();
    match (&bare, expected) {
        (Some(bare), _) => trial.compare(bare, &life),
        (None, text) => {
            let said = String::from_utf8_lossy(&life.stdout).into_owned();
            if life.status != Some(trial.program.status) || Some(said.as_str()) != text {
                trial.fail(&format!("{}, it said {said:?}", life.describe()));
            }
        }
    }
    if hits < killed.len() {
        trial.fail(&format!("only {hits} kills hit it: this proves too little"));
    }
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    if !log.contains("the program's clock goes on, ") {
        trial.fail("its clock was not behind at any restart: this proves nothing");
    }
}

fn guest(arg: Option<&str>, seconds: f64) -> Program {
    let program = Program::guest("time_reboot").seconds(seconds);
    match arg {
        Some(arg) => program.arg(arg),
        None => program,
    }
}

fn reboots(arg: Option<&str>, setting: Setting, up: &[u64]) {
    if !impossible() {
        lives(
            Trial::new(guest(arg, 2.0 * up.len() as f64), setting),
            up,
            None,
        );
    }
}

#[test]
fn reboot_lazy_fork() {
    reboots(None, LAZY_FORK, &[UP, 0, 0]);
}

#[test]
fn reboot_eager_copy() {
    reboots(None, EAGER_COPY, &[UP, 0, 0]);
}

/// A thread that does nothing but read the clock is mostly amid the vdso when it is stopped.
#[test]
fn reboot_of_a_program_that_only_reads_the_clock() {
    reboots(Some("spin"), LAZY_FORK, &[UP, 0, 0]);
}

/// Three machines, and back; increments and rewritten images in between.
#[test]
fn several_machines() {
    reboots(Some("spin"), LAZY_FORK, &[UP, LESS, 0, LESS, 0]);
}

#[test]
fn several_machines_eager_copy() {
    reboots(None, EAGER_COPY, &[UP, 0, LESS, 0]);
}

/// Every tracker must know that the led vdso is not what the image has.
#[test]
fn several_machines_mprotect() {
    if !impossible() {
        let trial = Trial::new(guest(None, 7.0), LAZY_FORK).ckpt("CKPT_TRACKER", "mprotect");
        lives(trial, &[UP, LESS, 0, 0], None);
    }
}

#[test]
fn twenty_kills() {
    if !impossible() {
        let later = (0..20).map(|k| [0, LESS, 0, 0, LESS][k % 5]);
        let up: Vec<u64> = std::iter::once(UP).chain(later).collect();
        lives(Trial::new(guest(None, 24.0), LAZY_FORK), &up, None);
    }
}

#[test]
fn python() {
    if !impossible() {
        let program = Program::guest("time_reboot.py").seconds(6.0);
        lives(Trial::new(program, LAZY_FORK), &[UP, 0, LESS, 0], None);
    }
}

/// Whose new starts cannot have the old ids: those are translated as well.
#[test]
fn an_ordinary_user() {
    if impossible() {
        return;
    }
    // SAFETY: before anything else runs in this process, which is this test's alone.
    unsafe { std::env::set_var("CKPT_TEST_USER", "nobody") };
    lives(
        Trial::new(guest(None, 7.0), LAZY_FORK),
        &[UP, 0, LESS, 0],
        None,
    );
}

/// Back to a checkpoint that was taken before the reboot, and to one of the same life.
#[test]
fn rollback_after_a_reboot() {
    for setting in [LAZY_FORK, EAGER_COPY] {
        if impossible() {
            return;
        }
        let trial = Trial::new(Program::guest("roll_clock"), setting);
        lives(trial, &[UP, 0, 0], Some("10 rollbacks\n"));
    }
}

/// Programs whose clock is not behind pay nothing: nothing is led anywhere.
#[test]
fn without_a_reboot_nothing_changes() {
    let mut trial = Trial::new(guest(None, 2.0), LAZY_FORK);
    let bare = trial.bare();
    trial.kill_and_resume(2);
    let life = trial.finish();
    trial.compare(&bare, &life);
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    if log.contains("vdso") || log.contains("clock goes on") {
        trial.fail("the vdso was led elsewhere");
    }
}

/// The image of another kernel: its vdso's functions trap, its digest is another one.
fn of_another_kernel(manifest: &mut Manifest) {
    manifest.identity.vdso ^= 0x5555;
    manifest.identity.kernel = "another one".into();
    let clock = &mut manifest.clock;
    assert!(!clock.amid, "a thread was stopped amid the vdso");
    if clock.led {
        // Its memory leads to the one before; that one is gone.
        return;
    }
    for f in vdso::functions(&clock.vdso).expect("a vdso") {
        clock.vdso[f.at as usize..(f.at + f.size) as usize].fill(0xcc);
    }
}

fn other_kernels(program: Program, setting: Setting, up: [u64; 3]) {
    let mut trial = Trial::new(program, setting)
        .ckpt("CKPT_INTERVAL", "40ms")
        .ckpt("CKPT_TRACKER", "full");
    let bare = trial.bare();
    for up in &up[..2] {
        trial.program.ahead = *up;
        let mut started = trial.start();
        let mut known = trial.generation();
        while known < 3 || trial.notes("begin") == 0 {
            match trial.await_generation(&mut started, known) {
                Some(generation) => known = generation,
                None => trial.fail("it ended too early"),
            }
        }
        trial.await_generation(&mut started, known);
        std::thread::sleep(Duration::from_millis(20));
        started.kill(true);
        let seed = trial.random(u64::MAX) | 1;
        let store = trial.dir.join("store");
        match split::split_altered(&store, 1, seed, &of_another_kernel) {
            Ok(text) => trial.note(text),
            Err(error) => trial.fail(&format!("{error:#}")),
        }
    }
    trial.program.ahead = up[2];
    let life = trial.finish();
    trial.compare(&bare, &life);
    let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
    let led = log
        .matches("the vdso of another kernel: calls are led to this one's")
        .count();
    if led != 2 {
        trial.fail(&format!("the vdso was led {led} times, not twice"));
    }
}

/// Twice, so that the second finds a vdso that is memory already.
#[test]
fn another_kernel_lazy_fork() {
    other_kernels(guest(Some("spin"), 6.0), LAZY_FORK, [0; 3]);
}

#[test]
fn another_kernel_eager_copy() {
    other_kernels(guest(None, 7.0), EAGER_COPY, [0; 3]);
}

#[test]
fn another_kernel_python() {
    let program = Program::guest("time_reboot.py").seconds(6.0);
    other_kernels(program, LAZY_FORK, [0; 3]);
}

/// What a kernel update is.
#[test]
fn another_kernel_and_a_reboot() {
    if !impossible() {
        other_kernels(guest(Some("spin"), 6.0), LAZY_FORK, [UP, LESS, 0]);
    }
}

/// A generation with a thread amid the vdso is passed over; with none left that is said.
#[test]
fn a_thread_amid_the_vdso() {
    let mut trial = Trial::new(guest(None, 7.0), LAZY_FORK)
        .ckpt("CKPT_INTERVAL", "40ms")
        .ckpt("CKPT_TRACKER", "full");
    let mut started = trial.start();
    let mut known = trial.generation();
    while known < 3 || trial.notes("begin") == 0 {
        match trial.await_generation(&mut started, known) {
            Some(generation) => known = generation,
            None => trial.fail("it ended too early"),
        }
    }
    started.kill(true);
    let altered = split::split_altered(&trial.dir.join("store"), 1, 5, &|manifest| {
        of_another_kernel(manifest);
        manifest.clock.amid = true;
    });
    altered.expect("split");
    let life = trial.finish();
    let said = std::fs::read_to_string(trial.dir.join("run/stderr")).unwrap_or_default();
    let reason = "a thread was just reading the clock, and kernel or clock are others now";
    if life.status != Some(125) || !said.contains(reason) {
        trial.fail(&format!("{}: {said}", life.describe()));
    }
}
