//! The answering side of a connection: frames in, each read answered on the spot, each write handed to its owner.
//!
//! What one read call brings is handled as one batch: its writes become one letter per owner, and the answers leave
//! together. A connection that does not take its answers is not read from.

#![expect(
    clippy::disallowed_methods,
    reason = "a shell: starts the tasks of slow requests, and tells until when they may take"
)]

use crate::cell::{Cell, Look, disk_full, read_failed};
use crate::machine::{self, Reach, WriteKind};
use crate::owner::{Mail, Waiter, WriteJob};
use crate::reply::{Conn, Reply};
use crate::scan;
use crate::shared::Shared;
use crate::snapshot::Incoming;
use crate::steps::{Step, crash_at};
use crate::{admin, resolve, txn};
use bytes::Bytes;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{CREDIT_REQUESTS, OUTBOX_BYTES_SOFT};
use shkv_proto::message::{
    Consistency, Failure, Get, GetDone, Hello, MapDone, RaftMessage, RefusalCode, Resolve, Role, Scan, StatusDone,
};
use shkv_proto::outbox::SharedStream;
use shkv_proto::session::{Session, SessionError};
use shkv_proto::{Frame, Kind, ShardId};
use smallvec::SmallVec;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a request may take when its sender does not say.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(5);
/// Entries from this size on share the memory of the frame that brought them.
const SHARE_BYTES_MIN: usize = 64 << 10;
/// Gets that are looked at side by side without an allocation.
const WARMED: usize = 128;
/// Fewer are not worth it.
const WARMED_MIN: usize = 8;
/// How often a read that waits for a lock looks again by itself: the replica may have lost its leadership meanwhile.
const LOCK_LOOK_EVERY: Duration = Duration::from_millis(100);
/// How long a closing connection waits for what is in hand.
const CLOSING_TIME_MAX: Duration = Duration::from_secs(3);

/// How long a snapshot that is coming in may be silent. Its sender may be gone without having said so, and as long as the
/// stream is held no other can begin.
const SNAPSHOT_SILENCE_MAX: Duration = Duration::from_secs(10);

/// Serves a connection until either side ends it.
pub async fn serve(shared: Arc<Shared>, session: Session<Hello>) {
    let Session { mut reader, writer, peer } = session;
    let stream = SharedStream::new(writer);
    let conn = Arc::new(Conn::new(stream.clone()));
    let writing = tokio::spawn({
        let (conn, mut stream) = (conn.clone(), stream.clone());
        async move { conn.outbox.write_to(&mut stream).await }
    });
    let mut served =
        Served { shared: shared.clone(), conn: conn.clone(), peer, incoming: None, writes: vec![], value: vec![] };
    let mut frames = Vec::new();
    loop {
        let read = tokio::select! { // every arm is cancel-safe: next_batch keeps what it has read
            biased; // the read first: it is what there mostly is, and an end is looked for behind it
            read = reader.next_batch(&mut frames) => read,
            () = shared.stop.cancelled() => break,
            () = shared.retired.cancelled() => break,
            () = async { tokio::time::sleep(SNAPSHOT_SILENCE_MAX).await }, if served.incoming.is_some() => break,
        };
        if shared.stop.is_cancelled() || shared.retired.is_cancelled() {
            break;
        }
        match read {
            Ok(true) => {
                served.batch(&mut frames).await;
                conn.outbox.flush(&stream); // what was answered on the spot: no more is due before the next read
            }
            Ok(false) => break,
            Err(SessionError::Io(error)) => {
                tracing::debug!("a connection was lost: {error}");
                break;
            }
            Err(error) => {
                tracing::warn!(role = ?served.peer.role, "a connection was closed: {error}");
                break;
            }
        }
    }
    let _ = tokio::time::timeout(CLOSING_TIME_MAX, conn.eased_to(0)).await; // what is not answered by then counts as unknown
    conn.outbox.close();
    let _ = tokio::time::timeout(CLOSING_TIME_MAX, writing).await; // the other side may not be reading any more
}

struct Served {
    shared: Arc<Shared>,
    conn: Arc<Conn>,
    peer: Hello,
    /// The snapshot that is coming in on this connection.
    incoming: Option<Incoming>,
    /// The writes of the batch, by owner.
    writes: Vec<Vec<(ShardId, WriteJob)>>,
    /// The value that was read last, if it is small.
    value: Vec<u8>,
}

