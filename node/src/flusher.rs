//! The thread that writes to redb: sealed tables, new replicas, snapshots. One at a time, in the order they came.
//!
//! The queue has no bound of its own, because each kind of job waits for its answer before the next is sent: one flush per
//! owner, one snapshot per shard.

#![expect(clippy::disallowed_methods, reason = "a shell: a thread of its own, because redb blocks")]

#[cfg(feature = "sim")]
use crate::inspect::{Point, reached};
use crate::memtable::Table;
use crate::owner::{Mail, post};
use crate::space::Space;
use crate::store::{Base, Flush, Hold, ReplicaMeta, Store, StoreError};
use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::{ReplicaId, ShardId};
use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::atomic::AtomicUsize;
use std::sync::{Arc, mpsc};
use std::time::Duration;
use tokio::sync::{mpsc as mail, oneshot};

/// How often a flush that found no space is tried again.
const NO_SPACE_RETRY: Duration = Duration::from_millis(500);

/// Bytes of staged rows after which they are made durable: redb keeps what is not in mind.
const LAZY_BYTES_MAX: u64 = 64 << 20;

/// How much the thread steps back for others on the same processors. On Linux a thread has a niceness of its own.
const NICE: i32 = 19;

/// Where the answer of a job goes.
pub type Answer<T> = oneshot::Sender<Result<T, StoreError>>;

/// Something to write.
pub enum Job {
    /// Sealed tables. The log keeps what follows the indexes in `keep`.
    Flush {
        /// The tables.
        tables: Vec<Flush>,
        /// Counts their rows that are written.
        rows_done: Arc<AtomicUsize>,
        /// By shard.
        keep: BTreeMap<u32, u64>,
        /// Who is told.
        owner: usize,
    },
    /// A new replica; `None` if it was deleted here before.
    Create(ShardId, Box<ReplicaMeta>, Answer<Option<Base>>),
    /// One replica less.
    Delete(ShardId, ReplicaId, Answer<()>),
    /// The beginning of a snapshot's rows, with the number of the stream.
    StageBegin(ShardId, u64, Answer<()>),
    /// More of a snapshot's rows. `false` if another stream has begun, or the replica was deleted.
    Stage(ShardId, u64, Vec<(Bytes, Bytes)>, Answer<bool>),
    /// Staged rows into their place.
    Install {
        /// The shard.
        shard: ShardId,
        /// What they make of the replica.
        meta: Box<ReplicaMeta>,
        /// What the shard remembers beside them, encoded.
        ledger: Bytes,
        /// Who is told.
        owner: usize,
    },
    /// What nobody reads any more: to give up many rows takes a while.
    Forget(Vec<(Option<Arc<Table>>, Base)>),
}

/// What a flush changes for an owner's shards, whosever tables it wrote.
#[derive(Default)]
pub struct After {
    /// Up to which index shards' logs were let go.
    pub released: Vec<(ShardId, u64)>,
    /// New holds on the rows of shards of which nothing was written, with the last index in them.
    pub held: Vec<(ShardId, u64, Hold)>,
}

/// The door to the flusher's thread.
pub struct Flusher {
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
    thread: Mutex<Option<std::thread::JoinHandle<()>>>,
    /// Wakes the task that stands in for the thread in a simulation.
    #[cfg(feature = "sim")]
    woken: Arc<tokio::sync::Notify>,
}

impl Flusher {
    /// Starts the thread. `flushed` is what redb holds of each shard.
    ///
    /// # Errors
    /// The system's, when there can be no more threads.
    pub fn start(
        store: Store,
        space: Arc<Space>,
        owners: Vec<mail::Sender<Mail>>,
        flushed: BTreeMap<u32, u64>,
    ) -> std::io::Result<Self> {
        let (sender, receiver) = mpsc::channel();
        let mut work = Work { store, space, owners, flushed, staging: BTreeMap::new(), lazy_bytes: 0 };
        #[cfg(feature = "sim")]
        if let Some(host) = shkv_proto::world::sim::here() {
            let woken = Arc::new(tokio::sync::Notify::new());
            tokio::spawn(work.run_in_turns(receiver, woken.clone(), host));
            return Ok(Self { jobs: Mutex::new(Some(sender)), thread: Mutex::new(None), woken });
        }
        let run = move || {
            // Whoever waits for an answer goes first. It is tried only: without it a flush is in the way, but not wrong.
            let _ = rustix::process::setpriority_process(None, NICE);
            while receiver.recv().is_ok_and(|job| work.goes_on_after(job)) {}
        };
        let thread = std::thread::Builder::new().name("flusher".into()).spawn(run)?;
        Ok(Self {
            jobs: Mutex::new(Some(sender)),
            thread: Mutex::new(Some(thread)),
            #[cfg(feature = "sim")]
            woken: Arc::default(),
        })
    }

