//! What the clones of a client share: connections, map, token; and how the map is kept new.

#![expect(
    clippy::disallowed_methods,
    reason = "a shell: tells the time, waits, and fetches a newer map behind the scenes"
)]

use crate::call::{self, CONNECT_TIME_MAX};
use crate::client::ClientConfig;
use crate::error::Error;
use crate::lanes::Lanes;
use crate::token::{Consistency, Token};
use crate::view::View;
use bytes::Bytes;
use parking_lot::{Mutex, RwLock};
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Header, Kind};
use shkv_proto::ids::{ClusterId, KeyspaceId, NodeId, ShardId};
use shkv_proto::limits::{Limits, NAME_BYTES_MAX};
use shkv_proto::link::{CallError, Link, LinkError};
use shkv_proto::message::{self, Failure, Hello, MapDone, RefusalCode, Role, Welcome};
use shkv_proto::retry;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;
use tokio::time::Instant;

/// How long a fetch of the map that no call waits for may take.
const REFRESH_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause between two fetches of the map that no call waits for.
const REFRESH_PAUSE: Duration = Duration::from_millis(500);

#[derive(Debug)]
pub(crate) struct Inner {
    pub(crate) config: ClientConfig,
    /// The addresses that the caller gave: balancers, or nodes. Never empty.
    homes: Vec<Link>,
    home: AtomicUsize,
    view: RwLock<Arc<View>>,
    token: Mutex<Token>,
    limits: Limits,
    pub(crate) default_keyspace: OnceLock<KeyspaceId>,
    pub(crate) lanes: Lanes,
    refreshing: AtomicBool,
    refreshing_behind: AtomicBool,
}

impl Inner {
    pub(crate) fn new(config: ClientConfig, homes: Vec<Link>, found: MapDone, limits: Limits) -> Self {
        Self {
            home: AtomicUsize::new(0),
            view: RwLock::new(Arc::new(View::new(found.map, &found.leaders, config.links_per_node, None))),
            token: Mutex::new(Token::default()),
            limits,
            default_keyspace: OnceLock::new(),
            lanes: Lanes::default(),
            refreshing: AtomicBool::new(false),
            refreshing_behind: AtomicBool::new(false),
            homes,
            config,
        }
    }

    pub(crate) fn token(&self) -> Token {
        self.token.lock().clone()
    }

    pub(crate) fn observe(&self, token: &Token) {
        self.token.lock().merge(token);
    }

    pub(crate) fn view(&self) -> Arc<View> {
        self.view.read().clone()
    }

    /// A node did not answer as the leader of a shard. The view may have been replaced while the call was under way, with
    /// the same guess in the new one, so both are told.
    pub(crate) fn not_leader(&self, asked: &View, shard: ShardId, node: NodeId, hint: Option<NodeId>) {
        asked.routes.note_not_leader(shard, node, hint);
        self.view().routes.note_not_leader(shard, node, hint);
    }

    pub(crate) fn limits(&self) -> &Limits {
        &self.limits
    }

    /// How fresh an answer of `shard` must be, as it is said to the shard.
    pub(crate) fn wanted(&self, consistency: Consistency, shard: ShardId) -> message::Consistency {
        match consistency {
            Consistency::Linearizable => message::Consistency::Linearizable,
            Consistency::Eventual => message::Consistency::Eventual,
            Consistency::Causal => message::Consistency::Causal { revision: self.token.lock().revision(shard.0) },
        }
    }

    /// Remembers the revision that an answer tells.
    pub(crate) fn saw(&self, shard: ShardId, revision: u64) {
        if shard != ShardId::UNROUTED {
            self.token.lock().see(shard, revision);
        }
    }

    /// The address to go by when nodes are not asked directly: a balancer that is up, if there is one.
    pub(crate) fn home(&self) -> &Link {
        let from = self.home.load(Ordering::Relaxed);
        let in_turn = || (0..self.homes.len()).map(|step| &self.homes[(from + step) % self.homes.len()]);
        let is_balancer = |link: &&Link| link.welcome().is_some_and(|welcome| welcome.role == Role::Balancer);
        in_turn().find(is_balancer).unwrap_or(&self.homes[from % self.homes.len()])
    }

    pub(crate) fn next_home(&self) {
        self.home.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) async fn find_keyspace(&self, name: &str, deadline: Instant) -> Result<KeyspaceId, Error> {
        if name.len() > NAME_BYTES_MAX {
            let text = format!("a keyspace's name of {} bytes is over NAME_BYTES_MAX = {NAME_BYTES_MAX}", name.len());
            return Err(Error::refused(RefusalCode::UnknownKeyspace, text));
        }
        let known = |view: &View| view.routes.map().keyspace(name).map(|info| info.id);
        if let Some(id) = known(&self.view()) {
            return Ok(id);
        }
        self.fetch_map(deadline).await?;
        let view = self.view();
        known(&view).ok_or_else(|| {
            let names: Vec<&str> = view.routes.map().keyspaces.iter().map(|info| info.name.as_str()).collect();
            let text = format!("no keyspace {name:?}; there are: {}", names.join(", "));
            Error::refused(RefusalCode::UnknownKeyspace, text)
        })
    }

