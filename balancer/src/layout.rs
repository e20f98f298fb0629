//! The first layout of a cluster: which nodes keep which replicas, and which replica stands for election first. Pure.
//!
//! Placement is rendezvous hashing held in balance: a shard goes to the nodes that have the fewest replicas so far, and
//! among equals to those that want it most. So replicas and leaders are spread evenly whatever the ids are, and the
//! same nodes give the same layout: a bootstrap that was cut short is done again with the same result.

use crate::Bootstrap;
use shkv_proto::hashing::{key_hash, rendezvous_weight};
use shkv_proto::limits::{BATCH_OPS_MAX, MAP_NODES_MAX, MAP_SHARDS_MAX, REPLICAS_MAX};
use shkv_proto::map::{DEFAULT_KEYSPACE, KeyspaceInfo, NodeInfo, Part, ShardInfo};
use shkv_proto::message::CreateReplica;
use shkv_proto::{ClusterId, KeyspaceId, Map, NodeId, ReplicaId, ShardId};
use std::collections::{BTreeMap, VecDeque};

/// Most shards that a bootstrap can make: the whole map is written in one batch, so that it is there or not there.
pub(crate) const BOOTSTRAP_SHARDS_MAX: u32 = 8_000;
const _: () = assert!(BOOTSTRAP_SHARDS_MAX as usize + MAP_NODES_MAX + 3 <= BATCH_OPS_MAX);
const _: () = assert!((BOOTSTRAP_SHARDS_MAX as usize) < MAP_SHARDS_MAX);

/// The first keyspace.
const FIRST_KEYSPACE: KeyspaceId = KeyspaceId(1);

/// Says what is wrong with a wanted layout, in words for whoever asked for it.
pub(crate) fn check(wanted: Bootstrap, nodes: usize) -> Result<(), String> {
    if wanted.replicas == 0 || wanted.shards == 0 {
        return Err("a cluster needs at least one shard and one replica of it".into());
    }
    if nodes == 0 {
        return Err("a cluster needs at least one node".into());
    }
    if wanted.replicas > REPLICAS_MAX {
        return Err(format!("{} replicas of each shard are more than the {REPLICAS_MAX} that can be", wanted.replicas));
    }
    if wanted.shards > BOOTSTRAP_SHARDS_MAX {
        return Err(format!("{} shards are more than the {BOOTSTRAP_SHARDS_MAX} of a first layout", wanted.shards));
    }
    if nodes > MAP_NODES_MAX {
        return Err(format!("{nodes} nodes are more than the {MAP_NODES_MAX} of a cluster"));
    }
    Ok(())
}

/// The map of a new cluster. `nodes` are sorted by id, and [`check`] has passed. Its epoch is that of no map yet.
pub(crate) fn first_map(cluster: ClusterId, nodes: &[NodeInfo], wanted: Bootstrap) -> Map {
    let ids: Vec<NodeId> = nodes.iter().map(|node| node.id).collect();
    let parts = Part::hash_split(wanted.shards);
    // Fewer nodes than copies are wanted: the rest is made when more nodes come.
    let copies = wanted.replicas.min(ids.len() as u32);
    let placed = place(&ids, wanted.shards, copies);
    let mut shards = vec![system_shard(&ids, copies)];
    for ((number, part), homes) in (1..).zip(parts).zip(placed) {
        shards.push(ShardInfo::founded(ShardId(number), FIRST_KEYSPACE, part, &homes));
    }
    let keyspaces = vec![KeyspaceInfo { id: FIRST_KEYSPACE, name: DEFAULT_KEYSPACE.into(), replicas: wanted.replicas }];
    Map {
        nodes: nodes.to_vec(),
        keyspaces,
        shards,
        next_shard: ShardId(wanted.shards + 1),
        next_keyspace: KeyspaceId(FIRST_KEYSPACE.0 + 1),
        ..Map::empty(cluster)
    }
}

/// The system shard: on the first nodes by id.
fn system_shard(nodes: &[NodeId], replicas: u32) -> ShardInfo {
    let homes: Vec<NodeId> = nodes.iter().copied().take(replicas as usize).collect();
    ShardInfo::founded(ShardId::SYSTEM, KeyspaceId::SYSTEM, Part::everything(), &homes)
}

/// What makes the replica of `shard` on `node`; `None` if none belongs there. The first replica of a shard is the one
/// that stands for election at once.
pub(crate) fn creation(cluster: ClusterId, shard: &ShardInfo, node: NodeId) -> Option<CreateReplica> {
    let at = shard.replicas.iter().position(|replica| replica.node == node)?;
    Some(CreateReplica {
        cluster,
        shard: shard.id,
        keyspace: shard.keyspace,
        part: shard.part.clone(),
        replica: shard.replicas[at].id,
        founders: (1..=u64::from(shard.founders)).map(ReplicaId).collect(),
        homes: shard.replicas.iter().map(|replica| (replica.id, replica.node)).collect(),
        // Only while the group is as it was founded: later the others elect whom they want.
        campaign: at == 0 && shard.next_replica.0 == u64::from(shard.founders) + 1,
    })
}

