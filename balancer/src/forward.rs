//! One request on its way to a node: which shard, which replica, and what follows when an attempt fails.
//!
//! The way that nearly all requests go costs no task and touches no byte of head or tail: the header is rewritten, the
//! answer is handed on by the task that read it. Only what failed gets a task, in which [`Attempts`] decide. A write that
//! may have been done is sent again only if it has an id, and then says how old it is.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and waits")]

use crate::cluster::Cluster;
use shkv_proto::codec;
use shkv_proto::link::{self, CallError, LinkError};
use shkv_proto::message::{Batch, Consistency, Failure, KeyPrefix, RefusalCode, Write, WriteId};
use shkv_proto::retry::{Asked, Attempts, Step};
use shkv_proto::route::Routes;
use shkv_proto::{Epoch, Frame, KeyspaceId, Kind, NodeId, ShardId};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long one attempt waits for a newer map before it goes on with the old one.
const MAP_TIME_MAX: Duration = Duration::from_millis(200);

/// How the shard of a request is found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Way {
    /// By the key at the front of its head.
    Key,
    /// It is for this shard, whatever is in it.
    Shard(ShardId),
}

/// A request that is to be carried to a node.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    /// The frame as it came.
    pub(crate) frame: Frame,
    /// How its shard is found.
    pub(crate) way: Way,
    /// How fresh the answer must be.
    pub(crate) consistency: Consistency,
    /// Whether it changes anything.
    pub(crate) write: bool,
    /// Whether the balancer itself asks; nobody else writes to the system shard.
    pub(crate) own: bool,
    /// When it came.
    pub(crate) begun: Instant,
    /// When whoever asks gives up.
    pub(crate) deadline: Instant,
    /// Which of a node's links it takes.
    pub(crate) lane: usize,
}

/// Where one attempt goes.
#[derive(Clone, Copy, Debug)]
struct Target {
    shard: ShardId,
    node: NodeId,
    epoch: Epoch,
    /// Whether an answer tells that the node leads, which was not known before.
    tells_leader: bool,
}

impl Request {
    fn target(&self, routes: &Routes, tries: u32) -> Result<Target, Failure> {
        let epoch = routes.map().epoch;
        let id;
        let (shard, key) = match self.way {
            Way::Key => {
                let (prefix, _) = codec::decode_borrowed_prefix::<KeyPrefix<'_>>(&self.frame.head)
                    .map_err(|error| Failure::malformed(&error))?;
                let shard = routes.shard_of(prefix.keyspace, prefix.key);
                (shard.ok_or_else(|| unknown_keyspace(prefix.keyspace))?, prefix.key)
            }
            Way::Shard(shard) => {
                id = shard.0.to_le_bytes();
                (routes.map().shard(shard).ok_or(Failure::WrongShard { epoch })?, &id[..])
            }
        };
        if self.write && !self.own && shard.id == ShardId::SYSTEM {
            let text = "the system keyspace is written by balancers only";
            return Err(Failure::refusal(RefusalCode::NotAllowed, text));
        }
        let node = routes.target(shard, self.consistency, key, tries).ok_or(Failure::NotLeader { hint: None })?;
        let tells_leader = self.consistency == Consistency::Linearizable && routes.leader(shard.id) != Some(node);
        Ok(Target { shard: shard.id, node, epoch, tells_leader })
    }

    fn asked(&self) -> Asked {
        match (self.write, id_of(&self.frame)) {
            (false, _) => Asked::Read,
            (true, Some(_)) => Asked::KnownWrite,
            (true, None) => Asked::NamelessWrite,
        }
    }

