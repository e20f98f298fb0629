//! Consistent hashing by which a request finds its node, in several ways behind one trait: rendezvous hashing by xxh3, and
//! a ring of slots with virtual servers, whose functions can be changed. Pure.
//!
//! The ring is that of Karger et al., "Consistent hashing and random trees", 1997, with a fixed number of slots: a
//! server stands at several slots, and a request goes to the next occupied slot clockwise, its own included.

use crate::hashing::{key_hash, rendezvous_weight};
use sha2::{Digest, Sha256};
use std::collections::BTreeSet;

/// Slots of a ring.
pub const SLOTS: usize = 512;
/// Places of each server on a ring: the logarithm of [`SLOTS`] to the base 2.
pub const PLACES: u64 = 9;

/// Chooses one of the servers for each request. Servers are numbered from 1.
pub trait Chooser {
    /// A server comes. One that is there already stays as it is.
    ///
    /// # Errors
    /// The ring has no free slot left; nothing is changed then.
    fn add(&mut self, server: u64) -> Result<(), Full>;

    /// A server goes.
    fn remove(&mut self, server: u64);

    /// The server for a request; `None` if there is no server.
    fn choose(&self, request: u64) -> Option<u64>;
}

/// No slot is free for another server.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the ring of {SLOTS} slots has no room for another server of {PLACES} places")]
pub struct Full;

/// Rendezvous hashing: every server weighs every request, the highest weight wins. No slots, no limit, an even spread.
#[derive(Clone, Debug, Default)]
pub struct Rendezvous {
    servers: BTreeSet<u64>,
}

impl Chooser for Rendezvous {
    fn add(&mut self, server: u64) -> Result<(), Full> {
        self.servers.insert(server);
        Ok(())
    }

    fn remove(&mut self, server: u64) {
        self.servers.remove(&server);
    }

    fn choose(&self, request: u64) -> Option<u64> {
        let hash = key_hash(&request.to_le_bytes());
        self.servers.iter().copied().max_by_key(|server| (rendezvous_weight(hash, *server), u64::MAX - server))
    }
}

/// By which functions requests and servers find their slots.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Functions {
    /// H(i) = i² + 2i + 17 and Φ(i, j) = i² + j² + 2j + 25. H reaches only 87 of 512 slots, so the spread is poor.
    Quadratic,
    /// H(i) = 1427i² + 2503i + 2003 and Φ(i, j) = 1249i² + 2287j² + 1663j + 2287.
    LargeQuadratic,
    /// SHA-256 of the values of [`Functions::Quadratic`].
    Sha256,
    /// XXH3-64 of the numbers themselves.
    Xxh3,
}

impl Functions {
    fn request(self, i: u64) -> usize {
        let i_wide = u128::from(i);
        slot(match self {
            Self::Quadratic => i_wide * i_wide + 2 * i_wide + 17,
            Self::LargeQuadratic => 1427 * i_wide * i_wide + 2503 * i_wide + 2003,
            Self::Sha256 => digest(i_wide * i_wide + 2 * i_wide + 17),
            Self::Xxh3 => u128::from(key_hash(&i.to_le_bytes())),
        })
    }

    fn server(self, i: u64, j: u64) -> usize {
        let (i_wide, j_wide) = (u128::from(i), u128::from(j));
        let quadratic = i_wide * i_wide + j_wide * j_wide + 2 * j_wide + 25;
        slot(match self {
            Self::Quadratic => quadratic,
            Self::LargeQuadratic => 1249 * i_wide * i_wide + 2287 * j_wide * j_wide + 1663 * j_wide + 2287,
            Self::Sha256 => digest(quadratic),
            Self::Xxh3 => u128::from(rendezvous_weight(i, j)),
        })
    }
}

fn slot(number: u128) -> usize {
    (number % SLOTS as u128) as usize
}

fn digest(number: u128) -> u128 {
    let bytes: [u8; 32] = Sha256::digest(number.to_string().as_bytes()).into();
    bytes.iter().fold(0, |sum, byte| (sum * 256 + u128::from(*byte)) % SLOTS as u128)
}

/// A ring of slots. A slot that is taken is passed over for the next free one (linear probing).
#[derive(Clone, Debug)]
pub struct SlotRing {
    functions: Functions,
    slots: Vec<Option<u64>>,
}

impl SlotRing {
    /// An empty ring.
    #[must_use]
    pub fn new(functions: Functions) -> Self {
        Self { functions, slots: vec![None; SLOTS] }
    }

    /// The slots of a server in their order.
    #[must_use]
    pub fn slots_of(&self, server: u64) -> Vec<usize> {
        (0..SLOTS).filter(|at| self.slots[*at] == Some(server)).collect()
    }
}

impl Chooser for SlotRing {
    fn add(&mut self, server: u64) -> Result<(), Full> {
        if self.slots.contains(&Some(server)) {
            return Ok(());
        }
        if self.slots.iter().filter(|slot| slot.is_none()).count() < PLACES as usize {
            return Err(Full);
        }
        for place in 1..=PLACES {
            let first = self.functions.server(server, place);
            if let Some(free) = (first..first + SLOTS).map(|at| at % SLOTS).find(|at| self.slots[*at].is_none()) {
                self.slots[free] = Some(server);
            }
        }
        Ok(())
    }

