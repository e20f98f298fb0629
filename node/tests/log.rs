//! The write-ahead log on a disk that tears writes, loses what was not synced, rots, fills up and fails to sync.

#![expect(clippy::unwrap_used, reason = "a test fails where it cannot go on")]

use bytes::Bytes;
use proptest::prelude::*;
use shkv_node::disk::{Disk, DiskFile};
use shkv_node::log::format::{
    ENTRY_FIXED_BYTES, Place, RECORD_HEADER_BYTES, Record, SEGMENT_HEADER_BYTES, SegmentHeader, record_bytes,
};
use shkv_node::log::recover::Recovered;
use shkv_node::log::writer::LogWriter;
use shkv_node::log::{Hard, Log, LogEntry, LogError, Mark, ShardWrite};
use shkv_proto::{NodeId, ShardId};
use std::collections::BTreeMap;
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, mpsc};

const NODE: NodeId = NodeId(5);
const SEGMENT: u64 = 16 << 10;
const SECTOR: usize = 512;

#[derive(Clone, Default)]
struct Content {
    durable: Vec<u8>,
    /// Writes that were not synced, in their order.
    pending: Vec<(usize, Vec<u8>)>,
}

impl Content {
    fn now(&self) -> Vec<u8> {
        let mut bytes = self.durable.clone();
        for (at, piece) in &self.pending {
            bytes[*at..*at + piece.len()].copy_from_slice(piece);
        }
        bytes
    }
}

#[derive(Default)]
struct State {
    files: BTreeMap<String, Arc<Mutex<Content>>>,
    free: Option<u64>,
    fail_sync: bool,
}

/// A disk in memory.
#[derive(Clone, Default)]
struct TestDisk(Arc<Mutex<State>>);

struct TestFile(TestDisk, Arc<Mutex<Content>>);

impl TestDisk {
    /// What is found after a crash: of each sector that was being written, `survives` says whether it got there.
    fn after_crash(&self, mut survives: impl FnMut() -> bool) -> Self {
        let after = Self::default();
        for (name, file) in &self.0.lock().unwrap().files {
            let content = file.lock().unwrap();
            let mut bytes = content.durable.clone();
            for (at, piece) in &content.pending {
                let mut from = 0;
                while from < piece.len() {
                    let to = ((at + from) / SECTOR * SECTOR + SECTOR - at).min(piece.len());
                    if survives() {
                        bytes[at + from..at + to].copy_from_slice(&piece[from..to]);
                    }
                    from = to;
                }
            }
            let content = Content { durable: bytes, pending: vec![] };
            after.0.lock().unwrap().files.insert(name.clone(), Arc::new(Mutex::new(content)));
        }
        after
    }

    fn flip(&self, name: &str, at: usize) {
        self.0.lock().unwrap().files[name].lock().unwrap().durable[at] ^= 0x10;
    }

    fn names(&self) -> Vec<String> {
        self.0.lock().unwrap().files.keys().filter(|name| name.ends_with(".log")).cloned().collect()
    }
}

impl Disk for TestDisk {
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let mut state = self.0.lock().unwrap();
        if let Some(free) = &mut state.free {
            *free = free.checked_sub(bytes).ok_or(io::ErrorKind::StorageFull)?;
        }
        let content = Arc::new(Mutex::new(Content { durable: vec![0; bytes as usize], pending: vec![] }));
        let before = state.files.insert(name.into(), content.clone());
        if before.is_some() {
            return Err(io::Error::other(format!("{name} is made twice")));
        }
        Ok(Arc::new(TestFile(self.clone(), content)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let content = self.0.lock().unwrap().files.get(name).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(TestFile(self.clone(), content)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut state = self.0.lock().unwrap();
        let file = state.files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        assert!(state.files.insert(to.into(), file).is_none(), "{to} is written over");
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.lock().unwrap().files.remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().unwrap().files.keys().cloned().collect())
    }
}

impl DiskFile for TestFile {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut content = self.1.lock().unwrap();
        assert!(offset as usize + bytes.len() <= content.durable.len(), "a write beyond what was made ahead");
        content.pending.push((offset as usize, bytes.to_vec()));
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let now = self.1.lock().unwrap().now();
        let from = now.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        if self.0.0.lock().unwrap().fail_sync {
            return Err(io::Error::other("the disk is gone"));
        }
        let mut content = self.1.lock().unwrap();
        content.durable = content.now();
        content.pending.clear();
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.1.lock().unwrap().durable.len() as u64)
    }

    fn resize(&self, _: u64) -> io::Result<()> {
        unreachable!("the log never resizes a file")
    }
}

