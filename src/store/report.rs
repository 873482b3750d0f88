//! The file by which a running program answers the command:
//! `<root>/run/<pid>.json`, replaced as a whole (rename).
//!
//! The target's helper thread writes it ([`Report::to_json`], by hand, so that no
//! JSON library is linked into the target); the command reads it with serde.

use super::fs::Fs;
use super::{Context, StoreError};
use crate::errno::Errno;
use serde::{Deserialize, Serialize};
use std::path::{Path, PathBuf};

/// Asks the program for a checkpoint.
pub const REQUEST_CHECKPOINT: u64 = 1;
/// Asks the program for a fresh report.
pub const REQUEST_REPORT: u64 = 2;
/// Asks the program to go back to a checkpoint; `<root>/run/<pid>-<nonce>.ask` says which.
pub const REQUEST_ROLLBACK: u64 = 4;
const REQUEST_MARK: u64 = 0xC4B7;

/// The value that comes with the reserved signal.
pub fn encode_request(kind: u64, nonce: u32) -> u64 {
    REQUEST_MARK << 48 | (kind & 0xffff) << 32 | u64::from(nonce)
}

/// `(kind, nonce)` of a request; `None` for a value that is none.
pub fn decode_request(value: u64) -> Option<(u64, u32)> {
    (value >> 48 == REQUEST_MARK).then_some((value >> 32 & 0xffff, value as u32))
}

/// [`Report::state`] when the library will answer no more. It must not be asked either: a
/// program under a system-call filter might die of the signal's handler.
pub const ASLEEP: &str = "asleep";

/// What a running program says about itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// As the kernel knows it.
    pub pid: i32,
    /// As the program sees it.
    pub program_pid: i32,
    /// Field 22 of /proc/PID/stat.
    pub start_time: u64,
    /// The job's key; empty before the first checkpoint.
    pub job: String,
    pub job_dir: String,
    /// `idle`, `checkpoint`, `asleep`.
    pub state: String,
    /// Milliseconds; 0 when the clock is off.
    pub interval_ms: u64,
    /// Answers to the command's latest requests, the newest last.
    pub requests: Vec<RequestResult>,
    pub last_generation: Option<u64>,
    /// Wall clock, nanoseconds since 1970.
    pub last_checkpoint_ns: u64,
    pub last_refusal: Option<Refusal>,
    /// Committed in this life of the process.
    pub checkpoints: u64,
    pub refused: u64,
    /// The generation that this process was recovered from.
    pub recovered_from: Option<u64>,
    pub net: NetReport,
    pub tracker: String,
    pub snapshot: String,
    /// Why the files cannot go back to the last generation.
    pub files_incomplete: Option<String>,
    /// `ckpt_heartbeat`: how often in this life, and the wall clock at the last one (0 = never).
    #[serde(default)]
    pub heartbeats: u64,
    #[serde(default)]
    pub heartbeat_ns: u64,
    /// Wall clock at `ckpt_ready`; 0 = not called.
    #[serde(default)]
    pub ready_ns: u64,
    /// Mapped files with modifying system calls of their own, which the net does not see;
    /// `children` without calls: the program has had some.
    #[serde(default)]
    pub unseen: Vec<UnseenCalls>,
}

/// See [`Report::unseen`].
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnseenCalls {
    pub path: String,
    /// By number, ascending.
    pub calls: Vec<i64>,
}

/// How a request of the command ended; a report that was asked for has neither.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RequestResult {
    pub nonce: u32,
    /// The committed generation.
    pub generation: Option<u64>,
    /// Why there is none.
    pub error: Option<String>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Refusal {
    pub reason: String,
    pub time_ns: u64,
}

/// The call-site net (how much of libc's system calls is seen).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct NetReport {
    pub installed: bool,
    pub sites: u32,
    pub unpatched: u32,
    /// Why it is not installed, or what is missing.
    pub note: String,
}

/// What a checkpoint is named by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// The newest one.
    Latest,
    /// The newest one with this id.
    Id(i32),
    Generation(u64),
    /// The newest state that was left by going back.
    Left,
}

/// A request to go back: `<root>/run/<pid>-<nonce>.ask`, one line, written by the command
/// before it sends the signal and removed by the program.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ask {
    pub goal: Goal,
    /// What `ckpt_checkpoint` returns; 0: 1.
    pub value: i32,
}

impl Ask {
    pub fn path(root: &Path, pid: i32, nonce: u32) -> PathBuf {
        root.join("run").join(format!("{pid}-{nonce}.ask"))
    }

    pub fn to_line(&self) -> String {
        let value = self.value;
        match self.goal {
            Goal::Latest => format!("rollback latest {value}\n"),
            Goal::Id(id) => format!("rollback id:{id} {value}\n"),
            Goal::Generation(generation) => format!("rollback {generation} {value}\n"),
            Goal::Left => format!("rollback left {value}\n"),
        }
    }

