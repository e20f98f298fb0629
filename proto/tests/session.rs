//! Connections over real sockets: handshakes that are refused, frames that stay half sent or announce too much, and
//! that none of it disturbs anybody else.

#![expect(clippy::disallowed_methods, reason = "a test of a shell: starts tasks and tells the time")]

use bytes::{Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::frame::{Frame, FrameError, Header, Kind};
use shkv_proto::hashing::frame_check;
use shkv_proto::limits::{FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX, Limits};
use shkv_proto::message::{Failure, Hello, MAGIC, RefusalCode, Role, Welcome};
use shkv_proto::session::{FrameReader, Session, SessionError, accept, connect, failure_of};
use shkv_proto::{ClusterId, NodeId};
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt, ReadBuf};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinHandle;
use tokio::time::Instant;

const OURS: ClusterId = ClusterId(7);
const OTHER: ClusterId = ClusterId(8);
/// Longer than anything here takes on a busy machine.
const LONG: Duration = Duration::from_secs(20);

fn welcome(hello: &Hello) -> Result<Welcome, Failure> {
    let version = hello.version_in_common()?;
    hello.check_cluster(Some(OURS))?;
    Ok(Welcome { version, cluster: Some(OURS), role: Role::Node(NodeId(1)), name: "n".into(), limits: Limits::OURS })
}

/// A server that takes every connection, and answers each frame with its own head and tail.
async fn echo_server() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            tokio::spawn(echo(stream));
        }
    });
    addr
}

async fn echo(stream: TcpStream) -> Result<(), SessionError> {
    let Session { mut reader, mut writer, .. } = accept(stream, welcome).await?;
    let mut frames = Vec::new();
    while reader.next_batch(&mut frames).await? {
        for frame in frames.drain(..) {
            writer.write_all(&encoded(&Frame { header: frame.header.answer(Kind::Done), ..frame })).await?;
        }
    }
    Ok(())
}

/// A server that takes one connection and says how that went.
async fn accept_one() -> (String, JoinHandle<Result<Session<Hello>, SessionError>>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
    let addr = listener.local_addr().expect("an address").to_string();
    let accepted = tokio::spawn(async move {
        let (stream, _) = listener.accept().await?;
        accept(stream, welcome).await
    });
    (addr, accepted)
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::new();
    frame.encode(&mut bytes);
    bytes
}

fn hello_frame(hello: &Hello) -> Frame {
    Frame::new(Header::new(Kind::Hello), codec::encode(hello).expect("a small head"), Bytes::new())
}

fn hello() -> Hello {
    Hello::ours(Some(OURS), Role::Client)
}

/// Sends `bytes`, and reads what comes back until the other side closes; a reset counts as that.
async fn answer_to(addr: &str, bytes: &[u8]) -> Vec<u8> {
    let mut stream = TcpStream::connect(addr).await.expect("the server is there");
    stream.write_all(bytes).await.expect("the server takes a few bytes");
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(LONG, stream.read_to_end(&mut answer)).await.expect("the server closes");
    answer
}

async fn refusal_to(addr: &str, bytes: &[u8]) -> Failure {
    let answer = answer_to(addr, bytes).await;
    let frame = Frame::decode(&mut BytesMut::from(&answer[..]), HANDSHAKE_BYTES_MAX);
    let frame = frame.expect("a sound frame").expect("a whole frame");
    assert_eq!(frame.header.kind, Kind::Failed);
    failure_of(&frame)
}

async fn still_serves(addr: &str) {
    let Session { mut reader, mut writer, peer } = connect(addr, &hello()).await.expect("a handshake");
    assert_eq!((peer.version, peer.cluster), (1, Some(OURS)));
    let mut header = Header::new(Kind::Get);
    header.request = 5;
    writer.write_all(&encoded(&Frame::new(header, vec![1], vec![2; 100_000]))).await.expect("a write");
    let answer = reader.next_one().await.expect("an answer");
    assert_eq!((answer.header.request, answer.tail.len()), (5, 100_000));
}

#[tokio::test]
async fn a_handshake_that_asks_for_the_impossible_is_told_why() {
    let addr = echo_server().await;
    let code_of = async |hello: Hello| match refusal_to(&addr, &encoded(&hello_frame(&hello))).await {
        Failure::Refusal { code, text } => (code, text),
        other => panic!("{other:?}"),
    };
    let (code, _) = code_of(Hello { magic: MAGIC + 1, ..hello() }).await;
    assert_eq!(code, RefusalCode::Malformed);
    let (code, text) = code_of(Hello { version_min: 3, version_max: 4, ..hello() }).await;
    assert_eq!(code, RefusalCode::Version);
    assert!(text.contains("3 to 4") && text.contains("1 to 1"), "{text}");
    let (code, _) = code_of(Hello { version_min: 2, version_max: 1, ..hello() }).await;
    assert_eq!(code, RefusalCode::Version, "a range that is upside down holds no version");
    let (code, text) = code_of(Hello { cluster: Some(OTHER), ..hello() }).await;
    assert_eq!(code, RefusalCode::WrongCluster);
    assert!(text.contains(&OURS.to_string()) && text.contains(&OTHER.to_string()), "{text}");
    still_serves(&addr).await;
}

