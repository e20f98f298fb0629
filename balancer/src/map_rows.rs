//! The shard map as rows of the system shard, and back. Pure.
//!
//! | key             | value                                      |
//! |-----------------|--------------------------------------------|
//! | `keyspace/<id>` | [`KeyspaceInfo`]                           |
//! | `meta`          | [`Meta`]; without it a bootstrap was cut short |
//! | `node/<id>`     | [`NodeInfo`], the id in hexadecimal        |
//! | `shard/<id>`    | [`ShardInfo`], the system shard included   |
//!
//! Rows of other names are not of the map and are passed over.

use serde::{Deserialize, Serialize, de::DeserializeOwned};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{MAP_NODES_MAX, MAP_SHARDS_MAX};
use shkv_proto::map::NodeInfo;
use shkv_proto::message::{Batch, BatchOp};
use shkv_proto::{ClusterId, Epoch, KeyspaceId, Map};

#[cfg(doc)]
use shkv_proto::map::{KeyspaceInfo, ShardInfo};

/// The form of the rows that this build writes and reads.
const FORMAT: u32 = 1;
/// Most rows that are read: those of the largest map, and as many again that are not of it.
pub(crate) const ROWS_MAX: usize = 2 * (MAP_NODES_MAX + MAP_SHARDS_MAX);

/// The row that says that the map is whole.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Meta {
    format: u32,
    cluster: ClusterId,
}

/// A row of the system shard.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct MapRow {
    /// Its key.
    pub(crate) key: Vec<u8>,
    /// Its value.
    pub(crate) value: Vec<u8>,
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

/// The row of a node.
pub(crate) fn node_row(node: &NodeInfo) -> Result<MapRow, CodecError> {
    Ok(MapRow { key: format!("node/{}", node.id).into_bytes(), value: codec::encode(node)? })
}

/// All rows of a map.
pub(crate) fn rows_of(map: &Map) -> Result<Vec<MapRow>, CodecError> {
    let mut rows = Vec::with_capacity(map.nodes.len() + map.keyspaces.len() + map.shards.len() + 1);
    for keyspace in &map.keyspaces {
        rows.push(MapRow { key: format!("keyspace/{}", keyspace.id).into_bytes(), value: codec::encode(keyspace)? });
    }
    for node in &map.nodes {
        rows.push(node_row(node)?);
    }
    for shard in &map.shards {
        rows.push(MapRow { key: format!("shard/{}", shard.id).into_bytes(), value: codec::encode(shard)? });
    }
    let meta = Meta { format: FORMAT, cluster: map.cluster };
    rows.push(MapRow { key: b"meta".to_vec(), value: codec::encode(&meta)? });
    Ok(rows)
}

/// The map that the rows of the system shard hold; `None` while they have no `meta`.
pub(crate) fn map_of(cluster: ClusterId, epoch: Epoch, rows: &[MapRow]) -> Result<Option<Map>, RowsError> {
    let mut map = Map { cluster, epoch, nodes: vec![], keyspaces: vec![], shards: vec![] };
    let mut meta: Option<Meta> = None;
    for row in rows {
        match row.key.split(|byte| *byte == b'/').next() {
            Some(b"keyspace") => map.keyspaces.push(value_of(row)?),
            Some(b"node") => map.nodes.push(value_of(row)?),
            Some(b"shard") => map.shards.push(value_of(row)?),
            Some(b"meta") => meta = Some(value_of(row)?),
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
    map.nodes.sort_unstable_by_key(|node| node.id);
    map.keyspaces.sort_unstable_by_key(|keyspace| keyspace.id);
    map.shards.sort_unstable_by_key(|shard| shard.id);
    map.check().map_err(RowsError::Broken)?;
    Ok(Some(map))
}

fn value_of<T: DeserializeOwned>(row: &MapRow) -> Result<T, RowsError> {
    codec::decode(&row.value)
        .map_err(|error| RowsError::Row { key: String::from_utf8_lossy(&row.key).into_owned(), error })
}

/// Head and tail of the batch that writes `rows` in one step.
pub(crate) fn batch_of(rows: &[MapRow]) -> Result<(Vec<u8>, Vec<u8>), CodecError> {
    let ops = rows.iter().map(|row| BatchOp::Put { key: &row.key, value_bytes: row.value.len() as u32 }).collect();
    let head = codec::encode(&Batch { keyspace: KeyspaceId::SYSTEM, ops })?;
    Ok((head, rows.iter().flat_map(|row| row.value.iter().copied()).collect()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Bootstrap;
    use crate::layout::first_map;
    use shkv_proto::NodeId;

    fn map() -> Map {
        let nodes: Vec<NodeInfo> = (1..=12)
            .map(|n| NodeInfo { id: NodeId(n), name: format!("Server{n}"), addr: format!("127.0.0.1:{n}") })
            .collect();
        first_map(ClusterId(7), &nodes, Bootstrap { shards: 13, replicas: 3 })
    }

    #[test]
    fn a_map_survives_its_rows_in_any_order() {
        let mut rows = rows_of(&map()).unwrap();
        rows.sort_by(|a, b| a.key.cmp(&b.key)); // as a scan gives them: shard/10 before shard/2
        rows.push(MapRow { key: b"lease".to_vec(), value: vec![1, 2, 3] });
        let read = map_of(ClusterId(7), Epoch(9), &rows).unwrap().expect("meta is there");
        assert_eq!(read, Map { epoch: Epoch(9), ..map() });
    }

    #[test]
    fn without_meta_there_is_no_map() {
        let mut rows = rows_of(&map()).unwrap();
        assert_eq!(rows.pop().map(|row| row.key), Some(b"meta".to_vec()));
        assert!(map_of(ClusterId(7), Epoch(9), &rows).unwrap().is_none());
        assert!(map_of(ClusterId(7), Epoch(9), &[]).unwrap().is_none());
    }

    #[test]
    fn broken_rows_are_an_error_that_names_them() {
        let rows = rows_of(&map()).unwrap();
        assert!(matches!(map_of(ClusterId(8), Epoch(9), &rows), Err(RowsError::Cluster { .. })));

        let mut cut = rows.clone();
        cut[1].value.pop();
        let error = map_of(ClusterId(7), Epoch(9), &cut).unwrap_err().to_string();
        assert!(error.contains("node/0000000000000001"), "{error}");

        let mut gap = rows.clone();
        gap.retain(|row| row.key != b"shard/4");
        assert!(matches!(map_of(ClusterId(7), Epoch(9), &gap), Err(RowsError::Broken(_))));

        let mut newer = rows;
        let meta = Meta { format: 2, cluster: ClusterId(7) };
        newer.last_mut().unwrap().value = codec::encode(&meta).unwrap();
        assert!(matches!(map_of(ClusterId(7), Epoch(9), &newer), Err(RowsError::Format(2))));
    }
}
