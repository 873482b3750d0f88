//! Paths on the stack. Any context, as all of [`super`]; nothing here allocates.

use super::Sys;
use crate::persist::Id;
use std::mem::MaybeUninit;

pub const PATH_LEN: usize = 4096;

/// A NUL-terminated path on the stack.
pub struct CPath {
    buf: [MaybeUninit<u8>; PATH_LEN + 8],
    len: usize,
}

impl CPath {
    /// The pieces one after the other, nothing in between.
    pub fn new(pieces: &[&[u8]]) -> Sys<CPath> {
        let mut path = CPath {
            buf: [MaybeUninit::uninit(); PATH_LEN + 8],
            len: 0,
        };
        for piece in pieces {
            path.push(piece)?;
        }
        path.end();
        Ok(path)
    }

    /// `dir/name`.
    pub fn join(dir: &[u8], name: &[u8]) -> Sys<CPath> {
        let slash: &[u8] = if dir.last() == Some(&b'/') { b"" } else { b"/" };
        CPath::new(&[dir, slash, name])
    }

    /// `/proc/thread-self/fd/N`.
    pub fn of_fd(fd: i32) -> CPath {
        let mut path = CPath {
            buf: [MaybeUninit::uninit(); PATH_LEN + 8],
            len: 0,
        };
        // Both fit by far.
        let _ = path.push(b"/proc/thread-self/fd/");
        path.number(fd.max(0) as u64, 10);
        path.end();
        path
    }

    fn push(&mut self, bytes: &[u8]) -> Sys<()> {
        let room = self
            .buf
            .get_mut(self.len..self.len + bytes.len())
            .filter(|_| self.len + bytes.len() < PATH_LEN)
            .ok_or(libc::ENAMETOOLONG)?;
        if bytes.contains(&0) {
            return Err(libc::ENOENT);
        }
        for (place, byte) in room.iter_mut().zip(bytes) {
            place.write(*byte);
        }
        self.len += bytes.len();
        Ok(())
    }

    /// Appends a number, at least `1` digit, in base 10 or 16.
    pub fn number(&mut self, mut value: u64, base: u64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            let digit = (value % base) as u8;
            if let Some(place) = digits.get_mut(at) {
                *place = if digit < 10 {
                    b'0' + digit
                } else {
                    b'a' + digit - 10
                };
            }
            value /= base;
            if value == 0 || at == 0 {
                break;
            }
        }
        let _ = self.push(digits.get(at..).unwrap_or_default());
        self.end();
    }

    /// Appends bytes.
    pub fn add(&mut self, bytes: &[u8]) -> Sys<()> {
        self.push(bytes)?;
        self.end();
        Ok(())
    }

    fn end(&mut self) {
        if let Some(place) = self.buf.get_mut(self.len) {
            place.write(0);
        }
    }

    pub fn ptr(&self) -> *const u8 {
        self.buf.as_ptr().cast()
    }

    pub fn bytes(&self) -> &[u8] {
        // SAFETY: the first `len` bytes were written.
        unsafe { std::slice::from_raw_parts(self.ptr(), self.len) }
    }
}

/// `device-inode` in hexadecimal, as files of ours are named after inodes.
pub fn add_id(path: &mut CPath, id: &Id) -> Sys<()> {
    path.number(id.dev, 16);
    path.add(b"-")?;
    path.number(id.ino, 16);
    Ok(())
}
