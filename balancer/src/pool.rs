//! The connections to the nodes: for each node a few multiplexed links, over which all requests to it travel.
//!
//! An answer is only taken from the node that is meant: whoever else has come to live at an address is turned down.
//! It does not choose nodes and does not repeat anything.

#![expect(clippy::disallowed_methods, reason = "a shell: notes when links were opened")]

use parking_lot::RwLock;
use shkv_proto::link::Link;
use shkv_proto::message::{Hello, Role, Welcome};
use shkv_proto::{ClusterId, NodeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::runtime::Handle;
use tokio::time::Instant;

/// Links to one node. Two let one go on while the other writes a large value.
const LINKS_PER_NODE: usize = 2;

/// The links to all nodes.
#[derive(Debug)]
pub(crate) struct Pool {
    cluster: ClusterId,
    runtime: Handle,
    homes: RwLock<BTreeMap<NodeId, Arc<Home>>>,
}

/// Where a node lives, and the links to it.
#[derive(Debug)]
pub(crate) struct Home {
    /// `host:port`.
    pub(crate) addr: String,
    /// When the links were opened.
    pub(crate) opened: Instant,
    links: [Link; LINKS_PER_NODE],
}

impl Home {
    /// The link for a lane: whoever keeps to one lane shares system calls with the others on it. While that link is not
    /// up, another one that is: a node that can be reached must not look as if it were gone.
    pub(crate) fn link(&self, lane: usize) -> &Link {
        let turns = (lane..lane.saturating_add(LINKS_PER_NODE)).map(|turn| &self.links[turn % LINKS_PER_NODE]);
        let mut turns = turns.filter(|link| link.is_up());
        turns.next().unwrap_or(&self.links[lane % LINKS_PER_NODE])
    }

    /// How many of the links are up.
    pub(crate) fn links_up(&self) -> usize {
        self.links.iter().filter(|link| link.is_up()).count()
    }
}

impl Pool {
    /// No links yet. Opens them later on the current runtime, from whatever thread it is asked.
    pub(crate) fn new(cluster: ClusterId) -> Self {
        Self { cluster, runtime: Handle::current(), homes: RwLock::default() }
    }

    /// A node's links, if its address is known.
    pub(crate) fn get(&self, node: NodeId) -> Option<Arc<Home>> {
        self.homes.read().get(&node).cloned()
    }

    /// A node lives at this address; links to another one are closed. `false` if that was known.
    pub(crate) fn set(&self, node: NodeId, addr: String) -> bool {
        if let Some(home) = self.get(node)
            && home.addr == addr
        {
            home.links.iter().for_each(Link::retry_now);
            return false;
        }
        self.open(node, addr);
        true
    }

    /// Closes a node's links and opens them anew: what is in flight ends as lost. For a node that has fallen silent on
    /// a connection that looks alive.
    pub(crate) fn reopen(&self, node: NodeId) {
        if let Some(home) = self.get(node) {
            self.open(node, home.addr.clone());
        }
    }

    fn open(&self, node: NodeId, addr: String) {
        let _context = self.runtime.enter();
        let links = std::array::from_fn(|_| {
            let cluster = self.cluster;
            let hello = Hello::ours(Some(cluster), Role::Balancer);
            Link::open(addr.clone(), hello, move |welcome| expect_node(node, cluster, welcome))
        });
        let home = Home { addr, opened: Instant::now(), links };
        let before = self.homes.write().insert(node, Arc::new(home));
        drop(before); // outside of the lock: the waiters of the links that close are told in other tasks
    }

    /// Where each node was last said to live.
    pub(crate) fn book(&self) -> Vec<(NodeId, String)> {
        self.homes.read().iter().map(|(node, home)| (*node, home.addr.clone())).collect()
    }

    /// All nodes with their links.
    pub(crate) fn homes(&self) -> Vec<(NodeId, Arc<Home>)> {
        self.homes.read().iter().map(|(node, home)| (*node, home.clone())).collect()
    }

    /// A node is of no use any more; links to it are closed.
    pub(crate) fn remove(&self, node: NodeId) {
        let before = self.homes.write().remove(&node);
        drop(before); // outside of the lock, as above
    }

    /// Closes all links.
    pub(crate) fn clear(&self) {
        let homes = std::mem::take(&mut *self.homes.write());
        drop(homes);
    }
}

/// Turns down whoever is not the node that is meant. A node that is in no cluster yet is taken: it is about to join.
fn expect_node(node: NodeId, cluster: ClusterId, welcome: &Welcome) -> Result<(), String> {
    match welcome.role {
        Role::Node(found) if found == node => {}
        Role::Node(found) => return Err(format!("node {found} answers where node {node} should be")),
        Role::Client | Role::Balancer => return Err(format!("no node answers where node {node} should be")),
    }
    match welcome.cluster {
        Some(found) if found != cluster => Err(format!("node {node} is in cluster {found}, not in {cluster}")),
        Some(_) | None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shkv_proto::limits::Limits;

    #[test]
    fn only_the_node_that_is_meant_is_taken() {
        let welcome = |role, cluster| Welcome { version: 1, cluster, role, name: "x".into(), limits: Limits::OURS };
        let check = |role, cluster| expect_node(NodeId(5), ClusterId(1), &welcome(role, cluster));
        assert_eq!(check(Role::Node(NodeId(5)), Some(ClusterId(1))), Ok(()));
        assert_eq!(check(Role::Node(NodeId(5)), None), Ok(()));
        assert!(check(Role::Node(NodeId(6)), Some(ClusterId(1))).is_err());
        assert!(check(Role::Balancer, Some(ClusterId(1))).is_err());
        assert!(check(Role::Node(NodeId(5)), Some(ClusterId(2))).is_err());
    }
}
