//! Linearizable reads that cannot use the lease: one round to the followers serves all that wait (Raft, section 6.4 of
//! Ongaro's thesis). Pure.

use crate::replica::Replica;
use shkv_proto::message::Failure;
use std::collections::{BTreeMap, VecDeque};
use tokio::sync::oneshot;

/// How long a round may take before it is asked for again, in nanoseconds: Raft may drop one silently.
const ROUND_TIME_MAX: u64 = 50_000_000;
/// Reads that may wait for one shard.
const WAITING_MAX: usize = 16 << 10;

/// Told when a read may look at the rows.
pub type Barrier = oneshot::Sender<Result<(), Failure>>;

/// The reads of a shard that wait.
#[derive(Debug, Default)]
pub struct Reads {
    /// Not yet in a round.
    waiting: Vec<Barrier>,
    /// The round under way: its token, when it was asked for, and who waits for it.
    round: Option<(u64, u64, Vec<Barrier>)>,
    /// Rounds that are back, by the index that must be applied first.
    confirmed: VecDeque<(u64, Vec<Barrier>)>,
}

impl Reads {
    /// Whether no read waits.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.waiting.is_empty() && self.round.is_none() && self.confirmed.is_empty()
    }

    /// Takes a read in.
    pub fn add(&mut self, barrier: Barrier) {
        if self.waiting.len() >= WAITING_MAX {
            let failure = Failure::Busy { retry_after_ms: 20, text: "too many reads wait for this shard".into() };
            let _ = barrier.send(Err(failure)); // whoever asked may be gone
            return;
        }
        self.waiting.push(barrier);
    }

    /// Asks for a round if one is due. `tokens` gives numbers that are never used twice.
    pub fn ask(&mut self, replica: &mut Replica, tokens: &mut u64, now: u64) {
        if !replica.leads() {
            return;
        }
        let again = match &self.round {
            Some((_, asked, _)) => now.saturating_sub(*asked) > ROUND_TIME_MAX,
            None => !self.waiting.is_empty(),
        };
        if again {
            let mut barriers = self.round.take().map(|(_, _, barriers)| barriers).unwrap_or_default();
            barriers.append(&mut self.waiting);
            *tokens += 1;
            self.round = Some((*tokens, now, barriers));
            replica.read_index(*tokens);
        }
    }

    /// Rounds have come back with the index that each read must wait for.
    pub fn confirm(&mut self, rounds: &[(u64, u64)]) {
        let by_token: BTreeMap<u64, u64> = rounds.iter().copied().collect();
        if let Some((token, _, _)) = &self.round
            && let Some(index) = by_token.get(token)
            && let Some((_, _, barriers)) = self.round.take()
        {
            self.confirmed.push_back((*index, barriers));
        }
    }

    /// Lets the reads go whose index is applied.
    pub fn applied(&mut self, index: u64) {
        while self.confirmed.front().is_some_and(|(needed, _)| *needed <= index) {
            for barrier in self.confirmed.pop_front().map(|(_, barriers)| barriers).unwrap_or_default() {
                let _ = barrier.send(Ok(())); // whoever asked may be gone
            }
        }
    }

    /// Ends all of them.
    pub fn fail(&mut self, failure: &Failure) {
        let round = self.round.take().map(|(_, _, barriers)| barriers).unwrap_or_default();
        let confirmed = self.confirmed.drain(..).flat_map(|(_, barriers)| barriers);
        for barrier in self.waiting.drain(..).chain(round).chain(confirmed) {
            let _ = barrier.send(Err(failure.clone())); // whoever asked may be gone
        }
    }
}
