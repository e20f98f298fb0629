//! The sharded database's balancer role: rows over all shards. What changes servers and shards is in `servers`, what one
//! server answers for one shard is in `tables`.
//!
//! A write is one transaction over all its rows and shards; a read asks its shards side by side.

use crate::http::answer::{Envelope, empty_answer, json_answer};
use crate::http::asked::Raw;
use crate::http::catalog::{self, Catalog};
use crate::http::store::{Ask, If, Op, Store};
use crate::http::{Front, servers, tables};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{delete, get, post, put};
use bytes::Bytes;
use serde::Serialize;
use serde::ser::SerializeMap;
use serde_json::{Value, json};
use shkv_proto::limits::BATCH_OPS_MAX;
use shkv_proto::message::{Condition, Consistency, Failure, RefusalCode, Scan};
use shkv_proto::rows::{self, ID_MAX, Row, RowWrite, RowsError, Schema};
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::task::JoinSet;

/// How often a request is begun anew because the database was configured anew meanwhile.
const TRIES_MAX: u32 = 3;
/// How often an update of some columns is begun anew because another one was faster.
const RACES_MAX: u32 = 20;
/// The column by which rows are found, if the schema has it; else the first.
const KEY_COLUMN: &str = "Stud_id";

/// The routes but `/add` and `/rm`, which other systems have, too.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
        .route("/init", post(servers::init))
        .route("/status", get(servers::status))
        .route("/read", post(read).get(read))
        .route("/write", post(write))
        .route("/update", put(update))
        .route("/del", delete(remove_row).post(tables::remove_by_post))
        .route("/test", get(|| async { json_answer(StatusCode::OK, &"Test successful") }))
        .route("/favicon.ico", get(|| async { empty_answer(StatusCode::NO_CONTENT) }))
        .route("/config", post(tables::config))
        .route("/copy", get(tables::copy).post(tables::copy))
        .route("/autopopulate", post(tables::autopopulate))
}

/// `POST /add` with servers or shards.
pub(crate) async fn add(front: &Front, body: Value, _: &Ask) -> Response {
    Box::pin(servers::add(front, body)).await.unwrap_or_else(Trouble::answer)
}

/// `DELETE /rm` with servers.
pub(crate) async fn remove(front: &Front, body: Value, _: &Ask) -> Response {
    Box::pin(servers::remove(front, body)).await.unwrap_or_else(Trouble::answer)
}

/// Why a request has no other answer.
#[derive(Debug)]
pub(crate) enum Trouble {
    /// In words of the database's own.
    Said(StatusCode, String),
    /// The store's.
    Failed(Failure),
}

impl From<Failure> for Trouble {
    fn from(failure: Failure) -> Self {
        Self::Failed(failure)
    }
}

impl From<RowsError> for Trouble {
    fn from(error: RowsError) -> Self {
        let status = match error {
            RowsError::Stored(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        };
        Self::Said(status, format!("<Error> {error}"))
    }
}

impl Trouble {
    /// The caller's mistake.
    pub(crate) fn bad(text: impl Into<String>) -> Self {
        Self::Said(StatusCode::BAD_REQUEST, text.into())
    }

    pub(crate) fn answer(self) -> Response {
        match self {
            Self::Said(status, text) => Envelope::Status.problem(status, &text),
            // An atomic write that met others again and again was rolled back.
            Self::Failed(failure @ Failure::Aborted { .. }) => {
                let text = format!("<Error> rolled back, nothing was written: {failure}");
                Envelope::Status.problem(StatusCode::INTERNAL_SERVER_ERROR, &text)
            }
            Self::Failed(failure) => Envelope::Status.failure(&failure),
        }
    }

    fn is_reconfigured(&self) -> bool {
        matches!(self, Self::Failed(Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }))
    }
}

/// What a handler ends with.
pub(crate) type Answered = Result<Response, Trouble>;

/// The body as JSON.
pub(crate) fn body_of(raw: &Raw) -> Result<Value, Trouble> {
    raw.json().map_err(Trouble::bad)
}

