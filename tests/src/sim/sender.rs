//! A client that sends batches with an id by which they are known when they are sent again. It is either the client that
//! applications embed, or one that speaks the protocol itself and is less patient.

use super::workload::connect;
use rand::RngExt;
use shkv_client::{Check, Client, Error};
use shkv_proto::link::{CallError, Link, LinkError};
use shkv_proto::message::{Batch, BatchDone, BatchOp, Condition, Failure, Hello, MapDone, Role, WriteId};
use shkv_proto::route::Routes;
use shkv_proto::{Frame, Header, Kind, NodeId, ShardId, codec, world};
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::time::Instant;

/// How long one batch may take, with all its attempts.
const BATCH_TIME_MAX: Duration = Duration::from_secs(4);
/// How long one attempt may take.
const ATTEMPT_TIME_MAX: Duration = Duration::from_millis(900);
/// The keyspace.
const KEYSPACE: &str = "default";

/// One of the two.
pub enum Asker {
    /// The client that applications embed.
    Library(Client),
    /// One of its own.
    Own(Box<Sender>),
}

impl Asker {
    /// The client that applications embed.
    pub async fn library(homes: &[String]) -> Self {
        Self::Library(connect(homes).await)
    }

    /// One of its own.
    #[must_use]
    pub fn own(homes: Vec<String>) -> Self {
        let client = world::rng().random_range(1..=u64::MAX);
        Self::Own(Box::new(Sender { homes, links: BTreeMap::new(), routes: None, client, sequence: 0, tries: 0 }))
    }

