//! The HTTP front end beside a web server: rows by `/v1/kv` against a static file, and rows into the database, one by one.
//!
//! Rounds of all, one after the other, because a machine's pace changes; what is told are medians, and ratios of the same
//! round. Every request in flight has a connection, which is kept.

use super::Plan;
use super::http::Connection;
use super::local;
use super::measure::{Outcome, Tally, Usage, Window, measure};
use super::pace::Pace;
use super::report::Table;
use super::store::{self, Target, Watch};
use super::workload::{Drawer, Op};
use anyhow::{Context, bail, ensure};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use serde_json::{Map, Value, json};
use std::fmt::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// The web server whose processor time is known: that of all processes of this name.
const WEB_SERVER: &str = "nginx";
/// Shards of the database that is written into, and ids of each.
const SHARDS: u64 = 4;
const SHARD_SIZE: u64 = 1 << 40;
/// Copies of each shard, if there are as many servers.
const COPIES: usize = 3;

/// What is measured.
#[derive(Clone, Debug)]
pub struct Wish {
    /// The HTTP listener of the cluster.
    pub http: String,
    /// A static file of a web server, as `http://HOST:PORT/PATH`.
    pub file: Option<String>,
    /// Whether the database of the listener is written into. It is configured anew, and loses what it holds.
    pub database: bool,
    /// How often.
    pub rounds: u32,
}

