//! The cluster looks after itself: nodes come, go, die and return, and balancers, too. Real processes throughout.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and kills, and fails where it cannot go on"
)]

use serde_json::Value;
use shkv_client::{Client, ClientConfig, NodeHealth, StatusDone};
use shkv_proto::NodeId;
use shkv_proto::map::{NodeState, ShardInfo};
use shkv_tests::load::Load;
use shkv_tests::proxy::Proxy;
use shkv_tests::{Cluster, PATIENCE, Server, connect, is_whole, signal, until_status};
use std::collections::BTreeMap;
use std::path::Path;
use std::time::{Duration, Instant};

/// Replacement as soon as it is allowed, so that tests need not wait longer.
const SOON: [&str; 2] = ["--replace-after", "5s"];

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

/// Runs a command against a cluster; gives what it said, on standard output or else on standard error.
fn run(cluster: &Cluster, args: &[&str]) -> Result<String, String> {
    run_at(&cluster.addr(), args)
}

fn run_at(addr: &str, args: &[&str]) -> Result<String, String> {
    let output = std::process::Command::new(binary()).env("SHKV_ADDR", addr).args(args).output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

fn shards(status: &StatusDone) -> &[ShardInfo] {
    &status.map.as_ref().unwrap().shards
}

fn member_count(status: &StatusDone) -> usize {
    status.map.as_ref().map_or(0, |map| map.nodes.len())
}

fn id_of(status: &StatusDone, name: &str) -> NodeId {
    let map = status.map.as_ref().unwrap();
    map.nodes.iter().find(|node| node.name == name && node.state == NodeState::Up).unwrap().id
}

fn process_of(status: &StatusDone, id: NodeId) -> u32 {
    status.nodes.iter().find(|(node, _)| *node == id).unwrap().1.as_ref().unwrap().process
}

/// Replicas on each node.
fn kept(status: &StatusDone) -> BTreeMap<NodeId, usize> {
    let mut kept: BTreeMap<NodeId, usize> =
        status.map.as_ref().unwrap().nodes.iter().map(|node| (node.id, 0)).collect();
    for replica in shards(status).iter().flat_map(|shard| &shard.replicas) {
        *kept.get_mut(&replica.node).unwrap() += 1;
    }
    kept
}

/// Replicas that were made since an earlier status.
fn made_since(before: &StatusDone, after: &StatusDone) -> usize {
    let is_new = |shard: &ShardInfo| {
        let old = shards(before).iter().find(|old| old.id == shard.id).unwrap();
        shard.replicas.iter().filter(|replica| replica.id >= old.next_replica).count()
    };
    shards(after).iter().map(is_new).sum()
}

/// Whether every node's number of replicas is within 30 % of its even share, or next to it.
fn is_even(status: &StatusDone) -> bool {
    let kept = kept(status);
    let share = kept.values().sum::<usize>() as f64 / kept.len() as f64;
    kept.values().all(|count| (*count as f64 - share).abs() <= (share * 0.3).max(1.0))
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn three_nodes_become_six_and_three_again_under_load() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &["--spawn", "process", "--shards", "24"]);
    let client = cluster.client().await;
    let load = Load::start(&client, "row", 8);
    load.progress(500).await;
    let three = until_status(&client, |status| is_whole(status, 3)).await;

    run(&cluster, &["add", "Extra", "--n", "3"]).unwrap();
    let six = until_status(&client, |status| member_count(status) == 6 && is_whole(status, 3) && is_even(status)).await;
    // 25 shards of 3 replicas: half of the 75 belong to the 3 new ones of 6 nodes.
    let made = made_since(&three, &six);
    println!("3 -> 6 nodes: {made} of 75 replicas moved, the least is 37; {:?}", kept(&six));
    assert!((33..=44).contains(&made), "{made} replicas were made, 37 would be enough");
    load.progress(500).await;

    let three_again = ["rm", "Server0", "Server1", "Server2"];
    run(&cluster, &three_again).unwrap();
    let left = until_status(&client, |status| member_count(status) == 3 && is_whole(status, 3)).await;
    let made = made_since(&six, &left);
    println!("6 -> 3 nodes: {made} of 75 replicas moved, the least is 38; {:?}", kept(&left));
    assert!(made <= 46, "{made} replicas were made, 38 would be enough");
    assert!(is_even(&left), "{:?}", kept(&left));
    load.progress(500).await;

    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert!(report.unknown.is_empty(), "{:?}", report.unknown);
    report.check(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_cannot_come_back_is_replaced_under_its_name_and_never_serves_again() {
    let data = tempfile::tempdir().unwrap();
    let flags = [&["--spawn", "process"][..], &SOON].concat();
    let cluster = Cluster::start(binary(), data.path(), &flags);
    let client = cluster.client().await;
    let load = Load::start(&client, "row", 4);
    load.progress(200).await;
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    let lost = id_of(&before, "Server1");

    // Its disk is damaged, and it dies: started again, it does not come back.
    let (folder, aside) = (data.path().join("Server1"), data.path().join("aside"));
    signal(process_of(&before, lost), "KILL");
    std::fs::rename(&folder, &aside).unwrap();
    std::fs::create_dir(&folder).unwrap();
    std::fs::write(folder.join("identity"), b"not an identity").unwrap();
    load.progress(200).await;

    let healed =
        until_status(&client, |status| is_whole(status, 3) && status.map.as_ref().unwrap().node(lost).is_none()).await;
    assert_eq!(member_count(&healed), 3);
    assert_ne!(id_of(&healed, "Server1"), lost, "another node of the same name");
    let gone = &healed.control.as_ref().unwrap().gone;
    assert!(gone.iter().any(|gone| gone.id == lost && gone.reason.contains("replaced")), "{gone:?}");
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&client).await;

    // The old disk turns up again: the node is refused, says why, and stays refused without anybody to ask.
    let told = |flags: &[&str]| {
        let line =
            [&["node", "--name", "Server1", "--listen", "127.0.0.1:0", "--data", aside.to_str().unwrap()], flags];
        let mut server = match Server::try_start(binary(), &line.concat()) {
            Err(words) => return words,
            Ok(server) => server,
        };
        let ended = server.ended();
        assert!(!ended.success());
        server.words()
    };
    let words = told(&["--join", &cluster.addr()]);
    assert!(words.contains("replaced"), "{words}");
    let words = told(&[]);
    assert!(words.contains("replaced"), "{words}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_slow_is_not_a_node_that_is_dead() {
    let data = tempfile::tempdir().unwrap();
    let flags = [&["--spawn", "process"][..], &SOON].concat();
    let cluster = Cluster::start(binary(), data.path(), &flags);
    let client = cluster.client().await;
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    let load = Load::start(&client, "row", 8);
    let slow = process_of(&before, id_of(&before, "Server2"));
    let until = Instant::now() + Duration::from_secs(12);
    while Instant::now() < until {
        signal(slow, "STOP"); // it gets a fifth of the time that it wants
        tokio::time::sleep(Duration::from_millis(800)).await;
        signal(slow, "CONT");
        tokio::time::sleep(Duration::from_millis(200)).await;
        let status = client.status().await.unwrap();
        let health = &status.control.as_ref().unwrap().health;
        assert!(health.iter().all(|(_, health)| *health != NodeHealth::Down), "{health:?}");
    }
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    let after = until_status(&client, |status| is_whole(status, 3)).await;
    assert_eq!(made_since(&before, &after), 0, "nothing was moved");
    report.check(&client).await;
}

/// The address of a free port. Somebody else may take it before it is used, which the tests would notice at once.
fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

/// Nodes that join the balancer at an address, started all at once because a new cluster waits for all of them.
fn nodes(data: &Path, join: &str, names: &[&str], more: &[&str]) -> Vec<Server> {
    names.iter().map(|name| node(data, join, name, more)).collect()
}

fn node(data: &Path, join: &str, name: &str, more: &[&str]) -> Server {
    let folder = data.join(name);
    let line = ["node", "--listen", "127.0.0.1:0", "--name", name, "--data", folder.to_str().unwrap(), "--join", join];
    Server::start(binary(), &[&line[..], more].concat())
}

/// A cluster of nodes that joined by themselves, and its balancer.
fn joined(data: &Path, names: &[&str], more: &[&str]) -> (String, Server, Vec<Server>) {
    let addr = free_port();
    let nodes = nodes(data, &addr, names, &[]);
    let expect = names.len().to_string();
    let line = ["balancer", "--bootstrap", "--expect", &expect, "--listen", &addr];
    let balancer = Server::start(binary(), &[&line[..], more].concat());
    (addr, balancer, nodes)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_joins_takes_its_share_and_one_that_may_not_is_told_why() {
    let data = tempfile::tempdir().unwrap();
    let (addr, _balancer, members) = joined(data.path(), &["a", "b", "c"], &[]);
    let client = connect(std::slice::from_ref(&addr)).await;
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    let _d = node(data.path(), &addr, "d", &["--domain", "rack2", "--capacity", "100"]);
    let after =
        until_status(&client, |status| member_count(status) == 4 && is_whole(status, 3) && is_even(status)).await;
    let made = made_since(&before, &after);
    assert_eq!(made, kept(&after)[&id_of(&after, "d")], "only the new node's share has moved");

    let refused = |name: &str, more: &[&str]| {
        let folder = data.path().join(format!("refused{}", more.join("")).replace(['-', ':'], ""));
        let line = ["node", "--listen", "127.0.0.1:0", "--name", name, "--data", folder.to_str().unwrap()];
        let mut server = match Server::try_start(binary(), &[&line[..], more].concat()) {
            Err(words) => return words,
            Ok(server) => server,
        };
        assert!(!server.ended().success());
        server.words()
    };
    let there = refused("a", &["--join", &addr]);
    assert!(there.contains("\"a\"") || there.contains("named a"), "{there}");
    let nobody = free_port();
    let unreachable = refused("e", &["--join", &addr, "--advertise", &nobody]);
    assert!(unreachable.contains(&nobody), "{unreachable}");
    let taken = refused("e", &["--join", &addr, "--advertise", &members[0].addr()]);
    assert!(taken.contains(&members[0].addr()), "{taken}");

    // A node of another cluster.
    let other = tempfile::tempdir().unwrap();
    let (_, balancer, nodes) = joined(other.path(), &["x"], &["--replicas", "1"]);
    drop(nodes);
    drop(balancer);
    let line = ["node", "--listen", "127.0.0.1:0", "--name", "x", "--join", &addr, "--data"];
    let folder = other.path().join("x");
    let mut stranger = Server::start(binary(), &[&line[..], &[folder.to_str().unwrap()]].concat());
    assert!(!stranger.ended().success());
    assert!(stranger.words().contains("cluster"), "{}", stranger.words());
    assert_eq!(member_count(&client.status().await.unwrap()), 4, "nothing half done is left");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn wishes_that_make_no_sense_are_refused_and_change_nothing() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &[]);
    let client = cluster.client().await;
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    let refused = [
        (&["add", "Server0"][..], "Server0"),
        (&["add", "twice", "twice"], "twice"),
        (&["add", "no/name"], "no/name"),
        (&["add", "one", "two", "--n", "1"], "2"),
        (&["rm", "nobody"], "nobody"),
        (&["rm", "--n", "4"], "4"),
        (&["rm", "--n", "3"], "last"),
        (&["drain", "nobody"], "nobody"),
        (&["transfer", "1", "nobody"], "nobody"),
        (&["transfer", "99", "Server0"], "99"),
    ];
    for (line, named) in refused {
        let words = run(&cluster, line).unwrap_err();
        assert!(words.contains(named), "{line:?}: {words}");
        let mut as_json = line.to_vec();
        as_json.extend(["--output", "json"]);
        let told: Value = serde_json::from_str(&run(&cluster, &as_json).unwrap_err()).unwrap();
        assert!(told["error"]["text"].as_str().unwrap().contains(named), "{told}");
    }
    let after = client.status().await.unwrap();
    assert_eq!(after.map.as_ref().unwrap().epoch, before.map.as_ref().unwrap().epoch, "the map is as it was");

    // And those that make sense are done.
    let shard = shards(&before).last().unwrap();
    for home in &shard.replicas {
        let name = &before.map.as_ref().unwrap().node(home.node).unwrap().name;
        run(&cluster, &["transfer", &shard.id.to_string(), name]).unwrap();
    }
    run(&cluster, &["add", "Spare"]).unwrap();
    run(&cluster, &["drain", "Server1"]).unwrap();
    let status = client.status().await.unwrap();
    assert_eq!(kept(&status)[&status.map.as_ref().unwrap().nodes.iter().find(|n| n.name == "Server1").unwrap().id], 0);
    run(&cluster, &["drain", "Server1", "--undo"]).unwrap();
    let status: Value = serde_json::from_str(&run(&cluster, &["nodes", "--output", "json"]).unwrap()).unwrap();
    assert_eq!(status["nodes"].as_array().unwrap().len(), 4);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_balancer_killed_in_the_middle_of_a_move_is_taken_over_from() {
    let data = tempfile::tempdir().unwrap();
    let (addr, first, _nodes) = joined(data.path(), &["a", "b", "c", "d"], &["--shards", "16"]);
    let second = Server::start(binary(), &["balancer", "--nodes", &addr, "--listen", "127.0.0.1:0"]);
    let client = connect(&[second.addr()]).await;
    until_status(&client, |status| is_whole(status, 3)).await;
    let load = Load::start(&client, "row", 4);
    load.progress(100).await;
    let controlled = until_status(&client, |status| status.control.as_ref().unwrap().controller.is_some()).await;
    let holder = controlled.control.unwrap().controller.unwrap();
    assert_eq!(holder.addr, addr, "the first one holds the lease");

    run_at(&addr, &["drain", "a", "--wait", "0s"]).unwrap();
    until_status(&client, |status| shards(status).iter().any(|shard| shard.replicas.len() > 3)).await;
    first.kill();
    let killed = Instant::now();
    let taken = until_status(&client, |status| {
        status
            .control
            .as_ref()
            .and_then(|control| control.controller.as_ref())
            .is_some_and(|now| now.term > holder.term)
    })
    .await;
    println!("the lease changed hands after {:?}", killed.elapsed());
    assert_eq!(taken.control.unwrap().controller.unwrap().addr, second.addr());
    let done = until_status(&client, |status| {
        is_whole(status, 3) && kept(status).values().filter(|count| **count == 0).count() == 1
    })
    .await;
    assert_eq!(kept(&done)[&shkv_node_named(&done, "a")], 0);

    // And without any balancer, a client that knows the nodes goes on; a new balancer takes up what is left to do.
    second.kill();
    load.progress(300).await;
    let third = Server::start(binary(), &["balancer", "--nodes", &_nodes[0].addr(), "--listen", "127.0.0.1:0"]);
    run_at(&third.addr(), &["drain", "a", "--undo"]).unwrap();
    let other = connect(&[third.addr()]).await;
    until_status(&other, |status| is_whole(status, 3) && is_even(status)).await;
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&other).await;
}

fn shkv_node_named(status: &StatusDone, name: &str) -> NodeId {
    status.map.as_ref().unwrap().nodes.iter().find(|node| node.name == name).unwrap().id
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_behind_a_cut_network_is_done_without_and_comes_back_to_what_is_left_for_it() {
    let data = tempfile::tempdir().unwrap();
    let addr = free_port();
    let roads = [Proxy::start().await, Proxy::start().await, Proxy::start().await, Proxy::start().await];
    let mut members = Vec::new();
    for (road, name) in roads.iter().zip(["a", "b", "c", "d"]) {
        let listen = free_port();
        road.lead_to(&listen);
        let folder = data.path().join(name);
        let line = ["node", "--listen", &listen, "--advertise", road.addr(), "--name", name, "--join", &addr, "--data"];
        members.push(Server::start(binary(), &[&line[..], &[folder.to_str().unwrap()]].concat()));
    }
    let line = ["balancer", "--bootstrap", "--expect", "4", "--listen", &addr];
    let _balancer = Server::start(binary(), &[&line[..], &SOON].concat());
    let config = ClientConfig { deadline: Duration::from_secs(10), ..ClientConfig::default() };
    let client = Client::connect_with([addr.clone()], config).await.unwrap();
    let before = until_status(&client, |status| is_whole(status, 3)).await;
    let load = Load::start(&client, "row", 4);
    load.progress(200).await;

    roads[0].cut();
    load.progress(200).await;
    let cut = shkv_node_named(&before, "a");
    let without = until_status(&client, |status| is_whole(status, 3) && kept(status)[&cut] == 0).await;
    assert_eq!(member_count(&without), 4, "without a provisioner it stays a member");
    load.progress(200).await;
    roads[0].mend();
    let whole = until_status(&client, |status| is_whole(status, 3) && is_even(status)).await;
    assert!(kept(&whole)[&cut] > 0, "it is used again");
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn equal_members_grow_from_one_and_lose_any() {
    let data = tempfile::tempdir().unwrap();
    let addrs: Vec<String> = (0..3).map(|_| free_port()).collect();
    let member = |number: usize, first: bool| {
        let (name, folder) = (format!("m{number}"), data.path().join(format!("m{number}")));
        let others: Vec<&str> = (0..3).filter(|other| *other != number).map(|other| addrs[other].as_str()).collect();
        let joining = others.join(",");
        let mut line = vec!["serve", "--name", &name, "--data", folder.to_str().unwrap(), "--listen", &addrs[number]];
        line.extend(["--node-listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--shards", "4"]);
        if first {
            line.push("--bootstrap");
        } else {
            line.extend(["--join", &joining]);
        }
        Server::start(binary(), &line)
    };
    let first = member(0, true);
    let client = connect(&addrs).await;
    until_status(&client, |status| is_whole(status, 1)).await;
    let load = Load::start(&client, "row", 4);
    load.progress(100).await;
    let (_second, _third) = (member(1, false), member(2, false));
    until_status(&client, |status| member_count(status) == 3 && is_whole(status, 3)).await;
    load.progress(100).await;
    first.kill();
    load.progress(200).await;
    let _first_again = member(0, false);
    until_status(&client, |status| is_whole(status, 3)).await;
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&client).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn leaders_die_one_after_the_other_and_writes_go_on() {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), &["--spawn", "process", "--shards", "2"]);
    let client = cluster.client().await;
    let load = Load::start(&client, "row", 4);
    for _ in 0..4 {
        let status = until_status(&client, |status| is_whole(status, 3)).await;
        let leads = |node: &&shkv_client::NodeStatus| node.replicas.iter().any(|replica| replica.leads);
        let leader = status.nodes.iter().filter_map(|(_, node)| node.as_ref().ok()).find(leads).unwrap();
        signal(leader.process, "KILL");
        load.progress(50).await;
    }
    let report = load.stop().await;
    println!("longest time without an acknowledgement: {:?}", report.longest_gap);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    assert!(report.longest_gap < PATIENCE);
    report.check(&client).await;
}
