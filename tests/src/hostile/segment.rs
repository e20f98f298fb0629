//! Log segments with any bytes in them: opening a log refuses what is damaged in words, or finds something, can read all that
//! it has found, and goes on from there.

#![expect(clippy::expect_used, reason = "a harness fails where what must hold does not")]

use super::Draw;
use bytes::Bytes;
use parking_lot::Mutex;
use shkv_node::disk::{Disk, DiskFile};
use shkv_node::log::format::{Place, Record, SEGMENT_HEADER_BYTES, SegmentHeader};
use shkv_node::log::recover::Recovered;
use shkv_node::log::{Log, LogEntry, LogError, ShardWrite};
use shkv_proto::{NodeId, ShardId};
use std::collections::BTreeMap;
use std::io;
use std::sync::Arc;

const NODE: NodeId = NodeId(5);
const SEGMENT_BYTES: u64 = 16 << 10;
/// A shard that is written to in the end; nothing that is built here names it.
const AFTER: u32 = 1_000_003;

/// A folder in memory.
#[derive(Clone, Default)]
struct Folder(Arc<Mutex<BTreeMap<String, Content>>>);

type Content = Arc<Mutex<Vec<u8>>>;

struct InMemory(Content);

impl Disk for Folder {
    fn create(&self, name: &str, bytes: u64) -> io::Result<Arc<dyn DiskFile>> {
        let content: Content = Arc::new(Mutex::new(vec![0; bytes as usize]));
        self.0.lock().insert(name.to_owned(), content.clone());
        Ok(Arc::new(InMemory(content)))
    }

    fn open(&self, name: &str) -> io::Result<Arc<dyn DiskFile>> {
        let content = self.0.lock().get(name).cloned().ok_or(io::ErrorKind::NotFound)?;
        Ok(Arc::new(InMemory(content)))
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let mut files = self.0.lock();
        let file = files.remove(from).ok_or(io::ErrorKind::NotFound)?;
        files.insert(to.to_owned(), file);
        Ok(())
    }

    fn remove(&self, name: &str) -> io::Result<()> {
        self.0.lock().remove(name).map(drop).ok_or_else(|| io::ErrorKind::NotFound.into())
    }

    fn list(&self) -> io::Result<Vec<String>> {
        Ok(self.0.lock().keys().cloned().collect())
    }
}

impl DiskFile for InMemory {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut content = self.0.lock();
        let end = offset as usize + bytes.len();
        content.get_mut(offset as usize..end).expect("written inside what was made ahead").copy_from_slice(bytes);
        Ok(())
    }

    fn read_at(&self, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let content = self.0.lock();
        let from = content.get(offset as usize..offset as usize + bytes.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
        bytes.copy_from_slice(from);
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }

    fn bytes(&self) -> io::Result<u64> {
        Ok(self.0.lock().len() as u64)
    }

    fn resize(&self, bytes: u64) -> io::Result<()> {
        self.0.lock().resize(bytes as usize, 0);
        Ok(())
    }
}

impl Folder {
    fn put(&self, name: String, bytes: Vec<u8>) {
        self.0.lock().insert(name, Arc::new(Mutex::new(bytes)));
    }

    fn log(&self) -> Result<(Log, BTreeMap<u32, Recovered>), LogError> {
        Log::open(Arc::new(self.clone()), NODE, SEGMENT_BYTES)
    }
}

fn name_of(segment: u64) -> String {
    format!("{segment:016x}.log")
}

fn header(segment: u64, lsn: u64, opening: u32) -> Vec<u8> {
    SegmentHeader { node: NODE, segment, lsn, opening }.encode()
}

/// Takes the bytes for a whole segment, and for what lies behind a sound header.
pub fn raw(bytes: &[u8]) {
    for content in [bytes.to_vec(), [&header(1, 1, 0)[..], bytes].concat()] {
        let folder = Folder::default();
        folder.put(name_of(1), content);
        opened(&folder);
    }
}

