//! The commands about keyspaces: create, drop, list.

use crate::args::{Global, Keyspaces, Output};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use crate::point::{connect_to_cluster, say};
use serde_json::json;
use shkv_client::Error;
use shkv_proto::map::Map;

/// `keyspace create NAME`, `keyspace drop NAME --yes`, `keyspace list`
pub async fn run(global: &Global, args: Keyspaces) -> Result<Ending, Trouble> {
    let client = connect_to_cluster(global).await?;
    match args {
        Keyspaces::Create(args) => {
            let new = client.create_keyspace(&args.name).replicas(args.replicas);
            let (new, shards) = match &args.split[..] {
                [] => (new.shards(args.shards), args.shards as usize),
                keys => (new.split_at(keys), keys.len() + 1),
            };
            new.await?;
            let told = json!({ "keyspace": args.name, "shards": shards, "replicas": args.replicas });
            say(global.output, &format!("keyspace {} has {shards} shards", args.name), &told)
        }
        Keyspaces::Drop(args) => {
            client.drop_keyspace(&args.name).await?;
            say(global.output, &format!("dropped {}", args.name), &json!({ "dropped": args.name }))
        }
        Keyspaces::List => match client.status().await?.map {
            Some(map) => list(global.output, &map),
            None => Err(Trouble::Client(Error::Unavailable { text: "there is no shard map yet".into() })),
        },
    }
}

fn list(format: Output, map: &Map) -> Result<Ending, Trouble> {
    let mut out = Out::new();
    let all = || map.keyspaces.iter().map(|keyspace| (keyspace, map.shards_of(keyspace.id).count()));
    match format {
        Output::Text => {
            out.line(&format!("{:<24} {:>6} {:>8}", "keyspace", "shards", "replicas"))?;
            for (keyspace, shards) in all() {
                out.line(&format!("{:<24} {shards:>6} {:>8}", keyspace.name, keyspace.replicas))?;
            }
        }
        Output::Json | Output::Jsonl => {
            let told: Vec<_> = all()
                .map(|(keyspace, shards)| {
                    json!({ "keyspace": keyspace.name, "shards": shards, "replicas": keyspace.replicas })
                })
                .collect();
            out.json_line(&json!({ "keyspaces": told }))?;
        }
    }
    out.flush()?;
    Ok(Ending::Done)
}
