//! The call-site net: every system call of libc passes through us.
//!
//! Symbols cannot show what libc calls itself (`fprintf` ends in a `write` that no
//! preloaded name sees), so the `syscall` sites in libc's text are patched to jump to
//! slots (`ckpt-sys/asm/callsites.S`), and those call [`dispatch`] for the numbers that
//! somebody wants. Sites on which there is any doubt are left alone and counted.
//!
//! | file | owns |
//! |---|---|
//! | [`numbers`] | which calls' sites are patched |
//! | [`object`] | the loaded libraries concerned |
//! | [`analyse`] | finding sites |
//! | [`prepared`] | slots and site table, position-independent |
//! | [`cache`] | prepared copies on disk |
//! | [`patch`] | putting it all into memory |
//! | [`entry`] | entry records of calls that can end with EINTR |
//! | [`restart`] | restarting calls that our stop interrupted |
//! | [`summary`] | what `ckpt status` says of it |
//!
//! [`install`] runs in the constructor. [`dispatch`] runs in any thread at any call;
//! [`site_after`] also in signal handlers.

pub mod analyse;
pub mod cache;
pub mod entry;
pub mod numbers;
pub mod object;
pub mod patch;
pub mod prepared;
pub mod restart;
mod sockets;
pub mod summary;

use crate::agent::hooks;
use crate::agent::hooks::frame::{CallFrame, Verdict};
use crate::agent::track::{blocked, fault};
use analyse::LeftAlone;
use cache::Cache;
use ckpt_sys::callsite;
use object::Object;
use prepared::{Header, SiteEntry};
use std::path::PathBuf;
use std::sync::atomic::{AtomicPtr, AtomicUsize, Ordering};

/// In stage 1's table: the call goes to `hooks::dispatch`.
pub const HOOKED: u8 = 1;
/// The call leaves an entry record.
const RECORDED: u8 = 2;

#[derive(Debug, Clone, Default)]
pub struct InstallOptions {
    /// Where prepared copies are kept; `None`: nowhere, each start analyses anew.
    pub cache: Option<PathBuf>,
}

/// How a library was patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    /// A cached copy of its text was mapped over it.
    Mapped,
    /// Patched in memory, by a cached table.
    CachedTable,
    /// Patched in memory after an analysis.
    Analysed,
    /// Not patched.
    Nothing(&'static str),
}

/// What was done to one library.
#[derive(Debug, Clone)]
pub struct ObjectReport {
    pub name: String,
    pub way: Way,
    pub immediate: usize,
    pub window: usize,
    pub forward: usize,
    /// Sites left alone, by reason.
    pub left_alone: Vec<(&'static str, usize)>,
    /// The slots are where unwinders do not know them.
    pub far: bool,
    pub microseconds: u64,
}

impl ObjectReport {
    pub fn patched(&self) -> usize {
        self.immediate + self.window + self.forward
    }
}

#[derive(Debug, Clone, Default)]
pub struct Report {
    pub objects: Vec<ObjectReport>,
    pub microseconds: u64,
}

impl Report {
    /// Is libc itself covered?
    pub fn covers_libc(&self) -> bool {
        self.objects
            .iter()
            .any(|object| object.name.ends_with("/libc.so.6") && object.patched() > 0)
    }
}

/// Installs the net. Never fails the program: what cannot be done is in the report.
///
/// # Safety
/// Constructor only, once per process image, before the agent's hooks are needed.
pub unsafe fn install(options: &InstallOptions) -> Report {
    let started = now_ns();
    let mut report = Report::default();
    let mut session = Session {
        options,
        cache: options
            .cache
            .as_deref()
            .and_then(|path| Cache::open(path, false)),
        alone: alone(),
        placed: Vec::new(),
    };
    // SAFETY: no site is patched yet.
    unsafe {
        callsite::set_dispatch(stage2);
        callsite::set_rewind(rewind_frame);
    }
    set_table(&hooks::table());
    for object in object::loaded() {
        let begun = now_ns();
        // SAFETY: constructor, once (the caller's promise).
        let mut done = unsafe { session.install(&object) };
        done.microseconds = (now_ns() - begun) / 1000;
        report.objects.push(done);
    }
    report.microseconds = (now_ns() - started) / 1000;
    report
}

/// Fills stage 1's table: what the hooks want, and what must leave an entry record.
pub fn set_table(hooked: &[u8; 512]) {
    for (nr, &bits) in hooked.iter().enumerate() {
        let recorded = if entry::RECORDED.contains(&(nr as i64)) {
            RECORDED
        } else {
            0
        };
        callsite::set_hook_byte(nr, bits | recorded);
    }
}

struct Session<'a> {
    options: &'a InstallOptions,
    cache: Option<Cache>,
    /// No other thread runs.
    alone: bool,
    /// Ranges taken for slots.
    placed: Vec<(usize, usize)>,
}

