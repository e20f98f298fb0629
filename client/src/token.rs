//! What a caller has seen: a revision for each shard. It makes reads from any replica causal. Pure.

use shkv_proto::ShardId;
use shkv_proto::limits::MAP_SHARDS_MAX;
use shkv_proto::message;
use std::collections::BTreeMap;
use std::fmt;
use std::str::FromStr;

/// How a token's text begins; a later form gets another number.
const TEXT_PREFIX: &str = "shkv1";

/// How fresh a read must be.
///
/// ```
/// use shkv_client::Consistency;
///
/// assert_eq!(Consistency::default(), Consistency::Linearizable);
/// ```
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Default)]
pub enum Consistency {
    /// Sees every write that was acknowledged before the read began.
    #[default]
    Linearizable,
    /// From any replica that has caught up with the client's [`Token`]: it sees at least what the client has seen.
    Causal,
    /// From any replica, whatever it has.
    Eventual,
}

impl From<message::Consistency> for Consistency {
    fn from(told: message::Consistency) -> Self {
        match told {
            message::Consistency::Linearizable => Self::Linearizable,
            message::Consistency::Causal { .. } => Self::Causal,
            message::Consistency::Eventual => Self::Eventual,
        }
    }
}

/// A set of (shard, revision): what its owner has seen.
///
/// Two tokens are merged by taking the higher revision of each shard. The text form can be handed to another process.
/// A token is only of use in the cluster that it comes from.
///
/// ```
/// use shkv_client::Token;
///
/// let mut mine: Token = "shkv1.1:40.2:7".parse().unwrap();
/// let theirs: Token = "shkv1.1:38.3:9".parse().unwrap();
/// mine.merge(&theirs);
/// assert_eq!(mine.to_string(), "shkv1.1:40.2:7.3:9");
/// ```
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Token {
    seen: BTreeMap<u32, u64>,
}

/// A text that is no token.
///
/// ```
/// let error = "nonsense".parse::<shkv_client::Token>().unwrap_err();
/// assert!(error.to_string().contains("nonsense"));
/// ```
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error(
    "{0:?} is no token: it should look like {TEXT_PREFIX}.1:40.2:7, that is shard:revision, as told by an earlier call"
)]
pub struct TokenError(String);

impl Token {
    /// The highest revision seen of a shard; 0 when none was.
    ///
    /// ```
    /// let token: shkv_client::Token = "shkv1.1:40".parse().unwrap();
    /// assert_eq!((token.revision(1), token.revision(2)), (40, 0));
    /// ```
    #[must_use]
    pub fn revision(&self, shard: u32) -> u64 {
        self.seen.get(&shard).copied().unwrap_or(0)
    }

    /// Takes in what another token has seen.
    ///
    /// ```
    /// let mut token = shkv_client::Token::default();
    /// token.merge(&"shkv1.4:2".parse().unwrap());
    /// assert_eq!(token.revision(4), 2);
    /// ```
    pub fn merge(&mut self, other: &Self) {
        for (shard, revision) in &other.seen {
            self.see(ShardId(*shard), *revision);
        }
    }

    /// Takes in one revision. Revision 0 says nothing and leaves no trace.
    pub(crate) fn see(&mut self, shard: ShardId, revision: u64) {
        if revision > 0 {
            let seen = self.seen.entry(shard.0).or_default();
            *seen = revision.max(*seen);
        }
    }
}

impl fmt::Display for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(TEXT_PREFIX)?;
        self.seen.iter().try_for_each(|(shard, revision)| write!(f, ".{shard}:{revision}"))
    }
}

impl FromStr for Token {
    type Err = TokenError;

    fn from_str(text: &str) -> Result<Self, TokenError> {
        let error = || TokenError(text.chars().take(64).collect());
        let mut pieces = text.trim().split('.');
        if pieces.next() != Some(TEXT_PREFIX) {
            return Err(error());
        }
        let mut token = Self::default();
        for piece in pieces {
            let (shard, revision) = piece.split_once(':').ok_or_else(error)?;
            let shard = ShardId(shard.parse().map_err(|_| error())?);
            token.see(shard, revision.parse().map_err(|_| error())?);
            if token.seen.len() > MAP_SHARDS_MAX {
                return Err(error());
            }
        }
        Ok(token)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn merging_keeps_the_higher_revision_of_each_shard() {
        let parse = |text: &str| text.parse::<Token>().unwrap();
        for (one, other) in [("shkv1.1:5.2:1", "shkv1.1:3.3:9"), ("shkv1", "shkv1.1:5.2:1.3:9")] {
            let (mut left, mut right) = (parse(one), parse(other));
            left.merge(&parse(other));
            right.merge(&parse(one));
            assert_eq!(left, right, "order does not matter");
            assert_eq!(left.to_string(), "shkv1.1:5.2:1.3:9");
        }
    }

    #[test]
    fn a_text_that_is_no_token_is_refused() {
        for text in ["", "shkv2.1:1", "shkv1.1", "shkv1.a:1", "shkv1.1:-1", "shkv1..", "1:1", "shkv1.4294967296:1"] {
            assert!(text.parse::<Token>().is_err(), "{text}");
        }
    }
}
