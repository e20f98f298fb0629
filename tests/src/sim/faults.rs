//! What goes wrong in a simulation, and when: drawn from the seed.

use super::cluster::{Ended, SimCluster};
use super::universe::Universe;
use rand::RngExt;
use shkv_node::inspect::{Point, ReplicaLook};
use shkv_proto::world::sim::{Fate, Link};
use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// How many faults of each kind there were.
pub type Faults = BTreeMap<&'static str, u64>;

/// What will be done at some time to come.
enum Later {
    StartNode(usize),
    StartBalancer(usize),
    Resume(usize),
    Mend(Vec<(IpAddr, IpAddr)>),
    Usual(Vec<(IpAddr, IpAddr)>),
    Room(usize),
    QuickDisk(usize),
    Kill(usize),
    Cut(Vec<(IpAddr, IpAddr)>),
}

/// How often a node refuses a damaged log before its disk is given up.
const REFUSALS_MAX: u32 = 2;
/// Nodes that are added in all, at the most, because others are lost.
const LOST_MAX: u64 = 2;

/// The one who does it.
#[derive(Default)]
pub struct Nemesis {
    next_ms: u64,
    later: Vec<(u64, Later)>,
    /// What was done so far.
    pub done: Faults,
    /// Where processes were ended in the middle of what they did.
    pub crashes: BTreeMap<&'static str, u64>,
    /// Replicas whose disks are gone: no other disk is lost while a group counts on one of them.
    lost: BTreeSet<(u32, u64)>,
    disks_lost: u64,
    /// Whether a node is being emptied: a group that loses a disk with it may be left with two replicas, one of them lost.
    pub emptying: Arc<AtomicBool>,
    /// What should not have happened.
    pub wrong: Vec<String>,
}

impl Nemesis {
    /// Counts what went wrong on purpose, or followed from it.
    pub fn count(&mut self, what: &'static str) {
        *self.done.entry(what).or_default() += 1;
    }

    fn at(&mut self, universe: &Universe, after_ms: u64, later: Later) {
        self.later.push((universe.now_ms + after_ms, later));
    }

    /// Nodes that join some time.
    pub fn join_late(&mut self, universe: &mut Universe, nodes: std::ops::Range<usize>) {
        for at in nodes {
            self.count("node added");
            let after = universe.rng.random_range(0..6_000);
            self.at(universe, after, Later::StartNode(at));
        }
    }

    /// Nodes that ended by themselves are started again after a while.
    pub fn ended(&mut self, universe: &mut Universe, cluster: &mut SimCluster, ends: Vec<(usize, Ended)>) {
        for (at, end) in ends {
            match end {
                Ended::PowerGone => {
                    let where_to = cluster.nodes[at].disk.take_dark_at().unwrap_or("nowhere");
                    *self.crashes.entry(where_to).or_default() += 1;
                }
                Ended::AtPoint => {
                    if let Some(context) = universe.context(cluster.nodes[at].host) {
                        *self.crashes.entry(name_of(context.ended_at())).or_default() += 1;
                    }
                    let fate = if universe.rng.random_bool(0.5) { Fate::Reset } else { Fate::Silence };
                    cluster.end_node(universe, at, fate);
                }
                Ended::Said(reason) => {
                    self.count("process ended by itself");
                    if self.is_over(universe, cluster, at, &reason) {
                        continue;
                    }
                }
            }
            let after = universe.rng.random_range(10..2000);
            self.at(universe, after, Later::StartNode(at));
        }
    }

    /// Whether a process that gave this reason is not to be started again on its disk.
    fn is_over(&mut self, universe: &mut Universe, cluster: &mut SimCluster, at: usize, reason: &str) -> bool {
        let node = &mut cluster.nodes[at];
        if reason.contains("removed from, or replaced in") {
            node.over = Some(reason.to_owned());
            return true;
        }
        if reason.contains("log damaged") {
            let stats = node.disk.stats();
            self.count("a damaged log refused");
            if stats.rotten == 0 && stats.rotten_starts == 0 {
                self.wrong.push(format!("{} refuses its log, and nothing in it has rotted: {reason}", node.name));
            }
            node.refusals += 1;
            if node.refusals > REFUSALS_MAX && stats.rotten > 0 {
                cluster.lose_disk(universe, at);
                return cluster.nodes[at].over.is_some();
            }
        }
        node.over.is_some()
    }

