//! Damaged stores on a real file system: every byte of every file flipped in turn,
//! every truncation, every file missing. Never a wrong generation, never a panic.

use super::fs::tests::TempDir;
use super::fs::{FileOf, Fs, RawFs};
use super::start::{Start, claim, start};
use super::*;
use crate::config::Resume;
use crate::image::ImageWriter;
use crate::image::check::tests::sample_manifest;
use std::path::Path;

fn commit(job: &mut Job<RawFs>) -> u64 {
    let mut pending = job.begin().unwrap();
    let generation = pending.generation;
    let file = pending.create_member(&RawFs).unwrap();
    let mut writer = ImageWriter::new(FileOf(&RawFs, file), generation);
    let at = writer
        .write_bytes_as_pages(&[generation as u8; 5000])
        .unwrap();
    let mut manifest = sample_manifest(at);
    manifest.process.pid = generation as i32;
    let written = writer.finish(&manifest, false).unwrap();
    let record = GenerationRecord {
        generation,
        members: vec![MemberRecord {
            bytes: written.bytes,
            header_crc: written.header_crc,
            ..Default::default()
        }],
        ..Default::default()
    };
    job.publish(pending, &record).unwrap();
    generation
}

/// The generation that a search finds (0: none, or an error), data verified.
fn found(dir: &Path) -> u64 {
    let job = Job::open(RawFs, dir.to_owned()).unwrap();
    match job.find(Resume::Auto, true) {
        Ok((Some(found), _)) => {
            let generation = found.record.generation;
            assert_eq!(
                found.members[0].image.manifest.process.pid as u64,
                generation
            );
            let mut page = [0u8; 10];
            RawFs
                .read_at(&found.members[0].file, &mut page, 4096)
                .unwrap();
            assert_eq!(page, [generation as u8; 10]);
            generation
        }
        Ok((None, _)) | Err(_) => 0,
    }
}

fn replace(path: &Path, bytes: &[u8]) {
    let (file, _) = RawFs.open_or_create(path).unwrap();
    RawFs.truncate(&file, 0).unwrap();
    RawFs.write_all(&file, bytes, 0).unwrap();
}

#[test]
fn any_damage_leads_to_a_whole_generation() {
    let dir = TempDir::new("damage");
    let mut job = Job::open(RawFs, dir.0.clone()).unwrap();
    commit(&mut job);
    commit(&mut job);
    let newest = "gen-000002";
    for (name, least) in [
        // Damage to the journal can hide a generation, not both of them.
        ("journal".to_owned(), 1),
        (format!("{newest}/manifest"), 1),
        (format!("{newest}/member-0.img"), 1),
    ] {
        let path = dir.0.join(&name);
        let file = RawFs.open(&path).unwrap();
        let good = RawFs.read_all(&file, 1 << 20).unwrap();
        // Every byte of the small files; of the image, which has a test of its own
        // with every byte, a spread.
        let stride = if good.len() > 4000 { 37 } else { 1 };
        for at in (0..good.len()).step_by(stride) {
            let mut bad = good.clone();
            bad[at] ^= 0x10;
            replace(&path, &bad);
            let flipped = found(&dir.0);
            replace(&path, &good[..at]);
            let cut = found(&dir.0);
            for got in [flipped, cut] {
                assert!((least..=2).contains(&got), "{name} byte {at}: {got}");
                if name != "journal" {
                    assert_eq!(got, 1, "{name} byte {at}");
                }
            }
        }
        RawFs.unlink(&path).unwrap();
        assert!(found(&dir.0) >= least);
        replace(&path, &good);
        assert_eq!(found(&dir.0), 2);
    }
    // Another generation's image in its place is noticed.
    let other = RawFs.open(&dir.0.join("gen-000001/member-0.img")).unwrap();
    let other = RawFs.read_all(&other, 1 << 20).unwrap();
    replace(&dir.0.join("gen-000002/member-0.img"), &other);
    assert_eq!(found(&dir.0), 1);
}

#[test]
fn a_start_recovers_what_no_live_process_holds() {
    let root = TempDir::new("start");
    let key = JobKey::named(b"x");
    let me = Owner::current().unwrap();
    let fresh = |busy| match start(&root.0, &key, Resume::Auto, false).unwrap() {
        Start::Fresh { busy: found } => assert_eq!(found, busy),
        Start::Recover(r) => panic!("recovers {}", r.found.record.generation),
    };
    fresh(None);
    assert!(
        RawFs.list(&root.0).unwrap().is_empty(),
        "nothing is written"
    );

    let mut first = claim(&root.0, &key, &me, false).unwrap();
    commit(&mut first.job);
    fresh(Some(me.pid));
    let mut second = claim(&root.0, &key, &me, false).unwrap();
    assert!(second.job.dir.ends_with("x.2"));
    commit(&mut second.job);
    commit(&mut second.job);

    // The first ends well, the second dies: the next start finds `.2`.
    let first_dir = first.job.dir.clone();
    first.remove(&me).unwrap();
    assert!(RawFs.list(&first_dir).is_err());
    fresh(Some(me.pid));
    drop(second);
    let Start::Recover(recovery) = start(&root.0, &key, Resume::Auto, true).unwrap() else {
        panic!("does not recover")
    };
    assert_eq!(recovery.found.record.generation, 2);
    drop(recovery);

    // A process that did not recover it does not touch it, unless it supersedes.
    let other = claim(&root.0, &key, &me, false).unwrap();
    assert_eq!(other.job.dir, first_dir);
    drop(other);
    let never = start(&root.0, &key, Resume::Never, false).unwrap();
    assert!(matches!(never, Start::Fresh { busy: None }));

    let exact = start(&root.0, &key, Resume::Generation(1), false).unwrap();
    assert!(matches!(exact, Start::Recover(r) if r.found.record.generation == 1));
    let error = start(&root.0, &key, Resume::Generation(9), false).unwrap_err();
    assert_eq!(
        error.to_string(),
        "recover job x.2: there is no generation 9 (there are: 1, 2)"
    );
    let error = start(&root.0, &JobKey::named(b"y"), Resume::Id(3), false).unwrap_err();
    assert_eq!(error.to_string(), "recover job y: there is no checkpoint");
}

#[test]
fn a_superseding_start_writes_newer_generations() {
    let root = TempDir::new("supersede");
    let key = JobKey::named(b"x");
    let me = Owner::current().unwrap();
    let mut first = claim(&root.0, &key, &me, false).unwrap();
    commit(&mut first.job);
    drop(first);
    let mut again = claim(&root.0, &key, &me, true).unwrap();
    assert_eq!(commit(&mut again.job), 2);
    assert_eq!(again.job.prune(1, Some(2), 0).unwrap(), [1]);
    assert_eq!(found(&again.job.dir), 2);
}

#[test]
fn a_store_with_nothing_whole_is_an_error_and_not_a_fresh_start() {
    let root = TempDir::new("hopeless");
    let key = JobKey::named(b"x");
    let me = Owner::current().unwrap();
    let mut job = claim(&root.0, &key, &me, false).unwrap();
    commit(&mut job.job);
    replace(&job.job.dir.join("gen-000001/member-0.img"), b"short");
    drop(job);
    let error = start(&root.0, &key, Resume::Auto, false).unwrap_err();
    let line = error.to_string();
    assert!(
        line.contains("none of the 1 generations can be used"),
        "{line}"
    );
    assert!(line.contains("shorter than a header page"), "{line}");
}
