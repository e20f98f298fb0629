//! What balancers ask of an owner: steps from one set of replicas to the next, leaderships given away, replicas dropped,
//! and how things stand.

use super::{Owner, Shard};
use crate::replica::change::ChangeFailure;
use shkv_proto::message::{ChangeReplicas, Failure, ReplicaStatus};
use shkv_proto::{ReplicaId, ShardId};

/// How soon a step may be tried again that waits for another replica to lead, or for replicas to be heard.
const HANDOVER_RETRY_MS: u32 = 100;

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

    pub(super) fn change(&mut self, shard: ShardId, step: &ChangeReplicas) -> Result<(), Failure> {
        let now = self.shared.clock.now();
        let shard = self.leading(shard)?;
        let me = shard.replica.id();
        let mut voters = shard.meta.state.voters.clone();
        voters.retain(|id| !step.remove.contains(id));
        voters.extend(step.promote.iter().filter(|id| !shard.meta.state.voters.contains(id)));
        let is_heard = || shard.lease.runs_with(shard.replica.term(), me, voters.clone(), now);
        // The balancer takes a node for alive for a while after its end. One that goes itself hands over first.
        if voters != shard.meta.state.voters && voters.contains(&me) && !is_heard() {
            let text = "too few of the replicas that would vote have been heard just now".into();
            return Err(Failure::Busy { retry_after_ms: HANDOVER_RETRY_MS, text });
        }
        match shard.replica.change(step, &shard.meta.homes) {
            Ok(()) => Ok(()),
            Err(ChangeFailure::Failure(failure)) => Err(failure),
            Err(ChangeFailure::HandOver(heir)) => {
                shard.transfer_to(heir);
                let text = format!("the leader is to go: it hands the leadership over to replica {heir} first");
                Err(Failure::Busy { retry_after_ms: HANDOVER_RETRY_MS, text })
            }
        }
    }

    /// Forgets a replica. Nothing of it is handed to the log or to the flusher any more.
    pub(super) fn drop_replica(&mut self, id: ShardId, replica: ReplicaId) {
        if self.shards.get(&id.0).is_none_or(|shard| shard.replica.id() != replica) {
            return;
        }
        let Some(mut shard) = self.shards.remove(&id.0) else { return };
        shard.give_up(&Failure::WrongShard { epoch: self.shared.epoch() });
        // What of it is sealed stays counted until the flush under way comes back.
        self.active_bytes = self.active_bytes.saturating_sub(shard.cell.view.read().active.bytes);
        self.dirty.retain(|number| *number != id.0);
        self.staged.remove(&id.0);
        self.installs.remove(&id.0);
        self.sending.retain(|(number, _), _| *number != id.0);
        tracing::info!(shard = id.0, replica = replica.0, "a replica is deleted");
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
