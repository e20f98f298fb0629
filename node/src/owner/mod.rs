//! An owner: the one task that drives some of the node's shards. Everybody else holds its mailbox.
//!
//! Each round takes all mail, lets every shard that has something to do propose and put out, and then hands the log one
//! write and each peer one frame for all shards together. It never waits for a disk: the log's writer and the flusher
//! have threads of their own and answer by mail.

#![expect(clippy::disallowed_methods, reason = "a shell: starts tasks that stream snapshots")]

mod change;
mod flush;
mod pace;
pub mod reads;
pub mod shard;

pub use reads::{Barrier, Reads};
pub use shard::{Shard, Waiter, WriteJob};

use crate::claim::Claim;
use crate::flusher::{After, Job};
use crate::log::writer::Ticket;
use crate::log::{Mark, ShardWrite};
use crate::machine::Ledger;
use crate::memtable::Table;
use crate::replica::{Outgoing, Output, TICK};
use crate::shared::Shared;
use crate::snapshot::{self, Staged};
use crate::store::{Base, ReplicaMeta};
use crate::table::View;
use crate::{resolve, txn};
use bytes::Bytes;
use pace::Pace;
use shkv_proto::message::{ChangeReplicas, Failure, RaftMessage, ReplicaStatus, TxnId};
use shkv_proto::{NodeId, ReplicaId, ShardId};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::{mpsc, oneshot};

/// Letters that may wait for an owner; a sender waits beyond.
pub const MAILBOX: usize = 4096;
/// Letters taken in one round.
const ROUND_MAX: usize = 512;
/// How often a round is put off for letters that are about to come.
const GATHER_TURNS_MAX: usize = 4;
/// How long writes are held back before it is looked again whether there is room for their rows.
const PACE: Duration = Duration::from_millis(2);
/// How long a stopping node waits for a shard to be taken over by another.
const HANDOVER_TIME_MAX: Duration = Duration::from_millis(1500);

/// Where the answer to a balancer goes.
pub type Answer = oneshot::Sender<Result<(), Failure>>;

/// A letter to an owner.
pub enum Mail {
    /// Writes of clients, checked.
    Writes(Vec<(ShardId, WriteJob)>),
    /// A read that waits until it may look.
    Read(ShardId, Barrier),
    /// Messages of a peer, with the data of their entries.
    Raft(NodeId, Vec<(RaftMessage, Vec<Bytes>)>),
    /// Outputs that are durable.
    Synced(Vec<Ticket>),
    /// This owner's tables that are in redb.
    Flushed(Vec<(ReplicaMeta, ShardId, Base)>),
    /// What a flush, of this owner or another, changes for other shards. Comes behind [`Mail::Flushed`].
    FlushedAny(After),
    /// A snapshot's rows are beside the shard's own.
    Staged(Box<Staged>),
    /// A snapshot's rows are in place.
    Installed(ShardId, Box<ReplicaMeta>, Base),
    /// How the sending of a snapshot ended.
    SnapshotSent(ShardId, ReplicaId, bool),
    /// A new replica, already in redb, and whether it stands for election at once.
    Adopt(Box<Shard>, bool),
    /// A replica is deleted: drop it, and say so.
    Drop(ShardId, ReplicaId, oneshot::Sender<()>),
    /// Give the leadership away.
    Transfer(ShardId, ReplicaId, Answer),
    /// Take a step from one set of replicas to the next.
    Change(ShardId, ChangeReplicas, Answer),
    /// What is there to say of the replicas?
    Status(oneshot::Sender<(Vec<ReplicaStatus>, u64)>),
    /// Give all leaderships away, flush, and end.
    Stop(oneshot::Sender<()>),
}

/// Sends an owner a letter from a thread that may block. An owner that has ended needs no mail.
#[cfg_attr(feature = "sim", expect(clippy::disallowed_methods, reason = "a simulation has no threads that may block"))]
pub fn post(owner: &mpsc::Sender<Mail>, mail: Mail) {
    #[cfg(feature = "sim")]
    if shkv_proto::world::is_simulated() {
        if let Err(mpsc::error::TrySendError::Full(mail)) = owner.try_send(mail) {
            let owner = owner.clone();
            tokio::spawn(async move { owner.send(mail).await });
        }
        return;
    }
    let _ = owner.blocking_send(mail);
}

