//! The one error that leaves Portolan over HTTP. This file alone picks status codes, writes error bodies (CONTRACT
//! row 20) and logs causes.
//!
//! A handler returns [`Error`]; it travels in the response's extensions to [`Error::render`], which knows the request id.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::http::header::{ALLOW, HeaderName, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::http::{HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use serde_json::{Value, json};

use crate::model::Unreadable;
use crate::{mcp, store};

/// What a Letta SDK reads before it repeats a request by itself (CONTRACT, "The rule").
const X_SHOULD_RETRY: HeaderName = HeaderName::from_static("x-should-retry");

/// One thing that is wrong with a request, and where: `loc` is `body`, `query` or `header`, then keys and indexes.
#[derive(Clone, Debug, PartialEq, serde::Serialize)]
pub struct Issue {
    pub loc: Vec<Value>,
    pub msg: String,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("This path does not exist.")]
    NoRoute,
    #[error("This path does not support this method.")]
    MethodNotAllowed,
    /// No token, or a wrong one; Letta's own word for it (CONTRACT row 21).
    #[error("Unauthorized")]
    Unauthorized,
    /// One wrong token too many from one address.
    #[error("Too many wrong tokens came from this address; try again later, with the right one.")]
    Guessing { retry_after: Duration },
    #[error("This token may not do that; it needs a wider scope.")]
    Forbidden,
    #[error("The request must name its host, once, and the same in its target.")]
    HostUnclear,
    #[error(
        "Portolan is not known by this host name; list it in --allowed-hosts (PORTOLAN_ALLOWED_HOSTS) if it should be."
    )]
    HostNotAllowed,
    #[error(
        "This web page may not use Portolan; list its origin in --cors-origins (PORTOLAN_CORS_ORIGINS) if it should."
    )]
    PageNotAllowed,
    /// The policy for commands forbids such a server.
    #[error(transparent)]
    Disabled(mcp::Error),
    #[error("There is no MCP server with this id.")]
    NoServer,
    #[error("This MCP server has no tool with this id.")]
    NoTool,
    /// As these two, where a path names what it means.
    #[error("There is no MCP server with this name.")]
    NoServerNamed,
    #[error("This MCP server has no tool with this name; resync it if it should.")]
    NoToolNamed,
    #[error("{}", held(.is_new))]
    ToolHeld { is_new: bool },
    #[error("The definition of this tool has another hash now; look at it again before you approve it.")]
    ToolChanged,
    #[error("An MCP server with this name exists already; choose another name.")]
    NameTaken,
    /// Its connection cannot be opened, and is not written over: it may be whole once its key is back.
    #[error(transparent)]
    Sealed(Unreadable),
    #[error("The request body is larger than {limit} bytes, the most that this path takes.")]
    BodyTooLarge { limit: usize },
    #[error("The request body did not arrive completely.")]
    BodyIncomplete,
    #[error("The request body must be JSON, sent with the content type application/json.")]
    UnsupportedMediaType,
    #[error("{}", summary(.0))]
    Invalid(Vec<Issue>),
    #[error("Could not connect to MCP server {server_name} to resync tools")]
    Refresh { server_name: String, source: mcp::Error },
    #[error("Failed to connect to MCP server.")]
    Connect(#[source] mcp::Error),
    /// A template has no value, or one that cannot be used (CONTRACT row 17); nothing was sent.
    #[error(transparent)]
    Variables(mcp::Error),
    /// Nothing was sent, and nothing is known to be wrong with another attempt in a while (CONTRACT row 14).
    #[error("{source}")]
    Overload { source: mcp::Error, retry_after: Duration },
    /// One request more than may be in flight; nothing was done for it. Not `repeatable` when the next try would be taken
    /// for that of an equal run from before (CONTRACT row 23).
    #[error("Portolan is busy with as many requests as it may take; try again in a moment.")]
    Full { repeatable: bool },
    /// Nothing was done, and the run goes on.
    #[error("As many requests as may wait for this run already; try again in a moment.")]
    Crowded,
    /// Another replica had it, and did not send it; nothing was done.
    #[error("This run was not made where it was asked for first; try again in a moment.")]
    NotSent,
    /// A repeated run whose outcome nobody knows, or that another replica may have (CONTRACT row 16). `replied`: it is known
    /// that there was one.
    #[error("{}", unknown(*.replied))]
    RunUnknown { replied: bool },
    /// Nothing was done, but for a change that was sent and not answered: of that nobody knows (docs/troubleshooting.md).
    #[error("The database is not available; try again in a moment.")]
    Unavailable(#[source] store::Error),
    /// Nothing was written, and a repetition would find no more room.
    #[error("The database has no room left on its disk; nothing was changed. Make room there, then try again.")]
    StorageFull(#[source] store::Error),
    #[error("Something went wrong inside Portolan; its log names this request id.")]
    Internal(#[source] Box<dyn std::error::Error + Send + Sync>),
}

fn summary(issues: &[Issue]) -> String {
    match issues {
        [] => "The request is not valid.".to_owned(),
        [only] => only.msg.clone(),
        [first, rest @ ..] => format!("{} ({} more problems are listed in errors.)", first.msg, rest.len()),
    }
}

fn held(is_new: &bool) -> String {
    let why = match is_new {
        true => "This tool came after its server was registered",
        false => "The definition of this tool changed",
    };
    format!(
        "{why} and is held until an admin has looked at it and approved it with \
         POST /v1/mcp-servers/{{mcp_server_id}}/tools/{{tool_id}}/approve."
    )
}

fn unknown(replied: bool) -> &'static str {
    match replied {
        true => {
            "The Portolan that had this run ended before it was known what came of it, so it is not made again; the tool may \
             have run."
        }
        false => {
            "Another Portolan may have made this run and did not say so in time, so it is not made again; the tool may have \
             run."
        }
    }
}

/// The longest `Retry-After`, in seconds, whatever a server asks for: an SDK may sleep all of it with its caller.
const LONGEST_RETRY_AFTER: u64 = 30;

/// `Retry-After` in seconds (RFC 9110, 10.2.3), never 0.
fn whole_seconds(time: Duration) -> u64 {
    (time.as_secs_f64().ceil() as u64).clamp(1, LONGEST_RETRY_AFTER)
}

impl From<mcp::Error> for Error {
    /// Why a run was not sent.
    fn from(error: mcp::Error) -> Self {
        match (&error, error.retry_after()) {
            (mcp::Error::Deleted, _) => Self::NoServer,
            (mcp::Error::NoValue { .. } | mcp::Error::BadValue { .. }, _) => Self::Variables(error),
            (_, Some(retry_after)) => Self::Overload { source: error, retry_after },
            (_, None) => Self::Connect(error),
        }
    }
}

impl From<store::Error> for Error {
    fn from(error: store::Error) -> Self {
        match error {
            store::Error::NameTaken => Self::NameTaken,
            store::Error::Overtaken => Self::Unavailable(error),
            store::Error::Unavailable(_) => Self::Unavailable(error),
            store::Error::Full(_) => Self::StorageFull(error),
            store::Error::Refused(_) => Self::Internal(error.into()),
        }
    }
}

impl Error {
    /// A request with one thing wrong.
    pub fn invalid(loc: Vec<Value>, msg: impl Into<String>) -> Self {
        Self::Invalid(vec![Issue { loc, msg: msg.into() }])
    }

    /// The status and the code of its answer.
    pub fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::NoRoute | Self::NoServer | Self::NoTool | Self::NoServerNamed | Self::NoToolNamed => {
                (StatusCode::NOT_FOUND, "not_found")
            }
            Self::Unauthorized => (StatusCode::UNAUTHORIZED, "unauthorized"),
            Self::Guessing { .. } => (StatusCode::TOO_MANY_REQUESTS, "too_many_attempts"),
            Self::Forbidden => (StatusCode::FORBIDDEN, "forbidden"),
            Self::HostUnclear => (StatusCode::BAD_REQUEST, "host_unclear"),
            Self::HostNotAllowed => (StatusCode::FORBIDDEN, "host_not_allowed"),
            Self::PageNotAllowed => (StatusCode::FORBIDDEN, "origin_not_allowed"),
            Self::Disabled(mcp::Error::NoTemplate) => (StatusCode::FORBIDDEN, "stdio_not_in_templates"),
            Self::Disabled(_) => (StatusCode::FORBIDDEN, "stdio_disabled"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::ToolHeld { .. } => (StatusCode::FORBIDDEN, "tool_held"),
            Self::ToolChanged => (StatusCode::CONFLICT, "tool_changed"),
            Self::NameTaken => (StatusCode::CONFLICT, "name_taken"),
            Self::Sealed(_) => (StatusCode::CONFLICT, "config_sealed"),
            Self::RunUnknown { .. } => (StatusCode::CONFLICT, "run_unknown"),
            Self::BodyTooLarge { .. } => (StatusCode::PAYLOAD_TOO_LARGE, "body_too_large"),
            Self::BodyIncomplete => (StatusCode::BAD_REQUEST, "body_incomplete"),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::Invalid(_) => (StatusCode::UNPROCESSABLE_ENTITY, "invalid_request"),
            Self::Variables(mcp::Error::NoValue { .. }) => (StatusCode::UNPROCESSABLE_ENTITY, "variable_missing"),
            Self::Variables(_) => (StatusCode::UNPROCESSABLE_ENTITY, "variable_invalid"),
            // Letta's own status for a server that a refresh cannot reach (CONTRACT row 11).
            Self::Refresh { .. } => (StatusCode::NOT_FOUND, "mcp_server_unavailable"),
            Self::Connect(_) => (StatusCode::BAD_GATEWAY, "mcp_connection_error"),
            Self::Overload { source: mcp::Error::Store, .. } => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::Overload { .. } | Self::Full { .. } | Self::Crowded => {
                (StatusCode::SERVICE_UNAVAILABLE, "overloaded")
            }
            Self::Unavailable(_) | Self::NotSent => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
            Self::StorageFull(_) => (StatusCode::INSUFFICIENT_STORAGE, "storage_full"),
            Self::Internal(_) => (StatusCode::INTERNAL_SERVER_ERROR, "internal"),
        }
    }

    /// What its answer says under `code`.
    pub fn code(&self) -> &'static str {
        self.status().1
    }

    fn log(&self) {
        let (status, code) = self.status();
        match self {
            Self::Full { .. } | Self::Crowded | Self::NotSent => tracing::debug!(code, "no room for a request"),
            Self::Overload { .. } => tracing::debug!(cause = %causes(self), code, "no room for a run"),
            Self::RunUnknown { replied } => {
                tracing::warn!(replied, code, "a run is not made again: its outcome is not known")
            }
            // The server of a user is away; Portolan is well.
            Self::Connect(_) => tracing::warn!(cause = %causes(self), code, "no session for a run"),
            _ if status.is_server_error() => {
                tracing::error!(error = %self, cause = %causes(self), code, "request failed")
            }
            _ => {}
        }
    }

    /// What a result says of an error that cannot be an answer of its own any more, because the head is out.
    pub fn sentence(&self) -> String {
        self.log();
        match self {
            // Whoever asked before may have had it called.
            Self::RunUnknown { .. } => self.to_string(),
            Self::Connect(source) => format!("The tool was not called. {self} {source}"),
            _ => format!("The tool was not called. {self}"),
        }
    }

    /// The answer to request `request_id`.
    fn render(&self, request_id: &str) -> Response {
        self.log();
        let (status, code) = self.status();
        let mut body = json!({ "detail": self.to_string(), "code": code, "request_id": request_id });
        match self {
            Self::Invalid(issues) => body["errors"] = json!(issues),
            Self::Variables(_) => {
                let loc = vec![json!("header"), json!(mcp::Variables::HEADER)];
                body["errors"] = json!([Issue { loc, msg: self.to_string() }]);
            }
            Self::Refresh { source, .. } => {
                body["detail"] = json!({
                    "code": "MCPServerUnavailable", "message": self.to_string(), "error": source.to_string(),
                });
            }
            Self::Connect(source) => {
                body["detail"] = json!(source.to_string());
                body["error"] = json!({ "type": code, "message": self.to_string(), "detail": source.to_string() });
            }
            _ => {}
        }
        let mut response = (status, Json(body)).into_response();
        let headers = response.headers_mut();
        match self {
            Self::Unauthorized => {
                headers.insert(WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            Self::Guessing { retry_after } => {
                headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(*retry_after)));
                headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Self::ToolHeld { .. }
            | Self::ToolChanged
            | Self::NameTaken
            | Self::Sealed(_)
            | Self::Refresh { .. }
            | Self::Connect(_)
            | Self::RunUnknown { .. }
            | Self::Variables(_)
            | Self::StorageFull(_)
            | Self::Internal(_) => {
                headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
            }
            Self::Overload { retry_after, .. } => {
                headers.insert(RETRY_AFTER, HeaderValue::from(whole_seconds(*retry_after)));
            }
            Self::Full { .. } | Self::Crowded | Self::NotSent | Self::Unavailable(_) => {
                headers.insert(RETRY_AFTER, HeaderValue::from_static("1"));
            }
            _ => {}
        }
        if let Self::Full { repeatable: false } = self {
            headers.insert(X_SHOULD_RETRY, HeaderValue::from_static("false"));
        }
        response
    }

    /// SDKs are told to repeat what is answered so.
    pub fn asks_for_repetition(&self) -> bool {
        matches!(
            self,
            Self::Overload { .. }
                | Self::Full { repeatable: true }
                | Self::Crowded
                | Self::NotSent
                | Self::Unavailable(_)
        )
    }

    /// A bare response that carries the error; [`Error::finish`] turns it into the answer. Several requests may share one
    /// error.
    pub fn answer(self: Arc<Self>) -> Response {
        let mut response = self.status().0.into_response();
        response.extensions_mut().insert(self);
        response
    }

    /// Replaces a response that carries an error by the error's answer; others pass.
    pub fn finish(mut response: Response, request_id: &str) -> Response {
        let Some(error) = response.extensions_mut().remove::<Arc<Self>>() else { return response };
        let mut answer = error.render(request_id);
        if let Some(allow) = response.headers().get(ALLOW) {
            answer.headers_mut().insert(ALLOW, allow.clone());
        }
        answer
    }
}

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        Arc::new(self).answer()
    }
}

