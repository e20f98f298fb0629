//! Runs simulated clusters: one seed, or seeds without end on as many threads as are wanted.

use clap::Parser;
use shkv_node::inspect::Bug;
use shkv_tests::sim::many::{Sum, keep, repeat, run_many};
use shkv_tests::sim::run::{Outcome, Setup, run};
use shkv_tests::sim::scenes::{drained_after_a_loss, power_lost_in_a_snapshot, promise_forgotten};
use std::process::ExitCode;
use std::time::{Duration, Instant};

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Seeds between two lines that say how far it is.
const SPEAKS_EVERY: u64 = 50;

/// Simulates clusters under faults and judges what they tell.
#[derive(Parser)]
struct Args {
    /// Runs this seed, twice, and compares
    #[arg(long)]
    seed: Option<u64>,
    /// Prints everything that happens in that seed
    #[arg(long, requires = "seed")]
    trace: bool,
    /// Prints what the processes log in that seed, as RUST_LOG would filter it
    #[arg(long, requires = "seed")]
    log: Option<String>,
    /// Runs the scenes of that seed instead: what may happen to a snapshot, to a group that becomes smaller, and to a promise
    #[arg(long, requires = "seed")]
    scenes: bool,
    /// The first of many seeds
    #[arg(long, default_value_t = 1)]
    from: u64,
    /// How many seeds; all of them if it is left out
    #[arg(long)]
    count: Option<u64>,
    /// Ends after so many seconds
    #[arg(long)]
    secs: Option<u64>,
    /// Threads
    #[arg(long, default_value_t = 1)]
    threads: usize,
    /// Plants a fault in the nodes, by name
    #[arg(long, value_parser = bug)]
    plant: Option<Bug>,
    /// Goes on after a seed that fails
    #[arg(long)]
    keep_going: bool,
}

fn bug(name: &str) -> Result<Bug, String> {
    let all = Bug::ALL.map(|bug| format!("{bug:?}"));
    Bug::ALL.into_iter().find(|bug| format!("{bug:?}") == name).ok_or(format!("none of {}", all.join(", ")))
}

fn main() -> ExitCode {
    let args = Args::parse();
    match args.seed {
        Some(seed) => one(&args, seed),
        None => many(&args),
    }
}

fn one(args: &Args, seed: u64) -> ExitCode {
    if let Some(filter) = &args.log {
        let filter = tracing_subscriber::EnvFilter::new(filter);
        tracing_subscriber::fmt().with_env_filter(filter).without_time().with_writer(std::io::stderr).init();
    }
    if args.scenes {
        let scenes = [power_lost_in_a_snapshot(seed), drained_after_a_loss(seed), promise_forgotten(seed, args.plant)];
        for scene in &scenes {
            println!("{}", told(scene));
            scene.violations.iter().for_each(|violation| println!("WRONG {violation}"));
        }
        let is_right = scenes.iter().all(|scene| scene.violations.is_empty());
        return if is_right { ExitCode::SUCCESS } else { ExitCode::FAILURE };
    }
    let first = run(Setup { seed, bug: args.plant, lines: args.trace });
    first.lines.iter().for_each(|line| println!("{line}"));
    println!("{}", told(&first));
    first.violations.iter().for_each(|violation| println!("WRONG {violation}"));
    if args.log.is_none() && run(Setup { seed, bug: args.plant, lines: false }).trace != first.trace {
        println!("WRONG the same seed gave another trace");
        return ExitCode::FAILURE;
    }
    if first.violations.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn told(outcome: &Outcome) -> String {
    let Outcome { seed, trace: (hash, events), simulated_ms, faults, counts, crashes, .. } = outcome;
    format!("seed {seed}: trace {hash:016x} of {events} events, {simulated_ms} ms, {counts:?}, {faults:?}, {crashes:?}")
}

#[expect(clippy::disallowed_methods, reason = "tells how fast it is")]
fn many(args: &Args) -> ExitCode {
    let began = Instant::now();
    let within = args.secs.map(Duration::from_secs);
    let seeds = args.from..args.count.map_or(u64::MAX, |count| args.from.saturating_add(count));
    let speak = |sum: &Sum| {
        let secs = began.elapsed().as_secs_f64();
        let hours = sum.simulated_ms as f64 / 3_600_000.0;
        println!(
            "{} seeds in {secs:.0} s, {:.2} seeds/s; {hours:.2} simulated hours; {} faults; {} operations; {} failed",
            sum.seeds,
            sum.seeds as f64 / secs,
            sum.faults_in_all(),
            sum.operations,
            sum.failed.len()
        );
    };
    let more = |sum: &Sum| {
        if sum.seeds.is_multiple_of(SPEAKS_EVERY) {
            speak(sum);
        }
        let goes_on = args.keep_going || sum.failed.is_empty();
        goes_on && within.is_none_or(|within| began.elapsed() < within)
    };
    let each = |outcome: &Outcome| {
        for violation in &outcome.violations {
            println!("seed {} is WRONG: {violation}\n  {}", outcome.seed, repeat(outcome.seed, args.plant));
        }
        if args.plant.is_none()
            && !outcome.violations.is_empty()
            && let Err(error) = keep(outcome)
        {
            println!("the seed could not be kept: {error}");
        }
    };
    let sum = run_many(seeds, args.threads, args.plant, more, each);
    speak(&sum);
    for (title, counts) in [("faults", &sum.faults), ("reached", &sum.reached), ("ended at", &sum.crashes)] {
        println!("{title}:");
        counts.iter().for_each(|(what, count)| println!("{count:>10}  {what}"));
    }
    if sum.failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
