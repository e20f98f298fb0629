//! Was each increment taken once? What was acknowledged counts once, what is unknown once or not at all, and what was
//! said not to be done never.

use super::search::Verdict;

/// What became of the increments of one counter.
#[derive(Clone, Copy, Default, PartialEq, Eq, Debug)]
pub struct Increments {
    /// Acknowledged.
    pub done: u64,
    /// Unknown.
    pub unknown: u64,
}

/// Judges the value that a counter which began at zero has in the end.
#[must_use]
pub fn judge(increments: Increments, found: u64) -> Verdict {
    let Increments { done, unknown } = increments;
    if found < done {
        return Verdict::Wrong(format!("{} of {done} acknowledged increments are lost: {found}", done - found));
    }
    if found > done + unknown {
        return Verdict::Wrong(format!("{found} increments of {done} acknowledged and {unknown} unknown ones"));
    }
    Verdict::Right
}
