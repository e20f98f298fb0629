//! Nodes on this machine, in this process or in processes of their own: a provisioner for the balancer.
//!
//! Every instance is a folder of one data directory. A node that ends by itself is started again on its own data; only
//! one that cannot be brought back is replaced, by the controller, with another instance.

#![expect(clippy::disallowed_methods, reason = "a shell: a task watches each node")]

use crate::args::{Spawn, Tuning};
use crate::members::{Member, Running, Told};
use parking_lot::Mutex;
use shkv_balancer::provision::{Answer, Instance, ProvisionError, Provisioner, Spec};
use shkv_node::NodeLook;
use shkv_proto::ClusterId;
use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

/// Restarted nodes that may wait to be told to the balancer.
const MOVED_MAX: usize = 64;

/// Nodes on this machine.
#[derive(Debug)]
pub struct Local {
    data: PathBuf,
    spawn: Spawn,
    tuning: Tuning,
    /// Whether nodes go on when this process ends.
    outlive: bool,
    kept: Mutex<BTreeMap<String, Kept>>,
    moved: mpsc::Sender<Told>,
}

/// A node that is kept running.
#[derive(Debug)]
struct Kept {
    stop: CancellationToken,
    task: JoinHandle<()>,
}

/// A folder of the data directory with a node's identity in it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Found {
    /// The folder's name.
    pub instance: String,
    /// The node's name.
    pub name: String,
    /// The cluster that it is in.
    pub cluster: Option<ClusterId>,
    /// Why it is of the cluster no more, if it is not.
    pub retired: Option<String>,
    /// Whether a process has it.
    pub running: bool,
}

impl Local {
    /// No node yet. What is received tells of nodes that were started again, and where they are now.
    pub fn new(data: PathBuf, spawn: Spawn, tuning: Tuning, outlive: bool) -> (Self, mpsc::Receiver<Told>) {
        let (moved, receiver) = mpsc::channel(MOVED_MAX);
        (Self { data, spawn, tuning, outlive, kept: Mutex::default(), moved }, receiver)
    }

    /// Starts a node and keeps it running. If it does not start, a folder that was made for it is removed again.
    pub async fn run(&self, instance: &str, name: &str, join: &[String]) -> Result<Told, String> {
        let data = self.folder(instance)?;
        let is_new = !data.exists();
        let member = Member {
            name: name.to_owned(),
            data: data.clone(),
            spawn: self.spawn,
            tuning: self.tuning.clone(),
            instance: instance.to_owned(),
            join: join.to_vec(),
            outlive: self.outlive,
        };
        match member.start().await {
            Ok((running, told)) => {
                self.keep(member, running);
                Ok(told)
            }
            Err(error) => {
                if is_new {
                    let _ = std::fs::remove_dir_all(&data); // what cannot be removed will be found by its name
                }
                Err(format!("{name}: {error}"))
            }
        }
    }

    fn keep(&self, member: Member, running: Running) {
        let stop = CancellationToken::new();
        let instance = member.instance.clone();
        let task = tokio::spawn(member.keep(running, self.moved.clone(), stop.clone()));
        self.kept.lock().insert(instance, Kept { stop, task });
    }

    /// Goes on looking after a node that outlived the process that started it.
    pub fn adopt(&self, found: &Found, join: &[String]) -> Result<(), String> {
        let data = self.folder(&found.instance)?;
        let member = Member {
            name: found.name.clone(),
            data: data.clone(),
            spawn: self.spawn,
            tuning: self.tuning.clone(),
            instance: found.instance.clone(),
            join: join.to_vec(),
            outlive: self.outlive,
        };
        self.keep(member, Running::adopted(&data)?);
        Ok(())
    }

    /// Stops all nodes at the same time; those that are to outlive this process are left alone.
    pub async fn stop(&self) {
        let kept = std::mem::take(&mut *self.kept.lock());
        if self.outlive {
            return kept.values().for_each(|kept| kept.task.abort());
        }
        kept.values().for_each(|kept| kept.stop.cancel());
        for kept in kept.into_values() {
            let _ = kept.task.await; // it ends by itself; a panic in it was already told
        }
    }

    fn folder(&self, instance: &str) -> Result<PathBuf, String> {
        if instance.is_empty() || instance.starts_with('.') || instance.contains(['/', '\0']) {
            return Err(format!("{instance:?} cannot be the name of a folder"));
        }
        Ok(self.data.join(instance))
    }

    async fn remove_instance(&self, instance: &str) -> Result<(), ProvisionError> {
        let data = self.folder(instance).map_err(ProvisionError)?;
        let kept = self.kept.lock().remove(instance);
        if let Some(kept) = kept {
            kept.stop.cancel();
            let _ = kept.task.await; // it ends by itself
        }
        match std::fs::remove_dir_all(&data) {
            Ok(()) => Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            Err(error) => Err(ProvisionError(format!("cannot remove {}: {error}", data.display()))),
        }
    }
}

impl Provisioner for Local {
    fn kind(&self) -> &'static str {
        match self.spawn {
            Spawn::Embedded => "embedded",
            Spawn::Process => "process",
        }
    }

    fn list(&self, cluster: ClusterId) -> Answer<'_, Vec<Instance>> {
        Box::pin(async move {
            let found = found_in(&self.data).map_err(ProvisionError)?;
            let kept = self.kept.lock();
            let instance = |found: Found| Instance {
                running: kept.contains_key(&found.instance),
                instance: found.instance,
                name: found.name,
            };
            // A folder that was retired holds nothing that is of any use to the cluster.
            let ours = |found: &Found| found.cluster.is_none_or(|of| of == cluster) && found.retired.is_none();
            Ok(found.into_iter().filter(ours).map(instance).collect())
        })
    }

    fn start<'a>(&'a self, spec: &'a Spec) -> Answer<'a, ()> {
        Box::pin(async move {
            if self.kept.lock().contains_key(&spec.instance) {
                return Ok(());
            }
            self.run(&spec.instance, &spec.name, &spec.join).await.map(drop).map_err(ProvisionError)
        })
    }

    fn remove<'a>(&'a self, _cluster: ClusterId, instance: &'a str) -> Answer<'a, ()> {
        Box::pin(self.remove_instance(instance))
    }
}

/// The nodes whose data is in a directory, in the order of their instances.
pub fn found_in(data: &Path) -> Result<Vec<Found>, String> {
    let entries = match std::fs::read_dir(data) {
        Ok(entries) => entries,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(format!("cannot read the data directory {}: {error}", data.display())),
    };
    let mut found = Vec::new();
    for entry in entries.filter_map(Result::ok).filter(|entry| entry.path().is_dir()) {
        let Ok(instance) = entry.file_name().into_string() else { continue };
        match NodeLook::at(&entry.path()) {
            Ok(Some(NodeLook { name, cluster, retired, running, .. })) => {
                found.push(Found { instance, name, cluster, retired, running });
            }
            Ok(None) => {}
            // It is there, and cannot run: whoever starts it will be told why.
            Err(error) => {
                tracing::debug!(instance, %error, "a node's folder cannot be read");
                found.push(Found { name: instance.clone(), instance, cluster: None, retired: None, running: false });
            }
        }
    }
    found.sort_by_key(|found| natural(&found.instance));
    Ok(found)
}

/// An order in which `Server10` comes behind `Server9`.
fn natural(text: &str) -> (String, u64, String) {
    let head = text.trim_end_matches(|c: char| c.is_ascii_digit());
    (head.to_owned(), text[head.len()..].parse().unwrap_or(0), text.to_owned())
}
