//! The command line: what can be asked for, and what is said about it in the help. Pure but for the process's arguments.

use crate::outcome;
use crate::sizes;
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use shkv_client::Token;
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Most nodes that `up` starts on one machine.
const NODES_MAX: i64 = 32;

/// A sharded, replicated, durable, ordered key-value store.
#[derive(Debug, Parser)]
#[command(name = "shkv", version, after_help = outcome::EXIT_CODES)]
pub struct Cli {
    #[command(flatten)]
    pub global: Global,
    #[command(subcommand)]
    pub command: Command,
}

/// What every command takes.
#[derive(Debug, Clone, Args)]
pub struct Global {
    /// Addresses of balancers or nodes, separated by commas
    #[arg(long, env = "SHKV_ADDR", default_value = "127.0.0.1:7400", global = true, value_delimiter = ',', value_parser = address)]
    pub addr: Vec<String>,
    /// Keyspace
    #[arg(long, default_value = "default", global = true)]
    pub keyspace: String,
    /// How fresh a read must be
    #[arg(long, default_value = "linearizable", global = true)]
    pub consistency: Consistency,
    /// What an earlier call has seen (its JSON output tells it); a causal read sees at least that
    #[arg(long, global = true)]
    pub token: Option<Token>,
    /// How long a call may take
    #[arg(long, default_value = "5s", global = true, value_parser = timeout)]
    pub timeout: Duration,
    /// Form of what is printed
    #[arg(long, default_value = "text", global = true)]
    pub output: Output,
    /// Never talk to nodes directly
    #[arg(long, global = true)]
    pub through_balancer: bool,
}

/// The form of what is printed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Output {
    /// For people and pipes
    Text,
    /// One object; errors, too, on standard error
    Json,
    /// One object a line: the form that `load` reads
    Jsonl,
}

/// How fresh a read must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Consistency {
    /// Sees every write that was acknowledged before
    Linearizable,
    /// From any replica that has caught up with --token
    Causal,
    /// From any replica, whatever it has
    Eventual,
}

#[derive(Debug, Subcommand)]
pub enum Command {
    /// Start a whole cluster on this machine
    Up(Up),
    /// Start one node
    Node(Node),
    /// Start one balancer
    Balancer(Balancer),
    /// Write one row
    Put(Put),
    /// Read one row
    Get(Key),
    /// Remove one row
    Del(Key),
    /// Read rows in order
    Range(Range),
    /// Count rows
    Count(Count),
    /// Write the rows of a file
    Load(Load),
    /// Show nodes, shards and who leads them
    Status,
    /// Print a completion script
    Completion(Completion),
}

impl Command {
    /// Whether it serves others until it is stopped.
    pub fn serves(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Node(_) | Self::Balancer(_))
    }
}

#[derive(Debug, Args)]
pub struct Up {
    /// Number of nodes [default: 3, later those that are in the data directory]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub nodes: Option<u32>,
    /// Shards of the default keyspace, when the cluster is made
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub shards: u32,
    /// Copies of each shard, when the cluster is made [default: 3, or the number of nodes if that is less]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub replicas: Option<u32>,
    /// Data directory; it is made when missing
    #[arg(long, default_value = "./shkv-data")]
    pub data: PathBuf,
    /// Where the balancer listens
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// Where the balancer listens for HTTP
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub http: String,
    /// How nodes are run
    #[arg(long, default_value = "embedded")]
    pub spawn: Spawn,
    #[command(flatten)]
    pub tuning: Tuning,
}

/// How `up` runs its nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Spawn {
    /// All in this process
    Embedded,
    /// Each in a process of its own, which is started again when it dies
    Process,
}

