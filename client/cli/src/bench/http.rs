//! As much of HTTP/1.1 as a benchmark's client needs: one connection that is kept, one request on it at a time, bodies of a
//! stated length or in chunks (RFC 9112).

use anyhow::{Context, bail, ensure};
use bytes::{Buf, Bytes, BytesMut};
use serde_json::Value;
use std::io::Write;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

/// Longest head of an answer.
const HEAD_BYTES_MAX: usize = 64 << 10;
/// Longest body of an answer.
const BODY_BYTES_MAX: usize = 64 << 20;
/// Room made for each read.
const READ_BYTES: usize = 16 << 10;

/// One connection to a server. It is opened anew when the server has closed it between two requests.
#[derive(Debug)]
pub struct Connection {
    addr: String,
    stream: Option<TcpStream>,
    output: Vec<u8>,
    input: BytesMut,
}

/// What the server answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The body.
    pub body: Bytes,
}

impl Answer {
    /// Whether the status is one of success.
    pub fn is_success(&self) -> bool {
        (200..300).contains(&self.status)
    }

    /// The body as JSON, if the status is one of success.
    ///
    /// # Errors
    /// Another status, or no JSON, with the server's words.
    pub fn json(&self) -> anyhow::Result<Value> {
        let words = || String::from_utf8_lossy(&self.body[..self.body.len().min(300)]).into_owned();
        ensure!(self.is_success(), "status {}: {}", self.status, words());
        serde_json::from_slice(&self.body).with_context(|| format!("not JSON: {}", words()))
    }
}

/// What the head of an answer says of what follows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
struct Head {
    status: u16,
    length: usize,
    is_chunked: bool,
    closes: bool,
}

impl Connection {
    /// A connection to a server, which is opened with the first request.
    pub fn new(addr: &str) -> Self {
        Self { addr: addr.to_owned(), stream: None, output: Vec::new(), input: BytesMut::new() }
    }

    /// Sends a request and takes its answer. After an error the connection begins anew.
    ///
    /// # Errors
    /// The server cannot be reached, closes early, or does not speak HTTP.
    pub async fn ask(&mut self, method: &str, path: &str, kind: &str, body: &[u8]) -> anyhow::Result<Answer> {
        self.output.clear();
        write!(self.output, "{method} {path} HTTP/1.1\r\nHost: {}\r\n", self.addr)?;
        if !body.is_empty() {
            write!(self.output, "Content-Type: {kind}\r\n")?;
        }
        if !body.is_empty() || method != "GET" {
            write!(self.output, "Content-Length: {}\r\n", body.len())?;
        }
        self.output.extend_from_slice(b"\r\n");
        self.output.extend_from_slice(body);
        let answer = self.exchange().await;
        if answer.is_err() {
            self.stream = None;
        }
        answer.with_context(|| format!("{method} {path} at {}", self.addr))
    }

    /// The same with JSON both ways.
    ///
    /// # Errors
    /// The same, a status that is not of success, and an answer that is no JSON.
    pub async fn json(&mut self, method: &str, path: &str, body: &Value) -> anyhow::Result<Value> {
        let body = if body.is_null() { Vec::new() } else { serde_json::to_vec(body)? };
        let answer = self.ask(method, path, "application/json", &body).await?;
        answer.json().with_context(|| format!("{method} {path} at {}", self.addr))
    }

    async fn exchange(&mut self) -> anyhow::Result<Answer> {
        let mut stream = match self.stream.take() {
            Some(stream) => stream,
            None => {
                self.input.clear();
                let stream = TcpStream::connect(&self.addr).await.context("connecting")?;
                stream.set_nodelay(true)?;
                stream
            }
        };
        stream.write_all(&self.output).await?;
        let head = loop {
            match take_head(&mut self.input)? {
                Some(head) if head.status >= 200 => break head,
                Some(_) => {} // an interim answer
                None => more(&mut stream, &mut self.input).await?,
            }
        };
        let body = if head.is_chunked {
            let mut body = BytesMut::new();
            while !take_chunk(&mut self.input, &mut body)? {
                more(&mut stream, &mut self.input).await?;
            }
            body.freeze()
        } else {
            while self.input.len() < head.length {
                more(&mut stream, &mut self.input).await?;
            }
            self.input.split_to(head.length).freeze()
        };
        self.stream = (!head.closes).then_some(stream);
        Ok(Answer { status: head.status, body })
    }
}

