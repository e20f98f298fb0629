//! The load balancer's routes: `/rep`, `/add`, `/rm`, and requests that go to one node of the pool.

#![expect(clippy::disallowed_methods, reason = "a shell: draws numbers of requests and waits for nodes")]

use crate::http::Front;
use crate::http::answer::{Envelope, empty_answer, json_answer, status_of};
use crate::http::asked::{Query, Raw};
use crate::http::openapi::Route;
use crate::http::pool::Member;
use crate::http::store::Ask;
use axum::Router;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use rand::RngExt;
use serde::Deserialize;
use serde_json::{Value, json};
use shkv_proto::link::{LinkError, done_or_failure};
use shkv_proto::map::NodeState;
use shkv_proto::message::{Admin, Failure};
use shkv_proto::{Frame, Header, Kind};
use std::collections::BTreeSet;
use std::time::Duration;
use tokio::sync::oneshot;
use tokio::time::Instant;

/// How long a node may take to answer before the next one is asked, the first time.
const NODE_TIME_MAX: Duration = Duration::from_secs(2);
/// Pause before all are asked again when none has answered.
const PAUSE: Duration = Duration::from_millis(50);
/// How long `/add` waits until the new nodes are of the cluster.
const ADD_TIME_MAX: Duration = Duration::from_secs(60);
/// How often that is looked at when nothing has been heard.
const ADD_LOOK_EVERY: Duration = Duration::from_millis(200);
/// Most nodes that one request adds or removes.
const NODES_MAX: u64 = 100;

/// `/rep`, `/home`, `/heartbeat`.
pub(crate) fn routes() -> Router<Front> {
    Router::new().route("/rep", get(replicas)).route("/home", get(home)).route("/heartbeat", get(heartbeat))
}

/// A route as it is described.
const fn described(method: &'static str, path: &'static str, does: &'static str, answers: &'static [u16]) -> Route {
    Route { method, path, system: "load balancer", does, body: "", takes: &[], answers }
}

/// The routes as they are described; `/add` and `/rm` have the database's forms, too.
pub(crate) const ROUTES: &[Route] = &[
    described("get", "/rep", "The nodes of the pool", &[200]),
    described("get", "/home", "A greeting of the node that the request is routed to", &[200, 400, 503]),
    described("get", "/heartbeat", "Whether the node answers that the request is routed to", &[200, 400, 503]),
    Route {
        body: r#"{"n":2,"hostnames?":["S4","S5"]}"#,
        ..described(
            "post",
            "/add",
            "Adds nodes to the pool, or with servers to the database",
            &[200, 400, 408, 409, 413, 501, 503, 507],
        )
    },
    Route {
        takes: &["N", "n", "replicas", "hostnames"],
        ..described("get", "/add", "Adds nodes to the pool", &[200, 400, 408, 413, 501, 503, 507])
    },
    Route {
        body: r#"{"n":1,"hostnames?":["S4"]}"#,
        ..described(
            "delete",
            "/rm",
            "Removes nodes from the pool, or with servers from the database",
            &[200, 400, 408, 409, 413, 503, 507],
        )
    },
    Route {
        body: r#"{"n":1,"hostnames?":["S4"]}"#,
        ..described("post", "/rm", "The same as DELETE", &[200, 400, 408, 409, 413, 503, 507])
    },
];

async fn replicas(State(front): State<Front>) -> Response {
    listing(&front)
}

fn listing(front: &Front) -> Response {
    let names: Vec<String> = members(front).into_iter().map(|member| member.name).collect();
    json_answer(StatusCode::OK, &json!({"message": {"N": names.len(), "replicas": names}, "status": "successful"}))
}

fn members(front: &Front) -> Vec<Member> {
    front.pool.members(front.store.routes().map())
}

// ---------------------------------------------------------------------------------------------- to a node

async fn home(State(front): State<Front>, ask: Ask) -> Response {
    match route(&front, &ask).await {
        Some(member) => {
            let text = format!("Hello from Server: {}", member.number);
            json_answer(StatusCode::OK, &json!({"message": text, "status": "successful"}))
        }
        None => Envelope::Status.problem(StatusCode::SERVICE_UNAVAILABLE, "<Error> Server did not respond"),
    }
}

async fn heartbeat(State(front): State<Front>, ask: Ask) -> Response {
    match route(&front, &ask).await {
        Some(_) => empty_answer(StatusCode::OK),
        None => Envelope::Status.problem(StatusCode::SERVICE_UNAVAILABLE, "<Error> Server did not respond"),
    }
}

