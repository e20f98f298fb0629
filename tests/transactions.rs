//! Writes that mean one thing, with real processes: transfers between accounts while processes are killed, a coordinator
//! and participants that end at every step, answers that are lost, and input that makes no sense.
//!
//! `SHKV_TRANSACTIONS_SECS` says for how long processes are killed, [`SECS_DEFAULT`] unless it is set.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test waits, and fails where it cannot go on")]

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::Value;
use shkv_client::{Check, Client, ClientConfig, Error};
use shkv_node::Step;
use shkv_tests::judge::bank::{self, Bank, Op};
use shkv_tests::judge::search::{Event, Verdict};
use shkv_tests::proxy::Proxy;
use shkv_tests::{Cluster, PATIENCE, Server, connect, is_whole, until_status};
use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Output, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

const SECS_DEFAULT: u64 = 15;
const ACCOUNTS: usize = 8;
const BALANCE: i64 = 1_000;
const CLIENTS: u64 = 16;
/// Events that are also put into one order; the search for it grows fast.
const ORDERED_EVENTS: usize = 150;

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Three nodes and two balancers, each a process.
struct World {
    data: PathBuf,
    node_addrs: Vec<String>,
    balancer_addrs: Vec<String>,
    nodes: Vec<Option<Server>>,
    balancers: Vec<Option<Server>>,
}

impl World {
    async fn start(data: &Path) -> Self {
        let mut world = Self {
            data: data.to_owned(),
            node_addrs: (0..3).map(|_| free_port()).collect(),
            balancer_addrs: (0..2).map(|_| free_port()).collect(),
            nodes: vec![None, None, None],
            balancers: vec![None, None],
        };
        (0..3).for_each(|at| world.start_node(at, None));
        (0..2).for_each(|at| world.start_balancer(at));
        let client = connect(&world.balancer_addrs[..1]).await;
        until_status(&client, |status| is_whole(status, 3)).await;
        world
    }

    fn start_node(&mut self, at: usize, crash_at: Option<Step>) {
        let (name, data) = (format!("n{at}"), self.data.join(format!("n{at}")));
        let line = ["node", "--name", &name, "--listen", &self.node_addrs[at], "--data", data.to_str().unwrap()];
        let join = ["--join", &self.balancer_addrs[0]];
        let environment: Vec<(&str, &str)> =
            crash_at.map(|step| ("SHKV_TEST_CRASH_AT", step.name())).into_iter().collect();
        let server = Server::try_start_with(binary(), &[&line[..], &join].concat(), &environment).unwrap();
        self.nodes[at] = Some(server);
    }

    fn start_balancer(&mut self, at: usize) {
        let nodes = self.node_addrs.join(",");
        let line = ["balancer", "--nodes", &nodes, "--listen", &self.balancer_addrs[at], "--replace-after", "1h"];
        let bootstrap = ["--bootstrap", "--expect", "3", "--shards", "4"];
        let more: &[&str] = if at == 0 { &bootstrap } else { &[] };
        self.balancers[at] = Some(Server::start(binary(), &[&line[..], more].concat()));
    }

    fn kill_nodes(&mut self) {
        self.nodes.iter_mut().filter_map(Option::take).for_each(Server::kill);
    }
}

fn account(at: usize) -> String {
    format!("account/{at}")
}

/// One transfer, and what it replaced.
struct Transfer {
    marker: String,
    from: (usize, u64),
    to: (usize, u64),
    amount: i64,
    /// `None` while it is unknown.
    done: Option<bool>,
    event: (u64, u64),
}

/// When it began and ended, and what the accounts had.
type ReadOfAll = (u64, u64, Vec<(usize, i64)>);

#[derive(Default)]
struct History {
    transfers: Vec<Transfer>,
    reads: Vec<ReadOfAll>,
    wrong: Vec<String>,
}

struct Teller {
    client: Client,
    number: u64,
    rng: SmallRng,
    began: Instant,
    stop: Arc<AtomicBool>,
    done: Arc<AtomicU64>,
}

impl Teller {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    async fn work(mut self) -> History {
        let mut history = History::default();
        for turn in 0_u64.. {
            if self.stop.load(Ordering::Relaxed) {
                break;
            }
            if turn % 4 == 0 { self.read_all(&mut history).await } else { self.transfer(turn, &mut history).await }
        }
        history
    }

