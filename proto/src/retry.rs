//! What to do when an attempt has failed: shared by balancer and client. Pure.
//!
//! The rule that everything here serves: a write that may have been done is never reported as not done, and never done
//! twice. One with a [`crate::message::WriteId`] may be sent again, because it is known again; one without may not. A
//! read may always be sent again.

use crate::ids::NodeId;
use crate::link::{CallError, LinkError};
use crate::message::{Failure, RefusalCode};
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

/// What is asked for, as far as it matters when it is sent again.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Asked {
    /// It changes nothing.
    Read,
    /// A write with an id: whoever has done it knows it again.
    KnownWrite,
    /// A write without an id: sent twice, it may be done twice.
    NamelessWrite,
}

/// The attempts at one request, and what they leave open.
///
/// Invariant: once an attempt at a write may have been done, no failure but [`Failure::Condition`], which is an answer that
/// is remembered with the write, ends it as anything but [`Failure::Unknown`].
#[derive(Clone, Debug)]
pub struct Attempts {
    asked: Asked,
    tries: u32,
    /// What happened to the first attempt at a write that may have been done.
    open: Option<String>,
}

impl Attempts {
    /// None yet.
    #[must_use]
    pub fn new(asked: Asked) -> Self {
        Self { asked, tries: 0, open: None }
    }

    /// How many have failed.
    #[must_use]
    pub fn tries(&self) -> u32 {
        self.tries
    }

    /// Whether one of them may have been done.
    #[must_use]
    pub fn may_be_done(&self) -> bool {
        self.open.is_some()
    }

    /// Takes a failed attempt into account, and decides what follows.
    pub fn failed(&mut self, error: &CallError) -> Step {
        self.tries += 1;
        if self.asked != Asked::Read && self.open.is_none() && leaves_open(error) {
            self.open = Some(error.to_string());
        }
        match after(error, self.asked == Asked::NamelessWrite, self.tries) {
            Step::Stop(Failure::Refusal { code: RefusalCode::Forgotten, text }) if self.asked != Asked::Read => {
                Step::Stop(Failure::Unknown { text })
            }
            Step::Stop(failure @ Failure::Refusal { .. }) => Step::Stop(match &self.open {
                Some(open) => Failure::unknown(format!("{open}; sent again, it was refused: {failure}")),
                None => failure,
            }),
            step @ (Step::Stop(_) | Step::Again { .. }) => step,
        }
    }

    /// What to answer when the deadline has come and the last attempt ended with `error`.
    #[must_use]
    pub fn out_of_time(&self, error: &CallError) -> Failure {
        match &self.open {
            Some(open) => {
                Failure::unknown(format!("{open}; no answer to it was had before the deadline; last: {error}"))
            }
            None => out_of_time(error, self.asked == Asked::NamelessWrite),
        }
    }
}

/// Whether a write that ended so may have been done.
fn leaves_open(error: &CallError) -> bool {
    match error {
        CallError::Failure(failure) => matches!(failure, Failure::Unknown { .. }),
        CallError::Link(LinkError::Lost(_) | LinkError::Expired) => true,
        CallError::Link(LinkError::NotSent(_)) => false,
    }
}

/// Decides what follows the failure of attempt number `tries` (from 1). `write` says that it must not be sent again once it
/// may have been done.
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

    fn lost() -> CallError {
        CallError::Link(LinkError::Lost("cable cut".into()))
    }

    #[test]
    fn a_write_that_is_known_again_is_sent_again_and_unknown_only_at_its_deadline() {
        let mut attempts = Attempts::new(Asked::KnownWrite);
        for error in [lost(), CallError::Link(LinkError::Expired), CallError::Failure(Failure::unknown("x"))] {
            assert!(matches!(attempts.failed(&error), Step::Again { .. }), "{error}");
            assert!(attempts.may_be_done());
        }
        let busy = CallError::Failure(Failure::Busy { retry_after_ms: 1, text: "x".into() });
        assert!(matches!(attempts.failed(&busy), Step::Again { .. }));
        let Failure::Unknown { text } = attempts.out_of_time(&busy) else { panic!("told as not done") };
        assert!(text.contains("cable cut"), "{text}");
        assert!(matches!(Attempts::new(Asked::KnownWrite).out_of_time(&busy), Failure::Busy { .. }));
    }

    #[test]
    fn a_refusal_of_what_may_be_done_already_is_no_proof_that_it_is_not() {
        let full = CallError::Failure(Failure::refusal(RefusalCode::DiskFull, "full"));
        let forgotten = CallError::Failure(Failure::refusal(RefusalCode::Forgotten, "old"));
        let condition = CallError::Failure(Failure::Condition { operation: 0, version: None });
        let mut attempts = Attempts::new(Asked::KnownWrite);
        assert!(matches!(attempts.failed(&full), Step::Stop(Failure::Refusal { .. })));
        assert!(matches!(attempts.failed(&forgotten), Step::Stop(Failure::Unknown { .. })), "never told as not done");
        attempts.failed(&lost());
        assert!(matches!(attempts.failed(&full), Step::Stop(Failure::Unknown { .. })));
        assert!(matches!(attempts.failed(&condition), Step::Stop(Failure::Condition { .. })), "it is remembered");
        let mut reading = Attempts::new(Asked::Read);
        reading.failed(&lost());
        assert!(
            matches!(reading.failed(&full), Step::Stop(Failure::Refusal { .. })),
            "a read has nothing to leave open"
        );
    }

    #[test]
    fn a_write_without_an_id_is_never_sent_again_once_it_may_be_done() {
        assert!(matches!(Attempts::new(Asked::NamelessWrite).failed(&lost()), Step::Stop(Failure::Unknown { .. })));
    }

    #[test]
    fn a_refusal_is_final() {
        let error = CallError::Failure(Failure::refusal(RefusalCode::KeyTooLarge, "x"));
        assert!(matches!(after(&error, false, 1), Step::Stop(Failure::Refusal { .. })));
    }
}
