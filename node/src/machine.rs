//! The state machine: what a log entry does to a shard's rows. Pure: the same entry does the same on every replica.
//!
//! An entry is a format byte and the writes that were grouped into it, each as it came over the wire:
//! `kind u8, head length u32, tail length u32, head, tail`.

use crate::table::View;
use bytes::Bytes;
use shkv_proto::Kind;
use shkv_proto::codec::{self, CodecError};
use shkv_proto::limits::{BATCH_BYTES_MAX, BATCH_OPS_MAX, CONDITION_BYTES_MAX, KEY_BYTES_MAX, VALUE_BYTES_MAX};
use shkv_proto::message::{Batch, BatchOp, Condition, Failure, RefusalCode, Write, WriteDone};

const FORMAT: u8 = 1;
/// Bytes before the head of a write.
const WRITE_FIXED_BYTES: usize = 9;

/// The three kinds of frame that write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteKind {
    /// One row.
    Put,
    /// One row less.
    Delete,
    /// Several of both.
    Batch,
}

impl WriteKind {
    /// The kind of a frame, if it writes.
    #[must_use]
    pub fn of(kind: Kind) -> Option<Self> {
        match kind {
            Kind::Put => Some(Self::Put),
            Kind::Delete => Some(Self::Delete),
            Kind::Batch => Some(Self::Batch),
            _ => None,
        }
    }

    fn number(self) -> u8 {
        match self {
            Self::Put => Kind::Put as u8,
            Self::Delete => Kind::Delete as u8,
            Self::Batch => Kind::Batch as u8,
        }
    }

    fn from_number(number: u8) -> Option<Self> {
        [Self::Put, Self::Delete, Self::Batch].into_iter().find(|kind| kind.number() == number)
    }
}

/// Checks a write before it is taken: what passes here cannot fail when it is applied.
///
/// # Errors
/// A refusal that names the limit, or the item of a batch.
pub fn check(
    kind: WriteKind,
    head: &[u8],
    tail: &[u8],
    holds: impl Fn(shkv_proto::KeyspaceId, &[u8]) -> Result<(), Failure>,
) -> Result<(), Failure> {
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
            holds(write.keyspace, write.key)
        }
        WriteKind::Batch => {
            let batch: Batch<'_> = codec::decode_borrowed(head).map_err(malformed)?;
            if batch.ops.is_empty()
                || batch.ops.len() > BATCH_OPS_MAX
                || head.len() + tail.len() > BATCH_BYTES_MAX + BATCH_OPS_MAX * 64
            {
                return Err(Failure::refusal(
                    RefusalCode::BatchLimits,
                    format!(
                        "a batch of {} operations and {} bytes; it must have 1 to {BATCH_OPS_MAX} operations and at most {BATCH_BYTES_MAX} bytes",
                        batch.ops.len(),
                        head.len() + tail.len()
                    ),
                ));
            }
            let mut values = 0_usize;
            for (at, op) in batch.ops.iter().enumerate() {
                let item = |failure| match failure {
                    Failure::Refusal { code, text } => {
                        Failure::Refusal { code, text: format!("operation {at}: {text}") }
                    }
                    other => other,
                };
                check_key(op.key()).map_err(item)?;
                check_condition(op.condition()).map_err(item)?;
                if let BatchOp::Put { value_bytes, .. } = op {
                    check_value(*value_bytes as usize).map_err(item)?;
                    values = values.saturating_add(*value_bytes as usize);
                }
                holds(batch.keyspace, op.key()).map_err(item)?;
            }
            if values != tail.len() {
                return Err(Failure::refusal(
                    RefusalCode::Malformed,
                    format!("the values of the batch are {} bytes, its operations say {values}", tail.len()),
                ));
            }
            Ok(())
        }
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

/// Gathers writes into one entry.
#[derive(Debug)]
pub struct Group {
    bytes: Vec<u8>,
}

impl Default for Group {
    fn default() -> Self {
        Self { bytes: vec![FORMAT] }
    }
}

