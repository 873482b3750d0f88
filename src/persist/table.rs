//! Tables: beginning and ending them (helper thread), listing and reading them
//! (command, recovery).

use super::recorder::{NUMBER, STATE};
use super::sys::{self, CPath, Sys};
use super::writer::{RANGES, SPARE, Writer, forget_mapped, mapped};
use super::{Id, Identity, Stat, Which, format};
use crate::errno::Errno;
use crate::store::StoreError;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;

/// A table that is made and mapped, not yet in use.
#[derive(Debug)]
pub struct Prepared(Box<Writer>);

impl Drop for Prepared {
    /// Not installed: the mappings go, the empty file stays and does no harm.
    fn drop(&mut self) {
        self.0.close();
    }
}

/// A table in the job's directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TableFile {
    pub seq: u32,
    /// The generation that it leads back to.
    pub base: u64,
    pub path: PathBuf,
    /// Something could not be recorded: why.
    pub incomplete: Option<String>,
    /// All its records have been taken back.
    pub undone: bool,
}

/// What a record's removed inode is put back from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kept {
    /// A hard link of this name in the `kept-` directory.
    Link(Vec<u8>),
    /// A copy of this name in the `kept-` directory.
    Copy(Vec<u8>),
    /// A symbolic link to this target.
    Symlink(Vec<u8>),
    /// A FIFO, socket or device: its attributes say all.
    Node,
}

/// A directory's path, a name in it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Name {
    pub dir: Id,
    pub dir_path: Vec<u8>,
    pub name: Vec<u8>,
}

impl Name {
    /// The whole path.
    pub fn path(&self) -> Vec<u8> {
        let mut path = self.dir_path.clone();
        if !path.ends_with(b"/") {
            path.push(b'/');
        }
        path.extend_from_slice(&self.name);
        path
    }
}

/// Extended attributes with their values.
pub type Xattrs = Vec<(Vec<u8>, Vec<u8>)>;

/// An inode that was moved.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Moved {
    pub inode: Identity,
    /// It was made since the table began; `None`: the record does not say.
    pub born: Option<bool>,
}

/// One record, as read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Record {
    Absent {
        name: Name,
    },
    Gone {
        name: Name,
        stat: Stat,
        kept: Kept,
        xattrs: Xattrs,
    },
    Renamed {
        from: Name,
        to: Name,
        moved: Moved,
        /// The other inode of an exchange.
        other: Option<Moved>,
    },
    RemovedDir {
        name: Name,
        stat: Stat,
        xattrs: Xattrs,
    },
    Inode {
        row: u32,
        /// Its slot in the table, or `format::NO_SLOT`.
        slot: u32,
        which: Which,
        stat: Stat,
        path: Vec<u8>,
    },
    /// A row's inode is called otherwise from here on.
    Path {
        row: u32,
        path: Vec<u8>,
    },
    Blocks {
        row: u32,
        offset: u64,
        len: u64,
        /// Where the pre-image lies in the shadow file; `None`: zeros.
        shadow: Option<u64>,
    },
    Xattr {
        row: u32,
        name: Vec<u8>,
        value: Option<Vec<u8>>,
    },
    /// An inode that was made since the table began.
    Born {
        id: Id,
    },
    /// The operation whose records begin at this offset failed. Its records read as
    /// this, too.
    Cancelled {
        from: u64,
    },
    /// From here on the records are of a recorded return (`undo::go_back_recorded`), before
    /// which so many notes had been made of inodes made anew.
    Returned {
        made: u64,
    },
    /// Something about this path could not be recorded (empty: anything).
    Incomplete {
        path: Vec<u8>,
        reason: Vec<u8>,
    },
}

/// What is known of a row's inode since.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Slot {
    /// Written by the fast path, which notes nothing else.
    pub hot: bool,
    /// Size and time are those after our last operation.
    pub known: bool,
    pub size: u64,
    pub mtime_ns: i64,
}

