//! Changes what the newest generation of a store says of itself, checksums and all: as if
//! it had been taken elsewhere.

use anyhow::Context;
use ckpt::image::state::Manifest;
use ckpt::image::{Image, ImageWriter, PAGE};
use ckpt::store::generation::{GenerationRecord, dir_name};
use ckpt::store::journal::{Journal, Record};
use ckpt::store::{Job, RawFs};
use std::fs::{self, File};
use std::io::IoSlice;
use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// The directory of the only job in the store.
pub fn job(store: &Path) -> anyhow::Result<PathBuf> {
    let jobs: Vec<_> = fs::read_dir(store.join("jobs"))?.collect::<Result<_, _>>()?;
    Ok(jobs.first().context("no job")?.path())
}

/// The newest generation's image, complete ones only.
pub fn newest_image(store: &Path) -> anyhow::Result<PathBuf> {
    let dir = job(store)?;
    let open = Job::open(RawFs, dir.clone())?;
    let generations = open.generations();
    let newest = generations.last().context("no generation")?.generation;
    Ok(dir.join(dir_name(newest)).join("member-0.img"))
}

/// Where an image's page data stands: `(offset, length)`.
pub fn data(image: &Path) -> anyhow::Result<(u64, u64)> {
    let file = File::open(image)?;
    let header = Image::read_header(&file.as_fd())?;
    Ok((header.data_offset, header.data_len))
}

/// Keeps only the newest generation and changes its manifest.
pub fn forge(store: &Path, change: impl FnOnce(&mut Manifest)) -> anyhow::Result<()> {
    let dir = job(store)?;
    let open = Job::open(RawFs, dir.clone())?;
    let record = (*open.generations().last().context("no generation")?).clone();
    let found = open.open_generation(&record, true)?;
    let member = found.members.first().context("no member")?;
    let mut manifest = member.image.manifest.clone();
    anyhow::ensure!(
        manifest.memory.base.is_none(),
        "an increment: the test wants complete images"
    );
    change(&mut manifest);
    let path = dir.join(dir_name(record.generation)).join("member-0.img");
    let (offset, length) = data(&path)?;
    let old = File::open(&path)?;
    let aside = path.with_extension("forged");
    let file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(&aside)?;
    let mut writer = ImageWriter::new(file.as_fd(), record.generation);
    let mut page = [0u8; PAGE as usize];
    for at in 0..length / PAGE {
        old.read_exact_at(&mut page, offset + at * PAGE)?;
        writer.write_pages(&[IoSlice::new(&page)])?;
    }
    let written = writer.finish(&manifest, false)?;
    let mut members = record.members.clone();
    members[0].bytes = written.bytes;
    members[0].header_crc = written.header_crc;
    let record = GenerationRecord { members, ..record };
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&path)?);
    fs::rename(&aside, &path)?;
    std::os::unix::fs::chown(&path, Some(owner), None)?;
    fs::write(path.with_file_name("manifest"), record.to_file()?)?;
    // The journal anew, with this one generation.
    let scratch = store.join("forged");
    fs::create_dir(&scratch)?;
    let generation = record.generation;
    let mut journal = Journal::default();
    journal.append(&RawFs, &scratch, Record::Committed(record), false)?;
    for (other, _) in open.directories()? {
        if other != generation {
            let _ = fs::remove_dir_all(dir.join(dir_name(other))); // or it has another name, .tmp
        }
    }
    fs::rename(scratch.join("journal"), dir.join("journal"))?;
    std::os::unix::fs::chown(dir.join("journal"), Some(owner), None)?;
    fs::remove_dir(&scratch)?;
    Ok(())
}
