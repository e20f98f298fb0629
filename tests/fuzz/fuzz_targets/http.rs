//! Bytes as choices by which requests are built: the first byte chooses the system.
#![no_main]

use shkv_tests::hostile::http::{SYSTEMS, requests};

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((system, rest)) = bytes.split_first() {
        requests(SYSTEMS[usize::from(*system) % SYSTEMS.len()], rest);
    }
});
