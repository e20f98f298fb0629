//! Our own routes: rows by keyspace and key, lists of rows, and what the cluster looks like.
//!
//! Keys and values are raw bytes. A row's version is its ETag; conditions are the ones that HTTP has.

use crate::http::Front;
use crate::http::answer::{Envelope, empty_answer, json_answer, json_bytes};
use crate::http::asked::{Query, Raw, TOKEN, percent_decoded, token_part, token_text};
use crate::http::store::{Ask, Page};
use crate::http::stream::{self, Pieces};
use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri, header};
use axum::response::Response;
use axum::routing::get;
use base64::Engine;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::{Map, Value, json};
use shkv_proto::ShardId;
use shkv_proto::limits::{KEY_BYTES_MAX, PAGE_BYTES_DEFAULT};
use shkv_proto::message::{Condition, Consistency, Failure, Scan};
use std::io;

/// Rows of a list when the caller names no limit.
const LIMIT_DEFAULT: u64 = 1_000;
/// Rows of one page of the store while a list is written.
const PAGE_ROWS: u64 = 1_000;

/// `/v1/kv/{keyspace}/{key}`, `/v1/kv/{keyspace}`.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
        .route("/v1/kv/{keyspace}", get(list))
        .route("/v1/kv/{keyspace}/", get(list))
        .route("/v1/kv/{keyspace}/{*key}", get(read).put(write).delete(remove))
}

fn bad(text: &str) -> Response {
    Envelope::Own.problem(StatusCode::BAD_REQUEST, text)
}

/// The keyspace and the key of a path, from its raw text: the key is all that follows, and `%2F` is a slash in it.
fn place(uri: &Uri) -> Result<(String, Vec<u8>), String> {
    let rest = uri.path().strip_prefix("/v1/kv/").unwrap_or_default();
    let (keyspace, key) = rest.split_once('/').unwrap_or((rest, ""));
    let keyspace = String::from_utf8(percent_decoded(keyspace)?).map_err(|_| "the keyspace is not UTF-8".to_owned())?;
    let key = percent_decoded(key)?;
    if key.len() > KEY_BYTES_MAX {
        return Err(format!("the key is {} bytes long, at most {KEY_BYTES_MAX} can be", key.len()));
    }
    Ok((keyspace, key))
}

// ---------------------------------------------------------------------------------------------- conditions

/// What `If-Match` and `If-None-Match` say.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Wanted {
    Always,
    Matches(Option<u64>),
    MatchesNot(Option<u64>),
}

fn wanted(headers: &HeaderMap) -> Result<Wanted, String> {
    let of = |name: HeaderName| {
        let Some(value) = headers.get(&name) else { return Ok(None) };
        let text = value.to_str().unwrap_or_default().trim();
        let version = text.strip_prefix('"').and_then(|text| text.strip_suffix('"')).and_then(|text| text.parse().ok());
        match (text, version) {
            ("*", _) => Ok(Some(None)),
            (_, Some(version)) => Ok(Some(Some(version))),
            _ => Err(format!("the header {name} is * or a version in quotes, not {text:?}")),
        }
    };
    match (of(header::IF_MATCH)?, of(header::IF_NONE_MATCH)?) {
        (None, None) => Ok(Wanted::Always),
        (Some(version), None) => Ok(Wanted::Matches(version)),
        (None, Some(version)) => Ok(Wanted::MatchesNot(version)),
        (Some(_), Some(_)) => Err("name If-Match or If-None-Match, not both".into()),
    }
}

fn condition(headers: &HeaderMap) -> Result<Condition<'static>, String> {
    match wanted(headers)? {
        Wanted::Always => Ok(Condition::Always),
        Wanted::Matches(None) => Ok(Condition::Present),
        Wanted::Matches(Some(version)) => Ok(Condition::Version(version)),
        Wanted::MatchesNot(None) => Ok(Condition::Absent),
        Wanted::MatchesNot(Some(_)) => Err("If-None-Match can only be * when something is written".into()),
    }
}

fn etag(version: u64) -> HeaderValue {
    HeaderValue::try_from(format!("\"{version}\"")).unwrap_or_else(|_| HeaderValue::from_static("\"\""))
}

