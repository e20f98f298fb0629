//! Connections of a simulated network, under the names and with the methods of tokio's types. Outside of a simulation they
//! are tokio's.
//!
//! What is sent arrives after the delay of its way, in the order of its connection; connections overtake each other. A way
//! may be cut in one direction or both: what is under way is then held, as if it were sent again and again, until the way
//! is open or the connection is reset. Bytes are lost only with their connection.

mod streams;

pub use streams::{OwnedReadHalf, OwnedWriteHalf, StdListener, StdStream, TcpListener, TcpStream};

use super::sim::{Host, Trace};
use bytes::{Buf, Bytes};
use parking_lot::Mutex;
use rand::rngs::SmallRng;
use rand::{RngExt, SeedableRng};
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use tokio::io::ReadBuf;

/// Bytes that a connection takes in one direction before its reader has read them.
const WINDOW_BYTES: usize = 128 << 10;
/// Bytes that travel together at the most.
const SEGMENT_BYTES_MAX: usize = 16 << 10;
/// The first port that is given to whoever asks for any.
const ANY_PORT_FROM: u16 = 20_000;

/// How long a way takes.
#[derive(Clone, Copy, Debug)]
pub struct Link {
    /// Milliseconds at the least.
    pub delay_ms_min: u64,
    /// Milliseconds at the most.
    pub delay_ms_max: u64,
}

/// What becomes of the connections of a process that ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// The machine lives: the other sides hear of it.
    Reset,
    /// The machine is without power: nobody hears anything until it is back.
    Silence,
}

/// What a network has done.
#[derive(Clone, Copy, Default, Debug)]
pub struct NetStats {
    /// Connections that were opened.
    pub connections: u64,
    /// Segments that arrived.
    pub segments: u64,
    /// Bytes that arrived.
    pub bytes: u64,
    /// Things that were held because their way was cut.
    pub held: u64,
    /// Connections that were reset on purpose.
    pub resets: u64,
}

/// A simulated network.
#[derive(Debug)]
pub struct Net {
    state: Mutex<State>,
    trace: Arc<Trace>,
}

#[derive(Debug)]
struct State {
    now: u64,
    rng: SmallRng,
    usual: Link,
    links: BTreeMap<(IpAddr, IpAddr), Link>,
    cut: BTreeSet<(IpAddr, IpAddr)>,
    down: BTreeSet<IpAddr>,
    listeners: BTreeMap<SocketAddr, Listening>,
    conns: BTreeMap<u64, Conn>,
    events: BTreeMap<(u64, u64), Event>,
    held: Vec<Event>,
    last_conn: u64,
    last_event: u64,
    last_port: u16,
    stats: NetStats,
}

#[derive(Debug, Default)]
struct Listening {
    queue: VecDeque<u64>,
    waker: Option<Waker>,
}

/// A connection: side 0 opened it, side 1 accepted it.
#[derive(Debug)]
struct Conn {
    ends: [End; 2],
}

#[derive(Debug)]
struct End {
    addr: SocketAddr,
    up: bool,
    refused: bool,
    reset: bool,
    eof: bool,
    reads: bool,
    writes: bool,
    inbox: VecDeque<Bytes>,
    /// Bytes sent to this end and not yet read.
    unread: usize,
    /// The numbers of what is sent to this end next, and of what is expected next.
    sent: u64,
    expected: u64,
    early: BTreeMap<u64, What>,
    reader: Option<Waker>,
    writer: Option<Waker>,
}

#[derive(Debug)]
struct Event {
    conn: u64,
    to: usize,
    number: u64,
    what: What,
}

#[derive(Debug)]
enum What {
    Syn,
    SynAck,
    Refused,
    Data(Bytes),
    Fin,
    Reset,
}

impl End {
    fn new(addr: SocketAddr) -> Self {
        Self {
            addr,
            up: false,
            refused: false,
            reset: false,
            eof: false,
            reads: true,
            writes: true,
            inbox: VecDeque::new(),
            unread: 0,
            sent: 0,
            expected: 0,
            early: BTreeMap::new(),
            reader: None,
            writer: None,
        }
    }

    fn is_gone(&self) -> bool {
        !self.reads && !self.writes
    }

    fn wake(&mut self) {
        for waker in [self.reader.take(), self.writer.take()].into_iter().flatten() {
            waker.wake();
        }
    }

