//! Our own REST, the load balancer's and the batch proxy's, over real HTTP against a real cluster: every route, what it
//! answers, and what it refuses.

#![expect(
    clippy::unwrap_used,
    clippy::disallowed_methods,
    reason = "tests start tasks, wait, and fail where they cannot go on"
)]

use serde_json::{Value, json};
use shkv_tests::http::{Answer, Http};
use shkv_tests::{Cluster, PATIENCE};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};
use tempfile::TempDir;

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn cluster(flags: &[&str]) -> (TempDir, Cluster) {
    let data = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), data.path(), flags);
    (data, cluster) // dropped in reverse: the cluster ends before its data goes
}

// ---------------------------------------------------------------------------------------------- our own

#[tokio::test]
async fn a_row_is_written_read_and_removed_by_its_path() {
    let (_data, cluster) = cluster(&["--nodes", "3"]);
    let mut http = Http::new(cluster.http());
    let path = "/v1/kv/default/a%2Fb%00%ff";
    assert_eq!(http.get(path).await.expect(404)["error"]["code"], "not_found");
    let value: Vec<u8> = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
    let put = http.send("PUT", path, &[], &value).await;
    let version = put.expect(200)["version"].as_u64().unwrap();
    let etag = format!("\"{version}\"");
    assert_eq!(put.header("etag"), Some(&etag[..]));
    let got = http.get(path).await;
    assert_eq!((got.status, got.header("etag")), (200, Some(&etag[..])));
    assert!(got.body == value, "the value is another");
    let head = http.send("HEAD", path, &[], b"").await;
    assert_eq!((head.status, head.header("content-length")), (200, Some("200000")));
    let same = http.send("GET", path, &[("if-none-match", &etag)], b"").await;
    assert_eq!((same.status, same.body.len()), (304, 0));
    assert_eq!(http.send("DELETE", path, &[], b"").await.expect(200)["removed"], true);
    http.send("DELETE", path, &[], b"").await.expect(404);
    http.send("PUT", "/v1/kv/default/empty", &[], b"").await.expect(200);
    let empty = http.get("/v1/kv/default/empty").await;
    assert_eq!((empty.status, empty.body.len()), (200, 0));
}

#[tokio::test]
async fn a_condition_that_does_not_hold_is_told_with_the_version_there_is() {
    let (_data, cluster) = cluster(&["--nodes", "1"]);
    let mut http = Http::new(cluster.http());
    let path = "/v1/kv/default/row";
    let missing = http.send("PUT", path, &[("if-match", "*")], b"x").await;
    assert_eq!(missing.expect(412)["error"]["version"], Value::Null);
    http.send("PUT", path, &[("if-none-match", "*")], b"1").await.expect(201);
    let there = http.send("PUT", path, &[("if-none-match", "*")], b"2").await;
    let version = there.expect(412)["error"]["version"].as_u64().unwrap();
    let etag = format!("\"{version}\"");
    assert_eq!(there.header("etag"), Some(&etag[..]));
    http.send("PUT", path, &[("if-match", &etag)], b"2").await.expect(200);
    http.send("PUT", path, &[("if-match", &etag)], b"3").await.expect(412);
    http.send("DELETE", path, &[("if-match", &etag)], b"").await.expect(412);
    http.send("GET", path, &[("if-match", &etag)], b"").await.expect(412);
    assert_eq!(http.get(path).await.text(), "2");
}

