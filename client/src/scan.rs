//! Rows in order, page by page, over all shards that the range touches.
//!
//! Pages of all shards are fetched side by side and merged; shards that are ranges follow on each other. Of each shard at
//! most one page is held and one more fetched ahead, so that memory is bounded by twice the page size for each shard,
//! however long the scan is. Of a scan with a limit each shard is asked for its likely share; if that is little, each node
//! is asked once for all the shards that it leads, and merges them. What it cannot merge at once is asked shard by shard.

use crate::call::{Aim, Request, Span, ask_as, attempt};
use crate::error::Error;
use crate::inner::Inner;
use crate::keyspace::Keyspace;
use crate::range::KeyRange;
use crate::token::Consistency;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Header, Kind};
use shkv_proto::ids::{KeyspaceId, NodeId, ShardId};
use shkv_proto::limits::{MERGED_ROWS_MAX, MERGED_SHARDS_MAX, PAGE_BYTES_DEFAULT, PAGE_ROWS_MAX};
use shkv_proto::map::{Part, ShardInfo};
use shkv_proto::merge::{MERGED_TIME_MAX, Merge, Page, Row, share};
use shkv_proto::message::{self, RefusalCode};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

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
    fetches: JoinSet<(usize, Result<Page, Miss>)>,
}

#[derive(Debug)]
enum State {
    Fresh,
    Running { head: message::Scan, merge: Merge, sources: Vec<Source> },
    Done,
}

#[derive(Debug)]
struct Source {
    of: Shards,
    /// What is still to be fetched; `None` at its end.
    ahead: Option<message::Scan>,
    fetching: bool,
    /// The page that was fetched ahead.
    page: Option<Page>,
    /// The call in whose time its next page must come, if that has begun already.
    span: Option<Span>,
}

/// Whose rows a source has. There is at least one shard while something is still to be fetched.
#[derive(Clone, Debug)]
enum Shards {
    /// Those of the first shard, or of all of them by way of a balancer; behind it, one after the other, those of the rest, which are
    /// ranges.
    InTurn(VecDeque<ShardId>),
    /// Those of several shards, which the node merges.
    Merged(NodeId, Vec<ShardId>),
}

/// Why there is no page.
#[derive(Debug)]
enum Miss {
    /// Each shard must be asked by itself, within the time of this call.
    Apart(Span),
    Failed(Error),
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
                    let span = source.span.take().unwrap_or_else(|| Span::of(self.scan.within));
                    let page = fetch(inner, source.of.clone(), scan, self.scan.consistency, span);
                    self.fetches.spawn(async move { (at, page.await) });
                }
            }
            if merge.hungry().next().is_none() {
                continue;
            }
            match self.fetches.join_next().await {
                Some(Ok((at, page))) => {
                    sources[at].fetching = false;
                    match page {
                        Ok(page) => sources[at].page = Some(page),
                        Err(Miss::Apart(span)) => split(sources, merge, at, span),
                        Err(Miss::Failed(error)) => return Err(error),
                    }
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
        let span = Span::of(self.scan.within);
        let keyspace = self.scan.keyspace.id(span.deadline).await?;
        let mut shards = VecDeque::from(aims_of(&inner, keyspace, &self.rest, self.scan.consistency)?);
        let sources = if is_ranges(&inner, keyspace) {
            if self.scan.reverse {
                shards.make_contiguous().reverse();
            }
            Some(shards).filter(|shards| !shards.is_empty()).map(Shards::InTurn).into_iter().collect()
        } else {
            merged(&inner, &shards, self.scan.consistency, self.left, span.began)
                .unwrap_or_else(|| shards.into_iter().map(Shards::one).collect())
        };
        let page_bytes_default = (PAGE_BYTES_DEFAULT / sources.len().max(1)).max(PAGE_BYTES_MIN) as u32;
        let head = message::Scan {
            keys_only: self.scan.keys_only,
            bytes_max: self.scan.page_bytes.unwrap_or(page_bytes_default).min(inner.limits().page_bytes_max),
            ..scan_head(keyspace, &self.rest, self.scan.reverse)
        };
        let merge = Merge::new(sources.len(), self.scan.reverse);
        let source = |of| Source { of, ahead: Some(head.clone()), fetching: false, page: None, span: None };
        let sources = sources.into_iter().map(source).collect();
        self.state = State::Running { head, merge, sources };
        Ok(())
    }
}

impl Source {
    /// A page has come: what is fetched next goes on behind it, or, at the shard's end, at the next shard.
    fn go_on(&mut self, next: Option<Vec<u8>>, head: &message::Scan) {
        self.ahead = match next {
            Some(next) => self.ahead.take().map(|scan| scan.resumed(next)),
            None => match &mut self.of {
                Shards::InTurn(shards) => {
                    shards.pop_front();
                    shards.front().map(|_| head.clone())
                }
                Shards::Merged(..) => None,
            },
        };
    }
}

impl Shards {
    fn one(shard: ShardId) -> Self {
        Self::InTurn(VecDeque::from([shard]))
    }
}

