//! `/v1/txn`: several operations on one keyspace in one step, or none of them.

use crate::http::Front;
use crate::http::answer::{Envelope, json_answer};
use crate::http::asked::Read;
use crate::http::own::{failed, put_bytes};
use crate::http::store::{Ask, If, Op};
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::post;
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use serde::Deserialize;
use serde_json::{Map, Value, json};
use shkv_proto::limits::BATCH_OPS_MAX;
use shkv_proto::map::DEFAULT_KEYSPACE;
use std::collections::BTreeMap;

/// `/v1/txn`
pub(crate) fn routes() -> Router<Front> {
    Router::new().route("/v1/txn", post(transact))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Txn {
    keyspace: Option<String>,
    ops: Vec<Asked>,
}

/// An operation as it is asked for; key and value as text, or in base64.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Asked {
    op: Kind,
    key: Option<String>,
    key_b64: Option<String>,
    value: Option<String>,
    value_b64: Option<String>,
    #[serde(default)]
    if_absent: bool,
    #[serde(default)]
    if_present: bool,
    if_version: Option<u64>,
    if_value: Option<String>,
    if_value_b64: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Put,
    Delete,
    Check,
    Read,
}

impl Asked {
    fn op(self) -> Result<Op, String> {
        let key = bytes("key", self.key, self.key_b64)?.ok_or("names no key")?;
        let value = bytes("value", self.value, self.value_b64)?;
        let mut conditions: Vec<If> = Vec::new();
        conditions.extend(self.if_absent.then_some(If::Absent));
        conditions.extend(self.if_present.then_some(If::Present));
        conditions.extend(self.if_version.map(If::Version));
        conditions.extend(bytes("if_value", self.if_value, self.if_value_b64)?.map(If::Value));
        if conditions.len() > 1 {
            return Err("has more than one condition".into());
        }
        let condition = conditions.pop();
        if self.op != Kind::Put && value.is_some() {
            return Err("has a value and is not a put".into());
        }
        match self.op {
            Kind::Put => {
                let value = value.ok_or("is a put and has no value")?;
                Ok(Op::Put { key, value, condition: condition.unwrap_or_default() })
            }
            Kind::Delete => Ok(Op::Delete { key, condition: condition.unwrap_or_default() }),
            Kind::Check => Ok(Op::Check { key, condition: condition.ok_or("is a check and has no condition")? }),
            Kind::Read if condition.is_some() => Err("is a read and has a condition: add a check".into()),
            Kind::Read => Ok(Op::Read { key }),
        }
    }
}

fn bytes(name: &str, text: Option<String>, b64: Option<String>) -> Result<Option<Bytes>, String> {
    match (text, b64) {
        (None, None) => Ok(None),
        (Some(text), None) => Ok(Some(text.into())),
        (None, Some(b64)) => {
            let bytes =
                STANDARD.decode(b64).map_err(|error| format!("has a {name}_b64 that is not base64: {error}"))?;
            Ok(Some(bytes.into()))
        }
        (Some(_), Some(_)) => Err(format!("has both {name} and {name}_b64")),
    }
}

async fn transact(State(front): State<Front>, ask: Ask, Read(txn, _room): Read<Txn>) -> Response {
    let bad = |text: &str| Envelope::Own.problem(StatusCode::BAD_REQUEST, text);
    if txn.ops.is_empty() || txn.ops.len() > BATCH_OPS_MAX {
        return bad(&format!("a transaction has from 1 to {BATCH_OPS_MAX} operations, not {}", txn.ops.len()));
    }
    let mut ops = Vec::with_capacity(txn.ops.len());
    for (at, asked) in txn.ops.into_iter().enumerate() {
        match asked.op() {
            Ok(op) => ops.push(op),
            Err(text) => return bad(&format!("operation {at} {text}")),
        }
    }
    let keyspace = front.store.keyspace(txn.keyspace.as_deref().unwrap_or(DEFAULT_KEYSPACE));
    let done = match keyspace {
        Ok(keyspace) => front.store.batch(keyspace, &ops, &ask).await,
        Err(failure) => Err(failure),
    };
    let done = match done {
        Ok(done) => done,
        Err(failure) => return failed(&failure),
    };
    let keys = ops.iter().filter(|op| matches!(op, Op::Read { .. })).map(Op::key);
    let row = |(key, row): (&Bytes, Option<crate::http::store::Found>)| {
        let Some(row) = row else { return Value::Null };
        let mut object = Map::new();
        put_bytes(&mut object, "key", key);
        put_bytes(&mut object, "value", &row.value);
        object.insert("version".into(), json!(row.version));
        Value::Object(object)
    };
    let rows: Vec<Value> = keys.zip(done.rows).map(row).collect();
    let revisions: BTreeMap<String, u64> =
        done.revisions.iter().map(|(shard, revision)| (shard.0.to_string(), *revision)).collect();
    json_answer(StatusCode::OK, &json!({"removed": done.removed, "revisions": revisions, "rows": rows}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn op(asked: Value) -> Result<Op, String> {
        serde_json::from_value::<Asked>(asked).map_err(|error| error.to_string())?.op()
    }

    #[test]
    fn operations_are_read_or_refused() {
        let key = || Bytes::from_static(b"k");
        assert_eq!(op(json!({"op": "read", "key": "k"})), Ok(Op::Read { key: key() }));
        let put = Op::Put { key: key(), value: Bytes::from_static(b"\xff"), condition: If::Version(3) };
        assert_eq!(op(json!({"op": "put", "key_b64": "aw==", "value_b64": "/w==", "if_version": 3})), Ok(put));
        let check = Op::Check { key: key(), condition: If::Absent };
        assert_eq!(op(json!({"op": "check", "key": "k", "if_absent": true})), Ok(check));
        for bad in [
            json!({"op": "put", "key": "k"}),
            json!({"op": "put", "value": "v"}),
            json!({"op": "check", "key": "k"}),
            json!({"op": "read", "key": "k", "if_absent": true}),
            json!({"op": "delete", "key": "k", "value": "v"}),
            json!({"op": "delete", "key": "k", "if_absent": true, "if_version": 3}),
            json!({"op": "put", "key": "k", "key_b64": "aw==", "value": "v"}),
            json!({"op": "put", "key_b64": "?", "value": "v"}),
            json!({"op": "move", "key": "k"}),
            json!({"op": "read", "key": "k", "other": 1}),
        ] {
            assert!(op(bad.clone()).is_err(), "{bad}");
        }
    }
}
