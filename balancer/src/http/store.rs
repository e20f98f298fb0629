//! The front end's access to rows: the same way that a native client's requests go, without a socket in between.
//!
//! Every write carries an id of this process, so that one whose answer was lost is asked again and done once.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits and draws an id")]

use crate::cluster::Cluster;
use crate::control;
use crate::forward::{self, Request, Way, unknown_keyspace};
use crate::scan::{self, Whole};
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use rand::RngExt;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::map::Part;
use shkv_proto::merge::{self, Row};
use shkv_proto::message::{
    Admin, AdminDone, Batch, BatchDone, BatchOp, Condition, Consistency, Failure, Get, GetDone, NewShard, RefusalCode,
    Scan, Write, WriteDone, WriteId,
};
use shkv_proto::route::Routes;
use shkv_proto::{Epoch, Frame, Header, KeyspaceId, Kind, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// Pause before a request is sent again that was aborted, or whose outcome is unknown.
const PAUSE_MS: std::ops::Range<u64> = 5..60;
/// Most attempts at one request by the front end; each has attempts of its own below.
const TRIES_MAX: u32 = 50;

/// Rows, by keyspace.
#[derive(Clone, Debug)]
pub(crate) struct Store {
    cluster: Arc<Cluster>,
    writer: Arc<Writer>,
}

/// How long whoever asks waits, and how fresh what is read must be.
#[derive(Clone, Debug)]
pub(crate) struct Ask {
    /// When it gives up.
    pub(crate) deadline: Instant,
    /// How fresh a read must be. The revision of a causal one is filled in from `seen`.
    pub(crate) consistency: Consistency,
    /// What it has seen of each shard.
    pub(crate) seen: BTreeMap<ShardId, u64>,
}

impl Ask {
    /// Linearizable, for so long from now.
    pub(crate) fn within(time: Duration) -> Self {
        Self { deadline: Instant::now() + time, consistency: Consistency::Linearizable, seen: BTreeMap::new() }
    }

    /// How fresh a read of this shard must be.
    fn of(&self, shard: ShardId) -> Consistency {
        match self.consistency {
            Consistency::Causal { revision } => {
                Consistency::Causal { revision: revision.max(self.seen.get(&shard).copied().unwrap_or(0)) }
            }
            other => other,
        }
    }
}

/// What must hold of a row before anything is written; as [`Condition`], with a value of its own.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub(crate) enum If {
    /// Whatever there is.
    #[default]
    Always,
    /// There is no row.
    Absent,
    /// There is a row.
    Present,
    /// There is a row of this version.
    Version(u64),
    /// There is a row of this value.
    Value(Bytes),
}

impl If {
    fn borrowed(&self) -> Condition<'_> {
        match self {
            Self::Always => Condition::Always,
            Self::Absent => Condition::Absent,
            Self::Present => Condition::Present,
            Self::Version(version) => Condition::Version(*version),
            Self::Value(value) => Condition::Value(value),
        }
    }
}

/// An operation of a batch. Each has a key of its own.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Op {
    /// Write a row.
    Put { key: Bytes, value: Bytes, condition: If },
    /// Remove a row.
    Delete { key: Bytes, condition: If },
    /// Only look: the batch is done if this holds, too.
    Check { key: Bytes, condition: If },
    /// Tell the row as it is before the batch.
    Read { key: Bytes },
}

impl Op {
    /// The key.
    pub(crate) fn key(&self) -> &Bytes {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } | Self::Check { key, .. } | Self::Read { key } => key,
        }
    }

    fn borrowed(&self) -> BatchOp<'_> {
        match self {
            Self::Put { key, value, condition } => {
                BatchOp::Put { key, value_bytes: value.len() as u32, condition: condition.borrowed() }
            }
            Self::Delete { key, condition } => BatchOp::Delete { key, condition: condition.borrowed() },
            Self::Check { key, condition } => BatchOp::Check { key, condition: condition.borrowed() },
            Self::Read { key } => BatchOp::Read { key },
        }
    }
}

/// A row that was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Found {
    /// Its version.
    pub(crate) version: u64,
    /// Its value.
    pub(crate) value: Bytes,
}

/// What became of a read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct GetOutcome {
    /// The row, if there is one.
    pub(crate) row: Option<Found>,
    /// The shard that was asked.
    pub(crate) shard: ShardId,
    /// Its revision.
    pub(crate) revision: u64,
}

/// What became of a put or a delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct WriteOutcome {
    /// The shard that it was done at.
    pub(crate) shard: ShardId,
    /// Its revision after it: the row's version.
    pub(crate) revision: u64,
    /// Rows that a delete found and removed.
    pub(crate) removed: u32,
}

