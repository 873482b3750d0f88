//! The memory map, and where its pages lie in the image.
//!
//! Filled by `agent::collect::memory` and the writer of the image; read by `agent::restore`,
//! by merging and by the command. Only data, as all of [`super`].

use crate::image::PAGE;
use serde::{Deserialize, Serialize};

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct MemoryState {
    /// Ascending, disjoint.
    pub vmas: Vec<VmaState>,
    /// Where page data lies in the image, ascending by address, disjoint.
    pub extents: Vec<Extent>,
    /// Shared memory objects whose contents are ours to keep.
    pub shared: Vec<SharedObject>,
    pub vvar_start: u64,
    pub vdso_start: u64,
    pub vdso_end: u64,
    /// The generation whose pages count where this one says nothing; `None` = this
    /// image is complete. With `dropped` in a section of its own (`codec`).
    #[serde(skip)]
    pub base: Option<Base>,
    /// `(address, pages)` for which the base no longer counts and which this image does
    /// not hold. Ascending, disjoint, also from `extents`; empty without a base.
    #[serde(skip)]
    pub dropped: Vec<(u64, u64)>,
    /// `(address, pages)` of guard regions (MADV_GUARD_INSTALL), which hold nothing and must
    /// not be touched. Ascending, disjoint. In a section of its own as well.
    #[serde(skip)]
    pub guarded: Vec<(u64, u64)>,
    /// Objects whose contents are pages of this image and of those it stands on, like
    /// memory's. Ascending by `at`, disjoint. In a section of its own.
    #[serde(skip)]
    pub objects: Vec<ObjectSpace>,
}

/// Addresses from here on are those of contents of objects: no memory is there.
pub const OBJECTS_AT: u64 = 1 << 60;

/// The contents of a shared object, or of an open file without a name: page `n` of it is
/// the page `at + n * 4096` of `MemoryState::extents` and `dropped`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ObjectSpace {
    pub dev: u64,
    pub ino: u64,
    pub at: u64,
    pub npages: u64,
}

impl ObjectSpace {
    pub fn end(&self) -> u64 {
        self.at.saturating_add(self.npages.saturating_mul(PAGE))
    }
}

/// The image that an increment stands on (docs/INCREMENTS.md).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Base {
    pub generation: u64,
    /// The header checksum of its image at the time (`MemberRecord::header_crc`).
    pub header_crc: u32,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmaState {
    pub start: u64,
    pub end: u64,
    /// PROT_*.
    pub prot: u32,
    pub kind: VmaKind,
    /// VmFlags of /proc/self/smaps that `madvise`, `mlock` and `mmap` set, one
    /// bit each (`vma_flag`).
    pub flags: u32,
}

/// VmFlags that are restored.
pub mod vma_flag {
    pub const HUGEPAGE: u32 = 1; // hg
    pub const NOHUGEPAGE: u32 = 1 << 1; // nh
    pub const LOCKED: u32 = 1 << 2; // lo
    pub const DONTFORK: u32 = 1 << 3; // dc
    pub const DONTDUMP: u32 = 1 << 4; // dd
    pub const NORESERVE: u32 = 1 << 5; // nr
    pub const WIPEONFORK: u32 = 1 << 6; // wf
    pub const MERGEABLE: u32 = 1 << 7; // mg
    pub const RANDOM: u32 = 1 << 8; // rr
    pub const SEQUENTIAL: u32 = 1 << 9; // sr
    pub const LOCKONFAULT: u32 = 1 << 10; // lf
    pub const GROWSDOWN: u32 = 1 << 11; // gd
    pub const HUGETLB: u32 = 1 << 12; // ht
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmaKind {
    /// Private anonymous; absent pages are zero.
    Anon,
    /// Grows down: the main thread's stack, and what was mapped with MAP_GROWSDOWN.
    Stack,
    /// The brk heap.
    Heap,
    /// A private mapping of a named file; pages not in the image come from it.
    FilePrivate { path: Vec<u8>, offset: u64 },
    /// A shared mapping of a named file: contents belong to the persistent state.
    FileShared {
        path: Vec<u8>,
        offset: u64,
        writable: bool,
    },
    /// A mapping of `MemoryState::shared[object]` at `offset`.
    Shared { object: u32, offset: u64 },
    /// A private mapping of `MemoryState::shared[object]`, a file without a name that is open
    /// ([`super::DescriptorTable::of_contents`]); pages not in the image come from it.
    PrivateOf { object: u32, offset: u64 },
}

impl VmaKind {
    /// A private mapping of a file: where it has no page of its own there is the file's.
    pub fn is_private_file(&self) -> bool {
        matches!(
            self,
            VmaKind::FilePrivate { .. } | VmaKind::PrivateOf { .. }
        )
    }
}

/// `npages` pages of 4096 bytes at `addr` lie at `offset` in the image file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Extent {
    pub addr: u64,
    pub npages: u64,
    pub offset: u64,
}

/// Anonymous shared memory, a memfd, SysV memory or a deleted file in a shared mapping.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SharedObject {
    pub dev: u64,
    pub ino: u64,
    /// Bytes.
    pub size: u64,
    /// As /proc/self/maps shows it, without " (deleted)".
    pub name: Vec<u8>,
    pub kind: SharedKind,
    /// Contents: `addr` is the offset in the object. Empty where `MemoryState::objects`
    /// has it.
    pub extents: Vec<Extent>,
}

#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SharedKind {
    /// MAP_SHARED|MAP_ANONYMOUS.
    #[default]
    Anonymous,
    Memfd,
    DeletedFile,
    SysV,
}
