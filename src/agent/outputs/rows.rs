//! What the tables say of one inode: the blocks that were modified, and their contents
//! before. Used by the streams at checkpoints and at recoveries.

use super::{Ids, Problem, problem, write_at};
use crate::persist::Id;
use crate::persist::table::{self, Record, Table, TableFile};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::path::Path;

/// One `Blocks` record.
struct Block {
    offset: u64,
    len: u64,
    shadow: Option<u64>,
}

/// The `Blocks` records of an inode, in the order of the table.
fn blocks(table: &Table, id: Id) -> Vec<Block> {
    let mut rows: Vec<u32> = Vec::new();
    let mut blocks = Vec::new();
    for (_, record) in &table.records {
        match record {
            Record::Inode { row, stat, .. } if stat.id == id && !rows.contains(row) => {
                rows.push(*row);
            }
            Record::Blocks {
                row,
                offset,
                len,
                shadow,
            } if rows.contains(row) => blocks.push(Block {
                offset: *offset,
                len: *len,
                shadow: *shadow,
            }),
            _ => {}
        }
    }
    blocks
}

pub fn tables(job: &Path) -> Result<Vec<TableFile>, Problem> {
    table::list(job).map_err(|e| e.to_string())
}

fn read(file: &TableFile) -> Result<Table, Problem> {
    let table = table::read(&file.path).map_err(|e| e.to_string())?;
    table.ok_or_else(|| format!("{} is damaged", file.path.display()))
}

/// The ranges of an inode that the tables `which` say were modified; `None` when they
/// cannot tell (one is missing or incomplete).
pub fn changed(job: &Path, which: Range<u32>, id: Id) -> Option<Vec<(u64, u64)>> {
    let mut ranges = Vec::new();
    let tables = tables(job).ok()?;
    // The first one began when the stream was up to date: without it, nothing is known.
    if !tables.iter().any(|t| t.seq == which.start) {
        return None;
    }
    for file in tables.iter().filter(|t| which.contains(&t.seq)) {
        if file.incomplete.is_some() {
            return None;
        }
        let table = read(file).ok()?;
        let blocks = blocks(&table, id);
        ranges.extend(blocks.iter().map(|b| (b.offset, b.offset + b.len)));
    }
    Some(ranges)
}

/// Puts the contents back that `file`'s table has of the inode.
fn apply(job: &Path, file: &TableFile, id: Id, stream: &OwnedFd, size: u64) -> Result<(), Problem> {
    let table = read(file)?;
    let blocks = blocks(&table, id);
    if blocks.is_empty() {
        return Ok(());
    }
    let path = table::shadow_path(job, file.seq);
    let flags = OFlags::RDONLY | OFlags::CLOEXEC;
    let shadow = rustix::fs::open(&path, flags, Mode::empty());
    // An undo that was killed while it removed the table it was done with: what the table had
    // is in the stream since before that undo began.
    if file.undone && shadow.as_ref().is_err_and(|e| *e == Errno::NOENT) {
        return Ok(());
    }
    let mut buffer = vec![0u8; 1 << 16];
    for block in blocks.iter().rev() {
        let end = block.offset.saturating_add(block.len).min(size);
        let mut at = block.offset;
        while at < end {
            let len = ((end - at) as usize).min(buffer.len());
            let piece = &mut buffer[..len];
            match block.shadow {
                None => piece.fill(0),
                Some(from) => {
                    let shadow = shadow.as_ref().map_err(|e| problem("open", &path, *e))?;
                    let mut done = 0;
                    while done < len {
                        let place = from + (at - block.offset) + done as u64;
                        match rustix::io::pread(shadow, &mut piece[done..], place) {
                            Ok(0) => return Err(format!("{} is too short", path.display())),
                            Ok(n) => done += n,
                            Err(e) => return Err(problem("read", &path, e)),
                        }
                    }
                }
            }
            write_at(stream, piece, at).map_err(|e| problem("write to a stream from", &path, e))?;
            at += len as u64;
        }
    }
    Ok(())
}

