//! Pages that a node merges from several shards.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

mod common;

use bytes::{Bytes, BytesMut};
use common::shards::{FIRST, SECOND, Shards, THIRD, put};
use common::{CLUSTER, everything, refusal, small};
use shkv_node::Steps;
use shkv_proto::link::CallError;
use shkv_proto::message::{Consistency, CountDone, Failure, Hello, RefusalCode, Role, Scan, ScanDone};
use shkv_proto::{Frame, Header, Kind, ShardId, codec, session};
use tokio::io::AsyncWriteExt;

fn of(with: &[ShardId]) -> Scan {
    Scan { with: with.to_vec(), rows_max: 0, ..everything() }
}

fn keys(page: &ScanDone) -> Vec<&str> {
    page.rows.iter().map(|row| std::str::from_utf8(&row.key).unwrap()).collect()
}

/// A page of one node, for which it waits until that leads all shards and has their leases.
async fn page(shards: &mut Shards, at: usize, shard: ShardId, scan: &Scan) -> (ScanDone, Bytes) {
    for _ in 0..1_000 {
        match shards.ask::<ScanDone>(at, shard, Kind::Scan, scan, b"").await {
            Ok(page) => return page,
            Err(CallError::Failure(Failure::Busy { .. })) => drop(shards.introduce().await),
            Err(error) => panic!("{error}"),
        }
    }
    panic!("it never has their leases");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_merges_the_shards_that_it_leads_and_tells_their_revisions() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    for key in ["zebra", "apple", "kiwi", "aloe", "pear", "mango"] {
        shards.put(key, &key[..2]).await;
    }
    let (all, values) = page(&mut shards, 0, SECOND, &of(&[THIRD, FIRST])).await;
    assert_eq!(keys(&all), ["aloe", "apple", "kiwi", "mango", "pear", "zebra"]);
    assert_eq!((&values[..], &all.next), (&b"alapkimapeze"[..], &None));
    assert_eq!((all.revision, &all.with[..]), (2, &[2, 2][..]));

    // Page by page in reverse, over a part of the range, without values.
    let mut scan = Scan {
        start: b"apple".to_vec(),
        end: Some(b"z".to_vec()),
        reverse: true,
        keys_only: true,
        rows_max: 2,
        ..of(&[SECOND, THIRD])
    };
    let (first, values) = page(&mut shards, 0, FIRST, &scan).await;
    assert_eq!((keys(&first), &values[..]), (vec!["pear", "mango"], &b""[..]));
    scan = scan.resumed(first.next.unwrap());
    let (second, _) = page(&mut shards, 0, FIRST, &scan).await;
    assert_eq!(keys(&second), ["kiwi", "apple"]);
    scan = scan.resumed(second.next.unwrap());
    let (last, _) = page(&mut shards, 0, FIRST, &scan).await;
    assert_eq!((keys(&last), &last.next), (vec![], &None));
    // Who may see an old row, too; and only some of the shards.
    let eventual = Scan { consistency: Consistency::Eventual, ..of(&[THIRD]) };
    assert_eq!(keys(&page(&mut shards, 0, FIRST, &eventual).await.0), ["aloe", "apple", "pear", "zebra"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merged_page_that_cannot_be_is_refused() {
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    shards.put("apple", "a").await;
    let many: Vec<ShardId> = (2..1_000).map(ShardId).collect();
    let causal = Scan { consistency: Consistency::Causal { revision: 1 }, ..of(&[SECOND]) };
    for (scan, text) in
        [(of(&[SECOND, THIRD, SECOND]), "twice"), (of(&[FIRST]), "twice"), (of(&many), "128"), (causal, "revision")]
    {
        let error = shards.ask::<ScanDone>(0, FIRST, Kind::Scan, &scan, b"").await.unwrap_err();
        assert!(error.to_string().contains(text), "{error}");
        assert_eq!(refusal(error), RefusalCode::Malformed);
    }
    let error = shards.ask::<CountDone>(0, FIRST, Kind::Count, &of(&[SECOND]), b"").await.unwrap_err();
    assert_eq!(refusal(error), RefusalCode::Malformed);
    for (shard, scan) in [(FIRST, of(&[SECOND, ShardId(9)])), (ShardId::UNROUTED, of(&[FIRST]))] {
        let error = shards.ask::<ScanDone>(0, shard, Kind::Scan, &scan, b"").await.unwrap_err();
        assert!(matches!(error, CallError::Failure(Failure::WrongShard { .. })), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_merges_no_shard_that_another_leads() {
    let mut shards = Shards::new(3, small(), Steps::default()).await;
    for (key, shard) in [("apple", FIRST), ("kiwi", SECOND), ("zebra", THIRD)] {
        shards.put(key, key).await;
        shards.give(shard, 1).await;
    }
    assert_eq!(keys(&page(&mut shards, 1, FIRST, &of(&[SECOND, THIRD])).await.0), ["apple", "kiwi", "zebra"]);
    shards.give(THIRD, 2).await;
    let error = shards.ask::<ScanDone>(1, FIRST, Kind::Scan, &of(&[SECOND, THIRD]), b"").await.unwrap_err();
    assert!(matches!(error, CallError::Failure(Failure::Busy { .. })), "{error}");
    assert_eq!(keys(&page(&mut shards, 1, FIRST, &of(&[SECOND])).await.0), ["apple", "kiwi"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_count_tells_what_it_has_when_half_of_its_time_is_over() {
    const BATCHES: usize = 3;
    const BATCH_ROWS: usize = 9_000;
    let mut shards = Shards::new(1, small(), Steps::default()).await;
    for batch in 0..BATCHES {
        let keys: Vec<_> = (0..BATCH_ROWS).map(|number| format!("a{batch}{number:04}")).collect();
        let ops: Vec<_> = keys.iter().map(|key| put(key, "")).collect();
        shards.batch(&ops, "", None).await;
    }
    let addr = shards.group.nodes[0].as_ref().unwrap().0.addr().to_string();
    let mut session = session::connect(&addr, &Hello::ours(Some(CLUSTER), Role::Client)).await.unwrap();
    let (mut scan, mut counted, mut answers, mut busy) = (everything(), vec![], vec![], 0);
    loop {
        // A page of rows takes longer than half of a millisecond in a build for tests, and is not given up for it.
        let header = Header { shard: FIRST, deadline_ms: 1, ..Header::new(Kind::Count) };
        let mut bytes = BytesMut::new();
        Frame::new(header, codec::encode(&scan).unwrap(), vec![]).encode(&mut bytes);
        session.writer.write_all(&bytes).await.unwrap();
        assert!(session.reader.next_batch(&mut answers).await.unwrap());
        let answer = answers.pop().unwrap();
        if answer.header.kind != Kind::Done {
            let failure = session::failure_of(&answer);
            assert!(matches!(failure, Failure::Busy { .. }) && busy < 1_000, "{failure}");
            busy += 1; // its lease did not run for a moment
            continue;
        }
        let CountDone { rows, next } = codec::decode(&answer.head).unwrap();
        counted.push(rows);
        match next {
            Some(next) => scan = scan.resumed(next),
            None => break,
        }
    }
    assert_eq!(counted.iter().sum::<u64>(), (BATCHES * BATCH_ROWS) as u64);
    assert!(counted.len() > 1, "{counted:?}: all of it in half of a millisecond?");
}
