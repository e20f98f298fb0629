//! The commands of an operator: add, rm, drain, transfer, ping. A wish is written into the map by one call; then its
//! coming true is watched, with progress on standard error.

#![expect(clippy::disallowed_methods, reason = "a shell: waits, and tells the time")]

use crate::args::{Add, Drain, Global, Output, Rm, Transfer};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::point::connect_to_cluster;
use serde_json::json;
use shkv_client::{Client, Error, StatusDone};
use shkv_proto::ids::{NodeId, ShardId};
use shkv_proto::map::{Map, NodeInfo, NodeState};
use shkv_proto::message::{Admin, NodeHealth};
use std::time::Duration;
use tokio::time::Instant;

/// How often progress is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(250);

/// `add [--n N] [NAME…]`
pub async fn add(global: &Global, args: Add) -> Result<Ending, Trouble> {
    let client = connect_to_cluster(global).await?;
    let count = args.n.unwrap_or((args.names.len() as u32).max(1));
    let done = client.admin(&Admin::AddNodes { count, names: args.names }).await?;
    let missing = |status: &StatusDone| -> Vec<String> {
        let is_up = |name: &str| nodes_named(status, name).any(|node| is_up(status, node));
        let why = |name: &String| {
            let wanted = status.control.iter().flat_map(|control| &control.wanted).find(|(wanted, _)| wanted == name);
            wanted.and_then(|(_, error)| error.clone()).map_or(name.clone(), |error| format!("{name} ({error})"))
        };
        done.names.iter().filter(|name| !is_up(name)).map(why).collect()
    };
    watch(global, &client, args.wait.wait, "waiting for", missing).await?;
    say(global, &format!("added {}", done.names.join(", ")), &done.names)
}

/// `rm [--n N] [NAME…]`
pub async fn rm(global: &Global, args: Rm) -> Result<Ending, Trouble> {
    let client = connect_to_cluster(global).await?;
    let count = args.n.unwrap_or(args.names.len() as u32);
    let done = client.admin(&Admin::RemoveNodes { count, names: args.names }).await?;
    let left = |status: &StatusDone| -> Vec<String> {
        let leaving = |name: &String| {
            let node = nodes_named(status, name).find(|node| node.state == NodeState::Leaving)?;
            Some(format!("{name} ({} replicas left)", replicas_on(status, node.id)))
        };
        done.names.iter().filter_map(leaving).collect()
    };
    watch(global, &client, args.wait.wait, "moving off", left).await?;
    say(global, &format!("removed {}", done.names.join(", ")), &done.names)
}

/// `drain NODE [--undo]`
pub async fn drain(global: &Global, args: Drain) -> Result<Ending, Trouble> {
    let client = connect_to_cluster(global).await?;
    let done = client.admin(&Admin::Drain { node: args.node, drain: !args.undo }).await?;
    let left = |status: &StatusDone| -> Vec<String> {
        let draining = |name: &String| {
            let node = nodes_named(status, name).find(|node| node.state == NodeState::Draining)?;
            let count = replicas_on(status, node.id);
            (count > 0).then(|| format!("{name} ({count} replicas left)"))
        };
        done.names.iter().filter_map(draining).collect()
    };
    watch(global, &client, args.wait.wait, "moving off", left).await?;
    let what = if args.undo { "is used again:" } else { "keeps nothing any more:" };
    say(global, &format!("{what} {}", done.names.join(", ")), &done.names)
}

/// `transfer SHARD NODE`
pub async fn transfer(global: &Global, args: Transfer) -> Result<Ending, Trouble> {
    let client = connect_to_cluster(global).await?;
    let wish = Admin::Transfer { shard: ShardId(args.shard), node: args.node };
    let done = client.admin(&wish).await?;
    say(global, &format!("shard {} is led by {}", args.shard, done.names.join(", ")), &done.names)
}

/// `ping`: whoever answers says who it is. For health checks; it needs neither a map nor a quorum.
pub async fn ping(global: &Global) -> Result<Ending, Trouble> {
    let mut wrong = Vec::new();
    for addr in &global.addr {
        match tokio::time::timeout(global.timeout, shkv_client::ping(addr)).await {
            Ok(Ok(welcome)) => {
                let cluster = welcome.cluster.map_or("none".to_owned(), |cluster| cluster.to_string());
                let mut out = Out::new();
                match global.output {
                    Output::Text => out.line(&format!("{} at {addr} is well, cluster {cluster}", welcome.name))?,
                    Output::Json | Output::Jsonl => out.json_line(&json!({
                        "addr": addr, "name": welcome.name, "cluster": welcome.cluster.map(|cluster| cluster.to_string()),
                    }))?,
                }
                out.flush()?;
                return Ok(Ending::Done);
            }
            Ok(Err(error)) => wrong.push(format!("{addr}: {error}")),
            Err(_) => wrong.push(format!("{addr}: no answer within {:?}", global.timeout)),
        }
    }
    Err(Trouble::Client(Error::Unavailable { text: wrong.join("; ") }))
}

/// Looks until nothing is left to wait for. What is left when the time is up goes on without being watched.
async fn watch(
    global: &Global,
    client: &Client,
    within: Duration,
    what: &str,
    left: impl Fn(&StatusDone) -> Vec<String>,
) -> Result<(), Trouble> {
    if within.is_zero() {
        return Ok(());
    }
    let deadline = Instant::now() + within;
    let mut told = String::new();
    loop {
        let text = match client.status().await {
            Ok(status) => match left(&status) {
                left if left.is_empty() => return Ok(()),
                left => format!("{what} {}", left.join(", ")),
            },
            Err(error) => format!("{what}: {error}"), // nodes come and go now; the next look may succeed
        };
        if text != told && global.output == Output::Text {
            eprintln!("{text}");
        }
        told = text;
        if Instant::now() >= deadline {
            let text = format!("not done after {within:?}, and it goes on: {told}; `shkv status` tells how far it is");
            return Err(Trouble::Stopped(text));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn nodes_named<'a>(status: &'a StatusDone, name: &'a str) -> impl Iterator<Item = &'a NodeInfo> {
    let nodes = status.map.iter().flat_map(|map: &Map| &map.nodes);
    nodes.filter(move |node| node.name == name || node.id.to_string() == name)
}

fn is_up(status: &StatusDone, node: &NodeInfo) -> bool {
    let mut health = status.control.iter().flat_map(|control| &control.health);
    node.state == NodeState::Up && health.any(|(id, health)| *id == node.id && *health == NodeHealth::Up)
}

fn replicas_on(status: &StatusDone, node: NodeId) -> usize {
    let shards = status.map.iter().flat_map(|map| &map.shards);
    shards.filter(|shard| shard.replica_on(node).is_some()).count()
}

fn say(global: &Global, text: &str, names: &[String]) -> Result<Ending, Trouble> {
    let mut out = Out::new();
    match global.output {
        Output::Text => out.line(text)?,
        Output::Json | Output::Jsonl => out.json_line(&json!({ "nodes": names }))?,
    }
    out.flush()?;
    Ok(Ending::Done)
}
