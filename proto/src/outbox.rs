//! What waits to be written to one connection. Everybody who has something to send appends to it; one task writes all
//! that is there with one system call, so that frames of the same moment share it.
//!
//! Small tails are copied next to their heads; a large tail is kept as it is and written from where it lies.

use crate::codec::{self, CodecError};
use crate::frame::{Frame, HEADER_BYTES, Header, encode_parts};
use crate::hashing::frame_check;
use bytes::{Buf, Bytes, BytesMut};
use parking_lot::Mutex;
use serde::Serialize;
use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// Tails up to this size are copied: cheaper than a separate piece of a vectored write.
pub const TAIL_COPY_BYTES_MAX: usize = 16 << 10;
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
    /// Whether somebody is writing what is no longer in `pieces` and `open`.
    writing: bool,
    /// Where heads are encoded.
    head: Vec<u8>,
}

impl Outbox {
    /// Appends a frame. It is dropped when the outbox is closed: the connection is gone and its waiters know.
    pub fn push(&self, frame: &Frame) {
        if self.append(frame) {
            self.filled.notify_one();
        }
    }

    /// Appends a frame of which the head is not yet encoded, as [`Outbox::push`] does: it is encoded where it is written
    /// from. The tail is copied, so this is for tails up to [`TAIL_COPY_BYTES_MAX`].
    ///
    /// # Errors
    /// [`CodecError`]; nothing is appended then.
    pub fn push_head<T: Serialize + ?Sized>(&self, header: Header, head: &T, tail: &[u8]) -> Result<(), CodecError> {
        if self.append_head(header, head, tail)? {
            self.filled.notify_one();
        }
        Ok(())
    }

    /// Appends a frame as [`Outbox::push_head`] does, and writes it as [`Outbox::send`] does.
    ///
    /// # Errors
    /// [`CodecError`]; nothing is appended then.
    pub fn send_head<T: Serialize + ?Sized, W: AsyncWrite + Unpin>(
        &self,
        header: Header,
        head: &T,
        tail: &[u8],
        stream: &SharedStream<W>,
    ) -> Result<(), CodecError> {
        let was_empty = self.append_head(header, head, tail)?;
        self.write_or_wake(stream, was_empty);
        Ok(())
    }

    /// Appends a frame; tells whether it is the first that waits, and nobody is writing.
    fn append_head<T: Serialize + ?Sized>(&self, header: Header, head: &T, tail: &[u8]) -> Result<bool, CodecError> {
        let mut queue = self.queue.lock();
        let queue = &mut *queue;
        if queue.closed {
            return Ok(false);
        }
        queue.head.clear();
        codec::encode_into(head, &mut queue.head)?;
        let was_empty = queue.bytes == 0;
        queue.bytes += HEADER_BYTES + queue.head.len() + tail.len();
        encode_parts(&header, &queue.head, tail, &mut queue.open);
        if queue.head.capacity() > SPARE_BYTES_MAX {
            queue.head = Vec::new();
        }
        Ok(was_empty)
    }

    /// Appends a frame and writes what waits at once, as [`Outbox::flush`] does, without waking the writer for it. For
    /// whoever knows that nothing more is about to come.
    pub fn send<W: AsyncWrite + Unpin>(&self, frame: &Frame, stream: &SharedStream<W>) {
        let was_empty = self.append(frame);
        self.write_or_wake(stream, was_empty);
    }

    fn write_or_wake<W: AsyncWrite + Unpin>(&self, stream: &SharedStream<W>, was_empty: bool) {
        if !self.try_write(stream) && was_empty {
            self.filled.notify_one();
        }
    }

