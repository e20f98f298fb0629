//! The sharded database over real HTTP against real clusters: each line of its contract, a flow as its graders run it, and
//! a server that is killed while rows are written.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and kills, and fails where it cannot go on"
)]

use serde_json::{Value, json};
use shkv_tests::http::Http;
use shkv_tests::{Cluster, Frozen, PATIENCE, Server, is_whole, signal, until_status};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn cluster(data: &Path, flags: &[&str]) -> Cluster {
    Cluster::start(binary(), data, &[&["--shards", "1"], flags].concat())
}

fn schema() -> Value {
    json!({"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]})
}

fn shards(count: u64) -> Value {
    let shard = |n| json!({"Stud_id_low": n * 4096, "Shard_id": format!("sh{}", n + 1), "Shard_size": 4096});
    (0..count).map(shard).collect()
}

fn init() -> Value {
    let servers = json!({"Server0": ["sh1", "sh2"], "Server1": ["sh2", "sh3"], "Server2": ["sh1", "sh3"]});
    json!({"N": 3, "schema": schema(), "shards": shards(3), "servers": servers})
}

fn row(id: u64) -> Value {
    json!({"Stud_id": id, "Stud_name": format!("name {id}"), "Stud_marks": id % 100})
}

fn failure(text: &Value) -> &str {
    assert_eq!(text["status"], "failure", "{text}");
    text["message"].as_str().unwrap()
}

#[tokio::test]
async fn every_route_of_the_balancer_role_answers_as_its_contract_says() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &[]);
    let mut http = Http::new(cluster.http());

    assert_eq!(http.get("/test").await.expect(200), "Test successful");
    assert_eq!(http.get("/favicon.ico").await.expect(204), Value::Null);
    assert_eq!(http.get("/status").await.expect(200)["N"], 0);
    let early = http.json("POST", "/write", &json!({"data": [row(1)]})).await.expect(400);
    assert!(failure(&early).contains("/init"));
    for (method, path, body) in [
        ("POST", "/read", json!({"Stud_id": {"low": 0, "high": 1}})),
        ("PUT", "/update", json!({"Stud_id": 1, "data": row(1)})),
        ("DELETE", "/del", json!({"Stud_id": 1})),
        ("POST", "/add", json!({"n": 1, "servers": {"Server4": ["sh1"]}})),
    ] {
        assert!(failure(&http.json(method, path, &body).await.expect(400)).contains("/init"), "{method} {path}");
    }

    // What contradicts itself is refused before anything is started.
    let mut cases: Vec<(Value, &str)> = vec![];
    let with = |field: &str, value: Value| {
        let mut body = init();
        body[field] = value;
        body
    };
    let mut twice = shards(3);
    twice[1]["Shard_id"] = "sh1".into();
    cases.push((with("shards", twice), "<Error> Duplicate shard id sh1 found in request"));
    let mut overlap = shards(3);
    overlap[1]["Stud_id_low"] = 4095.into();
    cases.push((with("shards", overlap), "overlap"));
    let mut gap = shards(3);
    gap[2]["Stud_id_low"] = 8_193.into();
    cases.push((with("shards", gap), "sh2 and sh3 leave a gap"));
    let few = json!({"Server0": ["sh1"], "Server1": ["sh2"], "Server2": ["sh1"]});
    cases.push((with("servers", few), "<Error> Mismatch between shards in 'shards' and 'servers'"));
    cases.push((with("N", 2.into()), "N is 2"));
    cases.push((with("N", "3".into()), "N must be"));
    cases.push((with("schema", json!({"columns": ["Stud_id"]})), "dtypes"));
    cases.push((with("schema", json!({"columns": ["Stud_id"], "dtypes": ["Date"]})), "Date"));
    cases.push((with("shards", json!([{"Shard_id": "sh1"}])), "Stud_id_low"));
    for field in ["N", "schema", "shards"] {
        let mut body = init();
        body.as_object_mut().unwrap().remove(field);
        cases.push((body, field));
    }
    cases.push((with("servers", json!({"Server0": "sh1"})), "Server0"));
    cases.push((with("shards", json!([])), "at least one"));
    for (body, words) in cases {
        let told = http.json("POST", "/init", &body).await.expect(400);
        assert!(failure(&told).contains(words), "{told}");
    }
    let told = http.send("POST", "/init", &[("content-type", "text/plain")], b"{").await.expect(400);
    failure(&told);

    let done = http.json("POST", "/init", &init()).await.expect(200);
    assert_eq!(done, json!({"message": "Configured Database", "status": "success"}));
    let status = http.get("/status").await.expect(200);
    assert_eq!((&status["N"], &status["schema"], &status["shards"]), (&3.into(), &schema(), &shards(3)));
    assert_eq!(status["servers"], init()["servers"]);
    assert_eq!(status.as_object().unwrap().len(), 4);

    // One write over three shards, and reads over parts of them.
    let data: Vec<Value> = [1000, 4095, 4096, 8191, 8192, 8889].map(row).to_vec();
    let done = http.json("POST", "/write", &json!({"data": data})).await.expect(200);
    assert_eq!(done, json!({"message": "6 Data entries added", "status": "success"}));
    let read = |low: u64, high: u64| json!({"Stud_id": {"low": low, "high": high}});
    let all = http.json("POST", "/read", &read(1000, 8889)).await.expect(200);
    assert_eq!(all, json!({"shards_queried": ["sh1", "sh2", "sh3"], "data": data, "status": "success"}));
    assert_eq!(http.json("GET", "/read", &read(4096, 4096)).await.expect(200)["data"], json!([row(4096)]));
    assert_eq!(http.json("POST", "/read", &read(4096, 4096)).await.expect(200)["shards_queried"], json!(["sh2"]));
    let none = http.json("POST", "/read", &read(20_000, 30_000)).await.expect(200);
    assert_eq!(none, json!({"shards_queried": [], "data": [], "status": "success"}));
    failure(&http.json("POST", "/read", &read(2, 1)).await.expect(400));
    for bad in
        [json!({}), json!({"Stud_id": 7}), json!({"Stud_id": {"low": 0}}), json!({"Stud_id": {"low": "x", "high": 9}})]
    {
        failure(&http.json("POST", "/read", &bad).await.expect(400));
    }

    // A write that cannot be done whole is not done at all.
    let bad = [
        (409, json!([row(1), row(5000), row(8889)]), "8889"),
        (400, json!([row(1), row(5000), row(1)]), "twice"),
        (400, json!([row(1), row(99_999)]), "99999"),
        (400, json!([row(1), {"Stud_id": 2, "Stud_name": "x"}]), "row 1: Stud_marks"),
        (400, json!([row(1), {"Stud_id": "x", "Stud_name": "x", "Stud_marks": 1}]), "row 1: Stud_id"),
        (400, json!({"Stud_id": 1}), "list"),
    ];
    for (code, data, words) in bad {
        let told = http.json("POST", "/write", &json!({"data": data})).await.expect(code);
        assert!(failure(&told).contains(words), "{told}");
    }
    assert_eq!(http.json("POST", "/read", &read(0, 20_000)).await.expect(200)["data"], json!(data));
    http.json("POST", "/write", &row(7)).await.expect(200);

    let new = json!({"Stud_id": 1000, "Stud_name": "new", "Stud_marks": "A"});
    let done = http.json("PUT", "/update", &json!({"Stud_id": "1000", "data": new})).await.expect(200);
    assert_eq!(done, json!({"message": "Data entry for Stud_id: 1000 updated", "status": "success"}));
    assert_eq!(http.json("POST", "/read", &read(1000, 1000)).await.expect(200)["data"], json!([new]));
    http.json("PUT", "/update", &json!({"Stud_id": 1000, "data": {"Stud_marks": 3}})).await.expect(200);
    assert_eq!(http.json("POST", "/read", &read(1000, 1000)).await.expect(200)["data"][0]["Stud_name"], "new");
    for id in [5, 99_999] {
        let told = http.json("PUT", "/update", &json!({"Stud_id": id, "data": row(id)})).await.expect(404);
        assert_eq!(failure(&told), "Student ID not found");
        let told = http.json("DELETE", "/del", &json!({"Stud_id": id})).await.expect(404);
        assert_eq!(failure(&told), "Student ID not found");
    }
    let malformed = [
        json!({"Stud_id": 1000, "data": row(1)}),
        json!({"Stud_id": 1000}),
        json!({"data": row(1)}),
        json!({"Stud_id": "x", "data": {}}),
    ];
    for bad in malformed {
        failure(&http.json("PUT", "/update", &bad).await.expect(400));
    }
    for bad in [json!({}), json!({"Stud_id": -1})] {
        failure(&http.json("DELETE", "/del", &bad).await.expect(400));
    }
    let done = http.json("DELETE", "/del", &json!({"Stud_id": 1000})).await.expect(200);
    assert_eq!(done["message"], "Data entry with Stud_id:1000 removed from all replicas");
    http.json("DELETE", "/del", &json!({"Stud_id": 1000})).await.expect(404);
    failure(&http.json("POST", "/del", &json!({"Stud_id": 7})).await.expect(405));

    // The role of a storage server, which names its shard.
    let read = http.json("POST", "/read", &json!({"shard": "sh2", "Stud_id": {"low": 0, "high": 9000}})).await;
    assert_eq!(read.expect(200), json!({"data": [row(4096), row(8191)], "status": "success"}));
    let body = json!({"shard": "sh2", "curr_idx": 507, "data": [row(5000), row(5001)]});
    let done = http.json("POST", "/write", &body).await.expect(200);
    assert_eq!(
        (&done["message"], &done["current_idx"], &done["curr_idx"]),
        (&"Data entries added".into(), &509.into(), &509.into())
    );
    failure(&http.json("POST", "/write", &body).await.expect(409));
    failure(&http.json("POST", "/write", &json!({"shard": "sh2", "curr_idx": 0, "data": [row(1)]})).await.expect(400));
    failure(&http.json("POST", "/read", &json!({"shard": "sh9", "Stud_id": {"low": 0, "high": 1}})).await.expect(404));
    let done =
        http.json("PUT", "/update", &json!({"shard": "sh2", "Stud_id": 5000, "data": row(5000)})).await.expect(200);
    assert_eq!(done["message"], "Data entry for Stud_id:5000 updated");
    let done = http.json("DELETE", "/del", &json!({"shard": "sh2", "Stud_id": 5000})).await.expect(200);
    assert_eq!(done["message"], "Data entry with Stud_id:5000 removed");
    http.json("POST", "/del", &json!({"shard": "sh2", "Stud_id": 5001})).await.expect(200);
    http.json("POST", "/del", &json!({"shard": "sh2", "Stud_id": 5001})).await.expect(404);
    for method in ["GET", "POST"] {
        let copied = http.json(method, "/copy", &json!({"shards": ["sh1", "sh3"]})).await.expect(200);
        assert_eq!(copied["sh1"], json!([row(7), row(4095)]));
        assert_eq!((&copied["sh3"], &copied["status"]), (&json!([row(8192), row(8889)]), &"success".into()));
    }
    failure(&http.json("POST", "/copy", &json!({"shards": ["sh9"]})).await.expect(404));
    let config = json!({"schema": schema(), "shards": ["sh1", "loose"]});
    let done = http.json("POST", "/config", &config).await.expect(200);
    assert!(done["message"].as_str().unwrap().ends_with(":loose configured"), "{done}");
    failure(&http.json("POST", "/config", &json!({"shards": ["sh1"]})).await.expect(400));
    http.json("POST", "/write", &json!({"shard": "loose", "curr_idx": 0, "data": [row(99_999)]})).await.expect(200);
    assert_eq!(http.send("POST", "/autopopulate", &[], b"").await.expect(200), Value::Null);
    let populated = http.json("POST", "/read", &json!({"shard": "sh1", "Stud_id": {"low": 0, "high": 100}})).await;
    assert!(populated.expect(200)["data"].as_array().unwrap().len() >= 5);
}

