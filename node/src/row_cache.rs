//! Rows that were read from redb of late, so that reading them again walks no pages. Pure.
//!
//! A cache belongs to one [`crate::store::Base`], whose rows never change: nothing in it is ever out of date, and a flush or
//! a snapshot, which makes another base, begins with an empty one. All caches of a node share one budget of bytes.

use crate::memtable::Key;
use crate::store::StoreError;
use crate::table::Found;
use parking_lot::Mutex;
use shkv_proto::hashing::key_hash;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};

/// What a row costs beside its key and value: its place and what the allocator adds.
const ROW_BYTES: usize = 144;
/// Rows that may lie in one set.
const WAYS: usize = 4;
/// The part of the budget that the sets of one cache may take, without their rows.
const SETS_PART: usize = 32;
/// Rows up to this size are kept.
const ROW_BYTES_MAX: usize = 16 << 10;
/// While there is no room, one row in so many that are read takes the place of another: reading more rows than there is
/// room for then costs little.
const ADMITTED_OF: usize = 8;

/// Looks after which a cache without room for more tells whether it is of use.
const TRIAL: usize = 1 << 14;
/// Looks that one without use is spared then, before it is tried again.
const REST: usize = 1 << 18;
/// It is of use if it has one row in so many that are looked for.
const USEFUL_OF: usize = 4;

/// Bytes that the caches of a node may take together.
#[derive(Debug)]
pub struct Budget {
    bytes_max: usize,
    used: AtomicUsize,
}

impl Budget {
    /// A budget of so many bytes.
    #[must_use]
    pub fn new(bytes_max: usize) -> Self {
        Self { bytes_max, used: AtomicUsize::new(0) }
    }

    /// Bytes that are taken.
    #[cfg(test)]
    pub fn used(&self) -> usize {
        self.used.load(Ordering::Relaxed)
    }

    fn take(&self, bytes: usize) -> bool {
        let with = self.used.fetch_add(bytes, Ordering::Relaxed) + bytes;
        if with > self.bytes_max {
            self.give_back(bytes);
        }
        with <= self.bytes_max
    }

    fn give_back(&self, bytes: usize) {
        self.used.fetch_sub(bytes, Ordering::Relaxed);
    }
}

/// The rows of one base that were read of late; also keys that were found to have none.
///
/// Invariant: the budget counts exactly the sets and the rows that are in them.
#[derive(Debug)]
pub struct RowCache {
    budget: Arc<Budget>,
    sets: OnceLock<Box<[Mutex<Set>]>>,
    /// Rows for which there was no room.
    misses: AtomicUsize,
    looks: AtomicUsize,
    /// Rows that were found since the last trial.
    hits: AtomicUsize,
    /// `misses` as of the last trial.
    misses_before: AtomicUsize,
    rests: AtomicBool,
}

/// Fills a line of the processor's cache, so that a row that is not here costs one look at memory.
#[derive(Debug, Default)]
#[repr(align(64))]
struct Set {
    /// Half of the hash of each key.
    tags: [u32; WAYS],
    rows: [Option<Box<Kept>>; WAYS],
    /// Which one goes next.
    next: u8,
}

impl Set {
    fn find(&self, tag: u32, key: &[u8]) -> Option<&Kept> {
        let of_tag = self.tags.iter().zip(&self.rows).filter(|(other, _)| **other == tag);
        of_tag.filter_map(|(_, kept)| kept.as_deref()).find(|kept| kept.key[..] == *key)
    }
}

#[derive(Debug)]
struct Kept {
    key: Key,
    found: Found,
}

impl Kept {
    fn bytes(&self) -> usize {
        kept_bytes(&self.key, &self.found)
    }
}

fn kept_bytes(key: &[u8], found: &Found) -> usize {
    ROW_BYTES + key.len() + found.as_ref().map_or(0, |(_, value)| value.len())
}

impl RowCache {
    /// An empty cache.
    #[must_use]
    pub fn new(budget: Arc<Budget>) -> Self {
        Self {
            budget,
            sets: OnceLock::new(),
            misses: AtomicUsize::new(0),
            looks: AtomicUsize::new(0),
            hits: AtomicUsize::new(0),
            misses_before: AtomicUsize::new(0),
            rests: AtomicBool::new(false),
        }
    }

