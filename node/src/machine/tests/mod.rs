//! Scripts in, answers out.

mod model;

use super::*;
use crate::log::Mark;
use crate::memtable::Table;
use crate::store::Base;
use shkv_proto::KeyspaceId;
use shkv_proto::limits::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use shkv_proto::message::Condition;

const SHARD: ShardId = ShardId(1);
const PLACE: Place = Place { shard: SHARD, term: 1 };
const KEYSPACE: KeyspaceId = KeyspaceId(1);

fn view() -> View {
    View {
        active: Table::default(),
        sealed: None,
        base: Base::empty(),
        applied: Mark::default(),
        revision: 0,
        ledger: Ledger::default(),
    }
}

fn encoded<T: Serialize>(head: &T) -> Vec<u8> {
    codec::encode(head).expect("it is small")
}

fn write(key: &[u8], condition: Condition<'_>, id: Option<WriteId>) -> Vec<u8> {
    encoded(&Write { keyspace: KEYSPACE, key, condition, id })
}

fn head(key: &[u8]) -> Vec<u8> {
    write(key, Condition::Always, None)
}

fn batch(ops: Vec<BatchOp<'_>>, id: Option<WriteId>) -> Vec<u8> {
    encoded(&Batch { keyspace: KEYSPACE, ops, id })
}

fn put<'a>(key: &'a [u8], value: &[u8]) -> BatchOp<'a> {
    BatchOp::Put { key, value_bytes: value.len() as u32, condition: Condition::Always }
}

fn id(client: u64, sequence: u64, answered: u64, age_ms: u32) -> WriteId {
    WriteId { client, sequence, answered, age_ms }
}

/// One entry with these writes, applied; the answers.
fn run_at(view: &mut View, place: Place, time: u64, writes: &[(WriteKind, Vec<u8>, &[u8])]) -> Answers {
    let mut group = Group::new(time);
    writes.iter().for_each(|(kind, head, tail)| group.add(*kind, head, tail));
    let mut answers = Vec::new();
    apply(&Bytes::from(group.finish()), place, view, Some(&mut answers)).expect("a sound entry");
    answers
}

fn one(view: &mut View, kind: WriteKind, head: Vec<u8>, tail: &[u8]) -> Result<Done, NotDone> {
    run_at(view, PLACE, 0, &[(kind, head, tail)]).pop().expect("an answer")
}

fn get(view: &View, key: &[u8]) -> Option<(u64, Vec<u8>)> {
    view.get(key).expect("memory cannot fail").map(|(version, value)| (version, value.to_vec()))
}

#[test]
fn of_two_attempts_at_one_batch_the_first_that_is_concluded_counts_for_both() {
    let mut view = view();
    let mine = id(7, 1, 0, 0);
    let decide = |number| {
        let (ops, txn) = (vec![put(b"a", b"1")], TxnId { shard: SHARD, term: 1, number });
        encoded(&Decide { txn, ops, id: Some(mine), others: vec![ShardId(2)], removed: 0, reads: vec![] })
    };
    let conclude = encoded(&Conclude { id: mine, operation: 1, version: Some(5) });
    let refused = Err(NotDone::Failure(Failure::Condition { operation: 1, version: Some(5) }));
    assert_eq!(one(&mut view, WriteKind::Conclude, conclude.clone(), b""), refused);
    assert_eq!(one(&mut view, WriteKind::Decide, decide(1), b"1"), refused, "it was told as not done");
    assert_eq!(get(&view, b"a"), None);

    let mut view = self::view();
    assert!(matches!(one(&mut view, WriteKind::Decide, decide(1), b"1"), Ok(Done::Batch(_, _, true))));
    let known = one(&mut view, WriteKind::Conclude, conclude, b"");
    assert!(matches!(known, Ok(Done::Batch(_, _, false))), "its own writes are why the condition does not hold");
}

fn revision(answer: Result<Done, NotDone>) -> u64 {
    match answer {
        Ok(Done::Write(done)) => done.revision,
        Ok(Done::Batch(done, _, _)) => done.revisions[0].1,
        Ok(Done::Finish(done)) => done.revision,
        other => panic!("{other:?}"),
    }
}

