//! A cluster that a test plays: groups that change as Raft groups do, nodes that die, requests that arrive late or twice.
//!
//! The planner keeps nothing between two calls, and here only one of the things that it names is done before it is asked
//! again. So every test is also one in which each step is taken by another controller, that knows only what is written.

use super::*;
use crate::Bootstrap;
use crate::control::wishes;
use crate::layout::first_map;
use shkv_proto::message::{Failure, Join};
use shkv_proto::{ClusterId, Epoch};

pub(super) const CLUSTER: ClusterId = ClusterId(7);
const REPLACE_AFTER: Duration = Duration::from_secs(10);
/// Log entries that are committed, and that a replica is sent, between two looks.
const WRITTEN: u64 = 10;
const FILLED: u64 = 400;

/// A node.
#[derive(Clone, Debug, Default)]
pub(super) struct Place {
    pub(super) live: bool,
    pub(super) silent: Duration,
    pub(super) replicas: BTreeMap<ShardId, ReplicaId>,
    pub(super) deleted: BTreeSet<(ShardId, ReplicaId)>,
}

/// A Raft group.
#[derive(Clone, Debug)]
pub(super) struct Group {
    pub(super) leader: Option<ReplicaId>,
    pub(super) term: u64,
    pub(super) voters: BTreeSet<ReplicaId>,
    pub(super) learners: BTreeSet<ReplicaId>,
    pub(super) homes: BTreeMap<ReplicaId, NodeId>,
    pub(super) matched: BTreeMap<ReplicaId, u64>,
    pub(super) committed: u64,
}

/// A step with what the request says, so that it can come late.
#[derive(Clone, Debug)]
pub(super) enum Request {
    Create(ShardId, NodeId, ReplicaId, u32),
    Other(Step),
}

#[derive(Clone, Debug)]
pub(super) struct Model {
    pub(super) state: State,
    pub(super) places: BTreeMap<NodeId, Place>,
    pub(super) groups: BTreeMap<ShardId, Group>,
    pub(super) instances: BTreeMap<String, bool>,
    pub(super) can_start: bool,
    /// Requests that come late, or once more: with the term in which they were sent, because a leader that was deposed
    /// changes nothing, and for how many looks they may still come.
    late: Vec<(Request, u64, u32)>,
    /// What each node last said; it may be old.
    pub(super) words: BTreeMap<NodeId, NodeStatus>,
    pub(super) chance: u64,
    unix_s: u64,
    next_node: u64,
    /// Fewer voters than these no group may have.
    pub(super) floor: usize,
    pub(super) transfers: usize,
    /// What was done last, for whoever has to find out why.
    told: Vec<String>,
}

pub(super) fn node(n: u64) -> NodeId {
    NodeId(n * 1_000)
}

pub(super) fn join_of(id: NodeId, name: &str, instance: &str) -> Join {
    Join {
        cluster: None,
        id,
        name: name.into(),
        addr: format!("h:{id}"),
        addr_outside: None,
        domain: String::new(),
        capacity: 100,
        instance: instance.into(),
    }
}

impl Model {
    /// A cluster of nodes 1 to `count` as a bootstrap makes it.
    pub(super) fn new(count: u64, shards: u32, replicas: u32) -> Self {
        let info = |n: u64| NodeInfo::new(node(n), format!("Server{n}"), format!("h:{n}"));
        let nodes: Vec<NodeInfo> = (1..=count).map(info).collect();
        let mut map = first_map(CLUSTER, &nodes, Bootstrap { shards, replicas });
        map.epoch = Epoch(1);
        let mut model = Self {
            places: nodes.iter().map(|node| (node.id, Place { live: true, ..Place::default() })).collect(),
            groups: BTreeMap::new(),
            instances: BTreeMap::new(),
            can_start: false,
            late: vec![],
            words: BTreeMap::new(),
            chance: 1,
            unix_s: 1_000_000,
            next_node: 100,
            floor: (replicas as usize).min(count as usize).min(SYSTEM_REPLICAS_MIN as usize),
            transfers: 0,
            told: vec![],
            state: State::of(map.clone()),
        };
        for shard in &map.shards {
            for home in &shard.replicas {
                model.act(Request::Create(shard.id, home.node, home.id, shard.founders));
            }
        }
        model.speak(1);
        model
    }

