//! What the system shard holds, as rows, and back: the map, and beside it who controls the cluster and what is wanted. Pure.
//!
//! | key             | value                                          | of the map |
//! |-----------------|------------------------------------------------|---|
//! | `keyspace/<id>` | [`KeyspaceInfo`]                               | yes |
//! | `meta`          | [`Meta`]; without it a bootstrap was cut short | yes |
//! | `node/<id>`     | [`NodeInfo`], the id in hexadecimal            | yes |
//! | `shard/<id>`    | [`ShardInfo`], the system shard included       | yes |
//! | `controller`    | [`Controller`]: who holds the lease            | no |
//! | `event/<n>`     | what the controller did, in a ring             | no |
//! | `gone/<id>`     | [`Gone`]: a node that is of the cluster no more | no |
//! | `lease`         | counts renewals                                | no |
//! | `wanted/<name>` | [`Wanted`]: a node that is to be started       | no |
//!
//! The map's epoch is the version of `meta`, which every change of the map rewrites: so a change that was thought out on
//! an older map is refused, and what is not of the map does not age it.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{MAP_NODES_MAX, MAP_SHARDS_MAX};
use shkv_proto::message::{Batch, BatchOp, Condition, Controller, Event, Gone};
use shkv_proto::{ClusterId, Epoch, KeyspaceId, Map, ShardId};
use std::collections::BTreeMap;

#[cfg(doc)]
use shkv_proto::map::{KeyspaceInfo, NodeInfo, ShardInfo};

/// The form of the rows that this build writes and reads.
const FORMAT: u32 = 1;
/// Most rows that are read: those of the largest map, and as many again that are not of it.
pub(crate) const ROWS_MAX: usize = 2 * (MAP_NODES_MAX + MAP_SHARDS_MAX);
/// Things that the controller did that are remembered.
pub(crate) const EVENTS_MAX: u64 = 64;
/// Nodes that are remembered to be of the cluster no more.
pub(crate) const GONE_MAX: usize = 1_000;

/// The row that is rewritten with each change of the map.
pub(crate) const META: &[u8] = b"meta";
/// The row that says who controls the cluster.
pub(crate) const CONTROLLER: &[u8] = b"controller";
/// The row that its holder renews.
pub(crate) const LEASE: &[u8] = b"lease";

/// The row that says that the map is whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Meta {
    format: u32,
    cluster: ClusterId,
    next_shard: ShardId,
    next_keyspace: KeyspaceId,
}

/// A node that is to be started by a provisioner.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub(crate) struct Wanted {
    /// Its name.
    pub(crate) name: String,
    /// Its instance.
    pub(crate) instance: String,
    /// How often it was tried to start it.
    pub(crate) tries: u32,
    /// What last went wrong.
    pub(crate) error: Option<String>,
    /// Whether it is wanted no more: then it is here until its instance is removed.
    pub(crate) cancelled: bool,
}

impl Wanted {
    /// A node that was not tried to start yet.
    pub(crate) fn new(name: impl Into<String>, instance: impl Into<String>) -> Self {
        Self { name: name.into(), instance: instance.into(), tries: 0, error: None, cancelled: false }
    }
}

/// A row as it was read.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MapRow {
    /// Its key.
    pub(crate) key: Vec<u8>,
    /// Its version.
    pub(crate) version: u64,
    /// Its value.
    pub(crate) value: Vec<u8>,
}

/// What the system shard holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct State {
    /// The map.
    pub(crate) map: Map,
    /// Who holds the lease, and the version of the row that says so.
    pub(crate) controller: Option<(Controller, u64)>,
    /// Nodes that are to be started, by name.
    pub(crate) wanted: BTreeMap<String, Wanted>,
    /// Nodes that are of the cluster no more, the oldest first.
    pub(crate) gone: Vec<Gone>,
    /// What the controller did, the oldest first; numbered from the first on.
    pub(crate) events: Vec<(u64, Event)>,
}

