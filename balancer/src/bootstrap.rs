//! The first minutes of a balancer: finds the nodes, learns or makes their cluster, and gets the first map.
//!
//! A cluster is made in steps that each can be done again: the system shard; the whole map in one batch; the replicas
//! that the map names. A balancer that dies in between leaves nothing that the next one cannot finish.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits and starts tasks")]

use crate::cluster::Cluster;
use crate::{Bootstrap, StartError, layout, lobby, system};
use shkv_proto::link::{CallError, Link};
use shkv_proto::map::{NodeInfo, ShardInfo};
use shkv_proto::message::{CreateReplica, Hello, MapDone, NodeStatus, Role, Welcome};
use shkv_proto::session::Session;
use shkv_proto::world::net::TcpListener;
use shkv_proto::{ClusterId, Epoch, Frame, Header, Kind, Map, NodeId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

/// How long all nodes may take to answer for the first time.
const FIND_TIME_MAX: Duration = Duration::from_secs(10);
/// The same when nodes may come by themselves: somebody has to start them first.
const COME_TIME_MAX: Duration = Duration::from_secs(120);
/// Nodes that may have come without having been looked at.
const JOINERS_MAX: usize = 64;
/// How long the others are waited for when one node has said that it is in a cluster: one of them may be away.
const FIND_REST_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause between two attempts to reach a node for the first time.
const FIND_PAUSE: Duration = Duration::from_millis(100);
/// How long the bootstrap of new nodes may take.
const BOOTSTRAP_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a node may take to tell its copy of the map.
const MEET_TIME_MAX: Duration = Duration::from_millis(500);
/// Pause between two rounds of getting the first map.
const ROUND_PAUSE: Duration = Duration::from_millis(20);

/// A node that has answered.
#[derive(Clone, Debug)]
pub(crate) struct Found {
    addr: String,
    id: NodeId,
    name: String,
    cluster: Option<ClusterId>,
}

/// What answers at an address.
#[derive(Debug)]
enum Answerer {
    Node(Found),
    /// A balancer, by what it knows of its cluster.
    Balancer(ClusterId, Vec<NodeInfo>),
}

/// Nodes that have answered, and those that have not yet.
#[derive(Debug)]
pub(crate) struct Search {
    found: BTreeMap<NodeId, Found>,
    /// What balancers told: their cluster, and where its nodes are.
    told: Option<(String, ClusterId, Vec<NodeInfo>)>,
    /// Why an address is still without a node.
    open: BTreeMap<String, String>,
    /// Nodes that a new cluster needs.
    expect: usize,
    answers: mpsc::Receiver<(String, Result<Answerer, String>)>,
}

/// Asks at every address who is there, until all have answered, as many are there as a new cluster needs, or the time is
/// up; goes on asking the rest meanwhile. Nodes that register at `listener` are asked, too.
pub(crate) async fn find(
    addrs: &[String],
    expect: usize,
    listener: &TcpListener,
    stop: &CancellationToken,
    tasks: &TaskTracker,
) -> Search {
    let (sender, answers) = mpsc::channel(addrs.len().max(JOINERS_MAX));
    let ask = |addr: &str| {
        let asking = ask_until_found(addr.to_owned(), sender.clone());
        let stop = stop.clone();
        tasks.spawn(async move { stop.run_until_cancelled(asking).await });
    };
    let open: BTreeMap<String, String> = addrs.iter().map(|addr| (addr.clone(), "no answer".into())).collect();
    open.keys().for_each(|addr| ask(addr));
    let mut search = Search { found: BTreeMap::new(), told: None, open, expect, answers };
    let (come, mut joiners) = mpsc::channel(JOINERS_MAX);
    let hearing = lobby::hear(listener, come);
    tokio::pin!(hearing);
    let may_come = expect > 0 || addrs.is_empty();
    let mut until = Instant::now() + if may_come { COME_TIME_MAX } else { FIND_TIME_MAX };
    let mut asked: BTreeSet<String> = search.open.keys().cloned().collect();
    while !search.is_enough() {
        tokio::select! { // every arm is cancel-safe; `hearing` is pinned and goes on where it was
            biased;
            () = &mut hearing => {}
            joiner = joiners.recv() => {
                if let Some(addr) = joiner && asked.insert(addr.clone()) {
                    ask(&addr);
                }
            }
            answer = search.answers.recv() => {
                let Some((addr, answer)) = answer else { break };
                if search.take(addr, answer) {
                    until = until.min(Instant::now() + FIND_REST_TIME_MAX);
                }
            }
            () = tokio::time::sleep_until(until) => break,
        }
    }
    search
}

async fn ask_until_found(addr: String, answers: mpsc::Sender<(String, Result<Answerer, String>)>) {
    let hello = Hello::ours(None, Role::Balancer);
    loop {
        let answer = match shkv_proto::session::connect(&addr, &hello).await {
            Ok(session) => answerer(&addr, session).await,
            Err(error) => Err(error.to_string()),
        };
        let done = answer.is_ok();
        if answers.send((addr.clone(), answer)).await.is_err() || done {
            return;
        }
        tokio::time::sleep(FIND_PAUSE).await;
    }
}

async fn answerer(addr: &str, session: Session<Welcome>) -> Result<Answerer, String> {
    let welcome = session.peer.clone();
    match (welcome.role, welcome.cluster) {
        (Role::Node(id), cluster) => {
            Ok(Answerer::Node(Found { addr: addr.to_owned(), id, name: welcome.name, cluster }))
        }
        (Role::Balancer, Some(cluster)) => {
            drop(session);
            let link = Link::open(addr.to_owned(), Hello::ours(Some(cluster), Role::Balancer), |_| Ok(()));
            let frame = Frame::new(Header::new(Kind::Map), vec![], vec![]);
            let told = link.ask::<MapDone>(frame, Instant::now() + FIND_REST_TIME_MAX).await;
            let (MapDone { map, .. }, _) = told.map_err(|error| error.to_string())?;
            map.check()?;
            Ok(Answerer::Balancer(cluster, map.nodes))
        }
        (Role::Balancer, None) => Err("a balancer answers there that has no cluster yet".into()),
        (Role::Client, _) => Err("what answers there is neither a node nor a balancer".into()),
    }
}

impl Search {
    /// Whether there is nothing more to wait for.
    fn is_enough(&self) -> bool {
        let is_founding = self.expect > 0 && self.found.len() >= self.expect && !self.is_of_cluster();
        is_founding || (self.open.is_empty() && (self.is_of_cluster() || (self.expect == 0 && !self.found.is_empty())))
    }

    /// Whether a balancer has told of a cluster.
    pub(crate) fn is_told(&self) -> bool {
        self.told.is_some()
    }

    fn is_of_cluster(&self) -> bool {
        self.told.is_some() || self.found.values().any(|node| node.cluster.is_some())
    }

    /// Takes an answer in; tells whether it shows that there is a cluster.
    fn take(&mut self, addr: String, answer: Result<Answerer, String>) -> bool {
        match answer {
            Ok(Answerer::Node(found)) => {
                self.open.remove(&addr);
                let is_member = found.cluster.is_some();
                self.found.insert(found.id, found);
                is_member
            }
            Ok(Answerer::Balancer(cluster, nodes)) => {
                self.open.remove(&addr);
                self.told = Some((addr, cluster, nodes));
                true
            }
            Err(error) => {
                if let Some(why) = self.open.get_mut(&addr) {
                    *why = error;
                }
                false
            }
        }
    }

    /// The cluster that the nodes are in.
    ///
    /// # Errors
    /// No node, or nodes of two clusters.
    pub(crate) fn cluster(&self) -> Result<Option<ClusterId>, StartError> {
        if self.found.is_empty() && self.told.is_none() {
            return Err(StartError::NoNodes { missing: self.missing() });
        }
        let told = self.told.iter().map(|(addr, cluster, _)| (addr, *cluster));
        let mut members = told.chain(self.found.values().filter_map(|node| Some((&node.addr, node.cluster?))));
        let Some((first_addr, first)) = members.next() else { return Ok(None) };
        match members.find(|(_, other)| *other != first) {
            None => Ok(Some(first)),
            Some((second_addr, second)) => Err(StartError::TwoClusters {
                first_addr: first_addr.clone(),
                first,
                second_addr: second_addr.clone(),
                second,
            }),
        }
    }

    /// What a new cluster of these nodes would look like.
    ///
    /// # Errors
    /// Not all nodes are there, or there are too few for the layout.
    pub(crate) fn plan(&self, wanted: Option<Bootstrap>) -> Result<Plan, StartError> {
        let wanted = wanted.ok_or(StartError::NoCluster)?;
        if self.expect == 0 && !self.open.is_empty() {
            return Err(StartError::NodesMissing { missing: self.missing() });
        }
        if self.found.len() < self.expect {
            let text = format!("{} of {} nodes have come, {}", self.found.len(), self.expect, self.missing());
            return Err(StartError::NodesMissing { missing: text });
        }
        layout::check(wanted, self.found.len()).map_err(StartError::Layout)?;
        let info = |node: &Found| NodeInfo::new(node.id, node.name.clone(), node.addr.clone());
        Ok(Plan { nodes: self.found.values().map(info).collect(), wanted })
    }

    fn missing(&self) -> String {
        let missing: Vec<String> = self.open.iter().map(|(addr, why)| format!("{addr} ({why})")).collect();
        missing.join(", ")
    }

    /// Makes the nodes known to `cluster`.
    pub(crate) fn introduce(&self, cluster: &Cluster) {
        for node in self.found.values() {
            cluster.moved(node.id, node.addr.clone());
        }
        for node in self.told.iter().flat_map(|(_, _, nodes)| nodes) {
            if cluster.pool.get(node.id).is_none() {
                cluster.pool.set(node.id, node.addr.clone());
            }
        }
    }

    /// Goes on waiting for those that have not answered yet, and makes each known that does.
    pub(crate) async fn introduce_the_rest(mut self, cluster: Arc<Cluster>) {
        while let Some((addr, answer)) = self.answers.recv().await {
            let Ok(Answerer::Node(node)) = answer else { continue };
            if node.cluster.is_some_and(|other| other != cluster.id) {
                tracing::warn!(addr, node = %node.id, "a node of another cluster is not used");
                continue;
            }
            tracing::info!(addr, node = %node.id, "a node has come");
            cluster.moved(node.id, node.addr);
        }
    }
}

/// The nodes and the layout of a cluster that is being made.
#[derive(Clone, Debug)]
pub(crate) struct Plan {
    nodes: Vec<NodeInfo>,
    wanted: Bootstrap,
}

/// Makes a cluster of nodes that are in none.
///
/// # Errors
/// A node refuses, or it takes too long.
pub(crate) async fn found(cluster: &Arc<Cluster>, plan: &Plan) -> Result<(), StartError> {
    let work = async {
        all_are_heard(cluster, plan).await;
        create_system_shard(cluster, plan).await.map_err(|error| StartError::Bootstrap(error.to_string()))?;
        get_first_map(cluster, Some(plan)).await;
        let map = cluster.routes().map().clone();
        let creations = all_replicas(&map).filter(|(_, create)| create.shard != ShardId::SYSTEM).collect();
        system::create_all(cluster, creations).await.map_err(|error| StartError::Bootstrap(error.to_string()))
    };
    match tokio::time::timeout(BOOTSTRAP_TIME_MAX, work).await {
        Ok(result) => result,
        Err(_) => {
            let last = cluster.trouble().unwrap_or_else(|| "no leader was elected".into());
            Err(StartError::Bootstrap(format!("not done within {BOOTSTRAP_TIME_MAX:?}: {last}")))
        }
    }
}

fn all_replicas(map: &Map) -> impl Iterator<Item = (NodeId, CreateReplica)> + '_ {
    let of_shard = |shard: &ShardInfo| -> Vec<(NodeId, CreateReplica)> {
        let nodes = shard.replicas.iter().map(|replica| replica.node);
        nodes.filter_map(|node| Some((node, layout::creation(map.cluster, shard, node)?))).collect()
    };
    map.shards.iter().flat_map(of_shard)
}

