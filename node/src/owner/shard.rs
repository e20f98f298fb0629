//! One shard as its owner drives it: writes that wait, writes in flight, reads that wait, and the replica.

use super::change::Asked;
use super::{Reads, Round};
use crate::cell::Cell;
use crate::lease::Lease;
use crate::log::{Hard, LogEntry, Mark, ShardWrite};
use crate::machine::{self, BadEntry, Done, Group, Ledger, Locked, NotDone, Place, WriteKind};
use crate::replica::change::Configured;
use crate::replica::{Outgoing, Output, Replica, ReplicaError, is_member};
use crate::reply::Reply;
use crate::steps::{Step, crash_at};
use crate::store::ReplicaMeta;
use bytes::Bytes;
use shkv_proto::limits::{GROUP_BYTES_MAX, REPLICAS_MAX};
use shkv_proto::message::{Failure, TxnId};
use shkv_proto::{NodeId, ReplicaId};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use tokio::sync::oneshot;

/// Bytes of writes that may wait for one shard; beyond, more are refused as busy.
const QUEUED_BYTES_MAX: usize = 16 << 20;
/// Log entries of one shard that may be in flight before the next is held back to become larger.
const ENTRIES_IN_FLIGHT: usize = 1;

/// What is told to a write whose lock was not let go in time.
const LOCKED_TEXT: &str = "a transaction held a key until the deadline";

/// Replicas outside of the applied configuration whose nodes are kept in mind.
const LEARNED_MAX: usize = 2 * REPLICAS_MAX as usize;

/// How old a lock gets, in nanoseconds, before it is asked what became of its transaction.
const LOCK_AGE_MAX: u64 = 1_000_000_000;
/// How old, if somebody waits for it.
const LOCK_AGE_WANTED: u64 = 200_000_000;
/// After how long it is asked again, in nanoseconds.
const RESOLVE_AGAIN: u64 = 500_000_000;

/// A write that waits.
#[derive(Debug)]
pub struct WriteJob {
    /// Which.
    pub kind: WriteKind,
    /// Its head, checked.
    pub head: Bytes,
    /// Its values.
    pub tail: Bytes,
    /// Who waits, and until when in nanoseconds of the node's clock.
    pub waiter: Waiter,
}

/// Where the answer to a write goes.
#[derive(Debug)]
pub enum Asker {
    /// To another process.
    Away(Reply),
    /// To a task of this one.
    Here(oneshot::Sender<Result<Done, Failure>>),
}

/// Who waits for a write.
#[derive(Debug)]
pub struct Waiter {
    /// Where the answer goes; taken when it is given.
    pub asker: Option<Asker>,
    /// When it must have been given.
    pub deadline: u64,
}

impl Waiter {
    /// Another process waits.
    pub fn away(reply: Reply, deadline: u64) -> Self {
        Self { asker: Some(Asker::Away(reply)), deadline }
    }

    /// A task of this process waits.
    pub fn here(asker: oneshot::Sender<Result<Done, Failure>>, deadline: u64) -> Self {
        Self { asker: Some(Asker::Here(asker)), deadline }
    }

    fn answer(&mut self, answer: Result<Done, Failure>) {
        match (self.asker.take(), answer) {
            (None, _) => {}
            (Some(Asker::Here(asker)), answer) => drop(asker.send(answer)), // whoever asked may be gone
            (Some(Asker::Away(reply)), Err(failure)) => reply.failed(&failure),
            (Some(Asker::Away(reply)), Ok(done)) => match done {
                Done::Write(done) => reply.done(&done),
                Done::Batch(done, values, _) => reply.done_with(&done, values),
                Done::Prepare(done, values) => reply.done_with(&done, values),
                Done::Finish(done) => reply.done(&done),
                Done::LetGo => reply.done(&()),
            },
        }
    }

    /// Answers that it was not done, or is not known.
    pub fn failed(&mut self, failure: &Failure) {
        self.answer(Err(failure.clone()));
    }
}

/// A write that met a lock, and waits until that is let go.
#[derive(Debug)]
struct Parked {
    by: TxnId,
    job: WriteJob,
}

/// A lock that is kept an eye on.
#[derive(Clone, Copy, Debug)]
struct Watched {
    /// Since when.
    since: u64,
    /// When it was last asked what became of its transaction; 0 is never.
    asked: u64,
}

