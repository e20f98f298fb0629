//! A shard's rows as readers see them: a table in memory that takes applied writes, a sealed one that is on its way to
//! redb, and redb. Pure but for what [`Base`] reads.
//!
//! Invariants of [`View`]: `applied`, `revision` and `ledger` belong to exactly the writes that are in it; a row in `active` hides
//! one in `sealed`, and that one hides the one in `base`.

use crate::log::Mark;
use crate::machine::Ledger;
use crate::memtable::{Key, KeyRange, Slot, Table};
use crate::store::{Base, StoreError};
use bytes::Bytes;
use shkv_proto::message::Scan;
use shkv_proto::outbox::TAIL_COPY_BYTES_MAX;
use std::cmp::Ordering;
use std::iter::Peekable;
use std::ops::Bound;
use std::sync::Arc;

/// What a get finds.
pub type Found = Option<(u64, Bytes)>;

/// What a get finds whose value may have been copied elsewhere.
pub type FoundInto = Option<(u64, Option<Bytes>)>;

/// A page goes past so many removed rows at least before it ends without having as many rows as it may.
const REMOVED_MIN: usize = if cfg!(test) { 4 } else { 128 };

/// A shard's rows at one point of its log.
pub struct View {
    /// Takes the writes.
    pub active: Table,
    /// Is being flushed.
    pub sealed: Option<Arc<Table>>,
    /// Was flushed.
    pub base: Base,
    /// The last entry that is in it.
    pub applied: Mark,
    /// The mutations that are in it.
    pub revision: u64,
    /// What the shard remembers beside its rows, as of the same entry.
    pub ledger: Ledger,
}

/// A page of rows, in the form in which it is sent.
#[derive(Debug, Default)]
pub struct Page {
    /// The rows.
    pub rows: Vec<PageRow>,
    /// Their keys, one behind the other.
    pub keys: Vec<u8>,
    /// Their values, one behind the other.
    pub values: Vec<u8>,
    /// Where to go on, if the range is not done.
    pub next: Option<Vec<u8>>,
    /// The revision that the page was read at.
    pub revision: u64,
    /// Whether a transaction held a key of the part of the range that it covers.
    pub is_locked: bool,
}

/// A row of a page: how long its key and value are.
#[derive(Clone, Copy, Debug)]
pub struct PageRow {
    /// Bytes of its key.
    pub key_bytes: u32,
    /// Its version.
    pub version: u64,
    /// Bytes of its value; 0 when only keys were asked for.
    pub value_bytes: u32,
}

impl Page {
    fn add(&mut self, key: &[u8], version: u64, value: &[u8]) {
        self.keys.extend_from_slice(key);
        self.values.extend_from_slice(value);
        self.rows.push(PageRow { key_bytes: key.len() as u32, version, value_bytes: value.len() as u32 });
    }

    /// Its rows: key, version and value.
    #[cfg(any(test, feature = "sim"))]
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], u64, &[u8])> {
        let (mut keys, mut values) = (&self.keys[..], &self.values[..]);
        self.rows.iter().map_while(move |row| {
            let key = keys.split_off(..row.key_bytes as usize)?;
            Some((key, row.version, values.split_off(..row.value_bytes as usize)?))
        })
    }

    fn last_key(&self) -> Option<&[u8]> {
        let last = self.rows.last()?;
        Some(&self.keys[self.keys.len() - last.key_bytes as usize..])
    }
}

/// How much a page may hold.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Most rows.
    pub rows: usize,
    /// Most bytes; one row more may be added.
    pub bytes: usize,
}

