//! Do the replicas of a shard hold the same rows? Asked when nothing moves any more.

use super::search::Verdict;

/// Judges what the replicas of one shard hold; each is named by whoever asks.
#[must_use]
pub fn judge<Row: PartialEq + std::fmt::Debug>(replicas: &[(String, Vec<Row>)]) -> Verdict {
    let Some((first, rows)) = replicas.first() else { return Verdict::Wrong("there is no replica".into()) };
    for (other, theirs) in &replicas[1..] {
        if let Some(at) = (0..rows.len().max(theirs.len())).find(|at| rows.get(*at) != theirs.get(*at)) {
            let (here, there) = (rows.get(at), theirs.get(at));
            return Verdict::Wrong(format!("row {at} is {here:?} at {first} and {there:?} at {other}"));
        }
    }
    Verdict::Right
}
