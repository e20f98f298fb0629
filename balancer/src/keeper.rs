//! Keeps the map fresh: reads it from the system shard, corrects addresses in it, finishes what a bootstrap left.

#![expect(clippy::disallowed_methods, reason = "a shell: waits")]

use crate::bootstrap::{self, Plan};
use crate::cluster::Cluster;
use crate::system;
use std::sync::Arc;
use std::time::Duration;

/// The map is read this often even if nobody has said that there is a newer one.
const READ_EVERY: Duration = Duration::from_secs(5);
/// Shortest time between two reads, however many ask.
const READ_SPACING: Duration = Duration::from_millis(20);

/// Gets the first map, if there is none yet, and keeps it fresh until the balancer stops.
pub(crate) async fn run(cluster: Arc<Cluster>, plan: Option<Plan>) {
    let stop = cluster.stop.clone();
    stop.run_until_cancelled(async {
        if !cluster.has_map() {
            bootstrap::get_first_map(&cluster, plan.as_ref()).await;
        }
        loop {
            keep(&cluster).await;
            tokio::time::sleep(READ_SPACING).await;
            tokio::select! { // both arms are cancel-safe: neither takes anything with it
                () = cluster.map_wanted.notified() => {}
                () = tokio::time::sleep(READ_EVERY) => {}
            }
            match system::read(&cluster).await {
                Ok(Some(map)) => cluster.install(map),
                Ok(None) => tracing::error!("the map is gone from the system shard"),
                Err(error) => tracing::debug!(%error, "the map was not read"),
            }
        }
    })
    .await;
}

async fn keep(cluster: &Arc<Cluster>) {
    let routes = cluster.routes();
    cluster.seek_elsewhere(routes.map());
    let misplaced: Vec<_> = cluster.misplaced(routes.map()).collect();
    for node in misplaced {
        match system::write_node(cluster, &node).await {
            Ok(()) => {
                tracing::info!(node = %node.id, addr = node.addr, "corrected a node's address in the map");
                cluster.announce(&node);
                cluster.map_wanted.notify_one();
            }
            Err(error) => tracing::debug!(node = %node.id, %error, "an address is not corrected yet"),
        }
    }
    match system::create_missing(cluster, routes.map()).await {
        Ok(()) => cluster.set_trouble(None),
        Err(error) => {
            tracing::warn!(%error, "a replica of the map cannot be made");
            cluster.set_trouble(Some(format!("a replica of the map cannot be made: {error}")));
        }
    }
}
