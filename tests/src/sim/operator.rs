//! The operator of a simulated cluster: gives leaderships away, empties nodes and lets them be used again, and removes one.

use super::workload::{Story, connect};
use rand::RngExt;
use shkv_client::{Admin, Client};
use shkv_proto::{ShardId, world};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// The operator.
pub struct Operator {
    names: Vec<String>,
    removed: AtomicBool,
}

impl Operator {
    /// One who knows nodes of these names.
    #[must_use]
    pub fn new(names: Vec<String>) -> Self {
        Self { names, removed: AtomicBool::new(false) }
    }

    /// Wishes one thing after the other until the calm, and then that all nodes be used.
    pub async fn work(self: Arc<Self>, story: Arc<Story>, homes: Vec<String>) {
        let client = connect(&homes).await;
        while !story.is_calm() {
            let pause = world::rng().random_range(200..2_500);
            tokio::time::sleep(Duration::from_millis(pause)).await;
            let wish = self.wish();
            if client.admin(&wish).await.is_ok() {
                story.wished();
            }
        }
        for node in &self.names {
            self.use_again(&client, node).await;
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

    async fn use_again(&self, client: &Client, node: &str) {
        let wish = Admin::Drain { node: node.to_owned(), drain: false };
        for _ in 0..5 {
            if client.admin(&wish).await.is_ok() {
                return;
            }
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
}