impl Served {
    async fn batch(&mut self, frames: &mut Vec<Frame>) {
        let of_clients = frames.iter().filter(|frame| frame.header.kind != Kind::Raft).count();
        if of_clients > 0 {
            self.shared.count_client_frames(of_clients as u64);
        }
        self.warm(frames);
        for frame in frames.drain(..) {
            if frame.header.kind == Kind::Raft {
                self.raft(&frame);
                continue;
            }
            let reply = self.conn.begin(frame.header);
            match WriteKind::of(frame.header.kind) {
                Some(kind) => {
                    if let Err((reply, failure)) = self.write(kind, frame, reply) {
                        reply.failed(&failure);
                    }
                }
                None => self.other(frame, reply).await,
            }
            if self.conn.outbox.bytes() > OUTBOX_BYTES_SOFT {
                self.send_writes().await;
                self.conn.outbox.drained_to(OUTBOX_BYTES_SOFT / 2).await;
            }
        }
        self.send_writes().await;
        self.conn.eased_to(CREDIT_REQUESTS - 1).await;
    }

    /// Looks at the rows in memory that many gets are about to read: one after the other each would wait for memory.
    fn warm(&self, frames: &[Frame]) {
        let gets = frames.iter().filter(|frame| frame.header.kind == Kind::Get);
        let key = |frame| codec::decode_borrowed::<Get<'_>>(frame).ok().map(|get| get.key);
        let keys = gets.filter_map(|frame: &Frame| Some((frame.header.shard, key(&frame.head)?)));
        let mut keys: SmallVec<[(ShardId, &[u8]); WARMED]> = keys.collect();
        if keys.len() < WARMED_MIN {
            return;
        }
        keys.sort_unstable_by_key(|(shard, _)| *shard);
        for of_shard in keys.chunk_by(|(one, _), (other, _)| one == other) {
            if let Some(cell) = self.shared.cell(of_shard[0].0) {
                cell.view.read().active.warm(of_shard.iter().map(|(_, key)| *key));
            }
        }
    }

    async fn send_writes(&mut self) {
        for (owner, writes) in self.writes.iter_mut().enumerate() {
            if !writes.is_empty() {
                self.shared.mail(owner, Mail::Writes(std::mem::take(writes))).await;
            }
        }
    }

    fn write(&mut self, kind: WriteKind, frame: Frame, reply: Reply) -> Result<(), (Reply, Failure)> {
        let epoch = self.shared.epoch();
        let Some(cell) = self.shared.cell(frame.header.shard) else {
            return Err((reply, Failure::WrongShard { epoch }));
        };
        if self.shared.space.is_full() && kind.takes_room() {
            return Err((reply, disk_full()));
        }
        if matches!(kind, WriteKind::Prepare | WriteKind::Finish) && !matches!(self.peer.role, Role::Node(_)) {
            return Err((reply, self.not_allowed(frame.header.kind)));
        }
        let holds = |keyspace, key: &[u8]| cell.holds(keyspace, key, epoch);
        match machine::check(kind, &frame.head, &frame.tail, holds) {
            Ok(Reach::Here) => {}
            Ok(Reach::Several) => {
                tokio::spawn(txn::run(self.shared.clone(), cell, frame, reply));
                return Ok(());
            }
            Err(failure) => return Err((reply, failure)),
        }
        if kind == WriteKind::Prepare {
            crash_at(Step::PrepareCame);
        }
        let deadline = self.shared.clock.now() + time_of(&frame).as_nanos() as u64;
        let job = WriteJob { kind, head: frame.head, tail: frame.tail, waiter: Waiter::away(reply.late(), deadline) };
        let owner = self.shared.owner_of(cell.shard);
        if self.writes.len() <= owner {
            self.writes.resize_with(owner + 1, Vec::new);
        }
        self.writes[owner].push((cell.shard, job));
        Ok(())
    }

    fn raft(&self, frame: &Frame) {
        let Role::Node(from) = self.peer.role else { return };
        let messages: Vec<RaftMessage> = match codec::decode(&frame.head) {
            Ok(messages) => messages,
            Err(error) => return tracing::warn!("Raft messages that cannot be read: {error}"),
        };
        let mut tail = frame.tail.clone();
        let mut by_owner: Vec<Vec<(RaftMessage, Vec<Bytes>)>> = Vec::new();
        for message in messages {
            let mut data = Vec::with_capacity(message.entries.len());
            for entry in &message.entries {
                if entry.data_bytes as usize > tail.len() {
                    return tracing::warn!("Raft messages whose entries are longer than their frame");
                }
                let bytes = tail.split_to(entry.data_bytes as usize);
                // The log keeps entries for a while; a small one must not keep the whole read buffer with it.
                data.push(if bytes.len() < SHARE_BYTES_MIN { Bytes::copy_from_slice(&bytes) } else { bytes });
            }
            let owner = self.shared.owner_of(message.shard);
            if by_owner.len() <= owner {
                by_owner.resize_with(owner + 1, Vec::new);
            }
            by_owner[owner].push((message, data));
        }
        for (owner, messages) in by_owner.into_iter().enumerate() {
            if !messages.is_empty() {
                self.shared.try_mail(owner, Mail::Raft(from, messages)); // what is dropped is sent again
            }
        }
    }

