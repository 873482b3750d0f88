//! What is in a file: reading, writing, holes, copying, mapping. By descriptor; any context, as
//! all of [`super`].
//!
//! What would make a file longer than RLIMIT_FSIZE allows fails here, and is not asked of the
//! kernel, which would end the program for it.

use super::{Sys, fstat, point};
use crate::agent::place;
use ckpt_sys::raw::check;
use ckpt_sys::syscall;
use std::mem::MaybeUninit;

/// Does RLIMIT_FSIZE, which is the program's, let a file be so long? A call that goes beyond it
/// would raise SIGXFSZ, and that ends the program.
fn is_allowed(end: u64) -> Sys<()> {
    let mut limit = [u64::MAX; 2];
    let asked = call!(
        libc::SYS_prlimit64,
        0,
        libc::RLIMIT_FSIZE,
        0,
        limit.as_mut_ptr()
    );
    if asked.is_ok() && end > limit[0] {
        return Err(libc::EFBIG);
    }
    Ok(())
}

pub fn pread(fd: i32, addr: *mut u8, len: usize, offset: u64) -> Sys<usize> {
    call!(libc::SYS_pread64, fd, addr, len, offset)
}

pub fn pwrite(fd: i32, bytes: &[u8], offset: u64) -> Sys<usize> {
    is_allowed(offset.saturating_add(bytes.len() as u64))?;
    call!(libc::SYS_pwrite64, fd, bytes.as_ptr(), bytes.len(), offset)
}

