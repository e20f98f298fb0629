//! Opening a log: reads every segment, tells a torn end from damage, and hands over what each shard had.

use super::format::{self, Placed, Record, SEGMENT_HEADER_BYTES, SegmentHeader, decode_record, later_write};
use super::{Cursor, Hard, Index, Log, LogError, Mark, Position, Segment, ShardLog, io_error};
use crate::disk::{Disk, DiskFile};
use parking_lot::Mutex;
use shkv_proto::NodeId;
use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;

/// No segment, record or entry has a number beyond: what says so is damaged, however sound its check is.
pub const NUMBER_MAX: u64 = 1 << 62;

/// What the log had of a shard.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Recovered {
    /// Its hard state.
    pub hard: Hard,
    /// The log begins behind this.
    pub base: Mark,
    /// The terms of the entries behind the base.
    pub terms: Vec<u64>,
}

impl Log {
    /// Opens the log in a folder, or begins one in an empty folder.
    ///
    /// # Errors
    /// [`LogError::Corrupt`] when something that was durable is damaged or missing; [`LogError::NoSpace`];
    /// [`LogError::Io`].
    pub fn open(
        disk: Arc<dyn Disk>,
        node: NodeId,
        segment_bytes: u64,
    ) -> Result<(Self, BTreeMap<u32, Recovered>), LogError> {
        let mut ids = Vec::new();
        let mut spares = Vec::new();
        for name in disk.list().map_err(io_error("list"))? {
            if let Some(id) = name.strip_suffix(".log").and_then(|hex| u64::from_str_radix(hex, 16).ok()) {
                if !(1..=NUMBER_MAX).contains(&id) {
                    return Err(LogError::Corrupt(format!("no segment has the number that {name} says")));
                }
                ids.push(id);
            } else if name.starts_with("spare-") {
                let file = disk.open(&name).map_err(io_error("open of a spare segment"))?;
                if file.bytes().map_err(io_error("size of a spare segment"))? == segment_bytes {
                    spares.push((name, file));
                } else {
                    disk.remove(&name).map_err(io_error("removal of a spare segment"))?;
                }
            }
        }
        ids.sort_unstable();
        let mut replay = Replay { node, expected: None, shards: BTreeMap::new(), last: BTreeMap::new() };
        let mut segments = BTreeMap::new();
        let mut cursor =
            Cursor { segment: ids.last().copied().unwrap_or(0), offset: 0, capacity: 0, lsn: 1, buffer: vec![] };
        for (at, id) in ids.iter().enumerate() {
            if at > 0 && ids[at - 1] + 1 != *id {
                return Err(LogError::Corrupt(format!("segment {:x} is missing", ids[at - 1] + 1)));
            }
            let name = Self::segment_name(*id);
            let file = disk.open(&name).map_err(io_error(format!("open of {name}")))?;
            let length = file.bytes().map_err(io_error(format!("size of {name}")))?;
            let mut bytes = vec![0; length as usize];
            file.read_at(&mut bytes, 0).map_err(io_error(format!("read of {name}")))?;
            let is_last = at + 1 == ids.len();
            let Some(end) = replay.segment(*id, &bytes, is_last)? else {
                // The crash came before the segment's opening was durable: nothing was ever acknowledged from it.
                disk.remove(&name).map_err(io_error(format!("removal of {name}")))?;
                cursor.segment = id - 1;
                if let Some(before) = segments.get(&cursor.segment) {
                    let before: &Segment = before;
                    cursor.offset = before.bytes; // full: the next write opens a new segment
                    cursor.capacity = before.bytes;
                }
                break;
            };
            // What a torn write has left behind the end is sound where it stands. A write of the same lsn that is torn in its
            // turn could be completed by it, so nothing more is written there.
            let torn = is_last && later_write(*id, &bytes[end..], replay.expected.unwrap_or(1) - 1).is_some();
            cursor.offset = if torn { length } else { end as u64 };
            cursor.capacity = length;
            segments.insert(*id, Segment { file: file as Arc<dyn DiskFile>, bytes: length, last: BTreeMap::new() });
        }
        cursor.lsn = replay.expected.unwrap_or(1);
        for (id, last) in replay.last {
            if let Some(segment) = segments.get_mut(&id) {
                segment.last = last;
            }
        }
        replay.shards.retain(|_, log| !log.is_blank());
        let recovered = replay.shards.iter().map(|(shard, log)| (*shard, log.recovered())).collect();
        let index = Mutex::new(Index { shards: replay.shards, segments, spares });
        let log =
            Self { disk, node, segment_bytes, index, cursor: Mutex::new(cursor), spares_made: AtomicU64::default() };
        Ok((log, recovered))
    }
}

impl ShardLog {
    fn recovered(&self) -> Recovered {
        Recovered { hard: self.hard, base: self.base, terms: self.entries.iter().map(|entry| entry.term).collect() }
    }
}