    /// What is due is done; no new fault begins.
    pub fn go_on(&mut self, universe: &mut Universe, cluster: &mut SimCluster) {
        let now = universe.now_ms;
        let mut due = Vec::new();
        self.later.retain_mut(|(at, later)| {
            let is_due = *at <= now;
            if is_due {
                due.push(std::mem::replace(later, Later::Mend(vec![])));
            }
            !is_due
        });
        for later in due {
            match later {
                Later::Kill(at) => {
                    cluster.end_node(universe, at, Fate::Reset);
                    let after = universe.rng.random_range(1..40);
                    self.at(universe, after, Later::StartNode(at));
                }
                Later::Cut(ways) => ways.iter().for_each(|(from, to)| universe.net.cut(*from, *to)),
                later => undo(universe, cluster, later),
            }
        }
    }

    /// Begins a fault if it is time for one.
    pub fn strike(&mut self, universe: &mut Universe, cluster: &mut SimCluster) {
        if universe.now_ms < self.next_ms {
            return;
        }
        self.next_ms = universe.now_ms + universe.rng.random_range(50..1500);
        let at = victim(universe, cluster);
        let host = cluster.nodes[at].host;
        let kind = universe.rng.random_range(0..30);
        match kind {
            0..3 if universe.runs(host) => self.crash(universe, cluster, at),
            3 => {
                // All at once.
                for at in 0..cluster.nodes.len() {
                    if universe.runs(cluster.nodes[at].host) {
                        self.crash(universe, cluster, at);
                    }
                }
            }
            4..6 if universe.runs(host) => {
                self.count("process frozen");
                universe.pause(host, true);
                let after = universe.rng.random_range(20..3500);
                self.at(universe, after, Later::Resume(host));
            }
            6..9 => self.partition(universe, cluster),
            9..11 => self.slow_link(universe, cluster),
            11..14 => {
                let hosts = universe.hosts.len();
                let (a, b) = (universe.rng.random_range(0..hosts), universe.rng.random_range(0..hosts));
                let draw = universe.rng.random();
                if universe.net.reset_one(universe.hosts[a].ip, universe.hosts[b].ip, draw) {
                    self.count("connection reset");
                }
            }
            14 => {
                let at = universe.rng.random_range(0..cluster.balancers.len());
                let host = cluster.balancers[at];
                if universe.runs(host) {
                    self.count("balancer killed");
                    universe.end(host, Fate::Reset);
                    let after = universe.rng.random_range(10..3000);
                    self.at(universe, after, Later::StartBalancer(at));
                }
            }
            15..17 if universe.runs(host) => {
                self.count("power lost in the middle of a write");
                let operations = universe.rng.random_range(0..12);
                let only_rows = universe.rng.random_bool(0.4);
                cluster.nodes[at].disk.lose_power_after(operations, only_rows);
            }
            17 if universe.runs(host) => {
                self.count("sync failed");
                cluster.nodes[at].disk.fail_next_sync();
            }
            18 if universe.runs(host) => {
                self.count("disk slow");
                if let Some(context) = universe.context(host) {
                    context.disk_delay_ms.store(universe.rng.random_range(10..300), Ordering::Relaxed);
                }
                let after = universe.rng.random_range(100..3000);
                self.at(universe, after, Later::QuickDisk(host));
            }
            19 if universe.runs(host) => {
                self.count("disk full");
                let disk = &cluster.nodes[at].disk;
                disk.set_capacity(disk.used() + universe.rng.random_range(0..64 << 10));
                let after = universe.rng.random_range(100..3000);
                self.at(universe, after, Later::Room(at));
            }
            20 if universe.runs(host) => {
                self.count("a read of the log brings a wrong bit");
                cluster.nodes[at].disk.rot_next_read();
                if universe.rng.random_bool(0.5) {
                    self.crash(universe, cluster, at);
                }
            }
            21 if self.may_lose(universe, cluster, at) && cluster.nodes[at].disk.rot() => {
                self.count("a bit of the log turns for good");
                self.lose(universe, cluster, at);
                cluster.end_node(universe, at, Fate::Reset);
                self.at(universe, 200, Later::StartNode(at));
            }
            22 if self.may_lose(universe, cluster, at) => {
                self.count("disk lost for good");
                self.lose(universe, cluster, at);
                cluster.lose_disk(universe, at);
                let after = universe.rng.random_range(100..3000);
                self.at(universe, after, Later::StartNode(at));
            }
            23..26 if universe.runs(host) => {
                self.count("process ends at a point of its code");
                let point = Point::ALL[universe.rng.random_range(0..Point::ALL.len())];
                if let Some(context) = universe.context(host) {
                    context.ends_at.store(point as u64, Ordering::Relaxed);
                }
            }
            26 => self.deaf_leader(universe, cluster),
            27..29 => self.forgetful_voter(universe, cluster),
            29 => {
                let over = |at: &usize| cluster.nodes[*at].over.is_some() && !cluster.nodes[*at].lost;
                let over = (0..cluster.nodes.len()).filter(over).find(|at| !universe.runs(cluster.nodes[*at].host));
                if let Some(at) = over {
                    self.count("a removed node is started again");
                    cluster.start_node(universe, at);
                }
            }
            _ => {}
        }
    }

