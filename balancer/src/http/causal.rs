//! The causal store's routes: keys with a version and causal metadata, the view, and shards with members.
//!
//! Rows are linearizable here, so whatever a client's metadata stands for is visible already. Metadata is still kept and
//! handed on as the contract has it: it is a clock of microseconds that is later than that of everything the write
//! depends on, stored with its row, so that a read gives exactly what the row's last write gave.

#![expect(clippy::disallowed_methods, reason = "a shell: compares a deadline with the time")]

use crate::http::answer::{in_short, json_answer, status_of};
use crate::http::asked::{Raw, percent_decoded};
use crate::http::members::{self, Members};
use crate::http::store::{Ask, Store};
use crate::http::{Front, KvsDialect};
use axum::Router;
use axum::extract::{Path, State};
use axum::http::{StatusCode, Uri};
use axum::response::Response;
use axum::routing::{get, put};
use bytes::Bytes;
use serde_json::{Map, Value, json};
use shkv_proto::KeyspaceId;
use shkv_proto::message::{Condition, Consistency, Failure, Scan};
use shkv_proto::world;
use std::time::Duration;
use tokio::time::Instant;

/// Most characters of a key.
const KEY_CHARS_MAX: usize = 50;
/// First byte of a stored value.
const FORMAT: u8 = 1;
/// Bytes before the value: the format and the clock.
const HEAD_BYTES: usize = 9;
/// How far a client's clock may be ahead of ours before it is taken for an error.
const AHEAD_MAX: u64 = 86_400_000_000;
/// How long a new member may take to be filled.
const MEMBER_TIME_MAX: Duration = Duration::from_secs(30);

/// The routes.
pub(crate) fn routes() -> Router<Front> {
    let key = || get(read).put(write).delete(remove);
    Router::new()
        .route("/key-value-store/{*key}", key())
        .route("/key-value-store/", key())
        .route("/key-value-store-view", get(view).put(add_to_view).delete(remove_from_view))
        .route("/key-value-store-shard/shard-ids", get(shard_ids))
        .route("/key-value-store-shard/node-shard-id", get(node_shard_id))
        .route("/key-value-store-shard/shard-id-members/{id}", get(shard_members))
        .route("/key-value-store-shard/shard-id-key-count/{id}", get(key_count))
        .route("/key-value-store-shard/add-member/{id}", put(add_member))
        .route("/key-value-store-shard/reshard", put(reshard))
}

/// An answer that is none of success.
struct Refused(StatusCode, Value);

impl Refused {
    fn new(status: StatusCode, error: &str, method: &str) -> Self {
        Self(status, json!({"error": in_short(error), "message": format!("Error in {method}")}))
    }

    fn failed(failure: &Failure, method: &str) -> Self {
        Self::new(status_of(failure).0, &failure.to_string(), method)
    }
}

impl From<Failure> for Refused {
    fn from(failure: Failure) -> Self {
        Self::failed(&failure, "request")
    }
}

type Answered = Result<Response, Refused>;

fn answer(done: Answered) -> Response {
    done.unwrap_or_else(|Refused(status, body)| {
        let mut answer = json_answer(status, &body);
        if status == StatusCode::SERVICE_UNAVAILABLE {
            answer.headers_mut().insert(axum::http::header::RETRY_AFTER, axum::http::HeaderValue::from_static("1"));
        }
        answer
    })
}

// ---------------------------------------------------------------------------------------------- keys

/// A stored value.
#[derive(Clone, PartialEq, Debug)]
struct Kept {
    clock: u64,
    value: Value,
}

impl Kept {
    fn encode(&self) -> Bytes {
        let mut bytes = vec![FORMAT];
        bytes.extend_from_slice(&self.clock.to_be_bytes());
        bytes.extend_from_slice(self.value.to_string().as_bytes());
        bytes.into()
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (head, value) = bytes.split_at_checked(HEAD_BYTES)?;
        let clock = u64::from_be_bytes(head[1..].try_into().ok()?);
        (head[0] == FORMAT).then_some(())?;
        Some(Self { clock, value: serde_json::from_slice(value).ok()? })
    }
}

/// What a request carries.
struct Asked {
    key: String,
    body: Map<String, Value>,
    /// The clock of what it depends on; 0 for nothing.
    seen: u64,
}

