//! The other nodes: where they are, and one link to each.

use crate::replica::Outgoing;
use bytes::{Bytes, BytesMut};
use parking_lot::Mutex;
use shkv_proto::codec;
use shkv_proto::link::Link;
use shkv_proto::message::{Hello, RaftMessage, Role};
use shkv_proto::{ClusterId, Frame, Header, Kind, NodeId};
use std::collections::BTreeMap;
use tokio::time::Instant;

/// Bytes that may wait for one peer; more are dropped, and Raft sends them again.
const BACKLOG_BYTES_MAX: usize = 32 << 20;
/// Bytes of entries in one frame, if not a single message has more.
const FRAME_DATA_BYTES: usize = 2 << 20;

/// The other nodes.
#[derive(Debug)]
pub struct Peers {
    me: NodeId,
    inner: Mutex<Inner>,
}

#[derive(Debug, Default)]
struct Inner {
    cluster: Option<ClusterId>,
    addrs: BTreeMap<NodeId, String>,
    links: BTreeMap<NodeId, Link>,
}

impl Peers {
    /// Nobody known yet.
    #[must_use]
    pub fn new(me: NodeId, cluster: Option<ClusterId>) -> Self {
        Self { me, inner: Mutex::new(Inner { cluster, ..Inner::default() }) }
    }

    /// The node has joined a cluster.
    pub fn set_cluster(&self, cluster: ClusterId) {
        self.inner.lock().cluster = Some(cluster);
    }

    /// Where nodes are. A link to an address that has changed is given up.
    pub fn set_addrs(&self, addrs: &[(NodeId, String)]) {
        let mut inner = self.inner.lock();
        for (node, addr) in addrs {
            if *node != self.me && inner.addrs.get(node) != Some(addr) {
                inner.addrs.insert(*node, addr.clone());
                inner.links.remove(node);
            }
        }
    }

    /// This node.
    pub fn me(&self) -> NodeId {
        self.me
    }

    /// Where a node is.
    pub fn addr(&self, node: NodeId) -> Option<String> {
        self.inner.lock().addrs.get(&node).cloned()
    }

    /// The opening of a connection to a peer.
    pub fn hello(&self) -> Hello {
        Hello::ours(self.inner.lock().cluster, Role::Node(self.me))
    }

    /// Sends messages to a node. `false` if some of them certainly do not get there.
    pub fn tell(&self, node: NodeId, messages: Vec<Outgoing>) -> bool {
        let Some(link) = self.link(node) else { return false };
        let mut heads: Vec<RaftMessage> = Vec::with_capacity(messages.len());
        let mut tail = BytesMut::new();
        let mut told = true;
        for message in messages {
            let bytes: usize = message.data.iter().map(Bytes::len).sum();
            if !heads.is_empty() && tail.len() + bytes > FRAME_DATA_BYTES {
                told &= tell(&link, &std::mem::take(&mut heads), tail.split().freeze());
            }
            for data in &message.data {
                tail.extend_from_slice(data);
            }
            heads.push(message.head);
        }
        told & tell(&link, &heads, tail.freeze())
    }

    /// Connects to nodes ahead of need, and waits for it: what is told before a link is up is dropped.
    pub async fn reach(&self, nodes: impl Iterator<Item = NodeId>, deadline: Instant) {
        let links: Vec<Link> = nodes.filter(|node| *node != self.me).filter_map(|node| self.link(node)).collect();
        for link in links {
            let _ = link.connected(deadline).await; // who cannot be reached is told again later
        }
    }

    /// The link to a node, if it is known where that is.
    pub fn link(&self, node: NodeId) -> Option<Link> {
        let hello = self.hello();
        let mut inner = self.inner.lock();
        if let Some(link) = inner.links.get(&node) {
            return Some(link.clone());
        }
        let addr = inner.addrs.get(&node)?.clone();
        let link = Link::open(addr, hello, move |welcome| match welcome.role {
            Role::Node(found) if found == node => Ok(()),
            other => Err(format!("{other:?} answers where node {node} was")),
        });
        inner.links.insert(node, link.clone());
        Some(link)
    }
}

fn tell(link: &Link, heads: &[RaftMessage], tail: Bytes) -> bool {
    match codec::encode(heads) {
        Ok(head) => link.tell(&Frame::new(Header::new(Kind::Raft), head, tail), BACKLOG_BYTES_MAX),
        Err(error) => {
            tracing::error!("Raft messages cannot be encoded: {error}");
            false
        }
    }
}
