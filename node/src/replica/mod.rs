//! A replica of a shard in its Raft group: raft-rs, behind our own types. Pure but for reading old entries from the log.
//!
//! Only this folder names the crate. A replica takes events and the time, and says what must be written, sent and
//! applied; [`crate::owner`] does it. What must be durable before it is sent stays in [`Output::after_write`].

pub mod change;
mod convert;
mod storage;
#[cfg(test)]
mod tests;

#[cfg(feature = "sim")]
use crate::inspect::{Bug, planted};
use crate::log::recover::{NUMBER_MAX, Recovered};
use crate::log::{Hard, Log, LogEntry, Mark, ShardWrite};
use bytes::Bytes;
use change::Settling;
pub use convert::{is_member, is_sound};
use raft::eraftpb::{Message, MessageType};
use raft::{Config, RawNode, ReadOnlyOption, SnapshotStatus, StateRole};
use shkv_proto::limits::APPEND_BYTES_MAX;
use shkv_proto::message::{EntryHead, RaftMessage, SnapshotHead};
use shkv_proto::{ReplicaId, ShardId};
use std::sync::Arc;
use std::time::Duration;
use storage::ReplicaLog;

/// One tick of Raft's clock.
pub const TICK: Duration = Duration::from_millis(50);
/// Ticks between two heartbeats of a leader. They are most of what an idle shard costs; two in a row may be lost before a
/// follower stands for election, and one before the lease has run out.
const HEARTBEAT_TICKS: usize = 4;
/// Ticks without a leader after which a follower may stand for election, at the least; twice as many at the most.
const ELECTION_TICKS: usize = 12;
/// How long after it sent a heartbeat, that a majority took in, a leader may answer reads by itself. A follower that took
/// it in refuses its vote to others for [`ELECTION_TICKS`] ticks, the first of which may be cut short; one tick more is
/// left for clocks that do not run alike (Ongaro, "Consensus: bridging theory and practice", 2014, section 6.4.1).
pub const LEASE: Duration = Duration::from_millis(TICK.as_millis() as u64 * (ELECTION_TICKS as u64 - 2));
/// How long a replica that was started anew votes for nobody: it does not know any more which leader it last heard from, and
/// that leader may count on its promise for this long.
pub const VOTE_HOLD: Duration = Duration::from_millis(TICK.as_millis() as u64 * ELECTION_TICKS as u64);
/// Append messages in flight to one follower.
const INFLIGHT_MESSAGES: usize = 64;
/// Bytes of entries that a leader takes in before any of them is committed.
const UNCOMMITTED_BYTES_MAX: u64 = 64 << 20;
/// Bytes of committed entries that are handed over for one round of applying.
const COMMITTED_BYTES_MAX: u64 = 4 << 20;

/// Terms, indexes and revisions that a peer tells beyond this were never reached by counting. Adding to them must not
/// overflow, nor come to what the log would refuse as damage.
pub const COUNTED_MAX: u64 = NUMBER_MAX / 2;
/// Within this time, in nanoseconds, a follower does not say again what it has acknowledged: a leader that tells of a commit
/// waits for no answer. Later it does, because the first may have been lost with its connection.
const ACKNOWLEDGED_AGAIN: u64 = 20_000_000;
/// Kinds of message as in `proto.md`.
const APPEND: u8 = 3;
const APPEND_RESPONSE: u8 = 4;
const SNAPSHOT: u8 = 7;
const HEARTBEAT: u8 = 8;

/// A Raft message on its way out.
#[derive(Debug)]
pub struct Outgoing {
    /// The message.
    pub head: RaftMessage,
    /// The data of its entries.
    pub data: Vec<Bytes>,
}

