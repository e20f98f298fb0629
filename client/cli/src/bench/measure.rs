//! The measuring of a closed loop: who counts what and when, and what comes out.
//!
//! An operation counts if it ends while measuring is on. How long it took is kept in one histogram for all workers: one for
//! each would be more memory than the processor's cache holds, and change what is measured.

#![expect(clippy::disallowed_methods, reason = "a shell: waits and tells the time")]

use super::Plan;
use anyhow::Context;
use hdrhistogram::Histogram;
use parking_lot::Mutex;
use rustix::time::{ClockId, clock_gettime};
use serde_json::{Value, json};
use std::fmt::Display;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Significant digits of the latencies kept.
const DIGITS: u8 = 3;
/// How long a worker waits after a failure, so that a server which is away is not asked in a hot loop.
const FAILURE_PAUSE: Duration = Duration::from_millis(10);

const WARMUP: u8 = 0;
const MEASURING: u8 = 1;
const OVER: u8 = 2;

/// What all workers look at: whether to count, and whether to end.
#[derive(Debug)]
pub struct Window {
    phase: AtomicU8,
    told_failure: AtomicBool,
    began: OnceLock<Instant>,
    nanos: Mutex<Histogram<u64>>,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            phase: AtomicU8::new(WARMUP),
            told_failure: AtomicBool::new(false),
            began: OnceLock::new(),
            nanos: Mutex::new(empty()),
        }
    }
}

/// No latencies yet.
fn empty() -> Histogram<u64> {
    Histogram::new(DIGITS).expect("a number of digits that a histogram may have")
}

impl Window {
    /// Whether workers should end.
    pub fn is_over(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == OVER
    }

    fn counts(&self) -> bool {
        self.phase.load(Ordering::Relaxed) == MEASURING
    }

    fn enter(&self, phase: u8) {
        if phase == MEASURING {
            self.began.get_or_init(Instant::now);
        }
        self.phase.store(phase, Ordering::Relaxed);
    }
}

/// What one worker has counted.
#[derive(Debug, Default)]
pub struct Tally {
    errors: u64,
    rows: u64,
    series: Vec<Second>,
}

/// What happened in one second of those that are measured.
#[derive(Clone, Copy, Debug, Default)]
pub struct Second {
    /// Operations that ended.
    pub ops: u64,
    /// The longest of them, in nanoseconds.
    pub nanos_max: u64,
}

impl Tally {
    /// An operation that began then has succeeded now.
    pub fn succeeded(&mut self, window: &Window, began: Instant) {
        if !window.counts() {
            return;
        }
        let now = Instant::now();
        let nanos = now.duration_since(began).as_nanos() as u64;
        let _ = window.nanos.lock().record(nanos); // cannot fail: it grows as it must
        let second = window.began.get().map_or(0, |begin| now.duration_since(*begin).as_secs() as usize);
        if second >= self.series.len() {
            self.series.resize(second + 1, Second::default());
        }
        self.series[second].ops += 1;
        self.series[second].nanos_max = self.series[second].nanos_max.max(nanos);
    }

    /// So many rows were read in order.
    pub fn scanned(&mut self, window: &Window, rows: u64) {
        self.rows += if window.counts() { rows } else { 0 };
    }

    /// An operation has failed. The first one of all is printed; then there is a pause.
    pub async fn failed(&mut self, window: &Window, error: &impl Display) {
        self.errors += u64::from(window.counts());
        if !window.told_failure.swap(true, Ordering::Relaxed) {
            eprintln!("shkv-bench: the first operation that failed: {error}");
        }
        tokio::time::sleep(FAILURE_PAUSE).await;
    }
}

/// What servers have used so far.
#[derive(Clone, Debug, Default)]
pub struct Usage {
    /// Processor time of each process, in microseconds.
    pub cpu_us: Vec<(u32, u64)>,
    /// fdatasync calls of each log.
    pub log_syncs: Vec<(u64, u64)>,
    /// Bytes that went over this machine's loopback, whoever sent them.
    pub wire_bytes: u64,
    /// Memory that the processes of this machine hold.
    pub memory_bytes: u64,
    /// Bytes of log that are still needed, of all nodes.
    pub log_bytes: u64,
    /// Bytes of rows that are in memory only, of all nodes.
    pub table_bytes: u64,
}

/// How much more the second has of the same things as the first. What was not there before counts whole.
fn growth<K: PartialEq>(before: &[(K, u64)], after: &[(K, u64)]) -> u64 {
    let was = |key: &K| before.iter().find(|(other, _)| other == key).map_or(0, |(_, count)| *count);
    after.iter().map(|(key, count)| count.saturating_sub(was(key))).sum()
}