#[tokio::test]
async fn servers_and_shards_come_and_go_and_no_row_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &[]);
    let mut http = Http::new(cluster.http());
    http.json("POST", "/init", &init()).await.expect(200);
    let data: Vec<Value> = (0..3 * 4096).step_by(64).map(row).collect();
    http.json("POST", "/write", &json!({"data": data})).await.expect(200);
    let all = json!({"Stud_id": {"low": 0, "high": 999_999}});

    let more = json!([{"Stud_id_low": 12_288, "Shard_id": "sh4", "Shard_size": 4096}]);
    let add = |n: u64, servers: Value| json!({"n": n, "new_shards": more, "servers": servers});
    let refused = [
        (
            add(3, json!({"Server4": ["sh4"]})),
            "<Error> Number of new servers (n) is greater than newly added instances",
        ),
        (add(1, json!({"Server4": ["sh4"], "Server5": ["sh4"]})), "lesser"),
        (add(1, json!({"Server0": ["sh4"]})), "Server0 already exists"),
        (add(1, json!({"Server4": ["sh9", "sh4"]})), "sh9"),
        (add(1, json!({"Server4": ["sh1"]})), "no server is named for the new shard sh4"),
        (json!({"n": 1, "new_shards": shards(1), "servers": {"Server4": ["sh1"]}}), "sh1 already exists"),
        (json!({"n": "x", "servers": {"Server4": ["sh1"]}}), "n must be"),
        (json!({"n": 1, "new_shards": [{}], "servers": {"Server4": ["sh1"]}}), "new_shards"),
    ];
    let mut gap = add(1, json!({"Server4": ["sh4"]}));
    gap["new_shards"][0]["Stud_id_low"] = 12_289.into();
    for (body, words) in refused.into_iter().chain([(gap, "sh3 and sh4 leave a gap")]) {
        let told = http.json("POST", "/add", &body).await.expect(400);
        assert!(failure(&told).contains(words), "{told}");
    }
    assert_eq!(http.get("/status").await.expect(200)["N"], 3);
    let done =
        http.json("POST", "/add", &add(2, json!({"Server4": ["sh3", "sh4"], "Server[5]": ["sh2", "sh4"]}))).await;
    let done = done.expect(200);
    assert_eq!((&done["N"], &done["status"]), (&5.into(), &"successful".into()));
    let message = done["message"].as_str().unwrap();
    assert!(message.starts_with("Add Server:4 and Server:"), "{message}");
    http.json("POST", "/write", &json!({"data": [row(12_288), row(16_383)]})).await.expect(200);
    let mut wanted = data.clone();
    wanted.extend([row(12_288), row(16_383)]);
    let read = http.json("POST", "/read", &all).await.expect(200);
    assert_eq!((&read["data"], &read["shards_queried"]), (&json!(wanted), &json!(["sh1", "sh2", "sh3", "sh4"])));

    // A shard that is there already gets one more copy: only who keeps it changes.
    let done = http.json("POST", "/add", &json!({"n": 1, "servers": {"Server6": ["sh1"]}})).await.expect(200);
    assert_eq!(done, json!({"N": 6, "message": "Add Server:6", "status": "successful"}));
    let client = cluster.client().await;
    let copies = |status: &shkv_client::StatusDone| {
        let map = status.map.as_ref().unwrap();
        let server = map.nodes.iter().find(|node| node.name == "Server6").map(|node| node.id);
        map.shards
            .iter()
            .any(|shard| server.is_some_and(|server| shard.replica_on(server).is_some() && shard.replicas.len() == 3))
    };
    until_status(&client, copies).await;
    let read = http.json("POST", "/read", &all).await.expect(200);
    assert_eq!((&read["data"], &read["shards_queried"]), (&json!(wanted), &json!(["sh1", "sh2", "sh3", "sh4"])));
    let done = http.json("POST", "/rm", &json!({"n": 1, "servers": ["Server6"]})).await.expect(200);
    assert_eq!(done, json!({"message": {"N": 5, "servers": ["Server6"]}, "status": "successful"}));

    let refused = [
        (
            json!({"n": 1, "servers": ["Server0", "Server1"]}),
            "<Error> Length of server list is more than removable instances",
        ),
        (json!({"n": 9, "servers": []}), "9 servers"),
        (json!({"n": 1, "servers": ["Nobody"]}), "Nobody"),
        (json!({"n": 2, "servers": ["Server0", "Server0"]}), "twice"),
        (json!({"n": 0, "servers": []}), "at least 1"),
        (json!({"n": 1, "servers": "Server0"}), "servers must be"),
    ];
    for (body, words) in refused {
        let told = http.json("DELETE", "/rm", &body).await.expect(400);
        assert!(failure(&told).contains(words), "{told}");
    }
    let done = http.json("DELETE", "/rm", &json!({"n": 2, "servers": ["Server4"]})).await.expect(200);
    assert_eq!((&done["message"]["N"], &done["status"]), (&3.into(), &"successful".into()));
    let gone = done["message"]["servers"].as_array().unwrap();
    assert_eq!((gone.len(), &gone[0]), (2, &"Server4".into()));
    let status = http.get("/status").await.expect(200);
    assert_eq!((&status["N"], status["servers"].as_object().unwrap().len()), (&3.into(), 3));
    assert_eq!(http.json("POST", "/read", &all).await.expect(200)["data"], json!(wanted));
    let left: Vec<String> = status["servers"].as_object().unwrap().keys().cloned().collect();
    let done = http.json("DELETE", "/rm", &json!({"n": 1, "servers": []})).await.expect(200);
    assert_eq!(done["message"]["N"], 2);
    assert!(
        left.iter().any(|name| done["message"]["servers"] == json!([name])),
        "chance chose none that was there: {done}"
    );
    assert_eq!(http.json("POST", "/read", &all).await.expect(200)["data"], json!(wanted));

    // Configured anew, it is empty.
    let anew = json!({"N": 2, "schema": schema(), "shards": shards(2)});
    http.json("POST", "/init", &anew).await.expect(200);
    let status = http.get("/status").await.expect(200);
    assert_eq!((&status["N"], &status["shards"]), (&2.into(), &shards(2)));
    assert_eq!(http.json("POST", "/read", &all).await.expect(200)["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_one_balancer_configures_holds_at_once_for_what_another_is_asked() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &[]);
    let args = ["balancer", "--nodes", &cluster.addr(), "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0"];
    let other = Server::start(Path::new(env!("CARGO_BIN_EXE_shkv")), &args);
    let at_other = other.told()["http"].as_str().unwrap().to_owned();
    let (mut one, mut two) = (Http::new(cluster.http()), Http::new(at_other.as_str()));
    let marks = |round: u64| format!("Marks{}", round / 2); // every other time the schema stays
    let row = |id: u64, round: u64| json!({"Stud_id": id, "Stud_name": format!("round {round}"), marks(round): 1});
    let init = |round: u64| {
        let mut body = init();
        body["schema"]["columns"][2] = marks(round).into();
        body
    };
    one.json("POST", "/init", &init(0)).await.expect(200);

    // Others ask all the time, so that whatever is shared or remembered between requests is.
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(100)));
    let mut others = Vec::new();
    for _ in 0..6 {
        let (stop, next, mut http) = (stop.clone(), next.clone(), Http::new(at_other.as_str()));
        others.push(tokio::spawn(async move {
            let mut told = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let id = next.fetch_add(1, Ordering::Relaxed) % 3_900 + 100; // none of those below
                let body = json!({"data": [{"Stud_id": id, "Stud_name": "x", "Marks0": 1}]});
                let answer = http.json("POST", "/write", &body).await;
                assert!([200, 400, 409, 500, 503].contains(&answer.status), "{answer:?}"); // as it is configured just then
                told += u64::from(answer.status == 200);
            }
            told
        }));
    }
    for round in 1..8 {
        one.json("POST", "/init", &init(round)).await.expect(200);
        let ids = [round, 5000 + round, 9000 + round];
        for id in ids {
            two.json("POST", "/write", &json!({"data": [row(id, round)]})).await.expect(200);
            let read = one.json("POST", "/read", &json!({"Stud_id": {"low": id, "high": id}})).await.expect(200);
            assert_eq!(read["data"], json!([row(id, round)]), "round {round}: it was acknowledged");
        }
        one.json("PUT", "/update", &json!({"Stud_id": round, "data": row(round, 400)})).await.expect(400);
        two.json("DELETE", "/del", &json!({"Stud_id": round})).await.expect(200);
        let status = two.get("/status").await.expect(200);
        assert_eq!(status["schema"]["columns"][2], marks(round), "round {round}");
    }
    stop.store(true, Ordering::Relaxed);
    let mut told = 0;
    for other in others {
        told += other.await.unwrap();
    }
    assert!(told > 0, "the others have written");
}

