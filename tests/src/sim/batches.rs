//! Clients that do batches over several shards: a bank, lists and counters that are read and then written if nobody else has
//! written meanwhile, and one thing that moves from place to place, so that rows come and go.

use super::sender::{Asker, Became};
use crate::judge::bank::{self, Bank};
use crate::judge::counter::{self, Increments};
use crate::judge::list::{self, Appends};
use crate::judge::search::{Event, Verdict};
use crate::judge::single;
use parking_lot::Mutex;
use rand::RngExt;
use shkv_proto::message::{BatchOp, Condition};
use shkv_proto::world;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Accounts of the bank, with what each begins with.
const ACCOUNTS: usize = 4;
const BEGINS_WITH: i64 = 100;
/// Bytes of a number in a row.
const NUMBER_BYTES: usize = 8;
/// Places at one of which the thing is that moves.
const PLACES: usize = 4;
/// Transfers that are judged: the search takes long over many.
const BANK_EVENTS_MAX: usize = 120;

/// What the clients were told.
#[derive(Default)]
pub struct Ledger {
    told: Mutex<Told>,
    /// The order of everything that is called and returns.
    clock: AtomicU64,
    elements: AtomicU64,
    stop: AtomicBool,
    workers: AtomicU64,
}

#[derive(Default)]
struct Told {
    bank: Vec<Event<bank::Op>>,
    appends: Appends,
    increments: Increments,
    /// Where the thing was that moves, each time that somebody looked at all places.
    places: Vec<Vec<usize>>,
    done: u64,
}

fn account(at: usize) -> Vec<u8> {
    format!("bank/{at}").into_bytes()
}

fn place(at: usize) -> Vec<u8> {
    format!("place/{at}").into_bytes()
}

fn number(bytes: &[u8]) -> i64 {
    bytes.get(..NUMBER_BYTES).and_then(|bytes| bytes.try_into().ok()).map_or(i64::MIN, i64::from_le_bytes)
}

fn numbers(bytes: &[u8]) -> Vec<u64> {
    bytes.chunks(NUMBER_BYTES).map(|bytes| number(bytes) as u64).collect()
}

impl Ledger {
    fn now(&self) -> u64 {
        self.clock.fetch_add(1, Ordering::Relaxed)
    }

    /// Lets the workers end.
    pub fn stop(&self) {
        self.stop.store(true, Ordering::Relaxed);
    }

    /// Workers that have not ended.
    #[must_use]
    pub fn at_work(&self) -> u64 {
        self.workers.load(Ordering::Relaxed)
    }

    /// Batches that were acknowledged.
    #[must_use]
    pub fn done(&self) -> u64 {
        self.told.lock().done
    }

