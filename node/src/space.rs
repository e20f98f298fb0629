//! The room on the data directory's disk, and the node's end when the disk fails.

use crate::Tuning;
use crate::ground::Ground;
use crate::log::Log;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use tokio::sync::watch;

/// The disk: how much is free, and what is done when it fails.
pub struct Space {
    /// The data directory.
    pub ground: Arc<dyn Ground>,
    /// The log.
    pub log: Arc<Log>,
    /// Log that is kept for followers that are behind.
    pub log_retain_bytes: u64,
    /// Free space under which puts are refused.
    pub reserve_bytes: u64,
    /// Ends the node, with the reason.
    pub fail: Box<dyn Fn(String) + Send + Sync>,
    full: AtomicBool,
    free: AtomicU64,
    stopping: AtomicBool,
}

impl Space {
    /// A disk that is not full as far as is known.
    pub fn new(
        ground: Arc<dyn Ground>,
        log: Arc<Log>,
        tuning: &Tuning,
        fail: Box<dyn Fn(String) + Send + Sync>,
    ) -> Self {
        let (full, free, stopping) = (AtomicBool::new(false), AtomicU64::new(u64::MAX), AtomicBool::new(false));
        let (log_retain_bytes, reserve_bytes) = (tuning.log_retain_bytes, tuning.disk_reserve_bytes);
        Self { ground, log, log_retain_bytes, reserve_bytes, fail, full, free, stopping }
    }

    /// Asks the system how much is free. A file system that does not say counts as empty.
    pub fn free_bytes(&self) -> u64 {
        let free = self.ground.free_bytes();
        self.free.store(free, Ordering::Relaxed);
        free
    }

    /// Free bytes as of the last look.
    pub fn last_free_bytes(&self) -> u64 {
        self.free.load(Ordering::Relaxed)
    }

    /// Looks whether puts must be refused.
    pub fn look(&self) {
        self.set_full(self.free_bytes() < self.reserve_bytes);
    }

    /// Says whether the disk is full.
    pub fn set_full(&self, full: bool) {
        if self.full.swap(full, Ordering::Relaxed) != full {
            let (data, free, reserve) = (self.ground.path().display(), self.last_free_bytes(), self.reserve_bytes);
            if full {
                tracing::error!(
                    "{data}: {free} bytes free, under the reserve of {reserve}; puts are refused until there is more"
                );
            } else {
                tracing::info!("{data}: {free} bytes free, puts are taken again");
            }
        }
    }

    /// Whether puts are refused.
    pub fn is_full(&self) -> bool {
        self.full.load(Ordering::Relaxed)
    }

    /// What a flush leaves free, so that the log can go on.
    pub fn emergency_bytes(&self) -> u64 {
        self.reserve_bytes / 4
    }

    /// Nobody waits for space any more.
    pub fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
    }

    /// Whether the node is stopping.
    pub fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Relaxed)
    }
}

/// How a node's end is told: the first reason counts.
pub fn fail_once(reason: watch::Sender<Option<String>>) -> Box<dyn Fn(String) + Send + Sync> {
    Box::new(move |text| {
        tracing::error!("the node stops: {text}");
        reason.send_if_modified(|reason| {
            let is_first = reason.is_none();
            reason.get_or_insert(text);
            is_first
        });
    })
}
