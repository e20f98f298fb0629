//! Starting and stopping a node: opens what is on the disk, starts the threads, listens.

#![expect(clippy::disallowed_methods, reason = "a shell: starts the node's threads and tasks")]

use crate::admin::open_shard;
use crate::clock::Clock;
use crate::flusher::Flusher;
use crate::ground::{Folder, Ground};
use crate::identity::Identity;
use crate::join::{Registration, keep_registered};
use crate::log::writer::{LogWriter, Ticket};
use crate::log::{Log, ShardWrite};
use crate::owner::{MAILBOX, Mail, Owner, post};
use crate::peers::Peers;
use crate::shared::Shared;
use crate::space::{Space, fail_once};
use crate::store::Store;
use crate::{NodeConfig, StartError, Tuning, session};
use shkv_proto::limits::Limits;
use shkv_proto::message::{Failure, RefusalCode, Role, Welcome};
use shkv_proto::session::accept;
use shkv_proto::world;
use shkv_proto::world::net::{StdListener, TcpListener, TcpStream};
use shkv_proto::{ClusterId, NodeId, ShardId};
use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Handle;
use tokio::sync::{Semaphore, mpsc, oneshot, watch};
use tokio_util::task::TaskTracker;

/// Threads beside an owner's that read what may block: large pages, counts, snapshots. Each takes memory and a share of the processors;
/// what comes beyond waits for one of them.
const READERS_MAX: usize = 16;
/// Connections at the same time.
const CONNECTIONS_MAX: usize = 4096;
/// How often the disk's free space is looked at.
const DISK_LOOK_EVERY: Duration = Duration::from_secs(1);
/// How long a stop waits for connections to end.
const STOP_TIME_MAX: Duration = Duration::from_secs(10);

/// A running node. Dropping it without [`Node::stop`] ends it like a crash would: nothing acknowledged is lost.
pub struct Node {
    shared: Arc<Shared>,
    addr: SocketAddr,
    failed: watch::Receiver<Option<String>>,
    tracker: TaskTracker,
    threads: Vec<Thread>,
}

/// One of the node's threads: a runtime of its own, ended by the sender.
struct Thread {
    end: Option<oneshot::Sender<()>>,
    handle: Handle,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl std::fmt::Debug for Node {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Node").field("id", &self.id()).field("addr", &self.addr).finish_non_exhaustive()
    }
}

impl Thread {
    fn start(number: usize) -> std::io::Result<Self> {
        if world::is_simulated() {
            return Ok(Self { end: None, handle: Handle::current(), thread: None });
        }
        let mut runtime = tokio::runtime::Builder::new_current_thread();
        let runtime = runtime.max_blocking_threads(READERS_MAX).enable_all().build()?;
        let handle = runtime.handle().clone();
        let (end, ended) = oneshot::channel::<()>();
        let run = move || {
            let _ = runtime.block_on(ended); // ends when it is told to, or when the node is dropped
            runtime.shutdown_timeout(Duration::from_millis(100));
        };
        let thread = std::thread::Builder::new().name(format!("owner-{number}")).spawn(run)?;
        Ok(Self { end: Some(end), handle, thread: Some(thread) })
    }
}