    fn vanish(&mut self) {
        (self.reads, self.writes) = (false, false);
        self.inbox.clear();
        (self.reader, self.writer) = (None, None);
    }
}

impl Net {
    /// A network whose ways take as long as `usual` says.
    #[must_use]
    pub fn new(seed: u64, usual: Link, trace: Arc<Trace>) -> Arc<Self> {
        let state = State {
            now: 0,
            rng: SmallRng::seed_from_u64(seed),
            usual,
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            down: BTreeSet::new(),
            listeners: BTreeMap::new(),
            conns: BTreeMap::new(),
            events: BTreeMap::new(),
            held: Vec::new(),
            last_conn: 0,
            last_event: 0,
            last_port: ANY_PORT_FROM,
            stats: NetStats::default(),
        };
        Arc::new(Self { state: Mutex::new(state), trace })
    }

    /// Where its events are written down.
    #[must_use]
    pub fn trace(&self) -> &Arc<Trace> {
        &self.trace
    }

    /// What it has done.
    #[must_use]
    pub fn stats(&self) -> NetStats {
        self.state.lock().stats
    }

    /// Makes it this time, and lets arrive what is due.
    pub fn go_on(&self, now_ms: u64) {
        let mut state = self.state.lock();
        state.now = now_ms;
        while let Some(first) = state.events.first_entry() {
            if first.key().0 > now_ms {
                break;
            }
            let event = first.remove();
            state.arrive(event, &self.trace);
        }
    }

    /// Makes a way take another time, or the usual.
    pub fn set_link(&self, from: IpAddr, to: IpAddr, link: Option<Link>) {
        let mut state = self.state.lock();
        match link {
            Some(link) => state.links.insert((from, to), link),
            None => state.links.remove(&(from, to)),
        };
    }

    /// Cuts the way from one host to another, in this direction only.
    pub fn cut(&self, from: IpAddr, to: IpAddr) {
        self.state.lock().cut.insert((from, to));
    }

    /// Opens a way again: what was held begins to travel.
    pub fn mend(&self, from: IpAddr, to: IpAddr) {
        let mut state = self.state.lock();
        if state.cut.remove(&(from, to)) {
            for event in std::mem::take(&mut state.held) {
                state.travel(event);
            }
        }
    }

    /// Opens all ways, and makes them take the usual time.
    pub fn mend_all(&self) {
        let mut state = self.state.lock();
        state.cut.clear();
        state.links.clear();
        for event in std::mem::take(&mut state.held) {
            state.travel(event);
        }
    }

    /// A host's process has ended.
    pub fn down(&self, ip: IpAddr, fate: Fate) {
        let mut state = self.state.lock();
        state.down.insert(ip);
        state.listeners.retain(|addr, _| addr.ip() != ip);
        let ours: Vec<(u64, usize)> = state.ends_of(ip);
        for (conn, side) in ours {
            if let Some(conn) = state.conns.get_mut(&conn) {
                conn.ends[side].vanish();
            }
            if fate == Fate::Reset {
                state.send(conn, 1 - side, What::Reset);
            }
        }
    }

    /// A host has a process again.
    pub fn up(&self, ip: IpAddr) {
        self.state.lock().down.remove(&ip);
    }

    /// Resets one connection between two hosts, any if there are several. Tells whether there was one.
    pub fn reset_one(&self, a: IpAddr, b: IpAddr, draw: u64) -> bool {
        let mut state = self.state.lock();
        let between = |conn: &&Conn| {
            let (x, y) = (conn.ends[0].addr.ip(), conn.ends[1].addr.ip());
            (x, y) == (a, b) || (x, y) == (b, a)
        };
        let found: Vec<u64> = state.conns.iter().filter(|(_, conn)| between(conn)).map(|(id, _)| *id).collect();
        if found.is_empty() {
            return false;
        }
        let id = found[(draw % found.len() as u64) as usize];
        state.stats.resets += 1;
        for side in 0..2 {
            let number = state.next_event();
            let at = (state.now + 1, number);
            state.events.insert(at, Event { conn: id, to: side, number: u64::MAX, what: What::Reset });
        }
        true
    }

