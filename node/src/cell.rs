//! What sessions see of a replica: its rows, whether it may answer reads by itself, and who leads. The owner writes it,
//! sessions read it; so a read costs no change of task.

use crate::machine::check_key;
use crate::store::StoreError;
use crate::table::{Found, FoundInto, View};
use parking_lot::RwLock;
use shkv_proto::map::Part;
use shkv_proto::message::{Failure, RefusalCode};
use shkv_proto::{Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::Notify;

/// What a look at a key found.
pub struct Look<T = Found> {
    /// The row.
    pub found: T,
    /// The shard's revision.
    pub revision: u64,
    /// Whether a transaction holds the key: it may be decided already that the row is another.
    pub is_locked: bool,
}

/// A replica as sessions see it.
pub struct Cell {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// The shard's keyspace.
    pub keyspace: KeyspaceId,
    /// The shard's part of it.
    pub part: Part,
    /// The rows.
    pub view: RwLock<View>,
    /// Until when, in nanoseconds of the node's clock, the replica may answer linearizable reads; 0 when it may not.
    lease_until: AtomicU64,
    /// The node that leads as far as is known; 0 is nobody.
    leader: AtomicU64,
    /// Whether it is known to be of its group.
    of_group: AtomicBool,
    /// The term in which the replica leads and has applied an entry; 0 when it does not.
    term: AtomicU64,
    /// Told when locks or decisions are let go.
    pub unlocked: Notify,
    /// Whether somebody waits for a lock.
    lock_wanted: AtomicBool,
}

impl Cell {
    /// A cell over rows.
    #[must_use]
    pub fn new(shard: ShardId, replica: ReplicaId, keyspace: KeyspaceId, part: Part, view: View) -> Self {
        let (lease_until, leader, of_group) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
        Self {
            shard,
            replica,
            keyspace,
            part,
            view: RwLock::new(view),
            lease_until,
            leader,
            of_group,
            term: AtomicU64::new(0),
            unlocked: Notify::new(),
            lock_wanted: AtomicBool::new(false),
        }
    }

    /// Says whether the replica is known to be of its group.
    pub fn set_of_group(&self, is: bool) {
        self.of_group.store(is, Ordering::Relaxed);
    }

    /// Whether reads that need not be linearizable may be answered here. A replica that has heard no leader since its
    /// process began may have been removed from its group while it was away, and its rows may never change again.
    ///
    /// # Errors
    /// [`Failure::NotLeader`] without a hint.
    pub fn answers_stale_reads(&self) -> Result<(), Failure> {
        if self.of_group.load(Ordering::Relaxed) { Ok(()) } else { Err(Failure::NotLeader { hint: None }) }
    }

    /// Says in which term the replica leads, having applied an entry of it; 0 is none.
    pub fn set_term(&self, term: u64) {
        self.term.store(term, Ordering::Release);
    }

    /// The term in which the replica leads, if it has applied an entry of it: everything that was decided in earlier terms
    /// is then in the view, and nothing more will be.
    #[must_use]
    pub fn term(&self) -> Option<u64> {
        Some(self.term.load(Ordering::Acquire)).filter(|term| *term != 0)
    }

    /// Somebody waits for a lock: it is looked at sooner.
    pub fn want_lock(&self) {
        self.lock_wanted.store(true, Ordering::Relaxed);
    }

    /// Whether somebody waits for a lock. Asking forgets it.
    pub fn take_lock_wanted(&self) -> bool {
        self.lock_wanted.swap(false, Ordering::Relaxed)
    }

    /// Says until when the lease runs.
    pub fn set_lease(&self, until: u64) {
        self.lease_until.store(until, Ordering::Release);
    }

    /// Whether the lease still runs. For a read it is asked *after* the rows were looked at: if it runs then, no other
    /// replica can have acknowledged a write before that, however long this process was stopped in between.
    #[must_use]
    pub fn lease_runs(&self, now: u64) -> bool {
        let until = self.lease_until.load(Ordering::Acquire);
        #[cfg(feature = "sim")]
        if crate::inspect::planted(crate::inspect::Bug::LeaseWithoutClock) {
            return until > 0;
        }
        now < until
    }

    /// Whether rows are as fresh as a linearizable read wants them that were looked at when [`Cell::term`] had told `term`. That a lease
    /// runs now does not say it alone: while they were looked at, the replica may have become the leader, and may have
    /// lacked then what an earlier one had acknowledged.
    #[must_use]
    pub fn is_fresh(&self, term: Option<u64>, now: u64) -> bool {
        let led = term.is_some() && self.term() == term;
        #[cfg(feature = "sim")]
        let led = led || crate::inspect::planted(crate::inspect::Bug::LeaseBehindLook);
        led && self.lease_runs(now)
    }

    /// Says who leads.
    pub fn set_leader(&self, node: Option<NodeId>) {
        self.leader.store(node.map_or(0, |node| node.0), Ordering::Relaxed);
    }

    /// Who leads as far as is known.
    #[must_use]
    pub fn leader(&self) -> Option<NodeId> {
        Some(NodeId(self.leader.load(Ordering::Relaxed))).filter(|node| node.0 != 0)
    }

    /// Whether a key is of this shard.
    ///
    /// # Errors
    /// A refusal for a key that none can have; [`Failure::WrongShard`].
    pub fn holds(&self, keyspace: KeyspaceId, key: &[u8], epoch: Epoch) -> Result<(), Failure> {
        check_key(key)?;
        if keyspace == self.keyspace && self.part.holds(key) { Ok(()) } else { Err(Failure::WrongShard { epoch }) }
    }

    /// The row of a key, and what it was looked up in.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, key: &[u8]) -> Result<Look, StoreError> {
        let view = self.view.read();
        let is_locked = view.ledger.locks.holder(key).is_some();
        Ok(Look { found: view.get(key)?, revision: view.revision, is_locked })
    }
}

