//! Is one row linearizable? Get, put, delete and compare-and-set with the versions that the store told.
//!
//! Keys are independent of each other, so a history over many keys is judged key by key (linearizability is local:
//! Herlihy and Wing, 1990). Values are numbers, and the workload writes each only once.

use super::search::{Event, Model, Verdict, search};

/// On what a write depends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// Nothing.
    Always,
    /// There is no row.
    Absent,
    /// There is one.
    Present,
    /// The row has this version.
    Version(u64),
    /// The row has this value.
    Value(u64),
}

/// What was asked, and what was answered; a write whose answer is `None` has an unknown outcome.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// The row that was found: value and version.
    Get(Option<(u64, u64)>),
    /// A put.
    Put(u64, Condition, Option<Written>),
    /// A delete.
    Delete(Condition, Option<Written>),
}

/// The answer to a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Written {
    /// Done: the version, and whether there was a row before if that was told.
    Done(u64, Option<bool>),
    /// The condition did not hold: the version that the row had, `None` if there was no row.
    Refused(Option<u64>),
}

/// What is known of the version of a row's last change.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Version {
    /// It was told.
    Exactly(u64),
    /// It was not told, and is no less than this.
    AtLeast(u64),
}

impl Version {
    fn least(self) -> u64 {
        match self {
            Self::Exactly(version) | Self::AtLeast(version) => version,
        }
    }

    fn can_be(self, version: u64) -> bool {
        match self {
            Self::Exactly(exactly) => exactly == version,
            Self::AtLeast(least) => least <= version,
        }
    }
}

/// A row, or where one was.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct State {
    /// The value, if there is a row.
    pub value: Option<u64>,
    /// The version of the last change.
    pub version: Version,
}

/// One row that begins absent.
#[derive(Clone, Copy, Debug)]
pub struct Register;

impl Model for Register {
    type Op = Op;
    type State = State;

    fn start(&self) -> State {
        State { value: None, version: Version::Exactly(0) }
    }

    fn step(&self, state: &State, op: &Op) -> Option<State> {
        match *op {
            Op::Get(None) => state.value.is_none().then_some(*state),
            Op::Get(Some((value, version))) => {
                let fits = state.value == Some(value) && state.version.can_be(version);
                fits.then_some(State { version: Version::Exactly(version), ..*state })
            }
            Op::Put(value, condition, answer) => write(state, Some(value), condition, answer),
            Op::Delete(condition, answer) => write(state, None, condition, answer),
        }
    }
}

fn write(state: &State, value: Option<u64>, condition: Condition, answer: Option<Written>) -> Option<State> {
    // A put always gets a version of its own; a delete that finds nothing may change nothing.
    let least = state.version.least() + u64::from(value.is_some());
    match answer {
        Some(Written::Refused(found)) => {
            let known = pinned(state, found)?;
            holds(&known, condition).is_none().then_some(known)
        }
        Some(Written::Done(version, existed)) => {
            holds(state, condition)?;
            let fits = version >= least && existed.is_none_or(|existed| existed == state.value.is_some());
            fits.then_some(State { value, version: Version::Exactly(version) })
        }
        // A write that would be refused changes nothing: it is as if it was left out.
        // Of several in a row it is not counted how many there were: they would all have to be told apart.
        None => holds(state, condition).map(|_| match state.version {
            Version::Exactly(_) => State { value, version: Version::AtLeast(least) },
            Version::AtLeast(_) => State { value, ..*state },
        }),
    }
}

/// The state, if the condition can hold in it.
fn holds(state: &State, condition: Condition) -> Option<State> {
    let holds = match condition {
        Condition::Always => true,
        Condition::Absent => state.value.is_none(),
        Condition::Present => state.value.is_some(),
        Condition::Version(version) => state.value.is_some() && state.version.can_be(version),
        Condition::Value(value) => state.value == Some(value),
    };
    holds.then_some(*state)
}

/// The state, if the row can have the version that a refusal told.
fn pinned(state: &State, found: Option<u64>) -> Option<State> {
    match (state.value, found) {
        (None, None) => Some(*state),
        (Some(_), Some(version)) if state.version.can_be(version) => {
            Some(State { version: Version::Exactly(version), ..*state })
        }
        (None, Some(_)) | (Some(_), _) => None,
    }
}

/// Judges the history of one key.
#[must_use]
pub fn judge(events: &[Event<Op>]) -> Verdict {
    search(&Register, events)
}
