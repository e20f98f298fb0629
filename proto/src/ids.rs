//! One type for each identity, so that no number is taken for another.

use serde::{Deserialize, Serialize};
use std::fmt;

macro_rules! id {
    ($(#[$doc:meta])* $name:ident($inner:ty), $format:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
        pub struct $name(pub $inner);

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, $format, self.0)
            }
        }
    };
}

id!(
    /// A cluster: random, made once at bootstrap, written into every data directory.
    ClusterId(u128), "{:032x}"
);
id!(
    /// A node: random and never zero, made at its first start, kept in its data directory. A wiped disk is a new node.
    NodeId(u64), "{:016x}"
);
id!(
    /// A shard: one replicated, ordered part of a keyspace. Shard 0 is the system shard.
    ShardId(u32), "{}"
);
id!(
    /// A keyspace: a named map of bytes to bytes. Keyspace 0 is the system's own.
    KeyspaceId(u32), "{}"
);
id!(
    /// A replica of a shard on a node. Never used twice: a replica that is made anew on the same node has a new id,
    /// because Raft must not take it for the old one, whose votes it has forgotten.
    ReplicaId(u64), "{}"
);
id!(
    /// The age of a shard map: the system shard's revision at which it was written. It only grows.
    Epoch(u64), "{}"
);

impl ShardId {
    /// The shard whose rows are the cluster's metadata.
    pub const SYSTEM: Self = Self(0);
    /// In a header: the sender leaves the choice of shard to the receiver.
    pub const UNROUTED: Self = Self(u32::MAX);
}

impl KeyspaceId {
    /// The keyspace that holds the shard map; it has one shard, [`ShardId::SYSTEM`].
    pub const SYSTEM: Self = Self(0);
}

impl Epoch {
    /// Older than any map.
    pub const NONE: Self = Self(0);
}
