//! Puts prepared slots to their place and makes a library's sites jump to them.
//!
//! Constructor only. Nothing here may call libc while its text is being changed, and
//! no page is ever left both writable and executable.

use super::analyse::{Kind, LeftAlone};
use super::object::Object;
use super::prepared::{Header, PAGE, SiteEntry, within_jump};
use ckpt_sys::{callsite, raw::check, syscall};
use libc::{MAP_ANONYMOUS, MAP_FIXED, MAP_FIXED_NOREPLACE, MAP_PRIVATE};
use libc::{PROT_EXEC, PROT_READ, PROT_WRITE};

/// Room for head, slots and the pointer's page.
pub const ROOM: usize = 256 << 10;

/// Finds and reserves address space near `base` for a head when the hole is too far
/// away. Unwinders do not know such a place: asynchronous cancellation in its few
/// instructions skips destructors.
pub fn reserve_near(base: usize) -> Option<usize> {
    for step in 1..=24 {
        for place in [
            base.wrapping_sub(step * callsite::HOLE_SPAN * 4),
            base.wrapping_add(step * callsite::HOLE_SPAN * 4),
        ] {
            let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED_NOREPLACE;
            // SAFETY: a fresh mapping that replaces nothing.
            let mapped = unsafe {
                check(syscall!(
                    libc::SYS_mmap,
                    place,
                    ROOM,
                    libc::PROT_NONE,
                    flags,
                    -1i32,
                    0
                ))
            };
            match mapped {
                Ok(at) if at == place && within_jump(base, at) => return Some(at),
                // A kernel without MAP_FIXED_NOREPLACE took it for a hint.
                // SAFETY: unmaps what was mapped just now.
                Ok(at) => unsafe {
                    syscall!(libc::SYS_munmap, at, ROOM);
                },
                Err(_) => {}
            }
        }
    }
    None
}

/// Maps `len` bytes of head and slots of an open cached copy to `place`, read-only.
///
/// # Safety
/// `place` lies in the hole or in space from [`reserve_near`], and is free.
pub unsafe fn map_head(fd: i32, place: usize, len: usize) -> Result<(), i32> {
    let flags = MAP_PRIVATE | MAP_FIXED;
    // SAFETY: the range is ours (the caller's promise).
    unsafe {
        check(syscall!(
            libc::SYS_mmap,
            place,
            len,
            PROT_READ,
            flags,
            fd,
            0
        ))
    }
    .map(drop)
}

/// Makes a mapped and verified head executable.
///
/// # Safety
/// After [`map_head`] with the same range.
pub unsafe fn enable_slots(place: usize, len: usize) -> Result<(), i32> {
    // SAFETY: the range is ours.
    unsafe {
        check(syscall!(
            libc::SYS_mprotect,
            place,
            len,
            PROT_READ | PROT_EXEC
        ))?;
        set_pointer(place + len)
    }
}

/// Copies head and slots to `place`.
///
/// # Safety
/// As for [`map_head`].
pub unsafe fn copy_slots(bytes: &[u8], place: usize) -> Result<(), i32> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    // SAFETY: the range is ours and nobody executes it yet.
    unsafe {
        let len = bytes.len();
        check(syscall!(
            libc::SYS_mmap,
            place,
            len,
            PROT_READ | PROT_WRITE,
            flags,
            -1i32,
            0
        ))?;
        std::ptr::copy_nonoverlapping(bytes.as_ptr(), place as *mut u8, len);
        check(syscall!(
            libc::SYS_mprotect,
            place,
            len,
            PROT_READ | PROT_EXEC
        ))?;
        set_pointer(place + len)
    }
}

/// Makes the page at `page` hold stage 1's address.
unsafe fn set_pointer(page: usize) -> Result<(), i32> {
    let flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED;
    // SAFETY: the page lies behind the slots, in the same reserved range.
    unsafe {
        check(syscall!(
            libc::SYS_mmap,
            page,
            PAGE,
            PROT_READ | PROT_WRITE,
            flags,
            -1i32,
            0
        ))?;
        (page as *mut usize).write(callsite::stage1());
        check(syscall!(libc::SYS_mprotect, page, PAGE, PROT_READ))?;
    }
    Ok(())
}

/// Maps the patched text of an open cached copy over the library's.
///
/// # Safety
/// `fd` at `offset` holds the library's own text, patched for slots that are in place.
pub unsafe fn map_text(object: &Object, fd: i32, offset: usize) -> Result<(), i32> {
    let (start, len) = object.text_pages();
    let flags = MAP_PRIVATE | MAP_FIXED;
    // SAFETY: replaces pages by pages with the same contents but for the patches; the
    // kernel does it in one step.
    unsafe {
        check(syscall!(
            libc::SYS_mmap,
            start,
            len,
            PROT_READ | PROT_EXEC,
            flags,
            fd,
            offset
        ))
    }
    .map(drop)
}