    /// Fetches the map, unless that is under way already; whoever asked tries again with what there is.
    pub(crate) async fn refresh(&self, deadline: Instant) {
        if self.refreshing.swap(true, Ordering::Acquire) {
            return;
        }
        let _under_way = UnderWay(&self.refreshing);
        let _ = self.fetch_map(deadline).await; // the call that wants it reports what it fails with itself
    }

    /// Fetches the map while no call waits for it: a node could not be reached, it may have moved.
    pub(crate) fn refresh_behind(self: &Arc<Self>) {
        if self.refreshing_behind.load(Ordering::Relaxed) {
            return;
        }
        let inner = Arc::downgrade(self);
        tokio::spawn(async move {
            let Some(inner) = inner.upgrade() else { return };
            if inner.refreshing_behind.swap(true, Ordering::Acquire) {
                return;
            }
            let _under_way = UnderWay(&inner.refreshing_behind);
            let _ = inner.fetch_map(Instant::now() + REFRESH_TIME_MAX).await;
            tokio::time::sleep(REFRESH_PAUSE).await; // not lifted before: failing calls come in crowds
        });
    }

    async fn fetch_map(&self, deadline: Instant) -> Result<(), Error> {
        let view = self.view();
        let from = self.home.load(Ordering::Relaxed);
        let homes = (0..self.homes.len()).map(|step| &self.homes[(from + step) % self.homes.len()]);
        let peers = view.peers().filter(|_| !self.config.through_balancer).map(|peer| peer.link());
        let (done, _) = first_map(homes.chain(peers), deadline)
            .await
            .map_err(|error| Error::from(retry::out_of_time(&error, false)))?;
        check_map(&done, Some(view.routes.map().cluster))?;
        let mut current = self.view.write();
        // The same epoch is taken, too: addresses may be newer while the map's age is the same.
        if done.map.epoch >= current.routes.map().epoch {
            *current = Arc::new(View::new(done.map, &done.leaders, self.config.links_per_node, Some(&current)));
        }
        Ok(())
    }
}

/// Lifts the mark that a fetch is under way, also when the caller stops waiting for it.
struct UnderWay<'a>(&'a AtomicBool);

impl Drop for UnderWay<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

pub(crate) fn open_home(addr: String, cluster: Option<ClusterId>) -> Link {
    Link::open(addr, Hello::ours(cluster, Role::Client), move |welcome: &Welcome| match (cluster, welcome.cluster) {
        (Some(meant), Some(there)) if meant != there => Err(format!("this is cluster {there}, not {meant}")),
        _ => Ok(()),
    })
}

pub(crate) fn check_map(done: &MapDone, cluster: Option<ClusterId>) -> Result<(), Error> {
    if let Some(meant) = cluster.filter(|meant| *meant != done.map.cluster) {
        let text = format!("the map is of cluster {}, not of {meant}; check the addresses", done.map.cluster);
        return Err(Error::refused(RefusalCode::WrongCluster, text));
    }
    done.map.check().map_err(|why| Error::unavailable(format!("the map that was sent is not sound: {why}")))
}

/// The first map that one of `links` gives; otherwise the most telling of their failures.
pub(crate) async fn first_map<'a>(
    links: impl Iterator<Item = &'a Link>,
    deadline: Instant,
) -> Result<(MapDone, Limits), CallError> {
    let mut worst: Option<CallError> = None;
    for link in links {
        match question::<MapDone>(link, Kind::Map, deadline).await {
            Ok(found) => return Ok(found),
            Err(error) => {
                // What somebody answered tells more than that another could not be reached.
                if worst.as_ref().is_none_or(|worst| matches!(worst, CallError::Link(LinkError::NotSent(_)))) {
                    worst = Some(error);
                }
            }
        }
    }
    Err(worst.unwrap_or_else(|| Failure::unknown("nobody to ask").into()))
}

/// Asks something that has no body, and says what the one who answers holds senders to.
pub(crate) async fn question<T: serde::de::DeserializeOwned>(
    link: &Link,
    kind: Kind,
    deadline: Instant,
) -> Result<(T, Limits), CallError> {
    let up_by = deadline.min(Instant::now() + CONNECT_TIME_MAX);
    let welcome = link.connected(up_by).await.inspect_err(|_| link.retry_now())?;
    let frame = Frame::new(Header::new(kind), Bytes::new(), Bytes::new());
    let now = Instant::now();
    let answer = call::attempt(link, frame, now, call::try_until(deadline, now)).await?;
    let head = codec::decode(&answer.head).map_err(|error| Failure::unknown(error.to_string()))?;
    Ok((head, welcome.limits))
}
