//! Memory and registers come back exactly (issue lines "memory", "registers").

mod common;

guest_tests! {
    mem_heap = "mem_heap";
    mem_maps = "mem_maps";
    mem_nameless = "mem_nameless";
    mem_written = "mem_written";
    mem_joined = "mem_joined";
    mem_sharedfork = "mem_sharedfork";
    mem_jit = "mem_jit";
    mem_stack = "mem_stack";
    mem_dlopen = "mem_dlopen";
    mem_ops = "mem_ops";
    mem_objects = "mem_objects";
    mem_scatter = "mem_scatter", 5.0 s;
    mem_big = "mem_big", 2.0 s;
    regs_hot = "regs_hot";
    regs_amx = "regs_amx";
    regs_rounding = "regs_rounding";
}

/// The flags of mappings, as /proc/self/smaps shows them to the guest: with the mprotect
/// tracker it sees that watched pages are not writable (docs/LIMITATIONS.md).
mod mem_vmflags {
    use crate::common::*;

    fn survives(setting: Setting) {
        if std::env::var("CKPT_TEST_TRACKER").is_ok_and(|tracker| tracker == "mprotect") {
            eprintln!("SKIPPED: the guest would see the tracker's protections");
            return;
        }
        Trial::new(Program::guest("mem_vmflags").seconds(1.2), setting).survives(3);
    }

    #[test]
    fn lazy_fork() {
        survives(LAZY_FORK);
    }

    #[test]
    fn eager_copy() {
        survives(EAGER_COPY);
    }
}

/// What a stop finds in the midst of calls that change mappings.
mod amid_changes {
    use crate::common::*;

    fn survives(guest: &str, setting: Setting) {
        let trial = Trial::new(Program::guest(guest).seconds(1.5), setting);
        trial.ckpt("CKPT_INTERVAL", "15ms").survives(10);
    }

    #[test]
    fn mem_discards() {
        survives("mem_discards", LAZY_FORK);
    }

    #[test]
    fn mem_vacated() {
        for tracker in ["mprotect", "uffd"] {
            let trial = Trial::new(Program::guest("mem_vacated").seconds(1.5), LAZY_FORK);
            let trial = trial.ckpt("CKPT_TRACKER", tracker);
            trial.ckpt("CKPT_INTERVAL", "60ms").survives(8);
        }
    }

    #[test]
    fn mem_exchanged_lazy_fork() {
        survives("mem_exchanged", LAZY_FORK);
    }

    #[test]
    fn mem_exchanged_eager_copy() {
        survives("mem_exchanged", EAGER_COPY);
    }
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

/// A store that nothing may be executed from: executable ranges are read, not mapped.
mod noexec_store {
    use crate::common::*;
    use std::path::{Path, PathBuf};
    use std::process::Command;

    struct Mounted(PathBuf);

    impl Mounted {
        fn new(at: &Path) -> Option<Mounted> {
            std::fs::create_dir_all(at).expect("a mount point");
            let mut mount = Command::new("mount");
            mount.args(["-t", "tmpfs", "-o", "noexec,mode=1777,size=256m", "none"]);
            let done = mount.arg(at).output().ok()?;
            done.status.success().then(|| Mounted(at.to_owned()))
        }
    }

    impl Drop for Mounted {
        fn drop(&mut self) {
            let _ = Command::new("umount")
                .args(["-l".as_ref(), self.0.as_os_str()])
                .status();
        }
    }

    fn survives(guest: &str) {
        let trial = Trial::new(Program::guest(guest).seconds(1.2), LAZY_FORK);
        let place = trial.dir.join("noexec");
        let Some(_mounted) = Mounted::new(&place) else {
            eprintln!("SKIPPED: nothing can be mounted here, so no store without execution");
            return;
        };
        let store = place.join("store");
        let mut trial = trial.ckpt("CKPT_DIR", &path_text(&store));
        // The harness looks for generations in the trial's own store.
        std::os::unix::fs::symlink(&store, trial.dir.join("store")).expect("a link");
        trial.note("the store is mounted noexec");
        trial.survives(2);
    }

    #[test]
    fn jit() {
        survives("mem_jit");
    }

    #[test]
    fn dlopen() {
        survives("mem_dlopen");
    }
}
