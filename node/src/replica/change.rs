//! Changes of a group's configuration: what a step from one set of replicas to the next is, when it may be taken, and
//! when what came out of it holds for good. Pure.
//!
//! Raft's configuration here takes effect where it is applied, so a replica that has a change in its log and does not know
//! that it is committed still counts the votes of those who were to go. They are deleted once the leader tells that the
//! change holds. Therefore a change is told to hold only when a majority of the new voters *durably* knows that it is
//! committed: whichever majority of them is left then, one of it can be elected without the votes of those who are gone,
//! and requests for votes carry that knowledge to the others. So a commit index that reaches a change is synced before
//! it is answered for, unlike any other.

use super::{Replica, ReplicaError, convert};
use crate::log::LogEntry;
use protobuf::Message as _;
use raft::eraftpb::{ConfChangeSingle, ConfChangeType, ConfChangeV2, Entry, EntryType};
use shkv_proto::message::{ChangeReplicas, Failure, GroupStatus, RefusalCode, SnapshotHead};
use shkv_proto::{NodeId, ReplicaId, codec};
use std::collections::{BTreeSet, VecDeque};

/// How soon a step that cannot be taken yet may be tried again.
const RETRY_MS: u32 = 100;

/// A configuration that was just applied.
#[derive(Debug)]
pub struct Configured {
    /// The state with the configuration that holds from it on.
    pub state: SnapshotHead,
    /// Replicas that it added, with their nodes.
    pub added: Vec<(ReplicaId, NodeId)>,
}

/// What a replica knows of how durable the commit of its group's changes is.
#[derive(Debug)]
pub(super) struct Settling {
    /// The commit index that is or will be durable with what was handed to the log.
    commit: u64,
    /// The commit index that is durable.
    durable: u64,
    /// Outputs on their way to the disk, and the commit index that becomes durable with each.
    under_way: VecDeque<(u64, u64)>,
    /// Indexes of changes that are not known to be committed.
    changes: BTreeSet<u64>,
    /// Entries up to this index were read at the start; any of them may be a change.
    unread: u64,
    /// The last change that was applied since the start.
    applied: u64,
    /// The term in which the replica was first looked at as a leader, and the last index then.
    led: (u64, u64),
    /// The term, and the last change then, of which it is known that a majority of the voters durably knows it.
    settled: Option<(u64, u64)>,
}

impl Settling {
    pub(super) fn new(commit: u64, last: u64) -> Self {
        let (under_way, changes) = (VecDeque::new(), BTreeSet::new());
        Self { commit, durable: commit, under_way, changes, unread: last, applied: 0, led: (0, 0), settled: None }
    }

    /// An output is about to be written. Tells whether it must be synced because it commits a change.
    pub(super) fn written(&mut self, number: u64, synced: bool, entries: &[Entry], commit: Option<u64>) -> bool {
        if let Some(first) = entries.first() {
            self.changes.split_off(&first.index); // what was there is void
        }
        let is_change = |entry: &&Entry| entry.get_entry_type() != EntryType::EntryNormal;
        self.changes.extend(entries.iter().filter(is_change).map(|entry| entry.index));
        let Some(commit) = commit.filter(|commit| *commit > self.commit) else { return false };
        let commits_change = self.commit < self.unread || self.changes.first().is_some_and(|first| *first <= commit);
        if commits_change || synced {
            self.commit = commit;
            self.changes = self.changes.split_off(&(commit + 1));
            self.under_way.push_back((number, commit));
        }
        commits_change
    }

    /// The last entry that is or may be a change.
    pub(super) fn last_change(&self) -> u64 {
        self.applied.max(self.unread).max(self.changes.last().copied().unwrap_or(0))
    }

    /// All outputs up to this number are durable.
    pub(super) fn persisted(&mut self, number: u64) {
        while self.under_way.front().is_some_and(|(output, _)| *output <= number) {
            if let Some((_, commit)) = self.under_way.pop_front() {
                self.durable = commit;
            }
        }
    }
}

impl Replica {
    /// Applies a change of the group's configuration. A leader that it takes the vote from leads no longer.
    ///
    /// # Errors
    /// [`ReplicaError`] for an entry that no leader can have written.
    pub fn apply_configuration(&mut self, entry: &LogEntry) -> Result<Configured, ReplicaError> {
        let fail = |text: String| ReplicaError { shard: self.shard, text };
        if entry.kind != 2 {
            return Err(fail(format!("entry {} is of kind {}, which no leader writes", entry.index, entry.kind)));
        }
        let mut change = ConfChangeV2::default();
        // It comes from our own log, behind its check, or from a member of the cluster: never straight from a client.
        change.merge_from_bytes(&entry.data).map_err(|error| fail(error.to_string()))?;
        let added = match &change.context {
            context if context.is_empty() => vec![],
            context => codec::decode(context).map_err(|error| fail(error.to_string()))?,
        };
        let conf = self.raft.apply_conf_change(&change).map_err(|error| fail(error.to_string()))?;
        self.settling.applied = entry.index;
        if self.leads() && !self.raft.raft.promotable() {
            self.step_down();
        }
        Ok(Configured { state: convert::snapshot_head(entry.index, entry.term, &conf), added })
    }

