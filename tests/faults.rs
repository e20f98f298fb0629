//! Real processes that are killed, frozen, cut off and restarted without a pause, while clients remember what they were
//! told. In the end every row is judged: is there an order in which it is all true?
//!
//! A run takes [`SECS_DEFAULT`] seconds; `SHKV_FAULTS_SECS=1800` makes it half an hour. `SHKV_FAULTS_SEED` chooses the
//! faults; what the machine does in between is not in its hands, so a seed is no replay. Full and slow disks need file systems
//! of their own, which only root may mount: elsewhere they are left out, and the report says so.
//!
//! The report tells operations, faults by kind, and how long nothing was acknowledged to anybody: the sum of such times of half
//! a second and more, and the longest. Its last line is the same as a JSON object.

#![expect(clippy::unwrap_used, clippy::disallowed_methods, reason = "a test waits, and fails where it cannot go on")]

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_client::{Client, ClientConfig};
use shkv_tests::disk::SmallDisk;
use shkv_tests::proxy::Proxy;
use shkv_tests::registers::Registers;
use shkv_tests::{Server, connect, is_whole, signal, until_status};
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

const SECS_DEFAULT: u64 = 20;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];

/// What may happen to a member, or to all of them.
#[derive(Clone, Copy, Debug)]
enum Fault {
    NodeKilled,
    NodeFrozen,
    NodeCutOff,
    NodeStopped,
    BalancerKilled,
    LeadershipMoved,
    NodeDrained,
    DiskFilled,
    DiskSlow,
    AllKilled,
}

/// Drawn with these odds.
const ODDS: [(Fault, u32); 10] = [
    (Fault::NodeKilled, 6),
    (Fault::NodeFrozen, 5),
    (Fault::NodeCutOff, 5),
    (Fault::NodeStopped, 2),
    (Fault::BalancerKilled, 3),
    (Fault::LeadershipMoved, 4),
    (Fault::NodeDrained, 1),
    (Fault::DiskFilled, 3),
    (Fault::DiskSlow, 3),
    (Fault::AllKilled, 1),
];

fn draw(rng: &mut SmallRng) -> Fault {
    let mut at = rng.random_range(0..ODDS.iter().map(|(_, odds)| odds).sum());
    for (fault, odds) in ODDS {
        if at < odds {
            return fault;
        }
        at -= odds;
    }
    Fault::NodeKilled
}

/// A node that can be started again, behind a road that can be cut.
struct Member {
    name: &'static str,
    listen: String,
    data: PathBuf,
    road: Proxy,
    server: Option<Server>,
    disk: Option<SmallDisk>,
}

impl Member {
    async fn new(name: &'static str, folder: &Path) -> Self {
        let (road, listen) = (Proxy::start().await, free_port());
        road.lead_to(&listen);
        let place = folder.join(format!("disk-{name}"));
        let disk = SmallDisk::mount(&place);
        Self { name, listen, data: place.join("data"), road, server: None, disk }
    }

    fn start(&mut self, balancer: &str) {
        let data = self.data.to_str().unwrap();
        let line = ["node", "--name", self.name, "--listen", &self.listen, "--advertise", self.road.addr()];
        let more = ["--join", balancer, "--data", data, "--log-segment-bytes", "1MiB", "--table-bytes", "1MiB"];
        let small = ["--log-retain-bytes", "16MiB", "--disk-reserve-bytes", "24MiB"];
        self.server = Some(Server::start(binary(), &[&line[..], &more, &small].concat()));
    }

    fn process(&self) -> u32 {
        self.server.as_ref().unwrap().process()
    }

    fn kill(&mut self) {
        self.server.take().unwrap().kill();
    }
}

struct World {
    balancer_addr: String,
    balancer: Option<Server>,
    members: Vec<Member>,
    rng: SmallRng,
    done: BTreeMap<String, u32>,
}

impl World {
    fn start_balancer(&mut self) {
        let line = ["balancer", "--bootstrap", "--expect", "4", "--shards", "4", "--replace-after", "5s", "--listen"];
        self.balancer = Some(Server::start(binary(), &[&line[..], &[&self.balancer_addr]].concat()));
    }

    async fn pause(&mut self, millis: std::ops::Range<u64>) {
        let millis = self.rng.random_range(millis);
        tokio::time::sleep(Duration::from_millis(millis)).await;
    }

    /// A node whose disk has failed it ends, and comes back by replay.
    fn restart_the_ended(&mut self) {
        let balancer = self.balancer_addr.clone();
        for member in &mut self.members {
            if member.server.as_mut().unwrap().has_ended() {
                member.start(&balancer);
            }
        }
    }

