//! One seed from its beginning to its end: a cluster is made, works under faults, must heal in a calm, and is judged.

use super::batches::Ledger;
use super::cluster::{NodeHost, SimCluster};
use super::faults::{Faults, Nemesis, looks};
use super::operator::Operator;
use super::universe::Universe;
use super::watch::Watch;
use super::workload::{Counts, Story, connect};
use crate::judge::replicas;
use crate::judge::search::Verdict;
use parking_lot::Mutex;
use rand::RngExt;
use shkv_client::Admin;
use shkv_node::inspect::{Bug, Point, ReplicaLook, RowsLook};
use shkv_proto::ShardId;
use shkv_proto::world::sim::Fate;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Nodes that found a cluster.
const FOUNDERS: u8 = 3;
/// How long a cluster may take to be made, in milliseconds.
const BOOT_MS_MAX: u64 = 30_000;
/// How long it may take to heal and make progress once nothing goes wrong any more.
const HEAL_MS_MAX: u64 = 60_000;
/// Operations that must be acknowledged in the calm.
const CALM_OPERATIONS: u64 = 30;
/// Batches that must be.
const CALM_BATCHES: u64 = 6;
/// How long the clients may take to end, and the last look to be taken.
const END_MS_MAX: u64 = 20_000;

/// How long a follower is away so that it needs a snapshot, in milliseconds: less than nodes are waited for.
const AWAY_MS: u64 = 6_500;
/// How long a snapshot takes to begin, in milliseconds at the most.
const SNAPSHOT_MS_MAX: u64 = 4_000;
/// How long another one takes to be there when the first was cut off.
const SCENE_MS_MAX: u64 = 25_000;
/// Entries that a follower may be behind its leader while clients are at work.
const FEW_ENTRIES: u64 = 50;

/// How long the dead node has been silent when the wish is told, in milliseconds at the most: less than it takes until the
/// balancer doubts that it is alive.
const SILENT_MS_MAX: u64 = 600;
/// How long a wish has to be carried out, in milliseconds.
const WISHED_MS: u64 = 4_000;

/// What is to be run.
#[derive(Clone, Copy, Debug)]
pub struct Setup {
    /// The seed.
    pub seed: u64,
    /// A fault that is planted in the nodes.
    pub bug: Option<Bug>,
    /// Whether to keep what happened in words.
    pub lines: bool,
}

/// What came out.
#[derive(Debug, Default)]
pub struct Outcome {
    /// The seed.
    pub seed: u64,
    /// A number that depends on everything that happened, and of how many events it is made.
    pub trace: (u64, u64),
    /// What happened in words, if it was asked for.
    pub lines: Vec<String>,
    /// How long it was, in simulated milliseconds.
    pub simulated_ms: u64,
    /// What went wrong on purpose.
    pub faults: Faults,
    /// How often what was reached, by name; what was not has a zero.
    pub reached: BTreeMap<&'static str, u64>,
    /// Where processes were ended in the middle of what they did.
    pub crashes: BTreeMap<&'static str, u64>,
    /// What the clients did.
    pub counts: Counts,
    /// What was wrong that must not be.
    pub violations: Vec<String>,
}

/// Runs a seed.
#[must_use]
pub fn run(setup: Setup) -> Outcome {
    let mut run = Run::new(setup);
    run.live();
    run.finish()
}

/// A follower that needs a snapshot loses its power each time that one begins to come in, and nobody tells the sender.
///
/// It is then to get another one soon, and everything else is to hold as ever.
#[must_use]
pub fn power_lost_in_a_snapshot(seed: u64) -> Outcome {
    let mut run = Run::new(Setup { seed, bug: None, lines: false });
    if run.begin() {
        run.snapshot_scene();
    }
    run.finish()
}

/// A node dies, and soon an operator wishes another to be emptied. The replicas that are left must not become so few that
/// they are no quorum without the dead one.
#[must_use]
pub fn drained_after_a_loss(seed: u64) -> Outcome {
    let mut run = Run::new(Setup { seed, bug: None, lines: false });
    if run.begin() {
        run.drain_scene();
    }
    run.finish()
}

struct Run {
    universe: Universe,
    cluster: SimCluster,
    nemesis: Nemesis,
    watch: Watch,
    story: Arc<Story>,
    ledger: Arc<Ledger>,
    violations: Vec<String>,
}

