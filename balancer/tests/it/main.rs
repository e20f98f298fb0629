//! A balancer between a client and nodes that the tests play, over real sockets.

#![expect(clippy::unwrap_used, reason = "tests: what is not as it should be ends them")]
#![expect(clippy::disallowed_methods, reason = "tests: start tasks, wait and tell the time")]

mod boot;
mod control;
mod fake;
mod proxy;
mod scan;
mod setup;
mod surface;