/// What became of a batch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct BatchOutcome {
    /// Rows that its deletes found and removed.
    pub(crate) removed: u32,
    /// Each shard that it touched, with the revision after it.
    pub(crate) revisions: Vec<(ShardId, u64)>,
    /// What each read found, in their order.
    pub(crate) rows: Vec<Option<Found>>,
}

/// One page of a scan.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Page {
    /// The rows in order.
    pub(crate) rows: Vec<Row>,
    /// Where the next page begins, if there is one.
    pub(crate) next: Option<Vec<u8>>,
}

impl Store {
    /// The rows of a cluster.
    pub(crate) fn new(cluster: Arc<Cluster>) -> Self {
        let client = rand::rng().random_range(1..=u64::MAX);
        Self { cluster, writer: Arc::new(Writer { client, state: Mutex::default(), lane: AtomicUsize::new(0) }) }
    }

    /// The cluster.
    pub(crate) fn cluster(&self) -> &Arc<Cluster> {
        &self.cluster
    }

    /// The map as it is known now.
    pub(crate) fn routes(&self) -> Arc<Routes> {
        self.cluster.routes()
    }

    /// The keyspace of a name.
    ///
    /// # Errors
    /// That there is none, or no map yet.
    pub(crate) fn keyspace(&self, name: &str) -> Result<KeyspaceId, Failure> {
        let find = |routes: &Routes| {
            let found = routes.map().keyspace(name).map(|keyspace| keyspace.id);
            (routes.map().epoch != Epoch::NONE).then_some(found)
        };
        self.cluster.look(find).ok_or_else(|| self.no_map())?.ok_or_else(|| {
            let text = format!("there is no keyspace {name:?}; it must be made first");
            Failure::refusal(RefusalCode::UnknownKeyspace, text)
        })
    }

    fn with_map(&self) -> Result<Arc<Routes>, Failure> {
        let routes = self.routes();
        if routes.map().epoch == Epoch::NONE { Err(self.no_map()) } else { Ok(routes) }
    }

    fn no_map(&self) -> Failure {
        let trouble = self.cluster.trouble().unwrap_or_else(|| "it is being read".into());
        Failure::Busy { retry_after_ms: 100, text: format!("there is no shard map yet: {trouble}") }
    }

    /// The keyspace of a name, made now if there is none: cut by hash into so many shards.
    ///
    /// # Errors
    /// What the cluster says against it.
    pub(crate) async fn ensure_hashed(&self, name: &str, shards: u32, replicas: u32) -> Result<KeyspaceId, Failure> {
        let parts = || Part::hash_split(shards).into_iter().map(|part| NewShard { part, pinned: vec![] }).collect();
        self.ensure_keyspace(name, parts, replicas).await
    }