impl Run {
    fn new(setup: Setup) -> Self {
        let mut universe = Universe::new(setup.seed, setup.bug.map_or(0, |bug| bug as u64), setup.lines);
        let balancers = universe.rng.random_range(1..=2);
        let late = universe.rng.random_range(0..=2);
        let cluster = SimCluster::new(&mut universe, FOUNDERS, late, balancers, 2);
        Self {
            universe,
            cluster,
            nemesis: Nemesis::default(),
            watch: Watch::default(),
            story: Arc::default(),
            ledger: Arc::default(),
            violations: vec![],
        }
    }

    /// Makes the cluster, and lets its clients begin. `false` if it cannot be made.
    fn begin(&mut self) -> bool {
        for at in 0..usize::from(FOUNDERS) {
            self.cluster.start_node(&mut self.universe, at);
        }
        for at in 0..self.cluster.balancers.len() {
            self.cluster.start_balancer(&mut self.universe, at);
        }
        for host in self.cluster.clients.clone() {
            let (story, homes) = (self.story.clone(), self.cluster.homes(&self.universe));
            self.universe.start(host, story.work(homes.clone(), 3));
            for by_library in [false, true] {
                self.universe.run_on(host, self.ledger.clone().work(homes.clone(), by_library));
            }
        }
        let is_made = self.pass(BOOT_MS_MAX, |run| run.story.counts().done >= 10);
        if !is_made {
            self.violations.push(format!("no cluster after {BOOT_MS_MAX} ms: {}", self.state()));
        }
        is_made
    }

    fn live(&mut self) {
        if !self.begin() {
            return;
        }
        let late = self.cluster.nodes.len() - usize::from(FOUNDERS);
        if late > 0 {
            // The operator works from the first client's host.
            let names = self.cluster.nodes.iter().map(|node| node.name.clone()).collect();
            let operator = Arc::new(Operator::new(names, self.nemesis.emptying.clone()));
            let (story, homes) = (self.story.clone(), self.cluster.homes(&self.universe));
            self.universe.run_on(self.cluster.clients[0], operator.work(story, homes));
        }
        let long = if late > 0 { 25_000 } else { 12_000 };
        let until = self.universe.now_ms + self.universe.rng.random_range(4_000..long);
        self.nemesis.join_late(&mut self.universe, usize::from(FOUNDERS)..self.cluster.nodes.len());
        while self.universe.now_ms < until && self.is_right() {
            self.step();
            self.nemesis.strike(&mut self.universe, &mut self.cluster);
        }
        self.nemesis.calm(&mut self.universe, &mut self.cluster);
        self.story.calm();
        let wanted = (self.story.counts().done + CALM_OPERATIONS, self.ledger.done() + CALM_BATCHES);
        if !self.pass(HEAL_MS_MAX, |run| run.story.counts().done >= wanted.0 && run.ledger.done() >= wanted.1) {
            return self
                .violations
                .push(format!("no progress {HEAL_MS_MAX} ms after the last fault: {}", self.state()));
        }
        self.end();
    }

    fn drain_scene(&mut self) {
        let dead = self.universe.rng.random_range(0..usize::from(FOUNDERS));
        let emptied = (dead + 1) % usize::from(FOUNDERS);
        self.cluster.end_node(&mut self.universe, dead, Fate::Silence);
        for _ in 0..self.universe.rng.random_range(0..=SILENT_MS_MAX) {
            self.step();
        }
        let wish = Admin::Drain { node: self.cluster.nodes[emptied].name.clone(), drain: true };
        let homes = self.cluster.homes(&self.universe);
        self.universe.run_on(self.cluster.clients[0], async move {
            let client = connect(&homes).await;
            while client.admin(&wish).await.is_err() {}
        });
        let done = |run: &Self| run.story.counts().done;
        for _ in 0..WISHED_MS {
            self.step();
        }
        let wanted = done(self) + CALM_OPERATIONS;
        if !self.pass(SCENE_MS_MAX, move |run| done(run) >= wanted) {
            self.violations.push(format!("two nodes of three do not go on: {}", self.state()));
        }
    }

