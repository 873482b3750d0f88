//! Finds the `syscall` instructions of a library and decides how each can be patched.
//!
//! Only functions that contain the bytes `0f 05` are decoded, from one unwind
//! entry's start to the next one's, so decoding never loses the instruction
//! boundaries. On any doubt a site is left alone, with the reason.
//!
//! Runs in the constructor, and only when there is no cached copy.

use super::object::Object;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, OpAccess,
    OpKind, Register,
};

/// How a site is patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// `mov $number, %eax` directly before the `syscall`: only the `mov` is replaced.
    Immediate = 0,
    /// Five or more bytes of movable instructions before the `syscall` go to the slot.
    Window = 1,
    /// The `syscall` itself and what follows it go to the slot. Only while there is one
    /// thread: another one may be in the middle of the call.
    Forward = 2,
}

/// Why a site is not patched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum LeftAlone {
    /// rt_sigreturn: unwinders know its bytes.
    SignalReturn,
    /// The call is in nobody's interest.
    NotWanted,
    /// No movable instructions around it.
    NoWindow,
    /// Something jumps into the instructions that would be moved.
    JumpTarget,
    /// The function jumps to computed addresses.
    ComputedJump,
    /// The slot cannot hold the moved instructions.
    TooLong,
    /// Not within an unwind entry, or not on an instruction boundary.
    Unknown,
    /// Other threads are running and might be in the middle of it.
    OtherThreads,
    /// The bytes in memory are not those expected.
    Changed,
}

impl LeftAlone {
    pub const ALL: [LeftAlone; 9] = [
        LeftAlone::SignalReturn,
        LeftAlone::NotWanted,
        LeftAlone::NoWindow,
        LeftAlone::JumpTarget,
        LeftAlone::ComputedJump,
        LeftAlone::TooLong,
        LeftAlone::Unknown,
        LeftAlone::OtherThreads,
        LeftAlone::Changed,
    ];

    pub fn reason(self) -> &'static str {
        match self {
            LeftAlone::SignalReturn => "the signal restorer",
            LeftAlone::NotWanted => "a call of no interest",
            LeftAlone::NoWindow => "no movable instructions",
            LeftAlone::JumpTarget => "jumped into",
            LeftAlone::ComputedJump => "computed jumps in the function",
            LeftAlone::TooLong => "too long for a slot",
            LeftAlone::Unknown => "not understood",
            LeftAlone::OtherThreads => "other threads were running",
            LeftAlone::Changed => "unexpected bytes",
        }
    }
}

/// A patchable site; addresses are those of the object's memory.
#[derive(Debug, Clone)]
pub struct Site {
    pub syscall: usize,
    /// The call's number where the code says it.
    pub number: Option<u16>,
    pub kind: Kind,
    /// The bytes that the jump replaces.
    pub start: usize,
    pub end: usize,
}

#[derive(Debug, Default)]
pub struct Found {
    pub sites: Vec<Site>,
    pub left_alone: Vec<(usize, LeftAlone)>,
}

/// Analyses `object`. `wanted` says which numbers matter.
pub fn find(object: &Object, wanted: fn(i64) -> bool) -> Found {
    let code = object.code();
    let mut found = Found::default();
    let hits = find_bytes(code, object.text);
    let functions = Functions::of(object);
    let mut done_up_to = 0;
    for &hit in &hits {
        if hit < done_up_to {
            continue;
        }
        let Some((start, end)) = functions.as_ref().and_then(|table| table.around(hit)) else {
            found.left_alone.push((hit, LeftAlone::Unknown));
            continue;
        };
        // glibc's __restore_rt begins its unwind entry one byte early.
        let before = &code[..hit - object.text];
        if before.ends_with(&[0x48, 0xc7, 0xc0, 15, 0, 0, 0]) {
            found.left_alone.push((hit, LeftAlone::SignalReturn));
            continue;
        }
        let end = end.min(object.text + object.text_len);
        done_up_to = end;
        Function::decode(&code[start - object.text..end - object.text], start)
            .find_sites(wanted, &mut found);
    }
    drop_jumped_into(code, object.text, &mut found);
    found
}

/// Addresses of the bytes `0f 05`, instructions or not.
fn find_bytes(code: &[u8], at: usize) -> Vec<usize> {
    let mut hits = Vec::new();
    let mut from = 0;
    while let Some(found) = code[from..].iter().position(|&byte| byte == 0x0f) {
        let index = from + found;
        if code.get(index + 1) == Some(&5) {
            hits.push(at + index);
        }
        from = index + 1;
    }
    hits
}

