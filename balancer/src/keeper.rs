//! Keeps the map fresh: reads it from the system shard, and corrects addresses in it.

#![expect(clippy::disallowed_methods, reason = "a shell: waits")]

use crate::bootstrap::{self, Plan};
use crate::cluster::Cluster;
use crate::map_rows::State;
use crate::{control, system};
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
                biased;
                () = cluster.map_wanted.notified() => {}
                () = tokio::time::sleep(READ_EVERY) => {}
            }
            match system::read(&cluster).await {
                Ok(Some(state)) => cluster.install(state),
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
    if misplaced.is_empty() {
        return;
    }
    let correct = |state: &mut State| {
        for node in &misplaced {
            if let Some(info) = state.map.nodes.iter_mut().find(|info| info.id == node.id) {
                info.addr.clone_from(&node.addr);
            }
        }
        Ok(())
    };
    match control::change(cluster, correct).await {
        Ok(()) => misplaced.iter().for_each(|node| {
            tracing::info!(node = %node.id, addr = node.addr, "corrected a node's address in the map");
            cluster.announce(node);
        }),
        Err(error) => tracing::debug!(%error, "an address is not corrected yet"),
    }
}
