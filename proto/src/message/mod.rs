//! What frames say: the heads of requests and answers, and the failures.
//!
//! `proto.md` tells for each message who sends it and what it means. Fields and variants are appended, never moved.
//! Heads that name a key begin with keyspace and key, so that a balancer decodes no more than those ([`KeyPrefix`]).

mod cluster;
mod consensus;
mod write;

pub use cluster::*;
pub use consensus::*;
pub use write::*;

use crate::ids::{ClusterId, Epoch, KeyspaceId, NodeId, ShardId};
use crate::limits::Limits;
use bytes::Bytes;
use serde::{Deserialize, Serialize};

/// The first bytes of a [`Hello`].
pub const MAGIC: u32 = u32::from_le_bytes(*b"shkv");

// ---------------------------------------------------------------------------------------------- handshake

/// The opening of a connection, from the side that connects.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`MAGIC`].
    pub magic: u32,
    /// Oldest protocol version spoken.
    pub version_min: u8,
    /// Newest protocol version spoken.
    pub version_max: u8,
    /// The cluster that is meant; `None` takes any.
    pub cluster: Option<ClusterId>,
    /// Who connects.
    pub role: Role,
}

/// The answer to a [`Hello`] that is accepted.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Welcome {
    /// The protocol version of everything that follows.
    pub version: u8,
    /// The cluster that the answering side belongs to; a node that is in none yet says `None`.
    pub cluster: Option<ClusterId>,
    /// Who answers.
    pub role: Role,
    /// Its name.
    pub name: String,
    /// What it holds senders to.
    pub limits: Limits,
}

/// One end of a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Role {
    /// An application, through the client library.
    Client,
    /// A balancer.
    Balancer,
    /// A node.
    Node(NodeId),
}

// ---------------------------------------------------------------------------------------------- reads

/// How fresh a read must be.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub enum Consistency {
    /// Sees every write that was acknowledged before the read began.
    #[default]
    Linearizable,
    /// From any replica that has reached this revision of the shard.
    Causal {
        /// The revision that the caller has seen.
        revision: u64,
    },
    /// From any replica, whatever it has.
    Eventual,
}

/// The beginning of every head that names one key.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeyPrefix<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The key.
    pub key: &'a [u8],
}

/// Head of [`crate::Kind::Get`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Get<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The key.
    #[serde(serialize_with = "crate::codec::as_bytes")]
    pub key: &'a [u8],
    /// How fresh.
    pub consistency: Consistency,
}

/// Head of the answer to a get; the tail is the value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct GetDone {
    /// The row's version, or `None` if there is no such row.
    pub version: Option<u64>,
    /// The shard's revision at which it was read: the caller's token.
    pub revision: u64,
    /// What the answer holds to.
    pub consistency: Consistency,
}

/// Head of [`crate::Kind::Scan`] and [`crate::Kind::Count`]. Both look at one shard, or, sent to a balancer with
/// [`crate::ShardId::UNROUTED`], at the whole keyspace; a scan also at several shards of one node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Scan {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// First key; empty means from the first.
    pub start: Vec<u8>,
    /// First key beyond; `None` means to the last.
    pub end: Option<Vec<u8>>,
    /// From the last key to the first.
    pub reverse: bool,
    /// Leave out the values.
    pub keys_only: bool,
    /// Most rows; 0 means as many as a page holds.
    pub rows_max: u32,
    /// Most bytes of keys and values in the page; one row more may be added. 0 means the default.
    pub bytes_max: u32,
    /// How fresh.
    pub consistency: Consistency,
    /// Further shards of the same node whose rows are merged into the page, each of them another one,
    /// [`MERGED_SHARDS_MAX`](crate::limits::MERGED_SHARDS_MAX) at the most with the frame's own. Only a scan of a node
    /// that is not causal may name some.
    pub with: Vec<ShardId>,
}

impl Scan {
    /// The same scan with what is left after a page that ended with [`ScanDone::next`].
    #[must_use]
    pub fn resumed(&self, next: Vec<u8>) -> Self {
        let mut rest = self.clone();
        if self.reverse {
            rest.end = Some(next);
        } else {
            rest.start = next;
        }
        rest
    }
}

/// Head of the answer to a scan; the tail is the values, one behind the other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ScanDone {
    /// The rows in the order asked for.
    pub rows: Vec<RowHead>,
    /// Where to go on: the next `start`, or in reverse the next `end`. `None` when the range is done.
    pub next: Option<Vec<u8>>,
    /// The shard's revision at which the page was read; 0 when a balancer merged it from several shards.
    pub revision: u64,
    /// The revisions of the shards that [`Scan::with`] names.
    pub with: Vec<u64>,
}