/// A log entry in flight with those who wait for its writes, in their order.
#[derive(Debug)]
struct Flight {
    mark: Mark,
    waiters: Vec<Waiter>,
    /// When it was proposed, for the judges of a simulation.
    #[cfg(feature = "sim")]
    moment: u64,
}

/// A shard.
pub struct Shard {
    /// What sessions see.
    pub cell: Arc<Cell>,
    /// Its part in the group.
    pub replica: Replica,
    /// As of the last applied entry.
    pub meta: ReplicaMeta,
    /// As of what redb holds.
    pub flushed_meta: ReplicaMeta,
    /// The last index that redb holds.
    pub flushed: u64,
    /// How many bytes of entries the owner had applied before the first one here that is neither in redb nor on its way there.
    /// `None` also while a snapshot is being put in place.
    pub unflushed_since: Option<u64>,
    /// Its lease, while it leads.
    pub lease: Lease,
    /// Messages that wait for the write of an output to be durable, by the output's number.
    held: VecDeque<(u64, Vec<Outgoing>)>,
    /// The last output.
    last_output: u64,
    /// The last output that wrote something.
    written: u64,
    /// A commit index that goes with the next write: it need not be synced for itself.
    lazy_hard: Option<Hard>,
    /// The term in which the leadership was offered away. Whoever takes it, however late, does not wait for a lease.
    no_lease_term: u64,
    /// The index of a snapshot whose place in the log is not yet durable.
    snapshot_index: Option<u64>,
    /// The last output that is durable.
    pub persisted: u64,
    /// Whether a snapshot is being put in place: the replica rests.
    pub installing: bool,
    /// Snapshots taken in.
    pub snapshots_installed: u64,
    /// Reads that wait.
    pub reads: Reads,
    /// A change of the group's replicas that waits.
    pub asked: Option<Asked>,
    /// Whether it stands for election until somebody leads: the other replicas of a new group may not be there yet. Asking
    /// for votes in advance (pre-vote) makes that harmless.
    pub eager: bool,
    /// Where replicas were last heard from that the applied configuration does not know: those that were added by entries
    /// that are not applied here yet, and those that were removed. Not kept over a restart.
    learned: VecDeque<(ReplicaId, NodeId)>,
    /// Whether it is in the owner's list of shards to look at.
    pub dirty: bool,
    /// Whether it is in the owner's list of shards with writes that are held back.
    pub held_back: bool,
    queue: VecDeque<WriteJob>,
    queued_bytes: usize,
    flights: VecDeque<Flight>,
    /// Writes that have met a lock. Their bytes count as queued.
    parked: Vec<Parked>,
    /// While it leads: the transactions that hold locks.
    watched: BTreeMap<TxnId, Watched>,
    /// Whether anything is locked.
    has_locks: bool,
    /// Whether there were decisions after the last entry.
    had_decisions: bool,
    /// How the log's time follows from this node's clock in a term: the term, the log's time and the clock's.
    anchor: (u64, u64, u64),
    /// The term in which it was last looked for decisions that nobody sees to.
    recovered_term: u64,
}

impl Shard {
    /// A shard at rest.
    pub fn new(cell: Arc<Cell>, replica: Replica, meta: ReplicaMeta) -> Self {
        let (has_locks, had_decisions) = {
            let ledger = &cell.view.read().ledger;
            (!ledger.locks.is_empty(), !ledger.decisions.is_empty())
        };
        Self {
            cell,
            replica,
            flushed: meta.state.index,
            unflushed_since: None,
            flushed_meta: meta.clone(),
            meta,
            lease: Lease::default(),
            held: VecDeque::new(),
            last_output: 0,
            written: 0,
            lazy_hard: None,
            snapshot_index: None,
            no_lease_term: 0,
            persisted: 0,
            installing: false,
            snapshots_installed: 0,
            reads: Reads::default(),
            asked: None,
            eager: false,
            learned: VecDeque::new(),
            dirty: true,
            held_back: false,
            queue: VecDeque::new(),
            queued_bytes: 0,
            flights: VecDeque::new(),
            parked: Vec::new(),
            watched: BTreeMap::new(),
            has_locks,
            had_decisions,
            anchor: (0, 0, 0),
            recovered_term: 0,
        }
    }

    /// The node that keeps a replica.
    pub fn home(&self, replica: ReplicaId) -> Option<NodeId> {
        self.meta.homes.iter().chain(&self.learned).find(|(id, _)| *id == replica).map(|(_, node)| *node)
    }

