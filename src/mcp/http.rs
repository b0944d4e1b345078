//! Streamable HTTP: our own `StreamableHttpClient` under rmcp's session loop (MCP 2025-03-26 to 2026-07-28).
//!
//! What it adds to the one rmcp ships: a deadline on every wait, one shared pooled client, typed reasons without URLs,
//! raw results through the [`Ledger`], no standing GET stream, and a lost session recognised whatever its status.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::BytesMut;
use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::{ACCEPT, CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode};
use rmcp::model::{
    ClientJsonRpcMessage, ClientNotification, ClientRequest, ErrorData, GetExtensions, ServerJsonRpcMessage,
};
use rmcp::transport::streamable_http_client::{
    AuthRequiredError, HttpStatusError, SseError, StreamableHttpClient, StreamableHttpClientTransport,
    StreamableHttpClientTransportConfig, StreamableHttpError, StreamableHttpPostResponse,
};
use sse_stream::Sse;
use tokio::time::{Instant, sleep, sleep_until, timeout, timeout_at};

use crate::config::Upstream;
use crate::model::Remote;

use super::events::events;
use super::ledger::{Ledger, request_number};
use super::{AgentId, Error};

pub const EVENT_STREAM: &str = "text/event-stream";
const JSON: &str = "application/json";
const BOTH: HeaderValue = HeaderValue::from_static("application/json, text/event-stream");
const SESSION: HeaderName = HeaderName::from_static("mcp-session-id");
const LAST_EVENT: HeaderName = HeaderName::from_static("last-event-id");
pub const X_AGENT_ID: HeaderName = HeaderName::from_static("x-agent-id");

/// The most of an error body that is read, in bytes.
const MAX_ERROR_BODY: usize = 64 * 1024;
/// How long before a broken answer stream is resumed, however soon the server invites it.
const RESUME_DELAY: Duration = Duration::from_millis(500);
/// How long the goodbye to a session may take.
const DELETE_TIMEOUT: Duration = Duration::from_secs(5);
/// What a call may take beyond its own deadline, which ends it first.
const MARGIN: Duration = Duration::from_secs(5);
/// Requests on one session at a time; more wait inside rmcp.
const CONCURRENT_REQUESTS: usize = 64;

/// Why an HTTP exchange did not come about; texts name no URL.
#[derive(Clone, Debug, thiserror::Error)]
pub enum HttpError {
    /// Nothing was sent.
    #[error("{0}")]
    Connect(String),
    #[error("the server did not answer in time")]
    TimedOut,
    #[error("the connection broke: {0}")]
    Broken(String),
    #[error("the answer is larger than {0} bytes")]
    TooLarge(usize),
    #[error("it asks for a sign-in (HTTP 401); check auth_token and custom_headers")]
    SignIn,
    #[error("the server answered HTTP {0}")]
    Status(StatusCode),
    #[error("the server answered with a body that is neither JSON nor an event stream")]
    ContentType,
}

impl From<reqwest::Error> for HttpError {
    fn from(error: reqwest::Error) -> Self {
        let reason = innermost(&error);
        match error {
            error if error.is_connect() && error.is_timeout() => Self::Connect("the connection timed out".to_owned()),
            error if error.is_connect() || error.is_builder() => Self::Connect(reason),
            error if error.is_timeout() => Self::TimedOut,
            _ => Self::Broken(reason),
        }
    }
}

/// The last cause of an error: the operating system's or TLS's words, without the URL that the outer ones carry.
fn innermost(error: &reqwest::Error) -> String {
    let mut cause: &dyn std::error::Error = error;
    while let Some(next) = cause.source() {
        cause = next;
    }
    if std::ptr::addr_eq(cause, error) { "the request could not be made".to_owned() } else { cause.to_string() }
}