    /// A number below `bound`, the same in each run (xorshift, after Marsaglia, 2003).
    pub(super) fn any(&mut self, bound: usize) -> usize {
        self.chance ^= self.chance << 13;
        self.chance ^= self.chance >> 7;
        self.chance ^= self.chance << 17;
        (self.chance % bound.max(1) as u64) as usize
    }

    pub(super) fn seen(&self) -> Seen {
        let heard = |(id, place): (&NodeId, &Place)| {
            let health = match place.silent.as_secs() {
                _ if place.live => NodeHealth::Up,
                0..=5 => NodeHealth::Suspect,
                _ => NodeHealth::Down,
            };
            (*id, Heard { health, silent: place.silent, status: self.words.get(id).cloned() })
        };
        Seen {
            nodes: self.places.iter().map(heard).collect(),
            instances: self.instances.clone(),
            can_start: self.can_start,
            replace_after: REPLACE_AFTER,
            unix_s: self.unix_s,
        }
    }

    /// One of so many nodes says how it fares.
    pub(super) fn speak(&mut self, of: usize) {
        let live = self.places.iter().filter(|(_, place)| place.live).map(|(id, _)| *id);
        for id in live.collect::<Vec<_>>() {
            if self.any(of) == 0 {
                self.words.insert(id, self.status(id, &self.places[&id]));
            }
        }
    }

    fn status(&self, id: NodeId, place: &Place) -> NodeStatus {
        let replica = |(shard, replica): (&ShardId, &ReplicaId)| {
            let group = &self.groups[shard];
            let leads = group.leader == Some(*replica);
            let told = || GroupStatus {
                voters: group.voters.iter().copied().collect(),
                outgoing: vec![],
                learners: group.learners.iter().copied().collect(),
                matched: group.matched.iter().map(|(id, index)| (*id, *index)).collect(),
            };
            ReplicaStatus {
                shard: *shard,
                replica: *replica,
                leads,
                leader: group.leader,
                // One that was let go keeps the term in which that was.
                term: if group.voters.contains(replica) { group.term } else { 0 },
                committed: group.committed,
                applied: 0,
                flushed: 0,
                log_first: 1,
                log_last: group.committed,
                revision: 0,
                snapshots_installed: 0,
                group: leads.then(told),
            }
        };
        NodeStatus {
            id,
            name: String::new(),
            cluster: Some(CLUSTER),
            process: 1,
            cpu_us: 0,
            epoch: Epoch(0),
            table_bytes: 0,
            log_bytes: 0,
            disk_free_bytes: 0,
            disk_full: false,
            log_syncs: 0,
            replicas: place.replicas.iter().map(replica).collect(),
        }
    }

    fn has(&self, shard: ShardId, group: &Group, id: ReplicaId) -> bool {
        let place = group.homes.get(&id).and_then(|node| self.places.get(node));
        place.is_some_and(|place| place.live && place.replicas.get(&shard) == Some(&id))
    }

    pub(super) fn is_majority(&self, shard: ShardId, group: &Group, voters: &BTreeSet<ReplicaId>) -> bool {
        voters.iter().filter(|id| self.has(shard, group, **id)).count() * 2 > voters.len()
    }