fn refused(answer: Result<Done, NotDone>) -> RefusalCode {
    match answer {
        Err(NotDone::Failure(Failure::Refusal { code, .. })) => code,
        other => panic!("{other:?}"),
    }
}

fn is_aborted(answer: &Result<Done, NotDone>) -> bool {
    matches!(answer, Err(NotDone::Failure(Failure::Aborted { .. })))
}

#[test]
fn a_group_is_applied_in_its_order() {
    let ops = vec![
        put(b"a", b"3"),
        BatchOp::Delete { key: b"b", condition: Condition::Present },
        BatchOp::Put { key: b"c", value_bytes: 2, condition: Condition::Absent },
    ];
    let mut group = Group::new(0);
    group.add(WriteKind::Put, &head(b"a"), b"1");
    group.add(WriteKind::Put, &head(b"b"), b"2");
    group.add(WriteKind::Delete, &head(b"a"), b"");
    group.add(WriteKind::Delete, &head(b"a"), b"");
    group.add(WriteKind::Batch, &batch(ops, None), b"345");
    let data = Bytes::from(group.finish());
    let mut view = view();
    let mut answers = Vec::new();
    apply(&data, PLACE, &mut view, Some(&mut answers)).expect("a sound entry");
    let told = |answer: Result<Done, NotDone>| match answer {
        Ok(Done::Write(done)) => (done.revision, done.removed),
        Ok(Done::Batch(done, _, true)) => (done.revisions[0].1, done.removed),
        other => panic!("{other:?}"),
    };
    let told: Vec<_> = answers.into_iter().map(told).collect();
    assert_eq!(told, [(1, 0), (2, 0), (3, 1), (4, 0), (7, 1)]);
    assert_eq!(get(&view, b"a"), Some((5, b"3".to_vec())));
    assert_eq!(get(&view, b"b"), None);
    assert_eq!(get(&view, b"c"), Some((7, b"45".to_vec())));
    let mut silent = self::view();
    apply(&data, PLACE, &mut silent, None).expect("a sound entry");
    assert_eq!((silent.revision, &silent.active), (view.revision, &view.active), "answers change nothing");
    assert_eq!(silent.ledger, view.ledger);
}

#[test]
fn a_write_whose_condition_does_not_hold_changes_nothing() {
    let mut view = view();
    let some: Option<&[u8]> = Some(b"1");
    type Row<'a> = (Condition<'a>, Option<&'a [u8]>, Result<u64, Option<u64>>);
    let steps: [Row<'_>; 11] = [
        (Condition::Present, some, Err(None)),
        (Condition::Version(0), some, Err(None)),
        (Condition::Value(b""), some, Err(None)),
        (Condition::Absent, some, Ok(1)),
        (Condition::Absent, some, Err(Some(1))),
        (Condition::Version(1), some, Ok(2)),
        (Condition::Version(1), some, Err(Some(2))),
        (Condition::Value(b"2"), None, Err(Some(2))),
        (Condition::Value(b"1"), None, Ok(3)),
        (Condition::Present, None, Err(None)),
        (Condition::Absent, some, Ok(4)),
    ];
    for (condition, value, expected) in steps {
        let kind = if value.is_some() { WriteKind::Put } else { WriteKind::Delete };
        let told = match one(&mut view, kind, write(b"k", condition, None), value.unwrap_or_default()) {
            Ok(done) => Ok(revision(Ok(done))),
            Err(NotDone::Failure(Failure::Condition { operation: 0, version })) => Err(version),
            other => panic!("{other:?}"),
        };
        assert_eq!(told, expected, "{condition:?}");
    }
}

