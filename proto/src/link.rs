//! The asking side of a connection, shared by balancer, node and client: many requests in flight, answers in any order.
//!
//! A [`Link`] connects by itself, and again after a loss, with a growing pause. A request is handed in with what to do
//! when it is over: exactly one of an answer, [`LinkError::NotSent`], [`LinkError::Lost`] or [`LinkError::Expired`].
//! A link never repeats a request: whether that is safe is not its to know.

#![expect(clippy::disallowed_methods, reason = "a shell: connects, waits, tells the time and draws jitter")]

use crate::codec::{self, CodecError};
use crate::frame::{Frame, Kind};
use crate::limits::{CREDIT_REQUESTS, DEADLINE_MS_MAX};
use crate::message::{Failure, Hello, Welcome};
use crate::outbox::{Outbox, SharedStream};
use crate::session::{self, Session, SessionError, failure_of};
use crate::world::net::OwnedWriteHalf;
use crate::world::{self, news::News};
use parking_lot::Mutex;
use rand::RngExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use tokio::sync::{Notify, Semaphore, oneshot};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::AbortOnDropHandle;

/// First pause after a lost connection; it doubles up to [`BACKOFF_MAX`].
const BACKOFF_MIN: Duration = Duration::from_millis(50);
/// Longest pause between two attempts to connect.
const BACKOFF_MAX: Duration = Duration::from_secs(1);
/// How often requests in flight are looked through for those whose time is up.
const SWEEP_EVERY: Duration = Duration::from_millis(20);

/// Why a request got no answer.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LinkError {
    /// It never left: certainly not done.
    #[error("not sent: {0}")]
    NotSent(String),
    /// It left, and the connection was lost before an answer: unknown.
    #[error("connection lost: {0}")]
    Lost(String),
    /// It left, and no answer came in time: unknown.
    #[error("no answer in time")]
    Expired,
}

/// Why a call did not give what was asked for.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CallError {
    /// The connection's fault.
    #[error(transparent)]
    Link(#[from] LinkError),
    /// The other side's answer.
    #[error(transparent)]
    Failure(#[from] Failure),
}

/// How a request ended.
type Ended = Result<Frame, LinkError>;

/// Who is told how a request ended.
enum Done {
    Call(Box<dyn FnOnce(Ended) + Send>),
    Tell(oneshot::Sender<Ended>),
}

impl Done {
    fn is(self, ended: Ended) {
        match self {
            Self::Call(done) => done(ended),
            Self::Tell(sender) => drop(sender.send(ended)), // whoever asked may have stopped waiting
        }
    }
}

/// A connection to one address. Cloning it is cheap; when the last clone goes, the connection is closed.
#[derive(Clone)]
pub struct Link {
    shared: Arc<Shared>,
    _close: Arc<DropGuard>,
}

struct Shared {
    addr: String,
    /// Whether the phase is [`Phase::Up`], for whoever only wants to know that.
    up: AtomicBool,
    state: Mutex<State>,
    credit: Semaphore,
    phases: News,
    retry_now: Notify,
    sweep: Notify,
}

struct State {
    phase: Phase,
    waiters: Waiters,
}

enum Phase {
    Connecting,
    Up { outbox: Arc<Outbox>, stream: SharedStream<OwnedWriteHalf>, welcome: Arc<Welcome> },
    Down { error: String },
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("addr", &self.shared.addr).finish_non_exhaustive()
    }
}

