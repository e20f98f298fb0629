//! Rows one behind the other in memory. Pure.
//!
//! A row is one piece of memory, so that to find it is to wait for memory once, and many rows take few allocations. It stays where it
//! is: a value that grows beyond the room that its row has, or is large, lies apart.

use bytes::Bytes;
use std::ops::Deref;

/// Bytes of a piece of memory that rows are laid into.
const CHUNK_BYTES: usize = 64 << 10;
/// Rows begin at multiples of so many bytes.
const UNIT: usize = 8;
const UNITS_PER_CHUNK: u32 = (CHUNK_BYTES / UNIT) as u32;
/// Bytes of a row before its key: version, bytes of the key, room for the value, kind and bytes of the value.
const FIXED_BYTES: usize = 16;
/// Values up to this size lie beside their keys.
const BESIDE_BYTES_MAX: usize = 1 << 10;
/// Values from this size on are kept as a part of the log entry that brought them; smaller ones are copied, so that they
/// do not keep the whole entry in memory.
const SHARE_BYTES_MIN: usize = 64 << 10;
/// Bytes of a value that lies apart beside its own.
const APART_BYTES: usize = size_of::<Bytes>() + 16;
/// Bytes that a processor fetches from memory at once.
const LINE_BYTES: usize = 64;

/// What the last word of a row's fixed part begins with; in the rest of it is how long the value is, or which one of those apart it is.
const KIND: u32 = 0b11 << 30;
const DEAD: u32 = 0b00 << 30;
const BESIDE: u32 = 0b01 << 30;
const APART: u32 = 0b10 << 30;

/// Where a row is.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct At(u32);

impl At {
    fn new(chunk: usize, offset: usize) -> Self {
        Self(chunk as u32 * UNITS_PER_CHUNK + (offset / UNIT) as u32) // 32 GiB: rows are flushed long before
    }

    fn split(self) -> (usize, usize) {
        ((self.0 / UNITS_PER_CHUNK) as usize, (self.0 % UNITS_PER_CHUNK) as usize * UNIT)
    }
}

/// A row.
#[derive(Clone, Copy, Debug)]
pub struct Row<'a> {
    /// Its key.
    pub key: &'a [u8],
    /// What is there.
    pub slot: Slot<'a>,
}

/// What is at a key.
#[derive(Clone, Copy, Debug)]
pub enum Slot<'a> {
    /// A row.
    Live {
        /// Its version.
        version: u64,
        /// Its value.
        value: Value<'a>,
    },
    /// The row was removed.
    Dead,
}

impl Slot<'_> {
    /// Bytes of its value.
    #[must_use]
    pub fn value_bytes(&self) -> usize {
        match self {
            Self::Live { value, .. } => value.len(),
            Self::Dead => 0,
        }
    }
}

/// A value.
#[derive(Clone, Copy, Debug)]
pub enum Value<'a> {
    /// Beside its key.
    Beside(&'a [u8]),
    /// In memory of its own.
    Apart(&'a Bytes),
}

impl Value<'_> {
    /// The value for whoever wants it for longer: a copy, or a share.
    #[must_use]
    pub fn to_bytes(self) -> Bytes {
        match self {
            Self::Beside(value) => Bytes::copy_from_slice(value),
            Self::Apart(value) => value.clone(),
        }
    }
}

impl Deref for Value<'_> {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match self {
            Self::Beside(value) => value,
            Self::Apart(value) => value,
        }
    }
}

/// Rows. None is ever taken out.
#[derive(Default, Debug)]
#[cfg_attr(test, derive(PartialEq))]
pub struct Arena {
    chunks: Vec<Vec<u8>>,
    apart: Vec<Bytes>,
    /// Those of `apart` that are not used.
    unused: Vec<u32>,
    bytes: usize,
}

impl Arena {
    /// What the rows take in memory, about.
    #[must_use]
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Adds a row behind the others; `None` for one that was removed. `share` gives the value as a part of what brought it.
    pub fn add(&mut self, key: &[u8], live: Option<(u64, &[u8])>, share: impl FnOnce() -> Bytes) -> At {
        let (version, value) = live.filter(|(_, value)| value.len() <= BESIDE_BYTES_MAX).unwrap_or((0, &[]));
        let bytes = (FIXED_BYTES + key.len() + value.len()).next_multiple_of(UNIT);
        if self.chunks.last().is_none_or(|last| last.len() + bytes > CHUNK_BYTES) {
            // Few rows take little, and many are not moved.
            self.chunks.push(Vec::with_capacity(if self.chunks.is_empty() { bytes } else { CHUNK_BYTES }));
        }
        let number = self.chunks.len() - 1;
        let chunk = &mut self.chunks[number];
        let at = At::new(number, chunk.len());
        let end = chunk.len() + bytes;
        let what = live.map_or(DEAD, |_| BESIDE | value.len() as u32);
        chunk.extend_from_slice(&version.to_le_bytes());
        chunk.extend_from_slice(&(key.len() as u16).to_le_bytes()); // keys have 4 KiB at the most
        chunk.extend_from_slice(&((bytes - FIXED_BYTES - key.len()) as u16).to_le_bytes());
        chunk.extend_from_slice(&what.to_le_bytes());
        chunk.extend_from_slice(key);
        chunk.extend_from_slice(value);
        chunk.resize(end, 0);
        self.bytes += bytes;
        if live.is_some_and(|(_, value)| value.len() > BESIDE_BYTES_MAX) {
            self.set(at, live, share);
        }
        at
    }

