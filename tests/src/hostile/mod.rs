//! Hostile bytes: what the parts that take bytes from outside are put through. The same functions run under the property
//! tests (`tests/hostile.rs`), over the files in `tests/fuzz/corpus`, and under the fuzzing engine (`tests/fuzz`).
//!
//! Arbitrary bytes alone are refused at the first check, so each function also has a form that builds something nearly
//! sound out of the bytes: they choose what is built and where it is spoilt.

pub mod http;
pub mod json;
pub mod segment;
pub mod snapshot;

/// Choices drawn from bytes. When they are used up, every choice is the first one, so that whatever draws comes to an end.
#[derive(Clone, Copy, Debug)]
pub struct Draw<'a>(&'a [u8]);

impl<'a> Draw<'a> {
    /// Choices from these bytes.
    #[must_use]
    pub fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Whether nothing is left to choose by.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// The next byte.
    pub fn byte(&mut self) -> u8 {
        self.bytes(1).first().copied().unwrap_or(0)
    }

    /// A number below `end`.
    pub fn below(&mut self, end: usize) -> usize {
        let wide = if end > 256 { u32::from_le_bytes(self.array()) as usize } else { usize::from(self.byte()) };
        wide % end.max(1)
    }

    /// One of these.
    pub fn one_of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    /// A number: most often a small one, now and then one at a boundary, or any.
    pub fn number(&mut self) -> u64 {
        const EDGES: [u64; 8] = [u64::MAX, u64::MAX - 1, i64::MAX as u64, 1 << 63, 1 << 32, 1 << 20, 65_536, 4_096];
        match self.byte() {
            small @ 0..216 => u64::from(small % 8),
            edge @ 216..240 => EDGES[usize::from(edge % 8)],
            _ => u64::from_le_bytes(self.array()),
        }
    }

    /// Up to `count` bytes.
    pub fn bytes(&mut self, count: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(count.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn array<const N: usize>(&mut self) -> [u8; N] {
        let mut array = [0; N];
        let taken = self.bytes(N);
        array[..taken.len()].copy_from_slice(taken);
        array
    }
}
