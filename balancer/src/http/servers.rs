//! The sharded database's servers and shards: `/init`, `/status`, `/add`, `/rm`. Servers are nodes of the cluster, started by
//! name through its provisioner; shards are those of a keyspace, each pinned to the servers that are to keep it.

#![expect(clippy::disallowed_methods, reason = "a shell: waits for nodes and replicas")]

use crate::http::Front;
use crate::http::answer::json_answer;
use crate::http::asked::Raw;
use crate::http::catalog::{self, Catalog};
use crate::http::database::{Answered, Trouble, body_of, schema_in, schema_of};
use crate::http::store::{Ask, Store};
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use rand::RngExt;
use rand::seq::SliceRandom;
use serde_json::{Map, Value, json};
use shkv_proto::map::{NodeInfo, NodeState, Part, ReplicaRole, ShardInfo};
use shkv_proto::message::{Admin, Consistency, Failure, NewShard, NodeHealth, RefusalCode, Scan};
use shkv_proto::rows::{RangeShard, Shards, key_of};
use shkv_proto::{ShardId, world};
use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;
use tokio::sync::Mutex;
use tokio::time::Instant;

/// Copies of the ranges that no shard has, and of a shard that is placed at random.
const REPLICAS: u32 = 3;
/// How long a change of the servers may take.
const CHANGE_TIME_MAX: Duration = Duration::from_secs(90);
/// Pause between two looks at what is waited for.
const LOOK_EVERY: Duration = Duration::from_millis(50);
/// Most servers that are named at once.
const SERVERS_MAX: usize = 1_000;

/// Changes of this process's servers exclude each other; those of others are noticed by the catalog's version.
static CHANGING: Mutex<()> = Mutex::const_new(());

// ---------------------------------------------------------------------------------------------- what is asked for

fn shards_in(body: &Value, name: &str) -> Result<Vec<RangeShard>, Trouble> {
    let Some(list) = body.get(name).and_then(Value::as_array) else {
        return Err(Trouble::bad(format!("<Error> {name} must be a list of shards")));
    };
    let shard = |(at, item): (usize, &Value)| {
        let wrong = |what: &str| Trouble::bad(format!("<Error> {name}, item {at}: {what}"));
        let number = |field: &str| {
            let number = item.get(field).and_then(Value::as_u64);
            number.ok_or_else(|| wrong(&format!("{field} must be a number that is not negative")))
        };
        let id = item.get("Shard_id").and_then(Value::as_str).ok_or_else(|| wrong("Shard_id must be a text"))?;
        let low = number("Stud_id_low")?;
        Ok(RangeShard { name: id.to_owned(), low, size: number("Shard_size")? })
    };
    list.iter().enumerate().map(shard).collect()
}

/// Servers by name, each with the shards that are to be on it.
type Placed = Vec<(String, Vec<String>)>;

/// The servers with the shards of each, in their order.
fn servers_in(body: &Value) -> Result<Option<Placed>, Trouble> {
    let servers = match body.get("servers") {
        None => return Ok(None),
        Some(Value::Object(servers)) if servers.len() <= SERVERS_MAX => servers,
        Some(_) => return Err(Trouble::bad("<Error> servers must be an object: a list of shards for each name")),
    };
    let mut all = Vec::new();
    for (name, shards) in servers {
        let shards =
            shards.as_array().and_then(|list| list.iter().map(|one| one.as_str().map(str::to_owned)).collect());
        let shards: Vec<String> =
            shards.ok_or_else(|| Trouble::bad(format!("<Error> the shards of {name} must be a list of texts")))?;
        if shards.iter().collect::<BTreeSet<_>>().len() < shards.len() {
            return Err(Trouble::bad(format!("<Error> {name} names a shard twice")));
        }
        all.push((name.clone(), shards));
    }
    Ok(Some(all))
}

fn count_in(body: &Value, name: &str) -> Result<usize, Trouble> {
    let count = body.get(name).and_then(Value::as_u64).and_then(|count| usize::try_from(count).ok());
    count.ok_or_else(|| Trouble::bad(format!("<Error> {name} must be a number that is not negative")))
}

fn is_of_use(node: &&NodeInfo) -> bool {
    !matches!(node.state, NodeState::Leaving | NodeState::Replaced(_))
}

