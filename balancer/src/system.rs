//! Reading and writing what the system shard holds, and making the replicas that the map names.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and draws tasks together")]

use crate::cluster::Cluster;
use crate::control::lease;
use crate::forward::{self, Request, Way};
use crate::map_rows::{self, CONTROLLER, LEASE, MapRow, ROWS_MAX, RowsError, State};
use shkv_proto::codec::{self, CodecError};
use shkv_proto::link::{self, CallError};
use shkv_proto::merge::{Page, Row};
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Condition, Consistency, Controller, CreateReplica, Failure, Get, GetDone, Scan,
};
use shkv_proto::retry::{self, Step};
use shkv_proto::{Frame, Header, KeyspaceId, Kind, Map, NodeId, ShardId};
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

/// What became of a change.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Written {
    /// It is written.
    Done,
    /// There was nothing to write.
    Nothing,
    /// What it was thought out on is no longer so: read, and think again.
    Stale,
    /// Somebody else controls the cluster.
    Deposed,
}

/// What the system shard holds now; `None` if its bootstrap was cut short.
pub(crate) async fn read(cluster: &Arc<Cluster>) -> Result<Option<State>, SystemError> {
    for _ in 0..READS_MAX {
        if let Some(rows) = read_once(cluster).await? {
            return Ok(map_rows::state_of(cluster.id, &rows)?);
        }
    }
    Err(SystemError::Restless)
}

/// All rows at one revision; `None` if it changed between two pages.
async fn read_once(cluster: &Arc<Cluster>) -> Result<Option<Vec<MapRow>>, SystemError> {
    let mut scan = Scan {
        keyspace: KeyspaceId::SYSTEM,
        start: vec![],
        end: None,
        reverse: false,
        keys_only: false,
        rows_max: 0,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
        with: vec![],
    };
    let mut rows = Vec::new();
    let mut revision = None;
    loop {
        let answer = ask(cluster, Kind::Scan, codec::encode(&scan)?, vec![]).await?;
        let page = Page::decode(&answer.head, answer.tail)?;
        if revision.is_some_and(|revision| revision != page.revision) {
            return Ok(None);
        }
        revision = Some(page.revision);
        let row = |row: Row| MapRow { key: row.key.to_vec(), version: row.version, value: row.value.to_vec() };
        rows.extend(page.rows.into_iter().map(row));
        if rows.len() > ROWS_MAX {
            return Err(SystemError::TooManyRows);
        }
        match page.next {
            None => return Ok(Some(rows)),
            Some(next) => scan = scan.resumed(next),
        }
    }
}

/// Makes `after` of `before`, if that is what there still is; as the controller only while it is the controller.
pub(crate) async fn write(
    cluster: &Arc<Cluster>,
    before: &State,
    after: &State,
    as_controller: Option<u64>,
) -> Result<Written, SystemError> {
    let Some((head, tail)) = before.batch_to(after, as_controller)? else { return Ok(Written::Nothing) };
    match ask(cluster, Kind::Batch, head, tail).await {
        Ok(_) => Ok(Written::Done),
        Err(Failure::Condition { operation: 0, .. }) if as_controller.is_some() => Ok(Written::Deposed),
        Err(Failure::Condition { .. }) => Ok(Written::Stale),
        Err(failure) => Err(failure.into()),
    }
}

/// Writes the first map. If there is one already, that one stays.
pub(crate) async fn write_first(cluster: &Arc<Cluster>, map: &Map) -> Result<(), SystemError> {
    let nothing = State::of(Map::empty(cluster.id));
    write(cluster, &nothing, &State::of(map.clone()), None).await.map(drop)
}

/// The rows of the lease.
pub(crate) async fn lease(cluster: &Arc<Cluster>) -> Result<(lease::Rows, Option<Controller>), SystemError> {
    let controller = get(cluster, CONTROLLER).await?;
    let renewed = get(cluster, LEASE).await?;
    let who = controller.as_ref().map(map_rows::value_of::<Controller>).transpose()?;
    let held = who.as_ref().zip(controller.as_ref()).map(|(who, row)| (who.balancer, row.version));
    Ok((lease::Rows { controller: held, lease: renewed.map(|row| row.version) }, who))
}