#[tokio::test]
async fn lists_are_ordered_bounded_and_go_on_from_their_cursor() {
    let (_data, cluster) = cluster(&["--nodes", "1"]);
    let mut http = Http::new(cluster.http());
    for n in 0..50 {
        http.send("PUT", &format!("/v1/kv/default/k{n:02}"), &[], format!("v{n}").as_bytes()).await.expect(200);
    }
    http.send("PUT", "/v1/kv/default/%ff", &[], b"\xfe").await.expect(200);
    let keys = |answer: &Answer| -> Vec<String> {
        let list = answer.expect(200);
        list["rows"].as_array().unwrap().iter().map(|row| row["key"].as_str().unwrap_or("?").to_owned()).collect()
    };
    let expected: Vec<String> = (0..50).map(|n| format!("k{n:02}")).collect();
    let all = http.get("/v1/kv/default?prefix=k").await;
    assert_eq!(keys(&all), expected);
    assert_eq!(all.json()["cursor"], Value::Null);
    assert_eq!(all.json()["rows"][7]["value"], "v7");
    for reverse in [false, true] {
        let mut seen = Vec::new();
        let mut path = format!("/v1/kv/default?prefix=k&limit=7&reverse={reverse}");
        let first = path.clone();
        loop {
            let page = http.get(&path).await;
            seen.extend(keys(&page));
            match page.json()["cursor"].as_str() {
                Some(cursor) => path = format!("{first}&cursor={cursor}"),
                None => break,
            }
        }
        if reverse {
            seen.reverse();
        }
        assert_eq!(seen, expected);
    }
    assert_eq!(keys(&http.get("/v1/kv/default?start=k10&end=k12").await), ["k10", "k11"]);
    assert_eq!(keys(&http.get("/v1/kv/default?start=x&end=b").await), Vec::<String>::new());
    let odd = http.get("/v1/kv/default?start=z").await.expect(200);
    assert_eq!((&odd["rows"][0]["key_b64"], &odd["rows"][0]["value_b64"]), (&json!("/w=="), &json!("/g==")));
    let bare = http.get("/v1/kv/default?prefix=k01&keys_only").await.expect(200);
    assert_eq!(bare["rows"][0].get("value"), None);
    for bad in ["limit=0", "limit=x", "reverse=2", "cursor=*", "prefx=k", "limit=1&limit=2", "prefix=%4"] {
        assert_eq!(http.get(&format!("/v1/kv/default?{bad}")).await.expect(400)["error"]["code"], "bad_request");
    }
    http.get("/v1/kv/nothing").await.expect(404);
}

#[tokio::test]
async fn a_transaction_is_done_whole_or_not_at_all() {
    let (_data, cluster) = cluster(&["--nodes", "1", "--shards", "1"]);
    let mut http = Http::new(cluster.http());
    let first = json!({"ops": [
        {"op": "check", "key": "a", "if_absent": true}, {"op": "put", "key": "b", "value": "1"},
        {"op": "put", "key": "c", "value_b64": "/w=="},
    ]});
    http.json("POST", "/v1/txn", &first).await.expect(200);
    let second = json!({"keyspace": "default", "ops": [
        {"op": "read", "key": "b"}, {"op": "read", "key": "x"}, {"op": "delete", "key": "c", "if_present": true},
        {"op": "put", "key": "d", "value": "4"},
    ]});
    let done = http.json("POST", "/v1/txn", &second).await.expect(200);
    assert_eq!((&done["removed"], &done["rows"][0]["value"], &done["rows"][1]), (&json!(1), &json!("1"), &Value::Null));
    let third = json!({"ops": [{"op": "put", "key": "e", "value": "5"}, {"op": "check", "key": "b", "if_value": "2"}]});
    let refused = http.json("POST", "/v1/txn", &third).await.expect(412);
    assert_eq!(refused["error"]["operation"], 1);
    http.get("/v1/kv/default/e").await.expect(404);
    for bad in [
        json!({"ops": []}),
        json!({"ops": [{"op": "put", "key": "a"}]}),
        json!({"ops": [{"op": "read", "key": "a"}, {"op": "put", "key": "a", "value": "1"}]}),
        json!([]),
        json!({"ops": [{"op": "read", "key": ""}]}),
    ] {
        http.json("POST", "/v1/txn", &bad).await.expect(400);
    }
    http.json("POST", "/v1/txn", &json!({"keyspace": "no", "ops": [{"op": "read", "key": "a"}]})).await.expect(404);
    let raw = http.send("POST", "/v1/txn", &[("content-type", "text/plain")], b"{").await;
    assert_eq!(raw.expect(400)["error"]["code"], "bad_request");
}