/// What a replica wants done, in this order.
#[derive(Debug)]
pub struct Output {
    /// Its number; outputs become durable in the order of their numbers.
    pub number: u64,
    /// To be sent at once: a leader may send while it writes.
    pub messages: Vec<Outgoing>,
    /// To be written, if anything.
    pub write: Option<ShardWrite>,
    /// Whether `write` must be durable before [`Replica::persisted`].
    pub must_sync: bool,
    /// To be sent when this output and all before it are durable: a vote forgotten in a crash elects two leaders.
    pub after_write: Vec<Outgoing>,
    /// A snapshot to put in the place of the rows before anything else of this shard is done.
    pub snapshot: Option<SnapshotHead>,
    /// Entries to apply.
    pub committed: Vec<LogEntry>,
    /// Reads that may be answered when the index is applied: their token and that index.
    pub reads: Vec<(u64, u64)>,
}

/// A replica.
pub struct Replica {
    shard: ShardId,
    id: ReplicaId,
    raft: RawNode<ReplicaLog>,
    /// The newest stamp of this term's leader that was taken in.
    leader_stamp: (u64, u64),
    /// What was acknowledged last.
    acknowledged: Acknowledged,
    vote_hold_until: u64,
    /// Whether a leader was heard since the process began.
    heard_leader: bool,
    settling: Settling,
    /// The highest commit index that was sent with an append, while it leads.
    told: u64,
}

/// That a log has everything of a leader up to an index, and what it knows to be committed.
#[derive(Clone, Copy, Debug, Default)]
struct Acknowledged {
    leader: u64,
    term: u64,
    index: u64,
    commit: u64,
    at: u64,
}

/// A replica's log and state disagree in a way that no crash explains.
#[derive(Debug, thiserror::Error)]
#[error("shard {shard}: {text}")]
pub struct ReplicaError {
    shard: ShardId,
    text: String,
}

impl Replica {
    /// A replica from what the log and redb have of it. `now` is in nanoseconds of the node's monotonic clock.
    ///
    /// # Errors
    /// [`ReplicaError`] when entries between redb's state and the log are missing.
    pub fn open(
        shard: ShardId,
        id: ReplicaId,
        log: &Arc<Log>,
        recovered: Recovered,
        flushed: SnapshotHead,
        now: u64,
    ) -> Result<Self, ReplicaError> {
        let fail = |text: String| ReplicaError { shard, text };
        let Recovered { mut hard, mut base, mut terms } = recovered;
        let voted_before = hard.term > 0;
        let applied = Mark { index: flushed.index, term: flushed.term };
        if base.index > applied.index {
            return Err(fail(format!("its rows end at entry {}, its log begins behind {}", applied.index, base.index)));
        }
        let at = (applied.index - base.index) as usize;
        let term_there = if at == 0 { Some(base.term) } else { terms.get(at - 1).copied() };
        if term_there != Some(applied.term) {
            // The crash came after a snapshot was installed and before the log was told.
            let reset = ShardWrite { shard: shard.0, reset: Some(applied), ..ShardWrite::default() };
            log.append(&[reset]).map_err(|error| fail(error.to_string()))?;
            base = applied;
            terms.clear();
        }
        let last = base.index + terms.len() as u64;
        // The commit index is written without a sync, so redb may be ahead of it, and the end of a torn write behind it.
        hard.commit = hard.commit.max(applied.index).min(last);
        hard.term = hard.term.max(applied.term).max(terms.last().copied().unwrap_or(0));
        #[cfg(feature = "sim")]
        let applied = match () {
            () if planted(Bug::AppliedTwice) => base,
            () => applied,
        };
        let config = Config {
            id: id.0,
            election_tick: ELECTION_TICKS,
            heartbeat_tick: HEARTBEAT_TICKS,
            applied: applied.index,
            max_size_per_msg: APPEND_BYTES_MAX as u64,
            max_inflight_msgs: INFLIGHT_MESSAGES,
            check_quorum: true,
            pre_vote: true,
            read_only_option: ReadOnlyOption::Safe,
            max_uncommitted_size: UNCOMMITTED_BYTES_MAX,
            max_committed_size_per_ready: COMMITTED_BYTES_MAX,
            ..Config::default()
        };
        let settling = Settling::new(hard.commit, last);
        let storage = ReplicaLog::new(shard, log.clone(), hard, base, terms, flushed);
        let logger = slog::Logger::root(slog::Discard, slog::o!());
        let raft = RawNode::new(&config, storage, &logger).map_err(|error| fail(error.to_string()))?;
        let vote_hold_until = if voted_before { now + VOTE_HOLD.as_nanos() as u64 } else { 0 };
        #[cfg(feature = "sim")]
        let vote_hold_until = match () {
            () if planted(Bug::VoteForgotten) || planted(Bug::VoteAtOnce) => 0,
            () => vote_hold_until,
        };
        Ok(Self {
            shard,
            id,
            raft,
            leader_stamp: (0, 0),
            acknowledged: Acknowledged::default(),
            vote_hold_until,
            heard_leader: false,
            settling,
            told: 0,
        })
    }

