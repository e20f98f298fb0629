//! What an operator asks of a cluster: wishes, and whether somebody is there.

#![expect(clippy::disallowed_methods, reason = "a shell: tells the time and waits")]

use crate::call::{CONNECT_TIME_MAX, Span, attempt};
use crate::client::Client;
use crate::error::Error;
use crate::inner::Inner;
use bytes::Bytes;
use shkv_proto::codec;
use shkv_proto::frame::{Frame, Header, Kind};
use shkv_proto::link::CallError;
use shkv_proto::message::{Admin, AdminDone, Failure, Hello, RefusalCode, Role, Welcome};
use shkv_proto::retry::{self, Step};
use tokio::time::Instant;

impl Client {
    /// Tells a balancer what is wanted of the cluster. When it returns, the wish is written into the map; the balancer
    /// that controls the cluster carries it out, and [`Client::status`] tells how far it is.
    ///
    /// # Errors
    /// [`Error::Refused`] with what is wrong with the wish, [`Error::Unavailable`], or [`Error::Unknown`] when the answer
    /// was lost.
    ///
    /// ```no_run
    /// # async fn example(client: shkv_client::Client) -> Result<(), shkv_client::Error> {
    /// use shkv_client::Admin;
    ///
    /// let done = client.admin(&Admin::AddNodes { count: 2, names: vec!["Server7".into()] }).await?;
    /// println!("{:?} are on their way", done.names);
    /// # Ok(())
    /// # }
    /// ```
    pub async fn admin(&self, wish: &Admin) -> Result<AdminDone, Error> {
        let inner = self.inner();
        let deadline = Span::of(inner.config.deadline).deadline;
        let head = codec::encode(wish)
            .map_err(|error| Error::refused(RefusalCode::Malformed, error.to_string()))
            .map(Bytes::from)?;
        for tries in 1.. {
            let error = match ask(inner, head.clone(), deadline).await {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            if matches!(error, CallError::Link(_)) {
                inner.next_home();
            }
            match retry::after(&error, true, tries) {
                Step::Stop(failure) => return Err(failure.into()),
                Step::Again { after, .. } if Instant::now() + after < deadline => tokio::time::sleep(after).await,
                Step::Again { .. } => return Err(retry::out_of_time(&error, true).into()),
            }
        }
        Err(Error::unavailable("more attempts than can be counted"))
    }
}

async fn ask(inner: &Inner, head: Bytes, deadline: Instant) -> Result<AdminDone, CallError> {
    let link = inner.home();
    let up_by = deadline.min(Instant::now() + CONNECT_TIME_MAX);
    let welcome = link.connected(up_by).await.inspect_err(|_| link.retry_now())?;
    if welcome.role != Role::Balancer {
        let text = format!("{} is a node; name the address of a balancer", welcome.name);
        return Err(Failure::refusal(RefusalCode::NotAllowed, text).into());
    }
    let frame = Frame::new(Header::new(Kind::Admin), head, Bytes::new());
    let answer = attempt(link, frame, Instant::now(), deadline).await?;
    codec::decode(&answer.head).map_err(|error| Failure::unknown(error.to_string()).into())
}

/// Connects to an address and tells who is there. It needs neither a map nor a quorum.
///
/// # Errors
/// [`Error::Unavailable`] when nobody answers, [`Error::Refused`] by somebody who does not take the connection.
///
/// ```no_run
/// # async fn example() -> Result<(), shkv_client::Error> {
/// println!("{}", shkv_client::ping("127.0.0.1:7400").await?.name);
/// # Ok(())
/// # }
/// ```
pub async fn ping(addr: &str) -> Result<Welcome, Error> {
    match shkv_proto::session::connect(addr, &Hello::ours(None, Role::Client)).await {
        Ok(session) => Ok(session.peer),
        Err(error) => Err(refused_by(&error).unwrap_or_else(|| Error::unavailable(error.to_string()))),
    }
}

fn refused_by(error: &shkv_proto::session::SessionError) -> Option<Error> {
    match error {
        shkv_proto::session::SessionError::Refused(failure) => Some(Error::from(failure.clone())),
        _ => None,
    }
}
