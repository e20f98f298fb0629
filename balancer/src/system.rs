//! Reading and writing the map in the system shard, and making the replicas that the map names.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and draws tasks together")]

use crate::cluster::Cluster;
use crate::forward::{self, Request, Way};
use crate::layout;
use crate::map_rows::{self, MapRow, ROWS_MAX, RowsError};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::link::{self, CallError};
use shkv_proto::map::NodeInfo;
use shkv_proto::merge::rows_of_page;
use shkv_proto::message::{Consistency, CreateReplica, Failure, Scan, ScanDone};
use shkv_proto::retry::{self, Step};
use shkv_proto::{Epoch, Frame, Header, KeyspaceId, Kind, Map, NodeId, ShardId};
use std::sync::Arc;
use std::time::Duration;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long one request to the system shard may take.
const SYSTEM_TIME_MAX: Duration = Duration::from_secs(2);
/// How often a map whose pages are of different revisions is read again before it is left for later.
const READS_MAX: u32 = 5;
/// How long a node may take to make a replica: it writes to its disk.
const CREATE_TIME_MAX: Duration = Duration::from_secs(10);
/// Shortest pause before a replica is asked for again.
const CREATE_PAUSE: Duration = Duration::from_millis(20);
/// Replicas that are being made at the same time.
const CREATES_MAX: usize = 64;

