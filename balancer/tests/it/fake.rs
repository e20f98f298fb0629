//! A cluster that a test plays: nodes that speak the protocol, keep rows in memory, and misbehave when ordered to.
//!
//! The rows of a shard are kept once for all nodes; who leads it is written down, not elected. Nodes answer, as real
//! ones do, only for shards of which they were told to keep a replica.

use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::limits::Limits;
use shkv_proto::map::Part;
use shkv_proto::message::{
    Batch, BatchOp, Beat, Consistency, CountDone, CreateReplica, Failure, Get, GetDone, Hello, MapDone, NodeStatus,
    ReplicaStatus, Role, RowHead, Scan, ScanDone, Welcome, Write, WriteDone,
};
use shkv_proto::outbox::Outbox;
use shkv_proto::{ClusterId, Epoch, Frame, KeyspaceId, Kind, Map, NodeId, ReplicaId, ShardId, codec, session};
use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

/// The keyspace that a bootstrap makes.
pub const KEYSPACE: KeyspaceId = KeyspaceId(1);
/// Longer than anything here takes on a busy machine.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// What a node does with the next request for a shard of a keyspace.
#[derive(Clone, Debug)]
pub enum Order {
    /// Answers so, and does nothing.
    Answer(Failure),
    /// Closes the connection without doing it.
    DropBefore,
    /// Does it, and closes the connection instead of answering.
    DropAfter,
    /// Does it, and answers when the world says so.
    Hold,
}

#[derive(Debug)]
struct Shard {
    keyspace: KeyspaceId,
    part: Part,
    rows: BTreeMap<Vec<u8>, (u64, Vec<u8>)>,
    revision: u64,
    /// Nobody before the replica is made that stands for election.
    leader: Option<NodeId>,
    voters: usize,
}

#[derive(Debug, Default)]
struct State {
    shards: BTreeMap<ShardId, Shard>,
    /// Replicas that exist, on every node.
    replicas: BTreeMap<(ShardId, NodeId), ReplicaId>,
    /// Nobody leads anything before the nodes know so many addresses.
    addrs_needed: usize,
    addrs_known: usize,
    mute: bool,
}

/// What all nodes of a test share.
#[derive(Debug)]
pub struct World {
    state: Mutex<State>,
    released: watch::Sender<bool>,
}

impl World {
    /// Empty.
    pub fn new() -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), released: watch::Sender::new(false) })
    }

    /// From now on beats are not answered, so that only what requests meet tells who leads.
    pub fn mute_beats(&self) {
        self.state.lock().mute = true;
    }

    /// Answers what [`Order::Hold`] holds.
    pub fn release(&self) {
        self.released.send_replace(true);
    }

    /// From now on nobody leads until a beat has told so many addresses.
    pub fn forget_addrs(&self, needed: usize) {
        let mut state = self.state.lock();
        (state.addrs_needed, state.addrs_known) = (needed, 0);
    }

    /// Another node leads a shard from now on.
    pub fn set_leader(&self, shard: ShardId, node: NodeId) {
        self.state.lock().shards.get_mut(&shard).unwrap().leader = Some(node);
    }

    /// The node that leads a shard.
    pub fn leader(&self, shard: ShardId) -> NodeId {
        self.state.lock().shards[&shard].leader.unwrap()
    }

    /// The shard of the default keyspace that holds a key.
    pub fn shard_of(&self, key: &[u8]) -> ShardId {
        let state = self.state.lock();
        let found = state.shards.iter().find(|(_, shard)| shard.keyspace == KEYSPACE && shard.part.holds(key));
        *found.unwrap().0
    }

    /// How many replicas each node has.
    pub fn replicas(&self) -> BTreeMap<NodeId, usize> {
        let mut counts = BTreeMap::new();
        for (_, node) in self.state.lock().replicas.keys() {
            *counts.entry(*node).or_default() += 1;
        }
        counts
    }

    /// How many shards of the default keyspace each node leads.
    pub fn leads(&self) -> BTreeMap<NodeId, usize> {
        let mut counts = BTreeMap::new();
        for shard in self.state.lock().shards.values().filter(|shard| shard.keyspace == KEYSPACE) {
            *counts.entry(shard.leader.unwrap()).or_default() += 1;
        }
        counts
    }

    /// A node has no replica of a shard any more.
    pub fn lose_replica(&self, shard: ShardId, node: NodeId) {
        self.state.lock().replicas.remove(&(shard, node)).unwrap();
    }
}