    async fn read_all(&self, history: &mut History) {
        let began = self.now();
        let txn = (0..ACCOUNTS).fold(self.client.txn(), |txn, at| txn.read(account(at)));
        let Ok(done) = txn.commit().await else { return };
        let balances: Vec<(usize, i64)> = done.rows.iter().map(|row| balance(row.as_ref())).enumerate().collect();
        let sum: i64 = balances.iter().map(|(_, balance)| balance).sum();
        if sum != BALANCE * ACCOUNTS as i64 {
            history.wrong.push(format!("a read of all accounts makes {sum}: {balances:?}"));
        }
        history.reads.push((began, self.now(), balances));
    }

    async fn transfer(&mut self, turn: u64, history: &mut History) {
        let from = self.rng.random_range(0..ACCOUNTS);
        let to = (from + self.rng.random_range(1..ACCOUNTS)) % ACCOUNTS;
        let amount = self.rng.random_range(1..20);
        let Ok(seen) = self.client.txn().read(account(from)).read(account(to)).commit().await else { return };
        let (balances, versions): (Vec<i64>, Vec<u64>) =
            seen.rows.iter().map(|row| (balance(row.as_ref()), row.as_ref().unwrap().version)).unzip();
        if balances[0] < amount {
            return;
        }
        let marker = format!("transfer/{}/{turn}", self.number);
        let began = self.now();
        let txn = self
            .client
            .txn()
            .put_if(account(from), (balances[0] - amount).to_string(), Check::Version(versions[0]))
            .put_if(account(to), (balances[1] + amount).to_string(), Check::Version(versions[1]))
            .put_if(&marker, amount.to_string(), Check::Absent);
        let done = match txn.commit().await {
            Ok(_) => Some(true),
            Err(Error::Unknown { .. }) => None,
            Err(Error::Condition { operation: 2, .. }) => {
                history.wrong.push(format!("{marker} is there before it was written"));
                Some(false)
            }
            Err(Error::Condition { .. } | Error::Unavailable { .. }) => Some(false),
            Err(error) => {
                history.wrong.push(format!("{marker}: {error}"));
                Some(false)
            }
        };
        self.done.fetch_add(u64::from(done == Some(true)), Ordering::Relaxed);
        let (from, to) = ((from, versions[0]), (to, versions[1]));
        history.transfers.push(Transfer { marker, from, to, amount, done, event: (began, self.now()) });
    }
}

fn balance(row: Option<&shkv_client::Row>) -> i64 {
    std::str::from_utf8(&row.expect("an account is never removed").value).unwrap().parse().unwrap()
}

/// Resolves what is unknown by its marker, and looks for what cannot be.
async fn judge(client: &Client, history: &mut History) -> (usize, usize) {
    let (mut unknown, mut unknown_done) = (0, 0);
    let mut expected = [BALANCE; ACCOUNTS];
    let mut replaced = BTreeMap::new();
    for transfer in &history.transfers {
        let is_there = client.get(&transfer.marker).deadline(PATIENCE).await.unwrap().is_some();
        match transfer.done {
            None => (unknown, unknown_done) = (unknown + 1, unknown_done + usize::from(is_there)),
            Some(told) if told != is_there => {
                history
                    .wrong
                    .push(format!("{} was told as done: {told}, and its row is there: {is_there}", transfer.marker));
            }
            Some(_) => {}
        }
        if !is_there {
            continue;
        }
        expected[transfer.from.0] -= transfer.amount;
        expected[transfer.to.0] += transfer.amount;
        for version in [transfer.from, transfer.to] {
            if let Some(before) = replaced.insert(version, &transfer.marker) {
                history.wrong.push(format!("{before} and {} have replaced the same row {version:?}", transfer.marker));
            }
        }
    }
    let last = (0..ACCOUNTS).fold(client.txn().deadline(PATIENCE), |txn, at| txn.read(account(at)));
    let found: Vec<i64> = last.commit().await.unwrap().rows.iter().map(|row| balance(row.as_ref())).collect();
    if found != expected {
        history.wrong.push(format!("the accounts have {found:?}, by the transfers that were done {expected:?}"));
    }
    (unknown, unknown_done)
}

