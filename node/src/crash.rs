//! Crash consistency of the log and of redb's use: a recorded stream of disk operations is cut behind every operation,
//! what was not synced by then is kept, lost or torn in several ways, and what is found is recovered as a node does.
//!
//! It must then hold, for every shard: the rows are exactly those of one moment of its log; what was acknowledged is in
//! the rows or in the log behind them, byte for byte; the term is none that is older than the last durable one; and the
//! log goes on. (Pillai et al., All File Systems Are Not Created Equal, OSDI 2014, section 3, tests file systems so.)

use crate::disk::{Disk, DiskFile};
use crate::log::recover::Recovered;
use crate::log::{Hard, Log, LogEntry, Mark, ShardWrite};
use crate::machine::Ledger;
use crate::memtable::Table;
use crate::replica::Replica;
use crate::store::{Flush, ReplicaMeta, Store};
use bytes::Bytes;
use parking_lot::Mutex;
use shkv_proto::map::Part;
use shkv_proto::message::SnapshotHead;
use shkv_proto::{KeyspaceId, NodeId, ReplicaId, ShardId};
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::ops::Bound;
use std::sync::Arc;

const NODE: NodeId = NodeId(5);
const SEGMENT: u64 = 16 << 10;
const SECTOR: usize = 512;
const CACHE_BYTES: usize = 1 << 20;
const ROWS: &str = "rows.redb";
/// As [`Store::open`] calls it until it is whole.
const UNFINISHED: &str = "unfinished.redb";

/// Something that was done to the disk, or that the node told others because of it.
#[derive(Clone)]
enum Step {
    Create(String, u64),
    Rename(String, String),
    Remove(String),
    Write(String, u64, Vec<u8>),
    Resize(String, u64),
    Sync(String),
    /// From here on these promises are kept.
    Told(Promises),
}

/// What others rely on: by shard, the last acknowledged entry and the term.
type Promises = BTreeMap<u32, (u64, u64)>;

#[derive(Default)]
struct Tape {
    files: BTreeMap<String, Vec<u8>>,
    steps: Vec<Step>,
}

impl Tape {
    fn put(&mut self, name: &str, offset: usize, bytes: &[u8]) {
        let file = self.files.entry(name.to_owned()).or_default();
        file.resize(file.len().max(offset + bytes.len()), 0);
        file[offset..offset + bytes.len()].copy_from_slice(bytes);
    }
}

/// A disk in memory that remembers what was done to it.
#[derive(Clone, Default)]
struct Recorder(Arc<Mutex<Tape>>);

struct RecordedFile {
    disk: Recorder,
    /// The log renames a segment while it holds it open: the file is known by what it was called when it was opened.
    name: Mutex<String>,
}

impl Recorder {
    fn file(&self, name: &str) -> Arc<dyn DiskFile> {
        Arc::new(RecordedFile { disk: self.clone(), name: Mutex::new(name.to_owned()) })
    }

    fn told(&self, promises: &Promises) {
        self.0.lock().steps.push(Step::Told(promises.clone()));
    }
}

impl Disk for Recorder {
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let mut tape = self.0.lock();
        assert!(!tape.files.contains_key(name), "{name} is made twice");
        tape.files.insert(name.to_owned(), vec![0; bytes as usize]);
        tape.steps.push(Step::Create(name.to_owned(), bytes));
        Ok(self.file(name))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        self.0.lock().files.get(name).map(|_| self.file(name)).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut tape = self.0.lock();
        let file = tape.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        tape.files.insert(to.to_owned(), file);
        tape.steps.push(Step::Rename(from.to_owned(), to.to_owned()));
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        let mut tape = self.0.lock();
        tape.files.remove(name).ok_or(io::ErrorKind::NotFound)?;
        tape.steps.push(Step::Remove(name.to_owned()));
        Ok(())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().files.keys().filter(|name| !name.ends_with(".redb")).cloned().collect())
    }
}

impl RecordedFile {
    /// The name under which the file is now.
    fn name(&self, tape: &Tape) -> String {
        let mut name = self.name.lock();
        let renamed = tape.steps.iter().rev().find_map(|step| match step {
            Step::Rename(from, to) if *from == *name => Some(to.clone()),
            _ => None,
        });
        if let Some(renamed) = renamed.filter(|_| !tape.files.contains_key(&*name)) {
            *name = renamed;
        }
        name.clone()
    }
}

