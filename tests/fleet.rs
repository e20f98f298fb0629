//! A hundred nodes in one process, on real disks and sockets: they start, are used evenly, and lose ten of them.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use shkv_balancer::{Balancer, BalancerConfig, Bootstrap};
use shkv_client::StatusDone;
use shkv_node::{Node, NodeConfig, Tuning};
use shkv_proto::NodeId;
use shkv_tests::{connect, is_whole, until_status};
use std::collections::BTreeSet;
use std::time::Duration;

const NODES: usize = 100;
const LOST: usize = 10;

/// Many nodes of one machine have to do with little.
fn frugal() -> Tuning {
    Tuning { table_bytes: 4 << 20, cache_bytes: 1 << 20, log_segment_bytes: 256 << 10, ..Tuning::default() }
}

fn homes(status: &StatusDone) -> BTreeSet<NodeId> {
    let shards = &status.map.as_ref().unwrap().shards;
    shards.iter().flat_map(|shard| &shard.replicas).map(|replica| replica.node).collect()
}

/// Nodes of which no two keep the same shard: three copies outlive the loss of one, not of two at the same time.
fn spread_out(status: &StatusDone) -> BTreeSet<NodeId> {
    let shards = &status.map.as_ref().unwrap().shards;
    let mut lost = BTreeSet::new();
    for node in homes(status) {
        let mine = shards.iter().filter(|shard| shard.replica_on(node).is_some());
        let is_alone = mine.flat_map(|shard| &shard.replicas).all(|replica| !lost.contains(&replica.node));
        if is_alone && lost.len() < LOST {
            lost.insert(node);
        }
    }
    lost
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_hundred_nodes_lose_ten_and_are_whole_again() {
    let data = tempfile::tempdir().unwrap();
    let mut nodes = Vec::new();
    for number in 0..NODES {
        let name = format!("Server{number}");
        let config = NodeConfig { tuning: frugal(), ..NodeConfig::new(&name, data.path().join(&name), "127.0.0.1:0") };
        nodes.push(Node::start(config).await.unwrap());
    }
    let config = BalancerConfig {
        nodes: nodes.iter().map(|node| node.addr().to_string()).collect(),
        bootstrap: Some(Bootstrap { shards: 100, replicas: 3 }),
        replace_after: Duration::from_secs(6),
        ..BalancerConfig::new("127.0.0.1:0")
    };
    let balancer = Balancer::start(config).await.unwrap();
    balancer.ready(Duration::from_secs(120)).await.unwrap();
    let client = connect(&[balancer.addr().to_string()]).await;
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    assert_eq!(homes(&before).len(), NODES, "every node keeps something");
    for number in 0..500 {
        client.put(format!("row/{number}"), number.to_string()).await.unwrap();
    }

    let lost = spread_out(&before);
    assert_eq!(lost.len(), LOST);
    nodes.retain(|node| !lost.contains(&node.id())); // dropped, not stopped: to the others they are dead
    until_status(&client, |status| is_whole(status, 3) && homes(status).is_disjoint(&lost)).await;
    for number in 0..500 {
        let row = client.get(format!("row/{number}")).await.unwrap().unwrap();
        assert_eq!(row.value, number.to_string().as_bytes());
    }
    balancer.stop().await;
}
