//! A node that registers with balancers, here with one that answers as the test wants.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test waits for what it has set in motion, and fails where it cannot go on"
)]

mod common;

use bytes::{Bytes, BytesMut};
use common::{CLUSTER, PATIENCE, small};
use shkv_node::{Node, NodeConfig, NodeLook};
use shkv_proto::limits::Limits;
use shkv_proto::message::{Failure, Join, JoinDone, RefusalCode, Role, Welcome};
use shkv_proto::session::accept;
use shkv_proto::{ClusterId, Frame, Kind, NodeId, codec};
use std::path::Path;
use std::sync::Arc;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::timeout;

type Answer = Arc<dyn Fn(&Join) -> Result<JoinDone, Failure> + Send + Sync>;

/// Answers joins; each that came is handed to the test.
async fn balancer(cluster: Option<ClusterId>, answer: Answer) -> (String, mpsc::UnboundedReceiver<Join>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let (came, joins) = mpsc::unbounded_channel();
    tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let welcome = move |hello: &shkv_proto::message::Hello| {
                hello.check_cluster(cluster)?;
                let version = hello.version_in_common()?;
                Ok(Welcome { version, cluster, role: Role::Balancer, name: "b".into(), limits: Limits::OURS })
            };
            let Ok(mut session) = accept(stream, welcome).await else { continue };
            let Ok(frame) = session.reader.next_one().await else { continue };
            assert_eq!(frame.header.kind, Kind::Join);
            let join: Join = codec::decode(&frame.head).unwrap();
            assert_eq!(session.peer.role, Role::Node(join.id));
            let (kind, head) = match answer(&join) {
                Ok(done) => (Kind::Done, codec::encode(&done).unwrap()),
                Err(failure) => (Kind::Failed, codec::encode(&failure).unwrap()),
            };
            let mut bytes = BytesMut::new();
            Frame::new(frame.header.answer(kind), head, Bytes::new()).encode(&mut bytes);
            session.writer.write_all(&bytes).await.unwrap();
            let _ = came.send(join);
        }
    });
    (addr, joins)
}

fn yes() -> Answer {
    Arc::new(|_| Ok(JoinDone { cluster: CLUSTER }))
}

fn no(code: RefusalCode) -> Answer {
    Arc::new(move |_| Err(Failure::refusal(code, "the balancer's own words")))
}

fn config(data: &Path, join: &[&str]) -> NodeConfig {
    let join = join.iter().map(|addr| (*addr).to_owned()).collect();
    NodeConfig { tuning: small(), join, ..NodeConfig::new("Server0", data, "127.0.0.1:0") }
}

