//! What the parts of a node cost: an append to the log, with its fdatasync; an entry that is applied; a row that is looked up,
//! and a page of rows, in memory and in redb. `cargo bench -p shkv-node`.

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use shkv_node::disk::RealDisk;
use shkv_node::log::{Log, LogEntry, ShardWrite};
use shkv_node::parts::ShardRows;
use shkv_proto::NodeId;
use std::sync::Arc;

/// Bytes of an entry with one put of the benchmarks of the whole.
const ENTRY_BYTES: usize = 160;
/// Bytes of a segment.
const SEGMENT_BYTES: u64 = 64 << 20;
/// How many entries one append has.
const SIZES: [u64; 3] = [1, 16, 256];

fn entry(index: u64) -> LogEntry {
    LogEntry { index, term: 1, kind: 0, data: Bytes::from(vec![7; ENTRY_BYTES]) }
}

fn append(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("log");
    for size in SIZES {
        let folder = tempfile::tempdir().expect("a folder for the log");
        let (log, _) =
            Log::open(Arc::new(RealDisk(folder.path().to_owned())), NodeId(1), SEGMENT_BYTES).expect("a log");
        let mut next = 1;
        group.throughput(Throughput::Elements(size));
        group.bench_function(format!("append and sync {size}"), |bencher| {
            let make = || {
                let entries = (next..next + size).map(entry).collect();
                next += size;
                [ShardWrite { shard: 1, entries, ..ShardWrite::default() }]
            };
            bencher.iter_batched(
                make,
                |writes| log.append(&writes).expect("room on the disk"),
                BatchSize::PerIteration,
            );
        });
    }
    group.finish();
}

/// Rows that there are.
const ROWS: u64 = 100_000;
/// Rows of a page.
const PAGE_ROWS: u32 = 100;
/// Bytes of redb's cache.
const CACHE_BYTES: usize = 64 << 20;

fn key(number: u64) -> [u8; 24] {
    let mut key = *b"user00000000000000000000";
    let digits = format!("{:020}", number.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    key[4..].copy_from_slice(digits.as_bytes());
    key
}

/// An entry that puts so many rows, beginning with this one.
fn puts(first: u64, count: u64) -> Bytes {
    let keys: Vec<_> = (first..first + count).map(|number| key(number % ROWS)).collect();
    let puts: Vec<(&[u8], &[u8])> = keys.iter().map(|key| (&key[..], &[7; 100][..])).collect();
    ShardRows::entry(&puts, 1, first + 1).expect("keys that are short")
}

fn filled(folder: &std::path::Path) -> ShardRows {
    let mut rows = ShardRows::new(folder, CACHE_BYTES).expect("room on the disk");
    for first in (0..ROWS).step_by(1_000) {
        rows.apply(&puts(first, 1_000)).expect("a sound entry");
    }
    rows
}

fn rows(criterion: &mut Criterion) {
    let folder = tempfile::tempdir().expect("a folder for the rows");
    let mut rows = filled(folder.path());
    let mut next = ROWS;
    let mut group = criterion.benchmark_group("rows");
    for size in SIZES {
        group.throughput(Throughput::Elements(size));
        group.bench_function(format!("apply an entry of {size}"), |bencher| {
            let make = || {
                next += size;
                puts(next - size, size)
            };
            bencher.iter_batched(make, |entry| rows.apply(&entry).expect("a sound entry"), BatchSize::SmallInput);
        });
    }
    for place in ["memory", "redb"] {
        if place == "redb" {
            rows.flush().expect("room on the disk");
        }
        group.throughput(Throughput::Elements(1));
        group.bench_function(format!("get from {place}"), |bencher| {
            bencher.iter(|| {
                next += 1;
                rows.has(&key(next * 7 % ROWS)).expect("a sound file")
            });
        });
        group.throughput(Throughput::Elements(u64::from(PAGE_ROWS)));
        group.bench_function(format!("page from {place}"), |bencher| {
            bencher.iter(|| {
                next += 1;
                rows.page(&key(next * 7 % ROWS), PAGE_ROWS).expect("a sound file")
            });
        });
    }
    group.finish();
}

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    append(&mut criterion);
    rows(&mut criterion);
    criterion.final_summary();
}