/// The answer to a path that no node serves.
pub(crate) fn no_endpoint(path: &str) -> Response {
    let text = format!("<Error> '{path}' endpoint does not exist in server replicas");
    Envelope::Status.problem(StatusCode::BAD_REQUEST, &text)
}

/// Asks the node that a request of a random number goes to whether it is there; if it does not answer, the next one. At a
/// node's own listener it is that node. When none has answered, they are asked again, with twice the time: all may be busy
/// with a crowd. Those that are known to be down are not asked, and nobody is when all are.
async fn route(front: &Front, ask: &Ask) -> Option<Member> {
    let request = rand::rng().random_range(100_000..1_000_000);
    let mut patience = NODE_TIME_MAX;
    loop {
        let mut order = front.pool.order(front.store.cluster(), request);
        if let Some(this) = &front.this {
            order.retain(|member| member.name == **this);
        }
        if order.is_empty() {
            return None;
        }
        for member in order {
            match is_there(front, &member, request, ask.deadline.min(Instant::now() + patience)).await {
                Ok(()) => return Some(member),
                Err(error) => tracing::debug!(%error, node = member.name, "a node did not answer"),
            }
        }
        if Instant::now() + PAUSE >= ask.deadline {
            return None;
        }
        tokio::time::sleep(PAUSE).await;
        patience *= 2;
    }
}

async fn is_there(front: &Front, member: &Member, lane: u64, deadline: Instant) -> Result<(), String> {
    let home = front.store.cluster().pool.get(member.id).ok_or("no address is known")?;
    let (sender, receiver) = oneshot::channel();
    let done = move |result: Result<Frame, LinkError>| drop(sender.send(result));
    let frame = Frame::new(Header::new(Kind::Status), vec![], vec![]);
    home.link(lane as usize).clone().submit(frame, deadline, done).await;
    let answer = receiver.await.map_err(|_| "the link was closed".to_owned())?;
    let answer = answer.map_err(|error| error.to_string())?;
    done_or_failure(answer).map(drop).map_err(|failure| failure.to_string())
}

// ---------------------------------------------------------------------------------------------- more and fewer

/// What `/add` and `/rm` say.
#[derive(Debug, Default, Deserialize)]
struct Change {
    #[serde(alias = "N")]
    n: Option<u64>,
    #[serde(default, alias = "replicas")]
    hostnames: Option<Vec<String>>,
}

impl Change {
    /// How many, and the names of some of them.
    fn read(body: Value, too_many: &str) -> Result<(u32, Vec<String>), String> {
        let change: Change = serde_json::from_value(body)
            .map_err(|error| format!("<Error> Request payload in incorrect format: {error}"))?;
        let names = change.hostnames.unwrap_or_default();
        let n = change.n.ok_or("<Error> Request payload does not say n, the number of servers")?;
        if n == 0 || n > NODES_MAX {
            return Err(format!("<Error> n is a number of servers from 1 to {NODES_MAX}, not {n}"));
        }
        if names.len() as u64 > n {
            return Err(too_many.to_owned());
        }
        let mut seen = BTreeSet::new();
        if let Some(twice) = names.iter().find(|name| !seen.insert(name.as_str())) {
            return Err(format!("<Error> Hostname {twice} is given twice"));
        }
        Ok((n as u32, names))
    }
}

fn bad(text: &str) -> Response {
    Envelope::Status.problem(StatusCode::BAD_REQUEST, text)
}

/// What the cluster has against a change: that it contradicts what is there is a bad request here.
fn against(failure: &Failure) -> Response {
    let (status, _) = status_of(failure);
    let bad_request = matches!(status, StatusCode::CONFLICT | StatusCode::NOT_FOUND);
    let status = if bad_request { StatusCode::BAD_REQUEST } else { status };
    Envelope::Status.problem(status, &format!("<Error> {failure}"))
}

/// `POST /add`
pub(crate) async fn add(front: &Front, body: Value) -> Response {
    let too_many = "<Error> Length of hostname list is more than newly added instances";
    let (count, mut names) = match Change::read(body, too_many) {
        Ok(change) => change,
        Err(text) => return bad(&text),
    };
    let known: BTreeSet<String> = members(front).into_iter().map(|member| member.name).collect();
    let taken: Vec<&String> = names.iter().filter(|name| known.contains(*name)).collect();
    if !taken.is_empty() {
        return bad(&format!("<Error> Hostnames {taken:?} are already in replicas"));
    }
    while names.len() < count as usize {
        let name = random_name();
        if !known.contains(&name) && !names.contains(&name) {
            names.push(name);
        }
    }
    match front.store.admin(Admin::AddNodes { count, names }).await {
        Err(failure) => against(&failure),
        Ok(done) => match wait_for(front, &done.names).await {
            Ok(()) => listing(front),
            Err(missing) => {
                let text = format!("<Error> still being started: {}", missing.join(", "));
                Envelope::Status.problem(StatusCode::SERVICE_UNAVAILABLE, &text)
            }
        },
    }
}

