//! The library that an application embeds to use a shkv cluster.
//!
//! A [`Client`] knows the shard map and sends each request to the node that leads the key's shard; a node that it
//! cannot reach it reaches through a balancer. It keeps no rows, starts no cluster and decides no placement.
//!
//! Every call ends in one of three ways: done, certainly not done ([`Error::Refused`], [`Error::Condition`],
//! [`Error::Unavailable`]), or unknown ([`Error::Unknown`]).
//!
//! Every write carries an id by which its shard knows it again. So the client sends a write that may have been lost as often
//! as it takes, until its deadline, and it is done once; its outcome is unknown only when no answer was had by then.
//! Writes may be conditional ([`Put::if_version`] and its like). Several are done in one step, whatever shards they lie in:
//! [`Client::batch`], and with conditions and reads [`Client::txn`]. Rows with typed columns are a [`table::Table`].
//!
//! ```no_run
//! # async fn example() -> Result<(), shkv_client::Error> {
//! use shkv_client::Client;
//!
//! let client = Client::connect(["127.0.0.1:7400"]).await?;
//! client.put("city/zagreb", "HR").await?;
//! if let Some(row) = client.get("city/zagreb").await? {
//!     println!("{:?} at version {}", row.value, row.version);
//! }
//! let mut rows = client.scan(..).prefix("city/").rows();
//! while let Some(row) = rows.next().await? {
//!     println!("{:?}", row.key);
//! }
//! # Ok(())
//! # }
//! ```

mod batch;
mod call;
mod check;
mod client;
mod count;
mod create;
mod error;
mod inner;
mod keyspace;
mod lanes;
mod operate;
mod point;
mod range;
mod scan;
pub mod table;
mod token;
mod txn;
mod view;

pub use batch::Batch;
pub use check::Check;
pub use client::{Client, ClientConfig, LINKS_PER_NODE_MAX};
pub use count::Count;
pub use create::NewKeyspace;
pub use error::Error;
pub use keyspace::Keyspace;
pub use operate::ping;
pub use point::{Answer, Delete, Get, Put, Written};
pub use range::KeyRange;
pub use scan::{Rows, Scan};
pub use token::{Consistency, Token, TokenError};
pub use txn::{Committed, Txn};

pub use shkv_proto::limits::Limits;
pub use shkv_proto::merge::Row;
pub use shkv_proto::message::{
    Admin, AdminDone, Control, NewShard, NodeHealth, NodeStatus, RefusalCode, ReplicaStatus, StatusDone, Welcome,
};
