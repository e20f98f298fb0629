//! The loop against shkv, by way of its client library.

use super::local;
use super::measure::{Outcome, Tally, Usage, Window, measure, unmeasured};
use super::pace::Pace;
use super::workload::{Drawer, Op, key};
use super::{KEY_BYTES, LOAD_TRIES_MAX, Plan};
use anyhow::{Context, bail};
use bytes::Bytes;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use shkv_client::{Client, ClientConfig, Consistency, Keyspace};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;

/// The cluster, and how to ask it.
#[derive(Clone, Debug)]
pub struct Target {
    /// Addresses of balancers or nodes.
    pub addrs: Vec<String>,
    /// The keyspace's name.
    pub keyspace: String,
    /// How fresh a read must be.
    pub consistency: Consistency,
    /// Never talk to nodes directly.
    pub through_balancer: bool,
    /// Clients that all tasks share: each has connections of its own.
    pub clients: u32,
}

/// Runs the plan.
///
/// # Errors
/// When the cluster cannot be reached, or a key that must be there could not be loaded.
pub async fn run(target: &Target, plan: &Plan) -> anyhow::Result<Outcome> {
    let keyspaces = target.connect_groups(plan.conns).await?;
    if plan.load && plan.workload.reads() {
        load(&keyspaces, plan).await?;
    }
    let watch = Watch::new(target).await?;
    let window = Arc::new(Window::default());
    let mut workers = JoinSet::new();
    let (inserted, all) = (Arc::new(AtomicU64::new(0)), u64::from(plan.conns) * u64::from(plan.depth));
    for (seed, keyspace) in (0..).zip(keyspaces.iter().flat_map(|one| (0..plan.depth).map(move |_| one))) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let worker = Worker {
            keyspace: keyspace.clone(),
            consistency: target.consistency,
            value: Bytes::from(plan.value(&mut rng)),
            drawer: plan.workload.drawer(rng, inserted.clone())?,
            pace: Pace::new(plan.rate, seed, all),
            window: window.clone(),
            tally: Tally::default(),
        };
        workers.spawn(worker.work());
    }
    measure(plan, &window, workers, async || watch.usage().await).await
}

impl Target {
    /// One client for each group of tasks; the groups share as many as there are to be.
    ///
    /// # Errors
    /// When the cluster cannot be reached.
    pub async fn connect_groups(&self, groups: u32) -> anyhow::Result<Vec<Keyspace>> {
        let mut clients = Vec::new();
        for _ in 0..self.clients.clamp(1, groups) {
            clients.push(self.connect().await?);
        }
        Ok(clients.into_iter().cycle().take(groups as usize).collect())
    }

    /// A client of its own.
    ///
    /// # Errors
    /// When the cluster cannot be reached.
    pub async fn connect(&self) -> anyhow::Result<Keyspace> {
        let config = ClientConfig { through_balancer: self.through_balancer, ..ClientConfig::default() };
        let client = Client::connect_with(self.addrs.iter().map(|addr| addr.trim()), config)
            .await
            .with_context(|| format!("connecting to {}", self.addrs.join(", ")))?;
        Ok(client.keyspace(&self.keyspace).await?)
    }
}

/// One request in flight after the other.
struct Worker {
    keyspace: Keyspace,
    consistency: Consistency,
    value: Bytes,
    drawer: Drawer,
    pace: Pace,
    window: Arc<Window>,
    tally: Tally,
}

impl Worker {
    async fn work(mut self) -> anyhow::Result<Tally> {
        while !self.window.is_over() {
            let began = self.pace.begin().await;
            let op = self.drawer.draw();
            match self.act(op).await {
                Ok(true) => self.tally.succeeded(&self.window, began),
                Ok(false) => self.tally.failed(&self.window, &"a key that was loaded is not there").await,
                Err(error) => self.tally.failed(&self.window, &error).await,
            }
        }
        Ok(self.tally)
    }

    /// Whether what was to be read is there.
    async fn act(&mut self, op: Op) -> Result<bool, shkv_client::Error> {
        match op {
            Op::Put(key) => self.keyspace.put(key, self.value.clone()).await.map(|_| true),
            Op::Get(key) => Ok(self.get(key).answer().await?.row.is_some()),
            Op::Change(key) => {
                let is_there = self.get(key).answer().await?.row.is_some();
                self.keyspace.put(key, self.value.clone()).await?;
                Ok(is_there)
            }
            Op::Scan(key, rows) => {
                let scan = self.keyspace.scan(key.to_vec()..).consistency(self.consistency);
                let (mut found, mut count) = (scan.limit(u64::from(rows)).rows(), 0);
                while found.next().await?.is_some() {
                    count += 1;
                }
                self.tally.scanned(&self.window, count);
                Ok(count > 0)
            }
        }
    }

