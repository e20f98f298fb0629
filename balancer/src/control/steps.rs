//! Doing what was planned: requests to nodes, and instances started and removed. At most one thing at a time for each shard
//! and for each instance; what fails is planned again by the next round.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and starts tasks")]

use super::plan::Step;
use crate::cluster::Cluster;
use crate::map_rows::{State, Wanted};
use crate::provision::Spec;
use crate::{layout, system};
use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::link::{CallError, LinkError};
use shkv_proto::message::{ChangeReplicas, RemoveReplica, TransferLeader};
use shkv_proto::{Frame, Header, Kind, NodeId, ReplicaId, ShardId, codec};
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long a node may take for one step.
const STEP_TIME_MAX: Duration = Duration::from_secs(10);
/// How long the provisioner may take to start or remove an instance.
const PROVISION_TIME_MAX: Duration = Duration::from_secs(120);
/// How often the provisioner is asked what there is.
const LIST_EVERY: Duration = Duration::from_secs(1);
/// How long a node that was started may take to join, before it is removed and started anew.
const JOIN_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a shard is left alone after its leadership was offered to another replica.
const TRANSFER_REST: Duration = Duration::from_secs(2);
/// Pause before a start that failed is tried again; it doubles with each failure up to [`START_PAUSE_MAX`].
const START_PAUSE: Duration = Duration::from_secs(1);
/// Longest pause between two starts.
const START_PAUSE_MAX: Duration = Duration::from_secs(30);

/// What one thing at a time is done for.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum About {
    Shard(ShardId, NodeId),
    Group(ShardId),
    Instance(String),
    Listing,
}

/// Things under way.
pub(super) struct Steps {
    cluster: Arc<Cluster>,
    under_way: Arc<Mutex<BTreeSet<About>>>,
    rests: BTreeMap<ShardId, Instant>,
    listed: Option<Instant>,
    /// What the provisioner said that there is; `None` if it has not said so the last time that it was asked.
    listing: Arc<Mutex<Option<BTreeMap<String, bool>>>>,
    /// Instances that were removed since this balancer controls the cluster: they are not removed again and again.
    removed: Arc<Mutex<BTreeSet<String>>>,
    /// Wanted nodes that were started, with when, and the instance: a listing that is a little old does not have it yet.
    started: Arc<Mutex<BTreeMap<String, (Instant, String)>>>,
    /// Wanted nodes that could not be started, and why; until that is written down.
    failed: Arc<Mutex<Vec<(String, String)>>>,
    pauses: BTreeMap<String, Instant>,
}

impl Steps {
    /// Nothing under way.
    pub(super) fn new(cluster: Arc<Cluster>) -> Self {
        Self {
            cluster,
            under_way: Arc::default(),
            rests: BTreeMap::new(),
            listed: None,
            listing: Arc::default(),
            removed: Arc::default(),
            started: Arc::default(),
            failed: Arc::default(),
            pauses: BTreeMap::new(),
        }
    }

    /// What instances there are, those that are being started or were just started included: one that is forgotten is
    /// never removed.
    pub(super) fn instances(&self) -> BTreeMap<String, bool> {
        let mut instances = self.listing.lock().clone().unwrap_or_default();
        for (_, instance) in self.started.lock().values() {
            instances.entry(instance.clone()).or_insert(false);
        }
        for about in self.under_way.lock().iter() {
            if let About::Instance(instance) = about {
                instances.entry(instance.clone()).or_insert(false);
            }
        }
        instances
    }

    /// Whether that is known.
    pub(super) fn knows_instances(&self) -> bool {
        self.listing.lock().is_some()
    }

