//! Whether operations that overlapped in time can be put into one order that a model allows and real time does not forbid.
//!
//! The search is that of Wing and Gong ("Testing and verifying concurrent objects", 1993) with the memory of Lowe
//! ("Testing for linearizability", 2016): a set of operations done together with the state that they led to is tried
//! once. An operation whose outcome is unknown may be put anywhere behind its call, or left out. Where the same was
//! reached with fewer of those, nothing is gained by going on: the others could still be put in.

use std::collections::BTreeMap;
use std::fmt::Debug;

/// Configurations tried before the search gives up.
const TRIED_MAX: usize = 2_000_000;

/// What operations do.
pub trait Model {
    /// An operation together with its outcome.
    type Op: Debug;
    /// What there is between two operations.
    type State: Clone + Ord + Debug;

    /// What there is before all of them.
    fn start(&self) -> Self::State;

    /// What there is after `op`; `None` if it cannot have this outcome here.
    fn step(&self, state: &Self::State, op: &Self::Op) -> Option<Self::State>;
}

/// An operation with its time, in any unit that orders calls and returns.
#[derive(Clone, Debug)]
pub struct Event<Op> {
    /// What was asked, and what became of it.
    pub op: Op,
    /// When it was called.
    pub from: u64,
    /// When it returned; `None` if its outcome is unknown: it may take effect at any later time, or never.
    pub until: Option<u64>,
}

/// What the search found.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Verdict {
    /// There is such an order.
    Right,
    /// There is none. The text says how far the best attempt came.
    Wrong(String),
    /// It was not found out. Whoever asked takes it for a failure: a judge that was fooled is none.
    Undecided,
}

impl Verdict {
    /// Whether an order was found.
    #[must_use]
    pub fn is_right(&self) -> bool {
        *self == Self::Right
    }
}

/// Operations, as bits.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord)]
struct Set(Vec<u64>);

impl Set {
    fn empty(bits: usize) -> Self {
        Self(vec![0; bits.div_ceil(64)])
    }

    fn has(&self, at: usize) -> bool {
        self.0[at / 64] & (1 << (at % 64)) != 0
    }

    fn flip(&mut self, at: usize) {
        self.0[at / 64] ^= 1 << (at % 64);
    }

    fn is_within(&self, other: &Self) -> bool {
        self.0.iter().zip(&other.0).all(|(ours, theirs)| ours & !theirs == 0)
    }
}

/// What is done: operations of known outcome, of which none may be left out in the end, and others.
struct Done<'a, Op> {
    order: Vec<&'a Event<Op>>,
    known: Set,
    unknown: Set,
    missing: usize,
}

impl<Op> Done<'_, Op> {
    fn is_known(&self, at: usize) -> bool {
        self.order[at].until.is_some()
    }

    fn add(&mut self, at: usize) {
        if self.is_known(at) {
            self.known.flip(at);
            self.missing -= 1;
        } else {
            self.unknown.flip(at);
        }
    }

    fn take_back(&mut self, at: usize) {
        if self.is_known(at) {
            self.known.flip(at);
            self.missing += 1;
        } else {
            self.unknown.flip(at);
        }
    }

    /// What may be next: whatever is not done, and was called before anything that is not done has returned. Operations
    /// of known outcome come first, because they must be placed.
    fn candidates(&self) -> Vec<usize> {
        let mut first_return = u64::MAX;
        let mut found = Vec::new();
        for (at, event) in self.order.iter().enumerate() {
            if event.from > first_return {
                break;
            }
            if !self.known.has(at) && !self.unknown.has(at) {
                first_return = first_return.min(event.until.unwrap_or(u64::MAX));
                found.push(at);
            }
        }
        found.retain(|at| self.order[*at].from <= first_return);
        found.sort_by_key(|at| self.order[*at].until.unwrap_or(u64::MAX));
        found
    }
}

/// What was tried: for what is known and the state that it led to, the sets of others that were put in.
struct Seen<S> {
    tried: BTreeMap<(Set, S), Vec<Set>>,
    count: usize,
}

impl<S: Ord> Seen<S> {
    /// Notes a configuration. `false` if it, or one with fewer others put in, was tried before.
    fn add<Op>(&mut self, done: &Done<'_, Op>, state: S) -> bool {
        let tried = self.tried.entry((done.known.clone(), state)).or_default();
        let is_new = !tried.iter().any(|unknown| unknown.is_within(&done.unknown));
        if is_new {
            self.count += 1;
            tried.push(done.unknown.clone());
        }
        is_new
    }
}

/// A choice of the search: the state in which it was made, what could be next there, and which of it is being tried.
struct Choice<S> {
    state: S,
    candidates: Vec<usize>,
    tried: usize,
}

/// Searches for an order.
#[must_use]
pub fn search<M: Model>(model: &M, events: &[Event<M::Op>]) -> Verdict {
    let mut order: Vec<&Event<M::Op>> = events.iter().collect();
    order.sort_by_key(|event| (event.from, event.until.unwrap_or(u64::MAX)));
    let (known, unknown) = (Set::empty(order.len()), Set::empty(order.len()));
    let missing = order.iter().filter(|event| event.until.is_some()).count();
    let mut done = Done { order, known, unknown, missing };
    let mut seen = Seen { tried: BTreeMap::new(), count: 0 };
    let (mut best, mut best_text) = (usize::MAX, String::new());
    let mut path = vec![Choice { candidates: done.candidates(), state: model.start(), tried: 0 }];
    while done.missing > 0 {
        let Some(choice) = path.last_mut() else { return Verdict::Wrong(best_text) };
        if done.missing < best {
            best = done.missing;
            let next: Vec<_> = choice.candidates.iter().map(|at| done.order[*at]).collect();
            best_text = format!("{best} operations cannot follow on {:?}; next could be {next:?}", choice.state);
        }
        let Some(at) = choice.candidates.get(choice.tried).copied() else {
            path.pop();
            if let Some(before) = path.last_mut() {
                done.take_back(before.candidates[before.tried]);
                before.tried += 1;
            }
            continue;
        };
        let next = model.step(&choice.state, &done.order[at].op);
        done.add(at);
        match next {
            Some(next) if seen.add(&done, next.clone()) => {
                path.push(Choice { candidates: done.candidates(), state: next, tried: 0 });
            }
            Some(_) | None => {
                done.take_back(at);
                choice.tried += 1;
            }
        }
        if seen.count > TRIED_MAX {
            return Verdict::Undecided;
        }
    }
    Verdict::Right
}