/// Why rows are not a map.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RowsError {
    /// A row does not decode.
    #[error("row {key} of the system shard: {error}")]
    Row {
        /// Its key.
        key: String,
        /// What is wrong.
        error: CodecError,
    },
    /// Written by a build that this one does not understand.
    #[error("the map has format {0}, this build reads format {FORMAT}; use a build of the cluster's release")]
    Format(u32),
    /// The map of another cluster.
    #[error("the map is of cluster {found}, not of {expected}")]
    Cluster {
        /// The one in the rows.
        found: ClusterId,
        /// The one asked.
        expected: ClusterId,
    },
    /// The rows contradict each other.
    #[error("the map in the system shard is broken: {0}")]
    Broken(String),
}

impl State {
    /// A map, and nothing beside it.
    pub(crate) fn of(map: Map) -> Self {
        Self { map, controller: None, wanted: BTreeMap::new(), gone: vec![], events: vec![] }
    }

    /// Remembers something that was done.
    pub(crate) fn note(&mut self, at_unix_s: u64, text: impl Into<String>) {
        let number = self.events.last().map_or(0, |(number, _)| number + 1);
        self.events.push((number, Event { at_unix_s, text: text.into() }));
        let surplus = self.events.len().saturating_sub(EVENTS_MAX as usize);
        self.events.drain(..surplus);
    }

    /// Remembers that a node is of the cluster no more.
    pub(crate) fn forget(&mut self, gone: Gone) {
        self.gone.push(gone);
        let surplus = self.gone.len().saturating_sub(GONE_MAX);
        self.gone.drain(..surplus);
    }

