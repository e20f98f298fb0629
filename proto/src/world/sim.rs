//! A simulated world: hosts, each with a clock, a source of randomness and a place in a simulated network, all on one
//! thread. Whoever runs the simulation enters a host before it lets the host's tasks run; the code of the host then finds
//! itself here ([`here`]) and is told nothing else.

pub use super::net_sim::{Fate, Link, Net, NetStats};

use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{Rng, RngExt, SeedableRng, TryRng};
use std::cell::RefCell;
use std::convert::Infallible;
use std::net::IpAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

/// Most lines that a trace keeps.
const LINES_MAX: usize = 400_000;

thread_local! {
    static HERE: RefCell<Option<Arc<Host>>> = const { RefCell::new(None) };
}

/// A process in the simulation.
#[derive(Debug)]
pub struct Host {
    /// Its address.
    pub ip: IpAddr,
    /// The network that it is in.
    pub net: Arc<Net>,
    /// What is written down.
    pub trace: Arc<Trace>,
    /// A fault that is planted in its process, as a number; 0 is none.
    pub bug: u64,
    /// Milliseconds that its disk takes longer than usual.
    pub disk_delay_ms: AtomicU64,
    /// The point of its own code at which its process is to end, as a number of whoever wrote that code; 0 is none.
    pub ends_at: AtomicU64,
    ended_at: AtomicU64,
    told: Mutex<Vec<[u64; 6]>>,
    seed: u64,
    rng: Mutex<SmallRng>,
    /// Its time of day when its runtime began.
    unix_began: Duration,
    began: Mutex<Option<tokio::time::Instant>>,
}

impl Host {
    /// A process. `seed` is its own, and another one after each restart.
    #[must_use]
    pub fn new(ip: IpAddr, net: Arc<Net>, seed: u64, unix_began: Duration, bug: u64) -> Arc<Self> {
        let trace = net.trace().clone();
        let rng = Mutex::new(SmallRng::seed_from_u64(seed));
        Arc::new(Self {
            ip,
            net,
            trace,
            bug,
            disk_delay_ms: AtomicU64::new(0),
            ends_at: AtomicU64::new(0),
            ended_at: AtomicU64::new(0),
            told: Mutex::default(),
            seed,
            rng,
            unix_began,
            began: Mutex::new(None),
        })
    }

    /// Makes this the host that code finds itself on, until what is returned is dropped.
    #[must_use]
    pub fn enter(self: &Arc<Self>) -> Entered {
        Entered(HERE.with(|here| here.replace(Some(self.clone()))))
    }

    #[expect(clippy::disallowed_methods, reason = "a shell: the clock of the simulated runtime")]
    pub(super) fn unix_time(&self) -> Duration {
        let now = tokio::time::Instant::now();
        let began = *self.began.lock().get_or_insert(now);
        self.unix_began + now.saturating_duration_since(began)
    }

    /// Draws a number from the host's own randomness.
    #[must_use]
    pub fn draw(&self) -> u64 {
        self.rng.lock().next_u64()
    }

    /// Tells whoever runs the simulation something that only the two know the meaning of.
    pub fn tell(&self, words: [u64; 6]) {
        self.told.lock().push(words);
    }

    /// What the host has told since this was last asked.
    #[must_use]
    pub fn take_told(&self) -> Vec<[u64; 6]> {
        std::mem::take(&mut *self.told.lock())
    }

    /// The process is at a point of its code. Tells whether it ends there: from now on nobody hears of it, and whoever runs
    /// the simulation takes it away at the end of the millisecond.
    pub fn reaches(&self, point: u64) -> bool {
        let ends = point != 0 && self.ends_at.load(Ordering::Relaxed) == point;
        if ends {
            self.ends_at.store(0, Ordering::Relaxed);
            self.ended_at.store(point, Ordering::Relaxed);
            self.net.down(self.ip, Fate::Silence);
        }
        ends
    }

    /// The point of its code at which the process has ended; 0 if it has not.
    #[must_use]
    pub fn ended_at(&self) -> u64 {
        self.ended_at.load(Ordering::Relaxed)
    }

    /// Milliseconds since the simulation began: the same for all hosts, whatever their clocks show.
    #[must_use]
    pub fn moment_ms(&self) -> u64 {
        self.trace.0.lock().now_ms
    }

