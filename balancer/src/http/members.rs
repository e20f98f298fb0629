//! Who is a member of which shard of the causal store: a row of the store, so that every node says the same. A member is a
//! node under the address by which the others know it; the view is those whose nodes are heard.

#![expect(clippy::disallowed_methods, reason = "a shell: waits for members and replicas")]

use crate::cluster::Cluster;
use crate::http::catalog;
use crate::http::store::{Ask, Store};
use serde::{Deserialize, Serialize};
use shkv_proto::map::{NodeInfo, NodeState, Part, ReplicaRole, ShardInfo};
use shkv_proto::message::{Admin, Failure, NewShard, NodeHealth, RefusalCode};
use shkv_proto::{KeyspaceId, ShardId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// The keyspace of the causal store.
pub(crate) const KEYSPACE: &str = "causal";
/// The row of its members.
const MEMBERS: &[u8] = b"causal";
/// Copies of a shard that has no members of its own.
const REPLICAS: u32 = 3;
/// Most copies of a shard, however many members it has.
const PINNED_MAX: usize = shkv_proto::limits::REPLICAS_MAX as usize;
/// How often a change is begun anew because another one was faster.
const RACES_MAX: u32 = 50;
/// How long one attempt to register may take.
const ATTEMPT_TIME_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(100);

/// What a member is told at its start.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CausalMember {
    /// The name of its node.
    pub node: String,
    /// The address by which it is a member.
    pub address: String,
    /// The addresses of all members.
    pub view: Vec<String>,
    /// How many shards there are; without, it is of none.
    pub shard_count: Option<u32>,
}

/// The members.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Members {
    /// The members of each shard, by address.
    pub(crate) shards: Vec<Vec<String>>,
    /// Each address, with the name of its node, if a node has said that it is this one.
    pub(crate) nodes: BTreeMap<String, Option<String>>,
    /// Addresses that were taken out of the view and have not come back.
    pub(crate) hidden: Vec<String>,
}

/// The node of a name that is not about to go.
fn node_of<'a>(map: &'a shkv_proto::Map, name: &str) -> Option<&'a NodeInfo> {
    map.nodes.iter().find(|node| node.name == name && !matches!(node.state, NodeState::Replaced(_)))
}

fn is_heard(cluster: &Cluster, node: &NodeInfo) -> bool {
    cluster.health(|health, now| health.of(node.id, now)) != NodeHealth::Down
}

impl Members {
    /// The addresses that are in the view: members whose nodes are heard, and those that were added by hand. Without
    /// any member all nodes that are heard, where they listen.
    pub(crate) fn view(&self, cluster: &Cluster) -> Vec<String> {
        let routes = cluster.routes();
        let map = routes.map();
        if self.nodes.is_empty() {
            let mut heard: Vec<String> =
                map.nodes.iter().filter(|node| is_heard(cluster, node)).map(|node| node.addr.clone()).collect();
            heard.retain(|address| !self.hidden.contains(address));
            heard.sort();
            return heard;
        }
        let is_there = |name: &Option<String>| {
            name.as_ref().is_none_or(|name| node_of(map, name).is_some_and(|node| is_heard(cluster, node)))
        };
        let there = self.nodes.iter().filter(|(address, name)| is_there(name) && !self.hidden.contains(address));
        there.map(|(address, _)| address.clone()).collect()
    }

    /// The address of a node.
    pub(crate) fn address_of(&self, node: &NodeInfo) -> String {
        let ours = self.nodes.iter().find(|(_, name)| name.as_deref() == Some(&node.name));
        ours.map_or_else(|| node.addr.clone(), |(address, _)| address.clone())
    }

    /// The members of each shard, by address. Where nobody was told to which shard it belongs, those that keep it.
    pub(crate) fn by_shard(&self, cluster: &Cluster, keyspace: KeyspaceId) -> Vec<Vec<String>> {
        if !self.shards.is_empty() {
            return self.shards.clone();
        }
        let routes = cluster.routes();
        let map = routes.map();
        let of = |shard: &ShardInfo| {
            let homes = shard.voters().filter_map(|home| map.node(home.node));
            let mut addresses: Vec<String> = homes.map(|node| self.address_of(node)).collect();
            addresses.sort();
            addresses
        };
        parts(map, keyspace).into_iter().map(of).collect()
    }
}