    /// A replica was heard from a node. A leader whose addition is not applied here yet must be answered, or it could never
    /// tell of it.
    pub fn heard_from(&mut self, replica: ReplicaId, node: NodeId) {
        if self.home(replica) == Some(node) || self.meta.homes.iter().any(|(id, _)| *id == replica) {
            return;
        }
        self.learned.retain(|(id, _)| *id != replica);
        if self.learned.len() >= LEARNED_MAX {
            self.learned.pop_front();
        }
        self.learned.push_back((replica, node));
    }

    /// One tick of time. Tells whether there is anything to go on with.
    pub fn tick(&mut self, now: u64) -> bool {
        let ready = self.replica.tick();
        self.eager &= self.replica.leader().is_none();
        if self.eager {
            self.replica.campaign();
        }
        let waits = self.is_busy();
        if waits {
            self.expire(now);
        }
        ready || self.eager || waits || self.has_locks || !self.reads.is_empty() || self.asked.is_some()
    }

    /// The refusal of whoever does not lead.
    pub fn not_leader(&self) -> Failure {
        Failure::NotLeader {
            hint: self.replica.leader().filter(|id| *id != self.replica.id()).and_then(|id| self.home(id)),
        }
    }

    /// Goes on as far as it can without waiting.
    ///
    /// # Errors
    /// [`ApplyError`]: the node must stop.
    pub fn go_on(&mut self, tokens: &mut u64, round: &mut Round) -> Result<(), ApplyError> {
        if self.installing {
            return Ok(());
        }
        self.take_persisted(round);
        if !self.replica.leads() {
            self.refuse_queue();
            self.reads.fail(&self.not_leader());
        }
        self.reads.ask(&mut self.replica, tokens, round.now);
        self.go_on_with_change(round.now);
        if !round.may_propose && !self.queue.is_empty() && !self.held_back {
            self.held_back = true;
            round.held.push(self.cell.shard.0);
        }
        loop {
            if self.replica.leads() && round.may_propose {
                self.propose(round);
            }
            let Some(mut output) = self.replica.output(round.now) else { break };
            round.messages.append(&mut output.messages);
            if output.snapshot.is_some() {
                round.installs.push((self.cell.shard.0, output));
                return Ok(());
            }
            let committed = std::mem::take(&mut output.committed);
            let reads = std::mem::take(&mut output.reads);
            self.write_out(output, round);
            self.apply(&committed, round)?;
            self.reads.confirm(&reads);
            self.reads.applied(self.meta.state.index);
        }
        self.show(round);
        self.watch_locks(round);
        Ok(())
    }

    /// Looks for locks that are held for too long.
    fn watch_locks(&mut self, round: &mut Round) {
        if self.cell.term().is_none() || !self.has_locks {
            self.watched.clear();
            return;
        }
        let wanted = self.cell.take_lock_wanted() || !self.parked.is_empty();
        let view = self.cell.view.read();
        self.watched.retain(|txn, _| view.ledger.locks.is_held_by(txn));
        for txn in view.ledger.locks.holders() {
            let watched = self.watched.entry(*txn).or_insert(Watched { since: round.now, asked: 0 });
            let age_max = if wanted { LOCK_AGE_WANTED } else { LOCK_AGE_MAX };
            if round.now - watched.since >= age_max && round.now - watched.asked >= RESOLVE_AGAIN.min(age_max) {
                watched.asked = round.now;
                round.old_locks.push((self.cell.shard, *txn));
            }
        }
    }

    /// What was durable when the round began lets Raft go on and lets go the messages that waited for it.
    fn take_persisted(&mut self, round: &mut Round) {
        while self.held.front().is_some_and(|(written, _)| *written <= self.persisted) {
            round.messages.extend(self.held.pop_front().map(|(_, held)| held).unwrap_or_default());
        }
        if self.last_output == 0 {
            return;
        }
        // Outputs that wrote nothing are as durable as the last one before them that did.
        let durable = if self.persisted >= self.written { self.last_output } else { self.persisted };
        self.replica.persisted(durable);
        if self.persisted >= self.written
            && let Some(index) = self.snapshot_index.take()
        {
            self.replica.applied_to(index, round.recent_bytes_max);
        }
    }

