//! What hostile bytes are put through: the same for the property tests of `proto` and for the fuzz targets.
//!
//! Nothing here may panic whatever the bytes are; what does decode must keep every limit and encode to itself again.

use bytes::{Bytes, BytesMut};
use serde::Serialize;
use serde::de::DeserializeOwned;
use shkv_proto::codec;
use shkv_proto::frame::{Frame, HEADER_BYTES, VERSION};
use shkv_proto::hashing::frame_check;
use shkv_proto::limits::{DEADLINE_MS_MAX, FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX, HEAD_BYTES_MAX};
use shkv_proto::map::Map;
use shkv_proto::merge::Page;
use shkv_proto::message::*;
use shkv_proto::route::Routes;
use std::fmt::Debug;

/// Takes `bytes` for what one connection sends: as many frames as there are.
pub fn frame(bytes: &[u8]) {
    for bytes_max in [HANDSHAKE_BYTES_MAX, FRAME_BYTES_MAX] {
        frames(bytes, bytes_max);
    }
}

/// The same with length, version and check put right, so that what lies behind them is reached.
pub fn frame_put_right(bytes: &[u8]) {
    let mut bytes = bytes.to_vec();
    bytes.resize(bytes.len().max(HEADER_BYTES), 0);
    let length = (bytes.len() - 4) as u32;
    bytes[..4].copy_from_slice(&length.to_le_bytes());
    bytes[8] = VERSION;
    let check = frame_check(&bytes[8..]);
    bytes[4..8].copy_from_slice(&check.to_le_bytes());
    frame(&bytes);
}

/// Takes `bytes` for the head of every kind of message in turn.
pub fn message(bytes: &[u8]) {
    for decoder in DECODERS {
        decoder(bytes);
    }
}

/// One for each type that is a head, or the list that is.
pub const DECODERS: [fn(&[u8]); 30] = [
    |bytes| {
        if let Some(hello) = owned::<Hello>(bytes) {
            let _ = hello.version_in_common();
        }
    },
    decoder::<Welcome>,
    borrowed::<GetOf>,
    decoder::<GetDone>,
    decoder::<Scan>,
    |bytes| {
        if let Some(done) = owned::<ScanDone>(bytes) {
            let tail = vec![7; done.rows.iter().map(|row| row.value_bytes as usize).sum::<usize>().min(1 << 20)];
            if let Ok(page) = Page::decode(&Bytes::copy_from_slice(bytes), tail.into()) {
                assert_eq!((page.rows.len(), page.next, page.revision), (done.rows.len(), done.next, done.revision));
            }
        }
    },
    decoder::<CountDone>,
    borrowed::<WriteOf>,
    borrowed::<BatchOf>,
    borrowed::<KeyPrefixOf>,
    decoder::<WriteDone>,
    decoder::<BatchDone>,
    borrowed::<PrepareOf>,
    decoder::<PrepareDone>,
    decoder::<Finish>,
    decoder::<FinishDone>,
    decoder::<Resolve>,
    decoder::<ResolveDone>,
    |bytes| {
        if let Some(done) = owned::<MapDone>(bytes) {
            map(done.map);
        }
    },
    decoder::<CreateReplica>,
    decoder::<TransferLeader>,
    |bytes| {
        if let Some(map_of_beat) = owned::<Beat>(bytes).and_then(|beat| beat.map) {
            map(map_of_beat);
        }
    },
    decoder::<NodeStatus>,
    decoder::<ReplicaStatus>,
    decoder::<StatusDone>,
    decoder::<Vec<RaftMessage>>,
    decoder::<SnapshotBegin>,
    decoder::<SnapshotChunk>,
    decoder::<SnapshotEnd>,
    decoder::<Failure>,
];

fn frames(bytes: &[u8], bytes_max: usize) {
    let mut buffer = BytesMut::from(bytes);
    let room = buffer.capacity();
    loop {
        let held = buffer.len();
        let decoded = Frame::decode(&mut buffer, bytes_max);
        assert!(buffer.capacity() <= room, "decoding a frame must not make room for anything");
        match decoded {
            Ok(Some(frame)) => {
                let at = bytes.len() - held;
                let used = held - buffer.len();
                assert_eq!(frame.wire_bytes(), used);
                assert!(used - 4 <= bytes_max && frame.head.len() <= HEAD_BYTES_MAX && frame.fits());
                assert!(frame.header.deadline_ms <= DEADLINE_MS_MAX);
                let mut again = BytesMut::new();
                frame.encode(&mut again);
                assert_eq!(again, bytes[at..at + used], "a frame has one encoding");
                message(&frame.head);
            }
            Ok(None) => return assert_eq!(buffer.len(), held, "half a frame is left where it is"),
            Err(_) => return,
        }
    }
}

fn decoder<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) {
    owned::<T>(bytes);
}

/// Decodes the bytes as a `T`, and holds the value to what must be true of every value.
fn owned<T: Serialize + DeserializeOwned + PartialEq + Debug>(bytes: &[u8]) -> Option<T> {
    let whole = codec::decode::<T>(bytes).ok();
    match codec::decode_prefix::<T>(bytes) {
        Ok((value, used)) => {
            assert!(used <= bytes.len());
            let again = codec::encode(&value).expect("what was decoded can be encoded");
            assert!(again.len() <= used, "a value never grows by being read and written");
            assert_eq!(codec::decode::<T>(&again).expect("what was encoded can be decoded"), value);
            assert_eq!(whole.is_some(), used == bytes.len(), "bytes behind a value are refused, and only those");
        }
        Err(_) => assert!(whole.is_none()),
    }
    whole
}

/// A type that borrows from the bytes that it is decoded from.
trait Borrowing {
    type Of<'a>: serde::Deserialize<'a> + Serialize + PartialEq + Debug;
}

macro_rules! borrowing {
    ($($of:ident = $name:ident),*) => {
        $(struct $of; impl Borrowing for $of { type Of<'a> = $name<'a>; })*
    };
}
borrowing!(GetOf = Get, WriteOf = Write, BatchOf = Batch, KeyPrefixOf = KeyPrefix, PrepareOf = Prepare);

fn borrowed<B: Borrowing>(bytes: &[u8]) {
    let Ok((value, used)) = codec::decode_borrowed_prefix::<B::Of<'_>>(bytes) else {
        return assert!(codec::decode_borrowed::<B::Of<'_>>(bytes).is_err());
    };
    assert_eq!(codec::decode_borrowed::<B::Of<'_>>(bytes).is_ok(), used == bytes.len());
    let again = codec::encode(&value).expect("what was decoded can be encoded");
    assert!(again.len() <= used, "a value never grows by being read and written");
    // Two lifetimes cannot be compared, their encodings can.
    let value = codec::decode_borrowed::<B::Of<'_>>(&again).expect("what was encoded can be decoded");
    assert_eq!(codec::encode(&value).expect("the same again"), again);
}

/// A map that is sound is one that look-ups may be made in.
fn map(map: Map) {
    if map.check().is_err() {
        return;
    }
    let keyspaces: Vec<_> = map.keyspaces.iter().map(|keyspace| keyspace.id).collect();
    let routes = Routes::new(map, None);
    for keyspace in keyspaces {
        let shard = routes.shard_of(keyspace, b"key").expect("a sound map has a shard for every key");
        assert!(shard.part.holds(b"key"));
        assert!(routes.target(shard, Consistency::Linearizable, b"key", 1).is_some());
    }
}
