//! Kernel error numbers with their names and texts.
//!
//! Used in the target and in the command. `std::io::Error` asks libc for the
//! text of an error (`strerror_r`, which may take locale locks and allocate from
//! the program's heap); this module has its own table instead.

use std::fmt;

/// An error number as the kernel returned it (positive).
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Errno(pub i32);

/// The result of one kernel operation.
pub type Io<T> = Result<T, Errno>;

macro_rules! table {
    ($($name:ident $text:literal)*) => {
        impl Errno {
            $(pub const $name: Errno = Errno(libc::$name);)*

            /// `ENOENT` and so on; `None` for numbers outside the table.
            pub fn name(self) -> Option<&'static str> {
                match self.0 {
                    $(libc::$name => Some(stringify!($name)),)*
                    _ => None,
                }
            }

            fn text(self) -> Option<&'static str> {
                match self.0 {
                    $(libc::$name => Some($text),)*
                    _ => None,
                }
            }
        }
    };
}

table! {
    EPERM "operation not permitted"
    ENOENT "no such file or directory"
    ESRCH "no such process"
    EINTR "interrupted system call"
    EIO "input/output error"
    ENXIO "no such device or address"
    ENOEXEC "exec format error"
    EBADF "bad file descriptor"
    EAGAIN "resource temporarily unavailable"
    ENOMEM "out of memory"
    EACCES "permission denied"
    EFAULT "bad address"
    EBUSY "device or resource busy"
    EEXIST "file exists"
    EXDEV "on another file system"
    ENODEV "no such device"
    ENOTDIR "not a directory"
    EISDIR "is a directory"
    EINVAL "invalid argument"
    ENFILE "too many open files in the system"
    EMFILE "too many open files"
    ENOTTY "not a terminal"
    ETXTBSY "text file busy"
    EFBIG "file too large"
    ENOSPC "no space left on device"
    ESPIPE "illegal seek"
    EROFS "read-only file system"
    EMLINK "too many links"
    EPIPE "broken pipe"
    ERANGE "result out of range"
    EDEADLK "deadlock avoided"
    ENAMETOOLONG "file name too long"
    ENOLCK "no locks available"
    ENOSYS "function not implemented"
    ENOTEMPTY "directory not empty"
    ELOOP "too many symbolic links"
    EOVERFLOW "value too large"
    EDQUOT "disk quota exceeded"
    EOPNOTSUPP "operation not supported"
    ESTALE "stale file handle"
    ETIMEDOUT "timed out"
    ECONNREFUSED "connection refused"
    EBADMSG "it is damaged"
}

impl fmt::Display for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.text() {
            Some(text) => f.write_str(text),
            None => write!(f, "error {}", self.0),
        }
    }
}

impl fmt::Debug for Errno {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.name() {
            Some(name) => f.write_str(name),
            None => write!(f, "Errno({})", self.0),
        }
    }
}

impl std::error::Error for Errno {}

impl From<rustix::io::Errno> for Errno {
    fn from(errno: rustix::io::Errno) -> Errno {
        Errno(errno.raw_os_error())
    }
}

/// Without the text that std would ask libc for.
impl From<std::io::Error> for Errno {
    fn from(error: std::io::Error) -> Errno {
        error.raw_os_error().map_or(Errno::EIO, Errno)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_texts() {
        assert_eq!(Errno::ENOSPC.to_string(), "no space left on device");
        assert_eq!(format!("{:?}", Errno::ENOSPC), "ENOSPC");
        assert_eq!(Errno(4095).to_string(), "error 4095");
        assert_eq!(Errno::from(rustix::io::Errno::PERM), Errno::EPERM);
        let error = std::io::Error::from_raw_os_error(libc::ENOSPC);
        assert_eq!(Errno::from(error), Errno::ENOSPC);
        assert_eq!(Errno::from(std::io::Error::other("no number")), Errno::EIO);
    }
}
