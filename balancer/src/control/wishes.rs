//! What operators and nodes ask of the cluster, as changes of what the system shard says. Pure.
//!
//! Any balancer may write them: each is conditional on the map that it was thought out on, and makes sense by itself.

use super::place::{self, Loads};
use super::plan::{Seen, free_instance};
use crate::map_rows::{State, Wanted};
use shkv_proto::limits::{
    CAPACITY_MAX, MAP_KEYSPACES_MAX, MAP_NODES_MAX, MAP_SHARDS_MAX, NAME_BYTES_MAX, REPLICAS_MAX,
};
use shkv_proto::map::{DEFAULT_KEYSPACE, KeyspaceInfo, NodeInfo, NodeState, ReplicaInfo, ShardInfo};
use shkv_proto::message::{Failure, Join, NewShard, NodeHealth, RefusalCode};
use shkv_proto::{KeyspaceId, Map, NodeId, ShardId};
use std::collections::BTreeSet;

/// When a node comes back whose name is that of a node that may be down or not.
const SUSPECT_RETRY_MS: u32 = 1_000;
/// Most nodes that one wish is about.
const COUNT_MAX: u32 = MAP_NODES_MAX as u32;
/// Most replicas that the name of a keyspace's shard may be pinned to.
const PINNED_MAX: usize = REPLICAS_MAX as usize;

fn refuse<T>(code: RefusalCode, text: impl Into<String>) -> Result<T, Failure> {
    Err(Failure::refusal(code, text))
}

/// Whether a name can be a node's.
///
/// # Errors
/// What is wrong with it.
pub(crate) fn check_name(name: &str) -> Result<(), Failure> {
    let wrong = |why: &str| refuse(RefusalCode::Malformed, format!("{name:?} is no name for a node: {why}"));
    if name.is_empty() || name.len() > NAME_BYTES_MAX {
        return wrong(&format!("it must have 1 to {NAME_BYTES_MAX} bytes"));
    }
    if name.chars().any(|c| c.is_control() || c.is_whitespace() || c == '/' || c == ':' || c == ',') {
        return wrong("it has a blank, a control character, or one of / : ,");
    }
    if name.starts_with(['.', '-']) {
        return wrong("it begins with a dot or a dash");
    }
    if name.len() == 16 && name.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return wrong("it could be taken for a node's id");
    }
    Ok(())
}

/// The node of this name or id that is still of use.
fn find<'a>(state: &'a State, name: &str) -> Result<&'a NodeInfo, Failure> {
    let is_meant = |node: &&NodeInfo| node.name == name || node.id.to_string() == name;
    let mut found = state.map.nodes.iter().filter(is_meant);
    let is_replaced = |node: &&NodeInfo| matches!(node.state, NodeState::Replaced(_));
    let first = found.clone().find(|node| !is_replaced(node)).or_else(|| found.next());
    first.ok_or_else(|| {
        let names: Vec<&str> = state.map.nodes.iter().map(|node| node.name.as_str()).take(20).collect();
        Failure::refusal(RefusalCode::NotFound, format!("there is no node {name:?}; there are: {}", names.join(", ")))
    })
}

