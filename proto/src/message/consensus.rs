//! What replicas of a shard say to each other: Raft messages, and snapshots.

use crate::ids::{KeyspaceId, NodeId, ReplicaId, ShardId};
use crate::map::Part;
use serde::{Deserialize, Serialize};

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
