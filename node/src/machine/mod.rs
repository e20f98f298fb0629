//! The state machine: what a log entry does to a shard's rows and to what the shard remembers beside them. Pure: the same
//! entry does the same on every replica.
//!
//! An entry is a format byte, the leader's time in milliseconds (u64), and the writes that were grouped into it, each as
//! it came over the wire: `kind u8, head length u32, tail length u32, head, tail`. Numbers are little-endian.

mod check;
mod ledger;
pub mod locks;
mod rows;
pub mod sessions;
#[cfg(test)]
mod tests;

pub use check::{Reach, check, check_key};
pub use ledger::{Decision, LEDGER_BYTES_MAX, Ledger};
pub use rows::check_read_bytes;

#[cfg(feature = "sim")]
use crate::inspect::{Bug, planted};
use crate::table::View;
use bytes::{BufMut, Bytes, BytesMut};
use ledger::DECISIONS_MAX;
use locks::Part;
use serde::{Deserialize, Serialize};
use sessions::{Known, Outcome};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Failure, Finish, FinishDone, KeyPrefix, Prepare, PrepareDone, RefusalCode, RowRead,
    TxnId, Write, WriteDone, WriteId,
};
use shkv_proto::{Kind, ShardId};
use smallvec::SmallVec;

const FORMAT: u8 = 2;
/// Bytes before the first write.
const ENTRY_FIXED_BYTES: usize = 9;
/// Bytes before the head of a write.
const ITEM_FIXED_BYTES: usize = 9;

/// What may stand in an entry.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteKind {
    /// One row.
    Put,
    /// One row less.
    Delete,
    /// Several of both in one shard.
    Batch,
    /// Checks and locks a part of a batch over several shards.
    Prepare,
    /// Writes or drops what was prepared.
    Finish,
    /// Decides that a batch over several shards is done, and does the first shard's part: [`Decide`].
    Decide,
    /// Forgets a decision that everybody knows: [`LetGo`].
    LetGo,
    /// Remembers that a batch over several shards is not done, because a condition does not hold: [`Conclude`].
    Conclude,
}

impl WriteKind {
    const ALL: [Self; 8] =
        [Self::Put, Self::Delete, Self::Batch, Self::Prepare, Self::Finish, Self::Decide, Self::LetGo, Self::Conclude];

    /// The kind of a frame, if it writes.
    #[must_use]
    pub fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Put => Some(Self::Put),
            Kind::Delete => Some(Self::Delete),
            Kind::Batch => Some(Self::Batch),
            Kind::Prepare => Some(Self::Prepare),
            Kind::Finish => Some(Self::Finish),
            _ => None,
        }
    }

    /// Those beyond the kinds of frame are never sent, only kept in logs.
    fn number(self) -> u8 {
        match self {
            Self::Put => Kind::Put as u8,
            Self::Delete => Kind::Delete as u8,
            Self::Batch => Kind::Batch as u8,
            Self::Prepare => Kind::Prepare as u8,
            Self::Finish => Kind::Finish as u8,
            Self::Decide => 128,
            Self::LetGo => 129,
            Self::Conclude => 130,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.number() == number)
    }

    /// Whether it needs room on the disk that it does not give back.
    #[must_use]
    pub fn takes_room(self) -> bool {
        matches!(self, Self::Put | Self::Batch | Self::Prepare | Self::Decide)
    }
}

/// Head of a [`WriteKind::Decide`]; the tail is the values of the puts, then the values of the rows that were read elsewhere.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Decide<'a> {
    /// The transaction.
    pub txn: TxnId,
    /// The first shard's part.
    #[serde(borrow)]
    pub ops: Vec<BatchOp<'a>>,
    /// By which the batch is known.
    pub id: Option<WriteId>,
    /// The other shards, all of which have prepared.
    pub others: Vec<ShardId>,
    /// Rows that will be removed there.
    pub removed: u32,
    /// The batch's reads in their order: what was found elsewhere, or nothing for a read of the first shard's part.
    pub reads: Vec<Option<Option<RowRead>>>,
}

