//! The user's files go back with the memory: the persistent checkpoint table.
//!
//! Nothing is done to a file at a checkpoint. The first modification after it is
//! recorded, with what is needed to take it back, before it runs; a recovery undoes
//! the records in reverse. `docs/FILES.md` is the design.
//!
//! | file | owns | runs in |
//! |---|---|---|
//! | `recorder` | what the hooks tell: one method per kind of modification | target, inside hooks |
//! | `index` | what is recorded already since the table began | target, under the recorder's lock |
//! | `birth` | what tells an inode from another that had its number | target, undo |
//! | `lock` | the recorder's lock | target |
//! | `writer` | the mapped journal and shadow file | target, under the recorder's lock |
//! | `shadow`, `kept` | pre-images of blocks, links to removed files | target, under the recorder's lock |
//! | `table` | what a table says; beginning, ending, listing, reading and removing them | helper thread, constructor, command |
//! | `format` | header and records as bytes | all |
//! | `exclude` | which paths are left alone | all |
//! | `undo` | taking modifications back | constructor (one thread), command |
//! | `diff` | what an undo would change, and rows for people | command |
//! | `sys` | the few system calls, raw: names, contents, attributes | all |

pub(crate) mod birth;
pub mod diff;
pub mod exclude;
pub mod format;
mod index;
pub mod kept;
pub(crate) mod lock;
pub mod recorder;
mod shadow;
pub mod sys;
pub mod table;
pub mod undo;
mod writer;

/// What identifies an inode (and a directory) among those that there are at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Id {
    /// `makedev` number, as `st_dev` has it.
    pub dev: u64,
    pub ino: u64,
}

/// What identifies an inode among all that there have been.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub struct Identity {
    pub id: Id,
    /// A number of this inode only (see `birth`); 0: not known.
    pub birth: u64,
}

impl Identity {
    /// Is it the same inode, as far as one can tell?
    pub fn is(&self, other: &Identity) -> bool {
        let births = (self.birth, other.birth);
        self.id == other.id && (births.0 == births.1 || births.0 == 0 || births.1 == 0)
    }
}

/// The attributes of an inode that can be put back, and its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Stat {
    pub id: Id,
    /// As in [`Identity`]; hooks do not ask for it.
    pub birth: u64,
    /// Kind and permissions, as `st_mode`.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    pub size: u64,
    pub atime_ns: i64,
    pub mtime_ns: i64,
    pub rdev: u64,
}

impl Stat {
    /// The fields of a `statx` answer with STATX_BASIC_STATS.
    pub fn from_statx(x: &libc::statx) -> Stat {
        let ns = |t: &libc::statx_timestamp| t.tv_sec * 1_000_000_000 + i64::from(t.tv_nsec);
        Stat {
            id: Id {
                dev: libc::makedev(x.stx_dev_major, x.stx_dev_minor),
                ino: x.stx_ino,
            },
            birth: 0,
            mode: u32::from(x.stx_mode),
            nlink: x.stx_nlink,
            uid: x.stx_uid,
            gid: x.stx_gid,
            size: x.stx_size,
            atime_ns: ns(&x.stx_atime),
            mtime_ns: ns(&x.stx_mtime),
            rdev: libc::makedev(x.stx_rdev_major, x.stx_rdev_minor),
        }
    }

    pub fn identity(&self) -> Identity {
        Identity {
            id: self.id,
            birth: self.birth,
        }
    }

    pub fn is_dir(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFDIR
    }

    pub fn is_regular(&self) -> bool {
        self.mode & libc::S_IFMT == libc::S_IFREG
    }
}

/// A name in a directory.
#[derive(Debug, Clone, Copy)]
pub struct NameRef<'a> {
    pub dir: Id,
    /// Absolute, as the directory is called now; no trailing slash (but `/` itself).
    pub dir_path: &'a [u8],
    /// One component.
    pub name: &'a [u8],
}

/// An inode that is about to be modified.
#[derive(Debug, Clone, Copy)]
pub struct FileRef<'a> {
    /// As it is now, before the operation.
    pub stat: &'a Stat,
    /// Absolute, as it is called now. Empty: the recorder asks `/proc/self/fd` of
    /// `any_fd`, and only when it needs the path.
    pub path: &'a [u8],
    /// A descriptor of it that is open for reading.
    pub fd: Option<i32>,
    /// Any descriptor of it (write only, O_PATH).
    pub any_fd: Option<i32>,
}

/// Attributes that an operation changes; or them together.
pub type Which = u32;
pub const SIZE: Which = 1;
pub const MODE: Which = 2;
pub const OWNER: Which = 4;
pub const TIMES: Which = 8;

/// What later writes to an inode still need, for as long as this table is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Coverage {
    /// Nothing, whatever the offset.
    Free,
    /// Nothing at or behind `size0`, the size at the checkpoint.
    AppendOnly { size0: u64 },
    /// Anything may need a record.
    Partial,
}
