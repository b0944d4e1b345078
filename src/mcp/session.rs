//! One open connection to one server: handshake, list, call.
//!
//! A session ends when its last holder drops it, when its child or stream ends, or when the server's answer says so;
//! [`Session::is_closed`] tells. One task per session owns what rmcp runs and closes it within a bound.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use rmcp::model::{
    CallToolRequest, CallToolRequestParams, ClientCapabilities, ClientJsonRpcMessage, ClientRequest, Implementation,
    InitializeRequestParams, JsonObject, ListToolsRequest, PaginatedRequestParams, ProtocolVersion,
    ServerJsonRpcMessage,
};
use rmcp::service::{
    ClientInitializeError, ClientLifecycleMode, Peer, PeerRequestOptions, RequestHandle, RoleClient, ServiceError,
    serve_client_with_lifecycle_and_ct,
};
use rmcp::transport::streamable_http_client::{StreamableHttpClientTransport, StreamableHttpError};
use rmcp::transport::{DynamicTransportError, Transport};
use serde::Deserialize;
use serde_json::value::RawValue;
use tokio::sync::OnceCell;
use tokio::time::{Instant, timeout, timeout_at};
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::config::Upstream;
use crate::model::{Connector, Era};

use super::http::{self, HttpClient, HttpError};
use super::ledger::Ledger;
use super::listing::MAX_TOOLS;
use super::sse::SseTransport;
use super::stdio::{self, Gone, Process, StdioTransport};
use super::{AgentId, Error};

/// How long rmcp may take to close a session before it is abandoned to the end of its child or sockets.
const CLOSE_TIMEOUT: Duration = Duration::from_secs(6);
/// How long the rest of a dead child's output may take to be read.
const REST_OF_OUTPUT: Duration = Duration::from_millis(500);
/// How long a notice of cancellation may take.
const CANCEL_TIMEOUT: Duration = Duration::from_secs(2);
/// JSON-RPC 2.0, error codes.
const METHOD_NOT_FOUND: i32 = -32601;
/// What one list may have of pages, tools and bytes before it is taken to be endless.
const MAX_PAGES: usize = 1_000;
const MAX_LISTED: usize = 2 * MAX_TOOLS;
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;

/// What opening a session needs besides the server.
pub struct Context {
    pub settings: Upstream,
    pub client: reqwest::Client,
    pub tracker: TaskTracker,
    /// Portolan stops: every session ends, also one that is being opened or is in use.
    pub stop: CancellationToken,
}

pub struct Session {
    peer: Peer<RoleClient>,
    ledger: Ledger,
    tracker: TaskTracker,
    era: Era,
    closed: CancellationToken,
    retired: AtomicBool,
    listed: OnceCell<()>,
    _end: DropGuard,
}

/// How a call ended that has no result.
#[derive(Debug)]
pub enum CallError {
    /// Nothing of it left Portolan: it did not run and may be sent again.
    NotSent(Error),
    /// The server answered with a JSON-RPC error.
    Rpc {
        code: i32,
        message: String,
    },
    /// The server's HTTP side turned the call away before any tool saw it.
    Refused(Error),
    TimedOut,
    /// The session was lost, or the answer cannot be had; the tool may have run.
    Lost(Error),
}

impl Session {
    /// Connects and shakes hands within the handshake deadline. Without a known era it is found: modern first (MCP
    /// 2026-07-28, versioning), then, for a server that ends the connection over it, `initialize` on a new one.
    pub async fn open(connector: &Connector, known: Option<Era>, context: &Context) -> Result<Self, Error> {
        let time = match connector {
            Connector::Stdio(_) => context.settings.start_timeout,
            Connector::Sse(_) | Connector::StreamableHttp(_) => context.settings.handshake_timeout,
        };
        let deadline = Instant::now() + time;
        let (first, second) = match known {
            Some(era) => (Attempt::Only(era), Attempt::Find),
            None => (Attempt::Find, Attempt::Only(Era::Initialize)),
        };
        let opened = match Self::attempt(connector, first, context, deadline).await {
            Err(error) if error.is_about_the_handshake() && !context.stop.is_cancelled() => {
                let again = Self::attempt(connector, second, context, deadline).await;
                // The first error says more, unless the second attempt got further.
                again.map_err(|later| if later.is_about_the_handshake() { error } else { later })
            }
            result => result,
        };
        // What a stop cut off says nothing about the server.
        opened.map_err(|error| if context.stop.is_cancelled() { Error::Stopping } else { error })
    }

