//! The pool of nodes as the load balancer sees it: a number for each, and which of them a request goes to.
//!
//! Rendezvous hashing chooses: a node that comes or goes moves only its share of the requests, and there is no limit of
//! slots. The slot rings that it is compared with are in `shkv hashing`.

use crate::cluster::Cluster;
use parking_lot::Mutex;
use shkv_proto::NodeId;
use shkv_proto::map::{Map, NodeInfo, NodeState};
use shkv_proto::message::NodeHealth;
use shkv_proto::ring::{Chooser, Rendezvous};
use std::collections::BTreeMap;

/// The numbers of the nodes, by name: each has the lowest from 1 that was free when it was first seen.
#[derive(Debug, Default)]
pub(crate) struct Pool {
    numbers: Mutex<BTreeMap<String, u64>>,
}

/// A node of the pool.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Member {
    /// Its number.
    pub(crate) number: u64,
    /// Its identity.
    pub(crate) id: NodeId,
    /// Its name.
    pub(crate) name: String,
}

/// Whether a node is one of the pool: one that leaves is not.
pub(crate) fn stays(node: &NodeInfo) -> bool {
    match node.state {
        NodeState::Joining | NodeState::Up | NodeState::Draining => true,
        NodeState::Leaving | NodeState::Replaced(_) => false,
    }
}

impl Pool {
    /// The nodes of the pool by number.
    pub(crate) fn members(&self, map: &Map) -> Vec<Member> {
        let mut nodes: Vec<&NodeInfo> = map.nodes.iter().filter(|node| stays(node)).collect();
        nodes.sort_unstable_by(|a, b| a.name.cmp(&b.name));
        let mut numbers = self.numbers.lock();
        numbers.retain(|name, _| nodes.iter().any(|node| node.name == *name));
        let mut members: Vec<Member> = Vec::with_capacity(nodes.len());
        for node in nodes {
            let number = numbers.get(&node.name).copied().unwrap_or_else(|| {
                let free = (1..).find(|number| !numbers.values().any(|taken| taken == number)).unwrap_or(u64::MAX);
                numbers.insert(node.name.clone(), free);
                free
            });
            members.push(Member { number, id: node.id, name: node.name.clone() });
        }
        members.sort_unstable_by_key(|member| member.number);
        members
    }

    /// The nodes for a request, the best first; those that are down are left out.
    pub(crate) fn order(&self, cluster: &Cluster, request: u64) -> Vec<Member> {
        let routes = cluster.routes();
        let mut members = self.members(routes.map());
        members.retain(|member| {
            cluster.pool.get(member.id).is_some_and(|home| home.links_up() > 0)
                && cluster.health(|health, now| health.of(member.id, now)) != NodeHealth::Down
        });
        in_order(members, request)
    }
}

fn in_order(mut members: Vec<Member>, request: u64) -> Vec<Member> {
    let mut chooser = Rendezvous::default();
    for member in &members {
        let _ = chooser.add(member.number); // it has no limit
    }
    let mut order = Vec::with_capacity(members.len());
    while let Some(number) = chooser.choose(request) {
        chooser.remove(number);
        if let Some(at) = members.iter().position(|member| member.number == number) {
            order.push(members.swap_remove(at));
        }
    }
    order
}

#[cfg(test)]
mod tests {
    use super::*;
    use shkv_proto::ClusterId;

    fn map(names: &[&str]) -> Map {
        let nodes = (1..).zip(names).map(|(id, name)| NodeInfo::new(NodeId(id), *name, "")).collect();
        Map { nodes, ..Map::empty(ClusterId(1)) }
    }

    #[test]
    fn a_node_keeps_its_number_and_a_new_one_has_the_lowest_free() {
        let pool = Pool::default();
        let numbers = |names: &[&str]| -> Vec<(u64, String)> {
            pool.members(&map(names)).into_iter().map(|member| (member.number, member.name)).collect()
        };
        let named = |pairs: &[(u64, &str)]| -> Vec<(u64, String)> {
            pairs.iter().map(|(number, name)| (*number, (*name).to_owned())).collect()
        };
        assert_eq!(numbers(&["b", "a", "c"]), named(&[(1, "a"), (2, "b"), (3, "c")]));
        assert_eq!(numbers(&["c", "a"]), named(&[(1, "a"), (3, "c")]));
        assert_eq!(numbers(&["c", "a", "z"]), named(&[(1, "a"), (2, "z"), (3, "c")]));
    }

    #[test]
    fn requests_spread_evenly_and_only_those_of_a_lost_node_move() {
        let pool = Pool::default();
        let three = pool.members(&map(&["a", "b", "c"]));
        let two: Vec<Member> = three.iter().filter(|member| member.name != "b").cloned().collect();
        let mut counts = [0; 3];
        for request in 100_000..110_000 {
            let order = in_order(three.clone(), request);
            counts[order[0].number as usize - 1] += 1;
            let other = in_order(two.clone(), request);
            let first = if order[0].name == "b" { &order[1] } else { &order[0] };
            assert_eq!(first, &other[0]);
        }
        assert!(counts.iter().all(|count| (3_000..3_700).contains(count)), "{counts:?}");
    }
}