    /// Hands an output's write to the round, and holds back the messages that must not leave before it is durable.
    pub fn write_out(&mut self, output: Output, round: &mut Round) {
        self.last_output = output.number;
        #[cfg(feature = "sim")]
        let output = crate::inspect::spoiled(output);
        if let Some(snapshot) = &output.snapshot {
            self.snapshot_index = Some(snapshot.index);
        }
        match output.write {
            Some(write) if output.must_sync => {
                let hard = write.hard.or(self.lazy_hard.take());
                self.lazy_hard = None;
                round.writes.push(ShardWrite { hard, ..write });
                round.tickets.push((self.cell.shard.0, output.number));
                self.written = output.number;
            }
            Some(write) => self.lazy_hard = write.hard.or(self.lazy_hard),
            None => {}
        }
        let may_leave = self.written <= self.persisted;
        #[cfg(feature = "sim")]
        let may_leave = may_leave || crate::inspect::planted(crate::inspect::Bug::FollowerAcksEarly);
        if may_leave {
            round.messages.extend(output.after_write);
            self.replica.persisted(output.number);
        } else if !output.after_write.is_empty() {
            self.held.push_back((self.written, output.after_write));
        }
    }

    /// Publishes what sessions look at.
    fn show(&mut self, round: &mut Round) {
        let now = round.now;
        let leads = self.replica.leads();
        // Until an entry of this term is applied, writes that an earlier leader acknowledged may be missing here.
        let is_current = self.meta.state.term == self.replica.term() && self.snapshot_index.is_none();
        let until = if leads && is_current && self.no_lease_term != self.replica.term() {
            self.lease.until(self.replica.term(), self.replica.id(), &self.meta.state, now)
        } else {
            0
        };
        self.cell.set_lease(until);
        self.cell.set_term(if leads && is_current { self.replica.term() } else { 0 });
        if leads && is_current && self.recovered_term != self.replica.term() {
            self.recovered_term = self.replica.term();
            let view = self.cell.view.read();
            let decided = view.ledger.decisions.iter();
            round.decided.extend(decided.map(|(txn, decision)| (*txn, decision.others.clone())));
        }
        let leader = self.replica.leader().and_then(|id| self.home(id));
        self.cell.set_leader(leader);
        self.cell.set_of_group(self.replica.is_of_group());
    }

    /// Offers the leadership to another replica.
    pub fn transfer_to(&mut self, to: ReplicaId) {
        #[cfg(feature = "sim")]
        crate::inspect::reached(crate::inspect::Point::LeadershipOffered);
        self.no_lease_term = self.replica.term();
        self.cell.set_lease(0);
        self.replica.transfer_to(to);
    }

    /// Whether a client waits for a write.
    pub fn is_busy(&self) -> bool {
        !self.queue.is_empty() || !self.flights.is_empty() || !self.parked.is_empty()
    }

    /// Takes a write in, or answers why not.
    pub fn take(&mut self, mut job: WriteJob) {
        if !self.replica.leads() || self.replica.is_handing_over() {
            return job.waiter.failed(&self.not_leader());
        }
        if self.queued_bytes > QUEUED_BYTES_MAX {
            return job
                .waiter
                .failed(&Failure::Busy { retry_after_ms: 50, text: "too many writes wait for this shard".into() });
        }
        self.queued_bytes += job.head.len() + job.tail.len();
        self.queue.push_back(job);
    }

    /// The log's own time. Never ahead of the time that has passed: a write that is sent again then looks older than it is
    /// remembered for, but never younger.
    fn log_time(&mut self, now: u64) -> u64 {
        if self.anchor.0 != self.replica.term() {
            self.anchor = (self.replica.term(), self.cell.view.read().ledger.time, now);
        }
        let (_, time, then) = self.anchor;
        time + now.saturating_sub(then) / 1_000_000
    }

    /// Proposes what waits: everything that came while an entry was in flight becomes the next one.
    fn propose(&mut self, round: &mut Round) {
        while !self.queue.is_empty() && self.flights.len() < ENTRIES_IN_FLIGHT {
            let mut group = Group::new(self.log_time(round.now));
            let mut waiters = Vec::with_capacity(self.queue.len().min(1024));
            while let Some(job) = self.queue.front() {
                let bytes = job.head.len() + job.tail.len();
                if !waiters.is_empty() && group.bytes() + bytes > GROUP_BYTES_MAX {
                    break;
                }
                group.add(job.kind, &job.head, &job.tail);
                self.queued_bytes -= bytes;
                waiters.extend(self.queue.pop_front().map(|job| job.waiter));
            }
            match self.replica.propose(group.finish()) {
                Some(mark) => {
                    round.has_proposed = true;
                    self.flights.push_back(Flight {
                        mark,
                        waiters,
                        #[cfg(feature = "sim")]
                        moment: crate::inspect::moment(),
                    });
                }
                None => {
                    let failure = if self.replica.leads() {
                        Failure::Busy { retry_after_ms: 50, text: "the shard's replicas do not keep up".into() }
                    } else {
                        self.not_leader()
                    };
                    waiters.iter_mut().for_each(|waiter| waiter.failed(&failure));
                }
            }
        }
    }

