//! The locks of a shard: which keys are held by which transaction, and what it will write if it is decided to be done. Pure.

use crate::memtable::Key;
use bytes::Bytes;
use shkv_proto::message::TxnId;
use std::collections::BTreeMap;
use std::ops::Bound;

/// Bytes of prepared writes that a shard holds; a prepare beyond is refused as busy.
pub const PREPARED_BYTES_MAX: usize = 16 << 20;
/// Keys that a shard holds locked; a prepare beyond is refused as busy.
pub const LOCKED_KEYS_MAX: usize = 100_000;

/// A prepared part.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// The head of its [`shkv_proto::Kind::Prepare`].
    pub head: Bytes,
    /// The values.
    pub tail: Bytes,
}

/// The locks of a shard.
///
/// Invariant: the keys are those of the parts' operations, each once.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Locks {
    keys: BTreeMap<Key, TxnId>,
    parts: BTreeMap<TxnId, Part>,
    bytes: usize,
}

impl Locks {
    /// Whether nothing is locked.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Who holds a key.
    #[must_use]
    pub fn holder(&self, key: &[u8]) -> Option<TxnId> {
        if self.keys.is_empty() { None } else { self.keys.get(key).copied() }
    }

    /// Whether a transaction holds anything here.
    #[must_use]
    pub fn is_held_by(&self, txn: &TxnId) -> bool {
        self.parts.contains_key(txn)
    }

    /// The transactions that hold something, in order.
    pub fn holders(&self) -> impl Iterator<Item = &TxnId> {
        self.parts.keys()
    }

    /// The first locked key of a range, in the direction of a scan.
    #[must_use]
    pub fn first_in(&self, range: (Bound<&[u8]>, Bound<&[u8]>), reverse: bool) -> Option<&[u8]> {
        if self.keys.is_empty() {
            return None;
        }
        let mut range = self.keys.range::<[u8], _>(range);
        let found = if reverse { range.next_back() } else { range.next() };
        found.map(|(key, _)| &key[..])
    }

    /// Whether a part of so many keys and bytes may be added.
    #[must_use]
    pub fn has_room(&self, keys: usize, bytes: usize) -> bool {
        self.keys.len() + keys <= LOCKED_KEYS_MAX && self.bytes + bytes <= PREPARED_BYTES_MAX
    }

    /// Locks the keys of a part.
    pub fn hold<'a>(&mut self, txn: TxnId, keys: impl Iterator<Item = &'a [u8]>, part: Part) {
        self.keys.extend(keys.map(|key| (Key::from_slice(key), txn)));
        self.bytes += part.head.len() + part.tail.len();
        self.parts.insert(txn, part);
    }

    /// Takes a part out; its keys are let go one by one.
    pub fn take(&mut self, txn: &TxnId) -> Option<Part> {
        let part = self.parts.remove(txn)?;
        self.bytes -= part.head.len() + part.tail.len();
        Some(part)
    }

    /// Lets a key go.
    pub fn release(&mut self, key: &[u8]) {
        self.keys.remove(key);
    }

    /// The parts, in order.
    pub fn parts(&self) -> impl Iterator<Item = (&TxnId, &Part)> {
        self.parts.iter()
    }

    /// Locked keys.
    #[cfg(test)]
    pub fn keys(&self) -> usize {
        self.keys.len()
    }
}
