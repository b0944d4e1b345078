//! Holds what a test saw on the wire against `openapi.yaml`, so that the document cannot drift from the server.
//!
//! Nothing passes that the document does not name: an undocumented status, media type or key of a body is a failure,
//! and so is a required header that is missing. Some answers are documented once for the whole server instead of in each
//! operation: 404 for a path without a template, 405 for a method that a template does not have, 401 or 429 in place of
//! either for who has no token, and what web pages and wrong hosts are told.
//!
//! Requests are held against it the other way round: a body that the server takes must be one that the document allows.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::sync::LazyLock;

use jsonschema::error::ValidationErrorKind;
use jsonschema::{Draft, Registry, ValidationError, Validator};
use serde_json::Value;

/// The name under which the validators know the document; every `$ref` is resolved from it.
const BASE: &str = "urn:portolan:openapi";

/// How much of a body a failure message shows, in characters.
const SHOWN: usize = 2_000;

static OPENAPI: LazyLock<Openapi> = LazyLock::new(|| Openapi::parse(include_str!("../../openapi.yaml")));

/// Checks one exchange against openapi.yaml; panics with a readable message naming the exchange when the document does
/// not allow it. `path` may carry a query and one trailing slash more or less than the document writes.
#[track_caller]
pub(crate) fn check(method: &str, path: &str, status: u16, headers: &[(String, String)], body: &[u8]) {
    if let Err(reason) = OPENAPI.allows(method, path, status, headers, body) {
        let body = String::from_utf8_lossy(body);
        let shown: String = body.chars().take(SHOWN).collect();
        panic!("openapi.yaml does not allow this answer:\n  {method} {path} -> {status}\n{reason}\nbody: {shown}");
    }
}

/// Checks the body of a request against openapi.yaml; panics with a readable message naming the exchange when the server
/// took (2xx) what the document does not allow. `path` as in [`check`].
#[track_caller]
pub(crate) fn check_request(method: &str, path: &str, status: u16, body: &[u8]) {
    if !(200..300).contains(&status) {
        return;
    }
    if let Err(reason) = OPENAPI.allows_request(method, path, body) {
        let body = String::from_utf8_lossy(body);
        let shown: String = body.chars().take(SHOWN).collect();
        panic!(
            "openapi.yaml does not allow this request, which the server took:\n  {method} {path} -> {status}\n{reason}\n\
             body: {shown}"
        );
    }
}

/// (method, path template) pairs of the document in document order, for comparing with the route table both ways.
pub(crate) fn operations() -> Vec<(String, String)> {
    let paths = OPENAPI.paths.iter();
    let pairs = |path: &'static Path| path.operations.iter().map(|one| (one.method.clone(), path.template.clone()));
    paths.flat_map(pairs).collect()
}

/// (method, path template, scope) of the document in document order; the scope is `None` where everybody may come in.
pub(crate) fn scopes() -> Vec<(String, String, Option<String>)> {
    let paths = OPENAPI.paths.iter();
    let scope =
        |path: &'static Path, one: &'static Operation| (one.method.clone(), path.template.clone(), one.scope.clone());
    paths.flat_map(|path| path.operations.iter().map(move |one| scope(path, one))).collect()
}

struct Openapi {
    /// In document order.
    paths: Vec<Path>,
    unauthorized: Answer,
    too_many_attempts: Answer,
    not_found: Answer,
    method_not_allowed: Answer,
    /// What any request may be told, by status.
    refusals: [(u16, Answer); 2],
}

struct Path {
    template: String,
    /// In document order.
    operations: Vec<Operation>,
}

struct Operation {
    /// In upper case.
    method: String,
    /// None when the operation asks for no token at all.
    scope: Option<String>,
    /// None when the document has no body for it, and whatever is sent is ignored.
    body: Option<RequestBody>,
    /// By status.
    answers: BTreeMap<u16, Answer>,
}

struct RequestBody {
    required: bool,
    schema: Validator,
}

struct Answer {
    headers: Vec<Header>,
    /// Media types as `media_type` writes them, each with the schema of the body, if it has one.
    content: Vec<(String, Option<Validator>)>,
}

struct Header {
    name: String,
    required: bool,
    integer: bool,
    schema: Validator,
}

impl Openapi {
    fn parse(yaml: &str) -> Self {
        let root = serde_norway::from_str(yaml).expect("openapi.yaml is YAML");
        let document = Document::new(&root);
        let paths = document.children("/paths").into_iter().map(|(template, at)| Path::read(&document, template, &at));
        Self {
            paths: paths.collect(),
            unauthorized: Answer::read(&document, "/components/responses/Unauthorized"),
            too_many_attempts: Answer::read(&document, "/components/responses/TooManyAttempts"),
            not_found: Answer::read(&document, "/components/responses/NotFound"),
            method_not_allowed: Answer::read(&document, "/components/responses/MethodNotAllowed"),
            refusals: [(400, "HostUnclear"), (403, "PageRefused")]
                .map(|(status, name)| (status, Answer::read(&document, &format!("/components/responses/{name}")))),
        }
    }