    /// Hands a job over.
    pub fn submit(&self, job: Job) {
        if let Some(jobs) = &*self.jobs.lock() {
            let _ = jobs.send(job); // after a failure nobody takes jobs any more, and the node stops
        }
        #[cfg(feature = "sim")]
        self.woken.notify_one();
    }

    /// Does a job and waits for its answer.
    ///
    /// # Errors
    /// The job's.
    pub async fn ask<T>(&self, job: impl FnOnce(Answer<T>) -> Job) -> Result<T, StoreError> {
        let (answer, answered) = oneshot::channel();
        self.submit(job(answer));
        answered.await.unwrap_or_else(|_| Err(StoreError::stopped()))
    }

    /// Does what waits, and ends the thread.
    pub fn stop(&self) {
        self.jobs.lock().take();
        #[cfg(feature = "sim")]
        self.woken.notify_one();
        if let Some(thread) = self.thread.lock().take() {
            let _ = thread.join();
        }
    }
}

struct Work {
    store: Store,
    space: Arc<Space>,
    owners: Vec<mail::Sender<Mail>>,
    flushed: BTreeMap<u32, u64>,
    /// The number of the stream that brings a shard's snapshot in.
    staging: BTreeMap<u32, u64>,
    /// Bytes of staged rows since some were made durable.
    lazy_bytes: u64,
}

impl Work {
    /// Does a job. After a failure there are no more.
    fn goes_on_after(&mut self, job: Job) -> bool {
        let done = std::panic::catch_unwind(AssertUnwindSafe(|| self.job(job)));
        let error = match done {
            Ok(Ok(())) => return true,
            Ok(Err(error)) => error.to_string(),
            Err(_) => "the flusher gave up; see the message above".to_owned(),
        };
        // What redb holds now is unknown until it is opened anew; the log has everything that it may lack.
        (self.space.fail)(error);
        false
    }

    /// What the thread does, as a task, with a disk that takes its time.
    #[cfg(feature = "sim")]
    async fn run_in_turns(
        mut self,
        jobs: mpsc::Receiver<Job>,
        woken: Arc<tokio::sync::Notify>,
        host: Arc<shkv_proto::world::sim::Host>,
    ) {
        loop {
            match jobs.try_recv() {
                Ok(Job::Forget(_)) => {}
                Ok(job) => {
                    tokio::time::sleep(host.disk_pause(8)).await;
                    while self.lacks_space(&job) {
                        self.space.set_full(true);
                        tokio::time::sleep(NO_SPACE_RETRY).await;
                    }
                    let after = point_behind(&job);
                    if matches!(job, Job::Flush { .. }) && reached(Point::FlushBegins) {
                        return std::future::pending().await;
                    }
                    if !self.goes_on_after(job) {
                        return;
                    }
                    if after.is_some_and(reached) {
                        return std::future::pending().await;
                    }
                }
                Err(mpsc::TryRecvError::Empty) => woken.notified().await,
                Err(mpsc::TryRecvError::Disconnected) => return,
            }
        }
    }

    #[cfg(feature = "sim")]
    fn lacks_space(&self, job: &Job) -> bool {
        let bytes = match job {
            Job::Flush { tables, .. } => tables.iter().map(|flush| flush.table.bytes() as u64).sum(),
            Job::Stage(_, _, rows, _) => rows.iter().map(|(key, row)| (key.len() + row.len()) as u64).sum(),
            _ => return false,
        };
        self.lacks(bytes)
    }

    /// Whether there is too little room for so much. Nothing waits for room in a node that stops.
    fn lacks(&self, bytes: u64) -> bool {
        self.space.free_bytes() < 2 * bytes + self.space.emergency_bytes() && !self.space.is_stopping()
    }

