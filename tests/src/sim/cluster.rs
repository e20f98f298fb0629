//! The processes of a simulated cluster: nodes on their disks, balancers, and the clients' hosts.

use super::disk::SimDisk;
use super::universe::Universe;
use parking_lot::Mutex;
use rand::RngExt;
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
    /// Why it is not to be started again, if it is not.
    pub over: Option<String>,
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
    tuning: Tuning,
    shards: u32,
    founders: usize,
}

impl SimCluster {
    /// The hosts and disks of a cluster; nothing runs yet. The `late` nodes are none of those that found it.
    #[must_use]
    pub fn new(universe: &mut Universe, nodes: u8, late: u8, balancers: u8, clients: u8) -> Self {
        let tuning = Tuning {
            table_bytes: universe.rng.random_range(4..64) << 10,
            cache_bytes: 1 << 20,
            log_segment_bytes: universe.rng.random_range(16..64) << 10,
            log_retain_bytes: universe.rng.random_range(32..256) << 10,
            disk_reserve_bytes: 1 << 20,
            threads: 1,
        };
        let shards = universe.rng.random_range(1..=3);
        let mut cluster =
            Self { nodes: vec![], balancers: vec![], clients: vec![], tuning, shards, founders: nodes.into() };
        for number in 1..=nodes + late {
            cluster.add_node(universe, number);
        }
        for number in 1..=balancers {
            cluster.balancers.push(universe.add(format!("balancer-{number}"), 1, number));
        }
        for number in 1..=clients {
            cluster.clients.push(universe.add(format!("client-{number}"), 2, number));
        }
        cluster
    }

    /// One more node's host and disk.
    pub fn add_node(&mut self, universe: &mut Universe, number: u8) {
        let name = format!("Server{}", number - 1);
        let host = universe.add(name.clone(), 0, number);
        let disk =
            SimDisk::new(PathBuf::from(format!("/{name}")), universe.rng.random(), CAPACITY, universe.trace.clone());
        self.nodes.push(NodeHost { host, name, disk, said: Arc::default(), over: None });
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
        node.said = Arc::default();
        let said = node.said.clone();
        let config = NodeConfig {
            join: homes,
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

    /// Ends the processes that have ended by themselves, or whose power has gone. Returns their number and why.
    pub fn look_for_ends(&mut self, universe: &mut Universe) -> Vec<(usize, String)> {
        let mut ends = Vec::new();
        for at in 0..self.nodes.len() {
            let node = &self.nodes[at];
            if !universe.runs(node.host) {
                continue;
            }
            if node.disk.is_dark() {
                self.end_node(universe, at, Fate::Silence);
                ends.push((at, "the power went".to_owned()));
                continue;
            }
            let ended = node.said.ended.lock().clone();
            if let Some(reason) = ended {
                universe.trace.note(&[23, at as u64], || format!("{} ended: {reason}", self.nodes[at].name));
                self.end_node(universe, at, Fate::Reset);
                ends.push((at, reason));
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