/// What came out of all rounds.
#[derive(Debug)]
pub struct Findings {
    /// Each thing that was asked for, with its rounds.
    works: Vec<(&'static str, Vec<Outcome>)>,
}

/// What one worker asks for, again and again.
#[derive(Debug)]
enum Wanted {
    File(String),
    Rows(String, Drawer),
    Writes(Arc<AtomicU64>),
}

impl Wanted {
    /// Method, path and body of the next request.
    fn next(&mut self) -> anyhow::Result<(&'static str, String, Vec<u8>)> {
        Ok(match self {
            Self::File(path) => ("GET", path.clone(), vec![]),
            Self::Rows(keyspace, drawer) => match drawer.draw() {
                Op::Get(key) => ("GET", format!("/v1/kv/{keyspace}/{}", String::from_utf8_lossy(&key)), vec![]),
                other => bail!("{other:?} is no read of one row"),
            },
            Self::Writes(next) => ("POST", "/write".into(), row(next.fetch_add(1, Ordering::Relaxed)).into_bytes()),
        })
    }
}

/// A body that writes the row of a number, whose id is new and of another shard than the one before.
fn row(number: u64) -> String {
    let id = number % SHARDS * SHARD_SIZE + number / SHARDS;
    format!(r#"{{"data":[{{"Stud_id":{id},"Stud_name":"name {number}","Stud_marks":"{}"}}]}}"#, number % 101)
}

/// Runs all rounds. The plan says how long, with how many connections, and of which rows.
///
/// # Errors
/// A server cannot be reached, or has not what is asked for.
pub async fn run(target: &Target, wish: &Wish, plan: &Plan) -> anyhow::Result<Findings> {
    let file = wish.file.as_deref().map(split).transpose()?;
    store::load(&[target.connect().await?], plan).await?;
    if wish.database {
        configure(&wish.http).await.context("configuring the database")?;
    }
    let (watch, written) = (Watch::new(target).await?, Arc::new(AtomicU64::new(0)));
    let (mut files, mut rows, mut writes) = (vec![], vec![], vec![]);
    for round in 1..=wish.rounds {
        eprintln!("shkv-bench: round {round} of {}", wish.rounds);
        if let Some((addr, path)) = file {
            let wanted = |_| Ok(Wanted::File(path.into()));
            files.push(work(addr, plan, wanted, async || Ok(web_usage())).await.context("the static file")?);
        }
        let wanted = |seed| {
            let drawer = plan.workload.drawer(SmallRng::seed_from_u64(seed), Arc::default())?;
            Ok(Wanted::Rows(target.keyspace.clone(), drawer))
        };
        rows.push(work(&wish.http, plan, wanted, async || watch.usage().await).await.context("rows")?);
        if wish.database {
            let wanted = |_| Ok(Wanted::Writes(written.clone()));
            writes.push(work(&wish.http, plan, wanted, async || watch.usage().await).await.context("writes")?);
        }
    }
    let all = [("static file, web server", files), ("row, GET /v1/kv", rows), ("row, POST /write", writes)];
    Ok(Findings { works: all.into_iter().filter(|(_, rounds)| !rounds.is_empty()).collect() })
}

/// Address and path of `http://HOST:PORT/PATH`.
fn split(url: &str) -> anyhow::Result<(&str, &str)> {
    let rest = url.strip_prefix("http://").context("a file's address begins with http://")?;
    let slash = rest.find('/').with_context(|| format!("{url} names no file"))?;
    Ok(rest.split_at(slash))
}

fn web_usage() -> Usage {
    Usage { cpu_us: local::cpu_us(WEB_SERVER), ..Usage::default() }
}

/// Configures a database over servers that there are.
async fn configure(addr: &str) -> anyhow::Result<()> {
    let mut admin = Connection::new(addr);
    let told = admin.json("GET", "/rep", &Value::Null).await?;
    let servers = told["message"]["replicas"].as_array().context("no list of servers")?;
    let names: Vec<&str> = servers.iter().filter_map(Value::as_str).take(COPIES).collect();
    let name = |shard: u64| format!("sh{}", shard + 1);
    let shards: Vec<Value> = (0..SHARDS)
        .map(|n| json!({"Stud_id_low": n * SHARD_SIZE, "Shard_id": name(n), "Shard_size": SHARD_SIZE}))
        .collect();
    let kept: Vec<String> = (0..SHARDS).map(name).collect();
    let init = json!({
        "N": names.len(),
        "schema": {"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]},
        "shards": shards,
        "servers": names.iter().map(|server| ((*server).to_owned(), json!(kept))).collect::<Map<_, _>>(),
    });
    admin.json("POST", "/init", &init).await.map(|_| ())
}

async fn work(
    addr: &str,
    plan: &Plan,
    wanted: impl Fn(u64) -> anyhow::Result<Wanted>,
    usage: impl AsyncFn() -> anyhow::Result<Usage>,
) -> anyhow::Result<Outcome> {
    let window = Arc::new(Window::default());
    let mut workers = JoinSet::new();
    let all = u64::from(plan.conns) * u64::from(plan.depth);
    for seed in 0..all {
        let (server, wanted, pace) = (Connection::new(addr), wanted(seed)?, Pace::new(plan.rate, seed, all));
        workers.spawn(ask(server, wanted, pace, window.clone()));
    }
    let outcome = measure(plan, &window, workers, usage).await?;
    ensure!(outcome.ops > 0, "no request of {addr} succeeded");
    Ok(outcome)
}

async fn ask(mut server: Connection, mut wanted: Wanted, mut pace: Pace, window: Arc<Window>) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    while !window.is_over() {
        let (method, path, body) = wanted.next()?;
        let began = pace.begin().await;
        match server.ask(method, &path, "application/json", &body).await {
            Ok(answer) if answer.status == 200 => tally.succeeded(&window, began),
            Ok(answer) => {
                let words = String::from_utf8_lossy(&answer.body);
                tally.failed(&window, &format!("{method} {path}: status {}: {words}", answer.status)).await;
            }
            Err(error) => tally.failed(&window, &format!("{error:#}")).await,
        }
    }
    Ok(tally)
}

/// The middle one; of an even count, the lower of the two.
fn median(mut numbers: Vec<f64>) -> f64 {
    numbers.sort_by(f64::total_cmp);
    numbers.get((numbers.len().max(1) - 1) / 2).copied().unwrap_or(f64::NAN)
}

impl Findings {
    fn of(&self, name: &str) -> Option<&Vec<Outcome>> {
        self.works.iter().find(|(other, _)| other.starts_with(name)).map(|(_, rounds)| rounds)
    }

    /// Rows for one file, in each round: by rate, and by processor time of the servers.
    fn ratios(&self) -> Option<(Vec<f64>, Vec<f64>)> {
        let (files, rows) = (self.of("static file")?, self.of("row, GET")?);
        let pairs = || rows.iter().zip(files);
        let rates = pairs().map(|(row, file)| row.ops_per_sec() / file.ops_per_sec());
        let costs = pairs().map(|(row, file)| file.server_cpu_us_per_op() / row.server_cpu_us_per_op());
        Some((rates.collect(), costs.collect()))
    }

    /// For people: medians of all rounds.
    pub fn text(&self) -> String {
        let heads =
            ["medians of all rounds", "per s", "p50 µs", "p99 µs", "servers' CPU µs", "client's CPU µs", "errors"];
        let mut table = Table::new(&heads);
        for (name, rounds) in &self.works {
            let of = |number: &dyn Fn(&Outcome) -> f64| median(rounds.iter().map(number).collect());
            table.row(vec![
                (*name).to_owned(),
                format!("{:.0}", of(&Outcome::ops_per_sec)),
                format!("{:.0}", of(&|round| round.us(0.5))),
                format!("{:.0}", of(&|round| round.us(0.99))),
                format!("{:.1}", of(&Outcome::server_cpu_us_per_op)),
                format!("{:.1}", of(&Outcome::client_cpu_us_per_op)),
                rounds.iter().map(|round| round.errors).sum::<u64>().to_string(),
            ]);
        }
        let mut text = table.text();
        if let Some((rates, costs)) = self.ratios() {
            let listed = |all: &[f64]| all.iter().map(|one| format!("{one:.2}")).collect::<Vec<_>>().join(" ");
            let rate = format!("{:.2} (rounds: {})", median(rates.clone()), listed(&rates));
            let cost = format!("{:.2} (rounds: {})", median(costs.clone()), listed(&costs));
            let _ =
                writeln!(text, "rows for one file, by rate: {rate}\nrows for one file, by the servers' CPU: {cost}");
        }
        text
    }

    /// For programs: every round.
    pub fn json(&self) -> Value {
        let rounds = |rounds: &Vec<Outcome>| rounds.iter().map(Outcome::json).collect::<Vec<_>>();
        let works: Vec<Value> =
            self.works.iter().map(|(name, all)| json!({"work": name, "rounds": rounds(all)})).collect();
        let ratios = self.ratios().map(|(rates, costs)| json!({"by_rate": rates, "by_server_cpu": costs}));
        json!({"mode": "web", "works": works, "rows_for_one_file": ratios})
    }
}

#[cfg(test)]
mod tests {
    use super::super::http::fake;
    use super::super::workload::Workload;
    use super::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn plan() -> Plan {
        Plan {
            conns: 3,
            depth: 1,
            workload: Workload::ycsb('c', 50).unwrap(),
            rate: None,
            value_bytes: 10,
            load: true,
            warmup: Duration::ZERO,
            measured: Duration::from_millis(100),
        }
    }

    #[test]
    fn every_number_has_a_row_of_its_own_and_shards_take_turns() {
        let ids: Vec<u64> = (0..1_000)
            .map(|number| {
                let body: Value = serde_json::from_str(&row(number)).unwrap();
                body["data"][0]["Stud_id"].as_u64().unwrap()
            })
            .collect();
        assert_eq!(ids.iter().collect::<BTreeSet<_>>().len(), 1_000);
        for four in ids.chunks(SHARDS as usize) {
            let shards: Vec<u64> = four.iter().map(|id| id / SHARD_SIZE).collect();
            assert_eq!(shards, (0..SHARDS).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_files_address_is_split_at_its_path() {
        assert_eq!(split("http://h:1/a/b").unwrap(), ("h:1", "/a/b"));
        assert!(split("h:1/a").is_err());
        assert!(split("http://h:1").is_err());
    }

    #[test]
    fn the_median_is_the_middle_one() {
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0, 3.0, 2.0]), 2.0);
        assert!(median(vec![]).is_nan());
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let rounds = |all: &[u64]| all.iter().map(|ops| Outcome::example(*ops)).collect::<Vec<_>>();
        let works = vec![("static file", rounds(&[100, 200])), ("row, GET", rounds(&[50, 150]))];
        let findings = Findings { works };
        assert_eq!(findings.ratios().unwrap().0, [0.5, 0.75]);
        assert!(findings.text().contains("by rate: 0.50 (rounds: 0.50 0.75)"), "{}", findings.text());
        assert_eq!(Findings { works: vec![] }.json()["rows_for_one_file"], Value::Null);
    }

    #[tokio::test]
    async fn each_wish_asks_what_it_says() {
        let answers = |method: &str, path: &str, body: &[u8]| {
            let is_right = match (method, path) {
                ("GET", "/file") => body.is_empty(),
                ("GET", key) => key.starts_with("/v1/kv/mine/key0000") && body.is_empty(),
                ("POST", "/write") => serde_json::from_slice::<Value>(body).is_ok(),
                _ => false,
            };
            (if is_right { 200 } else { 400 }, b"{}".to_vec())
        };
        let (addr, _) = fake::serve(Arc::new(answers)).await;
        let plan = plan();
        let drawer = || plan.workload.drawer(SmallRng::seed_from_u64(1), Arc::default()).unwrap();
        let usage = async || Ok(Usage { cpu_us: vec![(1, 5)], ..Usage::default() });
        for number in 0..3 {
            let wanted = |_| {
                Ok(match number {
                    0 => Wanted::File("/file".into()),
                    1 => Wanted::Rows("mine".into(), drawer()),
                    _ => Wanted::Writes(Arc::default()),
                })
            };
            let outcome = work(&addr, &plan, wanted, usage).await.unwrap();
            assert_eq!(outcome.errors, 0, "{outcome:?}");
        }
        let wrong = |_| Ok(Wanted::File("/other".into()));
        assert!(work(&addr, &plan, wrong, usage).await.is_err(), "nothing but failures is no measurement");
    }
}
