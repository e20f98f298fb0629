//! Values of every message type, for property tests.

use proptest::collection::vec;
use proptest::option::of;
use proptest::prelude::*;
use shkv_proto::frame::{Frame, Header, VERSION};
use shkv_proto::limits::{DEADLINE_MS_MAX, Limits};
use shkv_proto::map::{KeyspaceInfo, NodeInfo, NodeState, Part, ReplicaInfo, ReplicaRole, ShardInfo};
use shkv_proto::message::{
    Admin, BatchDone, BatchOp, Beat, ChangeReplicas, Condition, Consistency, Control, Controller, CreateReplica,
    EntryHead, Event, Failure, Gone, GroupStatus, Hello, Join, MapDone, NewShard, NodeHealth, NodeStatus, RaftMessage,
    RefusalCode, ReplicaStatus, Role, RowHead, RowRead, Scan, ScanDone, SnapshotBegin, SnapshotHead, StatusDone, TxnId,
    Welcome, WriteId,
};
use shkv_proto::{ClusterId, Epoch, KeyspaceId, Kind, Map, NodeId, ReplicaId, ShardId};

/// Numbers of every length that a varint has.
pub fn number() -> impl Strategy<Value = u64> {
    prop_oneof![0..260_u64, 65_530..65_540_u64, any::<u64>(), Just(u64::MAX), any::<u32>().prop_map(u64::from)]
}

fn small() -> impl Strategy<Value = u32> {
    prop_oneof![0..260_u32, any::<u32>()]
}

/// Keys, bounds and other short bytes.
pub fn some_bytes() -> impl Strategy<Value = Vec<u8>> {
    vec(any::<u8>(), 0..40)
}

fn text() -> impl Strategy<Value = String> {
    ".{0,20}"
}

fn role() -> impl Strategy<Value = Role> {
    prop_oneof![Just(Role::Client), Just(Role::Balancer), number().prop_map(|n| Role::Node(NodeId(n)))]
}

/// A freshness.
pub fn consistency() -> impl Strategy<Value = Consistency> {
    prop_oneof![
        Just(Consistency::Linearizable),
        number().prop_map(|revision| Consistency::Causal { revision }),
        Just(Consistency::Eventual)
    ]
}

/// An opening.
pub fn hello() -> impl Strategy<Value = Hello> {
    (small(), any::<u8>(), any::<u8>(), of(any::<u128>()), role()).prop_map(
        |(magic, version_min, version_max, cluster, role)| Hello {
            magic,
            version_min,
            version_max,
            cluster: cluster.map(ClusterId),
            role,
        },
    )
}

/// Its answer.
pub fn welcome() -> impl Strategy<Value = Welcome> {
    (any::<u8>(), of(any::<u128>()), role(), text(), small()).prop_map(
        |(version, cluster, role, name, key_bytes_max)| {
            let limits = Limits { key_bytes_max, ..Limits::OURS };
            Welcome { version, cluster: cluster.map(ClusterId), role, name, limits }
        },
    )
}

/// A scan.
pub fn scan() -> impl Strategy<Value = Scan> {
    let with = vec(small().prop_map(ShardId), 0..4);
    (small(), some_bytes(), of(some_bytes()), any::<(bool, bool)>(), (small(), small()), consistency(), with).prop_map(
        |(keyspace, start, end, (reverse, keys_only), (rows_max, bytes_max), consistency, with)| Scan {
            keyspace: KeyspaceId(keyspace),
            start,
            end,
            reverse,
            keys_only,
            rows_max,
            bytes_max,
            consistency,
            with,
        },
    )
}

/// A page.
pub fn scan_done() -> impl Strategy<Value = ScanDone> {
    let row = (some_bytes(), number(), small()).prop_map(|(key, version, value_bytes)| RowHead {
        key: key.into(),
        version,
        value_bytes,
    });
    (vec(row, 0..20), of(some_bytes()), number(), vec(number(), 0..4))
        .prop_map(|(rows, next, revision, with)| ScanDone { rows, next, revision, with })
}

