//! What the controller does next. Pure: from what the system shard says and what is heard of the nodes follow a change of
//! what the system shard says, and things to do that follow from what it said already.
//!
//! A replica moves in steps, each written into the map before it is done, so that whoever controls the cluster next goes on
//! from there: a learner is added and the one that it replaces marked as leaving; the learner is made on its node; the
//! group takes it in; it is filled; in one joint step the group promotes it and removes the other (Ongaro and Ousterhout,
//! "In search of an understandable consensus algorithm", 2014, section 6); the map says so; what was left behind is
//! deleted. Each step may be done again, and none is begun while the group has not finished the one before.

use super::place::{self, Loads};
use crate::map_rows::{State, Wanted};
use shkv_proto::map::{NodeInfo, NodeState, ReplicaInfo, ReplicaRole, ShardInfo};
use shkv_proto::message::{ChangeReplicas, Gone, GroupStatus, NodeHealth, NodeStatus, ReplicaStatus};
use shkv_proto::{KeyspaceId, Map, NodeId, ReplicaId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

/// Learners that are being filled at the same time, in all.
const MOVES_MAX: usize = 32;
/// The same on one node.
const MOVES_PER_NODE_MAX: usize = 4;
/// Log entries that a learner may be behind when it is promoted.
const CAUGHT_UP_ENTRIES: u64 = 64;
/// How much longer than `replace_after` a node that is to be replaced by a new one is waited for, before its replicas move
/// to others: the new one has to start first.
const REPLACEMENT_TIME: Duration = Duration::from_secs(60);
/// Copies of the system shard that are wanted at least.
const SYSTEM_REPLICAS_MIN: u32 = 3;
/// For how many seconds an instance whose node is gone is removed although it is not listed.
const REMOVED_WITHIN_S: u64 = 600;
/// Leaderships that are moved in one round.
const TRANSFERS_MAX: usize = 2;

/// What is heard of a node.
#[derive(Clone, Debug)]
pub(crate) struct Heard {
    /// How it fares.
    pub(crate) health: NodeHealth,
    /// For how long it has been silent, as far as this balancer could have heard it.
    pub(crate) silent: Duration,
    /// Its last words, however old.
    pub(crate) status: Option<NodeStatus>,
}

/// What is heard, and what can be done.
#[derive(Clone, Debug, Default)]
pub(crate) struct Seen {
    /// The nodes.
    pub(crate) nodes: BTreeMap<NodeId, Heard>,
    /// Instances that the provisioner knows, with whether they run.
    pub(crate) instances: BTreeMap<String, bool>,
    /// Whether the provisioner can start nodes.
    pub(crate) can_start: bool,
    /// How long a node must have been silent before it is replaced.
    pub(crate) replace_after: Duration,
    /// Now, in seconds since 1970, for what is told to people.
    pub(crate) unix_s: u64,
}

/// Something to be done at a node or by the provisioner.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) enum Step {
    /// Make the replica of a shard on a node.
    Create(ShardId, NodeId),
    /// Tell the leader to take a step.
    Change(ShardId, NodeId, ChangeReplicas),
    /// Tell the leader to give its leadership to a replica.
    Transfer(ShardId, NodeId, ReplicaId),
    /// Delete a replica that is no longer of its shard.
    Remove(ShardId, NodeId, ReplicaId),
    /// Start a node that is wanted.
    Start(String),
    /// Remove an instance whose node is of the cluster no more.
    RemoveInstance(String),
}

/// What is next.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    /// What the system shard should say; the same as before if nothing changes.
    pub(crate) after: State,
    /// What to do, by what it says already.
    pub(crate) steps: Vec<Step>,
}

