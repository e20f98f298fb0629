//! Do all replicas of a shard apply the same entry at the same index, each once and in order? (Raft, "State Machine
//! Safety" and, of what is committed, "Log Matching", figure 3 of the paper.)

use super::search::Verdict;
use std::collections::BTreeMap;

/// An entry, as a number that depends on its bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Its term.
    pub term: u64,
    /// Its bytes.
    pub hash: u64,
}

/// What was applied, by shard and index.
#[derive(Clone, Debug, Default)]
pub struct Matching {
    entries: BTreeMap<(u32, u64), (Entry, String)>,
    last: BTreeMap<(u32, String), u64>,
}

impl Matching {
    /// A replica applies an entry. `who` names it and the life of its process.
    #[must_use]
    pub fn applied(&mut self, shard: u32, who: &str, index: u64, entry: Entry) -> Verdict {
        let last = self.last.entry((shard, who.to_owned())).or_default();
        if index <= *last {
            return Verdict::Wrong(format!("{who} applies entry {index} of shard {shard} after entry {last}"));
        }
        *last = index;
        let (first, by) = self.entries.entry((shard, index)).or_insert_with(|| (entry, who.to_owned()));
        if *first != entry {
            return Verdict::Wrong(format!(
                "entry {index} of shard {shard} is {first:?} at {by} and {entry:?} at {who}"
            ));
        }
        Verdict::Right
    }

    /// How many entries were seen.
    #[must_use]
    pub fn count(&self) -> usize {
        self.entries.len()
    }
}
