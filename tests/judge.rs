//! The judges are judged: each must find the violations that are planted here, and let pass what is right. The search is
//! compared with stateright's tester of linearizability, which is another implementation, over random small histories.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_tests::judge::audit::Audit;
use shkv_tests::judge::bank::{self, Bank};
use shkv_tests::judge::counter::{self, Increments};
use shkv_tests::judge::leadership::Leadership;
use shkv_tests::judge::progress::Progress;
use shkv_tests::judge::register::{self, Condition, Op, Written};
use shkv_tests::judge::removal::Removal;
use shkv_tests::judge::replicas;
use shkv_tests::judge::scan::{self, Scanned};
use shkv_tests::judge::search::{Event, Verdict};
use shkv_tests::judge::single;
use stateright::semantics::{ConsistencyTester, LinearizabilityTester, SequentialSpec};
use std::collections::BTreeMap;

const HISTORIES: u64 = 20_000;

fn event<O>(op: O, from: u64, until: u64) -> Event<O> {
    Event { op, from, until: Some(until) }
}

fn lost<O>(op: O, from: u64) -> Event<O> {
    Event { op, from, until: None }
}

fn put(value: u64, version: u64) -> Op {
    Op::Put(value, Condition::Always, Some(Written::Done(version, None)))
}

fn is_wrong(verdict: &Verdict) -> bool {
    matches!(verdict, Verdict::Wrong(_))
}

// ---------------------------------------------------------------------------------------------- another implementation

/// A row as the other implementation has it. It tells apart less than ours: an unknown version is any.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
struct Row {
    value: Option<u64>,
    last: u64,
    is_told: bool,
}

/// An operation, without and with its answer.
#[derive(Clone, PartialEq, Eq, Debug)]
struct Asked(Op);

impl Row {
    fn version_fits(&self, version: u64) -> bool {
        if self.is_told { version == self.last } else { version >= self.last }
    }

    fn takes(&mut self, condition: Condition) -> bool {
        match condition {
            Condition::Always => true,
            Condition::Absent => self.value.is_none(),
            Condition::Present => self.value.is_some(),
            Condition::Version(wanted) => self.value.is_some() && self.version_fits(wanted),
            Condition::Value(wanted) => self.value == Some(wanted),
        }
    }

    fn change(&mut self, value: Option<u64>, condition: Condition, answer: Written) -> bool {
        match answer {
            Written::Refused(found) => {
                if found.is_some() != self.value.is_some() || found.is_some_and(|version| !self.version_fits(version)) {
                    return false;
                }
                if let Some(version) = found {
                    (self.last, self.is_told) = (version, true);
                }
                !self.takes(condition)
            }
            Written::Done(version, existed) => {
                let grows = if value.is_some() { version > self.last } else { version >= self.last };
                if !self.takes(condition) || !grows || existed.is_some_and(|existed| existed != self.value.is_some()) {
                    return false;
                }
                *self = Self { value, last: version, is_told: true };
                true
            }
        }
    }
}

impl SequentialSpec for Row {
    type Op = Asked;
    type Ret = Asked;

    /// Only what never returned is asked this way: it takes effect if it can.
    fn invoke(&mut self, op: &Asked) -> Asked {
        match op.0 {
            Op::Get(_) => {}
            Op::Put(value, condition, _) => {
                if self.takes(condition) {
                    *self = Self { value: Some(value), last: self.last + u64::from(self.is_told), is_told: false };
                }
            }
            Op::Delete(condition, _) => {
                if self.takes(condition) {
                    *self = Self { value: None, last: self.last, is_told: false };
                }
            }
        }
        op.clone()
    }

    fn is_valid_step(&mut self, _: &Asked, answer: &Asked) -> bool {
        match answer.0 {
            Op::Get(None) => self.value.is_none(),
            Op::Get(Some((value, version))) => {
                let fits = self.value == Some(value) && self.version_fits(version);
                (self.last, self.is_told) = (version, true);
                fits
            }
            Op::Put(value, condition, Some(answer)) => self.change(Some(value), condition, answer),
            Op::Delete(condition, Some(answer)) => self.change(None, condition, answer),
            Op::Put(_, _, None) | Op::Delete(_, None) => false,
        }
    }
}

/// What the other implementation says.
fn oracle(events: &[Event<Op>]) -> bool {
    let row = Row { value: None, last: 0, is_told: true };
    let mut tester = LinearizabilityTester::new(row);
    let mut moments = Vec::new();
    for (thread, event) in events.iter().enumerate() {
        moments.push((event.from, false, thread)); // at one moment, calls come first: ours lets them overlap
        moments.extend(event.until.map(|until| (until, true, thread)));
    }
    moments.sort_unstable();
    for (_, is_return, thread) in moments {
        // Each operation is a thread of its own: that they overlap is all that matters.
        let op = Asked(events[thread].op);
        let told =
            if is_return { tester.on_return(thread, op).map(drop) } else { tester.on_invoke(thread, op).map(drop) };
        told.expect("calls come before returns");
    }
    tester.is_consistent()
}

