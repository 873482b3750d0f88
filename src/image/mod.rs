//! The volatile checkpoint's format (docs/FORMAT.md).
//!
//! An image file is: one header page (fixed width, decoded by hand), page data
//! (page-aligned, mapped at restore; compressed if asked to), the manifest (bincode), the
//! checksum table. Written sequentially; the header is written last, so a file
//! with a valid header is a finished one. A published image never changes.
//!
//! | file | owns | runs in |
//! |---|---|---|
//! | `state` | the manifest's structs | target and command |
//! | `header` | the header page: encode, parse, validate | target and command |
//! | `codec` | structs to bytes and back; the only user of bincode | target and command |
//! | `sums` | the checksum table of the page data | target and command |
//! | `pack` | compressed page data | target and command |
//! | `writer` | the streaming writer | target: helper thread or forked writer |
//! | `reader` | opening and verifying | target: constructor; command |
//! | `blocks` | page data compared with its checksums | helper (merging), constructor, command |
//! | `chain` | what a generation that stands on others consists of | constructor, helper, command |
//! | `check` | does a decoded manifest make sense | with the reader |

pub mod blocks;
pub mod chain;
pub mod check;
pub mod codec;
pub mod header;
pub mod pack;
pub mod places;
pub mod reader;
pub mod state;
pub mod sums;
pub mod writer;

pub use blocks::Blocks;
pub use reader::{Image, ImageError, ReadAt};
pub use writer::{ImageWriter, WriteError, Written};

/// The unit of page data; the only page size of this format version.
pub const PAGE: u64 = 4096;