/// Builds segments of sound records, as the bytes choose them, and spoils some of it.
pub fn built(bytes: &[u8]) {
    let mut draw = Draw::new(bytes);
    let folder = Folder::default();
    let mut segment = 1 + draw.number() % 3;
    let mut lsn = draw.number().saturating_add(1);
    let mut indices: BTreeMap<u32, u64> = BTreeMap::new();
    for _ in 0..=draw.below(3) {
        let opening = draw.one_of(&[0, 0, 0, 1, 2]);
        let mut content = header(segment, lsn, opening);
        let mut place = u32::from(opening > 0);
        while !draw.is_empty() {
            lsn = lsn.wrapping_add(1);
            let command = draw.byte();
            let shard = 1 + u32::from(command & 1);
            let next = indices.entry(shard).or_default();
            let data = match draw.byte() {
                long @ 250.. => vec![long; 3_000],
                length => draw.bytes(usize::from(length % 32)).to_vec(),
            };
            let record = match command >> 1 & 7 {
                0..=3 => {
                    *next = if command & 16 == 0 { next.saturating_add(1) } else { draw.number() };
                    Record::Entry { index: *next, term: 1 + draw.number() % 4, kind: command >> 6, data: &data }
                }
                4 => Record::Hard { term: draw.number(), vote: draw.number(), commit: draw.number() },
                5 => Record::Base { index: draw.number(), term: draw.number() },
                6 => {
                    *next = draw.number();
                    Record::Reset { index: *next, term: draw.number() }
                }
                _ => break,
            };
            let ends_write = command & 32 == 0;
            if command & 64 != 0 && draw.byte() & 7 == 0 {
                lsn = draw.number();
            }
            record.encode(Place { segment, lsn, place, ends_write }, ShardId(shard), &mut content);
            place = if ends_write { 0 } else { place.wrapping_add(1) };
        }
        spoil(&mut content, &mut draw);
        folder.put(name_of(segment), content);
        segment = segment.saturating_add(draw.one_of(&[1, 1, 1, 2]));
        lsn = lsn.wrapping_add(1);
    }
    if draw.byte() & 15 == 1 {
        folder.put(name_of(draw.number()), header(draw.number(), draw.number(), 0));
    }
    opened(&folder);
}

fn spoil(content: &mut Vec<u8>, draw: &mut Draw<'_>) {
    match draw.byte() % 6 {
        0 | 1 => content.resize(content.len().max(SEGMENT_BYTES as usize), 0),
        2 => content.truncate(content.len().saturating_sub(draw.below(64))),
        3 => content.truncate(draw.below(content.len() + 1)),
        4 => {
            let at = draw.below(content.len());
            content[at] ^= 1 << draw.below(8);
        }
        _ => {
            // What was a former life of the segment, or a write of which only a part came.
            let from = draw.below(content.len());
            let to = (from + draw.below(2_048)).min(content.len());
            content[from.max(SEGMENT_HEADER_BYTES as usize).min(to)..to].fill(0);
        }
    }
}

/// Whatever is there: it is refused, or all of it can be read, and the log goes on.
fn opened(folder: &Folder) {
    let Ok((log, found)) = folder.log() else { return };
    check(&log, &found);
    let data = Bytes::from_static(b"after");
    let entry = LogEntry { index: 1, term: 1, kind: 0, data };
    let write = ShardWrite { shard: AFTER, entries: vec![entry.clone()], ..ShardWrite::default() };
    log.append(&[write]).expect("a log that was opened goes on");
    drop(log);
    let (log, mut again) = folder.log().expect("what was opened and written to is opened again");
    assert_eq!(log.read(ShardId(AFTER), 1, 2, u64::MAX).expect("it is there"), [entry]);
    again.remove(&AFTER);
    assert_eq!(again, found, "what was found once is found again");
}

fn check(log: &Log, found: &BTreeMap<u32, Recovered>) {
    for (shard, recovered) in found {
        for (behind, term) in (1..).zip(&recovered.terms) {
            let index = recovered.base.index + behind;
            let read = log.read(ShardId(*shard), index, index + 1, u64::MAX).expect("what was found can be read");
            assert_eq!((read.len(), read[0].index, read[0].term), (1, index, *term));
        }
    }
}