    /// Works until it is told to stop, by the client that applications embed or by one of its own.
    pub async fn work(self: Arc<Self>, homes: Vec<String>, by_library: bool) {
        self.workers.fetch_add(1, Ordering::Relaxed);
        let mut asker = if by_library { Asker::library(&homes).await } else { Asker::own(homes) };
        self.open_accounts(&mut asker).await;
        while !self.stop.load(Ordering::Relaxed) {
            match world::rng().random_range(0..12) {
                0..4 => self.transfer(&mut asker).await,
                4..6 => self.look(&mut asker).await,
                6..8 => self.append(&mut asker).await,
                8..10 => self.go_elsewhere(&mut asker).await,
                _ => self.increment(&mut asker).await,
            }
            let pause = world::rng().random_range(0..150);
            tokio::time::sleep(Duration::from_millis(pause)).await;
        }
        self.workers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Every worker tries; one of them finds no accounts.
    async fn open_accounts(&self, asker: &mut Asker) {
        let keys: Vec<Vec<u8>> = (0..ACCOUNTS).map(account).collect();
        let put = |key| BatchOp::Put { key, value_bytes: NUMBER_BYTES as u32, condition: Condition::Absent };
        let thing = place(0);
        let ops: Vec<BatchOp<'_>> = keys.iter().chain([&thing]).map(|key| put(&key[..])).collect();
        let values = BEGINS_WITH.to_le_bytes().repeat(ACCOUNTS + 1);
        while !self.stop.load(Ordering::Relaxed) {
            let _ = asker.batch(&ops, &values).await; // whoever did it, the next read tells
            if self.read_all(asker).await.is_some() {
                return;
            }
        }
    }

    async fn read_all(&self, asker: &mut Asker) -> Option<Vec<(u64, i64)>> {
        let keys: Vec<Vec<u8>> = (0..ACCOUNTS).map(account).collect();
        let ops: Vec<BatchOp<'_>> = keys.iter().map(|key| BatchOp::Read { key }).collect();
        match asker.batch(&ops, b"").await {
            Became::Done(rows) => {
                rows.into_iter().map(|row| row.map(|(version, value)| (version, number(&value)))).collect()
            }
            Became::Not | Became::Unknown => None,
        }
    }

    async fn look(&self, asker: &mut Asker) {
        let from = self.now();
        let Some(rows) = self.read_all(asker).await else { return };
        let until = Some(self.now());
        let op = bank::Op::Read(rows.iter().map(|(_, balance)| *balance).enumerate().collect());
        let mut told = self.told.lock();
        told.done += 1;
        told.bank.push(Event { op, from, until });
    }

    async fn transfer(&self, asker: &mut Asker) {
        let from_at = world::rng().random_range(0..ACCOUNTS);
        let to_at = (from_at + world::rng().random_range(1..ACCOUNTS)) % ACCOUNTS;
        let amount = world::rng().random_range(1..30_i64);
        let from = self.now();
        let Some(rows) = self.read_all(asker).await else { return };
        if rows[from_at].1 < amount {
            return;
        }
        let (a, b) = (account(from_at), account(to_at));
        let put = |key, version| BatchOp::Put {
            key,
            value_bytes: NUMBER_BYTES as u32,
            condition: Condition::Version(version),
        };
        let ops = [put(&a[..], rows[from_at].0), put(&b[..], rows[to_at].0)];
        let values = [(rows[from_at].1 - amount).to_le_bytes(), (rows[to_at].1 + amount).to_le_bytes()].concat();
        let (done, until) = match asker.batch(&ops, &values).await {
            Became::Done(_) => (Some(true), Some(self.now())),
            Became::Unknown => (None, None),
            Became::Not => return,
        };
        let mut told = self.told.lock();
        told.done += u64::from(done.is_some());
        told.bank.push(Event { op: bank::Op::Transfer { from: from_at, to: to_at, amount, done }, from, until });
    }

    /// Looks where the thing is that moves, and moves it: one row goes, another comes, in one step.
    async fn go_elsewhere(&self, asker: &mut Asker) {
        let keys: Vec<Vec<u8>> = (0..PLACES).map(place).collect();
        let ops: Vec<BatchOp<'_>> = keys.iter().map(|key| BatchOp::Read { key }).collect();
        let Became::Done(rows) = asker.batch(&ops, b"").await else { return };
        let found: Vec<usize> = (0..PLACES).filter(|at| rows.get(*at).is_some_and(Option::is_some)).collect();
        let here = found.first().copied().and_then(|at| Some((at, rows[at].as_ref()?.0)));
        self.told.lock().places.push(found);
        let Some((at, version)) = here else { return };
        let to = (at + world::rng().random_range(1..PLACES)) % PLACES;
        let ops = [
            BatchOp::Delete { key: &keys[at], condition: Condition::Version(version) },
            BatchOp::Put { key: &keys[to], value_bytes: NUMBER_BYTES as u32, condition: Condition::Absent },
        ];
        if let Became::Done(_) = asker.batch(&ops, &(to as i64).to_le_bytes()).await {
            self.told.lock().done += 1;
        }
    }

    /// Reads a row and writes what `change` makes of it, if nobody has written it meanwhile.
    async fn change(&self, asker: &mut Asker, key: &[u8], change: impl Fn(&[u8]) -> Vec<u8>) -> Option<Became> {
        let Became::Done(rows) = asker.batch(&[BatchOp::Read { key }], b"").await else { return None };
        let (condition, before) = match rows.into_iter().next().flatten() {
            Some((version, value)) => (Condition::Version(version), value),
            None => (Condition::Absent, vec![]),
        };
        let value = change(&before);
        let put = BatchOp::Put { key, value_bytes: value.len() as u32, condition };
        Some(asker.batch(&[put], &value).await)
    }

    async fn append(&self, asker: &mut Asker) {
        let element = self.elements.fetch_add(1, Ordering::Relaxed);
        let read = Mutex::new(vec![]);
        let became = self.change(asker, b"list", |before| {
            *read.lock() = numbers(before);
            [before, &element.to_le_bytes()].concat()
        });
        let became = became.await;
        let mut told = self.told.lock();
        match became {
            Some(Became::Done(_)) => drop(told.appends.done.insert(element)),
            Some(Became::Unknown) => drop(told.appends.unknown.insert(element)),
            Some(Became::Not) => {}
            None => return,
        }
        told.done += 1;
        told.appends.reads.push(read.into_inner());
    }

    async fn increment(&self, asker: &mut Asker) {
        let plus_one = |before: &[u8]| (if before.is_empty() { 1 } else { number(before) + 1 }).to_le_bytes().to_vec();
        let became = self.change(asker, b"counter", plus_one).await;
        let mut told = self.told.lock();
        match became {
            Some(Became::Done(_)) => (told.increments.done, told.done) = (told.increments.done + 1, told.done + 1),
            Some(Became::Unknown) => told.increments.unknown += 1,
            Some(Became::Not) | None => {}
        }
    }

    /// Judges what was told. `found` is what was there in the end.
    #[must_use]
    pub fn judge(&self, found: &BTreeMap<Vec<u8>, Vec<u8>>) -> Vec<String> {
        let told = self.told.lock();
        let mut wrong = Vec::new();
        let mut say = |what: &str, verdict: Verdict| match verdict {
            Verdict::Right => {}
            Verdict::Wrong(why) => wrong.push(format!("{what}: {why}")),
            Verdict::Undecided => wrong.push(format!("{what}: the judge cannot tell")),
        };
        let row = |key: &[u8]| found.get(key).map_or(&[][..], |value| &value[..]);
        say("list", list::judge(&told.appends, &numbers(row(b"list"))));
        let counted = if row(b"counter").is_empty() { 0 } else { number(row(b"counter")) as u64 };
        say("counter", counter::judge(told.increments, counted));
        let balances: Vec<i64> = (0..ACCOUNTS).map(|at| number(row(&account(at)))).collect();
        let is_open = !told.bank.is_empty();
        if is_open && balances.iter().sum::<i64>() != BEGINS_WITH * ACCOUNTS as i64 {
            say("bank", Verdict::Wrong(format!("money was made or lost: {balances:?}")));
        }
        let mut places = told.places.clone();
        places.push((0..PLACES).filter(|at| found.contains_key(&place(*at))).collect());
        if is_open {
            say("the thing that moves", single::judge(&places));
        }
        let events = begun_first(&told.bank);
        say("bank", bank::judge(&Bank(vec![BEGINS_WITH; ACCOUNTS]), &events));
        wrong
    }
}

/// The calls that began first. Of those that returned after the others began, reads tell nothing that can be judged without
/// the others, and transfers may have been done before or not.
fn begun_first(told: &[Event<bank::Op>]) -> Vec<Event<bank::Op>> {
    let mut events = told.to_vec();
    events.sort_by_key(|event| event.from);
    let Some(end) = events.get(BANK_EVENTS_MAX).map(|event| event.from) else { return events };
    events.truncate(BANK_EVENTS_MAX);
    events.retain_mut(|event| match &mut event.op {
        _ if event.until.is_some_and(|until| until < end) => true,
        bank::Op::Read(_) => false,
        bank::Op::Transfer { done, .. } => {
            (*done, event.until) = (None, None);
            true
        }
    });
    events
}
