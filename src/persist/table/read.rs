//! Listing and reading tables: recovery, helper thread, command.

use super::{Slot, Table, TableFile, c_path, leading_back, on};
use crate::persist::format;
use crate::persist::sys::{self, Sys};
use crate::store::StoreError;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// The highest number that a table of the job has; 0: there is none.
pub fn highest(job_dir: &Path) -> Result<u32, StoreError> {
    let names = names(job_dir)?;
    Ok(names.iter().map(|name| name.0).max().unwrap_or(0))
}

/// All tables of a job, oldest first. A file that is no table is left out.
pub fn list(job_dir: &Path) -> Result<Vec<TableFile>, StoreError> {
    listed(job_dir, names(job_dir)?)
}

pub(super) fn listed(
    job_dir: &Path,
    names: Vec<(u32, Vec<u8>)>,
) -> Result<Vec<TableFile>, StoreError> {
    let mut tables = Vec::new();
    for (_, name) in names {
        let path = job_dir.join(OsStr::from_bytes(&name));
        tables.extend(on(read_header(&path), "read", &path)?);
    }
    tables.sort_by_key(|t| t.seq);
    Ok(tables)
}

/// The tables that lead back to a generation, oldest first: [`leading_back`] of all of them,
/// but the older ones are not looked at where they need not be.
pub fn list_back(job_dir: &Path, generation: u64) -> Result<Vec<TableFile>, StoreError> {
    let mut names = names(job_dir)?;
    names.sort_unstable_by_key(|name| std::cmp::Reverse(name.0));
    let mut tables = Vec::new();
    for (number, name) in names {
        let path = job_dir.join(OsStr::from_bytes(&name));
        let Some(table) = on(read_header(&path), "read", &path)? else {
            continue;
        };
        // The order is that of the numbers inside.
        if table.seq != number {
            break;
        }
        let own = table.base == generation;
        tables.push(table);
        if own {
            tables.reverse();
            return Ok(tables);
        }
    }
    let all = list(job_dir)?;
    Ok(leading_back(&all, generation).to_vec())
}

/// Reads a whole table. `Ok(None)`: the file is no table. Records end at the first
/// that is not whole: a kill may have come while it was written, and then its
/// operation did not run.
pub fn read(path: &Path) -> Result<Option<Table>, StoreError> {
    let (bytes, cut) = on(read_bytes(path, false), "read", path)?;
    if let Some(table) = parse(path, &bytes, cut) {
        return Ok(table);
    }
    let (bytes, _) = on(read_bytes(path, true), "read", path)?;
    Ok(parse(path, &bytes, false).flatten())
}

/// The table in these bytes of a file; `None`: with `cut`, more of it must be read.
fn parse(path: &Path, bytes: &[u8], cut: bool) -> Option<Option<Table>> {
    let Some(file) = header(path, bytes) else {
        return Some(None);
    };
    let journal = bytes.get(format::RECORDS as usize..).unwrap_or_default();
    let (records, end) = format::records(journal);
    let rest = journal.get((end - format::RECORDS) as usize..);
    // What follows the last whole record may end in zeros that were left out.
    if cut && rest.is_some_and(|rest| rest.iter().any(|&b| b != 0)) {
        return None;
    }
    let starts = (format::HEADER..format::RECORDS).step_by(format::SLOT as usize);
    let slots = starts
        .map(|at| at as usize)
        .take_while(|&at| at < bytes.len())
        .map(|at| Slot {
            hot: word(bytes, at + format::SLOT_HOT as usize) != 0,
            known: word(bytes, at + format::SLOT_KNOWN as usize) != 0,
            size: wide(bytes, at + format::SLOT_SIZE as usize),
            mtime_ns: wide(bytes, at + format::SLOT_MTIME as usize) as i64,
        })
        .collect();
    Some(Some(Table {
        file,
        power: word(bytes, format::AT_FLAGS) & format::FLAG_POWER != 0,
        alive_ns: wide(bytes, format::AT_ALIVE) as i64,
        ended_ns: wide(bytes, format::AT_ENDED) as i64,
        broken: word(bytes, format::AT_INCOMPLETE) > 1,
        undone: wide(bytes, format::AT_UNDONE),
        checked: word(bytes, format::AT_CHECKED) != 0,
        begun_ns: wide(bytes, format::AT_BEGUN) as i64,
        making: wide(bytes, format::AT_MAKING),
        // What follows a kill is one record that was being written.
        damaged: rest.is_some_and(format::records_follow),
        slots,
        records,
    }))
}

