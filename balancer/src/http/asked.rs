//! What requests carry: bodies within their bounds, query parameters, and the headers that say how fresh and how fast.
//!
//! Nothing here trusts a Content-Type: a body is what it parses as.

#![expect(clippy::disallowed_methods, reason = "a shell: a deadline counts from now")]

use crate::http::answer::Envelope;
use crate::http::{Front, store::Ask};
use axum::body::to_bytes;
use axum::extract::{FromRequest, FromRequestParts, Request};
use axum::http::request::Parts;
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::Response;
use bytes::Bytes;
use serde::de::DeserializeOwned;
use shkv_proto::ShardId;
use shkv_proto::limits::{DEADLINE_MS_MAX, VALUE_BYTES_MAX};
use shkv_proto::message::Consistency;
use std::collections::BTreeMap;
use std::time::Duration;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;

/// Longest body of a request: the longest value.
pub(crate) const BODY_BYTES_MAX: usize = VALUE_BYTES_MAX;
/// Most memory that one body may take when it is parsed.
const PARSED_BYTES_MAX: usize = 192 << 20;
const _: () = assert!(PARSED_BYTES_MAX <= crate::http::PARSED_KIB_MAX << 10);
/// Where bodies are taken as they are.
const RAW_PATHS: &str = "/v1/kv/";
/// What a parsed value takes beside its bytes: a node of a tree for an object, room for four elements for a list, the place of
/// a field in a tree and of an element in a list that may be twice as long as it needs and is being moved, and half of the
/// least that an allocator gives for a text, which has two quotes.
const OBJECT_BYTES: usize = 640;
const LIST_BYTES: usize = 128;
const FIELD_BYTES: usize = 144;
const ELEMENT_BYTES: usize = 96;
const TEXT_BYTES: usize = 16;
/// How long a body may take to arrive.
const BODY_TIME_MAX: Duration = Duration::from_secs(60);
/// How long a request waits that names no deadline.
const DEADLINE_DEFAULT: Duration = Duration::from_secs(10);
/// How fresh a read must be: `linearizable`, `causal` or `eventual`.
pub(crate) const CONSISTENCY: &str = "shkv-consistency";
/// What the caller has seen: `shard:revision`, separated by commas.
pub(crate) const TOKEN: &str = "shkv-token";
/// How many milliseconds the caller waits.
pub(crate) const DEADLINE: &str = "shkv-deadline-ms";
/// Most shards that a token may name.
const TOKEN_SHARDS_MAX: usize = 10_000;

/// The body of a request. It holds its share of the memory for bodies until it is dropped.
#[derive(Debug)]
pub(crate) struct Raw {
    /// The bytes.
    pub(crate) bytes: Bytes,
    room: Room,
}

/// A share of the memory for bodies: for the bytes, and for what they become as JSON.
#[derive(Debug)]
pub(crate) struct Room {
    _bytes: OwnedSemaphorePermit,
    _parsed: OwnedSemaphorePermit,
}

impl FromRequest<Front> for Raw {
    type Rejection = Response;

    async fn from_request(request: Request, front: &Front) -> Result<Self, Response> {
        let envelope = Envelope::of(request.uri().path());
        let too_large = || {
            let text = format!("the body is larger than {BODY_BYTES_MAX} bytes");
            envelope.problem(StatusCode::PAYLOAD_TOO_LARGE, &text)
        };
        let announced = request.headers().get(header::CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let announced = announced.and_then(|length| length.parse::<usize>().ok());
        if announced.is_some_and(|length| length > BODY_BYTES_MAX) {
            return Err(too_large());
        }
        let kib = announced.unwrap_or(BODY_BYTES_MAX).div_ceil(1024) as u32;
        let is_json = !request.uri().path().starts_with(RAW_PATHS);
        let stopping = || envelope.problem(StatusCode::SERVICE_UNAVAILABLE, "the server is stopping");
        let reading = async {
            let room = front.bodies.clone().acquire_many_owned(kib.max(1)).await.map_err(|_| stopping())?;
            let bytes = match to_bytes(request.into_body(), BODY_BYTES_MAX).await {
                Ok(bytes) => bytes,
                Err(error) if announced.is_none() && is_length(&error) => return Err(too_large()),
                Err(error) => {
                    let text = format!("the body does not arrive whole: {error}");
                    return Err(envelope.problem(StatusCode::BAD_REQUEST, &text));
                }
            };
            let parsed = if is_json { parsed_bytes(&bytes) } else { 0 };
            if parsed > PARSED_BYTES_MAX {
                let text = "the body has too many parts: send it in several requests";
                return Err(envelope.problem(StatusCode::PAYLOAD_TOO_LARGE, text));
            }
            // Whoever has room for the parsed body waits for none for bytes, so that nobody waits in a circle.
            let kib = parsed.div_ceil(1024) as u32;
            let parsed = front.parsed.clone().acquire_many_owned(kib).await.map_err(|_| stopping())?;
            Ok(Self { bytes, room: Room { _bytes: room, _parsed: parsed } })
        };
        let late = |_| envelope.problem(StatusCode::REQUEST_TIMEOUT, "the body takes too long to arrive");
        tokio::time::timeout(BODY_TIME_MAX, reading).await.map_err(late)?
    }
}

/// The memory that a body takes at most when it is parsed as any JSON: its parts are small, and what holds them is not.
fn parsed_bytes(body: &[u8]) -> usize {
    let (mut bytes, mut in_text, mut escaped) = (body.len(), false, false);
    for byte in body {
        match byte {
            _ if escaped => escaped = false,
            b'\\' => escaped = in_text,
            b'"' => {
                in_text = !in_text;
                bytes += TEXT_BYTES;
            }
            _ if in_text => {}
            b'{' => bytes += OBJECT_BYTES,
            b'[' => bytes += LIST_BYTES,
            b':' => bytes += FIELD_BYTES,
            b',' => bytes += ELEMENT_BYTES,
            _ => {}
        }
    }
    bytes
}

/// Whether a body was given up because it is longer than it may be.
fn is_length(error: &axum::Error) -> bool {
    error.to_string().contains("length limit")
}

impl Raw {
    /// What the body says in JSON.
    ///
    /// # Errors
    /// In words, what is wrong with it.
    pub(crate) fn json<T: DeserializeOwned>(&self) -> Result<T, String> {
        serde_json::from_slice(&self.bytes).map_err(|error| {
            let what = if error.is_data() { "the body is not as it should be" } else { "the body is not JSON" };
            format!("{what}: {error}")
        })
    }
}

/// The body of a request in JSON, whatever its Content-Type says, and its share of the memory, which is held as long as it.
#[derive(Debug)]
pub(crate) struct Read<T>(pub(crate) T, pub(crate) Room);

impl<T: DeserializeOwned> FromRequest<Front> for Read<T> {
    type Rejection = Response;

