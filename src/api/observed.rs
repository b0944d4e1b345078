//! What is told of a run: in its span, by OpenTelemetry's semantic conventions for HTTP servers and names of our own below
//! `portolan.`, in the metrics and in the run log.

use std::time::{Duration, Instant};

use axum::extract::{FromRequestParts, MatchedPath};
use axum::http::StatusCode;
use axum::http::request::Parts;
use serde_json::{Map, Value};

use crate::app::App;
use crate::error::Error;
use crate::mcp::Outcome;
use crate::model::{By, ServerTool};
use crate::run_log::{Recording, RunLog};
use crate::telemetry::Span;
use crate::telemetry::metrics::{self, Metrics, RunEnd};

use super::access::Caller;
use super::runs::Sent;

/// The run that a request starts, if it starts one: nothing is told of a request that joins another's run.
pub struct Asked {
    by: By,
    /// In the trace that the request's `traceparent` names.
    span: Span,
    log: RunLog,
    metrics: Metrics,
    /// After that the head of the answer has gone out, and an error is told as a result.
    early_head_after: Duration,
}

impl FromRequestParts<App> for Asked {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str).trim_end_matches('/');
        let mut span = app.traces.start(&parts.headers, || format!("{} {route}", parts.method));
        span.set("http.request.method", parts.method.as_str());
        span.set("http.route", route);
        span.set("url.scheme", "http");
        let (log, metrics) = (app.run_log.clone(), app.metrics.clone());
        Ok(Self { by: caller.by(), span, log, metrics, early_head_after: app.settings.runs.early_head_after })
    }
}

impl Asked {
    /// It begins. `sent` says whether it may have reached its tool when it is cut off.
    pub fn begin(self, sent: &Sent) -> Observed {
        let Self { by, span, log, metrics, early_head_after } = self;
        let counted = metrics.begin_run(sent);
        let (span, sent, late_at) = (span.begin(), sent.clone(), Instant::now() + early_head_after);
        Observed { by, sent, late_at, span, counted, log, recorded: None }
    }
}

/// A run that has begun. Dropped before its end, it was cut off.
pub struct Observed {
    by: By,
    sent: Sent,
    late_at: Instant,
    span: Span,
    counted: metrics::Run,
    log: RunLog,
    recorded: Option<Recording>,
}

impl Observed {
    /// Which tool it is about.
    pub fn goes_to(&mut self, found: &ServerTool, arguments: &Map<String, Value>) {
        let ServerTool { server, tool } = found;
        self.span.set("portolan.server.id", &*server.id);
        self.span.set("portolan.server.name", &*server.server_name);
        self.span.set("portolan.tool.id", &*tool.id);
        self.span.set("gen_ai.tool.name", &*tool.name);
        self.span.set("portolan.transport", server.server_type.as_str());
        self.counted.goes_to(server.server_type);
        self.recorded = Some(self.log.begin(&self.by, found, arguments, &self.sent));
    }

    /// Of which the calls to the server are parts.
    pub fn span(&mut self) -> &mut Span {
        &mut self.span
    }

    /// What came of it.
    pub fn end(mut self, outcome: &Result<Outcome, Error>) {
        let is_late = Instant::now() >= self.late_at;
        let (end, told, status) = match outcome {
            Ok(Outcome { is_error: false, .. }) => (RunEnd::Success, "success", StatusCode::OK),
            Ok(Outcome { is_error: true, .. }) => (RunEnd::Error, "error", StatusCode::OK),
            Err(error) => {
                let (status, code) = error.status();
                // What a client did wrong is no error of a server's (HTTP spans, status).
                if status.is_server_error() {
                    self.span.fail(code);
                } else {
                    self.span.set("error.type", code);
                }
                (RunEnd::Failed(code), "failed", if is_late { StatusCode::OK } else { status })
            }
        };
        self.span.set("portolan.run.outcome", told);
        self.span.set("http.response.status_code", status.as_u16());
        self.span.end();
        self.counted.end(end);
        if let Some(recorded) = self.recorded {
            match outcome {
                Ok(outcome) => recorded.ended(outcome.is_error, &outcome.text),
                Err(error) => recorded.failed(error.code()),
            }
        }
    }
}