impl Link {
    /// Begins to connect to `addr`, in a task of the current runtime. `accept` may turn down whoever answers there.
    pub fn open(
        addr: impl Into<String>,
        hello: Hello,
        accept: impl Fn(&Welcome) -> Result<(), String> + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            addr: addr.into(),
            up: AtomicBool::new(false),
            state: Mutex::new(State { phase: Phase::Connecting, waiters: Waiters::default() }),
            credit: Semaphore::new(CREDIT_REQUESTS as usize),
            phases: News::default(),
            retry_now: Notify::new(),
            sweep: Notify::new(),
        });
        let stop = CancellationToken::new();
        let task = {
            let (shared, stop) = (shared.clone(), stop.clone());
            async move {
                stop.run_until_cancelled(shared.keep_connected(hello, accept)).await;
                shared.fall("the link was closed");
            }
        };
        tokio::spawn(task);
        Self { shared, _close: Arc::new(stop.drop_guard()) }
    }

    /// The address that it connects to.
    #[must_use]
    pub fn addr(&self) -> &str {
        &self.shared.addr
    }

    /// What the other side said of itself, while the connection is up.
    #[must_use]
    pub fn welcome(&self) -> Option<Arc<Welcome>> {
        match &self.shared.state.lock().phase {
            Phase::Up { welcome, .. } => Some(welcome.clone()),
            Phase::Connecting | Phase::Down { .. } => None,
        }
    }

    /// Whether the connection is up.
    #[must_use]
    pub fn is_up(&self) -> bool {
        self.shared.up.load(Ordering::Acquire)
    }

    /// Waits until the connection is up.
    ///
    /// # Errors
    /// [`LinkError::NotSent`] when the attempt under way fails, or at `deadline`.
    pub async fn connected(&self, deadline: Instant) -> Result<Arc<Welcome>, LinkError> {
        let mut phases = self.shared.phases.listen();
        loop {
            match &self.shared.state.lock().phase {
                Phase::Up { welcome, .. } => return Ok(welcome.clone()),
                Phase::Down { error } => return Err(LinkError::NotSent(error.clone())),
                Phase::Connecting => {}
            }
            tokio::time::timeout_at(deadline, phases.changed())
                .await
                .map_err(|_| LinkError::NotSent(format!("{} did not answer in time", self.shared.addr)))?;
        }
    }

    /// Ends a pause between two attempts to connect.
    pub fn retry_now(&self) {
        self.shared.retry_now.notify_one();
    }

    /// Sends a request; `done` is called exactly once, from any task. The frame's request id and deadline are set here.
    /// Waits while the connection has as many requests in flight as the other side gives credit for.
    pub async fn submit(&self, frame: Frame, deadline: Instant, done: impl FnOnce(Ended) + Send + 'static) {
        self.submit_to(frame, deadline, Done::Call(Box::new(done))).await;
    }

    /// Like [`Link::submit`], but without credit left it gives `done` back instead of waiting.
    ///
    /// # Errors
    /// `done`, not called, and the frame.
    pub fn try_submit<F>(&self, frame: Frame, deadline: Instant, done: F) -> Result<(), (Frame, F)>
    where
        F: FnOnce(Ended) + Send + 'static,
    {
        if !self.has_credit() {
            return Err((frame, done));
        }
        self.shared.submit(frame, Instant::now(), deadline, Done::Call(Box::new(done)));
        Ok(())
    }

    /// Like [`Link::submit`], for whoever waits for the answer.
    pub async fn send(&self, frame: Frame, deadline: Instant) -> oneshot::Receiver<Ended> {
        let (sender, receiver) = oneshot::channel();
        self.submit_to(frame, deadline, Done::Tell(sender)).await;
        receiver
    }

    /// Like [`Link::send`], but without credit left it gives the frame back. `now` may be a little old.
    ///
    /// # Errors
    /// The frame, not sent.
    pub fn try_send(&self, frame: Frame, now: Instant, deadline: Instant) -> Result<oneshot::Receiver<Ended>, Frame> {
        if !self.has_credit() {
            return Err(frame);
        }
        let (sender, receiver) = oneshot::channel();
        self.shared.submit(frame, now, deadline, Done::Tell(sender));
        Ok(receiver)
    }

    fn has_credit(&self) -> bool {
        self.shared.credit.try_acquire().map(|permit| permit.forget()).is_ok()
    }

    async fn submit_to(&self, frame: Frame, deadline: Instant, done: Done) {
        match tokio::time::timeout_at(deadline, self.shared.credit.acquire()).await {
            Ok(Ok(permit)) => permit.forget(),
            Ok(Err(_)) | Err(_) => {
                return done.is(Err(LinkError::NotSent("no credit in time: too many requests in flight".into())));
            }
        }
        self.shared.submit(frame, Instant::now(), deadline, done);
    }

    /// Sends a request and waits for the answer, of whatever kind. Waits for a connection under way.
    ///
    /// # Errors
    /// [`LinkError`].
    pub async fn call(&self, frame: Frame, deadline: Instant) -> Result<Frame, LinkError> {
        self.connected(deadline).await?;
        let answer = self.send(frame, deadline).await;
        answer.await.unwrap_or_else(|_| Err(LinkError::Lost("the link was closed".into())))
    }

    /// Sends a request and decodes the head of its answer; the tail comes with it.
    ///
    /// # Errors
    /// [`CallError`]; an answer that cannot be read counts as an unknown outcome.
    pub async fn ask<T: serde::de::DeserializeOwned>(
        &self,
        frame: Frame,
        deadline: Instant,
    ) -> Result<(T, bytes::Bytes), CallError> {
        let answer = done_or_failure(self.call(frame, deadline).await?)?;
        let head = codec::decode(&answer.head).map_err(|error: CodecError| Failure::unknown(error.to_string()))?;
        Ok((head, answer.tail))
    }

    /// Sends a frame that has no answer. It is dropped, and `false` returned, unless the connection is up and no more
    /// than `backlog_bytes_max` wait to be written.
    pub fn tell(&self, frame: &Frame, backlog_bytes_max: usize) -> bool {
        let (outbox, stream) = match &self.shared.state.lock().phase {
            Phase::Up { outbox, stream, .. } => (outbox.clone(), stream.clone()),
            Phase::Connecting | Phase::Down { .. } => return false,
        };
        if outbox.bytes() > backlog_bytes_max {
            return false;
        }
        outbox.send(frame, &stream); // it is all that its sender has to say at this moment
        true
    }
}

