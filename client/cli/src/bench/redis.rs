//! The same loop against a redis-server, for the ratio: SET and GET in RESP2, as deep a pipeline on as many connections.
//!
//! Only what these two commands answer is understood: a status, an error, an integer, a string.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time")]

use super::local;
use super::measure::{Outcome, Tally, Usage, Window, measure};
use super::pace::Pace;
use super::workload::{Op, key};
use super::{KEY_BYTES, Plan};
use anyhow::{Context, bail};
use bytes::{Buf, Bytes, BytesMut};
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::collections::VecDeque;
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Instant;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinSet;

/// Longest answer that is taken.
const REPLY_BYTES_MAX: usize = 64 << 20;
/// How long a WAIT may take, in milliseconds.
const WAIT_MS_MAX: &[u8] = b"1000";
/// Commands in flight while keys are loaded.
const LOAD_DEPTH: u64 = 1_000;

/// What the server answers.
#[derive(Clone, Debug, PartialEq, Eq)]
enum Reply {
    /// A status or a number.
    Ok,
    /// A string, or none.
    Bulk(Option<Bytes>),
    /// An error in the server's words.
    Error(String),
}

/// What was sent and is not answered yet.
#[derive(Clone, Copy, Debug)]
enum Sent {
    Get,
    /// A read that a write follows.
    GetFirst([u8; KEY_BYTES]),
    Set,
    /// Two commands, and so two answers.
    SetAndWait,
}

/// Runs the plan. With `wait`, each put counts when so many replicas have it, by WAIT.
///
/// # Errors
/// When the server cannot be reached or does not speak RESP.
pub async fn run(addr: &str, wait: u32, plan: &Plan) -> anyhow::Result<Outcome> {
    if plan.workload.mix.scan > 0.0 {
        bail!("redis keeps no order: there are no scans of it");
    }
    if plan.load && plan.workload.reads() {
        load(addr, plan).await?;
    }
    let window = Arc::new(Window::default());
    let (mut workers, inserted) = (JoinSet::new(), Arc::new(AtomicU64::new(0)));
    for seed in 0..u64::from(plan.conns) {
        workers.spawn(work(Connection::open(addr).await?, plan.clone(), wait, seed, inserted.clone(), window.clone()));
    }
    measure(plan, &window, workers, async || usage(addr).await).await
}

async fn work(
    mut server: Connection,
    plan: Plan,
    wait: u32,
    seed: u64,
    inserted: Arc<AtomicU64>,
    window: Arc<Window>,
) -> anyhow::Result<Tally> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let value = plan.value(&mut rng);
    let mut drawer = plan.workload.drawer(rng, inserted)?;
    let mut pace = Pace::new(plan.rate, seed, u64::from(plan.conns));
    let mut tally = Tally::default();
    let wait = (wait > 0).then(|| wait.to_string());
    let mut sent: VecDeque<(Instant, Sent)> = VecDeque::with_capacity(plan.depth as usize);
    while !window.is_over() {
        while sent.len() < plan.depth as usize
            && let Some(began) = pace.take(Instant::now())
        {
            let op = drawer.draw();
            sent.push_back(match op {
                Op::Get(key) => (began, server.add(&[b"GET", &key]).map(|()| Sent::Get)?),
                Op::Change(key) => (began, server.add(&[b"GET", &key]).map(|()| Sent::GetFirst(key))?),
                Op::Put(key) => (began, server.set(&key, &value, wait.as_deref())?),
                Op::Scan(..) => bail!("redis keeps no order"),
            });
        }
        server.flush().await?;
        let mut reply = match pace.due().filter(|_| sent.len() < plan.depth as usize) {
            None => Some(server.reply().await?),
            // Cancel-safe: a reply is taken from the buffer whole, in the end.
            Some(due) => tokio::time::timeout_at(due.into(), server.reply()).await.ok().transpose()?,
        };
        while let Some(answer) = reply {
            let (began, what) = sent.pop_front().context("an answer to nothing")?;
            let failure = match (answer, what) {
                (Reply::Bulk(None), Sent::Get | Sent::GetFirst(_)) => Some("a key that was loaded is not there".into()),
                (Reply::Error(error), _) => Some(error),
                (Reply::Ok | Reply::Bulk(_), _) => None,
            };
            match (failure, what) {
                (Some(error), _) => tally.failed(&window, &format!("redis: {error}")).await,
                (None, Sent::GetFirst(key)) => sent.push_back((began, server.set(&key, &value, wait.as_deref())?)),
                (None, Sent::SetAndWait) => sent.push_front((began, Sent::Set)), // its WAIT is answered next
                (None, Sent::Get | Sent::Set) => tally.succeeded(&window, began),
            }
            reply = if sent.is_empty() { None } else { take(&mut server.input)? };
        }
    }
    Ok(tally)
}