/// What is next.
pub(crate) fn plan(before: &State, seen: &Seen) -> Plan {
    let nodes = before.map.nodes.iter();
    let emptying: BTreeSet<NodeId> = nodes.clone().filter(|node| must_empty(node, seen)).map(|node| node.id).collect();
    let homes = before.map.shards.iter().flat_map(|shard| &shard.replicas);
    let keeping = homes.map(|home| home.node).collect();
    // Nodes that are only silent count: a copy there is worth more than none, as long as nobody else can take it. Nodes
    // that are just coming do, too: a copy must not be given up that one of them is about to take.
    let is_able = |node: &&NodeInfo| match node.state {
        NodeState::Up => true,
        NodeState::Joining => !emptying.contains(&node.id),
        NodeState::Draining | NodeState::Leaving | NodeState::Replaced(_) => false,
    };
    let able = nodes.filter(is_able).count().max(1);
    let mut said: BTreeMap<ShardId, Vec<(NodeId, &ReplicaStatus)>> = BTreeMap::new();
    for (node, heard) in seen.nodes.iter().filter(|(_, heard)| heard.health == NodeHealth::Up) {
        for here in heard.status.iter().flat_map(|status| &status.replicas) {
            said.entry(here.shard).or_default().push((*node, here));
        }
    }
    let mut planner = Planner { seen, before, after: before.clone(), steps: vec![], said, emptying, keeping, able };
    planner.nodes();
    let mut filling = planner.filling();
    for shard in &before.map.shards {
        planner.shard(shard, &mut filling);
    }
    planner.even_out(&mut filling);
    planner.strays();
    if planner.after.map == before.map && planner.steps.is_empty() {
        planner.leaders();
    }
    planner.instances();
    Plan { after: planner.after, steps: planner.steps }
}

/// Copies of a shard that are wanted, however many nodes there are.
pub(crate) fn wanted_copies(map: &Map, shard: &ShardInfo) -> usize {
    if !shard.pinned.is_empty() {
        return shard.pinned.len();
    }
    if shard.keyspace == KeyspaceId::SYSTEM {
        let most = map.keyspaces.iter().map(|keyspace| keyspace.replicas).max().unwrap_or(0);
        return most.max(SYSTEM_REPLICAS_MIN) as usize;
    }
    map.keyspaces.iter().find(|keyspace| keyspace.id == shard.keyspace).map_or(1, |found| found.replicas as usize)
}

/// Whether a new node would be started in a node's place.
fn is_replaceable(node: &NodeInfo, seen: &Seen) -> bool {
    seen.can_start && (!node.instance.is_empty() || seen.instances.contains_key(&node.name))
}

fn is_silent(node: NodeId, seen: &Seen, than: Duration) -> bool {
    seen.nodes.get(&node).is_none_or(|heard| heard.health == NodeHealth::Down && heard.silent >= than)
}

/// Whether the replicas of a node are to move elsewhere.
fn must_empty(node: &NodeInfo, seen: &Seen) -> bool {
    match node.state {
        NodeState::Draining | NodeState::Leaving | NodeState::Replaced(_) => true,
        NodeState::Joining | NodeState::Up => {
            let more = if is_replaceable(node, seen) { REPLACEMENT_TIME } else { Duration::ZERO };
            is_silent(node.id, seen, seen.replace_after + more)
        }
    }
}

struct Planner<'a> {
    seen: &'a Seen,
    before: &'a State,
    after: State,
    steps: Vec<Step>,
    /// What nodes that are up say of their replicas, by shard.
    said: BTreeMap<ShardId, Vec<(NodeId, &'a ReplicaStatus)>>,
    /// Nodes whose replicas are to move elsewhere.
    emptying: BTreeSet<NodeId>,
    /// Nodes that the map says keep replicas.
    keeping: BTreeSet<NodeId>,
    /// How many nodes there are to keep copies.
    able: usize,
}

/// The leader of a shard, and its group as it sees it.
struct Led<'a> {
    node: NodeId,
    replica: ReplicaId,
    committed: u64,
    group: &'a GroupStatus,
}

