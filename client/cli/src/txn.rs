//! The command that does several things in one step: its input, and what is said at the end.

use crate::args::{Global, Output};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::point::connect;
use crate::record::{one_of, printed, text_or_base64};
use serde::Deserialize;
use serde_json::{Value, json};
use shkv_client::{Check, Committed, Keyspace, Txn};
use std::borrow::Cow;
use std::io::Read;

/// Longest input: the largest batch with every byte escaped as JSON escapes control characters, and some room.
const INPUT_BYTES_MAX: u64 = 64 << 20;

/// What the input looks like, for the help.
pub const HELP: &str = r#"Standard input is a list of operations, each with a key of its own:
  [{"op": "check", "key": "a", "if_value": "1"},
   {"op": "put", "key": "b", "value": "2", "if_absent": true},
   {"op": "delete", "key": "c", "if_version": 7},
   {"op": "read", "key": "d"}]
Conditions are "if_absent": true, "if_present": true, "if_version" and "if_value"; a check needs one, a read takes none.
Bytes that are not text are given as base64, in "key_b64", "value_b64" and "if_value_b64". All is done if all conditions
hold, otherwise nothing, and the exit code is 5."#;

#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
enum Kind {
    Check,
    Put,
    Delete,
    Read,
}

/// An operation as it is read.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Given<'a> {
    op: Kind,
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key_b64: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    value: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    value_b64: Option<Cow<'a, str>>,
    #[serde(default)]
    if_absent: bool,
    #[serde(default)]
    if_present: bool,
    #[serde(default)]
    if_version: Option<u64>,
    #[serde(borrow, default)]
    if_value: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    if_value_b64: Option<Cow<'a, str>>,
}

/// An operation that makes sense.
#[derive(Debug, PartialEq, Eq)]
struct Op {
    kind: Kind,
    key: Vec<u8>,
    value: Vec<u8>,
    check: Check,
}

/// `txn`
pub async fn run(global: &Global) -> Result<Ending, Trouble> {
    let mut input = Vec::new();
    std::io::stdin()
        .lock()
        .take(INPUT_BYTES_MAX + 1)
        .read_to_end(&mut input)
        .map_err(|error| Trouble::Failed(format!("cannot read the operations from standard input: {error}")))?;
    if input.len() as u64 > INPUT_BYTES_MAX {
        return Err(Trouble::Usage(format!("the operations are over {INPUT_BYTES_MAX} bytes of JSON")));
    }
    let ops = parse(&input).map_err(Trouble::Usage)?;
    let (client, keyspace) = connect(global).await?;
    let reads: Vec<Vec<u8>> = ops.iter().filter(|op| op.kind == Kind::Read).map(|op| op.key.clone()).collect();
    let done = built(&keyspace, ops).commit().await?;
    let mut out = Out::new();
    match global.output {
        Output::Text => {
            for row in done.rows.iter().flatten() {
                out.bytes(&row.key)?;
                out.bytes(b"\t")?;
                out.bytes(&row.value)?;
                out.bytes(b"\n")?;
            }
            out.line(&format!("done, {} removed, {} of {} found", done.removed, found(&done), reads.len()))?;
        }
        Output::Json | Output::Jsonl => {
            let mut told = told(&done, &reads);
            told["token"] = json!(client.token().to_string());
            out.json_line(&told)?;
        }
    }
    out.flush()?;
    Ok(Ending::Done)
}

fn found(done: &Committed) -> usize {
    done.rows.iter().flatten().count()
}

fn told(done: &Committed, reads: &[Vec<u8>]) -> Value {
    let rows = done.rows.iter().zip(reads).map(|(row, key)| match row {
        Some(row) => {
            let mut told = json!(printed(&row.key, Some(&row.value), row.version));
            told["found"] = json!(true);
            told
        }
        None => match text_or_base64(key) {
            (Some(text), _) => json!({"key": text, "found": false}),
            (None, base64) => json!({"key_b64": base64, "found": false}),
        },
    });
    let revisions = done.revisions.iter().map(|(shard, revision)| json!({"shard": shard, "revision": revision}));
    json!({
        "done": true, "removed": done.removed, "rows": rows.collect::<Vec<_>>(),
        "revisions": revisions.collect::<Vec<_>>(),
    })
}

