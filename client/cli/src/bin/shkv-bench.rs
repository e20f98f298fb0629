//! The binary `shkv-bench`: a loop of operations against a running cluster, and what it cost.
//!
//! Each of `--conns` clients has its own sockets and `--depth` requests in flight. A request is sent when the one before
//! it has been answered, so the speed told is the one that the cluster keeps up; or, with `--rate`, when it is due, and
//! then what is late counts from when it was due. It starts no server and leaves its keys.

#[path = "../bench/mod.rs"]
mod bench;

use anyhow::{Context, bail};
use bench::measure::Outcome;
use bench::peer::{self, Peer};
use bench::workload::{Mix, Spread, Workload};
use bench::{failover, store, txn};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::process::ExitCode;
use std::time::Duration;

#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// Measures the speed of a shkv cluster.
#[derive(Clone, Debug, Parser)]
#[command(name = "shkv-bench", version)]
struct Args {
    /// What to do
    mode: Mode,
    /// Addresses of balancers or nodes, separated by commas
    #[arg(long, env = "SHKV_ADDR", default_value = "127.0.0.1:7400", value_delimiter = ',')]
    addr: Vec<String>,
    /// Keyspace
    #[arg(long, default_value = "default")]
    keyspace: String,
    /// Clients, each with its own connections
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    conns: u32,
    /// Requests in flight per client
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=1024))]
    depth: u32,
    /// Keys that are there before it begins
    #[arg(long, default_value_t = 100_000, value_parser = clap::value_parser!(u64).range(1..))]
    keys: u64,
    /// Which keys are chosen; without it as the mode has it, which is uniform but for YCSB
    #[arg(long)]
    keys_chosen: Option<Spread>,
    /// Operations per second, begun whether or not those before have ended; without it each waits for the one before
    #[arg(long, value_parser = rate)]
    rate: Option<f64>,
    /// Rows of each read of `scan`
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    scan_rows: u32,
    /// Bytes of each value
    #[arg(long, default_value_t = 100)]
    value_bytes: usize,
    /// Seconds that are measured
    #[arg(long, default_value_t = 4.0, value_parser = seconds)]
    secs: f64,
    /// Seconds of the same before them
    #[arg(long, default_value_t = 1.0, value_parser = seconds)]
    warmup_secs: f64,
    /// How fresh a read must be
    #[arg(long, default_value = "linearizable")]
    consistency: Consistency,
    /// Leaders that `failover` kills
    #[arg(long, default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    kills: u32,
    /// Part of the operations of `mixed` that are gets
    #[arg(long, default_value_t = 0.5, value_parser = ratio)]
    read_ratio: f64,
    /// Never talk to nodes directly
    #[arg(long)]
    through_balancer: bool,
    /// Threads of this process
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=256))]
    threads: u32,
    /// Also run the same loop against a peer: redis://HOST:PORT, redis://HOST:PORT?wait=1 for a WAIT after each put, or, if
    /// built with the feature `etcd`, etcd://HOST:PORT,HOST:PORT
    #[arg(long, value_parser = peer::parse)]
    peer: Vec<Peer>,
    /// Form of the result
    #[arg(long, default_value = "text")]
    output: Output,
}

/// What the operations are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Mode {
    /// Only writes
    Put,
    /// Only reads, of keys that are loaded first if they are not there
    Get,
    /// Both
    Mixed,
    /// Only reads of several rows in order
    Scan,
    /// YCSB A: half reads, half updates, zipfian
    YcsbA,
    /// YCSB B: 95 % reads, the rest updates, zipfian
    YcsbB,
    /// YCSB C: only reads, zipfian
    YcsbC,
    /// YCSB D: 95 % reads of the latest keys, the rest inserts
    YcsbD,
    /// YCSB E: 95 % scans of 1 to 100 rows, the rest inserts
    YcsbE,
    /// YCSB F: half reads, half reads followed by an update
    YcsbF,
    /// Kills the leader of one shard after the other, and takes the time until the next acknowledged write: the nodes must
    /// be processes of this machine that are started again, as those of `shkv up --spawn process` are
    Failover,
    /// Puts, and transactions of two puts in two shards, in turn; tells how much longer the latter take
    Txn,
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Consistency {
    /// Sees every acknowledged write
    Linearizable,
    /// Sees what its client has seen
    Causal,
    /// Sees whatever the replica has
    Eventual,
}

/// The form of the result.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Output {
    /// For people
    Text,
    /// One object, on the last line
    Json,
}

impl From<Consistency> for shkv_client::Consistency {
    fn from(asked: Consistency) -> Self {
        match asked {
            Consistency::Linearizable => Self::Linearizable,
            Consistency::Causal => Self::Causal,
            Consistency::Eventual => Self::Eventual,
        }
    }
}