    /// Its id.
    #[must_use]
    pub fn id(&self) -> ReplicaId {
        self.id
    }

    /// Whether it leads.
    #[must_use]
    pub fn leads(&self) -> bool {
        self.raft.raft.state == StateRole::Leader
    }

    /// Whether it is handing its leadership over. The one that takes it does not wait for a lease to end.
    #[must_use]
    pub fn is_handing_over(&self) -> bool {
        self.raft.raft.lead_transferee.is_some()
    }

    /// The replica that it takes for the leader.
    #[must_use]
    pub fn leader(&self) -> Option<ReplicaId> {
        Some(ReplicaId(self.raft.raft.leader_id)).filter(|id| id.0 != 0)
    }

    /// Its term.
    #[must_use]
    pub fn term(&self) -> u64 {
        self.raft.raft.term
    }

    /// The last index known to be committed.
    #[must_use]
    pub fn committed(&self) -> u64 {
        self.raft.raft.raft_log.committed
    }

    /// First and last index of the log.
    #[must_use]
    pub fn log_bounds(&self) -> (u64, u64) {
        (self.raft.store().first(), self.raft.raft.raft_log.last_index())
    }

    /// One tick of time. Tells whether there may be an output.
    pub fn tick(&mut self) -> bool {
        #[cfg(feature = "sim")]
        if let Some(host) = shkv_proto::world::sim::here() {
            // raft draws it from the system; in a simulation it must come from the seed.
            let drawn = host.fixed_draw(&[u64::from(self.shard.0), self.id.0, self.term()]);
            self.raft.raft.set_randomized_election_timeout(ELECTION_TICKS + drawn as usize % ELECTION_TICKS);
        }
        if self.leads() && self.committed() > self.told {
            self.raft.raft.bcast_append(); // nothing was proposed since, that would have told of it
        }
        self.raft.tick()
    }

    /// Followers hear of a commit with the next entry, or at the next tick: to tell them at once would nearly double the
    /// messages of a write, and nobody waits for it. Only while the group changes somebody does.
    fn tell_commits_late(&mut self) {
        if self.leads() {
            let late = self.is_settled();
            self.raft.raft.skip_bcast_commit(late);
        }
    }

    /// Stands for election at once, if it may vote.
    pub fn campaign(&mut self) {
        if self.raft.raft.promotable() {
            let _ = self.raft.campaign(); // an error means that it may not; then it does not
        }
    }

    /// Whether a message keeps the promises that Raft relies on so much that it stops the process when one is broken:
    /// nothing beyond this log is told to be committed or acknowledged, and nothing committed is overwritten.
    #[must_use]
    pub fn can_take(&self, wire: &RaftMessage) -> bool {
        let log = &self.raft.raft.raft_log;
        let last = log.last_index();
        let committed_agrees = |entry: &EntryHead| {
            entry.index > log.committed || log.term(entry.index).map_or(true, |term| term == entry.term)
        };
        wire.from.0 != 0
            && wire.from != self.id
            && wire.term <= COUNTED_MAX
            && wire.index <= COUNTED_MAX
            && (wire.kind == SNAPSHOT) == wire.snapshot.is_some()
            && wire.snapshot.as_ref().is_none_or(|head| {
                (1..=COUNTED_MAX).contains(&head.index) && (1..=wire.term).contains(&head.term) && is_sound(head)
            })
            && wire.entries.iter().all(|entry| entry.term <= wire.term && committed_agrees(entry))
            && match wire.kind {
                // Raft takes 0 for the term of whatever is beyond its log: it would find that there is what is not.
                APPEND => (wire.index == 0) == (wire.log_term == 0),
                HEARTBEAT => wire.commit <= last,
                APPEND_RESPONSE => wire.reject || wire.index <= last,
                _ => true,
            }
    }

