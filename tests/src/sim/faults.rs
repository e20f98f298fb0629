//! What goes wrong in a simulation, and when: drawn from the seed.

use super::cluster::SimCluster;
use super::universe::Universe;
use rand::RngExt;
use shkv_proto::world::sim::{Fate, Link};
use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::Ordering;

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
}

/// The one who does it.
#[derive(Default)]
pub struct Nemesis {
    next_ms: u64,
    later: Vec<(u64, Later)>,
    /// What was done so far.
    pub done: Faults,
}

impl Nemesis {
    fn count(&mut self, what: &'static str) {
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
    pub fn ended(&mut self, universe: &mut Universe, cluster: &mut SimCluster, ends: Vec<(usize, String)>) {
        for (at, reason) in ends {
            self.count("process ended by itself");
            if reason.contains("removed from, or replaced in") {
                cluster.nodes[at].over = Some(reason);
                continue;
            }
            let after = universe.rng.random_range(10..2000);
            self.at(universe, after, Later::StartNode(at));
        }
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
            undo(universe, cluster, later);
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
        let kind = universe.rng.random_range(0..20);
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
                cluster.nodes[at].disk.lose_power_after(operations);
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
            _ => {}
        }
    }

    fn crash(&mut self, universe: &mut Universe, cluster: &mut SimCluster, at: usize) {
        let fate = if universe.rng.random_bool(0.5) { Fate::Reset } else { Fate::Silence };
        self.count(if fate == Fate::Reset { "process killed" } else { "power lost" });
        cluster.end_node(universe, at, fate);
        // Now and then so long that its replicas are made elsewhere.
        let after = match universe.rng.random_range(0..12) {
            0 if cluster.nodes.len() > 3 => universe.rng.random_range(9_000..16_000),
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
        }
    }
}

/// A node to which something happens: half of the time one that leads a shard, where it matters most.
fn victim(universe: &mut Universe, cluster: &SimCluster) -> usize {
    let any = universe.rng.random_range(0..cluster.nodes.len());
    let leads = |at: &usize| {
        let node = &cluster.nodes[*at];
        let inspector = node.said.inspector.lock().clone();
        inspector.is_some_and(|inspector| {
            let look = || inspector.replicas().iter().any(|look| look.leads);
            universe.inside(node.host, look).is_some_and(|(leads, _)| leads)
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
