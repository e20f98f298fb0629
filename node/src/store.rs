//! Rows on disk: one redb file per node, one table per shard, and what each replica must know of itself.
//!
//! This is the only file that names redb. Every durable transaction carries rows together with the applied index, the
//! revision, the configuration and the ledger that belong to them. Other rows become durable with the next one: those of a snapshot that
//! lie beside a shard's own, which a crash voids anyway, and all but the last of a flush, which ends with one.

use crate::arena::{Row, Slot};
use crate::disk::{Disk, DiskFile, UNSYNCED_BYTES_MAX};
use crate::log::Mark;
use crate::machine::Ledger;
use crate::memtable::Table;
use crate::row_cache::{Budget, RowCache};
use crate::table::Found;
use bytes::{BufMut, Bytes, BytesMut};
use redb::{
    AccessGuard, Builder, Database, Durability, ReadOnlyTable, ReadableDatabase, ReadableTable, ReadableTableMetadata,
    TableDefinition, TableHandle, WriteTransaction,
};
use serde::{Deserialize, Serialize};
use shkv_proto::codec;
use shkv_proto::map::Part;
use shkv_proto::message::SnapshotHead;
use shkv_proto::{KeyspaceId, NodeId, ReplicaId, ShardId};
use std::collections::BTreeMap;
use std::io;
use std::ops::{Bound, Range};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

/// A hold on a shard's rows. redb uses no page anew that was given up after the oldest hold on any of its rows was taken.
pub type Hold = Arc<Rows>;
type Rows = ReadOnlyTable<&'static [u8], &'static [u8]>;
const REPLICAS: TableDefinition<'static, u32, &'static [u8]> = TableDefinition::new("replicas");
/// The highest id of the replicas of a shard that were deleted here: none of them is made again.
const DELETED: TableDefinition<'static, u32, u64> = TableDefinition::new("deleted");
/// What a shard remembers beside its rows, encoded by [`Ledger::encode`].
const LEDGERS: TableDefinition<'static, u32, &'static [u8]> = TableDefinition::new("ledgers");
/// What the file is called.
const ROWS: &str = "rows.redb";
/// What the file is called while it is made.
const UNFINISHED: &str = "unfinished.redb";
/// The part of the cache's bytes that is for single rows; the rest is for pages.
const ROWS_PART: usize = 4;
/// What redb's cache takes in memory of five parts that it is told to take four of: a page of 4 KiB lies behind 16 bytes more, for which the
/// allocator has pieces of 5 KiB.
const PAGES_OF_CACHE: (usize, usize) = (4, 5);
/// Rows of a flush that are written in one transaction: their pages fit into half of a cache of some 50 MiB, where each is in one of its own.
const ROWS_AT_ONCE: usize = if cfg!(any(test, feature = "sim")) { 4 } else { 4_096 };
/// Rows that are put into redb between two looks whether others wait for the processor: some ten microseconds.
const YIELD_EVERY_ROWS: usize = 16;
/// Bytes of pages that are written between two such looks: with the rows that are put into them, some fifty.
const YIELD_EVERY_BYTES: u64 = 8 << 10;
/// Bytes of a stored row before its value: flags, of which none is defined yet, and the version.
const ROW_FIXED_BYTES: usize = 9;

/// Why the store cannot do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
#[error("store: {0}")]
pub struct StoreError(String);

impl StoreError {
    /// The store takes no more work.
    #[must_use]
    pub fn stopped() -> Self {
        Self("the node is stopping".into())
    }

    fn of(error: impl Into<redb::Error>) -> Self {
        let error: redb::Error = error.into();
        Self(match &error {
            redb::Error::DatabaseAlreadyOpen => "the data directory is in use by another process".into(),
            other => other.to_string(),
        })
    }
}

/// What a replica knows of itself, with the applied state that it belongs to.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaMeta {
    /// Its id in the shard's Raft group.
    pub replica: ReplicaId,
    /// The shard's keyspace.
    pub keyspace: KeyspaceId,
    /// The shard's part of it.
    pub part: Part,
    /// The nodes that keep the group's replicas.
    pub homes: Vec<(ReplicaId, NodeId)>,
    /// The last entry that the rows contain, and the configuration as of it.
    pub state: SnapshotHead,
    /// The mutations that the rows contain.
    pub revision: u64,
}

