//! The commands that run one role of a cluster in this process, or both: node, balancer, serve. Also how a server is told
//! to stop.

#![expect(clippy::disallowed_methods, reason = "a shell: tasks, and a thread that waits for the end of standard input")]

use crate::args;
use crate::args::{Global, Output, Provision, Spawn};
use crate::local::{Local, found_in};
use crate::members::told_of;
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::json;
use shkv_balancer::provision::docker::{DockerConfig, DockerProvisioner};
use shkv_balancer::provision::{NoProvisioner, Provisioner, Spec};
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap, CausalMember, Ears, HttpLimits};
use shkv_node::{Node, NodeConfig, Tuning};
use shkv_proto::ClusterId;
use std::io::Read;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;
use tracing::info;

/// How long a cluster may take until every shard has a leader.
pub const READY_TIME_MAX: Duration = Duration::from_secs(60);
/// Copies of each shard that are wanted unless said otherwise.
const REPLICAS: u32 = 3;
/// Nodes that a balancer starts for a new cluster unless said otherwise.
const NODES: u32 = 3;
/// The usual port of a balancer.
const LISTEN_PORT: u16 = 7400;
/// The usual port of the node of `serve`.
const NODE_PORT: u16 = 7401;

/// The signals that ask a server to stop.
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Takes them over from the system's default, which would end the process at once.
    pub fn new() -> Result<Self, Trouble> {
        let listen = |kind| signal(kind).map_err(|error| Trouble::Failed(format!("cannot take signals: {error}")));
        Ok(Self { terminate: listen(SignalKind::terminate())?, interrupt: listen(SignalKind::interrupt())? })
    }

    /// Waits for one of them. Cancelling it loses none.
    pub async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
        info!("asked to stop");
    }
}

/// Takes as many open files and connections as the system allows: the usual 1,024 are fewer than a listener's connections,
/// and a node that cannot open its log's next segment stops.
pub fn open_more_files() {
    let limit = getrlimit(Resource::Nofile);
    let most = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, most) {
        tracing::warn!(%error, now = limit.current, "cannot have more files open");
    }
}

/// What HTTP listeners allow: at most a quarter of the open files that there can be are connections of one of them.
pub fn http_limits() -> HttpLimits {
    let limits = HttpLimits::default();
    let files = getrlimit(Resource::Nofile).current.and_then(|most| usize::try_from(most).ok()).unwrap_or(usize::MAX);
    HttpLimits { connections: limits.connections.min(files / 4), ..limits }
}

/// The node's budgets with what the command line names.
pub fn tuning_of(args: &args::Tuning) -> Tuning {
    let defaults = Tuning::default();
    let memory =
        |named: Option<u64>, default: usize| named.map_or(default, |n| usize::try_from(n).unwrap_or(usize::MAX));
    Tuning {
        table_bytes: memory(args.table_bytes, defaults.table_bytes),
        cache_bytes: memory(args.cache_bytes, defaults.cache_bytes),
        log_segment_bytes: args.log_segment_bytes.unwrap_or(defaults.log_segment_bytes),
        log_retain_bytes: args.log_retain_bytes.unwrap_or(defaults.log_retain_bytes),
        disk_reserve_bytes: args.disk_reserve_bytes.unwrap_or(defaults.disk_reserve_bytes),
        threads: args.threads.map_or(defaults.threads, |threads| threads as usize),
    }
}

/// The first layout of a cluster.
pub fn bootstrap(layout: &args::Layout) -> Bootstrap {
    Bootstrap { shards: layout.shards, replicas: layout.replicas.unwrap_or(REPLICAS) }
}

/// What a node needs to start.
fn node_config(member: &args::Member, listen: &str, join: Vec<String>, tuning: &args::Tuning) -> NodeConfig {
    NodeConfig {
        join,
        advertise: member.advertise.clone(),
        advertise_outside: member.advertise_outside.clone(),
        domain: member.domain.clone(),
        capacity: member.capacity,
        instance: member.instance.clone(),
        tuning: tuning_of(tuning),
        ..NodeConfig::new(&member.name, &member.data, listen)
    }
}

