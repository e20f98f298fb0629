//! A balancer: routes requests to nodes, makes the first layout of a cluster, and says how the cluster fares.
//!
//! It holds no truth: the map lives in the system shard, and whatever a balancer knows it can learn again. Any number
//! of them may run. It never talks to a disk and never decides whether a write has happened.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits and draws the cluster's id")]

mod beat;
mod bootstrap;
mod cluster;
mod control;
mod forward;
mod health;
mod http;
mod keeper;
mod layout;
mod lobby;
mod map_rows;
mod metrics;
mod pool;
pub mod provision;
mod proxy;
mod scan;
mod system;

use crate::cluster::{Cluster, Setup};
use crate::health::DOWN_AFTER;
pub use crate::http::members::CausalMember;
pub use crate::http::{Dialects, HttpLimits, HttpService, KvsDialect, SetShape};
use crate::provision::{NoProvisioner, Provisioner};
use rand::RngExt;
use shkv_proto::world::net::{self, TcpListener};
use shkv_proto::{ClusterId, NodeId, world};
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

/// How long what is in hand may take to finish when a balancer stops.
const STOP_TIME_MAX: Duration = Duration::from_secs(5);
/// Most connections of a listener that wait to be accepted, if the system allows as many.
const WAITING_MAX: u32 = 4_096;
/// How often readiness is looked at when nothing has been heard: leaders go silent without a word.
const READY_LOOK_EVERY: Duration = Duration::from_millis(100);

/// How often one that follows looks whether there is a cluster.
const FOLLOW_LOOK_EVERY: Duration = Duration::from_millis(500);

/// How long a node must have been silent before it is replaced, unless it is said otherwise.
pub const REPLACE_AFTER: Duration = Duration::from_secs(10);

/// What a balancer needs to start.
#[derive(Clone, Debug)]
pub struct BalancerConfig {
    /// `host:port` of the native listener; port 0 takes any.
    pub listen: String,
    /// `host:port` of the HTTP listener; none when `None`.
    pub http: Option<String>,
    /// Addresses of the nodes that are known at the start, or of other balancers of their cluster. Nodes may also come by
    /// themselves.
    pub nodes: Vec<String>,
    /// Where nodes and other balancers reach it; where it listens when `None`.
    pub advertise: Option<String>,
    /// If the nodes are in no cluster yet: make one of them, as described here.
    pub bootstrap: Option<Bootstrap>,
    /// Nodes that a new cluster waits for; 0 means all of `nodes`.
    pub expect: usize,
    /// The id of a new cluster; drawn when `None`.
    pub cluster: Option<ClusterId>,
    /// How it gets nodes.
    pub provisioner: Arc<dyn Provisioner>,
    /// How long a node must have been silent before it is replaced.
    pub replace_after: Duration,
    /// Whose listener the HTTP listener is: the node of this name, or nobody's but the balancer's.
    pub http_node: Option<String>,
    /// `host:port` of the first of the listeners that every node of the cluster gets, for HTTP; the next ones have the next
    /// ports, or any with port 0. None when `None`.
    pub node_http: Option<String>,
    /// Whether it only follows: it waits for a cluster, routes, and never takes the controller's lease.
    pub follows: bool,
    /// How the dialects of its HTTP listeners answer.
    pub dialects: Dialects,
    /// What its HTTP listeners allow.
    pub http_limits: HttpLimits,
    /// As whom the node of this process is a member of the causal store, if it is one.
    pub causal: Option<CausalMember>,
}

impl BalancerConfig {
    /// A balancer that knows nobody yet and starts no nodes.
    #[must_use]
    pub fn new(listen: impl Into<String>) -> Self {
        Self {
            listen: listen.into(),
            http: None,
            nodes: vec![],
            advertise: None,
            bootstrap: None,
            expect: 0,
            cluster: None,
            provisioner: Arc::new(NoProvisioner),
            replace_after: REPLACE_AFTER,
            http_node: None,
            node_http: None,
            follows: false,
            dialects: Dialects::default(),
            http_limits: HttpLimits::default(),
            causal: None,
        }
    }
}

/// The first layout of a cluster.
#[derive(Clone, Copy, Debug)]
pub struct Bootstrap {
    /// Shards of the default keyspace.
    pub shards: u32,
    /// Copies of each shard that are wanted; there are fewer while there are fewer nodes.
    pub replicas: u32,
}