impl ReplicaMeta {
    /// The last entry that the rows contain.
    #[must_use]
    pub fn applied(&self) -> Mark {
        Mark { index: self.state.index, term: self.state.term }
    }
}

/// A sealed table with what it makes of its replica.
pub struct Flush {
    /// The shard.
    pub shard: ShardId,
    /// The replica as of the table's last write.
    pub meta: ReplicaMeta,
    /// The rows.
    pub table: Arc<Table>,
    /// What the shard remembers beside them, as of the same entry.
    pub ledger: Ledger,
}

/// The redb file of a node.
pub struct Store {
    db: Database,
    /// Of the rows that were read of late.
    budget: Arc<Budget>,
}

impl Store {
    /// Opens the file, or makes it. Returns it with the replicas that are in it.
    ///
    /// # Errors
    /// [`StoreError`], also when another process has it open.
    pub fn open(disk: &dyn Disk, cache_bytes: usize) -> Result<(Self, BTreeMap<u32, ReplicaMeta>), StoreError> {
        let io = |error: io::Error| StoreError(error.to_string());
        let rows_bytes = cache_bytes / ROWS_PART;
        let cache_bytes = cache_bytes - rows_bytes;
        let names = disk.list().map_err(io)?;
        if !names.iter().any(|there| there == ROWS) {
            // A file that a crash left half made is no redb file. It gets its name when it is whole.
            if names.iter().any(|there| there == UNFINISHED) {
                disk.remove(UNFINISHED).map_err(io)?;
            }
            drop(database_in(disk.create(UNFINISHED, 0).map_err(io)?, cache_bytes)?);
            disk.rename(UNFINISHED, ROWS).map_err(io)?;
        }
        Self::with(database_in(disk.open(ROWS).map_err(io)?, cache_bytes)?, rows_bytes)
    }

    /// Opens rows that are kept in a file of a [`Disk`], as tests do that let it fail.
    ///
    /// # Errors
    /// [`StoreError`].
    #[cfg(test)]
    pub fn open_in(
        file: Arc<dyn DiskFile>,
        cache_bytes: usize,
    ) -> Result<(Self, BTreeMap<u32, ReplicaMeta>), StoreError> {
        Self::with(database_in(file, cache_bytes)?, cache_bytes / ROWS_PART)
    }

    fn with(db: Database, rows_bytes: usize) -> Result<(Self, BTreeMap<u32, ReplicaMeta>), StoreError> {
        let store = Self { db, budget: Arc::new(Budget::new(rows_bytes)) };
        let mut replicas = BTreeMap::new();
        let mut leftovers = Vec::new();
        {
            let read = store.db.begin_read().map_err(StoreError::of)?;
            for table in read.list_tables().map_err(StoreError::of)? {
                if table.name().starts_with(STAGED) {
                    leftovers.push(table.name().to_owned());
                }
            }
            match read.open_table(REPLICAS) {
                Ok(table) => {
                    for item in table.range::<u32>(..).map_err(StoreError::of)? {
                        let (shard, meta) = item.map_err(StoreError::of)?;
                        let meta = codec::decode(meta.value())
                            .map_err(|error| StoreError(format!("replica of shard {}: {error}", shard.value())))?;
                        replicas.insert(shard.value(), meta);
                    }
                }
                Err(redb::TableError::TableDoesNotExist(_)) => {}
                Err(error) => return Err(StoreError::of(error)),
            }
        }
        if !leftovers.is_empty() {
            let drop_all = |txn: &WriteTransaction| {
                leftovers
                    .iter()
                    .try_for_each(|name| txn.delete_table(rows_named(name)).map(drop).map_err(StoreError::of))
            };
            store.write(drop_all)?; // the sender of a snapshot that was cut short begins anew
        }
        Ok((store, replicas))
    }

    fn write<T>(&self, work: impl FnOnce(&WriteTransaction) -> Result<T, StoreError>) -> Result<T, StoreError> {
        let mut txn = self.db.begin_write().map_err(StoreError::of)?;
        // The allocator's state is saved with each commit, so that opening after a crash does not walk the whole file.
        txn.set_quick_repair(true);
        let done = work(&txn)?;
        txn.commit().map_err(StoreError::of)?;
        Ok(done)
    }

