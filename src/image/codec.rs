//! Structs to bytes and back: the only file that names bincode.
//!
//! Bytes decoded here have passed a checksum before, and are decoded under a
//! limit all the same: a damaged length must never become an allocation. Bytes
//! left over are an error.
//!
//! A manifest region is a run of *sections*, so that later versions can add to it:
//! `tag u32, version u32, length u64`, the payload, zeroes up to a multiple of 8.
//! A reader refuses a tag it does not know unless the tag has [`OPTIONAL`] set.

use super::PAGE;
use super::pack::Packed;
use super::places::Places;
use super::state::{Base, ClockState, Manifest, ObjectSpace, Privileges, Rare};
use serde::{Deserialize, Serialize, de::DeserializeOwned};

/// No manifest or record is larger.
pub const LIMIT: usize = 256 << 20;

/// Sections with this bit in their tag may be skipped by a reader that does not know them.
pub const OPTIONAL: u32 = 1 << 31;

/// The section that holds [`Manifest`].
const TAG_MANIFEST: u32 = 1;
/// Its version: goes up with every change of the structs in `state`.
pub const MANIFEST_VERSION: u32 = 1;

/// The section that makes an image an increment: [`Increment`]. It must be understood,
/// so a program that knows no increments refuses the image; a complete image has none,
/// and is read by that program as before.
const TAG_INCREMENT: u32 = 2;
const INCREMENT_VERSION: u32 = 1;

/// How compressed page data is packed: [`Packed`].
const TAG_PACKED: u32 = 3;
const PACKED_VERSION: u32 = 1;

/// Guard regions: runs as in [`Increment`]. It must be understood: without it a program would
/// go on where it must not.
const TAG_GUARDED: u32 = 4;
const GUARDED_VERSION: u32 = 1;

/// Where the pages lie, once more and in few bytes: [`Places`].
const TAG_PLACES: u32 = OPTIONAL | 5;
const PLACES_VERSION: u32 = 1;

/// What the process may do: [`Privileges`]. It must be understood: nothing of it may be lost.
const TAG_PRIVILEGES: u32 = 6;
const PRIVILEGES_VERSION: u32 = 1;

/// [`ClockState`]. A program that does not know it restores such an image where the vdso is
/// the same, and its clocks jump.
const TAG_CLOCK: u32 = OPTIONAL | 7;
const CLOCK_VERSION: u32 = 1;

/// Where the contents of objects lie: [`ObjectSpace`]. It must be understood: a program that
/// does not know it would restore them empty.
const TAG_OBJECTS: u32 = 8;
const OBJECTS_VERSION: u32 = 1;

/// `Manifest::cwd_object`: without it any directory of that name will do.
const TAG_CWD: u32 = OPTIONAL | 9;
const CWD_VERSION: u32 = 1;

/// What few programs ask of the kernel: [`Rare`]. It must be understood: a program that does not
/// know it would go on without.
const TAG_RARE: u32 = 10;
const RARE_VERSION: u32 = 1;

/// Runs of pages as the distance from the end of the run before, and the length, in pages.
fn gaps(runs: &[(u64, u64)]) -> Vec<(u64, u64)> {
    let mut end = 0;
    runs.iter()
        .map(|&(addr, npages)| {
            let page = addr / PAGE;
            let gap = page.wrapping_sub(end);
            end = page.wrapping_add(npages);
            (gap, npages)
        })
        .collect()
}

/// A run that leaves the address space is an error.
fn runs(gaps: &[(u64, u64)]) -> Result<Vec<(u64, u64)>, CodecError> {
    let mut end = 0u64;
    let mut runs = Vec::with_capacity(gaps.len());
    for &(gap, npages) in gaps {
        let page = end.checked_add(gap).ok_or(CodecError::Section)?;
        end = page.checked_add(npages).ok_or(CodecError::Section)?;
        if end > u64::MAX / PAGE {
            return Err(CodecError::Section);
        }
        runs.push((page * PAGE, npages));
    }
    Ok(runs)
}

/// What an increment has beside [`Manifest`].
#[derive(Serialize, Deserialize)]
struct Increment {
    base: Base,
    /// Distance from the end of the run before, and length, in pages.
    dropped: Vec<(u64, u64)>,
}