impl View {
    /// The row of `key`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, key: &[u8]) -> Result<Found, StoreError> {
        let sealed = || self.sealed.as_ref().and_then(|table| table.get(key));
        match self.active.get(key).or_else(sealed) {
            Some(Slot::Live { version, value }) => Ok(Some((*version, value.clone()))),
            Some(Slot::Dead) => Ok(None),
            None => self.base.get(key),
        }
    }

    /// The row of `key`. A small value that lies in memory is appended to `small`, which costs less than to share it; only
    /// another one is returned.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get_into(&self, key: &[u8], small: &mut Vec<u8>) -> Result<FoundInto, StoreError> {
        let sealed = || self.sealed.as_ref().and_then(|table| table.get(key));
        match self.active.get(key).or_else(sealed) {
            Some(Slot::Live { version, value }) if value.len() <= TAIL_COPY_BYTES_MAX => {
                small.extend_from_slice(value);
                Ok(Some((*version, None)))
            }
            Some(Slot::Live { version, value }) => Ok(Some((*version, Some(value.clone())))),
            Some(Slot::Dead) => Ok(None),
            None => Ok(self.base.get(key)?.map(|(version, value)| (version, Some(value)))),
        }
    }

    /// A page, read while nobody writes: for few rows.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn page(&self, scan: &Scan, limits: PageLimits) -> Result<Page, StoreError> {
        let locked = self.first_locked(scan);
        if let Some(range) = range_of(scan) {
            self.active.sorted().warm(range, scan.reverse, limits.rows);
        }
        self.rows_in_memory(scan, |rows| {
            read_page(rows, false, &self.base, self.revision, locked.as_deref(), scan, limits)
        })
    }

    /// Begins a page: takes from memory what it may need and a hold on redb, so that the rest runs while others write.
    #[must_use]
    pub fn begin_page(&self, scan: &Scan, limits: PageLimits) -> PageReader {
        let in_memory = self.active.len() + self.sealed.as_ref().map_or(0, |table| table.len());
        let mut memory = Vec::with_capacity(in_memory.min(limits.rows + 1));
        let mut bytes = 0;
        let mut cut = false;
        self.rows_in_memory(scan, |rows| {
            for (key, slot) in rows {
                // One row more than fits: only what is beyond the page may be missing behind a cut.
                if memory.len() > limits.rows || bytes > limits.bytes {
                    cut = true;
                    break;
                }
                bytes += key.len() + slot.value_bytes();
                memory.push((key.clone(), slot.clone()));
            }
        });
        PageReader { memory, cut, base: self.base.clone(), revision: self.revision, locked: self.first_locked(scan) }
    }

    /// The first locked key of the range, in the scan's direction.
    fn first_locked(&self, scan: &Scan) -> Option<Vec<u8>> {
        self.ledger.locks.first_in(range_of(scan)?, scan.reverse).map(<[u8]>::to_vec)
    }

    /// The rows of the range that are in memory, in the scan's direction.
    fn rows_in_memory<T>(&self, scan: &Scan, work: impl FnOnce(&mut dyn Iterator<Item = &(Key, Slot)>) -> T) -> T {
        let empty = Table::default();
        let sealed = self.sealed.as_deref().unwrap_or(&empty);
        let Some(range) = range_of(scan) else { return work(&mut std::iter::empty()) };
        let (newer, older) = (self.active.sorted(), sealed.sorted());
        let (newer, older) = (newer.range(range), older.range(range));
        if scan.reverse {
            work(&mut Merged { newer: newer.rev().peekable(), older: older.rev().peekable(), reverse: true })
        } else {
            work(&mut Merged { newer: newer.peekable(), older: older.peekable(), reverse: false })
        }
    }
}

/// Two ordered streams of rows as one; where both have a key, the newer one's row.
struct Merged<A: Iterator, B: Iterator> {
    newer: Peekable<A>,
    older: Peekable<B>,
    reverse: bool,
}

impl<'a, A, B> Iterator for Merged<A, B>
where
    A: Iterator<Item = &'a (Key, Slot)>,
    B: Iterator<Item = &'a (Key, Slot)>,
{
    type Item = &'a (Key, Slot);

    fn next(&mut self) -> Option<Self::Item> {
        let order = match (self.newer.peek(), self.older.peek()) {
            (Some((a, _)), Some((b, _))) => a.cmp(b),
            (Some(_), None) => return self.newer.next(),
            (None, _) => return self.older.next(),
        };
        match if self.reverse { order.reverse() } else { order } {
            Ordering::Less => self.newer.next(),
            Ordering::Greater => self.older.next(),
            Ordering::Equal => {
                self.older.next();
                self.newer.next()
            }
        }
    }
}

