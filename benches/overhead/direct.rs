//! The same calls without Portolan: on a kept rmcp session, and with nothing that is not needed at all.

use std::borrow::Cow;
use std::net::SocketAddr;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use rmcp::model::{
    ClientCapabilities, ClientJsonRpcMessage, Implementation, InitializeRequestParams, ProtocolVersion,
    ServerJsonRpcMessage,
};
use rmcp::service::{ClientLifecycleMode, RoleClient, RunningService, serve_client_with_lifecycle_and_ct};
use rmcp::transport::async_rw::AsyncRwTransport;
use rmcp::transport::streamable_http_client::{StreamableHttpClientTransport, StreamableHttpClientTransportConfig};
use rmcp::transport::{IntoTransport, Transport};
use sse_stream::{Sse, SseStream};
use tokio::process::Child;
use tokio_util::sync::CancellationToken;
use url::Url;

use super::call::{Caller, Connection, initialize};
use super::upstream::{Kind, Upstream};

/// A kept session; ends when it is dropped.
pub(crate) struct Session {
    running: RunningService<RoleClient, InitializeRequestParams>,
    _process: Option<Child>,
}

impl Session {
    pub(crate) fn peer(&self) -> &rmcp::Peer<RoleClient> {
        self.running.peer()
    }
}

pub(crate) async fn session(upstream: &Upstream) -> Session {
    // As Portolan's: connections are kept, small writes leave at once.
    let client = reqwest::Client::builder().no_proxy().tcp_nodelay(true).build().expect("an HTTP client");
    match upstream.kind {
        Kind::Stdio => {
            let mut process = upstream.command().spawn().expect("the fake can be run");
            let output = process.stdout.take().expect("a pipe was asked for");
            let input = process.stdin.take().expect("a pipe was asked for");
            Session { running: initialized(AsyncRwTransport::new_client(output, input)).await, _process: Some(process) }
        }
        Kind::Http => {
            let config = StreamableHttpClientTransportConfig::with_uri(upstream.url.as_str());
            let transport = StreamableHttpClientTransport::with_client(client, config);
            Session { running: initialized(transport).await, _process: None }
        }
        Kind::Sse => {
            let transport = SseTransport::open(client, &upstream.url).await;
            Session { running: initialized(transport).await, _process: None }
        }
    }
}

async fn initialized<E, A>(
    transport: impl IntoTransport<RoleClient, E, A>,
) -> RunningService<RoleClient, InitializeRequestParams>
where
    E: std::error::Error + Send + Sync + 'static,
{
    let info = InitializeRequestParams::new(ClientCapabilities::default(), Implementation::new("bench", "0"))
        .with_protocol_version(ProtocolVersion::LATEST_WITH_INITIALIZE);
    let end = CancellationToken::new();
    serve_client_with_lifecycle_and_ct(info, transport, ClientLifecycleMode::Initialize, end)
        .await
        .expect("the fake shakes hands")
}

/// HTTP+SSE, which rmcp does not have, with no more than the fake needs.
struct SseTransport {
    events: BoxStream<'static, Result<Sse, sse_stream::Error>>,
    client: reqwest::Client,
    endpoint: Url,
}

impl SseTransport {
    async fn open(client: reqwest::Client, url: &str) -> Self {
        let response = client.get(url).send().await.expect("the fake answers");
        let mut events = SseStream::from_bytes_stream(response.bytes_stream()).boxed();
        let first = events.next().await.expect("the stream is open").expect("the stream is well-formed");
        let endpoint = first.data.expect("the first event names the endpoint");
        let endpoint = Url::parse(url).and_then(|url| url.join(&endpoint)).expect("both are URLs");
        Self { events, client, endpoint }
    }
}

impl Transport<RoleClient> for SseTransport {
    type Error = reqwest::Error;

    fn name() -> Cow<'static, str> {
        "sse".into()
    }

    fn send(&mut self, message: ClientJsonRpcMessage) -> impl Future<Output = reqwest::Result<()>> + Send + 'static {
        let sending = self.client.post(self.endpoint.clone()).json(&message).send();
        async move { sending.await?.error_for_status().map(|_| ()) }
    }

    async fn receive(&mut self) -> Option<ServerJsonRpcMessage> {
        let event = self.events.next().await?.expect("the stream is well-formed");
        Some(serde_json::from_str(&event.data.expect("an event has data")).expect("the fake speaks JSON-RPC"))
    }

    async fn close(&mut self) -> reqwest::Result<()> {
        Ok(())
    }
}

/// The call as plain as it can be: a line through a pipe, a POST on a kept connection.
pub(crate) async fn floor(upstream: &Upstream) -> Caller {
    let address = || -> SocketAddr {
        let url = upstream.url.strip_prefix("http://").expect("the fake has no TLS");
        url.split('/').next().and_then(|address| address.parse().ok()).expect("an address and a path")
    };
    match upstream.kind {
        Kind::Stdio => Caller::pipe(upstream.command().spawn().expect("the fake can be run")),
        Kind::Http => {
            let mut connection = Connection::open(address()).await;
            connection.fields = "accept: application/json, text/event-stream\r\n".into();
            let answer = connection.exchange("POST", "/mcp", &initialize()).await;
            let session = answer.field("mcp-session-id").expect("the fake has sessions").to_owned();
            connection.fields += &format!("mcp-session-id: {session}\r\nmcp-protocol-version: 2025-11-25\r\n");
            Caller::http(connection)
        }
        Kind::Sse => {
            let mut events = Connection::open(address()).await;
            events.send("GET", "/sse", "").await;
            let path = format!("/{}", events.event().await);
            Caller::sse(Connection::open(address()).await, path, events)
        }
    }
}