/// Keys of a batch's operations, each with its value's length if it is a put.
pub fn batch_ops() -> impl Strategy<Value = Vec<(Vec<u8>, Option<u32>)>> {
    vec((some_bytes(), of(small())), 0..20)
}

/// By what a write is known.
pub fn write_id() -> impl Strategy<Value = WriteId> {
    (number(), number(), number(), small()).prop_map(|(client, sequence, answered, age_ms)| WriteId {
        client,
        sequence,
        answered,
        age_ms,
    })
}

/// A transaction.
pub fn txn_id() -> impl Strategy<Value = TxnId> {
    (small(), number(), number()).prop_map(|(shard, term, number)| TxnId { shard: ShardId(shard), term, number })
}

/// The answer to a batch.
pub fn batch_done() -> impl Strategy<Value = BatchDone> {
    let revision = (small(), number()).prop_map(|(shard, revision)| (ShardId(shard), revision));
    let row = of((number(), small()).prop_map(|(version, value_bytes)| RowRead { version, value_bytes }));
    (small(), vec(revision, 0..4), vec(row, 0..4)).prop_map(|(removed, revisions, rows)| BatchDone {
        removed,
        revisions,
        rows,
    })
}

/// The operation that one of [`batch_ops`] stands for.
pub fn batch_op((key, put): &(Vec<u8>, Option<u32>)) -> BatchOp<'_> {
    match put {
        Some(value_bytes) => BatchOp::Put { key, value_bytes: *value_bytes, condition: Condition::Value(key) },
        None => BatchOp::Delete { key, condition: Condition::Absent },
    }
}

fn part() -> impl Strategy<Value = Part> {
    prop_oneof![
        (some_bytes(), of(some_bytes())).prop_map(|(start, end)| Part::Range { start, end }),
        (number(), number()).prop_map(|(low, high)| Part::Hash { low, high })
    ]
}

/// A map; most are not sound.
pub fn map() -> impl Strategy<Value = Map> {
    let keyspace =
        (small(), text(), small()).prop_map(|(id, name, replicas)| KeyspaceInfo { id: KeyspaceId(id), name, replicas });
    let parts = (vec(node_info(), 0..4), vec(keyspace, 0..4), vec(shard_info(), 0..4), (small(), small()));
    (any::<u128>(), number(), parts).prop_map(
        |(cluster, epoch, (nodes, keyspaces, shards, (next_shard, next_keyspace)))| Map {
            cluster: ClusterId(cluster),
            epoch: Epoch(epoch),
            nodes,
            keyspaces,
            shards,
            next_shard: ShardId(next_shard),
            next_keyspace: KeyspaceId(next_keyspace),
        },
    )
}

fn node_info() -> impl Strategy<Value = NodeInfo> {
    let state = prop_oneof![
        Just(NodeState::Joining),
        Just(NodeState::Up),
        Just(NodeState::Draining),
        Just(NodeState::Leaving),
        number().prop_map(|by| NodeState::Replaced(NodeId(by)))
    ];
    (number(), (text(), text(), text(), text()), of(text()), small(), state).prop_map(
        |(id, (name, addr, domain, instance), addr_outside, capacity, state)| NodeInfo {
            id: NodeId(id),
            name,
            addr,
            addr_outside,
            domain,
            capacity,
            instance,
            state,
        },
    )
}

fn shard_info() -> impl Strategy<Value = ShardInfo> {
    let role = prop_oneof![Just(ReplicaRole::Voter), Just(ReplicaRole::Learner), Just(ReplicaRole::Leaving)];
    let replica = (number(), number(), role).prop_map(|(id, node, role)| ReplicaInfo {
        id: ReplicaId(id),
        node: NodeId(node),
        role,
    });
    (small(), small(), part(), vec(replica, 0..4), (small(), number()), vec(text(), 0..3)).prop_map(
        |(id, keyspace, part, replicas, (founders, next_replica), pinned)| ShardInfo {
            id: ShardId(id),
            keyspace: KeyspaceId(keyspace),
            part,
            replicas,
            founders,
            next_replica: ReplicaId(next_replica),
            pinned,
        },
    )
}

