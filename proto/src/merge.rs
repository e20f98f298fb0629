//! The k-way merge of pages from several shards into one ordered stream: shared by balancer and client. Pure.

use crate::codec::CodecError;
use crate::message::ScanDone;
use bytes::Bytes;
use std::collections::VecDeque;

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

/// Cuts the tail of a page into its values. Values share the tail's memory.
///
/// # Errors
/// [`CodecError::Malformed`] when the lengths do not add up.
pub fn rows_of_page(page: &mut ScanDone, mut tail: Bytes) -> Result<Vec<Row>, CodecError> {
    let mut rows = Vec::with_capacity(page.rows.len());
    for head in page.rows.drain(..) {
        let length = head.value_bytes as usize;
        if length > tail.len() {
            return Err(CodecError::Malformed("a page's values are shorter than it says".into()));
        }
        rows.push(Row { key: head.key.into(), version: head.version, value: tail.split_to(length) });
    }
    if tail.is_empty() { Ok(rows) } else { Err(CodecError::Trailing { extra: tail.len() }) }
}

/// How many rows to ask of each of so many shards among which keys are hashed, so that together they nearly always hold the
/// first `whole` rows: a shard's part is binomial, and three standard deviations above the mean are hardly ever needed.
#[must_use]
pub fn share(whole: usize, shards: usize) -> usize {
    let mean = whole.div_ceil(shards.max(1));
    if shards <= 1 { whole } else { (mean + 3 * mean.isqrt() + 1).min(whole) }
}

/// Merges sources that are each in order. Feed those that [`Merge::hungry`] names, then [`Merge::pop`].
#[derive(Debug)]
pub struct Merge {
    reverse: bool,
    sources: Vec<Source>,
}

#[derive(Debug, Default)]
struct Source {
    rows: VecDeque<Row>,
    finished: bool,
}

impl Merge {
    /// A merge of this many sources, in key order or in reverse.
    #[must_use]
    pub fn new(sources: usize, reverse: bool) -> Self {
        Self { reverse, sources: (0..sources).map(|_| Source::default()).collect() }
    }

    /// The sources of which more must be fed before the next row is known.
    pub fn hungry(&self) -> impl Iterator<Item = usize> + '_ {
        let starving = |source: &Source| source.rows.is_empty() && !source.finished;
        self.sources.iter().enumerate().filter(move |(_, source)| starving(source)).map(|(at, _)| at)
    }

    /// Adds the next rows of a source; `finished` when it has no more.
    pub fn feed(&mut self, source: usize, rows: Vec<Row>, finished: bool) {
        let source = &mut self.sources[source];
        source.rows.extend(rows);
        source.finished = finished;
    }

    /// Rows that were fed and not popped.
    #[must_use]
    pub fn rows(&self) -> usize {
        self.sources.iter().map(|source| source.rows.len()).sum()
    }

    /// The next row of all; `None` when every source is at its end, or while one is hungry.
    pub fn pop(&mut self) -> Option<Row> {
        if self.hungry().next().is_some() {
            return None;
        }
        let heads = self.sources.iter().enumerate().filter_map(|(at, source)| Some((&source.rows.front()?.key, at)));
        let (_, at) = if self.reverse { heads.max()? } else { heads.min()? };
        self.sources[at].rows.pop_front()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::RowHead;
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
        for (whole, shards, each) in [(100, 1, 100), (1, 8, 1), (100, 8, 23), (10_000, 8, 1_356), (7, 100, 5)] {
            assert_eq!(share(whole, shards), each.min(whole), "{whole} rows of {shards} shards");
            assert!(share(whole, shards) * shards >= whole);
        }
    }

    #[test]
    fn a_page_that_lies_about_its_values_is_refused() {
        let page = |bytes| ScanDone {
            rows: vec![RowHead { key: vec![1], version: 1, value_bytes: bytes }],
            next: None,
            revision: 1,
        };
        assert!(rows_of_page(&mut page(3), Bytes::from_static(b"ab")).is_err());
        assert!(rows_of_page(&mut page(1), Bytes::from_static(b"ab")).is_err());
        let rows = rows_of_page(&mut page(2), Bytes::from_static(b"ab")).expect("a sound page");
        assert_eq!(rows[0].value, Bytes::from_static(b"ab"));
    }
}
