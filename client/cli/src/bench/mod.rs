//! The parts of `shkv-bench`: what is to be done, the measuring of it, and the kinds of server that it is done to.

use rand::RngExt;
use rand::rngs::SmallRng;
use std::time::Duration;
use workload::Workload;

pub mod analysis;
pub mod database;
#[cfg(feature = "etcd")]
pub mod etcd;
pub mod failover;
pub mod http;
pub mod local;
pub mod measure;
pub mod pace;
pub mod peer;
pub mod plot;
pub mod redis;
pub mod report;
pub mod rest;
pub mod store;
pub mod suite;
pub mod txn;
pub mod web;
pub mod workload;

/// How often the writing of one key is tried before a load is given up.
const LOAD_TRIES_MAX: u32 = 20;
/// Bytes of a key.
pub const KEY_BYTES: usize = 24;

/// A loop of operations on one set of keys.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Groups of tasks; connections to a peer.
    pub conns: u32,
    /// Requests in flight per group.
    pub depth: u32,
    /// What they do.
    pub workload: Workload,
    /// Operations per second of all clients; without it, each begins one when the one before has ended.
    pub rate: Option<f64>,
    /// Bytes of each value.
    pub value_bytes: usize,
    /// Whether the keys that reads need are put there first.
    pub load: bool,
    /// Time before measuring.
    pub warmup: Duration,
    /// Time measured.
    pub measured: Duration,
}

impl Plan {
    /// A value. Its bytes are not all alike, and mean nothing.
    pub fn value(&self, rng: &mut SmallRng) -> Vec<u8> {
        (0..self.value_bytes).map(|_| rng.random_range(b'a'..=b'z')).collect()
    }
}
