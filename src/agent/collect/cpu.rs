//! CPU features that an image may depend on.

use std::arch::x86_64::{__cpuid, __cpuid_count, _xgetbv};

/// Feature words: CPUID 1 (ecx, edx), 7.0 (ebx, ecx, edx), 7.1 (eax), 0x80000001
/// (ecx, edx), XCR0. A restore needs every bit that the image has.
pub fn features() -> Vec<u64> {
    let max = __cpuid(0).eax;
    let one = __cpuid(1);
    let (seven, seven1) = if max >= 7 {
        (__cpuid_count(7, 0), __cpuid_count(7, 1))
    } else {
        (__cpuid_count(0x8000_0000, 0), __cpuid_count(0x8000_0000, 0))
    };
    let ext = __cpuid(0x8000_0001);
    let mut words = vec![one.ecx as u64, one.edx as u64];
    if max >= 7 {
        words.extend([
            seven.ebx as u64,
            seven.ecx as u64,
            seven.edx as u64,
            seven1.eax as u64,
        ]);
    } else {
        words.extend([0; 4]);
    }
    words.extend([ext.ecx as u64, ext.edx as u64]);
    let has_xsave = one.ecx & (1 << 27) != 0;
    // SAFETY: OSXSAVE is set, so XGETBV is there.
    words.push(if has_xsave { unsafe { xcr0() } } else { 0 });
    words
}

#[target_feature(enable = "xsave")]
fn xcr0() -> u64 {
    // SAFETY: the caller has checked OSXSAVE.
    unsafe { _xgetbv(0) }
}

/// The first feature word in which `image` has bits that `here` lacks:
/// (index, missing bits).
pub fn missing(image: &[u64], here: &[u64]) -> Option<(usize, u64)> {
    image.iter().enumerate().find_map(|(k, &bits)| {
        let lacking = bits & !here.get(k).copied().unwrap_or(0);
        (lacking != 0).then_some((k, lacking))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_cpu_has_its_own_features() {
        let here = features();
        assert_eq!(missing(&here, &here), None);
        let mut more = here.clone();
        more[0] |= 1 << 40;
        assert_eq!(missing(&more, &here), Some((0, 1 << 40)));
    }
}
