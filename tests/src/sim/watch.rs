//! Looks at every node after every millisecond, and lets the judges of invariants say what they think of it.

use super::cluster::SimCluster;
use super::universe::Universe;
use crate::judge::leadership::Leadership;
use crate::judge::lease;
use crate::judge::matching::{Entry, Matching};
use crate::judge::progress::Progress;
use crate::judge::removal::Removal;
use crate::judge::search::Verdict;
use shkv_node::inspect::{APPLIED, GONE, Point, REACHED, ReplicaLook, SERVED};
use std::collections::{BTreeMap, BTreeSet};

/// Most violations that are kept: the first ones say what there is to say.
const VIOLATIONS_MAX: usize = 20;

/// What was seen so far.
#[derive(Default)]
pub struct Watch {
    leadership: Leadership,
    matching: Matching,
    /// Within the life of a process: term, commit index, applied index. What is only in memory may be lost with it.
    in_life: Progress<(String, u32, u64, &'static str)>,
    epochs: Progress<String>,
    removal: Removal<(u64, u64)>,
    /// Replicas whose removal was applied by somebody: shard and replica.
    leaving: BTreeSet<(u64, u64)>,
    /// How often each point of the nodes' code was reached, by number.
    points: BTreeMap<u64, u64>,
    served: u64,
    /// What was wrong.
    pub violations: Vec<String>,
}

impl Watch {
    fn found(&mut self, verdict: Verdict, now_ms: u64) {
        if let Verdict::Wrong(why) = verdict
            && self.violations.len() < VIOLATIONS_MAX
        {
            self.violations.push(format!("at {now_ms} ms: {why}"));
        }
    }

    /// Takes in what the nodes have told, and looks at them.
    pub fn look(&mut self, universe: &Universe, cluster: &SimCluster) {
        let now = universe.now_ms;
        let mut leases = Vec::new();
        for node in &cluster.nodes {
            let Some(context) = universe.context(node.host) else { continue };
            let life = universe.hosts[node.host].lives;
            let who = format!("{} ({life})", node.instance); // a name may pass to another node
            for words in context.take_told() {
                self.told(universe, node.host, &who, words);
            }
            let Some(inspector) = node.said.inspector.lock().clone() else { continue };
            let look = |behind| (inspector.replicas(behind), inspector.epoch());
            let Some((replicas, epoch)) = universe.inside(node.host, look) else { continue };
            if let Some(epoch) = epoch {
                let verdict = self.epochs.seen(&who, epoch.0);
                self.found(verdict, now);
            }
            for look in replicas {
                self.replica(&who, &look, now);
                if look.may_read {
                    let (shard, leader) = (u64::from(look.shard), look.replica);
                    leases.push((look.shard, who.clone()));
                    let verdict = self.removal.answered((shard, leader), now);
                    self.found(verdict, now);
                    // A leader that is removed leads until it has applied that itself, and nobody else does before that.
                    for gone in self.leaving.iter().filter(|gone| gone.0 == shard && gone.1 != leader) {
                        self.removal.gone(*gone, now);
                    }
                }
            }
        }
        self.found(lease::judge(leases.iter().map(|(shard, who)| (*shard, who.as_str()))), now);
    }

    fn told(&mut self, universe: &Universe, host: usize, who: &str, words: [u64; 6]) {
        let now = universe.now_ms;
        match words {
            [APPLIED, shard, replica, index, term, hash] => {
                universe.trace.note(&[40, host as u64, shard, index, term, hash], || {
                    format!("{who} applies entry {index} of term {term} of shard {shard}")
                });
                let who = format!("{who} as {replica}");
                let verdict = self.matching.applied(shard as u32, &who, index, Entry { term, hash });
                self.found(verdict, now);
            }
            [GONE, shard, replica, by, ..] => {
                universe.trace.note(&[41, host as u64, shard, replica], || {
                    format!("{who} as {by} applies that replica {replica} of shard {shard} is gone")
                });
                self.leaving.insert((shard, replica));
            }
            [SERVED, shard, replica, began, ..] => {
                self.served += 1;
                let verdict = self.removal.answered((shard, replica), began);
                self.found(verdict, now);
            }
            [REACHED, point, ..] => *self.points.entry(point).or_default() += 1,
            _ => {}
        }
    }

    /// How often what was reached, by its name.
    #[must_use]
    pub fn reached(&self) -> BTreeMap<&'static str, u64> {
        let count = |point: &Point| self.points.get(&(*point as u64)).copied().unwrap_or(0);
        let mut reached: BTreeMap<&'static str, u64> =
            Point::ALL.iter().map(|point| (point.name(), count(point))).collect();
        reached.insert("group: a leader elected", self.leadership.count() as u64);
        reached.insert("group: a replica removed", self.removal.count() as u64);
        reached.insert("reads and writes that leaders answered", self.served);
        reached
    }

    fn replica(&mut self, who: &str, look: &ReplicaLook, now: u64) {
        let &ReplicaLook { shard, replica, term, leads, committed, applied, .. } = look;
        if leads {
            let verdict = self.leadership.leads(shard, term, replica);
            self.found(verdict, now);
        }
        let verdict = self.in_life.seen(&(who.to_owned(), shard, replica, "commit index"), committed);
        self.found(verdict, now);
        let verdict = self.in_life.seen(&(who.to_owned(), shard, replica, "applied index"), applied);
        self.found(verdict, now);
        let verdict = self.in_life.seen(&(who.to_owned(), shard, replica, "term"), term);
        self.found(verdict, now);
        if applied > committed {
            self.found(
                Verdict::Wrong(format!("{who} has applied {applied} of shard {shard}, committed {committed}")),
                now,
            );
        }
    }
}
