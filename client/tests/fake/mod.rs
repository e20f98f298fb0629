//! A cluster that is a `BTreeMap` behind real sockets: enough of node and balancer to try the client's ways.

#![expect(clippy::disallowed_methods, clippy::unwrap_used, reason = "a test server starts tasks, and may panic")]

use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use serde::Serialize;
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Kind};
use shkv_proto::ids::{ClusterId, Epoch, KeyspaceId, NodeId, ShardId};
use shkv_proto::limits::Limits;
use shkv_proto::map::{KeyspaceInfo, Map, NodeInfo, Part, ShardInfo};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Condition, Consistency, CountDone, Failure, Get, GetDone, MapDone, Role, RowHead,
    RowRead, Scan, ScanDone, Welcome, Write, WriteDone, WriteId,
};
use shkv_proto::outbox::Outbox;
use shkv_proto::session::{Session, accept};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

const KEYSPACE: KeyspaceId = KeyspaceId(1);

type Answer = Result<(Vec<u8>, Bytes), Failure>;

/// The state of the whole fake cluster.
pub struct Fake {
    pub map: Mutex<Map>,
    rows: Mutex<BTreeMap<Vec<u8>, (u64, Bytes)>>,
    revision: Mutex<u64>,
    /// Writes that came in, by way of nodes and by way of the balancer.
    pub writes_at_nodes: AtomicU32,
    pub writes_at_balancer: AtomicU32,
    pub requests: AtomicU32,
    /// Take as many of the next writes, do them, and close the connection without an answer.
    pub lose_answers: AtomicU32,
    /// Answer as many of the next writes that they met a lock.
    pub abort_next: AtomicU32,
    /// Merge no pages of several shards.
    pub apart: AtomicBool,
    /// Pages of several shards that were merged.
    pub merged: AtomicU32,
    /// The ids of all writes that came, in their order.
    pub ids: Mutex<Vec<WriteId>>,
    outcomes: Mutex<BTreeMap<(u64, u64), Answer>>,
    /// Sent to, it ends all listeners and connections.
    pub close: watch::Sender<()>,
    /// The revision that the last causal read asked for.
    pub causal_revision: Mutex<Option<u64>>,
}

impl Fake {
    /// A cluster of one node and a balancer; gives the balancer's address.
    pub async fn start(shards: u32, node_is_up: bool) -> (Arc<Self>, String) {
        let node = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let balancer = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let map = Map {
            epoch: Epoch(1),
            nodes: vec![NodeInfo::new(NodeId(1), "Server0", node.local_addr().unwrap().to_string())],
            keyspaces: vec![KeyspaceInfo { id: KEYSPACE, name: "default".into(), replicas: 1 }],
            shards: Part::hash_split(shards)
                .into_iter()
                .zip(1..)
                .map(|(part, n)| ShardInfo::founded(ShardId(n), KEYSPACE, part, &[NodeId(1)]))
                .collect(),
            next_shard: ShardId(shards + 1),
            next_keyspace: KeyspaceId(KEYSPACE.0 + 1),
            ..Map::empty(ClusterId(7))
        };
        let fake = Arc::new(Self {
            map: Mutex::new(map),
            rows: Mutex::default(),
            revision: Mutex::default(),
            writes_at_nodes: AtomicU32::new(0),
            writes_at_balancer: AtomicU32::new(0),
            requests: AtomicU32::new(0),
            lose_answers: AtomicU32::new(0),
            abort_next: AtomicU32::new(0),
            apart: AtomicBool::new(false),
            merged: AtomicU32::new(0),
            ids: Mutex::default(),
            outcomes: Mutex::default(),
            close: watch::Sender::new(()),
            causal_revision: Mutex::new(None),
        });
        let addr = balancer.local_addr().unwrap().to_string();
        tokio::spawn(fake.clone().listen(balancer, Role::Balancer));
        if node_is_up {
            tokio::spawn(fake.clone().listen(node, Role::Node(NodeId(1))));
        }
        (fake, addr)
    }

    async fn listen(self: Arc<Self>, listener: TcpListener, role: Role) {
        let mut closed = self.close.subscribe();
        loop {
            tokio::select! {
                accepted = listener.accept() => match accepted {
                    Ok((stream, _)) => drop(tokio::spawn(self.clone().serve(stream, role))),
                    Err(_) => return,
                },
                _ = closed.changed() => return,
            }
        }
    }