/// The sources of a scan that asks each node once for all the shards that it answers for; `None` where the shards must be asked
/// one by one, or enough is wanted of each to do so.
fn merged(
    inner: &Inner,
    shards: &VecDeque<ShardId>,
    consistency: Consistency,
    rows: u64,
    now: Instant,
) -> Option<Vec<Shards>> {
    if consistency == Consistency::Causal || inner.config.through_balancer {
        return None;
    }
    let view = inner.view();
    let mut nodes: BTreeMap<NodeId, Vec<ShardId>> = BTreeMap::new();
    for shard in shards {
        let info = view.routes.map().shard(*shard)?;
        let peer = view.peer_for(info, inner.wanted(consistency, *shard), &[], 1, || now)?;
        nodes.entry(peer.node).or_default().push(*shard);
    }
    let sources = nodes.iter().flat_map(|(node, shards)| {
        shards.chunks(MERGED_SHARDS_MAX).map(|some| match some {
            [shard] => Shards::one(*shard),
            some => Shards::Merged(*node, some.to_vec()),
        })
    });
    let sources: Vec<Shards> = sources.collect();
    let few = share(usize::try_from(rows).unwrap_or(usize::MAX), sources.len()) <= MERGED_ROWS_MAX;
    few.then_some(sources)
}

/// Makes a source of each shard of a source.
fn split(sources: &mut Vec<Source>, merge: &mut Merge, at: usize, span: Span) {
    let Shards::Merged(_, shards) = &sources[at].of else { return };
    let (shards, ahead) = (shards.clone(), sources[at].ahead.clone());
    for (number, shard) in shards.into_iter().enumerate() {
        let (of, ahead) = (Shards::one(shard), ahead.clone());
        let source = Source { of, ahead, fetching: false, page: None, span: Some(span) };
        if number == 0 {
            sources[at] = source;
        } else {
            merge.add();
            sources.push(source);
        }
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
        with: vec![],
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
    of: Shards,
    scan: message::Scan,
    consistency: Consistency,
    span: Span,
) -> Result<Page, Miss> {
    let page = match of {
        Shards::InTurn(shards) => fetch_one(&inner, shards[0], &scan, consistency, span).await?,
        Shards::Merged(node, shards) => fetch_merged(&inner, node, &shards, &scan, consistency, span).await?,
    };
    let gets_on = page.next.as_ref().is_none_or(|next| {
        if scan.reverse { scan.end.as_ref().is_none_or(|end| next < end) } else { *next > scan.start }
    });
    if !gets_on {
        return Err(Miss::Failed(Error::unavailable("a shard's scan does not get on"))); // or the scan would never end
    }
    Ok(page)
}

async fn fetch_one(
    inner: &Arc<Inner>,
    shard: ShardId,
    scan: &message::Scan,
    consistency: Consistency,
    span: Span,
) -> Result<Page, Miss> {
    let request = Request {
        kind: Kind::Scan,
        keyspace: scan.keyspace,
        aim: if shard == ShardId::UNROUTED { Aim::Keyspace } else { Aim::Shard(shard) },
        consistency,
        ticket: None,
        head: |consistency, _| codec::encode(&message::Scan { consistency, ..scan.clone() }),
        tail: Bytes::new(),
    };
    let read = |answer: Frame, _| Page::decode(&answer.head, answer.tail);
    let page = ask_as(inner, &request, span, read).await.map_err(Miss::Failed)?;
    inner.saw(shard, page.revision);
    Ok(page)
}

/// Asks a node once. What it cannot answer is asked of each shard, by [`ask_as`], which learns and tries again.
async fn fetch_merged(
    inner: &Arc<Inner>,
    node: NodeId,
    shards: &[ShardId],
    scan: &message::Scan,
    consistency: Consistency,
    span: Span,
) -> Result<Page, Miss> {
    let apart = || Miss::Apart(span);
    let view = inner.view();
    let (shard, with) = shards.split_first().ok_or_else(apart)?;
    let peer = view.peer(node).ok_or_else(apart)?;
    let consistency = inner.wanted(consistency, *shard);
    let scan = message::Scan { consistency, with: with.to_vec(), ..scan.clone() };
    let head = codec::encode(&scan).map_err(|_| apart())?;
    let header = Header { shard: *shard, epoch: view.routes.map().epoch, ..Header::new(Kind::Scan) };
    let until = span.began + MERGED_TIME_MAX.min((span.deadline - span.began) / 2);
    let answer = attempt(peer.link(), Frame::new(header, head, Bytes::new()), span.began, until).await;
    let page = answer.ok().and_then(|answer| Page::decode(&answer.head, answer.tail).ok());
    let page = page.filter(|page| page.with.len() == with.len()).ok_or_else(apart)?;
    for (shard, revision) in shards.iter().zip(std::iter::once(&page.revision).chain(&page.with)) {
        inner.saw(*shard, *revision);
    }
    Ok(page)
}
