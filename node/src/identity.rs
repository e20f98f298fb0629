//! Who a node is: made once, kept in its data directory, never changed. A wiped disk is a new node.
//!
//! What is added to it later is added once and for good: the cluster that it joins, and why that cluster wants it no more.

#![expect(clippy::disallowed_methods, reason = "a shell: reads and writes the data directory, and draws the node's id")]

use crate::StartError;
use crate::disk::sync_folder;
use parking_lot::RwLock;
use rand::RngExt;
use serde::{Deserialize, Serialize};
use shkv_proto::limits::NAME_BYTES_MAX;
use shkv_proto::message::{Failure, RefusalCode};
use shkv_proto::{ClusterId, NodeId, codec};
use std::fs::{File, OpenOptions};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

const FORMAT: u8 = 2;
const FILE: &str = "identity";
const LOCK: &str = "lock";
/// How often the lock is tried: somebody who only looks ([`NodeLook`]) holds it for a moment.
const LOCK_TRIES: u32 = 5;
const LOCK_RETRY: Duration = Duration::from_millis(20);

/// A node's identity, and the lock on its data directory.
#[derive(Debug)]
pub struct Identity {
    data: PathBuf,
    kept: RwLock<Kept>,
    id: NodeId,
    name: String,
    _lock: File,
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
        let Some(kept) = read(data)? else { return Ok(None) };
        let Kept { id, name, cluster, retired } = kept;
        let running = match File::open(data.join(LOCK)) {
            Ok(lock) => try_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockShared).is_err(),
            Err(_) => false,
        };
        Ok(Some(Self { id, name, cluster, retired, running }))
    }
}

impl Identity {
    /// Opens a data directory, or makes it. No other process can open it until this one ends.
    ///
    /// # Errors
    /// [`StartError`] that says what is wrong with the directory.
    pub fn open(data: &Path, name: &str) -> Result<Self, StartError> {
        if name.is_empty() || name.len() > NAME_BYTES_MAX || name.chars().any(|c| c.is_control() || c == '/') {
            return Err(StartError::Name(name.to_owned()));
        }
        let at = |what: &'static str| move |error| StartError::Data { data: data.to_owned(), what, error };
        std::fs::create_dir_all(data).map_err(at("cannot be made"))?;
        let lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .open(data.join(LOCK))
            .map_err(at("cannot be written to"))?;
        let mut tries = 1;
        while let Err(error) = try_lock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
            if tries == LOCK_TRIES {
                tracing::debug!("{}: {error}", data.display());
                return Err(StartError::Locked(data.to_owned()));
            }
            tries += 1;
            std::thread::sleep(LOCK_RETRY);
        }
        let kept = match read(data)? {
            Some(kept) => kept,
            None => {
                let id = NodeId(rand::rng().random_range(1..=u64::MAX));
                let kept = Kept { id, name: name.to_owned(), cluster: None, retired: None };
                write(data, &kept).map_err(at("cannot be written to"))?;
                kept
            }
        };
        if kept.name != name {
            return Err(StartError::OtherName { data: data.to_owned(), theirs: kept.name, ours: name.to_owned() });
        }
        if let Kept { cluster: Some(cluster), retired: Some(reason), .. } = kept {
            return Err(StartError::Retired { data: data.to_owned(), cluster, reason });
        }
        Ok(Self { data: data.to_owned(), id: kept.id, name: kept.name.clone(), kept: RwLock::new(kept), _lock: lock })
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
        write(&self.data, &retired).map_err(|error| not_written(&error))?;
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
                write(&self.data, &joined).map_err(|error| not_written(&error))?;
                *kept = joined;
                Ok(())
            }
        }
    }
}

fn not_written(error: &std::io::Error) -> Failure {
    Failure::Busy { retry_after_ms: 500, text: format!("{FILE}: {error}") }
}

fn try_lock(lock: &File, operation: rustix::fs::FlockOperation) -> std::io::Result<()> {
    Ok(rustix::fs::flock(lock, operation)?)
}

fn read(data: &Path) -> Result<Option<Kept>, StartError> {
    let failed = |error| StartError::Data { data: data.to_owned(), what: "has an identity that cannot be read", error };
    let mut bytes = Vec::new();
    match File::open(data.join(FILE)) {
        Ok(mut file) => file.read_to_end(&mut bytes).map_err(failed)?,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
    };
    let kept = match bytes.split_first() {
        Some((&FORMAT, body)) => codec::decode::<Kept>(body).ok(),
        Some(_) | None => None,
    };
    kept.map(Some).ok_or_else(|| StartError::Identity(data.to_owned()))
}

/// Writes the file beside the old one and then in its place, so that there is a whole one at every moment.
fn write(data: &Path, kept: &Kept) -> std::io::Result<()> {
    let mut bytes = vec![FORMAT];
    codec::encode_into(kept, &mut bytes).map_err(std::io::Error::other)?;
    let beside = data.join("identity.new");
    let mut file = OpenOptions::new().create(true).truncate(true).write(true).open(&beside)?;
    file.write_all(&bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, data.join(FILE))?;
    sync_folder(data)
}
