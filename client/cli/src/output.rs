//! Standard output and the log. A reader that goes away is no error.

use crate::outcome::{Ending, Trouble};
use serde::Serialize;
use std::io::{self, BufWriter, IsTerminal, StdoutLock, Write};
use tracing_subscriber::EnvFilter;

/// Standard output, written in large pieces.
pub struct Out(BufWriter<StdoutLock<'static>>);

impl Out {
    /// Takes standard output.
    pub fn new() -> Self {
        Self(BufWriter::with_capacity(64 << 10, io::stdout().lock()))
    }

    /// Writes bytes as they are.
    pub fn bytes(&mut self, bytes: &[u8]) -> Result<(), Trouble> {
        self.0.write_all(bytes).map_err(|error| Trouble::of_output(&error))
    }

    /// Writes a line of text.
    pub fn line(&mut self, text: &str) -> Result<(), Trouble> {
        self.bytes(text.as_bytes())?;
        self.bytes(b"\n")
    }

    /// Writes a value as JSON, without an end of line.
    pub fn json(&mut self, value: &impl Serialize) -> Result<(), Trouble> {
        serde_json::to_writer(&mut self.0, value).map_err(|error| Trouble::of_output(&io::Error::from(error)))
    }

    /// Writes a value as a line of JSON.
    pub fn json_line(&mut self, value: &impl Serialize) -> Result<(), Trouble> {
        self.json(value)?;
        self.bytes(b"\n")
    }

    /// Hands everything to whoever reads.
    pub fn flush(&mut self) -> Result<(), Trouble> {
        self.0.flush().map_err(|error| Trouble::of_output(&error))
    }
}

/// Whether a person looks at standard output.
pub fn is_terminal() -> bool {
    io::stdout().is_terminal()
}

/// Sends the log to standard error: what `SHKV_LOG` asks for, otherwise warnings, and for servers what they do.
pub fn log_to_stderr(serves: bool) {
    let filter =
        EnvFilter::try_from_env("SHKV_LOG").unwrap_or_else(|_| EnvFilter::new(if serves { "info" } else { "warn" }));
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(io::stderr)
        .with_ansi(io::stderr().is_terminal())
        .init();
}

/// Prints the completion script of a shell.
pub fn completion(shell: clap_complete::Shell, mut command: clap::Command) -> Result<Ending, Trouble> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut command, "shkv", &mut script);
    let mut out = Out::new();
    out.bytes(&script)?;
    out.flush()?;
    Ok(Ending::Done)
}