#[tokio::test]
async fn a_transaction_over_several_shards_reads_and_writes_in_one_step_or_does_nothing() {
    let (_data, cluster) = cluster(&["--nodes", "3", "--shards", "8"]);
    let mut http = Http::new(cluster.http());
    let key = |n: u64| format!("k{n}");
    let puts = |value: &str| (0..32).map(|n| json!({"op": "put", "key": key(n), "value": value})).collect::<Vec<_>>();
    let done = http.json("POST", "/v1/txn", &json!({"ops": puts("1")})).await.expect(200);
    let shards = done["revisions"].as_object().unwrap().len();
    assert_eq!(shards, 8, "every shard has some of the keys: {done}");

    // It reads what was before it, in every shard.
    let mut ops: Vec<Value> = (0..16).map(|n| json!({"op": "read", "key": key(n)})).collect();
    ops.extend((16..30).map(|n| json!({"op": "put", "key": key(n), "value": "2", "if_value": "1"})));
    ops.extend([json!({"op": "delete", "key": key(30)}), json!({"op": "check", "key": key(31), "if_present": true})]);
    ops.push(json!({"op": "read", "key": "nothing"}));
    let done = http.json("POST", "/v1/txn", &json!({"ops": ops})).await.expect(200);
    assert_eq!((done["rows"].as_array().unwrap().len(), &done["removed"]), (17, &json!(1)));
    for n in 0..16 {
        let row = &done["rows"][n as usize];
        assert_eq!((&row["key"], &row["value"]), (&json!(key(n)), &json!("1")));
    }
    assert_eq!(done["rows"][16], Value::Null);
    let rows = |http: Http| async move {
        let mut http = http;
        http.get("/v1/kv/default").await.expect(200)["rows"].clone()
    };
    let before = rows(Http::new(cluster.http())).await;
    assert_eq!(before.as_array().unwrap().len(), 31);
    assert_eq!(before.as_array().unwrap().iter().filter(|row| row["value"] == "2").count(), 14);

    // One condition of 33 does not hold, each time in another place and shard: nothing of the rest is done.
    for n in 0..16 {
        let mut ops = puts("3");
        ops[n as usize] = json!({"op": "check", "key": key(n), "if_absent": true});
        ops.push(json!({"op": "delete", "key": "nothing"}));
        let refused = http.json("POST", "/v1/txn", &json!({"ops": ops})).await.expect(412);
        assert_eq!((&refused["error"]["operation"], &refused["error"]["code"]), (&json!(n), &json!("condition")));
        assert_eq!(
            refused["error"]["version"],
            before.as_array().unwrap().iter().find(|row| row["key"] == key(n)).unwrap()["version"]
        );
    }
    assert_eq!(rows(http).await, before);
}

#[tokio::test]
async fn every_refusal_is_json_in_the_envelope_of_its_route() {
    let (_data, cluster) = cluster(&["--nodes", "1"]);
    let mut http = Http::new(cluster.http());
    let answer = http.send("POST", "/v1/kv/default/a", &[], b"x").await;
    assert_eq!(answer.expect(405)["error"]["code"], "method_not_allowed");
    assert_eq!(answer.header("allow"), Some("GET,HEAD,PUT,DELETE"));
    assert_eq!(http.get("/v1/else").await.expect(404)["error"]["code"], "not_found");
    assert_eq!(http.send("PUT", "/other", &[], b"").await.expect(404)["status"], "failure");
    for (name, value) in [("shkv-consistency", "strong"), ("shkv-deadline-ms", "0"), ("shkv-token", "x")] {
        http.send("GET", "/v1/kv/default/a", &[(name, value)], b"").await.expect(400);
    }
    let long = format!("/v1/kv/default/{}", "k".repeat(4097));
    http.get(&long).await.expect(400);
    let mut other = Http::new(cluster.http());
    let announced = other.send("PUT", "/v1/kv/default/a", &[("content-length", "20000000")], b"").await;
    assert!(announced.status == 400 || announced.status == 413, "{announced:?}");
    let mut other = Http::new(cluster.http());
    let big = vec![b'x'; (16 << 20) + 1];
    assert_eq!(
        other.send("PUT", "/v1/kv/default/a", &[], &big).await.expect(413)["error"]["code"],
        "payload_too_large"
    );
    let mut other = Http::new(cluster.http());
    other.send("PUT", "/v1/kv/default/a", &[], &big[..16 << 20]).await.expect(200);
    assert_eq!(other.get("/v1/kv/default/a").await.body.len(), 16 << 20);
    let answer = http.send("GET", "/v1/status", &[("x-request-id", "mine")], b"").await;
    assert_eq!(answer.header("x-request-id"), Some("mine"));
}

#[tokio::test]
async fn reads_say_how_fresh_they_are_to_be() {
    let (_data, cluster) = cluster(&["--nodes", "3"]);
    let mut http = Http::new(cluster.http());
    for n in 0..20 {
        let put = http.send("PUT", "/v1/kv/default/row", &[], n.to_string().as_bytes()).await;
        let token = put.header("shkv-token").unwrap().to_owned();
        let causal = [("shkv-consistency", "causal"), ("shkv-token", &token[..])];
        let got = http.send("GET", "/v1/kv/default/row", &causal, b"").await;
        assert_eq!((got.status, got.text()), (200, n.to_string()));
        let eventual = http.send("GET", "/v1/kv/default/row", &[("shkv-consistency", "eventual")], b"").await;
        assert!(eventual.status == 200 || (n == 0 && eventual.status == 404), "{eventual:?}");
    }
}

