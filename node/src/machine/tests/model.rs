//! Several shards and coordinators that crash, in any order of events: never half a batch, never twice, no lock left.
//!
//! Each shard is one log, so that what a group of replicas has agreed on is what is applied here; leaders that are deposed
//! and started anew are terms that end. Coordinators are those of [`crate::txn`], one step at a time.

use super::*;
use proptest::prelude::*;
use shkv_proto::message::TxnId;
use std::collections::{BTreeMap, BTreeSet};

const SHARDS: u32 = 3;
const ACCOUNTS: u32 = 3;
const OPENING: u64 = 100;
/// Batches that are begun at the same time.
const AT_ONCE: usize = 4;

/// A transfer between accounts of two or three shards, with a mark in each of them. Sent until its outcome is known.
struct Transfer {
    id: WriteId,
    /// By shard: the account and what it must hold before and after.
    parts: BTreeMap<u32, (Vec<u8>, u64, u64)>,
    /// What the client was told.
    told: Option<(bool, BTreeMap<u32, u64>)>,
    open: bool,
}

impl Transfer {
    fn mark(&self) -> Vec<u8> {
        format!("mark{}", self.id.sequence).into_bytes()
    }
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Vote {
    Asked,
    Yes,
    No,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Phase {
    Preparing,
    /// The decision is proposed and not yet in the log.
    Deciding,
    /// It is decided: the others are being told.
    Finishing,
    Over,
}

/// A coordinator at work.
struct Attempt {
    transfer: usize,
    txn: TxnId,
    votes: BTreeMap<u32, Vote>,
    phase: Phase,
}

struct Shard {
    view: View,
    term: u64,
    /// Transactions of this term that may still be decided.
    under_way: BTreeSet<TxnId>,
}

struct World {
    shards: Vec<Shard>,
    transfers: Vec<Transfer>,
    attempts: Vec<Attempt>,
    /// Prepares on their way, which may come late.
    prepares: Vec<(usize, u32)>,
    finishes: Vec<(u32, TxnId, bool)>,
    numbers: u64,
    time: u64,
    /// At which version each mark was first seen.
    seen: BTreeMap<(u32, Vec<u8>), u64>,
    committed: usize,
}

fn account(shard: u32, at: u32) -> Vec<u8> {
    format!("account{shard}.{at}").into_bytes()
}

impl World {
    fn new() -> Self {
        let shard = |_| Shard { view: view(), term: 1, under_way: BTreeSet::new() };
        let mut world = Self {
            shards: (0..SHARDS).map(shard).collect(),
            transfers: vec![],
            attempts: vec![],
            prepares: vec![],
            finishes: vec![],
            numbers: 0,
            time: 0,
            seen: BTreeMap::new(),
            committed: 0,
        };
        for shard in 0..SHARDS {
            for at in 0..ACCOUNTS {
                let opened = world.apply(shard, WriteKind::Put, head(&account(shard, at)), &OPENING.to_le_bytes());
                assert!(opened.is_ok());
            }
        }
        world
    }

    fn apply(&mut self, shard: u32, kind: WriteKind, head: Vec<u8>, tail: &[u8]) -> Result<Done, NotDone> {
        self.time += 1;
        let at = &mut self.shards[shard as usize];
        let place = Place { shard: ShardId(shard), term: at.term };
        run_at(&mut at.view, place, self.time, &[(kind, head, tail)]).pop().expect("an answer")
    }

    fn balance(&self, shard: u32, key: &[u8]) -> u64 {
        let (_, value) = get(&self.shards[shard as usize].view, key).expect("an account is never removed");
        u64::from_le_bytes(value.try_into().expect("eight bytes"))
    }

    /// Coordinators that are at work.
    fn at_work(&self) -> Vec<usize> {
        (0..self.attempts.len()).filter(|at| self.attempts[*at].phase != Phase::Over).collect()
    }

    /// A client reads two or three accounts that nobody holds, and wants to move something.
    fn begin(&mut self, dice: &mut Dice) {
        let mut parts = BTreeMap::new();
        let count = 2 + dice.roll(2) as usize;
        let from = dice.roll(SHARDS);
        for shard in (0..count as u32).map(|n| (from + n) % SHARDS) {
            let key = account(shard, dice.roll(ACCOUNTS));
            let before = self.balance(shard, &key);
            parts.entry(shard).or_insert((key, before, before));
        }
        let giver = *parts.keys().next().expect("two parts");
        let gives = u64::from(dice.roll(5)) * (count as u64 - 1);
        if parts[&giver].1 < gives {
            return;
        }
        for (shard, part) in &mut parts {
            part.2 = if *shard == giver { part.1 - gives } else { part.1 + gives / (count as u64 - 1) };
        }
        let id = id(1, self.transfers.len() as u64 + 1, 0, 0);
        self.transfers.push(Transfer { id, parts, told: None, open: true });
        self.attempt(self.transfers.len() - 1);
    }

    /// A batch is sent, or sent again.
    fn attempt(&mut self, transfer: usize) {
        let Some(Transfer { parts, id, .. }) = self.transfers.get(transfer) else { return };
        let first = *parts.keys().next().expect("two parts");
        let others: Vec<u32> = parts.keys().skip(1).copied().collect();
        let at = &mut self.shards[first as usize];
        if let Some(known) = outcome_of(&at.view.ledger, id) {
            let mine = Some((id.client, id.sequence));
            if at.view.ledger.decisions.values().all(|decision| decision.id != mine) {
                let Ok(Done::Batch(done, _, _)) = known else { panic!("{known:?}") };
                self.tell(transfer, true, &done);
            }
            return;
        }
        self.numbers += 1;
        let txn = TxnId { shard: ShardId(first), term: at.term, number: self.numbers };
        at.under_way.insert(txn);
        self.prepares.extend(others.iter().map(|shard| (self.attempts.len(), *shard)));
        let votes = others.into_iter().map(|shard| (shard, Vote::Asked)).collect();
        self.attempts.push(Attempt { transfer, txn, votes, phase: Phase::Preparing });
    }

    fn tell(&mut self, transfer: usize, done: bool, told: &BatchDone) {
        let revisions = told.revisions.iter().map(|(shard, revision)| (shard.0, *revision)).collect();
        let transfer = &mut self.transfers[transfer];
        let told = (done, revisions);
        assert!(transfer.told.as_ref().is_none_or(|before| *before == told), "told {:?}, then {told:?}", transfer.told);
        transfer.told = Some(told);
        transfer.open = false;
    }

    fn prepare(&mut self, attempt: usize, shard: u32) {
        let Attempt { transfer, txn, .. } = self.attempts[attempt];
        let transfer = &self.transfers[transfer];
        let (mark, (key, before, after)) = (transfer.mark(), transfer.parts[&shard].clone());
        let (before, after) = (before.to_le_bytes(), after.to_le_bytes());
        let ops =
            vec![BatchOp::Put { key: &key, value_bytes: 8, condition: Condition::Value(&before) }, put(&mark, b"m")];
        let vote = match self.apply(shard, WriteKind::Prepare, prepare(txn, ops), &[&after[..], b"m"].concat()) {
            Ok(Done::Prepare(..)) => Vote::Yes,
            Err(NotDone::Failure(_)) => Vote::No,
            other => panic!("{other:?}"),
        };
        self.attempts[attempt].votes.insert(shard, vote);
    }

    /// Lets a coordinator go one step further, if it can.
    fn step(&mut self, attempt: usize) {
        let Attempt { transfer, txn, phase, ref votes } = self.attempts[attempt];
        let others: Vec<u32> = votes.keys().copied().collect();
        match phase {
            Phase::Preparing if votes.values().any(|vote| *vote == Vote::No) => self.give_up(attempt),
            Phase::Preparing if votes.values().all(|vote| *vote == Vote::Yes) => {
                self.attempts[attempt].phase = Phase::Deciding;
            }
            Phase::Preparing | Phase::Over => {}
            Phase::Deciding => {
                let Transfer { id, ref parts, .. } = self.transfers[transfer];
                let mark = self.transfers[transfer].mark();
                let (key, before, after) = parts[&txn.shard.0].clone();
                let (before, after) = (before.to_le_bytes(), after.to_le_bytes());
                let ops = vec![
                    BatchOp::Put { key: &key, value_bytes: 8, condition: Condition::Value(&before) },
                    put(&mark, b"m"),
                ];
                let others: Vec<ShardId> = others.into_iter().map(ShardId).collect();
                let decide = Decide { txn, ops, id: Some(id), others, removed: 0, reads: vec![] };
                let tail = [&after[..], b"m"].concat();
                let answer = self.apply(txn.shard.0, WriteKind::Decide, encoded(&decide), &tail);
                self.shards[txn.shard.0 as usize].under_way.remove(&txn);
                match answer {
                    Ok(Done::Batch(_, _, true)) => {
                        self.committed += 1;
                        self.attempts[attempt].phase = Phase::Finishing;
                    }
                    Ok(Done::Batch(_, _, false)) | Err(NotDone::Failure(_)) => self.give_up(attempt),
                    other => panic!("{other:?}"),
                }
            }
            Phase::Finishing => {
                self.finish_all(txn, &others.into_iter().map(ShardId).collect::<Vec<_>>());
                self.attempts[attempt].phase = Phase::Over;
            }
        }
    }

    fn give_up(&mut self, attempt: usize) {
        let Attempt { txn, ref votes, .. } = self.attempts[attempt];
        self.finishes.extend(votes.keys().map(|shard| (*shard, txn, false)));
        self.shards[txn.shard.0 as usize].under_way.remove(&txn);
        self.attempts[attempt].phase = Phase::Over;
    }

    /// All others are told, and have answered; then the decision is let go.
    fn finish_all(&mut self, txn: TxnId, others: &[ShardId]) {
        let mut revisions = vec![];
        for shard in others {
            revisions.push((*shard, revision(self.apply(shard.0, WriteKind::Finish, finish(txn, true), b""))));
        }
        let answer = self.apply(txn.shard.0, WriteKind::LetGo, encoded(&LetGo { txn, revisions }), b"");
        assert_eq!(answer, Ok(Done::LetGo));
    }

    /// A shard gets another leader: the coordinators of the old one may go on for a while, but decide nothing any more.
    fn next_term(&mut self, shard: u32, dice: &mut Dice) {
        let at = &mut self.shards[shard as usize];
        at.term += 1;
        at.under_way.clear();
        let bytes = Bytes::from(at.view.ledger.encode().expect("it is small"));
        at.view.ledger = Ledger::decode(&bytes).expect("what was encoded");
        let decided: Vec<_> = at.view.ledger.decisions.iter().map(|(txn, it)| (*txn, it.others.clone())).collect();
        // The old process may be gone, or go on with what it had begun.
        for attempt in &mut self.attempts {
            if attempt.txn.shard.0 == shard && dice.roll(2) == 0 {
                attempt.phase = Phase::Over;
            }
        }
        decided.into_iter().for_each(|(txn, others)| self.finish_all(txn, &others));
    }

    /// A participant asks what became of the transaction whose lock it holds.
    fn resolve(&mut self, shard: u32) {
        let Some(txn) = self.shards[shard as usize].view.ledger.locks.holders().next().copied() else { return };
        let decider = &self.shards[txn.shard.0 as usize];
        if decider.term == txn.term && decider.under_way.contains(&txn) {
            return;
        }
        let commit = decider.view.ledger.decisions.contains_key(&txn);
        self.apply(shard, WriteKind::Finish, finish(txn, commit), b"").expect("a finish is always done");
    }

    /// What a reader that waits for locks may see.
    fn check(&mut self) {
        for transfer in &self.transfers {
            let mark = transfer.mark();
            let (mut there, mut missing) = (vec![], vec![]);
            for shard in transfer.parts.keys() {
                let view = &self.shards[*shard as usize].view;
                match get(view, &mark) {
                    Some((version, _)) => {
                        there.push(*shard);
                        let first = *self.seen.entry((*shard, mark.clone())).or_insert(version);
                        assert_eq!(first, version, "transfer {} was done twice in shard {shard}", transfer.id.sequence);
                    }
                    None if view.ledger.locks.holder(&mark).is_none() => missing.push(*shard),
                    None => {}
                }
            }
            let halves = (there.is_empty(), missing.is_empty());
            assert_ne!(halves, (false, false), "half of transfer {}: {there:?}, {missing:?}", transfer.id.sequence);
        }
    }

    /// Everybody crashes, and everything that can be known becomes known.
    fn settle(&mut self) {
        self.attempts.iter_mut().for_each(|attempt| attempt.phase = Phase::Over);
        for shard in 0..SHARDS {
            self.next_term(shard, &mut Dice(vec![]));
        }
        for shard in 0..SHARDS {
            while !self.shards[shard as usize].view.ledger.locks.is_empty() {
                self.resolve(shard);
            }
        }
        self.check();
        let mut sum = 0;
        for shard in 0..SHARDS {
            let ledger = &self.shards[shard as usize].view.ledger;
            assert_eq!((ledger.locks.keys(), ledger.decisions.len()), (0, 0), "something is left in shard {shard}");
            sum += (0..ACCOUNTS).map(|at| self.balance(shard, &account(shard, at))).sum::<u64>();
        }
        assert_eq!(sum, OPENING * u64::from(SHARDS * ACCOUNTS), "money was made or lost");
        for transfer in &self.transfers {
            let first = transfer.parts.keys().next().expect("two parts");
            let is_done = get(&self.shards[*first as usize].view, &transfer.mark()).is_some();
            assert!(is_done || transfer.told.is_none(), "told to be done: transfer {}", transfer.id.sequence);
            for (shard, revision) in transfer.told.iter().flat_map(|(_, revisions)| revisions) {
                let (version, _) = get(&self.shards[*shard as usize].view, &transfer.mark()).expect("it is done");
                assert!(version <= *revision, "the revision told covers what was written");
            }
        }
    }
}

/// Choices that were drawn before.
struct Dice(Vec<u32>);

impl Dice {
    fn roll(&mut self, sides: u32) -> u32 {
        self.0.pop().unwrap_or(0) % sides
    }
}

fn play(dice: &mut Dice) -> World {
    let mut world = World::new();
    while !dice.0.is_empty() {
        match dice.roll(16) {
            0..3 if world.at_work().len() < AT_ONCE => world.begin(dice),
            3..6 if !world.prepares.is_empty() => {
                let at = dice.roll(world.prepares.len() as u32) as usize;
                let (attempt, shard) = world.prepares.swap_remove(at);
                world.prepare(attempt, shard);
            }
            6..11 if !world.at_work().is_empty() => {
                let at_work = world.at_work();
                world.step(at_work[dice.roll(at_work.len() as u32) as usize]);
            }
            11 if !world.finishes.is_empty() => {
                let at = dice.roll(world.finishes.len() as u32) as usize;
                let (shard, txn, commit) = world.finishes.swap_remove(at);
                world.apply(shard, WriteKind::Finish, finish(txn, commit), b"").expect("a finish is always done");
            }
            12 => world.resolve(dice.roll(SHARDS)),
            13 if dice.roll(3) == 0 => world.next_term(dice.roll(SHARDS), dice),
            14 if !world.transfers.is_empty() => {
                let at = dice.roll(world.transfers.len() as u32) as usize;
                if world.transfers[at].open || dice.roll(2) == 0 {
                    world.transfers[at].id.age_ms = 5;
                    world.attempt(at);
                }
            }
            _ => {
                // A plain write, which meets locks and is not done then.
                let shard = dice.roll(SHARDS);
                let key = account(shard, dice.roll(ACCOUNTS));
                let same = world.balance(shard, &key).to_le_bytes();
                let is_locked = world.shards[shard as usize].view.ledger.locks.holder(&key).is_some();
                let answer = world.apply(shard, WriteKind::Put, head(&key), &same);
                assert_eq!(matches!(answer, Err(NotDone::Locked(_))), is_locked);
            }
        }
        world.check();
    }
    world
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, ..ProptestConfig::default() })]

    #[test]
    fn in_any_order_of_events_a_batch_is_done_wholly_and_once(choices in prop::collection::vec(any::<u32>(), 100..1_500)) {
        play(&mut Dice(choices)).settle();
    }
}

#[test]
fn the_model_gets_transfers_done() {
    let mut luck = 0x9e37_79b9_7f4a_7c15_u64;
    let mut next = || {
        luck ^= luck << 13;
        luck ^= luck >> 7;
        luck ^= luck << 17;
        (luck >> 16) as u32
    };
    let mut world = play(&mut Dice((0..20_000).map(|_| next()).collect()));
    let told = world.transfers.iter().filter(|transfer| transfer.told.is_some()).count();
    assert!(world.committed > 30 && told > 10, "{} were done, of {} it was told", world.committed, told);
    world.settle();
}
