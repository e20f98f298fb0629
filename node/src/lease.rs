//! A leader's lease: until when it may answer reads without asking its followers. Pure.

use crate::replica::LEASE;
use shkv_proto::ReplicaId;
use shkv_proto::message::SnapshotHead;
use smallvec::SmallVec;
use std::collections::BTreeMap;

/// What a leader knows of its followers' promises in one term.
#[derive(Debug, Default)]
pub struct Lease {
    term: u64,
    stamps: BTreeMap<ReplicaId, u64>,
}

impl Lease {
    /// A follower has taken in what was sent at `stamp`.
    pub fn acknowledged(&mut self, term: u64, from: ReplicaId, stamp: u64) {
        if term != self.term {
            self.term = term;
            self.stamps.clear();
        }
        let newest = self.stamps.entry(from).or_default();
        *newest = stamp.max(*newest);
    }

    /// Until when the lease of `term` runs: [`LEASE`] from the newest time that a majority of every half of the
    /// configuration has heard from. The leader hears itself at once. 0 if there is none.
    #[must_use]
    pub fn until(&self, term: u64, me: ReplicaId, configuration: &SnapshotHead, now: u64) -> u64 {
        let majority = |voters: &[ReplicaId]| self.majority(term, me, voters, now);
        let mut stamp = majority(&configuration.voters);
        if !configuration.voters_outgoing.is_empty() {
            stamp = stamp.min(majority(&configuration.voters_outgoing));
        }
        if stamp == 0 { 0 } else { stamp + LEASE.as_nanos() as u64 }
    }

    /// Whether a majority of these replicas has answered what was sent at `since` or later.
    #[must_use]
    pub fn is_heard_since(&self, since: u64, term: u64, me: ReplicaId, voters: &[ReplicaId], now: u64) -> bool {
        let heard = self.majority(term, me, voters, now);
        heard != 0 && heard >= since
    }

    /// The newest time that a majority of these replicas has heard from; 0 if there is none.
    fn majority(&self, term: u64, me: ReplicaId, voters: &[ReplicaId], now: u64) -> u64 {
        let heard = |id: &ReplicaId| match *id {
            id if id == me => now,
            id if self.term == term => self.stamps.get(&id).copied().unwrap_or(0),
            _ => 0,
        };
        let mut stamps: SmallVec<[u64; 8]> = voters.iter().map(heard).collect();
        stamps.sort_unstable_by(|a, b| b.cmp(a));
        stamps.get(voters.len() / 2).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn configuration(voters: &[u64], outgoing: &[u64]) -> SnapshotHead {
        let ids = |ids: &[u64]| ids.iter().copied().map(ReplicaId).collect();
        SnapshotHead {
            index: 1,
            term: 1,
            voters: ids(voters),
            voters_outgoing: ids(outgoing),
            learners: vec![],
            learners_next: vec![],
            auto_leave: false,
        }
    }

    #[test]
    fn the_lease_counts_from_what_a_majority_has_heard() {
        let length = LEASE.as_nanos() as u64;
        let mut lease = Lease::default();
        let five = configuration(&[1, 2, 3, 4, 5], &[]);
        let until = |lease: &Lease, conf: &SnapshotHead| lease.until(7, ReplicaId(1), conf, 1_000);
        assert_eq!(until(&lease, &five), 0);
        lease.acknowledged(7, ReplicaId(2), 500);
        assert_eq!(until(&lease, &five), 0, "two of five are no majority");
        lease.acknowledged(7, ReplicaId(3), 400);
        assert_eq!(until(&lease, &five), 400 + length);
        lease.acknowledged(7, ReplicaId(3), 300);
        assert_eq!(until(&lease, &five), 400 + length, "an old answer takes nothing back");
        lease.acknowledged(7, ReplicaId(9), 900);
        assert_eq!(until(&lease, &five), 400 + length, "one who has no vote does not count");
        let joint = configuration(&[1, 2, 3, 4, 5], &[1, 4, 5]);
        assert_eq!(until(&lease, &joint), 0, "both halves must have heard");
    }

    #[test]
    fn a_joint_configuration_needs_both_halves() {
        let length = LEASE.as_nanos() as u64;
        let joint = configuration(&[1, 4, 5], &[1, 2, 3]);
        let mut lease = Lease::default();
        let until = |lease: &Lease, me: u64| lease.until(7, ReplicaId(me), &joint, 1_000);
        lease.acknowledged(7, ReplicaId(4), 500);
        assert_eq!(until(&lease, 1), 0, "the outgoing half has heard nothing");
        lease.acknowledged(7, ReplicaId(2), 300);
        assert_eq!(until(&lease, 1), 300 + length, "the half that heard less decides");
        lease.acknowledged(7, ReplicaId(3), 900);
        assert_eq!(until(&lease, 1), 500 + length);
        assert_eq!(until(&lease, 2), 0, "a leader that goes counts in the outgoing half alone, and 5 has not heard");
    }

    #[test]
    fn those_who_answered_what_was_sent_before_are_not_heard_since() {
        let mut lease = Lease::default();
        lease.acknowledged(7, ReplicaId(2), 500);
        lease.acknowledged(7, ReplicaId(3), 600);
        let is_heard = |since, term, voters: &[u64]| {
            let voters: Vec<ReplicaId> = voters.iter().copied().map(ReplicaId).collect();
            lease.is_heard_since(since, term, ReplicaId(1), &voters, 700)
        };
        assert!(is_heard(600, 7, &[1, 2, 3]), "two of three are heard");
        assert!(is_heard(600, 7, &[1, 3]));
        assert!(!is_heard(600, 7, &[1, 2]), "what 2 has answered was sent before");
        assert!(!is_heard(600, 7, &[1, 2, 4]), "and 4 was never heard");
        assert!(!is_heard(600, 8, &[1, 3]), "in this term nobody was");
        assert!(is_heard(600, 8, &[1]));
    }

    #[test]
    fn a_new_term_begins_without_a_lease() {
        let mut lease = Lease::default();
        let three = configuration(&[1, 2, 3], &[]);
        lease.acknowledged(7, ReplicaId(2), 500);
        assert_eq!(lease.until(8, ReplicaId(1), &three, 1_000), 0);
        lease.acknowledged(8, ReplicaId(3), 600);
        assert_eq!(lease.until(8, ReplicaId(1), &three, 1_000), 600 + LEASE.as_nanos() as u64);
        assert_eq!(lease.until(7, ReplicaId(1), &three, 1_000), 0);
    }

    #[test]
    fn a_group_of_one_always_has_its_lease() {
        let alone = configuration(&[1], &[]);
        assert_eq!(Lease::default().until(3, ReplicaId(1), &alone, 5), 5 + LEASE.as_nanos() as u64);
    }
}