/// A history of a register that works, some of whose answers are lost; every other one is then damaged.
fn history(seed: u64) -> Vec<Event<Op>> {
    let mut rng = SmallRng::seed_from_u64(seed);
    let (mut events, mut value, mut version, mut now) = (Vec::new(), None::<(u64, u64)>, 0_u64, 0_u64);
    let mut busy_until = [0_u64; 3];
    for number in 1..=rng.random_range(2..=7) {
        // The moment at which it takes effect lies between call and return; the next may have been called before that.
        now += rng.random_range(2..6);
        let client = rng.random_range(0..busy_until.len());
        let from = now - rng.random_range(0..now.saturating_sub(busy_until[client]).clamp(1, 12).min(now));
        let mut until = Some(now + rng.random_range(1..9));
        let condition = match rng.random_range(0..8) {
            0 => Condition::Absent,
            1 => Condition::Present,
            2 => Condition::Version(value.map_or(version, |(_, version)| version)),
            3 => Condition::Value(value.map_or(1, |(value, _)| value)),
            _ => Condition::Always,
        };
        let holds = match condition {
            Condition::Always => true,
            Condition::Absent => value.is_none(),
            Condition::Present | Condition::Version(_) | Condition::Value(_) => value.is_some(),
        };
        let is_lost = rng.random_bool(0.2);
        let refused = Written::Refused(value.map(|(_, version)| version));
        let op = match rng.random_range(0..5) {
            0 | 1 => Op::Get(value),
            2 | 3 => {
                let mut answer = refused;
                if holds && !(is_lost && rng.random_bool(0.5)) {
                    version += rng.random_range(1..3);
                    value = Some((number, version));
                    answer = Written::Done(version, None);
                }
                Op::Put(number, condition, (!is_lost).then_some(answer))
            }
            _ => {
                let mut answer = refused;
                if holds && !(is_lost && rng.random_bool(0.5)) {
                    version += u64::from(value.is_some());
                    answer = Written::Done(version, Some(value.is_some()));
                    value = None;
                }
                Op::Delete(condition, (!is_lost).then_some(answer))
            }
        };
        if matches!(op, Op::Put(_, _, None) | Op::Delete(_, None)) {
            until = None;
        }
        busy_until[client] = until.unwrap_or(now);
        events.push(Event { op, from, until });
    }
    if seed.is_multiple_of(2) {
        let at = rng.random_range(0..events.len());
        let other = events[rng.random_range(0..events.len())].clone();
        match &mut events[at].op {
            Op::Get(found) => {
                *found = match rng.random_range(0..3) {
                    0 => None,
                    1 => Some((rng.random_range(1..8), version)),
                    _ => found.map(|(value, version)| (value, version + 1)),
                }
            }
            Op::Put(_, _, Some(Written::Done(version, _))) => *version = rng.random_range(0..4),
            Op::Put(_, _, answer) | Op::Delete(_, answer) => {
                if answer.is_some() {
                    *answer = Some(Written::Refused(rng.random_bool(0.5).then_some(version)));
                }
            }
        }
        if rng.random_bool(0.5) {
            events[at].from = other.from;
            events[at].until = events[at].until.map(|_| other.from + 1);
        }
    }
    events
}

#[test]
fn the_search_agrees_with_another_implementation() {
    let (mut right, mut wrong) = (0, 0);
    for seed in 0..HISTORIES {
        let events = history(seed);
        let ours = register::judge(&events);
        let theirs = oracle(&events);
        assert_eq!(ours.is_right(), theirs, "history {seed}: {ours:?}\n{events:#?}");
        assert_ne!(ours, Verdict::Undecided);
        *if theirs { &mut right } else { &mut wrong } += 1;
        assert!(theirs || seed.is_multiple_of(2), "history {seed} was not damaged and is refused: {events:#?}");
    }
    assert!(right > HISTORIES / 4 && wrong > HISTORIES / 8, "{right} right and {wrong} wrong ones: too one-sided");
}

// ---------------------------------------------------------------------------------------------- registers

#[test]
fn a_row_that_is_right_passes() {
    let events = [
        event(put(1, 5), 0, 10),
        event(Op::Get(Some((1, 5))), 5, 20),
        lost(Op::Put(2, Condition::Version(5), None), 15),
        event(Op::Get(Some((1, 5))), 30, 40),
        event(Op::Get(Some((2, 9))), 50, 60), // the write of unknown outcome was done after all
        event(Op::Put(3, Condition::Version(5), Some(Written::Refused(Some(9)))), 70, 80),
        event(Op::Delete(Condition::Value(2), Some(Written::Done(10, Some(true)))), 90, 100),
        event(Op::Get(None), 110, 120),
        lost(Op::Put(4, Condition::Always, None), 115), // never done
    ];
    assert_eq!(register::judge(&events), Verdict::Right);
}