impl DiskFile for RecordedFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut tape = self.disk.0.lock();
        let name = self.name(&tape);
        tape.put(&name, offset as usize, bytes);
        tape.steps.push(Step::Write(name, offset, bytes.to_vec()));
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let tape = self.disk.0.lock();
        let file = &tape.files[&self.name(&tape)];
        let from = file.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut tape = self.disk.0.lock();
        let name = self.name(&tape);
        tape.steps.push(Step::Sync(name));
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        let tape = self.disk.0.lock();
        Ok(tape.files[&self.name(&tape)].len() as u64)
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        let mut tape = self.disk.0.lock();
        let name = self.name(&tape);
        tape.files.get_mut(&name).ok_or(io::ErrorKind::NotFound)?.resize(bytes as usize, 0);
        tape.steps.push(Step::Resize(name, bytes));
        Ok(())
    }
}

/// A file as a crash may find it.
#[derive(Clone, Default)]
struct Platter {
    durable: Vec<u8>,
    pending: Vec<Pending>,
}

#[derive(Clone)]
enum Pending {
    Write(usize, Vec<u8>),
    Resize(usize),
}

/// What a crash leaves of what was not synced.
#[derive(Clone, Copy, PartialEq, Debug)]
enum Loss {
    /// Everything is there.
    Nothing,
    /// Nothing of it is.
    Everything,
    /// What was written last is there, what came before is not.
    AllButLast,
    /// The last write is there to its half.
    TornLast,
    /// Each sector is there or not, drawn from this number.
    Sectors(u64),
}

const LOSSES: [Loss; 8] = [
    Loss::Nothing,
    Loss::Everything,
    Loss::AllButLast,
    Loss::TornLast,
    Loss::Sectors(1),
    Loss::Sectors(2),
    Loss::Sectors(3),
    Loss::Sectors(4),
];

impl Platter {
    fn after(&self, loss: Loss) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        let mut put = |at: usize, piece: &[u8]| {
            bytes.resize(bytes.len().max(at + piece.len()), 0);
            bytes[at..at + piece.len()].copy_from_slice(piece);
        };
        let mut resized = None;
        let mut luck = match loss {
            Loss::Sectors(seed) => seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            Loss::Nothing | Loss::Everything | Loss::AllButLast | Loss::TornLast => 1,
        };
        for (number, pending) in self.pending.iter().enumerate() {
            let is_last = number + 1 == self.pending.len();
            match pending {
                Pending::Resize(length) => {
                    if loss == Loss::Nothing {
                        resized = Some(*length);
                    }
                }
                Pending::Write(at, piece) => match loss {
                    Loss::Nothing => put(*at, piece),
                    Loss::Everything => {}
                    Loss::AllButLast if is_last => put(*at, piece),
                    Loss::AllButLast => {}
                    Loss::TornLast if is_last => put(*at, &piece[..piece.len() / 2]),
                    Loss::TornLast => put(*at, piece),
                    Loss::Sectors(_) => {
                        let mut from = 0;
                        while from < piece.len() {
                            let to = ((at + from) / SECTOR * SECTOR + SECTOR - at).min(piece.len());
                            luck ^= luck << 13;
                            luck ^= luck >> 7;
                            luck ^= luck << 17;
                            if luck & 1 == 1 {
                                put(at + from, &piece[from..to]);
                            }
                            from = to;
                        }
                    }
                },
            }
        }
        if let Some(length) = resized.filter(|length| *length > bytes.len()) {
            bytes.resize(length, 0);
        }
        bytes
    }
}

/// The disk as of one step of the tape.
#[derive(Default)]
struct Platters {
    files: BTreeMap<String, Platter>,
    /// Removals that no sync of the folder has made durable, oldest first: a crash may bring them back, the last first.
    removed: Vec<(String, Platter)>,
    promises: Promises,
}

impl Platters {
    fn take(&mut self, step: &Step) {
        match step {
            Step::Create(name, bytes) => {
                self.removed.clear(); // creating and renaming sync the folder
                self.files.insert(name.clone(), Platter { durable: vec![0; *bytes as usize], pending: vec![] });
            }
            Step::Rename(from, to) => {
                self.removed.clear();
                let file = self.files.remove(from).expect("it was made");
                self.files.insert(to.clone(), file);
            }
            Step::Remove(name) => {
                let file = self.files.remove(name).expect("it was made");
                self.removed.push((name.clone(), file));
            }
            Step::Write(name, at, bytes) => {
                self.files.entry(name.clone()).or_default().pending.push(Pending::Write(*at as usize, bytes.clone()));
            }
            Step::Resize(name, bytes) => {
                self.files.entry(name.clone()).or_default().pending.push(Pending::Resize(*bytes as usize));
            }
            Step::Sync(name) => {
                let file = self.files.entry(name.clone()).or_default();
                file.durable = file.after(Loss::Nothing);
                file.pending.clear();
            }
            Step::Told(promises) => self.promises = promises.clone(),
        }
    }

