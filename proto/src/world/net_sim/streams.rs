//! Connections and listeners under the names and with the methods of tokio's types: tokio's own outside of a simulation,
//! those of the simulated network inside.

use super::{Half, Listening, Net, SimRead, SimWrite, What};
use crate::world::sim::here;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A connection.
#[derive(Debug)]
pub enum TcpStream {
    /// Of the system.
    Real(tokio::net::TcpStream),
    /// Of a simulated network.
    Sim(SimRead, SimWrite),
}

/// A connection that belongs to no runtime.
#[derive(Debug)]
pub enum StdStream {
    /// Of the system.
    Real(std::net::TcpStream),
    /// Of a simulated network.
    Sim(SimRead, SimWrite),
}

/// The half that is read.
#[derive(Debug)]
pub enum OwnedReadHalf {
    /// Of the system.
    Real(tokio::net::tcp::OwnedReadHalf),
    /// Of a simulated network.
    Sim(SimRead),
}

/// The half that is written.
#[derive(Debug)]
pub enum OwnedWriteHalf {
    /// Of the system.
    Real(tokio::net::tcp::OwnedWriteHalf),
    /// Of a simulated network.
    Sim(SimWrite),
}

impl From<tokio::net::TcpStream> for TcpStream {
    fn from(stream: tokio::net::TcpStream) -> Self {
        Self::Real(stream)
    }
}

fn stream(half: Half) -> TcpStream {
    TcpStream::Sim(SimRead(half.again()), SimWrite(half))
}

impl TcpStream {
    /// Connects to `host:port`.
    ///
    /// # Errors
    /// The system's.
    pub async fn connect(addr: &str) -> io::Result<Self> {
        let Some(host) = here() else { return Ok(Self::Real(tokio::net::TcpStream::connect(addr).await?)) };
        let to = addr.parse().map_err(|_| io::Error::other(format!("{addr} is no simulated address")))?;
        let stream = stream(host.net.connect(&host, to));
        if let Self::Sim(SimRead(half), _) = &stream {
            std::future::poll_fn(|cx| half.poll_up(cx)).await?;
        }
        Ok(stream)
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn set_nodelay(&self, nodelay: bool) -> io::Result<()> {
        match self {
            Self::Real(stream) => stream.set_nodelay(nodelay),
            Self::Sim(..) => Ok(()),
        }
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Real(stream) => stream.peer_addr(),
            Self::Sim(SimRead(half), _) => half.addr(1 - half.side),
        }
    }

    /// As tokio's.
    #[must_use]
    pub fn into_split(self) -> (OwnedReadHalf, OwnedWriteHalf) {
        match self {
            Self::Real(stream) => {
                let (read, write) = stream.into_split();
                (OwnedReadHalf::Real(read), OwnedWriteHalf::Real(write))
            }
            Self::Sim(read, write) => (OwnedReadHalf::Sim(read), OwnedWriteHalf::Sim(write)),
        }
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn into_std(self) -> io::Result<StdStream> {
        Ok(match self {
            Self::Real(stream) => StdStream::Real(stream.into_std()?),
            Self::Sim(read, write) => StdStream::Sim(read, write),
        })
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn from_std(stream: StdStream) -> io::Result<Self> {
        Ok(match stream {
            StdStream::Real(stream) => Self::Real(tokio::net::TcpStream::from_std(stream)?),
            StdStream::Sim(read, write) => Self::Sim(read, write),
        })
    }
}

impl AsyncRead for OwnedReadHalf {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(half) => Pin::new(half).poll_read(cx, buf),
            Self::Sim(SimRead(half)) => half.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for OwnedWriteHalf {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Real(half) => Pin::new(half).poll_write(cx, bytes),
            Self::Sim(SimWrite(half)) => half.poll_write(cx, bytes),
        }
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Real(half) => Pin::new(half).poll_write_vectored(cx, slices),
            Self::Sim(SimWrite(half)) => {
                let first = slices.iter().find(|slice| !slice.is_empty());
                half.poll_write(cx, first.map_or(&[], |slice| slice))
            }
        }
    }

    fn is_write_vectored(&self) -> bool {
        match self {
            Self::Real(half) => half.is_write_vectored(),
            Self::Sim(_) => false,
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(half) => Pin::new(half).poll_flush(cx),
            Self::Sim(_) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(half) => Pin::new(half).poll_shutdown(cx),
            Self::Sim(SimWrite(half)) => {
                half.shut_writing();
                Poll::Ready(Ok(()))
            }
        }
    }
}

impl AsyncRead for TcpStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(stream) => Pin::new(stream).poll_read(cx, buf),
            Self::Sim(SimRead(half), _) => half.poll_read(cx, buf),
        }
    }
}