/// Why a balancer does not start, or is not ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Another process has the port.
    #[error(
        "cannot listen on {addr}: the address is in use; stop the process that has it (`ss -ltnp` names it) or listen on another"
    )]
    AddressInUse {
        /// As asked for.
        addr: String,
    },
    /// The system does not let it listen.
    #[error("cannot listen on {addr}: {error}")]
    Listen {
        /// As asked for.
        addr: String,
        /// The system's words.
        error: io::Error,
    },
    /// No node answers.
    #[error("no node answers: {missing}; check the addresses, and that the nodes run")]
    NoNodes {
        /// Each address and why it does not answer.
        missing: String,
    },
    /// A cluster is to be made, and not all of its nodes answer.
    #[error("a new cluster needs all of its nodes, and these do not answer: {missing}")]
    NodesMissing {
        /// Each address and why it does not answer.
        missing: String,
    },
    /// The nodes are in no cluster, and none is to be made.
    #[error("the nodes are in no cluster yet, and no bootstrap was asked for")]
    NoCluster,
    /// The nodes are in two clusters.
    #[error(
        "the nodes are in two clusters: {first_addr} is in {first}, {second_addr} in {second}; name the nodes of one only"
    )]
    TwoClusters {
        /// A node of the first.
        first_addr: String,
        /// The first.
        first: ClusterId,
        /// A node of the second.
        second_addr: String,
        /// The second.
        second: ClusterId,
    },
    /// A node would be replaced before it counts as down.
    #[error("a node cannot be replaced after {0:?}: it counts as down after {DOWN_AFTER:?}; name a longer time")]
    ReplaceAfter(Duration),
    /// The layout cannot be made of these nodes.
    #[error("{0}")]
    Layout(String),
    /// A cluster could not be made. Starting once more goes on where it stopped.
    #[error("the cluster could not be made: {0}")]
    Bootstrap(String),
    /// Not every shard could be served in time.
    #[error("the cluster is not ready after {within:?}: {lacks}")]
    NotReady {
        /// How long was waited.
        within: Duration,
        /// What is missing.
        lacks: String,
    },
}

/// The listeners of a balancer that does not run yet.
#[derive(Debug)]
pub struct Ears {
    listener: TcpListener,
    addr: SocketAddr,
    http: Option<(TcpListener, SocketAddr)>,
}

impl Ears {
    /// Opens them.
    ///
    /// # Errors
    /// An address that cannot be listened at.
    pub async fn open(config: &BalancerConfig) -> Result<Self, StartError> {
        let (listener, addr) = bind(&config.listen).await?;
        let http = match &config.http {
            Some(addr) => Some(bind(addr).await?),
            None => None,
        };
        Ok(Self { listener, addr, http })
    }

    /// Where the HTTP listener is, if there is one.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http.as_ref().map(|(_, addr)| *addr)
    }
}

/// A running balancer. Dropping it ends it at once; [`Balancer::stop`] lets it finish what is in hand.
#[derive(Debug)]
pub struct Balancer {
    cluster: Arc<Cluster>,
    addr: SocketAddr,
    http_addr: Option<SocketAddr>,
    front: http::Front,
    kill: CancellationToken,
    _stop: DropGuard,
}

impl Balancer {
    /// Listens, finds the nodes, and makes their cluster if that is asked for and they are in none. The map of a
    /// cluster that exists is read in the background, because that takes a leader: see [`Balancer::ready`].
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    pub async fn start(config: BalancerConfig) -> Result<Self, StartError> {
        if config.replace_after < DOWN_AFTER {
            return Err(StartError::ReplaceAfter(config.replace_after));
        }
        let ears = Ears::open(&config).await?;
        Self::start_with(config, ears).await
    }