    fn connect(self: &Arc<Self>, from: &Arc<Host>, to: SocketAddr) -> Half {
        let mut state = self.state.lock();
        state.last_conn += 1;
        let id = state.last_conn;
        let ours = SocketAddr::new(from.ip, state.any_port());
        state.conns.insert(id, Conn { ends: [End::new(ours), End::new(to)] });
        state.stats.connections += 1;
        state.send(id, 1, What::Syn);
        drop(state);
        Half { net: self.clone(), conn: id, side: 0 }
    }
}

impl State {
    fn next_event(&mut self) -> u64 {
        self.last_event += 1;
        self.last_event
    }

    fn any_port(&mut self) -> u16 {
        self.last_port = self.last_port.checked_add(1).unwrap_or(ANY_PORT_FROM);
        self.last_port
    }

    fn ends_of(&self, ip: IpAddr) -> Vec<(u64, usize)> {
        let sides = |(id, conn): (&u64, &Conn)| {
            let id = *id;
            let is_ours = [0, 1].map(|side| conn.ends[side].addr.ip() == ip);
            (0..2).filter(move |side| is_ours[*side]).map(move |side| (id, side))
        };
        self.conns.iter().flat_map(sides).collect()
    }

    /// Sends something to one end of a connection.
    fn send(&mut self, conn: u64, to: usize, what: What) {
        let Some(end) = self.conns.get_mut(&conn).map(|conn| &mut conn.ends[to]) else { return };
        let number = match what {
            What::Data(_) | What::Fin => {
                end.sent += 1;
                end.sent - 1
            }
            What::Syn | What::SynAck | What::Refused | What::Reset => u64::MAX,
        };
        self.travel(Event { conn, to, number, what });
    }

    fn travel(&mut self, event: Event) {
        let Some(conn) = self.conns.get(&event.conn) else { return };
        let way = (conn.ends[1 - event.to].addr.ip(), conn.ends[event.to].addr.ip());
        let link = self.links.get(&way).copied().unwrap_or(self.usual);
        let at = self.now + self.rng.random_range(link.delay_ms_min..=link.delay_ms_max).max(1);
        let number = self.next_event();
        self.events.insert((at, number), event);
    }

    fn arrive(&mut self, event: Event, trace: &Trace) {
        let Some(conn) = self.conns.get_mut(&event.conn) else { return };
        let (from, to) = (conn.ends[1 - event.to].addr, conn.ends[event.to].addr);
        if self.cut.contains(&(from.ip(), to.ip())) {
            self.stats.held += 1;
            self.held.push(event);
            return;
        }
        if self.down.contains(&to.ip()) {
            return; // nobody is there to hear it, or to say so
        }
        note(trace, &event, from, to);
        let Event { conn: id, to: side, number, what } = event;
        let end = &mut conn.ends[side];
        match what {
            What::Syn => match self.listeners.get_mut(&to) {
                Some(listening) => {
                    end.up = true;
                    listening.queue.push_back(id);
                    if let Some(waker) = listening.waker.take() {
                        waker.wake();
                    }
                    self.send(id, 0, What::SynAck);
                }
                None => {
                    end.vanish();
                    self.send(id, 0, What::Refused);
                }
            },
            What::SynAck => {
                end.up = true;
                end.wake();
            }
            What::Refused => {
                end.refused = true;
                end.wake();
            }
            What::Reset => {
                end.reset = true;
                end.wake();
            }
            What::Data(_) | What::Fin if end.is_gone() => self.send(id, 1 - side, What::Reset),
            What::Data(_) | What::Fin => {
                end.early.insert(number, what);
                while let Some(what) = end.early.remove(&end.expected) {
                    end.expected += 1;
                    match what {
                        What::Data(bytes) => {
                            self.stats.segments += 1;
                            self.stats.bytes += bytes.len() as u64;
                            end.inbox.push_back(bytes);
                        }
                        _ => end.eof = true,
                    }
                }
                if let Some(waker) = end.reader.take() {
                    waker.wake();
                }
            }
        }
        self.forget_if_over(id);
    }

    fn forget_if_over(&mut self, id: u64) {
        let is_over = |end: &End| end.is_gone() || self.down.contains(&end.addr.ip());
        if self.conns.get(&id).is_some_and(|conn| conn.ends.iter().all(is_over)) {
            self.conns.remove(&id);
        }
    }
}

