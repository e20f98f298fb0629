//! The causal key-value store over real HTTP against real members: each line of its contract, and the flow of its graders up
//! to the change of the number of shards.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and stops members, and fails where it cannot go on"
)]

use serde_json::{Value, json};
use shkv_tests::http::Http;
use shkv_tests::{Cluster, PATIENCE, Server};
use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn address(n: usize) -> String {
    format!("10.10.0.{}:8080", n + 1)
}

fn view(count: usize) -> String {
    (1..=count).map(address).collect::<Vec<_>>().join(",")
}

/// A member of the address n, which joins the others at `join` or makes the cluster.
fn member(folder: &Path, n: usize, view: &str, shard_count: Option<&str>, join: Option<&str>) -> Server {
    member_with(folder, n, view, shard_count, join, &[])
}

/// The same with more flags.
fn member_with(
    folder: &Path,
    n: usize,
    view: &str,
    shard_count: Option<&str>,
    join: Option<&str>,
    more: &[&str],
) -> Server {
    let data = folder.join(format!("member{n}"));
    let (address, data) = (address(n), data.to_str().unwrap().to_owned());
    let mut line = vec!["serve", "--data", &data, "--listen", "127.0.0.1:0", "--node-listen", "127.0.0.1:0"];
    line.extend(["--http", "127.0.0.1:0", "--shards", "1", "--socket-address", &address, "--view", view]);
    line.extend(shard_count.into_iter().flat_map(|count| ["--shard-count", count]));
    match join {
        Some(join) => line.extend(["--join", join]),
        None => line.push("--bootstrap"),
    }
    line.extend(more);
    Server::start(binary(), &line)
}

fn http(member: &Server) -> Http {
    Http::new(member.told()["http"].as_str().unwrap())
}

async fn until(http: &mut Http, path: &str, what: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let answer = http.get(path).await;
        if answer.status == 200 && what(&answer.json()) {
            return answer.json();
        }
        assert!(Instant::now() < deadline, "{path}: it did not come to pass: {}", answer.text());
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

#[tokio::test]
async fn every_key_operation_answers_as_its_contract_says() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(binary(), folder.path(), &["--shards", "1"]);
    let mut http = Http::new(cluster.http());
    let path = "/key-value-store/a%20key";
    let error = |told: Value| told["error"].as_str().unwrap().to_owned();

    let gone = http.get(path).await.expect(404);
    assert_eq!(gone, json!({"doesExist": false, "error": "Key does not exist", "message": "Error in GET"}));
    let gone = http.send("DELETE", path, &[], b"").await.expect(404);
    assert_eq!(gone, json!({"doesExist": false, "error": "Key does not exist", "message": "Error in DELETE"}));

    let first = http.json("PUT", path, &json!({"value": 1, "causal-metadata": ""})).await.expect(201);
    assert_eq!((&first["message"], &first["replaced"]), (&"Added successfully".into(), &false.into()));
    assert_eq!(first["version"], first["causal-metadata"]);
    assert_eq!(first["shard-id"], "1");
    let seen = first["causal-metadata"].clone();
    let value = json!({"any": ["JSON", null, 2.5]});
    let second = http.json("PUT", path, &json!({"value": value, "causal-metadata": seen})).await.expect(200);
    assert_eq!((&second["message"], &second["replaced"]), (&"Updated successfully".into(), &true.into()));
    let (earlier, later) = (seen.as_str().unwrap().len(), second["version"].as_str().unwrap());
    assert!(later.len() == earlier && later > seen.as_str().unwrap(), "the clock goes on");

    let read = http.get(path).await.expect(200);
    let wanted = json!({"doesExist": true, "message": "Retrieved successfully", "value": value,
        "version": second["version"], "causal-metadata": second["causal-metadata"], "shard-id": "1"});
    assert_eq!(read, wanted);
    let other = http.json("PUT", "/key-value-store/other", &json!({"value": "x", "causal-metadata": later})).await;
    let newest = other.expect(201)["causal-metadata"].clone();
    let read = http.json("GET", path, &json!({"causal-metadata": newest})).await.expect(200);
    assert_eq!(read["causal-metadata"], newest, "what is known already is not lost by a read");
    http.json("PUT", "/key-value-store/other", &json!({"value": "no metadata"})).await.expect(200);

    let refused = http.json("PUT", path, &json!({"causal-metadata": ""})).await.expect(400);
    assert_eq!(refused, json!({"error": "Value is missing", "message": "Error in PUT"}));
    assert_eq!(error(http.json("PUT", path, &json!({"value": null})).await.expect(400)), "Value is missing");
    let fifty = format!("/key-value-store/{}", "é".repeat(50).replace('é', "%C3%A9"));
    http.json("PUT", &fifty, &json!({"value": 1})).await.expect(201);
    let long = format!("/key-value-store/{}", "k".repeat(51));
    let refused = http.json("PUT", &long, &json!({"value": 1})).await.expect(400);
    assert_eq!(refused, json!({"error": "Key is too long", "message": "Error in PUT"}));
    assert_eq!(error(http.json("PUT", &long, &json!({})).await.expect(400)), "Value is missing");
    let forged = json!({"value": 1, "causal-metadata": "not ours"});
    assert!(error(http.json("PUT", path, &forged).await.expect(400)).contains("causal-metadata"));
    assert_eq!(http.send("PUT", path, &[], b"{").await.expect(400)["message"], "Error in PUT");
    for method in ["GET", "PUT", "DELETE"] {
        let told = http.json(method, "/key-value-store/", &json!({"value": 1})).await.expect(400);
        assert_eq!(told, json!({"error": "Key not specified", "message": format!("Error in {method}")}));
        let forged = json!({"value": 1, "causal-metadata": {"a": 1}});
        assert_eq!(http.json(method, path, &forged).await.expect(400)["message"], format!("Error in {method}"));
    }

    let done = http.send("DELETE", path, &[], b"").await.expect(200);
    assert_eq!((&done["doesExist"], &done["message"]), (&true.into(), &"Deleted successfully".into()));
    http.get(path).await.expect(404);
    http.send("DELETE", path, &[], b"").await.expect(404);
    http.json("PUT", path, &json!({"value": 1, "causal-metadata": ""})).await.expect(201);

    let answer = http.send("POST", path, &[], b"{}").await;
    assert_eq!((answer.status, answer.text().as_str()), (405, "This method is unsupported."));
    let answer = http.get("/key-value-store-nowhere").await;
    assert_eq!(answer.status, 404);
    assert_eq!(answer.text(), "Visit the /key-value-store/{key_query} endpoint to query the key store table");
}