    /// The keyspace of a name, made now of these shards if there is none.
    ///
    /// # Errors
    /// What the cluster says against it.
    pub(crate) async fn ensure_keyspace(
        &self,
        name: &str,
        shards: impl FnOnce() -> Vec<NewShard>,
        replicas: u32,
    ) -> Result<KeyspaceId, Failure> {
        match self.keyspace(name) {
            Err(Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }) => {}
            known => return known,
        }
        match self.admin(Admin::CreateKeyspace { name: name.to_owned(), replicas, shards: shards() }).await {
            Ok(_) | Err(Failure::Refusal { code: RefusalCode::Exists, .. }) => self.keyspace(name),
            Err(failure) => Err(failure),
        }
    }

    /// Writes a wish into the map.
    ///
    /// # Errors
    /// What the cluster says against it.
    pub(crate) async fn admin(&self, wish: Admin) -> Result<AdminDone, Failure> {
        self.with_map()?;
        Box::pin(control::admin(&self.cluster, wish)).await
    }

    /// Reads one row.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn get(&self, keyspace: KeyspaceId, key: &[u8], ask: &Ask) -> Result<GetOutcome, Failure> {
        let routes = self.with_map()?;
        let shard = routes.shard_of(keyspace, key).ok_or_else(|| unknown_keyspace(keyspace))?.id;
        let consistency = ask.of(shard);
        let head = codec::encode(&Get { keyspace, key, consistency }).map_err(|error| Failure::malformed(&error))?;
        let frame = Frame::new(Header::new(Kind::Get), head, Bytes::new());
        let answer = self.carry(&routes, frame, Way::Key, consistency, false, ask.deadline).await?;
        let done: GetDone = codec::decode(&answer.head).map_err(garbled)?;
        let row = done.version.map(|version| Found { version, value: answer.tail });
        Ok(GetOutcome { row, shard, revision: done.revision })
    }

    /// Writes one row.
    ///
    /// # Errors
    /// [`Failure`]; a condition that does not hold is [`Failure::Condition`].
    pub(crate) async fn put(
        &self,
        keyspace: KeyspaceId,
        key: &[u8],
        value: Bytes,
        condition: Condition<'_>,
        ask: &Ask,
    ) -> Result<WriteOutcome, Failure> {
        self.write(Kind::Put, keyspace, key, value, condition, ask).await
    }

    /// Removes one row.
    ///
    /// # Errors
    /// [`Failure`]; a condition that does not hold is [`Failure::Condition`].
    pub(crate) async fn delete(
        &self,
        keyspace: KeyspaceId,
        key: &[u8],
        condition: Condition<'_>,
        ask: &Ask,
    ) -> Result<WriteOutcome, Failure> {
        self.write(Kind::Delete, keyspace, key, Bytes::new(), condition, ask).await
    }

    async fn write(
        &self,
        kind: Kind,
        keyspace: KeyspaceId,
        key: &[u8],
        value: Bytes,
        condition: Condition<'_>,
        ask: &Ask,
    ) -> Result<WriteOutcome, Failure> {
        let make = |routes: &Routes, id| {
            let shard = routes.shard_of(keyspace, key).ok_or_else(|| unknown_keyspace(keyspace))?.id;
            let write = Write { keyspace, key, condition, id: Some(id) };
            let head = codec::encode(&write).map_err(|error| Failure::malformed(&error))?;
            Ok((Frame::new(Header::new(kind), head, value.clone()), Way::Key, shard))
        };
        let (answer, shard) = self.written(make, ask.deadline).await?;
        let done: WriteDone = codec::decode(&answer.head).map_err(unread)?;
        Ok(WriteOutcome { shard, revision: done.revision, removed: done.removed })
    }

    /// Does all operations in one step, or none of them, over as many shards as they touch.
    ///
    /// # Errors
    /// [`Failure`]; a condition that does not hold is [`Failure::Condition`] with the operation's position.
    pub(crate) async fn batch(&self, keyspace: KeyspaceId, ops: &[Op], ask: &Ask) -> Result<BatchOutcome, Failure> {
        let tail = values_of(ops);
        let make = |routes: &Routes, id| {
            let mut lowest = None;
            for op in ops {
                let shard = routes.shard_of(keyspace, op.key()).ok_or_else(|| unknown_keyspace(keyspace))?.id;
                lowest = Some(lowest.map_or(shard, |lowest: ShardId| lowest.min(shard)));
            }
            let shard = lowest
                .ok_or_else(|| Failure::refusal(RefusalCode::BatchLimits, "a batch needs at least one operation"))?;
            let batch = Batch { keyspace, ops: ops.iter().map(Op::borrowed).collect(), id: Some(id) };
            let head = codec::encode(&batch).map_err(|error| {
                Failure::refusal(RefusalCode::BatchLimits, format!("the batch is too large: {error}"))
            })?;
            Ok((Frame::new(Header::new(Kind::Batch), head, tail.clone()), Way::Shard(shard), shard))
        };
        let (answer, _) = self.written(make, ask.deadline).await?;
        let done: BatchDone = codec::decode(&answer.head).map_err(unread)?;
        let mut tail = answer.tail;
        let mut rows = Vec::with_capacity(done.rows.len());
        for row in done.rows {
            rows.push(match row {
                None => None,
                Some(row) if row.value_bytes as usize > tail.len() => {
                    return Err(Failure::unknown("the batch was done, and the rows that it read are cut short"));
                }
                Some(row) => Some(Found { version: row.version, value: tail.split_to(row.value_bytes as usize) }),
            });
        }
        Ok(BatchOutcome { removed: done.removed, revisions: done.revisions, rows })
    }

    /// Sends a write until it is known what became of it, under one id.
    async fn written(
        &self,
        make: impl Fn(&Routes, WriteId) -> Result<(Frame, Way, ShardId), Failure>,
        deadline: Instant,
    ) -> Result<(Frame, ShardId), Failure> {
        let ticket = self.writer.begin();
        for _ in 1..TRIES_MAX {
            let routes = self.with_map()?;
            let (frame, way, shard) = make(&routes, ticket.id())?;
            let failure = match self.carry(&routes, frame, way, Consistency::Linearizable, true, deadline).await {
                Ok(answer) => return Ok((answer, shard)),
                Err(failure) => failure,
            };
            let again =
                matches!(failure, Failure::Unknown { .. } | Failure::Aborted { .. } | Failure::WrongShard { .. });
            let pause = Duration::from_millis(rand::rng().random_range(PAUSE_MS));
            if !again || Instant::now() + pause >= deadline {
                return Err(failure);
            }
            tokio::time::sleep(pause).await;
        }
        Err(Failure::unknown("given up after many attempts"))
    }

    /// Reads one page of a scan, of one shard or of the whole keyspace.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn scan(&self, scan: &Scan, shard: Option<ShardId>, ask: &Ask) -> Result<Page, Failure> {
        let routes = self.with_map()?;
        let mut scan = scan.clone();
        let shards = match shard {
            Some(shard) => vec![shard],
            None => scan::shards_of(routes.map(), &scan),
        };
        let header = Header::new(Kind::Scan);
        let answer = match shards[..] {
            [] if routes.map().shards_of(scan.keyspace).next().is_none() => {
                return Err(unknown_keyspace(scan.keyspace));
            }
            [only] => {
                scan.consistency = ask.of(only);
                let head = codec::encode(&scan).map_err(|error| Failure::malformed(&error))?;
                let frame = Frame::new(header, head, Bytes::new());
                self.carry(&routes, frame, Way::Shard(only), scan.consistency, false, ask.deadline).await?
            }
            _ => {
                scan.consistency = ask.consistency;
                let whole = Whole { header, scan, deadline: ask.deadline, lane: self.lane() };
                Box::pin(scan::over_all(&self.cluster, whole, shards)).await?
            }
        };
        let merge::Page { rows, next, .. } = merge::Page::decode(&answer.head, answer.tail).map_err(garbled)?;
        Ok(Page { rows, next })
    }

    async fn carry(
        &self,
        routes: &Routes,
        frame: Frame,
        way: Way,
        consistency: Consistency,
        write: bool,
        deadline: Instant,
    ) -> Result<Frame, Failure> {
        let (kind, lane) = (frame.header.kind, self.lane());
        let begun = Instant::now();
        let request = Request { frame, way, consistency, write, own: false, begun, deadline, lane };
        let result = forward::carry(&self.cluster, routes, request).await;
        self.cluster.metrics.count(kind, result.as_ref().err());
        result
    }

    fn lane(&self) -> usize {
        self.writer.lane.fetch_add(1, Ordering::Relaxed)
    }
}

