//! What may be said between the parts of shkv, and how: limits, ids, frames, messages, the shard map,
//! hashing, routing, retry, and the one connection type that balancer, node and client share.
//!
//! `proto.md` at the top of the repository is the specification; the golden bytes in this crate's tests hold
//! the code to it. This crate imports no other crate of the workspace. It knows nothing of disks or consensus.

pub mod codec;
pub mod frame;
pub mod hashing;
pub mod ids;
pub mod limits;
pub mod link;
pub mod map;
pub mod merge;
pub mod message;
pub mod outbox;
pub mod retry;
pub mod ring;
pub mod route;
pub mod rows;
pub mod session;
pub mod world;

pub use frame::{Frame, Header, Kind};
pub use ids::{ClusterId, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
pub use map::Map;
