//! ckpt: checkpoint and restore of unmodified programs.
//!
//! This crate holds all logic; `ckpt-preload` turns it into `libckpt.so`,
//! `src/bin/ckpt.rs` into the `ckpt` command.
//!
//! | module | owns | runs in |
//! |---|---|---|
//! | [`agent`] | what happens inside the target process | the target |
//! | [`image`] | the volatile checkpoint's format | target and command |
//! | [`store`] | where checkpoints live, publish, journal, locks | target and command |
//! | [`persist`] | the files: tables of modifications, undo | target and command |
//! | [`config`] | the environment variables | target and command |
//! | [`errno`] | kernel error numbers and their texts | target and command |
//! | [`cli`] | the verbs of the `ckpt` command | command only |

pub mod agent;
pub mod cli;
pub mod config;
pub mod errno;
pub mod image;
pub mod interval;
pub mod persist;
pub mod store;