    /// Writes what becomes durable with the next [`Store::write`].
    fn write_lazily(&self, work: impl FnOnce(&WriteTransaction) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut txn = self.db.begin_write().map_err(StoreError::of)?;
        txn.set_durability(Durability::None).map_err(|error| StoreError(error.to_string()))?;
        work(&txn)?;
        txn.commit().map_err(StoreError::of)
    }

    /// Makes a replica without rows. `false` if it, or a later one of the shard, was deleted here before: its votes are
    /// forgotten, so it must not come back.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn create_replica(&self, shard: ShardId, meta: &ReplicaMeta) -> Result<bool, StoreError> {
        self.write(|txn| {
            let deleted = {
                let table = txn.open_table(DELETED).map_err(StoreError::of)?;
                table.get(shard.0).map_err(StoreError::of)?.map_or(0, |id| id.value())
            };
            if meta.replica.0 <= deleted {
                return Ok(false);
            }
            txn.open_table(rows_named(&rows_name(shard))).map_err(StoreError::of)?;
            put_meta(txn, shard, meta)?;
            Ok(true)
        })
    }

    /// Deletes a replica with all its rows.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn delete_replica(&self, shard: ShardId, replica: ReplicaId) -> Result<(), StoreError> {
        self.write(|txn| {
            for name in [rows_name(shard), staged_name(shard)] {
                txn.delete_table(rows_named(&name)).map_err(StoreError::of)?;
            }
            let mut deleted = txn.open_table(DELETED).map_err(StoreError::of)?;
            let before = deleted.get(shard.0).map_err(StoreError::of)?.map_or(0, |id| id.value());
            deleted.insert(shard.0, replica.0.max(before)).map_err(StoreError::of)?;
            let mut ledgers = txn.open_table(LEDGERS).map_err(StoreError::of)?;
            ledgers.remove(shard.0).map(drop).map_err(StoreError::of)?;
            let mut replicas = txn.open_table(REPLICAS).map_err(StoreError::of)?;
            replicas.remove(shard.0).map(drop).map_err(StoreError::of)
        })
    }

    /// Writes sealed tables, each sorted, so that they become durable all at once, with what they make of their replicas. `rows_done`
    /// counts the rows meanwhile.
    ///
    /// # Errors
    /// [`StoreError`]; it is then not known whether it was written, and the store must be opened anew.
    pub fn flush(&self, flushes: &[Flush], rows_done: &AtomicUsize) -> Result<(), StoreError> {
        // Pages get their checks when a transaction ends. Those of one that does not fit into the cache were written before, and would be
        // read and written again for that. A crash voids what is not durable yet.
        let mut pieces = Vec::new();
        let mut rows = 0;
        for flush in flushes {
            let mut from = 0;
            while from < flush.table.len() {
                let count = (flush.table.len() - from).min(ROWS_AT_ONCE - rows);
                pieces.push((flush, from..from + count));
                (from, rows) = (from + count, rows + count);
                if rows == ROWS_AT_ONCE {
                    self.write_lazily(|txn| put_pieces(txn, &pieces, rows_done))?;
                    pieces.clear();
                    rows = 0;
                }
            }
        }
        self.write(|txn| {
            put_pieces(txn, &pieces, rows_done)?;
            flushes.iter().try_for_each(|flush| {
                let ledger = flush.ledger.encode().map_err(|error| StoreError(error.to_string()))?;
                put_ledger(txn, flush.shard, &ledger)?;
                put_meta(txn, flush.shard, &flush.meta)
            })
        })
    }

    /// A hold on a shard's rows as they are now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn base(&self, shard: ShardId) -> Result<Base, StoreError> {
        let read = self.db.begin_read().map_err(StoreError::of)?;
        let rows = read.open_table(rows_named(&rows_name(shard))).map_err(StoreError::of)?;
        let ledger = match read.open_table(LEDGERS) {
            Ok(ledgers) => {
                ledgers.get(shard.0).map_err(StoreError::of)?.map(|bytes| Bytes::copy_from_slice(bytes.value()))
            }
            Err(redb::TableError::TableDoesNotExist(_)) => None,
            Err(error) => return Err(StoreError::of(error)),
        };
        let cache = Arc::new(RowCache::new(self.budget.clone()));
        Ok(Base { rows: Some((Arc::new(rows), cache)), ledger: ledger.unwrap_or_default() })
    }

    /// Holds on shards' rows as they are now.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn holds(&self, shards: impl Iterator<Item = ShardId>) -> Result<Vec<(ShardId, Hold)>, StoreError> {
        let read = self.db.begin_read().map_err(StoreError::of)?;
        let hold = |shard| {
            let rows = read.open_table(rows_named(&rows_name(shard))).map_err(StoreError::of)?;
            Ok((shard, Arc::new(rows)))
        };
        shards.map(hold).collect()
    }

    /// Begins to take in a snapshot beside the shard's rows.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn stage_begin(&self, shard: ShardId) -> Result<(), StoreError> {
        self.write_lazily(|txn| {
            txn.delete_table(rows_named(&staged_name(shard))).map_err(StoreError::of)?;
            txn.open_table(rows_named(&staged_name(shard))).map(drop).map_err(StoreError::of)
        })
    }

    /// Adds rows of a snapshot: keys and stored rows, in key order, behind those that were added before. What is not `durable`
    /// becomes so with the next write that is.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn stage(&self, shard: ShardId, rows: &[(Bytes, Bytes)], durable: bool) -> Result<(), StoreError> {
        let work = |txn: &WriteTransaction| {
            let mut table = txn.open_table(rows_named(&staged_name(shard))).map_err(StoreError::of)?;
            let mut end = table.upper_bound_mut(Bound::<&[u8]>::Unbounded).map_err(StoreError::of)?;
            for (number, (key, row)) in rows.iter().enumerate() {
                let_others_run_at_times(number);
                if row.len() < ROW_FIXED_BYTES {
                    return Err(StoreError("a snapshot's row is shorter than its fixed part".into()));
                }
                end.insert_before(&key[..], &row[..]).map_err(|error| StoreError(error.to_string()))?;
            }
            end.close().map_err(StoreError::of)
        };
        if durable { self.write(work) } else { self.write_lazily(work) }
    }

    /// Puts the staged rows in the place of the shard's own, in one step with what they make of the replica. It is durable
    /// when it returns, and the staged rows with it.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn install(&self, shard: ShardId, meta: &ReplicaMeta, ledger: &[u8]) -> Result<(), StoreError> {
        self.write(|txn| {
            txn.delete_table(rows_named(&rows_name(shard))).map_err(StoreError::of)?;
            txn.rename_table(rows_named(&staged_name(shard)), rows_named(&rows_name(shard))).map_err(StoreError::of)?;
            put_ledger(txn, shard, ledger)?;
            put_meta(txn, shard, meta)
        })
    }
}

