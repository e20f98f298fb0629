//! What Raft reads of a replica's log: terms of all entries, the newest entries from memory, older ones from the disk.

use crate::log::{Hard, Log, LogEntry, Mark};
use crate::replica::convert;
use raft::eraftpb::{ConfState, Entry, HardState, Snapshot};
use raft::{GetEntriesContext, RaftState, Storage, StorageError};
use shkv_proto::message::SnapshotHead;
use shkv_proto::{ReplicaId, ShardId};
use std::cell::Cell;
use std::collections::VecDeque;
use std::sync::Arc;

/// What an entry takes in memory beside its data, about.
const ENTRY_BYTES: usize = 160;

/// A replica's log as Raft sees it. Entries are readable as soon as they are handed to the log's writer.
///
/// Invariants: `terms[n]` is the term of entry `base.index + 1 + n`; `recent` is a suffix of the same entries.
pub struct ReplicaLog {
    shard: ShardId,
    log: Arc<Log>,
    hard: Hard,
    conf: ConfState,
    base: Mark,
    terms: VecDeque<u64>,
    recent: VecDeque<Entry>,
    recent_bytes: usize,
    /// The state that redb holds: what a snapshot would be.
    pub(super) flushed: SnapshotHead,
    /// Whether a follower needs a snapshot that is newer than what redb holds.
    pub(super) flush_wanted: Cell<bool>,
}

impl ReplicaLog {
    pub(super) fn new(
        shard: ShardId,
        log: Arc<Log>,
        hard: Hard,
        base: Mark,
        terms: Vec<u64>,
        flushed: SnapshotHead,
    ) -> Self {
        let conf = convert::conf_state(&flushed);
        let (recent, flush_wanted) = (VecDeque::new(), Cell::new(false));
        Self { shard, log, hard, conf, base, terms: terms.into(), recent, recent_bytes: 0, flushed, flush_wanted }
    }

    pub(super) fn first(&self) -> u64 {
        self.base.index + 1
    }

    pub(super) fn last(&self) -> u64 {
        self.base.index + self.terms.len() as u64
    }

    fn recent_first(&self) -> u64 {
        self.last() + 1 - self.recent.len() as u64
    }

    fn term_of(&self, index: u64) -> Option<u64> {
        if index == self.base.index {
            return Some(self.base.term);
        }
        self.terms.get(index.checked_sub(self.first())? as usize).copied()
    }

    pub(super) fn set_hard(&mut self, hard: Hard) {
        self.hard = hard;
    }

    /// Takes entries in; those at and behind the first one's index that were there before are void.
    pub(super) fn append(&mut self, entries: &[Entry]) {
        let Some(first) = entries.first() else { return };
        let keep = (first.index - self.first()) as usize;
        while self.terms.len() > keep {
            self.terms.pop_back();
            if let Some(void) = self.recent.pop_back() {
                self.recent_bytes -= bytes_of(&void);
            }
        }
        for entry in entries {
            self.terms.push_back(entry.term);
            self.recent_bytes += bytes_of(entry);
            self.recent.push_back(entry.clone());
        }
    }

    /// Lets go of recent entries up to `index`, which are durable and applied, while there are more than so many bytes.
    pub(super) fn shrink(&mut self, index: u64, bytes_max: usize) {
        while self.recent_bytes > bytes_max && self.recent.front().is_some_and(|entry| entry.index <= index) {
            if let Some(entry) = self.recent.pop_front() {
                self.recent_bytes -= bytes_of(&entry);
            }
        }
    }

    /// Entries up to `index` are no longer in the log.
    pub(super) fn drop_to(&mut self, index: u64) {
        if index <= self.base.index {
            return;
        }
        let Some(term) = self.term_of(index) else { return };
        self.terms.drain(..(index - self.base.index) as usize);
        self.base = Mark { index, term };
        while self.recent.front().is_some_and(|entry| entry.index <= index) {
            if let Some(entry) = self.recent.pop_front() {
                self.recent_bytes -= bytes_of(&entry);
            }
        }
    }

    /// The log begins anew behind a snapshot.
    pub(super) fn reset(&mut self, snapshot: SnapshotHead) {
        self.base = Mark { index: snapshot.index, term: snapshot.term };
        self.terms.clear();
        self.recent.clear();
        self.recent_bytes = 0;
        self.flushed = snapshot;
    }
}

impl Storage for ReplicaLog {
    fn initial_state(&self) -> raft::Result<RaftState> {
        let mut hard = HardState::default();
        hard.term = self.hard.term;
        hard.vote = self.hard.vote;
        hard.commit = self.hard.commit;
        Ok(RaftState::new(hard, self.conf.clone()))
    }

    fn entries(
        &self,
        low: u64,
        high: u64,
        max_size: impl Into<Option<u64>>,
        _context: GetEntriesContext,
    ) -> raft::Result<Vec<Entry>> {
        if low < self.first() {
            return Err(StorageError::Compacted.into());
        }
        if high > self.last() + 1 {
            return Err(StorageError::Unavailable.into());
        }
        let bytes_max = max_size.into().unwrap_or(u64::MAX);
        let recent_first = self.recent_first();
        if low < recent_first {
            let read = self.log.read(self.shard, low, high.min(recent_first), bytes_max);
            let entries = read.map_err(|error| StorageError::Other(Box::new(error)))?;
            return Ok(entries.into_iter().map(entry_of).collect());
        }
        let mut entries = Vec::new();
        let mut bytes = 0;
        for entry in self.recent.range((low - recent_first) as usize..(high - recent_first) as usize) {
            bytes += entry.data.len() as u64;
            if !entries.is_empty() && bytes > bytes_max {
                break;
            }
            entries.push(entry.clone());
        }
        Ok(entries)
    }

    fn term(&self, index: u64) -> raft::Result<u64> {
        if index < self.base.index {
            return Err(StorageError::Compacted.into());
        }
        self.term_of(index).ok_or_else(|| StorageError::Unavailable.into())
    }

    fn first_index(&self) -> raft::Result<u64> {
        Ok(self.first())
    }

    fn last_index(&self) -> raft::Result<u64> {
        Ok(self.last())
    }

    fn snapshot(&self, request_index: u64, to: u64) -> raft::Result<Snapshot> {
        // One that does not know its receiver as a member is not taken by it.
        let knows = convert::is_member(&self.flushed, ReplicaId(to));
        if self.flushed.index < request_index || self.flushed.index == 0 || !knows {
            self.flush_wanted.set(true);
            return Err(StorageError::SnapshotTemporarilyUnavailable.into());
        }
        Ok(convert::snapshot(&self.flushed))
    }
}

fn bytes_of(entry: &Entry) -> usize {
    ENTRY_BYTES + entry.data.len()
}

fn entry_of(entry: LogEntry) -> Entry {
    let mut out = Entry { index: entry.index, term: entry.term, data: entry.data, ..Entry::default() };
    out.set_entry_type(convert::entry_type(entry.kind));
    out
}
