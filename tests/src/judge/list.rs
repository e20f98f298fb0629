//! Does a list that is only ever appended to keep what was appended, each element once, and does whoever reads it see its
//! beginning? (The workload of Kingsbury and Alvaro, "Elle", VLDB 2020, for one key.)

use super::search::Verdict;
use std::collections::BTreeSet;

/// What was told of one list. Elements are unique.
#[derive(Clone, Default, Debug)]
pub struct Appends {
    /// Appended and acknowledged, in no order.
    pub done: BTreeSet<u64>,
    /// Perhaps appended.
    pub unknown: BTreeSet<u64>,
    /// What reads found.
    pub reads: Vec<Vec<u64>>,
}

/// Judges the list that is there in the end.
#[must_use]
pub fn judge(appends: &Appends, found: &[u64]) -> Verdict {
    let there: BTreeSet<u64> = found.iter().copied().collect();
    if there.len() < found.len() {
        return Verdict::Wrong(format!("an element is there twice: {found:?}"));
    }
    if let Some(lost) = appends.done.iter().find(|element| !there.contains(element)) {
        return Verdict::Wrong(format!("{lost} was appended and is lost: {found:?}"));
    }
    if let Some(alien) = there.iter().find(|one| !appends.done.contains(one) && !appends.unknown.contains(one)) {
        return Verdict::Wrong(format!("{alien} is there and was told not to be: {found:?}"));
    }
    match appends.reads.iter().find(|read| !found.starts_with(read)) {
        Some(read) => Verdict::Wrong(format!("a read found {read:?}, which is no beginning of {found:?}")),
        None => Verdict::Right,
    }
}