    async fn from_request(request: Request, front: &Front) -> Result<Self, Response> {
        let envelope = Envelope::of(request.uri().path());
        let raw = Raw::from_request(request, front).await?;
        match raw.json() {
            Ok(body) => Ok(Self(body, raw.room)),
            Err(text) => Err(envelope.problem(StatusCode::BAD_REQUEST, &text)),
        }
    }
}

/// The parameters behind the question mark; values are raw bytes.
#[derive(Clone, Debug, Default)]
pub(crate) struct Query(pub(crate) BTreeMap<String, Vec<u8>>);

impl FromRequestParts<Front> for Query {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &Front) -> Result<Self, Response> {
        let envelope = Envelope::of(parts.uri.path());
        Self::parse(parts.uri.query().unwrap_or_default())
            .map_err(|text| envelope.problem(StatusCode::BAD_REQUEST, &text))
    }
}

impl Query {
    fn parse(query: &str) -> Result<Self, String> {
        let mut found = BTreeMap::new();
        for pair in query.split('&').filter(|pair| !pair.is_empty()) {
            let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
            let name = String::from_utf8(percent_decoded(&name.replace('+', " "))?)
                .map_err(|_| "the name of a query parameter is not UTF-8".to_owned())?;
            let value = percent_decoded(&value.replace('+', " "))?;
            if found.insert(name.clone(), value).is_some() {
                return Err(format!("the query parameter {name:?} is given twice"));
            }
        }
        Ok(Self(found))
    }

    /// Takes a parameter out.
    pub(crate) fn take(&mut self, name: &str) -> Option<Vec<u8>> {
        self.0.remove(name)
    }

    /// Takes a parameter out that must be text of some form.
    ///
    /// # Errors
    /// In words, that it is not.
    pub(crate) fn parsed<T: std::str::FromStr>(&mut self, name: &str) -> Result<Option<T>, String> {
        let Some(bytes) = self.take(name) else { return Ok(None) };
        let parsed = std::str::from_utf8(&bytes).ok().and_then(|text| text.parse().ok());
        match parsed {
            Some(parsed) => Ok(Some(parsed)),
            None => Err(format!("the query parameter {name:?} cannot be {:?}", String::from_utf8_lossy(&bytes))),
        }
    }

    /// Refuses parameters that nobody has taken.
    ///
    /// # Errors
    /// In words, which there are.
    pub(crate) fn finish(self) -> Result<(), String> {
        match self.0.into_keys().next() {
            None => Ok(()),
            Some(name) => Err(format!("there is no query parameter {name:?} here")),
        }
    }
}

/// The bytes that a part of a path or of a query stands for.
///
/// # Errors
/// In words, that a percent sign is not followed by two hexadecimal digits.
pub(crate) fn percent_decoded(text: &str) -> Result<Vec<u8>, String> {
    let mut rest = text.as_bytes();
    let mut bytes = Vec::with_capacity(rest.len());
    while let [first, more @ ..] = rest {
        if *first != b'%' {
            bytes.push(*first);
            rest = more;
            continue;
        }
        let digit = |at: usize| more.get(at).and_then(|digit| (*digit as char).to_digit(16));
        let (Some(high), Some(low)) = (digit(0), digit(1)) else {
            return Err("a percent sign must be followed by two hexadecimal digits".into());
        };
        bytes.push((high * 16 + low) as u8);
        rest = &more[2..];
    }
    Ok(bytes)
}