    /// Appends a frame; tells whether it is the first that waits, and nobody is writing.
    fn append(&self, frame: &Frame) -> bool {
        let mut queue = self.queue.lock();
        if queue.closed {
            return false;
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
        was_empty
    }

    /// Writes what waits at once, if nobody is writing and the stream takes it; what it does not take is left to
    /// [`Outbox::write_to`]. For whoever knows that nothing more is about to come.
    pub fn flush<W: AsyncWrite + Unpin>(&self, stream: &SharedStream<W>) {
        self.try_write(stream); // otherwise whoever pushed it has woken the writer
    }

    /// Tells whether it tried. If so, and something is left, the writer is woken.
    fn try_write<W: AsyncWrite + Unpin>(&self, stream: &SharedStream<W>) -> bool {
        let mut open = {
            let mut queue = self.queue.lock();
            if queue.writing || !queue.pieces.is_empty() || queue.open.is_empty() {
                return false;
            }
            queue.writing = true;
            std::mem::take(&mut queue.open)
        };
        // The writer is woken below and polls the stream anew, so nobody needs to be told when there is room.
        let mut context = Context::from_waker(Waker::noop());
        let written = match Pin::new(&mut *stream.0.lock()).poll_write(&mut context, &open) {
            Poll::Ready(Ok(written)) => written,
            Poll::Ready(Err(_)) | Poll::Pending => 0, // the writer will meet the error, too
        };
        let closed = {
            let mut queue = self.queue.lock();
            if written < open.len() {
                queue.pieces.push_front(open.split_off(written).freeze());
            } else if queue.open.is_empty() && open.capacity() <= SPARE_BYTES_MAX {
                open.clear();
                queue.open = open;
            }
            queue.closed
        };
        if self.written(written) || closed {
            self.filled.notify_one(); // the writer may have seen that somebody was writing, and gone to sleep
        }
        true
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
            let taken = {
                let mut queue = self.queue.lock();
                let queue = &mut *queue;
                if queue.writing {
                    None // a flush on another thread; it wakes us if it leaves anything
                } else if queue.pieces.is_empty() && queue.open.is_empty() {
                    if queue.closed {
                        break;
                    }
                    None
                } else {
                    queue.writing = true;
                    let open = std::mem::replace(&mut queue.open, std::mem::take(&mut spare));
                    Some((std::mem::take(&mut queue.pieces), open))
                }
            };
            let Some((mut pieces, mut open)) = taken else {
                self.filled.notified().await;
                self.gathered().await;
                continue;
            };
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
            let more = self.written(bytes);
            if more {
                self.filled.notify_one(); // its pusher saw bytes > 0 and left the wake-up to us
            }
        }
        stream.shutdown().await
    }

    /// So many bytes were handed to the system. Tells whether more is there.
    fn written(&self, bytes: usize) -> bool {
        let mut queue = self.queue.lock();
        queue.writing = false;
        queue.bytes -= bytes;
        let more = queue.bytes > 0;
        drop(queue);
        self.drained.notify_waiters();
        more
    }
}

/// A stream that [`Outbox::write_to`] writes to from its task, and [`Outbox::flush`] from others.
#[derive(Debug)]
pub struct SharedStream<W>(Arc<Mutex<W>>);

impl<W> SharedStream<W> {
    /// Shares a stream.
    pub fn new(stream: W) -> Self {
        Self(Arc::new(Mutex::new(stream)))
    }
}

impl<W> Clone for SharedStream<W> {
    fn clone(&self) -> Self {
        Self(self.0.clone())
    }
}