    /// The same with listeners that are open already: connections wait until it runs.
    ///
    /// # Errors
    /// [`StartError`]; nothing is left running then.
    pub async fn start_with(config: BalancerConfig, ears: Ears) -> Result<Self, StartError> {
        let Ears { listener, addr, http } = ears;
        let http_addr = http.as_ref().map(|(_, addr)| *addr);
        let (stop, tasks) = (CancellationToken::new(), TaskTracker::new());
        let guard = stop.clone().drop_guard();

        let search = loop {
            let search = bootstrap::find(&config.nodes, config.expect, &listener, &stop, &tasks).await;
            if !config.follows || matches!(search.cluster(), Ok(Some(_)) | Err(StartError::TwoClusters { .. })) {
                break search;
            }
            tokio::time::sleep(FOLLOW_LOOK_EVERY).await;
        };
        let (id, plan, is_new) = match search.cluster()? {
            // What a balancer knows of was made to the end.
            Some(id) => (id, search.plan(config.bootstrap).ok().filter(|_| !search.is_told()), false),
            None => {
                let id = config.cluster.unwrap_or_else(|| ClusterId(world::rng().random()));
                (id, Some(search.plan(config.bootstrap)?), true)
            }
        };
        let setup = Setup {
            me: world::rng().random_range(1..=u64::MAX),
            addr: config.advertise.clone().unwrap_or_else(|| addr.to_string()),
            provisioner: config.provisioner,
            replace_after: config.replace_after,
        };
        let cluster = Arc::new(Cluster::new(id, setup, stop.clone(), tasks));
        search.introduce(&cluster);
        let tasks = &cluster.tasks;
        let rest = cluster.clone();
        let stopping = stop.clone();
        tasks.spawn(async move { stopping.run_until_cancelled(search.introduce_the_rest(rest)).await });
        tasks.spawn(beat::run(cluster.clone()));
        if is_new && let Some(plan) = &plan {
            Box::pin(bootstrap::found(&cluster, plan)).await?;
        }
        tasks.spawn(keeper::run(cluster.clone(), plan));
        if !config.follows {
            tasks.spawn(control::run(cluster.clone()));
        }
        let kill = CancellationToken::new();
        tasks.spawn(proxy::listen(cluster.clone(), listener, kill.clone()));
        let front = http::Front::new(cluster.clone(), config.dialects, config.http_limits);
        if let Some(member) = config.causal {
            tasks.spawn(http::members::announce(cluster.clone(), front.store.clone(), member));
        }
        if let Some((listener, addr)) = http {
            let mut front = front.clone();
            if let Some(node) = &config.http_node {
                front = front.at(node);
                front.doors.note(node, addr);
            }
            tasks.spawn(http::serve(front, listener, cluster.stop.clone(), kill.clone()));
        }
        if let Some(base) = config.node_http {
            tasks.spawn(http::doors::keep(front.clone(), base, kill.clone()));
        }
        tracing::info!(cluster = %id, %addr, ?http_addr, "the balancer runs");
        Ok(Self { cluster, addr, http_addr, front, kill, _stop: guard })
    }

    /// Where the native listener is.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Where the HTTP listener is, if there is one.
    #[must_use]
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http_addr
    }

    /// Where the HTTP listener of a node is, if it has one in this process.
    #[must_use]
    pub fn node_http_addr(&self, node: &str) -> Option<SocketAddr> {
        self.front.doors.addr(node)
    }

    /// The HTTP front end without a listener, for a program that serves it itself: the balancer's, or that of a node of this
    /// name. Bounds on connections and on the time for a request's head are the program's own then.
    #[must_use]
    pub fn http_service(&self, node: Option<&str>) -> HttpService {
        http::service(node.map_or_else(|| self.front.clone(), |node| self.front.at(node)))
    }

    /// Waits until there is a map and every shard has a leader and a live majority.
    ///
    /// # Errors
    /// [`StartError::NotReady`] after `within`, with what is missing.
    pub async fn ready(&self, within: Duration) -> Result<ClusterId, StartError> {
        let until = Instant::now() + within;
        let mut news = self.cluster.news();
        loop {
            let lacks = self.cluster.lacks();
            if lacks.is_ready() {
                return Ok(self.cluster.id);
            }
            if Instant::now() >= until {
                let trouble = self.cluster.trouble().map_or_else(String::new, |trouble| format!(" ({trouble})"));
                return Err(StartError::NotReady { within, lacks: format!("{lacks}{trouble}") });
            }
            // Whether news came or the time is up, the next round looks again.
            let _ = tokio::time::timeout_at(until.min(Instant::now() + READY_LOOK_EVERY), news.changed()).await;
        }
    }

    /// A node was started again and now listens there.
    pub fn node_moved(&self, node: NodeId, addr: String) {
        self.cluster.moved(node, addr);
    }

    /// Accepts nothing more, finishes what is in hand for at most 5 seconds, and ends.
    pub async fn stop(self) {
        self.cluster.stop.cancel();
        self.cluster.tasks.close();
        if tokio::time::timeout(STOP_TIME_MAX, self.cluster.tasks.wait()).await.is_err() {
            tracing::warn!("some requests were not finished in time");
        }
        self.kill.cancel();
        self.cluster.pool.clear();
    }
}

impl Drop for Balancer {
    fn drop(&mut self) {
        self.kill.cancel();
    }
}

async fn bind(addr: &str) -> Result<(TcpListener, SocketAddr), StartError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::AddrInUse => StartError::AddressInUse { addr: addr.to_owned() },
        _ => StartError::Listen { addr: addr.to_owned(), error },
    };
    let listener = net::listen(addr, WAITING_MAX).await.map_err(failed)?;
    let addr = listener.local_addr().map_err(failed)?;
    Ok((listener, addr))
}
