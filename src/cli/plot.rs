//! `ckpt plot`: a job's history as one self-contained HTML page (no scripts, no
//! network): what its checkpoints have cost and what they stored.

use super::chart::{Bar, Chart, Series};
use super::output;
use super::{Cli, Outcome, select};
use crate::store::RawFs;
use crate::store::history::{self, Entry};
use serde_json::json;
use std::fmt::Write;
use std::process::ExitCode;

/// Print the history of a job's checkpoints as an HTML page
#[derive(Debug, clap::Args)]
pub struct Args {
    /// Key, name or beginning of one [default: the only job there is]
    job: Option<String>,
}

pub fn run(cli: &Cli, args: &Args) -> Outcome {
    let root = select::root(cli)?;
    let job = select::job(&root, args.job.as_deref())?;
    let history = history::read(&RawFs, &job.dir)?;
    if history.is_empty() {
        anyhow::bail!("job {} has no history yet", job.name());
    }
    if cli.json {
        let rows: Vec<_> = history.iter().map(entry_json).collect();
        output::print_json(&json!({ "job": job.name(), "history": rows }));
        return Ok(ExitCode::SUCCESS);
    }
    let command = output::command(&select::cmdline(&job), 200);
    output::print(&page(&job.name(), &command, &history));
    Ok(ExitCode::SUCCESS)
}

fn entry_json(e: &Entry) -> serde_json::Value {
    json!({
        "generation": e.generation, "time": output::time(e.time_ns), "kind": e.kind, "chain": e.chain,
        "stop_us": e.stop_us,
        "stop_parts_us": {
            "park": e.parts_us[0], "collect": e.parts_us[1], "scan": e.parts_us[2],
            "snapshot": e.parts_us[3], "release": e.parts_us[4],
        },
        "precopy_us": e.precopy_us, "persist_us": e.persist_us, "pages_dirty": e.pages,
        "bytes_stored": e.bytes_stored, "bytes_logical": e.bytes_logical,
        "snapshot": e.snapshot, "tracker": e.tracker, "trigger": e.trigger,
    })
}

const PARTS: [(&str, &str); 5] = [
    ("park", "#4c78a8"),
    ("collect", "#f58518"),
    ("scan", "#54a24b"),
    ("copy or fork", "#e45756"),
    ("release", "#b279a2"),
];

fn page(job: &str, command: &str, history: &[Entry]) -> String {
    let label = |e: &Entry| {
        let kind = &e.kind;
        format!(
            "generation {} ({kind}), {}",
            e.generation,
            output::time(e.time_ns)
        )
    };
    let bars = |values: &dyn Fn(&Entry) -> Vec<f64>| -> Vec<Bar> {
        history
            .iter()
            .map(|e| Bar {
                label: label(e),
                values: values(e),
            })
            .collect()
    };
    let one = |name: &'static str, color: &'static str| vec![Series { name, color }];
    let charts = [
        Chart {
            title: "How long the program stood still",
            unit: "ms",
            series: PARTS.map(|(name, color)| Series { name, color }).into(),
            bars: bars(&|e| e.parts_us.iter().map(|&us| us as f64 / 1000.0).collect()),
        },
        Chart {
            title: "Until the generation was durable (the program runs)",
            unit: "ms",
            series: vec![
                Series {
                    name: "copied before the stop",
                    color: "#72b7b2",
                },
                Series {
                    name: "from the stop to the disk",
                    color: "#4c78a8",
                },
            ],
            bars: bars(&|e| vec![e.precopy_us as f64 / 1000.0, e.persist_us as f64 / 1000.0]),
        },
        Chart {
            title: "Modified pages",
            unit: "pages",
            series: one("pages stored", "#54a24b"),
            bars: bars(&|e| vec![e.pages as f64]),
        },
        Chart {
            title: "Stored bytes",
            unit: "MiB",
            series: one("in this generation's image", "#f58518"),
            bars: bars(&|e| vec![e.bytes_stored as f64 / 1048576.0]),
        },
        Chart {
            title: "Chain",
            unit: "increments",
            series: one("on top of a full image", "#b279a2"),
            bars: bars(&|e| vec![f64::from(e.chain)]),
        },
    ];
    let mut out = String::new();
    let _ = write!(
        out,
        "<!DOCTYPE html>\n<html lang=\"en\"><head><meta charset=\"utf-8\">\n\
         <meta name=\"viewport\" content=\"width=device-width\">\n\
         <title>ckpt: {name}</title>\n<style>{STYLE}</style></head>\n<body>\n\
         <h1>{name}</h1>\n<p><code>{command}</code></p>\n{summary}",
        name = escape(job),
        command = escape(command),
        summary = summary(history),
    );
    for chart in &charts {
        out.push_str(&chart.svg());
    }
    out.push_str(&table(history));
    out.push_str("</body></html>\n");
    out
}