/// More nodes. `random` gives names for those that are not named.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn add(
    state: &mut State,
    seen: &Seen,
    count: u32,
    names: &[String],
    mut random: impl FnMut() -> String,
) -> Result<Vec<String>, Failure> {
    if count == 0 || count > COUNT_MAX {
        return refuse(RefusalCode::Malformed, format!("{count} nodes cannot be added; 1 to {COUNT_MAX} can"));
    }
    if names.len() > count as usize {
        let text = format!("{} names for {count} nodes: name no more than are to be added", names.len());
        return refuse(RefusalCode::Malformed, text);
    }
    if !seen.can_start {
        let text = "this balancer starts no nodes (--spawn none): start one by `shkv node --join`, or ask a balancer that does";
        return refuse(RefusalCode::Unsupported, text);
    }
    let mut chosen: Vec<String> = Vec::new();
    for name in names {
        check_name(name)?;
        if chosen.contains(name) {
            return refuse(RefusalCode::Malformed, format!("{name:?} is named twice"));
        }
        if is_taken(state, name) {
            return refuse(RefusalCode::Exists, format!("there is a node {name:?} already"));
        }
        chosen.push(name.clone());
    }
    if state.map.nodes.len() + state.wanted.len() + count as usize > MAP_NODES_MAX {
        return refuse(RefusalCode::Conflict, format!("a cluster has at most {MAP_NODES_MAX} nodes"));
    }
    while chosen.len() < count as usize {
        let name = random();
        if !chosen.contains(&name) && !is_taken(state, &name) {
            chosen.push(name);
        }
    }
    for name in &chosen {
        let instance = free_instance(state, name, |instance| seen.instances.contains_key(instance));
        state.wanted.insert(name.clone(), Wanted::new(name.clone(), instance));
    }
    Ok(chosen)
}

fn is_taken(state: &State, name: &str) -> bool {
    state.wanted.contains_key(name) || state.map.nodes.iter().any(|node| node.name == name)
}

/// Fewer nodes.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn remove(state: &mut State, seen: &Seen, count: u32, names: &[String]) -> Result<Vec<String>, Failure> {
    if count == 0 || names.len() > count as usize {
        let text =
            format!("{} names for {count} nodes: name no more than are to be removed, and at least one", names.len());
        return refuse(RefusalCode::Malformed, text);
    }
    let mut ids: Vec<NodeId> = Vec::new();
    let mut cancelled: Vec<String> = Vec::new();
    for name in names {
        if state.wanted.contains_key(name) && !state.map.nodes.iter().any(|node| node.name == *name) {
            cancelled.push(name.clone());
            continue;
        }
        let node = find(state, name)?;
        if ids.contains(&node.id) {
            return refuse(RefusalCode::Malformed, format!("{name:?} is named twice"));
        }
        ids.push(node.id);
    }
    let stay = |ids: &[NodeId]| {
        let nodes = state.map.nodes.iter();
        nodes.filter(|node| matches!(node.state, NodeState::Up | NodeState::Joining) && !ids.contains(&node.id)).count()
    };
    let there = stay(&[]);
    let wanted = count as usize - cancelled.len();
    if wanted > there + ids.iter().filter(|id| !is_staying(state, **id)).count() {
        return refuse(RefusalCode::Malformed, format!("{count} nodes cannot be removed, there are only {there}"));
    }
    let mut others: Vec<&NodeInfo> =
        state.map.nodes.iter().filter(|node| is_staying(state, node.id) && !ids.contains(&node.id)).collect();
    let kept = |node: &NodeInfo| state.map.shards.iter().filter(|shard| shard.replica_on(node.id).is_some()).count();
    others.sort_by_key(|node| (kept(node), std::cmp::Reverse(node.id)));
    let more = wanted.saturating_sub(ids.len());
    ids.extend(others.iter().take(more).map(|node| node.id));
    if stay(&ids) == 0 && !ids.is_empty() {
        let text = "that would remove the last node, and with it the last copy of everything; add others first";
        return refuse(RefusalCode::WouldLose, text);
    }
    for id in &ids {
        check_spare(state, seen, *id, &ids)?;
    }
    let mut told = cancelled.clone();
    for name in cancelled {
        if let Some(wanted) = state.wanted.get_mut(&name) {
            wanted.cancelled = true;
            wanted.error = Some("it is wanted no more".into());
        }
    }
    for node in state.map.nodes.iter_mut().filter(|node| ids.contains(&node.id)) {
        node.state = NodeState::Leaving;
        told.push(node.name.clone());
    }
    Ok(told)
}