fn open(disk: &TestDisk) -> Result<(Log, BTreeMap<u32, Recovered>), LogError> {
    Log::open(Arc::new(disk.clone()), NODE, SEGMENT)
}

fn entry(index: u64, term: u64, bytes: usize) -> LogEntry {
    LogEntry { index, term, kind: 0, data: Bytes::from(vec![index as u8; bytes]) }
}

fn write(shard: u32, term: u64, entries: Vec<LogEntry>) -> ShardWrite {
    let commit = entries.first().map_or(0, |entry| entry.index - 1);
    ShardWrite { shard, reset: None, entries, hard: Some(Hard { term, vote: 1, commit }) }
}

#[test]
fn what_was_appended_comes_back_and_can_be_read() {
    let disk = TestDisk::default();
    let (log, found) = open(&disk).unwrap();
    assert!(found.is_empty());
    log.append(&[write(1, 1, vec![entry(1, 1, 10), entry(2, 1, 20)]), write(2, 3, vec![entry(1, 3, 0)])]).unwrap();
    log.append(&[write(1, 2, vec![entry(2, 2, 30), entry(3, 2, 5)])]).unwrap();
    for log in [log, open(&disk).unwrap().0] {
        let entries = log.read(ShardId(1), 1, 4, u64::MAX).unwrap();
        assert_eq!(entries, [entry(1, 1, 10), entry(2, 2, 30), entry(3, 2, 5)]);
        assert_eq!(log.read(ShardId(1), 1, 4, 1).unwrap().len(), 1, "at least one");
        assert!(matches!(log.read(ShardId(1), 4, 5, 1), Err(LogError::Corrupt(_))));
    }
    let found = open(&disk).unwrap().1;
    assert_eq!(found[&1].terms, [1, 2, 2]);
    assert_eq!(found[&1].hard, Hard { term: 2, vote: 1, commit: 1 });
    assert_eq!(found[&2].terms, [3]);
}

#[test]
fn segments_are_used_again_and_given_up_oldest_first() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    for index in 1..=200 {
        log.append(&[write(1, 1, vec![entry(index, 1, 500)])]).unwrap();
        if index == 3 {
            log.append(&[write(2, 7, vec![entry(1, 7, 10)])]).unwrap();
        }
    }
    let before = disk.names().len();
    assert!(before >= 6, "{before}");
    let nothing = log.release(&BTreeMap::from([(1, 200), (2, 0)]), 0).unwrap();
    assert!(nothing.is_empty(), "the entry of shard 2 in the oldest segment is not flushed: {nothing:?}");
    let released = log.release(&BTreeMap::from([(1, 150), (2, 1)]), 0).unwrap();
    assert!(disk.names().len() < before && released[&2] == 1 && (100..=150).contains(&released[&1]), "{released:?}");
    let (log, found) = open(&disk).unwrap();
    assert_eq!(found[&1].base, Mark { index: released[&1], term: 1 });
    assert_eq!(found[&1].base.index + found[&1].terms.len() as u64, 200);
    assert_eq!((found[&2].base, found[&2].hard.term), (Mark { index: 1, term: 7 }, 7), "it outlives its segment");
    for index in 201..=400 {
        log.append(&[write(1, 1, vec![entry(index, 1, 500)])]).unwrap();
        log.release(&BTreeMap::from([(1, index), (2, 1)]), 2 * SEGMENT).unwrap();
    }
    assert!(disk.names().len() <= 3, "{:?}", disk.names());
    let (log, found) = open(&disk).unwrap();
    assert_eq!(found[&1].base.index + found[&1].terms.len() as u64, 400);
    assert_eq!(log.read(ShardId(1), 400, 401, 1).unwrap(), [entry(400, 1, 500)]);
}

