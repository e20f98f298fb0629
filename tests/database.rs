//! The sharded database over real HTTP against real clusters: each line of its contract, a flow as its graders run it, and
//! a server that is killed while rows are written.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and kills, and fails where it cannot go on"
)]

use serde_json::{Value, json};
use shkv_tests::http::Http;
use shkv_tests::{Cluster, PATIENCE, Server, signal};
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn cluster(data: &Path, flags: &[&str]) -> Cluster {
    Cluster::start(Path::new(env!("CARGO_BIN_EXE_shkv")), data, &[&["--shards", "1"], flags].concat())
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
    let few = json!({"Server0": ["sh1"], "Server1": ["sh2"], "Server2": ["sh1"]});
    cases.push((with("servers", few), "<Error> Mismatch between shards in 'shards' and 'servers'"));
    cases.push((with("N", 2.into()), "N is 2"));
    cases.push((with("N", "3".into()), "N must be"));
    cases.push((with("schema", json!({"columns": ["Stud_id"]})), "dtypes"));
    cases.push((with("schema", json!({"columns": ["Stud_id"], "dtypes": ["Date"]})), "Date"));
    cases.push((with("shards", json!([{"Shard_id": "sh1"}])), "Stud_id_low"));
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
    failure(&http.json("POST", "/read", &json!({})).await.expect(400));

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
    failure(&http.json("PUT", "/update", &json!({"Stud_id": 1000, "data": row(1)})).await.expect(400));
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
    ];
    for (body, words) in refused {
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

    let refused = [
        (
            json!({"n": 1, "servers": ["Server0", "Server1"]}),
            "<Error> Length of server list is more than removable instances",
        ),
        (json!({"n": 9, "servers": []}), "9 servers"),
        (json!({"n": 1, "servers": ["Nobody"]}), "Nobody"),
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

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_server_killed_under_writes_costs_no_row_and_no_half_of_a_write() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &["--spawn", "process", "--replace-after", "6s"]);
    let mut http = Http::new(cluster.http());
    let body = json!({"N": 3, "schema": schema(), "shards": shards(3), "servers": {
        "Server0": ["sh1", "sh2", "sh3"], "Server1": ["sh1", "sh2", "sh3"], "Server2": ["sh1", "sh2", "sh3"]}});
    http.json("POST", "/init", &body).await.expect(200);

    // Each write has a row in every shard; `told` has those that were acknowledged.
    let (stop, next) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
    let mut writers = Vec::new();
    for _ in 0..4 {
        let (stop, next, mut http) = (stop.clone(), next.clone(), Http::new(cluster.http()));
        writers.push(tokio::spawn(async move {
            let mut told = Vec::new();
            while !stop.load(Ordering::Relaxed) {
                let id = next.fetch_add(1, Ordering::Relaxed);
                if id >= 4096 {
                    break;
                }
                let data = json!({"data": [row(id), row(id + 4096), row(id + 8192)]});
                let answer = http.json("POST", "/write", &data).await;
                assert!([200, 500, 503].contains(&answer.status), "{answer:?}");
                if answer.status == 200 {
                    told.push(id);
                }
            }
            told
        }));
    }
    let until_written = |count: u64| {
        let next = next.clone();
        async move {
            let deadline = Instant::now() + PATIENCE;
            while next.load(Ordering::Relaxed) < count {
                assert!(Instant::now() < deadline, "nothing is written");
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    until_written(50).await;
    let victim = shkv_tests::nodes(&cluster.client().await).await;
    let victim = victim.iter().find(|node| node.name == "Server1").unwrap().process;
    signal(victim, "KILL");
    let killed = next.load(Ordering::Relaxed);
    until_written(killed + 200).await;
    stop.store(true, Ordering::Relaxed);
    let mut told = Vec::new();
    for writer in writers {
        told.extend(writer.await.unwrap());
    }

    assert!(told.iter().any(|id| *id > killed), "nothing was acknowledged after the kill");
    let read = http.json("POST", "/read", &json!({"Stud_id": {"low": 0, "high": 999_999}})).await.expect(200);
    let mut found: BTreeMap<u64, Vec<u64>> = BTreeMap::new();
    for row in read["data"].as_array().unwrap() {
        let id = row["Stud_id"].as_u64().unwrap();
        found.entry(id % 4096).or_default().push(id / 4096);
    }
    for (id, shards) in &found {
        assert_eq!(shards, &[0, 1, 2], "half of the write of {id} is there");
    }
    for id in told {
        assert!(found.contains_key(&id), "the acknowledged row {id} is gone");
    }
    let status = http.get("/status").await.expect(200);
    assert_eq!((&status["N"], &status["servers"]["Server1"]), (&3.into(), &json!(["sh1", "sh2", "sh3"])));

    // Server1 is there again and keeps its shards.
    let client = cluster.client().await;
    let whole = |nodes: &[shkv_client::NodeStatus]| {
        let node = nodes.iter().find(|node| node.name == "Server1" && node.process != victim);
        node.is_some_and(|node| node.replicas.len() >= 3)
    };
    shkv_tests::until(&client, whole).await;
    let after = http.json("POST", "/read", &json!({"Stud_id": {"low": 0, "high": 999_999}})).await.expect(200);
    assert_eq!(after["data"], read["data"]);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn ten_thousand_reads_at_once_are_all_answered_in_bounded_memory() {
    const READS: usize = 10_000;
    const CONNECTIONS: usize = 1_000;
    let folder = tempfile::tempdir().unwrap();
    let cluster = cluster(folder.path(), &[]);
    let mut http = Http::new(cluster.http());
    http.json("POST", "/init", &init()).await.expect(200);
    let data: Vec<Value> = (0..100).map(|n| row(n * 100)).collect();
    http.json("POST", "/write", &json!({"data": data})).await.expect(200);
    let mut readers = Vec::new();
    for reader in 0..CONNECTIONS {
        let mut http = Http::new(cluster.http());
        readers.push(tokio::spawn(async move {
            for n in 0..READS / CONNECTIONS {
                let id = ((reader + n * 7) % 100 * 100) as u64;
                let body = json!({"Stud_id": {"low": id, "high": id}});
                let read = http.json("POST", "/read", &body).await.expect(200);
                assert_eq!(read["data"], json!([row(id)]));
            }
        }));
    }
    for reader in readers {
        reader.await.unwrap();
    }
    let bytes = shkv_tests::resident_bytes(cluster.process());
    assert!(bytes < 1 << 30, "{bytes} bytes are in use");
}