    /// The rows of the map but for `meta`.
    fn map_rows(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, CodecError> {
        let mut rows = BTreeMap::new();
        for keyspace in &self.map.keyspaces {
            rows.insert(format!("keyspace/{}", keyspace.id).into_bytes(), codec::encode(keyspace)?);
        }
        for node in &self.map.nodes {
            rows.insert(format!("node/{}", node.id).into_bytes(), codec::encode(node)?);
        }
        for shard in &self.map.shards {
            rows.insert(format!("shard/{}", shard.id).into_bytes(), codec::encode(shard)?);
        }
        Ok(rows)
    }

    /// The rows beside the map that a change may be about.
    fn other_rows(&self) -> Result<BTreeMap<Vec<u8>, Vec<u8>>, CodecError> {
        let mut rows = BTreeMap::new();
        for (name, wanted) in &self.wanted {
            rows.insert(format!("wanted/{name}").into_bytes(), codec::encode(wanted)?);
        }
        for gone in &self.gone {
            rows.insert(format!("gone/{}", gone.id).into_bytes(), codec::encode(gone)?);
        }
        for event in &self.events {
            rows.insert(format!("event/{}", event.0 % EVENTS_MAX).into_bytes(), codec::encode(event)?);
        }
        Ok(rows)
    }

    fn meta(&self) -> Result<Vec<u8>, CodecError> {
        let Map { cluster, next_shard, next_keyspace, .. } = self.map;
        codec::encode(&Meta { format: FORMAT, cluster, next_shard, next_keyspace })
    }

    /// Head and tail of the batch that makes `after` of this state, if it is still this one. With `as_controller`, only
    /// if the row that says so is still of that version. `None` if there is nothing to write.
    pub(crate) fn batch_to(&self, after: &Self, as_controller: Option<u64>) -> Result<Option<HeadAndTail>, CodecError> {
        let (old_map, new_map) = (self.map_rows()?, after.map_rows()?);
        let (old_other, new_other) = (self.other_rows()?, after.other_rows()?);
        let map_changes = old_map != new_map || self.meta()? != after.meta()? || self.map.epoch == Epoch::NONE;
        let mut puts: Vec<(&[u8], Vec<u8>, Condition<'_>)> = Vec::new();
        let mut deletes: Vec<(&[u8], Condition<'_>)> = Vec::new();
        for (old, new) in [(&old_map, &new_map), (&old_other, &new_other)] {
            let written = new.iter().filter(|(key, value)| old.get(*key) != Some(value));
            puts.extend(written.map(|(key, value)| (&key[..], value.clone(), unchanged(key, old.get(key)))));
            let gone = old.iter().filter(|(key, _)| !new.contains_key(*key));
            deletes.extend(gone.map(|(key, value)| (&key[..], unchanged(key, Some(value)))));
        }
        if !map_changes && puts.is_empty() && deletes.is_empty() {
            return Ok(None);
        }
        let known = match self.map.epoch {
            Epoch::NONE => Condition::Absent,
            Epoch(version) => Condition::Version(version),
        };
        let mut ops = Vec::with_capacity(puts.len() + deletes.len() + 2);
        if let Some(version) = as_controller {
            ops.push(BatchOp::Check { key: CONTROLLER, condition: Condition::Version(version) });
        }
        if map_changes {
            puts.push((META, after.meta()?, known)); // last: its version is then that of the whole batch
        } else {
            ops.push(BatchOp::Check { key: META, condition: known });
        }
        ops.extend(deletes.into_iter().map(|(key, condition)| BatchOp::Delete { key, condition }));
        for (key, value, condition) in &puts {
            ops.push(BatchOp::Put { key, value_bytes: value.len() as u32, condition: *condition });
        }
        let head = codec::encode(&Batch { keyspace: KeyspaceId::SYSTEM, ops, id: None })?;
        Ok(Some((head, puts.iter().flat_map(|(_, value, _)| value.iter().copied()).collect())))
    }
}

/// The body of a batch: what it does, and the values that it puts, one behind the other.
pub(crate) type HeadAndTail = (Vec<u8>, Vec<u8>);

/// What must hold of a row that is to change. Rows of the map are held by `meta`. Those of wanted nodes are written by
/// operators and by the controller without it, and neither may undo what the other has done. The rest is only told.
fn unchanged<'a>(key: &[u8], before: Option<&'a Vec<u8>>) -> Condition<'a> {
    match before {
        _ if !key.starts_with(b"wanted/") => Condition::Always,
        Some(value) => Condition::Value(value),
        None => Condition::Absent,
    }
}

/// What the rows of the system shard hold; `None` while they have no `meta`.
pub(crate) fn state_of(cluster: ClusterId, rows: &[MapRow]) -> Result<Option<State>, RowsError> {
    let mut state = State::of(Map::empty(cluster));
    let map = &mut state.map;
    let mut meta: Option<Meta> = None;
    for row in rows {
        match row.key.split(|byte| *byte == b'/').next() {
            Some(b"keyspace") => map.keyspaces.push(value_of(row)?),
            Some(b"node") => map.nodes.push(value_of(row)?),
            Some(b"shard") => map.shards.push(value_of(row)?),
            Some(b"meta") => {
                meta = Some(value_of(row)?);
                map.epoch = Epoch(row.version);
            }
            Some(b"controller") => state.controller = Some((value_of(row)?, row.version)),
            Some(b"wanted") => {
                let wanted: Wanted = value_of(row)?;
                state.wanted.insert(wanted.name.clone(), wanted);
            }
            Some(b"gone") => state.gone.push(value_of(row)?),
            Some(b"event") => state.events.push(value_of(row)?),
            Some(_) | None => {}
        }
    }
    let Some(meta) = meta else { return Ok(None) };
    if meta.format != FORMAT {
        return Err(RowsError::Format(meta.format));
    }
    if meta.cluster != cluster {
        return Err(RowsError::Cluster { found: meta.cluster, expected: cluster });
    }
    (map.next_shard, map.next_keyspace) = (meta.next_shard, meta.next_keyspace);
    map.nodes.sort_unstable_by_key(|node| node.id);
    map.keyspaces.sort_unstable_by_key(|keyspace| keyspace.id);
    map.shards.sort_unstable_by_key(|shard| shard.id);
    map.check().map_err(RowsError::Broken)?;
    state.gone.sort_by_key(|gone| gone.at_unix_s);
    state.events.sort_unstable_by_key(|(number, _)| *number);
    Ok(Some(state))
}

/// Decodes a row's value.
pub(crate) fn value_of<T: DeserializeOwned>(row: &MapRow) -> Result<T, RowsError> {
    codec::decode(&row.value)
        .map_err(|error| RowsError::Row { key: String::from_utf8_lossy(&row.key).into_owned(), error })
}
