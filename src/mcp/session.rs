//! One open connection to one server: handshake, list, call.
//!
//! A session ends when its last holder drops it, when its child or stream ends, or when Portolan stops;
//! [`Session::is_closed`] tells. What runs for it ends with it.

use std::borrow::Cow;
use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use http::{HeaderName, HeaderValue, StatusCode};
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use serde_json::{Map, Value};
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};
use tokio_util::task::TaskTracker;

use crate::config::Upstream;
use crate::model::{Connector, Era, ServerType, Tool};
use crate::telemetry::TraceContext;
use crate::telemetry::metrics::{CallResult, Metrics};

use super::budget::{Budget, Held, Oversize};
use super::child::Children;
use super::egress::Egress;
use super::exchange::Answer;
use super::http::HttpWire;
use super::listing::{MAX_TOOLS, definition};
use super::message::{self, METHOD_NOT_FOUND, RpcError};
use super::oauth::{SignIns, Signer};
use super::remote::HttpError;
use super::sse::SseWire;
use super::stdio::StdioWire;
use super::template::{Filled, FilledStdio};
use super::watch::Bell;
use super::{AgentId, Error, mirror};

/// The first revision without `initialize`.
pub const MODERN: &str = "2026-07-28";
/// The revisions of `initialize`, the one to ask for first.
const INITIALIZE: [&str; 5] = ["2025-11-25", "2025-06-18", "2025-03-26", "2024-11-05", "2024-10-07"];
/// How long a server may be silent over `server/discover` before it is taken for one that does not know it.
const DISCOVER_TIMEOUT: Duration = Duration::from_secs(10);
/// MCP 2026-07-28, error codes: HeaderMismatch and MissingRequiredClientCapability, which only a modern server has.
const MODERN_REFUSALS: [i64; 2] = [-32020, -32021];
/// What one list may have of pages, tools and bytes before it is taken to be endless.
const MAX_PAGES: usize = 1_000;
const MAX_LISTED: usize = 2 * MAX_TOOLS;
const MAX_LIST_BYTES: usize = 64 * 1024 * 1024;

/// What opening a session needs besides the server.
pub struct Context {
    pub settings: Upstream,
    pub egress: Egress,
    pub tracker: TaskTracker,
    pub children: Children,
    pub sign_ins: SignIns,
    pub budget: Arc<Budget>,
    pub metrics: Metrics,
    /// Portolan stops: every session ends, also one that is being opened or is in use.
    pub stop: CancellationToken,
}

/// A request, as each transport needs it.
pub struct Ask<'a> {
    pub method: &'static str,
    /// JSON.
    pub params: &'a str,
    /// It asks whether the server is a modern one.
    pub modern: bool,
    /// The tool that is called, and the arguments that go as header fields, too.
    pub tool: Option<&'a str>,
    pub mirrored: &'a [(HeaderName, HeaderValue)],
    pub agent: Option<&'a AgentId>,
    /// The trace that goes on at the server.
    pub trace: Option<&'a TraceContext>,
}

impl<'a> Ask<'a> {
    pub fn new(method: &'static str, params: &'a str) -> Self {
        Self { method, params, modern: false, tool: None, mirrored: &[], agent: None, trace: None }
    }
}

/// What the handshake found.
#[derive(Clone, Debug)]
pub struct Greeted {
    /// The MCP revision.
    pub version: &'static str,
    /// The server says when its list of tools changes.
    pub announces_lists: bool,
}

impl Greeted {
    pub fn is_modern(&self) -> bool {
        self.version == MODERN
    }