#[test]
fn a_batch_reads_and_checks_the_rows_before_it_and_is_done_wholly_or_not() {
    let mut view = view();
    one(&mut view, WriteKind::Put, head(b"r"), b"row").expect("no condition");
    let ops = |check| {
        vec![
            BatchOp::Read { key: b"r" },
            BatchOp::Put { key: b"a", value_bytes: 1, condition: Condition::Absent },
            BatchOp::Read { key: b"none" },
            BatchOp::Check { key: b"b", condition: check },
        ]
    };
    let failed = one(&mut view, WriteKind::Batch, batch(ops(Condition::Present), None), b"x");
    assert_eq!(failed, Err(Failure::Condition { operation: 3, version: None }.into()));
    assert_eq!((view.revision, get(&view, b"a")), (1, None), "not half of it");
    let done = one(&mut view, WriteKind::Batch, batch(ops(Condition::Absent), None), b"x");
    let rows = vec![Some(RowRead { version: 1, value_bytes: 3 }), None];
    let told = BatchDone { removed: 0, revisions: vec![(SHARD, 2)], rows };
    assert_eq!(done, Ok(Done::Batch(Box::new(told), Bytes::from_static(b"row"), true)));
}

#[test]
fn a_write_that_comes_twice_is_answered_from_what_is_remembered() {
    let mut view = view();
    let first = id(7, 1, 0, 0);
    let retry = id(7, 1, 0, 300);
    assert_eq!(revision(one(&mut view, WriteKind::Put, write(b"k", Condition::Always, Some(first)), b"1")), 1);
    assert_eq!(revision(one(&mut view, WriteKind::Put, head(b"k"), b"2")), 2);
    assert_eq!(revision(one(&mut view, WriteKind::Put, write(b"k", Condition::Always, Some(retry)), b"1")), 1);
    assert_eq!(get(&view, b"k"), Some((2, b"2".to_vec())), "it is not done again");
    // A delete tells how many rows it found, then and later.
    let gone = write(b"k", Condition::Always, Some(id(7, 2, 0, 0)));
    for _ in 0..2 {
        let done = one(&mut view, WriteKind::Delete, gone.clone(), b"");
        assert_eq!(done, Ok(Done::Write(WriteDone { revision: 3, removed: 1 })));
    }
    // A condition that did not hold still does not, whatever has happened since.
    let absent = write(b"n", Condition::Present, Some(id(7, 3, 0, 0)));
    let failed = Err(Failure::Condition { operation: 0, version: None }.into());
    assert_eq!(one(&mut view, WriteKind::Put, absent.clone(), b"x"), failed);
    one(&mut view, WriteKind::Put, head(b"n"), b"here").expect("no condition");
    assert_eq!(one(&mut view, WriteKind::Put, absent, b"x"), failed);
    // A batch is answered with the rows that it read.
    let reading = batch(vec![BatchOp::Read { key: b"n" }, put(b"k", b"9")], Some(id(7, 4, 0, 0)));
    let told = one(&mut view, WriteKind::Batch, reading.clone(), b"9").expect("done");
    one(&mut view, WriteKind::Put, head(b"n"), b"changed").expect("no condition");
    match (told, one(&mut view, WriteKind::Batch, reading, b"9").expect("done")) {
        (Done::Batch(a, a_values, true), Done::Batch(b, b_values, false)) => assert_eq!((a, a_values), (b, b_values)),
        other => panic!("{other:?}"),
    }
    // What the client has heard of is forgotten, and not done again.
    one(&mut view, WriteKind::Put, write(b"k", Condition::Always, Some(id(7, 5, 4, 0))), b"5").expect("new");
    let late = write(b"k", Condition::Always, Some(first));
    assert_eq!(refused(one(&mut view, WriteKind::Put, late, b"1")), RefusalCode::Forgotten);
    let other_kind = batch(vec![put(b"k", b"x")], Some(id(7, 5, 4, 0)));
    assert_eq!(refused(one(&mut view, WriteKind::Batch, other_kind, b"x")), RefusalCode::Conflict);
}

