//! What the cluster looks like: `/v1/nodes`, `/v1/shards`, `/v1/status`.

use crate::http::Front;
use crate::http::answer::json_answer;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde_json::{Value, json};
use shkv_proto::Epoch;
use shkv_proto::map::{NodeState, Part, ReplicaRole};
use shkv_proto::message::NodeHealth;

/// The routes.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
        .route("/v1/nodes", get(|State(front): State<Front>| async move { answer(&json!({"nodes": nodes(&front)})) }))
        .route(
            "/v1/shards",
            get(|State(front): State<Front>| async move { answer(&json!({"shards": shards(&front)})) }),
        )
        .route("/v1/status", get(status))
}

fn answer(body: &Value) -> Response {
    json_answer(StatusCode::OK, body)
}

fn nodes(front: &Front) -> Vec<Value> {
    let (routes, cluster) = (front.store.routes(), front.store.cluster());
    let members = front.pool.members(routes.map());
    let node = |node: &shkv_proto::map::NodeInfo| {
        let health = match cluster.health(|health, now| health.of(node.id, now)) {
            NodeHealth::Up => "up",
            NodeHealth::Suspect => "suspect",
            NodeHealth::Down => "down",
        };
        let state = match node.state {
            NodeState::Joining => "joining",
            NodeState::Up => "up",
            NodeState::Draining => "draining",
            NodeState::Leaving => "leaving",
            NodeState::Replaced(_) => "replaced",
        };
        let kept = routes.map().shards.iter().filter(|shard| shard.replica_on(node.id).is_some());
        json!({
            "id": node.id.to_string(), "name": node.name, "addr": node.addr, "addr_outside": node.addr_outside,
            "domain": node.domain, "capacity": node.capacity, "state": state, "health": health,
            "number": members.iter().find(|member| member.id == node.id).map(|member| member.number),
            "shards": kept.map(|shard| shard.id.0).collect::<Vec<_>>(),
            "http": front.doors.addr(&node.name).map(|addr| addr.to_string()),
        })
    };
    routes.map().nodes.iter().map(node).collect()
}

fn shards(front: &Front) -> Vec<Value> {
    let routes = front.store.routes();
    let map = routes.map();
    let shard = |shard: &shkv_proto::map::ShardInfo| {
        let keyspace = map.keyspaces.iter().find(|keyspace| keyspace.id == shard.keyspace);
        let part = match &shard.part {
            Part::Hash { low, high } => json!({"hash": {"low": low.to_string(), "high": high.to_string()}}),
            Part::Range { start, end } => json!({"range": {
                "start_b64": STANDARD.encode(start), "end_b64": end.as_ref().map(|end| STANDARD.encode(end)),
            }}),
        };
        let replica = |replica: &shkv_proto::map::ReplicaInfo| {
            let role = match replica.role {
                ReplicaRole::Voter => "voter",
                ReplicaRole::Learner => "learner",
                ReplicaRole::Leaving => "leaving",
            };
            json!({"id": replica.id.0, "node": map.node(replica.node).map(|node| &node.name), "role": role})
        };
        let leader = routes.leader(shard.id).and_then(|node| map.node(node)).map(|node| &node.name);
        json!({
            "id": shard.id.0, "keyspace": keyspace.map_or("system", |keyspace| &keyspace.name), "part": part,
            "leader": leader, "replicas": shard.replicas.iter().map(replica).collect::<Vec<_>>(),
        })
    };
    map.shards.iter().map(shard).collect()
}

async fn status(State(front): State<Front>) -> Response {
    let (routes, cluster) = (front.store.routes(), front.store.cluster());
    let map = routes.map();
    let keyspace = |keyspace: &shkv_proto::map::KeyspaceInfo| {
        let shards = map.shards_of(keyspace.id).count();
        json!({"name": keyspace.name, "replicas": keyspace.replicas, "shards": shards})
    };
    let lacks = cluster.lacks();
    answer(&json!({
        "cluster": cluster.id.to_string(),
        "epoch": map.epoch.0,
        "ready": map.epoch != Epoch::NONE && lacks.is_ready(),
        "lacks": lacks,
        "trouble": cluster.trouble(),
        "controller": cluster.controller().map(|who| who.addr),
        "node": front.this.as_deref(),
        "keyspaces": map.keyspaces.iter().map(keyspace).collect::<Vec<_>>(),
        "nodes": map.nodes.len(),
        "shards": map.shards.len(),
    }))
}
