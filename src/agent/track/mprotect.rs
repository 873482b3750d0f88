//! The `mprotect` tracker: write protection and SIGSEGV (US 5,802,267, dirty page list).
//! Works on every kernel. Helper thread, while the program is stopped.
//!
//! What exists in private writable memory is protected, in few ranges (joined over small
//! holes); [`super::fault`] opens pages as they are written and marks them. A page is
//! clean when its byte says [`table::WATCHED`]. Never protected, always reported: stacks
//! in use, thread control blocks, alternate signal stacks, the library's own memory
//! ([`windows`]). Pages that appear, disappear or go back to their file are seen in the
//! page tables (`blank`).

use super::blank::{
    EXISTING, Range, blank_is_content, clip, groups, is_of_file, newly_blank, push, watchable,
    whole, without, without_file,
};
use super::pagemap::{PageMap, is};
use super::table::{self, EXEC, OPEN, SETTLED, WATCHED};
use super::{Change, Dirty, TrackError, Tracker, fault, own, touch};
use crate::agent::callsites::HOOKED;
use crate::agent::collect::memory::{How, PAGE, Piece};
use crate::agent::hooks::{altstack, files};
use crate::agent::procfs::{self, OwnFd};
use crate::agent::refusal;
use crate::agent::state;
use crate::agent::stop;
use crate::image::state::VmaKind;
use ckpt_sys::callsite::hook_byte;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::cell::UnsafeCell;
use std::sync::atomic::Ordering;

/// Holes up to this long are protected together with what lies around them.
const JOIN: u64 = 512 * PAGE;

const RW: u32 = (libc::PROT_READ | libc::PROT_WRITE) as u32;

/// Handler, hooks and masks in place: from here on pages may be protected. The world is
/// stopped, or the caller is a test.
pub fn switch_on() -> Result<(), i32> {
    fault::install()?;
    fault::unblock();
    for &nr in touch::NUMBERS {
        files::no_shortcut(nr as usize);
        if let Some(byte) = hook_byte(nr as usize) {
            byte.fetch_or(
                HOOKED | ckpt_sys::callsite::MAY_CHANGE_FILES,
                Ordering::SeqCst,
            );
        }
    }
    Ok(())
}

/// Watches by write protection.
pub struct Mprotect {
    pagemap: PageMap,
    /// Blank pages as of the last sweep: where that means nothing, and where it means
    /// content of a mapped image. A range can change from one to the other.
    blank: [Vec<Range>; 2],
    /// vm.max_map_count
    limit: u64,
}

impl Mprotect {
    pub fn new() -> Result<Mprotect, TrackError> {
        let text = procfs::read_file(b"/proc/sys/vm/max_map_count").unwrap_or_default();
        let limit = procfs::number(&text).map_or(65_530, |n| n as u64);
        Ok(Mprotect {
            pagemap: PageMap::open()?,
            blank: [Vec::new(), Vec::new()],
            limit,
        })
    }

    /// Protects the runs of `exist` (ascending) in a writable piece, but for the windows.
    fn protect(&self, piece: &Piece, exist: &[Range], windows: &[Range], join: u64) -> bool {
        let vma = &piece.vma;
        let mut joined: Vec<Range> = Vec::new();
        for &(from, to) in exist {
            match joined.last_mut() {
                Some(last) if from - last.1 <= join => last.1 = to,
                _ => joined.push((from, to)),
            }
        }
        let exec = match vma.prot & libc::PROT_EXEC as u32 {
            0 => 0,
            _ => EXEC,
        };
        let prot = vma.prot as i32 & !libc::PROT_WRITE;
        let mut complete = true;
        without(&joined, windows, |from, to| {
            let mut closed = true;
            table::runs(from, to, |_, _, state| closed &= state == WATCHED | exec);
            if closed {
                return;
            }
            // SAFETY: memory of the program, which is stopped; what it may do with it is
            // kept in the bytes.
            let done =
                check(unsafe { syscall!(libc::SYS_mprotect, from, to - from, prot) }).is_ok();
            table::set(from, to, if done { WATCHED | exec } else { 0 });
            complete &= done;
        });
        complete
    }
}