fn database_in(file: Arc<dyn DiskFile>, cache_bytes: usize) -> Result<Database, StoreError> {
    let mut builder = Builder::new();
    builder.set_cache_size(cache_bytes / PAGES_OF_CACHE.1 * PAGES_OF_CACHE.0);
    builder.create_with_backend(InFile { file, unsynced_bytes: AtomicU64::new(0) }).map_err(StoreError::of)
}

/// A file as redb wants it, synced also between redb's own syncs, so that the disk never has much to do before it comes to the
/// log's next write.
struct InFile {
    file: Arc<dyn DiskFile>,
    unsynced_bytes: AtomicU64,
}

impl std::fmt::Debug for InFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("InFile")
    }
}

impl redb::StorageBackend for InFile {
    fn len(&self) -> io::Result<u64> {
        self.file.bytes()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> io::Result<()> {
        self.file.read_at(out, offset)
    }

    fn set_len(&self, bytes: u64) -> io::Result<()> {
        self.file.resize(bytes)
    }

    fn sync_data(&self) -> io::Result<()> {
        self.unsynced_bytes.store(0, Ordering::Relaxed);
        self.file.sync()
    }

    fn write(&self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.file.write_at(bytes, offset)?;
        let written = bytes.len() as u64;
        let before = self.unsynced_bytes.fetch_add(written, Ordering::Relaxed);
        if before + written >= UNSYNCED_BYTES_MAX {
            self.sync_data()?;
        } else if before / YIELD_EVERY_BYTES != (before + written) / YIELD_EVERY_BYTES {
            let_others_run();
        }
        Ok(())
    }
}

/// Lets other threads run that wait for a processor. What is written here is in a hurry to nobody, and the system would let it go
/// on for milliseconds while the log's thread, that has just been told that its write is done, waits.
fn let_others_run() {
    std::thread::yield_now();
}

/// [`let_others_run`], once in so many rows.
fn let_others_run_at_times(rows: usize) {
    if rows.is_multiple_of(YIELD_EVERY_ROWS) {
        let_others_run();
    }
}

/// Writes pieces of sorted tables.
fn put_pieces(
    txn: &WriteTransaction,
    pieces: &[(&Flush, Range<usize>)],
    rows_done: &AtomicUsize,
) -> Result<(), StoreError> {
    for (flush, piece) in pieces {
        let mut table = txn.open_table(rows_named(&rows_name(flush.shard))).map_err(StoreError::of)?;
        let last = table.last().map_err(StoreError::of)?.map(|(key, _)| key.value().to_vec());
        let sorted = flush.table.sorted();
        let mut rows = sorted
            .part(piece.clone())
            .inspect(|_| let_others_run_at_times(rows_done.fetch_add(1, Ordering::Relaxed)))
            .peekable();
        while let Some(Row { key, slot }) = rows.next_if(|row| last.as_ref().is_some_and(|last| row.key <= &last[..])) {
            match slot {
                Slot::Live { version, value } => {
                    let mut place = table.insert_reserve(key, ROW_FIXED_BYTES + value.len()).map_err(StoreError::of)?;
                    let place: &mut [u8] = place.as_mut();
                    place[0] = 0;
                    place[1..ROW_FIXED_BYTES].copy_from_slice(&version.to_le_bytes());
                    place[ROW_FIXED_BYTES..].copy_from_slice(&value);
                }
                #[cfg(feature = "sim")]
                Slot::Dead if crate::inspect::planted(crate::inspect::Bug::FlushKeepsRemoved) => {}
                Slot::Dead => drop(table.remove(key).map_err(StoreError::of)?),
            }
        }
        // What comes behind all rows is appended: that costs less than to look for the place of each.
        let mut end = table.upper_bound_mut(Bound::<&[u8]>::Unbounded).map_err(StoreError::of)?;
        let mut stored = Vec::new();
        for Row { key, slot } in rows {
            if let Slot::Live { version, value } = slot {
                stored.clear();
                stored.push(0);
                stored.extend_from_slice(&version.to_le_bytes());
                stored.extend_from_slice(&value);
                end.insert_before(key, &stored[..]).map_err(|error| StoreError(error.to_string()))?;
            }
        }
        end.close().map_err(StoreError::of)?;
    }
    Ok(())
}

fn put_meta(txn: &WriteTransaction, shard: ShardId, meta: &ReplicaMeta) -> Result<(), StoreError> {
    let bytes = codec::encode(meta).map_err(|error| StoreError(error.to_string()))?;
    let mut table = txn.open_table(REPLICAS).map_err(StoreError::of)?;
    table.insert(shard.0, &bytes[..]).map(drop).map_err(StoreError::of)
}

fn put_ledger(txn: &WriteTransaction, shard: ShardId, ledger: &[u8]) -> Result<(), StoreError> {
    let mut table = txn.open_table(LEDGERS).map_err(StoreError::of)?;
    table.insert(shard.0, ledger).map(drop).map_err(StoreError::of)
}

const STAGED: &str = "staged/";

fn rows_name(shard: ShardId) -> String {
    format!("rows/{shard}")
}

fn staged_name(shard: ShardId) -> String {
    format!("{STAGED}{shard}")
}

fn rows_named(name: &str) -> TableDefinition<'_, &'static [u8], &'static [u8]> {
    TableDefinition::new(name)
}

