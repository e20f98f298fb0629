//! A load under way: many batches at the same time, in an order that keeps the last row of a key the last. Only puts
//! are sent, and sending one again changes nothing, so here an unknown outcome may be sent again.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time, waits before another try")]

use crate::args::{Format, Global, Output};
use crate::load::{Input, Place};
use crate::outcome::Trouble;
use crate::progress::Progress;
use crate::record::{self, Row};
use bytes::Bytes;
use indicatif::{ProgressBar, ProgressStyle};
use shkv_client::{Client, Error, Keyspace};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io::{IsTerminal, stderr};
use std::time::{Duration, Instant};
use tokio::task::JoinSet;

/// Rows of one batch. It is cut by shard, so each shard gets its share of them in one step.
const BATCH_ROWS: usize = 2_000;
/// Bytes after which a batch is sent with fewer rows. A larger row is sent alone.
const BATCH_BYTES: usize = 1 << 20;
/// Batches in flight.
const IN_FLIGHT_MAX: usize = 8;
/// How often rows whose outcome is not success are sent before the load gives up.
const TRIES_MAX: u32 = 12;
/// First pause before another try; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause before another try.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How often the progress file is written.
const PROGRESS_EVERY: Duration = Duration::from_secs(1);

/// A load under way.
///
/// Invariants: no key is in two batches in flight, so two rows of a key are never written in the wrong order; `at` is
/// behind a line before which every row is acknowledged.
pub struct Loading {
    client: Client,
    keyspace: Keyspace,
    within: Duration,
    gathered: Gathered,
    in_flight: JoinSet<(u64, Result<(), Error>)>,
    in_flight_keys: BTreeSet<Bytes>,
    /// Batches that are sent and not yet counted, in the order of the input; the first has the number `first`.
    sent: VecDeque<Sent>,
    first: u64,
    at: Place,
    rows: u64,
    bar: ProgressBar,
    began: Instant,
    remembered: Instant,
}

/// Rows that wait to be sent together.
#[derive(Default)]
struct Gathered {
    rows: BTreeMap<Bytes, Bytes>,
    bytes: usize,
    lines: u64,
    end: Place,
}

/// A batch that was sent.
struct Sent {
    keys: Vec<Bytes>,
    rows: u64,
    end: Place,
    done: bool,
}

impl Loading {
    /// A load that begins where `input` does.
    pub fn new(client: Client, keyspace: Keyspace, global: &Global, input: &Input) -> Self {
        let now = Instant::now();
        Self {
            client,
            keyspace,
            within: global.timeout,
            gathered: Gathered::default(),
            in_flight: JoinSet::new(),
            in_flight_keys: BTreeSet::new(),
            sent: VecDeque::new(),
            first: 0,
            at: input.start,
            rows: 0,
            bar: bar(global.output, input),
            began: now,
            remembered: now,
        }
    }

    /// The rows that are acknowledged, and the place before which all are.
    pub fn end(self) -> (u64, Place) {
        self.bar.finish_and_clear();
        (self.rows, self.at)
    }

    /// Loads all lines. When one is malformed, all before it are loaded first.
    pub async fn all(&mut self, input: &mut Input) -> Result<(), Trouble> {
        let mut line = Vec::new();
        let mut place = input.start;
        let wrong = loop {
            if let Err(why) = input.line(&mut line) {
                break Some(why);
            }
            if line.is_empty() {
                break None;
            }
            let end = Place { offset: place.offset + line.len() as u64, lines: place.lines + 1 };
            let text = line.strip_suffix(b"\n").unwrap_or(&line);
            if input.format.is_none() && !text.trim_ascii().is_empty() {
                input.format = Some(record::format_of(text));
            }
            match record::parse(input.format.unwrap_or(Format::Jsonl), text).and_then(|row| self.check(row)) {
                Ok(Some(row)) => self.add(row, end).await?,
                Ok(None) => {}
                Err(why) => break Some(why),
            }
            place = end;
            self.remember_now_and_then(input)?;
        };
        self.send().await?;
        while !self.in_flight.is_empty() {
            self.next_done().await?;
        }
        self.at = place;
        let told = |why| format!("line {}: {why}; the {} rows before it are loaded", place.lines + 1, self.rows);
        wrong.map_or(Ok(()), |why| Err(Trouble::Usage(told(why))))
    }

    /// Refuses a row that no shard would take, while its line is known.
    fn check(&self, row: Option<Row>) -> Result<Option<Row>, String> {
        let limits = self.client.limits();
        let Some((key, value)) = &row else { return Ok(None) };
        let over = |what, bytes: usize, limit, max| format!("a {what} of {bytes} bytes is over {limit} = {max}");
        if key.is_empty() {
            return Err("the key is empty".into());
        }
        if key.len() > limits.key_bytes_max as usize {
            return Err(over("key", key.len(), "KEY_BYTES_MAX", limits.key_bytes_max));
        }
        if value.len() > limits.value_bytes_max as usize {
            return Err(over("value", value.len(), "VALUE_BYTES_MAX", limits.value_bytes_max));
        }
        Ok(row)
    }

