//! The command that runs a whole cluster on this machine: nodes, and a balancer in this process.

#![expect(clippy::disallowed_methods, reason = "a shell: waits for listeners")]

use crate::args::{Global, Output, Up};
use crate::local::{Found, Local, found_in};
use crate::members::Told;
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::roles::{READY_TIME_MAX, Signals, bootstrap, http_limits};
use serde_json::json;
use shkv_balancer::{Balancer, BalancerConfig};
use shkv_proto::ClusterId;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How a node is called when it is not named, with a number behind.
const NODE_NAME: &str = "Server";
/// How long the nodes' HTTP listeners may take to open.
const NODE_HTTP_TIME_MAX: Duration = Duration::from_secs(5);
/// Pause between two looks at that.
const NODE_HTTP_LOOK: Duration = Duration::from_millis(5);
/// Nodes when there is no data yet and none are named.
const NODES: u32 = 3;

/// `up`
pub async fn run(global: &Global, args: Up) -> Result<Ending, Trouble> {
    let mut signals = Signals::new()?;
    let members = members(&args)?;
    let data = std::path::absolute(&args.data) // what is told holds wherever it is read
        .map_err(|error| Trouble::Failed(format!("where is {}: {error}", args.data.display())))?;
    std::fs::create_dir_all(&data)
        .map_err(|error| Trouble::Failed(format!("cannot make the data directory {}: {error}", data.display())))?;
    let tuning = args.tuning.shared_by(members.len());
    let (local, mut moved) = Local::new(data, args.spawn, tuning, false);
    let local = Arc::new(local);
    let told = tokio::select! { // what is dropped half started is found again at the next start
        told = start_all(&local, members) => told,
        () = signals.next() => return Ok(Ending::Done),
    };
    let ended = match told {
        Ok(told) => balance(global, &args, &local, &told, &mut moved, &mut signals).await,
        Err(error) => Err(error),
    };
    drop(moved); // or a node that was just started again would wait to be told
    local.stop().await;
    ended
}

/// Starts all at the same time, and tells of them in their order.
async fn start_all(local: &Arc<Local>, members: Vec<Found>) -> Result<Vec<Told>, Trouble> {
    let mut starting = JoinSet::new();
    for (at, member) in members.into_iter().enumerate() {
        let local = local.clone();
        starting.spawn(async move { (at, local.run(&member.instance, &member.name, &[]).await) });
    }
    let mut told = Vec::new();
    let mut wrong = None;
    while let Some(joined) = starting.join_next().await {
        match joined {
            Ok((at, Ok(node))) => told.push((at, node)),
            Ok((_, Err(error))) => wrong = Some(error),
            Err(error) => wrong = Some(error.to_string()),
        }
    }
    told.sort_by_key(|(at, _)| *at);
    wrong.map_or_else(|| Ok(told.into_iter().map(|(_, node)| node).collect()), |wrong| Err(Trouble::Failed(wrong)))
}

/// Runs the balancer over the nodes, until a signal.
async fn balance(
    global: &Global,
    args: &Up,
    local: &Arc<Local>,
    told: &[Told],
    moved: &mut mpsc::Receiver<Told>,
    signals: &mut Signals,
) -> Result<Ending, Trouble> {
    let config = BalancerConfig {
        http: Some(args.http.clone()),
        node_http: args.node_http.clone(),
        dialects: args.dialects.chosen(),
        http_limits: http_limits(),
        nodes: told.iter().map(|told| told.addr.clone()).collect(),
        bootstrap: Some(bootstrap(&args.layout)),
        replace_after: args.healing.replace_after,
        provisioner: local.clone(),
        ..BalancerConfig::new(&args.listen)
    };
    let balancer = Balancer::start(config).await.map_err(|error| Trouble::Failed(error.to_string()))?;
    let ended = serve(global, args, &balancer, told, moved, signals).await;
    balancer.stop().await; // before the nodes: what it has in hand still needs them
    ended
}

/// Waits until the cluster is ready, says so, and tells the balancer of nodes that were started again, until a signal.
async fn serve(
    global: &Global,
    args: &Up,
    balancer: &Balancer,
    told: &[Told],
    moved: &mut mpsc::Receiver<Told>,
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
                let told = with_http(balancer, told, args.node_http.is_some()).await?;
                say_ready(global.output, balancer, &told, cluster)?;
            }
            told = moved.recv() => {
                if let Some(told) = told && let Ok(node) = told.node() {
                    balancer.node_moved(node, told.addr);
                }
            }
            () = signals.next() => return Ok(Ending::Done),
        }
    }
}

