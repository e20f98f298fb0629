//! The heartbeat: tells every node where the others are and, if its own is older, the map; hears how each fares.
//!
//! Beats go out before the system shard has a leader: after a restart with changed ports it is by them that the nodes
//! find each other, and only then can a leader be elected.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and waits")]

use crate::cluster::Cluster;
use crate::pool::Home;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::link::{LinkError, done_or_failure};
use shkv_proto::message::{Beat, NodeStatus};
use shkv_proto::{Epoch, Frame, Header, Kind, NodeId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Time between two beats.
const BEAT_EVERY: Duration = Duration::from_millis(500);
/// The same while a leader is missing or a node has an old map: whoever waits for it should not wait long.
const BEAT_EVERY_UNSETTLED: Duration = Duration::from_millis(50);
/// Shortest time between two beats, however often one is wanted.
const BEAT_SPACING: Duration = Duration::from_millis(10);
/// How long a node may take to answer.
const BEAT_TIME_MAX: Duration = Duration::from_secs(2);
/// A beat that is so much too late shows that this process was held up.
const DEAF_TIME: Duration = Duration::from_secs(1);
/// A node that is silent for so long on a connection that looks alive is connected to anew.
const SILENT_MAX: Duration = Duration::from_secs(3);

/// Beats until the balancer stops.
pub(crate) async fn run(cluster: Arc<Cluster>) {
    let mut last = Instant::now();
    loop {
        beat_all(&cluster);
        let lacks = cluster.lacks();
        let epoch = cluster.routes().map().epoch;
        let behind = cluster.health(|health, now| health.some_node_is_behind(epoch, now));
        let settled = !lacks.map_missing && lacks.shards_without_leader.is_empty() && !behind;
        let pause = if settled { BEAT_EVERY } else { BEAT_EVERY_UNSETTLED };
        tokio::select! { // every arm is cancel-safe: none takes anything with it
            biased;
            () = cluster.stop.cancelled() => return,
            () = cluster.beat_wanted.notified() => {}
            () = tokio::time::sleep(pause) => {}
        }
        tokio::time::sleep_until(last + BEAT_SPACING).await;
        if last.elapsed() > pause + DEAF_TIME {
            tracing::warn!(
                "this process was held up for {:?}: silence in that time counts against nobody",
                last.elapsed()
            );
            cluster.was_deaf();
        }
        last = Instant::now();
    }
}

fn beat_all(cluster: &Arc<Cluster>) {
    let routes = cluster.routes();
    let epoch = routes.map().epoch;
    let beat = |map| codec::encode(&Beat { addrs: cluster.pool.book(), map, retired: None }).map(Bytes::from);
    let state = cluster.state();
    let gone = state.iter().flat_map(|state| &state.gone);
    let gone: BTreeMap<NodeId, &str> = gone.map(|gone| (gone.id, gone.reason.as_str())).collect();
    let Ok(short) = beat(None) else { return tracing::error!("the address book is too large for a frame") };
    let mut long: Option<Bytes> = None;
    let now = Instant::now();
    let homes = cluster.pool.homes();
    cluster.asks(homes.iter().map(|(node, _)| *node));
    for (node, home) in homes {
        let (told, age) = cluster.health(|health, now| {
            let member = health.status(node).filter(|status| status.cluster.is_some());
            (member.map(|status| status.epoch), health.age(node, now))
        });
        if let Some(reason) = gone.get(&node) {
            retire(cluster, node, &home, reason, now);
            continue;
        }
        let silent = age.is_none_or(|age| age > SILENT_MAX) && now.duration_since(home.opened) > SILENT_MAX;
        if silent && home.links_up() > 0 {
            tracing::warn!(%node, addr = home.addr, "no answer to beats on an open connection; connecting anew");
            cluster.pool.reopen(node);
            continue;
        }
        let head = match told {
            Some(told) if told < epoch && epoch != Epoch::NONE => {
                if long.is_none() {
                    long = beat(Some(routes.map().clone())).ok();
                }
                long.clone().unwrap_or_else(|| short.clone())
            }
            Some(_) | None => short.clone(),
        };
        let frame = Frame::new(Header::new(Kind::Beat), head, Bytes::new());
        let listener = cluster.clone();
        // Without credit left the node has much to do and will be asked again by the next beat.
        let _ = home.link(0).try_submit(frame, now + BEAT_TIME_MAX, move |result| hear(&listener, node, result));
    }
}

/// Tells a node that it is of the cluster no more. When it has been told, or cannot be reached, it is left alone.
fn retire(cluster: &Arc<Cluster>, node: NodeId, home: &Home, reason: &str, now: Instant) {
    let beat = Beat { addrs: vec![], map: None, retired: Some(reason.to_owned()) };
    let Ok(head) = codec::encode(&beat) else { return };
    if home.links_up() == 0 {
        if now.duration_since(home.opened) > SILENT_MAX {
            cluster.pool.remove(node);
        }
        return;
    }
    let told = cluster.clone();
    let frame = Frame::new(Header::new(Kind::Beat), head, Bytes::new());
    let _ = home.link(0).try_submit(frame, now + BEAT_TIME_MAX, move |result| {
        if result.is_ok() {
            told.pool.remove(node);
        }
    });
}

fn hear(cluster: &Cluster, node: NodeId, result: Result<Frame, LinkError>) {
    let status = result
        .map_err(|error| error.to_string())
        .and_then(|answer| done_or_failure(answer).map_err(|failure| failure.to_string()))
        .and_then(|answer| codec::decode::<NodeStatus>(&answer.head).map_err(|error| error.to_string()));
    match status {
        Ok(status) if status.id == node => cluster.heard(node, status),
        Ok(status) => cluster.missed(node, format!("node {} answered a beat for it", status.id)),
        Err(error) => cluster.missed(node, error),
    }
}
