//! What the client promises, tried against a fake cluster on real sockets.

#![expect(clippy::disallowed_methods, reason = "a test tells the time")]

mod fake;

use fake::Fake;
use shkv_client::{Check, Client, ClientConfig, Consistency, Error, RefusalCode};
use std::sync::atomic::Ordering;
use std::time::Duration;

#[tokio::test]
async fn a_row_written_is_read_back_and_deleted_by_way_of_its_node() {
    let (fake, addr) = Fake::start(4, true).await;
    let client = Client::connect([addr]).await.unwrap();
    let written = client.put("k", "v").await.unwrap();
    let row = client.get("k").await.unwrap().unwrap();
    assert_eq!((&row.value[..], row.version), (&b"v"[..], written.version));
    assert_eq!(client.get("k").answer().await.unwrap().consistency, Consistency::Linearizable);
    assert_eq!(client.delete("k").await.unwrap().removed, 1);
    assert_eq!(client.get("k").await.unwrap(), None);
    assert_eq!(fake.writes_at_nodes.load(Ordering::SeqCst), 2);
    assert_eq!(fake.writes_at_balancer.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_node_that_cannot_be_reached_is_reached_through_the_balancer() {
    let (fake, addr) = Fake::start(4, false).await;
    let client = Client::connect([addr]).await.unwrap();
    for n in 0..10_u8 {
        client.put([n], "v").await.unwrap();
    }
    let done = client.batch().put("a", "1").put("b", "2").put("c", "3").await.unwrap();
    assert_eq!((done.removed, done.rows), (0, vec![]));
    assert_eq!(client.count(..).await.unwrap(), 13);
    assert_eq!(fake.writes_at_nodes.load(Ordering::SeqCst), 0);
    assert!(fake.writes_at_balancer.load(Ordering::SeqCst) >= 11);
}

#[tokio::test]
async fn through_balancer_never_talks_to_a_node() {
    let (fake, addr) = Fake::start(4, true).await;
    let config = ClientConfig { through_balancer: true, ..ClientConfig::default() };
    let client = Client::connect_with([addr], config).await.unwrap();
    client.put("k", "v").await.unwrap();
    assert!(client.get("k").await.unwrap().is_some());
    assert_eq!(client.count(..).await.unwrap(), 1);
    let mut rows = client.scan(..).rows();
    assert_eq!(rows.next().await.unwrap().unwrap().key, "k");
    assert_eq!(rows.next().await.unwrap(), None);
    assert_eq!(fake.writes_at_nodes.load(Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_write_whose_answer_is_lost_is_sent_again_and_done_once() {
    for through_balancer in [false, true] {
        let (fake, addr) = Fake::start(4, true).await;
        let config = ClientConfig { through_balancer, ..ClientConfig::default() };
        let client = Client::connect_with([addr], config).await.unwrap();
        let first = client.put("k", "v").await.unwrap();
        fake.lose_answers.store(3, Ordering::SeqCst);
        let second = client.put("k", "w").if_version(first.version).await.unwrap();
        assert_eq!(second.version, first.version + 1, "done once");
        let ids = fake.ids.lock().clone();
        assert_eq!(ids.len(), 5);
        assert_eq!((ids[0].sequence, ids[0].answered, ids[0].age_ms), (1, 0, 0));
        assert_eq!((ids[1].sequence, ids[1].answered, ids[1].age_ms), (2, 1, 0));
        assert!(ids[2..].iter().all(|id| (id.client, id.sequence) == (ids[0].client, 2) && id.age_ms > 0), "{ids:?}");
        assert_eq!(&client.get("k").await.unwrap().unwrap().value[..], b"w");
    }
}

#[tokio::test]
async fn an_outcome_is_unknown_only_when_no_answer_was_had_before_the_deadline() {
    let (fake, addr) = Fake::start(4, true).await;
    let client = Client::connect([addr]).await.unwrap();
    client.put("k", "v").await.unwrap();
    fake.lose_answers.store(u32::MAX, Ordering::SeqCst);
    let error = client.put("k", "w").deadline(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, Error::Unknown { .. }), "{error}");
    fake.lose_answers.store(0, Ordering::SeqCst);
    assert_eq!(&client.get("k").await.unwrap().unwrap().value[..], b"w");
    client.put("k", "x").await.unwrap();
    let last = *fake.ids.lock().last().unwrap();
    assert_eq!((last.sequence, last.answered), (3, 2), "a write that was told as unknown is not sent again");
}

#[tokio::test]
async fn a_condition_that_does_not_hold_tells_the_version_that_there_is() {
    let (_fake, addr) = Fake::start(4, true).await;
    let client = Client::connect([addr]).await.unwrap();
    let version = client.put("k", "v").if_absent().await.unwrap().version;
    let refused = |version| Err(Error::Condition { operation: 0, version });
    assert_eq!(client.put("k", "w").if_absent().await, refused(Some(version)));
    assert_eq!(client.put("other", "w").if_present().await, refused(None));
    assert_eq!(client.put("k", "w").if_version(version + 1).await, refused(Some(version)));
    assert_eq!(client.delete("k").if_value("w").await, refused(Some(version)));
    assert_eq!(client.delete("other").if_version(version).await, refused(None));
    client.put("k", "w").if_value("v").await.unwrap();
    assert_eq!(client.delete("k").if_present().await.unwrap().removed, 1);
}

#[tokio::test]
async fn a_transaction_checks_reads_and_writes_in_one_step() {
    let (fake, addr) = Fake::start(5, true).await;
    let client = Client::connect([addr]).await.unwrap();
    client.batch().put("a", "1").put("b", "2").await.unwrap();
    fake.lose_answers.store(1, Ordering::SeqCst);
    fake.abort_next.store(4, Ordering::SeqCst);
    let done = client.txn().read("none").check("z", Check::Absent).read("b").put("c", "3").delete("a");
    let done = done.commit().await.unwrap();
    assert_eq!((done.removed, done.rows.len()), (1, 2));
    assert_eq!((&done.rows[0], &done.row("b").unwrap().value[..]), (&None, &b"2"[..]));
    let refused = client.txn().put("d", "4").check("c", Check::Value("3".into())).delete_if("b", Check::Absent);
    let version = client.get("b").await.unwrap().unwrap().version;
    assert_eq!(refused.commit().await, Err(Error::Condition { operation: 2, version: Some(version) }));
    assert_eq!(client.get("d").await.unwrap(), None);
}

#[tokio::test]
async fn a_transaction_that_is_always_in_the_way_of_others_is_not_done_at_its_deadline() {
    let (fake, addr) = Fake::start(2, true).await;
    let client = Client::connect([addr]).await.unwrap();
    fake.abort_next.store(u32::MAX, Ordering::SeqCst);
    let error = client.txn().put("a", "1").deadline(Duration::from_millis(200)).commit().await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
    assert!(fake.ids.lock().len() > 1, "it was tried again");
}

#[tokio::test]
async fn what_is_wrong_with_a_transaction_is_refused_by_its_operation_before_anything_is_sent() {
    let (fake, addr) = Fake::start(2, true).await;
    let client = Client::connect([addr]).await.unwrap();
    let before = fake.requests.load(Ordering::SeqCst);
    let long_key = vec![0; client.limits().key_bytes_max as usize + 1];
    let long_value = vec![0; client.limits().value_bytes_max as usize + 1];
    let compared = Check::Value(vec![0; (1 << 20) + 1].into());
    let wrong = [
        (client.txn(), RefusalCode::BatchLimits, "empty"),
        (client.txn().put("a", "1").read("b").check("a", Check::Absent), RefusalCode::BatchLimits, "operation 2"),
        (client.txn().put("a", "1").delete(""), RefusalCode::KeyEmpty, "operation 1"),
        (client.txn().read("a").read(&long_key), RefusalCode::KeyTooLarge, "operation 1"),
        (client.txn().read("a").put("b", long_value), RefusalCode::ValueTooLarge, "operation 1"),
        (client.txn().read("a").read("b").check("c", compared.clone()), RefusalCode::ValueTooLarge, "operation 2"),
    ];
    for (txn, code, item) in wrong {
        let error = txn.commit().await.unwrap_err();
        assert_eq!(error.code(), Some(code), "{error}");
        assert!(error.to_string().contains(item), "{error}");
    }
    let Check::Value(compared) = compared else { panic!("it is a value") };
    let error = client.put("k", "v").if_value(compared).await.unwrap_err();
    assert_eq!(error.code(), Some(RefusalCode::ValueTooLarge), "{error}");
    assert_eq!(fake.requests.load(Ordering::SeqCst), before);
}

#[tokio::test]
async fn what_the_limits_forbid_is_refused_before_anything_is_sent() {
    let (fake, addr) = Fake::start(2, true).await;
    let client = Client::connect([addr]).await.unwrap();
    let before = fake.requests.load(Ordering::SeqCst);
    let limits = client.limits();
    let code = |result: Result<_, Error>| match result {
        Ok(()) => panic!("not refused"),
        Err(error) => error.code().expect("a refusal"),
    };
    let long_key = vec![0; limits.key_bytes_max as usize + 1];
    assert_eq!(code(client.put("", "v").await.map(drop)), RefusalCode::KeyEmpty);
    assert_eq!(code(client.get(&long_key).await.map(drop)), RefusalCode::KeyTooLarge);
    let long_value = vec![0; limits.value_bytes_max as usize + 1];
    let error = client.put("k", long_value).await.unwrap_err();
    assert!(error.to_string().contains("VALUE_BYTES_MAX = 16777216"), "{error}");
    assert_eq!(code(client.batch().await.map(drop)), RefusalCode::BatchLimits);
    assert_eq!(code(client.batch().put("a", "1").delete("a").await.map(drop)), RefusalCode::BatchLimits);
    let mut large = client.batch();
    for n in 0..=limits.batch_ops_max {
        large = large.delete(n.to_be_bytes());
    }
    assert_eq!(code(large.await.map(drop)), RefusalCode::BatchLimits);
    let bytes = limits.batch_bytes_max as usize;
    assert_eq!(code(client.batch().put("a", vec![0; bytes]).await.map(drop)), RefusalCode::BatchLimits);
    assert_eq!(fake.requests.load(Ordering::SeqCst), before);
    assert_eq!(code(client.keyspace("nobody").await.map(drop)), RefusalCode::UnknownKeyspace);
}

#[tokio::test]
async fn a_scan_gives_every_row_once_in_order_both_ways_and_goes_on_at_its_cursor() {
    let (fake, addr) = Fake::start(5, true).await;
    let client = Client::connect([addr]).await.unwrap();
    let mut batch = client.batch();
    let keys: Vec<Vec<u8>> = (0..500_u32).map(|n| format!("key/{n:04}").into_bytes()).collect();
    for key in &keys {
        batch = batch.put(key, key.clone());
    }
    batch.put("other", "x").await.unwrap();
    for (reverse, page_bytes) in [(false, 1), (true, 1), (false, 100), (true, 1_000), (false, 1 << 20)] {
        let scan = || {
            let scan = client.scan(..).prefix("key/").page_bytes(page_bytes);
            if reverse { scan.reverse() } else { scan }
        };
        let mut expected = keys.clone();
        if reverse {
            expected.reverse();
        }
        let mut rows = scan().rows();
        let mut found = Vec::new();
        while let Some(row) = rows.next().await.unwrap() {
            assert_eq!(row.key, row.value);
            found.push(row.key.to_vec());
        }
        assert_eq!(found, expected);
        assert_eq!(rows.cursor(), None);
        let mut first = scan().limit(123).keys_only().rows();
        let mut found = Vec::new();
        while let Some(row) = first.next().await.unwrap() {
            assert!(row.value.is_empty());
            found.push(row.key.to_vec());
        }
        assert_eq!(found, expected[..123]);
        let rest = client.scan(first.cursor().unwrap());
        let mut rest = if reverse { rest.reverse() } else { rest }.rows();
        assert_eq!(rest.next().await.unwrap().unwrap().key, expected[123]);
    }
    // Of few rows each node is asked once; if it merges nothing, each of its shards is.
    for (apart, asked) in [(false, 1), (true, 1 + 5)] {
        fake.apart.store(apart, Ordering::SeqCst);
        let (before, merged) = (fake.requests.load(Ordering::SeqCst), fake.merged.load(Ordering::SeqCst));
        let mut rows = client.scan("key/0100"..).limit(100).rows();
        let mut found = Vec::new();
        while let Some(row) = rows.next().await.unwrap() {
            found.push(row.key.to_vec());
        }
        assert_eq!(found, keys[100..200]);
        let pages = fake.requests.load(Ordering::SeqCst) - before;
        assert!(if apart { pages >= asked } else { pages == asked }, "{pages} requests");
        assert_eq!(fake.merged.load(Ordering::SeqCst) - merged, u32::from(!apart));
    }
    // Nor are causal reads merged: each shard has its own revision.
    fake.apart.store(false, Ordering::SeqCst);
    let merged = fake.merged.load(Ordering::SeqCst);
    let mut rows = client.scan("key/0100"..).consistency(Consistency::Causal).limit(1).rows();
    assert_eq!(rows.next().await.unwrap().unwrap().key, keys[100]);
    assert_eq!(fake.merged.load(Ordering::SeqCst), merged);
    assert_eq!(client.count("key/".."key0").await.unwrap(), 500);
    assert_eq!(client.count("key/0010"..="key/0019").await.unwrap(), 10);
    assert_eq!(client.count("b".."a").await.unwrap(), 0);
}

#[tokio::test]
async fn a_causal_read_carries_what_another_client_has_seen() {
    let (fake, addr) = Fake::start(3, true).await;
    let writer = Client::connect([addr.clone()]).await.unwrap();
    let reader = Client::connect([addr]).await.unwrap();
    let written = writer.put("k", "v").await.unwrap();
    let text = writer.token().to_string();
    reader.observe(&text.parse().unwrap());
    let answer = reader.get("k").consistency(Consistency::Causal).answer().await.unwrap();
    assert_eq!(answer.consistency, Consistency::Causal);
    assert_eq!(*fake.causal_revision.lock(), Some(written.version));
}

#[tokio::test]
async fn nobody_at_the_address_is_unavailable_at_once() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    drop(listener);
    let error = Client::connect([addr.clone()]).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable { text } if text.contains(&addr)), "{error}");
}

#[tokio::test]
async fn another_cluster_than_the_one_meant_is_not_talked_to() {
    let (_fake, addr) = Fake::start(1, true).await;
    let config = ClientConfig { cluster: Some(shkv_proto::ClusterId(8)), ..ClientConfig::default() };
    let error = Client::connect_with([addr], config).await.unwrap_err();
    assert!(error.to_string().contains("cluster"), "{error}");
}

#[tokio::test]
async fn a_node_that_moved_is_found_again() {
    let (fake, addr) = Fake::start(1, false).await;
    let client = Client::connect([addr]).await.unwrap();
    let (moved, _) = Fake::start(1, true).await; // its node answers as node 1 of the same cluster, elsewhere
    fake.map.lock().nodes = moved.map.lock().nodes.clone();
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    while moved.writes_at_nodes.load(Ordering::SeqCst) == 0 {
        client.put("k", "v").await.unwrap();
        assert!(tokio::time::Instant::now() < until, "the node's new address was never used");
    }
}

#[tokio::test]
async fn when_neither_node_nor_balancer_is_there_a_call_ends_at_its_deadline_as_not_done() {
    let (fake, addr) = Fake::start(1, false).await;
    let client = Client::connect([addr]).await.unwrap();
    fake.close.send_replace(());
    let until = tokio::time::Instant::now() + Duration::from_secs(20);
    // A put that meets the connection as it goes is unknown; once it is gone, a put is certainly not done.
    while let Error::Unknown { text } = client.put("k", "v").deadline(Duration::from_millis(300)).await.unwrap_err() {
        assert!(tokio::time::Instant::now() < until, "{text}");
    }
    let error = client.put("k", "v").deadline(Duration::from_millis(300)).await.unwrap_err();
    assert!(matches!(error, Error::Unavailable { .. }), "{error}");
}
