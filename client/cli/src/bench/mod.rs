//! The parts of `shkv-bench`: what is to be done, the measuring of it, and the two kinds of server that it is done to.

use rand::RngExt;
use rand::rngs::SmallRng;
use std::time::Duration;

pub mod failover;
pub mod measure;
pub mod redis;
pub mod store;

/// Bytes of a key.
pub const KEY_BYTES: usize = 24;

/// A closed loop of operations on one set of keys.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Clients, each with its own connections.
    pub conns: u32,
    /// Requests in flight per client.
    pub depth: u32,
    /// Keys.
    pub keys: u64,
    /// Bytes of each value.
    pub value_bytes: usize,
    /// Part of the operations that are gets.
    pub read_ratio: f64,
    /// Time before measuring.
    pub warmup: Duration,
    /// Time measured.
    pub measured: Duration,
}

/// One operation.
#[derive(Clone, Copy, Debug)]
pub enum Op {
    /// Read this key.
    Get([u8; KEY_BYTES]),
    /// Write this key.
    Put([u8; KEY_BYTES]),
}

impl Plan {
    /// The next operation.
    pub fn draw(&self, rng: &mut SmallRng) -> Op {
        let key = key(rng.random_range(0..self.keys));
        if self.read_ratio > 0.0 && rng.random_bool(self.read_ratio) { Op::Get(key) } else { Op::Put(key) }
    }

    /// A value. Its bytes are not all alike, and mean nothing.
    pub fn value(&self, rng: &mut SmallRng) -> Vec<u8> {
        (0..self.value_bytes).map(|_| rng.random_range(b'a'..=b'z')).collect()
    }

    /// Whether keys must be there before it begins.
    pub fn reads(&self) -> bool {
        self.read_ratio > 0.0
    }
}

/// The key of this number: `key` and the number, padded with zeros, so that keys are in the order of their numbers.
pub fn key(mut number: u64) -> [u8; KEY_BYTES] {
    let mut key = [b'0'; KEY_BYTES];
    key[..3].copy_from_slice(b"key");
    for digit in key[3..].iter_mut().rev() {
        *digit = b'0' + (number % 10) as u8;
        number /= 10;
    }
    key
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    fn plan(read_ratio: f64) -> Plan {
        Plan {
            conns: 1,
            depth: 1,
            keys: 10,
            value_bytes: 7,
            read_ratio,
            warmup: Duration::ZERO,
            measured: Duration::ZERO,
        }
    }

    #[test]
    fn keys_are_in_the_order_of_their_numbers() {
        assert_eq!(&key(0), b"key000000000000000000000");
        assert_eq!(&key(u64::MAX), b"key018446744073709551615");
        assert!(key(9) < key(10) && key(99_999) < key(100_000));
    }

    #[test]
    fn operations_are_drawn_as_asked() {
        let mut rng = SmallRng::seed_from_u64(1);
        assert_eq!(plan(0.0).value(&mut rng).len(), 7);
        for (ratio, expected) in [(0.0, 0..=0), (1.0, 1_000..=1_000), (0.9, 850..=950)] {
            let drawn: Vec<Op> = (0..1_000).map(|_| plan(ratio).draw(&mut rng)).collect();
            let gets = drawn.iter().filter(|op| matches!(op, Op::Get(_))).count();
            assert!(expected.contains(&gets), "{gets} gets of 1000 at a ratio of {ratio}");
            let (Op::Get(last) | Op::Put(last)) = drawn[999];
            assert!(last < key(10));
        }
    }
}