/// The database, if one is configured.
pub(crate) fn schema_of(catalog: &Catalog) -> Result<&Schema, Trouble> {
    catalog.schema.as_ref().ok_or_else(|| Trouble::bad("<Error> no database is configured: POST /init first"))
}

/// Does something with the catalog and the body, again if the database was configured anew in between.
async fn over_catalog<'a, F>(
    front: &'a Front,
    ask: &'a Ask,
    raw: &'a Raw,
    work: impl Fn(Arc<Catalog>, Value) -> F,
) -> Response
where
    F: Future<Output = Answered>,
{
    for tries in 1.. {
        let body = match body_of(raw) {
            Ok(body) => body,
            Err(trouble) => return trouble.answer(),
        };
        let done = match front.catalogs.read(&front.store, ask).await {
            Ok(catalog) => work(catalog, body).await,
            Err(failure) => Err(failure.into()),
        };
        match done {
            Ok(answer) => return answer,
            Err(trouble) if trouble.is_reconfigured() && tries < TRIES_MAX => {}
            Err(trouble) => return trouble.answer(),
        }
    }
    Envelope::Status.problem(StatusCode::SERVICE_UNAVAILABLE, "<Error> the database is being configured anew")
}

// ---------------------------------------------------------------------------------------------- values and rows

/// A value of JSON as a value of a row.
fn value_of(value: Value) -> Result<rows::Value, String> {
    match value {
        Value::String(text) => Ok(rows::Value::Text(text)),
        Value::Number(number) => match (number.as_i64(), number.as_f64()) {
            (Some(n), _) => Ok(rows::Value::Integer(n)),
            (None, Some(n)) if !number.is_u64() => Ok(rows::Value::Float(n)),
            _ => Err(format!("{number} is too large")),
        },
        other => Err(format!("{other} is neither a text nor a number")),
    }
}

/// A row from JSON.
pub(crate) fn row_of(schema: &Schema, value: Value) -> Result<Row, String> {
    let Value::Object(fields) = value else { return Err("it is not an object".into()) };
    let mut named = BTreeMap::new();
    for (column, value) in fields {
        let value = value_of(value).map_err(|why| format!("{column}: {why}"))?;
        named.insert(column, value);
    }
    schema.row(named).map_err(|error| error.to_string())
}

/// The rows of `data`, which names the first that is wrong.
pub(crate) fn rows_of(schema: &Schema, body: &mut Value) -> Result<Vec<Row>, Trouble> {
    let rows = match body.get_mut("data").map(Value::take) {
        Some(Value::Array(rows)) => rows,
        Some(_) => return Err(Trouble::bad("<Error> data must be a list of rows")),
        None if body.get(schema.key()).is_some() => vec![body.take()], // one row without anything around it
        None => return Err(Trouble::bad("<Error> data is missing")),
    };
    if rows.len() > BATCH_OPS_MAX {
        let text = format!("<Error> {} rows cannot be written as one; {BATCH_OPS_MAX} can", rows.len());
        return Err(Trouble::bad(text));
    }
    let row = |(at, value)| row_of(schema, value).map_err(|why| Trouble::bad(format!("<Error> row {at}: {why}")));
    rows.into_iter().enumerate().map(row).collect()
}

/// The id that a request is about.
pub(crate) fn id_in(schema: &Schema, body: &Value) -> Result<u64, Trouble> {
    let column = schema.key();
    let value = body.get(column).ok_or_else(|| Trouble::bad(format!("<Error> {column} is missing")))?;
    let id = value_of(value.clone()).and_then(|value| value.as_id());
    id.map_err(|why| Trouble::bad(format!("<Error> {column}: {why}")))
}

/// The range of ids that a read asks for, both ends included.
pub(crate) fn range_in(schema: &Schema, body: &Value) -> Result<(u64, u64), Trouble> {
    let column = schema.key();
    let range = body.get(column).ok_or_else(|| Trouble::bad(format!("<Error> {column} is missing")))?;
    let end = |name: &str| {
        let value = range.get(name).ok_or_else(|| Trouble::bad(format!("<Error> {column}: {name} is missing")))?;
        let id = value_of(value.clone()).and_then(|value| value.as_id());
        id.map_err(|why| Trouble::bad(format!("<Error> {column}: {name}: {why}")))
    };
    let (low, high) = (end("low")?, end("high")?);
    if low > high {
        return Err(Trouble::bad(format!("<Error> {column}: low {low} is above high {high}")));
    }
    Ok((low, high.min(ID_MAX - 1)))
}

