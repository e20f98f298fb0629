//! What a simulation sees of a node that no client sees: what each replica takes itself for, its rows, and each entry as it
//! is applied. Also the faults that are planted in a node to show that the judges find them. No part of the program that
//! people run.

use crate::cell::Cell;
use crate::log::LogEntry;
use crate::owner::Shard;
use crate::page::{PageLimits, PageReader};
use crate::replica::{Output, is_member};
use crate::shared::Shared;
use crate::steps::Step;
use shkv_proto::message::{Consistency, Scan, SnapshotHead};
use shkv_proto::world::sim;
use shkv_proto::{Epoch, NodeId, ReplicaId, ShardId};
use std::sync::{Arc, Weak};
use std::time::Duration;

/// Said to the simulation when an entry is applied: this word, shard, replica, index, term, and a hash of the entry.
pub const APPLIED: u64 = 1;

/// Said when a replica was removed from its group: this word, shard, the removed replica, and who applied the removal.
pub const GONE: u64 = 2;
/// Said when a linearizable read or a write is answered: this word, shard, replica, the moment at which it began to be
/// handled, and whether it is a write.
pub const SERVED: u64 = 3;
/// Said at a [`Point`]: this word and the point.
pub const REACHED: u64 = 4;

/// One page in so many takes long, up to so many milliseconds.
const LONG_PAGE_OF: u64 = 8;
const LONG_PAGE_MS_MAX: u64 = 1_500;

/// What a replica takes itself for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ReplicaLook {
    /// The shard.
    pub shard: u32,
    /// The replica.
    pub replica: u64,
    /// Its term.
    pub term: u64,
    /// Whether it leads.
    pub leads: bool,
    /// The last index known to be committed.
    pub committed: u64,
    /// The last applied entry.
    pub applied: u64,
    /// Mutations so far.
    pub revision: u64,
    /// Whether it knows itself to be of its group.
    pub of_group: bool,
    /// Whether it would answer a read by itself.
    pub may_read: bool,
    /// Who votes in its group, as of the last applied entry.
    pub voters: Vec<u64>,
    /// Whether its group is between two configurations.
    pub is_joint: bool,
}

/// Looks at a node without keeping it alive.
#[derive(Clone)]
pub struct Inspector(Weak<Shared>);

/// All rows of a replica with their versions, and what they are of.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct RowsLook {
    /// The last applied entry.
    pub applied: u64,
    /// Mutations so far.
    pub revision: u64,
    /// Key, version and value.
    pub rows: Vec<(Vec<u8>, u64, Vec<u8>)>,
}

impl Inspector {
    pub(crate) fn new(shared: &Arc<Shared>) -> Self {
        Self(Arc::downgrade(shared))
    }

    /// The node, while it runs.
    #[must_use]
    pub fn node(&self) -> Option<NodeId> {
        self.0.upgrade().map(|shared| shared.identity.id())
    }

    /// The age of the map that it has.
    #[must_use]
    pub fn epoch(&self) -> Option<Epoch> {
        self.0.upgrade().map(|shared| shared.epoch())
    }

    /// What its replicas take themselves for. To be asked inside the node's runtime: it reads the clock, which a process that
    /// was frozen has not looked at for `behind`.
    #[must_use]
    pub fn replicas(&self, behind: Duration) -> Vec<ReplicaLook> {
        let Some(shared) = self.0.upgrade() else { return vec![] };
        let now = shared.clock.now() + behind.as_nanos() as u64;
        let looks = shared.looks.lock();
        let with_lease = |look: &ReplicaLook| {
            let cell = shared.cell(ShardId(look.shard))?;
            let may_read = match () {
                () if planted(Bug::DeposedLeaderReads) => cell.leader() == Some(shared.identity.id()),
                () => cell.lease_runs(now),
            };
            Some(ReplicaLook { may_read, ..look.clone() })
        };
        looks.values().filter_map(with_lease).collect()
    }

    /// The rows of a replica as they are now.
    #[must_use]
    pub fn rows(&self, shard: ShardId) -> Option<RowsLook> {
        let cell = self.0.upgrade()?.cell(shard)?;
        let everything = Scan {
            keyspace: cell.keyspace,
            start: vec![],
            end: None,
            reverse: false,
            keys_only: false,
            rows_max: 0,
            bytes_max: 0,
            consistency: Consistency::Eventual,
            with: vec![],
        };
        let limits = PageLimits { rows: usize::MAX / 4, bytes: usize::MAX / 4 };
        let (page, applied, revision) = {
            let view = cell.view.read();
            (PageReader::begin(&view, &everything, limits), view.applied.index, view.revision)
        };
        let page = page.read(&everything, limits).ok()?;
        let rows = page.iter().map(|(key, version, value)| (key.to_vec(), version, value.to_vec())).collect();
        Some(RowsLook { applied, revision, rows })
    }
}

