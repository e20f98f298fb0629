//! Rows that keep to a schema, through the client library and through the front end, and keyspaces that come and go.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use serde_json::{Value, json};
use shkv_client::table::{Dtype, RangeShard, Row, Schema, Shards, Table, Value as Column};
use shkv_client::{Client, Error, RefusalCode};
use shkv_tests::Cluster;
use shkv_tests::http::Http;
use std::path::Path;

fn schema() -> Schema {
    let columns = ["Stud_id", "Stud_name", "Stud_marks"].map(String::from).to_vec();
    Schema::new(columns, vec![Dtype::Number, Dtype::String, Dtype::String], "Stud_id").unwrap()
}

fn shards() -> Shards {
    let shard = |n: u64| RangeShard { name: format!("sh{n}"), low: n * 100, size: 100 };
    Shards::new((0..3).map(shard).collect()).unwrap()
}

fn row(table: &Table, id: i64, name: &str) -> Row {
    table.row([("Stud_id", Column::from(id)), ("Stud_name", name.into()), ("Stud_marks", 27.into())]).unwrap()
}

async fn ids(table: &Table, low: u64, high: u64) -> Vec<u64> {
    let mut rows = table.range(low..=high);
    let mut ids = Vec::new();
    while let Some(row) = rows.next().await.unwrap() {
        ids.push(table.schema().id_of(&row));
    }
    ids
}

#[tokio::test]
async fn rows_are_inserted_if_absent_updated_and_deleted_if_present_and_ranged() {
    let folder = tempfile::tempdir().unwrap();
    let cluster = Cluster::start(Path::new(env!("CARGO_BIN_EXE_shkv")), folder.path(), &["--shards", "1"]);
    let client = cluster.client().await;
    through_the_library(&client).await;
    through_both_doors(&client, &mut Http::new(cluster.http())).await;
    keyspaces_come_and_go(&client, &cluster).await;
}

async fn through_the_library(client: &Client) {
    let table = client.create_keyspace("students").ranges(&shards()).await.unwrap().table(schema()).within(shards());

    // One step over all three shards; one row that is there already, and none of them is written.
    table.insert(&[row(&table, 5, "a"), row(&table, 105, "b"), row(&table, 205, "c")]).await.unwrap();
    let again = table.insert(&[row(&table, 6, "d"), row(&table, 205, "e")]).await.unwrap_err();
    assert!(matches!(again, Error::Condition { operation: 1, version: Some(_) }), "{again}");
    assert_eq!(ids(&table, 0, 299).await, [5, 105, 205]);
    assert_eq!(ids(&table, 5, 105).await, [5, 105], "both ends are included");
    assert_eq!(ids(&table, 6, 104).await, [0_u64; 0]);
    #[expect(clippy::reversed_empty_ranges, reason = "it has no rows")]
    let nothing = table.range(9..=3).next().await.unwrap();
    assert_eq!(nothing, None);

    table.update(&row(&table, 105, "B")).await.unwrap();
    let found = table.get(105).await.unwrap().unwrap();
    assert_eq!(found.values(), [Column::from(105), "B".into(), 27.into()], "a number in a text column stays one");
    let missing = table.update(&row(&table, 7, "x")).await.unwrap_err();
    assert_eq!(missing, Error::Condition { operation: 0, version: None });
    assert_eq!(table.delete(105).await.unwrap().removed, 1);
    assert_eq!(table.delete(105).await.unwrap_err(), Error::Condition { operation: 0, version: None });
    assert_eq!(ids(&table, 0, u64::MAX).await, [5, 205]);

    // What makes no sense is refused by name before anything is written.
    let refused = |error: Error| match error {
        Error::Refused { text, .. } => text,
        other => panic!("{other}"),
    };
    let outside = table.insert(&[row(&table, 8, "x"), row(&table, 300, "x")]).await.unwrap_err();
    assert_eq!(refused(outside), "no shard holds Stud_id 300");
    let twice = table.insert(&[row(&table, 8, "x"), row(&table, 9, "x"), row(&table, 8, "x")]).await.unwrap_err();
    assert_eq!(refused(twice), "Stud_id 8 is there twice, at items 0 and 2");
    assert_eq!(refused(table.insert(&[]).await.unwrap_err()), "the batch is empty; add an operation");
    let lacks = table.row([("Stud_id", Column::from(1)), ("Stud_name", "x".into())]).unwrap_err();
    assert_eq!(refused(lacks), "Stud_marks is missing");
    let named_twice = table.row([("Stud_id", Column::from(1)), ("Stud_id", 2.into())]).unwrap_err();
    assert_eq!(refused(named_twice), "Stud_id is there twice");
    let gap = |low| RangeShard { name: format!("at {low}"), low, size: 10 };
    let gap = Shards::new(vec![gap(0), gap(20)]).map_err(Error::from).unwrap_err();
    assert!(refused(gap).starts_with("shards at 0 and at 20 leave a gap"));
    assert_eq!(ids(&table, 0, u64::MAX).await, [5, 205]);

    // Bytes of another kind are not taken for a row.
    let raw = client.keyspace("students").await.unwrap();
    raw.put(30_u64.to_be_bytes(), "no row").await.unwrap();
    assert!(refused(table.get(30).await.unwrap_err()).starts_with("a stored row cannot be read"));
}