    fn remove(&mut self, server: u64) {
        self.slots.iter_mut().filter(|slot| **slot == Some(server)).for_each(|slot| *slot = None);
    }

    fn choose(&self, request: u64) -> Option<u64> {
        let first = self.functions.request(request);
        (first..first + SLOTS).find_map(|at| self.slots[at % SLOTS])
    }
}

/// How a way to choose spreads requests over a number of servers.
#[derive(Clone, PartialEq, Debug)]
pub struct Spread {
    /// Requests per server, from the first on.
    pub counts: Vec<u64>,
    /// Requests that go elsewhere when one server more comes.
    pub moved_by_add: u64,
    /// Requests that go elsewhere when the last server goes.
    pub moved_by_remove: u64,
}

impl Spread {
    /// Sends `requests` to `servers` servers, chosen by what `make` makes.
    ///
    /// # Errors
    /// The ring is too small for one server more.
    pub fn of<C: Chooser>(make: impl Fn() -> C, servers: u64, requests: &[u64]) -> Result<Self, Full> {
        let chosen = |servers: u64| {
            let mut chooser = make();
            (1..=servers).try_for_each(|server| chooser.add(server))?;
            Ok(requests.iter().map(|request| chooser.choose(*request)).collect::<Vec<_>>())
        };
        let (fewer, now, more) = (chosen(servers.saturating_sub(1))?, chosen(servers)?, chosen(servers + 1)?);
        let moved = |other: &[Option<u64>]| now.iter().zip(other).filter(|(a, b)| a != b).count() as u64;
        let count = |server: u64| now.iter().filter(|chosen| **chosen == Some(server)).count() as u64;
        Ok(Self {
            counts: (1..=servers).map(count).collect(),
            moved_by_add: moved(&more),
            moved_by_remove: moved(&fewer),
        })
    }

    /// The standard deviation of the counts.
    #[must_use]
    pub fn deviation(&self) -> f64 {
        let mean = self.counts.iter().sum::<u64>() as f64 / self.counts.len() as f64;
        let squares: f64 = self.counts.iter().map(|count| (*count as f64 - mean).powi(2)).sum();
        (squares / self.counts.len() as f64).sqrt()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ring(servers: u64) -> SlotRing {
        let mut ring = SlotRing::new(Functions::Quadratic);
        (1..=servers).for_each(|server| ring.add(server).unwrap());
        ring
    }

    #[test]
    fn the_reference_ring_of_three_servers_stands_where_it_should() {
        let ring = ring(3);
        assert_eq!(ring.slots_of(1), [29, 34, 41, 50, 61, 74, 89, 106, 125]);
        assert_eq!(ring.slots_of(2), [32, 37, 44, 53, 64, 77, 92, 109, 128]);
        assert_eq!(ring.slots_of(3), [38, 42, 49, 58, 69, 82, 97, 114, 133]);
    }

    #[test]
    fn the_quadratic_functions_spread_as_poorly_as_was_computed_for_them() {
        let requests: Vec<u64> = (100_000..1_000_000).collect();
        let spread = Spread::of(|| SlotRing::new(Functions::Quadratic), 3, &requests).unwrap();
        let percent: Vec<f64> =
            spread.counts.iter().map(|count| (*count as f64 / 9_000.0 * 10.0).round() / 10.0).collect();
        assert_eq!(percent, [83.6, 4.7, 11.7]);
    }

    #[test]
    fn a_server_that_goes_moves_only_its_own_requests() {
        let requests: Vec<u64> = (0..5_000).map(|n| 100_000 + n * 173 % 900_000).collect();
        let functions = [Functions::Quadratic, Functions::LargeQuadratic, Functions::Sha256, Functions::Xxh3];
        for servers in 2..=6 {
            for functions in functions {
                let spread = Spread::of(|| SlotRing::new(functions), servers, &requests).unwrap();
                let own = *spread.counts.last().unwrap();
                assert_eq!(spread.moved_by_remove, own, "{functions:?} with {servers} servers");
            }
            let spread = Spread::of(Rendezvous::default, servers, &requests).unwrap();
            assert_eq!(spread.moved_by_remove, *spread.counts.last().unwrap());
            let mean = 5_000 / servers;
            assert!(spread.counts.iter().all(|count| count.abs_diff(mean) < mean / 5), "{:?}", spread.counts);
        }
    }

    #[test]
    fn a_full_ring_takes_no_more_and_stays_as_it_is() {
        let mut ring = ring(56); // 56 × 9 = 504 of 512 slots
        assert_eq!(ring.add(57), Err(Full));
        assert!(ring.slots_of(57).is_empty());
        ring.remove(1);
        assert_eq!(ring.add(57), Ok(()));
        assert_eq!(SlotRing::new(Functions::Xxh3).choose(1), None);
    }
}
