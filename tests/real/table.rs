//! The table of real programs: each a deterministic workload of some seconds that writes
//! only to standard output.

use crate::common::{Program, build};
use std::fmt::Write as _;

/// A row: its name (also a test's name) and its program.
pub struct Row {
    pub name: &'static str,
    pub program: fn() -> Program,
}

/// Lines of numbers and words, the same every time.
fn text(lines: usize) -> Vec<u8> {
    let mut text = String::new();
    let mut state = 88_172_645_463_325_252u64;
    for line in 0..lines {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        let _ = writeln!(
            text,
            "{state:020} word{} {:x} {line}",
            state % 977,
            state >> 32
        );
    }
    text.into_bytes()
}

/// Numbers that take milliseconds each to factor.
fn large_numbers() -> String {
    let number = |i| format!("1000000000000000000000000{}\n", 101 + 2 * i);
    (0..440).map(number).collect()
}

fn sql() -> String {
    let mut sql = String::from("create table t(id integer primary key, k integer, v text);\n");
    for round in 0..20 {
        let _ = write!(
            sql,
            "with recursive n(i) as (select 1 union all select i + 1 from n where i < 40000) \
             insert into t(k, v) select (i * 7919 + {round}) % 1009, hex(i * {round} + 17) from n;\n\
             select count(*), sum(k), max(v) from t;\n\
             select k, count(*), min(v) from t group by k order by 2 desc, 1 limit 3;\n\
             update t set v = v || 'x' where k % 13 = {round};\n"
        );
    }
    sql
}

const PYTHON: &str = r#"
import hashlib, threading, json, re
results = {}
def work(name):
    data = {}
    digest = hashlib.sha256()
    for i in range(60000):
        data[f"{name}-{i * 7919 % 10007}"] = [i, str(i) * 3, {"x": i}]
        if i % 500 == 0:
            digest.update(json.dumps(data.get(f"{name}-1", 0)).encode())
            digest.update(re.sub(r"(\d)(\d)", r"\2\1", str(i ** 7)).encode())
    digest.update(json.dumps(data, sort_keys=True).encode())
    results[name] = digest.hexdigest()
for turn in range(6):
    threads = [threading.Thread(target=work, args=(f"{turn}.{n}",)) for n in range(4)]
    for t in threads: t.start()
    for t in threads: t.join()
    print(turn, [results[k] for k in sorted(results)][-1], flush=turn % 2 == 0)
"#;

const PERL: &str = r#"
my %h; my $s = 1; my $text = '';
for my $i (1 .. 1500000) {
    $s = ($s * 1103515245 + 12345) % 2147483648;
    $h{$s % 5003} .= chr(97 + $s % 26);
    if ($i % 150000 == 0) {
        my $n = () = join('', map { $h{$_} } sort { $a <=> $b } keys %h) =~ /a[b-m]+z/g;
        print "$i $n ", length join('', values %h), "\n";
    }
}
"#;

const RUBY: &str = r##"
h = Hash.new { |hash, k| hash[k] = [] }
s = 1
1_500_000.times do |i|
  s = (s * 1103515245 + 12345) % 2147483648
  h[s % 1009] << s.to_s(36)
  if i % 150_000 == 0
    puts "#{i} #{h.values.map(&:size).max} #{h.keys.sort.first(5).map { |k| h[k].last }.join(',')}"
  end
end
t = Thread.new { (1..200).reduce(:*) }
puts t.value.to_s.sum
"##;

