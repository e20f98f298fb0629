//! What holds at every route of the HTTP front end, whichever system it is of: what the README shows works, what is no
//! request is refused in the system's own envelope, a lost quorum is told, and crowds and slow clients are borne.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests start tasks, wait, and fail where they cannot go on"
)]

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use serde_json::{Value, json};
use shkv_balancer::{Balancer, BalancerConfig, Bootstrap, HttpLimits};
use shkv_node::{Node, NodeConfig};
use shkv_tests::http::{Answer, Http};
use shkv_tests::{Cluster, Frozen, PATIENCE, Server, curl, nodes, resident_bytes};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tempfile::TempDir;
use tokio::sync::{Barrier, Semaphore};
use tokio::task::JoinSet;

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn cluster(flags: &[&str]) -> (TempDir, Cluster) {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), flags);
    (data, cluster) // dropped in reverse: the cluster ends before its data goes
}

// ---------------------------------------------------------------------------------------------- what the README shows

/// The part of the README between this heading and the next one.
fn section(heading: &str) -> String {
    let readme = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../README.md");
    let text = std::fs::read_to_string(readme).unwrap();
    let (_, rest) = text.split_once(&format!("\n## {heading}\n")).unwrap();
    rest.split("\n## ").next().unwrap().to_owned()
}

/// What an answer must tell, for the lines where that shows more than its status.
fn tells(request: &curl::Request, answer: &Answer) -> bool {
    let (path, _) = request.path.split_once('?').unwrap_or((&request.path, ""));
    let names = |value: &Value| serde_json::from_value::<Vec<String>>(value.clone()).unwrap();
    match (&request.method[..], path) {
        ("PUT", "/v1/kv/default/photos%2F1") => answer.header("etag").is_some(),
        ("GET", "/v1/kv/default") => answer.json()["rows"][0]["key"] == "photos/1",
        ("POST", "/v1/txn") => answer.json()["rows"] == json!([null]),
        ("GET", "/rep") => answer.json()["message"]["N"] == 3,
        ("GET", "/home") => answer.text().contains("Hello from Server: "),
        ("POST", "/add") if answer.json()["N"].is_null() => {
            let replicas = names(&answer.json()["message"]["replicas"]);
            replicas.contains(&"S4".into()) && replicas.contains(&"S5".into())
        }
        ("DELETE", "/rm") if !answer.json()["message"]["replicas"].is_null() => {
            !names(&answer.json()["message"]["replicas"]).contains(&"S5".into())
        }
        ("PUT", "/set") => answer.json()["keys_added"] == 1,
        (_, "/fetch") => answer.json()[0]["value"]["data"] == "001011",
        ("POST", "/query") => answer.json()[0]["value"] == true && answer.json()[1]["value"] == false,
        ("GET", "/status") => answer.json()["N"] == 3,
        ("POST", "/write") => answer.json()["message"] == "2 Data entries added",
        ("POST", "/read") => answer.json()["data"].as_array().unwrap().len() == 2,
        ("POST", "/add") => answer.json()["message"] == "Add Server:4" && answer.json()["N"] == 4,
        ("DELETE", "/rm") => answer.json()["message"] == json!({"N": 3, "servers": ["Server4"]}),
        ("GET", "/copy") => answer.json()["sh1"] == json!([]),
        ("GET", "/key-value-store/course1") => answer.json()["value"] == "v1",
        ("GET", "/key-value-store-view") => answer.json()["view"].as_str().unwrap().split(',').count() >= 3,
        ("GET", "/key-value-store-shard/shard-id-key-count/1") => answer.json()["shard-id-key-count"] == 0,
        _ => true,
    }
}