/// The nodes of each shard, the one that should lead it first.
fn place(nodes: &[NodeId], shards: u32, replicas: u32) -> Vec<Vec<NodeId>> {
    let mut kept: BTreeMap<NodeId, u32> = nodes.iter().map(|node| (*node, 0)).collect();
    let mut led = kept.clone();
    let mut placed = Vec::with_capacity(shards as usize);
    for shard in 1..=shards {
        let hash = key_hash(&shard.to_le_bytes());
        let mut order: Vec<NodeId> = nodes.to_vec();
        // Few before many, then eager before reluctant; the id settles the rest, so that there is only one order.
        order.sort_by_key(|node| (kept[node], u64::MAX - rendezvous_weight(hash, node.0), *node));
        order.truncate(replicas as usize);
        order.sort_by_key(|node| (led[node], u64::MAX - rendezvous_weight(hash, node.0), *node));
        for node in &order {
            kept.entry(*node).and_modify(|count| *count += 1);
        }
        led.entry(order[0]).and_modify(|count| *count += 1);
        placed.push(order);
    }
    let moves_max = placed.len();
    for _ in 0..moves_max {
        if !level(&mut placed, &mut led) {
            break;
        }
    }
    placed
}

/// Takes one leadership from a node that has most and gives one to a node that has at least two fewer, by handing on
/// leaderships among replicas on the way. `false` when there is no such way: then they are spread as evenly as can be.
fn level(placed: &mut [Vec<NodeId>], led: &mut BTreeMap<NodeId, u32>) -> bool {
    let most = led.values().copied().max().unwrap_or(0);
    let mut from: BTreeMap<NodeId, Option<(usize, NodeId)>> = BTreeMap::new();
    let mut queue: VecDeque<NodeId> = led.iter().filter(|(_, count)| **count == most).map(|(node, _)| *node).collect();
    from.extend(queue.iter().map(|node| (*node, None)));
    while let Some(node) = queue.pop_front() {
        if led[&node] + 2 <= most {
            *led.entry(node).or_default() += 1;
            let mut taker = node;
            while let Some(Some((shard, giver))) = from.get(&taker).copied() {
                let homes = &mut placed[shard];
                if let Some(at) = homes.iter().position(|home| *home == taker) {
                    homes.swap(0, at);
                }
                taker = giver;
            }
            led.entry(taker).and_modify(|count| *count -= 1);
            return true;
        }
        for (shard, homes) in placed.iter().enumerate().filter(|(_, homes)| homes.first() == Some(&node)) {
            for next in &homes[1..] {
                if !from.contains_key(next) {
                    from.insert(*next, Some((shard, node)));
                    queue.push_back(*next);
                }
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nodes(count: u64) -> Vec<NodeInfo> {
        let info = |n: u64| NodeInfo::new(NodeId(n * 77), format!("Server{n}"), format!("h:{n}"));
        (1..=count).map(info).collect()
    }

    #[test]
    fn replicas_and_leaders_are_spread_evenly() {
        for count in 1..=9_u64 {
            for replicas in 1..=count.min(5) as u32 {
                for shards in [1, 2, 8, 13, 64, 200] {
                    let map = first_map(ClusterId(1), &nodes(count), Bootstrap { shards, replicas });
                    assert_eq!(map.check(), Ok(()));
                    let mut kept: BTreeMap<NodeId, i64> = map.nodes.iter().map(|node| (node.id, 0)).collect();
                    let mut led = kept.clone();
                    for shard in map.shards_of(FIRST_KEYSPACE) {
                        assert_eq!(shard.replicas.len(), replicas as usize);
                        *led.get_mut(&shard.replicas[0].node).unwrap() += 1;
                        for replica in &shard.replicas {
                            *kept.get_mut(&replica.node).unwrap() += 1;
                        }
                    }
                    let spread = |counts: &BTreeMap<NodeId, i64>| {
                        counts.values().max().unwrap() - counts.values().min().unwrap()
                    };
                    let case = format!("{count} nodes, {replicas} replicas, {shards} shards");
                    assert!(spread(&kept) <= 1, "{case}: kept {kept:?}");
                    assert!(spread(&led) <= 1, "{case}: led {led:?}");
                }
            }
        }
    }

    #[test]
    fn what_cannot_be_laid_out_is_refused_in_words() {
        assert!(check(Bootstrap { shards: 8, replicas: 3 }, 0).is_err());
        let error = check(Bootstrap { shards: 8, replicas: 10 }, 20).unwrap_err();
        assert!(error.contains("10") && error.contains("the 9"), "{error}");
        assert!(check(Bootstrap { shards: 0, replicas: 1 }, 1).is_err());
        assert!(check(Bootstrap { shards: BOOTSTRAP_SHARDS_MAX + 1, replicas: 1 }, 1).is_err());
        assert_eq!(check(Bootstrap { shards: 8, replicas: 3 }, 3), Ok(()));
    }

    #[test]
    fn fewer_nodes_than_copies_make_a_cluster_that_can_grow() {
        let map = first_map(ClusterId(1), &nodes(1), Bootstrap { shards: 2, replicas: 3 });
        assert_eq!(map.check(), Ok(()));
        assert!(map.shards.iter().all(|shard| shard.replicas.len() == 1));
        assert_eq!(map.keyspaces[0].replicas, 3);
    }

    #[test]
    fn exactly_one_replica_of_a_shard_stands_for_election() {
        let map = first_map(ClusterId(1), &nodes(4), Bootstrap { shards: 8, replicas: 3 });
        for shard in &map.shards {
            let made: Vec<CreateReplica> =
                map.nodes.iter().filter_map(|node| creation(map.cluster, shard, node.id)).collect();
            assert_eq!(made.len(), 3);
            assert_eq!(made.iter().filter(|create| create.campaign).count(), 1);
            assert!(made.iter().all(|create| create.homes == made[0].homes && create.shard == shard.id));
        }
    }
}
