//! Crash safety of the store: every operation of a commit, a prune and a removal is
//! made to fail, to be cut short, or to be the process's last; afterwards the latest
//! generation is the old one or the new one, whole, and the store goes on working.

use super::fault_fs::{CRASHES, Crash, Fault, FaultFs};
use super::fs::{FileOf, Fs};
use super::*;
use crate::config::Resume;
use crate::errno::Errno;
use crate::image::ImageWriter;
use crate::image::state::Manifest;
use std::path::Path;

const DIR: &str = "/ckpt/jobs/x";

fn job(fs: FaultFs) -> Job<FaultFs> {
    Job::open(fs, PathBuf::from(DIR)).unwrap()
}

fn fresh_job() -> Job<FaultFs> {
    let fs = FaultFs::new();
    job::create_dir(&fs, Path::new("/ckpt"), Path::new(DIR)).unwrap();
    job(fs)
}

/// One whole commit; the page data and the manifest name the generation.
fn commit<F: Fs>(job: &mut Job<F>) -> Result<u64, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let mut pending = job.begin().map_err(|e| text(&e))?;
    let generation = pending.generation;
    let written = (|| {
        let file = pending.create_member(&job.fs).map_err(|e| text(&e))?;
        let mut writer = ImageWriter::new(FileOf(&job.fs, file), generation);
        let data = [generation as u8; 100];
        writer.write_bytes_as_pages(&data).map_err(|e| text(&e))?;
        let mut manifest = Manifest::default();
        manifest.process.pid = generation as i32;
        writer.finish(&manifest, true).map_err(|e| text(&e))
    })();
    let written = match written {
        Ok(written) => written,
        Err(error) => {
            pending.abort(&job.fs);
            return Err(error);
        }
    };
    let record = GenerationRecord {
        generation,
        members: vec![MemberRecord {
            bytes: written.bytes,
            header_crc: written.header_crc,
            ..Default::default()
        }],
        ..Default::default()
    };
    job.publish(pending, &record).map_err(|e| text(&e))?;
    Ok(generation)
}

/// The latest generation, everything verified; 0 for none.
fn latest<F: Fs>(job: &Job<F>) -> u64 {
    let (found, _) = job.find(Resume::Auto, true).unwrap();
    let Some(found) = found else { return 0 };
    let generation = found.record.generation;
    assert_eq!(
        found.members[0].image.manifest.process.pid as u64,
        generation
    );
    generation
}

/// Runs `act` with a fault at every one of its operations.
fn at_every_step(
    start: &Job<FaultFs>,
    faults: &[Fault],
    mut act: impl FnMut(&mut Job<FaultFs>) -> bool,
    mut check: impl FnMut(Job<FaultFs>, bool, Fault, usize),
) {
    for &fault in faults {
        let mut step = 1;
        loop {
            let fs = start.fs.clone();
            let mut job = Job {
                fs,
                dir: start.dir.clone(),
                journal: start.journal.clone(),
            };
            job.fs.arm(step, fault);
            let ok = act(&mut job);
            let reached = job.fs.operations() >= step;
            job.fs.disarm();
            check(job, ok, fault, step);
            if !reached {
                assert!(ok);
                break;
            }
            step += 1;
        }
        assert!(step > 3, "the action has steps");
    }
}

#[test]
fn a_commit_that_dies_leaves_the_old_or_the_new() {
    for before in [0, 1, 2] {
        let mut start = fresh_job();
        for _ in 0..before {
            commit(&mut start).unwrap();
        }
        at_every_step(
            &start,
            &[Fault::Kill],
            |job| commit(job).is_ok(),
            |dead, ok, _, step| {
                for crash in CRASHES {
                    let mut next = job(dead.fs.after(crash));
                    let found = latest(&next);
                    let whole = found == before || found == before + 1;
                    assert!(whole, "{crash:?} at {step}: {found}");
                    if ok {
                        assert_eq!(found, before + 1, "{crash:?}: committed is committed");
                    }
                    next.remove_leftovers().unwrap();
                    assert_eq!(latest(&next), found);
                    let new = commit(&mut next).unwrap();
                    assert!(new > found);
                    assert_eq!(latest(&job(next.fs.after(Crash::Power))), new);
                    next.prune(1, Some(new), 0).unwrap();
                    assert_eq!(latest(&next), new);
                }
            },
        );
    }
}

