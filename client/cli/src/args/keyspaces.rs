//! Arguments of the commands about keyspaces.

use clap::{Args, Subcommand};
use shkv_proto::limits::{MAP_SHARDS_MAX, REPLICAS_MAX};

#[derive(Debug, Subcommand)]
pub enum Keyspaces {
    /// Make a keyspace, cut by hash, or with --split by ranges of keys
    Create(CreateKeyspace),
    /// Drop a keyspace with all its rows
    Drop(DropKeyspace),
    /// Show the keyspaces
    List,
}

#[derive(Debug, Args)]
pub struct CreateKeyspace {
    /// Its name
    pub name: String,
    /// Number of its shards
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..=MAP_SHARDS_MAX as i64))]
    pub shards: u32,
    /// Cut it by ranges: a shard begins at each of these keys, separated by commas, and one before the first. A scan then asks
    /// fewer shards, but keys that are near each other are written to the same one
    #[arg(long, value_delimiter = ',', conflicts_with = "shards")]
    pub split: Vec<String>,
    /// Copies of each shard
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=i64::from(REPLICAS_MAX)))]
    pub replicas: u32,
}

#[derive(Debug, Args)]
pub struct DropKeyspace {
    /// Its name
    pub name: String,
    /// Says that its rows are to go; without it nothing is done
    #[arg(long, required = true)]
    pub yes: bool,
}