/// Adds what the caller has now seen.
fn with_token(mut answer: Response, ask: &Ask, more: &[(ShardId, u64)]) -> Response {
    let text = match more {
        // What nearly all have: no map is made of it.
        [(shard, revision)] if ask.seen.is_empty() => token_part(*shard, *revision),
        _ => {
            let mut seen = ask.seen.clone();
            for (shard, revision) in more {
                let known = seen.entry(*shard).or_insert(*revision);
                *known = (*known).max(*revision);
            }
            token_text(&seen)
        }
    };
    if let Ok(token) = HeaderValue::try_from(text) {
        answer.headers_mut().insert(HeaderName::from_static(TOKEN), token);
    }
    answer
}

/// A failure of the store; that of a condition tells the row's version.
pub(crate) fn failed(failure: &Failure) -> Response {
    let Failure::Condition { operation, version } = failure else { return Envelope::Own.failure(failure) };
    let mut body = Envelope::Own.body("condition", &failure.to_string());
    body["error"]["operation"] = json!(operation);
    body["error"]["version"] = json!(version);
    let mut answer = json_answer(StatusCode::PRECONDITION_FAILED, &body);
    if let Some(version) = version {
        answer.headers_mut().insert(header::ETAG, etag(*version));
    }
    answer
}

// ---------------------------------------------------------------------------------------------- one row

/// It takes the request as it is: each part that a handler asks for by itself is a copy.
async fn read(State(front): State<Front>, request: Request) -> Response {
    let (head, _) = request.into_parts();
    let asked = place(&head.uri).and_then(|place| Ok((place, wanted(&head.headers)?, Ask::in_headers(&head.headers)?)));
    let ((keyspace, key), wanted, ask) = match asked {
        Ok(asked) => asked,
        Err(text) => return bad(&text),
    };
    let found = match front.store.keyspace(&keyspace) {
        Ok(keyspace) => front.store.get(keyspace, &key, &ask).await,
        Err(failure) => Err(failure),
    };
    let found = match found {
        Ok(found) => found,
        Err(failure) => return failed(&failure),
    };
    let version = found.row.as_ref().map(|row| row.version);
    let matches = |wanted: Option<u64>| wanted.map_or(version.is_some(), |wanted| version == Some(wanted));
    let mut answer = match (found.row, wanted) {
        (_, Wanted::Matches(wanted)) if !matches(wanted) => failed(&Failure::Condition { operation: 0, version }),
        (None, _) => Envelope::Own.problem(StatusCode::NOT_FOUND, "there is no such row"),
        (Some(_), Wanted::MatchesNot(wanted)) if matches(wanted) => empty_answer(StatusCode::NOT_MODIFIED),
        (Some(row), _) => {
            let length = row.value.len();
            let is_head = head.method == Method::HEAD;
            let mut answer = Response::new(if is_head { Body::empty() } else { Body::from(row.value) });
            let octets = HeaderValue::from_static("application/octet-stream");
            answer.headers_mut().insert(header::CONTENT_TYPE, octets);
            answer.headers_mut().insert(header::CONTENT_LENGTH, HeaderValue::from(length));
            answer
        }
    };
    if let Some(version) = version {
        answer.headers_mut().insert(header::ETAG, etag(version));
    }
    with_token(answer, &ask, &[(found.shard, found.revision)])
}

async fn write(State(front): State<Front>, uri: Uri, headers: HeaderMap, ask: Ask, raw: Raw) -> Response {
    let ((keyspace, key), condition) = match (place(&uri), condition(&headers)) {
        (Ok(place), Ok(condition)) => (place, condition),
        (Err(text), _) | (_, Err(text)) => return bad(&text),
    };
    let done = match front.store.keyspace(&keyspace) {
        Ok(keyspace) => front.store.put(keyspace, &key, raw.bytes.clone(), condition, &ask).await,
        Err(failure) => Err(failure),
    };
    match done {
        Ok(done) => {
            let created = condition == Condition::Absent;
            let status = if created { StatusCode::CREATED } else { StatusCode::OK };
            let mut answer = json_answer(status, &json!({"version": done.revision}));
            answer.headers_mut().insert(header::ETAG, etag(done.revision));
            with_token(answer, &ask, &[(done.shard, done.revision)])
        }
        Err(failure) => failed(&failure),
    }
}

