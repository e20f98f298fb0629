//! The command that runs a whole cluster on this machine: nodes, and a balancer in this process.

use crate::args::{Global, Output, Up};
use crate::members::{Member, Running, Told};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::roles::{READY_TIME_MAX, Signals, bootstrap};
use serde_json::json;
use shkv_balancer::{Balancer, BalancerConfig};
use shkv_proto::ClusterId;
use std::io::ErrorKind;
use std::path::Path;
use tokio::sync::mpsc;
use tokio::task::{JoinSet, LocalSet};
use tokio_util::sync::CancellationToken;

/// How the data directory of a node is called, with a number behind.
const NODE_NAME: &str = "Server";
/// Nodes when there is no data yet and none are named.
const NODES: u32 = 3;
/// Restarted nodes that may wait to be told to the balancer.
const MOVED_MAX: usize = 64;

/// `up`
pub async fn run(global: &Global, args: Up) -> Result<Ending, Trouble> {
    // The tasks that keep nodes running stay on this thread: waiting for a node's end need not be `Send`.
    LocalSet::new().run_until(up(global, args)).await
}

async fn up(global: &Global, args: Up) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let members = members(&args)?;
    let first_layout = bootstrap(args.shards, args.replicas, members.len())?;
    let mut nodes = tokio::select! { // what is dropped half started is found again at the next start
        nodes = Nodes::start(members) => nodes?,
        () = signals.next() => return Ok(Ending::Done),
    };
    let config = BalancerConfig {
        listen: args.listen.clone(),
        http: Some(args.http.clone()),
        nodes: nodes.told.iter().map(|told| told.addr.clone()).collect(),
        bootstrap: Some(first_layout),
    };
    let balancer = match Balancer::start(config).await {
        Ok(balancer) => balancer,
        Err(error) => {
            nodes.stop().await;
            return Err(Trouble::Failed(error.to_string()));
        }
    };
    let ended = serve(global, &balancer, &mut nodes, &mut signals).await;
    balancer.stop().await; // before the nodes: what it has in hand still needs them
    nodes.stop().await;
    ended
}

/// Waits until the cluster is ready, says so, and tells the balancer of nodes that were started again, until a signal.
async fn serve(
    global: &Global,
    balancer: &Balancer,
    nodes: &mut Nodes,
    signals: &mut Signals,
) -> Result<Ending, Trouble> {
    let ready = balancer.ready(READY_TIME_MAX);
    tokio::pin!(ready);
    let mut waiting = true;
    loop {
        tokio::select! { // every arm is cancel-safe; `ready` is pinned and goes on where it was
            cluster = &mut ready, if waiting => {
                waiting = false;
                let cluster = cluster.map_err(|error| Trouble::Stopped(error.to_string()))?;
                say_ready(global.output, balancer, &nodes.told, cluster)?;
            }
            told = nodes.moved.recv() => {
                if let Some(told) = told && let Ok(node) = told.node() {
                    balancer.node_moved(node, told.addr);
                }
            }
            () = signals.next() => return Ok(Ending::Done),
        }
    }
}

/// The nodes that `up` keeps running.
struct Nodes {
    /// What they told of themselves at the start, in the order of their names.
    told: Vec<Told>,
    moved: mpsc::Receiver<Told>,
    stop: CancellationToken,
    kept: JoinSet<()>,
}

impl Nodes {
    /// Starts all at the same time. If one does not start, the others are stopped again.
    async fn start(members: Vec<Member>) -> Result<Self, Trouble> {
        let mut starting = JoinSet::new();
        for (at, member) in members.into_iter().enumerate() {
            starting.spawn(async move {
                let started = member.start().await;
                (at, member, started)
            });
        }
        let mut running: Vec<(usize, Member, Running, Told)> = Vec::new();
        let mut wrong = None;
        while let Some(joined) = starting.join_next().await {
            match joined {
                Ok((at, member, Ok((node, told)))) => running.push((at, member, node, told)),
                Ok((_, member, Err(error))) => wrong = Some(format!("{}: {error}", member.name)),
                Err(error) => wrong = Some(error.to_string()),
            }
        }
        running.sort_by_key(|(at, ..)| *at);
        let (sender, moved) = mpsc::channel(MOVED_MAX);
        let mut nodes = Self { told: Vec::new(), moved, stop: CancellationToken::new(), kept: JoinSet::new() };
        for (_, member, node, told) in running {
            nodes.told.push(told);
            nodes.kept.spawn_local(member.keep(node, sender.clone(), nodes.stop.clone()));
        }
        match wrong {
            None => Ok(nodes),
            Some(wrong) => {
                nodes.stop().await;
                Err(Trouble::Failed(wrong))
            }
        }
    }

    /// Stops all at the same time.
    async fn stop(mut self) {
        self.stop.cancel();
        drop(self.moved); // or a node that was just started again would wait to be told
        while self.kept.join_next().await.is_some() {}
    }
}

