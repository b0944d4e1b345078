//! What the spans of a run say of its server: OpenTelemetry's semantic conventions for MCP (semantic-conventions-genai,
//! `gen-ai/mcp.md`), and what these have no name for below `portolan.`. Never what an error's text says: other people write
//! in it.

use std::borrow::Cow;

use http::{HeaderMap, HeaderName, HeaderValue};

use crate::model::{Connector, Server, ServerType, Tool};
use crate::telemetry::{Span, TRACEPARENT, TRACESTATE, TraceContext};

use super::Error;
use super::address::server_url;
use super::message::RpcError;
use super::remote::HttpError;
use super::session::{CallError, Session};

/// A session that is being opened for a run.
pub fn opening(run: &Span, server: &Server) -> Span {
    let mut span = run.child(|| "open session".to_owned());
    describe(&mut span, server);
    span
}

/// What came of that, and whether the session is a new one: one that was there, or that others opened, is no part of
/// this run.
pub fn opened<T>(mut span: Span, outcome: &Result<(T, bool), Error>) {
    match outcome {
        Ok((_, true)) => span.end(),
        Ok((_, false)) => span.forget(),
        Err(error) if error.is_ours() && !matches!(error, Error::NotReady) => span.forget(),
        Err(error) => {
            span.fail(&kind(error));
            span.end();
        }
    }
}

/// The call of a tool on a session that is new or was there.
pub fn call(run: &Span, server: &Server, tool: &Tool, session: &Session, is_new: bool) -> Span {
    let mut span = run.child(|| format!("tools/call {}", tool.name));
    span.set("mcp.method.name", "tools/call");
    span.set("mcp.protocol.version", session.version());
    span.set("gen_ai.operation.name", "execute_tool");
    span.set("gen_ai.tool.name", &*tool.name);
    span.set("portolan.session.reused", !is_new);
    describe(&mut span, server);
    span
}

fn describe(span: &mut Span, server: &Server) {
    if !span.is_on() {
        return;
    }
    span.set("portolan.transport", server.server_type.as_str());
    span.set("network.transport", if server.server_type == ServerType::Stdio { "pipe" } else { "tcp" });
    if let Ok(Connector::Sse(remote) | Connector::StreamableHttp(remote)) = server.config.0.as_ref()
        && let Ok(url) = server_url(&remote.server_url)
    {
        span.set("network.protocol.name", "http");
        span.set("server.address", url.host_str().unwrap_or_default().trim_matches(['[', ']']));
        span.set("server.port", url.port_or_known_default().unwrap_or_default());
    }
}

/// A call that has no result.
pub fn failed(mut span: Span, error: &CallError) {
    if let CallError::Rpc(RpcError { code, .. }) = error {
        span.set("rpc.response.status_code", &*code.to_string());
    }
    span.fail(&failure(error));
    span.end();
}

/// Why a call has no result, in a word (`error.type`).
pub fn failure(error: &CallError) -> Cow<'static, str> {
    match error {
        CallError::Rpc(RpcError { code, .. }) => code.to_string().into(),
        CallError::TimedOut => "timeout".into(),
        CallError::Untaken(_) => "answer_too_large".into(),
        CallError::NotSent(error) | CallError::Refused(error) | CallError::Lost(error) => kind(error),
    }
}

fn kind(error: &Error) -> Cow<'static, str> {
    match error {
        Error::Http(HttpError::Status { status, .. }) => status.as_u16().to_string().into(),
        Error::Http(HttpError::SignIn(_) | HttpError::NoToken(_)) => "sign_in".into(),
        Error::Http(HttpError::Forbidden(_)) | Error::Url => "address".into(),
        Error::Http(HttpError::Connect(_)) => "connect".into(),
        Error::Http(HttpError::TimedOut) | Error::HandshakeTimeout { .. } | Error::NotReady => "timeout".into(),
        Error::Http(HttpError::Oversize(_)) | Error::Oversize(_) => "answer_too_large".into(),
        Error::HandshakeRefused { .. } | Error::Handshake | Error::Revision | Error::Endpoint => "handshake".into(),
        Error::Spawn(_) | Error::Unconfined | Error::Exited { .. } => "command".into(),
        Error::Http(_) | Error::Closed | Error::SessionExpired | Error::NotReading => "connection".into(),
        _ => "not_sent".into(),
    }
}

/// The header fields that pass a trace on beside those that are configured. What is configured stands, and nothing of
/// another trace beside it.
pub fn fields(trace: Option<&TraceContext>, configured: &HeaderMap) -> impl Iterator<Item = (HeaderName, HeaderValue)> {
    let is_configured = [TRACEPARENT, TRACESTATE].iter().any(|name| configured.contains_key(name));
    trace.filter(|_| !is_configured).into_iter().flat_map(TraceContext::fields)
}
