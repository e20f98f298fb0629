//! The wall: what is wrong with a write is said before any of it is taken. What passes here cannot be malformed when it is
//! applied. Pure.

use super::WriteKind;
use shkv_proto::KeyspaceId;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{BATCH_BYTES_MAX, BATCH_OPS_MAX, CONDITION_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use shkv_proto::message::{Batch, BatchOp, Condition, Failure, Finish, Prepare, RefusalCode, Write, WriteId};

/// Batches up to this size are looked through for a key that stands twice without sorting them.
const FEW_OPS: usize = 12;

/// Where the keys of a write lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// All in the shard that it came to.
    Here,
    /// Some elsewhere: it is a batch over several shards.
    Several,
}

/// Checks a write. `holds` says whether a key, which is checked already, is of the shard.
///
/// # Errors
/// A refusal that names the limit, and the item of a batch; what `holds` says of a write that must lie in one shard.
pub fn check(
    kind: WriteKind,
    head: &[u8],
    tail: &[u8],
    holds: impl Fn(KeyspaceId, &[u8]) -> Result<(), Failure>,
) -> Result<Reach, Failure> {
    let malformed = |error: CodecError| Failure::malformed(&error);
    match kind {
        WriteKind::Put | WriteKind::Delete => {
            let write: Write<'_> = codec::decode_borrowed(head).map_err(malformed)?;
            check_key(write.key)?;
            if kind == WriteKind::Delete && !tail.is_empty() {
                return Err(Failure::refusal(RefusalCode::Malformed, "a delete has no value"));
            }
            check_value(tail.len())?;
            check_condition(write.condition)?;
            check_id(write.id.as_ref())?;
            holds(write.keyspace, write.key)?;
            Ok(Reach::Here)
        }
        WriteKind::Batch => {
            let batch: Batch<'_> = codec::decode_borrowed(head).map_err(malformed)?;
            check_id(batch.id.as_ref())?;
            check_ops(&batch.ops, head.len(), tail.len())?;
            let elsewhere = batch.ops.iter().filter(|op| holds(batch.keyspace, op.key()).is_err()).count();
            if elsewhere == batch.ops.len() {
                holds(batch.keyspace, batch.ops[0].key())?;
            }
            Ok(if elsewhere == 0 { Reach::Here } else { Reach::Several })
        }
        WriteKind::Prepare => {
            let prepare: Prepare<'_> = codec::decode_borrowed(head).map_err(malformed)?;
            check_ops(&prepare.ops, head.len(), tail.len())?;
            prepare.ops.iter().try_for_each(|op| holds(prepare.keyspace, op.key()))?;
            Ok(Reach::Here)
        }
        WriteKind::Finish => {
            let _: Finish = codec::decode(head).map_err(malformed)?;
            match tail.len() {
                0 => Ok(Reach::Here),
                _ => Err(Failure::refusal(RefusalCode::Malformed, "a finish has no values")),
            }
        }
        // Made by this node itself.
        WriteKind::Decide | WriteKind::LetGo | WriteKind::Conclude => Ok(Reach::Here),
    }
}

fn check_ops(ops: &[BatchOp<'_>], head_bytes: usize, tail_bytes: usize) -> Result<(), Failure> {
    if ops.is_empty() || ops.len() > BATCH_OPS_MAX || head_bytes + tail_bytes > BATCH_BYTES_MAX + BATCH_OPS_MAX * 64 {
        return Err(Failure::refusal(
            RefusalCode::BatchLimits,
            format!(
                "a batch of {} operations and {} bytes; it must have 1 to {BATCH_OPS_MAX} operations and at most {BATCH_BYTES_MAX} bytes",
                ops.len(),
                head_bytes + tail_bytes
            ),
        ));
    }
    let mut values = 0_usize;
    for (at, op) in ops.iter().enumerate() {
        let item = |failure| match failure {
            Failure::Refusal { code, text } => Failure::Refusal { code, text: format!("operation {at}: {text}") },
            other => other,
        };
        check_key(op.key()).map_err(item)?;
        check_condition(op.condition()).map_err(item)?;
        if let BatchOp::Put { value_bytes, .. } = op {
            check_value(*value_bytes as usize).map_err(item)?;
            values = values.saturating_add(*value_bytes as usize);
        }
    }
    if let Some((first, second)) = twice(ops) {
        return Err(Failure::refusal(
            RefusalCode::BatchLimits,
            format!("operation {second}: its key is that of operation {first}; a key stands in a batch once"),
        ));
    }
    if values != tail_bytes {
        return Err(Failure::refusal(
            RefusalCode::Malformed,
            format!("the values of the batch are {tail_bytes} bytes, its operations say {values}"),
        ));
    }
    Ok(())
}

/// The first two operations with one key, if there are any.
fn twice(ops: &[BatchOp<'_>]) -> Option<(usize, usize)> {
    if ops.len() <= FEW_OPS {
        let earlier = |at: usize| ops[..at].iter().position(|op| op.key() == ops[at].key());
        return (1..ops.len()).find_map(|at| Some((earlier(at)?, at)));
    }
    let mut keys: Vec<(&[u8], usize)> = ops.iter().map(BatchOp::key).zip(0..).collect();
    keys.sort_unstable();
    let same = keys.windows(2).filter(|pair| pair[0].0 == pair[1].0);
    same.map(|pair| (pair[0].1, pair[1].1)).min_by_key(|(_, second)| *second)
}

fn check_id(id: Option<&WriteId>) -> Result<(), Failure> {
    match id {
        Some(id) if id.client == 0 || id.sequence <= id.answered => Err(Failure::refusal(
            RefusalCode::Malformed,
            format!(
                "the write's id has client {}, sequence {} and answered {}; the client is not 0, and the sequence is above what was answered",
                id.client, id.sequence, id.answered
            ),
        )),
        Some(_) | None => Ok(()),
    }
}

/// Checks a key by itself.
///
/// # Errors
/// A refusal that names the limit.
pub fn check_key(key: &[u8]) -> Result<(), Failure> {
    match key.len() {
        0 => Err(Failure::refusal(RefusalCode::KeyEmpty, "the key is empty")),
        1..=KEY_BYTES_MAX => Ok(()),
        length => Err(Failure::refusal(
            RefusalCode::KeyTooLarge,
            format!("the key has {length} bytes, the limit is {KEY_BYTES_MAX}"),
        )),
    }
}

fn check_value(length: usize) -> Result<(), Failure> {
    if length > VALUE_BYTES_MAX {
        return Err(Failure::refusal(
            RefusalCode::ValueTooLarge,
            format!("the value has {length} bytes, the limit is {VALUE_BYTES_MAX}"),
        ));
    }
    Ok(())
}

fn check_condition(condition: Condition<'_>) -> Result<(), Failure> {
    match condition {
        Condition::Value(value) if value.len() > CONDITION_BYTES_MAX => Err(Failure::refusal(
            RefusalCode::ValueTooLarge,
            format!("the condition's value has {} bytes, the limit is {CONDITION_BYTES_MAX}", value.len()),
        )),
        Condition::Value(_) | Condition::Always | Condition::Absent | Condition::Present | Condition::Version(_) => {
            Ok(())
        }
    }
}
