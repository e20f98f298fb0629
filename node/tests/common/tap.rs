//! A road to a node on which everything that passes is counted.

#![expect(clippy::disallowed_methods, reason = "a test starts tasks")]

use bytes::BytesMut;
use shkv_proto::message::RaftMessage;
use shkv_proto::session::FrameReader;
use shkv_proto::{Frame, Kind, codec};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

/// What has passed, in both directions.
#[derive(Default)]
pub struct Passed {
    /// Raft messages that carry entries.
    pub appends: AtomicU64,
    /// Entries in them.
    pub entries: AtomicU64,
    /// Frames of another kind than Raft's.
    pub others: AtomicU64,
}

impl Passed {
    fn count(&self, frame: &Frame) {
        if frame.header.kind != Kind::Raft {
            self.others.fetch_add(1, Ordering::Relaxed);
            return;
        }
        let messages: Vec<RaftMessage> = codec::decode(&frame.head).unwrap();
        let entries = messages.iter().map(|message| message.entries.len()).filter(|entries| *entries > 0);
        self.appends.fetch_add(entries.clone().count() as u64, Ordering::Relaxed);
        self.entries.fetch_add(entries.sum::<usize>() as u64, Ordering::Relaxed);
    }

    /// What has passed so far: messages with entries, entries, other frames.
    pub fn so_far(&self) -> [u64; 3] {
        [&self.appends, &self.entries, &self.others].map(|count| count.load(Ordering::Relaxed))
    }
}

/// Opens a road to `target` and returns where it begins. It stays for as long as the runtime does.
pub async fn road_to(target: String, passed: Arc<Passed>) -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    tokio::spawn(async move {
        while let Ok((near, _)) = listener.accept().await {
            let Ok(far) = TcpStream::connect(&target).await else { continue };
            let _ = (near.set_nodelay(true), far.set_nodelay(true));
            let ((near_reader, near_writer), (far_reader, far_writer)) = (near.into_split(), far.into_split());
            tokio::spawn(carry(near_reader, far_writer, passed.clone()));
            tokio::spawn(carry(far_reader, near_writer, passed.clone()));
        }
    });
    addr
}

async fn carry(from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, passed: Arc<Passed>) {
    let mut reader = FrameReader::new(from);
    reader.handshake_done();
    let (mut frames, mut bytes) = (Vec::new(), BytesMut::new());
    while let Ok(true) = reader.next_batch(&mut frames).await {
        for frame in frames.drain(..) {
            passed.count(&frame);
            frame.encode(&mut bytes);
        }
        if to.write_all(&bytes.split()).await.is_err() {
            return;
        }
    }
}
