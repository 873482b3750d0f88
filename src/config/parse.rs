//! The table of variables: each with its parser and the words that its error uses.

use super::*;

/// Longest job name; leaves room for an instance suffix within a file name.
const JOB_LONGEST: usize = 128;

pub(super) struct Variable {
    pub name: &'static str,
    pub allowed: &'static str,
    pub apply: fn(&mut Config, &[u8]) -> Option<()>,
}

impl Variable {
    /// The name without `CKPT_`.
    pub fn rest(&self) -> &'static [u8] {
        &self.name.as_bytes()[5..]
    }
}

/// Names that belong to the command or to tests, not to the library.
pub(super) const FOREIGN: [&[u8]; 1] = [b"LIB"];

pub(super) const VARIABLES: [Variable; 28] = [
    Variable {
        name: "CKPT_INTERVAL",
        allowed: "expected off, auto, default or a duration like 90, 90s, 500ms, 15m, 1h30m",
        apply: |c, v| set(&mut c.interval, parse_interval(text(v)?).map(Some)),
    },
    Variable {
        name: "CKPT_EXCLUDE",
        allowed: "expected absolute path patterns separated by colons, or *",
        apply: |c, v| set(&mut c.exclude, globs(v)),
    },
    Variable {
        name: "CKPT_INCLUDE",
        allowed: "expected absolute path patterns separated by colons, or *",
        apply: |c, v| set(&mut c.include, globs(v)),
    },
    Variable {
        name: "CKPT_RESTORE_EXCLUDE",
        allowed: "expected absolute path patterns separated by colons, or *",
        apply: |c, v| set(&mut c.restore_exclude, globs(v)),
    },
    Variable {
        name: "CKPT_REDIRECT",
        allowed: "expected OLD=NEW pairs of absolute paths separated by colons",
        apply: |c, v| set(&mut c.redirect, redirects(v)),
    },
    Variable {
        name: "CKPT_FOREIGN",
        allowed: "expected restore, keep or refuse",
        apply: |c, v| {
            let choice = match v {
                b"restore" => Foreign::Restore,
                b"keep" => Foreign::Keep,
                b"refuse" => Foreign::Refuse,
                _ => return None,
            };
            set(&mut c.foreign, Some(choice))
        },
    },
    Variable {
        name: "CKPT_DIR",
        allowed: "expected the absolute path of a directory",
        apply: |c, v| set(&mut c.dir, (v[0] == b'/').then(|| Some(v.to_vec()))),
    },
    Variable {
        name: "CKPT_JOB",
        allowed: "expected a name of at most 128 bytes other than . and ..",
        apply: |c, v| {
            let fits = v.len() <= JOB_LONGEST && v != b"." && v != b"..";
            set(&mut c.job, fits.then(|| Some(v.to_vec())))
        },
    },
    Variable {
        name: "CKPT_RESUME",
        allowed: "expected auto, never, a generation number, or id:N for a checkpoint id",
        apply: |c, v| set(&mut c.resume, parse_resume(text(v)?)),
    },
    Variable {
        name: "CKPT_RETURN_VALUE",
        allowed: "expected a number from 1 to 2147483647",
        apply: |c, v| {
            set(
                &mut c.return_value,
                number(v, 1, i32::MAX as u64).map(|n| n as i32),
            )
        },
    },
    Variable {
        name: "CKPT_KEEP",
        allowed: "expected a number of generations, 1 or more",
        apply: |c, v| {
            set(
                &mut c.keep,
                number(v, 1, u64::from(u32::MAX)).map(|n| n as u32),
            )
        },
    },
    Variable {
        name: "CKPT_UNDO",
        allowed: "expected 1 or 0",
        apply: |c, v| set(&mut c.undo, boolean(v)),
    },
    Variable {
        name: "CKPT_CHAIN",
        allowed: "expected a number of increments from 0 to 1000",
        apply: |c, v| set(&mut c.chain, number(v, 0, 1000).map(|n| n as u32)),
    },
    Variable {
        name: "CKPT_KEEP_ON_EXIT",
        allowed: "expected failure, always or never",
        apply: |c, v| {
            let choices = [
                ("failure", KeepOnExit::Failure),
                ("always", KeepOnExit::Always),
                ("never", KeepOnExit::Never),
            ];
            set(&mut c.keep_on_exit, word(v, &choices))
        },
    },
    Variable {
        name: "CKPT_TRIGGER",
        allowed: "expected a signal name or number other than KILL, STOP, 32, 33 and 64",
        apply: |c, v| set(&mut c.trigger, parse_signal(text(v)?).map(Some)),
    },
    Variable {
        name: "CKPT_SYNC",
        allowed: "expected kill or power",
        apply: |c, v| {
            set(
                &mut c.sync,
                word(v, &[("kill", Sync::Kill), ("power", Sync::Power)]),
            )
        },
    },
    Variable {
        name: "CKPT_TRACKER",
        allowed: "expected auto, uffd, soft-dirty, mprotect or full",
        apply: |c, v| {
            let choices = [
                ("auto", TrackerChoice::Auto),
                ("uffd", TrackerChoice::Uffd),
                ("soft-dirty", TrackerChoice::SoftDirty),
                ("softdirty", TrackerChoice::SoftDirty),
                ("mprotect", TrackerChoice::Mprotect),
                ("full", TrackerChoice::Full),
            ];
            set(&mut c.tracker, word(v, &choices))
        },
    },
    Variable {
        name: "CKPT_SNAPSHOT",
        allowed: "expected auto, copy, fork or priority",
        apply: |c, v| {
            let choices = [
                ("auto", SnapshotChoice::Auto),
                ("copy", SnapshotChoice::Copy),
                ("fork", SnapshotChoice::Fork),
                ("priority", SnapshotChoice::Priority),
            ];
            set(&mut c.snapshot, word(v, &choices))
        },
    },
    Variable {
        name: "CKPT_RESTORE",
        allowed: "expected auto, lazy or eager",
        apply: |c, v| {
            let choices = [
                ("auto", RestoreMethod::Auto),
                ("lazy", RestoreMethod::Lazy),
                ("eager", RestoreMethod::Eager),
            ];
            set(&mut c.restore, word(v, &choices))
        },
    },
    Variable {
        name: "CKPT_COMPRESS",
        allowed: "expected none, lz4 or zstd",
        apply: |c, v| {
            let choices = [
                ("none", Compress::None),
                ("off", Compress::None),
                ("lz4", Compress::Lz4),
                ("zstd", Compress::Zstd),
            ];
            set(&mut c.compress, word(v, &choices))
        },
    },
    Variable {
        name: "CKPT_MTBF",
        allowed: "expected a duration like 24h or 7d",
        apply: |c, v| set(&mut c.mtbf, parse_duration(text(v)?)),
    },
    Variable {
        name: "CKPT_OVERHEAD",
        allowed: "expected a percentage from 0.001 to 100, like 1 or 0.5%",
        apply: |c, v| set(&mut c.overhead, percentage(text(v)?)),
    },
    Variable {
        name: "CKPT_LOG",
        allowed: "expected off, error, warn, info, debug or trace, an absolute path or stderr, \
                  or LEVEL:PATH",
        apply: |c, v| set(&mut c.log, log(v)),
    },
    Variable {
        name: "CKPT_AUDIT",
        allowed: "expected the absolute path that counts are written to",
        apply: |c, v| set(&mut c.audit, (v[0] == b'/').then(|| Some(v.to_vec()))),
    },
    Variable {
        name: "CKPT_VERIFY",
        allowed: "expected 1 or 0",
        apply: |c, v| set(&mut c.verify, boolean(v)),
    },
    Variable {
        name: "CKPT_DISABLE",
        allowed: "expected 1 or 0",
        apply: |c, v| set(&mut c.disable, boolean(v)),
    },
    Variable {
        name: "CKPT_ARGUMENTS",
        allowed: "expected what ckpt restore --template has set",
        apply: |c, v| set(&mut c.arguments, split_arguments(v)),
    },
    Variable {
        name: "CKPT_OWNER",
        allowed: "expected what the library itself has set",
        apply: |c, v| set(&mut c.owner, Some(Some(v.to_vec()))),
    },
];