    fn allows(
        &self,
        method: &str,
        path: &str,
        status: u16,
        headers: &[(String, String)],
        body: &[u8],
    ) -> Result<(), String> {
        let refused =
            |(known, answer): &(u16, Answer)| *known == status && answer.allows(method, headers, body).is_ok();
        if self.refusals.iter().any(refused) {
            return Ok(());
        }
        let Some(path) = self.find(path) else {
            return match status {
                401 => self.unauthorized.allows(method, headers, body),
                429 => self.too_many_attempts.allows(method, headers, body),
                404 => self.not_found.allows(method, headers, body),
                405 => self.method_not_allowed.allows(method, headers, body),
                _ => Err("no path of the document matches, so the status must be 401, 404, 405 or 429".into()),
            };
        };
        let Some(Operation { answers, .. }) = path.operation(method) else {
            match status {
                401 => return self.unauthorized.allows(method, headers, body),
                429 => return self.too_many_attempts.allows(method, headers, body),
                _ => {}
            }
            if status != 405 {
                return Err(format!("{} has no {method}, so the status must be 405", path.template));
            }
            self.method_not_allowed.allows(method, headers, body)?;
            return path.allow_is_true(headers);
        };
        let Some(answer) = answers.get(&status) else {
            let known: Vec<_> = answers.keys().map(u16::to_string).collect();
            return Err(format!("{} documents the statuses {} only", path.template, known.join(", ")));
        };
        answer.allows(method, headers, body)
    }

    fn allows_request(&self, method: &str, path: &str, body: &[u8]) -> Result<(), String> {
        let operation = self.find(path).and_then(|path| path.operation(method));
        let Some(known) = operation.and_then(|operation| operation.body.as_ref()) else { return Ok(()) };
        if body.is_empty() {
            return if known.required { Err("the document wants a body".into()) } else { Ok(()) };
        }
        let value = serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?;
        matches(&known.schema, &value)
    }

    /// The template that matches; where two do, the one that is literal first.
    fn find(&self, path: &str) -> Option<&Path> {
        let wanted = segments(path);
        let matching = self.paths.iter().filter(|path| {
            let template = segments(&path.template);
            template.len() == wanted.len()
                && template.iter().zip(&wanted).all(|(t, w)| if is_parameter(t) { !w.is_empty() } else { t == w })
        });
        matching.min_by_key(|path| segments(&path.template).into_iter().map(is_parameter).collect::<Vec<_>>())
    }
}

impl Path {
    fn read(document: &Document, template: String, at: &str) -> Self {
        const METHODS: [&str; 8] = ["get", "put", "post", "delete", "options", "head", "patch", "trace"];
        let operations = document.children(at).into_iter().filter(|(key, _)| METHODS.contains(&key.as_str()));
        let operations = operations.map(|(method, at)| Operation::read(document, &method, &at));
        Self { operations: operations.collect(), template }
    }

    fn operation(&self, method: &str) -> Option<&Operation> {
        let find = |wanted: &str| self.operations.iter().find(|operation| operation.method == wanted);
        find(method).or_else(|| if method == "HEAD" { find("GET") } else { None })
    }

    /// `allow` names the documented methods; HEAD and OPTIONS may be there without being documented.
    fn allow_is_true(&self, headers: &[(String, String)]) -> Result<(), String> {
        let told = values(headers, "allow").flat_map(|value| value.split(',')).map(str::trim);
        let told: BTreeSet<_> = told.filter(|method| !["HEAD", "OPTIONS"].contains(method)).collect();
        let true_ones: BTreeSet<_> = self.operations.iter().map(|operation| operation.method.as_str()).collect();
        if told == true_ones {
            return Ok(());
        }
        Err(format!("the header allow names {told:?}, {} has {true_ones:?}", self.template))
    }
}

impl Operation {
    fn read(document: &Document, method: &str, at: &str) -> Self {
        let answers = document.children(&format!("{at}/responses")).into_iter().map(|(status, at)| {
            let status = status.parse().expect("openapi.yaml writes each status as a number");
            (status, Answer::read(document, &at))
        });
        let body = format!("{at}/requestBody");
        let body = document.get(&body).map(|known| RequestBody {
            required: known.get("required") == Some(&Value::Bool(true)),
            schema: document.validator(&format!("{body}/content/application~1json/schema")),
        });
        let scope = document.get(&format!("{at}/x-portolan-scope")).and_then(Value::as_str).map(str::to_owned);
        let open = document.get(&format!("{at}/security")).is_some_and(|wanted| wanted == &serde_json::json!([]));
        assert!(scope.is_none() == open, "{method} {at} of openapi.yaml needs a scope, or asks for no token");
        Self { method: method.to_uppercase(), scope, body, answers: answers.collect() }
    }
}

impl Answer {
    fn read(document: &Document, at: &str) -> Self {
        let headers = document.children(&format!("{at}/headers")).into_iter().map(|(name, at)| {
            let schema = format!("{at}/schema");
            Header {
                name: name.to_lowercase(),
                required: document.get(&format!("{at}/required")) == Some(&Value::Bool(true)),
                integer: document.get(&format!("{schema}/type")).is_some_and(|kind| kind == "integer"),
                schema: document.validator(&schema),
            }
        });
        let content = document.children(&format!("{at}/content")).into_iter().map(|(name, at)| {
            let schema = format!("{at}/schema");
            (media_type(&name), document.get(&schema).map(|_| document.validator(&schema)))
        });
        Self { headers: headers.collect(), content: content.collect() }
    }

