//! What frames say: the heads of requests and answers, and the failures.
//!
//! `proto.md` tells for each message who sends it and what it means. Fields and variants are appended, never moved.
//! Heads that name a key begin with keyspace and key, so that a balancer decodes no more than those ([`KeyPrefix`]).

use crate::ids::{ClusterId, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use crate::limits::Limits;
use crate::map::{Map, Part};
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
/// [`ShardId::UNROUTED`], at the whole keyspace.
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
    /// The shard's revision at which the page was read; 0 when it comes from several shards.
    pub revision: u64,
}

/// A row of a page, without its value.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RowHead {
    /// The key.
    pub key: Vec<u8>,
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

// ---------------------------------------------------------------------------------------------- writes

/// Head of [`crate::Kind::Put`] (the tail is the value) and of [`crate::Kind::Delete`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Write<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The key.
    pub key: &'a [u8],
}

/// Head of [`crate::Kind::Batch`]; the tail is the values of the puts, one behind the other. The header names the shard.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Batch<'a> {
    /// The keyspace.
    pub keyspace: KeyspaceId,
    /// The operations, done in this order in one step.
    #[serde(borrow)]
    pub ops: Vec<BatchOp<'a>>,
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
    },
    /// Remove a row.
    Delete {
        /// The key.
        key: &'a [u8],
    },
}

impl<'a> BatchOp<'a> {
    /// The key.
    #[must_use]
    pub fn key(&self) -> &'a [u8] {
        match self {
            Self::Put { key, .. } | Self::Delete { key } => key,
        }
    }
}

/// Head of the answer to a put, a delete or a batch.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct WriteDone {
    /// The shard's revision after the write: the row's version, for a batch that of its last operation.
    pub revision: u64,
    /// Rows that a delete found and removed. Puts do not look: it would cost each of them a read.
    pub removed: u32,
}

// ---------------------------------------------------------------------------------------------- cluster

/// Head of the answer to [`crate::Kind::Map`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapDone {
    /// The map.
    pub map: Map,
    /// Which node led which shard when last heard of: a hint.
    pub leaders: Vec<(ShardId, NodeId)>,
}

/// Head of [`crate::Kind::CreateReplica`]. Doing it twice is the same as doing it once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateReplica {
    /// The cluster; a node that is in none takes it, and keeps it for good.
    pub cluster: ClusterId,
    /// The shard.
    pub shard: ShardId,
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its part of the keyspace.
    pub part: Part,
    /// The replica to make.
    pub replica: ReplicaId,
    /// All voters of the new group, this one included, with the nodes that keep them.
    pub voters: Vec<(ReplicaId, NodeId)>,
    /// Whether this replica stands for election at once, so that leaders are spread from the start.
    pub campaign: bool,
}

/// Head of [`crate::Kind::TransferLeader`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TransferLeader {
    /// The replica that should lead.
    pub to: ReplicaId,
}

/// Head of [`crate::Kind::Beat`]. The answer's head is a [`NodeStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Beat {
    /// Where each node was last reached. Unlike the map this needs no quorum, so it works while nodes come up again.
    pub addrs: Vec<(NodeId, String)>,
    /// The map, when the node's own is older.
    pub map: Option<Map>,
}

/// What a node says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its identity.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its cluster, if it is in one.
    pub cluster: Option<ClusterId>,
    /// Its process.
    pub process: u32,
    /// Processor time of its process so far, in microseconds.
    pub cpu_us: u64,
    /// The epoch of the map that it has.
    pub epoch: Epoch,
    /// Bytes of rows in memory that are not yet in redb.
    pub table_bytes: u64,
    /// Bytes of log on disk that are still needed.
    pub log_bytes: u64,
    /// Bytes free on its disk.
    pub disk_free_bytes: u64,
    /// Whether the disk is so full that puts are refused.
    pub disk_full: bool,
    /// fdatasync calls of the log so far.
    pub log_syncs: u64,
    /// Its replicas.
    pub replicas: Vec<ReplicaStatus>,
}