/// The header's meaning; `None`: it is none.
fn header(path: &Path, bytes: &[u8]) -> Option<TableFile> {
    let fixed = bytes.get(..format::AT_CRC)?;
    if !format::is_known(fixed) || word(bytes, format::AT_CRC) != crc32c::crc32c(fixed) {
        return None;
    }
    let incomplete = (word(bytes, format::AT_INCOMPLETE) != 0).then(|| {
        let len = word(bytes, format::AT_REASON_LEN) as usize;
        let end = format::AT_REASON + len.min(format::REASON_LEN);
        let text = bytes.get(format::AT_REASON..end).unwrap_or_default();
        String::from_utf8_lossy(text).into_owned()
    });
    Some(TableFile {
        seq: word(bytes, format::AT_SEQ),
        base: wide(bytes, format::AT_BASE),
        path: path.to_owned(),
        incomplete,
        undone: wide(bytes, format::AT_UNDONE) == format::RECORDS,
    })
}

fn read_header(path: &Path) -> Sys<Option<TableFile>> {
    let fd = sys::open(&c_path(path)?, libc::O_RDONLY, 0)?;
    let mut bytes = [0u8; format::AT_REASON + format::REASON_LEN];
    let got = sys::pread_all(fd.0, bytes.as_mut_ptr(), bytes.len(), 0)?;
    let bytes = bytes.get(..got).unwrap_or_default();
    if format::is_newer(bytes) {
        // To go back without it would be to go back to something else.
        return Err(libc::EPROTONOSUPPORT);
    }
    Ok(header(path, bytes))
}

/// The bytes, and whether zeros are left out behind them. With `all` there are none;
/// otherwise those at the end where nothing was ever written: a table is allocated ahead.
fn read_bytes(path: &Path, all: bool) -> Sys<(Vec<u8>, bool)> {
    let fd = sys::open(&c_path(path)?, libc::O_RDONLY, 0)?;
    let size = sys::fstat(fd.0)?.size;
    let len = match all {
        true => size,
        false => sys::end_of_data(fd.0, size),
    };
    let mut bytes = Vec::new();
    let reserved = bytes.try_reserve_exact(len as usize);
    reserved.map_err(|_| libc::ENOMEM)?;
    bytes.resize(len as usize, 0);
    let got = sys::pread_all(fd.0, bytes.as_mut_ptr(), bytes.len(), 0)?;
    bytes.truncate(got);
    Ok((bytes, len < size))
}

pub(super) fn all_names(job_dir: &Path) -> Result<Vec<Vec<u8>>, StoreError> {
    match c_path(job_dir).and_then(|p| sys::list(&p)) {
        Err(libc::ENOENT) => Ok(Vec::new()),
        other => on(other, "list", job_dir),
    }
}

fn names(job_dir: &Path) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
    Ok(of_tables(all_names(job_dir)?))
}

pub(super) fn of_tables(names: Vec<Vec<u8>>) -> Vec<(u32, Vec<u8>)> {
    let number = |name: &[u8]| {
        let digits = name.strip_prefix(b"table-")?;
        let all = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        all.then(|| std::str::from_utf8(digits).ok()?.parse().ok())?
    };
    let numbered = names.into_iter();
    let numbered = numbered.filter_map(|name| Some((number(&name)?, name)));
    numbered.collect()
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(four.unwrap_or_default())
}

fn wide(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(eight.unwrap_or_default())
}