/// Head of a [`WriteKind::LetGo`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LetGo {
    /// The transaction.
    pub txn: TxnId,
    /// The other shards with their revisions after it.
    pub revisions: Vec<(ShardId, u64)>,
}

/// Head of a [`WriteKind::Conclude`]. A batch that was sent twice may be under way twice: what stands first in the log of
/// its first shard, a decision or this, is what became of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Conclude {
    /// By which the batch is known.
    pub id: WriteId,
    /// The operation whose condition does not hold.
    pub operation: u32,
    /// The version that its row has.
    pub version: Option<u64>,
}

/// Gathers writes into one entry.
#[derive(Debug)]
pub struct Group {
    bytes: Vec<u8>,
}

impl Group {
    /// An empty group. `time` is the leader's, in milliseconds of the log's own time.
    #[must_use]
    pub fn new(time: u64) -> Self {
        let mut bytes = vec![FORMAT];
        bytes.extend_from_slice(&time.to_le_bytes());
        Self { bytes }
    }

    /// Adds a write.
    pub fn add(&mut self, kind: WriteKind, head: &[u8], tail: &[u8]) {
        write_item(&mut self.bytes, kind.number(), head, tail);
    }

    /// Its size so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The entry's data.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

fn write_item(out: &mut Vec<u8>, kind: u8, head: &[u8], tail: &[u8]) {
    out.reserve(ITEM_FIXED_BYTES + head.len() + tail.len());
    out.push(kind);
    out.extend_from_slice(&(head.len() as u32).to_le_bytes());
    out.extend_from_slice(&(tail.len() as u32).to_le_bytes());
    out.extend_from_slice(head);
    out.extend_from_slice(tail);
}

fn read_items<'a>(
    bytes: &'a [u8],
    from: usize,
    mut take: impl FnMut(u8, &'a [u8], &'a [u8]) -> Result<(), BadEntry>,
) -> Result<(), BadEntry> {
    let cut = || BadEntry::new("it ends inside a write");
    let mut at = from;
    while at < bytes.len() {
        let fixed = bytes.get(at..at + ITEM_FIXED_BYTES).ok_or_else(cut)?;
        let length =
            |from: usize| u32::from_le_bytes([fixed[from], fixed[from + 1], fixed[from + 2], fixed[from + 3]]) as usize;
        let kind = fixed[0];
        let head_at = at + ITEM_FIXED_BYTES;
        let tail_at = head_at + length(1);
        at = tail_at + length(5);
        if at > bytes.len() {
            return Err(cut());
        }
        take(kind, &bytes[head_at..tail_at], &bytes[tail_at..at])?;
    }
    Ok(())
}

/// What was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Done {
    /// A put or a delete.
    Write(WriteDone),
    /// A batch, with the values of the rows that it read. For a decision it tells whether it is this transaction's; else it is
    /// the outcome of an earlier one of the same batch, and this one was decided not to be done.
    Batch(Box<BatchDone>, Bytes, bool),
    /// A prepare, with the values of the rows that it read.
    Prepare(PrepareDone, Bytes),
    /// A finish.
    Finish(FinishDone),
    /// A decision was let go.
    LetGo,
}

/// Why nothing was done.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NotDone {
    /// For this reason.
    Failure(Failure),
    /// A transaction holds a key: it may be tried again when that is over.
    Locked(Box<Locked>),
}

/// A write that met a lock, as it came.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Locked {
    /// Who holds the key.
    pub by: TxnId,
    /// The write.
    pub kind: WriteKind,
    /// Its head.
    pub head: Bytes,
    /// Its values.
    pub tail: Bytes,
}

