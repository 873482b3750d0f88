//! Recovery (FIG. 8): from a checked image to the jump into the restorer.
//!
//! Constructor of the new process, or at a rollback the leader of the old one, alone, with
//! the control block of the helper ([`Inside`]): one thread; std and libc may be used,
//! since all of this process's memory is about to be replaced, but for what needs a locale
//! (`std::io::Error` asks libc for its text): that control block has none. Every error is one
//! line and exit status 125.

pub mod ahead;
pub mod alone;
pub mod area;
pub mod attributes;
mod carried;
pub mod check;
pub mod clocks;
pub mod contents;
pub mod descriptors;
pub mod handlers;
mod launch;
pub mod layout;
mod memory;
pub mod method;
pub mod proxy;
pub mod stay;
pub mod tape;
pub mod unpack;

use crate::agent::checkpoint::increments::lives::Knowledge;
use crate::agent::recover::files::FilesBack;
use crate::agent::resume::Payload;
use crate::agent::rollback::check::Protected;
use crate::agent::{clock, hooks, log};
use crate::config::RestoreMethod;
use crate::errno::Errno;
use crate::image::chain::ChainError;
use crate::image::state::{Manifest, VmaKind};
use crate::store::RawFs;
use crate::store::find::FoundMember;
use carried::Carried;
use ckpt_sys::syscall;
pub use contents::Contents;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

