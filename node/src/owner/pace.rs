//! How fast rows may come into memory while a flush makes room for others. Pure.
//!
//! Writers that are faster than redb are slowed down all along, to its pace. Without that they would fill what room there is, and then
//! all of them would stop until the flush is done, which can take seconds.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The flush that is under way.
#[derive(Debug, Default)]
pub struct Pace {
    flushes: u64,
    /// Rows that it writes, and that it has written.
    rows: usize,
    rows_done: Arc<AtomicUsize>,
    /// Bytes of the other rows that were in memory when it began, and of those for which there was room.
    others: usize,
    room: usize,
}

impl Pace {
    /// A flush of so many rows begins, which have `bytes` of the `memory` that all rows have, where they may have `whole`. Returns where
    /// the rows are counted that it has written.
    pub fn begin(&mut self, rows: usize, bytes: usize, memory: usize, whole: usize) -> Arc<AtomicUsize> {
        self.flushes += 1;
        self.rows = rows;
        self.rows_done = Arc::default();
        self.others = memory.saturating_sub(bytes);
        self.room = whole.saturating_sub(memory);
        self.rows_done.clone()
    }

    /// How much of what may come before the next flush does come before it, in sixteenths: at least nine. Replicas of a group get
    /// the same rows, and if their nodes flushed at the same moments, a majority would be slow then.
    #[must_use]
    pub fn part(&self, node: u64) -> u64 {
        let mixed = (node ^ self.flushes.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        9 + (mixed >> 61)
    }

    /// How many bytes of rows there may be in memory beside those that are being flushed: a quarter of the room that is left
    /// may be filled at once, and the rest as the flush goes on.
    #[must_use]
    pub fn bytes_max(&self) -> usize {
        let done = self.rows_done.load(Ordering::Relaxed).min(self.rows);
        let made = (self.room / 4 * 3) as u128 * done as u128 / self.rows.max(1) as u128;
        self.others + self.room / 4 + made as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn room_is_made_as_fast_as_rows_are_written() {
        let mut pace = Pace::default();
        let done = pace.begin(1_000, 16 * MIB, 48 * MIB, 64 * MIB);
        assert_eq!(pace.bytes_max(), 36 * MIB, "what there is, and a quarter of the room");
        done.fetch_add(500, Ordering::Relaxed);
        assert_eq!(pace.bytes_max(), 42 * MIB, "half of the rest after half of the rows");
        done.fetch_add(500, Ordering::Relaxed);
        assert_eq!(pace.bytes_max(), 48 * MIB);
        done.fetch_add(500, Ordering::Relaxed);
        assert_eq!(pace.bytes_max(), 48 * MIB, "never more than there is");
        pace.begin(0, 8 * MIB, 80 * MIB, 64 * MIB);
        assert_eq!(pace.bytes_max(), 72 * MIB, "there is no room: nothing comes to the others");
    }

    #[test]
    fn nodes_that_get_the_same_rows_flush_at_moments_of_their_own() {
        let mut pace = Pace::default();
        let mut seen = [0; 17];
        for _ in 0..800 {
            pace.begin(1, MIB, MIB, MIB);
            seen[pace.part(7) as usize] += 1;
        }
        assert!(seen[..9].iter().all(|count| *count == 0) && seen[9..].iter().all(|count| *count > 50), "{seen:?}");
        assert!((0..20).any(|node| pace.part(node) != pace.part(node + 1)));
    }
}