/// A snapshot on its way into its place.
struct Install {
    output: Output,
    _claim: Claim,
}

/// An owner.
pub struct Owner {
    shared: Arc<Shared>,
    me: usize,
    shards: BTreeMap<u32, Shard>,
    dirty: Vec<u32>,
    staged: BTreeMap<u32, (Box<ReplicaMeta>, Bytes, Claim)>,
    installs: BTreeMap<u32, Install>,
    /// Snapshots being sent, with the index that the log must keep what follows of.
    sending: BTreeMap<(u32, ReplicaId), u64>,
    tokens: u64,
    /// Bytes of rows in memory, active and sealed.
    active_bytes: usize,
    sealed_bytes: usize,
    /// Bytes of entries applied since the owner began.
    applied_bytes: u64,
    /// The shards with rows that are not in redb, with their [`Shard::unflushed_since`], in its order. Others may be among them.
    unflushed: VecDeque<(u32, u64)>,
    flushing: bool,
    /// How fast writes may come during a flush.
    pace: Pace,
    /// Shards of which a snapshot is wanted that is newer than what redb holds.
    flush_wanted: BTreeSet<u32>,
    /// Frames of clients that had come when the last write was handed to the log.
    frames_seen: u64,
    /// The last of the log's writes that brought proposals, until it is durable. What comes meanwhile shares the next write,
    /// whichever shards it is for.
    proposed: Option<Ticket>,
    /// The shards with writes that wait for that, or for room.
    held: Vec<u32>,
}

impl Owner {
    /// An owner of these shards.
    #[must_use]
    pub fn new(shared: Arc<Shared>, me: usize, shards: Vec<Shard>) -> Self {
        let mut owner = Self {
            shared,
            me,
            shards: BTreeMap::new(),
            dirty: Vec::new(),
            staged: BTreeMap::new(),
            installs: BTreeMap::new(),
            sending: BTreeMap::new(),
            tokens: 0,
            active_bytes: 0,
            sealed_bytes: 0,
            applied_bytes: 0,
            unflushed: VecDeque::new(),
            flushing: false,
            pace: Pace::default(),
            flush_wanted: BTreeSet::new(),
            frames_seen: 0,
            proposed: None,
            held: Vec::new(),
        };
        for shard in shards {
            owner.adopt(shard, false);
        }
        owner
    }

    /// Works until it is told to stop.
    pub async fn run(mut self, mut mailbox: mpsc::Receiver<Mail>) {
        let mut ticks = tokio::time::interval(TICK);
        // Never two ticks closer together than one tick: a follower's promise is counted in them.
        ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut mails = Vec::with_capacity(ROUND_MAX);
        let mut stopping: Option<Stopping> = None;
        loop {
            tokio::select! { // every arm is cancel-safe: recv_many and tick take nothing when they lose
                biased;
                _ = ticks.tick(), if !self.shards.is_empty() => self.tick(),
                () = async { tokio::time::sleep(PACE).await }, if self.proposed.is_none() && !self.held.is_empty() => {}
                count = mailbox.recv_many(&mut mails, ROUND_MAX) => {
                    if count == 0 {
                        return;
                    }
                    // Sessions that are about to write do so first: their writes then share the round.
                    for _ in 0..GATHER_TURNS_MAX {
                        tokio::task::yield_now().await;
                        let before = mails.len();
                        while mails.len() < ROUND_MAX && let Ok(mail) = mailbox.try_recv() {
                            mails.push(mail);
                        }
                        if mails.len() == before {
                            break;
                        }
                    }
                }
            }
            for mail in mails.drain(..) {
                if let Mail::Stop(done) = mail {
                    self.hand_all_over();
                    let until = self.shared.clock.now() + HANDOVER_TIME_MAX.as_nanos() as u64;
                    stopping = Some(Stopping { done, until, flushed_before: None });
                } else {
                    self.handle(mail);
                }
            }
            if self.round(mailbox.is_empty()) {
                self.round(false);
            }
            if let Some(now) = stopping.take() {
                match self.stop_further(now) {
                    Some(further) => stopping = Some(further),
                    None => return,
                }
            }
        }
    }

