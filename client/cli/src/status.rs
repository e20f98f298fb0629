//! The command that shows the cluster: nodes, shards, who leads them, and how far each replica is.

use crate::args::{Global, Output};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::point::connect_to_cluster;
use crate::sizes;
use serde_json::{Value, json};
use shkv_client::{NodeStatus, ReplicaStatus, StatusDone};
use shkv_proto::ids::{NodeId, ShardId};
use shkv_proto::map::{Map, ShardInfo};

/// `status`
pub async fn run(global: &Global) -> Result<Ending, Trouble> {
    let status = connect_to_cluster(global).await?.status().await?;
    let mut out = Out::new();
    match global.output {
        Output::Text => out.bytes(text(&status).as_bytes())?,
        Output::Json | Output::Jsonl => out.json_line(&as_json(&status))?,
    }
    out.flush()?;
    Ok(Ending::Done)
}

/// The replica of a shard on a node, as the node tells it.
fn replica(status: &StatusDone, node: NodeId, shard: ShardId) -> Option<&ReplicaStatus> {
    let (_, told) = status.nodes.iter().find(|(id, _)| *id == node)?;
    told.as_ref().ok()?.replicas.iter().find(|replica| replica.shard == shard)
}

/// The node that says of itself that it leads a shard; of several the one of the highest term.
fn leader(status: &StatusDone, shard: &ShardInfo) -> Option<(NodeId, u64)> {
    let leads = |node: NodeId| replica(status, node, shard.id).filter(|replica| replica.leads);
    let homes = shard.replicas.iter().map(|home| home.node);
    homes
        .filter_map(|node| Some((leads(node)?, node)))
        .max_by_key(|(replica, _)| replica.term)
        .map(|(r, n)| (n, r.revision))
}

fn name_of(map: Option<&Map>, node: NodeId) -> String {
    map.and_then(|map| map.node(node)).map_or_else(|| node.to_string(), |info| info.name.clone())
}

fn text(status: &StatusDone) -> String {
    let map = status.map.as_ref();
    let mut lines = Vec::new();
    match map {
        Some(map) => lines.push(format!("cluster {}, map of epoch {}", map.cluster, map.epoch)),
        None => lines.push("no map: in no cluster yet".to_owned()),
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<12} {:<18} {:<22} {:>8} {:>8} {:>10} {:>10} {:>11}",
        "NODE", "ID", "ADDRESS", "REPLICAS", "LEADS", "IN MEMORY", "LOG", "DISK FREE"
    ));
    let mut nodes: Vec<_> = status.nodes.iter().collect();
    nodes.sort_by_key(|(id, _)| name_of(map, *id));
    for (id, told) in nodes {
        let addr = map.and_then(|map| map.node(*id)).map_or("", |info| info.addr.as_str());
        let id_text = id.to_string();
        lines.push(match told {
            Ok(node) => format!(
                "{:<12} {id_text:<18} {addr:<22} {:>8} {:>8} {:>10} {:>10} {:>11}{}",
                node.name,
                node.replicas.len(),
                node.replicas.iter().filter(|replica| replica.leads).count(),
                sizes::show(node.table_bytes),
                sizes::show(node.log_bytes),
                sizes::show(node.disk_free_bytes),
                if node.disk_full { "  FULL: puts are refused" } else { "" },
            ),
            Err(why) => format!("{:<12} {id_text:<18} {addr:<22} DOWN: {why}", name_of(map, *id)),
        });
    }
    lines.push(String::new());
    lines.push(format!(
        "{:<6} {:<12} {:<12} {:>12}  REPLICAS (behind the leader)",
        "SHARD", "KEYSPACE", "LEADER", "REVISION"
    ));
    for shard in map.map_or(&[][..], |map| &map.shards) {
        lines.push(shard_line(status, map, shard));
    }
    lines.push(String::new());
    lines.join("\n")
}

fn shard_line(status: &StatusDone, map: Option<&Map>, shard: &ShardInfo) -> String {
    let keyspaces = map.map_or(&[][..], |map| &map.keyspaces);
    let keyspace = keyspaces.iter().find(|info| info.id == shard.keyspace).map_or("(system)", |info| &info.name);
    let leader = leader(status, shard);
    let newest = leader.map(|(_, revision)| revision);
    let replicas: Vec<String> = shard
        .replicas
        .iter()
        .map(|home| {
            let name = name_of(map, home.node);
            match (replica(status, home.node, shard.id), newest) {
                (Some(replica), Some(newest)) if newest > replica.revision => {
                    format!("{name} (-{})", newest - replica.revision)
                }
                (Some(_), _) => name,
                (None, _) => format!("{name} (down)"),
            }
        })
        .collect();
    format!(
        "{:<6} {keyspace:<12} {:<12} {:>12}  {}",
        shard.id.0,
        leader.map_or("none".to_owned(), |(node, _)| name_of(map, node)),
        newest.map_or("-".to_owned(), |revision| revision.to_string()),
        replicas.join(", ")
    )
}

fn as_json(status: &StatusDone) -> Value {
    let map = status.map.as_ref();
    let nodes: Vec<Value> = status
        .nodes
        .iter()
        .map(|(id, told)| {
            let mut node = match told {
                Ok(node) => node_json(node),
                Err(why) => json!({"up": false, "name": name_of(map, *id), "error": why}),
            };
            node["id"] = json!(id.to_string());
            node["addr"] = json!(map.and_then(|map| map.node(*id)).map(|info| &info.addr));
            node
        })
        .collect();
    let shards: Vec<Value> = map
        .map_or(&[][..], |map| &map.shards)
        .iter()
        .map(|shard| {
            let leader = leader(status, shard);
            json!({
                "id": shard.id.0,
                "keyspace": shard.keyspace.0,
                "leader": leader.map(|(node, _)| node.to_string()),
                "revision": leader.map(|(_, revision)| revision),
                "replicas": shard.replicas.iter()
                    .map(|home| json!({"id": home.id.0, "node": home.node.to_string()})).collect::<Vec<_>>(),
            })
        })
        .collect();
    let keyspaces: Vec<Value> = map
        .map_or(&[][..], |map| &map.keyspaces)
        .iter()
        .map(|keyspace| json!({"id": keyspace.id.0, "name": keyspace.name}))
        .collect();
    json!({
        "cluster": map.map(|map| map.cluster.to_string()),
        "epoch": map.map(|map| map.epoch.0),
        "answered_by": {"pid": status.process.0, "cpu_us": status.process.1},
        "keyspaces": keyspaces,
        "nodes": nodes,
        "shards": shards,
    })
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
