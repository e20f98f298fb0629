//! The coordinator of a batch over several shards: prepares in parallel, decides in one entry of the first shard, finishes
//! the others (Aguilera et al., Sinfonia, SOSP 2007, section 4; Gray and Lamport, "Consensus on transaction commit", 2006,
//! for why the decision is replicated).
//!
//! It may be ended at any point. Before the decision is in the log of the first shard nothing is done, and whoever meets a
//! lock learns so; afterwards it is done, and the next leader of the first shard goes on.

#![expect(clippy::disallowed_methods, reason = "a shell: starts tasks, waits, and tells the time")]

use crate::ask;
use crate::cell::Cell;
use crate::machine::{self, Conclude, Decide, Done, LetGo, WriteKind};
use crate::plan::{self, Part};
use crate::reply::Reply;
use crate::session::deadline_of;
use crate::shared::Shared;
use crate::steps::Step;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::message::{Batch, BatchDone, Failure, Finish, FinishDone, Prepare, PrepareDone, TxnId};
use shkv_proto::{Frame, Kind, ShardId};
use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Instant;

/// How long shards may take to prepare: their keys are locked meanwhile.
const PREPARE_TIME_MAX: Duration = Duration::from_secs(2);
/// How long the answer to the client waits for shards to finish, so that it can tell their revisions.
const FINISH_TIME_MAX: Duration = Duration::from_secs(1);
/// How long one attempt to finish a shard may take.
const FINISH_ASK_MAX: Duration = Duration::from_secs(1);
/// How long before its deadline the client is answered.
const ANSWER_SPARE: Duration = Duration::from_millis(20);
/// Pause after an attempt to finish that failed; it doubles up to a second.
const FINISH_PAUSE_MIN: Duration = Duration::from_millis(10);
/// Longest pause between two attempts to finish.
const FINISH_PAUSE_MAX: Duration = Duration::from_secs(1);

type Outcome = Result<(Box<BatchDone>, Bytes), Failure>;

/// Carries out a batch over several shards, the lowest of which is `cell`'s, and answers it.
pub async fn run(shared: Arc<Shared>, cell: Arc<Cell>, frame: Frame, reply: Reply) {
    let deadline = deadline_of(&frame);
    let (answer, answered) = oneshot::channel();
    tokio::spawn(async move {
        let mut answer = Some(answer);
        let outcome = coordinate(&shared, &cell, &frame, deadline, &mut answer).await;
        tell(&mut answer, outcome);
    });
    match tokio::time::timeout_at(deadline, answered).await {
        Ok(Ok(Ok((done, values)))) => reply.done_with(&done, values),
        Ok(Ok(Err(failure))) => reply.failed(&failure),
        Ok(Err(_)) => reply.failed(&Failure::unknown("the node is stopping")),
        Err(_) => reply.failed(&Failure::unknown("proposed, but not committed before the deadline")),
    }
}

fn tell(answer: &mut Option<oneshot::Sender<Outcome>>, outcome: Outcome) {
    if let Some(answer) = answer.take() {
        let _ = answer.send(outcome); // whoever asked may be gone
    }
}

/// From now on the transaction may be decided. What is left of earlier terms is forgotten: their transactions cannot.
fn begin(shared: &Shared, txn: TxnId) {
    let mut txns = shared.txns.lock();
    let earlier = TxnId { term: 0, number: 0, ..txn }..TxnId { number: 0, ..txn };
    while let Some(over) = txns.range(earlier.clone()).next().copied() {
        txns.remove(&over);
    }
    txns.insert(txn);
}