/// The nodes with where their own HTTP listeners are, once those are open.
async fn with_http(balancer: &Balancer, told: &[Told], wanted: bool) -> Result<Vec<Told>, Trouble> {
    let mut all = told.to_vec();
    if !wanted {
        return Ok(all);
    }
    let until = Instant::now() + NODE_HTTP_TIME_MAX;
    for node in &mut all {
        node.http = loop {
            match balancer.node_http_addr(&node.name) {
                Some(addr) => break Some(addr.to_string()),
                None if Instant::now() >= until => {
                    let text =
                        format!("no HTTP listener for {}: see the log, and choose another --node-http", node.name);
                    return Err(Trouble::Failed(text));
                }
                None => tokio::time::sleep(NODE_HTTP_LOOK).await,
            }
        };
    }
    Ok(all)
}

/// The nodes to start: those that are in the data directory; if there are none, as many as are asked for.
fn members(args: &Up) -> Result<Vec<Found>, Trouble> {
    let mut found = found_in(&args.data).map_err(Trouble::Failed)?;
    found.retain(|found| match &found.retired {
        Some(why) => {
            tracing::warn!(instance = found.instance, why, "a node that is of the cluster no more is not started");
            false
        }
        None => true,
    });
    match args.nodes {
        Some(asked) if !found.is_empty() && found.len() != asked as usize => {
            return Err(Trouble::Usage(format!(
                "{} holds {} nodes, --nodes says {asked}; leave --nodes out, or name another --data directory",
                args.data.display(),
                found.len()
            )));
        }
        asked if found.is_empty() => found.extend((0..asked.unwrap_or(NODES)).map(|number| {
            let name = format!("{NODE_NAME}{number}");
            Found { instance: name.clone(), name, cluster: None, retired: None, running: false }
        })),
        _ => {}
    }
    if let Some(replicas) = args.layout.replicas.filter(|replicas| *replicas as usize > found.len()) {
        let text = format!("{replicas} replicas need as many nodes, there are {}", found.len());
        return Err(Trouble::Usage(text));
    }
    Ok(found)
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
                let http = node.http.as_ref().map_or(String::new(), |http| format!(", HTTP at http://{http}"));
                out.line(&format!("  {:<14} {}{http}, data in {}", node.name, node.addr, node.data.display()))?;
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
    use std::path::Path;

    fn up(data: &Path, more: &[&str]) -> Up {
        let line = ["shkv", "up", "--data", data.to_str().unwrap()].into_iter().chain(more.iter().copied());
        let Command::Up(up) = Cli::try_parse_from(line).unwrap().command else { panic!("not up") };
        up
    }

    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn the_data_directory_decides_about_the_nodes() {
        let directory = tempfile::tempdir().unwrap();
        let data = directory.path().join("new");
        let names = |more: &[&str]| -> Vec<String> {
            members(&up(&data, more)).unwrap().into_iter().map(|member| member.name).collect()
        };
        let three: Vec<String> = vec!["Server0".into(), "Server1".into(), "Server2".into()];
        assert_eq!(names(&[]), three);
        assert_eq!(names(&["--nodes", "1"]), vec!["Server0".to_owned()]);
        let (local, _moved) = Local::new(data.clone(), crate::args::Spawn::Embedded, Default::default(), false);
        for name in &three {
            local.run(name, name, &[]).await.unwrap();
        }
        local.stop().await;
        std::fs::create_dir_all(data.join("else")).unwrap();
        assert_eq!(names(&[]), three);
        assert_eq!(names(&["--nodes", "3"]), three);
        let Err(Trouble::Usage(text)) = members(&up(&data, &["--nodes", "5"])) else { panic!("not refused") };
        assert!(text.contains("holds 3 nodes"), "{text}");
    }

    #[test]
    fn more_replicas_than_nodes_are_refused() {
        let directory = tempfile::tempdir().unwrap();
        let refused = members(&up(&directory.path().join("new"), &["--replicas", "5"]));
        assert!(matches!(refused, Err(Trouble::Usage(text)) if text.contains("there are 3")));
    }
}
