//! What the nodes have said of themselves, and what follows from it: who leads which shard, what is missing before the
//! cluster can serve. Pure: the time comes in as an argument.

use crate::control::plan::Heard;
use serde::Serialize;
use shkv_proto::map::{ReplicaInfo, ReplicaRole};
use shkv_proto::message::{NodeHealth, NodeStatus};
use shkv_proto::{Epoch, Map, NodeId, ShardId};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// A node that was heard within this time counts as alive; one that was not is suspect.
pub(crate) const HEARD_LATELY: Duration = Duration::from_secs(2);
/// A node that is silent for so long counts as down. A slow node answers at some time, and any answer counts.
pub(crate) const DOWN_AFTER: Duration = Duration::from_secs(5);

/// The last word of each node.
#[derive(Debug)]
pub(crate) struct Health {
    nodes: BTreeMap<NodeId, Words>,
    /// Since when a node has been asked for: its silence before that is none.
    asked: BTreeMap<NodeId, Instant>,
    leaders: BTreeMap<ShardId, Leader>,
    /// Since when this balancer listens without a break: silence before that is its own.
    listening_since: Instant,
}

#[derive(Debug, Default)]
struct Words {
    last: Option<(Instant, NodeStatus)>,
    error: Option<String>,
}

/// Who said of itself that it leads, in the highest term heard of.
#[derive(Clone, Copy, Debug)]
struct Leader {
    node: NodeId,
    term: u64,
}

/// What the cluster lacks; all empty means ready.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub(crate) struct Lacks {
    /// Whether no map has been read yet.
    pub(crate) map_missing: bool,
    /// Shards of which no live node says that it leads them.
    pub(crate) shards_without_leader: Vec<u32>,
    /// Shards of which too few replicas are on nodes that were heard lately.
    pub(crate) shards_without_majority: Vec<u32>,
    /// Nodes of the map that were not heard lately; by itself not a reason not to be ready.
    pub(crate) nodes_silent: Vec<String>,
}

impl std::fmt::Display for Lacks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        if self.map_missing {
            return f.write_str("the shard map has not been read yet");
        }
        let mut parts = Vec::new();
        if !self.shards_without_leader.is_empty() {
            parts.push(format!("no leader for shards {:?}", self.shards_without_leader));
        }
        if !self.shards_without_majority.is_empty() {
            parts.push(format!("no live majority for shards {:?}", self.shards_without_majority));
        }
        if !self.nodes_silent.is_empty() {
            parts.push(format!("silent nodes: {}", self.nodes_silent.join(", ")));
        }
        f.write_str(&parts.join("; "))
    }
}

impl Lacks {
    /// Whether every shard can be read and written.
    pub(crate) fn is_ready(&self) -> bool {
        !self.map_missing && self.shards_without_leader.is_empty() && self.shards_without_majority.is_empty()
    }
}

impl Health {
    /// Nothing heard yet.
    pub(crate) fn new(now: Instant) -> Self {
        Self { nodes: BTreeMap::new(), asked: BTreeMap::new(), leaders: BTreeMap::new(), listening_since: now }
    }

    /// A node is being sent a beat.
    pub(crate) fn asks(&mut self, node: NodeId, now: Instant) {
        self.asked.entry(node).or_insert(now);
    }

    /// This balancer did not listen for a while: it was held up itself.
    pub(crate) fn was_deaf(&mut self, now: Instant) {
        self.listening_since = now;
    }

    /// For how long a node has been silent while this balancer listened.
    pub(crate) fn silent(&self, node: NodeId, now: Instant) -> Duration {
        let heard = self.nodes.get(&node).and_then(|words| words.last.as_ref()).map(|(at, _)| *at);
        let since = heard.or_else(|| self.asked.get(&node).copied());
        since.map_or(Duration::ZERO, |since| now.saturating_duration_since(since.max(self.listening_since)))
    }

    /// How a node fares.
    pub(crate) fn of(&self, node: NodeId, now: Instant) -> NodeHealth {
        match self.silent(node, now) {
            silent if silent > DOWN_AFTER => NodeHealth::Down,
            _ if self.is_live(node, now) => NodeHealth::Up,
            _ => NodeHealth::Suspect,
        }
    }

    /// What the planner must know of a node.
    pub(crate) fn heard_of(&self, node: NodeId, now: Instant) -> Heard {
        Heard { health: self.of(node, now), silent: self.silent(node, now), status: self.status(node).cloned() }
    }

    /// Takes in a node's status; returns the shards that it leads, as far as nobody leads them in a higher term.
    pub(crate) fn heard(&mut self, node: NodeId, status: NodeStatus, now: Instant) -> Vec<ShardId> {
        let mut led = Vec::new();
        for replica in &status.replicas {
            let known = self.leaders.get(&replica.shard).copied();
            if replica.leads && known.is_none_or(|known| known.term <= replica.term) {
                self.leaders.insert(replica.shard, Leader { node, term: replica.term });
                led.push(replica.shard);
            } else if !replica.leads && known.is_some_and(|known| known.node == node) {
                self.leaders.remove(&replica.shard);
            }
        }
        self.nodes.insert(node, Words { last: Some((now, status)), error: None });
        led
    }

