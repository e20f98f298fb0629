//! Stories of the played cluster of [`super::model`], each with requests that are lost or come late; and for each guard
//! of the planner a script that needs it.

use super::model::{Model, Place, join_of, node};
use super::*;
use crate::control::wishes;
use shkv_proto::map::Part;
use shkv_proto::message::{Failure, Join, NewShard, RefusalCode};

#[test]
fn three_nodes_become_six_and_three_again_with_no_more_moves_than_needed() {
    for seed in 1..=8 {
        let mut model = Model::new(3, 24, 3);
        model.chance = seed;
        model.settle();
        assert_eq!(model.made_since(&model.state.map.clone()), 0);
        let three = model.state.map.clone();
        for n in 4..=6 {
            model.join(n, &format!("Server{n}"), "").unwrap();
        }
        model.settle();
        model.assert_even(0.3);
        let made = model.made_since(&three);
        assert!((36..=42).contains(&made), "seed {seed}: {made} of 75 replicas moved, half belong to the new nodes");

        let six = model.state.map.clone();
        model.remove(&["Server1", "Server2", "Server3"]);
        model.settle();
        assert_eq!(model.state.map.nodes.len(), 3);
        assert_eq!(model.state.gone.len(), 3);
        model.assert_even(0.3);
        let made = model.made_since(&six);
        assert!(made <= 42, "seed {seed}: {made} of 75 replicas moved, about half were on the nodes that left");
    }
}

#[test]
fn a_cluster_grows_from_one_node_to_three_copies_and_shrinks_with_its_nodes() {
    for seed in 1..=8 {
        let mut model = Model::new(1, 4, 3);
        (model.chance, model.floor) = (seed, 1);
        model.settle();
        model.join(2, "Server2", "").unwrap();
        model.settle();
        model.join(3, "Server3", "").unwrap();
        model.settle();
        assert!(model.state.map.shards.iter().all(|shard| shard.replicas.len() == 3));
        model.remove(&["Server1"]);
        model.settle();
        model.remove(&["Server3"]);
        model.settle();
        assert!(model.state.map.shards.iter().all(|shard| shard.replicas.len() == 1));
        assert_eq!(model.state.map.nodes.len(), 1);
    }
}

#[test]
fn a_single_copy_moves_to_another_node_without_ever_being_gone() {
    for seed in 1..=20 {
        let mut model = Model::new(2, 6, 1);
        (model.chance, model.floor) = (seed, 1);
        model.settle();
        model.wish(|state, seen| wishes::drain(state, seen, "Server1", true)).unwrap();
        model.settle();
        assert_eq!(model.kept()[&node(1)], 0, "seed {seed}");
        model.wish(|state, seen| wishes::drain(state, seen, "Server1", false)).unwrap();
        model.settle();
        assert!(model.kept()[&node(1)] > 0, "seed {seed}: it is used again");
    }
}

#[test]
fn nodes_that_die_while_replicas_move_to_them_hold_nothing_up() {
    for seed in 1..=40 {
        let mut model = Model::new(5, 12, 3);
        model.chance = seed;
        model.settle();
        model.join(6, "Server6", "").unwrap();
        model.join(7, "Server7", "").unwrap();
        model.remove(&["Server1"]);
        for _ in 0..(20 + 7 * seed) {
            model.step();
        }
        model.pass();
        model.kill(node(6));
        model.settle();
        assert_eq!(model.kept()[&node(6)], 0, "seed {seed}: what it was to keep is kept by others");
        model.revive(node(6));
        model.settle();
        assert!(model.kept()[&node(6)] > 0, "seed {seed}: it may come back");
        model.assert_even(0.3);
    }
}

