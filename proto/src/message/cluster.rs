//! What balancers, nodes and operators say about the cluster itself: the map, heartbeats, replicas, joining, wishes of
//! operators, and status.

use crate::ids::{ClusterId, Epoch, KeyspaceId, NodeId, ReplicaId, ShardId};
use crate::map::{Map, Part};
use serde::{Deserialize, Serialize};

// ---------------------------------------------------------------------------------------------- map and heartbeat

/// Head of the answer to [`crate::Kind::Map`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct MapDone {
    /// The map.
    pub map: Map,
    /// Which node led which shard when last heard of: a hint.
    pub leaders: Vec<(ShardId, NodeId)>,
}

/// Head of [`crate::Kind::Beat`]. The answer's head is a [`NodeStatus`].
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Beat {
    /// Where each node was last reached. Unlike the map this needs no quorum, so it works while nodes come up again.
    pub addrs: Vec<(NodeId, String)>,
    /// The map, when the node's own is older.
    pub map: Option<Map>,
    /// Why the node is no longer of the cluster, if it is not. It serves nothing from then on and remembers it.
    pub retired: Option<String>,
}

/// Head of [`crate::Kind::Join`]: a node registers. Doing it again tells where the node is now.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Join {
    /// The cluster that it is in already, if it is in one.
    pub cluster: Option<ClusterId>,
    /// Its identity.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Where other members reach it, as `host:port`.
    pub addr: String,
    /// Where clients outside of the members' network reach it, if that differs.
    pub addr_outside: Option<String>,
    /// What fails together with it: a rack, a zone. Empty says nothing.
    pub domain: String,
    /// How much it takes compared to others; 100 is usual.
    pub capacity: u32,
    /// By which name its provisioner knows it; empty if it was started by hand.
    pub instance: String,
}

/// Head of the answer to a join.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct JoinDone {
    /// The cluster that it is in from now on.
    pub cluster: ClusterId,
}

// ---------------------------------------------------------------------------------------------- replicas

/// Head of [`crate::Kind::CreateReplica`]. Doing it twice is the same as doing it once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct CreateReplica {
    /// The cluster; a node that is in none takes it, and keeps it for good.
    pub cluster: ClusterId,
    /// The shard.
    pub shard: ShardId,
    /// Its keyspace.
    pub keyspace: KeyspaceId,
    /// Its part of the keyspace.
    pub part: Part,
    /// The replica to make.
    pub replica: ReplicaId,
    /// The voters with which the group began. A replica that joins later goes through the group's history from there,
    /// or gets a snapshot.
    pub founders: Vec<ReplicaId>,
    /// The nodes that keep the group's replicas now, this one included.
    pub homes: Vec<(ReplicaId, NodeId)>,
    /// Whether this replica stands for election at once, so that leaders are spread from the start.
    pub campaign: bool,
}

/// Head of [`crate::Kind::TransferLeader`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct TransferLeader {
    /// The replica that should lead.
    pub to: ReplicaId,
}

/// Head of [`crate::Kind::ChangeReplicas`], to the leader of the header's shard: one step from one configuration of its
/// group to the next, by joint consensus (Ongaro and Ousterhout, 2014, section 6). Done means proposed, or so already.
#[derive(Clone, Default, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ChangeReplicas {
    /// The voters from which the step was thought out, in order: with others it is refused, unless the group is as it
    /// should be already. Empty for whatever they are.
    pub from: Vec<ReplicaId>,
    /// Replicas that are to learn, with their nodes.
    pub learn: Vec<(ReplicaId, NodeId)>,
    /// Learners that are to vote.
    pub promote: Vec<ReplicaId>,
    /// Replicas that are to go.
    pub remove: Vec<ReplicaId>,
}

/// Head of [`crate::Kind::RemoveReplica`]: a node deletes its replica of the header's shard. Doing it twice is the same
/// as doing it once.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct RemoveReplica {
    /// The replica. Another one of the shard stays.
    pub replica: ReplicaId,
}

// ---------------------------------------------------------------------------------------------- operators

/// Head of [`crate::Kind::Admin`]: what an operator wants. It is written into the map, which outlives whoever took it,
/// and carried out by the controller.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Admin {
    /// More nodes, started by the provisioner.
    AddNodes {
        /// How many in all; those that `names` does not name get random names.
        count: u32,
        /// Names of new nodes.
        names: Vec<String>,
    },
    /// Fewer nodes: each is drained, and then it is of the cluster no more.
    RemoveNodes {
        /// How many in all; those that `names` does not name are chosen among the nodes that have least.
        count: u32,
        /// Names or ids.
        names: Vec<String>,
    },
    /// Moves everything off a node, or lets it be used again.
    Drain {
        /// Name or id.
        node: String,
        /// Whether it is to be empty.
        drain: bool,
    },
    /// Gives the leadership of a shard to the replica on a node.
    Transfer {
        /// The shard.
        shard: ShardId,
        /// Name or id.
        node: String,
    },
    /// A new keyspace.
    CreateKeyspace {
        /// Its name.
        name: String,
        /// Copies of each of its shards.
        replicas: u32,
        /// Its shards: they adjoin and cover all keys.
        shards: Vec<NewShard>,
    },
    /// One keyspace less, with all its rows.
    DropKeyspace {
        /// Its name.
        name: String,
    },
    /// Which nodes are to keep a shard.
    Pin {
        /// The shard.
        shard: ShardId,
        /// Their names; empty leaves that to the balancer.
        nodes: Vec<String>,
    },
    /// Other shards of a keyspace in place of some, whose rows go with them: for ranges that hold none yet.
    Recut {
        /// The keyspace's name.
        keyspace: String,
        /// The shards that go.
        remove: Vec<ShardId>,
        /// The shards that come: they cover the same keys.
        shards: Vec<NewShard>,
    },
}

