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

/// How long a shared read may take. Then those who wait for it read for themselves: one node that has fallen silent must
/// not hold up requests for which it is not needed any more.
const SHARED_TIME_MAX: Duration = Duration::from_millis(250);

/// The reads of one process.
#[derive(Debug, Default)]
pub(crate) struct CatalogReads {
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    /// Whether somebody reads and looks again for those who wait.
    is_reading: bool,
    /// Who waits for a read that has not begun.
    waiting: Vec<oneshot::Sender<Option<Arc<Catalog>>>>,
    /// The bytes that were parsed last, and what they say. Not a version: that of a keyspace made anew begins anew.
    parsed: Option<(Bytes, Arc<Catalog>)>,
}

impl CatalogReads {
    /// The catalog as it is after the call has begun.
    ///
    /// # Errors
    /// [`Failure`].
    pub(crate) async fn read(self: &Arc<Self>, store: &Store, ask: &Ask) -> Result<Arc<Catalog>, Failure> {
        if ask.consistency == Consistency::Linearizable {
            let shared = self.wait(store);
            let until = ask.deadline.min(Instant::now() + 2 * SHARED_TIME_MAX); // the one under way, and the next
            if let Ok(Ok(Some(catalog))) = timeout_at(until, shared).await {
                return Ok(catalog);
            }
        }
        self.read_alone(store, ask).await
    }

    /// Waits for the next read, and begins it if none is under way.
    fn wait(self: &Arc<Self>, store: &Store) -> oneshot::Receiver<Option<Arc<Catalog>>> {
        let (sender, receiver) = oneshot::channel();
        let is_reading = {
            let mut state = self.state.lock();
            state.waiting.push(sender);
            std::mem::replace(&mut state.is_reading, true)
        };
        if !is_reading {
            store.cluster().tasks.spawn(self.clone().read_for_all(store.clone()));
        }
        receiver
    }

    /// Reads until nobody waits any more.
    async fn read_for_all(self: Arc<Self>, store: Store) {
        loop {
            let waiting = {
                let mut state = self.state.lock();
                if state.waiting.is_empty() {
                    state.is_reading = false;
                    return;
                }
                std::mem::take(&mut state.waiting) // before the read begins: whoever comes later needs a later one
            };
            let found = self.read_alone(&store, &Ask::within(SHARED_TIME_MAX)).await.ok();
            for sender in waiting {
                let _ = sender.send(found.clone()); // it may wait no longer
            }
        }
    }

    async fn read_alone(&self, store: &Store, ask: &Ask) -> Result<Arc<Catalog>, Failure> {
        let Some(found) = catalog::find(store, ask).await? else { return Ok(Arc::default()) };
        if let Some((bytes, catalog)) = &self.state.lock().parsed
            && *bytes == found.value
        {
            return Ok(catalog.clone());
        }
        let catalog: Arc<Catalog> = Arc::new(catalog::parsed(&found)?);
        let bytes = Bytes::copy_from_slice(&found.value); // a slice of what was read would keep all of that
        self.state.lock().parsed = Some((bytes, catalog.clone()));
        Ok(catalog)
    }
}