#[test]
fn operators_who_change_their_minds_and_nodes_that_come_and_go_cost_no_copy() {
    for seed in 1..=60 {
        let mut model = Model::new(6, 6, 3);
        model.chance = seed;
        model.settle();
        for _ in 0..25 {
            let one = 1 + model.any(6) as u64;
            let name = format!("Server{one}");
            match model.any(4) {
                0 => {
                    let drained = model.state.map.nodes.iter().filter(|node| node.state == NodeState::Draining).count();
                    if drained < 2 {
                        let _ = model.wish(|state, seen| wishes::drain(state, seen, &name, true));
                    }
                }
                1 => {
                    let _ = model.wish(|state, seen| wishes::drain(state, seen, &name, false));
                }
                2 => {
                    // One at a time, so that no group loses its quorum by it.
                    let lost: Vec<NodeId> =
                        model.places.iter().filter(|(_, place)| !place.live).map(|(id, _)| *id).collect();
                    lost.iter().for_each(|id| model.revive(*id));
                    let others = model.groups.clone();
                    let is_needed = others.iter().any(|(shard, group)| {
                        let mut without = model.clone();
                        without.kill(node(one));
                        !without.is_majority(*shard, group, &group.voters)
                    });
                    if !is_needed {
                        model.kill(node(one));
                    }
                }
                _ => {}
            }
            let count = model.any(30);
            model.steps(count);
        }
        (1..=6).for_each(|n| model.revive(node(n)));
        for n in 1..=6 {
            let _ = model.wish(|state, seen| wishes::drain(state, seen, &format!("Server{n}"), false));
        }
        model.settle();
        model.assert_even(0.3);
    }
}

#[test]
fn a_lost_node_without_a_provisioner_is_done_without_if_there_are_enough_others() {
    let mut model = Model::new(4, 8, 3);
    model.settle();
    model.kill(node(2));
    model.settle();
    assert_eq!(model.kept()[&node(2)], 0);
    assert!(model.state.map.node(node(2)).is_some(), "it stays a member");

    let mut model = Model::new(3, 8, 3);
    model.settle();
    let before = model.state.map.shards.clone();
    model.kill(node(2));
    model.settle();
    assert_eq!(model.state.map.shards, before, "nobody is left to take its copies, and it may come back");
}

#[test]
fn a_lost_node_is_replaced_by_a_new_one_of_its_name() {
    for seed in 1..=20 {
        let mut model = Model::new(3, 8, 3);
        (model.chance, model.can_start) = (seed, true);
        model.instances = (1..=3).map(|n| (format!("Server{n}"), true)).collect();
        model.settle();
        let before = model.state.map.clone();
        model.kill(node(2));
        model.settle();
        let map = &model.state.map;
        assert_eq!(map.nodes.len(), 3);
        let new = map.nodes.iter().find(|node| node.name == "Server2").unwrap();
        assert_ne!(new.id, node(2));
        assert_eq!((new.instance.as_str(), new.state), ("Server2.2", NodeState::Up));
        assert!(model.state.gone.iter().any(|gone| gone.id == node(2) && gone.reason.contains("replaced by")));
        assert_eq!(model.made_since(&before), 9, "seed {seed}: only what the lost one kept");
        assert!(!model.instances.contains_key("Server2"), "what is left of it is removed");
        assert!(model.state.wanted.is_empty());
    }
}

#[test]
fn a_node_that_was_replaced_serves_with_its_replicas_until_they_have_moved() {
    let mut model = Model::new(3, 8, 3);
    model.can_start = true;
    model.instances = (1..=3).map(|n| (format!("Server{n}"), true)).collect();
    model.settle();
    model.kill(node(2));
    let is_replaced =
        |model: &Model| model.state.map.node(node(2)).is_some_and(|node| matches!(node.state, NodeState::Replaced(_)));
    while !is_replaced(&model) {
        model.step();
        model.pass();
    }
    model.join(2, "Server2", "Server2").unwrap();
    assert!(is_replaced(&model), "its place is taken all the same");
    model.revive(node(2));
    model.settle();
    assert!(model.state.map.node(node(2)).is_none());
    let refused = model.join(2, "Server2", "Server2").unwrap_err();
    assert!(matches!(refused, Failure::Refusal { code: RefusalCode::Retired, .. }), "{refused}");
}

#[test]
fn a_node_that_comes_back_before_the_new_one_needs_no_replacement() {
    let mut model = Model::new(3, 8, 3);
    model.can_start = true;
    model.instances = (1..=3).map(|n| (format!("Server{n}"), true)).collect();
    model.settle();
    model.kill(node(2));
    while model.state.wanted.is_empty() {
        model.pass();
        let plan = plan(&model.state, &model.seen());
        model.write(plan.after);
    }
    model.revive(node(2));
    model.pass();
    model.instances.insert("Server2.2".into(), true); // it was just started
    model.settle();
    assert!(model.state.wanted.is_empty());
    assert!(!model.instances.contains_key("Server2.2"), "and is removed again");
    assert_eq!(model.state.map.nodes.len(), 3);
    assert!(model.state.map.node(node(2)).is_some());
}

