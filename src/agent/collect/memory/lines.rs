//! The text of /proc/self/maps (and of the heads in smaps), line by line. Only [`super`] asks.

use crate::agent::procfs::{self, hex};

/// What a line of /proc/self/maps says.
pub(super) struct Line<'a> {
    pub start: u64,
    pub end: u64,
    pub prot: u32,
    pub shared: bool,
    pub offset: u64,
    pub dev: u64,
    pub ino: u64,
    pub name: &'a [u8],
}

pub(super) fn parse_line(line: &[u8]) -> Option<Line<'_>> {
    let mut fields = line.splitn(6, |&b| b == b' ');
    let range = fields.next()?;
    let dash = range.iter().position(|&b| b == b'-')?;
    let perms = fields.next()?;
    let offset = hex(fields.next()?)?;
    let dev = fields.next()?;
    let colon = dev.iter().position(|&b| b == b':')?;
    let ino = procfs::number(fields.next()?)? as u64;
    let bit = |k: usize, c: u8, v: i32| {
        if perms.get(k) == Some(&c) {
            v as u32
        } else {
            0
        }
    };
    Some(Line {
        start: hex(&range[..dash])?,
        end: hex(&range[dash + 1..])?,
        prot: bit(0, b'r', libc::PROT_READ)
            | bit(1, b'w', libc::PROT_WRITE)
            | bit(2, b'x', libc::PROT_EXEC),
        shared: perms.get(3) == Some(&b's'),
        offset,
        dev: libc::makedev(hex(&dev[..colon])? as u32, hex(&dev[colon + 1..])? as u32),
        ino,
        name: fields.next().unwrap_or(&[]).trim_ascii_start(),
    })
}

/// The lines of a memory map, none of which begins before another's end.
///
/// A map that changes while it is read is not one instant's: what was joined with the mapping
/// before it, after that one was told, comes with its new start (Linux 6.18).
pub(super) fn lines(text: &[u8]) -> impl Iterator<Item = Line<'_>> {
    let mut told = 0;
    text.split(|&b| b == b'\n').filter_map(move |line| {
        let mut line = parse_line(line).filter(|line| line.end > told)?;
        let again = told.saturating_sub(line.start);
        line.start += again;
        if line.ino != 0 {
            line.offset += again;
        }
        told = line.end;
        Some(line)
    })
}

/// The octal escapes (`\012`) that the kernel writes into names.
pub(super) fn unescape(name: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(name.len());
    let mut at = 0;
    while at < name.len() {
        if name[at] == b'\\'
            && name.len() >= at + 4
            && name[at + 1..at + 4].iter().all(u8::is_ascii_digit)
        {
            let v = name[at + 1..at + 4]
                .iter()
                .fold(0u32, |v, &b| v * 8 + (b - b'0') as u32);
            out.push(v as u8);
            at += 4;
        } else {
            out.push(name[at]);
            at += 1;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn map_lines_are_understood() {
        let line =
            parse_line(b"7f00-8f00 rw-s 00001000 fe:01 77    /dev/shm/a\\012b (deleted)").unwrap();
        assert_eq!(
            (line.start, line.end, line.offset, line.ino),
            (0x7f00, 0x8f00, 0x1000, 77)
        );
        assert!(line.shared);
        assert_eq!(unescape(line.name), b"/dev/shm/a\nb (deleted)");
        let line = parse_line(b"7f00-8f00 ---p 00000000 00:00 0 ").unwrap();
        assert_eq!(line.prot, 0);
        assert!(line.name.is_empty());
    }

    /// Pages of the second mapping were stored twice, and the image was refused: read while
    /// the program changed it, the map told a mapping again with the one that had joined it.
    #[test]
    fn what_was_told_is_not_told_again() {
        let text = b"1000-5000 rw-p 00000000 00:00 0 \n\
            3000-7000 rw-p 00000000 00:00 0 \n\
            6000-7000 r--p 00000000 00:00 0 \n\
            8000-9000 r--p 00002000 fe:01 77 /a\n\
            8000-b000 r--p 00002000 fe:01 77 /a\n";
        let told: Vec<_> = lines(text).map(|l| (l.start, l.end, l.offset)).collect();
        assert_eq!(
            told,
            [
                (0x1000, 0x5000, 0),
                (0x5000, 0x7000, 0),
                (0x8000, 0x9000, 0x2000),
                (0x9000, 0xb000, 0x3000),
            ]
        );
    }
}
