//! A road to a server that can be closed: what a cut network does to whoever is reached by it.

#![expect(
    clippy::disallowed_methods,
    clippy::expect_used,
    reason = "tests start tasks, and fail where they cannot go on"
)]

use std::sync::Arc;
use tokio::io::copy_bidirectional;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// The road. Everything on it ends with it.
pub struct Proxy {
    addr: String,
    target: Arc<parking_lot::Mutex<String>>,
    open: watch::Sender<bool>,
}

impl Proxy {
    /// An open road to nowhere yet.
    pub async fn start() -> Self {
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
                tokio::spawn(async move {
                    let Ok(mut far) = TcpStream::connect(target).await else { return };
                    tokio::select! { // whichever ends first ends the other: the road is closed, or the connection
                        _ = copy_bidirectional(&mut near, &mut far) => {}
                        _ = state.wait_for(|open| !open) => {}
                    }
                });
            }
        });
        Self { addr, target, open }
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