#[test]
fn a_wish_that_is_taken_back_leaves_no_instance() {
    let mut model = Model::new(3, 4, 3);
    model.can_start = true;
    model.settle();
    let names = vec!["Berlin".to_owned()];
    model.wish(|state, seen| wishes::add(state, seen, 1, &names, || unreachable!("it has a name"))).unwrap();
    model.instances.insert("Berlin".into(), true); // started, and not joined yet
    model.remove(&["Berlin"]);
    let refused = model.join(9, "Berlin", "Berlin").unwrap_err();
    assert!(refused.to_string().contains("wanted no more"), "{refused}");
    model.settle();
    assert!(model.state.wanted.is_empty() && !model.instances.contains_key("Berlin"));
    assert_eq!(model.state.map.nodes.len(), 3);
}

#[test]
fn replicas_of_a_shard_are_in_different_domains_where_that_can_be() {
    let mut model = Model::new(3, 12, 3);
    for info in &mut model.state.map.nodes {
        info.domain = "a".into();
    }
    model.settle();
    for (n, domain) in [(4, "b"), (5, "b"), (6, "c"), (7, "c")] {
        let name = format!("Server{n}");
        let join = Join { domain: domain.into(), ..join_of(node(n), &name, "") };
        model.wish(|state, seen| wishes::join(state, seen, &join)).unwrap();
        model.places.insert(node(n), Place { live: true, ..Place::default() });
    }
    model.settle();
    let map = &model.state.map;
    for shard in &map.shards {
        let domains: BTreeSet<&str> =
            shard.replicas.iter().map(|home| map.node(home.node).unwrap().domain.as_str()).collect();
        assert_eq!(domains.len(), 3, "shard {}", shard.id);
    }
}

#[test]
fn a_node_keeps_as_much_as_it_takes() {
    let mut model = Model::new(3, 40, 2);
    model.floor = 2;
    for (info, capacity) in model.state.map.nodes.iter_mut().zip([100, 100, 200]) {
        info.capacity = capacity;
    }
    model.settle();
    let kept = model.kept();
    // 40 shards of 2 and the system shard of 3: 83 replicas, of which half go to the third, which can keep 41 at most.
    assert!((19..=23).contains(&kept[&node(1)]) && (39..=41).contains(&kept[&node(3)]), "{kept:?}");
}

#[test]
fn pinned_shards_stay_on_their_nodes_while_those_are_up_and_come_back_to_them() {
    let mut model = Model::new(5, 4, 3);
    model.settle();
    let pinned = vec!["Server2".to_owned(), "Server4".to_owned()];
    let shards = [NewShard { part: Part::everything(), pinned }];
    model.floor = 0; // the new group begins with nobody
    model.wish(|state, seen| wishes::create_keyspace(state, seen, "pinned", 3, &shards)).unwrap();
    model.settle();
    let homes = |model: &Model| -> BTreeSet<NodeId> {
        let shard = model.state.map.shards.last().unwrap();
        shard.replicas.iter().map(|home| home.node).collect()
    };
    let at_home = BTreeSet::from([node(2), node(4)]);
    assert_eq!(homes(&model), at_home);
    model.wish(|state, seen| wishes::drain(state, seen, "Server4", true)).unwrap();
    model.settle();
    assert!(homes(&model).contains(&node(2)) && homes(&model).len() == 2 && !homes(&model).contains(&node(4)));
    model.wish(|state, seen| wishes::drain(state, seen, "Server4", false)).unwrap();
    model.settle();
    assert_eq!(homes(&model), at_home);
}

