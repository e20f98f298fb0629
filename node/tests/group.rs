//! Three nodes in one process, driven over the wire as a balancer and a client would.

#![expect(
    clippy::disallowed_methods,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use bytes::Bytes;
use common::{CLUSTER, Group, KEYSPACE, PATIENCE, SHARD, everything, refusal, small, soon};
use shkv_node::{Node, NodeConfig, Tuning};
use shkv_proto::codec;
use shkv_proto::limits::KEY_BYTES_MAX;
use shkv_proto::link::{CallError, Link};
use shkv_proto::map::Part;
use shkv_proto::merge::Row;
use shkv_proto::message::{
    Beat, Condition, Consistency, CountDone, CreateReplica, EntryHead, Failure, Hello, NodeStatus, RaftMessage,
    RefusalCode, Role, Scan, SnapshotBegin, SnapshotChunk, SnapshotHead, TransferLeader, Write, WriteDone,
};
use shkv_proto::{ClusterId, Frame, Header, KeyspaceId, Kind, NodeId, ReplicaId, ShardId};
use std::time::Duration;
use tokio::time::Instant;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_put_is_read_and_scanned_and_deleted() {
    let group = Group::new(3, small()).await;
    for n in 0..50 {
        assert_eq!(
            group.put(&format!("key{n:02}"), &format!("value{n}")).await,
            n + 1,
            "the revision counts mutations"
        );
    }
    assert_eq!(group.get("key07").await.as_deref(), Some("value7"));
    assert_eq!(group.get("missing").await, None);
    let write = Write { keyspace: KEYSPACE, key: b"key07", condition: Condition::Always, id: None };
    let (gone, _) = group.at_leader::<WriteDone>(Kind::Delete, &write, b"").await;
    assert_eq!((gone.revision, gone.removed), (51, 1));
    assert_eq!(group.get("key07").await, None);

    let keys =
        |rows: Vec<Row>| rows.into_iter().map(|row| String::from_utf8(row.key.to_vec()).unwrap()).collect::<Vec<_>>();
    let expected: Vec<_> = (0..50).filter(|n| *n != 7).map(|n| format!("key{n:02}")).collect();
    assert_eq!(keys(group.scan(everything()).await), expected);
    let backwards = keys(group.scan(Scan { reverse: true, ..everything() }).await);
    assert_eq!(backwards, expected.iter().rev().cloned().collect::<Vec<_>>());
    let part = Scan { start: b"key1".to_vec(), end: Some(b"key2".to_vec()), keys_only: true, ..everything() };
    assert!(group.scan(part.clone()).await.iter().all(|row| row.value.is_empty()));
    assert_eq!(keys(group.scan(part.clone()).await).len(), 10);
    assert_eq!(group.at_leader::<CountDone>(Kind::Count, &part, b"").await.0, CountDone { rows: 10, next: None });
    let backwards = Scan { start: b"z".to_vec(), end: Some(b"a".to_vec()), ..everything() };
    assert!(group.scan(backwards).await.is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_answers_only_reads_that_allow_it() {
    let group = Group::new(3, small()).await;
    let revision = group.put("k", "v").await;
    let leader = group.leader().await;
    let follower = (leader + 1) % 3;
    let refused = group.get_at(follower, "k", Consistency::Linearizable).await.unwrap_err();
    let hint = Some(group.ids[leader]);
    assert_eq!(refused, CallError::Failure(Failure::NotLeader { hint }));
    group.until(follower, |status| status.replicas[0].revision >= revision).await;
    for consistency in [Consistency::Eventual, Consistency::Causal { revision }] {
        let (done, value) = group.get_at(follower, "k", consistency).await.unwrap();
        assert_eq!((done.version, done.consistency, &value[..]), (Some(revision), consistency, &b"v"[..]));
    }
    let ahead = group.get_at(follower, "k", Consistency::Causal { revision: revision + 1 }).await.unwrap_err();
    assert_eq!(ahead, CallError::Failure(Failure::Behind { revision }));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_leader_has_every_acknowledged_write() {
    let mut group = Group::new(3, small()).await;
    for round in 0..3 {
        for n in 0..20 {
            group.put(&format!("{round}-{n}"), "x").await;
        }
        let leader = group.leader().await;
        drop(group.nodes[leader].take()); // without a flush or a goodbye
        group.put(&format!("without-{round}"), "y").await;
        group.restart(leader).await;
    }
    assert_eq!(group.scan(everything()).await.len(), 63);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn all_nodes_at_once_come_back_with_everything() {
    let mut group = Group::new(3, small()).await;
    for n in 0..2_000 {
        group.put(&format!("key{n:05}"), &format!("{n:0>200}")).await;
    }
    let flushed = group.until(0, |status| status.replicas[0].flushed > 0).await;
    assert!(flushed.replicas[0].log_first > 1, "the log was let go: {flushed:?}");
    for at in 0..3 {
        drop(group.nodes[at].take());
    }
    for at in 0..3 {
        group.start(at).await;
    }
    group.introduce().await;
    let rows = group.scan(Scan { rows_max: 0, ..everything() }).await;
    assert_eq!(rows.len(), 2_000);
    for (row, n) in rows.iter().zip(0..) {
        assert_eq!(
            (row.key.to_vec(), row.value.to_vec()),
            (format!("key{n:05}").into_bytes(), format!("{n:0>200}").into_bytes())
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_whose_log_was_given_up_gets_a_snapshot() {
    let mut group = Group::new(3, small()).await;
    group.put("before", "1").await;
    let follower = (group.leader().await + 1) % 3;
    group.nodes[follower].take().unwrap().0.stop().await;
    let mut last = 0;
    for n in 0..4_000 {
        last = group.put(&format!("key{n:05}"), &format!("{n:0>200}")).await;
    }
    group.restart(follower).await;
    let status = group.until(follower, |status| status.replicas[0].revision >= last).await;
    assert!(status.replicas[0].snapshots_installed >= 1, "{status:?}");
    let (done, value) = group.get_at(follower, "key00042", Consistency::Causal { revision: last }).await.unwrap();
    assert_eq!((done.version, value.to_vec()), (Some(44), format!("{:0>200}", 42).into_bytes()));
    // It can go on from there, and also after a crash.
    drop(group.nodes[follower].take());
    group.restart(follower).await;
    let last = group.put("after", "2").await;
    group.until(follower, |status| status.replicas[0].revision >= last).await;
    assert!(group.get_at(follower, "key03999", Consistency::Eventual).await.unwrap().0.version.is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_stops_hands_its_leadership_over_first() {
    let mut group = Group::new(3, small()).await;
    group.put("k", "v").await;
    let leader = group.leader().await;
    let node = group.nodes[leader].take().unwrap().0;
    let before = Instant::now();
    node.stop().await;
    assert!(before.elapsed() < PATIENCE);
    assert_ne!(group.leader().await, leader);
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leadership_can_be_given_away() {
    let group = Group::new(3, small()).await;
    group.put("k", "v").await;
    let leader = group.leader().await;
    let to = (leader + 1) % 3;
    let transfer = TransferLeader { to: ReplicaId(to as u64 + 1) };
    let () = group.ask(leader, Kind::TransferLeader, &transfer, Bytes::new()).await.unwrap().0;
    group.until(to, |status| status.replicas[0].leads).await;
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
    let stranger = TransferLeader { to: ReplicaId(99) };
    let refused = group.ask::<()>(to, Kind::TransferLeader, &stranger, Bytes::new()).await.unwrap_err();
    assert_eq!(refusal(refused), RefusalCode::Conflict);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_alone_serves() {
    let mut group = Group::new(1, small()).await;
    group.put("k", "v").await;
    drop(group.nodes[0].take());
    group.restart(0).await;
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_full_disk_refuses_puts_and_still_reads_and_deletes() {
    let tuning = Tuning { disk_reserve_bytes: u64::MAX, ..small() };
    let group = Group::new(1, tuning).await;
    group.leader().await;
    let write = Write { keyspace: KEYSPACE, key: b"k", condition: Condition::Always, id: None };
    let refused = group.ask::<WriteDone>(0, Kind::Put, &write, Bytes::from_static(b"v")).await.unwrap_err();
    assert_eq!(refusal(refused), RefusalCode::DiskFull);
    assert_eq!(group.get("k").await, None);
    let (gone, _) = group.at_leader::<WriteDone>(Kind::Delete, &write, b"").await;
    assert_eq!(gone.removed, 0);
    assert!(group.introduce().await[0].disk_full);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_node_may_not_do_is_refused_with_a_reason() {
    let group = Group::new(1, small()).await;
    group.put("k", "v").await;
    let create = CreateReplica {
        cluster: ClusterId(8),
        shard: ShardId(2),
        keyspace: KEYSPACE,
        part: Part::everything(),
        replica: ReplicaId(1),
        founders: vec![ReplicaId(1)],
        homes: vec![(ReplicaId(1), group.ids[0])],
        campaign: false,
    };
    let refused = group.ask::<()>(0, Kind::CreateReplica, &create, Bytes::new()).await.unwrap_err();
    assert_eq!(refusal(refused), RefusalCode::WrongCluster);
    let addr = group.nodes[0].as_ref().unwrap().0.addr().to_string();
    let client = Link::open(addr.clone(), Hello::ours(None, Role::Client), |_| Ok(()));
    let frame = Frame::new(Header::new(Kind::CreateReplica), codec::encode(&create).unwrap(), vec![]);
    assert_eq!(refusal(client.ask::<()>(frame, soon()).await.unwrap_err()), RefusalCode::NotAllowed);
    let other_keyspace = Write { keyspace: KeyspaceId(9), key: b"k", condition: Condition::Always, id: None };
    let refused = group.ask::<WriteDone>(0, Kind::Put, &other_keyspace, Bytes::new()).await.unwrap_err();
    assert!(matches!(refused, CallError::Failure(Failure::WrongShard { .. })), "{refused}");
    let stranger = Link::open(addr, Hello::ours(Some(ClusterId(9)), Role::Client), |_| Ok(()));
    let refused = stranger.connected(soon()).await.unwrap_err().to_string();
    assert!(refused.contains("cluster"), "{refused}");
}

#[tokio::test]
async fn a_data_directory_serves_one_node_of_one_name() {
    let folder = tempfile::tempdir().unwrap();
    let config = |name: &str, data: &std::path::Path, listen: &str| NodeConfig {
        tuning: small(),
        ..NodeConfig::new(name, data, listen)
    };
    let data = folder.path().join("a");
    let node = Node::start(config("Server0", &data, "127.0.0.1:0")).await.unwrap();
    let error = Node::start(config("Server0", &data, "127.0.0.1:0")).await.unwrap_err().to_string();
    assert!(error.contains("in use by another process"), "{error}");
    let taken = node.addr().to_string();
    let error = Node::start(config("Server1", &folder.path().join("b"), &taken)).await.unwrap_err().to_string();
    assert!(error.contains(&taken) && error.contains("--listen"), "{error}");
    node.stop().await;
    let error = Node::start(config("Server9", &data, "127.0.0.1:0")).await.unwrap_err().to_string();
    assert!(error.contains("Server0") && error.contains("Server9"), "{error}");
    let file = folder.path().join("file");
    std::fs::write(&file, "x").unwrap();
    let error = Node::start(config("Server0", &file, "127.0.0.1:0")).await.unwrap_err().to_string();
    assert!(error.contains("file"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rows_without_their_log_are_not_served() {
    let mut group = Group::new(1, small()).await;
    group.put("k", "v").await;
    group.nodes[0].take().unwrap().0.stop().await;
    let data = group.folder.path().join("Server0");
    std::fs::remove_dir_all(data.join("log")).unwrap();
    let config = NodeConfig { tuning: small(), ..NodeConfig::new("Server0", data, "127.0.0.1:0") };
    let error = Node::start(config).await.unwrap_err().to_string();
    assert!(error.contains("log is missing"), "{error}");
}

/// A message as replica 2 sends it to replica 1.
fn honest() -> RaftMessage {
    RaftMessage {
        shard: SHARD,
        kind: 3,
        to: ReplicaId(1),
        from: ReplicaId(2),
        term: 1,
        log_term: 0,
        index: 0,
        commit: 0,
        commit_term: 0,
        reject: false,
        reject_hint: 0,
        request_snapshot: 0,
        context: vec![],
        priority: 0,
        stamp: u64::MAX,
        entries: vec![],
        snapshot: None,
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn raft_messages_that_lie_stop_nobody() {
    let group = Group::new(3, small()).await;
    for n in 0..20 {
        group.put(&format!("k{n}"), "v").await;
    }
    let honest = honest();
    let entry = |index, term| EntryHead { kind: 0, term, index, data_bytes: 0 };
    let covers = SnapshotHead {
        index: 999,
        term: 9,
        voters: vec![ReplicaId(1)],
        voters_outgoing: vec![],
        learners: vec![],
        learners_next: vec![],
        auto_leave: false,
    };
    let mut lies = Vec::new();
    for term in [1, 2, 50, u64::MAX] {
        for kind in 0..=20 {
            lies.push(RaftMessage { kind, term, commit: 1 << 40, ..honest.clone() });
            lies.push(RaftMessage { kind, term, index: u64::MAX, reject_hint: u64::MAX, ..honest.clone() });
            lies.push(RaftMessage { kind, term, from: ReplicaId(77), commit: 1 << 40, ..honest.clone() });
            lies.push(RaftMessage { kind, term, snapshot: Some(covers.clone()), ..honest.clone() });
            lies.push(RaftMessage { kind, term, entries: vec![entry(1, term), entry(2, term)], ..honest.clone() });
            lies.push(RaftMessage { kind, term, entries: vec![entry(5, 1)], ..honest.clone() });
            // Beyond the log's end Raft takes a term for 0.
            let beyond = RaftMessage { kind, term, index: 900, commit: 900, ..honest.clone() };
            lies.push(RaftMessage { entries: vec![entry(901, term)], ..beyond.clone() });
            lies.push(RaftMessage { snapshot: Some(SnapshotHead { term: 0, ..covers.clone() }), ..beyond.clone() });
            lies.push(beyond);
        }
    }
    for at in 0..3 {
        let addr = group.nodes[at].as_ref().unwrap().0.addr().to_string();
        let link = Link::open(addr, Hello::ours(Some(CLUSTER), Role::Node(NodeId(4))), |_| Ok(()));
        link.connected(soon()).await.unwrap();
        for lie in &lies {
            let from = ReplicaId((at as u64 + 1) % 3 + 1);
            let from = if lie.from == ReplicaId(77) { lie.from } else { from };
            let lie = RaftMessage { to: ReplicaId(at as u64 + 1), from, ..lie.clone() };
            let frame = Frame::new(Header::new(Kind::Raft), codec::encode(&vec![lie]).unwrap(), vec![]);
            assert!(link.tell(&frame, usize::MAX));
        }
        let beat = Beat { addrs: vec![], map: None, retired: None };
        let status =
            link.ask::<NodeStatus>(Frame::new(Header::new(Kind::Beat), codec::encode(&beat).unwrap(), vec![]), soon());
        assert_eq!(status.await.unwrap().0.id, group.ids[at]);
    }
    group.put("after", "v").await;
    assert_eq!(group.get("k7").await.as_deref(), Some("v"));
    for (node, _) in group.nodes.iter().flatten() {
        let failed = tokio::time::timeout(Duration::from_millis(1), node.failed()).await;
        assert!(failed.is_err(), "a node gave up: {failed:?}");
    }
}

/// The flusher takes what it cannot store for a failure of the disk, which ends a node: so it must never get it.
#[tokio::test]
async fn a_snapshot_with_what_is_no_row_is_refused_and_stops_nobody() {
    let group = Group::new(3, small()).await;
    group.put("k", "v").await;
    let covers = SnapshotHead {
        index: 999,
        term: 1,
        voters: [1, 2, 3].map(ReplicaId).to_vec(),
        voters_outgoing: vec![],
        learners: vec![],
        learners_next: vec![],
        auto_leave: false,
    };
    let message = RaftMessage { kind: 7, snapshot: Some(covers), ..honest() };
    let begin = SnapshotBegin { message, revision: 1, keyspace: KEYSPACE, part: Part::everything(), homes: vec![] };
    let addr = group.nodes[0].as_ref().unwrap().0.addr().to_string();
    let link = Link::open(addr, Hello::ours(Some(CLUSTER), Role::Node(group.ids[1])), |_| Ok(()));
    let (sound, empty) = ([0; 9], vec![]);
    let rows: [(Vec<u8>, Vec<u8>); 4] = [
        (b"key".to_vec(), vec![0; 8]),
        (b"key".to_vec(), empty),
        (b"key".to_vec(), [&[1], &sound[1..]].concat()),
        (vec![b'k'; KEY_BYTES_MAX + 1], sound.to_vec()),
    ];
    for (key, row) in rows {
        let header = |kind| Header { shard: SHARD, ..Header::new(kind) };
        let head = codec::encode(&begin).unwrap();
        let () = link.clone().ask(Frame::new(header(Kind::SnapshotBegin), head, vec![]), soon()).await.unwrap().0;
        let chunk = SnapshotChunk { rows: vec![(key.len() as u32, row.len() as u32)] };
        let frame = Frame::new(header(Kind::SnapshotChunk), codec::encode(&chunk).unwrap(), [key, row].concat());
        let refused = link.clone().ask::<()>(frame, soon()).await.expect_err("it is no row");
        assert_eq!(refusal(refused), RefusalCode::Malformed);
    }
    let failed = tokio::time::timeout(Duration::ZERO, group.nodes[0].as_ref().unwrap().0.failed()).await;
    assert!(failed.is_err(), "the node gave up: {failed:?}");
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
}
