//! The thread that drives the log: it takes everything that waits, writes and syncs it, tells the owners, and begins anew.
//! While one sync runs the next write gathers, so the size of a write tunes itself to the disk.

#![expect(
    clippy::disallowed_methods,
    reason = "a shell: a thread of its own, because fdatasync blocks, and the time that it takes"
)]

use super::{Log, LogError, ShardWrite};
use parking_lot::{Condvar, Mutex};
use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::sync::oneshot;

/// How often a write that found no space is tried again.
const NO_SPACE_RETRY: Duration = Duration::from_millis(500);

/// How long a write and its sync may have taken of late for the next to be done on the thread of whoever asks.
const QUICK_MAX: Duration = Duration::from_millis(1);
/// Bytes of entries up to which that is done.
const HERE_BYTES_MAX: usize = 64 << 10;
/// What a record takes beside its data, at the most.
const RECORD_BYTES_ABOUT: usize = 64;

/// What a shard is told when its write is durable: the shard and the number of its Raft ready.
pub type Ticket = (u32, u64);

/// A request to the writer.
struct Job {
    writes: Vec<ShardWrite>,
    tickets: Vec<Ticket>,
    done: Option<oneshot::Sender<()>>,
}

/// Told when tickets are durable.
pub type OnSynced = Box<dyn Fn(Vec<Ticket>) + Send>;
/// Told when the log has failed for good.
pub type OnFatal = Box<dyn Fn(String) + Send>;

/// The door to the writer's thread.
pub struct LogWriter {
    log: Arc<Log>,
    queue: Arc<Queue>,
    threads: Mutex<Vec<std::thread::JoinHandle<()>>>,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<Jobs>,
    filled: Condvar,
    /// Whether a spare segment is wanted, and whether to stop.
    spares: Mutex<(bool, bool)>,
    spares_wanted: Condvar,
    syncs: AtomicU64,
    no_space: AtomicBool,
    /// How long a write with its sync takes, in nanoseconds: at once up, slowly down.
    takes: AtomicU64,
    /// Wakes the task that stands in for the threads in a simulation.
    #[cfg(feature = "sim")]
    woken: tokio::sync::Notify,
}

/// What waits, and who is at it.
#[derive(Default)]
struct Jobs {
    waiting: Vec<Job>,
    /// Whether to stop when nothing waits.
    stops: bool,
    /// Whether something is being written, by the thread or by [`LogWriter::write_here`]: writes never overtake each other.
    writing: bool,
    /// Why nothing is written any more.
    failure: Option<String>,
}

impl LogWriter {
    /// Starts the thread.
    ///
    /// # Errors
    /// The system's, when there can be no more threads.
    pub fn start(log: Arc<Log>, on_synced: OnSynced, on_fatal: OnFatal) -> std::io::Result<Self> {
        let queue = Arc::new(Queue::default());
        #[cfg(feature = "sim")]
        if let Some(host) = shkv_proto::world::sim::here() {
            tokio::spawn(run_in_turns(log.clone(), queue.clone(), on_synced, on_fatal, host));
            return Ok(Self { log, queue, threads: Mutex::default() });
        }
        let thread = |name: &str| std::thread::Builder::new().name(name.into());
        let writing = {
            let (log, queue) = (log.clone(), queue.clone());
            thread("log").spawn(move || {
                let run = std::panic::catch_unwind(AssertUnwindSafe(|| run(&log, &queue, &on_synced, &on_fatal)));
                if run.is_err() {
                    on_fatal("the log's writer gave up; see the message above".into());
                }
            })?
        };
        let making = {
            let (log, queue) = (log.clone(), queue.clone());
            thread("log-spares").spawn(move || make_spares(&log, &queue))?
        };
        if !log.is_new() {
            queue.want_spare(); // a node that keeps nothing yet needs no room on the disk
        }
        Ok(Self { log, queue, threads: Mutex::new(vec![writing, making]) })
    }

    /// The log.
    pub fn log(&self) -> &Arc<Log> {
        &self.log
    }

    /// Hands writes over; `tickets` come back through `on_synced` when they are durable.
    pub fn submit(&self, writes: Vec<ShardWrite>, tickets: Vec<Ticket>) {
        self.push(Job { writes, tickets, done: None });
    }

