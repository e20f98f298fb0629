//! What waits to be written to one connection. Everybody who has something to send appends to it; one task writes all
//! that is there with one system call, so that frames of the same moment share it.
//!
//! Small tails are copied next to their heads; a large tail is kept as it is and written from where it lies.

use crate::frame::{Frame, HEADER_BYTES};
use crate::hashing::frame_check;
use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// Tails up to this size are copied: cheaper than a separate piece of a vectored write.
const TAIL_COPY_BYTES_MAX: usize = 16 << 10;
/// A buffer that has grown beyond this is given back to the allocator after it was written.
const SPARE_BYTES_MAX: usize = 256 << 10;
/// How often a write is put off for frames that are about to come. At rest that costs a look at the sockets each.
const GATHER_TURNS_MAX: usize = 4;
/// Bytes that are worth a write by themselves.
const GATHER_BYTES_MAX: usize = 32 << 10;

/// The bytes that wait for one connection.
#[derive(Debug, Default)]
pub struct Outbox {
    queue: Mutex<Queue>,
    filled: Notify,
    drained: Notify,
}

#[derive(Debug, Default)]
struct Queue {
    pieces: VecDeque<Bytes>,
    open: BytesMut,
    bytes: usize,
    closed: bool,
}

impl Outbox {
    /// Appends a frame. It is dropped when the outbox is closed: the connection is gone and its waiters know.
    pub fn push(&self, frame: &Frame) {
        let mut queue = self.queue.lock();
        if queue.closed {
            return;
        }
        let was_empty = queue.bytes == 0;
        queue.bytes += frame.wire_bytes();
        if frame.tail.len() <= TAIL_COPY_BYTES_MAX {
            frame.encode(&mut queue.open);
        } else {
            let (front, check) = front_of(frame);
            let queue = &mut *queue;
            queue.open.extend_from_slice(&front[..4]);
            queue.open.extend_from_slice(&check.to_le_bytes());
            queue.open.extend_from_slice(&front[8..]);
            queue.pieces.push_back(queue.open.split().freeze());
            queue.pieces.push_back(frame.tail.clone());
        }
        drop(queue);
        if was_empty {
            self.filled.notify_one();
        }
    }

    /// Bytes that are not yet handed to the system.
    pub fn bytes(&self) -> usize {
        self.queue.lock().bytes
    }

    /// Lets [`Outbox::write_to`] end when all is written, and drops what is pushed from now on.
    pub fn close(&self) {
        self.queue.lock().closed = true;
        self.filled.notify_one();
        self.drained.notify_waiters();
    }

    /// Waits until no more than `bytes` are waiting, or the outbox is closed.
    pub async fn drained_to(&self, bytes: usize) {
        loop {
            let notified = self.drained.notified();
            {
                let queue = self.queue.lock();
                if queue.bytes <= bytes || queue.closed {
                    return;
                }
            }
            notified.await;
        }
    }

    /// Lets whoever else is about to send do so first: their frames then share one write. Goes on for as long as each turn
    /// brings more, but for no more than [`GATHER_TURNS_MAX`].
    async fn gathered(&self) {
        let mut before = 0;
        for _ in 0..GATHER_TURNS_MAX {
            let bytes = self.bytes();
            if bytes == before || bytes >= GATHER_BYTES_MAX {
                return;
            }
            before = bytes;
            tokio::task::yield_now().await;
        }
    }

