//! What a call can end with besides success, sorted by what the caller must do.

use shkv_proto::message::{Failure, RefusalCode};

/// Why a call did not succeed.
///
/// ```
/// use shkv_client::Error;
///
/// fn may_send_again(error: &Error) -> bool {
///     match error {
///         Error::Refused { .. } => false,     // the same would happen again
///         Error::Condition { .. } => false,   // the row is not what the caller took it for
///         Error::Unavailable { .. } => true,  // certainly not done
///         Error::Unknown { .. } => false,     // read first: it may have been done
///     }
/// }
/// assert!(may_send_again(&Error::Unavailable { text: "no leader".into() }));
/// ```
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// Not done, and sending it again gives the same. The text says what was wrong and what to do.
    #[error("{text}")]
    Refused {
        /// Which, for programs.
        code: RefusalCode,
        /// For people.
        text: String,
    },
    /// Not done: a condition of the write does not hold.
    #[error(
        "operation {operation}: the condition does not hold, {}",
        version.map_or("there is no such row".to_owned(), |version| format!("the row has version {version}"))
    )]
    Condition {
        /// Which operation of a batch, from 0.
        operation: u32,
        /// The version that its row has, or `None` if there is no such row.
        version: Option<u64>,
    },
    /// Certainly not done before the deadline. It may be sent again.
    #[error("unavailable, certainly not done: {text}")]
    Unavailable {
        /// What stood in the way.
        text: String,
    },
    /// It may have been done, now or later, or not. Only a read can tell.
    #[error("outcome unknown, it may have been done: {text}")]
    Unknown {
        /// What happened.
        text: String,
    },
}

impl Error {
    pub(crate) fn refused(code: RefusalCode, text: impl Into<String>) -> Self {
        Self::Refused { code, text: text.into() }
    }

    pub(crate) fn unavailable(text: impl Into<String>) -> Self {
        Self::Unavailable { text: text.into() }
    }

    /// The refusal's code, if it is a refusal.
    ///
    /// ```
    /// let error = shkv_client::Error::Unknown { text: "connection lost".into() };
    /// assert_eq!(error.code(), None);
    /// ```
    #[must_use]
    pub fn code(&self) -> Option<RefusalCode> {
        match self {
            Self::Refused { code, .. } => Some(*code),
            Self::Condition { .. } | Self::Unavailable { .. } | Self::Unknown { .. } => None,
        }
    }
}

impl From<Failure> for Error {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Refusal { code, text } => Self::Refused { code, text },
            Failure::Condition { operation, version } => Self::Condition { operation, version },
            Failure::Busy { text, .. } => Self::Unavailable { text },
            Failure::Unknown { text } => Self::Unknown { text },
            Failure::NotLeader { .. }
            | Failure::WrongShard { .. }
            | Failure::Behind { .. }
            | Failure::Aborted { .. } => Self::Unavailable { text: failure.to_string() },
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use shkv_proto::Epoch;

    #[test]
    fn only_an_unknown_failure_becomes_an_unknown_outcome() {
        let not_done = [
            Failure::NotLeader { hint: None },
            Failure::WrongShard { epoch: Epoch(1) },
            Failure::Busy { retry_after_ms: 1, text: "x".into() },
            Failure::Behind { revision: 1 },
            Failure::Aborted { text: "x".into() },
            Failure::Aborted { text: "x".into() },
        ];
        for failure in not_done {
            assert!(matches!(Error::from(failure), Error::Unavailable { .. }));
        }
        assert!(matches!(Error::from(Failure::unknown("x")), Error::Unknown { .. }));
        let refused = Error::from(Failure::refusal(RefusalCode::DiskFull, "x"));
        assert_eq!(refused.code(), Some(RefusalCode::DiskFull));
    }
}
