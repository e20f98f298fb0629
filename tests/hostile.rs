//! Hostile bytes on their way into a whole node and the whole front end: log segments, streams of a snapshot, and the bodies of
//! every HTTP system. The harnesses are in `tests/src/hostile`; the fuzz targets in `tests/fuzz` run the same ones, and what
//! those have found or begin with, `tests/fuzz/corpus`, is replayed here.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use proptest::collection::vec;
use proptest::prelude::*;
use shkv_tests::hostile::http::{self, SYSTEMS, System};
use shkv_tests::hostile::{json, segment, snapshot};
use std::path::Path;

/// Every file of a target's corpus.
fn corpus(target: &str) -> Vec<Vec<u8>> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target);
    let mut files: Vec<_> = std::fs::read_dir(&folder).unwrap().map(|entry| entry.unwrap().path()).collect();
    files.sort();
    assert!(!files.is_empty(), "{} is empty", folder.display());
    files.iter().map(|file| std::fs::read(file).unwrap()).collect()
}

#[test]
fn the_corpus_of_log_segments_is_refused_or_read() {
    corpus("segment").iter().for_each(|bytes| {
        segment::raw(bytes);
        segment::built(bytes);
    });
}

#[test]
fn the_corpus_of_snapshot_streams_stops_no_node() {
    corpus("snapshot").iter().for_each(|bytes| snapshot::stream(bytes));
}

#[test]
fn the_corpus_of_http_bodies_is_answered() {
    for bytes in corpus("http") {
        let (system, rest) = bytes.split_first().unwrap();
        http::requests(SYSTEMS[usize::from(*system) % SYSTEMS.len()], rest);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1_000, ..ProptestConfig::default() })]

    #[test]
    fn a_segment_of_any_bytes_is_refused_or_read(bytes in vec(any::<u8>(), 0..600)) {
        segment::raw(&bytes);
    }

    #[test]
    fn a_segment_of_records_in_any_order_is_refused_or_read(bytes in vec(any::<u8>(), 0..600)) {
        segment::built(&bytes);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 100, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn a_snapshot_of_anything_stops_no_node(bytes in vec(any::<u8>(), 0..400)) {
        snapshot::stream(&bytes);
    }

    #[test]
    fn the_database_answers_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Database, &bytes);
    }

    #[test]
    fn a_storage_server_answers_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Server, &bytes);
    }

    #[test]
    fn the_causal_store_answers_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Causal, &bytes);
    }

    #[test]
    fn the_pool_answers_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Pool, &bytes);
    }

    #[test]
    fn the_batch_proxy_answers_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Batch, &bytes);
    }

    #[test]
    fn transactions_and_rows_answer_any_body(bytes in vec(any::<u8>(), 0..200)) {
        http::requests(System::Own, &bytes);
    }
}

/// Texts that are no JSON, or no Unicode, or too deep, in the place of every value of every route.
#[test]
fn what_is_not_json_is_answered_in_every_place_of_every_route() {
    let deep = json::nested(100_000);
    for text in
        [&b"\"\\ud800\""[..], b"\"\xff\"", b"1e999", b"{\"a\":1,\"a\":[]}", b"123456789012345678901234567890", &deep]
    {
        SYSTEMS.into_iter().for_each(|system| http::in_every_place(system, text));
    }
}

/// What is within the body's limit and yet a million of something.
#[test]
fn a_million_elements_are_answered_by_every_route() {
    let lists = [&b"1"[..], b"{}", b"null", b"1e15"].map(|element| json::list(element, 1_000_000));
    SYSTEMS.into_iter().for_each(|system| http::everywhere(system, &lists));
}

/// A list of a million in the place of the value that matters most, and what becomes longer than a value can be when it is
/// written down again.
#[test]
fn a_million_elements_inside_a_request_are_refused() {
    let (numbers, texts) = (json::list(b"1e15", 1_000_000), json::list(b"\"sh1\"", 1_000_000));
    let requests = [
        ("POST", "/write", "{\"data\":", &numbers, "}", 400_u16),
        ("PUT", "/update", "{\"Stud_id\":7,\"data\":{\"Stud_name\":", &numbers, "}}", 400),
        ("POST", "/init", "{\"N\":1,\"shards\":[],\"schema\":{\"dtypes\":[],\"columns\":", &texts, "}}", 400),
        ("POST", "/copy", "{\"shards\":", &texts, "}", 400),
        ("PUT", "/key-value-store/long", "{\"value\":", &numbers, "}", 413),
        ("POST", "/add", "{\"n\":1,\"hostnames\":", &texts, "}", 400),
        ("POST", "/query", "[{\"encoding\":\"string\",\"data\":", &texts, "}]", 400),
        ("POST", "/v1/txn", "{\"keyspace\":\"default\",\"ops\":", &texts, "}", 400),
        ("POST", "/v1/txn", "{\"ops\":[],\"keyspace\":", &numbers, "}", 400),
    ];
    for (method, path, before, list, after, status) in requests {
        let answered = http::to(method, path, [before.as_bytes(), list, after.as_bytes()].concat());
        assert_eq!(answered, status, "{method} {path}");
    }
}

/// Small parts of a body take much more memory than they are long: a body of nothing else is refused before it is parsed.
#[test]
fn a_body_of_too_many_small_parts_is_refused_by_every_route() {
    let objects = json::list(b"{\"a\":0}", 1_000_000);
    for (method, path) in
        [("PUT", "/set"), ("POST", "/v1/txn"), ("POST", "/write"), ("POST", "/add"), ("PUT", "/key-value-store/k")]
    {
        assert_eq!(http::to(method, path, objects.clone()), 413, "{method} {path}");
    }
    assert_eq!(http::to("PUT", "/v1/kv/default/raw", objects), 200, "a value may be anything");
}

/// The longest text that a body can hold, wherever a text may stand: it comes back in no error.
#[test]
fn a_text_as_long_as_a_body_comes_back_in_no_error() {
    let text = [b"\"", &vec![b'x'; 1 << 20][..], b"\""].concat();
    SYSTEMS.into_iter().for_each(|system| http::in_every_place(system, &text));
}
