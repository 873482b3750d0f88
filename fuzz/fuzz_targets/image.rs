//! The image decoder on arbitrary bytes: as they are, and as a manifest behind right
//! checksums. It may refuse; it must not crash, hang or take memory without bounds.
#![no_main]

use ckpt::image::header::{HEADER_LEN, ParsedHeader};
use ckpt::image::{Image, chain, pack, check, codec};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    if let Ok(image) = Image::read(&data) {
        let _ = image.verify_data(&data, |_, _| {});
    }
    if let Some(page) = data.first_chunk::<{ HEADER_LEN as usize }>() {
        // With the header's own checksum made right, the layout checks must hold.
        let mut page = *page;
        let end = page.len() - 4;
        let crc = crc32c::crc32c(&page[..end]);
        page[end..].copy_from_slice(&crc.to_le_bytes());
        if let Ok(parsed) = ParsedHeader::parse(&page)
            && let Ok(header) = parsed.validate(parsed.total_len)
            && let Ok(manifest) = codec::decode_manifest(&data[page.len()..])
        {
            let sound = check::check_manifest(&manifest, &header).is_ok();
            // Composing takes what was checked, and must hold for the rest as well.
            let memory = &manifest.memory;
            let base = ckpt::image::state::MemoryState {
                base: None,
                ..memory.clone()
            };
            let composed = chain::compose(&[memory, &base]);
            assert!(!sound || memory.base.is_none() || composed.is_ok());
        }
    }
    if let Ok((_, Some(packed))) = codec::decode_region(data) {
        let _ = packed.offsets(packed.sizes.len() as u64 * 65536);
    }
    let mut block = [0; 4096];
    for method in [pack::Method::Lz4, pack::Method::Zstd] {
        pack::Unpacker::new(method).unpack(data, &mut block);
    }
});
