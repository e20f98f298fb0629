//! How a command ends: what is said about a failure, and the exit code.

use crate::args::Output;
use serde_json::{Value, json};
use shkv_client::{Error, RefusalCode};
use std::process::ExitCode;

/// There is no such row.
pub const EXIT_NOT_FOUND: u8 = 1;
/// A usage error, or a refusal: the same would happen again.
pub const EXIT_REFUSED: u8 = 2;
/// Certainly not done; it may be tried again.
pub const EXIT_UNAVAILABLE: u8 = 3;
/// It may have been done.
pub const EXIT_UNKNOWN: u8 = 4;
/// Not done: a condition does not hold.
pub const EXIT_CONDITION: u8 = 5;

/// The exit codes, for the help.
pub const EXIT_CODES: &str = "Exit codes:
  0  done, found
  1  not found
  2  wrong usage, or refused: the same would happen again
  3  unavailable: certainly not done, may be tried again
  4  outcome unknown: it may have been done
  5  a condition does not hold: not done";

/// How a command ends that did what was asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Done, or found.
    Done,
    /// There is no such row.
    NotFound,
}

/// Why a command did not do what was asked.
#[derive(Debug)]
pub enum Trouble {
    /// The client library's answer.
    Client(Error),
    /// What was asked makes no sense; what is in the way is with the caller.
    Usage(String),
    /// Something on this machine is in the way: a file, a port, a directory.
    Failed(String),
    /// A server that ran has stopped by itself.
    Stopped(String),
    /// Nobody reads standard output any more: a quiet end.
    ClosedPipe,
}

impl From<Error> for Trouble {
    fn from(error: Error) -> Self {
        Self::Client(error)
    }
}

impl Trouble {
    /// What happened when writing to standard output failed.
    pub fn of_output(error: &std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            Self::ClosedPipe
        } else {
            Self::Failed(format!("cannot write to standard output: {error}"))
        }
    }

    fn exit_code(&self) -> u8 {
        match self {
            Self::Client(Error::Refused { .. }) | Self::Usage(_) | Self::Failed(_) => EXIT_REFUSED,
            Self::Client(Error::Condition { .. }) => EXIT_CONDITION,
            Self::Client(Error::Unavailable { .. }) | Self::Stopped(_) => EXIT_UNAVAILABLE,
            Self::Client(Error::Unknown { .. }) => EXIT_UNKNOWN,
            Self::ClosedPipe => 0,
        }
    }

    fn kind(&self) -> &'static str {
        match self {
            Self::Client(Error::Refused { .. }) => "refused",
            Self::Client(Error::Condition { .. }) => "condition",
            Self::Client(Error::Unavailable { .. }) => "unavailable",
            Self::Client(Error::Unknown { .. }) => "unknown",
            Self::Usage(_) => "usage",
            Self::Failed(_) => "failed",
            Self::Stopped(_) => "stopped",
            Self::ClosedPipe => "closed_pipe",
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Client(error) => match error {
                Error::Unavailable { text } if text.contains("refused (os error") => {
                    format!(
                        "nobody listens there ({text}); start a cluster with `shkv up`, or name its address by --addr \
                         or SHKV_ADDR"
                    )
                }
                Error::Refused { .. } | Error::Condition { .. } | Error::Unavailable { .. } | Error::Unknown { .. } => {
                    error.to_string()
                }
            },
            Self::Usage(text) | Self::Failed(text) | Self::Stopped(text) => text.clone(),
            Self::ClosedPipe => String::new(),
        }
    }

    fn to_json(&self) -> Value {
        let code = match self {
            Self::Client(error) => error.code().map(code_name),
            Self::Usage(_) | Self::Failed(_) | Self::Stopped(_) | Self::ClosedPipe => None,
        };
        let mut told = json!({"error": {"kind": self.kind(), "code": code, "text": self.text()}});
        if let Self::Client(Error::Condition { operation, version }) = self {
            told["error"]["operation"] = json!(operation);
            told["error"]["version"] = json!(version);
        }
        told
    }
}

/// A refusal's code as it is written in JSON.
pub fn code_name(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Malformed => "malformed",
        RefusalCode::KeyEmpty => "key_empty",
        RefusalCode::KeyTooLarge => "key_too_large",
        RefusalCode::ValueTooLarge => "value_too_large",
        RefusalCode::BatchLimits => "batch_limits",
        RefusalCode::UnknownKeyspace => "unknown_keyspace",
        RefusalCode::WrongCluster => "wrong_cluster",
        RefusalCode::Version => "version",
        RefusalCode::NotAllowed => "not_allowed",
        RefusalCode::DiskFull => "disk_full",
        RefusalCode::NotBootstrapped => "not_bootstrapped",
        RefusalCode::Conflict => "conflict",
        RefusalCode::NotFound => "not_found",
        RefusalCode::Exists => "exists",
        RefusalCode::WouldLose => "would_lose",
        RefusalCode::Retired => "retired",
        RefusalCode::Unsupported => "unsupported",
        RefusalCode::Forgotten => "forgotten",
    }
}

/// Says what there is to say, and gives the exit code.
pub fn end(ending: Result<Ending, Trouble>, format: Output) -> ExitCode {
    let trouble = match ending {
        Ok(Ending::Done) => return ExitCode::SUCCESS,
        Ok(Ending::NotFound) => return ExitCode::from(EXIT_NOT_FOUND),
        Err(trouble) => trouble,
    };
    match (&trouble, format) {
        (Trouble::ClosedPipe, _) => {}
        (_, Output::Text) => eprintln!("shkv: {}", trouble.text()),
        (_, Output::Json | Output::Jsonl) => eprintln!("{}", trouble.to_json()),
    }
    ExitCode::from(trouble.exit_code())
}

/// The end of a command line that does not parse, told as JSON.
pub fn end_of_usage(text: &str) -> ExitCode {
    end(Err(Trouble::Usage(text.trim().to_owned())), Output::Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_outcome_has_its_own_exit_code() {
        let code = |error| Trouble::Client(error).exit_code();
        assert_eq!(code(Error::Refused { code: RefusalCode::DiskFull, text: "x".into() }), 2);
        assert_eq!(code(Error::Unavailable { text: "x".into() }), 3);
        assert_eq!(code(Error::Unknown { text: "x".into() }), 4);
        assert_eq!(code(Error::Condition { operation: 0, version: None }), 5);
        assert_eq!(Trouble::Usage("x".into()).exit_code(), 2);
        assert_eq!(Trouble::ClosedPipe.exit_code(), 0);
    }

    #[test]
    fn an_error_in_json_tells_kind_code_and_text() {
        let refused = Trouble::Client(Error::Refused { code: RefusalCode::KeyTooLarge, text: "too long".into() });
        let expected = r#"{"error":{"code":"key_too_large","kind":"refused","text":"too long"}}"#;
        assert_eq!(refused.to_json().to_string(), expected);
    }

    #[test]
    fn a_condition_that_does_not_hold_tells_its_operation_and_the_version_that_there_is() {
        let told = Trouble::Client(Error::Condition { operation: 2, version: Some(7) }).to_json();
        assert_eq!((&told["error"]["operation"], &told["error"]["version"]), (&json!(2), &json!(7)));
    }

    #[test]
    fn when_nobody_listens_the_way_out_is_named() {
        let text = "127.0.0.1:7400: Connection refused (os error 111)".to_owned();
        let told = Trouble::Client(Error::Unavailable { text }).text();
        assert!(told.contains("shkv up") && told.contains("127.0.0.1:7400") && told.contains("SHKV_ADDR"), "{told}");
    }
}
