//! One end of a connection: frames read in batches, and the handshake for both sides.
//!
//! It keeps no state of requests; [`crate::link`] does that for the asking side, node and balancer for the answering.

#![expect(clippy::disallowed_methods, reason = "a shell: tells how long a frame has been half read")]

use crate::codec;
use crate::frame::{Frame, FrameError, Header, Kind, VERSION, VERSION_MIN, peek_length};
use crate::ids::ClusterId;
use crate::limits::{FRAME_BYTES_MAX, HANDSHAKE_BYTES_MAX};
use crate::message::{Failure, Hello, MAGIC, RefusalCode, Role, Welcome};
use crate::world::net::{OwnedReadHalf, OwnedWriteHalf, TcpStream};
use bytes::{Bytes, BytesMut};
use std::io;
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};
use tokio::time::Instant;

/// How long the other side may take for the handshake.
pub const HANDSHAKE_TIME_MAX: Duration = Duration::from_secs(5);
/// How long a frame may stay half read: whoever holds one open longer is disconnected.
pub const HALF_FRAME_TIME_MAX: Duration = Duration::from_secs(30);
/// Room made for one read.
const READ_BYTES: usize = 64 << 10;
/// Room that is still enough for one read: a small frame that is kept must not cost a whole new buffer.
const READ_SPARE_BYTES_MIN: usize = 16 << 10;
/// Most room made ahead of bytes that have only been announced.
const READ_AHEAD_BYTES_MAX: usize = 1 << 20;

/// Why a connection ended.
#[derive(Debug, thiserror::Error)]
pub enum SessionError {
    /// The system's error.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// Bytes that are no frame.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// A frame that does not belong where it came.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The other side refused the handshake, or this side did.
    #[error("{0}")]
    Refused(Failure),
    /// Too slow.
    #[error("{0} took longer than {1:?}")]
    Slow(&'static str, Duration),
}

/// Reads frames from a stream, as many at once as have come.
#[derive(Debug)]
pub struct FrameReader<R> {
    stream: R,
    buffer: BytesMut,
    bytes_max: usize,
    half_time_max: Duration,
    /// When the frame that is half read must be whole. Kept here, so that neither a sender of single bytes nor a caller
    /// that cancels and calls again can put it off.
    half_until: Option<Instant>,
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// A reader that takes no frame above the handshake's limit until [`FrameReader::handshake_done`].
    pub fn new(stream: R) -> Self {
        Self {
            stream,
            buffer: BytesMut::new(),
            bytes_max: HANDSHAKE_BYTES_MAX,
            half_time_max: HALF_FRAME_TIME_MAX,
            half_until: None,
        }
    }

    /// Allows a frame to stay half read for another time than [`HALF_FRAME_TIME_MAX`].
    #[must_use]
    pub fn with_half_frame_time(mut self, time_max: Duration) -> Self {
        self.half_time_max = time_max;
        self
    }

    /// From now on frames may be as large as the protocol allows.
    pub fn handshake_done(&mut self) {
        self.bytes_max = FRAME_BYTES_MAX;
    }

    /// Waits for at least one frame and appends all that are whole to `frames`. `false` at a clean end of the stream.
    /// Cancelling it loses nothing: bytes stay in the buffer.
    ///
    /// # Errors
    /// [`SessionError`]: the connection is of no use any more.
    pub async fn next_batch(&mut self, frames: &mut Vec<Frame>) -> Result<bool, SessionError> {
        loop {
            while let Some(frame) = Frame::decode(&mut self.buffer, self.bytes_max)? {
                frames.push(frame);
                self.half_until = None;
            }
            if !frames.is_empty() {
                return Ok(true);
            }
            let announced = peek_length(&self.buffer, self.bytes_max)?.map_or(0, |length| 4 + length);
            let missing = announced.saturating_sub(self.buffer.len());
            if self.buffer.capacity() - self.buffer.len() < missing.clamp(READ_SPARE_BYTES_MIN, READ_AHEAD_BYTES_MAX) {
                self.buffer.reserve(missing.clamp(READ_BYTES, READ_AHEAD_BYTES_MAX));
            }
            let read = if self.buffer.is_empty() {
                self.stream.read_buf(&mut self.buffer).await?
            } else {
                let until = *self.half_until.get_or_insert_with(|| Instant::now() + self.half_time_max);
                tokio::time::timeout_at(until, self.stream.read_buf(&mut self.buffer))
                    .await
                    .map_err(|_| SessionError::Slow("half a frame", self.half_time_max))??
            };
            if read == 0 {
                return match self.buffer.len() {
                    0 => Ok(false),
                    held => Err(SessionError::Protocol(format!("the connection ended {held} bytes into a frame"))),
                };
            }
        }
    }

