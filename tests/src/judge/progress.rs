//! Does what only ever grows go back? Within the life of a process a replica's term, its commit index, what it has
//! applied and a member's map only grow; over restarts the term and what is in the rows do, because they were durable
//! before anybody was told.

use super::search::Verdict;
use std::collections::BTreeMap;

/// Values that only grow, by what they are.
#[derive(Clone, Debug, Default)]
pub struct Progress<K>(BTreeMap<K, u64>);

impl<K: Ord + Clone + std::fmt::Debug> Progress<K> {
    /// Nothing was seen yet.
    #[must_use]
    pub fn new() -> Self {
        Self(BTreeMap::new())
    }

    /// A value is told.
    #[must_use]
    pub fn seen(&mut self, of: &K, value: u64) -> Verdict {
        let last = self.0.entry(of.clone()).or_insert(value);
        if value < *last {
            return Verdict::Wrong(format!("{of:?} went back from {last} to {value}"));
        }
        *last = value;
        Verdict::Right
    }

    /// What is forgotten when a process ends.
    pub fn forget(&mut self, which: impl Fn(&K) -> bool) {
        self.0.retain(|of, _| !which(of));
    }
}
