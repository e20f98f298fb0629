//! What writes say: conditions, batches that may touch several shards, and by what a write is known when it comes twice.
//!
//! A batch is a mini-transaction (Aguilera et al., Sinfonia, SOSP 2007, section 2.2): it compares, reads and writes in
//! one step, or does nothing.

use crate::ids::{KeyspaceId, ShardId};
use serde::{Deserialize, Serialize};

/// By what a write is known when it comes twice: the shard answers the second from what it remembers of the first.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WriteId {
    /// The client, a random number that is not 0.
    pub client: u64,
    /// Counts the client's writes, from 1.
    pub sequence: u64,
    /// The client has heard the outcome of every write up to this sequence and sends none of them again.
    pub answered: u64,
    /// Milliseconds since the write was first sent, 0 the first time.
    pub age_ms: u32,
}

/// What must hold of a row before anything is written. It is looked at when the write is applied, in the order of the
/// shard's log: nothing comes between looking and writing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Condition<'a> {
    /// Whatever there is.
    #[default]
    Always,
    /// There is no row.
    Absent,
    /// There is a row.
    Present,
    /// There is a row of this version.
    Version(u64),
    /// There is a row of this value.
    Value(&'a [u8]),
}

/// Head of [`crate::Kind::Put`] (the tail is the value) and of [`crate::Kind::Delete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Write<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The key.
    #[serde(serialize_with = "crate::codec::as_bytes")]
    pub key: &'a [u8],
    /// What must hold of the row.
    #[serde(borrow)]
    pub condition: Condition<'a>,
    /// By which it is known again when it comes twice; without, it may be done twice.
    pub id: Option<WriteId>,
}

/// Head of [`crate::Kind::Batch`]; the tail is the values of the puts, one behind the other. The header names the
/// lowest shard that it touches; that shard's leader sees to the others.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Batch<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The operations, done in one step if all their conditions hold before it. Each has a key of its own.
    #[serde(borrow)]
    pub ops: Vec<BatchOp<'a>>,
    /// By which it is known again when it comes twice; without, it may be done twice.
    pub id: Option<WriteId>,
}

/// An operation of a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum BatchOp<'a> {
    /// Write a row.
    Put {
        /// The key.
        key: &'a [u8],
        /// Bytes of its value in the tail.
        value_bytes: u32,
        /// What must hold of the row.
        #[serde(borrow)]
        condition: Condition<'a>,
    },
    /// Remove a row.
    Delete {
        /// The key.
        key: &'a [u8],
        /// What must hold of the row.
        #[serde(borrow)]
        condition: Condition<'a>,
    },
    /// Only look: the batch is done if this holds, too.
    Check {
        /// The key.
        key: &'a [u8],
        /// What must hold of the row.
        #[serde(borrow)]
        condition: Condition<'a>,
    },
    /// Tell the row as it is before the batch, if that is done.
    Read {
        /// The key.
        key: &'a [u8],
    },
}

impl<'a> BatchOp<'a> {
    /// The key.
    #[must_use]
    pub fn key(&self) -> &'a [u8] {
        match self {
            Self::Put { key, .. } | Self::Delete { key, .. } | Self::Check { key, .. } | Self::Read { key } => key,
        }
    }

    /// What must hold of the row.
    #[must_use]
    pub fn condition(&self) -> Condition<'a> {
        match self {
            Self::Put { condition, .. } | Self::Delete { condition, .. } | Self::Check { condition, .. } => *condition,
            Self::Read { .. } => Condition::Always,
        }
    }
}

/// Head of the answer to a put or a delete.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WriteDone {
    /// The shard's revision after the write: the row's version.
    pub revision: u64,
    /// Rows that a delete found and removed. Puts do not look: it would cost each of them a read.
    pub removed: u32,
}

/// Head of the answer to a batch; the tail is the values of the rows that it read, one behind the other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct BatchDone {
    /// Rows that its deletes found and removed.
    pub removed: u32,
    /// Each shard that it touched, with the revision after it: the versions of what it wrote end there.
    pub revisions: Vec<(ShardId, u64)>,
    /// What each [`BatchOp::Read`] found, in their order; `None` where there is no row.
    pub rows: Vec<Option<RowRead>>,
}

/// A row that a batch read, without its value.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RowRead {
    /// Its version.
    pub version: u64,
    /// Bytes of its value in the tail.
    pub value_bytes: u32,
}

// ---------------------------------------------------------------------------------------------- between nodes

/// A batch over several shards while it is under way. The leader of the lowest shard coordinates it; one term has one
/// leader, so the pair of term and number is given once.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct TxnId {
    /// The shard that decides: the lowest that it touches.
    pub shard: ShardId,
    /// The term in which its coordinator leads that shard. It can be decided in no later one.
    pub term: u64,
    /// Counted by the coordinator.
    pub number: u64,
}

/// Head of [`crate::Kind::Prepare`]; the tail is the values of the puts. The header names the shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Prepare<'a> {
    /// The transaction.
    pub txn: TxnId,
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The operations of the batch whose keys lie in the shard, in their order.
    #[serde(borrow)]
    pub ops: Vec<BatchOp<'a>>,
}

/// Head of the answer to a prepare: its conditions hold, its keys are locked. The tail is the values of the rows read.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct PrepareDone {
    /// Rows that its deletes will find and remove.
    pub removed: u32,
    /// What each [`BatchOp::Read`] found, in their order.
    pub rows: Vec<Option<RowRead>>,
}

/// Head of [`crate::Kind::Finish`]: lets the locks go, after writing what was prepared, or not. Done twice it is the
/// same as done once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Finish {
    /// The transaction.
    pub txn: TxnId,
    /// Whether it was decided to be done.
    pub commit: bool,
}

/// Head of the answer to a finish.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct FinishDone {
    /// The shard's revision after it.
    pub revision: u64,
}

/// Head of [`crate::Kind::Resolve`]: what became of a transaction whose locks are old. The header names its shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Resolve {
    /// The transaction.
    pub txn: TxnId,
}

/// Head of the answer to a resolve. It is final.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ResolveDone {
    /// Whether it was decided to be done; otherwise it was not and never will be.
    pub commit: bool,
}