/// Waits until every node has answered a beat: then each knows where the others are, and no first vote is lost.
async fn all_are_heard(cluster: &Cluster, plan: &Plan) {
    let mut news = cluster.news();
    while !plan.nodes.iter().all(|node| cluster.health(|health, now| health.is_live(node.id, now))) {
        news.changed().await;
    }
}

/// One replica is made before the others: of two balancers that make clusters of the same nodes at the same time, its
/// node takes one, and the other is refused before it has touched anything else.
async fn create_system_shard(cluster: &Arc<Cluster>, plan: &Plan) -> Result<(), CallError> {
    let map = layout::first_map(cluster.id, &plan.nodes, plan.wanted);
    let mut rest: Vec<_> = all_replicas(&map).filter(|(_, create)| create.shard == ShardId::SYSTEM).collect();
    let one = rest.pop(); // the last, because the first stands for election and should find the others there
    system::create_all(cluster, one.into_iter().collect()).await?;
    system::create_all(cluster, rest).await?;
    Ok(())
}

/// Tries until a map is installed. With a plan, a bootstrap that was cut short is finished.
pub(crate) async fn get_first_map(cluster: &Arc<Cluster>, plan: Option<&Plan>) {
    loop {
        meet_the_rest(cluster).await;
        if let Some(plan) = plan
            && system_shard_was_cut_short(cluster, plan)
            && let Err(error) = create_system_shard(cluster, plan).await
        {
            cluster.set_trouble(Some(error.to_string()));
        }
        match system::read(cluster).await {
            Ok(Some(state)) => {
                cluster.install(state);
                return cluster.set_trouble(None);
            }
            Ok(None) => {
                let Some(plan) = plan else {
                    let text =
                        "the bootstrap of this cluster was cut short; start once more as at first, with all nodes";
                    cluster.set_trouble(Some(text.into()));
                    tokio::time::sleep(FIND_PAUSE).await;
                    continue;
                };
                let map = layout::first_map(cluster.id, &plan.nodes, plan.wanted);
                if let Err(error) = system::write_first(cluster, &map).await {
                    cluster.set_trouble(Some(error.to_string())); // whether it is there, the next round will read
                }
            }
            Err(error) => {
                tracing::debug!(%error, "no map yet");
                cluster.set_trouble(Some(error.to_string()));
            }
        }
        tokio::time::sleep(ROUND_PAUSE).await;
    }
}

