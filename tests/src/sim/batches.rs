//! Clients that send batches over several shards, each with an id by which it is known when it is sent again: a bank, and
//! lists and counters that are read and then written if nobody else has written meanwhile.

use crate::judge::bank::{self, Bank};
use crate::judge::counter::{self, Increments};
use crate::judge::list::{self, Appends};
use crate::judge::search::{Event, Verdict};
use parking_lot::Mutex;
use rand::RngExt;
use shkv_proto::link::{CallError, Link, LinkError};
use shkv_proto::message::{Batch, BatchDone, BatchOp, Condition, Failure, Hello, MapDone, Role, WriteId};
use shkv_proto::route::Routes;
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId, codec, world};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Accounts of the bank, with what each begins with.
const ACCOUNTS: usize = 4;
const BEGINS_WITH: i64 = 100;
/// Bytes of a number in a row.
const NUMBER_BYTES: usize = 8;
/// How long one batch may take, with all its attempts.
const BATCH_TIME_MAX: Duration = Duration::from_secs(4);
/// How long one attempt may take.
const ATTEMPT_TIME_MAX: Duration = Duration::from_millis(900);
/// The keyspace.
const KEYSPACE: &str = "default";
/// Transfers that are judged: the search takes long over many.
const BANK_EVENTS_MAX: usize = 120;

/// What the clients were told.
#[derive(Default)]
pub struct Ledger {
    told: Mutex<Told>,
    /// The order of everything that is called and returns.
    clock: AtomicU64,
    elements: AtomicU64,
    stop: AtomicBool,
    workers: AtomicU64,
}

#[derive(Default)]
struct Told {
    bank: Vec<Event<bank::Op>>,
    appends: Appends,
    increments: Increments,
    done: u64,
}

/// What became of a batch.
enum Became {
    Done(Vec<Option<(u64, Vec<u8>)>>),
    Not,
    Unknown,
}

/// A client of its own: it speaks the protocol and decides itself when to send again.
struct Sender {
    homes: Vec<String>,
    links: BTreeMap<String, Link>,
    routes: Option<Routes>,
    client: u64,
    sequence: u64,
    tries: u32,
}

fn account(at: usize) -> Vec<u8> {
    format!("bank/{at}").into_bytes()
}

fn number(bytes: &[u8]) -> i64 {
    bytes.get(..NUMBER_BYTES).and_then(|bytes| bytes.try_into().ok()).map_or(i64::MIN, i64::from_le_bytes)
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(NUMBER_BYTES).map(|bytes| number(bytes) as u64).collect()
}

impl Sender {
    fn link(&mut self, addr: &str) -> Link {
        let open = || Link::open(addr, Hello::ours(None, Role::Client), |_| Ok(()));
        self.links.entry(addr.to_owned()).or_insert_with(open).clone()
    }

    async fn learn(&mut self) {
        let home = self.homes[self.tries as usize % self.homes.len()].clone();
        let link = self.link(&home);
        let asked = link.ask::<MapDone>(Frame::new(Header::new(Kind::Map), vec![], vec![]), soon()).await;
        if let Ok((done, _)) = asked {
            let routes = Routes::new(done.map, self.routes.as_ref());
            done.leaders.iter().for_each(|(shard, node)| routes.note_leader(*shard, *node));
            self.routes = Some(routes);
        }
    }

