//! What writes cost in entries, syncs and messages; and measurements, which claim nothing, of what nodes cost that have nothing to
//! do, and how long a new replica takes:
//! `cargo test --release -p shkv-node --test costs -- --ignored --nocapture --test-threads 1`.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use bytes::Bytes;
use common::tap::{Passed, road_to};
use common::{CLUSTER, Group, KEYSPACE, PATIENCE, small, soon};
use shkv_node::{Node, NodeConfig, Steps, Tuning};
use shkv_proto::link::Link;
use shkv_proto::map::Part;
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Beat, Condition, CreateReplica, Hello, NodeStatus, Role, Write, WriteDone, WriteId,
};
use shkv_proto::{Frame, Header, Kind, ReplicaId, ShardId, codec};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

const COPIES: usize = 3;

fn resident_kib() -> u64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

async fn statuses(nodes: &[(Node, Link)]) -> Vec<NodeStatus> {
    let addrs: Vec<_> = nodes.iter().map(|(node, _)| (node.id(), node.addr().to_string())).collect();
    let beat = codec::encode(&Beat { addrs, map: None, retired: None }).unwrap();
    let mut statuses = Vec::new();
    for (_, link) in nodes {
        let frame = Frame::new(Header::new(Kind::Beat), beat.clone(), Bytes::new());
        statuses.push(link.ask::<NodeStatus>(frame, soon()).await.unwrap().0);
    }
    statuses
}