// ---------------------------------------------------------------------------------------------- a server's own listener

/// Everything that a storage server answers at a listener of its own, for shards that no `/init` has made; with it the
/// contents of `sh1` and `sh2`.
async fn every_route_of_a_server(addr: &str, name: &str, number: u64) -> Value {
    let mut http = Http::new(addr);
    let hello = json!({"message": format!("Hello from Server: {number}"), "status": "successful"});
    assert_eq!(http.get("/home").await.expect(200), hello);
    let beat = http.get("/heartbeat").await;
    assert_eq!((beat.status, beat.body.len()), (200, 0));
    for _ in 0..2 {
        let done = http.json("POST", "/config", &json!({"schema": schema(), "shards": ["sh1", "sh2"]})).await;
        let message = format!("{name}:sh1, {name}:sh2 configured");
        assert_eq!(done.expect(200), json!({"message": message, "status": "success"}));
    }
    let columns = json!({"columns": ["Stud_id"], "dtypes": ["Number"]});
    for bad in [json!({}), json!({"schema": schema()}), json!({"schema": columns, "shards": ["sh1"]})] {
        failure(&http.json("POST", "/config", &bad).await.expect(400));
    }

    let five: Vec<Value> = (2_255..2_260).map(row).collect();
    let write = json!({"shard": "sh2", "curr_idx": 507, "data": five});
    let done = json!({"message": "Data entries added", "current_idx": 512, "curr_idx": 512, "status": "success"});
    assert_eq!(http.json("POST", "/write", &write).await.expect(200), done);
    assert!(failure(&http.json("POST", "/write", &write).await.expect(409)).contains("2255"));
    let within = |low: u64, high: u64| json!({"shard": "sh2", "Stud_id": {"low": low, "high": high}});
    let read = http.json("POST", "/read", &within(2_256, 2_258)).await.expect(200);
    assert_eq!(read, json!({"data": five[1..4], "status": "success"}), "both ends belong to it");

    let new = json!({"Stud_id": 2_255, "Stud_name": "new", "Stud_marks": "A"});
    let update = |id: u64| json!({"shard": "sh2", "Stud_id": id, "data": {"Stud_name": "new", "Stud_marks": "A"}});
    let done = json!({"message": "Data entry for Stud_id:2255 updated", "status": "success"});
    assert_eq!(http.json("PUT", "/update", &update(2_255)).await.expect(200), done);
    assert_eq!(http.json("POST", "/read", &within(2_255, 2_255)).await.expect(200)["data"], json!([new]));
    assert_eq!(failure(&http.json("PUT", "/update", &update(1)).await.expect(404)), "Student ID not found");
    for (method, id) in [("DELETE", 2_256), ("POST", 2_257)] {
        let del = json!({"shard": "sh2", "Stud_id": id});
        let done = json!({"message": format!("Data entry with Stud_id:{id} removed"), "status": "success"});
        assert_eq!(http.json(method, "/del", &del).await.expect(200), done);
        assert_eq!(failure(&http.json(method, "/del", &del).await.expect(404)), "Student ID not found");
    }
    let unknown = [
        ("POST", "/read", json!({"shard": "sh9", "Stud_id": {"low": 0, "high": 1}})),
        ("POST", "/write", json!({"shard": "sh9", "curr_idx": 0, "data": [row(1)]})),
        ("PUT", "/update", json!({"shard": "sh9", "Stud_id": 1, "data": row(1)})),
        ("DELETE", "/del", json!({"shard": "sh9", "Stud_id": 1})),
        ("GET", "/copy", json!({"shards": ["sh2", "sh9"]})),
    ];
    for (method, path, body) in unknown {
        let told = http.json(method, path, &body).await.expect(404);
        assert!(failure(&told).contains("sh9"), "{method} {path}: {told}");
    }
    let malformed = [
        ("POST", "/read", json!({"shard": "sh2", "Stud_id": {"low": 0}})),
        ("POST", "/read", json!({"shard": 2, "Stud_id": {"low": 0, "high": 1}})),
        ("POST", "/write", json!({"shard": "sh2", "curr_idx": -1, "data": [row(1)]})),
        ("POST", "/write", json!({"shard": "sh2", "curr_idx": 0, "data": [{"Stud_id": 1}]})),
        ("PUT", "/update", json!({"shard": "sh2", "Stud_id": 2_255})),
        ("PUT", "/update", json!({"shard": "sh2", "Stud_id": 2_255, "data": {"Other": 1}})),
        ("DELETE", "/del", json!({"shard": "sh2"})),
        ("GET", "/copy", json!({"shards": "sh2"})),
    ];
    for (method, path, body) in malformed {
        failure(&http.json(method, path, &body).await.expect(400));
    }
    assert_eq!(http.send("POST", "/autopopulate", &[], b"").await.expect(200), Value::Null);
    let copied = http.json("GET", "/copy", &json!({"shards": ["sh1", "sh2"]})).await.expect(200);
    assert_eq!(http.json("POST", "/copy", &json!({"shards": ["sh1", "sh2"]})).await.expect(200), copied);
    assert_eq!((&copied["sh2"], &copied["status"]), (&json!([new, row(2_258), row(2_259)]), &"success".into()));
    let ids: Vec<u64> = copied["sh1"].as_array().unwrap().iter().map(|row| row["Stud_id"].as_u64().unwrap()).collect();
    assert!(ids.len() == 5 && ids.iter().all(|id| (1..=100).contains(id)), "{ids:?}");
    copied
}