fn asked(uri: &Uri, raw: &Raw, method: &str) -> Result<Asked, Refused> {
    let bad = |error: &str| Refused::new(StatusCode::BAD_REQUEST, error, method);
    let path = uri.path().strip_prefix("/key-value-store/").unwrap_or_default();
    let key = percent_decoded(path).map_err(|why| bad(&why))?;
    let key = String::from_utf8(key).map_err(|_| bad("Key is not text"))?;
    if key.is_empty() {
        return Err(bad("Key not specified"));
    }
    let body = match raw.bytes.iter().all(u8::is_ascii_whitespace) {
        true => Map::new(),
        false => match raw.json::<Value>().map_err(|why| bad(&why))? {
            Value::Object(body) => body,
            _ => return Err(bad("the body is not a JSON object")),
        },
    };
    let seen = match body.get("causal-metadata") {
        None | Some(Value::Null) => 0,
        Some(Value::String(text)) if text.is_empty() => 0,
        Some(Value::String(text)) => {
            let clock: Option<u64> = text.parse().ok();
            let clock = clock.filter(|clock| *clock < now_us() + AHEAD_MAX);
            clock.ok_or_else(|| bad("causal-metadata is not what this store gave"))?
        }
        Some(_) => return Err(bad("causal-metadata is not what this store gave")),
    };
    Ok(Asked { key, body, seen })
}

fn now_us() -> u64 {
    u64::try_from(world::unix_time().as_micros()).unwrap_or(u64::MAX / 2)
}

/// A clock that is later than all of these.
fn clock_after(seen: u64, before: Option<&Kept>) -> u64 {
    let before = before.map_or(0, |kept| kept.clock);
    now_us().max(seen + 1).max(before + 1)
}

/// The id of a shard as the dialect has it.
fn shard_id(front: &Front, at: usize) -> Value {
    match front.dialects.kvs {
        KvsDialect::Of2019 => json!((at + 1).to_string()),
        KvsDialect::Of2020 => json!(at + 1),
    }
}

/// A list as the dialect has it.
fn list(front: &Front, items: &[String]) -> Value {
    match front.dialects.kvs {
        KvsDialect::Of2019 => json!(items.join(",")),
        KvsDialect::Of2020 => json!(items),
    }
}

/// The number of the shard that holds a key, from 0.
fn shard_of(store: &Store, keyspace: KeyspaceId, key: &str) -> usize {
    let routes = store.routes();
    let parts = members::parts(routes.map(), keyspace);
    parts.iter().position(|shard| shard.part.holds(key.as_bytes())).unwrap_or(0)
}

/// Adds what every answer about a key ends with.
fn with_clock(front: &Front, mut body: Value, clock: u64, shard: usize) -> Value {
    if front.dialects.kvs == KvsDialect::Of2019 {
        body["version"] = json!(clock.to_string());
    }
    body["causal-metadata"] = json!(clock.to_string());
    body["shard-id"] = shard_id(front, shard);
    body
}

fn missing(method: &str) -> Refused {
    let error = format!("Error in {method}");
    Refused(StatusCode::NOT_FOUND, json!({"doesExist": false, "error": "Key does not exist", "message": error}))
}

/// The row of a key, with its version in the store.
async fn kept(
    store: &Store,
    keyspace: KeyspaceId,
    key: &str,
    ask: &Ask,
    method: &str,
) -> Result<Option<(Kept, u64)>, Refused> {
    let found = store.get(keyspace, key.as_bytes(), ask).await.map_err(|failure| Refused::failed(&failure, method))?;
    let Some(found) = found.row else { return Ok(None) };
    match Kept::decode(&found.value) {
        Some(kept) => Ok(Some((kept, found.version))),
        None => {
            let text = "the stored value cannot be read: it was not written by this interface";
            Err(Refused::new(StatusCode::INTERNAL_SERVER_ERROR, text, method))
        }
    }
}

async fn read(State(front): State<Front>, ask: Ask, uri: Uri, raw: Raw) -> Response {
    let work = async {
        let Asked { key, seen, .. } = asked(&uri, &raw, "GET")?;
        let keyspace = members::keyspace(&front.store, &ask).await.map_err(|f| Refused::failed(&f, "GET"))?;
        let found = kept(&front.store, keyspace, &key, &ask, "GET").await?;
        let (kept, _) = found.ok_or_else(|| missing("GET"))?;
        let shard = shard_of(&front.store, keyspace, &key);
        let body = json!({"doesExist": true, "message": "Retrieved successfully", "value": kept.value});
        Ok(json_answer(StatusCode::OK, &with_clock(&front, body, kept.clock.max(seen), shard)))
    };
    answer(Box::pin(work).await)
}

