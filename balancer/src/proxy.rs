//! The native listener: takes the requests of clients, and hands back what the nodes answer.
//!
//! A connection is read by one task and written by another. Requests in flight and bytes waiting to be written are
//! bounded: beyond the bound the connection is not read from, and TCP tells the client to wait.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits and starts tasks")]

use crate::cluster::Cluster;
use crate::control;
use crate::forward::{self, Request, Way, unknown_keyspace};
use crate::scan::{self, Whole};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{CREDIT_REQUESTS, Limits, OUTBOX_BYTES_SOFT};
use shkv_proto::message::{
    Admin, Batch, BatchOp, Consistency, Failure, Get, Hello, Join, JoinDone, MapDone, RefusalCode, Role, Scan,
    StatusDone, Welcome,
};
use shkv_proto::outbox::Outbox;
use shkv_proto::route::Routes;
use shkv_proto::session::{self, Session, SessionError};
use shkv_proto::world::net::{TcpListener, TcpStream};
use shkv_proto::{Epoch, Frame, Header, KeyspaceId, Kind, ShardId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::AsyncRead;
use tokio::sync::{Notify, Semaphore};
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;

/// Most connections of clients at a time; the next ones wait to be accepted.
const CONNECTIONS_MAX: usize = 10_000;
/// How long a request waits that names no deadline.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);
/// How long a client may leave its answers unread before it is disconnected.
const UNREAD_TIME_MAX: Duration = Duration::from_secs(30);
/// Pause after the system has refused to accept, mostly for want of file descriptors.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// How long a client should wait while there is no map.
const NO_MAP_RETRY_MS: u32 = 100;

/// Accepts connections until the balancer stops. `kill` ends those that do not end by themselves.
pub(crate) async fn listen(cluster: Arc<Cluster>, listener: TcpListener, kill: CancellationToken) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut lane = 0;
    loop {
        let accepted = cluster.stop.run_until_cancelled(async {
            let permit = room.clone().acquire_owned().await;
            (listener.accept().await, permit)
        });
        let Some((accepted, permit)) = accepted.await else { return };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
                continue;
            }
        };
        lane += 1;
        let (cluster, kill) = (cluster.clone(), kill.clone());
        let tasks = cluster.tasks.clone();
        tasks.spawn(async move {
            let _permit = permit;
            let gauge = cluster.metrics.connections.clone();
            gauge.inc();
            let serving = Box::pin(serve(cluster, stream, lane, kill.clone()));
            match kill.run_until_cancelled(serving).await {
                None | Some(Ok(())) => {}
                Some(Err(error)) => tracing::debug!(%error, "a client's connection ended"),
            }
            gauge.dec();
        });
    }
}

/// One client.
#[derive(Debug)]
struct Connection {
    cluster: Arc<Cluster>,
    outbox: Outbox,
    in_flight: AtomicU32,
    /// Told when there is room for a request again, and when none is in flight.
    freed: Notify,
    lane: usize,
    role: Role,
}

async fn serve(
    cluster: Arc<Cluster>,
    stream: TcpStream,
    lane: usize,
    kill: CancellationToken,
) -> Result<(), SessionError> {
    let opening = session::accept(stream, |hello| welcome(&cluster, hello));
    let Some(opened) = cluster.stop.run_until_cancelled(opening).await else { return Ok(()) };
    let Session { mut reader, mut writer, peer } = opened?;
    let connection = Arc::new(Connection {
        cluster: cluster.clone(),
        outbox: Outbox::default(),
        in_flight: AtomicU32::new(0),
        freed: Notify::new(),
        lane,
        role: peer.role,
    });
    let writing = connection.clone();
    cluster.tasks.spawn(kill.run_until_cancelled_owned(async move {
        if let Err(error) = writing.outbox.write_to(&mut writer).await {
            tracing::debug!(%error, "answers were not written");
        }
    }));
    let ended = connection.read_from(&mut reader).await;
    if ended.is_ok() {
        connection.below(1).await; // what was taken is answered before the connection is closed
    }
    connection.outbox.close();
    ended
}

fn welcome(cluster: &Cluster, hello: &Hello) -> Result<Welcome, Failure> {
    let version = hello.version_in_common()?;
    hello.check_cluster(Some(cluster.id))?;
    Ok(Welcome {
        version,
        cluster: Some(cluster.id),
        role: Role::Balancer,
        name: "balancer".into(),
        limits: Limits::OURS,
    })
}

impl Connection {
    /// Takes requests until the client ends, errs, or the balancer stops.
    async fn read_from<R: AsyncRead + Unpin>(
        self: &Arc<Self>,
        reader: &mut session::FrameReader<R>,
    ) -> Result<(), SessionError> {
        let mut frames = Vec::new();
        loop {
            match self.cluster.stop.run_until_cancelled(self.next(reader, &mut frames)).await {
                None | Some(Ok(false)) => return Ok(()),
                Some(Ok(true)) => {}
                Some(Err(error)) => return Err(error),
            }
            // Not under the token: a request that was read is carried out also while the balancer stops.
            self.take_all(&mut frames).await;
        }
    }

