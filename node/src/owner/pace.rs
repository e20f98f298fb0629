//! How fast rows may come into memory while a flush makes room for others. Pure.
//!
//! A flush is written part by part. Writers that are faster than redb are slowed down all along, about to the pace of the last part. Without that they would fill
//! what room there is, and then all of them would stop until the flush is done, which can take seconds.

/// KiB of rows of the smallest part that tells how long others take.
const KIB_MIN: u64 = 256;
/// Nanoseconds that a KiB of rows is taken to take before the first flush: that of a slow disk.
const NS_PER_KIB: u64 = 50_000;

/// What is known of flushes. Times are in nanoseconds of the node's clock.
#[derive(Debug)]
pub struct Pace {
    ns_per_kib: u64,
    flushes: u64,
    /// Bytes of rows of the flush that is under way, of those that it has written, and of those that it is writing.
    sealed: usize,
    done: usize,
    writing: usize,
    /// When it began with the last.
    began: u64,
}

impl Default for Pace {
    fn default() -> Self {
        Self { ns_per_kib: NS_PER_KIB, flushes: 0, sealed: 0, done: 0, writing: 0, began: 0 }
    }
}

impl Pace {
    /// A flush of so many bytes of rows begins.
    pub fn begin(&mut self, sealed: usize) {
        self.sealed = sealed;
        self.done = 0;
        self.flushes += 1;
    }

    /// How much of what may come before the next flush does come before it, in sixteenths: at least nine. Replicas of a group get
    /// the same rows, and if their nodes flushed at the same moments, a majority would be slow then.
    #[must_use]
    pub fn part(&self, node: u64) -> u64 {
        let mixed = (node ^ self.flushes.wrapping_mul(0x9e37_79b9_7f4a_7c15)).wrapping_mul(0xd6e8_feb8_6659_fd93);
        9 + (mixed >> 61)
    }

    /// So many bytes of rows are written next.
    pub fn write(&mut self, now: u64, bytes: usize) {
        self.writing = bytes;
        self.began = now;
    }

    /// They are written.
    pub fn written(&mut self, now: u64) {
        let kib = self.writing as u64 / 1024;
        if kib >= KIB_MIN {
            self.ns_per_kib = now.saturating_sub(self.began) / kib;
        }
        self.done += std::mem::take(&mut self.writing);
    }

    /// How many bytes of rows there may be in memory beside those that are being flushed, of `whole` in all: a quarter of the
    /// room that is left at once, and the rest as the flush goes on.
    #[must_use]
    pub fn room(&self, now: u64, whole: usize) -> usize {
        let room = whole.saturating_sub(self.sealed) as u64;
        let kib = now.saturating_sub(self.began) / self.ns_per_kib.max(1);
        let progress = self.done as u64 + kib.saturating_mul(1024).min(self.writing as u64);
        let thousandths = (progress * 1000 / (self.sealed as u64).max(1)).min(1000);
        (room / 4 + room / 4 * 3 * thousandths / 1000) as usize
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
        pace.begin(32 * MIB);
        pace.write(at(0), 16 * MIB);
        assert_eq!(pace.room(at(0), 64 * MIB), 8 * MIB);
        assert!(pace.room(at(400), 64 * MIB) < 15 * MIB, "a slow disk is expected, at first");
        pace.written(at(1000));
        assert!(pace.room(at(1000), 64 * MIB).abs_diff(20 * MIB) < MIB, "half of the rest after half of the rows");
        pace.write(at(1000), 16 * MIB);
        let room = |ms: u64| pace.room(at(ms), 64 * MIB);
        assert!(room(1500).abs_diff(26 * MIB) < MIB, "as fast as the first half: {}", room(1500));
        assert!(room(1500) < room(1504) && room(1999) <= 32 * MIB);
        assert_eq!((room(2100), room(60_000)), (32 * MIB, 32 * MIB), "never more than there is");
        pace.begin(80 * MIB);
        assert_eq!(pace.room(at(9000), 64 * MIB), 0);
    }

    #[test]
    fn what_is_slower_than_before_makes_no_room_before_it_is_written() {
        let mut pace = Pace::default();
        pace.begin(32 * MIB);
        pace.write(0, 8 * MIB);
        pace.written(1);
        pace.write(1, 8 * MIB);
        assert!(pace.room(1_000_000_000, 64 * MIB).abs_diff(20 * MIB) < MIB, "not more than if it were written");
    }

    #[test]
    fn nodes_that_get_the_same_rows_flush_at_moments_of_their_own() {
        let mut pace = Pace::default();
        let mut seen = [0; 17];
        for _ in 0..800 {
            pace.begin(MIB);
            seen[pace.part(7) as usize] += 1;
        }
        assert!(seen[..9].iter().all(|count| *count == 0) && seen[9..].iter().all(|count| *count > 50), "{seen:?}");
        assert!((0..20).any(|node| pace.part(node) != pace.part(node + 1)));
    }

    #[test]
    fn few_rows_tell_nothing() {
        let mut pace = Pace::default();
        let before = pace.ns_per_kib;
        pace.begin(MIB);
        pace.write(0, 1 << 10);
        pace.written(1);
        assert_eq!(pace.ns_per_kib, before);
        pace.write(1, MIB);
        pace.written(2);
        assert_eq!(pace.room(2, 64 * MIB), 63 * MIB, "what took no time hinders nobody");
    }
}