fn is_staying(state: &State, id: NodeId) -> bool {
    state
        .map
        .node(id)
        .is_some_and(|node| matches!(node.state, NodeState::Up | NodeState::Joining | NodeState::Draining))
}

/// Whether the shards of a node can move: each needs a quorum now, and a live copy that stays or that can be filled from.
fn check_spare(state: &State, seen: &Seen, id: NodeId, going: &[NodeId]) -> Result<(), Failure> {
    let is_live = |node: NodeId| seen.nodes.get(&node).is_some_and(|heard| heard.health != NodeHealth::Down);
    let name = state.map.node(id).map_or_else(|| id.to_string(), |node| node.name.clone());
    for shard in state.map.shards.iter().filter(|shard| shard.replica_on(id).is_some()) {
        let voters = shard.voters().count();
        let live = shard.voters().filter(|home| is_live(home.node)).count();
        if live * 2 <= voters {
            let text = format!(
                "shard {} has no quorum now ({live} of {voters} replicas are heard): removing {name} could cost its last copy; bring its other nodes back first",
                shard.id
            );
            return refuse(RefusalCode::WouldLose, text);
        }
        let takers = state.map.nodes.iter().filter(|node| {
            !going.contains(&node.id) && matches!(node.state, NodeState::Up | NodeState::Joining) && is_live(node.id)
        });
        if takers.count() == 0 {
            let text = format!("no living node is left that could keep shard {} when {name} goes", shard.id);
            return refuse(RefusalCode::WouldLose, text);
        }
    }
    Ok(())
}

/// Moves everything off a node, or lets it be used again.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn drain(state: &mut State, seen: &Seen, name: &str, drain: bool) -> Result<Vec<String>, Failure> {
    let node = find(state, name)?.clone();
    let after = match (node.state, drain) {
        (NodeState::Leaving | NodeState::Replaced(_), _) => {
            let text = format!("{} is leaving the cluster, which cannot be undone", node.name);
            return refuse(RefusalCode::Conflict, text);
        }
        (NodeState::Joining, true) => {
            return refuse(RefusalCode::Conflict, format!("{} has not joined yet; wait until it is up", node.name));
        }
        (NodeState::Up | NodeState::Draining, true) => NodeState::Draining,
        (NodeState::Up | NodeState::Draining, false) => NodeState::Up,
        (NodeState::Joining, false) => NodeState::Joining,
    };
    if after == NodeState::Draining {
        let others = state.map.nodes.iter().filter(|other| other.id != node.id && other.state == NodeState::Up);
        if others.count() == 0 {
            return refuse(RefusalCode::WouldLose, format!("no other node could keep what {} keeps", node.name));
        }
        check_spare(state, seen, node.id, &[node.id])?;
    }
    if let Some(info) = state.map.nodes.iter_mut().find(|info| info.id == node.id) {
        info.state = after;
    }
    Ok(vec![node.name])
}

/// The node that is to lead a shard, and its replica there.
///
/// # Errors
/// Refusals.
pub(crate) fn transfer(
    state: &State,
    seen: &Seen,
    shard: ShardId,
    name: &str,
) -> Result<(String, ReplicaInfo), Failure> {
    let node = find(state, name)?;
    let Some(info) = state.map.shard(shard) else {
        return refuse(RefusalCode::NotFound, format!("there is no shard {shard}"));
    };
    let voter = info.voters().find(|home| home.node == node.id);
    let Some(home) = voter.filter(|home| home.role == shkv_proto::map::ReplicaRole::Voter) else {
        return refuse(
            RefusalCode::Conflict,
            format!("{} keeps no replica of shard {shard} that could lead", node.name),
        );
    };
    if seen.nodes.get(&node.id).is_none_or(|heard| heard.health != NodeHealth::Up) {
        return refuse(RefusalCode::Conflict, format!("{} does not answer", node.name));
    }
    Ok((node.name.clone(), *home))
}

