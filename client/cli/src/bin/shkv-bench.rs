//! The binary `shkv-bench`: a loop of operations against a running cluster, and what it cost.
//!
//! `--conns` times `--depth` requests are in flight, each from a task of its own. Against shkv the tasks share one client, as
//! those of an application should, and with it one connection to each node; `--clients` gives them more. Against peers
//! there are `--conns` connections. A request is sent when the one before it has been answered, so the speed told is the one
//! that the cluster keeps up; or, with `--rate`, when it is due, and then what is late counts from when it was due. It
//! starts no server and leaves its keys.

#[path = "../bench/mod.rs"]
mod bench;

use anyhow::{Context, bail};
use bench::measure::Outcome;
use bench::peer::{self, Peer};
use bench::report::{self, Report, Work};
use bench::workload::{Mix, Spread, Workload};
use bench::{analysis, failover, store, suite, txn, web};
use clap::{Parser, ValueEnum};
use serde_json::{Value, json};
use std::fs;
use std::path::{Path, PathBuf};
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
    /// Groups of tasks; connections to a peer
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u32).range(1..=4096))]
    conns: u32,
    /// Clients of shkv that the tasks share, each with its own connection to every node; `--conns` at the most
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(1..=4096))]
    clients: u32,
    /// Tasks per group: each has one request in flight
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
    /// HTTP listener of a balancer: the same loop over its /v1/kv, too; with `analysis`, its /home; with `web` it is needed
    #[arg(long)]
    http: Option<String>,
    /// With `analysis` and `web`: the database behind --http, too, which is configured anew and LOSES WHAT IT HOLDS
    #[arg(long, requires = "http")]
    database: bool,
    /// With `web`: a static file of a web server on this machine, which the rows are measured against: http://HOST:PORT/PATH
    #[arg(long, requires = "http")]
    file: Option<String>,
    /// How often all systems are measured, in turn; the middle round of each is told. 5 for `web`, else 1
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1_000))]
    rounds: Option<u32>,
    /// Requests of each analysis
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    requests: u64,
    /// Also write a report: one HTML file with tables and charts, which loads nothing
    #[arg(long)]
    report: Option<PathBuf>,
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
    /// Puts, gets, scans, YCSB A to F, directly and through a balancer, one after the other
    Suite,
    /// Gets of rows over HTTP, and with --database writes of rows, in turn with gets of a static file of a web server
    Web,
    /// How evenly requests are spread by pairs of hash functions, and what moves; with --http, also by a running cluster
    Analysis,
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
    /// For people, one line for each system, everything in columns
    Table,
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
/// Most requests under way at the same time in an analysis: each has a connection of its own.
const AT_ONCE_MAX: u32 = 1_000;
/// Rounds of `web`, unless more or fewer are asked for.
const WEB_ROUNDS: u32 = 5;
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
            Mode::Put | Mode::Failover | Mode::Txn | Mode::Suite | Mode::Analysis => plain(Mix { put: 1.0, ..none }),
            Mode::Get | Mode::Web => plain(Mix { get: 1.0, ..none }),
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
            load: true,
            warmup: Duration::from_secs_f64(self.warmup_secs),
            measured: Duration::from_secs_f64(self.secs),
        }
    }
}

fn main() -> ExitCode {
    let args = Args::parse();
    // One thread needs no scheduler that shares tasks out among several.
    let runtime = match args.threads {
        1 => tokio::runtime::Builder::new_current_thread().enable_all().build(),
        threads => tokio::runtime::Builder::new_multi_thread().worker_threads(threads as usize).enable_all().build(),
    };
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
    match args.mode {
        Mode::Failover => {
            let outcome = failover::run(&args.addr, &args.keyspace, args.kills).await?;
            match args.output {
                Output::Json => println!("{}", outcome.json()),
                Output::Text | Output::Table => println!("{}", outcome.text()),
            }
            Ok(())
        }
        Mode::Txn => {
            let outcome = txn::run(&args.setting().target, &args.plan()).await?;
            match args.output {
                Output::Json => println!("{}", outcome.json()),
                Output::Text | Output::Table => println!("{}", outcome.text()),
            }
            Ok(())
        }
        Mode::Analysis => analyse(args).await,
        Mode::Web => {
            let http = args.http.clone().context("web needs --http")?;
            let wish = web::Wish {
                http,
                file: args.file.clone(),
                database: args.database,
                rounds: args.rounds.unwrap_or(WEB_ROUNDS),
            };
            let findings = web::run(&args.setting().target, &wish, &args.plan()).await?;
            match args.output {
                Output::Json => println!("{}", findings.json()),
                Output::Text | Output::Table => print!("{}", findings.text()),
            }
            Ok(())
        }
        Mode::Suite => {
            let works = suite::run(&args.setting(), &args.plan()).await?;
            args.write_report("shkv: measurements", |report| report.works(&works))?;
            match args.output {
                Output::Json => {
                    let works: Vec<Value> = works.iter().map(work_json).collect();
                    println!("{}", json!({"mode": "suite", "works": works}));
                }
                Output::Text | Output::Table => print!("{}", report::table(&works).text()),
            }
            Ok(())
        }
        _ => measure(args).await,
    }
}

