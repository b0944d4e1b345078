//! The HTTP+SSE transport of MCP revision 2024-11-05: one GET stream brings everything, POSTs carry what we say.
//!
//! The end of the stream is the end of the session: a new stream would be a new session that knows of no handshake.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::header::ACCEPT;
use http::{HeaderMap, StatusCode};
use rmcp::model::{ClientJsonRpcMessage, GetExtensions, ServerJsonRpcMessage};
use sse_stream::Sse;
use tokio::time::timeout;
use url::Url;

use crate::config::Upstream;
use crate::model::Remote;

use super::events::events;
use super::http::{EVENT_STREAM, HttpError, X_AGENT_ID, header_fields, is_media_type};
use super::ledger::{Ledger, request_number};
use super::{AgentId, Error};

/// How long a server may take to accept one message; its answer comes on the stream.
const POST_TIMEOUT: Duration = Duration::from_secs(30);

pub struct SseTransport {
    /// `None` once closed.
    stream: Option<BoxStream<'static, Result<Sse, sse_stream::Error>>>,
    read: VecDeque<ServerJsonRpcMessage>,
    client: reqwest::Client,
    fields: Arc<HeaderMap>,
    endpoint: Url,
    ledger: Ledger,
}

impl SseTransport {
    /// Opens the stream and waits for the `endpoint` event. The caller sets the deadline.
    ///
    /// # Errors
    /// [`Error::Http`] when the stream cannot be had, [`Error::Endpoint`] when its first event names no address of the
    /// same origin.
    pub async fn open(
        remote: &Remote,
        client: reqwest::Client,
        settings: &Upstream,
        ledger: Ledger,
    ) -> Result<Self, Error> {
        let base = Url::parse(&remote.server_url).map_err(|_| Error::Endpoint)?;
        let fields = Arc::new(header_fields(remote)?);
        let response = client
            .get(base.clone())
            .headers((*fields).clone())
            .header(ACCEPT, EVENT_STREAM)
            .send()
            .await
            .map_err(HttpError::from)?;
        match response.status() {
            StatusCode::OK => {}
            StatusCode::UNAUTHORIZED => return Err(HttpError::SignIn.into()),
            status => return Err(HttpError::Status(status).into()),
        }
        if !is_media_type(&response, EVENT_STREAM) {
            return Err(HttpError::ContentType.into());
        }
        let mut stream = events(response.bytes_stream(), settings.max_message_bytes);
        let endpoint = loop {
            let event = stream.next().await.ok_or(Error::Closed)?.map_err(|_| Error::Closed)?;
            if event.event.as_deref() == Some("endpoint") {
                break same_origin(&base, event.data.as_deref().unwrap_or_default())?;
            }
        };
        Ok(Self { stream: Some(stream), read: VecDeque::new(), client, fields, endpoint, ledger })
    }

    pub fn send(
        &mut self,
        message: &ClientJsonRpcMessage,
    ) -> impl Future<Output = Result<(), HttpError>> + Send + 'static + use<> {
        self.ledger.open(message);
        let number = request_number(message);
        let ledger = self.ledger.clone();
        let mut request = self.client.post(self.endpoint.clone()).headers((*self.fields).clone()).json(message);
        if let ClientJsonRpcMessage::Request(sent) = message
            && let Some(agent) = sent.request.extensions().get::<AgentId>()
        {
            request = request.header(X_AGENT_ID, agent.0.clone());
        }
        async move {
            ledger.mark_sent(number, true);
            let sent = timeout(POST_TIMEOUT, request.send()).await.map_err(|_| HttpError::TimedOut)?;
            let response = sent.map_err(|error| {
                let error = HttpError::from(error);
                ledger.mark_sent(number, !matches!(error, HttpError::Connect(_)));
                error
            })?;
            let status = response.status();
            match status {
                StatusCode::UNAUTHORIZED => Err(HttpError::SignIn),
                status if status.is_success() => Ok(()),
                status => Err(HttpError::Status(status)),
            }
        }
    }

    /// The next message; `None` at the end of the stream. Cancel-safe.
    pub async fn receive(&mut self) -> Option<ServerJsonRpcMessage> {
        while self.read.is_empty() {
            let event = match self.stream.as_mut()?.next().await? {
                Ok(event) => event,
                Err(_) => {
                    self.stream = None;
                    return None;
                }
            };
            let is_message = event.event.as_deref().is_none_or(|name| name == "message");
            if let (true, Some(data)) = (is_message, event.data) {
                self.read.extend(self.ledger.read(data.as_bytes()));
            }
        }
        self.read.pop_front()
    }

    pub fn close(&mut self) {
        self.stream = None;
    }
}

/// The address an `endpoint` event names: relative ones are resolved against the stream's own URL, and another origin
/// is refused, because the server's headers and token go there.
fn same_origin(base: &Url, endpoint: &str) -> Result<Url, Error> {
    let url = base.join(endpoint.trim()).map_err(|_| Error::Endpoint)?;
    if endpoint.trim().is_empty() || url.origin() != base.origin() {
        return Err(Error::Endpoint);
    }
    Ok(url)
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn endpoints_are_resolved_against_the_base_and_stay_on_its_origin() {
        let base = Url::parse("http://127.0.0.1:9/a/sse?x=1").unwrap();
        let joined = |endpoint| same_origin(&base, endpoint).map(String::from).ok();
        assert_eq!(joined("messages?s=1").unwrap(), "http://127.0.0.1:9/a/messages?s=1");
        assert_eq!(joined("/messages?s=1").unwrap(), "http://127.0.0.1:9/messages?s=1");
        assert_eq!(joined("http://127.0.0.1:9/b").unwrap(), "http://127.0.0.1:9/b");
        for foreign in ["http://127.0.0.1:8/b", "https://127.0.0.1:9/b", "//example.com/b", "file:///etc/passwd", ""] {
            assert_eq!(joined(foreign), None, "{foreign}");
        }
    }
}