/// Undoes in a stream what the table that has just begun says of its inode: the stream is then as of
/// that table's beginning, whatever the program did while it was copied.
pub fn put_back(
    job: &Path,
    table: u32,
    id: Id,
    stream: &OwnedFd,
    size: u64,
) -> Result<(), Problem> {
    match tables(job)?.iter().find(|t| t.seq == table) {
        Some(file) => apply(job, file, id, stream, size),
        None => Ok(()),
    }
}

/// Makes the first `size` bytes of a stream what they were at `generation`; `tables` are all.
pub fn rewind(
    job: &Path,
    tables: &[TableFile],
    generation: u64,
    ids: &Ids,
    stream: &OwnedFd,
    size: u64,
) -> Result<(), Problem> {
    for file in table::leading_back(tables, generation).iter().rev() {
        if let Some(id) = ids.of_table(file.seq) {
            apply(job, file, id, stream, size)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::persist::Stat;
    use crate::persist::format::{self, Encoder};
    use std::fs;
    use std::os::unix::fs::FileExt;

    const ID: Id = Id { dev: 1, ino: 2 };

    /// A table of which block 0 of the inode was saved, undone or not.
    fn job(name: &str, undone: u64) -> std::path::PathBuf {
        let job = std::env::temp_dir().join(format!("ckpt-rows-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&job);
        fs::create_dir(&job).unwrap();
        let file = fs::File::create(job.join("table-000003")).unwrap();
        file.set_len(format::RECORDS + 4096).unwrap();
        file.write_all_at(&format::header(3, 7, false), 0).unwrap();
        file.write_all_at(&undone.to_le_bytes(), format::AT_UNDONE as u64)
            .unwrap();
        let stat = Stat {
            id: ID,
            ..Stat::default()
        };
        let mut e = Encoder::new();
        let inode = e.begin(format::TAG_INODE).u32(0).u32(0).u32(0);
        inode.stat(&stat).text(b"/a").u64(0);
        let mut records = vec![e.bytes().unwrap().to_vec()];
        let blocks = e.begin(format::TAG_BLOCKS).u32(0).u64(0).u64(4);
        blocks.u8(1).u64(0);
        records.push(e.bytes().unwrap().to_vec());
        let mut at = format::RECORDS;
        for payload in records {
            let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
            bytes.extend(crc32c::crc32c(&payload).to_le_bytes());
            bytes.extend(&payload);
            file.write_all_at(&bytes, at).unwrap();
            at += format::record_len(payload.len()) as u64;
        }
        fs::write(table::shadow_path(&job, 3), b"then").unwrap();
        job
    }

    fn rewound(job: &Path) -> Result<Vec<u8>, Problem> {
        let path = job.join("stream");
        fs::write(&path, b"now, and more").unwrap();
        let file = fs::File::options().write(true).open(&path).unwrap();
        let ids = Ids::parse(b"1 1 2\n");
        let tables = tables(job)?;
        rewind(job, &tables, 7, &ids, &OwnedFd::from(file), 13)?;
        Ok(fs::read(&path).unwrap())
    }

    /// An undo was killed between the two removals, of the blocks and of their table, and the
    /// next recovery ended with exit status 125: no such file.
    #[test]
    fn a_table_that_is_being_removed_has_been_read() {
        let all = job("undone", format::RECORDS);
        assert_eq!(rewound(&all).unwrap(), b"then and more");
        fs::remove_file(table::shadow_path(&all, 3)).unwrap();
        assert_eq!(rewound(&all).unwrap(), b"now, and more");
        // Of one that is not undone they are missed.
        let half = job("half", 0);
        fs::remove_file(table::shadow_path(&half, 3)).unwrap();
        assert!(rewound(&half).unwrap_err().contains("shadow-000003"));
        for job in [all, half] {
            fs::remove_dir_all(job).unwrap();
        }
    }
}
