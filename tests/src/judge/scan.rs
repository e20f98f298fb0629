//! Is a scan ordered, within its bounds, and made of rows that were there? Each row that it shows, and each that it
//! does not, is a read of that key at some moment of the scan, and is handed to the judge of registers as such.
//!
//! Rows of different pages are of different moments; a scan as a whole is no snapshot and is not judged as one.

use super::register::Op;
use super::search::{Event, Verdict};
use std::collections::BTreeMap;

/// A scan that came to its end.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Scanned<K> {
    /// The first key that belongs to it.
    pub start: K,
    /// The first key behind it.
    pub end: K,
    /// Whether it ran from its end to its start.
    pub reverse: bool,
    /// The rows in the order in which they came: key, value, version.
    pub rows: Vec<(K, u64, u64)>,
    /// When it was called.
    pub from: u64,
    /// When it ended.
    pub until: u64,
}

/// Judges the form of a scan.
#[must_use]
pub fn judge<K: Ord + std::fmt::Debug>(scan: &Scanned<K>) -> Verdict {
    for (key, ..) in &scan.rows {
        if *key < scan.start || *key >= scan.end {
            return Verdict::Wrong(format!("{key:?} is not within {:?} and {:?}", scan.start, scan.end));
        }
    }
    for pair in scan.rows.windows(2) {
        let (first, second) = if scan.reverse { (&pair[1].0, &pair[0].0) } else { (&pair[0].0, &pair[1].0) };
        if first >= second {
            return Verdict::Wrong(format!("{:?} came before {:?}", pair[0].0, pair[1].0));
        }
    }
    Verdict::Right
}

/// What the scan says of each of these keys, as reads.
pub fn reads<'a, K: Ord>(
    scan: &'a Scanned<K>,
    keys: impl Iterator<Item = &'a K>,
) -> impl Iterator<Item = (&'a K, Event<Op>)> {
    let rows: BTreeMap<&K, (u64, u64)> =
        scan.rows.iter().map(|(key, value, version)| (key, (*value, *version))).collect();
    keys.filter(|key| **key >= scan.start && **key < scan.end).map(move |key| {
        let op = Op::Get(rows.get(key).copied());
        (key, Event { op, from: scan.from, until: Some(scan.until) })
    })
}
