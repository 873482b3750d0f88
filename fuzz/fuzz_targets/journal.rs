//! The journal and generation records on arbitrary bytes.
#![no_main]

use ckpt::store::GenerationRecord;
use ckpt::store::journal::Journal;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let journal = Journal::parse(data);
    let _ = (journal.generations(), journal.highest(), journal.last_refusal());
    let _ = GenerationRecord::from_file(data);
});
