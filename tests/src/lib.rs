//! What the tests that run real processes share: a cluster started by the binary, its processes, and ways to end them.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "tests start processes, wait, and fail where they cannot go on"
)]

pub mod curl;
pub mod disk;
pub mod hostile;
pub mod http;
pub mod judge;
pub mod load;
pub mod proxy;
pub mod registers;
pub mod sim;

use parking_lot::Mutex;
use serde_json::Value;
use shkv_client::{Client, Error, NodeStatus, StatusDone};
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a test waits for what must come: a machine that is busy with other tests is slow.
pub const PATIENCE: Duration = Duration::from_secs(60);

/// A cluster that the binary runs.
pub struct Cluster {
    binary: PathBuf,
    data: PathBuf,
    flags: Vec<String>,
    up: Option<Child>,
    output: Option<BufReader<ChildStdout>>,
    ready: Value,
}

impl Cluster {
    /// Runs `shkv up` on a data directory, and waits until it is ready.
    #[must_use]
    pub fn start(binary: &Path, data: &Path, flags: &[&str]) -> Self {
        let flags = flags.iter().map(ToString::to_string).collect();
        let (binary, data) = (binary.to_owned(), data.to_owned());
        let mut cluster = Self { binary, data, flags, up: None, output: None, ready: Value::Null };
        cluster.start_again();
        cluster
    }

