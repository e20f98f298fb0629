//! From a key to a shard to a replica: shared by balancer and client. No input or output.
//!
//! [`Routes`] is made from a [`Map`] and then never changes, but for its guesses about who leads.

use crate::hashing::{key_hash, rendezvous_order};
use crate::ids::{KeyspaceId, NodeId, ShardId};
use crate::map::{Map, Part, ShardInfo};
use crate::message::Consistency;
use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// A map prepared for look-ups, with a guess for each shard's leader.
#[derive(Debug)]
pub struct Routes {
    map: Map,
    by_keyspace: BTreeMap<KeyspaceId, Parts>,
    /// By position in `map.shards`; 0 is no guess.
    leaders: Vec<AtomicU64>,
}

/// The shards of a keyspace in the order of their parts, by position in `map.shards`.
#[derive(Debug)]
enum Parts {
    Hash(Vec<(u64, usize)>),
    Range(Vec<(Vec<u8>, usize)>),
}

impl Routes {
    /// Prepares a map; guesses about leaders are taken over from `before`.
    #[must_use]
    pub fn new(map: Map, before: Option<&Self>) -> Self {
        let mut by_keyspace: BTreeMap<KeyspaceId, Parts> = BTreeMap::new();
        for (at, shard) in map.shards.iter().enumerate() {
            match &shard.part {
                Part::Hash { low, .. } => {
                    if let Parts::Hash(parts) = by_keyspace.entry(shard.keyspace).or_insert(Parts::Hash(vec![])) {
                        parts.push((*low, at));
                    }
                }
                Part::Range { start, .. } => {
                    if let Parts::Range(parts) = by_keyspace.entry(shard.keyspace).or_insert(Parts::Range(vec![])) {
                        parts.push((start.clone(), at));
                    }
                }
            }
        }
        for parts in by_keyspace.values_mut() {
            match parts {
                Parts::Hash(parts) => parts.sort_unstable(),
                Parts::Range(parts) => parts.sort_unstable(),
            }
        }
        let guess = |shard: &ShardInfo| before.and_then(|routes| routes.leader(shard.id)).map_or(0, |node| node.0);
        let leaders = map.shards.iter().map(|shard| AtomicU64::new(guess(shard))).collect();
        Self { map, by_keyspace, leaders }
    }

    /// The map.
    #[must_use]
    pub fn map(&self) -> &Map {
        &self.map
    }

    /// The shard that holds `key`; `None` if there is no such keyspace.
    #[must_use]
    pub fn shard_of(&self, keyspace: KeyspaceId, key: &[u8]) -> Option<&ShardInfo> {
        let at = match self.by_keyspace.get(&keyspace)? {
            Parts::Hash(parts) => {
                let hash = key_hash(key);
                parts[parts.partition_point(|(low, _)| *low <= hash).checked_sub(1)?].1
            }
            Parts::Range(parts) => parts[parts.partition_point(|(start, _)| start[..] <= *key).checked_sub(1)?].1,
        };
        Some(&self.map.shards[at])
    }

    /// The node that is thought to lead a shard.
    #[must_use]
    pub fn leader(&self, shard: ShardId) -> Option<NodeId> {
        let at = self.position(shard)?;
        match self.leaders[at].load(Ordering::Relaxed) {
            0 => None,
            node => Some(NodeId(node)),
        }
    }

    /// Remembers who leads a shard.
    pub fn note_leader(&self, shard: ShardId, node: NodeId) {
        if let Some(at) = self.position(shard) {
            self.leaders[at].store(node.0, Ordering::Relaxed);
        }
    }

    /// Remembers that `node` does not lead a shard, and who may. Without a hint the replica after it is the next guess, if
    /// `node` was the last one: calls that each have time for one attempt must not all begin with the same silent node.
    pub fn note_not_leader(&self, shard: ShardId, node: NodeId, hint: Option<NodeId>) {
        let Some(at) = self.position(shard) else { return };
        if let Some(hint) = hint.filter(|hint| *hint != node) {
            return self.leaders[at].store(hint.0, Ordering::Relaxed);
        }
        let voters: Vec<NodeId> = self.map.shards[at].voters().map(|replica| replica.node).collect();
        let next = voters.iter().position(|voter| *voter == node).map_or(0, |at| at + 1);
        let guess = voters.get(next % voters.len().max(1)).map_or(0, |node| node.0);
        for before in [node.0, 0] {
            let _ = self.leaders[at].compare_exchange(before, guess, Ordering::Relaxed, Ordering::Relaxed);
        }
    }