    /// Takes in a message from a peer. Returns, for a leader, the peer and the newest stamp that it has taken in.
    pub fn step(&mut self, wire: &RaftMessage, data: Vec<Bytes>, now: u64) -> Option<(ReplicaId, u64)> {
        let message = convert::from_wire(wire, data)?;
        let kind = message.get_msg_type();
        let is_vote = matches!(kind, MessageType::MsgRequestVote | MessageType::MsgRequestPreVote);
        if is_vote && now < self.vote_hold_until {
            return None;
        }
        let (term, from) = (message.term, message.from);
        self.tell_commits_late();
        if let Err(error) = self.raft.step(message) {
            tracing::debug!(shard = self.shard.0, "a message was not taken: {error}");
            return None;
        }
        if term != self.term() {
            return None;
        }
        match kind {
            MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot
                if self.raft.raft.leader_id == from =>
            {
                if self.leader_stamp.0 != term {
                    self.leader_stamp = (term, 0);
                }
                self.leader_stamp.1 = self.leader_stamp.1.max(wire.stamp);
                self.heard_leader = true;
                None
            }
            MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse if self.leads() => {
                Some((wire.from, wire.stamp))
            }
            _ => None,
        }
    }

    /// Proposes an entry; tells where it stands in the log. `None` if it was not taken: certainly not done.
    pub fn propose(&mut self, data: Vec<u8>) -> Option<Mark> {
        if !self.leads() || self.raft.propose(vec![], data).is_err() {
            return None;
        }
        Some(Mark { index: self.raft.raft.raft_log.last_index(), term: self.term() })
    }

    /// Asks for the index that a read begun now must wait for. It may be dropped silently: ask again after a while.
    pub fn read_index(&mut self, token: u64) {
        self.raft.read_index(token.to_le_bytes().to_vec());
    }

    /// Sends everybody a heartbeat, if it leads.
    pub fn ping(&mut self) {
        self.raft.ping();
    }

    /// Whether it is known to be a voter of its group now: it leads, or has heard a leader since the process began. Without
    /// that it may have been removed while it was away.
    #[must_use]
    pub fn is_of_group(&self) -> bool {
        self.raft.raft.promotable() && (self.leads() || self.heard_leader)
    }

    /// Hands the leadership over, if it leads.
    pub fn transfer_to(&mut self, to: ReplicaId) {
        self.raft.transfer_leader(to.0);
    }

    /// Whether a follower needs a snapshot that is newer than what redb holds. Asking forgets it.
    pub fn wants_flush(&self) -> bool {
        self.raft.store().flush_wanted.take()
    }

    /// Tells that what was sent to a peer did not get there.
    pub fn unreachable(&mut self, peer: ReplicaId) {
        self.raft.report_unreachable(peer.0);
    }

    /// Tells how the sending of a snapshot ended.
    pub fn snapshot_sent(&mut self, peer: ReplicaId, ok: bool) {
        let status = if ok { SnapshotStatus::Finish } else { SnapshotStatus::Failure };
        self.raft.report_snapshot(peer.0, status);
    }