async fn write(State(front): State<Front>, ask: Ask, uri: Uri, raw: Raw) -> Response {
    let work = async {
        let Asked { key, mut body, seen } = asked(&uri, &raw, "PUT")?;
        let bad = |error: &str| Refused::new(StatusCode::BAD_REQUEST, error, "PUT");
        let value = body.remove("value").filter(|value| !value.is_null()).ok_or_else(|| bad("Value is missing"))?;
        if key.chars().count() > KEY_CHARS_MAX {
            return Err(bad("Key is too long"));
        }
        let keyspace = members::keyspace(&front.store, &ask).await.map_err(|f| Refused::failed(&f, "PUT"))?;
        loop {
            let before = kept(&front.store, keyspace, &key, &ask, "PUT").await?;
            let clock = clock_after(seen, before.as_ref().map(|(kept, _)| kept));
            let condition = before.as_ref().map_or(Condition::Absent, |(_, version)| Condition::Version(*version));
            let row = Kept { clock, value: value.clone() }.encode();
            match front.store.put(keyspace, key.as_bytes(), row, condition, &ask).await {
                Ok(_) => {
                    let (status, message) = match before {
                        None => (StatusCode::CREATED, "Added successfully"),
                        Some(_) => (StatusCode::OK, "Updated successfully"),
                    };
                    let body = json!({"message": message, "replaced": before.is_some()});
                    let shard = shard_of(&front.store, keyspace, &key);
                    return Ok(json_answer(status, &with_clock(&front, body, clock, shard)));
                }
                Err(Failure::Condition { .. }) if Instant::now() < ask.deadline => {} // another write came in between
                Err(failure) => return Err(Refused::failed(&failure, "PUT")),
            }
        }
    };
    answer(Box::pin(work).await)
}

async fn remove(State(front): State<Front>, ask: Ask, uri: Uri, raw: Raw) -> Response {
    let work = async {
        let Asked { key, seen, .. } = asked(&uri, &raw, "DELETE")?;
        let keyspace = members::keyspace(&front.store, &ask).await.map_err(|f| Refused::failed(&f, "DELETE"))?;
        loop {
            let found = kept(&front.store, keyspace, &key, &ask, "DELETE").await?;
            let (before, version) = found.ok_or_else(|| missing("DELETE"))?;
            let clock = clock_after(seen, Some(&before));
            match front.store.delete(keyspace, key.as_bytes(), Condition::Version(version), &ask).await {
                Ok(_) => {
                    let body = json!({"doesExist": true, "message": "Deleted successfully"});
                    let shard = shard_of(&front.store, keyspace, &key);
                    return Ok(json_answer(StatusCode::OK, &with_clock(&front, body, clock, shard)));
                }
                Err(Failure::Condition { .. }) if Instant::now() < ask.deadline => {} // another write came in between
                Err(failure) => return Err(Refused::failed(&failure, "DELETE")),
            }
        }
    };
    answer(Box::pin(work).await)
}

// ---------------------------------------------------------------------------------------------- view

async fn view(State(front): State<Front>, ask: Ask) -> Response {
    let work = async {
        let view = members::read(&front.store, &ask).await?.view(front.store.cluster());
        let body = json!({"message": "View retrieved successfully", "view": list(&front, &view)});
        Ok(json_answer(StatusCode::OK, &body))
    };
    answer(Box::pin(work).await)
}

/// The address that a request names.
fn address_in(raw: &Raw, method: &str) -> Result<String, Refused> {
    let bad = |error: &str| Refused::new(StatusCode::BAD_REQUEST, error, method);
    let body: Value = raw.json().map_err(|why| bad(&why))?;
    let address = body.get("socket-address").or_else(|| body.get("SA")).and_then(Value::as_str);
    let address = address.ok_or_else(|| bad("Socket address wasn't sent"))?;
    let is_address = address.len() <= 256
        && address.rsplit_once(':').is_some_and(|(host, port)| !host.is_empty() && port.parse::<u16>().is_ok())
        && !address.contains([',', ' ']);
    if is_address { Ok(address.to_owned()) } else { Err(bad("Socket address is not host:port")) }
}