#[test]
fn what_is_remembered_is_bounded_and_a_write_from_before_is_refused() {
    let mut view = view();
    let mut at = |time: u64, id: WriteId| {
        let writes = [(WriteKind::Put, write(b"k", Condition::Always, Some(id)), &b"v"[..])];
        run_at(&mut view, PLACE, time, &writes).pop().expect("an answer")
    };
    let generation = sessions::GENERATION_MS;
    revision(at(1_000, id(1, 1, 0, 0)));
    revision(at(generation + 1, id(2, 1, 0, 0)));
    revision(at(generation + 2, id(1, 1, 0, 9)));
    assert_eq!(revision(at(generation + 3, id(3, 1, 0, 1_000_000))), 3, "nobody was forgotten yet");
    // Client 2 writes no more; two generations later it is forgotten, and what it may send again is too old.
    revision(at(2 * generation + 10, id(1, 2, 1, 0)));
    revision(at(3 * generation + 20, id(1, 3, 2, 0)));
    let late = 3 * generation + 30;
    let age = |since: u64| (late - since) as u32;
    assert_eq!(refused(at(late, id(2, 1, 0, age(generation + 1)))), RefusalCode::Forgotten);
    assert_eq!(revision(at(late, id(2, 2, 0, 5))), 6, "a newer one is new");
    assert_eq!(revision(at(late, id(9, 1, 0, 0))), 7, "so is one that is sent first");
    // Time that jumps back changes nothing.
    assert_eq!(revision(at(5, id(9, 1, 0, 10))), 7);
}

#[test]
fn a_client_that_hears_nothing_cannot_fill_the_memory() {
    let mut view = view();
    for sequence in 1..=10_000 {
        let id = id(1, sequence, 0, 0);
        one(&mut view, WriteKind::Put, write(b"k", Condition::Always, Some(id)), b"v").expect("new");
    }
    assert!(view.ledger.sessions.len() < 5_000, "{}", view.ledger.sessions.len());
    let oldest = write(b"k", Condition::Always, Some(id(1, 1, 0, 100)));
    assert_eq!(refused(one(&mut view, WriteKind::Put, oldest, b"v")), RefusalCode::Forgotten);
    let newest = write(b"k", Condition::Always, Some(id(1, 10_000, 0, 100)));
    assert_eq!(revision(one(&mut view, WriteKind::Put, newest, b"v")), 10_000);
    for client in 2..100_000 {
        let id = id(client, 1, 0, 0);
        one(&mut view, WriteKind::Put, write(b"k", Condition::Always, Some(id)), b"v").expect("new");
    }
    assert!(view.ledger.sessions.len() < 40_000, "{}", view.ledger.sessions.len());
}

#[test]
fn large_outcomes_are_remembered_as_done_and_many_of_them_push_older_ones_out() {
    let mut view = view();
    let value = vec![7; sessions::VALUES_BYTES_MAX];
    one(&mut view, WriteKind::Put, head(b"k"), &value).expect("no condition");
    one(&mut view, WriteKind::Put, head(b"l"), b"more").expect("no condition");
    let reading = |keys: &[&'static [u8]], sequence| {
        let ops = keys.iter().map(|key| BatchOp::Read { key }).collect();
        batch(ops, Some(id(1, sequence, 0, 0)))
    };
    // Too much to be kept: that it was done is.
    let both = reading(&[b"k", b"l"], 1);
    assert!(one(&mut view, WriteKind::Batch, both.clone(), b"").is_ok());
    assert_eq!(refused(one(&mut view, WriteKind::Batch, both, b"")), RefusalCode::Forgotten);
    // Just small enough, and many of them.
    for sequence in 2..100 {
        assert!(one(&mut view, WriteKind::Batch, reading(&[b"k"], sequence), b"").is_ok());
    }
    let again = one(&mut view, WriteKind::Batch, reading(&[b"k"], 99), b"");
    assert!(matches!(again, Ok(Done::Batch(_, values, false)) if values.len() == value.len()));
    assert_eq!(refused(one(&mut view, WriteKind::Batch, reading(&[b"k"], 2), b"")), RefusalCode::Forgotten);
    let bytes = view.ledger.encode().expect("it is small").len();
    assert!(bytes < 2 << 20, "{bytes} bytes are remembered");
}

fn txn(number: u64) -> TxnId {
    TxnId { shard: ShardId(0), term: 4, number }
}

fn prepare(txn: TxnId, ops: Vec<BatchOp<'_>>) -> Vec<u8> {
    encoded(&Prepare { txn, keyspace: KEYSPACE, ops })
}

fn finish(txn: TxnId, commit: bool) -> Vec<u8> {
    encoded(&Finish { txn, commit })
}

