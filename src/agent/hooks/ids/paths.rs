//! Old ids in paths below /proc: `/proc/<pid>/...` and `/proc/<any>/task/<tid>/...`.
//! The hook makes the call itself with a path on its own stack. Any thread; active only while ids are translated.

use super::super::frame::{CallFrame, Verdict};
use super::super::user;
use super::calls::{execute, in_life};
use super::{own_pid, to_real};

/// The calls and which argument holds their path.
pub const CALLS: &[(libc::c_long, usize)] = &[
    (libc::SYS_open, 0),
    (libc::SYS_openat, 1),
    (libc::SYS_openat2, 1),
    (libc::SYS_stat, 0),
    (libc::SYS_lstat, 0),
    (libc::SYS_newfstatat, 1),
    (libc::SYS_statx, 1),
    (libc::SYS_access, 0),
    (libc::SYS_faccessat, 1),
    (libc::SYS_faccessat2, 1),
    (libc::SYS_readlink, 0),
    (libc::SYS_readlinkat, 1),
];

const LONGEST: usize = 256;

/// A path with its final NUL.
struct Text {
    bytes: [u8; LONGEST + 32],
    len: usize,
}

impl Text {
    fn push(&mut self, part: &[u8]) {
        let room = self.bytes.len() - self.len;
        let n = part.len().min(room);
        self.bytes[self.len..self.len + n].copy_from_slice(&part[..n]);
        self.len += n;
    }

    fn push_number(&mut self, n: i32) {
        let mut digits = [0u8; 12];
        self.push(decimal(n, &mut digits));
    }
}

fn decimal(mut n: i32, buf: &mut [u8; 12]) -> &[u8] {
    let mut at = buf.len();
    loop {
        at -= 1;
        buf[at] = b'0' + (n % 10) as u8;
        n /= 10;
        if n == 0 || at == 0 {
            return &buf[at..];
        }
    }
}

fn number(part: &[u8]) -> Option<i32> {
    std::str::from_utf8(part).ok()?.parse().ok()
}

/// The path with real ids, or `None` when it names none of ours.
fn rewrite(path: &[u8]) -> Option<Text> {
    let rest = path.strip_prefix(b"/proc/")?;
    let mut text = Text {
        bytes: [0; LONGEST + 32],
        len: 0,
    };
    let mut changed = false;
    text.push(b"/proc");
    let mut before: &[u8] = b"proc";
    for (depth, part) in rest.split(|&b| b == b'/').enumerate() {
        text.push(b"/");
        let id_here = depth == 0 || (depth == 2 && before == b"task");
        match number(part).filter(|_| id_here) {
            Some(id) if to_real(id) != id => {
                text.push_number(to_real(id));
                changed = true;
            }
            _ => text.push(part),
        }
        before = part;
    }
    text.push(b"\0");
    changed.then_some(text)
}

/// Translates one call; `None` = no path of ours in it.
pub fn dispatch(f: &mut CallFrame) -> Option<Verdict> {
    let at = CALLS.iter().find(|c| c.0 == f.rax)?.1;
    let mut head = [0u8; LONGEST];
    // Most paths are told apart by their first bytes.
    let mut start = [0u8; 4];
    user::read_string(f.args[at], &mut start).ok()?;
    if start != *b"/pro" {
        return None;
    }
    let n = user::read_string(f.args[at], &mut head).ok()?;
    let len = head[..n].iter().position(|&b| b == 0)?;
    let path = &head[..len];
    if path == b"/proc/self" && at + 2 < 6 {
        return proc_self(f, at);
    }
    rewrite(path)?;
    let mut text = None;
    f.rax = in_life(|| {
        let mut args = f.args;
        text = rewrite(path);
        if let Some(text) = &text {
            args[at] = text.bytes.as_ptr() as u64;
        }
        (f.rax, args)
    });
    Some(Verdict::Done)
}

/// readlink("/proc/self") is a way to ask for the pid.
fn proc_self(f: &mut CallFrame, at: usize) -> Option<Verdict> {
    if !matches!(f.rax, libc::SYS_readlink | libc::SYS_readlinkat) {
        return None;
    }
    let ret = execute(f);
    if ret > 0 {
        let mut digits = [0u8; 12];
        let text = decimal(own_pid(), &mut digits);
        let n = text.len().min(f.args[at + 2] as usize);
        for (i, byte) in text[..n].iter().enumerate() {
            // SAFETY: the kernel has just written to this buffer; past what it wrote
            // the program vouches for the size it passed.
            unsafe { *((f.args[at + 1] + i as u64) as *mut u8) = *byte };
        }
        f.rax = n as i64;
    } else {
        f.rax = ret;
    }
    Some(Verdict::Done)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::ids::set_identity;
    use crate::agent::hooks::testing::in_child;

    #[test]
    fn only_our_ids_change() {
        in_child(|| {
            set_identity(&[(100, 7), (101, 80000)], 100, 7).unwrap();
            let to = |p: &[u8]| rewrite(p).map(|t| t.bytes[..t.len - 1].to_vec());
            assert_eq!(to(b"/proc/100/fd/100").unwrap(), b"/proc/7/fd/100");
            assert_eq!(to(b"/proc/100").unwrap(), b"/proc/7");
            assert_eq!(
                to(b"/proc/self/task/101/comm").unwrap(),
                b"/proc/self/task/80000/comm"
            );
            assert_eq!(to(b"/proc/100/task/101").unwrap(), b"/proc/7/task/80000");
            assert_eq!(to(b"/proc/5/maps"), None);
            assert_eq!(to(b"/proc/sys/100"), None);
            assert_eq!(to(b"/tmp/100"), None);
        });
    }
}
