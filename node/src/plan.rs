//! A batch split by the shards that its keys lie in. Pure.

use crate::machine::check_read_bytes;
use bytes::{Bytes, BytesMut};
use shkv_proto::ShardId;
use shkv_proto::message::{Batch, BatchOp, Failure, PrepareDone, RefusalCode, RowRead};
use shkv_proto::route::Routes;
use std::collections::BTreeMap;

/// A shard's part of a batch.
#[derive(Debug, Default)]
pub struct Part<'a> {
    /// Its operations, in the order of the batch.
    pub ops: Vec<BatchOp<'a>>,
    /// Where they stand in the batch.
    pub positions: Vec<u32>,
    /// The values of its puts.
    pub values: BytesMut,
}

impl Part<'_> {
    /// The failure of an operation of the part, as one of the batch's.
    #[must_use]
    pub fn failure(&self, failure: Failure) -> Failure {
        match failure {
            Failure::Condition { operation, version } => {
                let operation = self.positions.get(operation as usize).copied().unwrap_or(operation);
                Failure::Condition { operation, version }
            }
            other => other,
        }
    }
}

/// The batch's reads in their order, nothing for those of the first shard, and the values one behind the other.
pub type ReadElsewhere = (Vec<Option<Option<RowRead>>>, BytesMut);

/// The parts of a batch by shard. The batch is checked.
///
/// # Errors
/// A refusal when the keyspace is not in the map.
pub fn split<'a>(
    routes: &Routes,
    batch: &Batch<'a>,
    mut values: Bytes,
) -> Result<BTreeMap<ShardId, Part<'a>>, Failure> {
    let mut parts: BTreeMap<ShardId, Part<'a>> = BTreeMap::new();
    for (op, position) in batch.ops.iter().zip(0..) {
        let Some(shard) = routes.shard_of(batch.keyspace, op.key()) else {
            let text = format!("there is no keyspace {}", batch.keyspace);
            return Err(Failure::refusal(RefusalCode::UnknownKeyspace, text));
        };
        let part = parts.entry(shard.id).or_default();
        if let BatchOp::Put { value_bytes, .. } = op {
            let length = (*value_bytes as usize).min(values.len()); // checked before
            part.values.extend_from_slice(&values.split_to(length));
        }
        part.ops.push(*op);
        part.positions.push(position);
    }
    Ok(parts)
}

/// What the other shards read, as the decision takes it.
///
/// # Errors
/// A refusal when it is too much; an unknown outcome when an answer does not fit its question.
pub fn gather(
    batch: &Batch<'_>,
    first: &Part<'_>,
    answers: &[(&Part<'_>, PrepareDone, Bytes)],
) -> Result<ReadElsewhere, Failure> {
    let odd = || Failure::Aborted { text: "a shard has answered what was not asked".into() };
    let mut found: BTreeMap<u32, (Option<RowRead>, Bytes)> = BTreeMap::new();
    for (part, done, values) in answers {
        let (mut rows, mut values) = (done.rows.iter(), values.clone());
        for (op, position) in part.ops.iter().zip(&part.positions) {
            if let BatchOp::Read { .. } = op {
                let row = *rows.next().ok_or_else(odd)?;
                let length = row.map_or(0, |row| row.value_bytes as usize);
                if length > values.len() {
                    return Err(odd());
                }
                found.insert(*position, (row, values.split_to(length)));
            }
        }
    }
    let (mut reads, mut values) = (Vec::new(), BytesMut::new());
    for (op, position) in batch.ops.iter().zip(0_u32..) {
        let BatchOp::Read { .. } = op else { continue };
        match found.remove(&position) {
            Some((row, bytes)) => {
                values.extend_from_slice(&bytes);
                check_read_bytes(position as usize, values.len())?;
                reads.push(Some(row));
            }
            None if first.positions.binary_search(&position).is_ok() => reads.push(None),
            None => return Err(odd()),
        }
    }
    Ok((reads, values))
}
