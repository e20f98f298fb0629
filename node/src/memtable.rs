//! Rows in memory: found by hash, and put in order only when somebody wants them in order. Pure.
//!
//! Writes and gets are many, and meet as little memory as can be: a place in the index, the row, its value. A flush and scans
//! want rows in order; they sort what has come since the last time, on their own threads.

use bytes::{BufMut, Bytes};
use hashbrown::HashTable;
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use smallvec::SmallVec;
use std::hash::{BuildHasher, RandomState};
use std::ops::{Bound, Range};
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What a row costs in memory beside its key and value: its place, its share of the index, and what vectors keep in reserve.
const SLOT_BYTES: usize = 112;
/// Values from this size on are kept as a part of the log entry that brought them; smaller ones are copied, so that they
/// do not keep the whole entry in memory.
const VALUE_SHARE_BYTES_MIN: usize = 64 << 10;
/// So many rows that are new are put into the order one by one.
const FEW: usize = 16;
/// So many are put into it before whoever waits for the rows has a turn.
const SORTED_AT_ONCE: usize = 4_096;

/// Rows that are looked at side by side without an allocation.
const WARMED: usize = 64;

/// A key in memory. A short one lies beside its row's version and value.
pub type Key = SmallVec<[u8; 32]>;

/// A range of keys.
pub type KeyRange<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// A row in memory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Slot {
    /// The row is there.
    Live {
        /// Its version.
        version: u64,
        /// Its value.
        value: Bytes,
    },
    /// The row was removed.
    Dead,
}

impl Slot {
    /// Bytes of its value.
    pub fn value_bytes(&self) -> usize {
        match self {
            Self::Live { value, .. } => value.len(),
            Self::Dead => 0,
        }
    }
}

/// Where a key's row is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Half of the key's hash.
    hash: u32,
    at: u32,
}

/// Rows in memory. None is ever taken out.
///
/// Invariants: `index` has one place for each of `rows`; `order` has the first `order.len()` of `rows`, by key.
#[derive(Debug, Default)]
pub struct Table {
    rows: Vec<(Key, Slot)>,
    index: HashTable<Place>,
    order: RwLock<Vec<u32>>,
    bytes: usize,
}

/// Of the hash, so that nobody can choose keys that share a place. Nothing that can be seen depends on it.
static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(0));

fn hash_of(key: &[u8]) -> u32 {
    xxh3_64_with_seed(key, *SEED) as u32
}

/// Looks at values: first where all of them are, then at both ends of each.
fn warm_values<'a>(values: impl Iterator<Item = &'a Bytes>) {
    let values: SmallVec<[&[u8]; WARMED]> = values.map(|value| &value[..]).collect();
    let ends = values.iter().map(|value| value.first().copied().unwrap_or(0) ^ value.last().copied().unwrap_or(0));
    std::hint::black_box(ends.fold(0, |all, end| all ^ end));
}

fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}

impl Table {
    /// What the rows take in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// An empty table with room for as many rows as this one has: most likely it will have as many.
    #[must_use]
    pub fn successor(&self) -> Self {
        let count = self.rows.len();
        Self { rows: Vec::with_capacity(count), index: HashTable::with_capacity(count), ..Self::default() }
    }

