//! The batch proxy's routes: `/set`, `/fetch`, `/query`, over items that are strings or binary.
//!
//! An item is known by encoding and data together. What can be done of a request is done, and the rest is told.

use crate::http::answer::{Envelope, json_answer, json_bytes};
use crate::http::asked::Read;
use crate::http::openapi::Route;
use crate::http::store::{Ask, Page, Store};
use crate::http::stream::{self, Pieces};
use crate::http::{Front, SetShape};
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn};
use axum::response::Response;
use axum::routing::{post, put};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use shkv_proto::limits::{KEY_BYTES_MAX, PAGE_BYTES_DEFAULT, REPLICAS_MAX};
use shkv_proto::message::{Condition, Consistency, Failure, RefusalCode, Scan};
use shkv_proto::{KeyspaceId, ShardId};
use std::collections::BTreeMap;
use std::io;
use std::time::Duration;
use tokio::task::JoinSet;

/// The keyspace of the items.
const KEYSPACE: &str = "items";
/// Its shards, when it is made.
const SHARDS: u32 = 8;
/// Copies of each of them that are wanted.
const REPLICAS: u32 = 3;
const _: () = assert!(REPLICAS <= REPLICAS_MAX);
/// Rows of one request that are on their way at the same time.
const AT_ONCE_MAX: usize = 64;
/// How long each page of a fetch of everything may take.
const PAGE_TIME_MAX: Duration = Duration::from_secs(30);

/// `/set`, `/fetch`, `/query`. Browsers of any origin may use them.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
        .route("/set", put(set).options(preflight))
        .route("/fetch", post(fetch).get(fetch_all).options(preflight))
        .route("/query", post(query).options(preflight))
        .layer(from_fn(open_to_all))
}

/// A route as it is described.
const fn described(method: &'static str, path: &'static str, does: &'static str, body: &'static str) -> Route {
    Route { method, path, system: "batch proxy", does, body, takes: &[], answers: &[200, 206, 400, 408, 413, 503, 507] }
}

/// The routes as they are described.
pub(crate) const ROUTES: &[Route] = &[
    described(
        "put",
        "/set",
        "Inserts or updates pairs",
        r#"[{"key":{"encoding":"string|binary","data":"k"},"value":{"encoding":"string|binary","data":"01"}}]"#,
    ),
    described("post", "/fetch", "The pairs of these keys", r#"[{"encoding":"string|binary","data":"k"}]"#),
    described("get", "/fetch", "All pairs", ""),
    described("post", "/query", "Which of these keys there are", r#"[{"encoding":"string|binary","data":"k"}]"#),
];

async fn open_to_all(request: Request, next: Next) -> Response {
    let mut answer = next.run(request).await;
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, HeaderValue::from_static("*"));
    answer
}

async fn preflight() -> Response {
    let mut answer = crate::http::answer::empty_answer(StatusCode::NO_CONTENT);
    let all = HeaderValue::from_static("GET, POST, PUT, OPTIONS");
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_METHODS, all);
    answer.headers_mut().insert(header::ACCESS_CONTROL_ALLOW_HEADERS, HeaderValue::from_static("*"));
    answer
}

// ---------------------------------------------------------------------------------------------- items

/// A key or a value.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
struct Item {
    encoding: String,
    data: String,
}

#[derive(Clone, Debug, Deserialize)]
struct Pair {
    key: Item,
    value: Item,
}

/// A key as it is asked for: by itself, or under `key`.
#[derive(Clone, Debug, Deserialize)]
#[serde(untagged)]
enum Asked {
    Under { key: Item },
    Itself(Item),
}

impl Asked {
    fn item(self) -> Item {
        match self {
            Self::Under { key } | Self::Itself(key) => key,
        }
    }
}

impl Item {
    /// The bytes of its row's key or value: a letter for the encoding, and the data. `None` for another encoding.
    fn stored(&self) -> Option<Vec<u8>> {
        let letter = match self.encoding.as_str() {
            "string" => b's',
            "binary" => b'b',
            _ => return None,
        };
        Some([&[letter], self.data.as_bytes()].concat())
    }

    fn of(stored: &[u8]) -> Option<Self> {
        let (letter, data) = stored.split_first()?;
        let encoding = match letter {
            b's' => "string",
            b'b' => "binary",
            _ => return None,
        };
        Some(Self { encoding: encoding.to_owned(), data: std::str::from_utf8(data).ok()?.to_owned() })
    }
}

fn bad_request(text: &str) -> Response {
    Envelope::Batch.problem(StatusCode::BAD_REQUEST, &format!("Bad request: {text}"))
}