/// The sorted table of `.eh_frame_hdr`: where functions start.
struct Functions<'a> {
    /// Start and unwind entry, both relative to `header`.
    entries: &'a [[i32; 2]],
    header: usize,
}

impl Functions<'_> {
    fn of(object: &Object) -> Option<Functions<'_>> {
        if object.unwind_table == 0 {
            return None;
        }
        let header = object.unwind_table;
        // SAFETY: the library's unwind table is mapped for its lifetime, has this
        // layout for version 1 and these encodings (4-byte count; 4-byte pairs
        // relative to the table), and is 4-byte aligned.
        let entries = unsafe {
            let head = (header as *const [u8; 4]).read();
            if head[0] != 1 || head[2] != 0x03 || head[3] != 0x3b || !header.is_multiple_of(4) {
                return None;
            }
            let count = ((header + 8) as *const u32).read() as usize;
            std::slice::from_raw_parts((header + 12) as *const [i32; 2], count)
        };
        Some(Functions { entries, header })
    }

    /// The function around `address`: up to the next one's start, because clone's unwind
    /// entry ends before its `syscall`.
    fn around(&self, address: usize) -> Option<(usize, usize)> {
        const LONGEST: usize = 0x4000;
        let relative = address.wrapping_sub(self.header) as isize;
        let next = self
            .entries
            .partition_point(|entry| entry[0] as isize <= relative);
        let start = self
            .header
            .wrapping_add_signed(self.entries[next.checked_sub(1)?][0] as isize);
        let end = match self.entries.get(next) {
            Some(entry) => self.header.wrapping_add_signed(entry[0] as isize),
            None => address + 64,
        };
        (address - start < LONGEST).then_some((start, end.min(address + LONGEST)))
    }
}

/// One decoded function.
struct Function {
    instructions: Vec<Instruction>,
    /// Sorted targets of direct jumps, and code addresses that are computed.
    targets: Vec<usize>,
    computed_jump: bool,
}

impl Function {
    fn decode(code: &[u8], at: usize) -> Function {
        let decoder = Decoder::with_ip(64, code, at as u64, DecoderOptions::NONE);
        let instructions: Vec<Instruction> = decoder.into_iter().collect();
        let mut targets = Vec::new();
        let mut computed_jump = false;
        for instruction in &instructions {
            match instruction.flow_control() {
                FlowControl::IndirectBranch => computed_jump = true,
                FlowControl::Next | FlowControl::Return => {}
                _ if instruction.op_count() > 0
                    && instruction.op0_kind() == OpKind::NearBranch64 =>
                {
                    targets.push(instruction.near_branch64() as usize);
                }
                _ => {}
            }
            if instruction.is_ip_rel_memory_operand() {
                targets.push(instruction.ip_rel_memory_address() as usize);
            }
        }
        targets.sort_unstable();
        Function {
            instructions,
            targets,
            computed_jump,
        }
    }

    /// Does anything in this function jump to `from..to`?
    fn jumped_to(&self, from: usize, to: usize) -> bool {
        let first = self.targets.partition_point(|&target| target < from);
        self.targets.get(first).is_some_and(|&target| target < to)
    }

    fn find_sites(&self, wanted: fn(i64) -> bool, found: &mut Found) {
        for (index, instruction) in self.instructions.iter().enumerate() {
            if instruction.code() != Code::Syscall {
                continue;
            }
            let syscall = instruction.ip() as usize;
            let number = self.number(index);
            let verdict = if number == Some(libc::SYS_rt_sigreturn as u16) {
                Err(LeftAlone::SignalReturn)
            } else if number.is_some_and(|nr| !wanted(i64::from(nr))) {
                Err(LeftAlone::NotWanted)
            } else {
                self.kind(index)
            };
            match verdict {
                Ok((kind, start, end)) => found.sites.push(Site {
                    syscall,
                    number,
                    kind,
                    start,
                    end,
                }),
                Err(why) => found.left_alone.push((syscall, why)),
            }
        }
    }

