//! Requests with any body, put to the whole front end without a socket in between: one real node and one balancer stand behind
//! it. No answer is a 500, every error is in the envelope of its route, and no error is long.

#![expect(clippy::expect_used, reason = "a harness starts a cluster and fails where what must hold does not")]

use super::{Draw, json};
use axum::body::{Body, to_bytes};
use axum::extract::Request;
use axum::http::{Method, StatusCode, header};
use bytes::Bytes;
use parking_lot::Mutex;
use serde_json::{Value, json};
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap, HttpService};
use shkv_node::{Node, NodeConfig, Tuning};
use std::path::Path;
use std::sync::OnceLock;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Longest body of an error.
const ERROR_BYTES_MAX: usize = 8 << 10;
/// Longest answer of all.
const ANSWER_BYTES_MAX: usize = 256 << 20;
/// How long an answer may take on a machine that is busy with other tests.
const PATIENCE: Duration = Duration::from_secs(150);
/// How long a request may take by its own word: a large one is slow where many tests run, and shall have its answer.
const DEADLINE_MS: u32 = 60_000;
/// The name of the node.
const NODE: &str = "Server0";

/// The systems whose routes are tried.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum System {
    /// The sharded database's balancer.
    Database,
    /// The sharded database's storage server.
    Server,
    /// The causal store.
    Causal,
    /// The load balancer over the pool of nodes.
    Pool,
    /// The batch proxy.
    Batch,
    /// Transactions and rows of our own.
    Own,
}

/// All of them.
pub const SYSTEMS: [System; 6] =
    [System::Database, System::Server, System::Causal, System::Pool, System::Batch, System::Own];

/// A request that is sound: method, path, body.
pub struct Sample {
    method: &'static str,
    path: &'static str,
    /// Its body.
    pub body: Value,
}