/// `GET /add`: the same, also with the query's parameters `N` and `replicas`, names separated by commas.
pub(crate) async fn add_by_get(State(front): State<Front>, mut query: Query, raw: Raw) -> Response {
    let body = if raw.bytes.is_empty() {
        let n = match (query.parsed::<u64>("N"), query.parsed::<u64>("n")) {
            (Ok(upper), Ok(lower)) => upper.or(lower),
            (Err(text), _) | (_, Err(text)) => return bad(&format!("<Error> {text}")),
        };
        let names = query.take("replicas").or_else(|| query.take("hostnames")).unwrap_or_default();
        let names = String::from_utf8_lossy(&names).into_owned();
        let names: Vec<&str> = names.split(',').filter(|name| !name.is_empty()).collect();
        if let Err(text) = query.finish() {
            return bad(&format!("<Error> {text}"));
        }
        json!({"n": n, "hostnames": names})
    } else {
        match raw.json() {
            Ok(body) => body,
            Err(text) => return bad(&format!("<Error> {text}")),
        }
    };
    add(&front, body).await
}

/// `Server-`, three random digits, and the milliseconds of the time modulo 1000.
fn random_name() -> String {
    let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    format!("Server-{:03}-{:03}", rand::rng().random_range(0..1000), since.as_millis() % 1000)
}

/// Waits until these nodes are up; gives those that are not in time.
async fn wait_for(front: &Front, names: &[String]) -> Result<(), Vec<String>> {
    let cluster = front.store.cluster();
    let until = Instant::now() + ADD_TIME_MAX;
    let mut news = cluster.news();
    loop {
        let routes = cluster.routes();
        let is_up =
            |name: &String| routes.map().nodes.iter().any(|node| node.name == *name && node.state == NodeState::Up);
        let missing: Vec<String> = names.iter().filter(|name| !is_up(name)).cloned().collect();
        if missing.is_empty() {
            return Ok(());
        }
        if Instant::now() >= until {
            return Err(missing);
        }
        cluster.map_wanted.notify_one();
        // Whether news came or not, the next round looks again.
        let _ = tokio::time::timeout(ADD_LOOK_EVERY, news.changed()).await;
    }
}

/// `DELETE /rm`
pub(crate) async fn remove(front: &Front, body: Value) -> Response {
    let too_many = "<Error> Length of hostname list is more than removable instances";
    let (count, names) = match Change::read(body, too_many) {
        Ok(change) => change,
        Err(text) => return bad(&text),
    };
    let known = members(front);
    if let Some(unknown) = names.iter().find(|name| !known.iter().any(|member| member.name == **name)) {
        return bad(&format!("<Error> Hostname {unknown} is not in replicas"));
    }
    if count as usize > known.len() {
        return bad(&format!("<Error> {count} servers cannot be removed, there are only {}", known.len()));
    }
    match front.store.admin(Admin::RemoveNodes { count, names }).await {
        Err(failure) => against(&failure),
        Ok(_) => listing(front),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_is_read_in_all_its_spellings_or_refused() {
        let read = |body: Value| Change::read(body, "too many");
        assert_eq!(read(json!({"n": 2, "hostnames": ["a"]})), Ok((2, vec!["a".into()])));
        assert_eq!(read(json!({"N": 1, "replicas": []})), Ok((1, vec![])));
        assert_eq!(read(json!({"n": 1, "hostnames": ["a", "b"]})), Err("too many".into()));
        for bad in [json!({}), json!([]), json!({"n": 0}), json!({"n": -1}), json!({"n": 2, "hostnames": ["a", "a"]})] {
            assert!(read(bad.clone()).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_random_name_has_two_numbers_of_three_digits() {
        let name = random_name();
        let digits: Vec<&str> = name.split('-').skip(1).collect();
        assert!(
            digits.len() == 2 && digits.iter().all(|part| part.len() == 3 && part.parse::<u32>().is_ok()),
            "{name}"
        );
    }
}
