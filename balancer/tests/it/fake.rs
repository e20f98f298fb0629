//! A cluster that a test plays: nodes that speak the protocol, keep rows in memory, and misbehave when ordered to.
//!
//! The rows of a shard are kept once for all nodes; who leads it is written down, not elected, and a change of its
//! replicas is done at once. Nodes answer, as real ones do, only for shards of which they were told to keep a replica.

use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::limits::Limits;
use shkv_proto::link::{CallError, Link};
use shkv_proto::map::Part;
use shkv_proto::message::{
    Batch, BatchDone, BatchOp, Beat, ChangeReplicas, Condition, Consistency, Controller, CountDone, CreateReplica,
    Failure, Get, GetDone, GroupStatus, Hello, Join, JoinDone, MapDone, NodeStatus, RemoveReplica, ReplicaStatus, Role,
    RowHead, Scan, ScanDone, TransferLeader, Welcome, Write, WriteDone,
};
use shkv_proto::outbox::Outbox;
use shkv_proto::{ClusterId, Epoch, Frame, Header, KeyspaceId, Kind, Map, NodeId, ReplicaId, ShardId, codec, session};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;
use std::time::Duration;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::time::Instant;
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
    voters: BTreeSet<ReplicaId>,
    learners: BTreeSet<ReplicaId>,
    homes: BTreeMap<ReplicaId, NodeId>,
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
    /// Who takes the controller's lease in the moment in which its holder next writes the map.
    usurper: Option<Controller>,
    /// What became of the batches that depend on the controller's row and are more than a renewal.
    controlled: Vec<Result<(), Failure>>,
    /// Pages of several shards that were merged.
    merged: usize,
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

    /// How many pages of several shards nodes have merged.
    pub fn merged(&self) -> usize {
        self.state.lock().merged
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

    /// Who holds the controller's lease, as the system shard says.
    pub fn controller(&self) -> Option<Controller> {
        let state = self.state.lock();
        let (_, value) = state.shards.get(&ShardId::SYSTEM)?.rows.get(&b"controller"[..])?;
        Some(codec::decode(value).unwrap())
    }

    /// In the moment in which the holder of the lease next changes anything, another one has just taken the lease.
    pub fn depose(&self, usurper: Controller) {
        self.state.lock().usurper = Some(usurper);
    }

    /// What became of the changes that were written by a holder of the lease.
    pub fn controlled(&self) -> Vec<Result<(), Failure>> {
        self.state.lock().controlled.clone()
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
    retired: Mutex<Option<String>>,
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
            retired: Mutex::default(),
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

    /// Why it was told that it is of the cluster no more.
    pub fn retired(&self) -> Option<String> {
        self.inner.retired.lock().clone()
    }

    /// The map that it was told.
    pub fn map(&self) -> Option<Map> {
        self.inner.map.lock().clone()
    }

    /// What it says when it registers.
    pub fn introduction(&self, name: &str) -> Join {
        Join {
            cluster: self.cluster(),
            id: self.id,
            name: name.into(),
            addr: self.addr.clone(),
            addr_outside: None,
            domain: String::new(),
            capacity: 100,
            instance: String::new(),
        }
    }

    /// Registers once at a balancer.
    pub async fn join(&self, balancer: &str, join: &Join) -> Result<JoinDone, CallError> {
        let link = Link::open(balancer.to_owned(), Hello::ours(None, Role::Node(self.id)), |_| Ok(()));
        let frame = Frame::new(Header::new(Kind::Join), codec::encode(join).unwrap(), vec![]);
        let (done, _) = link.ask::<JoinDone>(frame, Instant::now() + PATIENCE).await?;
        *self.inner.cluster.lock() = Some(done.cluster);
        Ok(done)
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
                let of_client = matches!(
                    frame.header.kind,
                    Kind::Get | Kind::Put | Kind::Delete | Kind::Batch | Kind::Scan | Kind::Count
                );
                let is_ordered = of_client && frame.header.shard != ShardId::SYSTEM;
                let order = if is_ordered { self.orders.lock().pop_front() } else { None };
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
                if beat.retired.is_some() {
                    *self.retired.lock() = beat.retired;
                }
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
            Kind::ChangeReplicas => {
                self.change(frame.header.shard, codec::decode(&frame.head).unwrap())?;
                done(vec![])
            }
            Kind::RemoveReplica => {
                let remove: RemoveReplica = codec::decode(&frame.head).unwrap();
                let (mut state, here) = (self.world.state.lock(), (frame.header.shard, self.id));
                if state.replicas.get(&here) == Some(&remove.replica) {
                    let shard = &state.shards[&here.0];
                    assert!(!shard.voters.contains(&remove.replica), "{remove:?} of a replica that votes");
                    state.replicas.remove(&here);
                }
                done(vec![])
            }
            Kind::TransferLeader => {
                let transfer: TransferLeader = codec::decode(&frame.head).unwrap();
                let mut state = self.world.state.lock();
                let shard = self.led(&mut state, frame.header.shard)?;
                assert!(shard.voters.contains(&transfer.to), "{transfer:?} to a replica that does not vote");
                shard.leader = Some(shard.homes[&transfer.to]);
                done(vec![])
            }
            _ => self.act_on_shard(frame),
        }
    }

    /// A shard that this node leads.
    fn led<'a>(&self, state: &'a mut State, id: ShardId) -> Result<&'a mut Shard, Failure> {
        let elected = state.shards.contains_key(&id) && is_elected(state, id);
        let shard = state.shards.get_mut(&id).ok_or(Failure::WrongShard { epoch: Epoch::NONE })?;
        match shard.leader {
            Some(leader) if elected && leader == self.id => Ok(shard),
            hint => Err(Failure::NotLeader { hint: hint.filter(|_| elected) }),
        }
    }

    fn change(&self, id: ShardId, change: ChangeReplicas) -> Result<(), Failure> {
        let mut state = self.world.state.lock();
        let me = state.replicas.get(&(id, self.id)).copied();
        let shard = self.led(&mut state, id)?;
        assert!(me.is_none_or(|me| !change.remove.contains(&me)), "{change:?} to the leader that is to go");
        for (replica, node) in change.learn {
            shard.homes.insert(replica, node);
            if !shard.voters.contains(&replica) {
                shard.learners.insert(replica);
            }
        }
        for replica in change.promote {
            assert!(shard.learners.remove(&replica) || shard.voters.contains(&replica), "{replica} never learned");
            shard.voters.insert(replica);
        }
        for replica in change.remove {
            shard.voters.remove(&replica);
            shard.learners.remove(&replica);
        }
        Ok(())
    }

    fn epoch(&self) -> Epoch {
        self.map.lock().as_ref().map_or(Epoch::NONE, |map| map.epoch)
    }

    fn create(&self, create: CreateReplica) -> Result<(), Failure> {
        let cluster = *self.cluster.lock().get_or_insert(create.cluster);
        assert_eq!(cluster, create.cluster);
        assert!(create.homes.contains(&(create.replica, self.id)), "{create:?} is not for this node");
        let mut state = self.world.state.lock();
        let kept = *state.replicas.entry((create.shard, self.id)).or_insert(create.replica);
        assert_eq!(kept, create.replica);
        let made = Shard {
            keyspace: create.keyspace,
            part: create.part,
            rows: BTreeMap::new(),
            revision: 0,
            leader: None,
            voters: create.founders.iter().copied().collect(),
            learners: BTreeSet::new(),
            homes: BTreeMap::new(),
        };
        let shard = state.shards.entry(create.shard).or_insert(made);
        shard.homes.insert(create.replica, self.id);
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
            let leads = elected && shard.leader == Some(self.id);
            let all = || shard.voters.iter().chain(&shard.learners).copied();
            let kept = |replica: &ReplicaId| {
                shard.homes.get(replica).is_some_and(|node| state.replicas.get(&(*id, *node)) == Some(replica))
            };
            let group = || GroupStatus {
                voters: shard.voters.iter().copied().collect(),
                outgoing: vec![],
                learners: shard.learners.iter().copied().collect(),
                matched: all().filter(kept).map(|replica| (replica, 1 + shard.revision)).collect(),
            };
            ReplicaStatus {
                shard: *id,
                replica: *replica,
                leads,
                leader: None,
                term: u64::from(elected),
                committed: 1 + shard.revision,
                applied: 0,
                flushed: 0,
                log_first: 1,
                log_last: shard.revision,
                revision: shard.revision,
                snapshots_installed: 0,
                group: leads.then(group),
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
        let State { shards, usurper, controlled, merged, .. } = &mut *state;
        let shard = shards.get_mut(&id).unwrap();
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
                check(shard, 0, write.key, write.condition)?;
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
                let is_check = |op: &BatchOp<'_>| matches!(op, BatchOp::Check { key: b"controller", .. });
                let is_controlled = id == ShardId::SYSTEM
                    && batch.ops.iter().any(is_check)
                    && batch.ops.iter().all(|op| op.key() != b"lease");
                if is_controlled && let Some(usurper) = usurper.take() {
                    shard.revision += 1;
                    let row = (shard.revision, codec::encode(&usurper).unwrap());
                    shard.rows.insert(b"controller".to_vec(), row);
                }
                let result = write_batch(shard, &batch, frame.tail.clone());
                if is_controlled {
                    controlled.push(result.clone());
                }
                result?;
                let done = BatchDone { removed: 0, revisions: vec![(id, shard.revision)], rows: vec![] };
                (codec::encode(&done).unwrap(), Bytes::new())
            }
            Kind::Scan => {
                let scan: Scan = codec::decode(&frame.head).unwrap();
                may_read(scan.consistency)?;
                let all: Vec<&Shard> = std::iter::once(&id).chain(&scan.with).map(|id| &shards[id]).collect();
                if all.iter().any(|shard| shard.leader != Some(self.id)) {
                    return Err(Failure::Busy { retry_after_ms: 0, text: "not together".into() });
                }
                *merged += usize::from(all.len() > 1);
                page(&all, &scan)
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

/// Whether most of those who vote are there.
fn is_elected(state: &State, id: ShardId) -> bool {
    let shard = &state.shards[&id];
    let is_kept = |replica: &&ReplicaId| {
        shard.homes.get(replica).is_some_and(|node| state.replicas.get(&(id, *node)) == Some(replica))
    };
    shard.voters.iter().filter(is_kept).count() * 2 > shard.voters.len() && state.addrs_known >= state.addrs_needed
}

fn check(shard: &Shard, operation: u32, key: &[u8], condition: Condition<'_>) -> Result<(), Failure> {
    let row = shard.rows.get(key);
    let holds = match condition {
        Condition::Always => true,
        Condition::Absent => row.is_none(),
        Condition::Present => row.is_some(),
        Condition::Version(version) => row.is_some_and(|row| row.0 == version),
        Condition::Value(value) => row.is_some_and(|row| row.1 == value),
    };
    if holds { Ok(()) } else { Err(Failure::Condition { operation, version: row.map(|row| row.0) }) }
}

/// All of a batch or nothing: every condition looks at the rows as they are before it.
fn write_batch(shard: &mut Shard, batch: &Batch<'_>, mut values: Bytes) -> Result<(), Failure> {
    for (op, operation) in batch.ops.iter().zip(0..) {
        check(shard, operation, op.key(), op.condition())?;
    }
    for op in &batch.ops {
        match op {
            BatchOp::Put { key, value_bytes, .. } => {
                shard.revision += 1;
                let value = values.split_to(*value_bytes as usize).to_vec();
                shard.rows.insert(key.to_vec(), (shard.revision, value));
            }
            BatchOp::Delete { key, .. } => {
                shard.revision += 1;
                shard.rows.remove(*key);
            }
            BatchOp::Check { .. } | BatchOp::Read { .. } => {}
        }
    }
    Ok(())
}

fn in_range(key: &[u8], scan: &Scan) -> bool {
    key >= &scan.start[..] && scan.end.as_deref().is_none_or(|end| key < end)
}

fn page(shards: &[&Shard], scan: &Scan) -> (Vec<u8>, Bytes) {
    let rows = shards.iter().flat_map(|shard| &shard.rows).filter(|(key, _)| in_range(key, scan));
    let mut rows: Vec<_> = rows.collect();
    rows.sort();
    if scan.reverse {
        rows.reverse();
    }
    let most = if scan.rows_max == 0 { 5 } else { scan.rows_max as usize };
    let (mut heads, mut tail, mut bytes) = (vec![], vec![], 0);
    let mut next = None;
    for (key, (version, value)) in rows {
        if heads.len() >= most || (scan.bytes_max > 0 && bytes >= scan.bytes_max as usize) {
            let last: &RowHead = heads.last().unwrap();
            next = Some(if scan.reverse { last.key.to_vec() } else { [&last.key[..], &[0]].concat() });
            break;
        }
        let value: &[u8] = if scan.keys_only { &[] } else { value };
        bytes += key.len() + value.len();
        heads.push(RowHead { key: key.clone().into(), version: *version, value_bytes: value.len() as u32 });
        tail.extend_from_slice(value);
    }
    let (revision, with) = (shards[0].revision, shards[1..].iter().map(|shard| shard.revision).collect());
    (codec::encode(&ScanDone { rows: heads, next, revision, with }).unwrap(), tail.into())
}