    fn snapshot_scene(&mut self) {
        let at = self.universe.rng.random_range(0..usize::from(FOUNDERS));
        self.cluster.end_node(&mut self.universe, at, Fate::Reset);
        let begins = self.universe.now_ms;
        self.pass(AWAY_MS, |run| run.universe.now_ms >= begins + AWAY_MS - 1);
        self.cluster.start_node(&mut self.universe, at);
        let host = self.cluster.nodes[at].host;
        if let Some(context) = self.universe.context(host) {
            context.ends_at.store(Point::SnapshotRows as u64, Ordering::Relaxed);
        }
        let ends = |universe: &Universe| universe.context(host).is_some_and(|context| context.ended_at() != 0);
        for _ in 0..SNAPSHOT_MS_MAX {
            self.universe.step();
            self.watch.look(&self.universe, &self.cluster);
            if ends(&self.universe) {
                break;
            }
        }
        if ends(&self.universe) {
            self.nemesis.count("power lost while a snapshot came in");
        }
        self.cluster.end_node(&mut self.universe, at, Fate::Silence);
        self.cluster.start_node(&mut self.universe, at);
        let level = self.universe.now_ms + SCENE_MS_MAX;
        let is_there = |run: &Self| {
            let looks = looks(&run.universe, &run.cluster);
            let behind =
                |look: &ReplicaLook, shard, applied| look.shard == shard && look.applied + FEW_ENTRIES >= applied;
            looks
                .iter()
                .filter(|(_, look)| look.leads)
                .all(|(_, led)| looks.iter().any(|(node, look)| *node == at && behind(look, led.shard, led.applied)))
        };
        if !self.pass(SCENE_MS_MAX, is_there) {
            return self.violations.push(format!("no other snapshot came until {level} ms: {}", self.state()));
        }
        self.end();
    }

    /// Lets the clients end, and judges everything.
    fn end(&mut self) {
        self.story.stop();
        self.ledger.stop();
        if !self.pass(END_MS_MAX, |run| run.story.at_work() + run.ledger.at_work() == 0) {
            return self.violations.push("the clients do not end".into());
        }
        if !self.pass(HEAL_MS_MAX, Self::is_whole) {
            return self.violations.push(format!("the groups do not become whole: {}", self.state()));
        }
        if !self.pass(HEAL_MS_MAX, Self::is_level) {
            return self.violations.push(format!("the replicas do not become equal: {}", self.state()));
        }
        self.compare_replicas();
        self.look_last();
    }

    fn step(&mut self) {
        self.universe.step();
        let ends = self.cluster.look_for_ends(&mut self.universe);
        self.nemesis.ended(&mut self.universe, &mut self.cluster, ends);
        self.nemesis.go_on(&mut self.universe, &mut self.cluster);
        for what in self.cluster.do_orders(&mut self.universe) {
            self.nemesis.count(what);
        }
        self.violations.append(&mut self.nemesis.wrong);
        self.watch.look(&self.universe, &self.cluster);
    }

    fn is_right(&self) -> bool {
        self.watch.violations.is_empty() && self.violations.is_empty()
    }

    /// Lets time pass until something holds. `false` if it does not in time, or something is wrong already.
    fn pass(&mut self, ms: u64, holds: impl Fn(&Self) -> bool) -> bool {
        let until = self.universe.now_ms + ms;
        while !holds(self) {
            if self.universe.now_ms >= until || !self.is_right() {
                return !self.is_right(); // what is wrong says it already
            }
            self.step();
        }
        true
    }

    /// The rows of every replica, by shard.
    fn rows(&self) -> BTreeMap<u32, Vec<(String, RowsLook)>> {
        let mut all: BTreeMap<u32, Vec<(String, RowsLook)>> = BTreeMap::new();
        for node in &self.cluster.nodes {
            let Some(inspector) = node.said.inspector.lock().clone() else { continue };
            let look = |behind| {
                let shards: BTreeSet<u32> = inspector.replicas(behind).iter().map(|look| look.shard).collect();
                shards
                    .into_iter()
                    .filter_map(|shard| Some((shard, inspector.rows(ShardId(shard))?)))
                    .collect::<Vec<_>>()
            };
            for (shard, rows) in self.universe.inside(node.host, look).unwrap_or_default() {
                all.entry(shard).or_default().push((node.name.clone(), rows));
            }
        }
        all
    }

    /// Whether each shard is led, and has three voters or more, all of which are there.
    fn is_whole(&self) -> bool {
        let looks = looks(&self.universe, &self.cluster);
        let shards: BTreeSet<u32> = looks.iter().map(|(_, look)| look.shard).collect();
        let is_there = |shard: u32, voter: u64| {
            looks.iter().any(|(at, look)| {
                look.shard == shard && look.replica == voter && self.cluster.nodes[*at].over.is_none()
            })
        };
        !shards.is_empty()
            && shards.iter().all(|shard| {
                // One that offered its leadership away in vain leads without a lease.
                let led = looks.iter().filter(|(_, look)| look.shard == *shard && look.leads);
                led.max_by_key(|(_, look)| look.term).is_some_and(|(_, look)| {
                    look.voters.len() >= 3 && !look.is_joint && look.voters.iter().all(|voter| is_there(*shard, *voter))
                })
            })
    }

