//! Hash functions whose output is part of a format: key → shard, the check of a frame, the choice of a replica.
//!
//! xxh3 is a published specification (github.com/Cyan4973/xxHash, doc/xxhash_spec.md) with golden vectors in the
//! tests here. Nothing is hashed through `std::hash::Hash`: it mixes in lengths and byte order of the machine.

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

/// The hash by which a key belongs to a shard of a hash-partitioned keyspace.
#[must_use]
pub fn key_hash(key: &[u8]) -> u64 {
    xxh3_64(key)
}

/// The check in a frame's header: the low half of xxh3-64 over everything behind it.
#[must_use]
pub fn frame_check(bytes: &[u8]) -> u32 {
    xxh3_64(bytes) as u32
}

/// How much `candidate` wants `key`. The candidate with the highest weight gets it (rendezvous hashing: Thaler and
/// Ravishankar, "Using name-based mappings to increase hit rates", 1998). When a candidate goes, only its own keys move.
#[must_use]
pub fn rendezvous_weight(key_hash: u64, candidate: u64) -> u64 {
    xxh3_64_with_seed(&candidate.to_le_bytes(), key_hash)
}

/// The candidates ordered by how much they want `key_hash`, the best first. Ties go to the smaller candidate.
#[must_use]
pub fn rendezvous_order(key_hash: u64, candidates: &[u64]) -> Vec<u64> {
    let mut weighted: Vec<(u64, u64)> = candidates.iter().map(|c| (rendezvous_weight(key_hash, *c), *c)).collect();
    weighted.sort_unstable_by(|a, b| b.0.cmp(&a.0).then(a.1.cmp(&b.1)));
    weighted.into_iter().map(|(_, candidate)| candidate).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Vectors of the reference implementation (xxHash 0.8, `XXH3_64bits`).
    #[test]
    fn xxh3_gives_the_published_values() {
        assert_eq!(key_hash(b""), 0x2d06_8005_38d3_94c2);
        assert_eq!(key_hash(b"a"), 0xe6c6_32b6_1e96_4e1f);
        assert_eq!(key_hash(b"abc"), 0x78af_5f94_892f_3950);
        assert_eq!(frame_check(b"abc"), 0x892f_3950);
    }

    #[test]
    fn a_lost_candidate_moves_only_its_own_keys() {
        let all = [1, 2, 3, 4, 5];
        let left = [1, 2, 4, 5];
        for n in 0..1_000_u64 {
            let hash = key_hash(&n.to_le_bytes());
            let before = rendezvous_order(hash, &all)[0];
            let after = rendezvous_order(hash, &left)[0];
            assert!(before == after || before == 3, "key {n} moved from {before} to {after}");
        }
    }

    #[test]
    fn rendezvous_spreads_evenly() {
        let mut counts = [0_u32; 5];
        for n in 0..10_000_u64 {
            let best = rendezvous_order(key_hash(&n.to_le_bytes()), &[0, 1, 2, 3, 4])[0];
            counts[best as usize] += 1;
        }
        assert!(counts.iter().all(|c| (1_800..2_200).contains(c)), "{counts:?}");
    }
}
