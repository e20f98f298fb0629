//! Puts and deletes that are done in one step: a transaction without conditions and reads.

use crate::keyspace::Keyspace;
use crate::point::Call;
use crate::txn::{Committed, Txn};
use bytes::Bytes;
use std::future::IntoFuture;
use std::time::Duration;

/// Puts and deletes that are not yet sent; see [`crate::Client::batch`]. Awaiting it gives what was [`Committed`].
///
/// All of it is done in one step or nothing is, whatever shards its keys lie in, and no reader sees half of it. It holds
/// 1 to 10,000 operations and at most 8 MiB, and each key stands in it once.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let mut batch = client.batch();
/// for n in 0..100 {
///     batch = batch.put(format!("row/{n:03}"), "value");
/// }
/// batch.delete("row/old").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a batch is sent when it is awaited"]
pub struct Batch {
    txn: Txn,
}

impl Batch {
    pub(crate) fn new(keyspace: Keyspace) -> Self {
        Self { txn: Txn::new(keyspace) }
    }

    /// Adds a put.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.batch().put("k", "v").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn put(mut self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) -> Self {
        self.txn = self.txn.put(key, value);
        self
    }

    /// Adds a delete.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let removed = client.batch().delete("k").await?.removed;
    /// # Ok(())
    /// # }
    /// ```
    pub fn delete(mut self, key: impl AsRef<[u8]>) -> Self {
        self.txn = self.txn.delete(key);
        self
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.batch().delete("k").deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.txn = self.txn.deadline(within);
        self
    }
}

impl IntoFuture for Batch {
    type Output = Result<Committed, crate::Error>;
    type IntoFuture = Call<Committed>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.txn.commit())
    }
}
