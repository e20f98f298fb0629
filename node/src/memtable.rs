//! Rows in memory: found by hash, and put in order only when somebody wants them in order. Pure.
//!
//! Writes and gets are many, and meet as little memory as can be: a place in the index, and the row. A flush and scans
//! want rows in order; they sort what has come since the last time, on their own threads.

use crate::arena::{Arena, At, Places, Row, Slot};
use bytes::Bytes;
use hashbrown::HashTable;
use parking_lot::{RwLock, RwLockReadGuard, RwLockWriteGuard};
use smallvec::SmallVec;
use std::hash::{BuildHasher, RandomState};
use std::ops::{Bound, Range};
use std::sync::LazyLock;
use xxhash_rust::xxh3::xxh3_64_with_seed;

/// What a row costs in memory beside itself: its share of the index, where there is always some room, and its place in the order.
const PLACE_BYTES: usize = 20;
/// So many rows that are new are put into the order one by one.
const FEW: usize = 16;
/// So many are put into it before whoever waits for the rows has a turn.
const SORTED_AT_ONCE: usize = 4_096;
/// Rows that are looked at side by side without an allocation.
const WARMED: usize = 64;
/// Rows in order that are looked at side by side: their lines stay in the processor's nearest cache until they are read.
const WARMED_OF_PART: usize = 32;

/// A key in memory. A short one takes no memory of its own.
pub type Key = SmallVec<[u8; 32]>;

/// A range of keys.
pub type KeyRange<'a> = (Bound<&'a [u8]>, Bound<&'a [u8]>);

/// Where a key's row is.
#[derive(Clone, Copy, Debug)]
struct Place {
    /// Half of the key's hash.
    hash: u32,
    at: At,
}

/// Rows in memory. None is ever taken out.
///
/// Invariants: `index` has one place for each row; `order` has those before its `next`, by key.
#[derive(Debug, Default)]
pub struct Table {
    rows: Arena,
    index: HashTable<Place>,
    order: RwLock<Order>,
}

#[derive(Debug, Default)]
struct Order {
    rows: Vec<At>,
    /// The first row that is not among them.
    next: At,
}

/// Of the hash, so that nobody can choose keys that share a place. Nothing that can be seen depends on it.
static SEED: LazyLock<u64> = LazyLock::new(|| RandomState::new().hash_one(0));

fn hash_of(key: &[u8]) -> u32 {
    xxh3_64_with_seed(key, *SEED) as u32
}

fn spread(hash: u32) -> u64 {
    u64::from(hash) << 32 | u64::from(hash)
}

