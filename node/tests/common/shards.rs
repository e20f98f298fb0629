//! Several shards on the nodes of a group, with a map, and batches over them.

#![allow(dead_code, reason = "each test binary uses its own part of this")]

use super::{CLUSTER, Group, KEYSPACE, PATIENCE, soon};
use bytes::Bytes;
use shkv_node::{Steps, Tuning};
use shkv_proto::link::CallError;
use shkv_proto::map::{KeyspaceInfo, NodeInfo, Part, ShardInfo};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Beat, Condition, Consistency, CreateReplica, Failure, Get, GetDone, NodeStatus,
    TransferLeader, Write, WriteDone, WriteId,
};
use shkv_proto::{Epoch, Frame, Header, Kind, Map, NodeId, ReplicaId, ShardId, codec};
use std::time::Duration;
use tokio::time::Instant;

/// Where the parts begin: shard 1 has the keys below "h", shard 2 those below "p", shard 3 the rest.
const BOUNDS: [&str; 2] = ["h", "p"];
pub const FIRST: ShardId = ShardId(1);
pub const SECOND: ShardId = ShardId(2);
pub const THIRD: ShardId = ShardId(3);
pub const ALL: [ShardId; 3] = [FIRST, SECOND, THIRD];

pub struct Shards {
    pub group: Group,
    map: Map,
}

pub fn shard_of(key: &str) -> ShardId {
    ShardId(1 + BOUNDS.iter().filter(|bound| key >= **bound).count() as u32)
}

pub fn put<'a>(key: &'a str, value: &str) -> BatchOp<'a> {
    BatchOp::Put { key: key.as_bytes(), value_bytes: value.len() as u32, condition: Condition::Always }
}

pub fn first_time(client: u64, sequence: u64) -> WriteId {
    WriteId { client, sequence, answered: 0, age_ms: 0 }
}

pub fn again(id: WriteId) -> WriteId {
    WriteId { age_ms: 500, ..id }
}

/// What a batch says when it is done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Told {
    pub done: BatchDone,
    pub values: Bytes,
}

impl Shards {
    pub async fn new(count: usize, tuning: Tuning, steps: Steps) -> Self {
        let group = Group::bare(count, tuning, steps).await;
        let mut shards = Self { map: map_of(&group), group };
        shards.introduce().await;
        for (number, info) in shards.map.shards.clone().into_iter().enumerate() {
            let homes: Vec<_> = info.replicas.iter().map(|replica| (replica.id, replica.node)).collect();
            let leader = number % count;
            for at in 0..count {
                let create = CreateReplica {
                    cluster: CLUSTER,
                    shard: info.id,
                    keyspace: KEYSPACE,
                    part: info.part.clone(),
                    replica: homes[at].0,
                    founders: homes.iter().map(|(replica, _)| *replica).collect(),
                    homes: homes.clone(),
                    campaign: at == leader,
                };
                let () = shards.ask(at, info.id, Kind::CreateReplica, &create, b"").await.unwrap().0;
            }
        }
        for shard in ALL {
            shards.leader(shard).await;
        }
        shards
    }

    /// Tells every node where the others are, and the map.
    pub async fn introduce(&mut self) -> Vec<NodeStatus> {
        self.map.epoch = Epoch(self.map.epoch.0 + 1);
        let running = || self.group.nodes.iter().flatten();
        let addrs: Vec<_> = running().map(|(node, _)| (node.id(), node.addr().to_string())).collect();
        let mut statuses = Vec::new();
        for at in 0..self.group.nodes.len() {
            if self.group.nodes[at].is_some() {
                let beat = Beat { addrs: addrs.clone(), map: Some(self.map.clone()), retired: None };
                let status = self.group.ask::<NodeStatus>(at, Kind::Beat, &beat, Bytes::new()).await;
                statuses.push(status.unwrap().0);
            }
        }
        statuses
    }

    pub async fn restart(&mut self, at: usize) {
        self.group.start(at).await;
        self.introduce().await;
    }

    pub async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        at: usize,
        shard: ShardId,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> Result<(T, Bytes), CallError> {
        let link = self.group.nodes[at].as_ref().expect("the node runs").1.clone();
        let header = Header { shard, ..Header::new(kind) };
        link.ask(Frame::new(header, codec::encode(head).unwrap(), tail.to_vec()), soon()).await
    }

