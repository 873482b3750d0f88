//! Where a function of the vdso will return to: the vdso's own unwind information (.eh_frame),
//! interpreted as far as it is needed for that: the frame's address, and the caller's %rbp.
//!
//! Pure code over bytes, without memory of its own: it runs in the stop handler.

use super::{u16_at, u32_at, u64_at};

/// Registers of interest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Frame {
    pub rip: u64,
    pub rsp: u64,
    pub rbp: u64,
}

const RBP: u64 = 6;
const RSP: u64 = 7;

/// What holds at one instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    register: u64,
    offset: i64,
    /// Where the caller's %rbp was put, from the frame's address.
    rbp: Option<i64>,
}

/// A reader that ends at the first thing that it does not know.
struct Bytes<'a> {
    all: &'a [u8],
    at: u64,
    end: u64,
}

impl Bytes<'_> {
    fn byte(&mut self) -> Option<u8> {
        if self.at >= self.end {
            return None;
        }
        let byte = *self.all.get(usize::try_from(self.at).ok()?)?;
        self.at += 1;
        Some(byte)
    }

    fn word(&mut self, len: u64) -> Option<u64> {
        let mut value = 0;
        for k in 0..len {
            value |= u64::from(self.byte()?) << (8 * k);
        }
        Some(value)
    }

    fn unsigned(&mut self) -> Option<u64> {
        let (mut value, mut shift) = (0u64, 0);
        loop {
            let byte = self.byte()?;
            value |= u64::from(byte & 0x7f).checked_shl(shift)?;
            if byte & 0x80 == 0 {
                return Some(value);
            }
            shift += 7;
        }
    }

    fn signed(&mut self) -> Option<i64> {
        let (mut value, mut shift) = (0i64, 0u32);
        loop {
            let byte = self.byte()?;
            value |= i64::from(byte & 0x7f).checked_shl(shift)?;
            shift += 7;
            if byte & 0x80 == 0 {
                let negative = byte & 0x40 != 0 && shift < 64;
                return Some(if negative {
                    value | (-1 << shift)
                } else {
                    value
                });
            }
        }
    }
}

/// A common information entry.
struct Common {
    code: u64,
    data: i64,
    /// Of its instructions.
    start: u64,
    end: u64,
}

/// Only the kind that compilers make for the vdso: "zR" with 4-byte relative addresses.
fn common(elf: &[u8], at: u64) -> Option<Common> {
    let len = u32_at(elf, at)?;
    let end = at.checked_add(4)?.checked_add(len)?;
    let mut bytes = Bytes {
        all: elf,
        at: at + 4,
        end,
    };
    const AUGMENTATION: u64 = u64::from_le_bytes(*b"zR\0\0\0\0\0\0");
    if (bytes.word(4)?, bytes.byte()?, bytes.word(3)?) != (0, 1, AUGMENTATION) {
        return None;
    }
    let (code, data) = (bytes.unsigned()?, bytes.signed()?);
    let (_register, _len, encoding) = (bytes.byte()?, bytes.unsigned()?, bytes.byte()?);
    (encoding == 0x1b).then_some(Common {
        code,
        data,
        start: bytes.at,
        end,
    })
}

/// Address in the file of .eh_frame.
fn eh_frame(elf: &[u8]) -> Option<u64> {
    const PT_GNU_EH_FRAME: u64 = 0x6474_e550;
    let (headers, size, count) = (u64_at(elf, 32)?, u16_at(elf, 54)?, u16_at(elf, 56)?);
    for k in 0..count {
        let at = headers.checked_add(k * size)?;
        if u32_at(elf, at)? == PT_GNU_EH_FRAME {
            let header = u64_at(elf, at.checked_add(8)?)?;
            // Version 1, a 4-byte relative pointer.
            let kind = u16_at(elf, header)?;
            let pointer = u32_at(elf, header.checked_add(4)?)? as i32;
            return (kind == 0x1b01).then(|| (header + 4).wrapping_add_signed(i64::from(pointer)));
        }
    }
    None
}

/// What holds at this place of the code (from the start of the file).
fn row(elf: &[u8], place: u64) -> Option<Row> {
    let mut at = eh_frame(elf)?;
    loop {
        let len = u32_at(elf, at)?;
        if len == 0 || len >= 0xffff_fff0 {
            return None;
        }
        let end = at.checked_add(4)?.checked_add(len)?;
        let back = u32_at(elf, at + 4)?;
        if back != 0 {
            let pointer = u32_at(elf, at + 8)? as i32;
            let start = (at + 8).wrapping_add_signed(i64::from(pointer));
            let range = u32_at(elf, at + 12)?;
            if (start..start.checked_add(range)?).contains(&place) {
                let common = common(elf, (at + 4).checked_sub(back)?)?;
                let mut row = Row {
                    register: RSP,
                    offset: 8,
                    rbp: None,
                };
                run(elf, common.start, common.end, &common, None, &mut row)?;
                let mut bytes = Bytes {
                    all: elf,
                    at: at + 16,
                    end,
                };
                let augmentation = bytes.unsigned()?;
                let first = bytes.at.checked_add(augmentation)?;
                run(elf, first, end, &common, Some((start, place)), &mut row)?;
                return Some(row);
            }
        }
        at = end;
    }
}