/// A new keyspace. Its shards are placed on nodes that are up, with as many copies as there can be.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn create_keyspace(
    state: &mut State,
    seen: &Seen,
    name: &str,
    replicas: u32,
    shards: &[NewShard],
) -> Result<Vec<String>, Failure> {
    check_name(name)?;
    let map = &state.map;
    if map.keyspace(name).is_some() {
        return refuse(RefusalCode::Exists, format!("there is a keyspace {name:?} already"));
    }
    if replicas == 0 || replicas > REPLICAS_MAX {
        return refuse(RefusalCode::Malformed, format!("{replicas} copies are wanted; 1 to {REPLICAS_MAX} can be"));
    }
    if map.keyspaces.len() >= MAP_KEYSPACES_MAX || map.shards.len() + shards.len() > MAP_SHARDS_MAX {
        let text = format!("a cluster has at most {MAP_KEYSPACES_MAX} keyspaces and {MAP_SHARDS_MAX} shards");
        return refuse(RefusalCode::Conflict, text);
    }
    let id = map.next_keyspace;
    let mut after = place_shards(state, seen, map.clone(), id, replicas, shards)?;
    after.keyspaces.push(KeyspaceInfo { id, name: name.to_owned(), replicas });
    after.next_keyspace = KeyspaceId(id.0 + 1);
    if let Err(why) = after.check() {
        return refuse(RefusalCode::Malformed, format!("keyspace {name:?}: {why}"));
    }
    state.map = after;
    Ok(vec![name.to_owned()])
}

/// The map with new shards of a keyspace, each on nodes that are up.
fn place_shards(
    state: &State,
    seen: &Seen,
    mut after: Map,
    id: KeyspaceId,
    replicas: u32,
    shards: &[NewShard],
) -> Result<Map, Failure> {
    let map = &state.map;
    let is_up = |node: &&NodeInfo| {
        node.state == NodeState::Up && seen.nodes.get(&node.id).is_some_and(|heard| heard.health == NodeHealth::Up)
    };
    let mut anywhere = Loads::of(&after, map.nodes.iter().filter(is_up));
    for (at, new) in shards.iter().enumerate() {
        check_pinned(state, at, new)?;
        let pinned = map.nodes.iter().filter(is_up).filter(|node| new.pinned.contains(&node.name));
        let pinned = if new.pinned.is_empty() { None } else { Some(Loads::of(&after, pinned)) };
        let loads = pinned.as_ref().unwrap_or(&anywhere);
        let count = if new.pinned.is_empty() { replicas as usize } else { new.pinned.len() };
        if loads.len() == 0 {
            return refuse(RefusalCode::Conflict, format!("shard {at}: none of the nodes that could keep it is up"));
        }
        let mut placed = ShardInfo::founded(after.next_shard, id, new.part.clone(), &[]);
        placed.pinned.clone_from(&new.pinned);
        let mut homes = Vec::new();
        while homes.len() < count
            && let Some(node) = place::best(&after, &placed, loads, None)
        {
            homes.push(node);
            placed = ShardInfo { pinned: placed.pinned, ..ShardInfo::founded(placed.id, id, new.part.clone(), &homes) };
        }
        homes.iter().for_each(|node| anywhere.add(*node));
        after.next_shard = ShardId(after.next_shard.0 + 1);
        after.shards.push(placed);
    }
    Ok(after)
}

/// Which nodes are to keep a shard; the controller moves it there.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn pin(state: &mut State, shard: ShardId, nodes: &[String]) -> Result<Vec<String>, Failure> {
    let Some(info) = state.map.shard(shard).filter(|info| info.keyspace != KeyspaceId::SYSTEM) else {
        return refuse(RefusalCode::NotFound, format!("there is no shard {shard} that could be pinned"));
    };
    check_pinned(state, shard.0 as usize, &NewShard { part: info.part.clone(), pinned: nodes.to_vec() })?;
    if let Some(info) = state.map.shards.iter_mut().find(|info| info.id == shard) {
        info.pinned = nodes.to_vec();
    }
    Ok(nodes.to_vec())
}