/// A node that a test plays.
#[derive(Debug)]
pub struct FakeNode {
    /// Its identity.
    pub id: NodeId,
    /// Where it listens.
    pub addr: String,
    inner: Arc<Inner>,
    stop: CancellationToken,
}

#[derive(Debug)]
struct Inner {
    id: NodeId,
    world: Arc<World>,
    cluster: Mutex<Option<ClusterId>>,
    map: Mutex<Option<Map>>,
    orders: Mutex<VecDeque<Order>>,
    seen: Mutex<Vec<Frame>>,
    heard: watch::Sender<usize>,
}

impl FakeNode {
    /// Listens on any port.
    pub async fn start(world: &Arc<World>, id: u64, cluster: Option<ClusterId>) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let inner = Arc::new(Inner {
            id: NodeId(id),
            world: world.clone(),
            cluster: Mutex::new(cluster),
            map: Mutex::default(),
            orders: Mutex::default(),
            seen: Mutex::default(),
            heard: watch::Sender::new(0),
        });
        let stop = CancellationToken::new();
        let (serving, stopping) = (inner.clone(), stop.clone());
        tokio::spawn(stop.clone().run_until_cancelled_owned(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let (serving, stop) = (serving.clone(), stopping.clone());
                tokio::spawn(async move { stop.run_until_cancelled(serving.serve(stream, stop.clone())).await });
            }
        }));
        Self { id: NodeId(id), addr, inner, stop }
    }

    /// Its cluster.
    pub fn cluster(&self) -> Option<ClusterId> {
        *self.inner.cluster.lock()
    }

    /// What it shall do with the next request that is not for the system shard.
    pub fn order(&self, order: Order) {
        self.inner.orders.lock().push_back(order);
    }

    /// The requests of a kind that have reached it, those for the system shard left out.
    pub fn seen(&self, kind: Kind) -> Vec<Frame> {
        let seen = self.inner.seen.lock();
        seen.iter()
            .filter(|frame| frame.header.kind == kind && frame.header.shard != ShardId::SYSTEM)
            .cloned()
            .collect()
    }

    /// Waits until a request of a kind has reached it.
    pub async fn has_seen(&self, kind: Kind) {
        let mut heard = self.inner.heard.subscribe();
        while self.seen(kind).is_empty() {
            tokio::time::timeout(PATIENCE, heard.changed()).await.unwrap().unwrap();
        }
    }

    /// Ends: connections break.
    pub fn stop(&self) {
        self.stop.cancel();
    }
}

impl Inner {
    async fn serve(self: Arc<Self>, stream: TcpStream, stop: CancellationToken) {
        let welcome = |hello: &Hello| {
            let cluster = *self.cluster.lock();
            hello.check_cluster(cluster)?;
            let (role, name) = (Role::Node(self.id), format!("Server{}", self.id.0));
            Ok(Welcome { version: 1, cluster, role, name, limits: Limits::OURS })
        };
        let Ok(mut session) = session::accept(stream, welcome).await else { return };
        let outbox = Arc::new(Outbox::default());
        let writing = outbox.clone();
        let mut writer = session.writer;
        tokio::spawn(stop.run_until_cancelled_owned(async move { writing.write_to(&mut writer).await }));
        let mut frames = Vec::new();
        while let Ok(true) = session.reader.next_batch(&mut frames).await {
            for frame in frames.drain(..) {
                self.seen.lock().push(frame.clone());
                self.heard.send_modify(|count| *count += 1);
                let plain = matches!(frame.header.kind, Kind::Beat | Kind::CreateReplica);
                let order =
                    if plain || frame.header.shard == ShardId::SYSTEM { None } else { self.orders.lock().pop_front() };
                let answer = match &order {
                    Some(Order::Answer(failure)) => Err(failure.clone()),
                    Some(Order::DropBefore) => return outbox.close(),
                    Some(Order::DropAfter | Order::Hold) | None => self.act(&frame),
                };
                let answer = match answer {
                    Ok(Some((head, tail))) => Frame::new(frame.header.answer(Kind::Done), head, tail),
                    Ok(None) => continue,
                    Err(failure) => {
                        Frame::new(frame.header.answer(Kind::Failed), codec::encode(&failure).unwrap(), vec![])
                    }
                };
                match order {
                    Some(Order::DropAfter) => return outbox.close(),
                    Some(Order::Hold) => {
                        let (outbox, mut released) = (outbox.clone(), self.world.released.subscribe());
                        tokio::spawn(async move {
                            released.wait_for(|released| *released).await.unwrap();
                            outbox.push(&answer);
                        });
                    }
                    Some(Order::Answer(_) | Order::DropBefore) | None => outbox.push(&answer),
                }
            }
        }
        outbox.close();
    }

