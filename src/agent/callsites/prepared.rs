//! What is prepared for one library: its slots and the table of its sites, in the
//! very layout in which a cached copy is mapped.
//!
//! ```text
//! Header | SiteEntry...        whole pages  (the head)
//! slots                        whole pages
//! text, patched                whole pages  (only in a cached copy)
//! ```
//!
//! Head and slots are mapped together, at [`place`]: nothing in them depends on where
//! the library is, only on the distance between the two. The page behind them
//! holds the address of stage 1, the one thing that differs from process to process.

use super::analyse::{Found, Kind, LeftAlone, Site};
use super::object::Object;
use ckpt_sys::callsite::{HOLE_SPAN, SLOT_DATA, SLOT_SIZE};
use iced_x86::{BlockEncoder, BlockEncoderOptions, Decoder, DecoderOptions, InstructionBlock};

pub const PAGE: usize = 4096;

/// First in a cached copy. All fields are little-endian machine words.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct Header {
    pub magic: [u8; 8],
    /// [`format_id`]: changes with every change of the code that makes and uses copies.
    pub format: u64,
    pub build_id: [u8; 32],
    /// Address of the head minus the library's base.
    pub distance: i64,
    /// Start of the text's pages, relative to the base, and their length.
    pub text_start: u64,
    pub text_len: u64,
    pub sites: u32,
    pub head_len: u32,
    pub slots_len: u32,
    /// Sites left alone, by [`LeftAlone`].
    pub left_alone: [u16; 9],
    pub pad: [u16; 1],
    /// xxh3 of the patched text.
    pub text_sum: u64,
    /// [`head_sum`]. The last field.
    pub head_sum: u64,
}

/// xxh3 of a head and its slots, but for the header's last field.
pub fn head_sum(bytes: &[u8]) -> u64 {
    use xxhash_rust::xxh3::xxh3_64;
    const END: usize = size_of::<Header>();
    xxh3_64(&bytes[..END - 8]) ^ xxh3_64(&bytes[END..])
}

pub const MAGIC: [u8; 8] = *b"CKPTNET\x01";

/// One patched site; the table is sorted by `after`.
#[repr(C)]
#[derive(Debug, Clone, Copy)]
pub struct SiteEntry {
    /// Address behind the `syscall` that is executed, relative to the base.
    pub after: i64,
    /// The bytes replaced, relative to the base.
    pub start: u32,
    pub slot: u16,
    /// The call's number, -1 where only %eax tells.
    pub number: i16,
    pub len: u8,
    pub kind: u8,
    pub pad: [u8; 6],
}

impl SiteEntry {
    /// The bytes that go to `start`: a jump to the slot, then filler that is never run.
    pub fn patch(&self, header: &Header) -> [u8; 24] {
        let mut bytes = [0x90; 24];
        let slot =
            header.distance + i64::from(header.head_len) + i64::from(self.slot) * SLOT_SIZE as i64;
        let relative = (slot - (i64::from(self.start) + 5)) as i32;
        bytes[0] = 0xe9;
        bytes[1..5].copy_from_slice(&relative.to_le_bytes());
        bytes
    }

    pub fn is(&self, kind: Kind) -> bool {
        self.kind == kind as u8
    }
}

/// The place for the head of a library loaded at `base`: the address in the hole from
/// `hole` on that lies a multiple of HOLE_SPAN away from it. `None`: too far for a
/// 32-bit jump.
pub fn place(base: usize, hole: usize) -> Option<usize> {
    let place = hole + base.wrapping_sub(hole) % HOLE_SPAN;
    within_jump(base, place).then_some(place)
}

pub fn within_jump(base: usize, place: usize) -> bool {
    // 64 MiB for the library and the slots themselves.
    base.abs_diff(place) < (1 << 31) - (64 << 20)
}

/// Identifies this build of the net: FNV-1a over the sources that matter.
pub fn format_id() -> u64 {
    const ID: u64 = {
        let sources = [
            ckpt_sys::callsite::SOURCE,
            super::analyse::SOURCE,
            super::numbers::SOURCE,
            include_str!("prepared.rs"),
            env!("CARGO_PKG_VERSION"),
        ];
        let mut hash = 0xcbf2_9ce4_8422_2325_u64;
        let mut index = 0;
        while index < sources.len() {
            let bytes = sources[index].as_bytes();
            let mut at = 0;
            while at < bytes.len() {
                hash = (hash ^ bytes[at] as u64).wrapping_mul(0x100_0000_01b3);
                at += 1;
            }
            index += 1;
        }
        hash
    };
    ID
}

/// Head and slots in memory that is not at its place yet.
pub struct Prepared {
    pub header: Header,
    pub sites: Vec<SiteEntry>,
    /// Whole pages: head, then slots.
    pub bytes: Vec<u8>,
}