/// What cannot be brought back here.
#[derive(Debug, thiserror::Error)]
pub enum RestoreError {
    #[error(transparent)]
    Check(#[from] check::CheckError),
    #[error(transparent)]
    Descriptors(#[from] descriptors::RestoreError),
    #[error("change to the working directory {path}: {error}")]
    Cwd { path: String, error: Errno },
    #[error("put the chain of images together: {0}")]
    Chain(#[from] ChainError),
    #[error("unpack the image of generation {generation}: {error}")]
    Unpack { generation: u64, error: Errno },
    #[error("find free address space for the restorer: errno {0}")]
    Area(i32),
    #[error("rebuild shared memory {name}: {error}")]
    Shared { name: String, error: Errno },
    #[error("encode the state for the restored process: {0}")]
    Payload(String),
    #[error("find free address space for the vdso")]
    NoPlace,
    #[error("lead the vdso to this kernel's: {0}")]
    Vdso(#[from] crate::agent::vdso::VdsoError),
    #[error("permit the vector features that the image uses: errno {0}")]
    Features(i32),
}

impl RestoreError {
    /// Is this generation the obstacle, so that an older one may do?
    pub fn is_of_the_generation(&self) -> bool {
        match self {
            RestoreError::Check(error) => error.is_of_the_generation(),
            // Not where there is no room for it, say: that would be so with any other.
            RestoreError::Unpack { error, .. } => *error == unpack::DAMAGED,
            RestoreError::Chain(_) => true,
            _ => false,
        }
    }
}

/// How to restore (from the environment).
pub struct Options {
    pub method: RestoreMethod,
    /// The job's directory.
    pub job: PathBuf,
    pub files: FilesBack,
    /// Rollback in the running process.
    pub inside: Option<Inside>,
    /// What [`Contents::of`] found, where that was asked before.
    pub contents: Option<Contents>,
}

/// What is different in a process that runs already.
#[derive(Default)]
pub struct Inside {
    /// The C library's rseq area of this thread, and its length.
    pub rseq: (u64, u32),
    /// Memory that keeps its content.
    pub protected: Protected,
    /// What has changed since, where that is known.
    pub pages: Option<Knowledge>,
    /// The tracker's descriptor.
    pub watching: Option<OwnedFd>,
}

/// Mapped files that stay where somebody else has moved them.
fn follow_moved(manifest: &mut Manifest, files: &FilesBack) {
    for vma in &mut manifest.memory.vmas {
        if let VmaKind::FileShared { path, .. } = &mut vma.kind
            && let Some((_, now)) = files.moved.iter().find(|(old, _)| old == path)
        {
            path.clone_from(now);
        }
    }
}

/// Restores a member. Returns only with an error, and then this process is
/// as good as before (or a child of it that must exit with 125).
///
/// `lock` is the job's lock, to be kept by the helper; `payload` what the restored
/// process must know and the manifest does not say.
pub fn restore(
    member: FoundMember<RawFs>,
    lock: Option<OwnedFd>,
    options: Options,
    mut payload: Payload,
) -> Result<std::convert::Infallible, RestoreError> {
    let Contents {
        pieces,
        objects,
        files,
        mappable,
    } = match options.contents {
        Some(contents) => contents,
        None => Contents::of(&member, &options.job)?,
    };
    // The descriptors as well: this is the program's table.
    let FoundMember {
        image, file, older, ..
    } = member;
    drop((file, older));
    let mut manifest = image.manifest;
    let mut inside = options.inside;
    // `check::machine` was asked before the files went back.
    follow_moved(&mut manifest, &options.files);
    contents::place(&mut manifest, &objects);
    let mut mapped = Vec::new();
    // From inside that was done before there was no way back.
    if inside.is_none() {
        check::files(&manifest)?;
        mapped = check::hold_mapped(&manifest)?;
    }
    let same = become_process(&manifest, inside.is_some(), &mut payload)?;

    let watching = inside.as_mut().and_then(|inside| inside.watching.take());
    let mut carried = Carried::new(files, lock, watching, mapped);
    carried.restore_descriptors(&manifest, &mut payload, &options.files, inside.is_some())?;
    // SAFETY: no pointers.
    unsafe { libc::umask(manifest.process.umask) };
    carried.rebuild_shared(&manifest)?;

    payload.take_from(&manifest);
    let clocks = clocks::decide(&manifest)?;
    tell(&clocks);
    // Of the checkpoint: what stays mapped is not asked for any more below.
    let taken = clocks::taken_by(&manifest);
    let how = memory::How {
        method: options.method,
        mappable,
        job: &options.job,
        leads_vdso: clocks.lead.is_some(),
    };
    let memory = memory::decide(
        &mut manifest,
        &pieces,
        &carried,
        how,
        inside.as_mut(),
        &mut payload,
    );
    launch::Launch {
        manifest,
        memory,
        carried,
        clocks,
        taken,
        same,
    }
    .go(inside, payload)
}

/// Makes this process what the program's was: number, limits, attributes, directory. True when
/// it has the number.
fn become_process(
    manifest: &Manifest,
    inside: bool,
    payload: &mut Payload,
) -> Result<bool, RestoreError> {
    attributes::raise_nofile(manifest);
    // From inside, the threads' old ids are free unless somebody else has taken one.
    let mut same = true;
    if inside {
        // SAFETY: no pointers.
        unsafe {
            // The clocks of the vdso need it; each thread gets its own switch in the end.
            syscall!(libc::SYS_prctl, libc::PR_SET_TSC, libc::PR_TSC_ENABLE);
            // What is mapped on the way is not to be locked; what was locked is mapped anew.
            if hooks::memory::locked_in_future() != 0 {
                syscall!(libc::SYS_munlockall);
            }
        }
    } else {
        alone::be_alone();
        same = proxy::become_pid(manifest.process.pid, attributes::death_signal(manifest))
            == proxy::Identity::Same;
        payload.starter = proxy::starter();
    }
    attributes::permit_features(manifest)?;
    attributes::process(manifest, inside);
    let path = os(&manifest.process.cwd);
    std::env::set_current_dir(&path).map_err(|error| RestoreError::Cwd {
        path: path.to_string_lossy().into_owned(),
        error: error.into(),
    })?;
    Ok(same)
}

/// Says in the log what is done about clocks, where it is anything.
fn tell(clocks: &clocks::Decision) {
    if let Some(why) = clocks.lead {
        log::line(format_args!("{why}"));
    }
    let ahead = clocks.offsets[clock::Clock::Monotonic as usize];
    if ahead != 0 {
        log::line(format_args!(
            "the program's clock goes on, {}.{:03} s ahead of this machine's",
            ahead / 1_000_000_000,
            ahead / 1_000_000 % 1000
        ));
    }
}

fn os(bytes: &[u8]) -> std::path::PathBuf {
    use std::os::unix::ffi::OsStrExt;
    std::path::PathBuf::from(std::ffi::OsStr::from_bytes(bytes))
}
