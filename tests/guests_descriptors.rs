//! Descriptors come back exactly (issue line "descriptors").

mod common;

guest_tests! {
    fd_files = "fd_files";
    fd_pipes = "fd_pipes";
    fd_kernel = "fd_kernel";
    fd_sockets = "fd_sockets";
    fd_connects = "fd_connects";
    fd_pty = "fd_pty";
    fd_maplock = "fd_maplock";
    fd_owner = "fd_owner";
    fd_listen = "fd_listen";
}

/// Standard output and input are files with buffered content in flight.
mod out_stdio {
    use crate::common::*;

    fn program() -> Program {
        let numbers: String = (0..10_000).map(|n| format!("{n}\n")).collect();
        Program::guest("out_stdio").seconds(1.2).input(numbers)
    }

    #[test]
    fn lazy_fork() {
        Trial::new(program(), LAZY_FORK).survives(3);
    }

    #[test]
    fn eager_copy() {
        Trial::new(program(), EAGER_COPY).survives(3);
    }
}

/// A peer outside of the process: this test.
mod fd_outside {
    use crate::common::*;
    use std::io::{Read, Write};
    use std::net::TcpListener;
    use std::os::fd::AsRawFd;

    /// Echoes eight bytes at a time; "bye" (-77) is answered with a reset.
    fn server() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        let port = listener.local_addr().expect("its address").port();
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                std::thread::spawn(move || {
                    let mut stream = stream;
                    let mut word = [0; 8];
                    while stream.read_exact(&mut word).is_ok() {
                        if i64::from_ne_bytes(word) == -77 {
                            let reset = libc::linger {
                                l_onoff: 1,
                                l_linger: 0,
                            };
                            // SAFETY: the option's struct with its size.
                            unsafe {
                                libc::setsockopt(
                                    stream.as_raw_fd(),
                                    libc::SOL_SOCKET,
                                    libc::SO_LINGER,
                                    (&raw const reset).cast(),
                                    size_of_val(&reset) as u32,
                                )
                            };
                            break;
                        }
                        if stream.write_all(&word).is_err() {
                            break;
                        }
                    }
                });
            }
        });
        port
    }

    fn is_reset(setting: Setting) {
        let port = server();
        let program = Program::guest("fd_outside").seconds(1.2);
        Trial::new(program.env("GUEST_PORT", &port.to_string()), setting).survives(2);
    }

    #[test]
    fn lazy_fork() {
        is_reset(LAZY_FORK);
    }

    #[test]
    fn eager_copy() {
        is_reset(EAGER_COPY);
    }
}
