//! What the operations of a loop are, and which keys they meet: the core workloads of YCSB (Cooper et al., "Benchmarking
//! cloud serving systems with YCSB", SoCC 2010, section 4) and plain ones. Pure: chance comes in as an argument.

use super::KEY_BYTES;
use rand::RngExt;
use rand::distr::Distribution;
use rand::rngs::SmallRng;
use rand_distr::Zipf;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use xxhash_rust::xxh3::xxh3_64;

/// Skew of the zipfian choice, as YCSB has it.
const ZIPF_EXPONENT: f64 = 0.99;

/// Shares of the kinds of operation; they sum up to 1.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Mix {
    /// Reads of one key.
    pub get: f64,
    /// Writes of a key that is there.
    pub put: f64,
    /// Writes of a key that is not there yet.
    pub insert: f64,
    /// Reads of several rows in order.
    pub scan: f64,
    /// A read of one key, and then a write of it.
    pub change: f64,
}

/// Which keys are chosen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Spread {
    /// All alike
    Uniform,
    /// Few very often, spread over the whole range of keys
    Zipfian,
    /// Those that were inserted last most often
    Latest,
}

/// One operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Op {
    /// Read this key.
    Get([u8; KEY_BYTES]),
    /// Write this key.
    Put([u8; KEY_BYTES]),
    /// Read so many rows from this key on.
    Scan([u8; KEY_BYTES], u32),
    /// Read this key, then write it.
    Change([u8; KEY_BYTES]),
}

/// A workload.
#[derive(Clone, Debug)]
pub struct Workload {
    /// What is done.
    pub mix: Mix,
    /// To which keys.
    pub spread: Spread,
    /// Keys that are there before it begins.
    pub keys: u64,
    /// Rows of a scan: from 1 to this, or exactly this.
    pub scan_rows: u32,
    /// Whether scans are of exactly that many rows.
    pub scan_whole: bool,
}

impl Workload {
    /// A core workload of YCSB, by its letter.
    pub fn ycsb(letter: char, keys: u64) -> Option<Self> {
        let of = |mix, spread| Some(Self { mix, spread, keys, scan_rows: 100, scan_whole: false });
        let none = Mix::default();
        match letter {
            'a' => of(Mix { get: 0.5, put: 0.5, ..none }, Spread::Zipfian),
            'b' => of(Mix { get: 0.95, put: 0.05, ..none }, Spread::Zipfian),
            'c' => of(Mix { get: 1.0, ..none }, Spread::Zipfian),
            'd' => of(Mix { get: 0.95, insert: 0.05, ..none }, Spread::Latest),
            'e' => of(Mix { scan: 0.95, insert: 0.05, ..none }, Spread::Zipfian),
            'f' => of(Mix { get: 0.5, change: 0.5, ..none }, Spread::Zipfian),
            _ => None,
        }
    }

    /// Whether keys must be there before it begins.
    pub fn reads(&self) -> bool {
        self.mix.get + self.mix.scan + self.mix.change > 0.0
    }

    /// Someone who draws operations; all who share `inserted` insert different keys.
    ///
    /// # Errors
    /// For numbers of keys of which no distribution can be made.
    pub fn drawer(&self, rng: SmallRng, inserted: Arc<AtomicU64>) -> Result<Drawer, rand_distr::ZipfError> {
        let zipf = match self.spread {
            Spread::Uniform => None,
            Spread::Zipfian | Spread::Latest => Some(Zipf::new(self.keys as f64, ZIPF_EXPONENT)?),
        };
        Ok(Drawer { workload: self.clone(), rng, zipf, inserted })
    }
}

/// Draws operations.
#[derive(Debug)]
pub struct Drawer {
    workload: Workload,
    rng: SmallRng,
    zipf: Option<Zipf<f64>>,
    inserted: Arc<AtomicU64>,
}

impl Drawer {
    /// The next operation.
    pub fn draw(&mut self) -> Op {
        let Mix { get, put, insert, scan, .. } = self.workload.mix;
        let at = self.rng.random::<f64>();
        if at < get {
            Op::Get(key(self.number()))
        } else if at < get + put {
            Op::Put(key(self.number()))
        } else if at < get + put + insert {
            Op::Put(key(self.workload.keys + self.inserted.fetch_add(1, Ordering::Relaxed)))
        } else if at < get + put + insert + scan {
            let most = self.workload.scan_rows;
            let rows = if self.workload.scan_whole { most } else { self.rng.random_range(1..=most) };
            Op::Scan(key(self.number()), rows)
        } else {
            Op::Change(key(self.number()))
        }
    }

