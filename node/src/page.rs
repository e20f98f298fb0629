//! Pages of rows in order, of one shard or merged from several. Pure but for what [`Base`] reads.

use crate::arena::{Arena, At, Places, Row, Slot};
use crate::memtable::{KeyRange, SortedRange, Table};
use crate::store::{Base, BaseRange, BaseRow, StoreError};
use crate::table::View;
use bytes::Bytes;
use shkv_proto::limits::MERGED_ROWS_MAX;
use shkv_proto::merge::share;
use shkv_proto::message::Scan;
use smallvec::SmallVec;
use std::cmp::Ordering;
use std::iter::Peekable;
use std::ops::Bound;

/// A page goes past so many removed rows at least before it ends without having as many rows as it may.
const REMOVED_MIN: usize = if cfg!(test) { 4 } else { 128 };
/// Shards whose rows are merged without an allocation.
const FEW: usize = 4;

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
    /// Whether a transaction held a key of the part of the range that it covers.
    pub is_locked: bool,
    /// The revision of each shard that it was read of.
    pub revisions: SmallVec<[u64; FEW]>,
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

/// How much a page may hold.
#[derive(Clone, Copy, Debug)]
pub struct PageLimits {
    /// Most rows.
    pub rows: usize,
    /// Most bytes; one row more may be added.
    pub bytes: usize,
}

impl Page {
    fn add(&mut self, key: &[u8], version: u64, value: &[u8]) {
        self.keys.extend_from_slice(key);
        self.values.extend_from_slice(value);
        self.rows.push(PageRow { key_bytes: key.len() as u32, version, value_bytes: value.len() as u32 });
    }

    /// Makes room for the rest of a page of few rows: most need no more then.
    fn reserve_as_if_all_were_alike(&mut self, limits: PageLimits) {
        let more = limits.rows.min(MERGED_ROWS_MAX);
        self.rows.reserve(more);
        self.keys.reserve((self.keys.len() * more).min(limits.bytes));
        self.values.reserve((self.values.len() * more).min(limits.bytes));
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

/// A page of the rows of shards that nobody writes to meanwhile: for few rows.
///
/// # Errors
/// [`StoreError`].
pub fn read_at_once(views: &[&View], scan: &Scan, limits: PageLimits) -> Result<Page, StoreError> {
    let revisions = views.iter().map(|view| view.revision).collect();
    let Some(range) = range_of(scan) else { return Ok(Page { revisions, ..Page::default() }) };
    let empty = Table::default();
    let tables: SmallVec<[_; FEW]> =
        views.iter().map(|view| (view.active.sorted(), view.sealed.as_deref().unwrap_or(&empty).sorted())).collect();
    let likely = share(limits.rows, views.len());
    let mut shards = Vec::with_capacity(views.len());
    for (view, (newer, older)) in views.iter().zip(&tables) {
        let newer = newer.range(range, scan.reverse);
        newer.warm(likely);
        let memory = Memory::Shared(Newest::of(newer, older.range(range, scan.reverse), scan.reverse));
        shards.push(ShardRows::new(memory, false, &view.base, range, scan.reverse)?);
    }
    let locked = views.iter().filter_map(|view| first_locked(view, scan));
    let locked = if scan.reverse { locked.max() } else { locked.min() };
    read(&mut shards, Page { revisions, ..Page::default() }, locked.as_deref(), scan, limits)
}

/// A page under way: it holds what it took from memory and reads the rest from redb.
pub struct PageReader {
    memory: Arena,
    cut: bool,
    base: Base,
    revision: u64,
    locked: Option<Vec<u8>>,
}

impl PageReader {
    /// Begins a page: takes from memory what it may need and a hold on redb, so that the rest runs while others write.
    #[must_use]
    pub fn begin(view: &View, scan: &Scan, limits: PageLimits) -> Self {
        let mut memory = Arena::default();
        let (mut rows, mut bytes) = (0, 0);
        let mut cut = false;
        if let Some(range) = range_of(scan) {
            let empty = Table::default();
            let (newer, older) = (view.active.sorted(), view.sealed.as_deref().unwrap_or(&empty).sorted());
            let (newer, older) = (newer.range(range, scan.reverse), older.range(range, scan.reverse));
            for Row { key, slot } in Newest::of(newer, older, scan.reverse) {
                // One row more than fits: only what is beyond the page may be missing behind a cut.
                if rows > limits.rows || bytes > limits.bytes {
                    cut = true;
                    break;
                }
                bytes += key.len() + slot.value_bytes();
                rows += 1;
                match slot {
                    Slot::Live { version, .. } if scan.keys_only => memory.add(key, Some((version, &[])), Bytes::new),
                    Slot::Live { version, value } => memory.add(key, Some((version, &value)), || value.to_bytes()),
                    Slot::Dead => memory.add(key, None, Bytes::new),
                };
            }
        }
        Self { memory, cut, base: view.base.clone(), revision: view.revision, locked: first_locked(view, scan) }
    }

    /// The rows of the page. Values are left out of `keys_only` scans.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn read(&self, scan: &Scan, limits: PageLimits) -> Result<Page, StoreError> {
        let page = Page { revisions: SmallVec::from_slice(&[self.revision]), ..Page::default() };
        let Some(range) = range_of(scan) else { return Ok(page) };
        let memory = Memory::Taken(&self.memory, self.memory.places(At::default()));
        let mut shards = [ShardRows::new(memory, self.cut, &self.base, range, scan.reverse)?];
        read(&mut shards, page, self.locked.as_deref(), scan, limits)
    }
}

/// The first locked key of the range, in the scan's direction.
fn first_locked(view: &View, scan: &Scan) -> Option<Vec<u8>> {
    view.ledger.locks.first_in(range_of(scan)?, scan.reverse).map(<[u8]>::to_vec)
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

/// Rows of two tables in memory, in the scan's direction; where both have a key, the newer one's row.
struct Newest<'a> {
    newer: Peekable<SortedRange<'a>>,
    older: Peekable<SortedRange<'a>>,
    reverse: bool,
}

impl<'a> Newest<'a> {
    fn of(newer: SortedRange<'a>, older: SortedRange<'a>, reverse: bool) -> Self {
        Self { newer: newer.peekable(), older: older.peekable(), reverse }
    }
}

impl<'a> Iterator for Newest<'a> {
    type Item = Row<'a>;