#[tokio::test]
async fn the_cluster_describes_itself_and_its_routes() {
    let (_data, cluster) = cluster(&["--nodes", "3", "--node-http", "127.0.0.1:0"]);
    let mut http = Http::new(cluster.http());
    let nodes = http.get("/v1/nodes").await.expect(200);
    let told = cluster.ready()["nodes"].as_array().unwrap();
    for node in nodes["nodes"].as_array().unwrap() {
        let there = told.iter().find(|there| there["name"] == node["name"]).unwrap();
        assert_eq!(there["http"], node["http"]);
        let mut own = Http::new(node["http"].as_str().unwrap());
        assert_eq!(own.get("/v1/status").await.expect(200)["node"], node["name"]);
        let hello = own.get("/home").await.expect(200);
        assert_eq!(hello["message"], format!("Hello from Server: {}", node["number"]));
    }
    assert_eq!(http.get("/v1/shards").await.expect(200)["shards"].as_array().unwrap().len(), 9);
    assert_eq!(http.get("/v1/status").await.expect(200)["ready"], true);
    http.get("/livez").await.expect_text("ok");
    assert_eq!(http.get("/readyz").await.expect(200)["ready"], true);
    assert!(http.get("/metrics").await.text().ends_with("# EOF\n"));
    let api = http.get("/openapi.json").await.expect(200);
    assert_eq!(api["openapi"], "3.1.0");
    for path in [
        "/v1/kv/{keyspace}/{key}",
        "/v1/txn",
        "/rep",
        "/add",
        "/rm",
        "/home",
        "/set",
        "/fetch",
        "/query",
        "/init",
        "/write",
        "/key-value-store/{key}",
    ] {
        assert!(api["paths"].get(path).is_some(), "{path} is not described");
    }
    let page = http.get("/docs").await;
    assert!(page.status == 200 && page.text().contains("/openapi.json"));
    assert!(!page.text().contains("http://") && !page.text().contains("https://"), "it loads from elsewhere");
    let packed = http.send("GET", "/openapi.json", &[("accept-encoding", "gzip")], b"").await;
    assert_eq!(packed.header("content-encoding"), Some("gzip"));
}

// ---------------------------------------------------------------------------------------------- the load balancer

#[tokio::test]
async fn nodes_of_the_pool_come_and_go() {
    let (_data, cluster) = cluster(&["--nodes", "3"]);
    let mut http = Http::new(cluster.http());
    let replicas = |answer: &Answer| -> BTreeSet<String> {
        let told = answer.expect(200);
        assert_eq!(told["status"], "successful");
        let names = told["message"]["replicas"].as_array().unwrap();
        assert_eq!(told["message"]["N"], names.len());
        names.iter().map(|name| name.as_str().unwrap().to_owned()).collect()
    };
    let three = replicas(&http.get("/rep").await);
    assert_eq!(three, ["Server0", "Server1", "Server2"].map(str::to_owned).into());
    let too_many = json!({"n": 1, "hostnames": ["S4", "S5"]});
    let refused = http.json("POST", "/add", &too_many).await.expect(400);
    let text = "<Error> Length of hostname list is more than newly added instances";
    assert_eq!(refused, json!({"message": text, "status": "failure"}));
    let refused = http.json("DELETE", "/rm", &too_many).await.expect(400);
    assert_eq!(refused["message"], "<Error> Length of hostname list is more than removable instances");
    for bad in
        [json!({}), json!({"n": 0}), json!({"n": -1}), json!({"n": "x"}), json!({"n": 2, "hostnames": ["S4", "S4"]})]
    {
        assert_eq!(http.json("POST", "/add", &bad).await.expect(400)["status"], "failure", "{bad}");
        assert_eq!(http.json("DELETE", "/rm", &bad).await.expect(400)["status"], "failure", "{bad}");
    }
    let taken = http.json("POST", "/add", &json!({"n": 2, "hostnames": ["Server0", "S9"]})).await.expect(400);
    assert!(taken["message"].as_str().unwrap().contains("already in replicas"), "{taken}");
    http.json("DELETE", "/rm", &json!({"n": 1, "hostnames": ["nobody"]})).await.expect(400);
    http.json("DELETE", "/rm", &json!({"n": 9})).await.expect(400);
    http.send("POST", "/add", &[], b"not JSON").await.expect(400);
    assert_eq!(replicas(&http.get("/rep").await), three, "what was refused has changed nothing");

    let five = replicas(&http.json("POST", "/add", &json!({"n": 2, "hostnames": ["S4"]})).await);
    assert_eq!(five.len(), 5);
    assert!(five.contains("S4"));
    let random = five.difference(&three).find(|name| *name != "S4").unwrap();
    assert!(random.starts_with("Server-") && random.len() == "Server-123-456".len(), "{random}");
    let six = replicas(&http.send("GET", "/add?N=1&replicas=S6", &[], b"").await);
    assert!(six.len() == 6 && six.contains("S6"));
    let seven = replicas(&http.json("POST", "/add", &json!({"N": 1, "replicas": ["S7"]})).await);
    assert!(seven.len() == 7 && seven.contains("S7"));
    let eight = replicas(&http.json("GET", "/add", &json!({"N": 1, "replicas": ["S8"]})).await);
    assert!(eight.len() == 8 && eight.contains("S8"));
    for bad in ["/add?N=0", "/add?N=x", "/add?N=1&replicas=S8", "/add?N=1&replicas=a,b", "/add?other=1", "/add"] {
        assert_eq!(http.get(bad).await.expect(400)["status"], "failure", "{bad}");
    }
    assert_eq!(replicas(&http.json("DELETE", "/rm", &json!({"N": 2, "replicas": ["S7", "S8"]})).await), six);
    let left = replicas(&http.json("DELETE", "/rm", &json!({"n": 2, "hostnames": ["S4"]})).await);
    assert!(left.len() == 4 && !left.contains("S4"), "{left:?}");
    assert_eq!(replicas(&http.json("POST", "/rm", &json!({"n": 1})).await).len(), 3);
    assert_eq!(replicas(&http.get("/rep").await).len(), 3);
}

