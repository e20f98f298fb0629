//! How a balancer gets nodes: it asks a [`Provisioner`] to start and to stop them. Each kind is a file of its own; those
//! that run nodes on this machine come from whoever starts the balancer, because a balancer knows nothing of nodes.
//!
//! An instance is one data directory or volume and what runs on it. A node that is replaced gets a new instance, because
//! a new identity needs new data; a node that is started again keeps its own.

pub mod docker;

use shkv_proto::ClusterId;
use std::fmt::Debug;
use std::future::Future;
use std::pin::Pin;

/// What a provisioner answers, some time.
pub type Answer<'a, T> = Pin<Box<dyn Future<Output = Result<T, ProvisionError>> + Send + 'a>>;

/// Why a provisioner cannot do what was asked: what is missing, where, and what to do about it.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{0}")]
pub struct ProvisionError(pub String);

/// A node that is to be started.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spec {
    /// The cluster that it is to join.
    pub cluster: ClusterId,
    /// Its instance; unique in the cluster for all time.
    pub instance: String,
    /// The name that it is to have.
    pub name: String,
    /// Addresses of balancers, at which it is to register.
    pub join: Vec<String>,
}

/// An instance that is there.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Instance {
    /// Which.
    pub instance: String,
    /// The name of its node.
    pub name: String,
    /// Whether it runs.
    pub running: bool,
}

/// Starts and stops nodes.
pub trait Provisioner: Send + Sync + Debug {
    /// What it is called: `embedded`, `process`, `docker` or `none`.
    fn kind(&self) -> &'static str;

    /// Whether it can start nodes at all.
    fn can_start(&self) -> bool {
        true
    }

    /// Every instance of the cluster that it knows, whether it runs or not.
    fn list(&self, cluster: ClusterId) -> Answer<'_, Vec<Instance>>;

    /// Starts a node. One that runs already stays as it is; one that was stopped goes on with its data. When it fails,
    /// nothing half started is left behind.
    fn start<'a>(&'a self, spec: &'a Spec) -> Answer<'a, ()>;

    /// Stops an instance, gives it time to hand its leaderships over, and removes its data for good. One that is not
    /// there is stopped already.
    fn remove<'a>(&'a self, cluster: ClusterId, instance: &'a str) -> Answer<'a, ()>;
}

/// Starts nothing: nodes are started by somebody else and join by themselves.
#[derive(Clone, Copy, Debug)]
pub struct NoProvisioner;

impl Provisioner for NoProvisioner {
    fn kind(&self) -> &'static str {
        "none"
    }

    fn can_start(&self) -> bool {
        false
    }

    fn list(&self, _cluster: ClusterId) -> Answer<'_, Vec<Instance>> {
        Box::pin(async { Ok(vec![]) })
    }

    fn start<'a>(&'a self, spec: &'a Spec) -> Answer<'a, ()> {
        let text = format!(
            "this balancer starts no nodes (--spawn none); start {} by hand: shkv node --join ADDRESS --name {} --data DIRECTORY",
            spec.name, spec.name
        );
        Box::pin(async { Err(ProvisionError(text)) })
    }

    fn remove<'a>(&'a self, _cluster: ClusterId, _instance: &'a str) -> Answer<'a, ()> {
        Box::pin(async { Ok(()) })
    }
}