    /// Writes over a row; `None` removes it.
    pub fn set(&mut self, at: At, live: Option<(u64, &[u8])>, share: impl FnOnce() -> Bytes) {
        let head = self.head(at);
        let before = (head.kind() == APART).then_some(head.number());
        let what = match live {
            Some((_, value)) if value.len() > head.room => {
                let value = if value.len() >= SHARE_BYTES_MIN { share() } else { Bytes::copy_from_slice(value) };
                APART | self.put_apart(before, value)
            }
            _ => {
                if let Some(number) = before {
                    self.drop_apart(number);
                }
                live.map_or(DEAD, |(_, value)| BESIDE | value.len() as u32)
            }
        };
        let (chunk, offset) = at.split();
        let row = &mut self.chunks[chunk][offset..];
        row[..8].copy_from_slice(&live.map_or(0, |(version, _)| version).to_le_bytes());
        row[12..FIXED_BYTES].copy_from_slice(&what.to_le_bytes());
        if let Some((_, value)) = live.filter(|_| what & KIND == BESIDE) {
            row[FIXED_BYTES + head.key_bytes..][..value.len()].copy_from_slice(value);
        }
    }

    fn put_apart(&mut self, before: Option<u32>, value: Bytes) -> u32 {
        if let Some(number) = before {
            self.drop_apart(number);
        }
        self.bytes += APART_BYTES + value.len();
        match self.unused.pop() {
            Some(number) => {
                self.apart[number as usize] = value;
                number
            }
            None => {
                self.apart.push(value);
                self.apart.len() as u32 - 1
            }
        }
    }

    fn drop_apart(&mut self, number: u32) {
        self.bytes -= APART_BYTES + std::mem::take(&mut self.apart[number as usize]).len();
        self.unused.push(number);
    }

    fn head(&self, at: At) -> Head {
        let (chunk, offset) = at.split();
        let fixed = &self.chunks[chunk][offset..][..FIXED_BYTES];
        Head {
            version: fixed.first_chunk().map_or(0, |version| u64::from_le_bytes(*version)),
            key_bytes: usize::from(u16::from_le_bytes([fixed[8], fixed[9]])),
            room: usize::from(u16::from_le_bytes([fixed[10], fixed[11]])),
            what: u32::from_le_bytes([fixed[12], fixed[13], fixed[14], fixed[15]]),
        }
    }

    /// The key of a row.
    #[must_use]
    pub fn key(&self, at: At) -> &[u8] {
        let (chunk, offset) = at.split();
        &self.chunks[chunk][offset + FIXED_BYTES..][..self.head(at).key_bytes]
    }

    /// A row.
    #[must_use]
    pub fn row(&self, at: At) -> Row<'_> {
        let head = self.head(at);
        let (chunk, offset) = at.split();
        let (key, rest) = self.chunks[chunk][offset + FIXED_BYTES..].split_at(head.key_bytes);
        let live = |value| Slot::Live { version: head.version, value };
        let slot = match head.kind() {
            BESIDE => live(Value::Beside(&rest[..head.number() as usize])),
            APART => live(Value::Apart(&self.apart[head.number() as usize])),
            _ => Slot::Dead,
        };
        Row { key, slot }
    }

    /// The rows from one on, or from where the next is added, in the order in which they were added.
    #[must_use]
    pub fn places(&self, from: At) -> Places<'_> {
        Places { arena: self, next: from }
    }

    /// Looks at rows that are about to be read or written. Side by side they wait for memory once, where one after the other
    /// each would wait.
    pub fn warm(&self, rows: &[At]) {
        let lines = |at: &At| {
            let (chunk, offset) = at.split();
            self.chunks[chunk][offset..].iter().step_by(LINE_BYTES).take(3).fold(0, |all, byte| all ^ byte)
        };
        std::hint::black_box(rows.iter().fold(0, |all, at| all ^ lines(at)));
    }
}

/// Where rows are.
pub struct Places<'a> {
    arena: &'a Arena,
    /// Where the next one is, or will be.
    pub next: At,
}

impl Iterator for Places<'_> {
    type Item = At;

    fn next(&mut self) -> Option<At> {
        let (chunk, offset) = self.next.split();
        let chunks = &self.arena.chunks;
        let at = match chunks.get(chunk)? {
            rows if offset < rows.len() => self.next,
            _ if chunk + 1 < chunks.len() => At::new(chunk + 1, 0),
            _ => return None,
        };
        let head = self.arena.head(at);
        let bytes = FIXED_BYTES + head.key_bytes + head.room;
        self.next = At(at.0 + (bytes / UNIT) as u32);
        Some(at)
    }
}

struct Head {
    version: u64,
    key_bytes: usize,
    room: usize,
    what: u32,
}

impl Head {
    fn kind(&self) -> u32 {
        self.what & KIND
    }

    fn number(&self) -> u32 {
        self.what & !KIND
    }
}
