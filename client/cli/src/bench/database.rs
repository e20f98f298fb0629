//! The analyses of a sharded database over HTTP: the same writes and reads with more replicas, and with more servers and
//! shards; then a server that is dropped, and one that takes its place. It configures the listener's database anew.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time")]

use super::analysis::{AsyncActs, Findings, Wish, all, points};
use super::http::Connection;
use super::plot::{Axis, Series, bars};
use super::report::Table;
use anyhow::{Context, ensure};
use serde_json::{Map, Value, json};
use shkv_proto::hashing::key_hash;
use std::time::{Duration, Instant};

/// Ids of each shard.
const SHARD_SIZE: u64 = 4_096;
/// How long a dropped server's rows may take until all can be read again.
const PATIENCE: Duration = Duration::from_secs(60);

/// How the database is laid out.
#[derive(Clone, Debug)]
struct Layout {
    name: &'static str,
    shards: u64,
    servers: Vec<(String, Vec<u64>)>,
}

impl Layout {
    /// Four shards of three replicas on six servers, as the first analysis has them.
    fn first() -> Self {
        let places = [
            ("Server0", [1, 2]),
            ("Server1", [3, 4]),
            ("Server3", [1, 3]),
            ("Server4", [4, 2]),
            ("Server5", [1, 4]),
            ("Server6", [3, 2]),
        ];
        let servers = places.map(|(name, shards)| (name.to_owned(), shards.to_vec())).to_vec();
        Self { name: "4 shards, 6 servers, 3 replicas", shards: 4, servers }
    }

    /// So many replicas of each shard, each server beginning one shard later than the one before.
    fn even(name: &'static str, shards: u64, servers: u64, replicas: u64) -> Self {
        let mut all: Vec<(String, Vec<u64>)> = (0..servers).map(|n| (format!("Server{n}"), vec![])).collect();
        for place in 0..shards * replicas {
            all[(place % servers) as usize].1.push(place / replicas + 1);
        }
        Self { name, shards, servers: all }
    }

    fn init(&self) -> Value {
        let shards: Vec<Value> = (0..self.shards)
            .map(|n| json!({"Stud_id_low": n * SHARD_SIZE, "Shard_id": format!("sh{}", n + 1), "Shard_size": SHARD_SIZE}))
            .collect();
        json!({
            "N": self.servers.len(),
            "schema": {"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]},
            "shards": shards,
            "servers": self.servers.iter().map(|(name, shards)| (name.clone(), named(shards))).collect::<Map<_, _>>(),
        })
    }

    /// The id of so-manieth request: all ids of all shards, each once, in an order that jumps.
    fn id(&self, number: u64) -> u64 {
        let ids = self.shards * SHARD_SIZE;
        // Odd, so that it shares no divisor with a power of two times three at most; five does not divide either.
        number.wrapping_mul(7_919) % ids
    }
}

fn named(shards: &[u64]) -> Value {
    shards.iter().map(|shard| json!(format!("sh{shard}"))).collect()
}

fn row(id: u64) -> Value {
    json!({"Stud_id": id, "Stud_name": format!("name{}", key_hash(&id.to_le_bytes()) % 100_000), "Stud_marks": (id % 101).to_string()})
}

/// Writes one row for each number.
#[derive(Clone)]
struct Writes(Layout);

impl AsyncActs<()> for Writes {
    fn request(&self, number: u64) -> (&'static str, &'static str, Value) {
        ("POST", "/write", json!({"data": [row(self.0.id(number))]}))
    }

    fn answer(&self, answer: &Value) -> anyhow::Result<()> {
        ensure!(answer["status"] == "success", "{answer}");
        Ok(())
    }
}

/// Reads the row of each number.
#[derive(Clone)]
struct Reads(Layout);

impl AsyncActs<()> for Reads {
    fn request(&self, number: u64) -> (&'static str, &'static str, Value) {
        let id = self.0.id(number);
        ("POST", "/read", json!({"Stud_id": {"low": id, "high": id}}))
    }