impl Cell {
    /// Whether a page can be begun at once: few rows in memory are out of order.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        let view = self.view.read();
        view.active.is_in_order() && view.sealed.as_ref().is_none_or(|table| table.is_in_order())
    }

    /// Puts the rows in memory in order, some at a time: whoever writes waits for none but those.
    pub fn put_in_order(&self) {
        let sealed = self.view.read().sealed.clone();
        while sealed.as_ref().is_some_and(|table| table.sort_more()) {}
        while self.view.read().active.sort_more() {}
    }

    /// Like [`Cell::get`], but a small value is appended to `small`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get_into(&self, key: &[u8], small: &mut Vec<u8>) -> Result<Look<FoundInto>, StoreError> {
        let view = self.view.read();
        let is_locked = view.ledger.locks.holder(key).is_some();
        Ok(Look { found: view.get_into(key, small)?, revision: view.revision, is_locked })
    }
}

/// The answer when the disk cannot be read.
#[must_use]
pub fn read_failed(error: &StoreError) -> Failure {
    tracing::error!("{error}");
    Failure::Busy { retry_after_ms: 100, text: error.to_string() }
}

/// The answer to a put while the disk is full.
#[must_use]
pub fn disk_full() -> Failure {
    Failure::refusal(RefusalCode::DiskFull, "the node's disk is full: reads and deletes work; free space or add a node")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Mark;
    use crate::machine::Ledger;
    use crate::memtable::Table;
    use crate::store::Base;

    #[test]
    fn rows_that_were_looked_at_before_the_replica_led_are_not_fresh() {
        let (base, ledger, applied) = (Base::empty(), Ledger::default(), Mark::default());
        let view = View { active: Table::default(), sealed: None, base, applied, revision: 0, ledger };
        let cell = Cell::new(ShardId(1), ReplicaId(1), KeyspaceId(1), Part::everything(), view);
        let before = cell.term();
        cell.set_lease(100);
        cell.set_term(2);
        assert!(!cell.is_fresh(before, 50), "it became the leader behind the look");
        let now = cell.term();
        assert!(cell.is_fresh(now, 50) && !cell.is_fresh(now, 100), "until the lease ends");
        cell.set_term(4);
        assert!(!cell.is_fresh(now, 50), "others may have led in between");
    }
}