impl AsyncWrite for TcpStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        match self.get_mut() {
            Self::Real(stream) => Pin::new(stream).poll_write(cx, bytes),
            Self::Sim(_, SimWrite(half)) => half.poll_write(cx, bytes),
        }
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(stream) => Pin::new(stream).poll_flush(cx),
            Self::Sim(..) => Poll::Ready(Ok(())),
        }
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.get_mut() {
            Self::Real(stream) => Pin::new(stream).poll_shutdown(cx),
            Self::Sim(_, SimWrite(half)) => {
                half.shut_writing();
                Poll::Ready(Ok(()))
            }
        }
    }
}

/// Where a simulated process listens. Dropping it ends that.
#[derive(Debug)]
pub struct SimListener {
    net: Arc<Net>,
    addr: SocketAddr,
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let mut state = self.net.state.lock();
        if let Some(listening) = state.listeners.remove(&self.addr) {
            for conn in listening.queue {
                if let Some(conn) = state.conns.get_mut(&conn) {
                    conn.ends[1].vanish();
                }
                state.send(conn, 0, What::Reset);
            }
        }
    }
}

/// A listener.
#[derive(Debug)]
pub enum TcpListener {
    /// Of the system.
    Real(tokio::net::TcpListener),
    /// Of a simulated network.
    Sim(SimListener),
}

/// A listener that belongs to no runtime.
#[derive(Debug)]
pub enum StdListener {
    /// Of the system.
    Real(std::net::TcpListener),
    /// Of a simulated network.
    Sim(SimListener),
}

impl TcpListener {
    /// Listens on `host:port`.
    ///
    /// # Errors
    /// The system's.
    pub async fn bind(addr: impl AsRef<str>) -> io::Result<Self> {
        let addr = addr.as_ref();
        let Some(host) = here() else { return Ok(Self::Real(tokio::net::TcpListener::bind(addr).await?)) };
        let mut addr: SocketAddr =
            addr.parse().map_err(|_| io::Error::other(format!("{addr} is no simulated address")))?;
        addr.set_ip(host.ip);
        let mut state = host.net.state.lock();
        if addr.port() == 0 {
            addr.set_port(state.any_port());
        }
        if state.listeners.contains_key(&addr) {
            return Err(io::Error::new(io::ErrorKind::AddrInUse, "address in use"));
        }
        state.listeners.insert(addr, Listening::default());
        drop(state);
        Ok(Self::Sim(SimListener { net: host.net.clone(), addr }))
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub async fn accept(&self) -> io::Result<(TcpStream, SocketAddr)> {
        match self {
            Self::Real(listener) => listener.accept().await.map(|(stream, addr)| (TcpStream::Real(stream), addr)),
            Self::Sim(listener) => std::future::poll_fn(|cx| listener.poll_accept(cx)).await,
        }
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn local_addr(&self) -> io::Result<SocketAddr> {
        match self {
            Self::Real(listener) => listener.local_addr(),
            Self::Sim(listener) => Ok(listener.addr),
        }
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn into_std(self) -> io::Result<StdListener> {
        Ok(match self {
            Self::Real(listener) => StdListener::Real(listener.into_std()?),
            Self::Sim(listener) => StdListener::Sim(listener),
        })
    }

    /// As tokio's.
    ///
    /// # Errors
    /// The system's.
    pub fn from_std(listener: StdListener) -> io::Result<Self> {
        Ok(match listener {
            StdListener::Real(listener) => Self::Real(tokio::net::TcpListener::from_std(listener)?),
            StdListener::Sim(listener) => Self::Sim(listener),
        })
    }
}

impl SimListener {
    fn poll_accept(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        let mut state = self.net.state.lock();
        let Some(listening) = state.listeners.get_mut(&self.addr) else {
            return Poll::Ready(Err(io::Error::other("the host is down")));
        };
        if let Some(conn) = listening.queue.pop_front() {
            let Some(from) = state.conns.get(&conn).map(|conn| conn.ends[0].addr) else {
                return self.poll_accept_again(cx);
            };
            let half = Half { net: self.net.clone(), conn, side: 1 };
            return Poll::Ready(Ok((stream(half), from)));
        }
        listening.waker = Some(cx.waker().clone());
        Poll::Pending
    }

    /// A connection was gone before it was accepted: the next one is looked at when the task runs again.
    fn poll_accept_again(&self, cx: &mut Context<'_>) -> Poll<io::Result<(TcpStream, SocketAddr)>> {
        cx.waker().wake_by_ref();
        Poll::Pending
    }
}