    async fn attempt(
        connector: &Connector,
        attempt: Attempt,
        context: &Context,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let ledger = Ledger::default();
        let settings = &context.settings;
        let mut process = None;
        let transport = match connector {
            Connector::Stdio(config) => {
                let (transport, child) = stdio::spawn(
                    config,
                    settings.legacy_arg_split,
                    settings.max_message_bytes,
                    ledger.clone(),
                    &context.tracker,
                    &context.stop,
                )?;
                process = Some(child);
                AnyTransport::Stdio(transport)
            }
            Connector::Sse(remote) => {
                let opening = SseTransport::open(remote, context.client.clone(), settings, ledger.clone());
                let opened = context.stop.run_until_cancelled(timeout_at(deadline, opening)).await;
                AnyTransport::Sse(opened.ok_or(Error::Stopping)?.map_err(|_| Error::HandshakeTimeout)??)
            }
            Connector::StreamableHttp(remote) => {
                AnyTransport::Http(http::transport(remote, context.client.clone(), settings, ledger.clone())?)
            }
        };
        let transport = Bounded { transport, unanswered: Arc::default() };
        let end = context.stop.child_token();
        let serving = serve_client_with_lifecycle_and_ct(who_we_are(), transport, attempt.mode(), end.clone());
        let running = match timeout_at(deadline, serving).await {
            Ok(Ok(running)) => running,
            Ok(Err(error)) => return Err(explain(error, process).await),
            Err(_) => {
                end.cancel();
                return Err(Error::HandshakeTimeout);
            }
        };
        let era = match running.peer().peer_info() {
            Some(info) if !info.protocol_version.has_initialize() => Era::Discover,
            _ => Era::Initialize,
        };
        let peer = running.peer().clone();
        let closed = CancellationToken::new();
        context.tracker.spawn(supervise(running, process, end.clone(), closed.clone()));
        Ok(Self {
            peer,
            ledger,
            tracker: context.tracker.clone(),
            era,
            closed,
            retired: AtomicBool::new(false),
            listed: OnceCell::new(),
            _end: end.drop_guard(),
        })
    }

    /// Which handshake worked.
    pub fn era(&self) -> Era {
        self.era
    }

    /// No more calls can be made on this session.
    pub fn is_closed(&self) -> bool {
        self.retired.load(Ordering::Relaxed) || self.closed.is_cancelled() || self.peer.is_transport_closed()
    }