impl Group {
    /// Adds a write.
    pub fn add(&mut self, kind: WriteKind, head: &[u8], tail: &[u8]) {
        self.bytes.reserve(WRITE_FIXED_BYTES + head.len() + tail.len());
        self.bytes.push(kind.number());
        self.bytes.extend_from_slice(&(head.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(&(tail.len() as u32).to_le_bytes());
        self.bytes.extend_from_slice(head);
        self.bytes.extend_from_slice(tail);
    }

    /// Its size so far.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes.len()
    }

    /// The entry's data.
    #[must_use]
    pub fn finish(self) -> Vec<u8> {
        self.bytes
    }
}

/// The answers to the writes of an entry.
pub type Answers = Vec<Result<WriteDone, Failure>>;

/// An entry that cannot be what a leader wrote: this build is too old for it, or memory is bad. The replica must stop.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("log entry cannot be applied: {0}")]
pub struct BadEntry(String);

/// Applies an entry's data to the rows. With `answers`, it gets the answer to each write of the entry in their order.
/// A write whose condition does not hold changes nothing, not even the revision, on every replica alike.
///
/// # Errors
/// [`BadEntry`]; the rows may then be half changed.
pub fn apply(data: &Bytes, view: &mut View, mut answers: Option<&mut Answers>) -> Result<(), BadEntry> {
    let bad = |text: &str| BadEntry(text.to_owned());
    let malformed = |error: CodecError| BadEntry(error.to_string());
    if data.first() != Some(&FORMAT) {
        return Err(BadEntry(format!("its format is {:?}, this build knows {FORMAT}", data.first())));
    }
    let mut at = 1;
    while at < data.len() {
        let fixed = data.get(at..at + WRITE_FIXED_BYTES).ok_or_else(|| bad("it ends inside a write"))?;
        let length =
            |from: usize| u32::from_le_bytes([fixed[from], fixed[from + 1], fixed[from + 2], fixed[from + 3]]) as usize;
        let kind = WriteKind::from_number(fixed[0]).ok_or_else(|| bad("it has a write of unknown kind"))?;
        let head_at = at + WRITE_FIXED_BYTES;
        let tail_at = head_at + length(1);
        at = tail_at + length(5);
        if at > data.len() {
            return Err(bad("it ends inside a write"));
        }
        let head = &data[head_at..tail_at];
        let mut tail = data.slice(tail_at..at);
        let look = answers.is_some();
        let removed = match kind {
            WriteKind::Put => {
                let write: Write<'_> = codec::decode_borrowed(head).map_err(malformed)?;
                match refuse(view, 0, write.key, write.condition)? {
                    None => {
                        put(view, write.key, &tail);
                        Ok(0)
                    }
                    Some(failure) => Err(failure),
                }
            }
            WriteKind::Delete => {
                let write: Write<'_> = codec::decode_borrowed(head).map_err(malformed)?;
                match refuse(view, 0, write.key, write.condition)? {
                    None => Ok(delete(view, write.key, look)?),
                    Some(failure) => Err(failure),
                }
            }
            WriteKind::Batch => {
                let batch: Batch<'_> = codec::decode_borrowed(head).map_err(malformed)?;
                match refuse_batch(view, &batch)? {
                    None => Ok(apply_batch(view, &batch, &mut tail, look)?),
                    Some(failure) => Err(failure),
                }
            }
        };
        if let Some(answers) = answers.as_deref_mut() {
            answers.push(removed.map(|removed| WriteDone { revision: view.revision, removed }));
        }
    }
    Ok(())
}

fn apply_batch(view: &mut View, batch: &Batch<'_>, tail: &mut Bytes, look: bool) -> Result<u32, BadEntry> {
    let mut removed = 0;
    for op in &batch.ops {
        match op {
            BatchOp::Put { key, value_bytes, .. } => {
                let length = *value_bytes as usize;
                if length > tail.len() {
                    return Err(BadEntry("its values are shorter than its operations say".into()));
                }
                put(view, key, &tail.split_to(length));
            }
            BatchOp::Delete { key, .. } => removed += delete(view, key, look)?,
            BatchOp::Check { .. } | BatchOp::Read { .. } => {}
        }
    }
    Ok(removed)
}

/// The first condition of a batch that does not hold. All are looked at before anything of the batch is done.
fn refuse_batch(view: &View, batch: &Batch<'_>) -> Result<Option<Failure>, BadEntry> {
    for (op, operation) in batch.ops.iter().zip(0..) {
        if let Some(failure) = refuse(view, operation, op.key(), op.condition())? {
            return Ok(Some(failure));
        }
    }
    Ok(None)
}

/// Why a write is not done, if its condition does not hold. Without a condition nothing is looked up.
fn refuse(view: &View, operation: u32, key: &[u8], condition: Condition<'_>) -> Result<Option<Failure>, BadEntry> {
    if condition == Condition::Always {
        return Ok(None);
    }
    let found = view.get(key).map_err(|error| BadEntry(error.to_string()))?;
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

fn put(view: &mut View, key: &[u8], value: &Bytes) {
    view.revision += 1;
    view.active.put(key, view.revision, value);
}

/// Whether there was a row is looked up only where somebody waits to hear it: it changes nothing in the state.
fn delete(view: &mut View, key: &[u8], look: bool) -> Result<u32, BadEntry> {
    let existed = look && view.get(key).map_err(|error| BadEntry(error.to_string()))?.is_some();
    view.revision += 1;
    view.active.delete(key);
    Ok(u32::from(existed))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::log::Mark;
    use crate::store::Base;
    use crate::table::Table;
    use shkv_proto::KeyspaceId;

    fn view() -> View {
        View { active: Table::default(), sealed: None, base: Base::empty(), applied: Mark::default(), revision: 0 }
    }

    fn head(key: &[u8]) -> Vec<u8> {
        codec::encode(&Write { keyspace: KeyspaceId(1), key, condition: Condition::Always, id: None })
            .expect("it is small")
    }

    #[test]
    fn a_group_is_applied_in_its_order() {
        let ops = vec![
            BatchOp::Put { key: b"a", value_bytes: 1, condition: Condition::Always },
            BatchOp::Delete { key: b"b", condition: Condition::Present },
            BatchOp::Put { key: b"c", value_bytes: 2, condition: Condition::Absent },
        ];
        let batch = codec::encode(&Batch { keyspace: KeyspaceId(1), ops, id: None }).expect("it is small");
        let mut group = Group::default();
        group.add(WriteKind::Put, &head(b"a"), b"1");
        group.add(WriteKind::Put, &head(b"b"), b"2");
        group.add(WriteKind::Delete, &head(b"a"), b"");
        group.add(WriteKind::Delete, &head(b"a"), b"");
        group.add(WriteKind::Batch, &batch, b"345");
        let data = Bytes::from(group.finish());
        let mut view = view();
        let mut answers = Vec::new();
        apply(&data, &mut view, Some(&mut answers)).expect("a sound entry");
        let told: Vec<_> = answers
            .into_iter()
            .map(|answer| answer.map(|done| (done.revision, done.removed)).expect("no conditions"))
            .collect();
        assert_eq!(told, [(1, 0), (2, 0), (3, 1), (4, 0), (7, 1)]);
        let get =
            |key: &[u8]| view.get(key).expect("memory cannot fail").map(|(version, value)| (version, value.to_vec()));
        assert_eq!(get(b"a"), Some((5, b"3".to_vec())));
        assert_eq!(get(b"b"), None);
        assert_eq!(get(b"c"), Some((7, b"45".to_vec())));
        let mut silent = self::view();
        apply(&data, &mut silent, None).expect("a sound entry");
        assert_eq!((silent.revision, &silent.active), (view.revision, &view.active), "answers change nothing");
    }

    #[test]
    fn a_write_whose_condition_does_not_hold_changes_nothing() {
        let mut view = view();
        type Step<'a> = (&'a [u8], Condition<'a>, Option<&'a [u8]>);
        let mut run = |writes: &[Step<'_>]| {
            let mut group = Group::default();
            for (key, condition, value) in writes {
                let head = codec::encode(&Write { keyspace: KeyspaceId(1), key, condition: *condition, id: None })
                    .expect("small");
                let kind = if value.is_some() { WriteKind::Put } else { WriteKind::Delete };
                group.add(kind, &head, value.unwrap_or_default());
            }
            let mut answers = Vec::new();
            apply(&Bytes::from(group.finish()), &mut view, Some(&mut answers)).expect("a sound entry");
            let told = |answer: Result<WriteDone, Failure>| match answer {
                Ok(done) => Ok(done.revision),
                Err(Failure::Condition { operation: 0, version }) => Err(version),
                Err(other) => panic!("{other}"),
            };
            answers.into_iter().map(told).collect::<Vec<_>>()
        };
        let one: Option<&[u8]> = Some(b"1");
        let answers = run(&[
            (b"k", Condition::Present, one),
            (b"k", Condition::Version(0), one),
            (b"k", Condition::Value(b""), one),
            (b"k", Condition::Absent, one),
            (b"k", Condition::Absent, one),
            (b"k", Condition::Version(1), one),
            (b"k", Condition::Version(1), one),
            (b"k", Condition::Value(b"2"), None),
            (b"k", Condition::Value(b"1"), None),
            (b"k", Condition::Present, None),
            (b"k", Condition::Absent, one),
        ]);
        let expected = [
            Err(None),
            Err(None),
            Err(None),
            Ok(1),
            Err(Some(1)),
            Ok(2),
            Err(Some(2)),
            Err(Some(2)),
            Ok(3),
            Err(None),
            Ok(4),
        ];
        assert_eq!(answers, expected);
    }

    #[test]
    fn a_batch_is_done_only_if_all_its_conditions_hold_before_it() {
        let batch = |check: Condition<'_>| {
            let ops = vec![
                BatchOp::Put { key: b"a", value_bytes: 1, condition: Condition::Absent },
                BatchOp::Check { key: b"b", condition: check },
            ];
            let head = codec::encode(&Batch { keyspace: KeyspaceId(1), ops, id: None }).expect("it is small");
            let mut group = Group::default();
            group.add(WriteKind::Batch, &head, b"x");
            Bytes::from(group.finish())
        };
        let (mut view, mut answers) = (view(), Vec::new());
        apply(&batch(Condition::Present), &mut view, Some(&mut answers)).expect("a sound entry");
        assert_eq!((view.revision, view.get(b"a").expect("memory")), (0, None), "not half of it");
        apply(&batch(Condition::Absent), &mut view, Some(&mut answers)).expect("a sound entry");
        let refused = Err(Failure::Condition { operation: 1, version: None });
        assert_eq!(answers, [refused, Ok(WriteDone { revision: 1, removed: 0 })]);
    }