impl From<Failure> for NotDone {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

/// The answers to the writes of an entry.
pub type Answers = Vec<Result<Done, NotDone>>;

/// An entry that cannot be what a leader wrote: this build is too old for it, or memory is bad. The replica must stop.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("log entry cannot be applied: {0}")]
pub struct BadEntry(String);

impl BadEntry {
    fn new(text: impl Into<String>) -> Self {
        Self(text.into())
    }
}

impl From<CodecError> for BadEntry {
    fn from(error: CodecError) -> Self {
        Self(error.to_string())
    }
}

/// Where an entry stands.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Place {
    /// The shard.
    pub shard: ShardId,
    /// The term in which a leader wrote it.
    pub term: u64,
}

/// Applies an entry's data. With `answers`, it gets the answer to each write of the entry in their order. A write that is
/// not done changes neither rows nor revision, on every replica alike.
///
/// # Errors
/// [`BadEntry`]; the rows may then be half changed.
pub fn apply(data: &Bytes, place: Place, view: &mut View, mut answers: Option<&mut Answers>) -> Result<(), BadEntry> {
    if data.first() != Some(&FORMAT) {
        return Err(BadEntry(format!("its format is {:?}, this build knows {FORMAT}", data.first())));
    }
    let time = data.get(1..ENTRY_FIXED_BYTES).ok_or_else(|| BadEntry::new("it ends before its time"))?;
    let time = time.iter().rev().fold(0, |time, byte| time << 8 | u64::from(*byte));
    view.ledger.time = view.ledger.time.max(time);
    view.active.warm(keys_of(data)?.into_iter());
    read_items(data, ENTRY_FIXED_BYTES, |number, head, tail| {
        let kind = WriteKind::from_number(number).ok_or_else(|| BadEntry::new("it has a write of unknown kind"))?;
        let mut step = Step { data, view, place, look: answers.is_some() };
        let answer = match kind {
            WriteKind::Put | WriteKind::Delete => step.write(kind, head, tail),
            WriteKind::Batch => step.batch(head, tail),
            WriteKind::Prepare => step.prepare(head, tail),
            WriteKind::Finish => step.finish(head),
            WriteKind::Decide => step.decide(head, tail),
            WriteKind::LetGo => step.let_go(head),
            WriteKind::Conclude => step.conclude(head),
        }?;
        if let Some(answers) = answers.as_deref_mut() {
            answers.push(answer);
        }
        Ok(())
    })
}

/// The keys that an entry's puts and deletes name.
fn keys_of(data: &[u8]) -> Result<SmallVec<[&[u8]; 64]>, BadEntry> {
    let mut keys = SmallVec::new();
    read_items(data, ENTRY_FIXED_BYTES, |number, head, _| {
        if matches!(WriteKind::from_number(number), Some(WriteKind::Put | WriteKind::Delete)) {
            let (prefix, _) = codec::decode_borrowed_prefix::<KeyPrefix<'_>>(head).map_err(BadEntry::from)?;
            keys.push(prefix.key);
        }
        Ok(())
    })?;
    Ok(keys)
}

/// One write of an entry.
struct Step<'a> {
    /// The entry's data, which the write is a part of.
    data: &'a Bytes,
    view: &'a mut View,
    place: Place,
    /// Whether anybody hears the answer.
    look: bool,
}

type Answer = Result<Result<Done, NotDone>, BadEntry>;

fn forgotten() -> NotDone {
    let text = "the write was sent before, and what became of it is not remembered any more: it may have been done";
    Failure::refusal(RefusalCode::Forgotten, text).into()
}

fn aborted(text: &str) -> NotDone {
    Failure::Aborted { text: text.to_owned() }.into()
}

