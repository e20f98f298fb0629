//! Streams of a snapshot with anything in them, sent to a real node as a peer would send them: every frame is answered or the
//! connection is closed, the node goes on, and what came is deleted again like any other replica.

#![expect(
    clippy::expect_used,
    clippy::disallowed_methods,
    reason = "a harness starts a node, waits for answers, and fails where they do not come"
)]

use super::Draw;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use shkv_node::{Node, NodeConfig, Tuning};
use shkv_proto::link::{CallError, Link};
use shkv_proto::map::Part;
use shkv_proto::message::{
    Condition, Consistency, CreateReplica, Failure, Get, GetDone, Hello, RaftMessage, RemoveReplica, Role, Scan,
    SnapshotBegin, SnapshotChunk, SnapshotEnd, SnapshotHead, Write, WriteDone,
};
use shkv_proto::session::{self, Session};
use shkv_proto::{ClusterId, Frame, Header, KeyspaceId, Kind, NodeId, ReplicaId, ShardId, codec};
use std::sync::OnceLock;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::runtime::Runtime;
use tokio::time::{Instant, timeout};

const CLUSTER: ClusterId = ClusterId(7);
const KEYSPACE: KeyspaceId = KeyspaceId(1);
/// The shard that nobody means any harm.
const CALM: ShardId = ShardId(1);
/// The number of Raft's message that announces a snapshot.
const ANNOUNCES: u8 = 7;
/// The node that sends.
const SENDER: NodeId = NodeId(4);
/// Most frames of one stream.
const FRAMES_MAX: usize = 24;
/// Frames and the like that must come, however slow the machine is.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node that is there for as long as the process is.
struct Place {
    runtime: Runtime,
    node: Node,
    link: Link,
    next: u32,
    _data: tempfile::TempDir,
}

fn place() -> &'static Mutex<Place> {
    static PLACE: OnceLock<Mutex<Place>> = OnceLock::new();
    PLACE.get_or_init(|| Mutex::new(Place::new()))
}

fn create(shard: ShardId, voters: &[u64], homes: Vec<(ReplicaId, NodeId)>) -> CreateReplica {
    CreateReplica {
        cluster: CLUSTER,
        shard,
        keyspace: KEYSPACE,
        part: Part::everything(),
        replica: ReplicaId(1),
        founders: voters.iter().copied().map(ReplicaId).collect(),
        homes,
        campaign: voters.len() == 1,
    }
}

impl Place {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("the system gives threads");
        let data = super::http::folder();
        let tuning = Tuning {
            table_bytes: 256 << 10,
            cache_bytes: 4 << 20,
            log_segment_bytes: 256 << 10,
            log_retain_bytes: 256 << 10,
            disk_reserve_bytes: 0,
            threads: 1,
        };
        let config = NodeConfig { tuning, ..NodeConfig::new("Server0", data.path().join("node"), "127.0.0.1:0") };
        let (node, link) = runtime.block_on(async {
            let node = Node::start(config).await.expect("a node starts in an empty folder");
            let hello = Hello::ours(Some(CLUSTER), Role::Balancer);
            let link = Link::open(node.addr().to_string(), hello, |_| Ok(()));
            (node, link)
        });
        let place = Self { runtime, node, link, next: 2, _data: data };
        let homes = vec![(ReplicaId(1), place.node.id())];
        place.runtime.block_on(async {
            place.ask::<()>(CALM, Kind::CreateReplica, &create(CALM, &[1], homes), b"").await.expect("it is made");
            let write = Write { keyspace: KEYSPACE, key: b"k", condition: Condition::Always, id: None };
            let until = Instant::now() + PATIENCE;
            while let Err(error) = place.ask::<WriteDone>(CALM, Kind::Put, &write, b"v").await {
                assert!(Instant::now() < until, "nobody leads: {error}");
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        });
        place
    }