#[tokio::test]
async fn requests_are_routed_to_living_nodes_by_number() {
    let (_data, cluster) = cluster(&["--nodes", "3"]);
    let mut http = Http::new(cluster.http());
    let mut seen = BTreeSet::new();
    for _ in 0..100 {
        let hello = http.get("/home").await.expect(200);
        assert_eq!(hello["status"], "successful");
        let text = hello["message"].as_str().unwrap().to_owned();
        assert!(text.starts_with("Hello from Server: "), "{text}");
        seen.insert(text.rsplit(':').next().unwrap().trim().parse::<u64>().unwrap());
    }
    assert_eq!(seen, [1, 2, 3].into());
    let beat = http.get("/heartbeat").await;
    assert_eq!((beat.status, beat.body.len()), (200, 0));
    let other = http.get("/other").await.expect(400);
    let text = "<Error> '/other' endpoint does not exist in server replicas";
    assert_eq!(other, json!({"message": text, "status": "failure"}));
    assert_eq!(http.send("DELETE", "/home", &[], b"").await.expect(405)["status"], "failure");
}

// ---------------------------------------------------------------------------------------------- the batch proxy

fn item(encoding: &str, data: &str) -> Value {
    json!({"encoding": encoding, "data": data})
}

#[tokio::test]
async fn pairs_are_set_fetched_and_queried_with_partial_success() {
    let (_data, cluster) = cluster(&["--nodes", "3"]);
    let mut http = Http::new(cluster.http());
    assert_eq!(http.get("/fetch").await.expect(200), json!([]));
    let nothing = http.json("POST", "/query", &json!([item("string", "a")])).await.expect(200);
    assert_eq!(nothing, json!([{"key": item("string", "a"), "value": false}]));
    let pair = |key: Value, value: Value| json!({"key": key, "value": value});
    let pairs = json!([
        pair(item("string", "1"), item("string", "one")),
        pair(item("binary", "1"), item("string", "bits")),
        pair(item("binary", "no bits"), item("binary", "0101")),
    ]);
    let set = http
        .send("PUT", "/set", &[("content-type", "application/x-www-form-urlencoded")], pairs.to_string().as_bytes())
        .await;
    assert_eq!(set.expect(200), json!({"keys_added": 3, "keys_failed": []}));
    assert_eq!(set.header("access-control-allow-origin"), Some("*"));
    let some = json!([
        pair(item("string", "2"), item("string", "two")),
        pair(item("hex", "3"), item("string", "three")),
        pair(item("string", "4"), item("hex", "four")),
        pair(item("string", "1"), item("string", "uno")),
    ]);
    let partial = http.json("PUT", "/set", &some).await.expect(206);
    assert_eq!(partial, json!({"keys_added": 2, "keys_failed": [item("hex", "3"), item("string", "4")]}));
    let asked = json!([item("string", "1"), {"key": item("binary", "1")}, item("string", "2")]);
    let fetched = http.json("POST", "/fetch", &asked).await.expect(200);
    assert_eq!(fetched[0], pair(item("string", "1"), item("string", "uno")));
    assert_eq!(fetched[1], pair(item("binary", "1"), item("string", "bits")));
    let unknown = http.json("POST", "/fetch", &json!([item("hex", "1"), item("string", "2")])).await.expect(206);
    assert_eq!((&unknown[0]["value"], &unknown[1]["value"]), (&json!({}), &item("string", "two")));
    let missing = http.json("POST", "/fetch", &json!([item("string", "9"), item("string", "2")])).await.expect(206);
    assert_eq!(missing[0], pair(item("string", "9"), json!({})));
    assert_eq!(missing[1]["value"], item("string", "two"));
    let query = json!([item("string", "4"), item("string", "2")]);
    let queried = http.json("POST", "/query", &query).await.expect(200);
    assert_eq!(queried, json!([pair(item("string", "4"), json!(false)), pair(item("string", "2"), json!(true))]));
    http.json("POST", "/query", &json!([item("hex", "1")])).await.expect(206);
    let all = http.get("/fetch").await.expect(200);
    assert_eq!(all.as_array().unwrap().len(), 4);
    assert_eq!(http.json("PUT", "/set", &json!([])).await.expect(200)["keys_added"], 0);
    for bad in [json!({}), json!([1]), json!([{"key": item("string", "1")}]), json!("x")] {
        let refused = http.json("PUT", "/set", &bad).await.expect(400);
        assert_eq!(refused["error"], true, "{bad}");
    }
    for path in ["/fetch", "/query"] {
        http.json("POST", path, &json!({"a": 1})).await.expect(400);
        assert_eq!(http.send("POST", path, &[], b"[").await.expect(400)["error"], true);
    }
    assert_eq!(http.send("POST", "/set", &[], b"[]").await.expect(405)["error"], true);
    assert_eq!(http.send("OPTIONS", "/set", &[], b"").await.status, 204);
}