#[tokio::test]
async fn every_line_that_the_readme_shows_is_answered_as_it_promises() {
    let (_data, cluster) = cluster(&[]);
    let mut http = Http::new(cluster.http());
    let photo: Vec<u8> = (0..300_000_u32).map(|n| (n % 251) as u8).collect();
    let lines = curl::requests(&section("HTTP"), |name| {
        assert_eq!(name, "photo.jpg");
        photo.clone()
    });
    for path in ["/v1/txn", "/home", "/set", "/init", "/copy", "/key-value-store/course1"] {
        assert!(lines.iter().any(|line| line.path == path), "the README shows nothing of {path}");
    }
    for line in &lines {
        let named = line.headers.iter().map(|(name, value)| (&name[..], &value[..]));
        let headers: Vec<(&str, &str)> = named.chain([("shkv-deadline-ms", "50000")]).collect();
        let answer = http.send(&line.method, &line.path, &headers, &line.body).await;
        let is_made =
            line.path.ends_with("/lock") || line.method == "PUT" && line.path.starts_with("/key-value-store/");
        assert_eq!(answer.status, if is_made { 201 } else { 200 }, "{line:?}: {}", answer.text());
        assert!(tells(line, &answer), "{line:?}: {}", answer.text());
    }
    assert!(http.get("/v1/kv/default/photos/1").await.body == photo, "the photo is another");
}

// ---------------------------------------------------------------------------------------------- refusals

/// Whether an error has the form that the routes of a system promise. `tag` is the system as the description names it.
fn is_enveloped(tag: &str, answer: &Answer) -> bool {
    if answer.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")) {
        return tag == "causal store" && answer.status == 405 && answer.text() == "This method is unsupported.";
    }
    let body = answer.json();
    match tag {
        "shkv" => body["error"]["code"].is_string() && body["error"]["message"].is_string(),
        "load balancer" | "sharded database" => body["message"].is_string() && body["status"] == "failure",
        "batch proxy" => body["error"] == true && body["message"].is_string(),
        "causal store" => body["error"].is_string() && body["message"].as_str().unwrap().starts_with("Error"),
        _ => panic!("no system: {tag}"),
    }
}

#[tokio::test]
async fn what_is_no_request_is_refused_in_the_envelope_of_its_route() {
    let (_data, cluster) = cluster(&["--nodes", "1", "--shards", "1"]);
    let mut http = Http::new(cluster.http());
    let described = http.get("/openapi.json").await.expect(200);
    let (mut bodies, mut methods) = (0, 0);
    for (pattern, operations) in described["paths"].as_object().unwrap() {
        let path = pattern.replace("{keyspace}", "default").replace("{key}", "key").replace("{id}", "1");
        let tag = |operation: &Value| operation["tags"][0].as_str().unwrap().to_owned();
        let any = tag(operations.as_object().unwrap().values().next().unwrap());
        for (method, operation) in operations.as_object().unwrap() {
            let method = method.to_uppercase();
            if operation["requestBody"].is_null() {
                continue;
            }
            let length = format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 16777217\r\n\r\n");
            let large = Http::new(cluster.http()).raw(length.as_bytes()).await.unwrap();
            assert_eq!(large.status, 413, "{method} {path}");
            assert!(is_enveloped(&any, &large), "{method} {path}: {}", large.text());
            if operation["requestBody"]["content"]["application/json"].is_null() {
                continue;
            }
            for body in ["{", "[1,", "\u{0}", "{\"a\":1}}"] {
                for kind in ["application/json", "text/plain", "application/x-www-form-urlencoded"] {
                    let answer = http.send(&method, &path, &[("content-type", kind)], body.as_bytes()).await;
                    assert_eq!(answer.status, 400, "{method} {path} with {body}: {}", answer.text());
                    assert!(is_enveloped(&tag(operation), &answer), "{method} {path}: {}", answer.text());
                }
            }
            let told = operation["responses"].as_object().unwrap();
            assert!(["400", "413"].iter().all(|status| told.contains_key(*status)), "{method} {path} tells less");
            bodies += 1;
        }
        for method in ["GET", "PUT", "POST", "DELETE", "PATCH", "BREW"] {
            if operations.get(method.to_lowercase()).is_some() {
                continue;
            }
            let answer = http.send(method, &path, &[], b"").await;
            assert_eq!(answer.status, 405, "{method} {path}: {}", answer.text());
            assert!(is_enveloped(&any, &answer), "{method} {path}: {}", answer.text());
            let allowed = answer.header("allow").unwrap_or_default().to_lowercase();
            for known in operations.as_object().unwrap().keys() {
                assert!(allowed.split(',').any(|method| method == known), "{path} allows {known}, not {allowed}");
            }
            methods += 1;
        }
    }
    assert!(bodies >= 20 && methods >= 100, "{bodies} routes with bodies, {methods} wrong methods: too few");
    assert_eq!(http.get("/status").await.expect(200)["N"], 0, "what was refused has changed nothing");
    for (method, path, status, tag) in [
        ("GET", "/v1/else", 404, "shkv"),
        ("PUT", "/else", 404, "load balancer"),
        ("GET", "/else", 400, "load balancer"),
    ] {
        let answer = http.send(method, path, &[], b"").await;
        assert_eq!(answer.status, status, "{method} {path}");
        assert!(is_enveloped(tag, &answer), "{method} {path}: {}", answer.text());
    }
}

