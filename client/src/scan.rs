//! Rows in order, page by page, over all shards that the range touches.
//!
//! Pages of all shards are fetched side by side and merged; shards that are ranges follow on each other. Of each shard at
//! most one page is held and one more fetched ahead, so that memory is bounded by twice the page size for each shard,
//! however long the scan is. Of a scan with a limit each shard is asked for its likely share.

use crate::call::{Aim, Request, Span, ask_as};
use crate::error::Error;
use crate::inner::Inner;
use crate::keyspace::Keyspace;
use crate::range::KeyRange;
use crate::token::Consistency;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Kind};
use shkv_proto::ids::{KeyspaceId, ShardId};
use shkv_proto::limits::{PAGE_BYTES_DEFAULT, PAGE_ROWS_MAX};
use shkv_proto::map::{Part, ShardInfo};
use shkv_proto::merge::{Merge, Page, Row, share};
use shkv_proto::message::{self, RefusalCode};
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;

/// Smallest page that is asked of a shard when the caller names no size.
const PAGE_BYTES_MIN: usize = 64 << 10;

/// A scan that is not yet begun; see [`crate::Client::scan`]. [`Scan::rows`] begins it.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let mut keys = client.scan(..).prefix("city/").keys_only().limit(1_000).rows();
/// while let Some(row) = keys.next().await? {
///     println!("{:?}", row.key);
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
#[must_use = "a scan is begun by rows()"]
pub struct Scan {
    keyspace: Keyspace,
    range: KeyRange,
    reverse: bool,
    keys_only: bool,
    limit: Option<u64>,
    page_bytes: Option<u32>,
    consistency: Consistency,
    within: Duration,
}

impl Scan {
    pub(crate) fn new(keyspace: Keyspace, range: KeyRange) -> Self {
        let within = keyspace.inner().config.deadline;
        Self {
            keyspace,
            range,
            reverse: false,
            keys_only: false,
            limit: None,
            page_bytes: None,
            consistency: Consistency::default(),
            within,
        }
    }

    /// Only keys of the range that begin with `prefix`.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).prefix("city/").rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn prefix(mut self, prefix: impl AsRef<[u8]>) -> Self {
        self.range = self.range.and(KeyRange::prefix(prefix));
        self
    }

    /// From the last key to the first.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).reverse().rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn reverse(mut self) -> Self {
        self.reverse = true;
        self
    }

    /// Leave out the values.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).keys_only().rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn keys_only(mut self) -> Self {
        self.keys_only = true;
        self
    }

    /// At most this many rows.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).limit(10).rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn limit(mut self, rows: u64) -> Self {
        self.limit = Some(rows);
        self
    }

    /// Bytes of keys and values in a page of one shard, cut to what the cluster allows. A page has at least one row.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).page_bytes(64 << 10).rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn page_bytes(mut self, bytes: u32) -> Self {
        self.page_bytes = Some(bytes.max(1));
        self
    }

    /// How fresh each page must be; linearizable unless said otherwise. Pages are not of one moment.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).consistency(shkv_client::Consistency::Causal).rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn consistency(mut self, consistency: Consistency) -> Self {
        self.consistency = consistency;
        self
    }

    /// How long each page may take, an hour at most.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).deadline(std::time::Duration::from_millis(200)).rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    pub fn deadline(mut self, within: Duration) -> Self {
        self.within = within;
        self
    }

    /// Begins it. Nothing is sent before the first [`Rows::next`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let first = client.scan(..).rows().next().await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn rows(self) -> Rows {
        let left = self.limit.unwrap_or(u64::MAX);
        let rest = self.range.clone();
        Rows { scan: self, state: State::Fresh, rest, left, fetches: JoinSet::new() }
    }
}

/// The rows of a scan.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// let mut rows = client.scan(..).limit(10).rows();
/// while let Some(row) = rows.next().await? {
///     println!("{:?}", row.key);
/// }
/// if let Some(rest) = rows.cursor() {
///     let mut next_page = client.scan(rest).limit(10).rows();
/// }
/// # Ok(())
/// # }
/// ```
#[derive(Debug)]
pub struct Rows {
    scan: Scan,
    state: State,
    /// What is left behind the last row that was given out.
    rest: KeyRange,
    /// Rows that may still be given out.
    left: u64,
    /// Pages under way, at most one for each source. They are stopped when the scan is dropped.
    fetches: JoinSet<(usize, Result<Page, Error>)>,
}

