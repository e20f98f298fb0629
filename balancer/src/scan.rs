//! Scans and counts over all shards of a keyspace, merged into one.
//!
//! Of each shard a fraction of the page is asked at first: with hashed keys every shard holds about the same share of
//! any range, so that little is read in vain. The page never grows beyond what was asked for by more than one row. Of a page of
//! few rows each node is asked once for all the shards that it leads; what it cannot merge is asked shard by shard.

use crate::cluster::Cluster;
use crate::forward::{self, Request, Way};
use bytes::{BufMut, Bytes, BytesMut};
use shkv_proto::codec;
use shkv_proto::limits::{MERGED_ROWS_MAX, MERGED_SHARDS_MAX, PAGE_BYTES_DEFAULT, PAGE_BYTES_MAX, PAGE_ROWS_MAX};
use shkv_proto::map::{Part, ShardInfo};
use shkv_proto::merge::{self, MERGED_TIME_MAX, Merge, Row, share};
use shkv_proto::message::{Consistency, CountDone, Failure, RowHead, Scan, ScanDone};
use shkv_proto::route::Routes;
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// Shards that are asked at the same time for one request.
const FETCHES_MAX: usize = 32;
/// Fewest bytes that are asked of a shard at once: below, the asking costs more than the reading.
const FETCH_BYTES_MIN: usize = 4 << 10;

/// A scan or count of a whole keyspace.
#[derive(Clone, Debug)]
pub(crate) struct Whole {
    /// The request's header.
    pub(crate) header: Header,
    /// What is asked for.
    pub(crate) scan: Scan,
    /// When whoever asks gives up.
    pub(crate) deadline: Instant,
    /// Which of a node's links are used.
    pub(crate) lane: usize,
}

/// The shards of the scan's keyspace that may hold rows of its range.
pub(crate) fn shards_of(map: &shkv_proto::Map, scan: &Scan) -> Vec<ShardId> {
    map.shards_of(scan.keyspace).filter(|shard| meets(shard, scan)).map(|shard| shard.id).collect()
}

fn meets(shard: &ShardInfo, scan: &Scan) -> bool {
    match &shard.part {
        Part::Hash { .. } => true,
        Part::Range { start, end } => {
            end.as_ref().is_none_or(|end| scan.start < *end) && scan.end.as_ref().is_none_or(|end| start < end)
        }
    }
}

/// Answers a scan or a count over `shards`.
///
/// # Errors
/// The failure of the first shard that fails, if nothing can be answered without it.
pub(crate) async fn over_all(cluster: &Arc<Cluster>, mut whole: Whole, shards: Vec<ShardId>) -> Result<Frame, Failure> {
    if matches!(whole.scan.consistency, Consistency::Causal { .. }) {
        // A revision is that of one shard and says nothing of the others; the stronger promise holds for all.
        whole.scan.consistency = Consistency::Linearizable;
    }
    let header = whole.header.answer(Kind::Done);
    let encoding = |error| Failure::malformed(&error);
    if whole.header.kind == Kind::Count {
        let rows = count(cluster, &whole, &shards).await?;
        let head = codec::encode(&CountDone { rows, next: None }).map_err(encoding)?;
        return Ok(Frame::new(header, head, Bytes::new()));
    }
    let (page, tail) = page(cluster, &whole, &shards).await?;
    Ok(Frame::new(header, codec::encode(&page).map_err(encoding)?, tail))
}

/// How much is wanted of the whole, or asked of each shard.
#[derive(Clone, Copy, Debug)]
struct Amount {
    rows: usize,
    bytes: usize,
}

impl Amount {
    fn of_page(scan: &Scan) -> Self {
        let or_most = |wanted: u32, default: usize, most: usize| match wanted {
            0 => default,
            some => (some as usize).min(most),
        };
        Self {
            rows: or_most(scan.rows_max, PAGE_ROWS_MAX, PAGE_ROWS_MAX),
            bytes: or_most(scan.bytes_max, PAGE_BYTES_DEFAULT, PAGE_BYTES_MAX),
        }
    }

    /// A shard's share, with something on top for the unevenness of hashing.
    fn share(self, shards: usize) -> Self {
        let bytes = (self.bytes.div_ceil(shards) * 5 / 4 + FETCH_BYTES_MIN).min(self.bytes);
        Self { rows: share(self.rows, shards), bytes }
    }
}

