//! How fast rows may come into memory while a flush makes room for others. Pure.
//!
//! Writers that are faster than redb are slowed down all along, about to the pace of the last flush. Without that they would fill
//! what room there is, and then all of them would stop until the flush is done.

/// KiB of rows of the smallest flush that tells how long others take.
const KIB_MIN: u64 = 256;
/// Nanoseconds that a KiB of rows is taken to take before the first flush: that of a slow disk.
const NS_PER_KIB: u64 = 50_000;

/// What is known of flushes. Times are in nanoseconds of the node's clock.
#[derive(Debug)]
pub struct Pace {
    ns_per_kib: u64,
    flushes: u64,
    /// Bytes of rows that the flush under way writes.
    writing: usize,
    /// When it began.
    began: u64,
    /// Bytes of the other rows that were in memory then, and of those for which there was room.
    others: usize,
    room: usize,
}

impl Default for Pace {
    fn default() -> Self {
        Self { ns_per_kib: NS_PER_KIB, flushes: 0, writing: 0, began: 0, others: 0, room: 0 }
    }
}

impl Pace {
    /// A flush of so many bytes of rows begins, of `memory` that there are in memory, where there may be `whole`.
    pub fn begin(&mut self, now: u64, bytes: usize, memory: usize, whole: usize) {
        self.writing = bytes;
        self.began = now;
        self.others = memory.saturating_sub(bytes);
        self.room = whole.saturating_sub(memory);
        self.flushes += 1;
    }

    /// How much of what may come before the next flush does come before it, in sixteenths: at least nine. Replicas of a group get
    /// the same rows, and if their nodes flushed at the same moments, a majority would be slow then.
    #[must_use]
    pub fn part(&self, node: u64) -> u64 {
        let mixed = (node ^ self.flushes.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        9 + (mixed >> 61)
    }

    /// It is done.
    pub fn written(&mut self, now: u64) {
        let kib = self.writing as u64 / 1024;
        if kib >= KIB_MIN {
            self.ns_per_kib = now.saturating_sub(self.began) / kib;
        }
    }

    /// How many bytes of rows there may be in memory beside those that are being flushed: a quarter of the room that is left
    /// may be filled at once, and the rest as the flush goes on.
    #[must_use]
    pub fn bytes_max(&self, now: u64) -> usize {
        let room = self.room as u64;
        let kib = now.saturating_sub(self.began) / self.ns_per_kib.max(1);
        let thousandths = (kib.saturating_mul(1024 * 1000) / (self.writing as u64).max(1)).min(1000);
        self.others + (room / 4 + room / 4 * 3 * thousandths / 1000) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn room_is_made_as_fast_as_the_last_rows_were_written() {
        let mut pace = Pace::default();
        let at = |ms: u64| 5_000_000_000 + ms * 1_000_000;
        pace.begin(at(0), 16 * MIB, 48 * MIB, 64 * MIB);
        assert_eq!(pace.bytes_max(at(0)), 36 * MIB, "what there is, and a quarter of the room");
        assert!(pace.bytes_max(at(400)) < 42 * MIB, "a slow disk is expected, at first");
        pace.written(at(1000));
        pace.begin(at(1000), 16 * MIB, 48 * MIB, 64 * MIB);
        let room = |ms: u64| pace.bytes_max(at(ms)) - 32 * MIB;
        assert!(room(1500).abs_diff(10 * MIB) < MIB, "half of the rest after half of the time: {}", room(1500));
        assert!(room(1500) < room(1504) && room(1999) <= 16 * MIB);
        assert!(room(2100).abs_diff(16 * MIB) < 8 && room(60_000) <= 16 * MIB, "never more than there is");
        pace.begin(at(3000), 8 * MIB, 80 * MIB, 64 * MIB);
        assert_eq!(pace.bytes_max(at(9000)), 72 * MIB, "there is no room: nothing comes to the others");
    }

    #[test]
    fn nodes_that_get_the_same_rows_flush_at_moments_of_their_own() {
        let mut pace = Pace::default();
        let mut seen = [0; 17];
        for _ in 0..800 {
            pace.begin(0, MIB, MIB, MIB);
            seen[pace.part(7) as usize] += 1;
        }
        assert!(seen[..9].iter().all(|count| *count == 0) && seen[9..].iter().all(|count| *count > 50), "{seen:?}");
        assert!((0..20).any(|node| pace.part(node) != pace.part(node + 1)));
    }

    #[test]
    fn few_rows_tell_nothing() {
        let mut pace = Pace::default();
        let before = pace.ns_per_kib;
        pace.begin(0, 1 << 10, MIB, 64 * MIB);
        pace.written(1);
        assert_eq!(pace.ns_per_kib, before);
        pace.begin(1, MIB, MIB, 64 * MIB);
        pace.written(2);
        pace.begin(2, MIB, MIB, 64 * MIB);
        assert_eq!(pace.bytes_max(1_000_000), 63 * MIB, "what took no time hinders nobody");
    }
}