/// A hold on a shard's flushed rows. It does not change, and costs disk space for what is overwritten meanwhile: of any shard, so those
/// that rest are renewed behind each flush.
#[derive(Clone)]
pub struct Base {
    rows: Option<(Hold, Arc<RowCache>)>,
    ledger: Bytes,
}

impl Base {
    /// No rows.
    #[cfg(test)]
    pub fn empty() -> Self {
        Self { rows: None, ledger: Bytes::new() }
    }

    /// The same rows, held since `rows` were.
    #[must_use]
    pub fn renewed(&self, rows: Hold) -> Self {
        let rows = self.rows.as_ref().map(|(_, cache)| (rows, cache.clone()));
        Self { rows, ledger: self.ledger.clone() }
    }

    /// What the shard remembered beside these rows, encoded.
    #[must_use]
    pub fn ledger(&self) -> &Bytes {
        &self.ledger
    }

    /// The row of `key`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, key: &[u8]) -> Result<Found, StoreError> {
        let Some((rows, cache)) = &self.rows else { return Ok(None) };
        let count = || rows.len().unwrap_or_default() as usize; // only a guess is wanted
        cache.get(key, count, || stored(rows, key))
    }

    /// The row of `key` as redb has it.
    #[cfg(test)]
    pub fn get_uncached(&self, key: &[u8]) -> Result<Found, StoreError> {
        self.rows.as_ref().map_or(Ok(None), |(rows, _)| stored(rows, key))
    }

    /// The rows of a range.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn range(&self, range: (Bound<&[u8]>, Bound<&[u8]>), reverse: bool) -> Result<BaseRange, StoreError> {
        let rows = match &self.rows {
            Some((rows, _)) => Some(rows.range::<&[u8]>(range).map_err(StoreError::of)?),
            None => None,
        };
        Ok(BaseRange { rows, reverse })
    }
}

