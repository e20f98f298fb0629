//! Lines of `curl` as a page shows them, read as a shell and curl would: enough to send what the page promises, without
//! either of them.

/// A request that a line stands for.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Request {
    /// The method.
    pub method: String,
    /// What stands behind host and port.
    pub path: String,
    /// Header lines that are named, and the one that curl adds to a body.
    pub headers: Vec<(String, String)>,
    /// The body.
    pub body: Vec<u8>,
}

/// All lines of `text` that begin with `curl`, each up to the end of its quotes. `file` gives the bytes of a file that a
/// line names.
///
/// # Panics
/// If a line says what is not understood here: then the page says more than is tried.
#[must_use]
pub fn requests(text: &str, file: impl Fn(&str) -> Vec<u8>) -> Vec<Request> {
    let mut found = Vec::new();
    let mut lines = text.lines();
    while let Some(line) = lines.next() {
        if !line.starts_with("curl ") {
            continue;
        }
        let mut line = line.to_owned();
        let words = loop {
            if let Some(words) = words(&line) {
                break words;
            }
            let more = lines.next().unwrap_or_else(|| panic!("the quotes of {line} do not end"));
            line = format!("{line}\n{more}");
        };
        found.push(request(&words, &file));
    }
    found
}

/// The words of a line, with what is in single quotes as it is, and nothing behind a `#` that begins a word. `None` if the
/// quotes do not end.
fn words(line: &str) -> Option<Vec<String>> {
    let (mut words, mut word, mut is_quoted) = (Vec::new(), None::<String>, false);
    for char in line.chars() {
        match char {
            '\'' => {
                is_quoted = !is_quoted;
                word.get_or_insert_default();
            }
            ' ' if !is_quoted => words.extend(word.take()),
            '#' if !is_quoted && word.is_none() => break,
            other => word.get_or_insert_default().push(other),
        }
    }
    words.extend(word);
    (!is_quoted).then_some(words)
}

fn request(words: &[String], file: &impl Fn(&str) -> Vec<u8>) -> Request {
    let mut request = Request { method: String::new(), path: String::new(), headers: vec![], body: vec![] };
    let mut words = words.iter().skip(1);
    while let Some(word) = words.next() {
        let mut value = || words.next().unwrap_or_else(|| panic!("{word} has no value"));
        match word.as_str() {
            "-i" => {}
            "-X" => request.method.clone_from(value()),
            "-H" => {
                let line = value();
                let (name, text) = line.split_once(':').unwrap_or_else(|| panic!("no header line: {line}"));
                request.headers.push((name.to_owned(), text.trim().to_owned()));
            }
            "-d" => request.body = value().clone().into_bytes(),
            "--data-binary" => {
                let name = value();
                let name = name.strip_prefix('@').unwrap_or_else(|| panic!("{name} is no file"));
                request.body = file(name);
            }
            url => {
                let rest = url.strip_prefix("http://").unwrap_or_else(|| panic!("not understood: {url}"));
                request.path = rest.find('/').map_or("/", |at| &rest[at..]).to_owned();
            }
        }
    }
    assert!(!request.path.is_empty(), "a line names no address");
    if request.method.is_empty() {
        request.method = if request.body.is_empty() { "GET" } else { "POST" }.into();
    }
    if !request.body.is_empty() && !request.headers.iter().any(|(name, _)| name.eq_ignore_ascii_case("content-type")) {
        request.headers.push(("content-type".into(), "application/x-www-form-urlencoded".into()));
    }
    request
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_a_shell_and_curl_read_them() {
        let text = "text\ncurl -X PUT -d '{\"a\":\n 1}' http://localhost:1/a?b # a word's end\n   curl no\ncurl 'http://h/x#y'\n";
        let form = ("content-type".to_owned(), "application/x-www-form-urlencoded".to_owned());
        let put =
            Request { method: "PUT".into(), path: "/a?b".into(), headers: vec![form], body: b"{\"a\":\n 1}".to_vec() };
        let get = Request { method: "GET".into(), path: "/x#y".into(), headers: vec![], body: vec![] };
        assert_eq!(requests(text, |_| vec![]), [put, get]);
        let file = requests("curl --data-binary @f -H 'Content-Type: x' http://h/", |name| name.into());
        assert_eq!((&file[0].method[..], &file[0].path[..], &file[0].body[..]), ("POST", "/", &b"f"[..]));
        assert_eq!(file[0].headers, [("Content-Type".to_owned(), "x".to_owned())]);
    }
}
