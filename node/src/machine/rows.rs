//! What operations find and do in a shard's rows. Pure.

use super::BadEntry;
use crate::table::View;
use bytes::{BufMut, Bytes, BytesMut};
use shkv_proto::limits::{BATCH_BYTES_MAX, KEY_BYTES_MAX};
use shkv_proto::message::{BatchOp, Condition, Failure, RefusalCode, RowRead};

/// What a batch's reads found: the rows in their order, and their values.
pub type Reads = (Vec<Option<RowRead>>, BytesMut);

/// The first condition that does not hold. All are looked at before anything is done.
pub fn refuse_ops(view: &View, ops: &[BatchOp<'_>]) -> Result<Option<Failure>, BadEntry> {
    for (op, operation) in ops.iter().zip(0..) {
        if let Some(failure) = refuse(view, operation, op.key(), op.condition())? {
            return Ok(Some(failure));
        }
    }
    Ok(None)
}

/// Why a write is not done, if its condition does not hold. Without a condition nothing is looked up.
pub fn refuse(view: &View, operation: u32, key: &[u8], condition: Condition<'_>) -> Result<Option<Failure>, BadEntry> {
    if condition == Condition::Always {
        return Ok(None);
    }
    let found = view.get(key).map_err(|error| BadEntry::new(error.to_string()))?;
    let holds = match (condition, &found) {
        (Condition::Always, _) | (Condition::Absent, None) | (Condition::Present, Some(_)) => true,
        (Condition::Version(wanted), Some((version, _))) => wanted == *version,
        (Condition::Value(wanted), Some((_, value))) => wanted == value,
        (Condition::Absent, Some(_)) | (Condition::Present | Condition::Version(_) | Condition::Value(_), None) => {
            false
        }
    };
    let version = found.map(|(version, _)| version);
    Ok((!holds).then_some(Failure::Condition { operation, version }))
}

/// What the reads find. A refusal if the values, with `before` bytes from elsewhere, are more than a batch may read.
pub fn read_ops(view: &View, ops: &[BatchOp<'_>], before: usize) -> Result<Result<Reads, Failure>, BadEntry> {
    let (mut rows, mut values) = (Vec::new(), BytesMut::new());
    for (at, op) in ops.iter().enumerate() {
        let BatchOp::Read { key } = op else { continue };
        let found = view.get(key).map_err(|error| BadEntry::new(error.to_string()))?;
        let row = found.map(|(version, value)| {
            values.put_slice(&value);
            RowRead { version, value_bytes: value.len() as u32 }
        });
        rows.push(row);
        if let Err(failure) = check_read_bytes(at, before + values.len()) {
            return Ok(Err(failure));
        }
    }
    Ok(Ok((rows, values)))
}

/// Whether a batch may read so many bytes.
///
/// # Errors
/// A refusal that names the operation and the limit.
pub fn check_read_bytes(operation: usize, bytes: usize) -> Result<(), Failure> {
    if bytes > BATCH_BYTES_MAX {
        let text =
            format!("operation {operation}: the rows that the batch reads are more than {BATCH_BYTES_MAX} bytes");
        return Err(Failure::refusal(RefusalCode::BatchLimits, text));
    }
    Ok(())
}

/// Rows that deletes will find.
pub fn count_removed(view: &View, ops: &[BatchOp<'_>]) -> Result<u32, BadEntry> {
    let mut removed = 0;
    for op in ops {
        if let BatchOp::Delete { key, .. } = op {
            removed += u32::from(view.get(key).map_err(|error| BadEntry::new(error.to_string()))?.is_some());
        }
    }
    Ok(removed)
}

/// Writes what a batch's operations say; tells how many rows deletes removed, if anybody will hear it. Takes the values of
/// the puts from the front of `tail`.
pub fn write_ops(view: &mut View, ops: &[BatchOp<'_>], tail: &mut Bytes, look: bool) -> Result<u32, BadEntry> {
    let mut removed = 0;
    for op in ops {
        match op {
            BatchOp::Put { key, value_bytes, .. } => {
                let length = *value_bytes as usize;
                if length > tail.len() {
                    return Err(BadEntry::new("its values are shorter than its operations say"));
                }
                let value = tail.split_to(length);
                put(view, key, &value, || value.clone())?;
            }
            BatchOp::Delete { key, .. } => removed += delete(view, key, look)?,
            BatchOp::Check { .. } | BatchOp::Read { .. } => {}
        }
    }
    Ok(removed)
}

/// Writes a row. `share` gives the value as a part of what brought it.
pub fn put(view: &mut View, key: &[u8], value: &[u8], share: impl FnOnce() -> Bytes) -> Result<(), BadEntry> {
    check_key(key)?;
    view.revision += 1;
    view.active.put(key, view.revision, value, share);
    Ok(())
}

/// Whoever proposed it has looked at that; rows in memory have no place for longer keys.
fn check_key(key: &[u8]) -> Result<(), BadEntry> {
    if key.len() > KEY_BYTES_MAX {
        return Err(BadEntry::new(format!("a key of it has {} bytes, the limit is {KEY_BYTES_MAX}", key.len())));
    }
    Ok(())
}

/// Removes a row. Whether there was one is looked up only where it is remembered or somebody waits to hear it.
pub fn delete(view: &mut View, key: &[u8], look: bool) -> Result<u32, BadEntry> {
    check_key(key)?;
    let existed = look && view.get(key).map_err(|error| BadEntry::new(error.to_string()))?.is_some();
    view.revision += 1;
    view.active.delete(key);
    Ok(u32::from(existed))
}
