//! Several puts and deletes sent together: one request for each shard that they touch, all at the same time.

use crate::call::{Aim, Request, ask, deadline_in};
use crate::error::Error;
use crate::inner::Inner;
use crate::keyspace::Keyspace;
use crate::point::{Call, Written, check_key, check_value, written};
use crate::token::Consistency;
use bytes::{Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::frame::Kind;
use shkv_proto::ids::{KeyspaceId, ShardId};
use shkv_proto::message::{self, BatchOp, Condition, RefusalCode};
use std::collections::{BTreeMap, BTreeSet};
use std::future::IntoFuture;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Puts and deletes that are not yet sent; see [`crate::Client::batch`]. Awaiting it gives a [`BatchDone`].
///
/// **It is atomic within each shard, not across shards**: what belongs to one shard is done in one step or not at all,
/// and each shard has an outcome of its own.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let mut batch = client.batch();
/// for n in 0..100 {
///     batch = batch.put(format!("row/{n:03}"), "value");
/// }
/// for part in batch.await?.parts {
///     println!("shard {}: {} operations, {:?}", part.shard, part.ops.len(), part.outcome);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a batch is sent when it is awaited"]
pub struct Batch {
    keyspace: Keyspace,
    ops: Vec<(Bytes, Option<Bytes>)>,
    within: Duration,
}

/// What became of a batch.
///
/// ```
/// let done = shkv_client::BatchDone { parts: vec![] };
/// assert!(done.first_failure().is_none());
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchDone {
    /// One for each shard that the batch touches.
    pub parts: Vec<BatchPart>,
}

/// What became of a shard's part of a batch.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// for part in client.batch().put("a", "1").put("b", "2").await?.parts {
///     println!("operations {:?}: {:?}", part.ops, part.outcome);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BatchPart {
    /// The shard.
    pub shard: u32,
    /// The positions in the batch of its operations, from 0, in the order added.
    pub ops: Vec<usize>,
    /// Their outcome, all alike.
    pub outcome: Result<Written, Error>,
}

impl BatchDone {
    /// The failure that the caller must care about most, if any part failed: an unknown outcome before others.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// if let Some(error) = client.batch().put("k", "v").await?.first_failure() {
    ///     return Err(error.clone());
    /// }
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn first_failure(&self) -> Option<&Error> {
        let mut failures = self.parts.iter().filter_map(|part| part.outcome.as_ref().err());
        let first = failures.clone().next();
        failures.find(|error| matches!(error, Error::Unknown { .. })).or(first)
    }
}

/// A shard's part of a batch, encoded.
struct Part {
    ops: Vec<usize>,
    head: Vec<u8>,
    tail: Bytes,
}

