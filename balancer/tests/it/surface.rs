//! What the HTTP listener says.

use crate::fake::PATIENCE;
use crate::setup::{put, setup};
use shkv_balancer::{Balancer, Bootstrap};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::Instant;

/// Status line and body of the answer to a GET.
async fn fetch(balancer: &Balancer, path: &str) -> (String, String) {
    let mut stream = TcpStream::connect(balancer.http_addr().unwrap()).await.unwrap();
    let request = format!("GET {path} HTTP/1.1\r\nHost: test\r\nConnection: close\r\n\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    tokio::time::timeout(PATIENCE, stream.read_to_string(&mut answer)).await.unwrap().unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn life_readiness_and_metrics_are_told_and_anything_else_is_a_json_error() {
    let setup = setup(3, Bootstrap { shards: 2, replicas: 3 }).await;
    put(&setup.client, b"k", b"v").await.unwrap();
    assert_eq!(fetch(&setup.balancer, "/livez").await, ("HTTP/1.1 200 OK".into(), "ok".into()));
    let (status, body) = fetch(&setup.balancer, "/readyz").await;
    assert!(status.contains("200") && body.contains("\"ready\":true"), "{status} {body}");
    let (_, metrics) = fetch(&setup.balancer, "/metrics").await;
    for line in [
        "requests_total{kind=\"put\",outcome=\"done\"} 1",
        "shards_without_leader 0",
        "nodes{health=\"up\"} 3",
        "nodes{health=\"down\"} 0",
        "replicas_moving 0",
        "links_up{node=\"000000000000000b\"} 2",
    ] {
        assert!(metrics.contains(line), "{line} is not in\n{metrics}");
    }
    let (status, body) = fetch(&setup.balancer, "/nothing").await;
    assert!(status.contains("400") && body.contains("\"status\":\"failure\""), "{status} {body}");

    setup.nodes[0].stop();
    setup.nodes[1].stop();
    let until = Instant::now() + PATIENCE;
    loop {
        let (status, body) = fetch(&setup.balancer, "/readyz").await;
        if status.contains("503") {
            assert!(body.contains("\"ready\":false") && body.contains("shards_without"), "{body}");
            break;
        }
        assert!(Instant::now() < until, "still ready with one node of three: {body}");
    }
}
