//! What becomes of an image's clocks and vdso here: as they were, or the offsets with which
//! they go on and a vdso whose functions are led to the running kernel's (`agent::clock`).
//!
//! [`decide`] is asked before anything is done to a file, and once more by the restore itself:
//! the clocks have gone on since.

use super::check::CheckError;
use super::tape::Tape;
use crate::agent::clock::{self, Clocks};
use crate::agent::collect::identity;
use crate::agent::vdso::{self, VdsoError};
use crate::image::state::{Manifest, VmaKind};

/// How the clocks go on.
#[derive(Debug, Clone, Default)]
pub struct Decision {
    pub offsets: [u64; clock::CLOCKS],
    /// The program's vdso must be led to the kernel's; why, for the log.
    pub lead: Option<&'static str>,
}

const OTHER_KERNEL: &str = "the vdso of another kernel: calls are led to this one's";
const OTHER_CLOCK: &str = "the vdso is led to clocks with an offset";

fn other_kernel(manifest: &Manifest, why: String) -> CheckError {
    CheckError::Vdso {
        then: manifest.identity.kernel.clone(),
        here: identity::kernel(),
        why,
    }
}

/// Are these the machine's clocks by which the image was taken?
fn same_clocks(manifest: &Manifest, now: &[u64; clock::CLOCKS]) -> bool {
    let then = &manifest.clock;
    let ahead = then.kernel.iter().zip(now).all(|(then, now)| now >= then);
    ahead
        && manifest.identity.boot_id == identity::boot_id()
        && then.namespace == clock::namespace()
}

/// May the image's clocks go on here, and how?
pub fn decide(manifest: &Manifest) -> Result<Decision, CheckError> {
    let then = &manifest.clock;
    let other = manifest.identity.vdso != identity::vdso_digest();
    if then.vdso_at == 0 || then.gettime == 0 {
        // An image of an older program, or a kernel that gave it no vdso.
        return match other {
            true => Err(other_kernel(manifest, "its image does not hold it".into())),
            false => Ok(Decision::default()),
        };
    }
    let now = clock::kernel();
    let mut offsets = [0; clock::CLOCKS];
    // Without the net deadlines could not be translated: the clocks are the kernel's.
    if then.net {
        offsets = clock::go_on(then, same_clocks(manifest, &now), now);
        // At a rollback the program's clocks do not go back. (A new process has none.)
        for (offset, present) in offsets.iter_mut().zip(clock::offsets()) {
            *offset = present.max(*offset);
        }
    }
    let lead = if other {
        Some(OTHER_KERNEL)
    } else if offsets != [0; clock::CLOCKS] && !then.led {
        Some(OTHER_CLOCK)
    } else {
        None
    };
    if lead.is_some() {
        // Wherever the kernel's will be.
        vdso::lead(&then.vdso, |_| Some(1)).map_err(|e| other_kernel(manifest, e.to_string()))?;
        if then.led && !is_there(manifest) {
            let why = "the program has changed the memory at its place".into();
            return Err(other_kernel(manifest, why));
        }
    }
    if then.amid && (lead.is_some() || offsets[..] != then.offsets[..]) {
        return Err(CheckError::Amid);
    }
    Ok(Decision { offsets, lead })
}

/// Is the memory to which the vdso was led still there?
fn is_there(manifest: &Manifest) -> bool {
    let then = &manifest.clock;
    let end = then.vdso_at + then.vdso.len() as u64;
    let mut at = then.vdso_at;
    for vma in &manifest.memory.vmas {
        let goes_on = vma.start <= at && at < vma.end;
        if goes_on && vma.kind == VmaKind::Anon && vma.prot & libc::PROT_EXEC as u32 != 0 {
            at = vma.end;
        }
    }
    at >= end
}

/// What must not be used by anything else: the old vdso's place.
pub fn taken(manifest: &Manifest) -> (u64, u64) {
    let then = &manifest.clock;
    (then.vdso_at, then.vdso_at + then.vdso.len() as u64)
}

/// All address ranges that the checkpoint had: memory, and the vdso with its data.
pub fn taken_by(manifest: &Manifest) -> Vec<(u64, u64)> {
    let memory = &manifest.memory;
    let areas = memory.vmas.iter().map(|vma| (vma.start, vma.end));
    areas
        .chain([(memory.vvar_start, memory.vdso_end)])
        .chain([taken(manifest)])
        .collect()
}

/// The running kernel's vdso.
#[derive(Debug, Clone, Default)]
pub struct Here {
    /// Bytes, its data included; 0: there is none.
    pub len: u64,
    /// Where in it the code begins.
    code: u64,
    functions: Vec<vdso::Function>,
}

/// As the kernel has laid it out for this process.
pub fn here() -> Here {
    let Some((start, data, end)) = identity::vdso_layout() else {
        return Here::default();
    };
    // SAFETY: the kernel's own mapping, readable, never changed.
    let code = unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) };
    Here {
        len: end - data,
        code: start - data,
        functions: vdso::functions(code).unwrap_or_default(),
    }
}

/// What the restored process is to know when the kernel's vdso will be at `data` (its data first),
/// and the bytes for the place where the program knows it, if they are to be others.
pub fn lead(
    manifest: &Manifest,
    decision: &Decision,
    here: &Here,
    data: u64,
) -> Result<(Clocks, Option<Vec<u8>>), VdsoError> {
    let then = &manifest.clock;
    let code = data + here.code;
    let at = |name: &str| vdso::find(&here.functions, name).map(|at| code + at);
    let target = |name: &str| match name {
        "clock_gettime" => Some(then.gettime),
        name => at(name),
    };
    let content = decision.lead.map(|_| vdso::lead(&then.vdso, target));
    let content = content.transpose()?;
    let is_led = then.led || content.is_some();
    let clocks = Clocks {
        offsets: decision.offsets,
        real: if here.len > 0 {
            (code, data + here.len)
        } else {
            (0, 0)
        },
        gettime: at("clock_gettime").unwrap_or(0),
        led: if is_led { taken(manifest) } else { (0, 0) },
        replaced: content.is_some(),
    };
    Ok((clocks, content))
}

/// Puts the led vdso into its place, over what the image has there. `content` lies in the area.
pub fn place(tape: &mut Tape, manifest: &Manifest, content: u64) {
    let (start, end) = taken(manifest);
    tape.replace(
        start,
        end - start,
        content,
        libc::PROT_READ | libc::PROT_EXEC,
    );
}
