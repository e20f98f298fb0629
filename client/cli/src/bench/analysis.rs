//! How evenly requests are spread over servers, and what moves when one goes: the analyses of a load balancer with
//! consistent hashing, of every pair of hash functions, and if there is one, of a running cluster's `/home`.

use super::database;
use super::http::Connection;
use super::plot::{Axis, Series, bars, lines};
use super::report::{Report, Table};
use anyhow::Context;
use serde_json::{Value, json};
use shkv_proto::hashing::key_hash;
use shkv_proto::ring::{Functions, Rendezvous, SlotRing, Spread};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// Servers of the first analysis.
const SERVERS: u64 = 3;
/// Numbers of servers that are compared.
const RANGE: std::ops::RangeInclusive<u64> = 2..=6;
/// Each way to choose a server, and its functions on the ring of slots.
const WAYS: [(&str, Option<Functions>); 5] = [
    ("quadratic", Some(Functions::Quadratic)),
    ("large quadratic", Some(Functions::LargeQuadratic)),
    ("SHA-256", Some(Functions::Sha256)),
    ("XXH3", Some(Functions::Xxh3)),
    ("rendezvous", None),
];

/// What is analysed.
#[derive(Clone, Debug)]
pub struct Wish {
    /// Requests of each analysis.
    pub requests: u64,
    /// Requests under way at the same time.
    pub at_once: u32,
    /// A running cluster's HTTP listener.
    pub http: Option<String>,
    /// Whether the database of that listener may be configured anew.
    pub database: bool,
}

/// What came out, for people who read a report and for programs.
#[derive(Debug)]
pub struct Findings {
    /// The report.
    pub report: Report,
    /// Tables for a terminal.
    pub text: String,
    /// The numbers.
    pub json: Value,
}

impl Findings {
    /// A table with a heading, everywhere.
    pub fn table(&mut self, heading: &str, table: &Table) {
        self.report.table(table);
        self.text.push_str(&format!("{heading}\n{}\n", table.text()));
    }
}

/// Analyses what is wished.
///
/// # Errors
/// The cluster cannot be reached, or refuses.
pub async fn run(wish: &Wish) -> anyhow::Result<Findings> {
    let mut findings = Findings { report: Report::new("shkv: analyses"), text: String::new(), json: json!({}) };
    spreads(&mut findings, wish.requests)?;
    if let Some(addr) = &wish.http {
        home(&mut findings, addr, wish).await?;
        if wish.database {
            database::run(&mut findings, addr, wish).await?;
        }
    }
    Ok(findings)
}

/// Numbers of six digits, always the same ones.
fn requests(count: u64) -> Vec<u64> {
    (0..count).map(|n| 100_000 + key_hash(&n.to_le_bytes()) % 900_000).collect()
}

fn spread(functions: Option<Functions>, servers: u64, requests: &[u64]) -> anyhow::Result<Spread> {
    Ok(match functions {
        None => Spread::of(Rendezvous::default, servers, requests)?,
        Some(functions) => Spread::of(|| SlotRing::new(functions), servers, requests)?,
    })
}