#[test]
fn an_entry_larger_than_a_segment_has_one_of_its_own_size() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    let large = LogEntry { data: Bytes::from(vec![7; 3 * SEGMENT as usize]), ..entry(2, 1, 0) };
    log.append(&[write(1, 1, vec![entry(1, 1, 10)])]).unwrap();
    log.append(&[write(1, 1, vec![large.clone()])]).unwrap();
    log.append(&[write(1, 1, vec![entry(3, 1, 10)])]).unwrap();
    let (log, found) = open(&disk).unwrap();
    assert_eq!(found[&1].terms, [1, 1, 1]);
    assert_eq!(log.read(ShardId(1), 2, 3, 1).unwrap(), [large]);
}

#[test]
fn a_segment_made_in_need_and_one_made_ahead_are_two() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let ahead = scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                log.make_spares()?;
            }
            Ok::<(), LogError>(())
        });
        let written =
            (1..=300).try_for_each(|index| log.append(&[write(1, 1, vec![entry(index, 1, SEGMENT as usize / 2)])]));
        done.store(true, Ordering::Relaxed);
        written.unwrap();
        ahead.join().unwrap().unwrap();
    });
    let found = open(&disk).unwrap().1;
    assert_eq!(found[&1].base.index + found[&1].terms.len() as u64, 300);
}

#[test]
fn a_reset_voids_what_was_before() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    log.append(&[write(1, 1, vec![entry(1, 1, 10), entry(2, 1, 10)])]).unwrap();
    let reset = ShardWrite { reset: Some(Mark { index: 90, term: 4 }), ..write(1, 5, vec![entry(91, 5, 10)]) };
    log.append(&[reset]).unwrap();
    let found = open(&disk).unwrap().1;
    assert_eq!((found[&1].base, &found[&1].terms[..]), (Mark { index: 90, term: 4 }, &[5][..]));
}

#[test]
fn a_forgotten_shard_leaves_nothing_and_pins_nothing() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    for index in 1..=100 {
        log.append(&[write(1, 1, vec![entry(index, 1, 500)]), write(2, 4, vec![entry(index, 4, 100)])]).unwrap();
    }
    // In one append with what came before it, and with what a later replica of the shard writes.
    let before = write(1, 1, vec![entry(101, 1, 10)]);
    let after = ShardWrite { hard: None, ..write(1, 0, vec![entry(1, 9, 10)]) };
    log.append(&[before, ShardWrite::forget(1)]).unwrap();
    assert!(!open(&disk).unwrap().1.contains_key(&1));
    log.append(&[ShardWrite::forget(1), after]).unwrap();
    for log in [log, open(&disk).unwrap().0] {
        assert_eq!(log.read(ShardId(1), 1, 2, u64::MAX).unwrap(), [entry(1, 9, 10)]);
        assert!(log.read(ShardId(1), 2, 3, u64::MAX).is_err());
    }
    let (log, found) = open(&disk).unwrap();
    assert_eq!((found[&1].base, found[&1].hard, &found[&1].terms[..]), (Mark::default(), Hard::default(), &[9][..]));
    // The later replica has flushed nothing; the entries of the first one keep no segment all the same.
    let segments = disk.names().len();
    log.release(&BTreeMap::from([(1, 0), (2, 100)]), 0).unwrap();
    assert!(disk.names().len() < segments && disk.names().len() <= 2, "{:?}", disk.names());
    log.append(&[ShardWrite::forget(1)]).unwrap();
    for index in 101..=200 {
        log.append(&[write(2, 4, vec![entry(index, 4, 500)])]).unwrap();
        log.release(&BTreeMap::from([(2, index)]), 0).unwrap();
    }
    let (log, found) = open(&disk).unwrap();
    assert!(!found.contains_key(&1) && found[&2].hard.term == 4, "{found:?}");
    assert!(!log.is_new());
}