const LUA: &str = r#"
local s, t = 1, {}
for i = 1, 18000000 do
  s = (s * 1103515245 + 12345) % 2147483648
  t[s % 10007] = (t[s % 10007] or 0) + i % 17
  if i % 500000 == 0 then
    local words = {}
    for k = 1, 50 do words[#words + 1] = string.format('%d:%s', k, t[k] or '-') end
    print(i, #table.concat(words, ' '), table.concat(words, ' '):sub(1, 60))
  end
end
"#;

const TCL: &str = r#"
set s 1
for {set i 1} {$i <= 2500000} {incr i} {
    set s [expr {($s * 1103515245 + 12345) % 2147483648}]
    incr count([expr {$s % 1009}])
    if {$i % 250000 == 0} {
        set l {}
        foreach k [lsort -integer [array names count]] { lappend l "$k=$count($k)" }
        puts "$i [string length $l] [lrange $l 0 5] [regexp -all {=2} $l]"
    }
}
"#;

const NODE: &str = r#"
let s = 1n, m = new Map(), text = '';
for (let i = 1; i <= 4000000; i++) {
  s = (s * 1103515245n + 12345n) % 2147483648n;
  const k = Number(s % 1009n);
  m.set(k, (m.get(k) || 0) + i % 7);
  if (i % 400000 === 0) {
    text = [...m.entries()].sort((a, b) => a[0] - b[0]).slice(0, 6).map(e => e.join(':')).join(' ');
    console.log(i, m.size, text);
  }
}
"#;

const JAVA: &str = r#"
import java.util.*;
public class Work {
    public static void main(String[] args) throws Exception {
        long s = 1;
        Map<Integer, StringBuilder> m = new TreeMap<>();
        for (int i = 1; i <= 20000000; i++) {
            s = (s * 1103515245L + 12345) % 2147483648L;
            m.computeIfAbsent((int) (s % 1009), k -> new StringBuilder()).append((char) (97 + s % 26));
            if (i % 2000000 == 0) {
                long sum = 0;
                for (StringBuilder b : m.values()) { sum = sum * 31 + b.length(); if (b.length() > 20000) b.setLength(10); }
                System.out.println(i + " " + sum);
            }
        }
        Thread t = new Thread(() -> System.out.println("thread"));
        t.start();
        t.join();
    }
}
"#;

const SHELL: &str = r#"
i=0 s=1 word=
while [ $i -lt 150000 ]; do
    s=$(( (s * 1103515245 + 12345) % 2147483648 ))
    case $s in *7) word=${word}7 ;; *77*) word=x$word ;; esac
    [ ${#word} -gt 50 ] && word=${word#????????}
    i=$((i + 1))
    [ $((i % 15000)) -eq 0 ] && echo "$i $s $word"
done
"#;

const AWK: &str = r#"
BEGIN {
    s = 1
    for (i = 1; i <= 3000000; i++) {
        s = (s * 16807) % 2147483647
        n[s % 1009] += i % 13
        if (i % 300000 == 0) {
            t = ""
            for (k = 0; k < 10; k++) t = t " " n[k]
            gsub(/1+/, "<&>", t)
            printf "%d %.0f%s\n", i, s, t
        }
    }
}
"#;

const GNUPLOT: &str = r#"
set terminal dumb 100 40
set samples 20000
set print "-"
do for [k=1:20] { s = 0; do for [i=1:20000] { s = s + cos(i / k) ** 3 / i }; print sprintf("%d %.12f", k, s) }
plot sin(x) * x, cos(x) / x
"#;

const POSTSCRIPT: &str = r#"
/s 1 def
1 1 40 { /round exch def
  1 1 60000 { /i exch def /s s 16807 mul 2147483647 cvi pop dup 127773 idiv pop 16807 mod i add 2147483 mod def } for
  round =only ( ) print s =
} for
quit
"#;

const FORTH_DC: &str = "[la 1103515245 * 12345 + 2147483648 % sa lb 1 + d sb 50000 % 0 =p lb 1200000 >m]sm [la p sx]sp 1 sa 0 sb lmx la p";

const BC: &str = "scale = 500\nfor (i = 1; i < 7; i++) { i; a(1 / i) * 4; e(i / 7); s(i) }\n";

const NO_ARGS: &[&str] = &[];

macro_rules! row {
    ($name:ident, $program:expr) => {
        Row {
            name: stringify!($name),
            program: || $program,
        }
    };
}

pub const ROWS: &[Row] = &[
    row!(python3, Program::real("python3", &["-c", PYTHON])),
    row!(perl, Program::real("perl", &["-e", PERL])),
    row!(ruby, Program::real("ruby", &["-e", RUBY])),
    row!(lua, Program::real("lua5.4", &["-e", LUA])),
    row!(tcl, Program::real("tclsh", &["work.tcl"]).file("work.tcl", TCL)),
    row!(node, Program::real("node", &["-e", NODE])),
    row!(java, build::java_class("plain", JAVA)),
    row!(
        java_threads,
        build::java_class("threads", include_str!("programs/Threads.java"))
    ),
    row!(
        node_workers,
        Program::real("node", &["workers.js"])
            .file("workers.js", include_str!("programs/workers.js"))
    ),
    row!(
        ruby_threads,
        Program::real("ruby", &["threads.rb"])
            .file("threads.rb", include_str!("programs/threads.rb"))
    ),
    row!(
        python_asyncio,
        Program::real("python3", &["asyncio_.py"])
            .file("asyncio_.py", include_str!("programs/asyncio.py"))
    ),
    row!(
        perl_alarms,
        Program::real("perl", &["alarms.pl"])
            .file("alarms.pl", include_str!("programs/alarms.pl"))
    ),
    row!(
        bash_traps,
        Program::real("bash", &["traps.bash"])
            .file("traps.bash", include_str!("programs/traps.bash"))
    ),
    row!(
        octave,
        Program::real("octave-cli", &["-q", "work.m"])
            .file("work.m", include_str!("programs/work.m"))
    ),
    row!(
        r_language,
        Program::real("Rscript", &["--vanilla", "work.R"])
            .file("work.R", include_str!("programs/work.R"))
    ),
    row!(
        php,
        Program::real("php", &["work.php"]).file("work.php", include_str!("programs/work.php"))
    ),
    row!(
        guile,
        Program::real("guile", &["--no-auto-compile", "work.scm"])
            .file("work.scm", include_str!("programs/work.scm"))
    ),
    row!(
        ocaml,
        Program::real("ocaml", &["work.ml"]).file("work.ml", include_str!("programs/work.ml"))
    ),
    row!(sqlite3, Program::real("sqlite3", &[":memory:"]).input(sql())),
    row!(bash, Program::real("bash", &["-c", SHELL])),
    row!(dash, Program::real("dash", &["-c", SHELL])),
    row!(gawk, Program::real("gawk", &[AWK])),
    row!(mawk, Program::real("mawk", &[AWK])),
    row!(
        sed,
        Program::real(
            "sed",
            &["-E", "s/([0-9])([0-9]+)([0-9])/\\3\\2\\1/g;s/(word)([0-9]+) (.*)/\\3 \\1-\\2/;/99/{h;s/[a-f]+/<&>/g;G}", "text"]
        )
        .file("text", text(400_000))
    ),
    row!(
        sort,
        Program::real("sort", &["--parallel=2", "-S", "800M", "-k", "2,2", "-k", "1,1r", "text"]).file("text", text(500_000))
    ),
    row!(bc, Program::real("bc", &["-ql"]).input(BC)),
    row!(dc, Program::real("dc", &["-e", FORTH_DC])),
    row!(cc1, build::cc1("-")),
    row!(xz, Program::real("xz", &["-T2", "--block-size=2MiB", "-c", "text"]).file("text", text(150_000))),
    row!(zstd, Program::real("zstd", &["-q", "-17", "-T2", "-c", "text"]).file("text", text(200_000))),
    row!(gzip, Program::real("gzip", &["-9", "-n", "-c", "text"]).file("text", text(500_000))),
    row!(bzip2, Program::real("bzip2", &["-c", "text"]).file("text", text(400_000))),
    row!(
        openssl,
        Program::real(
            "openssl",
            &["enc", "-aes-256-cbc", "-pbkdf2", "-iter", "6000000", "-S", "0011223344556677", "-k", "pass", "-in", "text"]
        )
        .file("text", text(2_000))
    ),
    row!(gnuplot, Program::real("gnuplot", &["work.gp"]).file("work.gp", GNUPLOT)),
    row!(
        ghostscript,
        Program::real("gs", &["-q", "-dNODISPLAY", "-dBATCH", "-dNOPAUSE", "work.ps"]).file("work.ps", POSTSCRIPT)
    ),
    row!(factor, Program::real("factor", NO_ARGS).input(large_numbers())),
    row!(iostream, build::real("iostream.cpp", NO_ARGS)),
    row!(rust, build::real("numbers.rs", NO_ARGS)),
    row!(fortran, build::real("numbers.f90", NO_ARGS)),
];