    /// Waits until the client has read enough of its answers, and then for its next requests.
    async fn next<R: AsyncRead + Unpin>(
        &self,
        reader: &mut session::FrameReader<R>,
        frames: &mut Vec<Frame>,
    ) -> Result<bool, SessionError> {
        tokio::time::timeout(UNREAD_TIME_MAX, self.outbox.drained_to(OUTBOX_BYTES_SOFT))
            .await
            .map_err(|_| SessionError::Slow("reading the answers", UNREAD_TIME_MAX))?;
        reader.next_batch(frames).await
    }

    async fn take_all(self: &Arc<Self>, frames: &mut Vec<Frame>) {
        let routes = self.cluster.routes();
        let now = Instant::now();
        for frame in frames.drain(..) {
            if self.in_flight.load(Ordering::Acquire) >= CREDIT_REQUESTS {
                self.below(CREDIT_REQUESTS).await;
            }
            self.in_flight.fetch_add(1, Ordering::AcqRel);
            self.cluster.metrics.in_flight.inc();
            self.take(&routes, frame, now);
        }
    }

    /// Waits until fewer requests than `bound` are in flight. Only the reading task calls it.
    async fn below(&self, bound: u32) {
        while self.in_flight.load(Ordering::Acquire) >= bound {
            self.freed.notified().await;
        }
    }

    /// Begins to carry out one request.
    fn take(self: &Arc<Self>, routes: &Routes, frame: Frame, now: Instant) {
        let header = frame.header;
        match self.begin(routes, frame, now) {
            Ok(None) => {}
            Ok(Some(answer)) => self.finish(header, Ok(answer)),
            Err(failure) => self.finish(header, Err(failure)),
        }
    }

    /// Sends a request on its way, or answers it at once.
    fn begin(self: &Arc<Self>, routes: &Routes, frame: Frame, now: Instant) -> Result<Option<Frame>, Failure> {
        let header = frame.header;
        let deadline = now
            + match header.deadline_ms {
                0 => DEADLINE_DEFAULT,
                some => Duration::from_millis(u64::from(some)),
            };
        if header.kind == Kind::Status {
            return done(header, &self.status(routes)).map(Some);
        }
        if routes.map().epoch == Epoch::NONE {
            if header.kind == Kind::Join {
                control::note_joiner(&self.cluster, self.role, &frame.head);
            }
            let trouble = self.cluster.trouble().unwrap_or_else(|| "it is being read".into());
            let text = format!("the balancer has no shard map yet: {trouble}");
            return Err(Failure::Busy { retry_after_ms: NO_MAP_RETRY_MS, text });
        }
        let write = Consistency::Linearizable;
        let (way, consistency) = match header.kind {
            Kind::Get => {
                let get: Get<'_> = codec::decode_borrowed(&frame.head).map_err(malformed)?;
                (Way::Key, get.consistency)
            }
            Kind::Put | Kind::Delete => (Way::Key, write),
            Kind::Batch => (Way::Shard(shard_of_batch(routes, &frame)?), write),
            Kind::Scan | Kind::Count => {
                let scan: Scan = codec::decode(&frame.head).map_err(malformed)?;
                if !scan.with.is_empty() {
                    let text = "a balancer merges all shards of a keyspace; only a scan of a node names some";
                    return Err(Failure::refusal(RefusalCode::Malformed, text));
                }
                let consistency = scan.consistency;
                if header.shard != ShardId::UNROUTED {
                    (Way::Shard(header.shard), consistency)
                } else {
                    match scan::shards_of(routes.map(), &scan)[..] {
                        [] if routes.map().shards_of(scan.keyspace).next().is_none() => {
                            return Err(unknown_keyspace(scan.keyspace));
                        }
                        [only] => (Way::Shard(only), consistency),
                        ref all => {
                            self.scan_all(Whole { header, scan, deadline, lane: self.lane }, all.to_vec());
                            return Ok(None);
                        }
                    }
                }
            }
            Kind::Map => return done(header, &map_done(routes)).map(Some),
            Kind::Admin => {
                let wish: Admin = codec::decode(&frame.head).map_err(malformed)?;
                let cluster = self.cluster.clone();
                self.answer_later(header, async move { control::admin(&cluster, wish).await });
                return Ok(None);
            }
            Kind::Join => {
                let join: Join = codec::decode(&frame.head).map_err(malformed)?;
                let (cluster, role) = (self.cluster.clone(), self.role);
                let joined = JoinDone { cluster: cluster.id };
                self.answer_later(header, async move { control::join(&cluster, role, join).await.map(|()| joined) });
                return Ok(None);
            }
            Kind::Status
            | Kind::Hello
            | Kind::Welcome
            | Kind::Done
            | Kind::Failed
            | Kind::Beat
            | Kind::CreateReplica
            | Kind::TransferLeader
            | Kind::ChangeReplicas
            | Kind::RemoveReplica
            | Kind::Raft
            | Kind::SnapshotBegin
            | Kind::SnapshotChunk
            | Kind::SnapshotEnd
            | Kind::Prepare
            | Kind::Finish
            | Kind::Resolve => {
                let text = format!("{:?} is not for a balancer", header.kind);
                return Err(Failure::refusal(RefusalCode::NotAllowed, text));
            }
        };
        let write = matches!(header.kind, Kind::Put | Kind::Delete | Kind::Batch);
        let request = Request { frame, way, consistency, write, own: false, begun: now, deadline, lane: self.lane };
        let connection = self.clone();
        forward::start(&self.cluster, routes, request, move |result| connection.finish(header, result));
        Ok(None)
    }