#[derive(Debug)]
enum State {
    Fresh,
    Running { head: message::Scan, merge: Merge, sources: Vec<Source> },
    Done,
}

/// One shard of the scan whose keys are hashed; or all shards, one after the other, that are ranges; or all of them by
/// way of a balancer.
#[derive(Debug)]
struct Source {
    shard: ShardId,
    /// What comes behind it.
    others: VecDeque<ShardId>,
    /// What is still to be fetched; `None` at its end.
    ahead: Option<message::Scan>,
    fetching: bool,
    /// The page that was fetched ahead.
    page: Option<Page>,
}

impl Rows {
    /// The next row; `None` at the end of the range or at the limit.
    ///
    /// It may be dropped while it waits without a row being lost, and called again after an error: it goes on where
    /// it was.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Refused`].
    ///
    /// ```no_run
    /// # async fn example(mut rows: shkv_client::Rows) -> Result<(), shkv_client::Error> {
    /// while let Some(row) = rows.next().await? {
    ///     println!("{:?}", row.key);
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn next(&mut self) -> Result<Option<Row>, Error> {
        if self.left == 0 {
            return Ok(None);
        }
        if matches!(self.state, State::Fresh) {
            self.begin().await?;
        }
        loop {
            let State::Running { head, merge, sources } = &mut self.state else { return Ok(None) };
            if let Some(row) = merge.pop() {
                self.left -= 1;
                self.rest.pass(&row.key, self.scan.reverse);
                return Ok(Some(row));
            }
            let hungry: Vec<usize> = merge.hungry().collect();
            if hungry.is_empty() {
                self.state = State::Done;
                return Ok(None);
            }
            let share = share(usize::try_from(self.left).unwrap_or(usize::MAX), sources.len()).min(PAGE_ROWS_MAX);
            let under_way = sources.iter().filter(|source| source.fetching).count();
            for at in hungry {
                let source = &mut sources[at];
                if let Some(page) = source.page.take() {
                    let is_empty = page.rows.is_empty();
                    source.go_on(page.next, head);
                    merge.feed(at, page.rows, source.ahead.is_none());
                    if !is_empty && (merge.rows() + under_way * share) as u64 >= self.left {
                        continue; // what is here or on its way reaches the limit: most likely no more of the shard is wanted
                    }
                }
                if let Some(scan) = source.ahead.as_ref().filter(|_| !source.fetching && source.page.is_none()) {
                    source.fetching = true;
                    let rows_max = share as u32;
                    let (inner, scan) =
                        (self.scan.keyspace.inner().clone(), message::Scan { rows_max, ..scan.clone() });
                    let page = fetch(inner, source.shard, scan, self.scan.consistency, self.scan.within);
                    self.fetches.spawn(async move { (at, page.await) });
                }
            }
            if merge.hungry().next().is_none() {
                continue;
            }
            match self.fetches.join_next().await {
                Some(Ok((at, page))) => {
                    sources[at].fetching = false;
                    sources[at].page = Some(page?);
                }
                Some(Err(_)) => {
                    // Which page it was is not known, so all that are under way are fetched anew.
                    self.fetches = JoinSet::new();
                    sources.iter_mut().for_each(|source| source.fetching = false);
                    return Err(Error::unavailable("the task that fetched a page was stopped"));
                }
                None => {} // every hungry source had its page already
            }
        }
    }

    /// The range that is left behind the last row given out, from which another scan can go on; `None` when the range
    /// is done.
    ///
    /// ```no_run
    /// # fn example(rows: shkv_client::Rows) {
    /// if let Some(rest) = rows.cursor() {
    ///     println!("go on at {:?}", rest.start);
    /// }
    /// # }
    /// ```
    #[must_use]
    pub fn cursor(&self) -> Option<KeyRange> {
        let done = matches!(self.state, State::Done) || self.rest.is_empty();
        (!done).then(|| self.rest.clone())
    }