impl Increment {
    fn of(base: Base, dropped: &[(u64, u64)]) -> Increment {
        let dropped = gaps(dropped);
        Increment { base, dropped }
    }

    fn dropped(&self) -> Result<Vec<(u64, u64)>, CodecError> {
        runs(&self.dropped)
    }
}

const SECTION_HEAD: usize = 16;

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    #[error("cannot encode: {0}")]
    Encode(String),
    #[error("cannot decode: {0}")]
    Decode(String),
    #[error("{0} bytes left over after the last field")]
    Trailing(usize),
    #[error("a section does not end inside its region")]
    Section,
    #[error("section {tag} version {version} is not known to this program")]
    Unknown { tag: u32, version: u32 },
    #[error("the manifest is missing")]
    Missing,
}

fn config() -> impl bincode::config::Config {
    bincode::config::standard().with_limit::<LIMIT>()
}

/// Encodes a value.
pub fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>, CodecError> {
    bincode::serde::encode_to_vec(value, config()).map_err(|e| CodecError::Encode(e.to_string()))
}

/// Decodes a value that fills `bytes` exactly.
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = bincode::serde::decode_from_slice(bytes, config())
        .map_err(|e| CodecError::Decode(e.to_string()))?;
    if used != bytes.len() {
        return Err(CodecError::Trailing(bytes.len() - used));
    }
    Ok(value)
}

/// The manifest region of an image whose data is not compressed.
pub fn encode_manifest(manifest: &Manifest) -> Result<Vec<u8>, CodecError> {
    encode_region(manifest, None)
}

/// The manifest region of an image.
pub fn encode_region(manifest: &Manifest, packed: Option<&Packed>) -> Result<Vec<u8>, CodecError> {
    let payload = encode(manifest)?;
    let mut region = Vec::with_capacity(SECTION_HEAD + payload.len() + 8);
    push_section(&mut region, TAG_MANIFEST, MANIFEST_VERSION, &payload);
    if let Some(base) = manifest.memory.base {
        let payload = encode(&Increment::of(base, &manifest.memory.dropped))?;
        push_section(&mut region, TAG_INCREMENT, INCREMENT_VERSION, &payload);
    }
    if !manifest.memory.guarded.is_empty() {
        let payload = encode(&gaps(&manifest.memory.guarded))?;
        push_section(&mut region, TAG_GUARDED, GUARDED_VERSION, &payload);
    }
    if !manifest.memory.objects.is_empty() {
        let payload = encode(&manifest.memory.objects)?;
        push_section(&mut region, TAG_OBJECTS, OBJECTS_VERSION, &payload);
    }
    if manifest.privileges != Privileges::default() {
        let payload = encode(&manifest.privileges)?;
        push_section(&mut region, TAG_PRIVILEGES, PRIVILEGES_VERSION, &payload);
    }
    if manifest.clock != ClockState::default() {
        let payload = encode(&manifest.clock)?;
        push_section(&mut region, TAG_CLOCK, CLOCK_VERSION, &payload);
    }
    if manifest.cwd_object != (0, 0) {
        let payload = encode(&manifest.cwd_object)?;
        push_section(&mut region, TAG_CWD, CWD_VERSION, &payload);
    }
    if manifest.rare != Rare::default() {
        push_section(
            &mut region,
            TAG_RARE,
            RARE_VERSION,
            &encode(&manifest.rare)?,
        );
    }
    if let Some(packed) = packed {
        push_section(&mut region, TAG_PACKED, PACKED_VERSION, &encode(packed)?);
    }
    if let Some(places) = Places::of(&manifest.memory) {
        push_section(&mut region, TAG_PLACES, PLACES_VERSION, &encode(&places)?);
    }
    Ok(region)
}

fn push_section(region: &mut Vec<u8>, tag: u32, version: u32, payload: &[u8]) {
    region.extend_from_slice(&tag.to_le_bytes());
    region.extend_from_slice(&version.to_le_bytes());
    region.extend_from_slice(&(payload.len() as u64).to_le_bytes());
    region.extend_from_slice(payload);
    region.resize(region.len().next_multiple_of(8), 0);
}

/// Decodes a manifest region of an image whose data is not compressed.
pub fn decode_manifest(region: &[u8]) -> Result<Manifest, CodecError> {
    Ok(decode_region(region)?.0)
}

