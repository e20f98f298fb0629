//! What the parts of the wire cost: codec, frames, routing and hashing. `cargo bench -p shkv-proto`.

use bytes::BytesMut;
use criterion::{Criterion, Throughput};
use shkv_proto::hashing::{key_hash, rendezvous_order};
use shkv_proto::limits::FRAME_BYTES_MAX;
use shkv_proto::map::{KeyspaceInfo, NodeInfo, Part, ShardInfo};
use shkv_proto::message::{Condition, Consistency, Write};
use shkv_proto::ring::{Chooser, Functions, Rendezvous, SlotRing};
use shkv_proto::route::Routes;
use shkv_proto::{ClusterId, Frame, Header, Kind, Map, codec};
use shkv_proto::{KeyspaceId, NodeId, ShardId};
use std::hint::black_box;

/// A key as the benchmarks of the whole have it.
const KEY: &[u8] = b"key000000000000000012345";
/// Bytes of a value.
const VALUE_BYTES: usize = 100;
/// Frames that are read at once.
const FRAMES: usize = 16;
const SHARDS: u32 = 8;
const NODES: u64 = 3;

fn write() -> Write<'static> {
    Write { keyspace: KeyspaceId(1), key: KEY, condition: Condition::Always, id: None }
}

fn codecs(criterion: &mut Criterion) {
    let encoded = codec::encode(&write()).expect("a small head");
    criterion.bench_function("codec/encode a write", |bencher| {
        let mut out = Vec::with_capacity(64);
        bencher.iter(|| {
            out.clear();
            codec::encode_into(black_box(&write()), &mut out).expect("a small head");
            out.len()
        });
    });
    criterion.bench_function("codec/decode a write", |bencher| {
        bencher.iter(|| codec::decode_borrowed::<Write>(black_box(&encoded)).expect("what was encoded").key.len());
    });
}

fn frames(criterion: &mut Criterion) {
    let frame =
        Frame::new(Header::new(Kind::Put), codec::encode(&write()).expect("a small head"), vec![7; VALUE_BYTES]);
    let mut wire = BytesMut::new();
    (0..FRAMES).for_each(|_| frame.encode(&mut wire));
    let mut group = criterion.benchmark_group("frame");
    group.throughput(Throughput::Elements(FRAMES as u64));
    group.bench_function("encode 16 puts", |bencher| {
        let mut out = BytesMut::with_capacity(wire.len());
        bencher.iter(|| {
            out.clear();
            (0..FRAMES).for_each(|_| black_box(&frame).encode(&mut out));
            out.len()
        });
    });
    group.bench_function("decode 16 puts", |bencher| {
        bencher.iter(|| {
            let mut input = BytesMut::from(black_box(&wire[..]));
            let mut count = 0;
            while let Some(frame) = Frame::decode(&mut input, FRAME_BYTES_MAX).expect("what was encoded") {
                count += frame.tail.len();
            }
            count
        });
    });
    group.finish();
}

fn routes() -> Routes {
    let mut map = Map::empty(ClusterId(7));
    map.nodes = (1..=NODES).map(|id| NodeInfo::new(NodeId(id), format!("Server{id}"), format!("h{id}:1"))).collect();
    let homes: Vec<NodeId> = map.nodes.iter().map(|node| node.id).collect();
    map.keyspaces.push(KeyspaceInfo { id: KeyspaceId(1), name: "default".into(), replicas: 3 });
    let parts = (1..).map(ShardId).zip(Part::hash_split(SHARDS));
    map.shards = parts.map(|(id, part)| ShardInfo::founded(id, KeyspaceId(1), part, &homes)).collect();
    Routes::new(map, None)
}

fn routing(criterion: &mut Criterion) {
    let routes = routes();
    criterion.bench_function("route/key to node", |bencher| {
        bencher.iter(|| {
            let shard = routes.shard_of(KeyspaceId(1), black_box(KEY)).expect("a shard for every key");
            routes.target(shard, Consistency::Linearizable, KEY, 0)
        });
    });
}

fn hashing(criterion: &mut Criterion) {
    criterion.bench_function("hashing/a key", |bencher| bencher.iter(|| key_hash(black_box(KEY))));
    let candidates: Vec<u64> = (1..=100).collect();
    criterion.bench_function("hashing/order 100 nodes", |bencher| {
        bencher.iter(|| rendezvous_order(black_box(12_345), &candidates));
    });
    let mut rendezvous = Rendezvous::default();
    let mut ring = SlotRing::new(Functions::Xxh3);
    for server in 1..=6 {
        rendezvous.add(server).expect("no limit");
        ring.add(server).expect("six have room");
    }
    criterion.bench_function("hashing/choose of 6, rendezvous", |bencher| {
        bencher.iter(|| rendezvous.choose(black_box(123_456)));
    });
    criterion.bench_function("hashing/choose of 6, ring", |bencher| bencher.iter(|| ring.choose(black_box(123_456))));
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    codecs(&mut criterion);
    frames(&mut criterion);
    routing(&mut criterion);
    hashing(&mut criterion);
    criterion.final_summary();
}
