//! Real containers on a real engine: started through Compose, killed, replaced. The image is named by SHKV_DOCKER_IMAGE,
//! because building it takes a release build: `docker/build shkv:test && SHKV_DOCKER_IMAGE=shkv:test cargo test --test docker`.
//! Without it these tests say that they did nothing.

#![expect(
    clippy::disallowed_methods,
    clippy::unwrap_used,
    reason = "a test starts, waits and kills, and fails where it cannot go on"
)]

use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use shkv_client::{Client, ClientConfig, StatusDone};
use shkv_tests::load::Load;
use shkv_tests::registers::Registers;
use shkv_tests::{PATIENCE, Server, connect, is_whole, until_status};
use std::collections::BTreeMap;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

fn binary() -> &'static Path {
    Path::new(env!("CARGO_BIN_EXE_shkv"))
}

/// The image; without one there is nothing to test here.
fn image() -> Option<String> {
    let image = std::env::var("SHKV_DOCKER_IMAGE").ok();
    if image.is_none() {
        println!("skipped: SHKV_DOCKER_IMAGE names no image");
    }
    image
}

fn docker(args: &[&str]) -> Result<String, String> {
    let output = Command::new("docker").args(args).output().map_err(|error| format!("docker: {error}"))?;
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() { Ok(text(&output.stdout)) } else { Err(text(&output.stderr)) }
}

fn free_port() -> u16 {
    std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port()
}

/// A deployment through Compose, which is gone when this is dropped.
struct Deployment {
    name: String,
    image: String,
    ports: [u16; 5],
}

impl Deployment {
    fn new(image: String, name: &str) -> Self {
        let name = format!("shkvtest{name}{}", std::process::id());
        Self { name, image, ports: std::array::from_fn(|_| free_port()) }
    }

    fn compose(&self, args: &[&str]) {
        // Compose is a plugin of the engine's command, or a command of its own.
        let mut command = if docker(&["compose", "version"]).is_ok() {
            let mut command = Command::new("docker");
            command.arg("compose");
            command
        } else {
            Command::new("docker-compose")
        };
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docker/compose.yaml");
        command.arg("-p").arg(&self.name).arg("-f").arg(file).args(args);
        command.env("SHKV_IMAGE", &self.image).env("SHKV_NETWORK", &self.name);
        let names = ["SHKV_PORT", "SHKV_HTTP_PORT", "SHKV_NODE0_PORT", "SHKV_NODE1_PORT", "SHKV_NODE2_PORT"];
        command.envs(names.iter().zip(self.ports).map(|(name, port)| (name, port.to_string())));
        let output = command.stdin(Stdio::null()).output().expect("Compose is installed");
        assert!(output.status.success(), "{args:?}: {}", String::from_utf8_lossy(&output.stderr));
    }

    fn addr(&self) -> String {
        format!("127.0.0.1:{}", self.ports[0])
    }

    fn group(&self) -> String {
        format!("label=shkv.group={}", self.name)
    }

    /// Containers that the balancer has started.
    fn spawned(&self) -> Vec<String> {
        let names = docker(&["ps", "--all", "--filter", &self.group(), "--format", "{{.Names}}"]).unwrap();
        names.lines().map(ToOwned::to_owned).collect()
    }

    async fn client(&self) -> Client {
        connect(&[self.addr()]).await
    }
}

