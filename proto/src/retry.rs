//! What to do when an attempt has failed: shared by balancer and client. Pure.
//!
//! The rule that everything here serves: a write that may have been done is never sent again and never reported as not
//! done. A read may always be sent again.

use crate::ids::NodeId;
use crate::link::{CallError, LinkError};
use crate::message::Failure;
use std::time::Duration;

/// Longest pause between two attempts.
const PAUSE_MAX: Duration = Duration::from_millis(200);

/// What to do next.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Step {
    /// Try again after a pause.
    Again {
        /// The pause.
        after: Duration,
        /// Whether to get the map anew first.
        new_map: bool,
        /// The node to try, if one is named.
        hint: Option<NodeId>,
    },
    /// Give up: this is the answer.
    Stop(Failure),
}

/// Decides what follows the failure of attempt number `tries` (from 1).
#[must_use]
pub fn after(error: &CallError, write: bool, tries: u32) -> Step {
    let pause = backoff(tries);
    let again = |after, new_map, hint| Step::Again { after, new_map, hint };
    match error {
        CallError::Failure(failure) => match failure {
            Failure::Refusal { .. } | Failure::Condition { .. } => Step::Stop(failure.clone()),
            Failure::NotLeader { hint: Some(node) } => {
                again(if tries <= 2 { Duration::ZERO } else { pause }, false, Some(*node))
            }
            Failure::NotLeader { hint: None } => again(pause, false, None),
            Failure::WrongShard { .. } => again(if tries <= 1 { Duration::ZERO } else { pause }, true, None),
            Failure::Busy { retry_after_ms, .. } => again(
                Duration::from_millis(u64::from(*retry_after_ms)).clamp(Duration::from_millis(1), PAUSE_MAX),
                false,
                None,
            ),
            Failure::Behind { .. } | Failure::Aborted { .. } => again(pause, false, None),
            Failure::Unknown { .. } if write => Step::Stop(failure.clone()),
            Failure::Unknown { .. } => again(pause, false, None),
        },
        CallError::Link(LinkError::NotSent(_)) => again(pause, tries.is_multiple_of(4), None),
        CallError::Link(error @ (LinkError::Lost(_) | LinkError::Expired)) if write => {
            Step::Stop(Failure::unknown(error.to_string()))
        }
        CallError::Link(LinkError::Lost(_) | LinkError::Expired) => again(pause, false, None),
    }
}

/// What to answer when the deadline has come and the last attempt ended with `error`.
#[must_use]
pub fn out_of_time(error: &CallError, write: bool) -> Failure {
    match after(error, write, 1) {
        Step::Stop(failure) => failure,
        Step::Again { .. } => {
            Failure::Busy { retry_after_ms: 0, text: format!("no success before the deadline; last: {error}") }
        }
    }
}

fn backoff(tries: u32) -> Duration {
    Duration::from_millis(5 << tries.saturating_sub(1).min(6)).min(PAUSE_MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::message::RefusalCode;

    #[test]
    fn a_write_that_may_be_done_is_never_sent_again() {
        let may_be_done = [
            CallError::Link(LinkError::Lost("x".into())),
            CallError::Link(LinkError::Expired),
            CallError::Failure(Failure::unknown("x")),
        ];
        for error in may_be_done {
            for tries in 1..100 {
                assert!(matches!(after(&error, true, tries), Step::Stop(Failure::Unknown { .. })), "{error}");
                assert!(matches!(after(&error, false, tries), Step::Again { .. }), "{error}");
            }
            assert!(matches!(out_of_time(&error, true), Failure::Unknown { .. }));
        }
    }

    #[test]
    fn what_is_certainly_not_done_is_tried_again_and_never_called_unknown() {
        let not_done = [
            CallError::Link(LinkError::NotSent("x".into())),
            CallError::Failure(Failure::NotLeader { hint: None }),
            CallError::Failure(Failure::NotLeader { hint: Some(NodeId(3)) }),
            CallError::Failure(Failure::WrongShard { epoch: crate::Epoch(1) }),
            CallError::Failure(Failure::Busy { retry_after_ms: 7, text: "x".into() }),
            CallError::Failure(Failure::Behind { revision: 1 }),
            CallError::Failure(Failure::Aborted { text: "x".into() }),
        ];
        for error in not_done {
            for tries in 1..100 {
                assert!(
                    matches!(after(&error, true, tries), Step::Again { after, .. } if after <= PAUSE_MAX),
                    "{error}"
                );
            }
            assert!(matches!(out_of_time(&error, true), Failure::Busy { .. }));
        }
    }

    #[test]
    fn a_refusal_is_final() {
        let error = CallError::Failure(Failure::refusal(RefusalCode::KeyTooLarge, "x"));
        assert!(matches!(after(&error, false, 1), Step::Stop(Failure::Refusal { .. })));
    }
}
