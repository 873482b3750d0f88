//! Parsing of `/proc/.../fdinfo/N`. Pure text to values; used by the collectors
//! of the helper thread.

/// The common lines of an fdinfo file, and the rest of it by name.
#[derive(Debug, Clone, Default)]
pub struct FdInfo {
    pub pos: i64,
    /// O_* with O_CLOEXEC when the descriptor has it.
    pub flags: u32,
    text: Vec<u8>,
}

impl FdInfo {
    pub fn parse(text: &[u8]) -> FdInfo {
        let mut info = FdInfo {
            text: text.to_vec(),
            ..FdInfo::default()
        };
        info.pos = info.value("pos").map_or(0, |v| number(v, 10) as i64);
        info.flags = info.value("flags").map_or(0, |v| number(v, 8) as u32);
        info
    }

    pub fn cloexec(&self) -> bool {
        self.flags & libc::O_CLOEXEC as u32 != 0
    }

    pub fn lines(&self) -> impl Iterator<Item = &[u8]> {
        self.text.split(|&b| b == b'\n').filter(|l| !l.is_empty())
    }

    /// The text after `name:`, trimmed, of the first such line.
    pub fn value<'a>(&'a self, name: &'a str) -> Option<&'a [u8]> {
        self.values(name).next()
    }

    /// The same for every such line.
    pub fn values<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a [u8]> {
        self.lines().filter_map(move |line| {
            let rest = line.strip_prefix(name.as_bytes())?.strip_prefix(b":")?;
            Some(rest.trim_ascii())
        })
    }

    /// A `(seconds, nanoseconds)` line as nanoseconds.
    pub fn time(&self, name: &str) -> Option<u64> {
        let text = self.value(name)?;
        let mut parts = text
            .split(|b| !b.is_ascii_digit())
            .filter(|p| !p.is_empty())
            .map(|p| number(p, 10));
        Some(parts.next()? * 1_000_000_000 + parts.next()?)
    }
}

/// `name:value` words of one line (`inotify wd:1 ino:2`, `tfd: 5 events: 19`):
/// the value of `name`, which may stand behind blanks.
pub fn word<'a>(line: &'a [u8], name: &str) -> Option<&'a [u8]> {
    let name = name.as_bytes();
    let mut at = 0;
    while at + name.len() < line.len() {
        let starts_word = at == 0 || line[at - 1] == b' ' || line[at - 1] == b'\t';
        if starts_word && line[at..].starts_with(name) && line[at + name.len()] == b':' {
            let rest = line[at + name.len() + 1..].trim_ascii_start();
            let end = rest
                .iter()
                .position(|b| b.is_ascii_whitespace())
                .unwrap_or(rest.len());
            return Some(&rest[..end]);
        }
        at += 1;
    }
    None
}

/// The leading digits of `text` in the given base; a leading `-` gives the
/// two's complement; nothing legible gives 0.
pub fn number(text: &[u8], base: u64) -> u64 {
    let text = text.trim_ascii_start();
    let (negative, digits) = match text.strip_prefix(b"-") {
        Some(rest) => (true, rest),
        None => (false, text),
    };
    let mut value = 0u64;
    for &b in digits {
        let Some(d) = (b as char).to_digit(base as u32) else {
            break;
        };
        value = value.wrapping_mul(base).wrapping_add(u64::from(d));
    }
    if negative {
        value.wrapping_neg()
    } else {
        value
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn common_lines() {
        let info = FdInfo::parse(b"pos:\t42\nflags:\t02100002\nmnt_id:\t15\nino:\t7\n");
        assert_eq!(info.pos, 42);
        assert!(info.cloexec());
        assert_eq!(info.flags & 3, 2);
    }

    #[test]
    fn words_of_a_line() {
        let line =
            b"tfd:       12 events: 4000001d data:     ffffffffffffffff  pos:0 ino:1a sdev:f";
        assert_eq!(number(word(line, "tfd").unwrap(), 10), 12);
        assert_eq!(number(word(line, "events").unwrap(), 16), 0x4000_001d);
        assert_eq!(number(word(line, "data").unwrap(), 16), u64::MAX);
        assert_eq!(number(word(line, "ino").unwrap(), 16), 0x1a);
        assert!(word(line, "sde").is_none());
    }

    #[test]
    fn times() {
        let info = FdInfo::parse(b"it_value: (1, 500)\nit_interval: (0, 7)\n");
        assert_eq!(info.time("it_value"), Some(1_000_000_500));
        assert_eq!(info.time("it_interval"), Some(7));
    }
}