    /// Most shards have nothing to do at most ticks: those are not looked at further.
    fn tick(&mut self) {
        let now = self.shared.clock.now();
        for (number, shard) in &mut self.shards {
            if shard.tick(now) && !shard.dirty {
                shard.dirty = true;
                self.dirty.push(*number);
            }
        }
    }

    fn touch(&mut self, number: u32) {
        if let Some(shard) = self.shards.get_mut(&number)
            && !shard.dirty
        {
            shard.dirty = true;
            self.dirty.push(number);
        }
    }

    fn handle(&mut self, mail: Mail) {
        match mail {
            Mail::Writes(jobs) => {
                for (shard, mut job) in jobs {
                    match self.shards.get_mut(&shard.0) {
                        Some(shard) => shard.take(job),
                        None => job.waiter.failed(&Failure::WrongShard { epoch: self.shared.epoch() }),
                    }
                    self.touch(shard.0);
                }
            }
            Mail::Read(shard, barrier) => {
                match self.shards.get_mut(&shard.0) {
                    Some(shard) if shard.replica.leads() => shard.reads.add(barrier),
                    Some(shard) => drop(barrier.send(Err(shard.not_leader()))),
                    None => drop(barrier.send(Err(Failure::WrongShard { epoch: self.shared.epoch() }))),
                }
                self.touch(shard.0);
            }
            Mail::Raft(from, messages) => self.step(from, messages),
            Mail::Synced(tickets) => self.synced(tickets),
            Mail::Flushed(flushed) => self.flushed(flushed),
            Mail::FlushedAny(after) => self.flushed_any(after),
            Mail::Staged(staged) => self.staged(*staged),
            Mail::Installed(shard, meta, base) => self.installed(shard, *meta, base),
            Mail::SnapshotSent(shard, to, ok) => {
                self.sending.remove(&(shard.0, to));
                if let Some(shard) = self.shards.get_mut(&shard.0) {
                    shard.replica.snapshot_sent(to, ok);
                }
                self.touch(shard.0);
            }
            Mail::Adopt(shard, campaign) => self.adopt(*shard, campaign),
            Mail::Drop(shard, replica, done) => {
                self.drop_replica(shard, replica);
                let _ = done.send(()); // whoever asked may be gone
            }
            Mail::Transfer(shard, to, done) => {
                let _ = done.send(self.transfer(shard, to)); // whoever asked may be gone
                self.touch(shard.0);
            }
            Mail::Change(shard, step, done) => {
                self.change(shard, step, done);
                self.touch(shard.0);
            }
            Mail::Status(answer) => {
                let bytes = self.memory_bytes() as u64;
                let _ = answer.send((self.shards.values_mut().map(change::status_of).collect(), bytes)); // whoever asked may be gone
            }
            Mail::Stop(_) => {} // the loop takes it out before
        }
    }

    fn adopt(&mut self, mut shard: Shard, eager: bool) {
        let number = shard.cell.shard.0;
        shard.eager = eager;
        shard.dirty = false;
        self.shared.show(shard.cell.clone());
        self.shards.insert(number, shard);
        self.touch(number);
    }

    fn step(&mut self, from: NodeId, messages: Vec<(RaftMessage, Vec<Bytes>)>) {
        let now = self.shared.clock.now();
        // Followers that cannot flush as fast as the leader sends take no more: the leader sends it again later.
        let over = self.memory_bytes() > 2 * self.shared.table_bytes_per_owner();
        for (message, data) in messages {
            let number = message.shard.0;
            let Some(shard) = self.shards.get_mut(&number) else { continue };
            if message.to != shard.replica.id() || (over && !message.entries.is_empty()) {
                continue;
            }
            // A snapshot counts only behind its rows, which come on a connection of their own.
            if message.snapshot.is_some() || !shard.replica.can_take(&message) {
                tracing::warn!(shard = number, from = %message.from, "a Raft message that no replica of the group can have sent");
                continue;
            }
            shard.heard_from(message.from, from);
            if let Some((from, stamp)) = shard.replica.step(&message, data, now)
                && stamp <= now
            {
                #[cfg(feature = "sim")]
                let stamp = crate::inspect::lease_stamp(stamp, now);
                shard.lease.acknowledged(message.term, from, stamp);
            }
            self.touch(number);
        }
    }

