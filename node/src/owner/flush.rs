//! How an owner's rows get from memory to redb: a few shards at a time, and those first whose rows have waited longest.
//!
//! The rows of each shard so have the time of a whole turn of all shards to come together: the more there are, the more of them
//! share a page of redb. Meanwhile nearly all of the memory for rows is in use, by rows of all ages.

use super::{Owner, Shard};
use crate::flusher::{After, Job};
use crate::store::{Base, Flush, ReplicaMeta};
use shkv_proto::ShardId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The part of the bytes that rows in memory may take that is flushed at once, if no shard has more for itself.
const FLUSHED_OF_TABLE: usize = 16;

impl Owner {
    /// Begins a flush when it is time: before rows in memory leave less room than for what comes during one, or when some have
    /// waited for so long that the log grows too long.
    pub(super) fn flush_if_due(&mut self) {
        if self.flushing {
            return;
        }
        let age_max = self.shared.log_bytes_per_owner() / 16 * self.pace.part(self.shared.identity.id().0);
        let is_due = match self.longest_unflushed() {
            Some((number, since)) => {
                let is_full = self.active_bytes + self.bytes_at_once(number) >= self.shared.table_bytes_per_owner();
                is_full || self.applied_bytes - since >= age_max
            }
            None => false,
        };
        if is_due || !self.flush_wanted.is_empty() {
            self.flush();
        }
    }

    /// The shard whose rows have waited longest, and how many bytes of entries were applied before they came.
    pub(super) fn longest_unflushed(&mut self) -> Option<(u32, u64)> {
        while let Some((number, since)) = self.unflushed.front().copied() {
            if self.shards.get(&number).is_some_and(|shard| shard.unflushed_since == Some(since)) {
                return Some((number, since));
            }
            self.unflushed.pop_front(); // flushed out of turn, or not here any more
        }
        None
    }

    /// About as much is flushed at once if this shard is the first.
    fn bytes_at_once(&self, number: u32) -> usize {
        let first = self.shards.get(&number).map_or(0, |shard| shard.cell.view.read().active.bytes());
        first.max(self.shared.table_bytes_per_owner() / FLUSHED_OF_TABLE)
    }

    /// Seals the tables of some shards and hands them to the flusher: of those that are wanted, and then of those that have
    /// waited longest. Tells whether there were any.
    pub(super) fn flush(&mut self) -> bool {
        let whole = self.shared.table_bytes_per_owner();
        let mut tables = Vec::new();
        let mut bytes = 0;
        loop {
            let next = match self.flush_wanted.pop_first() {
                Some(wanted) => wanted,
                None if bytes >= whole / FLUSHED_OF_TABLE => break,
                None => match self.longest_unflushed() {
                    Some((number, _)) => number,
                    None => break,
                },
            };
            if let Some(flush) = self.shards.get_mut(&next).and_then(Shard::seal) {
                bytes += flush.table.bytes();
                tables.push(flush);
            }
        }
        if tables.is_empty() {
            return false;
        }
        self.flushing = true;
        let rows = tables.iter().map(|flush| flush.table.len()).sum();
        let rows_done = self.pace.begin(rows, bytes, self.active_bytes, whole);
        self.sealed_bytes = bytes;
        self.active_bytes = self.active_bytes.saturating_sub(bytes);
        // A follower that is being sent a snapshot needs what follows it next.
        let mut keep = BTreeMap::new();
        for ((shard, _), index) in &self.sending {
            let lowest = keep.entry(*shard).or_insert(*index);
            *lowest = (*index).min(*lowest);
        }
        self.shared.flusher.submit(Job::Flush { tables, rows_done, keep, owner: self.me });
        true
    }

    /// Tables are in redb.
    pub(super) fn flushed(&mut self, flushed: Vec<(ReplicaMeta, ShardId, Base)>) {
        let mut before = Vec::with_capacity(flushed.len());
        for (meta, id, base) in flushed {
            let Some(shard) = self.shards.get_mut(&id.0).filter(|shard| shard.replica.id() == meta.replica) else {
                continue;
            };
            {
                let mut view = shard.cell.view.write();
                before.push((view.sealed.take(), std::mem::replace(&mut view.base, base)));
            }
            shard.flushed = meta.state.index;
            shard.replica.flushed(meta.state.clone());
            shard.flushed_meta = meta;
            self.touch(id.0); // a follower may wait for a snapshot of it
        }
        self.shared.flusher.submit(Job::Forget(before));
        self.flushing = false;
        self.sealed_bytes = 0;
    }

    /// A flush is done: logs were let go, and shards of which it wrote nothing hold their rows as of now.
    pub(super) fn flushed_any(&mut self, after: After) {
        for (id, index) in after.released {
            if let Some(shard) = self.shards.get_mut(&id.0) {
                shard.replica.released(index);
            }
        }
        let mut before = Vec::with_capacity(after.held.len());
        for (id, index, hold) in after.held {
            // Rows as of the same index are the same rows, also those of another replica.
            if let Some(shard) = self.shards.get_mut(&id.0).filter(|shard| shard.flushed == index) {
                let mut view = shard.cell.view.write();
                let renewed = view.base.renewed(hold);
                before.push((None, std::mem::replace(&mut view.base, renewed)));
            }
        }
        self.shared.flusher.submit(Job::Forget(before));
    }
}

impl Shard {
    /// Seals the table in memory for a flush. `None` if nothing was applied since the last one, or a snapshot is about to take
    /// the place of it.
    fn seal(&mut self) -> Option<Flush> {
        self.unflushed_since.take()?;
        let mut view = self.cell.view.write();
        let successor = view.active.successor();
        let table = Arc::new(std::mem::replace(&mut view.active, successor));
        view.sealed = Some(table.clone());
        let ledger = view.ledger.clone();
        Some(Flush { shard: self.cell.shard, meta: self.meta.clone(), table, ledger })
    }
}