/// What in-place patching did.
#[derive(Debug, Default, Clone, Copy)]
pub struct Patched {
    pub sites: usize,
    pub other_threads: usize,
    pub changed: usize,
}

impl Patched {
    pub fn left(&self) -> [(LeftAlone, usize); 2] {
        [
            (LeftAlone::OtherThreads, self.other_threads),
            (LeftAlone::Changed, self.changed),
        ]
    }
}

/// Patches the sites in the library's memory.
///
/// # Safety
/// The slots are in place. `alone`: no other thread runs; otherwise only those
/// sites are patched that change by a single store under running threads.
pub unsafe fn in_place(
    object: &Object,
    header: &Header,
    sites: &[SiteEntry],
    alone: bool,
) -> Result<Patched, i32> {
    let (start, len) = object.text_pages();
    // Executable all the time: other threads may be running in it.
    let writable = PROT_READ | PROT_WRITE | PROT_EXEC;
    // SAFETY: widens the access to the library's own text for the loop below.
    let opened = unsafe { check(syscall!(libc::SYS_mprotect, start, len, writable)) }.is_ok();
    // Sealed text, or a security module's objection: the kernel still writes through
    // /proc/self/mem.
    let memory = if opened {
        Memory::Mapped
    } else {
        Memory::open()?
    };
    let mut patched = Patched::default();
    for site in sites {
        let at = object.base + site.start as usize;
        let one_store = site.is(Kind::Immediate) && at / 64 == (at + 7) / 64;
        if !alone && !one_store {
            patched.other_threads += 1;
            continue;
        }
        if !expected(site, at) {
            patched.changed += 1;
            continue;
        }
        // SAFETY: `at` is a checked site in writable text; see the contract.
        match unsafe { memory.write(at, &site.patch(header)[..usize::from(site.len)]) } {
            true => patched.sites += 1,
            false => patched.changed += 1,
        }
    }
    match memory {
        // SAFETY: gives the text back its protection.
        Memory::Mapped => unsafe {
            check(syscall!(
                libc::SYS_mprotect,
                start,
                len,
                PROT_READ | PROT_EXEC
            ))?;
        },
        // SAFETY: closes our own descriptor.
        Memory::File(fd) => unsafe {
            syscall!(libc::SYS_close, fd);
        },
    }
    Ok(patched)
}

/// Are the bytes at the site those of an unpatched site?
fn expected(site: &SiteEntry, at: usize) -> bool {
    // SAFETY: the site lies in mapped text.
    let byte = |offset: usize| unsafe { ((at + offset) as *const u8).read_volatile() };
    let len = usize::from(site.len);
    let syscall = if site.is(Kind::Forward) { 0 } else { len };
    let call = byte(syscall) == 0x0f && byte(syscall + 1) == 0x05;
    let mov = !site.is(Kind::Immediate)
        || (byte(0) == 0xb8 && u16::from_le_bytes([byte(1), byte(2)]) == site.number as u16);
    call && mov && byte(0) != 0xe9
}

/// How text is written.
enum Memory {
    Mapped,
    File(i32),
}

impl Memory {
    fn open() -> Result<Memory, i32> {
        let path = c"/proc/self/mem".as_ptr();
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        // SAFETY: opens a file by a constant path.
        let fd = unsafe { check(syscall!(libc::SYS_openat, libc::AT_FDCWD, path, flags, 0)) }?;
        Ok(Memory::File(fd as i32))
    }

    /// # Safety
    /// `at` lies in a library's text and `bytes` are right there.
    unsafe fn write(&self, at: usize, bytes: &[u8]) -> bool {
        match self {
            // SAFETY: the text is writable now. The first eight bytes by one store, so
            // that a running thread sees the old or the new instruction; never by
            // memcpy, which lives in the text being changed.
            Memory::Mapped => unsafe {
                let mut word = ((at as *const u64).read_unaligned()).to_le_bytes();
                let first = bytes.len().min(8);
                for (index, byte) in bytes[..first].iter().enumerate() {
                    word[index] = *byte;
                }
                std::arch::asm!("mov qword ptr [{at}], {word}",
                    at = in(reg) at, word = in(reg) u64::from_le_bytes(word),
                    options(nostack, preserves_flags));
                for (index, byte) in bytes.iter().enumerate().skip(8) {
                    ((at + index) as *mut u8).write_volatile(*byte);
                }
                true
            },
            // SAFETY: writes our bytes to our own memory.
            Memory::File(fd) => unsafe {
                let len = bytes.len();
                syscall!(libc::SYS_pwrite64, *fd, bytes.as_ptr(), len, at) == len as isize
            },
        }
    }
}
