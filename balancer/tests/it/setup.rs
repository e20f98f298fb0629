//! Ready-made clusters of played nodes, and the requests of a client.

use crate::fake::{FakeNode, KEYSPACE, PATIENCE, World};
use bytes::Bytes;
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap};
use shkv_proto::link::Link;
use shkv_proto::message::{Condition, Consistency, Failure, Get, GetDone, Hello, Role, Write, WriteDone};
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId, codec};
use std::sync::Arc;
use tokio::time::Instant;

/// Three nodes, a balancer that has made a cluster of them, and a client.
pub struct Setup {
    /// What the nodes share.
    pub world: Arc<World>,
    /// The nodes.
    pub nodes: Vec<FakeNode>,
    /// The balancer.
    pub balancer: Balancer,
    /// A client's connection to it.
    pub client: Link,
}

/// A balancer's configuration for these nodes.
pub fn config(nodes: &[FakeNode], bootstrap: Option<Bootstrap>) -> BalancerConfig {
    BalancerConfig {
        http: Some("127.0.0.1:0".into()),
        nodes: nodes.iter().map(|node| node.addr.clone()).collect(),
        bootstrap,
        ..BalancerConfig::new("127.0.0.1:0")
    }
}

/// So many nodes that are in no cluster.
pub async fn nodes(world: &Arc<World>, count: u64) -> Vec<FakeNode> {
    let mut nodes = Vec::new();
    for n in 1..=count {
        nodes.push(FakeNode::start(world, n * 11, None).await);
    }
    nodes
}

/// A ready cluster.
pub async fn setup(count: u64, bootstrap: Bootstrap) -> Setup {
    let world = World::new();
    let nodes = nodes(&world, count).await;
    let balancer = Balancer::start(config(&nodes, Some(bootstrap))).await.unwrap();
    balancer.ready(PATIENCE).await.unwrap();
    let client = client(&balancer).await;
    Setup { world, nodes, balancer, client }
}

impl Setup {
    /// The node of this id.
    pub fn node(&self, id: NodeId) -> &FakeNode {
        self.nodes.iter().find(|node| node.id == id).unwrap()
    }

    /// How many requests of a kind have reached any node.
    pub fn seen(&self, kind: Kind) -> usize {
        self.nodes.iter().map(|node| node.seen(kind).len()).sum()
    }
}

/// A client's connection.
pub async fn client(balancer: &Balancer) -> Link {
    let link = Link::open(balancer.addr().to_string(), Hello::ours(None, Role::Client), |_| Ok(()));
    link.connected(Instant::now() + PATIENCE).await.unwrap();
    link
}

/// Asks and waits for the answer, whatever it is.
pub async fn ask(link: &Link, kind: Kind, shard: ShardId, head: Vec<u8>, tail: Vec<u8>) -> Frame {
    let frame = Frame::new(Header { shard, ..Header::new(kind) }, head, tail);
    link.call(frame, Instant::now() + PATIENCE).await.unwrap()
}

/// Puts a row of the default keyspace.
pub async fn put(link: &Link, key: &[u8], value: &[u8]) -> Result<WriteDone, Failure> {
    let head = codec::encode(&Write { keyspace: KEYSPACE, key, condition: Condition::Always, id: None }).unwrap();
    let answer = ask(link, Kind::Put, ShardId::UNROUTED, head, value.to_vec()).await;
    let answer = shkv_proto::link::done_or_failure(answer)?;
    Ok(codec::decode(&answer.head).unwrap())
}

/// Gets a row of the default keyspace.
pub async fn get(link: &Link, key: &[u8], consistency: Consistency) -> Result<Option<Bytes>, Failure> {
    let head = codec::encode(&Get { keyspace: KEYSPACE, key, consistency }).unwrap();
    let answer = shkv_proto::link::done_or_failure(ask(link, Kind::Get, ShardId::UNROUTED, head, vec![]).await)?;
    let done: GetDone = codec::decode(&answer.head).unwrap();
    Ok(done.version.map(|_| answer.tail))
}
