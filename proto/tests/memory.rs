//! What the most expensive head costs to decode. Alone in its process, because it looks at the process's memory.
#![cfg(target_os = "linux")]

use shkv_proto::codec;
use shkv_proto::limits::HEAD_BYTES_MAX;
use shkv_proto::message::{Batch, Beat, MapDone, RaftMessage, ScanDone, SnapshotChunk, StatusDone};
use std::hint::black_box;

/// Bytes of memory that a head of the largest size may take while it is decoded.
const DECODE_BYTES_MAX: usize = 10 * HEAD_BYTES_MAX;

/// A head's name, the bytes before its list, and what decodes it.
type Case = (&'static str, &'static [u8], fn(&[u8]));

/// The most memory that the process has had since this was last called, in bytes.
fn peak() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").expect("the process's status");
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).expect("a peak");
    let kib: usize = line.trim().trim_end_matches(" kB").parse().expect("a number");
    std::fs::write("/proc/self/clear_refs", "5").expect("resetting the peak");
    kib << 10
}

fn decode<T: serde::de::DeserializeOwned>(bytes: &[u8]) {
    black_box(codec::decode::<T>(bytes).is_ok());
}

#[test]
fn a_list_of_the_cheapest_items_costs_no_more_than_a_named_limit() {
    // Each is a list, behind what comes before it in its head, of as many items as there can be, all bytes alike.
    let decoders: [Case; 7] = [
        ("ScanDone", &[], decode::<ScanDone>),
        ("Batch", &[1], |bytes| {
            let batch = codec::decode_borrowed::<Batch<'_>>(bytes);
            black_box(batch.is_ok());
        }),
        ("MapDone", &[0, 0], decode::<MapDone>),
        ("Beat", &[], decode::<Beat>),
        ("StatusDone", &[0, 0, 0], decode::<StatusDone>),
        ("Raft", &[], decode::<Vec<RaftMessage>>),
        ("SnapshotChunk", &[], decode::<SnapshotChunk>),
    ];
    for (name, before, decode) in decoders {
        for (count, fill) in [(HEAD_BYTES_MAX as u64, 0), (500_000, 1)] {
            let mut bytes = before.to_vec();
            bytes.extend(codec::encode(&count).expect("a number"));
            bytes.resize(HEAD_BYTES_MAX, fill);
            peak();
            let base = peak();
            decode(&bytes);
            let cost = peak().saturating_sub(base);
            assert!(cost <= DECODE_BYTES_MAX, "{name}, a list of {count}: {cost} bytes");
        }
    }
}
