//! Mini-transactions: what is looked at, read and written in one step (Aguilera et al., Sinfonia, SOSP 2007).

use crate::call::{Aim, Answered, Request, Span, ask};
use crate::check::{Check, check_condition};
use crate::error::Error;
use crate::keyspace::Keyspace;
use crate::point::{check_key, check_value};
use crate::token::Consistency;
use bytes::{Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::frame::Kind;
use shkv_proto::limits::Limits;
use shkv_proto::merge::Row;
use shkv_proto::message::{BatchDone, BatchOp, RefusalCode};
use std::collections::BTreeMap;
use std::time::Duration;

/// Checks, reads and writes that are not yet sent; see [`crate::Client::txn`]. [`Txn::commit`] sends them.
///
/// If all checks hold, everything is done in one step, whatever shards the keys lie in; otherwise nothing is. Checks and
/// reads see the rows as they are before it. It holds 1 to 10,000 operations and at most 8 MiB, and each key stands in it
/// once: what is written on a condition is [`Txn::put_if`] and [`Txn::delete_if`].
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// use shkv_client::{Check, Error};
///
/// let read = client.txn().read("ada").read("bob").commit().await?;
/// let (Some(ada), Some(bob)) = (read.row("ada"), read.row("bob")) else { return Ok(()) };
/// let moved = client
///     .txn()
///     .put_if("ada", "90", Check::Version(ada.version))
///     .put_if("bob", "110", Check::Version(bob.version));
/// match moved.commit().await {
///     Ok(_) => println!("moved"),
///     Err(Error::Condition { operation, .. }) => println!("account {operation} has changed meanwhile"),
///     Err(error) => return Err(error),
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a transaction is sent when it is committed"]
pub struct Txn {
    keyspace: Keyspace,
    keys: Vec<Bytes>,
    ops: Vec<Op>,
    within: Duration,
}

/// What is done with a key.
#[derive(Debug)]
enum Op {
    Put(Bytes, Check),
    Delete(Check),
    Check(Check),
    Read,
}

impl Op {
    fn check(&self) -> Option<&Check> {
        match self {
            Self::Put(_, check) | Self::Delete(check) | Self::Check(check) => Some(check),
            Self::Read => None,
        }
    }

    fn value(&self) -> &[u8] {
        match self {
            Self::Put(value, _) => value,
            Self::Delete(_) | Self::Check(_) | Self::Read => &[],
        }
    }
}

/// A transaction or a batch was done: it is on the disks of a majority of the replicas of each shard that it touches.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let done = client.txn().read("a").read("b").delete("c").commit().await?;
/// println!("a was {:?}, b was {:?}, {} rows removed", done.rows[0], done.rows[1], done.removed);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Committed {
    /// Rows that deletes found and removed.
    pub removed: u32,
    /// Shards that it touched, with their revisions after it. One that could not be reached in time to tell is left out.
    pub revisions: Vec<(u32, u64)>,
    /// What each read found, in their order.
    pub rows: Vec<Option<Row>>,
}

impl Committed {
    /// The row of this key, if it was read and is there.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let done = client.txn().read("a").put("b", "1").commit().await?;
    /// println!("{:?}", done.row("a"));
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn row(&self, key: impl AsRef<[u8]>) -> Option<&Row> {
        self.rows.iter().flatten().find(|row| row.key == key.as_ref())
    }
}

