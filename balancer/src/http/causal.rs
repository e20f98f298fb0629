//! The causal store's routes.

use crate::http::Front;
use axum::Router;

/// The routes.
pub(crate) fn routes() -> Router<Front> {
    Router::new()
}