    #[test]
    fn every_cut_of_an_entry_is_refused_without_panic() {
        let mut group = Group::default();
        group.add(WriteKind::Put, &head(b"key"), b"value");
        let data = Bytes::from(group.finish());
        for end in (0..data.len()).filter(|end| *end != 1) {
            assert!(apply(&data.slice(..end), &mut view(), None).is_err(), "{end}");
        }
    }

    #[test]
    fn what_is_over_a_limit_is_refused_by_name() {
        let yes = |_, _: &[u8]| Ok(());
        let code = |result: Result<(), Failure>| match result {
            Err(Failure::Refusal { code, .. }) => Some(code),
            _ => None,
        };
        assert_eq!(code(check(WriteKind::Put, &head(b""), b"", yes)), Some(RefusalCode::KeyEmpty));
        assert_eq!(
            code(check(WriteKind::Put, &head(&[1; KEY_BYTES_MAX + 1]), b"", yes)),
            Some(RefusalCode::KeyTooLarge)
        );
        assert_eq!(
            code(check(WriteKind::Put, &head(b"k"), &vec![0; VALUE_BYTES_MAX + 1], yes)),
            Some(RefusalCode::ValueTooLarge)
        );
        assert_eq!(code(check(WriteKind::Delete, &head(b"k"), b"x", yes)), Some(RefusalCode::Malformed));
        assert_eq!(code(check(WriteKind::Put, b"\xff\xff", b"", yes)), Some(RefusalCode::Malformed));
        let batch = |ops| codec::encode(&Batch { keyspace: KeyspaceId(1), ops, id: None }).expect("it is small");
        assert_eq!(code(check(WriteKind::Batch, &batch(vec![]), b"", yes)), Some(RefusalCode::BatchLimits));
        let lying = batch(vec![BatchOp::Put { key: b"k", value_bytes: 5, condition: Condition::Always }]);
        assert_eq!(code(check(WriteKind::Batch, &lying, b"four", yes)), Some(RefusalCode::Malformed));
        assert_eq!(check(WriteKind::Put, &head(&[1; KEY_BYTES_MAX]), b"v", yes), Ok(()));
    }
}
