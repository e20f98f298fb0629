//! The encoding of message heads: bincode 2, `standard()` (little-endian, variable-length integers), with a limit.
//!
//! This is the only file of the workspace that names bincode. Types that pass through here are not recursive and
//! hold no zero-sized elements in a sequence: bincode's limit does not stop either of those two from costing a
//! stack or seconds. Enums and structs are append-only: the index of a variant is the wire.

use crate::limits::HEAD_BYTES_MAX;
use bincode::config::{Configuration, Limit, LittleEndian, Varint};
use serde::{Serialize, Serializer, de::DeserializeOwned};

const CONFIG: Configuration<LittleEndian, Varint, Limit<HEAD_BYTES_MAX>> =
    bincode::config::standard().with_limit::<HEAD_BYTES_MAX>();

/// Bytes that do not decode to what they should be.
#[derive(Debug, thiserror::Error)]
pub enum CodecError {
    /// The bytes are not a value of the type.
    #[error("malformed body: {0}")]
    Malformed(String),
    /// The value is followed by bytes that do not belong to it.
    #[error("malformed body: {extra} bytes behind its end")]
    Trailing {
        /// How many.
        extra: usize,
    },
    /// The value is larger than a head may be.
    #[error("a head of {bytes} bytes is over the limit of {HEAD_BYTES_MAX}")]
    TooLarge {
        /// Its size.
        bytes: usize,
    },
}

/// Appends the encoding of `value` to `out`.
///
/// # Errors
/// [`CodecError::TooLarge`] above [`HEAD_BYTES_MAX`]; `out` is then as it was.
pub fn encode_into<T: Serialize + ?Sized>(value: &T, out: &mut Vec<u8>) -> Result<(), CodecError> {
    let before = out.len();
    let written = bincode::serde::encode_into_std_write(value, out, CONFIG)
        .map_err(|error| CodecError::Malformed(error.to_string()));
    match written {
        Ok(bytes) if bytes > HEAD_BYTES_MAX => {
            out.truncate(before);
            Err(CodecError::TooLarge { bytes })
        }
        Ok(_) => Ok(()),
        Err(error) => {
            out.truncate(before);
            Err(error)
        }
    }
}

/// The encoding of `value`.
///
/// # Errors
/// [`CodecError::TooLarge`] above [`HEAD_BYTES_MAX`].
pub fn encode<T: Serialize + ?Sized>(value: &T) -> Result<Vec<u8>, CodecError> {
    let mut out = Vec::with_capacity(64);
    encode_into(value, &mut out)?;
    Ok(out)
}

/// How a field of bytes is encoded at once: as [`Serialize`] has it, they are encoded one by one, to the same bytes.
///
/// # Errors
/// The serializer's.
pub fn as_bytes<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
    serializer.serialize_bytes(bytes)
}

/// Decodes a value that fills `bytes` to the end.
///
/// # Errors
/// [`CodecError::Malformed`] or [`CodecError::Trailing`].
pub fn decode<T: DeserializeOwned>(bytes: &[u8]) -> Result<T, CodecError> {
    let (value, used) = decode_prefix(bytes)?;
    whole(value, used, bytes)
}

/// Decodes a value that begins `bytes`; returns it with the number of bytes that it took.
///
/// # Errors
/// [`CodecError::Malformed`].
pub fn decode_prefix<T: DeserializeOwned>(bytes: &[u8]) -> Result<(T, usize), CodecError> {
    bincode::serde::decode_from_slice(bytes, CONFIG).map_err(|error| CodecError::Malformed(error.to_string()))
}

/// Decodes a value that fills `bytes` and borrows from them.
///
/// # Errors
/// [`CodecError::Malformed`] or [`CodecError::Trailing`].
pub fn decode_borrowed<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, CodecError> {
    let (value, used) = decode_borrowed_prefix(bytes)?;
    whole(value, used, bytes)
}

/// Decodes a value that begins `bytes` and borrows from them; returns it with the number of bytes that it took.
///
/// # Errors
/// [`CodecError::Malformed`].
pub fn decode_borrowed_prefix<'a, T: serde::Deserialize<'a>>(bytes: &'a [u8]) -> Result<(T, usize), CodecError> {
    bincode::serde::borrow_decode_from_slice(bytes, CONFIG).map_err(|error| CodecError::Malformed(error.to_string()))
}

fn whole<T>(value: T, used: usize, bytes: &[u8]) -> Result<T, CodecError> {
    match bytes.len() - used {
        0 => Ok(value),
        extra => Err(CodecError::Trailing { extra }),
    }
}
