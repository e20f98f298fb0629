//! The write-ahead log of a node: one stream of records for all its shards, one fdatasync for all that waits.
//!
//! [`Log`] is the core: it is driven inline by tests and by [`writer`]'s thread in production. Segments are made ahead,
//! full of zeroes, and used again, so that a sync writes data and nothing else.
//!
//! Invariants:
//! * a write begins only after the write before it is synced, so a sound record proves every earlier write durable;
//! * segments are given up oldest first, so whatever record is left, all that came after it is left too;
//! * each segment opens with the hard state and the last entry's mark of every shard, so no older segment is needed for
//!   those;
//! * a shard that was forgotten ([`ShardWrite::forget`]) is as one that never was: it pins no segment and opens none.

pub mod format;
pub mod recover;
pub mod writer;

use crate::disk::{Disk, DiskFile};
#[cfg(feature = "sim")]
use crate::inspect::{Bug, planted};
use bytes::Bytes;
use format::{
    ENTRY_FIXED_BYTES, Place, RECORD_HEADER_BYTES, Record, SEGMENT_HEADER_BYTES, SegmentHeader, record_bytes,
};
use parking_lot::Mutex;
use shkv_proto::{NodeId, ShardId};
use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Spare segments kept ready, so that a segment that is full costs no wait, and a full disk shows before the log is stuck.
const SPARES: usize = 1;

/// Why the log cannot go on or cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum LogError {
    /// There is no space for another segment. Nothing was written; it may be tried again when there is.
    #[error("no space for another log segment: {0}")]
    NoSpace(io::Error),
    /// The system failed. After a failed sync it is not known what is on the disk.
    #[error("log {what}: {error}")]
    Io {
        /// What was done.
        what: String,
        /// How it failed.
        error: io::Error,
    },
    /// The log is damaged where it was durable. Starting anyway could forget acknowledged writes.
    #[error(
        "log damaged: {0}; restore this node's data directory from a copy, or remove it and let the node join as a new one"
    )]
    Corrupt(String),
}

pub(crate) fn io_error(what: impl Into<String>) -> impl FnOnce(io::Error) -> LogError {
    let what = what.into();
    move |error| LogError::Io { what, error }
}

/// A hard state as Raft has it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Hard {
    /// Term.
    pub term: u64,
    /// Vote.
    pub vote: u64,
    /// Commit index.
    pub commit: u64,
}

/// An index with its term.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Mark {
    /// Index.
    pub index: u64,
    /// Term.
    pub term: u64,
}

/// An entry with its data.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LogEntry {
    /// Index.
    pub index: u64,
    /// Term.
    pub term: u64,
    /// As in [`shkv_proto::message::EntryHead::kind`].
    pub kind: u8,
    /// Its data.
    pub data: Bytes,
}

/// What a shard wants written, in this order: reset, hard state, entries.
#[derive(Clone, Debug, Default)]
pub struct ShardWrite {
    /// The shard.
    pub shard: u32,
    /// Begin the log anew behind this mark.
    pub reset: Option<Mark>,
    /// Entries without a gap.
    pub entries: Vec<LogEntry>,
    /// A new hard state.
    pub hard: Option<Hard>,
}

impl ShardWrite {
    /// Makes the log forget a shard: its entries, its term and its vote. A replica that is made here later has another id,
    /// and must not take them for its own.
    #[must_use]
    pub fn forget(shard: u32) -> Self {
        Self { shard, reset: Some(Mark::default()), entries: vec![], hard: Some(Hard::default()) }
    }
}

/// Where an entry's record is.
#[derive(Clone, Copy, Debug)]
struct Position {
    term: u64,
    segment: u64,
    offset: u64,
    payload: u32,
}

/// What the log knows of a shard.
#[derive(Debug, Default)]
struct ShardLog {
    hard: Hard,
    base: Mark,
    entries: VecDeque<Position>,
}

impl ShardLog {
    fn last_index(&self) -> u64 {
        self.base.index + self.entries.len() as u64
    }

    fn last(&self) -> Mark {
        let term = self.entries.back().map_or(self.base.term, |entry| entry.term);
        Mark { index: self.last_index(), term }
    }

    /// Whether it says no more than the absence of a shard does. Such a shard is left out of the openings of segments.
    fn is_blank(&self) -> bool {
        self.hard == Hard::default() && self.base == Mark::default() && self.entries.is_empty()
    }

    /// Puts an entry in its place; says so when there is a gap before it.
    fn put(&mut self, index: u64, position: Position) -> Result<(), String> {
        if index <= self.base.index {
            return Ok(()); // written before the base moved beyond it
        }
        if index > self.last_index() + 1 {
            return Err(format!("entry {index} follows entry {}", self.last_index()));
        }
        self.entries.truncate((index - self.base.index - 1) as usize);
        self.entries.push_back(position);
        Ok(())
    }