/// The values of all puts, one behind the other.
fn values_of(ops: &[Op]) -> Bytes {
    let mut values = ops.iter().filter_map(|op| match op {
        Op::Put { value, .. } => Some(value),
        _ => None,
    });
    match (values.next(), values.next()) {
        (None, _) => Bytes::new(),
        (Some(only), None) => only.clone(),
        (Some(first), Some(second)) => {
            let mut tail = BytesMut::from(&first[..]);
            tail.extend_from_slice(second);
            values.for_each(|value| tail.extend_from_slice(value));
            tail.freeze()
        }
    }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err asks for")]
fn garbled(error: CodecError) -> Failure {
    Failure::Busy { retry_after_ms: 0, text: format!("a node's answer cannot be read: {error}") }
}

#[expect(clippy::needless_pass_by_value, reason = "the form that map_err asks for")]
fn unread(error: CodecError) -> Failure {
    Failure::unknown(format!("it was done, and the node's answer cannot be read: {error}"))
}

/// Gives the writes of this process their ids.
#[derive(Debug)]
struct Writer {
    client: u64,
    state: Mutex<Sequence>,
    lane: AtomicUsize,
}

/// Sequences that were given, and those of them whose outcome is not yet known.
#[derive(Debug, Default)]
struct Sequence {
    last: u64,
    open: BTreeSet<u64>,
}

/// A write that is under way; dropping it says that nobody will ask for it again.
#[derive(Debug)]
struct Ticket {
    writer: Arc<Writer>,
    sequence: u64,
    begun: Instant,
}

impl Writer {
    fn begin(self: &Arc<Self>) -> Ticket {
        let sequence = {
            let mut state = self.state.lock();
            state.last += 1;
            let last = state.last;
            state.open.insert(last);
            last
        };
        Ticket { writer: self.clone(), sequence, begun: Instant::now() }
    }
}

impl Ticket {
    /// The id as it is sent now.
    fn id(&self) -> WriteId {
        let answered = {
            let state = self.writer.state.lock();
            state.open.first().map_or(state.last, |first| first - 1)
        };
        let age_ms = u32::try_from(self.begun.elapsed().as_millis()).unwrap_or(u32::MAX);
        WriteId { client: self.writer.client, sequence: self.sequence, answered, age_ms }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        self.writer.state.lock().open.remove(&self.sequence);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_write_is_answered_only_when_all_before_it_are() {
        let writer = Arc::new(Writer { client: 1, state: Mutex::default(), lane: AtomicUsize::new(0) });
        let (first, second) = (writer.begin(), writer.begin());
        assert_eq!((first.id().sequence, second.id().sequence), (1, 2));
        drop(second);
        assert_eq!(writer.begin().id().answered, 0);
        drop(first);
        let id = writer.begin().id();
        assert_eq!((id.sequence, id.answered), (4, 3));
    }
}