    /// Whether a group loses nothing with the disk of a node: every group is whole now and remains so, and counts on no disk
    /// that is gone.
    fn may_lose(&mut self, universe: &Universe, cluster: &SimCluster, at: usize) -> bool {
        let looks = looks(universe, cluster);
        let here = |(node, _): &&(usize, ReplicaLook)| *node == at;
        if self.emptying.load(Ordering::Relaxed) || self.disks_lost >= LOST_MAX || !looks.iter().any(|look| here(&look))
        {
            return false;
        }
        for (_, look) in &looks {
            self.lost.remove(&(look.shard, look.replica)); // it was not, after all
        }
        let shards: BTreeSet<u32> = looks.iter().map(|(_, look)| look.shard).collect();
        shards.iter().all(|shard| {
            let led = looks.iter().find(|(_, look)| look.shard == *shard && look.leads && look.may_read);
            led.is_some_and(|(_, look)| {
                look.voters.len() >= 3
                    && !look.is_joint
                    && look.voters.iter().all(|voter| {
                        let is_there =
                            |(_, other): &(usize, ReplicaLook)| (other.shard, other.replica) == (*shard, *voter);
                        // Nor on one that does not run: the cluster may have replaced it, and then it does not come back.
                        !self.lost.contains(&(*shard, *voter)) && looks.iter().any(is_there)
                    })
            })
        })
    }

    /// The replicas of a node are lost.
    fn lose(&mut self, universe: &Universe, cluster: &SimCluster, at: usize) {
        self.disks_lost += 1;
        let here = looks(universe, cluster).into_iter().filter(|(node, _)| *node == at);
        self.lost.extend(here.map(|(_, look)| (look.shard, look.replica)));
    }

    /// What its followers answer reaches a leader late, and then it is not heard any more, but hears what was under way.
    fn deaf_leader(&mut self, universe: &mut Universe, cluster: &SimCluster) {
        let Some((leader, others)) = leader(universe, cluster) else { return };
        self.count("answers late, then the leader is not heard");
        let delay = universe.rng.random_range(250..480);
        let link = Link { delay_ms_min: delay, delay_ms_max: delay + 10 };
        let slow: Vec<_> = others.iter().map(|other| (*other, leader)).collect();
        for (from, to) in &slow {
            universe.net.set_link(*from, *to, Some(link));
        }
        let ways: Vec<_> = others.iter().map(|other| (leader, *other)).collect();
        let after = universe.rng.random_range(700..1600);
        let until = after + universe.rng.random_range(1000..2500);
        self.at(universe, after, Later::Cut(ways.clone()));
        self.at(universe, until, Later::Mend(ways));
        self.at(universe, until, Later::Usual(slow));
    }