#[tokio::test]
async fn everything_is_fetched_as_a_stream_and_set_answers_an_array_if_asked_to() {
    let (_data, cluster) = cluster(&["--nodes", "1", "--set-shape", "array"]);
    let mut http = Http::new(cluster.http());
    let value = "v".repeat(2_000);
    for part in 0..3 {
        let pairs: Vec<Value> = (0..1_000)
            .map(|n| json!({"key": item("string", &format!("{part}-{n}")), "value": item("string", &value)}))
            .collect();
        let set = http.json("PUT", "/set", &json!(pairs)).await.expect(200);
        assert_eq!(set, json!([{"keys_added": 1_000, "keys_failed": []}]));
    }
    let all = http.get("/fetch").await;
    assert_eq!(all.header("transfer-encoding"), Some("chunked"));
    let keys: BTreeSet<String> = all
        .expect(200)
        .as_array()
        .unwrap()
        .iter()
        .map(|pair| pair["key"]["data"].as_str().unwrap().to_owned())
        .collect();
    assert_eq!(keys.len(), 3_000);
}

// ---------------------------------------------------------------------------------------------- a node by itself

#[tokio::test]
async fn a_node_that_runs_alone_has_the_same_front_end() {
    let (data, cluster) = cluster(&["--nodes", "1"]);
    let own = data.path().join("alone");
    let (own, join) = (own.to_str().unwrap(), cluster.addr());
    let args =
        ["node", "--name", "Alone", "--data", own, "--listen", "127.0.0.1:0", "--join", &join, "--http", "127.0.0.1:0"];
    let node = shkv_tests::Server::start(binary(), &args);
    let mut balancer = Http::new(cluster.http());
    balancer.send("PUT", "/v1/kv/default/row", &[], b"there").await.expect(200);
    let until = Instant::now() + PATIENCE;
    loop {
        let mut http = Http::new(node.told()["http"].as_str().unwrap());
        let hello = http.get("/home").await;
        if hello.status == 200 {
            assert_eq!(http.get("/v1/status").await.expect(200)["node"], "Alone");
            assert_eq!(http.get("/v1/kv/default/row").await.text(), "there");
            break;
        }
        assert!(Instant::now() < until, "{hello:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}