    /// How many rows there are, with those that were removed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    fn find(&self, hash: u32, key: &[u8]) -> Option<usize> {
        let is_it = |place: &Place| place.hash == hash && self.rows[place.at as usize].0[..] == *key;
        self.index.find(spread(hash), is_it).map(|place| place.at as usize)
    }

    /// The row of a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<&Slot> {
        self.find(hash_of(key), key).map(|at| &self.rows[at].1)
    }

    /// Looks at the rows of keys that are about to be written. Side by side they wait for memory once, where one after the
    /// other each would wait: that is half of what a write costs here.
    pub fn warm<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) {
        let hashes: SmallVec<[u32; WARMED]> = keys.map(hash_of).collect();
        let look = |hash: &u32| self.index.find(spread(*hash), |place| place.hash == *hash).map(|place| place.at);
        let places: SmallVec<[u32; WARMED]> = hashes.iter().filter_map(look).collect();
        let values = |at: &u32| match &self.rows[*at as usize] {
            (key, Slot::Live { value, .. }) if !key.is_empty() => Some(value),
            _ => None,
        };
        warm_values(places.iter().filter_map(values));
    }

    /// Writes a row. `share` gives the value as a part of what brought it.
    pub fn put(&mut self, key: &[u8], version: u64, value: &[u8], share: impl FnOnce() -> Bytes) {
        if value.len() >= VALUE_SHARE_BYTES_MIN {
            return self.set(key, |_| Slot::Live { version, value: share() });
        }
        self.set(key, |before| {
            let Some(Slot::Live { value: old, .. }) = before else {
                return Slot::Live { version, value: Bytes::copy_from_slice(value) };
            };
            // Memory that nobody else holds is written over.
            let value = match std::mem::take(old).try_into_mut() {
                Ok(mut room) if room.len() == value.len() => {
                    room.clear();
                    room.put_slice(value);
                    room.freeze()
                }
                Ok(_) | Err(_) => Bytes::copy_from_slice(value),
            };
            Slot::Live { version, value }
        });
    }

    /// Removes a row.
    pub fn delete(&mut self, key: &[u8]) {
        self.set(key, |_| Slot::Dead);
    }

    /// Puts in the place of a row what `slot` makes of it.
    fn set(&mut self, key: &[u8], slot: impl FnOnce(Option<&mut Slot>) -> Slot) {
        let hash = hash_of(key);
        if let Some(at) = self.find(hash, key) {
            let row = &mut self.rows[at].1;
            self.bytes -= row.value_bytes();
            *row = slot(Some(row));
            self.bytes += row.value_bytes();
            return;
        }
        let slot = slot(None);
        self.bytes += SLOT_BYTES + key.len() + slot.value_bytes();
        let at = self.rows.len() as u32; // a table is flushed long before it has so many
        self.rows.push((Key::from_slice(key), slot));
        self.index.insert_unique(spread(hash), Place { hash, at }, |place| spread(place.hash));
    }

    /// Whether so few rows are out of order that [`Table::sorted`] takes no time to speak of.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.order.try_read().is_some_and(|order| self.rows.len() - order.len() <= FEW)
    }

    /// Puts some more rows in order, as many as may keep others waiting. Tells whether that was not all.
    pub fn sort_more(&self) -> bool {
        let mut order = self.order.write();
        let until = self.rows.len().min(order.len() + SORTED_AT_ONCE);
        self.put_in_order(&mut order, until);
        until < self.rows.len()
    }

    /// The rows in order.
    #[must_use]
    pub fn sorted(&self) -> Sorted<'_> {
        let order = self.order.read();
        if order.len() == self.rows.len() {
            return Sorted { rows: &self.rows, order };
        }
        drop(order);
        let mut order = self.order.write();
        self.put_in_order(&mut order, self.rows.len());
        Sorted { rows: &self.rows, order: RwLockWriteGuard::downgrade(order) }
    }

    fn put_in_order(&self, order: &mut Vec<u32>, until: usize) {
        let key = |at: u32| &self.rows[at as usize].0;
        let mut new: Vec<u32> = (order.len() as u32..until as u32).collect();
        if new.len() <= FEW {
            for at in new {
                let place = order.partition_point(|other| key(*other) < key(at));
                order.insert(place, at);
            }
            return;
        }
        new.sort_unstable_by_key(|at| key(*at));
        let old = std::mem::take(order);
        order.reserve_exact(until);
        let mut new = new.into_iter().peekable();
        for at in old {
            while let Some(before) = new.next_if(|before| key(*before) < key(at)) {
                order.push(before);
            }
            order.push(at);
        }
        order.extend(new);
    }
}

#[cfg(test)]
impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.bytes == other.bytes && self.rows == other.rows
    }
}

/// The rows of a table in order.
pub struct Sorted<'a> {
    rows: &'a [(Key, Slot)],
    order: RwLockReadGuard<'a, Vec<u32>>,
}

impl Sorted<'_> {
    /// So many of the rows, counted in their order.
    pub fn part(&self, part: Range<usize>) -> impl Iterator<Item = &(Key, Slot)> {
        self.order[part].iter().map(|at| &self.rows[*at as usize])
    }

    /// The rows of a range, from its first to its last or in reverse.
    pub fn range(&self, (start, end): KeyRange<'_>, reverse: bool) -> SortedRange<'_> {
        let first_not =
            |is_before: &dyn Fn(&[u8]) -> bool| self.order.partition_point(|at| is_before(&self.rows[*at as usize].0));
        let from = match start {
            Bound::Included(start) => first_not(&|key| key < start),
            Bound::Excluded(start) => first_not(&|key| key <= start),
            Bound::Unbounded => 0,
        };
        let to = match end {
            Bound::Included(end) => first_not(&|key| key <= end),
            Bound::Excluded(end) => first_not(&|key| key < end),
            Bound::Unbounded => self.order.len(),
        };
        SortedRange { rows: self.rows, order: self.order[from.min(to)..to].iter(), reverse }
    }
}

/// The rows of a range of a table in order.
#[derive(Clone)]
pub struct SortedRange<'a> {
    rows: &'a [(Key, Slot)],
    order: std::slice::Iter<'a, u32>,
    reverse: bool,
}