impl Table {
    /// What the rows take in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.rows.bytes() + self.index.len() * PLACE_BYTES
    }

    /// An empty table that expects as many rows as this one has: most likely it will have as many.
    #[must_use]
    pub fn successor(&self) -> Self {
        Self { index: HashTable::with_capacity(self.index.len()), ..Self::default() }
    }

    /// How many rows there are, with those that were removed.
    #[must_use]
    pub fn len(&self) -> usize {
        self.index.len()
    }

    fn find(&self, hash: u32, key: &[u8]) -> Option<At> {
        let is_it = |place: &Place| place.hash == hash && self.rows.key(place.at) == key;
        self.index.find(spread(hash), is_it).map(|place| place.at)
    }

    /// The row of a key.
    #[must_use]
    pub fn get(&self, key: &[u8]) -> Option<Slot<'_>> {
        self.find(hash_of(key), key).map(|at| self.rows.row(at).slot)
    }

    /// Looks at the rows of keys that are about to be written: to wait for memory is half of what a write costs here.
    pub fn warm<'a>(&self, keys: impl Iterator<Item = &'a [u8]>) {
        let hashes: SmallVec<[u32; WARMED]> = keys.map(hash_of).collect();
        let look = |hash: &u32| self.index.find(spread(*hash), |place| place.hash == *hash).map(|place| place.at);
        let rows: SmallVec<[At; WARMED]> = hashes.iter().filter_map(look).collect();
        self.rows.warm(&rows);
    }

    /// Writes a row. `share` gives the value as a part of what brought it.
    pub fn put(&mut self, key: &[u8], version: u64, value: &[u8], share: impl FnOnce() -> Bytes) {
        self.set(key, Some((version, value)), share);
    }

    /// Removes a row.
    pub fn delete(&mut self, key: &[u8]) {
        self.set(key, None, Bytes::new);
    }

    fn set(&mut self, key: &[u8], live: Option<(u64, &[u8])>, share: impl FnOnce() -> Bytes) {
        let hash = hash_of(key);
        if let Some(at) = self.find(hash, key) {
            return self.rows.set(at, live, share);
        }
        let at = self.rows.add(key, live, share);
        self.index.insert_unique(spread(hash), Place { hash, at }, |place| spread(place.hash));
    }

    /// Whether so few rows are out of order that [`Table::sorted`] takes no time to speak of.
    #[must_use]
    pub fn is_in_order(&self) -> bool {
        self.order.try_read().is_some_and(|order| self.len() - order.rows.len() <= FEW)
    }

    /// Puts some more rows in order, as many as may keep others waiting. Tells whether that was not all.
    pub fn sort_more(&self) -> bool {
        let mut order = self.order.write();
        self.put_in_order(&mut order, SORTED_AT_ONCE);
        order.rows.len() < self.len()
    }

    /// The rows in order.
    #[must_use]
    pub fn sorted(&self) -> Sorted<'_> {
        let order = self.order.read();
        if order.rows.len() == self.len() {
            return Sorted { rows: &self.rows, order };
        }
        drop(order);
        let mut order = self.order.write();
        self.put_in_order(&mut order, self.len());
        Sorted { rows: &self.rows, order: RwLockWriteGuard::downgrade(order) }
    }

    /// Puts so many more rows in order.
    fn put_in_order(&self, order: &mut Order, count: usize) {
        let key = |at: At| self.rows.key(at);
        let mut places: Places<'_> = self.rows.places(order.next);
        let new: Vec<At> = places.by_ref().take(count).collect();
        order.next = places.next;
        if new.len() <= FEW {
            for at in new {
                let place = order.rows.partition_point(|other| key(*other) < key(at));
                order.rows.insert(place, at);
            }
            return;
        }
        let old = std::mem::take(&mut order.rows);
        order.rows.reserve_exact(old.len() + new.len());
        let mut new = self.in_order(&new).into_iter().peekable();
        for at in old {
            while let Some(before) = new.next_if(|before| key(*before) < key(at)) {
                order.rows.push(before);
            }
            order.rows.push(at);
        }
        order.rows.extend(new);
    }

    /// Sorts rows. Nearly all comparisons are of what lies beside the places: eight bytes of each key, behind what all keys begin with.
    fn in_order(&self, rows: &[At]) -> Vec<At> {
        let key = |at: &At| self.rows.key(*at);
        let first = rows.first().map(key).unwrap_or_default();
        let in_common = |so_far: usize, at| shared_prefix(&first[..so_far], key(at));
        let begin = rows.iter().fold(first.len(), in_common);
        let part = |at: &At| {
            let mut part = [0; 8];
            let rest = &key(at)[begin..];
            let bytes = rest.len().min(part.len());
            part[..bytes].copy_from_slice(&rest[..bytes]);
            u64::from_be_bytes(part)
        };
        let mut sorted: Vec<(u64, At)> = rows.iter().map(|at| (part(at), *at)).collect();
        sorted.sort_unstable_by(|(part, at), (other_part, other)| {
            part.cmp(other_part).then_with(|| key(at).cmp(key(other)))
        });
        sorted.into_iter().map(|(_, at)| at).collect()
    }
}

/// How many bytes two keys begin with in common.
fn shared_prefix(one: &[u8], other: &[u8]) -> usize {
    one.iter().zip(other).take_while(|(a, b)| a == b).count()
}

#[cfg(test)]
impl PartialEq for Table {
    fn eq(&self, other: &Self) -> bool {
        self.rows == other.rows
    }
}

/// The rows of a table in order.
pub struct Sorted<'a> {
    rows: &'a Arena,
    order: RwLockReadGuard<'a, Order>,
}

impl Sorted<'_> {
    /// So many of the rows, counted in their order.
    pub fn part(&self, part: Range<usize>) -> impl Iterator<Item = Row<'_>> {
        self.order.rows[part].chunks(WARMED_OF_PART).flat_map(|places| {
            self.rows.warm(places);
            places.iter().map(|at| self.rows.row(*at))
        })
    }

    /// The rows of a range, from its first to its last or in reverse.
    pub fn range(&self, (start, end): KeyRange<'_>, reverse: bool) -> SortedRange<'_> {
        let order = &self.order.rows;
        let first_not = |is_before: &dyn Fn(&[u8]) -> bool| order.partition_point(|at| is_before(self.rows.key(*at)));
        let from = match start {
            Bound::Included(start) => first_not(&|key| key < start),
            Bound::Excluded(start) => first_not(&|key| key <= start),
            Bound::Unbounded => 0,
        };
        let to = match end {
            Bound::Included(end) => first_not(&|key| key <= end),
            Bound::Excluded(end) => first_not(&|key| key < end),
            Bound::Unbounded => order.len(),
        };
        SortedRange { rows: self.rows, order: order[from.min(to)..to].iter(), reverse }
    }
}

/// The rows of a range of a table in order.
#[derive(Clone)]
pub struct SortedRange<'a> {
    rows: &'a Arena,
    order: std::slice::Iter<'a, At>,
    reverse: bool,
}

impl SortedRange<'_> {
    /// Looks at the first rows, which are about to be read.
    pub fn warm(&self, count: usize) {
        let places = self.order.as_slice();
        let count = count.min(places.len());
        self.rows.warm(if self.reverse { &places[places.len() - count..] } else { &places[..count] });
    }
}