/// Publishes what a replica takes itself for.
pub(crate) fn look(shared: &Shared, shard: &Shard) {
    if sim::here().is_none() {
        return;
    }
    let look = ReplicaLook {
        shard: shard.cell.shard.0,
        replica: shard.replica.id().0,
        term: shard.replica.term(),
        leads: shard.replica.leads(),
        committed: shard.replica.committed(),
        applied: shard.meta.state.index,
        revision: shard.meta.revision,
        of_group: shard.replica.is_of_group(),
        may_read: false,
        voters: shard.meta.state.voters.iter().map(|id| id.0).collect(),
        is_joint: !shard.meta.state.voters_outgoing.is_empty(),
    };
    shared.looks.lock().insert(look.shard, look);
}

/// Says that an entry is applied.
pub(crate) fn applied(shard: ShardId, replica: u64, entry: &LogEntry) {
    if let Some(host) = sim::here() {
        let hash = shkv_proto::hashing::frame_check(&entry.data);
        host.tell([APPLIED, u64::from(shard.0), replica, entry.index, entry.term, u64::from(hash)]);
    }
}

/// Says which replicas are no longer of their group. What a replica knows of their nodes is no measure: one that goes through
/// the log from its beginning knows nodes of those that are added later.
pub(crate) fn configured(shard: ShardId, by: ReplicaId, before: &SnapshotHead, after: &SnapshotHead) {
    let Some(host) = sim::here() else { return };
    let members = [&before.voters, &before.voters_outgoing, &before.learners, &before.learners_next];
    for removed in members.into_iter().flatten().filter(|id| !is_member(after, **id)) {
        host.tell([GONE, u64::from(shard.0), removed.0, by.0, 0, 0]);
    }
    reached(Point::Configured);
}

/// The moment, the same on all hosts.
pub(crate) fn moment() -> u64 {
    sim::here().map_or(0, |host| host.moment_ms())
}

/// Says that a read is answered that began to be handled at a moment, if it is linearizable.
pub(crate) fn served_read(cell: &Cell, consistency: Consistency, began: u64) {
    if consistency == Consistency::Linearizable {
        served(cell.shard, cell.replica, began, false);
    }
}

/// Says that something is answered that began to be handled at a moment.
pub(crate) fn served(shard: ShardId, replica: ReplicaId, began: u64, is_write: bool) {
    if let Some(host) = sim::here() {
        host.tell([SERVED, u64::from(shard.0), replica.0, began, u64::from(is_write), 0]);
    }
}

/// Says that the process is at a point. Tells whether it ends there.
pub(crate) fn reached(point: Point) -> bool {
    sim::here().is_some_and(|host| {
        host.tell([REACHED, point as u64, 0, 0, 0, 0]);
        host.reaches(point as u64)
    })
}

macro_rules! points {
    ($($name:ident = $text:literal,)*) => {
        /// A point of a node's work at which a simulation can end its process. Those of transactions are [`Step`]s.
        #[expect(missing_docs, reason = "their names in words are beside them")]
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u64)]
        pub enum Point { Nowhere = 0, $($name,)* }

        impl Point {
            /// All of them.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];

            /// In words.
            #[must_use]
            pub fn name(self) -> &'static str {
                match self { Self::Nowhere => "nowhere", $(Self::$name => $text,)* }
            }
        }
    };
}

points! {
    BeforePrepare = "transaction: before it is prepared",
    PrepareCame = "transaction: a prepare came",
    PrepareDone = "transaction: a prepare is applied",
    BeforeDecide = "transaction: before the decision",
    DecideProposed = "transaction: the decision is proposed",
    AfterDecide = "transaction: the decision is applied",
    FinishDone = "transaction: a finish is applied",
    BeforeLetGo = "transaction: before it is let go",
    AfterLetGo = "transaction: let go",
    FlushBegins = "flush: before it",
    FlushDone = "flush: after it",
    ReplicaMade = "replica: made on the disk",
    ReplicaDeleted = "replica: deleted from the disk",
    SnapshotOffered = "snapshot: about to be sent",
    SnapshotBegun = "snapshot: begins to come in",
    SnapshotRows = "snapshot: some of its rows are there",
    SnapshotWhole = "snapshot: put in the place of the rows",
    SnapshotTaken = "snapshot: its replica goes on with it",
    Configured = "group: another configuration is applied",
    LeadershipOffered = "group: the leadership is offered away",
}