#[test]
fn a_commit_that_fails_leaves_the_old_and_the_next_one_succeeds() {
    let mut start = fresh_job();
    commit(&mut start).unwrap();
    let faults = [
        Fault::Fail(Errno::EIO),
        Fault::Fail(Errno::ENOSPC),
        Fault::Short,
    ];
    at_every_step(
        &start,
        &faults,
        |job| commit(job).is_ok(),
        |mut after, ok, fault, step| {
            // A shortened operation that is no write is no fault at all.
            let expected = if ok { 2 } else { 1 };
            assert_eq!(latest(&after), expected, "{fault:?} at {step}");
            for crash in CRASHES {
                let found = latest(&job(after.fs.after(crash)));
                // Whether an unsynced undoing survives the power is the disk's choice;
                // whole it must be.
                assert!(found == expected || crash != Crash::Process && found == 2);
            }
            let new = commit(&mut after).unwrap();
            assert_eq!(latest(&job(after.fs.after(Crash::Power))), new);
        },
    );
}

/// Two failures: the journal's sync, and the undoing of its record.
#[test]
fn a_journal_that_cannot_be_undone_is_written_anew() {
    let mut start = fresh_job();
    commit(&mut start).unwrap();
    // The last operation of a commit is the journal's sync.
    start.fs.arm(usize::MAX, Fault::Kill);
    let mut counted = job(start.fs.clone());
    commit(&mut counted).unwrap();
    let last = counted.fs.operations();
    let fs = start.fs.clone();
    fs.arm(last, Fault::Kill);
    let mut broken = job(fs);
    assert!(commit(&mut broken).is_err());
    // The disk comes back in the same life.
    broken.fs = broken.fs.after(Crash::Process);
    assert!(latest(&job(broken.fs.clone())) >= 1);
    broken.remove_leftovers().unwrap();
    let new = commit(&mut broken).unwrap();
    assert_eq!(latest(&job(broken.fs.after(Crash::Power))), new);
}

#[test]
fn a_prune_that_dies_keeps_the_latest() {
    let mut start = fresh_job();
    for _ in 0..4 {
        commit(&mut start).unwrap();
    }
    at_every_step(
        &start,
        &[Fault::Kill, Fault::Fail(Errno::EIO)],
        |job| job.prune(1, Some(4), 0).is_ok(),
        |dead, _, _, _| {
            for crash in CRASHES {
                let mut next = job(dead.fs.after(crash));
                assert_eq!(latest(&next), 4);
                next.remove_leftovers().unwrap();
                next.prune(1, Some(4), 0).unwrap();
                assert_eq!(latest(&next), 4);
                assert_eq!(next.generations().len(), 1);
            }
        },
    );
}

#[test]
fn a_removal_that_dies_removes_all_or_nothing() {
    let mut start = fresh_job();
    commit(&mut start).unwrap();
    commit(&mut start).unwrap();
    at_every_step(
        &start,
        &[Fault::Kill],
        |job| job.remove("1-2").is_ok(),
        |dead, _, _, _| {
            for crash in CRASHES {
                let next = job(dead.fs.after(crash));
                let found = latest(&next);
                assert!(found == 0 || found == 2);
                let jobs = Path::new("/ckpt/jobs");
                retention::empty_trash(&next.fs, jobs).unwrap();
                let left = next.fs.list(jobs).unwrap().len();
                assert_eq!(left, usize::from(found != 0));
            }
        },
    );
}
