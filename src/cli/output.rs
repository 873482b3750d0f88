//! How things are printed: tables, sizes, times, byte strings, the generation's JSON.

use crate::agent::restore::check;
use crate::store::{GenerationRecord, Job, RawFs};
use serde_json::{Value, json};
use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

/// Rows with aligned columns; numbers to the right.
pub struct Table {
    rows: Vec<Vec<String>>,
    right: Vec<bool>,
}

impl Table {
    /// A heading that starts with `>` is a column of numbers.
    pub fn new(headings: &[&str]) -> Table {
        let right = headings.iter().map(|h| h.starts_with('>')).collect();
        let names = headings
            .iter()
            .map(|h| h.trim_start_matches('>').to_owned());
        Table {
            rows: vec![names.collect()],
            right,
        }
    }

    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    pub fn print(&self) {
        self.print_from(0);
    }

    /// Without the headings.
    pub fn print_body(&self) {
        self.print_from(1);
    }

    fn print_from(&self, first: usize) {
        let width = |column: usize| {
            let cells = self.rows.iter().filter_map(|row| row.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        let widths: Vec<usize> = (0..self.right.len()).map(width).collect();
        let mut out = std::io::stdout().lock();
        for row in &self.rows[first..] {
            let mut line = String::new();
            for ((cell, &width), &right) in row.iter().zip(&widths).zip(&self.right) {
                if right {
                    line.push_str(&format!("{cell:>width$}  "));
                } else {
                    line.push_str(&format!("{cell:<width$}  "));
                }
            }
            let _ = writeln!(out, "{}", line.trim_end());
        }
    }
}

/// Prints text as it is.
pub fn print(text: &str) {
    let _ = std::io::stdout().lock().write_all(text.as_bytes());
}

/// Prints a JSON document.
pub fn print_json(value: &Value) {
    let mut out = std::io::stdout().lock();
    let _ = serde_json::to_writer_pretty(&mut out, value);
    let _ = writeln!(out);
}

/// `1.5 GiB`.
pub fn size(bytes: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit < UNITS.len() - 1 {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{bytes} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// `850 us`, `12.3 ms`, `4.56 s`.
pub fn micros(us: u64) -> String {
    match us {
        0..1_000 => format!("{us} us"),
        1_000..1_000_000 => format!("{:.1} ms", us as f64 / 1e3),
        _ => format!("{:.2} s", us as f64 / 1e6),
    }
}

pub fn now_ns() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |d| d.as_nanos() as u64)
}

/// `5 min ago`; 0 is a time that is not known.
pub fn age(time_ns: u64) -> String {
    if time_ns == 0 {
        return "-".to_owned();
    }
    let seconds = now_ns().saturating_sub(time_ns) / 1_000_000_000;
    match seconds {
        0..120 => format!("{seconds} s ago"),
        120..7_200 => format!("{} min ago", seconds / 60),
        7_200..172_800 => format!("{} h ago", seconds / 3600),
        _ => format!("{} days ago", seconds / 86_400),
    }
}

/// RFC 3339 in UTC, to the millisecond.
pub fn time(time_ns: u64) -> String {
    let seconds = time_ns / 1_000_000_000;
    let (days, day_second) = (seconds / 86_400, seconds % 86_400);
    // Civil date from days since 1970 (years begin in March, eras have 400 years).
    let shifted = days + 719_468;
    let (era, day_of_era) = (shifted / 146_097, shifted % 146_097);
    let year_of_era =
        (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let month_from_march = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * month_from_march + 2) / 5 + 1;
    let month = (month_from_march + 2) % 12 + 1;
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (h, m, s) = (day_second / 3600, day_second / 60 % 60, day_second % 60);
    let ms = time_ns / 1_000_000 % 1000;
    format!("{year:04}-{month:02}-{day:02}T{h:02}:{m:02}:{s:02}.{ms:03}Z")
}

/// Bytes as text on one line.
pub fn text(bytes: &[u8]) -> String {
    let text = String::from_utf8_lossy(bytes);
    let mut line = String::new();
    for c in text.chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

/// A NUL-separated command line, as words.
pub fn words(cmdline: &[u8]) -> Vec<String> {
    let trimmed = cmdline.strip_suffix(b"\0").unwrap_or(cmdline);
    trimmed.split(|&b| b == 0).map(text).collect()
}

/// The same on one line of at most `most` characters.
pub fn command(cmdline: &[u8], most: usize) -> String {
    let line = words(cmdline).join(" ");
    match line.char_indices().nth(most) {
        Some((end, _)) => format!("{}...", &line[..end]),
        None => line,
    }
}

/// `full`, `increment`, and whether it is a state that was left by going back.
pub fn kind(job: &Job<RawFs>, record: &GenerationRecord) -> String {
    let kind = record.kind_now().name();
    match is_left(job, record) {
        true => format!("{kind}, undo"),
        false => kind.to_owned(),
    }
}

/// Is it the state that the last going back, or one before it, has left?
fn is_left(job: &Job<RawFs>, record: &GenerationRecord) -> bool {
    job.journal.left().contains(&record.generation)
}

/// Why the files cannot go back to a generation.
pub fn files_incomplete(job: &Job<RawFs>, record: &GenerationRecord) -> Option<String> {
    match job.files_obstacle(record) {
        Ok(obstacle) => obstacle,
        Err(error) => Some(error.to_string()),
    }
}

/// Why a generation cannot be restored here.
#[derive(Debug)]
pub enum Obstacle {
    Damaged(String),
    /// Sound, but not on this machine, by this user, or with these libraries.
    NotHere(String),
}

impl Obstacle {
    pub fn reason(&self) -> &str {
        match self {
            Obstacle::Damaged(reason) | Obstacle::NotHere(reason) => reason,
        }
    }
}

/// What a recovery would say of this generation's images, started now and here.
pub fn obstacle(job: &Job<RawFs>, record: &GenerationRecord) -> Option<Obstacle> {
    let found = match job.open_generation(record, false) {
        Ok(found) => found,
        Err(damage) => return Some(Obstacle::Damaged(damage.to_string())),
    };
    let mut members = found.members.iter();
    members.find_map(|member| {
        let error = check::machine(&member.image.manifest).err()?;
        Some(Obstacle::NotHere(error.to_string()))
    })
}

/// One generation, with whether it can be restored here.
pub fn generation_json(job: &Job<RawFs>, record: &GenerationRecord) -> Value {
    let damage = obstacle(job, record);
    let phases = &record.phases;
    let members: Vec<Value> = record
        .members
        .iter()
        .enumerate()
        .map(|(index, member)| {
            json!({
                "member": index,
                "pid": member.pid,
                "command": words(&member.cmdline),
                "threads": member.threads,
                "bytes": member.bytes,
            })
        })
        .collect();
    json!({
        "generation": record.generation,
        "id": record.id,
        "parent": record.parent,
        "time": time(record.time_ns),
        "kind": record.kind_now().name(),
        "merged": record.merged.is_some(),
        "needs": record.needs(),
        "members": members,
        "stop_us": record.stop_us,
        "phases": {
            "park_us": phases.park_us,
            "collect_us": phases.collect_us,
            "scan_us": phases.scan_us,
            "copy_us": phases.copy_us,
            "release_us": phases.release_us,
            "precopy_us": phases.precopy_us,
            "precopied_pages": phases.precopied_pages,
            "residue_pages": phases.residue_pages,
        },
        "persist_us": record.persist_us,
        "bytes_logical": record.bytes_logical,
        "bytes_stored": record.stored_now(),
        "pages_dirty": record.pages_dirty,
        "tracker": record.tracker,
        "snapshot": record.snapshot,
        "trigger": record.trigger,
        "undo": is_left(job, record),
        "host": record.host,
        "restorable": damage.is_none(),
        "reason": damage.as_ref().map(Obstacle::reason),
        "files_incomplete": files_incomplete(job, record),
        "outputs": record.files.streams.iter().map(|s| json!({
            "stream": s.number, "descriptors": s.fds, "path": text(&s.path), "size": s.size,
        })).collect::<Vec<_>>(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times() {
        assert_eq!(time(0), "1970-01-01T00:00:00.000Z");
        assert_eq!(time(951_782_400_000_000_000), "2000-02-29T00:00:00.000Z");
        assert_eq!(time(1_767_225_599_999_000_000), "2025-12-31T23:59:59.999Z");
    }

    #[test]
    fn sizes_and_words() {
        assert_eq!(size(0), "0 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(5 << 40), "5.0 TiB");
        assert_eq!(micros(12_345), "12.3 ms");
        assert_eq!(words(b"a\0b c\0"), ["a", "b c"]);
        assert_eq!(command(b"abc\0def\0", 5), "abc d...");
        assert_eq!(text(b"a\nb\xff"), "a\\nb\u{fffd}");
    }
}