struct Replay {
    node: NodeId,
    /// The lsn that comes next; unknown before the first segment.
    expected: Option<u64>,
    shards: BTreeMap<u32, ShardLog>,
    /// By segment, the last entry of each shard in it that was not voided by a reset.
    last: BTreeMap<u64, BTreeMap<u32, u64>>,
}

impl Replay {
    /// Takes a segment in. Returns where it ends; `None` for a segment that was never begun.
    fn segment(&mut self, id: u64, bytes: &[u8], is_last: bool) -> Result<Option<usize>, LogError> {
        let records = bytes.get(SEGMENT_HEADER_BYTES as usize..).unwrap_or(&[]);
        let corrupt = |text: String| LogError::Corrupt(format!("segment {id:x}: {text}"));
        let header = match SegmentHeader::decode(bytes) {
            Ok(header) if header.segment == id => header,
            // A segment that is used again has its old header until its opening is durable.
            Ok(SegmentHeader { segment, .. }) if segment > id => {
                return Err(corrupt(format!("its header says {segment:x}")));
            }
            _ if is_last && later_write(id, records, self.expected.unwrap_or(1)).is_none() => return Ok(None),
            Ok(header) => return Err(corrupt(format!("its header says {:x}", header.segment))),
            Err(error) => return Err(corrupt(error)),
        };
        if header.node != self.node {
            return Err(corrupt(format!("it belongs to node {}, this is node {}", header.node, self.node)));
        }
        if bytes.len() < SEGMENT_HEADER_BYTES as usize {
            return Err(corrupt("it is cut off in its header".into()));
        }
        if header.lsn > NUMBER_MAX {
            return Err(corrupt(format!("no record has the number {}", header.lsn)));
        }
        if self.expected.is_some_and(|expected| expected != header.lsn) {
            let expected = self.expected.unwrap_or_default();
            return Err(corrupt(format!("records {expected} to {} before it are missing", header.lsn)));
        }
        let mut offset = SEGMENT_HEADER_BYTES as usize;
        // The first write is the header with the opening; the lsn of a write is that of its first record.
        let mut write: Vec<(usize, Placed<'_>)> = Vec::new();
        let mut next = offset;
        let mut next_lsn = header.lsn + 1;
        let mut write_lsn = if header.opening == 0 { next_lsn } else { header.lsn };
        loop {
            let placed = bytes.get(next..).and_then(|rest| decode_record(id, rest));
            let Some(placed) = placed.filter(|placed| placed.lsn == next_lsn && placed.write_lsn == write_lsn) else {
                break;
            };
            if placed.bytes > bytes.len() - next {
                return Err(corrupt(format!("it is cut off in record {next_lsn}")));
            }
            let ends_write = placed.ends_write;
            let start = next;
            next += placed.bytes;
            next_lsn += 1;
            write.push((start, placed));
            if ends_write {
                for (start, placed) in write.drain(..) {
                    self.record(id, start, &placed).map_err(corrupt)?;
                }
                offset = next;
                write_lsn = next_lsn;
            }
        }
        // A segment before the last is held to its successor's lsn. Behind the end of the last one nothing of a later
        // write may be.
        if is_last && let Some(later) = later_write(id, bytes.get(offset..).unwrap_or(&[]), next_lsn) {
            return Err(corrupt(format!("record {next_lsn} is bad, but record {later} behind it is sound")));
        }
        if write_lsn == header.lsn {
            return if is_last { Ok(None) } else { Err(corrupt("its opening is damaged".into())) };
        }
        self.expected = Some(write_lsn);
        Ok(Some(offset))
    }

    fn record(&mut self, segment: u64, start: usize, placed: &Placed<'_>) -> Result<(), String> {
        if let Record::Entry { index, .. } | Record::Base { index, .. } | Record::Reset { index, .. } = placed.record
            && index > NUMBER_MAX
        {
            return Err(format!("shard {}: no entry has the number {index}", placed.shard));
        }
        let shard = self.shards.entry(placed.shard.0).or_default();
        match placed.record {
            Record::Entry { index, term, data, .. } => {
                let payload = (format::ENTRY_FIXED_BYTES + data.len()) as u32;
                let position = Position { term, segment, offset: start as u64, payload };
                shard.put(index, position).map_err(|text| format!("shard {}: {text}", placed.shard))?;
                let last = self.last.entry(segment).or_default().entry(placed.shard.0).or_default();
                *last = index.max(*last);
            }
            Record::Hard { term, vote, commit } => shard.hard = Hard { term, vote, commit },
            // Only the oldest segment that is left has anything to learn from it.
            Record::Base { index, term } if shard.entries.is_empty() && shard.base.index < index => {
                shard.base = Mark { index, term };
            }
            Record::Base { .. } => {}
            Record::Reset { index, term } => {
                shard.base = Mark { index, term };
                shard.entries.clear();
                for last in self.last.values_mut() {
                    last.remove(&placed.shard.0);
                }
            }
        }
        Ok(())
    }
}