/// The value of `CKPT_ARGUMENTS`: a colon before each argument, bytes other than plain
/// ones as `%XX`.
pub fn join_arguments<'a>(arguments: impl Iterator<Item = &'a [u8]>) -> String {
    let mut value = String::new();
    for argument in arguments {
        value.push(':');
        for &byte in argument {
            if byte.is_ascii_graphic() && byte != b'%' && byte != b':' {
                value.push(byte as char);
            } else {
                value.push_str(&format!("%{byte:02X}"));
            }
        }
    }
    value
}

fn split_arguments(value: &[u8]) -> Option<Vec<CString>> {
    let rest = value.strip_prefix(b":")?;
    rest.split(|&b| b == b':').map(unescape).collect()
}

fn unescape(word: &[u8]) -> Option<CString> {
    let mut bytes = Vec::new();
    let mut at = 0;
    while let Some(&byte) = word.get(at) {
        if byte == b'%' {
            let digits = text(word.get(at + 1..at + 3)?)?;
            bytes.push(u8::from_str_radix(digits, 16).ok()?);
            at += 3;
        } else {
            bytes.push(byte);
            at += 1;
        }
    }
    CString::new(bytes).ok()
}

/// Stores a parsed value; `None` when it was not allowed.
fn set<T>(place: &mut T, value: Option<T>) -> Option<()> {
    *place = value?;
    Some(())
}

