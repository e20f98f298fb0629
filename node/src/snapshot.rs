//! Snapshots on their way: the rows of a shard as redb holds them, streamed on a connection of their own to a follower
//! whose log has been given up.
//!
//! The rows that come in lie beside the shard's own until all are there; then one transaction puts them in place.

use crate::claim::{Claim, Purpose};
use crate::flusher::Job;
use crate::machine::{LEDGER_BYTES_MAX, Ledger};
use crate::owner::Mail;
use crate::replica::COUNTED_MAX;
use crate::shared::Shared;
use crate::store::{Base, ReplicaMeta, is_row};
use bytes::{Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::limits::{KEY_BYTES_MAX, SNAPSHOT_CHUNK_BYTES};
use shkv_proto::message::{
    Failure, RaftMessage, RefusalCode, Role, SnapshotBegin, SnapshotChunk, SnapshotEnd, Welcome,
};
use shkv_proto::session::{self, Session, failure_of};
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId};
use std::ops::Bound;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// How long the other side may take for one step of a snapshot. If it has lost its power after it had taken a step in, nobody
/// ever answers it, and until it is given up the follower gets no other snapshot.
const STEP_TIME_MAX: Duration = Duration::from_secs(15);

/// Sends a snapshot. While the other side takes a chunk in the next is read and sent, so that no more than two are in memory.
///
/// # Errors
/// Why it did not get there.
pub async fn send(
    shared: &Shared,
    addr: &str,
    node: NodeId,
    message: RaftMessage,
    meta: ReplicaMeta,
    base: Base,
) -> Result<(), String> {
    let shard = message.shard;
    let session = session::connect(addr, &shared.peers.hello()).await.map_err(|error| error.to_string())?;
    if session.peer.role != Role::Node(node) {
        return Err(format!("{:?} answers at {addr}", session.peer.role));
    }
    let mut stream = Stream { session, shard, unanswered: 0 };
    let begin =
        SnapshotBegin { message, revision: meta.revision, keyspace: meta.keyspace, part: meta.part, homes: meta.homes };
    stream.put(Kind::SnapshotBegin, &begin, Bytes::new()).await?;
    stream.answered_to(0).await?;
    let mut rows = 0;
    // What the shard remembers beside its rows goes first, in pieces under the empty key, which no row has.
    let mut ledger = base.ledger().clone();
    while !ledger.is_empty() {
        let piece = ledger.split_to(ledger.len().min(SNAPSHOT_CHUNK_BYTES));
        rows += 1;
        stream.chunk(vec![(0, piece.len() as u32)], piece).await?;
    }
    let everything = (Bound::Unbounded, Bound::Unbounded);
    let mut range = base.range(everything, false).map_err(|error| error.to_string())?;
    loop {
        let read = move || {
            let mut bytes = BytesMut::with_capacity(SNAPSHOT_CHUNK_BYTES + (64 << 10));
            let lengths = range.chunk(SNAPSHOT_CHUNK_BYTES, &mut bytes);
            (range, lengths, bytes)
        };
        let (back, lengths, bytes) = shkv_proto::world::blocking(read).await.map_err(|error| error.to_string())?;
        range = back;
        let lengths = lengths.map_err(|error| error.to_string())?;
        if lengths.is_empty() {
            break;
        }
        rows += lengths.len() as u64;
        stream.chunk(lengths, bytes.freeze()).await?;
    }
    stream.answered_to(0).await?;
    stream.put(Kind::SnapshotEnd, &SnapshotEnd { rows }, Bytes::new()).await?;
    stream.answered_to(0).await
}

/// A snapshot on its way out.
struct Stream {
    session: Session<Welcome>,
    shard: ShardId,
    /// Frames that the other side has not answered.
    unanswered: usize,
}

impl Stream {
    /// Sends rows, and waits until those before them are taken in.
    async fn chunk(&mut self, rows: Vec<(u32, u32)>, bytes: Bytes) -> Result<(), String> {
        self.put(Kind::SnapshotChunk, &SnapshotChunk { rows }, bytes).await?;
        self.answered_to(1).await
    }

    async fn put<T: serde::Serialize>(&mut self, kind: Kind, head: &T, tail: Bytes) -> Result<(), String> {
        let head = codec::encode(head).map_err(|error| error.to_string())?;
        let frame = Frame::new(Header { shard: self.shard, ..Header::new(kind) }, head, tail);
        let mut bytes = BytesMut::with_capacity(frame.wire_bytes());
        frame.encode(&mut bytes);
        self.unanswered += 1;
        in_time(self.session.writer.write_all(&bytes)).await
    }

    /// Waits until no more than so many frames are not taken in.
    async fn answered_to(&mut self, most: usize) -> Result<(), String> {
        let mut answers = Vec::new();
        while self.unanswered > most {
            if !in_time(self.session.reader.next_batch(&mut answers)).await? {
                return Err("the other side closed the connection".into());
            }
            for answer in answers.drain(..) {
                if answer.header.kind != Kind::Done {
                    return Err(failure_of(&answer).to_string());
                }
                self.unanswered = self.unanswered.checked_sub(1).ok_or("more answers than frames")?;
            }
        }
        Ok(())
    }
}

async fn in_time<T, E: std::fmt::Display>(step: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    let ended = tokio::time::timeout(STEP_TIME_MAX, step).await.map_err(|_| "it took too long".to_owned())?;
    ended.map_err(|error| error.to_string())
}