    /// Raft itself leaves a leader that was removed in place, and stops the process when it goes on.
    fn step_down(&mut self) {
        if let Some(heir) = self.heir() {
            self.raft.raft.send_timeout_now(heir.0);
        }
        let term = self.term();
        self.raft.raft.become_follower(term, raft::INVALID_ID);
    }

    /// The voter to which a leadership is best given: one that answers, with the most of the log.
    #[must_use]
    pub fn heir(&self) -> Option<ReplicaId> {
        self.heir_without(&[])
    }

    fn heir_without(&self, without: &[ReplicaId]) -> Option<ReplicaId> {
        let prs = self.raft.raft.prs();
        let voters = prs.conf().to_conf_state().voters;
        let ids = voters.into_iter().map(ReplicaId).filter(|id| *id != self.id && !without.contains(id));
        let standing = |id: &ReplicaId| prs.get(id.0).map_or((false, 0), |pr| (pr.recent_active, pr.matched));
        ids.max_by_key(standing)
    }

    /// Whether the leadership can be given to a replica.
    ///
    /// # Errors
    /// A refusal for a replica that is not there or does not vote.
    pub fn check_heir(&self, to: ReplicaId) -> Result<(), Failure> {
        let conf = self.raft.raft.prs().conf().to_conf_state();
        if conf.voters.contains(&to.0) {
            return Ok(());
        }
        let what = if conf.learners.contains(&to.0) { "is a learner and does not vote" } else { "has no vote" };
        Err(Failure::refusal(RefusalCode::Conflict, format!("replica {to} of shard {} {what}", self.shard)))
    }

    /// Takes a step from this set of replicas to the next. `homes` are the nodes of those that there are.
    ///
    /// # Errors
    /// [`Failure::Busy`] while another step is under way; refusals for steps that cannot be taken. Nothing has happened
    /// then, except that a leader that is to go offers its leadership to another.
    pub fn change(&mut self, step: &ChangeReplicas, homes: &[(ReplicaId, NodeId)]) -> Result<(), ChangeFailure> {
        let busy = |text: &str| Failure::Busy { retry_after_ms: RETRY_MS, text: text.into() };
        if self.is_handing_over() {
            return Err(busy("the shard's leadership is being handed over").into());
        }
        if !self.raft.raft.apply_to_current_term() || self.raft.raft.has_pending_conf() || !self.is_settled() {
            return Err(busy("another change of the shard's replicas is under way").into());
        }
        let conf = self.raft.raft.prs().conf().to_conf_state();
        if !conf.voters_outgoing.is_empty() {
            return Err(busy("another change of the shard's replicas is under way").into());
        }
        let head = convert::snapshot_head(0, 0, &conf);
        let Planned { changes, added } = plan(step, &head, homes)?;
        if changes.is_empty() {
            return Ok(());
        }
        if step.remove.contains(&self.id) && head.voters.contains(&self.id) {
            return Err(match self.heir_without(&step.remove) {
                Some(heir) => ChangeFailure::HandOver(heir),
                None => Failure::refusal(
                    RefusalCode::WouldLose,
                    format!("replica {} leads, and no other that stays votes: promote one first", self.id),
                )
                .into(),
            });
        }
        let mut change = ConfChangeV2::default();
        change.set_changes(changes.into());
        if !added.is_empty() {
            change.context = codec::encode(&added)
                .map_err(|error| Failure::refusal(RefusalCode::Malformed, error.to_string()))?
                .into();
        }
        // More than one change goes through a joint configuration, which Raft leaves by itself.
        self.raft.propose_conf_change(vec![], change).map_err(|_| busy("the shard's replicas do not keep up").into())
    }

    /// The group as its leader sees it; `None` if it does not lead, or what it sees does not hold for good yet.
    #[must_use]
    pub fn group(&mut self) -> Option<GroupStatus> {
        if !self.leads() || !self.raft.raft.apply_to_current_term() {
            return None;
        }
        let prs = self.raft.raft.prs();
        let conf = convert::snapshot_head(0, 0, &prs.conf().to_conf_state());
        let mut matched: Vec<_> = prs.iter().map(|(id, pr)| (ReplicaId(*id), pr.matched)).collect();
        matched.sort_unstable();
        if conf.voters_outgoing.is_empty() && !self.is_settled() {
            return None;
        }
        let sorted = |mut ids: Vec<ReplicaId>| {
            ids.sort_unstable();
            ids
        };
        Some(GroupStatus {
            voters: sorted(conf.voters),
            outgoing: sorted(conf.voters_outgoing),
            learners: sorted(conf.learners),
            matched,
        })
    }