async fn page(cluster: &Arc<Cluster>, whole: &Whole, shards: &[ShardId]) -> Result<(ScanDone, Bytes), Failure> {
    let wanted = Amount::of_page(&whole.scan);
    let groups = groups_of(&cluster.routes(), whole.scan.consistency, shards, wanted);
    let share = wanted.share(groups.len().max(1));
    let mut part = whole.scan.clone();
    part.rows_max = share.rows as u32;
    part.bytes_max = share.bytes as u32;
    let mut sources: Vec<Source> = groups.into_iter().map(|shards| Source { shards, rest: part.clone() }).collect();
    let mut merge = Merge::new(sources.len(), whole.scan.reverse);
    let mut out = Page::default();
    loop {
        let hungry: Vec<usize> = merge.hungry().collect();
        match feed(cluster, whole, &mut sources, &mut merge, &hungry).await {
            Ok(()) => {}
            // What is merged so far is right and in order; the rest may do better when it is asked for.
            Err(_) if !out.rows.is_empty() => return Ok(out.end(whole.scan.reverse)),
            Err(failure) => return Err(failure),
        }
        while let Some(row) = merge.pop() {
            if out.holds(wanted) {
                return Ok(out.end(whole.scan.reverse));
            }
            out.add(row);
        }
        if merge.hungry().next().is_none() {
            return Ok(out.last());
        }
        if out.holds(wanted) {
            return Ok(out.end(whole.scan.reverse)); // the shards need not be asked only to learn that they have more
        }
    }
}

/// Shards of which pages are asked for together, and what is still to be asked of them.
#[derive(Debug)]
struct Source {
    shards: Vec<ShardId>,
    rest: Scan,
}

/// The shards by the node that leads them, if little is wanted of each; otherwise each by itself.
fn groups_of(routes: &Routes, consistency: Consistency, shards: &[ShardId], wanted: Amount) -> Vec<Vec<ShardId>> {
    let mut groups: BTreeMap<(NodeId, usize), Vec<ShardId>> = BTreeMap::new();
    let mut led: BTreeMap<NodeId, usize> = BTreeMap::new();
    let mut alone = Vec::new();
    for shard in shards {
        match routes.leader(*shard).filter(|_| consistency == Consistency::Linearizable) {
            Some(node) => {
                let number = led.entry(node).or_default();
                groups.entry((node, *number / MERGED_SHARDS_MAX)).or_default().push(*shard);
                *number += 1;
            }
            None => alone.push(vec![*shard]),
        }
    }
    alone.extend(groups.into_values());
    let is_little = wanted.share(alone.len().max(1)).rows <= MERGED_ROWS_MAX;
    if is_little { alone } else { shards.iter().map(|shard| vec![*shard]).collect() }
}

/// Fetches the next rows of the sources whose rows are used up. One that a node does not merge becomes one for each of its shards.
async fn feed(
    cluster: &Arc<Cluster>,
    whole: &Whole,
    sources: &mut Vec<Source>,
    merge: &mut Merge,
    hungry: &[usize],
) -> Result<(), Failure> {
    for some in hungry.chunks(FETCHES_MAX) {
        let mut fetches = JoinSet::new();
        for &at in some {
            let Source { shards, rest } = &sources[at];
            let with = shards[1..].to_vec();
            let is_merged = !with.is_empty();
            let mut request = request(whole, &Scan { with, ..rest.clone() }, shards[0])?;
            let cluster = cluster.clone();
            fetches.spawn(async move {
                if is_merged {
                    let time = request.deadline.saturating_duration_since(request.begun) / 2;
                    request.deadline = request.begun + time.min(MERGED_TIME_MAX);
                    return (
                        at,
                        forward::attempt(&cluster, &request, 1).await.map_err(|error| busy(error.to_string())),
                    );
                }
                (at, forward::carry(&cluster, &cluster.routes(), request).await)
            });
        }
        while let Some(fetched) = fetches.join_next().await {
            let (at, answer) = fetched.map_err(|error| busy(error.to_string()))?;
            let answer = match answer {
                Ok(answer) => answer,
                Err(_) if sources[at].shards.len() > 1 => {
                    for shard in sources[at].shards.split_off(1) {
                        merge.add();
                        sources.push(Source { shards: vec![shard], rest: sources[at].rest.clone() });
                    }
                    continue; // they are hungry, and are asked for in the next round
                }
                Err(failure) => return Err(failure),
            };
            let garbled = |error: codec::CodecError| busy(format!("a page that cannot be read: {error}"));
            let page = merge::Page::decode(&answer.head, answer.tail).map_err(garbled)?;
            if page.with.len() + 1 != sources[at].shards.len() {
                return Err(busy("a page of other shards than were asked for".into()));
            }
            merge.feed(at, page.rows, page.next.is_none());
            if let Some(next) = page.next {
                sources[at].rest = sources[at].rest.resumed(next);
            }
        }
    }
    Ok(())
}