async fn add_to_view(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let work = async {
        let address = address_in(&raw, "PUT")?;
        let cluster = front.store.cluster();
        members::change(&front.store, &ask, |members: &mut Members| {
            if members.view(cluster).contains(&address) {
                return Err(Refused::new(StatusCode::NOT_FOUND, "Socket address already exists in the view", "PUT"));
            }
            members.hidden.retain(|one| *one != address);
            members.nodes.entry(address.clone()).or_default();
            Ok(())
        })
        .await?;
        Ok(json_answer(StatusCode::CREATED, &json!({"message": "Replica added successfully to the view"})))
    };
    answer(Box::pin(work).await)
}

async fn remove_from_view(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let work = async {
        let address = address_in(&raw, "DELETE")?;
        let cluster = front.store.cluster();
        members::change(&front.store, &ask, |members: &mut Members| {
            if !members.view(cluster).contains(&address) {
                return Err(Refused::new(StatusCode::NOT_FOUND, "Socket address does not exist in the view", "DELETE"));
            }
            if members.nodes.get(&address) == Some(&None) {
                members.nodes.remove(&address);
            } else {
                members.hidden.push(address.clone());
            }
            Ok(())
        })
        .await?;
        Ok(json_answer(StatusCode::OK, &json!({"message": "Replica deleted successfully from the view"})))
    };
    answer(Box::pin(work).await)
}

// ---------------------------------------------------------------------------------------------- shards

/// The members of each shard.
async fn shards(front: &Front, ask: &Ask) -> Result<(KeyspaceId, Members, Vec<Vec<String>>), Refused> {
    let keyspace = members::keyspace(&front.store, ask).await?;
    let members = members::read(&front.store, ask).await?;
    let shards = members.by_shard(front.store.cluster(), keyspace);
    Ok((keyspace, members, shards))
}

/// The number of a shard, from 0, as a path names it.
fn shard_at(id: &str, count: usize, method: &str) -> Result<usize, Refused> {
    let at = id.parse::<usize>().ok().filter(|id| (1..=count).contains(id)).map(|id| id - 1);
    at.ok_or_else(|| Refused::new(StatusCode::NOT_FOUND, &format!("Shard {id} does not exist"), method))
}

async fn shard_ids(State(front): State<Front>, ask: Ask) -> Response {
    let work = async {
        let (_, _, shards) = shards(&front, &ask).await?;
        let ids = match front.dialects.kvs {
            KvsDialect::Of2019 => list(&front, &(1..=shards.len()).map(|id| id.to_string()).collect::<Vec<_>>()),
            KvsDialect::Of2020 => json!((1..=shards.len()).collect::<Vec<_>>()),
        };
        Ok(json_answer(StatusCode::OK, &json!({"message": "Shard IDs retrieved successfully", "shard-ids": ids})))
    };
    answer(Box::pin(work).await)
}

async fn node_shard_id(State(front): State<Front>, ask: Ask) -> Response {
    let work = async {
        let (_, members, shards) = shards(&front, &ask).await?;
        let routes = front.store.routes();
        let nodes = &routes.map().nodes;
        // At the balancer's listener the first node speaks.
        let this = nodes
            .iter()
            .filter(|node| front.this.as_deref().is_none_or(|this| *this == node.name))
            .min_by_key(|node| &node.name);
        let address = this.map(|node| members.address_of(node)).unwrap_or_default();
        let at = shards.iter().position(|shard| shard.contains(&address));
        let id = at.map_or_else(|| json!("None"), |at| shard_id(&front, at));
        let body = json!({"message": "Shard ID of the node retrieved successfully", "shard-id": id});
        Ok(json_answer(StatusCode::OK, &body))
    };
    answer(Box::pin(work).await)
}

async fn shard_members(State(front): State<Front>, Path(id): Path<String>, ask: Ask) -> Response {
    let work = async {
        let (_, _, shards) = shards(&front, &ask).await?;
        let members = &shards[shard_at(&id, shards.len(), "GET")?];
        let message = "Members of shard ID retrieved successfully";
        Ok(json_answer(StatusCode::OK, &json!({"message": message, "shard-id-members": list(&front, members)})))
    };
    answer(Box::pin(work).await)
}

