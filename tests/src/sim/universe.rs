//! The clock of everything: hosts, each a process with a runtime of its own, are let run one millisecond after the other.
//! A host that is paused is not let run; one whose clock is fast or slow is let run a little further or less far.

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_proto::world::sim::{Fate, Host, Link, Net, Trace};
use std::future::Future;
use std::net::{IpAddr, Ipv4Addr};
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;
use tokio::time::Instant;

/// The time of day when a simulation begins, in seconds since 1970.
const UNIX_BEGAN_SECS: u64 = 1_790_000_000;
/// How much a clock may be fast or slow, in millionths.
const DRIFT_PPM_MAX: i64 = 2_000;

/// Everything that is simulated.
pub struct Universe {
    /// The seed of everything.
    pub seed: u64,
    /// What it decides.
    pub rng: SmallRng,
    /// Milliseconds since it began.
    pub now_ms: u64,
    /// The network.
    pub net: Arc<Net>,
    /// What happened.
    pub trace: Arc<Trace>,
    /// The hosts.
    pub hosts: Vec<Machine>,
    /// A fault that is planted in all processes, as a number; 0 is none.
    pub bug: u64,
}

/// A host: an address, and a process if one runs.
pub struct Machine {
    /// What it is called.
    pub name: String,
    /// Its address.
    pub ip: IpAddr,
    /// Whether its process is frozen.
    pub paused: bool,
    /// How many processes it has had.
    pub lives: u64,
    drift_ppm: i64,
    process: Option<Process>,
}

struct Process {
    context: Arc<Host>,
    runtime: Runtime,
    base: Instant,
    began_ms: u64,
    /// How far it has run, in milliseconds of its own clock.
    ran_ms: u64,
}

impl Universe {
    /// An empty one.
    #[must_use]
    pub fn new(seed: u64, bug: u64, lines: bool) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let trace = Trace::new(lines);
        let usual = Link { delay_ms_min: 1, delay_ms_max: rng.random_range(1..=4) };
        let net = Net::new(rng.random(), usual, trace.clone());
        Self { seed, rng, now_ms: 0, net, trace, hosts: vec![], bug }
    }

    /// One more host. `group` and `number` make its address.
    pub fn add(&mut self, name: String, group: u8, number: u8) -> usize {
        let drift_ppm = self.rng.random_range(-DRIFT_PPM_MAX..=DRIFT_PPM_MAX);
        let ip = IpAddr::V4(Ipv4Addr::new(10, 0, group, number));
        self.hosts.push(Machine { name, ip, paused: false, lives: 0, drift_ppm, process: None });
        self.hosts.len() - 1
    }

    /// Starts a process on a host that has none.
    pub fn start(&mut self, host: usize, main: impl Future<Output = ()> + Send + 'static) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_time()
            .start_paused(true)
            .build()
            .expect("a runtime without threads and sockets");
        let machine = &mut self.hosts[host];
        assert!(machine.process.is_none(), "{} has a process", machine.name);
        machine.lives += 1;
        machine.paused = false;
        let seed = self.seed ^ (host as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15) ^ (machine.lives << 48);
        let unix_began = Duration::from_secs(UNIX_BEGAN_SECS) + Duration::from_millis(self.now_ms);
        let context = Host::new(machine.ip, self.net.clone(), seed, unix_began, self.bug);
        self.net.up(machine.ip);
        self.trace.note(&[20, host as u64, machine.lives], || format!("{} starts", machine.name));
        let entered = context.enter();
        runtime.spawn(main);
        let base = runtime.block_on(async { Instant::now() });
        drop(entered);
        machine.process = Some(Process { context, runtime, base, began_ms: self.now_ms, ran_ms: 0 });
    }

    /// Starts one more task in a host's process.
    pub fn run_on(&mut self, host: usize, task: impl Future<Output = ()> + Send + 'static) {
        if let Some(process) = &self.hosts[host].process {
            let _entered = process.context.enter();
            process.runtime.spawn(task);
        }
    }

    /// Ends a host's process at once.
    pub fn end(&mut self, host: usize, fate: Fate) {
        let machine = &mut self.hosts[host];
        let Some(process) = machine.process.take() else { return };
        self.trace.note(&[21, host as u64, fate as u64], || format!("{} ends: {fate:?}", machine.name));
        machine.paused = false;
        self.net.down(machine.ip, fate);
        if fate == Fate::Reset {
            self.net.up(machine.ip); // the machine is there, and says that nobody listens
        }
        let Process { context, runtime, .. } = process;
        let _entered = context.enter();
        drop(runtime);
    }

    /// Whether a host has a process.
    #[must_use]
    pub fn runs(&self, host: usize) -> bool {
        self.hosts[host].process.is_some()
    }

    /// The process of a host.
    #[must_use]
    pub fn context(&self, host: usize) -> Option<Arc<Host>> {
        self.hosts[host].process.as_ref().map(|process| process.context.clone())
    }

    /// Freezes a process, or lets it go on.
    pub fn pause(&mut self, host: usize, paused: bool) {
        let machine = &mut self.hosts[host];
        if machine.paused != paused && machine.process.is_some() {
            machine.paused = paused;
            let word = if paused { "is frozen" } else { "goes on" };
            self.trace.note(&[22, host as u64, u64::from(paused)], || format!("{} {word}", machine.name));
        }
    }

    /// Lets one millisecond pass.
    pub fn step(&mut self) {
        self.now_ms += 1;
        self.trace.at(self.now_ms);
        self.net.go_on(self.now_ms);
        for machine in &mut self.hosts {
            if !machine.paused
                && let Some(process) = &mut machine.process
            {
                process.run_to(process.due(self.now_ms, machine.drift_ppm));
            }
        }
    }

    /// Looks at something inside a host's process, and is told how far the process is behind its clock, frozen or not.
    pub fn inside<T>(&self, host: usize, look: impl FnOnce(Duration) -> T) -> Option<T> {
        let machine = &self.hosts[host];
        let process = machine.process.as_ref()?;
        let behind_ms = process.due(self.now_ms, machine.drift_ppm).saturating_sub(process.ran_ms);
        let _entered = process.context.enter();
        let _inside = process.runtime.enter();
        Some(look(Duration::from_millis(behind_ms)))
    }
}

impl Process {
    /// What its clock shows, in milliseconds since it began.
    fn due(&self, now_ms: u64, drift_ppm: i64) -> u64 {
        let real = (now_ms - self.began_ms) as i64;
        (real + real * drift_ppm / 1_000_000) as u64
    }

    fn run_to(&mut self, due_ms: u64) {
        if due_ms <= self.ran_ms {
            return;
        }
        let behind = due_ms - self.ran_ms;
        let until = self.base + Duration::from_millis(due_ms);
        self.ran_ms = due_ms;
        let _entered = self.context.enter();
        self.runtime.block_on(async {
            if behind > 5 {
                // It was frozen: its clock went on without it.
                tokio::time::advance(Duration::from_millis(behind - 1)).await;
            }
            tokio::time::sleep_until(until).await;
        });
    }
}

impl Drop for Universe {
    fn drop(&mut self) {
        for host in 0..self.hosts.len() {
            self.end(host, Fate::Silence);
        }
    }
}