    /// The number in %eax at the `syscall` at `index`, where the straight line before it
    /// says so.
    fn number(&self, index: usize) -> Option<u16> {
        let mut info = InstructionInfoFactory::new();
        let syscall = self.instructions[index].ip() as usize;
        if self.jumped_to(syscall, syscall + 1) {
            return None;
        }
        for instruction in self.instructions[..index].iter().rev().take(24) {
            let in_eax = instruction.op_count() > 0 && instruction.op0_register() == Register::EAX;
            match instruction.code() {
                Code::Mov_r32_imm32 if in_eax => {
                    return u16::try_from(instruction.immediate32()).ok();
                }
                Code::Mov_rm64_imm32 if instruction.op0_register() == Register::RAX => {
                    return u16::try_from(instruction.immediate32to64()).ok();
                }
                Code::Xor_r32_rm32 | Code::Xor_rm32_r32
                    if in_eax && instruction.op1_register() == Register::EAX =>
                {
                    return Some(0);
                }
                Code::Syscall => return None,
                _ => {}
            }
            let passes_through = matches!(
                instruction.flow_control(),
                FlowControl::Next | FlowControl::ConditionalBranch
            );
            if !passes_through || writes(&mut info, instruction, Register::RAX) {
                return None;
            }
            let at = instruction.ip() as usize;
            if self.jumped_to(at, at + 1) {
                return None;
            }
        }
        None
    }

    /// How the `syscall` at `index` can be patched: kind and replaced bytes.
    fn kind(&self, index: usize) -> Result<(Kind, usize, usize), LeftAlone> {
        let syscall = self.instructions[index].ip() as usize;
        if let Some(before) = index.checked_sub(1).map(|i| &self.instructions[i])
            && before.code() == Code::Mov_r32_imm32
            && before.op0_register() == Register::EAX
            && before.len() == 5
            && !self.jumped_to(syscall - 4, syscall + 1)
        {
            return Ok((Kind::Immediate, syscall - 5, syscall));
        }
        match self.window_before(index) {
            Ok(start) => Ok((Kind::Window, start, syscall)),
            Err(why) => match self.window_behind(index) {
                Some(end) => Ok((Kind::Forward, syscall, end)),
                None => Err(why),
            },
        }
    }

    /// Start of at least five bytes of movable instructions before the `syscall`.
    fn window_before(&self, index: usize) -> Result<usize, LeftAlone> {
        let syscall = self.instructions[index].ip() as usize;
        let mut info = InstructionInfoFactory::new();
        for instruction in self.instructions[..index].iter().rev() {
            if !movable(&mut info, instruction) {
                return Err(LeftAlone::NoWindow);
            }
            let start = instruction.ip() as usize;
            if self.jumped_to(start + 1, syscall + 1) {
                return Err(LeftAlone::JumpTarget);
            }
            if syscall - start >= 5 {
                return if self.computed_jump {
                    Err(LeftAlone::ComputedJump)
                } else {
                    Ok(start)
                };
            }
        }
        Err(LeftAlone::NoWindow)
    }

    /// End of at least five bytes from the `syscall` on, if they can be moved.
    fn window_behind(&self, index: usize) -> Option<usize> {
        let syscall = self.instructions[index].ip() as usize;
        let mut info = InstructionInfoFactory::new();
        if self.computed_jump {
            return None;
        }
        for instruction in &self.instructions[index + 1..] {
            let end = instruction.next_ip() as usize;
            if !movable(&mut info, instruction) || self.jumped_to(syscall + 1, end) {
                return None;
            }
            if end - syscall >= 5 {
                return Some(end);
            }
        }
        None
    }
}

/// May the instruction run in a slot? It must not transfer control, and must not
/// change what unwinding at the site depends on.
fn movable(info: &mut InstructionInfoFactory, instruction: &Instruction) -> bool {
    instruction.flow_control() == FlowControl::Next
        && !instruction.is_invalid()
        && instruction.code() != Code::Syscall
        && !writes(info, instruction, Register::RSP)
        && !writes(info, instruction, Register::RBP)
        && !writes(info, instruction, Register::R11)
}

fn writes(
    info: &mut InstructionInfoFactory,
    instruction: &Instruction,
    register: Register,
) -> bool {
    info.info(instruction).used_registers().iter().any(|used| {
        used.register().full_register() == register
            && matches!(
                used.access(),
                OpAccess::Write
                    | OpAccess::ReadWrite
                    | OpAccess::CondWrite
                    | OpAccess::ReadCondWrite
            )
    })
}