    pub fn parse(line: &str) -> Option<Ask> {
        let mut words = line.strip_suffix('\n')?.split(' ');
        if words.next()? != "rollback" {
            return None;
        }
        let goal = match words.next()? {
            "latest" => Goal::Latest,
            "left" => Goal::Left,
            word => match word.strip_prefix("id:") {
                Some(id) => Goal::Id(id.parse().ok().filter(|&id| id >= 0)?),
                None => Goal::Generation(word.parse().ok()?),
            },
        };
        let value = words.next()?.parse().ok().filter(|&value| value >= 0)?;
        words.next().is_none().then_some(Ask { goal, value })
    }

    /// Reads and removes it.
    pub fn take<F: Fs>(fs: &F, root: &Path, pid: i32, nonce: u32) -> Result<Ask, String> {
        let path = Ask::path(root, pid, nonce);
        let read = || fs.read_all(&fs.open(&path)?, 4096);
        let bytes = read().on("read", &path);
        let bytes = bytes.map_err(|error| error.to_string())?;
        let _ = fs.unlink(&path);
        let ask = std::str::from_utf8(&bytes).ok().and_then(Ask::parse);
        ask.ok_or_else(|| format!("{} says nothing that is known", path.display()))
    }
}

/// Answers kept in the report.
const ANSWERS: usize = 16;

impl Report {
    /// Notes the answer to a request, for the next [`Report::write`].
    pub fn answer(&mut self, nonce: u32, generation: Option<u64>, error: Option<String>) {
        if self.requests.len() >= ANSWERS {
            self.requests.remove(0);
        }
        self.requests.push(RequestResult {
            nonce,
            generation,
            error,
        });
    }

    pub fn path(root: &Path, pid: i32) -> PathBuf {
        root.join("run").join(format!("{pid}.json"))
    }

    /// Writes the report in its place; a reader sees the old one or the new one.
    pub fn write<F: Fs>(&self, fs: &F, root: &Path) -> Result<(), StoreError> {
        let path = Report::path(root, self.pid);
        let dir = root.join("run");
        super::job::create_dir(fs, root, &dir)?;
        let tmp = dir.join(format!("{}.tmp", self.pid));
        match fs.unlink(&tmp) {
            Ok(()) | Err(Errno::ENOENT) => {}
            Err(errno) => return Err(errno).on("remove", &tmp),
        }
        let file = fs.create_new(&tmp).on("create", &tmp)?;
        fs.write_all(&file, &self.to_json(), 0).on("write", &tmp)?;
        fs.rename(&tmp, &path).on("rename", &tmp)
    }

    /// Removes the report at the end of the process.
    pub fn remove<F: Fs>(fs: &F, root: &Path, pid: i32) {
        let _ = fs.unlink(&Report::path(root, pid));
    }

    /// The same JSON that serde would write.
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = Json::default();
        json.open();
        json.number("pid", i64::from(self.pid));
        json.number("program_pid", i64::from(self.program_pid));
        json.unsigned("start_time", self.start_time);
        json.text("job", &self.job);
        json.text("job_dir", &self.job_dir);
        json.text("state", &self.state);
        json.unsigned("interval_ms", self.interval_ms);
        json.key("requests");
        json.bytes.push(b'[');
        for (index, request) in self.requests.iter().enumerate() {
            if index > 0 {
                json.bytes.push(b',');
            }
            json.open();
            json.unsigned("nonce", u64::from(request.nonce));
            json.optional_number("generation", request.generation);
            json.optional("error", request.error.as_ref(), |json, e| json.string(e));
            json.close();
        }
        json.raw("]");
        json.optional_number("last_generation", self.last_generation);
        json.unsigned("last_checkpoint_ns", self.last_checkpoint_ns);
        json.optional(
            "last_refusal",
            self.last_refusal.as_ref(),
            |json, refusal| {
                json.open();
                json.text("reason", &refusal.reason);
                json.unsigned("time_ns", refusal.time_ns);
                json.close();
            },
        );
        json.unsigned("checkpoints", self.checkpoints);
        json.unsigned("refused", self.refused);
        json.optional_number("recovered_from", self.recovered_from);
        json.key("net");
        json.open();
        json.key("installed");
        json.raw(if self.net.installed { "true" } else { "false" });
        json.unsigned("sites", u64::from(self.net.sites));
        json.unsigned("unpatched", u64::from(self.net.unpatched));
        json.text("note", &self.net.note);
        json.close();
        json.text("tracker", &self.tracker);
        json.text("snapshot", &self.snapshot);
        json.optional(
            "files_incomplete",
            self.files_incomplete.as_ref(),
            |json, reason| json.string(reason),
        );
        json.unsigned("heartbeats", self.heartbeats);
        json.unsigned("heartbeat_ns", self.heartbeat_ns);
        json.unsigned("ready_ns", self.ready_ns);
        json.key("unseen");
        json.raw("[");
        for (k, unseen) in self.unseen.iter().enumerate() {
            if k > 0 {
                json.bytes.push(b',');
            }
            json.open();
            json.text("path", &unseen.path);
            let calls: Vec<String> = unseen.calls.iter().map(i64::to_string).collect();
            json.key("calls");
            json.raw(&format!("[{}]", calls.join(",")));
            json.close();
        }
        json.raw("]");
        json.close();
        json.bytes
    }
}