#[test]
fn damage_where_it_was_durable_is_refused_and_said() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    for index in 1..=100 {
        log.append(&[write(1, 1, vec![entry(index, 1, 400)])]).unwrap();
    }
    drop(log);
    let names = disk.names();
    assert!(names.len() > 2);
    let refused = |damage: &dyn Fn(&TestDisk)| {
        let copy = disk.after_crash(|| false);
        damage(&copy);
        match open(&copy) {
            Err(LogError::Corrupt(text)) => text,
            Err(other) => panic!("{other}"),
            Ok(_) => panic!("a damaged log was opened"),
        }
    };
    assert!(refused(&|disk| disk.flip(&names[0], 5_000)).contains("missing"));
    assert!(refused(&|disk| disk.flip(names.last().unwrap(), 4_096 + 60)).contains("behind it is sound"));
    assert!(refused(&|disk| disk.flip(&names[1], 9)).contains("segment"));
    assert!(refused(&|disk| disk.remove(&names[1]).unwrap()).contains("missing"));
    let other = Log::open(Arc::new(disk.after_crash(|| false)), NodeId(6), SEGMENT);
    assert!(matches!(other, Err(LogError::Corrupt(text)) if text.contains("belongs to node")));
}

#[test]
fn a_full_disk_takes_nothing_and_goes_on_when_there_is_room() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    disk.0.lock().unwrap().free = Some(2 * SEGMENT);
    let mut index = 0;
    let error = loop {
        match log.append(&[write(1, 1, vec![entry(index + 1, 1, 1_000)])]) {
            Ok(()) => index += 1,
            Err(error) => break error,
        }
    };
    assert!(matches!(error, LogError::NoSpace(_)), "{error}");
    assert!(index > 20);
    assert_eq!(open(&disk.after_crash(|| true)).unwrap().1[&1].terms.len() as u64, index);
    disk.0.lock().unwrap().free = Some(SEGMENT);
    log.append(&[write(1, 1, vec![entry(index + 1, 1, 1_000)])]).unwrap();
    assert_eq!(open(&disk).unwrap().1[&1].terms.len() as u64, index + 1);
}

/// Two torn writes at the same place, one life after the other: the end of the first must not complete the second, or the
/// log would hold entries of which no leader has ever had the one behind the other.
#[test]
fn a_torn_write_is_not_completed_by_what_an_earlier_one_has_left() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    log.append(&[write(1, 1, vec![entry(1, 1, 10)])]).unwrap();
    let torn = |disk: &TestDisk, entries: Vec<LogEntry>, survives: fn(usize) -> bool| {
        let (log, _) = open(disk).unwrap();
        disk.0.lock().unwrap().fail_sync = true;
        assert!(log.append(&[write(1, entries[0].term, entries)]).is_err());
        let mut sector = 0;
        disk.after_crash(|| {
            sector += 1;
            survives(sector)
        })
    };
    // Each entry has sectors of its own, but for the first few bytes of the second.
    let first = torn(&disk, vec![entry(2, 2, 2_000), entry(3, 2, 2_000), entry(4, 2, 10)], |sector| sector > 5);
    assert_eq!(open(&first).unwrap().1[&1].terms, [1]);
    let second = torn(&first, vec![entry(2, 3, 2_000), entry(3, 3, 2_000), entry(4, 3, 10)], |sector| sector <= 7);
    assert_eq!(open(&second).unwrap().1[&1].terms, [1]);
    let (log, _) = open(&second).unwrap();
    log.append(&[write(1, 4, vec![entry(2, 4, 10)])]).unwrap();
    assert_eq!(open(&second).unwrap().1[&1].terms, [1, 4]);
}

