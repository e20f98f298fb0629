//! `proto.md` and the code name the same things: kinds, limits, variants, and the fields of every head in order.
//!
//! The definitions are read from the source, so that one which is added and not described is found.

use serde::Serialize;
use shkv_proto::limits::*;
use shkv_proto::message::{Failure, RefusalCode};
use shkv_proto::session::{HALF_FRAME_TIME_MAX, HANDSHAKE_TIME_MAX};
use shkv_proto::{Epoch, Kind, codec};

const DOCUMENT: &str = include_str!("../../proto.md");
const LIMITS: &str = include_str!("../src/limits.rs");
const SOURCES: [&str; 6] = [
    include_str!("../src/message/mod.rs"),
    include_str!("../src/message/cluster.rs"),
    include_str!("../src/message/consensus.rs"),
    include_str!("../src/message/write.rs"),
    include_str!("../src/map.rs"),
    LIMITS,
];

/// Definitions of the sources that are no part of the wire.
const NOT_ON_THE_WIRE: [&str; 1] = ["KeyPrefix"];

fn has_row(number: impl std::fmt::Display, name: &str) -> bool {
    let wanted = format!("| {number} | `{name}` |");
    DOCUMENT.lines().any(|line| line.starts_with(&wanted))
}

#[test]
fn every_kind_of_frame_is_described() {
    for kind in Kind::ALL {
        let (number, name) = (*kind as u8, format!("{kind:?}"));
        assert!(has_row(number, &name), "proto.md lacks a row `| {number} | `{name}` |`");
    }
}

#[test]
fn every_limit_is_told_with_its_number() {
    let limits = [
        ("KEY_BYTES_MAX", KEY_BYTES_MAX as u64),
        ("VALUE_BYTES_MAX", VALUE_BYTES_MAX as u64),
        ("BATCH_OPS_MAX", BATCH_OPS_MAX as u64),
        ("BATCH_BYTES_MAX", BATCH_BYTES_MAX as u64),
        ("FRAME_BYTES_MAX", FRAME_BYTES_MAX as u64),
        ("HANDSHAKE_BYTES_MAX", HANDSHAKE_BYTES_MAX as u64),
        ("HEAD_BYTES_MAX", HEAD_BYTES_MAX as u64),
        ("PAGE_BYTES_DEFAULT", PAGE_BYTES_DEFAULT as u64),
        ("PAGE_BYTES_MAX", PAGE_BYTES_MAX as u64),
        ("PAGE_ROWS_MAX", PAGE_ROWS_MAX as u64),
        ("MERGED_ROWS_MAX", MERGED_ROWS_MAX as u64),
        ("MERGED_SHARDS_MAX", MERGED_SHARDS_MAX as u64),
        ("COUNT_ROWS_MAX", COUNT_ROWS_MAX as u64),
        ("NAME_BYTES_MAX", NAME_BYTES_MAX as u64),
        ("MAP_NODES_MAX", MAP_NODES_MAX as u64),
        ("MAP_KEYSPACES_MAX", MAP_KEYSPACES_MAX as u64),
        ("MAP_SHARDS_MAX", MAP_SHARDS_MAX as u64),
        ("REPLICAS_MAX", u64::from(REPLICAS_MAX)),
        ("CAPACITY_USUAL", u64::from(CAPACITY_USUAL)),
        ("CAPACITY_MAX", u64::from(CAPACITY_MAX)),
        ("CONDITION_BYTES_MAX", CONDITION_BYTES_MAX as u64),
        ("CREDIT_REQUESTS", u64::from(CREDIT_REQUESTS)),
        ("OUTBOX_BYTES_SOFT", OUTBOX_BYTES_SOFT as u64),
        ("DEADLINE_MS_MAX", u64::from(DEADLINE_MS_MAX)),
        ("SNAPSHOT_CHUNK_BYTES", SNAPSHOT_CHUNK_BYTES as u64),
        ("APPEND_BYTES_MAX", APPEND_BYTES_MAX as u64),
        ("GROUP_BYTES_MAX", GROUP_BYTES_MAX as u64),
        ("HANDSHAKE_TIME_MAX", HANDSHAKE_TIME_MAX.as_millis() as u64),
        ("HALF_FRAME_TIME_MAX", HALF_FRAME_TIME_MAX.as_millis() as u64),
    ];
    let defined = LIMITS.lines().filter_map(|line| line.strip_prefix("pub const ")?.split_once(':'));
    for (name, _) in defined {
        assert!(limits.iter().any(|(known, _)| *known == name), "this test does not know {name}");
    }
    for (name, number) in limits {
        let wanted = format!("| `{name}` | {number} |");
        assert!(DOCUMENT.lines().any(|line| line.starts_with(&wanted)), "proto.md lacks a row {wanted:?}");
    }
}

/// The number by which a variant is told.
fn index(value: &impl Serialize) -> u8 {
    codec::encode(value).expect("a small value")[0]
}