    fn drop_to(&mut self, index: u64) {
        if index <= self.base.index {
            return;
        }
        let count = ((index - self.base.index) as usize).min(self.entries.len());
        if let Some(last) = self.entries.drain(..count).next_back() {
            self.base = Mark { index: self.base.index + count as u64, term: last.term };
        }
    }
}

struct Segment {
    file: Arc<dyn DiskFile>,
    bytes: u64,
    /// The last entry of each shard that has entries here.
    last: BTreeMap<u32, u64>,
}

/// What readers and the writer share.
#[derive(Default)]
struct Index {
    shards: BTreeMap<u32, ShardLog>,
    segments: BTreeMap<u64, Segment>,
    spares: Vec<(String, Arc<dyn DiskFile>)>,
}

impl Index {
    /// Takes in a write that is durable, with where its entries are. Writes of one shard may follow each other in one
    /// append, so each is taken in whole before the next.
    fn apply(&mut self, write: &ShardWrite, placed: impl Iterator<Item = (u64, Position)>) {
        let log = self.shards.entry(write.shard).or_default();
        if let Some(mark) = write.reset {
            log.base = mark;
            log.entries.clear();
            // What is void must not keep a segment.
            for segment in self.segments.values_mut() {
                segment.last.remove(&write.shard);
            }
        }
        if let Some(hard) = write.hard {
            log.hard = hard;
        }
        for (entry, position) in placed {
            log.put(entry, position).expect("Raft hands over entries without a gap");
            if let Some(segment) = self.segments.get_mut(&position.segment) {
                let last = segment.last.entry(write.shard).or_default();
                *last = entry.max(*last);
            }
        }
        if log.is_blank() {
            self.shards.remove(&write.shard);
        }
    }
}

/// The log.
pub struct Log {
    disk: Arc<dyn Disk>,
    node: NodeId,
    segment_bytes: u64,
    index: Mutex<Index>,
    cursor: Mutex<Cursor>,
    spares_made: AtomicU64,
}

/// Where the next record goes.
struct Cursor {
    segment: u64,
    offset: u64,
    capacity: u64,
    lsn: u64,
    buffer: Vec<u8>,
}

impl Log {
    fn segment_name(segment: u64) -> String {
        format!("{segment:016x}.log")
    }

    /// Writes and syncs everything in `writes` with one write and one sync, two if a segment ends here.
    ///
    /// # Errors
    /// [`LogError::NoSpace`]: nothing was written. [`LogError::Io`]: the log cannot be used any more.
    pub fn append(&self, writes: &[ShardWrite]) -> Result<(), LogError> {
        let mut cursor = self.cursor.lock();
        let (mut records, mut bytes) = (0, 0);
        for (_, record) in writes.iter().flat_map(records_of) {
            records += 1;
            bytes += record_bytes(record.payload_bytes()) as u64;
        }
        if records == 0 {
            return Ok(());
        }
        if cursor.offset + bytes > cursor.capacity {
            self.next_segment(&mut cursor, bytes)?;
        }
        let cursor = &mut *cursor;
        cursor.buffer.clear();
        let mut placed = Vec::with_capacity(writes.len());
        for ((shard, record), place) in writes.iter().flat_map(records_of).zip(0_u32..) {
            let offset = cursor.offset + cursor.buffer.len() as u64;
            if let Record::Entry { index, term, .. } = record {
                let payload = record.payload_bytes() as u32;
                placed.push((index, Position { term, segment: cursor.segment, offset, payload }));
            }
            let at = Place { segment: cursor.segment, lsn: cursor.lsn, place, ends_write: place + 1 == records };
            record.encode(at, shard, &mut cursor.buffer);
            cursor.lsn += 1;
        }
        let file = self.current_file(cursor.segment);
        file.write_at(&cursor.buffer, cursor.offset).map_err(io_error("write"))?;
        let synced = || file.sync();
        #[cfg(feature = "sim")]
        let synced = || match () {
            () if planted(Bug::AckBeforeSync) => Ok(()),
            () if planted(Bug::SyncErrorIgnored) => synced().or(Ok(())),
            () => synced(),
        };
        synced().map_err(io_error("fdatasync"))?;
        cursor.offset += cursor.buffer.len() as u64;
        if cursor.buffer.capacity() > 4 << 20 {
            cursor.buffer = Vec::new();
        }
        let mut index = self.index.lock();
        let mut placed = placed.into_iter();
        for write in writes {
            index.apply(write, placed.by_ref().take(write.entries.len()));
        }
        Ok(())
    }