/// Makes the slots for the sites found, for a head at `place`.
pub fn prepare(object: &Object, found: &Found, place: usize) -> Prepared {
    let mut left_alone = [0_u16; 9];
    let mut leave = |why: LeftAlone| left_alone[why as usize] += 1;
    found.left_alone.iter().for_each(|&(_, why)| leave(why));

    let round = |len: usize| len.next_multiple_of(PAGE);
    let head_len = round(size_of::<Header>() + found.sites.len() * size_of::<SiteEntry>());
    let slots_len = round(found.sites.len() * SLOT_SIZE);
    let slots = place + head_len;
    let mut bytes = vec![0_u8; head_len + slots_len];
    let mut sites = Vec::with_capacity(found.sites.len());
    for site in &found.sites {
        let index = sites.len();
        let at = slots + index * SLOT_SIZE;
        let Some(slot) = encode(object, site, at, slots + slots_len) else {
            leave(LeftAlone::TooLong);
            continue;
        };
        bytes[head_len + index * SLOT_SIZE..][..SLOT_SIZE].copy_from_slice(&slot.bytes);
        sites.push(SiteEntry {
            after: slot.after.wrapping_sub(object.base) as i64,
            start: (site.start - object.base) as u32,
            slot: index as u16,
            number: site.number.map_or(-1, |nr| nr as i16),
            len: (site.end - site.start) as u8,
            kind: site.kind as u8,
            pad: [0; 6],
        });
    }
    sites.sort_by_key(|site| site.after);

    let (text, text_len) = object.text_pages();
    let mut build_id = [0; 32];
    let known = object.build_id.len().min(32);
    build_id[..known].copy_from_slice(&object.build_id[..known]);
    let mut prepared = Prepared {
        header: Header {
            magic: MAGIC,
            format: format_id(),
            build_id,
            distance: place.wrapping_sub(object.base) as i64,
            text_start: (text - object.base) as u64,
            text_len: text_len as u64,
            sites: sites.len() as u32,
            head_len: head_len as u32,
            slots_len: slots_len as u32,
            left_alone,
            pad: [0],
            text_sum: 0,
            head_sum: 0,
        },
        sites,
        bytes,
    };
    prepared.write_head();
    prepared
}

impl Prepared {
    /// Writes header and table into the bytes.
    pub fn write_head(&mut self) {
        let end = size_of::<Header>();
        // SAFETY: both are plain machine words without padding.
        let (header, table) = unsafe {
            (
                std::slice::from_raw_parts((&raw const self.header).cast::<u8>(), end),
                std::slice::from_raw_parts(
                    self.sites.as_ptr().cast::<u8>(),
                    size_of_val(self.sites.as_slice()),
                ),
            )
        };
        self.bytes[..end].copy_from_slice(header);
        self.bytes[end..end + table.len()].copy_from_slice(table);
        self.header.head_sum = head_sum(&self.bytes);
        self.bytes[end - 8..end].copy_from_slice(&self.header.head_sum.to_le_bytes());
    }

    /// The text's pages with every site patched.
    pub fn patched_text(&self, object: &Object) -> Vec<u8> {
        let (start, len) = object.text_pages();
        // SAFETY: whole pages of a mapped segment.
        let mut text = unsafe { std::slice::from_raw_parts(start as *const u8, len) }.to_vec();
        for site in &self.sites {
            let at = object.base + site.start as usize - start;
            let len = usize::from(site.len);
            text[at..at + len].copy_from_slice(&site.patch(&self.header)[..len]);
        }
        text
    }
}

struct Slot {
    bytes: [u8; SLOT_SIZE],
    after: usize,
}

/// The slot of one site, for address `at`; `pointer` is where stage 1's address will be.
fn encode(object: &Object, site: &Site, at: usize, pointer: usize) -> Option<Slot> {
    let data = at + SLOT_DATA;
    let mut code = match site.kind {
        Kind::Window => moved(object, site.start, site.end, at)?,
        Kind::Immediate | Kind::Forward => Vec::new(),
    };
    let relative = |to: usize, next: usize| (to.wrapping_sub(next) as i32).to_le_bytes();
    // lea data(%rip), %r11
    code.extend([0x4c, 0x8d, 0x1d]);
    code.extend(relative(data, at + code.len() + 4));
    // jmp *pointer(%rip)
    code.extend([0xff, 0x25]);
    code.extend(relative(pointer, at + code.len() + 4));
    let (mut resume, mut unwind) = (site.syscall, site.syscall);
    if site.kind == Kind::Forward {
        (resume, unwind) = (at + code.len(), site.end);
        code.extend([0x0f, 0x05]);
        code.extend(moved(object, site.syscall + 2, site.end, at + code.len())?);
        // jmp back
        code.push(0xe9);
        code.extend(relative(site.end, at + code.len() + 4));
    }
    if code.len() > SLOT_DATA {
        return None;
    }
    let mut bytes = [0xcc; SLOT_SIZE];
    bytes[..code.len()].copy_from_slice(&code);
    let number = match site.kind {
        Kind::Immediate => site.number.map_or(-1, i32::from),
        Kind::Window | Kind::Forward => -1,
    };
    let offset = |to: usize| (to.wrapping_sub(data) as i64).to_le_bytes();
    bytes[SLOT_DATA..][..8].copy_from_slice(&offset(resume));
    bytes[SLOT_DATA + 8..][..8].copy_from_slice(&offset(unwind));
    bytes[SLOT_DATA + 16..][..4].copy_from_slice(&number.to_le_bytes());
    bytes[SLOT_DATA + 20..][..4].copy_from_slice(&[0; 4]);
    bytes[SLOT_DATA + 24..][..8].copy_from_slice(&offset(resume + 2));
    Some(Slot {
        bytes,
        after: resume + 2,
    })
}

/// The instructions of `start..end`, encoded for `at`.
fn moved(object: &Object, start: usize, end: usize, at: usize) -> Option<Vec<u8>> {
    let code = object.code().get(start - object.text..end - object.text)?;
    if code.is_empty() {
        return Some(Vec::new());
    }
    let instructions: Vec<_> = Decoder::with_ip(64, code, start as u64, DecoderOptions::NONE)
        .into_iter()
        .collect();
    let block = InstructionBlock::new(&instructions, at as u64);
    BlockEncoder::encode(64, block, BlockEncoderOptions::NONE)
        .ok()
        .map(|result| result.code_buffer)
}