/// A shard of a new keyspace.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewShard {
    /// Its part.
    pub part: Part,
    /// Names of the nodes that are to keep it; empty leaves that to the balancer.
    pub pinned: Vec<String>,
}

/// Head of the answer to an [`Admin`]: it is written into the map.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct AdminDone {
    /// The epoch of the map that says so.
    pub epoch: Epoch,
    /// Names of the nodes that it is about.
    pub names: Vec<String>,
}

// ---------------------------------------------------------------------------------------------- status

/// What a node says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NodeStatus {
    /// Its identity.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its cluster, if it is in one.
    pub cluster: Option<ClusterId>,
    /// Its process.
    pub process: u32,
    /// Processor time of its process so far, in microseconds.
    pub cpu_us: u64,
    /// The epoch of the map that it has.
    pub epoch: Epoch,
    /// Bytes of rows in memory that are not yet in redb.
    pub table_bytes: u64,
    /// Bytes of log on disk that are still needed.
    pub log_bytes: u64,
    /// Bytes free on its disk.
    pub disk_free_bytes: u64,
    /// Whether the disk is so full that puts are refused.
    pub disk_full: bool,
    /// fdatasync calls of the log so far.
    pub log_syncs: u64,
    /// Its replicas.
    pub replicas: Vec<ReplicaStatus>,
}

/// What a node says of a replica.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct ReplicaStatus {
    /// The shard.
    pub shard: ShardId,
    /// The replica.
    pub replica: ReplicaId,
    /// Whether it leads.
    pub leads: bool,
    /// The replica that it takes for the leader.
    pub leader: Option<ReplicaId>,
    /// Raft term.
    pub term: u64,
    /// Last log index known to be committed.
    pub committed: u64,
    /// Last log index applied.
    pub applied: u64,
    /// Last log index that is durable in redb.
    pub flushed: u64,
    /// First log index that the log still has.
    pub log_first: u64,
    /// Last log index.
    pub log_last: u64,
    /// Mutations so far.
    pub revision: u64,
    /// Snapshots taken in from a leader since the node started.
    pub snapshots_installed: u64,
    /// The group as its leader sees it; others say nothing.
    pub group: Option<GroupStatus>,
}

/// A Raft group as its leader sees it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct GroupStatus {
    /// Those who vote, in a joint configuration those of its incoming half.
    pub voters: Vec<ReplicaId>,
    /// Those who vote in the outgoing half of a joint configuration; otherwise nobody.
    pub outgoing: Vec<ReplicaId>,
    /// Those who learn.
    pub learners: Vec<ReplicaId>,
    /// Up to which log index each of them is known to have the log.
    pub matched: Vec<(ReplicaId, u64)>,
}

/// Head of the answer to [`crate::Kind::Status`]: a node lists itself, a balancer lists all nodes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StatusDone {
    /// The map that the answering side has.
    pub map: Option<Map>,
    /// Process and processor time in microseconds of the answering side.
    pub process: (u32, u64),
    /// The nodes, each with its status or why there is none.
    pub nodes: Vec<(NodeId, Result<NodeStatus, String>)>,
    /// What a balancer knows of the cluster's control; a node says nothing.
    pub control: Option<Control>,
}

/// Who controls the cluster, and what is under way.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Control {
    /// The balancer that answers, a random number that it drew at its start.
    pub balancer: u64,
    /// How it gets nodes: `embedded`, `process`, `docker` or `none`.
    pub provisioner: String,
    /// The balancer that holds the controller's lease, as the system shard says.
    pub controller: Option<Controller>,
    /// How each node of the map fares as this balancer sees it.
    pub health: Vec<(NodeId, NodeHealth)>,
    /// Nodes that are wanted and not there yet, with what last went wrong.
    pub wanted: Vec<(String, Option<String>)>,
    /// Nodes that are of the cluster no more.
    pub gone: Vec<Gone>,
    /// What the controller did last, the newest last.
    pub events: Vec<Event>,
}

/// Whether a node is heard.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum NodeHealth {
    /// It answers.
    Up,
    /// Some beats went without an answer.
    Suspect,
    /// It has been silent for so long that it counts as lost.
    Down,
}

/// The holder of the controller's lease.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Controller {
    /// The balancer.
    pub balancer: u64,
    /// Its native listener.
    pub addr: String,
    /// Counts the holders.
    pub term: u64,
}

/// A node that is of the cluster no more.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Gone {
    /// Its identity; it is never taken in again.
    pub id: NodeId,
    /// The name that it had.
    pub name: String,
    /// By which name its provisioner knew it.
    pub instance: String,
    /// Why.
    pub reason: String,
    /// When, in seconds since 1970.
    pub at_unix_s: u64,
}

/// Something that the controller did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Event {
    /// When, in seconds since 1970.
    pub at_unix_s: u64,
    /// What.
    pub text: String,
}
