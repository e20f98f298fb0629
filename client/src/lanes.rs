//! By what a client's writes are known when they are sent again, and which of them are still under way.
//!
//! A shard remembers what became of the writes that a client has not yet heard of, up to a bound. So writes are numbered
//! in *lanes*, each of which is a client of its own to the shards: when one write of a lane is held up while too many others
//! are answered, the next writes open a new lane and the old one ends with its last write.

use parking_lot::Mutex;
use rand::RngExt;
use shkv_proto::message::WriteId;
use shkv_proto::world;
use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

/// Most writes of a lane from the first that is under way on: half of what a shard remembers of one client.
const LANE_WRITES_MAX: usize = 2_048;

/// Numbers the writes of a client.
#[derive(Debug)]
pub(crate) struct Lanes {
    current: Mutex<Arc<Lane>>,
}

#[derive(Debug)]
struct Lane {
    client: u64,
    state: Mutex<State>,
}

/// Invariant: the first of `open` is true, or there is none; so all writes up to `answered` are over, and the next is not.
#[derive(Debug, Default)]
struct State {
    answered: u64,
    /// Of each write behind `answered`, whether it is under way.
    open: VecDeque<bool>,
}

/// A write under way. It is over when this is dropped, and then never sent again.
#[derive(Debug)]
pub(crate) struct Ticket {
    lane: Arc<Lane>,
    sequence: u64,
}

impl Default for Lanes {
    fn default() -> Self {
        Self { current: Mutex::new(Lane::new()) }
    }
}

impl Lanes {
    /// Begins a write.
    pub(crate) fn begin(&self) -> Ticket {
        let mut current = self.current.lock();
        if current.state.lock().open.len() >= LANE_WRITES_MAX {
            *current = Lane::new();
        }
        let lane = current.clone();
        let mut state = lane.state.lock();
        state.open.push_back(true);
        let sequence = state.answered + state.open.len() as u64;
        drop(state);
        Ticket { lane, sequence }
    }
}

impl Lane {
    fn new() -> Arc<Self> {
        Arc::new(Self { client: world::rng().random_range(1..=u64::MAX), state: Mutex::default() })
    }
}

impl Ticket {
    /// The write's id for an attempt. `age` is how long ago it was sent for the first time, if an attempt may have been done.
    pub(crate) fn id(&self, age: Option<Duration>) -> WriteId {
        let age_ms = age.map_or(0, |age| age.as_millis().clamp(1, u128::from(u32::MAX)) as u32);
        let answered = self.lane.state.lock().answered;
        WriteId { client: self.lane.client, sequence: self.sequence, answered, age_ms }
    }
}

impl Drop for Ticket {
    fn drop(&mut self) {
        let mut state = self.lane.state.lock();
        let at = (self.sequence - state.answered - 1) as usize; // above what is answered: it was under way until now
        if let Some(open) = state.open.get_mut(at) {
            *open = false;
        }
        while state.open.front() == Some(&false) {
            state.open.pop_front();
            state.answered += 1;
        }
    }
}

/// Spreads a pause, so that those that have met each other do not meet again.
pub(crate) fn spread(pause: Duration) -> Duration {
    world::rng().random_range(pause / 4..=pause * 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_write_is_answered_when_all_before_it_are() {
        let lanes = Lanes::default();
        let tickets: Vec<Ticket> = (0..4).map(|_| lanes.begin()).collect();
        let [first, second, third, fourth] = <[Ticket; 4]>::try_from(tickets).expect("four");
        assert_eq!([1, 2, 3, 4], [&first, &second, &third, &fourth].map(|ticket| ticket.id(None).sequence));
        drop(second);
        assert_eq!(fourth.id(None).answered, 0, "the first is under way");
        drop(first);
        assert_eq!(fourth.id(None).answered, 2);
        drop(fourth);
        assert_eq!(third.id(None).answered, 2);
        drop(third);
        let next = lanes.begin();
        assert_eq!((next.id(None).sequence, next.id(None).answered), (5, 4));
    }

    #[test]
    fn a_write_that_is_held_up_does_not_make_a_shard_remember_without_bound() {
        let lanes = Lanes::default();
        let held_up = lanes.begin();
        for _ in 0..3 * LANE_WRITES_MAX {
            let id = lanes.begin().id(None);
            assert!(id.sequence > id.answered && id.sequence - id.answered <= LANE_WRITES_MAX as u64);
        }
        let (old, new) = (held_up.id(None), lanes.begin().id(None));
        assert_ne!(old.client, new.client);
        assert_eq!((old.sequence, old.answered), (1, 0));
    }

    #[test]
    fn only_an_attempt_that_may_have_been_done_has_an_age() {
        let ticket = Lanes::default().begin();
        assert_eq!(ticket.id(None).age_ms, 0);
        assert_eq!(ticket.id(Some(Duration::from_micros(3))).age_ms, 1);
        assert_eq!(ticket.id(Some(Duration::from_millis(250))).age_ms, 250);
        assert_ne!(ticket.id(None).client, 0);
    }
}
