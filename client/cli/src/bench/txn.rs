//! What a transaction over two shards costs, compared to a put: each worker does one after the other in turn, so that both
//! meet the same machine.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and starts tasks")]

use super::store::Target;
use super::workload::key;
use super::{KEY_BYTES, Plan};
use anyhow::{Context, ensure};
use bytes::Bytes;
use hdrhistogram::Histogram;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use serde_json::{Value, json};
use shkv_client::Keyspace;
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Significant digits of the latencies kept.
const DIGITS: u8 = 3;
/// Keys that are drawn for the second operation, until one lies in another shard.
const DRAWS_MAX: u32 = 10_000;

/// The latencies of both, in nanoseconds.
#[derive(Debug)]
pub struct Outcome {
    puts: Histogram<u64>,
    txns: Histogram<u64>,
    errors: u64,
}

impl Outcome {
    fn new() -> anyhow::Result<Self> {
        let empty = || Histogram::new(DIGITS).context("a histogram");
        Ok(Self { puts: empty()?, txns: empty()?, errors: 0 })
    }

    /// How many times longer the transaction takes, by the median.
    fn ratio(&self) -> f64 {
        self.txns.value_at_quantile(0.5) as f64 / self.puts.value_at_quantile(0.5).max(1) as f64
    }

    /// For people.
    pub fn text(&self) -> String {
        let line = |name: &str, of: &Histogram<u64>| {
            let ms = |quantile| of.value_at_quantile(quantile) as f64 / 1e6;
            format!("{name} {} done, p50 {:.3} ms, p99 {:.3} ms", of.len(), ms(0.5), ms(0.99))
        };
        format!(
            "{}\n{}\nratio   {:.2} of the medians; {} failed",
            line("put    ", &self.puts),
            line("2 shards", &self.txns),
            self.ratio(),
            self.errors
        )
    }

    /// For programs.
    pub fn json(&self) -> Value {
        let told = |of: &Histogram<u64>| {
            let us = |quantile| of.value_at_quantile(quantile) / 1_000;
            json!({"ops": of.len(), "p50_us": us(0.5), "p99_us": us(0.99)})
        };
        json!({
            "mode": "txn", "put": told(&self.puts), "txn": told(&self.txns), "ratio_p50": self.ratio(),
            "errors": self.errors,
        })
    }
}

/// Runs the plan's clients; its workload says only how many keys there are.
///
/// # Errors
/// When the cluster cannot be reached, has one shard only, or nothing succeeds.
pub async fn run(target: &Target, plan: &Plan) -> anyhow::Result<Outcome> {
    let mut workers = JoinSet::new();
    for (conn, keyspace) in (0..plan.conns).zip(target.connect_groups(plan.conns).await?) {
        for lane in 0..plan.depth {
            let rng = SmallRng::seed_from_u64(u64::from(conn) << 32 | u64::from(lane));
            workers.spawn(work(keyspace.clone(), plan.clone(), rng));
        }
    }
    let mut all = Outcome::new()?;
    while let Some(worker) = workers.join_next().await {
        let one = worker.context("a worker")??;
        all.puts.add(&one.puts)?;
        all.txns.add(&one.txns)?;
        all.errors += one.errors;
    }
    ensure!(!all.puts.is_empty() && !all.txns.is_empty(), "no operation succeeded, {} failed", all.errors);
    Ok(all)
}

async fn work(keyspace: Keyspace, plan: Plan, mut rng: SmallRng) -> anyhow::Result<Outcome> {
    let value = Bytes::from(plan.value(&mut rng));
    let mut outcome = Outcome::new()?;
    let measured_from = Instant::now() + plan.warmup;
    let end = measured_from + plan.measured;
    while Instant::now() < end {
        let (first, second) = two_keys(&keyspace, &plan, &mut rng)?;
        let began = Instant::now();
        let put = keyspace.put(first, value.clone()).await.map(drop);
        let put_time = began.elapsed();
        let began = Instant::now();
        let txn = keyspace.txn().put(first, value.clone()).put(second, value.clone()).commit().await.map(drop);
        let txn_time = began.elapsed();
        if began < measured_from {
            continue;
        }
        for (result, time, of) in [(put, put_time, &mut outcome.puts), (txn, txn_time, &mut outcome.txns)] {
            match result {
                Ok(()) => of.record(nanos(time))?,
                Err(error) => {
                    if outcome.errors == 0 {
                        eprintln!("shkv-bench: the first operation of a worker that failed: {error}");
                    }
                    outcome.errors += 1;
                }
            }
        }
    }
    Ok(outcome)
}

fn nanos(time: Duration) -> u64 {
    time.as_nanos() as u64
}

/// Two keys of two shards.
fn two_keys(
    keyspace: &Keyspace,
    plan: &Plan,
    rng: &mut SmallRng,
) -> anyhow::Result<([u8; KEY_BYTES], [u8; KEY_BYTES])> {
    let first = key(rng.random_range(0..plan.workload.keys));
    for _ in 0..DRAWS_MAX {
        let second = key(rng.random_range(0..plan.workload.keys));
        if keyspace.shard_of(first) != keyspace.shard_of(second) {
            return Ok((first, second));
        }
    }
    anyhow::bail!("{DRAWS_MAX} keys all lie in one shard: a transaction over two needs a keyspace with more")
}