    async fn other(&mut self, frame: Frame, reply: Reply) {
        let shared = &self.shared;
        let is_member = matches!(self.peer.role, Role::Node(_) | Role::Balancer);
        match frame.header.kind {
            Kind::Get => get(shared, &frame, reply, &mut self.value),
            Kind::Scan => {
                let (shard, deadline) = (frame.header.shard, deadline_of(&frame));
                let Some((scan, reply)) = head_of::<Scan>(&frame, reply) else { return };
                if scan.with.is_empty() {
                    tokio::spawn(scan::scan(shared.clone(), shard, scan, deadline, reply));
                } else {
                    scan::merged_scan(shared, shard, &scan, reply);
                    tokio::task::yield_now().await; // the others of the thread do not wait for a whole batch of them
                }
            }
            Kind::Count => drop(tokio::spawn(scan::count(shared.clone(), frame, reply))),
            Kind::Map => reply.result(
                shared
                    .routes()
                    .map(|routes| MapDone { leaders: leaders(shared, routes.map()), map: routes.map().clone() })
                    .ok_or_else(|| Failure::Busy {
                        retry_after_ms: 100,
                        text: "no balancer has sent the map yet".into(),
                    }),
            ),
            Kind::Status => {
                let shared = shared.clone();
                tokio::spawn(async move {
                    let status = shared.status().await;
                    let map = shared.routes().map(|routes| routes.map().clone());
                    let process = (status.process, status.cpu_us);
                    reply.done(&StatusDone { map, process, nodes: vec![(status.id, Ok(status))], control: None });
                });
            }
            Kind::Beat if is_member => admin::beat(shared.clone(), &self.peer, &frame, reply),
            Kind::CreateReplica if is_member => admin::create(shared.clone(), &frame, reply),
            Kind::TransferLeader if is_member => admin::transfer(shared.clone(), &frame, reply),
            Kind::ChangeReplicas if is_member => admin::change(shared.clone(), &frame, reply),
            Kind::RemoveReplica if is_member => admin::remove(shared.clone(), &frame, reply),
            Kind::SnapshotBegin | Kind::SnapshotChunk | Kind::SnapshotEnd => {
                let Role::Node(from) = self.peer.role else {
                    return reply.failed(&self.not_allowed(frame.header.kind));
                };
                let result = crate::snapshot::take(shared, from, &mut self.incoming, frame).await;
                if result.is_err() {
                    self.incoming = None;
                }
                reply.result(result);
            }
            Kind::Resolve if matches!(self.peer.role, Role::Node(_)) => {
                let Some((resolve, reply)) = head_of::<Resolve>(&frame, reply) else { return };
                reply.result(resolve::answer(shared, resolve.txn));
            }
            kind => reply.failed(&self.not_allowed(kind)),
        }
    }

    fn not_allowed(&self, kind: Kind) -> Failure {
        let text = format!("a {:?} may not send {kind:?} to a node", self.peer.role);
        Failure::refusal(RefusalCode::NotAllowed, text)
    }
}

fn leaders(shared: &Shared, map: &shkv_proto::Map) -> Vec<(ShardId, shkv_proto::NodeId)> {
    map.shards.iter().filter_map(|shard| Some((shard.id, shared.cell(shard.id)?.leader()?))).collect()
}

fn get(shared: &Arc<Shared>, frame: &Frame, reply: Reply, small: &mut Vec<u8>) {
    let head: Get<'_> = match codec::decode_borrowed(&frame.head) {
        Ok(head) => head,
        Err(error) => return reply.failed(&Failure::malformed(&error)),
    };
    let epoch = shared.epoch();
    let Some(cell) = shared.cell(frame.header.shard) else { return reply.failed(&Failure::WrongShard { epoch }) };
    if let Err(failure) = cell.holds(head.keyspace, head.key, epoch) {
        return reply.failed(&failure);
    }
    let consistency = head.consistency;
    if consistency != Consistency::Linearizable
        && let Err(failure) = cell.answers_stale_reads()
    {
        return reply.failed(&failure);
    }
    small.clear();
    let term = cell.term();
    match cell.get_into(head.key, small) {
        Err(error) => reply.failed(&read_failed(&error)),
        Ok(look)
            if may_answer(shared, &cell, consistency, term, look.revision)
                && (!look.is_locked || consistency != Consistency::Linearizable) =>
        {
            #[cfg(feature = "sim")]
            crate::inspect::served_read(&cell, consistency, crate::inspect::moment());
            let Look { found, revision, .. } = look;
            let (version, whole) = found.map_or((None, None), |(version, whole)| (Some(version), whole));
            let done = GetDone { version, revision, consistency };
            match whole {
                Some(value) => reply.done_with(&done, value),
                None => reply.done_copied(&done, small),
            }
        }
        Ok(Look { revision, .. }) if consistency != Consistency::Linearizable => {
            reply.failed(&Failure::Behind { revision });
        }
        Ok(_) => {
            let key = frame.head.slice_ref(head.key);
            let shared = shared.clone();
            let deadline = deadline_of(frame);
            tokio::spawn(async move {
                let look = || std::future::ready(cell.get(&key).map_err(|error| read_failed(&error)));
                match fresh(&shared, &cell, deadline, look, |look| look.is_locked).await {
                    Ok(look) => answer(reply, look, consistency),
                    Err(failure) => reply.failed(&failure),
                }
            });
        }
    }
}