/// The header fields that a server's configuration asks for (CONTRACT row 7): `auth_header` and `auth_token` as they
/// are given, a token alone as `Authorization` with `Bearer ` added if it is absent, and the custom headers.
///
/// # Errors
/// [`Error::Header`] when a field is no legal HTTP; such a configuration is refused when it is written.
pub fn header_fields(remote: &Remote) -> Result<HeaderMap, Error> {
    let mut fields = HeaderMap::new();
    let mut add = |name: &str, value: &str| -> Result<(), Error> {
        let name = HeaderName::from_bytes(name.as_bytes()).map_err(|_| Error::Header)?;
        let mut value = HeaderValue::from_str(value).map_err(|_| Error::Header)?;
        value.set_sensitive(true);
        fields.insert(name, value);
        Ok(())
    };
    for (name, value) in remote.custom_headers.iter().flatten() {
        add(name, value.expose())?;
    }
    if let Some(token) = &remote.auth_token {
        let token = token.expose();
        match &remote.auth_header {
            Some(name) => add(name, token)?,
            None if starts_with_bearer(token) => add("authorization", token)?,
            None => add("authorization", &format!("Bearer {token}"))?,
        }
    }
    Ok(fields)
}

fn starts_with_bearer(token: &str) -> bool {
    token.get(..7).is_some_and(|scheme| scheme.eq_ignore_ascii_case("bearer "))
}

/// Opens the transport for one server; nothing is sent before the handshake.
pub fn transport(
    remote: &Remote,
    client: reqwest::Client,
    settings: &Upstream,
    ledger: Ledger,
) -> Result<StreamableHttpClientTransport<HttpClient>, Error> {
    let client = HttpClient {
        client,
        fields: Arc::new(header_fields(remote)?),
        ledger,
        handshake_timeout: settings.handshake_timeout,
        request_timeout: settings.run_timeout + MARGIN,
        max_body: settings.max_message_bytes,
    };
    let config = StreamableHttpClientTransportConfig::with_uri(remote.server_url.as_str())
        .max_concurrent_requests(CONCURRENT_REQUESTS);
    Ok(StreamableHttpClientTransport::with_client(client, config))
}

/// One server's side of the shared client.
#[derive(Clone)]
pub struct HttpClient {
    client: reqwest::Client,
    fields: Arc<HeaderMap>,
    ledger: Ledger,
    handshake_timeout: Duration,
    request_timeout: Duration,
    max_body: usize,
}

type Answer = Result<StreamableHttpPostResponse, StreamableHttpError<HttpError>>;

impl HttpClient {
    fn deadline(&self, message: &ClientJsonRpcMessage) -> Instant {
        let time = match message {
            ClientJsonRpcMessage::Request(request) => match request.request {
                ClientRequest::InitializeRequest(_) | ClientRequest::DiscoverRequest(_) => self.handshake_timeout,
                _ => self.request_timeout,
            },
            ClientJsonRpcMessage::Notification(notification) => match notification.notification {
                ClientNotification::InitializedNotification(_) => self.handshake_timeout,
                _ => self.request_timeout,
            },
            _ => self.request_timeout,
        };
        Instant::now() + time
    }

    /// A request with the server's own header fields, and those of the protocol and session.
    fn request(
        &self,
        method: Method,
        uri: &str,
        session_id: Option<&str>,
        protocol: HashMap<HeaderName, HeaderValue>,
    ) -> reqwest::RequestBuilder {
        let mut request = self.client.request(method, uri).headers((*self.fields).clone());
        for (name, value) in protocol {
            request = request.header(name, value);
        }
        match session_id {
            Some(session_id) => request.header(SESSION, session_id),
            None => request,
        }
    }

