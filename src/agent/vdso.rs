//! A vdso as an ELF file: its functions, and a copy whose functions lead elsewhere.
//!
//! libc has the entry points of the vdso cached, in the program's memory. An image that is
//! restored under another kernel gets ordinary memory at the old vdso's place, with the old
//! content, and at the beginning of each function a jump to the running kernel's
//! function of that name; where it has none, the system call ([`lead`]). At a call of C %rax
//! is free, and no function is entered but at its beginning.
//!
//! Pure code over bytes that may be damaged. Constructor of the new process, `super::clock`.

pub mod frames;

use std::collections::BTreeMap;

/// Why a vdso cannot be led elsewhere.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum VdsoError {
    #[error("it is not an ELF file with symbols")]
    Elf,
    #[error("{name} has {room} bytes, not enough for a jump")]
    Room { name: String, room: u64 },
}

/// A function of a vdso.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Function {
    /// Without `__vdso_`.
    pub name: String,
    /// From the start of the vdso.
    pub at: u64,
    pub size: u64,
}

fn word<const N: usize>(bytes: &[u8], at: u64) -> Option<[u8; N]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..)?.first_chunk().copied()
}

fn u16_at(bytes: &[u8], at: u64) -> Option<u64> {
    word(bytes, at).map(|w| u64::from(u16::from_le_bytes(w)))
}

fn u32_at(bytes: &[u8], at: u64) -> Option<u64> {
    word(bytes, at).map(|w| u64::from(u32::from_le_bytes(w)))
}

fn u64_at(bytes: &[u8], at: u64) -> Option<u64> {
    word(bytes, at).map(u64::from_le_bytes)
}

/// Where the parts of the file are that a loaded vdso is known by.
struct Dynamic {
    /// Subtracted from an address gives the place in the bytes.
    bias: u64,
    symbols: u64,
    strings: u64,
    count: u64,
}

fn dynamic(elf: &[u8]) -> Option<Dynamic> {
    const PT_LOAD: u64 = 1;
    const PT_DYNAMIC: u64 = 2;
    if word(elf, 0)? != *b"\x7fELF\x02\x01" {
        return None;
    }
    let (headers, size, count) = (u64_at(elf, 32)?, u16_at(elf, 54)?, u16_at(elf, 56)?);
    let (mut bias, mut place) = (None, None);
    for k in 0..count {
        let at = headers.checked_add(k * size)?;
        let (offset, address) = (u64_at(elf, at.checked_add(8)?)?, u64_at(elf, at + 16)?);
        match u32_at(elf, at)? {
            PT_LOAD if bias.is_none() => bias = Some(address.checked_sub(offset)?),
            PT_DYNAMIC => place = Some(offset),
            _ => {}
        }
    }
    let (bias, mut at) = (bias?, place?);
    let (mut symbols, mut strings, mut hash) = (None, None, None);
    loop {
        let value = u64_at(elf, at.checked_add(8)?)?.checked_sub(bias);
        match u64_at(elf, at)? {
            0 => break,
            4 => hash = value,
            5 => strings = value,
            6 => symbols = value,
            _ => {}
        }
        at += 16;
    }
    let (symbols, strings) = (symbols?, strings?);
    let count = match hash {
        Some(hash) => u32_at(elf, hash.checked_add(4)?)?,
        // Only the other kind of table, which has no count: the strings lie behind.
        None => strings.checked_sub(symbols)? / 24,
    };
    Some(Dynamic {
        bias,
        symbols,
        strings,
        count,
    })
}

/// The functions, with all their names.
pub fn functions(elf: &[u8]) -> Result<Vec<Function>, VdsoError> {
    const STT_FUNC: u64 = 2;
    let read = || {
        let dynamic = dynamic(elf)?;
        let mut functions = Vec::new();
        for k in 1..dynamic.count.min(10_000) {
            let at = dynamic.symbols.checked_add(24 * k)?;
            let info = u64::from(*elf.get(usize::try_from(at).ok()? + 4)?);
            if info & 15 != STT_FUNC || u16_at(elf, at + 6)? == 0 {
                continue;
            }
            let name = dynamic.strings.checked_add(u32_at(elf, at)?)?;
            let name = elf.get(usize::try_from(name).ok()?..)?;
            let name = &name[..name.iter().position(|&b| b == 0)?];
            let name = name.strip_prefix(b"__vdso_").unwrap_or(name);
            functions.push(Function {
                name: String::from_utf8_lossy(name).into_owned(),
                at: u64_at(elf, at + 8)?.checked_sub(dynamic.bias)?,
                size: u64_at(elf, at + 16)?,
            });
        }
        Some(functions)
    };
    let found: Vec<Function> = read().ok_or(VdsoError::Elf)?;
    if found.is_empty() {
        return Err(VdsoError::Elf);
    }
    Ok(found)
}

