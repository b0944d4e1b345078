//! What is told of a run: in its span, by OpenTelemetry's semantic conventions for HTTP servers and names of our own below
//! `portolan.`, and in the run log.

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

use super::access::Caller;
use super::runs::Sent;

/// The run that a request starts, if it starts one: nothing is told of a request that joins another's run.
pub struct Observed {
    by: By,
    log: RunLog,
    recording: Option<Recording>,
    /// In the trace that the request's `traceparent` names.
    span: Span,
    started: Instant,
    /// After that the head of the answer has gone out, and an error is told as a result.
    early_head_after: Duration,
}

impl FromRequestParts<App> for Observed {
    type Rejection = Error;

    async fn from_request_parts(parts: &mut Parts, app: &App) -> Result<Self, Error> {
        let caller = Caller::from_request_parts(parts, app).await?;
        let route = parts.extensions.get::<MatchedPath>().map_or("", MatchedPath::as_str).trim_end_matches('/');
        let mut span = app.traces.start(&parts.headers, || format!("{} {route}", parts.method));
        span.set("http.request.method", parts.method.as_str());
        span.set("http.route", route);
        span.set("url.scheme", "http");
        Ok(Self {
            by: caller.by(),
            log: app.run_log.clone(),
            recording: None,
            span,
            started: Instant::now(),
            early_head_after: app.settings.runs.early_head_after,
        })
    }
}

impl Observed {
    /// From now on it is told of, whatever becomes of it.
    #[must_use]
    pub fn begin(self) -> Self {
        Self { span: self.span.begin(), started: Instant::now(), ..self }
    }

    /// Which tool it is about. `sent` says whether it may have reached the tool when it is cut off.
    pub fn goes_to(&mut self, found: &ServerTool, arguments: &Map<String, Value>, sent: &Sent) {
        let ServerTool { server, tool } = found;
        self.span.set("portolan.server.id", &*server.id);
        self.span.set("portolan.server.name", &*server.server_name);
        self.span.set("portolan.tool.id", &*tool.id);
        self.span.set("gen_ai.tool.name", &*tool.name);
        self.span.set("portolan.transport", server.server_type.as_str());
        self.recording = Some(self.log.begin(&self.by, found, arguments, sent));
    }

    /// Of which the calls to the server are parts.
    pub fn span(&mut self) -> &mut Span {
        &mut self.span
    }

    /// What came of it.
    pub fn end(mut self, outcome: &Result<Outcome, Error>) {
        let is_late = self.started.elapsed() >= self.early_head_after;
        let (told, status) = match outcome {
            Ok(Outcome { is_error: false, .. }) => ("success", StatusCode::OK),
            Ok(Outcome { is_error: true, .. }) => ("error", StatusCode::OK),
            Err(error) => {
                let (status, code) = error.status();
                // What a client did wrong is no error of a server's (HTTP spans, status).
                if status.is_server_error() {
                    self.span.fail(code);
                } else {
                    self.span.set("error.type", code);
                }
                ("failed", if is_late { StatusCode::OK } else { status })
            }
        };
        self.span.set("portolan.run.outcome", told);
        self.span.set("http.response.status_code", status.as_u16());
        self.span.end();
        if let Some(recording) = self.recording {
            match outcome {
                Ok(outcome) => recording.ended(outcome.is_error, &outcome.text),
                Err(error) => recording.failed(error.code()),
            }
        }
    }
}