    /// Answers the writes that were never proposed, after the leadership is lost: certainly not done.
    fn refuse_queue(&mut self) {
        if self.queue.is_empty() && self.parked.is_empty() {
            return;
        }
        let failure = self.not_leader();
        self.queued_bytes = 0;
        for mut job in self.queue.drain(..).chain(self.parked.drain(..).map(|parked| parked.job)) {
            job.waiter.failed(&failure);
        }
    }

    /// Answers whoever has waited too long. A write that was proposed may still be done.
    fn expire(&mut self, now: u64) {
        for flight in &mut self.flights {
            for waiter in flight.waiters.iter_mut().filter(|waiter| waiter.deadline <= now) {
                waiter.failed(&Failure::unknown("proposed, but not committed before the deadline"));
            }
        }
        let queued_bytes = &mut self.queued_bytes;
        self.queue.retain_mut(|job| {
            let waits = job.waiter.deadline > now;
            if !waits {
                *queued_bytes -= job.head.len() + job.tail.len();
                job.waiter.failed(&Failure::Busy {
                    retry_after_ms: 50,
                    text: "the write's turn did not come before its deadline".into(),
                });
            }
            waits
        });
        self.parked.retain_mut(|Parked { job, .. }| {
            let waits = job.waiter.deadline > now;
            if !waits {
                *queued_bytes -= job.head.len() + job.tail.len();
                job.waiter.failed(&Failure::Busy { retry_after_ms: 50, text: LOCKED_TEXT.into() });
            }
            waits
        });
    }

    /// A snapshot brought another ledger.
    pub fn ledger_replaced(&mut self, ledger: &Ledger) {
        self.has_locks = !ledger.locks.is_empty();
        self.had_decisions = !ledger.decisions.is_empty();
        self.watched.clear();
        self.cell.unlocked.notify_waiters();
    }

    /// Lets a write wait that has met a lock.
    fn park(&mut self, locked: Locked, waiter: Waiter) {
        let Locked { by, kind, head, tail } = locked;
        if waiter.asker.is_some() {
            self.queued_bytes += head.len() + tail.len();
            self.parked.push(Parked { by, job: WriteJob { kind, head, tail, waiter } });
        }
    }

    /// Takes up the writes that waited for a lock which is gone, before those that came later.
    fn unpark(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let view = self.cell.view.read();
        let (stay, go) = self.parked.drain(..).partition(|parked| view.ledger.locks.is_held_by(&parked.by));
        self.parked = stay;
        let go: Vec<Parked> = go;
        for parked in go.into_iter().rev() {
            self.queue.push_front(parked.job);
        }
    }

