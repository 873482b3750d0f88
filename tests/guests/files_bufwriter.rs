// Proves: a Rust program with BufWriter, OpenOptions, fs::rename and fs::write agrees with
// its files.
use std::fs::{self, File, OpenOptions};
use std::io::{BufWriter, Read, Seek, SeekFrom, Write};

fn main() {
    if let Ok(log) = std::env::var("GUEST_LOG") {
        let mut log = OpenOptions::new().create(true).append(true).open(log).unwrap();
        log.write_all(b"begin\n").unwrap();
    }
    let seconds: f64 = std::env::var("GUEST_SECONDS").map_or(2.0, |s| s.parse().unwrap());
    let mut results = BufWriter::new(File::create("results").unwrap());
    let mut table = OpenOptions::new().read(true).write(true).create(true).open("table").unwrap();
    let mut want = vec![0u64; 300];
    table.write_all(&vec![0; 2400]).unwrap();
    for round in 0..(seconds * 100.0) as u64 {
        if round > 0 {
            let state = fs::read_to_string("state").unwrap();
            assert_eq!(state, format!("state {}\n", round - 1));
        }
        for k in 0..10 {
            let at = (round * 7919 + k * 104729) % 300;
            let mut is = [0; 8];
            table.seek(SeekFrom::Start(at * 8)).unwrap();
            table.read_exact(&mut is).unwrap();
            assert_eq!(u64::from_le_bytes(is), want[at as usize]);
            want[at as usize] += round;
            table.seek(SeekFrom::Start(at * 8)).unwrap();
            table.write_all(&want[at as usize].to_le_bytes()).unwrap();
            writeln!(results, "{round}.{k} {}", want[at as usize]).unwrap();
        }
        fs::write("state.new", format!("state {round}\n")).unwrap();
        fs::rename("state.new", "state").unwrap();
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    results.flush().unwrap();
    println!("rust files ok {}", want.iter().sum::<u64>());
    std::process::exit(73);
}
