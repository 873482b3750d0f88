//! The loaded libraries that the net looks at: where their text, their unwind
//! table and their build-id are in memory.
//!
//! Runs in the constructor only.

use std::ffi::{CStr, c_int, c_void};

/// One loaded library, described by addresses in this process.
#[derive(Debug, Clone)]
pub struct Object {
    pub name: String,
    /// Load bias: address minus the file's virtual address.
    pub base: usize,
    /// Its executable segment.
    pub text: usize,
    pub text_len: usize,
    /// `.eh_frame_hdr`, 0 when there is none.
    pub unwind_table: usize,
    /// NT_GNU_BUILD_ID, empty when there is none.
    pub build_id: Vec<u8>,
}

impl Object {
    /// The bytes of the text as they are mapped now.
    pub fn code(&self) -> &[u8] {
        // SAFETY: the segment is mapped readable as long as the library is
        // loaded, and the libraries taken here are never unloaded.
        unsafe { std::slice::from_raw_parts(self.text as *const u8, self.text_len) }
    }

    /// The mapped extent of the text: its whole pages.
    pub fn text_pages(&self) -> (usize, usize) {
        let start = self.text & !4095;
        (start, ((self.text + self.text_len + 4095) & !4095) - start)
    }
}

/// The libraries whose sites are patched: libc, the dynamic linker and, where it is
/// still a library of its own, libpthread. No others: bytes that look like a system
/// call in any other library may be data.
fn is_ours(name: &str) -> bool {
    let file = name.rsplit('/').next().unwrap_or(name);
    file == "libc.so.6" || file == "libpthread.so.0" || file == "ld-linux-x86-64.so.2"
}

/// Finds them among the loaded libraries.
pub fn loaded() -> Vec<Object> {
    let mut objects: Vec<Object> = Vec::new();
    // SAFETY: the callback gets exactly the pointer passed here.
    unsafe { libc::dl_iterate_phdr(Some(visit), (&raw mut objects).cast()) };
    objects
}

unsafe extern "C" fn visit(info: *mut libc::dl_phdr_info, _: usize, data: *mut c_void) -> c_int {
    // SAFETY: dl_iterate_phdr passes a valid description of a loaded object, whose
    // segments are mapped; `data` is the vector of `loaded`.
    unsafe {
        let objects = &mut *data.cast::<Vec<Object>>();
        let info = &*info;
        if info.dlpi_name.is_null() {
            return 0;
        }
        let name = CStr::from_ptr(info.dlpi_name).to_string_lossy();
        if !is_ours(&name) {
            return 0;
        }
        let base = info.dlpi_addr as usize;
        let mut object = Object {
            name: name.into_owned(),
            base,
            text: 0,
            text_len: 0,
            unwind_table: 0,
            build_id: Vec::new(),
        };
        let headers = std::slice::from_raw_parts(info.dlpi_phdr, usize::from(info.dlpi_phnum));
        let mut texts = 0;
        for header in headers {
            let at = base + header.p_vaddr as usize;
            match header.p_type {
                libc::PT_LOAD if header.p_flags & libc::PF_X != 0 => {
                    texts += 1;
                    (object.text, object.text_len) = (at, header.p_filesz as usize);
                }
                libc::PT_GNU_EH_FRAME => object.unwind_table = at,
                libc::PT_NOTE if object.build_id.is_empty() => {
                    let notes =
                        std::slice::from_raw_parts(at as *const u8, header.p_memsz as usize);
                    object.build_id = build_id(notes).unwrap_or_default().to_vec();
                }
                _ => {}
            }
        }
        if texts == 1 {
            objects.push(object);
        }
    }
    0
}

/// The build-id in a note segment.
fn build_id(mut notes: &[u8]) -> Option<&[u8]> {
    const NT_GNU_BUILD_ID: u32 = 3;
    let word = |bytes: &[u8], at: usize| -> Option<u32> {
        Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?))
    };
    loop {
        let name_len = word(notes, 0)? as usize;
        let desc_len = word(notes, 4)? as usize;
        let kind = word(notes, 8)?;
        let name = notes.get(12..12 + name_len)?;
        let desc_at = 12 + ((name_len + 3) & !3);
        let desc = notes.get(desc_at..desc_at + desc_len)?;
        if kind == NT_GNU_BUILD_ID && name == b"GNU\0" {
            return Some(desc);
        }
        notes = notes.get(desc_at + ((desc_len + 3) & !3)..)?;
    }
}