impl Tracker for Mprotect {
    fn name(&self) -> &'static str {
        "mprotect"
    }

    fn live(&self) -> bool {
        false
    }

    fn arm(&mut self, _: &[Piece]) -> Result<(), TrackError> {
        Ok(())
    }

    fn sweep(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        self.walk(pieces, seen, true)
    }

    fn look(&mut self, pieces: &[Piece], seen: &mut Dirty) -> Result<(), TrackError> {
        self.walk(pieces, seen, false)
    }

    fn moved(&mut self, _: Option<OwnFd>) -> Result<(), TrackError> {
        self.pagemap.reopen()
    }
}

impl Mprotect {
    /// Everything that has changed; `protect`: all of it is watched anew.
    fn walk(
        &mut self,
        pieces: &[Piece],
        seen: &mut Dirty,
        protect: bool,
    ) -> Result<(), TrackError> {
        let fail = |call| move |errno| TrackError::Call { call, errno };
        if !table::exists() {
            table::create().map_err(fail("mmap"))?;
            // Nothing is protected yet: every border that the map shows is the program's.
            for piece in pieces {
                table::mark_border(piece.vma.start);
                table::mark_border(piece.vma.end);
            }
        }
        switch_on().map_err(fail("rt_sigaction"))?;
        let mut now = Dirty::new();
        // Runs that exist, by the order of the pieces.
        let mut exist: Vec<Range> = Vec::new();
        for ((start, end), of_file) in groups(pieces) {
            let mut next = 0;
            let query = if of_file {
                EXISTING
            } else {
                without_file(EXISTING)
            };
            self.pagemap.scan(start, end, query, |from, to, what| {
                let of_file = what & is::PRESENT != 0 && what & is::FILE != 0;
                clip(pieces, &mut next, (from, to), |piece, from, to| {
                    if !(of_file && is_of_file(piece)) {
                        push(&mut exist, (from, to));
                    }
                });
            })?;
        }
        // What is written through protection leaves no trace.
        let traced = !refusal::was_noted(refusal::Kind::MemoryFile);
        let mut blank = [Vec::new(), Vec::new()];
        let mut at = 0;
        let mut jobs: Vec<(usize, Vec<Range>)> = Vec::new();
        for (index, piece) in pieces.iter().enumerate() {
            let (start, end) = (piece.vma.start, piece.vma.end);
            if !watchable(piece) {
                if matches!(piece.how, How::Scan | How::All | How::Readable) {
                    whole(&mut self.pagemap, piece, (start, end), &mut now)?;
                }
                continue;
            }
            while at < exist.len() && exist[at].1 <= start {
                at += 1;
            }
            let mine: Vec<Range> = exist[at..]
                .iter()
                .take_while(|run| run.0 < end)
                .map(|run| (run.0.max(start), run.1.min(end)))
                .collect();
            let kind = &mut blank[usize::from(blank_is_content(piece))];
            without(&[(start, end)], &mine, |from, to| push(kind, (from, to)));
            let writable = piece.vma.prot & RW == RW;
            for &(from, to) in &mine {
                table::runs(from, to, |from, to, state| {
                    let clean = match writable {
                        true => state & WATCHED != 0,
                        false => state & SETTLED != 0,
                    };
                    if !(clean && traced) {
                        now.insert(from, to, Change::Present);
                    }
                });
            }
            if blank_is_content(piece) {
                without(&[(start, end)], &mine, |from, to| {
                    table::runs(from, to, |from, to, state| {
                        if state == 0 {
                            now.insert(from, to, Change::Present);
                        }
                    });
                });
            }
            jobs.push((index, mine));
        }
        for (now_blank, before) in blank.iter().zip(&self.blank) {
            newly_blank(pieces, now_blank, before, &mut now);
        }
        self.blank = blank;
        if protect {
            let windows = windows(pieces);
            self.close(pieces, jobs, &windows);
        }
        seen.unite(&now);
        Ok(())
    }
}

