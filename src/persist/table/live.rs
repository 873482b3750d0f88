//! Tables that are made, put in force and ended.
//!
//! Helper thread: before, during and after the stop, and around a recorded return; the
//! constructor of a start that recovers; the command, where it makes one that says nothing.

use super::{numbered, on};
use crate::persist::recorder::{NUMBER, STATE};
use crate::persist::sys;
use crate::persist::writer::{RANGES, Writer, forget_mapped, mapped};
use crate::store::StoreError;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
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
pub(in crate::persist) fn install_for_return(prepared: Prepared) {
    install(prepared);
    // SAFETY: as in `install`.
    let inner = unsafe { STATE.inner() };
    inner.start_afresh();
}

/// Ends that table: nothing is recorded until the next `install`.
pub(in crate::persist) fn end_return() {
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