    /// Takes no more calls; those that are under way finish.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// All tools, page after page, each definition as the server wrote it. The caller sets the deadline.
    ///
    /// # Errors
    /// [`Error::Paging`] for a cursor that comes twice and for lists beyond all measure, [`Error::List`] for an answer
    /// that is not a list.
    pub async fn list_tools(&self, agent: Option<&AgentId>) -> Result<Vec<Box<RawValue>>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Page<'a> {
            #[serde(borrow)]
            tools: Vec<&'a RawValue>,
            next_cursor: Option<String>,
        }
        let mut tools = Vec::new();
        let mut bytes = 0;
        let mut cursors = HashSet::new();
        let mut cursor: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let params = cursor.take().map(|cursor| PaginatedRequestParams::default().with_cursor(Some(cursor)));
            let mut request = ListToolsRequest { params, ..ListToolsRequest::default() };
            if let Some(agent) = agent {
                request.extensions.insert(agent.clone());
            }
            let answer = self.request(ClientRequest::ListToolsRequest(request)).await;
            // A server without tools need not know the method.
            if matches!(answer, Err(CallError::Rpc { code: METHOD_NOT_FOUND, .. })) {
                return Ok(tools);
            }
            let answer = answer.map_err(|error| match error {
                CallError::NotSent(error) | CallError::Refused(error) | CallError::Lost(error) => error,
                CallError::Rpc { code, .. } => Error::ListRefused { code },
                CallError::TimedOut => Error::ListTimeout,
            })?;
            let page: Page<'_> = serde_json::from_str(answer.get()).map_err(|_| Error::List)?;
            bytes += answer.get().len();
            if tools.len() + page.tools.len() > MAX_LISTED || bytes > MAX_LIST_BYTES {
                return Err(Error::Paging);
            }
            tools.extend(page.tools.into_iter().map(ToOwned::to_owned));
            let Some(next) = page.next_cursor else {
                // Filling the cell twice is harmless: it only says that a list was seen.
                let _ = self.listed.set(());
                return Ok(tools);
            };
            if !cursors.insert(next.clone()) {
                return Err(Error::Paging);
            }
            cursor = Some(next);
        }
        Err(Error::Paging)
    }

    /// Runs a tool; the result as the server wrote it.
    ///
    /// A server of revision 2026-07-28 may want arguments repeated as header fields, which rmcp does for tools it has
    /// seen listed on this session (`x-mcp-header`): `needs_list` makes sure it has.
    pub async fn call_tool(
        &self,
        name: &str,
        arguments: JsonObject,
        needs_list: bool,
        deadline: Duration,
    ) -> Result<Box<RawValue>, CallError> {
        let calling = async {
            if needs_list && self.era == Era::Discover {
                let listing = async { self.list_tools(None).await.map(|_| ()) };
                self.listed.get_or_try_init(|| listing).await.map_err(CallError::NotSent)?;
            }
            let params = CallToolRequestParams::new(name.to_owned()).with_arguments(arguments);
            self.request(ClientRequest::CallToolRequest(CallToolRequest::new(params))).await
        };
        timeout(deadline, calling).await.unwrap_or(Err(CallError::TimedOut))
    }

    /// Sends one request for tools and waits for its raw result. Dropping the future cancels the request.
    async fn request(&self, request: ClientRequest) -> Result<Box<RawValue>, CallError> {
        let handle = match self.peer.send_cancellable_request(request, PeerRequestOptions::default()).await {
            Ok(handle) => handle,
            Err(_) => return Err(CallError::NotSent(Error::Closed)),
        };
        let mut pending = Pending { handle: Some(handle), ledger: &self.ledger, tracker: &self.tracker };
        let (answer, known) = pending.answer().await;
        let failed = |error: Error| {
            if known.sent { CallError::Lost(error) } else { CallError::NotSent(error) }
        };
        match answer {
            Ok(_) => known.result.ok_or(CallError::Lost(Error::Closed)),
            Err(ServiceError::McpError(error)) => {
                Err(CallError::Rpc { code: error.code.0, message: error.message.into_owned() })
            }
            Err(ServiceError::TransportSend(error)) => Err(match transport_error(&error) {
                Some(error) if error.is_refusal() => CallError::Refused(error),
                Some(error) => failed(error),
                None => failed(Error::Closed),
            }),
            Err(_) => Err(failed(Error::Closed)),
        }
    }
}

/// A request that is under way; dropped before its answer, it tells the server so.
struct Pending<'a> {
    handle: Option<RequestHandle<RoleClient>>,
    ledger: &'a Ledger,
    tracker: &'a TaskTracker,
}

impl Pending<'_> {
    async fn answer(&mut self) -> (Result<rmcp::model::ServerResult, ServiceError>, super::ledger::Closed) {
        let handle = self.handle.as_mut().expect("taken only here, after the answer");
        let answer = (&mut handle.rx).await.unwrap_or(Err(ServiceError::TransportClosed));
        let known = self.ledger.close(&handle.id);
        self.handle = None;
        (answer, known)
    }
}