#[test]
fn what_is_prepared_is_locked_until_it_is_finished() {
    let mut view = view();
    one(&mut view, WriteKind::Put, head(b"a"), b"old").expect("no condition");
    let ops = vec![
        put(b"a", b"new"),
        BatchOp::Read { key: b"c" },
        BatchOp::Delete { key: b"a2", condition: Condition::Always },
    ];
    let told = one(&mut view, WriteKind::Prepare, prepare(txn(1), ops), b"new");
    assert_eq!(told, Ok(Done::Prepare(PrepareDone { removed: 0, rows: vec![None] }, Bytes::new())));
    assert_eq!(get(&view, b"a"), Some((1, b"old".to_vec())), "nothing is written yet");
    let met = one(&mut view, WriteKind::Put, head(b"c"), b"x");
    assert!(matches!(&met, Err(NotDone::Locked(locked)) if locked.by == txn(1) && &locked.tail[..] == b"x"), "{met:?}");
    let met =
        one(&mut view, WriteKind::Batch, batch(vec![put(b"free", b"1"), BatchOp::Read { key: b"a" }], None), b"1");
    assert!(matches!(met, Err(NotDone::Locked(_))), "{met:?}");
    assert!(
        is_aborted(&one(&mut view, WriteKind::Prepare, prepare(txn(2), vec![put(b"a", b"2")]), b"2")),
        "nobody waits"
    );
    assert_eq!(view.revision, 1);
    assert_eq!(revision(one(&mut view, WriteKind::Finish, finish(txn(1), true), b"")), 3);
    assert_eq!(get(&view, b"a"), Some((2, b"new".to_vec())));
    assert!(view.ledger.locks.is_empty() && view.ledger.locks.keys() == 0);
    assert_eq!(revision(one(&mut view, WriteKind::Put, head(b"a"), b"after")), 4);
    assert_eq!(revision(one(&mut view, WriteKind::Finish, finish(txn(1), true), b"")), 4, "done twice is done once");
    assert_eq!(get(&view, b"a"), Some((4, b"after".to_vec())));
    // One that is dropped leaves nothing; one whose condition does not hold locks nothing.
    one(&mut view, WriteKind::Prepare, prepare(txn(3), vec![put(b"a", b"3")]), b"3").expect("no lock");
    assert_eq!(revision(one(&mut view, WriteKind::Finish, finish(txn(3), false), b"")), 4);
    let failing = vec![put(b"a", b"5"), BatchOp::Check { key: b"b", condition: Condition::Present }];
    let failed = one(&mut view, WriteKind::Prepare, prepare(txn(5), failing), b"5");
    assert_eq!(failed, Err(Failure::Condition { operation: 1, version: None }.into()));
    assert!(view.ledger.locks.is_empty());
}

#[test]
fn a_shard_holds_no_more_prepared_than_its_bound() {
    let mut view = view();
    let value = vec![0; 4 << 20];
    let keys: Vec<[u8; 1]> = (0..5).map(|n| [n]).collect();
    let answers: Vec<_> = keys
        .iter()
        .zip(1..)
        .map(|(key, n)| one(&mut view, WriteKind::Prepare, prepare(txn(n), vec![put(key, &value)]), &value))
        .collect();
    assert!(answers[..3].iter().all(Result::is_ok));
    assert!(matches!(answers[4], Err(NotDone::Failure(Failure::Busy { .. }))), "{:?}", answers[4]);
}

fn decide<'a>(txn: TxnId, ops: Vec<BatchOp<'a>>, id: Option<WriteId>) -> Vec<u8> {
    encoded(&Decide { txn, ops, id, others: vec![ShardId(2)], removed: 2, reads: vec![] })
}

