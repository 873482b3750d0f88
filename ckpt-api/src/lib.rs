//! Checkpoints and rollback of a Rust program under libckpt.so.
//!
//! The program links nothing: it runs under `ckpt run` (or `LD_PRELOAD=libckpt.so`), and this
//! crate finds the library in its own process. Without it every call returns
//! [`Error::NotLoaded`] and the program runs as if the calls were not there.
//!
//! ```no_run
//! use ckpt_api::Outcome;
//!
//! let tries = ckpt_api::Keep::new(0u64);
//! match ckpt_api::checkpoint() {
//!     Ok(Outcome::Taken) => println!("saved"),
//!     Ok(Outcome::Restored(value)) => println!("back with {value}, try {}", tries.get()),
//!     Err(error) => println!("not saved: {error}"),
//! }
//! // ... the work turns out badly:
//! if tries.get() < 3 {
//!     tries.set(tries.get() + 1);
//!     let error = ckpt_api::Rollback::to(0).returning(2).keep(&tries).go();
//!     println!("cannot go back: {error}");
//! }
//! ```
//!
//! # What a rollback means for Rust values
//!
//! The whole process goes back: all memory, all threads with their stacks, open descriptors,
//! files. Every value is exactly what it was at the checkpoint, whoever owned or borrowed it,
//! so nothing dangles and no lock is held by somebody who is gone; what was done since has not
//! happened. Therefore [`Rollback::go`] is safe. Mind that
//!
//! * destructors of values made since do not run (as with `std::process::exit`), and those that
//!   ran since have not run: what they did *outside* of the process (a message that was sent, a
//!   row in a database) stays done;
//! * memory that the process shares with others (`MAP_SHARED`) and what the other end of a
//!   connection knows do not go back;
//! * clocks and `Instant`s go on.
//!
//! What comes through a rollback is bytes, put over the bytes of the checkpoint. For this to be
//! sound the place must have been the same thing then, and the bytes may not refer to anything:
//! [`Keep`] sees to both. [`Rollback::keep_region`] leaves that to the caller and is `unsafe`.

mod keep;
mod raw;

pub use keep::{Keep, Plain};

use std::ffi::{CString, c_int, c_void};
use std::fmt;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

/// How a call of [`checkpoint`] has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The checkpoint is durable.
    Taken,
    /// The process has come back to it, by a new start or a rollback, with this value (> 0).
    Restored(i32),
}

/// Why a call has failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Error {
    /// libckpt.so is not in this process, or asleep in it (in a child of a watched process).
    NotLoaded,
    /// The library refused; an errno of libckpt(3).
    Refused(i32),
    /// A path or pattern with a NUL byte or that is not absolute.
    Path,
    /// A [`Keep`] that did not exist at the checkpoint.
    KeptTooYoung,
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Error::NotLoaded => f.write_str("libckpt.so is not loaded (start it with ckpt run)"),
            Error::Refused(errno) => match raw::strerror(errno) {
                Some(text) => f.write_str(&text.to_string_lossy()),
                None => write!(f, "error {errno}"),
            },
            Error::Path => f.write_str("not an absolute path or pattern"),
            Error::KeptTooYoung => f.write_str("a value to keep was made after the checkpoint"),
        }
    }
}

impl std::error::Error for Error {}

pub type Result<T> = std::result::Result<T, Error>;

/// A result of the library: -1 and errno, or a number.
fn number(result: Option<c_int>) -> Result<c_int> {
    match result {
        None => Err(Error::NotLoaded),
        Some(number) if number >= 0 => Ok(number),
        Some(_) => Err(match raw::errno() {
            raw::ENOSYS => Error::NotLoaded,
            errno => Error::Refused(errno),
        }),
    }
}

/// Is libckpt.so in this process?
pub fn loaded() -> bool {
    raw::find(c"ckpt_checkpoint").is_some()
}

/// Takes a checkpoint under the usual id, 0.
pub fn checkpoint() -> Result<Outcome> {
    checkpoint_as(0)
}

/// Takes a checkpoint under an id of the program's own; several may be alive at once.
pub fn checkpoint_as(id: i32) -> Result<Outcome> {
    let before = keep::about_to_take(id);
    let result = number(raw::call_int(c"ckpt_checkpoint", id));
    match result {
        Ok(0) => Ok(Outcome::Taken),
        Ok(value) => Ok(Outcome::Restored(value)),
        Err(error) => {
            keep::not_taken(id, before);
            Err(error)
        }
    }
}

/// Going back to a checkpoint in the running process.
#[derive(Debug)]
#[must_use = "nothing happens before `go`"]
pub struct Rollback<'a> {
    id: i32,
    value: i32,
    regions: Vec<raw::Region>,
    /// Birth of the youngest value that is to be kept.
    youngest: u64,
    kept: std::marker::PhantomData<&'a ()>,
}

