//! The node's monotonic clock.

#![expect(clippy::disallowed_methods, reason = "a shell: the door to the clock")]

use tokio::time::Instant;

/// Nanoseconds since the node started.
#[derive(Clone, Copy, Debug)]
pub struct Clock {
    start: Instant,
}

impl Clock {
    /// A clock that starts now.
    #[must_use]
    pub fn start() -> Self {
        Self { start: Instant::now() }
    }

    /// The time.
    #[must_use]
    pub fn now(&self) -> u64 {
        self.start.elapsed().as_nanos() as u64
    }
}