    /// The parameters of a request to a modern server that needs none.
    pub fn plain_params(&self) -> String {
        format!(r#"{{"_meta":{}}}"#, meta())
    }

    /// The parameters of `subscriptions/listen`.
    pub fn listen_params(&self) -> String {
        format!(r#"{{"notifications":{{"toolsListChanged":true}},"_meta":{}}}"#, meta())
    }
}

/// What a modern server wants with each request (MCP 2026-07-28, metadata). A client that offers nothing: REST callers
/// cannot be asked for roots, samples or answers.
fn meta() -> String {
    format!(
        r#"{{"io.modelcontextprotocol/protocolVersion":"{MODERN}","io.modelcontextprotocol/clientInfo":{},"io.modelcontextprotocol/clientCapabilities":{{}}}}"#,
        who_we_are()
    )
}

fn who_we_are() -> String {
    format!(r#"{{"name":"portolan","version":"{}"}}"#, env!("CARGO_PKG_VERSION"))
}

/// All tools of a server, each definition as the server wrote it, and the room that they take.
pub struct Listed {
    pub tools: Vec<Box<RawValue>>,
    _held: Vec<Held>,
}

/// How a call ended that has no result.
#[derive(Debug)]
pub enum CallError {
    /// Nothing of it left Portolan, or the server does not know of it: it did not run and may be sent again.
    NotSent(Error),
    /// The server answered with a JSON-RPC error.
    Rpc(RpcError),
    /// The server's HTTP side turned the call away before any tool saw it.
    Refused(Error),
    TimedOut,
    /// The server's answer came and is too large.
    Untaken(Oversize),
    /// The session was lost, or the answer cannot be had; the tool may have run.
    Lost(Error),
}

impl CallError {
    /// As it is counted.
    pub(super) fn result(&self) -> CallResult {
        match self {
            Self::NotSent(_) => CallResult::NotSent,
            Self::Rpc(_) => CallResult::RpcError,
            Self::Refused(_) => CallResult::Refused,
            Self::TimedOut => CallResult::TimedOut,
            Self::Untaken(_) => CallResult::TooLarge,
            Self::Lost(_) => CallResult::Lost,
        }
    }

    /// The same, of a request that is harmless when it is repeated.
    fn into_error(self, refused: impl FnOnce(i64) -> Error, timeout: Error) -> Error {
        match self {
            Self::NotSent(error) | Self::Refused(error) | Self::Lost(error) => error,
            Self::Rpc(RpcError { code, .. }) => refused(code),
            Self::TimedOut => timeout,
            Self::Untaken(oversize) => Error::Oversize(oversize),
        }
    }
}

enum Wire {
    Stdio(StdioWire),
    Sse(SseWire),
    Http(HttpWire),
}

pub struct Session {
    wire: Wire,
    greeted: Greeted,
    /// What goes with every request to a modern server.
    meta: Option<Box<RawValue>>,
    end: CancellationToken,
    retired: AtomicBool,
    served: AtomicBool,
    opened: Instant,
    used: std::sync::Mutex<Instant>,
    _end: DropGuard,
}

impl Session {
    /// Connects and shakes hands within the handshake deadline. Without a known era it is found: modern first (MCP
    /// 2026-07-28, versioning), then, for a server that ends the connection over it, `initialize` on a new one.
    /// `signer` signs what goes to a URL; `permit` is given back when the last child is gone.
    pub async fn open(
        filled: &Filled,
        signer: Option<Signer>,
        known: Option<Era>,
        context: &Context,
        bell: Bell,
        permit: Option<OwnedSemaphorePermit>,
    ) -> Result<Self, Error> {
        let permit = permit.map(Arc::new);
        let time = match &filled.connector {
            Connector::Stdio(_) => context.settings.start_timeout,
            Connector::Sse(_) | Connector::StreamableHttp(_) => context.settings.handshake_timeout,
        };
        let deadline = Instant::now() + time;
        let (first, second) = match known {
            Some(era) => (Attempt::Only(era), Attempt::Find),
            None => (Attempt::Find, Attempt::Only(Era::Initialize)),
        };
        let attempt =
            |attempt| Self::attempt(filled, signer.clone(), attempt, context, &bell, permit.clone(), deadline);
        let opened = match attempt(first).await {
            // Past the deadline the first child may still be there.
            Err(error)
                if error.is_about_the_handshake() && !context.stop.is_cancelled() && Instant::now() < deadline =>
            {
                // The first error says more, unless the second attempt got further.
                attempt(second).await.map_err(|later| if later.is_about_the_handshake() { error } else { later })
            }
            result => result,
        };
        // What a stop cut off says nothing about the server.
        opened.map_err(|error| if context.stop.is_cancelled() { Error::Stopping } else { error })
    }

    async fn attempt(
        filled: &Filled,
        signer: Option<Signer>,
        attempt: Attempt,
        context: &Context,
        bell: &Bell,
        permit: Option<Arc<OwnedSemaphorePermit>>,
        deadline: Instant,
    ) -> Result<Self, Error> {
        let end = context.stop.child_token();
        let guard = end.clone().drop_guard();
        let share = context.budget.share();
        let opening = async {
            let wire = match &filled.connector {
                Connector::Stdio(config) => {
                    let command = FilledStdio { config, filled };
                    let (bell, end) = (bell.clone(), end.clone());
                    Wire::Stdio(StdioWire::open(command, context, share, bell, permit, end, deadline).await?)
                }
                Connector::Sse(remote) => {
                    Wire::Sse(SseWire::open(remote, signer, context, share, bell.clone(), end.clone(), deadline).await?)
                }
                Connector::StreamableHttp(remote) => {
                    Wire::Http(HttpWire::open(remote, signer, context, share, bell.clone()).await?)
                }
            };
            match wire.greet(attempt, deadline).await {
                Ok(greeted) => Ok((wire, greeted)),
                Err(error) => match &wire {
                    Wire::Stdio(stdio) => {
                        // Two children at a time would be one more than there is room for.
                        stdio.leave(deadline).await;
                        Err(match error {
                            Error::HandshakeTimeout { .. } => Error::HandshakeTimeout { stderr: stdio.last_line() },
                            error => error,
                        })
                    }
                    Wire::Sse(_) | Wire::Http(_) => Err(error),
                },
            }
        };
        let (wire, greeted) = context.stop.run_until_cancelled(opening).await.ok_or(Error::Stopping)??;
        match &wire {
            Wire::Stdio(stdio) if greeted.is_modern() && greeted.announces_lists => {
                stdio.subscribe(&greeted.listen_params());
            }
            Wire::Stdio(_) | Wire::Sse(_) => {}
            Wire::Http(http) => {
                context.tracker.spawn(http.clone().listen_and_leave(greeted.clone(), end.clone()));
            }
        }
        let meta = greeted.is_modern().then(|| RawValue::from_string(meta()).expect("it is JSON"));
        let now = Instant::now();
        Ok(Self {
            wire,
            greeted,
            meta,
            end,
            retired: AtomicBool::new(false),
            served: AtomicBool::new(false),
            opened: now,
            used: std::sync::Mutex::new(now),
            _end: guard,
        })
    }

    /// Which handshake worked.
    pub fn era(&self) -> Era {
        if self.greeted.is_modern() { Era::Discover } else { Era::Initialize }
    }

    /// The MCP revision that is spoken.
    pub fn version(&self) -> &'static str {
        self.greeted.version
    }

    pub fn transport(&self) -> ServerType {
        match self.wire {
            Wire::Stdio(_) => ServerType::Stdio,
            Wire::Sse(_) => ServerType::Sse,
            Wire::Http(_) => ServerType::StreamableHttp,
        }
    }

    pub fn has_child(&self) -> bool {
        matches!(self.wire, Wire::Stdio(_))
    }

    pub fn opened(&self) -> Instant {
        self.opened
    }

    /// When it was last handed out, or done with a call.
    pub fn used(&self) -> Instant {
        *self.used.lock().expect("no code panics while it holds the time")
    }

    pub fn touch(&self) {
        *self.used.lock().expect("no code panics while it holds the time") = Instant::now();
    }

    /// It has answered a call.
    pub fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    /// No more calls can be made on this session.
    pub fn is_closed(&self) -> bool {
        self.retired.load(Ordering::Relaxed) || self.end.is_cancelled()
    }

    /// Why the session ended by itself, if it has.
    pub fn ended(&self) -> Option<Error> {
        match &self.wire {
            Wire::Stdio(stdio) => stdio.ended(),
            Wire::Sse(sse) => sse.ended(),
            Wire::Http(http) => http.ended(),
        }
    }

    /// Takes no more calls; those that are under way finish.
    pub fn retire(&self) {
        self.retired.store(true, Ordering::Relaxed);
    }

    /// All tools, page after page, each definition as the server wrote it.
    ///
    /// # Errors
    /// [`Error::Paging`] for a cursor that comes twice and for lists beyond all measure, [`Error::List`] for an answer
    /// that is not a list, [`Error::ListTimeout`] at the deadline.
    pub async fn list_tools(&self, agent: Option<&AgentId>, deadline: Instant) -> Result<Listed, Error> {
        #[derive(Serialize)]
        struct Params<'a> {
            #[serde(skip_serializing_if = "Option::is_none")]
            cursor: Option<&'a str>,
            #[serde(rename = "_meta", skip_serializing_if = "Option::is_none")]
            meta: Option<&'a RawValue>,
        }
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Page<'a> {
            #[serde(borrow)]
            tools: Vec<&'a RawValue>,
            next_cursor: Option<String>,
        }
        let mut listed = Listed { tools: Vec::new(), _held: Vec::new() };
        let mut bytes = 0;
        let mut cursors = HashSet::new();
        let mut cursor: Option<String> = None;
        for _ in 0..MAX_PAGES {
            let params = text(&Params { cursor: cursor.as_deref(), meta: self.meta.as_deref() });
            let ask = Ask { agent, ..Ask::new("tools/list", &params) };
            let answer = match self.wire.request(&ask, deadline).await {
                Ok(answer) => answer,
                // A server without tools need not know the method.
                Err(CallError::Rpc(RpcError { code: METHOD_NOT_FOUND, .. })) => return Ok(listed),
                Err(error) => return Err(error.into_error(|code| Error::ListRefused { code }, Error::ListTimeout)),
            };
            let page: Page<'_> = serde_json::from_str(answer.result.get()).map_err(|_| Error::List)?;
            bytes += answer.result.get().len();
            if listed.tools.len() + page.tools.len() > MAX_LISTED || bytes > MAX_LIST_BYTES {
                return Err(Error::Paging);
            }
            listed.tools.extend(page.tools.into_iter().map(ToOwned::to_owned));
            listed._held.push(answer.held);
            let Some(next) = page.next_cursor else {
                self.touch();
                self.served.store(true, Ordering::Relaxed);
                return Ok(listed);
            };
            if !cursors.insert(next.clone()) {
                return Err(Error::Paging);
            }
            cursor = Some(next);
        }
        Err(Error::Paging)
    }