    fn get(&self, key: [u8; KEY_BYTES]) -> shkv_client::Get {
        self.keyspace.get(key).consistency(self.consistency)
    }
}

/// Writes all keys, unless all are there.
///
/// # Errors
/// When a key could not be written.
pub async fn load(keyspaces: &[Keyspace], plan: &Plan) -> anyhow::Result<()> {
    let range = key(0).to_vec()..key(plan.workload.keys).to_vec();
    if keyspaces[0].count(range).await? >= plan.workload.keys {
        return Ok(());
    }
    eprintln!("shkv-bench: loading {} keys", plan.workload.keys);
    let next = Arc::new(AtomicU64::new(0));
    let window = Arc::new(unmeasured());
    let mut loaders = JoinSet::new();
    for (seed, keyspace) in (0..).zip(keyspaces.iter().flat_map(|one| (0..plan.depth).map(move |_| one))) {
        let (keyspace, plan, next, window) = (keyspace.clone(), plan.clone(), next.clone(), window.clone());
        loaders.spawn(async move {
            let value = Bytes::from(plan.value(&mut SmallRng::seed_from_u64(seed)));
            let mut failures = Tally::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= plan.workload.keys {
                    return Ok(());
                }
                // Putting the same row again is harmless, so an unknown outcome is tried again, too.
                let mut tries = 0;
                while let Err(error) = keyspace.put(key(number), value.clone()).await {
                    tries += 1;
                    if tries == LOAD_TRIES_MAX {
                        bail!("loading key {number}: {error}");
                    }
                    failures.failed(&window, &error).await;
                }
            }
        });
    }
    while let Some(loader) = loaders.join_next().await {
        loader.context("a loader")??;
    }
    Ok(())
}

/// Who is asked what the servers have used. Nodes are asked themselves where they can be reached: what a balancer says
/// of them may be a heartbeat old.
pub struct Watch {
    home: Client,
    nodes: Vec<Client>,
}

impl Watch {
    /// Finds everyone.
    ///
    /// # Errors
    /// When nobody can be reached.
    pub async fn new(target: &Target) -> anyhow::Result<Self> {
        let home = Client::connect(target.addrs.iter().map(|addr| addr.trim())).await?;
        let mut nodes = Vec::new();
        for node in home.status().await?.map.into_iter().flat_map(|map| map.nodes) {
            nodes.extend(Client::connect([node.addr]).await);
        }
        Ok(Self { home, nodes })
    }

    /// What they have used so far.
    ///
    /// # Errors
    /// When nobody tells.
    pub async fn usage(&self) -> anyhow::Result<Usage> {
        let mut cpu_us = BTreeMap::new();
        let (mut log_syncs, mut kept) = (BTreeMap::new(), BTreeMap::new());
        let own = std::process::id();
        for client in self.nodes.iter().chain([&self.home]) {
            let Ok(status) = client.status().await else { continue };
            let listed = status.nodes.into_iter().filter_map(|(_, node)| node.ok());
            let mut processes = vec![status.process];
            for node in listed {
                processes.push((node.process, node.cpu_us));
                let syncs: &mut u64 = log_syncs.entry(node.id.0).or_default();
                *syncs = node.log_syncs.max(*syncs);
                kept.entry(node.id.0).or_insert((node.log_bytes, node.table_bytes));
            }
            for (process, used) in processes.into_iter().filter(|(process, _)| *process != own) {
                let known: &mut u64 = cpu_us.entry(process).or_default();
                *known = used.max(*known); // the same process told twice counts once, as of the later time
            }
        }
        if cpu_us.is_empty() {
            bail!("no server tells its status");
        }
        Ok(Usage {
            wire_bytes: local::loopback_bytes().unwrap_or_default(),
            memory_bytes: local::memory_bytes(cpu_us.keys().copied()),
            log_bytes: kept.values().map(|(log, _)| log).sum(),
            table_bytes: kept.values().map(|(_, table)| table).sum(),
            cpu_us: cpu_us.into_iter().collect(),
            log_syncs: log_syncs.into_iter().collect(),
        })
    }
}
