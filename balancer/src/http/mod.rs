//! The HTTP listener: whether the process lives, whether the cluster is ready, and the metrics.
//!
//! It says nothing of rows. What it answers is JSON, but for the metrics.

#![expect(clippy::disallowed_methods, reason = "a shell: waits when the system refuses to accept")]

use crate::cluster::Cluster;
use crate::health::Lacks;
use axum::Router;
use axum::extract::State;
use axum::http::{StatusCode, Uri, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Serialize;
use shkv_proto::world::net::{TcpListener, TcpStream};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// Most HTTP connections at a time; the next ones wait to be accepted.
const CONNECTIONS_MAX: usize = 1_024;
/// Pause after the system has refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// What Prometheus expects of the text format.
const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Serves until the balancer stops.
pub(crate) async fn serve(cluster: Arc<Cluster>, listener: TcpListener) {
    let stop = cluster.stop.clone();
    let router = Router::new()
        .route("/livez", get(|| async { "ok" }))
        .route("/readyz", get(ready))
        .route("/metrics", get(metrics))
        .fallback(|uri: Uri| async move { not_found(&uri) })
        .with_state(cluster);
    let listener = Bounded { listener, room: Arc::new(Semaphore::new(CONNECTIONS_MAX)) };
    let serving = axum::serve(listener, router).with_graceful_shutdown(stop.cancelled_owned());
    if let Err(error) = serving.await {
        tracing::error!(%error, "the HTTP listener ended");
    }
}

/// The answer of `/readyz`.
#[derive(Serialize)]
struct Readiness {
    ready: bool,
    #[serde(flatten)]
    lacks: Lacks,
    #[serde(skip_serializing_if = "Option::is_none")]
    trouble: Option<String>,
}

async fn ready(State(cluster): State<Arc<Cluster>>) -> Response {
    let lacks = cluster.lacks();
    let ready = lacks.is_ready();
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    json(status, &Readiness { ready, lacks, trouble: cluster.trouble() })
}

async fn metrics(State(cluster): State<Arc<Cluster>>) -> Response {
    cluster.gauge();
    match cluster.metrics.text() {
        Ok(text) => ([(header::CONTENT_TYPE, METRICS_TYPE)], text).into_response(),
        Err(error) => json(StatusCode::INTERNAL_SERVER_ERROR, &Problem { error: error.to_string() }),
    }
}

fn not_found(uri: &Uri) -> Response {
    json(StatusCode::NOT_FOUND, &Problem { error: format!("there is nothing at {}", uri.path()) })
}

#[derive(Serialize)]
struct Problem {
    error: String,
}

fn json<T: Serialize>(status: StatusCode, body: &T) -> Response {
    match serde_json::to_string(body) {
        Ok(text) => (status, [(header::CONTENT_TYPE, "application/json")], text).into_response(),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}

/// A listener that accepts no more connections than there is room for.
struct Bounded {
    listener: TcpListener,
    room: Arc<Semaphore>,
}

impl axum::serve::Listener for Bounded {
    type Io = Held;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Held, SocketAddr) {
        let permit = self.room.clone().acquire_owned().await.ok(); // the semaphore is never closed
        loop {
            match self.listener.accept().await {
                Ok((stream, addr)) => return (Held { stream, _permit: permit }, addr),
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an HTTP connection");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<SocketAddr> {
        self.listener.local_addr()
    }
}

/// A connection that holds its place until it is dropped.
struct Held {
    stream: TcpStream,
    _permit: Option<OwnedSemaphorePermit>,
}

impl AsyncRead for Held {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Held {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, slices)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }
}