    /// What is found after a crash here.
    fn crash(&self, loss: Loss, brought_back: usize) -> Recorder {
        let back = self.removed.iter().rev().take(brought_back).map(|(name, file)| (name, file));
        let files = self.files.iter().chain(back);
        let files = files.map(|(name, file)| (name.clone(), file.after(loss))).collect();
        Recorder(Arc::new(Mutex::new(Tape { files, steps: vec![] })))
    }
}

/// The rows of a shard behind each entry of its log: an entry writes one row and, by its index, removes another.
fn rows_at(shard: u32, index: u64) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut rows = BTreeMap::new();
    for index in 1..=index {
        rows.insert(key_of(index), data_of(shard, index));
        if index.is_multiple_of(5) {
            rows.remove(&key_of(index - 3));
        }
    }
    rows
}

/// What a shard remembers behind an entry of its log.
fn ledger_at(index: u64) -> Ledger {
    Ledger { time: index, ..Ledger::default() }
}

fn key_of(index: u64) -> Vec<u8> {
    format!("key{:03}", index * 7 % 40).into_bytes()
}

fn data_of(shard: u32, index: u64) -> Vec<u8> {
    let bytes = 20 + (index as usize * 97 + shard as usize * 31) % 900;
    (0..bytes).map(|at| (at as u64 ^ index ^ u64::from(shard)) as u8).collect()
}

/// A node cut down to what touches the disk, in the order in which the real one does it.
struct Small {
    disk: Recorder,
    log: Log,
    store: Store,
    shards: BTreeMap<u32, Shard>,
    promises: Promises,
}

struct Shard {
    meta: ReplicaMeta,
    last: u64,
    term: u64,
    /// The rows that are not yet flushed.
    active: Table,
}

fn head(index: u64, term: u64) -> SnapshotHead {
    SnapshotHead {
        index,
        term,
        voters: vec![ReplicaId(1)],
        voters_outgoing: vec![],
        learners: vec![],
        learners_next: vec![],
        auto_leave: false,
    }
}

impl Small {
    fn new() -> Self {
        let disk = Recorder::default();
        let (log, _) = Log::open(Arc::new(disk.clone()), NODE, SEGMENT).expect("an empty folder");
        disk.0.lock().files.insert(UNFINISHED.into(), vec![]);
        drop(Store::open_in(disk.file(UNFINISHED), CACHE_BYTES).expect("an empty file"));
        disk.rename(UNFINISHED, ROWS).expect("it is there");
        let (store, _) = Store::open_in(disk.file(ROWS), CACHE_BYTES).expect("a whole file");
        Self { disk, log, store, shards: BTreeMap::new(), promises: Promises::new() }
    }

    fn create(&mut self, shard: u32) {
        let meta = ReplicaMeta {
            replica: ReplicaId(1),
            keyspace: KeyspaceId(1),
            part: Part::everything(),
            homes: vec![(ReplicaId(1), NODE)],
            state: head(0, 0),
            revision: 0,
        };
        self.store.create_replica(ShardId(shard), &meta).expect("the disk works");
        self.shards.insert(shard, Shard { meta, last: 0, term: 1, active: Table::default() });
        self.promise(shard);
    }

    fn promise(&mut self, shard: u32) {
        let of = &self.shards[&shard];
        self.promises.insert(shard, (of.last, of.term));
        self.disk.told(&self.promises);
    }

    /// Entries of some shards in one append, acknowledged and applied when it has returned.
    fn append(&mut self, counts: &[(u32, u64)]) {
        let mut writes = Vec::new();
        for (number, count) in counts {
            let shard = &self.shards[number];
            let entries = (1..=*count).map(|n| shard.last + n).map(|index| LogEntry {
                index,
                term: shard.term,
                kind: 0,
                data: Bytes::from(data_of(*number, index)),
            });
            let hard = Hard { term: shard.term, vote: 1, commit: shard.last };
            writes.push(ShardWrite { shard: *number, reset: None, entries: entries.collect(), hard: Some(hard) });
        }
        self.log.append(&writes).expect("the disk works");
        for (number, count) in counts {
            let shard = self.shards.get_mut(number).expect("it was made");
            for _ in 0..*count {
                shard.last += 1;
                shard.active.put(&key_of(shard.last), shard.last, &data_of(*number, shard.last), || {
                    unreachable!("it is small")
                });
                if shard.last.is_multiple_of(5) {
                    shard.active.delete(&key_of(shard.last - 3));
                }
            }
            self.promise(*number);
        }
    }