    async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        shard: ShardId,
        kind: Kind,
        head: &impl serde::Serialize,
        tail: &[u8],
    ) -> Result<(T, Bytes), CallError> {
        let head = codec::encode(head).expect("a small head");
        let frame = Frame::new(Header { shard, ..Header::new(kind) }, head, Bytes::copy_from_slice(tail));
        self.link.clone().ask(frame, Instant::now() + PATIENCE).await
    }

    /// Sends these frames on a connection of their own, to a shard of their own.
    async fn put_through(&self, shard: ShardId, frames: Vec<Frame>) {
        let homes = [1, 2, 3].map(|id| (ReplicaId(id), if id == 1 { self.node.id() } else { NodeId(id + 2) }));
        let made = create(shard, &[1, 2, 3], homes.to_vec());
        self.ask::<()>(shard, Kind::CreateReplica, &made, b"").await.expect("it is made");
        let hello = Hello::ours(Some(CLUSTER), Role::Node(SENDER));
        let mut session = session::connect(&self.node.addr().to_string(), &hello).await.expect("a node is let in");
        for frame in frames {
            if !exchange(&mut session, &frame).await {
                break;
            }
        }
        drop(session);
        self.goes_on().await;

        // Whatever lies there now is read in words, or refused in words.
        let scan = Scan {
            keyspace: KEYSPACE,
            start: vec![],
            end: None,
            reverse: false,
            keys_only: false,
            rows_max: 100,
            bytes_max: 0,
            consistency: Consistency::Eventual,
            with: vec![],
        };
        for kind in [Kind::Scan, Kind::Count] {
            let head = codec::encode(&scan).expect("a small head");
            let frame = Frame::new(Header { shard, ..Header::new(kind) }, head, vec![]);
            self.link.clone().call(frame, Instant::now() + PATIENCE).await.expect("it is answered");
        }
        let until = Instant::now() + PATIENCE;
        let remove = RemoveReplica { replica: ReplicaId(1) };
        while let Err(error) = self.ask::<()>(shard, Kind::RemoveReplica, &remove, b"").await {
            let busy = matches!(error, CallError::Failure(Failure::Busy { .. }));
            assert!(busy && Instant::now() < until, "it cannot be removed: {error}");
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        let get = Get { keyspace: KEYSPACE, key: b"k", consistency: Consistency::Linearizable };
        let (_, value) = self.ask::<GetDone>(CALM, Kind::Get, &get, b"").await.expect("the others go on");
        assert_eq!(&value[..], b"v");
        self.goes_on().await;
    }

    async fn goes_on(&self) {
        let failed = timeout(Duration::ZERO, self.node.failed()).await;
        assert!(failed.is_err(), "the node gave up: {failed:?}");
    }
}

/// Sends a frame and waits for its answer. `false` when the connection was closed.
async fn exchange<T>(session: &mut Session<T>, frame: &Frame) -> bool {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    if session.writer.write_all(&bytes).await.is_err() {
        return false;
    }
    let mut frames = Vec::new();
    let answered = timeout(PATIENCE, session.reader.next_batch(&mut frames)).await.expect("it is answered or closed");
    matches!(answered, Ok(true)) && frames.iter().all(|answer| matches!(answer.header.kind, Kind::Done | Kind::Failed))
}

/// Sends what the bytes choose.
///
/// # Panics
/// When the node does not hold what it must.
pub fn stream(bytes: &[u8]) {
    let mut place = place().lock();
    let shard = ShardId(place.next);
    place.next += 1;
    let frames = frames_of(shard, bytes);
    place.runtime.block_on(place.put_through(shard, frames));
}

fn frames_of(shard: ShardId, bytes: &[u8]) -> Vec<Frame> {
    let mut draw = Draw::new(bytes);
    let mut frames = Vec::new();
    let mut rows = 0;
    while !draw.is_empty() && frames.len() < FRAMES_MAX {
        let (kind, mut head, tail) = match draw.byte() % 8 {
            0 | 1 => {
                rows = 0;
                (Kind::SnapshotBegin, encoded(&begin(shard, &mut draw)), Bytes::new())
            }
            2..=4 => {
                let (chunk, tail) = chunk(&mut draw);
                rows += chunk.rows.len() as u64;
                (Kind::SnapshotChunk, encoded(&chunk), tail)
            }
            5 => (Kind::SnapshotEnd, encoded(&SnapshotEnd { rows }), Bytes::new()),
            6 => (Kind::SnapshotEnd, encoded(&SnapshotEnd { rows: draw.number() }), Bytes::new()),
            _ => {
                let kind = draw.one_of(&[Kind::SnapshotBegin, Kind::SnapshotChunk, Kind::SnapshotEnd]);
                let (head, tail) = (draw.byte(), draw.byte());
                (kind, draw.bytes(head.into()).to_vec(), Bytes::copy_from_slice(draw.bytes(tail.into())))
            }
        };
        if draw.byte() & 31 == 31 && !head.is_empty() {
            let at = draw.below(head.len());
            head[at] ^= 1 << draw.below(8);
        }
        frames.push(Frame::new(Header { shard, ..Header::new(kind) }, head, tail));
    }
    frames
}

