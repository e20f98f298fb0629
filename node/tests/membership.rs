//! Replicas that come and go while the shard is written to, nodes that are retired, and what is left of them.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use bytes::Bytes;
use common::{CLUSTER, Group, KEYSPACE, PATIENCE, SHARD, everything, ids, refusal, small, soon, step};
use shkv_node::{Node, NodeConfig, NodeLook};
use shkv_proto::link::{CallError, Link};
use shkv_proto::message::{
    Beat, ChangeReplicas, Condition, Consistency, CountDone, Failure, Hello, NodeStatus, RefusalCode, RemoveReplica,
    Role, Scan, ScanDone, TransferLeader, Write, WriteDone,
};
use shkv_proto::{ClusterId, Frame, Header, Kind, NodeId, ReplicaId, codec};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;
use tokio::time::Instant;

fn write(key: &str) -> Write<'_> {
    Write { keyspace: KEYSPACE, key: key.as_bytes(), condition: Condition::Always, id: None }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_move_while_writes_go_on_and_nothing_acknowledged_is_lost() {
    let mut group = Group::new(3, small()).await;
    for _ in 0..3 {
        group.add().await;
    }
    group.introduce().await;
    let (moving, acknowledged) = (Cell::new(true), Cell::new(0_u32));
    let writes = async {
        while moving.get() || acknowledged.get() < 100 {
            group.put(&format!("key{:06}", acknowledged.get()), "value").await;
            acknowledged.set(acknowledged.get() + 1);
        }
    };
    let moves = async {
        // Every replica moves once, so at some step the leader goes, too.
        for (goes, comes) in [(1, 4), (2, 5), (3, 6)] {
            let others: Vec<_> = (goes..comes).map(|id| (id, id as usize - 1)).collect();
            group.fill(comes as usize - 1, comes, &[1, 2, 3], &others).await;
            group.change(&step(&[], &[comes], &[goes])).await;
            group.until_voters(&[goes + 1, goes + 2, comes]).await;
            group.remove(goes as usize - 1, goes).await;
        }
        moving.set(false);
    };
    tokio::join!(writes, moves);
    assert_eq!(group.keys().await, acknowledged.get() as usize);
    for status in group.introduce().await.iter().take(3) {
        assert!(status.replicas.is_empty(), "{status:?}");
    }
    let leader = group.leader().await;
    assert!(leader >= 3);
    group.crash(leader); // the two others are a majority of what there is now
    group.put("after", "value").await;
    assert_eq!(group.keys().await, acknowledged.get() as usize + 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_replica_gets_a_snapshot_when_the_log_was_given_up() {
    let mut group = Group::new(1, small()).await;
    for n in 0..3_000 {
        group.put(&format!("key{n:05}"), &format!("{n:0>200}")).await;
    }
    let status = group.until(0, |status| status.replicas[0].log_first > 1).await;
    assert!(status.replicas[0].group.is_some());
    group.add().await;
    group.introduce().await;
    group.fill(1, 2, &[1], &[(1, 0)]).await;
    let filled = group.until(1, |status| status.replicas[0].revision >= 3_000).await;
    assert!(filled.replicas[0].snapshots_installed >= 1, "{filled:?}");
    // From one node to another, one step at a time: a second voter, the leadership, and then the first one goes.
    group.change(&step(&[], &[2], &[])).await;
    group.until_voters(&[1, 2]).await;
    let alone = group.ask::<()>(0, Kind::ChangeReplicas, &step(&[], &[], &[1, 2]), Bytes::new()).await.unwrap_err();
    assert_eq!(refusal(alone), RefusalCode::WouldLose);
    let () = group.ask(0, Kind::TransferLeader, &TransferLeader { to: ReplicaId(2) }, Bytes::new()).await.unwrap().0;
    group.until(1, |status| status.replicas[0].leads).await;
    group.change(&step(&[], &[], &[1])).await;
    group.until_voters(&[2]).await;
    group.remove(0, 1).await;
    // It is left alone with what it knows, also after a crash: nobody else could vote for it.
    group.crash(0);
    group.crash(1);
    group.start(1).await;
    assert_eq!(group.get("key02999").await, Some(format!("{:0>200}", 2_999)));
    assert_eq!(group.keys().await, 3_000);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_that_is_to_go_hands_over_first() {
    let mut group = Group::new(3, small()).await;
    group.put("k", "v").await;
    group.add().await;
    group.introduce().await;
    group.fill(3, 4, &[1, 2, 3], &[(1, 0), (2, 1), (3, 2)]).await;
    let leader = group.leader().await;
    let goes = leader as u64 + 1;
    let swap = step(&[], &[4], &[goes]);
    let answer = group.ask::<()>(leader, Kind::ChangeReplicas, &swap, Bytes::new()).await.unwrap_err();
    assert!(matches!(answer, CallError::Failure(Failure::Busy { .. })), "{answer}");
    group.change(&swap).await;
    let voters: Vec<_> = (1..=4).filter(|id| *id != goes).collect();
    group.until_voters(&voters).await;
    assert_ne!(group.leader().await, leader);
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
    let learner = TransferLeader { to: ReplicaId(goes) };
    let leader = group.leader().await;
    let refused = group.ask::<()>(leader, Kind::TransferLeader, &learner, Bytes::new()).await.unwrap_err();
    assert_eq!(refusal(refused), RefusalCode::Conflict, "it has no vote any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_step_taken_twice_is_taken_once_and_others_are_refused() {
    let mut group = Group::new(3, small()).await;
    group.put("k", "v").await;
    group.add().await;
    group.introduce().await;
    group.fill(3, 4, &[1, 2, 3], &[(1, 0), (2, 1), (3, 2)]).await;
    let leader = group.leader().await;
    let last = |status: NodeStatus| status.replicas[0].log_last;
    let before = last(group.until(leader, |status| status.replicas[0].group.is_some()).await);
    let so_already = step(&[(4, group.ids[3])], &[2], &[9]);
    let () = group.ask(leader, Kind::ChangeReplicas, &so_already, Bytes::new()).await.unwrap().0;
    assert_eq!(last(group.until(leader, |_| true).await), before, "nothing was proposed");
    let ask = async |step: &ChangeReplicas| group.ask::<()>(leader, Kind::ChangeReplicas, step, Bytes::new()).await;
    assert_eq!(refusal(ask(&step(&[], &[7], &[])).await.unwrap_err()), RefusalCode::Conflict);
    assert_eq!(refusal(ask(&step(&[(5, group.ids[0])], &[], &[])).await.unwrap_err()), RefusalCode::Conflict);
    assert_eq!(refusal(ask(&step(&[], &[], &[1, 2, 3])).await.unwrap_err()), RefusalCode::WouldLose);
    let to_learner = TransferLeader { to: ReplicaId(4) };
    let refused = group.ask::<()>(leader, Kind::TransferLeader, &to_learner, Bytes::new()).await.unwrap_err();
    assert_eq!(refusal(refused), RefusalCode::Conflict);
    let follower = (leader + 1) % 3;
    let elsewhere = group.ask::<()>(follower, Kind::ChangeReplicas, &so_already, Bytes::new()).await.unwrap_err();
    assert_eq!(elsewhere, CallError::Failure(Failure::NotLeader { hint: Some(group.ids[leader]) }));
    let addr = group.nodes[leader].as_ref().unwrap().0.addr().to_string();
    let client = Link::open(addr, Hello::ours(None, Role::Client), |_| Ok(()));
    for (kind, head) in [
        (Kind::ChangeReplicas, codec::encode(&so_already).unwrap()),
        (Kind::RemoveReplica, codec::encode(&RemoveReplica { replica: ReplicaId(1) }).unwrap()),
    ] {
        let frame = Frame::new(Header { shard: SHARD, ..Header::new(kind) }, head, vec![]);
        assert_eq!(refusal(client.ask::<()>(frame, soon()).await.unwrap_err()), RefusalCode::NotAllowed);
    }
    let removed = step(&[], &[], &[4]);
    group.change(&removed).await;
    group.until_group(|group| group.learners.is_empty()).await;
    group.change(&removed).await;
    for _ in 0..2 {
        group.remove(3, 4).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_follower_that_was_away_catches_up_from_a_leader_it_never_heard_of() {
    let mut group = Group::new(3, small()).await;
    group.put("before", "1").await;
    group.until(2, |status| status.replicas[0].revision == 1).await;
    group.crash(2);
    for _ in 0..2 {
        group.add().await;
    }
    group.introduce().await;
    group.fill(3, 4, &[1, 2, 3], &[(1, 0), (2, 1), (3, 2)]).await;
    group.fill(4, 5, &[1, 2, 3], &[(1, 0), (2, 1), (3, 2), (4, 3)]).await;
    // Through a joint configuration to a group in which only the absent one is left of the first.
    group.change(&step(&[], &[4, 5], &[1])).await;
    group.until_voters(&[2, 3, 4, 5]).await;
    group.change(&step(&[], &[], &[2])).await;
    group.until_voters(&[3, 4, 5]).await;
    group.remove(0, 1).await;
    group.remove(1, 2).await;
    let last = group.put("during", "2").await;
    group.restart(2).await;
    group.until(2, |status| status.replicas[0].revision >= last).await;
    let other = (3..=4).find(|at| group.nodes[*at].is_some()).unwrap();
    group.crash(other); // now it takes the one that was away
    group.put("after", "3").await;
    assert_eq!(group.keys().await, 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_replica_that_has_heard_no_leader_answers_no_reads() {
    let mut group = Group::new(3, small()).await;
    let revision = group.put("k", "v").await;
    for at in 0..3 {
        group.until(at, |status| status.replicas[0].revision == revision).await;
    }
    for at in 0..3 {
        group.crash(at);
    }
    group.restart(0).await;
    let nobody = CallError::Failure(Failure::NotLeader { hint: None });
    for consistency in [Consistency::Eventual, Consistency::Causal { revision }] {
        assert_eq!(group.get_at(0, "k", consistency).await.unwrap_err(), nobody);
        let scan = Scan { consistency, ..everything() };
        assert_eq!(group.ask::<ScanDone>(0, Kind::Scan, &scan, Bytes::new()).await.unwrap_err(), nobody);
        assert_eq!(group.ask::<CountDone>(0, Kind::Count, &scan, Bytes::new()).await.unwrap_err(), nobody);
    }
    group.restart(1).await;
    group.leader().await;
    for at in 0..2 {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = group.get_at(at, "k", Consistency::Eventual).await {
            assert!(Instant::now() < deadline && error == nobody, "{error}");
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        std::fs::copy(entry.path(), to.join(entry.file_name())).unwrap();
    }
}

/// Moves replica 1 of the first node to the last and back as replica 5, with `between` done while the node has none.
async fn there_and_back(between: impl AsyncFnOnce(&mut Group)) {
    let mut group = Group::new(3, small()).await;
    for n in 0..500 {
        group.put(&format!("key{n:05}"), &format!("{n:0>200}")).await;
    }
    group.add().await;
    group.introduce().await;
    group.fill(3, 4, &[1, 2, 3], &[(1, 0), (2, 1), (3, 2)]).await;
    group.change(&step(&[], &[4], &[1])).await;
    group.until_voters(&[2, 3, 4]).await;
    between(&mut group).await;
    group.introduce().await;
    let again =
        group.create(0, ReplicaId(1), &ids(&[1, 2, 3]), &[(ReplicaId(1), group.ids[0])], true).await.unwrap_err();
    assert_eq!(refusal(again), RefusalCode::Conflict, "its votes are forgotten, so it must not come back");
    group.fill(0, 5, &[1, 2, 3], &[(2, 1), (3, 2), (4, 3)]).await;
    group.change(&step(&[], &[5], &[4])).await;
    group.until_voters(&[2, 3, 5]).await;
    group.remove(3, 4).await;
    group.crash(1); // now it takes the one that was made again
    group.put("after", "v").await;
    assert_eq!(group.keys().await, 501);
    group.crash(0);
    group.restart(0).await;
    assert_eq!(group.get("key00042").await, Some(format!("{:0>200}", 42)));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shard_can_be_kept_again_by_a_node_that_deleted_it() {
    there_and_back(async |group| group.remove(0, 1).await).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_right_after_a_deletion_brings_nothing_back() {
    there_and_back(async |group| {
        group.remove(0, 1).await;
        group.crash(0);
        group.restart(0).await;
        assert!(group.until(0, |_| true).await.replicas.is_empty());
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_in_the_middle_of_a_deletion_leaves_no_entries_and_no_vote() {
    there_and_back(async |group| {
        // The rows are gone and the log is as it was before.
        group.nodes[0].take().unwrap().0.stop().await;
        let (log, kept) = (group.data(0).join("log"), group.folder.path().join("kept"));
        copy(&log, &kept);
        group.restart(0).await;
        group.remove(0, 1).await;
        group.nodes[0].take().unwrap().0.stop().await;
        std::fs::remove_dir_all(&log).unwrap();
        copy(&kept, &log);
        group.restart(0).await;
        assert!(group.until(0, |_| true).await.replicas.is_empty());
        group.crash(0);
        group.restart(0).await;
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_crash_at_any_time_during_a_deletion_can_be_followed_by_another_try() {
    for wait_us in [0, 50, 200, 500, 1_000, 2_000, 4_000] {
        let mut group = Group::new(1, small()).await;
        group.put("k", "v").await;
        let remove = RemoveReplica { replica: ReplicaId(1) };
        {
            let asked = group.ask::<()>(0, Kind::RemoveReplica, &remove, Bytes::new());
            let _ = tokio::time::timeout(Duration::from_micros(wait_us), asked).await;
        }
        group.crash(0);
        group.start(0).await;
        group.remove(0, 1).await;
        assert!(group.introduce().await[0].replicas.is_empty());
        let homes = [(ReplicaId(2), group.ids[0])];
        group.create(0, ReplicaId(2), &ids(&[2]), &homes, true).await.unwrap();
        assert_eq!(group.get("k").await, None);
        assert_eq!(group.put("k", "w").await, 1, "nothing of the first one is left");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_waits_for_a_replica_that_is_deleted_is_answered() {
    let mut group = Group::new(3, small()).await;
    group.put("k", "v").await;
    let leader = group.leader().await;
    for at in (0..3).filter(|at| *at != leader) {
        group.crash(at);
    }
    // Proposed, and never committed.
    let proposed = write("lost");
    let unknown = group.ask::<WriteDone>(leader, Kind::Put, &proposed, Bytes::from_static(b"v"));
    let removed = async {
        group.until(leader, |status| status.replicas[0].log_last > status.replicas[0].committed).await;
        group.remove(leader, leader as u64 + 1).await;
    };
    let (unknown, ()) = tokio::join!(unknown, removed);
    let unknown = unknown.unwrap_err();
    assert!(matches!(unknown, CallError::Failure(Failure::Unknown { .. })), "{unknown}");
    let after = group.ask::<WriteDone>(leader, Kind::Put, &write("k"), Bytes::new()).await.unwrap_err();
    assert!(matches!(after, CallError::Failure(Failure::WrongShard { .. })), "{after}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_retired_node_refuses_everybody_and_does_not_start_again() {
    let mut group = Group::new(1, small()).await;
    group.put("k", "v").await;
    let addr = group.nodes[0].as_ref().unwrap().0.addr().to_string();
    let retire = Beat { addrs: vec![], map: None, retired: Some("Server9 took its place".into()) };
    let frame = || Frame::new(Header::new(Kind::Beat), codec::encode(&retire).unwrap(), vec![]);
    for (cluster, role) in [(None, Role::Balancer), (Some(CLUSTER), Role::Node(NodeId(9)))] {
        let stranger = Link::open(addr.clone(), Hello::ours(cluster, role), |_| Ok(()));
        assert_eq!(refusal(stranger.ask::<NodeStatus>(frame(), soon()).await.unwrap_err()), RefusalCode::NotAllowed);
    }
    assert_eq!(group.get("k").await.as_deref(), Some("v"));
    let status: NodeStatus = group.ask(0, Kind::Beat, &retire, Bytes::new()).await.unwrap().0;
    assert_eq!(status.id, group.ids[0]);
    let reason = group.nodes[0].as_ref().unwrap().0.failed().await;
    assert!(reason.contains("Server9 took its place") && reason.contains(&CLUSTER.to_string()), "{reason}");
    let client = Link::open(addr, Hello::ours(None, Role::Client), |_| Ok(()));
    let refused = client.connected(soon()).await.unwrap_err().to_string();
    assert!(refused.contains("Server9 took its place"), "{refused}");
    assert!(group.get_at(0, "k", Consistency::Eventual).await.is_err());
    let look = NodeLook::at(&group.data(0)).unwrap().unwrap();
    assert!(look.running && look.retired.is_some() && look.cluster == Some(CLUSTER), "{look:?}");
    group.nodes[0].take().unwrap().0.stop().await;
    let config = NodeConfig { tuning: small(), ..NodeConfig::new("Server0", group.data(0), "127.0.0.1:0") };
    let error = Node::start(config).await.unwrap_err().to_string();
    for part in ["Server9 took its place", &CLUSTER.to_string(), "remove the directory"] {
        assert!(error.contains(part), "{error}");
    }
    let look = NodeLook::at(&group.data(0)).unwrap().unwrap();
    assert!(!look.running && look.id == group.ids[0] && look.name == "Server0", "{look:?}");
    assert_eq!(NodeLook::at(group.folder.path()).unwrap(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn only_the_shards_own_cluster_gives_it_replicas() {
    let group = Group::new(1, small()).await;
    let addr = group.nodes[0].as_ref().unwrap().0.addr().to_string();
    let other = Link::open(addr, Hello::ours(Some(ClusterId(8)), Role::Balancer), |_| Ok(()));
    assert!(other.connected(soon()).await.is_err());
    let none = group.create(0, ReplicaId(9), &[], &[(ReplicaId(9), group.ids[0])], false).await.unwrap_err();
    assert_eq!(refusal(none), RefusalCode::Conflict, "a group without founders");
    let elsewhere = group.create(0, ReplicaId(9), &ids(&[1]), &[(ReplicaId(9), NodeId(4))], false).await.unwrap_err();
    assert_eq!(refusal(elsewhere), RefusalCode::Conflict);
    let second = BTreeMap::from([(ReplicaId(9), group.ids[0])]).into_iter().collect::<Vec<_>>();
    assert_eq!(
        refusal(group.create(0, ReplicaId(9), &ids(&[1]), &second, false).await.unwrap_err()),
        RefusalCode::Conflict
    );
}