/// All of it, or an error; a write of nothing is ENOSPC.
pub fn pwrite_all(fd: i32, mut bytes: &[u8], mut offset: u64) -> Sys<()> {
    while !bytes.is_empty() {
        match pwrite(fd, bytes, offset) {
            Ok(0) => return Err(libc::ENOSPC),
            Ok(n) => {
                bytes = bytes.get(n..).unwrap_or_default();
                offset += n as u64;
            }
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Fills the buffer as far as the file goes.
pub fn pread_all(fd: i32, addr: *mut u8, len: usize, offset: u64) -> Sys<usize> {
    let mut done = 0;
    while done < len {
        match pread(
            fd,
            addr.wrapping_add(done),
            len - done,
            offset + done as u64,
        ) {
            Ok(0) => break,
            Ok(n) => done += n,
            Err(libc::EINTR) => {}
            Err(e) => return Err(e),
        }
    }
    Ok(done)
}

/// The flags of an open file.
pub fn flags(fd: i32) -> Sys<i32> {
    call!(libc::SYS_fcntl, fd, libc::F_GETFL, 0).map(|flags| flags as i32)
}

pub fn ftruncate(fd: i32, len: u64) -> Sys<()> {
    if is_allowed(len).is_err() && fstat(fd)?.size < len {
        return Err(libc::EFBIG);
    }
    call!(libc::SYS_ftruncate, fd, len).map(drop)
}

pub fn fallocate(fd: i32, mode: i32, offset: u64, len: u64) -> Sys<()> {
    if mode & libc::FALLOC_FL_KEEP_SIZE == 0 {
        is_allowed(offset.saturating_add(len))?;
    }
    call!(libc::SYS_fallocate, fd, mode, offset, len).map(drop)
}

pub fn seek(fd: i32, offset: u64, whence: i32) -> Sys<u64> {
    call!(libc::SYS_lseek, fd, offset, whence).map(|n| n as u64)
}

/// Where the zeros begin that follow all that was ever written to a file of `size` bytes
/// (through a mapping as well); `size` where that is not known for certain.
pub fn end_of_data(fd: i32, size: u64) -> u64 {
    // ext4, XFS, tmpfs: they ask the page cache. Of others it is known that they have
    // forgotten to.
    const CERTAIN: [u64; 3] = [0xef53, 0x5846_5342, 0x0102_1994];
    let mut fs = MaybeUninit::<libc::statfs>::zeroed();
    if call!(libc::SYS_fstatfs, fd, fs.as_mut_ptr()).is_err() {
        return size;
    }
    // SAFETY: filled by the kernel.
    if !CERTAIN.contains(&(unsafe { fs.assume_init_ref() }.f_type as u64)) {
        return size;
    }
    let (mut at, mut end) = (0, 0);
    // A file with many holes is read whole.
    for _ in 0..16 {
        match seek(fd, at, libc::SEEK_DATA) {
            Err(libc::ENXIO) => return end,
            Ok(data) if data >= size => return end,
            Ok(data) => at = data,
            Err(_) => return size,
        }
        match seek(fd, at, libc::SEEK_HOLE) {
            Ok(hole) if hole > at && hole < size => (at, end) = (hole, hole),
            _ => return size,
        }
    }
    size
}

pub fn copy_file_range(from: i32, at: u64, to: i32, at_to: u64, len: u64) -> Sys<u64> {
    let (mut a, mut b) = (at, at_to);
    call!(
        libc::SYS_copy_file_range,
        from,
        &raw mut a,
        to,
        &raw mut b,
        len,
        0
    )
    .map(|n| n as u64)
}

/// Copies `start..end` of a file, holes staying holes, to `at` in another. Both
/// descriptors must be ours alone (their positions move).
pub fn copy_sparse(from: i32, start: u64, end: u64, to: i32, at: u64) -> Sys<()> {
    let mut pos = start;
    while pos < end {
        let data = match seek(from, pos, libc::SEEK_DATA) {
            Ok(data) => data.min(end),
            Err(libc::ENXIO) => return Ok(()),
            Err(_) => pos,
        };
        if data >= end {
            return Ok(());
        }
        let hole = match seek(from, data, libc::SEEK_HOLE) {
            Ok(hole) if hole > data => hole.min(end),
            _ => end,
        };
        point();
        copy_data(from, data, hole, to, at + (data - start))?;
        pos = hole;
    }
    Ok(())
}

/// Copies bytes by the kernel's cheapest way, else through a buffer. Ends early, and
/// well, where the source ends.
fn copy_data(from: i32, start: u64, end: u64, to: i32, at: u64) -> Sys<()> {
    is_allowed(at.saturating_add(end - start))?;
    let mut pos = start;
    while pos < end {
        match copy_file_range(from, pos, to, at + (pos - start), end - pos) {
            Ok(0) => break,
            Ok(n) => pos += n,
            Err(libc::EINTR) => {}
            Err(libc::ENOSPC) => return Err(libc::ENOSPC),
            Err(_) => break,
        }
    }
    let mut buf = [MaybeUninit::<u8>::uninit(); 16 << 10];
    while pos < end {
        let want = (end - pos).min(buf.len() as u64) as usize;
        let got = pread_all(from, buf.as_mut_ptr().cast(), want, pos)?;
        if got == 0 {
            break;
        }
        // SAFETY: the kernel wrote `got` bytes.
        let bytes = unsafe { std::slice::from_raw_parts(buf.as_ptr().cast::<u8>(), got) };
        pwrite_all(to, bytes, at + (pos - start))?;
        pos += got as u64;
    }
    Ok(())
}

pub fn fdatasync(fd: i32) -> Sys<()> {
    call!(libc::SYS_fdatasync, fd).map(drop)
}

/// Maps `len` bytes of a file, shared, for reading and writing.
pub fn map(fd: i32, offset: u64, len: u64) -> Sys<*mut u8> {
    let prot = libc::PROT_READ | libc::PROT_WRITE;
    // In the target, apart from the program's memory.
    let map = |wish: u64| {
        call!(
            libc::SYS_mmap,
            wish,
            len,
            prot,
            libc::MAP_SHARED | place::there(wish),
            fd,
            offset
        )
        .map(|at| at as u64)
    };
    place::wished(len, map).map(|at| at as *mut u8)
}

pub fn unmap(addr: *mut u8, len: u64) {
    let _ = call!(libc::SYS_munmap, addr, len);
}

/// Writes a mapped range and what is needed to find it to the disk.
pub fn sync_range(addr: *mut u8, len: u64) -> Sys<()> {
    call!(libc::SYS_msync, addr, len, libc::MS_SYNC).map(drop)
}