    async fn add(&mut self, (key, value): Row, end: Place) -> Result<(), Trouble> {
        let bytes = key.len() + value.len();
        if self.gathered.bytes + bytes > BATCH_BYTES {
            self.send().await?;
        }
        self.gathered.rows.insert(key.into(), value.into()); // of two rows of a key in one batch the last counts
        self.gathered.bytes += bytes;
        self.gathered.lines += 1;
        self.gathered.end = end;
        if self.gathered.rows.len() >= BATCH_ROWS {
            self.send().await?;
        }
        Ok(())
    }

    /// Sends what is gathered, as soon as there is room and none of its keys is in flight.
    async fn send(&mut self) -> Result<(), Trouble> {
        let Gathered { rows, lines, end, .. } = std::mem::take(&mut self.gathered);
        if rows.is_empty() {
            return Ok(());
        }
        while self.in_flight.len() >= IN_FLIGHT_MAX || rows.keys().any(|key| self.in_flight_keys.contains(key)) {
            self.next_done().await?;
        }
        let keys: Vec<Bytes> = rows.keys().cloned().collect();
        self.in_flight_keys.extend(keys.iter().cloned());
        let number = self.first + self.sent.len() as u64;
        self.sent.push_back(Sent { keys, rows: lines, end, done: false });
        let (keyspace, within) = (self.keyspace.clone(), self.within);
        self.in_flight.spawn(async move { (number, put_all(&keyspace, rows, within).await) });
        Ok(())
    }

    /// Waits for a batch in flight, and counts those at the front that are done.
    async fn next_done(&mut self) -> Result<(), Trouble> {
        let Some(joined) = self.in_flight.join_next().await else { return Ok(()) };
        let (number, outcome) = joined.map_err(|error| Trouble::Failed(format!("a batch was stopped: {error}")))?;
        outcome?;
        let sent = &mut self.sent[(number - self.first) as usize];
        sent.done = true;
        for key in &sent.keys {
            self.in_flight_keys.remove(key);
        }
        while let Some(sent) = self.sent.pop_front_if(|sent| sent.done) {
            self.first += 1;
            self.rows += sent.rows;
            self.at = sent.end;
        }
        self.bar.set_position(self.at.offset);
        let rate = self.rows as f64 / self.began.elapsed().as_secs_f64().max(1e-6);
        self.bar.set_message(format!("{rate:.0} rows/s"));
        Ok(())
    }

    fn remember_now_and_then(&mut self, input: &Input) -> Result<(), Trouble> {
        if let Some((path, identity)) = &input.progress
            && self.remembered.elapsed() > PROGRESS_EVERY
        {
            self.remembered = Instant::now();
            let progress = Progress::new(identity.clone(), self.at.offset, self.at.lines);
            progress.write(path).map_err(Trouble::Failed)?;
        }
        Ok(())
    }
}

/// Puts all rows: those of each shard in one step, which costs the least, and all shards at the same time.
async fn put_all(keyspace: &Keyspace, rows: BTreeMap<Bytes, Bytes>, within: Duration) -> Result<(), Error> {
    let mut by_shard: BTreeMap<Option<u32>, Vec<(Bytes, Bytes)>> = BTreeMap::new();
    for (key, value) in rows {
        by_shard.entry(keyspace.shard_of(&key)).or_default().push((key, value));
    }
    let mut parts = JoinSet::new();
    for rows in by_shard.into_values() {
        let keyspace = keyspace.clone();
        parts.spawn(async move { put_part(&keyspace, &rows, within).await });
    }
    let mut worst = Ok(());
    while let Some(joined) = parts.join_next().await {
        let done = joined.unwrap_or_else(|error| Err(Error::Unknown { text: error.to_string() }));
        if worst.is_ok() || matches!(done, Err(Error::Refused { .. })) {
            worst = done;
        }
    }
    worst
}

/// Puts rows in one step, again while the outcome is not success, up to [`TRIES_MAX`] times.
async fn put_part(keyspace: &Keyspace, rows: &[(Bytes, Bytes)], within: Duration) -> Result<(), Error> {
    let mut tries = 0;
    loop {
        let done = match rows {
            // A single row may be larger than a batch may be.
            [(key, value)] => keyspace.put(key, value.clone()).deadline(within).await.map(drop),
            rows => {
                let empty = keyspace.batch().deadline(within);
                rows.iter().fold(empty, |batch, (key, value)| batch.put(key, value.clone())).await.map(drop)
            }
        };
        let Err(error) = done else { return Ok(()) };
        tries += 1;
        if matches!(error, Error::Refused { .. }) || tries == TRIES_MAX {
            return Err(error);
        }
        tokio::time::sleep((PAUSE_MIN * (1 << tries.min(8))).min(PAUSE_MAX)).await;
    }
}

/// A bar for a person; nothing for a file or a program.
fn bar(output: Output, input: &Input) -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {bytes} of {total_bytes}, {bytes_per_sec}, {msg}");
    match (input.bytes, style) {
        (Some(bytes), Ok(style)) if output == Output::Text && stderr().is_terminal() => {
            ProgressBar::new(bytes).with_style(style)
        }
        _ => ProgressBar::hidden(),
    }
}