    /// The number of a key that was there at the beginning, or, of the latest, of one whose insert was begun.
    fn number(&mut self) -> u64 {
        let keys = self.workload.keys;
        let Some(zipf) = self.zipf else { return self.rng.random_range(0..keys) };
        let rank = (zipf.sample(&mut self.rng) as u64).clamp(1, keys) - 1;
        match self.workload.spread {
            // The popular ones are not neighbours: that would make one shard or page hot by accident.
            Spread::Zipfian => xxh3_64(&rank.to_le_bytes()) % keys,
            // Inserts that are under way need not be readable: those of the last thousand are passed over.
            Spread::Latest => {
                let inserted = self.inserted.load(Ordering::Relaxed).saturating_sub(UNDER_WAY_MAX);
                (keys + inserted - 1).saturating_sub(rank)
            }
            Spread::Uniform => rank,
        }
    }
}

/// Inserts that may be under way at the same time, as far as reads of the latest keys are concerned.
const UNDER_WAY_MAX: u64 = 1_000;

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
    use std::collections::BTreeMap;

    fn drawn(workload: &Workload, count: usize) -> Vec<Op> {
        let mut drawer = workload.drawer(SmallRng::seed_from_u64(1), Arc::default()).unwrap();
        (0..count).map(|_| drawer.draw()).collect()
    }

    #[test]
    fn keys_are_in_the_order_of_their_numbers() {
        assert_eq!(&key(0), b"key000000000000000000000");
        assert_eq!(&key(u64::MAX), b"key018446744073709551615");
        assert!(key(9) < key(10) && key(99_999) < key(100_000));
    }

    #[test]
    fn the_workloads_have_the_shares_that_they_state() {
        for letter in 'a'..='f' {
            let workload = Workload::ycsb(letter, 1_000).unwrap();
            let Mix { get, put, insert, scan, change } = workload.mix;
            assert!((get + put + insert + scan + change - 1.0).abs() < 1e-9, "{letter}");
            let ops = drawn(&workload, 20_000);
            let share = |is: fn(&Op) -> bool| ops.iter().filter(|op| is(op)).count() as f64 / ops.len() as f64;
            for (found, stated) in [
                (share(|op| matches!(op, Op::Get(_))), get),
                (share(|op| matches!(op, Op::Put(_))), put + insert),
                (share(|op| matches!(op, Op::Scan(..))), scan),
                (share(|op| matches!(op, Op::Change(_))), change),
            ] {
                assert!((found - stated).abs() < 0.02, "{letter}: {found} instead of {stated}");
            }
        }
        assert!(Workload::ycsb('g', 1).is_none());
    }

    #[test]
    fn zipfian_choices_are_skewed_and_uniform_ones_are_not() {
        let most = |spread| {
            let mut counts = BTreeMap::new();
            for op in drawn(&Workload { spread, ..Workload::ycsb('c', 1_000).unwrap() }, 50_000) {
                let Op::Get(at) = op else { panic!("{op:?}") };
                assert!(at < key(1_000), "only keys that are there");
                *counts.entry(at).or_insert(0) += 1;
            }
            *counts.values().max().unwrap() as f64 / 50_000.0
        };
        assert!(most(Spread::Uniform) < 0.003);
        let expected = 1.0 / (1..=1_000).map(|rank| f64::from(rank).powf(-ZIPF_EXPONENT)).sum::<f64>();
        assert!((most(Spread::Zipfian) - expected).abs() < 0.02, "the first of a thousand has {expected}");
        assert!(most(Spread::Latest) > 0.1);
    }

    #[test]
    fn inserts_are_new_and_latest_reads_follow_them_at_a_distance() {
        let workload = Workload::ycsb('d', 100).unwrap();
        let inserted = Arc::new(AtomicU64::new(0));
        let mut drawer = workload.drawer(SmallRng::seed_from_u64(3), inserted.clone()).unwrap();
        let mut next = 100;
        for _ in 0..100_000 {
            match drawer.draw() {
                Op::Put(new) => {
                    assert_eq!(new, key(next));
                    next += 1;
                }
                Op::Get(read) => assert!(read < key(100.max(next.saturating_sub(UNDER_WAY_MAX)))),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(inserted.load(Ordering::Relaxed), next - 100);
    }
}