/// Whether what was just read at `revision`, when [`Cell::term`] had told `term`, is as fresh as asked for.
pub fn may_answer(shared: &Shared, cell: &Cell, consistency: Consistency, term: Option<u64>, revision: u64) -> bool {
    match consistency {
        #[cfg(feature = "sim")]
        Consistency::Linearizable if crate::inspect::planted(crate::inspect::Bug::DeposedLeaderReads) => {
            cell.leader() == Some(shared.identity.id())
        }
        Consistency::Linearizable => cell.is_fresh(term, shared.clock.now()),
        Consistency::Causal { revision: seen } => revision >= seen,
        Consistency::Eventual => true,
    }
}

/// Waits until a read of a shard that begins now may look at the rows.
///
/// # Errors
/// [`Failure::NotLeader`] and its like.
pub async fn barrier(shared: &Shared, shard: ShardId) -> Result<(), Failure> {
    let (passed, waiting) = oneshot::channel();
    shared.mail(shared.owner_of(shard), Mail::Read(shard, passed)).await;
    waiting.await.unwrap_or_else(|_| Err(Failure::Busy { retry_after_ms: 50, text: "the node is stopping".into() }))
}

/// Looks at rows until the look is linearizable and meets no lock.
///
/// # Errors
/// The look's; [`Failure::NotLeader`] and its like; [`Failure::Busy`] at the deadline.
pub async fn fresh<T, F: Future<Output = Result<T, Failure>>>(
    shared: &Shared,
    cell: &Cell,
    deadline: Instant,
    mut look: impl FnMut() -> F,
    is_locked: impl Fn(&T) -> bool,
) -> Result<T, Failure> {
    loop {
        let mut unlocked = pin!(cell.unlocked.notified());
        unlocked.as_mut().enable(); // a lock that is let go behind the look is not missed
        #[cfg(feature = "sim")]
        let began = crate::inspect::moment();
        let term = cell.term();
        let mut seen = look().await?;
        if !cell.is_fresh(term, shared.clock.now()) {
            barrier(shared, cell.shard).await?;
            seen = look().await?;
        }
        if !is_locked(&seen) {
            #[cfg(feature = "sim")]
            crate::inspect::served_read(cell, Consistency::Linearizable, began);
            return Ok(seen);
        }
        if Instant::now() >= deadline {
            let text = "a transaction held a key until the deadline".into();
            return Err(Failure::Busy { retry_after_ms: 50, text });
        }
        cell.want_lock();
        let until = deadline.min(Instant::now() + LOCK_LOOK_EVERY);
        let _ = tokio::time::timeout_at(until, unlocked).await; // either way it is looked at again
    }
}

/// Until when the sender of a request that has just come waits.
pub fn deadline_of(frame: &Frame) -> Instant {
    Instant::now() + time_of(frame)
}

/// How long the sender of a request waits.
pub fn time_of(frame: &Frame) -> Duration {
    match frame.header.deadline_ms {
        0 => DEADLINE_DEFAULT,
        ms => Duration::from_millis(u64::from(ms)),
    }
}

fn answer(reply: Reply, Look { found, revision, .. }: Look, consistency: Consistency) {
    let (version, value) = found.map_or((None, Bytes::new()), |(version, value)| (Some(version), value));
    reply.done_with(&GetDone { version, revision, consistency }, value);
}

/// Decodes a head, or answers that it cannot.
pub fn head_of<T: serde::de::DeserializeOwned>(frame: &Frame, reply: Reply) -> Option<(T, Reply)> {
    match codec::decode(&frame.head) {
        Ok(head) => Some((head, reply)),
        Err(error) => {
            let error: CodecError = error;
            reply.failed(&Failure::malformed(&error));
            None
        }
    }
}