#[test]
fn a_shard_that_is_pinned_elsewhere_moves_there_and_ranges_are_cut_anew() {
    let mut model = Model::new(4, 2, 3);
    model.settle();
    model.floor = 0; // the new groups begin with nobody
    let pins = |names: &[&str]| names.iter().map(ToString::to_string).collect::<Vec<_>>();
    let all = [NewShard { part: Part::everything(), pinned: pins(&["Server1"]) }];
    model.wish(|state, seen| wishes::create_keyspace(state, seen, "rows", 3, &all)).unwrap();
    model.settle();
    let first = model.state.map.shards.last().unwrap().id;
    model.wish(|state, _| wishes::pin(state, first, &pins(&["Server2", "Server3"]))).unwrap();
    model.settle();
    let homes = |model: &Model, shard| -> BTreeSet<NodeId> {
        model.state.map.shard(shard).unwrap().replicas.iter().map(|home| home.node).collect()
    };
    assert_eq!(homes(&model, first), BTreeSet::from([node(2), node(3)]));
    assert!(model.wish(|state, _| wishes::pin(state, first, &pins(&["Nobody"]))).is_err());
    assert!(model.wish(|state, _| wishes::pin(state, ShardId::SYSTEM, &[])).is_err());

    let range = |start: &[u8], end: Option<&[u8]>| Part::Range { start: start.to_vec(), end: end.map(<[u8]>::to_vec) };
    let new = |part, names: &[&str]| NewShard { part, pinned: pins(names) };
    let halves = [new(range(b"", Some(b"m")), &["Server4"]), new(range(b"m", None), &[])];
    let gap = [halves[0].clone()];
    assert!(model.wish(|state, seen| wishes::recut(state, seen, "rows", &[first], &gap)).is_err(), "it leaves a gap");
    assert!(model.wish(|state, seen| wishes::recut(state, seen, "rows", &[ShardId(1)], &halves)).is_err());
    model.wish(|state, seen| wishes::recut(state, seen, "rows", &[first], &halves)).unwrap();
    model.settle();
    assert!(model.state.map.shard(first).is_none());
    let id = model.state.map.keyspace("rows").unwrap().id;
    let shards: Vec<ShardId> = model.state.map.shards_of(id).map(|shard| shard.id).collect();
    assert_eq!(homes(&model, shards[0]), BTreeSet::from([node(4)]));
    assert_eq!(homes(&model, shards[1]).len(), 3);
}

#[test]
fn the_replicas_of_a_dropped_keyspace_are_deleted_also_on_nodes_that_were_away() {
    let mut model = Model::new(3, 2, 3);
    model.settle();
    let shards = Part::hash_split(4).into_iter().map(|part| NewShard { part, pinned: vec![] }).collect::<Vec<_>>();
    model.wish(|state, seen| wishes::create_keyspace(state, seen, "short", 3, &shards)).unwrap();
    model.settle();
    assert_eq!(model.kept()[&node(3)], 7);
    model.kill(node(3));
    model.wish(|state, _| wishes::drop_keyspace(state, "short")).unwrap();
    model.settle();
    model.revive(node(3));
    model.settle();
    assert!(model.places.values().all(|place| place.replicas.len() == 3));
}

#[test]
fn leaderships_are_evened_out_and_then_left_alone() {
    let mut model = Model::new(3, 9, 3);
    model.settle();
    let leads = |model: &Model| {
        let mut counts = BTreeMap::from([(node(1), 0), (node(2), 0), (node(3), 0)]);
        for group in model.groups.values() {
            *counts.get_mut(&group.homes[&group.leader.unwrap()]).unwrap() += 1;
        }
        counts
    };
    let is_even = |counts: &BTreeMap<NodeId, i32>| counts.values().max().unwrap() - counts.values().min().unwrap() <= 1;
    assert!(is_even(&leads(&model)), "{:?}", leads(&model));
    model.kill(node(1));
    for _ in 0..6 {
        model.pass(); // long enough to lose what it led, not to lose what it keeps
    }
    model.revive(node(1));
    model.pass();
    assert_eq!(leads(&model)[&node(1)], 0);
    model.settle();
    assert!(is_even(&leads(&model)), "{:?}", leads(&model));
    let moved = model.transfers;
    model.settle();
    assert_eq!(model.transfers, moved);
}