impl<'a> Rollback<'a> {
    /// To the latest checkpoint with this id; -1: with any.
    pub fn to(id: i32) -> Rollback<'a> {
        Rollback {
            id,
            value: 1,
            regions: Vec::new(),
            youngest: 0,
            kept: std::marker::PhantomData,
        }
    }

    /// What the checkpoint call returns there, greater than 0 (1 unless set).
    pub fn returning(mut self, value: i32) -> Rollback<'a> {
        self.value = value;
        self
    }

    /// This value comes through. It must have been made before the checkpoint.
    pub fn keep<T: Plain + ?Sized>(mut self, value: &'a Keep<T>) -> Rollback<'a> {
        let (addr, len) = value.region();
        if len > 0 {
            self.regions.push(raw::Region { addr, len });
        }
        self.youngest = self.youngest.max(value.born());
        self
    }

    /// These bytes come through.
    ///
    /// # Safety
    /// `addr..addr + len` belongs, now and at the checkpoint, to the same value, of a type
    /// whose bytes do not refer to memory or descriptors that change meanwhile (no
    /// references, boxes, vectors).
    pub unsafe fn keep_region(mut self, addr: *mut c_void, len: usize) -> Rollback<'a> {
        self.regions.push(raw::Region { addr, len });
        self
    }

    /// Goes back. Returns only when that is not possible, with nothing changed.
    pub fn go(self) -> Error {
        if !loaded() {
            return Error::NotLoaded;
        }
        if self.youngest > 0 && keep::seen_by(self.id).is_none_or(|seen| self.youngest > seen) {
            return Error::KeptTooYoung;
        }
        let result = raw::rollback(self.id, self.value, &self.regions);
        match number(result) {
            Err(error) => error,
            // It does not return on success.
            Ok(_) => Error::Refused(raw::EIO),
        }
    }
}

/// Going back to the latest checkpoint with id 0, see [`Rollback`].
pub fn rollback(value: i32) -> Error {
    Rollback::to(0).returning(value).go()
}

/// A critical section: no checkpoint is taken while one exists. Sections nest, over all
/// threads of the process.
#[derive(Debug)]
#[must_use = "the section ends when the guard is dropped"]
pub struct Hold {
    held: bool,
}

impl Hold {
    /// Begins a section. Without the library there is nothing to hold back.
    pub fn new() -> Hold {
        let result = number(raw::call(c"ckpt_hold"));
        Hold {
            held: result.is_ok(),
        }
    }
}

impl Default for Hold {
    fn default() -> Hold {
        Hold::new()
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.held {
            let _ = raw::call(c"ckpt_release");
        }
    }
}

/// What [`on`] waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// [`checkpoint`] is about to stop all threads.
    Before = 1,
    /// It was taken, or has failed.
    After = 2,
    /// The process has come back to a checkpoint.
    Restored = 3,
}

/// Has `handler` called at an event, in a thread of the program: within [`checkpoint`], and
/// after a restore to a checkpoint of the clock within the next call of this crate (see
/// libckpt(3)). Handlers stay for the life of the process; a panic in one aborts it.
pub fn on(event: Event, handler: impl Fn() + Send + Sync + 'static) -> Result<()> {
    type Boxed = Box<dyn Fn() + Send + Sync>;
    unsafe extern "C" fn call(_event: c_int, argument: *mut c_void) {
        // SAFETY: `argument` is the box below, which is never dropped.
        unsafe { (*argument.cast::<Boxed>())() }
    }
    if !loaded() {
        return Err(Error::NotLoaded);
    }
    let boxed: Box<Boxed> = Box::new(Box::new(handler));
    let pointer = Box::into_raw(boxed);
    let result = number(raw::on(event as c_int, call, pointer.cast()));
    if let Err(error) = result {
        // SAFETY: from `into_raw`, and the library has not taken it.
        drop(unsafe { Box::from_raw(pointer) });
        return Err(error);
    }
    Ok(())
}

fn text(path: &Path) -> Result<CString> {
    let all = path == Path::new("*");
    if !all && !path.is_absolute() {
        return Err(Error::Path);
    }
    CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::Path)
}

/// Files that match this absolute pattern (`*`: all) stay as they are at a rollback.
pub fn exclude(glob: impl AsRef<Path>) -> Result<()> {
    let glob = text(glob.as_ref())?;
    number(raw::call_text(c"ckpt_exclude", &glob)).map(drop)
}

/// An exception from [`exclude`]; the latest rule that matches counts.
pub fn include(glob: impl AsRef<Path>) -> Result<()> {
    let glob = text(glob.as_ref())?;
    number(raw::call_text(c"ckpt_include", &glob)).map(drop)
}

/// Opens `new` where `old` was open, the next time that the process goes back.
pub fn redirect(old: impl AsRef<Path>, new: impl AsRef<Path>) -> Result<()> {
    let (old, new) = (text(old.as_ref())?, text(new.as_ref())?);
    number(raw::call_texts(c"ckpt_redirect", &old, &new)).map(drop)
}

/// The program is initialised; `ckpt status` shows it.
pub fn ready() -> Result<()> {
    number(raw::call(c"ckpt_ready")).map(drop)
}

/// The program is alive; `ckpt status` shows it.
pub fn heartbeat() -> Result<()> {
    number(raw::call(c"ckpt_heartbeat")).map(drop)
}

/// The number of the latest checkpoint that this process has taken or come back to; `None`
/// before the first.
pub fn generation() -> Result<Option<u64>> {
    match raw::generation() {
        None => Err(Error::NotLoaded),
        Some(number) if number >= 0 => Ok((number > 0).then_some(number as u64)),
        Some(_) => Err(Error::NotLoaded),
    }
}

/// The arguments of `ckpt restore --template JOB -- ARGUMENTS`.
pub fn arguments() -> Vec<std::ffi::OsString> {
    (0..).map_while(raw::argument).collect()
}
