//! What the kernel has mapped where: one mapping at a time, by the PROCMAP_QUERY
//! ioctl, or by reading the maps file where the kernel (before 6.11) has none.
//!
//! Any thread, forked children too; a descriptor lives for the time of a [`Maps`].
//! No allocation.

use crate::agent::state::InHook;
use ckpt_sys::{raw::check, syscall};

/// One mapping.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Mapping {
    pub start: u64,
    pub end: u64,
    /// PROT_*.
    pub prot: u32,
    pub shared: bool,
    /// `major << 32 | minor` as the maps file shows it, and the inode; 0, 0 for
    /// anonymous memory.
    pub dev: u64,
    pub ino: u64,
    pub offset: u64,
}

impl Mapping {
    /// Private anonymous memory (heap and stack included).
    pub fn is_anonymous(&self) -> bool {
        !self.shared && self.dev == 0 && self.ino == 0
    }
}

/// An open view of our own memory map. No checkpoint comes while there is one: its descriptor is in
/// the program's table, and names a task that is not there at a restore.
pub struct Maps {
    fd: i32,
    by_text: bool,
    _hook: InHook,
}

#[repr(C)]
#[derive(Default)]
struct Query {
    size: u64,
    flags: u64,
    addr: u64,
    vma_start: u64,
    vma_end: u64,
    vma_flags: u64,
    page_size: u64,
    offset: u64,
    inode: u64,
    dev_major: u32,
    dev_minor: u32,
    name_size: u32,
    build_id_size: u32,
    name_addr: u64,
    build_id_addr: u64,
}

const PROCMAP_QUERY: u64 = 0xc068_6611;
const COVERING_OR_NEXT: u64 = 0x10;
const _: () = assert!(size_of::<Query>() == 104);

impl Maps {
    pub fn open() -> Result<Maps, i32> {
        let hook = InHook::enter();
        let path = c"/proc/thread-self/maps";
        // SAFETY: a constant path.
        let fd = check(unsafe {
            syscall!(
                libc::SYS_openat,
                libc::AT_FDCWD,
                path.as_ptr(),
                libc::O_RDONLY | libc::O_CLOEXEC
            )
        })? as i32;
        Ok(Maps {
            fd,
            by_text: false,
            _hook: hook,
        })
    }

    /// The mapping that covers `addr` or the next one above it.
    pub fn at(&mut self, addr: u64) -> Result<Option<Mapping>, i32> {
        if !self.by_text {
            let mut q = Query {
                size: size_of::<Query>() as u64,
                flags: COVERING_OR_NEXT,
                addr,
                ..Default::default()
            };
            // SAFETY: the structure is ours.
            let ret =
                check(unsafe { syscall!(libc::SYS_ioctl, self.fd, PROCMAP_QUERY, &raw mut q) });
            match ret {
                Ok(_) => {
                    return Ok(Some(Mapping {
                        start: q.vma_start,
                        end: q.vma_end,
                        prot: (q.vma_flags & 7) as u32,
                        shared: q.vma_flags & 8 != 0,
                        dev: u64::from(q.dev_major) << 32 | u64::from(q.dev_minor),
                        ino: q.inode,
                        offset: q.offset,
                    }));
                }
                Err(libc::ENOENT) => return Ok(None),
                Err(_) => self.by_text = true,
            }
        }
        self.scan(addr)
    }

    /// Is there a mapping from exactly `start` to `end` whose name begins with `name`? False
    /// also where the kernel does not tell.
    pub fn is(&mut self, start: u64, end: u64, name: &[u8]) -> bool {
        let mut buf = [0u8; 32];
        let mut q = Query {
            size: size_of::<Query>() as u64,
            addr: start,
            name_size: buf.len() as u32,
            name_addr: buf.as_mut_ptr() as u64,
            ..Default::default()
        };
        // SAFETY: the structure and the buffer are ours.
        let ret = check(unsafe { syscall!(libc::SYS_ioctl, self.fd, PROCMAP_QUERY, &raw mut q) });
        ret.is_ok() && (q.vma_start, q.vma_end) == (start, end) && buf.starts_with(name)
    }

