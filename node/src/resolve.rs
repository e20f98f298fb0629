//! Locks that have been held for too long: what became of their transactions is asked of the shards that decide them.

#![expect(clippy::disallowed_methods, reason = "a shell: tells until when an answer is waited for")]

use crate::ask;
use crate::machine::WriteKind;
use crate::shared::Shared;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::message::{Failure, Finish, Resolve, ResolveDone, TxnId};
use shkv_proto::{Kind, ShardId};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// How long an answer is waited for before the lock is looked at again.
const ASK_TIME_MAX: Duration = Duration::from_millis(400);

/// Asks what became of a transaction that holds locks of a shard which is led here, and lets them go. What fails is tried
/// again by the shard, which keeps an eye on its locks.
pub async fn resolve(shared: Arc<Shared>, shard: ShardId, txn: TxnId) {
    let deadline = Instant::now() + ASK_TIME_MAX;
    let asked = ask::leader(&shared, txn.shard, Kind::Resolve, &Resolve { txn }, Bytes::new(), deadline).await;
    let (ResolveDone { commit }, _) = match asked {
        Ok(answer) => answer,
        Err(failure) => return tracing::debug!(%shard, "a lock is not resolved yet: {failure}"),
    };
    let Ok(head) = codec::encode(&Finish { txn, commit }) else { return };
    match ask::write(&shared, shard, WriteKind::Finish, head.into(), Bytes::new(), None).await {
        Ok(_) => tracing::info!(%shard, commit, "an old lock was resolved"),
        Err(failure) => tracing::debug!(%shard, "an old lock was not let go: {failure}"),
    }
}

/// Says what became of a transaction of a shard that is led here. An entry that decides counts in its transaction's own
/// term only, so the leader of a later one that has applied an entry knows everything that was decided and can be. In its
/// own term the leader itself knows which of its transactions may still be decided.
///
/// # Errors
/// [`Failure::NotLeader`]; [`Failure::Busy`] while it may still be decided.
pub fn answer(shared: &Shared, txn: TxnId) -> Result<ResolveDone, Failure> {
    let Some(cell) = shared.cell(txn.shard) else { return Err(Failure::WrongShard { epoch: shared.epoch() }) };
    let not_leader = || Failure::NotLeader { hint: cell.leader().filter(|node| *node != shared.peers.me()) };
    let term = cell.term().filter(|term| *term >= txn.term).ok_or_else(not_leader)?;
    // Looked at in this order: a transaction leaves the list when its decision is in the view, or can never be.
    if term == txn.term && shared.txns.lock().contains(&txn) {
        return Err(Failure::Busy { retry_after_ms: 50, text: "the transaction is under way".into() });
    }
    let commit = cell.view.read().ledger.decisions.contains_key(&txn);
    Ok(ResolveDone { commit })
}
