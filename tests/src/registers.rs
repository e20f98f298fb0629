//! Clients that read, write and delete a few rows without a pause, and remember every call and what it was told: a history
//! for the judge of registers.
//!
//! Rows are used for a short time and then left alone, so that each has a short history: writes of unknown outcome may
//! take effect at any later time, and a history in which many are pending takes long to judge.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "tests start tasks, tell the time, and fail where they cannot go on"
)]

use crate::judge::register::{self, Condition, Op, Written};
use crate::judge::search::{Event, Verdict};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_client::{Client, Error};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Rows that are in use at the same time.
const ROWS: u64 = 6;
/// How long they are in use.
const GENERATION: Duration = Duration::from_millis(700);
/// How long a call may take.
const CALL_TIME_MAX: Duration = Duration::from_secs(3);
/// A pause longer than this in which nothing was acknowledged counts as unavailable.
const UNAVAILABLE_FROM: Duration = Duration::from_millis(500);

/// Clients at work.
pub struct Registers {
    shared: Arc<Shared>,
    workers: Vec<JoinHandle<()>>,
}

struct Shared {
    began: Instant,
    stop: AtomicBool,
    values: AtomicU64,
    done: Mutex<Done>,
}

#[derive(Default)]
struct Done {
    rows: BTreeMap<String, Vec<Event<Op>>>,
    operations: u64,
    unknown: u64,
    refused: u64,
    last: Duration,
    longest_gap: Duration,
    unavailable: Duration,
}

/// What came out.
#[derive(Debug)]
pub struct Report {
    /// Operations that were acknowledged.
    pub operations: u64,
    /// Writes of unknown outcome.
    pub unknown: u64,
    /// Operations that were told not to be done.
    pub not_done: u64,
    /// Rows that were judged.
    pub rows: usize,
    /// Longest time without an acknowledgement.
    pub longest_gap: Duration,
    /// Sum of the times of half a second and more without one.
    pub unavailable: Duration,
    /// From the first call to the last.
    pub ran: Duration,
    /// Rows of which what was told cannot be true, with the judge's words.
    pub violations: Vec<String>,
}

impl Report {
    /// The report as one object: what was done, the faults by kind, and how long nothing was acknowledged to anybody.
    #[must_use]
    pub fn json(&self, seed: u64, faults: &BTreeMap<String, u32>, left_out: &[String]) -> serde_json::Value {
        serde_json::json!({
            "seed": seed,
            "secs": self.ran.as_secs_f64(),
            "operations": self.operations,
            "unknown": self.unknown,
            "not_done": self.not_done,
            "rows_judged": self.rows,
            "violations": self.violations.len(),
            "faults": faults,
            "faults_total": faults.values().sum::<u32>(),
            "faults_left_out": left_out,
            "unavailable_ms": self.unavailable.as_millis() as u64,
            "longest_gap_ms": self.longest_gap.as_millis() as u64,
        })
    }

    /// Prints the report, once to be read and once, in the line behind, to be parsed; then fails if anything that was told
    /// cannot be true.
    pub fn tell(&self, seed: u64, faults: &BTreeMap<String, u32>, left_out: &[String]) {
        let kinds: Vec<String> = faults.iter().map(|(fault, count)| format!("{count} {fault}")).collect();
        println!("seed {seed}, {:.0?}: {} operations acknowledged on {} rows", self.ran, self.operations, self.rows);
        println!("  {} of unknown outcome, {} told not to be done", self.unknown, self.not_done);
        println!("  {} faults: {}", faults.values().sum::<u32>(), kinds.join(", "));
        if !left_out.is_empty() {
            println!("  left out, because this machine does not let us: {}", left_out.join(", "));
        }
        println!("  nothing acknowledged for {:.1?} in all, {:.1?} at the longest", self.unavailable, self.longest_gap);
        println!("  {} violations", self.violations.len());
        println!("{}", self.json(seed, faults, left_out));
        assert!(self.violations.is_empty(), "seed {seed}:\n{}", self.violations.join("\n"));
    }
}

impl Registers {
    /// Sets as many clients to work as there are here, each with `depth` calls at a time.
    #[must_use]
    pub fn start(clients: &[Client], depth: u64, seed: u64) -> Self {
        let shared = Arc::new(Shared {
            began: Instant::now(),
            stop: AtomicBool::new(false),
            values: AtomicU64::new(1),
            done: Mutex::default(),
        });
        let numbered = (0..).zip(clients.iter().flat_map(|client| (0..depth).map(move |_| client)));
        let workers = numbered.map(|(number, client)| {
            let (client, shared) = (client.clone(), shared.clone());
            let rng = SmallRng::seed_from_u64(seed ^ (number << 32));
            tokio::spawn(async move { shared.work(&client, rng).await })
        });
        Self { workers: workers.collect(), shared }
    }

