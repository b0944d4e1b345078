//! Speaks HTTP: the route table, in the order of `openapi.yaml`, and the layers around it.

mod access;
mod assets;
mod attempts;
mod drip;
mod elsewhere;
#[cfg(any(test, fuzzing))]
pub mod fuzz;
mod guard;
mod import;
mod legacy;
mod logs;
mod oauth;
mod observed;
mod origin;
mod page;
mod portolan;
mod repeats;
mod reveal;
mod runs;
mod servers;
mod status;
mod tokens;
mod tools;
mod variables;
mod wire;

use std::sync::Arc;

use axum::Router;
use axum::extract::{MatchedPath, Request, State};
use axum::handler::Handler;
use axum::http::header::X_CONTENT_TYPE_OPTIONS;
use axum::http::{HeaderName, HeaderValue, Method};
use axum::middleware::{Next, from_fn, from_fn_with_state};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use tower_http::catch_panic::CatchPanicLayer;
use tracing::Instrument;
use uuid::Uuid;

use crate::app::App;
use crate::error::Error;
use crate::serve::Full;
use crate::telemetry::metrics::{Metrics, TokenFailure};

pub use access::{Access, Scope};
use access::{Door, admit, authorize};
pub use elsewhere::Elsewhere;
pub use guard::Bodies;
pub use import::{Import, Report, export};
pub use origin::{EveryPage, Origins};
pub use runs::Runs;
pub use servers::as_registered;
pub use tokens::{Token, TokenError, Tokens, parse as parse_tokens};

const X_REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const CROSS_ORIGIN_RESOURCE_POLICY: HeaderName = HeaderName::from_static("cross-origin-resource-policy");

/// One row of the route table.
pub struct Route {
    pub method: Method,
    /// The path as `openapi.yaml` has it; with and without a slash at its end it is the same (CONTRACT row 1).
    pub path: &'static str,
    pub access: Access,
    handler: MethodRouter<App>,
}

fn route<H: Handler<T, App>, T: 'static>(method: Method, path: &'static str, access: Access, handler: H) -> Route {
    let filter = MethodFilter::try_from(method.clone()).expect("the table uses standard methods");
    let guarded = on(filter, handler).layer(from_fn(move |request, next| authorize(access, request, next)));
    Route { method, path, access, handler: guarded }
}

/// Where the metrics are, on the address for clients or on one of their own.
const METRICS: &str = "/metrics";