    /// Asks the provisioner what there is, every now and then. Its answer is not waited for: the lease must be renewed
    /// meanwhile.
    pub(super) fn look_at_instances(&mut self, may_act: bool) {
        let is_due = self.listed.is_none_or(|at| at.elapsed() >= LIST_EVERY);
        if !may_act || !is_due || !self.cluster.setup.provisioner.can_start() {
            return;
        }
        if !self.under_way.lock().insert(About::Listing) {
            return;
        }
        self.listed = Some(Instant::now());
        let (cluster, under_way, listing) = (self.cluster.clone(), self.under_way.clone(), self.listing.clone());
        let tasks = cluster.tasks.clone();
        tasks.spawn(async move {
            let listed = cluster.setup.provisioner.list(cluster.id);
            let listed = cluster.stop.run_until_cancelled(tokio::time::timeout(STEP_TIME_MAX, listed)).await;
            *listing.lock() = match listed {
                Some(Ok(Ok(there))) => Some(there.into_iter().map(|there| (there.instance, there.running)).collect()),
                Some(Ok(Err(error))) => {
                    tracing::warn!(%error, "the provisioner does not say what there is");
                    None
                }
                Some(Err(_)) | None => None,
            };
            under_way.lock().remove(&About::Listing);
        });
    }

    /// Writes into `after` what went wrong with wanted nodes.
    pub(super) fn report(&mut self, after: &mut State, unix_s: u64) {
        self.started.lock().retain(|name, _| after.wanted.contains_key(name));
        let now = Instant::now();
        let instances = self.instances();
        let runs = |wanted: &&Wanted| instances.get(&wanted.instance) == Some(&true) && !wanted.cancelled;
        let late: Vec<String> = {
            let mut started = self.started.lock();
            for wanted in after.wanted.values().filter(runs) {
                // By whoever controlled the cluster before.
                started.entry(wanted.name.clone()).or_insert_with(|| (now, wanted.instance.clone()));
            }
            let late = started.iter().filter(|(_, (at, _))| now.duration_since(*at) > JOIN_TIME_MAX);
            let late: Vec<String> = late.map(|(name, _)| name.clone()).collect();
            started.retain(|name, _| !late.contains(name));
            late
        };
        for name in late {
            if let Some(wanted) = after.wanted.get(&name) {
                self.begin_removing(wanted.instance.clone());
            }
            self.failed.lock().push((name, format!("it was started, and did not join within {JOIN_TIME_MAX:?}")));
        }
        for (name, error) in std::mem::take(&mut *self.failed.lock()) {
            let Some(wanted) = after.wanted.get_mut(&name) else { continue };
            wanted.tries += 1;
            let pause = START_PAUSE * (1 << wanted.tries.saturating_sub(1).min(5));
            self.pauses.insert(name.clone(), now + pause.min(START_PAUSE_MAX));
            if wanted.error.as_ref() != Some(&error) {
                after.note(unix_s, format!("{name} does not start: {error}"));
            }
            if let Some(wanted) = after.wanted.get_mut(&name) {
                wanted.error = Some(error);
            }
        }
    }

    /// Begins a step, unless something is under way for the same.
    pub(super) fn begin(&mut self, step: Step, state: &State) {
        let now = Instant::now();
        let cluster = self.cluster.clone();
        match step {
            Step::Create(shard, node) => {
                let Some(create) = state.map.shard(shard).and_then(|info| layout::creation(cluster.id, info, node))
                else {
                    return;
                };
                self.spawn(About::Shard(shard, node), async move { system::create_one(&cluster, node, &create).await });
            }
            Step::Change(shard, leader, change) => {
                self.spawn(About::Group(shard), async move { tell_to_change(&cluster, shard, leader, &change).await });
            }
            Step::Transfer(shard, leader, to) => {
                if self.rests.get(&shard).is_some_and(|until| now < *until) {
                    return;
                }
                self.rests.retain(|_, until| now < *until);
                self.rests.insert(shard, now + TRANSFER_REST);
                self.spawn(About::Group(shard), async move { tell_to_transfer(&cluster, shard, leader, to).await });
            }
            Step::Remove(shard, node, replica) => {
                let remove = RemoveReplica { replica };
                self.spawn(About::Shard(shard, node), async move {
                    ask(&cluster, Kind::RemoveReplica, shard, node, &remove).await
                });
            }
            Step::Start(name) => self.begin_starting(&name, state, now),
            Step::RemoveInstance(instance) => {
                let is_there = self.listing.lock().as_ref().is_some_and(|there| there.contains_key(&instance));
                if is_there || !self.removed.lock().contains(&instance) {
                    self.begin_removing(instance);
                }
            }
        }
    }