/// A schema from JSON.
pub(crate) fn schema_in(body: &Value) -> Result<Schema, Trouble> {
    let schema = body.get("schema").ok_or_else(|| Trouble::bad("<Error> schema is missing"))?;
    let list = |name: &str| {
        let texts = schema.get(name).and_then(Value::as_array);
        let texts = texts.and_then(|texts| texts.iter().map(|text| text.as_str().map(str::to_owned)).collect());
        texts.ok_or_else(|| Trouble::bad(format!("<Error> schema: {name} must be a list of texts")))
    };
    let columns: Vec<String> = list("columns")?;
    let dtypes: Vec<String> = list("dtypes")?;
    let dtype = |name: &String| {
        let known = serde_json::from_value(Value::String(name.clone()));
        known.map_err(|_| Trouble::bad(format!("<Error> schema: {name} is no dtype; Number, String and Float are")))
    };
    let dtypes = dtypes.iter().map(dtype).collect::<Result<_, _>>()?;
    let first = columns.first().cloned().unwrap_or_default();
    let key = columns.iter().find(|column| *column == KEY_COLUMN).cloned().unwrap_or(first);
    Ok(Schema::new(columns, dtypes, &key)?)
}

/// A row as it is shown: its columns in their order.
pub(crate) struct Shown<'a>(pub(crate) &'a Schema, pub(crate) Row);

impl Serialize for Shown<'_> {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(Some(self.1.values().len()))?;
        for (column, value) in self.0.columns().iter().zip(self.1.values()) {
            map.serialize_entry(column, value)?;
        }
        map.end()
    }
}

// ---------------------------------------------------------------------------------------------- operations

/// The rows of a range of ids of one keyspace, page by page.
pub(crate) async fn range(
    store: &Store,
    keyspace: &str,
    schema: &Schema,
    (low, high): (u64, u64),
    ask: &Ask,
) -> Result<Vec<Row>, Trouble> {
    let keyspace = catalog::keyspace(store, keyspace, ask).await?;
    let (start, end) = rows::span(low, high);
    let mut scan = Scan {
        keyspace,
        start,
        end,
        reverse: false,
        keys_only: false,
        rows_max: 0,
        bytes_max: 0,
        consistency: Consistency::Linearizable,
        with: vec![],
    };
    let mut found = Vec::new();
    loop {
        let page = store.scan(&scan, None, ask).await?;
        for row in &page.rows {
            found.push(schema.decode(&row.value)?);
        }
        match page.next {
            None => return Ok(found),
            Some(next) => scan = scan.resumed(next),
        }
    }
}

fn op_of(write: RowWrite) -> Op {
    let key = Bytes::copy_from_slice(&write.key);
    let condition = match write.condition {
        Condition::Absent => If::Absent,
        Condition::Present => If::Present,
        Condition::Version(version) => If::Version(version),
        Condition::Always | Condition::Value(_) => If::Always,
    };
    match write.value {
        Some(value) => Op::Put { key, value: Bytes::from(value), condition },
        None => Op::Delete { key, condition },
    }
}

/// Writes new rows in one step, over as many shards as they touch.
pub(crate) async fn insert(
    store: &Store,
    keyspace: &str,
    schema: &Schema,
    writes: Vec<RowWrite>,
    ask: &Ask,
) -> Result<(), Trouble> {
    if writes.is_empty() {
        return Ok(());
    }
    let keyspace = catalog::keyspace(store, keyspace, ask).await?;
    let ops: Vec<Op> = writes.into_iter().map(op_of).collect();
    match store.batch(keyspace, &ops, ask).await {
        Ok(_) => Ok(()),
        Err(Failure::Condition { operation, .. }) => {
            let id = ops.get(operation as usize).and_then(|op| rows::id_of(op.key())).unwrap_or_default();
            let text = format!("<Error> {} {id} exists already; nothing was written", schema.key());
            Err(Trouble::Said(StatusCode::CONFLICT, text))
        }
        Err(failure) => Err(failure.into()),
    }
}