    /// Whether so many bytes can be appended without making a segment first, which takes a while.
    pub fn has_room(&self, bytes: usize) -> bool {
        let cursor = self.cursor.lock();
        cursor.offset + bytes as u64 <= cursor.capacity || !self.index.lock().spares.is_empty()
    }

    fn current_file(&self, segment: u64) -> Arc<dyn DiskFile> {
        self.index.lock().segments.get(&segment).expect("the current segment is open").file.clone()
    }

    /// Opens the next segment, with room for at least `records` bytes.
    fn next_segment(&self, cursor: &mut Cursor, records: u64) -> Result<(), LogError> {
        let opening = self.opening_writes();
        let opening_bytes: usize = opening.iter().map(|(_, record)| record_bytes(record.payload_bytes())).sum();
        let needed = SEGMENT_HEADER_BYTES + opening_bytes as u64 + records;
        let (name, file) = self.take_spare(needed)?;
        let segment = cursor.segment + 1;
        let capacity = file.bytes().map_err(io_error("size of a segment"))?;
        let header = SegmentHeader { node: self.node, segment, lsn: cursor.lsn, opening: opening.len() as u32 };
        let mut bytes = header.encode();
        for ((shard, record), place) in opening.iter().zip(1..) {
            let ends_write = place == opening.len() as u32;
            let at = Place { segment, lsn: cursor.lsn + u64::from(place), place, ends_write };
            record.encode(at, *shard, &mut bytes);
        }
        self.disk.rename(&name, &Self::segment_name(segment)).map_err(io_error("rename of a segment"))?;
        // Durable before any record behind it: a segment whose header is bad then never held an acknowledged write.
        file.write_at(&bytes, 0).map_err(io_error("write of a segment's opening"))?;
        file.sync().map_err(io_error("fdatasync"))?;
        cursor.segment = segment;
        cursor.offset = bytes.len() as u64;
        cursor.capacity = capacity;
        cursor.lsn += 1 + opening.len() as u64;
        self.index.lock().segments.insert(segment, Segment { file, bytes: capacity, last: BTreeMap::new() });
        Ok(())
    }

    fn opening_writes(&self) -> Vec<(ShardId, Record<'static>)> {
        let index = self.index.lock();
        let state = |(shard, log): (&u32, &ShardLog)| {
            let Hard { term, vote, commit } = log.hard;
            let Mark { index, term: base_term } = log.last();
            [
                (ShardId(*shard), Record::Base { index, term: base_term }),
                (ShardId(*shard), Record::Hard { term, vote, commit }),
            ]
        };
        index.shards.iter().flat_map(state).collect()
    }

    fn take_spare(&self, needed: u64) -> Result<(String, Arc<dyn DiskFile>), LogError> {
        if needed <= self.segment_bytes
            && let Some(spare) = self.index.lock().spares.pop()
        {
            return Ok(spare);
        }
        self.make_segment(needed.max(self.segment_bytes))
    }

    fn make_segment(&self, bytes: u64) -> Result<(String, Arc<dyn DiskFile>), LogError> {
        let name = {
            // Segments are made by two threads, so a number is drawn once; those of an earlier process may still be there.
            let names = self.disk.list().map_err(io_error("list"))?;
            let mut drawn = std::iter::repeat_with(|| self.spares_made.fetch_add(1, Ordering::Relaxed));
            drawn
                .find_map(|n| Some(format!("spare-new-{n}")).filter(|name| !names.contains(name)))
                .expect("numbers do not end")
        };
        match self.disk.create(&name, bytes) {
            Ok(file) => Ok((name, file)),
            Err(error) if is_no_space(&error) => Err(LogError::NoSpace(error)),
            Err(error) => Err(LogError::Io { what: "making a segment".into(), error }),
        }
    }

    /// Whether [`Log::make_spares`] has something to do.
    pub fn wants_spare(&self) -> bool {
        self.index.lock().spares.len() < SPARES
    }

    /// Makes spare segments ahead of need.
    ///
    /// # Errors
    /// [`LogError`]; without space the log goes on until the current segment is full.
    pub fn make_spares(&self) -> Result<(), LogError> {
        while self.index.lock().spares.len() < SPARES {
            let spare = self.make_segment(self.segment_bytes)?;
            self.index.lock().spares.push(spare);
        }
        Ok(())
    }

    /// Whether nothing was ever written.
    pub fn is_new(&self) -> bool {
        self.index.lock().segments.is_empty()
    }

    /// Bytes of all segments in use.
    pub fn bytes(&self) -> u64 {
        self.index.lock().segments.values().map(|segment| segment.bytes).sum()
    }