/// The answer to a write that has come before.
fn again(outcome: Outcome, is_batch: bool) -> Result<Done, NotDone> {
    match (outcome, is_batch) {
        (Outcome::Write(done), false) => Ok(Done::Write(done)),
        (Outcome::Batch(done, values), true) => Ok(Done::Batch(done, values, false)),
        (Outcome::Condition { operation, version }, _) => Err(Failure::Condition { operation, version }.into()),
        (Outcome::Large, true) => {
            let text = "the batch was done before; what it read is too much to be remembered";
            Err(Failure::refusal(RefusalCode::Forgotten, text).into())
        }
        (Outcome::Write(_), true) | (Outcome::Batch(..) | Outcome::Large, false) => {
            let text = "another write has come with this client and sequence";
            Err(Failure::refusal(RefusalCode::Conflict, text).into())
        }
    }
}

/// The answer to a batch that has come before, if that is remembered.
#[must_use]
pub fn outcome_of(ledger: &Ledger, id: &WriteId) -> Option<Result<Done, Failure>> {
    let outcome = ledger.sessions.look(id)?;
    Some(again(outcome.clone(), true).map_err(|not_done| match not_done {
        NotDone::Failure(failure) => failure,
        NotDone::Locked(_) => Failure::unknown("an outcome cannot be a lock"),
    }))
}