    fn allows(&self, method: &str, headers: &[(String, String)], body: &[u8]) -> Result<(), String> {
        for header in &self.headers {
            header.allows(headers)?;
        }
        if self.content.is_empty() {
            return if body.is_empty() { Ok(()) } else { Err("the document has no body here".into()) };
        }
        let given: Vec<_> = values(headers, "content-type").map(media_type).collect();
        let known = self.content.iter().find(|(name, _)| given == [name.as_str()]);
        let Some((name, schema)) = known else {
            let known: Vec<_> = self.content.iter().map(|(name, _)| name).collect();
            return Err(format!("the content-type is {given:?}, the document has {known:?}"));
        };
        if method == "HEAD" {
            return if body.is_empty() { Ok(()) } else { Err("an answer to HEAD has no body".into()) };
        }
        let Some(schema) = schema else { return Ok(()) };
        let value = if name.ends_with("json") {
            serde_json::from_slice(body).map_err(|error| format!("the body is not JSON: {error}"))?
        } else {
            Value::String(String::from_utf8(body.to_vec()).map_err(|_| "the body is not UTF-8")?)
        };
        matches(schema, &value)?;
        same_request_id(headers, &value)
    }
}

impl Header {
    fn allows(&self, headers: &[(String, String)]) -> Result<(), String> {
        let mut found = false;
        for value in values(headers, &self.name) {
            found = true;
            let typed = match value.parse::<i64>() {
                Ok(number) if self.integer => number.into(),
                _ => value.into(),
            };
            matches(&self.schema, &typed).map_err(|reason| format!("the header {}: {value}\n{reason}", self.name))?;
        }
        if self.required && !found {
            return Err(format!("the header {} is missing", self.name));
        }
        Ok(())
    }
}

/// The parsed document, read through JSON pointers that follow every `$ref` on their way.
struct Document<'a> {
    root: &'a Value,
    registry: Registry<'a>,
}

impl<'a> Document<'a> {
    fn new(root: &'a Value) -> Self {
        let registry =
            Registry::new().draft(Draft::Draft202012).add(BASE, root).and_then(|registry| registry.prepare());
        Self { root, registry: registry.expect("openapi.yaml refers to nothing outside itself") }
    }

    fn get(&self, pointer: &str) -> Option<&'a Value> {
        let mut value = self.root;
        for key in pointer.split('/').skip(1) {
            value = match self.follow(value) {
                Value::Array(items) => items.get(key.parse::<usize>().ok()?)?,
                other => other.get(key.replace("~1", "/").replace("~0", "~"))?,
            };
        }
        Some(self.follow(value))
    }

    fn follow(&self, mut value: &'a Value) -> &'a Value {
        while let Some(target) = value.get("$ref").and_then(Value::as_str) {
            let pointer = target.strip_prefix('#').expect("openapi.yaml refers to nothing outside itself");
            value = self.get(pointer).unwrap_or_else(|| panic!("openapi.yaml has no {target}"));
        }
        value
    }

    /// Each key of the object there with the pointer to its value; nothing when there is no object.
    fn children(&self, pointer: &str) -> Vec<(String, String)> {
        let object = self.get(pointer).and_then(Value::as_object).into_iter().flatten();
        object
            .map(|(key, _)| (key.clone(), format!("{pointer}/{}", key.replace('~', "~0").replace('/', "~1"))))
            .collect()
    }

    fn validator(&self, pointer: &str) -> Validator {
        let schema = self.get(pointer).unwrap_or_else(|| panic!("openapi.yaml has no {pointer}"));
        let absolute = absolute(schema);
        let options = jsonschema::options().with_draft(Draft::Draft202012).with_registry(&self.registry);
        let validator = options.should_validate_formats(true).build(&absolute);
        validator.unwrap_or_else(|error| panic!("the schema at {pointer} in openapi.yaml: {error}"))
    }
}

/// The schema with each `$ref` made absolute, so that it means the same outside the document.
fn absolute(schema: &Value) -> Value {
    match schema {
        Value::Object(object) => {
            let entries = object.iter().map(|(key, value)| match value {
                Value::String(target) if key == "$ref" => (key.clone(), format!("{BASE}{target}").into()),
                _ => (key.clone(), absolute(value)),
            });
            Value::Object(entries.collect())
        }
        Value::Array(items) => items.iter().map(absolute).collect(),
        other => other.clone(),
    }
}

/// The segments of a path without its query and without one trailing slash.
fn segments(path: &str) -> Vec<&str> {
    let path = path.split('?').next().expect("split yields at least one part");
    path.strip_suffix('/').unwrap_or(path).split('/').collect()
}

fn is_parameter(segment: &str) -> bool {
    segment.starts_with('{')
}

fn values<'a>(headers: &'a [(String, String)], name: &str) -> impl Iterator<Item = &'a str> {
    headers.iter().filter(move |(other, _)| other.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
}

/// A media type in one spelling: lower case, no white space.
fn media_type(value: &str) -> String {
    value.to_lowercase().replace(char::is_whitespace, "")
}

/// An error repeats the id of its request in its body.
fn same_request_id(headers: &[(String, String)], body: &Value) -> Result<(), String> {
    match body.get("request_id").and_then(Value::as_str) {
        Some(id) if values(headers, "x-request-id").next() != Some(id) => {
            Err("request_id in the body is not the value of x-request-id".into())
        }
        _ => Ok(()),
    }
}

fn matches(schema: &Validator, value: &Value) -> Result<(), String> {
    let mut report = String::new();
    for error in schema.iter_errors(value) {
        explain(&error, &mut report);
    }
    if report.is_empty() { Ok(()) } else { Err(report) }
}

