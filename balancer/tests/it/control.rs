//! Who may change the map: the holder of the lease and nobody else; and which nodes may join.

use crate::fake::{FakeNode, PATIENCE, World};
use crate::setup::{Setup, ask, config, setup};
use shkv_balancer::{Balancer, Bootstrap};
use shkv_proto::link::CallError;
use shkv_proto::map::NodeState;
use shkv_proto::message::{Controller, Failure, Join, MapDone, RefusalCode};
use shkv_proto::{ClusterId, Kind, Map, NodeId, ShardId, codec};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;

const LAYOUT: Bootstrap = Bootstrap { shards: 8, replicas: 3 };

async fn until<T>(what: &str, mut look: impl AsyncFnMut() -> Option<T>) -> T {
    let end = Instant::now() + PATIENCE;
    loop {
        if let Some(found) = look().await {
            return found;
        }
        assert!(Instant::now() < end, "waited in vain until {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn map(setup: &Setup) -> Map {
    let answer = ask(&setup.client, Kind::Map, ShardId::UNROUTED, vec![], vec![]).await;
    codec::decode::<MapDone>(&answer.head).unwrap().map
}

async fn holder(world: &World) -> Controller {
    until("somebody holds the lease", async || world.controller()).await
}

fn refusal(answer: Result<impl std::fmt::Debug, CallError>) -> (RefusalCode, String) {
    match answer {
        Err(CallError::Failure(Failure::Refusal { code, text })) => (code, text),
        other => panic!("it was not refused: {other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_that_both_believe_that_they_hold_the_lease_only_one_changes_the_map() {
    let setup = setup(3, LAYOUT).await;
    let first = holder(&setup.world).await;
    let before = map(&setup).await;
    let done_before = setup.world.controlled().len();

    // A node more makes the holder want to change the map; in that moment the lease is another one's.
    let usurper = Controller { balancer: 4711, addr: "127.0.0.1:1".into(), term: first.term + 1 };
    setup.world.depose(usurper.clone());
    let newcomer = FakeNode::start(&setup.world, 99, None).await;
    newcomer.join(&setup.balancer.addr().to_string(), &newcomer.introduction("Newcomer")).await.unwrap();
    let tried =
        until("the deposed holder has tried", async || setup.world.controlled().get(done_before).cloned()).await;
    assert!(matches!(tried, Err(Failure::Condition { .. })), "{tried:?}");
    assert_eq!(setup.world.controller(), Some(usurper), "what the usurper wrote stands");

    // Nothing but the wish of the node, which needs no lease, has changed, until the usurper's silence ends its lease.
    let joined = map(&setup).await;
    assert_eq!(joined.shards, before.shards);
    assert_eq!(joined.node(newcomer.id).unwrap().state, NodeState::Joining);
    let second = until("the lease is taken again", async || {
        setup.world.controller().filter(|who| who.balancer == first.balancer)
    })
    .await;
    assert_eq!(second.term, first.term + 2);
    until("the newcomer is up", async || {
        map(&setup).await.node(newcomer.id).filter(|node| node.state == NodeState::Up).map(drop)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_balancer_that_stops_gives_the_lease_to_the_next_one() {
    let setup = setup(3, LAYOUT).await;
    let first = holder(&setup.world).await;
    let next = Balancer::start(config(&setup.nodes, None)).await.unwrap();
    next.ready(PATIENCE).await.unwrap();
    assert_eq!(setup.world.controller(), Some(first.clone()), "a lease that is renewed is left alone");
    setup.balancer.stop().await;
    let second = until("the next one holds the lease", async || {
        setup.world.controller().filter(|who| who.addr == next.addr().to_string())
    })
    .await;
    assert!(second.term > first.term, "{second:?} after {first:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_may_not_join_is_told_why_and_leaves_no_trace() {
    let setup = setup(3, LAYOUT).await;
    let balancer = setup.balancer.addr().to_string();
    let node = FakeNode::start(&setup.world, 99, None).await;
    let taken = map(&setup).await.nodes[0].clone();
    let nobody = {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        listener.local_addr().unwrap().to_string() // closed again when this ends
    };
    let good = node.introduction("Newcomer");
    let cases: [(Join, RefusalCode, &str); 7] = [
        (Join { cluster: Some(ClusterId(1)), ..good.clone() }, RefusalCode::WrongCluster, "is of cluster"),
        (Join { name: "two words".into(), ..good.clone() }, RefusalCode::Malformed, "two words"),
        (Join { name: taken.name.clone(), ..good.clone() }, RefusalCode::Exists, "already"),
        (Join { addr: taken.addr.clone(), ..good.clone() }, RefusalCode::Conflict, "cannot share an address"),
        (Join { addr: nobody.clone(), ..good.clone() }, RefusalCode::Conflict, "nobody can be reached at"),
        (Join { capacity: 0, ..good.clone() }, RefusalCode::Malformed, "capacity"),
        (Join { id: NodeId(98), ..good.clone() }, RefusalCode::NotAllowed, "speaks for itself only"),
    ];
    for (join, code, says) in cases {
        let (found, text) = refusal(node.join(&balancer, &join).await);
        assert_eq!(found, code, "{text}");
        assert!(text.contains(says), "{text}");
    }
    assert_eq!(node.cluster(), None);
    assert!(map(&setup).await.nodes.iter().all(|known| known.id != node.id), "it left a trace");

    node.join(&balancer, &good).await.unwrap();
    until("it is told the map", async || node.map().filter(|map| map.node(node.id).is_some())).await;
    assert_eq!(node.retired(), None);
}
