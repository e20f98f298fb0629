//! The bytes of a log segment. Pure.
//!
//! A segment is a header block and records. A record is
//! ```text
//! offset size
//!  0      4   payload length
//!  4      4   crc32 over the segment's id, everything behind this field, and the payload
//!  8      8   lsn: 1, 2, 3 … over all records and segment headers without a gap
//! 16      4   place: how many records of the same write came before this one
//! 20      4   shard
//! 24      1   kind
//! 25      1   1 in the last record of a write, else 0
//! 26      6   zero
//! 32      …   payload, filled up with zeroes to a multiple of 8
//! ```
//! All numbers are little-endian. The segment's id is in the check so that records of a segment's former life are not
//! taken for its own. `place` tells which records were durable when this one was written: all before its write. A bad
//! record that a later one proves to have been durable is corruption; any other bad record at the end is a torn write. A write without its last record never counts: it is taken whole or not at all.

use shkv_proto::{NodeId, ShardId};

/// Bytes before the first record.
pub const SEGMENT_HEADER_BYTES: u64 = 4096;
/// Bytes before a record's payload.
pub const RECORD_HEADER_BYTES: usize = 32;
/// Longest payload: an entry with the largest write.
pub const PAYLOAD_BYTES_MAX: usize = shkv_proto::limits::FRAME_BYTES_MAX + (1 << 20);
const SEGMENT_MAGIC: [u8; 8] = *b"shkvlog\0";
const FORMAT: u32 = 1;
/// Bytes of an entry's payload before its data.
pub const ENTRY_FIXED_BYTES: usize = 17;

/// The header of a segment.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct SegmentHeader {
    /// The node that the log belongs to.
    pub node: NodeId,
    /// Segments are numbered in the order of use; a number is never used twice.
    pub segment: u64,
    /// Its place in the order of all records: the header takes an lsn as a record does.
    pub lsn: u64,
    /// How many records were written together with it.
    pub opening: u32,
}

impl SegmentHeader {
    /// Its bytes.
    #[must_use]
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(SEGMENT_HEADER_BYTES as usize);
        bytes.extend_from_slice(&SEGMENT_MAGIC);
        bytes.extend_from_slice(&FORMAT.to_le_bytes());
        bytes.extend_from_slice(&self.node.0.to_le_bytes());
        bytes.extend_from_slice(&self.segment.to_le_bytes());
        bytes.extend_from_slice(&self.lsn.to_le_bytes());
        bytes.extend_from_slice(&self.opening.to_le_bytes());
        let check = crc32fast::hash(&bytes);
        bytes.extend_from_slice(&check.to_le_bytes());
        bytes.resize(SEGMENT_HEADER_BYTES as usize, 0);
        bytes
    }

    /// Reads a header.
    ///
    /// # Errors
    /// What is wrong with it, in words.
    pub fn decode(bytes: &[u8]) -> Result<Self, String> {
        if bytes.len() < 44 || bytes[..8] != SEGMENT_MAGIC {
            return Err("no segment header".into());
        }
        if u32_at(bytes, 40) != crc32fast::hash(&bytes[..40]) {
            return Err("segment header with a wrong check".into());
        }
        let format = u32_at(bytes, 8);
        if format != FORMAT {
            return Err(format!("segment format {format}, this build knows {FORMAT}"));
        }
        Ok(Self {
            node: NodeId(u64_at(bytes, 12)),
            segment: u64_at(bytes, 20),
            lsn: u64_at(bytes, 28),
            opening: u32_at(bytes, 36),
        })
    }
}

/// Where a record stands.
#[derive(Clone, Copy, Debug)]
pub struct Place {
    /// Its segment.
    pub segment: u64,
    /// Its lsn.
    pub lsn: u64,
    /// How many records of the same write came before it.
    pub place: u32,
    /// Whether the write ends with it.
    pub ends_write: bool,
}

