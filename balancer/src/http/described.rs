//! The description of the sharded database's and the causal store's routes.

use crate::http::openapi::Route;

/// What a request about rows is answered with.
const ROWS: &[u16] = &[200, 400, 404, 408, 413, 503];
/// What a request that writes rows is answered with. 500 says that it was rolled back.
const WRITES: &[u16] = &[200, 400, 404, 408, 409, 413, 500, 503, 507];
/// What a request that changes shards is answered with.
const CHANGES: &[u16] = &[200, 400, 408, 409, 413, 503, 507];
/// What a request without a body is answered with.
const LOOKS: &[u16] = &[200, 400, 503];

/// A route of the sharded database.
const fn database(
    method: &'static str,
    path: &'static str,
    does: &'static str,
    body: &'static str,
    answers: &'static [u16],
) -> Route {
    Route { method, path, system: "sharded database", does, body, takes: &[], answers }
}

/// A route of the causal store.
const fn causal(
    method: &'static str,
    path: &'static str,
    does: &'static str,
    body: &'static str,
    answers: &'static [u16],
) -> Route {
    Route { method, path, system: "causal store", does, body, takes: &[], answers }
}

/// An address of a member.
const ADDRESS: &str = r#"{"socket-address":"10.10.0.8:8080"}"#;
/// A range of ids.
const RANGE: &str = r#"{"shard?":"sh1","Stud_id":{"low":0,"high":9}}"#;

/// The routes as they are described; `/add` and `/rm` are with the load balancer's.
pub(crate) const ROUTES: &[Route] = &[
    database(
        "post",
        "/init",
        "Configures the database; what it held before is dropped",
        r#"{"N":1,"schema":{"columns":["Stud_id","Stud_name","Stud_marks"],"dtypes":["Number|String|Float","String","String"]},"shards":[{"Stud_id_low":0,"Shard_id":"sh1","Shard_size":4096}],"servers?":{"Server0":["sh1"]}}"#,
        CHANGES,
    ),
    database("get", "/status", "Schema, shards and servers", "", LOOKS),
    database("post", "/read", "Rows of a range, over its shards or of one shard", RANGE, ROWS),
    database("get", "/read", "The same as POST", RANGE, ROWS),
    database(
        "post",
        "/write",
        "Writes rows in one transaction",
        r#"{"shard?":"sh1","curr_idx?":0,"data":[{"Stud_id":1,"Stud_name":"A","Stud_marks":9}]}"#,
        WRITES,
    ),
    database(
        "put",
        "/update",
        "Changes a row",
        r#"{"shard?":"sh1","Stud_id":1,"data":{"Stud_id?":1,"Stud_name?":"A","Stud_marks?":9}}"#,
        WRITES,
    ),
    database("delete", "/del", "Removes a row", r#"{"shard?":"sh1","Stud_id":1}"#, WRITES),
    database(
        "post",
        "/del",
        "Removes a row of a shard, at a server",
        r#"{"shard":"sh1","Stud_id":1}"#,
        &[200, 400, 404, 405, 408, 409, 413, 500, 503, 507],
    ),
    database("get", "/test", "Whether it is there", "", &[200]),
    database("get", "/favicon.ico", "Nothing", "", &[204]),
    database(
        "post",
        "/config",
        "Configures shards of a server",
        r#"{"schema":{"columns":["Stud_id","Stud_name","Stud_marks"],"dtypes":["Number|String|Float","String","String"]},"shards":["sh1"]}"#,
        CHANGES,
    ),
    database("get", "/copy", "All rows of shards of a server", r#"{"shards":["sh1"]}"#, ROWS),
    database("post", "/copy", "The same as GET", r#"{"shards":["sh1"]}"#, ROWS),
    database(
        "post",
        "/autopopulate",
        "Writes five rows of ids up to 100 into sh1, to try things out with",
        "",
        &[200, 400],
    ),
    causal("get", "/key-value-store/{key}", "Reads a key", r#"?{"causal-metadata?":""}"#, ROWS),
    causal(
        "put",
        "/key-value-store/{key}",
        "Writes a key",
        r#"{"value":"v","causal-metadata?":""}"#,
        &[200, 201, 400, 404, 408, 413, 503, 507],
    ),
    causal("delete", "/key-value-store/{key}", "Removes a key", r#"?{"causal-metadata?":""}"#, ROWS),
    causal("get", "/key-value-store-view", "The view", "", LOOKS),
    causal(
        "put",
        "/key-value-store-view",
        "Adds an address to the view",
        ADDRESS,
        &[201, 400, 404, 408, 413, 503, 507],
    ),
    causal(
        "delete",
        "/key-value-store-view",
        "Takes an address out of the view",
        ADDRESS,
        &[200, 400, 404, 408, 413, 503, 507],
    ),
    causal("get", "/key-value-store-shard/shard-ids", "The ids of all shards", "", LOOKS),
    causal("get", "/key-value-store-shard/node-shard-id", "The shard of this node", "", LOOKS),
    causal("get", "/key-value-store-shard/shard-id-members/{id}", "The members of a shard", "", &[200, 400, 404, 503]),
    causal(
        "get",
        "/key-value-store-shard/shard-id-key-count/{id}",
        "How many keys a shard has",
        "",
        &[200, 400, 404, 503],
    ),
    causal(
        "put",
        "/key-value-store-shard/add-member/{id}",
        "Adds a member to a shard",
        ADDRESS,
        &[200, 400, 404, 408, 409, 413, 503, 507],
    ),
    causal(
        "put",
        "/key-value-store-shard/reshard",
        "Changes the number of shards",
        r#"{"shard-count":2}"#,
        &[200, 400, 408, 413, 501, 503],
    ),
];
