//! The commands that show the cluster: nodes, shards, who leads them, how far each replica is, and what is under way.

use crate::args::{Global, Output};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::point::connect_to_cluster;
use crate::sizes;
use serde_json::{Value, json};
use shkv_client::{NodeStatus, ReplicaStatus, StatusDone};
use shkv_proto::ids::{NodeId, ShardId};
use shkv_proto::map::{Map, NodeInfo, NodeState, ReplicaInfo, ReplicaRole, ShardInfo};
use shkv_proto::message::{Control, Event, NodeHealth};

/// What is to be shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum What {
    /// Everything.
    All,
    /// The nodes.
    Nodes,
    /// The shards.
    Shards,
}

/// `status`, `nodes`, `shards`
pub async fn run(global: &Global, what: What) -> Result<Ending, Trouble> {
    let status = connect_to_cluster(global).await?.status().await?;
    let mut out = Out::new();
    match global.output {
        Output::Text => out.bytes(text(&status, what).as_bytes())?,
        Output::Json | Output::Jsonl => out.json_line(&match what {
            What::All => as_json(&status),
            What::Nodes => json!({ "nodes": nodes_json(&status) }),
            What::Shards => json!({ "shards": shards_json(&status) }),
        })?,
    }
    out.flush()?;
    Ok(Ending::Done)
}

/// The replica of a shard on a node, as the node tells it.
fn replica(status: &StatusDone, node: NodeId, shard: ShardId) -> Option<&ReplicaStatus> {
    let (_, told) = status.nodes.iter().find(|(id, _)| *id == node)?;
    told.as_ref().ok()?.replicas.iter().find(|replica| replica.shard == shard)
}

/// The node that says of itself that it leads a shard, and its replica; of several the one of the highest term.
fn leader<'a>(status: &'a StatusDone, shard: &ShardInfo) -> Option<(NodeId, &'a ReplicaStatus)> {
    let leads = |node: NodeId| replica(status, node, shard.id).filter(|replica| replica.leads);
    let homes = shard.replicas.iter().map(|home| home.node);
    homes.filter_map(|node| Some((node, leads(node)?))).max_by_key(|(_, replica)| replica.term)
}

/// How many log entries a replica is behind its leader, as far as the leader knows.
fn behind(status: &StatusDone, shard: &ShardInfo, home: &ReplicaInfo) -> Option<u64> {
    let (_, led) = leader(status, shard)?;
    let matched = led.group.as_ref()?.matched.iter().find(|(id, _)| *id == home.id)?.1;
    Some(led.committed.saturating_sub(matched))
}

fn name_of(map: Option<&Map>, node: NodeId) -> String {
    map.and_then(|map| map.node(node)).map_or_else(|| node.to_string(), |info| info.name.clone())
}

/// How a node stands: what is to become of it, and whether it is heard.
fn state_of(status: &StatusDone, node: NodeId) -> &'static str {
    let info = status.map.as_ref().and_then(|map| map.node(node));
    let health = status.control.iter().flat_map(|control| &control.health).find(|(id, _)| *id == node);
    match (info.map(|info| info.state), health.map(|(_, health)| health)) {
        (None, _) => "not a member",
        (Some(NodeState::Replaced(_)), _) => "replaced",
        (_, Some(NodeHealth::Down)) => "down",
        (_, Some(NodeHealth::Suspect)) => "suspect",
        (Some(NodeState::Joining), _) => "joining",
        (Some(NodeState::Draining), _) => "draining",
        (Some(NodeState::Leaving), _) => "leaving",
        (Some(NodeState::Up), _) => "up",
    }
}

fn role_name(role: ReplicaRole) -> &'static str {
    match role {
        ReplicaRole::Voter => "voter",
        ReplicaRole::Learner => "learner",
        ReplicaRole::Leaving => "leaving",
    }
}

/// Replicas that are on their way.
fn moves(status: &StatusDone) -> Vec<(&ShardInfo, Vec<&ReplicaInfo>)> {
    let shards = status.map.as_ref().map_or(&[][..], |map| &map.shards);
    let of_shard = |shard| (shard, on_their_way(shard));
    shards.iter().map(of_shard).filter(|(_, replicas)| !replicas.is_empty()).collect()
}

fn on_their_way(shard: &ShardInfo) -> Vec<&ReplicaInfo> {
    shard.replicas.iter().filter(|replica| replica.role != ReplicaRole::Voter).collect()
}

