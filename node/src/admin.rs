//! What balancers ask of a node: hear where the others are, make and delete replicas, take a step from one set of a
//! shard's replicas to the next, give a leadership away.

#![expect(clippy::disallowed_methods, reason = "a shell: starts the tasks of slow requests")]

use crate::cell::Cell;
use crate::claim::{Claim, Purpose};
use crate::flusher::Job;
use crate::log::ShardWrite;
use crate::log::recover::Recovered;
use crate::machine::Ledger;
use crate::memtable::Table;
use crate::owner::{Mail, Shard};
use crate::replica::{Replica, is_sound};
use crate::reply::Reply;
use crate::session::head_of;
use crate::shared::Shared;
use crate::store::{Base, ReplicaMeta, StoreError};
use crate::table::View;
use shkv_proto::message::{
    Beat, ChangeReplicas, CreateReplica, Failure, Hello, RefusalCode, RemoveReplica, Role, SnapshotHead, TransferLeader,
};
use shkv_proto::{Frame, ReplicaId, ShardId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// Letters of the reason why a node is retired that it remembers.
const REASON_CHARS_MAX: usize = 1024;
/// How long a replica that is to stand for election waits for links to its voters: a request for a vote that is dropped
/// costs an election timeout.
const REACH_TIME_MAX: Duration = Duration::from_millis(500);

/// Takes in where the others are, and the map, and answers with the node's status.
pub fn beat(shared: Arc<Shared>, peer: &Hello, frame: &Frame, reply: Reply) {
    let Some((beat, reply)) = head_of::<Beat>(frame, reply) else { return };
    let of_cluster = peer.cluster.is_some() && peer.cluster == shared.cluster();
    if let Some(reason) = beat.retired {
        if peer.role != Role::Balancer || !of_cluster {
            let text = "only a balancer of the node's own cluster may retire it";
            return reply.failed(&Failure::refusal(RefusalCode::NotAllowed, text));
        }
        let reason: String = reason.chars().take(REASON_CHARS_MAX).collect();
        if let Err(failure) = shared.retire(&reason) {
            return reply.failed(&failure);
        }
    }
    if peer.role == Role::Balancer {
        shared.beat_came();
    }
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
    let conflict = |text: String| Err(Failure::refusal(RefusalCode::Conflict, text));
    let (shard, replica) = (create.shard, create.replica);
    let me = shared.identity.id();
    if !create.homes.contains(&(replica, me)) {
        return conflict(format!("replica {replica} of shard {shard} is not this node's"));
    }
    let state = SnapshotHead {
        index: 0,
        term: 0,
        voters: create.founders.clone(),
        voters_outgoing: vec![],
        learners: vec![],
        learners_next: vec![],
        auto_leave: false,
    };
    if replica.0 == 0 || !is_sound(&state) {
        return conflict(format!("replica {replica} of shard {shard} has founders that can be none"));
    }
    shared.identity.join(create.cluster)?;
    shared.peers.set_cluster(create.cluster);
    let Some(_claim) = Claim::begin(shared, shard, Purpose::Make) else {
        // If it is this one that gets a snapshot, then it is made.
        return match shared.cell(shard) {
            Some(cell) if cell.replica == replica => Ok(()),
            _ => Err(Failure::Busy {
                retry_after_ms: 50,
                text: "a replica of the shard is being made or deleted".into(),
            }),
        };
    };
    if let Some(cell) = shared.cell(shard) {
        if cell.replica == replica {
            return Ok(());
        }
        return conflict(format!("this node already keeps replica {} of shard {shard}", cell.replica));
    }
    // Durable before there is a replica: it must not find the entries, the term or the vote of an earlier one, and a log
    // that was begun for it shows later when it is missing.
    forget_log(shared, shard).await?;
    let (keyspace, part, homes) = (create.keyspace, create.part, create.homes);
    let meta = ReplicaMeta { replica, keyspace, part, homes, state, revision: 0 };
    let kept = Box::new(meta.clone());
    let base = shared.flusher.ask(|answer| Job::Create(shard, kept, answer)).await.map_err(|error| busy(&error))?;
    let Some(base) = base else {
        return conflict(format!(
            "replica {replica} of shard {shard} was deleted here; one that comes back needs a new id"
        ));
    };
    if create.campaign {
        shared.peers.reach(meta.homes.iter().map(|(_, node)| *node), Instant::now() + REACH_TIME_MAX).await;
    }
    let opened = open_shard(shared, shard, meta, base, Recovered::default())
        .map_err(|error| Failure::refusal(RefusalCode::Conflict, error))?;
    shared.mail(shared.owner_of(shard), Mail::Adopt(Box::new(opened), create.campaign)).await;
    Ok(())
}

/// Deletes a replica. Deleting it twice is the same as deleting it once.
pub fn remove(shared: Arc<Shared>, frame: &Frame, reply: Reply) {
    let shard = frame.header.shard;
    let Some((remove, reply)) = head_of::<RemoveReplica>(frame, reply) else { return };
    tokio::spawn(async move { reply.result(delete(&shared, shard, remove.replica).await) });
}

/// In this order: the replica goes from redb before its entries and its vote go from the log. After a crash in between
/// there is a log without a replica, which the next start clears; a replica that has forgotten its vote there never is.
async fn delete(shared: &Arc<Shared>, shard: ShardId, replica: ReplicaId) -> Result<(), Failure> {
    let Some(_claim) = Claim::begin(shared, shard, Purpose::Delete) else {
        return Err(Failure::Busy {
            retry_after_ms: 50,
            text: "a replica of the shard is being made or deleted".into(),
        });
    };
    if shared.cell(shard).is_none_or(|cell| cell.replica != replica) {
        return Ok(());
    }
    shared.hide(shard, replica);
    let (done, dropped) = oneshot::channel();
    shared.mail(shared.owner_of(shard), Mail::Drop(shard, replica, done)).await;
    dropped.await.map_err(|_| stopping())?;
    shared.flusher.ask(|answer| Job::Delete(shard, replica, answer)).await.map_err(|error| busy(&error))?;
    forget_log(shared, shard).await
}

async fn forget_log(shared: &Shared, shard: ShardId) -> Result<(), Failure> {
    shared.log.write(ShardWrite::forget(shard.0)).await.ok_or_else(stopping)
}

fn busy(error: &StoreError) -> Failure {
    Failure::Busy { retry_after_ms: 500, text: error.to_string() }
}

fn stopping() -> Failure {
    Failure::Busy { retry_after_ms: 50, text: "the node is stopping".into() }
}

/// Takes a step from one set of replicas to the next.
pub fn change(shared: Arc<Shared>, frame: &Frame, reply: Reply) {
    let shard = frame.header.shard;
    let Some((step, reply)) = head_of::<ChangeReplicas>(frame, reply) else { return };
    tokio::spawn(async move {
        let (done, answered) = oneshot::channel();
        shared.mail(shared.owner_of(shard), Mail::Change(shard, step, done)).await;
        reply.result(answered.await.unwrap_or_else(|_| Err(stopping())));
    });
}

/// A shard from what the disk has of it.
///
/// # Errors
/// What does not fit together, in words.
pub fn open_shard(
    shared: &Shared,
    shard: ShardId,
    meta: ReplicaMeta,
    base: Base,
    recovered: Recovered,
) -> Result<Shard, String> {
    let now = shared.clock.now();
    let replica = Replica::open(shard, meta.replica, shared.log.log(), recovered, meta.state.clone(), now)
        .map_err(|error| error.to_string())?;
    let ledger = Ledger::decode(base.ledger()).map_err(|error| error.to_string())?;
    #[cfg(feature = "sim")]
    let ledger = match () {
        () if crate::inspect::planted(crate::inspect::Bug::SessionsLost) => Ledger::default(),
        () => ledger,
    };
    let (applied, revision) = (meta.applied(), meta.revision);
    #[cfg(feature = "sim")]
    let revision = match () {
        () if crate::inspect::planted(crate::inspect::Bug::RevisionLost) => revision / 2,
        () => revision,
    };
    let view = View { active: Table::default(), sealed: None, base, applied, revision, ledger };
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
        reply.result(answered.await.unwrap_or_else(|_| Err(stopping())));
    });
}