/// The range of a scan; `None` if nothing can be in it.
#[must_use]
pub fn range_of(scan: &Scan) -> Option<KeyRange<'_>> {
    let end = match &scan.end {
        Some(end) if end[..] <= scan.start[..] => return None,
        Some(end) => Bound::Excluded(&end[..]),
        None => Bound::Unbounded,
    };
    Some((Bound::Included(&scan.start[..]), end))
}

/// A page under way: it holds what it took from memory and reads the rest from redb.
pub struct PageReader {
    memory: Vec<(Key, Slot)>,
    cut: bool,
    base: Base,
    revision: u64,
    locked: Option<Vec<u8>>,
}

impl PageReader {
    /// The rows of the page. Values are left out of `keys_only` scans.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn read(&self, scan: &Scan, limits: PageLimits) -> Result<Page, StoreError> {
        let mut rows = self.memory.iter();
        read_page(&mut rows, self.cut, &self.base, self.revision, self.locked.as_deref(), scan, limits)
    }
}

/// Reads a page from rows in memory, which hide those in redb. With `cut` there may be more in memory behind the last of them.
fn read_page(
    memory: &mut dyn Iterator<Item = &(Key, Slot)>,
    cut: bool,
    base: &Base,
    revision: u64,
    locked: Option<&[u8]>,
    scan: &Scan,
    limits: PageLimits,
) -> Result<Page, StoreError> {
    let mut page = Page { revision, ..Page::default() };
    let Some(range) = range_of(scan) else { return Ok(page) };
    let mut base = base.range(range, scan.reverse)?;
    let mut stored = base.next()?;
    let mut memory = memory.peekable();
    let mut removed_behind: Option<&[u8]> = None; // the last key behind the page's rows that is no more
    let mut removed = 0;
    let (first, second) =
        if scan.reverse { (Ordering::Greater, Ordering::Less) } else { (Ordering::Less, Ordering::Greater) };
    let done = loop {
        let order = match (memory.peek(), &stored) {
            (Some((key, _)), Some(row)) => key[..].cmp(row.key()),
            (Some(_), None) => first,
            // Behind the cut there may be newer rows in memory that the page did not take.
            (None, _) if cut => break false,
            (None, Some(_)) => second,
            (None, None) => break true,
        };
        if order == second {
            if let Some(row) = &stored {
                let (version, value) = row.split()?;
                page.add(row.key(), version, if scan.keys_only { &[] } else { value });
            }
            stored = base.next()?;
        } else {
            if order == Ordering::Equal {
                stored = base.next()?;
            }
            let Some((key, slot)) = memory.next() else { break true };
            match slot {
                Slot::Live { version, value } => page.add(key, *version, if scan.keys_only { &[] } else { value }),
                Slot::Dead => {
                    removed_behind = Some(key);
                    removed += 1;
                    if removed > limits.rows.max(REMOVED_MIN) {
                        break false; // or a page of few rows could take for ever
                    }
                    continue;
                }
            }
        }
        removed_behind = None;
        if page.rows.len() >= limits.rows || page.keys.len() + page.values.len() >= limits.bytes {
            break false;
        }
    };
    let last = removed_behind.or(page.last_key());
    page.next = last.filter(|_| !done).map(|key| after_key(key, scan.reverse));
    page.is_locked = match (locked, &page.next) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(locked), Some(next)) => (*locked < next[..]) != scan.reverse,
    };
    Ok(page)
}