/// Just enough of JSON.
#[derive(Default)]
struct Json {
    bytes: Vec<u8>,
    comma: bool,
}

impl Json {
    fn raw(&mut self, text: &str) {
        self.bytes.extend_from_slice(text.as_bytes());
        self.comma = true;
    }

    fn open(&mut self) {
        self.bytes.push(b'{');
        self.comma = false;
    }

    fn close(&mut self) {
        self.raw("}");
    }

    fn key(&mut self, key: &str) {
        if self.comma {
            self.bytes.push(b',');
        }
        self.string(key);
        self.bytes.push(b':');
    }

    fn string(&mut self, text: &str) {
        self.bytes.push(b'"');
        for c in text.chars() {
            match c {
                '"' | '\\' => self.bytes.extend_from_slice(&[b'\\', c as u8]),
                c if c < ' ' => {
                    let escaped = format!("\\u{:04x}", c as u32);
                    self.bytes.extend_from_slice(escaped.as_bytes());
                }
                c => {
                    let mut utf8 = [0; 4];
                    self.bytes
                        .extend_from_slice(c.encode_utf8(&mut utf8).as_bytes());
                }
            }
        }
        self.bytes.push(b'"');
        self.comma = true;
    }

    fn text(&mut self, key: &str, text: &str) {
        self.key(key);
        self.string(text);
    }

    fn number(&mut self, key: &str, number: i64) {
        self.key(key);
        self.raw(&number.to_string());
    }

    fn unsigned(&mut self, key: &str, number: u64) {
        self.key(key);
        self.raw(&number.to_string());
    }

    fn optional<T>(&mut self, key: &str, value: Option<T>, write: impl FnOnce(&mut Json, T)) {
        self.key(key);
        match value {
            Some(value) => write(self, value),
            None => self.raw("null"),
        }
    }

    fn optional_number(&mut self, key: &str, number: Option<u64>) {
        self.optional(key, number, |json, n| json.raw(&n.to_string()));
    }
}

#[cfg(test)]
mod tests {
    use super::super::fs::RawFs;
    use super::super::fs::tests::TempDir;
    use super::*;

    fn sample() -> Report {
        Report {
            pid: 12,
            start_time: u64::MAX,
            job: "a\"b\\c\n\u{e9}\u{1}".into(),
            requests: vec![
                RequestResult {
                    nonce: u32::MAX,
                    generation: None,
                    error: Some("no".into()),
                },
                RequestResult::default(),
            ],
            last_generation: Some(7),
            heartbeats: 3,
            heartbeat_ns: u64::MAX,
            ready_ns: 5,
            net: NetReport {
                installed: true,
                ..Default::default()
            },
            ..Default::default()
        }
    }

    #[test]
    fn the_hand_written_json_is_what_serde_reads_and_writes() {
        for report in [Report::default(), sample()] {
            let json = report.to_json();
            assert_eq!(serde_json::from_slice::<Report>(&json).unwrap(), report);
            let ours: serde_json::Value = serde_json::from_slice(&json).unwrap();
            assert_eq!(ours, serde_json::to_value(&report).unwrap());
        }
    }

    #[test]
    fn written_and_removed() {
        let root = TempDir::new("report");
        sample().write(&RawFs, &root.0).unwrap();
        sample().write(&RawFs, &root.0).unwrap();
        let path = Report::path(&root.0, 12);
        let file = RawFs.open(&path).unwrap();
        assert_eq!(RawFs.read_all(&file, 10_000).unwrap(), sample().to_json());
        Report::remove(&RawFs, &root.0, 12);
        assert!(RawFs.list(&root.0.join("run")).unwrap().is_empty());
    }

    #[test]
    fn requests() {
        let value = encode_request(REQUEST_CHECKPOINT, 77);
        assert_eq!(value, 0xC4B7_0001_0000_004D);
        assert_eq!(decode_request(value), Some((REQUEST_CHECKPOINT, 77)));
        assert_eq!(decode_request(77), None);
    }
}
