//! The controller's lease: when to renew it, when to take it, when not to act on it. Pure: the time comes in as an argument.
//!
//! Two rows of the system shard: `controller` says who holds the lease and is written at a take-over only, `lease` is
//! rewritten by every renewal. Whoever sees `lease` unchanged for [`TAKE_AFTER`] of its own monotonic clock takes it, on
//! the condition that both rows are still as they were read: a renewal that comes in between keeps the lease. What the holder changes is conditional on the same row, so one
//! that was deposed and does not know it changes nothing (Gray and Cheriton, "Leases", 1989, with the fencing of the
//! writes done by the store itself).

use std::time::Duration;
use tokio::time::Instant;

/// How often the holder renews the lease.
pub(crate) const RENEW_EVERY: Duration = Duration::from_secs(2);
/// How long the others see no renewal before they take it.
pub(crate) const TAKE_AFTER: Duration = Duration::from_secs(6);
/// How long after its last renewal the holder still does what cannot be made conditional: start and stop nodes.
pub(crate) const ACT_WITHIN: Duration = Duration::from_secs(4);

/// A holder's number that stands for nobody: the one before has given the lease up.
pub(crate) const NOBODY: u64 = 0;

/// The two rows as they were read, by their versions.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) struct Rows {
    /// Who holds the lease, and the version of the row.
    pub(crate) controller: Option<(u64, u64)>,
    /// The version of the row that is renewed.
    pub(crate) lease: Option<u64>,
}

/// What to do about the lease.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Act {
    /// Nothing.
    Wait,
    /// Write `lease`, if `controller` still has this version.
    Renew(u64),
    /// Write `controller`, if both rows are still as they were read.
    Take,
}

/// What a balancer knows of the lease.
#[derive(Clone, Debug)]
pub(crate) struct Lease {
    me: u64,
    /// The version of `controller` by which this balancer holds the lease, and its last renewal.
    held: Option<(u64, Instant)>,
    /// The rows as last seen, and since when they are so.
    seen: Option<(Rows, Instant)>,
}

impl Lease {
    /// Holds nothing.
    pub(crate) fn new(me: u64) -> Self {
        Self { me, held: None, seen: None }
    }

    /// What to do, by the rows as they were just read. `asked` is when they were asked for.
    pub(crate) fn decide(&mut self, rows: Rows, asked: Instant) -> Act {
        if self.seen.is_none_or(|(seen, _)| seen != rows) {
            self.seen = Some((rows, asked));
        }
        match rows.controller {
            Some((holder, version)) if holder == self.me => match self.held {
                Some((held, renewed)) if held == version => {
                    if asked.duration_since(renewed) >= RENEW_EVERY {
                        Act::Renew(version)
                    } else {
                        Act::Wait
                    }
                }
                // It was taken by a write whose answer was lost. Renewing tells whether it still holds.
                _ => Act::Renew(version),
            },
            other => {
                self.held = None;
                let since = self.seen.map_or(asked, |(_, since)| since);
                match other {
                    None | Some((NOBODY, _)) => Act::Take,
                    Some(_) if asked.duration_since(since) >= TAKE_AFTER => Act::Take,
                    Some(_) => Act::Wait,
                }
            }
        }
    }

    /// A renewal or a take-over was written: `controller` has this version. `asked` is when the write was begun.
    pub(crate) fn renewed(&mut self, version: u64, asked: Instant) {
        self.held = Some((version, asked));
    }

    /// A write was refused because somebody else holds the lease.
    pub(crate) fn lost(&mut self) {
        self.held = None;
    }

    /// The version of `controller` on which this balancer's changes are conditional, while it may believe to hold the lease.
    pub(crate) fn version(&self) -> Option<u64> {
        self.held.map(|(version, _)| version)
    }

    /// Whether the last renewal is so young that nobody else can hold the lease.
    pub(crate) fn may_act(&self, now: Instant) -> bool {
        self.held.is_some_and(|(_, renewed)| now.duration_since(renewed) < ACT_WITHIN)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[expect(clippy::disallowed_methods, reason = "a test needs some instant to count from")]
    fn start() -> Instant {
        Instant::now()
    }

    fn rows(controller: Option<(u64, u64)>, lease: Option<u64>) -> Rows {
        Rows { controller, lease }
    }

    fn after(start: Instant, secs: u64) -> Instant {
        start + Duration::from_secs(secs)
    }

    #[test]
    fn a_free_lease_is_taken_and_then_renewed() {
        let (t, mut lease) = (start(), Lease::new(1));
        assert_eq!(lease.decide(rows(None, None), t), Act::Take);
        lease.renewed(10, t);
        assert!(lease.may_act(after(t, 3)) && !lease.may_act(after(t, 4)));
        assert_eq!(lease.decide(rows(Some((1, 10)), Some(11)), after(t, 1)), Act::Wait);
        assert_eq!(lease.decide(rows(Some((1, 10)), Some(11)), after(t, 2)), Act::Renew(10));
    }

    #[test]
    fn a_lease_that_is_renewed_is_left_alone_and_one_that_is_not_is_taken() {
        let (t, mut lease) = (start(), Lease::new(2));
        for secs in 0..20 {
            assert_eq!(lease.decide(rows(Some((1, 10)), Some(secs / 2)), after(t, secs)), Act::Wait);
        }
        assert_eq!(lease.decide(rows(Some((1, 10)), Some(9)), after(t, 23)), Act::Wait, "last renewed at 18");
        assert_eq!(lease.decide(rows(Some((1, 10)), Some(9)), after(t, 24)), Act::Take);
    }

    #[test]
    fn a_holder_that_was_deposed_holds_nothing() {
        let (t, mut lease) = (start(), Lease::new(1));
        lease.renewed(10, t);
        assert_eq!(lease.decide(rows(Some((2, 20)), Some(21)), after(t, 1)), Act::Wait);
        assert_eq!(lease.version(), None);
        assert!(!lease.may_act(after(t, 1)));
    }

    #[test]
    fn a_take_over_whose_answer_was_lost_is_found_out_by_renewing() {
        let (t, mut lease) = (start(), Lease::new(1));
        assert_eq!(lease.decide(rows(Some((1, 10)), Some(11)), t), Act::Renew(10));
        lease.renewed(10, t);
        assert_eq!(lease.version(), Some(10));
        lease.lost();
        assert_eq!(lease.version(), None);
    }
}
