//! The sharded database's storage-server role: what one server answers for one shard. At a node's listener the server is
//! that node; at the balancer's it is one that keeps the shard.

use crate::http::Front;
use crate::http::answer::json_answer;
use crate::http::asked::Raw;
use crate::http::catalog::{self, Catalog, Place};
use crate::http::database::{
    Answered, Shown, Trouble, body_of, change, drop_row, id_in, insert, range, range_in, row_of, rows_of, schema_in,
    schema_of,
};
use crate::http::store::Ask;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use rand::RngExt;
use serde_json::{Map, Value, json};
use shkv_proto::map::Part;
use shkv_proto::message::{Admin, Failure, NewShard, RefusalCode};
use shkv_proto::rows::{self, Dtype, NAME_BYTES_MAX, Schema};
use shkv_proto::world;

/// Copies of a shard that no `/init` has placed.
const REPLICAS: u32 = 3;
/// Most shards that one request configures or copies.
const SHARDS_MAX: usize = 1_000;
/// The shard that `/autopopulate` fills, with so many rows of ids up to so high.
const POPULATED: (&str, usize, i64) = ("sh1", 5, 100);

fn shard_in(body: &Value) -> Result<&str, Trouble> {
    body.get("shard").and_then(Value::as_str).ok_or_else(|| Trouble::bad("<Error> shard must be a text"))
}

fn place_in(catalog: &Catalog, body: &Value) -> Result<Place, Trouble> {
    place_of(catalog, shard_in(body)?)
}

fn place_of(catalog: &Catalog, shard: &str) -> Result<Place, Trouble> {
    let unknown = || Trouble::Said(StatusCode::NOT_FOUND, format!("<Error> there is no shard {shard}"));
    catalog.place(shard).ok_or_else(unknown)
}

fn shards_in(body: &Value) -> Result<Vec<String>, Trouble> {
    let names = body.get("shards").and_then(Value::as_array);
    let names = names.and_then(|names| names.iter().map(|name| name.as_str().map(str::to_owned)).collect());
    let names: Vec<String> = names.ok_or_else(|| Trouble::bad("<Error> shards must be a list of texts"))?;
    match names.iter().find(|name| name.is_empty() || name.len() > NAME_BYTES_MAX) {
        _ if names.len() > SHARDS_MAX => Err(Trouble::bad(format!("<Error> more than {SHARDS_MAX} shards"))),
        Some(name) => Err(Trouble::bad(format!("<Error> {name:?} is no name for a shard"))),
        None => Ok(names),
    }
}

/// The server that speaks for a shard.
fn speaker(front: &Front, catalog: &Catalog, shard: &str) -> String {
    if let Some(this) = &front.this {
        return this.to_string();
    }
    if let Some(keeper) = catalog.keepers(shard).into_iter().next() {
        return keeper;
    }
    let routes = front.store.routes();
    let map = routes.map();
    let keyspace = catalog.tables.get(shard).and_then(|name| map.keyspace(name));
    let home = keyspace.and_then(|keyspace| map.shards_of(keyspace.id).next()?.replicas.first());
    home.and_then(|home| map.node(home.node)).map_or_else(|| "Server".into(), |node| node.name.clone())
}

/// `POST /config`: the shards are there afterwards. One that no `/init` has given a range gets a keyspace of its own.
pub(crate) async fn config(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    Box::pin(configured(&front, &ask, &raw)).await.unwrap_or_else(Trouble::answer)
}

