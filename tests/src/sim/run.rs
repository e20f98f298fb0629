//! One seed from its beginning to its end: a cluster is made, works under faults, must heal in a calm, and is judged.

use super::batches::Ledger;
use super::cluster::{NodeHost, SimCluster};
use super::faults::{Faults, Nemesis, looks};
use super::operator::Operator;
use super::universe::Universe;
use super::watch::Watch;
use super::workload::{Counts, Story};
use crate::judge::replicas;
use crate::judge::search::Verdict;
use parking_lot::Mutex;
use rand::RngExt;
use shkv_node::inspect::{Bug, RowsLook};
use shkv_proto::ShardId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// Nodes that found a cluster.
pub(super) const FOUNDERS: u8 = 3;
/// How long a cluster may take to be made, in milliseconds.
const BOOT_MS_MAX: u64 = 30_000;
/// How long it may take to heal and make progress once nothing goes wrong any more.
pub(super) const HEAL_MS_MAX: u64 = 60_000;
/// Operations that must be acknowledged in the calm.
pub(super) const CALM_OPERATIONS: u64 = 30;
/// Batches that must be.
const CALM_BATCHES: u64 = 6;
/// How long the clients may take to end, and the last look to be taken.
pub(super) const END_MS_MAX: u64 = 20_000;

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

/// A seed while it runs.
pub(super) struct Run {
    pub(super) universe: Universe,
    pub(super) cluster: SimCluster,
    pub(super) nemesis: Nemesis,
    pub(super) watch: Watch,
    pub(super) story: Arc<Story>,
    pub(super) ledger: Arc<Ledger>,
    pub(super) violations: Vec<String>,
}

impl Run {
    pub(super) fn new(setup: Setup) -> Self {
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
    pub(super) fn begin(&mut self) -> bool {
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

    /// Lets the clients end, and judges everything.
    pub(super) fn end(&mut self) {
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

    pub(super) fn step(&mut self) {
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

    pub(super) fn is_right(&self) -> bool {
        self.watch.violations.is_empty() && self.violations.is_empty()
    }

    /// Lets time pass until something holds. `false` if it does not in time, or something is wrong already.
    pub(super) fn pass(&mut self, ms: u64, holds: impl Fn(&Self) -> bool) -> bool {
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
    pub(super) fn is_whole(&self) -> bool {
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
    pub(super) fn is_level(&self) -> bool {
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
    pub(super) fn state(&self) -> String {
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

    pub(super) fn finish(mut self) -> Outcome {
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
