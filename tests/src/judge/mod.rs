//! Judges: each looks at what clients and members have told, and says whether a store that keeps its promises can have
//! told it. Pure; they run nothing and wait for nothing.
//!
//! A judge that cannot fail is none, so each is shown violations that it must find (`tests/judge.rs`), and the search
//! behind [`register`] and [`bank`] is compared with another implementation over random histories, right and wrong.

pub mod audit;
pub mod bank;
pub mod counter;
pub mod leadership;
pub mod lease;
pub mod list;
pub mod matching;
pub mod progress;
pub mod register;
pub mod removal;
pub mod replicas;
pub mod scan;
pub mod search;
pub mod single;
