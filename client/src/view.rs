//! The cluster as the client sees it: the map prepared for look-ups, and for each node the connections to it. A view
//! is replaced when a newer map comes; connections to nodes that have not moved go over to the new one.

use parking_lot::Mutex;
use shkv_proto::ids::{ClusterId, NodeId, ShardId};
use shkv_proto::link::Link;
use shkv_proto::map::{Map, ShardInfo};
use shkv_proto::message::{Consistency, Hello, Role, Welcome};
use shkv_proto::route::Routes;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long a node that could not be reached is passed over, so that not every call waits for it anew.
const PASS_OVER: Duration = Duration::from_secs(1);

/// A map with the connections that go with it.
#[derive(Debug)]
pub(crate) struct View {
    pub(crate) routes: Routes,
    peers: BTreeMap<NodeId, Arc<Peer>>,
}

/// The connections to one node, opened when they are first wanted.
#[derive(Debug)]
pub(crate) struct Peer {
    pub(crate) node: NodeId,
    addr: String,
    cluster: ClusterId,
    links_max: usize,
    links: OnceLock<Vec<Link>>,
    turn: AtomicUsize,
    passed_over_until: Mutex<Option<Instant>>,
}

impl View {
    /// A view of `map`, with what is still of use of the view `before`.
    pub(crate) fn new(map: Map, leaders: &[(ShardId, NodeId)], links_per_node: usize, before: Option<&Self>) -> Self {
        let mut peers = BTreeMap::new();
        for info in &map.nodes {
            let kept = before.and_then(|view| view.peers.get(&info.id)).filter(|peer| peer.addr == info.addr);
            let peer = kept.cloned().unwrap_or_else(|| {
                Arc::new(Peer {
                    node: info.id,
                    addr: info.addr.clone(),
                    cluster: map.cluster,
                    links_max: links_per_node,
                    links: OnceLock::new(),
                    turn: AtomicUsize::new(0),
                    passed_over_until: Mutex::new(None),
                })
            });
            peers.insert(info.id, peer);
        }
        let routes = Routes::new(map, before.map(|view| &view.routes));
        // They are newer than what was guessed before: a map is fetched because a guess has led nowhere.
        for (shard, node) in leaders {
            routes.note_leader(*shard, *node);
        }
        Self { routes, peers }
    }

    /// The node to send attempt number `tries` (from 1) to, leaving out nodes that could not be reached of late.
    pub(crate) fn peer_for(
        &self,
        shard: &ShardInfo,
        consistency: Consistency,
        key: &[u8],
        tries: u32,
        now: Instant,
    ) -> Option<&Arc<Peer>> {
        (0..shard.replicas.len() as u32)
            .filter_map(|step| self.routes.target(shard, consistency, key, tries.saturating_add(step)))
            .filter_map(|node| self.peers.get(&node))
            .find(|peer| !peer.is_passed_over(now))
    }

    /// The node to send attempt number `tries` to when all are passed over and there is no other way.
    pub(crate) fn last_resort(
        &self,
        shard: &ShardInfo,
        consistency: Consistency,
        key: &[u8],
        tries: u32,
    ) -> Option<&Arc<Peer>> {
        let peer = self.peers.get(&self.routes.target(shard, consistency, key, tries)?)?;
        peer.link().retry_now();
        Some(peer)
    }

    /// Every node.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }
}

impl Peer {
    /// A connection to the node, each in turn.
    pub(crate) fn link(&self) -> &Link {
        let links = self.links.get_or_init(|| (0..self.links_max).map(|_| self.open()).collect());
        &links[self.turn.fetch_add(1, Ordering::Relaxed) % links.len()]
    }

    fn open(&self) -> Link {
        let (node, cluster) = (self.node, self.cluster);
        Link::open(self.addr.clone(), Hello::ours(Some(cluster), Role::Client), move |welcome: &Welcome| {
            match (welcome.role, welcome.cluster) {
                (Role::Node(there), Some(of)) if there == node && of == cluster => Ok(()),
                (there, of) => Err(format!("expected node {node} of cluster {cluster}, found {there:?} of {of:?}")),
            }
        })
    }

    /// Remembers that the node could not be reached; tells whether that is news.
    pub(crate) fn pass_over(&self, now: Instant) -> bool {
        let before = self.passed_over_until.lock().replace(now + PASS_OVER);
        before.is_none_or(|until| until <= now)
    }

    fn is_passed_over(&self, now: Instant) -> bool {
        self.passed_over_until.lock().is_some_and(|until| now < until)
    }
}
