//! The `ckpt` command: parses and dispatches to `ckpt::cli`.

fn main() {}