/// What a record says.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Record<'a> {
    /// A Raft entry. It voids every entry of the shard from its index on that came before it.
    Entry {
        /// Index.
        index: u64,
        /// Term.
        term: u64,
        /// As in [`shkv_proto::message::EntryHead::kind`].
        kind: u8,
        /// Its data.
        data: &'a [u8],
    },
    /// Raft's hard state.
    Hard {
        /// Term.
        term: u64,
        /// Whom the replica voted for in that term; 0 is nobody.
        vote: u64,
        /// Commit index.
        commit: u64,
    },
    /// Entries up to `index` are in earlier segments, or gone with them.
    Base {
        /// The last of them.
        index: u64,
        /// Its term.
        term: u64,
    },
    /// The log begins anew behind `index`: a snapshot was installed.
    Reset {
        /// The last index that the snapshot covers.
        index: u64,
        /// Its term.
        term: u64,
    },
}

/// A record with where it stands in the order of all records.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Placed<'a> {
    /// Its lsn.
    pub lsn: u64,
    /// The lsn of the first record of the same write.
    pub write_lsn: u64,
    /// The shard.
    pub shard: ShardId,
    /// Whether the write ends with it.
    pub ends_write: bool,
    /// The record.
    pub record: Record<'a>,
    /// Bytes up to the next record.
    pub bytes: usize,
}

/// The bytes that a record with a payload of this length takes.
#[must_use]
pub fn record_bytes(payload: usize) -> usize {
    RECORD_HEADER_BYTES + payload.next_multiple_of(8)
}

impl Record<'_> {
    /// The length of the payload.
    #[must_use]
    pub fn payload_bytes(&self) -> usize {
        match self {
            Self::Entry { data, .. } => ENTRY_FIXED_BYTES + data.len(),
            Self::Hard { .. } => 24,
            Self::Base { .. } | Self::Reset { .. } => 16,
        }
    }

    /// Appends the record.
    pub fn encode(&self, at: Place, shard: ShardId, out: &mut Vec<u8>) {
        let start = out.len();
        out.extend_from_slice(&(self.payload_bytes() as u32).to_le_bytes());
        out.extend_from_slice(&[0; 4]);
        out.extend_from_slice(&at.lsn.to_le_bytes());
        out.extend_from_slice(&at.place.to_le_bytes());
        out.extend_from_slice(&shard.0.to_le_bytes());
        let kind = match self {
            Self::Entry { .. } => 1_u8,
            Self::Hard { .. } => 2,
            Self::Base { .. } => 3,
            Self::Reset { .. } => 4,
        };
        out.extend_from_slice(&[kind, u8::from(at.ends_write), 0, 0, 0, 0, 0, 0]);
        match self {
            Self::Entry { index, term, kind, data } => {
                out.extend_from_slice(&index.to_le_bytes());
                out.extend_from_slice(&term.to_le_bytes());
                out.push(*kind);
                out.extend_from_slice(data);
            }
            Self::Hard { term, vote, commit } => {
                for number in [term, vote, commit] {
                    out.extend_from_slice(&number.to_le_bytes());
                }
            }
            Self::Base { index, term } | Self::Reset { index, term } => {
                out.extend_from_slice(&index.to_le_bytes());
                out.extend_from_slice(&term.to_le_bytes());
            }
        }
        let end = out.len();
        let check = record_check(at.segment, &out[start + 8..end]);
        out[start + 4..start + 8].copy_from_slice(&check.to_le_bytes());
        out.resize(start + record_bytes(end - start - RECORD_HEADER_BYTES), 0);
    }
}

