//! What answers look like: each system's envelope for errors, and which status a failure of the store has.

use axum::body::Body;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use serde::Serialize;
use serde_json::{Value, json};
use shkv_proto::message::{Failure, RefusalCode};
use std::borrow::Cow;

/// The form of a JSON body.
const JSON: HeaderValue = HeaderValue::from_static("application/json");
/// Seconds after which to try again when the shard has no quorum: about an election.
const RETRY_AFTER_S: HeaderValue = HeaderValue::from_static("1");

/// Most bytes of an error's words: they may quote what was sent, and that may be as long as a body.
const MESSAGE_BYTES_MAX: usize = 1 << 10;

/// An error's words, cut where they become too long.
pub(crate) fn in_short(message: &str) -> Cow<'_, str> {
    if message.len() <= MESSAGE_BYTES_MAX {
        return message.into();
    }
    let cut = message.floor_char_boundary(MESSAGE_BYTES_MAX);
    format!("{} …", &message[..cut]).into()
}

/// The form that errors of a route have.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Envelope {
    /// Our own: `{"error":{"code","message"}}`.
    Own,
    /// The load balancer's and the sharded database's: `{"message","status":"failure"}`.
    Status,
    /// The causal store's: `{"error","message"}`.
    Causal,
    /// The batch proxy's: `{"error":true,"message"}`.
    Batch,
}

impl Envelope {
    /// The envelope of the system that owns a path.
    pub(crate) fn of(path: &str) -> Self {
        let under =
            |prefix: &str| path.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        if path.starts_with("/key-value-store") {
            Self::Causal
        } else if ["/set", "/fetch", "/query"].contains(&path) {
            Self::Batch
        } else if ["/v1", "/livez", "/readyz", "/metrics", "/openapi.json", "/docs"].into_iter().any(under) {
            Self::Own
        } else {
            Self::Status
        }
    }

    /// The body of an error.
    pub(crate) fn body(self, code: &str, message: &str) -> Value {
        let message = in_short(message);
        match self {
            Self::Own => json!({"error": {"code": code, "message": message}}),
            Self::Status => json!({"message": message, "status": "failure"}),
            Self::Causal => json!({"error": message, "message": "Error"}),
            Self::Batch => json!({"error": true, "message": message}),
        }
    }

    /// An error in words of our own.
    pub(crate) fn problem(self, status: StatusCode, message: &str) -> Response {
        let code = status.canonical_reason().unwrap_or("error").to_lowercase().replace([' ', '-'], "_");
        with_retry(json_answer(status, &self.body(&code, message)))
    }

    /// A failure of the store.
    pub(crate) fn failure(self, failure: &Failure) -> Response {
        let (status, code) = status_of(failure);
        with_retry(json_answer(status, &self.body(code, &failure.to_string())))
    }
}

fn with_retry(mut answer: Response) -> Response {
    if answer.status() == StatusCode::SERVICE_UNAVAILABLE {
        answer.headers_mut().insert(header::RETRY_AFTER, RETRY_AFTER_S);
    }
    answer
}