async fn next(joins: &mut mpsc::UnboundedReceiver<Join>) -> Join {
    timeout(PATIENCE, joins.recv()).await.expect("the node registers").unwrap()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_joins_tells_who_it_is_and_stays_a_member() {
    let folder = tempfile::tempdir().unwrap();
    let (addr, mut joins) = balancer(Some(CLUSTER), yes()).await;
    // The first address answers nobody, and the second is asked.
    let nobody = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().to_string();
    let config = NodeConfig {
        advertise_outside: Some("outside.example:7000".into()),
        domain: "rack1".into(),
        capacity: 250,
        instance: "pod-7".into(),
        ..config(folder.path(), &[&nobody, &addr])
    };
    let node = Node::start(config.clone()).await.unwrap();
    let join = next(&mut joins).await;
    let expected = Join {
        cluster: None,
        id: node.id(),
        name: "Server0".into(),
        addr: node.addr().to_string(),
        addr_outside: Some("outside.example:7000".into()),
        domain: "rack1".into(),
        capacity: 250,
        instance: "pod-7".into(),
    };
    assert_eq!(join, expected);
    // No beat ever comes, so it registers again, as the member that it is by now.
    let again = next(&mut joins).await;
    assert_eq!(again, Join { cluster: Some(CLUSTER), ..expected });
    assert_eq!(node.cluster(), Some(CLUSTER));
    node.stop().await;
    assert_eq!(NodeLook::at(folder.path()).unwrap().unwrap().cluster, Some(CLUSTER));
    let advertised = NodeConfig { advertise: Some("node.example:7".into()), ..config };
    let node = Node::start(advertised).await.unwrap();
    let join = next(&mut joins).await;
    assert_eq!((join.cluster, &join.addr[..]), (Some(CLUSTER), "node.example:7"));
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_refusal_ends_a_node_that_is_no_member_yet() {
    for code in [RefusalCode::Exists, RefusalCode::Conflict, RefusalCode::WrongCluster, RefusalCode::Retired] {
        let folder = tempfile::tempdir().unwrap();
        let (addr, _joins) = balancer(Some(CLUSTER), no(code)).await;
        let node = Node::start(config(folder.path(), &[&addr])).await.unwrap();
        let reason = timeout(PATIENCE, node.failed()).await.unwrap();
        assert!(reason.contains("the balancer's own words") && reason.contains(&addr), "{reason}");
        assert_eq!(node.cluster(), None);
        node.stop().await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_outlives_refusals_that_are_not_about_membership() {
    let folder = tempfile::tempdir().unwrap();
    let answer: Answer = Arc::new(|join| match join.cluster {
        None => Ok(JoinDone { cluster: CLUSTER }),
        Some(_) => Err(Failure::refusal(RefusalCode::Exists, "the name is taken")),
    });
    let (addr, mut joins) = balancer(Some(CLUSTER), answer).await;
    let node = Node::start(config(folder.path(), &[&addr])).await.unwrap();
    for _ in 0..3 {
        next(&mut joins).await;
    }
    assert!(timeout(std::time::Duration::from_millis(1), node.failed()).await.is_err());
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_that_its_cluster_retired_ends_for_good() {
    let folder = tempfile::tempdir().unwrap();
    let answer: Answer = Arc::new(|join| match join.cluster {
        None => Ok(JoinDone { cluster: CLUSTER }),
        Some(_) => Err(Failure::refusal(RefusalCode::Retired, "it was removed")),
    });
    let (addr, _joins) = balancer(Some(CLUSTER), answer).await;
    let node = Node::start(config(folder.path(), &[&addr])).await.unwrap();
    let reason = timeout(PATIENCE, node.failed()).await.unwrap();
    assert!(reason.contains("it was removed"), "{reason}");
    node.stop().await;
    let error = Node::start(config(folder.path(), &[&addr])).await.unwrap_err().to_string();
    assert!(error.contains("it was removed") && error.contains("remove the directory"), "{error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_member_is_not_taken_by_another_cluster() {
    let folder = tempfile::tempdir().unwrap();
    let (addr, _joins) = balancer(Some(CLUSTER), yes()).await;
    let node = Node::start(config(folder.path(), &[&addr])).await.unwrap();
    while node.cluster().is_none() {
        tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    }
    node.stop().await;
    // One refuses the handshake; the other takes anybody, and says a cluster that is not the node's.
    let other = ClusterId(99);
    let strange: Answer = Arc::new(move |_| Ok(JoinDone { cluster: other }));
    for cluster in [Some(other), None] {
        let (addr, _joins) = balancer(cluster, strange.clone()).await;
        let node = Node::start(config(folder.path(), &[&addr])).await.unwrap();
        let reason = timeout(PATIENCE, node.failed()).await.unwrap();
        assert!(reason.contains("cluster"), "{reason}");
        assert_eq!(node.cluster(), Some(CLUSTER));
        node.stop().await;
    }
}

#[tokio::test]
async fn a_node_that_listens_everywhere_must_say_where_it_is_reached() {
    let folder = tempfile::tempdir().unwrap();
    let everywhere = NodeConfig { listen: "0.0.0.0:0".into(), ..config(folder.path(), &["balancer.example:1"]) };
    let error = Node::start(everywhere.clone()).await.unwrap_err().to_string();
    assert!(error.contains("--advertise"), "{error}");
    let without_port = NodeConfig { advertise: Some("here".into()), ..everywhere.clone() };
    let error = Node::start(without_port).await.unwrap_err().to_string();
    assert!(error.contains("host:port"), "{error}");
    let alone = NodeConfig { join: vec![], ..everywhere };
    let node = Node::start(alone).await.unwrap();
    assert_ne!(node.id(), NodeId(0));
    node.stop().await;
}
