//! The command line: what can be asked for, and what is said about it in the help. Pure but for the process's arguments.

mod keyspaces;
mod rows;

pub use keyspaces::Keyspaces;
pub use rows::*;

use crate::outcome;
use crate::sizes;
use clap::error::ErrorKind;
use clap::{Args, Parser, Subcommand, ValueEnum};
use shkv_client::Token;
use shkv_proto::limits::{CAPACITY_MAX, CAPACITY_USUAL};
use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

/// Most nodes that `up` starts on one machine, and most that one command asks for.
const NODES_MAX: i64 = 1_000;

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
    /// Start one member of a cluster of equals: a node and a balancer in one process
    Serve(Serve),
    /// Write one row
    Put(Put),
    /// Read one row
    Get(Key),
    /// Remove one row
    Del(Del),
    /// Check, read and write several rows in one step, as standard input says in JSON
    #[command(after_help = crate::txn::HELP)]
    Txn,
    /// Read rows in order
    Range(Range),
    /// Count rows
    Count(Count),
    /// Write the rows of a file
    Load(Load),
    /// Show nodes, shards, who leads them, and what is under way
    Status,
    /// Show the nodes
    Nodes,
    /// Show the shards
    Shards,
    /// Make, drop and show keyspaces
    #[command(subcommand)]
    Keyspace(Keyspaces),
    /// Add nodes, started by the balancer's provisioner
    Add(Add),
    /// Remove nodes: each is drained first, and then it is of the cluster no more
    Rm(Rm),
    /// Move everything off a node, or with --undo let it be used again
    Drain(Drain),
    /// Give the leadership of a shard to the replica on a node
    Transfer(Transfer),
    /// Ask who answers at an address, and whether it is well
    Ping,
    /// Compare ways of consistent hashing: how evenly each spreads, and how much moves
    Hashing(Hashing),
    /// Print a completion script
    Completion(Completion),
}

impl Command {
    /// Whether it serves others until it is stopped.
    pub fn serves(&self) -> bool {
        matches!(self, Self::Up(_) | Self::Node(_) | Self::Balancer(_) | Self::Serve(_))
    }
}

/// The name of a node that is given none.
pub const NAME_DEFAULT: &str = "Server0";

#[derive(Debug, Args)]
pub struct Up {
    /// Number of nodes [default: 3, later those that are in the data directory]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub nodes: Option<u32>,
    #[command(flatten)]
    pub layout: Layout,
    /// Data directory; it is made when missing
    #[arg(long, default_value = "./shkv-data")]
    pub data: PathBuf,
    /// Where the balancer listens
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// Where the balancer listens for HTTP
    #[arg(long, default_value = "127.0.0.1:8080")]
    pub http: String,
    /// Where the first node's own HTTP listener is; the others have the next ports, or any with port 0. None unless named
    #[arg(long, value_parser = address)]
    pub node_http: Option<String>,
    #[command(flatten)]
    pub dialects: Dialects,
    /// How nodes are run
    #[arg(long, default_value = "embedded")]
    pub spawn: Spawn,
    #[command(flatten)]
    pub healing: Healing,
    #[command(flatten)]
    pub tuning: Tuning,
}

/// How HTTP listeners answer where the clients of a dialect differ.
#[derive(Debug, Clone, Args)]
pub struct Dialects {
    /// Edition of the causal key-value store's REST: 2019 joins lists by commas, 2020 answers JSON arrays
    #[arg(long, default_value = "2019")]
    pub kvs_dialect: KvsDialect,
    /// Form of the batch proxy's answer to /set
    #[arg(long, default_value = "object")]
    pub set_shape: SetShape,
}

/// Editions of the causal key-value store.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KvsDialect {
    /// Strings joined by commas
    #[value(name = "2019")]
    Of2019,
    /// JSON arrays
    #[value(name = "2020")]
    Of2020,
}

/// Forms of the batch proxy's answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum SetShape {
    /// One object
    Object,
    /// An array of one object
    Array,
}