    fn act(&self, frame: &Frame) -> Result<Option<(Vec<u8>, Bytes)>, Failure> {
        let done = |head: Vec<u8>| Ok(Some((head, Bytes::new())));
        match frame.header.kind {
            Kind::Beat => {
                let beat: Beat = codec::decode(&frame.head).unwrap();
                if let Some(map) = beat.map {
                    assert_eq!(map.check(), Ok(()));
                    *self.map.lock() = Some(map);
                }
                let mut state = self.world.state.lock();
                state.addrs_known = state.addrs_known.max(beat.addrs.len());
                if state.mute {
                    return Ok(None);
                }
                done(codec::encode(&self.status(&state)).unwrap())
            }
            Kind::CreateReplica => {
                let create: CreateReplica = codec::decode(&frame.head).unwrap();
                self.create(create)?;
                done(vec![])
            }
            Kind::Map => match self.map.lock().clone() {
                Some(map) => done(codec::encode(&MapDone { map, leaders: vec![] }).unwrap()),
                None => Err(Failure::Busy { retry_after_ms: 1, text: "no map yet".into() }),
            },
            _ => self.act_on_shard(frame),
        }
    }

    fn epoch(&self) -> Epoch {
        self.map.lock().as_ref().map_or(Epoch::NONE, |map| map.epoch)
    }

    fn create(&self, create: CreateReplica) -> Result<(), Failure> {
        let cluster = *self.cluster.lock().get_or_insert(create.cluster);
        assert_eq!(cluster, create.cluster);
        assert!(create.voters.contains(&(create.replica, self.id)), "{create:?} is not for this node");
        let mut state = self.world.state.lock();
        let kept = *state.replicas.entry((create.shard, self.id)).or_insert(create.replica);
        assert_eq!(kept, create.replica);
        let made = Shard {
            keyspace: create.keyspace,
            part: create.part,
            rows: BTreeMap::new(),
            revision: 0,
            leader: None,
            voters: create.voters.len(),
        };
        let shard = state.shards.entry(create.shard).or_insert(made);
        if create.campaign {
            shard.leader.get_or_insert(self.id);
        }
        Ok(())
    }

    fn status(&self, state: &State) -> NodeStatus {
        let mine = state.replicas.iter().filter(|((_, node), _)| *node == self.id);
        let replica = |((id, _), replica): (&(ShardId, NodeId), &ReplicaId)| {
            let shard = &state.shards[id];
            let elected = is_elected(state, *id);
            ReplicaStatus {
                shard: *id,
                replica: *replica,
                leads: elected && shard.leader == Some(self.id),
                leader: None,
                term: u64::from(elected),
                committed: 0,
                applied: 0,
                flushed: 0,
                log_first: 1,
                log_last: shard.revision,
                revision: shard.revision,
                snapshots_installed: 0,
            }
        };
        NodeStatus {
            id: self.id,
            name: format!("Server{}", self.id.0),
            cluster: *self.cluster.lock(),
            process: 1,
            cpu_us: 1,
            epoch: self.epoch(),
            table_bytes: 0,
            log_bytes: 0,
            disk_free_bytes: 0,
            disk_full: false,
            log_syncs: 0,
            replicas: mine.map(replica).collect(),
        }
    }

