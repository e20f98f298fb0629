//! When operations begin: as soon as one may, or at a rate that does not wait for the server.
//!
//! At a rate, what is late is counted from when it was due, so that a server that stalls cannot hide how many requests it
//! would have kept waiting (Tene, "How not to measure latency", 2013: coordinated omission).

#![expect(clippy::disallowed_methods, reason = "a shell: waits and tells the time")]

use std::time::{Duration, Instant};

/// How much later than asked for a timer may fire. That is not the server's doing, and not counted.
const TIMER_GRAIN: Duration = Duration::from_millis(2);

/// The beginnings of one worker's operations.
#[derive(Clone, Debug)]
pub struct Pace {
    every: Option<Duration>,
    due: Instant,
}

impl Pace {
    /// Of the worker with this number of so many workers that together do `rate` operations per second.
    pub fn new(rate: Option<f64>, worker: u64, workers: u64) -> Self {
        let now = Instant::now();
        match rate {
            None => Self { every: None, due: now },
            Some(rate) => {
                let every = Duration::from_secs_f64(workers as f64 / rate);
                Self { every: Some(every), due: now + every.mul_f64(worker as f64 / workers as f64) }
            }
        }
    }

    /// When the next operation is due; `None` if whenever there is room.
    pub fn due(&self) -> Option<Instant> {
        self.every.map(|_| self.due)
    }

    /// Takes the next beginning, if it is due: from when on the operation counts.
    pub fn take(&mut self, now: Instant) -> Option<Instant> {
        let Some(every) = self.every else { return Some(now) };
        if now < self.due {
            return None;
        }
        let due = self.due;
        self.due += every;
        Some(if now < due + TIMER_GRAIN { now } else { due })
    }

    /// Waits until the next operation is due, and tells from when on it counts.
    pub async fn begin(&mut self) -> Instant {
        loop {
            let now = Instant::now();
            if let Some(began) = self.take(now) {
                return began;
            }
            tokio::time::sleep_until(self.due.into()).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_rate_every_moment_will_do() {
        let mut pace = Pace::new(None, 3, 4);
        let now = Instant::now();
        assert_eq!((pace.due(), pace.take(now), pace.take(now)), (None, Some(now), Some(now)));
    }

    #[test]
    fn at_a_rate_what_is_late_counts_from_when_it_was_due() {
        let mut pace = Pace::new(Some(100.0), 1, 2);
        let first = pace.due().unwrap();
        assert_eq!(pace.take(first - Duration::from_millis(1)), None);
        let grain = first + Duration::from_millis(1);
        assert_eq!(pace.take(grain), Some(grain), "the timer was late, not the server");
        // The server has stalled for a second: fifty operations of this worker were due meanwhile.
        let now = first + Duration::from_secs(1);
        let mut begun = Vec::new();
        while let Some(at) = pace.take(now) {
            begun.push(at);
        }
        assert_eq!(begun.len(), 50);
        assert_eq!(begun[0], first + Duration::from_millis(20));
        assert_eq!(begun[49], now);
    }
}