#[test]
fn a_transaction_is_decided_in_its_own_term_only_and_once_for_an_id() {
    let mut view = view();
    let place = Place { shard: ShardId(0), term: 4 };
    let at = |view: &mut View, term: u64, head: Vec<u8>| {
        let place = Place { term, ..place };
        run_at(view, place, 0, &[(WriteKind::Decide, head, b"v")]).pop().expect("an answer")
    };
    let same = Some(id(1, 1, 0, 0));
    assert!(is_aborted(&at(&mut view, 5, decide(txn(1), vec![put(b"a", b"v")], same))), "its term is over");
    assert_eq!((view.revision, view.ledger.decisions.len()), (0, 0));
    let told = at(&mut view, 4, decide(txn(2), vec![put(b"a", b"v")], same));
    assert!(matches!(&told, Ok(Done::Batch(done, _, true)) if done.removed == 2), "{told:?}");
    let other = at(&mut view, 4, decide(txn(3), vec![put(b"a", b"v")], same));
    assert!(matches!(&other, Ok(Done::Batch(_, _, false))), "the batch was done by another transaction: {other:?}");
    assert_eq!(view.revision, 1);
    assert_eq!(view.ledger.decisions.keys().copied().collect::<Vec<_>>(), [txn(2)]);
    let let_go = encoded(&LetGo { txn: txn(2), revisions: vec![(ShardId(2), 9)] });
    assert_eq!(one(&mut view, WriteKind::LetGo, let_go, b""), Ok(Done::LetGo));
    assert!(view.ledger.decisions.is_empty());
    let known = outcome_of(&view.ledger, &id(1, 1, 0, 5)).expect("it is remembered");
    assert!(matches!(known, Ok(Done::Batch(done, _, _)) if done.revisions == [(ShardId(0), 1), (ShardId(2), 9)]));
}

