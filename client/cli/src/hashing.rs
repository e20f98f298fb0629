//! The command that compares ways of consistent hashing: how evenly each spreads requests over 2 to 6 servers, and how
//! many requests move when a server comes or goes.

use crate::args::{Global, Hashing, Output};
use crate::outcome::{Ending, Trouble};
use crate::output::Out;
use serde_json::json;
use shkv_proto::hashing::key_hash;
use shkv_proto::ring::{Full, Functions, Rendezvous, SlotRing, Spread};

/// Numbers of servers that are compared.
const SERVERS: std::ops::RangeInclusive<u64> = 2..=6;

/// `hashing`
pub fn run(global: &Global, args: &Hashing) -> Result<Ending, Trouble> {
    // Numbers of six digits, always the same ones.
    let requests: Vec<u64> = (0..args.requests).map(|n| 100_000 + key_hash(&n.to_le_bytes()) % 900_000).collect();
    let mut out = Out::new();
    if global.output == Output::Text {
        out.line(&format!("{} requests; moved: when one server more comes / when the last one goes", requests.len()))?;
        out.line(&format!(
            "{:<16} {:>7} {:>8} {:>8} {:>9}  {:<17}  least possible",
            "FUNCTIONS", "SERVERS", "LEAST", "MOST", "DEVIATION", "MOVED"
        ))?;
    }
    let ways: [(&str, Option<Functions>); 5] = [
        ("rendezvous-xxh3", None),
        ("ring-quadratic", Some(Functions::Quadratic)),
        ("ring-large", Some(Functions::LargeQuadratic)),
        ("ring-sha256", Some(Functions::Sha256)),
        ("ring-xxh3", Some(Functions::Xxh3)),
    ];
    for (name, functions) in ways {
        for servers in SERVERS {
            let spread = spread(functions, servers, &requests)
                .map_err(|error| Trouble::Failed(format!("{name} with {servers} servers: {error}")))?;
            let (least, most) =
                (spread.counts.iter().min().copied().unwrap_or(0), spread.counts.iter().max().copied().unwrap_or(0));
            match global.output {
                Output::Text => out.line(&format!(
                    "{name:<16} {servers:>7} {least:>8} {most:>8} {:>9.1}  {:>7} / {:<7}  {:>7} / {}",
                    spread.deviation(),
                    spread.moved_by_add,
                    spread.moved_by_remove,
                    args.requests / (servers + 1),
                    args.requests / servers,
                ))?,
                Output::Json | Output::Jsonl => out.json_line(&json!({
                    "functions": name, "servers": servers, "counts": spread.counts, "deviation": spread.deviation(),
                    "moved_by_add": spread.moved_by_add, "moved_by_remove": spread.moved_by_remove,
                }))?,
            }
        }
    }
    out.flush()?;
    Ok(Ending::Done)
}

fn spread(functions: Option<Functions>, servers: u64, requests: &[u64]) -> Result<Spread, Full> {
    match functions {
        None => Spread::of(Rendezvous::default, servers, requests),
        Some(functions) => Spread::of(|| SlotRing::new(functions), servers, requests),
    }
}
