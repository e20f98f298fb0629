//! Scans and counts of one shard: small pages read where they are asked for, as gets are, larger ones on a thread that may
//! block.

use crate::cell::{Cell, read_failed};
use crate::page::{self, Page, PageLimits, PageReader};
use crate::reply::Reply;
use crate::session::{deadline_of, fresh, head_of, may_answer, time_of};
use crate::shared::Shared;
use crate::table::View;
use serde::{Serialize, Serializer};
use shkv_proto::limits::{
    COUNT_ROWS_MAX, KEY_BYTES_MAX, MERGED_ROWS_MAX, MERGED_SHARDS_MAX, PAGE_BYTES_DEFAULT, PAGE_BYTES_MAX,
    PAGE_ROWS_MAX,
};
use shkv_proto::message::{Consistency, CountDone, Failure, RefusalCode, Scan};
use shkv_proto::{Frame, ShardId};
use smallvec::SmallVec;
use std::sync::Arc;
use tokio::time::Instant;

/// A page of at most so many rows and bytes is read on the session's own thread, unless many rows in memory must be put in
/// order for it: a change of threads costs more.
const INLINE_MAX: PageLimits = PageLimits { rows: MERGED_ROWS_MAX, bytes: 256 << 10 };

/// Answers a page of rows of one shard.
pub async fn scan(shared: Arc<Shared>, shard: ShardId, scan: Scan, deadline: Instant, reply: Reply) {
    let limits = limits_of(&scan);
    match page(&shared, shard, scan, limits, deadline).await {
        Ok(page) => {
            let revisions = page.revisions.clone();
            answer(reply, page, &revisions);
        }
        Err(failure) => reply.failed(&failure),
    }
}

/// Answers a page of rows that are merged of a shard and those that the scan names beside it.
pub fn merged_scan(shared: &Shared, shard: ShardId, scan: &Scan, reply: Reply) {
    match merged(shared, shard, scan) {
        Ok((page, revisions)) => answer(reply, page, &revisions),
        Err(failure) => reply.failed(&failure),
    }
}

fn limits_of(scan: &Scan) -> PageLimits {
    PageLimits {
        rows: match scan.rows_max {
            0 => PAGE_ROWS_MAX,
            rows => (rows as usize).min(PAGE_ROWS_MAX),
        },
        bytes: match scan.bytes_max {
            0 => PAGE_BYTES_DEFAULT,
            bytes => (bytes as usize).min(PAGE_BYTES_MAX),
        },
    }
}

fn answer(reply: Reply, mut page: Page, revisions: &[u64]) {
    let values = std::mem::take(&mut page.values);
    reply.done_with(&Head::of(&page, revisions), values.into());
}

/// [`ScanDone`](shkv_proto::message::ScanDone) as it is encoded of a page: no key is copied.
#[derive(Serialize)]
struct Head<'a> {
    rows: RowHeads<'a>,
    next: &'a Option<Vec<u8>>,
    revision: u64,
    with: &'a [u64],
}

impl<'a> Head<'a> {
    /// The head of an answer with this page, and the revisions of the shard that was asked and those beside it.
    fn of(page: &'a Page, revisions: &'a [u64]) -> Self {
        Self { rows: RowHeads(page), next: &page.next, revision: revisions[0], with: &revisions[1..] }
    }
}

struct RowHeads<'a>(&'a Page);

#[derive(Serialize)]
struct RowHead<'a> {
    #[serde(serialize_with = "as_bytes")]
    key: &'a [u8],
    version: u64,
    value_bytes: u32,
}

fn as_bytes<S: Serializer>(bytes: &&[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

impl Serialize for RowHeads<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut keys = &self.0.keys[..];
        serializer.collect_seq(self.0.rows.iter().map(|row| {
            let (key, rest) = keys.split_at(row.key_bytes as usize);
            keys = rest;
            RowHead { key, version: row.version, value_bytes: row.value_bytes }
        }))
    }
}

