//! Who may work on a shard's replica as a whole: one at a time makes it, deletes it, or brings a snapshot in.
//!
//! Deleting takes the right away from a snapshot that is coming in: its sender may be gone without having said so.

use crate::shared::Shared;
use shkv_proto::ShardId;
use std::sync::Arc;

/// What a shard is claimed for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Purpose {
    /// To make a replica.
    Make,
    /// To delete it.
    Delete,
    /// To bring a snapshot in.
    Snapshot,
}

/// The right to work on a shard's replica; given back when it is dropped.
pub struct Claim {
    shared: Arc<Shared>,
    shard: ShardId,
    number: u64,
}

impl Claim {
    /// Takes the right; `None` while somebody has it from whom it cannot be taken.
    pub fn begin(shared: &Arc<Shared>, shard: ShardId, purpose: Purpose) -> Option<Self> {
        let mut claims = shared.claims.lock();
        let takes_over = |holder: Purpose| purpose == Purpose::Delete && holder == Purpose::Snapshot;
        if claims.held.get(&shard.0).is_some_and(|(_, holder)| !takes_over(*holder)) {
            return None;
        }
        claims.last += 1;
        let number = claims.last;
        claims.held.insert(shard.0, (number, purpose));
        Some(Self { shared: shared.clone(), shard, number })
    }

    /// Its number; none is given twice.
    #[must_use]
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Whether nobody has taken it over.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.shared.claims.lock().held.get(&self.shard.0).is_some_and(|(number, _)| *number == self.number)
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claims = self.shared.claims.lock();
        if claims.held.get(&self.shard.0).is_some_and(|(number, _)| *number == self.number) {
            claims.held.remove(&self.shard.0);
        }
    }
}
