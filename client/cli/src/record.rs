//! Rows as lines: JSON that `range` prints and `load` reads back, and tab-separated text. Pure.

use crate::args::Format;
use base64::Engine;
use base64::engine::general_purpose::STANDARD as BASE64;
use serde::{Deserialize, Serialize};
use std::borrow::Cow;

/// Key and value of a row that was read.
pub type Row = (Vec<u8>, Vec<u8>);

/// A row as it is printed. A key or value that is not UTF-8 is printed as base64 under another name.
#[derive(Debug, Serialize)]
pub struct Printed<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    key: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    key_b64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    value_b64: Option<String>,
    version: u64,
}

/// A row as it is read. Other fields are passed over.
#[derive(Debug, Deserialize)]
struct Read<'a> {
    #[serde(borrow, default)]
    key: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    key_b64: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    value: Option<Cow<'a, str>>,
    #[serde(borrow, default)]
    value_b64: Option<Cow<'a, str>>,
}

/// The form in which a row is printed as JSON; without a value when only the key was asked for.
pub fn printed<'a>(key: &'a [u8], value: Option<&'a [u8]>, version: u64) -> Printed<'a> {
    let (key, key_b64) = text_or_base64(key);
    let (value, value_b64) = value.map_or((None, None), text_or_base64);
    Printed { key, key_b64, value, value_b64, version }
}

/// Bytes as text if they are UTF-8, otherwise as base64.
pub fn text_or_base64(bytes: &[u8]) -> (Option<&str>, Option<String>) {
    match std::str::from_utf8(bytes) {
        Ok(text) => (Some(text), None),
        Err(_) => (None, Some(BASE64.encode(bytes))),
    }
}

/// The form of a file that begins with `line`.
pub fn format_of(line: &[u8]) -> Format {
    if line.trim_ascii_start().starts_with(b"{") { Format::Jsonl } else { Format::Tsv }
}

/// Reads a line without its end into key and value; `None` for a blank line.
pub fn parse(format: Format, line: &[u8]) -> Result<Option<Row>, String> {
    if line.trim_ascii().is_empty() {
        return Ok(None);
    }
    match format {
        Format::Jsonl => parse_json(line).map(Some),
        Format::Tsv => {
            let tab = line.iter().position(|byte| *byte == b'\t').ok_or("no tab between key and value")?;
            Ok(Some((line[..tab].to_vec(), line[tab + 1..].to_vec())))
        }
    }
}

fn parse_json(line: &[u8]) -> Result<Row, String> {
    let read: Read<'_> = serde_json::from_slice(line).map_err(|error| error.to_string())?;
    Ok((one_of("key", read.key, read.key_b64)?, one_of("value", read.value, read.value_b64)?))
}

/// A text, or bytes as base64: one of both must be given.
pub fn one_of(name: &str, text: Option<Cow<'_, str>>, base64: Option<Cow<'_, str>>) -> Result<Vec<u8>, String> {
    match (text, base64) {
        (Some(text), None) => Ok(text.into_owned().into_bytes()),
        (None, Some(coded)) => BASE64.decode(coded.as_bytes()).map_err(|error| format!("{name}_b64: {error}")),
        (None, None) => Err(format!("neither {name} nor {name}_b64")),
        (Some(_), Some(_)) => Err(format!("both {name} and {name}_b64")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_printed_is_read_back_byte_by_byte() {
        let texts: [&[u8]; 7] =
            [b"a", b"tab\tand\nline", "h\u{e9}llo \"quoted\" \u{0}".as_bytes(), &[0xff, 0, 0xfe], b"\\", b"{", b" "];
        for key in texts {
            for value in texts.iter().copied().chain([&b""[..]]) {
                let line = serde_json::to_vec(&printed(key, Some(value), 7)).unwrap();
                assert!(!line.contains(&b'\n'));
                let read = parse(Format::Jsonl, &line).unwrap().unwrap();
                assert_eq!(read, (key.to_vec(), value.to_vec()));
            }
        }
    }

    #[test]
    fn a_row_has_the_documented_form() {
        let line = |key, value| serde_json::to_string(&printed(key, value, 3)).unwrap();
        assert_eq!(line(b"k", Some(b"v")), r#"{"key":"k","value":"v","version":3}"#);
        assert_eq!(line(b"\xff", Some(b"\xfe")), r#"{"key_b64":"/w==","value_b64":"/g==","version":3}"#);
        assert_eq!(line(b"k", None), r#"{"key":"k","version":3}"#);
    }

    #[test]
    fn a_malformed_line_says_what_is_wrong() {
        let error = |line: &str| parse(Format::Jsonl, line.as_bytes()).unwrap_err();
        assert!(error(r#"{"key":"a"}"#).contains("neither value"));
        assert!(error(r#"{"key":"a","key_b64":"YQ==","value":"b"}"#).contains("both key"));
        assert!(error(r#"{"key_b64":"?","value":"b"}"#).contains("key_b64"));
        assert!(error(r#"{"key":1,"value":"b"}"#).contains("expected"));
        assert!(!error("nonsense").is_empty());
        assert!(parse(Format::Tsv, b"no tab here").unwrap_err().contains("tab"));
    }

    #[test]
    fn tab_separated_values_may_hold_tabs_and_other_fields_are_passed_over() {
        assert_eq!(parse(Format::Tsv, b"k\tv\tw").unwrap(), Some((b"k".to_vec(), b"v\tw".to_vec())));
        let line = br#"{"version":9,"key":"k","extra":{"a":[1]},"value":"v"}"#;
        assert_eq!(parse(Format::Jsonl, line).unwrap(), Some((b"k".to_vec(), b"v".to_vec())));
        assert_eq!(parse(Format::Jsonl, b"  ").unwrap(), None);
    }

    #[test]
    fn the_form_is_told_by_the_first_line() {
        assert_eq!(format_of(b" {\"key\""), Format::Jsonl);
        assert_eq!(format_of(b"k\tv"), Format::Tsv);
    }
}