    /// How long the disk takes for something, `usual` milliseconds at the most when all is well.
    #[must_use]
    pub fn disk_pause(&self, usual: u64) -> Duration {
        let slow = self.disk_delay_ms.load(Ordering::Relaxed);
        Duration::from_millis(self.draw_below(usual + slow))
    }

    /// A number that is always the same for the same words on this host.
    #[must_use]
    pub fn fixed_draw(&self, words: &[u64]) -> u64 {
        let mix = |hash: u64, word: &u64| (hash ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(31);
        words.iter().fold(self.seed, mix).wrapping_mul(0xd6e8_feb8_6659_fd93) >> 33
    }

    /// Draws a number below `end` from the host's own randomness.
    #[must_use]
    pub fn draw_below(&self, end: u64) -> u64 {
        self.rng.lock().random_range(0..end.max(1))
    }
}

/// The host that this code runs on, if it runs inside a simulation.
#[must_use]
pub fn here() -> Option<Arc<Host>> {
    HERE.with(|here| here.borrow().clone())
}

/// While it lives, code finds itself on a host.
#[derive(Debug)]
pub struct Entered(Option<Arc<Host>>);

impl Drop for Entered {
    fn drop(&mut self) {
        HERE.with(|here| *here.borrow_mut() = self.0.take());
    }
}

/// Randomness: a host's own inside a simulation, the system's outside.
#[derive(Clone, Debug)]
pub struct WorldRng(Option<Arc<Host>>);

impl WorldRng {
    pub(super) fn here() -> Self {
        Self(here())
    }

    #[expect(clippy::disallowed_methods, reason = "a shell: the door to the system's randomness")]
    fn with<T>(&self, draw: impl FnOnce(&mut dyn Rng) -> T) -> T {
        match &self.0 {
            Some(host) => draw(&mut *host.rng.lock()),
            None => draw(&mut rand::rng()),
        }
    }
}

impl TryRng for WorldRng {
    type Error = Infallible;

    fn try_next_u32(&mut self) -> Result<u32, Infallible> {
        Ok(self.with(|rng| rng.next_u32()))
    }

    fn try_next_u64(&mut self) -> Result<u64, Infallible> {
        Ok(self.with(|rng| rng.next_u64()))
    }

    fn try_fill_bytes(&mut self, bytes: &mut [u8]) -> Result<(), Infallible> {
        self.with(|rng| rng.fill_bytes(bytes));
        Ok(())
    }
}

/// What happened, as a number that depends on every event and on their order; the events too, if they are asked for.
#[derive(Debug)]
pub struct Trace(Mutex<Traced>);

#[derive(Debug)]
struct Traced {
    hash: u64,
    events: u64,
    now_ms: u64,
    lines: Option<Vec<String>>,
}

impl Trace {
    /// An empty trace. With `lines` it keeps what it is told in words.
    #[must_use]
    pub fn new(lines: bool) -> Arc<Self> {
        let lines = lines.then(Vec::new);
        Arc::new(Self(Mutex::new(Traced { hash: 0, events: 0, now_ms: 0, lines })))
    }

    /// The time goes on.
    pub fn at(&self, now_ms: u64) {
        self.0.lock().now_ms = now_ms;
    }

    /// Something happened: `words` are what it was, `text` says it to a reader.
    pub fn note(&self, words: &[u64], text: impl FnOnce() -> String) {
        let mut traced = self.0.lock();
        let traced = &mut *traced;
        traced.events += 1;
        let mut hash = traced.hash ^ traced.now_ms;
        for word in words {
            hash = (hash.rotate_left(23) ^ word).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        }
        traced.hash = hash;
        if let Some(lines) = &mut traced.lines
            && lines.len() < LINES_MAX
        {
            lines.push(format!("{:>8} ms  {}", traced.now_ms, text()));
        }
    }

    /// The number and how many events it is made of.
    #[must_use]
    pub fn sum(&self) -> (u64, u64) {
        let traced = self.0.lock();
        (traced.hash, traced.events)
    }

    /// The events in words, if they were asked for.
    #[must_use]
    pub fn lines(&self) -> Vec<String> {
        self.0.lock().lines.clone().unwrap_or_default()
    }
}