    /// A second goes by.
    pub(super) fn pass(&mut self) {
        self.unix_s += 1;
        for place in self.places.values_mut() {
            place.silent = if place.live { Duration::ZERO } else { place.silent + Duration::from_secs(1) };
        }
        let before = self.groups.clone();
        for (shard, group) in &before {
            let mut now = group.clone();
            let leads = group.leader.is_some_and(|id| group.voters.contains(&id) && self.has(*shard, group, id));
            let quorum = self.is_majority(*shard, group, &group.voters);
            if !quorum {
                now.leader = None;
            } else if !leads {
                let live = group.voters.iter().filter(|id| self.has(*shard, group, **id));
                now.leader = live.max_by_key(|id| group.matched.get(id)).copied();
                now.term += 1;
            } else {
                now.committed += WRITTEN;
            }
            if now.leader.is_some() {
                for id in group.voters.iter().chain(&group.learners).filter(|id| self.has(*shard, group, **id)) {
                    let index = now.matched.entry(*id).or_default();
                    *index = (*index + FILLED).min(now.committed);
                }
            }
            self.groups.insert(*shard, now);
        }
    }

    /// Does what a request says, as nodes and provisioner do.
    fn act(&mut self, request: Request) {
        self.tell(format!("{request:?}"));
        match request {
            Request::Create(shard, at, id, founders) => self.create(shard, at, id, founders),
            Request::Other(Step::Create(..)) => unreachable!("it is told by what it says"),
            Request::Other(Step::Change(shard, at, change)) => self.change(shard, at, &change),
            Request::Other(Step::Transfer(shard, at, to)) => {
                self.transfers += 1;
                let group = self.groups[&shard].clone();
                let leads = group.leader.is_some_and(|id| group.homes[&id] == at);
                if leads && group.voters.contains(&to) && self.has(shard, &group, to) {
                    let group = self.groups.get_mut(&shard).unwrap();
                    (group.leader, group.term) = (Some(to), group.term + 1);
                }
            }
            Request::Other(Step::Remove(shard, at, id)) => {
                let place = self.places.get_mut(&at).unwrap();
                if place.live && place.replicas.get(&shard) == Some(&id) {
                    let is_listed = self.state.map.shard(shard).is_some();
                    let votes = self.groups[&shard].voters.contains(&id);
                    assert!(!is_listed || !votes, "replica {id} of shard {shard} is deleted while it votes");
                    place.replicas.remove(&shard);
                    place.deleted.insert((shard, id));
                }
            }
            Request::Other(Step::Start(name)) => {
                let Some(wanted) = self.state.wanted.get(&name).cloned() else { return };
                self.instances.insert(wanted.instance.clone(), true);
                self.next_node += 1;
                let _ = self.join(self.next_node, &name, &wanted.instance); // it may have come back meanwhile
            }
            Request::Other(Step::RemoveInstance(instance)) => {
                let member = self.state.map.nodes.iter().find(|node| node.instance == instance);
                assert!(member.is_none(), "the instance of a member is removed: {member:?}");
                self.instances.remove(&instance);
            }
        }
    }

    fn create(&mut self, shard: ShardId, at: NodeId, id: ReplicaId, founders: u32) {
        let homes = (1..=u64::from(founders)).map(ReplicaId);
        let group = self.groups.entry(shard).or_insert_with(|| Group {
            leader: None,
            term: 0,
            voters: homes.collect(),
            learners: BTreeSet::new(),
            homes: BTreeMap::new(),
            matched: BTreeMap::new(),
            committed: 1_000,
        });
        let place = self.places.get_mut(&at).unwrap();
        if place.live && !place.replicas.contains_key(&shard) && !place.deleted.contains(&(shard, id)) {
            place.replicas.insert(shard, id);
            group.homes.insert(id, at);
        }
    }

    fn change(&mut self, shard: ShardId, at: NodeId, change: &ChangeReplicas) {
        let group = self.groups[&shard].clone();
        let Some(leader) = group.leader.filter(|id| group.homes[id] == at && self.has(shard, &group, *id)) else {
            return;
        };
        let mut now = group.clone();
        if !now.voters.iter().eq(&change.from) {
            return; // it was thought out on old news
        }
        for (id, home) in &change.learn {
            let taken = now.homes.iter().any(|(other, on)| {
                on == home && other != id && (now.voters.contains(other) || now.learners.contains(other))
            });
            if taken {
                return;
            }
            if !now.voters.contains(id) {
                now.learners.insert(*id);
            }
            now.homes.insert(*id, *home);
        }
        for id in &change.promote {
            if now.learners.remove(id) {
                now.voters.insert(*id);
            } else if !now.voters.contains(id) {
                return; // it never learned
            }
        }
        for id in &change.remove {
            now.voters.remove(id);
            now.learners.remove(id);
            now.matched.remove(id);
        }
        if !now.voters.contains(&leader) {
            return;
        }
        let can_commit = self.is_majority(shard, &group, &group.voters);
        assert!(
            !can_commit || self.is_majority(shard, &now, &now.voters),
            "shard {shard} would lose its quorum: {:?} of {now:?}",
            change
        );
        if can_commit {
            self.groups.insert(shard, now);
        }
    }