/// A map that is sound: its shards cover their keyspace.
pub fn sound_map() -> impl Strategy<Value = Map> {
    (1..20_u32, 1..6_u64, any::<bool>()).prop_map(|(shards, nodes, by_hash)| {
        let parts = if by_hash { Part::hash_split(shards) } else { vec![Part::everything()] };
        let next_shard = ShardId(parts.len() as u32 + 1);
        let homes: Vec<NodeId> = (1..=nodes).map(NodeId).collect();
        let shard = |(id, part)| ShardInfo::founded(ShardId(id), KeyspaceId(1), part, &homes);
        Map {
            epoch: Epoch(1),
            nodes: homes.iter().map(|id| NodeInfo::new(*id, format!("Server{id}"), "")).collect(),
            keyspaces: vec![KeyspaceInfo { id: KeyspaceId(1), name: "default".into(), replicas: 3 }],
            shards: (1..).zip(parts).map(shard).collect(),
            next_shard,
            next_keyspace: KeyspaceId(2),
            ..Map::empty(ClusterId(1))
        }
    })
}

/// The answer with a map.
pub fn map_done() -> impl Strategy<Value = MapDone> {
    let leader = (small(), number()).prop_map(|(shard, node)| (ShardId(shard), NodeId(node)));
    (prop_oneof![map(), sound_map()], vec(leader, 0..5)).prop_map(|(map, leaders)| MapDone { map, leaders })
}

fn homes() -> impl Strategy<Value = Vec<(ReplicaId, NodeId)>> {
    vec((number(), number()).prop_map(|(replica, node)| (ReplicaId(replica), NodeId(node))), 0..5)
}

/// A replica to make.
pub fn create_replica() -> impl Strategy<Value = CreateReplica> {
    let founders = vec(number().prop_map(ReplicaId), 0..5);
    (any::<u128>(), small(), small(), part(), number(), (founders, homes()), any::<bool>()).prop_map(
        |(cluster, shard, keyspace, part, replica, (founders, homes), campaign)| CreateReplica {
            cluster: ClusterId(cluster),
            shard: ShardId(shard),
            keyspace: KeyspaceId(keyspace),
            part,
            replica: ReplicaId(replica),
            founders,
            homes,
            campaign,
        },
    )
}

/// A heartbeat.
pub fn beat() -> impl Strategy<Value = Beat> {
    let addr = (number(), text()).prop_map(|(node, addr)| (NodeId(node), addr));
    (vec(addr, 0..4), of(map()), of(text())).prop_map(|(addrs, map, retired)| Beat { addrs, map, retired })
}

/// A registration.
pub fn join() -> impl Strategy<Value = Join> {
    (of(any::<u128>()), node_info()).prop_map(|(cluster, node)| Join {
        cluster: cluster.map(ClusterId),
        id: node.id,
        name: node.name,
        addr: node.addr,
        addr_outside: node.addr_outside,
        domain: node.domain,
        capacity: node.capacity,
        instance: node.instance,
    })
}

/// A step of a group.
pub fn change_replicas() -> impl Strategy<Value = ChangeReplicas> {
    let ids = || vec(number().prop_map(ReplicaId), 0..4);
    (ids(), homes(), ids(), ids()).prop_map(|(from, learn, promote, remove)| ChangeReplicas {
        from,
        learn,
        promote,
        remove,
    })
}

