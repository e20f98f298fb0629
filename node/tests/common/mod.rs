//! Nodes in one process, driven over the wire as a balancer and a client would.

#![allow(dead_code, reason = "each test binary uses its own part of this")]
#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

pub mod shards;
pub mod tap;

use bytes::Bytes;
use shkv_node::{Node, NodeConfig, Steps, Tuning};
use shkv_proto::codec;
use shkv_proto::link::{CallError, Link};
use shkv_proto::map::Part;
use shkv_proto::merge::{Page, Row};
use shkv_proto::message::{
    Beat, ChangeReplicas, Condition, Consistency, CreateReplica, Failure, Get, GetDone, GroupStatus, Hello, NodeStatus,
    RefusalCode, RemoveReplica, Role, Scan, ScanDone, Write, WriteDone,
};
use shkv_proto::{ClusterId, Frame, Header, KeyspaceId, Kind, NodeId, ReplicaId, ShardId};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

pub const CLUSTER: ClusterId = ClusterId(7);
pub const KEYSPACE: KeyspaceId = KeyspaceId(1);
pub const SHARD: ShardId = ShardId(1);
pub const PATIENCE: Duration = Duration::from_secs(20);

pub struct Group {
    pub folder: tempfile::TempDir,
    pub tuning: Tuning,
    pub nodes: Vec<Option<(Node, Link)>>,
    pub ids: Vec<NodeId>,
    /// What is done at the steps of transactions.
    pub steps: Steps,
    /// Who answered last.
    guess: AtomicUsize,
}

pub fn small() -> Tuning {
    Tuning {
        table_bytes: 256 << 10,
        cache_bytes: 4 << 20,
        log_segment_bytes: 64 << 10,
        log_retain_bytes: 128 << 10,
        disk_reserve_bytes: 0,
        threads: 1,
    }
}

pub fn soon() -> Instant {
    Instant::now() + Duration::from_secs(5)
}

impl Group {
    /// Nodes that know each other and keep nothing.
    pub async fn bare(count: usize, tuning: Tuning, steps: Steps) -> Self {
        let mut group = Self {
            folder: tempfile::tempdir().unwrap(),
            tuning,
            nodes: vec![],
            ids: vec![],
            steps,
            guess: AtomicUsize::new(0),
        };
        for _ in 0..count {
            group.add().await;
        }
        group.introduce().await;
        group
    }

    pub async fn new(count: usize, tuning: Tuning) -> Self {
        let group = Self::bare(count, tuning, Steps::default()).await;
        group.found().await;
        group
    }

    /// A shard with a replica on every node.
    pub async fn found(&self) {
        let count = self.nodes.len();
        let founders: Vec<_> = (1..=count as u64).map(ReplicaId).collect();
        let homes: Vec<_> = founders.iter().copied().zip(self.ids.iter().copied()).collect();
        for at in 0..count {
            for _ in 0..2 {
                self.create(at, homes[at].0, &founders, &homes, at == 0).await.unwrap();
            }
        }
    }

    /// Starts a node more, without a replica. Returns its place.
    pub async fn add(&mut self) -> usize {
        let at = self.nodes.len();
        self.nodes.push(None);
        self.start(at).await;
        self.ids.push(self.nodes[at].as_ref().unwrap().0.id());
        at
    }

    pub async fn create(
        &self,
        at: usize,
        replica: ReplicaId,
        founders: &[ReplicaId],
        homes: &[(ReplicaId, NodeId)],
        campaign: bool,
    ) -> Result<(), CallError> {
        let create = CreateReplica {
            cluster: CLUSTER,
            shard: SHARD,
            keyspace: KEYSPACE,
            part: Part::everything(),
            replica,
            founders: founders.to_vec(),
            homes: homes.to_vec(),
            campaign,
        };
        let () = self.ask(at, Kind::CreateReplica, &create, Bytes::new()).await?.0;
        Ok(())
    }

    /// Ends a node as a crash would.
    pub fn crash(&mut self, at: usize) {
        drop(self.nodes[at].take());
    }