/// The first events, whether they can be put into one order.
fn ordered(history: &History) -> Verdict {
    let transfers = history.transfers.iter().filter(|transfer| transfer.done != Some(false)).map(|transfer| {
        let (from, to) = (transfer.from.0, transfer.to.0);
        let op = Op::Transfer { from, to, amount: transfer.amount, done: transfer.done };
        Event { op, from: transfer.event.0, until: transfer.done.map(|_| transfer.event.1) }
    });
    let reads = history.reads.iter().map(|(from, until, found)| Event {
        op: Op::Read(found.clone()),
        from: *from,
        until: Some(*until),
    });
    let mut events: Vec<Event<Op>> = transfers.chain(reads).collect();
    events.sort_by_key(|event| event.from);
    let Some(end) = events.get(ORDERED_EVENTS).map(|event| event.from) else {
        return bank::judge(&Bank(vec![BALANCE; ACCOUNTS]), &events);
    };
    events.truncate(ORDERED_EVENTS);
    // A read that ended later may show what is cut off; a transfer that did may have come before or behind it.
    events.retain(|event| matches!(event.op, Op::Transfer { .. }) || event.until.is_some_and(|until| until < end));
    for event in &mut events {
        if event.until.is_some_and(|until| until >= end)
            && let Op::Transfer { done, .. } = &mut event.op
        {
            (*done, event.until) = (None, None);
        }
    }
    bank::judge(&Bank(vec![BALANCE; ACCOUNTS]), &events)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn money_is_neither_made_nor_lost_while_nodes_and_balancers_are_killed() {
    let secs = std::env::var("SHKV_TRANSACTIONS_SECS").map_or(SECS_DEFAULT, |text| text.parse().unwrap());
    let seed = std::env::var("SHKV_TRANSACTIONS_SEED").map_or(1, |text| text.parse().unwrap());
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::start(folder.path()).await;
    let direct = connect(&world.balancer_addrs).await;
    let config = ClientConfig { through_balancer: true, ..ClientConfig::default() };
    let through = Client::connect_with(world.balancer_addrs.clone(), config).await.unwrap();
    let opening =
        (0..ACCOUNTS).fold(direct.txn().deadline(PATIENCE), |txn, at| txn.put(account(at), BALANCE.to_string()));
    opening.commit().await.unwrap();
    let keyspace = direct.default_keyspace();
    let shards: BTreeSet<Option<u32>> = (0..ACCOUNTS).map(|at| keyspace.shard_of(account(at))).collect();
    assert!(shards.len() > 1 && !shards.contains(&None), "the accounts lie in {shards:?}");

    let (stop, done, began) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)), Instant::now());
    let mut tellers = JoinSet::new();
    for number in 0..CLIENTS {
        let client = if number % 4 == 0 { through.clone() } else { direct.clone() };
        let rng = SmallRng::seed_from_u64(seed * 1_000 + number);
        let teller = Teller { client, number, rng, began, stop: stop.clone(), done: done.clone() };
        tellers.spawn(teller.work());
    }
    let mut rng = SmallRng::seed_from_u64(seed);
    let mut kills = [0, 0];
    while began.elapsed() < Duration::from_secs(secs) {
        tokio::time::sleep(Duration::from_millis(rng.random_range(300..2_000))).await;
        if rng.random_range(0..3) > 0 {
            let at = rng.random_range(0..3);
            world.nodes[at].take().unwrap().kill();
            tokio::time::sleep(Duration::from_millis(rng.random_range(0..1_500))).await;
            world.start_node(at, None);
            kills[0] += 1;
        } else {
            let at = rng.random_range(0..2);
            world.balancers[at].take().unwrap().kill();
            world.start_balancer(at);
            kills[1] += 1;
        }
    }
    // When it is calm again, it goes on.
    let (calm, until) = (done.load(Ordering::Relaxed), Instant::now() + PATIENCE);
    while done.load(Ordering::Relaxed) < calm + 20 {
        assert!(Instant::now() < until, "transfers do not go on");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    stop.store(true, Ordering::Relaxed);
    let mut history = History::default();
    while let Some(one) = tellers.join_next().await {
        let one = one.unwrap();
        history.transfers.extend(one.transfers);
        history.reads.extend(one.reads);
        history.wrong.extend(one.wrong);
    }
    let (unknown, unknown_done) = judge(&direct, &mut history).await;
    let order = ordered(&history);
    println!(
        "seed {seed}: {} transfers done of {}, {unknown} unknown of which {unknown_done} were done, {} reads of all accounts, \
         killed {kills:?} nodes and balancers; the first events: {order:?}",
        done.load(Ordering::Relaxed),
        history.transfers.len(),
        history.reads.len(),
    );
    assert!(history.wrong.is_empty(), "seed {seed}:\n{}", history.wrong.join("\n"));
    assert!(order.is_right(), "seed {seed}: {order:?}");
    assert!(!history.reads.is_empty());
}