    /// The row of `key`, from here or by `read`. `rows` says about how many there are.
    ///
    /// # Errors
    /// What `read` says.
    pub fn get(
        &self,
        key: &[u8],
        rows: impl FnOnce() -> usize,
        read: impl FnOnce() -> Result<Found, StoreError>,
    ) -> Result<Found, StoreError> {
        if self.rests() {
            return read();
        }
        let hash = key_hash(key);
        let tag = (hash >> 32) as u32;
        let Some(set) = self.set(hash, rows) else { return read() };
        if let Some(kept) = set.lock().find(tag, key) {
            self.hits.fetch_add(1, Ordering::Relaxed);
            return Ok(kept.found.clone());
        }
        let found = read()?;
        self.keep(set, tag, key, &found);
        Ok(found)
    }

    /// Whether it is left out this time: keys that are chosen from far more than there is room for are seldom here, and looking
    /// for them in vain costs each as much as a page in memory.
    fn rests(&self) -> bool {
        match self.looks.fetch_add(1, Ordering::Relaxed) % (TRIAL + REST) {
            0 => self.rests.store(false, Ordering::Relaxed),
            TRIAL => {
                let misses = self.misses.load(Ordering::Relaxed);
                let is_full = self.misses_before.swap(misses, Ordering::Relaxed) != misses;
                let hits = self.hits.swap(0, Ordering::Relaxed);
                self.rests.store(is_full && hits < TRIAL / USEFUL_OF, Ordering::Relaxed);
            }
            _ => {}
        }
        self.rests.load(Ordering::Relaxed)
    }

    /// The set that a key belongs to. The sets are made when they are first wanted; `None` without room for them.
    fn set(&self, hash: u64, rows: impl FnOnce() -> usize) -> Option<&Mutex<Set>> {
        let make = || {
            let affordable = self.budget.bytes_max / SETS_PART / size_of::<Mutex<Set>>();
            let wanted = (rows() / 2).clamp(1, affordable.max(1)).next_power_of_two();
            let count = if self.budget.take(wanted * size_of::<Mutex<Set>>()) { wanted } else { 0 };
            (0..count).map(|_| Mutex::default()).collect()
        };
        let sets = self.sets.get_or_init(make);
        // Where keys are cut by hash, the high bits are alike in one shard.
        sets.get(hash as usize & sets.len().wrapping_sub(1))
    }

    /// Keeps a row in the place of one that is empty, or else of the next, if there is room.
    fn keep(&self, set: &Mutex<Set>, tag: u32, key: &[u8], found: &Found) {
        let bytes = kept_bytes(key, found);
        if bytes > ROW_BYTES_MAX {
            return;
        }
        let mut set = set.lock();
        let set = &mut *set;
        let empty = set.rows.iter().position(Option::is_none);
        let has_room = empty.is_some() && self.budget.take(bytes);
        if !has_room && !self.misses.fetch_add(1, Ordering::Relaxed).is_multiple_of(ADMITTED_OF) {
            return;
        }
        let at = empty.unwrap_or_else(|| {
            set.next = (set.next + 1) % WAYS as u8;
            usize::from(set.next)
        });
        let mut ways = (0..WAYS).map(|step| (at + step) % WAYS);
        let makes_room = |way: usize| {
            self.give_back(set.rows[way].take());
            self.budget.take(bytes)
        };
        if !has_room && !ways.any(makes_room) {
            return;
        }
        set.tags[at] = tag;
        set.rows[at] = Some(Box::new(Kept { key: Key::from_slice(key), found: found.clone() }));
    }

    fn give_back(&self, kept: Option<Box<Kept>>) {
        self.budget.give_back(kept.map_or(0, |kept| kept.bytes()));
    }
}