    async fn serve(self: Arc<Self>, stream: TcpStream, role: Role) {
        let welcome = Welcome {
            version: 1,
            cluster: Some(self.map.lock().cluster),
            role,
            name: "fake".into(),
            limits: Limits::OURS,
        };
        let accepted = accept(stream, |hello| {
            hello.check_cluster(welcome.cluster)?;
            Ok(welcome)
        });
        let Ok(Session { mut reader, mut writer, .. }) = accepted.await else { return };
        let outbox = Arc::new(Outbox::default());
        let writing = outbox.clone();
        tokio::spawn(async move { writing.write_to(&mut writer).await });
        let mut frames = Vec::new();
        let mut closed = self.close.subscribe();
        loop {
            tokio::select! {
                read = reader.next_batch(&mut frames) => if !matches!(read, Ok(true)) { break },
                _ = closed.changed() => break,
            }
            for frame in frames.drain(..) {
                self.requests.fetch_add(1, Ordering::SeqCst);
                let write = matches!(frame.header.kind, Kind::Put | Kind::Delete | Kind::Batch);
                if write {
                    let counter = if role == Role::Balancer { &self.writes_at_balancer } else { &self.writes_at_nodes };
                    counter.fetch_add(1, Ordering::SeqCst);
                }
                let answer = self.answer(&frame);
                let lose = |left: u32| left.checked_sub(1);
                if write && self.lose_answers.fetch_update(Ordering::SeqCst, Ordering::SeqCst, lose).is_ok() {
                    outbox.close();
                    return;
                }
                let (kind, head, tail) = match answer {
                    Ok((head, tail)) => (Kind::Done, head, tail),
                    Err(failure) => (Kind::Failed, codec::encode(&failure).unwrap(), Bytes::new()),
                };
                outbox.push(&Frame::new(frame.header.answer(kind), head, tail));
            }
        }
        outbox.close();
    }

    fn answer(&self, frame: &Frame) -> Answer {
        let encode = |head: &dyn Fn() -> Vec<u8>| Ok((head(), Bytes::new()));
        match frame.header.kind {
            Kind::Map => {
                let done = MapDone { map: self.map.lock().clone(), leaders: vec![] };
                encode(&|| codec::encode(&done).unwrap())
            }
            Kind::Get => {
                let get: Get<'_> = codec::decode_borrowed(&frame.head).unwrap();
                if let Consistency::Causal { revision } = get.consistency {
                    *self.causal_revision.lock() = Some(revision);
                }
                let row = self.rows.lock().get(get.key).cloned();
                let done = GetDone {
                    version: row.as_ref().map(|(version, _)| *version),
                    revision: *self.revision.lock(),
                    consistency: get.consistency,
                };
                Ok((encoded(&done), row.map(|(_, value)| value).unwrap_or_default()))
            }
            Kind::Put | Kind::Delete => self.one(frame),
            Kind::Batch => self.batch(frame),
            Kind::Scan => self.scan(frame),
            Kind::Count => {
                let scan: Scan = codec::decode(&frame.head).unwrap();
                let rows = self.matching(&scan, frame.header.shard).len() as u64;
                Ok((encoded(&CountDone { rows, next: None }), Bytes::new()))
            }
            other => panic!("the fake does not know {other:?}"),
        }
    }

    /// What became of a write of this id, which is done now if it has not come before.
    fn once(&self, id: Option<WriteId>, work: impl FnOnce() -> Answer) -> Answer {
        let id = id.expect("the client gives every write an id");
        self.ids.lock().push(id);
        if self.abort_next.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok() {
            return Err(Failure::Aborted { text: "a lock is in the way".into() });
        }
        assert!(id.answered < id.sequence && id.client != 0);
        let mut outcomes = self.outcomes.lock();
        outcomes.retain(|(client, sequence), _| *client != id.client || *sequence > id.answered);
        outcomes.entry((id.client, id.sequence)).or_insert_with(work).clone()
    }