/// Asks the nodes that are known for their copies of the map, and takes from these where the other nodes live. A
/// balancer that was told of one node only would otherwise never reach the leader of the system shard. The copies are
/// good for nothing else: they may be old.
async fn meet_the_rest(cluster: &Cluster) {
    for (_, home) in cluster.pool.homes() {
        let frame = Frame::new(Header::new(Kind::Map), vec![], vec![]);
        let asked = home.link(0).ask::<MapDone>(frame, Instant::now() + MEET_TIME_MAX).await;
        let Ok((MapDone { map, .. }, _)) = asked else { continue };
        if map.cluster != cluster.id || map.check().is_err() {
            continue;
        }
        for node in map.nodes {
            if cluster.pool.get(node.id).is_none() {
                cluster.pool.set(node.id, node.addr);
                cluster.beat_wanted.notify_one();
            }
        }
    }
}

/// Whether the system shard is still to be made on some of the plan's nodes: every node has been heard, and each is as a
/// bootstrap that was cut short leaves it.
fn system_shard_was_cut_short(cluster: &Cluster, plan: &Plan) -> bool {
    let map = layout::first_map(cluster.id, &plan.nodes, plan.wanted);
    let Some(planned) = map.shard(ShardId::SYSTEM) else { return false };
    cluster.health(|health, now| {
        let heard = |node: &NodeInfo| health.status(node.id).filter(|_| health.is_live(node.id, now));
        let is_missing: Option<Vec<bool>> =
            plan.nodes.iter().map(|node| is_still_to_be_made(planned, heard(node)?)).collect();
        is_missing.is_some_and(|is_missing| is_missing.contains(&true))
    })
}

