//! Another system that the same loop is run against, as it is named on the command line.

use super::measure::Outcome;
use super::{Plan, redis};
use std::fmt;

/// Another system.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Peer {
    /// A redis-server, and how many replicas a put waits for.
    Redis(String, u32),
    /// The members of an etcd cluster.
    #[cfg(feature = "etcd")]
    Etcd(Vec<String>),
}

/// Reads a name.
///
/// # Errors
/// What is wrong with it.
pub fn parse(text: &str) -> Result<Peer, String> {
    if let Some(rest) = text.strip_prefix("redis://") {
        let (addr, wait) = match rest.split_once("?wait=") {
            Some((addr, wait)) => (addr, wait.parse().map_err(|_| format!("{wait:?} is no number of replicas"))?),
            None => (rest, 0),
        };
        return Ok(Peer::Redis(addr.to_owned(), wait));
    }
    #[cfg(feature = "etcd")]
    if let Some(rest) = text.strip_prefix("etcd://") {
        return Ok(Peer::Etcd(rest.split(',').map(str::to_owned).collect()));
    }
    let etcd = if cfg!(feature = "etcd") { "or etcd://" } else { "(this build lacks the feature `etcd`)" };
    Err(format!("a peer begins with redis:// {etcd}"))
}

impl Peer {
    /// Runs the plan against it.
    ///
    /// # Errors
    /// When it cannot be reached, or does not keep what was loaded.
    pub async fn run(&self, plan: &Plan) -> anyhow::Result<Outcome> {
        match self {
            Self::Redis(addr, wait) => redis::run(addr, *wait, plan).await,
            #[cfg(feature = "etcd")]
            Self::Etcd(addrs) => super::etcd::run(addrs, plan).await,
        }
    }
}

impl fmt::Display for Peer {
    fn fmt(&self, to: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Redis(addr, 0) => write!(to, "redis://{addr}"),
            Self::Redis(addr, wait) => write!(to, "redis://{addr}?wait={wait}"),
            #[cfg(feature = "etcd")]
            Self::Etcd(addrs) => write!(to, "etcd://{}", addrs.join(",")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_read_as_they_are_written() {
        for name in ["redis://127.0.0.1:6379", "redis://h:1?wait=2"] {
            assert_eq!(parse(name).unwrap().to_string(), name);
        }
        assert_eq!(parse("redis://h:1?wait=2"), Ok(Peer::Redis("h:1".into(), 2)));
        assert!(parse("redis://h:1?wait=x").unwrap_err().contains("\"x\""));
        assert!(parse("mysql://h:1").unwrap_err().contains("redis://"));
        #[cfg(feature = "etcd")]
        assert_eq!(parse("etcd://a:1,b:2"), Ok(Peer::Etcd(vec!["a:1".into(), "b:2".into()])));
    }
}
