//! Bytes as the head of one kind of message: the first byte chooses which.
#![no_main]

libfuzzer_sys::fuzz_target!(|bytes: &[u8]| {
    if let Some((chosen, head)) = bytes.split_first() {
        harness::DECODERS[usize::from(*chosen) % harness::DECODERS.len()](head);
    }
});