    fn job(&mut self, job: Job) -> Result<(), StoreError> {
        match job {
            Job::Flush { tables, rows_done, keep, owner } => self.flush(&tables, &rows_done, &keep, owner),
            Job::Create(shard, meta, answer) => answered(answer, self.create(shard, &meta)),
            Job::Delete(shard, replica, answer) => {
                self.staging.remove(&shard.0);
                self.flushed.remove(&shard.0); // its entries keep no segment of the log any more
                answered(answer, self.store.delete_replica(shard, replica))
            }
            Job::StageBegin(shard, stream, answer) => {
                self.staging.insert(shard.0, stream);
                answered(answer, self.store.stage_begin(shard))
            }
            Job::Stage(shard, stream, rows, answer) => {
                if self.staging.get(&shard.0) != Some(&stream) {
                    return answered(answer, Ok(false));
                }
                let bytes = rows.iter().map(|(key, row)| (key.len() + row.len()) as u64).sum();
                self.wait_for_space(bytes);
                self.lazy_bytes += bytes;
                let durable = self.lazy_bytes > LAZY_BYTES_MAX;
                if durable {
                    self.lazy_bytes = 0;
                }
                answered(answer, self.store.stage(shard, &rows, durable).map(|()| true))
            }
            Job::Forget(rows) => {
                drop(rows);
                Ok(())
            }
            Job::Install { shard, meta, ledger, owner } => {
                self.staging.remove(&shard.0);
                self.store.install(shard, &meta, &ledger)?;
                self.flushed.insert(shard.0, meta.state.index);
                let base = self.store.base(shard)?;
                self.tell(owner, Mail::Installed(shard, meta, base));
                Ok(())
            }
        }
    }

    fn create(&mut self, shard: ShardId, meta: &ReplicaMeta) -> Result<Option<Base>, StoreError> {
        if !self.store.create_replica(shard, meta)? {
            return Ok(None);
        }
        self.flushed.insert(shard.0, 0);
        self.store.base(shard).map(Some)
    }

    fn flush(
        &mut self,
        tables: &[Flush],
        rows_done: &AtomicUsize,
        keep: &BTreeMap<u32, u64>,
        owner: usize,
    ) -> Result<(), StoreError> {
        self.wait_for_space(tables.iter().map(|flush| flush.table.bytes() as u64).sum());
        self.store.flush(tables, rows_done)?;
        let mut flushed = Vec::with_capacity(tables.len());
        for flush in tables {
            flushed.push((flush.meta.clone(), flush.shard, self.store.base(flush.shard)?));
            self.flushed.insert(flush.shard.0, flush.meta.state.index);
        }
        let mut needed = self.flushed.clone();
        for (shard, index) in keep {
            needed.entry(*shard).and_modify(|flushed| *flushed = (*flushed).min(*index));
        }
        let log = &self.space.log;
        let released = log.release(&needed, self.space.log_retain_bytes).unwrap_or_else(|error| {
            (self.space.fail)(error.to_string());
            BTreeMap::new()
        });
        self.tell(owner, Mail::Flushed(flushed));
        // Shards that had nothing to flush have the rows that they had. Their old holds would keep redb from using what this flush gave up.
        let of_others = |shard: &ShardId| tables.iter().all(|flush| flush.shard != *shard);
        let holds = self.store.holds(self.flushed.keys().map(|shard| ShardId(*shard)).filter(of_others))?;
        let owners = self.owners.len();
        let mut after: Vec<After> = (0..owners).map(|_| After::default()).collect();
        for (shard, index) in released {
            after[shard as usize % owners].released.push((ShardId(shard), index));
        }
        for (shard, hold) in holds {
            after[shard.0 as usize % owners].held.push((shard, self.flushed[&shard.0], hold));
        }
        for (owner, after) in after.into_iter().enumerate() {
            self.tell(owner, Mail::FlushedAny(after));
        }
        Ok(())
    }

    /// redb cannot be used any more once a write has found the disk full, so it is not begun before there is room.
    fn wait_for_space(&self, bytes: u64) {
        while self.lacks(bytes) {
            self.space.set_full(true);
            std::thread::sleep(NO_SPACE_RETRY);
        }
    }

    fn tell(&self, owner: usize, mail: Mail) {
        if let Some(owner) = self.owners.get(owner) {
            post(owner, mail);
        }
    }
}

/// Where a process is when it has done a job.
#[cfg(feature = "sim")]
fn point_behind(job: &Job) -> Option<Point> {
    match job {
        Job::Flush { .. } => Some(Point::FlushDone),
        Job::Create(..) => Some(Point::ReplicaMade),
        Job::Delete(..) => Some(Point::ReplicaDeleted),
        Job::StageBegin(..) => Some(Point::SnapshotBegun),
        Job::Stage(..) => Some(Point::SnapshotRows),
        Job::Install { .. } => Some(Point::SnapshotWhole),
        Job::Forget(_) => None,
    }
}

/// Whoever asked may be gone; a failure is also the flusher's own.
fn answered<T>(answer: Answer<T>, result: Result<T, StoreError>) -> Result<(), StoreError> {
    let failure = result.as_ref().err().cloned();
    let _ = answer.send(result);
    failure.map_or(Ok(()), Err)
}