fn text(status: &StatusDone, what: What) -> String {
    let map = status.map.as_ref();
    let mut lines = Vec::new();
    if what == What::All {
        match map {
            Some(map) => lines.push(format!("cluster {}, map of epoch {}", map.cluster, map.epoch)),
            None => lines.push("no map: in no cluster yet".to_owned()),
        }
        lines.extend(status.control.as_ref().map(controller_line));
        lines.push(String::new());
    }
    if what != What::Shards {
        node_lines(status, &mut lines);
    }
    if what == What::All {
        lines.push(String::new());
    }
    if what != What::Nodes {
        lines.push(format!(
            "{:<6} {:<12} {:<16} {:>12}  REPLICAS (log entries behind the leader)",
            "SHARD", "KEYSPACE", "LEADER", "REVISION"
        ));
        lines.extend(map.map_or(&[][..], |map| &map.shards).iter().map(|shard| shard_line(status, map, shard)));
    }
    if what == What::All {
        under_way(status, &mut lines);
    }
    lines.push(String::new());
    lines.join("\n")
}

fn controller_line(control: &Control) -> String {
    let starts = match control.provisioner.as_str() {
        "none" => "this balancer starts no nodes".to_owned(),
        kind => format!("this balancer starts nodes by {kind}"),
    };
    match &control.controller {
        Some(holder) if holder.balancer == control.balancer => {
            format!("controlled by this balancer (term {}); {starts}", holder.term)
        }
        Some(holder) => format!("controlled by the balancer at {} (term {}); {starts}", holder.addr, holder.term),
        None => format!("nobody controls it at the moment; {starts}"),
    }
}

fn node_lines(status: &StatusDone, lines: &mut Vec<String>) {
    let map = status.map.as_ref();
    lines.push(format!(
        "{:<16} {:<12} {:<18} {:<22} {:>8} {:>6} {:>10} {:>10} {:>11}",
        "NODE", "STATE", "ID", "ADDRESS", "REPLICAS", "LEADS", "IN MEMORY", "LOG", "DISK FREE"
    ));
    let mut nodes: Vec<_> = status.nodes.iter().collect();
    nodes.sort_by_key(|(id, _)| name_of(map, *id));
    for (id, told) in nodes {
        let addr = map.and_then(|map| map.node(*id)).map_or("", |info| info.addr.as_str());
        let (id_text, state) = (id.to_string(), state_of(status, *id));
        lines.push(match told {
            Ok(node) => format!(
                "{:<16} {state:<12} {id_text:<18} {addr:<22} {:>8} {:>6} {:>10} {:>10} {:>11}{}",
                node.name,
                node.replicas.len(),
                node.replicas.iter().filter(|replica| replica.leads).count(),
                sizes::show(node.table_bytes),
                sizes::show(node.log_bytes),
                sizes::show(node.disk_free_bytes),
                if node.disk_full { "  FULL: puts are refused" } else { "" },
            ),
            Err(why) => format!("{:<16} {state:<12} {id_text:<18} {addr:<22} {why}", name_of(map, *id)),
        });
    }
}

fn shard_line(status: &StatusDone, map: Option<&Map>, shard: &ShardInfo) -> String {
    let keyspaces = map.map_or(&[][..], |map| &map.keyspaces);
    let keyspace = keyspaces.iter().find(|info| info.id == shard.keyspace).map_or("(system)", |info| &info.name);
    let leader = leader(status, shard);
    let replicas: Vec<String> = shard
        .replicas
        .iter()
        .map(|home| {
            let name = name_of(map, home.node);
            let role =
                if home.role == ReplicaRole::Voter { String::new() } else { format!(" {}", role_name(home.role)) };
            match (replica(status, home.node, shard.id), behind(status, shard, home)) {
                (Some(_), Some(behind)) if behind > 0 => format!("{name}{role} (-{behind})"),
                (Some(_), _) => format!("{name}{role}"),
                (None, _) => format!("{name}{role} (not there)"),
            }
        })
        .collect();
    format!(
        "{:<6} {keyspace:<12} {:<16} {:>12}  {}",
        shard.id.0,
        leader.map_or("none".to_owned(), |(node, _)| name_of(map, node)),
        leader.map_or("-".to_owned(), |(_, replica)| replica.revision.to_string()),
        replicas.join(", ")
    )
}

/// What is being done: replicas on their way, nodes that are wanted, and the last things that the controller did.
fn under_way(status: &StatusDone, lines: &mut Vec<String>) {
    let moves = moves(status);
    if !moves.is_empty() {
        lines.extend([String::new(), format!("UNDER WAY: {} shards change their replicas", moves.len())]);
    }
    let Some(control) = &status.control else { return };
    for (name, error) in &control.wanted {
        let why = error.as_ref().map_or("being started".to_owned(), |error| format!("not started yet: {error}"));
        lines.extend([String::new(), format!("WANTED: {name} ({why})")]);
    }
    if !control.events.is_empty() {
        lines.extend([String::new(), "LAST".to_owned()]);
        let last = control.events.len().saturating_sub(EVENTS_SHOWN);
        lines.extend(control.events[last..].iter().map(|event| format!("  {}  {}", time_of(event), event.text)));
    }
}

/// Events that are shown to people; programs get all.
const EVENTS_SHOWN: usize = 10;

fn time_of(event: &Event) -> String {
    let at = std::time::UNIX_EPOCH + std::time::Duration::from_secs(event.at_unix_s);
    humantime::format_rfc3339_seconds(at).to_string()
}

