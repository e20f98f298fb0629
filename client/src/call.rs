//! One request from its first attempt to its outcome: which node to ask, what to learn from a failure, when to try
//! again. What may be tried again is decided in [`shkv_proto::retry`], not here.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits, and starts the fetch of a newer map")]

use crate::error::Error;
use crate::inner::Inner;
use crate::lanes::{Ticket, spread};
use crate::token::Consistency;
use crate::view::{Peer, View};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::frame::{Frame, Header, Kind};
use shkv_proto::ids::{Epoch, KeyspaceId, NodeId, ShardId};
use shkv_proto::link::{CallError, Link, LinkError, done_or_failure};
use shkv_proto::message::{self, Failure, RefusalCode, WriteId};
use shkv_proto::retry::{Asked, Attempts, Step};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long an attempt waits for a connection that is not up, so that there is time left for another way.
pub(crate) const CONNECT_TIME_MAX: Duration = Duration::from_millis(500);
/// An attempt takes half of the time that is left, but no less than this: the rest is for another replica.
const ATTEMPT_MIN: Duration = Duration::from_millis(500);

/// What a request is for.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Aim<'a> {
    /// The shard that holds this key.
    Key(&'a [u8]),
    /// The lowest of the shards that hold these keys, of which there is at least one.
    Keys(&'a [Bytes]),
    /// This shard.
    Shard(ShardId),
    /// All shards of the keyspace, by way of a balancer.
    Keyspace,
}

/// A request that can be sent as often as is safe.
pub(crate) struct Request<'a, E> {
    pub(crate) kind: Kind,
    pub(crate) keyspace: KeyspaceId,
    pub(crate) aim: Aim<'a>,
    pub(crate) consistency: Consistency,
    /// By what a write is known when it is sent again; a read has none.
    pub(crate) ticket: Option<&'a Ticket>,
    /// Encodes the head, with how fresh the answer must be and by what a write is known.
    pub(crate) head: E,
    pub(crate) tail: Bytes,
}

/// An answer, and which shard it is of.
pub(crate) struct Answered<T> {
    pub(crate) head: T,
    pub(crate) tail: Bytes,
    /// [`ShardId::UNROUTED`] when a balancer chose it and the client knows no better.
    pub(crate) shard: ShardId,
}

/// Where an attempt goes.
enum Way<'a> {
    Node(&'a Arc<Peer>),
    Home(&'a Link),
}

/// When a call began, and when it is over.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) began: Instant,
    pub(crate) deadline: Instant,
}

impl Span {
    /// A call that begins now and may take `within`.
    pub(crate) fn of(within: Duration) -> Self {
        let began = Instant::now();
        let within_max = Duration::from_millis(u64::from(shkv_proto::limits::DEADLINE_MS_MAX));
        Self { began, deadline: began + within.min(within_max) }
    }
}

/// Sends a request and answers for its outcome. The number of attempts is bounded by the deadline and by the pauses of
/// [`shkv_proto::retry`].
pub(crate) fn ask<T, E>(
    inner: &Arc<Inner>,
    request: &Request<'_, E>,
    span: Span,
) -> impl Future<Output = Result<Answered<T>, Error>>
where
    T: DeserializeOwned,
    E: Fn(message::Consistency, Option<WriteId>) -> Result<Vec<u8>, CodecError>,
{
    let read = |answer: Frame, shard| Ok(Answered { head: codec::decode(&answer.head)?, tail: answer.tail, shard });
    ask_as(inner, request, span, read)
}