impl Node {
    /// Opens the data directory and starts to listen. A fresh node waits for a balancer to give it replicas.
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        let folder = Arc::new(Folder(config.data.clone()));
        Self::start_on(folder, config).await
    }

    /// Like [`Node::start`], on ground that need not be a folder of the system.
    ///
    /// # Errors
    /// [`StartError`]; nothing runs then.
    pub async fn start_on(ground: Arc<dyn Ground>, config: NodeConfig) -> Result<Self, StartError> {
        let listener = TcpListener::bind(&config.listen).await;
        let listener = listener.map_err(|error| StartError::Listen { addr: config.listen.clone(), error })?;
        let addr = listener.local_addr().map_err(|error| StartError::Listen { addr: config.listen.clone(), error })?;
        let registration = registration(&config, addr)?;
        let mut threads = Vec::new();
        for number in 0..config.tuning.threads.max(1) {
            threads.push(Thread::start(number).map_err(StartError::Thread)?);
        }
        let handles = threads.iter().map(|thread| thread.handle.clone()).collect::<Vec<_>>();
        let open = {
            let handles = handles.clone();
            move || open(&ground, &config, &handles)
        };
        let (shared, failed) =
            world::blocking(open).await.map_err(|error| StartError::Thread(std::io::Error::other(error)))??;
        let tracker = TaskTracker::new();
        let std_listener = listener.into_std().map_err(StartError::Thread)?;
        let listening = listen(shared.clone(), std_listener, handles.clone(), tracker.clone());
        handles[0].spawn(tracker.track_future(listening));
        let watching = shared.clone();
        handles[0].spawn(async move {
            let mut every = tokio::time::interval(DISK_LOOK_EVERY);
            loop {
                every.tick().await;
                watching.space.look();
            }
        });
        if !registration.balancers.is_empty() {
            handles[0].spawn(tracker.track_future(keep_registered(shared.clone(), registration)));
        }
        tracing::info!(node = %shared.identity.id(), name = shared.identity.name(), %addr, "the node listens");
        Ok(Self { shared, addr, failed, tracker, threads })
    }

    /// A look at what no client sees.
    #[cfg(feature = "sim")]
    #[must_use]
    pub fn inspector(&self) -> crate::inspect::Inspector {
        crate::inspect::Inspector::new(&self.shared)
    }

    /// Its identity.
    #[must_use]
    pub fn id(&self) -> NodeId {
        self.shared.identity.id()
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    /// Its cluster, if it is in one.
    #[must_use]
    pub fn cluster(&self) -> Option<ClusterId> {
        self.shared.cluster()
    }

    /// Resolves when the node cannot go on, with the reason. Drop it then and start it again: the log recovers it. One that
    /// its cluster wants no more does not start again, and says so.
    pub async fn failed(&self) -> String {
        let mut failed = self.failed.clone();
        let reason = failed.wait_for(Option::is_some).await.map(|reason| reason.clone().unwrap_or_default());
        match reason {
            Ok(reason) => reason,
            Err(_) => std::future::pending().await,
        }
    }

    /// Gives its leaderships away, finishes what is in hand, flushes, and ends.
    pub async fn stop(mut self) {
        let shared = self.shared.clone();
        let mut stopped = Vec::new();
        for owner in 0..self.threads.len() {
            let (done, answered) = oneshot::channel();
            shared.mail(owner, Mail::Stop(done)).await;
            stopped.push(answered);
        }
        shared.space.stop();
        for answered in stopped {
            let _ = tokio::time::timeout(STOP_TIME_MAX, answered).await; // a node that has failed does not flush
        }
        shared.stop.cancel();
        self.tracker.close();
        let _ = tokio::time::timeout(STOP_TIME_MAX, self.tracker.wait()).await; // what is cut off counts as unknown
        let threads = std::mem::take(&mut self.threads);
        let end = move || {
            shared.flusher.stop();
            shared.log.stop();
            end_threads(threads);
        };
        let _ = world::blocking(end).await; // it has nothing to tell
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        self.shared.stop.cancel();
        self.shared.space.stop();
        let threads = std::mem::take(&mut self.threads);
        if threads.is_empty() {
            return; // stopped in good order
        }
        for mut thread in threads {
            drop(thread.end.take());
        }
        if world::is_simulated() {
            return; // its tasks end with their runtime
        }
        let shared = self.shared.clone();
        let _ = std::thread::Builder::new().name("node-end".into()).spawn(move || {
            shared.log.stop();
            shared.flusher.stop();
        });
    }
}

/// What the node says of itself when it joins.
fn registration(config: &NodeConfig, listens: SocketAddr) -> Result<Registration, StartError> {
    let addr = config.advertise.clone().unwrap_or_else(|| listens.to_string());
    let is_whole = |addr: &str| {
        let port = addr.rsplit_once(':').filter(|(host, _)| !host.is_empty());
        port.and_then(|(_, port)| port.parse::<u16>().ok()).is_some_and(|port| port != 0)
    };
    let nowhere = config.advertise.is_none() && listens.ip().is_unspecified();
    let told = [Some(&addr), config.advertise_outside.as_ref()];
    if !config.join.is_empty()
        && let Some(bad) = told.into_iter().flatten().find(|addr| nowhere || !is_whole(addr))
    {
        return Err(StartError::Advertise { addr: bad.clone() });
    }
    Ok(Registration {
        balancers: config.join.clone(),
        addr,
        addr_outside: config.advertise_outside.clone(),
        domain: config.domain.clone(),
        capacity: config.capacity,
        instance: config.instance.clone(),
    })
}