/// Where the function of this name begins.
pub fn find(functions: &[Function], name: &str) -> Option<u64> {
    functions.iter().find(|f| f.name == name).map(|f| f.at)
}

/// The bytes that the vdso has in memory, a page at the least.
pub fn mapped_len(elf: &[u8]) -> Option<u64> {
    const PT_LOAD: u64 = 1;
    let (headers, size, count) = (u64_at(elf, 32)?, u16_at(elf, 54)?, u16_at(elf, 56)?);
    let mut end = 0u64;
    for k in 0..count {
        let at = headers.checked_add(k * size)?;
        if u32_at(elf, at)? == PT_LOAD {
            end = end.max(u64_at(elf, at + 16)?.checked_add(u64_at(elf, at + 40)?)?);
        }
    }
    (end > 0).then(|| end.next_multiple_of(4096))
}

/// `mov $target, %rax; jmp *%rax`
fn jump(target: u64) -> Vec<u8> {
    let mut code = vec![0x48, 0xb8];
    code.extend(target.to_le_bytes());
    code.extend([0xff, 0xe0]);
    code
}

/// `mov $number, %eax; syscall; ret`
fn system_call(number: i64) -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((number as u32).to_le_bytes());
    code.extend([0x0f, 0x05, 0xc3]);
    code
}

/// `mov $-ENOSYS, %eax; ret`
fn missing() -> Vec<u8> {
    let mut code = vec![0xb8];
    code.extend((-libc::ENOSYS).to_le_bytes());
    code.push(0xc3);
    code
}

/// getrandom with a state is getrandom: what the state means is the kernel's affair. The
/// question how large it must be (its length is -1) is not answered.
fn getrandom() -> Vec<u8> {
    let mut code = vec![0x49, 0x83, 0xf8, 0xff]; // cmp $-1, %r8
    let call = system_call(libc::SYS_getrandom);
    code.extend([0x74, call.len() as u8]); // je behind the call
    code.extend(call);
    code.extend(missing());
    code
}

fn number(name: &str) -> Option<i64> {
    Some(match name {
        "clock_gettime" => libc::SYS_clock_gettime,
        "gettimeofday" => libc::SYS_gettimeofday,
        "time" => libc::SYS_time,
        "getcpu" => libc::SYS_getcpu,
        "clock_getres" => libc::SYS_clock_getres,
        _ => return None,
    })
}

/// A copy of `elf` whose functions go to where `target` says that a function of that name is;
/// where it says nothing, to the kernel.
pub fn lead(elf: &[u8], target: impl Fn(&str) -> Option<u64>) -> Result<Vec<u8>, VdsoError> {
    let mut places: BTreeMap<u64, Vec<Function>> = BTreeMap::new();
    for function in functions(elf)? {
        places.entry(function.at).or_default().push(function);
    }
    let mut led = elf.to_vec();
    for (&at, names) in &places {
        let random = names.iter().any(|f| f.name == "getrandom");
        let there = names.iter().find_map(|f| target(&f.name));
        let code = match there {
            _ if random => getrandom(),
            Some(target) => jump(target),
            None => match names.iter().find_map(|f| number(&f.name)) {
                Some(number) => system_call(number),
                None => missing(),
            },
        };
        let next = places.range(at + 1..).next().map(|(&next, _)| next);
        let end = next.unwrap_or(elf.len() as u64).min(elf.len() as u64);
        let size = names.iter().map(|f| f.size).filter(|&size| size > 0).min();
        let room = end.saturating_sub(at).min(size.unwrap_or(u64::MAX));
        if room < code.len() as u64 {
            return Err(VdsoError::Room {
                name: names[0].name.clone(),
                room,
            });
        }
        let at = at as usize;
        led[at..at + code.len()].copy_from_slice(&code);
    }
    Ok(led)
}

#[cfg(test)]
mod tests;