    /// Operations that were acknowledged so far.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.shared.done.lock().operations
    }

    /// Waits until more of them were.
    pub async fn progress(&self, more: u64) {
        let (wanted, deadline) = (self.operations() + more, Instant::now() + crate::PATIENCE);
        while self.operations() < wanted {
            assert!(Instant::now() < deadline, "operations do not go on: {} of {wanted}", self.operations());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Ends them and judges every row.
    pub async fn judge(self) -> Report {
        self.shared.stop.store(true, Ordering::Relaxed);
        for worker in self.workers {
            worker.await.expect("a worker does not panic");
        }
        let done = std::mem::take(&mut *self.shared.done.lock());
        let violations = done.rows.iter().filter_map(|(row, events)| match register::judge(events) {
            Verdict::Right => None,
            Verdict::Wrong(why) => Some(format!("{row}: {why}\n{}", told(events))),
            Verdict::Undecided => Some(format!("{row}: the judge cannot tell")),
        });
        Report {
            operations: done.operations,
            unknown: done.unknown,
            not_done: done.refused,
            rows: done.rows.len(),
            longest_gap: done.longest_gap,
            unavailable: done.unavailable,
            ran: self.shared.began.elapsed(),
            violations: violations.collect(),
        }
    }
}

/// A history for whoever has to find out what went wrong.
fn told(events: &[Event<Op>]) -> String {
    let mut events: Vec<&Event<Op>> = events.iter().collect();
    events.sort_by_key(|event| event.from);
    events.iter().map(|event| format!("  {:>12} to {:?}: {:?}\n", event.from, event.until, event.op)).collect()
}

impl Shared {
    fn now(&self) -> u64 {
        self.began.elapsed().as_nanos() as u64
    }

    async fn work(&self, client: &Client, mut rng: SmallRng) {
        while !self.stop.load(Ordering::Relaxed) {
            let generation = self.began.elapsed().as_millis() / GENERATION.as_millis();
            let row = format!("register/{generation:06}/{}", rng.random_range(0..ROWS));
            let from = self.now();
            let call = match rng.random_range(0..10) {
                0..5 => self.get(client, &row).await,
                5..9 => self.put(client, &row).await,
                _ => self.delete(client, &row).await,
            };
            let until = self.now();
            let mut done = self.done.lock();
            match call {
                Called::Done(op) => {
                    done.acknowledged(Duration::from_nanos(until));
                    done.rows.entry(row).or_default().push(Event { op, from, until: Some(until) });
                }
                Called::Unknown(op) => {
                    done.unknown += 1;
                    done.rows.entry(row).or_default().push(Event { op, from, until: None });
                }
                Called::Not => done.refused += 1,
            }
        }
    }

    async fn get(&self, client: &Client, row: &str) -> Called {
        match client.get(row).deadline(CALL_TIME_MAX).await {
            Ok(found) => Called::Done(Op::Get(found.map(|row| (number(&row.value), row.version)))),
            Err(_) => Called::Not, // a read that fails tells nothing
        }
    }

    async fn put(&self, client: &Client, row: &str) -> Called {
        let value = self.values.fetch_add(1, Ordering::Relaxed);
        let answer = client.put(row, value.to_string()).deadline(CALL_TIME_MAX).await;
        called(&answer.map(|done| Written::Done(done.version, None)), |answer| {
            Op::Put(value, Condition::Always, answer)
        })
    }

    async fn delete(&self, client: &Client, row: &str) -> Called {
        let answer = client.delete(row).deadline(CALL_TIME_MAX).await;
        called(&answer.map(|done| Written::Done(done.version, Some(done.removed > 0))), |answer| {
            Op::Delete(Condition::Always, answer)
        })
    }
}

impl Done {
    fn acknowledged(&mut self, now: Duration) {
        self.operations += 1;
        let gap = now.saturating_sub(self.last);
        self.last = self.last.max(now);
        self.longest_gap = self.longest_gap.max(gap);
        if gap >= UNAVAILABLE_FROM {
            self.unavailable += gap;
        }
    }
}

enum Called {
    Done(Op),
    Unknown(Op),
    Not,
}

/// A write that was told not to be done is believed: if it is seen all the same, the judge finds a value from nowhere.
fn called(answer: &Result<Written, Error>, op: impl Fn(Option<Written>) -> Op) -> Called {
    match answer {
        Ok(written) => Called::Done(op(Some(*written))),
        Err(Error::Unknown { .. }) => Called::Unknown(op(None)),
        Err(_) => Called::Not,
    }
}

fn number(value: &[u8]) -> u64 {
    std::str::from_utf8(value).ok().and_then(|text| text.parse().ok()).expect("only numbers are written")
}
