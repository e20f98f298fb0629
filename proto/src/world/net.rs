//! TCP: tokio's types, or with the feature `sim` types of the same names that are tokio's outside of a simulation.

#[cfg(feature = "sim")]
pub use super::net_sim::{OwnedReadHalf, OwnedWriteHalf, StdListener, StdStream, TcpListener, TcpStream};
#[cfg(not(feature = "sim"))]
pub use std::net::{TcpListener as StdListener, TcpStream as StdStream};
#[cfg(not(feature = "sim"))]
pub use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
#[cfg(not(feature = "sim"))]
pub use tokio::net::{TcpListener, TcpStream};

use std::io;
use std::net::SocketAddr;
use tokio::net::TcpSocket;

/// Listens on `host:port`, and lets so many connections wait to be accepted; the system may allow fewer. With the usual 128 a
/// crowd that comes at once is turned away, and tries again only seconds later.
///
/// # Errors
/// The system's; those of the last address if the name has more than one.
pub async fn listen(addr: &str, waiting: u32) -> io::Result<TcpListener> {
    if super::is_simulated() {
        return TcpListener::bind(addr).await;
    }
    let mut trouble = io::Error::new(io::ErrorKind::InvalidInput, "the name has no address");
    for addr in tokio::net::lookup_host(addr).await? {
        match listen_at(addr, waiting) {
            Ok(listener) => return TcpListener::from_std(listener),
            Err(error) => trouble = error,
        }
    }
    Err(trouble)
}

fn listen_at(addr: SocketAddr, waiting: u32) -> io::Result<StdListener> {
    let socket = if addr.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    socket.set_reuseaddr(true)?; // one that starts again takes its port over from connections that are about to end
    socket.bind(addr)?;
    let listener = socket.listen(waiting)?.into_std()?;
    #[cfg(feature = "sim")]
    let listener = StdListener::Real(listener);
    Ok(listener)
}
