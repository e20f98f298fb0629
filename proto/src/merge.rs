//! The k-way merge of pages from several shards into one ordered stream: shared by balancer and client. Pure.

use crate::codec::{self, CodecError};
use bytes::Bytes;
use serde::Deserialize;
use std::cmp::Ordering;
use std::collections::binary_heap::PeekMut;
use std::collections::{BinaryHeap, VecDeque};
use std::time::Duration;

/// How long a node may take for a page that it merges of its shards, which waits for nothing, before each of them is asked by
/// itself.
pub const MERGED_TIME_MAX: Duration = Duration::from_millis(500);

/// A row as a scan gives it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// The key.
    pub key: Bytes,
    /// The version.
    pub version: u64,
    /// The value; empty when only keys were asked for.
    pub value: Bytes,
}

/// A page of a scan as whoever asked takes it.
#[derive(Debug)]
pub struct Page {
    /// The rows. They share the memory of the answer's head and tail.
    pub rows: Vec<Row>,
    /// As in [`ScanDone::next`](crate::message::ScanDone::next).
    pub next: Option<Vec<u8>>,
    /// As in [`ScanDone::revision`](crate::message::ScanDone::revision).
    pub revision: u64,
    /// As in [`ScanDone::with`](crate::message::ScanDone::with).
    pub with: Vec<u64>,
}

/// [`ScanDone`] as it lies in the head of an answer: no key is copied.
///
/// [`ScanDone`]: crate::message::ScanDone
#[derive(Deserialize)]
struct Head<'a> {
    #[serde(borrow)]
    rows: Vec<RowHead<'a>>,
    next: Option<Vec<u8>>,
    revision: u64,
    with: Vec<u64>,
}

#[derive(Deserialize)]
struct RowHead<'a> {
    key: &'a [u8],
    version: u64,
    value_bytes: u32,
}

impl Page {
    /// Decodes the head of an answer to a scan, and cuts its tail into the values.
    ///
    /// # Errors
    /// [`CodecError`]; [`CodecError::Malformed`] also when the lengths do not add up.
    pub fn decode(head: &Bytes, mut tail: Bytes) -> Result<Self, CodecError> {
        let Head { rows: heads, next, revision, with } = codec::decode_borrowed(head)?;
        let mut rows = Vec::with_capacity(heads.len());
        for RowHead { key, version, value_bytes } in heads {
            let length = value_bytes as usize;
            if length > tail.len() {
                return Err(CodecError::Malformed("a page's values are shorter than it says".into()));
            }
            rows.push(Row { key: head.slice_ref(key), version, value: tail.split_to(length) });
        }
        if tail.is_empty() {
            Ok(Self { rows, next, revision, with })
        } else {
            Err(CodecError::Trailing { extra: tail.len() })
        }
    }
}

/// How many rows to ask of each of so many shards among which keys are hashed, so that together they nearly always hold the
/// first `whole` rows: a shard's part is binomial, and what is read in vain beyond two standard deviations above the mean costs
/// more than to ask one of them again now and then.
#[must_use]
pub fn share(whole: usize, shards: usize) -> usize {
    let mean = whole.div_ceil(shards.max(1));
    let variance = mean - mean / shards.max(1);
    if shards <= 1 { whole } else { (mean + 2 * variance.isqrt() + 1).min(whole) }
}

/// Merges sources that are each in order. Feed those that [`Merge::hungry`] names, then [`Merge::pop`].
#[derive(Debug)]
pub struct Merge {
    sources: Vec<Source>,
    /// The first row of each source that has one.
    fronts: BinaryHeap<Front>,
    /// How many sources are hungry.
    hungry: usize,
    reverse: bool,
}

#[derive(Debug, Default)]
struct Source {
    /// What comes behind its first row.
    rows: VecDeque<Row>,
    has_front: bool,
    finished: bool,
}

impl Source {
    fn is_hungry(&self) -> bool {
        !self.has_front && !self.finished
    }
}

/// The next row of a source. The greatest is the one that comes next.
#[derive(Debug)]
struct Front {
    row: Row,
    source: usize,
    reverse: bool,
}

impl Ord for Front {
    fn cmp(&self, other: &Self) -> Ordering {
        let order = self.row.key.cmp(&other.row.key).then(self.source.cmp(&other.source));
        if self.reverse { order } else { order.reverse() }
    }
}

impl PartialOrd for Front {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Front {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}

impl Eq for Front {}

impl Merge {
    /// A merge of this many sources, in key order or in reverse.
    #[must_use]
    pub fn new(sources: usize, reverse: bool) -> Self {
        let fronts = BinaryHeap::with_capacity(sources);
        Self { sources: (0..sources).map(|_| Source::default()).collect(), fronts, hungry: sources, reverse }
    }