async fn get(cluster: &Arc<Cluster>, key: &[u8]) -> Result<Option<MapRow>, SystemError> {
    let get = Get { keyspace: KeyspaceId::SYSTEM, key, consistency: Consistency::Linearizable };
    let answer = ask(cluster, Kind::Get, codec::encode(&get)?, vec![]).await?;
    let done: GetDone = codec::decode(&answer.head)?;
    Ok(done.version.map(|version| MapRow { key: key.to_vec(), version, value: answer.tail.to_vec() }))
}

/// Writes who controls the cluster, if the rows of the lease are still as they were read. Gives the new version of
/// `controller`, or `None` if they are not.
pub(crate) async fn take_lease(
    cluster: &Arc<Cluster>,
    rows: lease::Rows,
    who: &Controller,
) -> Result<Option<u64>, SystemError> {
    let unchanged = |version: Option<u64>| version.map_or(Condition::Absent, Condition::Version);
    let value = codec::encode(who)?;
    let condition = unchanged(rows.controller.map(|(_, version)| version));
    let ops = vec![
        BatchOp::Check { key: LEASE, condition: unchanged(rows.lease) },
        BatchOp::Put { key: CONTROLLER, value_bytes: value.len() as u32, condition },
    ];
    conditional(cluster, ops, value).await
}

/// Writes that nobody controls the cluster, if `controller` is still of this version.
pub(crate) async fn give_up_lease(cluster: &Arc<Cluster>, version: u64, term: u64) -> Result<(), SystemError> {
    let value = codec::encode(&Controller { balancer: lease::NOBODY, addr: String::new(), term })?;
    let condition = Condition::Version(version);
    let ops = vec![BatchOp::Put { key: CONTROLLER, value_bytes: value.len() as u32, condition }];
    conditional(cluster, ops, value).await.map(drop)
}

/// Renews the lease, if `controller` is still of this version. `false` if it is not.
pub(crate) async fn renew_lease(cluster: &Arc<Cluster>, version: u64) -> Result<bool, SystemError> {
    let value = codec::encode(&version)?;
    let ops = vec![
        BatchOp::Check { key: CONTROLLER, condition: Condition::Version(version) },
        BatchOp::Put { key: LEASE, value_bytes: value.len() as u32, condition: Condition::Always },
    ];
    Ok(conditional(cluster, ops, value).await?.is_some())
}

async fn conditional(cluster: &Arc<Cluster>, ops: Vec<BatchOp<'_>>, tail: Vec<u8>) -> Result<Option<u64>, SystemError> {
    let head = codec::encode(&Batch { keyspace: KeyspaceId::SYSTEM, ops, id: None })?;
    match ask(cluster, Kind::Batch, head, tail).await {
        Ok(answer) => {
            let done: BatchDone = codec::decode(&answer.head)?;
            let revision = done.revisions.iter().find(|(shard, _)| *shard == ShardId::SYSTEM);
            Ok(Some(revision.map(|(_, revision)| *revision).ok_or_else(|| Failure::unknown("no revision is told"))?))
        }
        Err(Failure::Condition { .. }) => Ok(None),
        Err(failure) => Err(failure.into()),
    }
}

async fn ask(cluster: &Arc<Cluster>, kind: Kind, head: Vec<u8>, tail: Vec<u8>) -> Result<Frame, Failure> {
    let request = Request {
        frame: Frame::new(Header::new(kind), head, tail),
        way: Way::Shard(ShardId::SYSTEM),
        consistency: Consistency::Linearizable,
        write: kind == Kind::Batch,
        own: true,
        begun: Instant::now(),
        deadline: Instant::now() + SYSTEM_TIME_MAX,
        lane: 0,
    };
    forward::carry(cluster, &cluster.routes(), request).await
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
pub(crate) async fn create_one(cluster: &Cluster, node: NodeId, create: &CreateReplica) -> Result<(), CallError> {
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