/// The nodes to start: those that are in the data directory; if there are none, as many as are asked for.
fn members(args: &Up) -> Result<Vec<Member>, Trouble> {
    let found = found_in(&args.data)?;
    let numbers = match (found.as_slice(), args.nodes) {
        ([], asked) => (0..asked.unwrap_or(NODES)).collect(),
        (found, Some(asked)) if found.len() != asked as usize => {
            return Err(Trouble::Usage(format!(
                "{} holds {} nodes, --nodes says {asked}; leave --nodes out, or name another --data directory",
                args.data.display(),
                found.len()
            )));
        }
        _ => found,
    };
    std::fs::create_dir_all(&args.data)
        .map_err(|error| Trouble::Failed(format!("cannot make the data directory {}: {error}", args.data.display())))?;
    let directory = std::path::absolute(&args.data) // what is told holds wherever it is read
        .map_err(|error| Trouble::Failed(format!("where is {}: {error}", args.data.display())))?;
    let member = |number| {
        let name = format!("{NODE_NAME}{number}");
        let data = directory.join(&name);
        Member { name, data, spawn: args.spawn, tuning: args.tuning.clone() }
    };
    Ok(numbers.into_iter().map(member).collect())
}

/// The numbers of the nodes whose data is in a directory, in order.
fn found_in(data: &Path) -> Result<Vec<u32>, Trouble> {
    let entries = match std::fs::read_dir(data) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => {
            return Err(Trouble::Failed(format!("cannot read the data directory {}: {error}", data.display())));
        }
    };
    let mut numbers: Vec<u32> = entries
        .filter_map(Result::ok)
        .filter(|entry| entry.path().is_dir())
        .filter_map(|entry| entry.file_name().to_str()?.strip_prefix(NODE_NAME)?.parse().ok())
        .collect();
    numbers.sort_unstable();
    Ok(numbers)
}

fn say_ready(output: Output, balancer: &Balancer, nodes: &[Told], cluster: ClusterId) -> Result<(), Trouble> {
    let (addr, http) = (balancer.addr(), balancer.http_addr());
    let mut out = Out::new();
    match output {
        Output::Json | Output::Jsonl => out.json_line(&json!({
            "addr": addr.to_string(), "http": http.map(|http| http.to_string()), "cluster": cluster.to_string(),
            "pid": std::process::id(), "nodes": nodes,
        }))?,
        Output::Text => {
            out.line(&format!("cluster {cluster} is ready: {} nodes", nodes.len()))?;
            out.line(&format!("  shkv protocol  {addr}"))?;
            if let Some(http) = http {
                out.line(&format!("  HTTP           http://{http}"))?;
            }
            for node in nodes {
                out.line(&format!("  {:<14} {}, data in {}", node.name, node.addr, node.data.display()))?;
            }
            out.line("")?;
            let option = if addr.port() == 7400 { String::new() } else { format!(" --addr {addr}") };
            out.line(&format!("try: shkv put{option} hello world && shkv get{option} hello"))?;
            out.line("Ctrl-C stops it; the data stays, and the next `shkv up` goes on with it")?;
        }
    }
    out.flush()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command};
    use clap::Parser;

    fn up(data: &Path, more: &[&str]) -> Up {
        let line = ["shkv", "up", "--data", data.to_str().unwrap()].into_iter().chain(more.iter().copied());
        let Command::Up(up) = Cli::try_parse_from(line).unwrap().command else { panic!("not up") };
        up
    }

    #[test]
    fn the_data_directory_decides_about_the_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("new");
        let names = |more: &[&str]| -> Vec<String> {
            members(&up(&data, more)).unwrap().into_iter().map(|member| member.name).collect()
        };
        let three: Vec<String> = vec!["Server0".into(), "Server1".into(), "Server2".into()];
        assert_eq!(names(&[]), three);
        assert_eq!(names(&["--nodes", "1"]), vec!["Server0".to_owned()]);
        for name in &three {
            std::fs::create_dir_all(data.join(name)).unwrap();
        }
        std::fs::create_dir_all(data.join("else")).unwrap();
        assert_eq!(names(&[]), three);
        assert_eq!(names(&["--nodes", "3"]), three);
        let Err(Trouble::Usage(text)) = members(&up(&data, &["--nodes", "5"])) else { panic!("not refused") };
        assert!(text.contains("holds 3 nodes"), "{text}");
    }

    #[test]
    fn more_replicas_than_nodes_are_refused_and_few_nodes_have_fewer() {
        assert!(bootstrap(8, Some(5), 3).is_err());
        assert_eq!(bootstrap(8, None, 1).unwrap().replicas, 1);
        assert_eq!(bootstrap(8, None, 5).unwrap().replicas, 3);
    }
}