    /// Says in the head how old the write is, which may have been done: whoever has forgotten it must not take it for new.
    /// The first attempt's age is kept in `came`.
    fn grow_older(&mut self, came: WriteId) -> Result<(), Failure> {
        let waited = self.begun.elapsed().as_millis().clamp(1, u128::from(u32::MAX)) as u32;
        let id = Some(WriteId { age_ms: came.age_ms.saturating_add(waited), ..came });
        let head = if self.frame.header.kind == Kind::Batch {
            let batch: Batch<'_> =
                codec::decode_borrowed(&self.frame.head).map_err(|error| Failure::malformed(&error))?;
            codec::encode(&Batch { id, ..batch })
        } else {
            let write: Write<'_> =
                codec::decode_borrowed(&self.frame.head).map_err(|error| Failure::malformed(&error))?;
            codec::encode(&Write { id, ..write })
        };
        self.frame.head = head.map_err(|error| Failure::malformed(&error))?.into();
        Ok(())
    }

    /// The frame with the header for this target; head and tail are those that came.
    fn frame_for(&self, target: &Target) -> Frame {
        let mut frame = self.frame.clone();
        frame.header.shard = target.shard;
        frame.header.epoch = target.epoch;
        frame
    }
}

/// By what a write is known, if it is.
fn id_of(frame: &Frame) -> Option<WriteId> {
    match frame.header.kind {
        Kind::Put | Kind::Delete => codec::decode_borrowed::<Write<'_>>(&frame.head).ok()?.id,
        Kind::Batch => codec::decode_borrowed::<Batch<'_>>(&frame.head).ok()?.id,
        _ => None,
    }
}

/// The refusal of a keyspace that the map does not have.
pub(crate) fn unknown_keyspace(keyspace: KeyspaceId) -> Failure {
    Failure::refusal(RefusalCode::UnknownKeyspace, format!("there is no keyspace {keyspace}"))
}

/// Sends a request off and returns. `finish` is called exactly once, now or from another task.
pub(crate) fn start<F>(cluster: &Arc<Cluster>, routes: &Routes, request: Request, finish: F)
where
    F: FnOnce(Result<Frame, Failure>) + Send + 'static,
{
    let target = match request.target(routes, 1) {
        Ok(target) => target,
        Err(failure) => return go_on(cluster.clone(), request, failure.into(), finish),
    };
    let Some(home) = cluster.pool.get(target.node) else {
        let error = no_address(target.node);
        return go_on(cluster.clone(), request, error.into(), finish);
    };
    let (frame, deadline, lane) = (request.frame_for(&target), request.deadline, request.lane);
    let done = {
        let cluster = cluster.clone();
        move |result| match settle(&cluster, &target, result) {
            Ok(answer) => finish(Ok(answer)),
            Err(error) => go_on(cluster, request, error, finish),
        }
    };
    if let Err((frame, done)) = home.link(lane).try_submit(frame, deadline, done) {
        let link = home.link(lane).clone();
        cluster.tasks.spawn(async move { link.submit(frame, deadline, done).await });
    }
}

/// Carries a request out to its end.
///
/// # Errors
/// The failure to tell whoever asked.
pub(crate) async fn carry(cluster: &Arc<Cluster>, routes: &Routes, request: Request) -> Result<Frame, Failure> {
    let (sender, receiver) = oneshot::channel();
    let write = request.write;
    start(cluster, routes, request, move |result| drop(sender.send(result)));
    receiver.await.unwrap_or_else(|_| Err(stopped(write)))
}

/// The answer when the task that would have answered is gone: the process is ending.
fn stopped(write: bool) -> Failure {
    let text = "the balancer is stopping";
    if write { Failure::unknown(text) } else { Failure::Busy { retry_after_ms: 100, text: text.into() } }
}

/// The first attempt has failed: ends the request if that was final, else goes on in a task.
fn go_on<F>(cluster: Arc<Cluster>, request: Request, error: CallError, finish: F)
where
    F: FnOnce(Result<Frame, Failure>) + Send + 'static,
{
    let mut attempts = Attempts::new(request.asked());
    match attempts.failed(&error) {
        Step::Stop(failure) => finish(Err(failure)),
        step @ Step::Again { .. } => {
            let tasks = cluster.tasks.clone();
            tasks.spawn(async move { finish(follow(&cluster, request, attempts, (error, step)).await) });
        }
    }
}