    /// Runs a tool; the result as the server wrote it. `trace` is passed on: over HTTP in header fields, and in `_meta` to
    /// a server of the revision that says what it means there (MCP 2026-07-28, SEP-414).
    pub async fn call_tool(
        &self,
        tool: &Tool,
        arguments: &Map<String, Value>,
        trace: Option<&TraceContext>,
        deadline: Instant,
    ) -> Result<Answer, CallError> {
        #[derive(Serialize)]
        struct Params<'a> {
            name: &'a str,
            arguments: &'a Map<String, Value>,
            #[serde(rename = "_meta", skip_serializing_if = "Option::is_none")]
            meta: Option<Cow<'a, RawValue>>,
        }
        let meta = self.meta.as_deref().map(|meta| match trace {
            Some(trace) => Cow::Owned(with(meta, &trace.members())),
            None => Cow::Borrowed(meta),
        });
        let params = text(&Params { name: &tool.name, arguments, meta });
        // Only a modern server over HTTP wants arguments mirrored.
        let mirrors = matches!(self.wire, Wire::Http(_)) && self.greeted.is_modern();
        let mirrored = if mirrors && tool.definition.contains(mirror::ANNOTATION) {
            mirror::fields(&definition(tool).input_schema, arguments)
        } else {
            Vec::new()
        };
        let ask = Ask { tool: Some(&tool.name), mirrored: &mirrored, trace, ..Ask::new("tools/call", &params) };
        let answer = self.wire.request(&ask, deadline).await;
        // It was in use until now.
        self.touch();
        if matches!(answer, Ok(_) | Err(CallError::Rpc(_))) {
            self.served.store(true, Ordering::Relaxed);
        }
        answer
    }
}