impl Session<'_> {
    /// # Safety
    /// As for [`install`].
    unsafe fn install(&mut self, object: &Object) -> ObjectReport {
        let nothing = |why| ObjectReport {
            name: object.name.clone(),
            way: Way::Nothing(why),
            immediate: 0,
            window: 0,
            forward: 0,
            left_alone: Vec::new(),
            far: false,
            microseconds: 0,
        };
        let Some((place, far)) = self.place(object) else {
            return nothing("no room for slots within reach");
        };
        // SAFETY: `place` was reserved just now; constructor.
        let done = unsafe { self.install_at(object, place) };
        match done {
            Ok((way, header, sites, left)) => {
                register(object, sites);
                // SAFETY: the table is in place and stays.
                let table = unsafe { std::slice::from_raw_parts(sites.0, sites.1) };
                let count = |kind| table.iter().filter(|site| site.is(kind)).count();
                let mut report = ObjectReport {
                    way,
                    immediate: count(analyse::Kind::Immediate),
                    window: count(analyse::Kind::Window),
                    forward: count(analyse::Kind::Forward),
                    far,
                    ..nothing("")
                };
                for (why, &number) in LeftAlone::ALL.iter().zip(&header.left_alone) {
                    let number = usize::from(number)
                        + left
                            .iter()
                            .filter(|(w, _)| w == why)
                            .map(|(_, n)| n)
                            .sum::<usize>();
                    if number > 0 {
                        report.left_alone.push((why.reason(), number));
                    }
                }
                report
            }
            Err(why) => nothing(why),
        }
    }

    /// Address for the object's head: in the hole, or near the object.
    fn place(&mut self, object: &Object) -> Option<(usize, bool)> {
        let free = |at: usize| {
            self.placed
                .iter()
                .all(|&(start, end)| at + patch::ROOM <= start || end <= at)
        };
        let (place, far) = match prepared::place(object.base, callsite::hole_start()) {
            Some(at) if free(at) => (at, false),
            _ => (patch::reserve_near(object.base)?, true),
        };
        self.placed.push((place, place + patch::ROOM));
        Some((place, far))
    }

    /// # Safety
    /// As for [`install`]; `place` is reserved.
    unsafe fn install_at(&mut self, object: &Object, place: usize) -> Result<Done, &'static str> {
        // SAFETY: `place` is reserved for this object.
        let find = |cache: &Cache| unsafe { cache.find(object, place) };
        let copy = self.cache.as_ref().and_then(find);
        if let Some(copy) = copy {
            // SAFETY: a verified copy for this very place.
            return unsafe { self.use_copy(object, place, &copy) };
        }
        let found = analyse::find(object, numbers::wanted);
        if found.sites.is_empty() {
            return Err("no sites found");
        }
        let mut prepared = prepared::prepare(object, &found, place);
        if prepared.bytes.len() + prepared::PAGE > patch::ROOM {
            return Err("too many sites");
        }
        if self.cache.is_none() {
            self.cache = self
                .options
                .cache
                .as_deref()
                .and_then(|path| Cache::open(path, true));
        }
        // SAFETY: as above; the slots were made for this place.
        let publish = |cache: &Cache| unsafe { cache.publish(object, &mut prepared) };
        let published = self.cache.as_ref().and_then(publish);
        if let Some(copy) = published {
            // SAFETY: as above.
            let used = unsafe { self.use_copy(object, place, &copy) };
            return used.map(|(way, header, sites, left)| match way {
                Way::CachedTable => (Way::Analysed, header, sites, left),
                way => (way, header, sites, left),
            });
        }
        // SAFETY: `place` is reserved; the slots were made for it.
        unsafe {
            patch::copy_slots(&prepared.bytes, place)
                .map_err(|_| "slots cannot be made executable")?;
            self.patch(object, place, prepared.header, Way::Analysed)
        }
    }

    /// # Safety
    /// `copy` is verified for `object` and `place`.
    unsafe fn use_copy(
        &self,
        object: &Object,
        place: usize,
        copy: &cache::Copy,
    ) -> Result<Done, &'static str> {
        let header = copy.header;
        // SAFETY: see above; the text is replaced only after its slots are in place, and
        // only while nobody can be inside a moved window.
        unsafe {
            let mapped = patch::enable_slots(place, copy.text_offset()).is_ok();
            if mapped
                && self.alone
                && patch::map_text(object, copy.fd(), copy.text_offset()).is_ok()
            {
                return Ok((Way::Mapped, header, table(place, &header), Vec::new()));
            }
            if !mapped {
                // A file system without execution, or a security module.
                let bytes = copy.head();
                patch::copy_slots(&bytes, place).map_err(|_| "slots cannot be made executable")?;
            }
            self.patch(object, place, header, Way::CachedTable)
        }
    }

    /// # Safety
    /// Head and slots are at `place`.
    unsafe fn patch(
        &self,
        object: &Object,
        place: usize,
        header: Header,
        way: Way,
    ) -> Result<Done, &'static str> {
        let sites = table(place, &header);
        // SAFETY: the table is part of the head.
        let entries = unsafe { std::slice::from_raw_parts(sites.0, sites.1) };
        // SAFETY: slots are in place; `alone` was looked up.
        let patched = unsafe { patch::in_place(object, &header, entries, self.alone) }
            .map_err(|_| "the text cannot be written")?;
        Ok((way, header, sites, patched.left().to_vec()))
    }
}