impl Drop for Deployment {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let balancer = format!("{}_spawner_1", self.name);
            println!("{:?}", docker(&["logs", "--tail", "60", &balancer]));
        }
        for container in self.spawned() {
            println!("{:?}", docker(&["rm", "--force", "--volumes", &container]));
        }
        if let Ok(volumes) = docker(&["volume", "ls", "--quiet", "--filter", &self.group()]) {
            volumes.lines().for_each(|volume| println!("{:?}", docker(&["volume", "rm", volume])));
        }
        self.compose(&["--profile", "spawn", "down", "--volumes", "--timeout", "5"]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_cluster_started_by_compose_is_reached_from_the_host() {
    let Some(image) = image() else { return };
    let deployment = Deployment::new(image, "fixed");
    deployment.compose(&["up", "--detach"]);
    let client = deployment.client().await;
    let is_told =
        |status: &StatusDone| status.map.as_ref().unwrap().nodes.iter().all(|node| node.addr_outside.is_some());
    until_status(&client, |status| is_whole(status, 3) && is_told(status)).await;
    let client = deployment.client().await;
    let load = Load::start(&client, "row", 4);
    load.progress(200).await;
    let checked =
        docker(&["inspect", "--format", "{{.State.Health.Status}}", &format!("{}_server0_1", deployment.name)]);
    assert!(["starting", "healthy"].contains(&checked.unwrap().as_str()), "the health check is run by the binary");
    // Without the balancer, the client goes on: it reaches the nodes by the ports that are published for them.
    deployment.compose(&["stop", "--timeout", "5", "balancer"]);
    load.progress(200).await;
    deployment.compose(&["start", "balancer"]);
    let report = load.stop().await;
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&client).await;
    let user = docker(&["inspect", "--format", "{{.Config.User}}", &format!("{}_server0_1", deployment.name)]).unwrap();
    assert_eq!(user, "65532:65532", "not root");
}