/// A wish of an operator.
pub fn admin() -> impl Strategy<Value = Admin> {
    let new_shard = || (part(), vec(text(), 0..3)).prop_map(|(part, pinned)| NewShard { part, pinned });
    prop_oneof![
        (small(), vec(text(), 0..3)).prop_map(|(count, names)| Admin::AddNodes { count, names }),
        (small(), vec(text(), 0..3)).prop_map(|(count, names)| Admin::RemoveNodes { count, names }),
        (text(), any::<bool>()).prop_map(|(node, drain)| Admin::Drain { node, drain }),
        (small(), text()).prop_map(|(shard, node)| Admin::Transfer { shard: ShardId(shard), node }),
        (text(), small(), vec(new_shard(), 0..3)).prop_map(|(name, replicas, shards)| Admin::CreateKeyspace {
            name,
            replicas,
            shards
        }),
        text().prop_map(|name| Admin::DropKeyspace { name }),
        (small(), vec(text(), 0..3)).prop_map(|(shard, nodes)| Admin::Pin { shard: ShardId(shard), nodes }),
        (text(), vec(small().prop_map(ShardId), 0..3), vec(new_shard(), 0..3))
            .prop_map(|(keyspace, remove, shards)| Admin::Recut { keyspace, remove, shards }),
    ]
}

fn control() -> impl Strategy<Value = Control> {
    let controller =
        (number(), text(), number()).prop_map(|(balancer, addr, term)| Controller { balancer, addr, term });
    let health = prop_oneof![Just(NodeHealth::Up), Just(NodeHealth::Suspect), Just(NodeHealth::Down)];
    let gone = (number(), text(), text(), text(), number()).prop_map(|(id, name, instance, reason, at_unix_s)| Gone {
        id: NodeId(id),
        name,
        instance,
        reason,
        at_unix_s,
    });
    let event = (number(), text()).prop_map(|(at_unix_s, text)| Event { at_unix_s, text });
    let lists = (vec((number().prop_map(NodeId), health), 0..3), vec((text(), of(text())), 0..3));
    (number(), text(), of(controller), lists, vec(gone, 0..3), vec(event, 0..3)).prop_map(
        |(balancer, provisioner, controller, (health, wanted), gone, events)| Control {
            balancer,
            provisioner,
            controller,
            health,
            wanted,
            gone,
            events,
        },
    )
}

/// What a node says of a replica.
pub fn replica_status() -> impl Strategy<Value = ReplicaStatus> {
    let ids = (small(), number(), any::<bool>(), of(number()));
    let replicas = || vec(number().prop_map(ReplicaId), 0..3);
    let matched = vec((number().prop_map(ReplicaId), number()), 0..3);
    let group = (replicas(), replicas(), replicas(), matched)
        .prop_map(|(voters, outgoing, learners, matched)| GroupStatus { voters, outgoing, learners, matched });
    (ids, vec(number(), 8), of(group)).prop_map(|((shard, replica, leads, leader), numbers, group)| ReplicaStatus {
        shard: ShardId(shard),
        replica: ReplicaId(replica),
        leads,
        leader: leader.map(ReplicaId),
        term: numbers[0],
        committed: numbers[1],
        applied: numbers[2],
        flushed: numbers[3],
        log_first: numbers[4],
        log_last: numbers[5],
        revision: numbers[6],
        snapshots_installed: numbers[7],
        group,
    })
}

/// What a node says of itself.
pub fn node_status() -> impl Strategy<Value = NodeStatus> {
    let ids = (number(), text(), of(any::<u128>()), small(), any::<bool>());
    (ids, vec(number(), 6), vec(replica_status(), 0..4)).prop_map(
        |((id, name, cluster, process, disk_full), numbers, replicas)| NodeStatus {
            id: NodeId(id),
            name,
            cluster: cluster.map(ClusterId),
            process,
            cpu_us: numbers[0],
            epoch: Epoch(numbers[1]),
            table_bytes: numbers[2],
            log_bytes: numbers[3],
            disk_free_bytes: numbers[4],
            disk_full,
            log_syncs: numbers[5],
            replicas,
        },
    )
}