#[test]
fn every_failure_and_refusal_is_told_with_its_number() {
    use RefusalCode::{
        BatchLimits, Conflict, DiskFull, Exists, Forgotten, KeyEmpty, KeyTooLarge, Malformed, NotAllowed,
        NotBootstrapped, NotFound, Retired, UnknownKeyspace, Unsupported, ValueTooLarge, Version, WouldLose,
        WrongCluster,
    };
    let codes = [
        Malformed,
        KeyEmpty,
        KeyTooLarge,
        ValueTooLarge,
        BatchLimits,
        UnknownKeyspace,
        WrongCluster,
        Version,
        NotAllowed,
        DiskFull,
        NotBootstrapped,
        Conflict,
        NotFound,
        Exists,
        WouldLose,
        Retired,
        Unsupported,
        Forgotten,
    ];
    for (at, code) in codes.iter().enumerate() {
        assert_eq!(usize::from(index(code)), at, "{code:?} has another number than before");
        assert!(has_row(at, &format!("{code:?}")), "proto.md lacks refusal {at} {code:?}");
    }
    let failures = [
        ("Refusal", Failure::refusal(Malformed, "")),
        ("NotLeader", Failure::NotLeader { hint: None }),
        ("WrongShard", Failure::WrongShard { epoch: Epoch(0) }),
        ("Busy", Failure::Busy { retry_after_ms: 0, text: String::new() }),
        ("Behind", Failure::Behind { revision: 0 }),
        ("Unknown", Failure::unknown("")),
        ("Condition", Failure::Condition { operation: 0, version: None }),
        ("Aborted", Failure::Aborted { text: String::new() }),
    ];
    for (at, (name, failure)) in failures.iter().enumerate() {
        assert_eq!(usize::from(index(failure)), at, "{name} has another number than before");
        assert!(has_row(at, name), "proto.md lacks failure {at} {name}");
    }
}

#[test]
fn every_head_is_described_field_by_field() {
    let described: String = DOCUMENT.split_whitespace().collect::<Vec<_>>().join(" ");
    let missing: Vec<String> = SOURCES
        .iter()
        .flat_map(|source| definitions(source))
        .filter(|text| !NOT_ON_THE_WIRE.iter().any(|name| text.starts_with(&format!("{name} "))))
        .filter(|text| !described.contains(text))
        .collect();
    assert!(missing.is_empty(), "proto.md lacks:\n{}\n", missing.join("\n"));
}

#[test]
fn a_definition_is_read_as_it_is_written_in_the_document() {
    let source = "/// A.\npub struct Get<'a> {\n    /// B.\n    pub keyspace: KeyspaceId,\n    pub key: &'a [u8],\n    pub rows: Vec<(u32, NodeId)>,\n}\npub enum Role {\n    Client,\n    Node(NodeId),\n    #[error(\"{x}\")]\n    Causal {\n        revision: u64,\n        hint: Option<NodeId>,\n    },\n}\n";
    let expected = [
        "Get { keyspace: u32, key: bytes, rows: list (u32, u64) }",
        "Role = 0 Client | 1 Node(u64) | 2 Causal { revision: u64, hint: option u64 }",
    ];
    assert_eq!(definitions(source), expected);
}

/// The structs and enums of a source file in the notation of the document.
fn definitions(source: &str) -> Vec<String> {
    let mut found = Vec::new();
    let mut lines = source.split("#[cfg(test)]").next().unwrap_or_default().lines();
    while let Some(line) = lines.next() {
        let (word, rest) = match (line.strip_prefix("pub struct "), line.strip_prefix("pub enum ")) {
            (Some(rest), _) => ("struct", rest),
            (_, Some(rest)) => ("enum", rest),
            (None, None) => continue,
        };
        let name = rest.split(['<', ' ']).next().unwrap_or_default();
        let body: Vec<&str> = lines
            .by_ref()
            .map(str::trim)
            .take_while(|line| *line != "}")
            .filter(|line| !line.starts_with("//") && !line.starts_with('#'))
            .collect();
        found.push(if word == "struct" {
            format!("{name} {{ {} }}", fields(&body))
        } else {
            format!("{name} = {}", variants(&body))
        });
    }
    found
}

fn fields(body: &[&str]) -> String {
    let field = |line: &&str| {
        let (name, kind) = line.trim_start_matches("pub ").trim_end_matches(',').split_once(": ").expect("a field");
        format!("{name}: {}", notation(kind))
    };
    body.iter().map(field).collect::<Vec<_>>().join(", ")
}

fn variants(body: &[&str]) -> String {
    let mut variants = Vec::new();
    let mut lines = body.iter();
    while let Some(line) = lines.next() {
        let at = variants.len();
        variants.push(if let Some(name) = line.strip_suffix(" {") {
            let inner: Vec<&str> = lines.by_ref().take_while(|line| **line != "},").copied().collect();
            format!("{at} {name} {{ {} }}", fields(&inner))
        } else if let Some((name, kind)) = line.trim_end_matches("),").split_once('(') {
            format!("{at} {name}({})", notation(kind))
        } else {
            format!("{at} {}", line.trim_end_matches(','))
        });
    }
    variants.join(" | ")
}

/// A Rust type in the notation of the document.
fn notation(kind: &str) -> String {
    let inner = |prefix: &str, suffix: &str| kind.strip_prefix(prefix)?.strip_suffix(suffix);
    if let Some(items) = inner("(", ")") {
        let (first, second) = items.split_once(", ").expect("a pair");
        return format!("({}, {})", notation(first), notation(second));
    }
    if let Some(items) = inner("Result<", ">") {
        let (ok, error) = items.split_once(", ").expect("two types");
        return format!("result {} or {}", notation(ok), notation(error));
    }
    if let Some(item) = inner("Option<", ">") {
        return format!("option {}", notation(item));
    }
    match kind {
        "Vec<u8>" | "Bytes" | "&'a [u8]" => return "bytes".into(),
        "String" => return "text".into(),
        "ClusterId" => return "u128".into(),
        "NodeId" | "ReplicaId" | "Epoch" => return "u64".into(),
        "ShardId" | "KeyspaceId" => return "u32".into(),
        _ => {}
    }
    match inner("Vec<", ">") {
        Some(item) => format!("list {}", notation(item)),
        None => kind.trim_end_matches("<'a>").to_owned(),
    }
}