    fn begin_starting(&self, name: &str, state: &State, now: Instant) {
        let Some(wanted) = state.wanted.get(name) else { return };
        let is_paused = self.pauses.get(name).is_some_and(|until| now < *until);
        if is_paused || self.started.lock().contains_key(name) {
            return;
        }
        let about = About::Instance(wanted.instance.clone());
        if !self.under_way.lock().insert(about.clone()) {
            return;
        }
        let spec = Spec {
            cluster: self.cluster.id,
            instance: wanted.instance.clone(),
            name: wanted.name.clone(),
            join: vec![self.cluster.setup.addr.clone()],
        };
        let (cluster, under_way) = (self.cluster.clone(), self.under_way.clone());
        let (started, failed) = (self.started.clone(), self.failed.clone());
        let tasks = cluster.tasks.clone();
        tasks.spawn(async move {
            let starting = cluster.setup.provisioner.start(&spec);
            match tokio::time::timeout(PROVISION_TIME_MAX, starting).await {
                Ok(Ok(())) => drop(started.lock().insert(spec.name.clone(), (Instant::now(), spec.instance.clone()))),
                Ok(Err(error)) => failed.lock().push((spec.name.clone(), error.to_string())),
                Err(_) => failed.lock().push((spec.name.clone(), format!("not started within {PROVISION_TIME_MAX:?}"))),
            }
            under_way.lock().remove(&about);
        });
    }

    fn begin_removing(&self, instance: String) {
        let about = About::Instance(instance.clone());
        if !self.under_way.lock().insert(about.clone()) {
            return;
        }
        let (cluster, under_way) = (self.cluster.clone(), self.under_way.clone());
        let (started, removed) = (self.started.clone(), self.removed.clone());
        let tasks = cluster.tasks.clone();
        tasks.spawn(async move {
            let removing = cluster.setup.provisioner.remove(cluster.id, &instance);
            match tokio::time::timeout(PROVISION_TIME_MAX, removing).await {
                Ok(Ok(())) => {
                    tracing::info!(instance, "removed");
                    started.lock().retain(|_, (_, of)| *of != instance);
                    removed.lock().insert(instance);
                }
                Ok(Err(error)) => tracing::warn!(instance, %error, "an instance is not removed"),
                Err(_) => tracing::warn!(instance, "an instance is not removed within {PROVISION_TIME_MAX:?}"),
            }
            under_way.lock().remove(&about);
        });
    }

    fn spawn(&self, about: About, work: impl Future<Output = Result<(), CallError>> + Send + 'static) {
        if !self.under_way.lock().insert(about.clone()) {
            return;
        }
        let (cluster, under_way) = (self.cluster.clone(), self.under_way.clone());
        let tasks = cluster.tasks.clone();
        tasks.spawn(async move {
            match cluster.stop.run_until_cancelled(work).await {
                Some(Ok(())) => cluster.beat_wanted.notify_one(), // what has come of it should be heard soon
                Some(Err(error)) => tracing::debug!(?about, %error, "a step was not taken"),
                None => {}
            }
            under_way.lock().remove(&about);
        });
    }
}

async fn ask<T: serde::Serialize>(
    cluster: &Cluster,
    kind: Kind,
    shard: ShardId,
    node: NodeId,
    head: &T,
) -> Result<(), CallError> {
    let head = codec::encode(head).map_err(|error| shkv_proto::message::Failure::malformed(&error))?;
    let Some(home) = cluster.pool.get(node) else {
        return Err(LinkError::NotSent(format!("no address is known for node {node}")).into());
    };
    let frame = Frame::new(Header { shard, ..Header::new(kind) }, head, Bytes::new());
    home.link(0).ask::<()>(frame, Instant::now() + STEP_TIME_MAX).await.map(drop)
}

async fn tell_to_change(
    cluster: &Cluster,
    shard: ShardId,
    leader: NodeId,
    change: &ChangeReplicas,
) -> Result<(), CallError> {
    ask(cluster, Kind::ChangeReplicas, shard, leader, change).await
}

/// Tells the leader of a shard to give its leadership to a replica. It is done when it was offered, not when it was taken.
pub(super) async fn tell_to_transfer(
    cluster: &Cluster,
    shard: ShardId,
    leader: NodeId,
    to: ReplicaId,
) -> Result<(), CallError> {
    ask(cluster, Kind::TransferLeader, shard, leader, &TransferLeader { to }).await
}