    fn next(&mut self) -> Option<Self::Item> {
        let order = match (self.newer.peek(), self.older.peek()) {
            (Some(a), Some(b)) => in_direction(a.key, b.key, self.reverse),
            (Some(_), None) => return self.newer.next(),
            (None, _) => return self.older.next(),
        };
        match order {
            Ordering::Less => self.newer.next(),
            Ordering::Greater => self.older.next(),
            Ordering::Equal => {
                self.older.next();
                self.newer.next()
            }
        }
    }
}

fn in_direction(a: &[u8], b: &[u8], reverse: bool) -> Ordering {
    if reverse { b.cmp(a) } else { a.cmp(b) }
}

/// Rows in memory: in the tables, or taken from them.
enum Memory<'a> {
    Shared(Newest<'a>),
    Taken(&'a Arena, Places<'a>),
}

impl<'a> Memory<'a> {
    fn next(&mut self) -> Option<Row<'a>> {
        match self {
            Self::Shared(rows) => rows.next(),
            Self::Taken(rows, places) => places.next().map(|at| rows.row(at)),
        }
    }
}

/// A shard's rows in the scan's direction: those in memory hide those in redb.
struct ShardRows<'a> {
    memory: Memory<'a>,
    /// Whether there may be more in memory behind the last of `memory`, newer than what is stored.
    cut: bool,
    base: BaseRange,
    /// The next row in memory.
    kept: Option<Row<'a>>,
    /// The next row in redb.
    stored: Option<BaseRow>,
    /// How the former stands to the latter.
    order: Ordering,
    reverse: bool,
}

/// What the next row of a shard was.
enum Passed<'a> {
    /// It is in the page.
    Row,
    /// A row of this key was removed.
    Removed(&'a [u8]),
    /// It is not known.
    Cut,
}

impl<'a> ShardRows<'a> {
    fn new(
        mut memory: Memory<'a>,
        cut: bool,
        base: &Base,
        range: KeyRange<'_>,
        reverse: bool,
    ) -> Result<Self, StoreError> {
        let mut base = base.range(range, reverse)?;
        let (kept, stored) = (memory.next(), base.next()?);
        let mut rows = Self { memory, cut, base, kept, stored, order: Ordering::Equal, reverse };
        rows.compare();
        Ok(rows)
    }

    fn is_cut(&self) -> bool {
        self.cut && self.kept.is_none()
    }

    fn is_done(&self) -> bool {
        self.kept.is_none() && self.stored.is_none() && !self.cut
    }

