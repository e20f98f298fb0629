//! Bytes as choices by which a stream of a snapshot is built, which a real node takes in.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| shkv_tests::hostile::snapshot::stream(bytes));