fn no_such_row() -> Trouble {
    Trouble::Said(StatusCode::NOT_FOUND, "Student ID not found".into())
}

/// Changes a row that is there: `data` has some of its columns, or all.
pub(crate) async fn change(
    store: &Store,
    keyspace: &str,
    schema: &Schema,
    id: u64,
    body: &mut Value,
    ask: &Ask,
) -> Result<(), Trouble> {
    let Some(Value::Object(data)) = body.get_mut("data").map(Value::take) else {
        return Err(Trouble::bad("<Error> data must be an object"));
    };
    let mut news = BTreeMap::new();
    for (column, value) in data {
        if !schema.columns().contains(&column) {
            return Err(Trouble::bad(format!("<Error> data: {column} is no column")));
        }
        let value = value_of(value).map_err(|why| Trouble::bad(format!("<Error> data: {column}: {why}")))?;
        news.insert(column, value);
    }
    let key = schema.key().to_owned();
    if news.get(&key).is_some_and(|value| value.as_id() != Ok(id)) {
        return Err(Trouble::bad(format!("<Error> data: {key} is not {id}: a row keeps its id")));
    }
    news.insert(key, rows::Value::Integer(id as i64));
    let keyspace = catalog::keyspace(store, keyspace, ask).await?;
    if news.len() == schema.columns().len() {
        let write = rows::update(schema, &schema.row(news)?);
        let value = Bytes::from(write.value.unwrap_or_default());
        return match store.put(keyspace, &write.key, value, write.condition, ask).await {
            Ok(_) => Ok(()),
            Err(Failure::Condition { .. }) => Err(no_such_row()),
            Err(failure) => Err(failure.into()),
        };
    }
    for _ in 0..RACES_MAX {
        let found = store.get(keyspace, &rows::key_of(id), ask).await?.row.ok_or_else(no_such_row)?;
        let mut named = schema.decode(&found.value)?.named(schema);
        named.extend(news.clone());
        let value = Bytes::from(schema.encode(&schema.row(named)?));
        let condition = Condition::Version(found.version);
        match store.put(keyspace, &rows::key_of(id), value, condition, ask).await {
            Ok(_) => return Ok(()),
            Err(Failure::Condition { .. }) => {}
            Err(failure) => return Err(failure.into()),
        }
    }
    Err(Failure::Aborted { text: "other updates of the row were faster".into() }.into())
}

/// Removes a row that is there.
pub(crate) async fn drop_row(store: &Store, keyspace: &str, id: u64, ask: &Ask) -> Result<(), Trouble> {
    let keyspace = catalog::keyspace(store, keyspace, ask).await?;
    let write = rows::removal(id);
    match store.delete(keyspace, &write.key, write.condition, ask).await {
        Ok(_) => Ok(()),
        Err(Failure::Condition { .. }) => Err(no_such_row()),
        Err(failure) => Err(failure.into()),
    }
}

// ---------------------------------------------------------------------------------------------- handlers

/// The keyspace of the database, and its schema.
fn database(catalog: &Catalog) -> Result<(&str, &Schema), Trouble> {
    let schema = schema_of(catalog)?;
    let keyspace = catalog.keyspace.as_deref();
    Ok((keyspace.ok_or_else(|| Trouble::bad("<Error> no database is configured: POST /init first"))?, schema))
}

