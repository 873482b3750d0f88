//! Which way the residue takes: what it costs here, and what memory is left.
//!
//! | method | the program stands still for | it takes |
//! |---|---|---|
//! | `copy` | a copy of the residue | that much memory |
//! | `fork` | a copy of all page tables | a page for each that the program writes meanwhile |
//! | `priority` | protecting the residue | a reserve for what the program overwrites first |
//! | `write` | the residue written to the file | nothing |
//!
//! The costs are moving averages of what was measured in this life of the program.
//! Helper thread.

use crate::agent::collect::memory::PAGE;
use crate::agent::procfs;
use crate::config::SnapshotChoice;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    Copy,
    Fork,
    Priority,
    Write,
}

impl Method {
    pub fn name(self) -> &'static str {
        match self {
            Method::Copy => "copy",
            Method::Fork => "fork",
            Method::Priority => "priority",
            Method::Write => "write",
        }
    }
}

/// Nanoseconds, as measured.
#[derive(Debug, Clone, Copy)]
pub struct Costs {
    /// Copying a page into warm memory.
    pub copy_page_ns: f64,
    /// Writing a page to the file.
    pub write_page_ns: f64,
    /// Forking, for each page of page tables.
    pub fork_table_ns: f64,
    /// Forking at all.
    pub fork_ns: f64,
}

impl Default for Costs {
    fn default() -> Costs {
        Costs {
            copy_page_ns: 500.0,
            write_page_ns: 2_000.0,
            fork_table_ns: 40_000.0,
            fork_ns: 150_000.0,
        }
    }
}

fn average(old: &mut f64, new: f64) {
    *old += (new - *old) * 0.3;
}

impl Costs {
    pub fn copied(&mut self, pages: u64, ns: u64) {
        // Few pages say little of what many cost.
        if pages >= 64 {
            average(&mut self.copy_page_ns, ns as f64 / pages as f64);
        }
    }

    pub fn written(&mut self, pages: u64, ns: u64) {
        if pages >= 64 {
            average(&mut self.write_page_ns, ns as f64 / pages as f64);
        }
    }

    pub fn forked(&mut self, tables: u64, ns: u64) {
        if tables >= 64 {
            let rest = (ns as f64 - self.fork_ns).max(0.0);
            average(&mut self.fork_table_ns, rest / tables as f64);
        }
    }

    fn copy(&self, pages: u64) -> f64 {
        pages as f64 * self.copy_page_ns
    }

    fn fork(&self, tables: u64) -> f64 {
        self.fork_ns + tables as f64 * self.fork_table_ns
    }

    /// Pages whose copy takes as long as a fork.
    pub fn worth_a_fork(&self, tables: u64) -> u64 {
        (self.fork(tables) / self.copy_page_ns) as u64
    }
}

/// What is known of the program's size and of the memory that is left.
#[derive(Debug, Clone, Copy, Default)]
pub struct Room {
    /// Pages in memory.
    pub resident: u64,
    /// Pages of page tables.
    pub tables: u64,
    /// Pages that may still be taken.
    pub free: u64,
}

impl Room {
    /// Looks; cheap enough for every checkpoint, but not for the stop.
    pub fn look() -> Room {
        let status = procfs::read_file(b"/proc/thread-self/status").unwrap_or_default();
        let kib = |text: &[u8], key| {
            let value = procfs::field(text, key).and_then(procfs::number);
            value.map_or(0, |kib| kib.max(0) as u64) / 4
        };
        let meminfo = procfs::read_file(b"/proc/meminfo").unwrap_or_default();
        let mut free = kib(&meminfo, "MemAvailable");
        if let Some(left) = cgroup_left() {
            free = free.min(left / PAGE);
        }
        Room {
            resident: kib(&status, "VmRSS"),
            tables: kib(&status, "VmPTE"),
            free,
        }
    }

    /// May a copy of so many pages be made, and something be left?
    pub fn has(&self, pages: u64) -> bool {
        pages + pages / 8 + 2048 <= self.free
    }
}

/// Bytes that this process's control group, and what stands above it, may still take.
fn cgroup_left() -> Option<u64> {
    let text = procfs::read_file(b"/proc/self/cgroup").ok()?;
    let mut least: Option<u64> = None;
    for line in text.split(|&b| b == b'\n') {
        let left = if let Some(path) = line.strip_prefix(b"0::/") {
            let names: Names = (b"memory.max", b"memory.current", b"inactive_file ");
            left_below(b"/sys/fs/cgroup", path, names)
        } else if let Some(path) = of_memory(line) {
            let names: Names = (
                b"memory.limit_in_bytes",
                b"memory.usage_in_bytes",
                b"total_inactive_file ",
            );
            left_below(b"/sys/fs/cgroup/memory", path, names)
        } else {
            None
        };
        if let Some(left) = left {
            least = Some(least.map_or(left, |l| l.min(left)));
        }
    }
    least
}

/// The path in a line of version 1 (`4:memory:/a/b`), if it is the memory controller's.
fn of_memory(line: &[u8]) -> Option<&[u8]> {
    let mut fields = line.splitn(3, |&b| b == b':').skip(1);
    let mut controllers = fields.next()?.split(|&b| b == b',');
    controllers.any(|name| name == b"memory").then_some(())?;
    fields.next()?.strip_prefix(b"/")
}