fn note(trace: &Trace, event: &Event, from: SocketAddr, to: SocketAddr) {
    let (kind, bytes) = match &event.what {
        What::Syn => (1, 0),
        What::SynAck => (2, 0),
        What::Refused => (3, 0),
        What::Data(bytes) => (4, xxhash_rust::xxh3::xxh3_64(bytes)),
        What::Fin => (5, 0),
        What::Reset => (6, 0),
    };
    trace.note(&[kind, event.conn, event.number, bytes, event.to as u64], || {
        let what = match &event.what {
            What::Data(data) => {
                format!("{} bytes {bytes:016x} {}", data.len(), data[..data.len().min(160)].escape_ascii())
            }
            other => format!("{other:?}"),
        };
        format!("net {from} -> {to} #{}: {what}", event.conn)
    });
}

/// One side of a connection.
#[derive(Debug)]
struct Half {
    net: Arc<Net>,
    conn: u64,
    side: usize,
}

impl Half {
    fn again(&self) -> Self {
        Self { net: self.net.clone(), conn: self.conn, side: self.side }
    }

    fn poll_up(&self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.net.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Err(was_reset())) };
        let end = &mut conn.ends[self.side];
        if end.refused {
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::ConnectionRefused, "connection refused")));
        }
        if end.reset {
            return Poll::Ready(Err(was_reset()));
        }
        if end.up {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_read(&self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.net.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Err(was_reset())) };
        let (end, other) = conn.pair(self.side);
        if end.reset {
            return Poll::Ready(Err(was_reset()));
        }
        if let Some(front) = end.inbox.front_mut() {
            let count = front.len().min(buf.remaining());
            buf.put_slice(&front[..count]);
            front.advance(count);
            if front.is_empty() {
                end.inbox.pop_front();
            }
            end.unread -= count;
            if let Some(waker) = other.writer.take() {
                waker.wake();
            }
            return Poll::Ready(Ok(()));
        }
        if end.eof {
            return Poll::Ready(Ok(()));
        }
        end.reader = Some(cx.waker().clone());
        Poll::Pending
    }

    fn poll_write(&self, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.net.state.lock();
        let state = &mut *state;
        let Some(conn) = state.conns.get_mut(&self.conn) else { return Poll::Ready(Err(was_reset())) };
        let (end, other) = conn.pair(self.side);
        if end.reset {
            return Poll::Ready(Err(was_reset()));
        }
        if bytes.is_empty() {
            return Poll::Ready(Ok(0));
        }
        let room = WINDOW_BYTES.saturating_sub(other.unread);
        if room == 0 {
            end.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        // Now and then only a little is taken, so that frames are cut anywhere.
        let most = match state.rng.random_range(0..32) {
            0 => state.rng.random_range(1..200),
            _ => SEGMENT_BYTES_MAX,
        };
        let count = bytes.len().min(room).min(most);
        other.unread += count;
        state.send(self.conn, 1 - self.side, What::Data(Bytes::copy_from_slice(&bytes[..count])));
        Poll::Ready(Ok(count))
    }

    fn shut_writing(&self) {
        let mut state = self.net.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return };
        let end = &mut conn.ends[self.side];
        if std::mem::replace(&mut end.writes, false) && !end.reset {
            state.send(self.conn, 1 - self.side, What::Fin);
        }
        state.forget_if_over(self.conn);
    }

    fn shut_reading(&self) {
        let mut state = self.net.state.lock();
        let Some(conn) = state.conns.get_mut(&self.conn) else { return };
        let end = &mut conn.ends[self.side];
        end.reads = false;
        end.inbox.clear();
        state.forget_if_over(self.conn);
    }

    fn addr(&self, side: usize) -> io::Result<SocketAddr> {
        self.net.state.lock().conns.get(&self.conn).map(|conn| conn.ends[side].addr).ok_or_else(was_reset)
    }
}

impl Conn {
    /// This end and the other.
    fn pair(&mut self, side: usize) -> (&mut End, &mut End) {
        let [first, second] = &mut self.ends;
        if side == 0 { (first, second) } else { (second, first) }
    }
}

fn was_reset() -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, "connection reset by peer")
}

/// The half of a simulated connection that is read. Dropping it closes it.
#[derive(Debug)]
pub struct SimRead(Half);

/// The half of a simulated connection that is written. Dropping it says that no more comes.
#[derive(Debug)]
pub struct SimWrite(Half);

impl Drop for SimRead {
    fn drop(&mut self) {
        self.0.shut_reading();
    }
}

impl Drop for SimWrite {
    fn drop(&mut self) {
        self.0.shut_writing();
    }
}
