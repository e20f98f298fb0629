//! What balancers ask of an owner: steps from one set of replicas to the next, leaderships given away, replicas dropped,
//! and how things stand.

use super::{Answer, Owner, Shard};
use crate::replica::change::ChangeFailure;
use shkv_proto::message::{ChangeReplicas, Failure, ReplicaStatus};
use shkv_proto::{ReplicaId, ShardId};

/// How soon a step may be tried again that waits for another replica to lead, or for replicas to be heard.
const HANDOVER_RETRY_MS: u32 = 100;
/// How long a step waits for the replicas that would vote to be heard, in nanoseconds.
const HEARD_TIME_MAX: u64 = 500_000_000;

/// A step that waits until most of those that would vote have been heard since it was asked for. It is committed by those
/// that vote now: if the others are dead, the group could never take another one.
pub struct Asked {
    step: ChangeReplicas,
    voters: Vec<ReplicaId>,
    since: u64,
    done: Answer,
}

impl Asked {
    /// It is not taken.
    pub fn failed(self, failure: &Failure) {
        let _ = self.done.send(Err(failure.clone())); // whoever asked may be gone
    }
}

impl Owner {
    fn leading(&mut self, shard: ShardId) -> Result<&mut Shard, Failure> {
        match self.shards.get_mut(&shard.0) {
            Some(shard) if shard.replica.leads() => Ok(shard),
            Some(shard) => Err(shard.not_leader()),
            None => Err(Failure::WrongShard { epoch: self.shared.epoch() }),
        }
    }

    pub(super) fn transfer(&mut self, shard: ShardId, to: ReplicaId) -> Result<(), Failure> {
        let shard = self.leading(shard)?;
        shard.replica.check_heir(to)?;
        if to != shard.replica.id() {
            shard.transfer_to(to);
        }
        Ok(())
    }

    pub(super) fn change(&mut self, shard: ShardId, step: ChangeReplicas, done: Answer) {
        let now = self.shared.clock.now();
        let answer = match self.leading(shard) {
            Ok(shard) => return shard.ask(step, done, now),
            Err(failure) => Err(failure),
        };
        let _ = done.send(answer); // whoever asked may be gone
    }

    /// Forgets a replica. Nothing of it is handed to the log or to the flusher any more.
    pub(super) fn drop_replica(&mut self, id: ShardId, replica: ReplicaId) {
        if self.shards.get(&id.0).is_none_or(|shard| shard.replica.id() != replica) {
            return;
        }
        let Some(mut shard) = self.shards.remove(&id.0) else { return };
        shard.give_up(&Failure::WrongShard { epoch: self.shared.epoch() });
        // What of it is sealed stays counted until the flush under way comes back.
        self.active_bytes = self.active_bytes.saturating_sub(shard.cell.view.read().active.bytes());
        self.dirty.retain(|number| *number != id.0);
        self.staged.remove(&id.0);
        self.installs.remove(&id.0);
        self.sending.retain(|(number, _), _| *number != id.0);
        tracing::info!(shard = id.0, replica = replica.0, "a replica is deleted");
    }
}

impl Shard {
    fn ask(&mut self, step: ChangeReplicas, done: Answer, now: u64) {
        let before = &self.meta.state.voters;
        let mut voters = before.clone();
        voters.retain(|id| !step.remove.contains(id));
        voters.extend(step.promote.iter().filter(|id| !before.contains(id)));
        // A leader that goes itself hands over first, and its heir is asked.
        let answer = if voters == *before || !voters.contains(&self.replica.id()) {
            self.change(&step)
        } else if self.asked.is_some() {
            let text = "another change of the shard's replicas is under way".into();
            Err(Failure::Busy { retry_after_ms: HANDOVER_RETRY_MS, text })
        } else {
            self.replica.ping();
            self.asked = Some(Asked { step, voters, since: now, done });
            return;
        };
        let _ = done.send(answer); // whoever asked may be gone
    }

    /// Takes the step that waits if most of those that would vote have been heard, and gives it up after a while.
    pub(super) fn go_on_with_change(&mut self, now: u64) {
        let Some(asked) = self.asked.take() else { return };
        let (term, me) = (self.replica.term(), self.replica.id());
        let answer = if !self.replica.leads() {
            Err(self.not_leader())
        } else if self.lease.is_heard_since(asked.since, term, me, &asked.voters, now) {
            self.change(&asked.step)
        } else if now - asked.since > HEARD_TIME_MAX {
            let text = "too few of the replicas that would vote can be heard".into();
            Err(Failure::Busy { retry_after_ms: HANDOVER_RETRY_MS, text })
        } else {
            self.asked = Some(asked);
            return;
        };
        let _ = asked.done.send(answer); // whoever asked may be gone
    }

    fn change(&mut self, step: &ChangeReplicas) -> Result<(), Failure> {
        self.replica.change(step, &self.meta.homes).map_err(|failure| match failure {
            ChangeFailure::Failure(failure) => failure,
            ChangeFailure::HandOver(heir) => {
                self.transfer_to(heir);
                let text = format!("the leader is to go: it hands the leadership over to replica {heir} first");
                Failure::Busy { retry_after_ms: HANDOVER_RETRY_MS, text }
            }
        })
    }
}

pub(super) fn status_of(shard: &mut Shard) -> ReplicaStatus {
    let (log_first, log_last) = shard.replica.log_bounds();
    ReplicaStatus {
        shard: shard.cell.shard,
        replica: shard.replica.id(),
        leads: shard.replica.leads(),
        leader: shard.replica.leader(),
        term: shard.replica.term(),
        committed: shard.replica.committed(),
        applied: shard.meta.state.index,
        flushed: shard.flushed,
        log_first,
        log_last,
        revision: shard.meta.revision,
        snapshots_installed: shard.snapshots_installed,
        group: shard.replica.group(),
    }
}