/// An object of ours, which is not empty, with more members.
fn with(object: &RawValue, members: &str) -> Box<RawValue> {
    let open = object.get().strip_suffix('}').expect("it is an object without white space around it");
    RawValue::from_string(format!("{open},{members}}}")).expect("it is JSON")
}

fn text(params: &impl Serialize) -> String {
    serde_json::to_string(params).expect("parameters of ours are JSON")
}

enum Attempt {
    Only(Era),
    Find,
}

impl Wire {
    async fn request(&self, ask: &Ask<'_>, deadline: Instant) -> Result<Answer, CallError> {
        match self {
            Self::Stdio(stdio) => stdio.request(ask, deadline).await,
            Self::Sse(sse) => sse.request(ask, deadline).await,
            Self::Http(http) => http.request(ask, deadline).await,
        }
    }

    async fn greet(&self, attempt: Attempt, deadline: Instant) -> Result<Greeted, Error> {
        let greeted = match attempt {
            Attempt::Only(Era::Discover) => self.discover(deadline, false).await?,
            Attempt::Only(Era::Initialize) => None,
            Attempt::Find => self.discover(deadline, true).await?,
        };
        let greeted = match greeted {
            Some(greeted) => greeted,
            None => self.initialize(deadline).await?,
        };
        if let Self::Http(http) = self {
            http.agree(&greeted);
        }
        if !greeted.is_modern() {
            match self {
                Self::Stdio(stdio) => stdio.notify(message::INITIALIZED.to_vec()),
                Self::Sse(sse) => sse.notify(message::INITIALIZED.into(), deadline).await?,
                Self::Http(http) => http.notify(message::INITIALIZED.into(), deadline).await?,
            }
        }
        Ok(greeted)
    }

