//! Which node gets a replica: pure. Consistent hashing held in balance: among the nodes that have least for what they
//! take, the one that wants the shard most (rendezvous hashing with bounded loads, after Mirrokni, Thorup and
//! Zadimoghaddam, "Consistent hashing with bounded loads", 2018). So a node that comes or goes moves only its share.

use shkv_proto::hashing::{key_hash, rendezvous_weight};
use shkv_proto::map::{NodeInfo, ShardInfo};
use shkv_proto::{Map, NodeId, ShardId};
use std::collections::BTreeMap;

/// Replicas on each node that may be given more, those on their way included and those about to leave left out.
#[derive(Clone, Debug)]
pub(crate) struct Loads {
    kept: BTreeMap<NodeId, (u64, u64)>,
}

impl Loads {
    /// The loads of these nodes.
    pub(crate) fn of<'a>(map: &Map, nodes: impl Iterator<Item = &'a NodeInfo>) -> Self {
        let mut kept: BTreeMap<NodeId, (u64, u64)> =
            nodes.map(|node| (node.id, (0, u64::from(node.capacity.max(1))))).collect();
        for replica in map.shards.iter().flat_map(|shard| &shard.replicas) {
            if replica.role != shkv_proto::map::ReplicaRole::Leaving
                && let Some((count, _)) = kept.get_mut(&replica.node)
            {
                *count += 1;
            }
        }
        Self { kept }
    }

    /// The nodes.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = NodeId> + '_ {
        self.kept.keys().copied()
    }

    /// Whether a node is among them.
    pub(crate) fn has(&self, node: NodeId) -> bool {
        self.kept.contains_key(&node)
    }

    /// How many they are.
    pub(crate) fn len(&self) -> usize {
        self.kept.len()
    }

    /// A node gets one replica more.
    pub(crate) fn add(&mut self, node: NodeId) {
        if let Some((count, _)) = self.kept.get_mut(&node) {
            *count += 1;
        }
    }

    /// A node gets one replica less.
    pub(crate) fn take(&mut self, node: NodeId) {
        if let Some((count, _)) = self.kept.get_mut(&node) {
            *count = count.saturating_sub(1);
        }
    }

    /// Whether `from` still has at least as much as `to`, for what they take, after a replica has moved between them.
    fn gains(&self, from: NodeId, to: NodeId) -> bool {
        let (Some((from_count, from_takes)), Some((to_count, to_takes))) = (self.kept.get(&from), self.kept.get(&to))
        else {
            return false;
        };
        *from_count > 0
            && u128::from(*from_count) * u128::from(*to_takes) > u128::from(to_count + 1) * u128::from(*from_takes)
    }

    /// Parts in a million of what a node takes that it would have with `more` replicas more.
    fn fullness(&self, node: NodeId, more: u64) -> u64 {
        self.kept.get(&node).map_or(u64::MAX, |(count, takes)| (count + more) * 1_000_000 / takes)
    }
}

/// How much a node wants a shard.
pub(crate) fn wish(shard: ShardId, node: NodeId) -> u64 {
    rendezvous_weight(key_hash(&shard.0.to_le_bytes()), node.0)
}

/// How many of a shard's other replicas would fail together with one on `node`.
fn neighbours(map: &Map, shard: &ShardInfo, node: NodeId, without: Option<NodeId>) -> usize {
    let domain = map.node(node).map_or("", |info| info.domain.as_str());
    if domain.is_empty() {
        return 0;
    }
    let others = shard.replicas.iter().filter(|replica| {
        replica.role != shkv_proto::map::ReplicaRole::Leaving && Some(replica.node) != without && replica.node != node
    });
    others.filter(|replica| map.node(replica.node).is_some_and(|info| info.domain == domain)).count()
}

/// Whether a node is one of those that a shard is to be kept by.
pub(crate) fn is_pinned_to(map: &Map, shard: &ShardInfo, node: NodeId) -> bool {
    map.node(node).is_some_and(|info| shard.pinned.contains(&info.name))
}

/// The best node for another replica of a shard; `first` is taken if it can be.
pub(crate) fn best(map: &Map, shard: &ShardInfo, loads: &Loads, first: Option<NodeId>) -> Option<NodeId> {
    let free = loads.nodes().filter(|node| shard.replica_on(*node).is_none());
    free.min_by_key(|node| {
        let pinned = is_pinned_to(map, shard, *node);
        let together = neighbours(map, shard, *node, None);
        (Some(*node) != first, !pinned, together, loads.fullness(*node, 1), u64::MAX - wish(shard.id, *node), *node)
    })
}

/// A move that makes the cluster more even, or takes replicas of a shard apart that would fail together: shard, from, to.
/// `may_move` says which shards may.
pub(crate) fn next_move(
    map: &Map,
    loads: &Loads,
    may_move: impl Fn(&ShardInfo) -> bool,
) -> Option<(ShardId, NodeId, NodeId)> {
    for shard in map.shards.iter().filter(|shard| may_move(shard)) {
        for replica in &shard.replicas {
            let from = replica.node;
            let free = || loads.nodes().filter(|node| shard.replica_on(*node).is_none());
            if !shard.pinned.is_empty() {
                if !is_pinned_to(map, shard, from)
                    && let Some(to) = free().find(|node| is_pinned_to(map, shard, *node))
                {
                    return Some((shard.id, from, to));
                }
                continue;
            }
            let now = neighbours(map, shard, from, None);
            let apart = free().filter(|node| neighbours(map, shard, *node, Some(from)) < now);
            if now > 0
                && let Some(to) = apart.min_by_key(|node| (loads.fullness(*node, 1), u64::MAX - wish(shard.id, *node)))
            {
                return Some((shard.id, from, to));
            }
        }
    }
    let mut givers: Vec<NodeId> = loads.nodes().collect();
    givers.sort_by_key(|node| (u64::MAX - loads.fullness(*node, 0), *node));
    let mut takers: Vec<NodeId> = loads.nodes().collect();
    takers.sort_by_key(|node| (loads.fullness(*node, 1), *node));
    for to in takers {
        for from in &givers {
            if !loads.gains(*from, to) {
                break; // those behind it have less
            }
            let movable = map.shards.iter().filter(|shard| {
                shard.pinned.is_empty()
                    && may_move(shard)
                    && shard.replica_on(*from).is_some()
                    && shard.replica_on(to).is_none()
                    && neighbours(map, shard, to, Some(*from)) <= neighbours(map, shard, *from, None)
            });
            if let Some(shard) = movable.max_by_key(|shard| wish(shard.id, to)) {
                return Some((shard.id, *from, to));
            }
        }
    }
    None
}
