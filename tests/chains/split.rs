//! Makes a chain of a full generation, so that restoring and merging chains can be tested
//! whatever tracker the machine has.
//!
//! Each page of the generation goes into one image of the chain at random; the images below
//! that one hold something else for it, or nothing. Pages that the generation does not have
//! are in older images here and there, and dropped by a newer one.

use anyhow::{Context, bail};
use ckpt::image::state::{Base, Extent, Manifest, VmaKind};
use ckpt::image::{ImageWriter, PAGE};
use ckpt::store::generation::{GenerationKind, GenerationRecord, MemberRecord, dir_name};
use ckpt::store::journal::{Journal, Record};
use ckpt::store::{Job, RawFs};
use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::Path;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

/// What one image says of a page.
#[derive(Clone, Copy, PartialEq)]
enum Says {
    Nothing,
    Dropped,
    /// The page as it is at the end.
    Truth,
    /// Something else.
    Other,
}

/// Splits the newest generation of the only job in the store into `links` increments on a
/// full image.
pub fn split(store: &Path, links: u64, seed: u64) -> anyhow::Result<String> {
    split_altered(store, links, seed, &|_| ())
}

/// The same, with something else in its manifest.
pub fn split_altered(
    store: &Path,
    links: u64,
    seed: u64,
    alter: &dyn Fn(&mut Manifest),
) -> anyhow::Result<String> {
    let mut random = Random(seed);
    let jobs: Vec<_> = fs::read_dir(store.join("jobs"))?.collect::<Result<_, _>>()?;
    let dir = jobs.first().context("no job")?.path();
    let job = Job::open(RawFs, dir.clone())?;
    let record = (*job.generations().last().context("no generation")?).clone();
    let newest = record.generation;
    if newest <= links {
        bail!("generation {newest} is too low");
    }
    let found = job.open_generation(&record, true)?;
    let member = found.members.first().context("no member")?;
    let mut manifest = member.image.manifest.clone();
    alter(&mut manifest);
    let files: Vec<File> = member
        .chain()
        .map(|(file, _)| Ok(File::from(file.as_fd().try_clone_to_owned()?)))
        .collect::<anyhow::Result<_>>()?;
    let mut truth: BTreeMap<u64, (usize, u64)> = BTreeMap::new();
    for piece in member.compose()? {
        for k in 0..piece.npages {
            let place = (piece.file as usize, piece.offset + k * PAGE);
            truth.insert(piece.addr + k * PAGE, place);
        }
    }
    // By page: what each image says of it, oldest first.
    let mut said: BTreeMap<u64, Vec<Says>> = BTreeMap::new();
    let mut run = 0;
    let mut says: Vec<Says> = Vec::new();
    for &addr in truth.keys() {
        if run == 0 {
            // Runs of all lengths: what is mapped and what is read.
            let most = [3, 40, 2000][random.below(3) as usize];
            run = 1 + random.below(most);
            let last = random.below(links + 1) as usize;
            says = (0..=links as usize)
                .map(|at| match at.cmp(&last) {
                    std::cmp::Ordering::Equal => Says::Truth,
                    std::cmp::Ordering::Greater => Says::Nothing,
                    _ => [Says::Nothing, Says::Other, Says::Dropped][random.below(3) as usize],
                })
                .collect();
            if says[0] == Says::Dropped {
                says[0] = Says::Nothing;
            }
        }
        run -= 1;
        said.insert(addr, says.clone());
    }
    // Pages that are not there at all.
    for vma in &manifest.memory.vmas {
        let plain = matches!(vma.kind, VmaKind::Anon | VmaKind::Heap);
        let pages = (vma.end - vma.start) / PAGE;
        for _ in 0..(if plain { pages.min(40) } else { 0 }) {
            let addr = vma.start + random.below(pages) * PAGE;
            let mut says = vec![Says::Other];
            let last = 1 + random.below(links) as usize;
            for at in 1..=links as usize {
                says.push(match at.cmp(&last) {
                    std::cmp::Ordering::Equal => Says::Dropped,
                    _ => Says::Nothing,
                });
            }
            said.entry(addr).or_insert(says);
        }
    }
    let mut journal = Journal::default();
    let mut base: Option<Base> = None;
    let scratch = store.join("chain");
    fs::create_dir(&scratch)?;
    for at in 0..=links {
        let generation = newest - links + at;
        let dir = scratch.join(dir_name(generation));
        fs::create_dir(&dir)?;
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(dir.join("member-0.img"))?;
        let mut new = match at == links {
            true => manifest.clone(),
            false => Manifest {
                memory: ckpt::image::state::MemoryState {
                    vmas: manifest.memory.vmas.clone(),
                    ..Default::default()
                },
                ..Default::default()
            },
        };
        for vma in new.memory.vmas.iter_mut().filter(|_| at < links) {
            // Their objects are the newest's alone.
            if let VmaKind::Shared { .. } | VmaKind::PrivateOf { .. } = vma.kind {
                vma.kind = VmaKind::Anon;
            }
        }
        new.memory.extents.clear();
        new.memory.dropped.clear();
        new.memory.base = base;
        let mut writer = ImageWriter::new(file.as_fd(), generation);
        let mut page = [0u8; PAGE as usize];
        let push = |list: &mut Vec<Extent>, vmas: &[_], addr, offset| {
            let _: &[ckpt::image::state::VmaState] = vmas;
            let border = vmas.binary_search_by_key(&addr, |vma| vma.start).is_ok();
            match list.last_mut() {
                Some(last)
                    if !border
                        && last.addr + last.npages * PAGE == addr
                        && last.offset + last.npages * PAGE == offset =>
                {
                    last.npages += 1;
                }
                _ => list.push(Extent {
                    addr,
                    npages: 1,
                    offset,
                }),
            }
        };
        for (&addr, says) in &said {
            match says[at as usize] {
                Says::Nothing => continue,
                Says::Dropped => {
                    new.memory.dropped.push((addr, 1));
                    continue;
                }
                Says::Truth => {
                    let (file, offset) = truth[&addr];
                    files[file].read_exact_at(&mut page, offset)?;
                }
                Says::Other => page.fill(0x5a ^ at as u8),
            }
            let offset = writer.write_pages(&[IoSlice::new(&page)])?;
            push(&mut new.memory.extents, &new.memory.vmas, addr, offset);
        }
        if at == links {
            let shared = new.memory.shared.iter_mut().map(|o| &mut o.extents);
            let contents = new.descriptors.content_extents();
            for extent in shared.chain(contents).flatten() {
                let from = extent.offset;
                for k in 0..extent.npages {
                    files[0].read_exact_at(&mut page, from + k * PAGE)?;
                    let offset = writer.write_pages(&[IoSlice::new(&page)])?;
                    if k == 0 {
                        extent.offset = offset;
                    }
                }
            }
        }
        let written = writer.finish(&new, false)?;
        let record = GenerationRecord {
            generation,
            kind: match base {
                Some(_) => GenerationKind::Increment,
                None => GenerationKind::Full,
            },
            parent: base.map(|base| base.generation),
            members: vec![MemberRecord {
                bytes: written.bytes,
                header_crc: written.header_crc,
                ..record.members[0].clone()
            }],
            merged: None,
            ..record.clone()
        };
        fs::write(dir.join("manifest"), record.to_file()?)?;
        journal.append(&RawFs, &scratch, Record::Committed(record), false)?;
        base = Some(Base {
            generation,
            header_crc: written.header_crc,
        });
    }
    drop(found);
    for (generation, _) in job.directories()? {
        let _ = fs::remove_dir_all(dir.join(dir_name(generation)));
    }
    for entry in fs::read_dir(&scratch)? {
        let entry = entry?;
        fs::rename(entry.path(), dir.join(entry.file_name()))?;
    }
    fs::remove_dir(&scratch)?;
    let again = Job::open(RawFs, dir)?;
    let record = (*again.generations().last().context("no generation")?).clone();
    again.open_generation(&record, true)?;
    Ok(format!(
        "generation {newest} is {} pages in {} images",
        truth.len(),
        links + 1
    ))
}
