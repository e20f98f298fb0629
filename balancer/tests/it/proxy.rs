//! What the balancer does with requests, whether the nodes behave or not.

use crate::fake::{KEYSPACE, Order, PATIENCE};
use crate::setup::{Setup, ask, client, get, put, setup};
use shkv_balancer::Bootstrap;
use shkv_proto::link::done_or_failure;
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Beat, Condition, Consistency, Failure, Get, Hello, RefusalCode, Role, StatusDone, Write,
    WriteId,
};
use shkv_proto::{Epoch, Frame, Header, KeyspaceId, Kind, NodeId, ShardId, codec};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

const LAYOUT: Bootstrap = Bootstrap { shards: 8, replicas: 3 };
const KEY: &[u8] = b"a key";

/// The node that leads the shard of [`KEY`], and another one.
fn leader_and_other(setup: &Setup) -> (NodeId, NodeId) {
    let leader = setup.world.leader(setup.world.shard_of(KEY));
    (leader, setup.nodes.iter().map(|node| node.id).find(|id| *id != leader).unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn head_and_tail_are_forwarded_byte_for_byte() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    for size in [0, 100, 3_000_000] {
        let value: Vec<u8> = (0..size).map(|n: u32| ((n * 31) >> 3) as u8).collect();
        let head =
            codec::encode(&Write { keyspace: KEYSPACE, key: KEY, condition: Condition::Always, id: None }).unwrap();
        let answer = ask(&setup.client, Kind::Put, ShardId::UNROUTED, head.clone(), value.clone()).await;
        assert_eq!(answer.header.kind, Kind::Done);
        let seen = setup.node(leader).seen(Kind::Put).pop().unwrap();
        assert_eq!((&seen.head[..], &seen.tail[..]), (&head[..], &value[..]));
        assert_eq!(seen.header.shard, setup.world.shard_of(KEY));
        assert!(seen.header.epoch > Epoch::NONE && seen.header.deadline_ms > 0);
        let back = get(&setup.client, KEY, Consistency::Linearizable).await.unwrap().unwrap();
        assert!(back == value, "a value of {size} bytes came back otherwise");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn not_leader_is_followed_and_remembered() {
    let setup = setup(3, LAYOUT).await;
    let (old, new) = leader_and_other(&setup);
    setup.world.mute_beats();
    setup.world.set_leader(setup.world.shard_of(KEY), new);
    for _ in 0..3 {
        put(&setup.client, KEY, b"v").await.unwrap();
    }
    assert_eq!(setup.node(old).seen(Kind::Put).len(), 1, "asked once, then no more");
    assert_eq!(setup.node(new).seen(Kind::Put).len(), 3);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_hint_the_other_replicas_are_tried() {
    let setup = setup(3, LAYOUT).await;
    let (old, new) = leader_and_other(&setup);
    setup.world.mute_beats();
    setup.node(old).order(Order::Answer(Failure::NotLeader { hint: None }));
    setup.world.set_leader(setup.world.shard_of(KEY), new);
    put(&setup.client, KEY, b"v").await.unwrap();
    assert_eq!(setup.node(new).seen(Kind::Put).len(), 1);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_whose_connection_is_lost_is_unknown_and_was_sent_once() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    for order in [Order::DropAfter, Order::DropBefore] {
        let before = setup.node(leader).seen(Kind::Put).len();
        setup.node(leader).order(order.clone());
        let failure = put(&setup.client, KEY, b"v").await.unwrap_err();
        assert!(matches!(failure, Failure::Unknown { .. }), "{order:?}: {failure}");
        assert_eq!(setup.node(leader).seen(Kind::Put).len(), before + 1, "{order:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_whose_connection_is_lost_is_tried_again() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    put(&setup.client, KEY, b"v").await.unwrap();
    setup.node(leader).order(Order::DropAfter);
    let value = get(&setup.client, KEY, Consistency::Linearizable).await.unwrap();
    assert_eq!(value.as_deref(), Some(&b"v"[..]));
    assert!(setup.seen(Kind::Get) >= 2);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_does_not_have_the_shard_yet_is_asked_again() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    for epoch in [Epoch::NONE, Epoch(u64::MAX)] {
        setup.node(leader).order(Order::Answer(Failure::WrongShard { epoch }));
        put(&setup.client, KEY, b"v").await.unwrap();
    }
    setup.node(leader).order(Order::Answer(Failure::Busy { retry_after_ms: 1, text: "x".into() }));
    put(&setup.client, KEY, b"v").await.unwrap();
    assert_eq!(setup.node(leader).seen(Kind::Put).len(), 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn eventual_reads_of_one_key_go_to_one_replica() {
    let setup = setup(3, LAYOUT).await;
    put(&setup.client, KEY, b"v").await.unwrap();
    let other_client = client(&setup.balancer).await;
    for _ in 0..10 {
        for client in [&setup.client, &other_client] {
            assert!(get(client, KEY, Consistency::Eventual).await.unwrap().is_some());
        }
    }
    let counts: Vec<usize> = setup.nodes.iter().map(|node| node.seen(Kind::Get).len()).collect();
    assert!(counts.iter().all(|count| [0, 20].contains(count)), "{counts:?}");

    // When that replica is gone, another answers.
    setup.nodes.iter().find(|node| !node.seen(Kind::Get).is_empty()).unwrap().stop();
    assert!(get(&setup.client, KEY, Consistency::Eventual).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_read_from_a_node_that_falls_silent_is_answered_by_another() {
    let setup = setup(3, LAYOUT).await;
    put(&setup.client, KEY, b"v").await.unwrap();
    setup.world.mute_beats();
    get(&setup.client, KEY, Consistency::Eventual).await.unwrap();
    let chosen = setup.nodes.iter().find(|node| !node.seen(Kind::Get).is_empty()).unwrap();
    chosen.order(Order::Hold); // never released: the connection stays open, and nothing comes over it
    assert!(get(&setup.client, KEY, Consistency::Eventual).await.unwrap().is_some());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_batch_goes_to_the_leader_of_the_lowest_of_its_shards() {
    let setup = setup(3, LAYOUT).await;
    let keys: Vec<Vec<u8>> = (0..64_u8).map(|n| vec![b'k', n]).collect();
    let here = setup.world.shard_of(&keys[0]);
    let same: Vec<_> = keys.iter().filter(|key| setup.world.shard_of(key) == here).collect();
    let batch = |keys: Vec<&Vec<u8>>| {
        let ops = keys.iter().map(|key| BatchOp::Put { key, value_bytes: 1, condition: Condition::Always }).collect();
        codec::encode(&Batch { keyspace: KEYSPACE, ops, id: None }).unwrap()
    };
    let highest = keys.iter().max_by_key(|key| setup.world.shard_of(key)).unwrap();
    let lowest = keys.iter().min_by_key(|key| setup.world.shard_of(key)).unwrap();
    let wide = || vec![highest, lowest, &keys[0]];
    let asked = [
        (ShardId::UNROUTED, same.clone(), here),
        (here, same, here),
        (ShardId::UNROUTED, wide(), setup.world.shard_of(lowest)),
        (ShardId::UNROUTED, wide().into_iter().rev().collect(), setup.world.shard_of(lowest)),
    ];
    for (shard, keys, expected) in asked {
        let values = vec![7; keys.len()];
        let answer = done_or_failure(ask(&setup.client, Kind::Batch, shard, batch(keys), values).await).unwrap();
        let done: BatchDone = codec::decode(&answer.head).unwrap();
        assert_eq!((answer.header.shard, done.revisions[0].0), (expected, expected));
        assert!(!setup.node(setup.world.leader(expected)).seen(Kind::Batch).is_empty());
    }
    let answer = ask(&setup.client, Kind::Batch, ShardId::UNROUTED, batch(vec![]), vec![]).await;
    let failure = done_or_failure(answer).unwrap_err();
    assert!(matches!(failure, Failure::Refusal { code: RefusalCode::BatchLimits, .. }), "{failure}");
    assert_eq!(setup.seen(Kind::Batch), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_write_with_an_id_is_sent_again_when_its_answer_is_lost_and_says_how_old_it_is() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    let id = WriteId { client: 9, sequence: 4, answered: 2, age_ms: 30 };
    let put = Write { keyspace: KEYSPACE, key: KEY, condition: Condition::Always, id: Some(id) };
    let ops = vec![BatchOp::Put { key: KEY, value_bytes: 1, condition: Condition::Always }];
    let batch = Batch { keyspace: KEYSPACE, ops, id: Some(id) };
    for (kind, head) in [(Kind::Put, codec::encode(&put).unwrap()), (Kind::Batch, codec::encode(&batch).unwrap())] {
        for order in [Order::DropAfter, Order::DropBefore, Order::Answer(Failure::unknown("a test says so"))] {
            let before = setup.node(leader).seen(kind).len();
            setup.node(leader).order(order);
            let answer = ask(&setup.client, kind, ShardId::UNROUTED, head.clone(), vec![7]).await;
            done_or_failure(answer).unwrap();
            let seen = setup.node(leader).seen(kind).split_off(before);
            let id_of = |frame: &Frame| match kind {
                Kind::Put => codec::decode_borrowed::<Write<'_>>(&frame.head).unwrap().id.unwrap(),
                _ => codec::decode_borrowed::<Batch<'_>>(&frame.head).unwrap().id.unwrap(),
            };
            let [first, .., last] = &seen[..] else { panic!("it was sent {} times", seen.len()) };
            assert_eq!(id_of(first), id);
            assert_eq!(WriteId { age_ms: 30, ..id_of(last) }, id, "it is the same write");
            assert!(id_of(last).age_ms > 30 && last.tail == first.tail);
        }
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_may_not_ask_is_refused() {
    let setup = setup(3, LAYOUT).await;
    let refused = async |kind, shard, head| match done_or_failure(ask(&setup.client, kind, shard, head, vec![]).await)
        .unwrap_err()
    {
        Failure::Refusal { code, .. } => code,
        other => panic!("{kind:?}: {other}"),
    };
    let beat = codec::encode(&Beat { addrs: vec![], map: None, retired: None }).unwrap();
    assert_eq!(refused(Kind::Beat, ShardId::UNROUTED, beat).await, RefusalCode::NotAllowed);
    for kind in [Kind::CreateReplica, Kind::Raft, Kind::SnapshotBegin, Kind::Done, Kind::Hello] {
        assert_eq!(refused(kind, ShardId::UNROUTED, vec![]).await, RefusalCode::NotAllowed);
    }
    let system =
        codec::encode(&Write { keyspace: KeyspaceId::SYSTEM, key: b"meta", condition: Condition::Always, id: None })
            .unwrap();
    assert_eq!(refused(Kind::Delete, ShardId::UNROUTED, system).await, RefusalCode::NotAllowed);
    assert_eq!(refused(Kind::Batch, ShardId::SYSTEM, vec![]).await, RefusalCode::NotAllowed);
    let nowhere =
        codec::encode(&Write { keyspace: KeyspaceId(9), key: KEY, condition: Condition::Always, id: None }).unwrap();
    assert_eq!(refused(Kind::Put, ShardId::UNROUTED, nowhere).await, RefusalCode::UnknownKeyspace);
    assert_eq!(refused(Kind::Get, ShardId::UNROUTED, vec![0xff; 9]).await, RefusalCode::Malformed);
    assert_eq!(refused(Kind::Scan, ShardId::UNROUTED, vec![]).await, RefusalCode::Malformed);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn hostile_bytes_on_one_connection_leave_the_others_undisturbed() {
    let setup = setup(3, LAYOUT).await;
    let addr = setup.balancer.addr();
    let half_open = TcpStream::connect(addr).await.unwrap();
    for seed in 0..20_u8 {
        let mut hostile = TcpStream::connect(addr).await.unwrap();
        let mut noise: Vec<u8> = (0..400_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> (seed % 24)) as u8).collect();
        if seed % 2 == 0 {
            // First a sound handshake, then the noise.
            let head = codec::encode(&Hello::ours(None, Role::Client)).unwrap();
            let mut sound = bytes::BytesMut::new();
            Frame::new(Header::new(Kind::Hello), head, vec![]).encode(&mut sound);
            hostile.write_all(&sound).await.unwrap();
            let mut length = [0; 4];
            hostile.read_exact(&mut length).await.unwrap();
            let mut rest = vec![0; u32::from_le_bytes(length) as usize];
            hostile.read_exact(&mut rest).await.unwrap();
        }
        noise[..4].copy_from_slice(&u32::MAX.to_le_bytes());
        hostile.write_all(&noise).await.unwrap();
        let mut rest = Vec::new();
        // The balancer closes; whether by a reset or in peace is the system's choice.
        let _ = tokio::time::timeout(PATIENCE, hostile.read_to_end(&mut rest)).await.unwrap();
        put(&setup.client, KEY, &[seed]).await.unwrap();
    }
    drop(half_open);
    assert_eq!(get(&setup.client, KEY, Consistency::Linearizable).await.unwrap().as_deref(), Some(&[19][..]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_requests_in_flight_are_each_answered_once() {
    let setup = setup(3, LAYOUT).await;
    let count = 5_000_u32; // several times the credit of a connection
    let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
    for n in 0..count {
        let key = n.to_be_bytes();
        let head = codec::encode(&Get { keyspace: KEYSPACE, key: &key, consistency: Consistency::Eventual }).unwrap();
        let frame = Frame::new(Header::new(Kind::Get), head, vec![]);
        let sender = sender.clone();
        let done = move |result: Result<Frame, _>| sender.send((n, result.unwrap().header.kind)).unwrap();
        setup.client.submit(frame, Instant::now() + PATIENCE, done).await;
    }
    drop(sender);
    let mut answered = std::collections::BTreeSet::new();
    while let Some((n, kind)) = receiver.recv().await {
        assert_eq!(kind, Kind::Done);
        assert!(answered.insert(n));
    }
    assert_eq!(answered.len(), count as usize);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn stopping_finishes_what_is_in_hand() {
    let setup = setup(3, LAYOUT).await;
    let (leader, _) = leader_and_other(&setup);
    setup.node(leader).order(Order::Hold);
    let Setup { world, nodes, balancer, client } = setup;
    let addr = balancer.addr();
    let stopping = async {
        nodes.iter().find(|node| node.id == leader).unwrap().has_seen(Kind::Put).await;
        tokio::join!(balancer.stop(), async { world.release() });
    };
    let (answer, ()) = tokio::join!(put(&client, KEY, b"v"), stopping);
    answer.unwrap();
    assert!(TcpStream::connect(addr).await.is_err(), "nothing listens any more");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn status_lists_every_node_and_says_which_are_away() {
    let setup = setup(3, LAYOUT).await;
    let status = async || {
        let answer = ask(&setup.client, Kind::Status, ShardId::UNROUTED, vec![], vec![]).await;
        codec::decode::<StatusDone>(&done_or_failure(answer).unwrap().head).unwrap()
    };
    let now = status().await;
    assert!(now.map.is_some() && now.nodes.len() == 3 && now.nodes.iter().all(|(_, status)| status.is_ok()));
    assert_eq!(now.process.0, std::process::id());
    setup.nodes[0].stop();
    let until = Instant::now() + PATIENCE;
    while status().await.nodes.iter().all(|(_, status)| status.is_ok()) {
        assert!(Instant::now() < until, "the node that is away still counts as there");
    }
}
