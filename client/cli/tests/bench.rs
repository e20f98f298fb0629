//! The binary `shkv-bench` against a real cluster, and against nobody.

use serde_json::Value;
use shkv_tests::Cluster;
use std::path::Path;
use std::process::{Command, Output, Stdio};

fn bench(addr: &str, args: &[&str]) -> Output {
    let mut command = Command::new(env!("CARGO_BIN_EXE_shkv-bench"));
    command.args(args).args(["--addr", addr, "--output", "json"]).stdin(Stdio::null());
    command.output().expect("the binary runs")
}

#[test]
fn the_last_line_tells_what_was_measured() {
    let directory = tempfile::tempdir().expect("a directory");
    let flags = ["--spawn", "process", "--shards", "2"];
    let cluster = Cluster::start(Path::new(env!("CARGO_BIN_EXE_shkv")), &directory.path().join("data"), &flags);
    let small = ["--conns", "2", "--depth", "4", "--keys", "300", "--secs", "0.3", "--warmup-secs", "0.05"];
    let modes: [&[&str]; 12] = [
        &["put"],
        &["get"],
        &["mixed", "--through-balancer"],
        &["get", "--consistency", "eventual"],
        &["scan", "--scan-rows", "50"],
        &["get", "--rate", "200", "--keys-chosen", "zipfian"],
        &["ycsb-a"],
        &["ycsb-b"],
        &["ycsb-c"],
        &["ycsb-d"],
        &["ycsb-e"],
        &["ycsb-f"],
    ];
    for more in modes {
        let output = bench(&cluster.addr(), &[more, &small].concat());
        let (text, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{more:?}: {errors}");
        let told: Value = serde_json::from_str(text.lines().last().unwrap_or_default()).expect("one object");
        let number = |name: &str| told[name].as_f64().unwrap_or_else(|| panic!("{more:?}: no {name} in {told}"));
        assert_eq!(number("errors"), 0.0, "{more:?}: {errors}");
        assert!(number("ops") > 0.0 && number("ops_per_sec") > 0.0 && number("secs") >= 0.3, "{told}");
        assert!(number("p50_us") > 0.0 && number("p50_us") <= number("p99_us"), "{told}");
        assert!(number("p99_us") <= number("p999_us") && number("p999_us") <= number("max_us"), "{told}");
        assert!(number("server_cpu_us_per_op") > 0.0 && number("client_cpu_us_per_op") > 0.0, "{told}");
        let only_reads = ["get", "scan", "ycsb-c"].contains(&more[0]);
        let mostly = ["ycsb-b", "ycsb-d", "ycsb-e"].contains(&more[0]);
        assert!(only_reads || mostly || number("log_syncs_per_op") > 0.0, "{told}");
        assert_eq!(told["mode"], more[0]);
        assert_eq!(number("rows_per_sec") > 0.0, ["scan", "ycsb-e"].contains(&more[0]), "{told}");
        assert!(!more.contains(&"--rate") || number("ops_per_sec") < 300.0, "{told}");
    }
}

#[test]
fn nobody_there_is_a_failure_with_a_reason() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let addr = listener.local_addr().expect("an address").to_string();
    drop(listener);
    let output = bench(&addr, &["put"]);
    assert!(!output.status.success());
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(errors.contains(&addr), "{errors}");
}

#[test]
fn numbers_that_make_no_sense_are_refused() {
    for bad in
        [["--secs", "-1"], ["--secs", "x"], ["--read-ratio", "1.5"], ["--conns", "0"], ["--keys", "0"], ["--rate", "0"]]
    {
        assert_eq!(bench("127.0.0.1:1", &[&["mixed"][..], &bad].concat()).status.code(), Some(2), "{bad:?}");
    }
}