    /// One follower does not reach the leader and stands for election, while the other, whose promise the leader counts on, is
    /// started anew and hears the leader no more.
    fn forgetful_voter(&mut self, universe: &mut Universe, cluster: &SimCluster) {
        let Some((leader, mut others)) = leader(universe, cluster) else { return };
        // One that leads another group is answered by the voter as soon as that is back, so they hear each other in time.
        let looks = looks(universe, cluster);
        let leads = |ip: &IpAddr| {
            let is_there = |at: usize| universe.hosts[cluster.nodes[at].host].ip == *ip;
            looks.iter().any(|(at, look)| look.leads && is_there(*at))
        };
        others.sort_by_key(|ip| !leads(ip));
        let [apart, voter] = others[..] else { return };
        let Some(node) = cluster.nodes.iter().position(|node| universe.hosts[node.host].ip == voter) else { return };
        self.count("a follower cut off, another started anew");
        let apart = vec![(leader, apart), (apart, leader)];
        let silent = vec![(leader, voter)];
        let after = universe.rng.random_range(900..1800);
        self.at(universe, 0, Later::Cut(apart.clone()));
        self.at(universe, after, Later::Cut(silent.clone()));
        self.at(universe, after, Later::Kill(node));
        let until = after + universe.rng.random_range(1000..2000);
        self.at(universe, until, Later::Mend(silent));
        self.at(universe, until, Later::Mend(apart));
    }

    fn crash(&mut self, universe: &mut Universe, cluster: &mut SimCluster, at: usize) {
        let fate = if universe.rng.random_bool(0.5) { Fate::Reset } else { Fate::Silence };
        self.count(if fate == Fate::Reset { "process killed" } else { "power lost" });
        cluster.end_node(universe, at, fate);
        // Now and then so long that its replicas are made elsewhere.
        let after = match universe.rng.random_range(0..12) {
            0 if (cluster.nodes.len() > 3 || cluster.yard.is_some()) && self.disks_lost == 0 => {
                universe.rng.random_range(9_000..16_000)
            }
            _ => universe.rng.random_range(10..3000),
        };
        self.at(universe, after, Later::StartNode(at));
    }

    fn partition(&mut self, universe: &mut Universe, cluster: &SimCluster) {
        let nodes: Vec<IpAddr> = cluster.nodes.iter().map(|node| universe.hosts[node.host].ip).collect();
        let victim = nodes[victim(universe, cluster)];
        let others: Vec<IpAddr> = universe.hosts.iter().map(|host| host.ip).filter(|ip| *ip != victim).collect();
        let mut ways = Vec::new();
        match universe.rng.random_range(0..6) {
            4.. => {
                self.count("partition: one node from the nodes");
                let others = nodes.iter().filter(|ip| **ip != victim);
                ways.extend(others.flat_map(|ip| [(victim, *ip), (*ip, victim)]));
            }
            0 => {
                self.count("partition: one node from all");
                ways.extend(others.iter().flat_map(|ip| [(victim, *ip), (*ip, victim)]));
            }
            1 => {
                self.count("partition: one node is not heard");
                ways.extend(others.iter().map(|ip| (victim, *ip)));
            }
            2 => {
                self.count("partition: one node does not hear");
                ways.extend(others.iter().map(|ip| (*ip, victim)));
            }
            _ => {
                self.count("partition: two do not reach each other");
                let other = others[universe.rng.random_range(0..others.len())];
                ways.extend([(victim, other), (other, victim)]);
            }
        }
        for (from, to) in &ways {
            universe.net.cut(*from, *to);
        }
        let after = universe.rng.random_range(50..5000);
        self.at(universe, after, Later::Mend(ways));
    }

    fn slow_link(&mut self, universe: &mut Universe, cluster: &SimCluster) {
        self.count("link slow");
        let at = universe.rng.random_range(0..cluster.nodes.len());
        let victim = universe.hosts[cluster.nodes[at].host].ip;
        let others: Vec<IpAddr> = universe.hosts.iter().map(|host| host.ip).filter(|ip| *ip != victim).collect();
        let delay = universe.rng.random_range(10..400);
        let link = Link { delay_ms_min: delay / 2, delay_ms_max: delay };
        let mut ways = Vec::new();
        for other in others {
            if universe.rng.random_bool(0.6) {
                ways.push((victim, other));
            }
            if universe.rng.random_bool(0.6) {
                ways.push((other, victim));
            }
        }
        for (from, to) in &ways {
            universe.net.set_link(*from, *to, Some(link));
        }
        let after = universe.rng.random_range(200..4000);
        self.at(universe, after, Later::Usual(ways));
    }