fn encoded<T: serde::Serialize>(head: &T) -> Vec<u8> {
    codec::encode(head).expect("a small head")
}

fn ids(draw: &mut Draw<'_>, usual: &[u64]) -> Vec<ReplicaId> {
    match draw.byte() {
        0..200 => usual.iter().copied().map(ReplicaId).collect(),
        count => (0..count % 12).map(|_| ReplicaId(draw.number())).collect(),
    }
}

fn begin(shard: ShardId, draw: &mut Draw<'_>) -> SnapshotBegin {
    let unusual = |draw: &mut Draw<'_>, usual: u64| if draw.byte() < 224 { usual } else { draw.number() };
    let covers = SnapshotHead {
        index: draw.number().saturating_add(1),
        term: unusual(draw, 1),
        voters: ids(draw, &[1, 2, 3]),
        voters_outgoing: ids(draw, &[]),
        learners: ids(draw, &[]),
        learners_next: ids(draw, &[]),
        auto_leave: draw.byte() == 255,
    };
    let message = RaftMessage {
        shard: if draw.byte() < 250 { shard } else { CALM },
        kind: unusual(draw, ANNOUNCES.into()) as u8,
        to: ReplicaId(unusual(draw, 1)),
        from: ReplicaId(unusual(draw, 2)),
        term: unusual(draw, 1),
        log_term: unusual(draw, 0),
        index: unusual(draw, 0),
        commit: unusual(draw, 0),
        commit_term: unusual(draw, 0),
        reject: draw.byte() == 255,
        reject_hint: unusual(draw, 0),
        request_snapshot: unusual(draw, 0),
        context: vec![],
        priority: 0,
        stamp: unusual(draw, 0),
        entries: vec![],
        snapshot: (draw.byte() < 250).then_some(covers),
    };
    let part = match draw.byte() {
        0..200 => Part::everything(),
        200..228 => Part::Range { start: draw.bytes(3).to_vec(), end: Some(draw.bytes(3).to_vec()) },
        _ => Part::Hash { low: draw.number(), high: draw.number() },
    };
    let homes = (0..draw.below(5)).map(|_| (ReplicaId(draw.number()), NodeId(draw.number()))).collect();
    SnapshotBegin { message, revision: draw.number(), keyspace: KeyspaceId(unusual(draw, 1) as u32), part, homes }
}

/// Rows in any order, some of them as a node would store them; the empty key brings a piece of what the shard remembers.
fn chunk(draw: &mut Draw<'_>) -> (SnapshotChunk, Bytes) {
    let (mut rows, mut tail) = (Vec::new(), BytesMut::new());
    for _ in 0..draw.below(8) {
        let length = match draw.byte() {
            0..240 => draw.below(6),
            _ => draw.below(9_000),
        };
        let mut key = draw.bytes(length).to_vec();
        key.resize(length, b'k');
        let row = match draw.byte() {
            0..80 => draw.bytes(24).to_vec(),
            80..100 => vec![],
            flags => [&[u8::from(flags > 250)][..], &draw.number().to_le_bytes(), draw.bytes(12)].concat(),
        };
        let lie = if draw.byte() < 250 { 0 } else { draw.number() as u32 };
        rows.push(((key.len() as u32).wrapping_add(lie), row.len() as u32));
        tail.extend_from_slice(&key);
        tail.extend_from_slice(&row);
    }
    (SnapshotChunk { rows }, tail.freeze())
}
