//! The shard map: which keyspaces there are, how each is cut into shards, and where the replicas of each shard live.
//!
//! It is stored in the system shard; what travels in messages is a copy with its [`Epoch`]. Pure data and look-ups.

use crate::hashing::key_hash;
use crate::ids::{ClusterId, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use crate::limits::{CAPACITY_USUAL, MAP_KEYSPACES_MAX, MAP_NODES_MAX, MAP_SHARDS_MAX};
use serde::{Deserialize, Serialize};

/// The keyspace that the command line and `Client` use unless another is named.
pub const DEFAULT_KEYSPACE: &str = "default";

/// A copy of the cluster's metadata.
///
/// Invariants, checked by [`Map::check`]: nodes, keyspaces and shards are sorted by id; the shards of a keyspace are of
/// one kind of part, adjoin and cover all keys; a shard has at least one replica that votes, no two on one node, and
/// none whose id is not below `next_replica`; ids of shards and keyspaces are below `next_shard` and `next_keyspace`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Map {
    /// The cluster that it describes.
    pub cluster: ClusterId,
    /// Its age.
    pub epoch: Epoch,
    /// The nodes, sorted by id.
    pub nodes: Vec<NodeInfo>,
    /// The keyspaces, sorted by id; the system keyspace is not listed.
    pub keyspaces: Vec<KeyspaceInfo>,
    /// The shards, sorted by id, the system shard first.
    pub shards: Vec<ShardInfo>,
    /// The id of the next shard: a lower one that is not listed was dropped.
    pub next_shard: ShardId,
    /// The id of the next keyspace.
    pub next_keyspace: KeyspaceId,
}

/// A node as the map knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeInfo {
    /// Its identity.
    pub id: NodeId,
    /// A label such as `Server0`.
    pub name: String,
    /// Where other members reach its protocol listener, as `host:port`.
    pub addr: String,
    /// Where clients outside of the members' network reach it, if that differs.
    pub addr_outside: Option<String>,
    /// What fails together with it: a rack, a zone. Empty says nothing. Replicas of a shard avoid sharing one.
    pub domain: String,
    /// How much it takes compared to others; 100 is usual.
    pub capacity: u32,
    /// By which name its provisioner knows it; empty if it was started by hand.
    pub instance: String,
    /// What is to become of it.
    pub state: NodeState,
}

/// What is to become of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum NodeState {
    /// It has registered, and has not been heard as a member yet.
    Joining,
    /// It keeps replicas.
    Up,
    /// Its replicas move elsewhere.
    Draining,
    /// Its replicas move elsewhere, and then it is of the cluster no more.
    Leaving,
    /// Another node of its name has taken its place: its replicas move there, and then it is of the cluster no more.
    Replaced(NodeId),
}

impl NodeInfo {
    /// A node of usual capacity, started by hand.
    #[must_use]
    pub fn new(id: NodeId, name: impl Into<String>, addr: impl Into<String>) -> Self {
        Self {
            id,
            name: name.into(),
            addr: addr.into(),
            addr_outside: None,
            domain: String::new(),
            capacity: CAPACITY_USUAL,
            instance: String::new(),
            state: NodeState::Up,
        }
    }
}

/// A named map of bytes to bytes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct KeyspaceInfo {
    /// Its identity.
    pub id: KeyspaceId,
    /// Its name.
    pub name: String,
    /// Copies of each of its shards that are wanted; there are fewer while there are fewer nodes.
    pub replicas: u32,
}

/// A part of a keyspace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Part {
    /// Keys from `start` up to but not including `end`; no end means to the last key.
    Range {
        /// First key.
        start: Vec<u8>,
        /// First key that is not of the part.
        end: Option<Vec<u8>>,
    },
    /// Keys whose [`key_hash`] is from `low` to `high`, both included.
    Hash {
        /// Lowest hash.
        low: u64,
        /// Highest hash.
        high: u64,
    },
}

impl Part {
    /// The part that holds every key.
    #[must_use]
    pub fn everything() -> Self {
        Self::Range { start: Vec::new(), end: None }
    }

    /// Whether `key` belongs to it.
    #[must_use]
    pub fn holds(&self, key: &[u8]) -> bool {
        match self {
            Self::Range { start, end } => key >= &start[..] && end.as_deref().is_none_or(|end| key < end),
            Self::Hash { low, high } => (*low..=*high).contains(&key_hash(key)),
        }
    }