    /// Runs it again, after it has ended, on the same data.
    pub fn start_again(&mut self) {
        assert!(self.up.is_none(), "it still runs");
        let mut command = Command::new(&self.binary);
        command.args(["up", "--output", "json", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0", "--data"]);
        command.arg(&self.data).args(&self.flags).stdout(Stdio::piped()).stdin(Stdio::null());
        let mut up = command.spawn().expect("the binary runs");
        let mut output = BufReader::new(up.stdout.take().expect("a pipe was asked for"));
        let mut line = String::new();
        output.read_line(&mut line).expect("its output is text");
        if line.is_empty() {
            let status = up.wait().expect("it can be waited for");
            panic!("up ended before it was ready: {status}");
        }
        self.ready = serde_json::from_str(&line).expect("its first line is one object");
        self.up = Some(up);
        self.output = Some(output);
    }

    /// What `up` said when it was ready.
    #[must_use]
    pub fn ready(&self) -> &Value {
        &self.ready
    }

    /// The address of its balancer.
    #[must_use]
    pub fn addr(&self) -> String {
        self.ready["addr"].as_str().expect("an address").to_owned()
    }

    /// The address of its HTTP listener.
    #[must_use]
    pub fn http(&self) -> String {
        self.ready["http"].as_str().expect("an address").to_owned()
    }

    /// A client of it.
    pub async fn client(&self) -> Client {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match Client::connect([self.addr()]).await {
                Ok(client) => return client,
                Err(error) => assert!(Instant::now() < deadline, "{error}"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// A command of the binary against it.
    #[must_use]
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new(&self.binary);
        command.env("SHKV_ADDR", self.addr()).args(args).stdin(Stdio::null());
        command
    }

    /// The process of `up`.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.up.as_ref().expect("it runs").id()
    }

    /// Ends it by SIGTERM and waits.
    pub fn terminate(&mut self) -> ExitStatus {
        let mut up = self.up.take().expect("it runs");
        signal(up.id(), "TERM");
        let deadline = Instant::now() + PATIENCE;
        let status = loop {
            if let Some(status) = up.try_wait().expect("it can be waited for") {
                break status;
            }
            assert!(Instant::now() < deadline, "up does not end");
            std::thread::sleep(Duration::from_millis(20));
        };
        let mut rest = String::new();
        self.output.take().map(|mut output| output.read_to_string(&mut rest));
        status
    }

    /// Kills `up` and these processes, all at once, and waits until they are gone.
    pub fn kill_all(&mut self, processes: &[u32]) {
        let mut up = self.up.take().expect("it runs");
        let mut all = vec![up.id()];
        all.extend(processes);
        let numbers: Vec<String> = all.iter().map(ToString::to_string).collect();
        Command::new("kill").arg("-KILL").args(&numbers).status().expect("kill runs");
        up.wait().expect("it can be waited for");
        let deadline = Instant::now() + PATIENCE;
        while all.iter().any(|process| is_alive(*process)) {
            assert!(Instant::now() < deadline, "a killed process lives on");
            std::thread::sleep(Duration::from_millis(5));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if let Some(mut up) = self.up.take() {
            signal(up.id(), "TERM");
            let deadline = Instant::now() + Duration::from_secs(20);
            while matches!(up.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = up.kill(); // its nodes end with it
            let _ = up.wait();
        }
    }
}

/// One process of the binary that serves: a node, a balancer, or both.
pub struct Server {
    child: Child,
    _output: BufReader<ChildStdout>,
    told: Value,
    words: Arc<Mutex<String>>,
    listening: Option<JoinHandle<()>>,
}

impl Server {
    /// Starts it and waits for what it says when it runs.
    #[must_use]
    pub fn start(binary: &Path, args: &[&str]) -> Self {
        Self::try_start(binary, args).expect("it starts")
    }

    /// Starts it; if it ends instead, gives what it said on standard error.
    ///
    /// # Errors
    /// Its words.
    pub fn try_start(binary: &Path, args: &[&str]) -> Result<Self, String> {
        Self::try_start_with(binary, args, &[])
    }

    /// The same, with more in its environment.
    ///
    /// # Errors
    /// Its words.
    pub fn try_start_with(binary: &Path, args: &[&str], environment: &[(&str, &str)]) -> Result<Self, String> {
        let mut command = Command::new(binary);
        command.args(args).args(["--output", "json"]).envs(environment.iter().copied());
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().expect("the binary runs");
        let mut output = BufReader::new(child.stdout.take().expect("a pipe was asked for"));
        let mut errors = child.stderr.take().expect("a pipe was asked for");
        let words = Arc::new(Mutex::new(String::new()));
        let heard = words.clone();
        let listening = std::thread::spawn(move || {
            let mut bytes = [0; 4096];
            while let Ok(read @ 1..) = errors.read(&mut bytes) {
                let text = String::from_utf8_lossy(&bytes[..read]);
                eprint!("{text}");
                heard.lock().push_str(&text);
            }
        });
        let mut line = String::new();
        output.read_line(&mut line).expect("its output is text");
        if line.is_empty() {
            child.wait().expect("it can be waited for");
            listening.join().expect("reading does not panic");
            return Err(words.lock().clone());
        }
        let told = serde_json::from_str(&line).expect("its first line is one object");
        Ok(Self { child, _output: output, told, words, listening: Some(listening) })
    }

    /// What it has said on standard error so far; all of it when it has ended.
    pub fn words(&mut self) -> String {
        if matches!(self.child.try_wait(), Ok(Some(_)))
            && let Some(listening) = self.listening.take()
        {
            listening.join().expect("reading does not panic");
        }
        self.words.lock().clone()
    }

    /// What it said.
    #[must_use]
    pub fn told(&self) -> &Value {
        &self.told
    }

    /// Where it listens.
    #[must_use]
    pub fn addr(&self) -> String {
        self.told["addr"].as_str().expect("an address").to_owned()
    }

    /// Its process.
    #[must_use]
    pub fn process(&self) -> u32 {
        self.child.id()
    }

    /// Kills it and waits until it is gone.
    pub fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it can be waited for");
    }

    /// Whether it has ended by itself.
    #[must_use]
    pub fn has_ended(&mut self) -> bool {
        !matches!(self.child.try_wait(), Ok(None))
    }

    /// Waits until it ends by itself.
    pub fn ended(&mut self) -> ExitStatus {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait().expect("it can be waited for") {
                return status;
            }
            assert!(Instant::now() < deadline, "it does not end");
            std::thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) {
            signal(self.child.id(), "TERM");
            let deadline = Instant::now() + Duration::from_secs(10);
            while matches!(self.child.try_wait(), Ok(None)) && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(20));
            }
            let _ = self.child.kill(); // most often it has ended
            let _ = self.child.wait();
        }
    }
}

/// Connects a client, however long nobody answers yet.
pub async fn connect(addrs: &[String]) -> Client {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match Client::connect(addrs.iter().cloned()).await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "{error}"),
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Waits until the cluster's status satisfies `what`.
pub async fn until_status(client: &Client, what: impl Fn(&StatusDone) -> bool) -> StatusDone {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = client.status().await;
        if let Ok(status) = &status
            && what(status)
        {
            return status.clone();
        }
        assert!(Instant::now() < deadline, "it did not come to pass: {status:#?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether every shard has `copies` replicas, all of which vote, are on living nodes, and have what their leader has.
#[must_use]
pub fn is_whole(status: &StatusDone, copies: usize) -> bool {
    let Some(map) = &status.map else { return false };
    let nodes: Vec<&NodeStatus> = status.nodes.iter().filter_map(|(_, node)| node.as_ref().ok()).collect();
    map.shards.iter().all(|shard| {
        let on = |node| nodes.iter().find(|told: &&&NodeStatus| told.id == node);
        let group = nodes.iter().flat_map(|node| &node.replicas).find(|there| there.shard == shard.id && there.leads);
        let Some((led, group)) = group.and_then(|led| Some((led, led.group.as_ref()?))) else { return false };
        shard.replicas.len() == copies
            && shard.voters().count() == copies
            && group.voters.len() == copies
            && group.outgoing.is_empty()
            && group.learners.is_empty()
            && group.matched.iter().all(|(_, index)| *index >= led.committed)
            && shard.replicas.iter().all(|home| {
                let there = on(home.node).map(|node| &node.replicas);
                there.is_some_and(|there| there.iter().any(|here| here.shard == shard.id && here.replica == home.id))
            })
    })
}

/// Sends a signal to a process.
pub fn signal(process: u32, name: &str) {
    Command::new("kill").arg(format!("-{name}")).arg(process.to_string()).status().expect("kill runs");
}

/// Processes that are stopped, and go on when this is dropped.
#[derive(Debug)]
pub struct Frozen(Vec<u32>);

impl Frozen {
    /// Stops them.
    #[must_use]
    pub fn new(processes: &[u32]) -> Self {
        processes.iter().for_each(|process| signal(*process, "STOP"));
        Self(processes.to_vec())
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        self.0.iter().for_each(|process| signal(*process, "CONT"));
    }
}

/// Whether a process runs.
#[must_use]
pub fn is_alive(process: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{process}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with('Z'))
}

/// Bytes of memory that a process has in use.
#[must_use]
pub fn resident_bytes(process: u32) -> u64 {
    let status = std::fs::read_to_string(format!("/proc/{process}/status")).expect("the process runs");
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).expect("it says how much");
    line.split_whitespace().nth(1).and_then(|kib| kib.parse::<u64>().ok()).expect("in KiB") << 10
}

/// The nodes' own words, once all of them answer.
pub async fn nodes(client: &Client) -> Vec<NodeStatus> {
    until(client, |_| true).await
}

/// Waits until all nodes answer and satisfy `what`.
pub async fn until(client: &Client, what: impl Fn(&[NodeStatus]) -> bool) -> Vec<NodeStatus> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = client.status().await;
        if let Ok(status) = &status {
            let nodes: Vec<NodeStatus> = status.nodes.iter().filter_map(|(_, node)| node.clone().ok()).collect();
            if nodes.len() == status.nodes.len() && what(&nodes) {
                return nodes;
            }
        }
        assert!(Instant::now() < deadline, "it did not come to pass: {status:?}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

/// Whether every replica of a shard has applied the same.
#[must_use]
pub fn are_level(nodes: &[NodeStatus]) -> bool {
    let mut applied = std::collections::BTreeMap::new();
    nodes
        .iter()
        .flat_map(|node| &node.replicas)
        .all(|replica| replica.applied == *applied.entry(replica.shard).or_insert(replica.applied))
}

/// What became of a write.
#[must_use]
pub fn outcome<T>(result: &Result<T, Error>) -> &'static str {
    match result {
        Ok(_) => "done",
        Err(Error::Unknown { .. }) => "unknown",
        Err(_) => "not done",
    }
}