async fn key_count(State(front): State<Front>, Path(id): Path<String>, ask: Ask) -> Response {
    let work = async {
        let (keyspace, _, shards) = shards(&front, &ask).await?;
        let at = shard_at(&id, shards.len(), "GET")?;
        let shard = members::parts(front.store.routes().map(), keyspace).get(at).map(|shard| shard.id);
        let mut scan = Scan {
            keyspace,
            start: vec![],
            end: None,
            reverse: false,
            keys_only: true,
            rows_max: 0,
            bytes_max: 0,
            consistency: Consistency::Linearizable,
            with: vec![],
        };
        let mut count = 0;
        loop {
            let page = front.store.scan(&scan, shard, &ask).await?;
            count += page.rows.len();
            match page.next {
                None => break,
                Some(next) => scan = scan.resumed(next),
            }
        }
        let message = "Key count of shard ID retrieved successfully";
        Ok(json_answer(StatusCode::OK, &json!({"message": message, "shard-id-key-count": count})))
    };
    answer(Box::pin(work).await)
}

async fn add_member(State(front): State<Front>, Path(id): Path<String>, raw: Raw) -> Response {
    let ask = Ask::within(MEMBER_TIME_MAX);
    let work = async {
        let address = address_in(&raw, "PUT")?;
        let (keyspace, _, now) = shards(&front, &ask).await?;
        let at = shard_at(&id, now.len(), "PUT")?;
        let refused = |status, error: &str| Refused::new(status, error, "PUT");
        let left = members::change(&front.store, &ask, |members: &mut Members| {
            if members.nodes.get(&address).is_none_or(Option::is_none) {
                return Err(refused(StatusCode::NOT_FOUND, "Socket address is not that of a node"));
            }
            if members.shards.is_empty() {
                members.shards.clone_from(&now);
            }
            let before = members.shards.iter().position(|shard| shard.contains(&address));
            if before == Some(at) && !members::is_settled(&front.store, keyspace, members, at, &address) {
                return Ok(None); // an earlier request has not come to its end: this one goes on
            }
            if before == Some(at) {
                return Err(refused(StatusCode::NOT_FOUND, &format!("Node already in shard {id}")));
            }
            if let Some(before) = before {
                if members.shards[before].len() <= 2 {
                    let text = format!("Shard {} would have less than two members", before + 1);
                    return Err(refused(StatusCode::BAD_REQUEST, &text));
                }
                members.shards[before].retain(|one| *one != address);
            }
            members.shards[at].push(address.clone());
            members.shards[at].sort();
            Ok(before)
        })
        .await?;
        members::settle(&front.store, at, &ask).await?;
        if let Some(left) = left {
            members::settle(&front.store, left, &ask).await?;
        }
        Ok(json_answer(StatusCode::OK, &json!({"message": format!("Member added to shard {id}")})))
    };
    answer(Box::pin(work).await)
}

async fn reshard(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    let work = async {
        let bad = |error: &str| Refused::new(StatusCode::BAD_REQUEST, error, "PUT");
        let body: Value = raw.json().map_err(|why| bad(&why))?;
        let count = body.get("shard-count").and_then(Value::as_u64).filter(|count| *count > 0);
        let count = count.ok_or_else(|| bad("shard-count must be a number above 0"))?;
        let nodes = members::read(&front.store, &ask).await?.view(front.store.cluster()).len() as u64;
        if nodes < count.saturating_mul(2) {
            let text = "Not enough nodes to provide fault-tolerance with the given shard count!";
            return Err(Refused(StatusCode::BAD_REQUEST, json!({"message": text})));
        }
        let text = "a store whose shards hold keys cannot be cut anew yet";
        Err(Refused::new(StatusCode::NOT_IMPLEMENTED, text, "PUT"))
    };
    answer(Box::pin(work).await)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_comes_back_and_foreign_bytes_are_refused() {
        let kept = Kept { clock: 1 << 50, value: json!({"a": [1, "x", null, 2.5]}) };
        let bytes = kept.encode();
        assert_eq!(Kept::decode(&bytes), Some(kept));
        for cut in 0..bytes.len() {
            assert_eq!(Kept::decode(&bytes[..cut]), None, "cut at {cut}");
        }
        assert_eq!(Kept::decode(b"something else"), None);
    }

    #[test]
    fn a_clock_is_later_than_all_that_it_depends_on() {
        let ahead = now_us() + 5_000_000;
        let before = Kept { clock: ahead + 7, value: json!(1) };
        assert_eq!(clock_after(ahead, None), ahead + 1);
        assert_eq!(clock_after(ahead, Some(&before)), ahead + 8);
        assert!(clock_after(0, None) > ahead - 6_000_000);
    }
}