    /// Everything is made good.
    pub fn calm(&mut self, universe: &mut Universe, cluster: &mut SimCluster) {
        for (_, later) in std::mem::take(&mut self.later) {
            undo(universe, cluster, later);
        }
        universe.net.mend_all();
        for host in 0..universe.hosts.len() {
            universe.pause(host, false);
            if let Some(context) = universe.context(host) {
                context.ends_at.store(0, Ordering::Relaxed);
            }
        }
    }
}

fn name_of(point: u64) -> &'static str {
    Point::ALL.iter().find(|known| **known as u64 == point).map_or("nowhere", |point| point.name())
}

/// What every replica takes itself for, with the node that it is on.
pub fn looks(universe: &Universe, cluster: &SimCluster) -> Vec<(usize, ReplicaLook)> {
    let mut all = Vec::new();
    for (at, node) in cluster.nodes.iter().enumerate() {
        let Some(inspector) = node.said.inspector.lock().clone() else { continue };
        let looks = universe.inside(node.host, |behind| inspector.replicas(behind));
        all.extend(looks.unwrap_or_default().into_iter().map(|look| (at, look)));
    }
    all
}

/// Where the leader of some shard is, and where the others are that vote with it.
fn leader(universe: &mut Universe, cluster: &SimCluster) -> Option<(IpAddr, Vec<IpAddr>)> {
    let looks = looks(universe, cluster);
    let leaders: Vec<&(usize, ReplicaLook)> = looks.iter().filter(|(_, look)| look.leads && look.may_read).collect();
    if leaders.is_empty() {
        return None;
    }
    let (at, led) = leaders[universe.rng.random_range(0..leaders.len())];
    let votes = |(other, look): &&(usize, ReplicaLook)| {
        other != at && look.shard == led.shard && led.voters.contains(&look.replica)
    };
    let ip = |at: usize| universe.hosts[cluster.nodes[at].host].ip;
    let mut others: Vec<IpAddr> = looks.iter().filter(votes).map(|(other, _)| ip(*other)).collect();
    let at = ip(*at);
    if universe.rng.random_bool(0.5) {
        others.reverse();
    }
    Some((at, others))
}

/// A node to which something happens: half of the time one that leads a shard, where it matters most.
fn victim(universe: &mut Universe, cluster: &SimCluster) -> usize {
    let any = universe.rng.random_range(0..cluster.nodes.len());
    let leads = |at: &usize| {
        let node = &cluster.nodes[*at];
        let inspector = node.said.inspector.lock().clone();
        inspector.is_some_and(|inspector| {
            let look = |behind| inspector.replicas(behind).iter().any(|look| look.leads);
            universe.inside(node.host, look).unwrap_or_default()
        })
    };
    let leaders: Vec<usize> = (0..cluster.nodes.len()).filter(leads).collect();
    let (draw, wanted) = (universe.rng.random_range(0..cluster.nodes.len()), universe.rng.random_bool(0.5));
    if wanted && !leaders.is_empty() { leaders[draw % leaders.len()] } else { any }
}

fn undo(universe: &mut Universe, cluster: &mut SimCluster, later: Later) {
    match later {
        Later::StartNode(at) => {
            if !universe.runs(cluster.nodes[at].host) && cluster.nodes[at].over.is_none() {
                cluster.start_node(universe, at);
            }
        }
        Later::StartBalancer(at) => {
            if !universe.runs(cluster.balancers[at]) {
                cluster.start_balancer(universe, at);
            }
        }
        Later::Kill(_) | Later::Cut(_) => {} // faults of their own, which do not begin any more
        Later::Resume(host) => universe.pause(host, false),
        Later::Mend(ways) => ways.iter().for_each(|(from, to)| universe.net.mend(*from, *to)),
        Later::Usual(ways) => ways.iter().for_each(|(from, to)| universe.net.set_link(*from, *to, None)),
        Later::Room(at) => cluster.nodes[at].disk.set_capacity(super::cluster::CAPACITY),
        Later::QuickDisk(host) => {
            if let Some(context) = universe.context(host) {
                context.disk_delay_ms.store(0, Ordering::Relaxed);
            }
        }
    }
}