#[test]
fn reads_of_several_shards_are_told_in_the_order_of_the_batch() {
    let mut view = view();
    one(&mut view, WriteKind::Put, head(b"mine"), b"here").expect("no condition");
    let there = |version, value_bytes| Some(Some(RowRead { version, value_bytes }));
    let decide = Decide {
        txn: txn(1),
        ops: vec![BatchOp::Read { key: b"mine" }, put(b"k", b"v"), BatchOp::Read { key: b"none" }],
        id: None,
        others: vec![ShardId(2)],
        removed: 0,
        reads: vec![there(7, 2), None, Some(None), None, there(8, 1)],
    };
    let place = Place { shard: ShardId(0), term: 4 };
    let told = run_at(&mut view, place, 0, &[(WriteKind::Decide, encoded(&decide), b"vxyz")]).pop();
    let row = |version, value_bytes| Some(RowRead { version, value_bytes });
    match told {
        Some(Ok(Done::Batch(done, values, true))) => {
            assert_eq!(done.rows, [row(7, 2), row(1, 4), None, None, row(8, 1)]);
            assert_eq!(&values[..], b"xyherez");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(get(&view, b"k"), Some((2, b"v".to_vec())));
}

#[test]
fn the_ledger_survives_being_kept() {
    let mut view = view();
    assert_eq!(Ledger::decode(&Bytes::new()), Ok(Ledger::default()));
    for sequence in 1..50 {
        let id = Some(id(sequence % 5 + 1, sequence, 0, 0));
        run_at(&mut view, PLACE, sequence * 20_000, &[(WriteKind::Put, write(b"k", Condition::Always, id), b"v")]);
    }
    let reading = vec![BatchOp::Read { key: b"k" }, put(b"l", b"1")];
    one(&mut view, WriteKind::Batch, batch(reading, Some(id(8, 1, 0, 0))), b"1").expect("new");
    one(&mut view, WriteKind::Prepare, prepare(txn(1), vec![put(b"a", b"12345")]), b"12345").expect("no lock");
    let decided = Place { shard: ShardId(0), term: 4 };
    run_at(&mut view, decided, 0, &[(WriteKind::Decide, decide(txn(9), vec![put(b"b", b"v")], None), b"v")]);
    let bytes = Bytes::from(view.ledger.encode().expect("it is small"));
    assert_eq!(Ledger::decode(&bytes), Ok(view.ledger.clone()));
    for end in 1..bytes.len() {
        let _ = Ledger::decode(&bytes.slice(..end)); // whatever it is, it does not panic
    }
    let mut other = bytes.to_vec();
    other[0] = 9;
    assert!(Ledger::decode(&other.into()).is_err());
}

#[test]
fn every_cut_of_an_entry_is_refused_without_panic() {
    let mut group = Group::new(7);
    group.add(WriteKind::Put, &head(b"key"), b"value");
    let data = Bytes::from(group.finish());
    for end in (0..data.len()).filter(|end| *end != ENTRY_FIXED_BYTES) {
        assert!(apply(&data.slice(..end), PLACE, &mut view(), None).is_err(), "{end}");
    }
}

#[test]
fn an_entry_with_a_key_over_the_limit_is_refused_whoever_proposed_it() {
    let (fits, long) = ([1; KEY_BYTES_MAX], [1; KEY_BYTES_MAX + 1]);
    for (kind, head, tail) in [
        (WriteKind::Put, head(&long), &b"v"[..]),
        (WriteKind::Delete, head(&long), b""),
        (WriteKind::Batch, batch(vec![put(&fits, b"v"), put(&long, b"v")], None), b"vv"),
    ] {
        let mut group = Group::new(0);
        group.add(kind, &head, tail);
        let error = apply(&Bytes::from(group.finish()), PLACE, &mut view(), None).unwrap_err();
        assert!(error.to_string().contains("4097 bytes, the limit is 4096"), "{error}");
    }
    let mut view = view();
    assert!(one(&mut view, WriteKind::Put, head(&fits), b"v").is_ok());
    assert_eq!(get(&view, &fits), Some((1, b"v".to_vec())));
}

#[test]
fn what_is_over_a_limit_is_refused_by_name() {
    let yes = |_, _: &[u8]| Ok(());
    let code = |result: Result<Reach, Failure>| match result {
        Err(Failure::Refusal { code, .. }) => Some(code),
        _ => None,
    };
    assert_eq!(code(check(WriteKind::Put, &head(b""), b"", yes)), Some(RefusalCode::KeyEmpty));
    assert_eq!(code(check(WriteKind::Put, &head(&[1; KEY_BYTES_MAX + 1]), b"", yes)), Some(RefusalCode::KeyTooLarge));
    let long = vec![0; VALUE_BYTES_MAX + 1];
    assert_eq!(code(check(WriteKind::Put, &head(b"k"), &long, yes)), Some(RefusalCode::ValueTooLarge));
    assert_eq!(code(check(WriteKind::Delete, &head(b"k"), b"x", yes)), Some(RefusalCode::Malformed));
    assert_eq!(code(check(WriteKind::Put, b"\xff\xff", b"", yes)), Some(RefusalCode::Malformed));
    assert_eq!(code(check(WriteKind::Batch, &batch(vec![], None), b"", yes)), Some(RefusalCode::BatchLimits));
    let lying = batch(vec![BatchOp::Put { key: b"k", value_bytes: 5, condition: Condition::Always }], None);
    assert_eq!(code(check(WriteKind::Batch, &lying, b"four", yes)), Some(RefusalCode::Malformed));
    for bad in [id(0, 1, 0, 0), id(1, 0, 0, 0), id(1, 3, 3, 0)] {
        let head = write(b"k", Condition::Always, Some(bad));
        assert_eq!(code(check(WriteKind::Put, &head, b"", yes)), Some(RefusalCode::Malformed), "{bad:?}");
    }
    assert_eq!(check(WriteKind::Put, &head(&[1; KEY_BYTES_MAX]), b"v", yes), Ok(Reach::Here));
}

#[test]
fn a_key_that_stands_twice_in_a_batch_is_named_however_long_it_is() {
    let yes = |_, _: &[u8]| Ok(());
    for length in [2_usize, 5, 100, 1_000] {
        let mut keys: Vec<String> = (0..length).map(|n| format!("key{:04}", n * 7919 % length)).collect();
        let sound =
            |keys: &[String]| batch(keys.iter().map(|key| BatchOp::Read { key: key.as_bytes() }).collect(), None);
        keys.sort();
        keys.dedup();
        assert_eq!(check(WriteKind::Batch, &sound(&keys), b"", yes), Ok(Reach::Here));
        let twice = keys[keys.len() / 2].clone();
        keys.push(twice);
        let failure = check(WriteKind::Batch, &sound(&keys), b"", yes).expect_err("a key twice");
        let (first, second) = ((keys.len() - 1) / 2, keys.len() - 1);
        let text = failure.to_string();
        assert!(
            text.contains(&format!("operation {second}")) && text.contains(&format!("operation {first};")),
            "{text}"
        );
    }
}
