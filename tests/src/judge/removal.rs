//! Does a replica serve that was removed? Once the cluster has said that a node is gone, whatever answers under its
//! identity is a ghost.

use super::search::Verdict;
use std::collections::BTreeSet;

/// Nodes that the cluster has removed.
#[derive(Clone, Debug, Default)]
pub struct Removal(BTreeSet<u64>);

impl Removal {
    /// The cluster says that a node is gone.
    pub fn gone(&mut self, node: u64) {
        self.0.insert(node);
    }

    /// A node has answered an operation that was called after it was gone.
    #[must_use]
    pub fn answered(&self, node: u64) -> Verdict {
        match self.0.contains(&node) {
            true => Verdict::Wrong(format!("node {node} was removed and still serves")),
            false => Verdict::Right,
        }
    }
}
