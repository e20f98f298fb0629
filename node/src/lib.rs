//! A node: keeps replicas of shards. It never decides where shards live; a balancer does.

#![expect(missing_docs, reason = "being written")]

use shkv_proto::{ClusterId, NodeId};
use std::net::SocketAddr;
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
    /// Budgets.
    pub tuning: Tuning,
}

/// Budgets of a node, in bytes.
#[derive(Clone, Copy, Debug)]
pub struct Tuning {
    /// Rows in memory that are not yet in redb.
    pub table_bytes: usize,
    /// redb's cache of pages.
    pub cache_bytes: usize,
    /// One segment of the log.
    pub log_segment_bytes: u64,
    /// Log kept for followers that have fallen behind; a follower further back gets a snapshot.
    pub log_retain_bytes: u64,
    /// Free space on the disk under which puts are refused.
    pub disk_reserve_bytes: u64,
}

impl Default for Tuning {
    fn default() -> Self {
        Self {
            table_bytes: 64 << 20,
            cache_bytes: 64 << 20,
            log_segment_bytes: 16 << 20,
            log_retain_bytes: 64 << 20,
            disk_reserve_bytes: 128 << 20,
        }
    }
}

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// A running node.
#[derive(Debug)]
pub struct Node;

impl Node {
    pub async fn start(_config: NodeConfig) -> Result<Self, StartError> {
        Err(StartError("being written".into()))
    }
    pub fn id(&self) -> NodeId {
        NodeId(1)
    }
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 1))
    }
    pub fn cluster(&self) -> Option<ClusterId> {
        None
    }
    /// Resolves when the node has stopped by itself, with the reason.
    pub async fn failed(&self) -> String {
        std::future::pending().await
    }
    /// Finishes what is in hand, flushes, and ends.
    pub async fn stop(self) {}
}