/// The sound requests of a system.
#[must_use]
pub fn samples(system: System) -> Vec<Sample> {
    let one = |method, path, body| Sample { method, path, body };
    let row = || json!({"Stud_id": 7, "Stud_name": "GHI", "Stud_marks": 27});
    let schema =
        || json!({"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]});
    let item = || json!({"encoding": "string", "data": "key1"});
    match system {
        System::Database => vec![
            one(
                "POST",
                "/init",
                json!({"N": 1, "schema": schema(), "shards": [
                    {"Stud_id_low": 0, "Shard_id": "sh1", "Shard_size": 4096},
                    {"Stud_id_low": 4096, "Shard_id": "sh2", "Shard_size": 4096}],
                    "servers": {NODE: ["sh1", "sh2"]}}),
            ),
            one("GET", "/status", Value::Null),
            one("POST", "/read", json!({"Stud_id": {"low": 0, "high": 8889}})),
            one("POST", "/write", json!({"data": [row(), {"Stud_id": 4100, "Stud_name": "JKL", "Stud_marks": 40.5}]})),
            one("PUT", "/update", json!({"Stud_id": 7, "data": row()})),
            one("PUT", "/update", json!({"Stud_id": 7, "data": {"Stud_marks": 30}})),
            one("DELETE", "/del", json!({"Stud_id": 7})),
            one(
                "POST",
                "/add",
                json!({"n": 1, "new_shards": [{"Stud_id_low": 8192, "Shard_id": "sh3", "Shard_size": 4096}],
                "servers": {"Server4": ["sh2", "sh3"]}}),
            ),
            one("DELETE", "/rm", json!({"n": 1, "servers": [NODE]})),
        ],
        System::Server => vec![
            one("POST", "/config", json!({"schema": schema(), "shards": ["sh1", "sh2"]})),
            one("POST", "/copy", json!({"shards": ["sh1"]})),
            one("POST", "/read", json!({"shard": "sh1", "Stud_id": {"low": 0, "high": 2555}})),
            one("POST", "/write", json!({"shard": "sh1", "curr_idx": 507, "data": [row()]})),
            one("PUT", "/update", json!({"shard": "sh1", "Stud_id": 7, "data": row()})),
            one("DELETE", "/del", json!({"shard": "sh1", "Stud_id": 7})),
            one("POST", "/del", json!({"shard": "sh1", "Stud_id": 7})),
            one("POST", "/autopopulate", Value::Null),
        ],
        System::Causal => vec![
            one("PUT", "/key-value-store/course1", json!({"value": "v1", "causal-metadata": ""})),
            one("PUT", "/key-value-store/course1", json!({"value": {"a": [1, 2.5, null]}, "causal-metadata": "1"})),
            one("GET", "/key-value-store/course1", json!({"causal-metadata": "7"})),
            one("DELETE", "/key-value-store/course1", json!({"causal-metadata": ""})),
            one("PUT", "/key-value-store-view", json!({"socket-address": "127.0.0.1:9001"})),
            one("DELETE", "/key-value-store-view", json!({"socket-address": "127.0.0.1:9001"})),
            one("PUT", "/key-value-store-shard/add-member/1", json!({"socket-address": "127.0.0.1:9001"})),
            one("PUT", "/key-value-store-shard/reshard", json!({"shard-count": 2})),
            one("GET", "/key-value-store-shard/shard-id-members/1", Value::Null),
        ],
        System::Pool => vec![
            one("POST", "/add", json!({"n": 2, "hostnames": ["S4", "S5"]})),
            one("GET", "/add", json!({"n": 2, "hostnames": ["S4", "S5"]})),
            one("DELETE", "/rm", json!({"n": 1, "hostnames": ["S5"]})),
            one("POST", "/rm", json!({"n": 1, "hostnames": [NODE]})),
            one("GET", "/rep", Value::Null),
        ],
        System::Batch => vec![
            one("PUT", "/set", json!([{"key": item(), "value": {"encoding": "binary", "data": "001011"}}])),
            one("POST", "/fetch", json!([item(), {"key": item()}])),
            one("POST", "/query", json!([item(), {"encoding": "binary", "data": "key2"}])),
            one("GET", "/fetch", Value::Null),
        ],
        System::Own => vec![
            one(
                "POST",
                "/v1/txn",
                json!({"ops": [{"op": "check", "key": "lock", "if_absent": true},
                {"op": "put", "key": "a", "value": "1", "if_version": 3}, {"op": "delete", "key": "c", "if_present": true},
                {"op": "read", "key": "b"}]}),
            ),
            one(
                "POST",
                "/v1/txn",
                json!({"keyspace": "default", "ops": [
                {"op": "put", "key_b64": "/w==", "value_b64": "AA==", "if_value_b64": "AA=="}, {"op": "read", "key": "a"}]}),
            ),
            one("PUT", "/v1/kv/default/a", json!("any bytes")),
            one("GET", "/v1/kv/default?limit=3", Value::Null),
        ],
    }
}

/// A node and a balancer that are there for as long as the process is.
struct Place {
    runtime: Runtime,
    at_balancer: HttpService,
    at_node: HttpService,
    _node: Node,
    _balancer: Balancer,
    _data: tempfile::TempDir,
}

/// A folder in memory where there is one: what is tried here is not the disk.
pub(super) fn folder() -> tempfile::TempDir {
    let memory = Path::new("/dev/shm");
    let made = if memory.is_dir() { tempfile::tempdir_in(memory) } else { tempfile::tempdir() };
    made.expect("a folder can be made")
}

fn place() -> &'static Mutex<Place> {
    static PLACE: OnceLock<Mutex<Place>> = OnceLock::new();
    PLACE.get_or_init(|| Mutex::new(Place::new()))
}

impl Place {
    fn new() -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
        let runtime = runtime.expect("the system gives threads");
        let data = folder();
        let tuning = Tuning {
            table_bytes: 8 << 20,
            cache_bytes: 8 << 20,
            log_segment_bytes: 1 << 20,
            log_retain_bytes: 4 << 20,
            disk_reserve_bytes: 0,
            threads: 1,
        };
        let config = NodeConfig { tuning, ..NodeConfig::new(NODE, data.path().join("node"), "127.0.0.1:0") };
        let (node, balancer) = runtime.block_on(async {
            let node = Node::start(config).await.expect("a node starts in an empty folder");
            let config = BalancerConfig {
                nodes: vec![node.addr().to_string()],
                bootstrap: Some(Bootstrap { shards: 2, replicas: 1 }),
                ..BalancerConfig::new("127.0.0.1:0")
            };
            let balancer = Balancer::start(config).await.expect("a balancer starts");
            balancer.ready(PATIENCE).await.expect("one node is a cluster");
            (node, balancer)
        });
        let at_balancer = balancer.http_service(None);
        let at_node = balancer.http_service(Some(NODE));
        let place = Self { runtime, at_balancer, at_node, _node: node, _balancer: balancer, _data: data };
        for system in [System::Database, System::Server, System::Batch] {
            let first = samples(system).into_iter().next().expect("every system has requests");
            let (status, body) = place.ask(&first, false, false, first.body.to_string().into_bytes());
            assert!(
                status.is_success(),
                "{} {}: {status} {}",
                first.method,
                first.path,
                String::from_utf8_lossy(&body)
            );
        }
        place
    }

    fn ask(&self, sample: &Sample, at_node: bool, announced: bool, body: Vec<u8>) -> (StatusCode, Bytes) {
        let method = Method::from_bytes(sample.method.as_bytes()).expect("a method");
        let mut request = Request::builder().method(method).uri(sample.path).header("shkv-deadline-ms", DEADLINE_MS);
        if announced {
            request = request.header(header::CONTENT_LENGTH, body.len());
        }
        let request = request.body(Body::from(body)).expect("a sound head");
        let service = if at_node { &self.at_node } else { &self.at_balancer };
        let asking = async {
            let answer = service.answer(request).await;
            let (head, body) = answer.into_parts();
            let body = to_bytes(body, ANSWER_BYTES_MAX).await.expect("an answer within its bounds");
            let is_json = head.headers.get(header::CONTENT_TYPE).is_some_and(|form| form == "application/json");
            (head.status, is_json, body)
        };
        let (status, is_json, body) = self.runtime.block_on(async {
            let answered = tokio::time::timeout(PATIENCE, asking).await;
            answered.unwrap_or_else(|_| panic!("{} {} is not answered", sample.method, sample.path))
        });
        check(sample, status, is_json, &body);
        (status, body)
    }
}