/// An answer that says done, or the failure that it says.
///
/// # Errors
/// The failure; an answer of another kind counts as an unknown outcome.
pub fn done_or_failure(answer: Frame) -> Result<Frame, Failure> {
    match answer.header.kind {
        Kind::Done => Ok(answer),
        Kind::Failed => Err(failure_of(&answer)),
        other => Err(Failure::unknown(format!("an answer of kind {other:?}"))),
    }
}

impl Shared {
    fn submit(&self, mut frame: Frame, now: Instant, deadline: Instant, done: Done) {
        let mut state = self.state.lock();
        let error = match &state.phase {
            Phase::Up { .. } => None,
            Phase::Connecting => Some(format!("the connection to {} is not up yet", self.addr)),
            Phase::Down { error } => Some(error.clone()),
        };
        if let Some(error) = error {
            drop(state);
            self.credit.add_permits(1);
            return done.is(Err(LinkError::NotSent(error)));
        }
        let left = deadline.saturating_duration_since(now).as_millis();
        frame.header.deadline_ms = left.clamp(1, u128::from(DEADLINE_MS_MAX)) as u32;
        frame.header.request = state.waiters.add(deadline, done);
        let mut alone = None;
        if let Phase::Up { outbox, stream, .. } = &state.phase {
            if state.waiters.count == 1 {
                alone = Some((outbox.clone(), stream.clone()));
            } else {
                outbox.push(&frame);
            }
        }
        drop(state);
        if let Some((outbox, stream)) = alone {
            // Nothing else is in flight, so there is nobody whose frames could share the write: it need not be put off.
            outbox.send(&frame, &stream);
            self.sweep.notify_one();
        }
    }

    async fn keep_connected(&self, hello: Hello, accept: impl Fn(&Welcome) -> Result<(), String>) {
        let mut backoff = BACKOFF_MIN;
        loop {
            self.enter(Phase::Connecting);
            let error = match session::connect(&self.addr, &hello).await {
                Ok(session) => match accept(&session.peer) {
                    Ok(()) => {
                        backoff = BACKOFF_MIN;
                        self.run(session).await
                    }
                    Err(why) => why,
                },
                Err(error) => error.to_string(),
            };
            self.fall(&format!("{}: {error}", self.addr));
            let pause = world::rng().random_range(backoff / 2..=backoff);
            backoff = (backoff * 2).min(BACKOFF_MAX);
            tokio::select! { // both arms are cancel-safe: neither takes anything with it
                biased;
                () = tokio::time::sleep(pause) => {}
                () = self.retry_now.notified() => {}
            }
        }
    }

    fn enter(&self, phase: Phase) {
        {
            let mut state = self.state.lock();
            self.up.store(matches!(phase, Phase::Up { .. }), Ordering::Release);
            state.phase = phase;
        }
        self.phases.tell();
    }

    /// The connection is gone: everybody who waits is told.
    fn fall(&self, error: &str) {
        let waiters = {
            let mut state = self.state.lock();
            if let Phase::Up { outbox, .. } = &state.phase {
                outbox.close();
            }
            self.up.store(false, Ordering::Release);
            state.phase = Phase::Down { error: error.to_owned() };
            state.waiters.take_all()
        };
        self.phases.tell();
        self.credit.add_permits(waiters.len());
        for done in waiters {
            done.is(Err(LinkError::Lost(error.to_owned())));
        }
    }

    /// Serves one connection until it ends; returns why it ended.
    async fn run(&self, session: Session<Welcome>) -> String {
        let Session { mut reader, writer, peer } = session;
        let stream = SharedStream::new(writer);
        let outbox = Arc::new(Outbox::default());
        let mut writing = {
            let (outbox, mut stream) = (outbox.clone(), stream.clone());
            // Ended with the connection: a peer that does not read must not keep the writer and its bytes for ever.
            AbortOnDropHandle::new(tokio::spawn(async move { outbox.write_to(&mut stream).await }))
        };
        self.enter(Phase::Up { outbox: outbox.clone(), stream, welcome: Arc::new(peer) });
        let mut frames = Vec::new();
        let mut sweep = tokio::time::interval(SWEEP_EVERY);
        sweep.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut idle = true;
        let error = loop {
            tokio::select! { // every arm is cancel-safe; next_batch keeps what it has read in its buffer
                biased; // the sweep first: it is rarely due, and a stream of answers must not put it off
                () = self.sweep.notified(), if idle => idle = false,
                _ = sweep.tick(), if !idle => idle = self.expire(),
                read = reader.next_batch(&mut frames) => match read {
                    Ok(true) => self.answer(&mut frames),
                    Ok(false) => break "closed by the other side".to_owned(),
                    Err(SessionError::Io(error)) => break error.to_string(),
                    Err(error) => break error.to_string(),
                },
                written = &mut writing => break match written {
                    Ok(Ok(())) => "closed".to_owned(),
                    Ok(Err(error)) => error.to_string(),
                    Err(error) => error.to_string(),
                },
            }
        };
        outbox.close();
        error
    }