/// Leaves alone the sites into whose replaced bytes something jumps from another
/// function (compilers put unlikely parts elsewhere). Every byte is taken for a
/// possible start of a jump: a false alarm costs one site.
fn drop_jumped_into(code: &[u8], at: usize, found: &mut Found) {
    found.sites.sort_by_key(|site| site.start);
    let mut jumped = vec![false; found.sites.len()];
    for index in 0..code.len().saturating_sub(6) {
        let operand = match code[index] {
            0xe8 | 0xe9 => index + 1,
            0x0f if code[index + 1] & 0xf0 == 0x80 => index + 2,
            _ => continue,
        };
        let mut relative = [0; 4];
        relative.copy_from_slice(&code[operand..operand + 4]);
        let target = (at + operand + 4).wrapping_add_signed(i32::from_le_bytes(relative) as isize);
        if target.wrapping_sub(at) >= code.len() {
            continue;
        }
        let next = found.sites.partition_point(|site| site.start < target);
        if let Some(before) = next.checked_sub(1)
            && target < found.sites[before].end
        {
            jumped[before] = true;
        }
    }
    let left_alone = &mut found.left_alone;
    let mut index = 0;
    found.sites.retain(|site| {
        index += 1;
        if jumped[index - 1] {
            left_alone.push((site.syscall, LeftAlone::JumpTarget));
        }
        !jumped[index - 1]
    });
}

/// What cached results depend on.
pub const SOURCE: &str = include_str!("analyse.rs");

#[cfg(test)]
mod tests {
    use super::super::{numbers, object};
    use super::*;

    #[test]
    fn nearly_all_sites_of_libc_can_be_patched() {
        let objects = object::loaded();
        let libc = objects
            .iter()
            .find(|object| object.name.ends_with("/libc.so.6"))
            .expect("libc is loaded");
        let found = find(libc, numbers::wanted);
        let doubtful = found
            .left_alone
            .iter()
            .filter(|(_, why)| !matches!(why, LeftAlone::NotWanted | LeftAlone::SignalReturn))
            .count();
        assert!(found.sites.len() > 200, "{} sites", found.sites.len());
        assert!(doubtful * 20 < found.sites.len(), "{:?}", found.left_alone);
        for call in [
            libc::SYS_write,
            libc::SYS_openat,
            libc::SYS_nanosleep,
            libc::SYS_execve,
        ] {
            let known = |site: &Site| site.number == u16::try_from(call).ok();
            assert!(
                found.sites.iter().any(known) || call == libc::SYS_nanosleep,
                "call {call}"
            );
        }
    }

    #[test]
    fn windows_never_overlap() {
        for object in object::loaded() {
            let found = find(&object, |_| true);
            for pair in found.sites.windows(2) {
                assert!(pair[0].end <= pair[1].start, "{pair:x?}");
            }
        }
    }

    fn kinds(code: &[u8]) -> (Vec<Kind>, Vec<LeftAlone>) {
        let mut found = Found::default();
        Function::decode(code, 0x1000).find_sites(|_| true, &mut found);
        (
            found.sites.iter().map(|site| site.kind).collect(),
            found.left_alone.iter().map(|&(_, why)| why).collect(),
        )
    }

    #[test]
    fn kinds_of_sites() {
        // mov $39, %eax; syscall; ret
        let immediate = [0xb8, 39, 0, 0, 0, 0x0f, 0x05, 0xc3];
        assert_eq!(kinds(&immediate), (vec![Kind::Immediate], vec![]));
        // mov %rdi, %rax; mov %rsi, %rdi; syscall; ret
        let window = [0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0x0f, 0x05, 0xc3];
        assert_eq!(kinds(&window), (vec![Kind::Window], vec![]));
        // The same, with a jump to the second `mov` in front.
        let jumped = [
            0x74, 3, 0x48, 0x89, 0xf8, 0x48, 0x89, 0xf7, 0x0f, 0x05, 0xc3,
        ];
        assert_eq!(kinds(&jumped), (vec![], vec![LeftAlone::JumpTarget]));
        // push %rbx moves the stack pointer; xor %eax, %eax is too short.
        let short = [0x53, 0x31, 0xc0, 0x0f, 0x05, 0x5b, 0xc3];
        assert_eq!(kinds(&short), (vec![], vec![LeftAlone::NoWindow]));
        // xor %eax, %eax; syscall; cmp $-4096, %rax; ja
        let forward = [
            0x53, 0x31, 0xc0, 0x0f, 0x05, 0x48, 0x3d, 0, 0xf0, 0xff, 0xff, 0x77, 1,
        ];
        assert_eq!(kinds(&forward), (vec![Kind::Forward], vec![]));
        // mov $15, %rax; syscall
        let restorer = [0x48, 0xc7, 0xc0, 15, 0, 0, 0, 0x0f, 0x05];
        assert_eq!(kinds(&restorer), (vec![], vec![LeftAlone::SignalReturn]));
    }
}