/// A page of a shard and those that the scan names beside it, if it can be read without waiting for anything, and their
/// revisions in that order.
fn merged(shared: &Shared, shard: ShardId, scan: &Scan) -> Result<(Page, Vec<u64>), Failure> {
    let wrong = |text: String| Err(Failure::refusal(RefusalCode::Malformed, text));
    if scan.with.len() >= MERGED_SHARDS_MAX {
        return wrong(format!("a page of more than {MERGED_SHARDS_MAX} shards"));
    }
    if matches!(scan.consistency, Consistency::Causal { .. }) {
        return wrong("a causal scan names a revision, which is of one shard".into());
    }
    let mut shards: SmallVec<[ShardId; 8]> = std::iter::once(shard).chain(scan.with.iter().copied()).collect();
    shards.sort_unstable(); // whoever holds several shards took them in this order
    if let Some(twice) = shards.windows(2).find(|pair| pair[0] == pair[1]) {
        return wrong(format!("a page that has shard {} twice", twice[0]));
    }
    let cells = shards.iter().map(|shard| cell_of(shared, *shard, scan));
    let cells = cells.collect::<Result<SmallVec<[Arc<Cell>; 8]>, Failure>>()?;
    let PageLimits { rows, bytes } = limits_of(scan);
    let limits = PageLimits { rows: rows.min(INLINE_MAX.rows), bytes: bytes.min(INLINE_MAX.bytes) };
    if !cells.iter().all(|cell| cell.is_in_order()) {
        return Err(apart("their rows in memory are not in order"));
    }
    #[cfg(feature = "sim")]
    let began = crate::inspect::moment();
    let terms: SmallVec<[_; 8]> = cells.iter().map(|cell| cell.term()).collect();
    let page = {
        let views: SmallVec<[_; 8]> = cells.iter().map(|cell| cell.view.read()).collect();
        let views: SmallVec<[&View; 8]> = views.iter().map(|view| &**view).collect();
        page::read_at_once(&views, scan, limits).map_err(|error| read_failed(&error))?
    };
    let may_be_told = cells.iter().zip(terms).all(|(cell, term)| may_answer(shared, cell, scan.consistency, term, 0));
    #[cfg(feature = "sim")]
    let may_be_told = may_be_told || crate::inspect::planted(crate::inspect::Bug::MergedWithoutLease);
    if !may_be_told {
        return Err(apart("a lease does not run"));
    }
    if page.is_locked && scan.consistency == Consistency::Linearizable {
        return Err(apart("a transaction holds a key"));
    }
    #[cfg(feature = "sim")]
    cells.iter().for_each(|cell| crate::inspect::served_read(cell, scan.consistency, began));
    let revision = |shard| shards.binary_search(shard).map_or(0, |at| page.revisions[at]);
    let revisions = std::iter::once(&shard).chain(&scan.with).map(revision).collect();
    Ok((page, revisions))
}

/// Why a page was not merged. Each shard can be asked by itself, and waits for what it has to.
fn apart(why: &str) -> Failure {
    Failure::Busy {
        retry_after_ms: 0,
        text: format!("the shards cannot be read together now: {why}; ask each of them"),
    }
}

/// Answers the number of rows.
pub async fn count(shared: Arc<Shared>, frame: Frame, reply: Reply) {
    let Some((mut scan, reply)) = head_of::<Scan>(&frame, reply) else { return };
    if !scan.with.is_empty() {
        return reply.failed(&Failure::refusal(RefusalCode::Malformed, "a count is of one shard"));
    }
    scan.keys_only = true;
    let deadline = deadline_of(&frame);
    // Whoever asks gets what was counted until half of the time is over, and not in vain: where rows come slowly it asks more often.
    let half_time = shared.clock.now() + time_of(&frame).as_nanos() as u64 / 2;
    let limits = PageLimits { rows: PAGE_ROWS_MAX, bytes: PAGE_BYTES_MAX };
    let mut rows = 0;
    let next = loop {
        let page = match page(&shared, frame.header.shard, scan.clone(), limits, deadline).await {
            Ok(page) => page,
            Err(failure) => return reply.failed(&failure),
        };
        rows += page.rows.len() as u64;
        match page.next {
            Some(next) if rows < COUNT_ROWS_MAX as u64 && shared.clock.now() < half_time => scan = scan.resumed(next),
            next => break next,
        }
    };
    reply.done(&CountDone { rows, next });
}