/// The answer with them.
pub fn status_done() -> impl Strategy<Value = StatusDone> {
    let node = (number(), prop_oneof![node_status().prop_map(Ok), text().prop_map(Err)]);
    let nodes = vec(node.prop_map(|(id, status)| (NodeId(id), status)), 0..3);
    (of(map()), (small(), number()), nodes, of(control())).prop_map(|(map, process, nodes, control)| StatusDone {
        map,
        process,
        nodes,
        control,
    })
}

fn snapshot_head() -> impl Strategy<Value = SnapshotHead> {
    let ids = || vec(number().prop_map(ReplicaId), 0..4);
    (number(), number(), ids(), ids(), ids(), ids(), any::<bool>()).prop_map(
        |(index, term, voters, voters_outgoing, learners, learners_next, auto_leave)| SnapshotHead {
            index,
            term,
            voters,
            voters_outgoing,
            learners,
            learners_next,
            auto_leave,
        },
    )
}

/// A Raft message.
pub fn raft_message() -> impl Strategy<Value = RaftMessage> {
    let entry = (any::<u8>(), number(), number(), small()).prop_map(|(kind, term, index, data_bytes)| EntryHead {
        kind,
        term,
        index,
        data_bytes,
    });
    let rest = (some_bytes(), any::<i64>(), vec(entry, 0..6), of(snapshot_head()));
    (small(), any::<u8>(), any::<bool>(), vec(number(), 10), rest).prop_map(
        |(shard, kind, reject, numbers, (context, priority, entries, snapshot))| RaftMessage {
            shard: ShardId(shard),
            kind,
            to: ReplicaId(numbers[0]),
            from: ReplicaId(numbers[1]),
            term: numbers[2],
            log_term: numbers[3],
            index: numbers[4],
            commit: numbers[5],
            commit_term: numbers[6],
            reject,
            reject_hint: numbers[7],
            request_snapshot: numbers[8],
            context,
            priority,
            stamp: numbers[9],
            entries,
            snapshot,
        },
    )
}

/// The beginning of a snapshot stream.
pub fn snapshot_begin() -> impl Strategy<Value = SnapshotBegin> {
    (raft_message(), number(), small(), part(), homes()).prop_map(|(message, revision, keyspace, part, homes)| {
        SnapshotBegin { message, revision, keyspace: KeyspaceId(keyspace), part, homes }
    })
}

/// A failure.
pub fn failure() -> impl Strategy<Value = Failure> {
    let codes = prop_oneof![Just(RefusalCode::Malformed), Just(RefusalCode::Conflict), Just(RefusalCode::DiskFull)];
    prop_oneof![
        (codes, text()).prop_map(|(code, text)| Failure::Refusal { code, text }),
        of(number()).prop_map(|hint| Failure::NotLeader { hint: hint.map(NodeId) }),
        number().prop_map(|epoch| Failure::WrongShard { epoch: Epoch(epoch) }),
        (small(), text()).prop_map(|(retry_after_ms, text)| Failure::Busy { retry_after_ms, text }),
        number().prop_map(|revision| Failure::Behind { revision }),
        (small(), of(number())).prop_map(|(operation, version)| Failure::Condition { operation, version }),
        text().prop_map(|text| Failure::Unknown { text }),
        text().prop_map(|text| Failure::Aborted { text })
    ]
}

/// A frame of any kind with any head.
pub fn frame() -> impl Strategy<Value = Frame> {
    let ids = (any::<u32>(), number(), number(), 0..=DEADLINE_MS_MAX);
    let parts = (vec(any::<u8>(), 0..80), vec(any::<u8>(), 0..200));
    (proptest::sample::select(Kind::ALL), ids, parts).prop_map(
        |(kind, (shard, epoch, request, deadline_ms), (head, tail))| {
            let header =
                Header { kind, version: VERSION, shard: ShardId(shard), epoch: Epoch(epoch), request, deadline_ms };
            Frame::new(header, head, tail)
        },
    )
}
