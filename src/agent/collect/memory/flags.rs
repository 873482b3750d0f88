//! VmFlags: what `madvise`, `mlock` and `mmap` have set for the areas of a plan.
//!
//! Read from smaps before the stop or by the writer, or taken over from a plan that knows them.

use super::lines::parse_line;
use super::{How, Piece, Plan};
use crate::agent::hooks;
use crate::agent::procfs::read_file;
use crate::image::state::{VmaKind, VmaState, vma_flag};

/// The bits of a VmFlags line that are restored.
fn parse_flags(text: &[u8]) -> u32 {
    let mut flags = 0;
    for word in text.split(|&b| b == b' ') {
        flags |= match word {
            b"hg" => vma_flag::HUGEPAGE,
            b"nh" => vma_flag::NOHUGEPAGE,
            b"lo" => vma_flag::LOCKED,
            b"dc" => vma_flag::DONTFORK,
            b"dd" => vma_flag::DONTDUMP,
            b"nr" => vma_flag::NORESERVE,
            b"wf" => vma_flag::WIPEONFORK,
            b"mg" => vma_flag::MERGEABLE,
            b"rr" => vma_flag::RANDOM,
            b"sr" => vma_flag::SEQUENTIAL,
            b"lf" => vma_flag::LOCKONFAULT,
            b"gd" => vma_flag::GROWSDOWN,
            b"ht" => vma_flag::HUGETLB,
            _ => 0,
        };
    }
    flags
}

impl Plan {
    /// Reads VmFlags (smaps walks every page table: not for the stop, unless it must).
    pub fn read_flags(&mut self) {
        if std::mem::replace(&mut self.flags_known, true) {
            return;
        }
        let Ok(text) = read_file(b"/proc/thread-self/smaps") else {
            return;
        };
        self.seen = vec![false; self.pieces.len()];
        let mut range = (0, 0);
        let mut next = 0;
        for line in text.split(|&b| b == b'\n') {
            if let Some(rest) = line.strip_prefix(b"VmFlags:") {
                let flags = parse_flags(rest);
                let may_write = rest.split(|&b| b == b' ').any(|word| word == b"mw");
                while next < self.pieces.len() && self.pieces[next].vma.end <= range.0 {
                    next += 1;
                }
                let mut k = next;
                while k < self.pieces.len() && self.pieces[k].vma.start < range.1 {
                    let vma = &mut self.pieces[k].vma;
                    vma.flags |= flags;
                    if flags & vma_flag::GROWSDOWN != 0 && vma.kind == VmaKind::Anon {
                        vma.kind = VmaKind::Stack;
                        hooks::memory::note_grows_down();
                    }
                    if let VmaKind::FileShared { writable, .. } = &mut vma.kind {
                        *writable = may_write;
                    }
                    self.seen[k] = true;
                    k += 1;
                }
            } else if line
                .first()
                .is_some_and(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b))
                && let Some(line) = parse_line(line)
            {
                range = (line.start, line.end);
            }
        }
    }

    /// In a forked writer that has just read the flags: a range that fork did not pass
    /// on, whole (MADV_DONTFORK) or with its contents (MADV_WIPEONFORK). `ours` is the
    /// agent's own wipe-on-fork page.
    pub fn not_inherited(&self, ours: u64) -> Option<u64> {
        self.pieces
            .iter()
            .zip(&self.seen)
            .filter(|(piece, _)| !matches!(piece.how, How::Nothing | How::Copied))
            .find(|(piece, seen)| {
                let wiped = piece.vma.flags & vma_flag::WIPEONFORK != 0;
                !**seen || (wiped && piece.vma.start != ours)
            })
            .map(|(piece, _)| piece.vma.start)
    }

    /// Were the flags read (at the stop, unless this is the writer)?
    pub fn flags_known(&self) -> bool {
        self.flags_known
    }

    /// A plan that [`Plan::take_flags`] can look areas up in.
    pub fn with_flags(vmas: Vec<VmaState>) -> Plan {
        let how = How::Nothing;
        Plan {
            pieces: vmas.into_iter().map(|vma| Piece { vma, how }).collect(),
            flags_known: true,
            ..Plan::default()
        }
    }

    /// Takes over the flags of `known`, which was collected a moment ago, while the program
    /// ran, and which nothing has advised otherwise since. False when a range is new: its
    /// flags must be read.
    pub fn take_flags(&mut self, known: &Plan) -> bool {
        if !known.flags_known {
            return false;
        }
        let mut next = 0;
        let same = |a: &VmaKind, b: &VmaKind| match (a, b) {
            (VmaKind::FilePrivate { path: a, .. }, VmaKind::FilePrivate { path: b, .. })
            | (VmaKind::FileShared { path: a, .. }, VmaKind::FileShared { path: b, .. }) => a == b,
            // Numbers of objects may differ from one look to the next.
            (VmaKind::Shared { .. }, VmaKind::Shared { .. })
            | (VmaKind::PrivateOf { .. }, VmaKind::PrivateOf { .. }) => true,
            _ => a == b,
        };
        for piece in &mut self.pieces {
            let vma = &mut piece.vma;
            while known
                .pieces
                .get(next)
                .is_some_and(|k| k.vma.end <= vma.start)
            {
                next += 1;
            }
            // A range that has grown or shrunk in its place, or one that is as it was.
            let old = known.pieces.get(next).map(|k| &k.vma).filter(|old| {
                old.start < vma.end && old.prot == vma.prot && same(&old.kind, &vma.kind)
            });
            let Some(old) = old else {
                return false;
            };
            vma.flags |= old.flags;
            if let (
                VmaKind::FileShared { writable, .. },
                VmaKind::FileShared { writable: was, .. },
            ) = (&mut vma.kind, &old.kind)
            {
                *writable = *was;
            }
        }
        self.flags_known = true;
        self.seen = vec![true; self.pieces.len()];
        true
    }
}