// ---------------------------------------------------------------------------------------------- nodes

/// Sees to it that there are nodes of these names, and waits until they are up. Those that it has asked for are asked
/// for no more when one of them does not come.
async fn ensure_nodes(store: &Store, names: &[String], until: Instant) -> Result<(), Trouble> {
    let routes = store.routes();
    let there = |name: &String| routes.map().nodes.iter().filter(is_of_use).any(|node| node.name == *name);
    let missing: Vec<String> = names.iter().filter(|name| !there(name)).cloned().collect();
    if !missing.is_empty() {
        let wish = Admin::AddNodes { count: missing.len() as u32, names: missing.clone() };
        store.admin(wish).await.map_err(refused)?;
    }
    loop {
        let late = late(store, names);
        if late.is_empty() {
            return Ok(());
        }
        let state = store.cluster().state();
        let error = state.iter().flat_map(|state| late.iter().filter_map(|name| state.wanted.get(name)));
        let error = error.filter_map(|wanted| wanted.error.clone()).next();
        if error.is_some() || Instant::now() >= until {
            if !missing.is_empty() {
                let wish = Admin::RemoveNodes { count: missing.len() as u32, names: missing };
                let _ = store.admin(wish).await; // if it is not taken back, the next /init finds it there
            }
            let why = error.map_or_else(String::new, |error| format!(": {error}"));
            return Err(Trouble::bad(format!("<Error> {} could not be started{why}", late.join(", "))));
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Those of the names whose nodes are not up.
fn late(store: &Store, names: &[String]) -> Vec<String> {
    let routes = store.routes();
    let is_up = |name: &&String| {
        let node = routes.map().nodes.iter().find(|node| node.name == **name && node.state == NodeState::Up);
        node.is_some_and(|node| store.cluster().health(|health, now| health.of(node.id, now)) == NodeHealth::Up)
    };
    names.iter().filter(|name| !is_up(name)).cloned().collect()
}

/// What the cluster refuses is the caller's to change; the rest is the cluster's.
fn refused(failure: Failure) -> Trouble {
    match failure {
        Failure::Refusal { code: RefusalCode::DiskFull | RefusalCode::NotBootstrapped, .. } => failure.into(),
        Failure::Refusal { text, .. } => Trouble::bad(format!("<Error> {text}")),
        other => other.into(),
    }
}

/// Writes the catalog, if nobody else has changed it meanwhile.
async fn commit(store: &Store, catalog: &Catalog, version: Option<u64>) -> Result<(), Trouble> {
    match catalog::write(store, catalog, version, &Ask::within(CHANGE_TIME_MAX)).await {
        Err(Failure::Condition { .. }) => {
            let text = "<Error> the database was changed by another request at the same time; look at /status";
            Err(Trouble::Said(StatusCode::CONFLICT, text.into()))
        }
        done => Ok(done?),
    }
}

/// Waits until each of these shards of a keyspace has its copies where it is pinned, or as many of them as there are.
async fn settled(store: &Store, keyspace: &str, until: Instant) {
    loop {
        let routes = store.routes();
        let map = routes.map();
        let rests = |shard: &ShardInfo| {
            let is_kept = |name: &String| {
                let of_name = |node: &&NodeInfo| node.name == *name && is_of_use(node);
                let node = map.nodes.iter().find(of_name);
                let home = node.and_then(|node| shard.replica_on(node.id));
                home.is_some_and(|home| home.role == ReplicaRole::Voter)
            };
            shard.pinned.iter().all(is_kept) && (shard.pinned.is_empty() || shard.replicas.len() == shard.pinned.len())
        };
        let found = map.keyspace(keyspace).is_some_and(|found| map.shards_of(found.id).all(rests));
        if found {
            return;
        }
        if Instant::now() >= until {
            tracing::warn!(keyspace, "not every shard is where it should be yet; it goes on in the background");
            return;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Waits until every shard answers: each is asked for one row.
async fn answers(store: &Store, keyspace: &str, shards: &Shards, until: Instant) -> Result<(), Trouble> {
    let ask = Ask { deadline: until, consistency: Consistency::Linearizable, seen: BTreeMap::new() };
    let keyspace = catalog::keyspace(store, keyspace, &ask).await?;
    for shard in shards.iter() {
        store.get(keyspace, &key_of(shard.low), &ask).await?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------- init

/// `POST /init`
pub(crate) async fn init(State(front): State<Front>, raw: Raw) -> Response {
    let store = front.store.clone();
    let work = async move {
        let body = body_of(&raw)?;
        let _changing = CHANGING.lock().await;
        initialised(&store, &body).await
    };
    finished(work).await
}

/// Carries a change through, also when whoever asked for it does not wait any longer: half a change helps nobody.
async fn finished(work: impl Future<Output = Answered> + Send + 'static) -> Response {
    match tokio::spawn(work).await {
        Ok(done) => done.unwrap_or_else(Trouble::answer),
        Err(error) => Trouble::Said(StatusCode::INTERNAL_SERVER_ERROR, format!("<Error> {error}")).answer(),
    }
}

async fn initialised(store: &Store, body: &Value) -> Answered {
    let (count, schema) = (count_in(body, "N")?, schema_in(body)?);
    let list = shards_in(body, "shards")?;
    if list.is_empty() {
        return Err(Trouble::bad("<Error> shards: at least one is needed"));
    }
    if count == 0 || count > SERVERS_MAX {
        return Err(Trouble::bad(format!("<Error> N must be from 1 to {SERVERS_MAX}")));
    }
    let mut names = BTreeSet::new();
    if let Some(twice) = list.iter().find(|shard| !names.insert(shard.name.clone())) {
        return Err(Trouble::bad(format!("<Error> Duplicate shard id {} found in request", twice.name)));
    }
    let shards = Shards::new(list)?;
    let servers = match servers_in(body)? {
        Some(servers) => servers,
        None => at_random(count, &shards),
    };
    if servers.len() != count {
        let text = format!("<Error> N is {count}, and servers names {}", servers.len());
        return Err(Trouble::bad(text));
    }
    let named: BTreeSet<String> = servers.iter().flat_map(|(_, shards)| shards.iter().cloned()).collect();
    if named != names {
        return Err(Trouble::bad("<Error> Mismatch between shards in 'shards' and 'servers'"));
    }
    let servers: BTreeMap<String, Vec<String>> = drawn(store, servers)?.into_iter().collect();
    let until = Instant::now() + CHANGE_TIME_MAX;
    let (before, version) = catalog::read(store, &Ask::within(CHANGE_TIME_MAX)).await?;
    ensure_nodes(store, &servers.keys().cloned().collect::<Vec<_>>(), until).await?;

    let keyspace = format!("database-{:016x}", world::rng().random::<u64>());
    let mut after =
        Catalog { keyspace: Some(keyspace.clone()), schema: Some(schema), shards, servers, ..Catalog::default() };
    let parts = after.shards.parts();
    let new = parts.into_iter().map(|(part, shard)| NewShard {
        part,
        pinned: shard.map_or_else(Vec::new, |shard| after.keepers(&shard.name)),
    });
    let wish = Admin::CreateKeyspace { name: keyspace.clone(), replicas: REPLICAS, shards: new.collect() };
    store.admin(wish).await.map_err(refused)?;
    after.tables.clear();
    let placed = async {
        answers(store, &keyspace, &after.shards, until).await?;
        commit(store, &after, version).await
    };
    if let Err(trouble) = placed.await {
        let _ = store.admin(Admin::DropKeyspace { name: keyspace }).await; // nobody knows of it
        return Err(trouble);
    }
    let old: Vec<String> = before.keyspace.into_iter().chain(before.tables.into_values()).collect();
    if !old.is_empty() {
        tracing::info!(?old, "the database was configured anew: what it held before is dropped");
    }
    for name in old {
        if let Err(failure) = store.admin(Admin::DropKeyspace { name: name.clone() }).await {
            tracing::warn!(%failure, name, "the old database's keyspace stays behind");
        }
    }
    Ok(json_answer(StatusCode::OK, &json!({"message": "Configured Database", "status": "success"})))
}

/// So many servers, with each shard on some of them.
fn at_random(count: usize, shards: &Shards) -> Placed {
    let mut servers: Placed = (0..count).map(|n| (format!("Server{n}"), vec![])).collect();
    for shard in shards.iter() {
        // The emptiest first, so that none stays empty while another has many; among equals chance decides.
        servers.shuffle(&mut world::rng());
        servers.sort_by_key(|(_, shards)| shards.len());
        for (_, kept) in servers.iter_mut().take(REPLICAS as usize) {
            kept.push(shard.name.clone());
        }
    }
    servers
}

/// The servers in their order; for a name in brackets one is drawn.
fn drawn(store: &Store, asked: Placed) -> Result<Placed, Trouble> {
    let mut servers = Placed::new();
    for (name, shards) in asked {
        let name = match name.split_once('[') {
            Some((stem, rest)) if rest.ends_with(']') => {
                let routes = store.routes();
                let is_free = |name: &String| routes.map().nodes.iter().all(|node| node.name != *name);
                let draw = || format!("{stem}{}", world::rng().random_range(10_000..100_000));
                std::iter::repeat_with(draw).take(SERVERS_MAX).find(is_free).unwrap_or(name)
            }
            _ => name,
        };
        crate::control::wishes::check_name(&name).map_err(refused)?;
        if servers.iter().any(|(other, _)| *other == name) {
            return Err(Trouble::bad(format!("<Error> {name} is named twice")));
        }
        servers.push((name, shards));
    }
    Ok(servers)
}

// ---------------------------------------------------------------------------------------------- status

/// `GET /status`
pub(crate) async fn status(State(front): State<Front>, ask: Ask) -> Response {
    match front.catalogs.read(&front.store, &ask).await {
        Ok(catalog) => json_answer(StatusCode::OK, &shown(&catalog)),
        Err(failure) => Trouble::from(failure).answer(),
    }
}

fn shown(catalog: &Catalog) -> Value {
    let shard =
        |shard: &RangeShard| json!({"Stud_id_low": shard.low, "Shard_id": shard.name, "Shard_size": shard.size});
    let schema = catalog
        .schema
        .as_ref()
        .map_or_else(|| json!({}), |schema| json!({"columns": schema.columns(), "dtypes": schema.dtypes()}));
    let servers: Map<String, Value> =
        catalog.servers.iter().map(|(name, shards)| (name.clone(), json!(shards))).collect();
    let shards: Vec<Value> = catalog.shards.iter().map(shard).collect();
    json!({"N": catalog.servers.len(), "schema": schema, "shards": shards, "servers": servers})
}

// ---------------------------------------------------------------------------------------------- add

/// `POST /add` with servers or shards.
pub(crate) async fn add(front: &Front, body: Value) -> Answered {
    let store = front.store.clone();
    let work = async move {
        let _changing = CHANGING.lock().await;
        added(&store, &body).await
    };
    Ok(finished(work).await)
}

async fn added(store: &Store, body: &Value) -> Answered {
    let servers = servers_in(body)?.unwrap_or_default();
    let count = if body.get("n").is_some() { count_in(body, "n")? } else { servers.len() };
    if count > servers.len() {
        return Err(Trouble::bad("<Error> Number of new servers (n) is greater than newly added instances"));
    }
    if count < servers.len() {
        return Err(Trouble::bad("<Error> Number of new servers (n) is lesser than newly added instances"));
    }
    let fresh = if body.get("new_shards").is_some() { shards_in(body, "new_shards")? } else { vec![] };
    let (before, version) = catalog::read(store, &Ask::within(CHANGE_TIME_MAX)).await?;
    schema_of(&before)?;
    let Some(keyspace) = before.keyspace.clone() else {
        return Err(Trouble::bad("<Error> no database is configured: POST /init first"));
    };
    if let Some((name, _)) = servers.iter().find(|(name, _)| before.servers.contains_key(name)) {
        return Err(Trouble::bad(format!("<Error> Server name {name} already exists")));
    }
    if let Some(shard) = fresh.iter().find(|shard| before.place(&shard.name).is_some()) {
        return Err(Trouble::bad(format!("<Error> Shard {} already exists", shard.name)));
    }
    let servers = drawn(store, servers)?;
    let mut after = before.clone();
    after.shards = Shards::new(before.shards.iter().cloned().chain(fresh.iter().cloned()).collect())?;
    after.servers.extend(servers.clone());
    for name in servers.iter().flat_map(|(_, shards)| shards) {
        if after.shards.named(name).is_none() {
            return Err(Trouble::bad(format!("<Error> Shard {name} is neither new nor known")));
        }
    }
    if let Some(shard) = fresh.iter().find(|shard| after.keepers(&shard.name).is_empty()) {
        return Err(Trouble::bad(format!("<Error> no server is named for the new shard {}", shard.name)));
    }
    let until = Instant::now() + CHANGE_TIME_MAX;
    ensure_nodes(store, &servers.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), until).await?;
    if !fresh.is_empty() {
        cut(store, &keyspace, &fresh, &after).await?;
    }
    pin_changed(store, &keyspace, &before, &after).await?;
    commit(store, &after, version).await?;
    settled(store, &keyspace, until).await;
    answers(store, &keyspace, &after.shards, until).await?;
    let names: Vec<String> = servers.iter().map(|(name, _)| told_as(name)).collect();
    let message = format!("Add {}", names.join(" and "));
    Ok(json_answer(StatusCode::OK, &json!({"N": after.servers.len(), "message": message, "status": "successful"})))
}

/// `Server4` is told as `Server:4`.
fn told_as(name: &str) -> String {
    let stem = name.trim_end_matches(|c: char| c.is_ascii_digit());
    match name.strip_prefix(stem) {
        Some(digits) if !digits.is_empty() && !stem.is_empty() => format!("{stem}:{digits}"),
        _ => name.to_owned(),
    }
}

/// Gives new shards the ranges that nobody had.
async fn cut(store: &Store, keyspace: &str, fresh: &[RangeShard], after: &Catalog) -> Result<(), Trouble> {
    let routes = store.routes();
    let map = routes.map();
    let Some(id) = map.keyspace(keyspace).map(|found| found.id) else {
        return Err(Failure::refusal(RefusalCode::UnknownKeyspace, "the database's keyspace is gone").into());
    };
    let (mut remove, mut shards): (Vec<ShardId>, Vec<NewShard>) = (vec![], vec![]);
    for free in map.shards_of(id) {
        let Part::Range { start, end } = &free.part else { continue };
        let is_in = |shard: &&RangeShard| free.part.holds(&key_of(shard.low));
        let here: Vec<RangeShard> = fresh.iter().filter(is_in).cloned().collect();
        if here.is_empty() {
            continue;
        }
        let scan = Scan {
            keyspace: id,
            start: start.clone(),
            end: end.clone(),
            reverse: false,
            keys_only: true,
            rows_max: 1,
            bytes_max: 0,
            consistency: Consistency::Linearizable,
            with: vec![],
        };
        let page = store.scan(&scan, Some(free.id), &Ask::within(CHANGE_TIME_MAX)).await?;
        if !page.rows.is_empty() || page.next.is_some() {
            let text = format!("<Error> the range of {} holds rows already", here[0].name);
            return Err(Trouble::Said(StatusCode::CONFLICT, text));
        }
        remove.push(free.id);
        let parts = Shards::new(here)?;
        shards.extend(parts.cover(start.clone(), end.clone()).into_iter().map(|(part, shard)| NewShard {
            part,
            pinned: shard.map_or_else(Vec::new, |shard| after.keepers(&shard.name)),
        }));
    }
    store.admin(Admin::Recut { keyspace: keyspace.to_owned(), remove, shards }).await.map_err(refused)?;
    Ok(())
}

/// Pins the shards whose servers have changed.
async fn pin_changed(store: &Store, keyspace: &str, before: &Catalog, after: &Catalog) -> Result<(), Trouble> {
    for shard in before.shards.iter() {
        let nodes = after.keepers(&shard.name);
        if nodes == before.keepers(&shard.name) {
            continue;
        }
        let routes = store.routes();
        let map = routes.map();
        let id = map.keyspace(keyspace).and_then(|found| {
            map.shards_of(found.id).find(|info| info.part.holds(&key_of(shard.low))).map(|info| info.id)
        });
        let Some(id) = id else { continue };
        store.admin(Admin::Pin { shard: id, nodes }).await.map_err(refused)?;
    }
    Ok(())
}

// ---------------------------------------------------------------------------------------------- rm

/// `DELETE /rm` with servers.
pub(crate) async fn remove(front: &Front, body: Value) -> Answered {
    let store = front.store.clone();
    let work = async move {
        let _changing = CHANGING.lock().await;
        removed(&store, &body).await
    };
    Ok(finished(work).await)
}

async fn removed(store: &Store, body: &Value) -> Answered {
    let names = body.get("servers").and_then(Value::as_array);
    let names = names.and_then(|names| names.iter().map(|name| name.as_str().map(str::to_owned)).collect());
    let mut names: Vec<String> = names.ok_or_else(|| Trouble::bad("<Error> servers must be a list of texts"))?;
    let count = if body.get("n").is_some() { count_in(body, "n")? } else { names.len() };
    if names.len() > count {
        return Err(Trouble::bad("<Error> Length of server list is more than removable instances"));
    }
    if count == 0 {
        return Err(Trouble::bad("<Error> n must be at least 1"));
    }
    let (before, version) = catalog::read(store, &Ask::within(CHANGE_TIME_MAX)).await?;
    if let Some(name) = names.iter().find(|name| !before.servers.contains_key(*name)) {
        return Err(Trouble::bad(format!("<Error> there is no server {name}")));
    }
    if names.iter().collect::<BTreeSet<_>>().len() < names.len() {
        return Err(Trouble::bad("<Error> a server is named twice"));
    }
    if count >= before.servers.len() {
        let text =
            format!("<Error> {count} servers cannot be removed, there are {}; one must stay", before.servers.len());
        return Err(Trouble::bad(text));
    }
    let mut others: Vec<String> = before.servers.keys().filter(|name| !names.contains(name)).cloned().collect();
    others.shuffle(&mut world::rng());
    names.extend(others.into_iter().take(count - names.len()));

    let mut after = before.clone();
    after.servers.retain(|name, _| !names.contains(name));
    for shard in before.shards.iter() {
        if !after.keepers(&shard.name).is_empty() {
            continue;
        }
        // Its last server goes: the one that has least takes it over, so that no row is lost.
        if let Some((_, kept)) = after.servers.iter_mut().min_by_key(|(_, kept)| kept.len()) {
            kept.push(shard.name.clone());
        }
    }
    let until = Instant::now() + CHANGE_TIME_MAX;
    store.admin(Admin::RemoveNodes { count: names.len() as u32, names: names.clone() }).await.map_err(refused)?;
    if let Some(keyspace) = &before.keyspace {
        pin_changed(store, keyspace, &before, &after).await?;
    }
    commit(store, &after, version).await?;
    loop {
        let routes = store.routes();
        let is_there = |name: &String| routes.map().nodes.iter().any(|node| node.name == *name);
        if !names.iter().any(is_there) {
            break;
        }
        if Instant::now() >= until {
            tracing::warn!(?names, "not all servers are empty yet; it goes on in the background");
            break;
        }
        tokio::time::sleep(LOOK_EVERY).await;
    }
    let message = json!({"N": after.servers.len(), "servers": names});
    Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "successful"})))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_told_with_a_colon_before_their_number() {
        assert_eq!(told_as("Server4"), "Server:4");
        assert_eq!(told_as("Server58127"), "Server:58127");
        assert_eq!(told_as("left"), "left");
        assert_eq!(told_as("7"), "7");
    }

    #[test]
    fn shards_that_nobody_places_are_spread_over_all_servers() {
        let shard = |n: u64| RangeShard { name: format!("sh{n}"), low: n * 10, size: 10 };
        let shards = Shards::new((0..4).map(shard).collect()).unwrap();
        for count in 1..6 {
            let servers = at_random(count, &shards);
            assert_eq!(servers.len(), count);
            for shard in shards.iter() {
                let kept = servers.iter().filter(|(_, kept)| kept.contains(&shard.name)).count();
                assert_eq!(kept, count.min(3), "{count} servers");
            }
            let counts = servers.iter().map(|(_, kept)| kept.len());
            assert!(counts.clone().max().unwrap() - counts.min().unwrap() <= 1);
        }
    }
}
