//! Descriptor numbers: keeping temporary descriptors off the numbers that the
//! image wants, taking what the new start provides, closing the rest, putting
//! objects at their numbers. Part of [`super::restore`].

use super::{InheritedFd, RestoreError, Restorer};
use crate::agent::collect::descriptors::sys::{self, Fd};
use crate::image::state::FileKind;
use std::os::fd::RawFd;

impl Restorer<'_, '_> {
    /// Raises the soft limit of numbers where the image needs it (the image's own
    /// limits are set later) and moves our own descriptors out of the way.
    pub(super) fn make_room(&mut self) -> Result<(), RestoreError> {
        let top = self.top();
        let mut limit = [0u64; 2];
        // SAFETY: `limit` has the size of `struct rlimit64`.
        unsafe {
            let none = 0usize;
            ckpt_sys::syscall!(
                libc::SYS_prlimit64,
                0,
                libc::RLIMIT_NOFILE,
                none,
                limit.as_mut_ptr()
            );
            let want = (top as u64 + 64).min(limit[1]);
            if limit[0] < want {
                let raised = [want, limit[1]];
                ckpt_sys::syscall!(
                    libc::SYS_prlimit64,
                    0,
                    libc::RLIMIT_NOFILE,
                    raised.as_ptr(),
                    none
                );
            }
        }
        if top > 0 && limit[1] < top as u64 {
            return Err(RestoreError::Number {
                fd: top - 1,
                reason: format!("the limit of open files is {}", limit[1]),
            });
        }
        for i in 0..self.ctx.keep.len() {
            let fd = self.ctx.keep[i];
            if self.wanted.contains_key(&fd) {
                self.ctx.keep[i] = self.set_aside(fd)?;
                sys::close(fd);
            }
        }
        Ok(())
    }

    /// One above the highest wanted number.
    fn top(&self) -> RawFd {
        self.wanted.keys().next_back().map_or(0, |fd| fd + 1)
    }

    /// Duplicates `fd` to a number that the image does not want.
    pub(super) fn set_aside(&self, fd: RawFd) -> Result<RawFd, RestoreError> {
        if let Ok(new) = sys::dup_above(fd, self.top()) {
            return Ok(new);
        }
        // No number above: one of the holes between the wanted ones.
        let mut min = 0;
        loop {
            let new = sys::dup_above(fd, min).map_err(|e| RestoreError::Number {
                fd,
                reason: sys::errno_text(e),
            })?;
            if !self.wanted.contains_key(&new) {
                return Ok(new);
            }
            sys::close(new);
            min = new + 1;
        }
    }

    /// A temporary descriptor at a number that the image does not want.
    pub fn park(&self, fd: Fd) -> Result<Fd, RestoreError> {
        if !self.wanted.contains_key(&fd.raw()) {
            return Ok(fd);
        }
        self.set_aside(fd.raw()).map(Fd::own)
    }

    /// Sets aside what the new start provides for numbers of the image.
    pub(super) fn take_sources(&mut self) -> Result<(), RestoreError> {
        let open = |fd: RawFd, keep: &[RawFd]| !keep.contains(&fd) && sys::fstat(fd).is_ok();
        let mut given: Vec<(RawFd, RawFd)> = Vec::new();
        for d in &self.table.fds {
            let kind = &self.table.files[d.file as usize].kind;
            let follows = matches!(
                kind,
                FileKind::Inherited { .. }
                    | FileKind::Regular { .. }
                    | FileKind::Directory { .. }
                    | FileKind::Device { .. }
                    | FileKind::Tty { .. }
            );
            if !follows {
                continue;
            }
            let number = if d.inherited && open(d.fd, self.ctx.keep) {
                Some(d.fd)
            } else {
                // A duplicate made by the program of one it was started with.
                self.table
                    .fds
                    .iter()
                    .find(|s| s.file == d.file && s.inherited && open(s.fd, self.ctx.keep))
                    .map(|s| s.fd)
            };
            if let Some(number) = number {
                given.push((d.fd, number));
            }
        }
        for (fd, number) in given {
            let aside = self.set_aside(number)?;
            self.sources.insert(fd, aside);
            let file = self.wanted[&fd].file as usize;
            self.numbers[file].retain(|&n| n != fd);
        }
        Ok(())
    }

    /// Closes everything but what is kept.
    pub(super) fn close_others(&self) {
        let mut keep: Vec<RawFd> = self.ctx.keep.to_vec();
        keep.extend(self.sources.values());
        keep.extend(self.stderr.iter().map(Fd::raw));
        keep.retain(|&fd| fd >= 0);
        keep.sort_unstable();
        let mut from = 0u32;
        for fd in keep {
            if fd as u32 > from {
                close_range(from, fd as u32 - 1);
            }
            from = fd as u32 + 1;
        }
        close_range(from, u32::MAX);
    }