async fn count(cluster: &Arc<Cluster>, whole: &Whole, shards: &[ShardId]) -> Result<u64, Failure> {
    let mut sum = 0;
    for some in shards.chunks(FETCHES_MAX) {
        let mut counts = JoinSet::new();
        for shard in some {
            let (cluster, whole, shard) = (cluster.clone(), whole.clone(), *shard);
            counts.spawn(async move { count_shard(&cluster, &whole, shard).await });
        }
        while let Some(counted) = counts.join_next().await {
            sum += counted.map_err(|error| busy(error.to_string()))??;
        }
    }
    Ok(sum)
}

/// Each round goes on from where the last one stopped; the deadline bounds them.
async fn count_shard(cluster: &Arc<Cluster>, whole: &Whole, shard: ShardId) -> Result<u64, Failure> {
    let mut rest = whole.scan.clone();
    let mut rows = 0;
    loop {
        let answer = forward::carry(cluster, &cluster.routes(), request(whole, &rest, shard)?).await?;
        let counted: CountDone =
            codec::decode(&answer.head).map_err(|error| busy(format!("a count that cannot be read: {error}")))?;
        rows += counted.rows;
        match counted.next {
            None => return Ok(rows),
            Some(next) => rest = rest.resumed(next),
        }
    }
}

fn request(whole: &Whole, scan: &Scan, shard: ShardId) -> Result<Request, Failure> {
    let head = codec::encode(scan).map_err(|error| Failure::malformed(&error))?;
    Ok(Request {
        frame: Frame::new(Header::new(whole.header.kind), head, Bytes::new()),
        way: Way::Shard(shard),
        consistency: scan.consistency,
        write: false,
        begun: Instant::now(),
        own: false,
        deadline: whole.deadline,
        lane: whole.lane,
    })
}

fn busy(text: String) -> Failure {
    Failure::Busy { retry_after_ms: 100, text }
}

/// The page that is being made.
#[derive(Debug, Default)]
struct Page {
    rows: Vec<RowHead>,
    tail: BytesMut,
    bytes: usize,
}

impl Page {
    fn holds(&self, wanted: Amount) -> bool {
        self.rows.len() >= wanted.rows || self.bytes >= wanted.bytes
    }

    fn add(&mut self, row: Row) {
        self.bytes += row.key.len() + row.value.len();
        self.tail.put_slice(&row.value);
        let value_bytes = row.value.len() as u32;
        self.rows.push(RowHead { key: row.key, version: row.version, value_bytes });
    }

    /// A page behind which there may be more: the next begins right behind its last key.
    fn end(self, reverse: bool) -> (ScanDone, Bytes) {
        let next = self.rows.last().map(|row| {
            let mut bound = row.key.to_vec();
            if !reverse {
                bound.push(0);
            }
            bound
        });
        (ScanDone { rows: self.rows, next, revision: 0, with: vec![] }, self.tail.freeze())
    }

    /// The last page.
    fn last(self) -> (ScanDone, Bytes) {
        (ScanDone { rows: self.rows, next: None, revision: 0, with: vec![] }, self.tail.freeze())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_cover_the_page_and_stay_near_it() {
        for rows in [1, 2, 10, 100, 10_000] {
            for shards in [1, 2, 8, 100] {
                let whole = Amount { rows, bytes: rows * 100 };
                let share = whole.share(shards);
                assert!(share.rows >= 1 && share.rows <= rows);
                assert!(share.rows * shards >= rows && share.bytes * shards >= whole.bytes);
            }
        }
    }

    #[test]
    fn the_next_page_begins_right_behind_the_last_key() {
        let page = || {
            let mut page = Page::default();
            page.add(Row { key: Bytes::from_static(b"k"), version: 3, value: Bytes::from_static(b"vv") });
            page
        };
        let (forward, tail) = page().end(false);
        assert_eq!((forward.next.as_deref(), &tail[..]), (Some(&b"k\0"[..]), &b"vv"[..]));
        assert_eq!(page().end(true).0.next.as_deref(), Some(&b"k"[..]));
        assert_eq!(page().last().0.next, None);
    }
}
