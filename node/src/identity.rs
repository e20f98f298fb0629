//! Who a node is: made once, kept in its data directory, never changed. A wiped disk is a new node.

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

const FORMAT: u8 = 1;
const FILE: &str = "identity";
const LOCK: &str = "lock";

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
        rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive)
            .map_err(|_| StartError::Locked(data.to_owned()))?;
        let kept = match File::open(data.join(FILE)) {
            Ok(mut file) => {
                let mut bytes = Vec::new();
                file.read_to_end(&mut bytes).map_err(at("has an identity that cannot be read"))?;
                match bytes.split_first() {
                    Some((&FORMAT, body)) => {
                        codec::decode::<Kept>(body).map_err(|_| StartError::Identity(data.to_owned()))?
                    }
                    _ => return Err(StartError::Identity(data.to_owned())),
                }
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                let id = NodeId(rand::rng().random_range(1..=u64::MAX));
                let kept = Kept { id, name: name.to_owned(), cluster: None };
                write(data, &kept).map_err(at("cannot be written to"))?;
                kept
            }
            Err(error) => return Err(at("has an identity that cannot be read")(error)),
        };
        if kept.name != name {
            return Err(StartError::OtherName { data: data.to_owned(), theirs: kept.name, ours: name.to_owned() });
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
                write(&self.data, &joined)
                    .map_err(|error| Failure::Busy { retry_after_ms: 500, text: format!("{FILE}: {error}") })?;
                *kept = joined;
                Ok(())
            }
        }
    }
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