async fn coordinate(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    frame: &Frame,
    deadline: Instant,
    answer: &mut Option<oneshot::Sender<Outcome>>,
) -> Outcome {
    let batch: Batch<'_> = codec::decode_borrowed(&frame.head).map_err(|error| Failure::malformed(&error))?;
    let Some(routes) = shared.routes() else {
        return Err(Failure::Busy { retry_after_ms: 100, text: "no balancer has sent the map yet".into() });
    };
    let mut parts = plan::split(&routes, &batch, frame.tail.clone())?;
    let first = match parts.pop_first() {
        Some((shard, part)) if shard == cell.shard => part,
        _ => return Err(Failure::WrongShard { epoch: shared.epoch() }),
    };
    let Some(term) = cell.term() else {
        return Err(Failure::NotLeader { hint: cell.leader().filter(|n| *n != shared.peers.me()) });
    };
    if let Some(outcome) = earlier(cell, &batch, deadline).await {
        return outcome;
    }
    let txn = TxnId { shard: cell.shard, term, number: shared.txn_number() };
    let others: Vec<ShardId> = parts.keys().copied().collect();
    begin(shared, txn);
    shared.steps.reach(Step::BeforePrepare).await;
    let decided = match prepare(shared, txn, &batch, &parts, deadline).await {
        Ok(answers) => {
            shared.steps.reach(Step::BeforeDecide).await;
            decide(shared, txn, &batch, &first, &parts, answers).await
        }
        Err(failure) => Err(failure),
    };
    // It is no longer under way when its decision is in the view, or can never be. While that is not known, nobody is told
    // anything of it, until another term begins: the node may be about to stop.
    if !matches!(decided, Err(Failure::Unknown { .. })) {
        shared.txns.lock().remove(&txn);
    }
    match decided {
        Ok((mut done, values, true)) => {
            shared.steps.reach(Step::AfterDecide).await;
            let by = (deadline - ANSWER_SPARE).min(Instant::now() + FINISH_TIME_MAX);
            let finishing = finish_all(shared, cell, term, txn, &others);
            let mut finishing = std::pin::pin!(finishing);
            let finished = match tokio::time::timeout_at(by, finishing.as_mut()).await {
                Ok(finished) => finished,
                Err(_) => {
                    tell(answer, Ok((done.clone(), values.clone())));
                    finishing.await
                }
            };
            let Some(revisions) = finished else { return Ok((done, values)) };
            shared.steps.reach(Step::BeforeLetGo).await;
            done.revisions.extend(&revisions);
            done.revisions.sort_unstable();
            tell(answer, Ok((done.clone(), values.clone())));
            let_go(shared, txn, revisions).await;
            shared.steps.reach(Step::AfterLetGo).await;
            Ok((done, values))
        }
        Ok((done, values, false)) => {
            // The same batch was done before, by another transaction.
            abort(shared, txn, others);
            Ok((done, values))
        }
        Err(failure @ Failure::Unknown { .. }) => Err(failure),
        Err(failure) => {
            abort(shared, txn, others);
            conclude(shared, txn, &batch, failure).await
        }
    }
}

/// Lets it be remembered that a condition did not hold. The same batch may be under way a second time, or may have changed
/// the row itself: whoever has sent it twice must hear one and the same of both.
async fn conclude(shared: &Shared, txn: TxnId, batch: &Batch<'_>, failure: Failure) -> Outcome {
    let (Failure::Condition { operation, version }, Some(id)) = (&failure, batch.id) else { return Err(failure) };
    let head = codec::encode(&Conclude { id, operation: *operation, version: *version });
    let head = head.map_err(|error| Failure::malformed(&error))?.into();
    match ask::write(shared, txn.shard, WriteKind::Conclude, head, Bytes::new(), None).await? {
        Done::Batch(done, values, _) => Ok((done, values)),
        Done::Write(_) | Done::Prepare(..) | Done::Finish(_) | Done::LetGo => {
            Err(Failure::unknown("an answer to another question"))
        }
    }
}

/// The outcome of a batch that has come before and was decided, when all its shards have finished.
async fn earlier(cell: &Cell, batch: &Batch<'_>, deadline: Instant) -> Option<Outcome> {
    let id = batch.id.as_ref()?;
    loop {
        let mut let_go = std::pin::pin!(cell.unlocked.notified());
        let_go.as_mut().enable();
        let (outcome, under_way) = {
            let view = cell.view.read();
            let outcome = machine::outcome_of(&view.ledger, id)?;
            let mine = Some((id.client, id.sequence));
            (outcome, view.ledger.decisions.values().any(|decision| decision.id == mine))
        };
        if !under_way || tokio::time::timeout_at(deadline - ANSWER_SPARE, let_go).await.is_err() {
            return Some(outcome.map(|done| match done {
                Done::Batch(done, values, _) => (done, values),
                _ => (Box::new(BatchDone { removed: 0, revisions: vec![], rows: vec![] }), Bytes::new()),
            }));
        }
    }
}