#[tokio::test]
async fn a_storage_server_answers_every_route_at_a_listener_of_its_own() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &["--node-http", "127.0.0.1:0"]);
    let nodes = cluster.ready()["nodes"].as_array().unwrap();
    let own = |name: &str| {
        let node = nodes.iter().find(|node| node["name"] == name).unwrap();
        node["http"].as_str().unwrap().to_owned()
    };
    let copied = every_route_of_a_server(&own("Server1"), "Server1", 2).await;
    let data = folder.path().join("alone");
    let (data, join) = (data.to_str().unwrap(), cluster.addr());
    let line = ["node", "--name", "Alone", "--data", data, "--listen", "127.0.0.1:0", "--join", &join];
    let alone = Server::start(binary(), &[&line[..], &["--http", "127.0.0.1:0"]].concat());
    let by_itself = alone.told()["http"].as_str().unwrap().to_owned();
    for (addr, name) in [(own("Server0"), "Server0"), (own("Server2"), "Server2"), (by_itself, "Alone")] {
        let mut http = Http::new(addr);
        let deadline = Instant::now() + PATIENCE;
        while http.get("/home").await.status != 200 {
            assert!(Instant::now() < deadline, "{name} does not come");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert_eq!(http.json("GET", "/copy", &json!({"shards": ["sh1", "sh2"]})).await.expect(200), copied);
        let done = http.json("POST", "/config", &json!({"schema": schema(), "shards": ["sh2"]})).await.expect(200);
        assert_eq!(done["message"], format!("{name}:sh2 configured"));
    }
}