    /// Sends a batch until its outcome is known or its time is up. The same id goes with every attempt.
    async fn batch(&mut self, ops: &[BatchOp<'_>], values: &[u8]) -> Became {
        let began = Instant::now();
        self.sequence += 1;
        let mut may_be_done = false;
        loop {
            let age_ms = began.elapsed().as_millis() as u32;
            if began.elapsed() > BATCH_TIME_MAX {
                return if may_be_done { Became::Unknown } else { Became::Not };
            }
            self.tries = self.tries.wrapping_add(1);
            let id = WriteId { client: self.client, sequence: self.sequence, answered: self.sequence - 1, age_ms };
            match self.attempt(ops, values, id).await {
                Ok(became) => return became,
                Err(Attempt::Not) => {}
                Err(Attempt::Unknown) => may_be_done = true,
            }
            let pause = world::rng().random_range(10..120);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn attempt(&mut self, ops: &[BatchOp<'_>], values: &[u8], id: WriteId) -> Result<Became, Attempt> {
        if self.routes.is_none() || self.tries.is_multiple_of(4) {
            self.learn().await;
        }
        let (shard, node, addr, head) = {
            let routes = self.routes.as_ref().ok_or(Attempt::Not)?;
            let keyspace = routes.map().keyspace(KEYSPACE).ok_or(Attempt::Not)?.id;
            let shards = ops.iter().filter_map(|op| routes.shard_of(keyspace, op.key()));
            let info = shards.min_by_key(|info| info.id).ok_or(Attempt::Not)?;
            let target = routes.target(info, shkv_proto::message::Consistency::Linearizable, b"", self.tries);
            let node = target.ok_or(Attempt::Not)?;
            let addr = routes.map().node(node).ok_or(Attempt::Not)?.addr.clone();
            let batch = Batch { keyspace, ops: ops.to_vec(), id: Some(id) };
            (info.id, node, addr, codec::encode(&batch).map_err(|_| Attempt::Not)?)
        };
        let link = self.link(&addr);
        let frame = Frame::new(Header { shard, ..Header::new(Kind::Batch) }, head, values.to_vec());
        match link.ask::<BatchDone>(frame, soon()).await {
            Ok((done, tail)) => Ok(Became::Done(rows_of(&done, &tail))),
            Err(CallError::Failure(failure)) => self.failed(shard, node, &failure),
            Err(CallError::Link(LinkError::NotSent(_))) => {
                self.note(shard, node, None);
                Err(Attempt::Not)
            }
            Err(CallError::Link(LinkError::Lost(_) | LinkError::Expired)) => {
                self.note(shard, node, None);
                Err(Attempt::Unknown)
            }
        }
    }

    fn failed(&self, shard: ShardId, node: NodeId, failure: &Failure) -> Result<Became, Attempt> {
        match failure {
            Failure::Condition { .. } => Ok(Became::Not),
            // What is refused now may have been done by an attempt before.
            Failure::Refusal { .. } => Ok(Became::Unknown),
            Failure::NotLeader { hint } => {
                self.note(shard, node, *hint);
                Err(Attempt::Not)
            }
            Failure::WrongShard { .. } | Failure::Busy { .. } | Failure::Behind { .. } | Failure::Aborted { .. } => {
                Err(Attempt::Not)
            }
            Failure::Unknown { .. } => Err(Attempt::Unknown),
        }
    }

    fn note(&self, shard: ShardId, node: NodeId, hint: Option<NodeId>) {
        if let Some(routes) = &self.routes {
            routes.note_not_leader(shard, node, hint);
        }
    }
}

/// What became of an attempt that does not settle it.
enum Attempt {
    Not,
    Unknown,
}

fn soon() -> Instant {
    Instant::now() + ATTEMPT_TIME_MAX
}

fn rows_of(done: &BatchDone, tail: &[u8]) -> Vec<Option<(u64, Vec<u8>)>> {
    let mut rest = tail;
    let mut row = |read: &Option<shkv_proto::message::RowRead>| {
        let read = (*read)?;
        let (value, behind) = rest.split_at_checked(read.value_bytes as usize)?;
        rest = behind;
        Some((read.version, value.to_vec()))
    };
    done.rows.iter().map(&mut row).collect()
}

impl Ledger {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets the workers end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Workers that have not ended.
    #[must_use]
    pub fn at_work(&self) -> u64 {
        self.workers.load(Ordering::Relaxed)
    }

    /// Batches that were acknowledged.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.told.lock().done
    }

    /// Works until it is told to stop.
    pub async fn work(self: Arc<Self>, homes: Vec<String>) {
        self.workers.fetch_add(1, Ordering::Relaxed);
        let client = world::rng().random_range(1..=u64::MAX);
        let mut sender = Sender { homes, links: BTreeMap::new(), routes: None, client, sequence: 0, tries: 0 };
        self.open_accounts(&mut sender).await;
        while !self.stop.load(Ordering::Relaxed) {
            match world::rng().random_range(0..10) {
                0..4 => self.transfer(&mut sender).await,
                4..6 => self.look(&mut sender).await,
                6..8 => self.append(&mut sender).await,
                _ => self.increment(&mut sender).await,
            }
            let pause = world::rng().random_range(0..150);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.workers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Every worker tries; one of them finds no accounts.
    async fn open_accounts(&self, sender: &mut Sender) {
        let keys: Vec<Vec<u8>> = (0..ACCOUNTS).map(account).collect();
        let put = |key| BatchOp::Put { key, value_bytes: NUMBER_BYTES as u32, condition: Condition::Absent };
        let ops: Vec<BatchOp<'_>> = keys.iter().map(|key| put(&key[..])).collect();
        let values = BEGINS_WITH.to_le_bytes().repeat(ACCOUNTS);
        while !self.stop.load(Ordering::Relaxed) {
            let _ = sender.batch(&ops, &values).await; // whoever did it, the next read tells
            if self.read_all(sender).await.is_some() {
                return;
            }
        }
    }

    async fn read_all(&self, sender: &mut Sender) -> Option<Vec<(u64, i64)>> {
        let keys: Vec<Vec<u8>> = (0..ACCOUNTS).map(account).collect();
        let ops: Vec<BatchOp<'_>> = keys.iter().map(|key| BatchOp::Read { key }).collect();
        match sender.batch(&ops, b"").await {
            Became::Done(rows) => {
                rows.into_iter().map(|row| row.map(|(version, value)| (version, number(&value)))).collect()
            }
            Became::Not | Became::Unknown => None,
        }
    }

    async fn look(&self, sender: &mut Sender) {
        let from = self.now();
        let Some(rows) = self.read_all(sender).await else { return };
        let until = Some(self.now());
        let op = bank::Op::Read(rows.iter().map(|(_, balance)| *balance).enumerate().collect());
        let mut told = self.told.lock();
        told.done += 1;
        told.bank.push(Event { op, from, until });
    }

    async fn transfer(&self, sender: &mut Sender) {
        let from_at = world::rng().random_range(0..ACCOUNTS);
        let to_at = (from_at + world::rng().random_range(1..ACCOUNTS)) % ACCOUNTS;
        let amount = world::rng().random_range(1..30_i64);
        let from = self.now();
        let Some(rows) = self.read_all(sender).await else { return };
        if rows[from_at].1 < amount {
            return;
        }
        let (a, b) = (account(from_at), account(to_at));
        let put = |key, version| BatchOp::Put {
            key,
            value_bytes: NUMBER_BYTES as u32,
            condition: Condition::Version(version),
        };
        let ops = [put(&a[..], rows[from_at].0), put(&b[..], rows[to_at].0)];
        let values = [(rows[from_at].1 - amount).to_le_bytes(), (rows[to_at].1 + amount).to_le_bytes()].concat();
        let (done, until) = match sender.batch(&ops, &values).await {
            Became::Done(_) => (Some(true), Some(self.now())),
            Became::Unknown => (None, None),
            Became::Not => return,
        };
        let mut told = self.told.lock();
        told.done += u64::from(done.is_some());
        told.bank.push(Event { op: bank::Op::Transfer { from: from_at, to: to_at, amount, done }, from, until });
    }

    /// Reads a row and writes what `change` makes of it, if nobody has written it meanwhile.
    async fn change(&self, sender: &mut Sender, key: &[u8], change: impl Fn(&[u8]) -> Vec<u8>) -> Option<Became> {
        let Became::Done(rows) = sender.batch(&[BatchOp::Read { key }], b"").await else { return None };
        let (condition, before) = match rows.into_iter().next().flatten() {
            Some((version, value)) => (Condition::Version(version), value),
            None => (Condition::Absent, vec![]),
        };
        let value = change(&before);
        let put = BatchOp::Put { key, value_bytes: value.len() as u32, condition };
        Some(sender.batch(&[put], &value).await)
    }

    async fn append(&self, sender: &mut Sender) {
        let element = self.elements.fetch_add(1, Ordering::Relaxed);
        let read = Mutex::new(vec![]);
        let became = self.change(sender, b"list", |before| {
            *read.lock() = numbers(before);
            [before, &element.to_le_bytes()].concat()
        });
        let became = became.await;
        let mut told = self.told.lock();
        match became {
            Some(Became::Done(_)) => drop(told.appends.done.insert(element)),
            Some(Became::Unknown) => drop(told.appends.unknown.insert(element)),
            Some(Became::Not) => {}
            None => return,
        }
        told.done += 1;
        told.appends.reads.push(read.into_inner());
    }

    async fn increment(&self, sender: &mut Sender) {
        let plus_one = |before: &[u8]| (if before.is_empty() { 1 } else { number(before) + 1 }).to_le_bytes().to_vec();
        let became = self.change(sender, b"counter", plus_one).await;
        let mut told = self.told.lock();
        match became {
            Some(Became::Done(_)) => (told.increments.done, told.done) = (told.increments.done + 1, told.done + 1),
            Some(Became::Unknown) => told.increments.unknown += 1,
            Some(Became::Not) | None => {}
        }
    }

    /// Judges what was told. `found` is what was there in the end.
    #[must_use]
    pub fn judge(&self, found: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<String> {
        let told = self.told.lock();
        let mut wrong = Vec::new();
        let mut say = |what: &str, verdict: Verdict| match verdict {
            Verdict::Right => {}
            Verdict::Wrong(why) => wrong.push(format!("{what}: {why}")),
            Verdict::Undecided => wrong.push(format!("{what}: the judge cannot tell")),
        };
        let row = |key: &[u8]| found.get(key).map_or(&[][..], |value| &value[..]);
        say("list", list::judge(&told.appends, &numbers(row(b"list"))));
        let counted = if row(b"counter").is_empty() { 0 } else { number(row(b"counter")) as u64 };
        say("counter", counter::judge(told.increments, counted));
        let balances: Vec<i64> = (0..ACCOUNTS).map(|at| number(row(&account(at)))).collect();
        let is_open = !told.bank.is_empty();
        if is_open && balances.iter().sum::<i64>() != BEGINS_WITH * ACCOUNTS as i64 {
            say("bank", Verdict::Wrong(format!("money was made or lost: {balances:?}")));
        }
        let events = begun_first(&told.bank);
        say("bank", bank::judge(&Bank(vec![BEGINS_WITH; ACCOUNTS]), &events));
        wrong
    }
}

/// The calls that began first. Of those that returned after the others began, reads tell nothing that can be judged without
/// the others, and transfers may have been done before or not.
fn begun_first(told: &[Event<bank::Op>]) -> Vec<Event<bank::Op>> {
    let mut events = told.to_vec();
    events.sort_by_key(|event| event.from);
    let Some(end) = events.get(BANK_EVENTS_MAX).map(|event| event.from) else { return events };
    events.truncate(BANK_EVENTS_MAX);
    events.retain_mut(|event| match &mut event.op {
        _ if event.until.is_some_and(|until| until < end) => true,
        bank::Op::Read(_) => false,
        bank::Op::Transfer { done, .. } => {
            (*done, event.until) = (None, None);
            true
        }
    });
    events
}