/// `node`
pub async fn node(global: &Global, args: args::Node) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let parent_gone = if args.exit_with_parent { Some(end_of_stdin()) } else { None };
    let args::Node { member, listen, join, http, dialects, tuning, .. } = args;
    let config = node_config(&member, &listen, join.clone(), &tuning);
    let node = Node::start(config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
    let mut told = told_of(&node, &member.name, &member.data);
    let front = match http {
        None => None,
        Some(http) => match Front::open(http, &member.name, &node, join, &dialects).await {
            Ok((front, addr)) => {
                told.http = addr;
                Some(front)
            }
            Err(error) => {
                node.stop().await;
                return Err(error);
            }
        },
    };
    let mut out = Out::new();
    match global.output {
        Output::Text => out.line(&format!(
            "{} ({}) listens at {}{}, data in {}; Ctrl-C stops it",
            told.name,
            told.id,
            told.addr,
            told.http.as_ref().map_or(String::new(), |http| format!(", HTTP at http://{http}")),
            told.data.display()
        ))?,
        Output::Json | Output::Jsonl => out.json_line(&told)?,
    }
    out.flush()?;
    drop(out); // its lock on standard output is not held while the node runs
    let why = tokio::select! { // every arm is cancel-safe, and none is waited for again
        () = signals.next() => None,
        () = parent_is_gone(parent_gone) => None,
        why = node.failed() => Some(why),
    };
    if let Some(front) = front {
        front.stop().await; // before the node, which it needs
    }
    node.stop().await;
    why.map_or(Ok(Ending::Done), |why| Err(Trouble::Stopped(why)))
}

/// The HTTP listener of a node that runs alone: a balancer beside it that only follows, and is reached by HTTP only.
struct Front {
    running: JoinHandle<()>,
    stop: CancellationToken,
}

impl Front {
    /// Listens at once; what is asked waits until the node is in a cluster.
    async fn open(
        http: String,
        name: &str,
        node: &Node,
        join: Vec<String>,
        dialects: &args::Dialects,
    ) -> Result<(Self, Option<String>), Trouble> {
        let config = BalancerConfig {
            http: Some(http),
            http_node: Some(name.to_owned()),
            nodes: std::iter::once(node.addr().to_string()).chain(join).collect(),
            follows: true,
            dialects: dialects.chosen(),
            http_limits: http_limits(),
            ..BalancerConfig::new("127.0.0.1:0")
        };
        let ears = Ears::open(&config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
        let addr = ears.http_addr().map(|addr| addr.to_string());
        let stop = CancellationToken::new();
        let stopping = stop.clone();
        let running = tokio::spawn(async move {
            match stopping.run_until_cancelled(Balancer::start_with(config, ears)).await {
                Some(Ok(balancer)) => {
                    stopping.cancelled().await;
                    balancer.stop().await;
                }
                Some(Err(error)) => tracing::error!(%error, "the node has no HTTP front end"),
                None => {}
            }
        });
        Ok((Self { running, stop }, addr))
    }

    async fn stop(self) {
        self.stop.cancel();
        let _ = self.running.await; // a panic in it was already told
    }
}

/// `balancer`
pub async fn balancer(global: &Global, args: args::Balancer) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let nodes_of_ours = OwnNodes::of(&args).await?;
    let provisioner = nodes_of_ours.provisioner();
    let join = vec![args.advertise.clone().unwrap_or_else(|| args.listen.clone())];
    if provisioner.can_start() && join[0].ends_with(":0") {
        return Err(Trouble::Usage(
            "nodes that are started by this balancer must know its port: name one by --listen".into(),
        ));
    }
    let expect = args.expect.unwrap_or(if args.bootstrap && provisioner.can_start() { NODES } else { 0 });
    let config = BalancerConfig {
        http: args.http.clone(),
        http_limits: http_limits(),
        dialects: args.dialects.chosen(),
        nodes: args.nodes.clone(),
        advertise: args.advertise.clone(),
        bootstrap: args.bootstrap.then(|| bootstrap(&args.layout)),
        expect: expect as usize,
        replace_after: args.healing.replace_after,
        cluster: nodes_of_ours.cluster().await?,
        provisioner: provisioner.clone(),
        ..BalancerConfig::new(&args.listen)
    };
    let cluster = config.cluster;
    let starting = async {
        match (cluster, provisioner.can_start()) {
            (Some(cluster), true) => nodes_of_ours.start(cluster, &join, if args.bootstrap { expect } else { 0 }).await,
            _ => Ok(()),
        }
    };
    let balancing = async { Balancer::start(config).await.map_err(|error| Trouble::Failed(error.to_string())) };
    let balancer = tokio::select! { // what is dropped half started is found again at the next start
        both = async { tokio::try_join!(balancing, starting) } => both?.0,
        () = signals.next() => return Ok(Ending::Done),
    };
    let ended = serve_balancer(global, &balancer, &mut signals).await;
    balancer.stop().await;
    ended
}

/// Waits until the cluster is ready, says so, and goes on until a signal.
async fn serve_balancer(global: &Global, balancer: &Balancer, signals: &mut Signals) -> Result<Ending, Trouble> {
    let cluster = tokio::select! { // both arms are cancel-safe
        ready = balancer.ready(READY_TIME_MAX) => ready.map_err(|error| Trouble::Stopped(error.to_string()))?,
        () = signals.next() => return Ok(Ending::Done),
    };
    let (addr, http) = (balancer.addr(), balancer.http_addr());
    let mut out = Out::new();
    match global.output {
        Output::Text => {
            let http = http.map_or(String::new(), |http| format!(", HTTP at http://{http}"));
            out.line(&format!("balancer of cluster {cluster} at {addr}{http}; Ctrl-C stops it"))?;
        }
        Output::Json | Output::Jsonl => out.json_line(&json!({
            "addr": addr.to_string(), "http": http.map(|http| http.to_string()), "cluster": cluster.to_string(),
            "pid": std::process::id(),
        }))?,
    }
    out.flush()?;
    drop(out);
    signals.next().await;
    Ok(Ending::Done)
}