    fn compare(&mut self) {
        self.order = match (self.kept, &self.stored) {
            (Some(kept), Some(row)) => in_direction(kept.key, row.key(), self.reverse),
            (Some(_), None) => Ordering::Less,
            (None, _) => Ordering::Greater,
        };
    }

    /// The key of the next row. `None` if it is not known, or there is none.
    fn key(&self) -> Option<&[u8]> {
        match self.order {
            _ if self.is_cut() => None,
            Ordering::Less | Ordering::Equal => self.kept.map(|row| row.key),
            Ordering::Greater => self.stored.as_ref().map(BaseRow::key),
        }
    }

    /// Goes past the next row, and adds it to the page if it is there.
    fn pass(&mut self, page: &mut Page, keys_only: bool) -> Result<Passed<'a>, StoreError> {
        let order = self.order;
        let stored = match order {
            Ordering::Greater if self.is_cut() => return Ok(Passed::Cut),
            Ordering::Equal | Ordering::Greater => std::mem::replace(&mut self.stored, self.base.next()?),
            Ordering::Less => None,
        };
        let kept = match order {
            Ordering::Less | Ordering::Equal => std::mem::replace(&mut self.kept, self.memory.next()),
            Ordering::Greater => None,
        };
        self.compare();
        let Some(Row { key, slot }) = kept else {
            let Some(row) = stored else { return Ok(Passed::Cut) };
            let (version, value) = row.split()?;
            page.add(row.key(), version, if keys_only { &[] } else { value });
            return Ok(Passed::Row);
        };
        Ok(match slot {
            Slot::Live { version, value } => {
                page.add(key, version, if keys_only { &[] } else { &value });
                Passed::Row
            }
            Slot::Dead => Passed::Removed(key),
        })
    }
}