    /// A duplicate of the new start's standard error, until all is in place. (A rollback's
    /// program goes on with its own.)
    pub(super) fn keep_stderr(&mut self) {
        if !self.ctx.inside && !self.ctx.keep.contains(&2) {
            self.stderr = self.set_aside(2).ok().map(Fd::own);
        }
    }

    /// The reason why it cannot be restored is to be seen, and not in a file of the program.
    pub(super) fn give_back_stderr(&self) {
        if let Some(aside) = &self.stderr {
            let _ = sys::dup3(aside.raw(), 2, false);
        }
    }

    /// Puts a made description at its numbers and closes the temporary one.
    pub fn place(&mut self, file: usize, fd: Fd) -> Result<(), RestoreError> {
        self.made[file] = true;
        let mut fd = Some(fd);
        let raw = fd.as_ref().map_or(-1, Fd::raw);
        for &number in &self.numbers[file] {
            let cloexec = self.wanted[&number].cloexec;
            if number == raw {
                // It stays; O_CLOEXEC is what it was opened with.
                if !cloexec {
                    let _ = sys::fcntl(raw, libc::F_SETFD, 0);
                }
                if let Some(fd) = fd.take() {
                    fd.release();
                }
                continue;
            }
            sys::dup3(raw, number, cloexec).map_err(|e| RestoreError::Number {
                fd: number,
                reason: sys::errno_text(e),
            })?;
        }
        Ok(())
    }

    /// Puts the new start's descriptors at their numbers.
    pub(super) fn place_sources(&mut self) -> Result<(), RestoreError> {
        let sources = std::mem::take(&mut self.sources);
        for (&fd, &aside) in &sources {
            let d = self.wanted[&fd];
            sys::dup3(aside, fd, d.cloexec).map_err(|e| RestoreError::Number {
                fd,
                reason: sys::errno_text(e),
            })?;
            self.adapt_source(fd, d.file as usize);
        }
        for aside in sources.into_values() {
            sys::close(aside);
        }
        Ok(())
    }

    /// Position, non-blocking mode and terminal modes of a descriptor of the new
    /// start.
    pub(super) fn adapt_source(&mut self, fd: RawFd, file: usize) {
        let state = self.state(file);
        let Ok(st) = sys::fstat(fd) else { return };
        let have = sys::fcntl(fd, libc::F_GETFL, 0).unwrap_or(0) as i32;
        match &state.kind {
            FileKind::Regular {
                ino,
                btime_ns,
                path,
                ..
            } => {
                let born = sys::identity(fd, b"\0", libc::AT_EMPTY_PATH).map_or(0, |i| i.2);
                let reborn = born != 0 && *btime_ns != 0 && born != *btime_ns;
                let regular = st.st_mode & libc::S_IFMT == libc::S_IFREG;
                let filled = self.ctx.files.filled.contains(&(st.st_dev, st.st_ino));
                let same = (st.st_ino == *ino && !reborn || filled) && regular;
                if same && st.st_size < state.pos {
                    let (size, pos) = (st.st_size, state.pos);
                    let path = String::from_utf8_lossy(path);
                    self.warn(&format!(
                        "{path}: {size} bytes long, shorter than the position {pos} of descriptor {fd}: was it truncated by the new start?"
                    ));
                }
                if same && have & libc::O_APPEND == 0 {
                    let _ = sys::lseek(fd, state.pos, libc::SEEK_SET);
                }
            }
            FileKind::Inherited { termios, .. } => {
                let want = state.flags as i32 & libc::O_NONBLOCK;
                if have & libc::O_NONBLOCK != want && st.st_mode & libc::S_IFMT != libc::S_IFREG {
                    let flags = have & !libc::O_NONBLOCK | want;
                    let _ = sys::fcntl(fd, libc::F_SETFL, flags as u32 as usize);
                }
                super::tty::set_modes(fd, termios);
            }
            _ => {}
        }
        self.out.inherited.push(InheritedFd {
            fd,
            dev: st.st_dev,
            ino: st.st_ino,
        });
    }

    /// Leaves no temporary descriptor at all.
    pub(super) fn finish_numbers(&mut self) {
        debug_assert!(self.sources.is_empty() && self.objects.is_empty());
        self.out.inherited.sort_by_key(|i| i.fd);
    }
}

fn close_range(from: u32, to: u32) {
    // SAFETY: no memory is involved.
    let ret = unsafe { ckpt_sys::syscall!(libc::SYS_close_range, from, to, 0) };
    if ret == 0 {
        return;
    }
    // Before Linux 5.9: one by one, as far as /proc shows any.
    let flags = libc::O_RDONLY | libc::O_DIRECTORY;
    let Ok(dir) = sys::open(b"/proc/thread-self/fd", flags, 0) else {
        return;
    };
    for name in sys::list_dir(dir.raw()).unwrap_or_default() {
        let fd = crate::agent::collect::descriptors::fdinfo::number(&name, 10) as u32;
        if (from..=to).contains(&fd) && fd != dir.raw() as u32 {
            sys::close(fd as i32);
        }
    }
}