/// The container of a node that leads shards.
fn container_of_a_leader(status: &StatusDone, group: &str) -> String {
    let nodes = status.nodes.iter().filter_map(|(_, node)| node.as_ref().ok());
    let led = |node: &&shkv_client::NodeStatus| node.replicas.iter().filter(|replica| replica.leads).count();
    let id = nodes.max_by_key(led).unwrap().id;
    format!("{group}-{}", status.map.as_ref().unwrap().node(id).unwrap().instance)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_killed_container_is_replaced_and_nothing_acknowledged_is_lost() {
    let Some(image) = image() else { return };
    let deployment = Deployment::new(image, "spawn");
    deployment.compose(&["up", "--detach", "spawner"]);
    let client = deployment.client().await;
    let is_told = |status: &StatusDone| {
        status.map.as_ref().unwrap().nodes.iter().all(|node| !node.instance.is_empty() && node.addr_outside.is_some())
    };
    let before = until_status(&client, |status| is_whole(status, 3) && is_told(status)).await;
    let names = |status: &StatusDone| {
        let mut names: Vec<String> = status.map.as_ref().unwrap().nodes.iter().map(|node| node.name.clone()).collect();
        names.sort();
        names
    };
    let load = Load::start(&client, "row", 4);
    load.progress(200).await;

    let victim = container_of_a_leader(&before, &deployment.name);
    let killed = Instant::now();
    docker(&["kill", &victim]).unwrap();
    load.progress(50).await;
    println!("writes went on {:?} after the kill", killed.elapsed());
    let healed = until_status(&client, |status| {
        let map = status.map.as_ref().unwrap();
        is_whole(status, 3)
            && map.nodes.len() == 3
            && map.nodes.iter().all(|node| format!("{}-{}", deployment.name, node.instance) != victim)
    })
    .await;
    println!("it was whole again {:?} after the kill", killed.elapsed());
    assert_eq!(names(&healed), names(&before), "the same names");
    load.progress(100).await;
    let report = load.stop().await;
    println!("longest time without an acknowledgement: {:?}", report.longest_gap);
    assert!(report.failed.is_empty(), "{:?}", report.failed);
    report.check(&client).await;

    // What is dead is cleared away, and nothing half made is left.
    let until = Instant::now() + PATIENCE;
    while deployment.spawned().len() != 3 || deployment.spawned().contains(&victim) {
        assert!(Instant::now() < until, "{:?}", deployment.spawned());
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let volumes = docker(&["volume", "ls", "--quiet", "--filter", &deployment.group()]).unwrap();
    assert_eq!(volumes.lines().count(), 3, "{volumes}");
}

/// What may happen to a container that runs a node.
const FAULTS: [&str; 4] = ["killed", "frozen", "cut off", "stopped"];

/// Does something to the container of a service, and undoes it after a while.
async fn container_fault(fault: &str, deployment: &Deployment, service: &str, rng: &mut SmallRng) {
    let (network, container) = (&deployment.name[..], &container_of(deployment, service)[..]);
    let pause = Duration::from_millis(rng.random_range(200..6_000));
    let engine = |args: &[&str]| docker(args).unwrap_or_else(|error| panic!("{args:?}: {error}"));
    match fault {
        "killed" => {
            engine(&["kill", container]);
            tokio::time::sleep(pause / 2).await;
            engine(&["start", container]);
        }
        "frozen" => {
            engine(&["pause", container]);
            tokio::time::sleep(pause).await;
            engine(&["unpause", container]);
        }
        "cut off" => {
            engine(&["network", "disconnect", network, container]);
            tokio::time::sleep(pause).await;
            // The others know it by the name of its service, which the engine forgets with the network.
            engine(&["network", "connect", "--alias", service, network, container]);
        }
        _ => {
            engine(&["stop", "--time", "5", container]);
            engine(&["start", container]);
        }
    }
}

/// The container of a service: Compose joins names by a dash or, in its first edition, by an underscore.
fn container_of(deployment: &Deployment, service: &str) -> String {
    let names = [format!("{}_{service}_1", deployment.name), format!("{}-{service}-1", deployment.name)];
    names.into_iter().find(|name| docker(&["inspect", name]).is_ok()).expect("it was started")
}

/// Takes [`FAULT_SECS_DEFAULT`] seconds, or as many as `SHKV_FAULTS_SECS` says; `SHKV_FAULTS_SEED` chooses the faults.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whatever_happens_to_containers_everything_that_was_told_is_true() {
    const FAULT_SECS_DEFAULT: u64 = 30;
    let Some(image) = image() else { return };
    let setting = |name: &str, default| std::env::var(name).map_or(default, |text| text.parse().unwrap());
    let (secs, seed) = (setting("SHKV_FAULTS_SECS", FAULT_SECS_DEFAULT), setting("SHKV_FAULTS_SEED", 1));
    let deployment = Deployment::new(image, "faults");
    deployment.compose(&["up", "--detach"]);
    let client = deployment.client().await;
    until_status(&client, |status| is_whole(status, 3)).await;
    let mut clients = vec![deployment.client().await];
    let config = ClientConfig { through_balancer: true, ..ClientConfig::default() };
    clients.push(Client::connect_with([deployment.addr()], config).await.unwrap());
    let registers = Registers::start(&clients, 3, seed);
    registers.progress(100).await;

    let mut rng = SmallRng::seed_from_u64(seed);
    let mut done: BTreeMap<String, u32> = BTreeMap::new();
    let end = Instant::now() + Duration::from_secs(secs);
    while Instant::now() < end {
        let fault = FAULTS[rng.random_range(0..FAULTS.len())];
        let service = ["server0", "server1", "server2"][rng.random_range(0..3)];
        container_fault(fault, &deployment, service, &mut rng).await;
        *done.entry(fault.to_owned()).or_default() += 1;
        tokio::time::sleep(Duration::from_millis(rng.random_range(50..1_500))).await;
    }
    until_status(&client, |status| is_whole(status, 3)).await;
    registers.progress(200).await;
    registers.judge().await.tell(seed, &done, &[]);
}

#[test]
fn what_is_missing_is_told_by_name_and_nothing_is_left_behind() {
    let Some(image) = image() else { return };
    let network = format!("shkvtestnone{}", std::process::id());
    let start = |more: &[&str]| {
        let line = ["balancer", "--spawn", "docker", "--bootstrap", "--listen", "127.0.0.1:7399"];
        match Server::try_start(binary(), &[&line[..], more].concat()) {
            Ok(_) => panic!("it started"),
            Err(words) => words,
        }
    };
    let words = start(&["--docker-socket", "/nonexistent/docker.sock"]);
    assert!(words.contains("/nonexistent/docker.sock"), "{words}");
    let words = start(&["--docker-image", "nosuch:image", "--docker-network", "bridge"]);
    assert!(words.contains("nosuch:image") && words.contains("docker/build"), "{words}");
    let words = start(&["--docker-image", &image, "--docker-network", &network]);
    assert!(words.contains(&network) && words.contains("docker network create"), "{words}");
    let left = docker(&["ps", "--all", "--quiet", "--filter", &format!("label=shkv.group={network}")]).unwrap();
    assert_eq!(left, "");
}
