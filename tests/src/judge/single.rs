//! Is a thing that only ever moves at one place, whenever somebody looks at all of them? A move deletes one row and puts
//! another in one step, so nobody may ever find two of them, or none.

use super::search::Verdict;

/// Judges where the thing was found: for each look at all places, those at which it was.
#[must_use]
pub fn judge(looks: &[Vec<usize>]) -> Verdict {
    match looks.iter().find(|found| found.len() != 1) {
        Some(found) => Verdict::Wrong(format!("what can be at one place was found at {found:?}")),
        None => Verdict::Right,
    }
}