/// `serve`: the node first, because the balancer looks for it; the balancer stops first, because it needs the node.
pub async fn serve(global: &Global, args: args::Serve) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let as_member = as_member(&args)?;
    let args = args::Serve { join: as_member.join.clone(), ..args };
    let config = node_config(&args.member, &as_member.node_listen, args.join.clone(), &args.tuning);
    let config = NodeConfig { name: as_member.name.clone(), ..config };
    let node = Node::start(config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
    let advertise = args.member.advertise.as_deref().and_then(|addr| addr.rsplit_once(':'));
    let advertise = advertise.and_then(|(host, _)| Some(format!("{host}:{}", as_member.listen.rsplit_once(':')?.1)));
    let config = BalancerConfig {
        http: Some(as_member.http.clone()),
        causal: as_member.causal.clone(),
        http_node: Some(as_member.name.clone()),
        http_limits: http_limits(),
        dialects: args.dialects.chosen(),
        nodes: std::iter::once(node.addr().to_string()).chain(args.join.iter().cloned()).collect(),
        advertise,
        bootstrap: as_member.bootstraps.then(|| bootstrap(&args.layout)),
        expect: usize::from(as_member.bootstraps),
        replace_after: args.healing.replace_after,
        ..BalancerConfig::new(&as_member.listen)
    };
    let started = tokio::select! { // what is dropped half started is found again at the next start
        started = Balancer::start(config) => started.map_err(|error| Trouble::Failed(error.to_string())),
        why = node.failed() => Err(Trouble::Stopped(why)),
        () = signals.next() => {
            node.stop().await;
            return Ok(Ending::Done);
        }
    };
    let ended = match started {
        Ok(balancer) => {
            let ended = tokio::select! { // dropping the first arm loses nothing: the balancer is stopped below
                ended = serve_balancer(global, &balancer, &mut signals) => ended,
                why = node.failed() => Err(Trouble::Stopped(why)),
            };
            balancer.stop().await;
            ended
        }
        Err(error) => Err(error),
    };
    node.stop().await;
    ended
}

/// What `serve` does, with what follows from the causal store's addresses.
#[derive(Debug, PartialEq, Eq)]
struct AsMember {
    name: String,
    join: Vec<String>,
    bootstraps: bool,
    listen: String,
    node_listen: String,
    http: String,
    causal: Option<CausalMember>,
}

fn as_member(args: &args::Serve) -> Result<AsMember, Trouble> {
    let or = |named: &Option<String>, default: String| named.clone().unwrap_or(default);
    let Some(address) = args.causal.socket_address.clone() else {
        return Ok(AsMember {
            name: args.member.name.clone(),
            join: args.join.clone(),
            bootstraps: args.bootstrap,
            listen: or(&args.listen, format!("127.0.0.1:{LISTEN_PORT}")),
            node_listen: or(&args.node_listen, format!("127.0.0.1:{NODE_PORT}")),
            http: or(&args.http, "127.0.0.1:8080".into()),
            causal: None,
        });
    };
    let host_of = |address: &str| address.rsplit_once(':').map_or(address, |(host, _)| host).to_owned();
    let host = host_of(&address);
    let mut view = args.causal.view.clone();
    view.sort();
    view.dedup();
    if !view.contains(&address) {
        return Err(Trouble::Usage(format!("VIEW does not have SOCKET_ADDRESS {address}: {}", view.join(","))));
    }
    // The first in order makes the cluster, the others join it; one without a shard count comes to one that is there.
    let is_first = args.causal.shard_count.is_some() && view.first() == Some(&address);
    let others = view.iter().filter(|other| **other != address);
    let others = others.map(|other| format!("{}:{LISTEN_PORT}", host_of(other))).collect();
    let name =
        if args.member.name == args::NAME_DEFAULT { address.replace(':', "-") } else { args.member.name.clone() };
    Ok(AsMember {
        join: if args.join.is_empty() && !args.bootstrap { others } else { args.join.clone() },
        bootstraps: args.bootstrap || (args.join.is_empty() && is_first),
        listen: or(&args.listen, format!("{host}:{LISTEN_PORT}")),
        node_listen: or(&args.node_listen, format!("{host}:{NODE_PORT}")),
        http: or(&args.http, address.clone()),
        causal: Some(CausalMember { node: name.clone(), address, view, shard_count: args.causal.shard_count }),
        name,
    })
}