    pub fn data(&self, at: usize) -> PathBuf {
        self.folder.path().join(format!("Server{at}"))
    }

    pub async fn start(&mut self, at: usize) {
        let (tuning, steps) = (self.tuning, self.steps.clone());
        let config =
            NodeConfig { tuning, steps, ..NodeConfig::new(format!("Server{at}"), self.data(at), "127.0.0.1:0") };
        let deadline = Instant::now() + PATIENCE;
        let node = loop {
            match Node::start(config.clone()).await {
                Ok(node) => break node,
                // A node that was dropped lets go of its directory a moment later.
                Err(error) if Instant::now() < deadline => {
                    let text = error.to_string();
                    assert!(text.contains("in use"), "{text}");
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                Err(error) => panic!("{error}"),
            }
        };
        let link = Link::open(node.addr().to_string(), Hello::ours(Some(CLUSTER), Role::Balancer), |_| Ok(()));
        self.nodes[at] = Some((node, link));
    }

    /// Tells every node where the others are.
    pub async fn introduce(&self) -> Vec<NodeStatus> {
        let addrs = self.nodes.iter().flatten().map(|(node, _)| (node.id(), node.addr().to_string())).collect();
        self.introduce_at(addrs).await
    }

    /// Tells every node these addresses of the others.
    pub async fn introduce_at(&self, addrs: Vec<(NodeId, String)>) -> Vec<NodeStatus> {
        let mut statuses = Vec::new();
        for (at, node) in self.nodes.iter().enumerate() {
            if node.is_some() {
                let beat = Beat { addrs: addrs.clone(), map: None, retired: None };
                statuses.push(self.ask::<NodeStatus>(at, Kind::Beat, &beat, Bytes::new()).await.unwrap().0);
            }
        }
        statuses
    }

    pub async fn restart(&mut self, at: usize) {
        self.start(at).await;
        self.introduce().await;
    }

    pub async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        at: usize,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: Bytes,
    ) -> Result<(T, Bytes), CallError> {
        let link = self.nodes[at].as_ref().expect("the node runs").1.clone();
        let header = Header { shard: SHARD, ..Header::new(kind) };
        link.ask(Frame::new(header, codec::encode(head).unwrap(), tail), soon()).await
    }

