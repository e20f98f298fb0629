//! What the parts of a node share: who it is, its cells, and the doors to its owners, log, flusher and peers.

use crate::Tuning;
use crate::cell::Cell;
use crate::claim::Purpose;
use crate::clock::Clock;
use crate::flusher::Flusher;
use crate::identity::Identity;
use crate::log::writer::LogWriter;
use crate::owner::Mail;
use crate::peers::Peers;
use crate::space::Space;
use crate::steps::Steps;
use parking_lot::{Mutex, RwLock};
use shkv_proto::message::{Failure, NodeStatus, TxnId};
use shkv_proto::route::Routes;
use shkv_proto::{ClusterId, Epoch, Map, ReplicaId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};
use tokio_util::sync::CancellationToken;

/// Bytes of recent entries that a node keeps in memory for followers that are behind, beside those not yet durable or applied.
/// Older ones are read from the log.
const RECENT_BYTES_MAX: usize = 32 << 20;

/// The claims on shards' replicas, by shard, and the number of the last claim.
#[derive(Debug, Default)]
pub struct Claims {
    /// Which claims there are.
    pub held: BTreeMap<u32, (u64, Purpose)>,
    /// The last one's number.
    pub last: u64,
}

/// What the parts of a node share.
pub struct Shared {
    /// Who it is.
    pub identity: Identity,
    /// Its budgets.
    pub tuning: Tuning,
    /// Its clock.
    pub clock: Clock,
    /// Its log.
    pub log: LogWriter,
    /// Its flusher.
    pub flusher: Flusher,
    /// Its disk.
    pub space: Arc<Space>,
    /// The other nodes.
    pub peers: Peers,
    /// Named points of transactions at which a test may end it.
    pub steps: Steps,
    /// Cancelled when the node stops.
    pub stop: CancellationToken,
    /// Cancelled when the cluster wants the node no more: it then serves nobody.
    pub retired: CancellationToken,
    /// Who works on which shard's replica.
    pub claims: Mutex<Claims>,
    /// Transactions that this node coordinates and that may still be decided.
    pub txns: Mutex<BTreeSet<TxnId>>,
    /// Counts them.
    txn_numbers: AtomicU64,
    /// Counts the frames that were not another node's Raft messages.
    client_frames: AtomicU64,
    /// When a balancer was last heard, in nanoseconds of the node's clock.
    beat_at: AtomicU64,
    /// What a simulation sees of the replicas.
    #[cfg(feature = "sim")]
    pub looks: Mutex<BTreeMap<u32, crate::inspect::ReplicaLook>>,
    owners: Vec<mpsc::Sender<Mail>>,
    cells: RwLock<BTreeMap<u32, Arc<Cell>>>,
    routes: RwLock<Option<Arc<Routes>>>,
}

impl Shared {
    /// Puts the parts together.
    #[expect(clippy::too_many_arguments, reason = "each is a part of its own, and this is called in one place")]
    pub fn new(
        identity: Identity,
        tuning: Tuning,
        clock: Clock,
        log: LogWriter,
        flusher: Flusher,
        space: Arc<Space>,
        peers: Peers,
        owners: Vec<mpsc::Sender<Mail>>,
        steps: Steps,
    ) -> Self {
        Self {
            identity,
            tuning,
            clock,
            log,
            flusher,
            space,
            peers,
            steps,
            stop: CancellationToken::new(),
            retired: CancellationToken::new(),
            claims: Mutex::default(),
            txns: Mutex::default(),
            txn_numbers: AtomicU64::new(1),
            client_frames: AtomicU64::new(0),
            beat_at: AtomicU64::new(0),
            #[cfg(feature = "sim")]
            looks: Mutex::default(),
            owners,
            cells: RwLock::default(),
            routes: RwLock::default(),
        }
    }

    /// Makes a replica visible to sessions.
    pub fn show(&self, cell: Arc<Cell>) {
        self.cells.write().insert(cell.shard.0, cell);
    }

    /// Hides a replica from sessions. Another one of the shard stays.
    pub fn hide(&self, shard: ShardId, replica: ReplicaId) {
        let mut cells = self.cells.write();
        if cells.get(&shard.0).is_some_and(|cell| cell.replica == replica) {
            cells.remove(&shard.0);
        }
    }

    /// The replica of a shard.
    pub fn cell(&self, shard: ShardId) -> Option<Arc<Cell>> {
        self.cells.read().get(&shard.0).cloned()
    }

    /// The number of the owner that drives a shard.
    pub fn owner_of(&self, shard: ShardId) -> usize {
        shard.0 as usize % self.owners.len()
    }