#[tokio::test]
async fn members_that_start_no_nodes_are_storage_servers_and_refuse_servers_that_are_not_there() {
    let folder = tempfile::tempdir().unwrap();
    let data = folder.path().join("a");
    let data = data.to_str().unwrap();
    let line =
        ["serve", "--bootstrap", "--name", "Server0", "--data", data, "--shards", "1", "--listen", "127.0.0.1:0"];
    let member =
        Server::start(binary(), &[&line[..], &["--node-listen", "127.0.0.1:0", "--http", "127.0.0.1:0"]].concat());
    let addr = member.told()["http"].as_str().unwrap();
    every_route_of_a_server(addr, "Server0", 1).await;

    let mut http = Http::new(addr);
    let told = http.json("POST", "/init", &init()).await.expect(400);
    assert!(failure(&told).contains("node"), "{told}");
    assert_eq!(http.get("/status").await.expect(200)["N"], 0, "what could not be started has configured nothing");
    let told = http.json("POST", "/add", &json!({"n": 1, "hostnames": ["S4"]})).await.expect(501);
    assert!(failure(&told).contains("node"), "{told}");
    let alone = json!({"N": 1, "schema": schema(), "shards": shards(1), "servers": {"Server0": ["sh1"]}});
    http.json("POST", "/init", &alone).await.expect(200);
    let more = json!({"n": 1, "servers": {"Server1": ["sh1"]}});
    assert!(failure(&http.json("POST", "/add", &more).await.expect(400)).contains("node"));
    assert_eq!(http.get("/status").await.expect(200)["servers"], json!({"Server0": ["sh1"]}));
}