impl Dialects {
    /// As the balancer takes them.
    pub fn chosen(&self) -> shkv_balancer::Dialects {
        shkv_balancer::Dialects {
            kvs: match self.kvs_dialect {
                KvsDialect::Of2019 => shkv_balancer::KvsDialect::Of2019,
                KvsDialect::Of2020 => shkv_balancer::KvsDialect::Of2020,
            },
            set: match self.set_shape {
                SetShape::Object => shkv_balancer::SetShape::Object,
                SetShape::Array => shkv_balancer::SetShape::Array,
            },
        }
    }
}

/// The first layout of a cluster, when it is made.
#[derive(Debug, Clone, Args)]
pub struct Layout {
    /// Shards of the default keyspace, when the cluster is made
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=4096))]
    pub shards: u32,
    /// Copies of each shard that are wanted, when the cluster is made; there are fewer while there are fewer nodes [default: 3]
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=9))]
    pub replicas: Option<u32>,
}

/// How a balancer looks after nodes.
#[derive(Debug, Clone, Args)]
pub struct Healing {
    /// How long a node must have been silent before it is replaced
    #[arg(long, default_value = "10s", value_parser = timeout)]
    pub replace_after: Duration,
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

/// Memory for rows and pages that all nodes of one process share, unless it is named.
const MEMORY_SHARED_BYTES: u64 = 1 << 30;
/// The least of each that a node can do with.
const MEMORY_SHARE_BYTES_MIN: u64 = 4 << 20;
/// From so many nodes on this machine on, each has a smaller share, and smaller segments of the log.
const NODES_MANY: u64 = 9;
/// A segment of the log of one of many nodes.
const SEGMENT_BYTES_OF_MANY: u64 = 2 << 20;

impl Tuning {
    /// The budgets of each of `nodes` that share this machine: many nodes have to do with less, unless it is named.
    pub fn shared_by(&self, nodes: usize) -> Self {
        let nodes = nodes as u64;
        if nodes < NODES_MANY {
            return self.clone();
        }
        let share = (MEMORY_SHARED_BYTES / (2 * nodes)).max(MEMORY_SHARE_BYTES_MIN);
        Self {
            table_bytes: self.table_bytes.or(Some(share)),
            cache_bytes: self.cache_bytes.or(Some(share)),
            log_segment_bytes: self.log_segment_bytes.or(Some(SEGMENT_BYTES_OF_MANY)),
            ..self.clone()
        }
    }

