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
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::time::Duration;
use tokio::time::Instant;

/// How long a node that could not be reached is passed over, so that not every call waits for it anew. It doubles each
/// time for a node that was never reached: a client outside of the nodes' network then goes through the balancer, and
/// only rarely tries again.
const PASS_OVER: Duration = Duration::from_secs(1);
/// How often it doubles.
const PASS_OVER_DOUBLES_MAX: u32 = 5;

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
    /// Where members reach it, and where others do, if that differs: which of them is ours, only trying tells.
    addrs: Vec<String>,
    cluster: ClusterId,
    links_max: usize,
    /// The links by address; those of an address are opened when it is its turn.
    links: Vec<OnceLock<Vec<Link>>>,
    at: AtomicUsize,
    /// Whether it was ever reached at that address.
    reached: Arc<AtomicBool>,
    silent_times: AtomicU32,
    turn: AtomicUsize,
    passed_over_until: Mutex<Option<Instant>>,
}

impl View {
    /// A view of `map`, with what is still of use of the view `before`.
    pub(crate) fn new(map: Map, leaders: &[(ShardId, NodeId)], links_per_node: usize, before: Option<&Self>) -> Self {
        let mut peers = BTreeMap::new();
        for info in &map.nodes {
            let addrs: Vec<String> = std::iter::once(&info.addr).chain(&info.addr_outside).cloned().collect();
            let kept = before.and_then(|view| view.peers.get(&info.id)).filter(|peer| peer.addrs == addrs);
            let peer = kept.cloned().unwrap_or_else(|| {
                Arc::new(Peer {
                    node: info.id,
                    links: addrs.iter().map(|_| OnceLock::new()).collect(),
                    addrs,
                    at: AtomicUsize::new(0),
                    reached: Arc::default(),
                    silent_times: AtomicU32::new(0),
                    cluster: map.cluster,
                    links_max: links_per_node,
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
        now: impl Fn() -> Instant,
    ) -> Option<&Arc<Peer>> {
        (0..shard.replicas.len() as u32)
            .filter_map(|step| self.routes.target(shard, consistency, key, tries.saturating_add(step)))
            .filter_map(|node| self.peers.get(&node))
            .find(|peer| !peer.is_passed_over(&now))
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

    /// A node.
    pub(crate) fn peer(&self, node: NodeId) -> Option<&Arc<Peer>> {
        self.peers.get(&node)
    }

    /// Every node.
    pub(crate) fn peers(&self) -> impl Iterator<Item = &Arc<Peer>> {
        self.peers.values()
    }
}

impl Peer {
    /// A connection to the node, each in turn.
    pub(crate) fn link(&self) -> &Link {
        self.link_at().0
    }

    /// The same, with the number of the address that it goes to.
    pub(crate) fn link_at(&self) -> (&Link, usize) {
        let at = self.at.load(Ordering::Relaxed);
        let links = self.links[at].get_or_init(|| (0..self.links_max).map(|_| self.open(&self.addrs[at])).collect());
        (&links[self.turn.fetch_add(1, Ordering::Relaxed) % links.len()], at)
    }

    fn open(&self, addr: &str) -> Link {
        let (node, cluster, reached) = (self.node, self.cluster, self.reached.clone());
        Link::open(addr.to_owned(), Hello::ours(Some(cluster), Role::Client), move |welcome: &Welcome| {
            match (welcome.role, welcome.cluster) {
                (Role::Node(there), Some(of)) if there == node && of == cluster => {
                    reached.store(true, Ordering::Relaxed);
                    Ok(())
                }
                (there, of) => Err(format!("expected node {node} of cluster {cluster}, found {there:?} of {of:?}")),
            }
        })
    }

    /// Remembers that the node could not be reached; tells whether that is news. If it has another address, that one is
    /// tried next.
    ///
    /// `at` is the address that it was not reached at, by [`Peer::link_at`]: of several calls that fail there at the same time,
    /// only the first turns to the next one.
    pub(crate) fn pass_over(&self, at: usize, now: Instant) -> bool {
        if self.at.load(Ordering::Relaxed) != at {
            return true;
        }
        let was_reached = self.reached.load(Ordering::Relaxed);
        let mut until = self.passed_over_until.lock();
        let is_news = until.is_none_or(|until| until <= now);
        if is_news {
            let doubles = self.silent_times.fetch_add(1, Ordering::Relaxed) / self.addrs.len() as u32;
            let doubles = if was_reached { 0 } else { doubles.min(PASS_OVER_DOUBLES_MAX) };
            *until = Some(now + PASS_OVER * (1 << doubles));
            if !was_reached {
                self.at.store((at + 1) % self.addrs.len(), Ordering::Relaxed);
                if at + 1 < self.addrs.len() {
                    *until = None; // its other address has not been tried yet
                }
            }
        }
        is_news
    }

    /// The time is looked at only for a node that ever was.
    fn is_passed_over(&self, now: impl Fn() -> Instant) -> bool {
        self.passed_over_until.lock().is_some_and(|until| now() < until)
    }
}
