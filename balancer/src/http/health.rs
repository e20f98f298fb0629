//! Whether the process lives, whether the cluster is ready, and the metrics.

use crate::health::Lacks;
use crate::http::Front;
use crate::http::answer::{Envelope, json_answer};
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;

/// What Prometheus expects of the text format.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `/livez`, `/readyz`, `/metrics`.
pub(crate) fn routes() -> Router<Front> {
    Router::new().route("/livez", get(|| async { "ok" })).route("/readyz", get(ready)).route("/metrics", get(metrics))
}

/// The answer of `/readyz`.
#[derive(Serialize)]
struct Readiness {
    ready: bool,
    #[serde(flatten)]
    lacks: Lacks,
    #[serde(skip_serializing_if = "Option::is_none")]
    trouble: Option<String>,
}

async fn ready(State(front): State<Front>) -> Response {
    let cluster = front.store.cluster();
    let lacks = cluster.lacks();
    let ready = lacks.is_ready();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json_answer(status, &Readiness { ready, lacks, trouble: cluster.trouble() })
}

async fn metrics(State(front): State<Front>) -> Response {
    let cluster = front.store.cluster();
    cluster.gauge();
    match cluster.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => Envelope::Own.problem(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}