    /// The place of the node that leads a shard, once one does.
    pub async fn leader(&mut self, shard: ShardId) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            for status in self.introduce().await {
                if status.replicas.iter().any(|replica| replica.leads && replica.shard == shard) {
                    return self.group.ids.iter().position(|id| *id == status.id).unwrap();
                }
            }
            assert!(Instant::now() < deadline, "nobody leads {shard}");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    pub async fn give(&mut self, shard: ShardId, to: usize) {
        let from = self.leader(shard).await;
        let transfer = TransferLeader { to: ReplicaId(to as u64 + 1) };
        let () = self.ask(from, shard, Kind::TransferLeader, &transfer, b"").await.unwrap().0;
        let deadline = Instant::now() + PATIENCE;
        while self.leader(shard).await != to {
            assert!(Instant::now() < deadline, "the leadership was not taken");
        }
    }

    /// One attempt at whoever leads.
    pub async fn attempt<T: serde::de::DeserializeOwned>(
        &mut self,
        shard: ShardId,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> Result<(T, Bytes), CallError> {
        let at = self.leader(shard).await;
        self.ask(at, shard, kind, head, tail).await
    }

    /// Asks until it is done, as a client would that may send a write again.
    pub async fn until_done<T: serde::de::DeserializeOwned>(
        &mut self,
        shard: ShardId,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> (T, Bytes) {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.attempt(shard, kind, head, tail).await {
                Ok(answer) => return answer,
                Err(CallError::Failure(failure @ (Failure::Refusal { .. } | Failure::Condition { .. }))) => {
                    panic!("{failure}")
                }
                Err(error) => assert!(Instant::now() < deadline, "it is never done; last: {error}"),
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    pub async fn put(&mut self, key: &str, value: &str) -> u64 {
        let write = Write { keyspace: KEYSPACE, key: key.as_bytes(), condition: Condition::Always, id: None };
        self.until_done::<WriteDone>(shard_of(key), Kind::Put, &write, value.as_bytes()).await.0.revision
    }

    pub async fn get(&mut self, key: &str) -> Option<String> {
        let get = Get { keyspace: KEYSPACE, key: key.as_bytes(), consistency: Consistency::Linearizable };
        let (done, value) = self.until_done::<GetDone>(shard_of(key), Kind::Get, &get, b"").await;
        done.version.map(|_| String::from_utf8(value.to_vec()).unwrap())
    }

    pub async fn try_batch(
        &mut self,
        ops: &[BatchOp<'_>],
        values: &str,
        id: Option<WriteId>,
    ) -> Result<Told, CallError> {
        let shard = lowest(ops);
        let batch = Batch { keyspace: KEYSPACE, ops: ops.to_vec(), id };
        let (done, values) = self.attempt(shard, Kind::Batch, &batch, values.as_bytes()).await?;
        Ok(Told { done, values })
    }

    pub async fn batch(&mut self, ops: &[BatchOp<'_>], values: &str, id: Option<WriteId>) -> Told {
        let batch = Batch { keyspace: KEYSPACE, ops: ops.to_vec(), id };
        let (done, values) = self.until_done(lowest(ops), Kind::Batch, &batch, values.as_bytes()).await;
        Told { done, values }
    }
}

fn lowest(ops: &[BatchOp<'_>]) -> ShardId {
    let key = |op: &BatchOp<'_>| String::from_utf8(op.key().to_vec()).unwrap();
    ops.iter().map(|op| shard_of(&key(op))).min().expect("an operation")
}

fn map_of(group: &Group) -> Map {
    let part = |n: usize| Part::Range {
        start: n.checked_sub(1).map_or_else(Vec::new, |n| BOUNDS[n].into()),
        end: BOUNDS.get(n).map(|bound| bound.as_bytes().to_vec()),
    };
    let shard = |id: ShardId| ShardInfo::founded(id, KEYSPACE, part(id.0 as usize - 1), &group.ids);
    let mut nodes: Vec<_> = group.ids.iter().map(|id: &NodeId| NodeInfo::new(*id, format!("{id}"), "")).collect();
    nodes.sort_by_key(|node| node.id);
    Map {
        epoch: Epoch(1),
        nodes,
        keyspaces: vec![KeyspaceInfo { id: KEYSPACE, name: "default".into(), replicas: 3 }],
        shards: ALL.into_iter().map(shard).collect(),
        next_shard: ShardId(4),
        next_keyspace: shkv_proto::KeyspaceId(2),
        ..Map::empty(CLUSTER)
    }
}
