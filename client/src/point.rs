//! Operations on one row: get, put, delete.

use crate::call::{Aim, Answered, Request, Span, ask};
use crate::check::{Check, check_condition};
use crate::error::Error;
use crate::keyspace::Keyspace;
use crate::token::Consistency;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::frame::Kind;
use shkv_proto::limits::Limits;
use shkv_proto::merge::Row;
use shkv_proto::message::{self, GetDone, RefusalCode, WriteDone};
use std::future::{Future, IntoFuture};
use std::pin::Pin;
use std::time::Duration;

/// A call under way.
pub(crate) type Call<T> = Pin<Box<dyn Future<Output = Result<T, Error>> + Send>>;

/// The shard has taken a write: it is on the disks of a majority of its replicas.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let written = client.put("k", "v").await?;
/// assert!(written.version > 0);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Written {
    /// The row's version, which is the shard's revision after the write.
    pub version: u64,
    /// Rows that a delete found and removed. Puts do not look whether there was a row before.
    pub removed: u32,
}

/// The whole answer to a get.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let answer = client.get("k").answer().await?;
/// println!("read as {:?}", answer.consistency);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The row, if there is one.
    pub row: Option<Row>,
    /// What the answer holds to.
    pub consistency: Consistency,
    /// The shard's revision at which it was read.
    pub revision: u64,
}

/// A get that is not yet sent; see [`crate::Client::get`]. Awaiting it gives the row, if there is one.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// use shkv_client::Consistency;
/// use std::time::Duration;
///
/// let get = client.get("k").consistency(Consistency::Eventual).deadline(Duration::from_millis(100));
/// let row = get.await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a get is sent when it is awaited"]
pub struct Get {
    keyspace: Keyspace,
    key: Bytes,
    consistency: Consistency,
    within: Duration,
}

impl Get {
    pub(crate) fn new(keyspace: Keyspace, key: &[u8]) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, key: Bytes::copy_from_slice(key), consistency: Consistency::default(), within }
    }

    /// How fresh the answer must be; linearizable unless said otherwise.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let row = client.get("k").consistency(shkv_client::Consistency::Eventual).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let row = client.get("k").deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Sends it, and gives the row together with what the answer holds to.
    ///
    /// # Errors
    /// [`Error::Refused`] or [`Error::Unavailable`]; a read's outcome is never unknown.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let answer = client.get("k").answer().await?;
    /// println!("at revision {}", answer.revision);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn answer(self) -> Result<Answer, Error> {
        let (inner, key) = (self.keyspace.inner(), &self.key);
        check_key(inner.limits(), key)?;
        let span = Span::of(self.within);
        let keyspace = self.keyspace.id(span.deadline).await?;
        let request = Request {
            kind: Kind::Get,
            keyspace,
            aim: Aim::Key(key),
            consistency: self.consistency,
            ticket: None,
            head: |consistency, _| codec::encode(&message::Get { keyspace, key, consistency }),
            tail: Bytes::new(),
        };
        let Answered { head, tail, shard }: Answered<GetDone> = ask(inner, &request, span).await?;
        inner.saw(shard, head.revision);
        let row = head.version.map(|version| Row { key: self.key, version, value: tail });
        Ok(Answer { row, consistency: head.consistency.into(), revision: head.revision })
    }
}

impl IntoFuture for Get {
    type Output = Result<Option<Row>, Error>;
    type IntoFuture = Call<Option<Row>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move { Ok(self.answer().await?.row) })
    }
}

/// A put that is not yet sent; see [`crate::Client::put`]. Awaiting it gives what was [`Written`].
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// client.put("k", "v").deadline(std::time::Duration::from_secs(1)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a put is sent when it is awaited"]
pub struct Put {
    keyspace: Keyspace,
    key: Bytes,
    value: Bytes,
    check: Check,
    within: Duration,
}

impl Put {
    pub(crate) fn new(keyspace: Keyspace, key: &[u8], value: Bytes) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, key: Bytes::copy_from_slice(key), value, check: Check::Always, within }
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.put("k", "v").deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }
}

impl IntoFuture for Put {
    type Output = Result<Written, Error>;
    type IntoFuture = Call<Written>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            check_value(self.keyspace.inner().limits(), &self.value)?;
            write(Kind::Put, &self.keyspace, &self.key, self.value, &self.check, self.within).await
        })
    }
}

/// A delete that is not yet sent; see [`crate::Client::delete`]. Awaiting it gives what was [`Written`].
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// client.delete("k").deadline(std::time::Duration::from_secs(1)).await?;
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
#[must_use = "a delete is sent when it is awaited"]
pub struct Delete {
    keyspace: Keyspace,
    key: Bytes,
    check: Check,
    within: Duration,
}