type Table = (*const SiteEntry, usize);
type Done = (Way, Header, Table, Vec<(LeftAlone, usize)>);

/// The site table of a head in place.
fn table(place: usize, header: &Header) -> Table {
    (
        (place + size_of::<Header>()) as *const SiteEntry,
        header.sites as usize,
    )
}

/// Does only one thread run? (A task directory has two links besides the threads'.)
fn alone() -> bool {
    rustix::fs::stat("/proc/self/task").is_ok_and(|stat| stat.st_nlink <= 3)
}

/// A patched library, for [`site_after`].
struct Registered {
    base: AtomicUsize,
    sites: AtomicPtr<SiteEntry>,
    count: AtomicUsize,
}

static REGISTERED: [Registered; 4] = [const {
    Registered {
        base: AtomicUsize::new(0),
        sites: AtomicPtr::new(std::ptr::null_mut()),
        count: AtomicUsize::new(0),
    }
}; 4];

fn register(object: &Object, sites: Table) {
    if let Some(entry) = REGISTERED
        .iter()
        .find(|entry| entry.count.load(Ordering::Relaxed) == 0)
    {
        entry.base.store(object.base, Ordering::Relaxed);
        entry.sites.store(sites.0.cast_mut(), Ordering::Relaxed);
        entry.count.store(sites.1, Ordering::Release);
    }
}

/// The call made by the patched site whose `syscall` ends at `rip`: its number, or -1
/// where the site makes different calls. Async-signal-safe.
pub fn site_after(rip: usize) -> Option<i64> {
    for entry in &REGISTERED {
        let count = entry.count.load(Ordering::Acquire);
        if count == 0 {
            return None;
        }
        // SAFETY: the table stays mapped, unchanged, for the life of the process.
        let sites =
            unsafe { std::slice::from_raw_parts(entry.sites.load(Ordering::Relaxed), count) };
        let after = rip.wrapping_sub(entry.base.load(Ordering::Relaxed)) as i64;
        if let Ok(index) = sites.binary_search_by_key(&after, |site| site.after) {
            return Some(i64::from(sites[index].number));
        }
    }
    None
}