/// Why the map could not be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SystemError {
    /// The system shard did not do it.
    #[error("the system shard: {0}")]
    Failure(#[from] Failure),
    /// What it said makes no sense.
    #[error(transparent)]
    Rows(#[from] RowsError),
    /// Bytes that do not decode, or do not fit.
    #[error("the system shard: {0}")]
    Codec(#[from] CodecError),
    /// The map changed each time while it was read.
    #[error("the map kept changing while it was read")]
    Restless,
    /// More rows than a map can have.
    #[error("the system shard has more than {ROWS_MAX} rows")]
    TooManyRows,
}

/// The map as it is in the system shard now; `None` if its bootstrap was cut short.
pub(crate) async fn read(cluster: &Arc<Cluster>) -> Result<Option<Map>, SystemError> {
    for _ in 0..READS_MAX {
        if let Some((epoch, rows)) = read_once(cluster).await? {
            return Ok(map_rows::map_of(cluster.id, epoch, &rows)?);
        }
    }
    Err(SystemError::Restless)
}

/// All rows at one revision; `None` if it changed between two pages.
async fn read_once(cluster: &Arc<Cluster>) -> Result<Option<(Epoch, Vec<MapRow>)>, SystemError> {
    let mut scan = Scan {
        keyspace: KeyspaceId::SYSTEM,
        start: vec![],
        end: None,
        reverse: false,
        keys_only: false,
        rows_max: 0,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
    };
    let mut rows = Vec::new();
    let mut revision = None;
    loop {
        let answer = ask(cluster, Kind::Scan, codec::encode(&scan)?, vec![]).await?;
        let mut page: ScanDone = codec::decode(&answer.head)?;
        if revision.is_some_and(|revision| revision != page.revision) {
            return Ok(None);
        }
        revision = Some(page.revision);
        let row = |row: shkv_proto::merge::Row| MapRow { key: row.key.to_vec(), value: row.value.to_vec() };
        rows.extend(rows_of_page(&mut page, answer.tail)?.into_iter().map(row));
        if rows.len() > ROWS_MAX {
            return Err(SystemError::TooManyRows);
        }
        match page.next {
            None => return Ok(Some((Epoch(page.revision), rows))),
            Some(next) => scan = scan.resumed(next),
        }
    }
}

/// Writes a whole map in one step.
pub(crate) async fn write_map(cluster: &Arc<Cluster>, map: &Map) -> Result<(), SystemError> {
    let rows = map_rows::rows_of(map)?;
    write_rows(cluster, &rows).await
}

/// Writes the address of a node.
pub(crate) async fn write_node(cluster: &Arc<Cluster>, node: &NodeInfo) -> Result<(), SystemError> {
    write_rows(cluster, &[map_rows::node_row(node)?]).await
}

async fn write_rows(cluster: &Arc<Cluster>, rows: &[MapRow]) -> Result<(), SystemError> {
    let (head, tail) = map_rows::batch_of(rows)?;
    ask(cluster, Kind::Batch, head, tail).await?;
    Ok(())
}

async fn ask(cluster: &Arc<Cluster>, kind: Kind, head: Vec<u8>, tail: Vec<u8>) -> Result<Frame, Failure> {
    let request = Request {
        frame: Frame::new(Header::new(kind), head, tail),
        way: Way::Shard(ShardId::SYSTEM),
        consistency: Consistency::Linearizable,
        write: kind == Kind::Batch,
        own: true,
        deadline: Instant::now() + SYSTEM_TIME_MAX,
        lane: 0,
    };
    forward::carry(cluster, request).await
}

/// Replicas of the map that their nodes do not have, as far as the nodes have been heard.
fn missing(cluster: &Cluster, map: &Map) -> Vec<(NodeId, CreateReplica)> {
    let mut missing = Vec::new();
    for shard in &map.shards {
        for replica in &shard.replicas {
            let has_it = cluster.health(|health, _| {
                let status = health.status(replica.node)?;
                Some(status.replicas.iter().any(|here| here.shard == shard.id))
            });
            if has_it == Some(false)
                && let Some(create) = layout::creation(map.cluster, shard, replica.node)
            {
                missing.push((replica.node, create));
            }
        }
    }
    missing
}

/// Makes the replicas that are in the map and not on their nodes: the end of a bootstrap, whoever began it. A wiped node
/// has another id and is not in the map, so a replica that has forgotten its votes is never made by this.
pub(crate) async fn create_missing(cluster: &Arc<Cluster>, map: &Map) -> Result<(), CallError> {
    create_all(cluster, missing(cluster, map)).await
}

/// Makes replicas; those that are there already stay as they are. Those that stand for election come last: they would
/// ask in vain for the votes of replicas that do not exist yet, and wait for a whole election timeout to ask again.
pub(crate) async fn create_all(cluster: &Arc<Cluster>, wanted: Vec<(NodeId, CreateReplica)>) -> Result<(), CallError> {
    let (last, first) = wanted.into_iter().partition(|(_, create)| create.campaign);
    create_some(cluster, first).await?;
    create_some(cluster, last).await
}

async fn create_some(cluster: &Arc<Cluster>, wanted: Vec<(NodeId, CreateReplica)>) -> Result<(), CallError> {
    let mut wanted = wanted.into_iter();
    let mut under_way = JoinSet::new();
    loop {
        while under_way.len() < CREATES_MAX
            && let Some((node, create)) = wanted.next()
        {
            let cluster = cluster.clone();
            under_way.spawn(async move { create_one(&cluster, node, &create).await });
        }
        match under_way.join_next().await {
            None => return Ok(()),
            Some(Ok(result)) => result?,
            Some(Err(error)) => return Err(Failure::unknown(error.to_string()).into()),
        }
    }
}

/// Makes one replica. Making it twice is the same as making it once, so it is asked for again after every failure but a
/// refusal, until its time is up.
async fn create_one(cluster: &Cluster, node: NodeId, create: &CreateReplica) -> Result<(), CallError> {
    let deadline = Instant::now() + CREATE_TIME_MAX;
    let head = codec::encode(create).map_err(|error| Failure::malformed(&error))?;
    let frame = Frame::new(Header { shard: create.shard, ..Header::new(Kind::CreateReplica) }, head, vec![]);
    for tries in 1.. {
        let Some(home) = cluster.pool.get(node) else {
            return Err(Failure::unknown(format!("no address is known for node {node}")).into());
        };
        let result = home.link(tries as usize).call(frame.clone(), deadline).await.map_err(CallError::from);
        let result = result.and_then(|answer| Ok(link::done_or_failure(answer)?));
        let error = match result {
            Ok(_) => return Ok(()),
            Err(error) => error,
        };
        match retry::after(&error, false, tries) {
            Step::Again { after, .. } if Instant::now() + after.max(CREATE_PAUSE) < deadline => {
                tracing::debug!(%node, shard = %create.shard, %error, "a replica is not made yet");
                tokio::time::sleep(after.max(CREATE_PAUSE)).await;
            }
            Step::Again { .. } | Step::Stop(_) => return Err(error),
        }
    }
    Ok(())
}
