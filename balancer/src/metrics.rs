//! What a balancer counts, and how it is told to Prometheus. Counting is one atomic addition; a registry per balancer,
//! because one process may run several.

use prometheus_client::encoding::EncodeLabelSet;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use shkv_proto::Kind;
use shkv_proto::message::Failure;
use std::sync::atomic::AtomicU64;

/// The kinds of request that are counted apart; the last stands for all others.
const KINDS: [&str; 9] = ["get", "put", "delete", "batch", "scan", "count", "map", "status", "other"];
/// How a request can end.
const OUTCOMES: [&str; 4] = ["done", "refused", "busy", "unknown"];

/// The counters.
#[derive(Debug)]
pub(crate) struct Metrics {
    registry: Registry,
    /// By kind, then by outcome: found by position, so that counting takes no lock.
    requests: Vec<[Counter; OUTCOMES.len()]>,
    /// Attempts beyond a request's first.
    pub(crate) retries: Counter,
    /// Requests taken and not yet answered.
    pub(crate) in_flight: Gauge,
    /// Connections of clients.
    pub(crate) connections: Gauge,
    /// Epoch of the map; 0 is none.
    pub(crate) map_epoch: Gauge,
    /// Shards that no live node says it leads.
    pub(crate) shards_without_leader: Gauge,
    /// Whether this balancer holds the controller's lease.
    pub(crate) controls: Gauge,
    /// Replicas that are being filled or are to go.
    pub(crate) replicas_moving: Gauge,
    /// Nodes of the map, by how they fare.
    pub(crate) nodes: Family<HealthLabel, Gauge>,
    /// Links that are up, by node.
    pub(crate) links_up: Family<NodeLabel, Gauge>,
    /// Seconds since a node was heard.
    pub(crate) heard_age: Family<NodeLabel, Gauge<f64, AtomicU64>>,
}

/// A node as a label.
#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
pub(crate) struct NodeLabel {
    /// Its id.
    pub(crate) node: String,
}

/// How nodes fare as a label.
#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
pub(crate) struct HealthLabel {
    /// `up`, `suspect` or `down`.
    pub(crate) health: &'static str,
}

#[derive(Clone, Hash, PartialEq, Eq, Debug, EncodeLabelSet)]
struct RequestLabel {
    kind: &'static str,
    outcome: &'static str,
}

impl Metrics {
    /// All at zero.
    pub(crate) fn new() -> Self {
        let mut registry = Registry::with_prefix("shkv_balancer");
        let by_label = Family::<RequestLabel, Counter>::default();
        let counter = |kind, outcome| by_label.get_or_create_owned(&RequestLabel { kind, outcome });
        let requests = KINDS.map(|kind| OUTCOMES.map(|outcome| counter(kind, outcome))).to_vec();
        let metrics = Self {
            requests,
            retries: Counter::default(),
            in_flight: Gauge::default(),
            connections: Gauge::default(),
            map_epoch: Gauge::default(),
            shards_without_leader: Gauge::default(),
            controls: Gauge::default(),
            replicas_moving: Gauge::default(),
            nodes: Family::default(),
            links_up: Family::default(),
            heard_age: Family::default(),
            registry: Registry::default(),
        };
        registry.register("requests", "Requests answered", by_label);
        registry.register("retries", "Attempts beyond the first", metrics.retries.clone());
        registry.register("in_flight", "Requests taken and not yet answered", metrics.in_flight.clone());
        registry.register("connections", "Connections of clients", metrics.connections.clone());
        registry.register("map_epoch", "Epoch of the shard map, 0 for none", metrics.map_epoch.clone());
        let without = metrics.shards_without_leader.clone();
        registry.register("shards_without_leader", "Shards that no live node leads", without);
        registry.register("controls", "1 if this balancer controls the cluster", metrics.controls.clone());
        let moving = metrics.replicas_moving.clone();
        registry.register("replicas_moving", "Replicas that are being filled or are to go", moving);
        registry.register("nodes", "Nodes by health", metrics.nodes.clone());
        registry.register("links_up", "Links that are up", metrics.links_up.clone());
        registry.register("heard_age_seconds", "Time since a node was heard", metrics.heard_age.clone());
        Self { registry, ..metrics }
    }

    /// Counts a request that is over; no failure means done.
    pub(crate) fn count(&self, kind: Kind, failure: Option<&Failure>) {
        let outcome = match failure {
            None => 0,
            Some(Failure::Refusal { .. } | Failure::Condition { .. }) => 1,
            Some(
                Failure::Busy { .. }
                | Failure::NotLeader { .. }
                | Failure::WrongShard { .. }
                | Failure::Behind { .. }
                | Failure::Aborted { .. },
            ) => 2,
            Some(Failure::Unknown { .. }) => 3,
        };
        let kind = match kind {
            Kind::Get => 0,
            Kind::Put => 1,
            Kind::Delete => 2,
            Kind::Batch => 3,
            Kind::Scan => 4,
            Kind::Count => 5,
            Kind::Map => 6,
            Kind::Status => 7,
            _ => KINDS.len() - 1,
        };
        self.requests[kind][outcome].inc();
    }

    /// All metrics in the text format.
    pub(crate) fn text(&self) -> Result<String, std::fmt::Error> {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry)?;
        Ok(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_counted_request_shows_in_the_text() {
        let metrics = Metrics::new();
        metrics.count(Kind::Put, None);
        metrics.count(Kind::Put, Some(&Failure::unknown("x")));
        metrics.count(Kind::Beat, Some(&Failure::NotLeader { hint: None }));
        let text = metrics.text().unwrap();
        for line in [
            "shkv_balancer_requests_total{kind=\"put\",outcome=\"done\"} 1",
            "shkv_balancer_requests_total{kind=\"put\",outcome=\"unknown\"} 1",
            "shkv_balancer_requests_total{kind=\"other\",outcome=\"busy\"} 1",
            "shkv_balancer_requests_total{kind=\"get\",outcome=\"done\"} 0",
        ] {
            assert!(text.contains(line), "{line} is not in\n{text}");
        }
    }
}
