//! Real programs of the distribution, killed and resumed: standard output and status are
//! those of an undisturbed run.
//!
//! `soak` (ignored here, run by scripts/soak) does many cycles of all of them and prints a
//! table.

mod common;
#[path = "real/table.rs"]
mod table;

use common::{EAGER_COPY, LAZY_FORK, Setting, Trial};
use std::panic::AssertUnwindSafe;
use std::time::Duration;
use table::ROWS;

fn row(name: &str) -> &'static table::Row {
    ROWS.iter()
        .find(|r| r.name == name)
        .expect("a row of the table")
}

fn trial(row: &table::Row, setting: Setting) -> Trial {
    Trial::new((row.program)(), setting).ckpt("CKPT_INTERVAL", "150ms")
}

macro_rules! real_programs {
    ($($name:ident)*) => {
        $(
            #[test]
            fn $name() {
                let eager = stringify!($name).len() % 2 == 0;
                let setting = if eager { EAGER_COPY } else { LAZY_FORK };
                trial(row(stringify!($name)), setting).survives(3);
            }
        )*

        #[test]
        fn every_row_has_its_test() {
            let tests = [$(stringify!($name)),*];
            assert_eq!(tests.len(), ROWS.len());
            for row in ROWS {
                assert!(tests.contains(&row.name), "{} has no test", row.name);
            }
        }
    };
}

real_programs! {
    python3 perl ruby lua tcl node java sqlite3 bash dash gawk mawk sed sort bc dc cc1 xz zstd
    gzip bzip2 openssl gnuplot ghostscript factor iostream rust fortran
    java_threads node_workers ruby_threads python_asyncio perl_alarms bash_traps octave r_language php guile
    ocaml
}

/// A JVM that starts removes the files in /tmp/hsperfdata_USER of those that are dead, also of
/// those that are to be resumed.
#[test]
fn java_side_by_side() {
    let mut a = trial(row("java"), LAZY_FORK);
    let mut b = trial(row("java"), EAGER_COPY);
    // Before the first begins: a run takes no longer than one of these.
    let (a_bare, b_bare) = (a.bare(), b.bare());
    let one = |trial: &mut Trial| {
        let mut started = trial.start();
        for _ in 0..2 {
            let known = trial.generation();
            if trial.await_generation(&mut started, known).is_none() {
                trial.fail("it ended by itself, or was refused");
            }
        }
        started
    };
    let (a_started, b_started) = (one(&mut a), one(&mut b));
    a.note(a_started.kill(true).describe());
    b.note(b_started.kill(true).describe());
    // Of the same user: a JVM looks through the directory of its own user only.
    let mut third = std::process::Command::new("java");
    if let Some(user) = common::user::ordinary() {
        use std::os::unix::process::CommandExt;
        third.uid(user.uid).gid(user.gid);
    }
    let third = third.arg("-version").output();
    assert!(third.expect("java").status.success());
    let (a_started, b_started) = (a.start(), b.start());
    let lives = [a_started, b_started].map(|life| life.end(Duration::from_secs(120)));
    for (trial, bare, life) in [(&mut a, &a_bare, &lives[0]), (&mut b, &b_bare, &lives[1])] {
        trial.compare(bare, life);
        let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).expect("the log");
        let said = |text: &str| {
            log.lines()
                .any(|l| l.contains("/hsperfdata_") && l.contains(text))
        };
        if !said("was removed by somebody else: made again as it was") {
            trial.fail("its file was not removed, or not made again");
        }
    }
}

/// Servers: their state is what a client finds after a kill and a resume.
mod servers {
    use super::common::run::Started;
    use super::common::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::time::{Duration, Instant};

    fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a port");
        listener.local_addr().expect("its address").port()
    }

    /// Sends and reads until `until` is in the answer; connects anew until it is served.
    fn ask(
        trial: &mut Trial,
        started: &mut Started,
        port: u16,
        request: &str,
        until: &str,
    ) -> String {
        let limit = Instant::now() + Duration::from_secs(20);
        loop {
            let mut answer = Vec::new();
            if let Ok(mut stream) = TcpStream::connect(("127.0.0.1", port)) {
                let _ = stream.set_read_timeout(Some(Duration::from_millis(500)));
                let _ = stream.write_all(request.as_bytes());
                let mut piece = [0; 65536];
                while let Ok(n @ 1..) = stream.read(&mut piece) {
                    answer.extend_from_slice(&piece[..n]);
                    if String::from_utf8_lossy(&answer).contains(until) {
                        return String::from_utf8_lossy(&answer).into_owned();
                    }
                }
            }
            if started.has_ended() || Instant::now() > limit {
                let text = String::from_utf8_lossy(&answer).into_owned();
                trial.fail(&format!(
                    "no answer with {until:?} to {request:?}: {text:?}"
                ));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn field<'a>(text: &'a str, name: &str) -> &'a str {
        let rest = text.split(name).nth(1).unwrap_or("");
        rest.split_whitespace().next().unwrap_or("")
    }

    #[test]
    fn redis() {
        let port = free_port();
        let args = [
            "--port",
            &port.to_string(),
            "--save",
            "",
            "--appendonly",
            "no",
            "--bind",
            "127.0.0.1",
        ];
        let program = Program::real("redis-server", &args);
        let mut trial = Trial::new(program, LAZY_FORK).ckpt("CKPT_INTERVAL", "100ms");
        let mut run_id = String::new();
        for life in 0..4 {
            let known = trial.generation();
            let mut started = trial.start();
            let info = ask(
                &mut trial,
                &mut started,
                port,
                "INFO server\r\n",
                "config_file",
            );
            let id = field(&info, "run_id:").to_owned();
            if life > 0 && id != run_id {
                trial.fail("redis was started from scratch");
            }
            run_id = id;
            for key in 0..life * 100 {
                let request = format!("GET key{key}\r\n");
                ask(
                    &mut trial,
                    &mut started,
                    port,
                    &request,
                    &format!("value-of-{key}\r\n"),
                );
            }
            for key in life * 100..life * 100 + 100 {
                let request = format!("SET key{key} value-of-{key}\r\n");
                ask(&mut trial, &mut started, port, &request, "+OK");
            }
            // Two more: one that began after the last key was set is among them.
            let now = trial.generation().max(known);
            let next = trial.await_generation(&mut started, now);
            trial.await_generation(&mut started, next.unwrap_or(now));
            started.kill(true);
        }
    }

    #[test]
    fn nginx() {
        let port = free_port();
        let conf = format!(
            "daemon off; master_process off; pid nginx.pid; error_log stderr;\n\
             events {{}}\n\
             http {{ access_log off; client_body_temp_path t; proxy_temp_path t; fastcgi_temp_path t; uwsgi_temp_path t; scgi_temp_path t;\n\
             server {{ listen 127.0.0.1:{port}; location /status {{ stub_status; }} location / {{ return 200 \"it is nginx $pid\\n\"; }} }} }}\n"
        );
        let program =
            Program::real("nginx", &["-p", ".", "-c", "nginx.conf"]).file("nginx.conf", conf);
        let mut trial = Trial::new(program, EAGER_COPY).ckpt("CKPT_INTERVAL", "100ms");
        let mut handled = 0u64;
        for _ in 0..4 {
            let mut started = trial.start();
            for _ in 0..30 {
                ask(
                    &mut trial,
                    &mut started,
                    port,
                    "GET / HTTP/1.0\r\n\r\n",
                    "it is nginx",
                );
            }
            let status = ask(
                &mut trial,
                &mut started,
                port,
                "GET /status HTTP/1.0\r\n\r\n",
                "Reading",
            );
            let requests = status.split("requests").nth(1).unwrap_or("");
            let now: u64 = requests
                .split_whitespace()
                .nth(2)
                .and_then(|n| n.parse().ok())
                .unwrap_or(0);
            if now < handled + 30 {
                trial.fail(&format!(
                    "nginx was started from scratch: {now} requests, {handled} before"
                ));
            }
            handled = now;
            let known = trial.generation();
            let next = trial.await_generation(&mut started, known);
            trial.await_generation(&mut started, next.unwrap_or(known));
            started.kill(true);
        }
    }
}

/// Many cycles of every program: `SOAK_CYCLES` kills each (default 20), `SOAK_PROGRAMS` a
/// list of names. Goes on after a mismatch and counts.
#[test]
#[ignore = "long: scripts/soak runs it"]
fn soak() {
    let number = |name: &str, default| {
        std::env::var(name)
            .ok()
            .and_then(|v| v.parse().ok())
            .unwrap_or(default)
    };
    let cycles: usize = number("SOAK_CYCLES", 20);
    let only = std::env::var("SOAK_PROGRAMS").unwrap_or_default();
    let only: Vec<&str> = only.split_whitespace().collect();
    let (lazy_copy, eager_fork) = (
        Setting {
            snapshot: "copy",
            ..LAZY_FORK
        },
        Setting {
            snapshot: "fork",
            ..EAGER_COPY
        },
    );
    let settings = [LAZY_FORK, EAGER_COPY, lazy_copy, eager_fork];
    println!(
        "{:<14} {:>7} {:>10} {:>8}  note",
        "program", "cycles", "mismatches", "refusals"
    );
    let mut bad = 0;
    for row in ROWS
        .iter()
        .filter(|r| only.is_empty() || only.contains(&r.name))
    {
        let (mut done, mut mismatches, mut refusals, mut runs) = (0, 0, 0, 0);
        let mut note = String::new();
        let mut bare = None;
        while done < cycles && mismatches < 3 && runs < cycles {
            runs += 1;
            let setting = settings[runs % settings.len()];
            let result = std::panic::catch_unwind(AssertUnwindSafe(|| {
                let mut trial = trial(row, setting);
                let bare = bare.get_or_insert_with(|| trial.bare());
                let hits = trial.kill_and_resume((cycles - done).min(5));
                let life = trial.finish();
                trial.compare(bare, &life);
                let log = std::fs::read_to_string(trial.dir.join("ckpt.log")).unwrap_or_default();
                (
                    hits,
                    log.lines()
                        .filter(|l| l.contains("no checkpoint (") || l.contains("refused"))
                        .filter(|l| !l.contains("the program is ending"))
                        .count(),
                )
            }));
            match result {
                Ok((hits, refused)) => {
                    done += hits;
                    refusals += refused;
                }
                Err(panic) => {
                    mismatches += 1;
                    let text = panic.downcast_ref::<String>().cloned().unwrap_or_default();
                    note = text.lines().next().unwrap_or("failed").to_owned();
                }
            }
        }
        bad += mismatches;
        println!(
            "{:<14} {done:>7} {mismatches:>10} {refusals:>8}  {note}",
            row.name
        );
    }
    assert_eq!(bad, 0, "mismatches");
}
