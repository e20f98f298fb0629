//! The description of all routes (OpenAPI 3.1) at `/openapi.json`, and a page at `/docs` that shows it.
//!
//! Each system's routes are described in a table; what is in none is not described.

use crate::http::Front;
use crate::http::answer::{json_answer, json_bytes};
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::Response;
use axum::routing::get;
use serde_json::Value;
use std::collections::BTreeMap;
use utoipa::openapi::content::ContentBuilder;
use utoipa::openapi::path::{HttpMethod, OperationBuilder, Parameter, ParameterBuilder, ParameterIn, PathItem};
use utoipa::openapi::request_body::RequestBodyBuilder;
use utoipa::openapi::schema::{ArrayBuilder, ObjectBuilder, Schema, SchemaType, Type};
use utoipa::openapi::{InfoBuilder, OpenApi, OpenApiBuilder, PathsBuilder, RefOr, Required, ResponseBuilder};

/// The page, which loads nothing but the description.
const PAGE: &str = include_str!("docs.html");

/// A route as it is described.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Route {
    /// The method, in lower case.
    pub(crate) method: &'static str,
    /// The path with its parameters in braces.
    pub(crate) path: &'static str,
    /// The system that it is of.
    pub(crate) system: &'static str,
    /// What it does.
    pub(crate) does: &'static str,
    /// An example of its body, in JSON; `*` stands for raw bytes, empty for none. What may be left out has a `?`: behind its
    /// name, or in front of the whole. A text with `|` is one of these, and the first in the example.
    pub(crate) body: &'static str,
    /// Parameters of the query, and header lines with a colon in front.
    pub(crate) takes: &'static [&'static str],
    /// The statuses that it answers with.
    pub(crate) answers: &'static [u16],
}

/// `/openapi.json`, `/docs`.
pub(crate) fn routes() -> Router<Front> {
    Router::new().route("/openapi.json", get(document)).route("/docs", get(page))
}

async fn document(State(_): State<Front>) -> Response {
    match describe(&all()).to_json() {
        Ok(text) => json_bytes(StatusCode::OK, text),
        Err(error) => json_answer(StatusCode::INTERNAL_SERVER_ERROR, &error.to_string()),
    }
}

async fn page() -> Response {
    let mut answer = Response::new(PAGE.into());
    answer.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    let only_ours = "default-src 'none'; connect-src 'self'; style-src 'unsafe-inline'; script-src 'unsafe-inline'";
    answer.headers_mut().insert(header::CONTENT_SECURITY_POLICY, HeaderValue::from_static(only_ours));
    answer
}

/// Every table.
fn all() -> Vec<Route> {
    [OURS, crate::http::nodes::ROUTES, crate::http::batch::ROUTES, crate::http::described::ROUTES].concat()
}

/// Parameters that every read has.
const READS: &[&str] = &[":shkv-consistency", ":shkv-token", ":shkv-deadline-ms"];
/// Parameters that every write of a row has.
const WRITES: &[&str] = &[":if-match", ":if-none-match", ":shkv-token", ":shkv-deadline-ms"];

/// A route of our own.
const fn ours(method: &'static str, path: &'static str, does: &'static str, answers: &'static [u16]) -> Route {
    Route { method, path, system: "shkv", does, body: "", takes: &[], answers }
}

const OURS: &[Route] = &[
    ours("get", "/livez", "Whether the process lives", &[200]),
    ours("get", "/readyz", "Whether every shard is served", &[200, 503]),
    ours("get", "/metrics", "Metrics in the text form of OpenMetrics", &[200]),
    ours("get", "/openapi.json", "This description", &[200]),
    ours("get", "/docs", "A page that shows this description", &[200]),
    ours("get", "/v1/nodes", "The nodes", &[200]),
    ours("get", "/v1/shards", "The shards, their replicas and leaders", &[200]),
    ours("get", "/v1/status", "The cluster as a whole", &[200]),
    Route {
        takes: &[
            "prefix",
            "start",
            "end",
            "limit",
            "reverse",
            "keys_only",
            "cursor",
            ":shkv-consistency",
            ":shkv-deadline-ms",
        ],
        ..ours(
            "get",
            "/v1/kv/{keyspace}",
            "Rows in order of their keys, with a cursor to go on from",
            &[200, 400, 404, 503],
        )
    },
    Route {
        takes: READS,
        ..ours(
            "get",
            "/v1/kv/{keyspace}/{key}",
            "The value of a row; its version is the ETag",
            &[200, 304, 400, 404, 412, 503],
        )
    },
    Route {
        takes: READS,
        ..ours("head", "/v1/kv/{keyspace}/{key}", "Version and length of a row", &[200, 304, 400, 404, 412, 503])
    },
    Route {
        takes: WRITES,
        body: "*",
        ..ours("put", "/v1/kv/{keyspace}/{key}", "Writes a row", &[200, 201, 400, 404, 408, 412, 413, 503, 507])
    },
    Route { takes: WRITES, ..ours("delete", "/v1/kv/{keyspace}/{key}", "Removes a row", &[200, 400, 404, 412, 503]) },
    Route {
        takes: &[":shkv-deadline-ms"],
        body: r#"{"keyspace?":"default","ops":[{"op":"put|delete|check|read","key":"a","value?":"1","if_absent?":true}]}"#,
        ..ours(
            "post",
            "/v1/txn",
            "Several operations in one step, or none of them",
            &[200, 400, 404, 408, 412, 413, 503, 507],
        )
    },
];