/// One line for each thing that is wrong. Of several alternatives that all fail, only the one that fails least is told.
fn explain(error: &ValidationError<'_>, report: &mut String) {
    let nearest = match error.kind() {
        ValidationErrorKind::OneOfNotValid { context } | ValidationErrorKind::AnyOf { context } => {
            context.iter().min_by_key(|errors| errors.len())
        }
        _ => None,
    };
    match nearest {
        Some(errors) => errors.iter().for_each(|error| explain(error, report)),
        None => {
            writeln!(report, "  at {:?}: {error}", error.instance_path().as_str()).expect("a String takes any text")
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const SERVERS: &str = "/v1/mcp-servers/";
    const SERVER: &str = "/v1/mcp-servers/mcp_server-9faa85df-8741-4948-8341-e23da3699097";
    const RUN: &str = "/v1/mcp-servers/mcp_server-1/tools/tool-1/run";

    fn headers(more: &[(&str, &str)]) -> Vec<(String, String)> {
        let all = [("X-Request-Id", "r1"), ("Content-Type", "application/json")].iter().chain(more);
        all.map(|(name, value)| (name.to_string(), value.to_string())).collect()
    }

    fn allows(method: &str, path: &str, status: u16, more: &[(&str, &str)], body: &Value) -> Result<(), String> {
        OPENAPI.allows(method, path, status, &headers(more), body.to_string().as_bytes())
    }

    #[track_caller]
    fn refused(outcome: Result<(), String>, because: &str) {
        let reason = outcome.expect_err("the document must not allow this");
        assert!(reason.contains(because), "another reason than {because:?}: {reason}");
    }

    fn document() -> Value {
        serde_norway::from_str(include_str!("../../openapi.yaml")).expect("openapi.yaml is YAML")
    }

    fn server() -> Value {
        json!({
            "mcp_server_type": "sse", "server_url": "https://mcp.example.com/sse", "auth_header": null,
            "auth_token": null, "custom_headers": null, "id": "mcp_server-9faa85df-8741-4948-8341-e23da3699097",
            "server_name": "n", "type": "sse", "created_at": "2026-11-21T02:45:36.120418Z",
            "updated_at": "2026-11-21T02:45:36.120418+00:00",
            "status": {"state": "ready", "error": null, "tool_count": 5, "last_synced_at": "2026-11-21T02:45:37Z",
                "confinement": null}
        })
    }

    fn without(mut object: Value, key: &str) -> Value {
        object.as_object_mut().expect("an object").shift_remove(key);
        object
    }

    fn with(mut object: Value, key: &str, value: Value) -> Value {
        object[key] = value;
        object
    }

    fn error(code: &str) -> Value {
        json!({"detail": "A sentence.", "code": code, "request_id": "r1"})
    }

    #[test]
    fn operations_come_in_document_order() {
        let all = operations();
        assert_eq!(all[0], ("POST".into(), SERVERS.into()));
        assert_eq!(all[1], ("GET".into(), SERVERS.into()));
        assert_eq!(all.last(), Some(&("GET".into(), "/console/{file}".into())));
        assert_eq!(all.len(), 41);
    }

    #[test]
    fn a_server_answer_is_exactly_what_the_document_says() {
        let of = |body: &Value| allows("GET", SERVER, 200, &[], body);
        assert_eq!(of(&server()), Ok(()));
        refused(of(&without(server(), "status")), r#""status" is a required property"#);
        refused(of(&without(server(), "auth_token")), r#""auth_token" is a required property"#);
        refused(of(&with(server(), "command", Value::Null)), "'command' was unexpected");
        refused(of(&with(server(), "type", json!("stdio"))), "/type");
        refused(of(&with(server(), "created_at", json!("yesterday"))), "/created_at");
        refused(of(&with(server(), "id", json!("mcp_server-1"))), "/id");
        let mut more = server();
        more["status"]["since"] = json!(1);
        refused(of(&more), "'since' was unexpected");
        assert_eq!(allows("GET", SERVERS, 200, &[], &json!([server(), server()])), Ok(()));
        refused(allows("GET", SERVERS, 200, &[], &json!([server(), {}])), "/1");
        refused(allows("GET", SERVERS, 200, &[], &server()), "array");
    }

    #[test]
    fn maps_of_a_server_may_hold_any_key() {
        let body = with(server(), "custom_headers", json!({"X-Any": "1"}));
        assert_eq!(allows("PATCH", SERVER, 200, &[], &body), Ok(()));
        let body = with(server(), "custom_headers", json!({"X-Any": 1}));
        refused(allows("PATCH", SERVER, 200, &[], &body), "/custom_headers/X-Any");
    }

    #[test]
    fn a_status_must_be_documented() {
        assert_eq!(allows("GET", SERVER, 404, &[], &error("not_found")), Ok(()));
        refused(allows("GET", SERVER, 400, &[], &error("not_found")), "200, 401, 403, 404, 422, 429, 500, 503 only");
        refused(allows("GET", SERVER, 405, &[("allow", "GET")], &error("method_not_allowed")), "only");
        refused(allows("GET", SERVER, 404, &[], &error("gone")), "/code");
    }

    #[test]
    fn headers_must_be_there_and_true() {
        let body = server().to_string();
        let json = [("content-type".to_owned(), "application/json".to_owned())];
        refused(OPENAPI.allows("GET", SERVER, 200, &json, body.as_bytes()), "x-request-id is missing");

        let conflict = |more: &[(&str, &str)]| allows("POST", SERVERS, 409, more, &error("name_taken"));
        assert_eq!(conflict(&[("x-should-retry", "false")]), Ok(()));
        refused(conflict(&[]), "x-should-retry is missing");
        refused(conflict(&[("x-should-retry", "true")]), "x-should-retry: true");

        let away = |more: &[(&str, &str)]| allows("GET", "/v1/ready", 503, more, &error("unavailable"));
        assert_eq!(away(&[("Retry-After", "1")]), Ok(()));
        refused(away(&[]), "retry-after is missing");
        refused(away(&[("Retry-After", "soon")]), "retry-after: soon");
        refused(away(&[("Retry-After", "0")]), "retry-after: 0");
    }

    #[test]
    fn a_body_names_the_request_of_its_header() {
        let other = with(error("not_found"), "request_id", json!("r2"));
        refused(allows("GET", SERVER, 404, &[], &other), "x-request-id");
    }

    #[test]
    fn a_media_type_must_be_documented() {
        let kept = |content_type: &str| {
            let more = [("etag", "W/\"0123456789abcdef\""), ("cache-control", "no-cache"), ("x-request-id", "r1")];
            let all = more.into_iter().chain([("content-type", content_type)]);
            all.map(|(name, value)| (name.to_owned(), value.to_owned())).collect::<Vec<_>>()
        };
        let yaml = |content_type: &str, body: &str| {
            OPENAPI.allows("GET", "/openapi.yaml", 200, &kept(content_type), body.as_bytes())
        };
        assert_eq!(yaml("application/yaml", include_str!("../../openapi.yaml")), Ok(()));
        refused(yaml("text/plain", "openapi: 3.1.0"), "content-type");
        refused(yaml("application/yaml", "swagger: 2"), "does not match");

        let file = |content_type: &str, body: &[u8]| OPENAPI.allows("GET", "/docs/a", 200, &kept(content_type), body);
        assert_eq!(file("text/css;charset=UTF-8", b"a {}"), Ok(()));
        assert_eq!(file("image/png", b"\x89PNG\xff"), Ok(()));
        refused(file("text/css", b"a {}"), "content-type");
        refused(file("text/css; charset=utf-8", b"\xff"), "UTF-8");

        let twice = allows("GET", SERVER, 200, &[("content-type", "application/json")], &server());
        refused(twice, "content-type");
    }

    #[test]
    fn a_body_must_be_json() {
        refused(OPENAPI.allows("GET", SERVER, 200, &headers(&[]), b""), "not JSON");
        refused(OPENAPI.allows("GET", SERVER, 200, &headers(&[]), b"{} {}"), "not JSON");
        let spaced = format!("   {}", server());
        assert_eq!(OPENAPI.allows("GET", SERVER, 200, &headers(&[]), spaced.as_bytes()), Ok(()));
    }

    #[test]
    fn no_body_means_none() {
        let none = [("x-request-id".to_owned(), "r1".to_owned())];
        assert_eq!(OPENAPI.allows("DELETE", SERVER, 204, &none, b""), Ok(()));
        refused(OPENAPI.allows("DELETE", SERVER, 204, &none, b"null"), "no body");
        assert_eq!(OPENAPI.allows("HEAD", SERVERS, 200, &headers(&[]), b""), Ok(()));
        refused(OPENAPI.allows("HEAD", SERVERS, 200, &headers(&[]), b"[]"), "no body");
        assert_eq!(OPENAPI.allows("HEAD", RUN, 405, &headers(&[("allow", "POST")]), b""), Ok(()));
    }

    #[test]
    fn both_slash_forms_are_one_path() {
        for path in ["/v1/mcp-servers", "/v1/mcp-servers/", "/v1/mcp-servers?x=/y", "/v1/mcp-servers/?x"] {
            assert_eq!(allows("GET", path, 200, &[], &json!([])), Ok(()), "{path}");
        }
        let ready = json!({"status": "ok"});
        for path in ["/v1/ready", "/v1/ready/"] {
            assert_eq!(allows("GET", path, 200, &[], &ready), Ok(()), "{path}");
        }
        for path in ["/v1/ready//", "//v1/ready", "/v1", "/nowhere"] {
            refused(allows("GET", path, 200, &[], &ready), "401, 404, 405 or 429");
            assert_eq!(allows("GET", path, 404, &[], &error("not_found")), Ok(()), "{path}");
        }
    }

    #[test]
    fn an_empty_segment_is_no_parameter() {
        refused(allows("GET", "/v1/mcp-servers//tools", 200, &[], &json!([])), "401, 404, 405 or 429");
    }

    #[test]
    fn an_unknown_method_is_405_with_a_true_allow() {
        let put = |allow: &str| allows("PUT", SERVERS, 405, &[("allow", allow)], &error("method_not_allowed"));
        assert_eq!(put("GET,HEAD,POST"), Ok(()));
        assert_eq!(put("POST, GET"), Ok(()));
        refused(put("GET"), "allow names");
        refused(put("GET, POST, DELETE"), "allow names");
        refused(allows("PUT", SERVERS, 405, &[], &error("method_not_allowed")), "allow is missing");
        refused(allows("PUT", SERVERS, 404, &[], &error("not_found")), "must be 405");
        assert_eq!(allows("PUT", "/nowhere", 405, &[("allow", "GET")], &error("method_not_allowed")), Ok(()));
    }

    #[test]
    fn a_failed_refresh_is_one_of_two_errors() {
        let path = format!("{SERVER}/refresh?agent_id=agent-1");
        let of = |body: &Value| allows("PATCH", &path, 404, &[("x-should-retry", "false")], body);
        let unavailable = json!({
            "detail": {"code": "MCPServerUnavailable", "message": "m", "error": "e"},
            "code": "mcp_server_unavailable", "request_id": "r1"
        });
        assert_eq!(of(&unavailable), Ok(()));
        assert_eq!(of(&error("not_found")), Ok(()));
        refused(of(&with(error("not_found"), "detail", unavailable["detail"].clone())), "at ");
        refused(of(&error("mcp_server_unavailable")), "at ");
    }

    #[test]
    fn a_run_answers_all_its_keys() {
        let run = json!({
            "status": "success", "func_return": "hi", "agent_state": null, "stdout": null, "stderr": null,
            "sandbox_config_fingerprint": null, "result": {"content": [], "_meta": {"any": 1}}, "duration_ms": 0.5
        });
        assert_eq!(allows("POST", RUN, 200, &[], &run), Ok(()));
        refused(allows("POST", RUN, 200, &[], &without(run.clone(), "stdout")), "stdout");
        refused(allows("POST", RUN, 200, &[], &with(run.clone(), "func_return", Value::Null)), "/func_return");
        refused(allows("POST", RUN, 200, &[], &with(run, "extra", json!(1))), "'extra' was unexpected");

        let lost = json!({
            "error": {"type": "mcp_connection_error", "message": "m", "detail": "d"},
            "detail": "d", "code": "mcp_connection_error", "request_id": "r1"
        });
        assert_eq!(allows("POST", RUN, 502, &[("x-should-retry", "false")], &lost), Ok(()));
        refused(allows("POST", RUN, 502, &[], &lost), "x-should-retry is missing");
    }

    #[test]
    fn an_invalid_request_names_its_places() {
        let mut body = error("invalid_request");
        refused(allows("POST", SERVERS, 422, &[], &body), "errors");
        body["errors"] = json!([{"loc": ["body", "config", "args", 0], "msg": "is not a string"}]);
        assert_eq!(allows("POST", SERVERS, 422, &[], &body), Ok(()));
        body["errors"][0]["input"] = json!("secret");
        refused(allows("POST", SERVERS, 422, &[], &body), "'input' was unexpected");
    }

    #[test]
    #[should_panic(expected = "GET /v1/ready -> 418")]
    fn a_failure_names_the_exchange() {
        check("GET", "/v1/ready", 418, &headers(&[]), b"{}");
    }

    #[test]
    fn each_operation_documents_what_it_can_answer() {
        for path in &OPENAPI.paths {
            for Operation { method, scope, body, answers } in &path.operations {
                let asks_database = path.template.starts_with("/v1/") && path.template != "/v1/health/";
                let needed = [500].into_iter().chain(asks_database.then_some(503));
                let needed = needed.chain(path.template.contains('{').then_some(404));
                let needed = needed.chain(scope.as_ref().map(|_| [401, 403, 429]).into_iter().flatten());
                let needed = needed.chain(body.as_ref().map(|_| [400, 413, 415, 422]).into_iter().flatten());
                for status in needed {
                    assert!(answers.contains_key(&status), "{method} {} lacks {status}", path.template);
                }
                for (status, answer) in answers {
                    let named = answer.headers.iter().any(|header| header.required && header.name == "x-request-id");
                    assert!(named, "{method} {} {status} lacks x-request-id", path.template);
                }
            }
        }
    }

    #[test]
    fn bodies_are_taken_where_the_document_has_one() {
        let of = |method: &str, path: &str, body: &str| OPENAPI.allows_request(method, path, body.as_bytes());
        assert_eq!(of("POST", "/v1/mcp-servers?x=1", r#"{"server_name":"n","config":{"command":"c"}}"#), Ok(()));
        refused(of("POST", SERVERS, r#"{"server_name":"n","config":{"command":"c","extra":1}}"#), "'extra'");
        refused(of("POST", SERVERS, ""), "wants a body");
        refused(of("POST", SERVERS, "{"), "not JSON");
        refused(of("PATCH", SERVER, r#"{"config":{"auth_token":7}}"#), "/config/auth_token");
        assert_eq!(of("POST", RUN, ""), Ok(()));
        refused(of("POST", RUN, r#"{"args":[]}"#), "/args");
        assert_eq!(of("DELETE", SERVER, "anything"), Ok(()));
        assert_eq!(of("PATCH", &format!("{SERVER}/refresh"), "anything"), Ok(()));
    }

    #[test]
    #[should_panic(expected = "which the server took:\n  POST /v1/mcp-servers/ -> 200")]
    fn a_body_that_was_taken_must_be_documented() {
        check_request("POST", SERVERS, 422, b"{}");
        check_request("POST", SERVERS, 200, b"{}");
    }

    /// Calls `found` with each example in the document, the pointer to its schema and the pointer to itself.
    fn examples(document: &Document, found: &mut dyn FnMut(&str, &str)) {
        fn walk(document: &Document, value: &Value, at: &str, found: &mut dyn FnMut(&str, &str)) {
            let schema = format!("{at}/schema");
            let has_schema = value.get("schema").is_some();
            match value.get("examples") {
                Some(Value::Object(_)) if has_schema => {
                    for (_, example) in document.children(&format!("{at}/examples")) {
                        found(&schema, &format!("{example}/value"));
                    }
                }
                Some(Value::Array(items)) => {
                    (0..items.len()).for_each(|index| found(at, &format!("{at}/examples/{index}")));
                }
                _ => {}
            }
            if has_schema && value.get("example").is_some() {
                found(&schema, &format!("{at}/example"));
            }
            let entries = value.as_object().into_iter().flatten().map(|(key, value)| (key.clone(), value));
            let items = value.as_array().into_iter().flatten().enumerate();
            for (key, value) in entries.chain(items.map(|(index, value)| (index.to_string(), value))) {
                if !["example", "examples", "$ref"].contains(&key.as_str()) {
                    let key = key.replace('~', "~0").replace('/', "~1");
                    walk(document, value, &format!("{at}/{key}"), found);
                }
            }
        }
        walk(document, document.root, "", found);
    }

    #[test]
    fn the_examples_of_the_document_are_valid() {
        let root = document();
        let document = Document::new(&root);
        let mut checked = 0;
        examples(&document, &mut |schema, at| {
            let value = document.get(at).unwrap_or_else(|| panic!("openapi.yaml has no {at}"));
            assert_eq!(matches(&document.validator(schema), value), Ok(()), "the example {at}");
            checked += 1;
        });
        assert!(checked > 40, "only {checked} examples were found");
    }

    #[test]
    fn the_error_examples_have_the_texts_of_the_server() {
        use portolan::error::{Error, Issue};

        let named = || portolan::mcp::Error::Closed;
        let internal = || "a cause".into();
        let invalid = |error: &Value| {
            let issues = error["errors"].as_array().expect("an invalid request names its places").iter();
            let issue = |issue: &Value| Issue {
                loc: issue["loc"].as_array().expect("a list").clone(),
                msg: issue["msg"].as_str().expect("a text").to_owned(),
            };
            Error::Invalid(issues.map(issue).collect())
        };
        let root = document();
        let document = Document::new(&root);
        let mut codes = BTreeSet::new();
        examples(&document, &mut |_, at| {
            let example = document.get(at).expect("it is there");
            let Some(code) = example.get("code").and_then(Value::as_str) else { return };
            let (error, text) = match code {
                "unauthorized" => (Error::Unauthorized, &example["detail"]),
                "forbidden" => (Error::Forbidden, &example["detail"]),
                "too_many_attempts" => {
                    (Error::Guessing { retry_after: std::time::Duration::from_secs(1) }, &example["detail"])
                }
                "not_found" => (Error::NoServer, &example["detail"]),
                "method_not_allowed" => (Error::MethodNotAllowed, &example["detail"]),
                "host_unclear" => (Error::HostUnclear, &example["detail"]),
                "host_not_allowed" => (Error::HostNotAllowed, &example["detail"]),
                "origin_not_allowed" => (Error::PageNotAllowed, &example["detail"]),
                "tool_held" => (Error::ToolHeld { is_new: false }, &example["detail"]),
                "stdio_disabled" => (Error::Disabled(portolan::mcp::Error::StdioOff), &example["detail"]),
                "stdio_not_in_templates" => (Error::Disabled(portolan::mcp::Error::NoTemplate), &example["detail"]),
                "config_sealed" => (Error::Sealed(portolan::model::Unreadable::NoKey), &example["detail"]),
                "tool_changed" => (Error::ToolChanged, &example["detail"]),
                "run_unknown" => (Error::RunUnknown { replied: true }, &example["detail"]),
                "name_taken" => (Error::NameTaken, &example["detail"]),
                "body_incomplete" => (Error::BodyIncomplete, &example["detail"]),
                "body_too_large" => (Error::BodyTooLarge { limit: 1024 * 1024 }, &example["detail"]),
                "unsupported_media_type" => (Error::UnsupportedMediaType, &example["detail"]),
                "invalid_request" => (invalid(example), &example["detail"]),
                "variable_missing" => {
                    let name = "GITHUB_TOKEN".to_owned();
                    (Error::Variables(portolan::mcp::Error::NoValue { name }), &example["detail"])
                }
                "variable_invalid" => {
                    let place = "auth_token".to_owned();
                    (Error::Variables(portolan::mcp::Error::BadValue { place }), &example["detail"])
                }
                "internal" => (Error::Internal(internal()), &example["detail"]),
                "unavailable" => (Error::Unavailable(sqlx::Error::PoolTimedOut.into()), &example["detail"]),
                "storage_full" => (Error::StorageFull(sqlx::Error::PoolTimedOut.into()), &example["detail"]),
                "overloaded" => (Error::Full { repeatable: true }, &example["detail"]),
                "mcp_server_unavailable" => {
                    let server_name = "search".to_owned();
                    (Error::Refresh { server_name, source: named() }, &example["detail"]["message"])
                }
                "mcp_connection_error" => (Error::Connect(named()), &example["error"]["message"]),
                other => panic!("an example of an unknown error {other}"),
            };
            assert_eq!(*text, error.to_string(), "{at}");
            codes.insert(code.to_owned());
        });
        assert_eq!(codes.len(), 27, "{codes:?}");
    }

    #[test]
    fn request_schemas_know_both_generations() {
        let root = document();
        let document = Document::new(&root);
        let create = document.validator("/components/schemas/CreateMCPServerRequest");
        let update = document.validator("/components/schemas/UpdateMCPServerRequest");
        let run = document.validator("/components/schemas/ToolExecuteRequest");
        let cases = [
            (&create, json!({"server_name": "n", "config": {"command": "c", "args": ["a"]}}), true),
            (&create, json!({"server_name": "n", "config": {"server_url": "https://x"}}), true),
            (&create, json!({"server_name": "n", "config": {"type": "sse", "server_url": "https://x"}}), true),
            (&create, json!({"server_name": "n", "command": "c", "env": null}), true),
            (&create, json!({"server_name": "n", "server_url": "https://x"}), true),
            (
                &create,
                json!({"server_name": "n", "mcp_server_type": "streamable_http", "server_url": "https://x"}),
                true,
            ),
            (&create, json!({"server_name": " ", "command": "c"}), false),
            (&create, json!({"server_name": format!(" {} ", "é".repeat(255)), "command": "c"}), true),
            (&create, json!({"server_name": "é".repeat(256), "command": "c"}), false),
            (&create, json!({"server_name": null, "command": "c"}), false),
            (&create, json!({"server_name": null, "config": {"command": "c"}}), false),
            (&create, json!({"server_name": "n", "config": null, "command": "c"}), true),
            (&create, json!({"server_name": "n", "config": {"command": " "}}), false),
            (&create, json!({"server_name": "n", "config": {"command": "é".repeat(4096), "args": null}}), true),
            (&create, json!({"server_name": "n", "config": {"command": "c", "args": vec!["a"; 257]}}), false),
            (&create, json!({"server_name": "n", "config": {"command": "c", "args": ["a".repeat(32 * 1024)]}}), true),
            (
                &create,
                json!({"server_name": "n", "config": {"command": "c", "args": ["a".repeat(32 * 1024 + 1)]}}),
                false,
            ),
            (&create, json!({"server_name": "n", "config": {"command": "c", "env": {"A=B": ""}}}), false),
            (&create, json!({"server_name": "n", "config": {"command": "c", "server_url": null, "type": null}}), true),
            (&create, json!({"server_name": "n", "config": {"command": "c", "auth_token": ""}}), false),
            (&create, json!({"server_name": "n", "config": {"command": "c", "token": null}}), false),
            (
                &create,
                json!({"server_name": "n", "config": {"command": null, "server_url": "https://x", "args": null}}),
                true,
            ),
            (
                &create,
                json!({"server_name": "n", "config": {"type": "sse", "mcp_server_type": "streamable_http", "server_url": "https://x"}}),
                false,
            ),
            (
                &create,
                json!({"server_name": "n", "config": {"type": "sse", "mcp_server_type": null, "server_url": "https://x"}}),
                true,
            ),
            (&create, json!({"server_name": "a\u{7}", "command": "c"}), false),
            (&create, json!({"server_name": "n", "command": ""}), false),
            (&create, json!({"server_name": "n", "command": "c", "server_url": "https://x"}), false),
            (
                &create,
                json!({"server_name": "n", "config": {"mcp_server_type": "websocket", "server_url": "https://x"}}),
                false,
            ),
            (&create, json!({"server_name": "n", "config": {"command": "c"}, "type": "stdio"}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "ftp://x"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "https://x", "auth_header": "a b"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "https://x", "auth_token": "a\nb"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "https://x", "extra": 1}}), false),
            (
                &create,
                json!({"server_name": "n", "config": {"server_url": "https://x", "auth_header": "", "auth_token": ""}}),
                true,
            ),
            (&create, json!({"server_name": "n", "config": {"server_url": "https://x", "auth_token": "é"}}), false),
            (
                &create,
                json!({"server_name": "n", "config": {"server_url": "https://x", "auth_header": "Mcp-SESSION-id"}}),
                false,
            ),
            (
                &create,
                json!({"server_name": "n", "config": {"server_url": "https://x", "custom_headers": {"TE": "1"}}}),
                false,
            ),
            (
                &create,
                json!({"server_name": "n", "config": {"server_url": "https://x", "custom_headers": {"X-Te": "a\tb"}}}),
                true,
            ),
            (&create, json!({"server_name": "n", "config": {"server_url": "HTTP://exämple.com:1/{a}?b=\"c\""}}), true),
            (&create, json!({"server_name": "n", "config": {"server_url": "http:///x"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "http://x\\y"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "http://x/\u{3000}"}}), false),
            (&create, json!({"server_name": "n", "config": {"server_url": "http://x/#"}}), false),
            (&update, json!({}), true),
            (&update, json!({"server_name": null, "config": null}), true),
            (&update, json!({"config": {"mcp_server_type": "stdio", "command": null, "args": null}}), true),
            (&update, json!({"server_url": "https://x", "token": "t"}), true),
            (&update, json!({"token": "t", "auth_token": null, "config": null, "command": null}), true),
            (&update, json!({"token": "t", "auth_token": ""}), false),
            (&update, json!({"type": "sse", "mcp_server_type": "sse"}), true),
            (&update, json!({"type": "sse", "mcp_server_type": "streamable_http"}), false),
            (&update, json!({"config": {"type": "sse", "mcp_server_type": "stdio"}}), false),
            (&update, json!({"config": {"mcp_server_type": "sse", "command": "c"}}), false),
            (&update, json!({"config": {"auth_header": "", "server_url": null}}), true),
            (&update, json!({"server_name": ""}), false),
            (&update, json!({"config": {"auth_token": "", "custom_headers": {}}}), true),
            (&update, json!({"config": {"custom_headers": {"a": null}}}), false),
            (&update, json!({"id": "x"}), false),
            (&run, json!({}), true),
            (&run, json!({"args": {"a": [1]}}), true),
            (&run, json!({"args": null}), false),
            (&run, json!({"args": []}), false),
            (&run, json!({"arguments": {}}), false),
        ];
        for (schema, body, allowed) in cases {
            assert_eq!(schema.is_valid(&body), allowed, "{body}");
        }
    }
}
