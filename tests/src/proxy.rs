//! A road to a server that can be closed: what a cut network does to whoever is reached by it.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "tests start tasks, and fail where they cannot go on"
)]

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use tokio::io::{AsyncReadExt, AsyncWriteExt, copy, copy_bidirectional};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The road. Everything on it ends with it.
pub struct Proxy {
    addr: String,
    target: Arc<parking_lot::Mutex<String>>,
    open: watch::Sender<bool>,
    losses: Arc<AtomicU32>,
}

/// Carries what goes there and what comes back, until it has come back so often; what comes then is lost, and the connection
/// with it, after whoever answered has done what was asked.
async fn lose_answers(mut near: TcpStream, mut far: TcpStream, answers: u32) {
    let (mut near_reader, mut near_writer) = near.split();
    let (mut far_reader, mut far_writer) = far.split();
    let back = async {
        let mut bytes = vec![0; 16 << 10];
        for _ in 0..answers {
            match far_reader.read(&mut bytes).await {
                Ok(read @ 1..) if near_writer.write_all(&bytes[..read]).await.is_ok() => {}
                _ => return,
            }
        }
        let _ = far_reader.read(&mut bytes).await; // this is what is lost
    };
    tokio::select! { // whichever ends first ends the other
        _ = copy(&mut near_reader, &mut far_writer) => {}
        () = back => {}
    }
}

impl Proxy {
    /// An open road to nowhere yet.
    pub async fn start() -> Self {
        Self::start_as(None).await
    }

    /// A road on which answers are lost: each connection ends with the loss of an answer, after 1 to `answers_max` pieces of
    /// what is answered have come through.
    pub async fn start_losing_answers(answers_max: u32) -> Self {
        Self::start_as(Some(answers_max)).await
    }

    async fn start_as(answers_max: Option<u32>) -> Self {
        let losses = Arc::new(AtomicU32::new(0));
        let counted = losses.clone();
        let listener = TcpListener::bind("127.0.0.1:0").await.expect("a port is free");
        let addr = listener.local_addr().expect("it listens").to_string();
        let target = Arc::new(parking_lot::Mutex::new(String::new()));
        let (open, state) = watch::channel(true);
        let leads_to = target.clone();
        tokio::spawn(async move {
            let mut state = state;
            loop {
                let accepted = tokio::select! { // both arms are cancel-safe
                    accepted = listener.accept() => accepted,
                    changed = state.changed() => match changed {
                        Ok(()) => continue,
                        Err(_) => return,
                    },
                };
                let Ok((mut near, _)) = accepted else { continue };
                let mut state = state.clone();
                if !*state.borrow_and_update() {
                    continue; // closed at once: nobody gets through
                }
                let target = leads_to.lock().clone();
                let counted = counted.clone();
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    if let Some(answers_max) = answers_max {
                        let number = counted.fetch_add(1, Ordering::Relaxed);
                        // The first piece is the handshake's: at least one answer must have a chance.
                        return lose_answers(near, far, 2 + number.wrapping_mul(7) % answers_max).await;
                    }
                    tokio::select! { // whichever ends first ends the other: the road is closed, or the connection
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        _ = state.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { addr, target, open, losses }
    }

    /// Connections that were made, on a road that loses answers.
    #[must_use]
    pub fn losses(&self) -> u32 {
        self.losses.load(Ordering::Relaxed)
    }

    /// Where it begins.
    #[must_use]
    pub fn addr(&self) -> &str {
        &self.addr
    }

    /// Leads it to an address from now on.
    pub fn lead_to(&self, target: &str) {
        *self.target.lock() = target.to_owned();
    }

    /// Closes it, with everything that is on it.
    pub fn cut(&self) {
        self.open.send_replace(false);
    }

    /// Opens it again.
    pub fn mend(&self) {
        self.open.send_replace(true);
    }
}