/// A file that has become shorter was not torn by a crash: segments are as long as they will be before they are used.
#[test]
fn a_segment_that_is_cut_off_in_a_record_or_its_header_is_refused() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    log.append(&[write(1, 1, vec![entry(1, 1, 8)])]).unwrap();
    let [name] = &disk.names()[..] else { panic!("{:?}", disk.names()) };
    // Header, record of the hard state, record of the entry without the zeroes that fill it up.
    let end = SEGMENT_HEADER_BYTES as usize + record_bytes(24) + RECORD_HEADER_BYTES + ENTRY_FIXED_BYTES + 8;
    for length in [end, end + 1, 1_000, 44] {
        let cut = disk.after_crash(|| true);
        cut.0.lock().unwrap().files[name].lock().unwrap().durable.truncate(length);
        let error = open(&cut).err().expect("it is damaged");
        assert!(matches!(&error, LogError::Corrupt(text) if text.contains("cut off")), "{length} bytes: {error}");
    }
}

#[test]
fn numbers_that_no_log_has_are_refused() {
    let header = |segment, lsn| SegmentHeader { node: NODE, segment, lsn, opening: 0 }.encode();
    let name = |segment: u64| format!("{segment:016x}.log");
    let entry = |index| {
        let mut bytes = header(1, 1);
        let record = Record::Entry { index, term: 1, kind: 0, data: b"" };
        record.encode(Place { segment: 1, lsn: 2, place: 0, ends_write: true }, ShardId(1), &mut bytes);
        bytes
    };
    let files = [
        (name(u64::MAX), header(u64::MAX, 1)),
        (name(0), header(0, 1)),
        (name(1), header(1, u64::MAX)),
        (name(1), entry(u64::MAX)),
    ];
    for (name, mut bytes) in files {
        bytes.resize(SEGMENT as usize, 0);
        let disk = TestDisk::default();
        let content = Content { durable: bytes, pending: vec![] };
        disk.0.lock().unwrap().files.insert(name.clone(), Arc::new(Mutex::new(content)));
        assert!(matches!(open(&disk), Err(LogError::Corrupt(_))), "{name}");
    }
}

#[test]
fn a_failed_sync_is_final() {
    let disk = TestDisk::default();
    let (log, _) = open(&disk).unwrap();
    log.append(&[write(1, 1, vec![entry(1, 1, 10)])]).unwrap();
    disk.0.lock().unwrap().fail_sync = true;
    let error = log.append(&[write(1, 1, vec![entry(2, 1, 10)])]).unwrap_err();
    assert!(matches!(&error, LogError::Io { what, .. } if what == "fdatasync"), "{error}");
}

/// A writer over a disk, with what it tells: tickets, and why it has failed.
fn writer(disk: &TestDisk) -> (LogWriter, mpsc::Receiver<Result<u64, String>>) {
    let (tell, told) = mpsc::channel();
    let failed = tell.clone();
    let synced =
        move |tickets: Vec<(u32, u64)>| tickets.into_iter().for_each(|(_, output)| tell.send(Ok(output)).unwrap());
    let fatal = move |reason| failed.send(Err(reason)).unwrap();
    let log = Arc::new(open(disk).unwrap().0);
    (LogWriter::start(log, Box::new(synced), Box::new(fatal)).unwrap(), told)
}

#[test]
fn writes_of_two_threads_never_overtake_each_other_and_are_durable_when_they_are_told() {
    let disk = TestDisk::default();
    let (writer, told) = writer(&disk);
    let (mut here, mut elsewhere) = (0, 0);
    for index in 1..=400 {
        let writes = vec![write(1, 1, vec![entry(index, 1, 100)])];
        let tickets = vec![(1, index)];
        if index % 3 == 0 {
            writer.submit(writes, tickets);
        } else if let Some(done) = writer.write_here(writes, tickets) {
            assert_eq!(done, [(1, index)]);
            here += 1;
            // A crash now loses nothing of it.
            let (_, found) = open(&disk.after_crash(|| false)).unwrap();
            assert_eq!(found[&1].terms.len() as u64, index);
        }
        if index % 50 == 0 {
            while here + elsewhere < index {
                told.recv().unwrap().unwrap();
                elsewhere += 1;
            }
        }
    }
    writer.stop();
    assert!(here > 0 && elsewhere >= 133, "{here} here, {elsewhere} on the thread");
}

