//! What holds for every request: an id, a line in the log, an answer in the envelope of its route also when a handler
//! panics, when nothing is there or when the method is another, and gzip for large answers.

#![expect(clippy::disallowed_methods, reason = "a shell: measures how long a request takes")]

use crate::http::answer::Envelope;
use axum::Router;
use axum::extract::{Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::Response;
use std::any::Any;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower_http::catch_panic::CatchPanicLayer;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::SizeAbove;

/// By which a request is found in the log: the caller's, or one of ours.
const REQUEST_ID: &str = "x-request-id";
/// Longest id that is taken from a caller.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Answers from this size on are compressed for those who accept it. A streamed answer, whose size is not known, is too.
const GZIP_BYTES_MIN: u16 = 4 << 10;
/// Of so many places for connections one is kept free: beyond, a connection ends with its answer.
const SPARE_PART: usize = 8;

/// The places for connections of a listener.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    /// Those that are free.
    pub(crate) room: Arc<Semaphore>,
    /// How many there are.
    pub(crate) most: usize,
}

/// Puts the manners around all routes.
pub(crate) fn around(router: Router, room: Room) -> Router {
    let ids = Arc::new(Ids { first: rand::random(), next: AtomicU64::new(0) });
    router
        .layer(from_fn(in_its_envelope))
        .layer(CatchPanicLayer::custom(panicked))
        .layer(from_fn(in_its_envelope)) // once more, for what a panic has left
        .layer(CompressionLayer::new().compress_when(SizeAbove::new(GZIP_BYTES_MIN)))
        .layer(from_fn_with_state((ids, room), told))
}

#[derive(Debug)]
struct Ids {
    first: u32,
    next: AtomicU64,
}

/// Gives the request its id, and tells of it when it is answered.
async fn told(State((ids, room)): State<(Arc<Ids>, Room)>, request: Request, next: Next) -> Response {
    let begun = Instant::now();
    let theirs = request.headers().get(REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_BYTES_MAX).cloned();
    let ours = || format!("{:08x}-{}", ids.first, ids.next.fetch_add(1, Ordering::Relaxed));
    let id = theirs.or_else(|| HeaderValue::from_str(&ours()).ok());
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let mut answer = next.run(request).await;
    tracing::debug!(target: "shkv::access", %method, path = uri.path(), status = answer.status().as_u16(),
        us = begun.elapsed().as_micros() as u64, id = id.as_ref().and_then(|id| id.to_str().ok()), "answered");
    if let Some(id) = id {
        answer.headers_mut().insert(REQUEST_ID, id);
    }
    if room.room.available_permits() < room.most / SPARE_PART {
        // Others wait for a place: this connection gives its own up.
        answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    }
    answer
}

/// Replaces what the framework says of errors, which is no JSON, by the route's own envelope. The rest of the head, such
/// as `Allow`, stays.
async fn in_its_envelope(request: Request, next: Next) -> Response {
    let (method, path) = (request.method().clone(), request.uri().path().to_owned());
    let answer = next.run(request).await;
    let status = answer.status();
    let is_error = status.is_client_error() || status.is_server_error();
    if !is_error || answer.headers().contains_key(header::CONTENT_TYPE) {
        return answer;
    }
    let text = match status {
        StatusCode::METHOD_NOT_ALLOWED if path.starts_with("/key-value-store") => {
            return crate::http::answer::text_answer(status, "This method is unsupported.");
        }
        StatusCode::METHOD_NOT_ALLOWED => format!("{method} is not a method of {path}"),
        StatusCode::INTERNAL_SERVER_ERROR => "the server has a fault; the request may or may not have been done".into(),
        _ => format!("{path}: {}", status.canonical_reason().unwrap_or("error")),
    };
    let mut ours = Envelope::of(&path).problem(status, &text);
    for (name, value) in answer.headers() {
        if name != header::CONTENT_LENGTH {
            ours.headers_mut().insert(name.clone(), value.clone());
        }
    }
    ours
}

/// A handler has panicked: one request fails, and the log says why.
#[expect(clippy::needless_pass_by_value, reason = "the form that the layer asks for")]
fn panicked(why: Box<dyn Any + Send + 'static>) -> Response {
    let text = why.downcast_ref::<String>().map(String::as_str).or_else(|| why.downcast_ref::<&str>().copied());
    tracing::error!(why = text.unwrap_or("unknown"), "a handler panicked");
    crate::http::answer::empty_answer(StatusCode::INTERNAL_SERVER_ERROR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::routing::get;
    use hyper::service::Service as _;
    use hyper_util::service::TowerToHyperService;

    async fn ask(method: &str, path: &str) -> (Response, serde_json::Value) {
        let router = Router::new()
            .route("/v1/status", get(|| async { "fine" }))
            .route(
                "/home",
                get(|| async {
                    if true {
                        panic!("as the test wants it")
                    }
                }),
            )
            .route("/fetch", get(|| async { StatusCode::BAD_REQUEST }));
        let router = around(router, Room { room: Arc::new(Semaphore::new(9)), most: 9 });
        let request = Request::builder().method(method).uri(path).body(Body::empty()).unwrap();
        let answer = TowerToHyperService::new(router).call(request).await.unwrap();
        let (head, body) = answer.into_parts();
        let bytes = to_bytes(body, 1 << 20).await.unwrap();
        let json = serde_json::from_slice(&bytes).unwrap_or_default();
        (Response::from_parts(head, Body::empty()), json)
    }

    #[tokio::test]
    async fn every_error_is_in_the_envelope_of_its_route() {
        let (answer, body) = ask("POST", "/v1/status").await;
        assert_eq!(answer.status(), StatusCode::METHOD_NOT_ALLOWED);
        assert_eq!(answer.headers()[header::ALLOW], "GET,HEAD");
        assert_eq!(body["error"]["code"], "method_not_allowed");
        let (answer, body) = ask("GET", "/home").await;
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(body["status"], "failure");
        assert!(answer.headers().contains_key(REQUEST_ID));
        let (answer, body) = ask("GET", "/fetch").await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
        assert_eq!(body["error"], true);
        assert_eq!(ask("GET", "/v1/status").await.0.status(), StatusCode::OK);
    }
}