    fn act_on_shard(&self, frame: &Frame) -> Result<Option<(Vec<u8>, Bytes)>, Failure> {
        let id = frame.header.shard;
        let epoch = self.epoch();
        let mut state = self.world.state.lock();
        if !state.replicas.contains_key(&(id, self.id)) {
            return Err(Failure::WrongShard { epoch });
        }
        let elected = is_elected(&state, id);
        let shard = state.shards.get_mut(&id).unwrap();
        let lead = || match shard.leader {
            _ if !elected => Err(Failure::NotLeader { hint: None }),
            hint if hint != Some(self.id) => Err(Failure::NotLeader { hint }),
            _ => Ok(()),
        };
        let may_read = |consistency| if consistency == Consistency::Eventual { Ok(()) } else { lead() };
        let (head, tail) = match frame.header.kind {
            Kind::Get => {
                let get: Get<'_> = codec::decode_borrowed(&frame.head).unwrap();
                may_read(get.consistency)?;
                let row = shard.rows.get(get.key);
                let version = row.map(|row| row.0);
                let value = row.map(|row| row.1.clone()).unwrap_or_default();
                let done = GetDone { version, revision: shard.revision, consistency: get.consistency };
                (codec::encode(&done).unwrap(), value.into())
            }
            Kind::Put | Kind::Delete => {
                lead()?;
                let write: Write<'_> = codec::decode_borrowed(&frame.head).unwrap();
                shard.revision += 1;
                let before = match frame.header.kind {
                    Kind::Put => shard.rows.insert(write.key.to_vec(), (shard.revision, frame.tail.to_vec())),
                    _ => shard.rows.remove(write.key),
                };
                let done = WriteDone { revision: shard.revision, removed: u32::from(before.is_some()) };
                (codec::encode(&done).unwrap(), Bytes::new())
            }
            Kind::Batch => {
                lead()?;
                let batch: Batch<'_> = codec::decode_borrowed(&frame.head).unwrap();
                let mut values = frame.tail.clone();
                for op in batch.ops {
                    shard.revision += 1;
                    match op {
                        BatchOp::Put { key, value_bytes } => {
                            let value = values.split_to(value_bytes as usize).to_vec();
                            shard.rows.insert(key.to_vec(), (shard.revision, value));
                        }
                        BatchOp::Delete { key } => drop(shard.rows.remove(key)),
                    }
                }
                (codec::encode(&WriteDone { revision: shard.revision, removed: 0 }).unwrap(), Bytes::new())
            }
            Kind::Scan => {
                let scan: Scan = codec::decode(&frame.head).unwrap();
                may_read(scan.consistency)?;
                page(shard, &scan)
            }
            Kind::Count => {
                let scan: Scan = codec::decode(&frame.head).unwrap();
                may_read(scan.consistency)?;
                let most = 7; // so that a count takes several requests
                let keys: Vec<_> = shard.rows.keys().filter(|key| in_range(key, &scan)).collect();
                let next = keys.get(most).map(|key| (*key).clone());
                (codec::encode(&CountDone { rows: keys.len().min(most) as u64, next }).unwrap(), Bytes::new())
            }
            other => panic!("a {other:?} has reached a node"),
        };
        Ok(Some((head, tail)))
    }
}

fn is_elected(state: &State, shard: ShardId) -> bool {
    let kept = state.replicas.keys().filter(|(kept, _)| *kept == shard).count();
    kept * 2 > state.shards[&shard].voters && state.addrs_known >= state.addrs_needed
}

fn in_range(key: &[u8], scan: &Scan) -> bool {
    key >= &scan.start[..] && scan.end.as_deref().is_none_or(|end| key < end)
}

fn page(shard: &Shard, scan: &Scan) -> (Vec<u8>, Bytes) {
    let mut rows: Vec<_> = shard.rows.iter().filter(|(key, _)| in_range(key, scan)).collect();
    if scan.reverse {
        rows.reverse();
    }
    let most = if scan.rows_max == 0 { 5 } else { scan.rows_max as usize };
    let (mut heads, mut tail, mut bytes) = (vec![], vec![], 0);
    let mut next = None;
    for (key, (version, value)) in rows {
        if heads.len() >= most || (scan.bytes_max > 0 && bytes >= scan.bytes_max as usize) {
            let last: &RowHead = heads.last().unwrap();
            next = Some(if scan.reverse { last.key.clone() } else { [&last.key[..], &[0]].concat() });
            break;
        }
        let value: &[u8] = if scan.keys_only { &[] } else { value };
        bytes += key.len() + value.len();
        heads.push(RowHead { key: key.clone(), version: *version, value_bytes: value.len() as u32 });
        tail.extend_from_slice(value);
    }
    (codec::encode(&ScanDone { rows: heads, next, revision: shard.revision }).unwrap(), tail.into())
}
