//! The operator of a simulated cluster: gives leaderships away, empties nodes and lets them be used again, and removes one.
//! A node is emptied to the end before anything else is wished, or the wish is taken back.

use super::workload::{Story, connect};
use rand::RngExt;
use shkv_client::{Admin, Client, RefusalCode};
use shkv_proto::{NodeId, ShardId, world};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// How often it is looked whether a node is empty, and how long the pause between two looks is.
const LOOKS: u32 = 20;
const LOOK_PAUSE: Duration = Duration::from_millis(300);
/// How often a wish is told that must be heard: the cluster may have to heal first.
const TRIES_MAX: u32 = 50;
/// Within this time a wish that had no answer is written down, or never.
const LATE_TIME: Duration = Duration::from_secs(10);
/// Within this time a step that was under way when a wish was taken back is done, or never.
const STEP_TIME: Duration = Duration::from_secs(2);

/// The operator.
pub struct Operator {
    names: Vec<String>,
    removed: AtomicBool,
    /// Whether a node is being emptied: groups may become smaller at any moment.
    emptying: Arc<AtomicBool>,
}

impl Operator {
    /// One who knows nodes of these names.
    #[must_use]
    pub fn new(names: Vec<String>, emptying: Arc<AtomicBool>) -> Self {
        Self { names, removed: AtomicBool::new(false), emptying }
    }

    /// Wishes one thing after the other until the calm, and then that all nodes be used.
    pub async fn work(self: Arc<Self>, story: Arc<Story>, homes: Vec<String>) {
        let client = connect(&homes).await;
        while !story.is_calm() {
            let pause = world::rng().random_range(200..2_500);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let wish = self.wish();
            let emptied = match &wish {
                Admin::Drain { node, drain: true } => Some(node.clone()),
                Admin::RemoveNodes { names, .. } => names.first().cloned(),
                _ => None,
            };
            self.emptying.store(emptied.is_some(), Ordering::Relaxed);
            if client.admin(&wish).await.is_ok() {
                story.wished();
            }
            if let Some(node) = emptied {
                self.emptied(&client, &story, &node).await;
            }
        }
        // Twice: a wish without an answer may be written down behind the one that takes it back.
        for _ in 0..2 {
            for node in &self.names {
                self.use_again(&client, node).await;
            }
            tokio::time::sleep(LATE_TIME).await;
        }
    }

    fn wish(&self) -> Admin {
        let node = self.names[world::rng().random_range(0..self.names.len())].clone();
        match world::rng().random_range(0..12) {
            0..7 => Admin::Transfer { shard: ShardId(world::rng().random_range(0..4)), node },
            7..9 => Admin::Drain { node, drain: true },
            9..11 => Admin::Drain { node, drain: false },
            _ if !self.removed.swap(true, Ordering::Relaxed) => Admin::RemoveNodes { count: 1, names: vec![node] },
            _ => Admin::Drain { node, drain: false },
        }
    }

    /// Waits until a node keeps nothing, or takes the wish back. Until then its replicas go at any moment.
    async fn emptied(&self, client: &Client, story: &Story, node: &str) {
        for _ in 0..LOOKS {
            tokio::time::sleep(LOOK_PAUSE).await;
            if story.is_calm() {
                return; // nothing is lost any more
            }
            let Ok(status) = client.status().await else { continue };
            let Some(map) = status.map else { continue };
            let is_it = |home: NodeId| map.node(home).is_some_and(|info| info.name == node);
            if !map.shards.iter().flat_map(|shard| &shard.replicas).any(|replica| is_it(replica.node)) {
                return self.emptying.store(false, Ordering::Relaxed);
            }
        }
        self.use_again(client, node).await;
        tokio::time::sleep(STEP_TIME).await;
        self.emptying.store(false, Ordering::Relaxed);
    }

    async fn use_again(&self, client: &Client, node: &str) {
        let wish = Admin::Drain { node: node.to_owned(), drain: false };
        for _ in 0..TRIES_MAX {
            match client.admin(&wish).await {
                Err(error) if error.code() != Some(RefusalCode::NotFound) => {}
                Ok(_) | Err(_) => return, // or it is of the cluster no more
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
}
