//! What holds for every request: an id, a line in the log, an answer in the envelope of its route also when a handler
//! panics, when nothing is there or when the method is another, and gzip for large answers.

#![expect(clippy::disallowed_methods, reason = "a shell: measures how long a request takes")]

use crate::http::answer::Envelope;
use axum::body::HttpBody;
use axum::http::{HeaderName, HeaderValue, Method, Request, StatusCode, header};
use axum::response::Response;
use axum::{BoxError, Router};
use bytes::Bytes;
use hyper::service::Service as _;
use hyper_util::service::TowerToHyperService;
use std::any::Any;
use std::future::poll_fn;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::Poll;
use tokio::sync::Semaphore;
use tokio::time::Instant;
use tower_http::compression::CompressionLayer;
use tower_http::compression::predicate::{Predicate as _, SizeAbove};

/// By which a request is found in the log: the caller's, or one of ours.
const REQUEST_ID: &str = "x-request-id";
/// Longest id that is taken from a caller.
const REQUEST_ID_BYTES_MAX: usize = 64;
/// Answers from this size on are compressed for those who accept it. A streamed answer, whose size is not known, is too.
const GZIP: SizeAbove = SizeAbove::new(4 << 10);
/// Of so many places for connections one is kept free: beyond, a connection ends with its answer.
const SPARE_PART: usize = 8;

/// The places for connections of a listener.
#[derive(Clone, Debug)]
pub(crate) struct Room {
    /// Those that are free.
    pub(crate) free: Arc<Semaphore>,
    /// How many there are.
    pub(crate) most: usize,
}

/// All routes, with the manners around them. It is one function instead of a layer each: what a layer costs, it costs every
/// request, and it is more than what most of these do.
#[derive(Debug)]
pub struct HttpService {
    plain: TowerToHyperService<Router>,
    /// The same for those who say what they accept.
    gzipping: TowerToHyperService<Router>,
    ids: Ids,
    /// The places for connections of the listener.
    room: Room,
}

#[derive(Debug)]
struct Ids {
    first: u32,
    next: AtomicU64,
}

impl Ids {
    fn next(&self) -> Option<HeaderValue> {
        let text = format!("{:08x}-{}", self.first, self.next.fetch_add(1, Ordering::Relaxed));
        HeaderValue::try_from(text).ok()
    }
}

impl HttpService {
    /// Around these routes.
    pub(crate) fn around(router: Router, room: Room) -> Self {
        let gzipping = router.clone().layer(CompressionLayer::new().compress_when(GZIP));
        Self {
            plain: TowerToHyperService::new(router),
            gzipping: TowerToHyperService::new(gzipping),
            ids: Ids { first: rand::random(), next: AtomicU64::new(0) },
            room,
        }
    }

    /// Gives the request its id, answers it, and tells of it.
    pub async fn answer<B>(&self, request: Request<B>) -> Response
    where
        B: HttpBody<Data = Bytes, Error: Into<BoxError>> + Send + 'static,
    {
        let begun = Instant::now();
        let theirs = request.headers().get(REQUEST_ID).filter(|id| id.len() <= REQUEST_ID_BYTES_MAX).cloned();
        let id = theirs.or_else(|| self.ids.next());
        let (method, uri) = (request.method().clone(), request.uri().clone());
        let accepts = request.headers().contains_key(header::ACCEPT_ENCODING);
        let routes = if accepts { &self.gzipping } else { &self.plain };
        let mut answer = match caught(async { routes.call(request).await }).await {
            Ok(Ok(answer)) => answer,
            Ok(Err(never)) => match never {},
            Err(why) => panicked(why.as_ref()),
        };
        answer = in_its_envelope(&method, uri.path(), answer);
        if !accepts && GZIP.should_compress(&answer) {
            // Whoever keeps it for others must know that they may get it in another form.
            answer.headers_mut().append(header::VARY, HeaderValue::from_static("accept-encoding"));
        }
        tracing::debug!(target: "shkv::access", %method, path = uri.path(), status = answer.status().as_u16(),
            us = begun.elapsed().as_micros() as u64, id = id.as_ref().and_then(|id| id.to_str().ok()), "answered");
        if let Some(id) = id {
            answer.headers_mut().insert(HeaderName::from_static(REQUEST_ID), id);
        }
        if self.room.free.available_permits() < self.room.most / SPARE_PART {
            // Others wait for a place: this connection gives its own up.
            answer.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
        }
        answer
    }
}

