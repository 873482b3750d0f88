//! Bar charts as SVG text, for `ckpt plot`. Pure code.

use super::plot::escape;
use std::fmt::Write;

/// One colour of a stacked bar.
#[derive(Debug)]
pub struct Series {
    pub name: &'static str,
    pub color: &'static str,
}

/// One generation.
#[derive(Debug)]
pub struct Bar {
    pub label: String,
    /// As many as the chart has series.
    pub values: Vec<f64>,
}

#[derive(Debug)]
pub struct Chart {
    pub title: &'static str,
    pub unit: &'static str,
    pub series: Vec<Series>,
    pub bars: Vec<Bar>,
}

const WIDTH: f64 = 1000.0;
const HEIGHT: f64 = 180.0;
const LEFT: f64 = 62.0;
const TOP: f64 = 8.0;
/// More bars than this are drawn as the highest of each group.
const MOST_BARS: usize = 450;

impl Bar {
    fn total(&self) -> f64 {
        self.values.iter().sum()
    }
}

/// The step of about four round lines up to `most`: 1, 2 or 5 times a power of ten.
fn step(most: f64) -> f64 {
    let rough = most / 4.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0].into_iter();
    factor
        .map(|f| f * power)
        .find(|s| *s >= rough)
        .unwrap_or(rough)
}

fn number(value: f64) -> String {
    if value == 0.0 {
        "0".into()
    } else if value >= 100.0 {
        format!("{value:.0}")
    } else if value >= 1.0 {
        format!("{value:.1}")
    } else {
        format!("{value:.3}")
    }
}

impl Chart {
    /// A heading with the key, and the drawing.
    pub fn svg(&self) -> String {
        let mut out = format!("<h2>{} ({})", self.title, self.unit);
        for series in &self.series {
            let _ = write!(
                out,
                "<span class=\"key\" style=\"background:{}\"></span><small>{}</small>",
                series.color, series.name
            );
        }
        let _ = write!(
            out,
            "</h2>\n<svg viewBox=\"0 0 {WIDTH} {}\" role=\"img\" aria-label=\"{}\">",
            HEIGHT + TOP + 8.0,
            self.title
        );
        let group = self.bars.len().div_ceil(MOST_BARS).max(1);
        let drawn: Vec<&Bar> = self
            .bars
            .chunks(group)
            .filter_map(|bars| bars.iter().max_by(|a, b| a.total().total_cmp(&b.total())))
            .collect();
        let highest = drawn.iter().map(|bar| bar.total()).fold(0.0, f64::max);
        let step = step(if highest > 0.0 { highest } else { 1.0 });
        let most = (highest / step).ceil().max(1.0) * step;
        let y = |value: f64| TOP + HEIGHT - value / most * HEIGHT;
        let mut line = 0.0;
        while line <= most * 1.001 {
            let at = y(line);
            let _ = write!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{WIDTH}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text x=\"{}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                at + 4.0,
                number(line)
            );
            line += step;
        }
        let room = (WIDTH - LEFT) / drawn.len().max(1) as f64;
        let width = (room * 0.85).min(40.0);
        for (k, bar) in drawn.iter().enumerate() {
            let x = LEFT + room * (k as f64 + 0.5) - width / 2.0;
            let _ = write!(out, "<g><title>{}", escape(&bar.label));
            for (series, value) in self.series.iter().zip(&bar.values) {
                let _ = write!(out, "\n{}: {} {}", series.name, number(*value), self.unit);
            }
            out.push_str("</title>");
            let mut below = 0.0;
            for (series, value) in self.series.iter().zip(&bar.values) {
                let (top, bottom) = (y(below + value), y(below));
                let _ = write!(
                    out,
                    "<rect x=\"{x:.2}\" y=\"{top:.2}\" width=\"{width:.2}\" height=\"{:.2}\" fill=\"{}\"/>",
                    bottom - top,
                    series.color
                );
                below += value;
            }
            out.push_str("</g>");
        }
        out.push_str("</svg>\n");
        if group > 1 {
            let _ = writeln!(
                out,
                "<p>Each bar is the highest of {group} generations.</p>"
            );
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_round() {
        assert_eq!(step(10.0), 5.0);
        assert_eq!(step(100.0), 50.0);
        assert_eq!(step(7.0), 2.0);
        assert!((step(0.3) - 0.1).abs() < 1e-9);
    }

    #[test]
    fn bars_stay_inside() {
        let bar = |v| Bar {
            label: "x".into(),
            values: vec![v, v],
        };
        let chart = Chart {
            title: "t",
            unit: "u",
            series: vec![
                Series {
                    name: "a",
                    color: "#000",
                },
                Series {
                    name: "b",
                    color: "#111",
                },
            ],
            bars: (0..1000).map(|k| bar(f64::from(k))).collect(),
        };
        let svg = chart.svg();
        let heights = svg
            .split(" y=\"")
            .skip(1)
            .filter_map(|s| s.split('"').next());
        for y in heights.map(|y| y.parse::<f64>().unwrap()) {
            assert!((0.0..=HEIGHT + TOP + 8.0).contains(&y));
        }
        assert!(svg.matches("<rect").count() <= 2 * MOST_BARS);
        assert!(svg.contains("highest of 3"));
    }
}