#[tokio::test]
async fn a_newer_build_is_understood_and_a_far_newer_one_is_told_so() {
    let (addr, accepted) = accept_one().await;
    let newer = Hello { version_max: 2, ..hello() };
    let mut frame = hello_frame(&newer);
    frame.head = [&frame.head[..], b"a field of version 2"].concat().into();
    let mut stream = TcpStream::connect(&addr).await.expect("the server is there");
    stream.write_all(&encoded(&frame)).await.expect("a write");
    assert_eq!(accepted.await.expect("no panic").expect("a handshake").peer, newer);

    let (addr, accepted) = accept_one().await;
    let mut bytes = encoded(&hello_frame(&Hello { version_min: 9, version_max: 9, ..hello() }));
    bytes[8] = 9;
    let check = frame_check(&bytes[8..]);
    bytes[4..8].copy_from_slice(&check.to_le_bytes());
    let failure = refusal_to(&addr, &bytes).await;
    assert!(matches!(failure, Failure::Refusal { code: RefusalCode::Version, .. }), "{failure}");
    assert!(matches!(accepted.await.expect("no panic"), Err(SessionError::Refused(_))));
}

#[tokio::test]
async fn the_connecting_side_hears_the_other_sides_own_words() {
    let addr = echo_server().await;
    let error = connect(&addr, &Hello { cluster: Some(OTHER), ..hello() }).await.expect_err("another cluster");
    let SessionError::Refused(Failure::Refusal { code, .. }) = error else { panic!("{error}") };
    assert_eq!(code, RefusalCode::WrongCluster);
}

#[tokio::test]
async fn a_first_frame_that_is_not_hello_ends_the_connection() {
    let (addr, accepted) = accept_one().await;
    assert!(answer_to(&addr, &encoded(&Frame::new(Header::new(Kind::Get), vec![1], vec![]))).await.is_empty());
    assert!(matches!(accepted.await.expect("no panic"), Err(SessionError::Protocol(_))));
}

#[tokio::test]
async fn another_protocol_ends_the_connection() {
    for bytes in [&b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"[..], &[0; 64], &[0xff; 64], b"*1\r\n$4\r\nPING\r\n"] {
        let (addr, accepted) = accept_one().await;
        assert!(answer_to(&addr, bytes).await.is_empty());
        assert!(matches!(accepted.await.expect("no panic"), Err(SessionError::Frame(FrameError::Length { .. }))));
    }
}

#[tokio::test]
async fn nothing_may_follow_hello_before_its_answer() {
    let (addr, accepted) = accept_one().await;
    let mut bytes = encoded(&hello_frame(&hello()));
    Frame::new(Header::new(Kind::Get), vec![1], vec![]).encode(&mut bytes);
    answer_to(&addr, &bytes).await;
    assert!(matches!(accepted.await.expect("no panic"), Err(SessionError::Protocol(_))));
}

#[tokio::test]
async fn a_hello_over_the_handshakes_limit_is_refused_by_its_length_alone() {
    let (addr, accepted) = accept_one().await;
    let length = HANDSHAKE_BYTES_MAX as u32 + 1;
    assert!(answer_to(&addr, &length.to_le_bytes()).await.is_empty());
    let error = accepted.await.expect("no panic").expect_err("a length over the limit");
    assert!(matches!(error, SessionError::Frame(FrameError::Length { .. })), "{error}");
}

#[tokio::test]
async fn an_announced_length_over_the_limit_ends_only_its_own_connection() {
    let addr = echo_server().await;
    let bystander = connect(&addr, &hello()).await.expect("a handshake");
    for length in [FRAME_BYTES_MAX as u32 + 1, u32::MAX, 35, 0] {
        let Session { mut reader, mut writer, .. } = connect(&addr, &hello()).await.expect("a handshake");
        writer.write_all(&length.to_le_bytes()).await.expect("a write");
        let end = tokio::time::timeout(LONG, reader.next_batch(&mut Vec::new())).await.expect("the server closes");
        assert!(matches!(end, Ok(false) | Err(SessionError::Io(_))), "{end:?}");
    }
    let Session { mut reader, mut writer, .. } = bystander;
    writer.write_all(&encoded(&Frame::new(Header::new(Kind::Get), vec![1], vec![]))).await.expect("a write");
    assert_eq!(reader.next_one().await.expect("an answer").head, vec![1]);
}

