//! The commands for many rows: range and count.

use crate::args::{Bounds, Count, Global, Output, Range};
use crate::outcome::{Ending, Trouble};
use crate::output::{Out, is_terminal};
use crate::point::{connect, say};
use crate::record::printed;
use serde_json::json;
use shkv_client::{KeyRange, Row};
use std::os::unix::ffi::OsStrExt;

fn range_of(bounds: &Bounds) -> KeyRange {
    let range = KeyRange {
        start: bounds.start.as_ref().map_or(Vec::new(), |start| start.as_bytes().to_vec()),
        end: bounds.end.as_ref().map(|end| end.as_bytes().to_vec()),
    };
    match &bounds.prefix {
        Some(prefix) => range.and(KeyRange::prefix(prefix.as_bytes())),
        None => range,
    }
}

/// The part of `range` behind `key` in the direction of the range.
fn behind(range: KeyRange, key: &[u8], reverse: bool) -> KeyRange {
    if reverse { range.and(KeyRange::from(..key)) } else { range.and(KeyRange::from([key, b"\0"].concat()..)) }
}

/// `count [START [END]]`
pub async fn count(global: &Global, args: Count) -> Result<Ending, Trouble> {
    let (client, keyspace) = connect(global).await?;
    let rows = keyspace.count(range_of(&args.bounds)).consistency(global.consistency.into()).await?;
    say(global.output, &rows.to_string(), &json!({"rows": rows, "token": client.token().to_string()}))
}

/// `range [START [END]]`: rows are printed as they come, and nothing is kept.
pub async fn range(global: &Global, args: Range) -> Result<Ending, Trouble> {
    let (client, keyspace) = connect(global).await?;
    let mut range = range_of(&args.bounds);
    if let Some(key) = &args.after {
        range = behind(range, key.as_bytes(), args.reverse);
    }
    let mut scan = keyspace.scan(range).consistency(global.consistency.into());
    if args.reverse {
        scan = scan.reverse();
    }
    if args.keys_only {
        scan = scan.keys_only();
    }
    if let Some(limit) = args.limit {
        scan = scan.limit(limit);
    }
    let mut rows = scan.rows();
    let mut out = Out::new();
    let at_once = is_terminal(); // a person sees each row when it comes; a pipe gets large pieces
    let mut count = 0_u64;
    if global.output == Output::Json {
        out.bytes(b"{\"rows\":[")?;
    }
    loop {
        let next = rows.next().await.map_err(Trouble::from);
        let row = match next {
            Ok(Some(row)) => row,
            Ok(None) => break,
            Err(trouble) => {
                out.flush()?; // what was read is shown, even if what it belongs to is cut off
                return Err(trouble);
            }
        };
        if global.output == Output::Json && count > 0 {
            out.bytes(b",")?;
        }
        print(&mut out, global.output, &row, args.keys_only)?;
        count += 1;
        if at_once {
            out.flush()?;
        }
    }
    if global.output == Output::Json {
        let more = args.limit.is_some_and(|limit| count >= limit) && rows.cursor().is_some();
        let token = json!(client.token().to_string());
        out.line(&format!("],\"count\":{count},\"more\":{more},\"token\":{token}}}"))?;
    }
    out.flush()?;
    Ok(Ending::Done)
}

fn print(out: &mut Out, format: Output, row: &Row, keys_only: bool) -> Result<(), Trouble> {
    match format {
        Output::Text => {
            out.bytes(&row.key)?;
            if !keys_only {
                out.bytes(b"\t")?;
                out.bytes(&row.value)?;
            }
            out.bytes(b"\n")
        }
        Output::Json => out.json(&printed(&row.key, (!keys_only).then_some(&row.value[..]), row.version)),
        Output::Jsonl => out.json_line(&printed(&row.key, (!keys_only).then_some(&row.value[..]), row.version)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_and_prefix_are_both_held() {
        let bounds = Bounds { start: Some("ab".into()), end: Some("z".into()), prefix: Some("a".into()) };
        assert_eq!(range_of(&bounds), KeyRange::from("ab".."b"));
        assert_eq!(range_of(&Bounds { start: None, end: None, prefix: None }), KeyRange::from(..));
    }

    #[test]
    fn a_range_goes_on_behind_a_key_both_ways() {
        let range = KeyRange::from("a".."z");
        assert_eq!(behind(range.clone(), b"m", false), KeyRange::from("m\0".."z"));
        assert_eq!(behind(range, b"m", true), KeyRange::from("a".."m"));
    }
}
