//! Are transactions over several rows strictly serializable? Judged over a small set of accounts on the product of their
//! states: transfers that must be taken whole or not at all, and reads of several accounts at one moment.

use super::search::{Event, Model, Verdict, search};

/// What was asked, and what was answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Op {
    /// Accounts with their balances, all of one moment.
    Read(Vec<(usize, i64)>),
    /// Money moved, if the first account has enough of it.
    Transfer {
        /// From which account.
        from: usize,
        /// To which.
        to: usize,
        /// How much.
        amount: i64,
        /// Whether it was moved; `None` if that is unknown.
        done: Option<bool>,
    },
}

/// Accounts that begin with these balances.
#[derive(Clone, Debug)]
pub struct Bank(pub Vec<i64>);

impl Model for Bank {
    type Op = Op;
    type State = Vec<i64>;

    fn start(&self) -> Vec<i64> {
        self.0.clone()
    }

    fn step(&self, state: &Vec<i64>, op: &Op) -> Option<Vec<i64>> {
        match op {
            Op::Read(found) => found.iter().all(|(at, balance)| state[*at] == *balance).then(|| state.clone()),
            Op::Transfer { from, to, amount, done } => {
                let enough = state[*from] >= *amount;
                match done {
                    Some(false) => (!enough).then(|| state.clone()),
                    Some(true) | None => enough.then(|| {
                        let mut next = state.clone();
                        next[*from] -= amount;
                        next[*to] += amount;
                        next
                    }),
                }
            }
        }
    }
}

/// Judges a history of transfers and reads.
#[must_use]
pub fn judge(bank: &Bank, events: &[Event<Op>]) -> Verdict {
    let total: i64 = bank.0.iter().sum();
    for event in events {
        // Said apart from the search, because it says what is wrong in one line.
        if let Op::Read(found) = &event.op
            && found.len() == bank.0.len()
            && found.iter().map(|(_, balance)| balance).sum::<i64>() != total
        {
            return Verdict::Wrong(format!("a read shows half a transfer: {found:?} does not make {total}"));
        }
    }
    search(bank, events)
}
