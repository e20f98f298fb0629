//! Bodies of requests that are JSON, or nearly: a sound one in which bytes choose what is dropped, named twice, or put in the
//! place of a value.

use super::Draw;
use serde_json::Value;

/// What is put in the place of a value, in the words that are sent.
const ODD: [&[u8]; 44] = [
    b"null",
    b"true",
    b"[]",
    b"{}",
    b"\"\"",
    b"0",
    b"-0",
    b"-1",
    b"1",
    b"4096",
    b"1.5",
    b"1e15",
    b"1e308",
    b"1e400",
    b"-1e-400",
    b"18446744073709551615",
    b"18446744073709551616",
    b"9223372036854775807",
    b"9007199254740993",
    b"123456789012345678901234567890",
    b"\"2255\"",
    b"\"x\"",
    b"\"sh1\"",
    b"\"Stud_id\"",
    b"\"Server0\"",
    b"\"127.0.0.1:1\"",
    b"\"\\u0000\"",
    b"\"\\ud800\"",
    b"\"\\udc00\\ud800\"",
    b"\"\\ud83d\\ude00\"",
    b"\"\xff\xfe\"",
    b"\"\xc3(\"",
    b"\"\xed\xa0\x80\"",
    b"\"tab\there\"",
    b"\"a,b/c%2F\\\"\\\\\"",
    b"\"open",
    b"[1,2,3]",
    b"[\"sh1\",\"sh1\"]",
    b"[null,{},[[]]]",
    b"{\"a\":1,\"a\":2}",
    b"{\"low\":5,\"high\":1}",
    b"{\"low\":0,\"high\":1e999}",
    b"{\"encoding\":\"string\",\"data\":\"k\"}",
    b"nul",
];

/// What is longer than the constants above.
const DEPTHS: [usize; 6] = [64, 120, 126, 128, 1_000, 100_000];
const LENGTHS: [usize; 5] = [50, 51, 256, 4_096, 70_000];

fn odd(draw: &mut Draw<'_>) -> Vec<u8> {
    match draw.byte() {
        0..200 => draw.one_of(&ODD).to_vec(),
        200..212 => nested(draw.one_of(&DEPTHS)),
        212..224 => {
            let letter = draw.one_of(&["a", "é", "\\u0001", "😀"]);
            format!("\"{}\"", letter.repeat(draw.one_of(&LENGTHS))).into_bytes()
        }
        224..230 => list(draw.one_of(&ODD), 2 + draw.below(2_000)),
        230..240 => format!("{}", draw.number()).into_bytes(),
        _ => {
            let length = usize::from(draw.byte() % 24);
            draw.bytes(length).to_vec()
        }
    }
}

/// Lists within lists.
#[must_use]
pub fn nested(depth: usize) -> Vec<u8> {
    [vec![b'['; depth], vec![b']'; depth]].concat()
}

/// So many times the same.
#[must_use]
pub fn list(element: &[u8], count: usize) -> Vec<u8> {
    let mut text = Vec::with_capacity((element.len() + 1) * count + 2);
    text.push(b'[');
    for at in 0..count {
        if at > 0 {
            text.push(b',');
        }
        text.extend_from_slice(element);
    }
    text.push(b']');
    text
}

fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(fields) => fields.values().map(count).sum(),
        _ => 0,
    }
}

/// What is done to one value of a sound body.
#[derive(Clone)]
struct Change {
    /// Its number in the order in which values are written.
    at: usize,
    text: Vec<u8>,
    /// Whether a field is named once more instead, so that it has two values.
    twice: bool,
    /// Whether it is left out.
    drop: bool,
}

