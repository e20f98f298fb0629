//! The native listener before there is a cluster: it hears nodes that register, so that they can be looked for, and tells
//! everybody else to come back a little later.

#![expect(clippy::disallowed_methods, reason = "a shell: starts tasks and waits")]

use bytes::BytesMut;
use shkv_proto::limits::Limits;
use shkv_proto::message::{Failure, Hello, Join, Role, Welcome};
use shkv_proto::session::{Session, accept};
use shkv_proto::world::net::{TcpListener, TcpStream};
use shkv_proto::{Frame, Kind, codec};
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;
use tokio::sync::{Semaphore, mpsc};

/// Most connections at a time.
const CONNECTIONS_MAX: usize = 2_000;
/// Pause after the system has refused to accept.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);
/// When whoever asks should come back.
const RETRY_MS: u32 = 200;

/// Hears nodes that register, and passes on where they are. Never ends by itself; dropping it closes nothing but what it has
/// accepted.
pub(crate) async fn hear(listener: &TcpListener, joiners: mpsc::Sender<String>) {
    let room = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let mut serving = tokio::task::JoinSet::new();
    loop {
        let Ok(permit) = room.clone().acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let joiners = joiners.clone();
                serving.spawn(async move {
                    serve(stream, &joiners).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "cannot accept a connection");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
        while serving.try_join_next().is_some() {}
    }
}

async fn serve(stream: TcpStream, joiners: &mpsc::Sender<String>) {
    let welcome = |hello: &Hello| {
        let version = hello.version_in_common()?;
        let (role, limits) = (Role::Balancer, Limits::OURS);
        Ok(Welcome { version, cluster: None, role, name: "balancer".into(), limits })
    };
    let Ok(Session { mut reader, mut writer, .. }) = accept(stream, welcome).await else { return };
    while let Ok(frame) = reader.next_one().await {
        if frame.header.kind == Kind::Join
            && let Ok(join) = codec::decode::<Join>(&frame.head)
            && joiners.send(join.addr).await.is_err()
        {
            return;
        }
        let text = "the balancer looks for its cluster".to_owned();
        let Ok(head) = codec::encode(&Failure::Busy { retry_after_ms: RETRY_MS, text }) else { return };
        let answer = Frame::new(frame.header.answer(Kind::Failed), head, vec![]);
        let mut bytes = BytesMut::with_capacity(answer.wire_bytes());
        answer.encode(&mut bytes);
        if writer.write_all(&bytes).await.is_err() {
            return;
        }
    }
}