    /// Does a batch until its outcome is known or its time is up.
    pub async fn batch(&mut self, ops: &[BatchOp<'_>], values: &[u8]) -> Became {
        match self {
            Self::Library(client) => by_library(client, ops, values).await,
            Self::Own(sender) => sender.batch(ops, values).await,
        }
    }
}

async fn by_library(client: &Client, ops: &[BatchOp<'_>], values: &[u8]) -> Became {
    let mut txn = client.txn().deadline(BATCH_TIME_MAX);
    let mut rest = values;
    for op in ops {
        txn = match *op {
            BatchOp::Put { key, value_bytes, condition } => {
                let (value, behind) = rest.split_at(value_bytes as usize);
                rest = behind;
                txn.put_if(key, value.to_vec(), check(&condition))
            }
            BatchOp::Delete { key, condition } => txn.delete_if(key, check(&condition)),
            BatchOp::Check { key, condition } => txn.check(key, check(&condition)),
            BatchOp::Read { key } => txn.read(key),
        };
    }
    match txn.commit().await {
        Ok(done) => {
            Became::Done(done.rows.into_iter().map(|row| row.map(|row| (row.version, row.value.to_vec()))).collect())
        }
        Err(Error::Unknown { .. }) => Became::Unknown,
        Err(Error::Condition { .. } | Error::Refused { .. } | Error::Unavailable { .. }) => Became::Not,
    }
}

fn check(condition: &Condition<'_>) -> Check {
    match *condition {
        Condition::Always => Check::Always,
        Condition::Absent => Check::Absent,
        Condition::Present => Check::Present,
        Condition::Version(version) => Check::Version(version),
        Condition::Value(value) => Check::Value(value.to_vec().into()),
    }
}

/// What became of a batch.
pub enum Became {
    /// Done, with what its reads found.
    Done(Vec<Option<(u64, Vec<u8>)>>),
    /// Certainly not done.
    Not,
    /// Unknown.
    Unknown,
}

/// A client of its own: it speaks the protocol and decides itself when to send again.
pub struct Sender {
    homes: Vec<String>,
    links: BTreeMap<String, Link>,
    routes: Option<Routes>,
    client: u64,
    sequence: u64,
    tries: u32,
}

impl Sender {
    fn link(&mut self, addr: &str) -> Link {
        let open = || Link::open(addr, Hello::ours(None, Role::Client), |_| Ok(()));
        self.links.entry(addr.to_owned()).or_insert_with(open).clone()
    }

    async fn learn(&mut self) {
        let home = self.homes[self.tries as usize % self.homes.len()].clone();
        let link = self.link(&home);
        let asked = link.ask::<MapDone>(Frame::new(Header::new(Kind::Map), vec![], vec![]), soon()).await;
        if let Ok((done, _)) = asked {
            let routes = Routes::new(done.map, self.routes.as_ref());
            done.leaders.iter().for_each(|(shard, node)| routes.note_leader(*shard, *node));
            self.routes = Some(routes);
        }
    }

    /// Sends a batch until its outcome is known or its time is up. The same id goes with every attempt.
    async fn batch(&mut self, ops: &[BatchOp<'_>], values: &[u8]) -> Became {
        let began = Instant::now();
        self.sequence += 1;
        let mut may_be_done = false;
        loop {
            let age_ms = began.elapsed().as_millis() as u32;
            if began.elapsed() > BATCH_TIME_MAX {
                return if may_be_done { Became::Unknown } else { Became::Not };
            }
            self.tries = self.tries.wrapping_add(1);
            let id = WriteId { client: self.client, sequence: self.sequence, answered: self.sequence - 1, age_ms };
            match self.attempt(ops, values, id).await {
                Ok(became) => return became,
                Err(Attempt::Not) => {}
                Err(Attempt::Unknown) => may_be_done = true,
            }
            let pause = world::rng().random_range(10..120);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
    }

    async fn attempt(&mut self, ops: &[BatchOp<'_>], values: &[u8], id: WriteId) -> Result<Became, Attempt> {
        if self.routes.is_none() || self.tries.is_multiple_of(4) {
            self.learn().await;
        }
        let (shard, node, addr, head) = {
            let routes = self.routes.as_ref().ok_or(Attempt::Not)?;
            let keyspace = routes.map().keyspace(KEYSPACE).ok_or(Attempt::Not)?.id;
            let shards = ops.iter().filter_map(|op| routes.shard_of(keyspace, op.key()));
            let info = shards.min_by_key(|info| info.id).ok_or(Attempt::Not)?;
            let target = routes.target(info, shkv_proto::message::Consistency::Linearizable, b"", self.tries);
            let node = target.ok_or(Attempt::Not)?;
            let addr = routes.map().node(node).ok_or(Attempt::Not)?.addr.clone();
            let batch = Batch { keyspace, ops: ops.to_vec(), id: Some(id) };
            (info.id, node, addr, codec::encode(&batch).map_err(|_| Attempt::Not)?)
        };
        let link = self.link(&addr);
        let frame = Frame::new(Header { shard, ..Header::new(Kind::Batch) }, head, values.to_vec());
        match link.ask::<BatchDone>(frame, soon()).await {
            Ok((done, tail)) => Ok(Became::Done(rows_of(&done, &tail))),
            Err(CallError::Failure(failure)) => self.failed(shard, node, &failure),
            Err(CallError::Link(LinkError::NotSent(_))) => {
                self.note(shard, node, None);
                Err(Attempt::Not)
            }
            Err(CallError::Link(LinkError::Lost(_) | LinkError::Expired)) => {
                self.note(shard, node, None);
                Err(Attempt::Unknown)
            }
        }
    }

    fn failed(&self, shard: ShardId, node: NodeId, failure: &Failure) -> Result<Became, Attempt> {
        match failure {
            Failure::Condition { .. } => Ok(Became::Not),
            // What is refused now may have been done by an attempt before.
            Failure::Refusal { .. } => Ok(Became::Unknown),
            Failure::NotLeader { hint } => {
                self.note(shard, node, *hint);
                Err(Attempt::Not)
            }
            Failure::WrongShard { .. } | Failure::Busy { .. } | Failure::Behind { .. } | Failure::Aborted { .. } => {
                Err(Attempt::Not)
            }
            Failure::Unknown { .. } => Err(Attempt::Unknown),
        }
    }

    fn note(&self, shard: ShardId, node: NodeId, hint: Option<NodeId>) {
        if let Some(routes) = &self.routes {
            routes.note_not_leader(shard, node, hint);
        }
    }
}

/// What became of an attempt that does not settle it.
enum Attempt {
    Not,
    Unknown,
}

fn soon() -> Instant {
    Instant::now() + ATTEMPT_TIME_MAX
}

fn rows_of(done: &BatchDone, tail: &[u8]) -> Vec<Option<(u64, Vec<u8>)>> {
    let mut rest = tail;
    let mut row = |read: &Option<shkv_proto::message::RowRead>| {
        let read = (*read)?;
        let (value, behind) = rest.split_at_checked(read.value_bytes as usize)?;
        rest = behind;
        Some((read.version, value.to_vec()))
    };
    done.rows.iter().map(&mut row).collect()
}
