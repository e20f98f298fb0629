//! Batches over several shards on three nodes in one process: done wholly or not at all, once, whoever crashes when.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use bytes::Bytes;
use common::shards::{FIRST, SECOND, Shards, THIRD, again, first_time, put, shard_of};
use common::{KEYSPACE, PATIENCE, everything, refusal, small};
use shkv_node::{Step, Steps, Tuning};
use shkv_proto::link::{CallError, Link, LinkError, done_or_failure};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Condition, Consistency, CountDone, Failure, Finish, FinishDone, Get, GetDone,
    NodeStatus, Prepare, PrepareDone, RefusalCode, Resolve, ResolveDone, RowRead, Scan, ScanDone, TxnId, Write,
    WriteDone, WriteId,
};
use shkv_proto::{Frame, Header, Kind, codec};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;
use tokio::sync::Notify;
use tokio::task::JoinSet;
use tokio::time::Instant;

fn read(key: &str) -> BatchOp<'_> {
    BatchOp::Read { key: key.as_bytes() }
}

fn check<'a>(key: &'a str, condition: Condition<'a>) -> BatchOp<'a> {
    BatchOp::Check { key: key.as_bytes(), condition }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_over_three_shards_reads_checks_and_writes_in_one_step() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    shards.put("apple", "old-a").await;
    let version = shards.put("kiwi", "old-k").await;
    shards.put("zebra", "old-z").await;
    let ops = [
        put("pear", "new-p"),
        read("zebra"),
        put("lime", "new-l"),
        read("apple"),
        check("kiwi", Condition::Version(version)),
        BatchOp::Delete { key: b"berry", condition: Condition::Absent },
        read("nothing"),
        put("aloe", "new-a"),
    ];
    let told = shards.batch(&ops, "new-pnew-lnew-a", None).await;
    assert_eq!(&told.values[..], b"old-zold-a");
    let row = |version| Some(RowRead { version, value_bytes: 5 });
    assert_eq!(told.done.rows, [row(1), row(1), None]);
    assert_eq!(told.done.removed, 0);
    assert_eq!(told.done.revisions, [(FIRST, 3), (SECOND, 2), (THIRD, 2)]);
    for (key, value) in [("pear", "new-p"), ("lime", "new-l"), ("aloe", "new-a"), ("kiwi", "old-k")] {
        assert_eq!(shards.get(key).await.as_deref(), Some(value), "{key}");
    }
    // One whose condition does not hold, in whichever shard, does nothing and says which.
    let ops = [put("apple", "x"), put("pear", "y"), check("kiwi", Condition::Absent)];
    let failed = shards.try_batch(&ops, "xy", None).await.unwrap_err();
    assert_eq!(failed, CallError::Failure(Failure::Condition { operation: 2, version: Some(version) }));
    let ops = [put("pear", "y"), check("apple", Condition::Absent), put("kiwi", "x")];
    let failed = shards.try_batch(&ops, "yx", None).await.unwrap_err();
    assert_eq!(failed, CallError::Failure(Failure::Condition { operation: 1, version: Some(1) }));
    assert_eq!(shards.get("pear").await.as_deref(), Some("new-p"));
    assert_eq!(shards.get("apple").await.as_deref(), Some("old-a"));
    shards.put("kiwi", "free").await; // no lock is left
    shards.put("pear", "free").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_comes_twice_is_done_once_and_answered_alike() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    shards.put("kiwi", "0").await;
    let ops = [read("kiwi"), put("apple", "1"), put("pear", "2")];
    let id = first_time(7, 1);
    let told = shards.batch(&ops, "12", Some(id)).await;
    shards.put("apple", "between").await;
    shards.put("kiwi", "between").await;
    assert_eq!(shards.batch(&ops, "12", Some(again(id))).await, told);
    assert_eq!(shards.get("apple").await.as_deref(), Some("between"));
    // A new leader answers the same.
    let to = (shards.leader(FIRST).await + 1) % 3;
    shards.give(FIRST, to).await;
    assert_eq!(shards.batch(&ops, "12", Some(again(id))).await, told);
    assert_eq!(shards.get("apple").await.as_deref(), Some("between"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_cannot_be_is_refused_before_anything_is_written() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    let cases: [(&[BatchOp<'_>], &str, RefusalCode, &str); 4] = [
        (&[put("a", "1"), put("z", "2"), put("a", "3")], "123", RefusalCode::BatchLimits, "operation 2"),
        (&[put("a", "1"), put("", "2")], "12", RefusalCode::KeyEmpty, "operation 1"),
        (&[put("a", "1"), put("z", "2")], "1", RefusalCode::Malformed, "1 bytes"),
        (&[put("a", "1"), read("z"), check("z", Condition::Present)], "1", RefusalCode::BatchLimits, "operation 2"),
    ];
    for (ops, values, code, text) in cases {
        let error = shards.try_batch(ops, values, None).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(refusal(error), code);
    }
    assert_eq!(shards.get("a").await, None);
    // Only nodes take part in each other's transactions.
    let txn = TxnId { shard: FIRST, term: 1, number: 1 };
    let told = shards.attempt::<FinishDone>(SECOND, Kind::Finish, &Finish { txn, commit: true }, b"").await;
    assert_eq!(refusal(told.unwrap_err()), RefusalCode::NotAllowed);
    let prepare = Prepare { txn, keyspace: KEYSPACE, ops: vec![put("k", "")] };
    let told = shards.attempt::<PrepareDone>(SECOND, Kind::Prepare, &prepare, b"").await;
    assert_eq!(refusal(told.unwrap_err()), RefusalCode::NotAllowed);
    let told = shards.attempt::<ResolveDone>(FIRST, Kind::Resolve, &Resolve { txn }, b"").await;
    assert_eq!(refusal(told.unwrap_err()), RefusalCode::NotAllowed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_costs_two_entries_of_each_of_several_shards_and_one_of_a_single_one() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    let last = |status: &NodeStatus| status.replicas.iter().map(|replica| replica.log_last).collect::<Vec<_>>();
    let ops = [put("a", "1"), put("k", "2"), put("z", "3")];
    shards.batch(&ops, "123", None).await;
    shards.put("a", "settled").await; // behind whatever the batch has left to do
    let before = last(&shards.introduce().await[0]);
    shards.batch(&ops, "123", None).await;
    let deadline = Instant::now() + PATIENCE;
    let after = loop {
        let after = last(&shards.introduce().await[0]);
        // The decision is let go behind the answer.
        if after[0] >= before[0] + 2 || Instant::now() >= deadline {
            break after;
        }
    };
    let costs: Vec<u64> = after.iter().zip(&before).map(|(after, before)| after - before).collect();
    assert_eq!(costs, [2, 2, 2], "decided and let go; prepared and finished");
    shards.batch(&[put("a", "1"), put("b", "2"), read("c")], "12", None).await;
    assert_eq!(last(&shards.introduce().await[0]), [after[0] + 1, after[1], after[2]]);
}

/// Stops a coordinator at a step, when it is set up for one.
#[derive(Clone, Default)]
struct Trap {
    at: Arc<Mutex<Option<Step>>>,
    sprung: Arc<Notify>,
}

impl Trap {
    fn steps(&self) -> Steps {
        let trap = self.clone();
        Steps::with_hook(move |step| {
            let mut at = trap.at.lock().unwrap();
            let is_it = *at == Some(step);
            if is_it {
                *at = None;
                trap.sprung.notify_one();
            }
            is_it
        })
    }

    /// Sends a batch whose coordinator goes no further than a step; tells where it ran.
    async fn catch(&self, shards: &mut Shards, step: Step, ops: &[BatchOp<'_>], values: &str, id: WriteId) -> usize {
        *self.at.lock().unwrap() = Some(step);
        let deadline = Instant::now() + PATIENCE;
        loop {
            let leader = shards.leader(FIRST).await;
            let sprung = tokio::select! {
                () = self.sprung.notified() => true,
                told = shards.try_batch(ops, values, Some(id)) => {
                    assert!(told.is_err() || step == Step::AfterLetGo, "it went through: {told:?}");
                    assert!(Instant::now() < deadline, "{step:?} is never reached; last: {told:?}");
                    if told.is_ok() {
                        self.sprung.notified().await;
                    }
                    told.is_ok() || self.at.lock().unwrap().is_none()
                }
            };
            if sprung {
                return leader;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

const COORDINATOR: [Step; 6] = [
    Step::BeforePrepare,
    Step::BeforeDecide,
    Step::DecideProposed,
    Step::AfterDecide,
    Step::BeforeLetGo,
    Step::AfterLetGo,
];

async fn trapped() -> (Trap, Shards) {
    let trap = Trap::default();
    let shards = Shards::new(3, small(), trap.steps()).await;
    (trap, shards)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_the_coordinator_crashes_a_retried_batch_is_done_once() {
    let (trap, mut shards) = trapped().await;
    for (n, step) in (1..).zip(COORDINATOR) {
        let keys = [format!("a{n}"), format!("k{n}"), format!("z{n}")];
        let ops = [put(&keys[0], "1"), put(&keys[1], "2"), put(&keys[2], "3")];
        let id = first_time(5, n);
        let crashed = trap.catch(&mut shards, step, &ops, "123", id).await;
        shards.group.crash(crashed);
        let told = shards.batch(&ops, "123", Some(again(id))).await;
        shards.put(&keys[1], "after").await;
        assert_eq!(shards.batch(&ops, "123", Some(again(id))).await, told, "{step:?}");
        for (key, value) in keys.iter().zip(["1", "after", "3"]) {
            assert_eq!(shards.get(key).await.as_deref(), Some(value), "{step:?}: {key}");
        }
        // Each was written once: a shard's revision counts its mutations.
        let revisions: Vec<u64> = told.done.revisions.iter().map(|(_, revision)| *revision).collect();
        assert_eq!(revisions, [n, 2 * n - 1, n], "{step:?}");
        shards.restart(crashed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wherever_the_coordinator_crashes_a_batch_is_done_wholly_or_not_at_all() {
    let (trap, mut shards) = trapped().await;
    for (n, step) in (1..).zip(COORDINATOR) {
        let keys = [format!("a{n}"), format!("k{n}"), format!("z{n}")];
        let ops = [put(&keys[0], "1"), put(&keys[1], "2"), put(&keys[2], "3")];
        let crashed = trap.catch(&mut shards, step, &ops, "123", first_time(5, n)).await;
        shards.group.crash(crashed);
        // From the last to the first: a reader that came before the others finds them no further on.
        let mut there = vec![];
        for key in keys.iter().rev() {
            there.push(shards.get(key).await.is_some());
        }
        match step {
            Step::BeforePrepare | Step::BeforeDecide => assert_eq!(there, [false; 3], "{step:?}"),
            Step::DecideProposed => assert!(there == [false; 3] || there == [true; 3], "{there:?}"),
            _ => assert_eq!(there, [true; 3], "{step:?}"),
        }
        for key in &keys {
            shards.put(key, "free").await;
        }
        shards.restart(crashed).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_meets_a_lock_waits_for_what_was_decided() {
    let (trap, mut shards) = trapped().await;
    shards.put("kiwi", "old").await;
    shards.put("lime", "old").await;
    let ops = [put("apple", "new"), put("kiwi", "new"), put("lime", "new")];
    trap.catch(&mut shards, Step::AfterDecide, &ops, "newnewnew", first_time(5, 1)).await;
    // The coordinator says no more; its decision is in its shard.
    assert_eq!(shards.get("kiwi").await.as_deref(), Some("new"));
    let ops = [put("apple", "two"), put("kiwi", "two"), put("lime", "two")];
    trap.catch(&mut shards, Step::AfterDecide, &ops, "twotwotwo", first_time(5, 2)).await;
    let scan = |start: &str| Scan { start: start.into(), rows_max: 0, ..everything() };
    let (page, values) = shards.until_done::<ScanDone>(SECOND, Kind::Scan, &scan("i"), b"").await;
    assert_eq!((page.rows.len(), &values[..]), (2, &b"twotwo"[..]));
    let ops = [put("apple", "3"), put("kiwi", "3"), put("mango", "3")];
    trap.catch(&mut shards, Step::AfterDecide, &ops, "333", first_time(5, 3)).await;
    let counted = shards.until_done::<CountDone>(SECOND, Kind::Count, &scan("i"), b"").await.0;
    assert_eq!(counted.rows, 3, "with the row that was decided");
    // A write comes behind the batch that holds its key.
    let ops = [put("apple", "4"), put("kiwi", "4")];
    trap.catch(&mut shards, Step::AfterDecide, &ops, "44", first_time(5, 4)).await;
    let write =
        Write { keyspace: KEYSPACE, key: b"kiwi", condition: Condition::Value(b"4"), id: Some(first_time(6, 1)) };
    shards.attempt::<WriteDone>(SECOND, Kind::Put, &write, b"5").await.unwrap();
    assert_eq!(shards.get("kiwi").await.as_deref(), Some("5"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lock_of_a_batch_under_way_is_waited_for_until_the_deadline_and_not_longer() {
    let (trap, mut shards) = trapped().await;
    shards.put("kiwi", "old").await;
    let ops = [put("apple", "new"), put("kiwi", "new")];
    let coordinator = trap.catch(&mut shards, Step::BeforeDecide, &ops, "newnew", first_time(5, 1)).await;
    let leader = shards.leader(SECOND).await;
    shards.give(THIRD, leader).await;
    let get = |consistency| Get { keyspace: KEYSPACE, key: b"kiwi", consistency };
    let ask = |head: Vec<u8>, kind, tail: &'static [u8]| {
        let link = shards.group.nodes[leader].as_ref().unwrap().1.clone();
        let frame = Frame::new(Header { shard: SECOND, ..Header::new(kind) }, head, tail);
        async move { link.call(frame, Instant::now() + Duration::from_millis(600)).await.map(done_or_failure) }
    };
    // The row as it was is told to those who may see an old one.
    let told = ask(codec::encode(&get(Consistency::Eventual)).unwrap(), Kind::Get, b"").await.unwrap().unwrap();
    assert_eq!(&told.tail[..], b"old");
    // A page of several shards waits for no lock, but tells nothing that it hides.
    let page = |consistency| Scan { with: vec![THIRD], consistency, ..everything() };
    let told = ask(codec::encode(&page(Consistency::Eventual)).unwrap(), Kind::Scan, b"").await.unwrap().unwrap();
    assert_eq!(&told.tail[..], b"old");
    let told = ask(codec::encode(&page(Consistency::Linearizable)).unwrap(), Kind::Scan, b"").await.unwrap();
    assert!(matches!(&told, Err(Failure::Busy { text, .. }) if text.contains("transaction")), "{told:?}");
    let write = Write { keyspace: KEYSPACE, key: b"kiwi", condition: Condition::Always, id: None };
    let (read, written) = tokio::join!(
        ask(codec::encode(&get(Consistency::Linearizable)).unwrap(), Kind::Get, b""),
        ask(codec::encode(&write).unwrap(), Kind::Put, b"x"),
    );
    for told in [read, written] {
        // The answer and the asker's own deadline run against each other.
        assert!(matches!(told, Ok(Err(Failure::Busy { .. })) | Err(LinkError::Expired)), "{told:?}");
    }
    let met = shards.try_batch(&[put("apple", "x"), put("kiwi", "x")], "xx", None).await.unwrap_err();
    assert!(matches!(met, CallError::Failure(Failure::Aborted { .. })), "{met}");
    // Another leader knows that nothing was decided, and nothing will be.
    shards.give(FIRST, (coordinator + 1) % 3).await;
    assert_eq!(shards.get("kiwi").await.as_deref(), Some("old"));
    assert_eq!(shards.get("apple").await, None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_and_locks_survive_a_restart_of_everybody() {
    let (trap, mut shards) = trapped().await;
    let write = Write { keyspace: KEYSPACE, key: b"kiwi", condition: Condition::Absent, id: Some(first_time(9, 1)) };
    let first: WriteDone = shards.until_done(SECOND, Kind::Put, &write, b"once").await.0;
    let ops = [put("apple", "1"), put("pear", "1")];
    let done = shards.batch(&ops, "11", Some(first_time(9, 2))).await;
    let locked = [put("avocado", "2"), put("zebra", "2")];
    trap.catch(&mut shards, Step::AfterDecide, &locked, "22", first_time(9, 3)).await;
    // More than the table holds: what is remembered goes to the disk, and the log behind it is let go.
    for n in 0..600 {
        let key = format!("{}{n:04}", ["b", "m", "y"][n % 3]);
        shards.put(&key, &"v".repeat(2_000)).await;
    }
    let flushed =
        |status: &NodeStatus| status.replicas.iter().all(|replica| replica.flushed > 3 && replica.log_first > 3);
    let deadline = Instant::now() + PATIENCE;
    while !shards.introduce().await.iter().all(flushed) {
        assert!(Instant::now() < deadline, "it is never flushed");
        tokio::time::sleep(Duration::from_millis(20)).await;
        shards.put("zzz", &"v".repeat(20_000)).await;
        shards.put("azz", &"v".repeat(20_000)).await;
        shards.put("kzz", &"v".repeat(20_000)).await;
    }
    for at in 0..3 {
        shards.group.crash(at);
    }
    for at in 0..3 {
        shards.restart(at).await;
    }
    let retry = Write { id: Some(again(first_time(9, 1))), ..write };
    assert_eq!(shards.until_done::<WriteDone>(SECOND, Kind::Put, &retry, b"once").await.0, first);
    assert_eq!(shards.batch(&ops, "11", Some(again(first_time(9, 2)))).await, done);
    assert_eq!(shards.get("zebra").await.as_deref(), Some("2"));
    assert_eq!(shards.get("avocado").await.as_deref(), Some("2"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn outcomes_travel_with_a_snapshot() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    let late = (shards.leader(SECOND).await + 1) % 3;
    shards.group.crash(late);
    let write = Write { keyspace: KEYSPACE, key: b"kiwi", condition: Condition::Absent, id: Some(first_time(9, 1)) };
    let first: WriteDone = shards.until_done(SECOND, Kind::Put, &write, b"once").await.0;
    let deadline = Instant::now() + PATIENCE;
    let of_second =
        |status: &NodeStatus| status.replicas.iter().any(|r| r.shard == SECOND && r.leads && r.log_first > 10);
    let mut n = 0;
    while !shards.introduce().await.iter().any(of_second) {
        assert!(Instant::now() < deadline, "the log is never let go");
        n += 1;
        shards.put(&format!("m{n}"), &"v".repeat(10_000)).await;
    }
    shards.restart(late).await;
    let here = shards.group.ids[late];
    let caught_up = |status: &NodeStatus| {
        status.id == here && status.replicas.iter().any(|r| r.shard == SECOND && r.snapshots_installed > 0)
    };
    while !shards.introduce().await.iter().any(caught_up) {
        assert!(Instant::now() < deadline, "no snapshot is taken in");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    shards.give(SECOND, late).await;
    let retry = Write { id: Some(again(first_time(9, 1))), ..write };
    assert_eq!(shards.until_done::<WriteDone>(SECOND, Kind::Put, &retry, b"once").await.0, first);
}

const ACCOUNTS: [&str; 9] = ["a1", "a2", "a3", "k1", "k2", "k3", "z1", "z2", "z3"];
const OPENING: u64 = 100;
const CLIENTS: u64 = 4;
const TRANSFERS: u64 = 25;

/// A client with its own connections, which sends a batch again until its outcome is known.
struct Teller {
    links: Vec<Link>,
    client: u64,
    luck: u64,
}

impl Teller {
    fn roll(&mut self, sides: usize) -> usize {
        self.luck ^= self.luck << 13;
        self.luck ^= self.luck >> 7;
        self.luck ^= self.luck << 17;
        (self.luck >> 11) as usize % sides
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &mut self,
        key: &str,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> Result<(T, Bytes), Failure> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let at = self.roll(self.links.len());
            let header = Header { shard: shard_of(key), ..Header::new(kind) };
            let frame = Frame::new(header, codec::encode(head).unwrap(), tail.to_vec());
            match self.links[at].ask(frame, Instant::now() + Duration::from_secs(1)).await {
                Ok(answer) => return Ok(answer),
                Err(CallError::Failure(failure @ (Failure::Refusal { .. } | Failure::Condition { .. }))) => {
                    return Err(failure);
                }
                Err(error) => assert!(Instant::now() < deadline, "no answer; last: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }

    /// Moves money between accounts of several shards, each of which must hold what was read. Returns whether it was done.
    async fn transfer(&mut self, sequence: u64) -> bool {
        let from = ACCOUNTS[self.roll(9)];
        let to = ACCOUNTS[self.roll(9)];
        if from == to {
            return false;
        }
        let mut balances = vec![];
        for key in [from, to] {
            let get = Get { keyspace: KEYSPACE, key: key.as_bytes(), consistency: Consistency::Linearizable };
            let (_, value) = self.ask::<GetDone>(key, Kind::Get, &get, b"").await.unwrap();
            balances.push(String::from_utf8(value.to_vec()).unwrap());
        }
        let amount = self.roll(7) as u64;
        let Some(less) = balances[0].parse::<u64>().unwrap().checked_sub(amount) else { return false };
        let (less, more) = (less.to_string(), (balances[1].parse::<u64>().unwrap() + amount).to_string());
        let change = |key: &'static str, value: &str, before| BatchOp::Put {
            key: key.as_bytes(),
            value_bytes: value.len() as u32,
            condition: Condition::Value(before),
        };
        let ops = vec![change(from, &less, balances[0].as_bytes()), change(to, &more, balances[1].as_bytes())];
        let lowest = if shard_of(from) <= shard_of(to) { from } else { to };
        let began = Instant::now();
        let mut attempt = 0;
        let deadline = began + PATIENCE;
        loop {
            // It is asked by the teller itself, so that its age is told each time.
            attempt += 1;
            let age_ms = if attempt == 1 { 0 } else { began.elapsed().as_millis().max(1) as u32 };
            let id = Some(WriteId { client: self.client, sequence, answered: sequence - 1, age_ms });
            let batch = Batch { keyspace: KEYSPACE, ops: ops.clone(), id };
            let at = self.roll(self.links.len());
            let header = Header { shard: shard_of(lowest), ..Header::new(Kind::Batch) };
            let frame = Frame::new(header, codec::encode(&batch).unwrap(), format!("{less}{more}").into_bytes());
            match self.links[at].ask::<BatchDone>(frame, Instant::now() + Duration::from_secs(1)).await {
                Ok(_) => return true,
                Err(CallError::Failure(Failure::Condition { .. })) => return false,
                Err(CallError::Failure(failure @ Failure::Refusal { .. })) => panic!("{failure}"),
                Err(error) => assert!(Instant::now() < deadline, "it is never done; last: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn transfers_keep_their_sum_while_coordinators_stop_and_leaders_change() {
    let steps = Arc::new(AtomicU64::new(0));
    let stopped = Arc::new(AtomicU64::new(0));
    let hook = {
        let (steps, stopped) = (steps.clone(), stopped.clone());
        // One step of so many is the last of its coordinator, never the same kind for long.
        move |_| {
            let stops = steps.fetch_add(1, Ordering::Relaxed) % 41 == 40;
            stopped.fetch_add(u64::from(stops), Ordering::Relaxed);
            stops
        }
    };
    let tuning = Tuning { threads: 2, ..small() };
    let mut shards = Shards::new(3, tuning, Steps::with_hook(hook)).await;
    for key in ACCOUNTS {
        shards.put(key, &OPENING.to_string()).await;
    }
    let links: Vec<Link> = shards.group.nodes.iter().flatten().map(|(_, link)| link.clone()).collect();
    let mut tellers = JoinSet::new();
    for client in 1..=CLIENTS {
        let mut teller = Teller { links: links.clone(), client, luck: client << 33 | 0x9e37_79b9 };
        tellers.spawn(async move {
            let mut done = 0;
            for sequence in 1..=TRANSFERS {
                done += u64::from(teller.transfer(sequence).await);
            }
            done
        });
    }
    let mut done = 0;
    let mut turn = 0;
    while !tellers.is_empty() {
        tokio::select! {
            finished = tellers.join_next() => done += finished.map_or(0, Result::unwrap),
            () = tokio::time::sleep(Duration::from_millis(300)) => {
                // What a coordinator that was stopped holds is let go by the next leader.
                turn += 1;
                let shard = [FIRST, SECOND, THIRD][turn % 3];
                let to = (shards.leader(shard).await + 1) % 3;
                shards.give(shard, to).await;
            }
        }
    }
    for shard in [FIRST, SECOND, THIRD] {
        let to = (shards.leader(shard).await + 1) % 3;
        shards.give(shard, to).await;
    }
    let mut sum = 0;
    for key in ACCOUNTS {
        sum += shards.get(key).await.unwrap().parse::<u64>().unwrap();
    }
    assert_eq!(sum, OPENING * ACCOUNTS.len() as u64, "money was made or lost");
    assert!(done > 10 && stopped.load(Ordering::Relaxed) > 2, "{done} done, {stopped:?} coordinators stopped");
}