    pub(super) fn join(&mut self, number: u64, name: &str, instance: &str) -> Result<(), Failure> {
        let mut after = self.state.clone();
        wishes::join(&mut after, &self.seen(), &join_of(node(number), name, instance))?;
        self.write(after);
        self.places.entry(node(number)).or_insert(Place { live: true, ..Place::default() });
        Ok(())
    }

    pub(super) fn wish<T>(
        &mut self,
        think: impl FnOnce(&mut State, &Seen) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let (mut after, seen) = (self.state.clone(), self.seen());
        let thought = think(&mut after, &seen)?;
        self.write(after);
        Ok(thought)
    }

    fn tell(&mut self, text: String) {
        self.told.push(text);
        let surplus = self.told.len().saturating_sub(200);
        self.told.drain(..surplus);
    }

    pub(super) fn write(&mut self, mut after: State) {
        assert_eq!(after.map.check(), Ok(()));
        for (old, new) in self.state.map.shards.clone().iter().zip(&after.map.shards).filter(|(old, new)| old != new) {
            self.tell(format!("{:?} of ShardId({}) become {:?}", old.replicas, old.id, new.replicas));
        }
        if after.map != self.state.map {
            after.map.epoch = Epoch(self.state.map.epoch.0 + 1);
        }
        self.state = after;
    }

    /// One thing is done of what is next. Tells whether there was anything.
    pub(super) fn step(&mut self) -> bool {
        let plan = plan(&self.state, &self.seen());
        let changed = plan.after != self.state;
        if changed {
            self.write(plan.after);
        } else if !plan.steps.is_empty() {
            let one = self.any(plan.steps.len());
            let request = match plan.steps[one].clone() {
                Step::Create(shard, at) => {
                    let info = self.state.map.shard(shard).unwrap();
                    Request::Create(shard, at, info.replica_on(at).unwrap().id, info.founders)
                }
                step => Request::Other(step),
            };
            if self.any(3) == 0 {
                self.late.push((request.clone(), self.term_of(&request), 20));
            }
            if self.any(6) > 0 {
                self.act(request); // otherwise it is lost, or comes late
            }
        }
        if self.any(3) == 0 && !self.late.is_empty() {
            let which = self.any(self.late.len());
            let (request, term, _) = self.late.swap_remove(which);
            if self.term_of(&request) == term {
                self.act(request);
            }
        }
        self.late.iter_mut().for_each(|(_, _, looks)| *looks -= 1);
        self.late.retain(|(_, _, looks)| *looks > 0);
        self.speak(2);
        self.check();
        changed || !plan.steps.is_empty()
    }

    fn term_of(&self, request: &Request) -> u64 {
        match request {
            Request::Other(Step::Change(shard, ..) | Step::Transfer(shard, ..)) => self.groups[shard].term,
            Request::Other(_) | Request::Create(..) => 0,
        }
    }

