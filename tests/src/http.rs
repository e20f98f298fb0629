//! A small HTTP client for the tests: it says exactly what it is told to, and sees exactly what comes back.
//!
//! One connection is used for as many requests as the server lets it be. Nothing is retried, nothing is followed.

#![expect(clippy::disallowed_methods, reason = "a client that is slow on purpose waits")]

use crate::PATIENCE;
use serde_json::Value;
use std::io;
use std::time::Duration;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::TcpStream;

/// The usual deadline of a request is shorter than a machine may be held up that is busy with other tests.
const PATIENT: (&str, &str) = ("shkv-deadline-ms", "50000");

/// What came back.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The status code.
    pub status: u16,
    /// The header lines, names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, put together if it came in chunks.
    pub body: Vec<u8>,
}

impl Answer {
    /// The first value of a header.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(there, _)| there == name).map(|(_, value)| value.as_str())
    }

    /// The body as text.
    #[must_use]
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    #[must_use]
    pub fn json(&self) -> Value {
        serde_json::from_slice(&self.body).unwrap_or_else(|error| panic!("{error} in {self:?}"))
    }

    /// Looks that it is a success with this text.
    pub fn expect_text(&self, text: &str) {
        assert_eq!((self.status, &self.text()[..]), (200, text));
    }

    /// The body as JSON, after a look at the status.
    pub fn expect(&self, status: u16) -> Value {
        assert_eq!(self.status, status, "{}", self.text());
        if self.body.is_empty() { Value::Null } else { self.json() }
    }
}

/// A connection to a server, opened anew when the server has closed it.
#[derive(Debug)]
pub struct Http {
    addr: String,
    stream: Option<BufReader<TcpStream>>,
}

impl Http {
    /// A client of a server at `host:port`; it connects when it is first used.
    #[must_use]
    pub fn new(addr: impl Into<String>) -> Self {
        Self { addr: addr.into(), stream: None }
    }

    /// GET.
    pub async fn get(&mut self, path: &str) -> Answer {
        self.send("GET", path, &[PATIENT], b"").await
    }

    /// Any method with a JSON body.
    pub async fn json(&mut self, method: &str, path: &str, body: &Value) -> Answer {
        let headers = [("content-type", "application/json"), PATIENT];
        self.send(method, path, &headers, body.to_string().as_bytes()).await
    }

    /// Any method with any body and headers.
    pub async fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Answer {
        let asking = Box::pin(self.try_send(method, path, headers, body));
        match tokio::time::timeout(PATIENCE, asking).await {
            Ok(answer) => answer.unwrap_or_else(|error| panic!("{method} {path}: {error}")),
            Err(_) => panic!("{method} {path}: no answer"),
        }
    }

    /// The same; a connection that fails is an error.
    ///
    /// # Errors
    /// What the connection says. Whether the request was carried out is not known then.
    pub async fn try_send(
        &mut self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: &[u8],
    ) -> io::Result<Answer> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nhost: {}\r\n", self.addr);
        if !body.is_empty() || !matches!(method, "GET" | "HEAD" | "DELETE") {
            head += &format!("content-length: {}\r\n", body.len());
        }
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += "\r\n";
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        self.exchange(method, &bytes).await
    }

    /// Sends bytes as they are, which need not be a request, and reads one answer.
    ///
    /// # Errors
    /// What the connection says.
    pub async fn raw(&mut self, bytes: &[u8]) -> io::Result<Answer> {
        self.exchange("", bytes).await
    }

    async fn exchange(&mut self, method: &str, bytes: &[u8]) -> io::Result<Answer> {
        let mut stream = self.take().await?;
        // A server that refuses a body early may close before it has taken it all; its answer still stands.
        let sent = stream.get_mut().write_all(bytes).await;
        let answer = read(&mut stream, method).await.map_err(|error| sent.err().unwrap_or(error))?;
        if answer.header("connection") != Some("close") {
            self.stream = Some(stream);
        }
        Ok(answer)
    }

    async fn take(&mut self) -> io::Result<BufReader<TcpStream>> {
        match self.stream.take() {
            Some(stream) => Ok(stream),
            None => Ok(BufReader::new(TcpStream::connect(&self.addr).await?)),
        }
    }

    /// Connects, and says nothing.
    ///
    /// # Errors
    /// What the connection says.
    pub async fn connect(&mut self) -> io::Result<()> {
        self.stream = Some(self.take().await?);
        Ok(())
    }

    /// Sends bytes and waits for nothing.
    ///
    /// # Errors
    /// What the connection says.
    pub async fn say(&mut self, bytes: &[u8]) -> io::Result<()> {
        let mut stream = self.take().await?;
        stream.get_mut().write_all(bytes).await?;
        self.stream = Some(stream);
        Ok(())
    }

    /// Sends bytes one by one, with a pause behind each, until all are sent or the server ends it. Gives what the server has
    /// said when it has closed the connection.
    ///
    /// # Errors
    /// What the connection says; a reset counts as a close.
    pub async fn drip(&mut self, bytes: &[u8], pause: Duration) -> io::Result<String> {
        let (mut reader, mut writer) = self.take().await?.into_inner().into_split();
        let hearing = async {
            let mut heard = Vec::new();
            match reader.read_to_end(&mut heard).await {
                Ok(_) => Ok(heard),
                Err(error) if error.kind() == io::ErrorKind::ConnectionReset => Ok(heard),
                Err(error) => Err(error),
            }
        };
        let saying = async {
            for byte in bytes {
                if writer.write_all(&[*byte]).await.is_err() {
                    break;
                }
                tokio::time::sleep(pause).await;
            }
            std::future::pending::<()>().await;
        };
        tokio::select! { // the first arm ends when the server closes; what the second has sent by then is all that counts
            heard = hearing => heard.map(|heard| String::from_utf8_lossy(&heard).into_owned()),
            () = saying => unreachable!("it is never over"),
        }
    }
}

async fn read(stream: &mut BufReader<TcpStream>, method: &str) -> io::Result<Answer> {
    let first = line(stream).await?;
    let status = first.split(' ').nth(1).and_then(|status| status.parse().ok());
    let status: u16 = status.ok_or_else(|| io::Error::other(format!("no status in {first:?}")))?;
    let mut headers = Vec::new();
    loop {
        let text = line(stream).await?;
        let Some((name, value)) = text.split_once(':') else { break };
        headers.push((name.to_ascii_lowercase(), value.trim().to_owned()));
    }
    let mut answer = Answer { status, headers, body: vec![] };
    if method == "HEAD" || status == 204 || status == 304 {
        return Ok(answer);
    }
    if answer.header("transfer-encoding") == Some("chunked") {
        loop {
            let size = line(stream).await?;
            let size = usize::from_str_radix(&size, 16).map_err(io::Error::other)?;
            let at = answer.body.len();
            answer.body.resize(at + size, 0);
            stream.read_exact(&mut answer.body[at..]).await?;
            line(stream).await?;
            if size == 0 {
                return Ok(answer);
            }
        }
    }
    let length = answer.header("content-length").and_then(|length| length.parse().ok()).unwrap_or(0);
    answer.body.resize(length, 0);
    stream.read_exact(&mut answer.body).await?;
    Ok(answer)
}

async fn line(stream: &mut BufReader<TcpStream>) -> io::Result<String> {
    let mut line = String::new();
    if stream.read_line(&mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(line.trim_end().to_owned())
}