    fn answer(&self, answer: &Value) -> anyhow::Result<()> {
        let rows = answer["data"].as_array().context("no rows")?;
        ensure!(rows.len() == 1, "a row that was written is not there: {answer}");
        let id = rows[0]["Stud_id"].as_u64().context("a row without an id")?;
        ensure!(rows[0] == row(id), "another row than was written: {answer}");
        Ok(())
    }
}

/// The analyses; they end with the database as the last layout has it.
///
/// # Errors
/// The front end refuses, or what was written is not read.
pub async fn run(findings: &mut Findings, addr: &str, wish: &Wish) -> anyhow::Result<()> {
    let layouts = [
        Layout::first(),
        Layout::even("4 shards, 6 servers, 6 replicas", 4, 6, 6),
        Layout::even("6 shards, 10 servers, 8 replicas", 6, 10, 8),
    ];
    let count = wish.requests.min(4 * SHARD_SIZE);
    let heading = format!("Database: {count} writes, then {count} reads, {} at once", wish.at_once);
    findings.report.heading(&heading);
    let heads = ["layout", "writes s", "reads s", "writes/s", "reads/s", "writes: speed-up", "reads: speed-up"];
    let (mut table, mut told, mut times) = (Table::new(&heads), Vec::new(), Vec::<(f64, f64)>::new());
    let mut admin = Connection::new(addr);
    for layout in &layouts {
        admin.json("POST", "/init", &layout.init()).await.context(layout.name)?;
        let began = Instant::now();
        all(addr, count, wish.at_once, Writes(layout.clone())).await.context(layout.name)?;
        let writes = began.elapsed().as_secs_f64();
        let began = Instant::now();
        all(addr, count, wish.at_once, Reads(layout.clone())).await.context(layout.name)?;
        let reads = began.elapsed().as_secs_f64();
        times.push((writes, reads));
        let (first_writes, first_reads) = times[0];
        let per_sec = |secs: f64| format!("{:.0}", count as f64 / secs);
        let cells = [format!("{writes:.3}"), format!("{reads:.3}"), per_sec(writes), per_sec(reads)];
        let ratios = [format!("{:.2}", first_writes / writes), format!("{:.2}", first_reads / reads)];
        table.row([layout.name.to_owned()].into_iter().chain(cells).chain(ratios).collect());
        told.push(json!({"layout": layout.name, "writes_s": writes, "reads_s": reads}));
    }
    findings.table(&heading, &table);
    let groups: Vec<String> = layouts.iter().map(|layout| layout.name.to_owned()).collect();
    let series = [
        Series { name: "writes".into(), points: points(times.iter().map(|(writes, _)| *writes)) },
        Series { name: "reads".into(), points: points(times.iter().map(|(_, reads)| *reads)) },
    ];
    findings.report.chart(&bars("Time of all", &Axis::linear("s"), &groups, &series));
    findings.json["database"] = json!(told);
    dropped(findings, addr, &layouts[2], count).await
}

/// Takes one server out, and puts another one in its place. All rows must be there all the time.
async fn dropped(findings: &mut Findings, addr: &str, layout: &Layout, count: u64) -> anyhow::Result<()> {
    let mut admin = Connection::new(addr);
    let (name, shards) = layout.servers.first().context("a layout with servers")?;
    let replacement = format!("{name}-new");
    let mut table = Table::new(&["step", "s", "servers", "rows that can be read"]);
    let mut told = Vec::new();
    let remove = json!({"n": 1, "servers": [name]});
    let add = json!({"n": 1, "new_shards": [], "servers": {&replacement: named(shards)}});
    let steps = [
        ("before", None),
        ("one is dropped", Some(("DELETE", "/rm", remove))),
        ("another takes its shards", Some(("POST", "/add", add))),
    ];
    for (step, request) in steps {
        let began = Instant::now();
        if let Some((method, path, body)) = request {
            admin.json(method, path, &body).await.context(step)?;
        }
        let rows = rows_until(&mut admin, layout, count, began).await.context(step)?;
        let secs = began.elapsed().as_secs_f64();
        let status = admin.json("GET", "/status", &Value::Null).await?;
        let servers = status["N"].as_u64().context("no number of servers")?;
        table.row(vec![step.into(), format!("{secs:.3}"), servers.to_string(), rows.to_string()]);
        told.push(json!({"step": step, "secs": secs, "servers": servers, "rows": rows}));
    }
    let status = admin.json("GET", "/status", &Value::Null).await?;
    let mut kept: Vec<&str> =
        status["servers"][&replacement].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    kept.sort_unstable();
    ensure!(kept.len() == shards.len(), "{replacement} keeps {kept:?} instead of {} shards", shards.len());
    let heading = format!("Database: {name} is dropped, and {replacement} takes its place");
    findings.report.heading(&heading);
    findings.table(&heading, &table);
    findings.json["dropped"] = json!(told);
    Ok(())
}

/// Reads the whole range until every row is there.
async fn rows_until(admin: &mut Connection, layout: &Layout, count: u64, since: Instant) -> anyhow::Result<u64> {
    let whole = json!({"Stud_id": {"low": 0, "high": layout.shards * SHARD_SIZE - 1}});
    loop {
        let told = admin.json("POST", "/read", &whole).await;
        match told.as_ref().map(|told| told["data"].as_array().map_or(0, Vec::len) as u64) {
            Ok(rows) if rows == count => return Ok(rows),
            _ => ensure!(since.elapsed() < PATIENCE, "not every row can be read: {told:?}"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::http::fake;
    use super::super::report::Report;
    use super::*;
    use std::collections::{BTreeMap, BTreeSet};
    use std::sync::{Arc, Mutex};

    #[test]
    fn every_layout_has_as_many_replicas_as_it_says() {
        let layouts = [(Layout::first(), 3), (Layout::even("", 4, 6, 6), 6), (Layout::even("", 6, 10, 8), 8)];
        for (layout, replicas) in layouts {
            for shard in 1..=layout.shards {
                let on = layout.servers.iter().filter(|(_, shards)| shards.contains(&shard)).count();
                assert_eq!(on, replicas, "shard {shard} of {layout:?}");
            }
            for (name, shards) in &layout.servers {
                assert_eq!(shards.iter().collect::<BTreeSet<_>>().len(), shards.len(), "{name} has one twice");
            }
            let ids: BTreeSet<u64> = (0..10_000).map(|number| layout.id(number)).collect();
            assert_eq!(ids.len(), 10_000, "each row is written once");
            assert!(ids.iter().all(|id| *id < layout.shards * SHARD_SIZE));
        }
    }

    /// What a front end keeps: rows by id, and servers with their shards.
    #[derive(Default)]
    struct Fake {
        rows: BTreeMap<u64, Value>,
        servers: Map<String, Value>,
    }

    impl Fake {
        fn answer(&mut self, method: &str, path: &str, body: &Value) -> Value {
            match (method, path) {
                ("POST", "/init") => {
                    self.rows.clear();
                    self.servers = body["servers"].as_object().unwrap().clone();
                    assert_eq!(body["N"], self.servers.len());
                }
                ("POST", "/write") => {
                    for row in body["data"].as_array().unwrap() {
                        let before = self.rows.insert(row["Stud_id"].as_u64().unwrap(), row.clone());
                        assert!(before.is_none(), "{row} was there");
                    }
                }
                ("POST", "/read") => {
                    let range = &body["Stud_id"];
                    let range = range["low"].as_u64().unwrap()..=range["high"].as_u64().unwrap();
                    let data: Vec<Value> = self.rows.range(range).map(|(_, row)| row.clone()).collect();
                    return json!({"shards_queried": [], "data": data, "status": "success"});
                }
                ("DELETE", "/rm") => {
                    let name = body["servers"][0].as_str().unwrap();
                    assert!(self.servers.remove(name).is_some());
                }
                ("POST", "/add") => self.servers.extend(body["servers"].as_object().unwrap().clone()),
                ("GET", "/status") => return json!({"N": self.servers.len(), "servers": self.servers}),
                other => panic!("{other:?}"),
            }
            json!({"message": "", "status": "success"})
        }
    }

    #[tokio::test]
    async fn three_layouts_are_timed_and_a_dropped_server_is_replaced() {
        let fake = Mutex::new(Fake::default());
        let answers = move |method: &str, path: &str, body: &[u8]| {
            let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(body).unwrap() };
            (200, fake.lock().unwrap().answer(method, path, &body).to_string().into_bytes())
        };
        let (addr, _) = fake::serve(Arc::new(answers)).await;
        let mut findings = Findings { report: Report::new("t"), text: String::new(), json: json!({}) };
        let wish = Wish { requests: 300, at_once: 5, http: None, database: true };
        run(&mut findings, &addr, &wish).await.unwrap();
        assert_eq!(findings.json["database"].as_array().unwrap().len(), 3);
        let servers: Vec<u64> =
            findings.json["dropped"].as_array().unwrap().iter().filter_map(|step| step["servers"].as_u64()).collect();
        assert_eq!(servers, [10, 9, 10]);
        assert!(findings.text.contains("6 shards, 10 servers, 8 replicas"), "{}", findings.text);
    }
}