/// What the front end's database writes is what a native client reads, and the other way round.
async fn through_both_doors(client: &Client, http: &mut Http) {
    let servers = json!({"Server0": ["sh1"], "Server1": ["sh1"], "Server2": ["sh1"]});
    let shards = json!([{"Stud_id_low": 0, "Shard_id": "sh1", "Shard_size": 100}]);
    let columns = json!({"columns": ["Stud_id", "Stud_name", "Stud_marks"], "dtypes": ["Number", "String", "String"]});
    let init = json!({"N": 3, "schema": columns, "shards": shards, "servers": servers});
    http.json("POST", "/init", &init).await.expect(200);
    let ann = json!({"Stud_id": 7, "Stud_name": "Ann", "Stud_marks": 27});
    http.json("POST", "/write", &json!({ "data": [ann] })).await.expect(200);

    let status = client.status().await.unwrap();
    let keyspaces = status.map.unwrap().keyspaces;
    let name = keyspaces.iter().find(|keyspace| keyspace.name.starts_with("database-")).unwrap().name.clone();
    let table = client.keyspace(&name).await.unwrap().table(schema());
    assert_eq!(table.get(7).await.unwrap().unwrap().values(), [Column::from(7), "Ann".into(), 27.into()]);
    table.insert(&[row(&table, 8, "Bob")]).await.unwrap();
    let both = http.json("POST", "/read", &json!({"Stud_id": {"low": 0, "high": 99}})).await.expect(200);
    let bob = json!({"Stud_id": 8, "Stud_name": "Bob", "Stud_marks": 27});
    assert_eq!(both["data"], json!([ann, bob]));
}

async fn keyspaces_come_and_go(client: &Client, cluster: &Cluster) {
    let run = async |args: &[&str]| {
        let output = tokio::process::Command::from(cluster.command(args)).output().await.unwrap();
        let text = String::from_utf8([output.stdout, output.stderr].concat()).unwrap();
        (output.status.code().unwrap(), text)
    };
    let made = run(&["keyspace", "create", "users", "--shards", "2", "--output", "json"]).await;
    let told: Value = serde_json::from_str(&made.1).unwrap();
    assert_eq!((made.0, told), (0, json!({"keyspace": "users", "shards": 2, "replicas": 3})));
    let again = run(&["keyspace", "create", "users"]).await;
    assert!(again.0 == 2 && again.1.contains("there is a keyspace \"users\" already"), "{again:?}");
    assert_eq!(run(&["keyspace", "create", "users", "--shards", "0"]).await.0, 2);
    assert_eq!(run(&["put", "--keyspace", "users", "ada", "1815"]).await.0, 0);
    assert_eq!(run(&["get", "--keyspace", "users", "ada"]).await, (0, "1815".into()));
    let listed = run(&["keyspace", "list"]).await.1;
    assert!(listed.lines().any(|line| line.split_whitespace().eq(["users", "2", "3"])), "{listed}");
    assert_eq!(run(&["keyspace", "drop", "users"]).await.0, 2, "nothing goes that nobody has said yes to");
    assert_eq!(run(&["keyspace", "drop", "users", "--yes"]).await, (0, "dropped users\n".into()));
    assert_eq!(run(&["get", "--keyspace", "users", "ada"]).await.0, 2);
    // One that is cut by ranges: rows of a prefix lie together, and scans go over the cuts.
    let args = ["keyspace", "create", "places", "--split", "g,p", "--output", "json"];
    let told: Value = serde_json::from_str(&run(&args).await.1).unwrap();
    assert_eq!(told, json!({"keyspace": "places", "shards": 3, "replicas": 3}));
    let places = client.keyspace("places").await.unwrap();
    for key in ["a", "fz", "g", "o", "p", "q"] {
        places.put(key, key.to_uppercase()).await.unwrap();
    }
    let keys = async |from: &str, reverse: bool| {
        let scan = places.scan(from..);
        let (mut rows, mut keys) = (if reverse { scan.reverse().rows() } else { scan.rows() }, String::new());
        while let Some(row) = rows.next().await.unwrap() {
            keys += std::str::from_utf8(&row.key).unwrap();
        }
        keys
    };
    assert_eq!((keys("", false).await, keys("b", true).await), ("afzgopq".into(), "qpogfz".into()));
    assert_eq!(run(&["keyspace", "create", "wrong", "--split", "p,g"]).await.0, 2, "not in order");
    assert_eq!(run(&["keyspace", "create", "wrong", "--split", "g", "--shards", "4"]).await.0, 2, "both");
    let unknown = client.drop_keyspace("users").await.unwrap_err();
    assert_eq!(unknown.code(), Some(RefusalCode::NotFound));
    let stays = client.drop_keyspace("default").await.unwrap_err();
    assert_eq!(stays.code(), Some(RefusalCode::Conflict));
    assert_eq!(client.create_keyspace("none").shards(0).await.unwrap_err().code(), Some(RefusalCode::Malformed));
}
