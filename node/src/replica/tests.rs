//! Whole groups of replicas in one thread, with messages that are lost and crashes that lose what was not synced.

use super::change::ChangeFailure;
use super::*;
use crate::disk::RealDisk;
use shkv_proto::NodeId;
use shkv_proto::message::{ChangeReplicas, Failure};
use std::collections::{BTreeMap, BTreeSet, VecDeque};

const SHARD: ShardId = ShardId(1);

struct Member {
    folder: tempfile::TempDir,
    log: Arc<Log>,
    replica: Replica,
    lazy: Option<Hard>,
}

struct Net {
    members: BTreeMap<u64, Member>,
    founders: Vec<ReplicaId>,
    messages: VecDeque<Outgoing>,
    /// Messages that were sent, by kind.
    sent: BTreeMap<u8, usize>,
    /// Nobody hears them, and they hear nobody.
    cut: BTreeSet<u64>,
    /// Nobody hears them.
    mute: BTreeSet<u64>,
    now: u64,
    luck: u64,
    /// Of a hundred messages, so many are lost.
    lost: u64,
}

fn ids(ids: &[u64]) -> Vec<ReplicaId> {
    ids.iter().copied().map(ReplicaId).collect()
}

impl Net {
    fn new(founders: &[u64], seed: u64) -> Self {
        let mut net = Self {
            members: BTreeMap::new(),
            founders: ids(founders),
            messages: VecDeque::new(),
            sent: BTreeMap::new(),
            cut: BTreeSet::new(),
            mute: BTreeSet::new(),
            now: 1,
            luck: seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1,
            lost: 0,
        };
        founders.iter().for_each(|id| net.add(*id));
        net
    }

    fn add(&mut self, id: u64) {
        let folder = tempfile::tempdir().expect("a folder");
        self.open(id, folder);
    }

    fn open(&mut self, id: u64, folder: tempfile::TempDir) {
        let disk = Arc::new(RealDisk(folder.path().to_owned()));
        let (log, mut recovered) = Log::open(disk, NodeId(id), 64 << 10).expect("a sound log");
        let log = Arc::new(log);
        let state = SnapshotHead {
            index: 0,
            term: 0,
            voters: self.founders.clone(),
            voters_outgoing: vec![],
            learners: vec![],
            learners_next: vec![],
            auto_leave: false,
        };
        let recovered = recovered.remove(&SHARD.0).unwrap_or_default();
        let replica = Replica::open(SHARD, ReplicaId(id), &log, recovered, state, self.now).expect("it fits its log");
        self.members.insert(id, Member { folder, log, replica, lazy: None });
    }

    /// What was not synced is lost.
    fn crash(&mut self, id: u64) {
        let Member { folder, .. } = self.members.remove(&id).expect("a member");
        self.open(id, folder);
    }

    fn at(&mut self, id: u64) -> &mut Replica {
        &mut self.members.get_mut(&id).expect("a member").replica
    }

    fn lucky(&mut self, of_hundred: u64) -> bool {
        self.luck ^= self.luck << 13;
        self.luck ^= self.luck >> 7;
        self.luck ^= self.luck << 17;
        self.luck % 100 < of_hundred
    }

    /// Lets one replica do all that it can do by itself.
    fn work(&mut self, id: u64) {
        let Some(member) = self.members.get_mut(&id) else { return };
        while let Some(output) = member.replica.output(self.now) {
            self.messages.extend(output.messages);
            match output.write {
                Some(write) if output.must_sync => {
                    let hard = write.hard.or(member.lazy.take());
                    member.log.append(&[ShardWrite { hard, ..write }]).expect("the disk works");
                }
                Some(write) => member.lazy = write.hard.or(member.lazy),
                None => {}
            }
            member.replica.persisted(output.number);
            self.messages.extend(output.after_write);
            for entry in &output.committed {
                if entry.kind != 0 {
                    member.replica.apply_configuration(entry).expect("a sound change");
                }
            }
            if let Some(last) = output.committed.last() {
                member.replica.applied_to(last.index, 4 << 10);
            }
        }
    }

    fn deliver(&mut self) {
        self.members.keys().copied().collect::<Vec<_>>().into_iter().for_each(|id| self.work(id));
        while let Some(message) = self.messages.pop_front() {
            let (from, to) = (message.head.from.0, message.head.to.0);
            *self.sent.entry(message.head.kind).or_default() += 1;
            let lost = self.lost;
            if self.cut.contains(&from) || self.cut.contains(&to) || self.mute.contains(&from) || self.lucky(lost) {
                continue;
            }
            let now = self.now;
            if let Some(member) = self.members.get_mut(&to)
                && member.replica.can_take(&message.head)
            {
                member.replica.step(&message.head, message.data, now);
                self.work(to);
            }
        }
    }

    fn tick(&mut self) {
        self.now += TICK.as_nanos() as u64;
        for member in self.members.values_mut() {
            member.replica.tick();
        }
        self.deliver();
    }

