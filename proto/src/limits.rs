//! Every limit of the protocol, once, and how they depend on each other.
//!
//! The sizes that a peer must know are told in the handshake ([`Limits`]).

use serde::{Deserialize, Serialize};

/// Longest key.
pub const KEY_BYTES_MAX: usize = 4 << 10;
/// Longest value.
pub const VALUE_BYTES_MAX: usize = 16 << 20;
/// Most operations in one batch.
pub const BATCH_OPS_MAX: usize = 10_000;
/// Most bytes of keys and values in one batch.
pub const BATCH_BYTES_MAX: usize = 8 << 20;
/// Longest frame, the four bytes of its length not counted.
pub const FRAME_BYTES_MAX: usize = 20 << 20;
/// Longest frame before the handshake is done: nobody has said who they are yet.
pub const HANDSHAKE_BYTES_MAX: usize = 4 << 10;
/// Longest bincode head of a frame: everything but raw values.
pub const HEAD_BYTES_MAX: usize = 10 << 20;
/// Bytes of rows in a page of a scan when the caller names none.
pub const PAGE_BYTES_DEFAULT: usize = 1 << 20;
/// Most bytes of rows that a caller may ask a page to hold. One row more may be added: a row is never cut.
pub const PAGE_BYTES_MAX: usize = 2 << 20;
/// Most rows in a page.
pub const PAGE_ROWS_MAX: usize = 10_000;
/// Most rows in a page that a node merges from several of its shards.
pub const MERGED_ROWS_MAX: usize = 128;
/// Most shards that a node merges into one page.
pub const MERGED_SHARDS_MAX: usize = 128;
/// Rows that one count request looks at before it answers with a place to go on from.
pub const COUNT_ROWS_MAX: usize = 200_000;
/// Longest name of a node or a keyspace.
pub const NAME_BYTES_MAX: usize = 128;
/// Most nodes in a map.
pub const MAP_NODES_MAX: usize = 1_000;
/// Most keyspaces in a map.
pub const MAP_KEYSPACES_MAX: usize = 1_000;
/// Most shards in a map.
pub const MAP_SHARDS_MAX: usize = 10_000;
/// Most replicas of a shard that are wanted.
pub const REPLICAS_MAX: u32 = 9;
/// The capacity of a usual node, to which others are compared.
pub const CAPACITY_USUAL: u32 = 100;
/// The largest capacity of a node.
pub const CAPACITY_MAX: u32 = 10_000;
/// Longest value that a write may be conditional on.
pub const CONDITION_BYTES_MAX: usize = 1 << 20;
/// Requests in flight on one connection. A sender that goes beyond is not read from until answers have gone out.
pub const CREDIT_REQUESTS: u32 = 1_024;
/// Bytes of answers that may wait for one connection before no more requests are read from it.
pub const OUTBOX_BYTES_SOFT: usize = 4 << 20;
/// Longest deadline that a request may carry: an hour.
pub const DEADLINE_MS_MAX: u32 = 3_600_000;
/// Bytes of one chunk of a snapshot stream.
pub const SNAPSHOT_CHUNK_BYTES: usize = 1 << 20;
/// Most bytes of log entries in one Raft message.
pub const APPEND_BYTES_MAX: usize = 2 << 20;
/// Most bytes of writes that are grouped into one log entry; a single larger write is an entry of its own.
pub const GROUP_BYTES_MAX: usize = 1 << 20;

// A frame holds the largest value with its key, the largest batch, the largest page with one row on top, and the
// largest group of Raft messages; otherwise something that is allowed could not be sent.
const _: () = assert!(FRAME_BYTES_MAX >= VALUE_BYTES_MAX + KEY_BYTES_MAX + (64 << 10));
const _: () = assert!(FRAME_BYTES_MAX >= BATCH_BYTES_MAX + BATCH_OPS_MAX * 64);
const _: () = assert!(FRAME_BYTES_MAX >= PAGE_BYTES_MAX + VALUE_BYTES_MAX + KEY_BYTES_MAX + PAGE_ROWS_MAX * 64);
const _: () = assert!(FRAME_BYTES_MAX >= APPEND_BYTES_MAX + VALUE_BYTES_MAX + KEY_BYTES_MAX + (64 << 10));
const _: () = assert!(HEAD_BYTES_MAX >= PAGE_BYTES_MAX + PAGE_ROWS_MAX * 64);
const _: () = assert!(HEAD_BYTES_MAX >= BATCH_BYTES_MAX + BATCH_OPS_MAX * 64);
const _: () = assert!(GROUP_BYTES_MAX <= APPEND_BYTES_MAX);
const _: () = assert!(BATCH_BYTES_MAX <= VALUE_BYTES_MAX);

/// The limits that a server tells in the handshake, in bytes unless the name says otherwise.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Limits {
    /// Longest key.
    pub key_bytes_max: u32,
    /// Longest value.
    pub value_bytes_max: u32,
    /// Longest frame.
    pub frame_bytes_max: u32,
    /// Most operations in a batch.
    pub batch_ops_max: u32,
    /// Most bytes in a batch.
    pub batch_bytes_max: u32,
    /// Most bytes that a page can be asked to hold.
    pub page_bytes_max: u32,
    /// Requests in flight on this connection.
    pub credit_requests: u32,
}

impl Limits {
    /// The limits of this build.
    pub const OURS: Self = Self {
        key_bytes_max: KEY_BYTES_MAX as u32,
        value_bytes_max: VALUE_BYTES_MAX as u32,
        frame_bytes_max: FRAME_BYTES_MAX as u32,
        batch_ops_max: BATCH_OPS_MAX as u32,
        batch_bytes_max: BATCH_BYTES_MAX as u32,
        page_bytes_max: PAGE_BYTES_MAX as u32,
        credit_requests: CREDIT_REQUESTS,
    };
}