/// The data of the slot of the patched site whose `syscall` ends at `rip`: with that in
/// r11 and the call's number in rax, stage 1 makes the call as the site would.
pub fn slot_data_of(rip: usize) -> Option<usize> {
    for entry in &REGISTERED {
        let count = entry.count.load(Ordering::Acquire);
        if count == 0 {
            return None;
        }
        let base = entry.base.load(Ordering::Relaxed);
        // SAFETY: as in `site_after`; a patched site begins with a jump.
        unsafe {
            let sites = std::slice::from_raw_parts(entry.sites.load(Ordering::Relaxed), count);
            let after = rip.wrapping_sub(base) as i64;
            if let Ok(index) = sites.binary_search_by_key(&after, |site| site.after) {
                let start = base + sites[index].start as usize;
                let jump = start as *const [u8; 5];
                let [0xe9, a, b, c, d] = jump.read() else {
                    return None; // left alone in this process
                };
                let slot =
                    (start + 5).wrapping_add_signed(i32::from_le_bytes([a, b, c, d]) as isize);
                return Some(slot + callsite::SLOT_DATA);
            }
        }
    }
    None
}

/// A thread on its way from stage 1's look at the table to a call that may change files, or
/// waits until a time, is sent to stage 1 again: the table it looked at may be over when it goes on. There %r11
/// is the slot's data to the end and %rax the number, or about to be, so nothing is lost. At the
/// `syscall` itself (also one that the kernel restarts) both are made so. One on its way to a
/// [`callsite::LifeCall`] finds out whether it is still in that life. Anywhere else nothing is done. Async-signal-safe.
///
/// # Safety
/// In a signal handler whose frame `uc` is, or in the restorer that goes back to it.
pub unsafe fn rewind(uc: *mut libc::ucontext_t) {
    // SAFETY: the handler's own frame (the caller's promise); patched text stays mapped.
    unsafe {
        let regs = &mut (*uc).uc_mcontext.gregs;
        let rip = regs[libc::REG_RIP as usize] as usize;
        let deciding = (callsite::stage1()..callsite::stage1_end()).contains(&rip)
            || (callsite::forward()..callsite::forward_end()).contains(&rip);
        if deciding {
            regs[libc::REG_RIP as usize] = callsite::stage1() as i64;
            return;
        }
        if (callsite::life_compare()..callsite::life_after()).contains(&rip) {
            regs[libc::REG_RIP as usize] = callsite::life_compare() as i64;
            return;
        }
        if !hooks::looks_again(regs[libc::REG_RAX as usize]) {
            return;
        }
        if let Some(data) = slot_data_of(rip.wrapping_add(2)) {
            regs[libc::REG_R11 as usize] = data as i64;
            regs[libc::REG_RIP as usize] = callsite::stage1() as i64;
        }
    }
}

/// What the restorer of the program's handlers calls, with the frame that it goes back to.
unsafe extern "C" fn rewind_frame(uc: *mut u8) {
    // SAFETY: forwarded.
    unsafe {
        rewind(uc.cast());
        blocked::leave(uc.cast());
        // A handler that has run since before pages were protected.
        fault::keep_open_in(uc.cast());
    }
}

/// What stage 2 calls.
unsafe extern "C" fn stage2(frame: *mut u8) -> u64 {
    // SAFETY: stage 2 passes the frame that it pushed, exclusively ours until we return.
    let frame = unsafe { &mut *frame.cast::<CallFrame>() };
    dispatch(frame) as u64
}

/// Handles one intercepted call. Any thread, any state of the program.
pub fn dispatch(frame: &mut CallFrame) -> Verdict {
    let bits = record_entry(frame);
    if bits & HOOKED != 0 {
        return hooks::dispatch(frame);
    }
    Verdict::Forward
}

/// Leaves the entry record of a call that wants one; returns the call's table byte.
pub fn record_entry(frame: &CallFrame) -> u8 {
    let bits = usize::try_from(frame.rax)
        .ok()
        .and_then(callsite::hook_byte)
        .map_or(0, |byte| byte.load(Ordering::Relaxed));
    if bits & RECORDED != 0 {
        entry::note(frame);
    }
    bits
}

/// CLOCK_MONOTONIC in nanoseconds. Async-signal-safe.
pub fn now_ns() -> u64 {
    let mut time = [0_u64; 2];
    // SAFETY: the kernel writes two words into `time`.
    unsafe {
        ckpt_sys::syscall!(
            libc::SYS_clock_gettime,
            libc::CLOCK_MONOTONIC,
            time.as_mut_ptr()
        );
    }
    time[0] * 1_000_000_000 + time[1]
}