/// Replaces what the framework says of errors, which is no JSON, by the route's own envelope. The rest of the head, such
/// as `Allow`, stays.
fn in_its_envelope(method: &Method, path: &str, answer: Response) -> Response {
    let status = answer.status();
    let is_error = status.is_client_error() || status.is_server_error();
    if !is_error || answer.headers().contains_key(header::CONTENT_TYPE) {
        return answer;
    }
    let mut ours = match status {
        StatusCode::METHOD_NOT_ALLOWED if path.starts_with("/key-value-store") => {
            crate::http::answer::text_answer(status, "This method is unsupported.")
        }
        _ => {
            let text = match status {
                StatusCode::METHOD_NOT_ALLOWED => format!("{method} is not a method of {path}"),
                StatusCode::INTERNAL_SERVER_ERROR => {
                    "the server has a fault; the request may or may not have been done".into()
                }
                _ => format!("{path}: {}", status.canonical_reason().unwrap_or("error")),
            };
            Envelope::of(path).problem(status, &text)
        }
    };
    for (name, value) in answer.headers() {
        if name != header::CONTENT_LENGTH {
            ours.headers_mut().insert(name.clone(), value.clone());
        }
    }
    ours
}

/// What the work comes to, or what it panicked with. Nothing of it is used after a panic.
async fn caught<T>(work: impl Future<Output = T>) -> Result<T, Box<dyn Any + Send>> {
    let mut work = pin!(work);
    poll_fn(|context| match catch_unwind(AssertUnwindSafe(|| work.as_mut().poll(context))) {
        Ok(polled) => polled.map(Ok),
        Err(why) => Poll::Ready(Err(why)),
    })
    .await
}

/// A handler has panicked: one request fails, and the log says why.
fn panicked(why: &(dyn Any + Send)) -> Response {
    let text = why.downcast_ref::<String>().map(String::as_str).or_else(|| why.downcast_ref::<&str>().copied());
    tracing::error!(why = text.unwrap_or("unknown"), "a handler panicked");
    crate::http::answer::empty_answer(StatusCode::INTERNAL_SERVER_ERROR)
}

#[cfg(test)]
mod tests {
    use super::*;
    use axum::body::{Body, to_bytes};
    use axum::routing::get;

    async fn ask(method: &str, path: &str) -> (Response, serde_json::Value) {
        ask_with(Request::builder().method(method).uri(path)).await
    }

    async fn ask_with(request: axum::http::request::Builder) -> (Response, serde_json::Value) {
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
            .route("/docs", get(|| async { "x".repeat(5_000) }))
            .route("/key-value-store/{key}", get(|| async { "fine" }))
            .route("/fetch", get(|| async { StatusCode::BAD_REQUEST }));
        let manners = HttpService::around(router, Room { free: Arc::new(Semaphore::new(9)), most: 9 });
        let answer = manners.answer(request.body(Body::empty()).unwrap()).await;
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
        let (answer, _) = ask("POST", "/key-value-store/x").await;
        assert_eq!(
            (answer.status(), &answer.headers()[header::ALLOW]),
            (StatusCode::METHOD_NOT_ALLOWED, &"GET,HEAD".parse().unwrap())
        );
        let (answer, body) = ask("GET", "/home").await;
        assert_eq!(answer.status(), StatusCode::INTERNAL_SERVER_ERROR);
        assert_eq!(body["status"], "failure");
        assert!(answer.headers().contains_key(REQUEST_ID));
        let (answer, body) = ask("GET", "/fetch").await;
        assert_eq!(answer.status(), StatusCode::BAD_REQUEST);
        assert_eq!(body["error"], true);
        assert_eq!(ask("GET", "/v1/status").await.0.status(), StatusCode::OK);
    }

    #[tokio::test]
    async fn only_large_answers_are_compressed_and_only_for_those_who_accept_it() {
        let request = |path, accepts: Option<&str>| {
            let request = Request::builder().method("GET").uri(path);
            accepts.into_iter().fold(request, |request, what| request.header(header::ACCEPT_ENCODING, what))
        };
        for (path, accepts, encoding, varies) in [
            ("/docs", Some("gzip"), Some("gzip"), true),
            ("/docs", Some("br"), None, true),
            ("/docs", None, None, true),
            ("/v1/status", Some("gzip"), None, false),
            ("/v1/status", None, None, false),
        ] {
            let (answer, _) = ask_with(request(path, accepts)).await;
            let told = |name| answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned());
            assert_eq!(told(header::CONTENT_ENCODING).as_deref(), encoding, "{path} {accepts:?}");
            assert_eq!(told(header::VARY).is_some(), varies, "{path} {accepts:?}");
            assert_eq!(answer.status(), StatusCode::OK);
        }
    }
}