    /// The node to send attempt number `tries` (from 1) to.
    ///
    /// Writes and linearizable reads go to the leader, or in turn to each replica while nobody knows it. Other reads go
    /// to the replica that wants the key most, so that the same key meets the same warm cache, then to the others.
    #[must_use]
    pub fn target(&self, shard: &ShardInfo, consistency: Consistency, key: &[u8], tries: u32) -> Option<NodeId> {
        let turn = tries.saturating_sub(1) as usize;
        let voters = || shard.voters().map(|replica| replica.node.0);
        match consistency {
            Consistency::Linearizable => {
                self.leader(shard.id).or_else(|| voters().nth(turn % voters().count().max(1)).map(NodeId))
            }
            Consistency::Causal { .. } | Consistency::Eventual => {
                let order = rendezvous_order(key_hash(key), &voters().collect::<Vec<u64>>());
                order.get(turn % order.len().max(1)).map(|node| NodeId(*node))
            }
        }
    }

    fn position(&self, shard: ShardId) -> Option<usize> {
        self.map.shards.binary_search_by_key(&shard, |info| info.id).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ids::{ClusterId, Epoch};
    use crate::map::{KeyspaceInfo, NodeInfo};

    fn routes(parts: Vec<Part>) -> Routes {
        let count = parts.len() as u32;
        let homes: Vec<NodeId> = (1..=3).map(NodeId).collect();
        let shard = |(n, part)| ShardInfo::founded(ShardId(n), KeyspaceId(1), part, &homes);
        let map = Map {
            epoch: Epoch(1),
            nodes: homes.iter().map(|id| NodeInfo::new(*id, format!("Server{id}"), "")).collect(),
            keyspaces: vec![KeyspaceInfo { id: KeyspaceId(1), name: "default".into(), replicas: 3 }],
            shards: (1..).zip(parts).map(shard).collect(),
            next_shard: ShardId(count + 1),
            next_keyspace: KeyspaceId(2),
            ..Map::empty(ClusterId(1))
        };
        map.check().expect("a sound map");
        Routes::new(map, None)
    }

    #[test]
    fn the_shard_found_holds_the_key() {
        let cut = vec![
            Part::Range { start: vec![], end: Some(b"g".to_vec()) },
            Part::Range { start: b"p".to_vec(), end: None },
            Part::Range { start: b"g".to_vec(), end: Some(b"p".to_vec()) },
        ];
        for routes in [routes(Part::hash_split(8)), routes(cut)] {
            for n in 0..2_000_u32 {
                let key = format!("{}{n}", (b'a' + (n % 26) as u8) as char);
                let shard = routes.shard_of(KeyspaceId(1), key.as_bytes()).expect("a shard");
                assert!(shard.part.holds(key.as_bytes()), "{key}");
            }
            assert!(routes.shard_of(KeyspaceId(2), b"x").is_none());
        }
    }

    #[test]
    fn without_a_leader_each_replica_is_tried_in_turn() {
        let routes = routes(Part::hash_split(1));
        let shard = &routes.map().shards[0];
        let target = |tries| routes.target(shard, Consistency::Linearizable, b"k", tries).expect("a node").0;
        assert_eq!([target(1), target(2), target(3), target(4)], [1, 2, 3, 1]);
        routes.note_leader(shard.id, NodeId(2));
        assert_eq!([target(1), target(2)], [2, 2]);
        routes.note_not_leader(shard.id, NodeId(2), Some(NodeId(3)));
        assert_eq!(target(1), 3);
        routes.note_not_leader(shard.id, NodeId(3), None);
        assert_eq!(target(1), 1, "the one after it");
        routes.note_not_leader(shard.id, NodeId(3), None);
        assert_eq!(target(1), 1, "it was not the guess");
    }

    #[test]
    fn reads_that_need_no_leader_spread_over_the_replicas_by_key() {
        let routes = routes(Part::hash_split(1));
        let shard = &routes.map().shards[0];
        let mut counts = [0_u32; 4];
        for n in 0..3_000_u32 {
            let key = n.to_be_bytes();
            let node = routes.target(shard, Consistency::Eventual, &key, 1).expect("a node");
            assert_eq!(Some(node), routes.target(shard, Consistency::Eventual, &key, 1));
            assert_ne!(Some(node), routes.target(shard, Consistency::Eventual, &key, 2));
            counts[node.0 as usize] += 1;
        }
        assert!(counts[1..].iter().all(|count| (850..1_150).contains(count)), "{counts:?}");
    }
}