/// Attempts from the second on, until one is answered, a failure is final, or the deadline has come. Its bound is the
/// deadline: from the third attempt on each is preceded by a pause.
async fn follow(
    cluster: &Arc<Cluster>,
    mut request: Request,
    mut attempts: Attempts,
    (mut error, mut step): (CallError, Step),
) -> Result<Frame, Failure> {
    let begun = cluster.routes().map().epoch;
    let came = id_of(&request.frame);
    loop {
        let (after, new_map) = match step {
            Step::Again { after, new_map, hint: _ } => (after, new_map),
            Step::Stop(failure) => return Err(failure),
        };
        if Instant::now() + after >= request.deadline {
            return Err(attempts.out_of_time(&error));
        }
        match (&error, request.way) {
            (CallError::Failure(Failure::WrongShard { epoch }), way) => {
                wait_for_map(cluster, *epoch, request.deadline).await;
                let newest = cluster.routes().map().epoch;
                if newest > begun && !request.own && way != Way::Key {
                    // Whoever asked chose the shard by an older map, and must choose again.
                    return Err(match attempts.may_be_done() {
                        true => attempts.out_of_time(&error),
                        false => Failure::WrongShard { epoch: newest },
                    });
                }
            }
            _ if new_map => cluster.map_wanted.notify_one(),
            _ => {}
        }
        if !after.is_zero() {
            tokio::time::sleep(after).await;
        }
        cluster.metrics.retries.inc();
        if let Some(came) = came.filter(|_| attempts.may_be_done()) {
            request.grow_older(came)?;
        }
        match attempt(cluster, &request, attempts.tries() + 1).await {
            Ok(answer) => return Ok(answer),
            Err(next) => error = next,
        }
        step = attempts.failed(&error);
    }
}

/// After a node has said that it does not have the shard: it may know a newer map, or not yet have ours.
async fn wait_for_map(cluster: &Cluster, told: Epoch, deadline: Instant) {
    let ours = cluster.routes().map().epoch;
    if told > ours {
        let until = deadline.min(Instant::now() + MAP_TIME_MAX);
        cluster.newer_map(ours, until).await;
    } else {
        cluster.beat_wanted.notify_one();
        cluster.map_wanted.notify_one();
    }
}

/// One attempt, from which it learns.
///
/// # Errors
/// Why it was not answered.
pub(crate) async fn attempt(cluster: &Arc<Cluster>, request: &Request, tries: u32) -> Result<Frame, CallError> {
    let routes = cluster.routes();
    let target = request.target(&routes, tries)?;
    let Some(home) = cluster.pool.get(target.node) else {
        routes.note_not_leader(target.shard, target.node, None);
        return Err(no_address(target.node).into());
    };
    let link = home.link(request.lane + tries as usize).clone();
    let (sender, receiver) = oneshot::channel();
    let done = move |result| drop(sender.send(result));
    link.submit(request.frame_for(&target), request.deadline, done).await;
    let result = receiver.await.unwrap_or_else(|_| Err(LinkError::Lost("the link was closed".into())));
    settle(cluster, &target, result)
}

fn no_address(node: NodeId) -> LinkError {
    LinkError::NotSent(format!("no address is known for node {node}"))
}

/// Learns from the end of an attempt who leads.
fn settle(cluster: &Cluster, target: &Target, result: Result<Frame, LinkError>) -> Result<Frame, CallError> {
    let answer = match result {
        Ok(answer) => answer,
        Err(error) => {
            match error {
                LinkError::NotSent(_) | LinkError::Lost(_) => {
                    cluster.routes().note_not_leader(target.shard, target.node, None);
                }
                LinkError::Expired => {} // it may just be busy; the beat will tell
            }
            return Err(error.into());
        }
    };
    match link::done_or_failure(answer) {
        Ok(answer) => {
            if target.tells_leader {
                cluster.routes().note_leader(target.shard, target.node);
            }
            Ok(answer)
        }
        Err(failure) => {
            match failure {
                Failure::NotLeader { hint } => cluster.routes().note_not_leader(target.shard, target.node, hint),
                Failure::WrongShard { .. } => cluster.routes().note_not_leader(target.shard, target.node, None),
                _ => {}
            }
            Err(failure.into())
        }
    }
}