/// Reads a page of the rows of shards, merged.
fn read(
    shards: &mut [ShardRows<'_>],
    mut page: Page,
    locked: Option<&[u8]>,
    scan: &Scan,
    limits: PageLimits,
) -> Result<Page, StoreError> {
    // The shards that are not done, that with the next row last. What is not known may come before everything else.
    let comes_before = |a: &ShardRows<'_>, b: &ShardRows<'_>| match (a.key(), b.key()) {
        (Some(a), Some(b)) => in_direction(a, b, scan.reverse).is_lt(),
        (a, _) => a.is_none(),
    };
    let mut order: SmallVec<[usize; FEW]> = (0..shards.len()).filter(|at| !shards[*at].is_done()).collect();
    order.sort_by(|a, b| if comes_before(&shards[*b], &shards[*a]) { Ordering::Less } else { Ordering::Greater });
    let mut removed_behind: Option<&[u8]> = None; // the last key behind the page's rows that is no more
    let mut removed = 0;
    let done = loop {
        let Some(at) = order.pop() else { break true };
        let shard = &mut shards[at];
        let passed = shard.pass(&mut page, scan.keys_only)?;
        if !shard.is_done() {
            let shard = &shards[at];
            let place = order.partition_point(|other| comes_before(shard, &shards[*other]));
            order.insert(place, at);
        }
        match passed {
            Passed::Row => {
                removed_behind = None;
                if page.rows.len() == 1 {
                    page.reserve_as_if_all_were_alike(limits);
                }
                if page.rows.len() >= limits.rows || page.keys.len() + page.values.len() >= limits.bytes {
                    break false;
                }
            }
            Passed::Removed(key) => {
                removed_behind = Some(key);
                removed += 1;
                if removed > limits.rows.max(REMOVED_MIN) {
                    break false; // or a page of few rows could take for ever
                }
            }
            Passed::Cut => break false,
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
    use crate::log::Mark;
    use crate::machine::Ledger;
    use crate::machine::locks;
    use crate::store::{Flush, ReplicaMeta, Store};
    use proptest::prelude::*;
    use shkv_proto::map::Part;
    use shkv_proto::message::{Consistency, SnapshotHead, TxnId};
    use shkv_proto::{KeyspaceId, ReplicaId, ShardId};
    use std::collections::BTreeMap;
    use std::sync::Arc;

    fn meta(index: u64) -> ReplicaMeta {
        let (voters, voters_outgoing, learners, learners_next) = (vec![], vec![], vec![], vec![]);
        let state =
            SnapshotHead { index, term: 1, voters, voters_outgoing, learners, learners_next, auto_leave: false };
        let (keyspace, part) = (KeyspaceId(1), Part::everything());
        ReplicaMeta { replica: ReplicaId(1), keyspace, part, homes: vec![], state, revision: index }
    }

    /// Keys whose rows are put, or else deleted, each in the shard that has it.
    fn writes() -> impl Strategy<Value = Vec<(u8, bool)>> {
        prop::collection::vec((0..60_u8, prop::bool::weighted(0.7)), 0..80)
    }

    proptest! {
           #![proptest_config(ProptestConfig::with_cases(40))]

           /// Pages of several shards, wherever their rows are, are those of all rows in one plain map, and a page tells whether
           /// a key of its part of the range is locked.
           #[test]
           fn merged_pages_are_those_of_one_map(
               flushed in writes(), sealed in writes(), active in writes(), shards in 1..6_u8, rows in 1..9_usize,
               bytes in 1..200_usize, reverse: bool, keys_only: bool, low in 0..60_u8, high in 0..61_u8, locked in prop::option::of(0..60_u8),
           ) {
               let folder = tempfile::tempdir().unwrap();
               let (store, _) = Store::open(&crate::disk::RealDisk(folder.path().to_owned()), 1 << 20).unwrap();
               let mut model = BTreeMap::new();
               let mut views = Vec::new();
               for number in 0..shards {
                   let shard = ShardId(u32::from(number) + 1);
                   store.create_replica(shard, &meta(0)).unwrap();
                   let mut revision = 0;
                   let mut tables = [&flushed, &sealed, &active].map(|writes| {
                       let mut table = Table::default();
                       for (key, is_put) in writes.iter().filter(|(key, _)| key % shards == number) {
                           revision += 1;
                           if *is_put {
                               let value = Bytes::from(vec![*key; revision as usize % 7]);
                               table.put(&[*key], revision, &value, || value.clone());
                               model.insert(*key, (revision, value));
                           } else {
                               table.delete(&[*key]);
                               model.remove(key);
                           }
                       }
                       Some(Arc::new(table))
                   });
                   let table = tables[0].take().unwrap();
                   store.flush(&[Flush { shard, meta: meta(1), table, ledger: Ledger::default() }], &Default::default()).unwrap();
                   let base = store.base(shard).unwrap();
                   let mut active = tables[2].take().unwrap();
                   let active = std::mem::take(Arc::get_mut(&mut active).unwrap());
                   let mut ledger = Ledger::default();
                   if let Some(key) = locked.filter(|key| key % shards == number) {
                       let (txn, part) = (TxnId { shard, term: 1, number: 1 }, locks::Part { head: Bytes::new(), tail: Bytes::new() });
                       ledger.locks.hold(txn, std::iter::once(&[key][..]), part);
                   }
                   views.push(View { active, sealed: tables[1].take(), base, applied: Mark::default(), revision, ledger });
               }
               let views: Vec<&View> = views.iter().collect();
               let mut scan = Scan {
                   keyspace: KeyspaceId(1), start: vec![low], end: (high < 60).then(|| vec![high]), reverse, keys_only,
                   rows_max: 0, bytes_max: 0, consistency: Consistency::Eventual, with: vec![],
               };
               let end = if high < 60 { high } else { 255 };
               let mut expected: Vec<_> = model.into_iter().filter(|(key, _)| (low..end).contains(key)).collect();
               if reverse {
                   expected.reverse();
               }
               let mut found = Vec::new();
               for page_number in 0.. {
                   prop_assert!(page_number < 200, "it does not end");
                   let page = read_at_once(&views, &scan, PageLimits { rows, bytes }).unwrap();
                   prop_assert!(page.rows.len() <= rows);
                   prop_assert_eq!(&page.revisions[..], views.iter().map(|view| view.revision).collect::<Vec<_>>());
                   found.extend(page.iter().map(|(key, version, value)| (key[0], version, value.to_vec())));
                   let rest = page.next.clone().map(|next| scan.resumed(next));
                   let holds = |scan: &Scan| locked.is_some_and(|key| {
                       let key = [key];
    scan.start[..] <= key[..] && scan.end.as_ref().is_none_or(|end| key[..] < end[..])
                   });
                   prop_assert_eq!(page.is_locked, holds(&scan) && !rest.as_ref().is_some_and(holds));
                   match rest {
                       Some(rest) => scan = rest,
                       None => break,
                   }
               }
               let value = |value: Bytes| if keys_only { vec![] } else { value.to_vec() };
               let expected: Vec<_> = expected.into_iter().map(|(key, (version, bytes))| (key, version, value(bytes))).collect();
               prop_assert_eq!(found, expected);
           }
       }
}