    /// Takes in that a node did not answer.
    pub(crate) fn missed(&mut self, node: NodeId, error: String) {
        self.nodes.entry(node).or_default().error = Some(error);
    }

    /// How long ago a node was heard.
    pub(crate) fn age(&self, node: NodeId, now: Instant) -> Option<Duration> {
        Some(now.saturating_duration_since(self.nodes.get(&node)?.last.as_ref()?.0))
    }

    /// Whether a node was heard lately.
    pub(crate) fn is_live(&self, node: NodeId, now: Instant) -> bool {
        self.age(node, now).is_some_and(|age| age <= HEARD_LATELY)
    }

    /// The live node that leads a shard.
    pub(crate) fn leader(&self, shard: ShardId, now: Instant) -> Option<NodeId> {
        self.leaders.get(&shard).map(|leader| leader.node).filter(|node| self.is_live(*node, now))
    }

    /// The last status of a node, however old.
    pub(crate) fn status(&self, node: NodeId) -> Option<&NodeStatus> {
        self.nodes.get(&node)?.last.as_ref().map(|(_, status)| status)
    }

    /// The last status of a node that was heard lately, or why there is none.
    pub(crate) fn report(&self, node: NodeId, now: Instant) -> Result<NodeStatus, String> {
        let unheard = || "never heard".to_owned();
        let health = self.nodes.get(&node).ok_or_else(unheard)?;
        match &health.last {
            Some((at, status)) if now.saturating_duration_since(*at) <= HEARD_LATELY => Ok(status.clone()),
            Some((at, _)) => {
                let why = health.error.as_deref().unwrap_or("no answer");
                Err(format!("last heard {:.1?} ago: {why}", now.saturating_duration_since(*at)))
            }
            None => Err(health.error.clone().unwrap_or_else(unheard)),
        }
    }

    /// The replicas of a shard that nodes say they keep.
    pub(crate) fn replicas_of(&self, shard: ShardId) -> Vec<ReplicaInfo> {
        let mut found = Vec::new();
        for (node, health) in &self.nodes {
            let Some((_, status)) = &health.last else { continue };
            let here = status.replicas.iter().filter(|replica| replica.shard == shard);
            found.extend(here.map(|replica| ReplicaInfo {
                id: replica.replica,
                node: *node,
                role: ReplicaRole::Voter,
            }));
        }
        found
    }

    /// What is missing before every shard of `map` can be served.
    pub(crate) fn lacks(&self, map: &Map, now: Instant) -> Lacks {
        let mut lacks = Lacks { map_missing: map.epoch == Epoch::NONE, ..Lacks::default() };
        for shard in &map.shards {
            if self.leader(shard.id, now).is_none() {
                lacks.shards_without_leader.push(shard.id.0);
            }
            let live = shard.replicas.iter().filter(|replica| self.is_live(replica.node, now)).count();
            if live * 2 <= shard.replicas.len() {
                lacks.shards_without_majority.push(shard.id.0);
            }
        }
        let silent = map.nodes.iter().filter(|node| !self.is_live(node.id, now));
        lacks.nodes_silent = silent.map(|node| format!("{} ({}) at {}", node.name, node.id, node.addr)).collect();
        lacks
    }