#[test]
fn a_sync_that_fails_on_the_callers_thread_is_final() {
    let disk = TestDisk::default();
    let (writer, told) = writer(&disk);
    writer.submit(vec![write(1, 1, vec![entry(1, 1, 10)])], vec![(1, 1)]);
    assert_eq!(told.recv().unwrap(), Ok(1));
    disk.0.lock().unwrap().fail_sync = true;
    assert_eq!(writer.write_here(vec![write(1, 1, vec![entry(2, 1, 10)])], vec![(1, 2)]), None);
    assert!(told.recv().unwrap().unwrap_err().contains("fdatasync"));
    disk.0.lock().unwrap().fail_sync = false;
    assert_eq!(writer.write_here(vec![write(1, 1, vec![entry(2, 1, 10)])], vec![(1, 2)]), None, "never again");
    writer.submit(vec![write(1, 1, vec![entry(2, 1, 10)])], vec![(1, 2)]);
    writer.stop();
    assert!(told.try_recv().is_err(), "nothing more is told");
}

#[test]
fn what_finds_no_space_on_the_callers_thread_is_left_to_the_writers() {
    let disk = TestDisk::default();
    let (writer, told) = writer(&disk);
    disk.0.lock().unwrap().free = Some(2 * SEGMENT);
    let mut index = 0;
    'full: loop {
        index += 1;
        assert!(index < 1_000, "the disk is full");
        match writer.write_here(vec![write(1, 1, vec![entry(index, 1, 1_000)])], vec![(1, index)]) {
            Some(done) => assert_eq!(done, [(1, index)]),
            None => loop {
                if writer.no_space() {
                    break 'full;
                }
                if let Ok(told) = told.try_recv() {
                    assert_eq!(told.unwrap(), index, "it was written by the other thread");
                    break;
                }
                std::thread::yield_now();
            },
        }
    }
    disk.0.lock().unwrap().free = None;
    assert_eq!(told.recv().unwrap().unwrap(), index, "there is space again");
    writer.stop();
    assert_eq!(open(&disk).unwrap().1[&1].terms.len() as u64, index);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    /// Whatever part of the last write reaches the disk, recovery takes all of it or nothing of it, everything before it,
    /// and goes on from there; again and again.
    #[test]
    fn a_torn_write_is_taken_whole_or_not_at_all(
        lives in prop::collection::vec((prop::collection::vec((1..4_u64, 0..1_500_usize), 1..12), any::<u64>()), 1..5)
    ) {
        let mut disk = TestDisk::default();
        let mut durable = 0;
        for (writes, luck) in lives {
            let (log, found) = open(&disk).unwrap();
            durable = found.get(&1).map_or(durable, |shard| shard.base.index + shard.terms.len() as u64);
            let torn = writes.len() - 1;
            let mut before = disk.clone();
            let mut last = durable;
            for (at, (count, bytes)) in writes.into_iter().enumerate() {
                let entries: Vec<_> = (1..=count).map(|n| entry(last + n, 1, bytes)).collect();
                if at == torn {
                    disk.0.lock().unwrap().fail_sync = true; // the write happens, its sync does not
                    let result = log.append(&[write(1, 1, entries), write(2, 1, vec![])]);
                    disk.0.lock().unwrap().fail_sync = false;
                    prop_assert!(result.is_err());
                } else {
                    log.append(&[write(1, 1, entries), write(2, 1, vec![])]).unwrap();
                    durable += count;
                }
                last += count;
            }
            let mut luck = luck;
            before = before.after_crash(|| { luck = luck.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1); luck >> 63 == 1 });
            let (log, found) = open(&before).unwrap();
            let has = found.get(&1).map_or(0, |shard| shard.base.index + shard.terms.len() as u64);
            prop_assert!(has == durable || has == last, "{has} entries, {durable} were acknowledged, {last} written");
            if has > 0 {
                let entries = log.read(ShardId(1), 1, has + 1, u64::MAX).unwrap();
                prop_assert!(entries.iter().zip(1..).all(|(entry, index)| entry.index == index && entry.data.iter().all(|byte| *byte == index as u8)));
            }
            drop(log);
            durable = has;
            disk = before;
        }
    }
}