impl Drop for Pending<'_> {
    fn drop(&mut self) {
        if let Some(handle) = self.handle.take() {
            let (ledger, id) = (self.ledger.clone(), handle.id.clone());
            let cancelling = handle.cancel(Some("the caller has gone".to_owned()));
            self.tracker.spawn(async move {
                let _ = timeout(CANCEL_TIMEOUT, cancelling).await;
                // Only now: the request itself may have been waiting to be sent, which opens the entry.
                ledger.close(&id);
            });
        }
    }
}

/// Owns what rmcp runs for a session, until its end from either side.
async fn supervise(
    running: rmcp::service::RunningService<RoleClient, InitializeRequestParams>,
    process: Option<Process>,
    end: CancellationToken,
    closed: CancellationToken,
) {
    let exited = process.as_ref().map_or_else(CancellationToken::new, Process::exited);
    let mut waiting = std::pin::pin!(running.waiting());
    let over = tokio::select! {
        _ = &mut waiting => true,
        () = exited.cancelled() => {
            // The answers that a child wrote before it left are still in the pipe.
            timeout(REST_OF_OUTPUT, &mut waiting).await.is_ok()
        }
        () = end.cancelled() => false,
    };
    closed.cancel();
    if !over {
        end.cancel();
        // Past this the child is ended by its owner, which unblocks whatever rmcp waits for.
        let _ = timeout(CLOSE_TIMEOUT, &mut waiting).await;
    }
    drop(process);
}

enum Attempt {
    Only(Era),
    Find,
}

impl Attempt {
    fn mode(self) -> ClientLifecycleMode {
        let preferred_versions = vec![ProtocolVersion::V_2026_07_28];
        match self {
            Self::Only(Era::Initialize) => ClientLifecycleMode::Initialize,
            Self::Only(Era::Discover) => ClientLifecycleMode::Discover { preferred_versions },
            Self::Find => ClientLifecycleMode::Auto {
                preferred_versions,
                legacy_version: Some(ProtocolVersion::LATEST_WITH_INITIALIZE),
            },
        }
    }
}

/// A client that offers nothing: REST callers cannot be asked for roots, samples or answers.
fn who_we_are() -> InitializeRequestParams {
    let us = Implementation::new("portolan", env!("CARGO_PKG_VERSION"));
    // rmcp's default asks `initialize` for a revision that has no `initialize`.
    InitializeRequestParams::new(ClientCapabilities::default(), us)
        .with_protocol_version(ProtocolVersion::LATEST_WITH_INITIALIZE)
}

/// Why a handshake failed, in our own words.
async fn explain(error: ClientInitializeError, process: Option<Process>) -> Error {
    let lost = match &error {
        ClientInitializeError::LegacyFallbackFailed { fallback, .. } => is_lost(fallback),
        error => is_lost(error),
    };
    if let Some(process) = process.filter(|_| lost) {
        // The pipe closes a moment before the child can be reaped.
        let _ = timeout(REST_OF_OUTPUT, process.exited().cancelled_owned()).await;
        if let Some(words) = process.last_words() {
            return words;
        }
    }
    match error {
        ClientInitializeError::TransportError { error, .. } => transport_error(&error).unwrap_or(Error::Closed),
        ClientInitializeError::LegacyFallbackFailed { fallback, .. } => Box::pin(explain(*fallback, None)).await,
        ClientInitializeError::JsonRpcError(error) => Error::HandshakeRefused { code: error.code.0 },
        ClientInitializeError::NoCompatibleProtocolVersion { .. } => Error::Revision,
        ClientInitializeError::ConnectionClosed(_) => Error::Closed,
        _ => Error::Handshake,
    }
}

/// The connection was lost, so that the end of the child may be the reason; after a refusal its end is the consequence.
fn is_lost(error: &ClientInitializeError) -> bool {
    matches!(error, ClientInitializeError::ConnectionClosed(_) | ClientInitializeError::TransportError { .. })
}