    /// The arguments that say the same.
    pub fn arguments(&self) -> Vec<String> {
        let Self { table_bytes, cache_bytes, log_segment_bytes, log_retain_bytes, disk_reserve_bytes, threads } = self;
        let named = [
            ("--table-bytes", *table_bytes),
            ("--cache-bytes", *cache_bytes),
            ("--log-segment-bytes", *log_segment_bytes),
            ("--log-retain-bytes", *log_retain_bytes),
            ("--disk-reserve-bytes", *disk_reserve_bytes),
            ("--threads", threads.map(u64::from)),
        ];
        let given = named.into_iter().filter_map(|(name, number)| Some((name, number?)));
        given.flat_map(|(name, number)| [name.to_owned(), number.to_string()]).collect()
    }
}

#[derive(Debug, Args)]
pub struct Node {
    #[command(flatten)]
    pub member: Member,
    /// Where it listens; port 0 takes any
    #[arg(long, default_value = "127.0.0.1:7401")]
    pub listen: String,
    /// Addresses of balancers at which the node registers, separated by commas
    #[arg(long, value_delimiter = ',', value_parser = address)]
    pub join: Vec<String>,
    /// Where it listens for HTTP, as this node; not at all unless named
    #[arg(long)]
    pub http: Option<String>,
    #[command(flatten)]
    pub dialects: Dialects,
    /// Stop when standard input is closed
    #[arg(long)]
    pub exit_with_parent: bool,
    #[command(flatten)]
    pub tuning: Tuning,
}

/// What a node is to the others.
#[derive(Debug, Clone, Args)]
pub struct Member {
    /// A label such as Server0; it stays with the data directory
    #[arg(long, default_value = NAME_DEFAULT)]
    pub name: String,
    /// Data directory; it is made when missing
    #[arg(long)]
    pub data: PathBuf,
    /// Where other members reach the node [default: where it listens]
    #[arg(long, value_parser = address)]
    pub advertise: Option<String>,
    /// Where clients reach the node that are not in the members' network, if that differs
    #[arg(long, value_parser = address)]
    pub advertise_outside: Option<String>,
    /// What fails together with this node: a rack, a zone. Replicas of a shard avoid sharing one
    #[arg(long, default_value = "")]
    pub domain: String,
    /// How much it takes compared to other nodes
    #[arg(long, default_value_t = CAPACITY_USUAL, value_parser = clap::value_parser!(u32).range(1..=i64::from(CAPACITY_MAX)))]
    pub capacity: u32,
    /// By which name a provisioner knows this node
    #[arg(long, default_value = "", hide = true)]
    pub instance: String,
}

#[derive(Debug, Args)]
pub struct Balancer {
    /// Addresses of nodes, or of other balancers, separated by commas; nodes may also come by themselves (`node --join`)
    #[arg(long, visible_alias = "join", value_delimiter = ',', value_parser = address)]
    pub nodes: Vec<String>,
    /// If the nodes are in no cluster yet: make one of all of them
    #[arg(long)]
    pub bootstrap: bool,
    /// How many nodes a new cluster waits for [default: as many as are named; with --spawn 3]
    #[arg(long, requires = "bootstrap", value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub expect: Option<u32>,
    #[command(flatten)]
    pub layout: Layout,
    /// Where it listens
    #[arg(long, default_value = "127.0.0.1:7400")]
    pub listen: String,
    /// Where nodes and other balancers reach it [default: where it listens]
    #[arg(long, value_parser = address)]
    pub advertise: Option<String>,
    /// Where it listens for HTTP; not at all unless named
    #[arg(long)]
    pub http: Option<String>,
    #[command(flatten)]
    pub dialects: Dialects,
    /// How it gets nodes
    #[arg(long, default_value = "none")]
    pub spawn: Provision,
    /// Data directory of the nodes that it starts, with --spawn process
    #[arg(long, required_if_eq("spawn", "process"))]
    pub data: Option<PathBuf>,
    #[command(flatten)]
    pub docker: Docker,
    #[command(flatten)]
    pub healing: Healing,
    #[command(flatten)]
    pub tuning: Tuning,
}

/// How a balancer gets nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Provision {
    /// Not at all: nodes are started by somebody else, and join
    None,
    /// Each in a process of its own on this machine; they outlive the balancer
    Process,
    /// As containers of this machine's Docker engine. Whoever may use its socket is root on the machine
    Docker,
}

/// The Docker engine, with `--spawn docker`.
#[derive(Debug, Clone, Args)]
pub struct Docker {
    /// The engine's socket
    #[arg(long, default_value = "/var/run/docker.sock")]
    pub docker_socket: String,
    /// Image of the nodes
    #[arg(long, default_value = "shkv")]
    pub docker_image: String,
    /// Network of the nodes; the balancer must be in it
    #[arg(long, default_value = "shkv")]
    pub docker_network: String,
    /// What the containers of this cluster have in common: first part of their names, and a label
    #[arg(long, default_value = "shkv")]
    pub docker_group: String,
    /// Memory that a node may take, such as 512MiB
    #[arg(long, value_parser = sizes::parse)]
    pub docker_memory: Option<u64>,
    /// Cores that a node may take, such as 1.5
    #[arg(long, value_parser = cores)]
    pub docker_cpus: Option<u32>,
    /// Publish nodes on the host, from this address and port up, so that clients there reach them directly
    #[arg(long, value_parser = address)]
    pub docker_publish: Option<String>,
}

