//! Batches over several shards on three nodes in one process: done wholly or not at all, once, whoever crashes when.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use common::shards::{FIRST, SECOND, Shards, THIRD, again, first_time, put};
use common::{refusal, small};
use shkv_node::Steps;
use shkv_proto::link::CallError;
use shkv_proto::message::{BatchOp, Condition, Failure, RefusalCode, RowRead};

fn read(key: &str) -> BatchOp<'_> {
    BatchOp::Read { key: key.as_bytes() }
}

fn check<'a>(key: &'a str, condition: Condition<'a>) -> BatchOp<'a> {
    BatchOp::Check { key: key.as_bytes(), condition }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_over_three_shards_reads_checks_and_writes_in_one_step() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    shards.put("apple", "old-a").await;
    let version = shards.put("kiwi", "old-k").await;
    shards.put("zebra", "old-z").await;
    let ops = [
        put("pear", "new-p"),
        read("zebra"),
        put("lime", "new-l"),
        read("apple"),
        check("kiwi", Condition::Version(version)),
        BatchOp::Delete { key: b"berry", condition: Condition::Absent },
        read("nothing"),
        put("aloe", "new-a"),
    ];
    let told = shards.batch(&ops, "new-pnew-lnew-a", None).await;
    assert_eq!(&told.values[..], b"old-zold-a");
    let row = |version| Some(RowRead { version, value_bytes: 5 });
    assert_eq!(told.done.rows, [row(1), row(1), None]);
    assert_eq!(told.done.removed, 0);
    assert_eq!(told.done.revisions, [(FIRST, 3), (SECOND, 2), (THIRD, 2)]);
    for (key, value) in [("pear", "new-p"), ("lime", "new-l"), ("aloe", "new-a"), ("kiwi", "old-k")] {
        assert_eq!(shards.get(key).await.as_deref(), Some(value), "{key}");
    }
    // One whose condition does not hold, in whichever shard, does nothing and says which.
    let ops = [put("apple", "x"), put("pear", "y"), check("kiwi", Condition::Absent)];
    let failed = shards.try_batch(&ops, "xy", None).await.unwrap_err();
    assert_eq!(failed, CallError::Failure(Failure::Condition { operation: 2, version: Some(version) }));
    let ops = [put("pear", "y"), check("apple", Condition::Absent), put("kiwi", "x")];
    let failed = shards.try_batch(&ops, "yx", None).await.unwrap_err();
    assert_eq!(failed, CallError::Failure(Failure::Condition { operation: 1, version: Some(1) }));
    assert_eq!(shards.get("pear").await.as_deref(), Some("new-p"));
    assert_eq!(shards.get("apple").await.as_deref(), Some("old-a"));
    shards.put("kiwi", "free").await; // no lock is left
    shards.put("pear", "free").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_comes_twice_is_done_once_and_answered_alike() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    shards.put("kiwi", "0").await;
    let ops = [read("kiwi"), put("apple", "1"), put("pear", "2")];
    let id = first_time(7, 1);
    let told = shards.batch(&ops, "12", Some(id)).await;
    shards.put("apple", "between").await;
    shards.put("kiwi", "between").await;
    assert_eq!(shards.batch(&ops, "12", Some(again(id))).await, told);
    assert_eq!(shards.get("apple").await.as_deref(), Some("between"));
    // A new leader answers the same.
    let to = (shards.leader(FIRST).await + 1) % 3;
    shards.give(FIRST, to).await;
    assert_eq!(shards.batch(&ops, "12", Some(again(id))).await, told);
    assert_eq!(shards.get("apple").await.as_deref(), Some("between"));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_that_cannot_be_is_refused_before_anything_is_written() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    let cases: [(&[BatchOp<'_>], &str, RefusalCode, &str); 4] = [
        (&[put("a", "1"), put("z", "2"), put("a", "3")], "123", RefusalCode::BatchLimits, "operation 2"),
        (&[put("a", "1"), put("", "2")], "12", RefusalCode::KeyEmpty, "operation 1"),
        (&[put("a", "1"), put("z", "2")], "1", RefusalCode::Malformed, "1 bytes"),
        (&[put("a", "1"), read("z"), check("z", Condition::Present)], "1", RefusalCode::BatchLimits, "operation 2"),
    ];
    for (ops, values, code, text) in cases {
        let error = shards.try_batch(ops, values, None).await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(refusal(error), code);
    }
    assert_eq!(shards.get("a").await, None);
}
