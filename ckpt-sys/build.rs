//! Builds the restorer blob: C -> object -> flat binary, embedded by `src/blob.rs`.

use std::path::{Path, PathBuf};
use std::process::Command;

fn run(command: &mut Command) {
    let shown = format!("{command:?}");
    match command.status() {
        Ok(status) if status.success() => {}
        Ok(status) => panic!("{shown}: {status}"),
        Err(error) => panic!("{shown}: {error} (are gcc and binutils installed?)"),
    }
}

fn main() {
    let out = PathBuf::from(std::env::var_os("OUT_DIR").expect("cargo sets OUT_DIR"));
    let source = Path::new("blob");
    for file in ["restorer.c", "restorer.h", "restorer.lds"] {
        println!("cargo::rerun-if-changed=blob/{file}");
    }
    let object = out.join("restorer.o");
    let elf = out.join("restorer.elf");
    let cc = std::env::var("CC").unwrap_or_else(|_| "cc".into());
    run(Command::new(cc)
        .args([
            "-std=gnu11",
            "-O2",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-fPIC",
            "-ffreestanding",
            "-fno-builtin",
        ])
        .args([
            "-fno-stack-protector",
            "-fno-jump-tables",
            "-fcf-protection=none",
            "-mno-red-zone",
        ])
        .args([
            "-fno-tree-loop-distribute-patterns",
            "-fvisibility=hidden",
            "-mgeneral-regs-only",
        ])
        .args(["-fno-asynchronous-unwind-tables", "-c"])
        .arg(source.join("restorer.c"))
        .arg("-o")
        .arg(&object));
    run(Command::new("ld")
        .args(["--fatal-warnings", "--no-warn-rwx-segments", "-T"])
        .arg(source.join("restorer.lds"))
        .arg("-o")
        .arg(&elf)
        .arg(&object));
    run(Command::new("objcopy")
        .args(["-O", "binary"])
        .arg(&elf)
        .arg(out.join("restorer.bin")));
}
