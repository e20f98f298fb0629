//! The commands that run one role of a cluster in this process: node and balancer. Also how a server is told to stop.

#![expect(clippy::disallowed_methods, reason = "a shell: a thread waits for the end of standard input")]

use crate::args;
use crate::args::{Global, Output};
use crate::members::told_of;
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use serde_json::json;
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap};
use shkv_node::{Node, NodeConfig, Tuning};
use std::io::Read;
use std::time::Duration;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::oneshot;
use tracing::info;

/// How long a cluster may take until every shard has a leader.
pub const READY_TIME_MAX: Duration = Duration::from_secs(60);
/// Copies of each shard unless said otherwise and where there are as many nodes.
const REPLICAS: u32 = 3;

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

/// The first layout of a cluster of this many nodes.
pub fn bootstrap(shards: u32, replicas: Option<u32>, nodes: usize) -> Result<Bootstrap, Trouble> {
    let nodes = u32::try_from(nodes).unwrap_or(u32::MAX);
    let replicas = replicas.unwrap_or(REPLICAS.min(nodes));
    if replicas > nodes {
        return Err(Trouble::Usage(format!("{replicas} replicas need as many nodes, there are {nodes}")));
    }
    Ok(Bootstrap { shards, replicas })
}

/// `node`
pub async fn node(global: &Global, args: args::Node) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let parent_gone = if args.exit_with_parent { Some(end_of_stdin()) } else { None };
    let config = NodeConfig {
        name: args.name.clone(),
        data: args.data.clone(),
        listen: args.listen.clone(),
        tuning: tuning_of(&args.tuning),
    };
    let node = Node::start(config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
    let told = told_of(&node, &args.name, &args.data);
    let mut out = Out::new();
    match global.output {
        Output::Text => out.line(&format!(
            "{} ({}) listens at {}, data in {}; Ctrl-C stops it",
            told.name,
            told.id,
            told.addr,
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
    node.stop().await;
    why.map_or(Ok(Ending::Done), |why| Err(Trouble::Stopped(why)))
}

/// `balancer`
pub async fn balancer(global: &Global, args: args::Balancer) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let first_layout = bootstrap(args.shards, args.replicas, args.nodes.len())?;
    let config = BalancerConfig {
        listen: args.listen,
        http: args.http,
        nodes: args.nodes,
        bootstrap: args.bootstrap.then_some(first_layout),
    };
    let balancer = Balancer::start(config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
    let cluster = tokio::select! { // both arms are cancel-safe
        ready = balancer.ready(READY_TIME_MAX) => ready,
        () = signals.next() => {
            balancer.stop().await;
            return Ok(Ending::Done);
        }
    };
    let cluster = match cluster {
        Ok(cluster) => cluster,
        Err(error) => {
            balancer.stop().await;
            return Err(Trouble::Stopped(error.to_string()));
        }
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
    balancer.stop().await;
    Ok(Ending::Done)
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
