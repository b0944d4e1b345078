//! The span of a run: OpenTelemetry's semantic conventions for HTTP servers, and names of our own below `portolan.`.

use std::convert::Infallible;

use axum::extract::{FromRequestParts, MatchedPath};
use axum::http::StatusCode;
use axum::http::request::Parts;

use crate::app::App;
use crate::error::Error;
use crate::mcp::Outcome;
use crate::model::ServerTool;
use crate::telemetry::Span;

/// The span that a run is if this request starts one, in the trace that its `traceparent` names.
pub struct RunSpan(pub Span);

impl FromRequestParts<App> for RunSpan {
    type Rejection = Infallible;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Infallible> {
        let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str).trim_end_matches('/');
        let mut span = app.traces.start(&parts.headers, || format!("{} {route}", parts.method));
        span.set("http.request.method", parts.method.as_str());
        span.set("http.route", route);
        span.set("url.scheme", "http");
        Ok(Self(span))
    }
}

/// Which tool it is about.
pub fn describe(span: &mut Span, ServerTool { server, tool }: &ServerTool) {
    span.set("portolan.server.id", &*server.id);
    span.set("portolan.server.name", &*server.server_name);
    span.set("portolan.tool.id", &*tool.id);
    span.set("gen_ai.tool.name", &*tool.name);
    span.set("portolan.transport", server.server_type.as_str());
}

/// What came of it. `is_late`: the head of the answer has gone out, and an error is told as a result.
pub fn end(mut span: Span, outcome: &Result<Outcome, Error>, is_late: bool) {
    let (outcome, status) = match outcome {
        Ok(Outcome { is_error: false, .. }) => ("success", StatusCode::OK),
        Ok(Outcome { is_error: true, .. }) => ("error", StatusCode::OK),
        Err(error) => {
            let (status, code) = error.status();
            // What a client did wrong is no error of a server's (HTTP spans, status).
            if status.is_server_error() {
                span.fail(code)
            } else {
                span.set("error.type", code)
            }
            ("failed", if is_late { StatusCode::OK } else { status })
        }
    };
    span.set("portolan.run.outcome", outcome);
    span.set("http.response.status_code", status.as_u16());
    span.end();
}
