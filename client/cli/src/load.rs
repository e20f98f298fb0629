//! The command that writes the rows of a file: its input, where it begins, and what is said at the end.

#![expect(clippy::disallowed_methods, reason = "a shell: opens the file and tells the time")]

use crate::args::{Format, Global, Load};
use crate::loading::Loading;
use crate::outcome::{Ending, Trouble};
use crate::point::{connect, say};
use crate::progress::{Identity, Progress, beside};
use crate::record;
use crate::sizes;
use serde_json::json;
use shkv_client::Client;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::time::Instant;

/// Longest line: the largest value with every byte escaped as JSON escapes control characters, and some room.
const LINE_BYTES_MAX: u64 = 100 << 20;

/// `load FILE`
pub async fn run(global: &Global, args: Load) -> Result<Ending, Trouble> {
    let from_stdin = args.file.as_os_str() == "-";
    if from_stdin && (args.resume || args.progress.is_some()) {
        return Err(Trouble::Usage("standard input cannot be resumed; load from a file".into()));
    }
    let (client, keyspace) = connect(global).await?;
    let began = Instant::now();
    let mut input = Input::open(&args, &client, &global.keyspace)?;
    let mut loading = Loading::new(client, keyspace, global, &input);
    let ended = loading.all(&mut input).await;
    let (rows, at) = loading.end();
    match (&ended, &input.progress) {
        (Ok(()), Some((path, _))) => Progress::remove(path).map_err(Trouble::Failed)?,
        (Err(_), Some((path, identity))) => {
            Progress::new(identity.clone(), at.offset, at.lines).write(path).map_err(Trouble::Failed)?;
        }
        (_, None) => {}
    }
    ended?;
    let seconds = began.elapsed().as_secs_f64();
    let bytes = at.offset - input.start.offset;
    let rate = rows as f64 / seconds.max(1e-6);
    let text = format!("loaded {rows} rows, {} in {seconds:.2} s ({rate:.0} rows/s)", sizes::show(bytes));
    let told = json!({
        "rows": rows, "bytes": bytes, "seconds": seconds, "rows_per_sec": rate, "resumed_at": input.start.offset,
    });
    say(global.output, &text, &told)
}

/// A place in the input, behind a line.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Place {
    /// Bytes before it.
    pub offset: u64,
    /// Lines before it.
    pub lines: u64,
}

/// The file that is read, line by line.
pub struct Input {
    reader: Box<dyn BufRead>,
    /// The form of its rows, once it is known.
    pub format: Option<Format>,
    /// Where the load begins.
    pub start: Place,
    /// Its size, if it is a file.
    pub bytes: Option<u64>,
    /// Where it is remembered how far the load has come.
    pub progress: Option<(PathBuf, Identity)>,
}

impl Input {
    fn open(args: &Load, client: &Client, keyspace: &str) -> Result<Self, Trouble> {
        if args.file.as_os_str() == "-" {
            let reader = Box::new(BufReader::new(io::stdin()));
            return Ok(Self { reader, format: args.format, start: Place::default(), bytes: None, progress: None });
        }
        let error = |error: io::Error| Trouble::Failed(format!("cannot read {}: {error}", args.file.display()));
        let identity = Identity::of(&args.file, client.cluster().to_string(), keyspace.to_owned()).map_err(error)?;
        let path = args.progress.clone().unwrap_or_else(|| beside(&args.file, ".shkv-progress"));
        let mut file = File::open(&args.file).map_err(error)?;
        let mut start = Place::default();
        let mut format = args.format;
        if args.resume
            && let Some(found) = Progress::read(&path).map_err(Trouble::Usage)?
        {
            if found.identity != identity {
                return Err(Trouble::Usage(format!(
                    "{} is the progress of another input, cluster or keyspace; load without --resume to begin anew",
                    path.display()
                )));
            }
            start = Place { offset: found.offset, lines: found.lines };
            format = format.or(first_line_format(&mut file).map_err(error)?); // the form is told by the first line
        }
        file.seek(SeekFrom::Start(start.offset)).map_err(error)?;
        let bytes = Some(identity.input_bytes);
        let reader = Box::new(BufReader::with_capacity(1 << 20, file));
        Ok(Self { reader, format, start, bytes, progress: Some((path, identity)) })
    }

    /// The next line with its end; empty at the end of the input.
    pub fn line(&mut self, line: &mut Vec<u8>) -> Result<(), String> {
        line.clear();
        (&mut self.reader).take(LINE_BYTES_MAX).read_until(b'\n', line).map_err(|error| error.to_string())?;
        if line.len() as u64 == LINE_BYTES_MAX && !line.ends_with(b"\n") {
            return Err(format!("the line is longer than {}", sizes::show(LINE_BYTES_MAX)));
        }
        Ok(())
    }
}

fn first_line_format(file: &mut File) -> io::Result<Option<Format>> {
    let mut head = Vec::new();
    file.take(4 << 10).read_to_end(&mut head)?;
    Ok(head.split(|byte| *byte == b'\n').find(|line| !line.trim_ascii().is_empty()).map(record::format_of))
}
