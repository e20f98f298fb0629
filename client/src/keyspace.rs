//! A keyspace and the operations on it, which the client offers for its default keyspace, too.

use crate::batch::Batch;
use crate::client::Client;
use crate::count::Count;
use crate::error::Error;
use crate::inner::Inner;
use crate::point::{Delete, Get, Put};
use crate::range::KeyRange;
use crate::scan::Scan;
use crate::txn::Txn;
use bytes::Bytes;
use shkv_proto::ids::KeyspaceId;
use shkv_proto::map::DEFAULT_KEYSPACE;
use std::sync::Arc;
use tokio::time::Instant;

/// A keyspace of a cluster: a named, ordered map of bytes to bytes. Cloning it is cheap.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let users = client.keyspace("users").await?;
/// users.put("ada", "1815").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Keyspace {
    inner: Arc<Inner>,
    /// `None` is the default keyspace, looked up when it is first used.
    id: Option<KeyspaceId>,
}

impl Keyspace {
    pub(crate) fn new(inner: Arc<Inner>, id: Option<KeyspaceId>) -> Self {
        Self { inner, id }
    }

    pub(crate) fn inner(&self) -> &Arc<Inner> {
        &self.inner
    }

    /// Its id; the default keyspace's is looked up once.
    pub(crate) async fn id(&self, deadline: Instant) -> Result<KeyspaceId, Error> {
        if let Some(id) = self.id.or_else(|| self.inner.default_keyspace.get().copied()) {
            return Ok(id);
        }
        let id = Box::pin(self.inner.find_keyspace(DEFAULT_KEYSPACE, deadline)).await?;
        Ok(*self.inner.default_keyspace.get_or_init(|| id))
    }

    /// The shard that a key lies in, as far as the client knows: `None` before the keyspace was first used. What is
    /// written together costs least when it lies in one shard.
    ///
    /// ```no_run
    /// # fn example(users: shkv_client::Keyspace) {
    /// let together = users.shard_of("ada") == users.shard_of("bob");
    /// # }
    /// ```
    #[must_use]
    pub fn shard_of(&self, key: impl AsRef<[u8]>) -> Option<u32> {
        let id = self.id.or_else(|| self.inner.default_keyspace.get().copied())?;
        self.inner.view().routes.shard_of(id, key.as_ref()).map(|shard| shard.id.0)
    }
}

/// The same operations on the client itself are shorthand for its default keyspace.
macro_rules! operations {
    ($type:ty, $example:literal, $of:expr) => {
        impl $type {
            /// Writes one row. Await it.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let written = kv.put("k", vec![1, 2, 3]).await?;
            /// println!("version {}", written.version);
            /// # Ok(())
            /// # }
            /// ```
            pub fn put(&self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) -> Put {
                Put::new($of(self), key.as_ref(), value.into())
            }

            /// Reads one row. Await it.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// if let Some(row) = kv.get("k").await? {
            ///     println!("{:?}", row.value);
            /// }
            /// # Ok(())
            /// # }
            /// ```
            pub fn get(&self, key: impl AsRef<[u8]>) -> Get {
                Get::new($of(self), key.as_ref())
            }

            /// Removes one row. Await it.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let was_there = kv.delete("k").await?.removed == 1;
            /// # Ok(())
            /// # }
            /// ```
            pub fn delete(&self, key: impl AsRef<[u8]>) -> Delete {
                Delete::new($of(self), key.as_ref())
            }

            /// Reads rows in order, page by page.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let mut rows = kv.scan("a".."c").reverse().limit(10).rows();
            /// while let Some(row) = rows.next().await? {
            ///     println!("{:?} = {:?}", row.key, row.value);
            /// }
            /// # Ok(())
            /// # }
            /// ```
            pub fn scan(&self, range: impl Into<KeyRange>) -> Scan {
                Scan::new($of(self), range.into())
            }

            /// Counts the rows of a range. Await it.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let rows: u64 = kv.count(..).await?;
            /// # Ok(())
            /// # }
            /// ```
            pub fn count(&self, range: impl Into<KeyRange>) -> Count {
                Count::new($of(self), range.into())
            }

            /// Collects puts and deletes that are done in one step or not at all. Await it.
            ///
            /// ```no_run
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let done = kv.batch().put("a", "1").put("b", "2").delete("c").await?;
            /// println!("{} rows removed", done.removed);
            /// # Ok(())
            /// # }
            /// ```
            pub fn batch(&self) -> Batch {
                Batch::new($of(self))
            }

            /// Collects what is looked at, read and written in one step, or not at all.
            ///
            /// ```no_run
            /// use shkv_client::Check;
            ///
            #[doc = concat!("# async fn example(", $example, ") -> Result<(), shkv_client::Error> {")]
            /// let txn = kv.txn().check("open", Check::Present).put("a", "1").delete("b").read("c");
            /// println!("c was {:?}", txn.commit().await?.row("c"));
            /// # Ok(())
            /// # }
            /// ```
            pub fn txn(&self) -> Txn {
                Txn::new($of(self))
            }
        }
    };
}

operations!(Client, "kv: shkv_client::Client", Client::default_keyspace);
operations!(Keyspace, "kv: shkv_client::Keyspace", Keyspace::clone);