    /// Applies committed entries and answers those who wait for them.
    fn apply(&mut self, entries: &[LogEntry], round: &mut Round) -> Result<(), ApplyError> {
        let Some(last) = entries.last() else { return Ok(()) };
        if self.unflushed_since.is_none() {
            self.unflushed_since = Some(round.applied_bytes);
            round.unflushed.push((self.cell.shard.0, round.applied_bytes));
        }
        let mut answers = Vec::new();
        for entry in entries {
            #[cfg(feature = "sim")]
            crate::inspect::applied(self.cell.shard, self.replica.id().0, entry);
            let waiters = self.waiters_of(entry);
            if entry.kind == 0 {
                if !entry.data.is_empty() {
                    let place = Place { shard: self.cell.shard, term: entry.term };
                    let mut view = self.cell.view.write();
                    let before = view.active.bytes();
                    machine::apply(&entry.data, place, &mut view, waiters.as_ref().map(|_| &mut answers))?;
                    round.table_growth += view.active.bytes() as isize - before as isize;
                    round.applied_bytes += entry.data.len() as u64;
                    view.applied = Mark { index: entry.index, term: entry.term };
                    let had_any = self.has_locks || self.had_decisions;
                    self.has_locks = !view.ledger.locks.is_empty();
                    self.had_decisions = !view.ledger.decisions.is_empty();
                    drop(view);
                    if had_any {
                        self.cell.unlocked.notify_waiters();
                    }
                }
            } else {
                self.configure(entry)?;
            }
            for (mut waiter, answer) in waiters.into_iter().flatten().zip(answers.drain(..)) {
                match answer {
                    Ok(done) => {
                        match done {
                            Done::Prepare(..) => crash_at(Step::PrepareDone),
                            Done::Finish(_) => crash_at(Step::FinishDone),
                            Done::Write(_) | Done::Batch(..) | Done::LetGo => {}
                        }
                        waiter.answer(Ok(done));
                    }
                    Err(NotDone::Failure(failure)) => waiter.answer(Err(failure)),
                    Err(NotDone::Locked(locked)) => self.park(*locked, waiter),
                }
            }
            self.unpark();
        }
        {
            let mut view = self.cell.view.write();
            view.applied = Mark { index: last.index, term: last.term };
            self.meta.revision = view.revision;
        }
        (self.meta.state.index, self.meta.state.term) = (last.index, last.term);
        self.replica.applied_to(last.index, round.recent_bytes_max);
        Ok(())
    }

    /// Applies a change of the group's configuration.
    fn configure(&mut self, entry: &LogEntry) -> Result<(), ApplyError> {
        let me = self.replica.id();
        let Configured { state, added } = self.replica.apply_configuration(entry)?;
        let mut homes = std::mem::take(&mut self.meta.homes);
        let mut gone = vec![];
        for (id, node) in added {
            if homes.iter().all(|(other, _)| *other != id) {
                homes.push((id, node));
            }
        }
        homes.retain(|home| {
            let stays = home.0 == me || is_member(&state, home.0);
            if !stays {
                gone.push(*home);
            }
            stays
        });
        self.meta.homes = homes;
        #[cfg(feature = "sim")]
        crate::inspect::configured(self.cell.shard, me, &self.meta.state, &state);
        // Those who were removed are told so while this round's messages go out, and heard if they ask for votes.
        gone.into_iter().for_each(|(id, node)| self.heard_from(id, node));
        if !is_member(&state, me) {
            if is_member(&self.meta.state, me) {
                tracing::info!(shard = self.cell.shard.0, replica = me.0, "the replica is no longer of its group");
            }
            self.forget_flights("the replica was removed from its group");
        }
        self.meta.state = state;
        Ok(())
    }

    /// The replica is deleted: whoever waits is answered. What was never proposed is certainly not done.
    pub fn give_up(&mut self, wrong: &Failure) {
        self.cell.set_lease(0);
        self.cell.set_of_group(false);
        for mut job in self.queue.drain(..).chain(self.parked.drain(..).map(|parked| parked.job)) {
            job.waiter.failed(wrong);
        }
        self.forget_flights("the replica was deleted");
        self.reads.fail(wrong);
        if let Some(asked) = self.asked.take() {
            asked.failed(wrong);
        }
    }

    /// Those who wait for the writes of an entry. Flights that the entry shows to be overwritten are answered: not done.
    fn waiters_of(&mut self, entry: &LogEntry) -> Option<Vec<Waiter>> {
        while self.flights.front().is_some_and(|flight| flight.mark.index <= entry.index) {
            let mut flight = self.flights.pop_front()?;
            if flight.mark == (Mark { index: entry.index, term: entry.term }) {
                #[cfg(feature = "sim")]
                crate::inspect::served(self.cell.shard, self.replica.id(), flight.moment, true);
                return Some(flight.waiters);
            }
            let failure = self.not_leader();
            flight.waiters.iter_mut().for_each(|waiter| waiter.failed(&failure));
        }
        None
    }

    /// What became of the entries in flight is not known here any more.
    pub fn forget_flights(&mut self, why: &str) {
        // What it says of transactions counts for its own term only as long as it knows what became of their decisions.
        self.cell.set_term(0);
        for mut flight in self.flights.drain(..) {
            let failure = Failure::unknown(why);
            flight.waiters.iter_mut().for_each(|waiter| waiter.failed(&failure));
        }
    }
}

/// An entry that cannot be applied.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError {
    /// Its data.
    #[error(transparent)]
    Entry(#[from] BadEntry),
    /// Its change of configuration.
    #[error(transparent)]
    Configuration(#[from] ReplicaError),
}