/// Keys of several shards.
fn keys_of_several_shards(client: &Client, name: &str) -> Vec<String> {
    let keyspace = client.default_keyspace();
    let mut found = BTreeMap::new();
    for number in 0.. {
        let key = format!("{name}/{number}");
        let shard = keyspace.shard_of(&key).expect("the keyspace is known");
        found.entry(shard).or_insert(key);
        if found.len() == 3 {
            break;
        }
    }
    found.into_values().collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_process_that_ends_at_any_step_of_a_transaction_leaves_no_half_and_no_lock() {
    let folder = tempfile::tempdir().unwrap();
    let mut world = World::start(folder.path()).await;
    let client = connect(&world.balancer_addrs).await;
    client.put("first", "x").deadline(PATIENCE).await.unwrap();
    for step in Step::ALL {
        world.kill_nodes();
        (0..3).for_each(|at| world.start_node(at, Some(*step)));
        let until = Instant::now() + PATIENCE;
        let mut round = 0;
        let (keys, writing) = loop {
            round += 1;
            let keys = keys_of_several_shards(&client, &format!("{}/{round}", step.name()));
            let batch = keys.iter().fold(client.batch().deadline(2 * PATIENCE), |batch, key| batch.put(key, "whole"));
            let writing = tokio::spawn(async move { batch.await });
            while !writing.is_finished() && !world.nodes.iter_mut().flatten().any(Server::has_ended) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            if world.nodes.iter_mut().flatten().any(Server::has_ended) {
                break (keys, writing);
            }
            assert!(Instant::now() < until, "{}: no process came to it", step.name());
        };
        world.kill_nodes();
        (0..3).for_each(|at| world.start_node(at, None));
        let until = Instant::now() + PATIENCE;
        loop {
            let look = keys.iter().fold(client.txn(), |txn, key| txn.read(key)).commit().await;
            if let Ok(look) = &look {
                let found = look.rows.iter().flatten().count();
                assert!(found == 0 || found == keys.len(), "{}: half of a batch, {:?}", step.name(), look.rows);
                if found > 0 {
                    break;
                }
            }
            assert!(Instant::now() < until, "{}: {look:?}", step.name());
        }
        writing.await.unwrap().unwrap_or_else(|error| panic!("{}: {error}", step.name()));
        for key in &keys {
            client.put(key, "free").if_value("whole").deadline(PATIENCE).await.unwrap();
            assert_eq!(&client.get(key).await.unwrap().unwrap().value[..], b"free");
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_answer_is_lost_is_never_done_twice() {
    const WRITERS: u64 = 32;
    const WRITES: u64 = 320; // each, of both kinds: 10,240 in all
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), folder.path(), &["--nodes", "3", "--shards", "4"]);
    let road = Proxy::start_losing_answers(40).await;
    road.lead_to(&cluster.addr());
    let deadline = Duration::from_secs(60);
    let config = ClientConfig { through_balancer: true, deadline, ..ClientConfig::default() };
    let until = Instant::now() + PATIENCE;
    let client = loop {
        match Client::connect_with([road.addr()], config.clone()).await {
            Ok(client) => break client,
            Err(error) => assert!(Instant::now() < until, "{error}"),
        }
    };
    let mut writers = JoinSet::new();
    for writer in 0..WRITERS {
        let client = client.clone();
        writers.spawn(async move {
            let (counter, plain) = (format!("counter/{writer}"), format!("plain/{writer}"));
            let mut versions = vec![];
            let mut counted = client.put(&counter, "0").if_absent().await.unwrap().version;
            versions.push((counter.clone(), counted));
            for number in 1..WRITES / 2 {
                // Nobody else writes this row: were anything done twice, the version would be another.
                counted = client.put(&counter, number.to_string()).if_version(counted).await.unwrap().version;
                versions.push((counter.clone(), counted));
                versions.push((plain.clone(), client.put(&plain, number.to_string()).await.unwrap().version));
            }
            versions.push((plain.clone(), client.put(&plain, "last").await.unwrap().version));
            versions
        });
    }
    let direct = cluster.client().await;
    direct.get("any").await.unwrap();
    let keyspace = direct.default_keyspace();
    let mut by_shard: BTreeMap<u32, Vec<u64>> = BTreeMap::new();
    while let Some(versions) = writers.join_next().await {
        for (key, version) in versions.unwrap() {
            by_shard.entry(keyspace.shard_of(&key).unwrap()).or_default().push(version);
        }
    }
    assert_eq!(by_shard.values().map(Vec::len).sum::<usize>() as u64, WRITERS * WRITES);
    for (shard, mut versions) in by_shard {
        versions.sort_unstable();
        let all: Vec<u64> = (1..=versions.len() as u64).collect();
        assert_eq!(versions, all, "shard {shard}: each write has taken one revision, and none has taken two");
    }
    println!("{} writes, {} connections ended with the loss of an answer", WRITERS * WRITES, road.losses());
    assert!(road.losses() > 10);
}

fn run(cluster: &Cluster, args: &[&str], input: &str) -> Output {
    let mut command = cluster.command(args);
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    child.wait_with_output().unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_makes_no_sense_is_refused_and_changes_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), folder.path(), &["--nodes", "3", "--shards", "4"]);
    let client = cluster.client().await;
    let keys: Vec<String> = (0..20).map(|n| format!("k/{n}")).collect();
    let all = || keys.iter().fold(client.txn(), |txn, key| txn.put(key, "v"));
    let code = |result: Result<_, Error>| result.map(drop).unwrap_err().code().unwrap();
    assert_eq!(code(all().delete("k/7").commit().await), shkv_client::RefusalCode::BatchLimits);
    assert_eq!(code(all().put("", "v").commit().await), shkv_client::RefusalCode::KeyEmpty);
    let missing = all().check("nobody", Check::Version(3)).commit().await;
    assert_eq!(missing, Err(Error::Condition { operation: 20, version: None }));
    assert_eq!(client.count("k/".."k0").await.unwrap(), 0);
    all().commit().await.unwrap();
    let version = client.get("k/7").await.unwrap().unwrap().version;
    let stale = client.batch().put("k/1", "w").put("k/2", "w").delete("k/3");
    stale.await.unwrap();
    let refused =
        client.txn().put("k/1", "x").put("k/2", "x").delete_if("k/7", Check::Version(version + 1)).commit().await;
    assert_eq!(refused, Err(Error::Condition { operation: 2, version: Some(version) }));
    assert_eq!(&client.get("k/1").await.unwrap().unwrap().value[..], b"w");

    let wrong = run(&cluster, &["txn"], r#"[{"op":"read","key":"a"},{"op":"put","key":"b"}]"#);
    assert_eq!(wrong.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&wrong.stderr).contains("operation 1: neither value"));
    let twice = run(&cluster, &["txn"], r#"[{"op":"read","key":"a"},{"op":"delete","key":"a"}]"#);
    assert_eq!(twice.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&twice.stderr).contains("operation 1"));
    let unheld =
        run(&cluster, &["txn", "--output", "json"], r#"[{"op":"put","key":"k/7","value":"x","if_absent":true}]"#);
    assert_eq!(unheld.status.code(), Some(5));
    let told: Value = serde_json::from_slice(&unheld.stderr).unwrap();
    assert_eq!((&told["error"]["kind"], &told["error"]["version"]), (&"condition".into(), &version.into()));
    let ops = r#"[{"op":"check","key":"k/1","if_value":"w"},{"op":"read","key":"k/4"},{"op":"read","key":"none"},{"op":"delete","key":"k/5"}]"#;
    let done = run(&cluster, &["txn", "--output", "json"], ops);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let told: Value = serde_json::from_slice(&done.stdout).unwrap();
    assert_eq!((&told["removed"], &told["rows"][0]["value"]), (&1.into(), &"v".into()));
    assert_eq!(told["rows"][1]["found"], Value::Bool(false));
    assert_eq!(run(&cluster, &["put", "new", "1", "--if-absent"], "").status.code(), Some(0));
    assert_eq!(run(&cluster, &["put", "new", "2", "--if-absent"], "").status.code(), Some(5));
    assert_eq!(run(&cluster, &["del", "new", "--if-value", "2"], "").status.code(), Some(5));
    assert_eq!(run(&cluster, &["del", "new", "--if-value", "1"], "").status.code(), Some(0));
}
