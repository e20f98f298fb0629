//! Who a node is: made once, kept in its data directory, never changed. A wiped disk is a new node.
//!
//! What is added to it later is added once and for good: the cluster that it joins, and why that cluster wants it no more.

use crate::StartError;
use crate::ground::{Folder, Ground};
use parking_lot::RwLock;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use shkv_proto::limits::NAME_BYTES_MAX;
use shkv_proto::message::{Failure, RefusalCode};
use shkv_proto::{ClusterId, NodeId, codec, world};
use std::any::Any;
use std::path::Path;
use std::sync::Arc;

const FORMAT: u8 = 2;
const FILE: &str = "identity";

/// A node's identity, and the lock on its data directory.
pub struct Identity {
    ground: Arc<dyn Ground>,
    kept: RwLock<Kept>,
    id: NodeId,
    name: String,
    _lock: Box<dyn Any + Send + Sync>,
}

#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Kept {
    id: NodeId,
    name: String,
    cluster: Option<ClusterId>,
    retired: Option<String>,
}

/// What a data directory says of its node, without opening it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeLook {
    /// The node.
    pub id: NodeId,
    /// Its name.
    pub name: String,
    /// Its cluster, if it has joined one.
    pub cluster: Option<ClusterId>,
    /// Why its cluster wants it no more, if it does not.
    pub retired: Option<String>,
    /// Whether a process holds the directory.
    pub running: bool,
}

impl NodeLook {
    /// Looks at a directory; `None` if it is no node's.
    ///
    /// # Errors
    /// [`StartError`] when there is an identity that cannot be read.
    pub fn at(data: &Path) -> Result<Option<Self>, StartError> {
        let folder = Folder(data.to_owned());
        let Some(kept) = read(&folder)? else { return Ok(None) };
        let Kept { id, name, cluster, retired } = kept;
        Ok(Some(Self { id, name, cluster, retired, running: folder.is_locked() }))
    }
}

impl Identity {
    /// Opens a data directory, or makes it. No other process can open it until this one ends.
    ///
    /// # Errors
    /// [`StartError`] that says what is wrong with the directory.
    pub fn open(ground: Arc<dyn Ground>, name: &str) -> Result<Self, StartError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(|c| c.is_control() || c == '/') {
            return Err(StartError::Name(name.to_owned()));
        }
        let lock = ground.lock()?;
        let data = ground.path();
        let kept = match read(&*ground)? {
            Some(kept) => kept,
            None => {
                let id = NodeId(world::rng().random_range(1..=u64::MAX));
                let kept = Kept { id, name: name.to_owned(), cluster: None, retired: None };
                let at = |error| StartError::Data { data: data.to_owned(), what: "cannot be written to", error };
                write(&*ground, &kept).map_err(at)?;
                kept
            }
        };
        if kept.name != name {
            return Err(StartError::OtherName { data: data.to_owned(), theirs: kept.name, ours: name.to_owned() });
        }
        if let Kept { cluster: Some(cluster), retired: Some(reason), .. } = kept {
            return Err(StartError::Retired { data: data.to_owned(), cluster, reason });
        }
        let (id, name) = (kept.id, kept.name.clone());
        Ok(Self { ground, id, name, kept: RwLock::new(kept), _lock: lock })
    }

    /// The node.
    pub fn id(&self) -> NodeId {
        self.id
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its cluster.
    pub fn cluster(&self) -> Option<ClusterId> {
        self.kept.read().cluster
    }

    /// Why the cluster wants the node no more, if it does not.
    pub fn retired(&self) -> Option<String> {
        self.kept.read().retired.clone()
    }

    /// Remembers for good that the cluster wants the node no more. The first reason stays.
    ///
    /// # Errors
    /// A refusal if the node is in no cluster; [`Failure::Busy`] if it cannot be written down.
    pub fn retire(&self, reason: &str) -> Result<(), Failure> {
        let mut kept = self.kept.write();
        if kept.cluster.is_none() {
            return Err(Failure::refusal(RefusalCode::NotBootstrapped, "this node is in no cluster"));
        }
        if kept.retired.is_some() {
            return Ok(());
        }
        let retired = Kept { retired: Some(reason.to_owned()), ..kept.clone() };
        write(&*self.ground, &retired).map_err(|error| not_written(&error))?;
        *kept = retired;
        Ok(())
    }

    /// Joins a cluster for good. Joining the same again changes nothing.
    ///
    /// # Errors
    /// A refusal if the node is in another cluster; [`Failure::Busy`] if it cannot be written down.
    pub fn join(&self, cluster: ClusterId) -> Result<(), Failure> {
        let mut kept = self.kept.write();
        match kept.cluster {
            Some(ours) if ours == cluster => Ok(()),
            Some(ours) => Err(Failure::refusal(
                RefusalCode::WrongCluster,
                format!("this node is in cluster {ours}, not in {cluster}"),
            )),
            None => {
                let joined = Kept { cluster: Some(cluster), ..kept.clone() };
                // Durable before it is used: a node must not forget which cluster its votes were for.
                write(&*self.ground, &joined).map_err(|error| not_written(&error))?;
                *kept = joined;
                Ok(())
            }
        }
    }
}

fn not_written(error: &std::io::Error) -> Failure {
    Failure::Busy { retry_after_ms: 500, text: format!("{FILE}: {error}") }
}

fn read(ground: &dyn Ground) -> Result<Option<Kept>, StartError> {
    let data = ground.path();
    let failed = |error| StartError::Data { data: data.to_owned(), what: "has an identity that cannot be read", error };
    let Some(bytes) = ground.identity().map_err(failed)? else { return Ok(None) };
    let kept = match bytes.split_first() {
        Some((&FORMAT, body)) => codec::decode::<Kept>(body).ok(),
        Some(_) | None => None,
    };
    kept.map(Some).ok_or_else(|| StartError::Identity(data.to_owned()))
}

fn write(ground: &dyn Ground, kept: &Kept) -> std::io::Result<()> {
    let mut bytes = vec![FORMAT];
    codec::encode_into(kept, &mut bytes).map_err(std::io::Error::other)?;
    ground.set_identity(&bytes)
}