    /// Whether nobody but the sender of what is about to be written waits for this thread: one entry, and of clients one
    /// frame since the last.
    fn is_at_rest(&mut self, tickets: &[Ticket]) -> bool {
        let frames = self.shared.client_frames();
        let before = std::mem::replace(&mut self.frames_seen, frames);
        tickets.len() == 1 && frames - before <= 1
    }

    /// Lets every shard that has something to do go on, as far as it can without waiting for others. With `may_sync`, and if
    /// nobody waits, a write is synced here instead of on the log's thread, and `true` says that more can go on now.
    fn round(&mut self, may_sync: bool) -> bool {
        let now = self.shared.clock.now();
        let may_propose = self.proposed.is_none() && self.has_room();
        if may_propose {
            self.let_go_on();
        }
        let mut round = Round {
            now,
            may_propose,
            applied_bytes: self.applied_bytes,
            recent_bytes_max: self.shared.recent_bytes_per_owner() / self.shards.len().max(1),
            ..Round::default()
        };
        for number in std::mem::take(&mut self.dirty) {
            let Some(shard) = self.shards.get_mut(&number) else { continue };
            shard.dirty = false;
            if let Err(error) = shard.go_on(&mut self.tokens, &mut round) {
                self.shared.fail(&format!("shard {number}: {error}"));
                return false;
            }
            if shard.replica.wants_flush() {
                self.flush_wanted.insert(number);
            }
            #[cfg(feature = "sim")]
            crate::inspect::look(&self.shared, shard);
        }
        self.active_bytes = self.active_bytes.saturating_add_signed(round.table_growth);
        self.applied_bytes = round.applied_bytes;
        self.unflushed.extend(round.unflushed);
        self.held.append(&mut round.held);
        // Followers first: their way to their disks is longer than ours to this one, and nothing here waits for ours.
        self.send(round.messages);
        let mut synced = None;
        if !round.tickets.is_empty() {
            let last = round.tickets.last().copied();
            if self.is_at_rest(&round.tickets) && may_sync {
                synced = self.shared.log.write_here(round.writes, round.tickets);
            } else {
                self.shared.log.submit(round.writes, round.tickets);
            }
            if round.has_proposed && synced.is_none() {
                self.proposed = last;
            }
        }
        for (number, output) in round.installs {
            self.install(number, output);
        }
        for (shard, txn) in round.old_locks {
            tokio::spawn(resolve::resolve(self.shared.clone(), shard, txn));
        }
        for (txn, others) in round.decided {
            tokio::spawn(txn::finish_decided(self.shared.clone(), txn, others));
        }
        self.flush_if_due();
        let goes_on = synced.is_some();
        self.synced(synced.unwrap_or_default());
        goes_on
    }

    /// Outputs are durable.
    fn synced(&mut self, tickets: Vec<Ticket>) {
        if self.proposed.is_some_and(|proposed| tickets.contains(&proposed)) {
            self.proposed = None;
        }
        for (number, output) in tickets {
            if let Some(shard) = self.shards.get_mut(&number) {
                shard.persisted = shard.persisted.max(output);
            }
            self.touch(number);
        }
    }

    /// Lets shards with writes that were held back propose them.
    fn let_go_on(&mut self) {
        for number in std::mem::take(&mut self.held) {
            if let Some(shard) = self.shards.get_mut(&number) {
                shard.held_back = false;
            }
            self.touch(number);
        }
    }

    /// Whether more rows may come into memory.
    fn has_room(&self) -> bool {
        let bytes_max = if self.flushing { self.pace.bytes_max() } else { self.shared.table_bytes_per_owner() };
        self.active_bytes <= bytes_max
    }

    fn memory_bytes(&self) -> usize {
        self.active_bytes + self.sealed_bytes
    }

