//! Looks at every node after every millisecond, and lets the judges of invariants say what they think of it.

use super::cluster::SimCluster;
use super::universe::Universe;
use crate::judge::leadership::Leadership;
use crate::judge::lease;
use crate::judge::matching::{Entry, Matching};
use crate::judge::progress::Progress;
use crate::judge::search::Verdict;
use shkv_node::inspect::{APPLIED, ReplicaLook};

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
            let who = format!("{} ({life})", node.name);
            for [kind, shard, replica, index, term, hash] in context.take_told() {
                if kind == APPLIED {
                    universe.trace.note(&[40, node.host as u64, shard, index, term, hash], || {
                        format!("{who} applies entry {index} of term {term} of shard {shard}")
                    });
                    let who = format!("{who} as {replica}");
                    let verdict = self.matching.applied(shard as u32, &who, index, Entry { term, hash });
                    self.found(verdict, now);
                }
            }
            let Some(inspector) = node.said.inspector.lock().clone() else { continue };
            let look = || (inspector.replicas(), inspector.epoch());
            let Some(((replicas, epoch), behind_ms)) = universe.inside(node.host, look) else { continue };
            if let Some(epoch) = epoch {
                let verdict = self.epochs.seen(&who, epoch.0);
                self.found(verdict, now);
            }
            for look in replicas {
                self.replica(&who, &look, now);
                if look.leads && look.lease_left > behind_ms * 1_000_000 {
                    leases.push((look.shard, node.name.clone()));
                }
            }
        }
        self.found(lease::judge(leases.iter().map(|(shard, who)| (*shard, who.as_str()))), now);
    }

    fn replica(&mut self, who: &str, look: &ReplicaLook, now: u64) {
        let ReplicaLook { shard, replica, term, leads, committed, applied, .. } = *look;
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