async fn measure(node_count: usize, shard_count: u32) {
    let folder = tempfile::tempdir().unwrap();
    let tuning = Tuning { threads: 1, ..small() };
    let before_kib = resident_kib();
    let mut nodes = Vec::new();
    for at in 0..node_count {
        let data = folder.path().join(format!("Server{at}"));
        let config = NodeConfig { tuning, ..NodeConfig::new(format!("Server{at}"), data, "127.0.0.1:0") };
        let node = Node::start(config).await.unwrap();
        let link = Link::open(node.addr().to_string(), Hello::ours(Some(CLUSTER), Role::Balancer), |_| Ok(()));
        nodes.push((node, link));
    }
    statuses(&nodes).await;
    let empty_kib = resident_kib();
    for shard in 0..shard_count {
        let places: Vec<_> = (0..COPIES).map(|n| (shard as usize + n) % node_count).collect();
        let homes: Vec<_> = places.iter().zip(1..).map(|(at, n)| (ReplicaId(n), nodes[*at].0.id())).collect();
        for (copy, at) in places.iter().enumerate() {
            let create = CreateReplica {
                cluster: CLUSTER,
                shard: ShardId(shard),
                keyspace: KEYSPACE,
                part: Part::everything(),
                replica: homes[copy].0,
                founders: homes.iter().map(|(replica, _)| *replica).collect(),
                homes: homes.clone(),
                campaign: copy == 0,
            };
            let frame = Frame::new(Header::new(Kind::CreateReplica), codec::encode(&create).unwrap(), Bytes::new());
            let () = nodes[*at].1.ask(frame, soon()).await.unwrap().0;
        }
    }
    let deadline = Instant::now() + 3 * PATIENCE;
    while statuses(&nodes).await.iter().flat_map(|status| &status.replicas).filter(|r| r.leads).count()
        < shard_count as usize
    {
        assert!(Instant::now() < deadline, "not every shard has a leader");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    tokio::time::sleep(Duration::from_secs(2)).await;
    let cpu_us = statuses(&nodes).await[0].cpu_us;
    let time = Instant::now();
    tokio::time::sleep(Duration::from_secs(10)).await;
    let used = statuses(&nodes).await[0].cpu_us - cpu_us;
    let percent = used as f64 / time.elapsed().as_micros() as f64 * 100.0;
    println!(
        "{node_count} nodes, {shard_count} shards: {percent:.1} % of a core in all, {:.2} % a node; {} KiB an empty node, {} KiB a replica",
        percent / node_count as f64,
        empty_kib.saturating_sub(before_kib) / node_count as u64,
        resident_kib().saturating_sub(empty_kib) / (u64::from(shard_count) * COPIES as u64),
    );
}

#[tokio::test]
#[ignore = "it measures, and claims nothing"]
async fn what_five_hundred_shards_cost() {
    measure(3, 500).await;
}

#[tokio::test]
#[ignore = "it measures, and claims nothing"]
async fn what_a_hundred_nodes_cost() {
    measure(100, 100).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
#[ignore = "it measures, and claims nothing"]
async fn what_a_snapshot_of_fifty_megabytes_takes() {
    let mut group = Group::new(1, Tuning { table_bytes: 8 << 20, ..small() }).await;
    let value = "v".repeat(32 << 10);
    for n in 0..1_600 {
        group.put(&format!("key{n:05}"), &value).await;
    }
    group.until(0, |status| status.replicas[0].log_first > 1).await;
    group.add().await;
    group.introduce().await;
    let time = Instant::now();
    group.fill(1, 2, &[1], &[(1, 0)]).await;
    let status = group.until(1, |status| status.replicas[0].revision == 1_600).await;
    println!("{} snapshot(s), filled after {:?}", status.replicas[0].snapshots_installed, time.elapsed());
}

/// Entries and fdatasyncs that writes cost, one behind the other, on a replica alone: there is nothing else that writes.
async fn cost_of(group: &Group, write: impl AsyncFn(u64)) -> (u64, u64) {
    let look = async || {
        let status = group.introduce().await.swap_remove(0);
        (status.replicas[0].log_last, status.log_syncs)
    };
    write(0).await; // whatever an election has left to do is done
    let before = look().await;
    for n in 1..=WRITES {
        write(n).await;
    }
    let after = look().await;
    (after.0 - before.0, after.1 - before.1)
}

const WRITES: u64 = 40;

/// The ways to write to one shard, each with its number: a put without an id and with one, a batch without and with.
async fn write(group: &Group, way: usize, n: u64) {
    let id = WriteId { client: way as u64, sequence: n + 1, answered: n, age_ms: 0 };
    let id = (way % 2 == 1).then_some(id);
    if way < 2 {
        let write = Write { keyspace: KEYSPACE, key: b"key", condition: Condition::Always, id };
        drop(group.at_leader::<WriteDone>(Kind::Put, &write, b"value").await);
    } else {
        let (a, b) = (format!("a{way}.{n}"), format!("b{n}"));
        let ops = vec![
            BatchOp::Put { key: a.as_bytes(), value_bytes: 1, condition: Condition::Always },
            BatchOp::Check { key: b.as_bytes(), condition: Condition::Absent },
        ];
        let batch = Batch { keyspace: KEYSPACE, ops, id };
        drop(group.at_leader::<BatchDone>(Kind::Batch, &batch, b"v").await);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_costs_a_write_of_one_shard_no_entry_and_no_sync() {
    let tuning = Tuning { table_bytes: 64 << 20, log_segment_bytes: 4 << 20, log_retain_bytes: 64 << 20, ..small() };
    let group = &Group::new(1, tuning).await;
    for way in 0..4 {
        let cost = cost_of(group, async |n| write(group, way, n).await).await;
        assert_eq!(cost, (WRITES, WRITES), "way {way}: a write is an entry, and an entry a sync");
    }
}

/// Between three nodes every frame is counted. An election in between would add its own: then it is counted once more.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_id_or_a_batch_of_one_shard_costs_no_message() {
    let passed = Arc::new(Passed::default());
    let group = &Group::bare(COPIES, small(), Steps::default()).await;
    let mut roads = Vec::new();
    for (node, _) in group.nodes.iter().flatten() {
        roads.push((node.id(), road_to(node.addr().to_string(), passed.clone()).await));
    }
    group.introduce_at(roads.clone()).await;
    group.found().await;
    // Waits until everything has arrived everywhere, and tells the term.
    let settled = async || {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let nodes = group.introduce_at(roads.clone()).await;
            let of = |node: &NodeStatus| (node.replicas[0].term, node.replicas[0].log_last);
            if nodes.iter().all(|node| of(node) == of(&nodes[0])) {
                break nodes[0].replicas[0].term;
            }
            assert!(Instant::now() < deadline, "the replicas do not become alike");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    for way in 0..4 {
        let mut round = 0;
        let cost = loop {
            write(group, way, round * 1_000).await;
            let begun = settled().await;
            let before = passed.so_far();
            for n in 1..=WRITES {
                write(group, way, round * 1_000 + n).await;
            }
            if settled().await == begun {
                let after = passed.so_far();
                break [0, 1, 2].map(|at| after[at] - before[at]);
            }
            round += 1;
            assert!(round < 10, "the leader changes all the time");
        };
        let to_all = WRITES * (COPIES as u64 - 1);
        assert_eq!(cost, [to_all, to_all, 0], "way {way}: messages with entries, entries, other frames");
    }
}