    /// Writes and waits until it is durable. All tickets of earlier writes have come back by then.
    ///
    /// # Errors
    /// `None`: the log has stopped, and what it has of the write is not known.
    pub async fn write(&self, write: ShardWrite) -> Option<()> {
        let (done, written) = oneshot::channel();
        self.push(Job { writes: vec![write], tickets: vec![], done: Some(done) });
        written.await.ok()
    }

    /// Writes on the thread of whoever asks, and gives the tickets back when it is durable: that spares two changes of
    /// thread, and costs the caller's thread the time of a sync. So it is done only if it is little, nothing else is being
    /// written and the disk has been quick of late. Otherwise it is [`LogWriter::submit`].
    pub fn write_here(&self, writes: Vec<ShardWrite>, tickets: Vec<Ticket>) -> Option<Vec<Ticket>> {
        let entries = || writes.iter().flat_map(|write| &write.entries);
        let bytes = entries().map(|entry| entry.data.len()).sum::<usize>()
            + RECORD_BYTES_ABOUT * (3 * writes.len() + entries().count());
        let mut job = Job { writes, tickets, done: None };
        if bytes > HERE_BYTES_MAX || !self.queue.begin_here() {
            self.push(job);
            return None;
        }
        let ending = EndsHere(&self.queue);
        if !self.log.has_room(bytes) {
            drop(ending);
            self.push(job);
            return None;
        }
        let written = self.queue.write(&self.log, &job.writes);
        let mut jobs = self.queue.jobs.lock();
        let done = match written {
            Ok(()) => Some(std::mem::take(&mut job.tickets)),
            Err(LogError::NoSpace(_)) => {
                jobs.waiting.insert(0, job); // the thread waits for space, and what comes meanwhile stands behind it
                None
            }
            Err(error) => {
                jobs.failure = Some(error.to_string());
                None
            }
        };
        drop(jobs);
        drop(ending);
        if done.is_some() && self.log.wants_spare() {
            self.queue.want_spare();
        }
        done
    }

    fn push(&self, job: Job) {
        let mut jobs = self.queue.jobs.lock();
        let was_empty = jobs.waiting.is_empty();
        jobs.waiting.push(job);
        drop(jobs);
        if was_empty {
            self.queue.wake();
        }
    }

    /// fdatasync calls for records so far.
    pub fn syncs(&self) -> u64 {
        self.queue.syncs.load(Ordering::Relaxed)
    }

    /// Whether a write waits for space on the disk.
    pub fn no_space(&self) -> bool {
        self.queue.no_space.load(Ordering::Relaxed)
    }

    /// Writes what waits, and ends the thread.
    pub fn stop(&self) {
        self.queue.jobs.lock().stops = true;
        self.queue.wake();
        self.queue.spares.lock().1 = true;
        self.queue.spares_wanted.notify_one();
        for thread in self.threads.lock().drain(..) {
            let _ = thread.join();
        }
    }
}

impl Queue {
    fn wake(&self) {
        self.filled.notify_one();
        #[cfg(feature = "sim")]
        self.woken.notify_one();
    }

    /// Whether the caller may write now; it then must end with [`EndsHere`].
    fn begin_here(&self) -> bool {
        if shkv_proto::world::is_simulated() || self.takes.load(Ordering::Relaxed) > QUICK_MAX.as_nanos() as u64 {
            return false; // in a simulation a disk takes its time, and only a task of its own can wait for it
        }
        let mut jobs = self.jobs.lock();
        let may = !jobs.writing && !jobs.stops && jobs.waiting.is_empty() && jobs.failure.is_none();
        jobs.writing |= may;
        may
    }

    /// Writes and syncs once.
    fn write(&self, log: &Log, writes: &[ShardWrite]) -> Result<(), LogError> {
        let began = Instant::now();
        let written = log.append(writes);
        match &written {
            Ok(()) => {
                self.no_space.store(false, Ordering::Relaxed);
                self.syncs.fetch_add(1, Ordering::Relaxed);
                let (took, before) = (began.elapsed().as_nanos() as u64, self.takes.load(Ordering::Relaxed));
                self.takes.store(took.max(before - before / 8), Ordering::Relaxed);
            }
            Err(error @ LogError::NoSpace(_)) => {
                if !self.no_space.swap(true, Ordering::Relaxed) {
                    tracing::error!("{error}; writes wait until there is space");
                }
            }
            Err(LogError::Io { .. } | LogError::Corrupt(_)) => {}
        }
        written
    }

    fn want_spare(&self) {
        self.spares.lock().0 = true;
        self.spares_wanted.notify_one();
    }
}

