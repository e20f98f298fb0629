//! Is everything there that was acknowledged? The plainest of the judges, for keys that are written once and never
//! changed: it needs no search and cannot run out of patience.

use super::search::Verdict;
use std::collections::BTreeMap;

/// Keys that are written once.
#[derive(Clone, Debug, Default)]
pub struct Audit {
    acknowledged: BTreeMap<Vec<u8>, Vec<u8>>,
    unknown: BTreeMap<Vec<u8>, Vec<u8>>,
}

impl Audit {
    /// A write was acknowledged.
    pub fn acknowledged(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.acknowledged.insert(key.into(), value.into());
    }

    /// It is unknown whether a write was done.
    pub fn unknown(&mut self, key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) {
        self.unknown.insert(key.into(), value.into());
    }

    /// How many writes were acknowledged.
    #[must_use]
    pub fn count(&self) -> usize {
        self.acknowledged.len()
    }

    /// Judges the rows that are there in the end.
    #[must_use]
    pub fn judge(&self, found: &BTreeMap<Vec<u8>, Vec<u8>>) -> Verdict {
        let text = |key: &[u8]| String::from_utf8_lossy(key).into_owned();
        for (key, value) in &self.acknowledged {
            match found.get(key) {
                Some(there) if there == value => {}
                Some(_) => return Verdict::Wrong(format!("{} has another value than was acknowledged", text(key))),
                None => return Verdict::Wrong(format!("{} was acknowledged and is lost", text(key))),
            }
        }
        for (key, value) in found.iter().filter(|(key, _)| !self.acknowledged.contains_key(*key)) {
            match self.unknown.get(key) {
                Some(sent) if sent == value => {}
                Some(_) => return Verdict::Wrong(format!("{} has a value that nobody sent", text(key))),
                None => return Verdict::Wrong(format!("{} is there and was never taken", text(key))),
            }
        }
        Verdict::Right
    }
}
