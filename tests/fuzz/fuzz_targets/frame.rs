//! Bytes as a connection would bring them.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    harness::frame(bytes);
    harness::frame_put_right(bytes);
});
