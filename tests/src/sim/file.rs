//! A file of a simulated disk: what is in it, what of that is there for good, and what is on its way.

use rand::RngExt;
use rand::rngs::SmallRng;
use std::ops::Range;

/// What a disk writes whole or not at all.
pub const SECTOR_BYTES: usize = 512;

/// A file.
#[derive(Clone, Default)]
pub struct File {
    /// What its process reads.
    pub bytes: Vec<u8>,
    /// What is on the disk for good.
    durable: Vec<u8>,
    pending: Vec<Pending>,
    /// Where the last write is that was synced.
    last_synced: Range<usize>,
}

#[derive(Clone)]
enum Pending {
    Write(u64, Vec<u8>),
    Resize(u64),
}

impl File {
    /// A file of zeroes that is there for good.
    #[must_use]
    pub fn zeroes(bytes: usize) -> Self {
        Self { bytes: vec![0; bytes], durable: vec![0; bytes], ..Self::default() }
    }

    /// Writes, for now.
    pub fn write(&mut self, bytes: &[u8], offset: u64) {
        let (start, end) = (offset as usize, offset as usize + bytes.len());
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(bytes);
        self.pending.push(Pending::Write(offset, bytes.to_vec()));
    }

    /// Makes it this long, for now.
    pub fn resize(&mut self, bytes: u64) {
        self.bytes.resize(bytes as usize, 0);
        self.pending.push(Pending::Resize(bytes));
    }

    /// The power goes: any part of what is on its way may get there. Returns the sectors that do not.
    pub fn lose(&mut self, rng: &mut SmallRng) -> u64 {
        let mode = rng.random_range(0..4_u32);
        let stop = rng.random_range(0..=self.pending.len());
        let mut lost = 0;
        for (number, pending) in self.pending.iter().enumerate() {
            let mut keep = || match mode {
                0 => false,
                1 => true,
                2 => number < stop,
                _ => rng.random_bool(0.5),
            };
            lost += apply(&mut self.durable, pending, &mut keep);
        }
        self.pending.clear();
        self.bytes = self.durable.clone();
        lost
    }

    /// Everything that is on its way gets there. Tells whether there was a write among it.
    pub fn sync(&mut self) -> bool {
        let mut wrote = false;
        for pending in self.pending.drain(..) {
            if let Pending::Write(offset, bytes) = &pending {
                (wrote, self.last_synced) = (true, *offset as usize..*offset as usize + bytes.len());
            }
            apply(&mut self.durable, &pending, &mut || true);
        }
        wrote
    }

    /// Where a bit may rot so that it must be noticed: anywhere, but behind the beginning of the last write that was synced
    /// if that is the last of all, because such a write cannot be told from a torn one.
    #[must_use]
    pub fn may_rot(&self, is_last: bool) -> Range<usize> {
        0..if is_last { self.last_synced.start } else { self.durable.len() }
    }

    /// Turns a bit for good.
    pub fn rot(&mut self, at: usize, bit: u32) {
        for bytes in [&mut self.durable, &mut self.bytes] {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << bit;
            }
        }
    }
}

fn apply(bytes: &mut Vec<u8>, pending: &Pending, keep: &mut dyn FnMut() -> bool) -> u64 {
    let mut lost = 0;
    match pending {
        Pending::Resize(length) => {
            if keep() {
                bytes.resize(*length as usize, 0);
            }
        }
        Pending::Write(offset, data) => {
            let mut at = 0;
            while at < data.len() {
                let place = *offset as usize + at;
                let sector_left = SECTOR_BYTES - place % SECTOR_BYTES;
                let count = sector_left.min(data.len() - at);
                if keep() {
                    if bytes.len() < place + count {
                        bytes.resize(place + count, 0);
                    }
                    bytes[place..place + count].copy_from_slice(&data[at..at + count]);
                } else {
                    lost += 1;
                }
                at += count;
            }
        }
    }
    lost
}

#[cfg(test)]
mod tests {
    use super::*;
    use rand::SeedableRng;

    #[test]
    fn what_cannot_be_told_from_a_torn_write_does_not_rot() {
        let mut file = File::zeroes(4096);
        for (byte, offset) in [(1, 0), (2, 512)] {
            file.write(&[byte; 100], offset);
            assert!(file.sync());
        }
        assert_eq!(file.may_rot(true), 0..512);
        assert_eq!(file.may_rot(false), 0..4096);
        file.rot(3, 0);
        assert_eq!(file.bytes[..5], [1, 1, 1, 0, 1]);
        assert_eq!(file.lose(&mut SmallRng::seed_from_u64(1)), 0);
        assert_eq!(file.bytes[3], 0, "it is for good");
        assert!(!file.sync(), "nothing was on its way");
    }
}