    /// Waits for one frame where no more than one can be due.
    ///
    /// # Errors
    /// [`SessionError`]; also when the stream ends.
    pub async fn next_one(&mut self) -> Result<Frame, SessionError> {
        let mut frames = Vec::with_capacity(1);
        if !self.next_batch(&mut frames).await? {
            return Err(SessionError::Protocol("the other side closed the connection".into()));
        }
        match (frames.pop(), frames.is_empty()) {
            (Some(frame), true) => Ok(frame),
            _ => Err(SessionError::Protocol("more frames than may be sent at this point".into())),
        }
    }
}

/// An open connection with the handshake done.
#[derive(Debug)]
pub struct Session<T> {
    /// Where frames come from.
    pub reader: FrameReader<OwnedReadHalf>,
    /// Where [`crate::outbox::Outbox::write_to`] writes.
    pub writer: OwnedWriteHalf,
    /// What the other side said of itself.
    pub peer: T,
}

impl Hello {
    /// The opening that this build sends.
    #[must_use]
    pub fn ours(cluster: Option<ClusterId>, role: Role) -> Self {
        Self { magic: MAGIC, version_min: VERSION_MIN, version_max: VERSION, cluster, role }
    }

    /// The newest version that both sides speak.
    ///
    /// # Errors
    /// A refusal that says which versions each side speaks.
    pub fn version_in_common(&self) -> Result<u8, Failure> {
        let version = self.version_max.min(VERSION);
        if version < self.version_min.max(VERSION_MIN) {
            return Err(no_version_in_common(self.version_min, self.version_max));
        }
        Ok(version)
    }