    fn answer(&self, frames: &mut Vec<Frame>) {
        let mut answered = Vec::with_capacity(frames.len());
        {
            let mut state = self.state.lock();
            for frame in frames.drain(..) {
                if let Some(done) = state.waiters.take(frame.header.request) {
                    answered.push((done, frame)); // an answer that comes too late finds no waiter
                }
            }
        }
        self.credit.add_permits(answered.len());
        for (done, frame) in answered {
            done.is(Ok(frame));
        }
    }

    /// Ends the requests whose time is up; tells whether none is in flight.
    fn expire(&self) -> bool {
        let now = Instant::now();
        let (expired, idle) = {
            let mut state = self.state.lock();
            let expired = state.waiters.take_expired(now);
            (expired, state.waiters.count == 0)
        };
        self.credit.add_permits(expired.len());
        for done in expired {
            done.is(Err(LinkError::Expired));
        }
        idle
    }
}

/// The requests in flight. An id is a slot and how often the slot was used, so that a late answer finds nobody.
#[derive(Default)]
struct Waiters {
    slots: Vec<Slot>,
    free: Vec<u32>,
    count: usize,
}

#[derive(Default)]
struct Slot {
    uses: u32,
    waiter: Option<(Instant, Done)>,
}

impl Waiters {
    fn add(&mut self, deadline: Instant, done: Done) -> u64 {
        let at = self.free.pop().unwrap_or_else(|| {
            self.slots.push(Slot::default());
            (self.slots.len() - 1) as u32
        });
        let slot = &mut self.slots[at as usize];
        slot.uses = slot.uses.wrapping_add(1);
        slot.waiter = Some((deadline, done));
        self.count += 1;
        (u64::from(slot.uses) << 32) | u64::from(at)
    }

    fn take(&mut self, id: u64) -> Option<Done> {
        let at = id as u32;
        let slot = self.slots.get_mut(at as usize)?;
        if slot.uses != (id >> 32) as u32 {
            return None;
        }
        let (_, done) = slot.waiter.take()?;
        self.free.push(at);
        self.count -= 1;
        Some(done)
    }

    fn take_if(&mut self, over: impl Fn(Instant) -> bool) -> Vec<Done> {
        let mut taken = Vec::new();
        for (at, slot) in self.slots.iter_mut().enumerate() {
            if slot.waiter.as_ref().is_some_and(|(deadline, _)| over(*deadline))
                && let Some((_, done)) = slot.waiter.take()
            {
                self.free.push(at as u32);
                self.count -= 1;
                taken.push(done);
            }
        }
        taken
    }

    fn take_all(&mut self) -> Vec<Done> {
        self.take_if(|_| true)
    }

    fn take_expired(&mut self, now: Instant) -> Vec<Done> {
        self.take_if(|deadline| deadline <= now)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::AtomicU32;

    #[test]
    fn a_late_answer_finds_no_waiter() {
        let calls = Arc::new(AtomicU32::new(0));
        let done = |calls: &Arc<AtomicU32>| -> Done {
            let calls = calls.clone();
            Done::Call(Box::new(move |_| {
                calls.fetch_add(1, Ordering::Relaxed);
            }))
        };
        let mut waiters = Waiters::default();
        let now = Instant::now();
        let first = waiters.add(now, done(&calls));
        assert_eq!(waiters.take_expired(now).len(), 1);
        let second = waiters.add(now + Duration::from_secs(1), done(&calls));
        assert_eq!(first as u32, second as u32, "the slot is used again");
        assert!(waiters.take(first).is_none());
        assert!(waiters.take(u64::MAX).is_none());
        assert!(waiters.take(second).is_some());
        assert!(waiters.take(second).is_none());
        assert_eq!(waiters.count, 0);
    }

    #[tokio::test]
    async fn nobody_listening_is_not_sent() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let addr = listener.local_addr().unwrap().to_string();
        drop(listener);
        let link = Link::open(addr, Hello::ours(None, crate::message::Role::Client), |_| Ok(()));
        let frame = Frame::new(crate::frame::Header::new(Kind::Get), vec![], vec![]);
        let error = link.call(frame, Instant::now() + Duration::from_secs(5)).await.unwrap_err();
        assert!(matches!(error, LinkError::NotSent(_)), "{error}");
    }
}