#[tokio::test]
async fn half_frames_held_open_disturb_nobody() {
    let addr = echo_server().await;
    let mut held = Vec::new();
    for cut in [1, 3, 4, 5, 39, 40, 41] {
        let mut session = connect(&addr, &hello()).await.expect("a handshake");
        let bytes = encoded(&Frame::new(Header::new(Kind::Get), vec![1; 10], vec![2; 10]));
        session.writer.write_all(&bytes[..cut]).await.expect("a write");
        held.push((session, bytes, cut));
    }
    still_serves(&addr).await;
    for (Session { mut reader, mut writer, .. }, bytes, cut) in held {
        writer.write_all(&bytes[cut..]).await.expect("a write");
        assert_eq!(reader.next_one().await.expect("an answer").tail.len(), 10, "cut at {cut}");
    }
}

/// A stream that gives one byte at a time, each after a while, and never ends.
struct Trickle {
    bytes: Vec<u8>,
    at: usize,
    pause: Pin<Box<tokio::time::Sleep>>,
}

impl AsyncRead for Trickle {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        std::task::ready!(self.pause.as_mut().poll(cx));
        let next = Instant::now() + Duration::from_millis(10);
        self.pause.as_mut().reset(next);
        buf.put_slice(&self.bytes[self.at..=self.at]);
        self.at += 1;
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn a_frame_that_comes_byte_by_byte_does_not_hold_a_connection_for_ever() {
    let bytes = encoded(&Frame::new(Header::new(Kind::Hello), vec![0; 4_000], vec![])).to_vec();
    let stream = Trickle { bytes, at: 0, pause: Box::pin(tokio::time::sleep(Duration::ZERO)) };
    let mut reader = FrameReader::new(stream).with_half_frame_time(Duration::from_millis(200));
    let mut frames = Vec::new();
    let result = loop {
        // Called anew again and again, as a loop that also waits for other things does.
        if let Ok(result) = tokio::time::timeout(Duration::from_millis(25), reader.next_batch(&mut frames)).await {
            break result;
        }
    };
    assert!(matches!(result, Err(SessionError::Slow(..))), "{result:?}");
}

/// A stream that gives what it has and then nothing, and remembers the most room that was ever offered to it.
struct Offered<'a> {
    bytes: &'a [u8],
    room_max: &'a mut usize,
}

impl AsyncRead for Offered<'_> {
    fn poll_read(mut self: Pin<&mut Self>, _: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<std::io::Result<()>> {
        *self.room_max = buf.remaining().max(*self.room_max);
        let (now, later) = self.bytes.split_at(buf.remaining().min(self.bytes.len()));
        buf.put_slice(now);
        self.bytes = later;
        Poll::Ready(Ok(()))
    }
}

#[tokio::test]
async fn room_is_made_for_bytes_that_came_not_for_those_announced() {
    for (announced, sent) in [(FRAME_BYTES_MAX, 4), (FRAME_BYTES_MAX, 50_000), (FRAME_BYTES_MAX + 1, 4), (1 << 31, 4)] {
        let mut bytes = vec![0; sent];
        bytes[..4].copy_from_slice(&(announced as u32).to_le_bytes());
        let mut room_max = 0;
        let mut reader = FrameReader::new(Offered { bytes: &bytes, room_max: &mut room_max });
        reader.handshake_done();
        assert!(reader.next_batch(&mut Vec::new()).await.is_err());
        drop(reader);
        assert!(room_max <= (2 << 20) + 2 * sent, "room for {room_max} bytes when {announced} were announced");
    }
}

#[tokio::test]
async fn an_answer_to_hello_that_is_no_answer_is_an_error() {
    let odd = [
        encoded(&Frame::new(Header::new(Kind::Get), vec![1], vec![])),
        encoded(&Frame::new(Header::new(Kind::Welcome), vec![0xff; 9], vec![])),
        encoded(&Frame::new(Header::new(Kind::Failed), vec![0xff; 9], vec![])),
        BytesMut::from(&b"HTTP/1.1 400 Bad Request\r\n\r\n"[..]),
        BytesMut::new(),
    ];
    for bytes in odd {
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a free port");
        let addr = listener.local_addr().expect("an address").to_string();
        let answering = tokio::spawn(async move {
            let (mut stream, _) = listener.accept().await.expect("a connection");
            let mut first = [0; 40];
            stream.read_exact(&mut first).await.expect("a header");
            stream.write_all(&bytes).await.expect("a write");
        });
        assert!(connect(&addr, &hello()).await.is_err());
        answering.await.expect("no panic");
    }
}