async fn remove(State(front): State<Front>, uri: Uri, headers: HeaderMap, ask: Ask) -> Response {
    let ((keyspace, key), condition) = match (place(&uri), condition(&headers)) {
        (Ok(place), Ok(condition)) => (place, condition),
        (Err(text), _) | (_, Err(text)) => return bad(&text),
    };
    let done = match front.store.keyspace(&keyspace) {
        Ok(keyspace) => front.store.delete(keyspace, &key, condition, &ask).await,
        Err(failure) => Err(failure),
    };
    match done {
        Ok(done) if done.removed == 0 => {
            let answer = Envelope::Own.problem(StatusCode::NOT_FOUND, "there is no such row");
            with_token(answer, &ask, &[(done.shard, done.revision)])
        }
        Ok(done) => {
            let answer = json_answer(StatusCode::OK, &json!({"removed": true}));
            with_token(answer, &ask, &[(done.shard, done.revision)])
        }
        Err(failure) => failed(&failure),
    }
}

// ---------------------------------------------------------------------------------------------- lists

/// Bytes under `name` as text, or under `name` with `_b64` if they are not UTF-8.
pub(crate) fn put_bytes(object: &mut Map<String, Value>, name: &str, bytes: &[u8]) {
    match std::str::from_utf8(bytes) {
        Ok(text) => object.insert(name.to_owned(), json!(text)),
        Err(_) => object.insert(format!("{name}_b64"), json!(STANDARD.encode(bytes))),
    };
}

/// What a list is to hold.
#[derive(Debug)]
struct Wish {
    scan: Scan,
    limit: u64,
}

/// The first key behind all that begin with `prefix`; `None` if none is.
fn behind(prefix: &[u8]) -> Option<Vec<u8>> {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if last < u8::MAX {
            end.push(last + 1);
            return Some(end);
        }
    }
    None
}

fn flag(query: &mut Query, name: &str) -> Result<bool, String> {
    match query.take(name).as_deref() {
        None | Some(b"false") => Ok(false),
        Some(b"" | b"true") => Ok(true),
        Some(other) => Err(format!("{name} is true or false, not {:?}", String::from_utf8_lossy(other))),
    }
}

fn wish(mut query: Query) -> Result<Wish, String> {
    let prefix = query.take("prefix").unwrap_or_default();
    let mut start = query.take("start").unwrap_or_default().max(prefix.clone());
    let mut end = query.take("end").filter(|end| !end.is_empty());
    if let Some(bound) = behind(&prefix) {
        end = Some(end.map_or(bound.clone(), |end| end.min(bound)));
    }
    let limit = query.parsed("limit")?.unwrap_or(LIMIT_DEFAULT);
    let reverse = flag(&mut query, "reverse")?;
    let keys_only = flag(&mut query, "keys_only")?;
    if let Some(cursor) = query.take("cursor") {
        let at = URL_SAFE_NO_PAD.decode(&cursor).map_err(|_| "the cursor is not one that was given".to_owned())?;
        if reverse {
            end = Some(end.map_or(at.clone(), |end| end.min(at)));
        } else {
            start = start.max(at);
        }
    }
    query.finish()?;
    if limit == 0 {
        return Err("limit is at least 1".into());
    }
    if [Some(&start), end.as_ref()].into_iter().flatten().any(|bound| bound.len() > KEY_BYTES_MAX + 1) {
        return Err(format!("a bound is longer than the longest key, {KEY_BYTES_MAX} bytes"));
    }
    let scan = Scan {
        keyspace: shkv_proto::KeyspaceId::SYSTEM,
        start,
        end,
        reverse,
        keys_only,
        rows_max: 0,
        bytes_max: PAGE_BYTES_DEFAULT as u32,
        consistency: Consistency::Linearizable,
        with: vec![],
    };
    Ok(Wish { scan, limit })
}

async fn list(State(front): State<Front>, uri: Uri, query: Query, ask: Ask) -> Response {
    let ((keyspace, _), mut wish) = match (place(&uri), wish(query)) {
        (Ok(place), Ok(wish)) => (place, wish),
        (Err(text), _) | (_, Err(text)) => return bad(&text),
    };
    wish.scan.keyspace = match front.store.keyspace(&keyspace) {
        Ok(keyspace) => keyspace,
        Err(failure) => return failed(&failure),
    };
    if wish.scan.end.as_ref().is_some_and(|end| *end <= wish.scan.start) {
        return json_answer(StatusCode::OK, &json!({"rows": [], "cursor": null}));
    }
    // The first page is read before the answer begins, so that a failure still has a status.
    wish.scan.rows_max = wish.limit.min(PAGE_ROWS) as u32;
    let first = match front.store.scan(&wish.scan, None, &ask).await {
        Ok(page) => page,
        Err(failure) => return failed(&failure),
    };
    let (pieces, body) = stream::body();
    let tasks = front.store.cluster().tasks.clone();
    tasks.spawn(async move { write_list(&front, wish, first, &ask, &pieces).await });
    json_bytes(StatusCode::OK, body)
}

