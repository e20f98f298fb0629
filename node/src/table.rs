//! A shard's rows as readers see them: a table in memory that takes applied writes, a sealed one that is on its way to
//! redb, and redb. Pure but for what [`Base`] reads.
//!
//! Invariants of [`View`]: `applied`, `revision` and `ledger` belong to exactly the writes that are in it; a row in `active` hides
//! one in `sealed`, and that one hides the one in `base`.

use crate::arena::Slot;
use crate::log::Mark;
use crate::machine::Ledger;
use crate::memtable::Table;
use crate::store::{Base, StoreError};
use bytes::Bytes;
use shkv_proto::outbox::TAIL_COPY_BYTES_MAX;
use std::sync::Arc;

/// What a get finds.
pub type Found = Option<(u64, Bytes)>;

/// What a get finds whose value may have been copied elsewhere.
pub type FoundInto = Option<(u64, Option<Bytes>)>;

/// A shard's rows at one point of its log.
pub struct View {
    /// Takes the writes.
    pub active: Table,
    /// Is being flushed.
    pub sealed: Option<Arc<Table>>,
    /// Was flushed.
    pub base: Base,
    /// The last entry that is in it.
    pub applied: Mark,
    /// The mutations that are in it.
    pub revision: u64,
    /// What the shard remembers beside its rows, as of the same entry.
    pub ledger: Ledger,
}