/// Like [`ask`], for an answer that `read` takes apart, which is told the shard that it is of.
pub(crate) async fn ask_as<A, E>(
    inner: &Arc<Inner>,
    request: &Request<'_, E>,
    span: Span,
    read: impl Fn(Frame, ShardId) -> Result<A, CodecError>,
) -> Result<A, Error>
where
    E: Fn(message::Consistency, Option<WriteId>) -> Result<Vec<u8>, CodecError>,
{
    let Span { began, deadline } = span;
    let mut now = began; // looked at once for each attempt: that costs as much as a lock
    let mut attempts = Attempts::new(if request.ticket.is_some() { Asked::KnownWrite } else { Asked::Read });
    loop {
        let tries = attempts.tries() + 1;
        let view = inner.view();
        let (shard, epoch) = place(&view, request)?;
        let consistency = inner.wanted(request.consistency, shard);
        let age = attempts.may_be_done().then(|| began.elapsed());
        let head = (request.head)(consistency, request.ticket.map(|ticket| ticket.id(age)))
            .map_err(|error| Error::refused(RefusalCode::Malformed, error.to_string()))?;
        let way = choose(inner, &view, request, shard, consistency, tries);
        let mut header = Header::new(request.kind);
        if matches!(way, Way::Node(_)) || !matches!(request.aim, Aim::Key(_) | Aim::Keys(_)) {
            (header.shard, header.epoch) = (shard, epoch);
        }
        let frame = Frame { header, head: Bytes::from(head), tail: request.tail.clone() };
        let (link, at) = match way {
            Way::Node(peer) => peer.link_at(),
            Way::Home(link) => (link, 0),
        };
        let until = try_until(deadline, now);
        let result = send(link, frame, now, until).await.map_err(CallError::from).and_then(|answer| {
            let read = read(done_or_failure(answer)?, shard);
            Ok(read.map_err(|error| Failure::unknown(format!("an answer that cannot be read: {error}")))?)
        });
        let error = match result {
            Ok(answer) => {
                if let (Way::Node(peer), message::Consistency::Linearizable) = (&way, consistency)
                    && view.routes.leader(shard) != Some(peer.node)
                {
                    view.routes.note_leader(shard, peer.node);
                }
                return Ok(answer);
            }
            Err(error) => error,
        };
        let other_way = learn(inner, &view, &way, at, shard, &error);
        match attempts.failed(&error) {
            Step::Stop(failure) => return Err(failure.into()),
            Step::Again { after, new_map, hint } => {
                if let Some(node) = hint {
                    note_hint(&view, &way, shard, node);
                }
                let pause = match error {
                    _ if other_way => Duration::ZERO,
                    CallError::Failure(Failure::Aborted { .. }) => spread(after),
                    CallError::Failure(_) | CallError::Link(_) => after,
                };
                if Instant::now() + pause >= deadline {
                    return Err(attempts.out_of_time(&error).into());
                }
                drop(error);
                Box::pin(async {
                    if new_map {
                        inner.refresh(deadline).await;
                    }
                    if !pause.is_zero() {
                        tokio::time::sleep(pause).await;
                    }
                })
                .await;
                now = Instant::now();
            }
        }
    }
}

/// The shard that a request is for, and the epoch of the map that says so.
fn place<E>(view: &View, request: &Request<'_, E>) -> Result<(ShardId, Epoch), Error> {
    let epoch = view.routes.map().epoch;
    match request.aim {
        Aim::Keyspace => Ok((ShardId::UNROUTED, Epoch::NONE)),
        Aim::Key(key) => match view.routes.shard_of(request.keyspace, key) {
            Some(shard) => Ok((shard.id, epoch)),
            None => Err(Error::refused(RefusalCode::UnknownKeyspace, format!("no keyspace {}", request.keyspace))),
        },
        Aim::Keys(keys) => {
            let mut lowest: Option<ShardId> = None;
            for key in keys {
                let shard = view.routes.shard_of(request.keyspace, key).ok_or_else(|| {
                    Error::refused(RefusalCode::UnknownKeyspace, format!("no keyspace {}", request.keyspace))
                })?;
                lowest = Some(lowest.map_or(shard.id, |lowest| lowest.min(shard.id)));
            }
            Ok((lowest.unwrap_or(ShardId::UNROUTED), epoch))
        }
        Aim::Shard(id) => match view.routes.map().shard(id) {
            Some(shard) => Ok((shard.id, epoch)),
            None => Err(Error::unavailable(format!("shard {id} is no longer in the map; send the request again"))),
        },
    }
}