    /// Whether a live member has an older map than `epoch`: it is to be told. A node that is in no cluster takes none.
    pub(crate) fn some_node_is_behind(&self, epoch: Epoch, now: Instant) -> bool {
        self.nodes.iter().any(|(node, health)| {
            self.is_live(*node, now)
                && health.last.as_ref().is_some_and(|(_, status)| status.cluster.is_some() && status.epoch < epoch)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bootstrap;
    use crate::layout::first_map;
    use shkv_proto::map::NodeInfo;
    use shkv_proto::message::ReplicaStatus;
    use shkv_proto::{ClusterId, ReplicaId};

    fn status(node: u64, replicas: &[(u32, bool, u64)]) -> NodeStatus {
        let replica = |(shard, leads, term): &(u32, bool, u64)| ReplicaStatus {
            shard: ShardId(*shard),
            replica: ReplicaId(node),
            leads: *leads,
            leader: None,
            term: *term,
            committed: 0,
            applied: 0,
            flushed: 0,
            log_first: 1,
            log_last: 0,
            revision: 0,
            snapshots_installed: 0,
            group: None,
        };
        NodeStatus {
            id: NodeId(node),
            name: format!("Server{node}"),
            cluster: Some(ClusterId(1)),
            process: 1,
            cpu_us: 0,
            epoch: Epoch(0),
            table_bytes: 0,
            log_bytes: 0,
            disk_free_bytes: 0,
            disk_full: false,
            log_syncs: 0,
            replicas: replicas.iter().map(replica).collect(),
        }
    }

    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    #[test]
    fn the_leader_of_the_highest_term_is_believed() {
        let (mut health, t) = (Health::new(start()), start());
        let shard = ShardId(4);
        assert_eq!(health.heard(NodeId(1), status(1, &[(4, true, 3)]), t), [shard]);
        assert_eq!(health.heard(NodeId(2), status(2, &[(4, true, 5)]), t), [shard]);
        assert!(health.heard(NodeId(1), status(1, &[(4, true, 3)]), t).is_empty(), "deposed, and does not know it");
        assert_eq!(health.leader(shard, t), Some(NodeId(2)));
        health.heard(NodeId(2), status(2, &[(4, false, 6)]), t);
        assert_eq!(health.leader(shard, t), None, "it says itself that it leads no more");
    }

    #[test]
    fn a_silent_leader_does_not_count() {
        let (mut health, t) = (Health::new(start()), start());
        health.heard(NodeId(1), status(1, &[(4, true, 3)]), t);
        let late = t + HEARD_LATELY + Duration::from_millis(1);
        assert_eq!(health.leader(ShardId(4), late), None);
        health.missed(NodeId(1), "refused".into());
        assert!(health.report(NodeId(1), late).unwrap_err().contains("refused"));
        assert!(health.report(NodeId(9), late).is_err());
    }

    #[test]
    fn silence_makes_a_node_suspect_and_then_down_and_any_word_ends_it() {
        let (mut health, t) = (Health::new(start()), start());
        let after = |millis| t + Duration::from_millis(millis);
        health.heard(NodeId(1), status(1, &[]), t);
        assert_eq!(health.of(NodeId(1), after(1_900)), NodeHealth::Up);
        assert_eq!(health.of(NodeId(1), after(2_100)), NodeHealth::Suspect);
        assert_eq!(health.of(NodeId(1), after(5_100)), NodeHealth::Down);
        health.heard(NodeId(1), status(1, &[]), after(5_200));
        assert_eq!(health.of(NodeId(1), after(5_300)), NodeHealth::Up);
        assert_eq!(health.of(NodeId(9), after(1_000)), NodeHealth::Suspect, "never heard, but not for long");
        health.was_deaf(after(20_000));
        assert_eq!(health.of(NodeId(1), after(20_100)), NodeHealth::Suspect, "the silence was our own");
    }

    #[test]
    fn only_silence_in_answer_to_us_makes_a_node_suspect_and_then_down() {
        let (t, at) = (start(), |secs| Duration::from_secs(secs));
        let (mut health, node) = (Health::new(t), NodeId(1));
        let late = t + at(100);
        assert_eq!(health.of(node, late), NodeHealth::Suspect, "it was never asked");
        health.asks(node, late);
        assert_eq!(health.of(node, late + at(5)), NodeHealth::Suspect);
        assert_eq!(health.of(node, late + at(6)), NodeHealth::Down);
        health.heard(node, status(1, &[]), late + at(6));
        health.asks(node, late + at(7));
        assert_eq!(health.of(node, late + at(7)), NodeHealth::Up, "any answer makes it live");
        assert_eq!(health.of(node, late + at(9)), NodeHealth::Suspect);
        assert_eq!(health.of(node, late + at(12)), NodeHealth::Down);
        health.was_deaf(late + at(60));
        assert_eq!(health.of(node, late + at(61)), NodeHealth::Suspect, "we did not listen");
        assert_eq!(health.silent(node, late + at(63)), at(3));
    }

    #[test]
    fn ready_means_a_leader_and_a_majority_for_every_shard() {
        let (mut health, t) = (Health::new(start()), start());
        let nodes: Vec<NodeInfo> = (1..=3).map(|n| NodeInfo::new(NodeId(n), format!("Server{n}"), "")).collect();
        let mut map = first_map(ClusterId(1), &nodes, Bootstrap { shards: 1, replicas: 3 });
        map.epoch = Epoch(1);
        let lacks = health.lacks(&map, t);
        assert!(!lacks.is_ready());
        assert_eq!(lacks.shards_without_leader, [0, 1]);
        assert_eq!(lacks.nodes_silent.len(), 3);

        health.heard(NodeId(1), status(1, &[(0, true, 1), (1, true, 1)]), t);
        let lacks = health.lacks(&map, t);
        assert_eq!((lacks.shards_without_leader.len(), lacks.shards_without_majority.len()), (0, 2));

        health.heard(NodeId(2), status(2, &[]), t);
        let lacks = health.lacks(&map, t);
        assert!(lacks.is_ready(), "{lacks:?}");
        assert_eq!(lacks.nodes_silent.len(), 1, "one of three may be away");

        map.epoch = Epoch::NONE;
        assert!(!health.lacks(&map, t).is_ready());
    }
}
