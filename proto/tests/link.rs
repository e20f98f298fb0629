//! Links over real sockets: answers in any order, and exactly one outcome for each request whatever the other side does.

#![expect(clippy::disallowed_methods, reason = "a test of a shell: starts tasks and tells the time")]

use bytes::{Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Header, Kind};
use shkv_proto::limits::{CREDIT_REQUESTS, Limits};
use shkv_proto::link::{CallError, Link, LinkError};
use shkv_proto::message::{Failure, Hello, RefusalCode, Role, Welcome, WriteDone};
use shkv_proto::session::{Session, accept};
use shkv_proto::{ClusterId, NodeId};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::net::TcpListener;
use tokio::sync::mpsc;
use tokio::time::Instant;

/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(20);

fn soon() -> Instant {
    Instant::now() + LONG
}

/// The other side of a link, under the test's control.
struct Server {
    listener: TcpListener,
}

impl Server {
    async fn start() -> (Self, String) {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("an address").to_string();
        (Self { listener }, addr)
    }

    async fn accept(&self) -> Peer {
        let (stream, _) = self.listener.accept().await.expect("a connection");
        let welcome = |_: &Hello| {
            let role = Role::Node(NodeId(1));
            Ok(Welcome { version: 1, cluster: Some(ClusterId(7)), role, name: "n".into(), limits: Limits::OURS })
        };
        Peer { session: accept(stream, welcome).await.expect("a handshake") }
    }
}

struct Peer {
    session: Session<Hello>,
}

impl Peer {
    /// The next `count` requests.
    async fn requests(&mut self, count: usize) -> Vec<Frame> {
        let mut frames = Vec::new();
        while frames.len() < count {
            let mut batch = Vec::new();
            assert!(self.session.reader.next_batch(&mut batch).await.expect("sound frames"), "the link is closed");
            frames.extend(batch);
        }
        assert_eq!(frames.len(), count, "more requests than were expected");
        frames
    }

    /// Answers with the request's own tail.
    async fn answer(&mut self, request: &Frame) {
        self.send(&Frame { header: request.header.answer(Kind::Done), ..request.clone() }).await;
    }

    async fn send(&mut self, frame: &Frame) {
        let mut bytes = BytesMut::new();
        frame.encode(&mut bytes);
        self.session.writer.write_all(&bytes).await.expect("the link reads");
    }
}

async fn linked() -> (Server, Link, Peer) {
    let (server, addr) = Server::start().await;
    let link = Link::open(addr, Hello::ours(None, Role::Client), |_| Ok(()));
    let peer = server.accept().await;
    link.connected(soon()).await.expect("a connection");
    (server, link, peer)
}

fn request(n: u8) -> Frame {
    Frame::new(Header::new(Kind::Get), vec![], vec![n])
}

/// Sends requests; their outcomes come out of the channel with their numbers.
async fn submit(
    link: &Link,
    numbers: impl IntoIterator<Item = u8>,
    deadline: Instant,
) -> mpsc::UnboundedReceiver<(u8, Result<Frame, LinkError>)> {
    let (outcomes, received) = mpsc::unbounded_channel();
    for n in numbers {
        let outcomes = outcomes.clone();
        link.submit(request(n), deadline, move |result| drop(outcomes.send((n, result)))).await;
    }
    received
}

#[tokio::test]
async fn answers_may_come_in_any_order() {
    let (_server, link, mut peer) = linked().await;
    let mut outcomes = submit(&link, 0..50, soon()).await;
    let mut requests = peer.requests(50).await;
    requests.reverse();
    requests.rotate_left(7);
    for request in &requests {
        peer.answer(request).await;
        let (n, result) = outcomes.recv().await.expect("an outcome");
        assert_eq!(result.expect("an answer").tail, vec![n], "each request gets its own answer");
        assert_eq!(request.tail, vec![n]);
    }
    assert!(outcomes.recv().await.is_none(), "one outcome each");
}

