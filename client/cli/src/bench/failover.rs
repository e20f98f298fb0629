//! How long a shard is without a leader: kills the process of the node that leads it, and takes the time until the next
//! write to it is acknowledged. The processes must be on this machine and be started again by somebody
//! (`shkv up --spawn process`), and this must be allowed to kill them.

#![expect(clippy::disallowed_methods, reason = "a shell: waits and tells the time")]

use super::workload::key;
use anyhow::{Context, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};
use shkv_client::{Client, Keyspace, NodeStatus, StatusDone};
use shkv_proto::ids::ShardId;
use shkv_proto::map::ShardInfo;
use std::collections::BTreeSet;
use std::time::{Duration, Instant};

/// How long a shard may take until it takes writes again, and the cluster until it is whole again.
const PATIENCE: Duration = Duration::from_secs(60);
/// Pause between two looks.
const LOOK_EVERY: Duration = Duration::from_millis(50);

/// The times of all kills, the shortest first.
#[derive(Debug)]
pub struct Outcome {
    times: Vec<Duration>,
}

/// Kills leaders, one after the other, each time of another shard and when the cluster is whole.
///
/// # Errors
/// The cluster does not become whole, or a process cannot be killed.
pub async fn run(addrs: &[String], keyspace: &str, kills: u32) -> anyhow::Result<Outcome> {
    let client = Client::connect(addrs.iter().cloned()).await?;
    let rows = client.keyspace(keyspace).await?;
    let mut times = Vec::new();
    let mut killed_processes = BTreeSet::new();
    for kill in 0..kills {
        let status = whole(&client, &killed_processes).await?;
        let map = status.map.as_ref().context("no map")?;
        let id = map.keyspace(keyspace).context("the keyspace is gone")?.id;
        let shards: Vec<&ShardInfo> = map.shards_of(id).collect();
        let shard = shards[kill as usize % shards.len()];
        ensure!(shard.voters().count() > 1, "shard {} has one replica only: nobody can take its place", shard.id);
        let own = (0..).map(key).find(|key| shard.part.holds(key)).context("a key of the shard")?;
        rows.put(&own[..], "before").await?;
        let leader = leader_of(&status, shard.id).context("the shard has no leader")?;
        let pid = i32::try_from(leader.process).ok().and_then(Pid::from_raw).context("a process")?;
        if pid == rustix::process::getpid() || status.process.0 == leader.process {
            bail!("the node is not a process of its own: start the cluster with --spawn process");
        }
        killed_processes.insert(leader.process);
        let killed = Instant::now();
        kill_process(pid, Signal::KILL).with_context(|| format!("process {} of {}", leader.process, leader.name))?;
        until_written(&rows, &own, killed).await?;
        let time = killed.elapsed();
        eprintln!("{:>3}: {} led shard {}, {:.3} s", kill + 1, leader.name, shard.id, time.as_secs_f64());
        times.push(time);
    }
    times.sort_unstable();
    Ok(Outcome { times })
}

async fn until_written(rows: &Keyspace, key: &[u8], since: Instant) -> anyhow::Result<()> {
    loop {
        match rows.put(key, "after").await {
            Ok(_) => return Ok(()),
            Err(error) => ensure!(since.elapsed() < PATIENCE, "no write was acknowledged: {error}"),
        }
    }
}

fn leader_of(status: &StatusDone, shard: ShardId) -> Option<&NodeStatus> {
    let nodes = status.nodes.iter().filter_map(|(_, node)| node.as_ref().ok());
    nodes.into_iter().find(|node| node.replicas.iter().any(|replica| replica.shard == shard && replica.leads))
}

/// Waits until every node answers, none of them with the words of a process that was killed, and every replica has what its
/// leader has.
async fn whole(client: &Client, killed: &BTreeSet<u32>) -> anyhow::Result<StatusDone> {
    let until = Instant::now() + PATIENCE;
    loop {
        let told = client.status().await;
        if let Ok(status) = &told
            && status.nodes.iter().all(|(_, node)| node.as_ref().is_ok_and(|node| !killed.contains(&node.process)))
            && status.map.iter().flat_map(|map| &map.shards).all(|shard| is_whole(status, shard))
        {
            return Ok(told?);
        }
        ensure!(Instant::now() < until, "the cluster does not become whole: {told:?}");
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

fn is_whole(status: &StatusDone, shard: &ShardInfo) -> bool {
    let Some(leader) = leader_of(status, shard.id) else { return false };
    let Some(led) = leader.replicas.iter().find(|replica| replica.shard == shard.id) else { return false };
    let Some(group) = &led.group else { return false };
    group.matched.len() == shard.replicas.len() && group.matched.iter().all(|(_, index)| *index >= led.committed)
}

impl Outcome {
    fn at(&self, part: f64) -> f64 {
        let last = self.times.len().saturating_sub(1);
        self.times.get((last as f64 * part).round() as usize).map_or(0.0, Duration::as_secs_f64)
    }

    /// For people.
    pub fn text(&self) -> String {
        format!(
            "{} kills: least {:.3} s, median {:.3} s, 90 % within {:.3} s, most {:.3} s",
            self.times.len(),
            self.at(0.0),
            self.at(0.5),
            self.at(0.9),
            self.at(1.0)
        )
    }

    /// For programs; times in seconds.
    pub fn json(&self) -> Value {
        let all: Vec<f64> = self.times.iter().map(Duration::as_secs_f64).collect();
        json!({"mode": "failover", "kills": all.len(), "median_s": self.at(0.5), "max_s": self.at(1.0), "all_s": all})
    }
}