/// Carries out instructions; with `until` (where the code begins, the place) those for the place.
fn run(
    elf: &[u8],
    start: u64,
    end: u64,
    common: &Common,
    until: Option<(u64, u64)>,
    row: &mut Row,
) -> Option<()> {
    let initial = *row;
    let mut kept = [initial; 4];
    let mut depth = 0;
    let mut here = until.map_or(0, |(start, _)| start);
    let mut bytes = Bytes {
        all: elf,
        at: start,
        end,
    };
    while bytes.at < end {
        let op = bytes.byte()?;
        let low = u64::from(op & 0x3f);
        let advance = match op >> 6 {
            1 => Some(low),
            2 => {
                let offset = (bytes.unsigned()? as i64).checked_mul(common.data)?;
                if low == RBP {
                    row.rbp = Some(offset);
                }
                None
            }
            3 => {
                if low == RBP {
                    row.rbp = initial.rbp;
                }
                None
            }
            _ => match op {
                0x00 => None,
                0x02 => Some(bytes.word(1)?),
                0x03 => Some(bytes.word(2)?),
                0x04 => Some(bytes.word(4)?),
                // Remember and restore the state.
                0x0a => {
                    *kept.get_mut(depth)? = *row;
                    depth += 1;
                    None
                }
                0x0b => {
                    depth = depth.checked_sub(1)?;
                    *row = kept[depth];
                    None
                }
                0x0c => {
                    row.register = bytes.unsigned()?;
                    row.offset = bytes.unsigned()? as i64;
                    None
                }
                0x0d => {
                    row.register = bytes.unsigned()?;
                    None
                }
                0x0e => {
                    row.offset = bytes.unsigned()? as i64;
                    None
                }
                // Same value; the size of arguments.
                0x08 | 0x2e => {
                    bytes.unsigned()?;
                    None
                }
                _ => return None,
            },
        };
        if let (Some(step), Some((_, place))) = (advance, until) {
            here = here.checked_add(step.checked_mul(common.code)?)?;
            if here > place {
                return Some(());
            }
        }
    }
    Some(())
}

/// Where the return address of this frame lies, and the caller's frame but for its `rip`. `elf`:
/// the vdso, which begins at `base`; `read` a word of the stack.
pub fn caller(
    elf: &[u8],
    base: u64,
    frame: Frame,
    read: impl Fn(u64) -> u64,
) -> Option<(u64, Frame)> {
    let row = row(elf, frame.rip.checked_sub(base)?)?;
    let register = match row.register {
        RSP => frame.rsp,
        RBP => frame.rbp,
        _ => return None,
    };
    let address = register.checked_add_signed(row.offset)?;
    // A frame grows downwards, and these are small.
    if address <= frame.rsp || address - frame.rsp > 4096 || !address.is_multiple_of(8) {
        return None;
    }
    let rbp = match row.rbp {
        Some(offset) => read(address.checked_add_signed(offset)?),
        None => frame.rbp,
    };
    let slot = address - 8;
    let frame = Frame {
        rip: read(slot),
        rsp: address,
        rbp,
    };
    Some((slot, frame))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::agent::clock;
    use crate::agent::vdso::functions;

    fn own() -> &'static [u8] {
        let (start, end) = clock::kernel_vdso();
        // SAFETY: the kernel's mapping, never removed.
        unsafe { std::slice::from_raw_parts(start as *const u8, (end - start) as usize) }
    }

    #[test]
    fn every_function_has_its_beginning() {
        let elf = own();
        for f in functions(elf).unwrap() {
            let found = row(elf, f.at).unwrap_or_else(|| panic!("{}", f.name));
            assert_eq!(
                (found.register, found.offset, found.rbp),
                (RSP, 8, None),
                "{}",
                f.name
            );
            for at in f.at..f.at + f.size {
                let row = row(elf, at).unwrap_or_else(|| panic!("{} {at:#x}", f.name));
                assert!(row.register == RSP || row.register == RBP);
                assert!((8..=256).contains(&row.offset));
            }
        }
        assert_eq!(row(elf, 0), None);
    }

    #[test]
    fn the_return_address_is_found() {
        let elf = own();
        let gettime = functions(elf).unwrap();
        let gettime = gettime.iter().find(|f| f.name == "clock_gettime").unwrap();
        let (base, top) = (0x1000_0000u64, 0x7fff_0000u64);
        let at = |rip, rsp| Frame {
            rip: base + rip,
            rsp,
            rbp: 77,
        };
        // At its first instruction.
        let (slot, caller_frame) = caller(elf, base, at(gettime.at, top), |word| word + 1).unwrap();
        assert_eq!(slot, top);
        assert_eq!(
            (caller_frame.rip, caller_frame.rsp, caller_frame.rbp),
            (top + 1, top + 8, 77)
        );
        // Behind `push %rbp`, which is how it begins here; else there is nothing to see.
        if elf[gettime.at as usize] == 0x55 {
            let (slot, caller_frame) =
                caller(elf, base, at(gettime.at + 1, top - 8), |word| word).unwrap();
            assert_eq!((slot, caller_frame.rbp), (top, top - 8));
        }
    }

    #[test]
    fn damaged_bytes_lead_nowhere_in_particular() {
        let elf = own();
        let mut seed = 0x9876_5432_1234_5671u64;
        for _ in 0..20_000 {
            seed ^= seed << 13;
            seed ^= seed >> 7;
            seed ^= seed << 17;
            let mut damaged = elf.to_vec();
            let at = (seed >> 20) as usize % 0x800;
            damaged[at..at + 2].copy_from_slice(&(seed as u16).to_le_bytes());
            for f in functions(elf).unwrap() {
                let _ = row(&damaged, f.at + seed % f.size);
            }
        }
        for len in (0..elf.len()).step_by(41) {
            let _ = row(&elf[..len], 0xb00);
        }
    }
}
