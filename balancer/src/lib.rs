//! A balancer: routes requests to nodes. It holds no truth: the map lives in the system shard.

#![expect(missing_docs, reason = "being written")]

use shkv_proto::{ClusterId, NodeId};
use std::net::SocketAddr;
use std::time::Duration;

/// What a balancer needs to start.
#[derive(Clone, Debug)]
pub struct BalancerConfig {
    /// `host:port` of the native listener; port 0 takes any.
    pub listen: String,
    /// `host:port` of the HTTP listener; none when `None`.
    pub http: Option<String>,
    /// Addresses of the nodes that are known at the start.
    pub nodes: Vec<String>,
    /// If the nodes are in no cluster yet: make one of all of `nodes`, as described here.
    pub bootstrap: Option<Bootstrap>,
}

/// The first layout of a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    /// Shards of the default keyspace.
    pub shards: u32,
    /// Copies of each shard.
    pub replicas: u32,
}

/// Why a balancer does not start.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct StartError(pub String);

/// A running balancer.
#[derive(Debug)]
pub struct Balancer;

impl Balancer {
    pub async fn start(_config: BalancerConfig) -> Result<Self, StartError> {
        Err(StartError("being written".into()))
    }
    pub fn addr(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], 1))
    }
    pub fn http_addr(&self) -> Option<SocketAddr> {
        None
    }
    /// Waits until every shard has a leader.
    pub async fn ready(&self, _within: Duration) -> Result<ClusterId, StartError> {
        Err(StartError("being written".into()))
    }
    /// A node was started again and now listens there.
    pub fn node_moved(&self, _node: NodeId, _addr: String) {}
    /// Finishes what is in hand and ends.
    pub async fn stop(self) {}
}