fn text(value: &[u8]) -> Option<&str> {
    std::str::from_utf8(value).ok()
}

fn word<T: Copy>(value: &[u8], choices: &[(&str, T)]) -> Option<T> {
    choices
        .iter()
        .find(|(name, _)| name.as_bytes() == value)
        .map(|(_, choice)| *choice)
}

fn boolean(value: &[u8]) -> Option<bool> {
    match value {
        b"1" | b"yes" | b"on" | b"true" => Some(true),
        b"0" | b"no" | b"off" | b"false" => Some(false),
        _ => None,
    }
}

/// Digits only: no sign, no space.
fn number(value: &[u8], least: u64, most: u64) -> Option<u64> {
    if !value.iter().all(u8::is_ascii_digit) {
        return None;
    }
    let number = text(value)?.parse().ok()?;
    (least..=most).contains(&number).then_some(number)
}

/// Thousandths of a percent.
fn percentage(value: &str) -> Option<u32> {
    let digits = value.strip_suffix('%').unwrap_or(value);
    let plain = |c: char| c.is_ascii_digit() || c == '.';
    let thousandths = digits
        .chars()
        .all(plain)
        .then(|| digits.parse::<f64>().ok())??
        * 1000.0;
    (1.0..=100_000.0)
        .contains(&thousandths)
        .then_some(thousandths as u32)
}

/// `auto`, `never`, a generation number, `id:N`.
pub fn parse_resume(value: &str) -> Option<Resume> {
    match value {
        "auto" => Some(Resume::Auto),
        "never" => Some(Resume::Never),
        _ => match value.strip_prefix("id:") {
            Some(id) => id.parse().ok().map(Resume::Id),
            None => number(value.as_bytes(), 1, u64::MAX).map(Resume::Generation),
        },
    }
}

/// A signal by name (with or without SIG, any case, RTMIN+n and RTMAX-n included)
/// or number that can be a trigger.
pub fn parse_signal(value: &str) -> Option<i32> {
    let upper = value.to_ascii_uppercase();
    let name = upper.strip_prefix("SIG").unwrap_or(&upper);
    let signal = match number(name.as_bytes(), 1, 64) {
        Some(number) => number as i32,
        None => signal_by_name(name)?,
    };
    // KILL and STOP cannot be caught, 32 and 33 are libc's, 64 is the library's.
    (!matches!(signal, libc::SIGKILL | libc::SIGSTOP | 32 | 33 | 64)).then_some(signal)
}

