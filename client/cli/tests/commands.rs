//! The binary's commands as a caller sees them: standard output, standard error, exit codes. Behind them is the fake
//! cluster of the client's own tests.

#[path = "../../tests/fake/mod.rs"]
mod fake;

use fake::Fake;
use serde_json::Value;
use std::io::Write;
use std::path::Path;
use std::process::{Output, Stdio};
use std::sync::Arc;
use tokio::process::Command;

struct Shell {
    _fake: Arc<Fake>,
    addr: String,
}

impl Shell {
    async fn new() -> Self {
        let (fake, addr) = Fake::start(4, true).await;
        Self { _fake: fake, addr }
    }

    async fn run(&self, args: &[&str]) -> Output {
        run(&self.addr, args).await
    }

    async fn text(&self, args: &[&str]) -> String {
        let output = self.run(args).await;
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).expect("text")
    }

    async fn json(&self, args: &[&str]) -> Value {
        let args = [args, &["--output", "json"]].concat();
        serde_json::from_str(&self.text(&args).await).expect("one object")
    }
}

async fn run(addr: &str, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_shkv"))
        .args(args)
        .env("SHKV_ADDR", addr)
        .stdin(Stdio::null())
        .kill_on_drop(true)
        .output()
        .await
        .expect("the binary runs")
}

fn error_of(output: &Output) -> Value {
    let text = String::from_utf8_lossy(&output.stderr);
    let object: Value = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}"));
    object["error"].clone()
}

async fn nobodys_addr() -> String {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    listener.local_addr().expect("an address").to_string()
}