/// The nodes that a balancer starts, by the provisioner that was asked for.
enum OwnNodes {
    None(Arc<NoProvisioner>),
    Process(Arc<Local>, PathBuf),
    Docker(Arc<DockerProvisioner>),
}

impl OwnNodes {
    async fn of(args: &args::Balancer) -> Result<Self, Trouble> {
        match (args.spawn, &args.data) {
            (Provision::Process, Some(data)) => {
                let data = std::path::absolute(data).map_err(|error| Trouble::Failed(error.to_string()))?;
                std::fs::create_dir_all(&data).map_err(|error| {
                    Trouble::Failed(format!("cannot make the data directory {}: {error}", data.display()))
                })?;
                let (local, _moved) = Local::new(data.clone(), Spawn::Process, args.tuning.clone(), true);
                Ok(Self::Process(Arc::new(local), data))
            }
            (Provision::Docker, _) => {
                let config = docker_config(&args.docker, &args.tuning)?;
                let docker = DockerProvisioner::connect(config).await;
                Ok(Self::Docker(Arc::new(docker.map_err(|error| Trouble::Failed(error.to_string()))?)))
            }
            (Provision::None | Provision::Process, _) => Ok(Self::None(Arc::new(NoProvisioner))),
        }
    }

    fn provisioner(&self) -> Arc<dyn Provisioner> {
        match self {
            Self::None(none) => none.clone(),
            Self::Process(local, _) => local.clone(),
            Self::Docker(docker) => docker.clone(),
        }
    }

    /// The cluster of the nodes that are there; a new id if there are none and they are to be started.
    async fn cluster(&self) -> Result<Option<ClusterId>, Trouble> {
        let found = match self {
            Self::None(_) => return Ok(None),
            Self::Process(_, data) => found_in(data).map(|found| found.iter().find_map(|found| found.cluster)),
            Self::Docker(docker) => docker.cluster().await.map_err(|error| error.to_string()),
        };
        Ok(Some(found.map_err(Trouble::Failed)?.unwrap_or_else(|| ClusterId(rand::random()))))
    }

    /// Starts those that are there and do not run; if there are none, `count` new ones.
    async fn start(&self, cluster: ClusterId, join: &[String], count: u32) -> Result<(), Trouble> {
        let provisioner = self.provisioner();
        let failed = |error: String| Trouble::Failed(error);
        if let Self::Process(local, data) = self {
            for found in found_in(data).map_err(failed)?.iter().filter(|found| found.running) {
                local.adopt(found, join).map_err(failed)?;
            }
        }
        let mut specs: Vec<Spec> = Vec::new();
        let there = provisioner.list(cluster).await.map_err(|error| failed(error.to_string()))?;
        let spec = |instance: String, name: String| Spec { cluster, instance, name, join: join.to_vec() };
        if there.is_empty() {
            specs.extend((0..count).map(|n| spec(format!("Server{n}"), format!("Server{n}"))));
        }
        specs.extend(there.into_iter().filter(|there| !there.running).map(|there| spec(there.instance, there.name)));
        for spec in specs {
            provisioner.start(&spec).await.map_err(|error| failed(error.to_string()))?;
        }
        Ok(())
    }
}

fn docker_config(args: &args::Docker, tuning: &args::Tuning) -> Result<DockerConfig, Trouble> {
    let publish = match args.docker_publish.as_deref().and_then(|addr| addr.rsplit_once(':')) {
        Some((host, port)) => {
            let port = port.parse().map_err(|_| Trouble::Usage(format!("--docker-publish: {port} is no port")))?;
            Some((host.to_owned(), port))
        }
        None => None,
    };
    Ok(DockerConfig {
        socket: args.docker_socket.clone(),
        group: args.docker_group.clone(),
        image: args.docker_image.clone(),
        network: args.docker_network.clone(),
        memory_bytes: args.docker_memory,
        cpu_millis: args.docker_cpus,
        publish,
        node_args: tuning.arguments(),
    })
}

/// Told when standard input is at its end. A thread of its own reads it: the runtime would wait for a read of its own
/// until something comes, also when the process wants to end.
fn end_of_stdin() -> oneshot::Receiver<()> {
    let (sender, receiver) = oneshot::channel();
    std::thread::spawn(move || {
        let mut bytes = [0; 64];
        while std::io::stdin().lock().read(&mut bytes).is_ok_and(|read| read > 0) {}
        let _ = sender.send(()); // the node may be stopping already
    });
    receiver
}

async fn parent_is_gone(parent: Option<oneshot::Receiver<()>>) {
    match parent {
        Some(receiver) => {
            let _ = receiver.await; // told, or nobody is there to tell: the same
            info!("the parent process is gone");
        }
        None => std::future::pending().await,
    }
}