    /// The share of the budget for rows in memory that one owner has.
    pub fn table_bytes_per_owner(&self) -> usize {
        self.tuning.table_bytes / self.owners.len()
    }

    /// Bytes of entries that an owner applies before the first of them is in redb.
    #[must_use]
    pub fn log_bytes_per_owner(&self) -> u64 {
        self.tuning.log_retain_bytes / self.owners.len() as u64
    }

    /// The share of [`RECENT_BYTES_MAX`] that one owner has.
    pub fn recent_bytes_per_owner(&self) -> usize {
        RECENT_BYTES_MAX / self.owners.len()
    }

    /// Sends an owner a letter, waiting while its mailbox is full.
    pub async fn mail(&self, owner: usize, mail: Mail) {
        if let Some(owner) = self.owners.get(owner) {
            let _ = owner.send(mail).await; // an owner that has ended needs no mail
        }
    }

    /// Sends an owner a letter, or drops it when the mailbox is full.
    pub fn try_mail(&self, owner: usize, mail: Mail) {
        if let Some(owner) = self.owners.get(owner) {
            let _ = owner.try_send(mail); // only for mail that the sender will repeat
        }
    }

    /// The cluster.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.identity.cluster()
    }

    /// The map as last heard, with who leads as far as this node has seen.
    pub fn routes(&self) -> Option<Arc<Routes>> {
        self.routes.read().clone()
    }

    /// A number for a transaction: none is given twice by this process.
    pub fn txn_number(&self) -> u64 {
        self.txn_numbers.fetch_add(1, Ordering::Relaxed)
    }

    /// So many more frames have come that are not Raft messages.
    pub fn count_client_frames(&self, more: u64) {
        self.client_frames.fetch_add(more, Ordering::Relaxed);
    }

    /// How many have.
    pub fn client_frames(&self) -> u64 {
        self.client_frames.load(Ordering::Relaxed)
    }

    /// The age of the map.
    pub fn epoch(&self) -> Epoch {
        self.routes.read().as_ref().map_or(Epoch::NONE, |routes| routes.map().epoch)
    }

    /// Takes a newer map in.
    pub fn set_map(&self, map: Map) {
        let mut ours = self.routes.write();
        let is_newer = ours.as_ref().is_none_or(|ours| ours.map().epoch < map.epoch);
        #[cfg(feature = "sim")]
        let is_newer = is_newer || crate::inspect::planted(crate::inspect::Bug::StaleMap);
        if is_newer {
            *ours = Some(Arc::new(Routes::new(map, ours.as_deref())));
        }
    }

    /// A balancer was heard.
    pub fn beat_came(&self) {
        self.beat_at.store(self.clock.now(), Ordering::Relaxed);
    }

    /// How long no balancer was heard; a node that has just started counts as one that heard it then.
    pub fn beat_age(&self) -> Duration {
        Duration::from_nanos(self.clock.now().saturating_sub(self.beat_at.load(Ordering::Relaxed)))
    }

    /// The cluster wants the node no more: it remembers that, serves nobody from then on, and ends.
    ///
    /// # Errors
    /// When it cannot be written down; nothing has changed then.
    pub fn retire(&self, reason: &str) -> Result<(), Failure> {
        // Durable before it is obeyed: a node that forgot it would come back and serve.
        self.identity.retire(reason)?;
        self.retired.cancel();
        let cluster = self.cluster().map_or_else(String::new, |cluster| cluster.to_string());
        self.fail(&format!("the node was removed from, or replaced in, cluster {cluster}: {reason}"));
        Ok(())
    }

    /// Ends the node, with the reason.
    pub fn fail(&self, reason: &str) {
        (self.space.fail)(reason.to_owned());
    }

    /// What there is to say of the node.
    pub async fn status(&self) -> NodeStatus {
        let mut replicas = Vec::new();
        let mut table_bytes = 0;
        for owner in 0..self.owners.len() {
            let (answer, answered) = oneshot::channel();
            self.mail(owner, Mail::Status(answer)).await;
            if let Ok((more, bytes)) = answered.await {
                replicas.extend(more);
                table_bytes += bytes;
            }
        }
        replicas.sort_by_key(|replica| replica.shard);
        let (process, cpu_us) = shkv_proto::world::process();
        NodeStatus {
            id: self.identity.id(),
            name: self.identity.name().to_owned(),
            cluster: self.cluster(),
            process,
            cpu_us,
            epoch: self.epoch(),
            table_bytes,
            log_bytes: self.space.log.bytes(),
            disk_free_bytes: self.space.last_free_bytes(),
            disk_full: self.space.is_full() || self.log.no_space(),
            log_syncs: self.log.syncs(),
            replicas,
        }
    }
}
