//! Modifying calls that the call-site net cannot see: `syscall` instructions of programs and
//! libraries other than libc, and all that its children do. They are looked for once per mapped file and told in the log and
//! by `ckpt status`; what they do to files is not taken back. Helper thread, while the program runs.
//!
//! Found are calls with their number beside them (`mov $number, %eax` in the sixteen bytes
//! before, as compilers and hand-written wrappers have it); a number from elsewhere is not.

use super::{MODIFYING, cache};
use crate::agent::hooks::ranges;
use crate::agent::{log, own_memory, procfs};
use crate::store::report::UnseenCalls;

const SYSCALL: [u8; 2] = [0x0f, 0x05];
const MOV_EAX: u8 = 0xb8;
const WINDOW: usize = 16;

/// The modifying calls that `code` makes, by number.
fn calls_in(code: &[u8]) -> Vec<i64> {
    let mut found = Vec::new();
    for at in 0..code.len().saturating_sub(1) {
        if code[at..at + 2] != SYSCALL {
            continue;
        }
        let before = &code[at.saturating_sub(WINDOW)..at];
        // The nearest one counts.
        let number = before
            .windows(5)
            .rev()
            .find(|bytes| bytes[0] == MOV_EAX && bytes[3] == 0 && bytes[4] == 0)
            .map(|bytes| i64::from(u16::from_le_bytes([bytes[1], bytes[2]])));
        if let Some(nr) = number.filter(|nr| MODIFYING.iter().any(|(known, _)| known == nr))
            && !found.contains(&nr)
        {
            found.push(nr);
        }
    }
    found
}

/// Libraries that the net patches, and our own as it is usually called.
fn is_patched(path: &str) -> bool {
    // A prepared copy of libc's text has the name of the copy.
    if path.ends_with(".ckpt-text") {
        return true;
    }
    let name = path.rsplit('/').next().unwrap_or(path);
    // After a lazy restore the patched text of libc, and ours, may be a mapping of an image.
    if name.starts_with("member-") && path.contains("/gen-") {
        return true;
    }
    [
        "libc.so",
        "libc-",
        "ld-linux",
        "ld-2",
        "libpthread",
        "libckpt.so",
    ]
    .iter()
    .any(|known| name.starts_with(known))
}

/// What was looked at, and what was found.
#[derive(Debug, Default)]
pub struct Looked {
    /// Device and inode of mapped files.
    seen: Vec<(String, u64)>,
    pub found: Vec<UnseenCalls>,
}

/// In the place of a path: the program has had children, in which the library is asleep.
const CHILDREN: &str = "children";

/// Calls that write to a descriptor.
const WRITING: [i64; 9] = [
    libc::SYS_write,
    libc::SYS_pwrite64,
    libc::SYS_writev,
    libc::SYS_pwritev,
    libc::SYS_pwritev2,
    libc::SYS_sendfile,
    libc::SYS_splice,
    libc::SYS_tee,
    libc::SYS_copy_file_range,
];

impl Looked {
    /// May the program write to its outputs unseen, or its children?
    pub fn writes(&self) -> bool {
        let is_writing = |call: &i64| WRITING.contains(call);
        let mut found = self.found.iter();
        found.any(|found| found.path == CHILDREN || found.calls.iter().any(is_writing))
    }

    /// Looks at what is mapped executable since the last time, and whether there were children.
    pub fn look(&mut self) {
        if cache::has_had_children() && !self.found.iter().any(|found| found.path == CHILDREN) {
            log::line(format_args!(
                "the program has children: what they do to files is not seen"
            ));
            self.found.push(UnseenCalls {
                path: CHILDREN.to_owned(),
                calls: Vec::new(),
            });
        }
        look(&mut self.seen, |path, calls| {
            tell(path, &calls);
            if !calls.is_empty() && self.found.len() < MOST {
                let path = path.to_owned();
                self.found.push(UnseenCalls { path, calls });
            }
        });
    }
}

/// So many files are told of; a program that maps generated code anew all the time must not
/// make the list endless.
const MOST: usize = 64;

fn look(seen: &mut Vec<(String, u64)>, mut found: impl FnMut(&str, Vec<i64>)) {
    let Ok(maps) = procfs::read_file(b"/proc/self/maps") else {
        return;
    };
    let maps = String::from_utf8_lossy(&maps);
    for line in maps.lines() {
        let mut fields = line.split_whitespace();
        let (Some(range), Some(mode), Some(_), Some(device), Some(inode)) = (
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next(),
            fields.next().and_then(|inode| inode.parse::<u64>().ok()),
        ) else {
            continue;
        };
        let path = fields.next().unwrap_or_default();
        // A mapping without read permission is left alone.
        if inode == 0 || !mode.starts_with("r-x") || is_patched(path) {
            continue;
        }
        // What a lazy restore has mapped was looked at in the life before.
        let (major, minor) = device.split_once(':').unwrap_or_default();
        let number = |text| u64::from_str_radix(text, 16).unwrap_or(0);
        if ranges::is_image_file(number(major) << 32 | number(minor), inode) {
            continue;
        }
        if seen.iter().any(|(d, i)| d == device && *i == inode) {
            continue;
        }
        seen.push((device.to_owned(), inode));
        let bounds = range.split_once('-').and_then(|(start, end)| {
            let number = |text| u64::from_str_radix(text, 16).ok();
            Some((number(start)?, number(end)?))
        });
        // Whatever our own file is called.
        let own = tell as fn(&str, &[i64]) as usize as u64;
        if let Some((start, end)) = bounds
            && !(start..end).contains(&own)
        {
            found(path, calls_between(start, end));
        }
    }
}

/// The calls in a mapping, a piece at a time; the program may unmap it while we read.
fn calls_between(start: u64, end: u64) -> Vec<i64> {
    const PIECE: usize = 64 << 10;
    let mut piece = vec![0; PIECE + WINDOW + 2];
    let mut found = Vec::new();
    let mut at = start;
    while at < end {
        let len = usize::try_from(end - at)
            .unwrap_or(usize::MAX)
            .min(piece.len());
        if own_memory::read(at, &mut piece[..len]).is_err() {
            break;
        }
        found.extend(calls_in(&piece[..len]));
        at += PIECE as u64;
    }
    found.sort_unstable();
    found.dedup();
    found
}

fn tell(path: &str, calls: &[i64]) {
    if calls.is_empty() {
        return;
    }
    let numbers: Vec<String> = calls.iter().map(ToString::to_string).collect();
    log::line(format_args!(
        "{path} makes system calls of its own (numbers {}): what they do to files is not seen",
        numbers.join(", ")
    ));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn calls_with_their_number_are_found() {
        // mov $1, %eax; mov %rsp, %rsi; syscall; mov $39, %eax; syscall (getpid)
        let code = [
            0xb8, 1, 0, 0, 0, 0x48, 0x89, 0xe6, 0x0f, 0x05, 0xb8, 39, 0, 0, 0, 0x0f, 0x05,
        ];
        assert_eq!(calls_in(&code), [libc::SYS_write]);
        assert!(calls_in(&[0x0f, 0x05]).is_empty());
    }
}