/// Budgets of a node. Those that are not named keep the node's own defaults.
#[derive(Debug, Clone, Default, Args)]
pub struct Tuning {
    /// Rows in memory that are not yet in the store, such as 64MiB
    #[arg(long, value_parser = sizes::parse)]
    pub table_bytes: Option<u64>,
    /// The store's cache of pages
    #[arg(long, value_parser = sizes::parse)]
    pub cache_bytes: Option<u64>,
    /// One segment of the log
    #[arg(long, value_parser = sizes::parse)]
    pub log_segment_bytes: Option<u64>,
    /// Log kept for followers that have fallen behind; one further back gets a snapshot
    #[arg(long, value_parser = sizes::parse)]
    pub log_retain_bytes: Option<u64>,
    /// Free space on the disk under which puts are refused
    #[arg(long, value_parser = sizes::parse)]
    pub disk_reserve_bytes: Option<u64>,
    /// Threads, each of which drives a part of the shards and of the connections
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=256))]
    pub threads: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Node {
    /// A label such as Server0; it stays with the data directory
    #[arg(long, default_value = "Server0")]
    pub name: String,
    /// Data directory; it is made when missing
    #[arg(long)]
    pub data: PathBuf,
    /// Where it listens; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:7401")]
    pub listen: String,
    /// Stop when standard input is closed
    #[arg(long)]
    pub exit_with_parent: bool,
    #[command(flatten)]
    pub tuning: Tuning,
}

#[derive(Debug, Args)]
pub struct Balancer {
    /// Addresses of nodes, separated by commas
    #[arg(long, required = true, value_delimiter = ',', value_parser = address)]
    pub nodes: Vec<String>,
    /// If the nodes are in no cluster yet: make one of all of them
    #[arg(long)]
    pub bootstrap: bool,
    /// Shards of the default keyspace, when the cluster is made
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub shards: u32,
    /// Copies of each shard, when the cluster is made [default: 3, or the number of nodes if that is less]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub replicas: Option<u32>,
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// Where it listens for HTTP; not at all unless named
    #[arg(long)]
    pub http: Option<String>,
}

#[derive(Debug, Args)]
pub struct Put {
    /// Key; behind `--` if it begins with a dash
    pub key: OsString,
    /// Value; `-` reads it from standard input
    pub value: OsString,
}

#[derive(Debug, Args)]
pub struct Key {
    /// Key; behind `--` if it begins with a dash
    pub key: OsString,
}

#[derive(Debug, Args)]
pub struct Bounds {
    /// First key [default: the first of all]
    pub start: Option<OsString>,
    /// First key beyond the range [default: to the last of all]
    pub end: Option<OsString>,
    /// Only keys that begin with this
    #[arg(long)]
    pub prefix: Option<OsString>,
}

#[derive(Debug, Args)]
pub struct Range {
    #[command(flatten)]
    pub bounds: Bounds,
    /// Only keys behind this one, in the direction of the range: goes on where an earlier range ended
    #[arg(long)]
    pub after: Option<OsString>,
    /// From the last key to the first
    #[arg(long)]
    pub reverse: bool,
    /// At most this many rows
    #[arg(long)]
    pub limit: Option<u64>,
    /// Leave out the values
    #[arg(long)]
    pub keys_only: bool,
}

#[derive(Debug, Args)]
pub struct Count {
    #[command(flatten)]
    pub bounds: Bounds,
}

#[derive(Debug, Args)]
pub struct Load {
    /// File of rows; `-` is standard input
    pub file: PathBuf,
    /// Form of the rows [default: jsonl if the first line begins with a brace, otherwise tsv]
    #[arg(long)]
    pub format: Option<Format>,
    /// Go on behind the rows that an earlier load of the file has finished
    #[arg(long)]
    pub resume: bool,
    /// File that remembers how far the load has come [default: FILE.shkv-progress]
    #[arg(long)]
    pub progress: Option<PathBuf>,
}

/// The form of rows in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `{"key":…,"value":…}` a line, with `key_b64` and `value_b64` where a text is not UTF-8
    Jsonl,
    /// Key, tab, value
    Tsv,
}