    /// The events of an answer until `deadline`, with the results that the ledger keeps taken out.
    fn stream(&self, response: reqwest::Response, deadline: Instant) -> BoxStream<'static, Result<Sse, SseError>> {
        let ledger = self.ledger.clone();
        events(response.bytes_stream(), self.max_body)
            .take_until(sleep_until(deadline))
            .map(move |event| event.map(|event| Sse { data: event.data.map(|data| ledger.thin(data)), ..event }))
            .boxed()
    }

    /// Reads at most `max` bytes of a body.
    async fn body(response: reqwest::Response, max: usize) -> Result<BytesMut, HttpError> {
        if response.content_length().is_some_and(|length| length > max as u64) {
            return Err(HttpError::TooLarge(max));
        }
        let mut stream = response.bytes_stream();
        let mut body = BytesMut::new();
        while let Some(chunk) = stream.next().await {
            body.extend_from_slice(&chunk?);
            if body.len() > max {
                return Err(HttpError::TooLarge(max));
            }
        }
        Ok(body)
    }

    async fn post(
        &self,
        uri: &str,
        message: &ClientJsonRpcMessage,
        session_id: Option<&str>,
        protocol: HashMap<HeaderName, HeaderValue>,
        deadline: Instant,
    ) -> Answer {
        let mut request = self.request(Method::POST, uri, session_id, protocol).header(ACCEPT, BOTH);
        if let Some(agent) = agent_id(message) {
            request = request.header(X_AGENT_ID, agent);
        }
        let number = request_number(message);
        self.ledger.open(message);
        self.ledger.mark_sent(number, true);
        let response = match request.json(message).send().await {
            Ok(response) => response,
            Err(error) => {
                let error = HttpError::from(error);
                self.ledger.mark_sent(number, !matches!(error, HttpError::Connect(_)));
                return Err(StreamableHttpError::Client(error));
            }
        };
        let status = response.status();
        if !status.is_success() {
            return self.refused(message, session_id.is_some(), response).await;
        }
        let awaited = matches!(message, ClientJsonRpcMessage::Request(_));
        if !awaited || matches!(status, StatusCode::ACCEPTED | StatusCode::NO_CONTENT) {
            // 202 to a request: rmcp would wait for an answer that has no stream to come on.
            return if awaited {
                Err(StreamableHttpError::UnexpectedEndOfStream)
            } else {
                Ok(StreamableHttpPostResponse::Accepted)
            };
        }
        let new_session = text_header(&response, &SESSION);
        if is_media_type(&response, EVENT_STREAM) {
            let stream = self.stream(response, deadline);
            return if is_list(message) {
                answer(stream).await.map(|answer| StreamableHttpPostResponse::Json(answer, new_session))
            } else {
                Ok(StreamableHttpPostResponse::Sse(stream, new_session))
            };
        }
        if !is_media_type(&response, JSON) {
            return Err(StreamableHttpError::Client(HttpError::ContentType));
        }
        let body = Self::body(response, self.max_body).await.map_err(StreamableHttpError::Client)?;
        let mut messages = self.ledger.read(&body);
        match (messages.pop(), messages.is_empty()) {
            (Some(message), true) => Ok(StreamableHttpPostResponse::Json(message, new_session)),
            (Some(last), false) => {
                messages.push(last);
                Ok(StreamableHttpPostResponse::Sse(as_events(messages), new_session))
            }
            (None, _) => Err(StreamableHttpError::UnexpectedServerResponse("not a JSON-RPC message".into())),
        }
    }

    /// What a status other than 2xx means.
    async fn refused(&self, message: &ClientJsonRpcMessage, in_session: bool, response: reqwest::Response) -> Answer {
        let status = response.status();
        if status == StatusCode::UNAUTHORIZED {
            let challenge = text_header(&response, &WWW_AUTHENTICATE).unwrap_or_default();
            return Err(StreamableHttpError::AuthRequired(AuthRequiredError::new(challenge)));
        }
        if status == StatusCode::NOT_FOUND && in_session {
            // Not taken; rmcp sends it again on a new session, if it gets one.
            self.ledger.mark_sent(request_number(message), false);
            return Err(StreamableHttpError::SessionExpired);
        }
        let retry_after = text_header(&response, &RETRY_AFTER);
        let is_json = is_media_type(&response, JSON);
        let error = match Self::body(response, MAX_ERROR_BODY).await {
            Ok(body) if is_json && status != StatusCode::FORBIDDEN => json_rpc_error(&body),
            _ => None,
        };
        if let ClientJsonRpcMessage::Request(request) = message {
            // A server of an older revision refuses `server/discover` with any 4xx (MCP 2026-07-28, versioning); its
            // error often carries no id, and rmcp needs one to fall back to `initialize`.
            let probe = matches!(request.request, ClientRequest::DiscoverRequest(_)) && status.is_client_error();
            if probe && status != StatusCode::FORBIDDEN {
                let error = error.unwrap_or_else(|| ErrorData::invalid_request(format!("HTTP {status}"), None));
                let answer = ServerJsonRpcMessage::error(error, Some(request.id.clone()));
                return Ok(StreamableHttpPostResponse::Json(answer, None));
            }
            if let Some(error) = error {
                // Several servers answer 400 where the specification has 404 for a session they do not know.
                if in_session && status == StatusCode::BAD_REQUEST && error.message.to_lowercase().contains("session") {
                    self.ledger.mark_sent(request_number(message), false);
                    return Err(StreamableHttpError::SessionExpired);
                }
                let answer = ServerJsonRpcMessage::error(error, Some(request.id.clone()));
                return Ok(StreamableHttpPostResponse::Json(answer, None));
            }
        }
        if status == StatusCode::TOO_MANY_REQUESTS || status.is_server_error() {
            return Err(StreamableHttpError::HttpStatus(HttpStatusError::new(status.as_u16(), retry_after)));
        }
        Err(StreamableHttpError::Client(HttpError::Status(status)))
    }
}

