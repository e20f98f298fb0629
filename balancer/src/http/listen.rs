//! A listener of HTTP: so many connections at a time, so much time for a request's head, and an end in good order.

#![expect(clippy::disallowed_methods, reason = "a shell: waits when the system refuses to accept")]

use crate::http::manners::HttpService;
use crate::http::{Front, router};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use shkv_proto::world::net::{TcpListener, TcpStream};
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

/// Most header lines of a request.
const HEADERS_MAX: usize = 64;
/// Longest head of a request; a key of 4 KiB in percent signs fits.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Pause after the system has refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// Serves until the balancer stops, or `close` says that this listener is wanted no more. `kill` ends connections that do
/// not end by themselves.
pub(crate) async fn serve(front: Front, listener: TcpListener, close: CancellationToken, kill: CancellationToken) {
    let (limits, room) = (front.limits, Arc::new(Semaphore::new(front.limits.connections)));
    let tasks = front.store.cluster().tasks.clone();
    let manners = Arc::new(router(front, room.clone()));
    loop {
        let accepted = close.run_until_cancelled(async {
            let permit = room.clone().acquire_owned().await;
            (listener.accept().await, permit)
        });
        let Some((accepted, permit)) = accepted.await else { return };
        match accepted {
            Ok((stream, _)) => {
                // Tokens of its own: they are looked at whenever the connection moves, and a token has one lock for all.
                let (manners, close, kill) = (manners.clone(), close.child_token(), kill.child_token());
                tasks.spawn(async move {
                    let _permit = permit;
                    kill.run_until_cancelled(Box::pin(converse(stream, manners, limits.head, close))).await;
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept an HTTP connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    }
}

/// One connection, until the client closes it or `close` asks for its end after the request in hand.
async fn converse(stream: TcpStream, manners: Arc<HttpService>, head: Duration, close: CancellationToken) {
    let _ = stream.set_nodelay(true); // small answers go at once; without it they only go later
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(head).max_headers(HEADERS_MAX);
    builder.max_buf_size(HEAD_BYTES_MAX);
    let service = service_fn(move |request: Request<Incoming>| {
        let manners = manners.clone();
        async move { Ok::<_, Infallible>(manners.answer(request).await) }
    });
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    let ended = tokio::select! { // the connection is pinned: the second arm loses nothing of it
        biased; // the connection first: it is what there mostly is
        ended = connection.as_mut() => ended,
        () = close.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "an HTTP connection ended");
    }
}