#[test]
fn each_violation_of_a_row_is_found() {
    let base = || vec![event(put(1, 5), 0, 10), event(put(2, 6), 20, 30)];
    let violations = [
        ("a stale read", vec![event(Op::Get(Some((1, 5))), 40, 50)]),
        ("a lost write", vec![event(Op::Get(None), 40, 50)]),
        ("a value that nobody wrote", vec![event(Op::Get(Some((7, 6))), 40, 50)]),
        ("another version than was told", vec![event(Op::Get(Some((2, 7))), 40, 50)]),
        ("a version given twice", vec![event(put(3, 6), 40, 50)]),
        ("a version that goes back", vec![event(put(3, 4), 40, 50)]),
        ("a read from the future", vec![event(Op::Get(Some((3, 7))), 40, 50), event(put(3, 7), 60, 70)]),
        (
            "two that both exchanged the same version",
            [3, 4].map(|v| event(Op::Put(v, Condition::Version(6), Some(Written::Done(4 + v, None))), 40, 50)).to_vec(),
        ),
        (
            "an exchange that was refused although its condition held",
            vec![event(Op::Put(3, Condition::Version(6), Some(Written::Refused(Some(6)))), 40, 50)],
        ),
        (
            "a delete that found nothing where there was a row",
            vec![event(Op::Delete(Condition::Always, Some(Written::Done(7, Some(false)))), 40, 50)],
        ),
        (
            "a deleted row that comes back",
            vec![
                event(Op::Delete(Condition::Always, Some(Written::Done(7, Some(true)))), 40, 50),
                event(Op::Get(Some((2, 6))), 60, 70),
            ],
        ),
        (
            "an unknown write that was done, undone and done again",
            vec![
                lost(Op::Put(3, Condition::Always, None), 40),
                event(Op::Get(Some((3, 7))), 50, 60),
                event(Op::Get(Some((2, 6))), 70, 80),
            ],
        ),
        (
            "a write applied twice",
            vec![
                lost(Op::Put(3, Condition::Always, None), 40),
                event(Op::Get(Some((3, 7))), 50, 60),
                event(put(4, 8), 70, 80),
                event(Op::Get(Some((3, 9))), 90, 100),
            ],
        ),
    ];
    for (what, more) in violations {
        let events: Vec<_> = base().into_iter().chain(more).collect();
        assert!(is_wrong(&register::judge(&events)), "{what} is not found");
    }
    assert_eq!(register::judge(&base()), Verdict::Right);
}

#[test]
fn long_histories_with_many_unknown_writes_are_decided() {
    let mut events = Vec::new();
    let mut version = 0;
    for round in 0..200 {
        let at = round * 100;
        version += 2;
        events.push(event(put(3 * round, version), at, at + 60));
        events.push(lost(Op::Put(3 * round + 1, Condition::Version(version), None), at + 10));
        events.push(event(Op::Get(Some((3 * round, version))), at + 70, at + 90));
    }
    assert_eq!(register::judge(&events), Verdict::Right);
    events.push(event(Op::Get(Some((0, 2))), 30_000, 30_001));
    assert!(is_wrong(&register::judge(&events)));
}

// ---------------------------------------------------------------------------------------------- the others

#[test]
fn a_bank_keeps_its_sum_and_no_transfer_is_half_done() {
    use bank::Op::{Read, Transfer};
    let bank = Bank(vec![10, 10, 10]);
    let transfer = |from, to, amount, done| Transfer { from, to, amount, done };
    let right = vec![
        event(transfer(0, 1, 4, Some(true)), 0, 50),
        event(Read(vec![(0, 10), (1, 10), (2, 10)]), 10, 20),
        lost(transfer(1, 2, 14, None), 30),
        event(transfer(0, 2, 7, Some(false)), 60, 70),
        event(Read(vec![(1, 14)]), 80, 90),
        event(Read(vec![(0, 6), (1, 0), (2, 24)]), 100, 110),
    ];
    assert_eq!(bank::judge(&bank, &right), Verdict::Right);
    let half = event(Read(vec![(0, 6), (1, 10), (2, 10)]), 10, 20);
    let skewed = event(Read(vec![(0, 6), (1, 10)]), 120, 130);
    let back_again = event(Read(vec![(1, 14), (2, 10)]), 120, 130);
    let overdrawn = event(transfer(1, 0, 1, Some(true)), 120, 130);
    let wrongly_refused = event(transfer(2, 0, 24, Some(false)), 120, 130);
    for wrong in [half, skewed, back_again, overdrawn, wrongly_refused] {
        let events: Vec<_> = right.iter().cloned().chain([wrong.clone()]).collect();
        assert!(is_wrong(&bank::judge(&bank, &events)), "{wrong:?} is not found");
    }
}

