//! Does a replica serve that was removed? Once the group is led by another that has done without it, whatever the removed
//! one begins to answer comes from a ghost: nobody waits for it any more before a row is changed.

use super::search::Verdict;
use std::collections::BTreeMap;
use std::fmt::Debug;

/// Who was removed, and when that was first seen.
#[derive(Clone, Debug)]
pub struct Removal<Who>(BTreeMap<Who, u64>);

impl<Who> Default for Removal<Who> {
    fn default() -> Self {
        Self(BTreeMap::new())
    }
}

impl<Who: Ord + Copy + Debug> Removal<Who> {
    /// Somebody is seen to be removed.
    pub fn gone(&mut self, who: Who, now: u64) {
        self.0.entry(who).or_insert(now);
    }

    /// Somebody has answered what came to him at `began`.
    #[must_use]
    pub fn answered(&self, who: Who, began: u64) -> Verdict {
        match self.0.get(&who) {
            Some(gone) if began > *gone => {
                Verdict::Wrong(format!("{who:?} was removed at {gone} and serves what came to it at {began}"))
            }
            Some(_) | None => Verdict::Right,
        }
    }

    /// How many were removed.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}