    /// The hash ranges that cut all hashes into `count` equal parts.
    #[must_use]
    pub fn hash_split(count: u32) -> Vec<Self> {
        let bound = |n: u32| ((u128::from(n) << 64) / u128::from(count)) as u64;
        (0..count)
            .map(|n| Self::Hash { low: bound(n), high: if n + 1 == count { u64::MAX } else { bound(n + 1) - 1 } })
            .collect()
    }
}

/// A shard as the map knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ShardInfo {
    /// Its identity.
    pub id: ShardId,
    /// The keyspace that it is a part of.
    pub keyspace: KeyspaceId,
    /// The part.
    pub part: Part,
    /// Its replicas.
    pub replicas: Vec<ReplicaInfo>,
    /// The replicas 1 to this number were the voters with which its Raft group began.
    pub founders: u32,
    /// The id of the next replica: a lower one that is not listed was removed.
    pub next_replica: ReplicaId,
    /// Names of the nodes that are to keep it; empty leaves that to the balancer.
    pub pinned: Vec<String>,
}

impl ShardInfo {
    /// A shard whose group begins with these replicas, numbered from 1.
    #[must_use]
    pub fn founded(id: ShardId, keyspace: KeyspaceId, part: Part, homes: &[NodeId]) -> Self {
        let voter =
            |(node, id): (&NodeId, u64)| ReplicaInfo { id: ReplicaId(id), node: *node, role: ReplicaRole::Voter };
        let count = homes.len() as u32;
        Self {
            id,
            keyspace,
            part,
            replicas: homes.iter().zip(1..).map(voter).collect(),
            founders: count,
            next_replica: ReplicaId(u64::from(count) + 1),
            pinned: vec![],
        }
    }

    /// The replicas that vote: those that may lead and that answer reads.
    pub fn voters(&self) -> impl Iterator<Item = &ReplicaInfo> {
        self.replicas.iter().filter(|replica| replica.role != ReplicaRole::Learner)
    }

    /// The replica on a node.
    #[must_use]
    pub fn replica_on(&self, node: NodeId) -> Option<&ReplicaInfo> {
        self.replicas.iter().find(|replica| replica.node == node)
    }
}

/// A replica of a shard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaInfo {
    /// Its identity in the shard's Raft group.
    pub id: ReplicaId,
    /// The node that keeps it.
    pub node: NodeId,
    /// Its part in the group.
    pub role: ReplicaRole,
}

/// What a replica does in its group.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ReplicaRole {
    /// It votes.
    Voter,
    /// It is being filled and does not vote yet.
    Learner,
    /// It votes until a learner can take its place.
    Leaving,
}

impl Map {
    /// A map of nothing, of no epoch.
    #[must_use]
    pub fn empty(cluster: ClusterId) -> Self {
        Self {
            cluster,
            epoch: Epoch::NONE,
            nodes: vec![],
            keyspaces: vec![],
            shards: vec![],
            next_shard: ShardId(0),
            next_keyspace: KeyspaceId(0),
        }
    }

    /// The node of this id.
    #[must_use]
    pub fn node(&self, id: NodeId) -> Option<&NodeInfo> {
        self.nodes.binary_search_by_key(&id, |node| node.id).ok().map(|at| &self.nodes[at])
    }

    /// The shard of this id.
    #[must_use]
    pub fn shard(&self, id: ShardId) -> Option<&ShardInfo> {
        self.shards.binary_search_by_key(&id, |shard| shard.id).ok().map(|at| &self.shards[at])
    }

    /// The keyspace of this name.
    #[must_use]
    pub fn keyspace(&self, name: &str) -> Option<&KeyspaceInfo> {
        self.keyspaces.iter().find(|keyspace| keyspace.name == name)
    }

    /// The shards of a keyspace.
    pub fn shards_of(&self, keyspace: KeyspaceId) -> impl Iterator<Item = &ShardInfo> {
        self.shards.iter().filter(move |shard| shard.keyspace == keyspace)
    }