#[tokio::test]
async fn what_was_sent_when_the_connection_is_lost_is_lost_and_the_link_comes_back() {
    let (server, link, mut peer) = linked().await;
    let mut outcomes = submit(&link, 0..3, soon()).await;
    let requests = peer.requests(3).await;
    peer.answer(&requests[1]).await;
    assert!(matches!(outcomes.recv().await, Some((1, Ok(_)))));
    drop(peer);
    for _ in 0..2 {
        let (n, result) = outcomes.recv().await.expect("an outcome");
        assert!(matches!(result, Err(LinkError::Lost(_))), "request {n}: {result:?}");
    }
    assert!(outcomes.recv().await.is_none(), "one outcome each");
    let (mut peer, call) = (server.accept().await, async { link.call(request(9), soon()).await });
    link.connected(soon()).await.expect("the link connects again by itself");
    let (answer, ()) = tokio::join!(call, async {
        let requests = peer.requests(1).await;
        peer.answer(&requests[0]).await;
    });
    assert_eq!(answer.expect("an answer").tail, vec![9]);
}

#[tokio::test]
async fn a_link_waits_for_a_server_that_was_not_there_yet() {
    let (server, addr) = Server::start().await;
    drop(server);
    let link = Link::open(addr.clone(), Hello::ours(None, Role::Client), |_| Ok(()));
    let error = link.call(request(1), soon()).await.expect_err("nobody is there");
    assert!(matches!(error, LinkError::NotSent(_)), "{error}");
    let server = Server { listener: TcpListener::bind(&addr).await.expect("the port is still free") };
    link.retry_now();
    let accepting = tokio::spawn(async move { server.accept().await });
    while link.connected(soon()).await.is_err() {
        tokio::task::yield_now().await; // the attempt that failed is told until the next one is under way
    }
    accepting.await.expect("a connection");
    assert_eq!(link.welcome().expect("up").cluster, Some(ClusterId(7)));
}

#[tokio::test]
async fn a_request_without_an_answer_expires_at_its_deadline_and_a_late_answer_finds_nobody() {
    let (_server, link, mut peer) = linked().await;
    let begun = Instant::now();
    let within = Duration::from_millis(150);
    let mut outcomes = submit(&link, [1], begun + within).await;
    let mut patient = submit(&link, [2], soon()).await;
    let requests = peer.requests(2).await;
    assert!((1..=150).contains(&requests[0].header.deadline_ms), "{:?}", requests[0].header);
    assert!(requests[1].header.deadline_ms > 1_000, "{:?}", requests[1].header);
    assert!(matches!(outcomes.recv().await, Some((1, Err(LinkError::Expired)))));
    assert!(begun.elapsed() >= within, "not before its time");
    peer.answer(&requests[0]).await;
    peer.answer(&requests[1]).await;
    assert!(matches!(patient.recv().await, Some((2, Ok(_)))));
    assert!(outcomes.recv().await.is_none(), "one outcome each");
}

#[tokio::test]
async fn credit_bounds_the_requests_in_flight() {
    let (_server, link, mut peer) = linked().await;
    let answered = Arc::new(AtomicU32::new(0));
    for _ in 0..CREDIT_REQUESTS {
        let answered = answered.clone();
        let done = move |result: Result<Frame, LinkError>| {
            answered.fetch_add(u32::from(result.is_ok()), Ordering::SeqCst);
        };
        assert!(link.try_submit(request(0), soon(), done).is_ok());
    }
    assert!(link.try_submit(request(1), soon(), |_| ()).is_err(), "without credit nothing is taken");
    let mut refused = submit(&link, [2], Instant::now() + Duration::from_millis(50)).await;
    assert!(matches!(refused.recv().await, Some((2, Err(LinkError::NotSent(_))))), "no credit in time is not sent");
    let requests = peer.requests(CREDIT_REQUESTS as usize).await;
    let waiting = tokio::spawn({
        let link = link.clone();
        async move { link.call(request(3), soon()).await }
    });
    for request in &requests {
        peer.answer(request).await;
    }
    let next = peer.requests(1).await;
    assert_eq!(next[0].tail, vec![3]);
    peer.answer(&next[0]).await;
    assert!(waiting.await.expect("no panic").is_ok());
    assert_eq!(answered.load(Ordering::SeqCst), CREDIT_REQUESTS);
}