fn describe(routes: &[Route]) -> OpenApi {
    let mut items: BTreeMap<&str, PathItem> = BTreeMap::new();
    for route in routes {
        let mut operation = OperationBuilder::new().tag(route.system).summary(Some(route.does));
        for name in route.path.split('/').filter_map(|part| part.strip_prefix('{')?.strip_suffix('}')) {
            operation = operation.parameter(parameter(name, ParameterIn::Path));
        }
        for name in route.takes {
            operation = operation.parameter(match name.strip_prefix(':') {
                Some(header) => parameter(header, ParameterIn::Header),
                None => parameter(name, ParameterIn::Query),
            });
        }
        if route.body == "*" {
            let content = ContentBuilder::new().schema(Some(text())).build();
            let body = RequestBodyBuilder::new().content("application/octet-stream", content);
            operation = operation.request_body(Some(body.required(Some(Required::True)).build()));
        } else if !route.body.is_empty() {
            let (text, required) = match route.body.strip_prefix('?') {
                Some(text) => (text, Required::False),
                None => (route.body, Required::True),
            };
            let written: Value = serde_json::from_str(text).unwrap_or_default();
            let content = ContentBuilder::new().schema(Some(form_of(&written))).example(Some(plain(written))).build();
            let body = RequestBodyBuilder::new().content("application/json", content);
            operation = operation.request_body(Some(body.required(Some(required)).build()));
        }
        for status in route.answers {
            let words = StatusCode::from_u16(*status).ok().and_then(|status| status.canonical_reason());
            let answer = ResponseBuilder::new().description(words.unwrap_or("an answer")).build();
            operation = operation.response(status.to_string(), answer);
        }
        let method = match route.method {
            "put" => HttpMethod::Put,
            "post" => HttpMethod::Post,
            "delete" => HttpMethod::Delete,
            "head" => HttpMethod::Head,
            "options" => HttpMethod::Options,
            _ => HttpMethod::Get,
        };
        let item = PathItem::new(method, operation.build());
        match items.get_mut(route.path) {
            Some(there) => there.merge_operations(item),
            None => drop(items.insert(route.path, item)),
        }
    }
    let paths = items.into_iter().fold(PathsBuilder::new(), |paths, (path, item)| paths.path(path, item));
    let info = InfoBuilder::new().title("shkv").version(env!("CARGO_PKG_VERSION"));
    let info =
        info.description(Some("A sharded, replicated, durable, ordered key-value store, and five dialects of REST"));
    OpenApiBuilder::new().info(info.build()).paths(paths.build()).build()
}

/// The form of a body, from its example as it is written in a table.
fn form_of(written: &Value) -> Schema {
    let typed = |kind| ObjectBuilder::new().schema_type(SchemaType::new(kind));
    match written {
        Value::Object(fields) => {
            let mut object = typed(Type::Object);
            for (name, value) in fields {
                object = match name.strip_suffix('?') {
                    Some(name) => object.property(name, form_of(value)),
                    None => object.property(name, form_of(value)).required(name),
                };
            }
            Schema::Object(object.build())
        }
        Value::Array(items) => {
            let items = items.first().map_or_else(|| Schema::Object(text()), form_of);
            Schema::Array(ArrayBuilder::new().items(RefOr::T(items)).build())
        }
        Value::String(words) if words.contains('|') => {
            Schema::Object(typed(Type::String).enum_values(Some(words.split('|'))).build())
        }
        Value::Bool(_) => Schema::Object(typed(Type::Boolean).build()),
        Value::Number(_) => Schema::Object(typed(Type::Integer).build()),
        Value::String(_) | Value::Null => Schema::Object(text()),
    }
}

/// An example without the signs that only its form needs.
fn plain(written: Value) -> Value {
    match written {
        Value::Object(fields) => {
            let plain = |(name, value): (String, Value)| (name.trim_end_matches('?').to_owned(), plain(value));
            Value::Object(fields.into_iter().map(plain).collect())
        }
        Value::Array(items) => Value::Array(items.into_iter().map(plain).collect()),
        Value::String(words) => Value::String(words.split('|').next().unwrap_or_default().to_owned()),
        other => other,
    }
}

fn text() -> utoipa::openapi::schema::Object {
    ObjectBuilder::new().schema_type(SchemaType::new(Type::String)).build()
}

fn parameter(name: &str, place: ParameterIn) -> Parameter {
    let required = if place == ParameterIn::Path { Required::True } else { Required::False };
    ParameterBuilder::new().name(name).parameter_in(place).required(required).schema(Some(text())).build()
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn an_example_tells_the_form_of_a_body() {
        let written = json!({"a": 1, "b?": ["x|y"], "c": {"d?": true}});
        assert_eq!(plain(written.clone()), json!({"a": 1, "b": ["x"], "c": {"d": true}}));
        let form = json!({"type": "object", "required": ["a", "c"], "properties": {
            "a": {"type": "integer"}, "b": {"type": "array", "items": {"type": "string", "enum": ["x", "y"]}},
            "c": {"type": "object", "properties": {"d": {"type": "boolean"}}},
        }});
        assert_eq!(serde_json::to_value(form_of(&written)).unwrap(), form);
    }

    #[test]
    fn every_body_that_is_described_is_json() {
        for route in all().iter().filter(|route| !["", "*"].contains(&route.body)) {
            let text = route.body.trim_start_matches('?');
            assert!(serde_json::from_str::<Value>(text).is_ok(), "{} {}: {text}", route.method, route.path);
        }
    }
}
