//! What a write may be conditional on. Pure.

use crate::error::Error;
use bytes::Bytes;
use shkv_proto::limits::CONDITION_BYTES_MAX;
use shkv_proto::message::{Condition, RefusalCode};

/// What must hold of a row. It is looked at when the write is done; nothing comes between looking and writing.
///
/// ```no_run
/// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
/// use shkv_client::Check;
///
/// client.txn().check("leader", Check::Value("a".into())).put("order", "go").commit().await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub enum Check {
    /// Nothing.
    #[default]
    Always,
    /// There is no row.
    Absent,
    /// There is a row.
    Present,
    /// There is a row of this version.
    Version(u64),
    /// There is a row of this value, of 1 MiB at most.
    Value(Bytes),
}

impl Check {
    pub(crate) fn condition(&self) -> Condition<'_> {
        match self {
            Self::Always => Condition::Always,
            Self::Absent => Condition::Absent,
            Self::Present => Condition::Present,
            Self::Version(version) => Condition::Version(*version),
            Self::Value(value) => Condition::Value(value),
        }
    }

    /// Bytes that it adds to a batch.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Value(value) => value.len(),
            Self::Always | Self::Absent | Self::Present | Self::Version(_) => 0,
        }
    }
}

impl From<Condition<'_>> for Check {
    fn from(condition: Condition<'_>) -> Self {
        match condition {
            Condition::Always => Self::Always,
            Condition::Absent => Self::Absent,
            Condition::Present => Self::Present,
            Condition::Version(version) => Self::Version(version),
            Condition::Value(value) => Self::Value(Bytes::copy_from_slice(value)),
        }
    }
}

/// Refuses a condition that no shard would take.
pub(crate) fn check_condition(check: &Check) -> Result<(), Error> {
    if check.bytes() > CONDITION_BYTES_MAX {
        let text = format!(
            "a value of {} bytes to compare with is over CONDITION_BYTES_MAX = {CONDITION_BYTES_MAX}",
            check.bytes()
        );
        return Err(Error::refused(RefusalCode::ValueTooLarge, text));
    }
    Ok(())
}
