//! How an owner's rows get from memory to redb: all tables are sealed at once, and handed to the flusher part by part.

use super::{Owner, Shard};
use crate::flusher::Job;
use crate::memtable::Table;
use crate::store::{Base, Flush, ReplicaMeta};
use shkv_proto::ShardId;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The part of the bytes that rows in memory may take that is flushed before others have a turn, and room is made for new ones.
const FLUSHED_OF_TABLE: usize = 16;
impl Owner {
    /// Begins a flush when it is time.
    pub(super) fn flush_if_due(&mut self) {
        let part = self.pace.part(self.shared.identity.id().0);
        let budget = self.shared.table_bytes_per_owner() / 2 / 16 * part as usize;
        let log_budget = self.shared.tuning.log_retain_bytes / 2 / 16 * part;
        if !self.flushing && (self.flush_wanted || self.active_bytes >= budget || self.applied_bytes >= log_budget) {
            self.flush_wanted = false;
            self.flush();
        }
    }

    /// Seals all tables and hands the first of them to the flusher. Tells whether there was anything.
    pub(super) fn flush(&mut self) -> bool {
        self.to_flush = self.shards.values_mut().filter_map(Shard::seal).collect();
        if self.to_flush.is_empty() {
            return false;
        }
        self.flushing = true;
        self.applied_bytes = 0;
        self.sealed_bytes = self.to_flush.iter().map(|flush| flush.table.bytes()).sum();
        self.active_bytes = self.active_bytes.saturating_sub(self.sealed_bytes);
        self.pace.begin(self.sealed_bytes);
        self.flush_more();
        true
    }

    /// Hands the next sealed tables to the flusher. Tells whether there were any left.
    fn flush_more(&mut self) -> bool {
        let bytes_max = self.shared.table_bytes_per_owner() / FLUSHED_OF_TABLE;
        let mut tables = Vec::new();
        let mut bytes = 0;
        while bytes < bytes_max
            && let Some(flush) = self.to_flush.pop_front()
        {
            // Not what a snapshot has taken the place of meanwhile, or a replica that was deleted.
            let is_wanted = self.shards.get(&flush.shard.0).is_some_and(|shard| shard.has_sealed(&flush.table));
            #[cfg(feature = "sim")]
            let is_wanted = is_wanted || crate::inspect::planted(crate::inspect::Bug::FlushOverSnapshot);
            if is_wanted {
                bytes += flush.table.bytes();
                tables.push(flush);
            }
        }
        if tables.is_empty() {
            return false;
        }
        self.pace.write(self.shared.clock.now(), bytes);
        // A follower that is being sent a snapshot needs what follows it next.
        let mut keep = BTreeMap::new();
        for ((shard, _), index) in &self.sending {
            let lowest = keep.entry(*shard).or_insert(*index);
            *lowest = (*index).min(*lowest);
        }
        self.shared.flusher.submit(Job::Flush { tables, keep, owner: self.me });
        true
    }

    /// Tables are in redb.
    pub(super) fn flushed(&mut self, flushed: Vec<(ReplicaMeta, ShardId, Base)>, released: &BTreeMap<u32, u64>) {
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
        }
        self.shared.flusher.submit(Job::Forget(before));
        self.released(released);
        self.pace.written(self.shared.clock.now());
        if self.flush_more() {
            return;
        }
        self.flushing = false;
        self.sealed_bytes = 0;
        let waiting: Vec<u32> = self.shards.keys().copied().collect();
        waiting.into_iter().for_each(|number| self.touch(number)); // writes may have been held back
    }

    /// Shards' logs were let go up to these indexes.
    pub(super) fn released(&mut self, released: &BTreeMap<u32, u64>) {
        for (number, index) in released {
            if let Some(shard) = self.shards.get_mut(number) {
                shard.replica.released(*index);
            }
        }
    }
}

impl Shard {
    /// Whether this table is still what was sealed here, and may be flushed.
    fn has_sealed(&self, table: &Arc<Table>) -> bool {
        !self.installing && self.cell.view.read().sealed.as_ref().is_some_and(|sealed| Arc::ptr_eq(sealed, table))
    }

    /// Seals the table in memory for a flush. `None` if nothing was applied since the last one, or one is under way.
    fn seal(&mut self) -> Option<Flush> {
        let mut view = self.cell.view.write();
        if view.sealed.is_some() || view.applied.index <= self.flushed || self.installing {
            return None;
        }
        let successor = view.active.successor();
        let table = Arc::new(std::mem::replace(&mut view.active, successor));
        view.sealed = Some(table.clone());
        let ledger = view.ledger.clone();
        Some(Flush { shard: self.cell.shard, meta: self.meta.clone(), table, ledger })
    }
}
