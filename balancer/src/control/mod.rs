//! The control of the cluster: one balancer holds the lease and does, step by step, what [`plan`] says; every balancer takes
//! the wishes of operators and of nodes that join, and writes them down.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits, starts tasks and draws names")]

pub(crate) mod lease;
mod place;
pub(crate) mod plan;
mod steps;
pub(crate) mod wishes;

use crate::cluster::Cluster;
use crate::map_rows::State;
use crate::system::{self, SystemError, Written};
use lease::{Act, Lease};
use plan::{Seen, Step};
use rand::RngExt;
use shkv_proto::link::CallError;
use shkv_proto::message::{Admin, AdminDone, Control, Controller, Failure, Hello, Join, RefusalCode, Role};
use shkv_proto::{NodeId, ShardId, codec, world};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use steps::Steps;
use tokio::time::Instant;

/// Time between two rounds of the controller.
const ROUND_EVERY: Duration = Duration::from_millis(100);
/// How often the lease is looked at.
const LEASE_LOOK_EVERY: Duration = Duration::from_millis(500);
/// How often a change is thought out anew because what it was based on has changed.
const TRIES_MAX: u32 = 20;
/// How long a node that joins may take to answer at the address that it names.
const DIAL_TIME_MAX: Duration = Duration::from_secs(2);
/// How long a wished transfer of a leadership may take.
const TRANSFER_TIME_MAX: Duration = Duration::from_secs(4);
/// Pause between two looks at it.
const TRANSFER_LOOK: Duration = Duration::from_millis(50);

/// Controls the cluster while it holds the lease, until the balancer stops; then it gives the lease up.
pub(crate) async fn run(cluster: Arc<Cluster>) {
    let mut lease = Lease::new(cluster.setup.me);
    let mut steps = Steps::new(cluster.clone());
    let mut looked: Option<Instant> = None;
    let stop = cluster.stop.clone();
    let working = async {
        loop {
            tokio::time::sleep(ROUND_EVERY).await;
            if !cluster.has_map() {
                continue;
            }
            if looked.is_none_or(|at| at.elapsed() >= LEASE_LOOK_EVERY) {
                looked = Some(Instant::now());
                if let Err(error) = look_at_lease(&cluster, &mut lease).await {
                    tracing::debug!(%error, "the lease was not looked at");
                }
            }
            if lease.version().is_some() {
                round(&cluster, &mut lease, &mut steps).await;
            }
        }
    };
    stop.run_until_cancelled(working).await;
    if let (Some(version), Some(state)) = (lease.version(), cluster.state()) {
        // Nobody's: the next one need not wait until it sees no renewals.
        let term = state.controller.as_ref().map_or(0, |(who, _)| who.term);
        let _ = system::give_up_lease(&cluster, version, term).await; // if not, they wait a little
    }
}

async fn look_at_lease(cluster: &Arc<Cluster>, lease: &mut Lease) -> Result<(), SystemError> {
    let asked = Instant::now();
    let (rows, who) = system::lease(cluster).await?;
    cluster.set_controller(who.clone());
    match lease.decide(rows, asked) {
        Act::Wait => {}
        Act::Renew(version) => {
            let asked = Instant::now();
            if system::renew_lease(cluster, version).await? {
                lease.renewed(version, asked);
            } else {
                lease.lost();
            }
        }
        Act::Take => {
            let asked = Instant::now();
            let term = who.map_or(0, |who| who.term) + 1;
            let me = Controller { balancer: cluster.setup.me, addr: cluster.setup.addr.clone(), term };
            if let Some(version) = system::take_lease(cluster, rows, &me).await? {
                tracing::info!(term, "this balancer controls the cluster");
                lease.renewed(version, asked);
                reread(cluster).await?;
            }
        }
    }
    Ok(())
}

async fn reread(cluster: &Arc<Cluster>) -> Result<(), SystemError> {
    if let Some(state) = system::read(cluster).await? {
        cluster.install(state);
    }
    Ok(())
}

async fn round(cluster: &Arc<Cluster>, lease: &mut Lease, steps: &mut Steps) {
    steps.look_at_instances(lease.may_act(Instant::now()));
    let Some(state) = cluster.state() else { return };
    let mut seen = seen(cluster, &state);
    seen.instances = steps.instances();
    seen.can_start &= steps.knows_instances();
    let plan = plan::plan(&state, &seen);
    let mut after = plan.after;
    steps.report(&mut after, seen.unix_s);
    if after != *state {
        match system::write(cluster, &state, &after, lease.version()).await {
            Ok(Written::Done) => {
                let told = state.events.last().map(|(number, _)| *number);
                for (_, event) in after.events.iter().filter(|(number, _)| told.is_none_or(|told| *number > told)) {
                    tracing::info!("{}", event.text);
                }
            }
            Ok(Written::Nothing | Written::Stale) => {}
            Ok(Written::Deposed) => {
                tracing::info!("another balancer controls the cluster");
                lease.lost();
            }
            Err(error) => tracing::debug!(%error, "a change of the map was not written"),
        }
        if let Err(error) = reread(cluster).await {
            tracing::debug!(%error, "the map was not read");
        }
        return; // the steps follow from what is written now
    }
    let may_act = lease.may_act(Instant::now()); // not sooner: reading and writing has taken its time
    for step in plan.steps {
        if may_act || !matches!(step, Step::Start(_) | Step::RemoveInstance(_)) {
            steps.begin(step, &state);
        }
    }
}

