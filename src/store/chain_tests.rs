//! Chains of images in the store: contents, damage, merging that dies at every step.

use super::fault_fs::{CRASHES, Crash, Fault, FaultFs};
use super::find::{Damage, Verify};
use super::fs::{FileOf, Fs};
use super::*;
use crate::config::Resume;
use crate::errno::Errno;
use crate::image::state::{Base, Extent, Manifest, SharedObject, VmaKind, VmaState};
use crate::image::{ImageWriter, PAGE, ReadAt};
use std::collections::BTreeMap;
use std::io::IoSlice;
use std::path::Path;

const DIR: &str = "/ckpt/jobs/x";
/// The pages of the only area.
const PAGES: u64 = 40;

/// What memory holds: page number and the byte that fills it.
type Model = BTreeMap<u64, u8>;

fn job(fs: FaultFs) -> Job<FaultFs> {
    Job::open(fs, PathBuf::from(DIR)).unwrap()
}

fn fresh_job() -> Job<FaultFs> {
    let fs = FaultFs::new();
    job::create_dir(&fs, Path::new("/ckpt"), Path::new(DIR)).unwrap();
    job(fs)
}

/// Commits a generation: an increment on the newest one, or a full one.
fn commit<F: Fs>(
    job: &mut Job<F>,
    pages: &[(u64, u8)],
    dropped: &[u64],
    full: bool,
) -> Result<u64, String> {
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let parent = job.generations().last().map(|g| (*g).clone());
    let parent = parent.filter(|_| !full);
    let mut pending = job.begin().map_err(|e| text(&e))?;
    let generation = pending.generation;
    let file = pending.create_member(&job.fs).map_err(|e| text(&e))?;
    let mut writer = ImageWriter::new(FileOf(&job.fs, file), generation);
    let mut manifest = Manifest::default();
    manifest.process.pid = generation as i32;
    manifest.memory.vmas.push(VmaState {
        start: 0,
        end: PAGES * PAGE,
        prot: 3,
        kind: VmaKind::Anon,
        flags: 0,
    });
    for &(page, byte) in pages {
        let data = [byte; PAGE as usize];
        let offset = writer.write_pages(&[IoSlice::new(&data)]);
        manifest.memory.extents.push(Extent {
            addr: page * PAGE,
            npages: 1,
            offset: offset.map_err(|e| text(&e))?,
        });
    }
    // Contents of shared objects stand in every generation.
    let data = [generation as u8; PAGE as usize];
    let offset = writer.write_pages(&[IoSlice::new(&data)]);
    manifest.memory.shared.push(SharedObject {
        size: PAGE,
        extents: vec![Extent {
            addr: 0,
            npages: 1,
            offset: offset.map_err(|e| text(&e))?,
        }],
        ..Default::default()
    });
    manifest.memory.base = parent.as_ref().map(|p| Base {
        generation: p.generation,
        header_crc: p.members[0].header_crc,
    });
    manifest.memory.dropped = dropped.iter().map(|page| (page * PAGE, 1)).collect();
    let written = writer.finish(&manifest, true).map_err(|e| text(&e))?;
    let record = GenerationRecord {
        generation,
        kind: match parent {
            Some(_) => GenerationKind::Increment,
            None => GenerationKind::Full,
        },
        parent: parent.map(|p| p.generation),
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

/// The contents of a found generation, every byte verified.
fn contents<F: Fs>(fs: &F, found: &Found<F>) -> Model {
    let member = &found.members[0];
    let generation = found.record.generation;
    let mut model = Model::new();
    let mut page = [0u8; PAGE as usize];
    let files: Vec<&F::File> = member.chain().map(|(file, _)| file).collect();
    for piece in member.compose().unwrap() {
        for k in 0..piece.npages {
            let source = FileOf(fs, files[piece.file as usize]);
            source
                .read_exact_at(&mut page, piece.offset + k * PAGE)
                .unwrap();
            assert!(page.iter().all(|&b| b == page[0]));
            model.insert(piece.addr / PAGE + k, page[0]);
        }
    }
    let shared = &member.image.manifest.memory.shared[0].extents[0];
    let source = FileOf(fs, files[0]);
    source.read_exact_at(&mut page, shared.offset).unwrap();
    assert_eq!(page, [generation as u8; PAGE as usize]);
    model
}

/// The newest generation and its contents; 0 for none.
fn latest<F: Fs>(job: &Job<F>) -> (u64, Model) {
    let (found, _) = job.find(Resume::Auto, true).unwrap();
    let Some(found) = found else {
        return (0, Model::new());
    };
    (found.record.generation, contents(&job.fs, &found))
}

/// Five generations: full, four increments; and what the last holds.
fn chain_of_five() -> (Job<FaultFs>, Model) {
    let mut job = fresh_job();
    let full: Vec<(u64, u8)> = (0..20).map(|page| (page, 1)).collect();
    commit(&mut job, &full, &[], true).unwrap();
    commit(&mut job, &[(3, 2), (30, 2)], &[5], false).unwrap();
    commit(&mut job, &[(3, 3), (4, 3), (31, 3)], &[30], false).unwrap();
    commit(&mut job, &[], &[], false).unwrap();
    commit(&mut job, &[(5, 5), (19, 5)], &[0, 1], false).unwrap();
    let mut model: Model = full.into_iter().collect();
    model.extend([(3, 3), (4, 3), (31, 3), (5, 5), (19, 5)]);
    model.retain(|page, _| ![0, 1].contains(page));
    (job, model)
}

fn merge<F: Fs>(job: &mut Job<F>, generation: u64) -> Result<generation::Merged, MergeError> {
    let mut merge = job.begin_merge(generation)?;
    loop {
        match merge.slice(&job.fs) {
            Ok(true) => return merge.finish(job, 9),
            Ok(false) => {}
            Err(error) => {
                merge.abort(&job.fs);
                return Err(error);
            }
        }
    }
}

#[test]
fn a_chain_holds_what_the_rule_says() {
    let (job, model) = chain_of_five();
    assert_eq!(latest(&job), (5, model));
    let generations = job.generations();
    let found = job.open_generation(generations[2], true).unwrap();
    let chain: Vec<u64> = found.members[0]
        .older
        .iter()
        .map(|l| l.generation)
        .collect();
    assert_eq!(chain, [2, 1]);
    let contents = contents(&job.fs, &found);
    assert_eq!((contents[&3], contents.get(&30)), (3, None));
    assert_eq!((contents[&31], contents[&19]), (3, 1));
}

#[test]
fn damage_in_a_chain_names_the_generation_and_leads_to_an_older_one() {
    for (name, found) in [("gen-000003", 2), ("gen-000001", 0)] {
        let (job, _) = chain_of_five();
        let path = Path::new(DIR).join(name).join("member-0.img");
        let file = job.fs.open(&path).unwrap();
        let mut byte = [0];
        job.fs.read_at(&file, &mut byte, PAGE).unwrap();
        job.fs.write_all(&file, &[byte[0] ^ 1], PAGE).unwrap();
        match job.find(Resume::Auto, true) {
            Ok((Some(good), skipped)) => {
                assert_eq!(good.record.generation, found);
                assert_eq!(skipped[0].generation, 5);
                let text = skipped[0].to_string();
                assert!(text.contains("it stands on generation 3"), "{text}");
            }
            other => assert!(found == 0 && other.is_err()),
        }
        // Without reading the data nothing is noticed: as for a full image.
        assert_eq!(
            job.find(Resume::Auto, false)
                .unwrap()
                .0
                .unwrap()
                .record
                .generation,
            5
        );
        // Its own data is sound.
        let newest = job.generations()[4].clone();
        assert!(
            job.open_with_progress(&newest, Verify::Own, |_, _| {})
                .is_ok()
        );
        assert!(
            job.open_with_progress(&newest, Verify::Chain, |_, _| {})
                .is_err()
        );
    }
}

#[test]
fn a_base_that_is_gone_or_another_is_noticed() {
    let (mut job, _) = chain_of_five();
    let newest = job.generations()[4].clone();
    job.remove_generation(2, 0).unwrap();
    let error = job.open_generation(&newest, false).unwrap_err();
    assert_eq!(error, Damage::NoBase(2));
    let (found, _) = job.find(Resume::Auto, false).unwrap();
    assert_eq!(found.unwrap().record.generation, 1);

    // Another generation of the same number in its place.
    let (job_a, _) = chain_of_five();
    let mut other = fresh_job();
    commit(&mut other, &[(1, 77)], &[], true).unwrap();
    let image = "gen-000001/member-0.img";
    let from = other.fs.open(&Path::new(DIR).join(image)).unwrap();
    let bytes = other.fs.read_all(&from, 1 << 20).unwrap();
    let to = job_a.fs.open(&Path::new(DIR).join(image)).unwrap();
    job_a.fs.truncate(&to, 0).unwrap();
    job_a.fs.write_all(&to, &bytes, 0).unwrap();
    assert!(job_a.find(Resume::Auto, false).is_err());
}

#[test]
fn merging_changes_nothing_but_the_chain() {
    let (mut job, model) = chain_of_five();
    let merged = merge(&mut job, 5).unwrap();
    assert_eq!(latest(&job), (5, model.clone()));
    let newest = job.generations()[4].clone();
    assert_eq!(newest.needs(), None);
    assert_eq!(newest.stored_now(), merged.members[0].bytes);
    let gen5 = Path::new(DIR).join("gen-000005");
    let names = job.fs.list(&gen5).unwrap();
    let names: Vec<_> = names
        .iter()
        .map(|e| String::from_utf8_lossy(&e.name))
        .collect();
    assert_eq!(names, ["manifest", "member-0.full"]);
    // Increments that stand on the increment that it was stand on it as before.
    commit(&mut job, &[(7, 6)], &[19], false).unwrap();
    let mut after = model;
    after.insert(7, 6);
    after.remove(&19);
    assert_eq!(job.prune(2, Some(6), 0).unwrap(), [1, 2, 3, 4]);
    assert_eq!(latest(&job), (6, after.clone()));
    job.remove_leftovers().unwrap();
    assert_eq!(
        latest(&super::chain_tests::job(job.fs.clone())),
        (6, after.clone())
    );
    assert!(matches!(merge(&mut job, 5), Err(MergeError::Complete(5))));
    merge(&mut job, 6).unwrap();
    assert_eq!(latest(&job), (6, after));
    assert_eq!(job.prune(1, Some(6), 0).unwrap(), [5]);
}

#[test]
fn merging_notices_damage() {
    let (mut job, _) = chain_of_five();
    let path = Path::new(DIR).join("gen-000001/member-0.img");
    let file = job.fs.open(&path).unwrap();
    job.fs.write_all(&file, &[0xee], PAGE + 7 * PAGE).unwrap();
    assert!(matches!(merge(&mut job, 5), Err(MergeError::Image { .. })));
    assert_eq!(job.generations()[4].needs(), Some(4));
    job.remove_leftovers().unwrap();
}

#[test]
fn a_merge_that_became_pointless_is_dropped() {
    let (mut job, _) = chain_of_five();
    let mut merge = job.begin_merge(5).unwrap();
    assert!(merge.slice(&job.fs).unwrap());
    commit(&mut job, &[(1, 1)], &[], true).unwrap();
    job.prune(1, Some(6), 0).unwrap();
    assert!(matches!(
        merge.finish(&mut job, 0),
        Err(MergeError::Gone(5))
    ));
    assert_eq!(latest(&job).0, 6);
}

/// The journal that made the merge count is lost, or only that record of it.
#[test]
fn a_merged_generation_survives_the_loss_of_the_journal() {
    for cut in [true, false] {
        let (mut job, model) = chain_of_five();
        let path = Path::new(DIR).join("journal");
        let file = job.fs.open(&path).unwrap();
        let before = job.fs.len(&file).unwrap();
        merge(&mut job, 5).unwrap();
        job.fs
            .truncate(&file, if cut { before } else { 0 })
            .unwrap();
        let again = super::chain_tests::job(job.fs.clone());
        assert_eq!(latest(&again), (5, model.clone()));
        again.remove_leftovers().unwrap();
        assert_eq!(latest(&again), (5, model));
    }
}

/// Kills and failures at every step of a merge and of the pruning behind it: the newest
/// generation stays what it was, and the next life can go on, merge again, and prune.
#[test]
fn a_merge_that_dies_leaves_the_newest_generation_whole() {
    let (start, model) = chain_of_five();
    for fault in [
        Fault::Kill,
        Fault::Fail(Errno::ENOSPC),
        Fault::Fail(Errno::EIO),
        Fault::Short,
    ] {
        let mut step = 1;
        loop {
            let mut dead = Job {
                fs: start.fs.clone(),
                dir: start.dir.clone(),
                journal: start.journal.clone(),
            };
            dead.fs.arm(step, fault);
            let merged = merge(&mut dead, 5).is_ok();
            let pruned = merged && dead.prune(1, Some(5), 0).is_ok();
            let reached = dead.fs.operations() >= step;
            dead.fs.disarm();
            if fault != Fault::Kill {
                // The same life goes on.
                assert_eq!(latest(&dead), (5, model.clone()), "{fault:?} at {step}");
                if !merged {
                    commit(&mut dead, &[(9, 9)], &[], false).unwrap();
                    let mut more = model.clone();
                    more.insert(9, 9);
                    assert_eq!(latest(&dead), (6, more.clone()));
                    merge(&mut dead, 6).unwrap();
                    dead.prune(1, Some(6), 0).unwrap();
                    assert_eq!(latest(&dead), (6, more));
                }
            } else {
                for crash in CRASHES {
                    let mut next = job(dead.fs.after(crash));
                    assert_eq!(latest(&next), (5, model.clone()), "{crash:?} at {step}");
                    // A kill between two removals left increments without what they stood on,
                    // and `ckpt list` called them damaged.
                    let listed: Vec<u64> =
                        next.generations().iter().map(|g| g.generation).collect();
                    for record in next.generations() {
                        let needs = record.needs();
                        let there = needs.is_none_or(|needs| listed.contains(&needs));
                        assert!(
                            there,
                            "{} needs {needs:?}: {crash:?} at {step}",
                            record.generation
                        );
                    }
                    next.remove_leftovers().unwrap();
                    assert_eq!(latest(&next), (5, model.clone()), "{crash:?} at {step}");
                    match merge(&mut next, 5) {
                        Ok(_) | Err(MergeError::Complete(5)) => {}
                        Err(error) => panic!("{crash:?} at {step}: {error}"),
                    }
                    next.prune(1, Some(5), 0).unwrap();
                    assert_eq!(latest(&next), (5, model.clone()), "{crash:?} at {step}");
                    let left: Vec<u64> = next.generations().iter().map(|g| g.generation).collect();
                    assert_eq!(left, [5]);
                    let last = job(next.fs.after(Crash::Power));
                    assert_eq!(latest(&last), (5, model.clone()), "{crash:?} at {step}");
                }
            }
            if !reached {
                assert!(pruned);
                break;
            }
            step += 1;
        }
        assert!(step > 10, "the merge has steps");
    }
}