/// A body: the sample with up to three of its values changed, or what the bytes are by themselves.
#[must_use]
pub fn body(sample: &Value, draw: &mut Draw<'_>) -> Vec<u8> {
    let how = draw.byte();
    if how >= 240 {
        return draw.bytes(400).to_vec();
    }
    if how >= 228 {
        return odd(draw);
    }
    let mut changes = Vec::new();
    for _ in 0..[0, 1, 1, 1, 1, 2, 2, 3][usize::from(how % 8)] {
        let at = draw.below(count(sample));
        let form = draw.byte();
        changes.push(Change { at, text: odd(draw), twice: form >= 232, drop: (200..232).contains(&form) });
    }
    let mut out = Vec::new();
    write(sample, &mut 0, &changes, &mut out);
    if how % 32 == 31 {
        out.truncate(draw.below(out.len() + 1));
    }
    out
}

/// The sample, once for each of its values, with this in the value's place.
pub fn with_each_value_replaced(sample: &Value, text: &[u8]) -> impl Iterator<Item = Vec<u8>> {
    (0..count(sample)).map(move |at| {
        let mut out = Vec::new();
        write(sample, &mut 0, &[Change { at, text: text.to_vec(), twice: false, drop: false }], &mut out);
        out
    })
}

fn write(value: &Value, number: &mut usize, changes: &[Change], out: &mut Vec<u8>) {
    let change = changes.iter().find(|change| change.at == *number && !change.twice && !change.drop);
    if let Some(change) = change {
        *number += count(value);
        return out.extend_from_slice(&change.text);
    }
    *number += 1;
    match value {
        Value::Array(list) => {
            out.push(b'[');
            for (at, one) in list.iter().enumerate() {
                if at > 0 {
                    out.push(b',');
                }
                write(one, number, changes, out);
            }
            out.push(b']');
        }
        Value::Object(fields) => {
            out.push(b'{');
            let mut is_first = true;
            for (name, one) in fields {
                let dropped = changes.iter().any(|change| change.at == *number && change.drop);
                let doubled = changes.iter().find(|change| change.at == *number && change.twice);
                if dropped {
                    *number += count(one);
                    continue;
                }
                for text in doubled.iter().map(|change| &change.text) {
                    out.extend_from_slice(if is_first { b"" } else { b"," });
                    out.extend_from_slice(format!("{}:", Value::from(name.as_str())).as_bytes());
                    out.extend_from_slice(text);
                    is_first = false;
                }
                out.extend_from_slice(if is_first { b"" } else { b"," });
                out.extend_from_slice(format!("{}:", Value::from(name.as_str())).as_bytes());
                is_first = false;
                write(one, number, changes, out);
            }
            out.push(b'}');
        }
        scalar => out.extend_from_slice(scalar.to_string().as_bytes()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn written(sample: &Value, changes: &[Change]) -> String {
        let mut out = Vec::new();
        write(sample, &mut 0, changes, &mut out);
        String::from_utf8(out).expect("the changes are text")
    }

    #[test]
    fn one_value_is_changed_doubled_or_dropped_and_the_rest_stays() {
        let sample = json!({"a": [1, {"b": 2}], "c": 3});
        assert_eq!(written(&sample, &[]), r#"{"a":[1,{"b":2}],"c":3}"#);
        let change = |at| Change { at, text: b"X".to_vec(), twice: false, drop: false };
        let texts: Vec<String> = (0..count(&sample)).map(|at| written(&sample, &[change(at)])).collect();
        assert_eq!(texts[0], "X");
        assert_eq!(texts[1], r#"{"a":X,"c":3}"#);
        assert_eq!(texts[4], r#"{"a":[1,{"b":X}],"c":3}"#);
        assert_eq!(texts[5], r#"{"a":[1,{"b":2}],"c":X}"#);
        let twice = Change { twice: true, ..change(5) };
        assert_eq!(written(&sample, &[twice]), r#"{"a":[1,{"b":2}],"c":X,"c":3}"#);
        let drop = Change { drop: true, ..change(1) };
        assert_eq!(written(&sample, &[drop, change(5)]), r#"{"c":X}"#);
    }
}
