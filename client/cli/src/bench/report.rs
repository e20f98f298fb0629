//! A report: one HTML file that holds its tables and charts and loads nothing. Pure.

use super::measure::Outcome;
use super::plot::{Axis, Series, bars, escaped, lines};
use std::fmt::Write;

/// Quantiles of the chart of latencies.
const QUANTILES: [f64; 10] = [0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 0.995, 0.999, 1.0];
const STYLE: &str = ":root{color-scheme:light dark}body{font:15px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;\
color:#1d2126;background:#fff}table{border-collapse:collapse;margin:1rem 0;display:block;overflow-x:auto}\
th,td{padding:.25rem .7rem;border-bottom:1px solid #8886;text-align:right;white-space:nowrap}th:first-child,td:first-child{text-align:left}\
@media (prefers-color-scheme:dark){body{color:#e6e8eb;background:#16191d}}";

/// What was done in one run of the loop, and who did how well: ourselves first.
#[derive(Clone, Debug)]
pub struct Work {
    /// The work in few words.
    pub name: String,
    /// Each system with what came out.
    pub outcomes: Vec<(String, Outcome)>,
}

/// A table: its heads, and its rows.
#[derive(Clone, Debug, Default)]
pub struct Table {
    heads: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// One without rows.
    pub fn new(heads: &[&str]) -> Self {
        Self { heads: heads.iter().map(|head| (*head).into()).collect(), rows: Vec::new() }
    }