#[test]
fn a_hundred_nodes_lose_ten_and_everything_is_whole_again() {
    let mut model = Model::new(100, 100, 3);
    model.settle();
    let before = model.state.map.clone();
    let mut lost: BTreeSet<NodeId> = BTreeSet::new();
    for info in &before.nodes {
        let shares = |shard: &ShardInfo| shard.replicas.iter().any(|home| lost.contains(&home.node));
        let is_alone = before.shards.iter().all(|shard| shard.replica_on(info.id).is_none() || !shares(shard));
        if is_alone && lost.len() < 10 {
            lost.insert(info.id); // no shard loses its quorum
        }
    }
    assert_eq!(lost.len(), 10);
    let all = before.shards.iter().flat_map(|shard| &shard.replicas).filter(|home| lost.contains(&home.node)).count();
    lost.iter().for_each(|id| model.kill(*id));
    model.settle();
    assert!(model.kept().iter().all(|(id, count)| !lost.contains(id) || *count == 0));
    let made = model.made_since(&before);
    assert!(made >= all as u64 && made <= all as u64 + 10, "{made} replicas were made for {all}");
}

/// The steps that are next.
fn next(model: &Model) -> Vec<Step> {
    plan(&model.state, &model.seen()).steps
}

#[test]
fn a_replica_that_its_group_still_has_is_not_deleted() {
    let mut model = Model::new(4, 2, 3);
    model.settle();
    let shard = model.state.map.shards[1].id;
    let home = model.state.map.shards[1].replicas.pop().unwrap();
    let steps = next(&model);
    assert!(!steps.contains(&Step::Remove(shard, home.node, home.id)), "{steps:?}");
    let leaves =
        |step: &Step| matches!(step, Step::Change(id, _, change) if *id == shard && change.remove == [home.id]);
    assert!(steps.iter().any(leaves) || steps.iter().any(|step| matches!(step, Step::Transfer(..))), "{steps:?}");
    model.floor = 2;
    model.settle();
    assert_eq!(model.state.map.shard(shard).unwrap().replicas.len(), 3, "and another one is made");
}

#[test]
fn a_replica_of_the_map_that_its_group_does_not_have_is_made_anew_under_another_id() {
    let mut model = Model::new(3, 2, 3);
    model.settle();
    let shard = model.state.map.shards[1].clone();
    let lost = shard.replicas[2];
    let group = model.groups.get_mut(&shard.id).unwrap();
    if group.leader == Some(lost.id) {
        group.leader = Some(shard.replicas[0].id);
    }
    group.voters.remove(&lost.id);
    (model.floor, model.words) = (2, BTreeMap::new());
    model.speak(1);
    model.settle();
    let after = model.state.map.shard(shard.id).unwrap();
    let again = after.replica_on(lost.node).unwrap();
    assert!(after.replicas.len() == 3 && again.id > lost.id, "{after:?}");
}

#[test]
fn no_step_leaves_a_shard_without_a_quorum() {
    let mut model = Model::new(3, 3, 3);
    model.floor = 2;
    model.settle();
    model.kill(node(3));
    (0..4).for_each(|_| model.pass());
    model.wish(|state, seen| wishes::drain(state, seen, "Server1", true)).unwrap();
    for _ in 0..200 {
        model.step(); // a removal would be refused by the model, loudly
    }
    assert!(
        model.state.map.shards.iter().all(|shard| shard.replicas.iter().all(|home| home.role == ReplicaRole::Voter))
    );
    model.revive(node(3));
    model.settle();
    assert_eq!(model.kept()[&node(1)], 0);
}

#[test]
fn a_learner_that_has_said_nothing_is_not_promoted_however_short_the_log_is() {
    let mut model = Model::new(3, 1, 3);
    model.settle();
    model.join(4, "Server4", "").unwrap();
    model.wish(|state, seen| wishes::drain(state, seen, "Server1", true)).unwrap();
    model.groups.values_mut().for_each(|group| group.committed = 5);
    let promotes = |step: &Step| matches!(step, Step::Change(_, _, change) if !change.promote.is_empty());
    while model.groups.values().all(|group| group.learners.is_empty()) {
        assert!(!next(&model).iter().any(promotes));
        model.step();
    }
    for _ in 0..50 {
        model.step();
        assert!(!next(&model).iter().any(promotes), "no time has passed in which anything could be sent to it");
    }
    model.pass();
    model.speak(1);
    assert!(next(&model).iter().any(promotes));
}