/// The shards of the keyspace in the order of their parts: the first is shard 1.
pub(crate) fn parts(map: &shkv_proto::Map, keyspace: KeyspaceId) -> Vec<&ShardInfo> {
    let mut shards: Vec<&ShardInfo> = map.shards_of(keyspace).collect();
    shards.sort_by_key(|shard| match &shard.part {
        Part::Hash { low, .. } => *low,
        Part::Range { .. } => 0,
    });
    shards
}

/// The members as the store has them.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn read(store: &Store, ask: &Ask) -> Result<Members, Failure> {
    Ok(catalog::read_row(store, MEMBERS, ask).await?.0)
}

/// Changes the members, thought out on what they are now; again if that has changed meanwhile.
///
/// # Errors
/// What `think` refuses, and [`Failure`].
pub(crate) async fn change<T, E: From<Failure>>(
    store: &Store,
    ask: &Ask,
    mut think: impl FnMut(&mut Members) -> Result<T, E>,
) -> Result<T, E> {
    for _ in 0..RACES_MAX {
        let (before, version): (Members, _) = catalog::read_row(store, MEMBERS, ask).await?;
        let mut after = before.clone();
        let thought = think(&mut after)?;
        if after == before {
            return Ok(thought);
        }
        match catalog::write_row(store, MEMBERS, &after, version, ask).await {
            Ok(()) => return Ok(thought),
            Err(Failure::Condition { .. }) => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Err(Failure::Aborted { text: "the members kept changing".into() }.into())
}

/// The keyspace. While nobody has said how many shards there are to be, it has one.
///
/// # Errors
/// [`Failure`]; busy while the members of the shards are still coming.
pub(crate) async fn keyspace(store: &Store, ask: &Ask) -> Result<KeyspaceId, Failure> {
    match store.keyspace(KEYSPACE) {
        Err(Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }) => {}
        known => return known,
    }
    let members = read(store, ask).await?;
    if members.shards.is_empty() {
        store.ensure_hashed(KEYSPACE, 1, REPLICAS).await
    } else {
        found(store, &members).await
    }
}

/// Makes the keyspace of shards that have members, once all of those are there.
async fn found(store: &Store, members: &Members) -> Result<KeyspaceId, Failure> {
    let mut pinned = Vec::new();
    for shard in &members.shards {
        pinned.push(pinned_of(store, members, shard)?);
    }
    let parts = Part::hash_split(members.shards.len() as u32);
    let shards = || parts.into_iter().zip(pinned).map(|(part, pinned)| NewShard { part, pinned }).collect();
    store.ensure_keyspace(KEYSPACE, shards, REPLICAS).await
}

/// The nodes that keep the shard of these members.
fn pinned_of(store: &Store, members: &Members, addresses: &[String]) -> Result<Vec<String>, Failure> {
    let routes = store.routes();
    let mut names = Vec::new();
    for address in addresses.iter().take(PINNED_MAX) {
        let name = members.nodes.get(address).cloned().flatten();
        let is_up = |name: &String| {
            let node = node_of(routes.map(), name).filter(|node| node.state == NodeState::Up);
            node.is_some_and(|node| is_heard(store.cluster(), node))
        };
        let text = || format!("the member {address} is not there yet");
        let name = name.filter(is_up).ok_or_else(|| Failure::Busy { retry_after_ms: 500, text: text() })?;
        names.push(name);
    }
    Ok(names)
}

/// Makes a node a member of a shard, and waits until it keeps a copy of it.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn settle(store: &Store, shard: usize, ask: &Ask) -> Result<(), Failure> {
    let keyspace = keyspace(store, ask).await?;
    let members = read(store, ask).await?;
    let addresses = members.shards.get(shard).cloned().unwrap_or_default();
    let names = loop {
        match pinned_of(store, &members, &addresses) {
            // One that has just come is in the view before every balancer hears it.
            Err(Failure::Busy { .. }) if Instant::now() < ask.deadline => tokio::time::sleep(LOOK_EVERY).await,
            known => break known?,
        }
    };
    let id: Option<ShardId> = parts(store.routes().map(), keyspace).get(shard).map(|info| info.id);
    let id = id.ok_or_else(|| Failure::refusal(RefusalCode::NotFound, "there is no such shard"))?;
    store.admin(Admin::Pin { shard: id, nodes: names.clone() }).await?;
    loop {
        if keep(store, id, &names) {
            return Ok(());
        }
        if Instant::now() >= ask.deadline {
            let text = format!("shard {} is not yet whole at its new member", shard + 1);
            return Err(Failure::Busy { retry_after_ms: 1_000, text });
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Whether all these nodes keep a shard.
fn keep(store: &Store, shard: ShardId, names: &[String]) -> bool {
    let routes = store.routes();
    let map = routes.map();
    names.iter().all(|name| {
        let node = node_of(map, name);
        let home = node.and_then(|node| map.shard(shard)?.replica_on(node.id));
        home.is_some_and(|home| home.role == ReplicaRole::Voter)
    })
}

/// Whether a member keeps the shard that it is of: not yet, if what made it a member came to its end too early.
pub(crate) fn is_settled(store: &Store, keyspace: KeyspaceId, members: &Members, shard: usize, address: &str) -> bool {
    let place = members.shards.get(shard).and_then(|shard| shard.iter().position(|one| one == address));
    if place.is_none_or(|place| place >= PINNED_MAX) {
        return true; // it keeps no copy: there are as many as there can be
    }
    let name = members.nodes.get(address).cloned().flatten();
    let id = parts(store.routes().map(), keyspace).get(shard).map(|info| info.id);
    name.zip(id).is_some_and(|(name, id)| keep(store, id, &[name]))
}

/// Registers a member until it is one, and makes the keyspace once all members are there.
pub(crate) async fn announce(cluster: Arc<Cluster>, store: Store, me: CausalMember) {
    let stop = cluster.stop.clone();
    let working = async {
        while let Err(failure) = register(&store, &me).await {
            tracing::debug!(%failure, address = me.address, "not yet a member");
            tokio::time::sleep(LOOK_EVERY).await;
        }
        tracing::info!(address = me.address, node = me.node, "is a member of the causal store");
        while me.shard_count.is_some()
            && let Err(failure) = keyspace(&store, &Ask::within(ATTEMPT_TIME_MAX)).await
        {
            tracing::debug!(%failure, "the causal store is not made yet");
            tokio::time::sleep(LOOK_EVERY).await;
        }
    };
    stop.run_until_cancelled(working).await;
}

async fn register(store: &Store, me: &CausalMember) -> Result<(), Failure> {
    let ask = Ask::within(ATTEMPT_TIME_MAX);
    let is_made = store.keyspace(KEYSPACE).is_ok();
    change(store, &ask, |members| {
        members.nodes.insert(me.address.clone(), Some(me.node.clone()));
        members.hidden.retain(|address| *address != me.address);
        if let Some(count) = me.shard_count.filter(|_| members.shards.is_empty() && !is_made) {
            members.shards = dealt(&me.view, count);
        }
        Ok::<(), Failure>(())
    })
    .await
}

/// Deals the members out to so many shards: every node comes to the same by itself.
fn dealt(view: &[String], count: u32) -> Vec<Vec<String>> {
    let mut sorted = view.to_vec();
    sorted.sort();
    sorted.dedup();
    let mut shards = vec![Vec::new(); count as usize];
    for (at, address) in sorted.into_iter().enumerate() {
        shards[at % count as usize].push(address);
    }
    shards
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn members_are_dealt_out_evenly_whatever_their_order() {
        let view = |order: &[u32]| order.iter().map(|n| format!("10.10.0.{n}:8080")).collect::<Vec<_>>();
        let shards = dealt(&view(&[5, 2, 3, 7, 4, 6]), 2);
        assert_eq!(shards, dealt(&view(&[2, 3, 4, 5, 6, 7]), 2));
        assert_eq!(shards[0], view(&[2, 4, 6]));
        assert_eq!(shards[1], view(&[3, 5, 7]));
    }
}