fn end_threads(threads: Vec<Thread>) {
    for mut thread in threads {
        drop(thread.end.take());
        if let Some(thread) = thread.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Opens what is on the disk and starts everything but the listener.
fn open(
    ground: &Arc<dyn Ground>,
    config: &NodeConfig,
    handles: &[Handle],
) -> Result<(Arc<Shared>, watch::Receiver<Option<String>>), StartError> {
    let NodeConfig { name, data, tuning, .. } = config;
    let tuning: Tuning = *tuning;
    let identity = Identity::open(ground.clone(), name)?;
    let store_error = |text: String| StartError::Store { data: data.clone(), text };
    let log_error = |error| StartError::Log { data: data.clone(), error };
    let at = |what: &'static str| move |error| StartError::Data { data: data.clone(), what, error };
    let disk = ground.log().map_err(at("cannot be written to"))?;
    let (store, replicas) =
        Store::open(&*ground.rows(), tuning.cache_bytes).map_err(|error| store_error(error.to_string()))?;
    // The names of what was just made are durable before anything in them is acknowledged.
    ground.sync_names().map_err(at("cannot be synced"))?;
    let (log, mut recovered) = Log::open(disk, identity.id(), tuning.log_segment_bytes).map_err(log_error)?;
    // The log of a replica is begun before the replica is made.
    if log.is_new() && !replicas.is_empty() {
        return Err(StartError::LogMissing(data.clone()));
    }
    // The crash came while a replica was deleted: what the log has of it is not for the next one.
    let orphans = recovered.keys().filter(|shard| !replicas.contains_key(shard));
    let forget: Vec<_> = orphans.map(|shard| ShardWrite::forget(*shard)).collect();
    log.append(&forget).map_err(log_error)?;
    let log = Arc::new(log);
    let mut bases = BTreeMap::new();
    for shard in replicas.keys() {
        bases.insert(*shard, store.base(ShardId(*shard)).map_err(|error| store_error(error.to_string()))?);
    }
    let (reason, failed) = watch::channel(None);
    let space = Arc::new(Space::new(ground.clone(), log.clone(), &tuning, fail_once(reason.clone())));
    space.look();
    let (mailboxes, owners): (Vec<_>, Vec<_>) = handles.iter().map(|_| mpsc::channel::<Mail>(MAILBOX)).unzip();
    let (mailboxes, owners): (Vec<mpsc::Sender<Mail>>, Vec<mpsc::Receiver<Mail>>) = (mailboxes, owners);
    let synced = {
        let owners = mailboxes.clone();
        move |tickets: Vec<Ticket>| {
            let mut by_owner: Vec<Vec<Ticket>> = vec![vec![]; owners.len()];
            for ticket in tickets {
                by_owner[ticket.0 as usize % owners.len()].push(ticket);
            }
            for (owner, tickets) in owners.iter().zip(by_owner).filter(|(_, tickets)| !tickets.is_empty()) {
                post(owner, Mail::Synced(tickets));
            }
        }
    };
    let writer = LogWriter::start(log, Box::new(synced), fail_once(reason)).map_err(StartError::Thread)?;
    let flushed = replicas.iter().map(|(shard, meta)| (*shard, meta.state.index)).collect();
    let flusher = Flusher::start(store, space.clone(), mailboxes.clone(), flushed).map_err(StartError::Thread)?;
    let peers = Peers::new(identity.id(), identity.cluster());
    let shared = Arc::new(Shared::new(
        identity,
        tuning,
        Clock::start(),
        writer,
        flusher,
        space,
        peers,
        mailboxes,
        config.steps.clone(),
    ));
    let mut shards: Vec<Vec<_>> = handles.iter().map(|_| Vec::new()).collect();
    for ((shard, meta), base) in replicas.into_iter().zip(bases.into_values()) {
        let log = recovered.remove(&shard).unwrap_or_default();
        let owner = shared.owner_of(ShardId(shard));
        shards[owner].push(open_shard(&shared, ShardId(shard), meta, base, log).map_err(store_error)?);
    }
    for (number, ((mailbox, shards), handle)) in owners.into_iter().zip(shards).zip(handles).enumerate() {
        let shared = shared.clone();
        let owner = handle.spawn(Owner::new(shared.clone(), number, shards).run(mailbox));
        // Raft stops a replica that finds a promise broken; a node without its owner must not look alive.
        handle.spawn(async move {
            if owner.await.is_err_and(|error| error.is_panic()) {
                shared.fail("a shard's replica found its state broken and gave up; see the message above");
            }
        });
    }
    Ok((shared, failed))
}

async fn listen(shared: Arc<Shared>, listener: StdListener, handles: Vec<Handle>, tracker: TaskTracker) {
    let listener = match TcpListener::from_std(listener) {
        Ok(listener) => listener,
        Err(error) => return shared.fail(&format!("cannot listen: {error}")),
    };
    let connections = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut next = 0;
    loop {
        let Ok(permit) = connections.clone().acquire_owned().await else { return };
        let accepted = tokio::select! { // both arms are cancel-safe
            biased;
            () = shared.stop.cancelled() => return,
            accepted = listener.accept() => accepted,
        };
        let stream = match accepted {
            Ok((stream, _)) => stream,
            Err(error) => {
                tracing::warn!("a connection could not be accepted: {error}");
                tokio::time::sleep(Duration::from_millis(50)).await; // out of file descriptors, most likely
                continue;
            }
        };
        next = (next + 1) % handles.len();
        let shared = shared.clone();
        let here = next == 0;
        let work = async move {
            let stream = if here { Ok(stream) } else { stream.into_std().and_then(TcpStream::from_std) };
            if let Ok(stream) = stream {
                serve(shared, stream).await;
            }
            drop(permit);
        };
        handles[next].spawn(tracker.track_future(work));
    }
}

async fn serve(shared: Arc<Shared>, stream: TcpStream) {
    let welcome = {
        let shared = shared.clone();
        move |hello: &shkv_proto::message::Hello| {
            if let Some(reason) = shared.identity.retired() {
                let text = format!("this node was removed from, or replaced in, its cluster: {reason}");
                return Err(Failure::refusal(RefusalCode::Retired, text));
            }
            let version = hello.version_in_common()?;
            hello.check_cluster(shared.cluster())?;
            Ok(Welcome {
                version,
                cluster: shared.cluster(),
                role: Role::Node(shared.identity.id()),
                name: shared.identity.name().to_owned(),
                limits: Limits::OURS,
            })
        }
    };
    match accept(stream, welcome).await {
        Ok(session) => session::serve(shared, session).await,
        Err(error) => tracing::debug!("a handshake failed: {error}"),
    }
}