/// As whom `serve` is a member of the causal key-value store. Without `--listen`, `--node-listen`, `--http` and `--join` they
/// follow from these: all at the host of the member's own address, each with its usual port.
#[derive(Debug, Clone, Default, Args)]
pub struct Causal {
    /// The address by which the others know this member, such as 10.10.0.2:8080
    #[arg(long, env = "SOCKET_ADDRESS", value_parser = address, requires = "view")]
    pub socket_address: Option<String>,
    /// The addresses of all members, separated by commas
    #[arg(long, env = "VIEW", value_delimiter = ',', value_parser = address, requires = "socket_address")]
    pub view: Vec<String>,
    /// Into how many shards the keys are cut; a member without it is of no shard until it is added to one
    #[arg(long, env = "SHARD_COUNT", value_parser = clap::value_parser!(u32).range(1..=1_000), requires = "view")]
    pub shard_count: Option<u32>,
}

#[derive(Debug, Args)]
pub struct Serve {
    #[command(flatten)]
    pub member: Member,
    /// Addresses of other members, separated by commas
    #[arg(long, required_unless_present_any = ["bootstrap", "view"], value_delimiter = ',', value_parser = address)]
    pub join: Vec<String>,
    #[command(flatten)]
    pub causal: Causal,
    /// Make a new cluster of this member alone, unless it is in one already; the others then join it
    #[arg(long)]
    pub bootstrap: bool,
    #[command(flatten)]
    pub layout: Layout,
    /// Where the balancer listens: what others join, and clients connect to [default: 127.0.0.1:7400]
    #[arg(long)]
    pub listen: Option<String>,
    /// Where the node listens [default: 127.0.0.1:7401]
    #[arg(long)]
    pub node_listen: Option<String>,
    /// Where it listens for HTTP, as this node [default: 127.0.0.1:8080]
    #[arg(long)]
    pub http: Option<String>,
    #[command(flatten)]
    pub dialects: Dialects,
    #[command(flatten)]
    pub healing: Healing,
    #[command(flatten)]
    pub tuning: Tuning,
}

#[derive(Debug, Args)]
pub struct Add {
    /// How many [default: as many as are named, or 1]; those that are not named get random names
    #[arg(long, value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub n: Option<u32>,
    /// Names of the new nodes
    pub names: Vec<String>,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct Rm {
    /// How many [default: as many as are named]; those that are not named are those that have least
    #[arg(long, required_unless_present = "names", value_parser = clap::value_parser!(u32).range(1..=NODES_MAX))]
    pub n: Option<u32>,
    /// Names or ids of nodes
    pub names: Vec<String>,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct Drain {
    /// Name or id of the node
    pub node: String,
    /// Let it be used again
    #[arg(long)]
    pub undo: bool,
    #[command(flatten)]
    pub wait: Wait,
}

#[derive(Debug, Args)]
pub struct Transfer {
    /// Number of the shard
    pub shard: u32,
    /// Name or id of the node that is to lead it
    pub node: String,
}

#[derive(Debug, Args)]
pub struct Hashing {
    /// How many requests are sent
    #[arg(long, default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..=10_000_000))]
    pub requests: u64,
}

/// How long to wait until a wish has come true.
#[derive(Debug, Clone, Args)]
pub struct Wait {
    /// How long to wait until it has come true; 0s only writes it down
    #[arg(long, default_value = "2m", value_parser = humantime::parse_duration)]
    pub wait: Duration,
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

fn cores(text: &str) -> Result<u32, String> {
    match text.parse::<f64>() {
        Ok(cores) if (0.01..=10_000.0).contains(&cores) => Ok((cores * 1_000.0).round() as u32),
        _ => Err("a number of cores, for example 0.5 or 2".into()),
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
            "shkv put k v --if-absent --if-present",
            "shkv del k --if-version 1 --if-value v",
            "shkv put k v --if-version new",
            "shkv get k --timeout 0s",
            "shkv get k --timeout soon",
            "shkv up --nodes 0",
            "shkv get k --consistency maybe",
            "shkv get k --token 12",
            "shkv get k --addr nowhere",
            "shkv get k --addr a:1,,b:2",
            "shkv balancer --spawn process",
            "shkv balancer --expect 3",
            "shkv serve --data d",
            "shkv rm",
            "shkv add --n 0",
            "shkv node --data d --capacity 0",
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