    /// Writes what is pushed until the outbox is closed and empty.
    ///
    /// # Errors
    /// The stream's error; the outbox is closed then.
    pub async fn write_to<W: AsyncWrite + Unpin>(&self, stream: &mut W) -> io::Result<()> {
        let mut spare = BytesMut::new();
        loop {
            let (mut pieces, mut open, closed) = {
                let mut queue = self.queue.lock();
                let queue = &mut *queue;
                (
                    std::mem::take(&mut queue.pieces),
                    std::mem::replace(&mut queue.open, std::mem::take(&mut spare)),
                    queue.closed,
                )
            };
            if pieces.is_empty() && open.is_empty() {
                if closed {
                    return stream.shutdown().await;
                }
                spare = open;
                self.filled.notified().await;
                self.gathered().await;
                continue;
            }
            let bytes = pieces.iter().map(Bytes::len).sum::<usize>() + open.len();
            let result = if pieces.is_empty() {
                stream.write_all(&open).await
            } else {
                pieces.push_back(open.split().freeze());
                stream.write_all_buf(&mut Pieces(pieces)).await
            };
            if result.is_err() {
                self.close();
                return result;
            }
            open.clear();
            if open.capacity() <= SPARE_BYTES_MAX {
                spare = open;
            }
            let mut queue = self.queue.lock();
            queue.bytes -= bytes;
            let more = queue.bytes > 0;
            drop(queue);
            self.drained.notify_waiters();
            if more {
                self.filled.notify_one(); // its pusher saw bytes > 0 and left the wake-up to us
            }
        }
    }
}

/// The header and head of a frame whose tail is sent from where it lies, and the check over all three.
fn front_of(frame: &Frame) -> (BytesMut, u32) {
    let without_tail = Frame { tail: Bytes::new(), ..frame.clone() };
    let mut front = BytesMut::with_capacity(HEADER_BYTES + frame.head.len());
    without_tail.encode(&mut front);
    let length = (frame.wire_bytes() - 4) as u32;
    front[..4].copy_from_slice(&length.to_le_bytes());
    (front.clone(), frame_check_of(&front[8..], &frame.tail))
}

fn frame_check_of(front: &[u8], tail: &[u8]) -> u32 {
    let mut hasher = xxhash_rust::xxh3::Xxh3::new();
    hasher.update(front);
    hasher.update(tail);
    let check = hasher.digest() as u32;
    debug_assert!(!tail.is_empty() || check == frame_check(front));
    check
}

/// Pieces of memory as one buffer for a vectored write.
struct Pieces(VecDeque<Bytes>);

impl Buf for Pieces {
    fn remaining(&self) -> usize {
        self.0.iter().map(Bytes::len).sum()
    }

    fn chunk(&self) -> &[u8] {
        self.0.iter().find(|piece| !piece.is_empty()).map_or(&[], |piece| piece)
    }

    fn advance(&mut self, mut count: usize) {
        while let Some(front) = self.0.front_mut() {
            let here = front.len().min(count);
            front.advance(here);
            count -= here;
            if !front.is_empty() {
                break;
            }
            self.0.pop_front();
        }
        assert_eq!(count, 0, "advanced beyond the end");
    }

    fn chunks_vectored<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut filled = 0;
        for (slice, piece) in slices.iter_mut().zip(self.0.iter().filter(|piece| !piece.is_empty())) {
            *slice = IoSlice::new(piece);
            filled += 1;
        }
        filled
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame::{Header, Kind};
    use crate::limits::FRAME_BYTES_MAX;

    #[tokio::test]
    async fn frames_come_out_in_order_whatever_their_size() {
        let outbox = Outbox::default();
        let frames: Vec<Frame> = [0, 10, 100_000, 5, 16 << 10, (16 << 10) + 1]
            .iter()
            .enumerate()
            .map(|(n, size)| {
                let mut header = Header::new(Kind::Put);
                header.request = n as u64;
                Frame::new(header, vec![n as u8; 7], vec![n as u8; *size])
            })
            .collect();
        for frame in &frames {
            outbox.push(frame);
        }
        outbox.close();
        let mut written = Vec::new();
        outbox.write_to(&mut written).await.unwrap();
        let mut buffer = BytesMut::from(&written[..]);
        for frame in &frames {
            assert_eq!(Frame::decode(&mut buffer, FRAME_BYTES_MAX).unwrap().as_ref(), Some(frame));
        }
        assert!(buffer.is_empty());
        assert_eq!(outbox.bytes(), 0);
    }

    #[tokio::test]
    async fn nothing_is_taken_after_close() {
        let outbox = Outbox::default();
        outbox.close();
        outbox.push(&Frame::new(Header::new(Kind::Get), vec![1], vec![]));
        assert_eq!(outbox.bytes(), 0);
        outbox.drained_to(0).await;
    }
}