async fn configured(front: &Front, ask: &Ask, raw: &Raw) -> Answered {
    let body = body_of(raw)?;
    let (schema, names) = (schema_in(&body)?, shards_in(&body)?);
    loop {
        let (mut catalog, version) = catalog::read(&front.store, ask).await?;
        if catalog.schema.as_ref().is_some_and(|known| *known != schema) {
            return Err(Trouble::bad("<Error> the database has another schema"));
        }
        let mut made = Vec::new();
        for name in names.iter().filter(|name| catalog.place(name).is_none()).collect::<std::collections::BTreeSet<_>>()
        {
            let keyspace = format!("table-{:016x}", world::rng().random::<u64>());
            let shards = vec![NewShard { part: Part::everything(), pinned: vec![] }];
            let wish = Admin::CreateKeyspace { name: keyspace.clone(), replicas: REPLICAS, shards };
            front.store.admin(wish).await?;
            made.push((name.clone(), keyspace));
        }
        let is_new = catalog.schema.is_none() || !made.is_empty();
        catalog.schema = Some(schema.clone());
        catalog.tables.extend(made.iter().cloned());
        let written = if is_new { catalog::write(&front.store, &catalog, version, ask).await } else { Ok(()) };
        if let Err(failure) = written {
            for (_, keyspace) in made {
                let _ = front.store.admin(Admin::DropKeyspace { name: keyspace }).await; // nobody knows of it
            }
            if matches!(failure, Failure::Condition { .. }) {
                continue; // another one was faster: begun anew, until the deadline of what is read
            }
            return Err(failure.into());
        }
        let told: Vec<String> = names.iter().map(|name| format!("{}:{name}", speaker(front, &catalog, name))).collect();
        let message = format!("{} configured", told.join(", "));
        return Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "success"})));
    }
}

/// `GET` or `POST /copy`: all rows of some shards.
pub(crate) async fn copy(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let copied = async {
        let names = shards_in(&body_of(&raw)?)?;
        let catalog = front.catalogs.read(&front.store, &ask).await?;
        let schema = schema_of(&catalog)?;
        let mut all = Map::new();
        for name in names {
            let place = place_of(&catalog, &name)?;
            let rows = range(&front.store, &place.keyspace, schema, (place.low, place.high), &ask).await?;
            let rows: Vec<Shown<'_>> = rows.into_iter().map(|row| Shown(schema, row)).collect();
            all.insert(name, serde_json::to_value(rows).map_err(|error| Trouble::bad(error.to_string()))?);
        }
        all.insert("status".into(), "success".into());
        Ok(json_answer(StatusCode::OK, &all))
    };
    Box::pin(copied).await.unwrap_or_else(Trouble::answer)
}

/// `POST /read` with a shard.
pub(crate) async fn read(front: &Front, catalog: &Catalog, body: &Value, ask: &Ask) -> Answered {
    let place = place_in(catalog, body)?;
    let schema = schema_of(catalog)?;
    let (low, high) = range_in(schema, body)?;
    let (low, high) = (low.max(place.low), high.min(place.high));
    let rows = match low <= high {
        true => range(&front.store, &place.keyspace, schema, (low, high), ask).await?,
        false => vec![],
    };
    let rows: Vec<Shown<'_>> = rows.into_iter().map(|row| Shown(schema, row)).collect();
    Ok(json_answer(StatusCode::OK, &json!({"data": rows, "status": "success"})))
}

/// `POST /write` with a shard.
pub(crate) async fn write(front: &Front, catalog: &Catalog, body: &mut Value, ask: &Ask) -> Answered {
    let place = place_in(catalog, body)?;
    let schema = schema_of(catalog)?;
    let at = match body.get("curr_idx") {
        None => 0,
        Some(at) => {
            at.as_u64().ok_or_else(|| Trouble::bad("<Error> curr_idx must be a number that is not negative"))?
        }
    };
    let rows = rows_of(schema, body)?;
    check_within(schema, &place, &rows)?;
    let writes = rows::inserts(schema, None, &rows)?;
    insert(&front.store, &place.keyspace, schema, writes, ask).await?;
    let after = at.saturating_add(rows.len() as u64);
    let answer = json!({"message": "Data entries added", "current_idx": after, "curr_idx": after, "status": "success"});
    Ok(json_answer(StatusCode::OK, &answer))
}

fn check_within(schema: &Schema, place: &Place, rows: &[rows::Row]) -> Result<(), Trouble> {
    let is_out = |row: &&rows::Row| !(place.low..=place.high).contains(&schema.id_of(row));
    match rows.iter().find(is_out) {
        None => Ok(()),
        Some(row) => {
            let text = format!("<Error> {} {} is not of the shard", schema.key(), schema.id_of(row));
            Err(Trouble::bad(text))
        }
    }
}

