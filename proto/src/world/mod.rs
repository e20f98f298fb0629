//! The world around a process: time of day, randomness, threads that may block, and the network. In the program that people
//! run each is the system's own and costs nothing more; with the feature `sim`, which only the tests turn on, a process that
//! runs inside a simulation finds a world there that a seed decides.
//!
//! It knows nothing of nodes, balancers and clients.

#![expect(clippy::disallowed_methods, reason = "a shell: this is the door to the system")]

pub mod net;
#[cfg(feature = "sim")]
mod net_sim;
pub mod news;
#[cfg(feature = "sim")]
pub mod sim;

use std::time::{Duration, SystemTime, UNIX_EPOCH};

/// Where random numbers come from.
#[cfg(not(feature = "sim"))]
#[must_use]
pub fn rng() -> rand::rngs::ThreadRng {
    rand::rng()
}

/// Where random numbers come from.
#[cfg(feature = "sim")]
#[must_use]
pub fn rng() -> sim::WorldRng {
    sim::WorldRng::here()
}

/// Whether the process runs inside a simulation: then it starts no threads.
#[must_use]
pub fn is_simulated() -> bool {
    #[cfg(feature = "sim")]
    let is = sim::here().is_some();
    #[cfg(not(feature = "sim"))]
    let is = false;
    is
}

/// The time since 1970.
#[must_use]
pub fn unix_time() -> Duration {
    #[cfg(feature = "sim")]
    if let Some(host) = sim::here() {
        return host.unix_time();
    }
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default()
}

/// The number of this process, and its processor time so far in microseconds. Those of a simulation share one, and say 0.
#[must_use]
pub fn process() -> (u32, u64) {
    if is_simulated() {
        return (0, 0);
    }
    let spent = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    (std::process::id(), spent.tv_sec as u64 * 1_000_000 + spent.tv_nsec as u64 / 1_000)
}

/// Does what may block on a thread that may.
///
/// # Errors
/// When the work panics, or the runtime ends before it began.
pub async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> T + Send + 'static,
) -> Result<T, tokio::task::JoinError> {
    if is_simulated() {
        return Ok(work());
    }
    tokio::task::spawn_blocking(work).await
}
