//! Does a decoded manifest make sense? Whatever a restorer uses as an offset, an
//! index or a range is checked here once, so that a wrong manifest (of another
//! version, or made by hand) is refused before anything is unmapped.
//!
//! Pure code.

use super::PAGE;
use super::header::ParsedHeader;
use super::state::{Extent, FileKind, Manifest, OBJECTS_AT, VmaKind};

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum CheckError {
    #[error("memory area {0} is empty, unaligned or out of order")]
    Vma(usize),
    #[error("{what}: extent {index} is unaligned, out of order or outside the data")]
    Extent { what: &'static str, index: usize },
    #[error("page data at {0:#x} belongs to no memory area")]
    Stray(u64),
    #[error("an increment of generation {0} stands on generation {1}")]
    Base(u64, u64),
    #[error("dropped run {0} is unaligned, out of order, or of pages that are in the image")]
    Dropped(usize),
    #[error("guard region {0} is empty, or of pages that are in the image")]
    Guarded(usize),
    #[error("memory area {0} names shared object {1}, which does not exist")]
    SharedObject(usize, u32),
    #[error("the space of object {0} is empty, unaligned or out of order")]
    ObjectSpace(usize),
    #[error("descriptor {0} is out of order or names an open file that does not exist")]
    Descriptor(i32),
    #[error("an epoll set watches descriptor {0} of an open file that does not exist")]
    Epoll(i32),
}

/// Checks `manifest` against the header of the image that holds it.
pub fn check_manifest(manifest: &Manifest, header: &ParsedHeader) -> Result<(), CheckError> {
    let memory = &manifest.memory;
    let mut end = 0;
    for (index, vma) in memory.vmas.iter().enumerate() {
        let aligned = vma.start % PAGE == 0 && vma.end % PAGE == 0;
        if !aligned || vma.start < end || vma.end <= vma.start {
            return Err(CheckError::Vma(index));
        }
        end = vma.end;
        if let VmaKind::Shared { object, .. } | VmaKind::PrivateOf { object, .. } = vma.kind
            && object as usize >= memory.shared.len()
        {
            return Err(CheckError::SharedObject(index, object));
        }
    }
    end = end.max(OBJECTS_AT);
    for (index, object) in memory.objects.iter().enumerate() {
        let len = object.npages.checked_mul(PAGE);
        let until = len.and_then(|len| object.at.checked_add(len));
        match until.filter(|&until| object.at >= end && until > object.at) {
            Some(until) if object.at % PAGE == 0 => end = until,
            _ => return Err(CheckError::ObjectSpace(index)),
        }
    }
    check_extents("memory", &memory.extents, header)?;
    check_cover(manifest)?;
    check_increment(manifest, header)?;
    check_guarded(manifest)?;
    for object in &memory.shared {
        check_extents("shared object", &object.extents, header)?;
    }
    let count = manifest.descriptors.files.len();
    for file in &manifest.descriptors.files {
        if let FileKind::Unlinked { extents, .. } | FileKind::Memfd { extents, .. } = &file.kind {
            check_extents("open file", extents, header)?;
        }
        if let FileKind::Epoll { entries, .. } = &file.kind
            && let Some(entry) = entries.iter().find(|e| e.file as usize >= count)
        {
            return Err(CheckError::Epoll(entry.fd));
        }
    }
    let mut last = -1;
    for descriptor in &manifest.descriptors.fds {
        let exists = (descriptor.file as usize) < count;
        if descriptor.fd <= last || !exists {
            return Err(CheckError::Descriptor(descriptor.fd));
        }
        last = descriptor.fd;
    }
    Ok(())
}

fn check_extents(
    what: &'static str,
    extents: &[Extent],
    header: &ParsedHeader,
) -> Result<(), CheckError> {
    let data_end = header.data_offset + header.span();
    let mut next_addr = 0;
    for (index, extent) in extents.iter().enumerate() {
        let len = extent.npages.checked_mul(PAGE);
        let in_file = len
            .and_then(|len| extent.offset.checked_add(len))
            .is_some_and(|end| end <= data_end);
        let addr_end = len.and_then(|len| extent.addr.checked_add(len));
        let aligned = extent.addr % PAGE == 0 && extent.offset % PAGE == 0;
        let sound = aligned
            && in_file
            && extent.npages > 0
            && extent.offset >= header.data_offset
            && extent.addr >= next_addr;
        match addr_end {
            Some(addr_end) if sound => next_addr = addr_end,
            _ => return Err(CheckError::Extent { what, index }),
        }
    }
    Ok(())
}

/// An increment stands on an older generation; what it drops it does not hold.
fn check_increment(manifest: &Manifest, header: &ParsedHeader) -> Result<(), CheckError> {
    let memory = &manifest.memory;
    match memory.base {
        Some(base) if base.generation >= header.generation => {
            return Err(CheckError::Base(header.generation, base.generation));
        }
        None if !memory.dropped.is_empty() => return Err(CheckError::Dropped(0)),
        _ => {}
    }
    let mut extents = memory.extents.iter().peekable();
    let mut next = 0;
    for (index, &(addr, npages)) in memory.dropped.iter().enumerate() {
        let end = npages
            .checked_mul(PAGE)
            .and_then(|len| addr.checked_add(len))
            .filter(|_| npages > 0 && addr % PAGE == 0 && addr >= next)
            .ok_or(CheckError::Dropped(index))?;
        // Extents are checked already: they ascend and do not overflow.
        while extents
            .next_if(|e| e.addr + e.npages * PAGE <= addr)
            .is_some()
        {}
        if extents.peek().is_some_and(|e| e.addr < end) {
            return Err(CheckError::Dropped(index));
        }
        next = end;
    }
    Ok(())
}

/// Guard regions hold nothing.
fn check_guarded(manifest: &Manifest) -> Result<(), CheckError> {
    let memory = &manifest.memory;
    for (index, &(addr, npages)) in memory.guarded.iter().enumerate() {
        let end = npages
            .checked_mul(PAGE)
            .and_then(|len| addr.checked_add(len))
            .filter(|_| npages > 0 && addr % PAGE == 0)
            .ok_or(CheckError::Guarded(index))?;
        let extents = &memory.extents;
        let first = extents.partition_point(|e| e.addr + e.npages * PAGE <= addr);
        if extents.get(first).is_some_and(|e| e.addr < end) {
            return Err(CheckError::Guarded(index));
        }
    }
    Ok(())
}

/// Every page of memory lies in some area; both lists ascend.
fn check_cover(manifest: &Manifest) -> Result<(), CheckError> {
    let memory = &manifest.memory;
    let objects = memory
        .objects
        .iter()
        .map(|object| (object.at, object.end()));
    let vmas = memory.vmas.iter().map(|vma| (vma.start, vma.end));
    let mut areas = vmas.chain(objects).peekable();
    for extent in &memory.extents {
        let end = extent.addr + extent.npages * PAGE;
        let mut at = extent.addr;
        while at < end {
            match areas.peek() {
                Some(&(_, until)) if until <= at => {
                    areas.next();
                }
                Some(&(start, until)) if start <= at => at = until.min(end),
                _ => return Err(CheckError::Stray(at)),
            }
        }
    }
    Ok(())
}

#[cfg(test)]
pub(crate) mod tests {
    use super::super::state::*;
    use super::*;

    /// Two pages at 0x10000, stored from `offset` on; one descriptor.
    pub(crate) fn sample_manifest(offset: u64) -> Manifest {
        let mut manifest = Manifest::default();
        manifest.identity.arch = "x86_64".into();
        manifest.identity.uid = 1000;
        manifest.process.pid = 77;
        manifest.process.cwd = b"/tmp".to_vec();
        manifest.process.exe = b"/bin/true".to_vec();
        manifest.process.cmdline = b"true\0--sure\0".to_vec();
        manifest.memory.vmas.push(VmaState {
            start: 0x10000,
            end: 0x14000,
            prot: 3,
            kind: VmaKind::Anon,
            flags: 0,
        });
        manifest.memory.extents.push(Extent {
            addr: 0x11000,
            npages: 2,
            offset,
        });
        manifest.descriptors.files.push(OpenFileState {
            flags: 0,
            pos: 0,
            owner: (0, 0),
            owner_sig: 0,
            kind: FileKind::Device {
                path: b"/dev/null".to_vec(),
                rdev: 259,
            },
        });
        manifest.descriptors.fds.push(DescriptorState {
            fd: 0,
            cloexec: false,
            file: 0,
            inherited: false,
        });
        manifest
    }

    fn header() -> ParsedHeader {
        *super::super::header::Header::build(1, 2 * PAGE, None, (8, 0), (4, 0))
    }

    fn refused(change: impl FnOnce(&mut Manifest)) -> CheckError {
        let mut manifest = sample_manifest(PAGE);
        check_manifest(&manifest, &header()).unwrap();
        change(&mut manifest);
        check_manifest(&manifest, &header()).unwrap_err()
    }

    #[test]
    fn spaces_of_objects_are_checked() {
        let space = |at, npages| ObjectSpace {
            dev: 1,
            ino: 2,
            at,
            npages,
        };
        let mut good = sample_manifest(PAGE);
        good.memory.objects = vec![space(OBJECTS_AT, 1), space(OBJECTS_AT + PAGE, 2)];
        good.memory.extents[0].npages = 1;
        good.memory.extents.push(Extent {
            addr: OBJECTS_AT + PAGE,
            npages: 1,
            offset: 2 * PAGE,
        });
        check_manifest(&good, &header()).unwrap();
        for objects in [
            vec![space(0x2000_0000, 1)],
            vec![space(OBJECTS_AT, 0)],
            vec![space(OBJECTS_AT + 1, 1)],
            vec![space(OBJECTS_AT, u64::MAX)],
            vec![space(OBJECTS_AT, 2), space(OBJECTS_AT + PAGE, 1)],
        ] {
            let error = refused(|m| m.memory.objects = objects);
            assert!(matches!(error, CheckError::ObjectSpace(_)), "{error}");
        }
        good.memory.objects.pop();
        let stray = check_manifest(&good, &header()).unwrap_err();
        assert_eq!(stray, CheckError::Stray(OBJECTS_AT + PAGE));
    }

    #[test]
    fn guard_regions_over_contents_are_refused() {
        let mut manifest = sample_manifest(PAGE);
        let e = manifest.memory.extents[0];
        let behind = e.addr + e.npages * PAGE;
        manifest.memory.guarded = vec![(behind, 1)];
        check_manifest(&manifest, &header()).unwrap();
        for wrong in [
            (behind - PAGE, 1),
            (e.addr - PAGE, 2),
            (behind, 0),
            (behind, u64::MAX),
        ] {
            let error = refused(|m| m.memory.guarded = vec![wrong]);
            assert_eq!(error, CheckError::Guarded(0), "{wrong:?}");
        }
    }

    #[test]
    fn wrong_increments_are_refused() {
        let base = |generation| {
            Some(Base {
                generation,
                header_crc: 1,
            })
        };
        let mut manifest = sample_manifest(PAGE);
        manifest.memory.base = base(0);
        manifest.memory.dropped = vec![(0x10000, 1), (0x13000, 9)];
        check_manifest(&manifest, &header()).unwrap();
        assert_eq!(refused(|m| m.memory.base = base(1)), CheckError::Base(1, 1));
        assert_eq!(
            refused(|m| m.memory.dropped = vec![(0x10000, 1)]),
            CheckError::Dropped(0)
        );
        for wrong in [
            (0x10000, 2),
            (0x12000, 1),
            (0x13001, 1),
            (0x13000, 0),
            (0x13000, u64::MAX),
            (0xffff_ffff_ffff_f000, 2),
        ] {
            let change = |m: &mut Manifest| {
                m.memory.base = base(0);
                m.memory.dropped = vec![wrong];
            };
            assert_eq!(refused(change), CheckError::Dropped(0), "{wrong:x?}");
        }
        let unsorted = |m: &mut Manifest| {
            m.memory.base = base(0);
            m.memory.dropped = vec![(0x14000, 1), (0x13000, 1)];
        };
        assert_eq!(refused(unsorted), CheckError::Dropped(1));
    }

    #[test]
    fn wrong_manifests_are_refused() {
        let extent = |what| CheckError::Extent { what, index: 0 };
        assert_eq!(
            refused(|m| m.memory.extents[0].npages = 3),
            extent("memory")
        );
        assert_eq!(
            refused(|m| m.memory.extents[0].npages = u64::MAX / 8),
            extent("memory")
        );
        assert_eq!(
            refused(|m| m.memory.extents[0].offset = 0),
            extent("memory")
        );
        assert_eq!(refused(|m| m.memory.extents[0].addr += 8), extent("memory"));
        assert_eq!(
            refused(|m| m.memory.extents[0].addr = 0x13000),
            CheckError::Stray(0x14000)
        );
        assert_eq!(
            refused(|m| m.memory.vmas[0].end = 0x10000),
            CheckError::Vma(0)
        );
        assert_eq!(
            refused(|m| m.memory.vmas[0].kind = VmaKind::Shared {
                object: 0,
                offset: 0
            }),
            CheckError::SharedObject(0, 0)
        );
        assert_eq!(
            refused(|m| m.memory.vmas[0].kind = VmaKind::PrivateOf {
                object: 2,
                offset: 0
            }),
            CheckError::SharedObject(0, 2)
        );
        assert_eq!(
            refused(|m| m.descriptors.fds[0].file = 1),
            CheckError::Descriptor(0)
        );
    }
}
