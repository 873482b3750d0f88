use super::super::fs::RawFs;
use super::super::fs::tests::TempDir;
use super::*;

fn committed(generation: u64) -> Record {
    Record::Committed(GenerationRecord {
        generation,
        ..Default::default()
    })
}

fn numbers(journal: &Journal) -> Vec<u64> {
    journal.generations().iter().map(|g| g.generation).collect()
}

fn sample() -> Vec<u8> {
    let removed = Record::Removed(Removed {
        generation: 1,
        time_ns: 5,
    });
    [committed(1), committed(2), removed, committed(3)]
        .iter()
        .flat_map(|r| encode_record(r).unwrap())
        .collect()
}

#[test]
fn append_and_read() {
    let dir = TempDir::new("journal");
    let mut journal = Journal::read(&RawFs, &dir.0).unwrap();
    assert!(journal.records().is_empty());
    for generation in 1..4 {
        journal
            .append(&RawFs, &dir.0, committed(generation), true)
            .unwrap();
    }
    let refused = Refused {
        reason: "io_uring".into(),
        time_ns: 1,
    };
    journal
        .append(&RawFs, &dir.0, Record::Refused(refused.clone()), false)
        .unwrap();
    let again = Journal::read(&RawFs, &dir.0).unwrap();
    assert_eq!(numbers(&again), [1, 2, 3]);
    assert_eq!(again.last_refusal(), Some(&refused));
    assert!(!again.is_damaged());
    journal.rewrite(&RawFs, &dir.0).unwrap();
    let mut again = Journal::read(&RawFs, &dir.0).unwrap();
    assert_eq!(again.last_refusal(), Some(&refused));
    again.append(&RawFs, &dir.0, committed(4), false).unwrap();
    assert_eq!(again.last_refusal(), None);
    again.rewrite(&RawFs, &dir.0).unwrap();
    assert_eq!(again.last_refusal(), None);
}

#[test]
fn a_torn_tail_is_ignored_and_cut_off() {
    let dir = TempDir::new("torn");
    let whole = sample();
    let last = encode_record(&committed(3)).unwrap().len();
    for cut in whole.len() - last + 1..whole.len() {
        let path = dir.0.join(NAME);
        let _ = RawFs.unlink(&path);
        let file = RawFs.create_new(&path).unwrap();
        RawFs.write_all(&file, &whole[..cut], 0).unwrap();
        let mut journal = Journal::read(&RawFs, &dir.0).unwrap();
        assert_eq!(numbers(&journal), [2]);
        assert!(journal.is_damaged());
        journal.append(&RawFs, &dir.0, committed(4), true).unwrap();
        let again = Journal::read(&RawFs, &dir.0).unwrap();
        assert_eq!(numbers(&again), [2, 4]);
        assert!(!again.is_damaged());
    }
}

#[test]
fn a_flipped_byte_costs_one_record_at_most() {
    let whole = sample();
    for at in 0..whole.len() {
        let mut bad = whole.clone();
        bad[at] ^= 0x20;
        let journal = Journal::parse(&bad);
        assert!(journal.is_damaged(), "byte {at}");
        assert!(journal.records().len() >= 3, "byte {at}");
    }
}

#[test]
fn unknown_kinds_are_skipped() {
    let mut bytes = sample();
    let mut later = encode_record(&committed(9)).unwrap();
    later[4] = 200;
    let len = u32::from_le_bytes(later[8..12].try_into().unwrap()) as usize;
    let crc = crc32c::crc32c_append(crc32c::crc32c(&later[4..12]), &later[HEAD..HEAD + len]);
    later[12..16].copy_from_slice(&crc.to_le_bytes());
    bytes.extend_from_slice(&later);
    let journal = Journal::parse(&bytes);
    assert_eq!(numbers(&journal), [2, 3]);
    assert!(!journal.is_damaged());
    assert_eq!(journal.end, bytes.len() as u64);
}

#[test]
fn returns_make_the_order() {
    let dir = TempDir::new("returns");
    let mut journal = Journal::default();
    let mut append = |record| journal.append(&RawFs, &dir.0, record, false).unwrap();
    let returned = |to, left| {
        Record::Returned(Returned {
            to,
            left,
            time_ns: 1,
        })
    };
    let removed = |generation| {
        Record::Removed(Removed {
            generation,
            time_ns: 1,
        })
    };
    (1..4).for_each(|k| append(committed(k)));
    append(returned(1, Some(3)));
    append(committed(4));
    append(returned(3, Some(4)));
    append(removed(4));
    let check = |journal: &Journal| {
        let order: Vec<u64> = journal.order().iter().map(|g| g.generation).collect();
        assert_eq!(order, [2, 1, 3]);
        assert_eq!(journal.left(), [3]);
        assert_eq!(numbers(journal), [1, 2, 3]);
        assert_eq!(journal.highest(), 4);
    };
    check(&Journal::read(&RawFs, &dir.0).unwrap());
    journal.rewrite(&RawFs, &dir.0).unwrap();
    check(&journal);
    check(&Journal::read(&RawFs, &dir.0).unwrap());
}

#[test]
fn a_long_journal_is_rewritten() {
    let dir = TempDir::new("rewrite");
    let mut journal = Journal::default();
    for generation in 1..=400 {
        journal
            .append(&RawFs, &dir.0, committed(generation), false)
            .unwrap();
        let gone = Record::Removed(Removed {
            generation,
            time_ns: 0,
        });
        journal.append(&RawFs, &dir.0, gone, false).unwrap();
    }
    let again = Journal::read(&RawFs, &dir.0).unwrap();
    assert!(again.records().len() < 300);
    assert_eq!(again.highest(), 400);
    assert!(again.generations().is_empty());
}
