//! Raft's own types to and from those of the wire. Nothing that comes from a socket is ever parsed by Raft's codec.

use crate::log::LogEntry;
use bytes::Bytes;
use raft::eraftpb::{ConfState, Entry, EntryType, Message, MessageType, Snapshot};
use shkv_proto::message::{EntryHead, RaftMessage, SnapshotHead};
use shkv_proto::{ReplicaId, ShardId};

/// Members of one kind that a configuration may have.
const MEMBERS_MAX: usize = 64;

pub(super) fn entry_type(kind: u8) -> EntryType {
    match kind {
        1 => EntryType::EntryConfChange,
        2 => EntryType::EntryConfChangeV2,
        _ => EntryType::EntryNormal,
    }
}

pub(super) fn log_entry(entry: &Entry) -> LogEntry {
    LogEntry { index: entry.index, term: entry.term, kind: entry.get_entry_type() as u8, data: entry.data.clone() }
}

fn ids(ids: &[u64]) -> Vec<ReplicaId> {
    ids.iter().copied().map(ReplicaId).collect()
}

fn numbers(ids: &[ReplicaId]) -> Vec<u64> {
    ids.iter().map(|id| id.0).collect()
}

pub(super) fn conf_state(head: &SnapshotHead) -> ConfState {
    let mut conf = ConfState::default();
    conf.set_voters(numbers(&head.voters));
    conf.set_voters_outgoing(numbers(&head.voters_outgoing));
    conf.set_learners(numbers(&head.learners));
    conf.set_learners_next(numbers(&head.learners_next));
    conf.auto_leave = head.auto_leave;
    conf
}

pub(super) fn snapshot_head(index: u64, term: u64, conf: &ConfState) -> SnapshotHead {
    SnapshotHead {
        index,
        term,
        voters: ids(&conf.voters),
        voters_outgoing: ids(&conf.voters_outgoing),
        learners: ids(&conf.learners),
        learners_next: ids(&conf.learners_next),
        auto_leave: conf.auto_leave,
    }
}

/// Whether a replica has a part in a configuration.
#[must_use]
pub fn is_member(head: &SnapshotHead, id: ReplicaId) -> bool {
    [&head.voters, &head.voters_outgoing, &head.learners, &head.learners_next].iter().any(|ids| ids.contains(&id))
}

/// Whether a configuration is one that Raft can have come to; it stops the process over any other.
#[must_use]
pub fn is_sound(head: &SnapshotHead) -> bool {
    let SnapshotHead { voters, voters_outgoing: outgoing, learners, learners_next, auto_leave, .. } = head;
    let is_set = |ids: &Vec<ReplicaId>| {
        ids.len() <= MEMBERS_MAX
            && ids.iter().enumerate().all(|(at, id)| id.0 != 0 && id.0 != u64::MAX && !ids[..at].contains(id))
    };
    !voters.is_empty()
        && [voters, outgoing, learners, learners_next].into_iter().all(is_set)
        && learners.iter().all(|id| !voters.contains(id) && !outgoing.contains(id))
        && learners_next.iter().all(|id| !voters.contains(id) && outgoing.contains(id))
        && (!outgoing.is_empty() || !auto_leave)
}

pub(super) fn snapshot(head: &SnapshotHead) -> Snapshot {
    let mut snapshot = Snapshot::default();
    let metadata = snapshot.mut_metadata();
    metadata.index = head.index;
    metadata.term = head.term;
    metadata.set_conf_state(conf_state(head));
    snapshot
}

/// A message of Raft as it goes over the wire, with the data of its entries beside it.
pub(super) fn to_wire(shard: ShardId, stamp: u64, message: &Message, data: &mut Vec<Bytes>) -> RaftMessage {
    let snapshot = message.snapshot.as_ref().filter(|snapshot| snapshot.get_metadata().index > 0).map(|snapshot| {
        let metadata = snapshot.get_metadata();
        snapshot_head(metadata.index, metadata.term, metadata.get_conf_state())
    });
    let mut entries = Vec::with_capacity(message.entries.len());
    for entry in message.entries.iter() {
        let kind = entry.get_entry_type() as u8;
        entries.push(EntryHead { kind, term: entry.term, index: entry.index, data_bytes: entry.data.len() as u32 });
        data.push(entry.data.clone());
    }
    RaftMessage {
        shard,
        kind: message.get_msg_type() as u8,
        to: ReplicaId(message.to),
        from: ReplicaId(message.from),
        term: message.term,
        log_term: message.log_term,
        index: message.index,
        commit: message.commit,
        commit_term: message.commit_term,
        reject: message.reject,
        reject_hint: message.reject_hint,
        request_snapshot: message.request_snapshot,
        context: message.context.to_vec(),
        priority: message.priority,
        stamp,
        entries,
        snapshot,
    }
}

/// A message from the wire as Raft takes it; `None` if no peer may send such a message.
pub(super) fn from_wire(wire: &RaftMessage, data: Vec<Bytes>) -> Option<Message> {
    let mut message = Message::default();
    message.set_msg_type(match wire.kind {
        3 => MessageType::MsgAppend,
        4 => MessageType::MsgAppendResponse,
        5 => MessageType::MsgRequestVote,
        6 => MessageType::MsgRequestVoteResponse,
        7 => MessageType::MsgSnapshot,
        8 => MessageType::MsgHeartbeat,
        9 => MessageType::MsgHeartbeatResponse,
        14 => MessageType::MsgTimeoutNow,
        17 => MessageType::MsgRequestPreVote,
        18 => MessageType::MsgRequestPreVoteResponse,
        _ => return None,
    });
    message.to = wire.to.0;
    message.from = wire.from.0;
    message.term = wire.term;
    message.log_term = wire.log_term;
    message.index = wire.index;
    message.commit = wire.commit;
    message.commit_term = wire.commit_term;
    message.reject = wire.reject;
    message.reject_hint = wire.reject_hint;
    message.request_snapshot = wire.request_snapshot;
    message.context = wire.context.clone().into();
    message.priority = wire.priority;
    if let Some(head) = &wire.snapshot {
        message.set_snapshot(snapshot(head));
    }
    if data.len() != wire.entries.len() {
        return None;
    }
    let mut before = wire.index;
    for (head, data) in wire.entries.iter().zip(data) {
        // Raft trusts its peers in this; a message that skips would stop the process.
        if before.checked_add(1) != Some(head.index) {
            return None;
        }
        before = head.index;
        let mut entry = Entry::default();
        entry.set_entry_type(entry_type(head.kind));
        entry.term = head.term;
        entry.index = head.index;
        entry.data = data;
        message.entries.push(entry);
    }
    Some(message)
}