/// Of a group: its limit, what is used, and the line of `memory.stat` with what of that
/// can be had again.
type Names = (&'static [u8], &'static [u8], &'static [u8]);

/// The least that is left in the group at `path` and those above it.
fn left_below(root: &[u8], path: &[u8], (limit, used, cache): Names) -> Option<u64> {
    let mut path = [root, b"/", path].concat();
    let mut least: Option<u64> = None;
    while path.len() >= root.len() {
        let read = |name: &[u8]| {
            let file = [&path[..], b"/", name].concat();
            procfs::read_file(&file).ok()
        };
        let number = |name: &[u8]| procfs::number(&read(name)?).map(|n| n.max(0) as u64);
        if let (Some(max), Some(now)) = (number(limit), number(used)) {
            let again = read(b"memory.stat").map_or(0, |stat| {
                let line = stat
                    .split(|&b| b == b'\n')
                    .find_map(|line| line.strip_prefix(cache));
                line.and_then(procfs::number).unwrap_or(0).max(0) as u64
            });
            let left = max.saturating_sub(now.saturating_sub(again));
            least = Some(least.map_or(left, |l| l.min(left)));
        }
        let cut = path.iter().rposition(|&b| b == b'/')?;
        path.truncate(cut);
    }
    least
}

/// The method for a residue of `pages`, of which the buffer can take `warm` at once.
/// `guarding`: pages can be guarded here.
pub fn choose(
    choice: SnapshotChoice,
    pages: u64,
    warm: u64,
    costs: &Costs,
    room: &Room,
    guarding: bool,
) -> Method {
    match choice {
        SnapshotChoice::Fork => Method::Fork,
        SnapshotChoice::Copy if pages <= warm => Method::Copy,
        SnapshotChoice::Copy => Method::Write,
        SnapshotChoice::Priority if guarding => Method::Priority,
        SnapshotChoice::Auto | SnapshotChoice::Priority => {
            if pages <= warm && costs.copy(pages) <= costs.fork(room.tables) {
                return Method::Copy;
            }
            if pages > warm && pages as f64 * costs.write_page_ns <= costs.fork(room.tables) {
                return Method::Write;
            }
            // The program may write all of it while the child lives.
            if room.has(room.resident.min(pages * 2 + room.resident / 8)) {
                Method::Fork
            } else if pages <= warm {
                Method::Copy
            } else if guarding {
                Method::Priority
            } else {
                Method::Write
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ROOM: Room = Room {
        resident: 262_144,
        tables: 512,
        free: 1 << 20,
    };

    fn auto(pages: u64, warm: u64, room: &Room) -> Method {
        choose(
            SnapshotChoice::Auto,
            pages,
            warm,
            &Costs::default(),
            room,
            false,
        )
    }

    #[test]
    fn small_is_copied_and_large_is_forked() {
        assert_eq!(auto(100, 1000, &ROOM), Method::Copy);
        assert_eq!(auto(262_144, 262_144, &ROOM), Method::Fork);
        // What does not fit into the buffer is written at once, if that is not much.
        assert_eq!(auto(20_000, 1000, &ROOM), Method::Fork);
        assert_eq!(auto(2000, 1000, &ROOM), Method::Write);
        let asked = |choice| choose(choice, 2000, 1000, &Costs::default(), &ROOM, true);
        assert_eq!(asked(SnapshotChoice::Copy), Method::Write);
        assert_eq!(asked(SnapshotChoice::Fork), Method::Fork);
    }

    #[test]
    fn without_memory_it_is_written_at_once() {
        let room = Room { free: 3000, ..ROOM };
        assert_eq!(auto(262_144, 1000, &room), Method::Write);
        assert_eq!(auto(900, 1000, &room), Method::Copy);
    }

    /// A limit of a group above counts as well, and what is nothing but cache can be had.
    #[test]
    fn limits_of_nested_groups() {
        assert_eq!(of_memory(b"4:memory:/a/b"), Some(&b"a/b"[..]));
        assert_eq!(of_memory(b"4:hugetlb,memory:/a"), Some(&b"a"[..]));
        assert_eq!(of_memory(b"9:name=memory:/a"), None);
        assert_eq!(of_memory(b"0::/memory"), None);
        let root = std::env::temp_dir().join(format!("ckpt-groups-{}", std::process::id()));
        let inner = root.join("outer/inner");
        std::fs::create_dir_all(&inner).unwrap();
        let write = |group: &str, file: &str, text: &str| {
            std::fs::write(root.join(group).join(file), text).unwrap();
        };
        write("outer", "memory.max", "1000000\n");
        write("outer", "memory.current", "700000\n");
        write("outer", "memory.stat", "anon 1\ninactive_file 50000\n");
        write("outer/inner", "memory.max", "max\n");
        write("outer/inner", "memory.current", "600000\n");
        let names: Names = (b"memory.max", b"memory.current", b"inactive_file ");
        let root_bytes = root.to_str().unwrap().as_bytes();
        let left = |path: &[u8]| left_below(root_bytes, path, names);
        assert_eq!(left(b"outer/inner"), Some(350_000));
        write("outer/inner", "memory.max", "610000\n");
        assert_eq!(left(b"outer/inner"), Some(10_000));
        // A path as it is outside of this container.
        assert_eq!(left(b"elsewhere"), None);
        std::fs::remove_dir_all(&root).unwrap();
    }

    #[test]
    fn costs_follow_what_is_measured() {
        let mut costs = Costs::default();
        for _ in 0..50 {
            costs.copied(1000, 5_000_000);
            costs.forked(512, 512 * 1000 + 150_000);
        }
        assert!((costs.copy_page_ns - 5000.0).abs() < 1.0);
        assert!((costs.fork_table_ns - 1000.0).abs() < 1.0);
        costs.copied(3, 1);
        assert!((costs.copy_page_ns - 5000.0).abs() < 1.0);
        assert_eq!(
            choose(SnapshotChoice::Auto, 1000, 2000, &costs, &ROOM, true),
            Method::Fork
        );
        let room = Room::look();
        assert!(room.resident > 0 && room.free > 0);
    }
}
