//! What a shard remembers beside its rows: outcomes of writes, locks, decisions. It is kept with the rows on the disk and in
//! snapshots, and belongs to the same entry of the log. Pure.

use super::locks::{Locks, Part};
use super::sessions::{self, Sessions};
use super::{BadEntry, read_items};
use bytes::Bytes;
use serde::{Deserialize, Serialize};
use shkv_proto::ShardId;
use shkv_proto::codec;
use shkv_proto::message::{Prepare, TxnId};
use std::collections::BTreeMap;

const FORMAT: u8 = 1;
/// Most bytes that the encoding may have: what is remembered is bounded far below.
pub const LEDGER_BYTES_MAX: usize = 128 << 20;
/// Decisions that may wait to be let go; a transaction beyond is refused as busy.
pub const DECISIONS_MAX: usize = 10_000;

/// A transaction that was decided to be done, while other shards may not know it yet.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Decision {
    /// The other shards that it touches.
    pub others: Vec<ShardId>,
    /// Client and sequence of the batch.
    pub id: Option<(u64, u64)>,
}

/// What a shard remembers beside its rows.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Ledger {
    /// The log's own time in milliseconds: leaders stamp their entries, and it never goes back.
    pub time: u64,
    /// Outcomes of writes.
    pub sessions: Sessions,
    /// Locks.
    pub locks: Locks,
    /// Decisions that are not let go yet.
    pub decisions: BTreeMap<TxnId, Decision>,
}

#[derive(Serialize, Deserialize)]
enum Record<'a> {
    Time(u64),
    Session(sessions::Record),
    /// A prepared part; its values lie behind it.
    Part(#[serde(borrow)] &'a [u8]),
    Decision(TxnId, Decision),
}

impl Ledger {
    /// Its bytes.
    ///
    /// # Errors
    /// When something of it is too large to be encoded, which its limits exclude.
    pub fn encode(&self) -> Result<Vec<u8>, codec::CodecError> {
        let mut out = vec![FORMAT];
        let mut result = Ok(());
        let mut put = |record: &Record<'_>, tail: &[u8]| match codec::encode(record) {
            Ok(head) => super::write_item(&mut out, 0, &head, tail),
            Err(error) => result = Err(error),
        };
        put(&Record::Time(self.time), b"");
        self.sessions.write(|record, values| put(&Record::Session(record.clone()), values));
        self.locks.parts().for_each(|(_, part)| put(&Record::Part(&part.head), &part.tail));
        self.decisions.iter().for_each(|(txn, decision)| put(&Record::Decision(*txn, decision.clone()), b""));
        result.map(|()| out)
    }

    /// What [`Ledger::encode`] made. No bytes are an empty ledger.
    ///
    /// # Errors
    /// [`BadEntry`] for anything else.
    pub fn decode(bytes: &Bytes) -> Result<Self, BadEntry> {
        let mut ledger = Self::default();
        let Some(format) = bytes.first() else { return Ok(ledger) };
        if *format != FORMAT {
            return Err(BadEntry::new(format!("a ledger of format {format}, this build knows {FORMAT}")));
        }
        read_items(bytes, 1, |_, head, tail| {
            match codec::decode_borrowed(head).map_err(BadEntry::from)? {
                Record::Time(time) => ledger.time = time,
                Record::Session(record) => ledger
                    .sessions
                    .read(record, tail)
                    .ok_or_else(|| BadEntry::new("a client's outcomes are longer than their record"))?,
                Record::Part(head) => {
                    let part = Part { head: Bytes::copy_from_slice(head), tail: Bytes::copy_from_slice(tail) };
                    let prepare: Prepare<'_> = codec::decode_borrowed(head).map_err(BadEntry::from)?;
                    ledger.locks.hold(prepare.txn, prepare.ops.iter().map(|op| op.key()), part);
                }
                Record::Decision(txn, decision) => drop(ledger.decisions.insert(txn, decision)),
            }
            Ok(())
        })?;
        Ok(ledger)
    }
}