async fn more(stream: &mut TcpStream, input: &mut BytesMut) -> anyhow::Result<()> {
    input.reserve(READ_BYTES);
    ensure!(stream.read_buf(input).await? > 0, "the server closed the connection");
    Ok(())
}

fn line_end(bytes: &[u8]) -> Option<usize> {
    bytes.windows(2).position(|pair| pair == b"\r\n")
}

/// Takes a whole head off the front; `None` while there is none.
fn take_head(input: &mut BytesMut) -> anyhow::Result<Option<Head>> {
    let Some(end) = input.windows(4).position(|four| four == b"\r\n\r\n") else {
        ensure!(input.len() <= HEAD_BYTES_MAX, "the head of the answer is too long");
        return Ok(None);
    };
    let bytes = input.split_to(end + 4);
    let text = std::str::from_utf8(&bytes[..end]).context("the head of the answer is no text")?;
    let mut lines = text.split("\r\n");
    let status = lines.next().and_then(|line| line.strip_prefix("HTTP/1.")?.get(2..5)?.parse().ok());
    let status = status.context("the answer is not HTTP/1")?;
    let mut head = Head { status, length: 0, is_chunked: false, closes: false };
    for (name, value) in lines.filter_map(|line| line.split_once(':')) {
        let value = value.trim();
        match name.to_ascii_lowercase().as_str() {
            "content-length" => head.length = value.parse().context("Content-Length is no number")?,
            "transfer-encoding" => head.is_chunked = value.eq_ignore_ascii_case("chunked"),
            "connection" => head.closes = value.eq_ignore_ascii_case("close"),
            _ => {}
        }
    }
    ensure!(head.length <= BODY_BYTES_MAX, "a body of {} bytes", head.length);
    Ok(Some(head))
}

/// Moves whole chunks from the front of `input` to `body`, and tells whether the last one was among them.
fn take_chunk(input: &mut BytesMut, body: &mut BytesMut) -> anyhow::Result<bool> {
    while let Some(end) = line_end(input) {
        let size = std::str::from_utf8(&input[..end]).ok().and_then(|line| line.split(';').next());
        let Some(size) = size.and_then(|text| usize::from_str_radix(text.trim(), 16).ok()) else {
            bail!("a chunk without a size");
        };
        ensure!(size <= BODY_BYTES_MAX - body.len().min(BODY_BYTES_MAX), "a body of too many bytes");
        if input.len() < end + 2 + size + 2 {
            return Ok(false);
        }
        input.advance(end + 2);
        body.extend_from_slice(&input[..size]);
        ensure!(input[size..size + 2] == *b"\r\n", "a chunk that does not end where it should");
        input.advance(size + 2);
        if size == 0 {
            return Ok(true);
        }
    }
    ensure!(input.len() <= HEAD_BYTES_MAX, "a chunk without an end of its first line");
    Ok(false)
}

/// A server for tests: what `answer` makes of method, path and body, with how many connections it has had.
#[cfg(test)]
#[expect(clippy::disallowed_methods, reason = "a shell: serves")]
pub(super) mod fake {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// Status and body of the answer to method, path and body.
    pub type Answers = dyn Fn(&str, &str, &[u8]) -> (u16, Vec<u8>) + Send + Sync;