/// Writes all keys. It costs no more than finding out which are missing.
async fn load(addr: &str, plan: &Plan) -> anyhow::Result<()> {
    let mut server = Connection::open(addr).await?;
    eprintln!("shkv-bench: loading {} keys into redis", plan.workload.keys);
    let value = plan.value(&mut SmallRng::seed_from_u64(0));
    for begin in (0..plan.workload.keys).step_by(LOAD_DEPTH as usize) {
        let end = (begin + LOAD_DEPTH).min(plan.workload.keys);
        for number in begin..end {
            server.add(&[b"SET", &key(number), &value])?;
        }
        server.flush().await?;
        for _ in begin..end {
            if let Reply::Error(error) = server.reply().await? {
                bail!("loading: {error}");
            }
        }
    }
    Ok(())
}

/// What the server and its replicas have used so far, by their own account.
async fn usage(addr: &str) -> anyhow::Result<Usage> {
    let own = info(addr).await?;
    let mut copies = vec![own.clone()];
    for line in own.lines().filter(|line| line.starts_with("slave") && line.contains("ip=")) {
        let part = |name: &str| line.split([':', ',']).find_map(|part| part.strip_prefix(name)).map(str::to_owned);
        if let (Some(ip), Some(port)) = (part("ip="), part("port="))
            && let Ok(text) = info(&format!("{ip}:{port}")).await
        {
            copies.push(text);
        }
    }
    let mut usage = Usage { wire_bytes: local::loopback_bytes().unwrap_or_default(), ..Usage::default() };
    for text in &copies {
        let number = |name: &str| -> f64 {
            text.lines().find_map(|line| line.strip_prefix(name)?.trim().parse().ok()).unwrap_or_default()
        };
        let process = number("process_id:") as u32;
        let cpu_us = (number("used_cpu_sys:") + number("used_cpu_user:")) * 1e6;
        usage.cpu_us.push((process, cpu_us as u64));
        usage.memory_bytes += number("used_memory_rss:") as u64;
        usage.log_bytes += number("aof_current_size:") as u64;
    }
    Ok(usage)
}

async fn info(addr: &str) -> anyhow::Result<String> {
    let mut server = Connection::open(addr).await?;
    server.add(&[b"INFO"])?;
    let Reply::Bulk(Some(text)) = server.ask().await? else { bail!("no answer to INFO") };
    Ok(String::from_utf8_lossy(&text).into_owned())
}

struct Connection {
    stream: TcpStream,
    output: Vec<u8>,
    input: BytesMut,
}

impl Connection {
    async fn open(addr: &str) -> anyhow::Result<Self> {
        let stream = TcpStream::connect(addr).await.context("connecting")?;
        stream.set_nodelay(true)?;
        Ok(Self { stream, output: Vec::new(), input: BytesMut::new() })
    }

    /// Appends a command to what the next flush sends.
    fn add(&mut self, words: &[&[u8]]) -> std::io::Result<()> {
        write!(self.output, "*{}\r\n", words.len())?;
        for word in words {
            write!(self.output, "${}\r\n", word.len())?;
            self.output.extend_from_slice(word);
            self.output.extend_from_slice(b"\r\n");
        }
        Ok(())
    }

    /// Appends a write, and that it is waited for if it is.
    fn set(&mut self, key: &[u8], value: &[u8], wait: Option<&str>) -> std::io::Result<Sent> {
        self.add(&[b"SET", key, value])?;
        let Some(replicas) = wait else { return Ok(Sent::Set) };
        self.add(&[b"WAIT", replicas.as_bytes(), WAIT_MS_MAX])?;
        Ok(Sent::SetAndWait)
    }

    async fn flush(&mut self) -> std::io::Result<()> {
        self.stream.write_all(&self.output).await?;
        self.output.clear();
        Ok(())
    }

    /// The next reply.
    async fn reply(&mut self) -> anyhow::Result<Reply> {
        loop {
            if let Some(reply) = take(&mut self.input)? {
                return Ok(reply);
            }
            self.input.reserve(16 << 10);
            if self.stream.read_buf(&mut self.input).await? == 0 {
                bail!("the server closed the connection");
            }
        }
    }

    async fn ask(&mut self) -> anyhow::Result<Reply> {
        self.flush().await?;
        self.reply().await
    }
}

/// Takes a whole reply off the front of `input`; `None` while there is none.
fn take(input: &mut BytesMut) -> anyhow::Result<Option<Reply>> {
    let Some(end) = input.windows(2).position(|pair| pair == b"\r\n") else {
        return Ok(None);
    };
    let line = String::from_utf8_lossy(input.get(1..end).unwrap_or_default()).into_owned();
    let reply = match input[0] {
        b'+' | b':' => Reply::Ok,
        b'-' => Reply::Error(line),
        b'$' if line == "-1" => Reply::Bulk(None),
        b'$' => {
            let length: usize = line.parse().context("the length of a string")?;
            if length > REPLY_BYTES_MAX {
                bail!("an answer of {length} bytes");
            }
            if input.len() < end + 2 + length + 2 {
                return Ok(None);
            }
            input.advance(end + 2);
            let value = input.split_to(length).freeze();
            input.advance(2);
            return Ok(Some(Reply::Bulk(Some(value))));
        }
        other => bail!("an answer that begins with byte {other}"),
    };
    input.advance(end + 2);
    Ok(Some(reply))
}