impl StreamableHttpClient for HttpClient {
    type Error = HttpError;

    async fn post_message(
        &self,
        uri: Arc<str>,
        message: ClientJsonRpcMessage,
        session_id: Option<Arc<str>>,
        _auth_header: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Answer {
        // rmcp does not stop its worker while a POST of the handshake is under way: the deadline must be in here.
        let deadline = self.deadline(&message);
        let post = self.post(&uri, &message, session_id.as_deref(), custom_headers, deadline);
        timeout_at(deadline, post).await.unwrap_or(Err(StreamableHttpError::Client(HttpError::TimedOut)))
    }

    async fn delete_session(
        &self,
        uri: Arc<str>,
        session_id: Arc<str>,
        _auth_header: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<(), StreamableHttpError<HttpError>> {
        let request = self.request(Method::DELETE, &uri, Some(&session_id), custom_headers);
        // A goodbye: a server that does not take it forgets the session by itself.
        let _ = timeout(DELETE_TIMEOUT, request.send()).await;
        Ok(())
    }

    /// Resumes a broken answer stream; the standing stream for notifications is not opened, nothing listens to it.
    async fn get_stream(
        &self,
        uri: Arc<str>,
        session_id: Option<Arc<str>>,
        last_event_id: Option<String>,
        _auth_header: Option<String>,
        custom_headers: HashMap<HeaderName, HeaderValue>,
    ) -> Result<BoxStream<'static, Result<Sse, SseError>>, StreamableHttpError<HttpError>> {
        let Some(last_event_id) = last_event_id else { return Err(StreamableHttpError::ServerDoesNotSupportSse) };
        sleep(RESUME_DELAY).await;
        let request = self
            .request(Method::GET, &uri, session_id.as_deref(), custom_headers)
            .header(ACCEPT, EVENT_STREAM)
            .header(LAST_EVENT, last_event_id);
        let response = timeout(self.handshake_timeout, request.send())
            .await
            .map_err(|_| StreamableHttpError::Client(HttpError::TimedOut))?
            .map_err(|error| StreamableHttpError::Client(error.into()))?;
        if !response.status().is_success() || !is_media_type(&response, EVENT_STREAM) {
            return Err(StreamableHttpError::ServerDoesNotSupportSse);
        }
        Ok(self.stream(response, Instant::now() + self.request_timeout))
    }
}

fn agent_id(message: &ClientJsonRpcMessage) -> Option<HeaderValue> {
    let ClientJsonRpcMessage::Request(request) = message else { return None };
    request.request.extensions().get::<AgentId>().map(|agent| agent.0.clone())
}

fn is_list(message: &ClientJsonRpcMessage) -> bool {
    matches!(message, ClientJsonRpcMessage::Request(request) if matches!(request.request, ClientRequest::ListToolsRequest(_)))
}

/// The answer that a stream of events ends in. rmcp learns from a list which arguments a server wants as header fields
/// (`x-mcp-header`), but not always: from a stream that ends with its answer it may take the answer and learn nothing.
async fn answer(
    mut stream: BoxStream<'static, Result<Sse, SseError>>,
) -> Result<ServerJsonRpcMessage, StreamableHttpError<HttpError>> {
    while let Some(event) = stream.next().await {
        let data = event?.data.unwrap_or_default();
        if let Ok(message @ (ServerJsonRpcMessage::Response(_) | ServerJsonRpcMessage::Error(_))) =
            serde_json::from_str(&data)
        {
            return Ok(message);
        }
    }
    Err(StreamableHttpError::UnexpectedEndOfStream)
}

fn as_events(messages: Vec<ServerJsonRpcMessage>) -> BoxStream<'static, Result<Sse, SseError>> {
    let event = |message: ServerJsonRpcMessage| {
        let data = serde_json::to_string(&message).expect("a JSON-RPC message is JSON");
        Ok(Sse { event: None, data: Some(data), id: None, retry: None })
    };
    futures_util::stream::iter(messages).map(event).boxed()
}

