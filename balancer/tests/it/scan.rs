//! Scans and counts over all shards look like those over one.

use crate::fake::KEYSPACE;
use crate::setup::{ask, put, setup};
use shkv_balancer::Bootstrap;
use shkv_proto::link::{Link, done_or_failure};
use shkv_proto::merge::{Page, Row};
use shkv_proto::message::{Consistency, CountDone, Failure, RefusalCode, Scan, ScanDone};
use shkv_proto::{KeyspaceId, Kind, ShardId, codec};
use std::collections::BTreeMap;

const LAYOUT: Bootstrap = Bootstrap { shards: 8, replicas: 3 };

fn whole() -> Scan {
    Scan {
        keyspace: KEYSPACE,
        start: vec![],
        end: None,
        reverse: false,
        keys_only: false,
        rows_max: 0,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
        with: vec![],
    }
}

async fn page(client: &Link, scan: &Scan) -> Result<(Vec<Row>, Option<Vec<u8>>), Failure> {
    let head = codec::encode(scan).unwrap();
    let answer = done_or_failure(ask(client, Kind::Scan, ShardId::UNROUTED, head, vec![]).await)?;
    let page = Page::decode(&answer.head, answer.tail).unwrap();
    Ok((page.rows, page.next))
}

/// All pages of a scan, each checked against the bounds that were asked for.
async fn pages(client: &Link, mut scan: Scan) -> Vec<Row> {
    let mut all = Vec::new();
    loop {
        let (rows, next) = page(client, &scan).await.unwrap();
        if scan.rows_max > 0 {
            assert!(rows.len() <= scan.rows_max as usize);
        }
        if scan.bytes_max > 0 {
            let but_one: usize = rows.iter().rev().skip(1).map(|row| row.key.len() + row.value.len()).sum();
            assert!(but_one < scan.bytes_max as usize);
        }
        assert!(!rows.is_empty() || next.is_none(), "a page without rows does not end the scan");
        all.extend(rows);
        match next {
            None => return all,
            Some(next) => scan = scan.resumed(next),
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_merged_scan_is_the_sorted_union_in_both_directions() {
    let setup = setup(3, LAYOUT).await;
    let mut rows = BTreeMap::new();
    for n in 0..80_u32 {
        let key = format!("key/{:03}", n * 17 % 1_000).into_bytes();
        let value = vec![n as u8; (n % 50) as usize];
        put(&setup.client, &key, &value).await.unwrap();
        rows.insert(key, value);
    }
    rows.insert(vec![0], vec![]); // the smallest keys there are, and the largest
    rows.insert(vec![0, 0], b"x".to_vec());
    rows.insert(vec![0xff; 9], b"y".to_vec());
    for (key, value) in rows.iter().filter(|(key, _)| key[0] == 0 || key[0] == 0xff) {
        put(&setup.client, key, value).await.unwrap();
    }
    let ranges: [(&[u8], Option<&[u8]>); 4] =
        [(b"", None), (b"key/1", Some(b"key/7")), (b"key/100", Some(b"key/100")), (b"zzz", None)];
    for (start, end) in ranges {
        for (rows_max, bytes_max) in [(0, 0), (7, 0), (1, 0), (0, 100), (1_000, 1)] {
            for (reverse, keys_only) in [(false, false), (true, false), (false, true), (true, true)] {
                let (start, end) = (start.to_vec(), end.map(<[u8]>::to_vec));
                let scan = Scan { start, end, reverse, keys_only, rows_max, bytes_max, ..whole() };
                let case = format!("{scan:?}");
                let in_range = |key: &Vec<u8>| *key >= scan.start && scan.end.as_ref().is_none_or(|end| key < end);
                let mut expected: Vec<(Vec<u8>, Vec<u8>)> = rows
                    .iter()
                    .filter(|(key, _)| in_range(key))
                    .map(|(key, value)| (key.clone(), if keys_only { vec![] } else { value.clone() }))
                    .collect();
                if reverse {
                    expected.reverse();
                }
                let found: Vec<(Vec<u8>, Vec<u8>)> = pages(&setup.client, scan)
                    .await
                    .into_iter()
                    .map(|row| (row.key.to_vec(), row.value.to_vec()))
                    .collect();
                assert_eq!(found, expected, "{case}");
            }
        }
        let head = codec::encode(&Scan { start: start.to_vec(), end: end.map(<[u8]>::to_vec), ..whole() }).unwrap();
        let answer = ask(&setup.client, Kind::Count, ShardId::UNROUTED, head, vec![]).await;
        let counted: CountDone = codec::decode(&done_or_failure(answer).unwrap().head).unwrap();
        let expected = rows.range(start.to_vec()..).filter(|(key, _)| end.is_none_or(|end| &key[..] < end)).count();
        assert_eq!(counted, CountDone { rows: expected as u64, next: None });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_of_few_rows_is_merged_by_the_nodes_or_else_asked_of_each_shard() {
    let setup = setup(3, LAYOUT).await;
    for n in 0..60_u8 {
        put(&setup.client, &[n], b"v").await.unwrap();
    }
    let scan = || Scan { start: vec![10], rows_max: 20, ..whole() };
    let expected: Vec<Vec<u8>> = (10..60).map(|n| vec![n]).collect();
    let found = |rows: Vec<Row>| rows.into_iter().map(|row| row.key.to_vec()).collect::<Vec<_>>();
    assert_eq!(found(pages(&setup.client, scan()).await), expected);
    let merged = setup.world.merged();
    assert!(merged >= 3, "each of three pages of at least one node: {merged}");
    // Another node leads a shard, which the balancer does not know: whoever led it merges nothing.
    setup.world.mute_beats();
    let (one, other) = (setup.world.shard_of(&[20]), setup.world.leads());
    let new = *other.keys().find(|node| **node != setup.world.leader(one)).unwrap();
    setup.world.set_leader(one, new);
    assert_eq!(found(pages(&setup.client, scan()).await), expected);
    assert!(setup.world.merged() > merged, "it is known by then");
    // Pages of many rows are read by each shard for itself.
    let merged = setup.world.merged();
    assert_eq!(found(pages(&setup.client, Scan { rows_max: 0, ..scan() }).await), expected);
    assert_eq!(setup.world.merged(), merged);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_of_one_shard_gives_its_rows_and_its_revision() {
    let setup = setup(3, LAYOUT).await;
    for n in 0..50_u8 {
        put(&setup.client, &[n], b"v").await.unwrap();
    }
    let here = setup.world.shard_of(&[0]);
    let head = codec::encode(&Scan { rows_max: 100, ..whole() }).unwrap();
    let answer = done_or_failure(ask(&setup.client, Kind::Scan, here, head, vec![]).await).unwrap();
    let done: ScanDone = codec::decode(&answer.head).unwrap();
    let expected: Vec<Vec<u8>> = (0..50).map(|n| vec![n]).filter(|key| setup.world.shard_of(key) == here).collect();
    assert_eq!(done.rows.iter().map(|row| row.key.clone()).collect::<Vec<_>>(), expected);
    assert_eq!(done.revision, expected.len() as u64);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_scan_of_no_keyspace_and_one_that_names_shards_beside_its_own_are_refused() {
    let setup = setup(3, LAYOUT).await;
    let failure = page(&setup.client, &Scan { keyspace: KeyspaceId(9), ..whole() }).await.unwrap_err();
    assert!(matches!(failure, Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }), "{failure}");
    let failure = page(&setup.client, &Scan { with: vec![ShardId(2)], ..whole() }).await.unwrap_err();
    assert!(matches!(failure, Failure::Refusal { code: RefusalCode::Malformed, .. }), "{failure}");
}