impl View {
    /// The row of `key`.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get(&self, key: &[u8]) -> Result<Found, StoreError> {
        let sealed = || self.sealed.as_ref().and_then(|table| table.get(key));
        match self.active.get(key).or_else(sealed) {
            Some(Slot::Live { version, value }) => Ok(Some((version, value.to_bytes()))),
            Some(Slot::Dead) => Ok(None),
            None => self.base.get(key),
        }
    }

    /// The row of `key`. A small value that lies in memory is appended to `small`, which costs less than to share it; only
    /// another one is returned.
    ///
    /// # Errors
    /// [`StoreError`].
    pub fn get_into(&self, key: &[u8], small: &mut Vec<u8>) -> Result<FoundInto, StoreError> {
        let sealed = || self.sealed.as_ref().and_then(|table| table.get(key));
        match self.active.get(key).or_else(sealed) {
            Some(Slot::Live { version, value }) if value.len() <= TAIL_COPY_BYTES_MAX => {
                small.extend_from_slice(&value);
                Ok(Some((version, None)))
            }
            Some(Slot::Live { version, value }) => Ok(Some((version, Some(value.to_bytes())))),
            Some(Slot::Dead) => Ok(None),
            None => Ok(self.base.get(key)?.map(|(version, value)| (version, Some(value)))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::page::{self, Page, PageLimits, PageReader};
    use crate::store::{Flush, ReplicaMeta, Store};
    use proptest::prelude::*;
    use shkv_proto::map::Part;
    use shkv_proto::message::{Consistency, Scan, SnapshotHead};
    use shkv_proto::{KeyspaceId, ReplicaId, ShardId};
    use std::collections::BTreeMap;

    const SHARD: ShardId = ShardId(1);

    fn rows_of(page: &Page) -> Vec<(u8, (u64, Bytes))> {
        assert_eq!(page.keys.len(), page.rows.len(), "each key is one byte");
        let rows = page.iter().map(|(key, version, value)| (key[0], (version, Bytes::copy_from_slice(value))));
        let rows: Vec<_> = rows.collect();
        assert_eq!(rows.len(), page.rows.len());
        rows
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
        let (keyspace, part) = (KeyspaceId(1), Part::everything());
        ReplicaMeta { replica: ReplicaId(1), keyspace, part, homes: vec![], state, revision }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Put(u8),
        Delete(u8),
        Get(u8),
        Seal,
        Flush,
        /// A snapshot with the rows of these keys takes the place of all.
        Install(Vec<u8>),
        /// The replica is deleted, and a new one made.
        Replace,
        /// The process begins anew behind a flush.
        Restart,
    }

    fn steps() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            6 => (0..40_u8).prop_map(Step::Put),
            4 => (0..40_u8).prop_map(Step::Delete),
            6 => (0..40_u8).prop_map(Step::Get),
            1 => Just(Step::Seal),
            1 => Just(Step::Flush),
        ];
        prop::collection::vec(step, 0..120)
    }

    fn steps_of_replicas() -> impl Strategy<Value = Vec<Step>> {
        let step = prop_oneof![
            20 => (0..40_u8).prop_map(Step::Get),
            6 => (0..40_u8).prop_map(Step::Put),
            4 => (0..40_u8).prop_map(Step::Delete),
            2 => Just(Step::Seal),
            2 => Just(Step::Flush),
            1 => prop::collection::vec(0..40_u8, 0..20).prop_map(Step::Install),
            1 => Just(Step::Replace),
            1 => Just(Step::Restart),
        ];
        prop::collection::vec(step, 0..160)
    }

    fn flush(view: &mut View, store: &Store) {
        if let Some(table) = view.sealed.take() {
            store
                .flush(
                    &[Flush { shard: SHARD, meta: meta(view.revision), table, ledger: Ledger::default() }],
                    &Default::default(),
                )
                .unwrap();
            view.base = store.base(SHARD).unwrap();
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(40))]

        /// Wherever a row is, in memory, on its way to redb or in it, gets and pages see what a plain map would hold.
        #[test]
        fn gets_and_pages_agree_with_a_plain_map(
            steps in steps(), rows in 1..9_usize, bytes in 1..200_usize, reverse: bool, keys_only: bool, low in 0..40_u8, high in 0..41_u8,
        ) {
            let folder = tempfile::tempdir().unwrap();
            let (store, _) = Store::open(&crate::disk::RealDisk(folder.path().to_owned()), 1 << 20).unwrap();
            store.create_replica(SHARD, &meta(0)).unwrap();
            let base = store.base(SHARD).unwrap();
            let mut view = View { active: Table::default(), sealed: None, base, applied: Mark::default(), revision: 0, ledger: Ledger::default() };
            let mut model = BTreeMap::new();
            for step in steps {
                match step {
                    Step::Put(key) => {
                        view.revision += 1;
                        let value = Bytes::from(vec![key; view.revision as usize % 50]);
                        view.active.put(&[key], view.revision, &value, || value.clone());
                        model.insert(key, (view.revision, value));
                    }
                    Step::Delete(key) => {
                        view.revision += 1;
                        view.active.delete(&[key]);
                        model.remove(&key);
                    }
                    Step::Get(key) => prop_assert_eq!(view.get(&[key]).unwrap(), model.get(&key).cloned()),
                    Step::Seal if view.sealed.is_none() => view.sealed = Some(Arc::new(std::mem::take(&mut view.active))),
                    Step::Seal => {}
                    Step::Flush => flush(&mut view, &store),
                    Step::Install(_) | Step::Replace | Step::Restart => unreachable!("not among these steps"),
                }
            }
            for key in 0..40 {
                prop_assert_eq!(view.get(&[key]).unwrap(), model.get(&key).cloned());
                let mut small = vec![];
                let into = view.get_into(&[key], &mut small).unwrap();
                let into = into.map(|(version, whole)| (version, whole.unwrap_or_else(|| Bytes::from(small))));
                prop_assert_eq!(into, model.get(&key).cloned());
            }
            let whole = Scan {
                keyspace: KeyspaceId(1),
                start: vec![low],
                end: (high < 40).then(|| vec![high]),
                reverse,
                keys_only,
                rows_max: 0,
                bytes_max: 0,
                consistency: Consistency::Eventual,
                with: vec![],
            };
            let end = if high < 40 { high } else { 255 };
            let mut expected: Vec<_> = model.into_iter().filter(|(key, _)| (low..end).contains(key)).collect();
            if keys_only {
                expected.iter_mut().for_each(|(_, (_, value))| *value = Bytes::new());
            }
            if reverse {
                expected.reverse();
            }
            for at_once in [false, true] {
                let (mut scan, mut found) = (whole.clone(), Vec::new());
                loop {
                    let limits = PageLimits { rows, bytes };
                    let page = if at_once { page::read_at_once(&[&view], &scan, limits) } else { PageReader::begin(&view, &scan, limits).read(&scan, limits) };
                    let page = page.unwrap();
                    prop_assert!(page.rows.len() <= rows);
                    found.extend(rows_of(&page));
                    match page.next {
                        Some(next) => scan = scan.resumed(next),
                        None => break,
                    }
                }
                prop_assert_eq!(&found, &expected);
            }
        }

        /// The rows that were read of late are those that redb has, whatever befalls the replica: flushes, snapshots, its
        /// deletion, a restart. A hold on earlier rows goes on to see those.
        #[test]
        fn what_was_read_of_late_is_what_redb_has(steps in steps_of_replicas(), cache_bytes in prop_oneof![Just(0_usize), Just(16 << 10), Just(1 << 20)]) {
            let folder = tempfile::tempdir().unwrap();
            let open = || Store::open(&crate::disk::RealDisk(folder.path().to_owned()), cache_bytes).unwrap().0;
            let mut store = open();
            let mut replica = ReplicaMeta { replica: ReplicaId(1), ..meta(0) };
            store.create_replica(SHARD, &replica).unwrap();
            let view_of = |base| View { active: Table::default(), sealed: None, base, applied: Mark::default(), revision: 0, ledger: Ledger::default() };
            let mut view = view_of(store.base(SHARD).unwrap());
            let mut held: Option<Base> = None;
            let mut revision = 0;
            for step in steps {
                match step {
                    Step::Get(key) => {
                        for base in held.iter().chain([&view.base]) {
                            prop_assert_eq!(base.get(&[key]).unwrap(), base.get_uncached(&[key]).unwrap());
                        }
                    }
                    Step::Put(key) => {
                        revision += 1;
                        view.active.put(&[key], revision, &vec![key; revision as usize % 50], || unreachable!("it is small"));
                    }
                    Step::Delete(key) => view.active.delete(&[key]),
                    Step::Seal => {
                        if view.sealed.is_none() {
                            view.sealed = Some(Arc::new(std::mem::take(&mut view.active)));
                        }
                    }
                    Step::Flush => {
                        held = Some(view.base.clone());
                        flush(&mut view, &store);
                    }
                    Step::Install(keys) => {
                        held = Some(view.base.clone());
                        let mut keys = keys;
                        keys.sort_unstable();
                        keys.dedup();
                        revision += 1;
                        let row = |key: u8| {
                            let mut row = vec![0];
                            row.extend_from_slice(&revision.to_le_bytes());
                            row.push(key);
                            (Bytes::from(vec![key]), Bytes::from(row))
                        };
                        let rows: Vec<_> = keys.into_iter().map(row).collect();
                        store.stage_begin(SHARD).unwrap();
                        store.stage(SHARD, &rows, true).unwrap();
                        store.install(SHARD, &replica, &[]).unwrap();
                        view = view_of(store.base(SHARD).unwrap());
                        for (key, _) in rows {
                            prop_assert_eq!(view.base.get(&key).unwrap(), Some((revision, key)));
                        }
                    }
                    Step::Replace => {
                        held = None;
                        store.delete_replica(SHARD, replica.replica).unwrap();
                        replica.replica = ReplicaId(replica.replica.0 + 1);
                        prop_assert!(store.create_replica(SHARD, &replica).unwrap());
                        view = view_of(store.base(SHARD).unwrap());
                    }
                    Step::Restart => {
                        flush(&mut view, &store);
                        held = None;
                        drop(view);
                        drop(store);
                        store = open();
                        view = view_of(store.base(SHARD).unwrap());
                    }
                }
            }
        }
    }
}