impl Led<'_> {
    /// Whether a replica is of the group.
    fn has(&self, id: ReplicaId) -> bool {
        self.group.voters.contains(&id) || self.group.learners.contains(&id) || self.group.outgoing.contains(&id)
    }

    /// Up to where a replica is known to have the log.
    fn matched(&self, id: ReplicaId) -> u64 {
        self.group.matched.iter().find(|(other, _)| *other == id).map_or(0, |(_, index)| *index)
    }

    /// Whether a replica has as good as all of the log. One that has answered nothing yet has not, however short it is.
    fn is_filled(&self, id: ReplicaId) -> bool {
        let matched = self.matched(id);
        matched > 0 && matched + CAUGHT_UP_ENTRIES >= self.committed
    }
}

impl<'a> Planner<'a> {
    fn health(&self, node: NodeId) -> NodeHealth {
        self.seen.nodes.get(&node).map_or(NodeHealth::Down, |heard| heard.health)
    }

    fn is_up(&self, node: NodeId) -> bool {
        self.health(node) == NodeHealth::Up
    }

    fn must_empty(&self, node: &NodeInfo) -> bool {
        self.emptying.contains(&node.id)
    }

    /// Whether replicas may be placed on a node.
    fn may_take(&self, node: &NodeInfo) -> bool {
        node.state == NodeState::Up && self.is_up(node.id)
    }

    fn loads(&self) -> Loads {
        Loads::of(&self.after.map, self.after.map.nodes.iter().filter(|node| self.may_take(node)))
    }

    fn note(&mut self, text: String) {
        self.after.note(self.seen.unix_s, text);
    }

    /// What becomes of the nodes themselves.
    fn nodes(&mut self) {
        for node in &self.before.map.nodes {
            let keeps = self.keeping.contains(&node.id);
            match node.state {
                NodeState::Joining if self.is_member(node.id) => {
                    if let Some(info) = self.after.map.nodes.iter_mut().find(|info| info.id == node.id) {
                        info.state = NodeState::Up;
                        self.note(format!("{} ({}) has joined", node.name, node.id));
                    }
                }
                NodeState::Leaving if !keeps => self.dismiss(node, "removed by an operator".into()),
                NodeState::Replaced(by) if !keeps => self.dismiss(node, format!("replaced by node {by}")),
                NodeState::Up | NodeState::Joining
                    if is_replaceable(node, self.seen) && is_silent(node.id, self.seen, self.seen.replace_after) =>
                {
                    self.want_another(node);
                }
                NodeState::Up
                | NodeState::Joining
                | NodeState::Draining
                | NodeState::Leaving
                | NodeState::Replaced(_) => {}
            }
        }
    }

    /// Whether a node answers as a member of the cluster.
    fn is_member(&self, node: NodeId) -> bool {
        let status = self.seen.nodes.get(&node).and_then(|heard| heard.status.as_ref());
        self.is_up(node) && status.is_some_and(|status| status.cluster == Some(self.before.map.cluster))
    }

    fn dismiss(&mut self, node: &NodeInfo, reason: String) {
        self.note(format!("{} ({}) is of the cluster no more: {reason}", node.name, node.id));
        self.after.map.nodes.retain(|info| info.id != node.id);
        // A node that was started by hand has none: what only bears its name is not ours to remove.
        let is_known = !node.instance.is_empty() || self.seen.instances.contains_key(&node.name);
        self.after.forget(Gone {
            id: node.id,
            name: node.name.clone(),
            instance: if is_known { instance_of(node).to_owned() } else { String::new() },
            reason,
            at_unix_s: self.seen.unix_s,
        });
    }

    fn want_another(&mut self, node: &NodeInfo) {
        if self.after.wanted.contains_key(&node.name) {
            return;
        }
        let instance = self.free_instance(&node.name);
        self.note(format!("{} ({}) is down; a new node is started in its place", node.name, node.id));
        let wanted = Wanted::new(node.name.clone(), instance);
        self.after.wanted.insert(node.name.clone(), wanted);
    }

