//! What balancers ask of a node: take a replica in, hear where the others are, give a leadership away.

#![expect(clippy::disallowed_methods, reason = "a shell: starts the tasks of slow requests")]

use crate::cell::Cell;
use crate::flusher::Job;
use crate::log::recover::Recovered;
use crate::owner::{Mail, Shard};
use crate::replica::Replica;
use crate::reply::Reply;
use crate::session::head_of;
use crate::shared::Shared;
use crate::store::{Base, ReplicaMeta};
use crate::table::{Table, View};
use shkv_proto::Frame;
use shkv_proto::message::{Beat, CreateReplica, Failure, RefusalCode, SnapshotHead, TransferLeader};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a replica that is to stand for election waits for links to its voters: a request for a vote that is dropped
/// costs an election timeout.
const REACH_TIME_MAX: Duration = Duration::from_millis(500);

/// Takes in where the others are, and the map, and answers with the node's status.
pub fn beat(shared: Arc<Shared>, frame: &Frame, reply: Reply) {
    let Some((beat, reply)) = head_of::<Beat>(frame, reply) else { return };
    shared.peers.set_addrs(&beat.addrs);
    if let Some(map) = beat.map {
        match map.check() {
            Ok(()) if Some(map.cluster) == shared.cluster() => shared.set_map(map),
            Ok(()) => tracing::warn!("a balancer sent the map of cluster {}", map.cluster),
            Err(error) => tracing::warn!("a balancer sent a bad map: {error}"),
        }
    }
    tokio::spawn(async move { reply.done(&shared.status().await) });
}

/// Makes a replica. Making it twice is the same as making it once.
pub fn create(shared: Arc<Shared>, frame: &Frame, reply: Reply) {
    let Some((create, reply)) = head_of::<CreateReplica>(frame, reply) else { return };
    tokio::spawn(async move { reply.result(make(&shared, create).await) });
}

async fn make(shared: &Arc<Shared>, create: CreateReplica) -> Result<(), Failure> {
    let me = shared.identity.id();
    if !create.voters.contains(&(create.replica, me)) {
        let text = format!("replica {} of shard {} is not this node's", create.replica, create.shard);
        return Err(Failure::refusal(RefusalCode::Conflict, text));
    }
    shared.identity.join(create.cluster)?;
    shared.peers.set_cluster(create.cluster);
    if let Some(cell) = shared.cell(create.shard) {
        if cell.replica == create.replica {
            return Ok(());
        }
        let text = format!("this node already keeps replica {} of shard {}", cell.replica, create.shard);
        return Err(Failure::refusal(RefusalCode::Conflict, text));
    }
    let Some(_making) = crate::snapshot::IncomingGuard::begin(shared, create.shard) else {
        return Err(Failure::Busy { retry_after_ms: 50, text: "the replica is being made".into() });
    };
    let meta = ReplicaMeta {
        replica: create.replica,
        keyspace: create.keyspace,
        part: create.part,
        homes: create.voters.clone(),
        state: SnapshotHead {
            index: 0,
            term: 0,
            voters: create.voters.iter().map(|(replica, _)| *replica).collect(),
            voters_outgoing: vec![],
            learners: vec![],
            learners_next: vec![],
            auto_leave: false,
        },
        revision: 0,
    };
    let kept = Box::new(meta.clone());
    let base = shared
        .flusher
        .ask(|answer| Job::Create(create.shard, kept, answer))
        .await
        .map_err(|error| Failure::Busy { retry_after_ms: 500, text: error.to_string() })?;
    if create.campaign {
        shared.peers.reach(create.voters.iter().map(|(_, node)| *node), Instant::now() + REACH_TIME_MAX).await;
    }
    let shard = open_shard(shared, create.shard, meta, base, Recovered::default())
        .map_err(|error| Failure::refusal(RefusalCode::Conflict, error))?;
    shared.mail(shared.owner_of(create.shard), Mail::Adopt(Box::new(shard), create.campaign)).await;
    Ok(())
}

/// A shard from what the disk has of it.
///
/// # Errors
/// What does not fit together, in words.
pub fn open_shard(
    shared: &Shared,
    shard: shkv_proto::ShardId,
    meta: ReplicaMeta,
    base: Base,
    recovered: Recovered,
) -> Result<Shard, String> {
    let now = shared.clock.now();
    let replica = Replica::open(shard, meta.replica, shared.log.log(), recovered, meta.state.clone(), now)
        .map_err(|error| error.to_string())?;
    let view = View { active: Table::default(), sealed: None, base, applied: meta.applied(), revision: meta.revision };
    let cell = Cell::new(shard, meta.replica, meta.keyspace, meta.part.clone(), view);
    Ok(Shard::new(Arc::new(cell), replica, meta))
}

/// Gives a leadership away.
pub fn transfer(shared: Arc<Shared>, frame: &Frame, reply: Reply) {
    let shard = frame.header.shard;
    let Some((transfer, reply)) = head_of::<TransferLeader>(frame, reply) else { return };
    tokio::spawn(async move {
        let (done, answered) = oneshot::channel();
        shared.mail(shared.owner_of(shard), Mail::Transfer(shard, transfer.to, done)).await;
        let stopping = |_| Err(Failure::Busy { retry_after_ms: 50, text: "the node is stopping".into() });
        reply.result(answered.await.unwrap_or_else(stopping));
    });
}