async fn read(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let (front, ask) = (&front, &ask);
    Box::pin(over_catalog(front, ask, &raw, move |catalog, body| async move {
        if body.get("shard").is_some() {
            return tables::read(front, &catalog, &body, ask).await;
        }
        let (keyspace, schema) = database(&catalog)?;
        let (low, high) = range_in(schema, &body)?;
        let mut queried = Vec::new();
        let mut reads = JoinSet::new();
        for (at, (shard, low, high)) in catalog.shards.touched(low, high).enumerate() {
            queried.push(shard.name.clone());
            let (store, keyspace, schema, ask) =
                (front.store.clone(), keyspace.to_owned(), schema.clone(), ask.clone());
            reads.spawn(async move { (at, range(&store, &keyspace, &schema, (low, high), &ask).await) });
        }
        let mut parts: BTreeMap<usize, Vec<Row>> = BTreeMap::new();
        while let Some(done) = reads.join_next().await {
            let (at, rows) = done.map_err(|error| {
                Trouble::Said(StatusCode::INTERNAL_SERVER_ERROR, format!("<Error> a shard was not read: {error}"))
            })?;
            parts.insert(at, rows?);
        }
        let data: Vec<Shown<'_>> = parts.into_values().flatten().map(|row| Shown(schema, row)).collect();
        Ok(json_answer(StatusCode::OK, &Ranged { shards_queried: queried, data, status: "success" }))
    }))
    .await
}

/// The answer to a write.
#[derive(Serialize)]
struct Told {
    message: String,
    status: &'static str,
}

/// The answer to a read over all shards.
#[derive(Serialize)]
struct Ranged<'a> {
    shards_queried: Vec<String>,
    data: Vec<Shown<'a>>,
    status: &'static str,
}

async fn write(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let (front, ask) = (&front, &ask);
    Box::pin(over_catalog(front, ask, &raw, move |catalog, mut body| async move {
        if body.get("shard").is_some() {
            return tables::write(front, &catalog, &mut body, ask).await;
        }
        let (keyspace, schema) = database(&catalog)?;
        let rows = rows_of(schema, &mut body)?;
        let writes = rows::inserts(schema, Some(&catalog.shards), &rows)?;
        insert(&front.store, keyspace, schema, writes, ask).await?;
        let message = format!("{} Data entries added", rows.len());
        Ok(json_answer(StatusCode::OK, &Told { message, status: "success" }))
    }))
    .await
}

async fn update(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let (front, ask) = (&front, &ask);
    Box::pin(over_catalog(front, ask, &raw, move |catalog, mut body| async move {
        if body.get("shard").is_some() {
            return tables::update(front, &catalog, &mut body, ask).await;
        }
        let (keyspace, schema) = database(&catalog)?;
        let id = id_in(schema, &body)?;
        catalog.shards.holding(id).ok_or_else(no_such_row)?;
        change(&front.store, keyspace, schema, id, &mut body, ask).await?;
        let message = format!("Data entry for {}: {id} updated", schema.key());
        Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "success"})))
    }))
    .await
}

async fn remove_row(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let (front, ask) = (&front, &ask);
    Box::pin(over_catalog(front, ask, &raw, move |catalog, body| async move {
        if body.get("shard").is_some() {
            return tables::remove(front, &catalog, &body, ask).await;
        }
        let (keyspace, schema) = database(&catalog)?;
        let id = id_in(schema, &body)?;
        catalog.shards.holding(id).ok_or_else(no_such_row)?;
        drop_row(&front.store, keyspace, id, ask).await?;
        let message = format!("Data entry with {}:{id} removed from all replicas", schema.key());
        Ok(json_answer(StatusCode::OK, &json!({"message": message, "status": "success"})))
    }))
    .await
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::http::header;

    #[test]
    fn only_what_was_rolled_back_is_told_as_500_and_what_may_be_done_is_not_told_as_undone() {
        let answer = |failure: Failure| {
            let answer = Trouble::from(failure).answer();
            (answer.status(), answer.headers().contains_key(header::RETRY_AFTER))
        };
        let aborted = Failure::Aborted { text: "others were faster".into() };
        assert_eq!(answer(aborted), (StatusCode::INTERNAL_SERVER_ERROR, false));
        assert_eq!(answer(Failure::unknown("lost")), (StatusCode::SERVICE_UNAVAILABLE, true));
        let busy = Failure::Busy { retry_after_ms: 100, text: "no leader".into() };
        assert_eq!(answer(busy), (StatusCode::SERVICE_UNAVAILABLE, true));
    }
}