    fn until(&mut self, what: &str, mut so: impl FnMut(&mut Self) -> bool) {
        for _ in 0..1_000 {
            if so(self) {
                return;
            }
            self.tick();
        }
        let mut standing = Vec::new();
        for (id, member) in &mut self.members {
            let (bounds, committed) = (member.replica.log_bounds(), member.replica.committed());
            standing.push((
                *id,
                member.replica.leads(),
                member.replica.term(),
                bounds,
                committed,
                member.replica.group(),
            ));
        }
        panic!("it did not come to pass in 1000 ticks: {what}; {standing:#?}");
    }

    /// The leader that those who are not cut off follow.
    fn leader(&mut self) -> Option<u64> {
        let cut = self.cut.clone();
        let mut leading = self.members.iter().filter(|(id, member)| !cut.contains(id) && member.replica.leads());
        leading.next().map(|(id, _)| *id)
    }

    fn lead_by(&mut self, id: u64) {
        self.until("a leader", |net| net.leader().is_some());
        let leader = self.leader().expect("there is one");
        if leader != id {
            self.at(leader).transfer_to(ReplicaId(id));
            self.deliver();
        }
        self.until("the leadership is handed over", |net| net.leader() == Some(id));
    }

    fn change(&mut self, leader: u64, learn: &[u64], promote: &[u64], remove: &[u64]) {
        let learn: Vec<_> = learn.iter().map(|id| (ReplicaId(*id), NodeId(*id))).collect();
        let step = ChangeReplicas { from: vec![], learn, promote: ids(promote), remove: ids(remove) };
        self.until("the step is taken", |net| match net.at(leader).change(&step, &[]) {
            Ok(()) => true,
            Err(ChangeFailure::Failure(Failure::Busy { .. })) => false,
            Err(other) => panic!("{other:?}"),
        });
        self.work(leader);
    }

    fn has_voters(&mut self, leader: u64, voters: &[u64]) -> bool {
        let group = self.at(leader).group();
        group.is_some_and(|group| group.voters == ids(voters) && group.outgoing.is_empty())
    }
}

/// Brings a group of three, and two who learn, under the lead of the third.
fn five(seed: u64) -> Net {
    let mut net = Net::new(&[1, 2, 3], seed);
    net.lead_by(3);
    for id in [4, 5] {
        net.add(id);
        net.change(3, &[id], &[], &[]);
    }
    let last = |net: &mut Net, id: u64| net.at(id).log_bounds().1;
    net.until("the learners have the log", |net| last(net, 4) == last(net, 3) && last(net, 5) == last(net, 3));
    net
}

#[test]
fn a_step_that_is_told_to_hold_survives_a_crash_of_all_and_the_loss_of_one() {
    for seed in 0..60 {
        let mut net = five(seed);
        let lost = 10 + seed % 5 * 10;
        net.lost = lost;
        net.until("the step holds", |net| {
            // When nobody is lucky for long, everybody is lucky for once.
            net.lost = if net.lucky(20) { 0 } else { lost };
            let Some(leader) = net.leader() else { return false };
            let step = ChangeReplicas { from: vec![], learn: vec![], promote: ids(&[4, 5]), remove: ids(&[1, 2]) };
            if let Err(ChangeFailure::HandOver(heir)) = net.at(leader).change(&step, &[]) {
                net.at(leader).transfer_to(heir);
            }
            net.has_voters(leader, &[3, 4, 5])
        });
        // At this very moment the two who went are deleted, the power fails, and one does not come back.
        net.messages.clear();
        net.lost = 0;
        let gone = 3 + seed % 3;
        for id in [1, 2, gone] {
            net.members.remove(&id);
        }
        let left: Vec<_> = (3..=5).filter(|id| *id != gone).collect();
        left.iter().for_each(|id| net.crash(*id));
        net.until(&format!("one of {left:?} leads, seed {seed}"), |net| net.leader().is_some());
        let leader = net.leader().expect("there is one");
        net.until("it knows its group", |net| net.has_voters(leader, &[3, 4, 5]));
    }
}

#[test]
fn what_was_acknowledged_is_not_said_again_at_once() {
    let mut net = Net::new(&[1, 2, 3], 5);
    net.lead_by(1);
    net.until("the leader knows where it stands", |net| net.has_voters(1, &[1, 2, 3]));
    (0..20).for_each(|_| net.tick());
    net.sent.clear();
    for entry in 1..=10 {
        net.at(1).propose(b"x".to_vec()).expect("it leads");
        net.deliver();
        assert_eq!(net.sent.get(&APPEND), Some(&(2 * entry)), "one to each follower");
        assert_eq!(net.sent.get(&APPEND_RESPONSE), Some(&(2 * entry)), "and one back");
    }
    let last = net.at(1).log_bounds().1;
    assert_eq!([1, 2, 3].map(|id| net.at(id).committed()), [last, last - 1, last - 1]);
    net.tick();
    assert_eq!([1, 2, 3].map(|id| net.at(id).committed()), [last; 3], "they hear of the last one at the next tick");
    (0..40).for_each(|_| net.tick());
    net.at(1).raft.raft.bcast_append();
    net.deliver();
    net.sent.clear();
    for (later, answers) in [(ACKNOWLEDGED_AGAIN - 1, 0), (1, 2)] {
        net.now += later;
        net.at(1).raft.raft.bcast_append();
        net.deliver();
        let answered = net.sent.get(&APPEND_RESPONSE).copied().unwrap_or(0);
        assert_eq!(answered, answers, "after a while it may have been lost");
    }
}