    fn refuse(&self, ops: &[BatchOp<'_>]) -> Result<(), Failure> {
        let rows = self.rows.lock();
        for (op, operation) in ops.iter().zip(0..) {
            let row = rows.get(op.key());
            let holds = match op.condition() {
                Condition::Always => true,
                Condition::Absent => row.is_none(),
                Condition::Present => row.is_some(),
                Condition::Version(wanted) => row.is_some_and(|(version, _)| *version == wanted),
                Condition::Value(wanted) => row.is_some_and(|(_, value)| value == wanted),
            };
            if !holds {
                return Err(Failure::Condition { operation, version: row.map(|(version, _)| *version) });
            }
        }
        Ok(())
    }

    fn write(&self, op: BatchOp<'_>, tail: &mut Bytes) -> u32 {
        let mut revision = self.revision.lock();
        let mut rows = self.rows.lock();
        match op {
            BatchOp::Put { key, value_bytes, .. } => {
                *revision += 1;
                rows.insert(key.to_vec(), (*revision, tail.split_to(value_bytes as usize)));
                0
            }
            BatchOp::Delete { key, .. } => {
                *revision += 1;
                u32::from(rows.remove(key).is_some())
            }
            BatchOp::Check { .. } | BatchOp::Read { .. } => 0,
        }
    }

    fn one(&self, frame: &Frame) -> Answer {
        let Write { key, condition, id, .. } = codec::decode_borrowed(&frame.head).unwrap();
        let op = match frame.header.kind {
            Kind::Put => BatchOp::Put { key, value_bytes: frame.tail.len() as u32, condition },
            _ => BatchOp::Delete { key, condition },
        };
        self.once(id, || {
            self.refuse(&[op])?;
            let removed = self.write(op, &mut frame.tail.clone());
            Ok((encoded(&WriteDone { revision: *self.revision.lock(), removed }), Bytes::new()))
        })
    }

    fn batch(&self, frame: &Frame) -> Answer {
        let batch: Batch<'_> = codec::decode_borrowed(&frame.head).unwrap();
        if frame.header.shard != ShardId::UNROUTED {
            let map = self.map.lock();
            let holding = |op: &BatchOp<'_>| map.shards.iter().find(|shard| shard.part.holds(op.key())).unwrap().id;
            assert_eq!(batch.ops.iter().map(holding).min(), Some(frame.header.shard), "not the lowest shard");
        }
        self.once(batch.id, || {
            self.refuse(&batch.ops)?;
            let (mut rows, mut values, mut tail) = (vec![], BytesMut::new(), frame.tail.clone());
            for op in batch.ops.iter().filter(|op| matches!(op, BatchOp::Read { .. })) {
                rows.push(self.rows.lock().get(op.key()).map(|(version, value)| {
                    values.extend_from_slice(value);
                    RowRead { version: *version, value_bytes: value.len() as u32 }
                }));
            }
            let removed = batch.ops.iter().map(|op| self.write(*op, &mut tail)).sum();
            assert!(tail.is_empty());
            let revisions = vec![(frame.header.shard, *self.revision.lock())];
            Ok((encoded(&BatchDone { removed, revisions, rows }), values.freeze()))
        })
    }

    fn matching(&self, scan: &Scan, shard: ShardId) -> Vec<(Vec<u8>, u64, Bytes)> {
        let part = self.map.lock().shard(shard).map_or(Part::everything(), |shard| shard.part.clone());
        let rows = self.rows.lock();
        let in_range = |key: &Vec<u8>| *key >= scan.start && scan.end.as_ref().is_none_or(|end| key < end);
        let mut rows: Vec<_> = rows
            .iter()
            .filter(|(key, _)| in_range(key) && part.holds(key))
            .map(|(key, (version, value))| (key.clone(), *version, value.clone()))
            .collect();
        if scan.reverse {
            rows.reverse();
        }
        rows
    }

    fn scan(&self, frame: &Frame) -> Answer {
        let scan: Scan = codec::decode(&frame.head).unwrap();
        if !scan.with.is_empty() {
            if self.apart.load(Ordering::SeqCst) {
                return Err(Failure::Busy { retry_after_ms: 0, text: "not together".into() });
            }
            self.merged.fetch_add(1, Ordering::SeqCst);
        }
        let mut matching = self.matching(&scan, frame.header.shard);
        for shard in &scan.with {
            matching.extend(self.matching(&scan, *shard));
        }
        matching.sort_by(|(a, ..), (b, ..)| if scan.reverse { b.cmp(a) } else { a.cmp(b) });
        let (mut rows, mut tail, mut bytes) = (Vec::new(), BytesMut::new(), 0);
        let rows_max = if scan.rows_max == 0 { usize::MAX } else { scan.rows_max as usize };
        let mut next = None;
        for (key, version, value) in matching {
            if rows.len() >= rows_max || bytes >= scan.bytes_max as usize {
                let last: &RowHead = rows.last().unwrap();
                next = Some(if scan.reverse { last.key.to_vec() } else { key });
                break;
            }
            let value = if scan.keys_only { Bytes::new() } else { value };
            bytes += key.len() + value.len();
            tail.extend_from_slice(&value);
            rows.push(RowHead { key: key.into(), version, value_bytes: value.len() as u32 });
        }
        let revision = *self.revision.lock();
        Ok((encoded(&ScanDone { rows, next, revision, with: vec![revision; scan.with.len()] }), tail.freeze()))
    }
}

fn encoded<T: Serialize>(head: &T) -> Vec<u8> {
    codec::encode(head).unwrap()
}
