//! What a run found, as a Markdown table and as a plot.

use std::fmt::Write as _;

use crate::stats::{Summary, summarise};

/// One measure of all contenders, taken in turns in one run.
#[derive(Debug)]
pub struct Measure {
    /// "Cold start".
    pub title: String,
    /// What was timed, from which event to which.
    pub definition: String,
    /// "ms" or "MiB".
    pub unit: &'static str,
    /// First Caisson, then its peers.
    pub series: Vec<Series>,
}

/// The measurements of one contender.
#[derive(Debug)]
pub struct Series {
    /// "caisson", "qemu microvm".
    pub name: String,
    /// One per run.
    pub values: Vec<f64>,
}

/// Tables of all measures. The ratio is Caisson's median over the peer's: below 1 is better.
pub fn markdown(environment: &[String], measures: &[Measure]) -> String {
    let mut text = String::from("# Benchmark\n\n");
    for line in environment {
        let _ = writeln!(text, "- {line}");
    }
    text.push_str(
        "- Contenders take turns within each run; only ratios of one run mean anything.\n",
    );
    for measure in measures {
        let _ = write!(
            text,
            "\n## {}\n\n{}\n\n| | runs | median, {unit} | p99, {unit} | min | max | caisson's median / this |\n|---|---:|---:|---:|---:|---:|---:|\n",
            measure.title,
            measure.definition,
            unit = measure.unit
        );
        let ours = measure.series.first().and_then(|s| summarise(&s.values));
        for series in &measure.series {
            let Some(summary) = summarise(&series.values) else {
                let _ = writeln!(text, "| {} | 0 | – | – | – | – | – |", series.name);
                continue;
            };
            let Summary {
                count,
                median,
                p99,
                min,
                max,
            } = summary;
            let ratio = match ours {
                Some(ours) if median > 0.0 => format!("{:.2}", ours.median / median),
                _ => "–".into(),
            };
            let _ = writeln!(
                text,
                "| {} | {count} | {median:.1} | {p99:.1} | {min:.1} | {max:.1} | {ratio} |",
                series.name
            );
        }
    }
    text
}

const WIDTH: f64 = 760.0;
const LABEL: f64 = 210.0;
const ROW: f64 = 34.0;
const HEAD: f64 = 54.0;
const COLOURS: [&str; 4] = ["#0a6ebd", "#c2571a", "#5b8c2a", "#7a4fa3"];

/// One panel per measure: a dot per run, a bar at the median, zero at the left.
pub fn svg(measures: &[Measure]) -> String {
    let mut body = String::new();
    let mut top = 10.0;
    for measure in measures {
        let largest = measure
            .series
            .iter()
            .flat_map(|s| s.values.iter().copied())
            .fold(0.0, f64::max);
        let step = tick_step(largest);
        let end = (largest / step).ceil().max(1.0) * step;
        let x = |value: f64| LABEL + value / end * (WIDTH - LABEL - 30.0);
        let rows = measure.series.len() as f64;
        let bottom = top + HEAD + rows * ROW;
        let _ = writeln!(
            body,
            r#"<text x="10" y="{:.1}" class="title">{} ({})</text>"#,
            top + 20.0,
            escape(&measure.title),
            measure.unit
        );
        let mut tick = 0.0;
        while tick <= end * 1.0001 {
            let _ = writeln!(
                body,
                r#"<line x1="{0:.1}" x2="{0:.1}" y1="{1:.1}" y2="{2:.1}" class="grid"/><text x="{0:.1}" y="{3:.1}" class="tick">{4}</text>"#,
                x(tick),
                top + HEAD - 16.0,
                bottom,
                top + HEAD - 20.0,
                tick
            );
            tick += step;
        }
        for (row, series) in measure.series.iter().enumerate() {
            let y = top + HEAD + (row as f64 + 0.5) * ROW;
            let colour = COLOURS[row % COLOURS.len()];
            let _ = writeln!(
                body,
                r#"<text x="{:.1}" y="{:.1}" class="name">{}</text>"#,
                LABEL - 10.0,
                y + 4.0,
                escape(&series.name)
            );
            for value in &series.values {
                let _ = writeln!(
                    body,
                    r#"<circle cx="{:.1}" cy="{y:.1}" r="3.5" fill="{colour}" fill-opacity="0.35"/>"#,
                    x(*value)
                );
            }
            if let Some(summary) = summarise(&series.values) {
                let _ = writeln!(
                    body,
                    r#"<line x1="{0:.1}" x2="{0:.1}" y1="{1:.1}" y2="{2:.1}" stroke="{colour}" stroke-width="3"/>"#,
                    x(summary.median),
                    y - 12.0,
                    y + 12.0
                );
            }
        }
        top = bottom + 20.0;
    }
    format!(
        concat!(
            r#"<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {w} {h:.0}" width="{w}" height="{h:.0}">"#,
            "\n<style>text{{font:12px sans-serif;fill:#222}}.title{{font-weight:bold;font-size:14px}}",
            ".name{{text-anchor:end}}.tick{{text-anchor:middle;fill:#777;font-size:11px}}.grid{{stroke:#ddd}}</style>\n",
            r##"<rect width="100%" height="100%" fill="#fff"/>"##,
            "\n{body}</svg>\n"
        ),
        w = WIDTH,
        h = top,
        body = body
    )
}

/// 1, 2 or 5 times a power of ten, so that an axis has four to ten ticks.
fn tick_step(largest: f64) -> f64 {
    if largest <= 0.0 {
        return 1.0;
    }
    let rough = largest / 5.0;
    let power = 10f64.powf(rough.log10().floor());
    let factor = [1.0, 2.0, 5.0, 10.0]
        .into_iter()
        .find(|factor| power * factor >= rough)
        .unwrap_or(10.0);
    power * factor
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;")
        .replace('<', "&lt;")
        .replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn measure() -> Measure {
        Measure {
            title: "Cold <start>".into(),
            definition: "from here to there".into(),
            unit: "ms",
            series: vec![
                Series {
                    name: "caisson".into(),
                    values: vec![50.0, 40.0, 60.0],
                },
                Series {
                    name: "peer".into(),
                    values: vec![100.0, 100.0, 100.0],
                },
                Series {
                    name: "absent".into(),
                    values: Vec::new(),
                },
            ],
        }
    }

    #[test]
    fn the_table_has_medians_and_ratios() {
        let text = markdown(&["host: x".into()], &[measure()]);
        assert!(text.contains("| caisson | 3 | 50.0 | 60.0 | 40.0 | 60.0 | 1.00 |"));
        assert!(text.contains("| peer | 3 | 100.0 | 100.0 | 100.0 | 100.0 | 0.50 |"));
        assert!(text.contains("| absent | 0 |"));
    }

    #[test]
    fn the_plot_has_a_dot_per_run_and_is_escaped() {
        let svg = svg(&[measure()]);
        assert_eq!(svg.matches("<circle").count(), 6);
        assert!(svg.contains("Cold &lt;start&gt;"));
        assert!(!svg.contains("NaN"));
    }

    #[test]
    fn ticks_are_round_numbers() {
        assert_eq!(tick_step(100.0), 20.0);
        assert_eq!(tick_step(7.0), 2.0);
        assert_eq!(tick_step(0.0), 1.0);
        assert_eq!(tick_step(2400.0), 500.0);
    }
}