#[test]
fn an_increment_counts_once() {
    let increments = Increments { done: 5, unknown: 2 };
    for found in 0..10 {
        assert_eq!(counter::judge(increments, found).is_right(), (5..=7).contains(&found), "{found}");
    }
}

#[test]
fn a_scan_out_of_order_or_bounds_is_found_and_its_gaps_are_reads() {
    let rows = vec![(2, 20, 1), (3, 30, 2), (5, 50, 3)];
    let good = Scanned { start: 2, end: 6, reverse: false, rows, from: 100, until: 200 };
    assert_eq!(scan::judge(&good), Verdict::Right);
    let backwards = Scanned { rows: good.rows.iter().rev().copied().collect(), ..good.clone() };
    assert!(is_wrong(&scan::judge(&backwards)));
    assert_eq!(scan::judge(&Scanned { reverse: true, ..backwards }), Verdict::Right);
    assert!(is_wrong(&scan::judge(&Scanned { end: 5, ..good.clone() })), "beyond its end");
    assert!(is_wrong(&scan::judge(&Scanned { start: 3, ..good.clone() })), "before its start");
    let twice = Scanned { rows: vec![(2, 20, 1), (2, 20, 1)], ..good.clone() };
    assert!(is_wrong(&scan::judge(&twice)), "a row twice");
    let reads: Vec<_> = scan::reads(&good, [1, 2, 4, 6].iter()).map(|(key, event)| (*key, event.op)).collect();
    assert_eq!(reads, [(2, Op::Get(Some((20, 1)))), (4, Op::Get(None))]);
}

#[test]
fn an_audit_finds_what_is_lost_changed_or_made_up() {
    let mut audit = Audit::default();
    audit.acknowledged("a", "1");
    audit.acknowledged("b", "2");
    audit.unknown("c", "3");
    let found = |rows: &[(&str, &str)]| -> BTreeMap<Vec<u8>, Vec<u8>> {
        rows.iter().map(|(key, value)| (key.as_bytes().to_vec(), value.as_bytes().to_vec())).collect()
    };
    assert_eq!(audit.judge(&found(&[("a", "1"), ("b", "2")])), Verdict::Right);
    assert_eq!(audit.judge(&found(&[("a", "1"), ("b", "2"), ("c", "3")])), Verdict::Right);
    assert!(is_wrong(&audit.judge(&found(&[("a", "1")]))), "lost");
    assert!(is_wrong(&audit.judge(&found(&[("a", "1"), ("b", "x")]))), "changed");
    assert!(is_wrong(&audit.judge(&found(&[("a", "1"), ("b", "2"), ("c", "x")]))), "changed on its way");
    assert!(is_wrong(&audit.judge(&found(&[("a", "1"), ("b", "2"), ("d", "4")]))), "made up");
}

#[test]
fn invariants_that_are_broken_are_found() {
    let mut leadership = Leadership::default();
    assert!(leadership.leads(1, 7, 2).is_right());
    assert!(leadership.leads(1, 7, 2).is_right());
    assert!(leadership.leads(1, 8, 3).is_right());
    assert!(leadership.leads(2, 7, 3).is_right());
    assert!(is_wrong(&leadership.leads(1, 7, 3)));

    let mut progress = Progress::new();
    assert!(progress.seen(&"commit", 5).is_right());
    assert!(progress.seen(&"commit", 5).is_right());
    assert!(progress.seen(&"epoch", 1).is_right());
    assert!(is_wrong(&progress.seen(&"commit", 4)));
    progress.forget(|of| *of == "commit");
    assert!(progress.seen(&"commit", 1).is_right());

    let mut removal = Removal::default();
    assert!(removal.answered(4, 100).is_right());
    removal.gone(4, 10);
    removal.gone(4, 20);
    assert!(removal.answered(4, 10).is_right(), "what came to it before is still its own");
    assert!(is_wrong(&removal.answered(4, 11)));
    assert!(removal.answered(5, 11).is_right());

    assert!(single::judge(&[vec![2], vec![0]]).is_right());
    assert!(is_wrong(&single::judge(&[vec![2], vec![0, 2]])));
    assert!(is_wrong(&single::judge(&[vec![], vec![0]])));

    let replicas = |second: Vec<u8>| replicas::judge(&[("a".into(), vec![1, 2]), ("b".into(), second)]);
    assert!(replicas(vec![1, 2]).is_right());
    for other in [vec![1], vec![1, 3], vec![1, 2, 3], vec![]] {
        assert!(is_wrong(&replicas(other)));
    }
    assert!(is_wrong(&replicas::judge::<u8>(&[])));
}