/// What came out.
#[derive(Clone, Debug)]
pub struct Outcome {
    /// Operations that succeeded.
    pub ops: u64,
    /// Operations that failed.
    pub errors: u64,
    rows: u64,
    series: Vec<Second>,
    secs: f64,
    nanos: Histogram<u64>,
    server_cpu_us: u64,
    client_cpu_us: u64,
    log_syncs: u64,
    wire_bytes: u64,
    end: Usage,
}

/// Lets the workers run, measures in between, and gathers what they counted. `usage` asks the servers.
///
/// # Errors
/// When a worker or a server cannot say what it has.
pub async fn measure(
    plan: &Plan,
    window: &Window,
    mut workers: JoinSet<anyhow::Result<Tally>>,
    usage: impl AsyncFn() -> anyhow::Result<Usage>,
) -> anyhow::Result<Outcome> {
    tokio::time::sleep(plan.warmup).await;
    let before = usage().await?;
    let cpu_before = own_cpu_us();
    let began = Instant::now();
    window.enter(MEASURING);
    tokio::time::sleep(plan.measured).await;
    window.enter(OVER);
    let secs = began.elapsed().as_secs_f64();
    let client_cpu_us = own_cpu_us() - cpu_before;
    let after = usage().await?;
    let Tally { mut errors, mut rows, .. } = Tally::default();
    let mut series = vec![Second::default(); secs.ceil() as usize];
    while let Some(tally) = workers.join_next().await {
        let tally = tally.context("a worker")??;
        errors += tally.errors;
        rows += tally.rows;
        for (all, one) in series.iter_mut().zip(&tally.series) {
            all.ops += one.ops;
            all.nanos_max = all.nanos_max.max(one.nanos_max);
        }
    }
    let nanos = std::mem::replace(&mut *window.nanos.lock(), empty());
    Ok(Outcome {
        ops: nanos.len(),
        errors,
        rows,
        series,
        secs,
        server_cpu_us: growth(&before.cpu_us, &after.cpu_us),
        client_cpu_us,
        log_syncs: growth(&before.log_syncs, &after.log_syncs),
        wire_bytes: after.wire_bytes.saturating_sub(before.wire_bytes),
        end: after,
        nanos,
    })
}

/// A phase for workers that are not measured.
pub fn unmeasured() -> Window {
    let window = Window::default();
    window.enter(WARMUP);
    window
}

/// Processor time of this process so far, in microseconds.
fn own_cpu_us() -> u64 {
    let time = clock_gettime(ClockId::ProcessCPUTime);
    time.tv_sec as u64 * 1_000_000 + time.tv_nsec as u64 / 1_000
}

impl Outcome {
    /// Operations per second.
    pub fn ops_per_sec(&self) -> f64 {
        self.ops as f64 / self.secs.max(f64::MIN_POSITIVE)
    }

    fn per_op(&self, total: u64) -> f64 {
        total as f64 / self.ops.max(1) as f64
    }

    /// Processor time of all servers for one operation, in microseconds.
    pub fn server_cpu_us_per_op(&self) -> f64 {
        self.per_op(self.server_cpu_us)
    }

    /// Processor time of the client for one operation, in microseconds.
    pub fn client_cpu_us_per_op(&self) -> f64 {
        self.per_op(self.client_cpu_us)
    }

    /// The operations of each second.
    pub fn rates(&self) -> Vec<(f64, f64)> {
        (0..).map(f64::from).zip(self.series.iter().map(|second| second.ops as f64)).collect()
    }

    /// What else an operation cost, as the cells of a table: the client's processor time, fdatasync calls and bytes over
    /// loopback; then memory and log at the end in MiB. What nobody tells is a dash.
    pub fn costs(&self) -> [String; 5] {
        let told = |number: u64, text: String| if number == 0 { "–".into() } else { text };
        let mib = |bytes: u64| told(bytes, format!("{:.1}", bytes as f64 / f64::from(1 << 20)));
        [
            format!("{:.1}", self.per_op(self.client_cpu_us)),
            told(self.log_syncs, format!("{:.3}", self.per_op(self.log_syncs))),
            told(self.wire_bytes, format!("{:.0}", self.per_op(self.wire_bytes))),
            mib(self.end.memory_bytes),
            mib(self.end.log_bytes),
        ]
    }

    /// So many operations in one second that took a millisecond each, for tests of what is made of outcomes.
    #[cfg(test)]
    pub fn example(ops: u64) -> Self {
        let mut nanos = empty();
        nanos.record_n(1_000_000, ops).unwrap();
        Self {
            ops,
            errors: 0,
            rows: 0,
            series: vec![Second { ops, nanos_max: 1_000_000 }],
            secs: 1.0,
            nanos,
            server_cpu_us: ops * 10,
            client_cpu_us: ops,
            log_syncs: 0,
            wire_bytes: 0,
            end: Usage::default(),
        }
    }