fn signal_by_name(name: &str) -> Option<i32> {
    const NAMES: [&str; 31] = [
        "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2",
        "PIPE", "ALRM", "TERM", "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG",
        "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR", "SYS",
    ];
    // As libc counts them: 32 and 33 are its own.
    const RTMIN: i32 = 34;
    const RTMAX: i32 = 64;
    let above = |rest: &str| match rest {
        "" => Some(0),
        _ => number(rest.get(1..)?.as_bytes(), 0, 30).map(|n| n as i32),
    };
    if let Some(rest) = name.strip_prefix("RTMIN") {
        return (rest.is_empty() || rest.starts_with('+'))
            .then(|| above(rest).map(|n| RTMIN + n))?;
    }
    if let Some(rest) = name.strip_prefix("RTMAX") {
        return (rest.is_empty() || rest.starts_with('-'))
            .then(|| above(rest).map(|n| RTMAX - n))?;
    }
    match name {
        "POLL" => Some(libc::SIGIO),
        "IOT" => Some(libc::SIGABRT),
        "CLD" => Some(libc::SIGCHLD),
        _ => NAMES.iter().position(|n| *n == name).map(|i| i as i32 + 1),
    }
}

fn globs(value: &[u8]) -> Option<Vec<Vec<u8>>> {
    let mut patterns = Vec::new();
    for pattern in value.split(|&b| b == b':').filter(|p| !p.is_empty()) {
        if pattern[0] != b'/' && pattern != b"*" {
            return None;
        }
        patterns.push(pattern.to_vec());
    }
    Some(patterns)
}

fn redirects(value: &[u8]) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut pairs = Vec::new();
    for pair in value.split(|&b| b == b':').filter(|p| !p.is_empty()) {
        let equals = pair.iter().position(|&b| b == b'=')?;
        let (old, new) = (&pair[..equals], &pair[equals + 1..]);
        if !old.starts_with(b"/") || !new.starts_with(b"/") {
            return None;
        }
        pairs.push((old.to_vec(), new.to_vec()));
    }
    Some(pairs)
}

fn log(value: &[u8]) -> Option<Log> {
    let levels = [
        ("off", LogLevel::Off),
        ("error", LogLevel::Error),
        ("warn", LogLevel::Warn),
        ("info", LogLevel::Info),
        ("debug", LogLevel::Debug),
        ("trace", LogLevel::Trace),
    ];
    let target = |place: &[u8]| match place {
        b"stderr" => Some(LogTarget::Stderr),
        [b'/', ..] => Some(LogTarget::File(place.to_vec())),
        _ => None,
    };
    if let Some(level) = word(value, &levels) {
        return Some(Log {
            level,
            target: LogTarget::Job,
        });
    }
    if let Some(target) = target(value) {
        return Some(Log {
            level: LogLevel::Info,
            target,
        });
    }
    let colon = value.iter().position(|&b| b == b':')?;
    Some(Log {
        level: word(&value[..colon], &levels)?,
        target: target(&value[colon + 1..])?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentages() {
        assert_eq!(percentage("1"), Some(1000));
        assert_eq!(percentage("0.5%"), Some(500));
        assert_eq!(percentage("100"), Some(100_000));
        for wrong in [
            "0", "0.0001", "100.1", "", "%", "1e1", "-1", "+1", "nan", "1 ",
        ] {
            assert_eq!(percentage(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn signals() {
        assert_eq!(parse_signal("USR1"), Some(10));
        assert_eq!(parse_signal("sigusr2"), Some(12));
        assert_eq!(parse_signal("34"), Some(34));
        assert_eq!(parse_signal("RTMIN+1"), Some(35));
        assert_eq!(parse_signal("SIGRTMAX-1"), Some(63));
        assert_eq!(parse_signal("SYS"), Some(31));
        for wrong in [
            "KILL",
            "9",
            "STOP",
            "32",
            "33",
            "64",
            "RTMAX",
            "0",
            "65",
            "",
            "RTMIN-1",
            "RTMINx",
            "RTMAX+1",
            "FOO",
            "RTMIN+\u{e9}",
        ] {
            assert_eq!(parse_signal(wrong), None, "{wrong}");
        }
    }
}