/// Other shards of a keyspace in place of some.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn recut(
    state: &mut State,
    seen: &Seen,
    name: &str,
    remove: &[ShardId],
    shards: &[NewShard],
) -> Result<Vec<String>, Failure> {
    let Some(keyspace) = state.map.keyspace(name).cloned() else {
        return refuse(RefusalCode::NotFound, format!("there is no keyspace {name:?}"));
    };
    let mut after = state.map.clone();
    for shard in remove {
        if after.shard(*shard).is_none_or(|info| info.keyspace != keyspace.id) {
            return refuse(RefusalCode::NotFound, format!("keyspace {name:?} has no shard {shard}"));
        }
        after.shards.retain(|info| info.id != *shard);
    }
    if after.shards.len() + shards.len() > MAP_SHARDS_MAX {
        return refuse(RefusalCode::Conflict, format!("a cluster has at most {MAP_SHARDS_MAX} shards"));
    }
    let after = place_shards(state, seen, after, keyspace.id, keyspace.replicas, shards)?;
    if let Err(why) = after.check() {
        return refuse(RefusalCode::Malformed, format!("keyspace {name:?}: {why}"));
    }
    state.map = after;
    Ok(vec![name.to_owned()])
}

fn check_pinned(state: &State, at: usize, new: &NewShard) -> Result<(), Failure> {
    if new.pinned.len() > PINNED_MAX {
        return refuse(RefusalCode::Malformed, format!("shard {at} is pinned to more than {PINNED_MAX} nodes"));
    }
    let mut seen = BTreeSet::new();
    for name in &new.pinned {
        find(state, name)?;
        if !seen.insert(name) {
            return refuse(RefusalCode::Malformed, format!("shard {at} is pinned to {name:?} twice"));
        }
    }
    Ok(())
}

/// One keyspace less, with all its rows.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn drop_keyspace(state: &mut State, name: &str) -> Result<Vec<String>, Failure> {
    let Some(id) = state.map.keyspace(name).map(|keyspace| keyspace.id) else {
        return refuse(RefusalCode::NotFound, format!("there is no keyspace {name:?}"));
    };
    if name == DEFAULT_KEYSPACE {
        return refuse(
            RefusalCode::Conflict,
            format!("keyspace {name:?} stays: clients use it unless they name another"),
        );
    }
    state.map.keyspaces.retain(|keyspace| keyspace.id != id);
    state.map.shards.retain(|shard| shard.keyspace != id);
    Ok(vec![name.to_owned()])
}

/// Whether a join needs no dialling: the node is known, and is where it was.
pub(crate) fn is_known(state: &State, join: &Join) -> bool {
    state.map.node(join.id).is_some_and(|node| node.addr == join.addr)
}

