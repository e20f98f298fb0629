//! A node: keeps replicas of shards. It never decides where shards live; a balancer does.
//!
//! ```text
//! socket ─► session ─► owner (a replica per shard) ─► log's writer (one fdatasync for all shards)
//!              │            │  ▲                              │
//!              │ reads      │  └──────────────────────────────┘
//!              ▼            ▼ applies
//!            cell: table in memory ─► sealed table ─► flusher ─► redb
//! ```

mod admin;
mod arena;
mod ask;
mod cell;
mod claim;
mod clock;
#[cfg(test)]
mod crash;
pub mod disk;
mod flusher;
pub mod ground;
mod identity;
#[cfg(feature = "sim")]
pub mod inspect;
mod join;
mod lease;
pub mod log;
mod machine;
mod memtable;
mod owner;
mod page;
#[doc(hidden)]
pub mod parts;
mod peers;
mod plan;
mod replica;
mod reply;
mod resolve;
mod row_cache;
mod scan;
mod server;
mod session;
mod shared;
mod snapshot;
mod space;
mod steps;
mod store;
mod table;
mod txn;

pub use identity::NodeLook;
pub use server::Node;
pub use steps::{Step, Steps};

use shkv_proto::ClusterId;
use shkv_proto::limits::CAPACITY_USUAL;
use std::path::PathBuf;

/// What a node needs to start.
#[derive(Clone, Debug)]
pub struct NodeConfig {
    /// A label such as `Server0`; kept in the data directory at the first start, and checked afterwards.
    pub name: String,
    /// The data directory; made when missing.
    pub data: PathBuf,
    /// `host:port` to listen on; port 0 takes any.
    pub listen: String,
    /// Balancers with which the node registers, as `host:port`. Empty: it waits for a balancer to find it.
    pub join: Vec<String>,
    /// Where other members reach it, as `host:port`; `None` is where it listens.
    pub advertise: Option<String>,
    /// Where clients outside of the members' network reach it, if that differs.
    pub advertise_outside: Option<String>,
    /// What fails together with it: a rack, a zone. Empty says nothing.
    pub domain: String,
    /// How much it takes compared to others; [`CAPACITY_USUAL`] is usual.
    pub capacity: u32,
    /// By which name its provisioner knows it; empty if it was started by hand.
    pub instance: String,
    /// Budgets.
    pub tuning: Tuning,
    /// Points at which a test stops a transaction; nothing in operation.
    pub steps: Steps,
}

impl NodeConfig {
    /// A node of usual capacity and usual budgets that nobody has provisioned and that joins nothing by itself.
    #[must_use]
    pub fn new(name: impl Into<String>, data: impl Into<PathBuf>, listen: impl Into<String>) -> Self {
        Self {
            name: name.into(),
            data: data.into(),
            listen: listen.into(),
            join: Vec::new(),
            advertise: None,
            advertise_outside: None,
            domain: String::new(),
            capacity: CAPACITY_USUAL,
            instance: String::new(),
            tuning: Tuning::default(),
            steps: Steps::default(),
        }
    }
}

/// Budgets of a node.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Bytes of rows in memory that are not yet in redb.
    pub table_bytes: usize,
    /// Bytes of redb's rows that are kept in memory: a quarter of it for single rows, the rest for pages.
    pub cache_bytes: usize,
    /// Bytes of one segment of the log.
    pub log_segment_bytes: u64,
    /// Bytes of log kept for followers that have fallen behind; a follower further back gets a snapshot.
    pub log_retain_bytes: u64,
    /// Bytes of free space on the disk under which puts are refused.
    pub disk_reserve_bytes: u64,
    /// Threads, each of which drives a part of the shards and a part of the connections.
    pub threads: usize,
}

impl Default for Tuning {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            table_bytes: 64 << 20,
            cache_bytes: 64 << 20,
            log_segment_bytes: 16 << 20,
            log_retain_bytes: 256 << 20,
            disk_reserve_bytes: 128 << 20,
            threads: (cores / 4).clamp(1, 8),
        }
    }
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The name cannot be one.
    #[error("{0:?} is no name for a node: 1 to 128 bytes without '/' and control characters")]
    Name(String),
    /// The system does not let us use the data directory.
    #[error("the data directory {} {what}: {error}", data.display())]
    Data {
        /// The directory.
        data: PathBuf,
        /// What is wrong with it.
        what: &'static str,
        /// The system's words.
        error: std::io::Error,
    },
    /// Another process has it.
    #[error("the data directory {} is in use by another process; stop that one or use another directory", .0.display())]
    Locked(PathBuf),
    /// The identity in it is damaged.
    #[error("the identity in {} cannot be read; restore it from a copy, or remove the directory and let the node join as a new one", .0.display())]
    Identity(PathBuf),
    /// It belongs to a node of another name.
    #[error("the data directory {} belongs to node {theirs:?}, not to {ours:?}; check --name and --data", data.display())]
    OtherName {
        /// The directory.
        data: PathBuf,
        /// The name in it.
        theirs: String,
        /// The name that was asked for.
        ours: String,
    },
    /// Its cluster wants it no more.
    #[error(
        "the node in {} was removed from, or replaced in, cluster {cluster}: {reason}; remove the directory to let it join as a new node",
        data.display()
    )]
    Retired {
        /// The directory.
        data: PathBuf,
        /// The cluster.
        cluster: ClusterId,
        /// Why.
        reason: String,
    },
    /// Nobody could reach it at the address that it would tell.
    #[error("{addr:?} is no address at which others reach this node; name one as host:port with --advertise")]
    Advertise {
        /// The address.
        addr: String,
    },
    /// It cannot listen.
    #[error("cannot listen on {addr}: {error}; choose another address with --listen or stop what uses it")]
    Listen {
        /// The address.
        addr: String,
        /// The system's words.
        error: std::io::Error,
    },
    /// The log cannot be opened.
    #[error("{}: {error}", data.display())]
    Log {
        /// The data directory.
        data: PathBuf,
        /// What is wrong.
        error: log::LogError,
    },
    /// The rows are there and the log is not.
    #[error(
        "{} has rows, but its log is missing, and with it the votes of its replicas; restore it from a copy, or remove the directory and let the node join as a new one",
        .0.display()
    )]
    LogMissing(PathBuf),
    /// The rows cannot be opened, or do not fit the log.
    #[error("{}: {text}", data.display())]
    Store {
        /// The data directory.
        data: PathBuf,
        /// What is wrong.
        text: String,
    },
    /// The system gives no more threads.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}