#[tokio::test]
async fn the_graders_flow_is_answered_by_every_member_alike() {
    let folder = tempfile::tempdir().unwrap();
    let six = view(6);
    let mut members = vec![member(folder.path(), 1, &six, Some("2"), None)];
    let join = members[0].addr();
    for n in 2..=6 {
        members.push(member(folder.path(), n, &six, Some("2"), Some(&join)));
    }
    let mut clients: Vec<Http> = members.iter().map(http).collect();
    for client in &mut clients {
        let told = until(client, "/key-value-store-shard/shard-ids", |_| true).await;
        assert_eq!(told, json!({"message": "Shard IDs retrieved successfully", "shard-ids": "1,2"}));
        let told = until(client, "/key-value-store-view", |told| told["view"] == six).await;
        assert_eq!(told["message"], "View retrieved successfully");
    }
    let mut all = BTreeSet::new();
    for id in ["1", "2"] {
        let path = format!("/key-value-store-shard/shard-id-members/{id}");
        let told = clients[0].get(&path).await.expect(200);
        assert_eq!(told["message"], "Members of shard ID retrieved successfully");
        let shard: Vec<String> = told["shard-id-members"].as_str().unwrap().split(',').map(String::from).collect();
        assert_eq!(shard.len(), 3);
        for (n, client) in clients.iter_mut().enumerate() {
            assert_eq!(client.get(&path).await.expect(200), told);
            if shard.contains(&address(n + 1)) {
                let mine = client.get("/key-value-store-shard/node-shard-id").await.expect(200);
                let wanted = json!({"message": "Shard ID of the node retrieved successfully", "shard-id": id});
                assert_eq!(mine, wanted);
            }
        }
        all.extend(shard);
    }
    assert_eq!(all.len(), 6);

    let (mut seen, mut told) = (json!(""), Vec::new());
    for n in 0..600 {
        let body = json!({"value": format!("value{n}"), "causal-metadata": seen});
        let put = clients[n % 6].json("PUT", &format!("/key-value-store/key{n}"), &body).await.expect(201);
        assert!(["1", "2"].contains(&put["shard-id"].as_str().unwrap()));
        seen = put["causal-metadata"].clone();
        told.push(put);
    }
    for n in 0..600 {
        let read = clients[(n + 1) % 6].get(&format!("/key-value-store/key{n}")).await.expect(200);
        assert_eq!(read["value"], format!("value{n}"));
        for field in ["version", "causal-metadata", "shard-id"] {
            assert_eq!(read[field], told[n][field], "{field} of key{n}");
        }
    }
    let mut counts = Vec::new();
    for id in [1, 2] {
        let read = clients[id].get(&format!("/key-value-store-shard/shard-id-key-count/{id}")).await.expect(200);
        counts.push(read["shard-id-key-count"].as_u64().unwrap());
    }
    assert_eq!(counts[0] + counts[1], 600);
    assert!(counts.iter().all(|count| (225..=375).contains(count)), "{counts:?}");

    // A seventh without a shard count is of no shard until it is added to one.
    let seven = view(7);
    members.push(member(folder.path(), 7, &seven, None, Some(&join)));
    clients.push(http(&members[6]));
    for client in &mut clients {
        until(client, "/key-value-store-view", |told| told["view"] == seven).await;
    }
    let mine = clients[6].get("/key-value-store-shard/node-shard-id").await.expect(200);
    assert_eq!(mine["shard-id"], "None");
    let body = json!({"socket-address": address(7)});
    clients[2].json("PUT", "/key-value-store-shard/add-member/9", &body).await.expect(404);
    let nobody = json!({"socket-address": "10.10.0.99:8080"});
    clients[2].json("PUT", "/key-value-store-shard/add-member/2", &nobody).await.expect(404);
    clients[2].json("PUT", "/key-value-store-shard/add-member/2", &json!({})).await.expect(400);
    let added = clients[2].json("PUT", "/key-value-store-shard/add-member/2", &body).await.expect(200);
    assert_eq!(added["message"], "Member added to shard 2");
    clients[2].json("PUT", "/key-value-store-shard/add-member/2", &body).await.expect(404);
    // A member whose map is a little older goes on with the same request, as if it had been cut short.
    let mut again = clients[3].json("PUT", "/key-value-store-shard/add-member/2", &body).await;
    for _ in 0..200 {
        if again.status != 200 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
        again = clients[3].json("PUT", "/key-value-store-shard/add-member/2", &body).await;
    }
    again.expect(404);
    let mine = clients[6].get("/key-value-store-shard/node-shard-id").await.expect(200);
    assert_eq!(mine["shard-id"], "2");
    for at in [1, 6] {
        let read = clients[at].get("/key-value-store-shard/shard-id-key-count/2").await.expect(200);
        assert_eq!(read["shard-id-key-count"], counts[1]);
    }
    clients[0].get("/key-value-store-shard/shard-id-key-count/3").await.expect(404);
    clients[0].get("/key-value-store-shard/shard-id-members/x").await.expect(404);
    let few = clients[5].json("PUT", "/key-value-store-shard/reshard", &json!({"shard-count": 10})).await.expect(400);
    assert_eq!(few["message"], "Not enough nodes to provide fault-tolerance with the given shard count!");
    for bad in [json!({}), json!({"shard-count": 0}), json!({"shard-count": "3"})] {
        clients[5].json("PUT", "/key-value-store-shard/reshard", &bad).await.expect(400);
    }

    // Addresses that are added and taken out by hand.
    let path = "/key-value-store-view";
    let extra = json!({"socket-address": "10.10.0.99:8080"});
    let done = clients[0].json("PUT", path, &extra).await.expect(201);
    assert_eq!(done["message"], "Replica added successfully to the view");
    let twice = clients[1].json("PUT", path, &extra).await.expect(404);
    assert_eq!(twice, json!({"error": "Socket address already exists in the view", "message": "Error in PUT"}));
    let done = clients[2].json("DELETE", path, &extra).await.expect(200);
    assert_eq!(done["message"], "Replica deleted successfully from the view");
    let twice = clients[3].json("DELETE", path, &extra).await.expect(404);
    assert_eq!(twice, json!({"error": "Socket address does not exist in the view", "message": "Error in DELETE"}));
    let alias = json!({"SA": "10.10.0.98:8080"});
    clients[0].json("PUT", path, &alias).await.expect(201);
    clients[1].json("DELETE", path, &alias).await.expect(200);
    for bad in [json!({}), json!({"socket-address": "no port"}), json!({"socket-address": 1}), json!("x")] {
        for method in ["PUT", "DELETE"] {
            let told = clients[3].json(method, path, &bad).await.expect(400);
            assert_eq!(told["message"], format!("Error in {method}"));
        }
    }

    // A member that is stopped leaves the view and comes back when it is started again; the keys stay all the while.
    members.pop().unwrap().kill();
    clients.pop();
    until(&mut clients[0], path, |told| told["view"] == six).await;
    let read = clients[0].get("/key-value-store/key599").await.expect(200);
    assert_eq!(read["causal-metadata"], seen);
    members.push(member(folder.path(), 7, &seven, None, Some(&join)));
    until(&mut clients[0], path, |told| told["view"] == seven).await;
    assert_eq!(http(&members[6]).get("/key-value-store/key599").await.expect(200)["causal-metadata"], seen);
}