async fn page(
    shared: &Arc<Shared>,
    shard: ShardId,
    scan: Scan,
    limits: PageLimits,
    deadline: Instant,
) -> Result<Page, Failure> {
    let cell = cell_of(shared, shard, &scan)?;
    let consistency = scan.consistency;
    let scan = Arc::new(scan);
    match consistency {
        Consistency::Linearizable => {
            let look = || read(cell.clone(), scan.clone(), limits);
            fresh(shared, &cell, deadline, look, |page| page.is_locked).await
        }
        Consistency::Causal { .. } | Consistency::Eventual => {
            let page = read(cell.clone(), scan, limits).await?;
            let revision = page.revisions[0];
            if may_answer(shared, &cell, consistency, None, revision) {
                Ok(page)
            } else {
                Err(Failure::Behind { revision })
            }
        }
    }
}

/// The shard, if it is here and may be asked for what the scan wants.
fn cell_of(shared: &Shared, shard: ShardId, scan: &Scan) -> Result<Arc<Cell>, Failure> {
    let wrong = || Failure::WrongShard { epoch: shared.epoch() };
    let cell = shared.cell(shard).filter(|cell| cell.keyspace == scan.keyspace).ok_or_else(wrong)?;
    // A bound may be one byte longer than a key: that is where a scan goes on behind the longest key.
    if scan.start.len().max(scan.end.as_ref().map_or(0, Vec::len)) > KEY_BYTES_MAX + 1 {
        return Err(Failure::refusal(
            RefusalCode::KeyTooLarge,
            format!("a bound of the range is over the limit of {KEY_BYTES_MAX} bytes"),
        ));
    }
    if scan.consistency != Consistency::Linearizable {
        cell.answers_stale_reads()?;
    }
    Ok(cell)
}

async fn read(cell: Arc<Cell>, scan: Arc<Scan>, limits: PageLimits) -> Result<Page, Failure> {
    let is_small = limits.rows <= INLINE_MAX.rows && limits.bytes <= INLINE_MAX.bytes;
    if is_small && cell.is_in_order() {
        return page::read_at_once(&[&cell.view.read()], &scan, limits).map_err(|error| read_failed(&error));
    }
    #[cfg(feature = "sim")]
    let shard = cell.shard;
    let ordered = move || {
        cell.put_in_order();
        let page = PageReader::begin(&cell.view.read(), &scan, limits);
        page.read(&scan, limits)
    };
    let read = shkv_proto::world::blocking(ordered).await;
    #[cfg(feature = "sim")]
    crate::inspect::page_was_read(shard).await;
    match read {
        Ok(Ok(page)) => Ok(page),
        Ok(Err(error)) => Err(read_failed(&error)),
        Err(error) => Err(Failure::unknown(error.to_string())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::PageRow;
    use bytes::Bytes;
    use shkv_proto::codec;
    use shkv_proto::message::{RowHead, ScanDone};

    #[test]
    fn the_head_of_a_page_is_encoded_as_the_message() {
        for next in [None, Some(b"next".to_vec())] {
            let row = |key_bytes, version, value_bytes| PageRow { key_bytes, version, value_bytes };
            let rows = vec![row(1, 7, 0), row(300, 1 << 40, 5), row(2, 8, 100_000)];
            let keys = vec![b'k'; 303];
            let page = Page { rows, keys, next: next.clone(), ..Page::default() };
            let head =
                |bytes, version, value_bytes| RowHead { key: Bytes::from(vec![b'k'; bytes]), version, value_bytes };
            let rows = vec![head(1, 7, 0), head(300, 1 << 40, 5), head(2, 8, 100_000)];
            let message = ScanDone { rows, next, revision: 9, with: vec![300, 2] };
            assert_eq!(codec::encode(&Head::of(&page, &[9, 300, 2])).unwrap(), codec::encode(&message).unwrap());
        }
    }
}