    /// A latency in microseconds.
    pub fn us(&self, quantile: f64) -> f64 {
        tenths(self.nanos.value_at_quantile(quantile) as f64 / 1_000.0)
    }

    /// For programs.
    pub fn json(&self) -> Value {
        json!({
            "ops_per_sec": tenths(self.ops_per_sec()),
            "p50_us": self.us(0.5),
            "p90_us": self.us(0.9),
            "p99_us": self.us(0.99),
            "p999_us": self.us(0.999),
            "max_us": self.us(1.0),
            "errors": self.errors,
            "server_cpu_us_per_op": thousandths(self.per_op(self.server_cpu_us)),
            "client_cpu_us_per_op": thousandths(self.per_op(self.client_cpu_us)),
            "log_syncs_per_op": thousandths(self.per_op(self.log_syncs)),
            "wire_bytes_per_op": tenths(self.per_op(self.wire_bytes)),
            "memory_bytes": self.end.memory_bytes,
            "log_bytes": self.end.log_bytes,
            "table_bytes": self.end.table_bytes,
            "ops": self.ops,
            "rows_per_sec": tenths(self.rows as f64 / self.secs.max(f64::MIN_POSITIVE)),
            "series": self.series.iter().map(|second| json!([second.ops, second.nanos_max / 1_000])).collect::<Vec<_>>(),
            "secs": thousandths(self.secs),
        })
    }

    /// For people.
    pub fn text(&self) -> String {
        let rows = match self.rows {
            0 => String::new(),
            rows => format!("   {:.0} rows/s", rows as f64 / self.secs.max(f64::MIN_POSITIVE)),
        };
        format!(
            "{:.0} op/s{rows}   p50 {:.0} us   p99 {:.0} us   p99.9 {:.0} us   max {:.0} us   {} errors   CPU per operation: servers {:.2} us, client {:.2} us   {:.3} log syncs per operation",
            self.ops_per_sec(),
            self.us(0.5),
            self.us(0.99),
            self.us(0.999),
            self.us(1.0),
            self.errors,
            self.per_op(self.server_cpu_us),
            self.per_op(self.client_cpu_us),
            self.per_op(self.log_syncs),
        )
    }
}

fn tenths(number: f64) -> f64 {
    (number * 10.0).round() / 10.0
}

fn thousandths(number: f64) -> f64 {
    (number * 1_000.0).round() / 1_000.0
}

#[cfg(test)]
mod tests {
    use super::super::workload::Workload;
    use super::*;

    #[test]
    fn growth_counts_each_process_once_and_new_ones_whole() {
        assert_eq!(growth(&[(1, 10), (2, 5)], &[(1, 30), (2, 5), (3, 7)]), 27);
        assert_eq!(growth(&[(1, 10)], &[(1, 4)]), 0, "a count that began anew");
    }

    #[tokio::test]
    async fn only_what_ends_while_measuring_counts() {
        let plan = Plan {
            conns: 1,
            depth: 1,
            workload: Workload::ycsb('c', 1).unwrap(),
            rate: None,
            value_bytes: 0,
            load: true,
            warmup: Duration::from_millis(30),
            measured: Duration::from_millis(60),
        };
        let window = std::sync::Arc::new(Window::default());
        let mut workers = JoinSet::new();
        let worker = window.clone();
        workers.spawn(async move {
            let mut tally = Tally::default();
            let mut all = 0_u64;
            while !worker.is_over() {
                let began = Instant::now();
                tokio::time::sleep(Duration::from_millis(1)).await;
                tally.succeeded(&worker, began);
                all += 1;
                tally.failed(&worker, &"as planned").await;
            }
            anyhow::ensure!(all > worker.nanos.lock().len(), "the warm-up must not count");
            Ok(tally)
        });
        let usage = async || Ok(Usage { cpu_us: vec![(1, 5)], ..Usage::default() });
        let outcome = measure(&plan, &window, workers, usage).await.unwrap();
        assert!(outcome.ops > 0 && outcome.errors > 0, "{outcome:?}");
        assert_eq!(outcome.server_cpu_us, 0);
        assert!(outcome.us(0.5) >= 1_000.0, "{}", outcome.text());
        assert_eq!(outcome.series.iter().map(|second| second.ops).sum::<u64>(), outcome.ops);
        assert!(outcome.json()["p99_us"].as_f64() >= outcome.json()["p50_us"].as_f64());
    }
}