#[cfg(test)]
mod tests {
    use super::super::workload::{Mix, Workload};
    use super::*;

    #[test]
    fn replies_are_taken_whole_or_not_at_all() {
        let all = b"+OK\r\n$5\r\nva\r\ne\r\n$-1\r\n:7\r\n$0\r\n\r\n-ERR no\r\n";
        let bulk = |value: &'static [u8]| Reply::Bulk(Some(Bytes::from_static(value)));
        let expected =
            [Reply::Ok, bulk(b"va\r\ne"), Reply::Bulk(None), Reply::Ok, bulk(b""), Reply::Error("ERR no".into())];
        let mut input = BytesMut::new();
        let mut taken = Vec::new();
        for byte in all {
            input.extend_from_slice(&[*byte]);
            taken.extend(take(&mut input).unwrap());
        }
        assert_eq!(taken, expected);
        assert!(input.is_empty());
    }

    #[test]
    fn what_is_no_reply_is_refused() {
        for bad in [&b"HTTP/1.1 400\r\n"[..], b"$99999999999999\r\n", b"$x\r\n", b"\r\n"] {
            assert!(take(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
    }

    /// A server that keeps nothing but which keys were set; every `refused`th command is refused.
    async fn fake_server(refused: u64) -> String {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        let keys = Arc::new(std::sync::Mutex::new(std::collections::BTreeSet::new()));
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let keys = keys.clone();
                tokio::spawn(async move {
                    let (mut input, mut words, mut commands) = (BytesMut::new(), Vec::new(), 0_u64);
                    while stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                        let mut output = Vec::new();
                        while let Some(word) = word(&mut input) {
                            words.push(word);
                            let get = words.len() == 2 && words[0] == "GET";
                            let info = words.len() == 1 && words[0] == "INFO";
                            let set = words.len() == 3 && words[0] == "SET";
                            if !(get || info || set) {
                                continue;
                            }
                            commands += 1;
                            let key = words.get(1).map_or(vec![], |key| key.to_vec());
                            words.clear();
                            let answer: &[u8] = match () {
                                () if commands.is_multiple_of(refused) => b"-ERR no\r\n",
                                () if info => b"$38\r\nused_cpu_sys:1.5\r\nused_cpu_user:0.25\r\n\r\n",
                                () if get && keys.lock().unwrap().contains(&key) => b"$1\r\nv\r\n",
                                () if get => b"$-1\r\n",
                                () => {
                                    keys.lock().unwrap().insert(key);
                                    b"+OK\r\n"
                                }
                            };
                            output.extend_from_slice(answer);
                        }
                        stream.write_all(&output).await.unwrap();
                    }
                });
            }
        });
        addr
    }

    /// The next word of a command; the lines that tell how many words there are, are passed over.
    fn word(input: &mut BytesMut) -> Option<Bytes> {
        loop {
            let end = input.windows(2).position(|pair| pair == b"\r\n")?;
            if input[0] == b'$' {
                return match take(input).unwrap()? {
                    Reply::Bulk(word) => word,
                    other => panic!("{other:?}"),
                };
            }
            assert_eq!(input[0], b'*');
            input.advance(end + 2);
        }
    }

    fn plan(letter: char, rate: Option<f64>) -> Plan {
        let (warmup, measured) = (std::time::Duration::from_millis(10), std::time::Duration::from_millis(100));
        let workload = Workload::ycsb(letter, 1_500).unwrap();
        Plan { conns: 2, depth: 8, workload, rate, value_bytes: 10, load: true, warmup, measured }
    }

    #[tokio::test]
    async fn the_loop_runs_against_a_server_that_speaks_resp() {
        let addr = fake_server(u64::MAX).await;
        for (letter, rate) in [('a', None), ('c', None), ('d', None), ('f', None), ('f', Some(500.0))] {
            let outcome = run(&addr, 0, &plan(letter, rate)).await.unwrap();
            assert!(outcome.ops > 0 && outcome.errors == 0, "{letter}: {}", outcome.text());
            assert!(rate.is_none() || outcome.ops < 100, "{}", outcome.text());
        }
        assert!(run(&addr, 0, &plan('e', None)).await.is_err(), "it keeps no order");
        assert_eq!(usage(&addr).await.unwrap().cpu_us, [(0, 1_750_000)]);
    }

    #[tokio::test]
    async fn refused_commands_are_counted_and_do_not_end_the_loop() {
        let addr = fake_server(3).await;
        let mut writes = plan('a', None); // nothing needs to be loaded, which would be refused
        writes.workload.mix = Mix { put: 1.0, ..Mix::default() };
        let outcome = run(&addr, 0, &writes).await.unwrap();
        assert!(outcome.ops > 0 && outcome.errors > 0, "{}", outcome.text());
    }
}
