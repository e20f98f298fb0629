//! What a shard remembers of writes that carry an id, so that one which comes twice is done once. Pure.
//!
//! Two generations keep it small without an order of use: a client that writes is in the young one; when that is full or
//! old, it becomes the old one, and the old one before it is forgotten. Time is the log's own.

use bytes::{BufMut, Bytes, BytesMut};
use serde::{Deserialize, Serialize};
use shkv_proto::message::{BatchDone, WriteDone, WriteId};
use std::collections::{BTreeMap, VecDeque};

/// How long a generation is young, in milliseconds of the log's time: a client is remembered for once to twice that.
pub const GENERATION_MS: u64 = 300_000;
/// Clients and outcomes in one generation.
const WEIGHT_MAX: usize = 16 << 10;
/// Outcomes of one client that has not heard of them: more than a node takes in hand from one connection.
const OUTCOMES_PER_CLIENT_MAX: usize = 4 << 10;
/// What the outcomes of one client may weigh.
const WEIGHT_PER_CLIENT_MAX: usize = WEIGHT_MAX / 2;
/// Bytes of values that count as much as one outcome.
const WEIGHT_BYTES: usize = 64;
/// Bytes of values in an outcome that is kept whole. Of a larger one only that it was done is remembered.
pub const VALUES_BYTES_MAX: usize = 64 << 10;

/// What became of a write.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// A put or a delete was done.
    Write(WriteDone),
    /// A condition did not hold.
    Condition {
        /// The operation.
        operation: u32,
        /// The version that its row had.
        version: Option<u64>,
    },
    /// A batch was done.
    Batch(Box<BatchDone>, Bytes),
    /// A batch was done, and what it read is too much to be remembered.
    Large,
}

impl Outcome {
    fn weight(&self) -> usize {
        match self {
            Self::Write(_) | Self::Condition { .. } | Self::Large => 1,
            Self::Batch(done, values) => {
                1 + (values.len() + 16 * (done.rows.len() + done.revisions.len())) / WEIGHT_BYTES
            }
        }
    }
}

/// What is remembered of one client.
///
/// Invariants: `outcomes` is sorted by sequence, all of them are above `floor`, and `weight` is what they weigh.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
struct Session {
    /// Nothing up to this sequence is remembered.
    floor: u64,
    outcomes: VecDeque<(u64, Outcome)>,
    weight: usize,
}

impl Session {
    /// With the client itself.
    fn weight(&self) -> usize {
        1 + self.weight
    }

    fn position(&self, sequence: u64) -> Result<usize, usize> {
        // Most writes are the newest of their client.
        match self.outcomes.back() {
            Some((last, _)) if *last >= sequence => self.outcomes.binary_search_by_key(&sequence, |(at, _)| *at),
            _ => Err(self.outcomes.len()),
        }
    }

    /// Forgets what lies at or below `floor`; tells what it weighed.
    fn raise(&mut self, floor: u64) -> usize {
        self.floor = self.floor.max(floor);
        let mut weight = 0;
        while self.outcomes.front().is_some_and(|(sequence, _)| *sequence <= self.floor) {
            weight += self.outcomes.pop_front().map_or(0, |(_, outcome)| outcome.weight());
        }
        self.weight -= weight;
        weight
    }
}

/// What is known of a write that has come.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Known {
    /// It was not done.
    New,
    /// It has come before, and this became of it.
    Outcome(Outcome),
    /// It may have been done: it is older than what is remembered.
    Forgotten,
}

/// The clients of a shard.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Sessions {
    young: BTreeMap<u64, Session>,
    old: BTreeMap<u64, Session>,
    /// Of the young ones.
    weight: usize,
    /// When the young generation began.
    turned: u64,
    /// Up to when clients may have been forgotten as a whole, if any were.
    horizon: Option<u64>,
}

impl Sessions {
    /// What is known of a write, at `time` of the log. What its client has heard of is forgotten.
    pub fn begin(&mut self, id: &WriteId, time: u64) -> Known {
        self.turn_if_due(time);
        let horizon = self.horizon;
        // A write that is sent again may have been done, and forgotten with its client, if it was sent first before that.
        let may_be_forgotten = move || {
            horizon.is_some_and(|horizon| id.age_ms > 0 && u64::from(id.age_ms) >= time.saturating_sub(horizon))
        };
        if !self.young.contains_key(&id.client) {
            match self.old.remove(&id.client) {
                Some(session) => {
                    self.weight += session.weight();
                    self.young.insert(id.client, session);
                }
                // A client that nothing is noted of afterwards is not kept.
                None if may_be_forgotten() => return Known::Forgotten,
                None => return Known::New,
            }
        }
        let Some(session) = self.young.get_mut(&id.client) else { return Known::New };
        self.weight -= session.raise(id.answered);
        match session.position(id.sequence) {
            Ok(at) => Known::Outcome(session.outcomes[at].1.clone()),
            Err(_) if id.sequence <= session.floor || may_be_forgotten() => Known::Forgotten,
            Err(_) => Known::New,
        }
    }

    /// What is known of a write, without taking note that it has come.
    pub fn look(&self, id: &WriteId) -> Option<&Outcome> {
        let session = self.young.get(&id.client).or_else(|| self.old.get(&id.client))?;
        session.position(id.sequence).ok().map(|at| &session.outcomes[at].1)
    }