    /// Sends what goes to one node in one frame.
    fn send(&mut self, messages: Vec<Outgoing>) {
        let mut by_node: BTreeMap<NodeId, Vec<Outgoing>> = BTreeMap::new();
        for message in messages {
            let Some(shard) = self.shards.get(&message.head.shard.0) else { continue };
            let Some(node) = shard.home(message.head.to) else { continue };
            if message.head.snapshot.is_some() {
                self.send_snapshot(message.head, node);
            } else {
                by_node.entry(node).or_default().push(message);
            }
        }
        for (node, messages) in by_node {
            let receivers: Vec<_> = messages.iter().map(|message| (message.head.shard.0, message.head.to)).collect();
            if self.shared.peers.tell(node, messages) {
                continue;
            }
            for (number, to) in receivers {
                if let Some(shard) = self.shards.get_mut(&number) {
                    shard.replica.unreachable(to); // it is probed from now on instead of being sent everything
                }
            }
        }
    }

    fn send_snapshot(&mut self, message: RaftMessage, node: NodeId) {
        let Some(shard) = self.shards.get_mut(&message.shard.0) else { return };
        let to = message.to;
        let snapshot = {
            let view = shard.cell.view.read();
            (shard.flushed_meta.clone(), view.base.clone())
        };
        let addr = self.shared.peers.addr(node);
        let (Some(addr), Some(head)) = (addr, &message.snapshot) else {
            return shard.replica.snapshot_sent(to, false);
        };
        // The rows that are held must be those that the message speaks of.
        if snapshot.0.applied() != (Mark { index: head.index, term: head.term }) {
            return shard.replica.snapshot_sent(to, false);
        }
        #[cfg(feature = "sim")]
        crate::inspect::reached(crate::inspect::Point::SnapshotOffered);
        self.sending.insert((message.shard.0, to), head.index);
        let (shared, me) = (self.shared.clone(), self.me);
        tokio::spawn(async move {
            let shard = message.shard;
            let result = snapshot::send(&shared, &addr, node, message, snapshot.0, snapshot.1).await;
            if let Err(error) = &result {
                tracing::warn!(shard = shard.0, %node, "a snapshot was not sent: {error}");
            }
            shared.mail(me, Mail::SnapshotSent(shard, to, result.is_ok())).await;
        });
    }

    /// Lets a replica take a snapshot in whose rows lie beside its own.
    fn staged(&mut self, staged: Staged) {
        let Staged { message, meta, ledger, from, claim } = staged;
        let number = message.shard.0;
        let now = self.shared.clock.now();
        if let Some(shard) = self.shards.get_mut(&number)
            && !shard.installing
            && claim.holds()
            && message.to == shard.replica.id()
            && shard.replica.can_take(&message)
        {
            shard.heard_from(message.from, from);
            self.staged.insert(number, (Box::new(meta), ledger, claim));
            shard.replica.step(&message, vec![], now);
            self.touch(number);
            self.round(false); // the replica takes the snapshot now or never
            self.staged.remove(&number);
        }
    }

    fn install(&mut self, number: u32, output: Output) {
        let (Some(shard), Some(head)) = (self.shards.get_mut(&number), &output.snapshot) else { return };
        match self.staged.remove(&number) {
            Some((mut meta, ledger, claim)) if meta.state.index == head.index && meta.state.term == head.term => {
                meta.state = head.clone();
                meta.replica = shard.replica.id();
                let home = (meta.replica, self.shared.identity.id());
                if !meta.homes.contains(&home) {
                    meta.homes.push(home);
                }
                shard.installing = true;
                shard.unflushed_since = None; // what is in memory is no more once the snapshot is in its place
                #[cfg(feature = "sim")]
                if crate::inspect::planted(crate::inspect::Bug::FlushOverSnapshot) {
                    shard.unflushed_since = Some(self.applied_bytes);
                    self.flush_wanted.insert(number);
                }
                shard.forget_flights("a snapshot took the place of the log");
                self.installs.insert(number, Install { output, _claim: claim });
                self.shared.flusher.submit(Job::Install { shard: ShardId(number), meta, ledger, owner: self.me });
            }
            _ => self.shared.fail(&format!("shard {number}: a snapshot without its rows")),
        }
    }

