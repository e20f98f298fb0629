//! Many seeds, on as many threads as are wanted, with a sum of what they did.

use super::faults::Faults;
use super::run::{Outcome, Setup, run};
use parking_lot::Mutex;
use shkv_node::inspect::Bug;
use std::collections::BTreeMap;
use std::io::Write;
use std::sync::atomic::{AtomicU64, Ordering};

/// What many seeds did.
#[derive(Default, Debug)]
pub struct Sum {
    /// Seeds that were run.
    pub seeds: u64,
    /// Simulated milliseconds.
    pub simulated_ms: u64,
    /// What went wrong on purpose.
    pub faults: Faults,
    /// How often what was reached.
    pub reached: BTreeMap<&'static str, u64>,
    /// Where processes were ended in the middle of what they did.
    pub crashes: BTreeMap<&'static str, u64>,
    /// Operations that were acknowledged.
    pub operations: u64,
    /// Seeds with what was wrong.
    pub failed: Vec<(u64, Vec<String>)>,
}

impl Sum {
    /// Takes in what came out of a seed.
    pub fn add(&mut self, outcome: &Outcome) {
        self.seeds += 1;
        self.simulated_ms += outcome.simulated_ms;
        self.operations += outcome.counts.done + outcome.counts.batches;
        let pairs = [
            (&mut self.faults, &outcome.faults),
            (&mut self.reached, &outcome.reached),
            (&mut self.crashes, &outcome.crashes),
        ];
        for (sum, of_seed) in pairs {
            for (what, count) in of_seed {
                *sum.entry(what).or_default() += count;
            }
        }
        if !outcome.violations.is_empty() {
            self.failed.push((outcome.seed, outcome.violations.clone()));
        }
    }

    /// Faults of all kinds.
    #[must_use]
    pub fn faults_in_all(&self) -> u64 {
        self.faults.values().sum()
    }
}

/// The command that repeats a seed.
#[must_use]
pub fn repeat(seed: u64, bug: Option<Bug>) -> String {
    let bug = bug.map_or_else(String::new, |bug| format!(" --plant {bug:?}"));
    format!("cargo run --release -p shkv-tests --bin simulate -- --seed {seed}{bug}")
}

/// Where the seeds are kept that once found something.
const KEPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/seeds.txt");

/// The seeds that once found something.
#[must_use]
pub fn kept() -> Vec<u64> {
    let text = std::fs::read_to_string(KEPT).unwrap_or_default();
    text.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect()
}

/// Keeps a seed that found something.
///
/// # Errors
/// The system's.
pub fn keep(outcome: &Outcome) -> std::io::Result<()> {
    if kept().contains(&outcome.seed) {
        return Ok(());
    }
    let mut file = std::fs::OpenOptions::new().append(true).create(true).open(KEPT)?;
    let what = outcome.violations.first().and_then(|violation| violation.lines().next()).unwrap_or_default();
    writeln!(file, "{} {what}", outcome.seed)
}

/// Runs seeds on several threads until there are no more, or `more` says so; `each` is told of every one.
pub fn run_many(
    seeds: impl Iterator<Item = u64> + Send,
    threads: usize,
    bug: Option<Bug>,
    more: impl Fn(&Sum) -> bool + Sync,
    each: impl Fn(&Outcome) + Sync,
) -> Sum {
    let (seeds, sum, going) = (Mutex::new(seeds), Mutex::new(Sum::default()), AtomicU64::new(1));
    let work = || {
        while going.load(Ordering::Relaxed) == 1 {
            let Some(seed) = seeds.lock().next() else { return };
            let outcome = run(Setup { seed, bug, lines: false });
            each(&outcome);
            let mut sum = sum.lock();
            sum.add(&outcome);
            if !more(&sum) {
                going.store(0, Ordering::Relaxed);
            }
        }
    };
    std::thread::scope(|scope| {
        for _ in 1..threads.max(1) {
            scope.spawn(work);
        }
        work();
    });
    sum.into_inner()
}
