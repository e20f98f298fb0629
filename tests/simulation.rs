//! Simulated clusters under faults: a fixed set of seeds, the kept ones among them.

use shkv_tests::sim::many::repeat;
use shkv_tests::sim::run::{Setup, run};

#[test]
fn the_same_seed_gives_the_same_trace() {
    for seed in 1..=3 {
        let (first, second) =
            (run(Setup { seed, bug: None, lines: false }), run(Setup { seed, bug: None, lines: false }));
        assert_eq!(first.trace, second.trace, "seed {seed}; {}", repeat(seed, None));
    }
}
