//! What a balancer knows of its cluster: the map, the links, the health of the nodes. All tasks of a balancer share
//! one [`Cluster`]. It is all hearsay that can be learnt again: the truth is in the system shard.
//!
//! Lock order: none of the locks here is taken while another is held, and none is held across an await.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time")]

use crate::health::{Health, Lacks};
use crate::map_rows::State;
use crate::metrics::{HealthLabel, Metrics, NodeLabel};
use crate::pool::Pool;
use crate::provision::Provisioner;
use parking_lot::{Mutex, RwLock};
use shkv_proto::map::{NodeInfo, Part, ReplicaRole, ShardInfo};
use shkv_proto::message::{Controller, NodeHealth, NodeStatus};
use shkv_proto::route::Routes;
use shkv_proto::world::news::{Listener, News};
use shkv_proto::{ClusterId, Epoch, KeyspaceId, Map, NodeId, ShardId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long a node is sought at one address before another one is tried.
const SOUGHT_TIME_MIN: Duration = Duration::from_secs(3);

/// The shared state of a balancer.
#[derive(Debug)]
pub(crate) struct Cluster {
    /// The cluster's id.
    pub(crate) id: ClusterId,
    /// The links to the nodes.
    pub(crate) pool: Pool,
    /// The counters.
    pub(crate) metrics: Metrics,
    /// Wakes the task that reads the map.
    pub(crate) map_wanted: Notify,
    /// Wakes the task that beats.
    pub(crate) beat_wanted: Notify,
    /// Cancelled when the balancer is to end.
    pub(crate) stop: CancellationToken,
    /// All tasks that must end before the balancer has ended.
    pub(crate) tasks: TaskTracker,
    /// How it is set up.
    pub(crate) setup: Setup,
    routes: RwLock<Arc<Routes>>,
    state: RwLock<Option<Arc<State>>>,
    /// Who holds the controller's lease, as last looked at.
    controller: Mutex<Option<Controller>>,
    health: Mutex<Health>,
    /// Addresses that this balancer has written into the map. Each is written once: two balancers that reach a node by
    /// different names would otherwise correct each other for ever.
    announced: Mutex<BTreeMap<NodeId, String>>,
    /// Where this balancer was told that nodes live, by whoever started it or them.
    told: Mutex<BTreeMap<NodeId, String>>,
    trouble: Mutex<Option<String>>,
    news: News,
}

/// What a balancer was told when it was started.
#[derive(Clone, Debug)]
pub(crate) struct Setup {
    /// A random number, by which others know it.
    pub(crate) me: u64,
    /// Where nodes and other balancers reach it.
    pub(crate) addr: String,
    /// How it gets nodes.
    pub(crate) provisioner: Arc<dyn Provisioner>,
    /// How long a node must have been silent before it is replaced.
    pub(crate) replace_after: Duration,
}

impl Cluster {
    /// Knows nothing yet but the cluster's id.
    pub(crate) fn new(id: ClusterId, setup: Setup, stop: CancellationToken, tasks: TaskTracker) -> Self {
        Self {
            id,
            pool: Pool::new(id),
            metrics: Metrics::new(),
            map_wanted: Notify::new(),
            beat_wanted: Notify::new(),
            stop,
            tasks,
            setup,
            routes: RwLock::new(Arc::new(Routes::new(Map::empty(id), None))),
            state: RwLock::default(),
            controller: Mutex::default(),
            health: Mutex::new(Health::new(Instant::now())),
            announced: Mutex::default(),
            told: Mutex::default(),
            trouble: Mutex::default(),
            news: News::default(),
        }
    }

    /// The map prepared for look-ups. While its epoch is [`Epoch::NONE`] it knows at most where the system shard is.
    pub(crate) fn routes(&self) -> Arc<Routes> {
        self.routes.read().clone()
    }

    /// The same for a short look, which a copy would cost more than. Nothing may be waited for in it.
    pub(crate) fn look<T>(&self, look: impl FnOnce(&Routes) -> T) -> T {
        look(&self.routes.read())
    }

    /// Whether a map has been read.
    pub(crate) fn has_map(&self) -> bool {
        self.look(|routes| routes.map().epoch != Epoch::NONE)
    }

    /// What the system shard was last read to hold.
    pub(crate) fn state(&self) -> Option<Arc<State>> {
        self.state.read().clone()
    }

    /// Who holds the controller's lease, as last looked at.
    pub(crate) fn controller(&self) -> Option<Controller> {
        self.controller.lock().clone()
    }

    /// Remembers who holds the controller's lease.
    pub(crate) fn set_controller(&self, who: Option<Controller>) {
        *self.controller.lock() = who;
    }

    /// Takes what was read from the system shard, unless it is older than what is there.
    pub(crate) fn install(&self, state: State) {
        let map = state.map.clone();
        {
            let mut ours = self.state.write();
            if ours.as_ref().is_some_and(|ours| ours.map.epoch > map.epoch) {
                return;
            }
            *ours = Some(Arc::new(state));
        }
        let (nodes, shards): (Vec<NodeInfo>, Vec<ShardId>) =
            (map.nodes.clone(), map.shards.iter().map(|shard| shard.id).collect());
        let fresh = {
            let mut routes = self.routes.write();
            if map.epoch <= routes.map().epoch {
                return;
            }
            *routes = Arc::new(Routes::new(map, Some(&routes)));
            routes.clone()
        };
        for node in &nodes {
            if self.pool.get(node.id).is_none() {
                self.pool.set(node.id, node.addr.clone());
            }
        }
        let now = Instant::now();
        let leaders: Vec<_> = {
            let health = self.health.lock();
            shards.iter().filter_map(|shard| Some((*shard, health.leader(*shard, now)?))).collect()
        };
        for (shard, node) in leaders {
            fresh.note_leader(shard, node);
        }
        tracing::debug!(epoch = %fresh.map().epoch, shards = shards.len(), nodes = nodes.len(), "took the map");
        self.beat_wanted.notify_one();
        self.news.tell();
    }

    /// Waits until the map is newer than `epoch`, or until `until`.
    pub(crate) async fn newer_map(&self, epoch: Epoch, until: Instant) {
        let mut news = self.news.listen();
        self.map_wanted.notify_one();
        while self.routes().map().epoch <= epoch {
            if tokio::time::timeout_at(until, news.changed()).await.is_err() {
                return;
            }
        }
    }

    /// Hears of changes in health and map.
    pub(crate) fn news(&self) -> Listener<'_> {
        self.news.listen()
    }

    /// A node has answered a beat.
    pub(crate) fn heard(&self, node: NodeId, status: NodeStatus) {
        let epoch = status.epoch;
        let led = self.health.lock().heard(node, status, Instant::now());
        if !self.has_map() {
            self.note_system_shard();
        }
        let routes = self.routes();
        for shard in led {
            routes.note_leader(shard, node);
        }
        if epoch > routes.map().epoch || self.misplaced(routes.map()).next().is_some() {
            self.map_wanted.notify_one();
        }
        self.news.tell();
    }

    /// These nodes are being sent a beat.
    pub(crate) fn asks(&self, nodes: impl Iterator<Item = NodeId>) {
        let (now, mut health) = (Instant::now(), self.health.lock());
        nodes.for_each(|node| health.asks(node, now));
    }

    /// This balancer was held up itself: it has not listened.
    pub(crate) fn was_deaf(&self) {
        self.health.lock().was_deaf(Instant::now());
    }

    /// A node has not answered a beat.
    pub(crate) fn missed(&self, node: NodeId, error: String) {
        self.health.lock().missed(node, error);
    }

    /// Until there is a map, the system shard is where nodes say that they keep it.
    fn note_system_shard(&self) {
        let replicas = self.health.lock().replicas_of(ShardId::SYSTEM);
        let mut routes = self.routes.write();
        let known = routes.map().shard(ShardId::SYSTEM).is_some_and(|shard| shard.replicas == replicas);
        if known || replicas.is_empty() || routes.map().epoch != Epoch::NONE {
            return;
        }
        let (keyspace, part) = (KeyspaceId::SYSTEM, Part::everything());
        let system = ShardInfo { replicas, ..ShardInfo::founded(ShardId::SYSTEM, keyspace, part, &[]) };
        let map = Map { shards: vec![system], ..Map::empty(self.id) };
        *routes = Arc::new(Routes::new(map, Some(&routes)));
    }

    /// Looks into the health of the nodes.
    pub(crate) fn health<T>(&self, look: impl FnOnce(&Health, Instant) -> T) -> T {
        look(&self.health.lock(), Instant::now())
    }

    /// What is missing before every shard can be served.
    pub(crate) fn lacks(&self) -> Lacks {
        let routes = self.routes();
        self.health(|health, now| health.lacks(routes.map(), now))
    }

    /// Nodes that answer at another address than the map says, and were not yet corrected by this balancer.
    pub(crate) fn misplaced<'a>(&'a self, map: &'a Map) -> impl Iterator<Item = NodeInfo> + 'a {
        map.nodes.iter().filter_map(|node| {
            let home = self.pool.get(node.id)?;
            let moved = NodeInfo { addr: home.addr.clone(), ..node.clone() };
            (home.addr != node.addr && home.links_up() > 0 && !self.is_announced(&moved)).then_some(moved)
        })
    }

    /// Nodes that do not answer where they are sought are sought at the other address that is known of them: the one
    /// that this balancer was told, or the one in the map. Either may be the old one.
    pub(crate) fn seek_elsewhere(&self, map: &Map) {
        let now = Instant::now();
        for node in &map.nodes {
            let Some(home) = self.pool.get(node.id) else { continue };
            let is_lost = home.links_up() == 0 && now.duration_since(home.opened) > SOUGHT_TIME_MIN;
            let told = self.told.lock().get(&node.id).cloned();
            let others = [Some(node.addr.clone()), told].into_iter().flatten();
            if is_lost && let Some(other) = others.into_iter().find(|addr| *addr != home.addr) {
                tracing::debug!(node = %node.id, addr = other, "seeking a node elsewhere");
                self.pool.set(node.id, other);
            }
        }
    }

    /// Remembers that this balancer has written a node's address into the map.
    pub(crate) fn announce(&self, node: &NodeInfo) {
        self.announced.lock().insert(node.id, node.addr.clone());
    }

    fn is_announced(&self, node: &NodeInfo) -> bool {
        self.announced.lock().get(&node.id) == Some(&node.addr)
    }

    /// A node lives at this address, as whoever knows it says.
    pub(crate) fn moved(&self, node: NodeId, addr: String) {
        self.announced.lock().remove(&node);
        self.told.lock().insert(node, addr.clone());
        self.pool.set(node, addr);
        self.beat_wanted.notify_one();
    }

    /// Remembers what stands in the way of readiness, for whoever asks.
    pub(crate) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock() = trouble;
    }

    /// What stands in the way of readiness.
    pub(crate) fn trouble(&self) -> Option<String> {
        self.trouble.lock().clone()
    }

    /// Brings the gauges up to date that are only worth computing when somebody looks.
    pub(crate) fn gauge(&self) {
        let routes = self.routes();
        let lacks = self.lacks();
        self.metrics.map_epoch.set(routes.map().epoch.0 as i64);
        self.metrics.shards_without_leader.set(lacks.shards_without_leader.len() as i64);
        let controls = self.controller().is_some_and(|who| who.balancer == self.setup.me);
        self.metrics.controls.set(i64::from(controls));
        let homes = routes.map().shards.iter().flat_map(|shard| &shard.replicas);
        let moving = homes.filter(|home| home.role != ReplicaRole::Voter).count();
        self.metrics.replicas_moving.set(moving as i64);
        let fares = |node: &NodeInfo| self.health(|health, now| health.of(node.id, now));
        let fares: Vec<NodeHealth> = routes.map().nodes.iter().map(fares).collect();
        for (health, label) in [(NodeHealth::Up, "up"), (NodeHealth::Suspect, "suspect"), (NodeHealth::Down, "down")] {
            let count = fares.iter().filter(|fare| **fare == health).count();
            self.metrics.nodes.get_or_create(&HealthLabel { health: label }).set(count as i64);
        }
        for (node, home) in self.pool.homes() {
            let label = NodeLabel { node: node.to_string() };
            self.metrics.links_up.get_or_create(&label).set(home.links_up() as i64);
            let age = self.health(|health, now| health.age(node, now));
            self.metrics.heard_age.get_or_create(&label).set(age.map_or(f64::INFINITY, |age| age.as_secs_f64()));
        }
    }
}