/// A table that was read.
#[derive(Debug, Clone)]
pub struct Table {
    pub file: TableFile,
    pub power: bool,
    /// Wall clock of the helper's last round.
    pub alive_ns: i64,
    /// Wall clock of the program's end; 0: not known.
    pub ended_ns: i64,
    /// When its undo began, if that is `checked`; 0: not known.
    pub begun_ns: i64,
    /// The name under which something was being made (`format::making`); 0: none.
    pub making: u64,
    /// The journal ends before the modifications do.
    pub broken: bool,
    /// There are bytes behind the last whole record that a kill does not explain.
    pub damaged: bool,
    /// An undo has come down to this offset; 0: none has begun.
    pub undone: u64,
    /// An undo has looked for changes of somebody else.
    pub checked: bool,
    /// What is known of rows' inodes, by slot; nothing of those that are missing at the end.
    pub slots: Vec<Slot>,
    /// With their offsets in the file.
    pub records: Vec<(u64, Record)>,
}

fn on<T>(result: Sys<T>, verb: &'static str, path: &Path) -> Result<T, StoreError> {
    result.map_err(|e| StoreError {
        verb,
        path: path.to_owned(),
        errno: Errno(e),
    })
}

fn numbered(job_dir: &Path, prefix: &str, seq: u32) -> PathBuf {
    job_dir.join(format!("{prefix}{seq:06}"))
}

/// The directory of removed files that a table keeps.
pub fn kept_dir(job_dir: &Path, seq: u32) -> PathBuf {
    numbered(job_dir, "kept-", seq)
}

/// The pre-images that a table's records refer to.
pub fn shadow_path(job_dir: &Path, seq: u32) -> PathBuf {
    numbered(job_dir, "shadow-", seq)
}

/// Makes, preallocates and maps a table (helper thread, before the stop). `seq` must
/// be greater than that of any table that the job has had.
pub fn create(
    job_dir: &Path,
    seq: u32,
    base_generation: u64,
    power: bool,
) -> Result<Prepared, StoreError> {
    let mut writer = Box::new(Writer::NONE);
    let dir = job_dir.as_os_str().as_bytes();
    let made = writer.create(dir, seq, base_generation, power);
    on(made, "create", &numbered(job_dir, "table-", seq))?;
    Ok(Prepared(writer))
}

/// Makes a table that says only that modifications since `base_generation` are not known:
/// nobody goes back over it.
pub fn create_unrecorded(
    job_dir: &Path,
    seq: u32,
    base_generation: u64,
    reason: &str,
) -> Result<(), StoreError> {
    let mut prepared = create(job_dir, seq, base_generation, false)?;
    prepared.0.set_incomplete(2, &[reason.as_bytes()]);
    prepared.0.close_and_trim();
    Ok(())
}

/// Makes a table without records: the files are as they were at `base_generation`.
pub fn create_empty(
    job_dir: &Path,
    seq: u32,
    base_generation: u64,
    power: bool,
) -> Result<(), StoreError> {
    let mut prepared = create(job_dir, seq, base_generation, power)?;
    prepared.0.close_and_trim();
    Ok(())
}

/// The tables that lead back to a generation, of all tables of the job, oldest first. At
/// the beginning of each of them whose base it is, the files were as they were at the generation: the
/// newest such table is as far as an undo has to go. Where there is none, all is undone
/// but what leads back further.
pub fn leading_back(tables: &[TableFile], generation: u64) -> &[TableFile] {
    let own = tables.iter().rposition(|t| t.base == generation);
    let newer = || tables.iter().position(|t| t.base > generation);
    own.or_else(newer)
        .and_then(|first| tables.get(first..))
        .unwrap_or_default()
}

/// Can a generation still be reached when all that leads back to `to` has been undone?
pub fn outlives(tables: &[TableFile], to: u64, generation: u64) -> bool {
    let undone = leading_back(tables, to).len();
    let mut left = tables.iter().take(tables.len() - undone);
    generation == to || left.any(|t| t.base == generation)
}

/// The tables that none of these generations needs: they lead back further.
pub fn unneeded<'t>(tables: &'t [TableFile], generations: &[u64]) -> &'t [TableFile] {
    let own = |g: &u64| tables.iter().rposition(|t| t.base == *g);
    let oldest = generations.iter().min();
    let first = match generations.iter().filter_map(own).min() {
        Some(first) => first,
        // None has any: what leads back to before the oldest.
        None => tables
            .iter()
            .position(|t| oldest.is_none_or(|oldest| t.base >= *oldest))
            .unwrap_or(tables.len()),
    };
    tables.get(..first).unwrap_or_default()
}