fn unix_s() -> u64 {
    world::unix_time().as_secs()
}

fn seen(cluster: &Cluster, state: &State) -> Seen {
    let nodes: Vec<NodeId> = state.map.nodes.iter().map(|node| node.id).collect();
    let nodes: BTreeMap<NodeId, _> =
        cluster.health(|health, now| nodes.into_iter().map(|node| (node, health.heard_of(node, now))).collect());
    Seen {
        nodes,
        instances: BTreeMap::new(),
        can_start: cluster.setup.provisioner.can_start(),
        replace_after: cluster.setup.replace_after,
        unix_s: unix_s(),
    }
}

/// Changes what the system shard holds, thought out on what it holds now; again if that has changed meanwhile.
///
/// # Errors
/// What `think` refuses; or that it could not be written.
pub(crate) async fn change<T>(
    cluster: &Arc<Cluster>,
    mut think: impl FnMut(&mut State) -> Result<T, Failure>,
) -> Result<T, Failure> {
    let busy = |text: String| Failure::Busy { retry_after_ms: 100, text };
    for _ in 0..TRIES_MAX {
        let state = system::read(cluster).await.map_err(|error| busy(error.to_string()))?;
        let Some(before) = state else { return Err(busy("the cluster is being made".into())) };
        let mut after = before.clone();
        let thought = think(&mut after)?;
        match system::write(cluster, &before, &after, None).await {
            Ok(Written::Nothing) => return Ok(thought),
            Ok(Written::Done) => {
                let _ = reread(cluster).await; // if not now, then a little later
                return Ok(thought);
            }
            Ok(Written::Stale | Written::Deposed) => {}
            Err(SystemError::Failure(failure @ Failure::Unknown { .. })) => return Err(failure),
            Err(error) => return Err(busy(error.to_string())),
        }
    }
    Err(busy("the map kept changing".into()))
}

/// Carries out a wish of an operator.
///
/// # Errors
/// Refusals, and whatever keeps it from being written.
pub(crate) async fn admin(cluster: &Arc<Cluster>, wish: Admin) -> Result<AdminDone, Failure> {
    let instances = match &wish {
        Admin::AddNodes { .. } => {
            let listed = cluster.setup.provisioner.list(cluster.id).await;
            let there = listed.map_err(|error| Failure::Busy { retry_after_ms: 500, text: error.to_string() })?;
            there.into_iter().map(|there| (there.instance, there.running)).collect()
        }
        _ => BTreeMap::new(),
    };
    let looked = |state: &State| Seen { instances: instances.clone(), ..seen(cluster, state) };
    let names = match &wish {
        Admin::AddNodes { count, names } => {
            change(cluster, |state| wishes::add(state, &looked(state), *count, names, random_name)).await?
        }
        Admin::RemoveNodes { count, names } => {
            change(cluster, |state| wishes::remove(state, &looked(state), *count, names)).await?
        }
        Admin::Drain { node, drain } => {
            change(cluster, |state| wishes::drain(state, &looked(state), node, *drain)).await?
        }
        Admin::Transfer { shard, node } => transfer(cluster, *shard, node).await?,
        Admin::CreateKeyspace { name, replicas, shards } => {
            change(cluster, |state| wishes::create_keyspace(state, &looked(state), name, *replicas, shards)).await?
        }
        Admin::DropKeyspace { name } => change(cluster, |state| wishes::drop_keyspace(state, name)).await?,
        Admin::Pin { shard, nodes } => change(cluster, |state| wishes::pin(state, *shard, nodes)).await?,
        Admin::Recut { keyspace, remove, shards } => {
            change(cluster, |state| wishes::recut(state, &looked(state), keyspace, remove, shards)).await?
        }
    };
    Ok(AdminDone { epoch: cluster.routes().map().epoch, names })
}

/// `Server-XXX-YYY`: three random digits, and the milliseconds of the time.
fn random_name() -> String {
    let millis = world::unix_time().as_millis() % 1_000;
    format!("Server-{:03}-{millis:03}", world::rng().random_range(0..1_000))
}

