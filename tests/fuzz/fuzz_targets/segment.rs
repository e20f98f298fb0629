//! Bytes as a segment of the log, and as choices by which segments are built and spoilt.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    shkv_tests::hostile::segment::raw(bytes);
    shkv_tests::hostile::segment::built(bytes);
});