/// The chain of causes below an error, for the log.
fn causes(error: &dyn std::error::Error) -> String {
    let mut text = String::new();
    let mut next = error.source();
    while let Some(cause) = next {
        if !text.is_empty() {
            text.push_str(": ");
        }
        text.push_str(&cause.to_string());
        next = cause.source();
    }
    text
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    /// CONTRACT, "The rule": SDKs repeat 408, 409, 429 and everything from 500 on unless they are told not to. They may
    /// only where nothing was sent to a server, and are then told when. A change that the database did not answer may be done.
    #[test]
    fn no_error_makes_an_sdk_repeat_what_was_done() {
        let failure = || mcp::Error::Closed;
        let every = [
            Error::NoRoute,
            Error::MethodNotAllowed,
            Error::Unauthorized,
            Error::Guessing { retry_after: Duration::from_secs(3) },
            Error::Forbidden,
            Error::HostUnclear,
            Error::HostNotAllowed,
            Error::PageNotAllowed,
            Error::Disabled(mcp::Error::StdioOff),
            Error::NoServer,
            Error::NoTool,
            Error::NoServerNamed,
            Error::NoToolNamed,
            Error::ToolHeld { is_new: true },
            Error::ToolChanged,
            Error::NameTaken,
            Error::Sealed(Unreadable::NoKey),
            Error::BodyTooLarge { limit: 1 },
            Error::BodyIncomplete,
            Error::UnsupportedMediaType,
            Error::invalid(vec![json!("body")], "No."),
            Error::Refresh { server_name: "s".to_owned(), source: failure() },
            Error::Connect(failure()),
            Error::Variables(mcp::Error::NoValue { name: "A".to_owned() }),
            Error::Variables(mcp::Error::BadValue { place: "auth_token".to_owned() }),
            Error::Overload { source: mcp::Error::QueueFull, retry_after: Duration::from_millis(1) },
            Error::Full { repeatable: true },
            Error::Full { repeatable: false },
            Error::Crowded,
            Error::NotSent,
            Error::RunUnknown { replied: true },
            Error::Unavailable(store::Error::NameTaken),
            Error::StorageFull(store::Error::NameTaken),
            Error::Internal("reason".into()),
        ];
        for error in every {
            // Whoever adds an error decides here whether it may be repeated.
            let nothing_was_done = match error {
                Error::Overload { .. } | Error::Crowded | Error::NotSent | Error::Unavailable(_) => true,
                Error::Full { repeatable } => repeatable,
                Error::NoRoute | Error::MethodNotAllowed | Error::NoServer | Error::NoTool | Error::NameTaken => false,
                Error::NoServerNamed | Error::NoToolNamed => false,
                Error::BodyTooLarge { .. } | Error::BodyIncomplete | Error::UnsupportedMediaType => false,
                Error::ToolHeld { .. } | Error::ToolChanged | Error::RunUnknown { .. } => false,
                Error::HostUnclear | Error::HostNotAllowed | Error::PageNotAllowed => false,
                Error::Forbidden
                | Error::Disabled(_)
                | Error::Sealed(_)
                | Error::Invalid(_)
                | Error::Refresh { .. }
                | Error::Connect(_)
                | Error::StorageFull(_)
                | Error::Internal(_) => false,
                Error::Unauthorized | Error::Guessing { .. } | Error::Variables(_) => false,
            };
            let answer = error.render("id");
            let repeated = matches!(answer.status().as_u16(), 408 | 409 | 429 | 500..)
                && answer.headers().get(X_SHOULD_RETRY).is_none_or(|value| value != "false");
            assert_eq!(repeated, nothing_was_done, "{error:?}");
            assert_eq!(repeated, error.asks_for_repetition(), "{error:?}");
            if repeated {
                let seconds: u64 = answer.headers()[RETRY_AFTER].to_str().unwrap().parse().unwrap();
                assert!(seconds > 0, "{error:?}");
            }
        }
    }

    #[test]
    fn nobody_is_asked_to_sleep_for_minutes() {
        for (asked, told) in [(0, "1"), (29_001, "30"), (300_000, "30")] {
            let retry_after = Duration::from_millis(asked);
            let answer = Error::Overload { source: mcp::Error::QueueFull, retry_after }.render("id");
            assert_eq!(answer.headers()[RETRY_AFTER], told);
        }
    }
}