/// Puts a table in force (during the stop, or before the program's threads run). The
/// one before it ends here.
pub fn install(mut prepared: Prepared) {
    // SAFETY: all threads are held outside hooks, per contract.
    let inner = unsafe { STATE.inner() };
    if inner.previous.number != 0 {
        inner.previous.close();
    }
    let new = std::mem::replace(&mut *prepared.0, Writer::NONE);
    let number = new.number;
    inner.previous = std::mem::replace(&mut inner.writer, new);
    // The helper's next round may never come.
    inner.writer.alive(sys::realtime_ns());
    NUMBER.store(number, Ordering::SeqCst);
}

/// As [`install`], for what the caller itself is going to do to files. What the index
/// knew is left where it lies: it is another thread's memory.
pub(super) fn install_for_return(prepared: Prepared) {
    install(prepared);
    // SAFETY: as in `install`.
    let inner = unsafe { STATE.inner() };
    inner.start_afresh();
}

/// Ends that table: nothing is recorded until the next `install`.
pub(super) fn end_return() {
    NUMBER.store(0, Ordering::SeqCst);
    // SAFETY: as in `install`.
    let inner = unsafe { STATE.inner() };
    inner.writer.close_and_trim();
}

/// The restored helper, first thing: the table that the image remembers is not
/// mapped any more; nothing is recorded until the next `install`.
pub fn forget() {
    NUMBER.store(0, Ordering::SeqCst);
    // SAFETY: no other thread runs yet, per contract.
    let inner = unsafe { STATE.inner() };
    inner.writer = Writer::NONE;
    inner.previous = Writer::NONE;
    STATE.unlock_all();
    forget_mapped();
}

/// Unmaps the table before the present one and cuts it to what is used (helper
/// thread, after the stop).
pub fn close_previous() {
    // SAFETY: `previous` is the helper's alone.
    let previous = unsafe { &mut STATE.inner().previous };
    if previous.number != 0 {
        previous.close_and_trim();
    }
}

/// How many ranges tables can have mapped.
pub const OWN_RANGES: usize = RANGES;

/// Mapped ranges that do not belong to the image; empty ones among them.
pub fn own_ranges() -> [(u64, u64); OWN_RANGES] {
    mapped()
}

/// The helper's rounds: the program is alive at this wall clock time.
pub fn alive(now_ns: i64) {
    // SAFETY: the header's address changes in the helper only.
    unsafe { STATE.inner() }.writer.alive(now_ns);
}

/// The program ends now: what is modified from here on somebody else does. In the thread that ends
/// it, with no other left.
pub fn ended(now_ns: i64) {
    // SAFETY: as in `alive`; a table that the helper ends meanwhile stays mapped until the next begins.
    unsafe { STATE.inner() }.writer.ended(now_ns);
}

/// Why the open table does not lead back, if so.
pub fn incomplete_reason() -> Option<String> {
    // SAFETY: as in `alive`.
    let reason = unsafe { STATE.inner() }.writer.reason()?;
    Some(String::from_utf8_lossy(&reason).into_owned())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    let four = bytes.get(at..at + 4).and_then(|b| b.try_into().ok());
    u32::from_le_bytes(four.unwrap_or_default())
}