type Prepared = BTreeMap<ShardId, (PrepareDone, Bytes)>;

/// Lets all other shards prepare.
async fn prepare(
    shared: &Arc<Shared>,
    txn: TxnId,
    batch: &Batch<'_>,
    parts: &BTreeMap<ShardId, Part<'_>>,
    deadline: Instant,
) -> Result<Prepared, Failure> {
    let deadline = (deadline - ANSWER_SPARE).min(Instant::now() + PREPARE_TIME_MAX);
    let mut asked = JoinSet::new();
    for (shard, part) in parts {
        let head = codec::encode(&Prepare { txn, keyspace: batch.keyspace, ops: part.ops.clone() });
        let head = Bytes::from(head.map_err(|error| Failure::malformed(&error))?);
        let (shared, shard, values) = (shared.clone(), *shard, part.values.clone().freeze());
        asked.spawn(async move {
            (shard, ask::leader_raw::<PrepareDone>(&shared, shard, Kind::Prepare, head, values, deadline).await)
        });
    }
    let mut prepared = Prepared::new();
    let mut failed: Option<Failure> = None;
    while let Some(answer) = asked.join_next().await {
        match answer {
            Ok((shard, Ok(answer))) => drop(prepared.insert(shard, answer)),
            Ok((shard, Err(failure))) => {
                let failure = match (parts.get(&shard), failure) {
                    // Certainly not done as a whole: it was not decided, and will not be.
                    (_, Failure::Unknown { text }) => Failure::Aborted { text: format!("shard {shard}: {text}") },
                    (_, Failure::NotLeader { .. }) => Failure::Aborted { text: format!("shard {shard} has no leader") },
                    (Some(part), failure) => part.failure(failure),
                    (None, failure) => failure,
                };
                failed = Some(match failed {
                    Some(before) if weight(&before) <= weight(&failure) => before,
                    _ => failure,
                });
            }
            Err(error) => failed = Some(Failure::Aborted { text: error.to_string() }),
        }
    }
    failed.map_or(Ok(prepared), Err)
}

/// Which of several failures the client hears: those that will not go away first, of conditions the first of the batch.
fn weight(failure: &Failure) -> (u8, u32) {
    match failure {
        Failure::Refusal { .. } => (0, 0),
        Failure::Condition { operation, .. } => (1, *operation),
        Failure::WrongShard { .. } => (2, 0),
        Failure::Aborted { .. } => (3, 0),
        Failure::Busy { .. } | Failure::NotLeader { .. } | Failure::Behind { .. } | Failure::Unknown { .. } => (4, 0),
    }
}

/// Writes the decision, with the first shard's part.
async fn decide(
    shared: &Arc<Shared>,
    txn: TxnId,
    batch: &Batch<'_>,
    first: &Part<'_>,
    parts: &BTreeMap<ShardId, Part<'_>>,
    prepared: Prepared,
) -> Result<(Box<BatchDone>, Bytes, bool), Failure> {
    let removed = prepared.values().map(|(done, _)| done.removed).sum();
    let answers: Vec<_> =
        prepared.into_iter().filter_map(|(shard, (done, values))| Some((parts.get(&shard)?, done, values))).collect();
    let (reads, read_values) = plan::gather(batch, first, &answers)?;
    let others = parts.keys().copied().collect();
    let decide = Decide { txn, ops: first.ops.clone(), id: batch.id, others, removed, reads };
    let head = codec::encode(&decide).map_err(|error| Failure::malformed(&error))?;
    let mut values = first.values.clone();
    values.extend_from_slice(&read_values);
    let deciding = ask::write(shared, txn.shard, WriteKind::Decide, head.into(), values.freeze(), None);
    let mut deciding = std::pin::pin!(deciding);
    // Handed over before the step is reached: that is what the step is.
    let known = tokio::select! { // both arms are cancel-safe: the write is handed over and waited for in one future, which is kept
        biased;
        known = &mut deciding => Some(known),
        () = std::future::ready(()) => None,
    };
    shared.steps.reach(Step::DecideProposed).await;
    let known = match known {
        Some(known) => known,
        None => deciding.await,
    };
    match known.map_err(|failure| first.failure(failure))? {
        Done::Batch(done, values, mine) => Ok((done, values, mine)),
        Done::Write(_) | Done::Prepare(..) | Done::Finish(_) | Done::LetGo => {
            Err(Failure::unknown("an answer to another question"))
        }
    }
}