impl Drop for RowCache {
    fn drop(&mut self) {
        let Some(sets) = self.sets.take() else { return };
        let bytes_of = |set: &Mutex<Set>| set.lock().rows.iter().flatten().map(|kept| kept.bytes()).sum::<usize>();
        self.budget.give_back(sets.iter().map(bytes_of).sum::<usize>() + size_of_val(&*sets));
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use bytes::Bytes;

    fn row(number: u64) -> Found {
        Some((number, Bytes::from(vec![7; number as usize % 300])))
    }

    fn get(cache: &RowCache, number: u64, reads: &AtomicUsize) -> Found {
        let read = || {
            reads.fetch_add(1, Ordering::Relaxed);
            Ok(if number.is_multiple_of(7) { None } else { row(number) })
        };
        cache.get(&number.to_be_bytes(), || 1_000, read).expect("it reads nothing that fails")
    }

    #[test]
    fn a_row_that_was_read_is_not_read_again() {
        let (cache, reads) = (RowCache::new(Arc::new(Budget::new(1 << 20))), AtomicUsize::new(0));
        for number in 0..100 {
            let expected = if number % 7 == 0 { None } else { row(number) };
            assert_eq!(get(&cache, number, &reads), expected);
            assert_eq!(get(&cache, number, &reads), expected, "the second time");
        }
        assert!(reads.into_inner() <= 110, "a set of four may be full now and then, no more");
    }

    #[test]
    fn a_cache_that_has_nothing_that_is_looked_for_rests() {
        let (budget, reads) = (Arc::new(Budget::new(20_000)), AtomicUsize::new(0));
        let cache = RowCache::new(budget.clone());
        let numbers = |count: usize, from: usize| (0..count).map(move |n| ((n * 7_919) % from) as u64);
        numbers(TRIAL + 1, 10_000).for_each(|number| drop(get(&cache, number, &reads)));
        assert!(cache.rests.load(Ordering::Relaxed), "of 10,000 rows it has 100");
        for _ in 0..5 {
            let before = reads.load(Ordering::Relaxed);
            get(&cache, 5, &reads);
            assert_eq!(reads.load(Ordering::Relaxed), before + 1, "it is neither asked nor filled");
        }
        numbers(REST, 20).for_each(|number| drop(get(&cache, number, &reads)));
        assert!(!cache.rests.load(Ordering::Relaxed), "it is tried again");
        let before = reads.load(Ordering::Relaxed);
        numbers(TRIAL + 100, 20).for_each(|number| drop(get(&cache, number, &reads)));
        assert!(!cache.rests.load(Ordering::Relaxed), "now it is of use");
        assert!(reads.load(Ordering::Relaxed) - before < TRIAL / 2);
    }

    #[test]
    fn a_failure_is_not_kept() {
        let cache = RowCache::new(Arc::new(Budget::new(1 << 20)));
        assert!(cache.get(b"k", || 10, || Err(StoreError::stopped())).is_err());
        assert_eq!(cache.get(b"k", || 10, || Ok(row(3))).expect("it works now"), row(3));
    }

    #[test]
    fn caches_stay_within_their_budget_and_give_it_back() {
        let budget = Arc::new(Budget::new(100_000));
        let reads = AtomicUsize::new(0);
        {
            let caches = [RowCache::new(budget.clone()), RowCache::new(budget.clone())];
            for round in 0..3 {
                for number in 0..2_000 {
                    let cache = &caches[(number % 2) as usize];
                    assert_eq!(get(cache, number, &reads).is_none(), number % 7 == 0, "round {round}");
                    assert!(budget.used() <= 100_000);
                }
            }
            assert!(budget.used() > 50_000, "it is made use of");
            let before = reads.load(Ordering::Relaxed);
            for _ in 0..100 {
                get(&caches[0], 4_000_000, &reads);
            }
            assert!(reads.load(Ordering::Relaxed) - before <= ADMITTED_OF, "what is read often gets its place");
        }
        assert_eq!(budget.used(), 0);
    }

    #[test]
    fn without_room_everything_is_read() {
        let (cache, reads) = (RowCache::new(Arc::new(Budget::new(0))), AtomicUsize::new(0));
        for _ in 0..3 {
            assert_eq!(get(&cache, 5, &reads), row(5));
        }
        assert_eq!(reads.into_inner(), 3);
    }
}