    /// A new term: others may have been promised a vote in it.
    fn vote(&mut self, number: u32) {
        let shard = self.shards.get_mut(&number).expect("it was made");
        shard.term += 1;
        let hard = Hard { term: shard.term, vote: 1, commit: shard.last };
        self.log.append(&[ShardWrite { shard: number, hard: Some(hard), ..ShardWrite::default() }]).expect("it works");
        self.promise(number);
    }

    fn flush(&mut self) {
        let mut flushes = Vec::new();
        for (number, shard) in &mut self.shards {
            shard.meta.state = head(shard.last, shard.term);
            shard.meta.revision = shard.last;
            let table = Arc::new(std::mem::take(&mut shard.active));
            flushes.push(Flush {
                shard: ShardId(*number),
                meta: shard.meta.clone(),
                table,
                ledger: ledger_at(shard.last),
            });
        }
        self.store.flush(&flushes, &Default::default()).expect("the disk works");
        let flushed = self.shards.iter().map(|(number, shard)| (*number, shard.last)).collect();
        self.log.release(&flushed, SEGMENT).expect("the disk works");
        self.log.make_spares().expect("the disk works");
    }

    /// A snapshot that is far ahead of the log.
    fn install(&mut self, number: u32, ahead: u64) {
        let shard = self.shards.get_mut(&number).expect("it was made");
        shard.last += ahead;
        shard.term += 1;
        shard.active = Table::default();
        shard.meta.state = head(shard.last, shard.term);
        shard.meta.revision = shard.last;
        let stored = |(key, value): (Vec<u8>, Vec<u8>)| {
            let mut row = vec![0; 9];
            row[1] = 1; // the version is of no account here
            row.extend_from_slice(&value);
            (Bytes::from(key), Bytes::from(row))
        };
        let rows: Vec<_> = rows_at(number, shard.last).into_iter().map(stored).collect();
        let id = ShardId(number);
        self.store.stage_begin(id).expect("the disk works");
        for (at, chunk) in rows.chunks(7).enumerate() {
            self.store.stage(id, chunk, at.is_multiple_of(2)).expect("the disk works");
        }
        let ledger = ledger_at(shard.last).encode().expect("it is small");
        self.store.install(id, &shard.meta, &ledger).expect("the disk works");
        let mark = Mark { index: shard.last, term: shard.term };
        let hard = Hard { term: shard.term, vote: 0, commit: shard.last };
        let reset = ShardWrite { shard: number, reset: Some(mark), entries: vec![], hard: Some(hard) };
        self.log.append(&[reset]).expect("the disk works");
        self.promise(number);
    }
}

/// The life that is recorded: long enough that segments are opened, recycled and removed, and rows flushed over rows.
fn life() -> Vec<Step> {
    let mut node = Small::new();
    node.create(1);
    node.append(&[(1, 3)]);
    node.create(2);
    for round in 0..90 {
        node.append(&[(1, 1 + round % 3), (2, 1)]);
        match round {
            9 | 60 => node.install(2, 30),
            15 => node.append(&[(1, 25)]),
            _ if round % 9 == 4 => node.vote(1),
            _ if round % 5 == 2 => node.flush(),
            _ => {}
        }
    }
    std::mem::take(&mut node.disk.0.lock().steps)
}