    /// Whether a majority of the voters durably knows that the group's last change is committed. Only a leader can tell.
    pub(super) fn is_settled(&mut self) -> bool {
        let term = self.term();
        let change = (term, self.settling.applied);
        if self.settling.settled == Some(change) {
            return true; // none of those who know it can forget it
        }
        if self.settling.led.0 != term {
            // Changes of earlier terms lie before this, and followers tell us anew how far they know.
            self.settling.led = (term, self.raft.raft.raft_log.last_index());
        }
        let needed = self.settling.led.1.max(self.settling.applied);
        let prs = self.raft.raft.prs();
        let knows = |id: u64| match id {
            id if id == self.id.0 => self.settling.durable >= self.settling.applied,
            id => prs.get(id).is_some_and(|pr| pr.committed_index >= needed),
        };
        let conf = prs.conf().to_conf_state();
        let majority = |voters: &[u64]| voters.iter().filter(|id| knows(**id)).count() > voters.len() / 2;
        let settled = majority(&conf.voters) && (conf.voters_outgoing.is_empty() || majority(&conf.voters_outgoing));
        self.settling.settled = settled.then_some(change);
        settled
    }
}

/// Why a step was not taken.
#[derive(Debug)]
pub enum ChangeFailure {
    /// Tell whoever asked.
    Failure(Failure),
    /// The leader itself is to go: another must lead first.
    HandOver(ReplicaId),
}

impl From<Failure> for ChangeFailure {
    fn from(failure: Failure) -> Self {
        Self::Failure(failure)
    }
}

#[derive(Debug)]
struct Planned {
    changes: Vec<ConfChangeSingle>,
    added: Vec<(ReplicaId, NodeId)>,
}