/// Reads the record that begins `bytes`. `None` if there is no whole, sound record.
#[must_use]
pub fn decode_record(segment: u64, bytes: &[u8]) -> Option<Placed<'_>> {
    let header = bytes.get(..RECORD_HEADER_BYTES)?;
    let length = u32_at(header, 0) as usize;
    if length > PAYLOAD_BYTES_MAX {
        return None;
    }
    let end = RECORD_HEADER_BYTES + length;
    let checked = bytes.get(8..end)?;
    let is_sound = u32_at(header, 4) == record_check(segment, checked);
    #[cfg(feature = "sim")]
    let is_sound = is_sound || crate::inspect::planted(crate::inspect::Bug::TornTail);
    if !is_sound {
        return None;
    }
    let payload = &bytes[RECORD_HEADER_BYTES..end];
    let record = match (header[24], length) {
        (1, ENTRY_FIXED_BYTES..) => Record::Entry {
            index: u64_at(payload, 0),
            term: u64_at(payload, 8),
            kind: payload[16],
            data: &payload[ENTRY_FIXED_BYTES..],
        },
        (2, 24) => Record::Hard { term: u64_at(payload, 0), vote: u64_at(payload, 8), commit: u64_at(payload, 16) },
        (3, 16) => Record::Base { index: u64_at(payload, 0), term: u64_at(payload, 8) },
        (4, 16) => Record::Reset { index: u64_at(payload, 0), term: u64_at(payload, 8) },
        _ => return None,
    };
    let lsn = u64_at(header, 8);
    let write_lsn = lsn.checked_sub(u64::from(u32_at(header, 16)))?;
    Some(Placed {
        lsn,
        write_lsn,
        shard: ShardId(u32_at(header, 20)),
        ends_write: header[25] == 1,
        record,
        bytes: record_bytes(length),
    })
}

/// Looks behind a bad record for one that proves that lsn `lost` was durable: a sound record of a later write.
#[must_use]
pub fn later_write(segment: u64, bytes: &[u8], lost: u64) -> Option<u64> {
    let mut offset = 0;
    while offset + RECORD_HEADER_BYTES <= bytes.len() {
        // The lsn is compared before the check is computed, so that looking through a whole segment stays cheap.
        let lsn = u64_at(bytes, offset + 8);
        if lsn > lost
            && lsn - lost < 1 << 32
            && let Some(placed) = decode_record(segment, &bytes[offset..])
            && placed.write_lsn > lost
        {
            return Some(placed.lsn);
        }
        offset += 8;
    }
    None
}

fn record_check(segment: u64, checked: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&segment.to_le_bytes());
    hasher.update(checked);
    hasher.finalize()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn every_kind_of_record_comes_back() {
        let records = [
            Record::Entry { index: 7, term: 3, kind: 0, data: b"hello" },
            Record::Entry { index: 8, term: 3, kind: 2, data: b"" },
            Record::Hard { term: 4, vote: 2, commit: 6 },
            Record::Base { index: 1, term: 1 },
            Record::Reset { index: 9, term: 4 },
        ];
        let mut bytes = Vec::new();
        for (record, place) in records.iter().zip(0..) {
            let at = Place { segment: 5, lsn: 100 + u64::from(place), place, ends_write: place == 4 };
            record.encode(at, ShardId(3), &mut bytes);
        }
        let mut rest = &bytes[..];
        for (record, lsn) in records.iter().zip(100..) {
            let placed = decode_record(5, rest).expect("a sound record");
            assert_eq!((&placed.record, placed.lsn, placed.write_lsn), (record, lsn, 100));
            rest = &rest[placed.bytes..];
        }
        assert!(rest.is_empty());
        assert_eq!(decode_record(6, &bytes), None, "another segment's record is not taken");
    }

    proptest! {
        #[test]
        fn no_flipped_bit_goes_unseen(data in prop::collection::vec(any::<u8>(), 0..64), bit in any::<prop::sample::Index>()) {
            let mut bytes = Vec::new();
            Record::Entry { index: 1, term: 1, kind: 0, data: &data }.encode(Place { segment: 1, lsn: 1, place: 0, ends_write: true }, ShardId(1), &mut bytes);
            let length = RECORD_HEADER_BYTES + ENTRY_FIXED_BYTES + data.len();
            let bit = bit.index(length * 8);
            bytes[bit / 8] ^= 1 << (bit % 8);
            prop_assert_eq!(decode_record(1, &bytes), None);
        }

        #[test]
        fn any_bytes_are_no_record_and_no_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            prop_assert_eq!(decode_record(1, &bytes), None);
            prop_assert!(SegmentHeader::decode(&bytes).is_err());
            let _ = later_write(1, &bytes, 0);
        }
    }
}
