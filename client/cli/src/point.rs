//! The commands for one row: put, get, del. Also how every client command connects.

use crate::args::{Condition, Consistency, Del, Global, Key, Output, Put};
use crate::outcome::{Ending, Trouble};
use crate::output::{Out, is_terminal};
use crate::record::printed;
use serde_json::{Value, json};
use shkv_client::{Check, Client, ClientConfig, Keyspace};
use shkv_proto::limits::VALUE_BYTES_MAX;
use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::ffi::{OsStrExt, OsStringExt};

/// Connects as the global options say.
pub async fn connect(global: &Global) -> Result<(Client, Keyspace), Trouble> {
    let client = connect_to_cluster(global).await?;
    let keyspace = client.keyspace(&global.keyspace).await?;
    Ok((client, keyspace))
}

/// Connects without opening a keyspace.
pub async fn connect_to_cluster(global: &Global) -> Result<Client, Trouble> {
    let config =
        ClientConfig { deadline: global.timeout, through_balancer: global.through_balancer, ..ClientConfig::default() };
    let client = Client::connect_with(global.addr.iter().map(String::as_str), config).await?;
    if let Some(token) = &global.token {
        client.observe(token);
    }
    Ok(client)
}

impl From<Consistency> for shkv_client::Consistency {
    fn from(asked: Consistency) -> Self {
        match asked {
            Consistency::Linearizable => Self::Linearizable,
            Consistency::Causal => Self::Causal,
            Consistency::Eventual => Self::Eventual,
        }
    }
}

fn consistency_name(consistency: shkv_client::Consistency) -> &'static str {
    match consistency {
        shkv_client::Consistency::Linearizable => "linearizable",
        shkv_client::Consistency::Causal => "causal",
        shkv_client::Consistency::Eventual => "eventual",
    }
}

impl Condition {
    /// As the library takes it.
    fn check(self) -> Check {
        match self {
            Self { if_absent: true, .. } => Check::Absent,
            Self { if_present: true, .. } => Check::Present,
            Self { if_version: Some(version), .. } => Check::Version(version),
            Self { if_value: Some(value), .. } => Check::Value(value.into_vec().into()),
            Self { if_absent: false, if_present: false, if_version: None, if_value: None } => Check::Always,
        }
    }
}

/// `put KEY VALUE|-`
pub async fn put(global: &Global, args: Put) -> Result<Ending, Trouble> {
    let value = value_of(&args.value)?;
    let (client, keyspace) = connect(global).await?;
    let written = keyspace.put(args.key.as_bytes(), value).check(args.condition.check()).await?;
    let text = format!("version {}", written.version);
    say(global.output, &text, &json!({"version": written.version, "token": client.token().to_string()}))
}

/// `del KEY`
pub async fn del(global: &Global, args: Del) -> Result<Ending, Trouble> {
    let (client, keyspace) = connect(global).await?;
    let written = keyspace.delete(args.key.as_bytes()).check(args.condition.check()).await?;
    let told = json!({"removed": written.removed, "version": written.version, "token": client.token().to_string()});
    say(global.output, &format!("removed {}", written.removed), &told)
}

/// `get KEY`
pub async fn get(global: &Global, args: Key) -> Result<Ending, Trouble> {
    let (client, keyspace) = connect(global).await?;
    let key = args.key.as_bytes();
    let answer = keyspace.get(key).consistency(global.consistency.into()).answer().await?;
    let mut out = Out::new();
    match (global.output, &answer.row) {
        (Output::Text, Some(row)) => {
            out.bytes(&row.value)?;
            if is_terminal() {
                out.bytes(b"\n")?;
            }
        }
        (Output::Text, None) => {}
        (Output::Json | Output::Jsonl, row) => {
            let mut told = match row {
                Some(row) => json!(printed(&row.key, Some(&row.value), row.version)),
                None => json!({}),
            };
            told["found"] = json!(row.is_some());
            told["consistency"] = json!(consistency_name(answer.consistency));
            told["token"] = json!(client.token().to_string());
            out.json_line(&told)?;
        }
    }
    out.flush()?;
    Ok(if answer.row.is_some() { Ending::Done } else { Ending::NotFound })
}

/// Prints one thing in the form asked for.
pub fn say(format: Output, text: &str, json: &Value) -> Result<Ending, Trouble> {
    let mut out = Out::new();
    match format {
        Output::Text => out.line(text)?,
        Output::Json | Output::Jsonl => out.json_line(json)?,
    }
    out.flush()?;
    Ok(Ending::Done)
}

/// The value on the command line, or for `-` all of standard input. No more is read than a byte over the limit, which
/// is enough for the library to refuse it.
fn value_of(given: &OsStr) -> Result<Vec<u8>, Trouble> {
    if given != "-" {
        return Ok(given.as_bytes().to_vec());
    }
    let mut value = Vec::new();
    std::io::stdin()
        .lock()
        .take(VALUE_BYTES_MAX as u64 + 1)
        .read_to_end(&mut value)
        .map_err(|error| Trouble::Failed(format!("cannot read the value from standard input: {error}")))?;
    Ok(value)
}
