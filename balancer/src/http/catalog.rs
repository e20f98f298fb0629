//! The database's catalog: schema, shards and servers. It is a row of the store, so that any balancer knows it and none
//! has to keep it. Every change is conditional on the version that it was thought out on.

#![expect(clippy::disallowed_methods, reason = "a shell: a newer map is waited for only so long")]

use crate::http::store::{Ask, Found, Store};
use bytes::Bytes;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use shkv_proto::KeyspaceId;
use shkv_proto::message::{Condition, Failure, RefusalCode};
use shkv_proto::rows::{ID_MAX, Schema, Shards};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// The keyspace of the front end's own rows.
const KEYSPACE: &str = "catalog";
/// Copies of it.
const REPLICAS: u32 = 3;
/// The database's row.
const DATABASE: &[u8] = b"database";
/// How long a newer map is waited for when a keyspace of the catalog is not in ours.
const MAP_TIME_MAX: Duration = Duration::from_secs(2);

/// What the database consists of.
#[derive(Clone, PartialEq, Debug, Default, Serialize, Deserialize)]
pub(crate) struct Catalog {
    /// The keyspace of the shards' rows; nothing before the first `/init`.
    pub(crate) keyspace: Option<String>,
    /// The columns.
    pub(crate) schema: Option<Schema>,
    /// The shards.
    pub(crate) shards: Shards,
    /// The servers, each with the shards that it keeps.
    pub(crate) servers: BTreeMap<String, Vec<String>>,
    /// Shards that a server was told to configure and that have no range: each has a keyspace of its own.
    pub(crate) tables: BTreeMap<String, String>,
}

/// Where the rows of a shard are.
#[derive(Clone, PartialEq, Eq, Debug)]
pub(crate) struct Place {
    /// The keyspace.
    pub(crate) keyspace: String,
    /// Its first id.
    pub(crate) low: u64,
    /// Its last id.
    pub(crate) high: u64,
}

impl Catalog {
    /// Where the rows of a shard are.
    pub(crate) fn place(&self, shard: &str) -> Option<Place> {
        if let (Some(shard), Some(keyspace)) = (self.shards.named(shard), &self.keyspace) {
            return Some(Place { keyspace: keyspace.clone(), low: shard.low, high: shard.end() - 1 });
        }
        let keyspace = self.tables.get(shard)?.clone();
        Some(Place { keyspace, low: 0, high: ID_MAX })
    }

    /// The servers that keep a shard.
    pub(crate) fn keepers(&self, shard: &str) -> Vec<String> {
        let keeps =
            |(name, shards): (&String, &Vec<String>)| shards.iter().any(|one| one == shard).then(|| name.clone());
        self.servers.iter().filter_map(keeps).collect()
    }
}

/// Reads the catalog, with the version of its row.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn read(store: &Store, ask: &Ask) -> Result<(Catalog, Option<u64>), Failure> {
    read_row(store, DATABASE, ask).await
}

/// Writes the catalog if its row has still this version.
///
/// # Errors
/// [`Failure`]; [`Failure::Condition`] if somebody else was faster.
pub(crate) async fn write(store: &Store, catalog: &Catalog, version: Option<u64>, ask: &Ask) -> Result<(), Failure> {
    write_row(store, DATABASE, catalog, version, ask).await
}

/// The catalog's row, if there is one.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn find(store: &Store, ask: &Ask) -> Result<Option<Found>, Failure> {
    find_row(store, DATABASE, ask).await
}

/// Reads a row of the catalog's keyspace.
///
/// # Errors
/// [`Failure`].
pub(crate) async fn read_row<T: DeserializeOwned + Default>(
    store: &Store,
    key: &[u8],
    ask: &Ask,
) -> Result<(T, Option<u64>), Failure> {
    match find_row(store, key, ask).await? {
        None => Ok((T::default(), None)),
        Some(found) => Ok((parsed(&found)?, Some(found.version))),
    }
}

async fn find_row(store: &Store, key: &[u8], ask: &Ask) -> Result<Option<Found>, Failure> {
    let keyspace = match store.keyspace(KEYSPACE) {
        Ok(keyspace) => keyspace,
        Err(_) => store.ensure_hashed(KEYSPACE, 1, REPLICAS).await?,
    };
    Ok(store.get(keyspace, key, ask).await?.row)
}

/// What a row of the catalog's keyspace says.
///
/// # Errors
/// That it cannot be read.
pub(crate) fn parsed<T: DeserializeOwned>(found: &Found) -> Result<T, Failure> {
    serde_json::from_slice(&found.value)
        .map_err(|error| Failure::refusal(RefusalCode::Conflict, format!("the catalog cannot be read: {error}")))
}

/// Writes a row of the catalog's keyspace if it has still this version.
///
/// # Errors
/// [`Failure`]; [`Failure::Condition`] if somebody else was faster.
pub(crate) async fn write_row<T: Serialize>(
    store: &Store,
    key: &[u8],
    row: &T,
    version: Option<u64>,
    ask: &Ask,
) -> Result<(), Failure> {
    let keyspace = store.ensure_hashed(KEYSPACE, 1, REPLICAS).await?;
    let bytes = serde_json::to_vec(row)
        .map_err(|error| Failure::refusal(RefusalCode::Malformed, format!("the catalog cannot be written: {error}")))?;
    let condition = version.map_or(Condition::Absent, Condition::Version);
    store.put(keyspace, key, Bytes::from(bytes), condition, ask).await.map(|_| ())
}

/// The keyspace of a name that the catalog names: it may be in a newer map than ours.
///
/// # Errors
/// That there is none.
pub(crate) async fn keyspace(store: &Store, name: &str, ask: &Ask) -> Result<KeyspaceId, Failure> {
    let until = ask.deadline.min(Instant::now() + MAP_TIME_MAX);
    loop {
        let epoch = store.cluster().look(|routes| routes.map().epoch);
        match store.keyspace(name) {
            Err(Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }) if Instant::now() < until => {
                store.cluster().newer_map(epoch, until).await;
            }
            known => return known,
        }
    }
}
