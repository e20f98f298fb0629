//! A shard's rows on their own, for the benchmarks of the parts: nothing here is for anybody else.

use crate::disk::RealDisk;
use crate::log::Mark;
use crate::machine::{self, Group, Ledger, Place, WriteKind};
use crate::memtable::Table;
use crate::page::{self, PageLimits};
use crate::store::{Flush, ReplicaMeta, Store};
use crate::table::View;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::map::Part;
use shkv_proto::message::{Condition, Consistency, Scan, SnapshotHead, Write, WriteId};
use shkv_proto::{KeyspaceId, ReplicaId, ShardId};
use std::error::Error;
use std::path::Path;
use std::sync::Arc;

const SHARD: ShardId = ShardId(1);
const KEYSPACE: KeyspaceId = KeyspaceId(1);

/// The rows of one replica.
pub struct ShardRows {
    store: Store,
    view: View,
}

impl ShardRows {
    /// No rows, with a redb file of their own in a folder.
    ///
    /// # Errors
    /// When the file cannot be made.
    pub fn new(folder: &Path, cache_bytes: usize) -> Result<Self, Box<dyn Error>> {
        let (store, _) = Store::open(&RealDisk(folder.to_owned()), cache_bytes)?;
        store.create_replica(SHARD, &meta(0))?;
        let base = store.base(SHARD)?;
        let (active, ledger) = (Table::default(), Ledger::default());
        Ok(Self { store, view: View { active, sealed: None, base, applied: Mark::default(), revision: 0, ledger } })
    }

    /// A log entry that puts these rows, each as a client's write.
    ///
    /// # Errors
    /// For a key that is too long.
    pub fn entry(puts: &[(&[u8], &[u8])], client: u64, first: u64) -> Result<Bytes, Box<dyn Error>> {
        let mut group = Group::new(1);
        for ((key, value), sequence) in puts.iter().zip(first..) {
            let id = WriteId { client, sequence, answered: sequence - 1, age_ms: 0 };
            let write = Write { keyspace: KEYSPACE, key, condition: Condition::Always, id: Some(id) };
            group.add(WriteKind::Put, &codec::encode(&write)?, value);
        }
        Ok(Bytes::from(group.finish()))
    }

    /// Applies an entry as a leader does; tells how many answers there are.
    ///
    /// # Errors
    /// For an entry that is none.
    pub fn apply(&mut self, entry: &Bytes) -> Result<usize, Box<dyn Error>> {
        let mut answers = Vec::new();
        machine::apply(entry, Place { shard: SHARD, term: 1 }, &mut self.view, Some(&mut answers))?;
        Ok(answers.len())
    }

    /// Writes what is in memory to redb.
    ///
    /// # Errors
    /// The disk's.
    pub fn flush(&mut self) -> Result<(), Box<dyn Error>> {
        let table = Arc::new(std::mem::take(&mut self.view.active));
        let (meta, ledger) = (meta(self.view.revision), Ledger::default());
        self.store.flush(&[Flush { shard: SHARD, meta, table, ledger }], &Default::default())?;
        self.view.base = self.store.base(SHARD)?;
        Ok(())
    }

    /// Whether there is a row.
    ///
    /// # Errors
    /// The disk's.
    pub fn has(&self, key: &[u8]) -> Result<bool, Box<dyn Error>> {
        Ok(self.view.get(key)?.is_some())
    }

    /// Reads a page of rows from a key on; tells how many there are.
    ///
    /// # Errors
    /// The disk's.
    pub fn page(&self, start: &[u8], rows: u32) -> Result<usize, Box<dyn Error>> {
        let scan = Scan {
            keyspace: KEYSPACE,
            start: start.to_vec(),
            end: None,
            reverse: false,
            keys_only: false,
            rows_max: rows,
            bytes_max: u32::MAX,
            consistency: Consistency::Linearizable,
            with: vec![],
        };
        let limits = PageLimits { rows: rows as usize, bytes: usize::MAX };
        Ok(page::read_at_once(&[&self.view], &scan, limits)?.rows.len())
    }
}

fn meta(revision: u64) -> ReplicaMeta {
    let state = SnapshotHead {
        index: revision,
        term: 1,
        voters: vec![],
        voters_outgoing: vec![],
        learners: vec![],
        learners_next: vec![],
        auto_leave: false,
    };
    let (keyspace, part) = (KEYSPACE, Part::everything());
    ReplicaMeta { replica: ReplicaId(1), keyspace, part, homes: vec![], state, revision }
}