#[tokio::test]
async fn a_row_is_put_got_and_deleted_and_exit_codes_say_so() {
    let shell = Shell::new().await;
    assert_eq!(shell.run(&["get", "k"]).await.status.code(), Some(1));
    assert_eq!(shell.text(&["put", "k", "a value"]).await, "version 1\n");
    assert_eq!(shell.text(&["get", "k"]).await, "a value", "the bytes and nothing else");
    let told = shell.json(&["get", "k"]).await;
    assert_eq!((&told["value"], &told["version"], &told["found"]), (&"a value".into(), &1.into(), &true.into()));
    let token = told["token"].as_str().expect("a token");
    let causal = shell.json(&["get", "k", "--consistency", "causal", "--token", token]).await;
    assert_eq!(causal["consistency"], "causal");
    assert_eq!(shell.text(&["del", "k"]).await, "removed 1\n");
    let gone = shell.run(&["get", "k", "--output", "json"]).await;
    assert_eq!(gone.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&gone.stdout).contains(r#""found":false"#));
}

#[tokio::test]
async fn what_cannot_work_is_refused_and_says_why_in_the_form_asked_for() {
    let shell = Shell::new().await;
    let long = "k".repeat(5_000);
    let output = shell.run(&["put", &long, "v", "--output", "json"]).await;
    assert_eq!(output.status.code(), Some(2));
    assert_eq!(error_of(&output)["code"], "key_too_large");
    let output = shell.run(&["get", "k", "--keyspace", "nobody", "--output", "json"]).await;
    assert_eq!((output.status.code(), &error_of(&output)["code"]), (Some(2), &"unknown_keyspace".into()));
    let output = shell.run(&["fly", "--output", "json"]).await;
    assert_eq!((output.status.code(), &error_of(&output)["kind"]), (Some(2), &"usage".into()));
    let addr = nobodys_addr().await;
    let output = run(&addr, &["get", "k", "--output", "json"]).await;
    assert_eq!((output.status.code(), &error_of(&output)["kind"]), (Some(3), &"unavailable".into()));
    let output = run(&addr, &["get", "k"]).await;
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(text.contains("shkv up") && text.contains(&addr), "{text}");
}

fn write_rows(path: &Path, rows: u32) {
    let mut file = std::fs::File::create(path).expect("a file");
    for n in 0..rows {
        writeln!(file, r#"{{"key":"row/{n:05}","value":"value {n}","version":1}}"#).expect("written");
    }
}

#[tokio::test]
async fn what_range_prints_load_reads_back() {
    let directory = tempfile::tempdir().expect("a directory");
    let (rows, copy) = (directory.path().join("rows"), directory.path().join("copy"));
    write_rows(&rows, 5_000);
    let shell = Shell::new().await;
    let told = shell.json(&["load", rows.to_str().expect("text")]).await;
    assert_eq!(told["rows"], 5_000);
    assert!(!directory.path().join("rows.shkv-progress").exists(), "nothing is left of a load that is done");
    assert_eq!(shell.text(&["count", "--prefix", "row/"]).await, "5000\n");
    let printed = shell.text(&["range", "--output", "jsonl"]).await;
    assert_eq!(printed.lines().count(), 5_000);
    std::fs::write(&copy, &printed).expect("written");
    let other = Shell::new().await;
    assert_eq!(other.json(&["load", copy.to_str().expect("text")]).await["rows"], 5_000);
    assert_eq!(shell.text(&["range"]).await, other.text(&["range"]).await);
    let last = other.text(&["range", "--reverse", "--limit", "2", "--keys-only"]).await;
    assert_eq!(last, "row/04999\nrow/04998\n");
    let page = other.json(&["range", "--after", "row/00009", "--limit", "1"]).await;
    assert_eq!((&page["rows"][0]["key"], &page["more"]), (&"row/00010".into(), &true.into()));
}

#[tokio::test]
async fn a_malformed_line_is_named_what_is_before_it_stays_and_the_load_goes_on_from_there() {
    let directory = tempfile::tempdir().expect("a directory");
    let rows = directory.path().join("rows");
    let path = rows.to_str().expect("text");
    std::fs::write(&rows, "a\t1\nb\t2\nbroken\nc\t3\n").expect("written");
    let shell = Shell::new().await;
    let output = shell.run(&["load", path, "--output", "json"]).await;
    assert_eq!(output.status.code(), Some(2));
    let text = error_of(&output)["text"].as_str().expect("text").to_owned();
    assert!(text.contains("line 3") && text.contains("2 rows"), "{text}");
    assert_eq!(shell.text(&["range"]).await, "a\t1\nb\t2\n");
    std::fs::write(&rows, "a\t1\nb\t2\nbro\ten\nc\t3\n").expect("of the same size");
    let output = shell.run(&["load", path, "--resume"]).await;
    assert_eq!(output.status.code(), Some(2), "the input has changed");
    std::fs::write(&rows, "a\t1\nb\t2\nbroken\nc\t3\n").expect("written");
    let output = shell.run(&["load", path, "--resume", "--output", "json"]).await;
    assert!(error_of(&output)["text"].as_str().expect("text").contains("line 3"), "it goes on at line 3");
}

#[tokio::test]
async fn of_two_rows_of_a_key_the_last_one_counts() {
    let directory = tempfile::tempdir().expect("a directory");
    let rows = directory.path().join("rows");
    let mut text = String::new();
    for n in 0..20_000 {
        text.push_str(&format!("k{}\t{n}\n", n % 7));
        text.push_str(&format!("other{n}\tx\n"));
    }
    std::fs::write(&rows, text).expect("written");
    let shell = Shell::new().await;
    shell.text(&["load", rows.to_str().expect("text")]).await;
    for n in 19_993..20_000 {
        assert_eq!(shell.text(&["get", &format!("k{}", n % 7)]).await, n.to_string());
    }
}

#[tokio::test]
async fn a_reader_that_goes_away_is_a_quiet_end() {
    let directory = tempfile::tempdir().expect("a directory");
    let rows = directory.path().join("rows");
    write_rows(&rows, 20_000);
    let shell = Shell::new().await;
    shell.text(&["load", rows.to_str().expect("text")]).await;
    let mut child = Command::new(env!("CARGO_BIN_EXE_shkv"))
        .args(["range", "--addr", &shell.addr])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("the binary runs");
    drop(child.stdout.take());
    let output = child.wait_with_output().await.expect("it ends");
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
}

#[tokio::test]
async fn every_shell_gets_a_completion_script() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = run("127.0.0.1:1", &["completion", shell]).await;
        assert!(output.status.success() && output.stdout.len() > 1_000, "{shell}");
    }
}
