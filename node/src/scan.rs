//! Scans and counts of one shard: small pages read where they are asked for, as gets are, larger ones on a thread that may
//! block.

use crate::cell::{Cell, read_failed};
use crate::reply::Reply;
use crate::session::{deadline_of, fresh, head_of, may_answer};
use crate::shared::Shared;
use crate::table::{Page, PageLimits, PageRow};
use bytes::Bytes;
use shkv_proto::limits::{COUNT_ROWS_MAX, KEY_BYTES_MAX, PAGE_BYTES_DEFAULT, PAGE_BYTES_MAX, PAGE_ROWS_MAX};
use shkv_proto::message::{Consistency, CountDone, Failure, RefusalCode, RowHead, Scan, ScanDone};
use shkv_proto::{Frame, ShardId};
use std::sync::Arc;
use tokio::time::Instant;

/// A page of at most so many rows and bytes is read on the session's own thread, unless many rows in memory must be put in
/// order for it: a change of threads costs more.
const INLINE_MAX: PageLimits = PageLimits { rows: 128, bytes: 256 << 10 };

/// Answers a page of rows.
pub async fn scan(shared: Arc<Shared>, frame: Frame, reply: Reply) {
    let Some((scan, reply)) = head_of::<Scan>(&frame, reply) else { return };
    let deadline = deadline_of(&frame);
    let limits = PageLimits {
        rows: match scan.rows_max {
            0 => PAGE_ROWS_MAX,
            rows => (rows as usize).min(PAGE_ROWS_MAX),
        },
        bytes: match scan.bytes_max {
            0 => PAGE_BYTES_DEFAULT,
            bytes => (bytes as usize).min(PAGE_BYTES_MAX),
        },
    };
    match page(&shared, frame.header.shard, scan, limits, deadline).await {
        Ok(page) => {
            let mut keys = Bytes::from(page.keys);
            let head = |PageRow { key_bytes, version, value_bytes }| {
                let key = keys.split_to(key_bytes as usize);
                RowHead { key, version, value_bytes }
            };
            let rows = page.rows.into_iter().map(head).collect();
            reply.done_with(&ScanDone { rows, next: page.next, revision: page.revision }, page.values.into());
        }
        Err(failure) => reply.failed(&failure),
    }
}

/// Answers the number of rows.
pub async fn count(shared: Arc<Shared>, frame: Frame, reply: Reply) {
    let Some((mut scan, reply)) = head_of::<Scan>(&frame, reply) else { return };
    scan.keys_only = true;
    let deadline = deadline_of(&frame);
    let limits = PageLimits { rows: PAGE_ROWS_MAX, bytes: PAGE_BYTES_MAX };
    let mut rows = 0;
    let next = loop {
        let page = match page(&shared, frame.header.shard, scan.clone(), limits, deadline).await {
            Ok(page) => page,
            Err(failure) => return reply.failed(&failure),
        };
        rows += page.rows.len() as u64;
        match page.next {
            Some(next) if rows < COUNT_ROWS_MAX as u64 => scan = scan.resumed(next),
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
    let wrong = || Failure::WrongShard { epoch: shared.epoch() };
    let cell = shared.cell(shard).ok_or_else(wrong)?;
    if scan.keyspace != cell.keyspace {
        return Err(wrong());
    }
    // A bound may be one byte longer than a key: that is where a scan goes on behind the longest key.
    if scan.start.len().max(scan.end.as_ref().map_or(0, Vec::len)) > KEY_BYTES_MAX + 1 {
        return Err(Failure::refusal(
            RefusalCode::KeyTooLarge,
            format!("a bound of the range is over the limit of {KEY_BYTES_MAX} bytes"),
        ));
    }
    let consistency = scan.consistency;
    if consistency != Consistency::Linearizable {
        cell.answers_stale_reads()?;
    }
    let scan = Arc::new(scan);
    match consistency {
        Consistency::Linearizable => {
            let look = || read(cell.clone(), scan.clone(), limits);
            fresh(shared, &cell, deadline, look, |page| page.is_locked).await
        }
        Consistency::Causal { .. } | Consistency::Eventual => {
            let page = read(cell.clone(), scan, limits).await?;
            if may_answer(shared, &cell, consistency, page.revision) {
                Ok(page)
            } else {
                Err(Failure::Behind { revision: page.revision })
            }
        }
    }
}

async fn read(cell: Arc<Cell>, scan: Arc<Scan>, limits: PageLimits) -> Result<Page, Failure> {
    let is_small = limits.rows <= INLINE_MAX.rows && limits.bytes <= INLINE_MAX.bytes;
    if is_small && cell.is_in_order() {
        return cell.view.read().page(&scan, limits).map_err(|error| read_failed(&error));
    }
    let ordered = move || {
        cell.put_in_order();
        let page = cell.view.read().begin_page(&scan, limits);
        page.read(&scan, limits)
    };
    match shkv_proto::world::blocking(ordered).await {
        Ok(Ok(page)) => Ok(page),
        Ok(Err(error)) => Err(read_failed(&error)),
        Err(error) => Err(Failure::unknown(error.to_string())),
    }
}