/// Whoever changes the group waits for it.
#[test]
fn a_commit_that_somebody_waits_for_is_told_at_once() {
    let mut net = five(9);
    net.change(3, &[], &[4], &[1]);
    for _ in 0..10 {
        net.deliver(); // without a tick: what is applied lets the next step be sent
    }
    assert!(net.has_voters(3, &[2, 3, 4]));
}

#[test]
fn the_last_voter_knows_that_it_is_alone() {
    let mut net = Net::new(&[1, 2], 1);
    net.lead_by(2);
    net.change(2, &[], &[], &[1]);
    net.until("it is alone", |net| net.has_voters(2, &[2]));
    net.members.remove(&1);
    net.crash(2);
    net.until("it leads", |net| net.leader() == Some(2));
}

#[test]
fn a_leader_whose_vote_its_predecessor_took_stands_down() {
    let mut net = five(7);
    net.lead_by(1);
    net.until("the first knows where it stands", |net| net.has_voters(1, &[1, 2, 3]));
    // Only the second hears of the step that removes it, and the first is heard no more.
    (net.cut, net.mute) = ([3, 4, 5].into(), [2].into());
    net.change(1, &[], &[4], &[2]);
    net.deliver();
    assert_eq!(net.at(2).log_bounds().1, net.at(1).log_bounds().1);
    net.mute.clear();
    net.cut = [1, 4, 5].into();
    net.until("the second leads", |net| net.leader() == Some(2));
    net.cut = [1].into();
    net.until("another leads the new group", |net| {
        net.leader().is_some_and(|leader| leader != 2 && net.has_voters(leader, &[1, 3, 4]))
    });
    assert!(!net.at(2).leads() && !net.at(2).is_of_group());
    let leader = net.leader().expect("there is one");
    let mark = net.at(leader).propose(b"x".to_vec()).expect("it leads");
    net.until("it is committed", |net| net.at(leader).committed() >= mark.index);
}

#[test]
fn a_joint_configuration_ends_also_when_its_leader_does_not_live_to_see_it() {
    for ticks in 0..6 {
        let mut net = five(11 + ticks);
        net.change(3, &[], &[4, 5], &[1, 2]);
        net.lost = 50;
        (0..ticks).for_each(|_| net.tick());
        net.lost = 0;
        net.cut = [3].into();
        net.until("another ends it", |net| {
            net.leader().is_some_and(|leader| {
                // If the step was lost with its leader, the group is as it was.
                net.has_voters(leader, &[3, 4, 5]) || net.has_voters(leader, &[1, 2, 3])
            })
        });
    }
}

#[test]
fn a_lagging_replica_that_lost_its_vote_unseats_nobody() {
    let mut net = five(3);
    net.cut = [1].into();
    net.change(3, &[], &[4], &[1]);
    net.until("the step holds", |net| net.has_voters(3, &[2, 3, 4]));
    let term = net.at(3).term();
    (0..100).for_each(|_| net.tick()); // it stands for election all the time
    net.cut.clear();
    (0..100).for_each(|_| net.tick());
    assert_eq!((net.leader(), net.at(3).term()), (Some(3), term));
    assert!(!net.at(1).leads());
}

/// Raft counts on from what a snapshot says, and what stops it stops the node.
#[test]
fn a_snapshot_of_an_index_that_nobody_can_have_reached_is_not_taken() {
    let mut net = Net::new(&[1, 2, 3], 1);
    let announces = |index, term| RaftMessage {
        shard: SHARD,
        kind: SNAPSHOT,
        to: ReplicaId(1),
        from: ReplicaId(2),
        term: 1,
        log_term: 0,
        index: 0,
        commit: 0,
        commit_term: 0,
        reject: false,
        reject_hint: 0,
        request_snapshot: 0,
        context: vec![],
        priority: 0,
        stamp: 0,
        entries: vec![],
        snapshot: Some(SnapshotHead {
            index,
            term,
            voters: ids(&[1, 2, 3]),
            voters_outgoing: vec![],
            learners: vec![],
            learners_next: vec![],
            auto_leave: false,
        }),
    };
    let replica = net.at(1);
    assert!(replica.can_take(&announces(9, 1)));
    assert!(!replica.can_take(&announces(u64::MAX, 1)));
    assert!(!replica.can_take(&announces(9, u64::MAX)));
    replica.step(&announces(COUNTED_MAX, COUNTED_MAX), vec![], 1);
    assert!(replica.output(1).is_some_and(|output| output.snapshot.is_some()), "the highest is taken");
}