impl Mprotect {
    /// Protects everything anew, and marks what needs no protection.
    fn close(&mut self, pieces: &[Piece], jobs: Vec<(usize, Vec<Range>)>, windows: &[Range]) {
        // So many ranges at the most, whatever the holes.
        let allowed = self.limit.saturating_sub(pieces.len() as u64) / 4;
        let mut join = JOIN;
        let count = |join: u64| {
            let gaps = |runs: &[Range]| {
                runs.windows(2)
                    .filter(|pair| pair[1].0 - pair[0].1 > join)
                    .count() as u64
            };
            jobs.iter().map(|(_, runs)| 1 + gaps(runs)).sum::<u64>()
        };
        while count(join) > allowed && join < 1 << 46 {
            join *= 8;
        }
        let ranges = count(join);
        for (index, mine) in &jobs {
            let piece = &pieces[*index];
            let (start, end) = (piece.vma.start, piece.vma.end);
            if blank_is_content(piece) {
                if table::prepare(start, end) {
                    table::runs(start, end, |from, to, state| {
                        if state == 0 {
                            table::set(from, to, SETTLED);
                        }
                    });
                }
            } else if let (Some(first), Some(last)) = (mine.first(), mine.last())
                && !table::prepare(first.0, last.1)
            {
                continue;
            }
            if piece.vma.prot & RW == RW {
                if piece.vma.kind != VmaKind::Stack {
                    self.protect(piece, mine, windows, join);
                }
            } else {
                for &(from, to) in mine {
                    table::set(from, to, SETTLED);
                }
            }
        }
        let used = pieces.len() as u64 + 2 * ranges + 2 * windows.len() as u64;
        let left = self.limit.saturating_sub(used + 2000) / 2;
        fault::begin_interval((left / 2).min(16 << 10) as u32);
    }
}

/// A thread of the program that does not run, and what the kernel writes for it.
#[derive(Clone, Copy)]
pub struct Resuming {
    pub ucontext: u64,
    pub fs: u64,
    /// Robust list, word cleared at its end, rseq area; 0 for none.
    pub words: [u64; 3],
}

struct ResumingThreads(UnsafeCell<(Vec<Resuming>, Range)>);

// SAFETY: the helper thread's alone.
unsafe impl Sync for ResumingThreads {}

static RESUMING: ResumingThreads = ResumingThreads(UnsafeCell::new((Vec::new(), (0, 0))));

/// The threads that a restore is about to let go, for the sweeps of `f`. Helper thread.
/// They wait in the restorer's scratch memory, `(address, length)`.
pub fn while_resuming(threads: Vec<Resuming>, scratch: (u64, u64), f: impl FnOnce()) {
    let scratch = (scratch.0, scratch.0 + scratch.1);
    // SAFETY: only this thread looks, in `windows`. What an image holds there is forgotten
    // unread: it belongs to the helper of another life.
    unsafe { RESUMING.0.get().write((threads, scratch)) };
    f();
    // SAFETY: as above.
    drop(std::mem::take(unsafe { &mut *RESUMING.0.get() }));
}

