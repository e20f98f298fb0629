//! The same loop against etcd, for the ratio: Put and Range of its KV service over gRPC, each connection with as many
//! requests in flight.
//!
//! Only the fields that are used here are declared (etcd API reference v3, `rpc.proto`, service KV); others are passed over
//! as protobuf has it.

use super::Plan;
use super::measure::{Outcome, Tally, Usage, Window, measure, unmeasured};
use super::pace::Pace;
use super::workload::{Drawer, Op, key};
use anyhow::{Context, bail};
use bytes::Bytes;
use prost::Message;
use rand::SeedableRng;
use rand::rngs::SmallRng;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use tokio::task::JoinSet;
use tonic::client::Grpc;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Channel, Endpoint};
use tonic_prost::ProstCodec;

#[derive(Clone, PartialEq, Message)]
struct PutRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct PutResponse {}

#[derive(Clone, PartialEq, Message)]
struct RangeRequest {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "2")]
    range_end: Bytes,
    #[prost(int64, tag = "3")]
    limit: i64,
}

#[derive(Clone, PartialEq, Message)]
struct KeyValue {
    #[prost(bytes = "bytes", tag = "1")]
    key: Bytes,
    #[prost(bytes = "bytes", tag = "5")]
    value: Bytes,
}

#[derive(Clone, PartialEq, Message)]
struct RangeResponse {
    #[prost(message, repeated, tag = "2")]
    kvs: Vec<KeyValue>,
}

/// Runs the plan. Its connections go to the endpoints in turn.
///
/// # Errors
/// When no endpoint can be reached, or a key that must be there could not be loaded.
pub async fn run(addrs: &[String], plan: &Plan) -> anyhow::Result<Outcome> {
    let mut servers = Vec::with_capacity(plan.conns as usize);
    for addr in addrs.iter().cycle().take(plan.conns as usize) {
        let endpoint = Endpoint::from_shared(format!("http://{addr}"))?.tcp_nodelay(true);
        servers.push(Server(endpoint.connect().await.with_context(|| format!("connecting to {addr}"))?));
    }
    if plan.load && plan.workload.reads() {
        load(&servers, plan).await?;
    }
    let window = Arc::new(Window::default());
    let (inserted, all) = (Arc::new(AtomicU64::new(0)), u64::from(plan.conns) * u64::from(plan.depth));
    let mut workers = JoinSet::new();
    for (seed, server) in (0..).zip(servers.iter().flat_map(|one| (0..plan.depth).map(move |_| one))) {
        let mut rng = SmallRng::seed_from_u64(seed);
        let value = Bytes::from(plan.value(&mut rng));
        let drawer = plan.workload.drawer(rng, inserted.clone())?;
        workers.spawn(work(server.clone(), value, drawer, Pace::new(plan.rate, seed, all), window.clone()));
    }
    // What etcd has used, it tells only in whole metrics pages; its processor time is left out.
    measure(plan, &window, workers, async || Ok(Usage::default())).await
}

#[derive(Clone)]
struct Server(Channel);

impl Server {
    async fn ask<Q, A>(&self, path: &'static str, request: Q) -> Result<A, tonic::Status>
    where
        Q: Message + Send + Sync + 'static,
        A: Message + Default + Send + Sync + 'static,
    {
        let mut grpc = Grpc::new(self.0.clone());
        grpc.ready().await.map_err(|error| tonic::Status::unavailable(error.to_string()))?;
        let codec: ProstCodec<Q, A> = ProstCodec::default();
        Ok(grpc.unary(tonic::Request::new(request), PathAndQuery::from_static(path), codec).await?.into_inner())
    }

    async fn put(&self, key: &[u8], value: &Bytes) -> Result<(), tonic::Status> {
        let request = PutRequest { key: Bytes::copy_from_slice(key), value: value.clone() };
        self.ask::<_, PutResponse>("/etcdserverpb.KV/Put", request).await.map(drop)
    }

    /// Rows from a key on; without a limit that row alone.
    async fn range(&self, key: &[u8], limit: Option<u32>) -> Result<Vec<KeyValue>, tonic::Status> {
        // A range end of one zero byte is the end of all keys.
        let range_end = if limit.is_some() { Bytes::from_static(&[0]) } else { Bytes::new() };
        let request = RangeRequest { key: Bytes::copy_from_slice(key), range_end, limit: limit.unwrap_or(0).into() };
        Ok(self.ask::<_, RangeResponse>("/etcdserverpb.KV/Range", request).await?.kvs)
    }
}

async fn work(
    server: Server,
    value: Bytes,
    mut drawer: Drawer,
    mut pace: Pace,
    window: Arc<Window>,
) -> anyhow::Result<Tally> {
    let mut tally = Tally::default();
    while !window.is_over() {
        let began = pace.begin().await;
        let found = match drawer.draw() {
            Op::Put(key) => server.put(&key, &value).await.map(|()| 1),
            Op::Get(key) => server.range(&key, None).await.map(|rows| rows.len()),
            Op::Scan(key, rows) => server.range(&key, Some(rows)).await.map(|rows| {
                tally.scanned(&window, rows.len() as u64);
                rows.len()
            }),
            Op::Change(key) => match server.range(&key, None).await {
                Ok(rows) => server.put(&key, &value).await.map(|()| rows.len()),
                Err(error) => Err(error),
            },
        };
        match found {
            Ok(0) => tally.failed(&window, &"a key that was loaded is not there").await,
            Ok(_) => tally.succeeded(&window, began),
            Err(error) => tally.failed(&window, &format!("etcd: {error}")).await,
        }
    }
    Ok(tally)
}

/// Writes all keys.
async fn load(servers: &[Server], plan: &Plan) -> anyhow::Result<()> {
    eprintln!("shkv-bench: loading {} keys into etcd", plan.workload.keys);
    let (next, window) = (Arc::new(AtomicU64::new(0)), Arc::new(unmeasured()));
    let value = Bytes::from(plan.value(&mut SmallRng::seed_from_u64(0)));
    let mut loaders = JoinSet::new();
    for server in servers.iter().flat_map(|one| (0..plan.depth).map(move |_| one)) {
        let (server, next, value, keys) = (server.clone(), next.clone(), value.clone(), plan.workload.keys);
        let window = window.clone();
        loaders.spawn(async move {
            let mut failures = Tally::default();
            loop {
                let number = next.fetch_add(1, Ordering::Relaxed);
                if number >= keys {
                    return Ok(());
                }
                let mut tries = 0;
                while let Err(error) = server.put(&key(number), &value).await {
                    tries += 1;
                    if tries == super::LOAD_TRIES_MAX {
                        bail!("loading key {number}: {error}");
                    }
                    failures.failed(&window, &error).await;
                }
            }
        });
    }
    while let Some(loader) = loaders.join_next().await {
        loader.context("a loader")??;
    }
    Ok(())
}