fn as_json(status: &StatusDone) -> Value {
    let map = status.map.as_ref();
    let keyspaces: Vec<Value> = map
        .map_or(&[][..], |map| &map.keyspaces)
        .iter()
        .map(|keyspace| json!({"id": keyspace.id.0, "name": keyspace.name, "replicas": keyspace.replicas}))
        .collect();
    let moves: Vec<Value> = moves(status)
        .into_iter()
        .flat_map(|(shard, replicas)| replicas.into_iter().map(move |home| (shard, home)))
        .map(|(shard, home)| {
            json!({"shard": shard.id.0, "replica": home.id.0, "node": home.node.to_string(),
                   "name": name_of(map, home.node), "role": role_name(home.role), "behind": behind(status, shard, home)})
        })
        .collect();
    json!({
        "cluster": map.map(|map| map.cluster.to_string()),
        "epoch": map.map(|map| map.epoch.0),
        "answered_by": {"pid": status.process.0, "cpu_us": status.process.1},
        "keyspaces": keyspaces,
        "nodes": nodes_json(status),
        "shards": shards_json(status),
        "moves": moves,
        "control": status.control.as_ref().map(control_json),
    })
}

fn control_json(control: &Control) -> Value {
    let gone = |gone: &shkv_proto::message::Gone| {
        json!({"id": gone.id.to_string(), "name": gone.name, "instance": gone.instance, "reason": gone.reason,
               "at_unix_s": gone.at_unix_s})
    };
    json!({
        "balancer": format!("{:016x}", control.balancer),
        "provisioner": control.provisioner,
        "controller": control.controller.as_ref().map(|holder| {
            json!({"balancer": format!("{:016x}", holder.balancer), "addr": holder.addr, "term": holder.term,
                   "is_this": holder.balancer == control.balancer})
        }),
        "wanted": control.wanted.iter().map(|(name, error)| json!({"name": name, "error": error})).collect::<Vec<_>>(),
        "gone": control.gone.iter().map(gone).collect::<Vec<_>>(),
        "events": control.events.iter().map(|event| json!({"at_unix_s": event.at_unix_s, "text": event.text}))
            .collect::<Vec<_>>(),
    })
}

fn nodes_json(status: &StatusDone) -> Vec<Value> {
    let map = status.map.as_ref();
    let node = |(id, told): &(NodeId, Result<NodeStatus, String>)| {
        let mut node = match told {
            Ok(node) => node_json(node),
            Err(why) => json!({"up": false, "name": name_of(map, *id), "error": why}),
        };
        node["id"] = json!(id.to_string());
        node["state"] = json!(state_of(status, *id));
        let info: Option<&NodeInfo> = map.and_then(|map| map.node(*id));
        node["addr"] = json!(info.map(|info| &info.addr));
        node["addr_outside"] = json!(info.and_then(|info| info.addr_outside.as_ref()));
        node["domain"] = json!(info.map(|info| &info.domain));
        node["capacity"] = json!(info.map(|info| info.capacity));
        node["instance"] = json!(info.map(|info| &info.instance));
        node
    };
    status.nodes.iter().map(node).collect()
}

fn shards_json(status: &StatusDone) -> Vec<Value> {
    let shard = |shard: &ShardInfo| {
        let leader = leader(status, shard);
        let home = |home: &ReplicaInfo| {
            json!({"id": home.id.0, "node": home.node.to_string(), "role": role_name(home.role),
                   "behind": behind(status, shard, home)})
        };
        json!({
            "id": shard.id.0,
            "keyspace": shard.keyspace.0,
            "leader": leader.map(|(node, _)| node.to_string()),
            "revision": leader.map(|(_, replica)| replica.revision),
            "replicas": shard.replicas.iter().map(home).collect::<Vec<_>>(),
            "pinned": shard.pinned,
        })
    };
    status.map.as_ref().map_or(&[][..], |map| &map.shards).iter().map(shard).collect()
}

fn node_json(node: &NodeStatus) -> Value {
    let replicas: Vec<Value> = node
        .replicas
        .iter()
        .map(|replica| {
            json!({
                "shard": replica.shard.0, "id": replica.replica.0, "leads": replica.leads,
                "leader": replica.leader.map(|leader| leader.0), "term": replica.term,
                "committed": replica.committed, "applied": replica.applied, "flushed": replica.flushed,
                "log_first": replica.log_first, "log_last": replica.log_last, "revision": replica.revision,
                "snapshots_installed": replica.snapshots_installed,
            })
        })
        .collect();
    json!({
        "up": true, "name": node.name, "pid": node.process, "cpu_us": node.cpu_us, "epoch": node.epoch.0,
        "table_bytes": node.table_bytes, "log_bytes": node.log_bytes, "disk_free_bytes": node.disk_free_bytes,
        "disk_full": node.disk_full, "log_syncs": node.log_syncs, "replicas": replicas,
    })
}