impl<W: AsyncWrite + Unpin> AsyncWrite for SharedStream<W> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.lock()).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut *self.0.lock()).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.0.lock().is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock()).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut *self.0.lock()).poll_shutdown(cx)
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
#[expect(clippy::disallowed_methods, reason = "tests start tasks")]
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

    /// A stream that takes 64 bytes and then no more until they are read: each flush leaves something to the writer, and
    /// frames that are pushed in between come behind it.
    #[tokio::test]
    async fn what_a_flush_leaves_is_written_in_order() {
        use tokio::io::AsyncReadExt;
        let (near, mut far) = tokio::io::duplex(64);
        let stream = SharedStream::new(near);
        let outbox = Arc::new(Outbox::default());
        let writing = {
            let (outbox, mut stream) = (outbox.clone(), stream.clone());
            tokio::spawn(async move { outbox.write_to(&mut stream).await })
        };
        let frames: Vec<Frame> = (0..40_u64)
            .map(|n| {
                let mut header = Header::new(Kind::Put);
                header.request = n;
                let tail_bytes = if n % 10 == 9 { TAIL_COPY_BYTES_MAX + 1 } else { n as usize };
                Frame::new(header, vec![n as u8; 3], vec![n as u8; tail_bytes])
            })
            .collect();
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            far.read_to_end(&mut read).await.map(|_| read)
        });
        for (n, frame) in frames.iter().enumerate() {
            outbox.push(frame);
            if n % 3 != 2 {
                outbox.flush(&stream);
            }
            if n % 7 == 0 {
                tokio::task::yield_now().await;
            }
        }
        outbox.close();
        writing.await.unwrap().unwrap();
        drop(stream);
        let mut buffer = BytesMut::from(&reading.await.unwrap().unwrap()[..]);
        for frame in &frames {
            assert_eq!(Frame::decode(&mut buffer, FRAME_BYTES_MAX).unwrap().as_ref(), Some(frame));
        }
        assert!(buffer.is_empty());
        assert_eq!(outbox.bytes(), 0);
    }

    /// With nobody writing, a flush hands over all that the stream takes, and a stream that is gone costs nothing.
    #[tokio::test]
    async fn a_flush_needs_no_writer() {
        let (near, far) = tokio::io::duplex(1 << 10);
        let stream = SharedStream::new(near);
        let outbox = Outbox::default();
        outbox.push(&Frame::new(Header::new(Kind::Get), vec![1], vec![]));
        outbox.flush(&stream);
        assert_eq!(outbox.bytes(), 0);
        drop(far);
        outbox.push(&Frame::new(Header::new(Kind::Get), vec![1], vec![]));
        outbox.flush(&stream);
        assert_eq!(outbox.bytes(), HEADER_BYTES + 1, "left to the writer, who meets the error");
    }

    /// A head that is encoded in place gives the same bytes as one that was encoded before, whatever the tail's size.
    #[tokio::test]
    async fn a_head_is_encoded_in_place_as_it_would_be_apart() {
        let (apart, in_place) = (Outbox::default(), Outbox::default());
        for (n, size) in [0, 10, TAIL_COPY_BYTES_MAX, 3].into_iter().enumerate() {
            let mut header = Header::new(Kind::Done);
            header.request = n as u64;
            let (head, tail) = ((n as u64 * 1_000, vec![7_u8; n]), Bytes::from(vec![n as u8; size]));
            apart.push(&Frame::new(header, codec::encode(&head).unwrap(), tail.clone()));
            in_place.push_head(header, &head, &tail).unwrap();
        }
        assert_eq!(apart.bytes(), in_place.bytes());
        assert!(
            in_place.push_head(Header::new(Kind::Done), &vec![0_u8; crate::limits::HEAD_BYTES_MAX + 1], &[]).is_err()
        );
        let mut written = [Vec::new(), Vec::new()];
        for (outbox, written) in [apart, in_place].iter().zip(&mut written) {
            outbox.close();
            outbox.write_to(written).await.unwrap();
        }
        assert_eq!(written[0], written[1]);
    }

    /// What is sent at once wakes nobody, and what the stream does not take is left to the writer.
    #[tokio::test]
    async fn what_is_sent_at_once_comes_out_in_order() {
        use tokio::io::AsyncReadExt;
        let (near, mut far) = tokio::io::duplex(64);
        let stream = SharedStream::new(near);
        let outbox = Arc::new(Outbox::default());
        let writing = {
            let (outbox, mut stream) = (outbox.clone(), stream.clone());
            tokio::spawn(async move { outbox.write_to(&mut stream).await })
        };
        let reading = tokio::spawn(async move {
            let mut read = Vec::new();
            far.read_to_end(&mut read).await.map(|_| read)
        });
        for n in 0..60_u64 {
            let mut header = Header::new(Kind::Put);
            header.request = n;
            let tail = vec![n as u8; if n % 9 == 8 { TAIL_COPY_BYTES_MAX + 1 } else { 5 }];
            let frame = Frame::new(header, vec![1], tail);
            if n % 4 == 3 {
                outbox.push(&frame);
            } else {
                outbox.send(&frame, &stream);
            }
            if n % 5 == 0 {
                tokio::task::yield_now().await;
            }
        }
        outbox.close();
        writing.await.unwrap().unwrap();
        drop(stream);
        let mut buffer = BytesMut::from(&reading.await.unwrap().unwrap()[..]);
        for n in 0..60 {
            let frame = Frame::decode(&mut buffer, FRAME_BYTES_MAX).unwrap().expect("a frame");
            assert_eq!(frame.header.request, n);
        }
        assert!(buffer.is_empty());
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