async fn transfer(cluster: &Arc<Cluster>, shard: ShardId, node: &str) -> Result<Vec<String>, Failure> {
    let state = cluster.state().ok_or(Failure::Busy { retry_after_ms: 100, text: "there is no map yet".into() })?;
    let (name, home) = wishes::transfer(&state, &seen(cluster, &state), shard, node)?;
    let until = Instant::now() + TRANSFER_TIME_MAX;
    let mut last = "the shard has no leader".to_owned();
    loop {
        match cluster.health(|health, now| health.leader(shard, now)) {
            Some(leader) if leader == home.node => return Ok(vec![name]),
            Some(leader) => match steps::tell_to_transfer(cluster, shard, leader, home.id).await {
                Err(CallError::Failure(failure @ Failure::Refusal { .. })) => return Err(failure),
                Err(error) => last = error.to_string(),
                Ok(()) => last = "it was offered, and not taken yet".into(),
            },
            None => {}
        }
        if Instant::now() >= until {
            return Err(Failure::Busy {
                retry_after_ms: 500,
                text: format!("{name} does not lead shard {shard} yet: {last}"),
            });
        }
        cluster.beat_wanted.notify_one();
        tokio::time::sleep(TRANSFER_LOOK).await;
    }
}

/// A member registers before this balancer has a map: it is taken note of where it lives. It may be the one that leads the
/// system shard, and if everything was restarted, no other node knows its address either.
pub(crate) fn note_joiner(cluster: &Cluster, role: Role, head: &[u8]) {
    let Ok(join) = codec::decode::<Join>(head) else { return };
    if role == Role::Node(join.id) && join.cluster == Some(cluster.id) {
        cluster.moved(join.id, join.addr); // the pool takes only the node that is meant
    }
}

/// A node registers, or tells where it is now.
///
/// # Errors
/// Refusals, and whatever keeps it from being written.
pub(crate) async fn join(cluster: &Arc<Cluster>, role: Role, join: Join) -> Result<(), Failure> {
    if role != Role::Node(join.id) {
        let text = format!("{role:?} registers as node {}: a node speaks for itself only", join.id);
        return Err(Failure::refusal(RefusalCode::NotAllowed, text));
    }
    let (id, addr) = (join.id, join.addr.clone());
    let known = cluster.state().is_some_and(|state| wishes::is_known(&state, &join));
    let think = |state: &mut State| {
        let seen = seen(cluster, state);
        wishes::join(state, &seen, &join)
    };
    if !known {
        // Refused before it is dialled, if it is refused anyway.
        if let Some(state) = cluster.state() {
            think(&mut (*state).clone())?;
        }
        dial(cluster, id, &addr).await?;
    }
    change(cluster, think).await?;
    cluster.moved(id, addr);
    Ok(())
}

/// Whether the node answers where it says that others reach it.
async fn dial(cluster: &Cluster, node: NodeId, addr: &str) -> Result<(), Failure> {
    let conflict = |text: String| Err(Failure::refusal(RefusalCode::Conflict, text));
    let hello = Hello::ours(None, Role::Balancer);
    match tokio::time::timeout(DIAL_TIME_MAX, shkv_proto::session::connect(addr, &hello)).await {
        Ok(Ok(session)) => match session.peer.role {
            Role::Node(found) if found == node => Ok(()),
            other => conflict(format!(
                "at {addr} answers {other:?}, not node {node}; name the node's own address by --advertise"
            )),
        },
        Ok(Err(error)) => conflict(format!(
            "nobody can be reached at {addr} ({error}) from {}; name an address by --advertise that others reach",
            cluster.setup.addr
        )),
        Err(_) => conflict(format!(
            "nobody answers at {addr} within {DIAL_TIME_MAX:?}; name an address by --advertise that others reach"
        )),
    }
}

/// What this balancer can tell of the cluster's control.
pub(crate) fn status(cluster: &Cluster) -> Control {
    let state = cluster.state();
    let nodes: Vec<NodeId> = state.iter().flat_map(|state| &state.map.nodes).map(|node| node.id).collect();
    Control {
        balancer: cluster.setup.me,
        provisioner: cluster.setup.provisioner.kind().to_owned(),
        controller: cluster.controller().filter(|who| who.balancer != lease::NOBODY),
        health: cluster.health(|health, now| nodes.into_iter().map(|node| (node, health.of(node, now))).collect()),
        wanted: state
            .iter()
            .flat_map(|state| state.wanted.values())
            .map(|wanted| (wanted.name.clone(), wanted.error.clone()))
            .collect(),
        gone: state.as_ref().map(|state| state.gone.clone()).unwrap_or_default(),
        events: state.iter().flat_map(|state| &state.events).map(|(_, event)| event.clone()).collect(),
    }
}