    /// Remembers what became of a write that was [`Known::New`].
    pub fn note(&mut self, id: &WriteId, outcome: Outcome) {
        let outcome = match outcome {
            Outcome::Batch(_, values) if values.len() > VALUES_BYTES_MAX => Outcome::Large,
            outcome => outcome,
        };
        let weight = &mut self.weight;
        let session = self.young.entry(id.client).or_insert_with(|| {
            *weight += 1;
            Session { floor: id.answered, ..Session::default() }
        });
        if let Err(at) = session.position(id.sequence) {
            *weight += outcome.weight();
            session.weight += outcome.weight();
            session.outcomes.insert(at, (id.sequence, outcome));
        }
        while (session.outcomes.len() > OUTCOMES_PER_CLIENT_MAX || session.weight > WEIGHT_PER_CLIENT_MAX)
            && let Some((lowest, _)) = session.outcomes.front()
        {
            let lowest = *lowest;
            *weight -= session.raise(lowest);
        }
    }

    /// Completes the outcome of a batch, if it is still remembered.
    pub fn complete(&mut self, client: u64, sequence: u64, with: impl FnOnce(&mut BatchDone)) {
        for (generation, is_young) in [(&mut self.young, true), (&mut self.old, false)] {
            let Some(session) = generation.get_mut(&client) else { continue };
            let Ok(at) = session.position(sequence) else { continue };
            let outcome = &mut session.outcomes[at].1;
            let before = outcome.weight();
            if let Outcome::Batch(done, _) = outcome {
                with(done);
            }
            let after = outcome.weight();
            session.weight = session.weight + after - before;
            if is_young {
                self.weight = self.weight + after - before;
            }
            return;
        }
    }

    fn turn_if_due(&mut self, time: u64) {
        if self.weight <= WEIGHT_MAX && time.saturating_sub(self.turned) < GENERATION_MS {
            return;
        }
        // Whoever is dropped here wrote last before the young generation began.
        if !self.old.is_empty() {
            self.horizon = Some(self.turned);
        }
        self.old = std::mem::take(&mut self.young);
        self.weight = 0;
        self.turned = time;
    }

    /// All of it as records to be kept; [`Sessions::read`] takes them back.
    pub fn write(&self, mut put: impl FnMut(&Record, &[u8])) {
        put(&Record::Times(self.turned, self.horizon), b"");
        for (generation, is_young) in [(&self.young, true), (&self.old, false)] {
            for (client, session) in generation {
                let mut values = BytesMut::new();
                let outcomes = session.outcomes.iter().map(|(sequence, outcome)| {
                    let kept = match outcome {
                        Outcome::Write(done) => Kept::Write(*done),
                        Outcome::Condition { operation, version } => Kept::Condition(*operation, *version),
                        Outcome::Batch(done, bytes) => {
                            values.put_slice(bytes);
                            Kept::Batch((**done).clone(), bytes.len() as u32)
                        }
                        Outcome::Large => Kept::Large,
                    };
                    (*sequence, kept)
                });
                let outcomes = outcomes.collect();
                put(&Record::Session { client: *client, is_young, floor: session.floor, outcomes }, &values);
            }
        }
    }

    /// Takes a record back. `None` if it cannot be one.
    pub fn read(&mut self, record: Record, mut values: &[u8]) -> Option<()> {
        match record {
            Record::Times(turned, horizon) => (self.turned, self.horizon) = (turned, horizon),
            Record::Session { client, is_young, floor, outcomes } => {
                let mut session = Session { floor, outcomes: VecDeque::with_capacity(outcomes.len()), weight: 0 };
                for (sequence, kept) in outcomes {
                    let outcome = match kept {
                        Kept::Write(done) => Outcome::Write(done),
                        Kept::Condition(operation, version) => Outcome::Condition { operation, version },
                        Kept::Batch(done, bytes) => {
                            let (own, others) = values.split_at_checked(bytes as usize)?;
                            values = others;
                            Outcome::Batch(Box::new(done), Bytes::copy_from_slice(own))
                        }
                        Kept::Large => Outcome::Large,
                    };
                    session.weight += outcome.weight();
                    session.outcomes.push_back((sequence, outcome));
                }
                if is_young {
                    self.weight += session.weight();
                    self.young.insert(client, session);
                } else {
                    self.old.insert(client, session);
                }
            }
        }
        Some(())
    }

    /// Clients and outcomes that are remembered.
    #[cfg(test)]
    pub fn len(&self) -> usize {
        let all = self.young.values().chain(self.old.values());
        all.map(|session| 1 + session.outcomes.len()).sum()
    }
}

/// How it is kept.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Record {
    /// When the young generation began, and up to when clients were forgotten.
    Times(u64, Option<u64>),
    /// A client.
    Session {
        /// Which.
        client: u64,
        /// In which generation.
        is_young: bool,
        /// Nothing up to this sequence is remembered.
        floor: u64,
        /// By sequence.
        outcomes: Vec<(u64, Kept)>,
    },
}

/// How an outcome is kept: the values of batches lie behind the record.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Kept {
    /// As [`Outcome::Write`].
    Write(WriteDone),
    /// As [`Outcome::Condition`].
    Condition(u32, Option<u64>),
    /// As [`Outcome::Batch`], with the bytes of its values.
    Batch(BatchDone, u32),
    /// As [`Outcome::Large`].
    Large,
}