/// What a node says of a replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Whether it leads.
    pub leads: bool,
    /// The replica that it takes for the leader.
    pub leader: Option<ReplicaId>,
    /// Raft term.
    pub term: u64,
    /// Last log index known to be committed.
    pub committed: u64,
    /// Last log index applied.
    pub applied: u64,
    /// Last log index that is durable in redb.
    pub flushed: u64,
    /// First log index that the log still has.
    pub log_first: u64,
    /// Last log index.
    pub log_last: u64,
    /// Mutations so far.
    pub revision: u64,
    /// Snapshots taken in from a leader since the node started.
    pub snapshots_installed: u64,
}

/// Head of the answer to [`crate::Kind::Status`]: a node lists itself, a balancer lists all nodes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusDone {
    /// The map that the answering side has.
    pub map: Option<Map>,
    /// Process and processor time in microseconds of the answering side.
    pub process: (u32, u64),
    /// The nodes, each with its status or why there is none.
    pub nodes: Vec<(NodeId, Result<NodeStatus, String>)>,
}

// ---------------------------------------------------------------------------------------------- consensus

/// A Raft message between two replicas. A [`crate::Kind::Raft`] frame's head is a list of these; its tail is the data
/// of all their entries, one behind the other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RaftMessage {
    /// The shard.
    pub shard: ShardId,
    /// The kind of message, numbered as in `proto.md`.
    pub kind: u8,
    /// Receiver.
    pub to: ReplicaId,
    /// Sender.
    pub from: ReplicaId,
    /// Term.
    pub term: u64,
    /// Term of the entry before the first, or of the sender's last entry.
    pub log_term: u64,
    /// Index of the entry before the first, or of the sender's last entry.
    pub index: u64,
    /// Commit index.
    pub commit: u64,
    /// Term of the commit index.
    pub commit_term: u64,
    /// Refusal.
    pub reject: bool,
    /// Where the refuser's log may agree.
    pub reject_hint: u64,
    /// Index from which the sender wants a snapshot; 0 is none.
    pub request_snapshot: u64,
    /// Carried back unchanged.
    pub context: Vec<u8>,
    /// Election priority of the sender.
    pub priority: i64,
    /// From a leader: its monotonic clock when it sent this, in nanoseconds. From a follower: the newest such stamp of
    /// this term that it had taken in before it answered. The leader's lease is counted from it.
    pub stamp: u64,
    /// The entries.
    pub entries: Vec<EntryHead>,
    /// What a snapshot covers, if the message announces one.
    pub snapshot: Option<SnapshotHead>,
}

/// A log entry without its data.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EntryHead {
    /// 0 is data, 2 is a change of configuration.
    pub kind: u8,
    /// Term.
    pub term: u64,
    /// Index.
    pub index: u64,
    /// Bytes of its data in the tail.
    pub data_bytes: u32,
}

/// What a snapshot covers. The rows travel on a connection of their own.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotHead {
    /// Last index that it covers.
    pub index: u64,
    /// Term of that index.
    pub term: u64,
    /// Voters.
    pub voters: Vec<ReplicaId>,
    /// Voters of the outgoing half of a joint configuration.
    pub voters_outgoing: Vec<ReplicaId>,
    /// Learners.
    pub learners: Vec<ReplicaId>,
    /// Voters that become learners when the joint configuration ends.
    pub learners_next: Vec<ReplicaId>,
    /// Whether the joint configuration ends by itself.
    pub auto_leave: bool,
}

/// Head of [`crate::Kind::SnapshotBegin`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotBegin {
    /// The Raft message that the snapshot belongs to.
    pub message: RaftMessage,
    /// The shard's revision at the snapshot.
    pub revision: u64,
    /// The shard's keyspace.
    pub keyspace: KeyspaceId,
    /// The shard's part.
    pub part: Part,
    /// The nodes that keep the group's replicas.
    pub homes: Vec<(ReplicaId, NodeId)>,
}

/// Head of [`crate::Kind::SnapshotChunk`]; the tail is keys and stored rows, one behind the other.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotChunk {
    /// Length of each key and of each stored row, in key order.
    pub rows: Vec<(u32, u32)>,
}

/// Head of [`crate::Kind::SnapshotEnd`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct SnapshotEnd {
    /// Rows sent in all.
    pub rows: u64,
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