/// Whether a node is to get a replica of the system shard in a bootstrap that was cut short. `None` if it is not as such
/// a bootstrap leaves it: in no cluster yet, or with the replica that is planned, and nobody was ever elected. A replica
/// that has forgotten its votes must not be made anew, nor a second system shard where the nodes of the first are away:
/// whoever is of the cluster, and has no such replica or a map, may have come to it long after it was made.
fn is_still_to_be_made(planned: &ShardInfo, status: &NodeStatus) -> Option<bool> {
    let wanted = planned.replicas.iter().find(|replica| replica.node == status.id);
    match (status.cluster, &status.replicas[..], wanted) {
        (None, [], wanted) => Some(wanted.is_some()),
        (Some(_), [here], Some(wanted))
            if (here.shard, here.replica) == (ShardId::SYSTEM, wanted.id)
                && here.term == 0
                && here.log_last == 0
                && status.epoch == Epoch::NONE =>
        {
            Some(false)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shkv_proto::message::ReplicaStatus;
    use shkv_proto::{KeyspaceId, ReplicaId, map::Part};

    const OURS: ClusterId = ClusterId(7);

    fn status(node: u64, cluster: Option<ClusterId>, replicas: &[(u32, u64, u64)]) -> NodeStatus {
        let replica = |(shard, replica, term): &(u32, u64, u64)| ReplicaStatus {
            shard: ShardId(*shard),
            replica: ReplicaId(*replica),
            leads: false,
            leader: None,
            term: *term,
            committed: 0,
            applied: 0,
            flushed: 0,
            log_first: 1,
            log_last: 0,
            revision: 0,
            snapshots_installed: 0,
            group: None,
        };
        NodeStatus {
            id: NodeId(node),
            name: format!("Server{node}"),
            cluster,
            process: 1,
            cpu_us: 0,
            epoch: Epoch::NONE,
            table_bytes: 0,
            log_bytes: 0,
            disk_free_bytes: 0,
            disk_full: false,
            log_syncs: 0,
            replicas: replicas.iter().map(replica).collect(),
        }
    }

    #[test]
    fn only_what_a_bootstrap_that_was_cut_short_leaves_is_gone_on_with() {
        let homes: Vec<NodeId> = (1..=3).map(NodeId).collect();
        let planned = ShardInfo::founded(ShardId::SYSTEM, KeyspaceId::SYSTEM, Part::everything(), &homes);
        let look = |status: &NodeStatus| is_still_to_be_made(&planned, status);
        assert_eq!(look(&status(1, None, &[])), Some(true), "it was not reached yet");
        assert_eq!(look(&status(4, None, &[])), Some(false), "nothing is planned there");
        assert_eq!(look(&status(1, Some(OURS), &[(0, 1, 0)])), Some(false), "it was reached");
        assert_eq!(look(&status(1, Some(OURS), &[(0, 1, 1)])), None, "it has voted");
        assert_eq!(look(&status(1, Some(OURS), &[(0, 2, 0)])), None, "that replica is another one");
        assert_eq!(
            look(&status(1, Some(OURS), &[])),
            None,
            "a member without a replica has joined later, or was emptied"
        );
        assert_eq!(look(&status(4, Some(OURS), &[(1, 5, 3)])), None, "a shard was made on it");
        let with_map = NodeStatus { epoch: Epoch(9), ..status(1, Some(OURS), &[(0, 1, 0)]) };
        assert_eq!(look(&with_map), None, "there was a map");
    }
}
