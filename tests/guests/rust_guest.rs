//! Proves: a Rust program survives: threads, channels, mutexes and condition variables
//! (futexes of its own, not libc's), thread locals, collections, formatted output,
//! catch_unwind. Compiled by rustc alone.

use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::sync::mpsc::sync_channel;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

thread_local! {
    static SEEN: std::cell::RefCell<Vec<u64>> = const { std::cell::RefCell::new(Vec::new()) };
}

fn begin() {
    if let Ok(log) = std::env::var("GUEST_LOG") {
        let mut file = std::fs::OpenOptions::new().append(true).create(true).open(log).unwrap();
        file.write_all(b"begin\n").unwrap();
    }
}

fn main() {
    begin();
    let seconds: f64 = std::env::var("GUEST_SECONDS").ok().and_then(|s| s.parse().ok()).unwrap_or(2.0);
    let rounds = (seconds * 100.0) as u64;
    let (sender, receiver) = sync_channel::<(u64, String)>(5);
    let gate = Arc::new((Mutex::new(0u64), Condvar::new()));
    let threads: Vec<_> = (0..4u64)
        .map(|id| {
            let (sender, gate) = (sender.clone(), gate.clone());
            std::thread::spawn(move || {
                let mut map = HashMap::new();
                for round in 0..rounds {
                    let (lock, condition) = &*gate;
                    let mut open = lock.lock().unwrap();
                    while *open <= round {
                        open = condition.wait(open).unwrap();
                    }
                    drop(open);
                    *map.entry(round % 17).or_insert(0u64) += round * id;
                    SEEN.with(|seen| {
                        seen.borrow_mut().push(round);
                        assert_eq!(seen.borrow().len() as u64, round + 1);
                    });
                    sender.send((id, format!("{round}"))).unwrap();
                }
                map.values().sum::<u64>()
            })
        })
        .collect();
    drop(sender);
    let mut seen = BTreeMap::new();
    for round in 0..rounds {
        let (lock, condition) = &*gate;
        *lock.lock().unwrap() = round + 1;
        condition.notify_all();
        for _ in 0..4 {
            let (id, text) = receiver.recv().unwrap();
            *seen.entry(id).or_insert(0u64) += text.parse::<u64>().unwrap();
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    for thread in threads {
        println!("{}", thread.join().unwrap());
    }
    println!("{seen:?}");
    println!("rust ok");
    std::process::exit(73);
}