/// The pure analyses.
fn spreads(findings: &mut Findings, count: u64) -> anyhow::Result<()> {
    let requests = requests(count);
    let heading = format!("Load balancer: {count} requests to {SERVERS} servers");
    findings.report.heading(&heading);
    let mut table = Table::new(&["functions", "server 1", "server 2", "server 3", "mean", "deviation"]);
    let (mut told, mut shares) = (Vec::new(), Vec::new());
    for (name, functions) in WAYS {
        let spread = spread(functions, SERVERS, &requests)?;
        let mut cells = vec![name.to_owned()];
        cells.extend(spread.counts.iter().map(u64::to_string));
        cells.extend([format!("{:.1}", count as f64 / SERVERS as f64), format!("{:.1}", spread.deviation())]);
        table.row(cells);
        told.push(json!({"functions": name, "counts": spread.counts, "deviation": spread.deviation()}));
        shares.push(Series { name: name.into(), points: points(spread.counts.iter().map(|count| *count as f64)) });
    }
    findings.table(&heading, &table);
    let groups: Vec<String> = (1..=SERVERS).map(|server| format!("server {server}")).collect();
    findings.report.chart(&bars("Requests per server", &Axis::linear("requests"), &groups, &shares));
    findings.json["spread"] = json!(told);

    let heading = format!("Load balancer: {count} requests to {} to {} servers", RANGE.start(), RANGE.end());
    findings.report.heading(&heading);
    let mut table =
        Table::new(&["functions", "servers", "least", "mean", "most", "deviation", "moved if one drops", "its share"]);
    let (mut told, mut deviations, mut moved) = (Vec::new(), Vec::new(), Vec::new());
    for (name, functions) in WAYS {
        let (mut deviation, mut moves) = (Vec::new(), Vec::new());
        for servers in RANGE {
            let spread = spread(functions, servers, &requests)?;
            let mean = count as f64 / servers as f64;
            let own = spread.counts.last().copied().unwrap_or(0);
            table.row(vec![
                name.into(),
                servers.to_string(),
                spread.counts.iter().min().copied().unwrap_or(0).to_string(),
                format!("{mean:.1}"),
                spread.counts.iter().max().copied().unwrap_or(0).to_string(),
                format!("{:.1}", spread.deviation()),
                spread.moved_by_remove.to_string(),
                own.to_string(),
            ]);
            deviation.push((servers as f64, spread.deviation()));
            moves.push((servers as f64, spread.moved_by_remove as f64));
            told.push(json!({
                "functions": name, "servers": servers, "counts": spread.counts, "mean": mean,
                "deviation": spread.deviation(), "moved_by_drop": spread.moved_by_remove,
            }));
        }
        deviations.push(Series { name: name.into(), points: deviation });
        moved.push(Series { name: name.into(), points: moves });
    }
    findings.table(&heading, &table);
    let marks = RANGE.map(|servers| (servers as f64, servers.to_string())).collect();
    let axis = Axis { marks, ..Axis::linear("servers") };
    let of = |title: &str, series: &[Series]| lines(title, &axis, &Axis::linear("requests"), series);
    findings.report.chart(&of("Standard deviation of the requests per server", &deviations));
    findings.report.text("When the last server drops, only what it had should move: its replacement, under the same number, gets it back.");
    findings.report.chart(&of("Requests that move when the last server drops", &moved));
    findings.json["servers"] = json!(told);
    Ok(())
}

/// Heights, one for each group.
pub fn points(heights: impl Iterator<Item = f64>) -> Vec<(f64, f64)> {
    (0..).map(f64::from).zip(heights).collect()
}

/// Does `count` things, so many at once, each by `act` with its number and a connection of its doer's own.
///
/// # Errors
/// The first that failed.
pub async fn all<T: Send + 'static>(
    addr: &str,
    count: u64,
    at_once: u32,
    act: impl AsyncActs<T>,
) -> anyhow::Result<Vec<T>> {
    let next = Arc::new(AtomicU64::new(0));
    let mut doers = JoinSet::new();
    for _ in 0..u64::from(at_once).min(count) {
        let (next, act, mut server) = (next.clone(), act.clone(), Connection::new(addr));
        doers.spawn(async move {
            let mut done = Vec::new();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return anyhow::Ok(done);
                }
                let request = act.request(number);
                let answer = server.json(request.0, request.1, &request.2).await?;
                done.push(act.answer(&answer)?);
            }
        });
    }
    let mut done = Vec::new();
    while let Some(doer) = doers.join_next().await {
        done.extend(doer.context("a doer")??);
    }
    Ok(done)
}

/// What [`all`] does with each number.
pub trait AsyncActs<T>: Clone + Send + 'static {
    /// Method, path and body of its request.
    fn request(&self, number: u64) -> (&'static str, &'static str, Value);
    /// What is kept of its answer.
    ///
    /// # Errors
    /// The answer is not what it should be.
    fn answer(&self, answer: &Value) -> anyhow::Result<T>;
}

/// Asks for a greeting, and keeps who greeted.
#[derive(Clone)]
struct Greeting;

impl AsyncActs<String> for Greeting {
    fn request(&self, _: u64) -> (&'static str, &'static str, Value) {
        ("GET", "/home", Value::Null)
    }

