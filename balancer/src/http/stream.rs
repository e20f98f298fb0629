//! Answers that are written while they are read: page by page, with one page ahead, never whole in memory.

use axum::body::{Body, HttpBody};
use bytes::Bytes;
use http_body::Frame;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use tokio::sync::mpsc;

/// Pieces that wait to be sent.
const PIECES_MAX: usize = 1;

/// Where the pieces of a body go in.
pub(crate) type Pieces = mpsc::Sender<Result<Bytes, io::Error>>;

/// A body that ends when the other end is dropped. An error sent into it cuts the connection, so that nobody takes a
/// part for the whole.
pub(crate) fn body() -> (Pieces, Body) {
    let (sender, receiver) = mpsc::channel(PIECES_MAX);
    (sender, Body::new(Streamed { receiver }))
}

#[derive(Debug)]
struct Streamed {
    receiver: mpsc::Receiver<Result<Bytes, io::Error>>,
}

impl HttpBody for Streamed {
    type Data = Bytes;
    type Error = io::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, io::Error>>> {
        self.receiver.poll_recv(cx).map(|piece| piece.map(|piece| piece.map(Frame::data)))
    }
}