    /// Adds a source behind the others: of one that turned out to be several.
    pub fn add(&mut self) {
        self.sources.push(Source::default());
        self.hungry += 1;
    }

    /// The sources of which more must be fed before the next row is known.
    pub fn hungry(&self) -> impl Iterator<Item = usize> + '_ {
        self.sources.iter().enumerate().filter(|(_, source)| source.is_hungry()).map(|(at, _)| at)
    }

    /// Adds the next rows of a source; `finished` when it has no more.
    pub fn feed(&mut self, source: usize, rows: Vec<Row>, finished: bool) {
        let (at, source) = (source, &mut self.sources[source]);
        let was_hungry = source.is_hungry();
        source.rows.extend(rows);
        source.finished = finished;
        if !source.has_front
            && let Some(row) = source.rows.pop_front()
        {
            source.has_front = true;
            self.fronts.push(Front { row, source: at, reverse: self.reverse });
        }
        if was_hungry && !source.is_hungry() {
            self.hungry -= 1;
        }
    }

    /// Rows that were fed and not popped.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.fronts.len() + self.sources.iter().map(|source| source.rows.len()).sum::<usize>()
    }

    /// The next row of all; `None` when every source is at its end, or while one is hungry.
    pub fn pop(&mut self) -> Option<Row> {
        if self.hungry > 0 {
            return None;
        }
        let mut front = self.fronts.peek_mut()?;
        let source = &mut self.sources[front.source];
        if let Some(next) = source.rows.pop_front() {
            return Some(std::mem::replace(&mut front.row, next));
        }
        source.has_front = false;
        self.hungry += usize::from(!source.finished);
        Some(PeekMut::pop(front).row)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::{RowHead, ScanDone};
    use proptest::prelude::*;

    fn row(key: &[u8]) -> Row {
        Row { key: Bytes::copy_from_slice(key), version: 1, value: Bytes::new() }
    }

    proptest! {
        #[test]
        fn the_merge_is_the_sorted_union(keys in prop::collection::btree_set(any::<u16>(), 0..200), shards in 1..6_usize, page in 1..9_usize, reverse: bool) {
            let mut sources: Vec<Vec<Vec<u8>>> = vec![vec![]; shards];
            for key in &keys {
                sources[*key as usize % shards].push(key.to_be_bytes().to_vec());
            }
            for source in &mut sources {
                if reverse { source.reverse(); }
            }
            let mut at = vec![0; shards];
            let mut merge = Merge::new(shards, reverse);
            let mut out = Vec::new();
            loop {
                let hungry: Vec<_> = merge.hungry().collect();
                for source in hungry {
                    let end = (at[source] + page).min(sources[source].len());
                    let rows = sources[source][at[source]..end].iter().map(|key| row(key)).collect();
                    at[source] = end;
                    merge.feed(source, rows, end == sources[source].len());
                }
                match merge.pop() {
                    Some(row) => out.push(row.key.to_vec()),
                    None if merge.hungry().next().is_none() => break,
                    None => {}
                }
            }
            let mut expected: Vec<Vec<u8>> = keys.iter().map(|key| key.to_be_bytes().to_vec()).collect();
            if reverse { expected.reverse(); }
            prop_assert_eq!(out, expected);
        }
    }

    #[test]
    fn shares_cover_the_whole_and_stay_near_it() {
        for (whole, shards, each) in
            [(100, 1, 100), (1, 8, 1), (100, 3, 43), (100, 8, 20), (10_000, 8, 1_317), (7, 100, 4)]
        {
            assert_eq!(share(whole, shards), each.min(whole), "{whole} rows of {shards} shards");
            assert!(share(whole, shards) * shards >= whole);
        }
    }

    #[test]
    fn a_page_is_what_was_sent_and_one_that_lies_about_its_values_is_refused() {
        let page = |bytes| {
            let row = |key, value_bytes| RowHead { key: Bytes::from_static(key), version: 7, value_bytes };
            let rows = vec![row(b"a", 1), row(b"b", bytes)];
            Bytes::from(
                codec::encode(&ScanDone { rows, next: Some(vec![9]), revision: 8, with: vec![7] })
                    .expect("it is small"),
            )
        };
        assert!(Page::decode(&page(3), Bytes::from_static(b"xab")).is_err());
        assert!(Page::decode(&page(1), Bytes::from_static(b"xab")).is_err());
        let Page { rows, next, revision, with } =
            Page::decode(&page(2), Bytes::from_static(b"xab")).expect("a sound page");
        let expected = |key, value| Row { key: Bytes::from_static(key), version: 7, value: Bytes::from_static(value) };
        assert_eq!(rows, [expected(b"a", b"x"), expected(b"b", b"ab")]);
        assert_eq!((next, revision, with), (Some(vec![9]), 8, vec![7]));
    }
}