/// A snapshot that is coming in.
pub struct Incoming {
    begin: SnapshotBegin,
    rows: u64,
    /// The key of the last row that came.
    last_key: Vec<u8>,
    /// What the shard remembers beside its rows, as far as it has come.
    ledger: BytesMut,
    claim: Claim,
    /// Who sends it.
    from: NodeId,
}

/// A snapshot whose rows all lie beside the shard's own.
pub struct Staged {
    /// What announces it to Raft.
    pub message: RaftMessage,
    /// What its rows make of the replica.
    pub meta: ReplicaMeta,
    /// What the shard remembers beside them, encoded.
    pub ledger: Bytes,
    /// The node that sent it.
    pub from: NodeId,
    /// The right to put it in place.
    pub claim: Claim,
}

/// Takes in a frame of a snapshot stream from a node.
///
/// # Errors
/// Why the snapshot cannot be taken; the stream is over then.
pub async fn take(
    shared: &Arc<Shared>,
    from: NodeId,
    incoming: &mut Option<Incoming>,
    frame: Frame,
) -> Result<(), Failure> {
    let malformed = |error: codec::CodecError| Failure::malformed(&error);
    let out_of_turn = || Failure::refusal(RefusalCode::Malformed, "a frame of a snapshot that was not begun");
    let busy = |error: crate::store::StoreError| Failure::Busy { retry_after_ms: 500, text: error.to_string() };
    match frame.header.kind {
        Kind::SnapshotBegin => {
            let begin: SnapshotBegin = codec::decode(&frame.head).map_err(malformed)?;
            let shard = begin.message.shard;
            let cell = shared.cell(shard).ok_or_else(|| Failure::WrongShard { epoch: shared.epoch() })?;
            if cell.replica != begin.message.to || begin.message.snapshot.is_none() {
                return Err(Failure::refusal(
                    RefusalCode::Conflict,
                    format!("this node keeps replica {} of shard {shard}", cell.replica),
                ));
            }
            if begin.revision > COUNTED_MAX {
                return Err(Failure::refusal(RefusalCode::Malformed, "no shard has that many mutations"));
            }
            *incoming = None; // gives back the right that an earlier stream on this connection may hold
            let claim = Claim::begin(shared, shard, Purpose::Snapshot).ok_or_else(|| Failure::Busy {
                retry_after_ms: 500,
                text: "another snapshot of the shard is coming in".into(),
            })?;
            let stream = claim.number();
            shared.flusher.ask(|answer| Job::StageBegin(shard, stream, answer)).await.map_err(busy)?;
            *incoming = Some(Incoming { begin, rows: 0, last_key: vec![], ledger: BytesMut::new(), claim, from });
            Ok(())
        }
        Kind::SnapshotChunk => {
            let incoming = incoming.as_mut().ok_or_else(out_of_turn)?;
            let chunk: SnapshotChunk = codec::decode(&frame.head).map_err(malformed)?;
            let mut tail = frame.tail;
            let mut rows = Vec::with_capacity(chunk.rows.len());
            incoming.rows += chunk.rows.len() as u64;
            for (key, row) in chunk.rows {
                let (key, row) = (key as usize, row as usize);
                if key.saturating_add(row) > tail.len() {
                    return Err(Failure::refusal(RefusalCode::Malformed, "a chunk's rows are longer than the chunk"));
                }
                let (key, row) = (tail.split_to(key), tail.split_to(row));
                if !key.is_empty() {
                    // Refused here, because the flusher takes what it cannot store for a failure of the disk.
                    if key.len() > KEY_BYTES_MAX || !is_row(&row) {
                        return Err(Failure::refusal(RefusalCode::Malformed, "a chunk holds what is no row"));
                    }
                    if key[..] <= incoming.last_key[..] {
                        return Err(Failure::refusal(RefusalCode::Malformed, "a snapshot's rows are not in order"));
                    }
                    incoming.last_key.clear();
                    incoming.last_key.extend_from_slice(&key);
                    rows.push((key, row));
                } else if incoming.ledger.len() + row.len() <= LEDGER_BYTES_MAX {
                    incoming.ledger.extend_from_slice(&row);
                } else {
                    return Err(Failure::refusal(RefusalCode::Malformed, "more is remembered than a shard can"));
                }
            }
            #[cfg(feature = "sim")]
            crate::inspect::shorten(&mut rows);
            let shard = incoming.begin.message.shard;
            let stream = incoming.claim.number();
            match shared.flusher.ask(|answer| Job::Stage(shard, stream, rows, answer)).await.map_err(busy)? {
                true => Ok(()),
                false => Err(Failure::refusal(RefusalCode::Conflict, "the replica was deleted")),
            }
        }
        _ => {
            let Incoming { begin, rows, ledger, claim, from, .. } = incoming.take().ok_or_else(out_of_turn)?;
            let end: SnapshotEnd = codec::decode(&frame.head).map_err(malformed)?;
            let SnapshotBegin { message, revision, keyspace, part, homes } = begin;
            let Some(state) = message.snapshot.clone().filter(|_| end.rows == rows) else {
                return Err(Failure::refusal(
                    RefusalCode::Malformed,
                    format!("{rows} rows came, {} were sent", end.rows),
                ));
            };
            let meta = ReplicaMeta { replica: message.to, keyspace, part, homes, state, revision };
            let ledger = ledger.freeze();
            Ledger::decode(&ledger)
                .map_err(|error| Failure::refusal(RefusalCode::Malformed, format!("the snapshot: {error}")))?;
            let owner = shared.owner_of(message.shard);
            let staged = Staged { message, meta, ledger, from, claim };
            shared.mail(owner, Mail::Staged(Box::new(staged))).await;
            Ok(())
        }
    }
}