    /// Its address, and the count of connections.
    pub async fn serve(answers: Arc<Answers>) -> (String, Arc<AtomicU64>) {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (addr, count) = (listener.local_addr().unwrap().to_string(), Arc::new(AtomicU64::new(0)));
        let counted = count.clone();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                counted.fetch_add(1, Ordering::Relaxed);
                let answers = answers.clone();
                tokio::spawn(async move {
                    let mut input = BytesMut::new();
                    loop {
                        while let Some((method, path, body)) = request(&mut input) {
                            let (status, body) = answers(&method, &path, &body);
                            // Every other answer is in chunks, so that both forms are met.
                            let chunked = body.len() % 2 == 1;
                            let mut output = format!("HTTP/1.1 {status} X\r\n").into_bytes();
                            if chunked {
                                write!(output, "transfer-encoding: chunked\r\n\r\n{:x}\r\n", body.len()).unwrap();
                                output.extend_from_slice(&body);
                                output.extend_from_slice(b"\r\n0\r\n\r\n");
                            } else {
                                write!(output, "Content-Length: {}\r\n\r\n", body.len()).unwrap();
                                output.extend_from_slice(&body);
                            }
                            stream.write_all(&output).await.unwrap();
                        }
                        if !stream.read_buf(&mut input).await.is_ok_and(|read| read > 0) {
                            return;
                        }
                    }
                });
            }
        });
        (addr, count)
    }

    fn request(input: &mut BytesMut) -> Option<(String, String, Vec<u8>)> {
        let end = input.windows(4).position(|four| four == b"\r\n\r\n")?;
        let head = String::from_utf8(input[..end].to_vec()).unwrap();
        let length = head.lines().find_map(|line| line.strip_prefix("Content-Length: ")?.parse().ok()).unwrap_or(0);
        if input.len() < end + 4 + length {
            return None;
        }
        let mut words = head.split(' ');
        let (method, path) = (words.next().unwrap().to_owned(), words.next().unwrap().to_owned());
        input.advance(end + 4);
        Some((method, path, input.split_to(length).to_vec()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    #[tokio::test]
    async fn one_connection_serves_all_requests_whatever_the_form_of_the_answer() {
        let echo = |method: &str, path: &str, body: &[u8]| {
            let status = if path == "/gone" { 404 } else { 200 };
            (status, json!([method, path, String::from_utf8_lossy(body)]).to_string().into_bytes())
        };
        let (addr, connections) = fake::serve(Arc::new(echo)).await;
        let mut connection = Connection::new(&addr);
        for path in ["/a", "/ab", "/abc"] {
            let told = connection.json("POST", path, &json!({"n": 1})).await.unwrap();
            assert_eq!(told, json!(["POST", path, "{\"n\":1}"]));
        }
        assert_eq!(connection.json("GET", "/b", &Value::Null).await.unwrap(), json!(["GET", "/b", ""]));
        let error = connection.json("GET", "/gone", &Value::Null).await.unwrap_err();
        assert!(format!("{error:#}").contains("status 404"), "{error:#}");
        assert_eq!(connections.load(Ordering::Relaxed), 1);
    }

    #[test]
    fn answers_are_taken_whole_or_not_at_all() {
        let all = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: close\r\n\r\n3;x=1\r\nabc\r\n2\r\nde\r\n0\r\n\r\n";
        let (mut input, mut body, mut head, mut ends) = (BytesMut::new(), BytesMut::new(), None, 0);
        for byte in all {
            input.extend_from_slice(&[*byte]);
            if head.is_none() {
                head = take_head(&mut input).unwrap();
            } else if take_chunk(&mut input, &mut body).unwrap() {
                ends += 1;
            }
        }
        assert_eq!(head, Some(Head { status: 200, length: 0, is_chunked: true, closes: true }));
        assert_eq!((&body[..], ends, input.len()), (&b"abcde"[..], 1, 0));
    }

    #[test]
    fn what_is_not_http_is_refused() {
        for bad in [
            &b"+OK\r\n\r\n"[..],
            b"HTTP/1.1 abc\r\n\r\n",
            b"HTTP/1.1 200\r\nContent-Length: x\r\n\r\n",
            b"HTTP/1.1 200 a\r\nContent-Length: 99999999999\r\n\r\n",
        ] {
            assert!(take_head(&mut BytesMut::from(bad)).is_err(), "{bad:?}");
        }
        assert!(take_head(&mut BytesMut::from(&[b'a'; HEAD_BYTES_MAX + 1][..])).is_err());
        for bad in [&b"zz\r\n"[..], b"1\r\nabc\r\n", b"ffffffff\r\n"] {
            assert!(take_chunk(&mut BytesMut::from(bad), &mut BytesMut::new()).is_err(), "{bad:?}");
        }
    }
}
