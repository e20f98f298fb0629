//! A range of keys, made from Rust's own ranges or from a prefix. Pure.

use std::ops::{Range, RangeFrom, RangeFull, RangeInclusive, RangeTo, RangeToInclusive};

/// Keys from `start` up to but not including `end`.
///
/// ```
/// use shkv_client::KeyRange;
///
/// assert_eq!(KeyRange::from("a".."c").end.as_deref(), Some(&b"c"[..]));
/// assert_eq!(KeyRange::from(..), KeyRange::default());
/// assert_eq!(KeyRange::prefix("ab"), KeyRange::from("ab".."ac"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct KeyRange {
    /// First key; empty means from the first of all.
    pub start: Vec<u8>,
    /// First key beyond the range; `None` means to the last of all.
    pub end: Option<Vec<u8>>,
}

impl KeyRange {
    /// The keys that begin with `prefix`.
    ///
    /// ```
    /// let range = shkv_client::KeyRange::prefix([7, 255]);
    /// assert_eq!(range.end, Some(vec![8])); // 255 has no successor, so the byte before it gets one
    /// ```
    pub fn prefix(prefix: impl AsRef<[u8]>) -> Self {
        let start = prefix.as_ref().to_vec();
        let mut end = start.clone();
        while let Some(last) = end.pop() {
            if last < u8::MAX {
                end.push(last + 1);
                return Self { start, end: Some(end) };
            }
        }
        Self { start, end: None }
    }

    /// The keys that are in both ranges.
    ///
    /// ```
    /// use shkv_client::KeyRange;
    ///
    /// let both = KeyRange::from("ab"..).and(KeyRange::prefix("a"));
    /// assert_eq!(both, KeyRange::from("ab".."b"));
    /// ```
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        let end = match (self.end, other.end) {
            (Some(a), Some(b)) => Some(a.min(b)),
            (a, b) => a.or(b),
        };
        Self { start: self.start.max(other.start), end }
    }

    /// Whether no key can be in it.
    ///
    /// ```
    /// use shkv_client::KeyRange;
    ///
    /// assert!(KeyRange::from("b".."a").is_empty());
    /// assert!(!KeyRange::from(..).is_empty());
    /// ```
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.end.as_ref().is_some_and(|end| *end <= self.start)
    }

    /// Leaves of it what is behind `key`, in the direction of the scan.
    pub(crate) fn pass(&mut self, key: &[u8], reverse: bool) {
        let bound = if reverse { self.end.get_or_insert_default() } else { &mut self.start };
        bound.clear();
        bound.extend_from_slice(key);
        if !reverse {
            bound.push(0);
        }
    }
}

/// The first key behind `key`.
fn successor(key: &[u8]) -> Vec<u8> {
    let mut next = Vec::with_capacity(key.len() + 1);
    next.extend_from_slice(key);
    next.push(0);
    next
}

impl From<RangeFull> for KeyRange {
    fn from(_: RangeFull) -> Self {
        Self::default()
    }
}

impl<K: AsRef<[u8]>> From<Range<K>> for KeyRange {
    fn from(range: Range<K>) -> Self {
        Self { start: range.start.as_ref().to_vec(), end: Some(range.end.as_ref().to_vec()) }
    }
}

impl<K: AsRef<[u8]>> From<RangeFrom<K>> for KeyRange {
    fn from(range: RangeFrom<K>) -> Self {
        Self { start: range.start.as_ref().to_vec(), end: None }
    }
}

impl<K: AsRef<[u8]>> From<RangeTo<K>> for KeyRange {
    fn from(range: RangeTo<K>) -> Self {
        Self { start: Vec::new(), end: Some(range.end.as_ref().to_vec()) }
    }
}

impl<K: AsRef<[u8]>> From<RangeInclusive<K>> for KeyRange {
    fn from(range: RangeInclusive<K>) -> Self {
        Self { start: range.start().as_ref().to_vec(), end: Some(successor(range.end().as_ref())) }
    }
}

impl<K: AsRef<[u8]>> From<RangeToInclusive<K>> for KeyRange {
    fn from(range: RangeToInclusive<K>) -> Self {
        Self { start: Vec::new(), end: Some(successor(range.end.as_ref())) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_of_highest_bytes_reaches_to_the_last_key() {
        assert_eq!(KeyRange::prefix([255, 255]), KeyRange { start: vec![255, 255], end: None });
        assert_eq!(KeyRange::prefix(""), KeyRange::default());
    }

    #[test]
    fn an_inclusive_end_is_in_the_range_and_its_successor_is_not() {
        let range = KeyRange::from("a"..="b");
        assert_eq!(range.end, Some(b"b\0".to_vec()));
    }

    #[test]
    fn what_is_behind_a_key_leaves_it_out_both_ways() {
        let range = KeyRange::from("a".."z");
        let behind = |reverse| {
            let mut rest = range.clone();
            rest.pass(b"m", reverse);
            rest
        };
        assert_eq!(behind(false), KeyRange::from(&b"m\0"[..]..&b"z"[..]));
        assert_eq!(behind(true), KeyRange::from("a".."m"));
    }
}
