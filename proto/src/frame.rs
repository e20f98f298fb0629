//! The frame: a fixed header, a bincode head, and a raw tail behind it that is never copied.
//!
//! ```text
//! offset size
//!  0      4   length      bytes behind this field
//!  4      4   check       low half of xxh3-64 over everything behind this field
//!  8      1   version     of the protocol
//!  9      1   kind
//! 10      2   reserved    zero
//! 12      4   shard
//! 16      8   epoch       of the shard map that the sender routed by
//! 24      8   request     id that the answer repeats
//! 32      4   deadline    milliseconds left, 0 = the receiver's default
//! 36      4   head length
//! 40      …   head, then tail
//! ```
//! All numbers are little-endian. This file does no input or output.

use crate::hashing::frame_check;
use crate::ids::{Epoch, ShardId};
use crate::limits::{DEADLINE_MS_MAX, FRAME_BYTES_MAX, HEAD_BYTES_MAX};
use bytes::{Buf, BufMut, Bytes, BytesMut};

/// Bytes of the header.
pub const HEADER_BYTES: usize = 40;
/// The protocol version that this build speaks, and the newest it knows.
pub const VERSION: u8 = 1;
/// The oldest protocol version that this build still speaks.
pub const VERSION_MIN: u8 = 1;
/// Bytes between the length field and the head.
const BEHIND_LENGTH: usize = HEADER_BYTES - 4;

