//! A node in a process of its own: the same binary with the command `node`. It ends with this process, because its
//! standard input is a pipe that this process holds.

use crate::args::Tuning;
use crate::members::{Member, Told};
use std::ffi::OsString;
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout, Command};

/// How long a node may take to start: it replays its log first.
const START_TIME_MAX: Duration = Duration::from_secs(120);
/// How long a node may take to stop before it is killed: it flushes what it has in memory.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// Longest first line of a node.
const LINE_BYTES_MAX: u64 = 16 << 10;

/// A child process that is a node.
pub struct Child {
    process: tokio::process::Child,
    /// Closed with this value: that is how the child learns of our end.
    _stdin: Option<ChildStdin>,
    /// Kept open, so that the child never writes into a closed pipe.
    _stdout: BufReader<ChildStdout>,
}

impl Child {
    /// Starts a child and waits until it says that it runs.
    pub async fn start(member: &Member) -> Result<(Self, Told), String> {
        let binary = std::env::current_exe().map_err(|error| format!("where is this binary: {error}"))?;
        let mut process = Command::new(binary)
            .args(arguments(member))
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .process_group(0) // Ctrl-C is for us: nodes are stopped after the balancer
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| format!("cannot start a process for {}: {error}", member.name))?;
        let stdin = process.stdin.take();
        let stdout = process.stdout.take().ok_or("the child has no standard output")?;
        let mut stdout = BufReader::new(stdout);
        let mut line = String::new();
        let first_line = async { (&mut stdout).take(LINE_BYTES_MAX).read_line(&mut line).await };
        match tokio::time::timeout(START_TIME_MAX, first_line).await {
            Ok(Ok(bytes)) if bytes > 0 => {}
            Ok(Ok(_)) => {
                let ended = process.wait().await.map_or_else(|error| error.to_string(), |status| status.to_string());
                return Err(format!("{} ended before it ran ({ended}); its own words are above", member.name));
            }
            Ok(Err(error)) => return Err(format!("{} cannot be read from: {error}", member.name)),
            Err(_) => return Err(format!("{} did not start within {START_TIME_MAX:?}", member.name)),
        }
        let told = serde_json::from_str(&line)
            .map_err(|error| format!("{} said {:?} instead of where it is: {error}", member.name, line.trim_end()))?;
        Ok((Self { process, _stdin: stdin, _stdout: stdout }, told))
    }

    /// Waits until the process has ended; says how. Cancelling it loses nothing.
    pub async fn ended(&mut self) -> String {
        match self.process.wait().await {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }

    /// Asks the process to stop, waits, and kills it when it takes too long.
    pub async fn stop(mut self) {
        let pid = self.process.id().and_then(|pid| rustix::process::Pid::from_raw(i32::try_from(pid).ok()?));
        if let Some(pid) = pid {
            // A process that has just ended is not there to be asked; waiting for it then ends at once.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        if tokio::time::timeout(STOP_TIME_MAX, self.process.wait()).await.is_err() {
            tracing::warn!(pid = self.process.id(), "the node did not stop within {STOP_TIME_MAX:?} and is killed");
            let _ = self.process.kill().await; // it may have ended meanwhile
        }
    }
}

fn arguments(member: &Member) -> Vec<OsString> {
    let mut arguments: Vec<OsString> = ["node", "--listen", "127.0.0.1:0", "--exit-with-parent", "--output", "json"]
        .into_iter()
        .map(OsString::from)
        .collect();
    arguments.extend(["--name".into(), OsString::from(&member.name), "--data".into(), member.data.clone().into()]);
    let Tuning { table_bytes, cache_bytes, log_segment_bytes, log_retain_bytes, disk_reserve_bytes, threads } =
        member.tuning;
    let named = [
        ("--table-bytes", table_bytes),
        ("--cache-bytes", cache_bytes),
        ("--log-segment-bytes", log_segment_bytes),
        ("--log-retain-bytes", log_retain_bytes),
        ("--disk-reserve-bytes", disk_reserve_bytes),
        ("--threads", threads.map(u64::from)),
    ];
    for (name, number) in named {
        if let Some(number) = number {
            arguments.extend([name.into(), number.to_string().into()]);
        }
    }
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command as Asked, Output, Spawn};
    use clap::Parser;

    #[test]
    fn a_child_understands_its_arguments() {
        let tuning = Tuning { table_bytes: Some(1 << 20), log_retain_bytes: Some(5), ..Tuning::default() };
        let member = Member { name: "Server7".into(), data: "/d".into(), spawn: Spawn::Process, tuning };
        let line = std::iter::once(OsString::from("shkv")).chain(arguments(&member));
        let cli = Cli::try_parse_from(line).unwrap();
        assert_eq!(cli.global.output, Output::Json);
        let Asked::Node(node) = cli.command else { panic!("not a node") };
        assert_eq!((node.name.as_str(), node.listen.as_str(), node.exit_with_parent), ("Server7", "127.0.0.1:0", true));
        assert_eq!((node.tuning.table_bytes, node.tuning.log_retain_bytes), (Some(1 << 20), Some(5)));
        assert_eq!(node.tuning.cache_bytes, None);
    }
}