impl Batch {
    pub(crate) fn new(keyspace: Keyspace) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, ops: Vec::new(), within }
    }

    /// Adds a put.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let done = client.batch().put("k", "v").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn put(mut self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) -> Self {
        self.ops.push((Bytes::copy_from_slice(key.as_ref()), Some(value.into())));
        self
    }

    /// Adds a delete.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let done = client.batch().delete("k").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn delete(mut self, key: impl AsRef<[u8]>) -> Self {
        self.ops.push((Bytes::copy_from_slice(key.as_ref()), None));
        self
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let done = client.batch().delete("k").deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Refuses what a shard would refuse, before any shard has done its part.
    fn check(&self) -> Result<(), Error> {
        let limits = self.keyspace.inner().limits();
        let refused = |text| Err(Error::refused(RefusalCode::BatchLimits, text));
        if self.ops.is_empty() {
            return refused("the batch is empty; add a put or a delete".to_owned());
        }
        if self.ops.len() > limits.batch_ops_max as usize {
            let text = format!("{} operations are over BATCH_OPS_MAX = {}", self.ops.len(), limits.batch_ops_max);
            return refused(text);
        }
        let mut keys = BTreeSet::new();
        let mut bytes = 0;
        for (key, value) in &self.ops {
            check_key(limits, key)?;
            if let Some(value) = value {
                check_value(limits, value)?;
            }
            bytes += key.len() + value.as_ref().map_or(0, Bytes::len);
            if !keys.insert(key) {
                let shown = String::from_utf8_lossy(key);
                return refused(format!("key {shown:?} is in the batch twice; keep the operation that is meant"));
            }
        }
        if bytes > limits.batch_bytes_max as usize {
            return refused(format!("{bytes} bytes are over BATCH_BYTES_MAX = {}", limits.batch_bytes_max));
        }
        Ok(())
    }

    fn split(&self, inner: &Inner, keyspace: KeyspaceId) -> Result<BTreeMap<ShardId, Part>, Error> {
        let view = inner.view();
        let mut positions: BTreeMap<ShardId, Vec<usize>> = BTreeMap::new();
        for (at, (key, _)) in self.ops.iter().enumerate() {
            let shard = view
                .routes
                .shard_of(keyspace, key)
                .ok_or_else(|| Error::refused(RefusalCode::UnknownKeyspace, format!("no keyspace {keyspace}")))?;
            positions.entry(shard.id).or_default().push(at);
        }
        positions.into_iter().map(|(shard, ops)| Ok((shard, self.part(keyspace, ops)?))).collect()
    }

    fn part(&self, keyspace: KeyspaceId, positions: Vec<usize>) -> Result<Part, Error> {
        let mut tail = BytesMut::new();
        let mut ops = Vec::with_capacity(positions.len());
        for (key, value) in positions.iter().map(|at| &self.ops[*at]) {
            ops.push(match value {
                Some(value) => {
                    tail.extend_from_slice(value);
                    BatchOp::Put { key, value_bytes: value.len() as u32, condition: Condition::Always }
                }
                None => BatchOp::Delete { key, condition: Condition::Always },
            });
        }
        let head = codec::encode(&message::Batch { keyspace, ops, id: None })
            .map_err(|error| Error::refused(RefusalCode::BatchLimits, error.to_string()))?;
        Ok(Part { ops: positions, head, tail: tail.freeze() })
    }

    async fn send(self) -> Result<BatchDone, Error> {
        self.check()?;
        let inner = self.keyspace.inner();
        let deadline = deadline_in(self.within);
        let keyspace = self.keyspace.id(deadline).await?;
        let parts = self.split(inner, keyspace)?;
        let mut calls = JoinSet::new();
        let mut done = BTreeMap::new();
        for (shard, part) in parts {
            done.insert(shard, (part.ops, None));
            let inner = inner.clone();
            calls.spawn(
                async move { (shard, send_part(&inner, keyspace, shard, part.head, part.tail, deadline).await) },
            );
        }
        while let Some(joined) = calls.join_next().await {
            if let Ok((shard, outcome)) = joined
                && let Some((_, slot)) = done.get_mut(&shard)
            {
                *slot = Some(outcome);
            }
        }
        let lost = || Err(Error::Unknown { text: "the task that sent it was stopped".into() });
        let parts = done
            .into_iter()
            .map(|(shard, (ops, outcome))| BatchPart { shard: shard.0, ops, outcome: outcome.unwrap_or_else(lost) })
            .collect();
        Ok(BatchDone { parts })
    }
}

impl IntoFuture for Batch {
    type Output = Result<BatchDone, Error>;
    type IntoFuture = Call<BatchDone>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(self.send())
    }
}

async fn send_part(
    inner: &Arc<Inner>,
    keyspace: KeyspaceId,
    shard: ShardId,
    head: Vec<u8>,
    tail: Bytes,
    deadline: tokio::time::Instant,
) -> Result<Written, Error> {
    let request = Request {
        kind: Kind::Batch,
        keyspace,
        aim: Aim::Shard(shard),
        consistency: Consistency::Linearizable,
        write: true,
        head: |_| Ok(head.clone()),
        tail,
    };
    Ok(written(inner, &ask(inner, &request, deadline).await?))
}