    /// Finds the leader and lets `work` talk to it until it answers.
    pub async fn at_leader<T: serde::de::DeserializeOwned>(
        &self,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> (T, Bytes) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let at = self.guess.load(Ordering::Relaxed) % self.nodes.len();
            if self.nodes[at].is_some() {
                match self.ask(at, kind, head, Bytes::copy_from_slice(tail)).await {
                    Ok(answer) => return answer,
                    Err(error) => assert!(Instant::now() < deadline, "nobody answers; last: {error}"),
                }
            }
            self.guess.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn put(&self, key: &str, value: &str) -> u64 {
        let write = Write { keyspace: KEYSPACE, key: key.as_bytes(), condition: Condition::Always, id: None };
        self.at_leader::<WriteDone>(Kind::Put, &write, value.as_bytes()).await.0.revision
    }

    pub async fn get(&self, key: &str) -> Option<String> {
        let get = Get { keyspace: KEYSPACE, key: key.as_bytes(), consistency: Consistency::Linearizable };
        let (done, value) = self.at_leader::<GetDone>(Kind::Get, &get, b"").await;
        done.version.map(|_| String::from_utf8(value.to_vec()).unwrap())
    }

    pub async fn get_at(&self, at: usize, key: &str, consistency: Consistency) -> Result<(GetDone, Bytes), CallError> {
        self.ask(at, Kind::Get, &Get { keyspace: KEYSPACE, key: key.as_bytes(), consistency }, Bytes::new()).await
    }

    pub async fn leader(&self) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for status in self.introduce().await {
                if status.replicas.iter().any(|replica| replica.leads) {
                    return self.ids.iter().position(|id| *id == status.id).unwrap();
                }
            }
            assert!(Instant::now() < deadline, "nobody leads");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Waits until a node's replica satisfies `what`.
    pub async fn until(&self, at: usize, what: impl Fn(&NodeStatus) -> bool) -> NodeStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let statuses = self.introduce().await;
            let status = statuses.into_iter().find(|status| status.id == self.ids[at]).expect("the node runs");
            if what(&status) {
                return status;
            }
            assert!(Instant::now() < deadline, "it did not come to pass: {status:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn scan(&self, scan: Scan) -> Vec<Row> {
        let mut rows = Vec::new();
        let mut scan = scan;
        loop {
            let (done, tail) = self.at_leader::<ScanDone>(Kind::Scan, &scan, b"").await;
            let page = Page::decode(&codec::encode(&done).unwrap().into(), tail).unwrap();
            rows.extend(page.rows);
            match page.next {
                Some(next) => scan = scan.resumed(next),
                None => return rows,
            }
        }
    }
}

pub fn everything() -> Scan {
    Scan {
        keyspace: KEYSPACE,
        start: vec![],
        end: None,
        reverse: false,
        keys_only: false,
        rows_max: 7,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
        with: vec![],
    }
}

pub fn refusal(error: CallError) -> RefusalCode {
    match error {
        CallError::Failure(Failure::Refusal { code, .. }) => code,
        other => panic!("not a refusal: {other:?}"),
    }
}

pub fn ids(ids: &[u64]) -> Vec<ReplicaId> {
    ids.iter().copied().map(ReplicaId).collect()
}

pub fn step(learn: &[(u64, NodeId)], promote: &[u64], remove: &[u64]) -> ChangeReplicas {
    let learn = learn.iter().map(|(id, node)| (ReplicaId(*id), *node)).collect();
    ChangeReplicas { from: vec![], learn, promote: ids(promote), remove: ids(remove) }
}

impl Group {
    /// The group as its leader sees it, once that satisfies `what`. Replica n is on node n - 1.
    pub async fn until_group(&self, what: impl Fn(&GroupStatus) -> bool) -> GroupStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let statuses = self.introduce().await;
            let groups: Vec<_> =
                statuses.iter().flat_map(|status| &status.replicas).filter_map(|r| r.group.clone()).collect();
            if let Some(group) = groups.iter().find(|group| what(group)) {
                return group.clone();
            }
            assert!(Instant::now() < deadline, "it did not come to pass: {groups:?} {statuses:?}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn change(&self, step: &ChangeReplicas) {
        let () = self.at_leader(Kind::ChangeReplicas, step, b"").await.0;
    }

    /// Makes a replica on a node and waits until it has the log.
    pub async fn fill(&self, at: usize, replica: u64, founders: &[u64], others: &[(u64, usize)]) {
        let mut homes: Vec<_> = others.iter().map(|(id, at)| (ReplicaId(*id), self.ids[*at])).collect();
        homes.push((ReplicaId(replica), self.ids[at]));
        self.create(at, ReplicaId(replica), &ids(founders), &homes, false).await.unwrap();
        self.introduce().await;
        self.change(&step(&[(replica, self.ids[at])], &[], &[])).await;
        let lead =
            |status: &[NodeStatus]| status.iter().flat_map(|s| &s.replicas).map(|r| r.committed).max().unwrap_or(0);
        let committed = lead(&self.introduce().await);
        self.until_group(|group| {
            group.learners.contains(&ReplicaId(replica))
                && group.matched.iter().any(|(id, matched)| id.0 == replica && *matched >= committed)
        })
        .await;
    }

    pub async fn until_voters(&self, voters: &[u64]) {
        self.until_group(|group| group.voters == ids(voters) && group.outgoing.is_empty()).await;
    }

    pub async fn remove(&self, at: usize, replica: u64) {
        let () = self
            .ask(at, Kind::RemoveReplica, &RemoveReplica { replica: ReplicaId(replica) }, Bytes::new())
            .await
            .unwrap()
            .0;
    }

    pub async fn keys(&self) -> usize {
        self.scan(Scan { rows_max: 0, keys_only: true, ..everything() }).await.len()
    }
}
