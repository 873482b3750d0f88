//! Descriptors: every kind is made with some state in one process, collected
//! from a thread with a descriptor table of its own (as the helper thread does),
//! and restored in a fresh process, which checks everything that can be observed.
//!
//! Each case runs in two child processes of the test binary (`phase` below), as
//! root also as an ordinary user.

mod anon;
mod files;
mod harness;
mod pipes;
mod sockets;
mod ttys;

use harness::{Case, run};

/// Not a test of its own: what the child processes run.
#[test]
fn phase() {
    harness::phase(&cases());
}

fn cases() -> Vec<Case> {
    let mut all = Vec::new();
    all.extend(files::cases());
    all.extend(pipes::cases());
    all.extend(anon::cases());
    all.extend(ttys::cases());
    all.extend(sockets::cases());
    all
}

/// Untouched files cost nothing but the open file table: nothing is read or copied, and
/// an entry of the table takes six calls (its inode, its path, its position and flags, and whether
/// the path still leads there).
#[test]
fn calls_for_a_thousand_files() {
    let cases = cases();
    let case = cases.iter().find(|c| c.name == "thousand_files").unwrap();
    let calls = harness::calls_of_collecting(case);
    let total: usize = calls.values().sum();
    println!("{total}: {calls:?}");
    let each = if harness::has_device() { 2 } else { 6 };
    let wanted = each * 990 - 10..each * 990 + 200;
    assert!(wanted.contains(&total), "{total}: {calls:?}");
    let copying = [
        "copy_file_range",
        "sendfile",
        "pwrite64",
        "write",
        "ioctl",
        "kcmp",
    ];
    let copied: usize = copying.iter().filter_map(|name| calls.get(*name)).sum();
    assert!(copied < 20, "{calls:?}");
}

macro_rules! tests {
    ($($name:ident)*) => { $(
        #[test]
        fn $name() {
            run(stringify!($name), &cases());
        }
    )* };
}

tests! {
    regular_files shared_descriptions thousand_files unlinked_files memfds directories
    devices_and_path locks replaced_file missing_file recreated_file redirected_output same_output
    proc_self_files
    pipes pipe_ends_outside packet_pipe fifos
    eventfds timerfds signalfds inotify pidfds epoll_levels epoll_edges epoll_stale_entries
    epoll_oneshot refusals
    own_pty standard_descriptors
    unix_pairs unix_names unix_datagrams tcp tcp_large_queue tcp_v6 udp outside socket_options
    netlink descriptors_in_flight
}