/// What must not be protected, ascending: around the stack pointers of the stopped
/// threads, their control blocks and alternate stacks, and memory of the library.
pub fn windows(pieces: &[Piece]) -> Vec<Range> {
    /// Free stack left open below a stack pointer: where it goes next, and more than any
    /// signal frame needs.
    const BELOW: u64 = 16 << 20;
    const ABOVE: u64 = 256 << 10;
    let mut windows: Vec<Range> = fault::kept_open().chain(altstack::own_stacks()).collect();
    let mut around = |thread: Resuming| {
        let Resuming {
            ucontext,
            fs,
            words,
        } = thread;
        // SAFETY: the frame of a stopped thread.
        let (sp, stack) = unsafe {
            let uc = ucontext as *const libc::ucontext_t;
            (
                (*uc).uc_mcontext.gregs[libc::REG_RSP as usize] as u64,
                (*uc).uc_stack,
            )
        };
        // A glibc thread's control block lies at the upper end of its stack.
        let top = match fs.wrapping_sub(sp) {
            0..=0x400_0000 => fs + touch::ABOVE_TLS,
            _ => sp + ABOVE,
        };
        windows.push((sp.saturating_sub(BELOW), top));
        windows.push((ucontext & !(PAGE - 1), ucontext + (32 << 10)));
        if fs != 0 {
            windows.push((fs - touch::BELOW_TLS, fs + touch::ABOVE_TLS));
        }
        for word in words {
            if word != 0 {
                windows.push((word, word + 64));
            }
        }
        let base = stack.ss_sp as u64;
        if base != 0 && stack.ss_flags & libc::SS_DISABLE == 0 {
            windows.push((base, base + stack.ss_size as u64));
        }
    };
    stop::parked(|slot| {
        around(Resuming {
            ucontext: slot.ucontext,
            fs: slot.fs_base,
            words: [slot.robust_list, slot.clear_child_tid, slot.rseq],
        });
    });
    // SAFETY: set by the restored helper around its own sweep.
    let (threads, scratch) = unsafe { &*RESUMING.0.get() };
    threads.iter().for_each(|&thread| around(thread));
    windows.push(*scratch);
    windows.extend(own::data(pieces));
    let awake = state::awake_page();
    if awake != 0 {
        windows.push((awake, awake + PAGE));
    }
    windows.retain(|window| window.0 < window.1);
    for window in &mut windows {
        window.0 &= !(PAGE - 1);
        window.1 = window.1.next_multiple_of(PAGE);
    }
    windows.sort_unstable();
    let mut joined = Vec::new();
    for window in windows {
        push(&mut joined, window);
    }
    joined
}

/// The map as the program believes it to be: what we have protected is writable. Splits
/// and joins pieces accordingly. After `memory::collect`.
pub fn program_view(pieces: &mut Vec<Piece>) {
    if !fault::active() {
        return;
    }
    let mut out: Vec<Piece> = Vec::with_capacity(pieces.len());
    for piece in pieces.drain(..) {
        let private = !matches!(
            piece.vma.kind,
            VmaKind::Shared { .. } | VmaKind::FileShared { .. }
        );
        let (start, end) = (piece.vma.start, piece.vma.end);
        let writable = piece.vma.prot & libc::PROT_WRITE as u32 != 0;
        if !private {
            out.push(piece);
            continue;
        }
        table::runs(start, end, |from, to, state| {
            let mut part = part(&piece, from, to);
            if state & WATCHED != 0 && !writable {
                part.vma.prot |= libc::PROT_WRITE as u32;
            } else if state & WATCHED != 0 {
                // Somebody has changed the protection behind our back.
                table::set(from, to, OPEN | state & EXEC);
            }
            join(&mut out, part);
        });
    }
    *pieces = out;
}

fn part(piece: &Piece, from: u64, to: u64) -> Piece {
    let mut part = piece.clone();
    if let VmaKind::FilePrivate { offset, .. } | VmaKind::PrivateOf { offset, .. } =
        &mut part.vma.kind
    {
        *offset += from - piece.vma.start;
    }
    (part.vma.start, part.vma.end) = (from, to);
    part
}

/// Appends, or joins with the last one what the kernel would have joined.
fn join(out: &mut Vec<Piece>, piece: Piece) {
    if let Some(last) = out.last_mut()
        && !table::is_border(piece.vma.start)
        && last.vma.end == piece.vma.start
        && last.vma.prot == piece.vma.prot
        && last.vma.flags == piece.vma.flags
        && last.how == piece.how
    {
        let alike = match (&last.vma.kind, &piece.vma.kind) {
            (
                VmaKind::FilePrivate { path, offset },
                VmaKind::FilePrivate {
                    path: other,
                    offset: at,
                },
            ) => path == other && offset + (last.vma.end - last.vma.start) == *at,
            (
                VmaKind::PrivateOf { object, offset },
                VmaKind::PrivateOf {
                    object: other,
                    offset: at,
                },
            ) => object == other && offset + (last.vma.end - last.vma.start) == *at,
            (a, b) => a == b && matches!(a, VmaKind::Anon | VmaKind::Heap | VmaKind::Stack),
        };
        if alike {
            last.vma.end = piece.vma.end;
            return;
        }
    }
    out.push(piece);
}

#[cfg(test)]
mod tests;
