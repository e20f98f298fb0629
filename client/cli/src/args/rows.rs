//! What the commands that read and write rows take.

use super::*;

#[derive(Debug, Args)]
pub struct Put {
    /// Key; behind `--` if it begins with a dash
    pub key: OsString,
    /// Value; `-` reads it from standard input
    pub value: OsString,
    #[command(flatten)]
    pub condition: Condition,
}

#[derive(Debug, Args)]
pub struct Del {
    /// Key; behind `--` if it begins with a dash
    pub key: OsString,
    #[command(flatten)]
    pub condition: Condition,
}

/// What must hold of a row before it is written.
#[derive(Debug, Clone, Default, Args)]
#[group(multiple = false)]
pub struct Condition {
    /// Only if there is no such row
    #[arg(long)]
    pub if_absent: bool,
    /// Only if there is such a row
    #[arg(long)]
    pub if_present: bool,
    /// Only if the row has this version
    #[arg(long, value_name = "VERSION")]
    pub if_version: Option<u64>,
    /// Only if the row has this value
    #[arg(long, value_name = "VALUE")]
    pub if_value: Option<OsString>,
}

#[derive(Debug, Args)]
pub struct Key {
    /// Key; behind `--` if it begins with a dash
    pub key: OsString,
}

#[derive(Debug, Args)]
pub struct Bounds {
    /// First key [default: the first of all]
    pub start: Option<OsString>,
    /// First key beyond the range [default: to the last of all]
    pub end: Option<OsString>,
    /// Only keys that begin with this
    #[arg(long)]
    pub prefix: Option<OsString>,
}

#[derive(Debug, Args)]
pub struct Range {
    #[command(flatten)]
    pub bounds: Bounds,
    /// Only keys behind this one, in the direction of the range: goes on where an earlier range ended
    #[arg(long)]
    pub after: Option<OsString>,
    /// From the last key to the first
    #[arg(long)]
    pub reverse: bool,
    /// At most this many rows
    #[arg(long)]
    pub limit: Option<u64>,
    /// Leave out the values
    #[arg(long)]
    pub keys_only: bool,
}

#[derive(Debug, Args)]
pub struct Count {
    #[command(flatten)]
    pub bounds: Bounds,
}

#[derive(Debug, Args)]
pub struct Load {
    /// File of rows; `-` is standard input
    pub file: PathBuf,
    /// Form of the rows [default: jsonl if the first line begins with a brace, otherwise tsv]
    #[arg(long)]
    pub format: Option<Format>,
    /// Go on behind the rows that an earlier load of the file has finished
    #[arg(long)]
    pub resume: bool,
    /// File that remembers how far the load has come [default: FILE.shkv-progress]
    #[arg(long)]
    pub progress: Option<PathBuf>,
}

/// The form of rows in a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// `{"key":…,"value":…}` a line, with `key_b64` and `value_b64` where a text is not UTF-8
    Jsonl,
    /// Key, tab, value
    Tsv,
}
