//! Where a simulated cluster gets machines from: the provisioner of its balancers. What they ask for is written down, and
//! done by whoever runs the simulation.

use parking_lot::Mutex;
use shkv_balancer::provision::{Answer, Instance, ProvisionError, Provisioner, Spec};
use shkv_proto::ClusterId;
use std::collections::BTreeMap;
use std::sync::Arc;
use tokio::sync::oneshot;

/// Machines that are given out at the most.
const MACHINES_MAX: usize = 8;

/// What is asked for.
pub enum Order {
    /// A machine with an empty disk and a node on it.
    Start(Spec, oneshot::Sender<Result<(), ProvisionError>>),
    /// The machine of an instance is not needed any more.
    Remove(String, oneshot::Sender<Result<(), ProvisionError>>),
}

/// Machines.
#[derive(Clone, Default)]
pub struct Yard(Arc<Mutex<State>>);

#[derive(Default)]
struct State {
    orders: Vec<Order>,
    /// The nodes' names by instance, with whether somebody keeps them running.
    instances: BTreeMap<String, (String, bool)>,
    given: usize,
}

impl std::fmt::Debug for Yard {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Yard")
    }
}

impl Yard {
    /// A node runs on a machine.
    pub fn keeps(&self, instance: &str, name: &str) {
        self.0.lock().instances.insert(instance.to_owned(), (name.to_owned(), true));
    }

    /// A machine is lost, and its disk with it.
    pub fn lost(&self, instance: &str) {
        if let Some((_, runs)) = self.0.lock().instances.get_mut(instance) {
            *runs = false;
        }
    }

    /// A machine was given back.
    pub fn removed(&self, instance: &str) {
        self.0.lock().instances.remove(instance);
    }

    /// What was asked for since this was last asked.
    #[must_use]
    pub fn take_orders(&self) -> Vec<Order> {
        std::mem::take(&mut self.0.lock().orders)
    }
}

async fn answered(done: oneshot::Receiver<Result<(), ProvisionError>>) -> Result<(), ProvisionError> {
    done.await.unwrap_or_else(|_| Err(ProvisionError("nobody did it".into())))
}

impl Provisioner for Yard {
    fn kind(&self) -> &'static str {
        "simulated"
    }

    fn list(&self, _cluster: ClusterId) -> Answer<'_, Vec<Instance>> {
        let state = self.0.lock();
        let instance = |(instance, (name, running)): (&String, &(String, bool))| Instance {
            instance: instance.clone(),
            name: name.clone(),
            running: *running,
        };
        let all = state.instances.iter().map(instance).collect();
        Box::pin(async { Ok(all) })
    }

    fn start<'a>(&'a self, spec: &'a Spec) -> Answer<'a, ()> {
        let (done, doing) = oneshot::channel();
        {
            let mut state = self.0.lock();
            if state.instances.contains_key(&spec.instance) {
                return Box::pin(async { Ok(()) });
            }
            if state.given >= MACHINES_MAX {
                return Box::pin(async { Err(ProvisionError("there are no more machines".into())) });
            }
            state.given += 1;
            state.orders.push(Order::Start(spec.clone(), done));
        }
        Box::pin(answered(doing))
    }

    fn remove<'a>(&'a self, _cluster: ClusterId, instance: &'a str) -> Answer<'a, ()> {
        let (done, doing) = oneshot::channel();
        self.0.lock().orders.push(Order::Remove(instance.to_owned(), done));
        Box::pin(answered(doing))
    }
}
