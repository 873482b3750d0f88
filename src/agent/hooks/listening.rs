//! Addresses of TCP servers.
//!
//! What a killed server leaves of its connections holds its address for a minute (TIME_WAIT),
//! and a restart that must listen there again would have to wait as long, unless *those
//! connections'* sockets were made with SO_REUSEADDR: they have it from the socket that listened.
//! Nearly every server sets it; for the others that is done here, and for what listens
//! already at a checkpoint (`collect::descriptors::sockets`).
//!
//! Any thread and context.

use super::frame::CallFrame;
use crate::agent::collect::descriptors::sockopts::{get_int, set_int};
use crate::agent::state::is_agents_process;

pub fn listen(frame: &CallFrame) {
    if is_agents_process() {
        leaves_its_address(frame.args[0] as i32);
    }
}

/// Lets the connections of a TCP socket leave its address to the next life. True when that is so.
pub fn leaves_its_address(fd: i32) -> bool {
    let option = |name| get_int(fd, libc::SOL_SOCKET, name);
    let inet = matches!(option(libc::SO_DOMAIN), Ok(libc::AF_INET | libc::AF_INET6));
    if !inet || option(libc::SO_TYPE) != Ok(libc::SOCK_STREAM) {
        return false;
    }
    option(libc::SO_REUSEADDR).is_ok_and(|on| on != 0)
        || set_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::hooks::testing::{call, in_child};
    use crate::agent::state::{AGENT, wake};
    use std::os::fd::AsRawFd;
    use std::sync::atomic::Ordering::SeqCst;

    #[test]
    fn who_listens_leaves_its_address() {
        in_child(|| {
            // SAFETY: a child of the test alone in its process.
            unsafe { wake().unwrap() };
            AGENT.real_pid.store(std::process::id() as i32, SeqCst);
            // SAFETY: no memory is involved.
            let made = |domain, ty| unsafe { libc::socket(domain, ty, 0) };
            let is_on = |fd| get_int(fd, libc::SOL_SOCKET, libc::SO_REUSEADDR) == Ok(1);
            for (domain, ty, left) in [
                (libc::AF_INET, libc::SOCK_STREAM, true),
                (libc::AF_INET, libc::SOCK_DGRAM, false),
                (libc::AF_UNIX, libc::SOCK_STREAM, false),
            ] {
                let fd = made(domain, ty);
                assert_eq!(call(libc::SYS_listen, &[fd as u64, 1]), None);
                assert_eq!(is_on(fd), left, "{domain} {ty}");
            }
            let file = std::fs::File::open("/dev/null").unwrap();
            assert!(!leaves_its_address(file.as_raw_fd()));
        });
    }
}
