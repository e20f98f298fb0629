//! The way back to whoever asked: where the answer to one request goes, and what is in hand on its connection.

use bytes::Bytes;
use serde::Serialize;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::CREDIT_REQUESTS;
use shkv_proto::message::Failure;
use shkv_proto::outbox::{Outbox, SharedStream, TAIL_COPY_BYTES_MAX};
use shkv_proto::world::net::OwnedWriteHalf;
use shkv_proto::{Frame, Header, Kind};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::sync::Notify;

/// A connection as its answers see it.
#[derive(Debug)]
pub struct Conn {
    /// The answers that wait to be written.
    pub outbox: Outbox,
    stream: SharedStream<OwnedWriteHalf>,
    in_flight: AtomicU32,
    eased: Notify,
}

impl Conn {
    /// A connection that answers are written to.
    #[must_use]
    pub fn new(stream: SharedStream<OwnedWriteHalf>) -> Self {
        Self { outbox: Outbox::default(), stream, in_flight: AtomicU32::new(0), eased: Notify::new() }
    }

    /// Takes a request in hand; its answer goes to the reply that is returned.
    #[must_use]
    pub fn begin(self: &Arc<Self>, header: Header) -> Reply {
        self.in_flight.fetch_add(1, Ordering::AcqRel);
        Reply { conn: self.clone(), header, is_late: false }
    }

    /// Waits until no more than `count` requests are in hand.
    pub async fn eased_to(&self, count: u32) {
        while self.in_flight.load(Ordering::Acquire) > count {
            self.eased.notified().await;
        }
    }
}

/// Where the answer to one request goes.
#[derive(Debug)]
pub struct Reply {
    conn: Arc<Conn>,
    header: Header,
    /// Whether it is given after the batch that its request came in was handled.
    is_late: bool,
}

impl Reply {
    /// The answer will be given later. If nothing else is in hand on its connection then, there is nobody whose answers
    /// could share its write, and whoever gives it writes it.
    #[must_use]
    pub fn late(mut self) -> Self {
        self.is_late = true;
        self
    }

    fn push<T: Serialize>(&self, kind: Kind, head: &T, tail: &[u8]) -> Result<(), CodecError> {
        let (conn, header) = (&self.conn, self.header.answer(kind));
        if self.is_late && conn.in_flight.load(Ordering::Acquire) == 1 {
            conn.outbox.send_head(header, head, tail, &conn.stream)
        } else {
            conn.outbox.push_head(header, head, tail)
        }
    }

    /// Answers that it was done.
    pub fn done<T: Serialize>(self, head: &T) {
        self.done_with(head, Bytes::new());
    }

    /// Answers that it was done, with values.
    pub fn done_with<T: Serialize>(self, head: &T, tail: Bytes) {
        if tail.len() <= TAIL_COPY_BYTES_MAX {
            return self.done_copied(head, &tail);
        }
        match codec::encode(head) {
            Ok(head) => self.conn.outbox.push(&Frame::new(self.header.answer(Kind::Done), head, tail)),
            Err(error) => self.failed(&Failure::unknown(error.to_string())),
        }
    }

    /// Answers that it was done, with a small value that is copied.
    pub fn done_copied<T: Serialize>(self, head: &T, tail: &[u8]) {
        if let Err(error) = self.push(Kind::Done, head, tail) {
            self.failed(&Failure::unknown(error.to_string()));
        }
    }

    /// Answers that it was not, or is not known.
    pub fn failed(self, failure: &Failure) {
        // A failure always fits in a head; if not, the asker's deadline tells it the same as an unknown outcome.
        let _ = self.push(Kind::Failed, failure, &[]);
    }

    /// Answers with what came out.
    pub fn result<T: Serialize>(self, result: Result<T, Failure>) {
        match result {
            Ok(head) => self.done(&head),
            Err(failure) => self.failed(&failure),
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        let before = self.conn.in_flight.fetch_sub(1, Ordering::AcqRel);
        if before >= CREDIT_REQUESTS || before == 1 {
            self.conn.eased.notify_one();
        }
    }
}
