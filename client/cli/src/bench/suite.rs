//! The same works one after the other, each against shkv and its peers: everything that a table of measurements needs, from
//! one run on one machine.

use super::measure::Outcome;
use super::peer::Peer;
use super::report::Work;
use super::store::{self, Target};
use super::workload::{Mix, Spread, Workload};
use super::{Plan, rest};
use anyhow::Context;

/// Part of the highest rate at which the tail is measured.
const TAIL_PART: f64 = 0.5;
/// Most connections over HTTP; a request in flight needs one.
const HTTP_CONNECTIONS: u32 = 256;

/// Who is measured.
#[derive(Clone, Debug)]
pub struct Setting {
    /// The cluster.
    pub target: Target,
    /// Its HTTP listener.
    pub http: Option<String>,
    /// The others.
    pub peers: Vec<Peer>,
    /// How often everyone is measured, in turn. What counts is the round in the middle by operations per second: machines are
    /// not equally fast at all times.
    pub rounds: u32,
}

/// By which way shkv is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Way {
    Direct,
    Balancer,
    Http,
}

/// One work.
struct Item {
    name: String,
    way: Way,
    plan: Plan,
}

/// Runs one plan against everyone: shkv, shkv over HTTP if there is a listener, and the peers.
///
/// # Errors
/// When someone cannot be reached, or does not keep what was loaded.
pub async fn one(setting: &Setting, name: &str, plan: &Plan) -> anyhow::Result<Work> {
    let mut all: Vec<(String, Vec<Outcome>)> = Vec::new();
    for round in 0..setting.rounds {
        let plan = Plan { load: plan.load && round == 0, ..plan.clone() };
        let mut outcomes = vec![("shkv".to_owned(), store::run(&setting.target, &plan).await?)];
        if let Some(addr) = &setting.http {
            let outcome = rest::run(addr, &setting.target, &plan).await.context("over HTTP")?;
            outcomes.push(("shkv over HTTP".into(), outcome));
        }
        for peer in &setting.peers {
            outcomes.push((peer.to_string(), peer.run(&plan).await.with_context(|| peer.to_string())?));
        }
        all.resize_with(outcomes.len(), Default::default);
        for (rounds, (name, outcome)) in all.iter_mut().zip(outcomes) {
            rounds.0 = name;
            rounds.1.push(outcome);
        }
    }
    let outcomes = all.into_iter().filter_map(|(name, rounds)| Some((name, middle(rounds)?))).collect();
    Ok(Work { name: name.to_owned(), outcomes })
}

/// The round in the middle.
fn middle(mut rounds: Vec<Outcome>) -> Option<Outcome> {
    rounds.sort_by(|a, b| a.ops_per_sec().total_cmp(&b.ops_per_sec()));
    let at = rounds.len() / 2;
    rounds.into_iter().nth(at)
}

/// Runs all. `plan` says how long, with how many keys, and how many clients at the most.
///
/// # Errors
/// The same, with the work's name.
pub async fn run(setting: &Setting, plan: &Plan) -> anyhow::Result<Vec<Work>> {
    let mut works = Vec::new();
    for item in items(plan, setting.http.is_some()) {
        eprintln!("shkv-bench: {}", item.name);
        works.push(item.run(setting).await.with_context(|| item.name.clone())?);
    }
    let highest =
        works.first().and_then(|work| work.outcomes.first()).map_or(0.0, |(_, outcome)| outcome.ops_per_sec());
    let tail = tail(plan, highest);
    eprintln!("shkv-bench: {}", tail.name);
    works.push(tail.run(setting).await.with_context(|| tail.name.clone())?);
    Ok(works)
}

impl Item {
    async fn run(&self, setting: &Setting) -> anyhow::Result<Work> {
        match (self.way, &setting.http) {
            (Way::Http, Some(addr)) => {
                let mut rounds = Vec::new();
                for _ in 0..setting.rounds {
                    rounds.push(rest::run(addr, &setting.target, &self.plan).await?);
                }
                let outcomes = middle(rounds).map(|outcome| ("shkv".to_owned(), outcome)).into_iter().collect();
                Ok(Work { name: self.name.clone(), outcomes })
            }
            (Way::Balancer, _) => {
                let target = Target { through_balancer: true, ..setting.target.clone() };
                let setting = Setting { target, http: None, peers: vec![], rounds: setting.rounds };
                one(&setting, &self.name, &self.plan).await
            }
            (Way::Direct | Way::Http, _) => {
                let keeps_order = |peer: &&Peer| self.plan.workload.mix.scan == 0.0 || !matches!(peer, Peer::Redis(..));
                let peers = setting.peers.iter().filter(keeps_order).cloned().collect();
                let setting = Setting { target: setting.target.clone(), http: None, peers, rounds: setting.rounds };
                one(&setting, &self.name, &self.plan).await
            }
        }
    }
}

