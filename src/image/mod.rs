//! The volatile checkpoint's format (docs/FORMAT.md).
//!
//! An image file is: one header page (fixed width, decoded by hand), page data
//! (page-aligned, uncompressed, mapped at restore), the manifest (bincode), the
//! checksum table. Written sequentially; the header is written last.

pub mod state;