/// The id that a request is about, which the shard must hold.
fn id_within(schema: &Schema, place: &Place, body: &Value) -> Result<u64, Trouble> {
    let id = id_in(schema, body)?;
    match (place.low..=place.high).contains(&id) {
        true => Ok(id),
        false => Err(Trouble::Said(StatusCode::NOT_FOUND, "Student ID not found".into())),
    }
}

/// `PUT /update` with a shard.
pub(crate) async fn update(front: &Front, catalog: &Catalog, body: &mut Value, ask: &Ask) -> Answered {
    let place = place_in(catalog, body)?;
    let schema = schema_of(catalog)?;
    let id = id_within(schema, &place, body)?;
    change(&front.store, &place.keyspace, schema, id, body, ask).await?;
    let message = format!("Data entry for {}:{id} updated", schema.key());
    Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "success"})))
}

/// `DELETE /del` with a shard.
pub(crate) async fn remove(front: &Front, catalog: &Catalog, body: &Value, ask: &Ask) -> Answered {
    let place = place_in(catalog, body)?;
    let schema = schema_of(catalog)?;
    let id = id_within(schema, &place, body)?;
    drop_row(&front.store, &place.keyspace, id, ask).await?;
    let message = format!("Data entry with {}:{id} removed", schema.key());
    Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "success"})))
}

/// `POST /del`, which only a server has.
pub(crate) async fn remove_by_post(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let removed = async {
        let body = body_of(&raw)?;
        if body.get("shard").is_none() {
            let text = "POST is not a method of /del unless shard is named; DELETE is";
            return Err(Trouble::Said(StatusCode::METHOD_NOT_ALLOWED, text.into()));
        }
        let catalog = front.catalogs.read(&front.store, &ask).await?;
        remove(&front, &catalog, &body, &ask).await
    };
    let mut answer = Box::pin(removed).await.unwrap_or_else(Trouble::answer);
    if answer.status() == StatusCode::METHOD_NOT_ALLOWED {
        let allowed = axum::http::HeaderValue::from_static("DELETE");
        answer.headers_mut().insert(axum::http::header::ALLOW, allowed);
    }
    answer
}

/// `POST /autopopulate`: a few rows to try things out with. What stands in the way is not told; that is its contract.
pub(crate) async fn autopopulate(State(front): State<Front>, ask: Ask) -> Response {
    if let Err(trouble) = Box::pin(populate(&front, &ask)).await {
        tracing::debug!(?trouble, "autopopulate has written nothing");
    }
    json_answer(StatusCode::OK, &Value::Null)
}

async fn populate(front: &Front, ask: &Ask) -> Result<(), Trouble> {
    let (shard, count, highest) = POPULATED;
    let catalog = front.catalogs.read(&front.store, ask).await?;
    let (place, schema) = (place_of(&catalog, shard)?, schema_of(&catalog)?);
    let mut written = 0;
    for _ in 0..count * 20 {
        let id = world::rng().random_range(1..=highest);
        let mut fields = Map::new();
        for (column, dtype) in schema.columns().iter().zip(schema.dtypes()) {
            let value = match dtype {
                _ if column == schema.key() => json!(id),
                Dtype::Number => json!(world::rng().random_range(0..100)),
                Dtype::String => json!(format!("{column} {id}")),
                Dtype::Float => json!(world::rng().random_range(0.0..100.0)),
            };
            fields.insert(column.clone(), value);
        }
        let row = row_of(schema, Value::Object(fields)).map_err(Trouble::bad)?;
        check_within(schema, &place, std::slice::from_ref(&row))?;
        let writes = rows::inserts(schema, None, &[row])?;
        match insert(&front.store, &place.keyspace, schema, writes, ask).await {
            Ok(()) => written += 1,
            Err(Trouble::Said(StatusCode::CONFLICT, _)) => {} // that id is taken: another one
            Err(trouble) => return Err(trouble),
        }
        if written == count {
            return Ok(());
        }
    }
    Err(Failure::refusal(RefusalCode::Conflict, "nearly all ids are taken").into())
}
