//! How a cluster is made, found again, and finished when its making was cut short.

use crate::fake::{FakeNode, PATIENCE, World};
use crate::setup::{ask, client, config, get, nodes, put, setup};
use shkv_balancer::{Balancer, Bootstrap, StartError};
use shkv_proto::link::{Link, done_or_failure};
use shkv_proto::map::Part;
use shkv_proto::message::{Consistency, CreateReplica, Hello, MapDone, Role};
use shkv_proto::{ClusterId, Frame, Header, KeyspaceId, Kind, Map, ReplicaId, ShardId, codec};
use std::time::Duration;
use tokio::net::TcpListener;
use tokio::time::Instant;

const LAYOUT: Bootstrap = Bootstrap { shards: 8, replicas: 3 };

async fn map(client: &Link) -> Map {
    let answer = done_or_failure(ask(client, Kind::Map, ShardId::UNROUTED, vec![], vec![]).await).unwrap();
    codec::decode::<MapDone>(&answer.head).unwrap().map
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_that_register_are_found_although_nobody_has_a_map() {
    let before = setup(3, LAYOUT).await;
    before.balancer.stop().await;
    before.nodes.iter().for_each(FakeNode::stop);
    // Everything was restarted: the nodes have forgotten the map and where the others are. The balancer knows only of one
    // that does not lead the system shard.
    let led = before.world.leader(ShardId::SYSTEM);
    let mut nodes = Vec::new();
    for node in &before.nodes {
        nodes.push(FakeNode::start(&before.world, node.id.0, node.cluster()).await);
    }
    let known = nodes.iter().position(|node| node.id != led).unwrap();
    let balancer = Balancer::start(config(&nodes[known..=known], None)).await.unwrap();
    let addr = balancer.addr().to_string();
    let until = Instant::now() + PATIENCE;
    while nodes.iter().any(|node| node.map().is_none()) {
        for node in nodes.iter().filter(|node| node.map().is_none()) {
            let _ = node.join(&addr, &node.introduction(&format!("n{}", node.id))).await; // busy, at first
        }
        assert!(Instant::now() < until, "the balancer does not find its nodes");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    balancer.ready(PATIENCE).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_cluster_has_its_replicas_and_leaders_spread_and_its_map_in_the_system_shard() {
    let setup = setup(4, Bootstrap { shards: 8, replicas: 3 }).await;
    let replicas = setup.world.replicas();
    // 24 replicas of the default keyspace, and 3 of the system shard, on 4 nodes
    assert!(replicas.values().all(|count| (6..=7).contains(count)), "{replicas:?}");
    assert!(setup.world.leads().values().all(|count| *count == 2), "{:?}", setup.world.leads());

    let first = map(&setup.client).await;
    assert_eq!((first.nodes.len(), first.shards.len(), first.keyspaces[0].name.as_str()), (4, 9, "default"));
    assert!(setup.nodes.iter().all(|node| node.cluster() == Some(first.cluster)));

    // Another balancer, that was told of one node only, finds the same cluster and makes nothing.
    let made: usize = setup.nodes.iter().map(|node| node.seen(Kind::CreateReplica).len()).sum();
    let second = Balancer::start(config(&setup.nodes[2..3], None)).await.unwrap();
    assert_eq!(second.ready(PATIENCE).await.unwrap(), first.cluster);
    assert_eq!(map(&client(&second).await).await, first);
    let made_then: usize = setup.nodes.iter().map(|node| node.seen(Kind::CreateReplica).len()).sum();
    assert_eq!(made, made_then);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn after_a_restart_on_other_ports_the_nodes_find_each_other_and_the_map_is_corrected() {
    let before = setup(3, LAYOUT).await;
    put(&before.client, b"k", b"v").await.unwrap();
    before.balancer.stop().await;
    before.nodes.iter().for_each(FakeNode::stop);
    before.world.forget_addrs(3); // nobody can lead before beats have told where the others are

    let mut moved = Vec::new();
    for node in &before.nodes {
        moved.push(FakeNode::start(&before.world, node.id.0, node.cluster()).await);
    }
    let balancer = Balancer::start(config(&moved, Some(LAYOUT))).await.unwrap();
    assert_eq!(Some(balancer.ready(PATIENCE).await.unwrap()), before.nodes[0].cluster());
    let client = client(&balancer).await;
    assert_eq!(get(&client, b"k", Consistency::Linearizable).await.unwrap().as_deref(), Some(&b"v"[..]));
    let until = Instant::now() + PATIENCE;
    loop {
        let map = map(&client).await;
        if moved.iter().all(|node| map.node(node.id).unwrap().addr == node.addr) {
            break;
        }
        assert!(Instant::now() < until, "the addresses are not corrected: {:?}", map.nodes);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_has_moved_is_reached_at_its_new_address() {
    let setup = setup(3, LAYOUT).await;
    let shard = setup.world.shard_of(b"k");
    let old = setup.node(setup.world.leader(shard));
    old.stop();
    let moved = FakeNode::start(&setup.world, old.id.0, old.cluster()).await;
    setup.balancer.node_moved(moved.id, moved.addr.clone());
    put(&setup.client, b"k", b"v").await.unwrap();
    assert_eq!(moved.seen(Kind::Put).len(), 1);
}

/// Makes the system shard on the first of the nodes only, as a balancer does that dies right then.
async fn begin_bootstrap(nodes: &[FakeNode], cluster: ClusterId) {
    let create = CreateReplica {
        cluster,
        shard: ShardId::SYSTEM,
        keyspace: KeyspaceId::SYSTEM,
        part: Part::everything(),
        replica: ReplicaId(1),
        founders: (1..=nodes.len() as u64).map(ReplicaId).collect(),
        homes: nodes.iter().zip(1..).map(|(node, n)| (ReplicaId(n), node.id)).collect(),
        campaign: true,
    };
    let link = Link::open(nodes[0].addr.clone(), Hello::ours(None, Role::Balancer), |_| Ok(()));
    let frame = Frame::new(Header::new(Kind::CreateReplica), codec::encode(&create).unwrap(), vec![]);
    done_or_failure(link.call(frame, Instant::now() + PATIENCE).await.unwrap()).unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_bootstrap_that_was_cut_short_is_finished_under_the_same_id() {
    let world = World::new();
    let nodes = nodes(&world, 3).await;
    begin_bootstrap(&nodes, ClusterId(77)).await;
    let balancer = Balancer::start(config(&nodes, Some(LAYOUT))).await.unwrap();
    assert_eq!(balancer.ready(PATIENCE).await.unwrap(), ClusterId(77));
    assert!(nodes.iter().all(|node| node.cluster() == Some(ClusterId(77))));
    put(&client(&balancer).await, b"k", b"v").await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn replicas_that_the_map_names_and_no_node_has_are_made() {
    let setup = setup(3, LAYOUT).await;
    setup.balancer.stop().await;
    for node in &setup.nodes[..2] {
        setup.world.lose_replica(ShardId(5), node.id);
    }
    let balancer = Balancer::start(config(&setup.nodes, None)).await.unwrap();
    balancer.ready(PATIENCE).await.unwrap();
    let until = Instant::now() + PATIENCE;
    while setup.world.replicas().values().any(|count| *count != 9) {
        assert!(Instant::now() < until, "{:?}", setup.world.replicas());
        tokio::task::yield_now().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn with_fewer_nodes_than_copies_there_is_one_copy_on_each() {
    let setup = setup(2, LAYOUT).await;
    assert!(setup.world.replicas().values().all(|count| *count == 9), "{:?}", setup.world.replicas());
    let map = map(&setup.client).await;
    assert_eq!(map.keyspaces[0].replicas, 3, "three are wanted as soon as there are three nodes");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_layout_that_cannot_be_is_refused_before_anything_is_made() {
    let world = World::new();
    let nodes = nodes(&world, 2).await;
    let layout = Bootstrap { shards: 8, replicas: 100 };
    let error = Balancer::start(config(&nodes, Some(layout))).await.unwrap_err();
    assert!(matches!(error, StartError::Layout(_)), "{error}");
    assert!(nodes.iter().all(|node| node.cluster().is_none()) && world.replicas().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nodes_of_two_clusters_are_refused_and_both_are_named() {
    let world = World::new();
    let first = FakeNode::start(&world, 1, Some(ClusterId(0xaaaa))).await;
    let second = FakeNode::start(&world, 2, Some(ClusterId(0xbbbb))).await;
    let error = Balancer::start(config(&[first, second], Some(LAYOUT))).await.unwrap_err().to_string();
    assert!(error.contains("aaaa") && error.contains("bbbb"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_bootstrap_no_cluster_is_made() {
    let world = World::new();
    let nodes = nodes(&world, 3).await;
    let error = Balancer::start(config(&nodes, None)).await.unwrap_err();
    assert!(matches!(error, StartError::NoCluster), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_port_in_use_is_an_error_that_names_it() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let world = World::new();
    let nodes = nodes(&world, 1).await;
    let bootstrap = Some(Bootstrap { shards: 1, replicas: 1 });
    for http in [true, false] {
        let mut config = config(&nodes, bootstrap);
        if http {
            config.http = Some(addr.clone());
        } else {
            config.listen = addr.clone();
        }
        let error = Balancer::start(config).await.unwrap_err();
        assert!(matches!(error, StartError::AddressInUse { .. }), "{error}");
        assert!(error.to_string().contains(&addr), "{error}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_keeps_a_cluster_from_being_ready_is_named() {
    let setup = setup(3, LAYOUT).await;
    setup.balancer.stop().await;
    setup.nodes[1].stop();
    setup.nodes[2].stop();
    setup.world.forget_addrs(4); // so that nobody leads
    let balancer = Balancer::start(config(&setup.nodes[..1], None)).await.unwrap();
    let error = balancer.ready(Duration::from_millis(300)).await.unwrap_err().to_string();
    assert!(error.contains("map has not been read"), "{error}");
}
