//! The client: where it connects to, what it has seen, and the keyspaces that it opens.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and waits")]

use crate::call::Span;
use crate::error::Error;
use crate::inner::{Inner, check_map, first_map, open_home, question};
use crate::keyspace::Keyspace;
use crate::token::Token;
use shkv_proto::frame::Kind;
use shkv_proto::ids::ClusterId;
use shkv_proto::limits::Limits;
use shkv_proto::link::{CallError, Link, LinkError};
use shkv_proto::message::{RefusalCode, StatusDone};
use shkv_proto::retry::{self, Step};
use std::sync::Arc;
use std::time::Duration;
use tokio::time::Instant;

/// Most connections that a client opens to one node.
///
/// ```
/// assert!(shkv_client::ClientConfig::default().links_per_node <= shkv_client::LINKS_PER_NODE_MAX);
/// ```
pub const LINKS_PER_NODE_MAX: usize = 8;
/// Most addresses that a client can be given.
const HOMES_MAX: usize = 16;
/// How a client behaves.
///
/// ```
/// use shkv_client::ClientConfig;
/// use std::time::Duration;
///
/// let config = ClientConfig { deadline: Duration::from_secs(1), ..ClientConfig::default() };
/// assert!(!config.through_balancer);
/// ```
#[derive(Clone, Debug)]
pub struct ClientConfig {
    /// How long a call may take that names no deadline of its own; at most an hour.
    pub deadline: Duration,
    /// The cluster that is meant; `None` takes the one that answers, and stays with it.
    pub cluster: Option<ClusterId>,
    /// Never talk to nodes directly.
    pub through_balancer: bool,
    /// Connections to each node, from 1 to [`LINKS_PER_NODE_MAX`]; many requests share one.
    pub links_per_node: usize,
}

impl Default for ClientConfig {
    fn default() -> Self {
        Self { deadline: Duration::from_secs(5), cluster: None, through_balancer: false, links_per_node: 1 }
    }
}

/// A client of one cluster. Cloning it is cheap, and the clones share connections, map and token.
///
/// ```no_run
/// # async fn example() -> Result<(), shkv_client::Error> {
/// let client = shkv_client::Client::connect(["10.0.0.1:7400", "10.0.0.2:7400"]).await?;
/// client.put("k", "v").await?;
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug)]
pub struct Client {
    inner: Arc<Inner>,
}

