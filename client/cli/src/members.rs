//! A node of `up`, in this process or in one of its own, started again on its old data when it ends by itself.

#![expect(clippy::disallowed_methods, reason = "a shell: waits before a node is started again, and tells the time")]

use crate::args::{Spawn, Tuning};
use crate::children::{Adopted, Child};
use crate::roles::tuning_of;
use serde::{Deserialize, Serialize};
use shkv_node::{Node, NodeConfig, NodeLook};
use shkv_proto::NodeId;
use std::path::{Path, PathBuf};
use std::time::Duration;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// First pause before a node is started again; it doubles up to [`PAUSE_MAX`].
const PAUSE_MIN: Duration = Duration::from_millis(50);
/// Longest pause before a node is started again.
const PAUSE_MAX: Duration = Duration::from_secs(5);
/// A node that ran this long is not one that dies at once: the pause is short again.
const RAN_WELL: Duration = Duration::from_secs(20);

/// What is needed to start a node.
#[derive(Clone, Debug)]
pub struct Member {
    pub name: String,
    pub data: PathBuf,
    pub spawn: Spawn,
    pub tuning: Tuning,
    /// By which name the provisioner knows it.
    pub instance: String,
    /// Addresses of balancers at which it registers.
    pub join: Vec<String>,
    /// Whether it goes on when this process ends.
    pub outlive: bool,
}

/// What a node that has started tells of itself: the first line that `shkv node --output json` prints.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Told {
    pub name: String,
    /// The node's id, in hexadecimal: JavaScript's numbers do not hold it.
    pub id: String,
    pub addr: String,
    pub data: PathBuf,
    pub pid: u32,
    /// Where its own HTTP listener is, if it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub http: Option<String>,
}

impl Told {
    /// The node's id.
    pub fn node(&self) -> Result<NodeId, String> {
        u64::from_str_radix(&self.id, 16).map(NodeId).map_err(|error| format!("node id {:?}: {error}", self.id))
    }
}

/// A node that runs.
pub enum Running {
    Embedded(Box<Node>),
    Process(Box<Child>),
    Adopted(Adopted),
}

impl Member {
    /// Starts it.
    pub async fn start(&self) -> Result<(Running, Told), String> {
        match self.spawn {
            Spawn::Embedded => {
                let config = NodeConfig {
                    join: self.join.clone(),
                    instance: self.instance.clone(),
                    tuning: tuning_of(&self.tuning),
                    ..NodeConfig::new(&self.name, &self.data, "127.0.0.1:0")
                };
                let node = Node::start(config).await.map_err(|error| error.to_string())?;
                let told = told_of(&node, &self.name, &self.data);
                Ok((Running::Embedded(Box::new(node)), told))
            }
            Spawn::Process => {
                let (child, told) = Child::start(self).await?;
                Ok((Running::Process(Box::new(child)), told))
            }
        }
    }

    /// Keeps it running until `stop`, and says by `moved` where it is each time that it was started again.
    pub async fn keep(self, running: Running, moved: mpsc::Sender<Told>, stop: CancellationToken) {
        let mut pause = PAUSE_MIN;
        let mut running = Some(running);
        let mut since = Instant::now();
        loop {
            if let Some(mut now) = running.take() {
                let why = tokio::select! { // ended() is cancel-safe: it only looks
                    why = now.ended() => why,
                    () = stop.cancelled() => return now.stop().await,
                };
                if let Ok(Some(NodeLook { retired: Some(reason), .. })) = NodeLook::at(&self.data) {
                    return info!(node = self.name, reason, "the node is of the cluster no more");
                }
                warn!(node = self.name, why, "the node has ended by itself and is started again");
                drop(now); // not stopped: what has failed has nothing left to finish, and its log recovers it
                if since.elapsed() > RAN_WELL {
                    pause = PAUSE_MIN;
                }
            }
            tokio::select! { // both arms are cancel-safe
                () = tokio::time::sleep(pause) => {}
                () = stop.cancelled() => return,
            }
            pause = (pause * 2).min(PAUSE_MAX);
            match self.start().await {
                Ok((again, told)) => {
                    info!(node = self.name, addr = told.addr, "the node runs again");
                    (running, since) = (Some(again), Instant::now());
                    let _ = moved.send(told).await; // nobody listens any more when everything stops
                }
                Err(error) => warn!(node = self.name, error, "the node does not start"),
            }
        }
    }
}

impl Running {
    /// Waits until it has ended by itself; says why.
    async fn ended(&mut self) -> String {
        match self {
            Self::Embedded(node) => node.failed().await,
            Self::Process(child) => child.ended().await,
            Self::Adopted(adopted) => adopted.ended().await,
        }
    }

    /// Stops it in order.
    pub async fn stop(self) {
        match self {
            Self::Embedded(node) => node.stop().await,
            Self::Process(child) => child.stop().await,
            Self::Adopted(adopted) => adopted.stop().await,
        }
    }

    /// The node that runs on a data directory, started by a process that is gone.
    pub fn adopted(data: &Path) -> Result<Self, String> {
        Adopted::at(data).map(Self::Adopted)
    }
}

/// What a node of this process has to tell.
pub fn told_of(node: &Node, name: &str, data: &Path) -> Told {
    Told {
        name: name.to_owned(),
        id: node.id().to_string(),
        addr: node.addr().to_string(),
        data: data.to_owned(),
        pid: std::process::id(),
        http: None,
    }
}