impl From<Step> for Point {
    fn from(step: Step) -> Self {
        match step {
            Step::BeforePrepare => Self::BeforePrepare,
            Step::PrepareCame => Self::PrepareCame,
            Step::PrepareDone => Self::PrepareDone,
            Step::BeforeDecide => Self::BeforeDecide,
            Step::DecideProposed => Self::DecideProposed,
            Step::AfterDecide => Self::AfterDecide,
            Step::FinishDone => Self::FinishDone,
            Step::BeforeLetGo => Self::BeforeLetGo,
            Step::AfterLetGo => Self::AfterLetGo,
        }
    }
}

/// A fault that is planted on purpose.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u64)]
pub enum Bug {
    /// A write counts as durable before it is synced.
    AckBeforeSync = 1,
    /// A vote is sent without being kept.
    VoteForgotten,
    /// A leader answers by its lease without looking at the clock.
    LeaseWithoutClock,
    /// What redb holds is applied once more after a restart.
    AppliedTwice,
    /// An older map takes the place of a newer one.
    StaleMap,
    /// The log lets go of entries that redb does not hold yet.
    LogCutTooFar,
    /// A read is answered by whoever thinks to lead, without a round to the others.
    DeposedLeaderReads,
    /// The end of a write that was torn off is taken for whole.
    TornTail,
    /// The revision does not come back after a restart.
    RevisionLost,
    /// A failed sync is taken for a good one.
    SyncErrorIgnored,
    /// A follower says that it has entries before they are durable.
    FollowerAcksEarly,
    /// A flush forgets the rows that were removed.
    FlushKeepsRemoved,
    /// A sealed table is flushed although a snapshot has taken its place.
    FlushOverSnapshot,
    /// A page of several shards is told without looking at their leases.
    MergedWithoutLease,
    /// A snapshot leaves out its last row.
    SnapshotShort,
    /// A lease counts from when a promise came in, not from when it was asked for.
    LeaseFromAnswer,
    /// What was done by which id is forgotten with the process.
    SessionsLost,
    /// A transaction that is given up keeps its locks.
    LockLeft,
    /// A batch over several shards is done in the first of them only.
    HalfBatch,
    /// A replica that has forgotten its promises with its process votes at once.
    VoteAtOnce,
    /// A read counts if a lease runs behind it, whoever led when the rows were looked at.
    LeaseBehindLook,
}

impl Bug {
    /// All of them.
    pub const ALL: [Self; 21] = [
        Self::AckBeforeSync,
        Self::VoteForgotten,
        Self::LeaseWithoutClock,
        Self::AppliedTwice,
        Self::StaleMap,
        Self::LogCutTooFar,
        Self::DeposedLeaderReads,
        Self::TornTail,
        Self::RevisionLost,
        Self::SyncErrorIgnored,
        Self::FollowerAcksEarly,
        Self::FlushKeepsRemoved,
        Self::FlushOverSnapshot,
        Self::MergedWithoutLease,
        Self::SnapshotShort,
        Self::LeaseFromAnswer,
        Self::SessionsLost,
        Self::LockLeft,
        Self::HalfBatch,
        Self::VoteAtOnce,
        Self::LeaseBehindLook,
    ];
}

/// What [`Bug::VoteForgotten`] makes of an output: what is only a term or a vote is not written.
pub(crate) fn spoiled(mut output: Output) -> Output {
    if planted(Bug::VoteForgotten) && output.write.as_ref().is_some_and(|write| write.entries.is_empty()) {
        output.write = None;
    }
    output
}

/// A page is read on a thread of its own, and the processor may be elsewhere: some take long enough for another to lead meanwhile.
#[expect(clippy::disallowed_methods, reason = "it stands in for a thread that is slow")]
pub(crate) async fn page_was_read(shard: ShardId) {
    let Some(host) = sim::here() else { return };
    let drawn = host.fixed_draw(&[host.moment_ms(), u64::from(shard.0)]);
    if drawn.is_multiple_of(LONG_PAGE_OF) {
        tokio::time::sleep(Duration::from_millis(drawn / LONG_PAGE_OF % LONG_PAGE_MS_MAX)).await;
    }
}

/// What [`Bug::LeaseFromAnswer`] makes of a promise's time.
pub(crate) fn lease_stamp(stamp: u64, now: u64) -> u64 {
    if planted(Bug::LeaseFromAnswer) { now } else { stamp }
}

/// What [`Bug::SnapshotShort`] makes of the rows of a snapshot.
pub(crate) fn shorten<Row>(rows: &mut Vec<Row>) {
    if planted(Bug::SnapshotShort) {
        rows.pop();
    }
}

/// Whether this process has a fault planted in it.
#[must_use]
pub fn planted(bug: Bug) -> bool {
    sim::here().is_some_and(|host| host.bug == bug as u64)
}