/// A node registers, or tells where it is now. `unix_s` is when.
///
/// # Errors
/// Refusals; nothing is changed then.
pub(crate) fn join(state: &mut State, seen: &Seen, join: &Join) -> Result<(), Failure> {
    let cluster = state.map.cluster;
    if join.cluster.is_some_and(|theirs| theirs != cluster) {
        let theirs = join.cluster.map_or(String::new(), |id| id.to_string());
        let text = format!("node {} is of cluster {theirs}, this is cluster {cluster}", join.name);
        return refuse(RefusalCode::WrongCluster, text);
    }
    if let Some(gone) = state.gone.iter().find(|gone| gone.id == join.id) {
        let text = format!("node {} ({}) is of the cluster no more: {}", gone.name, gone.id, gone.reason);
        return refuse(RefusalCode::Retired, text);
    }
    check_name(&join.name)?;
    if join.capacity == 0 || join.capacity > CAPACITY_MAX {
        let text = format!("a capacity of {} is not from 1 to {CAPACITY_MAX}", join.capacity);
        return refuse(RefusalCode::Malformed, text);
    }
    if join.domain.len() > NAME_BYTES_MAX || join.instance.len() > NAME_BYTES_MAX * 2 {
        return refuse(RefusalCode::Malformed, "the failure domain's or the instance's name is too long");
    }
    let is_down = |node: &NodeInfo| seen.nodes.get(&node.id).is_none_or(|heard| heard.health == NodeHealth::Down);
    if let Some(other) =
        state.map.nodes.iter().find(|node| node.addr == join.addr && node.id != join.id && !is_down(node))
    {
        let text =
            format!("{} is where {} ({}) is; two nodes cannot share an address", join.addr, other.name, other.id);
        return refuse(RefusalCode::Conflict, text);
    }
    let known = state.map.node(join.id).map(|node| node.state);
    if let Some(NodeState::Replaced(by)) = known {
        let is_here = |replica: &ReplicaInfo| replica.node == join.id;
        if !state.map.shards.iter().any(|shard| shard.replicas.iter().any(is_here)) {
            let text = format!("node {} ({}) was replaced by node {by}", join.name, join.id);
            return refuse(RefusalCode::Retired, text);
        }
        // Its replicas still count in their groups. It serves with them until they have moved.
        register(state, join, NodeState::Replaced(by));
        return Ok(());
    }
    let is_namesake = |node: &&mut NodeInfo| {
        node.name == join.name && node.id != join.id && !matches!(node.state, NodeState::Replaced(_))
    };
    let namesake = state.map.nodes.iter_mut().find(is_namesake);
    if let Some(other) = namesake {
        let health = seen.nodes.get(&other.id).map_or(NodeHealth::Down, |heard| heard.health);
        if health == NodeHealth::Suspect && known.is_none() {
            let text = format!("node {} ({}) of that name has been silent for a moment", other.name, other.id);
            return Err(Failure::Busy { retry_after_ms: SUSPECT_RETRY_MS, text });
        }
        if health != NodeHealth::Down || known.is_some() {
            let text = format!(
                "there is a node named {} already ({} at {}); choose another name, or stop that one for good",
                other.name, other.id, other.addr
            );
            return refuse(RefusalCode::Exists, text);
        }
    }
    if let Some(before) = known {
        register(state, join, before);
        return Ok(());
    }
    if state.map.nodes.len() >= MAP_NODES_MAX {
        return refuse(RefusalCode::Conflict, format!("a cluster has at most {MAP_NODES_MAX} nodes"));
    }
    if let Some(wanted) = state.wanted.get(&join.name) {
        if wanted.instance != join.instance {
            let text = format!("a node named {} is just being started; choose another name", join.name);
            return refuse(RefusalCode::Exists, text);
        }
        if wanted.cancelled {
            return refuse(RefusalCode::Conflict, format!("a node named {} is wanted no more", join.name));
        }
        state.wanted.remove(&join.name);
    }
    if let Some(other) = state.map.nodes.iter_mut().find(is_namesake) {
        other.state = NodeState::Replaced(join.id);
    }
    let at = state.map.nodes.partition_point(|node| node.id < join.id);
    state.map.nodes.insert(at, info_of(join, NodeState::Joining));
    Ok(())
}

/// Writes down where a node that is known is now.
fn register(state: &mut State, join: &Join, known_as: NodeState) {
    if let Some(node) = state.map.nodes.iter_mut().find(|node| node.id == join.id) {
        *node = info_of(join, known_as);
    }
}

fn info_of(join: &Join, state: NodeState) -> NodeInfo {
    NodeInfo {
        id: join.id,
        name: join.name.clone(),
        addr: join.addr.clone(),
        addr_outside: join.addr_outside.clone(),
        domain: join.domain.clone(),
        capacity: join.capacity,
        instance: join.instance.clone(),
        state,
    }
}