/// Elements that are each of a form; the first that is not is told.
fn elements<T: serde::de::DeserializeOwned>(body: Value) -> Result<Vec<T>, String> {
    let Value::Array(all) = body else { return Err("the body is not an array".into()) };
    let read = |(at, one)| serde_json::from_value(one).map_err(|error| format!("element {at}: {error}"));
    all.into_iter().enumerate().map(read).collect()
}

/// The items' keyspace, made when the first item is set.
async fn keyspace(store: &Store) -> Result<KeyspaceId, Failure> {
    store.ensure_hashed(KEYSPACE, SHARDS, REPLICAS).await
}

/// The items' keyspace if there is one.
fn known_keyspace(store: &Store) -> Result<Option<KeyspaceId>, Failure> {
    match store.keyspace(KEYSPACE) {
        Ok(keyspace) => Ok(Some(keyspace)),
        Err(Failure::Refusal { code: RefusalCode::UnknownKeyspace, .. }) => Ok(None),
        Err(failure) => Err(failure),
    }
}

// ---------------------------------------------------------------------------------------------- set

async fn set(State(front): State<Front>, ask: Ask, Read(body, _room): Read<Value>) -> Response {
    let pairs: Vec<Pair> = match elements(body) {
        Ok(pairs) => pairs,
        Err(text) => return bad_request(&text),
    };
    // The last pair of a key counts, and the others of it share its fate.
    let mut rows: BTreeMap<Vec<u8>, Bytes> = BTreeMap::new();
    for pair in &pairs {
        if let (Some(key), Some(value)) = (pair.key.stored(), pair.value.stored())
            && key.len() <= KEY_BYTES_MAX
        {
            rows.insert(key, value.into());
        }
    }
    let keyspace = match keyspace(&front.store).await {
        Ok(keyspace) => keyspace,
        Err(failure) => return Envelope::Batch.failure(&failure),
    };
    let mut added: BTreeMap<Vec<u8>, bool> = BTreeMap::new();
    let mut trouble = None;
    let mut writing = JoinSet::new();
    let mut rows = rows.into_iter();
    loop {
        while writing.len() < AT_ONCE_MAX
            && let Some((key, value)) = rows.next()
        {
            let (store, ask) = (front.store.clone(), ask.clone());
            writing.spawn(async move {
                let done = store.put(keyspace, &key, value, Condition::Always, &ask).await;
                (key, done)
            });
        }
        match writing.join_next().await {
            None => break,
            Some(Ok((key, done))) => {
                added.insert(key, done.is_ok());
                trouble = done.err().or(trouble);
            }
            Some(Err(error)) => trouble = Some(Failure::unknown(error.to_string())),
        }
    }
    let is_added = |pair: &Pair| {
        pair.value.stored().is_some() && pair.key.stored().and_then(|key| added.get(&key).copied()).unwrap_or(false)
    };
    let failed: Vec<&Item> = pairs.iter().filter(|pair| !is_added(pair)).map(|pair| &pair.key).collect();
    let count = pairs.len() - failed.len();
    if let (Some(failure), 0) = (&trouble, count) {
        return Envelope::Batch.failure(failure);
    }
    let status = if failed.is_empty() { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
    let told = json!({"keys_added": count, "keys_failed": failed});
    match front.dialects.set {
        SetShape::Object => json_answer(status, &told),
        SetShape::Array => json_answer(status, &[told]),
    }
}

// ---------------------------------------------------------------------------------------------- fetch and query

/// Reads the rows of these items, in their order. An item of an unknown encoding has none.
async fn look_up(front: &Front, items: &[Item], ask: &Ask) -> Result<Vec<Option<Item>>, Failure> {
    let mut found: Vec<Option<Item>> = vec![None; items.len()];
    let Some(keyspace) = known_keyspace(&front.store)? else { return Ok(found) };
    let mut reading = JoinSet::new();
    let keys = items.iter().map(Item::stored).enumerate();
    let mut keys = keys.filter_map(|(at, key)| Some((at, key.filter(|key| key.len() <= KEY_BYTES_MAX)?)));
    loop {
        while reading.len() < AT_ONCE_MAX
            && let Some((at, key)) = keys.next()
        {
            let (store, ask) = (front.store.clone(), ask.clone());
            reading.spawn(async move { (at, store.get(keyspace, &key, &ask).await) });
        }
        match reading.join_next().await {
            None => return Ok(found),
            Some(Ok((at, done))) => found[at] = done?.row.and_then(|row| Item::of(&row.value)),
            Some(Err(error)) => {
                return Err(Failure::Busy { retry_after_ms: 100, text: error.to_string() });
            }
        }
    }
}

fn asked(body: Value) -> Result<Vec<Item>, String> {
    Ok(elements::<Asked>(body)?.into_iter().map(Asked::item).collect())
}

async fn fetch(State(front): State<Front>, ask: Ask, Read(body, _room): Read<Value>) -> Response {
    let items = match asked(body) {
        Ok(items) => items,
        Err(text) => return bad_request(&text),
    };
    match look_up(&front, &items, &ask).await {
        Err(failure) => Envelope::Batch.failure(&failure),
        Ok(found) => {
            let whole = found.iter().all(Option::is_some);
            let status = if whole { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
            let told = |(key, value): (&Item, &Option<Item>)| match value {
                Some(value) => json!({"key": key, "value": value}),
                None => json!({"key": key, "value": {}}),
            };
            let all: Vec<Value> = items.iter().zip(&found).map(told).collect();
            json_answer(status, &all)
        }
    }
}

async fn query(State(front): State<Front>, ask: Ask, Read(body, _room): Read<Value>) -> Response {
    let items = match asked(body) {
        Ok(items) => items,
        Err(text) => return bad_request(&text),
    };
    match look_up(&front, &items, &ask).await {
        Err(failure) => Envelope::Batch.failure(&failure),
        Ok(found) => {
            let known = items.iter().all(|item| item.stored().is_some());
            let status = if known { StatusCode::OK } else { StatusCode::PARTIAL_CONTENT };
            let all: Vec<Value> =
                items.iter().zip(&found).map(|(key, found)| json!({"key": key, "value": found.is_some()})).collect();
            json_answer(status, &all)
        }
    }
}

// ---------------------------------------------------------------------------------------------- everything

async fn fetch_all(State(front): State<Front>, ask: Ask) -> Response {
    let keyspace = match known_keyspace(&front.store) {
        Ok(Some(keyspace)) => keyspace,
        Ok(None) => return json_answer(StatusCode::OK, &json!([])),
        Err(failure) => return Envelope::Batch.failure(&failure),
    };
    let scan = Scan {
        keyspace,
        start: vec![],
        end: None,
        reverse: false,
        keys_only: false,
        rows_max: 0,
        bytes_max: PAGE_BYTES_DEFAULT as u32,
        consistency: Consistency::Linearizable,
        with: vec![],
    };
    // The first page is read before the answer begins, so that a failure still has a status.
    let first = match front.store.scan(&scan, None::<ShardId>, &ask).await {
        Ok(page) => page,
        Err(failure) => return Envelope::Batch.failure(&failure),
    };
    let (pieces, body) = stream::body();
    let tasks = front.store.cluster().tasks.clone();
    tasks.spawn(async move { write_all(&front.store, scan, first, &pieces).await });
    json_bytes(StatusCode::OK, body)
}

/// Writes every pair, page by page. A page that fails cuts the connection: nobody shall take a part for the whole.
async fn write_all(store: &Store, mut scan: Scan, first: Page, pieces: &Pieces) {
    let mut page = first;
    let mut text = String::from("[");
    let mut is_first = true;
    loop {
        for row in &page.rows {
            let (Some(key), Some(value)) = (Item::of(&row.key), Item::of(&row.value)) else { continue };
            if !is_first {
                text.push(',');
            }
            is_first = false;
            text.push_str(&json!({"key": key, "value": value}).to_string());
        }
        let Some(next) = page.next else { break };
        if pieces.send(Ok(std::mem::take(&mut text).into())).await.is_err() {
            return;
        }
        scan = scan.resumed(next);
        page = match store.scan(&scan, None, &Ask::within(PAGE_TIME_MAX)).await {
            Ok(page) => page,
            Err(failure) => {
                let _ = pieces.send(Err(io::Error::other(failure.to_string()))).await; // or the caller is gone
                return;
            }
        };
    }
    text.push(']');
    let _ = pieces.send(Ok(text.into())).await; // or the caller is gone
}

#[cfg(test)]
mod tests {
    use super::*;

    fn item(encoding: &str, data: &str) -> Item {
        Item { encoding: encoding.into(), data: data.into() }
    }

    #[test]
    fn an_item_is_known_by_encoding_and_data() {
        for one in [item("string", "1"), item("binary", "1"), item("string", ""), item("binary", "not bits")] {
            assert_eq!(Item::of(&one.stored().unwrap()), Some(one));
        }
        assert_ne!(item("string", "1").stored(), item("binary", "1").stored());
        assert_eq!(item("hex", "1").stored(), None);
        assert_eq!(Item::of(b""), None);
        assert_eq!(Item::of(b"x1"), None);
    }

    #[test]
    fn keys_are_asked_for_in_both_forms() {
        let both = json!([{"encoding": "string", "data": "a"}, {"key": {"encoding": "string", "data": "a"}}]);
        assert_eq!(asked(both), Ok(vec![item("string", "a"), item("string", "a")]));
        for bad in [json!({}), json!([1]), json!([{"data": "a"}]), json!("x")] {
            assert!(asked(bad.clone()).is_err(), "{bad}");
        }
    }
}