/// What a transport's error says, if it says more than that the session is over.
fn transport_error(error: &DynamicTransportError) -> Option<Error> {
    match error.error.downcast_ref()? {
        TransportError::Stdio(Gone) => None,
        TransportError::Sse(error) => Some(Error::Http(error.clone())),
        TransportError::Http(error) => match error {
            StreamableHttpError::Client(error) => Some(Error::Http(error.clone())),
            StreamableHttpError::AuthRequired(_) => Some(Error::Http(HttpError::SignIn)),
            StreamableHttpError::HttpStatus(refusal) => {
                let status = ::http::StatusCode::from_u16(refusal.status).ok()?;
                Some(Error::Http(HttpError::Status(status)))
            }
            _ => None,
        },
    }
}

/// How many questions of a server may wait for our answers. rmcp starts a task for each answer; a server that asks
/// without end and takes none would fill the memory with them.
const MAX_UNANSWERED: usize = 64;

/// A transport that ends when the server asks more than it lets us answer.
struct Bounded {
    transport: AnyTransport,
    unanswered: Arc<AtomicUsize>,
}

impl Transport<RoleClient> for Bounded {
    type Error = TransportError;

    fn name() -> Cow<'static, str> {
        "portolan".into()
    }

    fn send(
        &mut self,
        message: ClientJsonRpcMessage,
    ) -> impl Future<Output = Result<(), TransportError>> + Send + 'static {
        let answers = matches!(message, ClientJsonRpcMessage::Response(_) | ClientJsonRpcMessage::Error(_));
        let unanswered = self.unanswered.clone();
        let sending = self.transport.send(message);
        async move {
            let sent = sending.await;
            if answers {
                unanswered.fetch_sub(1, Ordering::Relaxed);
            }
            sent
        }
    }

    async fn receive(&mut self) -> Option<ServerJsonRpcMessage> {
        let message = self.transport.receive().await?;
        let asks = matches!(message, ServerJsonRpcMessage::Request(_));
        if asks && self.unanswered.fetch_add(1, Ordering::Relaxed) >= MAX_UNANSWERED {
            tracing::warn!("a server asks more than it takes answers for; its session is ended");
            return None;
        }
        Some(message)
    }

    async fn close(&mut self) -> Result<(), TransportError> {
        self.transport.close().await
    }
}

/// The three transports under one type, so that rmcp's loop is compiled once.
enum AnyTransport {
    Stdio(StdioTransport),
    Sse(SseTransport),
    Http(StreamableHttpClientTransport<HttpClient>),
}

#[derive(Debug, thiserror::Error)]
enum TransportError {
    #[error(transparent)]
    Stdio(Gone),
    #[error(transparent)]
    Sse(HttpError),
    #[error(transparent)]
    Http(StreamableHttpError<HttpError>),
}

impl AnyTransport {
    fn send(&mut self, message: ClientJsonRpcMessage) -> BoxFuture<'static, Result<(), TransportError>> {
        match self {
            Self::Stdio(stdio) => {
                let sending = stdio.send(&message);
                Box::pin(async move { sending.await.map_err(TransportError::Stdio) })
            }
            Self::Sse(sse) => {
                let sending = sse.send(&message);
                Box::pin(async move { sending.await.map_err(TransportError::Sse) })
            }
            Self::Http(http) => {
                let sending = http.send(message);
                Box::pin(async move { sending.await.map_err(TransportError::Http) })
            }
        }
    }

    async fn receive(&mut self) -> Option<ServerJsonRpcMessage> {
        match self {
            Self::Stdio(stdio) => stdio.receive().await,
            Self::Sse(sse) => sse.receive().await,
            Self::Http(http) => http.receive().await,
        }
    }

    async fn close(&mut self) -> Result<(), TransportError> {
        match self {
            Self::Stdio(stdio) => stdio.close(),
            Self::Sse(sse) => sse.close(),
            Self::Http(http) => http.close().await.map_err(TransportError::Http)?,
        }
        Ok(())
    }
}