    /// Gives up the oldest segments while more than `retain_bytes` are in use and all their entries are in redb, as
    /// `flushed` tells for each shard. Returns for each shard the last index that is no longer in the log.
    ///
    /// # Errors
    /// [`LogError::Io`].
    pub fn release(&self, flushed: &BTreeMap<u32, u64>, retain_bytes: u64) -> Result<BTreeMap<u32, u64>, LogError> {
        let mut dropped = BTreeMap::new();
        loop {
            let (segment, file, bytes) = {
                let mut index = self.index.lock();
                let in_use: u64 = index.segments.values().map(|segment| segment.bytes).sum();
                let oldest = match index.segments.first_key_value() {
                    Some((id, segment)) if index.segments.len() > 1 && in_use > retain_bytes => {
                        let is_flushed = |(shard, last): (&u32, &u64)| flushed.get(shard).is_none_or(|f| last <= f);
                        let may_go = segment.last.iter().all(is_flushed);
                        #[cfg(feature = "sim")]
                        let may_go = may_go || planted(Bug::LogCutTooFar);
                        may_go.then_some(*id)
                    }
                    Some(_) | None => None,
                };
                let Some(id) = oldest else { return Ok(dropped) };
                let segment = index.segments.remove(&id).expect("it was just found");
                for (shard, last) in &segment.last {
                    if let Some(log) = index.shards.get_mut(shard) {
                        log.drop_to(*last);
                        dropped.insert(*shard, log.base.index);
                    }
                }
                (id, segment.file, segment.bytes)
            };
            let name = Self::segment_name(segment);
            // Half as many as are kept wait to be used again: until the next ones are given up that is about what it takes.
            let spares_max = (retain_bytes / 2 / self.segment_bytes).max(SPARES as u64 + 1);
            let spare_wanted = (self.index.lock().spares.len() as u64) < spares_max && bytes == self.segment_bytes;
            if spare_wanted {
                let spare = format!("spare-{segment:x}");
                self.disk.rename(&name, &spare).map_err(io_error("rename of a segment"))?;
                self.index.lock().spares.push((spare, file));
            } else {
                self.disk.remove(&name).map_err(io_error("removal of a segment"))?;
            }
        }
    }

    /// Reads entries `low..high` of a shard from the disk, at least one, then up to `bytes_max` of data.
    ///
    /// # Errors
    /// [`LogError::Io`]; [`LogError::Corrupt`] when an entry's check is wrong or an entry is not there.
    pub fn read(&self, shard: ShardId, low: u64, high: u64, bytes_max: u64) -> Result<Vec<LogEntry>, LogError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for wanted in low..high {
            let found = {
                let index = self.index.lock();
                let at = |log: &ShardLog| log.entries.get(wanted.checked_sub(log.base.index + 1)? as usize).copied();
                index.shards.get(&shard.0).and_then(at).and_then(|position| {
                    let file = index.segments.get(&position.segment)?.file.clone();
                    Some((position, file))
                })
            };
            let Some((position, file)) = found else {
                return Err(LogError::Corrupt(format!("shard {shard} has no entry {wanted}")));
            };
            bytes += u64::from(position.payload);
            if !entries.is_empty() && bytes > bytes_max {
                break;
            }
            let mut buffer = vec![0; RECORD_HEADER_BYTES + position.payload as usize];
            file.read_at(&mut buffer, position.offset).map_err(io_error("read"))?;
            let buffer = Bytes::from(buffer);
            match format::decode_record(position.segment, &buffer).map(|placed| placed.record) {
                Some(Record::Entry { index, term, kind, .. }) if index == wanted && term == position.term => {
                    let data = buffer.slice(RECORD_HEADER_BYTES + ENTRY_FIXED_BYTES..);
                    entries.push(LogEntry { index, term, kind, data });
                }
                _ => {
                    return Err(LogError::Corrupt(format!("entry {wanted} of shard {shard} is not sound on the disk")));
                }
            }
        }
        Ok(entries)
    }
}

fn records_of(write: &ShardWrite) -> impl Iterator<Item = (ShardId, Record<'_>)> {
    let reset = write.reset.map(|mark| Record::Reset { index: mark.index, term: mark.term });
    let entries = write.entries.iter().map(|entry| Record::Entry {
        index: entry.index,
        term: entry.term,
        kind: entry.kind,
        data: &entry.data,
    });
    let hard = write.hard.map(|hard| Record::Hard { term: hard.term, vote: hard.vote, commit: hard.commit });
    reset.into_iter().chain(hard).chain(entries).map(|record| (ShardId(write.shard), record))
}

pub(crate) fn is_no_space(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded)
}
