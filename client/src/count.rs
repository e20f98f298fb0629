//! Counts rows without moving them: every shard counts its own, side by side, in steps of bounded size.

use crate::call::{Aim, Answered, Request, Span, ask};
use crate::error::Error;
use crate::inner::Inner;
use crate::keyspace::Keyspace;
use crate::point::Call;
use crate::range::KeyRange;
use crate::scan::{aims_of, scan_head};
use crate::token::Consistency;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::frame::Kind;
use shkv_proto::ids::{KeyspaceId, ShardId};
use shkv_proto::message::{CountDone, Scan};
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// A count that is not yet sent; see [`crate::Client::count`]. Awaiting it gives the number of rows.
///
/// The shards are not counted at one moment: rows written meanwhile may or may not be in it.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let rows = client.count(..).prefix("city/").await?;
/// println!("{rows} cities");
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a count is sent when it is awaited"]
pub struct Count {
    keyspace: Keyspace,
    range: KeyRange,
    consistency: Consistency,
    within: Duration,
}

impl Count {
    pub(crate) fn new(keyspace: Keyspace, range: KeyRange) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, range, consistency: Consistency::default(), within }
    }

    /// Counts only keys of the range that begin with `prefix`.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let rows = client.count(..).prefix("city/").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn prefix(mut self, prefix: impl AsRef<[u8]>) -> Self {
        self.range = self.range.and(KeyRange::prefix(prefix));
        self
    }

    /// How fresh the answer must be; linearizable unless said otherwise.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let rows = client.count(..).consistency(shkv_client::Consistency::Eventual).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// How long each of its steps may take, an hour at most. A step looks at up to 200,000 rows of a shard, fewer
    /// if they take more than half of that time.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let rows = client.count(..).deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    async fn send(self) -> Result<u64, Error> {
        if self.range.is_empty() {
            return Ok(0);
        }
        let inner = self.keyspace.inner();
        let keyspace = self.keyspace.id(Span::of(self.within).deadline).await?;
        let mut counts = JoinSet::new();
        for shard in aims_of(inner, keyspace, &self.range, self.consistency)? {
            let (inner, range) = (inner.clone(), self.range.clone());
            counts.spawn(count_shard(inner, keyspace, shard, range, self.consistency, self.within));
        }
        let mut rows = 0;
        while let Some(joined) = counts.join_next().await {
            rows += joined.map_err(|_| Error::unavailable("the task that counted was stopped"))??;
        }
        Ok(rows)
    }
}

impl IntoFuture for Count {
    type Output = Result<u64, Error>;
    type IntoFuture = Call<u64>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

async fn count_shard(
    inner: Arc<Inner>,
    keyspace: KeyspaceId,
    shard: ShardId,
    range: KeyRange,
    consistency: Consistency,
    within: Duration,
) -> Result<u64, Error> {
    let mut left: Scan = scan_head(keyspace, &range, false);
    let mut rows = 0;
    loop {
        let request = Request {
            kind: Kind::Count,
            keyspace,
            aim: if shard == ShardId::UNROUTED { Aim::Keyspace } else { Aim::Shard(shard) },
            consistency,
            ticket: None,
            head: |consistency, _| codec::encode(&Scan { consistency, ..left.clone() }),
            tail: Bytes::new(),
        };
        let Answered { head, .. }: Answered<CountDone> = ask(&inner, &request, Span::of(within)).await?;
        rows += head.rows;
        match head.next {
            // Each step must get on, or a peer that repeats itself would keep this loop for ever.
            Some(next) if next > left.start => left = left.resumed(next),
            Some(_) => return Err(Error::unavailable("a shard's count does not get on")),
            None => return Ok(rows),
        }
    }
}