    /// The same from the text.
    fn scan(&mut self, addr: u64) -> Result<Option<Mapping>, i32> {
        let mut buf = [0u8; 1024];
        let mut have = 0;
        // SAFETY: our descriptor.
        check(unsafe { syscall!(libc::SYS_lseek, self.fd, 0, libc::SEEK_SET) })?;
        let mut skipping = false;
        loop {
            // SAFETY: reads into the free part of the buffer.
            let n = check(unsafe {
                syscall!(
                    libc::SYS_read,
                    self.fd,
                    buf.as_mut_ptr().wrapping_add(have),
                    buf.len() - have
                )
            })?;
            if n == 0 {
                return Ok(None);
            }
            have += n;
            let mut from = 0;
            while let Some(len) = buf[from..have].iter().position(|&b| b == b'\n') {
                let line = &buf[from..from + len];
                from += len + 1;
                if !std::mem::take(&mut skipping)
                    && let Some(m) = parse(line)
                    && m.end > addr
                {
                    return Ok(Some(m));
                }
            }
            if from == 0 && have == buf.len() {
                // A line longer than the buffer: its head is all that is needed.
                if !std::mem::replace(&mut skipping, true)
                    && let Some(m) = parse(&buf[..have])
                    && m.end > addr
                {
                    return Ok(Some(m));
                }
                from = have;
            }
            buf.copy_within(from..have, 0);
            have -= from;
        }
    }
}

impl Drop for Maps {
    fn drop(&mut self) {
        // SAFETY: our own descriptor.
        unsafe { syscall!(libc::SYS_close, self.fd) };
    }
}

/// `start-end rwxp offset major:minor inode  path`
pub fn parse(line: &[u8]) -> Option<Mapping> {
    let mut at = 0;
    let mut number = |radix: u64, stop: u8| -> Option<u64> {
        let mut value = 0u64;
        while let Some(&b) = line.get(at) {
            at += 1;
            if b == stop {
                return Some(value);
            }
            let digit = (b as char).to_digit(radix as u32)?;
            value = value.checked_mul(radix)?.checked_add(u64::from(digit))?;
        }
        None
    };
    let start = number(16, b'-')?;
    let end = number(16, b' ')?;
    let perms = line.get(at..at + 4)?;
    let (mut prot, shared) = (0, perms[3] == b's');
    for (i, (c, bit)) in [(b'r', 1), (b'w', 2), (b'x', 4)].iter().enumerate() {
        if perms[i] == *c {
            prot |= bit;
        }
    }
    let rest = line.get(at + 5..)?;
    let mut fields = rest.split(|&b| b == b' ');
    let hex = |f: &[u8]| u64::from_str_radix(std::str::from_utf8(f).ok()?, 16).ok();
    let offset = hex(fields.next()?)?;
    let mut dev = fields.next()?.split(|&b| b == b':');
    let (major, minor) = (hex(dev.next()?)?, hex(dev.next()?)?);
    let ino = std::str::from_utf8(fields.next()?).ok()?.parse().ok()?;
    Some(Mapping {
        start,
        end,
        prot,
        shared,
        dev: major << 32 | minor,
        ino,
        offset,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_ways_agree() {
        let mut a = Maps::open().unwrap();
        let mut b = Maps::open().unwrap();
        b.by_text = true;
        let mut addr = 0;
        let mut seen = 0;
        while let Some(m) = a.at(addr).unwrap() {
            assert_eq!(b.at(addr).unwrap(), Some(m), "at {addr:x}");
            addr = m.end;
            seen += 1;
            if addr > 1 << 47 {
                break;
            }
        }
        assert!(seen > 5);
        assert_eq!(b.at(!0 - 1).unwrap(), None);
    }

    #[test]
    fn parses_a_line() {
        let line = b"7f00-8f00 rw-s 00001000 fe:0a 1234567 /a b\n";
        let m = parse(line).unwrap();
        assert_eq!((m.start, m.end, m.prot), (0x7f00, 0x8f00, 3));
        assert_eq!((m.dev, m.ino, m.offset), (0xfe << 32 | 10, 1234567, 4096));
        assert!(m.shared);
        assert!(parse(b"").is_none() && parse(b"zz-").is_none());
    }
}
