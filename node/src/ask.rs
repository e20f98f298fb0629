//! Questions of one shard's leader to another's: prepare, finish, resolve. The other may be on this node.

#![expect(clippy::disallowed_methods, reason = "a shell: waits between attempts, and tells the time left")]

use crate::machine::{self, Done, WriteKind};
use crate::owner::{Mail, Waiter, WriteJob};
use crate::resolve;
use crate::shared::Shared;
use bytes::Bytes;
use serde::Serialize;
use shkv_proto::codec;
use shkv_proto::link::{CallError, LinkError, done_or_failure};
use shkv_proto::message::{Consistency, Failure, Resolve};
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// First pause after an attempt that found no leader; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(2);
/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_millis(100);

/// Asks the leader of a shard, and looks for it until the deadline. What was certainly not done is asked again; what may
/// have been done is not.
///
/// # Errors
/// The leader's failure; [`Failure::Busy`] if no leader was found in time: not done; [`Failure::Unknown`].
pub async fn leader<T: serde::de::DeserializeOwned>(
    shared: &Arc<Shared>,
    shard: ShardId,
    kind: Kind,
    head: &impl Serialize,
    tail: Bytes,
    deadline: Instant,
) -> Result<(T, Bytes), Failure> {
    let head = codec::encode(head).map_err(|error| Failure::malformed(&error))?;
    leader_raw(shared, shard, kind, head.into(), tail, deadline).await
}

/// [`leader`] with a head that is encoded already.
///
/// # Errors
/// As of [`leader`].
pub async fn leader_raw<T: serde::de::DeserializeOwned>(
    shared: &Arc<Shared>,
    shard: ShardId,
    kind: Kind,
    head: Bytes,
    tail: Bytes,
    deadline: Instant,
) -> Result<(T, Bytes), Failure> {
    let mut pause = PAUSE_MIN;
    let mut tries = 0;
    loop {
        tries += 1;
        let node = whom(shared, shard, tries);
        let header = Header { shard, epoch: shared.epoch(), ..Header::new(kind) };
        let frame = Frame { header, head: head.clone(), tail: tail.clone() };
        let (last, wait) = match once(shared, node, frame, deadline).await {
            Ok(answer) => {
                if let (Some(routes), Some(node)) = (shared.routes(), node) {
                    routes.note_leader(shard, node);
                }
                let head = codec::decode(&answer.head).map_err(|error| Failure::unknown(error.to_string()))?;
                return Ok((head, answer.tail));
            }
            Err(CallError::Failure(failure)) => match failure {
                Failure::NotLeader { hint } => {
                    if let (Some(routes), Some(node)) = (shared.routes(), node) {
                        routes.note_not_leader(shard, node, hint);
                    }
                    (failure, if hint.is_some() && tries <= 2 { Duration::ZERO } else { pause })
                }
                Failure::Busy { retry_after_ms, .. } => {
                    let wait = Duration::from_millis(u64::from(retry_after_ms)).clamp(PAUSE_MIN, PAUSE_MAX);
                    (failure, wait)
                }
                Failure::WrongShard { .. } => {
                    if let (Some(routes), Some(node)) = (shared.routes(), node) {
                        routes.note_not_leader(shard, node, None);
                    }
                    (failure, pause)
                }
                other => return Err(other),
            },
            Err(CallError::Link(LinkError::NotSent(text))) => {
                if let (Some(routes), Some(node)) = (shared.routes(), node) {
                    routes.note_not_leader(shard, node, None);
                }
                (Failure::Busy { retry_after_ms: 50, text }, pause)
            }
            Err(CallError::Link(error @ (LinkError::Lost(_) | LinkError::Expired))) => {
                return Err(Failure::unknown(error.to_string()));
            }
        };
        if Instant::now() + wait >= deadline {
            let text = format!("no answer of shard {shard} before the deadline; last: {last}");
            return Err(Failure::Busy { retry_after_ms: 50, text });
        }
        tokio::time::sleep(wait).await;
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Whom to ask: who leads as far as this node's own replica knows, or as was last seen, or each replica in turn. A replica
/// that was removed while nobody told it knows no better, so it is not always asked.
fn whom(shared: &Shared, shard: ShardId, tries: u32) -> Option<NodeId> {
    let own = shared.cell(shard).and_then(|cell| cell.leader());
    let seen = || {
        let routes = shared.routes()?;
        routes.target(routes.map().shard(shard)?, Consistency::Linearizable, b"", tries)
    };
    if tries.is_multiple_of(3) { seen().or(own) } else { own.or_else(seen) }
}

async fn once(shared: &Arc<Shared>, node: Option<NodeId>, frame: Frame, deadline: Instant) -> Result<Frame, CallError> {
    let not_sent = |text: String| CallError::Link(LinkError::NotSent(text));
    let Some(node) = node else {
        return Err(not_sent(format!("nobody is known to keep shard {}", frame.header.shard)));
    };
    if node == shared.peers.me() {
        return Ok(here(shared, frame, deadline).await?);
    }
    let Some(link) = shared.peers.link(node) else {
        return Err(not_sent(format!("it is not known where node {node} is")));
    };
    Ok(done_or_failure(link.call(frame, deadline).await?)?)
}

/// The same on this node.
async fn here(shared: &Arc<Shared>, frame: Frame, deadline: Instant) -> Result<Frame, Failure> {
    let epoch = shared.epoch();
    let encoded = |head: Result<Vec<u8>, codec::CodecError>, tail: Bytes| {
        let head = head.map_err(|error| Failure::unknown(error.to_string()))?;
        Ok(Frame::new(frame.header.answer(Kind::Done), head, tail))
    };
    let Some(kind) = WriteKind::of(frame.header.kind) else {
        let resolve: Resolve = codec::decode(&frame.head).map_err(|error| Failure::malformed(&error))?;
        return encoded(codec::encode(&resolve::answer(shared, resolve.txn)?), Bytes::new());
    };
    let cell = shared.cell(frame.header.shard).ok_or(Failure::WrongShard { epoch })?;
    machine::check(kind, &frame.head, &frame.tail, |keyspace, key| cell.holds(keyspace, key, epoch))?;
    match write(shared, cell.shard, kind, frame.head, frame.tail, Some(deadline)).await? {
        Done::Prepare(done, values) => encoded(codec::encode(&done), values),
        Done::Finish(done) => encoded(codec::encode(&done), Bytes::new()),
        Done::Write(_) | Done::Batch(..) | Done::LetGo => Err(Failure::unknown("an answer to another question")),
    }
}

/// Hands a write to a shard of this node and waits for its answer; without a deadline until it is known.
///
/// # Errors
/// The shard's.
pub async fn write(
    shared: &Shared,
    shard: ShardId,
    kind: WriteKind,
    head: Bytes,
    tail: Bytes,
    deadline: Option<Instant>,
) -> Result<Done, Failure> {
    let (answer, answered) = oneshot::channel();
    let until = deadline.map_or(u64::MAX, |deadline| {
        shared.clock.now() + deadline.saturating_duration_since(Instant::now()).as_nanos() as u64
    });
    let job = WriteJob { kind, head, tail, waiter: Waiter::here(answer, until) };
    shared.mail(shared.owner_of(shard), Mail::Writes(vec![(shard, job)])).await;
    answered.await.unwrap_or_else(|_| Err(Failure::unknown("the node is stopping")))
}
