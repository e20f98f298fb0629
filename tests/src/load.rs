//! Clients that write without a pause, and remember what was acknowledged.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "tests wait, tell the time, and fail where they cannot go on"
)]

use shkv_client::{Client, Error};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};
use tokio::task::JoinHandle;

/// Writers at work.
pub struct Load {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    writers: Vec<JoinHandle<Report>>,
}

/// What came of the writes.
#[derive(Debug, Default)]
pub struct Report {
    /// Rows that were acknowledged, with the number that their value is.
    pub written: Vec<(String, u64)>,
    /// Writes whose outcome is unknown.
    pub unknown: Vec<Error>,
    /// Writes that were certainly not done.
    pub failed: Vec<Error>,
    /// The longest time that one writer went without an acknowledgement.
    pub longest_gap: Duration,
}

impl Load {
    /// Lets `count` writers begin, each with keys of its own; every row is written once.
    #[must_use]
    pub fn start(client: &Client, name: &str, count: usize) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let writer = |number: usize| {
            let (client, stop, acknowledged) = (client.clone(), stop.clone(), acknowledged.clone());
            let name = format!("{name}/{number}");
            tokio::spawn(async move { write(&client, &name, &stop, &acknowledged).await })
        };
        Self { writers: (0..count).map(writer).collect(), stop, acknowledged }
    }

    /// Acknowledged writes so far.
    #[must_use]
    pub fn acknowledged(&self) -> u64 {
        self.acknowledged.load(Ordering::Relaxed)
    }

    /// Waits until `more` further writes are acknowledged.
    pub async fn progress(&self, more: u64) {
        let wanted = self.acknowledged() + more;
        let deadline = Instant::now() + crate::PATIENCE;
        while self.acknowledged() < wanted {
            assert!(Instant::now() < deadline, "writes do not go on: {} of {wanted}", self.acknowledged());
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    /// Ends the writers.
    pub async fn stop(self) -> Report {
        self.stop.store(true, Ordering::Relaxed);
        let mut all = Report::default();
        for writer in self.writers {
            let one = writer.await.expect("a writer does not panic");
            all.written.extend(one.written);
            all.unknown.extend(one.unknown);
            all.failed.extend(one.failed);
            all.longest_gap = all.longest_gap.max(one.longest_gap);
        }
        all
    }
}

async fn write(client: &Client, name: &str, stop: &AtomicBool, acknowledged: &AtomicU64) -> Report {
    let mut report = Report::default();
    let mut last = Instant::now();
    for number in 0_u64.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let key = format!("{name}/{number:08}");
        match client.put(&key, number.to_string()).await {
            Ok(_) => {
                acknowledged.fetch_add(1, Ordering::Relaxed);
                report.longest_gap = report.longest_gap.max(last.elapsed());
                last = Instant::now();
                report.written.push((key, number));
            }
            Err(error @ Error::Unknown { .. }) => report.unknown.push(error),
            Err(error) => report.failed.push(error),
        }
    }
    report
}

impl Report {
    /// Reads every acknowledged row again.
    pub async fn check(&self, client: &Client) {
        assert!(!self.written.is_empty(), "nothing was written");
        for rows in self.written.chunks(256) {
            let reads: Vec<_> = rows
                .iter()
                .map(|(key, number)| {
                    let (client, key, number) = (client.clone(), key.clone(), *number);
                    tokio::spawn(async move {
                        let row = read(&client, &key).await;
                        assert_eq!(row, Some(number.to_string().into_bytes()), "acknowledged row {key}");
                    })
                })
                .collect();
            for read in reads {
                read.await.expect("every acknowledged row is there");
            }
        }
    }
}

async fn read(client: &Client, key: &str) -> Option<Vec<u8>> {
    let deadline = Instant::now() + crate::PATIENCE;
    loop {
        match client.get(key).await {
            Ok(row) => return row.map(|row| row.value.to_vec()),
            Err(error) => assert!(Instant::now() < deadline, "{key} cannot be read: {error}"),
        }
    }
}
