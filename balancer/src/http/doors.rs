//! One listener for every node of the pool, opened by the balancer when the node comes and closed when it is gone.
//!
//! Where each is, is told by `/v1/nodes`.

use crate::http::Front;
use crate::http::listen::serve;
use crate::http::pool::stays;
use parking_lot::Mutex;
use shkv_proto::world::net;
use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// How often the nodes are looked at when nothing has been heard.
const LOOK_EVERY: Duration = Duration::from_secs(1);

/// The listeners of nodes that this process has open.
#[derive(Debug, Default)]
pub(crate) struct Doors {
    open: Mutex<BTreeMap<String, Door>>,
}

#[derive(Debug)]
struct Door {
    addr: SocketAddr,
    /// How far its port is from the first one.
    offset: u16,
    close: CancellationToken,
}

impl Doors {
    /// Where the listener of a node is, if it has one here.
    pub(crate) fn addr(&self, node: &str) -> Option<SocketAddr> {
        self.open.lock().get(node).map(|door| door.addr)
    }

    /// A listener of a node that somebody else has opened.
    pub(crate) fn note(&self, node: &str, addr: SocketAddr) {
        let door = Door { addr, offset: u16::MAX, close: CancellationToken::new() };
        self.open.lock().insert(node.to_owned(), door);
    }
}

/// Opens and closes listeners until the balancer stops. The first node in the order of names has `base`'s port, each next one
/// the lowest that is free behind it; with port 0 each has any.
pub(crate) async fn keep(front: Front, base: String, kill: CancellationToken) {
    let cluster = front.store.cluster().clone();
    let mut news = cluster.news();
    while !cluster.stop.is_cancelled() {
        let routes = cluster.routes();
        let mut names: Vec<&str> =
            routes.map().nodes.iter().filter(|node| stays(node)).map(|node| node.name.as_str()).collect();
        names.sort_unstable();
        front.doors.open.lock().retain(|name, door| {
            let there = names.contains(&name.as_str());
            if !there {
                door.close.cancel();
            }
            there
        });
        for name in names {
            if front.doors.addr(name).is_none()
                && let Err(error) = open(&front, name, &base, &kill).await
            {
                tracing::warn!(%error, node = name, base, "no HTTP listener for a node");
            }
        }
        let waiting = tokio::time::timeout(LOOK_EVERY, news.changed());
        // Whether news came or not, the next round looks again.
        let _ = cluster.stop.run_until_cancelled(waiting).await;
    }
}

async fn open(front: &Front, name: &str, base: &str, kill: &CancellationToken) -> io::Result<()> {
    let (host, port) = base.rsplit_once(':').ok_or_else(|| io::Error::other("it is not host:port"))?;
    let port: u16 = port.parse().map_err(io::Error::other)?;
    let offset = {
        let open = front.doors.open.lock();
        (0..).find(|offset| !open.values().any(|door| door.offset == *offset)).unwrap_or(u16::MAX)
    };
    let port =
        if port == 0 { 0 } else { port.checked_add(offset).ok_or_else(|| io::Error::other("no port is left"))? };
    let listener = net::listen(&format!("{host}:{port}"), crate::WAITING_MAX).await?;
    let addr = listener.local_addr()?;
    let cluster = front.store.cluster();
    let close = cluster.stop.child_token();
    let door = Door { addr, offset, close: close.clone() };
    front.doors.open.lock().insert(name.to_owned(), door);
    cluster.tasks.spawn(serve(front.at(name), listener, close, kill.clone()));
    tracing::info!(node = name, %addr, "HTTP listener of a node");
    Ok(())
}
