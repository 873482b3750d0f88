//! A Rust program of threads, strings and maps, for the table of real programs.
use std::collections::BTreeMap;

fn work(id: u64) -> BTreeMap<String, u64> {
    let mut state = id;
    let mut map = BTreeMap::new();
    for _ in 0..2_500_000u32 {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        *map.entry(format!("{:x}", state >> 53)).or_insert(0) += state >> 40;
    }
    map
}

fn main() {
    for turn in 0..4 {
        let threads: Vec<_> = (0..2).map(|id| std::thread::spawn(move || work(turn * 2 + id))).collect();
        for thread in threads {
            let map = thread.join().unwrap();
            println!("{turn} {} {:?}", map.len(), map.iter().next());
            println!("{:x}", map.values().fold(0u64, |a, b| a.wrapping_mul(31).wrapping_add(*b)));
        }
    }
}