#[tokio::test]
async fn the_edition_of_2020_answers_arrays_and_numbers_and_no_versions() {
    let folder = tempfile::tempdir().unwrap();
    let four = view(4);
    let edition = ["--kvs-dialect", "2020"];
    let mut members = vec![member_with(folder.path(), 1, &four, Some("2"), None, &edition)];
    let join = members[0].addr();
    for n in 2..=4 {
        members.push(member_with(folder.path(), n, &four, Some("2"), Some(&join), &edition));
    }
    let mut clients: Vec<Http> = members.iter().map(http).collect();
    let list = |view: &str| -> Value { view.split(',').collect() };
    for client in &mut clients {
        let told = until(client, "/key-value-store-view", |told| told["view"] == list(&four)).await;
        assert_eq!(told, json!({"message": "View retrieved successfully", "view": list(&four)}));
        let told = until(client, "/key-value-store-shard/shard-ids", |_| true).await;
        assert_eq!(told, json!({"message": "Shard IDs retrieved successfully", "shard-ids": [1, 2]}));
    }
    for (id, shard) in [(1, [1, 3]), (2, [2, 4])] {
        let told = clients[0].get(&format!("/key-value-store-shard/shard-id-members/{id}")).await.expect(200);
        assert_eq!(told["shard-id-members"], json!(shard.map(address)));
        for n in shard {
            let mine = clients[n - 1].get("/key-value-store-shard/node-shard-id").await.expect(200);
            let wanted = json!({"message": "Shard ID of the node retrieved successfully", "shard-id": id});
            assert_eq!(mine, wanted);
        }
    }

    let path = "/key-value-store/key";
    let gone = json!({"doesExist": false, "error": "Key does not exist", "message": "Error in GET"});
    assert_eq!(clients[1].get(path).await.expect(404), gone);
    let mut seen = json!("");
    for (n, status, message) in [(1, 201, "Added successfully"), (2, 200, "Updated successfully")] {
        let body = json!({"value": n, "causal-metadata": seen});
        let put = clients[n].json("PUT", path, &body).await.expect(status);
        assert!(put["shard-id"] == 1 || put["shard-id"] == 2, "{put}");
        let wanted = json!({"message": message, "replaced": n == 2, "shard-id": put["shard-id"],
            "causal-metadata": put["causal-metadata"]});
        assert_eq!(put, wanted);
        seen = put["causal-metadata"].clone();
        let read = clients[n + 1].json("GET", path, &json!({"causal-metadata": seen})).await.expect(200);
        let wanted = json!({"doesExist": true, "message": "Retrieved successfully", "value": n,
            "causal-metadata": seen, "shard-id": put["shard-id"]});
        assert_eq!(read, wanted);
    }
    let done = clients[0].json("DELETE", path, &json!({"causal-metadata": seen})).await.expect(200);
    assert_eq!((&done["doesExist"], &done["message"]), (&true.into(), &"Deleted successfully".into()));
    assert!(done.get("version").is_none() && done["shard-id"].is_u64() && done["causal-metadata"] != seen, "{done}");
    assert_eq!(clients[3].get(path).await.expect(404), gone);
    for n in 0..60 {
        clients[n % 4].json("PUT", &format!("/key-value-store/key{n}"), &json!({"value": n})).await.expect(201);
    }
    let count_path = |id: u32| format!("/key-value-store-shard/shard-id-key-count/{id}");
    let mut counts = vec![];
    for id in [1, 2] {
        counts.push(clients[3].get(&count_path(id)).await.expect(200)["shard-id-key-count"].as_u64().unwrap());
    }
    assert_eq!(counts.iter().sum::<u64>(), 60);

    // Nobody leaves a shard of two; one that came third may move on.
    let add = |id: u32| format!("/key-value-store-shard/add-member/{id}");
    let told = clients[0].json("PUT", &add(2), &json!({"socket-address": address(1)})).await.expect(400);
    assert_eq!(told, json!({"error": "Shard 1 would have less than two members", "message": "Error in PUT"}));
    let five = view(5);
    members.push(member_with(folder.path(), 5, &five, None, Some(&join), &edition));
    clients.push(http(&members[4]));
    until(&mut clients[4], "/key-value-store-view", |told| told["view"] == list(&five)).await;
    let mine = clients[4].get("/key-value-store-shard/node-shard-id").await.expect(200);
    assert_eq!(mine["shard-id"], "None");
    for (id, three, two) in [(1_u32, vec![1, 3, 5], 2_u32), (2, vec![2, 4, 5], 1)] {
        let done = clients[1].json("PUT", &add(id), &json!({"socket-address": address(5)})).await.expect(200);
        assert_eq!(done, json!({"message": format!("Member added to shard {id}")}));
        assert_eq!(clients[4].get("/key-value-store-shard/node-shard-id").await.expect(200)["shard-id"], id);
        let shard = |id: u32| format!("/key-value-store-shard/shard-id-members/{id}");
        let told = clients[2].get(&shard(id)).await.expect(200);
        assert_eq!(told["shard-id-members"], three.into_iter().map(address).collect::<Value>());
        let told = clients[2].get(&shard(two)).await.expect(200);
        assert_eq!(told["shard-id-members"].as_array().unwrap().len(), 2);
        assert_eq!(clients[4].get(&count_path(id)).await.expect(200)["shard-id-key-count"], counts[id as usize - 1]);
    }
    let few = clients[0].json("PUT", "/key-value-store-shard/reshard", &json!({"shard-count": 3})).await.expect(400);
    let text = "Not enough nodes to provide fault-tolerance with the given shard count!";
    assert_eq!(few, json!({"message": text}));
}