    async fn begin(&mut self) -> Result<(), Error> {
        if self.rest.is_empty() {
            self.state = State::Done;
            return Ok(());
        }
        let inner = self.scan.keyspace.inner().clone();
        let keyspace = self.scan.keyspace.id(Span::of(self.scan.within).deadline).await?;
        let mut shards = VecDeque::from(aims_of(&inner, keyspace, &self.rest, self.scan.consistency)?);
        let aims: Vec<(ShardId, VecDeque<ShardId>)> = if is_ranges(&inner, keyspace) {
            if self.scan.reverse {
                shards.make_contiguous().reverse();
            }
            shards.pop_front().map(|first| (first, shards)).into_iter().collect()
        } else {
            shards.into_iter().map(|shard| (shard, VecDeque::new())).collect()
        };
        let page_bytes_default = (PAGE_BYTES_DEFAULT / aims.len().max(1)).max(PAGE_BYTES_MIN) as u32;
        let head = message::Scan {
            keys_only: self.scan.keys_only,
            bytes_max: self.scan.page_bytes.unwrap_or(page_bytes_default).min(inner.limits().page_bytes_max),
            ..scan_head(keyspace, &self.rest, self.scan.reverse)
        };
        let merge = Merge::new(aims.len(), self.scan.reverse);
        let source = |(shard, others)| Source { shard, others, ahead: Some(head.clone()), fetching: false, page: None };
        let sources = aims.into_iter().map(source).collect();
        self.state = State::Running { head, merge, sources };
        Ok(())
    }
}

impl Source {
    /// A page has come: what is fetched next goes on behind it, or, at the shard's end, at the next shard.
    fn go_on(&mut self, next: Option<Vec<u8>>, head: &message::Scan) {
        self.ahead = match next {
            Some(next) => self.ahead.take().map(|scan| scan.resumed(next)),
            None => self.others.pop_front().map(|shard| {
                self.shard = shard;
                head.clone()
            }),
        };
    }
}

/// Whether the shards of a keyspace are ranges of keys.
fn is_ranges(inner: &Inner, keyspace: KeyspaceId) -> bool {
    inner.view().routes.map().shards_of(keyspace).any(|shard| matches!(shard.part, Part::Range { .. }))
}

/// The head of a scan of `range` without limits.
pub(crate) fn scan_head(keyspace: KeyspaceId, range: &KeyRange, reverse: bool) -> message::Scan {
    message::Scan {
        keyspace,
        start: range.start.clone(),
        end: range.end.clone(),
        reverse,
        keys_only: false,
        rows_max: 0,
        bytes_max: 0,
        consistency: message::Consistency::Linearizable,
    }
}

/// The shards that can hold keys of `range`, in the order of their keys if they are ranges. It is [`ShardId::UNROUTED`] alone where a balancer merges; a causal scan
/// goes to each shard, because a revision is of one shard.
pub(crate) fn aims_of(
    inner: &Inner,
    keyspace: KeyspaceId,
    range: &KeyRange,
    consistency: Consistency,
) -> Result<Vec<ShardId>, Error> {
    if inner.config.through_balancer && consistency != Consistency::Causal {
        return Ok(vec![ShardId::UNROUTED]);
    }
    let view = inner.view();
    let mut parts: Vec<&ShardInfo> = view.routes.map().shards_of(keyspace).collect();
    parts.sort_by_key(|shard| match &shard.part {
        Part::Hash { .. } => &[],
        Part::Range { start, .. } => &start[..],
    });
    let known = !parts.is_empty();
    let mut shards = Vec::new();
    for shard in parts {
        let touched = match &shard.part {
            Part::Hash { .. } => true,
            Part::Range { start, end } => {
                let part = KeyRange { start: start.clone(), end: end.clone() };
                !part.and(range.clone()).is_empty()
            }
        };
        if touched {
            shards.push(shard.id);
        }
    }
    if known {
        Ok(shards)
    } else {
        Err(Error::refused(RefusalCode::UnknownKeyspace, format!("no keyspace {keyspace}")))
    }
}

async fn fetch(
    inner: Arc<Inner>,
    shard: ShardId,
    scan: message::Scan,
    consistency: Consistency,
    within: Duration,
) -> Result<Page, Error> {
    let request = Request {
        kind: Kind::Scan,
        keyspace: scan.keyspace,
        aim: if shard == ShardId::UNROUTED { Aim::Keyspace } else { Aim::Shard(shard) },
        consistency,
        ticket: None,
        head: |consistency, _| codec::encode(&message::Scan { consistency, ..scan.clone() }),
        tail: Bytes::new(),
    };
    let read = |answer: Frame| Page::decode(&answer.head, answer.tail);
    let (page, _) = ask_as(&inner, &request, Span::of(within), read).await?;
    inner.saw(shard, page.revision);
    let gets_on = page.next.as_ref().is_none_or(|next| {
        if scan.reverse { scan.end.as_ref().is_none_or(|end| next < end) } else { *next > scan.start }
    });
    if !gets_on {
        return Err(Error::unavailable("a shard's scan does not get on")); // or the scan would never end
    }
    Ok(page)
}