#[derive(Debug, Args)]
pub struct Completion {
    /// Shell
    pub shell: clap_complete::Shell,
}

fn address(text: &str) -> Result<String, String> {
    let text = text.trim();
    match text.rsplit_once(':') {
        Some((host, port)) if !host.is_empty() && port.parse::<u16>().is_ok() => Ok(text.to_owned()),
        _ => Err("an address is host:port, for example 127.0.0.1:7400".into()),
    }
}

fn timeout(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|error| format!("{error}; write for example 500ms or 5s"))?;
    if time.is_zero() { Err("it must be more than nothing".into()) } else { Ok(time) }
}

impl Cli {
    /// Reads the process's arguments. A usage error is told in the form that `--output` asks for.
    pub fn from_command_line() -> Result<Self, ExitCode> {
        Self::try_parse().map_err(|error| match error.kind() {
            ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => {
                let _ = error.print(); // nobody is left to be told that nobody listens
                ExitCode::SUCCESS
            }
            _ if wants_json(std::env::args_os()) => outcome::end_of_usage(&error.render().to_string()),
            _ => {
                let _ = error.print();
                ExitCode::from(outcome::EXIT_REFUSED)
            }
        })
    }
}

fn wants_json(args: impl Iterator<Item = OsString>) -> bool {
    let args: Vec<OsString> = args.collect();
    args.iter().any(|arg| arg == "--output=json" || arg == "--output=jsonl")
        || args.windows(2).any(|pair| pair[0] == "--output" && (pair[1] == "json" || pair[1] == "jsonl"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(line.split(' '))
    }

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
    }

    #[test]
    fn global_options_are_taken_before_and_behind_the_command() {
        for line in ["shkv --output json --addr a:1,b:2 get k", "shkv get k --addr a:1,b:2 --output json"] {
            let cli = parse(line).unwrap();
            assert_eq!((cli.global.output, cli.global.addr), (Output::Json, vec!["a:1".into(), "b:2".into()]));
        }
    }

    #[test]
    fn a_range_takes_its_bounds_and_options() {
        let Command::Range(range) = parse("shkv range a z --reverse --limit 5 --keys-only").unwrap().command else {
            panic!("not a range")
        };
        assert_eq!((range.bounds.start.unwrap(), range.bounds.end.unwrap()), ("a".into(), "z".into()));
        assert!(range.reverse && range.keys_only && range.limit == Some(5));
    }

    #[test]
    fn up_takes_sizes_and_times_as_people_write_them() {
        let cli = parse("shkv up --nodes 5 --table-bytes 64MiB --spawn process --timeout 250ms").unwrap();
        assert_eq!(cli.global.timeout, Duration::from_millis(250));
        let Command::Up(up) = cli.command else { panic!("not up") };
        assert_eq!((up.nodes, up.tuning.table_bytes, up.spawn), (Some(5), Some(64 << 20), Spawn::Process));
    }

    #[test]
    fn what_makes_no_sense_is_a_usage_error() {
        let lines = [
            "shkv",
            "shkv get",
            "shkv put k",
            "shkv get k --timeout 0s",
            "shkv get k --timeout soon",
            "shkv up --nodes 0",
            "shkv get k --consistency maybe",
            "shkv get k --token 12",
            "shkv get k --addr nowhere",
            "shkv get k --addr a:1,,b:2",
            "shkv balancer",
            "shkv fly",
        ];
        for line in lines {
            let error = parse(line).unwrap_err();
            assert_eq!(error.exit_code(), i32::from(outcome::EXIT_REFUSED), "{line}");
        }
    }

    #[test]
    fn json_is_seen_in_a_line_that_does_not_parse() {
        let seen = |line: &str| wants_json(line.split(' ').map(OsString::from));
        assert!(seen("shkv get --output json") && seen("shkv --output=json fly"));
        assert!(!seen("shkv get --output text"));
    }
}
