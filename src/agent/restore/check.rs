//! May this image be restored here? Asked before anything is changed (DESIGN: another
//! build, missing CPU features, another user: one line, exit 125, nothing lost).

use super::clocks;
use crate::agent::collect::credentials::Difference;
use crate::agent::collect::{cpu, credentials, objects, process};
use crate::agent::settings;
use crate::image::state::{Manifest, ObjectId, Privileges, VmaKind};
use std::ffi::OsStr;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;

/// Why the image cannot be trusted here. Each text says what and what to do.
#[derive(Debug, thiserror::Error)]
pub enum CheckError {
    #[error("the checkpoint was taken on {then}, this machine is {here}")]
    Architecture { then: String, here: &'static str },
    #[error(
        "{path} is another build than the one that was checkpointed: put the old one back, or start afresh with CKPT_RESUME=never"
    )]
    Build { path: String },
    #[error(
        "{path}, which the program had mapped, is gone: put it back, or start afresh with CKPT_RESUME=never"
    )]
    Missing { path: String },
    #[error(
        "this CPU lacks features that the checkpoint needs (word {word}, bits {bits:#x}): restore it on a CPU like the first one"
    )]
    Cpu { word: usize, bits: u64 },
    #[error("the checkpoint belongs to uid {then_uid} gid {then_gid}, this is uid {uid} gid {gid}")]
    User {
        then_uid: u32,
        then_gid: u32,
        uid: u32,
        gid: u32,
    },
    #[error(
        "the checkpoint belongs to a process with other {what} ({then}; this one: {now}): start it as it was started then, or afresh with CKPT_RESUME=never"
    )]
    Credentials {
        what: &'static str,
        then: String,
        now: String,
    },
    #[error(
        "this process has forbidden itself memory that becomes executable (PR_SET_MDWE), which a restore needs"
    )]
    NoNewCode,
    #[error(
        "the program had forbidden itself new executable memory (PR_SET_MDWE), which this kernel does not know: errno {0}"
    )]
    Mdwe(i32),
    #[error(
        "the checkpoint was taken under another kernel ({then}; this is {here}), and its vdso cannot be led to this one's: {why}; boot that kernel, or start afresh with CKPT_RESUME=never"
    )]
    Vdso {
        then: String,
        here: String,
        why: String,
    },
    #[error(
        "a thread was just reading the clock, and kernel or clock are others now: it cannot go on there"
    )]
    Amid,
}

impl CheckError {
    /// Is this generation the obstacle, so that an older one may do?
    pub fn is_of_the_generation(&self) -> bool {
        matches!(self, CheckError::Amid)
    }
}

fn shown(path: &[u8]) -> String {
    String::from_utf8_lossy(path).into_owned()
}

/// All checks that need nothing but the manifest and this machine: before anything is
/// done to a file.
pub fn machine(manifest: &Manifest) -> Result<(), CheckError> {
    let identity = &manifest.identity;
    if identity.arch != std::env::consts::ARCH {
        return Err(CheckError::Architecture {
            then: identity.arch.clone(),
            here: std::env::consts::ARCH,
        });
    }
    if let Some((word, bits)) = cpu::missing(&identity.cpu_features, &cpu::features()) {
        return Err(CheckError::Cpu { word, bits });
    }
    // SAFETY: no arguments.
    let (uid, gid) = unsafe { (libc::getuid(), libc::getgid()) };
    if (uid, gid) != (identity.uid, identity.gid) {
        return Err(CheckError::User {
            then_uid: identity.uid,
            then_gid: identity.gid,
            uid,
            gid,
        });
    }
    privileges(&manifest.privileges)?;
    clocks::decide(manifest)?;
    Ok(())
}

/// Nothing may be wider after the restore than it was, and nothing fail on the way.
fn privileges(privileges: &Privileges) -> Result<(), CheckError> {
    // The command only looks, and is started otherwise than the program will be.
    let Some(settings) = settings::get() else {
        return Ok(());
    };
    let now = &settings.credentials;
    let then = &privileges.credentials;
    if !then.is_empty()
        && let Some(Difference { what, then, now }) = credentials::restart_difference(then, now)
    {
        return Err(CheckError::Credentials { what, then, now });
    }
    match process::mdwe() {
        Ok(0) => Ok(()),
        Ok(_) => Err(CheckError::NoNewCode),
        Err(errno) if privileges.mdwe != 0 => Err(CheckError::Mdwe(errno)),
        Err(_) => Ok(()),
    }
}

/// The programs and libraries that memory maps, once they are what they were at the checkpoint.
pub fn files(manifest: &Manifest) -> Result<(), CheckError> {
    manifest.identity.objects.iter().try_for_each(object)
}

/// One of them.
pub fn object(object: &ObjectId) -> Result<(), CheckError> {
    let path = || shown(&object.path);
    match objects::identify(&object.path) {
        None => Err(CheckError::Missing { path: path() }),
        Some(here) if !objects::same_build(object, &here) => {
            Err(CheckError::Build { path: path() })
        }
        Some(_) => Ok(()),
    }
}

/// The path of a file that is mapped shared, and whether the program had opened it for writing:
/// by one that it had not, memory must not become writable.
pub type Mapped = (Vec<u8>, bool);

/// Files that are mapped shared, opened until they are mapped: somebody else may remove one in
/// the meantime (a JVM those of processes that are dead).
pub fn hold_mapped(manifest: &Manifest) -> Result<Vec<(Mapped, OwnedFd)>, CheckError> {
    let mut held: Vec<(Mapped, OwnedFd)> = Vec::new();
    for vma in &manifest.memory.vmas {
        if let VmaKind::FileShared { path, writable, .. } = &vma.kind
            && held
                .iter()
                .all(|((known, write), _)| (known, write) != (path, writable))
        {
            let open = |write| {
                let mut options = std::fs::OpenOptions::new();
                let at = OsStr::from_bytes(path);
                options.read(true).write(write).open(at)
            };
            let file = open(*writable).or_else(|_| open(false));
            let file = file.map_err(|_| CheckError::Missing { path: shown(path) })?;
            held.push(((path.clone(), *writable), file.into()));
        }
    }
    Ok(held)
}