    /// Whether this side may talk to a member of `ours`.
    ///
    /// # Errors
    /// A refusal that names both clusters.
    pub fn check_cluster(&self, ours: Option<ClusterId>) -> Result<(), Failure> {
        match (self.cluster, ours) {
            (Some(meant), Some(ours)) if meant != ours => Err(Failure::refusal(
                RefusalCode::WrongCluster,
                format!("you want cluster {meant}, this is cluster {ours}; check the address"),
            )),
            _ => Ok(()),
        }
    }
}

/// Answers the handshake of a connection that came in. `welcome` decides.
///
/// # Errors
/// [`SessionError`]; the other side was told if it was still there to be told.
pub async fn accept(
    stream: impl Into<TcpStream>,
    welcome: impl FnOnce(&Hello) -> Result<Welcome, Failure>,
) -> Result<Session<Hello>, SessionError> {
    let stream = stream.into();
    stream.set_nodelay(true)?;
    let (read, mut writer) = stream.into_split();
    let mut reader = FrameReader::new(read);
    let first = match within_handshake(reader.next_one()).await {
        Err(SessionError::Frame(FrameError::Version(theirs))) => {
            let failure = no_version_in_common(theirs, theirs);
            let answer = Frame::new(opening(Kind::Failed), encoded_head(&failure)?, Bytes::new());
            within_handshake(async { Ok(writer.write_all(&encoded(&answer)).await?) }).await?;
            return Err(SessionError::Refused(failure));
        }
        first => first?,
    };
    if first.header.kind != Kind::Hello {
        return Err(SessionError::Protocol(format!("the first frame is {:?}, not Hello", first.header.kind)));
    }
    let answer = codec::decode_prefix::<Hello>(&first.head)
        .map_err(|error| Failure::malformed(&error))
        .and_then(|(hello, _)| if hello.magic == MAGIC { Ok(hello) } else { Err(bad_magic()) })
        .and_then(|hello| Ok((welcome(&hello)?, hello)));
    let (kind, head) = match &answer {
        Ok((welcome, _)) => (Kind::Welcome, encoded_head(welcome)?),
        Err(failure) => (Kind::Failed, encoded_head(failure)?),
    };
    let frame = Frame::new(first.header.answer(kind), head, Bytes::new());
    within_handshake(async { Ok(writer.write_all(&encoded(&frame)).await?) }).await?;
    let (_, peer) = answer.map_err(SessionError::Refused)?;
    reader.handshake_done();
    Ok(Session { reader, writer, peer })
}

/// The header of a handshake's frame: in the oldest version spoken, so that a build one version older can read it.
fn opening(kind: Kind) -> Header {
    Header { version: VERSION_MIN, ..Header::new(kind) }
}

fn encoded_head(head: &impl serde::Serialize) -> Result<Vec<u8>, SessionError> {
    codec::encode(head).map_err(|error| SessionError::Protocol(error.to_string()))
}

fn no_version_in_common(theirs_min: u8, theirs_max: u8) -> Failure {
    Failure::refusal(
        RefusalCode::Version,
        format!(
            "no protocol version in common: you speak {theirs_min} to {theirs_max}, this side {VERSION_MIN} to {VERSION}; use a build of the same release or the one next to it"
        ),
    )
}

fn bad_magic() -> Failure {
    Failure::refusal(RefusalCode::Malformed, "the first bytes are not those of the shkv protocol")
}

/// Connects to `addr` and does the handshake.
///
/// # Errors
/// [`SessionError`]; a refusal is the other side's own words.
pub async fn connect(addr: &str, hello: &Hello) -> Result<Session<Welcome>, SessionError> {
    let stream = within_handshake(async { Ok(TcpStream::connect(addr).await?) }).await?;
    stream.set_nodelay(true)?;
    let (read, mut writer) = stream.into_split();
    let mut reader = FrameReader::new(read);
    let frame = Frame::new(opening(Kind::Hello), encoded_head(hello)?, Bytes::new());
    within_handshake(async { Ok(writer.write_all(&encoded(&frame)).await?) }).await?;
    let answer = within_handshake(reader.next_one()).await?;
    match answer.header.kind {
        Kind::Welcome => {
            let (peer, _) = codec::decode_prefix::<Welcome>(&answer.head)
                .map_err(|error| SessionError::Protocol(error.to_string()))?;
            reader.handshake_done();
            Ok(Session { reader, writer, peer })
        }
        Kind::Failed => Err(SessionError::Refused(failure_of(&answer))),
        other => Err(SessionError::Protocol(format!("the answer to Hello is {other:?}"))),
    }
}

/// The failure that a [`Kind::Failed`] frame carries.
#[must_use]
pub fn failure_of(frame: &Frame) -> Failure {
    codec::decode(&frame.head)
        .unwrap_or_else(|error| Failure::unknown(format!("an answer that cannot be read: {error}")))
}

fn encoded(frame: &Frame) -> BytesMut {
    let mut bytes = BytesMut::with_capacity(frame.wire_bytes());
    frame.encode(&mut bytes);
    bytes
}

async fn within_handshake<T>(work: impl Future<Output = Result<T, SessionError>>) -> Result<T, SessionError> {
    tokio::time::timeout(HANDSHAKE_TIME_MAX, work)
        .await
        .map_err(|_| SessionError::Slow("the handshake", HANDSHAKE_TIME_MAX))?
}