    /// Answers a request when something has been done that takes its time.
    fn answer_later<T: serde::Serialize + Send>(
        self: &Arc<Self>,
        header: Header,
        work: impl Future<Output = Result<T, Failure>> + Send + 'static,
    ) {
        let connection = self.clone();
        self.cluster.tasks.spawn(async move {
            let answer = Box::pin(work).await.and_then(|head| done(header, &head));
            connection.finish(header, answer);
        });
    }

    fn scan_all(self: &Arc<Self>, whole: Whole, shards: Vec<ShardId>) {
        let (connection, header) = (self.clone(), whole.header);
        self.cluster.tasks.spawn(async move {
            let answer = Box::pin(scan::over_all(&connection.cluster, whole, shards)).await;
            connection.finish(header, answer);
        });
    }

    /// Answers a request: the node's answer goes out with the client's own request id.
    fn finish(&self, asked: Header, result: Result<Frame, Failure>) {
        self.cluster.metrics.count(asked.kind, result.as_ref().err());
        match result {
            Ok(mut answer) => {
                answer.header.request = asked.request;
                self.outbox.push(&answer);
            }
            Err(failure) => self.outbox.push(&failed(asked, &failure)),
        }
        self.cluster.metrics.in_flight.dec();
        let before = self.in_flight.fetch_sub(1, Ordering::AcqRel);
        if before == 1 || before >= CREDIT_REQUESTS {
            self.freed.notify_one();
        }
    }

    fn status(&self, routes: &Routes) -> StatusDone {
        let map = Some(routes.map()).filter(|map| map.epoch != Epoch::NONE).cloned();
        let mut nodes: Vec<_> = self.cluster.pool.book().into_iter().map(|(node, _)| node).collect();
        nodes.extend(routes.map().nodes.iter().map(|node| node.id));
        nodes.sort_unstable();
        nodes.dedup();
        let report =
            |health: &crate::health::Health, now| nodes.iter().map(|node| (*node, health.report(*node, now))).collect();
        StatusDone {
            map,
            process: shkv_proto::world::process(),
            nodes: self.cluster.health(report),
            control: Some(control::status(&self.cluster)),
        }
    }
}

fn map_done(routes: &Routes) -> MapDone {
    let map = routes.map().clone();
    let leaders = map.shards.iter().filter_map(|shard| Some((shard.id, routes.leader(shard.id)?))).collect();
    MapDone { map, leaders }
}

/// The lowest of the shards that the keys of a batch belong to, whose leader sees to the others, unless the header names
/// it.
fn shard_of_batch(routes: &Routes, frame: &Frame) -> Result<ShardId, Failure> {
    if frame.header.shard != ShardId::UNROUTED {
        return Ok(frame.header.shard);
    }
    let batch: Batch<'_> = codec::decode_borrowed(&frame.head).map_err(malformed)?;
    lowest_shard(routes, batch.keyspace, &batch.ops)
}

fn lowest_shard(routes: &Routes, keyspace: KeyspaceId, ops: &[BatchOp<'_>]) -> Result<ShardId, Failure> {
    let mut lowest = None;
    for op in ops {
        let shard = routes.shard_of(keyspace, op.key()).ok_or_else(|| unknown_keyspace(keyspace))?.id;
        lowest = Some(lowest.map_or(shard, |lowest: ShardId| lowest.min(shard)));
    }
    lowest.ok_or_else(|| Failure::refusal(RefusalCode::BatchLimits, "a batch needs at least one operation"))
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err asks for")]
fn malformed(error: CodecError) -> Failure {
    Failure::malformed(&error)
}

fn done<T: serde::Serialize>(asked: Header, head: &T) -> Result<Frame, Failure> {
    let head = codec::encode(head)
        .map_err(|error| Failure::Busy { retry_after_ms: 0, text: format!("the answer is too large: {error}") })?;
    Ok(Frame::new(asked.answer(Kind::Done), head, vec![]))
}

fn failed(asked: Header, failure: &Failure) -> Frame {
    // A failure is a few words and cannot be over the limit of a head; if it were, the empty head would be read as an
    // unknown outcome, which is never wrong.
    let head = codec::encode(failure).unwrap_or_default();
    Frame::new(asked.answer(Kind::Failed), head, vec![])
}