/// Every route there is.
pub fn routes() -> Vec<Route> {
    use Access::Open;
    const READ: Access = Access::Needs(Scope::Read);
    const RUN: Access = Access::Needs(Scope::Run);
    const ADMIN: Access = Access::Needs(Scope::Admin);
    const ALL: &str = "/v1/mcp-servers/";
    const ONE: &str = "/v1/mcp-servers/{mcp_server_id}";
    const LEGACY: &str = "/v1/tools/mcp/servers";
    const NAMED: &str = "/v1/tools/mcp/servers/{mcp_server_name}";
    const NAMED_TEST: &str = "/v1/tools/mcp/servers/test";
    const NAMED_CONNECT: &str = "/v1/tools/mcp/servers/connect";
    const NAMED_TOOLS: &str = "/v1/tools/mcp/servers/{mcp_server_name}/tools";
    const NAMED_EXECUTE: &str = "/v1/tools/mcp/servers/{mcp_server_name}/tools/{tool_name}/execute";
    vec![
        route(Method::POST, ALL, ADMIN, servers::create),
        route(Method::GET, ALL, READ, servers::list),
        route(Method::GET, ONE, READ, servers::retrieve),
        route(Method::PATCH, ONE, ADMIN, servers::update),
        route(Method::DELETE, ONE, ADMIN, servers::delete),
        route(Method::PATCH, "/v1/mcp-servers/{mcp_server_id}/refresh", ADMIN, servers::refresh),
        route(Method::GET, "/v1/mcp-servers/{mcp_server_id}/tools", READ, tools::list),
        route(Method::GET, "/v1/mcp-servers/{mcp_server_id}/tools/{tool_id}", READ, tools::retrieve),
        route(Method::POST, "/v1/mcp-servers/{mcp_server_id}/tools/{tool_id}/run", RUN, tools::run),
        route(Method::POST, "/v1/mcp-servers/{mcp_server_id}/tools/{tool_id}/approve", ADMIN, tools::approve),
        route(Method::GET, "/v1/mcp-servers/connect/{mcp_server_id}", ADMIN, oauth::connect),
        // The state that it is called with is the credential.
        route(Method::GET, "/v1/tools/mcp/oauth/callback", Open, oauth::callback),
        route(Method::GET, "/v1/tools/mcp/oauth/callback/{session_id}", Open, oauth::callback_of_session),
        route(Method::GET, "/v1/tools/mcp/oauth/client-metadata.json", Open, oauth::client_metadata),
        route(Method::GET, LEGACY, READ, legacy::list),
        route(Method::PUT, LEGACY, ADMIN, legacy::add),
        // A server may be called as these routes are, and a tool, too: their names are paths of their own then.
        route(Method::POST, NAMED_TEST, ADMIN, legacy::test),
        route(Method::PATCH, NAMED_TEST, ADMIN, legacy::update),
        route(Method::DELETE, NAMED_TEST, ADMIN, legacy::delete),
        route(Method::POST, NAMED_CONNECT, ADMIN, legacy::connect),
        route(Method::PATCH, NAMED_CONNECT, ADMIN, legacy::update),
        route(Method::DELETE, NAMED_CONNECT, ADMIN, legacy::delete),
        route(Method::PATCH, NAMED, ADMIN, legacy::update),
        route(Method::DELETE, NAMED, ADMIN, legacy::delete),
        route(Method::GET, NAMED_TOOLS, RUN, legacy::tools),
        route(Method::POST, NAMED_TOOLS, ADMIN, legacy::add_tool),
        route(Method::POST, "/v1/tools/mcp/servers/{mcp_server_name}/{mcp_tool_name}", ADMIN, legacy::add_tool),
        route(Method::POST, "/v1/tools/mcp/servers/{mcp_server_name}/resync", ADMIN, legacy::resync),
        route(Method::POST, NAMED_EXECUTE, RUN, legacy::execute),
        route(Method::POST, "/v1/portolan/import", ADMIN, portolan::import),
        route(Method::GET, "/v1/portolan/export", ADMIN, portolan::export),
        route(Method::GET, "/v1/portolan/runs", ADMIN, logs::runs),
        route(Method::GET, "/v1/portolan/changes", ADMIN, logs::changes),
        route(Method::GET, "/v1/health/", Open, status::health),
        route(Method::GET, "/v1/ready", Open, status::ready),
        route(Method::GET, METRICS, READ, status::metrics),
        route(Method::GET, "/openapi.yaml", Open, assets::openapi),
        route(Method::GET, "/docs", Open, assets::docs),
        route(Method::GET, "/docs/{file}", Open, assets::docs_file),
        route(Method::GET, "/", Open, assets::console),
        route(Method::GET, "/console/{file}", Open, assets::console_file),
    ]
}

/// The routes with everything around them: what listed pages need to read any answer outermost, then request id and log,
/// then panics, then which pages may come in, then who may, then the handlers.
pub fn router(app: App) -> Router {
    let routes = routes();
    let door = Door::new(app.tokens.clone(), &routes, app.metrics.clone());
    let has_metrics = app.settings.metrics.metrics_listen.is_none();
    let mut router = Router::new();
    for Route { path, handler, .. } in routes.into_iter().filter(|route| has_metrics || route.path != METRICS) {
        let bare = path.trim_end_matches('/');
        router = router.route(&format!("{bare}/"), handler.clone());
        // The root is its slash.
        if !bare.is_empty() {
            router = router.route(bare, handler);
        }
    }
    let cors = app.origins.cors();
    let router = router
        .fallback(|| async { Error::NoRoute })
        .method_not_allowed_fallback(|| async { Error::MethodNotAllowed })
        // Around all of the above, what is no route too: whoever may not come in learns nothing.
        .layer(from_fn_with_state(door, admit))
        .layer(from_fn_with_state(app.origins.clone(), origin::check))
        .layer(CatchPanicLayer::custom(|_| Error::Internal("a handler panicked".into()).into_response()))
        .layer(from_fn_with_state(app.metrics.clone(), identify))
        .with_state(app);
    match cors {
        Some(cors) => router.layer(cors),
        None => router,
    }
}

