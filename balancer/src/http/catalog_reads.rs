//! Reads of the database's catalog that requests share.
//!
//! Each request has to know the catalog as it is at some moment after its own beginning: any balancer may have changed it,
//! and a write into a database that is no more would be lost. One read is enough for all requests that began before it,
//! so while one is under way those that come wait together for the next. It is parsed only when it is not what it was.

#![expect(clippy::disallowed_methods, reason = "a shell: waits only so long for others")]

use crate::http::catalog::{self, Catalog};
use crate::http::store::{Ask, Store};
use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::message::{Consistency, Failure};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::{Instant, timeout_at};
use tokio_util::task::TaskTracker;

/// How long a shared read may take. Then those who wait for it read for themselves: one node that has fallen silent must
/// not hold up requests for which it is not needed any more.
const SHARED_TIME_MAX: Duration = Duration::from_millis(250);

/// The reads of one process.
#[derive(Debug, Default)]
pub(crate) struct CatalogReads {
    turns: Arc<Turns<Option<Arc<Catalog>>>>,
    /// The bytes that were parsed last, and what they say. Not a version: that of a keyspace made anew begins anew.
    parsed: Mutex<Option<(Bytes, Arc<Catalog>)>>,
}

impl CatalogReads {
    /// The catalog as it is after the call has begun.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn read(self: &Arc<Self>, store: &Store, ask: &Ask) -> Result<Arc<Catalog>, Failure> {
        if ask.consistency == Consistency::Linearizable {
            let shared = self.turns.wait(&store.cluster().tasks, {
                let (reads, store) = (self.clone(), store.clone());
                move || {
                    let (reads, store) = (reads.clone(), store.clone());
                    async move { reads.read_alone(&store, &Ask::within(SHARED_TIME_MAX)).await.ok() }
                }
            });
            let until = ask.deadline.min(Instant::now() + 2 * SHARED_TIME_MAX); // the one under way, and the next
            if let Ok(Ok(Some(catalog))) = timeout_at(until, shared).await {
                return Ok(catalog);
            }
        }
        self.read_alone(store, ask).await
    }

    async fn read_alone(&self, store: &Store, ask: &Ask) -> Result<Arc<Catalog>, Failure> {
        let Some(found) = catalog::find(store, ask).await? else { return Ok(Arc::default()) };
        if let Some((bytes, catalog)) = &*self.parsed.lock()
            && *bytes == found.value
        {
            return Ok(catalog.clone());
        }
        let catalog: Arc<Catalog> = Arc::new(catalog::parsed(&found)?);
        let bytes = Bytes::copy_from_slice(&found.value); // a slice of what was read would keep all of that
        *self.parsed.lock() = Some((bytes, catalog.clone()));
        Ok(catalog)
    }
}

/// Turns of something that many wait for: each is for those who came before it began.
#[derive(Debug)]
struct Turns<T> {
    state: Mutex<State<T>>,
}

#[derive(Debug)]
struct State<T> {
    /// Whether a task takes turns until nobody waits.
    is_going: bool,
    /// Who waits for a turn that has not begun.
    waiting: Vec<oneshot::Sender<T>>,
}

impl<T> Default for Turns<T> {
    fn default() -> Self {
        Self { state: Mutex::new(State { is_going: false, waiting: vec![] }) }
    }
}

impl<T: Clone + Send + 'static> Turns<T> {
    /// Waits for the next turn. If none is under way, it begins in a task of `tasks`.
    fn wait<F>(
        self: &Arc<Self>,
        tasks: &TaskTracker,
        turn: impl Fn() -> F + Send + Sync + 'static,
    ) -> oneshot::Receiver<T>
    where
        F: Future<Output = T> + Send,
    {
        let (sender, receiver) = oneshot::channel();
        let is_going = {
            let mut state = self.state.lock();
            state.waiting.push(sender);
            std::mem::replace(&mut state.is_going, true)
        };
        if !is_going {
            let turns = self.clone();
            tasks.spawn(async move { turns.go_on(turn).await });
        }
        receiver
    }

    async fn go_on<F: Future<Output = T>>(&self, turn: impl Fn() -> F) {
        loop {
            let waiting = {
                let mut state = self.state.lock();
                if state.waiting.is_empty() {
                    state.is_going = false;
                    return;
                }
                std::mem::take(&mut state.waiting) // before the turn begins: whoever comes later needs a later one
            };
            let found = turn().await;
            for sender in waiting {
                let _ = sender.send(found.clone()); // it may wait no longer
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicU64, Ordering};
    use tokio::sync::Semaphore;

    /// A row that changes, and reads of it that look when they begin and end when they are let.
    struct Row {
        turns: Arc<Turns<u64>>,
        tasks: TaskTracker,
        now: Arc<AtomicU64>,
        reads: Arc<AtomicU64>,
        let_go: Arc<Semaphore>,
    }

    impl Row {
        fn new() -> Self {
            Self {
                turns: Arc::default(),
                tasks: TaskTracker::new(),
                now: Arc::new(AtomicU64::new(1)),
                reads: Arc::default(),
                let_go: Arc::new(Semaphore::new(0)),
            }
        }

        fn ask(&self) -> oneshot::Receiver<u64> {
            let (now, reads, let_go) = (self.now.clone(), self.reads.clone(), self.let_go.clone());
            self.turns.wait(&self.tasks, move || {
                let found = now.load(Ordering::Relaxed);
                reads.fetch_add(1, Ordering::Relaxed);
                let let_go = let_go.clone();
                async move {
                    let_go.acquire().await.expect("it is not closed").forget();
                    found
                }
            })
        }

        async fn until_reads(&self, count: u64) {
            while self.reads.load(Ordering::Relaxed) < count {
                tokio::task::yield_now().await;
            }
        }
    }

    #[tokio::test]
    async fn nobody_is_told_what_was_read_before_he_asked() {
        let row = Row::new();
        let first = row.ask();
        row.until_reads(1).await;
        row.now.store(2, Ordering::Relaxed);
        let later: Vec<_> = (0..10).map(|_| row.ask()).collect();
        row.let_go.add_permits(1);
        assert_eq!(first.await, Ok(1));
        row.let_go.add_permits(1);
        for one in later {
            assert_eq!(one.await, Ok(2), "it was changed before this one asked");
        }
        assert_eq!(row.reads.load(Ordering::Relaxed), 2, "those who wait together share a read");
        row.tasks.close();
        row.tasks.wait().await;
        row.let_go.add_permits(1);
        row.now.store(3, Ordering::Relaxed);
        assert_eq!(row.ask().await, Ok(3), "it begins again when nobody had waited");
    }

    #[tokio::test]
    async fn whoever_waits_no_longer_holds_up_nobody() {
        let row = Row::new();
        drop(row.ask());
        row.until_reads(1).await;
        let (gone, waits) = (row.ask(), row.ask());
        drop(gone);
        row.let_go.add_permits(2);
        assert_eq!(waits.await, Ok(1));
    }
}