#[test]
fn what_a_deposed_leader_says_of_its_group_is_not_believed() {
    let mut model = Model::new(4, 1, 3);
    model.settle();
    let shard = model.state.map.shards[1].clone();
    let led = model.groups[&shard.id].leader.unwrap();
    let (old, other) = {
        let other = shard.replicas.iter().find(|home| home.id != led).unwrap();
        (shard.replicas.iter().find(|home| home.id == led).unwrap().node, other)
    };
    // The map says that one more is a voter, which the leader of that time does not know of.
    let free = model.places.keys().find(|id| shard.replica_on(**id).is_none()).copied().unwrap();
    let new = ReplicaInfo { id: shard.next_replica, node: free, role: ReplicaRole::Voter };
    let info = &mut model.state.map.shards[1];
    info.replicas.push(new);
    info.next_replica = ReplicaId(new.id.0 + 1);
    let drops = |model: &Model| plan(&model.state, &model.seen()).after.map.shards[1].replicas.len() == 3;
    assert!(drops(&model), "while it is the leader");
    let words = model.words.get_mut(&other.node).unwrap();
    words.replicas.iter_mut().find(|here| here.shard == shard.id).unwrap().term += 1;
    assert!(!drops(&model), "another one was elected since, and node {old} has not heard of it");
}

#[test]
fn nothing_is_evened_out_while_more_nodes_are_coming() {
    let mut model = Model::new(3, 12, 3);
    model.settle();
    model.join(4, "Server4", "").unwrap();
    model.speak(1);
    let up = plan(&model.state, &model.seen()).after;
    assert_eq!(up.map.node(node(4)).unwrap().state, NodeState::Up);
    model.write(up);
    let moves = |model: &Model| plan(&model.state, &model.seen()).after.map.shards != model.state.map.shards;
    assert!(moves(&model));
    let mut joining = model.clone();
    joining.join(5, "Server5", "").unwrap();
    joining.speak(1);
    assert!(!moves(&joining));
    let mut started = model.clone();
    started.can_start = true;
    let names = vec!["Server5".to_owned()];
    started.wish(|state, seen| wishes::add(state, seen, 1, &names, String::new)).unwrap();
    assert!(!moves(&started));
    started.state.wanted.get_mut("Server5").unwrap().error = Some("it does not start".into());
    assert!(moves(&started), "one that does not come is not waited for");
}

#[test]
fn a_voter_goes_only_when_enough_others_are_left_whatever_was_thought_before() {
    let mut model = Model::new(4, 1, 3);
    model.settle();
    let shard = model.state.map.shards[1].clone();
    let free = model.places.keys().find(|id| shard.replica_on(**id).is_none()).copied().unwrap();
    let led = model.groups[&shard.id].leader;
    let old = *shard.replicas.iter().find(|home| Some(home.id) != led).unwrap();
    let new = ReplicaInfo { id: shard.next_replica, node: free, role: ReplicaRole::Learner };

    // The group has put the new one in the old one's place, and nobody has heard of that yet.
    let group = model.groups.get_mut(&shard.id).unwrap();
    group.learners.insert(new.id);
    group.homes.insert(new.id, free);
    model.places.get_mut(&free).unwrap().replicas.insert(shard.id, new.id);
    let info = &mut model.state.map.shards[1];
    info.replicas.push(new);
    info.replicas.iter_mut().find(|home| home.id == old.id).unwrap().role = ReplicaRole::Leaving;
    info.next_replica = ReplicaId(new.id.0 + 1);
    model.speak(1);
    let group = model.groups.get_mut(&shard.id).unwrap();
    group.learners.clear();
    group.voters.insert(new.id);
    group.voters.remove(&old.id);

    // Now an operator wants the new one's node to be empty.
    let name = model.state.map.node(free).unwrap().name.clone();
    model.wish(|state, seen| wishes::drain(state, seen, &name, true)).unwrap();
    let after = plan(&model.state, &model.seen()).after;
    assert_eq!(after.map.shards[1].replicas.last().unwrap().role, ReplicaRole::Leaving, "it is given up");
    model.write(after);
    model.settle(); // with never less than three voters
    assert_eq!(model.kept()[&free], 0);
}
