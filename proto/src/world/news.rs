//! Tells everybody who waits for it that something has changed. It wakes them in the order in which they began to wait,
//! where tokio's `watch` draws an order, which no seed decides.

use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Notify;

/// What may change.
#[derive(Debug, Default)]
pub struct News {
    count: AtomicU64,
    told: Notify,
}

/// Somebody who waits for changes.
#[derive(Debug)]
pub struct Listener<'a> {
    news: &'a News,
    seen: u64,
}

impl News {
    /// Something has changed.
    pub fn tell(&self) {
        self.count.fetch_add(1, Ordering::Release);
        self.told.notify_waiters();
    }

    /// Begins to listen: what changes from now on is heard.
    pub fn listen(&self) -> Listener<'_> {
        Listener { news: self, seen: self.count.load(Ordering::Acquire) }
    }
}

impl Listener<'_> {
    /// Waits until something has changed since the last call, or since the listening began. Cancelling it loses nothing.
    pub async fn changed(&mut self) {
        loop {
            let told = self.news.told.notified();
            tokio::pin!(told);
            told.as_mut().enable();
            let count = self.news.count.load(Ordering::Acquire);
            if count != self.seen {
                self.seen = count;
                return;
            }
            told.await;
        }
    }
}