    fn installed(&mut self, id: ShardId, meta: ReplicaMeta, base: Base) {
        let Some(Install { output, _claim }) = self.installs.remove(&id.0) else { return };
        let Some(shard) = self.shards.get_mut(&id.0).filter(|shard| shard.replica.id() == meta.replica) else { return };
        let ledger = match Ledger::decode(base.ledger()) {
            Ok(ledger) => ledger,
            Err(error) => return self.shared.fail(&format!("shard {id}: {error}")),
        };
        shard.ledger_replaced(&ledger);
        {
            let mut view = shard.cell.view.write();
            self.active_bytes = self.active_bytes.saturating_sub(view.active.bytes());
            let (applied, revision) = (meta.applied(), meta.revision);
            *view = View { active: Table::default(), sealed: None, base, revision, applied, ledger };
        }
        tracing::info!(shard = id.0, index = meta.state.index, "a snapshot was taken in");
        #[cfg(feature = "sim")]
        crate::inspect::reached(crate::inspect::Point::SnapshotTaken);
        shard.flushed = meta.state.index;
        shard.flushed_meta = meta.clone();
        shard.meta = meta;
        shard.installing = false;
        shard.snapshots_installed += 1;
        let mut round = Round::default();
        shard.write_out(output, &mut round);
        self.shared.log.submit(round.writes, round.tickets);
        self.touch(id.0);
    }

    fn hand_all_over(&mut self) {
        for shard in self.shards.values_mut().filter(|shard| shard.replica.leads()) {
            if let Some(to) = shard.replica.heir() {
                shard.transfer_to(to);
            }
        }
        let all: Vec<u32> = self.shards.keys().copied().collect();
        all.into_iter().for_each(|number| self.touch(number));
    }

    /// Goes on with a stop: first nobody may be led from here, then everything applied goes to redb.
    fn stop_further(&mut self, mut stopping: Stopping) -> Option<Stopping> {
        let leads = self.shards.values().any(|shard| shard.replica.leads() && shard.meta.state.voters.len() > 1);
        let in_hand = self.shards.values().any(Shard::is_busy);
        if (leads || in_hand) && self.shared.clock.now() < stopping.until {
            return Some(stopping);
        }
        if self.flushing || !self.installs.is_empty() {
            return Some(stopping);
        }
        let before = *stopping.flushed_before.get_or_insert(self.applied_bytes);
        if self.longest_unflushed().is_some_and(|(_, since)| since <= before) && self.flush() {
            return Some(stopping);
        }
        let _ = stopping.done.send(()); // whoever asked may be gone
        None
    }
}

/// What the shards of a round want done.
#[derive(Default)]
pub struct Round {
    /// When it began.
    pub now: u64,
    /// Whether writes may be proposed. Not while as many rows as may be wait to be flushed, nor while the last proposals are
    /// on their way to the disk.
    pub may_propose: bool,
    /// Bytes of recent entries that a shard keeps in memory for followers.
    pub recent_bytes_max: usize,
    /// Whether any were.
    pub has_proposed: bool,
    /// Shards with writes that may be proposed later.
    pub held: Vec<u32>,
    /// To be written to the log.
    pub writes: Vec<ShardWrite>,
    /// Whom to tell when it is.
    pub tickets: Vec<Ticket>,
    /// To be sent.
    pub messages: Vec<Outgoing>,
    /// Snapshots to put in place.
    pub installs: Vec<(u32, Output)>,
    /// Bytes that the tables in memory grew by.
    pub table_growth: isize,
    /// Bytes of entries that the owner has applied.
    pub applied_bytes: u64,
    /// The shards that got their first rows since a flush, with their [`Shard::unflushed_since`].
    pub unflushed: Vec<(u32, u64)>,
    /// Transactions that have held locks of a shard for long.
    pub old_locks: Vec<(ShardId, TxnId)>,
    /// Transactions that were decided before, with the other shards that must hear of it.
    pub decided: Vec<(TxnId, Vec<ShardId>)>,
}

/// A stop under way.
struct Stopping {
    done: oneshot::Sender<()>,
    until: u64,
    /// What was applied until so many bytes of entries is flushed.
    flushed_before: Option<u64>,
}
