//! The examples of `proto.md`: each decodes to the value that it states and is encoded to exactly its bytes.
//!
//! An example that does not match fails with the block that should stand in the document.

use serde::{Deserialize, Serialize};
use shkv_proto::codec;
use shkv_proto::limits::{FRAME_BYTES_MAX, Limits};
use shkv_proto::map::{KeyspaceInfo, NodeInfo, Part, ShardInfo};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, ChangeReplicas, Condition, Consistency, EntryHead, Failure, Finish, FinishDone, Get,
    GetDone, Hello, MapDone, Prepare, PrepareDone, RaftMessage, RefusalCode, Resolve, ResolveDone, Role, RowHead,
    RowRead, Scan, ScanDone, SnapshotChunk, TxnId, Welcome, Write, WriteDone, WriteId,
};
use shkv_proto::{ClusterId, Epoch, Frame, Header, Kind, Map, NodeId, ReplicaId, ShardId};
use shkv_proto::{KeyspaceId, message::MAGIC};
use std::fmt::{Debug, Write as _};

const DOCUMENT: &str = include_str!("../../proto.md");
const CLUSTER: ClusterId = ClusterId(0x0123_4567_89ab_cdef_0123_4567_89ab_cdef);
const KEYSPACE: KeyspaceId = KeyspaceId(1);

/// A frame, and how its head is read back without knowing the value that it was made of.
struct Example {
    name: &'static str,
    frame: Frame,
    read: fn(&[u8]) -> String,
}

fn read<'a, T: Deserialize<'a> + Debug>(head: &'a [u8]) -> String {
    format!("{:?}", codec::decode_borrowed::<T>(head).expect("the head of an example"))
}

fn example<T: Serialize>(
    name: &'static str,
    header: Header,
    head: &T,
    tail: &'static [u8],
    read: fn(&[u8]) -> String,
) -> Example {
    Example { name, frame: Frame::new(header, codec::encode(head).expect("a small head"), tail), read }
}

fn routed(kind: Kind) -> Header {
    Header { shard: ShardId(3), epoch: Epoch(7), request: 1, deadline_ms: 500, ..Header::new(kind) }
}

fn answer(kind: Kind) -> Header {
    routed(kind).answer(kind)
}

fn handshake() -> [Example; 2] {
    let hello = Hello { magic: MAGIC, version_min: 1, version_max: 1, cluster: Some(CLUSTER), role: Role::Client };
    let welcome = Welcome {
        version: 1,
        cluster: Some(CLUSTER),
        role: Role::Node(NodeId(300)),
        name: "Server0".into(),
        limits: Limits::OURS,
    };
    [
        example("Hello", Header::new(Kind::Hello), &hello, b"", |head| read::<Hello>(head)),
        example("Welcome", Header::new(Kind::Welcome), &welcome, b"", |head| read::<Welcome>(head)),
    ]
}

