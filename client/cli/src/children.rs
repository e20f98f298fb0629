//! A node in a process of its own: the same binary with the command `node`. Unless it is to outlive this process, it ends
//! with it, because its standard input is a pipe that this process holds.

#![expect(clippy::disallowed_methods, reason = "a shell: waits before it looks again")]

use crate::members::{Member, Told};
use rustix::process::{Pid, Signal};
use shkv_node::NodeLook;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, BufReader};
use tokio::process::{ChildStdin, ChildStdout, Command};

/// How long a node may take to start: it replays its log first.
const START_TIME_MAX: Duration = Duration::from_secs(120);
/// How long a node may take to stop before it is killed: it flushes what it has in memory.
const STOP_TIME_MAX: Duration = Duration::from_secs(20);
/// How often a node that is not our child is looked at.
const LOOK_EVERY: Duration = Duration::from_millis(500);
/// File in a node's data directory: what it told when it was started, for whoever finds it running.
const TOLD: &str = "told.json";
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
            .stdin(if member.outlive { Stdio::null() } else { Stdio::piped() })
            .stdout(Stdio::piped())
            .process_group(0) // Ctrl-C is for us: nodes are stopped after the balancer
            .kill_on_drop(!member.outlive)
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
        if member.outlive {
            std::fs::write(member.data.join(TOLD), &line)
                .map_err(|error| format!("cannot write down where {} is: {error}", member.name))?;
        }
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
        if let Some(pid) = self.process.id() {
            signal(pid, Signal::TERM);
        }
        if tokio::time::timeout(STOP_TIME_MAX, self.process.wait()).await.is_err() {
            tracing::warn!(pid = self.process.id(), "the node did not stop within {STOP_TIME_MAX:?} and is killed");
            let _ = self.process.kill().await; // it may have ended meanwhile
        }
    }
}

/// A node that was started by a process that is gone.
pub struct Adopted {
    data: PathBuf,
    pid: u32,
}

impl Adopted {
    /// The node that runs on a data directory.
    pub fn at(data: &Path) -> Result<Self, String> {
        let text = std::fs::read_to_string(data.join(TOLD)).map_err(|error| {
            format!("a node runs in {} that was not started by a balancer: {error}", data.display())
        })?;
        let told: Told = serde_json::from_str(&text).map_err(|error| format!("{}: {error}", data.display()))?;
        Ok(Self { data: data.to_owned(), pid: told.pid })
    }

    /// Waits until it has ended. Cancelling it loses nothing.
    pub async fn ended(&self) -> String {
        while self.runs() {
            tokio::time::sleep(LOOK_EVERY).await;
        }
        "it runs no more".into()
    }

    /// Asks it to stop, waits, and kills it when it takes too long.
    pub async fn stop(self) {
        for (name, time) in [(Signal::TERM, STOP_TIME_MAX), (Signal::KILL, LOOK_EVERY)] {
            if self.runs() {
                signal(self.pid, name);
                let _ = tokio::time::timeout(time, self.ended()).await; // if not, the next signal is stronger
            }
        }
    }

    /// Whether a process holds the data directory: its number alone may by now be another process's.
    fn runs(&self) -> bool {
        matches!(NodeLook::at(&self.data), Ok(Some(look)) if look.running)
    }
}

/// Sends a signal. A process that has just ended is not there to take it, which is as good.
fn signal(pid: u32, signal: Signal) {
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = rustix::process::kill_process(pid, signal);
    }
}

fn arguments(member: &Member) -> Vec<OsString> {
    let mut arguments: Vec<OsString> =
        ["node", "--listen", "127.0.0.1:0", "--output", "json"].into_iter().map(OsString::from).collect();
    if !member.outlive {
        arguments.push("--exit-with-parent".into());
    }
    if !member.join.is_empty() {
        arguments.extend(["--join".into(), member.join.join(",").into()]);
    }
    arguments.extend(["--instance".into(), OsString::from(&member.instance)]);
    arguments.extend(["--name".into(), OsString::from(&member.name), "--data".into(), member.data.clone().into()]);
    arguments.extend(member.tuning.arguments().into_iter().map(OsString::from));
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cli, Command as Asked, Output, Spawn, Tuning};
    use clap::Parser;

    #[test]
    fn a_child_understands_its_arguments() {
        let tuning = Tuning { table_bytes: Some(1 << 20), log_retain_bytes: Some(5), ..Tuning::default() };
        let member = Member {
            name: "Server7".into(),
            data: "/d".into(),
            spawn: Spawn::Process,
            tuning,
            instance: "Server7.2".into(),
            join: vec!["a:1".into(), "b:2".into()],
            outlive: false,
        };
        let line = std::iter::once(OsString::from("shkv")).chain(arguments(&member));
        let cli = Cli::try_parse_from(line).unwrap();
        assert_eq!(cli.global.output, Output::Json);
        let Asked::Node(node) = cli.command else { panic!("not a node") };
        assert_eq!((node.member.name.as_str(), node.member.instance.as_str()), ("Server7", "Server7.2"));
        assert_eq!((node.listen.as_str(), node.exit_with_parent), ("127.0.0.1:0", true));
        assert_eq!(node.join, ["a:1", "b:2"]);
        assert_eq!((node.tuning.table_bytes, node.tuning.log_retain_bytes), (Some(1 << 20), Some(5)));
        assert_eq!(node.tuning.cache_bytes, None);
    }
}
