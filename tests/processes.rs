//! Real processes on real data: killed, started again, stopped, fed with what they must refuse.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and kills, and fails where it cannot go on"
)]

use rand::{RngExt, SeedableRng};
use shkv_client::Client;
use shkv_proto::codec;
use shkv_proto::link::Link;
use shkv_proto::message::{Consistency, Get, GetDone, Hello, Role};
use shkv_proto::{Frame, Header, KeyspaceId, Kind, ShardId};
use shkv_tests::{Cluster, PATIENCE, are_level, is_alive, nodes, outcome, resident_bytes, signal, until};
use std::collections::{BTreeMap, BTreeSet};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

/// So small that a node that was away for a moment needs a snapshot.
const SMALL: [&str; 8] =
    ["--table-bytes", "512KiB", "--log-segment-bytes", "128KiB", "--log-retain-bytes", "256KiB", "--spawn", "process"];

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

/// Writers, each with keys of its own, that count upwards. What they were told is kept.
struct Writers {
    stop: Arc<AtomicBool>,
    told: Arc<Mutex<Told>>,
    done: Arc<AtomicU64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

/// A key has one writer and counts upwards, so whether reads are linearizable is easy to judge: a read must not give less
/// than was acknowledged or read before it began, unless it gives a value whose write is unknown and may come at any time.
async fn read(client: Client, stop: Arc<AtomicBool>, told: Arc<Mutex<Told>>, seed: u64) {
    let mut rng = rand::rngs::SmallRng::seed_from_u64(seed);
    while !stop.load(Ordering::Relaxed) {
        let chosen = {
            let told = told.lock().unwrap();
            let at = rng.random_range(0..told.keys.len().max(1));
            told.keys.iter().nth(at).map(|(key, (last, _))| (key.clone(), *last.max(told.seen.get(key).unwrap_or(&0))))
        };
        let Some((key, floor)) = chosen else {
            tokio::time::sleep(Duration::from_millis(5)).await;
            continue;
        };
        let Ok(row) = client.get(&key).deadline(Duration::from_secs(3)).await else { continue };
        let value = row.map_or(0, |row| counted(&row.value));
        let mut told = told.lock().unwrap();
        let may_come_late = told.keys[&key].1.contains(&value) || told.late.contains(&(key.clone(), value));
        assert!(value >= floor || may_come_late, "{key} was {floor}, and then {value} was read");
        let seen = told.seen.entry(key).or_default();
        *seen = value.max(*seen);
        told.reads += 1;
    }
}

/// The number that a value begins with.
fn counted(value: &[u8]) -> u64 {
    std::str::from_utf8(value).unwrap().split(' ').next().unwrap().parse().unwrap()
}

#[derive(Default)]
struct Told {
    /// For each key the last value acknowledged, and the values tried after it whose outcome is unknown.
    keys: BTreeMap<String, (u64, Vec<u64>)>,
    outcomes: BTreeMap<&'static str, u64>,
    /// For each key the highest value read.
    seen: BTreeMap<String, u64>,
    /// Values whose writes are unknown, also after a later one was acknowledged.
    late: BTreeSet<(String, u64)>,
    reads: u64,
}

impl Writers {
    async fn start(cluster: &Cluster, count: usize, told: Arc<Mutex<Told>>) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let done = Arc::new(AtomicU64::new(0));
        let client = cluster.client().await;
        let mut tasks = Vec::new();
        for writer in 0..count {
            let (client, stop, told, done) = (client.clone(), stop.clone(), told.clone(), done.clone());
            tasks.push(tokio::spawn(async move {
                let mut rng = rand::rngs::SmallRng::seed_from_u64(writer as u64);
                while !stop.load(Ordering::Relaxed) {
                    let key = format!("writer{writer}/{}", rng.random_range(0..50));
                    let value = {
                        let mut told = told.lock().unwrap();
                        let (last, unknown) = told.keys.entry(key.clone()).or_default();
                        unknown.last().unwrap_or(last) + 1
                    };
                    let padded = format!("{value} {}", "x".repeat(rng.random_range(0..400)));
                    let result = client.put(&key, padded).deadline(Duration::from_secs(3)).await;
                    let mut told = told.lock().unwrap();
                    *told.outcomes.entry(outcome(&result)).or_default() += 1;
                    let (last, unknown) = told.keys.entry(key.clone()).or_default();
                    match outcome(&result) {
                        "done" => {
                            *last = value;
                            unknown.clear();
                            done.fetch_add(1, Ordering::Relaxed);
                        }
                        "unknown" => {
                            unknown.push(value);
                            told.late.insert((key, value));
                        }
                        _ => {}
                    }
                }
            }));
        }
        for reader in 0..2 {
            tasks.push(tokio::spawn(read(client.clone(), stop.clone(), told.clone(), reader)));
        }
        Self { stop, told, done, tasks }
    }

