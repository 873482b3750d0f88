//! Memory and registers come back exactly (issue lines "memory", "registers").

mod common;

guest_tests! {
    mem_heap = "mem_heap";
    mem_maps = "mem_maps";
    mem_sharedfork = "mem_sharedfork";
    mem_jit = "mem_jit";
    mem_vmflags = "mem_vmflags";
    mem_stack = "mem_stack";
    mem_dlopen = "mem_dlopen";
    mem_ops = "mem_ops";
    mem_big = "mem_big", 2.0 s;
    regs_hot = "regs_hot";
    regs_amx = "regs_amx";
    regs_rounding = "regs_rounding";
}

/// Reservations and zero pages cost nothing: the image stays small as well.
mod mem_sparse {
    use crate::common::*;

    fn images_are_small(setting: Setting) {
        let mut trial = Trial::new(Program::guest("mem_sparse").seconds(1.2), setting);
        let bare = trial.bare();
        let mut started = trial.start();
        trial.await_generation(&mut started, 0);
        started.kill(true);
        let size = stored(&trial.dir.join("store"));
        if size > 8 << 20 {
            trial.fail(&format!("the store takes {size} bytes for a few pages"));
        }
        trial.kill_and_resume(2);
        let life = trial.finish();
        trial.compare(&bare, &life);
    }

    /// Bytes that the files under a directory really take.
    fn stored(dir: &std::path::Path) -> u64 {
        use std::os::unix::fs::MetadataExt;
        let mut sum = 0;
        for entry in std::fs::read_dir(dir).into_iter().flatten().flatten() {
            let Ok(meta) = entry.metadata() else { continue };
            sum += if meta.is_dir() {
                stored(&entry.path())
            } else {
                meta.blocks() * 512
            };
        }
        sum
    }

    #[test]
    fn lazy_fork() {
        images_are_small(LAZY_FORK);
    }

    #[test]
    fn eager_copy() {
        images_are_small(EAGER_COPY);
    }
}
