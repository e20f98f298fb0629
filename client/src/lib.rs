//! The library that an application embeds to use a shkv cluster.
//!
//! A [`Client`] knows the shard map and sends each request to the node that leads the key's shard; a node that it
//! cannot reach it reaches through a balancer. It keeps no rows, starts no cluster and decides no placement.
//!
//! Every call ends in one of three ways: done, certainly not done ([`Error::Refused`], [`Error::Unavailable`]), or
//! unknown ([`Error::Unknown`]). A write that may have been done is never sent a second time.
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
mod client;
mod count;
mod error;
mod inner;
mod keyspace;
mod operate;
mod point;
mod range;
mod scan;
mod token;
mod view;

pub use batch::{Batch, BatchDone, BatchPart};
pub use client::{Client, ClientConfig, LINKS_PER_NODE_MAX};
pub use count::Count;
pub use error::Error;
pub use keyspace::Keyspace;
pub use operate::ping;
pub use point::{Answer, Delete, Get, Put, Written};
pub use range::KeyRange;
pub use scan::{Rows, Scan};
pub use token::{Consistency, Token, TokenError};

pub use shkv_proto::limits::Limits;
pub use shkv_proto::merge::Row;
pub use shkv_proto::message::{
    Admin, AdminDone, Control, NewShard, NodeHealth, NodeStatus, RefusalCode, ReplicaStatus, StatusDone, Welcome,
};
