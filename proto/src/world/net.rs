//! TCP: tokio's types, or with the feature `sim` types of the same names that are tokio's outside of a simulation.

#[cfg(feature = "sim")]
pub use super::net_sim::{OwnedReadHalf, OwnedWriteHalf, StdListener, StdStream, TcpListener, TcpStream};
#[cfg(not(feature = "sim"))]
pub use std::net::{TcpListener as StdListener, TcpStream as StdStream};
#[cfg(not(feature = "sim"))]
pub use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
#[cfg(not(feature = "sim"))]
pub use tokio::net::{TcpListener, TcpStream};