impl Client {
    /// Connects to a cluster by the addresses (`host:port`) of one or several of its balancers or nodes.
    ///
    /// # Errors
    /// [`Error::Unavailable`] when nobody answers at any of the addresses, [`Error::Refused`] when what answers is of
    /// another cluster, of another protocol version, or in no cluster yet.
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), shkv_client::Error> {
    /// let client = shkv_client::Client::connect(["127.0.0.1:7400"]).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect<A: Into<String>>(addrs: impl IntoIterator<Item = A>) -> Result<Self, Error> {
        Self::connect_with(addrs, ClientConfig::default()).await
    }

    /// Like [`Client::connect`], with a configuration. [`ClientConfig::deadline`] bounds the connecting, too.
    ///
    /// # Errors
    /// As [`Client::connect`].
    ///
    /// ```no_run
    /// # async fn example() -> Result<(), shkv_client::Error> {
    /// use shkv_client::{Client, ClientConfig};
    ///
    /// let config = ClientConfig { through_balancer: true, ..ClientConfig::default() };
    /// let client = Client::connect_with(["127.0.0.1:7400"], config).await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn connect_with<A: Into<String>>(
        addrs: impl IntoIterator<Item = A>,
        mut config: ClientConfig,
    ) -> Result<Self, Error> {
        config.links_per_node = config.links_per_node.clamp(1, LINKS_PER_NODE_MAX);
        let deadline = Span::of(config.deadline).deadline;
        let cluster = config.cluster;
        let homes: Vec<Link> = addrs.into_iter().take(HOMES_MAX).map(|addr| open_home(addr.into(), cluster)).collect();
        if homes.is_empty() {
            return Err(Error::refused(RefusalCode::Malformed, "no address to connect to"));
        }
        let mut tries = 0;
        let (done, limits) = loop {
            tries += 1;
            let error = match first_map(homes.iter(), deadline).await {
                Ok(found) => break found,
                // Nobody is there: waiting would not help.
                Err(CallError::Link(LinkError::NotSent(why))) => return Err(Error::unavailable(why)),
                Err(error) => error,
            };
            match retry::after(&error, false, tries) {
                Step::Stop(failure) => return Err(failure.into()),
                Step::Again { after, .. } if Instant::now() + after < deadline => tokio::time::sleep(after).await,
                Step::Again { .. } => return Err(retry::out_of_time(&error, false).into()),
            }
        };
        check_map(&done, cluster)?;
        let inner = Inner::new(config, homes, done, limits);
        Ok(Self { inner: Arc::new(inner) })
    }

    pub(crate) fn inner(&self) -> &Inner {
        &self.inner
    }

    /// The keyspace of this name. The map is fetched anew once when it does not know the name.
    ///
    /// # Errors
    /// [`Error::Refused`] with [`RefusalCode::UnknownKeyspace`], or [`Error::Unavailable`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// let users = client.keyspace("users").await?;
    /// # Ok(())
    /// # }
    /// ```
    pub async fn keyspace(&self, name: &str) -> Result<Keyspace, Error> {
        let id = self.inner.find_keyspace(name, Span::of(self.inner.config.deadline).deadline).await?;
        Ok(Keyspace::new(self.inner.clone(), Some(id)))
    }

    /// The keyspace `default`. It is looked up when it is first used.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// client.default_keyspace().put("k", "v").await?;
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn default_keyspace(&self) -> Keyspace {
        Keyspace::new(self.inner.clone(), self.inner.default_keyspace.get().copied())
    }

    /// What the cluster can say of itself: the map and the state of each node.
    ///
    /// # Errors
    /// [`Error::Unavailable`] or [`Error::Refused`].
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// for (id, node) in client.status().await?.nodes {
    ///     println!("{id}: {}", node.map_or_else(|why| why, |node| node.name));
    /// }
    /// # Ok(())
    /// # }
    /// ```
    pub async fn status(&self) -> Result<StatusDone, Error> {
        let deadline = Span::of(self.inner.config.deadline).deadline;
        let mut tries = 0;
        loop {
            tries += 1;
            let error = match question::<StatusDone>(self.inner.home(), Kind::Status, deadline).await {
                Ok((status, _)) => return Ok(status),
                Err(error) => error,
            };
            if matches!(error, CallError::Link(_)) {
                self.inner.next_home();
            }
            match retry::after(&error, false, tries) {
                Step::Stop(failure) => return Err(failure.into()),
                Step::Again { after, .. } if Instant::now() + after < deadline => tokio::time::sleep(after).await,
                Step::Again { .. } => return Err(retry::out_of_time(&error, false).into()),
            }
        }
    }

    /// The limits that the cluster told in the handshake. Calls over them are refused before anything is sent.
    ///
    /// ```no_run
    /// # fn example(client: shkv_client::Client) {
    /// println!("a value may have {} bytes", client.limits().value_bytes_max);
    /// # }
    /// ```
    #[must_use]
    pub fn limits(&self) -> Limits {
        *self.inner.limits()
    }

    /// The cluster that the client is connected to.
    ///
    /// ```no_run
    /// # fn example(client: shkv_client::Client) {
    /// println!("cluster {}", client.cluster());
    /// # }
    /// ```
    #[must_use]
    pub fn cluster(&self) -> ClusterId {
        self.inner.view().routes.map().cluster
    }

    /// What this client has seen so far, to be handed to another that must not see less.
    ///
    /// ```no_run
    /// # async fn example(mine: shkv_client::Client, theirs: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// use shkv_client::Consistency;
    ///
    /// mine.put("k", "v").await?;
    /// theirs.observe(&mine.token());
    /// assert!(theirs.get("k").consistency(Consistency::Causal).await?.is_some());
    /// # Ok(())
    /// # }
    /// ```
    #[must_use]
    pub fn token(&self) -> Token {
        self.inner.token()
    }

    /// From now on causal reads see at least what `token` has seen.
    ///
    /// ```no_run
    /// # fn example(client: shkv_client::Client) {
    /// client.observe(&"shkv1.1:40".parse().unwrap());
    /// # }
    /// ```
    pub fn observe(&self, token: &Token) {
        self.inner.observe(token);
    }
}