/// Decodes a manifest region.
pub fn decode_region(region: &[u8]) -> Result<(Manifest, Option<Packed>), CodecError> {
    Sections::split(region)?.decode()
}

/// Of an image that another one stands on only `memory` is wanted, and of that no more than
/// where its pages lie. An image of an earlier version says that in its manifest alone.
pub fn decode_base(region: &[u8]) -> Result<(Manifest, Option<Packed>), CodecError> {
    let mut sections = Sections::split(region)?;
    let Some(places) = sections.places.take() else {
        let (mut manifest, packed) = sections.decode()?;
        let places = Places::of(&manifest.memory).map(|places| places.memory());
        let (base, dropped) = (manifest.memory.base, manifest.memory.dropped);
        manifest = Manifest::default();
        manifest.memory = places.transpose()?.unwrap_or_default();
        (manifest.memory.base, manifest.memory.dropped) = (base, dropped);
        return Ok((manifest, packed));
    };
    if sections.manifest.is_none() {
        return Err(CodecError::Missing);
    }
    let memory = decode::<Places>(places)?.memory()?;
    let mut manifest = Manifest {
        memory,
        ..Manifest::default()
    };
    let packed = sections.rest(&mut manifest)?;
    Ok((manifest, packed))
}

/// The sections of a region that this program knows, not decoded.
#[derive(Default)]
struct Sections<'r> {
    manifest: Option<&'r [u8]>,
    increment: Option<&'r [u8]>,
    packed: Option<&'r [u8]>,
    guarded: Option<&'r [u8]>,
    places: Option<&'r [u8]>,
    privileges: Option<&'r [u8]>,
    clock: Option<&'r [u8]>,
    objects: Option<&'r [u8]>,
    cwd: Option<&'r [u8]>,
    rare: Option<&'r [u8]>,
}

impl<'r> Sections<'r> {
    fn split(region: &'r [u8]) -> Result<Sections<'r>, CodecError> {
        let mut sections = Sections::default();
        let mut rest = region;
        while !rest.is_empty() {
            let head = rest
                .first_chunk::<SECTION_HEAD>()
                .ok_or(CodecError::Section)?;
            let tag = u32::from_le_bytes([head[0], head[1], head[2], head[3]]);
            let version = u32::from_le_bytes([head[4], head[5], head[6], head[7]]);
            let len = u64::from_le_bytes([
                head[8], head[9], head[10], head[11], head[12], head[13], head[14], head[15],
            ]);
            let padded = usize::try_from(len)
                .ok()
                .and_then(|len| len.checked_next_multiple_of(8))
                .filter(|&padded| padded <= rest.len() - SECTION_HEAD)
                .ok_or(CodecError::Section)?;
            let payload = &rest[SECTION_HEAD..SECTION_HEAD + len as usize];
            rest = &rest[SECTION_HEAD + padded..];
            let place = match (tag, version) {
                (TAG_MANIFEST, MANIFEST_VERSION) => &mut sections.manifest,
                (TAG_INCREMENT, INCREMENT_VERSION) => &mut sections.increment,
                (TAG_PACKED, PACKED_VERSION) => &mut sections.packed,
                (TAG_GUARDED, GUARDED_VERSION) => &mut sections.guarded,
                (TAG_PLACES, PLACES_VERSION) => &mut sections.places,
                (TAG_PRIVILEGES, PRIVILEGES_VERSION) => &mut sections.privileges,
                (TAG_CLOCK, CLOCK_VERSION) => &mut sections.clock,
                (TAG_OBJECTS, OBJECTS_VERSION) => &mut sections.objects,
                (TAG_CWD, CWD_VERSION) => &mut sections.cwd,
                (TAG_RARE, RARE_VERSION) => &mut sections.rare,
                _ if tag & OPTIONAL != 0 => continue,
                _ => return Err(CodecError::Unknown { tag, version }),
            };
            if place.replace(payload).is_some() {
                return Err(CodecError::Unknown { tag, version });
            }
        }
        Ok(sections)
    }

    fn decode(self) -> Result<(Manifest, Option<Packed>), CodecError> {
        let mut manifest: Manifest = decode(self.manifest.ok_or(CodecError::Missing)?)?;
        let guarded = self.guarded.map(decode::<Vec<(u64, u64)>>).transpose()?;
        manifest.memory.guarded = runs(&guarded.unwrap_or_default())?;
        let objects = self.objects.map(decode::<Vec<ObjectSpace>>).transpose()?;
        manifest.memory.objects = objects.unwrap_or_default();
        manifest.clock = self.clock.map(decode).transpose()?.unwrap_or_default();
        manifest.cwd_object = self.cwd.map(decode).transpose()?.unwrap_or_default();
        manifest.rare = self.rare.map(decode).transpose()?.unwrap_or_default();
        manifest.descriptors.hung_up = manifest.rare.hung_up.clone();
        manifest.privileges = self.privileges.map(decode).transpose()?.unwrap_or_default();
        let packed = self.rest(&mut manifest)?;
        Ok((manifest, packed))
    }

    /// What stands in sections of its own in every case.
    fn rest(self, manifest: &mut Manifest) -> Result<Option<Packed>, CodecError> {
        if let Some(increment) = self.increment {
            let increment: Increment = decode(increment)?;
            manifest.memory.dropped = increment.dropped()?;
            manifest.memory.base = Some(increment.base);
        }
        self.packed.map(decode).transpose()
    }
}

#[cfg(test)]
mod tests {
    use super::super::state::{Extent, OBJECTS_AT, RareThread};
    use super::*;