    fn free_instance(&self, name: &str) -> String {
        free_instance(&self.after, name, |instance| self.seen.instances.contains_key(instance))
    }

    /// Learners on each node.
    fn filling(&self) -> BTreeMap<NodeId, usize> {
        let mut filling = BTreeMap::new();
        let replicas = self.before.map.shards.iter().flat_map(|shard| &shard.replicas);
        for replica in replicas.filter(|replica| replica.role == ReplicaRole::Learner) {
            *filling.entry(replica.node).or_default() += 1;
        }
        filling
    }

    /// The leader of a shard. One that another replica knows a higher term than is deposed, and what it says is old.
    fn led(&self, shard: &ShardInfo) -> Option<Led<'a>> {
        let said = self.said.get(&shard.id)?;
        let counts = |here: &ReplicaStatus| here.leads || shard.replicas.iter().any(|home| home.id == here.replica);
        let known = said.iter().filter(|(_, here)| counts(here));
        let (node, here) = known.max_by_key(|(_, here)| (here.term, here.leads))?;
        let group = here.group.as_ref().filter(|_| here.leads)?;
        Some(Led { node: *node, replica: here.replica, committed: here.committed, group })
    }

    fn has_replica(&self, node: NodeId, shard: ShardId, id: ReplicaId) -> bool {
        self.said.get(&shard).is_some_and(|said| said.iter().any(|(on, here)| *on == node && here.replica == id))
    }

    fn keeps_any(&self, node: NodeId, shard: ShardId) -> bool {
        self.said.get(&shard).is_some_and(|said| said.iter().any(|(on, _)| *on == node))
    }

    /// Goes on with what a shard has begun, or else begins what it needs.
    fn shard(&mut self, shard: &ShardInfo, filling: &mut BTreeMap<NodeId, usize>) {
        let missing: Vec<&ReplicaInfo> = shard
            .replicas
            .iter()
            .filter(|home| home.role != ReplicaRole::Leaving && self.is_up(home.node))
            .filter(|home| !self.has_replica(home.node, shard.id, home.id))
            .collect();
        // A replica that votes is made by the map only when the group begins: none has forgotten anything then. Where an
        // earlier replica of the shard still is, that one is deleted first.
        let may_make = |home: &&&ReplicaInfo| {
            let is_new = home.role == ReplicaRole::Learner || home.id.0 <= u64::from(shard.founders);
            is_new && !self.keeps_any(home.node, shard.id)
        };
        let make: Vec<Step> = missing.iter().filter(may_make).map(|home| Step::Create(shard.id, home.node)).collect();
        self.steps.extend(make);
        let Some(led) = self.led(shard) else { return };
        if !led.group.outgoing.is_empty() {
            return;
        }
        if self.confirm(shard, &led) || self.expel(shard, &led) {
            return;
        }
        let is_busy = shard.replicas.iter().any(|home| home.role != ReplicaRole::Voter);
        if is_busy {
            if !self.abandon(shard, &led) {
                self.go_on(shard, &led);
            }
        } else if missing.is_empty() {
            self.begin(shard, &led, filling);
        }
    }

    /// Brings the map up to what the group has done. Tells whether there was anything.
    fn confirm(&mut self, shard: &ShardInfo, led: &Led<'_>) -> bool {
        let Some(info) = self.after.map.shards.iter_mut().find(|info| info.id == shard.id) else { return false };
        for home in &mut info.replicas {
            home.role = match home.role {
                ReplicaRole::Learner if led.group.voters.contains(&home.id) => ReplicaRole::Voter,
                ReplicaRole::Voter if led.group.learners.contains(&home.id) => ReplicaRole::Learner,
                role => role,
            };
        }
        // One that does not vote any more, but for a request that came late, is made anew under another id.
        info.replicas.retain(|home| home.role == ReplicaRole::Learner || led.has(home.id));
        info.replicas != shard.replicas
    }

    /// Sends away members of a group that the map does not list any more: what is left when a step was given up while it
    /// was on its way. Tells whether there are any.
    fn expel(&mut self, shard: &ShardInfo, led: &Led<'_>) -> bool {
        let is_stray = |id: &ReplicaId| *id < shard.next_replica && shard.replicas.iter().all(|home| home.id != *id);
        let members = led.group.voters.iter().chain(&led.group.learners);
        let strays: Vec<ReplicaId> = members.copied().filter(is_stray).collect();
        if strays.is_empty() {
            return false;
        }
        if strays.contains(&led.replica) {
            if let Some(heir) = self.heir(shard, led, &strays) {
                self.steps.push(Step::Transfer(shard.id, led.node, heir));
            }
        } else if self.has_quorum(shard, led, &[], &strays) {
            let change = ChangeReplicas { from: led.group.voters.clone(), remove: strays, ..ChangeReplicas::default() };
            self.steps.push(Step::Change(shard.id, led.node, change));
        }
        true
    }

    /// Who can lead when the leader goes: a voter that stays, is heard, and has most of the log.
    fn heir(&self, shard: &ShardInfo, led: &Led<'_>, going: &[ReplicaId]) -> Option<ReplicaId> {
        let voters = shard.replicas.iter().filter(|home| led.group.voters.contains(&home.id));
        let heirs = voters.filter(|home| home.role == ReplicaRole::Voter && !going.contains(&home.id));
        heirs.filter(|home| self.is_up(home.node)).max_by_key(|home| led.matched(home.id)).map(|home| home.id)
    }

    /// Whether the voters that are heard are a majority when some are promoted and some removed.
    fn has_quorum(&self, shard: &ShardInfo, led: &Led<'_>, promoted: &[ReplicaId], removed: &[ReplicaId]) -> bool {
        let voters: BTreeSet<ReplicaId> =
            led.group.voters.iter().chain(promoted).copied().filter(|id| !removed.contains(id)).collect();
        let live = shard.replicas.iter().filter(|home| voters.contains(&home.id) && self.is_up(home.node)).count();
        live * 2 > voters.len()
    }

    /// Gives up learners whose nodes cannot take them any more; those that they were to replace stay for now. Tells
    /// whether there were any.
    fn abandon(&mut self, shard: &ShardInfo, led: &Led<'_>) -> bool {
        let lost: Vec<ReplicaId> = shard
            .replicas
            .iter()
            .filter(|home| home.role == ReplicaRole::Learner && self.emptying.contains(&home.node))
            .map(|home| home.id)
            .collect();
        if lost.is_empty() {
            return false;
        }
        self.reinstate(shard, led);
        lost.iter().for_each(|id| self.mark_leaving(shard.id, *id));
        true
    }

    /// Keeps those that were to go and still vote.
    fn reinstate(&mut self, shard: &ShardInfo, led: &Led<'_>) {
        let Some(info) = self.after.map.shards.iter_mut().find(|info| info.id == shard.id) else { return };
        for home in &mut info.replicas {
            if home.role == ReplicaRole::Leaving && led.group.voters.contains(&home.id) {
                home.role = ReplicaRole::Voter;
            }
        }
    }

    /// The next step of a shard whose replicas are changing.
    fn go_on(&mut self, shard: &ShardInfo, led: &Led<'_>) {
        let by_role = |role| shard.replicas.iter().filter(move |home| home.role == role);
        let group = led.group;
        let unknown: Vec<(ReplicaId, NodeId)> = by_role(ReplicaRole::Learner)
            .filter(|home| !group.learners.contains(&home.id) && self.has_replica(home.node, shard.id, home.id))
            .map(|home| (home.id, home.node))
            .collect();
        if !unknown.is_empty() {
            let learn = ChangeReplicas { from: group.voters.clone(), learn: unknown, ..ChangeReplicas::default() };
            return self.steps.push(Step::Change(shard.id, led.node, learn));
        }
        let ready: Vec<ReplicaId> = by_role(ReplicaRole::Learner)
            .filter(|home| group.learners.contains(&home.id) && self.is_up(home.node) && led.is_filled(home.id))
            .map(|home| home.id)
            .collect();
        let waiting = by_role(ReplicaRole::Learner).count() - ready.len();
        let leaving: Vec<&ReplicaInfo> = by_role(ReplicaRole::Leaving).collect();
        // A learner that is still being filled holds back one that is to go.
        let may_go = leaving.len().saturating_sub(waiting);
        let mut remove: Vec<ReplicaId> = leaving.iter().map(|home| home.id).take(may_go).collect();
        if ready.is_empty() && remove.is_empty() {
            return;
        }
        let left = group.voters.iter().chain(&ready).filter(|id| !remove.contains(id)).count();
        let loses = remove.iter().any(|id| group.voters.contains(id));
        if loses && left < wanted_copies(&self.before.map, shard).min(self.able) {
            return self.reinstate(shard, led); // what was to take its place is not there any more
        }
        if remove.contains(&led.replica) {
            match self.heir(shard, led, &remove) {
                Some(heir) => return self.steps.push(Step::Transfer(shard.id, led.node, heir)),
                None if ready.is_empty() => return,
                None => remove.clear(), // the learner votes first, then takes over, and then the other goes
            }
        }
        if self.has_quorum(shard, led, &ready, &remove) {
            let change = ChangeReplicas { from: group.voters.clone(), learn: vec![], promote: ready, remove };
            self.steps.push(Step::Change(shard.id, led.node, change));
        }
    }

    /// Begins what a shard needs that rests.
    fn begin(&mut self, shard: &ShardInfo, led: &Led<'_>, filling: &mut BTreeMap<NodeId, usize>) {
        let map = &self.before.map;
        let wanted = wanted_copies(map, shard).min(self.able);
        // Those that are lost before those that only should go: the latter are good for a quorum until then.
        let going = shard.replicas.iter().filter(|home| self.emptying.contains(&home.node));
        let must_go = going.min_by_key(|home| self.is_up(home.node));
        if shard.replicas.len() > wanted {
            let spare = || {
                shard.replicas.iter().max_by_key(|home| {
                    let is_pinned = place::is_pinned_to(map, shard, home.node);
                    let reluctance = u64::MAX - place::wish(shard.id, home.node);
                    (!is_pinned, !self.is_up(home.node), home.id != led.replica, reluctance)
                })
            };
            let Some(home) = must_go.or_else(spare) else { return };
            if self.has_quorum(shard, led, &[], &[home.id]) {
                self.mark_leaving(shard.id, home.id);
            }
            return;
        }
        if must_go.is_none() && shard.replicas.len() == wanted {
            return;
        }
        let loads = self.loads();
        let successor = match must_go.and_then(|home| map.node(home.node)).map(|node| node.state) {
            Some(NodeState::Replaced(by)) => Some(by),
            _ => None,
        };
        let is_coming = |by: NodeId| map.node(by).is_some_and(|node| !self.must_empty(node)) && !loads.has(by);
        if successor.is_some_and(is_coming) {
            return;
        }
        if let Some(to) = self.target(shard, &loads, successor, filling) {
            self.add_learner(shard.id, to, filling);
            if let Some(home) = must_go {
                self.mark_leaving(shard.id, home.id);
            }
        }
    }

    /// The best node for another replica, among those that are not filled too much already.
    fn target(
        &self,
        shard: &ShardInfo,
        loads: &Loads,
        first: Option<NodeId>,
        filling: &BTreeMap<NodeId, usize>,
    ) -> Option<NodeId> {
        let to = place::best(&self.after.map, shard, loads, first)?;
        let is_free =
            filling.values().sum::<usize>() < MOVES_MAX && filling.get(&to).copied().unwrap_or(0) < MOVES_PER_NODE_MAX;
        is_free.then_some(to)
    }

    fn add_learner(&mut self, shard: ShardId, node: NodeId, filling: &mut BTreeMap<NodeId, usize>) {
        *filling.entry(node).or_default() += 1;
        if let Some(info) = self.after.map.shards.iter_mut().find(|info| info.id == shard) {
            info.replicas.push(ReplicaInfo { id: info.next_replica, node, role: ReplicaRole::Learner });
            info.next_replica = ReplicaId(info.next_replica.0 + 1);
        }
    }

    fn mark_leaving(&mut self, shard: ShardId, id: ReplicaId) {
        let info = self.after.map.shards.iter_mut().find(|info| info.id == shard);
        if let Some(home) = info.and_then(|info| info.replicas.iter_mut().find(|home| home.id == id)) {
            home.role = ReplicaRole::Leaving;
        }
    }

    /// Moves replicas to where there is less, while nothing more urgent is under way.
    fn even_out(&mut self, filling: &mut BTreeMap<NodeId, usize>) {
        // A node that is lost for good, or was never really there, is not waited for; one that is just coming is.
        let is_urgent = |node: &NodeInfo| self.must_empty(node) && self.keeping.contains(&node.id);
        let is_silent = |node: &NodeInfo| node.state == NodeState::Up && !self.is_up(node.id) && !self.must_empty(node);
        let is_coming = |node: &NodeInfo| node.state == NodeState::Joining && self.is_up(node.id);
        let is_started = |wanted: &Wanted| !wanted.cancelled && wanted.error.is_none();
        if self.before.map.nodes.iter().any(|node| is_urgent(node) || is_silent(node) || is_coming(node))
            || (self.seen.can_start && self.before.wanted.values().any(is_started))
        {
            return;
        }
        while filling.values().sum::<usize>() < MOVES_MAX {
            let mut loads = self.loads();
            let full: Vec<NodeId> =
                loads.nodes().filter(|node| filling.get(node).is_some_and(|n| *n >= MOVES_PER_NODE_MAX)).collect();
            let rests = |shard: &ShardInfo| {
                shard.replicas.iter().all(|home| home.role == ReplicaRole::Voter) && self.led(shard).is_some()
            };
            let Some((shard, from, to)) = place::next_move(&self.after.map, &loads, rests) else { return };
            if full.contains(&to) {
                return;
            }
            loads.add(to);
            loads.take(from);
            let Some(home) = self.after.map.shard(shard).and_then(|info| info.replica_on(from)).map(|home| home.id)
            else {
                return;
            };
            self.add_learner(shard, to, filling);
            self.mark_leaving(shard, home);
        }
    }

    /// Replicas that no longer are of their shard. An id that is below the next one and not listed was removed: ids are
    /// given once, so an old map cannot make this delete what a newer one has added. The group must have let it go, too.
    fn strays(&mut self) {
        let map = &self.before.map;
        for (node, heard) in self.seen.nodes.iter().filter(|(_, heard)| heard.health == NodeHealth::Up) {
            let Some(status) = heard.status.as_ref().filter(|status| status.cluster == Some(map.cluster)) else {
                continue;
            };
            for here in &status.replicas {
                let is_stray = match map.shard(here.shard) {
                    Some(shard) => {
                        here.replica < shard.next_replica
                            && shard.replicas.iter().all(|home| home.id != here.replica)
                            && self.led(shard).is_some_and(|led| !led.has(here.replica))
                    }
                    None => here.shard < map.next_shard,
                };
                if is_stray {
                    self.steps.push(Step::Remove(here.shard, *node, here.replica));
                }
            }
        }
    }

    /// Instances to start and to remove.
    fn instances(&mut self) {
        if !self.seen.can_start {
            return;
        }
        let map = &self.before.map;
        let is_used = |instance: &str| map.nodes.iter().any(|node| instance_of(node) == instance);
        // What has retired may not be listed any more, and is still to be removed.
        let is_due = |gone: &&Gone| {
            let is_young = self.seen.unix_s.saturating_sub(gone.at_unix_s) < REMOVED_WITHIN_S;
            is_young || self.seen.instances.contains_key(&gone.instance)
        };
        let left = self.before.gone.iter().filter(|gone| !gone.instance.is_empty() && !is_used(&gone.instance));
        self.steps.extend(left.filter(is_due).map(|gone| Step::RemoveInstance(gone.instance.clone())));
        for wanted in self.before.wanted.values() {
            let is_namesake = |node: &&NodeInfo| {
                node.name == wanted.name
                    && node.instance != wanted.instance
                    && !matches!(node.state, NodeState::Replaced(_))
            };
            let is_back = map.nodes.iter().filter(is_namesake).any(|node| self.is_up(node.id));
            let there = self.seen.instances.get(&wanted.instance);
            if !wanted.cancelled && !is_back {
                if there != Some(&true) {
                    self.steps.push(Step::Start(wanted.name.clone()));
                }
            } else if there.is_some() {
                self.steps.push(Step::RemoveInstance(wanted.instance.clone()));
            } else {
                self.after.wanted.remove(&wanted.name);
            }
        }
    }

    /// Evens out who leads.
    fn leaders(&mut self) {
        let map = &self.before.map;
        let may_lead = |node: NodeId| map.node(node).is_some_and(|node| self.may_take(node));
        let led: Vec<(&ShardInfo, Led<'_>)> =
            map.shards.iter().filter_map(|shard| Some((shard, self.led(shard)?))).collect();
        if led.len() < map.shards.len() {
            return; // somebody is being elected: that comes first
        }
        let mut counts: BTreeMap<NodeId, usize> = map.nodes.iter().map(|node| (node.id, 0)).collect();
        for (_, led) in &led {
            *counts.entry(led.node).or_default() += 1;
        }
        let mut steps = Vec::new();
        for (shard, led) in &led {
            let count = |node: NodeId| counts.get(&node).copied().unwrap_or(0);
            let takers = shard.voters().filter(|home| home.node != led.node && may_lead(home.node));
            let takers = takers.filter(|home| led.is_filled(home.id));
            let Some(taker) = takers.min_by_key(|home| (count(home.node), home.node)) else { continue };
            if count(led.node) >= count(taker.node) + 2 || !may_lead(led.node) {
                *counts.entry(led.node).or_default() -= 1;
                *counts.entry(taker.node).or_default() += 1;
                steps.push(Step::Transfer(shard.id, led.node, taker.id));
                if steps.len() >= TRANSFERS_MAX {
                    break;
                }
            }
        }
        self.steps.extend(steps);
    }
}

/// By which name a node's provisioner knows it. Nodes with which a cluster was founded bear the name of their instance.
fn instance_of(node: &NodeInfo) -> &str {
    if node.instance.is_empty() { &node.name } else { &node.instance }
}

/// The first instance of a name that was never used: the name itself, or with a number behind.
pub(crate) fn free_instance(state: &State, name: &str, is_there: impl Fn(&str) -> bool) -> String {
    let is_used = |instance: &str| {
        is_there(instance)
            || state.map.nodes.iter().any(|node| instance_of(node) == instance)
            || state.gone.iter().any(|gone| gone.instance == instance)
            || state.wanted.values().any(|wanted| wanted.instance == instance)
    };
    let numbered = (2..u64::MAX).map(|number| format!("{name}.{number}"));
    std::iter::once(name.to_owned()).chain(numbered).find(|instance| !is_used(instance)).unwrap_or_default()
}

#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