// ---------------------------------------------------------------------------------------------- a server is killed

/// Ids of each shard in the tests that kill: more than can be written meanwhile.
const IDS: u64 = 10_000_000;

/// Three shards of that size, each on all three servers.
fn init_wide() -> Value {
    let shard = |n: u64| json!({"Stud_id_low": n * IDS, "Shard_id": format!("sh{}", n + 1), "Shard_size": IDS});
    let shards: Value = (0..3).map(shard).collect();
    let all = json!(["sh1", "sh2", "sh3"]);
    json!({"N": 3, "schema": schema(), "shards": shards, "servers": {"Server0": all, "Server1": all, "Server2": all}})
}

/// Clients that write, each time a row into every shard at once, and remember what was acknowledged.
struct Writers {
    stop: Arc<AtomicBool>,
    next: Arc<AtomicU64>,
    writing: Vec<JoinHandle<Vec<u64>>>,
}

impl Writers {
    fn start(addr: &str) -> Self {
        let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let mut writing = Vec::new();
        for _ in 0..4 {
            let (stop, next, mut http) = (stop.clone(), next.clone(), Http::new(addr));
            writing.push(tokio::spawn(async move {
                let mut told = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let id = next.fetch_add(1, Ordering::Relaxed);
                    let data = json!({"data": [row(id), row(id + IDS), row(id + 2 * IDS)]});
                    let answer = http.json("POST", "/write", &data).await;
                    assert!([200, 500, 503].contains(&answer.status), "{answer:?}");
                    if answer.status == 200 {
                        told.push(id);
                    }
                }
                told
            }));
        }
        Self { stop, next, writing }
    }

    /// How many writes were begun.
    fn begun(&self) -> u64 {
        self.next.load(Ordering::Relaxed)
    }

    /// Waits for so many more.
    async fn progress(&self, more: u64) {
        let (wanted, deadline) = (self.begun() + more, Instant::now() + PATIENCE);
        while self.begun() < wanted {
            assert!(Instant::now() < deadline, "nothing is written");
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// The ids that were acknowledged.
    async fn stop(self) -> Vec<u64> {
        self.stop.store(true, Ordering::Relaxed);
        let mut told = Vec::new();
        for writer in self.writing {
            told.extend(writer.await.unwrap());
        }
        told
    }
}

/// Nothing acknowledged is missing among the rows of all shards, and no write is there by half.
fn check<'a>(rows: impl Iterator<Item = &'a Value>, told: &[u64]) {
    let mut found: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for row in rows {
        let id = row["Stud_id"].as_u64().unwrap();
        found.entry(id % IDS).or_default().push(id / IDS);
    }
    for (id, shards) in &found {
        assert_eq!(shards, &[0, 1, 2], "half of the write of {id} is there");
    }
    for id in told {
        assert!(found.contains_key(id), "the acknowledged row {id} is gone");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_under_writes_costs_no_row_and_no_half_of_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &["--spawn", "process", "--replace-after", "1h"]);
    let mut http = Http::new(cluster.http());
    http.json("POST", "/init", &init_wide()).await.expect(200);
    let writers = Writers::start(&cluster.http());
    writers.progress(50).await;
    let client = cluster.client().await;
    let victim = shkv_tests::nodes(&client).await;
    let victim = victim.iter().find(|node| node.name == "Server1").unwrap().process;
    signal(victim, "KILL");
    let killed = writers.begun();
    writers.progress(200).await;
    let told = writers.stop().await;
    assert!(told.iter().any(|id| *id > killed), "nothing was acknowledged after the kill");
    let all = json!({"Stud_id": {"low": 0, "high": 3 * IDS}});
    let read = http.json("POST", "/read", &all).await.expect(200);
    check(read["data"].as_array().unwrap().iter(), &told);
    let status = http.get("/status").await.expect(200);
    assert_eq!((&status["N"], &status["servers"]["Server1"]), (&3.into(), &json!(["sh1", "sh2", "sh3"])));

    // Server1 is there again and keeps its shards.
    let whole = |nodes: &[shkv_client::NodeStatus]| {
        let node = nodes.iter().find(|node| node.name == "Server1" && node.process != victim);
        node.is_some_and(|node| node.replicas.len() >= 3)
    };
    shkv_tests::until(&client, whole).await;
    let after = http.json("POST", "/read", &all).await.expect(200);
    assert_eq!(after["data"], read["data"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_that_cannot_come_back_is_replaced_under_writes_and_the_new_one_has_every_row() {
    let folder = tempfile::tempdir().unwrap();
    let flags = ["--spawn", "process", "--replace-after", "5s", "--node-http", "127.0.0.1:0"];
    let cluster = cluster(folder.path(), &flags);
    let mut http = Http::new(cluster.http());
    http.json("POST", "/init", &init_wide()).await.expect(200);
    let before = http.get("/status").await.expect(200);
    let client = cluster.client().await;
    let writers = Writers::start(&cluster.http());
    writers.progress(50).await;
    let victim = shkv_tests::nodes(&client).await.into_iter().find(|node| node.name == "Server1").unwrap();

    // Its disk is damaged, and it dies: started again, it does not come back.
    signal(victim.process, "KILL");
    std::fs::write(folder.path().join("Server1").join("identity"), b"not an identity").unwrap();
    let killed = writers.begun();
    writers.progress(100).await;
    let is_replaced = |status: &shkv_client::StatusDone| {
        let map = status.map.as_ref().unwrap();
        let new = map.nodes.iter().find(|node| node.name == "Server1" && node.id != victim.id);
        map.node(victim.id).is_none() && new.is_some() && is_whole(status, 3)
    };
    until_status(&client, is_replaced).await;
    writers.progress(100).await;
    let told = writers.stop().await;
    assert!(told.iter().any(|id| *id > killed + 100), "nothing was acknowledged after the kill");
    assert_eq!(http.get("/status").await.expect(200), before, "servers and shards are what they were");
    let all = json!({"Stud_id": {"low": 0, "high": 3 * IDS}});
    let read = http.json("POST", "/read", &all).await.expect(200);
    let rows = read["data"].as_array().unwrap();
    check(rows.iter(), &told);

    // The others are silenced: what is told now is what the replacement has itself. A follower that has a row
    // hears with the next message only that it is committed, and tells it from then on.
    until_status(&client, |status| is_whole(status, 3)).await;
    shkv_tests::until(&client, shkv_tests::are_level).await;
    let others = shkv_tests::nodes(&client).await.into_iter().filter(|node| node.name != "Server1");
    let _silent = Frozen::new(&others.map(|node| node.process).collect::<Vec<_>>());
    let nodes = http.get("/v1/nodes").await.expect(200);
    let own = nodes["nodes"].as_array().unwrap().iter().find(|node| node["name"] == "Server1").unwrap();
    let mut own = Http::new(own["http"].as_str().unwrap());
    let headers = [("shkv-consistency", "eventual"), ("shkv-deadline-ms", "50000")];
    let asked = json!({"shards": ["sh1", "sh2", "sh3"]}).to_string();
    let copied = own.send("GET", "/copy", &headers, asked.as_bytes()).await.expect(200);
    let copied: Vec<&Value> = ["sh1", "sh2", "sh3"].iter().flat_map(|name| copied[name].as_array().unwrap()).collect();
    assert_eq!(copied, rows.iter().collect::<Vec<_>>());
}
