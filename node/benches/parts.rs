//! What the parts of a node cost: an append to the log, with its fdatasync. `cargo bench -p shkv-node`.

use bytes::Bytes;
use criterion::{BatchSize, Criterion, Throughput};
use shkv_node::disk::RealDisk;
use shkv_node::log::{Log, LogEntry, ShardWrite};
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

fn main() {
    let mut criterion = Criterion::default().configure_from_args();
    append(&mut criterion);
    criterion.final_summary();
}