/// One work, for programs.
fn work_json(work: &Work) -> Value {
    let system = |(name, outcome): &(String, Outcome)| json!({"system": name, "measured": outcome.json()});
    json!({"work": work.name, "systems": work.outcomes.iter().map(system).collect::<Vec<_>>()})
}

async fn analyse(args: &Args) -> anyhow::Result<()> {
    let wish = analysis::Wish {
        requests: args.requests,
        at_once: args.conns.saturating_mul(args.depth).min(AT_ONCE_MAX),
        http: args.http.clone(),
        database: args.database,
    };
    let findings = analysis::run(&wish).await?;
    match args.output {
        Output::Json => println!("{}", findings.json),
        Output::Text | Output::Table => print!("{}", findings.text),
    }
    args.report.as_deref().map_or(Ok(()), |file| write_file(file, &findings.report.finish()))
}

fn write_file(file: &Path, text: &str) -> anyhow::Result<()> {
    fs::write(file, text).with_context(|| format!("writing {}", file.display()))?;
    eprintln!("shkv-bench: wrote {}", file.display());
    Ok(())
}

impl Args {
    fn setting(&self) -> suite::Setting {
        let target = store::Target {
            addrs: self.addr.clone(),
            keyspace: self.keyspace.clone(),
            consistency: self.consistency.into(),
            through_balancer: self.through_balancer,
            clients: self.clients,
        };
        suite::Setting { target, http: self.http.clone(), peers: self.peer.clone(), rounds: self.rounds.unwrap_or(1) }
    }

    fn write_report(&self, title: &str, write: impl FnOnce(&mut Report)) -> anyhow::Result<()> {
        let Some(file) = &self.report else { return Ok(()) };
        let mut report = Report::new(title);
        report.text(&format!(
            "{} keys, values of {} bytes, {} s each after {} s of warm-up. Ratios are operations of the first system for one of \
             the other. Costs are of all servers of a system; wire bytes are those of this machine's loopback, both ways of \
             everyone on it. A system that does not tell a number has a dash.",
            self.keys, self.value_bytes, self.secs, self.warmup_secs
        ));
        write(&mut report);
        write_file(file, &report.finish())
    }
}

async fn measure(args: &Args) -> anyhow::Result<()> {
    let mode = args.mode.to_possible_value().map(|mode| mode.get_name().to_owned()).unwrap_or_default();
    let work = suite::one(&args.setting(), &format!("{mode}, {} × {}", args.conns, args.depth), &args.plan()).await?;
    let works = [work];
    args.write_report(&format!("shkv: {mode}"), |report| report.works(&works))?;
    let [work] = &works;
    let Some(((_, shkv), others)) = work.outcomes.split_first() else { bail!("nothing was measured") };
    match args.output {
        Output::Json => println!("{}", told(args, shkv, others)),
        Output::Table => print!("{}", report::table(&works).text()),
        Output::Text => {
            println!("shkv   {}", shkv.text());
            for (name, outcome) in others {
                println!("{name}   {}", outcome.text());
                println!("ratio  {:.3} operations of shkv for one of it", shkv.ops_per_sec() / outcome.ops_per_sec());
            }
        }
    }
    if shkv.ops == 0 {
        bail!("no operation succeeded, {} failed", shkv.errors);
    }
    Ok(())
}

fn told(args: &Args, shkv: &Outcome, others: &[(String, Outcome)]) -> Value {
    let mut told = shkv.json();
    told["mode"] = json!(args.mode.to_possible_value().map(|mode| mode.get_name().to_owned()));
    told["conns"] = json!(args.conns);
    told["clients"] = json!(args.clients.min(args.conns));
    told["depth"] = json!(args.depth);
    told["keys"] = json!(args.keys);
    told["value_bytes"] = json!(args.value_bytes);
    told["rate"] = json!(args.rate);
    told["through_balancer"] = json!(args.through_balancer);
    let other = |(name, outcome): &(String, Outcome)| {
        let ratio = shkv.ops_per_sec() / outcome.ops_per_sec();
        json!({ "peer": name, "measured": outcome.json(), "ratio_ops": ratio })
    };
    told["peers"] = others.iter().map(other).collect();
    told
}