/// The bound at which a scan goes on after `key`.
fn after_key(key: &[u8], reverse: bool) -> Vec<u8> {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    if !reverse {
        next.push(0);
    }
    next
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Flush, ReplicaMeta, Store};
    use proptest::prelude::*;
    use shkv_proto::map::Part;
    use shkv_proto::message::{Consistency, SnapshotHead};
    use shkv_proto::{KeyspaceId, ReplicaId, ShardId};
    use std::collections::BTreeMap;

    const SHARD: ShardId = ShardId(1);

    fn rows_of(page: &Page) -> Vec<(u8, (u64, Bytes))> {
        assert_eq!(page.keys.len(), page.rows.len(), "each key is one byte");
        let rows = page.iter().map(|(key, version, value)| (key[0], (version, Bytes::copy_from_slice(value))));
        let rows: Vec<_> = rows.collect();
        assert_eq!(rows.len(), page.rows.len());
        rows
    }

    fn meta(revision: u64) -> ReplicaMeta {
        let state = SnapshotHead {
            index: revision,
            term: 1,
            voters: vec![],
            voters_outgoing: vec![],
            learners: vec![],
            learners_next: vec![],
            auto_leave: false,
        };
        let (keyspace, part) = (KeyspaceId(1), Part::everything());
        ReplicaMeta { replica: ReplicaId(1), keyspace, part, homes: vec![], state, revision }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u8),
        Delete(u8),
        Get(u8),
        Seal,
        Flush,
        /// A snapshot with the rows of these keys takes the place of all.
        Install(Vec<u8>),
        /// The replica is deleted, and a new one made.
        Replace,
        /// The process begins anew behind a flush.
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..40_u8).prop_map(Step::Put),
            4 => (0..40_u8).prop_map(Step::Delete),
            6 => (0..40_u8).prop_map(Step::Get),
            1 => Just(Step::Seal),
            1 => Just(Step::Flush),
        ];
        prop::collection::vec(step, 0..120)
    }

    fn steps_of_replicas() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            20 => (0..40_u8).prop_map(Step::Get),
            6 => (0..40_u8).prop_map(Step::Put),
            4 => (0..40_u8).prop_map(Step::Delete),
            2 => Just(Step::Seal),
            2 => Just(Step::Flush),
            1 => prop::collection::vec(0..40_u8, 0..20).prop_map(Step::Install),
            1 => Just(Step::Replace),
            1 => Just(Step::Restart),
        ];
        prop::collection::vec(step, 0..160)
    }

    fn flush(view: &mut View, store: &Store) {
        if let Some(table) = view.sealed.take() {
            store
                .flush(&[Flush { shard: SHARD, meta: meta(view.revision), table, ledger: Ledger::default() }])
                .unwrap();
            view.base = store.base(SHARD).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Wherever a row is, in memory, on its way to redb or in it, gets and pages see what a plain map would hold.
        #[test]
        fn gets_and_pages_agree_with_a_plain_map(
            steps in steps(), rows in 1..9_usize, bytes in 1..200_usize, reverse: bool, keys_only: bool, low in 0..40_u8, high in 0..41_u8,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (store, _) = Store::open(&crate::disk::RealDisk(folder.path().to_owned()), 1 << 20).unwrap();
            store.create_replica(SHARD, &meta(0)).unwrap();
            let base = store.base(SHARD).unwrap();
            let mut view = View { active: Table::default(), sealed: None, base, applied: Mark::default(), revision: 0, ledger: Ledger::default() };
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Put(key) => {
                        view.revision += 1;
                        let value = Bytes::from(vec![key; view.revision as usize % 50]);
                        view.active.put(&[key], view.revision, &value, || value.clone());
                        model.insert(key, (view.revision, value));
                    }
                    Step::Delete(key) => {
                        view.revision += 1;
                        view.active.delete(&[key]);
                        model.remove(&key);
                    }
                    Step::Get(key) => prop_assert_eq!(view.get(&[key]).unwrap(), model.get(&key).cloned()),
                    Step::Seal if view.sealed.is_none() => view.sealed = Some(Arc::new(std::mem::take(&mut view.active))),
                    Step::Seal => {}
                    Step::Flush => flush(&mut view, &store),
                    Step::Install(_) | Step::Replace | Step::Restart => unreachable!("not among these steps"),
                }
            }
            for key in 0..40 {
                prop_assert_eq!(view.get(&[key]).unwrap(), model.get(&key).cloned());
                let mut small = vec![];
                let into = view.get_into(&[key], &mut small).unwrap();
                let into = into.map(|(version, whole)| (version, whole.unwrap_or_else(|| Bytes::from(small))));
                prop_assert_eq!(into, model.get(&key).cloned());
            }
            let whole = Scan {
                keyspace: KeyspaceId(1),
                start: vec![low],
                end: (high < 40).then(|| vec![high]),
                reverse,
                keys_only,
                rows_max: 0,
                bytes_max: 0,
                consistency: Consistency::Eventual,
            };
            let end = if high < 40 { high } else { 255 };
            let mut expected: Vec<_> = model.into_iter().filter(|(key, _)| (low..end).contains(key)).collect();
            if keys_only {
                expected.iter_mut().for_each(|(_, (_, value))| *value = Bytes::new());
            }
            if reverse {
                expected.reverse();
            }
            for at_once in [false, true] {
                let (mut scan, mut found) = (whole.clone(), Vec::new());
                loop {
                    let limits = PageLimits { rows, bytes };
                    let page = if at_once { view.page(&scan, limits) } else { view.begin_page(&scan, limits).read(&scan, limits) };
                    let page = page.unwrap();
                    prop_assert!(page.rows.len() <= rows);
                    found.extend(rows_of(&page));
                    match page.next {
                        Some(next) => scan = scan.resumed(next),
                        None => break,
                    }
                }
                prop_assert_eq!(&found, &expected);
            }
        }

        /// The rows that were read of late are those that redb has, whatever befalls the replica: flushes, snapshots, its
        /// deletion, a restart. A hold on earlier rows goes on to see those.
        #[test]
        fn what_was_read_of_late_is_what_redb_has(steps in steps_of_replicas(), cache_bytes in prop_oneof![Just(0_usize), Just(16 << 10), Just(1 << 20)]) {
            let folder = tempfile::tempdir().unwrap();
            let open = || Store::open(&crate::disk::RealDisk(folder.path().to_owned()), cache_bytes).unwrap().0;
            let mut store = open();
            let mut replica = ReplicaMeta { replica: ReplicaId(1), ..meta(0) };
            store.create_replica(SHARD, &replica).unwrap();
            let view_of = |base| View { active: Table::default(), sealed: None, base, applied: Mark::default(), revision: 0, ledger: Ledger::default() };
            let mut view = view_of(store.base(SHARD).unwrap());
            let mut held: Option<Base> = None;
            let mut revision = 0;
            for step in steps {
                match step {
                    Step::Get(key) => {
                        for base in held.iter().chain([&view.base]) {
                            prop_assert_eq!(base.get(&[key]).unwrap(), base.get_uncached(&[key]).unwrap());
                        }
                    }
                    Step::Put(key) => {
                        revision += 1;
                        view.active.put(&[key], revision, &vec![key; revision as usize % 50], || unreachable!("it is small"));
                    }
                    Step::Delete(key) => view.active.delete(&[key]),
                    Step::Seal => {
                        if view.sealed.is_none() {
                            view.sealed = Some(Arc::new(std::mem::take(&mut view.active)));
                        }
                    }
                    Step::Flush => {
                        held = Some(view.base.clone());
                        flush(&mut view, &store);
                    }
                    Step::Install(keys) => {
                        held = Some(view.base.clone());
                        let mut keys = keys;
                        keys.sort_unstable();
                        keys.dedup();
                        revision += 1;
                        let row = |key: u8| {
                            let mut row = vec![0];
                            row.extend_from_slice(&revision.to_le_bytes());
                            row.push(key);
                            (Bytes::from(vec![key]), Bytes::from(row))
                        };
                        let rows: Vec<_> = keys.into_iter().map(row).collect();
                        store.stage_begin(SHARD).unwrap();
                        store.stage(SHARD, &rows, true).unwrap();
                        store.install(SHARD, &replica, &[]).unwrap();
                        view = view_of(store.base(SHARD).unwrap());
                        for (key, _) in rows {
                            prop_assert_eq!(view.base.get(&key).unwrap(), Some((revision, key)));
                        }
                    }
                    Step::Replace => {
                        held = None;
                        store.delete_replica(SHARD, replica.replica).unwrap();
                        replica.replica = ReplicaId(replica.replica.0 + 1);
                        prop_assert!(store.create_replica(SHARD, &replica).unwrap());
                        view = view_of(store.base(SHARD).unwrap());
                    }
                    Step::Restart => {
                        flush(&mut view, &store);
                        held = None;
                        drop(view);
                        drop(store);
                        store = open();
                        view = view_of(store.base(SHARD).unwrap());
                    }
                }
            }
        }
    }
}
