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