/// Longest time that may be measured, in seconds.
const SECS_MAX: f64 = 86_400.0;
/// Most operations per second that may be asked for.
const RATE_MAX: f64 = 10_000_000.0;

fn seconds(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(secs) if (0.0..=SECS_MAX).contains(&secs) => Ok(secs),
        _ => Err(format!("a number from 0 to {SECS_MAX}")),
    }
}

fn ratio(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(ratio) if (0.0..=1.0).contains(&ratio) => Ok(ratio),
        _ => Err("a number from 0 to 1".into()),
    }
}

fn rate(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(rate) if (1.0..=RATE_MAX).contains(&rate) => Ok(rate),
        _ => Err(format!("a number from 1 to {RATE_MAX}")),
    }
}

impl Args {
    fn workload(&self) -> Workload {
        let plain = |mix| Workload {
            mix,
            spread: Spread::Uniform,
            keys: self.keys,
            scan_rows: self.scan_rows,
            scan_whole: true,
        };
        let none = Mix::default();
        let ycsb = |letter| Workload::ycsb(letter, self.keys).unwrap_or_else(|| plain(none));
        let workload = match self.mode {
            Mode::Put | Mode::Failover | Mode::Txn => plain(Mix { put: 1.0, ..none }),
            Mode::Get => plain(Mix { get: 1.0, ..none }),
            Mode::Mixed => plain(Mix { get: self.read_ratio, put: 1.0 - self.read_ratio, ..none }),
            Mode::Scan => plain(Mix { scan: 1.0, ..none }),
            Mode::YcsbA => ycsb('a'),
            Mode::YcsbB => ycsb('b'),
            Mode::YcsbC => ycsb('c'),
            Mode::YcsbD => ycsb('d'),
            Mode::YcsbE => ycsb('e'),
            Mode::YcsbF => ycsb('f'),
        };
        Workload { spread: self.keys_chosen.unwrap_or(workload.spread), ..workload }
    }

    fn plan(&self) -> bench::Plan {
        bench::Plan {
            conns: self.conns,
            depth: self.depth,
            workload: self.workload(),
            rate: self.rate,
            value_bytes: self.value_bytes,
            warmup: Duration::from_secs_f64(self.warmup_secs),
            measured: Duration::from_secs_f64(self.secs),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().worker_threads(args.threads as usize).enable_all().build();
    let result = runtime.context("no threads to run on").and_then(|runtime| runtime.block_on(Box::pin(run(&args))));
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("shkv-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

async fn run(args: &Args) -> anyhow::Result<()> {
    if args.mode == Mode::Failover {
        let outcome = failover::run(&args.addr, &args.keyspace, args.kills).await?;
        match args.output {
            Output::Json => println!("{}", outcome.json()),
            Output::Text => println!("{}", outcome.text()),
        }
        return Ok(());
    }
    let plan = args.plan();
    let target = store::Target {
        addrs: args.addr.clone(),
        keyspace: args.keyspace.clone(),
        consistency: args.consistency.into(),
        through_balancer: args.through_balancer,
    };
    if args.mode == Mode::Txn {
        let outcome = txn::run(&target, &plan).await?;
        match args.output {
            Output::Json => println!("{}", outcome.json()),
            Output::Text => println!("{}", outcome.text()),
        }
        return Ok(());
    }
    let shkv = store::run(&target, &plan).await?;
    let mut peers = Vec::with_capacity(args.peer.len());
    for peer in &args.peer {
        peers.push((peer, peer.run(&plan).await.with_context(|| peer.to_string())?));
    }
    match args.output {
        Output::Json => println!("{}", told(args, &shkv, &peers)),
        Output::Text => {
            println!("shkv   {}", shkv.text());
            for (peer, outcome) in &peers {
                println!("{peer}   {}", outcome.text());
                println!("ratio  {:.3} operations of shkv for one of it", shkv.ops_per_sec() / outcome.ops_per_sec());
            }
        }
    }
    if shkv.ops == 0 {
        bail!("no operation succeeded, {} failed", shkv.errors);
    }
    Ok(())
}

fn told(args: &Args, shkv: &Outcome, peers: &[(&Peer, Outcome)]) -> Value {
    let mut told = shkv.json();
    told["mode"] = json!(args.mode.to_possible_value().map(|mode| mode.get_name().to_owned()));
    told["conns"] = json!(args.conns);
    told["depth"] = json!(args.depth);
    told["keys"] = json!(args.keys);
    told["value_bytes"] = json!(args.value_bytes);
    told["rate"] = json!(args.rate);
    told["through_balancer"] = json!(args.through_balancer);
    let peer = |(peer, outcome): &(&Peer, Outcome)| {
        let ratio = shkv.ops_per_sec() / outcome.ops_per_sec();
        json!({ "peer": peer.to_string(), "measured": outcome.json(), "ratio_ops": ratio })
    };
    told["peers"] = peers.iter().map(peer).collect();
    told
}