/// What holds for every answer.
fn check(sample: &Sample, status: StatusCode, is_json: bool, body: &[u8]) {
    let (method, path) = (sample.method, sample.path);
    let text = || String::from_utf8_lossy(&body[..body.len().min(400)]).into_owned();
    let known_5xx = [StatusCode::NOT_IMPLEMENTED, StatusCode::SERVICE_UNAVAILABLE, StatusCode::INSUFFICIENT_STORAGE];
    assert!(!status.is_server_error() || known_5xx.contains(&status), "{method} {path}: {status} {}", text());
    assert!(is_json || path == "/fetch" || body.is_empty(), "{method} {path}: {status} is not JSON: {}", text());
    let parsed = serde_json::from_slice::<Value>(body);
    assert!(body.is_empty() || parsed.is_ok() || !is_json, "{method} {path}: {status} {parsed:?}: {}", text());
    if !status.is_client_error() && !status.is_server_error() {
        return;
    }
    let told = parsed.unwrap_or_default();
    let is_enveloped = match path {
        _ if path.starts_with("/v1/") => told["error"]["code"].is_string() && told["error"]["message"].is_string(),
        _ if path.starts_with("/key-value-store") => told["message"].is_string(),
        "/set" | "/fetch" | "/query" => told["error"] == true && told["message"].is_string(),
        _ => told["status"] == "failure" && told["message"].is_string(),
    };
    assert!(is_enveloped, "{method} {path}: {status} is not in its envelope: {}", text());
    assert!(body.len() <= ERROR_BYTES_MAX, "{method} {path}: {status} in {} bytes: {}", body.len(), text());
}

/// Puts requests of a system that the bytes choose, one behind the other.
///
/// # Panics
/// When an answer is not as every answer must be.
pub fn requests(system: System, bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let samples = samples(system);
    let place = place().lock();
    for _ in 0..4 {
        let sample = &samples[draw.below(samples.len())];
        let (at_node, announced) = (draw.byte() & 1 == 1, draw.byte() & 1 == 0);
        place.ask(sample, at_node, announced, json::body(&sample.body, &mut draw));
        if draw.is_empty() {
            return;
        }
    }
}

/// Puts one of these bodies to each route of a system, in turn.
///
/// # Panics
/// When an answer is not as every answer must be.
pub fn everywhere(system: System, bodies: &[Vec<u8>]) {
    let place = place().lock();
    for (sample, body) in samples(system).iter().zip(bodies.iter().cycle()) {
        place.ask(sample, false, true, body.clone());
    }
}

/// Puts a body to one route.
///
/// # Panics
/// When an answer is not as every answer must be.
pub fn to(method: &'static str, path: &'static str, body: Vec<u8>) -> StatusCode {
    place().lock().ask(&Sample { method, path, body: Value::Null }, false, true, body).0
}

/// Puts bodies to a route in which this stands in the place of each value in turn.
///
/// # Panics
/// When an answer is not as every answer must be.
pub fn in_every_place(system: System, text: &[u8]) {
    let place = place().lock();
    for sample in samples(system) {
        for body in json::with_each_value_replaced(&sample.body, text) {
            place.ask(&sample, false, true, body);
        }
    }
}