    /// Whether all replicas of each shard have applied the same entries.
    fn is_level(&self) -> bool {
        let mut applied: BTreeMap<u32, BTreeSet<u64>> = BTreeMap::new();
        let mut nodes = 0;
        let counts = |node: &&NodeHost| node.over.is_none() && self.universe.hosts[node.host].lives > 0;
        for node in self.cluster.nodes.iter().filter(counts) {
            let Some(inspector) = node.said.inspector.lock().clone() else { return false };
            let Some(looks) = self.universe.inside(node.host, |behind| inspector.replicas(behind)) else {
                return false;
            };
            nodes += 1;
            for look in looks {
                applied.entry(look.shard).or_default().insert(look.applied);
            }
        }
        // The balancers' lease is renewed all the time, so the system shard is never at rest.
        nodes > 0 && applied.iter().filter(|(shard, _)| **shard != 0).all(|(_, indexes)| indexes.len() == 1)
    }

    fn compare_replicas(&mut self) {
        for (shard, all) in self.rows() {
            let newest = all.iter().map(|(_, look)| look.applied).max().unwrap_or(0);
            let level: Vec<_> = all
                .into_iter()
                .filter(|(_, look)| look.applied == newest)
                .map(|(who, look)| (who, told(look)))
                .collect();
            if let Verdict::Wrong(why) = replicas::judge(&level) {
                self.violations.push(format!("shard {shard}: {why}"));
            }
        }
    }

    /// Reads everything by a client, and lets the judges look at it together with what was told.
    fn look_last(&mut self) {
        let host = self.universe.add("auditor".into(), 3, 1);
        let found = Arc::new(Mutex::new(None));
        let (story, homes, answer) = (self.story.clone(), self.cluster.homes(&self.universe), found.clone());
        self.universe.start(host, async move {
            loop {
                if let Ok(rows) = story.last_look(&homes).await {
                    *answer.lock() = Some(rows);
                    return;
                }
            }
        });
        let is_read = found.clone();
        if !self.pass(END_MS_MAX, move |_| is_read.lock().is_some()) {
            return self.violations.push(format!("the rows cannot be read in the end: {}", self.state()));
        }
        if let Some(found) = found.lock().take() {
            self.violations.extend(self.story.judge(&found));
            self.violations.extend(self.ledger.judge(&found));
        }
    }

    /// How things stand, for whoever has to find out why they do not go on.
    fn state(&self) -> String {
        let mut text = format!("{:?};", self.story.counts());
        for node in &self.cluster.nodes {
            let looks = node.said.inspector.lock().clone().and_then(|inspector| {
                self.universe.inside(node.host, |behind| (inspector.replicas(behind), inspector.epoch()))
            });
            let runs = self.universe.runs(node.host);
            text += &format!("\n  {} as {:?} runs={runs} over={:?} {looks:?}", node.name, node.instance, node.over);
        }
        text
    }

    fn finish(mut self) -> Outcome {
        let mut violations = std::mem::take(&mut self.watch.violations);
        violations.append(&mut self.violations);
        let mut reached = self.watch.reached();
        for node in &self.cluster.nodes {
            let stats = node.disk.stats();
            let counts = [
                ("log: segments opened", stats.segments),
                ("log: segments let go", stats.released),
                ("log: rot in a read at a start", stats.rotten_starts),
                ("log: rot in a read of an entry", stats.rotten_reads),
                ("disk: sectors lost with the power", stats.lost_sectors),
                ("disk: writes that found no room", stats.full),
            ];
            counts.into_iter().for_each(|(what, count)| *reached.entry(what).or_default() += count);
        }
        Outcome {
            reached,
            crashes: std::mem::take(&mut self.nemesis.crashes),
            seed: self.universe.seed,
            trace: self.universe.trace.sum(),
            lines: self.universe.trace.lines(),
            simulated_ms: self.universe.now_ms,
            faults: std::mem::take(&mut self.nemesis.done),
            counts: Counts { batches: self.ledger.done(), ..self.story.counts() },
            violations,
        }
    }
}

/// Rows as a reader wants to see them.
fn told(look: RowsLook) -> Vec<String> {
    let row = |(key, version, value): (Vec<u8>, u64, Vec<u8>)| {
        let check = xxhash_rust::xxh3::xxh3_64(&value);
        let start = &value[..value.len().min(20)];
        format!("{} = {}… ({} bytes, {check:016x}) at {version}", key.escape_ascii(), start.escape_ascii(), value.len())
    };
    std::iter::once(format!("revision {}", look.revision)).chain(look.rows.into_iter().map(row)).collect()
}