impl Delete {
    pub(crate) fn new(keyspace: Keyspace, key: &[u8]) -> Self {
        let within = keyspace.inner().config.deadline;
        Self { keyspace, key: Bytes::copy_from_slice(key), check: Check::Always, within }
    }

    /// How long the call may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.delete("k").deadline(std::time::Duration::from_millis(200)).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }
}

impl IntoFuture for Delete {
    type Output = Result<Written, Error>;
    type IntoFuture = Call<Written>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(
            async move { write(Kind::Delete, &self.keyspace, &self.key, Bytes::new(), &self.check, self.within).await },
        )
    }
}

/// What a put and a delete may be conditional on. Of several the last counts.
macro_rules! conditions {
    ($type:ty, $example:literal) => {
        impl $type {
            /// Only if there is no such row; otherwise it ends with [`Error::Condition`] and the version of the row.
            ///
            /// ```no_run
            /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
            #[doc = concat!("client.", $example, ".if_absent().await?;")]
            /// # Ok(())
            /// # }
            /// ```
            pub fn if_absent(mut self) -> Self {
                self.check = Check::Absent;
                self
            }

            /// Only if there is such a row; otherwise it ends with [`Error::Condition`].
            ///
            /// ```no_run
            /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
            #[doc = concat!("client.", $example, ".if_present().await?;")]
            /// # Ok(())
            /// # }
            /// ```
            pub fn if_present(mut self) -> Self {
                self.check = Check::Present;
                self
            }

            /// Only if this holds of the row; otherwise it ends with [`Error::Condition`].
            ///
            /// ```no_run
            /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
            #[doc = concat!("client.", $example, ".check(shkv_client::Check::Present).await?;")]
            /// # Ok(())
            /// # }
            /// ```
            pub fn check(mut self, check: Check) -> Self {
                self.check = check;
                self
            }

            /// Only if the row has this version; otherwise it ends with [`Error::Condition`] and the version that it
            /// has, `None` if there is no such row.
            ///
            /// ```no_run
            /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
            /// if let Some(row) = client.get("k").await? {
            #[doc = concat!("    client.", $example, ".if_version(row.version).await?;")]
            /// }
            /// # Ok(())
            /// # }
            /// ```
            pub fn if_version(mut self, version: u64) -> Self {
                self.check = Check::Version(version);
                self
            }

            /// Only if the row has this value, of 1 MiB at most; otherwise it ends with [`Error::Condition`] and the
            /// version that it has, `None` if there is no such row.
            ///
            /// ```no_run
            /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
            #[doc = concat!("client.", $example, ".if_value(\"before\").await?;")]
            /// # Ok(())
            /// # }
            /// ```
            pub fn if_value(mut self, value: impl Into<Bytes>) -> Self {
                self.check = Check::Value(value.into());
                self
            }
        }
    };
}

conditions!(Put, "put(\"k\", \"v\")");
conditions!(Delete, "delete(\"k\")");

async fn write(
    kind: Kind,
    keyspace: &Keyspace,
    key: &[u8],
    tail: Bytes,
    check: &Check,
    within: Duration,
) -> Result<Written, Error> {
    let inner = keyspace.inner();
    check_key(inner.limits(), key)?;
    check_condition(check)?;
    let span = Span::of(within);
    let keyspace = keyspace.id(span.deadline).await?;
    let ticket = inner.lanes.begin();
    let request = Request {
        kind,
        keyspace,
        aim: Aim::Key(key),
        consistency: Consistency::Linearizable,
        ticket: Some(&ticket),
        head: |_, id| codec::encode(&message::Write { keyspace, key, condition: check.condition(), id }),
        tail,
    };
    let Answered { head, shard, .. }: Answered<WriteDone> = ask(inner, &request, span).await?;
    inner.saw(shard, head.revision);
    Ok(Written { version: head.revision, removed: head.removed })
}

/// Refuses a key that no shard would take.
pub(crate) fn check_key(limits: &Limits, key: &[u8]) -> Result<(), Error> {
    if key.is_empty() {
        return Err(Error::refused(RefusalCode::KeyEmpty, "the key is empty; a key has at least one byte"));
    }
    if key.len() > limits.key_bytes_max as usize {
        let text = format!("a key of {} bytes is over KEY_BYTES_MAX = {}", key.len(), limits.key_bytes_max);
        return Err(Error::refused(RefusalCode::KeyTooLarge, text));
    }
    Ok(())
}

/// Refuses a value that no shard would take.
pub(crate) fn check_value(limits: &Limits, value: &[u8]) -> Result<(), Error> {
    if value.len() > limits.value_bytes_max as usize {
        let text = format!("a value of {} bytes is over VALUE_BYTES_MAX = {}", value.len(), limits.value_bytes_max);
        return Err(Error::refused(RefusalCode::ValueTooLarge, text));
    }
    Ok(())
}