    async fn write_more(&self, count: u64) {
        let goal = self.done.load(Ordering::Relaxed) + count;
        let deadline = Instant::now() + PATIENCE;
        while self.done.load(Ordering::Relaxed) < goal {
            assert!(Instant::now() < deadline, "writes do not go on");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    async fn stop(self) -> Arc<Mutex<Told>> {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
        self.told
    }
}

/// Every acknowledged write is there, or one that was tried after it and may have been done.
async fn nothing_is_lost(client: &Client, told: &Arc<Mutex<Told>>) {
    let keys = told.lock().unwrap().keys.clone();
    assert!(keys.len() > 20, "too few keys to judge by");
    for (key, (last, unknown)) in keys {
        let row = client.get(&key).deadline(PATIENCE).await.unwrap();
        let value = row.map_or(0, |row| counted(&row.value));
        assert!(
            value == last || unknown.contains(&value),
            "{key} is {value}, acknowledged was {last}, unknown are {unknown:?}"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_node_comes_back_and_nothing_acknowledged_is_lost() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &SMALL);
    let client = cluster.client().await;
    let writers = Writers::start(&cluster, 8, Arc::default()).await;
    let mut longest = Duration::ZERO;
    for victim in 0..3 {
        writers.write_more(300).await;
        let before = until(&client, |_| true).await;
        let process = before[victim].process;
        let killed = Instant::now();
        signal(process, "KILL");
        writers.write_more(20).await;
        longest = longest.max(killed.elapsed());
        let id = before[victim].id;
        let back =
            |nodes: &[shkv_client::NodeStatus]| nodes.iter().any(|node| node.id == id && node.process != process);
        until(&client, back).await;
        writers.write_more(300).await;
    }
    let told = writers.stop().await;
    let after = until(&client, are_level).await;
    nothing_is_lost(&client, &told).await;
    let snapshots: u64 = after.iter().flat_map(|node| &node.replicas).map(|replica| replica.snapshots_installed).sum();
    let told = told.lock().unwrap();
    println!("outcomes {:?}, reads {}, longest pause {longest:?}, snapshots {snapshots}", told.outcomes, told.reads);
    assert!(told.reads > 100, "too few reads to judge by");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_stopped_node_catches_up_by_snapshot_when_its_log_was_given_up() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &SMALL);
    let client = cluster.client().await;
    let writers = Writers::start(&cluster, 8, Arc::default()).await;
    writers.write_more(100).await;
    let victim = nodes(&client).await[0].clone();
    signal(victim.process, "STOP");
    let first = victim.replicas.iter().map(|replica| replica.log_last).max().unwrap();
    let others_gave_up = |nodes: &[shkv_client::NodeStatus]| {
        let others = nodes.iter().filter(|node| node.id != victim.id);
        others.flat_map(|node| &node.replicas).filter(|replica| replica.log_first > first + 1).count() > 4
    };
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = client.status().await.unwrap();
        let answering: Vec<_> = status.nodes.into_iter().filter_map(|(_, node)| node.ok()).collect();
        if others_gave_up(&answering) {
            break;
        }
        assert!(Instant::now() < deadline, "the log is never given up: {answering:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    signal(victim.process, "CONT");
    let caught_up = |nodes: &[shkv_client::NodeStatus]| {
        let node = nodes.iter().find(|node| node.id == victim.id);
        node.is_some_and(|node| node.replicas.iter().any(|replica| replica.snapshots_installed > 0))
    };
    until(&client, caught_up).await;
    let told = writers.stop().await;
    until(&client, are_level).await;
    nothing_is_lost(&client, &told).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn every_process_killed_at_once_keeps_every_acknowledged_write() {
    let data = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(binary(), data.path(), &SMALL);
    let told: Arc<Mutex<Told>> = Arc::default();
    for _ in 0..4 {
        let client = cluster.client().await;
        let processes: Vec<u32> = nodes(&client).await.iter().map(|node| node.process).collect();
        let writers = Writers::start(&cluster, 8, told.clone()).await;
        writers.write_more(400).await;
        cluster.kill_all(&processes);
        writers.stop().await;
        cluster.start_again();
        let client = cluster.client().await;
        nothing_is_lost(&client, &told).await;
    }
    println!("outcomes {:?}", told.lock().unwrap().outcomes);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_signal_to_stop_is_obeyed_in_good_order() {
    for spawn in ["embedded", "process"] {
        let data = tempfile::tempdir().unwrap();
        let mut cluster = Cluster::start(binary(), data.path(), &["--spawn", spawn]);
        let client = cluster.client().await;
        let children: Vec<u32> = nodes(&client).await.iter().map(|node| node.process).collect();
        let writers = Writers::start(&cluster, 4, Arc::default()).await;
        writers.write_more(100).await;
        let status = cluster.terminate();
        assert_eq!(status.code(), Some(0), "{spawn}");
        let told = writers.stop().await;
        if spawn == "process" {
            assert!(children.iter().all(|child| !is_alive(*child)), "a node has outlived it");
        }
        cluster.start_again();
        nothing_is_lost(&cluster.client().await, &told).await;
    }
}

/// The files of a folder, deepest first cut off at `bytes_max` in all.
fn files(folder: &Path, bytes_max: u64, out: &mut Vec<(String, Vec<u8>)>, bytes: &mut u64) {
    let Ok(entries) = std::fs::read_dir(folder) else { return };
    let mut paths: Vec<_> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
    paths.sort();
    for path in paths {
        if *bytes > bytes_max {
            return;
        }
        if path.is_dir() {
            files(&path, bytes_max, out, bytes);
        } else if let Ok(content) = std::fs::read(&path)
            && let Ok(text) = String::from_utf8(content)
        {
            *bytes += text.len() as u64;
            out.push((path.to_string_lossy().into_owned(), text.into_bytes()));
        }
    }
}

/// A real set of rows: the package index if the machine has one, else the sources that cargo keeps.
fn real_rows() -> BTreeMap<String, Vec<u8>> {
    let index = std::process::Command::new("apt-cache")
        .arg("dumpavail")
        .output()
        .map(|output| output.stdout)
        .unwrap_or_default();
    let mut rows = BTreeMap::new();
    for stanza in String::from_utf8_lossy(&index).split("\n\n").filter(|stanza| !stanza.is_empty()).take(20_000) {
        let name = stanza.lines().find_map(|line| line.strip_prefix("Package: ")).unwrap_or_default();
        let version = stanza.lines().find_map(|line| line.strip_prefix("Version: ")).unwrap_or_default();
        rows.insert(format!("pkg/{name}/{version}"), stanza.as_bytes().to_vec());
    }
    if rows.len() < 1_000 {
        let home = std::env::var("CARGO_HOME").unwrap_or_else(|_| format!("{}/.cargo", std::env::var("HOME").unwrap()));
        let (mut found, mut bytes) = (Vec::new(), 0);
        files(&Path::new(&home).join("registry/src"), 12 << 20, &mut found, &mut bytes);
        rows = found.into_iter().map(|(path, content)| (format!("pkg/{path}"), content)).collect();
    }
    rows
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn real_data_comes_back_byte_by_byte() {
    let rows = real_rows();
    assert!(rows.len() > 500, "only {} rows of real data on this machine", rows.len());
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &[]);
    let input = data.path().join("rows.jsonl");
    let mut file = std::io::BufWriter::new(std::fs::File::create(&input).unwrap());
    for (key, value) in &rows {
        let value = std::str::from_utf8(value).unwrap();
        serde_json::to_writer(&mut file, &serde_json::json!({ "key": key, "value": value })).unwrap();
        file.write_all(b"\n").unwrap();
    }
    drop(file);
    let loaded = cluster.command(&["load", input.to_str().unwrap(), "--timeout", "60s"]).output().unwrap();
    assert!(loaded.status.success(), "{}", String::from_utf8_lossy(&loaded.stderr));
    let mut prefixes: Vec<String> =
        rows.keys().step_by(rows.len() / 5).map(|key| key.chars().take(key.len() * 2 / 3).collect()).collect();
    prefixes.push(String::new());
    for prefix in prefixes {
        for reverse in [false, true] {
            let mut args = vec!["range", "--prefix", &prefix, "--output", "jsonl", "--timeout", "60s"];
            if reverse {
                args.push("--reverse");
            }
            let output = cluster.command(&args).output().unwrap();
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            let mut expected: Vec<_> = rows.iter().filter(|(key, _)| key.starts_with(&prefix)).collect();
            if reverse {
                expected.reverse();
            }
            let lines: Vec<&str> = std::str::from_utf8(&output.stdout).unwrap().lines().collect();
            assert_eq!(lines.len(), expected.len(), "prefix {prefix:?}");
            for (line, (key, value)) in lines.iter().zip(expected) {
                let row: serde_json::Value = serde_json::from_str(line).unwrap();
                assert_eq!(row["key"].as_str().unwrap(), key);
                assert!(row["value"].as_str().unwrap().as_bytes() == &value[..], "the value of {key} differs");
            }
        }
    }
    let output = cluster.command(&["count", "--prefix", "pkg/"]).output().unwrap();
    assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), rows.len().to_string());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_connections_cost_little_and_disturb_nobody() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &["--spawn", "process"]);
    let client = cluster.client().await;
    let status = nodes(&client).await;
    let mut targets = vec![(cluster.addr(), cluster.process())];
    for node in cluster.ready()["nodes"].as_array().unwrap() {
        targets.push((node["addr"].as_str().unwrap().to_owned(), node["pid"].as_u64().unwrap() as u32));
    }
    assert_eq!(targets.len(), 1 + status.len());
    for (_, process) in &targets[1..] {
        assert!(resident_bytes(*process) < 60 << 20, "an idle node takes {} bytes", resident_bytes(*process));
    }
    let writers = Writers::start(&cluster, 4, Arc::default()).await;
    let mut rng = rand::rngs::SmallRng::seed_from_u64(1);
    let mut held = Vec::new();
    for (addr, _) in &targets {
        for n in 0..60_usize {
            let mut stream = TcpStream::connect(addr).unwrap();
            let mut bytes: Vec<u8> = (0..rng.random_range(1..3_000)).map(|_| rng.random()).collect();
            match n % 4 {
                0 => bytes = [&[0xff; 4][..], &bytes].concat(), // a frame of four gigabytes
                1 => bytes = [&4_000_u32.to_le_bytes()[..], &bytes[..bytes.len().min(1_000)]].concat(), // half a frame
                _ => {}
            }
            let _ = stream.write_all(&bytes); // it may be cut off already
            held.push(stream);
        }
    }
    writers.write_more(300).await;
    let before = client.get("hostile").await.unwrap();
    assert!(before.is_none());
    for (addr, process) in &targets {
        assert!(is_alive(*process), "{addr} has ended");
        let bytes = resident_bytes(*process);
        assert!(bytes < 200 << 20, "{addr} takes {bytes} bytes");
    }
    let is_closed = |stream: &mut TcpStream| {
        stream.set_read_timeout(Some(Duration::from_millis(1))).unwrap();
        !matches!(stream.read(&mut [0; 1]), Err(error) if error.kind() == std::io::ErrorKind::WouldBlock)
    };
    let closed = held.iter_mut().map(is_closed).filter(|closed| *closed).count();
    assert!(closed > targets.len() * 40, "bytes that are no frame end their connection, only {closed} are closed");
    let told = writers.stop().await;
    assert_eq!(told.lock().unwrap().outcomes.keys().copied().collect::<Vec<_>>(), ["done"]);
}

#[test]
fn what_cannot_be_started_says_why() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &[]);
    let fails = |args: &[&str], says: &[&str]| {
        let output = std::process::Command::new(binary()).args(args).output().unwrap();
        let text = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(!output.status.success(), "{args:?} was started");
        for word in says {
            assert!(text.contains(word), "{args:?} says {text:?}, which lacks {word:?}");
        }
    };
    let other = tempfile::tempdir().unwrap();
    let fresh = other.path().join("fresh");
    let fresh = fresh.to_str().unwrap();
    let ours = data.path().to_str().unwrap();
    let any = ["--http", "127.0.0.1:0"];
    fails(&["up", "--data", ours, "--listen", "127.0.0.1:0", any[0], any[1]], &["in use"]);
    fails(&["up", "--data", fresh, "--listen", &cluster.addr(), any[0], any[1]], &[&cluster.addr(), "in use"]);
    fails(&["up", "--data", "/proc/nowhere", "--listen", "127.0.0.1:0", any[0], any[1]], &["/proc/nowhere"]);
    let few = other.path().join("few");
    fails(&["up", "--nodes", "2", "--replicas", "3", "--data", few.to_str().unwrap()], &["replicas"]);
    fails(&["put", "k", "v", "--addr", &cluster.addr(), "--keyspace", "nope"], &["nope"]);
    fails(&["get", "k", "--addr", "127.0.0.1:1"], &["127.0.0.1:1"]);
    fails(&["put", &"k".repeat(5_000), "v", "--addr", &cluster.addr()], &["4096"]);
    drop(cluster);
    fails(&["up", "--nodes", "5", "--data", ours, "--listen", "127.0.0.1:0", any[0], any[1]], &["3", "5"]);
    // Two clusters must not be mixed.
    let second = tempfile::tempdir().unwrap();
    drop(Cluster::start(binary(), second.path(), &[]));
    std::fs::rename(data.path().join("Server0"), data.path().join("away")).unwrap();
    std::fs::rename(second.path().join("Server0"), data.path().join("Server0")).unwrap();
    fails(&["up", "--data", ours, "--listen", "127.0.0.1:0", any[0], any[1]], &["cluster"]);
}

