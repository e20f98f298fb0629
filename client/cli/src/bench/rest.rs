//! The loop over HTTP: `/v1/kv` of a balancer, one connection for each request in flight, since HTTP/1.1 answers in order.

use super::http::Connection;
use super::measure::{Outcome, Tally, Usage, Window, measure};
use super::pace::Pace;
use super::store::{Target, Watch};
use super::workload::{Drawer, Op};
use super::{KEY_BYTES, Plan, store};
use anyhow::bail;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use tokio::task::JoinSet;

/// What a value is.
const BYTES: &str = "application/octet-stream";

/// Runs the plan. `target` is the same cluster by the native protocol: its keys are loaded and its costs asked for there.
///
/// # Errors
/// When the cluster cannot be reached, or the work is one that is not measured over HTTP.
pub async fn run(addr: &str, target: &Target, plan: &Plan) -> anyhow::Result<Outcome> {
    if plan.workload.mix.scan > 0.0 {
        bail!("scans are not measured over HTTP");
    }
    if plan.load && plan.workload.reads() {
        store::load(&[target.connect().await?], plan).await?;
    }
    let watch = Watch::new(target).await?;
    work(addr, &target.keyspace, plan, async || watch.usage().await).await
}

async fn work(
    addr: &str,
    keyspace: &str,
    plan: &Plan,
    usage: impl AsyncFn() -> anyhow::Result<Usage>,
) -> anyhow::Result<Outcome> {
    let window = Arc::new(Window::default());
    let mut workers = JoinSet::new();
    let (inserted, all) = (Arc::new(AtomicU64::new(0)), u64::from(plan.conns) * u64::from(plan.depth));
    for seed in 0..all {
        let mut rng = SmallRng::seed_from_u64(seed);
        let worker = Worker {
            server: Connection::new(addr),
            keyspace: keyspace.to_owned(),
            value: plan.value(&mut rng),
            drawer: plan.workload.drawer(rng, inserted.clone())?,
            pace: Pace::new(plan.rate, seed, all),
            window: window.clone(),
            tally: Tally::default(),
        };
        workers.spawn(worker.work());
    }
    measure(plan, &window, workers, usage).await
}

/// One request in flight after the other.
struct Worker {
    server: Connection,
    keyspace: String,
    value: Vec<u8>,
    drawer: Drawer,
    pace: Pace,
    window: Arc<Window>,
    tally: Tally,
}

impl Worker {
    async fn work(mut self) -> anyhow::Result<Tally> {
        while !self.window.is_over() {
            let began = self.pace.begin().await;
            let op = self.drawer.draw();
            match self.act(op).await {
                Ok(()) => self.tally.succeeded(&self.window, began),
                Err(error) => self.tally.failed(&self.window, &format!("{error:#}")).await,
            }
        }
        Ok(self.tally)
    }

    async fn act(&mut self, op: Op) -> anyhow::Result<()> {
        match op {
            Op::Put(key) => self.put(&key).await,
            Op::Get(key) => self.get(&key).await,
            Op::Change(key) => {
                self.get(&key).await?;
                self.put(&key).await
            }
            _ => bail!("this is not measured over HTTP"),
        }
    }

    fn path(&self, key: &[u8; KEY_BYTES]) -> String {
        format!("/v1/kv/{}/{}", self.keyspace, String::from_utf8_lossy(key))
    }

    async fn get(&mut self, key: &[u8; KEY_BYTES]) -> anyhow::Result<()> {
        let path = self.path(key);
        let answer = self.server.ask("GET", &path, BYTES, b"").await?;
        match answer.status {
            200 => Ok(()),
            404 => bail!("a key that was loaded is not there"),
            other => bail!("status {other}: {}", String::from_utf8_lossy(&answer.body)),
        }
    }

    async fn put(&mut self, key: &[u8; KEY_BYTES]) -> anyhow::Result<()> {
        let path = self.path(key);
        let answer = self.server.ask("PUT", &path, BYTES, &self.value).await?;
        if !answer.is_success() {
            bail!("status {}: {}", answer.status, String::from_utf8_lossy(&answer.body));
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::http::fake;
    use super::super::workload::Workload;
    use super::*;
    use std::collections::BTreeMap;
    use std::sync::Mutex;
    use std::sync::atomic::Ordering;
    use std::time::Duration;

    #[tokio::test]
    async fn puts_and_gets_travel_over_connections_that_are_kept() {
        let rows = Mutex::new(BTreeMap::new());
        let answers = move |method: &str, path: &str, body: &[u8]| {
            assert!(path.starts_with("/v1/kv/mine/key0000"), "{path}");
            match method {
                "PUT" => {
                    assert_eq!(body.len(), 10);
                    rows.lock().unwrap().insert(path.to_owned(), body.to_vec());
                    (200, b"{\"version\":1}".to_vec())
                }
                "GET" => rows.lock().unwrap().get(path).map_or((404, vec![]), |value| (200, value.clone())),
                other => panic!("{other}"),
            }
        };
        let (addr, connections) = fake::serve(Arc::new(answers)).await;
        let plan = Plan {
            conns: 2,
            depth: 3,
            workload: Workload::ycsb('a', 50).unwrap(),
            rate: None,
            value_bytes: 10,
            load: true,
            warmup: Duration::from_millis(50),
            measured: Duration::from_millis(200),
        };
        let usage = async || Ok(Usage { cpu_us: vec![(1, 5)], ..Usage::default() });
        let outcome = work(&addr, "mine", &plan, usage).await.unwrap();
        assert!(outcome.ops > 0, "{outcome:?}");
        assert_eq!(connections.load(Ordering::Relaxed), 6, "one for each request in flight");
    }
}