/// Flushed rows in order.
pub struct BaseRange {
    rows: Option<redb::Range<'static, &'static [u8], &'static [u8]>>,
    reverse: bool,
}

impl BaseRange {
    /// The next row.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn next(&mut self) -> Result<Option<BaseRow>, StoreError> {
        let Some(rows) = &mut self.rows else { return Ok(None) };
        let item = if self.reverse { rows.next_back() } else { rows.next() };
        item.map(|item| item.map(|(key, stored)| BaseRow { key, stored }).map_err(StoreError::of)).transpose()
    }

    /// Appends rows as they are stored to `out`, key and row one behind the other, until it holds `bytes_max`. Returns
    /// their lengths; none at the end of the range.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn chunk(&mut self, bytes_max: usize, out: &mut BytesMut) -> Result<Vec<(u32, u32)>, StoreError> {
        let mut lengths = Vec::new();
        let Some(rows) = &mut self.rows else { return Ok(lengths) };
        while out.len() < bytes_max {
            let Some(item) = rows.next() else { break };
            let (key, stored) = item.map_err(StoreError::of)?;
            out.put_slice(key.value());
            out.put_slice(stored.value());
            lengths.push((key.value().len() as u32, stored.value().len() as u32));
        }
        Ok(lengths)
    }
}

/// A flushed row.
pub struct BaseRow {
    key: AccessGuard<'static, &'static [u8]>,
    stored: AccessGuard<'static, &'static [u8]>,
}

impl BaseRow {
    /// Its key.
    #[must_use]
    pub fn key(&self) -> &[u8] {
        self.key.value()
    }

    /// Its version and value.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn split(&self) -> Result<(u64, &[u8]), StoreError> {
        split_row(self.stored.value())
    }
}

/// Whether these are the bytes of a stored row.
#[must_use]
pub fn is_row(stored: &[u8]) -> bool {
    split_row(stored).is_ok()
}

fn stored(rows: &Rows, key: &[u8]) -> Result<Found, StoreError> {
    let Some(stored) = rows.get(key).map_err(StoreError::of)? else { return Ok(None) };
    let (version, value) = split_row(stored.value())?;
    Ok(Some((version, Bytes::copy_from_slice(value))))
}

fn split_row(stored: &[u8]) -> Result<(u64, &[u8]), StoreError> {
    match stored.split_first_chunk::<ROW_FIXED_BYTES>() {
        Some(([0, version @ ..], value)) => Ok((u64::from_le_bytes(*version), value)),
        _ => Err(StoreError("a row on the disk has a form that this build does not know".into())),
    }
}