/// The metrics alone, for everybody who reaches them: where that is says the operator (`--metrics-listen`).
pub fn metrics_router(app: App) -> Router {
    Router::new()
        .route(METRICS, get(status::metrics))
        .fallback(|| async { Error::NoRoute })
        .method_not_allowed_fallback(|| async { Error::MethodNotAllowed })
        .layer(CatchPanicLayer::custom(|_| Error::Internal("a handler panicked".into()).into_response()))
        .layer(from_fn_with_state(app.metrics.clone(), identify))
        .with_state(app)
}

/// Answers, also when there is no room for requests: who asks must tell a busy Portolan from a dead one, and how busy it is.
const ALWAYS: [&str; 3] = ["/v1/health", "/v1/ready", METRICS];

/// What there is to say when there is no room for a request. Its body is not read, so nobody knows which run it asks for.
fn refusal(request: &Request) -> Option<Error> {
    request.extensions().get::<Full>()?;
    let path = request.uri().path();
    let path = path.strip_suffix('/').unwrap_or(path);
    (!ALWAYS.contains(&path)).then(|| full(request))
}

/// There is no room for this request, of which nothing was done.
fn full(request: &Request) -> Error {
    let path = request.uri().path().trim_end_matches('/');
    let is_run = path.ends_with("/run") || path.ends_with("/execute");
    Error::Full { repeatable: !(is_run && repeats::must_be_noted(request.headers())) }
}

/// The longest text of a request that a line of the log shows, in bytes: it stands in every line of that request.
const MAX_SHOWN: usize = 256;

fn start_of(text: &str) -> &str {
    &text[..text.floor_char_boundary(MAX_SHOWN)]
}

/// A request's path as the log shows it: what its route says, and of the rest ids of ours alone. Clients write tokens into
/// all places.
fn path_of(request: &Request) -> String {
    let Some(route) = request.extensions().get::<MatchedPath>() else { return "(unknown)".to_owned() };
    let is_ours = |id: &str| {
        let uuid = id.strip_prefix("mcp_server-").or_else(|| id.strip_prefix("tool-"));
        uuid.is_some_and(|uuid| Uuid::try_parse(uuid).is_ok())
    };
    let steps = route.as_str().split('/').zip(request.uri().path().split('/'));
    steps.map(|(known, given)| if is_ours(given) { given } else { known }).collect::<Vec<_>>().join("/")
}

/// Gives each request an id, logs and counts its end, and turns a handler's [`Error`] into its answer.
async fn identify(State(metrics): State<Metrics>, request: Request, next: Next) -> Response {
    let id = Uuid::new_v4().to_string();
    let span = tracing::info_span!(
        "request",
        request.id = %id,
        http.method = start_of(request.method().as_str()),
        http.path = %path_of(&request),
        caller.name = tracing::field::Empty,
    );
    let started = std::time::Instant::now();
    let (method, route) = (request.method().clone(), request.extensions().get::<MatchedPath>().cloned());
    async {
        let response = match refusal(&request) {
            Some(error) => error.into_response(),
            None => next.run(request).await,
        };
        if let Some(error) = response.extensions().get::<Arc<Error>>() {
            metrics.requests.failed(error.code());
            if matches!(**error, Error::Forbidden) {
                metrics.token_failed(TokenFailure::Scope);
            }
        }
        let mut response = Error::finish(response, &id);
        let value = HeaderValue::from_str(&id).expect("a UUID is a legal header value");
        response.headers_mut().insert(X_REQUEST_ID, value);
        // Nothing of it is for other pages, be it as an image or as a script.
        response.headers_mut().insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        response.headers_mut().insert(CROSS_ORIGIN_RESOURCE_POLICY, HeaderValue::from_static("same-origin"));
        let status = response.status().as_u16();
        let route = route.as_ref().map(MatchedPath::as_str);
        metrics.requests.answered(method.as_str(), route, status, started.elapsed());
        tracing::debug!(http.status = status, duration.ms = started.elapsed().as_millis() as u64, "request answered");
        response
    }
    .instrument(span)
    .await
}