impl<'a> Iterator for SortedRange<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let at = if self.reverse { self.order.next_back() } else { self.order.next() };
        at.map(|at| self.rows.row(*at))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeMap;

    /// Lengths of values about those where they move apart from their keys, and where they are shared.
    const LENGTHS: [usize; 9] = [0, 1, 4, 11, 100, 1024, 1025, 5000, (64 << 10) + 1];

    #[derive(Clone, Debug)]
    enum Step {
        Put(u16, usize),
        Delete(u16),
        /// As many new rows at once, so that they are merged.
        Fill(u16),
        Sort,
        Look(u16, u16),
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            8 => (0..300_u16, prop::sample::select(&LENGTHS[..])).prop_map(|(key, length)| Step::Put(key, length)),
            8 => (0..9_u16, prop::sample::select(&LENGTHS[..])).prop_map(|(key, length)| Step::Put(key, length)),
            2 => (0..300_u16).prop_map(Step::Delete),
            1 => (0..9_u16).prop_map(Step::Delete),
            1 => (0..300_u16).prop_map(Step::Fill),
            1 => Just(Step::Sort),
            3 => (0..300_u16, 0..301_u16).prop_map(|(low, high)| Step::Look(low, high)),
        ];
        prop::collection::vec(step, 0..120)
    }

    type Kept = Option<(u64, Bytes)>;

    fn kept(slot: Slot<'_>) -> Kept {
        match slot {
            Slot::Live { version, value } => Some((version, value.to_bytes())),
            Slot::Dead => None,
        }
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
                        let value = Bytes::from(vec![version as u8; length]);
                        table.put(&key.to_be_bytes(), version, &value, || value.clone());
                        model.insert(key, Some((version, value)));
                    }
                    Step::Delete(key) => {
                        table.delete(&key.to_be_bytes());
                        model.insert(key, None);
                    }
                    Step::Fill(from) => {
                        for key in (from..from + 40).rev() {
                            table.delete(&key.to_be_bytes());
                            model.insert(key, None);
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
                        let owned = |row: Row<'_>| (row.key.to_vec(), kept(row.slot));
                        let found: Vec<_> = sorted.range(range, false).map(owned).collect();
                        let expected = model.range(low..high.max(low));
                        let expected: Vec<_> = expected.map(|(key, row)| (key.to_be_bytes().to_vec(), row.clone())).collect();
                        prop_assert_eq!(&found, &expected);
                        let backwards: Vec<_> = sorted.range(range, true).map(owned).collect();
                        prop_assert_eq!(backwards, found.iter().rev().cloned().collect::<Vec<_>>());
                        held = found.into_iter().next().or(held); // a value that is held is not written over
                    }
                }
                if let Some((key, Some((version, value)))) = &held {
                    prop_assert!(value.iter().all(|byte| *byte == *version as u8), "{key:?}");
                }
            }
            for key in 0..340_u16 {
                prop_assert_eq!(table.get(&key.to_be_bytes()).map(kept), model.get(&key).cloned());
            }
            prop_assert_eq!(table.len(), model.len());
            // What is counted is at least what is there, and at most what each row had at its largest.
            let bytes: usize = model.values().map(|row| row.as_ref().map_or(0, |(_, value)| value.len())).sum();
            let more = table.bytes() - bytes;
            prop_assert!(more >= model.len() * (PLACE_BYTES + 18) && more <= model.len() * (PLACE_BYTES + 80 + 1024), "{more}");
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
        let keys: Vec<&[u8]> = sorted.range((Bound::Unbounded, Bound::Unbounded), false).map(|row| row.key).collect();
        assert!(keys.len() == count as usize && keys.is_sorted());
    }

    #[test]
    fn rows_of_all_sizes_fill_one_piece_of_memory_after_another() {
        let mut table = Table::default();
        let value = [7; 1025];
        let key = |number: u32| {
            let mut key = number.wrapping_mul(0x9e37_79b9).to_be_bytes().to_vec();
            key.resize(4 + number as usize * 37 % 4092, 1);
            key
        };
        for round in 0..2 {
            for number in 0..2_000 {
                let bytes = (number as usize + round) * 13 % value.len();
                table.put(&key(number), u64::from(number), &value[..bytes], || unreachable!("it is small"));
            }
        }
        table.sort_more();
        for number in 0..2_000 {
            let value =
                Some((u64::from(number), Bytes::copy_from_slice(&value[..(number as usize + 1) * 13 % value.len()])));
            assert_eq!(table.get(&key(number)).map(kept), Some(value));
        }
        assert_eq!(table.sorted().part(0..2_000).count(), 2_000);
    }

    #[test]
    fn a_large_value_is_shared() {
        let (mut table, entry) = (Table::default(), Bytes::from(vec![7; (64 << 10) + 9]));
        let value = entry.slice(9..);
        table.put(b"k", 1, &value, || value.clone());
        let Some(Slot::Live { value: kept, .. }) = table.get(b"k") else { panic!("it was put") };
        assert_eq!(kept.as_ptr(), value.as_ptr());
    }
}
