//! The HTTP front end: five systems' routes and our own over one store.
//!
//! Each system has a file with its routes; here they are put together. A listener is the balancer's, or that of one node:
//! the routes are the same, only [`Front::this`] differs. Nothing is decided here that the store does not decide.

mod answer;
mod asked;
mod batch;
mod catalog;
mod catalog_reads;
mod causal;
mod database;
mod described;
pub(crate) mod doors;
mod health;
mod listen;
mod look;
mod manners;
pub(crate) mod members;
mod nodes;
mod openapi;
mod own;
mod pool;
mod servers;
mod store;
mod stream;
mod tables;
mod txn;

use crate::cluster::Cluster;
use answer::Envelope;
use asked::Raw;
use axum::Router;
use axum::extract::State;
use axum::http::{Method, StatusCode, Uri};
use axum::response::Response;
use axum::routing::{delete, post};
use catalog_reads::CatalogReads;
pub(crate) use listen::serve;
pub use manners::HttpService;
use manners::Room;
use serde_json::Value;
use std::ops::Deref;
use std::sync::Arc;
use std::time::Duration;
use store::{Ask, Store};
use tokio::sync::Semaphore;

/// Memory for bodies that have arrived or are arriving, in KiB; the next ones wait to be read.
const BODIES_KIB_MAX: usize = 256 << 10;

/// Memory for bodies when they are parsed, in KiB; the next ones wait, too.
const PARSED_KIB_MAX: usize = 256 << 10;

/// How the dialects answer where their clients differ.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Dialects {
    /// The edition of the causal store.
    pub kvs: KvsDialect,
    /// The form of the batch proxy's answer to `/set`.
    pub set: SetShape,
}

/// The edition of the causal store that a listener speaks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum KvsDialect {
    /// Lists are strings joined by commas, ids of shards are strings.
    #[default]
    Of2019,
    /// Lists are JSON arrays.
    Of2020,
}

/// The form of the batch proxy's answer to `/set`.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub enum SetShape {
    /// An object.
    #[default]
    Object,
    /// An array of one object.
    Array,
}

/// What an HTTP listener allows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct HttpLimits {
    /// Most connections at a time; the next ones wait to be accepted.
    pub connections: usize,
    /// How long the head of a request may take to arrive, and how long a connection may say nothing between two.
    pub head: Duration,
    /// How long the body of a request may take to arrive.
    pub body: Duration,
}

impl Default for HttpLimits {
    fn default() -> Self {
        Self { connections: 4_096, head: Duration::from_secs(30), body: Duration::from_secs(60) }
    }
}

/// What every handler has at hand. A clone is one count: every request makes several.
#[derive(Clone, Debug)]
pub(crate) struct Front(Arc<Parts>);

impl Deref for Front {
    type Target = Parts;

    fn deref(&self) -> &Parts {
        &self.0
    }
}

/// What a [`Front`] consists of.
#[derive(Clone, Debug)]
pub(crate) struct Parts {
    /// The rows.
    pub(crate) store: Store,
    /// The database's catalog.
    pub(crate) catalogs: Arc<CatalogReads>,
    /// The name of the node whose listener this is; `None` at the balancer's.
    pub(crate) this: Option<Arc<str>>,
    /// How the dialects answer.
    pub(crate) dialects: Dialects,
    /// What the listener allows.
    pub(crate) limits: HttpLimits,
    /// The nodes as the load balancer numbers them.
    pub(crate) pool: Arc<pool::Pool>,
    /// The nodes' own listeners.
    pub(crate) doors: Arc<doors::Doors>,
    /// Memory for bodies, in KiB.
    pub(crate) bodies: Arc<Semaphore>,
    /// Memory for what they are parsed into, in KiB.
    pub(crate) parsed: Arc<Semaphore>,
}

impl Front {
    /// The front end of a cluster, at the balancer.
    pub(crate) fn new(cluster: Arc<Cluster>, dialects: Dialects, limits: HttpLimits) -> Self {
        Self(Arc::new(Parts {
            store: Store::new(cluster),
            catalogs: Arc::default(),
            this: None,
            dialects,
            limits,
            pool: Arc::default(),
            doors: Arc::default(),
            bodies: Arc::new(Semaphore::new(BODIES_KIB_MAX)),
            parsed: Arc::new(Semaphore::new(PARSED_KIB_MAX)),
        }))
    }

    /// The same as a node.
    pub(crate) fn at(&self, node: &str) -> Self {
        Self(Arc::new(Parts { this: Some(node.into()), ..Parts::clone(self) }))
    }
}

/// All routes with all manners. `room` are the places for connections of the listener.
fn router(front: Front, free: Arc<Semaphore>) -> HttpService {
    let room = Room { free, most: front.limits.connections };
    let routes = Router::new()
        .merge(health::routes())
        .merge(own::routes())
        .merge(txn::routes())
        .merge(look::routes())
        .merge(openapi::routes())
        .merge(nodes::routes())
        .merge(batch::routes())
        .merge(database::routes())
        .merge(causal::routes())
        .route("/add", post(add).get(nodes::add_by_get))
        .route("/rm", delete(remove).post(remove))
        .fallback(unknown);
    HttpService::around(routes.with_state(front), room)
}

/// All routes, for a listener that is not ours.
pub(crate) fn service(front: Front) -> HttpService {
    let free = Arc::new(Semaphore::new(front.limits.connections));
    router(front, free)
}

/// `/add` is the database's if it names servers or shards, else the load balancer's.
async fn add(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    match raw.json::<Value>() {
        Err(text) => Envelope::Status.problem(StatusCode::BAD_REQUEST, &text),
        Ok(body) if body.get("servers").is_some() || body.get("new_shards").is_some() => {
            database::add(&front, body, &ask).await
        }
        Ok(body) => nodes::add(&front, body).await,
    }
}

/// `/rm` is the database's if it names servers, else the load balancer's.
async fn remove(State(front): State<Front>, ask: Ask, raw: Raw) -> Response {
    match raw.json::<Value>() {
        Err(text) => Envelope::Status.problem(StatusCode::BAD_REQUEST, &text),
        Ok(body) if body.get("servers").is_some() => database::remove(&front, body, &ask).await,
        Ok(body) => nodes::remove(&front, body).await,
    }
}

/// What nobody has a route for: each system has its own words.
async fn unknown(method: Method, uri: Uri) -> Response {
    let path = uri.path();
    match Envelope::of(path) {
        Envelope::Causal => {
            let text = "Visit the /key-value-store/{key_query} endpoint to query the key store table";
            answer::text_answer(StatusCode::NOT_FOUND, text)
        }
        Envelope::Status if method == Method::GET || method == Method::HEAD => nodes::no_endpoint(path),
        envelope => envelope.problem(StatusCode::NOT_FOUND, &format!("there is nothing at {path}")),
    }
}