    /// Says which invariant is broken, if one is. A map from a peer is checked before it is used.
    ///
    /// # Errors
    /// The broken invariant, in words.
    pub fn check(&self) -> Result<(), String> {
        let (nodes, keyspaces, shards) = (self.nodes.len(), self.keyspaces.len(), self.shards.len());
        if nodes > MAP_NODES_MAX || keyspaces > MAP_KEYSPACES_MAX || shards > MAP_SHARDS_MAX {
            return Err(format!(
                "a map of {nodes} nodes, {keyspaces} keyspaces and {shards} shards is over the limits"
            ));
        }
        if !self.nodes.is_sorted_by(|a, b| a.id < b.id)
            || !self.keyspaces.is_sorted_by(|a, b| a.id < b.id)
            || !self.shards.is_sorted_by(|a, b| a.id < b.id)
        {
            return Err("nodes, keyspaces or shards are not sorted by id".into());
        }
        if self.shards.last().is_some_and(|last| last.id >= self.next_shard)
            || self.keyspaces.last().is_some_and(|last| last.id >= self.next_keyspace)
        {
            return Err("a shard or a keyspace has an id that is to be given to the next one".into());
        }
        for shard in &self.shards {
            if shard.voters().next().is_none() {
                return Err(format!("shard {} has no replica that votes", shard.id));
            }
            if shard.replicas.iter().any(|replica| replica.id >= shard.next_replica) {
                return Err(format!("shard {} has a replica of an id that is to be given to the next one", shard.id));
            }
            for (at, replica) in shard.replicas.iter().enumerate() {
                if self.node(replica.node).is_none() {
                    return Err(format!("shard {} has a replica on unknown node {}", shard.id, replica.node));
                }
                if shard.replicas[..at].iter().any(|other| other.node == replica.node) {
                    return Err(format!("shard {} has two replicas on node {}", shard.id, replica.node));
                }
            }
        }
        for keyspace in &self.keyspaces {
            self.check_cover(keyspace)?;
        }
        Ok(())
    }

    fn check_cover(&self, keyspace: &KeyspaceInfo) -> Result<(), String> {
        let parts: Vec<&Part> = self.shards_of(keyspace.id).map(|shard| &shard.part).collect();
        let mut hashes = Vec::new();
        let mut ranges = Vec::new();
        for part in &parts {
            match part {
                Part::Hash { low, high } => hashes.push((*low, *high)),
                Part::Range { start, end } => ranges.push((start, end)),
            }
        }
        hashes.sort_unstable();
        ranges.sort_unstable();
        let hash_cover = hashes.first().is_some_and(|first| first.0 == 0)
            && hashes.last().is_some_and(|last| last.1 == u64::MAX)
            && hashes.windows(2).all(|pair| pair[0].1.checked_add(1) == Some(pair[1].0));
        let range_cover = ranges.first().is_some_and(|first| first.0.is_empty())
            && ranges.last().is_some_and(|last| last.1.is_none())
            && ranges.windows(2).all(|pair| pair[0].1.as_ref() == Some(pair[1].0));
        if (hash_cover && ranges.is_empty()) || (range_cover && hashes.is_empty()) {
            return Ok(());
        }
        Err(format!("the shards of keyspace {} leave a gap or overlap", keyspace.name))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_key_has_exactly_one_part_of_a_hash_split() {
        for count in [1, 2, 3, 7, 8, 64] {
            let parts = Part::hash_split(count);
            for n in 0..1_000_u32 {
                let key = n.to_be_bytes();
                assert_eq!(parts.iter().filter(|part| part.holds(&key)).count(), 1, "{count} parts, key {n}");
            }
        }
    }

    fn map(parts: Vec<Part>) -> Map {
        let count = parts.len() as u32;
        let shard = |(n, part)| ShardInfo::founded(ShardId(n), KeyspaceId(1), part, &[NodeId(1)]);
        Map {
            epoch: Epoch(1),
            nodes: vec![NodeInfo::new(NodeId(1), "a", "127.0.0.1:1")],
            keyspaces: vec![KeyspaceInfo { id: KeyspaceId(1), name: "default".into(), replicas: 1 }],
            shards: (1..).zip(parts).map(shard).collect(),
            next_shard: ShardId(count + 1),
            next_keyspace: KeyspaceId(2),
            ..Map::empty(ClusterId(1))
        }
    }

    #[test]
    fn a_map_with_a_gap_or_a_stranger_is_refused() {
        assert_eq!(map(Part::hash_split(8)).check(), Ok(()));
        assert_eq!(map(vec![Part::everything()]).check(), Ok(()));
        let mut gap = Part::hash_split(4);
        gap.remove(2);
        assert!(map(gap).check().is_err());
        let overlap = vec![Part::everything(), Part::everything()];
        assert!(map(overlap).check().is_err());
        let mut stranger = map(Part::hash_split(2));
        stranger.shards[0].replicas[0].node = NodeId(9);
        assert!(stranger.check().is_err());
        let mut voteless = map(Part::hash_split(2));
        voteless.shards[0].replicas[0].role = ReplicaRole::Learner;
        assert!(voteless.check().is_err());
        let mut again = map(Part::hash_split(2));
        again.shards[1].next_replica = ReplicaId(1);
        assert!(again.check().is_err(), "an id would be given twice");
    }
}
