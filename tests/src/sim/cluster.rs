//! The processes of a simulated cluster: nodes on their disks, balancers, and the clients' hosts.

use super::disk::SimDisk;
use super::universe::Universe;
use super::yard::{Order, Yard};
use parking_lot::Mutex;
use rand::RngExt;
use shkv_balancer::provision::NoProvisioner;
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap};
use shkv_node::inspect::Inspector;
use shkv_node::{Node, NodeConfig, Tuning};
use shkv_proto::world::sim::Fate;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Notify;

/// The port of every process.
const PORT: u16 = 7400;
/// How long after a silence nodes are replaced.
const REPLACE_AFTER: Duration = Duration::from_secs(8);
/// Bytes that fit on a disk.
pub const CAPACITY: u64 = 64 << 20;

/// A node: its host, its disk, and what its process says of itself.
pub struct NodeHost {
    /// Its host.
    pub host: usize,
    /// Its label.
    pub name: String,
    /// Its disk.
    pub disk: SimDisk,
    /// What its process says.
    pub said: Arc<Said>,
    /// By which name its provisioner knows it.
    pub instance: String,
    /// Why it is not to be started again, if it is not.
    pub over: Option<String>,
    /// Whether its disk is gone for good, with all that was on it.
    pub lost: bool,
    /// How often it has refused its log since its disk was last empty.
    pub refusals: u32,
}

/// Why a process ended.
pub enum Ended {
    /// Its disk was without power in the middle of what it did.
    PowerGone,
    /// It came to the point of its code at which it was to end.
    AtPoint,
    /// It gave up, or did not start, and said this.
    Said(String),
}

/// What a process says of itself.
#[derive(Default)]
pub struct Said {
    /// A look into it.
    pub inspector: Mutex<Option<Inspector>>,
    /// Why it ended.
    pub ended: Mutex<Option<String>>,
    /// Asks it to stop in good order.
    pub stop: Notify,
}

/// A cluster.
pub struct SimCluster {
    /// Its nodes.
    pub nodes: Vec<NodeHost>,
    /// The hosts of its balancers.
    pub balancers: Vec<usize>,
    /// The hosts of its clients.
    pub clients: Vec<usize>,
    /// Where it gets machines from, if it can get any.
    pub yard: Option<Yard>,
    tuning: Tuning,
    shards: u32,
    founders: usize,
    /// Machines that are being given out or taken back, and until when in milliseconds.
    orders: Vec<(u64, Order)>,
}

/// How long a machine takes to be there, in milliseconds at the most.
const ORDER_MS_MAX: u64 = 1_500;
/// How long a node that is not needed any more may take to stop in good order.
const STOP_MS_MAX: u64 = 4_000;
/// The group of addresses that nodes have.
const NODES_GROUP: u8 = 0;

impl SimCluster {
    /// The hosts and disks of a cluster; nothing runs yet. The `late` nodes are none of those that found it.
    #[must_use]
    pub fn new(universe: &mut Universe, nodes: u8, late: u8, balancers: u8, clients: u8) -> Self {
        let tuning = Tuning {
            table_bytes: universe.rng.random_range(3..24) << 10,
            cache_bytes: 1 << 20,
            log_segment_bytes: universe.rng.random_range(16..64) << 10,
            log_retain_bytes: universe.rng.random_range(32..256) << 10,
            disk_reserve_bytes: 1 << 20,
            threads: 1,
        };
        let shards = universe.rng.random_range(1..=3);
        let yard = universe.rng.random_bool(0.5).then(Yard::default);
        let mut cluster = Self {
            nodes: vec![],
            balancers: vec![],
            clients: vec![],
            yard,
            tuning,
            shards,
            founders: nodes.into(),
            orders: vec![],
        };
        for number in 0..nodes + late {
            let name = format!("Server{number}");
            cluster.add_node(universe, name.clone(), name);
        }
        for number in 1..=balancers {
            cluster.balancers.push(universe.add(format!("balancer-{number}"), 1, number));
        }
        for number in 1..=clients {
            cluster.clients.push(universe.add(format!("client-{number}"), 2, number));
        }
        cluster
    }

    /// One more node's host and disk. Returns which it is.
    pub fn add_node(&mut self, universe: &mut Universe, name: String, instance: String) -> usize {
        let number = self.nodes.len() as u8 + 1;
        let host = universe.add(name.clone(), NODES_GROUP, number);
        let disk = SimDisk::new(
            PathBuf::from(format!("/{instance}")),
            universe.rng.random(),
            CAPACITY,
            universe.trace.clone(),
        );
        let said = Arc::default();
        self.nodes.push(NodeHost { host, name, disk, said, instance, over: None, lost: false, refusals: 0 });
        self.nodes.len() - 1
    }