/// The value below which `share` of the sorted values lie.
fn quantile(sorted: &[u64], share: f64) -> u64 {
    let at = (sorted.len() as f64 * share).ceil() as usize;
    sorted[at.clamp(1, sorted.len()) - 1]
}

fn summary(history: &[Entry]) -> String {
    let mut stops: Vec<u64> = history.iter().map(|e| e.stop_us).collect();
    stops.sort_unstable();
    let stored: u64 = history.iter().map(|e| e.bytes_stored).sum();
    let full = history.iter().filter(|e| e.kind == "full").count();
    let last = &history[history.len() - 1];
    format!(
        "<p>{} generations, {full} of them full, from {} to {}. \
         Stop: median {}, 99 of 100 below {}, longest {}. \
         Stored {} in all; the last stands for {} of memory. \
         Tracker {}, snapshot {}.</p>\n",
        history.len(),
        output::time(history[0].time_ns),
        output::time(last.time_ns),
        output::micros(quantile(&stops, 0.5)),
        output::micros(quantile(&stops, 0.99)),
        output::micros(quantile(&stops, 1.0)),
        output::size(stored),
        output::size(last.bytes_logical),
        escape(&last.tracker),
        escape(&last.snapshot),
    )
}

/// Rows of the table: the newest ones.
const ROWS: usize = 200;

fn table(history: &[Entry]) -> String {
    let mut out = String::from(
        "<table><thead><tr><th>generation<th>taken<th>kind<th>chain<th>trigger<th>tracker\
         <th>snapshot<th>stop<th>park<th>collect<th>scan<th>copy or fork<th>release\
         <th>before the stop<th>durable after<th>pages<th>stored</tr></thead>\n<tbody>\n",
    );
    for e in history.iter().rev().take(ROWS) {
        let _ = write!(
            out,
            "<tr><td>{}<td>{}<td>{}<td>{}<td>{}<td>{}<td>{}",
            e.generation,
            output::time(e.time_ns),
            escape(&e.kind),
            e.chain,
            escape(&e.trigger),
            escape(&e.tracker),
            escape(&e.snapshot),
        );
        let times = [e.stop_us].into_iter().chain(e.parts_us);
        for us in times.chain([e.precopy_us, e.persist_us]) {
            let _ = write!(out, "<td>{}", output::micros(us));
        }
        let _ = writeln!(
            out,
            "<td>{}<td>{}</tr>",
            e.pages,
            output::size(e.bytes_stored)
        );
    }
    out.push_str("</tbody></table>\n");
    if history.len() > ROWS {
        let _ = writeln!(
            out,
            "<p>The newest {ROWS} of {} generations.</p>",
            history.len()
        );
    }
    out
}

/// For element contents and quoted attributes.
pub(super) fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
        .replace('"', "&quot;")
}

const STYLE: &str = "
:root { color-scheme: light dark; }
body { font: 14px/1.45 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1rem; margin: 1.6rem 0 .3rem; }
svg { width: 100%; height: auto; display: block; }
svg text { font-size: 11px; fill: currentColor; }
.grid { stroke: currentColor; stroke-opacity: .15; }
.key { display: inline-block; width: .7em; height: .7em; margin: 0 .35em 0 1em; }
table { border-collapse: collapse; font-size: 12px; margin-top: 2rem; display: block; overflow-x: auto; }
th, td { padding: .15rem .5rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #8884; }
";

#[cfg(test)]
mod tests {
    use super::*;

    fn history(n: u64) -> Vec<Entry> {
        let entry = |generation| Entry {
            generation,
            time_ns: 1_700_000_000_000_000_000 + generation * 1_000_000_000,
            kind: if generation % 17 == 1 {
                "full"
            } else {
                "increment"
            }
            .into(),
            stop_us: generation * 10,
            parts_us: [generation, 2, 3, 4, 5],
            pages: generation,
            tracker: "<uffd>".into(),
            ..Entry::default()
        };
        (1..=n).map(entry).collect()
    }

    #[test]
    fn a_page_is_whole_and_escaped() {
        for n in [1, 2, 199, 3000] {
            let page = page("a&b", "prog \"<x>\"", &history(n));
            assert!(page.ends_with("</html>\n"));
            assert_eq!(page.matches("<svg").count(), 5);
            assert_eq!(page.matches("</svg>").count(), 5);
            assert!(page.contains("a&amp;b") && !page.contains("<uffd>") && !page.contains("<x>"));
            assert!(!page.contains("NaN") && !page.contains("inf\""));
        }
    }

    #[test]
    fn quantiles() {
        let values: Vec<u64> = (1..=100).collect();
        assert_eq!(quantile(&values, 0.5), 50);
        assert_eq!(quantile(&values, 0.99), 99);
        assert_eq!(quantile(&values, 1.0), 100);
        assert_eq!(quantile(&[7], 0.5), 7);
    }
}
