//! Hostile bytes: whatever they are, decoding them neither panics nor makes room beyond them, and only what is sound
//! decodes. Sound values of every type survive a round trip.

#[path = "../../tests/fuzz/harness.rs"]
mod harness;
mod values;

use bytes::BytesMut;
use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::frame::{Frame, FrameError, HEADER_BYTES};
use shkv_proto::hashing::frame_check;
use shkv_proto::limits::{DEADLINE_MS_MAX, FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX, HEAD_BYTES_MAX};
use shkv_proto::message::*;
use shkv_proto::{Header, KeyspaceId, Kind, ReplicaId};
use std::fmt::Debug;
use values::*;

fn round_trip<T: Serialize + DeserializeOwned + PartialEq + Debug>(value: &T) -> Result<(), TestCaseError> {
    let bytes = codec::encode(value).expect("a small value");
    harness::message(&bytes);
    prop_assert_eq!(&codec::decode::<T>(&bytes).expect("what was encoded"), value);
    for cut in 0..bytes.len() {
        prop_assert!(codec::decode::<T>(&bytes[..cut]).is_err(), "{} of {} bytes are a whole value", cut, bytes.len());
    }
    let longer = [&bytes[..], &[0]].concat();
    let refused = matches!(codec::decode::<T>(&longer), Err(CodecError::Trailing { extra: 1 }));
    prop_assert!(refused, "a byte behind the value was taken");
    Ok(())
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    bytes
}

/// A frame's bytes with one thing changed and the check put right.
fn with_check_right(mut bytes: BytesMut, change: impl FnOnce(&mut [u8])) -> BytesMut {
    change(&mut bytes);
    let check = frame_check(&bytes[8..]);
    bytes[4..8].copy_from_slice(&check.to_le_bytes());
    bytes
}

