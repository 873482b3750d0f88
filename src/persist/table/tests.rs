//! Reading tables and making them of others, on the real file system.

use super::*;
use crate::persist::format;
use std::fs;
use std::os::unix::fs::FileExt;

const TOTAL: u64 = format::RECORDS + (256 << 10);

fn place(name: &str) -> PathBuf {
    let dir = std::env::temp_dir().join(format!("ckpt-table-{name}-{}", std::process::id()));
    let _ = fs::remove_dir_all(&dir);
    fs::create_dir(&dir).unwrap();
    dir
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_le_bytes().to_vec();
    bytes.extend(crc32c::crc32c(payload).to_le_bytes());
    bytes.extend(payload);
    bytes.resize(format::record_len(payload.len()), 0);
    bytes
}

#[test]
fn zeros_that_were_never_written_count() {
    let dir = place("zeros");
    let path = dir.join("table-000003");
    let file = fs::File::create(&path).unwrap();
    file.set_len(TOTAL).unwrap();
    file.write_all_at(&format::header(3, 7, false), 0).unwrap();
    assert_eq!(read(&path).unwrap().unwrap().records, []);
    let mut e = format::Encoder::new();
    e.begin(format::TAG_BORN).id(&Id { dev: 1, ino: 2 });
    let mut bytes = frame(e.bytes().unwrap());
    // One that ends in zeros, which are left to the hole behind.
    e.begin(format::TAG_INCOMPLETE)
        .text(b"/a")
        .text(&[0; 40_000]);
    bytes.extend(frame(e.bytes().unwrap()));
    let used = bytes.iter().rposition(|&b| b != 0).unwrap() + 1;
    file.write_all_at(&bytes[..used], format::RECORDS).unwrap();
    let table = read(&path).unwrap().unwrap();
    assert_eq!((table.records.len(), table.damaged), (2, false));
    // Behind a place that is not whole, a record like that is damage.
    file.write_all_at(&[0xff], format::RECORDS + 8).unwrap();
    let table = read(&path).unwrap().unwrap();
    assert!(table.records.is_empty() && table.damaged);
    fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn nothing_of_a_table_is_left_in_the_one_made_of_it() {
    for size in [0, 5000, TOTAL, TOTAL + 70_000] {
        let dir = place("spare");
        let path = dir.join("table-000003");
        let mut bytes = vec![0xa5; size as usize];
        let header = format::header(3, 7, false);
        let n = header.len().min(bytes.len());
        bytes[..n].copy_from_slice(&header[..n]);
        fs::write(&path, bytes).unwrap();
        let inode = |path: &Path| std::os::unix::fs::MetadataExt::ino(&fs::metadata(path).unwrap());
        let was = inode(&path);
        remove_for_reuse(&dir, 3).unwrap();
        assert_eq!(list(&dir).unwrap(), []);
        drop(create(&dir, 9, 8, false).unwrap());
        let path = dir.join("table-000009");
        assert_eq!(inode(&path), was);
        let bytes = fs::read(&path).unwrap();
        assert_eq!(bytes.len() as u64, TOTAL);
        assert_eq!(bytes[..32], format::header(9, 8, false));
        assert!(bytes[32..].iter().all(|&b| b == 0), "{size}");
        assert_eq!((highest(&dir).unwrap(), list(&dir).unwrap().len()), (9, 1));
        // What nothing was made of goes.
        remove_for_reuse(&dir, 9).unwrap();
        remove_leftovers(&dir).unwrap();
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 0);
        fs::remove_dir_all(&dir).unwrap();
    }
}