/// Lets the other shards drop what they have prepared. Who does not hear of it asks.
fn abort(shared: &Arc<Shared>, txn: TxnId, others: Vec<ShardId>) {
    for shard in others {
        let shared = shared.clone();
        tokio::spawn(async move {
            let deadline = Instant::now() + FINISH_ASK_MAX;
            let finish = Finish { txn, commit: false };
            let told = ask::leader::<FinishDone>(&shared, shard, Kind::Finish, &finish, Bytes::new(), deadline).await;
            if let Err(failure) = told {
                tracing::debug!(%shard, "a transaction that was not done stays locked for now: {failure}");
            }
        });
    }
}

/// Goes on with a transaction that was decided in an earlier term.
pub async fn finish_decided(shared: Arc<Shared>, txn: TxnId, others: Vec<ShardId>) {
    let Some(cell) = shared.cell(txn.shard) else { return };
    let Some(term) = cell.term() else { return };
    if let Some(revisions) = finish_all(&shared, &cell, term, txn, &others).await {
        let_go(&shared, txn, revisions).await;
    }
}

/// Lets all other shards write what they have prepared, however long it takes. `None` if this node leads the first shard no
/// more: the next leader goes on.
async fn finish_all(
    shared: &Arc<Shared>,
    cell: &Arc<Cell>,
    term: u64,
    txn: TxnId,
    others: &[ShardId],
) -> Option<Vec<(ShardId, u64)>> {
    let mut tasks = JoinSet::new();
    for shard in others {
        let (shared, cell, shard) = (shared.clone(), cell.clone(), *shard);
        tasks.spawn(async move { finish(&shared, &cell, term, txn, shard).await });
    }
    let mut revisions = Vec::with_capacity(others.len());
    while let Some(finished) = tasks.join_next().await {
        revisions.extend(finished.ok()??);
    }
    revisions.sort_unstable();
    Some(revisions)
}

/// Lets a shard write what it has prepared; tells its revision, unless the shard is no more.
async fn finish(
    shared: &Arc<Shared>,
    cell: &Cell,
    term: u64,
    txn: TxnId,
    shard: ShardId,
) -> Option<Option<(ShardId, u64)>> {
    let mut pause = FINISH_PAUSE_MIN;
    let finish = Finish { txn, commit: true };
    loop {
        let deadline = Instant::now() + FINISH_ASK_MAX;
        match ask::leader::<FinishDone>(shared, shard, Kind::Finish, &finish, Bytes::new(), deadline).await {
            Ok((FinishDone { revision }, _)) => return Some(Some((shard, revision))),
            Err(failure) => tracing::debug!(%shard, "a transaction is not finished yet: {failure}"),
        }
        if cell.term() != Some(term) || shared.stop.is_cancelled() {
            return None;
        }
        // Its keyspace was dropped, and what was prepared with it.
        if shared.routes().is_some_and(|routes| routes.map().shard(shard).is_none()) {
            return Some(None);
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(FINISH_PAUSE_MAX);
    }
}

async fn let_go(shared: &Arc<Shared>, txn: TxnId, revisions: Vec<(ShardId, u64)>) {
    let Ok(head) = codec::encode(&LetGo { txn, revisions }) else { return };
    if let Err(failure) = ask::write(shared, txn.shard, WriteKind::LetGo, head.into(), Bytes::new(), None).await {
        tracing::debug!(shard = %txn.shard, "a decision is not let go yet: {failure}");
    }
}