macro_rules! kinds {
    ($($(#[$doc:meta])* $name:ident = $number:literal,)*) => {
        /// What a frame is. Numbers are never used again.
        #[derive(Clone, Copy, PartialEq, Eq, Debug)]
        #[repr(u8)]
        pub enum Kind { $($(#[$doc])* $name = $number,)* }

        impl Kind {
            fn from_number(number: u8) -> Option<Self> {
                match number { $($number => Some(Self::$name),)* _ => None }
            }
            /// Every kind, for tests and documentation.
            pub const ALL: &'static [Self] = &[$(Self::$name,)*];
        }
    };
}

kinds! {
    /// First frame of the side that connects.
    Hello = 1,
    /// The other side takes the connection.
    Welcome = 2,
    /// An answer: the request was carried out.
    Done = 3,
    /// An answer: it was not, or it is not known. The head is a [`crate::message::Failure`].
    Failed = 4,
    /// Read one row.
    Get = 16,
    /// Write one row.
    Put = 17,
    /// Remove one row.
    Delete = 18,
    /// Several puts and deletes of one shard, in one step.
    Batch = 19,
    /// A page of rows in order.
    Scan = 20,
    /// The number of rows.
    Count = 21,
    /// The shard map.
    Map = 32,
    /// What a node or a balancer can say of itself.
    Status = 33,
    /// A balancer tells a node the addresses and the map; the node answers with its status.
    Beat = 34,
    /// Make a replica of a shard on this node.
    CreateReplica = 35,
    /// Give up the leadership of a shard to another replica.
    TransferLeader = 36,
    /// A node registers.
    Join = 37,
    /// One step from one set of replicas of a shard to the next.
    ChangeReplicas = 38,
    /// Delete this node's replica of a shard.
    RemoveReplica = 39,
    /// What an operator wants of the cluster.
    Admin = 40,
    /// Raft messages of many shards, one way.
    Raft = 48,
    /// The beginning of a snapshot stream.
    SnapshotBegin = 49,
    /// Rows of a snapshot.
    SnapshotChunk = 50,
    /// The end of a snapshot stream.
    SnapshotEnd = 51,
    /// Check and lock a shard's part of a batch over several shards.
    Prepare = 52,
    /// Write what was prepared, or drop it.
    Finish = 53,
    /// Ask what became of a transaction.
    Resolve = 54,
}

/// The fixed part of a frame, without its lengths and check.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// What the frame is.
    pub kind: Kind,
    /// Protocol version that the body is written in.
    pub version: u8,
    /// The shard that it is for.
    pub shard: ShardId,
    /// The map that the sender routed by.
    pub epoch: Epoch,
    /// Chosen by the asker, repeated in the answer.
    pub request: u64,
    /// Milliseconds that the asker will still wait; 0 leaves it to the receiver.
    pub deadline_ms: u32,
}

impl Header {
    /// A header of this protocol version that is for no shard.
    #[must_use]
    pub fn new(kind: Kind) -> Self {
        Self { kind, version: VERSION, shard: ShardId::UNROUTED, epoch: Epoch::NONE, request: 0, deadline_ms: 0 }
    }

    /// The header of an answer to this request.
    #[must_use]
    pub fn answer(&self, kind: Kind) -> Self {
        Self { kind, deadline_ms: 0, ..*self }
    }
}

/// A frame. Cloning it copies no bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Frame {
    /// Its header.
    pub header: Header,
    /// The bincode part.
    pub head: Bytes,
    /// The raw part: values.
    pub tail: Bytes,
}

/// Why bytes are not a frame. The connection that they came from cannot be used any more.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum FrameError {
    /// Shorter than a header or longer than the limit.
    #[error("frame length {length} is not between {BEHIND_LENGTH} and {max}")]
    Length {
        /// As told.
        length: usize,
        /// The limit in force.
        max: usize,
    },
    /// The check is wrong: the bytes changed on the way.
    #[error("frame check {found:08x} should be {expected:08x}")]
    Check {
        /// Computed.
        expected: u32,
        /// As told.
        found: u32,
    },
    /// A version that this build does not speak.
    #[error("protocol version {0} is not between {VERSION_MIN} and {VERSION}")]
    Version(u8),
    /// A kind that this build does not know.
    #[error("unknown kind of frame {0}")]
    Kind(u8),
    /// Reserved bits are set.
    #[error("reserved bytes are {0:#06x}, not zero")]
    Reserved(u16),
    /// The head is longer than the frame or than its limit.
    #[error("head length {0} is over the frame's end or over {HEAD_BYTES_MAX}")]
    Head(usize),
    /// A deadline above the limit.
    #[error("deadline of {0} ms is over the limit of {DEADLINE_MS_MAX} ms")]
    Deadline(u32),
}

impl Frame {
    /// A frame from its parts.
    #[must_use]
    pub fn new(header: Header, head: impl Into<Bytes>, tail: impl Into<Bytes>) -> Self {
        Self { header, head: head.into(), tail: tail.into() }
    }

    /// Its size on the wire.
    #[must_use]
    pub fn wire_bytes(&self) -> usize {
        HEADER_BYTES + self.head.len() + self.tail.len()
    }

    /// Whether the frame keeps the limits that every receiver holds it to.
    #[must_use]
    pub fn fits(&self) -> bool {
        self.wire_bytes() - 4 <= FRAME_BYTES_MAX && self.head.len() <= HEAD_BYTES_MAX
    }

    /// Appends the whole frame.
    pub fn encode(&self, out: &mut BytesMut) {
        encode_parts(&self.header, &self.head, &self.tail, out);
    }

    /// Takes one frame off the front of `buffer`; `None` while it is not whole. The parts share `buffer`'s memory.
    ///
    /// # Errors
    /// [`FrameError`] as soon as the bytes cannot become a frame of at most `bytes_max` bytes.
    pub fn decode(buffer: &mut BytesMut, bytes_max: usize) -> Result<Option<Self>, FrameError> {
        let Some(length) = peek_length(buffer, bytes_max)? else { return Ok(None) };
        if buffer.len() < 4 + length {
            return Ok(None);
        }
        let mut body = buffer.split_to(4 + length).freeze();
        body.advance(4);
        let found = body.get_u32_le();
        let expected = frame_check(&body);
        if found != expected {
            return Err(FrameError::Check { expected, found });
        }
        let version = body.get_u8();
        if !(VERSION_MIN..=VERSION).contains(&version) {
            return Err(FrameError::Version(version));
        }
        let number = body.get_u8();
        let kind = Kind::from_number(number).ok_or(FrameError::Kind(number))?;
        let reserved = body.get_u16_le();
        if reserved != 0 {
            return Err(FrameError::Reserved(reserved));
        }
        let shard = ShardId(body.get_u32_le());
        let epoch = Epoch(body.get_u64_le());
        let request = body.get_u64_le();
        let deadline_ms = body.get_u32_le();
        if deadline_ms > DEADLINE_MS_MAX {
            return Err(FrameError::Deadline(deadline_ms));
        }
        let head_bytes = body.get_u32_le() as usize;
        if head_bytes > body.len() || head_bytes > HEAD_BYTES_MAX {
            return Err(FrameError::Head(head_bytes));
        }
        let head = body.split_to(head_bytes);
        Ok(Some(Self { header: Header { kind, version, shard, epoch, request, deadline_ms }, head, tail: body }))
    }
}

/// Appends a whole frame that lies in parts.
pub(crate) fn encode_parts(header: &Header, head: &[u8], tail: &[u8], out: &mut BytesMut) {
    out.reserve(HEADER_BYTES + head.len() + tail.len());
    let start = out.len();
    encode_header(header, head.len(), tail.len(), out);
    out.put_slice(head);
    out.put_slice(tail);
    let check = frame_check(&out[start + 8..]);
    out[start + 4..start + 8].copy_from_slice(&check.to_le_bytes());
}

/// The length told by the first four bytes of `buffer`, if they are there.
///
/// # Errors
/// [`FrameError::Length`] when no frame can have it.
pub fn peek_length(buffer: &[u8], bytes_max: usize) -> Result<Option<usize>, FrameError> {
    let Some(bytes) = buffer.first_chunk::<4>() else { return Ok(None) };
    let length = u32::from_le_bytes(*bytes) as usize;
    if !(BEHIND_LENGTH..=bytes_max).contains(&length) {
        return Err(FrameError::Length { length, max: bytes_max });
    }
    Ok(Some(length))
}

fn encode_header(header: &Header, head: usize, tail: usize, out: &mut BytesMut) {
    out.put_u32_le((BEHIND_LENGTH + head + tail) as u32);
    out.put_u32_le(0); // the check, written by the caller when the body is there
    out.put_u8(header.version);
    out.put_u8(header.kind as u8);
    out.put_u16_le(0);
    out.put_u32_le(header.shard.0);
    out.put_u64_le(header.epoch.0);
    out.put_u64_le(header.request);
    out.put_u32_le(header.deadline_ms);
    out.put_u32_le(head as u32);
}