    /// One row more.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// For a terminal: columns of equal width.
    pub fn text(&self) -> String {
        let all = || [&self.heads].into_iter().chain(&self.rows);
        let width = |at: usize| all().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max().unwrap_or(0);
        let mut text = String::new();
        for row in all() {
            let mut line = String::new();
            for (at, cell) in row.iter().enumerate() {
                let (width, gap) = (width(at), if at == 0 { "" } else { "  " });
                let _ = if at == 0 { write!(line, "{cell:<width$}") } else { write!(line, "{gap}{cell:>width$}") };
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    fn html(&self) -> String {
        let row = |cells: &[String], tag: &str| {
            let cells = cells.iter().map(|cell| format!("<{tag}>{}</{tag}>", escaped(cell)));
            format!("<tr>{}</tr>", cells.collect::<String>())
        };
        let rows: String = self.rows.iter().map(|cells| row(cells, "td")).collect();
        format!("<table><thead>{}</thead><tbody>{rows}</tbody></table>", row(&self.heads, "th"))
    }
}

/// What a chart shows of an outcome.
type Number = fn(&Outcome) -> f64;

/// A report that is being written.
#[derive(Debug)]
pub struct Report {
    html: String,
}

impl Report {
    /// One with a title only.
    pub fn new(title: &str) -> Self {
        let title = escaped(title);
        let html = format!(
            "<!doctype html>\n<html lang=\"en\"><head><meta charset=\"utf-8\"><meta name=\"viewport\" \
             content=\"width=device-width\"><title>{title}</title><style>{STYLE}</style></head><body><h1>{title}</h1>\n"
        );
        Self { html }
    }

    /// A heading.
    pub fn heading(&mut self, words: &str) {
        let _ = writeln!(self.html, "<h2>{}</h2>", escaped(words));
    }

    /// A paragraph.
    pub fn text(&mut self, words: &str) {
        let _ = writeln!(self.html, "<p>{}</p>", escaped(words));
    }

    /// A table.
    pub fn table(&mut self, table: &Table) {
        let _ = writeln!(self.html, "{}", table.html());
    }

    /// A chart, as SVG.
    pub fn chart(&mut self, svg: &str) {
        let _ = writeln!(self.html, "<figure>{svg}</figure>");
    }

    /// Works that were measured: a table of all, bars, and of each the course in time and the latencies.
    pub fn works(&mut self, works: &[Work]) {
        self.table(&table(works));
        let (names, systems) = (works.iter().map(|work| work.name.clone()).collect::<Vec<_>>(), systems(works));
        let drawn: [(&str, Axis, Number); 4] = [
            ("Throughput", Axis::log("operations/s"), Outcome::ops_per_sec),
            ("Latency, median", Axis::log("µs"), |outcome| outcome.us(0.5)),
            ("Latency, 99th percentile", Axis::log("µs"), |outcome| outcome.us(0.99)),
            ("Processor time of all servers", Axis::linear("µs per operation"), Outcome::server_cpu_us_per_op),
        ];
        for (title, axis, number) in drawn {
            let of = |system: &String| {
                let height = |work: &Work| {
                    let found = work.outcomes.iter().find(|(name, _)| name == system);
                    (0.0, found.map_or(f64::NAN, |(_, outcome)| number(outcome)))
                };
                Series { name: system.clone(), points: works.iter().map(height).collect() }
            };
            self.chart(&bars(title, &axis, &names, &systems.iter().map(of).collect::<Vec<_>>()));
        }
        for work in works {
            self.heading(&work.name);
            self.chart(&lines(
                "Throughput in time",
                &Axis::linear("s"),
                &Axis::linear("operations/s"),
                &work.series(Outcome::rates),
            ));
            let nines = |quantile: f64| if quantile >= 1.0 { 10_000.0 } else { 1.0 / (1.0 - quantile) };
            let marked = [(0.0, "0"), (0.5, "50 %"), (0.9, "90 %"), (0.99, "99 %"), (0.999, "99.9 %"), (1.0, "max")];
            let marks = marked.map(|(quantile, words)| (nines(quantile), words.to_owned())).to_vec();
            let axis = Axis { marks, ..Axis::log("part of the operations that took no longer") };
            let points = |outcome: &Outcome| QUANTILES.map(|quantile| (nines(quantile), outcome.us(quantile))).to_vec();
            self.chart(&lines("Latency", &axis, &Axis::log("µs"), &work.series(points)));
        }
    }

    /// The whole file.
    pub fn finish(mut self) -> String {
        self.html.push_str("</body></html>\n");
        self.html
    }
}

impl Work {
    fn series(&self, points: impl Fn(&Outcome) -> Vec<(f64, f64)>) -> Vec<Series> {
        let one = |(name, outcome): &(String, Outcome)| Series { name: name.clone(), points: points(outcome) };
        self.outcomes.iter().map(one).collect()
    }
}

/// All systems of all works, each once, in their order.
fn systems(works: &[Work]) -> Vec<String> {
    let mut all: Vec<String> = Vec::new();
    for (name, _) in works.iter().flat_map(|work| &work.outcomes) {
        if !all.contains(name) {
            all.push(name.clone());
        }
    }
    all
}

/// One row for each outcome, with its ratio to the first of its work.
pub fn table(works: &[Work]) -> Table {
    let mut table = Table::new(&[
        "work",
        "system",
        "op/s",
        "ratio",
        "p50 µs",
        "p90 µs",
        "p99 µs",
        "p99.9 µs",
        "max µs",
        "errors",
        "server µs/op",
        "client µs/op",
        "syncs/op",
        "wire B/op",
        "memory MiB",
        "log MiB",
    ]);
    for work in works {
        let first = work.outcomes.first().map_or(0.0, |(_, outcome)| outcome.ops_per_sec());
        for (system, outcome) in &work.outcomes {
            let us = |quantile| format!("{:.0}", outcome.us(quantile));
            let cells = [
                work.name.clone(),
                system.clone(),
                format!("{:.0}", outcome.ops_per_sec()),
                format!("{:.3}", first / outcome.ops_per_sec().max(f64::MIN_POSITIVE)),
                us(0.5),
                us(0.9),
                us(0.99),
                us(0.999),
                us(1.0),
                outcome.errors.to_string(),
                format!("{:.1}", outcome.server_cpu_us_per_op()),
            ];
            table.row(cells.into_iter().chain(outcome.costs()).collect());
        }
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_holds_what_was_measured_and_loads_nothing() {
        let works = [Work {
            name: "put 16 × 16".into(),
            outcomes: vec![("shkv".into(), Outcome::example(400)), ("redis://<h>".into(), Outcome::example(100))],
        }];
        let mut report = Report::new("A & B");
        report.works(&works);
        let html = report.finish();
        assert_eq!(html.matches("<svg").count(), 6, "four of all, two of the work");
        assert_eq!(html.matches("<tr>").count(), 3);
        assert!(html.contains("<td>400</td>") && html.contains("<td>4.000</td>"), "rate and ratio");
        assert!(html.contains("redis://&lt;h&gt;") && html.contains("<h1>A &amp; B</h1>"));
        for outside in ["src=", "href=", "@import", "url("] {
            assert!(!html.contains(outside), "{outside}");
        }
    }

    #[test]
    fn a_table_on_a_terminal_has_straight_columns() {
        let mut table = Table::new(&["work", "n"]);
        table.row(vec!["a".into(), "1".into()]);
        table.row(vec!["µ longer".into(), "1000".into()]);
        assert_eq!(table.text(), "work         n\na            1\nµ longer  1000\n");
    }
}