    #[test]
    fn spaces_of_objects_round_trip() {
        let mut manifest = Manifest::default();
        manifest.memory.objects = vec![ObjectSpace {
            dev: 1,
            ino: 7,
            at: OBJECTS_AT,
            npages: 3,
        }];
        manifest.memory.extents = vec![Extent {
            addr: OBJECTS_AT + PAGE,
            npages: 2,
            offset: PAGE,
        }];
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
        // Of a base only where the pages lie is read: the space is an area like others.
        let base = decode_base(&region).unwrap().0.memory;
        assert_eq!(base.extents, manifest.memory.extents);
        let areas: Vec<_> = base.private().collect();
        assert_eq!(areas, [(OBJECTS_AT, OBJECTS_AT + 3 * PAGE)]);
        // A program that does not know them must not restore it.
        let mut unknown = Vec::new();
        push_section(&mut unknown, TAG_OBJECTS, OBJECTS_VERSION + 1, &[]);
        let version = OBJECTS_VERSION + 1;
        let tag = TAG_OBJECTS;
        let error = CodecError::Unknown { tag, version };
        assert_eq!(decode_manifest(&unknown), Err(error));
    }

    #[test]
    fn guard_regions_round_trip() {
        let mut manifest = Manifest::default();
        manifest.memory.guarded = vec![(0x1000, 2), (0x7fff_0000_0000, 1)];
        manifest.cwd_object = (5, 7);
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
        let mut damaged = Vec::new();
        push_section(
            &mut damaged,
            TAG_MANIFEST,
            MANIFEST_VERSION,
            &encode(&Manifest::default()).unwrap(),
        );
        let payload = encode(&vec![(u64::MAX, 2u64)]).unwrap();
        push_section(&mut damaged, TAG_GUARDED, GUARDED_VERSION, &payload);
        assert_eq!(decode_manifest(&damaged), Err(CodecError::Section));
    }

    #[test]
    fn privileges_round_trip() {
        let mut manifest = Manifest::default();
        manifest.privileges.credentials = b"Uid=0\n".to_vec();
        manifest.privileges.threads = vec![Default::default(); 3];
        manifest.privileges.threads[2].keepcaps = true;
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
    }

    #[test]
    fn what_few_ask_for_round_trips() {
        let mut manifest = Manifest::default();
        let without = encode_manifest(&manifest).unwrap();
        manifest.rare.membarrier = 1 << 4;
        manifest.rare.threads = vec![RareThread {
            ioprio: 3 << 13,
            deadline: [1, 2, 3],
        }];
        manifest.rare.hung_up = vec![4];
        manifest.descriptors.hung_up = vec![4];
        let region = encode_manifest(&manifest).unwrap();
        assert!(without.len() < region.len());
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
    }