    /// Asks a server whether it is a modern one. `None` when it is not, and `or_not` allows that.
    async fn discover(&self, deadline: Instant, or_not: bool) -> Result<Option<Greeted>, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Discovered {
            supported_versions: Vec<String>,
            #[serde(default)]
            capabilities: Capabilities,
        }
        let until = if or_not { deadline.min(Instant::now() + DISCOVER_TIMEOUT) } else { deadline };
        let params = format!(r#"{{"_meta":{}}}"#, meta());
        let ask = Ask { modern: true, ..Ask::new("server/discover", &params) };
        match self.request(&ask, until).await {
            Ok(answer) => {
                let discovered: Result<Discovered, _> = serde_json::from_str(answer.result.get());
                match discovered {
                    Ok(found) if found.supported_versions.iter().any(|version| version == MODERN) => {
                        Ok(Some(Greeted { version: MODERN, announces_lists: found.capabilities.announces_lists() }))
                    }
                    Ok(_) if or_not => Ok(None),
                    Ok(_) => Err(Error::Revision),
                    Err(_) if or_not => Ok(None),
                    Err(_) => Err(Error::Handshake),
                }
            }
            Err(CallError::Rpc(RpcError { code, .. })) if !or_not || MODERN_REFUSALS.contains(&code) => {
                Err(Error::HandshakeRefused { code })
            }
            // A server of an older revision refuses it in its own way, or says nothing (MCP 2026-07-28, versioning).
            Err(CallError::Rpc(_)) => Ok(None),
            Err(CallError::Refused(Error::Http(HttpError::Status { status, retry_after: None })))
                if or_not
                    && status.is_client_error()
                    && !matches!(status, StatusCode::FORBIDDEN | StatusCode::TOO_MANY_REQUESTS) =>
            {
                Ok(None)
            }
            Err(CallError::TimedOut) if or_not && until < deadline => Ok(None),
            Err(error) => {
                Err(error.into_error(|code| Error::HandshakeRefused { code }, Error::HandshakeTimeout { stderr: None }))
            }
        }
    }

    async fn initialize(&self, deadline: Instant) -> Result<Greeted, Error> {
        #[derive(Deserialize)]
        #[serde(rename_all = "camelCase")]
        struct Initialized {
            protocol_version: String,
            #[serde(default)]
            capabilities: Capabilities,
        }
        let params =
            format!(r#"{{"protocolVersion":"{}","capabilities":{{}},"clientInfo":{}}}"#, INITIALIZE[0], who_we_are());
        let answer = self.request(&Ask::new("initialize", &params), deadline).await.map_err(|error| {
            error.into_error(|code| Error::HandshakeRefused { code }, Error::HandshakeTimeout { stderr: None })
        })?;
        let initialized: Initialized = serde_json::from_str(answer.result.get()).map_err(|_| Error::Handshake)?;
        let version = INITIALIZE.into_iter().find(|version| *version == initialized.protocol_version);
        Ok(Greeted {
            version: version.ok_or(Error::Revision)?,
            announces_lists: initialized.capabilities.announces_lists(),
        })
    }
}

/// What a server can do, as far as Portolan makes use of it.
#[derive(Default, Deserialize)]
struct Capabilities {
    #[serde(default)]
    tools: Value,
}

impl Capabilities {
    fn announces_lists(&self) -> bool {
        self.tools["listChanged"] == true
    }
}