/// Lets the thread go on when a write on another thread has ended, however it did.
struct EndsHere<'a>(&'a Queue);

impl Drop for EndsHere<'_> {
    fn drop(&mut self) {
        let mut jobs = self.0.jobs.lock();
        jobs.writing = false;
        if std::thread::panicking() {
            jobs.failure.get_or_insert_with(|| "a write to the log gave up; see the message above".into());
        }
        let has_work = !jobs.waiting.is_empty() || jobs.failure.is_some() || jobs.stops;
        drop(jobs);
        if has_work {
            self.0.wake();
        }
    }
}

/// Makes segments ahead of need, so that no write waits for sixteen megabytes of zeroes.
fn make_spares(log: &Log, queue: &Queue) {
    loop {
        {
            let mut spares = queue.spares.lock();
            while !spares.0 && !spares.1 {
                queue.spares_wanted.wait(&mut spares);
            }
            if spares.1 {
                return;
            }
            spares.0 = false;
        }
        if let Err(error) = log.make_spares() {
            tracing::warn!("no spare log segment: {error}");
        }
    }
}

fn run(log: &Log, queue: &Queue, on_synced: &OnSynced, on_fatal: &OnFatal) {
    loop {
        let jobs = {
            let mut jobs = queue.jobs.lock();
            loop {
                match jobs.failure.clone() {
                    Some(failure) => {
                        drop(jobs);
                        return on_fatal(failure);
                    }
                    None if jobs.writing => {}
                    None if !jobs.waiting.is_empty() => break,
                    None if jobs.stops => return,
                    None => {}
                }
                queue.filled.wait(&mut jobs);
            }
            jobs.writing = true;
            std::mem::take(&mut jobs.waiting)
        };
        let batch = Batch::of(jobs);
        while let Err(error) = queue.write(log, &batch.writes) {
            if !matches!(error, LogError::NoSpace(_)) {
                // What a failed sync left on the disk is unknown, and a second sync would not tell: recovery will. Nobody
                // else writes from now on, either: it stays marked as being written.
                return on_fatal(error.to_string());
            }
            if queue.jobs.lock().stops {
                return; // nothing of it was acknowledged
            }
            std::thread::sleep(NO_SPACE_RETRY);
        }
        queue.jobs.lock().writing = false;
        if log.wants_spare() {
            queue.want_spare();
        }
        batch.tell(on_synced);
    }
}

/// What the threads do, as one task, with a disk that takes its time.
#[cfg(feature = "sim")]
async fn run_in_turns(
    log: Arc<Log>,
    queue: Arc<Queue>,
    on_synced: OnSynced,
    on_fatal: OnFatal,
    host: Arc<shkv_proto::world::sim::Host>,
) {
    loop {
        let notified = queue.woken.notified();
        let (jobs, stops) = {
            let mut jobs = queue.jobs.lock();
            (std::mem::take(&mut jobs.waiting), jobs.stops)
        };
        if jobs.is_empty() {
            if stops {
                return;
            }
            notified.await;
            // What comes meanwhile shares the write, as it does while a thread is busy.
            tokio::time::sleep(host.disk_pause(3)).await;
            continue;
        }
        let batch = Batch::of(jobs);
        while let Err(error) = queue.write(&log, &batch.writes) {
            if !matches!(error, LogError::NoSpace(_)) {
                return on_fatal(error.to_string());
            }
            if queue.jobs.lock().stops {
                return;
            }
            tokio::time::sleep(NO_SPACE_RETRY).await;
        }
        batch.tell(&on_synced);
        if log.wants_spare() {
            let _ = log.make_spares(); // without one the log goes on until its segment is full
        }
    }
}

/// Jobs that share a write.
struct Batch {
    writes: Vec<ShardWrite>,
    tickets: Vec<Ticket>,
    dones: Vec<oneshot::Sender<()>>,
}

impl Batch {
    fn of(jobs: Vec<Job>) -> Self {
        let mut batch = Self { writes: Vec::with_capacity(jobs.len()), tickets: Vec::new(), dones: Vec::new() };
        for job in jobs {
            batch.writes.extend(job.writes);
            batch.tickets.extend(job.tickets);
            batch.dones.extend(job.done);
        }
        batch
    }

    fn tell(self, on_synced: &OnSynced) {
        on_synced(self.tickets);
        for done in self.dones {
            let _ = done.send(()); // whoever waits may be gone
        }
    }
}
