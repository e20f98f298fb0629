//! Whole clusters in one thread, from one seed: the nodes, balancers and clients that people run, on simulated clocks, a
//! simulated network and simulated disks, with faults, and judges that look at everything that is told.
//!
//! A seed is repeated by `cargo run --release -p shkv-tests --bin simulate -- --seed SEED`.

pub mod batches;
pub mod cluster;
pub mod disk;
pub mod faults;
pub mod file;
pub mod many;
pub mod operator;
pub mod run;
pub mod scenes;
pub mod sender;
pub mod universe;
pub mod watch;
pub mod workload;
pub mod yard;