/// Writes a list page by page until it has its rows, or the caller is gone. A page that fails ends the list with a
/// cursor, as its limit would: what was listed is right.
async fn write_list(front: &Front, mut wish: Wish, first: Page, ask: &Ask, pieces: &Pieces) {
    let mut page = first;
    let mut text = String::from("{\"rows\":[");
    let mut left = wish.limit;
    let mut is_first = true;
    let cursor = loop {
        left = left.saturating_sub(page.rows.len() as u64);
        for row in &page.rows {
            if !is_first {
                text.push(',');
            }
            is_first = false;
            let mut object = Map::new();
            put_bytes(&mut object, "key", &row.key);
            if !wish.scan.keys_only {
                put_bytes(&mut object, "value", &row.value);
            }
            object.insert("version".into(), json!(row.version));
            text.push_str(&Value::Object(object).to_string());
        }
        let Some(next) = page.next else { break None };
        if left == 0 {
            break Some(next);
        }
        if pieces.send(Ok(std::mem::take(&mut text).into())).await.is_err() {
            return;
        }
        wish.scan = wish.scan.resumed(next.clone());
        wish.scan.rows_max = left.min(PAGE_ROWS) as u32;
        page = match front.store.scan(&wish.scan, None, ask).await {
            Ok(page) => page,
            Err(failure) => {
                tracing::debug!(%failure, "a list ends early");
                break Some(next);
            }
        };
    };
    let cursor = cursor.map(|next| URL_SAFE_NO_PAD.encode(next));
    text.push_str(&format!("],\"cursor\":{}}}", json!(cursor)));
    let _: Result<(), tokio::sync::mpsc::error::SendError<Result<bytes::Bytes, io::Error>>> =
        pieces.send(Ok(text.into())).await; // the caller may be gone
}

#[cfg(test)]
mod tests {
    use super::*;

    fn query(pairs: &[(&str, &str)]) -> Query {
        let pair = |(name, value): &(&str, &str)| ((*name).to_owned(), value.as_bytes().to_vec());
        Query(pairs.iter().map(pair).collect())
    }

    #[test]
    fn a_prefix_is_a_range() {
        assert_eq!(behind(b"ab"), Some(b"ac".to_vec()));
        assert_eq!(behind(b"a\xff\xff"), Some(b"b".to_vec()));
        assert_eq!(behind(b"\xff"), None);
        assert_eq!(behind(b""), None);
        let wish = wish(query(&[("prefix", "ab"), ("start", "abc"), ("end", "b")])).unwrap();
        assert_eq!((&wish.scan.start[..], wish.scan.end.as_deref()), (&b"abc"[..], Some(&b"ac"[..])));
    }

    #[test]
    fn what_contradicts_itself_in_a_list_is_refused() {
        for bad in [("limit", "0"), ("limit", "x"), ("reverse", "2"), ("cursor", "*"), ("other", "")] {
            assert!(wish(query(&[bad])).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_path_names_a_keyspace_and_any_key() {
        let place = |path: &str| place(&path.parse().unwrap());
        assert_eq!(place("/v1/kv/default/a/b%2Fc%00"), Ok(("default".into(), b"a/b/c\0".to_vec())));
        assert_eq!(place("/v1/kv/a%20b/%ff"), Ok(("a b".into(), vec![0xff])));
        assert!(place("/v1/kv/default/%f").is_err());
        assert!(place(&format!("/v1/kv/default/{}", "k".repeat(KEY_BYTES_MAX + 1))).is_err());
    }

    #[test]
    fn conditions_are_those_of_http() {
        let headers = |name: &'static str, value: &'static str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, HeaderValue::from_static(value));
            headers
        };
        assert_eq!(condition(&headers("if-match", "\"7\"")), Ok(Condition::Version(7)));
        assert_eq!(condition(&headers("if-match", "*")), Ok(Condition::Present));
        assert_eq!(condition(&headers("if-none-match", "*")), Ok(Condition::Absent));
        assert_eq!(condition(&HeaderMap::new()), Ok(Condition::Always));
        for bad in [("if-match", "7"), ("if-match", "W/\"7\""), ("if-none-match", "\"7\""), ("if-match", "\"x\"")] {
            assert!(condition(&headers(bad.0, bad.1)).is_err(), "{bad:?}");
        }
    }
}