#[tokio::test]
async fn credit_comes_back_however_a_request_ends() {
    let (server, link, peer) = linked().await;
    let full = |link: &Link| {
        let mut taken = 0;
        while link.try_submit(request(0), soon(), |_| ()).is_ok() {
            taken += 1;
        }
        taken
    };
    assert_eq!(full(&link), CREDIT_REQUESTS);
    drop(peer);
    let mut peer = server.accept().await;
    link.connected(soon()).await.expect("a connection");
    let short = Instant::now() + Duration::from_millis(30);
    let mut expired = submit(&link, 0..100, short).await;
    while let Some((_, result)) = expired.recv().await {
        assert_eq!(result, Err(LinkError::Expired));
    }
    peer.requests(100).await;
    assert_eq!(full(&link), CREDIT_REQUESTS);
}

#[tokio::test]
async fn an_answer_that_cannot_be_read_is_an_unknown_outcome() {
    let (_server, link, mut peer) = linked().await;
    let answers = [
        (Kind::Done, codec::encode(&Failure::refusal(RefusalCode::Conflict, "x".repeat(50))).expect("a small head")),
        (Kind::Failed, vec![0xff; 5]),
        (Kind::Put, vec![]),
    ];
    for (kind, head) in answers {
        let asking = link.ask::<WriteDone>(request(0), soon());
        let (result, ()) = tokio::join!(asking, async {
            let requests = peer.requests(1).await;
            peer.send(&Frame::new(requests[0].header.answer(kind), head, Bytes::new())).await;
        });
        assert!(matches!(result, Err(CallError::Failure(Failure::Unknown { .. }))), "{kind:?}: {result:?}");
    }
}

#[tokio::test]
async fn a_server_that_sends_garbage_loses_the_connection_and_nothing_else() {
    let (server, link, mut peer) = linked().await;
    let mut outcomes = submit(&link, [1], soon()).await;
    peer.requests(1).await;
    peer.session.writer.write_all(&[0xff; 64]).await.expect("a write");
    assert!(matches!(outcomes.recv().await, Some((1, Err(LinkError::Lost(_))))));
    let _again = server.accept().await;
    link.connected(soon()).await.expect("a connection");
}

#[tokio::test]
async fn whoever_is_turned_down_gets_no_request() {
    let (server, addr) = Server::start().await;
    let link = Link::open(addr, Hello::ours(None, Role::Client), |_| Err("not the node that was meant".into()));
    let mut peer = server.accept().await;
    let error = link.call(request(1), soon()).await.expect_err("turned down");
    assert_eq!(error, LinkError::NotSent(format!("{}: not the node that was meant", link.addr())));
    assert!(matches!(peer.session.reader.next_batch(&mut Vec::new()).await, Ok(false) | Err(_)));
}

#[tokio::test]
async fn the_last_clone_closes_the_connection_and_ends_what_is_in_flight() {
    let (_server, link, mut peer) = linked().await;
    let other = link.clone();
    let mut outcomes = submit(&link, [1], soon()).await;
    peer.requests(1).await;
    drop(link);
    assert!(other.welcome().is_some(), "a clone keeps it open");
    drop(other);
    assert!(matches!(outcomes.recv().await, Some((1, Err(LinkError::Lost(_))))));
    assert!(matches!(peer.session.reader.next_batch(&mut Vec::new()).await, Ok(false) | Err(_)));
}