impl FromRequestParts<Front> for Ask {
    type Rejection = Response;

    async fn from_request_parts(parts: &mut Parts, _: &Front) -> Result<Self, Response> {
        let envelope = Envelope::of(parts.uri.path());
        ask_of(&parts.headers).map_err(|text| envelope.problem(StatusCode::BAD_REQUEST, &text))
    }
}

fn ask_of(headers: &HeaderMap) -> Result<Ask, String> {
    let named = |name: &str| {
        let value = headers.get(name).map(|value| value.to_str());
        value.transpose().map_err(|_| format!("the header {name} is not ASCII text"))
    };
    let within = match named(DEADLINE)? {
        None => DEADLINE_DEFAULT,
        Some(text) => {
            let ms = text.trim().parse().ok().filter(|ms| (1..=DEADLINE_MS_MAX).contains(ms));
            let ms: u32 = ms.ok_or_else(|| {
                format!("the header {DEADLINE} is a number of milliseconds from 1 to {DEADLINE_MS_MAX}, not {text:?}")
            })?;
            Duration::from_millis(u64::from(ms))
        }
    };
    let seen = named(TOKEN)?.map_or_else(|| Ok(BTreeMap::new()), token_of)?;
    let consistency = match named(CONSISTENCY)?.map(str::trim) {
        None | Some("linearizable") => Consistency::Linearizable,
        Some("causal") => Consistency::Causal { revision: 0 },
        Some("eventual") => Consistency::Eventual,
        Some(other) => {
            return Err(format!("the header {CONSISTENCY} is linearizable, causal or eventual, not {other:?}"));
        }
    };
    Ok(Ask { deadline: Instant::now() + within, consistency, seen })
}

fn token_of(text: &str) -> Result<BTreeMap<ShardId, u64>, String> {
    let mut seen = BTreeMap::new();
    for part in text.split(',').map(str::trim).filter(|part| !part.is_empty()) {
        let pair =
            part.split_once(':').and_then(|(shard, revision)| Some((shard.parse().ok()?, revision.parse().ok()?)));
        let (shard, revision): (u32, u64) =
            pair.ok_or_else(|| format!("the header {TOKEN} is shard:revision, separated by commas, not {part:?}"))?;
        let known = seen.entry(ShardId(shard)).or_insert(revision);
        *known = revision.max(*known);
        if seen.len() > TOKEN_SHARDS_MAX {
            return Err(format!("the header {TOKEN} names more than {TOKEN_SHARDS_MAX} shards"));
        }
    }
    Ok(seen)
}

/// A token as it is told.
pub(crate) fn token_text(seen: &BTreeMap<ShardId, u64>) -> String {
    seen.iter().map(|(shard, revision)| format!("{}:{revision}", shard.0)).collect::<Vec<_>>().join(",")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_can_be_written_in_a_path() {
        assert_eq!(percent_decoded("a%2Fb%00%ff"), Ok(b"a/b\0\xff".to_vec()));
        assert_eq!(percent_decoded("a+b"), Ok(b"a+b".to_vec()));
        for bad in ["%", "%4", "%zz", "a%2"] {
            assert!(percent_decoded(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn parts_are_counted_and_what_stands_in_a_text_is_not() {
        assert_eq!(parsed_bytes(b"7"), 1);
        assert_eq!(parsed_bytes(br#""{[,:\"{[\\""#), 12 + 2 * TEXT_BYTES);
        assert_eq!(
            parsed_bytes(br#"{"a":[1,2]}"#),
            11 + OBJECT_BYTES + 2 * TEXT_BYTES + FIELD_BYTES + LIST_BYTES + ELEMENT_BYTES
        );
        let value = size_of::<serde_json::Value>();
        assert!(LIST_BYTES >= 4 * value && ELEMENT_BYTES >= 3 * value, "{value} bytes");
        assert!(OBJECT_BYTES >= 11 * (value + size_of::<String>()), "a node of the tree has room for eleven");
    }

    #[test]
    fn a_query_is_taken_whole_or_refused() {
        let mut query = Query::parse("prefix=a%2F&limit=3&reverse").unwrap();
        assert_eq!(query.take("prefix").as_deref(), Some(&b"a/"[..]));
        assert_eq!(query.parsed::<u32>("limit"), Ok(Some(3)));
        assert_eq!(query.clone().finish(), Err("there is no query parameter \"reverse\" here".into()));
        assert!(query.parsed::<u32>("reverse").is_err());
        assert_eq!(query.finish(), Ok(()));
        assert!(Query::parse("a=1&a=2").is_err());
    }

    #[test]
    fn a_token_is_read_as_it_was_told() {
        let seen = token_of("3:17, 4:9,3:12").unwrap();
        assert_eq!(token_text(&seen), "3:17,4:9");
        for bad in ["3", "3:", "a:1", "3:1:2", "-1:2"] {
            assert!(token_of(bad).is_err(), "{bad}");
        }
    }
}