impl Txn {
    pub(crate) fn new(keyspace: Keyspace) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, keys: Vec::new(), ops: Vec::new(), within }
    }

    fn with(mut self, key: impl AsRef<[u8]>, op: Op) -> Self {
        self.keys.push(Bytes::copy_from_slice(key.as_ref()));
        self.ops.push(op);
        self
    }

    /// Adds a condition on a row that is not written.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().check("locked", shkv_client::Check::Absent).put("k", "v").commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn check(self, key: impl AsRef<[u8]>, check: Check) -> Self {
        self.with(key, Op::Check(check))
    }

    /// Adds a put.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().put("k", "v").commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn put(self, key: impl AsRef<[u8]>, value: impl Into<Bytes>) -> Self {
        self.put_if(key, value, Check::Always)
    }

    /// Adds a put and a condition on the row that it replaces.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().put_if("k", "v", shkv_client::Check::Version(7)).commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn put_if(self, key: impl AsRef<[u8]>, value: impl Into<Bytes>, check: Check) -> Self {
        self.with(key, Op::Put(value.into(), check))
    }

    /// Adds a delete.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().delete("k").commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn delete(self, key: impl AsRef<[u8]>) -> Self {
        self.delete_if(key, Check::Always)
    }

    /// Adds a delete and a condition on the row that it removes.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().delete_if("k", shkv_client::Check::Value("v".into())).commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn delete_if(self, key: impl AsRef<[u8]>, check: Check) -> Self {
        self.with(key, Op::Delete(check))
    }

    /// Adds a read.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let both = client.txn().read("a").read("b").commit().await?; // of one moment
    /// # Ok(())
    /// # }
    /// ```
    pub fn read(self, key: impl AsRef<[u8]>) -> Self {
        self.with(key, Op::Read)
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.txn().read("k").deadline(std::time::Duration::from_millis(200)).commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Sends it. One that meets another transaction on its way is sent again, until its deadline.
    ///
    /// # Errors
    /// [`Error::Condition`] with the operation whose check does not hold and the version that its row has,
    /// [`Error::Refused`] with the operation that is wrong, [`Error::Unavailable`], or [`Error::Unknown`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let done = client.txn().read("a").put("b", "1").commit().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn commit(self) -> Result<Committed, Error> {
        let inner = self.keyspace.inner();
        refuse(inner.limits(), &self.keys, &self.ops)?;
        let span = Span::of(self.within);
        let keyspace = self.keyspace.id(span.deadline).await?;
        let (ops, tail) = self.encoded();
        let ticket = inner.lanes.begin();
        let request = Request {
            kind: Kind::Batch,
            keyspace,
            aim: Aim::Keys(&self.keys),
            consistency: Consistency::Linearizable,
            ticket: Some(&ticket),
            head: |_, id| codec::encode(&shkv_proto::message::Batch { keyspace, ops: ops.clone(), id }),
            tail,
        };
        let Answered { head, tail, .. }: Answered<BatchDone> = ask(inner, &request, span).await?;
        for (shard, revision) in &head.revisions {
            inner.saw(*shard, *revision);
        }
        let rows = self.rows(&head, tail)?;
        let revisions = head.revisions.iter().map(|(shard, revision)| (shard.0, *revision)).collect();
        Ok(Committed { removed: head.removed, revisions, rows })
    }

    /// The operations as they are sent, and the values of the puts one behind the other.
    fn encoded(&self) -> (Vec<BatchOp<'_>>, Bytes) {
        let mut tail = BytesMut::new();
        let ops = self.keys.iter().zip(&self.ops).map(|(key, op)| match op {
            Op::Put(value, check) => {
                tail.extend_from_slice(value);
                BatchOp::Put { key, value_bytes: value.len() as u32, condition: check.condition() }
            }
            Op::Delete(check) => BatchOp::Delete { key, condition: check.condition() },
            Op::Check(check) => BatchOp::Check { key, condition: check.condition() },
            Op::Read => BatchOp::Read { key },
        });
        (ops.collect(), tail.freeze())
    }

    /// The rows that were read, with their keys.
    fn rows(&self, done: &BatchDone, mut values: Bytes) -> Result<Vec<Option<Row>>, Error> {
        let odd = || Error::Unknown { text: "it was done, but the answer does not fit what was to be read".into() };
        let reads = self.keys.iter().zip(&self.ops).filter(|(_, op)| matches!(op, Op::Read));
        let keys: Vec<&Bytes> = reads.map(|(key, _)| key).collect();
        if keys.len() != done.rows.len() {
            return Err(odd());
        }
        let mut rows = Vec::with_capacity(keys.len());
        for (key, found) in keys.into_iter().zip(&done.rows) {
            rows.push(match found {
                Some(found) if found.value_bytes as usize > values.len() => return Err(odd()),
                Some(found) => {
                    let value = values.split_to(found.value_bytes as usize);
                    Some(Row { key: key.clone(), version: found.version, value })
                }
                None => None,
            });
        }
        if values.is_empty() { Ok(rows) } else { Err(odd()) }
    }
}

/// Refuses what a shard would refuse, and says which operation is wrong.
fn refuse(limits: &Limits, keys: &[Bytes], ops: &[Op]) -> Result<(), Error> {
    let refused = |text| Err(Error::refused(RefusalCode::BatchLimits, text));
    if ops.is_empty() {
        return refused("the batch is empty; add an operation".to_owned());
    }
    if ops.len() > limits.batch_ops_max as usize {
        return refused(format!("{} operations are over BATCH_OPS_MAX = {}", ops.len(), limits.batch_ops_max));
    }
    let mut seen: BTreeMap<&[u8], usize> = BTreeMap::new();
    let mut bytes = 0;
    for (at, (key, op)) in keys.iter().zip(ops).enumerate() {
        let of_it = |error| match error {
            Error::Refused { code, text } => Error::Refused { code, text: format!("operation {at}: {text}") },
            other => other,
        };
        check_key(limits, key).map_err(of_it)?;
        check_value(limits, op.value()).map_err(of_it)?;
        op.check().map_or(Ok(()), check_condition).map_err(of_it)?;
        bytes += key.len() + op.value().len() + op.check().map_or(0, Check::bytes);
        if let Some(first) = seen.insert(key, at) {
            let shown = String::from_utf8_lossy(key);
            return refused(format!(
                "operation {at}: key {shown:?} is that of operation {first}; a key stands in a batch once"
            ));
        }
    }
    if bytes > limits.batch_bytes_max as usize {
        return refused(format!("{bytes} bytes are over BATCH_BYTES_MAX = {}", limits.batch_bytes_max));
    }
    Ok(())
}