    fn check(&self) {
        for (shard, group) in &self.groups {
            if self.state.map.shard(*shard).is_none() {
                continue;
            }
            let told = || {
                let of_shard = format!("ShardId({shard})");
                self.told.iter().filter(|text| text.contains(&of_shard)).cloned().collect::<Vec<_>>().join("\n")
            };
            assert!(group.voters.len() >= self.floor, "shard {shard} has too few voters: {group:?}\n{}", told());
            let members = || group.voters.iter().chain(&group.learners);
            let homes = || members().filter_map(|id| group.homes.get(id));
            let nodes: BTreeSet<&NodeId> = homes().collect();
            assert_eq!(nodes.len(), homes().count(), "two replicas of shard {shard} on one node: {group:?}");
        }
        let back = self.state.map.nodes.iter().find(|node| self.state.gone.iter().any(|gone| gone.id == node.id));
        assert!(back.is_none(), "a node is gone and a member: {back:?}");
    }

    /// Goes on until nothing is left to do for a while.
    pub(super) fn settle(&mut self) {
        let mut quiet = 0;
        for round in 0..60_000 {
            let busy = self.step();
            if round % 4 == 0 || !busy {
                self.pass();
            }
            quiet = if busy { 0 } else { quiet + 1 };
            if quiet > 100 {
                return self.check_settled();
            }
        }
        panic!("it never ends: {:?}", plan(&self.state, &self.seen()).steps);
    }

    /// What must hold when nothing is left to do: groups and map say the same, and nodes keep nothing else.
    fn check_settled(&self) {
        let able = self.state.map.nodes.iter().filter(|node| node.state == NodeState::Up).count();
        for shard in &self.state.map.shards {
            let group = &self.groups[&shard.id];
            let listed: BTreeSet<ReplicaId> = shard.replicas.iter().map(|home| home.id).collect();
            assert_eq!((&group.voters, group.learners.len()), (&listed, 0), "shard {}", shard.id);
            assert!(shard.replicas.iter().all(|home| home.role == ReplicaRole::Voter), "shard {}", shard.id);
            assert!(group.leader.is_some(), "shard {} has no leader", shard.id);
            assert_eq!(listed.len(), wanted_copies(&self.state.map, shard).min(able), "shard {}", shard.id);
        }
        for (id, place) in self.places.iter().filter(|(_, place)| place.live) {
            if self.state.map.node(*id).is_none() {
                continue;
            }
            let kept: BTreeSet<ShardId> = place.replicas.keys().copied().collect();
            let listed = self.state.map.shards.iter().filter(|shard| shard.replica_on(*id).is_some());
            assert_eq!(kept, listed.map(|shard| shard.id).collect(), "node {id} keeps something else");
        }
    }

    pub(super) fn kept(&self) -> BTreeMap<NodeId, usize> {
        let mut kept: BTreeMap<NodeId, usize> = self.state.map.nodes.iter().map(|node| (node.id, 0)).collect();
        for home in self.state.map.shards.iter().flat_map(|shard| &shard.replicas) {
            *kept.entry(home.node).or_default() += 1;
        }
        kept
    }

    /// Replicas that were made since the ids were these.
    pub(super) fn made_since(&self, before: &Map) -> u64 {
        let of = |map: &Map| map.shards.iter().map(|shard| shard.next_replica.0).sum::<u64>();
        of(&self.state.map) - of(before)
    }

    /// A few things are done.
    pub(super) fn steps(&mut self, count: usize) {
        for _ in 0..count {
            self.step();
            if self.any(4) == 0 {
                self.pass();
            }
        }
    }

    pub(super) fn kill(&mut self, id: NodeId) {
        self.places.get_mut(&id).unwrap().live = false;
    }

    pub(super) fn revive(&mut self, id: NodeId) {
        self.places.get_mut(&id).unwrap().live = true;
    }

    pub(super) fn remove(&mut self, names: &[&str]) {
        let names: Vec<String> = names.iter().map(ToString::to_string).collect();
        self.wish(|state, seen| wishes::remove(state, seen, names.len() as u32, &names)).unwrap();
    }

    pub(super) fn assert_even(&self, within: f64) {
        let kept = self.kept();
        let share = kept.values().sum::<usize>() as f64 / kept.len() as f64;
        let most = (share * within).max(1.0);
        assert!(kept.values().all(|count| (*count as f64 - share).abs() <= most), "share {share}: {kept:?}");
    }
}