    /// What is to be done next, if anything. `now` is stamped on what a leader sends.
    pub fn output(&mut self, now: u64) -> Option<Output> {
        if !self.raft.has_ready() {
            return None;
        }
        let mut ready = self.raft.ready();
        let number = ready.number();
        let mut must_sync = ready.must_sync();
        let snapshot = Some(ready.snapshot()).filter(|snapshot| snapshot.get_metadata().index > 0).map(|snapshot| {
            let metadata = snapshot.get_metadata();
            convert::snapshot_head(metadata.index, metadata.term, metadata.get_conf_state())
        });
        let messages = self.outgoing(ready.take_messages(), now);
        let after_write = self.outgoing(ready.take_persisted_messages(), now);
        let hard = ready.hs().map(|hard| Hard { term: hard.term, vote: hard.vote, commit: hard.commit });
        let entries = ready.take_entries();
        let write = (hard.is_some() || !entries.is_empty() || snapshot.is_some()).then(|| ShardWrite {
            shard: self.shard.0,
            reset: snapshot.as_ref().map(|head| Mark { index: head.index, term: head.term }),
            entries: entries.iter().map(convert::log_entry).collect(),
            hard,
        });
        let store = self.raft.mut_store();
        if let Some(snapshot) = &snapshot {
            store.reset(snapshot.clone());
        }
        store.append(&entries);
        if let Some(hard) = hard {
            store.set_hard(hard);
        }
        must_sync |= self.settling.written(number, must_sync, &entries, hard.map(|hard| hard.commit));
        let committed = ready.take_committed_entries().iter().map(convert::log_entry).collect();
        let token = |context: &[u8]| Some(u64::from_le_bytes(context.try_into().ok()?));
        let states = ready.take_read_states();
        let reads = states.iter().filter_map(|state| Some((token(&state.request_ctx)?, state.index))).collect();
        self.raft.advance_append_async(ready);
        Some(Output { number, messages, write, must_sync, after_write, snapshot, committed, reads })
    }

    /// Whether this was said just now, and nobody waits to hear it again.
    fn is_said_again(&mut self, message: &Message, now: u64) -> bool {
        if message.get_msg_type() != MessageType::MsgAppendResponse || message.reject {
            return false;
        }
        let (leader, term, index) = (message.to, message.term, message.index);
        let last = self.acknowledged;
        let is_same = (last.leader, last.term, last.index) == (leader, term, index);
        // A leader does wait to hear that its first entry, and a change of the group's replicas, are known to be committed.
        let is_known = last.commit >= self.settling.last_change()
            && self.raft.raft.raft_log.term(last.commit).is_ok_and(|of| of == term);
        if is_same && is_known && now.saturating_sub(last.at) < ACKNOWLEDGED_AGAIN {
            return true;
        }
        self.acknowledged = Acknowledged { leader, term, index, commit: message.commit, at: now };
        false
    }

    fn outgoing(&mut self, mut messages: Vec<Message>, now: u64) -> Vec<Outgoing> {
        messages.retain(|message| !self.is_said_again(message, now));
        let appends = messages.iter().filter(|message| message.get_msg_type() == MessageType::MsgAppend);
        self.told = appends.map(|message| message.commit).fold(self.told, u64::max);
        let wire = |message: Message| {
            let stamp = match message.get_msg_type() {
                MessageType::MsgAppend | MessageType::MsgHeartbeat | MessageType::MsgSnapshot => now,
                MessageType::MsgAppendResponse | MessageType::MsgHeartbeatResponse
                    if message.term == self.leader_stamp.0 =>
                {
                    self.leader_stamp.1
                }
                _ => 0,
            };
            let mut data = Vec::new();
            let head = convert::to_wire(self.shard, stamp, &message, &mut data);
            Outgoing { head, data }
        };
        messages.into_iter().map(wire).collect()
    }

    /// All outputs up to this number are durable.
    pub fn persisted(&mut self, number: u64) {
        self.settling.persisted(number);
        self.tell_commits_late();
        self.raft.on_persist_ready(number);
    }

    /// Everything up to this index is applied, and durable in the log. Of older entries so many bytes stay in memory for
    /// followers that are behind.
    pub fn applied_to(&mut self, index: u64, recent_bytes_max: usize) {
        let last = self.raft.raft.raft_log.last_index();
        self.raft.advance_apply_to(index);
        if self.raft.raft.raft_log.last_index() > last {
            self.raft.raft.bcast_append(); // the end of a joint configuration need not wait for a heartbeat
        }
        self.raft.mut_store().shrink(index, recent_bytes_max);
    }

    /// redb holds this state now.
    pub fn flushed(&mut self, state: SnapshotHead) {
        self.raft.mut_store().flushed = state;
    }

    /// The log has let go of entries up to `index`.
    pub fn released(&mut self, index: u64) {
        self.raft.mut_store().drop_to(index);
    }
}