fn wide(bytes: &[u8], at: usize) -> u64 {
    let eight = bytes.get(at..at + 8).and_then(|b| b.try_into().ok());
    u64::from_le_bytes(eight.unwrap_or_default())
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

pub(super) fn c_path(path: &Path) -> Sys<CPath> {
    CPath::new(&[path.as_os_str().as_bytes()])
}

fn all_names(job_dir: &Path) -> Result<Vec<Vec<u8>>, StoreError> {
    match c_path(job_dir).and_then(|p| sys::list(&p)) {
        Err(libc::ENOENT) => Ok(Vec::new()),
        other => on(other, "list", job_dir),
    }
}

fn names(job_dir: &Path) -> Result<Vec<(u32, Vec<u8>)>, StoreError> {
    Ok(of_tables(all_names(job_dir)?))
}

fn of_tables(names: Vec<Vec<u8>>) -> Vec<(u32, Vec<u8>)> {
    let number = |name: &[u8]| {
        let digits = name.strip_prefix(b"table-")?;
        let all = !digits.is_empty() && digits.iter().all(u8::is_ascii_digit);
        all.then(|| std::str::from_utf8(digits).ok()?.parse().ok())?
    };
    let numbered = names.into_iter();
    let numbered = numbered.filter_map(|name| Some((number(&name)?, name)));
    numbered.collect()
}

/// The highest number that a table of the job has; 0: there is none.
pub fn highest(job_dir: &Path) -> Result<u32, StoreError> {
    let names = names(job_dir)?;
    Ok(names.iter().map(|name| name.0).max().unwrap_or(0))
}

/// All tables of a job, oldest first. A file that is no table is left out.
pub fn list(job_dir: &Path) -> Result<Vec<TableFile>, StoreError> {
    listed(job_dir, names(job_dir)?)
}

fn listed(job_dir: &Path, names: Vec<(u32, Vec<u8>)>) -> Result<Vec<TableFile>, StoreError> {
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

/// Removes a table with all that belongs to it; the table itself last, so that a
/// removal that was cut short is simply done again.
pub fn remove(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    remove_parts(job_dir, seq)?;
    unlink(&numbered(job_dir, "table-", seq))
}

/// As [`remove`], but the table's file stays under another name for the next table to be made
/// of. To remove one file and to make another costs ext4 up to a millisecond: it looks for
/// an inode that was not removed in the last seconds. Only where no process has it mapped.
pub fn remove_for_reuse(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    remove_parts(job_dir, seq)?;
    sys::point();
    let path = numbered(job_dir, "table-", seq);
    let spare = job_dir.join(OsStr::from_bytes(SPARE));
    let done = c_path(&path).and_then(|from| sys::rename(&from, &c_path(&spare)?, 0));
    match done {
        Err(libc::ENOENT) => Ok(()),
        done => on(done, "remove", &path),
    }
}

fn unlink(path: &Path) -> Result<(), StoreError> {
    sys::point();
    match c_path(path).and_then(|p| sys::unlink(&p)) {
        Err(libc::ENOENT) => Ok(()),
        done => on(done, "remove", path),
    }
}

fn remove_parts(job_dir: &Path, seq: u32) -> Result<(), StoreError> {
    let kept = kept_dir(job_dir, seq);
    let names = match c_path(&kept).and_then(|p| sys::list(&p)) {
        Err(libc::ENOENT) => None,
        other => Some(on(other, "list", &kept)?),
    };
    for name in names.iter().flatten() {
        unlink(&kept.join(OsStr::from_bytes(name)))?;
    }
    if names.is_some() {
        match c_path(&kept).and_then(|p| sys::rmdir(&p)) {
            Err(libc::ENOENT) => {}
            done => on(done, "remove", &kept)?,
        }
    }
    unlink(&shadow_path(job_dir, seq))
}

/// Removes what a kill during the making of a table, or [`remove_for_reuse`], has left.
/// Returns the tables that are left, oldest first.
pub fn remove_leftovers(job_dir: &Path) -> Result<Vec<TableFile>, StoreError> {
    let names = all_names(job_dir)?;
    for name in &names {
        let new = name.starts_with(b"table-") && name.ends_with(b".new");
        if new || name == SPARE {
            let path = job_dir.join(OsStr::from_bytes(name));
            let done = c_path(&path).and_then(|p| sys::unlink(&p));
            on(done, "remove", &path)?;
        }
    }
    // One that is undone, and whose place another of its base has taken: the files are as
    // they were when that one began, and what this one tells of them is not true any more.
    let mut tables = listed(job_dir, of_tables(names))?;
    let replaced = tables.windows(2).filter_map(|pair| match pair {
        [old, new] => (old.undone && old.base == new.base).then_some(old.seq),
        _ => None,
    });
    let replaced: Vec<u32> = replaced.collect();
    for &seq in &replaced {
        remove(job_dir, seq)?;
    }
    tables.retain(|table| !replaced.contains(&table.seq));
    Ok(tables)
}

#[cfg(test)]
mod tests;
