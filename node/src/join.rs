//! How a node becomes and stays known: it registers with balancers until one takes it, and again when none has been heard
//! for a while, because its address may have changed or the balancers may be new.

#![expect(clippy::disallowed_methods, reason = "a shell: waits between attempts")]

use crate::shared::Shared;
use bytes::{Bytes, BytesMut};
use shkv_proto::limits::DEADLINE_MS_MAX;
use shkv_proto::link::done_or_failure;
use shkv_proto::message::{Failure, Join, JoinDone, RefusalCode};
use shkv_proto::session::{self, SessionError};
use shkv_proto::{ClusterId, Frame, Header, Kind, codec};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::io::AsyncWriteExt;

/// How long a member hears no balancer before it registers again.
const SILENCE_MAX: Duration = Duration::from_secs(3);
/// First pause after a round in which nobody took the node; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(200);
/// Longest pause between two rounds.
const PAUSE_MAX: Duration = Duration::from_secs(2);
/// How long one balancer may take.
const ANSWER_TIME_MAX: Duration = Duration::from_secs(5);

/// What a node says of itself when it registers.
#[derive(Clone, Debug)]
pub struct Registration {
    /// Balancers, as `host:port`.
    pub balancers: Vec<String>,
    /// Where members reach the node.
    pub addr: String,
    /// Where clients outside of their network reach it.
    pub addr_outside: Option<String>,
    /// What fails together with it.
    pub domain: String,
    /// How much it takes.
    pub capacity: u32,
    /// By which name its provisioner knows it.
    pub instance: String,
}

/// Why a balancer did not take the node.
#[derive(Debug)]
enum Trouble {
    /// It may be taken later, or by another.
    Passing(String),
    /// The answer stays the same. With it the cluster that the other side is of, where it said so.
    Refused(RefusalCode, String, Option<ClusterId>),
}

/// Registers the node whenever that is needed, until it stops.
pub async fn keep_registered(shared: Arc<Shared>, registration: Registration) {
    tokio::select! { // both arms are cancel-safe: a registration that is cut short is made again
        biased;
        () = shared.stop.cancelled() => {}
        () = shared.retired.cancelled() => {}
        () = register_always(&shared, &registration) => {}
    }
}

async fn register_always(shared: &Shared, registration: &Registration) {
    let mut pause = PAUSE_MIN;
    let mut told = BTreeMap::new();
    // Once in the life of a process it is told who it is and where, also if it is known and heard already.
    let mut is_registered = false;
    loop {
        if is_registered
            && let Some(wait) = SILENCE_MAX.checked_sub(shared.beat_age())
            && !wait.is_zero()
        {
            tokio::time::sleep(wait).await;
            continue;
        }
        let mut taken = false;
        for addr in &registration.balancers {
            match register(shared, registration, addr).await {
                Ok(()) => {
                    (taken, is_registered) = (true, true);
                    tracing::info!(balancer = addr, "the node is registered");
                    break;
                }
                Err(trouble) => match weighed(shared, addr, trouble) {
                    Ok(text) => {
                        if told.get(addr) != Some(&text) {
                            tracing::warn!("{text}");
                            told.insert(addr.clone(), text);
                        }
                    }
                    Err(()) => return,
                },
            }
        }
        if taken {
            (pause, told) = (PAUSE_MIN, BTreeMap::new());
            // A balancer that took the node will be heard; until then it is not asked again at once.
            tokio::time::sleep(SILENCE_MAX).await;
        } else {
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(PAUSE_MAX);
        }
    }
}

/// What to do about it: go on, with what to tell; or end the node, which is done here.
fn weighed(shared: &Shared, addr: &str, trouble: Trouble) -> Result<String, ()> {
    let (code, text, theirs) = match trouble {
        Trouble::Passing(text) => return Ok(format!("the balancer at {addr} does not take the node yet: {text}")),
        Trouble::Refused(code, text, theirs) => (code, text, theirs),
    };
    let ours = shared.cluster();
    let ends = match code {
        RefusalCode::NotBootstrapped => false,
        RefusalCode::Retired | RefusalCode::WrongCluster => true,
        _ => ours.is_none(),
    };
    let reason = format!("the balancer at {addr} does not take the node: {text}");
    if !ends {
        return Ok(reason);
    }
    // Only the node's own cluster can end it for good; whoever else says so ends this process of it.
    if code == RefusalCode::Retired && ours.is_some() && ours == theirs {
        match shared.retire(&text) {
            Ok(()) => return Err(()),
            Err(failure) => tracing::error!("{failure}"),
        }
    }
    shared.fail(&reason);
    Err(())
}

async fn register(shared: &Shared, registration: &Registration, addr: &str) -> Result<(), Trouble> {
    let asked = tokio::time::timeout(ANSWER_TIME_MAX, ask(shared, registration, addr)).await;
    let done = asked.map_err(|_| Trouble::Passing(format!("no answer within {ANSWER_TIME_MAX:?}")))??;
    let JoinDone { cluster } = done;
    shared.identity.join(cluster).map_err(|failure| sorted(failure, None))?;
    shared.peers.set_cluster(cluster);
    Ok(())
}

async fn ask(shared: &Shared, registration: &Registration, addr: &str) -> Result<JoinDone, Trouble> {
    let passing = |error: SessionError| match error {
        SessionError::Refused(failure) => sorted(failure, None),
        error => Trouble::Passing(error.to_string()),
    };
    let mut session = session::connect(addr, &shared.peers.hello()).await.map_err(passing)?;
    let Registration { addr, addr_outside, domain, capacity, instance, .. } = registration.clone();
    let join = Join {
        cluster: shared.cluster(),
        id: shared.identity.id(),
        name: shared.identity.name().to_owned(),
        addr,
        addr_outside,
        domain,
        capacity,
        instance,
    };
    let head = codec::encode(&join).map_err(|error| Trouble::Passing(error.to_string()))?;
    let deadline_ms = (ANSWER_TIME_MAX.as_millis() as u32).min(DEADLINE_MS_MAX);
    let frame = Frame::new(Header { deadline_ms, ..Header::new(Kind::Join) }, head, Bytes::new());
    let mut bytes = BytesMut::with_capacity(frame.wire_bytes());
    frame.encode(&mut bytes);
    session.writer.write_all(&bytes).await.map_err(|error| Trouble::Passing(error.to_string()))?;
    let answer = session.reader.next_one().await.map_err(passing)?;
    let answer = done_or_failure(answer).map_err(|failure| sorted(failure, session.peer.cluster))?;
    codec::decode(&answer.head).map_err(|error| Trouble::Passing(error.to_string()))
}

fn sorted(failure: Failure, theirs: Option<ClusterId>) -> Trouble {
    match failure {
        Failure::Refusal { code, text } => Trouble::Refused(code, text, theirs),
        other => Trouble::Passing(other.to_string()),
    }
}