// ---------------------------------------------------------------------------------------------- a lost quorum

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn without_a_quorum_every_system_says_so_and_when_to_try_again() {
    let (_data, cluster) = cluster(&["--shards", "1", "--spawn", "process", "--replace-after", "1h"]);
    let mut http = Http::new(cluster.http());
    let row = |id: u64| json!({"Stud_id": id, "Stud_name": "A", "Stud_marks": 1});
    let items = json!([{"encoding": "string", "data": "a"}]);
    let pairs = json!([{"key": items[0], "value": items[0]}]);
    let schema = json!({"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]});
    let shards = json!([{"Stud_id_low": 0, "Shard_id": "sh1", "Shard_size": 10}]);
    let init = json!({"N": 3, "schema": schema, "shards": shards});
    http.json("POST", "/init", &init).await.expect(200);
    http.json("POST", "/write", &json!({"data": [row(1)]})).await.expect(200);
    http.json("PUT", "/set", &pairs).await.expect(200);
    http.json("PUT", "/key-value-store/a", &json!({"value": 1})).await.expect(201);
    http.send("PUT", "/v1/kv/default/a", &[], b"1").await.expect(200);
    let processes: Vec<u32> = nodes(&cluster.client().await).await.iter().map(|node| node.process).collect();

    let shards = http.get("/v1/shards").await.expect(200)["shards"].as_array().unwrap().len();
    let ready = |http: Http, status: u16, leaderless: usize| async move {
        let (mut http, deadline) = (http, Instant::now() + PATIENCE);
        loop {
            let told = http.get("/readyz").await;
            let lacking = told.json()["shards_without_leader"].as_array().unwrap().len();
            if told.status == status && lacking == leaderless {
                return;
            }
            assert!(Instant::now() < deadline, "/readyz does not come to answer {status}: {}", told.text());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    };
    let frozen = Frozen::new(&processes[1..]);
    ready(Http::new(cluster.http()), 503, shards).await; // no lease runs any more then
    let range = json!({"Stud_id": {"low": 0, "high": 9}});
    let requests = [
        ("shkv", "GET", "/v1/kv/default/a", json!(null)),
        ("shkv", "PUT", "/v1/kv/default/a", json!(2)),
        ("shkv", "DELETE", "/v1/kv/default/a", json!(null)),
        ("shkv", "GET", "/v1/kv/default", json!(null)),
        ("shkv", "POST", "/v1/txn", json!({"ops": [{"op": "put", "key": "a", "value": "3"}]})),
        ("sharded database", "GET", "/status", json!(null)),
        ("sharded database", "POST", "/read", range.clone()),
        ("sharded database", "POST", "/write", json!({"data": [row(2)]})),
        ("sharded database", "PUT", "/update", json!({"Stud_id": 1, "data": row(1)})),
        ("sharded database", "DELETE", "/del", json!({"Stud_id": 1})),
        ("sharded database", "POST", "/read", json!({"shard": "sh1", "Stud_id": {"low": 0, "high": 9}})),
        ("sharded database", "POST", "/write", json!({"shard": "sh1", "curr_idx": 0, "data": [row(3)]})),
        ("sharded database", "PUT", "/update", json!({"shard": "sh1", "Stud_id": 1, "data": row(1)})),
        ("sharded database", "DELETE", "/del", json!({"shard": "sh1", "Stud_id": 1})),
        ("sharded database", "POST", "/copy", json!({"shards": ["sh1"]})),
        ("sharded database", "POST", "/config", json!({"schema": schema, "shards": ["sh1"]})),
        ("batch proxy", "PUT", "/set", pairs.clone()),
        ("batch proxy", "POST", "/fetch", items.clone()),
        ("batch proxy", "GET", "/fetch", json!(null)),
        ("batch proxy", "POST", "/query", items.clone()),
        ("causal store", "GET", "/key-value-store/a", json!(null)),
        ("causal store", "PUT", "/key-value-store/a", json!({"value": 2})),
        ("causal store", "DELETE", "/key-value-store/a", json!({"causal-metadata": ""})),
        ("causal store", "GET", "/key-value-store-view", json!(null)),
        ("causal store", "PUT", "/key-value-store-view", json!({"socket-address": "10.10.0.9:8080"})),
        ("causal store", "GET", "/key-value-store-shard/shard-ids", json!(null)),
        ("causal store", "GET", "/key-value-store-shard/shard-id-key-count/1", json!(null)),
    ];
    let mut asking = JoinSet::new();
    for (tag, method, path, body) in requests {
        let mut http = Http::new(cluster.http());
        asking.spawn(async move {
            let body = if body.is_null() { vec![] } else { body.to_string().into_bytes() };
            let answer = http.send(method, path, &[("shkv-deadline-ms", "1500")], &body).await;
            assert_eq!(answer.status, 503, "{method} {path}: {}", answer.text());
            assert!(answer.header("retry-after").is_some(), "{method} {path}: it does not say when to try again");
            assert!(is_enveloped(tag, &answer), "{method} {path}: {}", answer.text());
        });
    }
    while let Some(asked) = asking.join_next().await {
        asked.unwrap();
    }
    http.get("/home").await.expect(200); // one node is there and greets
    let last = Frozen::new(&processes[..1]);
    for path in ["/home", "/heartbeat"] {
        let nobody = http.send("GET", path, &[("shkv-deadline-ms", "3000")], b"").await;
        let told = json!({"message": "<Error> Server did not respond", "status": "failure"});
        assert_eq!((nobody.expect(503), nobody.header("retry-after").is_some()), (told, true));
    }
    drop((frozen, last));
    ready(Http::new(cluster.http()), 200, 0).await;
    http.json("POST", "/write", &json!({"data": [row(9)]})).await.expect(200);
    let read = http.json("POST", "/read", &range).await.expect(200);
    assert!(read["data"].as_array().unwrap().contains(&row(9)));
}

// ---------------------------------------------------------------------------------------------- slow and many clients

/// A node with a balancer in this process, whose HTTP listener allows only so much.
async fn limited(data: &Path, limits: HttpLimits) -> (Node, Balancer) {
    let node = Node::start(NodeConfig::new("Server0", data, "127.0.0.1:0")).await.unwrap();
    let config = BalancerConfig {
        http: Some("127.0.0.1:0".into()),
        http_limits: limits,
        nodes: vec![node.addr().to_string()],
        bootstrap: Some(Bootstrap { shards: 1, replicas: 1 }),
        ..BalancerConfig::new("127.0.0.1:0")
    };
    let balancer = Balancer::start(config).await.unwrap();
    balancer.ready(PATIENCE).await.unwrap();
    (node, balancer)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn slow_requests_are_given_up_while_others_go_on() {
    let data = tempfile::tempdir().unwrap();
    let (head, body) = (Duration::from_millis(1_500), Duration::from_millis(1_500));
    let (node, balancer) = limited(data.path(), HttpLimits { head, body, ..HttpLimits::default() }).await;
    let addr = balancer.http_addr().unwrap().to_string();
    let (stop, done) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let others = {
        let (stop, done, addr) = (stop.clone(), done.clone(), addr.clone());
        tokio::spawn(async move {
            while !stop.load(Ordering::Relaxed) {
                let mut http = Http::new(addr.as_str());
                http.send("PUT", "/v1/kv/default/row", &[], b"x").await.expect(200);
                http.get("/v1/kv/default/row").await.expect_text("x");
                done.fetch_add(1, Ordering::Relaxed);
            }
        })
    };
    let drip = |bytes: &str| {
        let (mut http, bytes) = (Http::new(addr.as_str()), bytes.to_owned());
        async move { http.drip(bytes.as_bytes(), Duration::from_millis(20)).await.unwrap() }
    };
    let endless = "x-y: z\r\n".repeat(10_000);
    let slow_head = drip(&format!("GET /livez HTTP/1.1\r\nhost: x\r\n{endless}"));
    let nothing = drip("");
    let slow_body = |path: &str| {
        let request = format!("POST {path} HTTP/1.1\r\nhost: x\r\ncontent-length: 100000\r\n\r\n{endless}");
        let mut http = Http::new(addr.as_str());
        async move {
            // The head comes at once, or its own limit would end the connection.
            let (head, body) = request.split_at(request.find("\r\n\r\n").unwrap() + 4);
            http.say(head.as_bytes()).await.unwrap();
            http.drip(body.as_bytes(), Duration::from_millis(20)).await.unwrap()
        }
    };
    let idle = async {
        let mut http = Http::new(addr.as_str());
        http.get("/livez").await.expect_text("ok");
        http.drip(b"", Duration::ZERO).await.unwrap()
    };
    let all = async { tokio::join!(slow_head, nothing, slow_body("/v1/txn"), slow_body("/write"), idle) };
    let (slow_head, nothing, slow_own, slow_database, idle) = tokio::time::timeout(PATIENCE, all).await.unwrap();
    stop.store(true, Ordering::Relaxed);
    others.await.unwrap();
    assert!(done.load(Ordering::Relaxed) > 2, "others got nothing done meanwhile");
    for (said, what) in [(&slow_head, "a head"), (&nothing, "no head"), (&idle, "nothing more")] {
        assert!(!said.contains("200 OK"), "{what} was answered: {said}");
    }
    for (said, envelope) in
        [(&slow_own, "{\"error\":{\"code\":\"request_timeout\""), (&slow_database, "\"status\":\"failure\"")]
    {
        assert!(said.starts_with("HTTP/1.1 408 ") && said.contains(envelope), "{said}");
    }
    balancer.stop().await;
    node.stop().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn connections_beyond_the_limit_wait_for_a_place() {
    const PLACES: usize = 16;
    let data = tempfile::tempdir().unwrap();
    let (node, balancer) = limited(data.path(), HttpLimits { connections: PLACES, ..HttpLimits::default() }).await;
    let addr = balancer.http_addr().unwrap().to_string();
    let mut holders = Vec::new();
    for _ in 0..PLACES {
        let mut http = Http::new(addr.as_str());
        http.connect().await.unwrap();
        holders.push(http);
    }
    let mut asking = tokio::spawn(async move { Http::new(addr).get("/livez").await });
    let early = tokio::time::timeout(Duration::from_millis(300), &mut asking).await;
    assert!(early.is_err(), "it was answered beyond the limit: {early:?}");
    holders.pop();
    let answer = asking.await.unwrap();
    assert_eq!((answer.status, answer.header("connection")), (200, Some("close")), "it gives its place up at once");
    drop(holders);
    balancer.stop().await;
    node.stop().await;
}

#[tokio::test]
async fn a_server_takes_as_many_open_files_as_it_may() {
    const CONNECTIONS: usize = 300;
    let data = tempfile::tempdir().unwrap();
    let line = "ulimit -Sn 256; exec \"$0\" \"$@\"";
    let (shkv, folder) = (binary().to_str().unwrap(), data.path().to_str().unwrap());
    let flags = ["--nodes", "1", "--shards", "1", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data", folder];
    let server = Server::start(Path::new("sh"), &[&["-c", line, shkv, "up"], &flags[..]].concat());
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", server.process())).unwrap();
    let files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let numbers: Vec<&str> = files.split_whitespace().skip(3).collect();
    assert_eq!(numbers[0], numbers[1], "{files}");
    let mut open = Vec::new();
    for _ in 0..CONNECTIONS {
        let mut http = Http::new(server.told()["http"].as_str().unwrap());
        http.get("/livez").await.expect_text("ok");
        open.push(http);
    }
    for http in &mut open {
        http.send("PUT", "/v1/kv/default/row", &[], b"x").await.expect(200);
    }
}

/// So many requests at once, each on a connection of its own as far as this process may have so many, and all their answers.
async fn flood(addr: &str, count: usize, method: &'static str, path: &'static str, body: &[u8]) -> Vec<Answer> {
    let limit = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }).unwrap();
    let files = limit.maximum.map_or(usize::MAX, |most| most as usize);
    let sockets = Arc::new(Semaphore::new(count.min(files.saturating_sub(500).max(100))));
    let together = Arc::new(Barrier::new(count));
    let mut asking = JoinSet::new();
    for _ in 0..count {
        let (addr, body, together, sockets) = (addr.to_owned(), body.to_vec(), together.clone(), sockets.clone());
        asking.spawn(async move {
            together.wait().await;
            let _socket = sockets.acquire_owned().await.unwrap();
            let mut http = Http::new(addr);
            // The usual deadline of ten seconds is short for so many on a machine that does other things, too.
            let answer = Box::pin(http.try_send(method, path, &[("shkv-deadline-ms", "60000")], &body));
            let answer =
                tokio::time::timeout(2 * PATIENCE, answer).await.map_err(|_| "no answer in time".to_owned())?;
            answer.map_err(|error| error.to_string())
        });
    }
    let mut answers = Vec::new();
    while let Some(answer) = asking.join_next().await {
        answers.push(answer.unwrap().unwrap());
    }
    answers
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_at_once_are_all_answered_in_bounded_memory() {
    const REQUESTS: usize = 10_000;
    let (_data, cluster) = cluster(&["--nodes", "3", "--shards", "1"]);
    let mut http = Http::new(cluster.http());
    let schema = json!({"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]});
    let shards = json!([{"Stud_id_low": 0, "Shard_id": "sh1", "Shard_size": 10},
        {"Stud_id_low": 10, "Shard_id": "sh2", "Shard_size": 10}]);
    http.json("POST", "/init", &json!({"N": 3, "schema": schema, "shards": shards})).await.expect(200);
    let rows: Vec<Value> = (0..20).map(|id| json!({"Stud_id": id, "Stud_name": "A", "Stud_marks": 1})).collect();
    http.json("POST", "/write", &json!({"data": rows})).await.expect(200);
    let before = resident_bytes(cluster.process());

    let mut counts = BTreeMap::new();
    for answer in flood(&cluster.http(), REQUESTS, "GET", "/home", b"").await {
        *counts.entry(answer.expect(200)["message"].as_str().unwrap().to_owned()).or_insert(0) += 1;
    }
    assert_eq!(counts.len(), 3, "{counts:?}");
    // A node that is held up by the crowd is passed over: the spread itself is looked at where there is none.
    assert!(counts.values().all(|count| *count > REQUESTS / 10), "an uneven spread: {counts:?}");
    let range = json!({"Stud_id": {"low": 5, "high": 14}}).to_string();
    let wanted = json!({"shards_queried": ["sh1", "sh2"], "data": rows[5..15], "status": "success"});
    for answer in flood(&cluster.http(), REQUESTS, "POST", "/read", range.as_bytes()).await {
        assert_eq!(answer.expect(200), wanted);
    }
    let grown = resident_bytes(cluster.process()).saturating_sub(before);
    // 4,096 requests at a time, each with some 50 KiB of a build that is not optimised, and no more for those that wait: neither
    // of connections nor of reads, each of which had a thread once.
    assert!(grown < 320 << 20, "{} MiB more", grown >> 20);
    Http::new(cluster.http()).get("/home").await.expect(200);
}