/// Members as a script starts them: told by their environment alone who they are, who the others are, and how many shards.
/// Their ports follow from that, so each has an address of this machine to itself.
#[tokio::test]
async fn members_are_started_with_nothing_but_their_environment() {
    let folder = tempfile::tempdir().unwrap();
    let block = format!("127.{}.{}", std::process::id() % 200 + 20, std::process::id() / 200 % 256);
    let address = |n: usize| format!("{block}.{n}:8080");
    let view = |count: usize| (1..=count).map(address).collect::<Vec<_>>().join(",");
    let start = |n: usize, view: &str, shard_count: Option<&str>| {
        let (own, data) = (address(n), folder.path().join(format!("member{n}")));
        let mut environment = vec![("SOCKET_ADDRESS", own.as_str()), ("VIEW", view)];
        environment.extend(shard_count.map(|count| ("SHARD_COUNT", count)));
        Server::try_start_with(binary(), &["serve", "--data", data.to_str().unwrap()], &environment)
    };
    let four = view(4);
    let mut members: Vec<Server> = (1..=4).map(|n| start(n, &four, Some("2")).unwrap()).collect();
    let mut clients: Vec<Http> = (1..=4).map(|n| Http::new(address(n))).collect();
    for (n, client) in (1..).zip(&mut clients) {
        let ids = until(client, "/key-value-store-shard/shard-ids", |_| true).await;
        assert_eq!(ids["shard-ids"], "1,2");
        until(client, "/key-value-store-view", |told| told["view"] == four).await;
        let mine = client.get("/key-value-store-shard/node-shard-id").await.expect(200);
        assert_eq!(mine["shard-id"], if n % 2 == 1 { "1" } else { "2" }, "member {n}");
    }
    let body = json!({"value": "sampleValue", "causal-metadata": ""});
    let put = clients[3].json("PUT", "/key-value-store/sampleKey", &body).await.expect(201);

    // A fifth without a number of shards is a member of none, and answers for all.
    let five = view(5);
    members.push(start(5, &five, None).unwrap());
    let mut fifth = Http::new(address(5));
    until(&mut fifth, "/key-value-store-view", |told| told["view"] == five).await;
    let mine = fifth.get("/key-value-store-shard/node-shard-id").await.expect(200);
    let wanted = json!({"message": "Shard ID of the node retrieved successfully", "shard-id": "None"});
    assert_eq!(mine, wanted);
    let read = fifth.get("/key-value-store/sampleKey").await.expect(200);
    for field in ["version", "causal-metadata", "shard-id"] {
        assert_eq!(read[field], put[field]);
    }

    // What contradicts itself does not start.
    let words = start(6, &four, Some("2")).err().unwrap();
    assert!(words.contains("VIEW does not have SOCKET_ADDRESS"), "{words}");
}
