//! Signal handlers of the program that had interrupted a function of the vdso when their
//! generation was taken: their return leads into code that is not there any more where the vdso is
//! led elsewhere. The stop cannot see them (the thread is in the handler); the image's
//! stacks can be looked through.
//!
//! Before anything is done to a file; only where the vdso or the clocks are others now.

use super::check::CheckError;
use super::clocks;
use crate::image::PAGE;
use crate::image::chain::{self, Sourced};
use crate::image::state::Manifest;
use crate::store::RawFs;
use crate::store::find::FoundMember;
use crate::store::fs::FileOf;

/// Handlers' frames are looked for so far above a thread's stack pointer.
const MOST: u64 = 1 << 20;
/// From the return address of a handler, which the kernel's frame begins with, to the interrupted
/// instruction's.
const RIP: usize = 8 + 40 + 8 * libc::REG_RIP as usize;
const UC_RSP: u64 = 40 + 8 * libc::REG_RSP as u64;

/// Memory of an image; what is not in it is zero.
fn memory(
    member: &FoundMember<RawFs>,
    pieces: &[Sourced],
    start: u64,
    len: u64,
) -> Option<Vec<u8>> {
    let mut bytes = vec![0; len as usize];
    let mut at = start;
    while at < start + len {
        let end = (at / PAGE + 1).checked_mul(PAGE)?.min(start + len);
        if let Some(piece) = chain::piece_at(pieces, at) {
            let (file, image) = member.chain().nth(piece.file as usize)?;
            let into = &mut bytes[(at - start) as usize..(end - start) as usize];
            let offset = piece.offset + (at - piece.addr);
            image
                .blocks()
                .read(&FileOf(&RawFs, file), into, offset)
                .ok()?;
        }
        at = end;
    }
    Some(bytes)
}

/// Is this an instruction of the vdso, or of what has taken its place?
fn is_amid(manifest: &Manifest, rip: u64) -> bool {
    let own = ckpt_sys::clock::gettime_end() - ckpt_sys::clock::gettime();
    let clock = &manifest.clock;
    let (start, end) = clocks::taken(manifest);
    (start..end).contains(&rip)
        || (manifest.memory.vdso_start..manifest.memory.vdso_end).contains(&rip)
        || (clock.gettime..clock.gettime + own).contains(&rip)
}

/// The interrupted instructions of the handlers whose frames lie in `stack`.
fn interrupted(stack: &[u8], sigreturn: u64) -> impl Iterator<Item = u64> {
    let word = |at: usize| {
        let bytes = stack.get(at..at + 8)?;
        bytes.first_chunk().map(|word| u64::from_le_bytes(*word))
    };
    (0..stack.len() / 8)
        .map(|k| 8 * k)
        .filter(move |&at| word(at) == Some(sigreturn))
        .filter_map(move |at| word(at + RIP))
}

/// Refuses a generation in which a handler would return into a vdso that is not there.
pub fn check(member: &FoundMember<RawFs>) -> Result<(), CheckError> {
    let manifest = &member.image.manifest;
    let decision = clocks::decide(manifest)?;
    let same = decision.lead.is_none() && decision.offsets[..] == manifest.clock.offsets[..];
    if same || manifest.clock.sigreturn == 0 {
        return Ok(());
    }
    // A damaged chain is found, and told, by the restore itself.
    let Ok(pieces) = member.compose() else {
        return Ok(());
    };
    for thread in &manifest.threads {
        let rsp = memory(member, &pieces, thread.ucontext + UC_RSP, 8);
        let rsp = rsp.and_then(|word| word.first_chunk().map(|word| u64::from_le_bytes(*word)));
        let Some(rsp) = rsp else { continue };
        let mut vmas = manifest.memory.vmas.iter();
        let Some(vma) = vmas.find(|vma| (vma.start..vma.end).contains(&rsp)) else {
            continue;
        };
        let start = rsp & !7;
        let stack = memory(member, &pieces, start, (vma.end - start).min(MOST));
        let stack = stack.unwrap_or_default();
        if interrupted(&stack, manifest.clock.sigreturn).any(|rip| is_amid(manifest, rip)) {
            return Err(CheckError::Amid);
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_found_on_a_stack() {
        let mut stack = vec![0u8; 1024];
        let mut put = |at: usize, word: u64| stack[at..at + 8].copy_from_slice(&word.to_le_bytes());
        put(64, 0xabc);
        put(64 + 176, 0x1234);
        // One whose frame is cut off.
        put(1000, 0xabc);
        assert_eq!(interrupted(&stack, 0xabc).collect::<Vec<_>>(), [0x1234]);
        assert_eq!(RIP, 176);
    }
}
