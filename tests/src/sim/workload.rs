//! What the clients of a simulated cluster do, and what they were told: registers, rows that are written once, and scans
//! over both.

use crate::judge::audit::Audit;
use crate::judge::register::{self, Condition, Op, Written};
use crate::judge::scan::{self, Scanned};
use crate::judge::search::{Event, Verdict};
use parking_lot::Mutex;
use rand::RngExt;
use shkv_client::{Client, ClientConfig, Error};
use shkv_proto::world;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Registers that are in use at the same time.
const ROWS: u64 = 5;
/// Writes after which other registers are used: a short history is judged soon.
const GENERATION_WRITES: u64 = 60;
/// Most rows of a scan with a limit.
const SCANNED_MAX: u64 = 5;
/// How long a call may take.
const CALL_TIME_MAX: Duration = Duration::from_secs(3);
/// Longest pause of a worker between two calls.
const PAUSE_MS_MAX: u64 = 30;

/// What the clients were told.
#[derive(Default)]
pub struct Story {
    /// The order of everything that is called and returns: one thread makes it exact.
    clock: AtomicU64,
    values: AtomicU64,
    stop: AtomicBool,
    calm: AtomicBool,
    workers: AtomicU64,
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    registers: BTreeMap<String, Vec<Event<Op>>>,
    scans: Vec<Scanned<String>>,
    audit: Audit,
    counts: Counts,
}

/// How much was done.
#[derive(Clone, Copy, Default, Debug)]
pub struct Counts {
    /// Acknowledged.
    pub done: u64,
    /// Of unknown outcome.
    pub unknown: u64,
    /// Certainly not done.
    pub refused: u64,
    /// Scans.
    pub scans: u64,
    /// Batches that were acknowledged.
    pub batches: u64,
    /// Wishes of the operator that were taken.
    pub wishes: u64,
}

