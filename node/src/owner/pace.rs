//! How fast rows may come into memory while a flush makes room for others. Pure.
//!
//! Writers that are faster than redb are slowed down all along, about to the pace of the flush. Without that they would fill
//! what room there is, and then all of them would stop until the flush is done, which can take seconds.

/// KiB of rows of the smallest flush that tells how long flushes take.
const KIB_MIN: u64 = 256;
/// Nanoseconds that a KiB of rows is taken to take before the first flush: that of a slow disk.
const NS_PER_KIB: u64 = 50_000;

/// What is known of flushes. Times are in nanoseconds of the node's clock.
#[derive(Debug)]
pub struct Pace {
    began: u64,
    ns_per_kib: u64,
    flushes: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { began: 0, ns_per_kib: NS_PER_KIB, flushes: 0 }
    }
}

impl Pace {
    /// A flush begins.
    pub fn begin(&mut self, now: u64) {
        self.began = now;
        self.flushes += 1;
    }

    /// How much of what may come before the next flush does come before it, in sixteenths: at least nine. Replicas of a group get
    /// the same rows, and if their nodes flushed at the same moments, a majority would be slow then.
    #[must_use]
    pub fn part(&self, node: u64) -> u64 {
        let mixed = (node ^ self.flushes.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        9 + (mixed >> 61)
    }

    /// The flush of so many bytes of rows is done.
    pub fn end(&mut self, now: u64, bytes: usize) {
        let kib = bytes as u64 / 1024;
        if kib >= KIB_MIN {
            self.ns_per_kib = now.saturating_sub(self.began) / kib;
        }
    }

    /// How many bytes of rows there may be in memory beside the `sealed` ones that are being flushed, of `whole` in all: a
    /// quarter of the room that is left at once, and the rest as the flush goes on.
    #[must_use]
    pub fn room(&self, now: u64, sealed: usize, whole: usize) -> usize {
        let room = whole.saturating_sub(sealed) as u64;
        let elapsed = now.saturating_sub(self.began);
        let expected = (sealed as u64 / 1024).saturating_mul(self.ns_per_kib).max(1);
        let thousandths = (elapsed / (expected / 1000).max(1)).min(1000);
        (room / 4 + room / 4 * 3 * thousandths / 1000) as usize
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: usize = 1 << 20;

    #[test]
    fn room_is_made_as_fast_as_the_last_flush_made_it() {
        let mut pace = Pace::default();
        pace.begin(1_000_000_000);
        pace.end(3_000_000_000, 32 * MIB); // two seconds for all
        pace.begin(5_000_000_000);
        let room = |ms: u64| pace.room(5_000_000_000 + ms * 1_000_000, 32 * MIB, 64 * MIB);
        assert_eq!(room(0), 8 * MIB);
        assert!(room(1000).abs_diff(20 * MIB) < MIB, "half of the rest after half of the time: {}", room(1000));
        assert!(room(500) < room(504) && room(1999) <= 32 * MIB);
        assert_eq!((room(2100), room(60_000)), (32 * MIB, 32 * MIB), "never more than there is");
        assert_eq!(pace.room(9_000_000_000, 80 * MIB, 64 * MIB), 0);
    }

    #[test]
    fn nodes_that_get_the_same_rows_flush_at_moments_of_their_own() {
        let mut pace = Pace::default();
        let mut seen = [0; 17];
        for now in 0..800 {
            pace.begin(now);
            seen[pace.part(7) as usize] += 1;
        }
        assert!(seen[..9].iter().all(|count| *count == 0) && seen[9..].iter().all(|count| *count > 50), "{seen:?}");
        assert!((0..20).any(|node| pace.part(node) != pace.part(node + 1)));
    }

    #[test]
    fn a_flush_of_few_rows_tells_nothing() {
        let mut pace = Pace::default();
        let before = pace.room(1_000_000, 32 * MIB, 64 * MIB);
        pace.begin(0);
        pace.end(1, 1 << 10);
        assert_eq!(pace.room(1_000_000, 32 * MIB, 64 * MIB), before);
        pace.end(1, 32 * MIB);
        assert_eq!(pace.room(1_000_000, 32 * MIB, 64 * MIB), 32 * MIB, "one that took no time hinders nobody");
    }
}