impl Step<'_> {
    /// What is known of a write: its answer, if it has come before.
    fn known(&mut self, id: Option<&WriteId>, is_batch: bool) -> Option<Result<Done, NotDone>> {
        let ledger = &mut self.view.ledger;
        match ledger.sessions.begin(id?, ledger.time) {
            Known::New => None,
            Known::Outcome(outcome) => Some(again(outcome, is_batch)),
            Known::Forgotten => Some(Err(forgotten())),
        }
    }

    fn note(&mut self, id: Option<&WriteId>, outcome: impl FnOnce() -> Outcome) {
        if let Some(id) = id {
            self.view.ledger.sessions.note(id, outcome());
        }
    }

    fn note_refused(&mut self, id: Option<&WriteId>, failure: Failure) -> NotDone {
        if let Failure::Condition { operation, version } = failure {
            self.note(id, || Outcome::Condition { operation, version });
        }
        failure.into()
    }

    fn holder<'a>(&self, mut keys: impl Iterator<Item = &'a [u8]>) -> Option<TxnId> {
        if self.view.ledger.locks.is_empty() {
            return None;
        }
        keys.find_map(|key| self.view.ledger.locks.holder(key))
    }

    fn locked(&self, by: TxnId, kind: WriteKind, head: &[u8], tail: &[u8]) -> NotDone {
        let [head, tail] = [head, tail].map(|part| self.data.slice_ref(part));
        NotDone::Locked(Box::new(Locked { by, kind, head, tail }))
    }

    fn write(&mut self, kind: WriteKind, head: &[u8], tail: &[u8]) -> Answer {
        let write: Write<'_> = codec::decode_borrowed(head).map_err(BadEntry::from)?;
        let id = write.id.as_ref();
        if let Some(known) = self.known(id, false) {
            return Ok(known);
        }
        if let Some(by) = self.view.ledger.locks.holder(write.key) {
            return Ok(Err(self.locked(by, kind, head, tail)));
        }
        if let Some(failure) = rows::refuse(self.view, 0, write.key, write.condition)? {
            return Ok(Err(self.note_refused(id, failure)));
        }
        let removed = if kind == WriteKind::Put {
            rows::put(self.view, write.key, tail, || self.data.slice_ref(tail))?;
            0
        } else {
            rows::delete(self.view, write.key, self.look || id.is_some())?
        };
        let done = WriteDone { revision: self.view.revision, removed };
        self.note(id, || Outcome::Write(done));
        Ok(Ok(Done::Write(done)))
    }

    fn batch(&mut self, head: &[u8], tail: &[u8]) -> Answer {
        let batch: Batch<'_> = codec::decode_borrowed(head).map_err(BadEntry::from)?;
        let id = batch.id.as_ref();
        if let Some(known) = self.known(id, true) {
            return Ok(known);
        }
        if let Some(by) = self.holder(batch.ops.iter().map(BatchOp::key)) {
            return Ok(Err(self.locked(by, WriteKind::Batch, head, tail)));
        }
        if let Some(failure) = rows::refuse_ops(self.view, &batch.ops)? {
            return Ok(Err(self.note_refused(id, failure)));
        }
        let (rows, values) = match rows::read_ops(self.view, &batch.ops, 0)? {
            Ok(read) => read,
            Err(failure) => return Ok(Err(failure.into())),
        };
        let mut tail = self.data.slice_ref(tail);
        let removed = rows::write_ops(self.view, &batch.ops, &mut tail, self.look || id.is_some())?;
        let done = BatchDone { removed, revisions: vec![(self.place.shard, self.view.revision)], rows };
        let (done, values) = (Box::new(done), values.freeze());
        self.note(id, || Outcome::Batch(done.clone(), values.clone()));
        Ok(Ok(Done::Batch(done, values, true)))
    }

    fn prepare(&mut self, head: &[u8], tail: &[u8]) -> Answer {
        let prepare: Prepare<'_> = codec::decode_borrowed(head).map_err(BadEntry::from)?;
        let Prepare { txn, ops, .. } = prepare;
        let locks = &self.view.ledger.locks;
        // No transaction waits for another, so none waits for ever.
        if locks.is_held_by(&txn) || self.holder(ops.iter().map(BatchOp::key)).is_some() {
            return Ok(Err(aborted("a key of the batch is locked by another transaction")));
        }
        if !locks.has_room(ops.len(), head.len() + tail.len()) {
            let text = "too many transactions are under way in this shard".to_owned();
            return Ok(Err(Failure::Busy { retry_after_ms: 50, text }.into()));
        }
        if let Some(failure) = rows::refuse_ops(self.view, &ops)? {
            return Ok(Err(failure.into()));
        }
        let (mut done, mut values) = (PrepareDone { removed: 0, rows: vec![] }, BytesMut::new());
        // What is told depends on nobody's listening; only the work is spared.
        if self.look {
            match rows::read_ops(self.view, &ops, 0)? {
                Ok((rows, bytes)) => {
                    values = bytes;
                    done = PrepareDone { removed: rows::count_removed(self.view, &ops)?, rows };
                }
                Err(failure) => {
                    // Locked all the same, as on the other replicas: the coordinator lets it go.
                    self.lock(txn, &ops, head, tail);
                    return Ok(Err(failure.into()));
                }
            }
        }
        self.lock(txn, &ops, head, tail);
        Ok(Ok(Done::Prepare(done, values.freeze())))
    }

    fn lock(&mut self, txn: TxnId, ops: &[BatchOp<'_>], head: &[u8], tail: &[u8]) {
        let part = Part { head: Bytes::copy_from_slice(head), tail: Bytes::copy_from_slice(tail) };
        self.view.ledger.locks.hold(txn, ops.iter().map(BatchOp::key), part);
    }

    fn finish(&mut self, head: &[u8]) -> Answer {
        let finish: Finish = codec::decode(head).map_err(BadEntry::from)?;
        #[cfg(feature = "sim")]
        let finish = match () {
            () if planted(Bug::LockLeft) && !finish.commit => return Ok(Ok(Done::Finish(FinishDone { revision: 0 }))),
            () => Finish { commit: finish.commit && !(planted(Bug::HalfBatch) && finish.txn.number > 3), ..finish },
        };
        if let Some(part) = self.view.ledger.locks.take(&finish.txn) {
            let prepare: Prepare<'_> = codec::decode_borrowed(&part.head).map_err(BadEntry::from)?;
            prepare.ops.iter().for_each(|op| self.view.ledger.locks.release(op.key()));
            if finish.commit {
                rows::write_ops(self.view, &prepare.ops, &mut part.tail.clone(), false)?;
            }
        }
        Ok(Ok(Done::Finish(FinishDone { revision: self.view.revision })))
    }

    fn decide(&mut self, head: &[u8], tail: &[u8]) -> Answer {
        let decide: Decide<'_> = codec::decode_borrowed(head).map_err(BadEntry::from)?;
        let Decide { txn, ops, id, others, removed, reads } = decide;
        // A later leader may have answered that it is not decided: from its first entry on it cannot be.
        if txn.term != self.place.term || self.view.ledger.decisions.contains_key(&txn) {
            return Ok(Err(aborted("the coordinator lost its leadership before it decided")));
        }
        if let Some(known) = self.known(id.as_ref(), true) {
            return Ok(known);
        }
        if self.holder(ops.iter().map(BatchOp::key)).is_some() {
            return Ok(Err(aborted("a key of the batch is locked by another transaction")));
        }
        if self.view.ledger.decisions.len() >= DECISIONS_MAX {
            let text = "too many transactions are under way in this shard".to_owned();
            return Ok(Err(Failure::Busy { retry_after_ms: 50, text }.into()));
        }
        if let Some(failure) = rows::refuse_ops(self.view, &ops)? {
            return Ok(Err(failure.into()));
        }
        let elsewhere: usize = reads.iter().flatten().flatten().map(|row| row.value_bytes as usize).sum();
        let (own_rows, own_values) = match rows::read_ops(self.view, &ops, elsewhere)? {
            Ok(read) => read,
            Err(failure) => return Ok(Err(failure.into())),
        };
        let mut tail = self.data.slice_ref(tail);
        let removed = removed + rows::write_ops(self.view, &ops, &mut tail, true)?;
        let (rows, values) = merge_reads(reads, tail, own_rows, own_values.freeze())?;
        let done = Box::new(BatchDone { removed, revisions: vec![(self.place.shard, self.view.revision)], rows });
        self.note(id.as_ref(), || Outcome::Batch(done.clone(), values.clone()));
        let id = id.map(|id| (id.client, id.sequence));
        self.view.ledger.decisions.insert(txn, Decision { others, id });
        Ok(Ok(Done::Batch(done, values, true)))
    }

    fn conclude(&mut self, head: &[u8]) -> Answer {
        let Conclude { id, operation, version } = codec::decode(head).map_err(BadEntry::from)?;
        if let Some(known) = self.known(Some(&id), true) {
            return Ok(known);
        }
        Ok(Err(self.note_refused(Some(&id), Failure::Condition { operation, version })))
    }

    fn let_go(&mut self, head: &[u8]) -> Answer {
        let LetGo { txn, revisions } = codec::decode(head).map_err(BadEntry::from)?;
        let ledger = &mut self.view.ledger;
        if let Some(Decision { id: Some((client, sequence)), .. }) = ledger.decisions.remove(&txn) {
            ledger.sessions.complete(client, sequence, |done| {
                done.revisions.extend(revisions);
                done.revisions.sort_unstable();
                done.revisions.dedup_by_key(|(shard, _)| *shard);
            });
        }
        Ok(Ok(Done::LetGo))
    }
}

/// Puts what was read elsewhere and here into the order of the batch.
fn merge_reads(
    reads: Vec<Option<Option<RowRead>>>,
    mut elsewhere: Bytes,
    own_rows: Vec<Option<RowRead>>,
    mut own_values: Bytes,
) -> Result<(Vec<Option<RowRead>>, Bytes), BadEntry> {
    let short = || BadEntry::new("its reads do not fit its operations");
    let mut own_rows = own_rows.into_iter();
    let (mut rows, mut values) = (Vec::with_capacity(reads.len()), BytesMut::new());
    for read in reads {
        let (row, from) = match read {
            Some(row) => (row, &mut elsewhere),
            None => (own_rows.next().ok_or_else(short)?, &mut own_values),
        };
        if let Some(RowRead { value_bytes, .. }) = row {
            if value_bytes as usize > from.len() {
                return Err(short());
            }
            values.put_slice(&from.split_to(value_bytes as usize));
        }
        rows.push(row);
    }
    Ok((rows, values.freeze()))
}