fn json_rpc_error(body: &[u8]) -> Option<ErrorData> {
    match serde_json::from_slice(body) {
        Ok(ServerJsonRpcMessage::Error(error)) => Some(error.error),
        _ => None,
    }
}

/// Whether an answer is of this media type, whatever its parameters and case (RFC 9110 §8.3.1).
pub fn is_media_type(response: &reqwest::Response, wanted: &str) -> bool {
    let kind = text_header(response, &CONTENT_TYPE).unwrap_or_default();
    kind.split(';').next().unwrap_or_default().trim().eq_ignore_ascii_case(wanted)
}

fn text_header(response: &reqwest::Response, name: &HeaderName) -> Option<String> {
    response.headers().get(name)?.to_str().ok().map(str::to_owned)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    fn sent(auth_header: Option<&str>, auth_token: Option<&str>, custom: &[(&str, &str)]) -> Vec<(String, String)> {
        let remote = Remote {
            server_url: "http://127.0.0.1/mcp".to_owned(),
            auth_header: auth_header.map(str::to_owned),
            auth_token: auth_token.map(|token| token.to_owned().into()),
            custom_headers: Some(custom.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned().into())).collect()),
        };
        let fields = header_fields(&remote).unwrap();
        fields.iter().map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect()
    }

    fn pair(name: &str, value: &str) -> (String, String) {
        (name.to_owned(), value.to_owned())
    }

    #[test]
    fn tokens_and_headers_are_sent_as_given() {
        assert_eq!(sent(Some("X-API-Key"), Some("abc"), &[]), [pair("x-api-key", "abc")]);
        assert_eq!(sent(Some("Authorization"), Some("Bearer t"), &[]), [pair("authorization", "Bearer t")]);
        assert_eq!(sent(None, Some("t"), &[]), [pair("authorization", "Bearer t")]);
        assert_eq!(sent(None, Some("bearer t"), &[]), [pair("authorization", "bearer t")]);
        let both = sent(None, Some("t"), &[("X-A", "1")]);
        assert!(both.contains(&pair("authorization", "Bearer t")) && both.contains(&pair("x-a", "1")), "{both:?}");
        assert_eq!(sent(Some("X-API-Key"), None, &[]), []);
    }
}