fn decode(mut bytes: BytesMut) -> Result<Option<Frame>, FrameError> {
    Frame::decode(&mut bytes, FRAME_BYTES_MAX)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 500, ..ProptestConfig::default() })]

    #[test]
    fn random_bytes_are_only_ever_refused(bytes in vec(any::<u8>(), 0..400)) {
        harness::frame(&bytes);
        harness::frame_put_right(&bytes);
        harness::message(&bytes);
    }

    #[test]
    fn frames_survive_a_round_trip_in_any_pieces(frames in vec(frame(), 1..5), pieces in 1..50_usize) {
        let mut bytes = BytesMut::new();
        for frame in &frames {
            frame.encode(&mut bytes);
        }
        harness::frame(&bytes);
        let mut buffer = BytesMut::new();
        let mut decoded = Vec::new();
        for piece in bytes.chunks(bytes.len().div_ceil(pieces)) {
            buffer.extend_from_slice(piece);
            while let Some(frame) = Frame::decode(&mut buffer, FRAME_BYTES_MAX).expect("a sound frame") {
                decoded.push(frame);
            }
        }
        prop_assert_eq!(decoded, frames);
        prop_assert!(buffer.is_empty());
    }

    #[test]
    fn a_flipped_bit_is_noticed(frame in frame(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = encoded(&frame);
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        harness::frame(&bytes);
        prop_assert!(!matches!(decode(bytes), Ok(Some(_))), "byte {} may be changed without notice", at);
    }

    #[test]
    fn a_truncated_frame_is_waited_for_and_left_alone(frame in frame(), cut in any::<prop::sample::Index>()) {
        let whole = encoded(&frame);
        let mut bytes = BytesMut::from(&whole[..cut.index(whole.len())]);
        let held = bytes.len();
        prop_assert_eq!(Frame::decode(&mut bytes, FRAME_BYTES_MAX), Ok(None));
        prop_assert_eq!(bytes.len(), held);
    }

    #[test]
    fn an_announced_length_beyond_the_limit_is_refused_before_it_comes(length in FRAME_BYTES_MAX as u32 + 1.., short in 0..36_u32) {
        for length in [length, short] {
            let mut bytes = BytesMut::from(&length.to_le_bytes()[..]);
            let room = bytes.capacity();
            let refused = matches!(Frame::decode(&mut bytes, FRAME_BYTES_MAX), Err(FrameError::Length { .. }));
            prop_assert!(refused && bytes.capacity() <= room);
        }
    }

    #[test]
    fn a_head_length_beyond_the_frame_is_refused(frame in frame(), beyond in 1_u32..) {
        let held = (frame.head.len() + frame.tail.len()) as u32;
        let told = held.saturating_add(beyond);
        let bytes = with_check_right(encoded(&frame), |bytes| bytes[36..40].copy_from_slice(&told.to_le_bytes()));
        prop_assert_eq!(decode(bytes), Err(FrameError::Head(told as usize)));
    }

    #[test]
    fn a_header_that_this_version_cannot_mean_is_refused(frame in frame(), reserved in 1_u16.., version in 2_u8.., over in DEADLINE_MS_MAX + 1..) {
        let changed = |at: usize, new: &[u8]| {
            decode(with_check_right(encoded(&frame), |bytes| bytes[at..at + new.len()].copy_from_slice(new)))
        };
        prop_assert_eq!(changed(8, &[version]), Err(FrameError::Version(version)));
        prop_assert_eq!(changed(8, &[0]), Err(FrameError::Version(0)));
        prop_assert_eq!(changed(9, &[200]), Err(FrameError::Kind(200)));
        prop_assert_eq!(changed(10, &reserved.to_le_bytes()), Err(FrameError::Reserved(reserved)));
        prop_assert_eq!(changed(32, &over.to_le_bytes()), Err(FrameError::Deadline(over)));
    }

    #[test]
    fn lists_that_claim_to_be_huge_are_refused(count in HEAD_BYTES_MAX as u64.., rest in vec(any::<u8>(), 0..40)) {
        let mut bytes = codec::encode(&count).expect("a number");
        bytes.extend_from_slice(&rest);
        harness::message(&bytes);
        prop_assert!(codec::decode::<Vec<RaftMessage>>(&bytes).is_err());
        prop_assert!(codec::decode::<SnapshotChunk>(&bytes).is_err());
        prop_assert!(codec::decode::<ScanDone>(&bytes).is_err());
        prop_assert!(codec::decode::<String>(&bytes).is_err());
        let mut keyed = vec![1];
        keyed.extend_from_slice(&bytes);
        prop_assert!(codec::decode_borrowed::<Get<'_>>(&keyed).is_err());
        prop_assert!(codec::decode_borrowed::<Batch<'_>>(&keyed).is_err());
    }

    #[test]
    fn a_sound_map_is_taken_and_routes(map in sound_map()) {
        prop_assert_eq!(map.check(), Ok(()));
        harness::message(&codec::encode(&MapDone { map, leaders: vec![] }).expect("a small map"));
    }

    #[test]
    fn bits_flipped_in_a_sound_map_never_reach_the_router_unchecked(map in map_done(), at in any::<prop::sample::Index>(), bit in 0..8_u32) {
        let mut bytes = codec::encode(&map).expect("a small map");
        let at = at.index(bytes.len());
        bytes[at] ^= 1 << bit;
        harness::message(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 64, ..ProptestConfig::default() })]

    #[test]
    fn the_handshake_survives_a_round_trip(hello in hello(), welcome in welcome()) {
        round_trip(&hello)?;
        round_trip(&welcome)?;
    }

    #[test]
    fn reads_survive_a_round_trip(scan in scan(), page in scan_done(), version in of(number()), revision in number(), consistency in consistency()) {
        round_trip(&scan)?;
        round_trip(&CountDone { rows: revision, next: page.next.clone() })?;
        round_trip(&page)?;
        round_trip(&GetDone { version, revision, consistency })?;
    }

    #[test]
    fn heads_that_name_a_key_survive_a_round_trip_and_begin_alike(keyspace: u32, key in some_bytes(), consistency in consistency(), ops in batch_ops(), id in of(write_id()), revision in number(), removed: u32, done in batch_done(), txn in txn_id()) {
        let keyspace = KeyspaceId(keyspace);
        let get = codec::encode(&Get { keyspace, key: &key, consistency }).expect("a small head");
        let write = codec::encode(&Write { keyspace, key: &key, condition: Condition::Absent, id }).expect("a small head");
        prop_assert_eq!(codec::decode_borrowed(&get).ok(), Some(Get { keyspace, key: &key, consistency }));
        prop_assert_eq!(codec::decode_borrowed(&write).ok(), Some(Write { keyspace, key: &key, condition: Condition::Absent, id }));
        for head in [get, write] {
            let (prefix, _) = codec::decode_borrowed_prefix::<KeyPrefix<'_>>(&head).expect("a prefix");
            prop_assert_eq!(prefix, KeyPrefix { keyspace, key: &key });
        }
        let batch = Batch { keyspace, ops: ops.iter().map(batch_op).collect(), id };
        let head = codec::encode(&batch).expect("a small head");
        prop_assert_eq!(codec::decode_borrowed(&head).ok(), Some(batch));
        harness::message(&head);
        round_trip(&WriteDone { revision, removed })?;
        round_trip(&done)?;
        let prepare = Prepare { txn, keyspace, ops: ops.iter().map(batch_op).collect() };
        let head = codec::encode(&prepare).expect("a small head");
        prop_assert_eq!(codec::decode_borrowed(&head).ok(), Some(prepare));
        harness::message(&head);
        round_trip(&PrepareDone { removed, rows: done.rows })?;
        round_trip(&Finish { txn, commit: removed % 2 == 0 })?;
        round_trip(&FinishDone { revision })?;
        round_trip(&Resolve { txn })?;
        round_trip(&ResolveDone { commit: removed % 2 == 0 })?;
    }

    #[test]
    fn the_cluster_s_messages_survive_a_round_trip(map in map_done(), create in create_replica(), beat in beat(), to in number(), change in change_replicas()) {
        round_trip(&map)?;
        round_trip(&change)?;
        round_trip(&RemoveReplica { replica: ReplicaId(to) })?;
        round_trip(&create)?;
        round_trip(&beat)?;
        round_trip(&TransferLeader { to: ReplicaId(to) })?;
    }

    #[test]
    fn joins_and_wishes_survive_a_round_trip(join in join(), admin in admin()) {
        round_trip(&join)?;
        round_trip(&admin)?;
    }

    #[test]
    fn statuses_survive_a_round_trip(status in status_done(), node in node_status(), replica in replica_status()) {
        round_trip(&status)?;
        round_trip(&node)?;
        round_trip(&replica)?;
    }

    #[test]
    fn raft_messages_and_snapshots_survive_a_round_trip(messages in vec(raft_message(), 0..4), begin in snapshot_begin(), rows in vec(any::<(u32, u32)>(), 0..20), sent in number()) {
        round_trip(&messages)?;
        round_trip(&begin)?;
        round_trip(&SnapshotChunk { rows })?;
        round_trip(&SnapshotEnd { rows: sent })?;
    }

    #[test]
    fn failures_survive_a_round_trip(failure in failure()) {
        round_trip(&failure)?;
    }
}

/// The files that the fuzz targets begin with, and those that showed something.
#[test]
fn the_corpus_of_frames_and_messages_is_decoded_or_refused() {
    for (target, run) in [("frame", harness::frame as fn(&[u8])), ("message", harness::message)] {
        let folder = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fuzz/corpus").join(target);
        let files: Vec<_> = std::fs::read_dir(&folder).expect("it is kept here").collect();
        assert!(!files.is_empty(), "{} is empty", folder.display());
        for file in files {
            let bytes = std::fs::read(file.expect("a file").path()).expect("it can be read");
            run(&bytes);
            harness::frame_put_right(&bytes);
            if let Some((chosen, head)) = bytes.split_first() {
                harness::DECODERS[usize::from(*chosen) % harness::DECODERS.len()](head);
            }
        }
    }
}

#[test]
fn a_number_wider_than_its_field_is_refused() {
    for wide in [&[253, 1, 0, 0, 0, 0, 0, 0, 0][..], &[254; 17], &[255]] {
        assert!(codec::decode::<u32>(wide).is_err(), "{wide:?}");
        harness::message(wide);
    }
    assert_eq!(codec::decode::<u32>(&[252, 7, 0, 0, 0]).ok(), Some(7), "a longer form than needed is taken");
    assert!(codec::decode::<bool>(&[2]).is_err());
    assert!(codec::decode::<Option<u8>>(&[2, 0]).is_err());
    assert!(codec::decode::<Role>(&[3]).is_err());
    assert!(codec::decode::<String>(&[1, 0xff]).is_err());
}

#[test]
fn a_head_over_its_limit_is_neither_sent_nor_taken() {
    let text = "x".repeat(HEAD_BYTES_MAX);
    let mut out = vec![7];
    assert!(matches!(codec::encode_into(&text, &mut out), Err(CodecError::TooLarge { .. })));
    assert_eq!(out, [7], "what was there before is untouched");
    let frame = Frame::new(Header::new(Kind::Put), vec![0; HEAD_BYTES_MAX + 1], vec![]);
    assert!(!frame.fits());
    assert_eq!(decode(encoded(&frame)), Err(FrameError::Head(HEAD_BYTES_MAX + 1)));
    let frame = Frame::new(Header::new(Kind::Put), vec![0; HEAD_BYTES_MAX], vec![0; FRAME_BYTES_MAX]);
    assert!(!frame.fits());
    assert!(matches!(decode(encoded(&frame)), Err(FrameError::Length { .. })));
}

#[test]
fn before_the_handshake_a_frame_is_small() {
    let largest = Frame::new(Header::new(Kind::Hello), vec![0; HANDSHAKE_BYTES_MAX - HEADER_BYTES + 4], vec![]);
    let mut bytes = encoded(&largest);
    assert_eq!(Frame::decode(&mut bytes, HANDSHAKE_BYTES_MAX), Ok(Some(largest.clone())));
    let larger = Frame::new(largest.header, largest.head, vec![0]);
    let mut bytes = encoded(&larger);
    assert!(matches!(Frame::decode(&mut bytes, HANDSHAKE_BYTES_MAX), Err(FrameError::Length { .. })));
}