/// Recovers as a node does, and holds what is found against what was promised.
fn recover(disk: &Recorder, promises: &Promises, goes_on: bool) -> Result<(), String> {
    let has_rows = disk.0.lock().files.contains_key(ROWS);
    if !has_rows {
        return if promises.is_empty() { Ok(()) } else { Err("the rows' file is gone".into()) };
    }
    let (store, metas) = Store::open_in(disk.file(ROWS), CACHE_BYTES).map_err(|error| error.to_string())?;
    let (log, mut found) =
        Log::open(Arc::new(disk.clone()), NODE, SEGMENT).map_err(|error| format!("the log: {error}"))?;
    let log = Arc::new(log);
    for shard in promises.keys() {
        if !metas.contains_key(shard) {
            return Err(format!("shard {shard} is gone"));
        }
    }
    for (number, meta) in metas {
        let fail = |text: String| Err(format!("shard {number}: {text}"));
        let recovered = found.remove(&number).unwrap_or_default();
        let (applied, term) = (meta.state.index, recovered.hard.term.max(meta.state.term));
        let (last, base) = (recovered.base.index + recovered.terms.len() as u64, recovered.base.index);
        let (acknowledged, promised_term) = promises.get(&number).copied().unwrap_or_default();
        if last.max(applied) < acknowledged {
            return fail(format!("entry {acknowledged} was acknowledged, rows end at {applied}, the log at {last}"));
        }
        if term < promised_term && acknowledged > 0 {
            return fail(format!("the term is {term}, {promised_term} was promised"));
        }
        if base > applied {
            return fail(format!("rows end at {applied}, the log begins behind {base}"));
        }
        let stale = term_at(&recovered, applied) != Some(meta.state.term); // an installed snapshot voids the log
        Replica::open(ShardId(number), meta.replica, &log, recovered, meta.state.clone(), 0)
            .map_err(|error| error.to_string())?;
        if !stale && last > applied {
            let entries =
                log.read(ShardId(number), applied + 1, last + 1, u64::MAX).map_err(|error| error.to_string())?;
            for entry in entries {
                if entry.data != data_of(number, entry.index) {
                    return fail(format!("entry {} is not what was written", entry.index));
                }
            }
        }
        let rows = store.base(ShardId(number)).map_err(|error| error.to_string())?;
        let ledger = Ledger::decode(rows.ledger()).map_err(|error| error.to_string())?;
        if ledger != ledger_at(applied) {
            return fail(format!("its ledger is not that of entry {applied}"));
        }
        let mut range = rows.range((Bound::Unbounded, Bound::Unbounded), false).map_err(|error| error.to_string())?;
        let mut found = BTreeMap::new();
        while let Some(row) = range.next().map_err(|error| error.to_string())? {
            let (_, value) = row.split().map_err(|error| error.to_string())?;
            found.insert(row.key().to_vec(), value.to_vec());
        }
        if found != rows_at(number, applied) {
            return fail(format!("its {} rows are not those of entry {applied}", found.len()));
        }
        if goes_on {
            let index = if stale { applied } else { last } + 1;
            let data = Bytes::from(data_of(number, index));
            let entry = LogEntry { index, term: term + 1, kind: 0, data };
            let hard = Hard { term: term + 1, vote: 1, commit: applied };
            let write = ShardWrite { shard: number, reset: None, entries: vec![entry], hard: Some(hard) };
            log.append(&[write]).map_err(|error| error.to_string())?;
            let (_, again) = Log::open(Arc::new(disk.clone()), NODE, SEGMENT).map_err(|error| error.to_string())?;
            let last = again.get(&number).map_or(0, |log| log.base.index + log.terms.len() as u64);
            if last != index {
                return fail(format!("entry {index} was written after the crash, {last} is the last"));
            }
        }
    }
    Ok(())
}

fn term_at(recovered: &Recovered, index: u64) -> Option<u64> {
    match index.checked_sub(recovered.base.index)? {
        0 => Some(recovered.base.term),
        behind => recovered.terms.get(behind as usize - 1).copied(),
    }
}

/// Cuts the stream behind every step. Returns the first broken promise, and how many crashes were tried.
fn cut_everywhere(steps: &[Step]) -> (Option<String>, usize) {
    let mut platters = Platters::default();
    let mut crashes = 0_usize;
    for (at, step) in steps.iter().enumerate() {
        platters.take(step);
        let pending = platters.files.values().any(|file| !file.pending.is_empty());
        let losses = if pending { &LOSSES[..] } else { &LOSSES[..1] };
        for loss in losses {
            for brought_back in 0..=platters.removed.len() {
                crashes += 1;
                let disk = platters.crash(*loss, brought_back);
                if let Err(text) = recover(&disk, &platters.promises, crashes.is_multiple_of(7)) {
                    let of = steps.len();
                    let text =
                        format!("after step {at} of {of}, {loss:?} lost, {brought_back} removed files back: {text}");
                    return (Some(text), crashes);
                }
            }
        }
    }
    (None, crashes)
}

#[test]
fn every_prefix_and_every_torn_variant_of_what_was_done_to_the_disk_recovers() {
    let steps = life();
    let kinds: BTreeSet<_> = steps.iter().map(std::mem::discriminant).map(|kind| format!("{kind:?}")).collect();
    assert_eq!(kinds.len(), 7, "the life that is recorded does everything that can be done to a disk");
    let (broken, crashes) = cut_everywhere(&steps);
    assert_eq!(broken, None);
    assert!(crashes > 5_000, "only {crashes} crashes were tried");
}

/// The judge above would be no use if it took everything.
#[test]
fn an_acknowledgement_before_the_sync_is_found() {
    let mut steps = life();
    for at in 1..steps.len() {
        if matches!((&steps[at - 1], &steps[at]), (Step::Sync(_), Step::Told(_))) {
            steps.swap(at - 1, at);
        }
    }
    assert!(cut_everywhere(&steps).0.is_some());
}