impl Story {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// How much was done so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        self.told.lock().counts
    }

    /// Nothing more is changed about the cluster.
    pub fn calm(&self) {
        self.calm.store(true, Ordering::Relaxed);
    }

    /// Whether nothing more is to be changed about the cluster.
    #[must_use]
    pub fn is_calm(&self) -> bool {
        self.calm.load(Ordering::Relaxed)
    }

    /// An operator's wish was taken.
    pub fn wished(&self) {
        self.told.lock().counts.wishes += 1;
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

    /// Connects, and works until it is told to stop.
    pub async fn work(self: Arc<Self>, homes: Vec<String>, workers: u64) {
        self.workers.fetch_add(workers, Ordering::Relaxed);
        let client = connect(&homes).await;
        for _ in 0..workers {
            let (story, client) = (self.clone(), client.clone());
            tokio::spawn(async move {
                while !story.stop.load(Ordering::Relaxed) {
                    story.one(&client).await;
                    let pause = world::rng().random_range(0..PAUSE_MS_MAX);
                    tokio::time::sleep(Duration::from_millis(pause)).await;
                }
                story.workers.fetch_sub(1, Ordering::Relaxed);
            });
        }
        std::future::pending::<()>().await;
    }

    async fn one(&self, client: &Client) {
        match world::rng().random_range(0..20) {
            0..14 => self.register(client).await,
            14..17 => self.write_once(client).await,
            _ => self.scan(client).await,
        }
    }

    async fn register(&self, client: &Client) {
        let generation = self.values.load(Ordering::Relaxed) / GENERATION_WRITES;
        let row = format!("register/{generation:06}/{}", world::rng().random_range(0..ROWS));
        let kind = world::rng().random_range(0..12);
        if kind >= 10 {
            return self.compare_and_set(client, row).await;
        }
        let from = self.now();
        let (op, outcome) = match kind {
            0..4 => match client.get(&row).deadline(CALL_TIME_MAX).await {
                Ok(found) => (Op::Get(found.map(|row| (number(&row.value), row.version))), Outcome::Done),
                Err(_) => (Op::Get(None), Outcome::Not), // a read that fails tells nothing
            },
            4..9 => {
                let value = self.values.fetch_add(1, Ordering::Relaxed);
                let answer = client.put(&row, value.to_string()).deadline(CALL_TIME_MAX).await;
                let (answer, outcome) = told(&answer.map(|done| Written::Done(done.version, None)));
                (Op::Put(value, Condition::Always, answer), outcome)
            }
            _ => {
                let answer = client.delete(&row).deadline(CALL_TIME_MAX).await;
                let (answer, outcome) = told(&answer.map(|done| Written::Done(done.version, Some(done.removed > 0))));
                (Op::Delete(Condition::Always, answer), outcome)
            }
        };
        self.note(row, from, op, outcome);
    }

    /// Reads a row and writes it on the condition that it is still as it was, told in any of the ways there are.
    async fn compare_and_set(&self, client: &Client, row: String) {
        let from = self.now();
        let Ok(found) = client.get(&row).deadline(CALL_TIME_MAX).await else { return };
        let found = found.map(|row| (number(&row.value), row.version));
        self.note(row.clone(), from, Op::Get(found), Outcome::Done);
        let condition = match (found, world::rng().random_range(0..3)) {
            (None, _) => Condition::Absent,
            (Some((_, version)), 0) => Condition::Version(version),
            (Some((value, _)), 1) => Condition::Value(value),
            (Some(_), _) => Condition::Present,
        };
        let from = self.now();
        let (op, outcome) = if found.is_some() && world::rng().random_bool(0.25) {
            let delete = client.delete(&row).deadline(CALL_TIME_MAX);
            let delete = match condition {
                Condition::Version(version) => delete.if_version(version),
                Condition::Value(value) => delete.if_value(value.to_string()),
                Condition::Always | Condition::Absent | Condition::Present => delete.if_present(),
            };
            let answer = delete.await.map(|done| Written::Done(done.version, Some(done.removed > 0)));
            let (answer, outcome) = told(&answer);
            (Op::Delete(condition, answer), outcome)
        } else {
            let value = self.values.fetch_add(1, Ordering::Relaxed);
            let put = client.put(&row, value.to_string()).deadline(CALL_TIME_MAX);
            let put = match condition {
                Condition::Version(version) => put.if_version(version),
                Condition::Value(value) => put.if_value(value.to_string()),
                Condition::Present => put.if_present(),
                Condition::Always | Condition::Absent => put.if_absent(),
            };
            let (answer, outcome) = told(&put.await.map(|done| Written::Done(done.version, None)));
            (Op::Put(value, condition, answer), outcome)
        };
        self.note(row, from, op, outcome);
    }

    fn note(&self, row: String, from: u64, op: Op, outcome: Outcome) {
        let until = self.now();
        let mut told = self.told.lock();
        told.count(outcome);
        let until = match outcome {
            Outcome::Done => Some(until),
            Outcome::Unknown => None,
            Outcome::Not => return,
        };
        told.registers.entry(row).or_default().push(Event { op, from, until });
    }

    async fn write_once(&self, client: &Client) {
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let bytes = world::rng().random_range(1..2000);
        let (key, value) = (format!("once/{value:08}"), format!("{value:0>bytes$}"));
        let answer = client.put(&key, value.clone()).deadline(CALL_TIME_MAX).await;
        let (_, outcome) = told(&answer.map(|done| Written::Done(done.version, None)));
        let mut told = self.told.lock();
        told.count(outcome);
        match outcome {
            Outcome::Done => told.audit.acknowledged(key, value),
            Outcome::Unknown => told.audit.unknown(key, value),
            Outcome::Not => {}
        }
    }

    async fn scan(&self, client: &Client) {
        let generation = self.values.load(Ordering::Relaxed) / GENERATION_WRITES;
        let (mut start, mut end) = (format!("register/{generation:06}/"), format!("register/{generation:06}0"));
        let reverse = world::rng().random_bool(0.5);
        // Nodes merge what a scan with a limit wants of their shards.
        let limit = world::rng().random_bool(0.7).then(|| world::rng().random_range(1..=SCANNED_MAX));
        let from = self.now();
        let scan =
            client.scan(start.as_bytes().to_vec()..end.as_bytes().to_vec()).page_bytes(60).deadline(CALL_TIME_MAX);
        let scan = if reverse { scan.reverse() } else { scan };
        let mut rows = limit.map_or(scan.clone(), |limit| scan.limit(limit)).rows();
        let mut found = Vec::new();
        loop {
            match rows.next().await {
                Ok(Some(row)) => {
                    let key = String::from_utf8_lossy(&row.key).into_owned();
                    found.push((key, number(&row.value), row.version));
                }
                Ok(None) => break,
                Err(_) => return, // a read that fails tells nothing
            }
        }
        let until = self.now();
        if limit == Some(found.len() as u64)
            && let Some((last, ..)) = found.last()
        {
            // It says nothing of what is behind its last row.
            if reverse { start.clone_from(last) } else { end = format!("{last}\0") }
        }
        let mut told = self.told.lock();
        told.counts.scans += 1;
        told.scans.push(Scanned { start, end, reverse, rows: found, from, until });
    }

    /// Reads everything that is there in the end, and judges it together with what was told.
    ///
    /// # Errors
    /// When not everything can be read.
    pub async fn last_look(&self, homes: &[String]) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, Error> {
        let client = connect(homes).await;
        let from = self.now();
        let mut rows = client.scan(..).prefix("").deadline(Duration::from_secs(30)).rows();
        let mut found = BTreeMap::new();
        let mut versions = BTreeMap::new();
        while let Some(row) = rows.next().await? {
            versions.insert(row.key.to_vec(), row.version);
            found.insert(row.key.to_vec(), row.value.to_vec());
        }
        let until = self.now();
        let mut told = self.told.lock();
        for (row, events) in &mut told.registers {
            let here = found.get(row.as_bytes()).zip(versions.get(row.as_bytes()));
            let op = Op::Get(here.map(|(value, version)| (number(value), *version)));
            events.push(Event { op, from, until: Some(until) });
        }
        Ok(found)
    }

    /// Judges what was told. `found` is what was there in the end.
    #[must_use]
    pub fn judge(&self, found: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<String> {
        let told = &mut *self.told.lock();
        let mut wrong = Vec::new();
        for scanned in &told.scans {
            if let Verdict::Wrong(why) = scan::judge(scanned) {
                wrong.push(format!("scan: {why}"));
            }
            let keys = told.registers.keys().cloned().collect::<Vec<_>>();
            for (key, event) in scan::reads(scanned, keys.iter()) {
                told.registers.entry(key.clone()).or_default().push(event);
            }
        }
        for (row, events) in &told.registers {
            match register::judge(events) {
                Verdict::Right => {}
                Verdict::Wrong(why) => wrong.push(format!("{row}: {why}\n{}", history(events))),
                Verdict::Undecided => wrong.push(format!("{row}: the judge cannot tell")),
            }
        }
        let once = found.iter().filter(|(key, _)| key.starts_with(b"once/"));
        let once = once.map(|(key, value)| (key.clone(), value.clone())).collect();
        if let Verdict::Wrong(why) = told.audit.judge(&once) {
            wrong.push(format!("audit: {why}"));
        }
        wrong
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Outcome {
    Done,
    Unknown,
    Not,
}

impl Told {
    fn count(&mut self, outcome: Outcome) {
        match outcome {
            Outcome::Done => self.counts.done += 1,
            Outcome::Unknown => self.counts.unknown += 1,
            Outcome::Not => self.counts.refused += 1,
        }
    }
}

/// A write that was told not to be done is believed: if it is seen all the same, the judge finds a value from nowhere.
fn told(answer: &Result<Written, Error>) -> (Option<Written>, Outcome) {
    match answer {
        Ok(written) => (Some(*written), Outcome::Done),
        Err(Error::Condition { version, .. }) => (Some(Written::Refused(*version)), Outcome::Done),
        Err(Error::Unknown { .. }) => (None, Outcome::Unknown),
        Err(_) => (None, Outcome::Not),
    }
}

pub(super) async fn connect(homes: &[String]) -> Client {
    let config = ClientConfig { deadline: CALL_TIME_MAX, ..ClientConfig::default() };
    loop {
        match Client::connect_with(homes.iter().cloned(), config.clone()).await {
            Ok(client) => return client,
            Err(_) => tokio::time::sleep(Duration::from_millis(200)).await,
        }
    }
}

/// A history for whoever has to find out what went wrong.
fn history(events: &[Event<Op>]) -> String {
    let mut events: Vec<&Event<Op>> = events.iter().collect();
    events.sort_by_key(|event| event.from);
    events.iter().map(|event| format!("  {:>6} to {:?}: {:?}\n", event.from, event.until, event.op)).collect()
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).unwrap_or(u64::MAX)
}