/// What of a step is not so already.
fn plan(step: &ChangeReplicas, conf: &SnapshotHead, homes: &[(ReplicaId, NodeId)]) -> Result<Planned, Failure> {
    let conflict = |text: String| Err(Failure::refusal(RefusalCode::Conflict, text));
    let named = || step.learn.iter().map(|(id, _)| id).chain(&step.promote).chain(&step.remove);
    let mut seen = BTreeSet::new();
    if let Some(twice) = named().find(|id| id.0 == 0 || !seen.insert(**id)) {
        return conflict(format!("replica {twice} is named twice, or cannot be one"));
    }
    let single = |id: ReplicaId, kind| {
        let mut single = ConfChangeSingle { node_id: id.0, ..ConfChangeSingle::default() };
        single.set_change_type(kind);
        single
    };
    let (mut changes, mut added) = (vec![], vec![]);
    for (id, node) in &step.learn {
        let home = homes.iter().find(|(other, _)| other == id);
        let neighbour = homes.iter().find(|(other, on)| on == node && other != id);
        if convert::is_member(conf, *id) {
            if home.is_some_and(|(_, other)| other != node) {
                return conflict(format!("replica {id} is on another node than {node}"));
            }
        } else if let Some((other, _)) = neighbour
            && convert::is_member(conf, *other)
            && !step.remove.contains(other)
        {
            return conflict(format!("node {node} keeps replica {other} already"));
        } else {
            changes.push(single(*id, ConfChangeType::AddLearnerNode));
            added.push((*id, *node));
        }
    }
    for id in &step.promote {
        if conf.learners.contains(id) {
            changes.push(single(*id, ConfChangeType::AddNode));
        } else if !conf.voters.contains(id) {
            return conflict(format!("replica {id} is no learner: it must learn before it votes"));
        }
    }
    let gone: Vec<_> = step.remove.iter().filter(|id| convert::is_member(conf, **id)).collect();
    changes.extend(gone.iter().map(|id| single(**id, ConfChangeType::RemoveNode)));
    let stays = conf.voters.iter().any(|id| !gone.contains(&id));
    if !stays && !step.promote.iter().any(|id| conf.learners.contains(id)) {
        return Err(Failure::refusal(RefusalCode::WouldLose, "the shard would be left without a replica that votes"));
    }
    let voters: BTreeSet<_> = conf.voters.iter().copied().collect();
    if !changes.is_empty() && !step.from.is_empty() && voters != step.from.iter().copied().collect() {
        return conflict(format!("replicas {voters:?} vote, not {:?} from which the step goes out", step.from));
    }
    Ok(Planned { changes, added })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conf(voters: &[u64], learners: &[u64]) -> SnapshotHead {
        let ids = |ids: &[u64]| ids.iter().copied().map(ReplicaId).collect();
        SnapshotHead {
            index: 1,
            term: 1,
            voters: ids(voters),
            voters_outgoing: vec![],
            learners: ids(learners),
            learners_next: vec![],
            auto_leave: false,
        }
    }

    fn step(learn: &[(u64, u64)], promote: &[u64], remove: &[u64]) -> ChangeReplicas {
        let ids = |ids: &[u64]| ids.iter().copied().map(ReplicaId).collect();
        let learn = learn.iter().map(|(id, node)| (ReplicaId(*id), NodeId(*node))).collect();
        ChangeReplicas { from: vec![], learn, promote: ids(promote), remove: ids(remove) }
    }

    #[test]
    fn only_what_is_not_so_already_is_changed() {
        let homes: Vec<_> = (1..=4).map(|n| (ReplicaId(n), NodeId(n * 10))).collect();
        let now = conf(&[1, 2, 3], &[4]);
        let count = |step: &ChangeReplicas| plan(step, &now, &homes).map(|planned| planned.changes.len());
        assert_eq!(count(&step(&[(4, 40)], &[3], &[9])), Ok(0));
        assert_eq!(count(&step(&[], &[4], &[1])), Ok(2));
        assert_eq!(count(&step(&[(5, 50)], &[], &[])), Ok(1));
        assert_eq!(count(&step(&[(5, 10)], &[], &[1])), Ok(2), "its neighbour goes");
    }

    #[test]
    fn a_step_that_fits_nothing_is_refused() {
        let homes: Vec<_> = (1..=4).map(|n| (ReplicaId(n), NodeId(n * 10))).collect();
        let now = conf(&[1, 2, 3], &[4]);
        let code = |step: &ChangeReplicas| match plan(step, &now, &homes) {
            Err(Failure::Refusal { code, .. }) => Some(code),
            _ => None,
        };
        assert_eq!(code(&step(&[], &[9], &[])), Some(RefusalCode::Conflict), "it never learned");
        assert_eq!(code(&step(&[(4, 50)], &[], &[])), Some(RefusalCode::Conflict), "it is elsewhere");
        assert_eq!(code(&step(&[(5, 10)], &[], &[])), Some(RefusalCode::Conflict), "its node keeps another");
        assert_eq!(code(&step(&[], &[4], &[4])), Some(RefusalCode::Conflict), "promoted and removed");
        assert_eq!(code(&step(&[(0, 50)], &[], &[])), Some(RefusalCode::Conflict), "0 is nobody");
        let from = |voters: &[u64]| voters.iter().copied().map(ReplicaId).collect();
        let swap = ChangeReplicas { from: from(&[3, 2, 1]), ..step(&[], &[4], &[1]) };
        assert_eq!(code(&swap), None);
        let late = ChangeReplicas { from: from(&[1, 2, 4]), ..swap };
        assert_eq!(code(&late), Some(RefusalCode::Conflict), "others vote by now");
        let done = ChangeReplicas { from: from(&[1, 2, 4]), ..step(&[], &[3], &[9]) };
        assert_eq!(code(&done), None, "it is so already");
        assert_eq!(code(&step(&[], &[], &[1, 2, 3])), Some(RefusalCode::WouldLose));
        assert_eq!(code(&step(&[], &[4], &[1, 2, 3])), None);
    }

    #[test]
    fn a_commit_that_reaches_a_change_is_synced_and_others_are_not() {
        let entry = |index, kind| {
            let mut entry = Entry { index, term: 1, ..Entry::default() };
            entry.set_entry_type(kind);
            entry
        };
        let mut settling = Settling::new(0, 0);
        let written = [entry(1, EntryType::EntryNormal), entry(2, EntryType::EntryConfChangeV2)];
        assert!(!settling.written(1, true, &written, None));
        assert!(!settling.written(2, false, &[], Some(1)), "no change is committed");
        assert!(settling.written(3, false, &[], Some(2)));
        settling.persisted(2);
        assert_eq!(settling.durable, 0);
        settling.persisted(3);
        assert_eq!(settling.durable, 2);
        assert!(!settling.written(4, false, &[], Some(9)), "nothing is left");
        assert!(!settling.written(5, true, &[entry(10, EntryType::EntryConfChangeV2)], Some(9)));
        assert!(!settling.written(6, true, &[entry(10, EntryType::EntryNormal)], None), "it takes the other's place");
        assert!(!settling.written(7, false, &[], Some(10)));
        let mut restarted = Settling::new(3, 6);
        assert!(restarted.written(1, false, &[], Some(5)), "who knows what was in them");
        assert!(restarted.written(2, false, &[], Some(7)));
        assert!(!restarted.written(3, false, &[], Some(8)));
    }
}