impl SortedRange<'_> {
    /// Looks at the first rows, which are about to be read, side by side, as [`Table::warm`] does.
    pub fn warm(&self, count: usize) {
        let first: SmallVec<[&Slot; 2 * WARMED]> = self.clone().take(count).map(|(_, slot)| slot).collect();
        warm_values(first.iter().filter_map(|slot| match slot {
            Slot::Live { value, .. } => Some(value),
            Slot::Dead => None,
        }));
    }
}

impl<'a> Iterator for SortedRange<'a> {
    type Item = &'a (Key, Slot);

    fn next(&mut self) -> Option<Self::Item> {
        let at = if self.reverse { self.order.next_back() } else { self.order.next() };
        at.map(|at| &self.rows[*at as usize])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    #[derive(Clone, Debug)]
    enum Step {
        Put(u16, u8),
        Delete(u16),
        /// As many new rows at once, so that they are merged.
        Fill(u16),
        Sort,
        Look(u16, u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..300_u16, any::<u8>()).prop_map(|(key, length)| Step::Put(key, length)),
            2 => (0..300_u16).prop_map(Step::Delete),
            1 => (0..300_u16).prop_map(Step::Fill),
            1 => Just(Step::Sort),
            3 => (0..300_u16, 0..301_u16).prop_map(|(low, high)| Step::Look(low, high)),
        ];
        prop::collection::vec(step, 0..120)
    }

    proptest! {
        #[test]
        fn rows_are_found_and_in_order_like_those_of_a_tree(steps in steps()) {
            let (mut table, mut model) = (Table::default(), BTreeMap::new());
            let mut version = 0;
            let mut held = None;
            for step in steps {
                match step {
                    Step::Put(key, length) => {
                        version += 1;
                        let value = Bytes::from(vec![version as u8; usize::from(length) % 5]);
                        table.put(&key.to_be_bytes(), version, &value, || unreachable!("it is small"));
                        model.insert(key, Slot::Live { version, value });
                    }
                    Step::Delete(key) => {
                        table.delete(&key.to_be_bytes());
                        model.insert(key, Slot::Dead);
                    }
                    Step::Fill(from) => {
                        for key in (from..from + 40).rev() {
                            table.delete(&key.to_be_bytes());
                            model.insert(key, Slot::Dead);
                        }
                    }
                    Step::Sort => {
                        prop_assert!(!table.sort_more(), "there are not that many");
                        prop_assert!(table.is_in_order());
                    }
                    Step::Look(low, high) => {
                        let (from, to) = (low.to_be_bytes(), high.to_be_bytes());
                        let sorted = table.sorted();
                        let range = (Bound::Included(&from[..]), Bound::Excluded(&to[..]));
                        let found: Vec<_> = sorted.range(range, false).cloned().collect();
                        let expected = model.range(low..high.max(low));
                        let expected: Vec<_> = expected.map(|(key, slot)| (Key::from_slice(&key.to_be_bytes()), slot.clone())).collect();
                        prop_assert_eq!(&found, &expected);
                        let backwards: Vec<_> = sorted.range(range, true).cloned().collect();
                        prop_assert_eq!(backwards, found.iter().rev().cloned().collect::<Vec<_>>());
                        held = found.into_iter().next().or(held); // a value that is held is not written over
                    }
                }
                if let Some((key, Slot::Live { version, value })) = &held {
                    prop_assert!(value.iter().all(|byte| *byte == *version as u8), "{key:?}");
                }
            }
            for key in 0..340_u16 {
                prop_assert_eq!(table.get(&key.to_be_bytes()), model.get(&key));
            }
            prop_assert_eq!(table.len(), model.len());
            let bytes: usize = model.values().map(|slot| SLOT_BYTES + 2 + slot.value_bytes()).sum();
            prop_assert_eq!(table.bytes(), bytes);
        }
    }

    #[test]
    fn many_rows_are_put_in_order_in_turns() {
        let mut table = Table::default();
        let count = SORTED_AT_ONCE as u32 * 2 + 100;
        (0..count).for_each(|number| table.delete(&number.wrapping_mul(0x9e37_79b9).to_be_bytes()));
        assert!(!table.is_in_order());
        assert_eq!([table.sort_more(), table.sort_more(), table.sort_more()], [true, true, false]);
        assert!(table.is_in_order());
        let sorted = table.sorted();
        let keys: Vec<&Key> = sorted.range((Bound::Unbounded, Bound::Unbounded), false).map(|(key, _)| key).collect();
        assert!(keys.len() == count as usize && keys.is_sorted());
    }

    #[test]
    fn a_large_value_is_shared() {
        let (mut table, entry) = (Table::default(), Bytes::from(vec![7; VALUE_SHARE_BYTES_MIN + 9]));
        let value = entry.slice(9..);
        table.put(b"k", 1, &value, || value.clone());
        let Some(Slot::Live { value: kept, .. }) = table.get(b"k") else { panic!("it was put") };
        assert_eq!(kept.as_ptr(), value.as_ptr());
    }
}