    /// Faults that this machine does not let us make.
    fn left_out(&self) -> Vec<String> {
        let lacks = |able: fn(&SmallDisk) -> bool| !self.members.iter().filter_map(|on| on.disk.as_ref()).any(able);
        let faults = [(Fault::DiskFilled, lacks(|_| true)), (Fault::DiskSlow, lacks(SmallDisk::can_be_slow))];
        faults.iter().filter(|(_, lacks)| *lacks).map(|(fault, _)| format!("{fault:?}")).collect()
    }

    /// One fault, and the end of it.
    async fn fault(&mut self, client: &Client) {
        let fault = draw(&mut self.rng);
        let at = self.rng.random_range(0..self.members.len());
        let balancer = self.balancer_addr.clone();
        self.restart_the_ended();
        match fault {
            Fault::NodeKilled => {
                self.members[at].kill();
                self.pause(0..3_000).await;
                self.members[at].start(&balancer);
            }
            Fault::NodeFrozen => {
                signal(self.members[at].process(), "STOP");
                self.pause(100..7_000).await;
                signal(self.members[at].process(), "CONT");
            }
            Fault::NodeCutOff => {
                self.members[at].road.cut();
                self.pause(100..7_000).await;
                self.members[at].road.mend();
            }
            Fault::NodeStopped => {
                self.members[at].server = None; // asked to stop, and waited for
                self.pause(0..1_000).await;
                self.members[at].start(&balancer);
            }
            Fault::BalancerKilled => {
                self.balancer.take().unwrap().kill();
                self.pause(0..3_000).await;
                self.start_balancer();
            }
            Fault::LeadershipMoved => {
                let shard = shkv_proto::ShardId(self.rng.random_range(1..5));
                let node = self.members[at].name.to_owned();
                let _ = client.admin(&shkv_client::Admin::Transfer { shard, node }).await; // it may keep no copy
            }
            Fault::NodeDrained => {
                let node = self.members[at].name.to_owned();
                let drain = |drain| shkv_client::Admin::Drain { node: node.clone(), drain };
                if client.admin(&drain(true)).await.is_ok() {
                    self.pause(500..4_000).await;
                    let until = Instant::now() + shkv_tests::PATIENCE;
                    while let Err(error) = client.admin(&drain(false)).await {
                        assert!(Instant::now() < until, "{node} stays drained: {error}");
                        self.pause(50..51).await;
                    }
                }
            }
            Fault::DiskFilled => {
                let spare_max = if self.rng.random() { 2 << 20 } else { 32 << 20 };
                let spare = self.rng.random_range(0..spare_max);
                let Some(disk) = &self.members[at].disk else { return };
                disk.fill(spare);
                self.pause(500..7_000).await;
                self.members[at].disk.as_ref().unwrap().empty();
            }
            Fault::DiskSlow => {
                let writes_a_second = self.rng.random_range(4..60); // a sync is two or three of them
                let Some(disk) = self.members[at].disk.as_ref().filter(|disk| disk.can_be_slow()) else { return };
                disk.slow(writes_a_second);
                self.pause(500..7_000).await;
                self.members[at].disk.as_ref().unwrap().slow(0);
            }
            Fault::AllKilled => {
                self.members.iter_mut().for_each(Member::kill);
                self.pause(0..500).await;
                self.members.iter_mut().for_each(|member| member.start(&balancer));
            }
        }
        *self.done.entry(format!("{fault:?}")).or_default() += 1;
    }
}

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().to_string()
}

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).map_or(default, |text| text.parse().unwrap())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_processes_everything_that_was_told_is_true() {
    let (secs, seed) = (setting("SHKV_FAULTS_SECS", SECS_DEFAULT), setting("SHKV_FAULTS_SEED", 1));
    let data = tempfile::tempdir().unwrap();
    let mut members = Vec::new();
    for name in NAMES {
        members.push(Member::new(name, data.path()).await);
    }
    let rng = SmallRng::seed_from_u64(seed);
    let mut world = World { balancer_addr: free_port(), balancer: None, members, rng, done: BTreeMap::new() };
    let balancer = world.balancer_addr.clone();
    world.members.iter_mut().for_each(|member| member.start(&balancer));
    world.start_balancer();
    let mut clients = vec![connect(std::slice::from_ref(&balancer)).await];
    until_status(&clients[0], |status| is_whole(status, 3)).await;
    for through_balancer in [false, true] {
        let config = ClientConfig { through_balancer, ..ClientConfig::default() };
        clients.push(Client::connect_with([balancer.clone()], config).await.unwrap());
    }
    let registers = Registers::start(&clients, 3, seed);
    registers.progress(100).await;
    let end = Instant::now() + Duration::from_secs(secs);
    while Instant::now() < end {
        world.fault(&clients[0]).await;
        world.pause(50..1_500).await;
    }

    world.restart_the_ended();
    // When it is calm again, the cluster heals and goes on.
    until_status(&clients[0], |status| is_whole(status, 3)).await;
    registers.progress(200).await;
    let left_out = world.left_out();
    registers.judge().await.tell(seed, &world.done, &left_out);
}
