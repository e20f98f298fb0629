//! The sharded database's routes.

use crate::http::Front;
use crate::http::answer::Envelope;
use crate::http::store::Ask;
use axum::Router;
use axum::http::StatusCode;
use axum::response::Response;
use serde_json::Value;

/// The routes but `/add` and `/rm`, which other systems have, too.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
}

/// `POST /add` with servers or shards.
pub(crate) async fn add(_: &Front, _: Value, _: &Ask) -> Response {
    Envelope::Status.problem(StatusCode::BAD_REQUEST, "no database is configured")
}

/// `DELETE /rm` with servers.
pub(crate) async fn remove(_: &Front, _: Value, _: &Ask) -> Response {
    Envelope::Status.problem(StatusCode::BAD_REQUEST, "no database is configured")
}