fn built(keyspace: &Keyspace, ops: Vec<Op>) -> Txn {
    ops.into_iter().fold(keyspace.txn(), |txn, op| match op.kind {
        Kind::Check => txn.check(op.key, op.check),
        Kind::Put => txn.put_if(op.key, op.value, op.check),
        Kind::Delete => txn.delete_if(op.key, op.check),
        Kind::Read => txn.read(op.key),
    })
}

/// Reads the operations; what is wrong is told with its place in the list.
fn parse(input: &[u8]) -> Result<Vec<Op>, String> {
    let given: Vec<Value> = serde_json::from_slice(input).map_err(|error| {
        format!("standard input is not a list of operations in JSON: {error}; see `shkv txn --help`")
    })?;
    let op = |(at, given): (usize, &Value)| {
        let op = Given::deserialize(given).map_err(|error| error.to_string()).and_then(op_of);
        op.map_err(|why| format!("operation {at}: {why}"))
    };
    given.iter().enumerate().map(op).collect()
}

fn op_of(given: Given<'_>) -> Result<Op, String> {
    let kind = given.op;
    let key = one_of("key", given.key, given.key_b64)?;
    let value = match (kind, given.value, given.value_b64) {
        (Kind::Put, text, base64) => one_of("value", text, base64)?,
        (_, None, None) => Vec::new(),
        (_, _, _) => return Err("only a put has a value".into()),
    };
    let mut checks = Vec::new();
    checks.extend(given.if_absent.then_some(Check::Absent));
    checks.extend(given.if_present.then_some(Check::Present));
    checks.extend(given.if_version.map(Check::Version));
    if given.if_value.is_some() || given.if_value_b64.is_some() {
        checks.push(Check::Value(one_of("if_value", given.if_value, given.if_value_b64)?.into()));
    }
    let check = match (kind, checks.pop(), checks.len()) {
        (_, Some(_), 1..) => return Err("more than one condition".into()),
        (Kind::Check, None, _) => {
            return Err("a check needs a condition: if_absent, if_present, if_version, if_value".into());
        }
        (Kind::Read, Some(_), _) => return Err("a read takes no condition; check another key, or read before".into()),
        (_, check, _) => check.unwrap_or_default(),
    };
    Ok(Op { kind, key, value, check })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_are_read_as_the_help_shows_them() {
        let example = &HELP[HELP.find('[').unwrap()..=HELP.find(']').unwrap()];
        let ops = parse(example.as_bytes()).unwrap();
        let kinds: Vec<Kind> = ops.iter().map(|op| op.kind).collect();
        assert_eq!(kinds, [Kind::Check, Kind::Put, Kind::Delete, Kind::Read]);
        let checks: Vec<&Check> = ops.iter().map(|op| &op.check).collect();
        assert_eq!(checks, [&Check::Value("1".into()), &Check::Absent, &Check::Version(7), &Check::Always]);
        assert_eq!((&ops[1].key[..], &ops[1].value[..]), (&b"b"[..], &b"2"[..]));
        let bytes = parse(br#"[{"op":"put","key_b64":"/w==","value_b64":"/g==","if_value_b64":"/Q=="}]"#).unwrap();
        assert_eq!((&bytes[0].key[..], &bytes[0].value[..]), (&[0xff][..], &[0xfe][..]));
        assert_eq!(bytes[0].check, Check::Value(vec![0xfd].into()));
    }

    #[test]
    fn what_is_wrong_is_told_with_its_operation() {
        let wrong = [
            (r#"[{"op":"read","key":"a"},{"op":"fly","key":"b"}]"#, "operation 1: unknown variant `fly`"),
            (r#"[{"op":"put","key":"a"}]"#, "operation 0: neither value"),
            (r#"[{"op":"delete","key":"a","value":"1"}]"#, "operation 0: only a put"),
            (r#"[{"op":"check","key":"a"}]"#, "operation 0: a check needs"),
            (r#"[{"op":"read","key":"a","if_absent":true}]"#, "operation 0: a read takes no condition"),
            (r#"[{"op":"delete","key":"a","if_absent":true,"if_version":1}]"#, "operation 0: more than one"),
            (r#"[{"op":"read"}]"#, "operation 0: neither key"),
            (r#"[{"op":"read","key":"a","colour":"red"}]"#, "operation 0: unknown field `colour`"),
            (r#"{"op":"read"}"#, "not a list of operations"),
            ("", "not a list of operations"),
        ];
        for (input, expected) in wrong {
            let error = parse(input.as_bytes()).unwrap_err();
            assert!(error.contains(expected), "{input}: {error}");
        }
    }
}