    /// What the balancers ask for is done, each after a while. Returns what was done.
    pub fn do_orders(&mut self, universe: &mut Universe) -> Vec<&'static str> {
        let Some(yard) = self.yard.clone() else { return vec![] };
        for order in yard.take_orders() {
            let after = match &order {
                Order::Start(..) => universe.rng.random_range(0..ORDER_MS_MAX),
                Order::Remove(instance, _) => {
                    let node = self.nodes.iter_mut().find(|node| node.instance == *instance);
                    node.map_or(0, |node| {
                        node.over.get_or_insert("its machine is given back".into());
                        node.said.stop.notify_one();
                        STOP_MS_MAX
                    })
                }
            };
            self.orders.push((universe.now_ms + after, order));
        }
        let mut done = Vec::new();
        for (due, order) in std::mem::take(&mut self.orders) {
            match order {
                Order::Start(spec, answer) if due <= universe.now_ms => {
                    let at = self.add_node(universe, spec.name, spec.instance);
                    self.start_node(universe, at);
                    let _ = answer.send(Ok(())); // whoever asked may be gone
                    done.push("machine given out");
                }
                Order::Remove(instance, answer) => {
                    let at = self.nodes.iter().position(|node| node.instance == instance);
                    if let Some(at) = at.filter(|at| universe.runs(self.nodes[*at].host)) {
                        if due > universe.now_ms {
                            self.orders.push((due, Order::Remove(instance, answer)));
                            continue;
                        }
                        self.end_node(universe, at, Fate::Reset);
                    }
                    if let Some(at) = at.filter(|at| !self.nodes[*at].lost) {
                        self.nodes[at].disk.wipe();
                        self.nodes[at].lost = true;
                        done.push("machine taken back");
                    }
                    yard.removed(&instance);
                    let _ = answer.send(Ok(())); // whoever asked may be gone
                }
                order @ Order::Start(..) => self.orders.push((due, order)),
            }
        }
        done
    }

    /// A node's disk is gone with all that was on it. Its machine goes, too, if the cluster can get others.
    pub fn lose_disk(&mut self, universe: &mut Universe, at: usize) {
        self.end_node(universe, at, Fate::Silence);
        let node = &mut self.nodes[at];
        node.disk.wipe();
        node.refusals = 0;
        if let Some(yard) = &self.yard {
            yard.lost(&node.instance);
            node.over = Some("its machine is lost".into());
            node.lost = true;
        }
    }

    /// The address of a host's process.
    #[must_use]
    pub fn addr(universe: &Universe, host: usize) -> String {
        format!("{}:{PORT}", universe.hosts[host].ip)
    }

    /// Where the balancers are.
    #[must_use]
    pub fn homes(&self, universe: &Universe) -> Vec<String> {
        self.balancers.iter().map(|host| Self::addr(universe, *host)).collect()
    }

    /// Starts a node's process.
    pub fn start_node(&mut self, universe: &mut Universe, at: usize) {
        let homes = self.homes(universe);
        let node = &mut self.nodes[at];
        let mut instance = String::new(); // of nobody's, if it was started by hand
        if let Some(yard) = &self.yard {
            yard.keeps(&node.instance, &node.name);
            instance.clone_from(&node.instance);
        }
        node.said = Arc::default();
        let said = node.said.clone();
        let config = NodeConfig {
            join: homes,
            instance,
            tuning: self.tuning,
            ..NodeConfig::new(&node.name, node.disk.path_buf(), Self::addr(universe, node.host))
        };
        let ground = Arc::new(node.disk.clone());
        universe.start(node.host, async move {
            match Node::start_on(ground, config).await {
                Ok(node) => {
                    *said.inspector.lock() = Some(node.inspector());
                    let reason = tokio::select! {
                        biased;
                        reason = node.failed() => reason,
                        () = said.stop.notified() => {
                            node.stop().await;
                            "stopped".to_owned()
                        }
                    };
                    *said.ended.lock() = Some(reason);
                }
                Err(error) => *said.ended.lock() = Some(error.to_string()),
            }
        });
    }

    /// Ends a node's process. With the power goes what its disk has not synced.
    pub fn end_node(&mut self, universe: &mut Universe, at: usize, fate: Fate) {
        let node = &mut self.nodes[at];
        if !universe.runs(node.host) {
            return;
        }
        *node.said.inspector.lock() = None;
        match fate {
            Fate::Reset => node.disk.process_ended(),
            Fate::Silence => node.disk.power_lost(),
        }
        universe.end(node.host, fate);
    }

    /// Ends the processes that have ended by themselves, or whose power has gone. Returns their number and why. One that ended
    /// at a point of its code is still to be taken away.
    pub fn look_for_ends(&mut self, universe: &mut Universe) -> Vec<(usize, Ended)> {
        let mut ends = Vec::new();
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if !universe.runs(node.host) {
                continue;
            }
            if node.disk.is_dark() {
                self.end_node(universe, at, Fate::Silence);
                ends.push((at, Ended::PowerGone));
                continue;
            }
            if universe.context(node.host).is_some_and(|context| context.ended_at() != 0) {
                ends.push((at, Ended::AtPoint));
                continue; // whoever sees to it says how
            }
            let ended = node.said.ended.lock().clone();
            if let Some(reason) = ended {
                universe.trace.note(&[23, at as u64], || format!("{} ended: {reason}", self.nodes[at].name));
                self.end_node(universe, at, Fate::Reset);
                ends.push((at, Ended::Said(reason)));
            }
        }
        ends
    }

    /// Starts a balancer's process.
    pub fn start_balancer(&self, universe: &mut Universe, at: usize) {
        let host = self.balancers[at];
        let nodes: Vec<String> = self.nodes.iter().map(|node| Self::addr(universe, node.host)).collect();
        let bootstrap = Bootstrap { shards: self.shards, replicas: 3.min(self.founders as u32) };
        let config = BalancerConfig {
            nodes: nodes[..self.founders].to_vec(),
            bootstrap: (at == 0).then_some(bootstrap),
            expect: self.founders,
            replace_after: REPLACE_AFTER,
            provisioner: match &self.yard {
                Some(yard) => Arc::new(yard.clone()),
                None => Arc::new(NoProvisioner),
            },
            ..BalancerConfig::new(Self::addr(universe, host))
        };
        universe.start(host, async move {
            loop {
                match Balancer::start(config.clone()).await {
                    Ok(balancer) => {
                        let _running = balancer;
                        return std::future::pending().await;
                    }
                    Err(error) => tracing::debug!("a balancer does not start: {error}"),
                }
                tokio::time::sleep(Duration::from_millis(500)).await;
            }
        });
    }
}