/// The status of a failure and its name for programs.
pub(crate) fn status_of(failure: &Failure) -> (StatusCode, &'static str) {
    match failure {
        Failure::Refusal { code, .. } => match code {
            RefusalCode::Malformed => (StatusCode::BAD_REQUEST, "malformed"),
            RefusalCode::KeyEmpty => (StatusCode::BAD_REQUEST, "key_empty"),
            RefusalCode::KeyTooLarge => (StatusCode::BAD_REQUEST, "key_too_large"),
            RefusalCode::ValueTooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "value_too_large"),
            RefusalCode::BatchLimits => (StatusCode::BAD_REQUEST, "batch_limits"),
            RefusalCode::UnknownKeyspace => (StatusCode::NOT_FOUND, "unknown_keyspace"),
            RefusalCode::WrongCluster => (StatusCode::CONFLICT, "wrong_cluster"),
            RefusalCode::Version => (StatusCode::BAD_REQUEST, "version"),
            RefusalCode::NotAllowed => (StatusCode::FORBIDDEN, "not_allowed"),
            RefusalCode::DiskFull => (StatusCode::INSUFFICIENT_STORAGE, "disk_full"),
            RefusalCode::NotBootstrapped => (StatusCode::SERVICE_UNAVAILABLE, "not_bootstrapped"),
            RefusalCode::Conflict => (StatusCode::CONFLICT, "conflict"),
            RefusalCode::NotFound => (StatusCode::NOT_FOUND, "not_found"),
            RefusalCode::Exists => (StatusCode::CONFLICT, "exists"),
            RefusalCode::WouldLose => (StatusCode::CONFLICT, "would_lose"),
            RefusalCode::Retired => (StatusCode::GONE, "retired"),
            RefusalCode::Unsupported => (StatusCode::NOT_IMPLEMENTED, "unsupported"),
            RefusalCode::Forgotten => (StatusCode::SERVICE_UNAVAILABLE, "unknown_outcome"),
        },
        Failure::Condition { .. } => (StatusCode::PRECONDITION_FAILED, "condition"),
        Failure::Aborted { .. } => (StatusCode::SERVICE_UNAVAILABLE, "aborted"),
        Failure::Unknown { .. } => (StatusCode::SERVICE_UNAVAILABLE, "unknown_outcome"),
        Failure::NotLeader { .. } | Failure::WrongShard { .. } | Failure::Busy { .. } | Failure::Behind { .. } => {
            (StatusCode::SERVICE_UNAVAILABLE, "unavailable")
        }
    }
}

/// An answer with a JSON body.
pub(crate) fn json_answer<T: Serialize>(status: StatusCode, body: &T) -> Response {
    match serde_json::to_vec(body) {
        Ok(bytes) => json_bytes(status, bytes),
        Err(error) => text_answer(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

/// An answer whose body is JSON already, or is streamed as such.
pub(crate) fn json_bytes(status: StatusCode, body: impl Into<Body>) -> Response {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, JSON);
    answer
}

/// An answer in plain words.
pub(crate) fn text_answer(status: StatusCode, text: impl Into<String>) -> Response {
    let mut answer = Response::new(Body::from(text.into()));
    *answer.status_mut() = status;
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    answer
}

/// An answer without a body.
pub(crate) fn empty_answer(status: StatusCode) -> Response {
    let mut answer = Response::new(Body::empty());
    *answer.status_mut() = status;
    answer
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_path_has_the_envelope_of_its_system() {
        let cases = [
            ("/v1/kv/a/b", Envelope::Own),
            ("/v1", Envelope::Own),
            ("/v1x", Envelope::Status),
            ("/key-value-store-view", Envelope::Causal),
            ("/key-value-store/x", Envelope::Causal),
            ("/set", Envelope::Batch),
            ("/home", Envelope::Status),
            ("/init", Envelope::Status),
        ];
        for (path, envelope) in cases {
            assert_eq!(Envelope::of(path), envelope, "{path}");
        }
    }

    #[test]
    fn an_error_is_short_however_long_what_it_quotes() {
        assert_eq!(in_short("short"), "short");
        for letter in ["a", "é", "€", "😀"] {
            let text = in_short(&letter.repeat(MESSAGE_BYTES_MAX)).into_owned();
            assert!(text.len() < MESSAGE_BYTES_MAX + 8 && text.starts_with(letter), "{text}");
        }
    }

    #[test]
    fn what_may_have_been_done_is_told_as_unknown() {
        let (status, code) = status_of(&Failure::unknown("lost"));
        assert_eq!((status, code), (StatusCode::SERVICE_UNAVAILABLE, "unknown_outcome"));
        let answer = Envelope::Own.failure(&Failure::unknown("lost"));
        assert_eq!(answer.headers()[header::RETRY_AFTER], "1");
    }
}