/// A row of a page, without its value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RowHead {
    /// The key.
    pub key: Bytes,
    /// The version.
    pub version: u64,
    /// Bytes of its value in the tail.
    pub value_bytes: u32,
}

/// Head of the answer to a count.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CountDone {
    /// Rows seen.
    pub rows: u64,
    /// Where to go on, as in [`ScanDone::next`].
    pub next: Option<Vec<u8>>,
}

// ---------------------------------------------------------------------------------------------- failures

/// Why a request has no other answer, sorted by what the receiver must do.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize, thiserror::Error)]
pub enum Failure {
    /// Not done, and doing it again gives the same. Tell the caller.
    #[error("{text}")]
    Refusal {
        /// Which, for programs.
        code: RefusalCode,
        /// What was wrong, where, and what to do.
        text: String,
    },
    /// Not done; another replica of the shard leads. Ask that one.
    #[error("the node does not lead the shard{}", hint.map(|n| format!(", node {n} may")).unwrap_or_default())]
    NotLeader {
        /// The node that may lead.
        hint: Option<NodeId>,
    },
    /// Not done; the node does not have the shard, or the key is not of it. Get the map anew.
    #[error("the shard is not here or does not hold the key (map epoch {epoch})")]
    WrongShard {
        /// The epoch of the map that the node has.
        epoch: Epoch,
    },
    /// Not done; try again after a while, here or elsewhere.
    #[error("busy: {text}")]
    Busy {
        /// How long to wait first.
        retry_after_ms: u32,
        /// With what.
        text: String,
    },
    /// Not done; the replica has not yet reached the revision of the caller's token.
    #[error("the replica is at revision {revision}, behind the caller's token")]
    Behind {
        /// The revision that it is at.
        revision: u64,
    },
    /// It may have been done, now or later, or not. Tell the caller so.
    #[error("outcome unknown: {text}")]
    Unknown {
        /// What happened.
        text: String,
    },
    /// Not done: a condition does not hold.
    #[error("operation {operation}: the condition does not hold, {}", version.map_or("there is no such row".to_owned(), |version| format!("the row has version {version}")))]
    Condition {
        /// The operation of the batch, from 0.
        operation: u32,
        /// The version that its row has, or `None` if there is no such row.
        version: Option<u64>,
    },
    /// Not done: it met a lock of another transaction, or another one was faster. Try again.
    #[error("aborted: {text}")]
    Aborted {
        /// What it met.
        text: String,
    },
}

/// The refusals that a program may want to tell apart.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum RefusalCode {
    /// The body does not decode, or contradicts itself.
    Malformed,
    /// The key is empty.
    KeyEmpty,
    /// The key is over its limit.
    KeyTooLarge,
    /// The value is over its limit.
    ValueTooLarge,
    /// The batch is empty or over its limits.
    BatchLimits,
    /// No keyspace of that id or name.
    UnknownKeyspace,
    /// Another cluster was meant.
    WrongCluster,
    /// No protocol version in common.
    Version,
    /// The sender's role may not ask this.
    NotAllowed,
    /// The disk is full; reads and deletes still work.
    DiskFull,
    /// The node is in no cluster yet.
    NotBootstrapped,
    /// The request does not fit what is there already.
    Conflict,
    /// What was named is not there.
    NotFound,
    /// What was named is there already.
    Exists,
    /// It would cost the last copy of a shard, or its quorum.
    WouldLose,
    /// The node was removed from the cluster or replaced in it.
    Retired,
    /// This balancer has no way to do that.
    Unsupported,
    /// The write was asked for first so long ago that nobody remembers whether it was done.
    Forgotten,
}

impl Failure {
    /// A refusal.
    #[must_use]
    pub fn refusal(code: RefusalCode, text: impl Into<String>) -> Self {
        Self::Refusal { code, text: text.into() }
    }

    /// Malformed bytes from a peer.
    #[must_use]
    pub fn malformed(error: &crate::codec::CodecError) -> Self {
        Self::refusal(RefusalCode::Malformed, error.to_string())
    }

    /// An unknown outcome.
    #[must_use]
    pub fn unknown(text: impl Into<String>) -> Self {
        Self::Unknown { text: text.into() }
    }
}
