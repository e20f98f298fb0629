//! Does a term have one leader at most? (Raft, "Election Safety", figure 3 of the paper.)

use super::search::Verdict;
use std::collections::BTreeMap;

/// Who was seen to lead, by shard and term.
#[derive(Clone, Debug, Default)]
pub struct Leadership(BTreeMap<(u32, u64), u64>);

impl Leadership {
    /// A replica says that it leads.
    #[must_use]
    pub fn leads(&mut self, shard: u32, term: u64, replica: u64) -> Verdict {
        match self.0.insert((shard, term), replica) {
            Some(other) if other != replica => {
                Verdict::Wrong(format!("shard {shard} has two leaders in term {term}: {other} and {replica}"))
            }
            Some(_) | None => Verdict::Right,
        }
    }

    /// How many leaderships were seen.
    #[must_use]
    pub fn count(&self) -> usize {
        self.0.len()
    }
}