fn rows() -> [Example; 9] {
    let get = Get { keyspace: KEYSPACE, key: b"key", consistency: Consistency::Causal { revision: 250 } };
    let got = GetDone { version: Some(251), revision: 65_536, consistency: get.consistency };
    let id = WriteId { client: 1 << 40, sequence: 9, answered: 7, age_ms: 250 };
    let write = Write { keyspace: KEYSPACE, key: b"key", condition: Condition::Always, id: Some(id) };
    let guarded = Write { condition: Condition::Version(300), id: None, ..write };
    let written = WriteDone { revision: 1 << 32, removed: 0 };
    let ops = vec![
        BatchOp::Put { key: b"a", value_bytes: 2, condition: Condition::Absent },
        BatchOp::Delete { key: b"b", condition: Condition::Always },
        BatchOp::Check { key: b"c", condition: Condition::Value(b"v") },
        BatchOp::Read { key: b"d" },
    ];
    let batch = Batch { keyspace: KEYSPACE, ops, id: Some(id) };
    let batched = BatchDone {
        removed: 1,
        revisions: vec![(ShardId(3), 12), (ShardId(4), 300)],
        rows: vec![Some(RowRead { version: 11, value_bytes: 2 })],
    };
    let scan = Scan {
        keyspace: KEYSPACE,
        start: b"a".to_vec(),
        end: Some(b"b".to_vec()),
        reverse: false,
        keys_only: false,
        rows_max: 2,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
        with: vec![ShardId(4)],
    };
    let row = |key: &[u8], version, value_bytes| RowHead { key: key.to_vec().into(), version, value_bytes };
    let page = ScanDone {
        rows: vec![row(b"a", 5, 2), row(b"aa", 9, 1)],
        next: Some(b"aa\0".to_vec()),
        revision: 9,
        with: vec![300],
    };
    [
        example("Get", routed(Kind::Get), &get, b"", |head| read::<Get<'_>>(head)),
        example("GetDone", answer(Kind::Done), &got, b"value", |head| read::<GetDone>(head)),
        example("Put", routed(Kind::Put), &write, b"value", |head| read::<Write<'_>>(head)),
        example("Delete", routed(Kind::Delete), &guarded, b"", |head| read::<Write<'_>>(head)),
        example("WriteDone", answer(Kind::Done), &written, b"", |head| read::<WriteDone>(head)),
        example("Batch", routed(Kind::Batch), &batch, b"v1", |head| read::<Batch<'_>>(head)),
        example("BatchDone", answer(Kind::Done), &batched, b"v2", |head| read::<BatchDone>(head)),
        example("Scan", routed(Kind::Scan), &scan, b"", |head| read::<Scan>(head)),
        example("ScanDone", answer(Kind::Done), &page, b"v1w", |head| read::<ScanDone>(head)),
    ]
}

fn transactions() -> [Example; 6] {
    let txn = TxnId { shard: ShardId(3), term: 4, number: 300 };
    let ops =
        vec![BatchOp::Put { key: b"z", value_bytes: 2, condition: Condition::Absent }, BatchOp::Read { key: b"y" }];
    let prepare = Prepare { txn, keyspace: KEYSPACE, ops };
    let prepared = PrepareDone { removed: 0, rows: vec![Some(RowRead { version: 11, value_bytes: 1 })] };
    [
        example("Prepare", routed(Kind::Prepare), &prepare, b"v1", |head| read::<Prepare<'_>>(head)),
        example("PrepareDone", answer(Kind::Done), &prepared, b"w", |head| read::<PrepareDone>(head)),
        example("Finish", routed(Kind::Finish), &Finish { txn, commit: true }, b"", |head| read::<Finish>(head)),
        example("FinishDone", answer(Kind::Done), &FinishDone { revision: 12 }, b"", |head| read::<FinishDone>(head)),
        example("Resolve", routed(Kind::Resolve), &Resolve { txn }, b"", |head| read::<Resolve>(head)),
        example("ResolveDone", answer(Kind::Done), &ResolveDone { commit: true }, b"", |head| {
            read::<ResolveDone>(head)
        }),
    ]
}

fn failures() -> [Example; 8] {
    let failed = |name, failure: &Failure| {
        example(name, answer(Kind::Failed), failure, b"", |head| {
            format!("{:?}", codec::decode::<Failure>(head).expect("a failure"))
        })
    };
    [
        failed("Refusal", &Failure::refusal(RefusalCode::KeyTooLarge, "too long")),
        failed("NotLeader", &Failure::NotLeader { hint: Some(NodeId(300)) }),
        failed("WrongShard", &Failure::WrongShard { epoch: Epoch(8) }),
        failed("Busy", &Failure::Busy { retry_after_ms: 50, text: "full".into() }),
        failed("Behind", &Failure::Behind { revision: 12 }),
        failed("Unknown", &Failure::unknown("lost")),
        failed("Condition", &Failure::Condition { operation: 2, version: Some(9) }),
        failed("Aborted", &Failure::Aborted { text: "locked".into() }),
    ]
}

fn cluster() -> [Example; 4] {
    let shard = |id, keyspace, part| ShardInfo::founded(ShardId(id), keyspace, part, &[NodeId(300)]);
    let map = Map {
        cluster: CLUSTER,
        epoch: Epoch(7),
        nodes: vec![NodeInfo::new(NodeId(300), "Server0", "h:1")],
        keyspaces: vec![KeyspaceInfo { id: KEYSPACE, name: "default".into(), replicas: 3 }],
        shards: vec![
            shard(0, KeyspaceId::SYSTEM, Part::everything()),
            shard(1, KEYSPACE, Part::Hash { low: 0, high: u64::MAX }),
        ],
        next_shard: ShardId(2),
        next_keyspace: KeyspaceId(2),
    };
    let from = [1, 2, 3].map(ReplicaId).to_vec();
    let change = ChangeReplicas { from, learn: vec![], promote: vec![ReplicaId(4)], remove: vec![ReplicaId(1)] };
    let map = MapDone { map, leaders: vec![(ShardId(1), NodeId(300))] };
    let append = RaftMessage {
        shard: ShardId(3),
        kind: 3,
        to: ReplicaId(2),
        from: ReplicaId(1),
        term: 4,
        log_term: 4,
        index: 10,
        commit: 10,
        commit_term: 0,
        reject: false,
        reject_hint: 0,
        request_snapshot: 0,
        context: vec![],
        priority: -1,
        stamp: 1_000_000,
        entries: vec![
            EntryHead { kind: 0, term: 4, index: 11, data_bytes: 3 },
            EntryHead { kind: 0, term: 4, index: 12, data_bytes: 2 },
        ],
        snapshot: None,
    };
    let chunk = SnapshotChunk { rows: vec![(1, 4), (2, 3)] };
    [
        example("MapDone", Header::new(Kind::Done), &map, b"", |head| read::<MapDone>(head)),
        example("ChangeReplicas", routed(Kind::ChangeReplicas), &change, b"", |head| read::<ChangeReplicas>(head)),
        example("Raft", Header::new(Kind::Raft), &vec![append], b"onetw", |head| {
            format!("{:?}", codec::decode::<Vec<RaftMessage>>(head).expect("Raft messages"))
        }),
        example("SnapshotChunk", routed(Kind::SnapshotChunk), &chunk, b"arow1bbrow", |head| {
            read::<SnapshotChunk>(head)
        }),
    ]
}

fn examples() -> Vec<Example> {
    handshake().into_iter().chain(rows()).chain(transactions()).chain(failures()).chain(cluster()).collect()
}

/// What the document says of a frame.
fn block(name: &str, frame: &Frame, head: &str) -> String {
    let Header { kind, version, shard, epoch, request, deadline_ms } = frame.header;
    let shard = if shard == ShardId::UNROUTED { "none".to_owned() } else { shard.to_string() };
    let mut bytes = bytes::BytesMut::new();
    frame.encode(&mut bytes);
    let mut hex = String::new();
    for (at, byte) in bytes.iter().enumerate() {
        let space = if at % 32 == 0 {
            "\n       "
        } else if at % 4 == 0 {
            " "
        } else {
            ""
        };
        write!(hex, "{space}{byte:02x}").expect("writing to a string");
    }
    format!(
        "{name}\nheader kind {kind:?} {}, version {version}, shard {shard}, epoch {epoch}, request {request}, deadline {deadline_ms} ms\nhead   {head}\ntail   {:?}\nbytes{}",
        kind as u8,
        String::from_utf8_lossy(&frame.tail),
        hex,
    )
}

/// The `example` blocks of the document, as their name and their lines.
fn blocks() -> Vec<(String, String)> {
    let mut blocks = Vec::new();
    for part in DOCUMENT.split("\n```example\n").skip(1) {
        let (text, _) = part.split_once("\n```").expect("an example block has an end");
        let name = text.lines().next().unwrap_or_default().trim().to_owned();
        blocks.push((name, text.to_owned()));
    }
    blocks
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// The bytes that a block tells, whatever their spacing.
fn bytes_of(block: &str) -> Vec<u8> {
    let (_, hex) = block.rsplit_once("bytes").expect("an example has bytes");
    let digits: Vec<char> = hex.chars().filter(|c| !c.is_whitespace()).collect();
    let byte = |pair: &[char]| u8::from_str_radix(&pair.iter().collect::<String>(), 16).expect("hexadecimal digits");
    digits.chunks(2).map(byte).collect()
}

#[test]
fn every_example_is_encoded_to_exactly_its_bytes() {
    let blocks = blocks();
    for Example { name, frame, read } in examples() {
        let expected = block(name, &frame, &read(&frame.head));
        let Some((_, text)) = blocks.iter().find(|(found, _)| found == name) else {
            panic!("proto.md lacks the example\n{expected}");
        };
        assert_eq!(words(text), words(&expected), "proto.md should say\n{expected}\n");
        let mut bytes = bytes::BytesMut::new();
        frame.encode(&mut bytes);
        assert_eq!(bytes_of(text), bytes, "{name}");
    }
}

#[test]
fn every_example_decodes_to_the_value_that_it_states() {
    let examples = examples();
    let blocks = blocks();
    assert_eq!(blocks.len(), examples.len(), "an example of proto.md that no test knows, or the other way round");
    for (name, text) in blocks {
        let example = examples.iter().find(|example| example.name == name);
        let Example { frame, read, .. } = example.unwrap_or_else(|| panic!("no test knows the example {name}"));
        let mut bytes = bytes::BytesMut::from(&bytes_of(&text)[..]);
        let decoded = Frame::decode(&mut bytes, FRAME_BYTES_MAX).expect("a sound frame").expect("a whole frame");
        assert!(bytes.is_empty(), "{name} is followed by {} bytes", bytes.len());
        assert_eq!(&decoded, frame, "{name}");
        assert_eq!(words(&block(&name, &decoded, &read(&decoded.head))), words(&text), "{name}");
    }
}

#[test]
fn an_example_with_one_wrong_digit_would_be_found() {
    let (name, text) = blocks().into_iter().next().expect("an example");
    let bytes = bytes_of(&text);
    for at in 0..bytes.len() {
        let mut changed = bytes.clone();
        changed[at] ^= 1;
        let mut buffer = bytes::BytesMut::from(&changed[..]);
        let decoded = Frame::decode(&mut buffer, FRAME_BYTES_MAX);
        assert!(!matches!(decoded, Ok(Some(_))), "byte {at} of {name} may be changed without notice");
    }
}
