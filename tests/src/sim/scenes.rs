//! Scenes: a cluster to which one thing happens that is rare in a life at random, and what must hold then.

use super::faults::looks;
use super::run::{CALM_OPERATIONS, END_MS_MAX, FOUNDERS, HEAL_MS_MAX, Outcome, Run, Setup};
use super::universe::Universe;
use super::workload::connect;
use rand::RngExt;
use shkv_client::Admin;
use shkv_node::inspect::{Bug, Point, ReplicaLook};
use shkv_proto::ShardId;
use shkv_proto::world::sim::Fate;
use std::sync::atomic::Ordering;

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

/// The shard that the balancers write in all the time.
const SYSTEM: u32 = 0;
/// Balancers that come so that their beats are spread over the half second in which each beats once, and how far they are apart.
const MORE_BALANCERS: usize = 6;
const BEATS_APART_MS: u64 = 80;
/// How often a promise is put to the test in a scene.
const PROMISES: u32 = 6;
/// How long a follower is cut off before the other is started anew, in milliseconds: it stands for election by then, and does
/// so again and again.
const APART_MS: std::ops::Range<u64> = 1_200..2_400;
/// How long a process is away that is started anew at once, in milliseconds at the most.
const ANEW_MS_MAX: u64 = 20;
/// How long the leader is not heard after that, in milliseconds: longer than its lease and the time in which nobody is voted for.
const SILENCE_MS: u64 = 1_500;

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

/// One follower is cut off from its leader and stands for election, while the other, whose promise the leader's lease counts
/// on, is started anew and hears the leader no more. It must not vote before that lease is over.
///
/// Nothing is written meanwhile: one that is cut off and misses an entry is voted for by nobody.
#[must_use]
pub fn promise_forgotten(seed: u64, bug: Option<Bug>) -> Outcome {
    let mut run = Run::new(Setup { seed, bug, lines: false });
    if run.begin() {
        run.promise_scene();
    }
    run.finish()
}

/// A leader, a follower that does not hear it, and another one that does: which nodes.
#[derive(Clone, Copy)]
struct Trio {
    shard: u32,
    leader: usize,
    apart: usize,
    voter: usize,
}

impl Run {
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

    /// A process that was started anew knows nobody's address until a balancer beats, which would be too late most of the time.
    fn beat_more_often(&mut self) {
        for _ in 0..MORE_BALANCERS {
            let at = self.cluster.balancers.len();
            let number = at as u8 + 1;
            self.cluster.balancers.push(self.universe.add(format!("balancer-{number}"), 1, number));
            self.cluster.start_balancer(&mut self.universe, at);
            for _ in 0..BEATS_APART_MS {
                self.step();
            }
        }
    }

    fn promise_scene(&mut self) {
        self.beat_more_often();
        self.story.stop();
        self.ledger.stop();
        if !self.pass(END_MS_MAX, |run| run.story.at_work() + run.ledger.at_work() == 0) {
            return self.violations.push("the clients do not end".into());
        }
        for _ in 0..PROMISES {
            if !self.pass(HEAL_MS_MAX, |run| run.is_whole() && run.is_level()) {
                return self.violations.push(format!("the groups do not become whole: {}", self.state()));
            }
            self.put_a_promise_to_the_test();
            if !self.is_right() {
                return;
            }
        }
        self.end();
    }

    /// A group at rest, and which of its followers is to be cut off.
    fn trio(&mut self) -> Option<Trio> {
        let looks = looks(&self.universe, &self.cluster);
        let mut trios = Vec::new();
        for (leader, led) in looks.iter().filter(|(_, look)| look.shard != SYSTEM && look.leads && look.may_read) {
            let follows = |(at, look): &&(usize, ReplicaLook)| {
                at != leader && look.shard == led.shard && led.voters.contains(&look.replica)
            };
            let others: Vec<usize> = looks.iter().filter(follows).map(|(at, _)| *at).collect();
            if let [one, other] = others[..] {
                let of = |apart, voter| Trio { shard: led.shard, leader: *leader, apart, voter };
                trios.extend([of(one, other), of(other, one)]);
            }
        }
        (!trios.is_empty()).then(|| trios[self.universe.rng.random_range(0..trios.len())])
    }

    /// The one that is to be cut off leads the system shard: the voter hears it as soon as it is back, and so has a connection
    /// on which it can answer in time.
    fn let_lead_the_system(&mut self, at: usize) -> bool {
        let leads = move |run: &Self| {
            looks(&run.universe, &run.cluster).iter().any(|(on, look)| *on == at && look.shard == SYSTEM && look.leads)
        };
        if !leads(self) {
            let wish = Admin::Transfer { shard: ShardId(SYSTEM), node: self.cluster.nodes[at].name.clone() };
            let homes = self.cluster.homes(&self.universe);
            self.universe.run_on(self.cluster.clients[0], async move {
                let client = connect(&homes).await;
                let _ = client.admin(&wish).await; // if it is not done, there is nothing to be seen, and another time there is
            });
        }
        self.pass(WISHED_MS, leads)
    }

    fn put_a_promise_to_the_test(&mut self) {
        let Some(trio) = self.trio() else { return };
        if !self.let_lead_the_system(trio.apart) {
            return;
        }
        let ip = |at: usize| self.universe.hosts[self.cluster.nodes[at].host].ip;
        let (leader, apart, voter) = (ip(trio.leader), ip(trio.apart), ip(trio.voter));
        let ways = [(leader, apart), (apart, leader), (leader, voter)];
        for (from, to) in &ways[..2] {
            self.universe.net.cut(*from, *to);
        }
        for _ in 0..self.universe.rng.random_range(APART_MS) {
            self.step();
        }
        self.cluster.end_node(&mut self.universe, trio.voter, Fate::Reset);
        self.universe.net.cut(leader, voter);
        let reads = |(at, look): &(usize, ReplicaLook)| *at == trio.leader && look.shard == trio.shard && look.may_read;
        if looks(&self.universe, &self.cluster).iter().any(reads) {
            self.nemesis.count("a voter started anew that a lease counts on");
        }
        for _ in 0..self.universe.rng.random_range(0..ANEW_MS_MAX) {
            self.step();
        }
        self.cluster.start_node(&mut self.universe, trio.voter);
        for _ in 0..SILENCE_MS {
            self.step();
        }
        for (from, to) in ways {
            self.universe.net.mend(from, to);
        }
    }
}