#[test]
fn a_corrupt_log_is_refused_by_name() {
    let data = tempfile::tempdir().unwrap();
    let mut cluster = Cluster::start(binary(), data.path(), &["--spawn", "process", "--table-bytes", "64MiB"]);
    for n in 0..20 {
        let status = cluster.command(&["put", &format!("key{n}"), "value"]).status().unwrap();
        assert!(status.success());
    }
    assert!(cluster.terminate().success());
    let log = data.path().join("Server1/log");
    let segment = std::fs::read_dir(&log).unwrap().map(|entry| entry.unwrap().path());
    let segment = segment.filter(|path| path.extension().is_some_and(|end| end == "log")).min().unwrap();
    let mut bytes = std::fs::read(&segment).unwrap();
    bytes[4_096 + 40] ^= 1;
    std::fs::write(&segment, bytes).unwrap();
    let node = data.path().join("Server1");
    let args = ["node", "--name", "Server1", "--listen", "127.0.0.1:0", "--data", node.to_str().unwrap()];
    let output = std::process::Command::new(binary()).args(args).output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && text.contains("damaged") && text.contains("Server1"), "{text}");
}

/// A leader that was frozen wakes up with a request to read already in its hands, after another has taken its place.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_was_frozen_does_not_answer_from_its_past() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &["--spawn", "process", "--shards", "1"]);
    let client = cluster.client().await;
    client.put("k", "old").await.unwrap();
    let status = nodes(&client).await;
    let shard = ShardId(1);
    let leads =
        |node: &&shkv_client::NodeStatus| node.replicas.iter().any(|replica| replica.shard == shard && replica.leads);
    let leader = status.iter().find(leads).unwrap();
    let addr = cluster.ready()["nodes"].as_array().unwrap().iter().find(|node| node["pid"] == leader.process).unwrap();
    let link = Link::open(addr["addr"].as_str().unwrap(), Hello::ours(None, Role::Client), |_| Ok(()));
    let deadline = tokio::time::Instant::now() + PATIENCE;
    link.connected(deadline).await.unwrap();
    let keyspace = KeyspaceId(1);
    let get = Get { keyspace, key: b"k", consistency: Consistency::Linearizable };
    let get = Frame::new(Header { shard, ..Header::new(Kind::Get) }, codec::encode(&get).unwrap(), vec![]);
    let (_, value) = link.ask::<GetDone>(get.clone(), deadline).await.unwrap();
    assert_eq!(&value[..], b"old");
    for round in 0..3 {
        signal(leader.process, "STOP");
        let new = format!("new{round}");
        let until_done = Instant::now() + PATIENCE;
        // What is sent to the frozen leader is not answered; what is unknown is the same value, so it may be sent again.
        while let Err(error) = client.put("k", new.clone()).deadline(Duration::from_secs(1)).await {
            assert!(Instant::now() < until_done, "{error}");
        }
        let (sender, answer) = tokio::sync::oneshot::channel();
        link.submit(get.clone(), deadline, move |result| drop(sender.send(result))).await;
        signal(leader.process, "CONT");
        let answer = answer.await.unwrap().unwrap();
        if answer.header.kind == Kind::Done {
            assert_eq!(&answer.tail[..], new.as_bytes(), "a deposed leader answered");
        }
        until(&client, are_level).await;
    }
}