    #[test]
    fn clocks_round_trip_and_may_be_missing() {
        let mut manifest = Manifest::default();
        assert_eq!(
            decode_manifest(&encode_manifest(&manifest).unwrap()).unwrap(),
            manifest
        );
        manifest.clock = ClockState {
            vdso_at: 0x7fff_0000_1000,
            vdso: vec![7; 8192],
            offsets: vec![1 << 60, 0, 3],
            net: true,
            ..ClockState::default()
        };
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
    }

    #[test]
    fn manifest_round_trip() {
        let mut manifest = Manifest::default();
        manifest.process.cmdline = b"a\0b\0".to_vec();
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(region.len() % 8, 0);
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
    }

    #[test]
    fn an_increment_round_trips_and_is_a_section_that_must_be_known() {
        let mut manifest = Manifest::default();
        let full = encode_manifest(&manifest).unwrap();
        manifest.memory.base = Some(Base {
            generation: 7,
            header_crc: 0xdead_beef,
        });
        manifest.memory.dropped = vec![(0x1000, 1), (0x3000, 2), (0x7fff_0000_0000, 4)];
        let region = encode_manifest(&manifest).unwrap();
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
        // Whoever does not know the section must not take the rest for a whole image.
        assert_eq!(region[full.len()..][..4], TAG_INCREMENT.to_le_bytes());
        assert_eq!(TAG_INCREMENT & OPTIONAL, 0);
        let mut twice = region.clone();
        twice.extend_from_slice(&region[full.len()..]);
        assert!(decode_manifest(&twice).is_err());
        for gap in [1 << 52, u64::MAX] {
            let far = Increment {
                base: manifest.memory.base.unwrap(),
                dropped: vec![(gap, 1), (1, u64::MAX)],
            };
            assert!(far.dropped().is_err());
        }
    }

    #[test]
    fn optional_sections_are_skipped_and_others_refused() {
        let mut region = encode_manifest(&Manifest::default()).unwrap();
        push_section(&mut region, OPTIONAL | 77, 3, b"later");
        assert!(decode_manifest(&region).is_ok());
        push_section(&mut region, 77, 3, b"later");
        assert_eq!(
            decode_manifest(&region),
            Err(CodecError::Unknown {
                tag: 77,
                version: 3
            })
        );
        assert_eq!(decode_manifest(&[]), Err(CodecError::Missing));
    }

    /// With the section and without, a base says the same.
    #[test]
    fn a_base_is_known_by_either_way() {
        let mut manifest = crate::image::check::tests::sample_manifest(4096);
        manifest.memory.base = Some(Base {
            generation: 7,
            header_crc: 1,
        });
        manifest.memory.dropped = vec![(0x10000, 1)];
        let region = encode_manifest(&manifest).unwrap();
        let mut sections = Sections::split(&region).unwrap();
        assert!(sections.places.take().is_some());
        let mut old = Vec::new();
        push_section(&mut old, TAG_MANIFEST, 1, sections.manifest.unwrap());
        push_section(&mut old, TAG_INCREMENT, 1, sections.increment.unwrap());
        let (new, old) = (decode_base(&region).unwrap(), decode_base(&old).unwrap());
        assert_eq!(new, old);
        let (was, is) = (&manifest.memory, &new.0.memory);
        assert_eq!((is.base, &is.dropped), (was.base, &was.dropped));
        assert_eq!(is.extents, was.extents);
        assert_eq!(new.0.threads, []);
        assert_eq!(decode_manifest(&region).unwrap(), manifest);
        // It is no manifest by itself.
        let mut alone = Vec::new();
        let places = encode(&Places::of(was).unwrap()).unwrap();
        push_section(&mut alone, TAG_PLACES, 1, &places);
        assert_eq!(decode_base(&alone), Err(CodecError::Missing));
    }

    #[test]
    fn trailing_bytes_and_huge_lengths_are_refused() {
        let mut bytes = encode(&vec![1u8, 2]).unwrap();
        bytes.push(0);
        assert_eq!(decode::<Vec<u8>>(&bytes), Err(CodecError::Trailing(1)));
        // A varint length of 2^63.
        let huge = [253, 0, 0, 0, 0, 0, 0, 0, 0x80];
        assert!(decode::<Vec<u8>>(&huge).is_err());
        assert!(decode::<Vec<u64>>(&huge).is_err());
    }
}