/// All works but the one whose rate depends on them. The first is the one that the rate is taken of.
fn items(plan: &Plan, has_http: bool) -> Vec<Item> {
    let keys = plan.workload.keys;
    let plain =
        |mix| Workload { mix, spread: Spread::Uniform, keys, scan_rows: plan.workload.scan_rows, scan_whole: true };
    let none = Mix::default();
    let (put, get, scan) = (Mix { put: 1.0, ..none }, Mix { get: 1.0, ..none }, Mix { scan: 1.0, ..none });
    let ycsb = |letter| Workload::ycsb(letter, keys).unwrap_or_else(|| plain(get));
    let (conns, depth) = (plan.conns, plan.depth);
    let mut items = Vec::new();
    let mut add = |words: &str, way: Way, workload: Workload, conns: u32, depth: u32| {
        let name = format!("{words}, {conns} × {depth}");
        items.push(Item { name, way, plan: Plan { conns, depth, workload, rate: None, ..plan.clone() } });
    };
    add("put", Way::Direct, plain(put), conns, depth);
    add("put", Way::Direct, plain(put), conns, 1);
    add("put", Way::Direct, plain(put), 1, 1);
    add("get", Way::Direct, plain(get), conns, depth);
    add("get", Way::Direct, plain(get), conns, 1);
    add("get", Way::Direct, plain(get), 1, 1);
    add("scan", Way::Direct, plain(scan), conns, 1);
    for letter in ['a', 'b', 'c', 'd', 'e', 'f'] {
        add(&format!("YCSB {}", letter.to_ascii_uppercase()), Way::Direct, ycsb(letter), conns, depth);
    }
    for (words, mix) in [("put", put), ("get", get)] {
        add(&format!("{words} through the balancer"), Way::Balancer, plain(mix), conns, depth);
        add(&format!("{words} through the balancer"), Way::Balancer, plain(mix), 1, 1);
        if has_http {
            let connections = conns.saturating_mul(depth).min(HTTP_CONNECTIONS);
            add(&format!("{words} over HTTP"), Way::Http, plain(mix), connections, 1);
            add(&format!("{words} over HTTP"), Way::Http, plain(mix), 1, 1);
        }
    }
    items
}

/// Puts at a part of the highest rate, whoever is late.
fn tail(plan: &Plan, highest: f64) -> Item {
    let rate = (highest * TAIL_PART).max(1.0);
    let keys = plan.workload.keys;
    let mix = Mix { put: 1.0, ..Mix::default() };
    let workload = Workload { mix, spread: Spread::Uniform, keys, scan_rows: 1, scan_whole: true };
    let name = format!("put at {rate:.0}/s, {} × {}", plan.conns, plan.depth);
    Item { name, way: Way::Direct, plan: Plan { rate: Some(rate), workload, ..plan.clone() } }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeSet;
    use std::time::Duration;

    fn plan() -> Plan {
        Plan {
            conns: 16,
            depth: 16,
            workload: Workload::ycsb('a', 1_000).unwrap(),
            rate: Some(5.0),
            value_bytes: 100,
            load: true,
            warmup: Duration::ZERO,
            measured: Duration::from_secs(1),
        }
    }

    #[test]
    fn every_work_has_a_name_of_its_own_and_no_rate_but_the_last() {
        for has_http in [false, true] {
            let items = items(&plan(), has_http);
            assert_eq!(items.len(), if has_http { 21 } else { 17 });
            let names: BTreeSet<&String> = items.iter().map(|item| &item.name).collect();
            assert_eq!(names.len(), items.len());
            assert!(items.iter().all(|item| item.plan.rate.is_none() && item.plan.workload.keys == 1_000));
            assert_eq!(items.iter().any(|item| item.way == Way::Http), has_http);
            assert!(items.iter().filter(|item| item.way == Way::Http).all(|item| item.plan.conns <= HTTP_CONNECTIONS));
        }
        let tail = tail(&plan(), 40_000.0);
        assert_eq!((tail.plan.rate, tail.name.as_str()), (Some(20_000.0), "put at 20000/s, 16 × 16"));
    }
}