fn choose<'a, E>(
    inner: &'a Inner,
    view: &'a View,
    request: &Request<'_, E>,
    shard: ShardId,
    consistency: message::Consistency,
    tries: u32,
) -> Way<'a> {
    if inner.config.through_balancer {
        return Way::Home(inner.home());
    }
    let Some(info) = view.routes.map().shard(shard) else { return Way::Home(inner.home()) };
    let key = match request.aim {
        Aim::Key(key) => key,
        Aim::Keys(_) | Aim::Shard(_) | Aim::Keyspace => &[],
    };
    if let Some(peer) = view.peer_for(info, consistency, key, tries, Instant::now) {
        return Way::Node(peer);
    }
    let home = inner.home();
    let useful = match home.welcome() {
        Some(welcome) => welcome.role == message::Role::Balancer, // a node forwards nothing
        None => tries.is_multiple_of(2), // it may be a balancer that comes back, or the nodes may come back first
    };
    match view.last_resort(info, consistency, key, tries).filter(|_| !useful) {
        Some(peer) => Way::Node(peer),
        None => Way::Home(home),
    }
}

/// Takes a failure into account for the next attempt. Tells whether that attempt goes another way and need not wait.
fn learn(inner: &Arc<Inner>, view: &View, way: &Way<'_>, at: usize, shard: ShardId, error: &CallError) -> bool {
    match (way, error) {
        (Way::Node(peer), CallError::Link(LinkError::NotSent(_))) => {
            // Each node becomes passed over once a second at most, which bounds the attempts that do not wait.
            let news = peer.pass_over(at, Instant::now());
            inner.not_leader(view, shard, peer.node, None);
            inner.refresh_behind();
            news
        }
        (Way::Node(peer), CallError::Link(LinkError::Lost(_) | LinkError::Expired)) => {
            inner.not_leader(view, shard, peer.node, None);
            inner.refresh_behind();
            false
        }
        (Way::Node(peer), CallError::Failure(Failure::NotLeader { hint })) => {
            inner.not_leader(view, shard, peer.node, *hint);
            false
        }
        (Way::Node(peer), CallError::Failure(Failure::WrongShard { .. })) => {
            // Its replica has moved away. If nobody has a newer map, the others are still where the old one says.
            inner.not_leader(view, shard, peer.node, None);
            false
        }
        (Way::Home(link), CallError::Link(LinkError::NotSent(_))) => {
            link.retry_now();
            inner.next_home();
            false
        }
        (Way::Home(_), CallError::Link(LinkError::Lost(_) | LinkError::Expired)) => {
            inner.next_home();
            false
        }
        (Way::Node(_) | Way::Home(_), CallError::Failure(_)) => false,
    }
}

/// A hint names the leader, unless a node names itself as the one that it is not.
fn note_hint(view: &View, way: &Way<'_>, shard: ShardId, node: NodeId) {
    let same = matches!(way, Way::Node(peer) if peer.node == node);
    if !same {
        view.routes.note_leader(shard, node);
    }
}

/// When an attempt that begins at `now` is given up, so that there is time for another.
pub(crate) fn try_until(deadline: Instant, now: Instant) -> Instant {
    deadline.min(now + (deadline.saturating_duration_since(now) / 2).max(ATTEMPT_MIN))
}

/// Sends a frame over a link once. `now` may be a little old.
pub(crate) async fn attempt(link: &Link, frame: Frame, now: Instant, until: Instant) -> Result<Frame, CallError> {
    Ok(done_or_failure(send(link, frame, now, until).await?)?)
}

/// The answer to a frame that was sent. It is small, because a call is moved as often as it is handed on.
enum Sent<'a> {
    Now(oneshot::Receiver<Result<Frame, LinkError>>),
    /// When the link is up and has credit.
    Later(Pin<Box<dyn Future<Output = Result<Frame, LinkError>> + Send + 'a>>),
}

fn send(link: &Link, mut frame: Frame, now: Instant, until: Instant) -> Sent<'_> {
    if link.is_up() {
        match link.try_send(frame, now, until) {
            Ok(answer) => return Sent::Now(answer),
            Err(unsent) => frame = unsent,
        }
    }
    Sent::Later(Box::pin(async move {
        link.connected(until.min(Instant::now() + CONNECT_TIME_MAX)).await?;
        link.send(frame, until).await.await.unwrap_or_else(|_| Err(closed()))
    }))
}

fn closed() -> LinkError {
    LinkError::Lost("the link was closed".into())
}

impl Future for Sent<'_> {
    type Output = Result<Frame, LinkError>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        match self.get_mut() {
            Self::Now(answer) => Pin::new(answer).poll(context).map(|ended| ended.unwrap_or_else(|_| Err(closed()))),
            Self::Later(answer) => answer.as_mut().poll(context),
        }
    }
}