    fn answer(&self, answer: &Value) -> anyhow::Result<String> {
        let words = answer["message"].as_str().context("no message")?;
        Ok(words.rsplit(':').next().unwrap_or(words).trim().to_owned())
    }
}

/// The requests per server of a running cluster.
async fn home(findings: &mut Findings, addr: &str, wish: &Wish) -> anyhow::Result<()> {
    let replicas = Connection::new(addr).json("GET", "/rep", &Value::Null).await?;
    let servers = replicas["message"]["N"].as_u64().context("no number of replicas")?;
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for server in all(addr, wish.requests, wish.at_once, Greeting).await? {
        *counts.entry(server).or_default() += 1;
    }
    let mean = wish.requests as f64 / servers.max(1) as f64;
    let silent = servers.saturating_sub(counts.len() as u64) as f64 * mean * mean;
    let squares: f64 = counts.values().map(|count| (*count as f64 - mean).powi(2)).sum::<f64>() + silent;
    let deviation = (squares / servers.max(1) as f64).sqrt();
    let heading = format!("Running cluster: {} requests for /home over {servers} servers", wish.requests);
    findings.report.heading(&heading);
    let mut table = Table::new(&["server", "requests", "mean", "deviation of all"]);
    for (server, count) in &counts {
        table.row(vec![server.clone(), count.to_string(), format!("{mean:.1}"), format!("{deviation:.1}")]);
    }
    findings.table(&heading, &table);
    let groups: Vec<String> = counts.keys().cloned().collect();
    let series = [Series { name: "requests".into(), points: points(counts.values().map(|count| *count as f64)) }];
    findings.report.chart(&bars("Requests per server", &Axis::linear("requests"), &groups, &series));
    findings.json["home"] = json!({"servers": servers, "counts": counts, "deviation": deviation});
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::super::http::fake;
    use super::*;

    fn wish(http: Option<String>) -> Wish {
        Wish { requests: 1_000, at_once: 7, http, database: false }
    }

    #[tokio::test]
    async fn every_way_is_analysed_for_every_number_of_servers() {
        let findings = run(&wish(None)).await.unwrap();
        let all = findings.json["servers"].as_array().unwrap();
        assert_eq!(all.len(), WAYS.len() * 5);
        for one in all {
            let counts: Vec<u64> = one["counts"].as_array().unwrap().iter().filter_map(Value::as_u64).collect();
            assert_eq!(counts.iter().sum::<u64>(), 1_000);
            assert_eq!(one["moved_by_drop"].as_u64(), counts.last().copied(), "{one}: only the dropped server's move");
        }
        let html = findings.report.finish();
        assert_eq!(html.matches("<svg").count(), 3);
        assert!(html.contains("SHA-256") && findings.text.contains("rendezvous"));
    }

    #[tokio::test]
    async fn greetings_are_counted_by_server_and_a_silent_server_counts_as_none() {
        let next = AtomicU64::new(0);
        let answers = move |_: &str, path: &str, _: &[u8]| {
            let told = match path {
                "/rep" => json!({"message": {"N": 3, "replicas": ["a", "b", "c"]}, "status": "successful"}),
                _ => {
                    let server = 1 + u64::from(next.fetch_add(1, Ordering::Relaxed).is_multiple_of(4));
                    json!({"message": format!("Hello from Server: {server}"), "status": "successful"})
                }
            };
            (200, told.to_string().into_bytes())
        };
        let (addr, connections) = fake::serve(Arc::new(answers)).await;
        let findings = run(&wish(Some(addr))).await.unwrap();
        assert_eq!(findings.json["home"]["counts"], json!({"1": 750, "2": 250}));
        let expected =
            ((750.0_f64 - 1_000.0 / 3.0).powi(2) + (250.0_f64 - 1_000.0 / 3.0).powi(2) + (1_000.0_f64 / 3.0).powi(2))
                / 3.0;
        assert!((findings.json["home"]["deviation"].as_f64().unwrap() - expected.sqrt()).abs() < 1e-6);
        assert_eq!(connections.load(Ordering::Relaxed), 8, "one for /rep, and one for each at once");
    }
}
