//! May one replica of a shard at most answer reads by itself at any moment? Two leases that run at the same time let one of
//! their holders answer from the past (Ongaro, "Consensus: bridging theory and practice", 2014, section 6.4.1).

use super::search::Verdict;
use std::collections::BTreeMap;

/// Judges the leases that run at one moment: the shard and who holds it.
#[must_use]
pub fn judge<'a>(running: impl IntoIterator<Item = (u32, &'a str)>) -> Verdict {
    let mut holders: BTreeMap<u32, &str> = BTreeMap::new();
    for (shard, holder) in running {
        if let Some(other) = holders.insert(shard, holder) {
            return Verdict::Wrong(format!("the leases of {other} and {holder} on shard {shard} run at once"));
        }
    }
    Verdict::Right
}
